r"""MetaRM: a reward model, trained on OLD preferences, that still tells NEW responses apart.

Concept: PPO moves the policy away from the responses that the reward model r_theta was trained on,
and r_theta separates the new ones less and less. MetaRM has two sets: D, the old preference pairs,
and S, k unlabelled responses of the current policy for each prompt. Each step first moves
temporarily to parameters theta' that separate S better, computes D's gradient there, and applies
it at theta. Source: Dou et al., "MetaRM" (arXiv 2405.00438). Equation numbers are those of the
AAAI 2025 version.

    Algorithm 1.  for t = 0 .. T-1:                                    rm.fit
        sample X_t, n pairs of D, and X_s, m prompts of S              rm.fit; `step` of train
        J       = difference loss of r_theta on X_s           Eq. 2    difference_loss
        theta'  = theta + eta * grad J(theta)   (an ASCENT)   Eq. 3    climb, step_scale
        g       = gradient of L on X_t, taken at theta'       Eq. 4    meta_gradient
        theta  <- theta - alpha * g             (from theta)  Eq. 5    metarm_step

L is the usual loss of a reward model, Eq. 1: rm.preference_loss. alpha is the optimizer's learning
rate; the command uses AdamW. eta is the paper's factor or, as the command sets it, the LENGTH of
the climb: theta' = theta + eta * grad J / |grad J|. `adapted` in a name means "at theta'".

The published method is FIRST ORDER: g is the gradient with respect to theta'. order="exact" also
differentiates through Eq. 3, as MAML does; `meta_gradient` shows the line between the two.

As a library, this file needs only torch. `forward` is called in place of the model:

    # forward(x) returns what model(x) does: here rewards, one per row
    def L(forward): return -logsigmoid(forward(chosen) - forward(rejected)).mean()
    def J(forward): return metarm.difference_loss(forward(samples).view(m, k))
    model.eval()  # under dropout, even equal responses differ: J would climb that noise
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

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Parameters = dict[str, Tensor]  # {name as in model.named_parameters(): tensor}
# A loss is a function forward -> scalar, where `forward` is the model at some parameters. A list
# holds one such function per micro-batch; the loss is their mean.
Losses = Callable | list[Callable]

# The command's default for |theta' - theta|, the length of the climb: short enough for Eq. 8 in toy
# worlds and on SmolLM2-135M (README), not tuned for accuracy. As with SAM's rho, the right length
# depends on the curvature of J and L, so look at `diagnostics` on another model.
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
    k = rewards.shape[-1] if rewards.dim() == 2 and len(rewards) > 0 else 0
    if k < 2 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be (m, k >= 2), got {rewards.dtype} {tuple(rewards.shape)}")
    # All pairs i < j of responses to one prompt: i and j have k(k-1)/2 entries each.
    i, j = torch.triu_indices(k, k, offset=1, device=rewards.device)
    # |.| has a kink at 0, where torch takes the slope 0: J does not push equal rewards apart.
    gaps = (rewards[:, i] - rewards[:, j]).abs()  # (m, k(k-1)/2)
    sums = gaps.sigmoid().sum(dim=1)  # (m,)
    return 2 / k**2 * sums.mean()


def climb(theta: Parameters, grad_J: Parameters, scale: Tensor) -> Parameters:
    """Returns theta' = theta + scale * grad J, Eq. 3. It is differentiable in all arguments."""
    return {name: plus(p, scale, grad_J[name]) for name, p in theta.items()}


def step_scale(grads, eta: float, normalize: bool) -> Tensor:
    """Returns the factor before grad J in Eq. 3, a 0-dim tensor (a float would wait for a GPU).

    grads: the tensors of grad J. The factor is eta, or with normalize eta / |grad J|: the climb is
    then eta long, however small |grad J| is. So if all k responses are equal, and their rewards
    differ by rounding only, noise of 1e-8 becomes a full step. Where |grad J| is 0, so is the step.
    """
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be a finite number >= 0, got {eta}")
    norm = global_norm(grads)
    return eta / (norm + 1e-12) * (norm > 0) if normalize else torch.full_like(norm, eta)


def plus(a: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    """Returns a + scale * b, computed in float32 at least: eta/|grad J| may exceed fp16's 65504."""
    return (a + scale.to(a.device) * b.to(scale.dtype)).to(a.dtype)


def forward_at(model: nn.Module, parameters: Parameters) -> Callable:
    """Returns a function that calls the model with these parameters in place of its own."""
    places = everywhere(model, parameters)
    return lambda *args, **kw: functional_call(model, places, args, kw, tie_weights=False)


def meta_gradient(model, vanilla_loss, meta_loss, eta, order="first", normalize=False):
    """Returns (the gradient that Eq. 5 applies at theta, figures), by Eqs. 2 to 4.

    vanilla_loss, meta_loss: functions forward -> scalar, L on X_t and J on X_s. They call
        `forward(*args, **kwargs)` instead of the model, whose weights and .grad stay untouched. Or
        lists of such functions, one per micro-batch: their mean is the loss, and only one
        micro-batch is in memory at a time.
    eta: with normalize=True the length of the climb, |theta' - theta|; with normalize=False the
        paper's factor, theta' = theta + eta * grad J. Weights in bf16 round most of a climb away:
        keep those that are trained in float32.
    order: "first", as the authors run it; "exact" also differentiates theta' by theta, as MAML
        does. "exact" keeps the graphs of all micro-batches of J; a smaller X_s saves memory.
    The gradient is {name: tensor}, of every trainable parameter. Figures, as floats: `difference`
    J(theta), `meta_grad_norm` |grad J|, `vanilla_loss_adapted` L(theta'), `grad_norm`.
    Raises: ValueError on bad arguments, and on models that cannot be called at other parameters
        (DDP, FSDP2, gradient checkpointing: use `lookahead`); NotFinite on NaN and infinity.
    """
    if order not in ("first", "exact"):
        raise ValueError(f"order must be 'first' or 'exact', got {order!r}")
    exact = order == "exact"
    theta = theta_of(model)  # the trainable weights as new leaves; the model's own .grad stays

    # J on X_s at theta (Eq. 2), and its gradient. The exact order needs that gradient's own graph,
    # and the math attention kernel: the fused kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
        J, grad_J = value_and_gradient(meta_loss, forward_at(model, theta), theta, exact)

    # theta' = theta + eta * grad J (Eq. 3): a second set of parameters beside the model's own.
    meta_grad_norm = global_norm(grad_J.values())
    theta_prime = climb(theta, grad_J, step_scale(grad_J.values(), eta, normalize))
    del grad_J  # first order needs it no longer, and L needs the memory

    # L on X_t at theta' (Eq. 4). Its gradient is taken with respect to theta' itself. Therefore cut
    # theta' off from theta: the same values, as leaves of a new graph.
    leaves = as_leaves(theta_prime)
    L, grads = value_and_gradient(vanilla_loss, forward_at(model, leaves), leaves)

    # THE line between the two orders. The first order stops here: it applies grads, dL/dtheta'. The
    # exact order goes on, since theta' depends on theta: dL/dtheta = (dtheta'/dtheta)^T dL/dtheta'.
    # That is one vector-Jacobian product through Eq. 3, whose graph was kept above.
    # Without normalize it equals (I + eta * Hessian of J) grads. With normalize, eta/|grad J|
    # depends on theta, too, and is differentiated as well.
    if exact:
        outputs = list(theta_prime.values())
        product = torch.autograd.grad(outputs, list(theta.values()), list(grads.values()))
        grads = dict(zip(theta, product, strict=True))

    info = {"difference": J, "meta_grad_norm": meta_grad_norm, "vanilla_loss_adapted": L}
    return grads, finite_floats(**info, grad_norm=global_norm(grads.values()))


def metarm_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    vanilla_loss: Losses,
    meta_loss: Losses,
    eta: float,
    order: str = "first",
    normalize: bool = False,
    max_grad_norm: float | None = None,
) -> dict[str, float]:
    """Takes one step of Algorithm 1; returns `meta_gradient`'s figures, leaves every .grad None.

    Arguments and errors as in `meta_gradient`; on an error no step has been taken.
    max_grad_norm: a longer gradient of Eq. 4 is scaled down to this norm before the step.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
    grads, info = meta_gradient(model, vanilla_loss, meta_loss, eta, order, normalize)
    # theta <- theta - alpha * grads (Eq. 5), from the ORIGINAL parameters: the model never left
    # them. This is SGD's step; another optimizer, as AdamW, makes its own step of that gradient.
    for name, p in model.named_parameters():
        p.grad = grads.get(name)
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    model.zero_grad()  # sets every .grad to None
    return info


# The step of Algorithm 1 ends here. Its loop, and X_t, are rm.fit's; X_s is drawn in `train`. Next:
# the same step in place, theta' for measurements, Eqs. 6 to 8 in numbers.
@contextmanager
def lookahead(model, eta: float, normalize=False, scaler_follows=False) -> Iterator[None]:
    """Moves the model to theta' in place and back, for DDP, FSDP2, TRL and gradient checkpointing.

        optimizer.zero_grad()               # or the climb would follow the last grad L, too
        J(model).backward()                 # p.grad is grad J, of ALL of X_s
        with metarm.lookahead(model, eta=0.02, normalize=True):
            L(model).backward()             # at theta': forward AND backward, ALL of X_t
        optimizer.step()                    # the model is at theta, p.grad is grad L(theta')

    First order only. With several micro-batches, finish all of X_s before it, all of X_t inside.
    eta, normalize: as in `meta_gradient`. A GradScaler also scales grad J: with normalize=False,
        pass eta / scaler.get_scale().
    scaler_follows: True if a GradScaler checks p.grad before the step. An overflow in grad J then
        makes all of grad L NaN, and the scaler skips the step. False: NotFinite is raised.
    Raises: NotFinite on NaN and infinity in grad J; ValueError on a bad eta, without a gradient, on
        BatchNorm in train mode, or with normalize under FSDP1 (a shard does not know the norm of
        the whole); RuntimeError if weights were changed inside, as by optimizer.step(), or if FSDP2
        failed inside its forward. Source: paper, Eqs. 3 and 4.
    """
    refuse_running_statistics(model)
    reshard(model)
    # Keep these very objects: after a forward without a backward, FSDP2's model.parameters() gives
    # the gathered weights, not the shards that are trained.
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise ValueError("lookahead: no parameter has a gradient; back-propagate J before it")
    if normalize and any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError("lookahead: FSDP1 does not know |grad J|; use FSDP2, or normalize=False")
    # 0 * norm is NaN after an overflow, 0 otherwise. NaN makes all of theta', and so grad L, NaN.
    # (Without it, a tanh could turn one infinite weight into a finite loss, and the GradScaler
    # would take that step.)
    scale = step_scale(grads, eta, normalize) + 0 * global_norm(grads)
    if not scaler_follows:
        finite_floats(grad_J=scale)
    del grads  # L needs the memory
    theta = [p.detach().clone() for p in parameters]  # a copy: to undo the step would round
    try:
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p.copy_(plus(p, scale, p.grad))  # Eq. 3
                p.grad = None
        versions = [p._version for p in parameters]  # PyTorch counts writes in place
        # Autocast caches bf16 copies of the weights. Clear them, or L would be computed at theta.
        torch.clear_autocast_cache()
        yield  # Eq. 4
        if versions != [p._version for p in parameters]:
            raise RuntimeError("lookahead: weights changed inside; step after the `with`")
    finally:  # also when L has raised
        reshard(model)
        with torch.no_grad():
            for p, original in zip(parameters, theta, strict=True):
                p.copy_(original)
        torch.clear_autocast_cache()
        if not {id(p) for p in parameters} <= {id(p) for p in model.parameters()}:
            raise RuntimeError("lookahead: FSDP2 failed inside its forward; build the model anew")


def gradient(model: nn.Module, loss: Losses, at: Parameters | None = None):
    """Returns ({name: gradient of the loss}, the loss as a float) at theta. No weight is changed.

    loss: as in `meta_gradient`. at: use these parameters instead of theta, for example theta'.
    Raises: as `meta_gradient`.
    """
    parameters = theta_of(model) if at is None else as_leaves(at)
    value, grads = value_and_gradient(loss, forward_at(model, parameters), parameters)
    return grads, finite_floats(loss=value, grad_norm=global_norm(grads.values()))["loss"]


def adapted_parameters(model: nn.Module, meta_loss: Losses, eta: float, normalize: bool = False):
    """Returns theta' of Eq. 3, {name: tensor}; the model stays untouched.

    Algorithm 1 keeps theta, although it minimises L at theta'. To measure theta', load it:
    `model.load_state_dict(adapted, strict=False)`. Raises: as `meta_gradient`.
    """
    grad_J, _ = gradient(model, meta_loss)
    with torch.no_grad():
        return climb(theta_of(model), grad_J, step_scale(grad_J.values(), eta, normalize))


def diagnostics(model, vanilla_loss, meta_loss, eta, normalize=False) -> dict[str, float]:
    """Returns Eqs. 6 to 8 in numbers: L(theta') = L(theta) + eta * grad L . grad J + o(eta).

    This tells whether the climb is short enough to drop o(eta). Compare each change (left) with its
    first-order prediction (right):
        `rise`         J(theta') - J(theta)    `predicted_rise`    (theta' - theta) . grad J
        `loss_change`  L(theta') - L(theta)    `first_order_gain`  (theta' - theta) . grad L
    `cosine` of grad L and grad J: above 0, climbing J raises L, so the two aims conflict on these
    batches. `vanilla_loss` is L(theta), `difference_adapted` J(theta'). It takes the gradients of J
    and L at theta and at theta': twice as many as a step.
    Arguments and errors as in `meta_gradient`. Source: paper, Eqs. 6 to 8.
    """
    grad_J, J = gradient(model, meta_loss)
    grad_L, L = gradient(model, vanilla_loss)
    scale = step_scale(grad_J.values(), eta, normalize)
    with torch.no_grad():
        theta_prime = climb(theta_of(model), grad_J, scale)
    # Here only the values are used. (Backward passes free memory from micro-batch to micro-batch.)
    _, J_prime = gradient(model, meta_loss, at=theta_prime)
    _, L_prime = gradient(model, vanilla_loss, at=theta_prime)
    norm_J = global_norm(grad_J.values())
    norm_L = global_norm(grad_L.values())
    dot = sum((grad_L[name] * grad_J[name]).sum().to(scale.device) for name in grad_J)
    # theta' - theta is scale * grad J, so both predictions are dot products with grad J.
    found = {"vanilla_loss": L, "loss_change": L_prime - L, "first_order_gain": float(scale * dot)}
    found |= {"cosine": float(dot / (norm_L * norm_J + 1e-12)), "difference_adapted": J_prime}
    return found | {"rise": J_prime - J, "predicted_rise": float(scale * norm_J**2)}


# ------------------------------------------------------------------------ gradients, lengths, norms
def value_and_gradient(losses: Losses, forward, parameters: Parameters, create_graph=False):
    """Returns (mean of the losses, {name: its gradient}); it runs one micro-batch at a time."""
    losses = [losses] if callable(losses) else list(losses)
    leaves = list(parameters.values())
    total = 0.0  # then a tensor: float(value) would wait for the GPU in every micro-batch
    for loss in losses:
        value = guarded(loss, forward, create_graph) / len(losses)
        # With create_graph, all graphs are needed at the end. Without it, each is freed by its own
        # backward pass, which adds to the leaves' .grad in place.
        total = total + (value if create_graph else value.detach())
        if value.requires_grad and not create_graph:
            value.backward(inputs=leaves)
    grads = [p.grad for p in leaves]
    if create_graph and total.requires_grad:
        # Not by way of .grad: a leaf and a .grad with a graph back to it would never be freed.
        grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    torch.clear_autocast_cache()  # within autocast, PyTorch would keep bf16 copies of the leaves
    if all(grad is None for grad in grads):
        fix = "call `forward`, and not under no_grad(); or the model has no trainable parameters"
        raise ValueError(f"a loss does not depend on theta: {fix}")
    for p in leaves:
        p.grad = None
    # A parameter that the loss does not use gets a gradient of zeros.
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
    return total.detach(), dict(zip(parameters, grads, strict=True))


def global_norm(tensors) -> Tensor:
    """Returns the norm of all tensors together, in float32 at least; under FSDP2 of all shards."""
    norms = []
    for t in tensors:
        if t.is_sparse:
            raise ValueError("MetaRM needs dense gradients; build the Embedding with sparse=False")
        norm = torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    # The norm of the norms; .to, because a model may lie on several devices.
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def finite_floats(**tensors: Tensor) -> dict[str, float]:
    """Returns the tensors as floats (only here we wait for the device). Raises NotFinite."""
    found = {name: float(value.detach()) for name, value in tensors.items()}
    bad = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
    if bad:
        raise NotFinite(f"{bad[0]}: look for NaN in weights and batch, or lower eta or the rate")
    return found


# All below is bookkeeping that PyTorch asks for, and the command.
# ---------------------------------------------------------- parameters that are not the model's own
def theta_of(model) -> Parameters:
    """Returns theta as new leaves, which share the trainable weights' memory but not .grad."""
    refuse_model(model)
    return as_leaves({name: p for name, p in model.named_parameters() if p.requires_grad})


def as_leaves(parameters: Parameters) -> Parameters:
    """Returns the same values as leaves of a new graph: backward passes end here."""
    return {name: p.detach().requires_grad_() for name, p in parameters.items()}


def everywhere(model, parameters: Parameters) -> Parameters:
    """Returns {place: tensor}, one entry for each place of the model that holds a parameter.

    A tied weight is held by two modules, and one module may have two names. By itself,
    `functional_call` finds tied weights; but if one module has two names, it does not put the old
    weights back.
    """
    new = {id(p): parameters[name] for name, p in model.named_parameters() if p.requires_grad}
    places = {}
    for prefix, module in model.named_modules():  # each module once, under its first name
        held = module.named_parameters(prefix, recurse=False, remove_duplicate=False)
        places |= {place: new[id(p)] for place, p in held if id(p) in new}
    return places


def reshard(model) -> None:
    """For FSDP2: drops gathered weights, so that the next forward gathers the shards anew."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


# --------------------------- guards: models and losses that cannot be evaluated at other parameters
def refuse_model(model) -> None:
    """Raises ValueError on a model that cannot be called at other parameters than its own."""
    wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())
    if wrapped or any(hasattr(p, "full_tensor") for p in model.parameters()):  # a DTensor
        raise ValueError("a DDP or FSDP2 model has one set of parameters; use metarm.lookahead")
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()):
        raise ValueError("hooks on parameters would not see this gradient; use metarm.lookahead")
    refuse_running_statistics(model)


def refuse_running_statistics(model) -> None:
    """Raises ValueError on BatchNorm and similar layers in train mode.

    Each forward pass updates their running statistics. Those of S, and of D at theta', would stay
    in the model. (Nor should a reward depend on the other rows of its batch.)
    """
    if any(m.training and getattr(m, "track_running_stats", False) for m in model.modules()):
        raise ValueError("running statistics (BatchNorm) would take in theta'; call model.eval()")


# Checkpointing runs layers again in the backward pass: the model's own, at theta instead of theta'.
CHECKPOINTS = "gradient checkpointing, or another hook on saved tensors: use metarm.lookahead"


def guarded(loss: Callable, forward: Callable, create_graph: bool) -> Tensor:
    """Returns loss(forward). Raises ValueError if its gradient would be taken at other parameters.

    This visits every operation of the loss. A loop whose loss differs from step to step only in its
    rows may set `loss.graph_is_known = True` after the first step, to save that time.
    """
    try:
        # Gradient checkpointing uses such hooks, so it raises here. The older, "reentrant" kind has
        # none: the loop below finds it.
        with torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTS):
            value = loss(forward)
    except RuntimeError as error:
        raise (ValueError(error) if CHECKPOINTS in str(error) else error) from None
    seen = {None, value.grad_fn}  # None: an input that needs no gradient
    todo = [] if getattr(loss, "graph_is_known", False) else list(seen - {None})
    while todo and value.requires_grad:
        node = todo.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(CHECKPOINTS)
        if node.name() == "CompiledFunctionBackward" and create_graph:
            raise ValueError("torch.compile has no second derivative; use order='first'")
        # A loss that calls `forward` has theta's leaves here: plain tensors, not nn.Parameters.
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            raise ValueError("a loss uses parameters of a model itself: call `forward` only")
        new = {function for function, _ in node.next_functions} - seen
        seen |= new
        todo += new
    return value


# ------------------------------------------------------------------------------------- the command
def micro_batches(loss: Callable, groups: list, size: int) -> list[Callable]:
    """Returns a list of losses (as in `Losses`), each of `size` groups or fewer.

    loss(forward, groups): the mean over groups. A group is all rows of one prompt (rm.py).
    """
    chunks = [groups[start : start + size] for start in range(0, len(groups), size)]
    # The losses of a list have equal weight, but a smaller last chunk must count less. So each mean
    # is multiplied by its chunk's size over the average size (1 where all sizes are equal).
    average = len(groups) / len(chunks)
    parts = [lambda forward, c=chunk: len(c) / average * loss(forward, c) for chunk in chunks]
    for part in parts:
        part.graph_is_known = getattr(loss, "graph_is_known", False)
    return parts


def train(args) -> None:
    """The command: Algorithm 1 on D and S."""
    import data
    import rm

    out, adapted = (Path(folder).resolve() for folder in (args.out, args.save_adapted))
    if args.save_adapted and (out in (adapted, *adapted.parents) or adapted in out.parents):
        raise data.Mistake(f"--save_adapted {args.save_adapted}: name a folder outside --out")
    eta = args.eta
    if eta is None:  # without normalize eta = alpha, as in the paper. (lr decays; eta does not.)
        eta = DEFAULT_LENGTH if args.normalize else args.lr
    options = (eta, args.order, args.normalize, args.max_grad_norm)  # of metarm_step
    pairs = data.read_preferences(args.data)
    samples = data.read_meta(args.meta)
    adapted_folder = data.output_folder(args.save_adapted) if args.save_adapted else nullcontext()
    with data.output_folder(args.out) as work, adapted_folder as adapted_work:
        # With one seed, head and order of D are those of rm.py: only the gradient differs.
        model, tokenizer = rm.load_reward_model(args.model, args.seed)
        model.to(rm.pick_device())
        _, D = rm.encode_groups(model, tokenizer, pairs, args.data, args.max_length)
        _, S = rm.encode_groups(model, tokenizer, samples, args.meta, args.max_length)
        # Draw X_s of all steps first, as rm.fit draws X_t: a resumed run then knows the rest.
        drawn = []  # for each step, the indices of its m prompts of S
        seed = args.seed + 1_000_000  # another one than for the order of D
        while len(drawn) < len(D) // args.batch_size * args.epochs:  # one more pass over S
            drawn += rm.epoch_batches([0] * len(S), args.meta_batch_size, seed, "--meta_batch_size")
            seed += 1
        warned = []

        def J(forward, groups):  # Eq. 2 on prompts of S
            rewards = rm.rewards_of(forward, model, tokenizer, groups)  # (m k,)
            return difference_loss(rewards.view(len(groups), -1))  # (m, k) -> scalar

        def L(forward, groups):  # Eq. 1 on pairs of D
            return rm.pair_loss(forward, model, tokenizer, groups)

        def step(optimizer, X_t, number):  # one step of Algorithm 1
            L_parts = micro_batches(L, X_t, args.micro_batch_size)
            # X_s of Algorithm 1: the next m prompts of S
            J_parts = micro_batches(J, [S[i] for i in drawn[number]], args.micro_batch_size)
            logged = number % args.log_every == 0
            info = diagnostics(model, L_parts, J_parts, eta, args.normalize) if logged else {}
            info |= metarm_step(model, optimizer, L_parts, J_parts, *options)
            # Later steps use the same losses on other rows: `guarded` need not check them again.
            L.graph_is_known = J.graph_is_known = True
            # Warn once if J is far from linear along the climb. Not at step 0: the rewards of a new
            # head are nearly equal, and there J has its kinks.
            if logged and number > 0 and not warned:
                rise, predicted = info["rise"], info["predicted_rise"]
                if abs(rise - predicted) > 0.5 * predicted + 1e-6:  # float32 rounds J by 1e-7
                    warned.append(f"J rose by {rise:.2g}, its slope predicts {predicted:.2g}")
                    fix = f"too long a climb for Eq. 8; lower --eta {eta:.2g}"
                    print(f"\nmetarm.py: warning: {warned[0]}: {fix}", file=sys.stderr)
            return info

        look = args.eval_data and rm.look_at(model, tokenizer, args.eval_data, args.max_length)
        how = (args.lr, args.batch_size, args.epochs, args.seed, look, args.log_every)  # of rm.fit
        log = rm.fit(model, D, step, rm.Checkpoint(work, vars(args), [D, S]), *how)
        rm.save_model(model, tokenizer, work)
        if args.save_adapted:  # one climb from the trained theta, on the first step's X_s
            J_parts = micro_batches(J, [S[i] for i in drawn[0]], args.micro_batch_size)
            theta_prime = adapted_parameters(model, J_parts, eta, args.normalize)
            model.load_state_dict(theta_prime, strict=False)
            rm.save_model(model, tokenizer, adapted_work)
    print(f"{args.out}: {len(D)} pairs, {len(S)} prompts of S; at the end {log[-1]}")


def main(argv: list[str] | None = None) -> int:
    from rm import data, training_options

    parser = data.new_parser("metarm.py", __doc__)
    training_options(parser)
    add = parser.add_argument
    add("--meta", required=True, help="meta set S, .jsonl: a prompt and k responses per row")
    add("--normalize", action=argparse.BooleanOptionalAction, default=True, help="eta is a length")
    # Of Eq. 3. With --no-normalize it is the paper's factor before grad J, and --lr by default.
    add("--eta", type=float, help=f"length of the climb ({DEFAULT_LENGTH}), or a factor (--lr)")
    add("--order", choices=["first", "exact"], default="first", help="exact takes twice as long")
    add("--meta_batch_size", type=int, default=16, help="m: prompts of S per step")
    add("--save_adapted", default="", help="folder for theta' of the trained model, on one batch")
    return data.command(parser, train, argv)


if __name__ == "__main__":
    sys.exit(main())
