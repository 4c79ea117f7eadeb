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
    assert report_card.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
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
    assert report_card.averaged([1, 2, 3, 4, 5], 2) == [2.0, 4.5] and report_card.averaged([1], 12) == [1.0]


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
    models = ["rm0", "oracle/rm", "metarm-2/adapted"]
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
        def __init__(self, path):
            self.name = str(Path(path).relative_to(run))

        def to(self, device):
            return self

    def sample_responses(model, tokenizer, prompts, k, seed, **options):
        calls.append(model.name)
        return [[text_of(f"{model.name}{prompt}{i}{seed}", 12) for i in range(k)] for prompt in prompts]

    def score(model, tokenizer, prompts, responses, batch_size=64):
        calls.append(model.name)
        return torch.tensor([len(y) + random.Random(f"{model.name}{x}{y}").gauss(0, 5)
                             for x, y in zip(prompts, responses)])

    monkeypatch.setattr(ppo, "load_policy", lambda path: (Fake(path), None))
    monkeypatch.setattr(rm, "load_reward_model", lambda path, *_: (Fake(path), None))
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
    for name in ("sft", "dpo", "ppo-2", "reseeded-2", "metarm-1"):
        assert name in results["policies"]
    assert set(results["rms"]) == {"rm0", "oracle", "reseeded-1", "reseeded-2", "metarm-1", "metarm-2",
                                   "metarm-2 adapted"}
    # a few figures, computed again from the stored samples
    stored = {p: [row["responses"] for row in data.read_jsonl(run / "eval" / f"{p}-test.jsonl")[1:]]
              for p in ("sft", "metarm-2")}
    gold = {p: np.array([[data.gold_reward(x, y) for y in ys] for x, ys in zip(PROMPTS["test"], groups)])
            for p, groups in stored.items()}
    assert results["gold_sd"] == pytest.approx(gold["sft"].std(), abs=1e-6)
    against = report_card.win_tie_lose(gold["metarm-2"], gold["sft"], 0.25 * gold["sft"].std())
    assert results["policies"]["metarm-2"]["against"]["sft"]["test"] == pytest.approx(against, abs=1e-5)
    assert results["rms"]["rm0"]["spread_shifted"]["raw"]["J"] >= 0.4
    assert {row["holds"] for row in results["illness"]} <= {True, False, None}
    # nothing changed: skipped; an option changed: done again, from the stored samples where they still serve
    done = calls.copy()
    capsys.readouterr()
    assert report_card.main(["--run", str(run)]) == 0 and calls == done
    assert "up to date" in capsys.readouterr().out
    assert report_card.main(["--run", str(run), "--tie", "0.5"]) == 0 and calls == done
    again = json.loads((run / "results.json").read_text())
    assert again["tie"] == pytest.approx(2 * results["tie"], abs=1e-5)
    # one policy changed: its samples are drawn again, the others' are not
    (run / "dpo" / "config.json").write_text("another")
    assert report_card.main(["--run", str(run)]) == 0
    assert set(calls[len(done):]) == {"dpo", "rm0"}


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
    whole = (run / "results.json").read_bytes()
    sampled = len(calls)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_card, "report", killed)
    assert report_card.main(["--run", str(run), "--tie", "0.5"]) == 130
    assert not (run / "results.json").exists()  # the old one would vouch for pictures that are not its own
    monkeypatch.undo()
    # the same command goes on, without sampling again (the fakes are gone: sampling would fail)
    assert report_card.main(["--run", str(run)]) == 0
    assert (run / "results.json").read_bytes() == whole and len(calls) == sampled
    assert not list(run.rglob("*.tmp")) and not list(run.rglob("*.partial"))


def test_shortened_run_and_missing_parts(fake_run, tmp_path, capsys):
    run, _ = fake_run
    for name in ("dpo", "oracle", "ppo-2", "reseeded-1", "reseeded-2", "metarm-1", "metarm-2"):
        shutil.rmtree(run / name)
    for path in (run / "data" / "prompts-ood.jsonl", run / "rm0" / "log.jsonl",
                 run / "ppo-1" / "policy" / "rollouts.jsonl"):
        path.unlink()
    assert report_card.main(["--run", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert set(results["policies"]) == {"sft", "ppo-1"} and results["claims"] == []
    assert {path.name for path in (run / "figures").iterdir()} == PICTURES
    assert report_card.main(["--run", str(run), "--tie", "0"]) == 0
    capsys.readouterr()

    def refused(*options, word):
        assert report_card.main(list(options)) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and word in error

    refused("--run", str(run), "--k", "1", word="--k 1")
    refused("--run", str(tmp_path / "nowhere"), word="nowhere")
    (run / "pairs" / "valid.jsonl").rename(run / "pairs" / "away.jsonl")
    refused("--run", str(run), word="valid.jsonl")
    (run / "data" / "prompts-test.jsonl").unlink()
    refused("--run", str(run), word="prompts-test.jsonl")
    shutil.rmtree(run / "ppo-1")
    refused("--run", str(run), word="ppo-1")


def made_up(m=300, k=4):
    """An illness and a cure known beforehand: RM0 sees gold in SFT samples and little of it in PPO's, which
    it rates alike; MetaRM and the reseeded RM see it everywhere, the latter less far apart there."""
    rng = np.random.default_rng(0)
    names = ["sft", "ppo-1", "reseeded-1", "metarm-1"]
    gold = {(name, "test"): rng.normal(size=(m, k)) + shift for name, shift in zip(names, (0, 0.1, 0.2, 0.6))}
    scores = {}
    for model in ("rm0", "reseeded-1", "metarm-1"):
        for policy in names:
            sick = model == "rm0" and policy == "ppo-1"
            noisy = gold[policy, "test"] + (4.0 if sick else 0.3) * rng.normal(size=(m, k))
            shrunk = (0.1 if sick else 0.5 if model == "reseeded-1" and policy == "ppo-1" else 1.0) * noisy
            scores[model, policy, "test"] = shrunk + (2.0 if sick else 0)
    held_out = {"gold": rng.choice([1.0, 1.0, 1.0, -1.0], size=400)}
    held_out |= {name: held_out["gold"] + rng.normal(size=400) for name in ("rm0", "reseeded-1", "metarm-1")}
    rollouts = {"ppo-1": [{"step": s, "kl": s / 4, "scores": np.full((2, 2), s / 9), "gold": np.zeros((2, 2))}
                          for s in range(16)]}
    responses = {key: [[f"{key} {i} {j}" for j in range(k)] for i in range(m)] for key in gold}
    return report_card.Seen({"test": ["?"] * m}, responses, gold, scores, held_out, rollouts, {})


def test_known_illness_and_known_cure():
    results = report_card.measure(made_up())
    signs = {sign["what"]: sign["holds"] for sign in results["illness"]}
    untold = [what for what, holds in signs.items() if holds is None]
    assert len(untold) == 1 and "gold labels of such samples" in untold[0]  # there is no oracle
    assert all(holds for holds in signs.values() if holds is not None), signs
    claims = {claim["what"]: claim for claim in results["claims"]}
    apart = claims["RM: tells shifted responses apart better, % right"]
    assert apart["points"] == "for" and apart["control_as_well"] is True
    wider = claims["RM: larger J on the shifted set, SD units"]
    assert wider["points"] == "for" and wider["control_as_well"] is False
    gold = claims["policy: more gold reward, SD above SFT"]
    assert gold["points"] == "for" and gold["control_as_well"] is False
    diverse = claims["policy: more diverse answers, minus Self-BLEU"]
    assert diverse["points"] == "neither way" and diverse["control_as_well"] is True
    assert not any("DPO" in what or "OOD" in what or "θ'" in what for what in claims)  # this run has none
    text = report_card.report(results)
    assert "For the paper, beyond the control: RM: larger J" in text and "Missing or untold: an RM" in text


def test_a_healthy_run_is_called_healthy():
    seen = made_up()
    seen.scores["rm0", "ppo-1", "test"] = 3 * seen.gold["ppo-1", "test"]
    results = report_card.measure(seen)
    signs = {sign["what"]: sign["holds"] for sign in results["illness"]}
    assert {claim["points"] for claim in results["claims"] if "shifted" in claim["what"]} == {"against"}
    assert signs["RM0 on the policy's samples at the same gold gap, % right"] is False
    assert signs["J of RM0"] is False and signs["variance of RM0's reward difference, SD²"] is False
