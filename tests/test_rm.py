"""rm.py: the loss in closed form, one encoding for all, scores that depend on nothing but the text."""

import json
import math
import shutil

import pytest
import torch
import transformers

import data
import ppo
import rm
from conftest import ARCHITECTURES, make_policy, make_tokenizer

PROMPTS = ["Human: my phone is broken", "Human: help", "Human: the parcel is late and the invoice is wrong, please help"]
RESPONSES = [" Sorry, we will send a new phone today.", "", " thank you"]


def test_preference_loss_closed_form_and_extremes():
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    want = sum(-math.log(1 / (1 + math.exp(-m))) for m in (1.0, 0.0, -1.0)) / 3
    assert rm.preference_loss(chosen, rejected).item() == pytest.approx(want)
    far = torch.tensor([0.0], requires_grad=True)
    loss = rm.preference_loss(far, torch.tensor([1000.0]))
    loss.backward()
    assert loss.item() == pytest.approx(1000.0) and far.grad.item() == pytest.approx(-1.0)
    assert rm.preference_loss(torch.tensor([1000.0]), torch.tensor([0.0])).item() == 0.0


def test_preference_loss_gradient_weights_a_pair_by_its_error():
    chosen = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 0.4], dtype=torch.float64)
    rm.preference_loss(chosen, rejected).backward()
    for i in range(2):
        margin = chosen[i].item() - rejected[i].item()
        assert chosen.grad[i].item() == pytest.approx(-(1 - 1 / (1 + math.exp(-margin))) / 2)


@pytest.mark.parametrize("a, b", [((3,), (4,)), ((3, 1), (3, 1)), ((), ()), ((0,), (0,))])
def test_preference_loss_wrong_shapes(a, b):
    with pytest.raises(ValueError, match="shape"):
        rm.preference_loss(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize("options, first", [({}, []), ({"bos": "<bos>"}, ["<bos>"]), ({"bos": "<eos>"}, ["<eos>"]),
                                            ({"encoder": True, "eos": "[SEP]"}, ["[CLS]"]), ({"pad": None}, [])])
def test_encode_puts_specials_once_and_ends_with_eos(options, first):
    tokenizer = make_tokenizer(**options)
    prompt_ids, response_ids = rm.encode(tokenizer, PROMPTS[0], RESPONSES[0])
    assert tokenizer.convert_ids_to_tokens(prompt_ids[:len(first)]) == first
    assert tokenizer.decode(prompt_ids[len(first):]) == PROMPTS[0]
    assert tokenizer.decode(response_ids[:-1]) == RESPONSES[0]
    assert response_ids[-1] == rm.end_id(tokenizer) and rm.end_id(tokenizer) not in response_ids[:-1]
    assert rm.encode(tokenizer, PROMPTS[0], "")[1] == [rm.end_id(tokenizer)]


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="EOS"):
        rm.encode(tokenizer, "a", "b")


@pytest.mark.parametrize("options", [{}, {"pad": None}, {"pad": "<eos>"}, {"pad": None, "padding_side": "left"},
                                     {"bos": "<bos>", "padding_side": "left"}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_do_not_depend_on_padding_order_or_company(tmp_path, architecture, options):
    """Against the trunk and the head applied by hand to each row alone, without any padding."""
    model, tokenizer = rm.load_reward_model(make_policy(tmp_path / "m", architecture, **options), seed=1)
    assert tokenizer.pad_token_id != rm.end_id(tokenizer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("score"):
                p.mul_(20)  # rewards of the order of 1
        want = []
        for prompt, response in zip(PROMPTS, RESPONSES):
            a, b = rm.encode(tokenizer, prompt, response)
            want.append(model.score(model.base_model(torch.tensor([a + b])).last_hidden_state[0, -1]).item())
    for batch_size in (1, 2, 64):
        assert rm.score(model, tokenizer, PROMPTS, RESPONSES, batch_size).tolist() == pytest.approx(want, abs=1e-5)
    flipped = rm.score(model, tokenizer, PROMPTS[::-1], RESPONSES[::-1])
    assert flipped.tolist() == pytest.approx(want[::-1], abs=1e-5) and flipped.dtype == torch.float32


def test_an_encoder_reward_model(tmp_path):
    tokenizer = make_tokenizer(encoder=True, eos="[SEP]")
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=48, max_position_embeddings=64)
    torch.manual_seed(0)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model, tokenizer = rm.load_reward_model(str(tmp_path / "m"), seed=0)
    together = rm.score(model, tokenizer, PROMPTS, RESPONSES)
    alone = [rm.score(model, tokenizer, [x], [y]).item() for x, y in zip(PROMPTS, RESPONSES)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_score_leaves_the_mode_and_refuses_what_it_cannot_hold(tmp_path):
    model, tokenizer = rm.load_reward_model(make_policy(tmp_path / "m"), seed=0)
    model.train()
    rm.score(model, tokenizer, PROMPTS, RESPONSES)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert len(rm.score(model, tokenizer, [], [])) == 0
    with pytest.raises(ValueError, match="row 1: .* positions"):
        rm.score(model, tokenizer, ["my phone " * 200], [""])
    with pytest.raises(ValueError, match="as many"):
        rm.score(model, tokenizer, ["a"], [])


def test_same_seed_same_head_and_reload_gives_the_same_scores(tmp_path):
    folder = make_policy(tmp_path / "m", pad=None)
    a, tokenizer = rm.load_reward_model(folder, seed=3)
    b, _ = rm.load_reward_model(folder, seed=3)
    c, _ = rm.load_reward_model(folder, seed=4)
    assert torch.equal(a.score.weight, b.score.weight) and not torch.equal(a.score.weight, c.score.weight)
    rm.save_model(a, tokenizer, tmp_path / "rm")
    again, again_tokenizer = rm.load_reward_model(str(tmp_path / "rm"))  # a trained head: no seed needed
    assert torch.equal(rm.score(a, tokenizer, PROMPTS, RESPONSES), rm.score(again, again_tokenizer, PROMPTS, RESPONSES))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")  # as anybody would load it
    assert plain.config.num_labels == 1 and plain.config.pad_token_id == again_tokenizer.pad_token_id


def test_rewards_leave_in_float32_under_bf16(tmp_path):
    """Two responses closer than bf16 can tell apart still get different rewards, and J has a gradient."""
    model, tokenizer = rm.load_reward_model(make_policy(tmp_path / "m"), seed=0)
    groups = [(rm.encode(tokenizer, x, y),) for x, y in zip(PROMPTS, RESPONSES)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rewards = rm.rewards_of(model, model, tokenizer, groups)
    assert rewards.dtype == torch.float32 and (rewards != rewards.bfloat16().float()).any()
    assert rm.rewards_of(model.bfloat16(), model, tokenizer, groups).dtype == torch.float32
    assert rm.rewards_of(model.double(), model, tokenizer, groups).dtype == torch.float64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shared_prompt_gives_the_rewards_and_gradients_of_plain_rows(tmp_path, architecture, monkeypatch):
    """Uneven groups, an empty response among them, in float64; plain rows are the reference."""
    model, tokenizer = rm.load_reward_model(make_policy(tmp_path / "m", architecture, padding_side="left"), seed=0)
    model.double()
    groups = [tuple(rm.encode(tokenizer, PROMPTS[0], y) for y in RESPONSES), (rm.encode(tokenizer, PROMPTS[1], " a b"),),
              tuple(rm.encode(tokenizer, PROMPTS[2], y) for y in RESPONSES[:2])]
    results = []
    for share in (set(), rm.SHARE_PROMPTS):
        monkeypatch.setattr(rm, "SHARE_PROMPTS", share)
        model.zero_grad()
        rewards = rm.rewards_of(model, model, tokenizer, groups)
        (rewards * torch.arange(1.0, 7.0)).sum().backward()
        results.append((rewards.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (plain, plain_grads), (shared, shared_grads) = results
    assert model.config.model_type in rm.SHARE_PROMPTS
    assert torch.allclose(plain, shared, atol=1e-6)  # RMSNorm and softmax compute in float32 inside transformers
    for name in plain_grads:
        assert torch.allclose(plain_grads[name], shared_grads[name], atol=1e-4, rtol=1e-4), name

@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    words = "phone parcel invoice charge".split()
    rows = [{"prompt": f"Human: my {words[i % 4]} {i}", "chosen": " thank you, we refund", "rejected": " Sorry"}
            for i in range(24)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    data.write_jsonl(path, rows)
    return str(path)


def test_training_learns_micro_batches_change_nothing_and_a_second_call_is_skipped(tmp_path, policy_folder, pairs_file, capsys):
    flags = ["--model", policy_folder, "--data", pairs_file, "--eval_data", pairs_file, "--lr", "1e-3", "--batch_size", "8",
             "--epochs", "3", "--log_every", "4"]
    assert rm.main([*flags, "--out", f"{tmp_path}/a"]) == 0
    assert rm.main([*flags, "--out", f"{tmp_path}/b", "--micro_batch_size", "3"]) == 0
    log = data.read_jsonl(tmp_path / "a/log.jsonl")
    assert log[0]["steps"] == 9 and log[-1]["step"] == 9 and log[-1]["accuracy"] == 1.0
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=0.1) and log[-2]["loss"] < 0.4
    a, b = (rm.load_reward_model(f"{tmp_path}/{x}")[0].state_dict() for x in "ab")
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    stamp = (tmp_path / "a/model.safetensors").stat().st_mtime_ns
    assert rm.main([*flags, "--out", f"{tmp_path}/a"]) == 0
    assert (tmp_path / "a/model.safetensors").stat().st_mtime_ns == stamp and "skipped" in capsys.readouterr().out


def test_the_first_step_is_the_step_of_adamw_on_eq_1(tmp_path, policy_folder, pairs_file):
    """One step of the command = AdamW on the loss written out by hand, without rm.py's batching."""
    assert rm.main(["--model", policy_folder, "--data", pairs_file, "--out", f"{tmp_path}/a", "--lr", "1e-3",
                    "--batch_size", "24", "--micro_batch_size", "24", "--max_grad_norm", "1e9"]) == 0
    model, tokenizer = rm.load_reward_model(policy_folder, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    loss = 0
    for pair in data.read_preferences(pairs_file):
        r = []
        for side in ("chosen", "rejected"):
            ids = tokenizer(pair["prompt"] + pair[side] + "<eos>").input_ids
            r.append(model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1])[0])
        loss = loss + torch.log1p(torch.exp(r[1] - r[0])) / 24
    loss.backward()
    optimizer.step()
    trained = rm.load_reward_model(f"{tmp_path}/a")[0].state_dict()
    # AdamW's first step is +-lr a weight: compare where the gradient is not rounding noise
    for name, p in model.named_parameters():
        solid = p.grad.abs() > 1e-6
        assert torch.allclose(trained[name][solid], p.detach()[solid], atol=2e-5), name


def test_mistakes_get_one_line_and_leave_nothing(tmp_path, policy_folder, pairs_file, capsys):
    broken = tmp_path / "nan"
    shutil.copytree(policy_folder, broken)
    model = transformers.AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = math.nan
    model.save_pretrained(broken)
    cut = tmp_path / "cut"
    shutil.copytree(policy_folder, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    other = tmp_path / "other-tokenizer"
    shutil.copytree(policy_folder, other)
    config = json.loads((other / "config.json").read_text())
    small = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**config, "vocab_size": 60}))
    small.save_pretrained(other)
    base = {"--model": policy_folder, "--data": pairs_file, "--out": f"{tmp_path}/x"}
    for change, word in [({"--model": str(broken)}, "NaN"), ({"--model": str(cut)}, "cannot be loaded"),
                         ({"--model": str(tmp_path)}, "lies in --model"), ({"--model": "no/such/folder"}, "no such model folder"),
                         ({"--model": str(other)}, "do not belong together"), ({"--data": "nowhere.jsonl"}, "nowhere.jsonl"),
                         ({"--batch_size": "99"}, "--batch_size"), ({"--lr": "1e30", "--max_grad_norm": "1e9"}, "--lr"),
                         ({"--lr": "fast"}, "--lr"), ({"--nonsense": "1"}, "--nonsense"), ({"--max_length": "1"}, "--max_length")]:
        argv = [word_ for pair in {**base, **change}.items() for word_ in pair]
        assert rm.main([*argv, *([] if "--batch_size" in change else ["--batch_size", "8"])]) != 0, change
        err = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(err) == 1 and word in err[0], (change, err)
        assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_max_length_drops_and_counts(tmp_path, policy_folder, pairs_file, capsys):
    model, tokenizer = rm.load_reward_model(policy_folder, seed=0)
    pairs = data.read_preferences(pairs_file)
    long = {"prompt": "Human: " + "the parcel is late " * 40, "chosen": " a", "rejected": " b"}
    with pytest.raises(ValueError, match="row 25: .* positions"):
        rm.encode_pairs(model, tokenizer, pairs + [long], 0, "pairs.jsonl")
    assert len(rm.encode_pairs(model, tokenizer, pairs + [long], 100, "pairs.jsonl")) == 24
    assert "1 of 25" in capsys.readouterr().err


def test_a_frozen_backbone_trains_the_head_alone(tmp_path, policy_folder, pairs_file):
    model, tokenizer = rm.load_reward_model(policy_folder, seed=0)
    for p in model.base_model.parameters():
        p.requires_grad_(False)
    pairs = rm.encode_pairs(model, tokenizer, data.read_preferences(pairs_file), 0, "pairs")
    rm.pair_loss(model, model, tokenizer, pairs).backward()
    assert model.score.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.base_model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_scores_equal_the_cpus_and_training_runs(tmp_path, policy_folder, pairs_file):
    model, tokenizer = rm.load_reward_model(policy_folder, seed=0)
    want = rm.score(model, tokenizer, PROMPTS, RESPONSES)
    assert rm.score(model.cuda(), tokenizer, PROMPTS, RESPONSES).tolist() == pytest.approx(want.tolist(), abs=1e-4)
    assert rm.main(["--model", policy_folder, "--data", pairs_file, "--out", f"{tmp_path}/a", "--batch_size", "8"]) == 0


def test_weighted_preference_loss_against_a_loop():
    chosen, rejected, weights = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.5, 3.0]), torch.tensor([2.0, 0.0, 0.5])
    want = sum(w * math.log(1 + math.exp(r - c)) for c, r, w in zip(*(x.tolist() for x in (chosen, rejected, weights)))) / 3
    assert rm.preference_loss(chosen, rejected, weights).item() == pytest.approx(want)
    assert rm.preference_loss(chosen, rejected, torch.ones(3)) == rm.preference_loss(chosen, rejected)
    for wrong in (torch.ones(2), torch.ones(3, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="shape"):
            rm.preference_loss(chosen, rejected, wrong)


def test_ocrm_weights_against_a_loop(tmp_path, policy_folder, pairs_file, capsys):
    """Each log-probability token by token from the model itself, one row at a time; then the formula as it stands."""
    other = make_policy(tmp_path / "other", seed=3)
    pairs = data.read_preferences(pairs_file)[:5]

    def log_probability(folder, prompt, response):
        model, tokenizer = ppo.load_policy(folder)
        a, b = rm.encode(tokenizer, prompt, response)
        with torch.no_grad():
            logs = model(torch.tensor([a + b])).logits[0].double().log_softmax(dim=1)
        return sum(logs[len(a) + i - 1, token].item() for i, token in enumerate(b))

    for tau in (0.0, 0.01, 1.0):
        want = [math.exp(tau * sum(log_probability(other, pair["prompt"], pair[side])
                                   - log_probability(policy_folder, pair["prompt"], pair[side])
                                   for side in ("chosen", "rejected"))) for pair in pairs]
        want = [w / (sum(want) / len(want)) for w in want]
        assert rm.pair_weights(pairs, other, policy_folder, tau, 2).tolist() == pytest.approx(want, rel=1e-3)

    flags = ["--model", policy_folder, "--data", pairs_file, "--batch_size", "8", "--lr", "1e-3"]
    trained = {}
    for name, added in (("plain", []), ("flat", ["--tau", "0"]), ("ocrm", ["--tau", "1"])):
        added = added and [*added, "--weight_by", other, "--ref_policy", policy_folder, "--micro_batch_size", "3"]
        assert rm.main([*flags, *added, "--out", f"{tmp_path}/{name}"]) == 0
        trained[name] = torch.cat([p.flatten() for p in rm.load_reward_model(f"{tmp_path}/{name}")[0].parameters()])
    assert torch.allclose(trained["plain"], trained["flat"], atol=1e-4)        # tau = 0: every weight is 1
    assert not torch.allclose(trained["plain"], trained["ocrm"], atol=1e-4)
    assert "worth" in capsys.readouterr().out
    assert rm.main([*flags, "--ref_policy", policy_folder, "--out", f"{tmp_path}/x"]) == 2
    assert "--weight_by" in capsys.readouterr().err
