"""metarm.py against independent calculations: loops, closed forms, finite differences."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ARCHITECTURES, make_pairs, write_rows
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import metarm
import rm

K, ETA = 3, 0.3
ORDERS = pytest.mark.parametrize("order", ["first", "exact"])
NORMALIZE = pytest.mark.parametrize("normalize", [False, True])


def reward_model(architecture="gpt2", dtype=torch.float64):
    """A tiny classification model, with weights so large that it is far from linear."""
    config = ARCHITECTURES[architecture](61)
    config.num_labels, config.pad_token_id, config.use_cache = 1, 0, False
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)
    return model.to(dtype).eval()


def tokens(rows, seed):
    """Rows of random ids with right padding."""
    ids = torch.randint(1, 61, (rows, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1::3, 5:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


D, S = tokens(12, seed=1), tokens(6 * K, seed=2)


def bradley_terry(rewards):
    return -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()


def L_on(batch):
    return lambda forward: bradley_terry(forward(**batch).logits[:, 0])


def J_on(batch):
    return lambda forward: metarm.difference_loss(forward(**batch).logits[:, 0].view(-1, K))


def losses_on(features):
    """L and J of a net that takes features (12, .) to rewards."""
    return (
        lambda forward: bradley_terry(forward(features).flatten()),
        lambda forward: metarm.difference_loss(forward(features.flip(0)).view(-1, K)),
    )


def parts(batch, n):
    chunks = zip(*(v.chunk(n) for v in batch.values()), strict=True)
    return [dict(zip(batch, chunk, strict=True)) for chunk in chunks]


def slow_difference(rewards):
    """Eq. 2 with nothing but numbers in two loops."""
    total = 0.0
    for row in rewards.tolist():
        for i in range(len(row)):
            for j in range(i + 1, len(row)):
                total += 2 / len(row) ** 2 / (1 + math.exp(-abs(row[i] - row[j])))
    return total / len(rewards)


def vector(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def set_to(parameters, values):
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(values, parameters)


def plain_gradient(model, loss):
    """The gradient by a plain backward pass, as one vector over the trainable parameters."""
    model.zero_grad()
    loss(model).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    model.zero_grad()
    return vector(grads)


def both_orders_by_differences(model, L, J, normalize, directions):
    """[(d . grad L(theta'), d . d L(theta')/d theta)] of directions d, by central differences."""
    trained, h = [p for p in model.parameters() if p.requires_grad], 1e-5
    theta = vector(trained)

    def climbed():  # Eq. 3 from where the model stands
        g = plain_gradient(model, J)
        return vector(trained) + ETA * (g / g.norm() if normalize else g)

    def L_at(values, climb_first):
        set_to(trained, values)
        if climb_first:
            set_to(trained, climbed())
        with torch.no_grad():
            return L(model).item()

    theta_prime, slopes = climbed(), []
    for d in directions:
        first = L_at(theta_prime + h * d, False) - L_at(theta_prime - h * d, False)
        exact = L_at(theta + h * d, True) - L_at(theta - h * d, True)
        slopes.append((first / (2 * h), exact / (2 * h)))
    set_to(trained, theta)
    return slopes


class Weights(torch.nn.Module):
    """forward() returns the weights themselves: for losses that can be worked out by hand."""

    def __init__(self, *values):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self):
        return self.w


# -------------------------------------------------------------------------------------------- Eq. 2


def test_difference_loss_is_equation_2_and_keeps_its_bounds():
    torch.manual_seed(0)
    for m, k in [(1, 2), (4, 5), (7, 3)]:
        rewards = torch.randn(m, k, dtype=torch.float64)
        want = slow_difference(rewards)
        assert metarm.difference_loss(rewards).item() == pytest.approx(want, abs=1e-12)
        equal, apart = torch.full((m, k), 1.7), 1e4 * torch.arange(k).float().expand(m, k)
        assert metarm.difference_loss(equal).item() == pytest.approx((k - 1) / (2 * k))
        assert metarm.difference_loss(apart).item() == pytest.approx((k - 1) / k)
    for bad in [(4,), (4, 1), (0, 3), (2, 2, 2)]:
        with pytest.raises(ValueError, match=rf"\(m, k >= 2\), got .*{bad[-1]}"):
            metarm.difference_loss(torch.zeros(bad))
    with pytest.raises(ValueError, match="int64"):
        metarm.difference_loss(torch.zeros(2, 3, dtype=torch.long))


# ---------------------------------------------------------------------------- Eqs. 3 and 4, by hand

A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)  # L = (w-a)' A (w-a) / 2
B = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)  # J = w' B w / 2 + b' w
a, b = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, -2.0], [0.3, 0.7]))


def L_toy(forward):
    return (forward() - a) @ A @ (forward() - a) / 2


def J_toy(forward):
    return forward() @ B @ forward() / 2 + b @ forward()


@NORMALIZE
@pytest.mark.parametrize("micro", [1, 3])
def test_quadratic_in_closed_form(normalize, micro):
    model = Weights(0.2, 0.9)
    w = model.w.detach()
    g_J = B @ w + b
    step = ETA / (g_J.norm() if normalize else 1)
    first = A @ (w + step * g_J - a)
    u = g_J / g_J.norm()  # a normalised step keeps its length, however grad J grows
    exact = first + step * (B @ (first - (u @ first) * u if normalize else first))
    for order, expected in [("first", first), ("exact", exact)]:
        losses = ([L_toy] * micro, [J_toy] * micro if micro > 1 else J_toy)
        grads, info = metarm.meta_gradient(model, *losses, ETA, order, normalize)
        torch.testing.assert_close(grads, {"w": expected}, rtol=1e-12, atol=1e-12)
        assert not grads["w"].requires_grad and model.w.grad is None
        L_adapted = L_toy(lambda: w + step * g_J)
        want = {"difference": J_toy(lambda: w), "vanilla_loss_adapted": L_adapted, "moved": 1}
        want |= {"meta_grad_norm": g_J.norm(), "grad_norm": expected.norm()}
        assert info == pytest.approx({name: float(x) for name, x in want.items()})
    # First order differs from the plain gradient by eta H_L grad J: Eq. 5 takes theta DOWN in J.
    torch.testing.assert_close(first - A @ (w - a), step * A @ g_J)
    adapted = metarm.adapted_parameters(model, J_toy, ETA, normalize)
    torch.testing.assert_close(adapted, {"w": w + step * g_J})
    assert not adapted["w"].requires_grad and torch.equal(model.w, w) and model.w.grad is None


def test_the_sign_pairs_that_the_climb_hurts_get_more_weight():
    """Two pairs with one margin at theta. Climbing J helps the first and hurts the second."""
    M = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)  # chosen - rejected, per pair
    s = torch.tensor([[2.0, -1.0], [0.0, 0.0]], dtype=torch.float64)  # two responses to one prompt
    model = Weights(1.0, 1.0)

    def J(forward):
        return metarm.difference_loss((s @ forward())[None])

    def L(forward, pairs=slice(None)):
        return -F.logsigmoid(M[pairs] @ forward()).mean()

    # By hand: grad J = sigma'(1) / 2 * (2, -1) = (0.197, -0.098); the margins (0.5, 0.5) become
    # (0.746, 0.303). A pair's weight in grad L is 1 - sigma(margin): hurt, it is heard more.
    w = metarm.adapted_parameters(model, J, eta=1.0)["w"]
    assert (1 - (M @ model.w).sigmoid()).tolist() == pytest.approx([0.378, 0.378], abs=1e-3)
    assert (1 - (M @ w).sigmoid()).tolist() == pytest.approx([0.322, 0.425], abs=1e-3)
    grads, _ = metarm.meta_gradient(model, L, J, eta=1.0)
    torch.testing.assert_close(grads["w"], -(1 - (M @ w).sigmoid()) @ M / 2)
    # In Eq. 8's terms: grad L . grad J > 0 where climbing J raises L, for the pair heard more.
    for pair, conflict in [(0, False), (1, True)]:
        seen = metarm.diagnostics(model, lambda f, i=pair: L(f, i), J, eta=1.0)
        assert (seen["cosine"] > 0) == (seen["first_order_gain"] > 0) == conflict


def test_diagnostics_are_taylors_first_order():
    model, eta = reward_model(), 1e-5
    seen = metarm.diagnostics(model, L_on(D), J_on(S), eta)
    _, info = metarm.meta_gradient(model, L_on(D), J_on(S), eta)
    g_L, g_J = plain_gradient(model, L_on(D)), plain_gradient(model, J_on(S))
    assert seen["vanilla_loss"] == pytest.approx(L_on(D)(model).item())
    assert seen["cosine"] == pytest.approx(F.cosine_similarity(g_L, g_J, dim=0).item())
    gain = info["vanilla_loss_adapted"] - seen["vanilla_loss"]
    assert seen["first_order_gain"] == pytest.approx(gain, rel=0.02)
    set_to(list(model.parameters()), vector(model.parameters()) + eta * g_J)
    assert seen["difference_adapted"] == pytest.approx(J_on(S)(model).item())


# --------------------------------------------------------------- Eqs. 3 and 4 on real architectures


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "gpt_neox"])
@NORMALIZE
def test_gradients_against_finite_differences(architecture, normalize):
    model = reward_model(architecture)
    for norm in model.modules():  # transformers' RMSNorm rounds to float32: too coarse here
        if "RMSNorm" in type(norm).__name__:
            norm.forward = lambda x, n=norm: F.rms_norm(
                x, n.weight.shape, n.weight, n.variance_epsilon
            )
    before, found = {n: p.detach().clone() for n, p in model.named_parameters()}, {}
    for order in ("first", "exact"):
        how = (ETA, order, normalize)
        whole, info = metarm.meta_gradient(model, L_on(D), J_on(S), *how)
        L, J = [L_on(x) for x in parts(D, 3)], [J_on(x) for x in parts(S, 3)]
        micro, info_micro = metarm.meta_gradient(model, L, J, *how)
        torch.testing.assert_close(micro, whole, rtol=1e-8, atol=1e-10)
        # A gradient of 0 but for rounding may count as moved or not.
        assert info.pop("moved") == pytest.approx(info_micro.pop("moved"), abs=1e-3)
        assert info == pytest.approx(info_micro, rel=1e-8)
        assert list(whole) == list(before)
        found[order] = vector(whole.values())
    for name, p in model.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])
    want = slow_difference(model(**S).logits[:, 0].view(-1, K))
    assert info["difference"] == pytest.approx(want, rel=1e-6)

    gap = found["exact"] - found["first"]
    assert gap.norm() > 0.02 * found["first"].norm()  # or this could not tell the two orders apart
    random = torch.randn(gap.shape, generator=torch.Generator().manual_seed(0)).double()
    directions = [d / d.norm() for d in (found["first"], gap, random)]
    slopes = both_orders_by_differences(model, L_on(D), J_on(S), normalize, directions)
    for d, (first, exact) in zip(directions, slopes, strict=True):
        assert found["first"].dot(d).item() == pytest.approx(first, rel=1e-5, abs=1e-6)
        assert found["exact"].dot(d).item() == pytest.approx(exact, rel=1e-5, abs=1e-6)


class Odd(torch.nn.Module):
    """Tied, frozen and unused parameters; a module and a parameter under two names each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, bias=False)
        self.out.weight = self.embed.weight
        self.layer = torch.nn.Linear(4, 4)
        self.again = self.layer
        self.shift = torch.nn.Parameter(torch.randn(4))
        self.same = self.shift
        self.only_J, self.only_L, self.none = map(torch.nn.Parameter, torch.full((3, 1), 2.0))
        self.frozen = torch.nn.Parameter(torch.tensor([1.5]), requires_grad=False)
        self.double()

    def forward(self, ids, name):
        x = self.again(self.layer(self.embed(ids)).tanh() + self.shift).tanh() * self.same
        return self.out(x).sum(-1) * self.frozen * getattr(self, name)


@NORMALIZE
def test_odd_parameters_get_their_gradient_and_stay_where_they_were(normalize):
    model = Odd()

    def L(forward):
        return forward(torch.arange(6), "only_L").pow(2).mean()

    def J(forward):
        return forward(torch.arange(3, 9), "only_J").sigmoid().mean()

    def places():  # wherever the model holds a parameter: the object, its values
        modules = (model, model.embed, model.out, model.layer, model.again)
        held = [p for module in modules for p in module._parameters.values() if p is not None]
        return [id(p) for p in held], vector(held)

    (objects, values), found = places(), {}
    for order in ("first", "exact"):
        found[order], _ = metarm.meta_gradient(model, L, J, ETA, order, normalize)
    adapted = metarm.adapted_parameters(model, J, ETA, normalize)
    seen = metarm.diagnostics(model, L, J, ETA, normalize)
    assert places()[0] == objects and torch.equal(places()[1], values)  # theta is back
    names = ["shift", "only_J", "only_L", "none", "embed.weight", "layer.weight", "layer.bias"]
    for grads in found.values():  # tied: once; frozen: never
        assert list(grads) == names and grads["none"] == 0 != grads["only_L"]
    assert found["first"]["only_J"] == 0 != found["exact"]["only_J"]  # it bends the others' theta'
    trained = [p for p in model.parameters() if p.requires_grad]
    d = torch.randn(sum(p.numel() for p in trained), dtype=torch.float64)
    [slopes] = both_orders_by_differences(model, L, J, normalize, [d / d.norm()])
    for grads, slope in zip(found.values(), slopes, strict=True):
        assert vector(grads.values()).dot(d / d.norm()).item() == pytest.approx(slope, rel=1e-6)

    g_L, g_J = plain_gradient(model, L), plain_gradient(model, J)
    assert seen["cosine"] == pytest.approx(F.cosine_similarity(g_L, g_J, dim=0).item())
    step = ETA * (g_J / g_J.norm() if normalize else g_J)
    torch.testing.assert_close(vector(adapted.values()), vector(trained) + step)
    set_to(trained, vector(adapted.values()))
    assert seen["difference_adapted"] == pytest.approx(J(model).item())

    metarm.metarm_step(model, torch.optim.SGD(trained, lr=0.1), L, J, ETA, normalize=normalize)
    assert places()[0] == objects and not torch.equal(places()[1], values)


@ORDERS
def test_a_frozen_backbone_trains_the_head_alone(order):
    model = reward_model("llama", torch.float32)
    model.model.requires_grad_(False)
    grads, info = metarm.meta_gradient(model, L_on(D), J_on(S), ETA, order, normalize=True)
    assert list(grads) == ["score.weight"] and info["grad_norm"] > 0 and info["moved"] > 0.9


@ORDERS
@NORMALIZE
def test_no_difference_to_climb_means_theta_stays(order, normalize):
    model = reward_model()
    same = {key: value[:1].expand(6 * K, -1) for key, value in S.items()}  # one response, K times

    def J(forward):
        return metarm.difference_loss(forward(**same).logits[:, 0][:1].expand(2, K))

    grads, info = metarm.meta_gradient(model, L_on(D), J, ETA, order, normalize)
    expected = plain_gradient(model, L_on(D))
    torch.testing.assert_close(vector(grads.values()), expected, rtol=1e-9, atol=1e-12)
    assert info["meta_grad_norm"] == 0 == info["moved"]
    # At a minimum of J the gradient vanishes, its curvature does not: no NaN, no step of 1e12.
    toy = Weights(0.0, 0.0)
    grads, _ = metarm.meta_gradient(toy, L_toy, lambda f: f() @ B @ f(), ETA, order, True)
    torch.testing.assert_close(grads["w"], -A @ a)


# -------------------------------------------------------------------------------- Eq. 5, and errors


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_metarm_step_is_a_step_of_sgd_from_theta(max_grad_norm):
    model, twin = reward_model(), reward_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"eta": ETA, "max_grad_norm": max_grad_norm}
    info = metarm.metarm_step(model, optimizer, L_on(D), J_on(S), **options)
    theta = vector(twin.parameters())
    set_to(list(twin.parameters()), theta + ETA * plain_gradient(twin, J_on(S)))
    g = plain_gradient(twin, L_on(D))
    assert info["grad_norm"] == pytest.approx(g.norm().item()) and g.norm() > 0.05
    if max_grad_norm:
        g *= max_grad_norm / (g.norm() + 1e-6)
    torch.testing.assert_close(vector(model.parameters()), theta - 0.1 * g, rtol=0, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_mistakes_are_told_in_one_line_and_nothing_is_stepped():
    model, L, J = reward_model("llama", torch.float32), L_on(D), J_on(S)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before, nan_model = vector(model.parameters()), reward_model("llama", torch.float32)
    nan_model.score.weight.data[0, 0] = math.nan
    for message, net, losses, *options in [
        ("eta must be", model, (L, J), -0.1),
        ("eta must be", model, (L, J), math.inf),
        ("max_grad_norm must be", model, (L, J), 0.1, "first", False, 0.0),
        ("order must be", model, (L, J), 0.1, "second"),
        ("does not depend", model, (L, lambda f: J(f).detach()), 0.1),
        ("does not depend", model, (L, lambda f: J(f).detach()), 0.1, "exact"),
        ("no trainable", reward_model().requires_grad_(False), (L, J), 0.1),
        ("vanilla_loss_adapted is nan", model, (lambda f: L(f) * math.nan, J), 0.1),
        ("difference is nan", nan_model, (L, J), 0.1),
        ("grad_norm is (nan|inf)", model, (lambda f: (L(f) - L(f)).sqrt(), J), 0.1),
        ("meta_grad_norm is (nan|inf)", model, (L, lambda f: (J(f) - J(f)).sqrt()), 0.1),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            metarm.metarm_step(net, optimizer, *losses, *options)
        assert "\n" not in str(error.value)
    with pytest.raises(metarm.NotFinite, match="is nan"):
        metarm.adapted_parameters(nan_model, J, 0.1)
    assert torch.equal(vector(model.parameters()), before) and not optimizer.state


class Recomputing(torch.nn.Module):
    """Checkpoints a part of its forward by itself: a module, or a function of its parameters."""

    def __init__(self, kind=None, reentrant=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.head = (torch.nn.Linear(*x) for x in [(3, 4), (4, 4), (4, 1)])
        self.kind, self.reentrant = kind, reentrant

    def forward(self, x):
        def function(x):
            return (x @ self.layer.weight.T + self.layer.bias).tanh()

        part, x = self.layer if self.kind == "module" else function, self.first(x).tanh()
        x = checkpoint(part, x, use_reentrant=self.reentrant) if self.kind else function(x)
        return self.head(x.tanh() if self.kind == "module" else x)


def refused_or_right(expected, call):
    try:
        found = call()
    except ValueError as error:
        assert "lookahead" in str(error)
    else:
        torch.testing.assert_close(found, expected)


@ORDERS
@pytest.mark.parametrize("kind", ["module", "function"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_hidden_recomputation_is_refused_or_right(order, kind, reentrant):
    """In the backward pass the model would run again, at theta and not at theta'."""
    L, J = losses_on(torch.randn(12, 3, generator=torch.Generator().manual_seed(1)))
    expected, _ = metarm.meta_gradient(Recomputing(), L, J, 3.0, order)
    model = Recomputing(kind, reentrant)
    refused_or_right(expected, lambda: metarm.meta_gradient(model, L, J, 3.0, order)[0])
    if order == "first":  # the way to go there
        J(model).backward()
        with metarm.lookahead(model, 3.0):
            L(model).backward()
        torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, expected)


# --------------------------------------------------------------------------- the lookahead in place


def in_place(model, eta, normalize=False, D_parts=(D,), S_parts=(S,)):
    """The loop of `lookahead`'s docstring; returns the gradient that the optimizer would get."""
    model.zero_grad()
    for x in S_parts:
        (J_on(x)(model) / len(S_parts)).backward()
    with metarm.lookahead(model, eta, normalize):
        for x in D_parts:
            (L_on(x)(model) / len(D_parts)).backward()
    gradient = vector(p.grad for p in model.parameters())
    model.zero_grad()
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@NORMALIZE
def test_lookahead_is_the_first_order_gradient(dtype, normalize):
    model, rtol = reward_model("llama", dtype), 1e-5 if dtype == torch.float32 else 1e-12
    grads, _ = metarm.meta_gradient(model, L_on(D), J_on(S), ETA, normalize=normalize)
    expected = vector(grads.values())
    found = in_place(model, ETA, normalize)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol / 10)
    micro = parts(D, 3), parts(S, 3)  # all of S before, all of D inside
    accumulated = in_place(model, ETA, normalize, *micro)
    torch.testing.assert_close(accumulated, expected, rtol=1e-4, atol=1e-6)
    each = [in_place(model, ETA, normalize, [d], [s]) for d, s in zip(*micro, strict=True)]
    # One `with` per micro-batch is another gradient.
    assert (sum(each) / 3 - expected).norm() > 0.01 * expected.norm()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()  # transformers checkpoints in train mode only; this Llama has no dropout
    torch.testing.assert_close(in_place(model, ETA, normalize), found, rtol=rtol, atol=rtol / 10)
    how = {"eta": ETA, "normalize": normalize}
    refused_or_right(grads, lambda: metarm.meta_gradient(model, L_on(D), J_on(S), **how)[0])


def test_lookahead_restores_bit_for_bit_even_after_an_exception():
    model = reward_model("llama", torch.bfloat16)
    before = vector(model.parameters())
    for _ in range(3):
        in_place(model, 0.05, normalize=True)
    assert torch.equal(vector(model.parameters()), before)
    J_on(S)(model).backward()
    step = 0.05 * vector(p.grad for p in model.parameters())
    with pytest.raises(KeyError), metarm.lookahead(model, 0.05):
        assert all(p.grad is None for p in model.parameters())
        assert not torch.equal(vector(model.parameters()), before)
        raise KeyError
    assert torch.equal(vector(model.parameters()), before)
    assert not torch.equal(before + step - step, before)  # what subtracting would have left
    J_on(S)(model).backward()
    for eta in (-1.0, math.nan):
        with pytest.raises(ValueError, match="eta must be"), metarm.lookahead(model, eta):
            pass
    model.zero_grad()
    with pytest.raises(ValueError, match="back-propagate J"), metarm.lookahead(model, 0.1):
        pass


def test_bf16_weights_do_not_feel_a_small_eta():
    for dtype, low, high in [(torch.bfloat16, 0, 0.01), (torch.float32, 0.3, 1)]:
        model = reward_model("llama", dtype)
        _, info = metarm.meta_gradient(model, L_on(D), J_on(S), eta=5e-6)
        assert low <= info["moved"] <= high
    adapted = metarm.adapted_parameters(model, J_on(S), 5e-6)
    changed = vector(adapted.values()) != vector(model.parameters())
    assert info["moved"] == pytest.approx(changed.double().mean().item())


def test_one_autocast_region_round_everything(monkeypatch):
    """autocast caches bf16 copies of the weights, and L must not run on those of theta."""
    model = reward_model("llama", torch.float32)

    def bf16():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def run(one_region):
        around, each = (bf16, nullcontext) if one_region else (nullcontext, bf16)
        with around():
            with each():
                J_on(S)(model).backward()
            with metarm.lookahead(model, 0.5, normalize=True):
                with each():
                    L = L_on(D)(model)
                    L.backward()
            with each():
                after = L_on(D)(model).item()  # and after it not on those of theta'
        gradient = vector(p.grad for p in model.parameters())
        model.zero_grad()
        return gradient, L.item(), after

    expected, found = run(one_region=False), run(one_region=True)
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:] and found[1] != found[2]
    with bf16():
        grads, info = metarm.meta_gradient(model, L_on(D), J_on(S), 0.5, normalize=True)
    assert (vector(grads.values()) - expected[0]).norm() < 0.02 * expected[0].norm()
    assert info["vanilla_loss_adapted"] == pytest.approx(expected[1], rel=1e-3)
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)  # the trap is real:
    assert (run(one_region=True)[0] - expected[0]).norm() > 0.05 * expected[0].norm()


@NORMALIZE
@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(normalize, overflow):
    """p.grad is scale * grad J, so divide eta by the scale. An overflow in it skips the step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    L, J = losses_on(torch.randn(12, 5))
    expected, _ = metarm.meta_gradient(model, L, J, ETA, normalize=normalize)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    theta = vector(model.parameters())
    scaler.scale(J(model)).backward()
    if overflow:  # one infinite entry ahead of a tanh, which would turn it into a finite loss
        model[0].weight.grad[0, 0] = math.inf
    with metarm.lookahead(model, ETA if normalize else ETA / scaler.get_scale(), normalize):
        scaler.scale(L(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    step = torch.zeros_like(theta) if overflow else vector(expected.values())
    torch.testing.assert_close(theta - vector(model.parameters()), step, rtol=1e-4, atol=1e-6)
    assert (scaler.get_scale() < 1024.0) == overflow


def test_ddp_is_refused_wherever_it_sits(tmp_path):
    """Called at other parameters, it would not average the gradients: the processes drift apart."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/at", rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
        for model in (ddp, torch.nn.Sequential(ddp), torch.compile(ddp)):
            with pytest.raises(ValueError, match="lookahead"):
                metarm.meta_gradient(model, *losses_on(torch.randn(12, 3)), ETA)
    finally:
        torch.distributed.destroy_process_group()


# -------------------------------------------------------------------------------------- the command


def test_micro_batches_of_unequal_size_keep_the_mean():
    losses = metarm.micro_batches(lambda forward, groups: sum(groups) / len(groups), [*range(7)], 3)
    assert len(losses) == 3 and sum(loss(None) for loss in losses) / 3 == pytest.approx(3.0)


def test_without_a_climb_the_command_is_rm_py(policy_folder, tmp_path):
    """eta = 0 is Eq. 1: the same head, order of D and optimizer, so the same weights."""
    D, S = make_pairs(9), [{"prompt": str(i), "responses": [" a", " b", f" {i}"]} for i in range(7)]
    D, S = write_rows(tmp_path / "D.jsonl", D), write_rows(tmp_path / "S.jsonl", S)
    common = f"--model {policy_folder} --data {D} --batch_size 4 --epochs 2 --lr 1e-3 --seed 3"
    assert rm.main(f"{common} --out {tmp_path}/rm".split()) == 0
    expected = load_file(tmp_path / "rm/model.safetensors")
    for order in ("first", "exact"):
        extra = f"--meta {S} --meta_batch_size 3 --micro_batch_size 3 --eta 0 --order {order}"
        assert metarm.main(f"{common} {extra} --out {tmp_path}/{order}".split()) == 0
        found = load_file(tmp_path / order / "model.safetensors")
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ORDERS
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_cuda_equals_cpu_and_runs_under_bf16_autocast(order, architecture):
    model, how = reward_model(architecture), (ETA, order, True)
    grads, _ = metarm.meta_gradient(model, L_on(D), J_on(S), *how)
    expected = vector(grads.values())
    model.cuda()
    L, J = (on({k: v.cuda() for k, v in x.items()}) for on, x in [(L_on, D), (J_on, S)])
    grads, _ = metarm.meta_gradient(model, L, J, *how)
    torch.testing.assert_close(vector(grads.values()).cpu(), expected, rtol=1e-4, atol=1e-5)
    model.float()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        grads, _ = metarm.meta_gradient(model, L, J, *how)
    found = vector(grads.values()).cpu().double()
    assert F.cosine_similarity(found, expected, dim=0) > 0.95
