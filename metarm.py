r"""MetaRM: a reward model, trained on OLD preferences, that still tells NEW responses apart.

Concept: PPO moves the policy away from the responses that the reward model r_theta was trained on,
and r_theta separates the new ones less and less. MetaRM has two sets: D, the old preference pairs,
and S, k unlabelled responses of the current policy for each prompt. Each step first moves
temporarily to parameters theta' that separate S better, computes D's gradient there, and applies
it at theta. Dou et al., "MetaRM" (arXiv 2405.00438; AAAI 2025, whose equation numbers these are):

    Algorithm 1.  for t = 0 .. T-1:
        sample X_t, n pairs of D, and X_s, m prompts of S              train (by rm.fit)
        J       = difference loss of r_theta on X_s           Eq. 2    difference_loss
        theta'  = theta + eta * grad J(theta)   (an ASCENT)   Eq. 3    meta_gradient, climb
        g       = gradient of L on X_t, taken at theta'       Eq. 4    meta_gradient
        theta  <- theta - alpha * g             (from theta)  Eq. 5    metarm_step

L is the loss of any reward model, Eq. 1: rm.preference_loss. alpha is the optimizer's learning
rate. As a library, this file needs only torch:

    def L(forward): return -logsigmoid(forward(chosen) - forward(rejected)).mean()
    def J(forward): return metarm.difference_loss(forward(samples).view(m, k))
    model.eval()  # no dropout: J would climb the noise between two random masks
    metarm.metarm_step(model, optimizer, L, J, eta=0.02, normalize=True)

    python metarm.py --model runs/toy/sft --data runs/toy/pairs/train.jsonl \
        --meta runs/toy/metarm-1/meta/samples.jsonl --out runs/toy/metarm-1/rm

writes a folder that `AutoModelForSequenceClassification.from_pretrained` reads, and `log.jsonl`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import functional_call
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel

Parameters = dict[str, Tensor]
Loss = Callable[[Callable], Tensor]  # forward -> scalar; `forward` is the model at some parameters
Losses = Loss | list[Loss]  # a list: micro-batches of equal weight, whose mean is the loss
Order = Literal["first", "exact"]

# |theta' - theta| of the command. The climb's length depends on how fast J bends, as SAM's rho does
# on its loss, and neither on the learning rate nor on the number of weights.
DEFAULT_LENGTH = 0.02


class NotFinite(ValueError):
    """J, L or a gradient is NaN or infinite. No step has been taken."""


# ------------------------------------------------------------------------------------ Algorithm 1
def difference_loss(rewards: Tensor) -> Tensor:
    """Returns J of Eq. 2: 2/k^2 * sum over i < j of sigma(|r_i - r_j|), averaged over the prompts.

    Shape: (m, k), the rewards of k >= 2 responses to each of m prompts. Returns a scalar between
    (k-1)/(2k), all rewards equal, and (k-1)/k, all far apart: larger is better.
    Raises: ValueError on another shape. Source: paper, Eq. 2.
    """
    m, k = rewards.shape if rewards.dim() == 2 else (0, 0)
    if m < 1 or k < 2 or not rewards.is_floating_point():
        got = f"{rewards.dtype} {tuple(rewards.shape)}"
        raise ValueError(f"difference_loss needs float rewards of shape (m, k >= 2), got {got}")
    i, j = torch.triu_indices(k, k, offset=1, device=rewards.device)  # all pairs i < j: (k(k-1)/2,)
    # |.| has a kink at 0, where torch takes the slope 0: an exact tie is not pushed apart.
    gaps = (rewards[:, i] - rewards[:, j]).abs()  # (m, k(k-1)/2)
    return 2 / k**2 * gaps.sigmoid().sum(dim=1).mean()


def climb(theta: Parameters, grad_J: Parameters, scale: Tensor) -> Parameters:
    """Returns theta' = theta + scale * grad J, Eq. 3. It is differentiable in all three."""
    return {name: plus(p, scale, grad_J[name]) for name, p in theta.items()}


def gradient(model: Module, loss: Losses, at: Parameters | None = None) -> tuple[Parameters, float]:
    """Returns ({name: gradient of the loss}, the loss) at theta; the model stays untouched.

    loss: as in `meta_gradient`. at: other parameters to take both at, theta' for example.
    Raises: as `meta_gradient`.
    """
    theta = theta_of(model)
    parameters = theta if at is None else as_leaves(at)
    places = everywhere(model, parameters)

    def forward(*args, **kwargs):
        return functional_call(model, places, args, kwargs, tie_weights=False)

    value, grads = value_and_gradient(loss, forward, parameters)
    found = finite_floats(loss=value, grad_norm=global_norm(grads.values()))
    return grads, found["loss"]


def meta_gradient(
    model: Module,
    vanilla_loss: Losses,
    meta_loss: Losses,
    eta: float,
    order: Order = "first",
    normalize: bool = False,
) -> tuple[Parameters, dict[str, float]]:
    """Returns (the gradient that Eq. 5 applies at theta, figures), by Eqs. 2 to 4.

    vanilla_loss, meta_loss: functions forward -> scalar, L on X_t and J on X_s. They call
        `forward(*args, **kwargs)` instead of the model, whose weights and .grad stay untouched.
    eta: with normalize=True the length of the climb, |theta' - theta|; with normalize=False the
        paper's factor, theta' = theta + eta * grad J.
    order: "first", as the authors run it; "exact" also differentiates theta' by theta, as MAML
        does. It keeps the graphs of all micro-batches of J; a smaller X_s saves memory.
    The gradient has a tensor for every trainable parameter. Figures: `difference` J(theta),
    `meta_grad_norm` |grad J|, `vanilla_loss_adapted` L(theta'), `grad_norm`.
    Raises: ValueError on bad arguments, and on models that cannot be called at other parameters
        (DDP, FSDP2, gradient checkpointing: use `lookahead`); NotFinite on NaN and infinity.
    """
    if order not in ("first", "exact"):
        raise ValueError(f"order must be 'first' or 'exact', got {order!r}")
    exact = order == "exact"
    theta = theta_of(model)

    def forward_at(parameters: Parameters) -> Callable:  # the model, with these in place of its own
        places = everywhere(model, parameters)
        return lambda *args, **kwargs: functional_call(
            model, places, args, kwargs, tie_weights=False
        )

    # J on X_s at theta (Eq. 2), and its gradient. The exact order needs that gradient's own graph,
    # and the math attention kernel: the fused ones have no second derivative.
    with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
        J, grad_J = value_and_gradient(meta_loss, forward_at(theta), theta, create_graph=exact)

    # theta' = theta + eta * grad J (Eq. 3): a second set of parameters beside the model's own.
    meta_grad_norm = global_norm(grad_J.values())
    theta_prime = climb(theta, grad_J, step_scale(grad_J.values(), eta, normalize))
    del grad_J  # at first order nobody needs it any more, and L needs memory

    # L on X_t at theta', and its gradient (Eq. 4). As leaves: it is taken with respect to theta'.
    leaves = as_leaves(theta_prime)
    L, grads = value_and_gradient(vanilla_loss, forward_at(leaves), leaves)

    # THE line between the two orders. First order stops here: grads is dL/dtheta'. But theta'
    # depends on theta. By the chain rule dL/dtheta = (dtheta'/dtheta)^T dL/dtheta', one
    # vector-Jacobian product through Eq. 3, whose graph create_graph kept above. Without normalize
    # it comes to (I + eta * Hessian of J) grads; with it, 1/|grad J| is differentiated, too.
    if exact:
        outputs = list(theta_prime.values())
        inputs = list(theta.values())
        with sdpa_kernel(SDPBackend.MATH):
            product = torch.autograd.grad(outputs, inputs, grad_outputs=list(grads.values()))
        grads = dict(zip(theta, product, strict=True))

    info = {"difference": J, "meta_grad_norm": meta_grad_norm, "vanilla_loss_adapted": L}
    return grads, finite_floats(**info, grad_norm=global_norm(grads.values()))


def metarm_step(
    model: Module,
    optimizer: torch.optim.Optimizer,
    vanilla_loss: Losses,
    meta_loss: Losses,
    eta: float,
    order: Order = "first",
    normalize: bool = False,
    max_grad_norm: float | None = None,
) -> dict[str, float]:
    """Takes one step of Algorithm 1; returns `meta_gradient`'s figures, leaves every .grad None.

    Arguments and errors as in `meta_gradient`; on an error no step has been taken.
    max_grad_norm: a longer gradient is scaled down to it.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
    grads, info = meta_gradient(model, vanilla_loss, meta_loss, eta, order, normalize)
    # theta <- theta - alpha * grads (Eq. 5), from the ORIGINAL parameters: the model never left
    # them. Literally so with SGD; AdamW makes its own step of the same gradient.
    parameters = [p for name, p in model.named_parameters() if name in grads]
    for p, grad in zip(parameters, grads.values(), strict=True):
        p.grad = grad
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    for p in parameters:
        p.grad = None
    return info


@contextmanager
def lookahead(
    model: Module, eta: float, normalize: bool = False, scaler_follows: bool = False
) -> Iterator[None]:
    """Moves the model to theta' in place and back, for DDP, FSDP2, TRL and gradient checkpointing.

        J(model).backward()                 # p.grad is grad J, of ALL micro-batches of S
        with metarm.lookahead(model, eta=0.02, normalize=True):  # at theta', p.grad is None
            L(model).backward()             # forward AND backward, of ALL micro-batches of D
        optimizer.step()                    # the model is at theta, p.grad is grad L(theta')

    First order. eta, normalize: as in `meta_gradient`.
    scaler_follows: p.grad has been scaled by a GradScaler. Where grad J has overflowed, all of
        grad L becomes NaN, so that the scaler skips the step. Without normalize, pass
        eta / scaler.get_scale().
    Raises: NotFinite on NaN and infinity in grad J, unless scaler_follows; ValueError on a bad eta,
        without a gradient, on running statistics, or normalised under FSDP1 (a shard does not know
        the norm of the whole); RuntimeError if FSDP2 failed inside its forward.
    Source: paper, Eqs. 3 and 4.
    """
    refuse_running_statistics(model)
    reshard(model)
    # Keep these very objects: after a forward without a backward, FSDP2's model.parameters() are
    # the gathered weights, not the shards that are trained.
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise ValueError("lookahead: no parameter has a gradient; back-propagate J before it")
    if normalize and any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError("lookahead: FSDP1 does not know |grad J|; use FSDP2, or normalize=False")
    scale = step_scale(grads, eta, normalize)
    norm = global_norm(grads)
    if not scaler_follows:
        finite_floats(meta_grad_norm=norm)
    # Else make all of theta' NaN, and so grad L. (A tanh can turn one infinite weight into a finite
    # loss, and GradScaler would take that step.)
    scale = scale + 0 * norm
    del grads  # L needs the memory
    theta = [p.detach().clone() for p in parameters]  # a copy: subtracting the step would round
    try:
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p.copy_(plus(p, scale, p.grad))  # Eq. 3
                p.grad = None
        # Autocast caches bf16 copies of the weights. Clear them, or L would be computed at theta.
        torch.clear_autocast_cache()
        yield  # Eq. 4
    finally:
        reshard(model)
        with torch.no_grad():
            for p, original in zip(parameters, theta, strict=True):
                p.copy_(original)
        torch.clear_autocast_cache()
        if not {id(p) for p in parameters} <= {id(p) for p in model.parameters()}:
            raise RuntimeError("lookahead: FSDP2 failed inside its forward; build the model anew")


def adapted_parameters(
    model: Module, meta_loss: Losses, eta: float, normalize: bool = False
) -> Parameters:
    """Returns theta' of Eq. 3, {name: tensor}; the model stays untouched.

    Algorithm 1 keeps theta, but it is at theta' that L was minimised. To measure theta', load it:
    `model.load_state_dict(adapted, strict=False)`. Raises: as `meta_gradient`.
    """
    grad_J, _ = gradient(model, meta_loss)
    with torch.no_grad():
        return climb(theta_of(model), grad_J, step_scale(grad_J.values(), eta, normalize))


def diagnostics(
    model: Module, vanilla_loss: Losses, meta_loss: Losses, eta: float, normalize: bool = False
) -> dict[str, float]:
    """Returns Eqs. 6 to 8 in numbers: L(theta') = L(theta) + eta * grad L . grad J + o(eta).

    Two pairs tell whether the climb is short enough for that: the left one is the change, the right
    one its first-order prediction.
        `rise`         J(theta') - J(theta)    `predicted_rise`    (theta' - theta) . grad J
        `loss_change`  L(theta') - L(theta)    `first_order_gain`  (theta' - theta) . grad L
    `cosine` of grad L and grad J: above 0, climbing J raises L, so the two aims conflict on these
    batches. `vanilla_loss` L(theta), `difference_adapted` J(theta').
    Costs about as much as a step and a half. Arguments and errors as in `meta_gradient`.
    """
    grad_J, J = gradient(model, meta_loss)
    grad_L, L = gradient(model, vanilla_loss)
    scale = step_scale(grad_J.values(), eta, normalize)
    norm_J = global_norm(grad_J.values())
    norm_L = global_norm(grad_L.values())
    dot = sum((grad_L[name] * grad_J[name]).sum().to(scale.device) for name in grad_J)
    del grad_L  # the two gradients at theta' need the memory
    theta_prime = climb(theta_of(model), grad_J, scale)
    _, J_adapted = gradient(model, meta_loss, theta_prime)
    _, L_adapted = gradient(model, vanilla_loss, theta_prime)
    return {
        "vanilla_loss": L,
        "loss_change": L_adapted - L,
        "first_order_gain": float(scale * dot),
        "cosine": float(dot / (norm_L * norm_J + 1e-12)),
        "difference_adapted": J_adapted,
        "rise": J_adapted - J,
        "predicted_rise": float(scale * norm_J**2),
    }


# A reader of the paper may stop here. What follows is bookkeeping for PyTorch, then the command.
# ---------------------------------------------------- guards: models and losses that give no theta'
def refuse_model(model) -> None:
    """Raises ValueError on a model that cannot be called at other parameters than its own."""
    ddp = torch.nn.parallel.DistributedDataParallel
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    if sharded or any(isinstance(module, ddp) for module in model.modules()):
        raise ValueError("a DDP or FSDP2 model has one set of parameters; use metarm.lookahead")
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()):
        raise ValueError("hooks on parameters would not see this gradient; use metarm.lookahead")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameters: requires_grad is False for all")
    refuse_running_statistics(model)


def refuse_running_statistics(model) -> None:
    """Raises ValueError on BatchNorm and its kin in train mode: theta' would leave a trace."""
    for name, module in model.named_modules():
        if module.training and getattr(module, "track_running_stats", False):
            what = f"{name} ({type(module).__name__}) would take in S, and D at theta'"
            raise ValueError(f"the running statistics of {what}; call model.eval()")


NO_CHECKPOINTING = (
    "gradient checkpointing runs the model again in the backward pass, at theta instead of theta'; "
    "use metarm.lookahead, or turn it off"
)


@contextmanager
def refuse_checkpointing() -> Iterator[None]:
    """Raises ValueError on checkpointing of the newer kind, which is made of these hooks."""
    try:
        with disable_saved_tensors_hooks(NO_CHECKPOINTING):
            yield
    except RuntimeError as error:
        if NO_CHECKPOINTING not in str(error):
            raise
        raise ValueError(NO_CHECKPOINTING) from None


def refuse_graph(value: Tensor, create_graph: bool) -> None:
    """Raises ValueError where a loss's graph shows that its gradient would not be that at theta'.

    It visits every operation, some 20 ms for a model of 30 layers. A loss with an attribute
    `graph_is_known = True` is not looked at: for a loop that makes the same losses in every step.
    """
    seen = set()
    todo = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [function for function, _ in node.next_functions]
        if node.name() == "CheckpointFunctionBackward":  # the older, "reentrant" kind
            raise ValueError(NO_CHECKPOINTING)
        if create_graph and node.name().startswith("CompiledFunction"):
            raise ValueError(
                "torch.compile has no second derivative; use order='first', or no compile"
            )
        if isinstance(getattr(node, "variable", None), torch.nn.Parameter):  # not one of the leaves
            raise ValueError("a loss uses parameters of a model itself: call `forward` only")


# --------------------------------------------------------------------------------------- numerics
def theta_of(model) -> Parameters:
    """Returns theta: leaves that share the trainable parameters' memory, but not their .grad."""
    refuse_model(model)
    return as_leaves({name: p for name, p in model.named_parameters() if p.requires_grad})


def as_leaves(parameters: Parameters) -> Parameters:
    """Returns the same values, to be differentiated by: gradients stop here."""
    return {name: p.detach().requires_grad_() for name, p in parameters.items()}


def everywhere(model, parameters: Parameters) -> Parameters:
    """Returns the parameters under every place where the model holds them, {place: tensor}.

    A tied weight stands in two modules, and a module may have two names. functional_call would find
    tied weights by itself, but it would leave theta' in a module that has two names.
    """
    places = {}
    name_of = {id(p): name for name, p in model.named_parameters()}
    for prefix, module in model.named_modules():  # each module once, under its first name
        for place, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            if p.requires_grad:
                places[place] = parameters[name_of[id(p)]]
    return places


def value_and_gradient(losses: Losses, forward, parameters: Parameters, create_graph=False):
    """Returns (mean of the losses, {name: its gradient}), one micro-batch after the other."""
    losses = [losses] if callable(losses) else list(losses)
    leaves = list(parameters.values())
    total = 0.0
    sums = [None] * len(leaves)
    for loss in losses:
        with refuse_checkpointing():
            value = loss(forward) / len(losses)
        if not getattr(loss, "graph_is_known", False):
            refuse_graph(value, create_graph)
        total = total + value.detach()  # a tensor: a float would wait for the GPU in every part
        if value.requires_grad and not create_graph:
            value.backward(inputs=leaves)  # adds up in the .grad of these leaves, in place
        elif value.requires_grad:
            # Not in .grad: with a graph behind it, that would be a cycle, and never be freed.
            new = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            sums = [add(a, b) for a, b in zip(sums, new, strict=True)]
    torch.clear_autocast_cache()  # in an autocast region it would keep bf16 copies of the leaves
    if not create_graph:
        sums = [p.grad for p in leaves]
        for p in leaves:
            p.grad = None
    if all(grad is None for grad in sums):
        fix = "it must call the `forward` it is given, not the model, and not under no_grad()"
        raise ValueError(f"a loss does not depend on the trainable parameters: {fix}")
    # A parameter without a part in the loss gets zeros.
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, sums, strict=True)]
    return total, dict(zip(parameters, grads, strict=True))


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Returns a + b, where None is nothing."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def step_scale(grads, eta: float, normalize: bool) -> Tensor:
    """Returns the factor before grad J in Eq. 3, a 0-dim tensor (a float would wait for a GPU).

    grads: the tensors of grad J. Normalised, the climb is eta long, and a tiny |grad J| is blown
    up: if all k responses are equal, rounding still makes their rewards differ, and noise of 1e-8
    becomes a full step. Exactly 0 stays 0.
    """
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be a finite number >= 0, got {eta}")
    norm = global_norm(grads)
    if not normalize:
        return torch.full_like(norm, eta)
    return eta / (norm + 1e-12) * (norm > 0)


def plus(a: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    """Returns a + scale * b, in float32 at least: eta/|grad J| can be 1e5, too much for fp16."""
    return (a + scale.to(a.device) * b.to(scale.dtype)).to(a.dtype)


def global_norm(tensors) -> Tensor:
    """Returns the norm of all tensors together, in float32 at least; under FSDP2 of all shards."""
    norms = []
    for t in tensors:
        if t.is_sparse:
            raise ValueError("MetaRM needs dense gradients; build the Embedding with sparse=False")
        norm = torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def finite_floats(**tensors: Tensor) -> dict[str, float]:
    """Returns the tensors as floats (only here we wait for the device). Raises NotFinite."""
    found = {name: float(value.detach()) for name, value in tensors.items()}
    for name, value in found.items():
        if not math.isfinite(value):
            fix = "look for NaN in weights and batch, or lower eta or the learning rate"
            raise NotFinite(f"{name} is {value}: {fix}")
    return found


def reshard(model) -> None:
    """FSDP2: drops gathered weights, so that the next forward gathers the shards anew."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


# ------------------------------------------------------------------------------------- the command
def micro_batches(loss: Callable, groups: list, size: int) -> list[Loss]:
    """Returns losses of equal weight, each of `size` groups; loss: (forward, groups) -> mean."""
    chunks = [groups[start : start + size] for start in range(0, len(groups), size)]
    average = len(groups) / len(chunks)

    def part(chunk: list) -> Loss:
        # The losses of a list count alike, but a smaller last chunk must count less: so its mean
        # is multiplied by its size over the average size (1 where all are of one size).
        def loss_of_chunk(forward):
            return len(chunk) / average * loss(forward, chunk)

        loss_of_chunk.graph_is_known = getattr(loss, "graph_is_known", False)
        return loss_of_chunk

    return [part(chunk) for chunk in chunks]


def warning_of(look: dict[str, float], eta: float) -> str:
    """Returns one line if the climb did not raise J as its slope predicts, "" if it did."""
    rise = look["rise"]
    predicted = look["predicted_rise"]
    if abs(rise - predicted) <= 0.5 * predicted + 1e-6:  # J itself is rounded at about 1e-7
        return ""
    # A rise this small is lost in the rounding of bf16. Any other climb has left the straight part.
    fix = "smaller" if max(abs(rise), predicted) > 1e-3 else "larger"
    what = f"one climb changed J by {rise:.2g}, and its slope predicts {predicted:.2g} (Eq. 8)"
    return f"metarm.py: warning: {what}; give a {fix} --eta than {eta:.3g}"


def train(args) -> None:
    """The command: Algorithm 1 on D and S."""
    from tqdm import tqdm

    import data
    import rm

    if args.save_adapted:
        out = Path(args.out).resolve()
        other = Path(args.save_adapted).resolve()
        if out in (other, *other.parents) or other in out.parents:
            raise data.Mistake(f"--save_adapted {args.save_adapted}: name a folder outside --out")
    eta = args.eta
    if (
        eta is None
    ):  # without normalize as in the paper, alpha = eta. (lr decays to 0; eta does not.)
        eta = DEFAULT_LENGTH if args.normalize else args.lr
    if not 0 <= eta < math.inf:
        raise data.Mistake(f"--eta {eta}: the ascent needs a finite length of 0 or more")
    climbing = {"eta": eta, "normalize": args.normalize}
    pairs = data.read_preferences(args.data)
    samples = data.read_meta(args.meta)
    adapted_folder = data.output_folder(args.save_adapted) if args.save_adapted else nullcontext()
    with data.output_folder(args.out) as work, adapted_folder as adapted_work:
        # The head and the order of D are rm.py's with the same seed: only the gradient differs.
        model, tokenizer = rm.load_reward_model(args.model, args.seed)
        model.to(rm.pick_device())
        _, D = rm.encode_groups(model, tokenizer, pairs, args.data, args.max_length)
        _, S = rm.encode_groups(model, tokenizer, samples, args.meta, args.max_length)
        look = rm.look_at(args, model, tokenizer)
        steps = len(D) // args.batch_size * args.epochs
        batches_of_S = []
        seed = args.seed + 1_000_000
        while len(batches_of_S) < steps:  # pass over S again, in a new order
            size = args.meta_batch_size
            batches_of_S += rm.epoch_batches([0] * len(S), size, seed, "--meta_batch_size")
            seed += 1
        warned = False

        def J(forward, groups):  # Eq. 2 on prompts of S
            with rm.autocast(model.device):
                rewards = rm.rewards_of(forward, model, tokenizer, groups)  # (m k,)
                return difference_loss(rewards.view(len(groups), -1))

        def L(forward, groups):  # Eq. 1 on pairs of D
            with rm.autocast(model.device):
                return rm.pair_loss(forward, model, tokenizer, groups)

        def step(optimizer, batch_of_D, number):  # one step of Algorithm 1
            nonlocal warned
            X_s = [S[i] for i in batches_of_S[number]]
            L_parts = micro_batches(L, batch_of_D, args.micro_batch_size)
            J_parts = micro_batches(J, X_s, args.micro_batch_size)
            info = {}
            how = climbing | {"order": args.order, "max_grad_norm": args.max_grad_norm}
            try:
                if number % args.log_every == 0:
                    info = diagnostics(model, L_parts, J_parts, **climbing)
                info |= metarm_step(model, optimizer, L_parts, J_parts, **how)
            except NotFinite as error:
                raise data.Mistake(f"--out {args.out}, step {number}: {error}") from None
            # Later losses are these, on other rows: their graphs need not be looked at again.
            L.graph_is_known = J.graph_is_known = True
            warning = warning_of(info, eta) if "rise" in info and not warned else ""
            if warning:
                warned = True
                tqdm.write(warning, file=sys.stderr)
            return info

        log = rm.fit(args, work, model, D, step, look)
        rm.save_model(model, tokenizer, work)
        if args.save_adapted:  # one climb from the trained theta, on one batch of S as in training
            J_parts = micro_batches(J, [S[i] for i in batches_of_S[0]], args.micro_batch_size)
            model.load_state_dict(adapted_parameters(model, J_parts, **climbing), strict=False)
            rm.save_model(model, tokenizer, adapted_work)
    print(f"{args.out}: {len(D)} pairs, {len(S)} prompts of S; at the end {log[-1]}")


def main(argv: list[str] | None = None) -> int:
    import data
    import rm

    parser = data.new_parser("metarm.py", __doc__)
    add = parser.add_argument
    rm.training_options(parser)
    add("--meta", required=True, help="meta set S, .jsonl: a prompt and k responses per row")
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ascend by eta * grad J / |grad J|, so that --eta is the length of the climb",
    )
    default = f"default: a length of {DEFAULT_LENGTH}; with --no-normalize --lr, as in the paper"
    add("--eta", type=float, help=f"of Eq. 3, theta' = theta + eta * grad J ({default})")
    add("--order", choices=["first", "exact"], default="first", help="exact takes twice as long")
    add("--meta_batch_size", type=int, default=16, help="m: prompts of S per step")
    add(
        "--save_adapted", default="", help="folder for theta' of the trained model, on a batch of S"
    )
    return data.command(parser, train, argv)


if __name__ == "__main__":
    sys.exit(main())
