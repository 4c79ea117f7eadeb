"""metarm.py against independent calculations: loops, closed forms, finite differences."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ARCHITECTURES, make_pairs, vector, write_rows
from safetensors.torch import load_file
from torch.nn.utils import vector_to_parameters
from torch.utils.checkpoint import checkpoint

import metarm
import rm

K, ETA = 3, 0.3
ORDER = ("first", "exact")
ORDERS = pytest.mark.parametrize("order", ORDER)
NORMALIZE = pytest.mark.parametrize("normalize", [False, True])


def reward_model(architecture="gpt2", dtype=torch.float64):
    """A tiny classification model, with weights so large that it is far from linear."""
    config = ARCHITECTURES[architecture](61)
    config.num_labels, config.pad_token_id, config.use_cache = 1, 0, False
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert model.config._attn_implementation == "sdpa"
    for p in model.parameters():
        p.data *= 3 if p.dim() == 2 else 1
    return model.to(dtype).eval()


def tokens(rows, seed):
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


def small_net():  # -> a net, its L, its J
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    x = torch.randn(12, 5)
    losses = [lambda forward: bradley_terry(forward(x).flatten())]
    losses += [lambda forward: metarm.difference_loss(forward(x.flip(0)).view(-1, K))]
    return model, *losses


def parts(batch, n):
    chunks = zip(*(v.chunk(n) for v in batch.values()), strict=True)
    return [dict(zip(batch, chunk, strict=True)) for chunk in chunks]


def slow_difference(rewards):
    total = 0.0
    for row in rewards.tolist():
        for i in range(len(row)):
            for j in range(i + 1, len(row)):
                total += 2 / len(row) ** 2 / (1 + math.exp(-abs(row[i] - row[j])))
    return total / len(rewards)


def trained_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def plain_gradient(model, loss):
    return vector(torch.autograd.grad(loss(model), trained_of(model), materialize_grads=True))


def both_orders_by_differences(model, L, J, normalize, directions):
    """[(d . grad L(theta'), d . d L(theta')/d theta)] of directions d, by central differences."""
    trained, h = trained_of(model), 1e-5
    theta = vector(trained)

    def climbed():  # Eq. 3 from where the model stands
        g = plain_gradient(model, J)
        return vector(trained) + ETA * (g / g.norm() if normalize else g)

    def L_at(values, climb_first):
        vector_to_parameters(values, trained)
        if climb_first:
            vector_to_parameters(climbed(), trained)
        return L(model).item()

    def slope(at, d, climb_first):
        return (L_at(at + h * d, climb_first) - L_at(at - h * d, climb_first)) / (2 * h)

    theta_prime = climbed()
    slopes = [(slope(theta_prime, d, False), slope(theta, d, True)) for d in directions]
    vector_to_parameters(theta, trained)
    return slopes


class Weights(torch.nn.Linear):
    """forward() returns the weights themselves: for losses that can be worked out by hand."""

    def forward(self):
        return self.weight[0]


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


A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)  # L = (w-a)' A (w-a) / 2
B = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)  # J = w' B w / 2 + b' w
a, b = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, -2.0], [0.3, 0.7]))


def L_toy(forward):
    return (forward() - a) @ A @ (forward() - a) / 2


def J_toy(forward):
    return forward() @ B @ forward() / 2 + b @ forward()


@NORMALIZE
@pytest.mark.parametrize("shifts", [[0], [-1, 3, -2]])  # of micro-batches: their mean is the loss
def test_quadratic_in_closed_form(normalize, shifts):
    torch.manual_seed(0)
    model = Weights(2, 1, bias=False, dtype=torch.float64)
    w = model.weight[0].detach().clone()
    g_L, g_J = A @ (w - a), B @ w + b
    step = ETA / (g_J.norm() if normalize else 1)
    climbed = w + step * g_J
    first = A @ (climbed - a)
    u = g_J / g_J.norm()  # a normalised step keeps its length, however grad J grows
    exact = first + step * (B @ (first - (u @ first) * u if normalize else first))
    L, J = L_toy(lambda: w), J_toy(lambda: w)
    L_adapted, J_adapted = L_toy(lambda: climbed), J_toy(lambda: climbed)
    losses = [[lambda f, q=q, c=c: q(f) + c * f() @ f() for c in shifts] for q in (L_toy, J_toy)]
    for order, expected in zip(ORDER, (first, exact), strict=True):
        grads, info = metarm.meta_gradient(model, *losses, ETA, order, normalize)
        torch.testing.assert_close(grads, {"weight": expected[None]}, rtol=1e-12, atol=1e-12)
        want = {"difference": J, "vanilla_loss_adapted": L_adapted}
        want |= {"meta_grad_norm": g_J.norm(), "grad_norm": expected.norm()}
        assert info == pytest.approx({name: float(x) for name, x in want.items()})
        for clip in (None, 0.05):  # Eq. 5: from theta
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            metarm.metarm_step(model, optimizer, *losses, ETA, order, normalize, clip)
            shorter = clip / (expected.norm() + 1e-6) if clip else 1
            torch.testing.assert_close(model.weight[0], w - 0.1 * shorter * expected)
            assert shorter <= 1 and model.weight.grad is None
            model.weight.data[0] = w
    for loss, value, slope in [(losses[0], L, g_L), (losses[1], J, g_J)]:
        found = metarm.gradient(model, loss)
        torch.testing.assert_close(found[0], {"weight": slope[None]}, rtol=1e-12, atol=1e-12)
        assert found[1] == pytest.approx(value.item(), rel=1e-12)
    adapted = metarm.adapted_parameters(model, losses[1], ETA, normalize)
    torch.testing.assert_close(adapted, {"weight": climbed[None]})
    assert not (adapted["weight"].requires_grad or grads["weight"].requires_grad)
    assert torch.equal(model.weight[0], w) and model.weight.grad is None
    gain = step * g_L @ g_J  # Eqs. 6 to 8: L(theta') - L(theta), but for the second order
    torch.testing.assert_close(L_adapted - L, gain + step**2 / 2 * g_J @ A @ g_J)
    want = {"vanilla_loss": L, "first_order_gain": gain, "difference_adapted": J_adapted}
    want |= {"loss_change": L_adapted - L, "cosine": F.cosine_similarity(g_L, g_J, dim=0)}
    want |= {"rise": J_adapted - J, "predicted_rise": step * g_J @ g_J}
    seen = metarm.diagnostics(model, *losses, ETA, normalize)
    assert seen == pytest.approx({name: float(x) for name, x in want.items()})


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "gpt_neox"])
@NORMALIZE
def test_gradients_against_finite_differences(architecture, normalize):
    model = reward_model(architecture)
    for n in model.modules():  # transformers' RMSNorm rounds to float32: too coarse here
        if "RMSNorm" in type(n).__name__:
            n.forward = lambda x, n=n: F.rms_norm(x, x.shape[-1:], n.weight, n.variance_epsilon)
    before, found = vector(model.parameters()), {}
    L, J = [L_on(x) for x in parts(D, 3)], [J_on(x) for x in parts(S, 3)]  # micro-batches
    for order in ORDER:
        grads, info = metarm.meta_gradient(model, L, J, ETA, order, normalize)
        assert list(grads) == [name for name, _ in model.named_parameters()]
        found[order] = vector(grads.values())
    assert torch.equal(vector(model.parameters()), before)
    assert all(p.grad is None for p in model.parameters())
    want = slow_difference(model(**S).logits[:, 0].view(-1, K))
    assert info["difference"] == pytest.approx(want, rel=1e-6)
    gap = found["exact"] - found["first"]
    assert gap.norm() > 0.02 * found["first"].norm()  # or this could not tell the two orders apart
    random = torch.randn(gap.shape, generator=torch.Generator().manual_seed(0)).double()
    directions = [d / d.norm() for d in (found["first"], gap, random)]
    slopes = both_orders_by_differences(model, L_on(D), J_on(S), normalize, directions)
    for d, slope in zip(directions, slopes, strict=True):
        along = [(g @ d).item() for g in found.values()]
        assert along == pytest.approx(slope, rel=1e-5, abs=1e-6)


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
    losses = [lambda forward: forward(torch.arange(6), "only_L").pow(2).mean()]
    losses += [lambda forward: forward(torch.arange(3, 9), "only_J").sigmoid().mean()]

    def places():  # wherever the model holds a parameter: the object, its values
        held = [p for _, p in model.named_parameters(remove_duplicate=False)]
        return [id(p) for p in held], vector(held)

    objects, values = places()
    first, exact = (metarm.meta_gradient(model, *losses, ETA, o, normalize)[0] for o in ORDER)
    adapted = vector(metarm.adapted_parameters(model, losses[1], ETA, normalize).values())
    metarm.diagnostics(model, *losses, ETA, normalize)
    assert places()[0] == objects and torch.equal(places()[1], values)  # theta is back
    names = ["shift", "only_J", "only_L", "none", "embed.weight", "layer.weight", "layer.bias"]
    for grads in (first, exact):  # tied: once; frozen: never
        assert list(grads) == names and grads["none"] == 0 != grads["only_L"]
    assert first["only_J"] == 0 != exact["only_J"]  # it bends the others' theta'
    trained = trained_of(model)
    d = torch.randn(vector(trained).shape, dtype=torch.float64)
    [slopes] = both_orders_by_differences(model, *losses, normalize, [d / d.norm()])
    along = [vector(grads.values()) @ d / d.norm() for grads in (first, exact)]
    assert [x.item() for x in along] == pytest.approx(slopes, rel=1e-6)
    g_J = plain_gradient(model, losses[1])
    step = ETA * (g_J / g_J.norm() if normalize else g_J)
    torch.testing.assert_close(adapted, vector(trained) + step)
    metarm.metarm_step(model, torch.optim.SGD(trained, lr=0.1), *losses, ETA, normalize=normalize)
    assert places()[0] == objects and not torch.equal(places()[1], values)


@ORDERS
@NORMALIZE
def test_no_difference_to_climb_means_theta_stays(order, normalize):
    model = reward_model()
    J = [lambda f: metarm.difference_loss(f(**S).logits[:1, 0].expand(2, K))]  # one, K times
    grads, info = metarm.meta_gradient(model, L_on(D), J, ETA, order, normalize)
    plain = plain_gradient(model, L_on(D))
    torch.testing.assert_close(vector(grads.values()), plain, rtol=1e-9, atol=1e-12)
    assert info["meta_grad_norm"] == 0
    # At a minimum of J the gradient vanishes, its curvature does not: no NaN, no step of 1e12.
    toy = Weights(2, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(toy.weight)
    grads, _ = metarm.meta_gradient(toy, L_toy, lambda f: f() @ B @ f(), ETA, order, True)
    torch.testing.assert_close(grads["weight"][0], -A @ a)


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


@ORDERS
@pytest.mark.parametrize("reentrant", [False, True])
def test_hidden_recomputation_is_refused(order, reentrant):
    """In the backward pass a layer would run again, at theta. (lookahead: test_trainers.py)"""
    model, L, J = small_net()
    once = model[2].forward
    model[2].forward = lambda x: checkpoint(once, x, use_reentrant=reentrant)
    with pytest.raises(ValueError, match="lookahead"):
        metarm.meta_gradient(model, L, J, ETA, order)


@ORDERS
def test_a_loss_that_raises_leaves_no_graph(order):
    model, L, J = small_net()

    def marked(forward):  # J, whose graph holds a token as long as it lives
        def hooked(x):
            rewards, token = forward(x), {1}
            tokens.append(weakref.ref(token))
            rewards.register_hook(lambda grad, held=token: grad)
            return rewards

        return J(hooked)

    for losses in [(L, [marked, {}.__getitem__]), ({}.__getitem__, [marked, marked])]:
        tokens = []
        with pytest.raises(KeyError):
            metarm.metarm_step(model, torch.optim.SGD(model.parameters()), *losses, ETA, order)
        gc.collect()
        assert tokens and all(token() is None for token in tokens)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, torch.nn.InstanceNorm1d])
def test_running_statistics_are_refused_in_train_mode(kind):
    net, L, J = small_net()
    layer = kind(7 if kind is torch.nn.BatchNorm1d else 12, track_running_stats=True)
    model = torch.nn.Sequential(net[0], layer, *net[1:])
    J(model).backward()
    before = vector(layer.buffers())

    optimizer = torch.optim.SGD(model.parameters())
    for call in (
        lambda: metarm.metarm_step(model, optimizer, L, J, ETA),
        lambda: metarm.adapted_parameters(model, J, ETA),
        lambda: metarm.diagnostics(model, L, J, ETA),
        lambda: metarm.lookahead(model, ETA).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"model.eval\(\)"):
            call()
    metarm.metarm_step(model.eval(), optimizer, L, J, ETA)
    assert torch.equal(vector(layer.buffers()), before)


def test_compiled_models_and_sparse_gradients():
    model, L, J = small_net()
    expected, _ = metarm.meta_gradient(model, L, J, ETA)
    model[2] = torch.compile(model[2], backend="aot_eager")
    found, _ = metarm.meta_gradient(model, L, J, ETA)
    torch.testing.assert_close(list(found.values()), list(expected.values()))
    with pytest.raises(ValueError, match="order='first'"):
        metarm.meta_gradient(model, L, J, ETA, "exact")
    model[0] = torch.nn.Embedding(9, 7, sparse=True)
    with pytest.raises(ValueError, match="sparse=False"):
        metarm.gradient(model, lambda forward: forward(torch.arange(6)).sum())


def test_lookahead_restores_bit_for_bit_even_after_an_exception():
    model = reward_model("llama", torch.bfloat16)
    before = vector(model.parameters())
    J_on(S)(model).backward()
    step = 0.05 * vector(p.grad for p in model.parameters())
    with pytest.raises(ValueError, match="eta must be"):
        metarm.lookahead(model, math.nan).__enter__()
    with pytest.raises(KeyError), metarm.lookahead(model, 0.05):
        assert all(p.grad is None for p in model.parameters())
        assert not torch.equal(vector(model.parameters()), before)
        raise KeyError
    assert torch.equal(vector(model.parameters()), before)
    assert not torch.equal(before + step - step, before)  # what subtracting would have left
    with pytest.raises(ValueError, match="back-propagate J"):
        metarm.lookahead(model, 0.1).__enter__()
    J_on(S)(model).backward()
    with pytest.raises(RuntimeError, match="step after"), metarm.lookahead(model, 0.05):
        torch.optim.SGD(model.parameters(), lr=0.0).step(lambda: J_on(S)(model).backward())


def test_half_precision():
    """bf16 weights do not feel a small eta; sums are made in float32 and rounded once."""
    for dtype, low, high in [(torch.bfloat16, 0, 0.01), (torch.float32, 0.3, 1)]:
        model = reward_model("llama", dtype)
        adapted = metarm.adapted_parameters(model, J_on(S), 5e-6)
        changed = vector(adapted.values()) != vector(model.parameters())
        assert low <= changed.double().mean() <= high
    bf16, fp16 = torch.ones(10, dtype=torch.bfloat16), torch.ones(10, dtype=torch.float16)
    assert metarm.plus(bf16, torch.tensor(1 + 2**-12), bf16 / 256)[0] == 1 + 2**-7
    assert metarm.plus(fp16, torch.tensor(1e5), 1e-5 * fp16)[0] == pytest.approx(2, rel=1e-3)
    assert metarm.global_norm([3e4 * fp16]).item() == pytest.approx(3e4 * math.sqrt(10), rel=1e-3)


def test_one_autocast_region_round_everything(monkeypatch):
    """autocast caches bf16 copies of the weights, and L must not run on those of theta."""
    model = reward_model("llama", torch.float32)

    def run(cache):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            J_on(S)(model).backward()
            with metarm.lookahead(model, 0.5, normalize=True):
                L = L_on(D)(model)
                L.backward()
            after = L_on(D)(model)  # and after it not on those of theta'
        gradient = vector(p.grad for p in model.parameters())
        model.zero_grad()
        return gradient, L.item(), after.item()

    expected, found = run(cache=False), run(cache=True)
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:] and found[1] != found[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads, info = metarm.meta_gradient(model, L_on(D), J_on(S), 0.5, normalize=True)
    assert (vector(grads.values()) - expected[0]).norm() < 0.02 * expected[0].norm()
    assert info["vanilla_loss_adapted"] == pytest.approx(expected[1], rel=1e-3)
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)  # the trap is real:
    assert (run(cache=True)[0] - expected[0]).norm() > 0.05 * expected[0].norm()


@NORMALIZE
@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(normalize, overflow):
    """p.grad is scale * grad J, so divide eta by the scale. An overflow in it skips the step."""
    model, L, J = small_net()
    expected, _ = metarm.meta_gradient(model, L, J, ETA, normalize=normalize)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    theta = vector(model.parameters())
    scaler.scale(J(model)).backward()
    if overflow:  # one infinite entry ahead of a tanh, which would turn it into a finite loss
        model[0].weight.grad[0, 0] = math.inf
        with pytest.raises(metarm.NotFinite, match="grad_J is nan"):
            with metarm.lookahead(model, ETA, normalize):  # no scaler is said to follow
                raise AssertionError("the model has been moved")
    eta = ETA if normalize else ETA / scaler.get_scale()
    with metarm.lookahead(model, eta, normalize, scaler_follows=True):
        scaler.scale(L(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    step = torch.zeros_like(theta) if overflow else vector(expected.values())
    torch.testing.assert_close(theta - vector(model.parameters()), step, rtol=1e-4, atol=1e-6)
    assert (scaler.get_scale() < 1024.0) == overflow


def test_micro_batches_of_unequal_size_keep_the_mean():
    losses = metarm.micro_batches(lambda forward, groups: sum(groups) / len(groups), [*range(7)], 3)
    assert len(losses) == 3 and sum(loss(None) for loss in losses) / 3 == pytest.approx(3.0)


def test_without_a_climb_the_command_is_rm_py(policy_folder, tmp_path, monkeypatch, capsys):
    D, S = make_pairs(9), [{"prompt": str(i), "responses": [" a", " b", f" {i}"]} for i in range(7)]
    D, S = write_rows(tmp_path / "D.jsonl", D), write_rows(tmp_path / "S.jsonl", S)
    common = f"--model {policy_folder} --data {D} --batch_size 4 --epochs 2 --lr 1e-3 --seed 3"
    assert rm.main(f"{common} --out {tmp_path}/rm".split()) == 0
    expected = load_file(tmp_path / "rm/model.safetensors")
    step, cut = metarm.metarm_step, metarm.micro_batches
    calls, drawn = [], []

    def spy(*args):
        drawn.extend(str(prompt) for prompt in args[1] if len(prompt) == 3)  # k
        return cut(*args)

    monkeypatch.setattr(metarm, "metarm_step", lambda *x: calls.append(x[4:]) or step(*x))
    monkeypatch.setattr(metarm, "micro_batches", spy)
    for order in ORDER:
        extra = f"--meta {S} --meta_batch_size 3 --micro_batch_size 3 --eta 0 --order {order}"
        assert metarm.main(f"{common} {extra} --out {tmp_path}/{order}".split()) == 0
        found = load_file(tmp_path / order / "model.safetensors")
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        assert calls[-1][1] == order
    assert len(set(drawn[:6])) == 6  # S goes on where the step before stopped
    for flag, eta in [("--normalize", metarm.DEFAULT_LENGTH), ("--no-normalize", 1e-3)]:
        extra = f"--meta {S} --meta_batch_size 3 {flag} --out {tmp_path}/{flag}"
        assert metarm.main(f"{common} {extra}".split()) == 0
        assert calls[-1] == (eta, "first", flag == "--normalize", 1.0)
    capsys.readouterr()
    for eta, warnings in [(1e-3, 0), (20, 1)]:  # too long a climb is told once
        extra = f"--meta {S} --meta_batch_size 3 --log_every 1 --eta {eta} --out {tmp_path}/{eta}"
        assert metarm.main(f"{common} {extra}".split()) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert len(said) == warnings and all(f"lower --eta {eta}" in line for line in said)


@pytest.mark.cuda
@ORDERS
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_cuda_equals_cpu_and_runs_under_bf16_autocast(order, architecture):
    model = reward_model(architecture)

    def gradient(device):
        L, J = (on({k: v.to(device) for k, v in x.items()}) for on, x in [(L_on, D), (J_on, S)])
        grads, _ = metarm.meta_gradient(model.to(device), L, J, ETA, order, normalize=True)
        return vector(grads.values()).cpu().double()

    expected = gradient("cpu")
    torch.testing.assert_close(gradient("cuda"), expected, rtol=1e-4, atol=1e-5)
    model.float()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert F.cosine_similarity(gradient("cuda"), expected, dim=0) > 0.95
