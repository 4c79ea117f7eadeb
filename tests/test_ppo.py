"""ppo.py against plain loops, closed forms and transformers' own loss."""

import json
import math
import random

import pytest
import torch

import data
import ppo
import rm
from conftest import ARCHITECTURES, make_policy


@pytest.fixture
def ragged():
    """b = 4 responses of 5, 3, 1 and 0 tokens, float64, with garbage off the mask."""
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    tensors = [torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(3)]
    return mask, [torch.where(mask.bool(), x, 1e30) for x in tensors]


def test_kl_penalised_rewards_against_a_loop(ragged):
    mask, (logprobs, ref, _) = ragged
    scores = torch.tensor([1.0, -2.0, 3.0, 9.0], dtype=torch.float64)
    rewards = ppo.kl_penalised_rewards(scores, logprobs, ref, mask, 0.3)
    for i, length in enumerate([5, 3, 1, 0]):
        for t in range(5):
            want = -0.3 * (logprobs[i, t] - ref[i, t]).item() if t < length else 0.0
            want += scores[i].item() if t == length - 1 else 0.0
            assert rewards[i, t].item() == pytest.approx(want, abs=1e-12)


def test_gae_against_its_definition(ragged):
    mask, (rewards, values, _) = ragged
    gamma, lam = 0.9, 0.8
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for i, length in enumerate([5, 3, 1, 0]):
        v = values[i, :length].tolist() + [0.0]
        deltas = [rewards[i, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(5):  # the definition: a sum over all later deltas, not a recursion
            want = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
            assert advantages[i, t].item() == pytest.approx(want, abs=1e-12)
            assert returns[i, t].item() == pytest.approx(want + v[t] if t < length else 0.0, abs=1e-12)


def test_gae_with_gamma_and_lambda_one_returns_the_reward_to_go(ragged):
    mask, (rewards, values, _) = ragged
    _, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    for i, length in enumerate([5, 3, 1, 0]):
        for t in range(length):
            assert returns[i, t].item() == pytest.approx(rewards[i, t:length].sum().item())


def test_gae_ignores_infinite_values_off_the_mask():
    mask = torch.tensor([[1, 1, 0]])
    rewards, values = torch.tensor([[0.0, 1.0, math.nan]]), torch.tensor([[0.5, 0.25, math.inf]])
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    assert advantages.tolist() == [[0.5, 0.75, 0.0]] and returns.tolist() == [[1.0, 1.0, 0.0]]


def test_policy_loss_against_a_loop_and_its_clipping():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    old = torch.zeros(2, 3, dtype=torch.float64)
    new = torch.tensor([[0.5, -0.5, 0.05], [0.1, 50.0, 50.0]], dtype=torch.float64, requires_grad=True)
    adv = torch.tensor([[1.0, 1.0, -2.0], [-1.0, 7.0, 7.0]], dtype=torch.float64)
    loss = ppo.policy_loss(new, old, adv, mask, 0.2)
    terms = []
    for i, t in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        ratio, a = math.exp(new[i, t].item()), adv[i, t].item()
        terms.append(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
    assert loss.item() == pytest.approx(sum(terms) / 4)
    loss.backward()
    assert new.grad[0, 0] == 0  # moved past 1 + eps the way its advantage asked for: no further push
    assert new.grad[0, 1] != 0  # moved AGAINST its advantage: pulled back however far it is
    assert (new.grad[1, 1:] == 0).all()


def test_value_loss_against_a_loop():
    mask = torch.tensor([[1, 1, 0]])
    values, old, returns = (torch.tensor([x]) for x in ([3.0, 0.1, 9.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]))
    want = 0.5 * (max((3.0 - 1) ** 2, (0.8 - 1) ** 2) + (0.1 - 1) ** 2) / 2
    assert ppo.value_loss(values, old, returns, mask, 0.8).item() == pytest.approx(want)


def test_dpo_loss_closed_form_and_untrained_value():
    x = torch.zeros(3)
    assert ppo.dpo_loss(x, x, x, x, 0.1).item() == pytest.approx(math.log(2))
    a, b, c, d = (torch.tensor([v]) for v in (-3.0, -5.0, -4.0, -4.5))
    want = -math.log(1 / (1 + math.exp(-0.5 * ((-3 + 4) - (-5 + 4.5)))))
    assert ppo.dpo_loss(a, b, c, d, 0.5).item() == pytest.approx(want)


def test_whiten():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    x = torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]])
    w = ppo.whiten(x, mask)
    inside = w[mask.bool()]
    assert inside.mean().abs() < 1e-6 and inside.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (w[1, 1:] == 0).all()


@pytest.mark.parametrize("call", [
    lambda x, y: ppo.gae(x, y, x, 1.0, 1.0), lambda x, y: ppo.policy_loss(x, x, y, x, 0.2),
    lambda x, y: ppo.value_loss(x, y, x, x, 0.2), lambda x, y: ppo.kl_penalised_rewards(torch.zeros(2), x, y, x, 0.1),
    lambda x, y: ppo.kl_penalised_rewards(torch.zeros(3), x, x, x, 0.1),
    lambda x, y: ppo.dpo_loss(x[0], x[0], x[0], y[0], 0.1)])
def test_wrong_shapes_are_value_errors(call):
    with pytest.raises(ValueError, match="shape"):
        call(torch.ones(2, 3), torch.ones(2, 4))


# ------------------------------------------------------------------------------------------------ models on disk

@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_do_not_depend_on_padding_or_company(tmp_path, architecture):
    """Each row alone, unpadded, through the bare model = the row inside a left- and right-padded batch."""
    model, tokenizer = ppo.load_policy(make_policy(tmp_path / "m", architecture))
    rows = [rm.encode(tokenizer, x, y) for x, y in
            [("Human: my phone is broken", " Sorry."), ("Human: help", " we will send a new phone today"), ("Human: a b", "")]]
    batch = ppo.collate(tokenizer, rows)
    together = ppo.response_logprobs(model, batch, temperature=0.7)
    for i, (a, b) in enumerate(rows):
        logits = model(torch.tensor([a + b])).logits[0].float() / 0.7
        alone = logits.log_softmax(-1)[range(len(a) - 1, len(a + b) - 1), b]
        assert torch.allclose(together[i, :len(b)], alone, atol=1e-4)
        assert (together[i, len(b):] == 0).all()


def test_sampling_follows_the_models_own_probabilities(policy_folder):
    """First tokens of 4,000 samples at temperature 0.7 against softmax(logits / 0.7); top_k 50 or a penalty would show."""
    model, tokenizer = ppo.load_policy(policy_folder)
    with torch.no_grad():
        model.lm_head.weight *= 12  # a peaked distribution is told apart with fewer samples
    ids = rm.encode(tokenizer, "Human: my phone is broken", "")[0]
    torch.manual_seed(0)
    rows = ppo.generate(model, tokenizer, [ids] * 4000, 1, 0.7)
    counts = torch.bincount(torch.tensor([row[0] for row in rows]), minlength=model.config.vocab_size) / 4000
    with torch.no_grad():
        want = (model(torch.tensor([ids])).logits[0, -1] / 0.7).softmax(-1)
    assert 0.5 * (counts - want).abs().sum() < 0.15
    assert (counts - want).abs().max() < 0.03


def test_a_hub_configs_own_sampling_settings_are_not_inherited(tmp_path):
    folder = make_policy(tmp_path / "m")
    transformers_config = json.loads((tmp_path / "m/generation_config.json").read_text())
    transformers_config |= {"top_k": 1, "do_sample": True, "repetition_penalty": 5.0, "min_new_tokens": 30}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(transformers_config))
    model, tokenizer = ppo.load_policy(folder)
    torch.manual_seed(0)
    ids = rm.encode(tokenizer, "Human: help", "")[0]
    assert len({tuple(row) for row in ppo.generate(model, tokenizer, [ids] * 8, 3, 1.0)}) > 1


def test_sample_responses_is_seeded_and_keeps_the_order(policy_folder):
    model, tokenizer = ppo.load_policy(policy_folder)
    prompts = ["Human: help", "Human: my phone is broken, please help. the parcel is late", "Human: a"]
    first = ppo.sample_responses(model, tokenizer, prompts, 3, max_new_tokens=6, seed=5)
    assert [len(ys) for ys in first] == [3, 3, 3]
    assert first == ppo.sample_responses(model, tokenizer, prompts, 3, max_new_tokens=6, seed=5)
    assert first != ppo.sample_responses(model, tokenizer, prompts, 3, max_new_tokens=6, seed=6)
    with pytest.raises(ValueError, match="positions"):
        ppo.sample_responses(model, tokenizer, ["the parcel is late " * 100], 2, max_new_tokens=6)


def test_critic_starts_at_zero_and_sees_only_the_past(policy_folder):
    policy, tokenizer = ppo.load_policy(policy_folder)
    critic = ppo.Critic(policy_folder)
    rows = [rm.encode(tokenizer, "Human: help", y) for y in (" Sorry, we refund", " Sorry, we will")]
    batch = ppo.collate(tokenizer, rows)
    assert (critic(batch) == 0).all() and critic(batch).shape == batch["mask"].shape
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    values = critic(batch)
    same = next(i for i, (a, b) in enumerate(zip(rows[0][1], rows[1][1])) if a != b)
    assert torch.allclose(values[0, :same + 1], values[1, :same + 1], atol=1e-6)  # V at `same` is before that token
    assert not torch.allclose(values[0, same + 1], values[1, same + 1], atol=1e-6)


def write_rows(path, rows):
    data.write_jsonl(path, rows)
    return str(path)


@pytest.fixture(scope="module")
def little_world(tmp_path_factory):
    """A policy, preference pairs, prompts and a reward model with ANOTHER tokenizer (text goes between them)."""
    root = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    words = "sorry we refund the phone today please thank you parcel late broken invoice".split()
    prompts = [f"\n\nHuman: my {rng.choice(words)} is {rng.choice(words)} {i}\n\nAssistant:" for i in range(40)]
    pairs = [{"prompt": x, "chosen": " thank you " + rng.choice(words), "rejected": " " + rng.choice(words)} for x in prompts]
    make_policy(root / "policy"), make_policy(root / "rm-base", "gpt2", bos="<bos>", pad=None)
    write_rows(root / "pairs.jsonl", pairs), write_rows(root / "prompts.jsonl", [{"prompt": x} for x in prompts])
    assert rm.main(["--model", f"{root}/rm-base", "--data", f"{root}/pairs.jsonl", "--eval_data", f"{root}/pairs.jsonl",
                    "--out", f"{root}/rm", "--lr", "1e-3", "--batch_size", "8", "--epochs", "4"]) == 0
    return root


PPO_FLAGS = ["--steps", "3", "--batch_size", "16", "--minibatch_size", "8", "--max_new_tokens", "8", "--scale_prompts", "8",
             "--lr", "1e-3", "--critic_lr", "1e-3"]


def test_every_mode_end_to_end(little_world, capsys):
    w = little_world
    assert ppo.main(["sft", "--model", f"{w}/policy", "--data", f"{w}/pairs.jsonl", "--out", f"{w}/sft", "--lr", "1e-3",
                     "--batch_size", "8", "--epochs", "3"]) == 0
    assert ppo.main(["dpo", "--model", f"{w}/sft", "--data", f"{w}/pairs.jsonl", "--out", f"{w}/dpo", "--lr", "1e-3",
                     "--batch_size", "8"]) == 0
    assert ppo.main(["ppo", "--model", f"{w}/sft", "--reward_model", f"{w}/rm", "--prompts", f"{w}/prompts.jsonl",
                     "--out", f"{w}/ppo", *PPO_FLAGS]) == 0
    assert ppo.main(["sample", "--model", f"{w}/ppo", "--prompts", f"{w}/prompts.jsonl", "--k", "3", "--out", f"{w}/s",
                     "--max_new_tokens", "8"]) == 0
    assert len(data.read_meta(w / "s/samples.jsonl")) == 40
    log = data.read_jsonl(w / "ppo/log.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2] and abs(log[0]["objective/kl"]) < 1e-3 < log[2]["objective/kl"]
    for name in ("policy/clipfrac_avg", "policy/approxkl_avg", "val/clipfrac_avg", "objective/scores"):
        assert name in log[0]
    rollouts = data.read_jsonl(w / "ppo/rollouts.jsonl")
    assert len(rollouts[0]["prompts"]) == 4 and len(rollouts[0]["responses"][0]) == len(rollouts[0]["scores"][0]) == 4
    for folder in ("sft", "dpo", "ppo"):
        ppo.load_policy(str(w / folder))
    before = capsys.readouterr()
    assert ppo.main(["dpo", "--model", f"{w}/sft", "--data", f"{w}/pairs.jsonl", "--out", f"{w}/dpo", "--lr", "1e-2",
                     "--batch_size", "8"]) != 0  # finished with another option: noticed
    assert "lr" in capsys.readouterr().err


def test_ppo_is_reproducible_and_micro_batches_change_nothing(little_world):
    w = little_world
    flags = ["--model", f"{w}/policy", "--reward_model", f"{w}/rm", "--prompts", f"{w}/prompts.jsonl", *PPO_FLAGS]
    for name, extra in (("a", []), ("b", []), ("c", ["--micro_batch_size", "3"])):
        assert ppo.main(["ppo", *flags, "--out", f"{w}/again-{name}", *extra]) == 0
    a, b, c = (ppo.load_policy(f"{w}/again-{name}")[0].state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.allclose(a[name], c[name], atol=2e-4) for name in a)


def test_ppo_raises_the_reward(little_world):
    """Rewarded for being short (a stand-in RM), the policy gets shorter: the whole loop pulls the right way."""
    w = little_world
    original = rm.score
    rm.score = lambda model, tokenizer, prompts, responses, batch_size=64: -torch.tensor([float(len(y)) for y in responses])
    try:
        assert ppo.main(["ppo", "--model", f"{w}/policy", "--reward_model", f"{w}/rm", "--prompts", f"{w}/prompts.jsonl",
                         "--out", f"{w}/short", "--steps", "20", "--batch_size", "32", "--minibatch_size", "16",
                         "--max_new_tokens", "12", "--scale_prompts", "8", "--lr", "4e-3", "--critic_lr", "4e-3",
                         "--missing_eos_penalty", "0", "--kl_coef", "0"]) == 0
    finally:
        rm.score = original
    log = data.read_jsonl(w / "short/log.jsonl")
    assert log[-1]["objective/raw_scores"] > log[0]["objective/raw_scores"] + 5


def test_mistakes_get_one_line(little_world, capsys, tmp_path):
    w = little_world
    for argv, word in [
            (["ppo", "--model", f"{w}/policy", "--out", f"{tmp_path}/x", "--reward_model", f"{w}/rm"], "--prompts"),
            (["ppo", "--model", f"{w}/rm", "--out", f"{tmp_path}/x", "--reward_model", f"{w}/rm", "--prompts",
              f"{w}/prompts.jsonl"], "causal"),
            (["ppo", "--model", f"{w}/policy", "--out", f"{tmp_path}/x", "--reward_model", f"{w}/policy", "--prompts",
              f"{w}/prompts.jsonl"], "reward head"),
            (["sample", "--model", f"{w}/nowhere", "--out", f"{tmp_path}/x", "--prompts", f"{w}/prompts.jsonl"], "nowhere"),
            (["sample", "--model", f"{w}/policy", "--out", f"{tmp_path}/x", "--prompts", f"{w}/prompts.jsonl", "--k", "0"],
             "--k"),
            (["sing", "--model", f"{w}/policy"], "sft"),
    ]:
        assert ppo.main(argv) != 0
        err = capsys.readouterr().err
        assert word in err and "Traceback" not in err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollouts_that_share_a_prompt_read_as_those_that_do_not(tmp_path, architecture, monkeypatch):
    """Log-probabilities, values and their gradients; three prompts of unequal length, in any order of rows."""
    policy, tokenizer = ppo.load_policy(make_policy(tmp_path / "m", architecture))
    critic = ppo.Critic(tmp_path / "m")
    torch.nn.init.normal_(critic.head.weight)
    prompts, responses = ["my phone", "where is the parcel of my boss", "a"], [" Sorry", "", " we refund it today", " a b"]
    rows = [rm.encode(tokenizer, prompt, response) for response in responses for prompt in prompts]
    batch, results = ppo.collate(tokenizer, rows), []
    for share in (set(), rm.SHARE_PROMPTS):
        monkeypatch.setattr(rm, "SHARE_PROMPTS", share)
        assert rm.shares_prompts(policy) == rm.shares_prompts(critic.trunk) == bool(share)
        logprobs, values = ppo.response_logprobs(policy, batch), critic(batch)
        results.append([logprobs.detach(), (values * batch["mask"]).detach()])
        for model, out in ((policy, logprobs), (critic, values * batch["mask"])):
            model.zero_grad()
            (out * torch.arange(out.numel()).view(out.shape) / 50).sum().backward()
            results[-1] += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for plain, shared in zip(*results):
        torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-4 * max(1, plain.abs().max().item()))
    assert results[0][0].abs().max() > 1 and len(results[0]) == len(results[1]) > 10
