"""ppo.py: losses against loops and closed forms, sampling against probabilities, every mode."""

import json
import math
import random

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, GEMMA, make_policy, make_tokenizer, save, write_rows
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import data
import ppo
import rm

LENGTHS = [5, 3, 1, 0]


@pytest.fixture
def ragged():
    """b = 4 responses of 5, 3, 1 and 0 tokens, float64, with garbage off the mask."""
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in LENGTHS])
    tensors = [torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(3)]
    return mask, [torch.where(mask.bool(), x, 1e30) for x in tensors]


# --------------------------------------------------------------------------------- the mathematics


def test_kl_penalised_rewards_against_a_loop(ragged):
    mask, (logprobs, ref, _) = ragged
    scores = torch.tensor([1.0, -2.0, 3.0, 9.0], dtype=torch.float64)
    rewards = ppo.kl_penalised_rewards(scores, logprobs, ref, mask, 0.3)
    for i, length in enumerate(LENGTHS):
        want = [-0.3 * (logprobs[i, t] - ref[i, t]).item() for t in range(length)]
        want[-1:] = [x + scores[i].item() for x in want[-1:]]
        assert rewards[i].tolist() == pytest.approx(want + [0.0] * (5 - length), abs=1e-12)


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 1.0)])
def test_gae_against_its_definition(ragged, gamma, lam):
    mask, (rewards, values, _) = ragged
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for i, length in enumerate(LENGTHS):
        v = values[i, :length].tolist() + [0.0]
        r = rewards[i, :length].tolist()
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        # The definition: a sum over all later deltas, not a recursion.
        sums = [sum((gamma * lam) ** s * d for s, d in enumerate(deltas[t:])) for t in range(5)]
        assert advantages[i].tolist() == pytest.approx(sums, abs=1e-12)
        want = [sums[t] + v[t] if t < length else 0.0 for t in range(5)]
        assert returns[i].tolist() == pytest.approx(want, abs=1e-12)
        if gamma == lam == 1:  # the reward to go
            want = [sum(r[t:]) for t in range(length)]
            assert returns[i, :length].tolist() == pytest.approx(want)


def test_gae_ignores_infinite_values_off_the_mask():
    mask = torch.tensor([[1, 1, 0]])
    rewards = torch.tensor([[0.0, 1.0, math.nan]])
    values = torch.tensor([[0.5, 0.25, math.inf]])
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    assert advantages.tolist() == [[0.5, 0.75, 0.0]] and returns.tolist() == [[1.0, 1.0, 0.0]]


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


def test_value_loss_and_dpo_loss_in_closed_form():
    mask = torch.tensor([[1, 1, 0]])
    values, old = torch.tensor([[3.0, 0.1, 9.0]]), torch.zeros(1, 3)
    want = 0.5 * (max((3.0 - 1) ** 2, (0.8 - 1) ** 2) + (0.1 - 1) ** 2) / 2
    got = ppo.value_loss(values, old, torch.ones(1, 3), mask, 0.8)
    assert got.item() == pytest.approx(want)
    x = torch.zeros(3)
    assert ppo.dpo_loss(x, x, x, x, 0.1).item() == pytest.approx(math.log(2))  # untrained
    logps = (torch.tensor([v]) for v in (-3.0, -5.0, -4.0, -4.5))
    want = math.log(1 + math.exp(-0.5 * ((-3 + 4) - (-5 + 4.5))))
    assert ppo.dpo_loss(*logps, 0.5).item() == pytest.approx(want)


def test_whiten():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    x = ppo.whiten(torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]]), mask)
    inside = x[mask.bool()]
    assert inside.mean().abs() < 1e-6
    assert inside.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (x[1, 1:] == 0).all()


def test_wrong_shapes_are_value_errors():
    x, y = torch.ones(2, 3), torch.ones(2, 4)
    calls = [(ppo.gae, x, y, x, 1.0, 1.0), (ppo.policy_loss, x, x, y, x, 0.2)]
    calls += [(ppo.value_loss, x, y, x, x, 0.2), (ppo.dpo_loss, x[0], x[0], x[0], y[0], 0.1)]
    calls += [(ppo.dpo_loss, x, x, x, x, 0.1), (ppo.kl_penalised_rewards, x[0], x, x, x, 0.1)]
    calls += [(ppo.kl_penalised_rewards, x[:, 0], x, y, x, 0.1)]
    for function, *arguments in calls:
        with pytest.raises(ValueError, match="shape"):
            function(*arguments)


# ------------------------------------------------------------------ log-probabilities and sampling


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_do_not_depend_on_padding_or_company(tmp_path, architecture):
    """Each row alone, unpadded, through the bare model = the row inside a padded batch."""
    model, tokenizer = ppo.load_policy(make_policy(tmp_path / "m", architecture))
    texts = [("Human: my phone is broken", " Sorry."), ("Human: a b", "")]
    texts += [("Human: help", " we will send a new phone today")]
    rows = [rm.encode(tokenizer, x, y) for x, y in texts]
    together = ppo.response_logprobs(model, ppo.collate(tokenizer, rows), temperature=0.7)
    for (a, b), got in zip(rows, together, strict=True):
        logits = model(torch.tensor([a + b])).logits[0].float() / 0.7
        alone = logits.log_softmax(-1)[range(len(a) - 1, len(a + b) - 1), b]
        assert torch.allclose(got[: len(b)], alone, atol=1e-4)
        assert (got[len(b) :] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_share_a_prompt_read_as_those_that_do_not(tmp_path, architecture):
    """Log-probabilities, values, their gradients; prompts of unequal length, rows in any order."""
    policy, tokenizer = ppo.load_policy(make_policy(tmp_path / "m", architecture))
    critic = ppo.Critic(str(tmp_path / "m"))
    assert policy.shares_prompts
    torch.nn.init.normal_(critic.head.weight)
    prompts = ["my phone", "where is the parcel of my boss", "a"]
    responses = [" Sorry", "", " we refund it today", " a b"]
    rows = [rm.encode(tokenizer, x, y) for y in responses for x in prompts]
    batch, results = ppo.collate(tokenizer, rows), []
    for share in (False, True):
        policy.shares_prompts = critic.trunk.shares_prompts = share
        outputs = [ppo.response_logprobs(policy, batch), critic(batch) * batch["mask"]]
        results.append([x.detach() for x in outputs])
        for model, out in zip((policy, critic), outputs, strict=True):
            model.zero_grad()
            (out * torch.arange(out.numel()).view(out.shape) / 50).sum().backward()
            results[-1] += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert results[0][0].abs().max() > 1 and len(results[0]) > 10
    for plain, shared in zip(*results, strict=True):
        atol = 1e-4 * max(1, plain.abs().max().item())
        torch.testing.assert_close(shared, plain, rtol=1e-4, atol=atol)


def test_sampling_follows_the_models_own_probabilities(policy_folder):
    """First tokens of 4,000 samples against softmax(logits / 0.7)."""
    model, tokenizer = ppo.load_policy(policy_folder)
    with torch.no_grad():
        model.lm_head.weight *= 12  # a peaked distribution is told apart with fewer samples
    ids = rm.encode(tokenizer, "Human: my phone is broken", "")[0]
    torch.manual_seed(0)
    rows = ppo.generate(model, tokenizer, [ids] * 4000, 1, 0.7)
    drawn = torch.tensor([row[0] for row in rows])
    shares = torch.bincount(drawn, minlength=model.config.vocab_size) / 4000
    with torch.no_grad():
        want = (model(torch.tensor([ids])).logits[0, -1] / 0.7).softmax(-1)
    assert 0.5 * (shares - want).abs().sum() < 0.15
    assert (shares - want).abs().max() < 0.03


def test_sample_responses_is_seeded_and_keeps_the_order(policy_folder):
    model, tokenizer = ppo.load_policy(policy_folder)
    prompts = ["Human: help", "Human: my phone is broken, please help. it is late", "Human: a"]
    options = {"k": 3, "max_new_tokens": 6}
    first = ppo.sample_responses(model, tokenizer, prompts, seed=5, **options)
    assert [len(ys) for ys in first] == [3, 3, 3]
    assert first == ppo.sample_responses(model, tokenizer, prompts, seed=5, **options)
    assert first != ppo.sample_responses(model, tokenizer, prompts, seed=6, **options)
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
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_the_models_generation_settings_are_saved_and_not_used(tmp_path):
    settings = {"top_k": 1, "do_sample": True, "repetition_penalty": 5.0, "eos_token_id": 0}
    settings |= {"min_new_tokens": 3, "suppress_tokens": list(range(1, 300))}
    model, tokenizer = ppo.load_policy(with_settings(tmp_path / "m", **settings))
    torch.manual_seed(0)
    ids = rm.encode(tokenizer, "Human: help", "")[0]
    said = ppo.generate(model, tokenizer, [ids] * 600, 3, 1.0)
    assert len({tuple(row) for row in said}) > 300  # top_k 1 would leave one
    assert any(len(row) < 3 for row in said)  # min_new_tokens would leave none
    assert {token for row in said for token in row} & set(range(1, 300))
    rm.save_model(model, tokenizer, tmp_path / "out")
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings.items() <= saved.items()


def test_a_trained_policy_stops_in_plain_transformers(tmp_path):
    """Also where the model that we started from named no EOS at all."""
    folder = with_settings(tmp_path / "m", do_sample=True, top_p=0.9)
    config = json.loads((tmp_path / "m/config.json").read_text()) | {"eos_token_id": None}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    rows = [{"prompt": f"Human: {i}", "response": ""} for i in range(8)]
    argv = ["sft", "--model", folder, "--data", write_rows(tmp_path / "rows.jsonl", rows)]
    argv += ["--lr", "1e-2", "--batch_size", "8", "--epochs", "30", "--out", f"{tmp_path}/out"]
    assert ppo.main(argv) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([rm.encode(make_tokenizer(), "Human: 1", "")[0]])
    assert plain.generate(ids, max_new_tokens=20, do_sample=False).shape[1] == ids.shape[1] + 1
    assert plain.generation_config.top_p == 0.9


def test_a_response_stops_at_each_of_several_ends(tmp_path):
    ends = [0, 300, 301]
    model, tokenizer = ppo.load_policy(with_settings(tmp_path / "m", eos_token_id=[300, 301]))
    assert ppo.end_ids(model, tokenizer) == ends
    prompts = [rm.encode(tokenizer, "Human: help", "")[0]] * 300
    torch.manual_seed(0)
    said = ppo.generate(model, tokenizer, prompts, 60, 1.0)
    assert {row[-1] for row in said} >= set(ends)
    assert not any(set(row[:-1]) & set(ends) for row in said)
    # The text is what stands before the end, and the mask ends there.
    texts = ppo.response_texts(model, tokenizer, prompts, said)
    for row, text in zip(said, texts, strict=True):
        spoken = row[:-1] if row[-1] in ends else row
        assert text == tokenizer.decode(spoken, skip_special_tokens=True)
    mask = ppo.collate(tokenizer, list(zip(prompts, said, strict=True)))["mask"]
    assert mask.sum(dim=1).tolist() == [len(row) for row in said]


def sentencepiece(kind: str):
    """A tokenizer that marks spaces by "_" and strips a text's first space, as Llama 2's does."""
    pieces = "<unk> <s> </s> _ _Sorry Sorry _help :".split() + list("Humanelp,")
    scores = [(piece.replace("_", "▁"), -float(i)) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "prepend"])
def test_the_text_of_a_response_keeps_its_leading_space(policy_folder, kind):
    """Else an RM with another tokenizer would see other ids than in D."""
    model, _ = ppo.load_policy(policy_folder)
    tokenizer = make_tokenizer() if kind == "byte-level" else sentencepiece(kind)
    texts = [" Sorry, help", " Sorry", "  Sorry"]
    rows = [rm.encode(tokenizer, "Human: help:", text) for text in texts]
    assert ppo.response_texts(model, tokenizer, *zip(*rows, strict=True)) == texts


# --------------------------------------------------------------------------- what is a policy here


def test_logits_and_values_are_float32_under_autocast(policy_folder):
    model, tokenizer = ppo.load_policy(policy_folder)
    critic = ppo.Critic(policy_folder)
    torch.nn.init.normal_(critic.head.weight)
    with torch.no_grad():
        model.lm_head.weight *= 300
        batch = ppo.collate(tokenizer, [rm.encode(tokenizer, "Human: help", " Sorry, we will")])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch["input_ids"]).logits
            hidden = model.model(batch["input_ids"]).last_hidden_state
            states = ppo.states_of(critic.trunk, batch, "last_hidden_state")
            values = critic(batch)
        assert logits.dtype == values.dtype == torch.float32 and logits.abs().max() > 20
        torch.testing.assert_close(logits, hidden.float() @ model.lm_head.weight.T)
        torch.testing.assert_close(values, (states.float() @ critic.head.weight.T)[..., 0])


def test_critic_starts_at_zero_and_sees_only_the_past(policy_folder):
    critic, tokenizer = ppo.Critic(policy_folder), make_tokenizer()
    texts = (" Sorry, we refund", " Sorry, we will")
    rows = [rm.encode(tokenizer, "Human: help", text) for text in texts]
    batch = ppo.collate(tokenizer, rows)
    assert (critic(batch) == 0).all() and critic(batch).shape == batch["mask"].shape
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    a, b = critic(batch)
    # The value at `same`, the first token that differs, is read before that token.
    same = (batch["input_ids"][0] != batch["input_ids"][1]).nonzero()[0].item() - len(rows[0][0])
    assert torch.allclose(a[: same + 1], b[: same + 1], atol=1e-6)
    assert not torch.allclose(a[same + 1], b[same + 1], atol=1e-6)


def test_padding_must_not_change_a_policy_nor_may_it_see_ahead(tmp_path):
    tokenizer = make_tokenizer()
    config = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    recurrent = transformers.RwkvConfig(**config, attention_hidden_size=32, context_length=64)
    folder = save(tmp_path / "rwkv", "AutoModelForCausalLM", recurrent, tokenizer)
    with pytest.raises(data.Mistake, match="rwkv.*padded"):
        ppo.load_policy(folder)
    encoder = transformers.BertConfig(**config, num_attention_heads=4, intermediate_size=48)
    folder = save(tmp_path / "bert", "AutoModelForMaskedLM", encoder, tokenizer)
    with pytest.raises(data.Mistake, match="bert.*tokens to come"):
        ppo.load_policy(folder)


@pytest.mark.parametrize("name", ["score.weight", "v_head.summary.weight", "extra"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_a_weight_that_would_be_dropped_is_named(tmp_path, architecture, name):
    folder = make_policy(tmp_path / "m", architecture)
    weights = load_file(f"{folder}/model.safetensors") | {name: torch.zeros(1, 32)}
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(data.Mistake, match=f"{folder}.*{name}"):
        ppo.load_policy(folder)


def test_image_and_text_models(tmp_path, world):
    """Gemma 3: the text model's settings are one level down; PPO reads text through all of it."""
    tokenizer = make_tokenizer(bos="<bos>")
    n = len(tokenizer)
    text = {**GEMMA, "vocab_size": n + 3, "sliding_window": 8, "max_position_embeddings": 20}
    text |= {"eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    ids = {"image_token_index": n, "boi_token_index": n + 1, "eoi_token_index": n + 2}
    ids |= {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(**ids)
    folder = save(tmp_path / "m", "AutoModelForImageTextToText", config, tokenizer)
    assert run(f"ppo --model {folder} {LOOP} --out {tmp_path}/x", world) == 2  # too few positions
    argv = f"ppo --model {folder} {LOOP} --max_length 20 --max_new_tokens 4 --batch_size 8"
    assert run(f"{argv} --scale_prompts 4 --out {tmp_path}/ppo", world) == 0
    before, after = (load_file(f"{f}/model.safetensors") for f in (folder, tmp_path / "ppo"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 10 and not any("vision" in name for name in moved)


# ------------------------------------------------------------------------------------- the command

LOOP = "--reward_model WORLD/rm --prompts WORLD/prompts.jsonl --steps 3 --batch_size 16"
LOOP += " --minibatch_size 8 --max_new_tokens 8 --scale_prompts 8 --lr 1e-3 --critic_lr 1e-3"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy, pairs, prompts, and a reward model with ANOTHER tokenizer (it is given text)."""
    root = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    words = "sorry we refund the phone today please thank you parcel late broken invoice".split()
    prompts = [f"Human: my {rng.choice(words)} is {rng.choice(words)} {i}:" for i in range(40)]
    pairs = [
        {"prompt": x, "chosen": f" thank you {rng.choice(words)}", "rejected": f" {words[i % 9]}"}
        for i, x in enumerate(prompts)
    ]
    make_policy(root / "policy")
    base = make_policy(root / "base", "gpt2", bos="<bos>", pad=None)
    write_rows(root / "pairs.jsonl", pairs)
    write_rows(root / "prompts.jsonl", [{"prompt": x} for x in prompts])
    argv = f"--model {base} --data {root}/pairs.jsonl --out {root}/rm --lr 1e-3 --batch_size 8"
    assert rm.main([*argv.split(), "--epochs", "4"]) == 0
    return root


def run(command: str, world) -> int:
    return ppo.main(command.replace("WORLD", str(world)).split())


def weights_of(folder):
    return load_file(f"{folder}/model.safetensors")


def test_every_mode_end_to_end(world, tmp_path):
    fitting = "--data WORLD/pairs.jsonl --lr 1e-3 --batch_size 8"
    out = tmp_path
    assert run(f"sft --model WORLD/policy {fitting} --epochs 3 --out {out}/sft", world) == 0
    assert run(f"dpo --model {out}/sft {fitting} --out {out}/dpo", world) == 0
    assert run(f"ppo --model {out}/sft {LOOP} --out {out}/ppo", world) == 0
    sampling = f"sample --model {out}/ppo --prompts WORLD/prompts.jsonl --k 3 --max_new_tokens 8"
    assert run(f"{sampling} --out {out}/s", world) == 0
    prompts = data.read_prompts(world / "prompts.jsonl")
    meta = data.read_meta(out / "s/samples.jsonl")
    assert [row["prompt"] for row in meta] == prompts and len(meta[0]["responses"]) == 3
    losses = [row["loss"] for row in data.read_jsonl(out / "sft/log.jsonl")]
    assert losses[0] == pytest.approx(math.log(359), rel=0.1) and losses[-1] < losses[0] - 0.5
    assert data.read_jsonl(out / "dpo/log.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    log = data.read_jsonl(out / "ppo/log.jsonl")
    kl = [row["objective/kl"] for row in log]
    assert len(log) == 3 and abs(kl[0]) < 1e-3 < kl[2]
    assert all(map(math.isfinite, log[2].values())) and len(log[2]) == 13
    rollouts = data.read_jsonl(out / "ppo/rollouts.jsonl")
    assert set(rollouts[0]["prompts"]) <= set(prompts[8:])  # the first 8 only scale the reward
    # What is written are the RM's own scores of these texts, response by response.
    judge = rm.load_reward_model(f"{world}/rm")
    for step in rollouts:
        for prompt, said, scores in zip(*(step[k] for k in list(step)[2:]), strict=True):
            want = rm.score(*judge, [prompt] * 4, said)
            assert scores == pytest.approx(want.tolist(), abs=1e-5)
    before = weights_of(world / "policy")
    for after in (weights_of(out / folder) for folder in ("sft", "dpo", "ppo")):
        assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("mode", ["sft", "dpo", "ppo"])
def test_reproducible_and_micro_batches_change_nothing(world, tmp_path, mode):
    """SFT's responses are of unequal length: a mean over the micro-batches' means would show."""
    rows = [{"prompt": f"Human: {i}", "chosen": " a" * 4 ** (i % 3)} for i in range(16)]
    rows = write_rows(tmp_path / "rows.jsonl", [{**row, "rejected": " no"} for row in rows])
    options = LOOP if mode == "ppo" else f"--data {rows} --lr 1e-3 --batch_size 8"
    logs, weights = [], []
    for name, micro in (("a", 16), ("b", 16), ("c", 3)):
        command = f"{mode} --model WORLD/policy {options} --micro_batch_size {micro}"
        assert run(f"{command} --out {tmp_path}/{name}", world) == 0
        weights.append(weights_of(tmp_path / name))
        logs.append(data.read_jsonl(tmp_path / name / "log.jsonl"))
    a, b, c = weights
    assert all(torch.equal(a[name], b[name]) for name in a) and logs[0] == logs[1]
    assert all(torch.allclose(a[name], c[name], atol=2e-4) for name in a)
    for row, other in zip(logs[0], logs[2], strict=True):
        assert row == pytest.approx(other, rel=1e-2, abs=2e-3)


def test_ppo_raises_the_reward(world, tmp_path, monkeypatch):
    """Rewarded for being short (a stand-in RM), the policy gets shorter."""

    def score(model, tokenizer, prompts, responses, batch_size=64):
        return -torch.tensor([float(len(response)) for response in responses])

    monkeypatch.setattr(rm, "score", score)
    options = "--steps 20 --batch_size 32 --minibatch_size 16 --max_new_tokens 12 --lr 4e-3"
    options += " --critic_lr 4e-3 --missing_eos_penalty 0 --kl_coef 0"
    assert run(f"ppo --model WORLD/policy {LOOP} {options} --out {tmp_path}/short", world) == 0
    log = data.read_jsonl(tmp_path / "short/log.jsonl")
    assert log[-1]["objective/raw_scores"] > log[0]["objective/raw_scores"] + 5


def small(folder, positions: int) -> str:
    """A Llama with that many positions."""
    config = ARCHITECTURES["llama"](len(make_tokenizer()))
    config.max_position_embeddings, config.eos_token_id = positions, 0
    return save(folder, "AutoModelForCausalLM", config, make_tokenizer())


def test_limits_of_all_models_are_checked_before_the_work(world, tmp_path, capsys):
    """A long prompt among 41, for an RM of 45 positions: refused at once, by its row."""
    make_rm = f"--data {world}/pairs.jsonl --out {tmp_path}/rm --batch_size 8"
    assert rm.main(["--model", small(tmp_path / "45", 45), *make_rm.split()]) == 0
    prompts = [{"prompt": f"Human: {i}"} for i in range(41)]
    prompts[29] = {"prompt": "x" * 40}
    write_rows(tmp_path / "prompts.jsonl", prompts)
    loop = f"ppo --model WORLD/policy {LOOP} --prompts {tmp_path}/prompts.jsonl --steps 1"
    loop += f" --reward_model {tmp_path}/rm --out {tmp_path}/x"
    assert run(loop, world) == 2 and not (tmp_path / "x.partial/log.jsonl").exists()
    err = capsys.readouterr().err
    assert "prompts.jsonl, row 30:" in err and "--max_length 45" in err
    assert run(f"{loop} --max_length 45", world) == 0  # the advice works
    # A response that is cut off is read with an EOS by the RM: 45 tokens are not enough for 46.
    ids = rm.encode(make_tokenizer(), "Human: 0", "")[0]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Human: 0"}] * 41)
    loop = loop.replace("/x", "/y") + f" --max_new_tokens {45 - len(ids)}"
    assert run(loop, world) == 2 and "row 1:" in capsys.readouterr().err
    assert run(f"{loop} --max_new_tokens {44 - len(ids)}", world) == 0
    # The reference reads what the policy reads.
    row = {"prompt": "x" * 50, "chosen": " Sorry", "rejected": ""}
    fitting = f"dpo --model WORLD/policy --data {write_rows(tmp_path / 'd.jsonl', [row] * 4)}"
    fitting += f" --batch_size 2 --ref_policy {tmp_path}/45 --out {tmp_path}/z"
    assert run(fitting, world) == 2 and "d.jsonl, row 1:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, word",
    [
        (f"ppo --model WORLD/policy {LOOP} --ref_policy WORLD/base", "base has another vocabulary"),
        (f"ppo --model WORLD/policy {LOOP} --batch_size 200", "--scale_prompts leaves 32"),
        (f"ppo --model WORLD/policy {LOOP} --lr 1e30 --ppo_epochs 1", "NaN"),
        ("sample --model WORLD/policy --prompts WORLD/prompts.jsonl --k 0", "--k 0"),
        ("sample --model WORLD/policy --prompts WORLD/prompts.jsonl --max_length 9", "0 of 40"),
        ("sample --model WORLD/policy --prompts WORLD/empty.jsonl", "empty.jsonl, row 2"),
        ("sft --model WORLD/policy --data WORLD/empty.jsonl --batch_size 1", "empty.jsonl, row 2"),
    ],
)
def test_mistakes_get_one_line(world, tmp_path, capsys, command, word):
    rows = [{"prompt": x, "response": "a"} for x in ("Human:", "")]
    write_rows(world / "empty.jsonl", rows)
    assert run(f"{command} --out {tmp_path}/x", world) == 2
    err = capsys.readouterr().err
    assert word in err and "Traceback" not in err and not (tmp_path / "x").exists()
