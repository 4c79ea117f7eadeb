"""docs/study: the statistics against known values, the rules on small examples, the two arms that live there, the page."""

import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as report_card
import rm

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "docs" / "study"
sys.path.insert(0, str(STUDY))
import page  # noqa: E402
import study  # noqa: E402


# ------------------------------------------------------------------------------------------------------- statistics

@pytest.mark.parametrize("p, df, t", [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.975, 7, 2.36462),
                                      (0.95, 7, 1.89458), (0.995, 4, 4.60409), (0.975, 30, 2.04227), (0.5, 5, 0.0),
                                      (0.025, 7, -2.36462)])
def test_t_quantiles_are_those_of_the_tables(p, df, t):
    assert page.t_quantile(p, df) == pytest.approx(t, abs=2e-5)
    assert page.t_cdf(t, df) == pytest.approx(p, abs=1e-6)


def test_interval_and_p():
    mean, low, high = page.t_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.18245 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-4)
    assert page.t_interval([1.0, math.nan])[0] == 1.0 and math.isnan(page.t_interval([1.0])[1]) and math.isnan(page.t_interval([])[0])
    t = 2.5 / (np.std([1, 2, 3, 4], ddof=1) / 2)
    assert page.p_value([1, 2, 3, 4]) == pytest.approx(2 * (1 - page.t_cdf(t, 3))) and page.p_value([1, 2, 3, 4]) == pytest.approx(0.0305, abs=1e-3)
    assert page.p_value([-1, 1]) == 1.0 and page.p_value([2, 2, 2]) == 0.0 and page.p_value([0, 0]) == 1.0 and math.isnan(page.p_value([1]))
    # the interval and the test agree: 0 at the interval's end is p = 0.05
    x = np.array([0.3, 1.1, 0.7, 2.0, 1.4])
    assert page.p_value(x - page.t_interval(x)[1]) == pytest.approx(0.05, abs=1e-6)
    assert page.paired({0: 1.0, 1: 2.0, 3: 9.0}, {0: 0.5, 1: 3.0, 2: 7.0}) == [0.5, -1.0]


def test_holm_against_its_definition():
    assert page.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert page.holm([0.5, 0.9]) == [1.0, 1.0]
    with_nan = page.holm([0.01, math.nan, 0.02])
    assert with_nan[0] == pytest.approx(0.02) and math.isnan(with_nan[1]) and with_nan[2] == pytest.approx(0.02)
    assert page.holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    rng = random.Random(0)
    for _ in range(50):  # rejects exactly what the step-down does
        ps = [rng.random() ** 4 for _ in range(6)]
        rejected, order = set(), sorted(range(6), key=ps.__getitem__)
        for rank, i in enumerate(order):
            if ps[i] > 0.05 / (6 - rank):
                break
            rejected.add(i)
        assert {i for i, p in enumerate(page.holm(ps)) if p <= 0.05} == rejected


@pytest.mark.parametrize("interval, stays, is_better", [((0.5, -1.0, 1.9), "yes", "no"), ((0.5, -1.0, 2.1), "unclear", "unclear"),
                                                        ((3.0, 2.5, 3.5), "no", "yes"), ((-4.0, -5.0, -3.0), "no", "no"),
                                                        ((1.0, math.nan, math.nan), "unclear", "unclear")])
def test_verdicts_follow_the_rules(interval, stays, is_better):
    assert page.equivalent(interval, 2.0) == stays
    assert page.better(interval, 0.01 if interval[1] > 0 else 0.3, 2.0) == is_better


def test_better_needs_its_p():
    assert page.better((3.0, 0.1, 5.9), 0.2, 2.0) == "unclear" and page.better((-3.0, -5.0, -1.0), 0.001, 2.0) == "no"


def test_gold_at_equal_kl():
    assert page.at_equal_kl([1.0, 2.0, 1.5, 4.0], [0.5, 1.0, 2.0, 0.0], [0.5, 1.0, 3.0]) == pytest.approx([0.25, 0.5, 1.0])
    assert math.isnan(page.at_equal_kl([1.0], [1.0], [2.0])[0])


# ------------------------------------------------------------------------------------------------------- stop rules

def test_stop_rules():
    assert page.stop_round([1, 2, 5, 1], 3, "-") == 2                         # what comes after the crossing does not count
    assert page.stop_round([9, 9], 3, "-") == 1 and page.stop_round([1, 2, 3], 3, "-") == 3
    assert page.stop_round([5, 4, 2, 9], 3, "+") == 2
    # the best threshold, by trying all of them
    signals, gold = [[1.0, 2.0, 4.0], [2.0, 3.0, 3.5]], [[0.0, 1.0, -1.0], [0.0, 2.0, 1.0]]
    best = page.best_threshold(signals, gold, "-")
    worth = lambda x: sum(g[page.stop_round(s, x, "-") - 1] for s, g in zip(signals, gold))
    assert worth(best) == max(map(worth, np.arange(0, 5, 0.01))) == 3.0
    rows = [("t", seed, "metarm-first", r, metric, value) for seed in (0, 1) for r in (1, 2, 3)
            for metric, value in (("kl", signals[seed][r - 1]), ("gold", gold[seed][r - 1]))]
    judged = page.judge_rules(page.table_of(rows), "t", "metarm-first", {"KL to SFT stays below": best}, 3)
    trivial, kl = judged["always the primary round (trivial)"], judged["KL to SFT stays below"]
    assert trivial == {"round": [3, 3], "hit": [True, True], "lost": [2.0, 1.0], "gain": [0.0, 0.0]}
    assert kl == {"round": [2, 2], "hit": [True, True], "lost": [0.0, 0.0], "gain": [2.0, 1.0]}
    assert sum(rule is None for rule in page.STOP_RULES.values()) == 1 and len(page.STOP_RULES) >= 4


def test_the_report_gives_the_studys_advice():
    settings = data.read_json(STUDY / "settings.json")["thresholds"]["dialogue"]
    rule, sign, threshold = report_card.STOP
    assert (rule, sign) == ("KL, nats", "-") and threshold == settings["KL to SFT stays below"]


def test_the_best_round_is_chosen_on_validation_prompts():
    rows = [("t", 0, "a", r, metric, value) for metric, values in (("gold", (5, 1, 2)), ("gold.valid", (0, 3, 1)))
            for r, value in enumerate(values, 1)]
    table = page.table_of(rows)
    assert page.best_rounds(table, "t", "a", 3) == {0: 2} and page.at_best(table, "t", "a", 3, "gold") == {0: 1}
    assert page.best_rounds(table, "t", "a", 1) == {0: 1}


# ------------------------------------------------------------------------------------------------------- arms

def test_arms_and_their_knobs():
    settings = {"chosen": {"metarm-first": {"eta": 0.3}, "reseeded": {"lr": 6e-4}}}
    assert study.split_arm("metarm-first@eta=1@noise=0") == ("metarm-first", {"eta": 1.0, "noise": 0.0})
    assert study.knobs_of("metarm-first", settings)["eta"] == 0.3 == study.knobs_of("random", settings)["eta"]
    assert study.knobs_of("metarm-first@eta=1", settings)["eta"] == 1.0 and study.knobs_of("metarm-exact", settings)["eta"] == 0.1
    assert study.knobs_of("reseeded", settings)["lr"] == 6e-4 and study.knobs_of("ocrm", settings)["tau"] == 0.01
    flags = study.toy_flags()  # read out of run.sh
    assert flags.keys() == {"world", "sft", "rm", "meta", "dpo", "sample", "meta_sample", "ppo", "eval"}
    assert study.value_of(flags["ppo"], "steps") > 0 and study.value_of(["--lr", "1", "--lr", "2"], "lr") == 2
    assert "lr" not in study.knobs_of("ocrm", settings) and "kl_coef" not in study.knobs_of("ppo", settings)     # run.sh's
    assert study.value_of(flags["ppo"], "kl_coef") in study.ARMS["ppo-tuned"][2]
    for wrong in ("metarm", "metarm-first@eta", "metarm-first@eta=x", "metarm-first@etta=1"):
        with pytest.raises(ValueError, match="--arms"):
            study.split_arm(wrong)
    assert {len(values) for _, knob, values, _ in study.ARMS.values() if knob} == {3}          # equal effort
    assert set(study.SUMMARY_ARMS) < set(study.ARMS) and set(study.ARMS) | {"sft"} == set(page.NAMES)


def test_small_mistakes_are_one_line(capsys, tmp_path):
    for argv, complaint in ((["--phase", "sleep"], "--phase"), (["--tasks", "poem"], "--tasks"), (["--arms", "dpo,magic"], "--arms"),
                            (["--seeds", "0,x"], "--seeds"), (["--seeds", "0,100"], "tuning seeds"), (["--phase", "main"], "not tuned"),
                            (["--phase", "page"], "no such file")):
        assert study.main([*argv, "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]) == 2
        told = capsys.readouterr().err
        assert complaint in told and told.count("\n") == 1, told


def test_rounds_of_the_arms():
    arms = study.main_arms("dialogue", study.Config(), {"etas": {"dialogue": [0.02, 0.2]}})
    assert arms["sft"] == arms["dpo"] == 0 and arms["ppo"] == arms[page.METHOD] == arms["ocrm"] == 4
    assert arms["oracle"] == arms["metarm-first@eta=0.2"] == study.PRIMARY == 3 and arms["ocrm@ood=1"] == 2
    assert set(study.ARMS) < set(arms) and study.main_arms("dialogue", study.Config(arms="dpo,joint", rounds=1), {"etas": {"dialogue": []}}) == {
        "dpo": 0, "joint": 1}


def test_what_the_csv_has_is_not_made_again(monkeypatch, tmp_path):
    """Of a seed that study.csv has in part, only the rest is made: and vanilla PPO, on whose samples all RMs are measured."""
    made, policy = [], tmp_path / "policy"
    policy.mkdir()
    data.write_text(policy / "x", "x")
    for name in ("shared", "call", "rm0", "watch_parent", "gold_policy", "preferences", "answers"):
        monkeypatch.setattr(study, name, lambda *args, **flags: policy)
    monkeypatch.setattr(study, "final_kl", lambda path: 1.0)
    monkeypatch.setattr(study, "reward_model", lambda home, arm, r, *rest: made.append(f"{arm}-{r}") or policy)
    monkeypatch.setattr(study, "improve", lambda *args: policy)
    monkeypatch.setattr(study, "measure_cell", lambda *args: {"gold": 1.0})
    monkeypatch.setattr(data, "read_preferences", lambda path: [])
    config, arms = study.Config(runs=str(tmp_path / "runs")), {"ppo": 4, "reseeded": 2, "random": 2}
    there = frozenset({("sft", 0), ("ppo", 4), ("reseeded", 1), ("reseeded", 2), ("random", 1)})
    cost = study.cost_of([("dialogue", 0, arms, config, {}, there)], config)
    study.job("dialogue", 0, arms, config, {}, there)
    assert made == ["ppo-1", "ppo-2", "ppo-3", "ppo-4", "random-1", "random-2"]
    cells = sorted(path.stem for path in (tmp_path / "runs/dialogue-0/cells").iterdir())
    assert cells == ["ppo-1", "ppo-2", "ppo-3", "random-2"] and cost[:2] == (4, 8)


@pytest.fixture(scope="module")
def few(tmp_path_factory, policy_folder):
    folder = tmp_path_factory.mktemp("few")
    data.write_jsonl(folder / "pairs.jsonl", [{"prompt": f"Human: my phone {i}", "chosen": " thank you", "rejected": " Sorry, no"}
                                              for i in range(32)])
    data.write_jsonl(folder / "S.jsonl", [{"prompt": f"Human: the invoice {i}", "responses": [" thank", " you", " a charge"]} for i in range(16)])
    return folder


def weights(folder):
    return torch.cat([p.flatten() for p in rm.load_reward_model(str(folder))[0].parameters()])


@pytest.mark.parametrize("kind", ["random", "joint"])
def test_without_their_knob_random_and_joint_are_plain_training(tmp_path, policy_folder, few, kind):
    """Same head, same order of D, same optimizer: whatever the two do differently is the knob's doing."""
    assert rm.main(["--model", policy_folder, "--data", str(few / "pairs.jsonl"), "--lr", "1e-3", "--batch_size", "8", "--seed", "3",
                    "--out", str(tmp_path / "plain")]) == 0
    for knob in (0.0, 0.5):
        study.train_variant(study.Variant(str(tmp_path / f"{knob}"), policy_folder, str(few / "pairs.jsonl"), str(few / "S.jsonl"),
                                          kind, knob, 1e-3, 8, 3))
    assert torch.allclose(weights(tmp_path / "plain"), weights(tmp_path / "0.0"), atol=1e-5)
    assert not torch.allclose(weights(tmp_path / "plain"), weights(tmp_path / "0.5"), atol=1e-4)


def test_gold_takes_the_rms_place_and_gives_it_back():
    prompt, answers, original = "\n\nHuman: My lamp came broken.\n\nAssistant:", [" I will send a replacement.", ""], rm.score
    with pytest.raises(ZeroDivisionError):
        with study.gold_as_reward():
            assert rm.score(None, None, [prompt] * 2, answers).tolist() == pytest.approx([data.gold_reward(prompt, x) for x in answers])
            1 / 0
    assert rm.score is original


# ------------------------------------------------------------------------------------------------------- the page

METRICS = ("by_gold.kl gold gold.valid gold.ood words distinct bleu cosine win.sft lose.sft win.dpo lose.dpo win.ppo lose.ppo win.sft.ood lose.sft.ood "
           "win.ppo.ood lose.ppo.ood kl rm D.noisy D.gold own.acc own.variance_sd own.J_sd own.disagree own.gold_variance sft.variance_sd sft.gold_variance ood.acc ood.matched "
           "cos.early cos.late climb.L climb.L_taylor climb.J weight.mean weight.rho_gap weight.flipped").split()
METRICS += [f"{s}.{m}" for s in ("shifted", "gold", "adapted.shifted") for m in
            "acc matched rho J J_sd margin margin_sd variance variance_sd".split()]
METRICS += [f"curve{i}.{m}" for i in range(3) for m in ("kl", "gold", "rm", "gold_variance", "rm_variance")] + [f"epoch{i}" for i in (0, 4, 8, 12, 16)]
METRICS += [f"shifted.gap{q}" for q in (10, 25, 50, 75, 90)]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A study.csv of drawn numbers, with every arm and phase; MetaRM's gold and wins are raised, so that some claims hold."""
    folder, rng, config = tmp_path_factory.mktemp("study"), random.Random(0), study.Config()
    settings = {"chosen": {}, "etas": {"dialogue": [0.02, 0.2]}, "thresholds": {"dialogue": {"KL to SFT stays below": 5.0}},
                "trials": {"dialogue": {"metarm-first": {"knob": "eta", "gold": {"0.03": 0.1, "0.1": 0.2}, "chosen": 0.1}}}}
    lines = []
    for task in ("dialogue", "summary"):
        for seed in range(3):
            arms = study.main_arms(task, config, settings) | (study.boundary_arms(config) if task == "dialogue" else {})
            for arm, rounds in arms.items():
                lines += [f"{task},{seed},{arm},{r},{metric},{rng.uniform(20, 30) + 30 * (arm == 'metarm-first' and metric == 'win.ppo'):.4g}"
                          for r in (range(1, rounds + 1) if rounds else [0]) for metric in METRICS]
    data.write_text(folder / "study.csv", "\n".join(["task,seed,arm,round,metric,value", *lines]) + "\n")
    data.write_text(folder / "settings.json", json.dumps(settings))
    return folder


def test_the_page_is_made_of_the_csv_alone(made_up):
    text, table = study.page_of(made_up)
    assert text == study.page_of(made_up)[0] and "nan" not in text.lower().replace("fluctuations", "")
    for heading in ("Verdicts", "Table 1", "Table 2", "Table 3", "OOD", "mechanism", "Where does it help", "When to stop", "Rules, fixed"):
        assert heading in text
    ours = page.minus(table["dialogue", "metarm-first", 3, "win.ppo"], table["dialogue", "metarm-first", 3, "lose.ppo"])
    line = next(line for line in text.splitlines() if line.startswith("| policy better than PPO"))
    assert page.show(ours) in line and page.t_interval(ours.values())[0] > 20
    verdict = next(row for row in page.verdicts(table, "dialogue", {}, 3, study.MARGIN) if row["claim"].startswith("policy better than PPO"))
    assert verdict["verdict"] == ("yes" if verdict["p"] < 0.05 else "unclear") and verdict["controls"]["reseeded"] == "no"
    assert all(f"| {label} |" in text for label in study.BOUNDARY)
    assert page.page({}, {}, "", 3, study.MARGIN, study.BOUNDARY, study.ONLY_METARM).count("Not run yet") == 1


def test_pictures(made_up, tmp_path):
    page.pictures(study.page_of(made_up)[1], "dialogue", tmp_path, 3, study.BOUNDARY, study.ONLY_METARM)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"dialogue-{name}.png" for name in ("accuracy", "boundary", "fig1", "fig4", "fig5", "gold_over_kl", "ood")]


@pytest.mark.skipif(not (STUDY / "study.csv").exists(), reason="the study has not been run: there is no docs/study/study.csv")
def test_both_readmes_say_what_the_csv_says():
    text, table = study.page_of(STUDY)
    assert (STUDY / "README.md").read_text(encoding="utf-8") == text
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    assert study.MARKS[0] not in front or study.quoted(table) in front
    for path in STUDY.glob("*"):
        assert path.suffix != ".png" or path.name in text
    assert sum(path.stat().st_size for path in (ROOT / "docs").rglob("*") if path.is_file()) < 3e6
