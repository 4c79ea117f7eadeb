"""The judge: intervals, tests, verdicts, tables and pictures, from study.csv alone.

The rules, fixed before the main worlds were run:

  World     two arms are compared head by head (the same new head, the same order of D); the
            differences are averaged within a world, and the worlds are the sample.
  Interval  mean and 95 % t interval over worlds.
  Primary   the two CONTRASTS: accuracy on the frozen policy's fresh samples, at the gold gaps of
            SFT samples. Yes, if the difference is above 0 with p < 0.05 after Holm's correction
            over the two; no, if the whole interval lies below MARGIN; else unclear.
  Secondary everything else.
"""

import csv
import json
import math
from pathlib import Path

import numpy as np
from scipy import stats

PRIMARY = "shifted.matched"
CONTRASTS = {
    "MetaRM orders shifted samples better than a plain RM": ("first@1", "plain"),
    "and better than with S from the SFT policy": ("first@1", "stale@1"),
}
MARGIN = 2.0  # points: the least gain worth having
Worlds = dict[int, float]  # a figure of each world, by its seed

# ------------------------------------------------------------------------------------- statistics


def t_interval(values, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) over worlds; of one world there is no interval (NaN)."""
    x = np.array(list(values), float)
    if len(x) < 2:
        return (float(x.mean()) if len(x) else math.nan), math.nan, math.nan
    half = stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def p_value(differences) -> float:
    """Two-sided, of the one-sample t test of a mean of 0; NaN of fewer than two worlds."""
    x = np.array(list(differences), float)
    return float(stats.ttest_1samp(x, 0).pvalue) if len(x) > 1 else math.nan


def holm(p_values: list[float]) -> list[float]:
    """Step-down: the smallest p times n, the next times n - 1 ..., never falling. NaN stays out."""
    real, adjusted, top = sorted(p for p in p_values if p == p), {}, 0.0
    for rank, p in enumerate(real):
        top = max(top, min(1.0, (len(real) - rank) * p))
        adjusted.setdefault(p, top)
    return [adjusted.get(p, math.nan) for p in p_values]


def better(interval: tuple, p: float, margin: float = MARGIN) -> str:
    """yes, no or unclear, by Holm's p; no: a gain worth having is ruled out."""
    mean, _, high = interval
    if mean > 0 and p < 0.05:
        return "yes"
    return "no" if high < margin else "unclear"


def smallest_effect(sd: float, worlds: int, alpha: float = 0.025, power: float = 0.8) -> float:
    """The mean difference that a t test sees with this power, if differences vary by sd.

    alpha, two-sided: 0.05 / 2 is what Holm asks of the smaller of two p values.
    """
    critical, effects = stats.t.ppf(1 - alpha / 2, worlds - 1), np.linspace(0.01, 8, 800)
    reached = stats.nct.sf(critical, worlds - 1, effects * math.sqrt(worlds))
    return float(sd * np.interp(power, reached, effects))


# --------------------------------------------------------------------------------------- the rows


def read_rows(folder: Path) -> list[tuple]:
    """(task, seed, arm, head, metric, value) of each line of study.csv; none if there is none."""
    path = folder / "study.csv"
    rows = csv.reader(path.read_text(encoding="utf-8").splitlines()[1:]) if path.exists() else []
    return [(task, int(s), arm, int(h), what, float(x)) for task, s, arm, h, what, x in rows]


def cells(folder: Path) -> set[tuple]:
    """{(task, seed, arm, head)}: what is measured already."""
    return {row[:4] for row in read_rows(folder)}


def append_rows(folder: Path, rows: list[tuple]) -> None:
    """Adds the rows of a cell to study.csv in one write, as other processes do; NaN stays out."""
    lines = [f"{','.join(map(str, row[:5]))},{row[5]:.4g}\n" for row in rows if row[5] == row[5]]
    with open(folder / "study.csv", "ab", buffering=0) as file:
        file.write(
            ((file.tell() == 0) * "task,seed,arm,head,metric,value\n" + "".join(lines)).encode()
        )


def read_settings(folder: Path) -> dict:
    """settings.json of a folder: what was tried on the tuning seeds, and what was chosen."""
    path = folder / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def by_world(some: dict[tuple, float]) -> Worlds:
    """{seed: mean over heads} of {(seed, head): value}."""
    heads: dict[int, list[float]] = {}
    for (seed, _), value in sorted(some.items()):
        heads.setdefault(seed, []).append(value)
    return {seed: float(np.mean(values)) for seed, values in heads.items()}


class Table:
    """study.csv of a task, by (arm, metric): {(seed, head): value}."""

    def __init__(self, rows: list[tuple], task: str):
        self.found: dict[tuple, dict] = {}
        for t, seed, arm, head, metric, value in rows:
            if t == task:
                self.found.setdefault((arm, metric), {})[seed, head] = value

    def get(self, arm: str, metric: str) -> Worlds:
        """An arm's figure in each world."""
        return by_world(self.found.get((arm, metric), {}))

    def gain(self, arm: str, metric: str = PRIMARY, rival: str = "plain") -> Worlds:
        """An arm minus another in each world. RESEEDED: plain RMs minus the first of them."""
        a = self.found.get(("plain" if arm == RESEEDED else arm, metric), {})
        b = self.found.get((rival, metric), {})
        if arm == RESEEDED:
            a = {cell: value for cell, value in a.items() if cell[1] > 0}
            b = {cell: b[cell[0], 0] for cell in a}
        return by_world({cell: a[cell] - b[cell] for cell in a.keys() & b.keys()})

    def arms(self) -> list[str]:
        """The arms that are compared with the plain RM, in the page's order."""
        known, order = {arm for arm, _ in self.found} | {RESEEDED}, list(NAMES)
        return sorted(known - {"plain", "rm0"}, key=lambda arm: (order.index(kind(arm)), knob(arm)))


# ------------------------------------------------------------------------------------------ tables

RESEEDED = "reseeded"
NAMES = {
    "first": "MetaRM, η × {}",
    "stale": "MetaRM, S from SFT, η × {}",
    "exact": "MetaRM exact, η × {}",
    "literal": "MetaRM, {}·∇J",
    "scale": "rewards scaled, η × {}",
    "random": "random climb, η × {}",
    RESEEDED: "plain RM, other seeds",
    "joint": "joint: L − {}·J",
    "ocrm": "OCRM, τ = {}",
    "gold": "gold labels on S",
    "plain": "plain RM",
}
COLOURS = {name: f"C{i}" for i, name in enumerate(NAMES)}  # matplotlib's ten
EFFECTS = {  # metric: (its heading, digits)
    PRIMARY: ("right on shifted samples, points", 1),
    "shifted.margin_sd": ("gap there, SD", 2),
    "shifted.rho": ("rank correlation there", 3),
    "sft.matched": ("right on SFT samples", 1),
    "gold.matched": ("on the gold policy's", 1),
    "ood.matched": ("OOD", 1),
    "D.noisy": ("on held-out D", 1),
}


def kind(arm: str) -> str:
    return arm.partition("@")[0]


def knob(arm: str) -> float:
    return float(arm.partition("@")[2] or 0)


def title(arm: str) -> str:
    return NAMES[kind(arm)].format(arm.partition("@")[2])


def show(values: Worlds, digits: int = 2) -> str:
    """mean [low, high] over worlds, or –."""
    x, low, high = t_interval(values.values())
    if x != x:
        return "–"
    text = f"{x:.{digits}f}" + ("" if low != low else f" [{low:.{digits}f}, {high:.{digits}f}]")
    return text.replace("-", "−")


def verdicts(table: Table) -> list[list[str]]:
    """A row per primary contrast."""
    found, rows = {claim: table.gain(a, rival=b) for claim, (a, b) in CONTRASTS.items()}, []
    ps = holm([p_value(some.values()) for some in found.values()])
    for (claim, some), p in zip(found.items(), ps, strict=True):
        sd = np.std(list(some.values()), ddof=1) if len(some) > 1 else math.nan
        seen = smallest_effect(sd, max(2, len(some)))
        row = [claim, f"**{better(t_interval(some.values()), p)}**", show(some), f"{p:.3f}"]
        rows.append([*row, str(len(some)), f"{sd:.1f}", f"{seen:.1f}"])
    return rows


def staleness(table: Table) -> list[list[str]]:
    """A row per policy of the chain, on whose samples RM₀ is measured."""
    columns = {"kl": 1, "worth": 2, "reward": 2, "matched": 1, "matched_sft": 1, "margin_sd": 2}
    chain = sorted({what[:4] for arm, what in table.found if arm == "rm0" and what[:3] == "ppo"})
    return [
        [name, *(show(table.get("rm0", f"{name}.{what}"), n) for what, n in columns.items())]
        for name in ("sft", *chain, "gold", "ood")
    ]


def effects(table: Table) -> list[list[str]]:
    """A row for the plain RM, and for each arm one of its differences to it."""
    rows = [["plain RM", *(show(table.get("plain", m), n) for m, (_, n) in EFFECTS.items())]]
    for arm in table.arms():
        found = [show(table.gain(arm, m), n) for m, (_, n) in EFFECTS.items()]
        rows.append([title(arm), *found])
    return rows


def climbs(table: Table) -> list[list[str]]:
    """A row per arm with a θ': J's rise, θ' itself, the weights of pairs there, the share moved."""
    rows, figures = [], {"climb.J": 3, "adapted.shifted.margin_sd": 2, "adapted.shifted.matched": 1}
    for arm in ("plain", *table.arms()):
        row = [title(arm), *(show(table.get(arm, what), n) for what, n in figures.items())]
        for at in ("at", "beyond"):
            flipped, right = (table.get(arm, f"{at}.weight.{x}") for x in ("flipped", "right"))
            row.append(show({seed: flipped[seed] / right[seed] for seed in flipped}))
        row += [show(table.get(arm, what), 0) for what in ("moved", "moved_bf16")]
        rows += [row] if row[5] != "–" or arm == "plain" else []
    return rows


def rules(table: Table) -> list[list[str]]:
    """A row per gold rule: % of pairs ordered as it alone orders them."""
    columns = [("plain", "sft"), *((arm, "shifted") for arm in ("rm0", "plain", "first@1", "gold"))]
    names = dict.fromkeys(what.split(".")[2] for _, what in table.found if ".rule." in what)
    return [
        [name, *(show(table.get(arm, f"{some}.rule.{name}"), 1) for arm, some in columns)]
        for name in names
    ]


TABLES = {  # headings: the function that gives the rows
    "claim / verdict / difference, points [95 %] / p (Holm) / worlds / SD over worlds"
    " / smallest effect seen 8 times of 10": verdicts,
    "samples of / KL, nats / gold, SD / reward by RM₀, SD / RM₀ right at matched gaps, %"
    " / on SFT samples at these gaps, % / RM₀'s mean gap, SD": staleness,
    " / ".join(["minus the plain RM", *(heading for heading, _ in EFFECTS.values())]): effects,
    "RM / J's rise by a climb / gap at θ′, SD / right at θ′, % / weight of flipped over right pairs"
    " at θ / at θ′ / weights moved, float32, % / bf16, %": climbs,
    "rule / plain RM, SFT samples / RM₀, shifted / plain RM / MetaRM, η × 1 / gold labels": rules,
}


def tables(folder: Path) -> str:
    """All tables of study.csv, as Markdown."""
    rows, parts = read_rows(folder), []
    for task in sorted({row[0] for row in rows}):
        parts.append(f"## {task.capitalize()}\n")
        for headings, rows_of in TABLES.items():
            lines = [headings.split(" / "), ["---"] * len(headings.split(" / "))]
            lines += rows_of(Table(rows, task))
            parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------- pictures


def pictures(folder: Path, out: Path) -> None:
    """Draws, per task, a forest plot of differences to the plain RM, and dose and response."""
    from matplotlib import figure, rcParams

    rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    rows = read_rows(folder)
    out.mkdir(parents=True, exist_ok=True)
    for task in sorted({row[0] for row in rows}):
        for draw in (forest, doses):
            page = figure.Figure(layout="constrained")
            draw(page, Table(rows, task))
            page.savefig(out / f"{task}-{draw.__name__}.png", dpi=110)


def forest(page, table: Table) -> None:
    """Each arm minus the plain RM, in three measures."""
    arms, metrics = table.arms()[::-1], (PRIMARY, "shifted.margin_sd", "D.noisy")
    page.set_size_inches(12, 1.5 + 0.3 * len(arms))
    for axes, metric in zip(page.subplots(1, 3, sharey=True), metrics, strict=True):
        for y, arm in enumerate(arms):
            x, low, high = t_interval(table.gain(arm, metric).values())
            axes.plot([low, high], [y, y], color=COLOURS[kind(arm)], lw=2.5)
            axes.plot(x, y, "o", color=COLOURS[kind(arm)])
        axes.set_yticks(range(len(arms)), [title(arm) for arm in arms])
        axes.axvline(0, color="#BBBBBB", lw=1)
        axes.set_xlabel(EFFECTS[metric][0])
    page.suptitle("Minus the plain RM of the same head (95 % over worlds)", x=0.01, ha="left")


def doses(page, table: Table) -> None:
    """Accuracy and gap on shifted samples, minus the plain RM's, over the length of the climb."""
    page.set_size_inches(11, 4)
    for axes, metric in zip(page.subplots(1, 2), (PRIMARY, "shifted.margin_sd"), strict=True):
        for name in dict.fromkeys(kind(arm) for arm in table.arms() if " η ×" in NAMES[kind(arm)]):
            arms = [arm for arm in table.arms() if kind(arm) == name]
            points = [t_interval(table.gain(arm, metric).values()) for arm in arms]
            x, (y, low, high) = [knob(arm) for arm in arms], np.reshape(points, (-1, 3)).T
            axes.plot(x, y, "o-", color=COLOURS[name], label=NAMES[name].partition(", η")[0])
            axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, lw=0)
        axes.axhline(0, color="#BBBBBB", lw=1)
        axes.set(xscale="log", xlabel="η, times the primary", ylabel=EFFECTS[metric][0])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
