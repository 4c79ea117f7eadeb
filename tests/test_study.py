"""docs/study: statistics, the second world, the arms that live there, the page's figures."""

import itertools
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_policy

import data
import rm

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs" / "study"))

import arms
import page
import study
import summary

STUDY = Path(study.__file__).parent
NOTE = (
    "\n\nHuman: Sum up this note: Anna went round on a rainy day. The pump in hall one leaks oil."
)
NOTE += " It has to run by Monday.\n\nAssistant:"


def test_intervals_and_p_values():
    half = 3.18245 * np.std([1, 2, 3, 4], ddof=1) / 2  # the t of 3 degrees of freedom
    assert page.t_interval([1, 2, 3, 4]) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-4)
    assert page.t_interval([1.0, math.nan])[0] == 1.0 and math.isnan(page.t_interval([1.0])[1])
    assert [page.p_value(x) for x in ([-1, 1], [2, 2], [0, 0])] == [1.0, 0.0, 1.0]
    x = np.array([0.3, 1.1, 0.7, 2.0, 1.4])  # 0 at the interval's end is p = 0.05
    assert page.p_value(x - page.t_interval(x)[1]) == pytest.approx(0.05, abs=1e-6)
    assert page.minus({0: 1.0, 1: 2.0, 3: 9.0}, {0: 0.5, 1: 3.0}) == {0: 0.5, 1: -1.0}


def test_holm_rejects_what_its_definition_rejects():
    assert page.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = page.holm([0.01, math.nan, 0.02])
    assert adjusted[::2] == pytest.approx([0.02, 0.02]) and math.isnan(adjusted[1])
    rng = random.Random(0)
    for _ in range(50):
        ps = [rng.random() ** 4 for _ in range(6)]
        rejected = set()
        for rank, i in enumerate(sorted(range(6), key=ps.__getitem__)):
            if ps[i] > 0.05 / (6 - rank):
                break
            rejected.add(i)
        assert {i for i, p in enumerate(page.holm(ps)) if p <= 0.05} == rejected


def test_verdicts_follow_the_rules():
    for interval, p, stays, better in (
        ((0.5, -1.0, 1.9), 0.3, "yes", "no"),
        ((0.5, -1.0, 2.1), 0.3, "unclear", "unclear"),
        ((3.0, 2.5, 3.5), 0.01, "no", "yes"),
        ((3.0, 0.1, 5.9), 0.2, "unclear", "unclear"),  # Holm's p is what counts
        ((-4.0, -5.0, -3.0), 0.01, "no", "no"),
        ((1.0, math.nan, math.nan), math.nan, "unclear", "unclear"),
    ):
        assert (page.stays(interval, 2.0), page.better(interval, p, 2.0)) == (stays, better)


def test_gold_at_equal_kl_and_stop_rounds():
    kl, gold = [1.0, 2.0, 1.5, 4.0], [0.5, 1.0, 2.0, 0.0]
    assert page.at_equal_kl(kl, gold, [0.5, 1.0, 3.0]) == pytest.approx([0.25, 0.5, 1.0])
    assert math.isnan(page.at_equal_kl([1.0], [1.0], [2.0])[0])
    assert page.stop_round([1, 2, 5, 1], 3, "-") == 2  # what comes after does not count
    assert page.stop_round([9, 9], 3, "-") == 1 and page.stop_round([5, 4, 2, 9], 3, "+") == 2


def test_gold_of_a_summary():
    good = " The pump needs help. It leaks oil. Go to hall one. Do it by Monday. This is urgent."
    assert data.gold_reward(NOTE, good) == 5.0
    parts = summary.gold_parts(NOTE, " The crane needs help. Ask Anna. Blah. Blah.")
    told = {"invented fact": -1.5, "trifle": -0.25, "repeated sentence": -1, "broken sentence": -1}
    assert {rule: points for rule, points in parts.items() if points} == told
    with pytest.raises(data.Mistake, match="note"):
        data.gold_reward("Sum up this note: nothing", "")
    shop = "\n\nHuman: My lamp came broken.\n\nAssistant:"  # the first world is as it was
    assert (
        data.gold_reward(shop, " This is about your lamp. We will send a replacement today.") == 4.0
    )


def test_a_world_of_notes():
    sizes = {"sft": 40, "pairs": 20, "ood": 10}
    world = data.make_world(1, sizes, summary.WORLDS["summary"])
    prompts = [row["prompt"] for rows in world.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 70
    gold = [data.gold_reward(**row) for row in world["sft"]]
    assert min(gold) < 0 < np.mean(gold)


def test_arms_and_their_knobs():
    chosen = {"metarm-first": {"eta": 0.3}, "reseeded": {"lr": 6e-4}}
    assert study.knobs_of("metarm-first@eta=1@stale=1", chosen) == {"eta": 1.0, "stale": 1.0}
    assert study.knobs_of("random", chosen) == {"eta": 0.3} and study.knobs_of("ppo", chosen) == {}
    flags = study.toy_flags(small=False)  # read out of run.sh
    assert {"sft", "rm", "meta_sample", "sample", "dpo", "ppo"} <= flags.keys()
    assert "--steps" in flags["ppo"] and "--lr" in flags["rm"]
    assert study.rounds_of("ppo", 4) == [1, 2, 3, 4] and study.rounds_of("dpo", 4) == [0]
    assert set(study.SUMMARY_ARMS) < set(study.ARMS) == set(page.NAMES)


@pytest.mark.parametrize("option", ["--tasks=poem", "--arms=dpo,magic", "--arms=ppo@x=1"])
def test_mistakes_are_one_line(capsys, tmp_path, option):
    assert study.main([option, "--out", str(tmp_path), "--runs", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert option.partition("=")[0] in told and told.count("\n") == 1


def weights(folder):
    model, _ = rm.load_reward_model(str(folder))
    return torch.cat([p.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["random", "joint", "ocrm"])
def test_without_its_knob_an_arm_is_plain_training(tmp_path, policy_folder, kind):
    """Same head, same order of D, same optimizer: what differs is the knob's doing."""
    pair, said = {"chosen": " thank you", "rejected": " Sorry"}, [" thank", " you", " a charge"]
    pairs = [{"prompt": f"Human: my phone {i}"} | pair for i in range(32)]
    samples = [{"prompt": f"Human: the invoice {i}", "responses": said} for i in range(16)]
    D, S, other = tmp_path / "D.jsonl", tmp_path / "S.jsonl", make_policy(tmp_path / "p", seed=1)
    data.write_jsonl(D, pairs)
    data.write_jsonl(S, samples)
    options = ["--model", policy_folder, "--data", D, "--lr", "1e-3", "--batch_size", 8]
    plain = weights(arms.reward_model("plain", tmp_path / "plain", options, 3))
    for knob in (0.0, 0.5):
        out = arms.reward_model(kind, tmp_path / f"{knob}", options, 3, knob, S, other)
        assert torch.allclose(plain, weights(out), atol=1e-5) == (knob == 0)


def test_gold_takes_the_rms_place_and_gives_it_back():
    original = rm.score
    with pytest.raises(ZeroDivisionError), arms.gold_as_reward():
        assert rm.score(None, None, [NOTE], [""]).item() == data.gold_reward(NOTE, "")
        raise ZeroDivisionError
    assert rm.score is original


def test_the_page_says_what_the_csv_says(tmp_path):
    """Each row of page.py's tables stands in the page (the stop rules have a column more there)."""
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    rows = [row for row in page.tables(STUDY).splitlines() if "[" in row]
    assert len(rows) > 60 and not [row for row in rows if "\n" + row[:-2] not in text]
    table = page.Table(page.read_rows(STUDY / "study.csv"), "summary")
    best, predicted = table.at_best("ppo", "gold"), table.get("ppo", "rm")
    assert f"| {page.show(best)} | {page.show(predicted)} |" in text
    page.pictures(table, tmp_path)
    assert len(list(tmp_path.glob("summary-*.png"))) == 2


def test_the_readme_says_what_the_csv_says():
    """Each "mean [low, high]" under "What we found" is a figure of study.csv, or a difference."""
    front = (STUDY.parents[1] / "README.md").read_text(encoding="utf-8")
    section = front.partition("\n## What we found")[2].partition("\n## ")[0]
    said = re.findall(r"−?[\d.]+ \[−?[\d.]+, −?[\d.]+\]", section)
    rows, known = page.read_rows(STUDY / "study.csv"), set()
    metrics = "gold shifted.matched gold.matched shifted.J shifted.margin_sd D.noisy kl rm".split()
    for table in (page.Table(rows, task) for task in summary.WORLDS):
        for arm, r in itertools.product(page.NAMES, (1, 2, 3, 4)):
            found = [table.get(arm, metric, r) for metric in metrics]
            for rival in ("sft", "dpo", "ppo", "reseeded", "random"):
                found += [table.gain(arm, metric, r, rival) for metric in metrics]
                found.append(table.net(arm, rival, r))
            known |= {page.show(x, digits) for x in found if x for digits in (0, 1, 2, 3)}
    assert set(said) <= known, set(said) - known


def test_a_cell_is_written_whole_and_known(tmp_path):
    csv, cell = tmp_path / "study.csv", ("dialogue", 0, "ppo", 1)
    page.append_rows(csv, [(*cell, "gold", 0.123456), (*cell, "kl", math.nan)])
    page.append_rows(csv, [("dialogue", 0, "sft", 0, "gold", 0.0)])
    assert page.read_rows(csv)[0] == (*cell, "gold", 0.1235) and len(page.read_rows(csv)) == 2
    assert cell in page.cells(csv)


def test_docs_stay_small():
    docs = STUDY.parent.rglob("*")
    assert sum(path.stat().st_size for path in docs if path.is_file()) < 3e6
