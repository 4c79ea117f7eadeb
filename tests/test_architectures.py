"""Any architecture: all stages, one after the other, from a checkpoint on the disk; with tied and untied embeddings, with
and without a pad token, with tokenizers that pad left or right, put a BOS first or not (varied over the architectures)."""

import copy
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

import data
import metarm
import ppo
import rm
from conftest import ARCHITECTURES, SMALL, make_policy, make_tokenizer

# What people bring that conftest's list has not: a window of attention, no cache shared between responses (see rm.py).
MORE = {"mistral": lambda v: transformers.MistralConfig(vocab_size=v, num_key_value_heads=2, sliding_window=8, **SMALL),
        "gemma3": lambda v: transformers.Gemma3TextConfig(vocab_size=v, num_key_value_heads=1, head_dim=8, sliding_window=8,
                                                          **SMALL)}
TOKENIZERS = {  # "<eos>" as pad or BOS is GPT-2's way, a BOS of its own Llama's and OPT's, neither Qwen's and GPT-NeoX's
    "gpt2": dict(bos="<eos>", pad="<eos>"), "llama": dict(bos="<bos>", pad=None, padding_side="left"),
    "llama-tied": dict(pad="<eos>", padding_side="left"), "qwen2": dict(), "qwen3": dict(padding_side="left"),
    "gemma": dict(bos="<bos>", padding_side="left"), "gpt_neox": dict(pad=None), "opt": dict(bos="<bos>"),
    "mistral": dict(bos="<bos>", pad=None), "gemma3": dict(bos="<bos>", padding_side="left")}
TIED = {"gpt2", "llama-tied", "gemma", "opt", "gemma3"}

THINGS = "phone parcel invoice charge refund help".split()
PAIRS = [{"prompt": f"Human: my {THINGS[i % 6]} is {'late, ' * (i % 3)}{i}", "chosen": f" thank you, we send {THINGS[i % 4]}",
          "rejected": " Sorry" * (i % 3)} for i in range(12)]  # with empty responses among them
STEPS = "--batch_size 6 --lr 1e-3"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    data.write_jsonl(root / "pairs.jsonl", PAIRS)
    return root


def run(module, command: str) -> None:
    assert module.main(command.split()) == 0, command


def moved(before: str, after: str) -> dict[str, bool]:
    """{weight: has it moved?}, between two folders; all of them are finite."""
    old, new = (load_file(f"{folder}/model.safetensors") for folder in (before, after))
    assert all(torch.isfinite(x).all() for x in new.values())
    return {name: not torch.equal(x, new[name]) for name, x in old.items() if name in new}


def check_policy(before: str, after: str, tied: bool) -> None:
    """Anybody can load it, it has moved, and what ppo.py says about its responses is what the plain model says."""
    assert sum(moved(before, after).values()) > 10
    model = transformers.AutoModelForCausalLM.from_pretrained(after).eval()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    policy, tokenizer = ppo.load_policy(after)
    rows = [rm.encode(tokenizer, pair["prompt"], pair["chosen"]) for pair in PAIRS[:3]]
    assert len({len(prompt) for prompt, _ in rows}) > 1  # so some are padded
    with torch.no_grad():
        logprobs = ppo.response_logprobs(policy, ppo.collate(tokenizer, rows))
        for (prompt, response), got in zip(rows, logprobs):
            plain = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            want = [plain[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]
            assert got[:len(response)].tolist() == pytest.approx(want, abs=1e-5) and (got[len(response):] == 0).all()


def check_reward_model(folder: str) -> None:
    """Anybody can load it, with one label, and gets the rewards that rm.py gets."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id != rm.end_id(tokenizer)
    ours = rm.score(*rm.load_reward_model(folder), [pair["prompt"] for pair in PAIRS], [pair["chosen"] for pair in PAIRS])
    for pair, got in zip(PAIRS[:3], ours):
        ids = sum(rm.encode(tokenizer, pair["prompt"], pair["chosen"]), [])
        with torch.no_grad():
            assert got.item() == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
    assert torch.isfinite(ours).all() and ours.std() > 0


def reward_models(policy: str, meta: str, files, out) -> None:
    """rm.py, then metarm.py in both orders, with theta'."""
    common = f"--model {policy} --data {files}/pairs.jsonl --eval_data {files}/pairs.jsonl {STEPS}"
    run(rm, f"{common} --out {out}/rm")
    meta = f"{common} --meta {meta} --meta_batch_size 4 --eta 0.1 --normalize"
    run(metarm, f"{meta} --order first --save_adapted {out}/adapted --out {out}/first")
    run(metarm, f"{meta} --order exact --micro_batch_size 3 --out {out}/exact")
    for name in ("rm", "first", "exact", "adapted"):
        check_reward_model(f"{out}/{name}")
    for a, b in [("rm", "first"), ("first", "exact"), ("first", "adapted")]:
        assert sum(moved(f"{out}/{a}", f"{out}/{b}").values()) > 10, (a, b)
    steps = [data.read_jsonl(f"{out}/{name}/log.jsonl")[:-1] for name in ("first", "exact")]
    assert all(0.25 <= row["difference"] <= 0.5 and row["meta_grad_norm"] > 0 for row in sum(steps, []))  # k = 2
    # In step 0 both orders are at the same theta and theta'; what they then do with the gradient differs.
    for name, same in [("difference", True), ("vanilla_loss_adapted", True), ("grad_norm", False)]:
        assert (steps[0][0][name] == pytest.approx(steps[1][0][name], rel=1e-4)) == same


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE])
def test_all_stages(files, tmp_path, architecture, monkeypatch):
    for name, config in MORE.items():
        monkeypatch.setitem(ARCHITECTURES, name, config)
    w, tied = tmp_path, architecture in TIED
    base = make_policy(w / "base", architecture, **TOKENIZERS[architecture])

    run(ppo, f"sft --model {base} --data {files}/pairs.jsonl {STEPS} --out {w}/sft")
    check_policy(base, f"{w}/sft", tied)

    run(ppo, f"sample --model {w}/sft --prompts {files}/pairs.jsonl --k 2 --max_new_tokens 6 --out {w}/meta")
    assert [row["prompt"] for row in data.read_meta(w / "meta/samples.jsonl")] == [pair["prompt"] for pair in PAIRS]

    run(ppo, f"dpo --model {w}/sft --data {files}/pairs.jsonl {STEPS} --out {w}/dpo")
    check_policy(f"{w}/sft", f"{w}/dpo", tied)
    assert data.read_jsonl(w / "dpo/log.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)

    reward_models(f"{w}/sft", f"{w}/meta/samples.jsonl", files, w)

    run(ppo, f"ppo --model {w}/sft --reward_model {w}/first --prompts {files}/pairs.jsonl --steps 2 --batch_size 8 "
             f"--scale_prompts 4 --max_new_tokens 6 --lr 1e-3 --critic_lr 1e-3 --out {w}/policy")
    check_policy(f"{w}/sft", f"{w}/policy", tied)
    check_loop(w / "policy", f"{w}/first")


def check_loop(policy, reward_model: str) -> None:
    """The first rollouts come from the reference itself, and are scored by the reward model as anybody scores them."""
    log, rollouts = (data.read_jsonl(policy / f"{name}.jsonl") for name in ("log", "rollouts"))
    assert log[0]["objective/kl"] == pytest.approx(0, abs=1e-4) and abs(log[1]["objective/kl"]) > 1e-4
    first = rollouts[0]
    texts = [(prompt, response) for prompt, group in zip(first["prompts"], first["responses"]) for response in group]
    want = rm.score(*rm.load_reward_model(reward_model), *map(list, zip(*texts)))
    assert sum(first["scores"], []) == pytest.approx(want.tolist(), abs=1e-5)


def test_an_encoder_is_a_reward_model_of_a_decoder(files, tmp_path):
    """BERT through rm.py and metarm.py, then as the reward model of a Llama that has other tokens."""
    tokenizer = make_tokenizer(encoder=True, eos="[SEP]")
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64)).save_pretrained(tmp_path / "bert")
    policy = make_policy(tmp_path / "policy", padding_side="left")
    run(ppo, f"sample --model {policy} --prompts {files}/pairs.jsonl --k 2 --max_new_tokens 6 --out {tmp_path}/meta")
    reward_models(f"{tmp_path}/bert", f"{tmp_path}/meta/samples.jsonl", files, tmp_path)
    run(ppo, f"ppo --model {policy} --reward_model {tmp_path}/first --prompts {files}/pairs.jsonl --steps 2 --batch_size 8 "
             f"--scale_prompts 4 --max_new_tokens 6 --lr 1e-3 --critic_lr 1e-3 --out {tmp_path}/ppo")
    check_policy(policy, f"{tmp_path}/ppo", tied=False)
    check_loop(tmp_path / "ppo", f"{tmp_path}/first")


class LowRank(torch.nn.Module):
    """A frozen linear layer, plus a trained product of two thin matrices: y = W x + B A x, B = 0 at the start."""

    def __init__(self, frozen: torch.nn.Linear):
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.randn(2, frozen.in_features) / 4)
        self.B = torch.nn.Parameter(torch.zeros(frozen.out_features, 2))

    def forward(self, x):
        return self.frozen(x) + x @ self.A.T @ self.B.T


@pytest.mark.parametrize("order", ["first", "exact"])
def test_a_lora_like_model(tmp_path, order):
    """Everything frozen but thin matrices beside it and the head: metarm_step on rm.pair_loss trains just these, and
    its first order is the lookahead's step."""
    model, tokenizer = rm.load_reward_model(make_policy(tmp_path / "m", "qwen2"), seed=0)
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.mlp.up_proj = LowRank(layer.self_attn.q_proj), LowRank(layer.mlp.up_proj)
    model.score.requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 + 1 and sum(p.numel() for p in trained.values()) < 0.2 * model.num_parameters()
    before, other = {name: x.clone() for name, x in model.state_dict().items()}, copy.deepcopy(model)
    pairs = rm.encode_pairs(model, tokenizer, PAIRS, 0, "pairs")

    def L(forward):
        return rm.pair_loss(forward, model, tokenizer, pairs)

    def J(forward):  # the two responses of each pair, unlabelled
        return metarm.difference_loss(rm.rewards_of(forward, model, tokenizer, pairs).view(-1, 2))

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    infos = [metarm.metarm_step(model, optimizer, L, J, eta=0.1, order=order, normalize=True) for _ in range(8)]
    after = model.state_dict()
    assert {name for name, x in before.items() if not torch.equal(x, after[name])} == set(trained)
    assert infos[-1]["vanilla_loss_adapted"] < infos[0]["vanilla_loss_adapted"] - 0.05

    if order == "first":
        theirs = [p for p in other.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0)
        for _ in range(8):
            optimizer.zero_grad()
            metarm.difference_loss(rm.rewards_of(other, other, tokenizer, pairs).view(-1, 2)).backward()
            with metarm.lookahead(other, 0.1, normalize=True):
                rm.pair_loss(other, other, tokenizer, pairs).backward()
            optimizer.step()
        assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(trained.values(), theirs))
