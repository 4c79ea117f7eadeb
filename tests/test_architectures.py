"""All stages, one after the other, from a checkpoint on the disk, for each architecture."""

import math

import pytest
import torch
import transformers
from conftest import SMALL, make_pairs, make_policy, make_tokenizer, save, weights_of, write_rows

import data
import metarm
import ppo
import rm

# "<eos>" as pad or BOS is GPT-2's way, a BOS of its own Llama's and OPT's.
BOS, LEFT, NO_PAD = {"bos": "<bos>"}, {"padding_side": "left"}, {"pad": None}
TOKENIZERS = {"gpt2": {"bos": "<eos>", "pad": "<eos>"}, "llama": BOS | LEFT | NO_PAD, "qwen2": {}}
TOKENIZERS |= {"llama-tied": {"pad": "<eos>"} | LEFT, "qwen3": LEFT, "gemma": BOS | LEFT}
TOKENIZERS |= {"gpt_neox": NO_PAD, "opt": BOS, "mistral": BOS | NO_PAD, "gemma3": BOS | LEFT}
TIED = {"gpt2", "llama-tied", "gemma", "opt", "gemma3"}
PAIRS = make_pairs(12)
STEPS = "--batch_size 6 --lr 1e-3"
PPO_STEPS = "--steps 2 --batch_size 8 --scale_prompts 4 --lr 1e-3 --critic_lr 1e-3"


def run(module, command: str) -> None:
    assert module.main(command.split()) == 0, command


def moved(before: str, after: str) -> int:
    old, new = weights_of(before), weights_of(after)
    assert all(torch.isfinite(x).all() for x in new.values())
    return sum(not torch.equal(x, new[name]) for name, x in old.items() if name in new)


def check_policy(before: str, after: str, tied: bool) -> None:
    """Anybody can load it, it has moved, and ppo.py says of its responses what it says itself."""
    assert moved(before, after) > 10
    model = transformers.AutoModelForCausalLM.from_pretrained(after).eval()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    policy, tokenizer = ppo.load_policy(after)
    rows = [rm.encode(tokenizer, pair["prompt"], pair["chosen"]) for pair in PAIRS[:3]]
    assert len({len(prompt) for prompt, _ in rows}) > 1  # so some are padded
    with torch.no_grad():
        logprobs = ppo.response_logprobs(policy, ppo.policy_batch(tokenizer, rows))
        for (prompt, response), got in zip(rows, logprobs, strict=True):
            plain = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            want = [plain[len(prompt) + t - 1, id].item() for t, id in enumerate(response)]
            assert got[: len(want)].tolist() == pytest.approx(want, abs=1e-5)
            assert (got[len(want) :] == 0).all()


def check_reward_model(folder: str) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, config = transformers.AutoTokenizer.from_pretrained(folder), model.config
    assert config.num_labels == 1
    assert config.pad_token_id == tokenizer.pad_token_id != rm.end_id(tokenizer)
    # Each prompt twice, side by side and apart: neither order nor company counts.
    texts = [(x["prompt"], x[side]) for side in ("chosen", "rejected") for x in PAIRS[:4]]
    texts.insert(1, texts[4])
    ours = rm.score(*rm.load_reward_model(folder), *zip(*texts, strict=True), batch_size=4)
    for (prompt, response), got in zip(texts, ours, strict=True):
        ids = sum(rm.encode(tokenizer, prompt, response), [])
        with torch.no_grad():
            assert got.item() == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
    assert ours.dtype == torch.float32 and ours.std() > 0


def reward_models(policy: str, meta: str, pairs: str, out) -> None:
    common = f"--model {policy} --data {pairs} --eval_data {pairs} {STEPS}"
    run(rm, f"{common} --out {out}/rm")
    meta = f"{common} --meta {meta} --meta_batch_size 4 --eta 0.1 --normalize"
    run(metarm, f"{meta} --order first --save_adapted {out}/adapted --out {out}/first")
    run(metarm, f"{meta} --order exact --micro_batch_size 3 --out {out}/exact")
    for name in ("rm", "first", "exact", "adapted"):
        check_reward_model(f"{out}/{name}")
    for a, b in [("rm", "first"), ("first", "exact"), ("first", "adapted")]:
        assert moved(f"{out}/{a}", f"{out}/{b}") > 10, (a, b)
    theta = weights_of(f"{out}/first")
    step = [(x - theta[name]).flatten() for name, x in weights_of(f"{out}/adapted").items()]
    assert torch.cat(step).norm().item() == pytest.approx(0.1, rel=1e-3)  # Eq. 3: eta
    logs = [data.read_jsonl(f"{out}/{name}/log.jsonl") for name in ("first", "exact")]
    figures = {"vanilla_loss_adapted", "difference", "meta_grad_norm", "grad_norm"}
    looks = {"vanilla_loss", "cosine", "first_order_gain", "difference_adapted", "accuracy"}
    looks |= {"rise", "predicted_rise", "loss_change"}
    for first, second, last in logs:
        assert figures <= set(first) and looks <= set(first) and "accuracy" in last
        assert figures <= set(second) and not looks & set(second)


def loop(policy: str, reward_model: str, pairs: str, out) -> None:
    """PPO. Its first rollouts are the reference's; their scores are the reward model's own."""
    options = f"--prompts {pairs} {PPO_STEPS} --max_new_tokens 6 --out {out}"
    run(ppo, f"ppo --model {policy} --reward_model {reward_model} {options}")
    log, [*_, last] = (data.read_jsonl(out / f"{name}.jsonl") for name in ("log", "rollouts"))
    assert abs(log[0]["objective/kl"]) < 1e-4 < abs(log[1]["objective/kl"])
    texts = [text for texts in last["responses"] for text in texts]
    prompts = [x for x, ys in zip(last["prompts"], last["responses"], strict=True) for _ in ys]
    want = rm.score(*rm.load_reward_model(reward_model), prompts, texts).tolist()
    assert sum(last["scores"], []) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("architecture", TOKENIZERS)
def test_all_stages(tmp_path, architecture):
    w, tied, pairs = tmp_path, architecture in TIED, write_rows(tmp_path / "pairs.jsonl", PAIRS)
    base = make_policy(w / "base", architecture, **TOKENIZERS[architecture])
    run(ppo, f"sft --model {base} --data {pairs} {STEPS} --out {w}/sft")
    check_policy(base, f"{w}/sft", tied)
    run(ppo, f"sample --model {w}/sft --prompts {pairs} --k 2 --max_new_tokens 6 --out {w}/meta")
    asked = [row["prompt"] for row in data.read_meta(w / "meta/samples.jsonl")]
    assert asked == [pair["prompt"] for pair in PAIRS]
    run(ppo, f"dpo --model {w}/sft --data {pairs} {STEPS} --out {w}/dpo")
    check_policy(f"{w}/sft", f"{w}/dpo", tied)
    log = data.read_jsonl(w / "dpo/log.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    reward_models(f"{w}/sft", f"{w}/meta/samples.jsonl", pairs, w)
    loop(f"{w}/sft", f"{w}/first", pairs, w / "policy")
    check_policy(f"{w}/sft", f"{w}/policy", tied)


@pytest.mark.cuda
def test_all_stages_on_a_gpu(tmp_path, monkeypatch):
    """They train, from the CPU's figures on; with 64 tokens a row, cuDNN's attention gave NaN."""
    w, base = tmp_path, make_policy(tmp_path / "base")
    texts = [("Human:" + " help" * words, " no" * n) for words, n in [(40, 7), (30, 4), (40, 2)]]
    rows = [{"prompt": x, "chosen": y, "rejected": " no"} for x, y in texts]
    _, groups = rm.encode_groups(*ppo.load_policy(base), rows, "rows")
    assert max(rm.row_lengths(groups)) == 64
    pairs = write_rows(w / "pairs.jsonl", rows)
    meta = [{"prompt": x["prompt"], "responses": [x["chosen"], " no", ""]} for x in rows]
    fit = f"--data {pairs} --batch_size 3 --epochs 3 --lr 1e-3"
    climb = f"{fit} --meta {write_rows(w / 'S.jsonl', meta)} --meta_batch_size 3 --eta 0.02"
    loop = f"--prompts {pairs} --steps 2 --batch_size 4 --scale_prompts 1 --max_new_tokens 22"
    stages = {"sft": (ppo, f"sft {fit}", "loss", 0.02), "dpo": (ppo, f"dpo {fit}", "loss", 0.02)}
    stages |= {"rm": (rm, fit, "loss", 1e-4), "first": (metarm, climb, "difference", 1e-4)}
    stages["exact"] = (metarm, f"{climb} --order exact", "grad_norm", 1e-4)
    stages["ppo"] = (ppo, f"ppo {loop} --reward_model {w}/cuda-rm", "", 0)
    for name, (module, options, figure, off) in stages.items():
        for device in ("cuda", "cpu"):
            monkeypatch.setattr(rm, "pick_device", lambda device=device: torch.device(device))
            run(module, f"{options} --model {base} --out {w}/{device}-{name}")
            assert moved(base, f"{w}/{device}-{name}") > 10
        cpu, cuda = (data.read_jsonl(w / f"{x}-{name}/log.jsonl")[0] for x in ("cpu", "cuda"))
        assert not figure or cuda[figure] == pytest.approx(cpu[figure], rel=off), name
    assert abs(cuda["objective/kl"]) < 0.05  # of a policy against itself, in bf16


def test_an_encoder_is_a_reward_model_of_a_decoder(tmp_path):
    w, tokenizer = tmp_path, make_tokenizer(encoder=True, eos="[SEP]")
    pairs = write_rows(w / "pairs.jsonl", PAIRS)
    config = transformers.BertConfig(vocab_size=len(tokenizer), **SMALL)
    bert = save(w / "bert", "AutoModelForMaskedLM", config, tokenizer)
    policy = make_policy(w / "policy", padding_side="left")
    run(ppo, f"sample --model {policy} --prompts {pairs} --k 2 --max_new_tokens 6 --out {w}/meta")
    reward_models(bert, f"{w}/meta/samples.jsonl", pairs, w)
    loop(policy, f"{w}/first", pairs, w / "ppo")
    check_policy(policy, f"{w}/ppo", tied=False)
