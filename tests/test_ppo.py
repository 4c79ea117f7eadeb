"""ppo.py: losses against loops and closed forms, sampling against probabilities, every mode."""

import json
import math
import re
from types import SimpleNamespace

import conftest
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_policy, make_tokenizer, save, write_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import data
import ppo
import rm

LENGTHS = [5, 3, 1, 0]


@pytest.fixture
def ragged():
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in LENGTHS])
    tensors = [torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(2)]
    return mask, [torch.where(mask.bool(), x, math.nan) for x in tensors]


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 1.0)])
def test_rewards_and_gae_against_their_definitions(ragged, gamma, lam):
    mask, (x, y) = ragged
    scores = torch.tensor([1.0, -2.0, 3.0, 9.0], dtype=torch.float64)
    rewards = ppo.kl_penalised_rewards(scores, x, y, mask, 0.3)
    advantages, returns = ppo.gae(x, y, mask, gamma, lam)
    for i, length in enumerate(LENGTHS):
        want = [-0.3 * (x[i, t] - y[i, t]).item() for t in range(length)]
        want[-1:] = [last + scores[i].item() for last in want[-1:]]
        assert rewards[i].tolist() == pytest.approx(want + [0.0] * (5 - length), abs=1e-12)
        r, v = x[i, :length].tolist(), y[i, :length].tolist() + [0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        sums = [sum((gamma * lam) ** s * d for s, d in enumerate(deltas[t:])) for t in range(5)]
        assert advantages[i].tolist() == pytest.approx(sums, abs=1e-12)
        want = [sums[t] + v[t] if t < length else 0.0 for t in range(5)]
        if gamma == lam == 1:  # the reward to go
            want = [sum(r[t:]) for t in range(5)]
        assert returns[i].tolist() == pytest.approx(want, abs=1e-12)


def test_policy_loss_against_a_loop_and_its_clipping():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    old = torch.zeros(2, 3, dtype=torch.float64)
    new = torch.tensor([[0.5, -0.5, 0.05], [0.1, 50.0, 50.0]], dtype=torch.float64)
    new.requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -2.0], [-1.0, 7.0, 7.0]], dtype=torch.float64)
    loss = ppo.policy_loss(new, old, advantages, mask, 0.2)
    terms = []
    for x, a in [(0.5, 1.0), (-0.5, 1.0), (0.05, -2.0), (0.1, -1.0)]:
        terms.append(-min(math.exp(x) * a, min(max(math.exp(x), 0.8), 1.2) * a))
    assert loss.item() == pytest.approx(sum(terms) / 4)
    loss.backward()
    assert new.grad[0, 0] == 0  # past 1 + eps the way its advantage asked for: no further push
    assert new.grad[0, 1] != 0  # it moved AGAINST its advantage: pulled back however far it is
    assert (new.grad[1, 1:] == 0).all()


def test_value_loss_dpo_loss_and_whitening_in_closed_form():
    mask, old = torch.tensor([[1, 1, 0]]), torch.zeros(1, 3)
    want = 0.5 * (max((3.0 - 1) ** 2, (0.8 - 1) ** 2) + (0.1 - 1) ** 2) / 2
    got = ppo.value_loss(torch.tensor([[3.0, 0.1, 9.0]]), old, torch.ones(1, 3), mask, 0.8)
    assert got.item() == pytest.approx(want)
    x = torch.zeros(3)
    assert ppo.dpo_loss(x, x, x, x, 0.1).item() == pytest.approx(math.log(2))  # untrained
    logps = (torch.tensor([v]) for v in (-3.0, -5.0, -4.0, -4.5))
    want = math.log(1 + math.exp(-0.5 * ((-3 + 4) - (-5 + 4.5))))
    assert ppo.dpo_loss(*logps, 0.5).item() == pytest.approx(want)
    white = ppo.whiten(torch.tensor([[1.0, 3.0, 99.0]]), mask)
    assert white[0].tolist() == pytest.approx([-1, 1, 0], abs=1e-5)


def test_wrong_shapes_are_value_errors():
    x, y = torch.ones(2, 3), torch.ones(2, 4)
    calls = [(ppo.gae, x, y, x, 1.0, 1.0), (ppo.policy_loss, x, x, y, x, 0.2)]
    calls += [(ppo.value_loss, x, y, x, x, 0.2), (ppo.dpo_loss, x[0], x[0], x[0], y[0], 0.1)]
    calls += [(ppo.dpo_loss, x, x, x, x, 0.1), (ppo.kl_penalised_rewards, x[0], x, x, x, 0.1)]
    calls += [(ppo.kl_penalised_rewards, x[:, 0], x, y, x, 0.1)]
    for function, *arguments in calls:
        with pytest.raises(ValueError, match="shape"):
            function(*arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_do_not_depend_on_padding_or_company(tmp_path, architecture):
    """In a padded batch, with and without reading shared prompts once: each row's own answers."""
    policy, tokenizer = ppo.load_policy(make_policy(tmp_path / "m", architecture))
    critic = ppo.Critic(policy)
    assert policy.shares_prompts and critic.trunk.shares_prompts
    torch.nn.init.normal_(critic.head.weight)
    prompts = ["my phone", "where is the parcel of my boss", "a", "b"]
    responses = [" Sorry", "", " we refund it today", " a b"]
    rows = [rm.encode(tokenizer, x, y) for y in responses for x in prompts]
    batch, results = ppo.policy_batch(tokenizer, rows), []
    for share in (False, True):
        policy.shares_prompts = critic.trunk.shares_prompts = share
        outputs = [ppo.response_logprobs(policy, batch, 0.7), critic(batch) * batch["mask"]]
        results.append([x.detach() for x in outputs])
        for model, out in zip((policy, critic), outputs, strict=True):
            model.zero_grad()
            (out * torch.arange(out.numel()).view(out.shape) / 50).sum().backward()
            results[-1] += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert results[0][0].abs().max() > 1 and len(results[0]) > 10
    for plain, shared in zip(*results, strict=True):
        atol = 1e-4 * max(1, plain.abs().max().item())
        torch.testing.assert_close(shared, plain, rtol=1e-4, atol=atol)
    short = [i for i, (prompt, _) in enumerate(rows) if len(prompt) == 1]
    got = ppo.response_logprobs(policy, ppo.policy_batch(tokenizer, [rows[i] for i in short]), 0.7)
    torch.testing.assert_close(got, results[0][0][short], rtol=1e-4, atol=1e-4)
    assert len(short) == 8  # of these, nothing is left of a prompt before its last token
    for (a, b), got in zip(rows, results[0][0], strict=True):
        logits = policy(torch.tensor([a + b])).logits[0].float() / 0.7
        alone = logits.log_softmax(-1)[range(len(a) - 1, len(a + b) - 1), b]
        assert torch.allclose(got[: len(b)], alone, atol=1e-4) and (got[len(b) :] == 0).all()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "mamba"])
def test_generate_says_what_transformers_says(tmp_path, architecture):
    """At a temperature near 0, row by row. Rows that end leave the batch; a prompt is read once."""
    model, tokenizer = ppo.load_policy(make_policy(tmp_path, architecture))
    assert model.can_cache == (architecture != "mamba")  # it is given all tokens again
    for p in model.parameters():
        p.data *= 4  # else one token is said again and again
    prompts = ["Human: help", "Human: my phone is broken, please help. it is late", "Human: help"]
    ids = [rm.encode(tokenizer, prompt, "")[0] for prompt in prompts]
    for penalty in (1.0, 1.5):
        model.generation_config.eos_token_id = None
        options = (20, 1e-6, 0.9, penalty)
        longest = max(ppo.generate(model, tokenizer, ids, *options), key=len)
        model.generation_config.eos_token_id = longest[7]
        said = ppo.generate(model, tokenizer, ids, *options)
        assert min(map(len, said)) <= 8 and said[0] == said[2]
        plain = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": penalty}
        plain |= {"eos_token_id": ppo.end_ids(model, tokenizer), "pad_token_id": 0}
        for row, response in zip(ids, said, strict=True):
            row = torch.tensor([row])
            whole = model.generate(row, attention_mask=torch.ones_like(row), **plain)
            assert response == whole[0, row.shape[1] :].tolist()


def test_sample_tokens_against_the_distribution(policy_folder):
    probabilities = torch.tensor([0.5, 0.04, 0.3, 0.16])
    torch.manual_seed(0)
    for top_p, want in ((1.0, [0.5, 0.04, 0.3, 0.16]), (0.7, [0.625, 0, 0.375, 0])):
        tokens = ppo.sample_tokens(probabilities.log().expand(20_000, 4), top_p)
        shares = tokens.flatten().bincount(minlength=4) / 20_000
        assert torch.allclose(shares, torch.tensor(want), atol=0.012)  # 3.4 standard errors
        assert (shares[torch.tensor(want) == 0] == 0).all()
    for top_p in (1.0, 0.7):  # a row of NaN is told from the others
        tokens = ppo.sample_tokens(torch.tensor([[0.0, -99.0], [0.0, math.nan]]), top_p)
        assert tokens.tolist() == [[0], [-1]]
    model, tokenizer = ppo.load_policy(policy_folder)
    model.lm_head.weight.data[7, 0] = math.nan
    with pytest.raises(data.Mistake, match="NaN.*lower the --lr"):
        ppo.generate(model, tokenizer, [[3], [4]], 2, 1.0)


def test_sample_responses_is_seeded_and_keeps_the_order(policy_folder):
    model, tokenizer = ppo.load_policy(policy_folder)
    prompts = ["Human: help", "Human: my phone is broken, please help. it is late", "Human: a"]
    options = {"k": 3, "max_new_tokens": 6}
    seeds = (5, 5, 6)
    a, b, c = (ppo.sample_responses(model, tokenizer, prompts, seed=x, **options) for x in seeds)
    assert a == b != c and [len(ys) for ys in a] == [3, 3, 3]
    with torch.no_grad():  # a policy that repeats its last token answers each prompt with that
        model.lm_head.weight.copy_(100 * model.model.embed_tokens.weight)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    said = ppo.sample_responses(model, tokenizer, prompts, batch_size=2, **options)
    for prompt, ys in zip(prompts, said, strict=True):
        last = tokenizer.decode(rm.encode(tokenizer, prompt, "")[0][-1:])
        assert ys == [last * 6] * 3


def with_settings(folder, **settings) -> str:
    make_policy(folder)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_the_models_generation_settings_are_saved_and_only_its_ends_are_used(tmp_path):
    settings = {"top_k": 1, "do_sample": True, "repetition_penalty": 5.0, "min_new_tokens": 3}
    settings |= {"eos_token_id": [0, 300, 301], "suppress_tokens": list(range(1, 300))}
    model, tokenizer = ppo.load_policy(with_settings(tmp_path / "m", **settings))
    prompts, ends = [rm.encode(tokenizer, "Human: help", "")[0]] * 300, {0, 300, 301}
    torch.manual_seed(0)
    said = ppo.generate(model, tokenizer, prompts, 60, 1.0)
    assert len({tuple(row) for row in said}) > 150  # top_k 1 would leave one
    assert any(len(row) < 3 for row in said)  # min_new_tokens would leave none
    assert {token for row in said for token in row} & set(range(1, 300))
    assert {row[-1] for row in said} >= ends and not any(set(row[:-1]) & ends for row in said)
    spoken = [row[:-1] if row[-1] in ends else row for row in said]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in spoken]
    assert ppo.response_texts(model, tokenizer, prompts, said) == texts
    mask = ppo.policy_batch(tokenizer, list(zip(prompts, said, strict=True)))["mask"]
    assert mask.sum(dim=1).tolist() == [len(row) for row in said]
    rm.save_model(model, tokenizer, tmp_path / "out")
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings.items() <= saved.items()


@pytest.mark.parametrize("own, after", [(None, 0), (0, 0), (300, [0, 300])])
def test_a_trained_policy_stops_in_plain_transformers(tmp_path, own, after):
    folder = with_settings(tmp_path / "m", do_sample=True, top_p=0.9, eos_token_id=own)
    rows = [{"prompt": f"Human: {i}", "response": ""} for i in range(8)]
    argv = f"sft --model {folder} --data {write_rows(tmp_path / 'rows.jsonl', rows)}"
    argv += f" --lr 1e-2 --batch_size 8 --epochs 30 --out {tmp_path}/out"
    assert ppo.main(argv.split()) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([rm.encode(make_tokenizer(), "Human: 1", "")[0]])
    assert plain.generate(ids, max_new_tokens=20, do_sample=False).shape[1] == ids.shape[1] + 1
    settings = plain.generation_config
    assert settings.top_p == 0.9 and settings.eos_token_id == after


def test_the_text_of_a_response_keeps_its_leading_space(policy_folder):
    """Also with tokenizers that strip a text's first space, as Llama 2's does (two kinds)."""
    pieces = "<unk> <s> </s> _ _Sorry Sorry _help :".split() + list("Humanelp,")
    scores = [(piece.replace("_", "▁"), -float(i)) for i, piece in enumerate(pieces)]
    metaspace, prepend = (Tokenizer(models.Unigram(scores, unk_id=0)) for _ in range(2))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    prepend.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizers = [make_tokenizer()]
    for each in (metaspace, prepend):
        each.decoder = decoders.Sequence(steps)
        tokenizers.append(transformers.PreTrainedTokenizerFast(tokenizer_object=each, **names))
    model, _ = ppo.load_policy(policy_folder)
    texts = [" Sorry, help", " Sorry", "  Sorry"]
    for tokenizer in tokenizers:
        rows = [rm.encode(tokenizer, "Human: help:", text) for text in texts]
        assert ppo.response_texts(model, tokenizer, *zip(*rows, strict=True)) == texts


def test_logits_and_values(policy_folder):
    model, tokenizer = ppo.load_policy(policy_folder)
    critic = ppo.Critic(model)
    texts = (" Sorry, we refund", " Sorry, we will")
    rows = [rm.encode(tokenizer, "Human: help", text) for text in texts]
    batch = ppo.policy_batch(tokenizer, rows)
    assert (critic(batch) == 0).all() and critic(batch).shape == batch["mask"].shape
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    a, b = critic(batch)
    # The value at `same`, the first token that differs, is read before that token.
    same = (batch["input_ids"][0] != batch["input_ids"][1]).nonzero()[0].item() - len(rows[0][0])
    assert torch.allclose(a[: same + 1], b[: same + 1], atol=1e-6)
    assert not torch.allclose(a[same + 1], b[same + 1], atol=1e-6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.lm_head.weight *= 300
        logits, values = model(batch["input_ids"]).logits, critic(batch)
        hidden = model.model(batch["input_ids"]).last_hidden_state
        states = ppo.states_of(critic.trunk, batch, "last_hidden_state")
    assert logits.dtype == values.dtype == torch.float32 and logits.abs().max() > 20
    torch.testing.assert_close(logits, hidden.float() @ model.lm_head.weight.T)
    torch.testing.assert_close(values, (states.float() @ critic.head.weight.T)[..., 0])


def test_what_is_no_policy_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    config = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    recurrent = transformers.RwkvConfig(**config, attention_hidden_size=32, context_length=64)
    encoder = transformers.BertConfig(**config, num_attention_heads=4, intermediate_size=48)
    rwkv = save(tmp_path / "rwkv", "AutoModelForCausalLM", recurrent, tokenizer)
    bert = save(tmp_path / "bert", "AutoModelForMaskedLM", encoder, tokenizer)
    refused = [(rwkv, "rwkv.*padded"), (bert, "bert.*tokens to come")]
    for name in ("score.weight", "v_head.summary.weight", "extra"):
        for architecture in ("llama", "llama-tied"):
            folder = make_policy(tmp_path / f"{architecture}-{name}", architecture)
            conftest.change_weights(folder, lambda w, name=name: w | {name: torch.zeros(1, 32)})
            refused.append((folder, f"{folder}.*{name}"))
    for folder, words in refused:
        with pytest.raises(data.Mistake, match=words):
            ppo.load_policy(folder)


LOOP = "--reward_model TOY/rm --prompts TOY/pairs.jsonl --steps 3 --batch_size 16"
LOOP += " --minibatch_size 8 --max_new_tokens 8 --scale_prompts 8 --lr 1e-3 --critic_lr 1e-3"


def run(command: str, toy) -> int:
    return ppo.main(command.replace("TOY", str(toy)).split())


def test_sft_and_ppo_write_what_happened(toy, tmp_path, monkeypatch):
    sft = "sft --model TOY/policy --data TOY/pairs.jsonl --lr 1e-3 --batch_size 8 --epochs 3"
    assert run(f"{sft} --out {tmp_path}/sft", toy) == 0
    losses = [row["loss"] for row in data.read_jsonl(tmp_path / "sft/log.jsonl")]
    assert losses[0] == pytest.approx(math.log(359), rel=0.1) and losses[-1] < losses[0] - 0.5
    for function in (ppo.rollout, ppo.update):  # they get the settings that their docstrings name
        named = re.search(r"has the numbers ([a-z_,\s]+)", function.__doc__)[1]
        named = named.replace(",", " ").split()

        def call(*arguments, function=function, named=named):
            *others, args = arguments
            return function(*others, SimpleNamespace(**{x: getattr(args, x) for x in named}))

        monkeypatch.setattr(ppo, function.__name__, call)
    assert run(f"ppo --model {tmp_path}/sft {LOOP} --out {tmp_path}/ppo", toy) == 0
    log = data.read_jsonl(tmp_path / "ppo/log.jsonl")
    assert len(log) == 3 and all(map(math.isfinite, log[2].values())) and len(log[2]) == 13
    asked = data.read_jsonl(tmp_path / "ppo/rollouts.jsonl")[0]["prompts"]
    prompts = data.read_prompts(toy / "pairs.jsonl")
    assert set(asked) <= set(prompts[8:])  # the first 8 only scale the reward


@pytest.mark.parametrize("mode", ["sft", "dpo", "ppo"])
def test_micro_batches_change_nothing(toy, tmp_path, mode):
    """SFT's responses are of unequal length: a mean over the micro-batches' means would show."""
    rows = [{"prompt": f"Human: {i}", "chosen": " a" * 4 ** (i % 3)} for i in range(16)]
    rows = write_rows(tmp_path / "rows.jsonl", [{**row, "rejected": " no"} for row in rows])
    options = LOOP if mode == "ppo" else f"--data {rows} --lr 1e-3 --batch_size 8"
    logs, weights = [], []
    for micro in (16, 3):
        command = f"{mode} --model TOY/policy {options} --micro_batch_size {micro}"
        assert run(f"{command} --out {tmp_path}/{micro}", toy) == 0
        weights.append(conftest.weights_of(tmp_path / f"{micro}"))
        logs.append(data.read_jsonl(tmp_path / f"{micro}/log.jsonl"))
    assert all(torch.allclose(x, weights[1][name], atol=2e-4) for name, x in weights[0].items())
    for row, other in zip(*logs, strict=True):
        assert row == pytest.approx(other, rel=1e-2, abs=2e-3)


def test_ppo_raises_the_reward(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(rm, "score", lambda *x, **_: -torch.tensor([float(len(y)) for y in x[3]]))
    options = "--steps 20 --batch_size 32 --minibatch_size 16 --max_new_tokens 12 --lr 4e-3"
    options += " --critic_lr 4e-3 --missing_eos_penalty 0 --kl_coef 0"
    assert run(f"ppo --model TOY/policy {LOOP} {options} --out {tmp_path}/short", toy) == 0
    steps = data.read_jsonl(tmp_path / "short/rollouts.jsonl")
    first, last = (torch.tensor(steps[i]["scores"]).mean() for i in (0, -1))
    assert last > first + 5


def test_no_step_on_a_gradient_that_is_not_finite(toy, tmp_path, monkeypatch, capsys):
    rollout, steps = ppo.rollout, []

    def far_away(*arguments):
        batch, *rest = rollout(*arguments)
        batch["old_logprobs"] -= 100.0
        batch["advantages"] = batch["mask"].float()
        return batch, *rest

    monkeypatch.setattr(ppo, "rollout", far_away)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: steps.append(1))
    assert run(f"ppo --model TOY/policy {LOOP} --out {tmp_path}/x", toy) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "NaN ahead" in error and "lower --lr or --critic_lr" in error
    assert steps == [] and not list(tmp_path.glob("**/*.safetensors"))


def test_rewards_without_a_scale_are_refused(toy, tmp_path, monkeypatch, capsys):
    scores = 0.1 * torch.tensor([3.0, 3.0000002] * 16)
    monkeypatch.setattr(rm, "score", lambda *x, **_: scores[: len(x[3])])
    assert run(f"ppo --model TOY/policy {LOOP} --out {tmp_path}/x", toy) == 2
    error = capsys.readouterr().err
    assert re.search("--scale_prompts 8: all 32 .*one reward, 0.3; .*--temperature", error)


def test_image_and_text_models(tmp_path, toy):
    folder = conftest.make_image_and_text(tmp_path / "m", positions=24, bos="<bos>")
    argv = f"ppo --model {folder} {LOOP} --batch_size 8 --scale_prompts 4 --out {tmp_path}/ppo"
    assert run(f"{argv} --max_new_tokens 20", toy) == 2  # too few positions
    assert run(f"{argv} --max_length 24 --max_new_tokens 4", toy) == 0
    before, after = conftest.weights_of(folder), conftest.weights_of(tmp_path / "ppo")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 10 and not any("vision" in name for name in moved)


def test_limits_of_all_models_are_checked_before_the_work(toy, tmp_path, capsys):
    config = ARCHITECTURES["llama"](len(make_tokenizer()))
    config.max_position_embeddings, config.eos_token_id = 45, 0
    small = save(tmp_path / "45", "AutoModelForCausalLM", config, make_tokenizer())
    make_rm = f"--model {small} --data {toy}/pairs.jsonl --out {tmp_path}/rm --batch_size 8"
    assert rm.main(make_rm.split()) == 0
    prompts = [{"prompt": f"Human: {i}"} for i in range(41)]
    prompts[29] = {"prompt": "x" * 40}
    write_rows(tmp_path / "prompts.jsonl", prompts)
    loop = f"ppo --model TOY/policy {LOOP} --prompts {tmp_path}/prompts.jsonl --steps 1"
    loop += f" --reward_model {tmp_path}/rm --out {tmp_path}/x"
    assert run(loop, toy) == 2 and not (tmp_path / "x.partial/log.jsonl").exists()
    err = capsys.readouterr().err
    assert "prompts.jsonl, row 30:" in err and "--max_length 45" in err
    assert run(f"{loop} --max_length 45", toy) == 0  # the advice works
    # A response that is cut off is read with an EOS by the RM: 45 tokens are not enough for 46.
    ids = rm.encode(make_tokenizer(), "Human: 0", "")[0]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Human: 0"}] * 41)
    loop = loop.replace("/x", "/y") + f" --max_new_tokens {45 - len(ids)}"
    assert run(loop, toy) == 2 and "row 1:" in capsys.readouterr().err
    assert run(f"{loop} --max_new_tokens {44 - len(ids)}", toy) == 0
    row = {"prompt": "x" * 50, "chosen": " Sorry", "rejected": ""}
    fitting = f"dpo --model TOY/policy --data {write_rows(tmp_path / 'd.jsonl', [row] * 4)}"
    fitting += f" --batch_size 2 --ref_policy {tmp_path}/45 --out {tmp_path}/z"
    assert run(fitting, toy) == 2 and "d.jsonl, row 1:" in capsys.readouterr().err
