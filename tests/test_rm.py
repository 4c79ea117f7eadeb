"""rm.py: the loss in closed form, one encoding, scores that depend on the text alone."""

import argparse
import json
import math
from unittest import mock

import conftest
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SMALL, make_pairs, make_policy, make_tokenizer, save, write_rows

import data
import ppo
import rm

LONG = "Human: the parcel is late and the invoice is wrong, please help"
PROMPTS = ["Human: my phone is broken", "Human: help", LONG]
SHAPES = [[(3,), (4,)], [(3, 1), (3, 1)], [(), ()], [(0,), (0,)], [(3,), (3,), (2,)]]
RESPONSES = [" Sorry, we will send a new phone today.", "", " thank you"]


def test_preference_loss_closed_form_and_extremes():
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.5, 3.0])
    weights = torch.tensor([2.0, 0.0, 0.5])
    each = [math.log(1 + math.exp(-m)) for m in (chosen - rejected).tolist()]
    assert rm.preference_loss(chosen, rejected).item() == pytest.approx(sum(each) / 3)
    want = sum(w * x for w, x in zip(weights.tolist(), each, strict=True)) / 3
    assert rm.preference_loss(chosen, rejected, weights).item() == pytest.approx(want)
    far = torch.tensor([0.0], requires_grad=True)
    loss = rm.preference_loss(far, torch.tensor([1000.0]))
    loss.backward()
    assert loss.item() == pytest.approx(1000.0) and far.grad.item() == pytest.approx(-1.0)
    assert rm.preference_loss(torch.tensor([1000.0]), torch.tensor([0.0])).item() == 0.0
    # The weight of a pair in the gradient is its error, 1 - sigma(margin).
    chosen = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 0.4], dtype=torch.float64)
    rm.preference_loss(chosen, rejected).backward()
    want = [-(1 - 1 / (1 + math.exp(-m))) / 2 for m in (chosen - rejected).tolist()]
    assert chosen.grad.tolist() == pytest.approx(want)
    for shapes in SHAPES:
        with pytest.raises(ValueError, match="shape"):
            rm.preference_loss(*map(torch.zeros, shapes))


SPECIALS = [({}, ""), ({"pad": None}, ""), ({"bos": "<bos>"}, "<bos>"), ({"bos": "<eos>"}, "<eos>")]
SPECIALS += [({"encoder": True, "eos": "[SEP]"}, "[CLS]")]


@pytest.mark.parametrize("options, first", SPECIALS)
def test_encode_puts_specials_once_and_ends_with_eos(options, first):
    tokenizer = make_tokenizer(**options)
    end = rm.end_id(tokenizer)
    first_ids = tokenizer.convert_tokens_to_ids([first] if first else [])
    for prompt in (PROMPTS[0], first + PROMPTS[0]):  # a chat template writes BOS itself
        prompt_ids, response_ids = rm.encode(tokenizer, prompt, RESPONSES[0])
        assert prompt_ids[: len(first_ids)] == first_ids
        assert tokenizer.decode(prompt_ids[len(first_ids) :]) == PROMPTS[0]
        assert tokenizer.decode(response_ids[:-1]) == RESPONSES[0]
        assert response_ids[-1] == end and end not in response_ids[:-1]
    assert rm.encode(tokenizer, PROMPTS[0], "")[1] == [end]
    tokenizer.eos_token = tokenizer.sep_token = None
    with pytest.raises(data.Mistake, match="EOS"):
        rm.encode(tokenizer, "a", "b")


def test_score_leaves_the_mode_and_takes_as_many_prompts_as_responses(policy_folder):
    model, tokenizer = rm.load_reward_model(policy_folder, seed=0)
    model.train()
    rm.score(model, tokenizer, PROMPTS, RESPONSES)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert len(rm.score(model, tokenizer, [], [])) == 0
    with pytest.raises(ValueError):
        rm.score(model, tokenizer, ["a"], [])
    torch.nn.init.constant_(model.score.weight, torch.nan)
    with pytest.raises(data.Mistake, match="NaN or infinite rewards"):
        rm.score(model, tokenizer, ["a"], ["b"])


def test_rewards_leave_in_float32_under_bf16(policy_folder):
    model, tokenizer = rm.load_reward_model(policy_folder, seed=0)
    groups = [[rm.encode(tokenizer, x, y)] for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rewards = rm.rewards_of(model, model, tokenizer, groups)
    assert rewards.dtype == torch.float32 and (rewards != rewards.bfloat16().float()).any()
    for dtype, wide in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        assert rm.rewards_of(model.to(dtype), model, tokenizer, groups).dtype == wide


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_read_once_gives_the_rewards_and_gradients_of_plain_rows(tmp_path, architecture):
    folder = make_policy(tmp_path / "m", architecture, padding_side="left")
    model, tokenizer = rm.load_reward_model(folder, seed=0)
    assert model.shares_prompts  # found by the trial at load
    model.double()
    texts = [(PROMPTS[0], RESPONSES), (PROMPTS[1], [" a b"]), (PROMPTS[2], RESPONSES[:2])]
    groups, results = [[rm.encode(tokenizer, x, y) for y in ys] for x, ys in texts], []
    for model.shares_prompts in (False, True):
        model.zero_grad()
        rewards = rm.rewards_of(model, model, tokenizer, groups)
        (rewards * torch.arange(1.0, 7.0)).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((rewards.detach(), grads))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-4)


def encoder(folder, kind="Bert", auto="AutoModelForMaskedLM", **options):
    tokenizer = make_tokenizer(encoder=True, eos="[SEP]")
    settings = {**SMALL, "max_position_embeddings": 64, "vocab_size": len(tokenizer), **options}
    return save(folder, auto, getattr(transformers, f"{kind}Config")(**settings), tokenizer)


def alone_as_together(folder, positions: int):
    model, tokenizer = rm.load_reward_model(folder, seed=0)
    together = rm.score(model, tokenizer, PROMPTS, RESPONSES)
    alone = rm.score(model, tokenizer, PROMPTS, RESPONSES, batch_size=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3 * alone.std().item())
    assert rm.positions(model) == positions
    return model, tokenizer


ENCODERS = [("Bert", {}, 64), ("Electra", {"embedding_size": 16}, 64)]
ENCODERS += [("Roberta", {"max_position_embeddings": 34, "pad_token_id": 1}, 32)]
ENCODERS += [("ModernBert", {"pad_token_id": 2}, 64)]


@pytest.mark.parametrize("kind, options, positions", ENCODERS)
def test_encoders_are_taken_up_to_their_last_position(tmp_path, kind, options, positions):
    """Of a masked language model's checkpoint, which has weights that a reward model has not."""
    folder = encoder(tmp_path / "m", kind, **options)
    model, tokenizer = alone_as_together(folder, positions)
    longest = "!" * (positions - 3)  # with [CLS], "a" and [SEP]
    assert len(sum(rm.encode(tokenizer, "a", longest), [])) == positions
    assert torch.isfinite(rm.score(model, tokenizer, ["a"], [longest])).all()
    with pytest.raises(data.Mistake, match=f"{positions + 1} tokens.* {positions} positions"):
        rm.score(model, tokenizer, ["a"], [longest + "!"])


def test_an_image_and_text_model_is_right(tmp_path):
    alone_as_together(conftest.make_image_and_text(tmp_path / "m", pad="<eos>"), 128)


def refused(folder, *words, seed=0):
    with pytest.raises(data.Mistake) as error:
        rm.load_reward_model(folder, seed=seed)
    assert str(error.value).startswith(folder) and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_models_that_misread_padded_rows_are_refused(tmp_path):
    refused(encoder(tmp_path / "fnet", "FNet"), "padded row", "FNetForSequence")
    tokenizer = make_tokenizer()
    config = transformers.XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=4)
    xlnet = save(tmp_path / "xlnet", "AutoModelForCausalLM", config, tokenizer)
    refused(xlnet, "padded row", "XLNetForSequence")


@pytest.mark.parametrize("head", "value_head v_head.summary reward_head reward_predictor".split())
def test_a_head_of_another_name_is_not_dropped(tmp_path, head):
    folder = make_policy(tmp_path / "m")
    conftest.change_weights(folder, lambda weights: weights | {f"{head}.weight": torch.ones(1, 32)})
    for seed in (0, None):  # as --model, and as judge
        refused(folder, f"{head}.weight", seed=seed)


def test_broken_folders_are_refused(tmp_path):
    folder, config = make_policy(tmp_path / "m"), tmp_path / "m/config.json"
    settings = config.read_text()
    config.write_text(json.dumps(json.loads(settings) | {"intermediate_size": 64}))
    refused(folder, "mlp.down_proj.weight", "another shape")
    config.write_text(settings)
    norm = "model.norm.weight"
    conftest.change_weights(folder, lambda w: {key: x for key, x in w.items() if key != norm})
    refused(folder, norm, "missing")
    (tmp_path / "m/model.safetensors").write_bytes(b"?" * 1000)
    refused(folder, "not a whole")


def test_loading_seeds_the_head_alone_and_leaves_attention_without_cudnn(
    policy_folder, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", pytest.fail)
    torch.backends.cuda.enable_cudnn_sdp(True)
    a, b, c = (rm.load_reward_model(policy_folder, seed=i)[0].score.weight for i in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


@pytest.mark.cuda
def test_on_cuda_policies_are_read_in_bf16_and_reward_models_in_float32():
    x = torch.ones(2, 2, device="cuda")
    for bf16, dtype in [(True, torch.bfloat16), (False, torch.float32)]:
        with rm.autocast(x.device, bf16):
            assert (x @ x).dtype == dtype
    assert not torch.backends.cuda.matmul.allow_tf32


def test_on_a_gpu_prompts_are_read_once_where_it_saves_much():
    for device, saved, want in [("cpu", 0, True), ("cuda", 2047, False), ("cuda", 2048, True)]:
        model = argparse.Namespace(shares_prompts=True, device=torch.device(device))
        assert rm.shares_prompts(model, saved) == want


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")


def test_out_of_memory_is_told_with_stage_and_fix(tmp_path, toy, capsys):
    flags = f"--model {toy}/policy --data {toy}/pairs.jsonl --micro_batch_size 8 --out {tmp_path}/x"
    for module, mode, place in [(rm, "", "fit"), (ppo, "sft ", "fit"), (ppo, "dpo ", "try_out")]:
        with mock.patch.object(rm, place, side_effect=NO_MEMORY):
            assert module.main((mode + flags).split()) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        for words in (f"{mode}--out {tmp_path}/x", "out of memory", "lower --micro_batch_size 8"):
            assert words in error, error


def test_what_out_of_memory_is(policy_folder):
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    caused = data.Mistake("not a whole checkpoint")
    caused.__cause__ = MemoryError()
    assert all(map(data.out_of_memory, [error.value, NO_MEMORY, caused, caused.__cause__]))
    said = [data.Mistake("row 3: 'my phone is out of memory'"), RuntimeError("shapes differ")]
    assert not any(map(data.out_of_memory, said))
    # The trial at load blames neither the model nor its cache.
    model, tokenizer = rm.load_reward_model(policy_folder, seed=0)
    rewards = [*torch.randn(4).split(1), None]
    rewards[4] = torch.cat(rewards[:4])
    for calls in (0, 5):  # memory is full at the first row alone; where prompts are read once
        answer = mock.Mock(side_effect=[*rewards[:calls], NO_MEMORY])
        with pytest.raises(torch.OutOfMemoryError):
            rm.try_out(model, tokenizer, policy_folder, answer)


def test_training_learns_and_micro_batches_change_nothing(tmp_path, policy_folder, monkeypatch):
    waits, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda x: waits.append(1) or item(x))
    pairs = write_rows(tmp_path / "pairs.jsonl", make_pairs(24))
    flags = ["--model", policy_folder, "--data", pairs, "--eval_data", pairs]
    flags += ["--lr", "1e-3", "--batch_size", "8", "--epochs", "3", "--log_every", "4"]
    assert rm.main([*flags, "--out", f"{tmp_path}/a"]) == 0
    once = len(waits)
    assert rm.main([*flags, "--out", f"{tmp_path}/b", "--micro_batch_size", "3"]) == 0
    assert len(waits) == 2 * once  # a step waits for the device as often with many micro-batches
    log = data.read_jsonl(tmp_path / "a/log.jsonl")
    assert log[0]["steps"] == 9 and [row["step"] for row in log] == list(range(10))
    assert [row["step"] for row in log if "accuracy" in row] == [0, 4, 8, 9]
    assert log[-1]["accuracy"] == 1.0 and log[-2]["loss"] < 0.4
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=0.1)
    a, b = (conftest.weights_of(tmp_path / x) for x in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_the_first_step_is_the_step_of_adamw_on_eq_1(tmp_path, policy_folder):
    pairs = write_rows(tmp_path / "pairs.jsonl", make_pairs(24))
    flags = ["--model", policy_folder, "--data", pairs, "--out", f"{tmp_path}/a"]
    flags += ["--lr", "1e-3", "--batch_size", "24", "--micro_batch_size", "24"]
    assert rm.main([*flags, "--max_grad_norm", "1e9"]) == 0
    model, tokenizer = rm.load_reward_model(policy_folder, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    margins = []
    for pair in make_pairs(24):
        texts = [pair["prompt"] + pair[side] + "<eos>" for side in ("chosen", "rejected")]
        rows = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
        chosen, rejected = (model(row).logits[0, 0] for row in rows)
        margins.append(chosen - rejected)
    loss = torch.log1p(torch.exp(-torch.stack(margins))).mean()
    loss.backward()
    optimizer.step()
    trained = conftest.weights_of(tmp_path / "a")
    # AdamW's first step is +-lr per weight: compare where the gradient is not rounding noise.
    for name, p in model.named_parameters():
        solid = p.grad.abs() > 1e-6
        torch.testing.assert_close(trained[name][solid], p.detach()[solid], rtol=0, atol=2e-5)


def test_max_length_drops_and_counts(policy_folder, capsys):
    model, tokenizer = rm.load_reward_model(policy_folder, seed=0)
    long = {"prompt": "the parcel is late " * 40, "chosen": " a", "rejected": " b"}
    pairs = [*make_pairs(3), long]
    kept, groups = rm.encode_groups(model, tokenizer, pairs, "D.jsonl", max_length=100)
    assert kept == pairs[:3] and "dropped 1 of 4 rows" in capsys.readouterr().err
    sides = (pairs[0]["chosen"], pairs[0]["rejected"])
    assert groups[0] == [rm.encode(tokenizer, pairs[0]["prompt"], side) for side in sides]
    with pytest.raises(data.Mistake, match="no row fits"):
        rm.encode_groups(model, tokenizer, pairs, "D.jsonl", max_length=2)


def test_epoch_batches_hold_each_row_once_and_like_lengths_together():
    lengths = torch.randint(1, 100, (83,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(rm.epoch_batches(lengths, 4, seed=1))
    assert [len(batch) for batch in batches] == [4] * 20 and len(set(sum(batches, []))) == 80
    again, other = (list(rm.epoch_batches(lengths, 4, seed)) for seed in (1, 2))
    assert batches == again != other
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / 20 < 15  # unsorted: about 60
