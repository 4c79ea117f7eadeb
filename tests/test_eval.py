"""eval.py: each measure against a plain loop or a closed form, then the report of a small made-up run."""

import itertools
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as report_card  # `eval` itself is a builtin
import data
import ppo
import rm
from conftest import make_policy

torch.set_num_threads(1)


def random_set(seed=0, m=40, k=5, noise=1.0):
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=(m, k))
    return gold + noise * rng.normal(size=(m, k)), gold


# -------------------------------------------------------------------------------------------------- measures

def loop_accuracy(rewards, gold, tie):
    right = pairs = 0
    for r, g in zip(rewards, gold):
        for i, j in itertools.combinations(range(len(r)), 2):
            if abs(g[i] - g[j]) < tie or g[i] == g[j]:
                continue
            pairs += 1
            right += 0.5 if r[i] == r[j] else float((r[i] > r[j]) == (g[i] > g[j]))
    return right / pairs, pairs


@pytest.mark.parametrize("tie", [0.0, 0.3])
def test_pair_accuracy_is_the_plain_loop(tie):
    rewards, gold = random_set()
    rewards[3], gold[4] = 1.0, 2.0  # rewards that tie count half; gold ties are out even at tie = 0
    assert report_card.pair_accuracy(rewards, gold, tie) == pytest.approx(loop_accuracy(rewards, gold, tie))
    assert report_card.pair_accuracy(gold, gold, tie)[0] == 1
    assert report_card.pair_accuracy(-gold, gold, tie)[0] == 0


def test_pair_accuracy_without_pairs_is_nan_and_shapes_are_checked():
    accuracy, pairs = report_card.pair_accuracy(np.ones((2, 3)), np.ones((2, 3)))
    assert math.isnan(accuracy) and pairs == 0
    for bad in (np.ones(3), np.ones((3, 1))):
        with pytest.raises(ValueError, match=r"\(m, k\)"):
            report_card.reward_gaps(bad, bad)
    with pytest.raises(ValueError, match="k >= 2"):
        report_card.reward_gaps(np.ones((2, 3)), np.ones((2, 4)))


def test_matched_accuracy_sees_through_shrunken_gaps():
    """One noisy judge, a policy whose responses differ four times less: raw accuracy falls, matched not."""
    rng = np.random.default_rng(0)
    wide, narrow = rng.normal(size=(4000, 4)), 0.25 * rng.normal(size=(4000, 4))
    first, second = ((gold + 0.5 * rng.normal(size=gold.shape), gold) for gold in (wide, narrow))
    edges = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, np.inf])
    raw = report_card.pair_accuracy(*first, 0.1)[0] - report_card.pair_accuracy(*second, 0.1)[0]
    matched = report_card.matched_accuracy(first, second, edges)
    assert raw > 0.15 and abs(matched["first"] - matched["second"]) < 0.03
    # and a judge who is worse at every gap is worse when matched
    worse = (narrow + 2 * rng.normal(size=narrow.shape), narrow)
    matched = report_card.matched_accuracy(first, worse, edges)
    assert matched["first"] - matched["second"] > 0.1


def test_matched_accuracy_is_the_plain_loop():
    first, second, edges, minimum = random_set(1), random_set(2, noise=2.0), [0.2, 0.5, 1.0, 2.0, 9.0], 30

    def by_bin(rewards, gold):
        bins = [[] for _ in edges[1:]]
        for r, g in zip(rewards, gold):
            for i, j in itertools.combinations(range(len(r)), 2):
                for b, (low, high) in enumerate(zip(edges, edges[1:])):
                    if low <= abs(g[i] - g[j]) < high:
                        bins[b].append(float((r[i] > r[j]) == (g[i] > g[j])))
        return bins

    a, b = by_bin(*first), by_bin(*second)
    shared = [i for i in range(len(a)) if len(a[i]) >= minimum and len(b[i]) >= minimum]
    total = sum(len(a[i]) for i in shared)
    got = report_card.matched_accuracy(first, second, np.array(edges), minimum)
    assert 0 < len(shared) < len(a) + 1
    assert got["first"] == pytest.approx(sum(len(a[i]) / total * np.mean(a[i]) for i in shared))
    assert got["second"] == pytest.approx(sum(len(a[i]) / total * np.mean(b[i]) for i in shared))
    assert (got["first_pairs"], got["second_pairs"]) == (total, sum(len(b[i]) for i in shared))
    nothing = report_card.matched_accuracy(first, second, np.array(edges), minimum=10 ** 6)
    assert math.isnan(nothing["first"]) and nothing["first_pairs"] == nothing["second_pairs"] == 0


def test_spread_is_equation_2_and_the_variance_of_a_difference():
    rewards, _ = random_set()
    k = rewards.shape[1]
    gaps = [[abs(a - b) / 2 for a, b in itertools.combinations(r, 2)] for r in rewards]
    J = np.mean([2 / k ** 2 * sum(1 / (1 + math.exp(-gap)) for gap in row) for row in gaps])
    got = report_card.spread(rewards, 2.0)
    assert got["J"] == pytest.approx(J)
    assert got["margin"] == pytest.approx(np.mean(gaps))
    # Var(a - b) = 2 Var(a)
    assert got["variance"] == pytest.approx(2 * np.mean((rewards / 2).var(axis=1, ddof=1)))
    same = report_card.spread(np.ones((3, 5)))
    assert same == pytest.approx({"J": 4 / 10, "margin": 0, "variance": 0})  # (k - 1) / 2k: Eq. 2's floor
    assert report_card.spread(7 * rewards, 14.0) == pytest.approx(got)  # in SD units scale says nothing


def test_rank_correlation():
    rewards, gold = random_set(3)  # no ties: the textbook formula 1 - 6 Σd² / k(k² - 1)
    k = rewards.shape[1]
    places = [[[sorted(x).index(value) for value in x] for x in pair] for pair in zip(rewards, gold)]
    rho = [1 - 6 * sum((a - b) ** 2 for a, b in zip(*pair)) / (k * (k * k - 1)) for pair in places]
    assert report_card.rank_correlation(rewards, gold) == (pytest.approx(np.mean(rho)), len(rho))
    assert report_card.rank_correlation(np.exp(gold), gold)[0] == pytest.approx(1)
    gold[0], rewards[1] = 1.0, 2.0  # constant: no correlation, left out
    assert report_card.rank_correlation(rewards, gold) == (pytest.approx(np.mean(rho[2:])), len(rho) - 2)
    # ties averaged: Pearson's coefficient of the mean ranks
    tied = [1.0, 2.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0]
    expected = np.corrcoef([1, 2.5, 2.5, 4], [1.5, 1.5, 3.5, 3.5])[0, 1]
    assert report_card.rank_correlation([tied[0]], [tied[1]])[0] == pytest.approx(expected)


def test_win_tie_lose_is_symmetric_and_adds_up():
    _, ours = random_set(4)
    _, theirs = random_set(5)
    ours[0] = theirs[0]
    there, back = report_card.win_tie_lose(ours, theirs, 0.2), report_card.win_tie_lose(theirs, ours, 0.2)
    assert (there["win"], there["tie"], there["lose"]) == (back["lose"], back["tie"], back["win"])
    assert sum(there.values()) == pytest.approx(100)
    wins = sum(a - b >= 0.2 for a, b in zip(ours.ravel(), theirs.ravel()))
    assert there["win"] == pytest.approx(100 * wins / ours.size)
    assert report_card.win_tie_lose(ours, ours, 0.0) == {"win": 0, "tie": 100, "lose": 0}


def loop_bleu(hypothesis, references, n):
    product, orders = 1.0, 0
    for order in range(1, n + 1):
        grams = [tuple(hypothesis[i:i + order]) for i in range(len(hypothesis) - order + 1)]
        if not grams:
            continue
        orders += 1
        matched = 0
        for gram in set(grams):
            most = max(sum(tuple(ref[i:i + order]) == gram for i in range(len(ref))) for ref in references)
            matched += min(grams.count(gram), most)
        product *= (matched or 0.1) / len(grams)
    closest = sorted(references, key=lambda ref: (abs(len(ref) - len(hypothesis)), len(ref)))[0]
    return min(1.0, math.exp(1 - len(closest) / len(hypothesis))) * product ** (1 / orders)


def test_bleu_is_the_plain_loop():
    rng = random.Random(0)
    for _ in range(50):
        texts = [[rng.choice("abc") for _ in range(rng.randint(1, 9))] for _ in range(4)]
        for n in (1, 2, 5):
            got = report_card.bleu(texts[0], texts[1:])[n - 1]
            assert got == pytest.approx(loop_bleu(texts[0], texts[1:], n))
    assert report_card.bleu([], [["a"]], 2) == [0, 0] and report_card.bleu([], [["a"], []], 2) == [1, 1]


def test_diversity():
    assert report_card.self_bleu([["one two three four five six"] * 3]) == pytest.approx(1)
    assert report_card.self_bleu([["a b c d e", "f g h i j", "k l m n o"]]) < 0.1
    groups = [["a b c", "a b d"], ["a b c", "e"]]
    expected = np.mean([loop_bleu(g[i].split(), [g[1 - i].split()], n)
                        for g in groups for i in (0, 1) for n in (2, 3, 4, 5)])
    assert report_card.self_bleu(groups) == pytest.approx(expected)
    assert report_card.distinct_share(groups) == 3 / 4
    assert report_card.mean_words(groups) == (3 + 3 + 3 + 1) / 4


# ------------------------------------------------------------------------------------------ the whole report

PROMPTS = {"test": data.all_prompts(data.PROBLEMS)[:8], "ood": data.all_prompts(data.OOD_PROBLEMS)[:2]}


def text_of(seed, length):
    rng = random.Random(seed)
    return " ".join(rng.choice("sorry we will send you a new one today please wait for the refund".split())
                    for _ in range(rng.randint(2, length)))


@pytest.fixture
def fake_run(tmp_path, monkeypatch):
    """A run folder with everything but models: a "policy" says random words, an "RM" counts letters."""
    run = tmp_path / "runs" / "toy"
    (run / "data").mkdir(parents=True)
    for domain, prompts in PROMPTS.items():
        data.write_jsonl(run / "data" / f"prompts-{domain}.jsonl", [{"prompt": p} for p in prompts])
    (run / "pairs").mkdir()
    data.write_jsonl(run / "pairs" / "valid.jsonl", [
        {"prompt": prompt, "chosen": text_of(i, 9), "rejected": text_of(-i - 1, 9) + " no"}
        for i, prompt in enumerate(PROMPTS["test"])])
    policies = ["sft", "dpo"] + [f"{arm}-{r}/policy" for arm in ("ppo", "reseeded", "metarm") for r in (1, 2)]
    models = ["rm0", "oracle/rm", "metarm-2/adapted", "judge"]
    models += [f"{arm}-{r}/rm" for arm in ("reseeded", "metarm") for r in (1, 2)]
    for name in policies + models:
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text(json.dumps(name))
    for name in policies[2:]:
        data.write_jsonl(run / name / "rollouts.jsonl", [
            {"step": s, "kl": 0.1 * s, "prompts": PROMPTS["test"][:2],
             "scores": [[0.1 * s, 1.0, -1.0], [0.3, 2.0, 0.1 * s]],
             "responses": [[text_of(f"{s}{i}{j}", 9) for j in range(3)] for i in range(2)]}
            for s in range(8)])
    for name in models:
        data.write_jsonl(run / name / "log.jsonl", [{"step": 0, "accuracy": 0.5}, {"step": 2, "loss": 0.6},
                                                    {"step": 4, "accuracy": 0.62}])
    calls = []

    class Fake:
        def __init__(self, kind, path):
            self.name = str(Path(path).relative_to(run))
            calls.append(f"{kind} {self.name}")

        def to(self, device):
            return self

    def sample_responses(model, tokenizer, prompts, k, seed, **options):
        calls.append(f"sample {model.name}")
        return [[text_of(f"{model.name}{prompt}{i}{seed}", 12) for i in range(k)] for prompt in prompts]

    def score(model, tokenizer, prompts, responses, batch_size=64):
        return torch.tensor([len(y) + random.Random(f"{model.name}{x}{y}").gauss(0, 5)
                             for x, y in zip(prompts, responses)])

    monkeypatch.setattr(ppo, "load_policy", lambda path: (Fake("policy", path), None))
    monkeypatch.setattr(rm, "load_reward_model", lambda path, *_: (Fake("rm", path), None))
    monkeypatch.setattr(ppo, "sample_responses", sample_responses)
    monkeypatch.setattr(rm, "score", score)
    return run, calls


PICTURES = {"fig1_reward_difference.png", "fig4_rm_accuracy.png", "fig5_reward_difference_distribution.png",
            "gold_over_kl.png"}


def test_report_of_a_run(fake_run, capsys):
    run, calls = fake_run
    assert report_card.main(["--run", str(run)]) == 0
    results, text = json.loads((run / "results.json").read_text()), (run / "report.md").read_text()
    assert {path.name for path in (run / "figures").iterdir()} == PICTURES
    assert all((run / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in PICTURES)
    assert "nan" not in text.lower().split() and "None" not in text and "one seed proves nothing" in text
    assert set(results["policies"]) == {"sft", "dpo", *(f"{arm}-{r}" for arm in report_card.RL_ARMS for r in (1, 2))}
    assert set(results["rms"]) == {"rm0", "oracle", "reseeded-1", "reseeded-2", "metarm-1", "metarm-2",
                                   "metarm-2 adapted"}
    assert len(calls) == len(set(calls)) == 2 * 8 + 7  # each policy and each RM is loaded once
    # figures, computed again from the stored samples
    stored = {p: [row["responses"] for row in data.read_jsonl(next((run / "eval").glob(f"{p}-*.jsonl")))]
              for p in ("toy-sft", "metarm-2-policy", "metarm-1-policy")}
    assert [len(groups) for groups in stored.values()] == [8 + 2, 8 + 2, 8]  # OOD: SFT and the last rounds only
    gold = {p: np.array([[data.gold_reward(x, y) for y in ys] for x, ys in zip(PROMPTS["test"], groups)])
            for p, groups in stored.items()}
    sft = gold["toy-sft"]
    against = report_card.win_tie_lose(gold["metarm-2-policy"], sft, 0.25 * sft.std())
    row = results["policies"]["metarm-2"]
    assert row["against"]["SFT"] == pytest.approx(against, abs=1e-5) and set(row["against"]) == {
        "SFT", "SFT, OOD", "DPO", "PPO on RM0", "PPO on RM0, OOD", "reseeded RM", "reseeded RM, OOD"}
    mean = (gold["metarm-2-policy"].mean() - sft.mean()) / sft.std()
    assert row["figures"]["gold"] == pytest.approx(mean, abs=1e-5)
    assert results["rms"]["rm0"]["shifted"]["J"] >= 0.4
    assert {row["there?"] for row in results["illness"].values()} <= {"yes", "**no**", None}
    # what somebody without labels sees of MetaRM's second round, and the rule's word on it
    rewards = {name: np.array([[len(y) + random.Random(f"{name}{x}{y}").gauss(0, 5) for y in ys]
                               for x, ys in zip(PROMPTS["test"], stored["metarm-2-policy"])]) for name in ("metarm-2/rm", "metarm-1/rm")}
    turned = [(a - b) * (c - d) < 0 for now, then in zip(*rewards.values())
              for (a, c), (b, d) in itertools.combinations(zip(now, then), 2)]
    assert results["signals"]["metarm-2"]["RMs disagree, %"] == pytest.approx(100 * np.mean(turned), abs=1e-4)
    assert list(results["signals"]) == ["metarm-1", "metarm-2"] and results["stop after round"] in (1, 2)
    assert f"**stop after round {results['stop after round']}**" in text
    # nothing changed: skipped; an option changed: done again, from the stored samples where they still serve
    done = len(calls)
    capsys.readouterr()
    assert report_card.main(["--run", str(run)]) == 0 and len(calls) == done
    assert "up to date" in capsys.readouterr().out
    assert report_card.main(["--run", str(run), "--tie", "0.5"]) == 0
    assert {call.split()[0] for call in calls[done:]} == {"rm"}
    assert json.loads((run / "results.json").read_text())["policies"]["metarm-2"]["against"]["SFT"] == pytest.approx(
        report_card.win_tie_lose(gold["metarm-2-policy"], sft, 0.5 * sft.std()), abs=1e-5)
    # one policy changed: its samples are drawn again, the others' are not
    done = len(calls)
    (run / "dpo" / "config.json").write_text("another")
    assert report_card.main(["--run", str(run)]) == 0
    assert [call for call in calls[done:] if "rm " not in call] == ["policy dpo", "sample dpo"]


def test_another_judge_in_the_place_of_gold(fake_run, monkeypatch):
    run, calls = fake_run
    assert report_card.main(["--run", str(run)]) == 0
    by_gold = json.loads((run / "results.json").read_text())
    (run / "data" / "prompts-ood.jsonl").unlink()  # OOD prompts are optional; real preferences lie in data/
    (run / "pairs" / "valid.jsonl").rename(run / "data" / "valid.jsonl")
    (run / "pairs").rmdir()
    monkeypatch.setattr(data, "gold_reward", None)
    assert report_card.main(["--run", str(run), "--judge", str(run / "judge")]) == 0
    by_rm = json.loads((run / "results.json").read_text())
    assert calls.count("rm judge") == 1 and str(run / "judge") in (run / "report.md").read_text()
    dpo = [found["policies"]["dpo"]["figures"] for found in (by_gold, by_rm)]
    assert dpo[0]["RM"] == dpo[1]["RM"] and dpo[0]["gold"] != dpo[1]["gold"]
    assert "OOD" not in by_rm["rms"]["rm0"]["accuracy"] and "ood" not in by_rm["prompts"]


def test_same_seed_same_bytes_and_another_seed_others(fake_run):
    run, _ = fake_run
    first = []
    for seed in ("0", "0", "1"):
        assert report_card.main(["--run", str(run), "--seed", seed]) == 0
        first.append(((run / "results.json").read_bytes(), (run / "report.md").read_bytes()))
        (run / "results.json").unlink()
        for path in (run / "eval").iterdir():
            path.unlink()
    assert first[0] == first[1] and first[0] != first[2]


def test_interrupted_report_leaves_no_results(fake_run, monkeypatch):
    run, calls = fake_run
    assert report_card.main(["--run", str(run)]) == 0
    whole, done = (run / "results.json").read_bytes(), len(calls)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report_card, "report", killed)
        assert report_card.main(["--run", str(run), "--tie", "0.5"]) == 130
    assert not (run / "results.json").exists()  # the old one would vouch for pictures that are not its own
    # the same command goes on, without sampling again
    assert report_card.main(["--run", str(run)]) == 0
    assert (run / "results.json").read_bytes() == whole
    assert {call.split()[0] for call in calls[done:]} == {"rm"}
    assert not list(run.rglob("*.tmp")) and not list(run.rglob("*.partial"))


def refused(capsys, *options, words):
    """One line on stderr, with these words in it, and the status of a mistake."""
    capsys.readouterr()
    assert report_card.main([str(option) for option in options]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and all(str(word) in error for word in words), error


def test_shortened_run_and_missing_parts(fake_run, tmp_path, capsys):
    run, _ = fake_run
    for name in ("dpo", "oracle", "ppo-2", "reseeded-1", "reseeded-2", "metarm-1"):
        shutil.rmtree(run / name)
    shutil.rmtree(run / "metarm-2" / "rm")
    refused(capsys, "--run", run, words=["metarm-2", "run.sh"])  # a policy whose reward model is gone
    shutil.rmtree(run / "metarm-2")
    for path in (run / "data" / "prompts-ood.jsonl", run / "rm0" / "log.jsonl",
                 run / "ppo-1" / "policy" / "rollouts.jsonl"):
        path.unlink()
    assert report_card.main(["--run", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert set(results["policies"]) == {"sft", "ppo-1"}
    assert results["illness"]["gold reward of the policy, SD above SFT (before: after round 1)"]["there?"] is None
    assert {path.name for path in (run / "figures").iterdir()} == PICTURES
    assert report_card.main(["--run", str(run), "--tie", "0"]) == 0
    refused(capsys, "--run", run, "--k", "1", words=["--k 1"])
    refused(capsys, "--run", tmp_path / "nowhere", words=["nowhere", "sft"])
    (run / "pairs" / "valid.jsonl").rename(run / "pairs" / "away.jsonl")
    refused(capsys, "--run", run, words=["valid.jsonl"])
    (run / "data" / "prompts-test.jsonl").unlink()
    refused(capsys, "--run", run, words=["prompts-test.jsonl"])
    shutil.rmtree(run / "ppo-1")
    refused(capsys, "--run", run, words=["ppo-1"])


def made_up(m=300, k=4, gold_at_the_end=0.15):
    """An illness and a cure known beforehand: RM0 sees gold in SFT samples and little of it in PPO's, which
    it rates alike; MetaRM and the reseeded RM see it everywhere, the latter less far apart there."""
    rng = np.random.default_rng(0)
    shifts = {"sft": 0, "ppo-1": 0.1, "ppo-2": gold_at_the_end, "reseeded-2": 0.2, "metarm-2": 0.6}
    gold = {(name, "test"): rng.normal(size=(m, k)) + shift for name, shift in shifts.items()}
    scores = {("gold", *key): x for key, x in gold.items()}
    for model in ("rm0", "reseeded-2", "metarm-2"):
        for policy in shifts:
            sick = model == "rm0" and policy.startswith("ppo")
            noisy = gold[policy, "test"] + (4.0 if sick else 0.3) * rng.normal(size=(m, k))
            shrunk = (0.1 if sick else 0.5 if model == "reseeded-2" and policy == "ppo-2" else 1.0) * noisy
            scores[model, policy, "test"] = shrunk + (sick and 2.0) + (policy == "ppo-2") * 0.2
    truth = rng.choice([1.0, 1.0, 1.0, -1.0], size=400)
    for model in ("gold", "rm0", "reseeded-2", "metarm-2"):
        margins = truth + (model != "gold") * rng.normal(size=400)
        scores[model, "D", "pairs"] = np.stack([margins, np.zeros(400)], 1)
    rollouts = {"ppo-1": [{"KL": s / 4, "RM": np.full((2, 2), s / 9), "gold": np.zeros((2, 2))} for s in range(16)]}
    responses = {key: [[f"{key} {i} {j}" for j in range(k)] for i in range(m)] for key in gold}
    return dict(prompts={"test": ["?"] * m, "pairs": ["?"] * 400}, responses=responses, scores=scores,
                rollouts=rollouts, epochs={})


def signs_of(results):
    return {what: sign["there?"] for what, sign in results["illness"].items()}


def test_known_illness_and_known_cure():
    results = report_card.measure(**made_up())
    signs = signs_of(results)
    untold = [what for what, there in signs.items() if there is None]
    assert len(untold) == 1 and "freshly trained" in untold[0]  # there is no oracle
    assert all(there == "yes" for what, there in signs.items() if what not in untold), signs
    rms, policies = results["rms"], results["policies"]
    right = {name: row["accuracy"]["shifted"] for name, row in rms.items()}
    assert right["rm0"] < 60 < 85 < min(right["metarm-2"], right["reseeded-2"])
    assert rms["metarm-2"]["shifted"]["J, SD units"] > rms["reseeded-2"]["shifted"]["J, SD units"] + 0.01
    assert policies["metarm-2"]["figures"]["gold"] > policies["ppo-2"]["figures"]["gold"] + 0.3
    assert policies["metarm-2"]["against"]["SFT"]["win"] > 50 > policies["metarm-2"]["against"]["SFT"]["lose"]
    assert abs(results["ceiling"] - 75) < 6
    text = report_card.report(results, "somebody")
    assert text.count("| yes |") == len(signs) - 1 and "| **no** |" not in text
    assert "Gold is the judge: somebody." in text


def test_gold_turns_or_stalls_only_if_it_gains_no_more_than_a_tenth_while_the_rm_goes_up():
    gold = "gold reward of the policy, SD above SFT (before: after round 1)"
    for end, there in ((-0.5, "yes"), (0.15, "yes"), (0.4, "**no**")):
        assert signs_of(report_card.measure(**made_up(gold_at_the_end=end)))[gold] == there
    seen = made_up()
    seen["scores"]["rm0", "ppo-2", "test"] -= 1.0  # PPO does not even raise its own reward
    assert signs_of(report_card.measure(**seen))[gold] == "**no**"
    seen = made_up()
    for part in ("responses", "scores"):  # one round: cannot be told
        seen[part] = {key: x for key, x in seen[part].items() if not any(str(name).endswith("-2") for name in key)}
    assert signs_of(report_card.measure(**seen))[gold] is None


def test_a_healthy_run_is_called_healthy():
    seen = made_up()
    seen["scores"]["rm0", "ppo-2", "test"] = 3 * seen["scores"]["gold", "ppo-2", "test"]
    results = report_card.measure(**seen)
    signs = signs_of(results)
    assert results["rms"]["rm0"]["accuracy"]["shifted"] > results["rms"]["metarm-2"]["accuracy"]["shifted"]
    assert signs["RM0 right on the policy's samples at the same gold gap, %"] == "**no**"
    assert signs["J of RM0"] == signs["variance of RM0's reward difference, SD²"] == "**no**"


# --------------------------------------------------------------------------------- two policies, any other judge

def test_the_interval_is_wilsons(capsys):
    """Its ends are the shares p whose own normal interval just reaches the share seen."""
    rng = np.random.default_rng(0)
    gap = rng.choice([-1.0, 0.0, 1.0], p=[0.2, 0.3, 0.5], size=(40, 1))
    for gap in (gap, np.ones((25, 1))):
        for side, (percent, low, high) in report_card.compared(["A", "B"], "C", gap).items():
            assert percent == report_card.win_tie_lose(gap, 0 * gap, 0)[side]
            for p in (low / 100, high / 100):
                assert (percent / 100 - p) ** 2 == pytest.approx(1.96 ** 2 * p * (1 - p) / len(gap), abs=1e-9)
            assert -1e-9 <= low <= percent + 1e-9 and percent - 1e-9 <= high <= 100 + 1e-9
    assert "A against B by C: win 100.0 %" in capsys.readouterr().out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two random policies of different architectures and tokenizers, an RM from one of them, and plain prompts."""
    folder = tmp_path_factory.mktemp("world")
    make_policy(folder / "a", "llama", seed=1)
    make_policy(folder / "b", "gpt2", seed=2, eos="</s>", padding_side="left")
    rm.save_model(*rm.load_reward_model(str(folder / "a"), seed=0), folder / "rm")
    data.write_jsonl(folder / "prompts.jsonl", [{"prompt": f"Human: question {i}?\n\nAssistant:"} for i in range(6)])
    return folder


def options(world, *more, first="a", second="b"):
    return ["--policies", f"{world / first},{world / second}", "--prompts", str(world / "prompts.jsonl"),
            "--max_new_tokens", "8", "--k", "2", *map(str, more)]


def test_an_rm_judges_two_policies(world, tmp_path, capsys):
    run = options(world, "--judge", world / "rm", "--out", tmp_path / "ab")
    assert report_card.main(run) == 0
    found = json.loads((tmp_path / "ab" / "results.json").read_text())
    assert found["win"][0] + found["tie"][0] + found["lose"][0] == pytest.approx(100) and found["tie"][0] < 100
    # again from the kept samples, by hand
    prompts = data.read_prompts(world / "prompts.jsonl")
    kept = [[row["responses"] for row in data.read_jsonl(next((tmp_path / "ab").glob(f"*-{name}-*.jsonl")))]
            for name in "ab"]
    judge = rm.load_reward_model(str(world / "rm"))
    first, second = (np.array([rm.score(*judge, [x] * 2, ys).numpy() for x, ys in zip(prompts, groups)])
                     for groups in kept)
    by_hand = report_card.win_tie_lose(first, second, 0.25 * np.stack([first, second]).std())
    assert {side: found[side][0] for side in by_hand} == pytest.approx(by_hand)
    # the other way round: what one wins the other loses; and a policy ties with itself
    turned = options(world, "--judge", world / "rm", "--out", tmp_path / "ba", first="b", second="a")
    assert report_card.main(turned) == 0
    back = json.loads((tmp_path / "ba" / "results.json").read_text())
    assert (back["win"], back["tie"], back["lose"]) == (found["lose"], found["tie"], found["win"])
    assert report_card.main(options(world, "--judge", world / "rm", "--out", tmp_path / "aa", second="a")) == 0
    assert json.loads((tmp_path / "aa" / "results.json").read_text())["tie"][0] == 100
    # finished: skipped; other policies: not silently the same
    capsys.readouterr()
    assert report_card.main(run) == 0 and "skipped" in capsys.readouterr().out
    refused(capsys, *options(world, "--judge", world / "rm", "--out", tmp_path / "ab", second="a"),
            words=["ab", "--policies B"])


def test_blind_pairs_and_their_verdicts_round_trip(world, tmp_path, capsys):
    out = tmp_path / "blind"
    assert report_card.main(options(world, "--blind", "--out", out)) == 0
    pairs, key = data.read_jsonl(out / "pairs.jsonl"), json.loads((out / "key.json").read_text())
    assert len(pairs) == 12 and all(set(pair) == {"id", "prompt", "answer_1", "answer_2"} for pair in pairs)
    assert set(key["answer_1"].values()) == {0, 1}  # sides are shuffled, and no line tells which is which
    assert not any(str(world / name) in (out / "pairs.jsonl").read_text() for name in "ab")
    instructions = (out / "INSTRUCTIONS.md").read_text()
    assert "verdicts.jsonl" in instructions and '{"id": "1-3fa2c9", "verdict": "1"}' in instructions
    groups = [sum((row["responses"] for row in data.read_jsonl(next(out.glob(f"*-{name}-*.jsonl")))), [])
              for name in "ab"]
    for pair, *answers in zip(pairs, *groups):
        side = key["answer_1"][pair["id"]]
        assert (pair["answer_1"], pair["answer_2"]) == (answers[side], answers[1 - side])
    # a judge who prefers the first policy in the first six pairs, the second in four, and is undecided on two
    wanted = [0] * 6 + [1] * 4 + [None] * 2
    sides = [key["answer_1"][pair["id"]] for pair in pairs]
    rows = [{"id": pair["id"], "verdict": "tie" if want is None else "1" if side == want else "2"}
            for pair, side, want in zip(pairs, sides, wanted)]
    random.Random(0).shuffle(rows)
    data.write_jsonl(tmp_path / "verdicts.jsonl", rows)
    capsys.readouterr()
    assert report_card.main(["--verdicts", str(tmp_path / "verdicts.jsonl"), "--key", str(out / "key.json")]) == 0
    said = capsys.readouterr().out
    assert f"{world / 'a'} against {world / 'b'}" in said
    assert all(words in said for words in ("win 50.0 %", "tie 16.7 %", "lose 33.3 %"))
    # the same seed, the same sides; another seed, others
    for seed, same in ((0, True), (1, False)):
        assert report_card.main(options(world, "--blind", "--out", tmp_path / f"seed{seed}", "--seed", seed)) == 0
        assert ((tmp_path / f"seed{seed}" / "key.json").read_bytes() == (out / "key.json").read_bytes()) == same

    def wrong(rows, *words):
        data.write_jsonl(tmp_path / "wrong.jsonl", rows)
        refused(capsys, "--verdicts", tmp_path / "wrong.jsonl", "--key", out / "key.json",
                words=["wrong.jsonl", *words])

    last = rows[-1]["id"]
    wrong(rows[:-1], "line 11", last, "no verdict")
    wrong(rows + [{"id": last, "verdict": "tie"}], "line 13", last, "already, in line 12")
    wrong(rows[:3] + [{"id": "99-abcdef", "verdict": "1"}] + rows[3:], "line 4", "99-abcdef", "is not in")
    wrong(rows[:3] + [{"verdict": "1"}], "line 4", "None", "is not in")
    wrong([{"id": last, "verdict": "A"}] + rows[:-1], "line 1:", last, '"1", "2" or "tie"', '"A"')
    wrong([{"id": last}] + rows[:-1], "line 1:", last, '"1", "2" or "tie"')
    refused(capsys, "--verdicts", tmp_path / "verdicts.jsonl", "--key", tmp_path / "verdicts.jsonl",
            words=["--key", "--blind"])
    refused(capsys, "--verdicts", tmp_path / "none.jsonl", "--key", out / "key.json", words=["none.jsonl"])


def test_a_table_over_seeds(tmp_path, capsys):
    """Mean ± SD over the runs that have a figure; one of them has a round less."""
    for seed, (gold, win) in enumerate([(0.5, 40.0), (0.7, 60.0)]):
        policies = {name: {"figures": {"RM": 1.0, "gold": gold, "KL": None, "Self-BLEU": 0.5},
                           "against": {"SFT": {"win": win, "tie": 20.0, "lose": 10.0}} if name != "sft" else {}}
                    for name in ("sft", "ppo-1", "ppo-2")[:3 - seed]}
        rms = {"rm0": {"accuracy": {"D, noisy": 60.0 + seed}, "shifted": {"J": 0.4, "gap, SD": 1.0}}}
        signs = {"mean length, words": {"before": 10.0, "after": None if seed else 12.0, "there?": "yes" if seed else "**no**"}}
        (tmp_path / str(seed)).mkdir()
        data.write_text(tmp_path / str(seed) / "results.json", json.dumps({"illness": signs, "policies": policies, "rms": rms}))
    assert report_card.main(["--runs", f"{tmp_path}/0,{tmp_path}/1"]) == 0
    assert capsys.readouterr().out == f"""Over 2 seeds ({tmp_path}/0,{tmp_path}/1), mean ± SD.

| the illness | before | after | there, of 2 |
|---|---|---|---|
| mean length, words | 10.00 ± 0.00 | 12.00 ± 0.00 | 1 |

| policy | RM, SD above SFT | gold, SD above SFT | win − lose against SFT | PPO on RM0 | DPO | KL, nats | Self-BLEU |
|---|---|---|---|---|---|---|---|
| SFT | 1.00 ± 0.00 | 0.60 ± 0.14 | – | – | – | – | 0.50 ± 0.00 |
| PPO on RM0, round 1 | 1.00 ± 0.00 | 0.60 ± 0.14 | 40.0 ± 14.1 | – | – | – | 0.50 ± 0.00 |
| PPO on RM0, round 2 | 1.00 ± 0.00 | 0.50 ± 0.00 | 30.0 ± 0.0 | – | – | – | 0.50 ± 0.00 |

| RM | D, noisy, % | D, gold, % | SFT, % | shifted, % | OOD, % | J, shifted | gap, shifted, SD |
|---|---|---|---|---|---|---|---|
| RM0 | 60.5 ± 0.7 | – | – | – | – | 0.400 ± 0.000 | 1.00 ± 0.00 |
"""


@pytest.mark.parametrize("flags", [
    "", "--run r --out o", "--judge j --policies a,b --prompts p", "--policies a,b --out o", "--verdicts v",
    "--judge j --blind --policies a,b --prompts p --out o", "--run r --verdicts v --key k"])
def test_flags_that_do_not_belong_together(flags, capsys):
    refused(capsys, *flags.split(), words=["belong together", "--verdicts --key", "--judge --policies --prompts --out",
                                           flags.split()[0] if flags else "no flag"])


def test_mistakes_with_two_policies(world, tmp_path, capsys):
    rest = ["--prompts", world / "prompts.jsonl", "--out", tmp_path / "x", "--max_new_tokens", "8"]
    ab, judge = f"{world / 'a'},{world / 'b'}", ["--judge", world / "rm"]
    refused(capsys, *judge, "--policies", world / "a", *rest, words=["--policies", "A,B"])
    refused(capsys, "--judge", world / "a", "--policies", ab, *rest, words=[world / "a", "no reward head"])
    refused(capsys, *judge, "--policies", f"{world / 'a'},{world / 'rm'}", *rest, words=[world / "rm", "not a causal"])
    refused(capsys, *judge, "--policies", f"{world / 'nobody'},{world / 'b'}", *rest, words=["nobody"])
    refused(capsys, *judge, "--policies", ab, *rest, "--max_new_tokens", "500", words=["500", "positions"])
    assert not (tmp_path / "x").exists()
