"""MetaRM: a reward model, trained on OLD preferences, that still tells NEW responses apart.

Concept: PPO moves the policy away from the responses that the reward model r_theta was trained on, and
r_theta separates the new ones less and less. MetaRM has two sets: D, the old preference pairs, and S, k
unlabelled responses a prompt from the current policy. Before each step on D it climbs, for a look only, to
parameters that separate S better, and takes D's gradient there. Dou et al., "MetaRM" (arXiv 2405.00438; AAAI
2025, whose equation numbers are used here):

    Algorithm 1.  for t = 0 .. T-1:
        sample X_t, n pairs of D, and X_s, m prompts of S
        J       = difference loss of r_theta on X_s                   Eq. 2    difference_loss
        theta'  = theta + eta * grad J(theta)     (an ASCENT)         Eq. 3    meta_gradient; lookahead
        g       = gradient of the vanilla loss L (Eq. 1) at theta'    Eq. 4    meta_gradient
        theta  <- theta - alpha * g               (from theta)        Eq. 5    metarm_step

    python metarm.py --model runs/toy/sft --data runs/toy/pairs/train.jsonl \
        --eval_data runs/toy/pairs/valid.jsonl --meta runs/toy/metarm-1/meta/samples.jsonl \
        --eta 0.1 --normalize --out runs/toy/metarm-1/rm

writes a folder that `AutoModelForSequenceClassification.from_pretrained` reads, its tokenizer and `log.jsonl`
(a row a step); with `--save_adapted DIR` also theta' of the trained model, as a folder of the same kind.

In a training loop of your own (this file needs nothing but torch):

    def vanilla_loss(forward):
        return preference_loss(forward(**chosen).logits[:, 0], forward(**rejected).logits[:, 0])
    def meta_loss(forward):
        return metarm.difference_loss(forward(**samples).logits[:, 0].view(m, k))
    info = metarm.metarm_step(model, optimizer, vanilla_loss, meta_loss, eta=0.1, normalize=True)

Turn dropout off (`model.eval()`): J would climb the noise between two dropout masks, and L at theta' would be
the loss of another random function than the one that climbed.
"""

import math
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Callable, Iterator, Literal

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Callable], torch.Tensor]  # forward -> scalar; `forward` is the model at some parameters


# ------------------------------------------------------------------------------------------------ Algorithm 1

def difference_loss(rewards: torch.Tensor) -> torch.Tensor:
    """Eq. 2: J = 2/k^2 * sum over i < j of sigma(|r_i - r_j|), averaged over the prompts. Larger is better.

    Shape: (m, k), the rewards of k >= 2 responses to each of m prompts. Returns a scalar between (k-1)/(2k),
    all rewards equal, and (k-1)/k, all far apart. Raises ValueError on another shape. Source: paper Eq. 2.

    |.| has a kink at 0, where torch takes the slope 0: two responses that tie exactly are not pushed apart.
    """
    if rewards.dim() != 2 or rewards.shape[0] < 1 or rewards.shape[1] < 2 or not rewards.is_floating_point():
        raise ValueError(f"difference_loss needs float rewards of shape (m prompts, k >= 2 responses), got "
                         f"{rewards.dtype} of shape {tuple(rewards.shape)}")
    k = rewards.shape[1]
    i, j = torch.triu_indices(k, k, offset=1, device=rewards.device)
    return 2 / k**2 * (rewards[:, i] - rewards[:, j]).abs().sigmoid().sum(dim=1).mean()


def meta_gradient(model: torch.nn.Module, vanilla_loss: Loss | list[Loss], meta_loss: Loss | list[Loss],
                  eta: float, order: Literal["first", "exact"] = "first",
                  normalize: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Eqs. 2-4: the gradient that Eq. 5 applies at theta. The model's parameters and `.grad` stay untouched.

    vanilla_loss, meta_loss: pure functions forward -> scalar, L on X_t and J on X_s, or lists of them:
        micro-batches of equal weight, whose graphs live one at a time. They call `forward(*args, **kwargs)`,
        which returns what the model returns, and never the model itself.
    eta: length of the ascent step, >= 0; with normalize=True of the step eta * grad J / |grad J|, the norm
        taken over all trainable parameters.
    order: "first", as the authors run it, takes Eq. 4 as it stands; "exact" also differentiates theta' by
        theta, as MAML does, in 2.0 to 2.3 times the time (J in micro-batches: 2.7 times, but less memory).

    Returns (grads, info): grads has a tensor for every trainable parameter, zeros where it has no part; info
    has `vanilla_loss_adapted` L(theta'), `difference` J(theta), `meta_grad_norm` |grad J|, `grad_norm` of
    grads and `moved`, the share of weights that Eq. 3 changed at all (a bf16 weight of 1 ignores 0.001).
    Memory at theta', first order: one copy of the parameters and one gradient.
    Raises ValueError on bad arguments, on a loss or gradient that is not finite, and on models that must not
    be entered this way (gradient checkpointing, DDP, FSDP2); `lookahead` is right with those.
    """
    _check(eta, order)
    theta = _trainable(model)
    vanilla_losses, meta_losses = _as_list(vanilla_loss, "vanilla_loss"), _as_list(meta_loss, "meta_loss")
    keep_graph = order == "exact" and len(meta_losses) == 1

    # J on X_s and its gradient, at theta (Eq. 2).
    difference, grad_J = _value_and_gradient(model, theta, meta_losses, "meta_loss", keep_graph)

    # theta' = theta + eta * grad J (Eq. 3), as a second set of parameters beside the model's own.
    scale, meta_grad_norm = _step_size(grad_J.values(), eta, normalize)
    theta_prime = _ascend(theta, grad_J, scale)
    moved = sum(torch.count_nonzero(theta_prime[name] != p).to(scale.device) for name, p in theta.items())
    if order == "first":
        del grad_J  # before L's graph is built

    # L on X_t and its gradient, at theta' and with respect to theta' (Eq. 4).
    loss, grads = _value_and_gradient(model, theta_prime, vanilla_losses, "vanilla_loss")

    # THE line between the two orders. First order is done: it takes theta' as if it did not depend on theta.
    # But it does, and by the chain rule d L(theta') / d theta = (I + eta * Hessian of J) @ grads.
    if order == "exact":
        grads = _add_curvature(grads, model, theta, meta_losses, grad_J, scale, meta_grad_norm, normalize)

    info = {"vanilla_loss_adapted": loss, "difference": difference, "meta_grad_norm": meta_grad_norm,
            "grad_norm": _norm(grads.values()), "moved": moved / sum(p.numel() for p in theta.values())}
    info = {name: float(value) for name, value in info.items()}  # here, at the end, we wait for the device
    for name, what in [("difference", "J (meta_loss) at theta"), ("meta_grad_norm", "|grad J| at theta"),
                       ("vanilla_loss_adapted", "L (vanilla_loss) at theta'"), ("grad_norm", "|grad L|")]:
        if not math.isfinite(info[name]):
            raise ValueError(f"{what} is {info[name]}, so no step was taken: look for NaN in weights and "
                             f"batch, or lower eta (now {eta}) or the learning rate")
    return grads, info


def metarm_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, vanilla_loss: Loss | list[Loss],
                meta_loss: Loss | list[Loss], eta: float, order: Literal["first", "exact"] = "first",
                normalize: bool = False, max_grad_norm: float | None = None) -> dict[str, float]:
    """One turn of Algorithm 1: `meta_gradient`, then Eq. 5, the optimizer's step at the ORIGINAL parameters.

    Arguments, returned info and ValueErrors as in `meta_gradient`; on an error nothing has been stepped.
    max_grad_norm: a longer gradient is scaled down to it. Afterwards every `.grad` is None.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
    grads, info = meta_gradient(model, vanilla_loss, meta_loss, eta, order, normalize)
    parameters = {name: p for name, p in model.named_parameters() if name in grads}
    for name, p in parameters.items():
        p.grad = grads[name]
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
    optimizer.step()  # theta <- theta - alpha * g (Eq. 5) if it is SGD; Adam takes g just as well
    for p in parameters.values():
        p.grad = None
    return info


@contextmanager
def lookahead(model: torch.nn.Module, eta: float, normalize: bool = False) -> Iterator[None]:
    """Eqs. 3-4, first order, in place, where `meta_gradient` cannot go: DDP, FSDP2, TRL, checkpointing.

        J(model).backward()
        with metarm.lookahead(model, eta):  # takes p.grad as grad J, moves the model to theta', clears p.grad
            L(model).backward()             # forward AND backward: checkpointing recomputes in backward
        optimizer.step()                    # the model is at theta, bit for bit; p.grad is grad L(theta')

    Gradient accumulation: back-propagate all of S before, and all of D inside, ONE `with`. Entering it for
    every micro-batch adds up gradients of L from as many different theta', each a fraction of the climb.
    GradScaler: scale J and L as usual and pass eta / scaler.get_scale(), since p.grad is scale * grad J; with
    normalize=True pass eta as it is. An overflow in J reaches L through theta', and scaler.step skips it.
    Raises ValueError on a bad eta, without any gradient, or normalised under FSDP1 (its shards do not know the
    norm of the whole), RuntimeError if FSDP2 failed inside its forward.
    """
    _check(eta)
    _reshard(model)
    # These very objects: under FSDP2 a forward without a backward leaves the module holding its gathered
    # weights, and model.parameters() would then be another set of tensors than the shards that are trained.
    parameters = [p for p in model.parameters() if p.requires_grad]
    if all(p.grad is None for p in parameters):
        raise ValueError("lookahead: no parameter has a gradient; back-propagate J (all of S) before it")
    if normalize and any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError("lookahead: under FSDP1 a process sees its own shard of grad J only, and so not its "
                         "norm; use FSDP2 (torch.distributed.fsdp.fully_shard), or normalize=False")
    theta = [p.detach().clone() for p in parameters]  # a copy: subtracting the step again would round
    try:
        with torch.no_grad():
            scale, _ = _step_size([p.grad for p in parameters if p.grad is not None], eta, normalize)
            for p in parameters:
                if p.grad is not None:
                    p.copy_(_plus(p, scale, p.grad))
                p.grad = None
        torch.clear_autocast_cache()  # in one autocast region, L would else run on theta's cached bf16 copies
        yield
    finally:
        _reshard(model)
        with torch.no_grad():
            for p, original in zip(parameters, theta):
                p.copy_(original)
        torch.clear_autocast_cache()
        if not {id(p) for p in parameters} <= {id(p) for p in model.parameters()}:
            raise RuntimeError("lookahead: an error inside FSDP2's forward left the module with the gathered "
                               "weights of theta'; only its shards are back at theta: build the model anew")


def adapted_parameters(model: torch.nn.Module, meta_loss: Loss | list[Loss], eta: float,
                       normalize: bool = False) -> dict[str, torch.Tensor]:
    """theta' of Eq. 3, {name: tensor} for every trainable parameter; the model stays untouched.

    Algorithm 1 keeps theta and throws theta' away. But it is theta' where L was minimised, so it is worth
    measuring: `functional_call(model, adapted, ...)`, or `model.load_state_dict(adapted, strict=False)`.
    Raises ValueError as `meta_gradient` does.
    """
    _check(eta)
    theta = _trainable(model)
    _, grad_J = _value_and_gradient(model, theta, _as_list(meta_loss, "meta_loss"), "meta_loss")
    scale, norm = _step_size(grad_J.values(), eta, normalize)
    if not math.isfinite(norm):
        raise ValueError(f"the norm of grad J at theta is {float(norm)}: look for NaN in weights and batch")
    return {name: p.detach() for name, p in _ascend(theta, grad_J, scale).items()}


# -------------------------------------------------------------------------------------- its steps, one by one

def _value_and_gradient(model, parameters, losses, name, create_graph=False):
    """(mean of the losses, {name: its gradient}) at `parameters`, one micro-batch after the other."""
    def forward(*args, **kwargs):
        return functional_call(model, parameters, args, kwargs)  # the model with these in place of its own

    leaves, total = list(parameters.values()), 0.0
    # A second derivative (create_graph) needs the math kernel: fused attention kernels have a first one only.
    with sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext():
        for loss in losses:
            value = loss(forward)
            if not isinstance(value, torch.Tensor) or value.dim() != 0:
                got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"{name} must return a scalar tensor, got {got}")
            value, grads = value / len(losses), [None]
            if value.requires_grad and create_graph:
                grads = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            elif value.requires_grad:
                value.backward(inputs=leaves)  # adds up in the .grad of these leaves, never in the model's
                grads = [p.grad for p in leaves]
            if all(g is None for g in grads):
                raise ValueError(f"{name} does not depend on the trainable parameters: it must call the "
                                 f"`forward` it is given, not the model, outside torch.no_grad()")
            total = total + value.detach()
    for p in leaves:
        p.grad = None
    torch.clear_autocast_cache()  # in an autocast region it would keep bf16 copies of these leaves
    return total, {key: torch.zeros_like(p) if g is None else g
                   for (key, p), g in zip(parameters.items(), grads)}


def _step_size(grads, eta, normalize):
    """(the factor before grad J in Eq. 3, |grad J|), 0-dim tensors: a float would wait for the device.

    Normalised, the factor is eta / (|grad J| + 1e-12), and 0 where grad J = 0. Mind the case in between: when
    all k responses are identical, rounding still makes their rewards differ where they sit in rows of another
    padding. grad J is then 1e-8 of noise, and normalising blows it up to a full step in a random direction.
    """
    norm = _norm(grads)
    return (eta / (norm + 1e-12) * (norm > 0) if normalize else torch.full_like(norm, eta)), norm


@torch.no_grad()
def _ascend(theta, grad_J, scale):
    """Eq. 3: theta' as new leaves."""
    return {name: _plus(p, scale, grad_J[name]).requires_grad_() for name, p in theta.items()}


def _add_curvature(grads, model, theta, meta_losses, grad_J, scale, norm, normalize):
    """g + scale * H (I - u u^T) g: with g = grads, H the Hessian of J at theta, u = grad J / |grad J| (or 0).

    That is the transposed Jacobian of Eq. 3 times g. (I - u u^T: a normalised step keeps its length, however
    grad J grows.) H v is the gradient of the number grad J . v (Pearlmutter 1994), so H is never formed. It
    needs the graph of grad J: kept since Eq. 2, or, with micro-batches, built again one at a time.
    """
    v = grads
    if normalize:
        along = sum((grad_J[name].detach() * g).sum() for name, g in grads.items()) / (norm + 1e-12) ** 2
        v = {name: g - along * grad_J[name].detach() for name, g in grads.items()}
    for loss in meta_losses:
        if len(meta_losses) > 1:
            _, grad_J = _value_and_gradient(model, theta, [loss], "meta_loss", create_graph=True)
        curved = [name for name, g in grad_J.items() if g.requires_grad]  # J is linear in the others
        if curved:
            Hv = torch.autograd.grad([grad_J[name] for name in curved], list(theta.values()),
                                     grad_outputs=[v[name] for name in curved], materialize_grads=True)
            grads = {name: _plus(g, scale / len(meta_losses), h) for (name, g), h in zip(grads.items(), Hv)}
    return grads


def _plus(a, scale, b):
    """a + scale * b, in float32 at least and rounded once; fp16 could not even hold a scale of 1e5."""
    return (a + scale.to(a.device) * b.to(scale.dtype)).to(a.dtype)


def _norm(tensors):
    """Euclidean norm of all tensors together, in float32 at least; over all processes' shards under FSDP2."""
    norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.promote_types(t.dtype, torch.float32))
             for t in tensors]
    norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _trainable(model):
    """theta: {name: leaf}, sharing the trainable parameters' memory but not their .grad; tied ones once."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("gradient checkpointing is on: backward would recompute activations at theta, not "
                         "at theta', and give a wrong gradient; use metarm.lookahead, or turn it off")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel) or any(
            hasattr(p, "full_tensor") for p in model.parameters()):
        raise ValueError("a DDP or FSDP2 model cannot be called at other parameters; use metarm.lookahead")
    theta = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    if not theta:
        raise ValueError("the model has no trainable parameters: requires_grad is False for all of them")
    return theta


def _reshard(model):
    """FSDP2: drop gathered weights, so that the next forward gathers the shards anew."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def _as_list(loss, name):
    losses = [loss] if callable(loss) else list(loss)
    if not losses or not all(map(callable, losses)):
        raise ValueError(f"{name} must be a function forward -> scalar, or a list of at least one")
    return losses


def _check(eta, order="first"):
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be a finite number >= 0, got {eta}")
    if order not in ("first", "exact"):
        raise ValueError(f"order must be 'first' or 'exact', got {order!r}")


# ---------------------------------------------------------------------------------- what to look at meanwhile

def diagnostics(model: torch.nn.Module, vanilla_loss: Loss | list[Loss], meta_loss: Loss | list[Loss],
                eta: float, normalize: bool = False) -> dict[str, float]:
    """Eqs. 6-8 in numbers, at theta. Costs a little more than a training step; arguments as `meta_gradient`.

    Taylor: L(theta') = L(theta) + eta * grad L . grad J + o(eta). Returns `vanilla_loss` L(theta),
    `first_order_gain` eta * grad L . grad J (hold it against L(theta') - L(theta)), `difference_adapted`
    J(theta') and `cosine` of grad L and grad J: above 0, climbing J raises L here, the aims conflict.
    """
    theta, meta_losses = _trainable(model), _as_list(meta_loss, "meta_loss")
    loss, grad_L = _value_and_gradient(model, theta, _as_list(vanilla_loss, "vanilla_loss"), "vanilla_loss")
    _, grad_J = _value_and_gradient(model, theta, meta_losses, "meta_loss")
    scale, norm = _step_size(grad_J.values(), eta, normalize)
    difference, _ = _value_and_gradient(model, _ascend(theta, grad_J, scale), meta_losses, "meta_loss")
    dot = sum((grad_L[name] * grad_J[name]).sum() for name in theta)
    cosine = dot / (_norm(grad_L.values()) * norm + 1e-12)
    return {"vanilla_loss": float(loss), "first_order_gain": float(scale * dot), "cosine": float(cosine),
            "difference_adapted": float(difference)}


# --------------------------------------------------------------------------------------------------- plumbing

@dataclass
class MetaRMConfig:
    model: str = field(metadata={"help": "language model (folder or hub name) that RM_0 started from"})
    data: str = field(metadata={"help": "preference pairs D, .jsonl or .jsonl.gz"})
    meta: str = field(metadata={"help": "meta set S, .jsonl: a prompt and k responses of the policy a row"})
    out: str = field(metadata={"help": "folder to write the reward model to"})
    eval_data: str = field(default="", metadata={"help": "held-out pairs for the accuracy in log.jsonl"})
    save_adapted: str = field(default="", metadata={"help": "folder to write theta' of the trained model to"})
    eta: float = field(default=5e-6, metadata={"help": "length of the ascent step, Eq. 3"})
    normalize: bool = field(default=False, metadata={"help": "ascend by eta * grad J / |grad J|"})
    order: Literal["first", "exact"] = field(default="first", metadata={
        "help": "first: as the authors run it; exact: differentiate through the ascent, at twice the time"})
    lr: float = field(default=5e-6, metadata={"help": "alpha of Eq. 5, AdamW's learning rate, decaying to 0"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's"})
    batch_size: int = field(default=16, metadata={"help": "n: pairs of D a step"})
    meta_batch_size: int = field(default=16, metadata={"help": "m: prompts of S a step, k responses each"})
    micro_batch_size: int = field(default=16, metadata={
        "help": "pairs of D, or prompts of S, a forward pass: lower it if memory is short"})
    epochs: int = field(default=1, metadata={"help": "passes over D; the paper's RMs see each pair once"})
    max_length: int = field(default=0, metadata={"help": "drop rows of more tokens; 0: refuse them"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "longer gradients are scaled down to it"})
    gradient_checkpointing: bool = field(default=False, metadata={
        "help": "less memory, a third more time; the climb is then taken in place (lookahead), first order only"})
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "a cut-off costs at most about this much work"})
    log_every: int = field(default=20, metadata={"help": "steps between diagnostics and accuracies"})
    seed: int = field(default=0, metadata={"help": "of the new head and of the orders of D and S"})


def train(cfg: MetaRMConfig) -> None:
    import data
    import rm
    from tqdm import tqdm
    _check(cfg.eta, cfg.order)
    if cfg.gradient_checkpointing and cfg.order == "exact":
        raise ValueError("--gradient_checkpointing goes with --order first only: the exact gradient needs J's graph whole")
    out, adapted = map(os.path.abspath, (cfg.out, cfg.save_adapted))
    if cfg.save_adapted and os.path.commonpath([out, adapted]) in (out, adapted):
        raise ValueError(f"--save_adapted {cfg.save_adapted} and --out {cfg.out}: theta' needs another folder than theta, "
                         f"outside it")
    stage = partial(data.stage, "metarm.py", inputs=["model", "data", "eval_data", "meta"],
                    ignore=("out", "save_adapted", "checkpoint_minutes"), also=("save_adapted",))
    device = rm.pick_device()

    def load(path, seed=None):
        model, tokenizer = rm.load_reward_model(path, seed)
        rows = [tuple(rm.encode(tokenizer, row["prompt"], response) for response in row["responses"])
                for row in data.read_meta(cfg.meta)]
        samples = rm.keep_short(model, rows, cfg.meta, cfg.max_length)
        if len(samples) < cfg.meta_batch_size:
            raise ValueError(f"{cfg.meta}: {len(samples)} prompts are fewer than one batch of "
                             f"{cfg.meta_batch_size}; lower --meta_batch_size")
        return model.to(device), tokenizer, samples

    def J(forward, chunk, model, tokenizer):  # of some prompts of S, k responses each
        with rm.autocast(device):
            return difference_loss(rm.rewards_of(forward, model, tokenizer, chunk).view(len(chunk), -1))

    def L(forward, chunk, model, tokenizer):  # of some pairs of D
        with rm.autocast(device):
            return rm.pair_loss(forward, model, tokenizer, chunk)

    with stage(cfg) as work:
        if work is not None:
            raw_pairs = data.read_preferences(cfg.data)
            held_out = data.read_preferences(cfg.eval_data) if cfg.eval_data else []
            model, tokenizer, samples = load(cfg.model, cfg.seed)
            pairs = rm.encode_pairs(model, tokenizer, raw_pairs, cfg.max_length, cfg.data)
            held_out = rm.encode_pairs(model, tokenizer, held_out, cfg.max_length, cfg.eval_data, as_text=True)
            # The new head and the order of D are rm.py's with the same seed: only the gradient differs.
            order_of_D = [batch for epoch in range(cfg.epochs)
                          for batch in rm.epoch_batches(rm.row_lengths(pairs), cfg.batch_size, cfg.seed + epoch)]
            order_of_S = cycle(len(samples), cfg.meta_batch_size, seed=cfg.seed + 1_000_000)
            optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
            parts = {"model": model, "optimizer": optimizer, "schedule": rm.linear_decay(optimizer, len(order_of_D))}
            done, kept = rm.resume(work, parts)
            log, warned, checkpoint = kept.get("log", []), False, rm.Checkpoint(work, parts, cfg.checkpoint_minutes)
            if cfg.gradient_checkpointing:
                rm.checkpoint_gradients(model)
            with tqdm(order_of_D, desc=f"MetaRM {cfg.out}", mininterval=1) as bar:
                for step, (pair_indices, prompt_indices) in enumerate(zip(bar, order_of_S)):
                    if step < done:
                        continue
                    X_t = micro_batches(L, pairs, pair_indices, cfg.micro_batch_size, model, tokenizer)
                    X_s = micro_batches(J, samples, prompt_indices, cfg.micro_batch_size, model, tokenizer)
                    row = {"step": step, "steps": len(order_of_D)}
                    if step % cfg.log_every == 0 and held_out:
                        row["accuracy"] = rm.accuracy(model, tokenizer, held_out)
                    if step % cfg.log_every == 0 and not cfg.gradient_checkpointing:
                        row |= diagnostics(model, X_t, X_s, cfg.eta, cfg.normalize)
                    step_with = in_place_step if cfg.gradient_checkpointing else partial(metarm_step, order=cfg.order)
                    row |= step_with(model, optimizer, X_t, X_s, cfg.eta, normalize=cfg.normalize,
                                     max_grad_norm=cfg.max_grad_norm)
                    parts["schedule"].step()
                    log.append(row)
                    checkpoint(step + 1, log=log)
                    bar.set_postfix(L=f"{row['vanilla_loss_adapted']:.3f}", J=f"{row['difference']:.3f}",
                                    refresh=False)
                    if row.get("moved", 1) < 0.01 and cfg.eta > 0 and not warned:
                        warned = True
                        print(f"metarm.py: warning: in step {step}, Eq. 3 changed {row['moved']:.2%} of the "
                              f"weights, the rest by less than rounding; raise --eta, or --normalize",
                              file=sys.stderr)
            final = {"step": len(order_of_D), "steps": len(order_of_D)}
            found = f"{len(log)} steps, J on S {log[0]['difference']:.3f} -> {log[-1]['difference']:.3f}"
            if held_out:
                final["accuracy"] = rm.accuracy(model, tokenizer, held_out)
                found += f", {final['accuracy']:.1%} right on {len(held_out)} held-out pairs"
            print(f"{cfg.out}: {found}")
            rm.save_model(model, tokenizer, work)
            data.write_jsonl(work / "log.jsonl", log + [final])

    if cfg.save_adapted:  # one climb from the trained theta, on one seeded batch of up to 64 prompts of S
        with stage(replace(cfg, out=cfg.save_adapted, save_adapted="")) as work:
            if work is not None:
                model, tokenizer, samples = load(cfg.out)
                some = next(cycle(len(samples), min(64, len(samples)), cfg.seed))
                X_s = micro_batches(J, samples, some, cfg.micro_batch_size, model, tokenizer)
                model.load_state_dict(adapted_parameters(model, X_s, cfg.eta, cfg.normalize), strict=False)
                rm.save_model(model, tokenizer, work)


def in_place_step(model, optimizer, X_t, X_s, eta, normalize, max_grad_norm) -> dict[str, float]:
    """`metarm_step`, first order, through `lookahead`: what gradient checkpointing needs."""
    sums = {"difference": 0.0, "vanilla_loss_adapted": 0.0}

    def backward(closures, name):
        for closure in closures:
            loss = closure(model) / len(closures)
            loss.backward()
            sums[name] += loss.item()

    optimizer.zero_grad()
    backward(X_s, "difference")
    with lookahead(model, eta, normalize):
        backward(X_t, "vanilla_loss_adapted")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    if not all(map(math.isfinite, (*sums.values(), norm))):
        raise ValueError(f"J, L or a gradient is not finite ({sums}, {norm}), so no step was taken: lower eta (now {eta}) or "
                         f"the learning rate")
    optimizer.step()
    optimizer.zero_grad()
    return sums | {"grad_norm": norm}


def cycle(n: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of n items for ever, every pass over them in a new seeded order."""
    import rm
    while True:
        yield from rm.epoch_batches([0] * n, size, seed)  # unsorted by length: in a small S, batches would never mix
        seed += 1


def micro_batches(loss: Callable, rows: list, indices: list[int], size: int, *context) -> list[Loss]:
    """Losses of equal weight, as `meta_gradient` wants them; a smaller last one is scaled to its share."""
    chunks = [[rows[i] for i in indices[start:start + size]] for start in range(0, len(indices), size)]
    weight = len(chunks) / len(indices)
    return [lambda forward, chunk=chunk: weight * len(chunk) * loss(forward, chunk, *context)
            for chunk in chunks]


def main(argv=None) -> int:
    import data
    return data.command("metarm.py", MetaRMConfig, train, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
