"""The judge: intervals, tests, verdicts, stop rules, tables and pictures, from study.csv alone.

The rules, fixed before the main seeds were run:

  Primary   round 3 of every arm. Secondary: the round with the best gold on validation prompts.
  Interval  mean and 95 % t interval over seeds; two arms are compared seed by seed (paired).
  Verdict   BETTER: yes, if the difference is above 0 with p < 0.05 after Holm's correction over all
            such claims of the task; no, if the whole interval lies below the margin, the least gain
            worth having; else unclear. STAYS: yes, if the whole interval lies within the margin on
            both sides; no, if it lies outside; else unclear.
  Control   does as well, if the difference of MetaRM to it is not above 0 by its own interval.
"""

import csv
import json
import math
from pathlib import Path

import numpy as np
from scipy import stats
from summary import table as read_table

import data

PRIMARY, METHOD, CONTROLS = 3, "metarm-first", ("reseeded", "random", "ocrm")
Seeds = dict[int, float]  # a figure of each seed

# ------------------------------------------------------------------------------------- statistics


def t_interval(values, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) over seeds; of one seed there is no interval (NaN)."""
    x = np.array([value for value in values if value == value], float)
    if len(x) < 2:
        return (float(x.mean()) if len(x) else math.nan), math.nan, math.nan
    half = stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def p_value(differences) -> float:
    """Two-sided, of the one-sample t test of a mean of 0."""
    x = np.array(list(differences), float)
    if len(x) < 2:
        return math.nan
    if x.std() == 0:
        return float(x.mean() == 0)
    return float(stats.ttest_1samp(x, 0).pvalue)


def holm(p_values: list[float]) -> list[float]:
    """Step-down: the smallest p times n, the next times n - 1 ..., never falling. NaN stays out."""
    real, adjusted, top = sorted(p for p in p_values if p == p), {}, 0.0
    for rank, p in enumerate(real):
        top = max(top, min(1.0, (len(real) - rank) * p))
        adjusted.setdefault(p, top)
    return [adjusted.get(p, math.nan) for p in p_values]


def stays(interval: tuple, margin: float) -> str:
    """yes, no or unclear: is the whole interval within the margin on both sides?"""
    _, low, high = interval
    if -margin < low and high < margin:
        return "yes"
    return "no" if low > margin or high < -margin else "unclear"


def better(interval: tuple, p: float, margin: float) -> str:
    """yes, no or unclear, by Holm's p; no: a gain worth having is ruled out."""
    mean, _, high = interval
    if mean > 0 and p < 0.05:
        return "yes"
    return "no" if high < margin else "unclear"


def at_equal_kl(kl: list[float], gold: list[float], grid: list[float]) -> list[float]:
    """Gold when the policy had come so far: over KL's running maximum; NaN beyond it."""
    far, gold = np.maximum.accumulate([0.0, *kl]), [0.0, *gold]
    return [float(np.interp(x, far, gold)) if x <= far[-1] else math.nan for x in grid]


def minus(a: Seeds, b: Seeds) -> Seeds:
    """a - b over the seeds that have both."""
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


# --------------------------------------------------------------------------------------- the rows

COLUMNS = ("task", "seed", "arm", "round", "metric", "value")


def read_rows(path: Path) -> list[tuple]:
    """(task, seed, arm, round, metric, value) of each line; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as lines:
        _, *rows = csv.reader(lines)
    return [(task, int(s), arm, int(r), what, float(x)) for task, s, arm, r, what, x in rows]


def cells(path: Path) -> set[tuple]:
    """{(task, seed, arm, round)}: what is measured already."""
    return {row[:4] for row in read_rows(path)}


def append_rows(path: Path, rows: list[tuple]) -> None:
    """Adds the rows of a cell, all or none; NaN stays out."""
    before = path.read_text(encoding="utf-8") if path.exists() else ",".join(COLUMNS) + "\n"
    lines = [f"{','.join(map(str, row[:5]))},{row[5]:.4g}\n" for row in rows if row[5] == row[5]]
    data.write_text(path, before + "".join(lines))


def read_settings(folder: Path) -> dict:
    """settings.json of a folder: the knobs chosen by tuning, and the stop rules' thresholds."""
    path = folder / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Table:
    """study.csv, by (task, arm, round, metric): {seed: value}."""

    def __init__(self, rows: list[tuple], task: str):
        self.task, self.found = task, {}
        for t, seed, arm, r, metric, value in rows:
            if t == task:
                self.found.setdefault((arm, r, metric), {})[seed] = value

    def get(self, arm: str, metric: str, r: int = PRIMARY) -> Seeds:
        return self.found.get((arm, 0 if arm in ("sft", "dpo") else r, metric), {})

    def net(self, arm: str, rival: str, r: int = PRIMARY) -> Seeds:
        """Wins minus losses, points, against `rival` in the same round."""
        return minus(self.get(arm, f"win.{rival}", r), self.get(arm, f"lose.{rival}", r))

    def gain(self, arm: str, metric: str, r: int = PRIMARY, rival: str = "ppo") -> Seeds:
        return minus(self.get(arm, metric, r), self.get(rival, metric, r))

    def rounds(self, arm: str, metric: str) -> dict[int, list[float]]:
        """{seed: [round 1, round 2, ...]}, as far as there is no gap."""
        found: dict[int, list[float]] = {}
        for r in range(1, 100):
            for seed, value in self.get(arm, metric, r).items():
                if len(found.setdefault(seed, [])) == r - 1:
                    found[seed].append(value)
        return found

    def path(self, arm: str, what: str, last: int = 4) -> list[Seeds]:
        """The curve of kl, gold or rm over PPO, in each third of each round."""
        return [self.get(arm, f"curve{i}.{what}", r) for r in range(1, last + 1) for i in range(3)]

    def at_best(self, arm: str, metric: str, last: int = PRIMARY) -> Seeds:
        """In the round up to `last` that has the highest gold on validation prompts."""
        best, values = self.rounds(arm, "gold.valid"), self.rounds(arm, metric)
        return {seed: values[seed][int(np.argmax(gold[:last]))] for seed, gold in best.items()}


# --------------------------------------------------------------------------------------- verdicts

# claim: better or stays / margin / the paper's figure, dialogue / summary / what it is a claim on
CLAIMS = read_table("""
orders shifted samples better than RM₀ (accuracy at the same gold gap, points):
    better / 2 / yes (Fig. 5), no figure / yes (Fig. 5), no figure / gain shifted.matched
orders samples that no RM chose better than RM₀ (accuracy at the same gold gap, points):
    better / 2 / – / – / gain gold.matched
holds shifted samples further apart than RM₀ (mean gap, SD):
    better / 0.1 / yes (Fig. 5), no figure / yes (Fig. 5), no figure / gain shifted.margin_sd
identifies subtle differences OOD (accuracy, points):
    better / 2 / yes, no figure / yes, no figure / gain ood.matched
policy better than PPO (wins − losses, points): better / 5 / +39, +60 / +31 / net ppo
policy better than DPO (wins − losses, points): better / 5 / +14, +51 / +24 / net dpo
OOD policy better than PPO there (wins − losses on OOD prompts, points):
    better / 5 / yes (Fig. 3) / yes (Fig. 3) / ood ppo.ood
keeps accuracy on D (points against RM₀):
    stays / 2 / yes (Fig. 4) / yes (Fig. 4) / gain D.noisy
rounds pay (wins − losses against SFT, round 3 over round 1, points):
    better / 5 / +34, +39 / +35 / over 1
a decline after round 3 (wins − losses against SFT, round 3 over round 4, points):
    better / 5 / +7, +9 / −13 (a round later: +9) / over 4
""")


def differences(table: Table, arm: str, claimed: str) -> Seeds:
    """An arm's differences to a claim's baseline, seed by seed: 0 is "no better"."""
    how, what = claimed.split()
    if how == "gain":
        return table.gain(arm, what)
    if how == "over":
        return minus(table.net(arm, "sft"), table.net(arm, "sft", int(what)))
    return table.net(f"{arm}@ood=1", what, 2) if how == "ood" else table.net(arm, what)


def verdicts(table: Table) -> list[list[str]]:
    """A row per claim: its verdict, our figure, p, the paper's figure, each control's answer."""
    found, ps = {}, []
    for claim, (kind, *_, claimed) in CLAIMS.items():
        found[claim] = {arm: differences(table, arm, claimed) for arm in (METHOD, *CONTROLS)}
        ps.append(p_value(found[claim][METHOD].values()) if kind == "better" else math.nan)
    rows = []
    for (claim, (kind, margin, *paper, _)), p in zip(CLAIMS.items(), holm(ps), strict=True):
        ours, margin, controls = found[claim][METHOD], float(margin), []
        interval = t_interval(ours.values())
        verdict = better(interval, p, margin) if kind == "better" else stays(interval, margin)
        for control in CONTROLS:
            theirs = found[claim][control]
            _, low, _ = t_interval(minus(ours, theirs).values())
            if not theirs:
                controls.append("–")
            elif kind == "stays":
                controls.append(stays(t_interval(theirs.values()), margin))
            else:
                controls.append("no" if low > 0 else "yes")
        row = [claim, f"**{verdict if ours else 'not run'}**", show(ours)]
        row += ["–" if p != p else f"{p:.3f}", paper[table.task != "dialogue"], *controls]
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------- stop rules

# What somebody without labels can look at after each round: (the metric, what is true of it while
# one goes on: "+" it is at least the threshold, "-" at most).
STOP_RULES = {
    "KL to SFT stays below": ("kl", "-"),
    "reward spread on fresh samples stays above": ("own.variance_sd", "+"),
    "J on fresh samples stays above": ("own.J_sd", "+"),
    "successive RMs agree on fresh samples": ("own.disagree", "-"),
    "accuracy on held-out D stays above": ("D.noisy", "+"),
}


def stop_round(signal: list[float], threshold: float, sign: str) -> int:
    """The last round before the signal crosses the threshold; round 1 is always taken."""
    for taken, value in enumerate(signal):
        if value < threshold if sign == "+" else value > threshold:
            return max(1, taken)
    return len(signal)


def stops(table: Table, thresholds: dict[str, float]) -> list[list[str]]:
    """A row per rule: threshold, mean round, best round or next to it, gold lost and gained."""
    rows = []
    for rule, threshold in thresholds.items():
        metric, sign = STOP_RULES[rule]
        signals, gold = table.rounds(METHOD, metric), table.rounds(METHOD, "gold")
        gold = {
            seed: g for seed, g in gold.items() if PRIMARY <= len(g) <= len(signals.get(seed, []))
        }
        at = {seed: stop_round(signals[seed], threshold, sign) for seed in gold}
        hits = [abs(at[seed] - 1 - int(np.argmax(g))) <= 1 for seed, g in gold.items()]
        lost = [max(g) - g[at[seed] - 1] for seed, g in gold.items()]
        gained = [g[at[seed] - 1] - g[PRIMARY - 1] for seed, g in gold.items()]
        if gold:
            row = [rule, f"{threshold:.3g}", f"{np.mean(list(at.values())):.1f}"]
            rows.append([*row, f"{100 * np.mean(hits):.0f}", show(lost), show(gained)])
    return rows


# ------------------------------------------------------------------------------ tables, pictures

NAMES = {
    "sft": "SFT",
    "dpo": "DPO",
    "ppo": "PPO on RM₀",
    "ppo-tuned": "PPO on RM₀, KL weight tuned",
    "reseeded": "plain RM, reseeded",
    "random": "random lookahead",
    "metarm-first": "MetaRM, first order",
    "metarm-exact": "MetaRM, exact",
    "adapted": "MetaRM, θ′ scores",
    "joint": "joint: L − λJ",
    "ocrm": "OCRM, τ = 0.01",
    "ocrm-tuned": "OCRM, τ tuned",
    "oracle": "gold labels on S",
}
COLOURS = "999 C7A 07B 5BE 097 863 D50 A30 F94 739 DC0 B90 000".split()
COLOURS = {arm: f"#{colour}" for arm, colour in zip(NAMES, COLOURS, strict=True)}


def show(values, digits: int = 2) -> str:
    """mean [low, high] over seeds, or –."""
    x, low, high = t_interval(values.values() if isinstance(values, dict) else values)
    if x != x:
        return "–"
    text = f"{x:.{digits}f}" + ("" if low != low else f" [{low:.{digits}f}, {high:.{digits}f}]")
    return text.replace("-", "−")


def findings(table: Table) -> list[list[str]]:
    """A row per arm: gold, gold minus PPO's, wins minus losses against SFT, its RM's accuracy."""
    rows = []
    for arm, name in NAMES.items():
        if table.get(arm, "gold") and arm != "sft":
            gain = "–" if arm == "ppo" else show(table.gain(arm, "gold"))
            net, right = table.net(arm, "sft"), table.get(arm, "shifted.matched")
            rows.append([name, show(table.get(arm, "gold")), gain, show(net, 0), show(right, 1)])
    return rows


def equal_kl(table: Table, grid=(1.0, 2.0, 4.0, 6.0)) -> list[list[str]]:
    """A row per RL arm: gold when its policy was so many nats from SFT, over its rounds."""
    rows = []
    for arm, name in NAMES.items():
        kl, gold, found = table.path(arm, "kl"), table.path(arm, "gold"), []
        for seed in kl[0]:
            there = [i for i, some in enumerate(kl) if seed in some]
            path = [kl[i][seed] for i in there], [gold[i][seed] for i in there]
            found.append(at_equal_kl(*path, grid))
        if found:
            rows.append([name, *(show(values) for values in zip(*found, strict=True))])
    return rows


def markdown(headings: str, rows: list[list[str]]) -> str:
    lines = [headings.split(" / "), ["---"] * len(rows[0]), *rows] if rows else [["*(not run)*"]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(folder: Path) -> str:
    """All tables of study.csv and settings.json, as Markdown."""
    rows, parts = read_rows(folder / "study.csv"), []
    for task in sorted({row[0] for row in rows}):
        table = Table(rows, task)
        thresholds = read_settings(folder).get("thresholds", {}).get(task, {})
        heads = "round 3 / gold reward, SD above SFT / gold, minus PPO on RM₀ / "
        heads += "wins − losses against SFT / its RM right on vanilla PPO's samples, %"
        parts += [f"## {task.capitalize()}\n", markdown(heads, findings(table))]
        heads = "claim / verdict / figure [95 %] / p / paper / "
        parts.append(markdown(heads + " / ".join(NAMES[arm] for arm in CONTROLS), verdicts(table)))
        heads = "gold at equal KL / 1 nats / 2 nats / 4 nats / 6 nats"
        parts.append(markdown(heads, equal_kl(table)))
        heads = "stop rule / threshold / stops at round / best round or next to it, % / "
        heads += "gold lost to the best / gained on always round 3"
        parts.append(markdown(heads, stops(table, thresholds)))
    return "\n".join(parts)


def pictures(table: Table, folder: Path) -> None:
    """Draws a forest plot of differences to PPO on RM₀, and gold over KL; an arm has one colour."""
    from matplotlib import figure, rcParams

    rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    arms = [arm for arm in NAMES if table.get(arm, "gold") and arm != "sft"]
    panels = {
        "gold": "gold reward, SD",
        "shifted.matched": "accuracy on vanilla PPO's samples, points",
        "gold.matched": "accuracy on samples that no RM chose, points",
    }
    page = figure.Figure((12, 1.5 + 0.3 * len(arms)), layout="constrained")
    for axes, (metric, label) in zip(page.subplots(1, 3, sharey=True), panels.items(), strict=True):
        for y, arm in enumerate(reversed(arms)):
            x, low, high = t_interval(table.gain(arm, metric).values())
            axes.plot([low, high], [y, y], color=COLOURS[arm], lw=2.5)
            axes.plot(x, y, "o", color=COLOURS[arm])
        axes.set_yticks(range(len(arms)), [NAMES[arm] for arm in reversed(arms)])
        axes.axvline(0, color="#BBBBBB", lw=1)
        axes.set_xlabel(label)
    page.suptitle("Round 3, minus PPO on RM₀ (95 %)", x=0.01, ha="left")
    page.savefig(folder / f"{table.task}-differences.png", dpi=110)

    page = figure.Figure((11, 4.5), layout="constrained")
    panels = {"gold": "gold reward", "rm": "predicted by the arm's own RM"}
    for axes, (key, label) in zip(page.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for arm in arms:
            x, y = (table.path(arm, what, PRIMARY) for what in ("kl", key))
            x, y = ([t_interval(some.values())[0] for some in side] for side in (x, y))
            axes.plot(x, y, ".-", color=COLOURS[arm], label=NAMES[arm])
        axes.set(title=label, xlabel="KL to the SFT policy, nats", ylabel="reward, SD above SFT")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    page.savefig(folder / f"{table.task}-gold_over_kl.png", dpi=110)
