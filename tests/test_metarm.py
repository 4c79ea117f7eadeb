"""metarm.py against independent calculations: loops, closed forms, finite differences, plain loops."""

import ast
import json
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import metarm

torch.set_num_threads(1)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
K, ETA = 3, 0.3
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=61)


# ----------------------------------------------------------------------------------------------- small things

def reward_model(architecture="gpt2", dtype=torch.float64, seed=0):
    """A tiny classification model with its default attention, large enough weights to be far from linear."""
    import transformers as tr
    config = {"gpt2": lambda: tr.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
              "llama": lambda: tr.LlamaConfig(num_key_value_heads=2, **SIZES),
              "qwen2": lambda: tr.Qwen2Config(num_key_value_heads=2, **SIZES),
              "gpt_neox": lambda: tr.GPTNeoXConfig(**SIZES)}[architecture]()
    config.num_labels, config.pad_token_id, config.use_cache = 1, 0, False
    torch.manual_seed(seed)
    model = tr.AutoModelForSequenceClassification.from_config(config)
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


def L_on(batch):
    def vanilla_loss(forward):
        rewards = forward(**batch).logits[:, 0]
        return -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
    return vanilla_loss


def J_on(batch):
    return lambda forward: metarm.difference_loss(forward(**batch).logits[:, 0].view(-1, K))


def parts(batch, n):
    return [dict(zip(batch, values)) for values in zip(*(v.chunk(n) for v in batch.values()))]


D, S = tokens(12, seed=1), tokens(6 * K, seed=2)


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


def set_to(model, values):
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(values, model.parameters())


def plain_gradient(model, loss):
    model.zero_grad()
    loss(model).backward()
    gradient = vector(p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters())
    model.zero_grad()
    return gradient


class Weights(torch.nn.Module):
    """forward() returns the weights themselves: a model for losses that can be worked out by hand."""

    def __init__(self, *values):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self):
        return self.w


# ------------------------------------------------------------------------------------------------------ Eq. 2

def test_difference_loss_is_equation_2_and_keeps_its_bounds():
    torch.manual_seed(0)
    for m, k in [(1, 2), (4, 5), (7, 3)]:
        rewards = torch.randn(m, k, dtype=torch.float64)
        assert metarm.difference_loss(rewards).item() == pytest.approx(slow_difference(rewards), abs=1e-12)
        assert metarm.difference_loss(torch.full((m, k), 1.7)).item() == pytest.approx((k - 1) / (2 * k))
        apart = 1e4 * torch.arange(k, dtype=torch.float32).expand(m, k)
        assert metarm.difference_loss(apart).item() == pytest.approx((k - 1) / k)
    assert metarm.difference_loss(torch.randn(2, 3, dtype=torch.bfloat16)).shape == ()


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(4, 1), torch.zeros(0, 3), torch.zeros(2, 2, 2),
                                 torch.zeros(2, 3, dtype=torch.long)])
def test_difference_loss_tells_what_shape_it_wants(bad):
    with pytest.raises(ValueError, match=rf"\(m prompts, k >= 2 responses\), got .*{bad.shape[-1]}"):
        metarm.difference_loss(bad)


# -------------------------------------------------------------------------------------- Eqs. 3 and 4, by hand

A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)   # L = (w-a)' A (w-a) / 2
B = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)  # J = w' B w / 2 + b' w
a, b = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)


def L_toy(forward): return (forward() - a) @ A @ (forward() - a) / 2
def J_toy(forward): return forward() @ B @ forward() / 2 + b @ forward()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("micro", [1, 3])
def test_quadratic_in_closed_form(normalize, micro):
    model = Weights(0.2, 0.9)
    w = model.w.detach()
    g_J = B @ w + b
    step = ETA / (g_J.norm() if normalize else 1)
    first = A @ (w + step * g_J - a)
    u = g_J / g_J.norm()
    exact = first + step * (B @ (first - (u @ first) * u if normalize else first))
    for order, expected in [("first", first), ("exact", exact)]:
        J = [J_toy] * micro if micro > 1 else J_toy
        grads, info = metarm.meta_gradient(model, [L_toy] * micro, J, ETA, order, normalize)
        torch.testing.assert_close(grads, {"w": expected}, rtol=1e-12, atol=1e-12)
        assert info["difference"] == pytest.approx(J_toy(lambda: w).item())
        assert info["vanilla_loss_adapted"] == pytest.approx(L_toy(lambda: w + step * g_J).item())
        assert info["meta_grad_norm"] == pytest.approx(g_J.norm().item())
        assert info["grad_norm"] == pytest.approx(expected.norm().item()) and info["moved"] == 1
    # First order differs from the plain gradient by eta * H_L grad J: Eq. 5 takes theta DOWN in J.
    torch.testing.assert_close(first - A @ (w - a), step * A @ g_J)
    adapted = metarm.adapted_parameters(model, J_toy, ETA, normalize)
    torch.testing.assert_close(adapted, {"w": w + step * g_J})
    assert not adapted["w"].requires_grad and model.w.grad is None


def test_the_sign_pairs_that_the_climb_hurts_get_more_weight():
    """Two pairs with one margin at theta. Climbing J helps the first, hurts the second: who is heard more?"""
    M = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)  # chosen - rejected, a row a pair
    s = torch.tensor([[2.0, -1.0], [0.0, 0.0]], dtype=torch.float64)  # two responses to one prompt
    model = Weights(1.0, 1.0)
    def L(forward): return -F.logsigmoid(M @ forward()).mean()
    def J(forward): return metarm.difference_loss((s @ forward())[None])

    # By hand: grad J = sigma'(1) / 2 * (2, -1) = (0.197, -0.098); margins (0.5, 0.5) -> (0.746, 0.303). The
    # weight of a pair in grad L is 1 - sigma(margin): helped, it is heard less, hurt, more.
    w = metarm.adapted_parameters(model, J, eta=1.0)["w"]
    assert (1 - (M @ model.w).sigmoid()).tolist() == pytest.approx([0.378, 0.378], abs=1e-3)
    assert (1 - (M @ w).sigmoid()).tolist() == pytest.approx([0.322, 0.425], abs=1e-3)
    grads, _ = metarm.meta_gradient(model, L, J, eta=1.0)
    torch.testing.assert_close(grads["w"], -(1 - (M @ w).sigmoid()) @ M / 2)
    # In Eq. 8's terms: grad L . grad J > 0 where climbing J raises L, and that is the pair with more weight.
    for pair, conflict in [(0, False), (1, True)]:
        seen = metarm.diagnostics(model, lambda f: -F.logsigmoid(M[pair] @ f()), J, eta=1.0)
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
    set_to(model, vector(model.parameters()) + eta * g_J)
    assert seen["difference_adapted"] == pytest.approx(J_on(S)(model).item())


# ------------------------------------------------------------------------- Eqs. 3 and 4 on real architectures

@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_against_finite_differences(architecture, normalize):
    model = reward_model(architecture)
    for norm in model.modules():  # transformers' RMSNorm rounds to float32: too coarse to difference
        if "RMSNorm" in type(norm).__name__:
            norm.forward = lambda x, n=norm: F.rms_norm(x, n.weight.shape, n.weight, n.variance_epsilon)
    theta, h = vector(model.parameters()), 1e-5

    def climbed():  # Eq. 3 from where the model stands, by plain backward
        g = plain_gradient(model, J_on(S))
        return vector(model.parameters()) + ETA * (g / g.norm() if normalize else g)

    def L_at(values):
        set_to(model, values)
        with torch.no_grad():
            return L_on(D)(model).item()

    def L_after_climb_from(values):
        set_to(model, values)
        return L_at(climbed())

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {}
    for order in ("first", "exact"):
        whole, info = metarm.meta_gradient(model, L_on(D), J_on(S), ETA, order, normalize)
        micro, info_micro = metarm.meta_gradient(model, [L_on(x) for x in parts(D, 3)],
                                                 [J_on(x) for x in parts(S, 3)], ETA, order, normalize)
        torch.testing.assert_close(micro, whole, rtol=1e-8, atol=1e-10)
        moved = info.pop("moved"), info_micro.pop("moved")
        assert moved[0] == pytest.approx(moved[1], abs=1e-3)  # a gradient of 0 but for rounding may count or not
        assert info == pytest.approx(info_micro, rel=1e-8)
        assert list(whole) == list(before)
        found[order] = vector(whole.values())
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert info["difference"] == pytest.approx(slow_difference(model(**S).logits[:, 0].view(-1, K)), rel=1e-6)

    theta_prime = climbed()
    gap = found["exact"] - found["first"]
    assert gap.norm() > 0.02 * found["first"].norm()  # or the two orders could not be told apart below
    random = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for direction in (found["first"], gap, random):
        d = direction / direction.norm()
        slope = (L_at(theta_prime + h * d) - L_at(theta_prime - h * d)) / (2 * h)
        assert found["first"].dot(d).item() == pytest.approx(slope, rel=1e-5, abs=1e-6)
        slope = (L_after_climb_from(theta + h * d) - L_after_climb_from(theta - h * d)) / (2 * h)
        assert found["exact"].dot(d).item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_identity_is_differentiating_through_the_lookahead(normalize):
    """The other way to the exact gradient: one graph from theta through theta' to L, as MAML code does."""
    model = reward_model()
    theta = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    def at(parameters): return lambda **kwargs: functional_call(model, parameters, (), kwargs)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        g = torch.autograd.grad(J_on(S)(at(theta)), list(theta.values()), create_graph=True)
        scale = ETA / (torch.sqrt(sum((x * x).sum() for x in g)) if normalize else 1)
        loss = L_on(D)(at({name: p + scale * x for (name, p), x in zip(theta.items(), g)}))
        expected = dict(zip(theta, torch.autograd.grad(loss, list(theta.values()))))
    for J in (J_on(S), [J_on(x) for x in parts(S, 3)]):
        grads, _ = metarm.meta_gradient(model, L_on(D), J, ETA, "exact", normalize)
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)


def test_tied_frozen_and_unused_parameters():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, bias=False)
            self.out.weight = self.embed.weight
            self.only_J, self.only_L, self.none = (torch.nn.Parameter(torch.tensor([2.0])) for _ in range(3))
            self.frozen = torch.nn.Parameter(torch.tensor([1.5]), requires_grad=False)

        def forward(self, ids, name):
            return self.out(self.embed(ids).tanh()).sum(-1) * self.frozen * getattr(self, name)

    torch.manual_seed(0)
    model = Odd().double()
    trainable = [p for p in model.parameters() if p.requires_grad]
    def L(forward): return forward(torch.arange(6), "only_L").pow(2).mean()
    def J(forward): return forward(torch.arange(3, 9), "only_J").sigmoid().mean()

    def L_after_climb_from(values):
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(values, trainable)
        model.zero_grad()
        J(model).backward()
        adapted = {name: p if p.grad is None else p + ETA * p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        return L(lambda *x: functional_call(model, adapted, x)).item()

    theta = vector(trainable)
    for order in ("first", "exact"):
        grads, _ = metarm.meta_gradient(model, L, J, ETA, order)
        assert set(grads) == {"embed.weight", "only_J", "only_L", "none"}  # tied: once; frozen: never
        assert grads["none"] == 0 and grads["only_L"] != 0
        assert (grads["only_J"] == 0) == (order == "first")  # but it bends theta' of the others
    d = torch.randn_like(theta)
    slope = (L_after_climb_from(theta + 1e-6 * d) - L_after_climb_from(theta - 1e-6 * d)) / 2e-6
    assert vector(grads.values()).dot(d).item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("order", ["first", "exact"])
def test_a_frozen_backbone_trains_the_head_alone(order):
    model = reward_model("llama", torch.float32)
    for p in model.model.parameters():
        p.requires_grad_(False)
    grads, info = metarm.meta_gradient(model, L_on(D), J_on(S), ETA, order, normalize=True)
    assert list(grads) == ["score.weight"] and info["grad_norm"] > 0 and info["moved"] > 0.9


@pytest.mark.parametrize("order", ["first", "exact"])
@pytest.mark.parametrize("normalize", [False, True])
def test_no_difference_to_climb_means_theta_stays(order, normalize):
    model = reward_model()
    same = {key: value[:1].expand(6 * K, -1) for key, value in S.items()}  # one response, K times
    def J(forward): return metarm.difference_loss(forward(**same).logits[:, 0][:1].expand(2, K))
    grads, info = metarm.meta_gradient(model, L_on(D), J, ETA, order, normalize)
    torch.testing.assert_close(vector(grads.values()), plain_gradient(model, L_on(D)), rtol=1e-9, atol=1e-12)
    assert info["meta_grad_norm"] == 0 and info["moved"] == 0
    assert info["difference"] == pytest.approx((K - 1) / (2 * K))
    # At a minimum of J the gradient vanishes but the curvature does not; nothing may blow up to NaN or 1e12.
    toy = Weights(0.0, 0.0)
    grads, _ = metarm.meta_gradient(toy, L_toy, lambda f: f() @ B @ f(), ETA, order, normalize=True)
    torch.testing.assert_close(grads["w"], -A @ a)


# ------------------------------------------------------------------------------------------------------ Eq. 5

@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_metarm_step_is_a_step_of_sgd_from_theta(max_grad_norm):
    model, twin = reward_model(), reward_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    info = metarm.metarm_step(model, optimizer, L_on(D), J_on(S), ETA, max_grad_norm=max_grad_norm)
    theta = vector(twin.parameters())
    set_to(twin, theta + ETA * plain_gradient(twin, J_on(S)))
    g = plain_gradient(twin, L_on(D))
    assert info["grad_norm"] == pytest.approx(g.norm().item()) and g.norm() > 0.05
    if max_grad_norm:
        g *= max_grad_norm / (g.norm() + 1e-6)
    torch.testing.assert_close(vector(model.parameters()), theta - 0.1 * g, rtol=0, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_mistakes_are_told_in_one_line_and_nothing_is_stepped():
    model = reward_model("llama", torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = vector(model.parameters())
    L, J = L_on(D), J_on(S)
    with torch.no_grad():
        nan_model = reward_model("llama", torch.float32)
        nan_model.score.weight[0, 0] = float("nan")
    for message, arguments in [
            ("eta must be", (model, optimizer, L, J, -0.1)),
            ("eta must be", (model, optimizer, L, J, math.inf)),
            ("max_grad_norm must be", (model, optimizer, L, J, 0.1, "first", False, 0.0)),
            ("order must be", (model, optimizer, L, J, 0.1, "second")),
            ("vanilla_loss must return a scalar", (model, optimizer, lambda f: f(**D).logits[:, 0], J, 0.1)),
            (r"got \(18, 1\)", (model, optimizer, L, lambda f: f(**S).logits, 0.1)),
            ("got float", (model, optimizer, L, lambda f: 1.0, 0.1)),
            ("must be a function", (model, optimizer, [], J, 0.1)),
            ("does not depend", (model, optimizer, lambda f: L(model), J, 0.1)),
            ("does not depend", (model, optimizer, L, lambda f: J(f).detach(), 0.1)),
            ("does not depend", (model, optimizer, L, lambda f: J(f).detach(), 0.1, "exact")),
            ("no trainable", (reward_model().requires_grad_(False), optimizer, L, J, 0.1)),
            (r"L \(vanilla_loss\) at theta' is nan", (model, optimizer, lambda f: L(f) * math.nan, J, 0.1)),
            (r"J \(meta_loss\) at theta is nan", (nan_model, optimizer, L, J, 0.1)),
            (r"\|grad L\| is (nan|inf)", (model, optimizer, lambda f: (L(f) - L(f)).sqrt(), J, 0.1)),
            (r"\|grad J\| at theta is (nan|inf)",
             (model, optimizer, L, lambda f: (J(f) - J(f)).sqrt(), 0.1))]:
        with pytest.raises(ValueError, match=message) as error:
            metarm.metarm_step(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is nan"):
        metarm.adapted_parameters(nan_model, J, 0.1)
    assert torch.equal(vector(model.parameters()), before) and not optimizer.state


# ------------------------------------------------------------------------------------- the lookahead in place

def in_place(model, eta, normalize=False, D_parts=(D,), S_parts=(S,), scale=1.0):
    """The plain loop of `lookahead`'s docstring; returns the gradient that the optimizer would get."""
    model.zero_grad()
    for x in S_parts:
        (scale * J_on(x)(model) / len(S_parts)).backward()
    with metarm.lookahead(model, eta, normalize):
        for x in D_parts:
            (scale * L_on(x)(model) / len(D_parts)).backward()
    gradient = vector(p.grad for p in model.parameters())
    model.zero_grad()
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_lookahead_is_the_first_order_gradient(dtype, normalize):
    model = reward_model("llama", dtype)
    expected = vector(metarm.meta_gradient(model, L_on(D), J_on(S), ETA, normalize=normalize)[0].values())
    exact = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_place(model, ETA, normalize), expected, **exact)
    accumulated = in_place(model, ETA, normalize, parts(D, 3), parts(S, 3))  # all of S before, all of D in it
    torch.testing.assert_close(accumulated, expected, rtol=1e-4, atol=1e-6)
    each = sum(in_place(model, ETA, normalize, [d], [s]) for d, s in zip(parts(D, 3), parts(S, 3))) / 3
    assert (each - expected).norm() > 0.01 * expected.norm()  # one `with` a micro-batch is another gradient


def test_lookahead_restores_bit_for_bit_even_after_an_exception():
    model = reward_model("llama", torch.bfloat16)
    before = vector(model.parameters())
    for _ in range(3):
        in_place(model, 0.05, normalize=True)
    assert torch.equal(vector(model.parameters()), before)
    J_on(S)(model).backward()
    gradient = vector(p.grad for p in model.parameters())
    with pytest.raises(KeyError):
        with metarm.lookahead(model, 0.05):
            assert all(p.grad is None for p in model.parameters())
            assert not torch.equal(vector(model.parameters()), before)
            raise KeyError
    assert torch.equal(vector(model.parameters()), before)
    step = 0.05 * gradient
    assert not torch.equal(before + step - step, before)  # what subtracting would have left
    model.zero_grad()
    for mistake, eta in [("back-propagate J", 0.1), ("eta must be", -1.0), ("eta must be", math.nan)]:
        with pytest.raises(ValueError, match=mistake), metarm.lookahead(model, eta):
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
    """autocast caches the bf16 copies of weights until its region ends; L must not run on those of theta."""
    model = reward_model("llama", torch.float32)

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
                after = L_on(D)(model).item()                   # and after it not on those of theta'
        gradient = vector(p.grad for p in model.parameters())
        model.zero_grad()
        return gradient, L.item(), after

    def bf16(): return torch.autocast("cpu", dtype=torch.bfloat16)
    expected, found = run(one_region=False), run(one_region=True)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1:] == expected[1:] and found[1] != found[2]
    with bf16():
        grads, info = metarm.meta_gradient(model, L_on(D), J_on(S), 0.5, normalize=True)
    assert (vector(grads.values()) - expected[0]).norm() < 0.02 * expected[0].norm()
    assert info["vanilla_loss_adapted"] == pytest.approx(expected[1], rel=1e-3)
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)  # the trap is real:
    assert (run(one_region=True)[0] - expected[0]).norm() > 0.05 * expected[0].norm()


def test_gradient_checkpointing():
    model = reward_model("llama")
    expected = in_place(model, ETA)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for call in (lambda: metarm.meta_gradient(model, L_on(D), J_on(S), ETA),
                 lambda: metarm.adapted_parameters(model, J_on(S), ETA)):
        with pytest.raises(ValueError, match="lookahead"):
            call()
    model.train()  # transformers checkpoints in train mode only; these Llamas have no dropout
    torch.testing.assert_close(in_place(model, ETA), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_grad_scaler(normalize):
    """p.grad is scale * grad J, so eta is divided by the scale; L is scaled, too; the scaler undoes that."""
    model = reward_model("llama", torch.float32)
    expected = vector(metarm.meta_gradient(model, L_on(D), J_on(S), ETA, normalize=normalize)[0].values())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    theta = vector(model.parameters())
    scaler.scale(J_on(S)(model)).backward()
    with metarm.lookahead(model, ETA if normalize else ETA / scaler.get_scale(), normalize):
        scaler.scale(L_on(D)(model)).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(theta - vector(model.parameters()), expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------ several processes

class Net(torch.nn.Module):
    """A reward model of 7-by-5 numbers, odd sizes so that shards come out uneven."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(5, 7), torch.nn.Linear(7, 5)])
        self.head = torch.nn.Linear(5, 1)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh() if layer(x).shape == x.shape else layer(x).tanh()
        return self.head(x).sum(-1)


def three_steps(model, rank, world, normalize, trap):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        D, S = (torch.randn(12, 5, dtype=torch.float64, generator=g).chunk(world)[rank] for _ in range(2))
        def back_propagate_J(): metarm.difference_loss(model(S).view(-1, K)).backward()
        if trap:
            back_propagate_J()
            try:
                with metarm.lookahead(model, ETA, normalize):
                    model(D)
                    raise KeyError
            except KeyError:
                optimizer.zero_grad()
        back_propagate_J()
        if trap:
            model(D)  # a forward without a backward, as in an evaluation
        with metarm.lookahead(model, ETA, normalize):
            rewards = model(D)
            (-F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()).backward()
            if trap:
                model(D)  # and another
        optimizer.step()
        optimizer.zero_grad()


def one_of_two_processes(rank, meeting_point, both_done):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for normalize in (False, True):
        alone = Net().double()
        three_steps(alone, 0, 1, normalize, trap=False)
        for kind in ("ddp", "fsdp2"):
            for trap in (False, True):
                model = Net().double()
                wrapped = torch.nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
                if kind == "fsdp2":
                    for layer in model.layers:
                        fully_shard(layer, mesh=mesh)
                    fully_shard(model, mesh=mesh)
                with pytest.raises(ValueError, match="lookahead"):
                    metarm.meta_gradient(wrapped, None, None, ETA)
                three_steps(wrapped, rank, 2, normalize, trap)
                for name, p in model.state_dict().items():
                    p = p.full_tensor() if kind == "fsdp2" else p
                    difference = (p - alone.state_dict()[name]).abs().max().item()
                    assert difference < 1e-12, (kind, normalize, trap, name, difference)
        # An error INSIDE the forward leaves FSDP2's root unsharded, at theta'; that must not go unnoticed.
        metarm.difference_loss(model(torch.randn(6, 5).double()).view(-1, K)).backward()
        with pytest.raises(RuntimeError, match="FSDP2"):
            with metarm.lookahead(model, ETA, normalize):
                model(torch.zeros(6, 4, dtype=torch.float64))
    both_done.wait(60)
    os._exit(0)  # no tidy shutdown: gloo's threads now and then abort in it ("terminate called")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ddp_and_fsdp2_equal_one_process(tmp_path):
    both_done = torch.multiprocessing.get_context("spawn").Barrier(2)
    torch.multiprocessing.spawn(one_of_two_processes, (f"{tmp_path}/meeting_point", both_done), nprocs=2)


# ------------------------------------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def files(policy_folder, tmp_path_factory):
    """A policy, 9 pairs of D, 7 prompts of S with K responses each."""
    folder = tmp_path_factory.mktemp("metarm")
    words = ["sorry", "we refund it", "please wait", "a new phone today", "thank you", "no"]
    pairs = [{"prompt": f"Human: order {i}", "chosen": words[i % 6], "rejected": words[(i + 1) % 6]}
             for i in range(9)]
    samples = [{"prompt": f"Human: parcel {i}", "responses": [words[(i + j) % 6] for j in range(K)]}
               for i in range(7)]
    for name, rows in [("pairs", pairs), ("samples", samples)]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    D = f"{folder}/pairs.jsonl"
    return (["--model", policy_folder, "--data", D, "--eval_data", D, "--batch_size", "4", "--epochs", "2",
             "--lr", "1e-3", "--seed", "3"], ["--meta", f"{folder}/samples.jsonl"])


def weights(folder):
    from safetensors.torch import load_file
    return load_file(Path(folder) / "model.safetensors")


def test_without_a_climb_the_command_is_rm_py(files, tmp_path):
    """eta = 0 is Eq. 1: the same head, the same order of D, the same optimizer, so the same weights."""
    import rm
    common, meta = files
    assert rm.main(common + ["--out", f"{tmp_path}/rm"]) == 0
    for order in ("first", "exact"):
        extra = ["--eta", "0", "--meta_batch_size", "3", "--micro_batch_size", "3", "--order", order]
        assert metarm.main(common + meta + extra + ["--out", f"{tmp_path}/{order}"]) == 0
        torch.testing.assert_close(weights(tmp_path / order), weights(tmp_path / "rm"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("order", ["first", "exact"])
def test_the_command_writes_theta_and_theta_prime(files, tmp_path, order, capsys):
    import rm
    from transformers import AutoModelForSequenceClassification
    common, meta = files
    arguments = common + meta + ["--eta", "0.5", "--normalize", "--order", order, "--meta_batch_size", "3",
                                 "--log_every", "2", "--out", f"{tmp_path}/rm",
                                 "--save_adapted", f"{tmp_path}/adapted"]
    assert metarm.main(arguments) == 0
    theta, theta_prime = weights(tmp_path / "rm"), weights(tmp_path / "adapted")
    length = torch.sqrt(sum((theta_prime[name] - p).double().square().sum() for name, p in theta.items()))
    assert length.item() == pytest.approx(0.5, rel=1e-3)
    for folder in ("rm", "adapted"):
        model, tokenizer = rm.load_reward_model(f"{tmp_path}/{folder}")
        assert torch.isfinite(rm.score(model, tokenizer, ["a", "b"], ["c", ""])).all()
        AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
    log = [json.loads(line) for line in open(tmp_path / "rm" / "log.jsonl")]
    assert [row["step"] for row in log] == [0, 1, 2, 3, 4]
    info = {"vanilla_loss_adapted", "difference", "meta_grad_norm", "grad_norm", "moved"}
    looks = {"vanilla_loss", "cosine", "first_order_gain", "difference_adapted", "accuracy"}
    for row in log[:-1]:
        assert info <= set(row) and (looks <= set(row)) == (row["step"] % 2 == 0)
    assert "accuracy" in log[-1]

    # The same command again does nothing; a lost theta' is made again, the same.
    stamp = (tmp_path / "rm" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "adapted").rename(tmp_path / "lost")
    assert metarm.main(arguments) == 0 and "skipped" in capsys.readouterr().out
    assert (tmp_path / "rm" / "model.safetensors").stat().st_mtime_ns == stamp
    torch.testing.assert_close(weights(tmp_path / "adapted"), weights(tmp_path / "lost"), rtol=0, atol=0)


def test_the_command_tells_mistakes_in_one_line(files, tmp_path, capsys):
    common, meta = files
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "responses": ["b"]}\n')
    for extra, told in [(meta + ["--eta", "-1"], "eta"), (meta + ["--eta", "nan"], "eta"),
                        (meta + ["--order", "second"], "order"), (meta + ["--etta", "1"], "--etta"),
                        (meta, "--meta_batch_size"), (["--meta", f"{tmp_path}/no.jsonl"], "no.jsonl"),
                        (["--meta", f"{tmp_path}/one.jsonl"], "k = 1"),
                        (meta + ["--epochs", "0"], "--epochs"),
                        (meta + ["--max_length", "2"], "--max_length")]:
        assert metarm.main(common + extra + ["--out", f"{tmp_path}/rm"]) != 0
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("metarm.py: error:") and told in error
        assert not (tmp_path / "rm").exists()
    # Weights that blow up half-way: nothing is written.
    common = common + meta + ["--meta_batch_size", "3", "--out", f"{tmp_path}/rm"]
    assert metarm.main(common + ["--lr", "1e30"]) != 0 and not (tmp_path / "rm").exists()


def test_the_command_warns_when_the_climb_is_lost_to_rounding(files, tmp_path, capsys):
    common, meta = files
    arguments = common + meta + ["--eta", "1e-12", "--meta_batch_size", "3", "--out", f"{tmp_path}/rm"]
    assert metarm.main(arguments) == 0 and capsys.readouterr().err.count("Eq. 3 changed 0.00%") == 1


def test_metarm_needs_nothing_but_torch():
    tree = ast.parse(Path(metarm.__file__).read_text())
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch"}


# --------------------------------------------------------------------------------------------------- on a GPU

@CUDA
@pytest.mark.parametrize("order", ["first", "exact"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_cuda_equals_cpu_and_runs_under_bf16_autocast(order, architecture):
    def on_gpu(batch): return {key: value.cuda() for key, value in batch.items()}
    model = reward_model(architecture)
    expected = vector(metarm.meta_gradient(model, L_on(D), J_on(S), ETA, order, True)[0].values())
    model.cuda()
    grads, _ = metarm.meta_gradient(model, L_on(on_gpu(D)), J_on(on_gpu(S)), ETA, order, True)
    torch.testing.assert_close(vector(grads.values()).cpu(), expected, rtol=1e-4, atol=1e-5)
    model.float()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        grads, _ = metarm.meta_gradient(model, L_on(on_gpu(D)), J_on(on_gpu(S)), ETA, order, True)
    found = vector(grads.values()).cpu().double()
    assert F.cosine_similarity(found, expected, dim=0) > 0.95
