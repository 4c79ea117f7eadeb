"""eval.py: each measure against a plain loop or a closed form; reports of made-up runs."""

import itertools
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_policy, write_rows

import data
import eval as report  # `eval` itself is a builtin
import ppo
import rm


def random_set(seed=0, m=40, k=5, noise=1.0):
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=(m, k))
    return gold + noise * rng.normal(size=(m, k)), gold


def pairs_of(rewards, gold):
    for r, g in zip(rewards, gold, strict=True):
        for i, j in itertools.combinations(range(len(r)), 2):
            yield r[i] - r[j], g[i] - g[j]


@pytest.mark.parametrize("tie", [0.0, 0.3])
def test_pair_accuracy_is_the_plain_loop(tie):
    rewards, gold = random_set()
    rewards[3], gold[4] = 1.0, 2.0  # equal rewards count half; gold ties are out even at tie = 0
    used = [(r, g) for r, g in pairs_of(rewards, gold) if abs(g) >= tie and g]
    right = sum(0.5 if r == 0 else float((r > 0) == (g > 0)) for r, g in used)
    found = report.pair_accuracy(rewards, gold, tie)
    assert found == (pytest.approx(right / len(used)), len(used))
    assert math.isnan(report.pair_accuracy(np.ones((2, 3)), np.ones((2, 3)))[0])


def test_matched_accuracy_is_the_plain_loop():
    first, second, minimum = random_set(1), random_set(2, noise=2.0), 30
    first[1][3] = 2.0  # gold ties are in no bin, not even in the one that begins at 0
    edges, bins = [0.0, 0.5, 1.0, 2.0, 9.0], []
    for low, high in itertools.pairwise(edges):
        both = [[*pairs_of(*x)] for x in (first, second)]
        inside = [[p for p in some if p[1] and low <= abs(p[1]) < high] for some in both]
        if min(map(len, inside)) >= minimum:
            bins.append([(len(x), np.mean([(r > 0) == (g > 0) for r, g in x])) for x in inside])
    total = sum(a[0] for a, _ in bins)
    found = report.matched_accuracy(first, second, np.array(edges), minimum)
    assert found["first"] == pytest.approx(sum(a[0] / total * a[1] for a, _ in bins))
    assert found["second"] == pytest.approx(sum(a[0] / total * b[1] for a, b in bins))
    nothing = report.matched_accuracy(first, second, np.array(edges), minimum=10**6)
    assert math.isnan(nothing["first"]) and math.isnan(nothing["second"])


def test_spread_is_equation_2_and_the_variance_of_a_difference():
    rewards, _ = random_set()
    gaps = [abs(r) / 2 for r, _ in pairs_of(rewards, rewards)]
    eq2 = 2 / 5**2 * sum(1 / (1 + math.exp(-gap)) for gap in gaps) / len(rewards)
    variance = 2 * np.mean((rewards / 2).var(axis=1, ddof=1))  # Var(a - b) = 2 Var(a)
    expected = {"J": eq2, "margin": np.mean(gaps), "variance": variance}
    assert report.spread(rewards, 2.0) == pytest.approx(expected)


def test_rank_correlation():
    rewards, gold = random_set(3)  # no ties: the textbook formula 1 - 6 Σd² / k(k² - 1)
    ranks = [np.argsort(np.argsort(x)) for x in (rewards, gold)]
    rho = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum(axis=1) / (5 * 24)
    gold[0], rewards[1] = 1.0, 2.0  # constant: no correlation, left out
    found = report.rank_correlation(rewards, gold)
    assert found == (pytest.approx(rho[2:].mean()), len(rho) - 2)
    # Ties are averaged: Pearson's coefficient of the mean ranks.
    tied = report.rank_correlation([[1.0, 2.0, 2.0, 3.0]], [[1.0, 1.0, 2.0, 2.0]])
    assert tied[0] == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1.5, 1.5, 3.5, 3.5])[0, 1])


def test_win_tie_lose_is_symmetric_and_adds_up():
    (_, ours), (_, theirs) = random_set(4), random_set(5)
    there, back = (report.win_tie_lose(*x, 0.2) for x in ((ours, theirs), (theirs, ours)))
    assert there["win"] == back["lose"] == pytest.approx(100 * (ours - theirs >= 0.2).mean())
    assert sum(there.values()) == pytest.approx(100)
    assert report.win_tie_lose(ours, ours, 0.0) == {"win": 0, "tie": 100, "lose": 0}


def loop_bleu(hypothesis, references, n):
    logs, size = [], len(hypothesis)
    for order in range(1, min(n, size) + 1):
        grams = []
        for words in (hypothesis, *references):
            grams.append([tuple(words[i : i + order]) for i in range(len(words) - order + 1)])
        ours, *others = grams
        matched = sum(min(ours.count(g), max(x.count(g) for x in others)) for g in set(ours))
        logs.append(math.log((matched or 0.1) / len(ours)))
    closest = min((abs(len(words) - size), len(words)) for words in references)[1]
    return math.exp(min(0, 1 - closest / size) + sum(logs) / len(logs))


def test_bleu_is_the_plain_loop_and_diversity():
    rng = random.Random(0)
    for _ in range(50):
        texts = [rng.choices("abc", k=rng.randint(1, 9)) for _ in range(4)]
        found = report.bleu(texts[0], texts[1:])
        assert found == pytest.approx([loop_bleu(texts[0], texts[1:], n) for n in range(1, 6)])
    assert report.bleu([], [["a"]], 2) == [0, 0]
    assert report.bleu([], [["a"], []], 2) == [1, 1]
    groups, each = [["a b c", "a b d"], ["a b c", "e"]], []
    for one, other in [*groups, *(group[::-1] for group in groups)]:
        each += [loop_bleu(one.split(), [other.split()], n) for n in (2, 3, 4, 5)]
    assert report.self_bleu(groups) == pytest.approx(np.mean(each))


def made_up(m=300, k=4, gold_at_the_end=0.15, pairs=400):
    """RM0 sees gold in SFT's samples but hardly in PPO's, which it rates alike; MetaRM sees it."""
    rng = np.random.default_rng(0)
    shifts = {"sft": 0, "ppo-1": 0.1, "ppo-2": gold_at_the_end, "metarm-2": 0.6}
    gold = {name: rng.normal(size=(m, k)) + shift for name, shift in shifts.items()}
    scores = {("gold", name, "test"): x for name, x in gold.items()}
    for model in ("rm0", "metarm-2"):
        for policy, x in gold.items():
            stale = model == "rm0" and policy.startswith("ppo")
            noisy = x + (4.0 if stale else 0.3) * rng.normal(size=(m, k))
            shift = 2.0 * stale + 0.2 * (policy == "ppo-2")
            scores[model, policy, "test"] = (0.1 if stale else 1.0) * noisy + shift
    truth = rng.choice([1.0, 1.0, 1.0, -1.0], size=pairs)
    for model in ("gold", "rm0", "metarm-2"):
        margins = truth + (model != "gold") * rng.normal(size=pairs)
        scores[model, "D", "pairs"] = np.stack([margins, np.zeros(pairs)], 1)
    texts = {name: [[f"{name} {i} {j}" for j in range(k)] for i in range(m)] for name in shifts}
    responses = {(name, "test"): groups for name, groups in texts.items()}
    prompts = {"test": ["?"] * m, "pairs": ["?"] * pairs}
    return prompts, responses, scores, {}, {}, {}  # no rollouts, epochs, KL


def holds(results):
    return {what: row["holds"] for what, row in results["criteria"].items()}


def test_a_stale_rm_and_what_tells_better():
    results = report.measure(*made_up())
    untold = [what for what, held in holds(results).items() if held is None]
    assert len(untold) == 1 and "gold labels" in untold[0]  # no oracle
    assert results["rms"]["rm0"]["accuracy"]["shifted"] < 60
    assert results["rms"]["metarm-2"]["accuracy"]["shifted"] > 85
    against = results["policies"]["metarm-2"]["against"]
    assert against["SFT"]["win"] > 50 > against["SFT"]["lose"]
    assert set(against) == {"SFT", "PPO on RM0"}  # of the same round
    assert abs(results["ceiling"] - 75) < 6
    text = report.report(results, "")
    assert text.count("| yes |") == 10 and "**no**" not in text and "10 of 11 criteria" in text
    assert "what gold says" in text and "One seed proves nothing" in text


def test_a_healthy_rm():
    seen = made_up(gold_at_the_end=0.4)
    seen[2]["rm0", "ppo-2", "test"] = 3 * seen[2]["gold", "ppo-2", "test"]
    found = holds(report.measure(*seen))
    assert found["RM0 right on answers at the same gap by gold, %"] is False
    assert found["J of RM0"] is found["gold reward, SD (before: round 1)"] is False


def test_what_cannot_be_told():
    prompts, *seen = made_up()
    responses, scores = ({x: y for x, y in part.items() if "ppo-2" not in x} for part in seen[:2])
    scores["gold", "ppo-1", "test"] = np.ones((300, 4))
    results = report.measure(prompts, responses, scores, {}, {}, {})
    untold = " ".join(what for what, held in holds(results).items() if held is None)
    for what in ("RM0 right on answers", "a new RM", "the same over that by gold", "gold reward"):
        assert what in untold
    assert report.report(results, "").count("| – |\n") >= 4
    found = report.rounded({"a": [np.float64("nan"), math.inf, 2 / 3], "b": [None, "x", True, 7]})
    assert json.dumps(found) == '{"a": [null, null, 0.666667], "b": [null, "x", true, 7]}'


PROMPTS = {"test": data.all_prompts(data.SHOP_PROBLEMS)[:24]}
PROMPTS["ood"] = data.all_prompts(data.OOD_PROBLEMS)[:2]
WORDS = "sorry we will send you a new one today please wait for the refund".split()


def text_of(seed, length=9):
    rng = random.Random(str(seed))
    return " ".join(rng.choices(WORDS, k=rng.randint(2, length)))


class Fake(str):
    def to(self, device):
        return self


@pytest.fixture
def fake_run(tmp_path, monkeypatch):
    """A run folder, and whoever is asked to sample: "policies" babble, "RMs" count letters."""
    run, calls = tmp_path / "toy", []
    policies = ["sft", "dpo", *(f"{arm}-{r}/policy" for arm in report.COLOURS for r in (1, 2))]
    models = ["rm0", "oracle/rm", "metarm-2/adapted", "judge/rm"]
    models += [f"{arm}-{r}/rm" for arm in ("reseeded", "metarm") for r in (1, 2)]
    for name in ("data", "pairs", *policies, *models):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text("{}")
    for domain, prompts in PROMPTS.items():
        rows = [{"prompt": prompt} for prompt in prompts]
        write_rows(run / "data" / f"prompts-{domain}.jsonl", rows)
    sides = {"chosen": " thank you", "rejected": " no"}
    pairs = [{"prompt": prompt, **sides} for prompt in PROMPTS["test"]]
    write_rows(run / "pairs" / "valid.jsonl", pairs)
    write_rows(run / "rm0" / "log.jsonl", [{"step": 0, "accuracy": 0.5}, {"step": 1}])
    looks = [{"rise": x, "predicted_rise": 2 * x, "loss_change": -x} for x in (0.01, 0.03)]
    looks = [{"step": 0, "accuracy": 0.5} | row | {"first_order_gain": 12.0} for row in looks]
    write_rows(run / "metarm-2" / "rm" / "log.jsonl", [*looks, {"step": 1}])
    for name in policies[2:]:
        row = {"kl": 0.5, "prompts": PROMPTS["test"][:2], "scores": [[0.3, 1.0], [0.1, 2.0]]}
        row["responses"] = [[text_of(f"{i}{j}") for j in range(2)] for i in range(2)]
        write_rows(run / name / "rollouts.jsonl", [row, row | {"kl": 1.0}])

    def sample_responses(model, tokenizer, prompts, k, seed, **options):
        calls.append(model)
        return [[text_of(f"{model}{x}{i}{seed}", 12) for i in range(k)] for x in prompts]

    monkeypatch.setattr(ppo, "load_policy", lambda x: (Fake("/".join(Path(x).parts[-2:])), None))
    monkeypatch.setattr(rm, "load_reward_model", ppo.load_policy)
    monkeypatch.setattr(ppo, "sample_responses", sample_responses)
    monkeypatch.setattr(rm, "score", lambda *x: torch.tensor([float(len(text)) for text in x[3]]))
    monkeypatch.setattr(report, "kl_to", lambda *arguments: 1.5)
    return run, calls


def evaluated(run, *options):
    assert report.main(["--run", str(run), *options]) == 0
    return json.loads((run / "results.json").read_text()), (run / "report.md").read_text()


def test_report_of_a_run(fake_run):
    results, text = evaluated(fake_run[0])
    for name in ("fig1_reward_difference", "gold_over_kl", "fig4_rm_accuracy", "fig5_reward_gaps"):
        picture = (fake_run[0] / "figures" / f"{name}.png").read_bytes()
        assert picture[:4] == b"\x89PNG" and f"figures/{name}.png" in text
    assert not {"nan", "None"} & {*text.split()} and results["epochs"]["rm0"] == [[0, 50]]
    assert "- MetaRM, round 2: J 0.020 (0.040), L −0.020 (12.0)\n" in text
    assert list(results["climbs"]) == ["metarm-2"]  # RMs without such looks have no line
    arms = [f"{arm}-{r}" for arm in ("ppo", "reseeded", "metarm") for r in (1, 2)]
    assert list(results["policies"]) == ["sft", "dpo", *arms]
    assert set(results["rms"]) == {"rm0", "oracle", "metarm-2 adapted", *arms[2:]}
    # Figures, computed again from the stored samples. OOD: SFT and the last rounds only.
    gold = {}
    for name, n in (("metarm-1", 24), ("sft", 26), ("metarm-2", 26)):
        rows = data.read_jsonl(fake_run[0] / "eval" / f"{name}.jsonl")[1:]
        assert len(rows) == n
        both = zip(PROMPTS["test"], rows, strict=n == 24)
        gold[name] = np.array([[data.gold_reward(x, y) for y in z["responses"]] for x, z in both])
    sd, row = gold["sft"].std(), results["policies"]["metarm-2"]
    against = report.win_tie_lose(gold["metarm-2"], gold["sft"], 0.25 * sd)
    assert row["against"]["SFT"] == pytest.approx(against, abs=1e-5)
    rivals = {"SFT", "DPO", "PPO on RM0", "reseeded RM"}
    assert set(row["against"]) == rivals | {f"{x}, OOD" for x in rivals - {"DPO"}}
    texts = sum((row["responses"] for row in rows[:24]), [])  # of metarm-2
    assert row["figures"]["distinct"] == pytest.approx(len(set(texts)) / len(texts), abs=1e-5)
    mean = (gold["metarm-2"].mean() - gold["sft"].mean()) / sd
    assert row["figures"]["gold"] == pytest.approx(mean, abs=1e-5) and row["figures"]["KL"] == 1.5


def test_samples_are_used_again_unless_something_changed(fake_run, monkeypatch):
    run, calls = fake_run
    first, sampled = evaluated(run), []
    for options in ([], ["--seed", "1"], []):
        calls.clear()
        last = evaluated(run, *options)
        sampled.append(len(calls))
    assert sampled == [0, 8, 8] and last == first  # one seed, the same figures
    (run / "dpo" / "config.json").write_text("newer")
    calls.clear()
    monkeypatch.setattr(report, "report", None)
    with pytest.raises(TypeError):  # a reader's own mistake keeps its traceback
        evaluated(run)
    assert calls == ["toy/dpo"]
    assert not (run / "results.json").exists()  # the old one would vouch for other pictures


def test_a_judge_in_the_place_of_gold(fake_run, monkeypatch):
    run, _ = fake_run
    (run / "data" / "prompts-ood.jsonl").unlink()  # OOD prompts are optional
    (run / "pairs" / "valid.jsonl").rename(run / "data" / "valid.jsonl")  # real preferences
    for name in ("pairs", "oracle"):
        shutil.rmtree(run / name)
    monkeypatch.setattr(data, "gold_reward", None)
    results, text = evaluated(run, "--judge", str(run / "judge" / "rm"))
    assert results["by"] == "judge" and "judge" in results["policies"]["dpo"]["figures"]
    assert "OOD" not in results["rms"]["rm0"]["accuracy"] and "ood" not in results["prompts"]
    assert f"what the judge says: the reward model {run / 'judge' / 'rm'}" in text
    assert f"{report.show(results['ceiling'])} % of 24 held-out pairs" in text
    text = text.replace("gold_over_kl", "").replace("gold labels", "")  # a file; what is left out
    assert "gold" not in text.lower()


def refused(capsys, *argv, words):
    assert report.main([str(option) for option in argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error and all(str(word) in error for word in words), error


def test_a_shortened_run_and_missing_parts(fake_run, tmp_path, capsys):
    run, _ = fake_run
    for name in ("dpo", "oracle", "ppo-2", "reseeded-1", "reseeded-2", "metarm-1", "metarm-2/rm"):
        shutil.rmtree(run / name)
    refused(capsys, words=["--run"])
    refused(capsys, "--run", run, words=["metarm-2", "run.sh"])  # a policy whose RM is gone
    shutil.rmtree(run / "metarm-2")
    (run / "ppo-1" / "policy" / "rollouts.jsonl").unlink()
    results, _ = evaluated(run)
    assert list(results["policies"]) == ["sft", "ppo-1"] and list(results["rms"]) == ["rm0"]
    refused(capsys, "--runs", f"{run},{tmp_path / 'nowhere'}", words=["nowhere/results.json"])
    (run / "data" / "prompts-test.jsonl").unlink()
    refused(capsys, "--run", run, words=["prompts-test.jsonl"])


def test_tables_over_seeds(tmp_path, capsys):
    """Mean ± SD over the runs that have a figure; one of them has a round less."""
    for seed, (gold, win) in enumerate([(0.5, 40.0), (0.7, 60.0)]):
        policies = {"sft": {"figures": {"gold": gold, "KL": None}, "against": {}}}
        for name in ("ppo-1", "ppo-2")[: 2 - seed]:
            against = {"SFT": {"win": win, "tie": 20.0, "lose": 10.0}}
            policies[name] = policies["sft"] | {"against": against}
        row = {"before": None, "criterion": f"> {seed}", "holds": None if seed else True}
        rms = {"rm0": {"accuracy": {"D, noisy": 60.0 + seed}, "shifted": {"J": 0.4}}}
        results = {"by": "gold", "criteria": {"J": row}, "policies": policies, "rms": rms}
        (tmp_path / str(seed)).mkdir()
        write_rows(tmp_path / str(seed) / "results.json", [results])
    assert report.main(["--runs", f"{tmp_path}/0,{tmp_path}/1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row for row in rows if "---" not in row] == [
        *["|  | holds |", "| J | 1 of 1 |", "|  | gold |", "| SFT | 0.600 ± 0.141 |"],
        *["| PPO on RM0, round 1 | 0.600 ± 0.141 |", "| PPO on RM0, round 2 | 0.500 |"],
        *["|  | SFT |", "| PPO on RM0, round 1 | 40.0 ± 14.1 |"],  # wins less losses
        *["| PPO on RM0, round 2 | 30.0 |", "|  | D, noisy |", "| RM0 | 60.5 ± 0.707 |"],
        *["|  | J |", "| RM0 | 0.400 ± 0.000 |"],
    ]


def test_an_rm_judges_two_policies(fake_run, tmp_path, capsys):
    run, rewards = fake_run[0], []
    prompts, judge = run / "data" / "prompts-test.jsonl", run / "judge" / "rm"
    argv = ["--judge", f"{judge}", "--prompts", f"{prompts}", "--out"]
    assert report.main(["--policies", f"{run}/sft,{run}/dpo", *argv, f"{tmp_path}/ab"]) == 0
    [found] = data.read_jsonl(tmp_path / "ab" / "results.json")
    for letter, name in (("A", "sft"), ("B", "dpo")):
        groups = [row["responses"] for row in data.read_jsonl(tmp_path / f"ab/{letter}.jsonl")[1:]]
        rewards.append([[len(text) for text in group] for group in groups])
        answers = json.loads((tmp_path / f"ab/{letter}.json").read_text())
        assert [answer["output"] for answer in answers] == [group[0] for group in groups]
        assert {answer["generator"] for answer in answers} == {f"{run}/{name}"}
        assert f"\n\nHuman: {answers[0]['instruction']}\n\nAssistant:" == PROMPTS["test"][0]
    by_hand = report.win_tie_lose(*np.array(rewards), 0.25 * np.std(rewards))
    assert {side: found[side] for side in by_hand} == pytest.approx(by_hand)
    refused(capsys, "--policies", "a,b", *argv, tmp_path / "ab", words=["ab", "exists"])
    refused(capsys, "--policies", "a", *argv, tmp_path / "x", words=["--policies", "A,B"])


def test_kl_is_the_plain_loop(tmp_path):
    policy, tokenizer = ppo.load_policy(make_policy(tmp_path / "a", seed=1))
    reference, _ = ppo.load_policy(make_policy(tmp_path / "b", seed=2))
    prompts, longest = ["Human: my phone", "help"], 5
    groups = [[" Sorry", ""], [" we will send a new phone today", " thank you"]]
    eos = rm.end_id(tokenizer)
    # A chat model stops at other tokens, too, and its text does not tell at which one it did.
    for ends in ([eos], [eos, 7, 9]):
        policy.generation_config.eos_token_id, total = ends, 0.0
        for prompt, text in zip(np.repeat(prompts, 2), sum(groups, []), strict=True):
            prompt_ids, response_ids = rm.encode(tokenizer, str(prompt), text)
            ids = prompt_ids + response_ids[:longest]  # a response cut off there has no EOS
            for model, sign in ((policy, 1), (reference, -1)):
                logits = model(torch.tensor([ids])).logits[0] / 0.7
                probabilities = torch.softmax(logits.double(), dim=-1)
                for i in range(len(prompt_ids), len(ids)):
                    said = ends if ids[i] == eos else [ids[i]]
                    total += sign * probabilities[i - 1, said].sum().log().item()
        found = report.kl_to(policy, tokenizer, reference, prompts, groups, 0.7, longest)
        assert found == pytest.approx(total / 4, abs=1e-5)
    assert report.kl_to(policy, tokenizer, policy, prompts, groups) == 0


def test_answers_keep_a_dialogue_and_each_question_once(tmp_path):
    prompts = ["\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Help\n\nAssistant:", "Q", "Q"]
    report.write_answers(tmp_path / "x.json", "sft", prompts, [[" a "], ["b"], ["b"]])
    answers = json.loads((tmp_path / "x.json").read_text())
    want = [["Hi\n\nAssistant: Yes?\n\nHuman: Help", "a", "sft"], ["Q", "b", "sft"]]
    assert [list(answer.values()) for answer in answers] == want
    assert list(answers[0]) == ["instruction", "output", "generator"]
