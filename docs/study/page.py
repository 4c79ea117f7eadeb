"""The judge: statistics, verdicts, tables and pictures, from study.csv alone.

Rules, fixed before the main worlds were run. Two arms are compared head by head (the same new head,
the same order of D); the differences are averaged within a world, and the worlds are the sample of
a t test. Primary are the two CONTRASTS, in accuracy on the frozen policy's fresh samples at the
gold gaps of SFT samples: yes, if the difference is above 0 with p < 0.05 after Holm's correction
over the two; no, if its whole 95 % interval lies below the margin; else unclear. Of the policies
(policies.py) the two of OF_POLICIES, in mean gold on the way from SFT to the KL that their three
arms reach. All else is secondary. OLD worlds, of an earlier study, are in the picture alone.
"""

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
from arms import CLIMB
from policies import PARTS, POLICIES, ROUNDS
from scipy import stats
from summary import table as read_table

PRIMARY, OLD = "shifted.matched", range(200, 216)
FIRST, STALE = f"first@{CLIMB}", f"stale@{CLIMB}"
# MetaRM minus: arm, rival
CONTRASTS = {"a plain RM": (FIRST, "plain"), "MetaRM, S from SFT": (FIRST, STALE)}
OF_POLICIES = {
    "PPO on RM₀, SD of gold": (f"ppo:{FIRST}", "ppo:rm0"),
    "PPO on plain RMs with new seeds, SD of gold": (f"ppo:{FIRST}", "ppo:plain"),
}
MARGIN, GOLD_MARGIN = 2.0, 0.2  # points, SD of gold: the least gain worth having
FEW = 4  # with fewer worlds, an interval says nothing: no verdict yet
Worlds = dict[int, float]  # a figure of each world, by its seed


def t_test(values) -> tuple[float, float, float, float]:
    """(mean, low and high of its 95 % t interval, p of a mean of 0) over worlds; NaN of one."""
    x = np.array(list(values), float)
    if len(x) < 2:
        return (float(x.mean()) if len(x) else math.nan), math.nan, math.nan, math.nan
    found = stats.ttest_1samp(x, 0)
    return float(x.mean()), *map(float, found.confidence_interval(0.95)), float(found.pvalue)


def holm(p_values: list[float]) -> list[float]:
    """Step-down: the smallest p times n, the next times n - 1 ..., never falling. NaN stays out."""
    real, adjusted, top = sorted(p for p in p_values if p == p), {}, 0.0
    for rank, p in enumerate(real):
        top = max(top, min(1.0, (len(real) - rank) * p))
        adjusted.setdefault(p, top)
    return [adjusted.get(p, math.nan) for p in p_values]


def better(mean: float, high: float, p: float, margin: float) -> str:
    """yes, no or unclear, by Holm's p; no: a gain worth having is ruled out."""
    if mean > 0 and p < 0.05:
        return "yes"
    return "no" if high < margin else "unclear"


def smallest_effect(sd: float, worlds: int) -> float:
    """The mean that is seen 8 times of 10 if differences vary by sd: at p = 0.025, Holm's first."""
    return sd * float(stats.t.ppf([0.9875, 0.8], worlds - 1).sum()) / math.sqrt(worlds)


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
        if file.tell() == 0:
            lines = ["task,seed,arm,head,metric,value\n", *lines]
        file.write("".join(lines).encode())


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
        self.task, self.found = task, {}
        for t, seed, arm, head, metric, value in rows:
            if t == task:
                self.found.setdefault((arm, metric), {})[seed, head] = value
        plain = self.found.get(("plain", "shifted.margin_sd"), {})
        for arm, metric in [*self.found]:
            if metric == "adapted.shifted.margin_sd":  # of θ′, beside the plain RM of the same head
                gaps = self.found[arm, metric].items()
                self.found[arm, "adapted.gap"] = {x: y - plain[x] for x, y in gaps if x in plain}
        self.policies = [arm for arm in POLICIES if (arm, "gold.1") in self.found]
        self.add_mean_gold()

    def path(self, arm: str) -> dict[int, tuple]:
        """{seed: (KL, gold) along an arm's way from SFT}; KL never falls."""
        steps = [f"{i}.{r}" for r in range(1, ROUNDS + 1) for i in range(PARTS)]
        kl, gold = ([self.get(arm, f"path_{x}{step}") for step in steps] for x in ("kl", "gold"))
        seeds = set.intersection(*map(set, kl + gold))
        far = {seed: np.maximum.accumulate([0.0, *(x[seed] for x in kl)]) for seed in seeds}
        return {seed: (far[seed], [0.0, *(x[seed] for x in gold)]) for seed in sorted(seeds)}

    def add_mean_gold(self) -> None:
        """The metric "gold.path": mean gold from SFT to the KL that the arms of OF_POLICIES reach.

        An arm that ends before has none in that world.
        """
        paths = {arm: self.path(arm) for arm in self.policies if arm != "dpo"}
        primary = [paths.get(arm, {}) for arm in set(sum(OF_POLICIES.values(), ()))]
        for seed in set.intersection(*map(set, primary)):
            reach = min(some[seed][0][-1] for some in primary)
            for arm, worlds in paths.items():
                kl, gold = worlds.get(seed, ([0], [0]))
                if kl[-1] >= reach:
                    mean = float(np.interp(np.linspace(0, reach, 101), kl, gold).mean())
                    self.found.setdefault((arm, "gold.path"), {})[seed, 0] = mean

    def get(self, arm: str, metric: str) -> Worlds:
        """An arm's figure in each world."""
        return by_world(self.found.get((arm, metric), {}))

    def on(self, arm: str, name: str, metric: str) -> Worlds:
        """The same, on the answer set of this name."""
        return self.get(arm, f"{name}.{metric}")

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
        known -= {arm for arm in known if arm in ("plain", "rm0", "dpo") or arm.startswith("ppo:")}
        return sorted(known, key=lambda arm: (order.index(kind(arm)), knob(arm)))


RESEEDED = "reseeded"
NAMES = read_table("""
first: MetaRM, η = {}
stale: MetaRM, S from SFT, η = {}
exact: MetaRM exact, η = {}
literal: MetaRM, θ + {}·∇J
unit: MetaRM, J of rewards in SDs, η = {}
scale: rewards scaled, η = {}
random: random climb, η = {}
reseeded: plain RM, other seeds
joint: joint, L − {}·J
ocrm: OCRM, τ = {}
gold: gold labels on S
plain: plain RM
rm0: RM₀
adapted: MetaRM's θ′, η = {}
dpo: DPO
""")
# heading of a column: metric / digits
STALENESS = read_table("""
KL, nats: kl / 1
gold, SD: worth / 2
reward by RM₀, SD: reward / 2
right at the gold gaps of SFT samples, %: matched / 1
right on SFT samples, %: matched_sft / 1
mean gap, SD: margin_sd / 2
""")
EFFECTS = read_table("""
right on shifted samples, %: shifted.matched / 1
gap there, SD: shifted.margin_sd / 2
rank correlation there: shifted.rho / 3
right on OOD prompts: ood.matched / 1
on held-out D: D.noisy / 1
""")
CLIMBS = read_table("""
J's rise: climb.J / 3
over the predicted: climb.ratio / 2
within 0.7 to 1.3, % of looks: climb.holds / 0
cosine of ∇L and ∇J: climb.cosine / 2
along the head, %: climb.head / 0
multiplies rewards, %: climb.multiplied / 0
J at θ: shifted.J / 3
right at θ′, %: adapted.shifted.matched / 1
gap at θ′ minus plain RM's, SD: adapted.gap / 2
""")
WORTH = read_table("""
mean gold up to the same KL, SD: gold.path / 2
gold, round 1: gold.1 / 2
round 2: gold.2 / 2
round 3: gold.3 / 2
KL, nats: kl.3 / 1
reward by its own RM, SD: reward.3 / 2
that RM right on its samples, %: matched.3 / 1
Self-BLEU: bleu.3 / 3
""")
RIVALS = ("SFT", "DPO", "PPO")  # PPO: vanilla, after as many rounds


def kind(arm: str) -> str:
    return arm.removeprefix("ppo:").partition("@")[0]


def knob(arm: str) -> float:
    return float(arm.partition("@")[2] or 0)


def colour(arm: str) -> str:
    return f"C{list(NAMES).index(kind(arm)) % 10}"  # matplotlib's ten


def title(arm: str) -> str:
    return NAMES[kind(arm)][0].format(arm.partition("@")[2])


def show(values: Worlds, digits: int = 2) -> str:
    """mean [low, high] over worlds, or –."""
    x, low, high, _ = t_test(values.values())
    if x != x:
        return "–"
    text = f"{x:.{digits}f}" + ("" if low != low else f" [{low:.{digits}f}, {high:.{digits}f}]")
    return text.replace("-", "−")


def markdown(first: str, rows: dict[str, list[str]], headings: list[str]) -> str:
    lines = [[first, *headings], ["---"] * (len(headings) + 1)]
    lines += [[name, *values] for name, values in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def verdicts(tables: list[Table]) -> str:
    """The primary contrasts of all tasks; Holm's correction is over two, of one kind and task."""
    rows = {}
    kinds = [(CONTRASTS, PRIMARY, MARGIN, 1), (OF_POLICIES, "gold.path", GOLD_MARGIN, 2)]
    for table, (contrasts, metric, margin, digits) in itertools.product(tables, kinds):
        found = {name: table.gain(a, metric, b) for name, (a, b) in contrasts.items()}
        tests = [t_test(some.values()) for some in found.values()]
        adjusted = holm([test[3] for test in tests])
        for (name, some), (mean, _, high, _), p in zip(found.items(), tests, adjusted, strict=True):
            if len(some) >= FEW:
                effect = smallest_effect(float(np.std([*some.values()], ddof=1)), len(some))
                row = [f"**{better(mean, high, p, margin)}**, {p:.2f}", show(some, digits)]
                rows[f"{table.task}: {name}"] = [*row, f"{len(some)}; {effect:.2g}"]
    return markdown("MetaRM minus", rows, ["verdict, p", "difference", "worlds; detectable effect"])


def grid(first: str, columns: dict[str, list[str]], rows: dict[str, tuple], figure) -> str:
    """A table of figures; rows without any are left out. figure(*key of a row, metric)."""
    shown = {}
    for name, key in rows.items():
        row = [show(figure(*key, what), int(digits)) for what, digits in columns.values()]
        shown |= {name: row} if set(row) != {"–"} else {}
    return markdown(first, shown, list(columns))


def games(table: Table, r: int = ROUNDS) -> str:
    """% won, tied and lost after round r against each rival, as the paper has them."""
    rows = {}
    for arm in table.policies:
        row = []
        for rival in RIVALS:
            won, lost = (table.get(arm, f"{side}.{rival}.{r}") for side in ("win", "lose"))
            win, lose = t_test(won.values())[0], t_test(lost.values())[0]
            margin = show({seed: won[seed] - lost[seed] for seed in won}, 0)
            row.append(f"{win:.0f}/{100 - win - lose:.0f}/{lose:.0f}; {margin}" if won else "–")
        rows |= {title(arm): row} if set(row) != {"–"} else {}
    return markdown("win/tie/lose, %; win − lose [95 %]", rows, list(RIVALS))


def headline(tables: list[Table]) -> str:
    """The first primary result of each task."""
    gains = [(table.task, table.gain(FIRST)) for table in tables]
    said = [f"{task} {show(x, 1)} ({len(x)} worlds)" for task, x in gains if len(x) >= FEW]
    what = "Pairs of PPO's responses ordered right, MetaRM minus plain RM, points"
    return f"{what}: {', '.join(said) or '–'}.\n"


def tables(folder: Path) -> str:
    """All tables of study.csv, as Markdown."""
    rows = [row for row in read_rows(folder) if row[1] not in OLD]
    found = [Table(rows, task) for task in sorted({row[0] for row in rows})]
    parts = [headline(found), verdicts(found)]
    for table in found:
        arms = {title(arm): (arm,) for arm in table.arms()}
        chain = sorted({what[:4] for _, what in table.found if what[:3] == "ppo"})
        policies = {name: ("rm0", name) for name in ("sft", *chain, "gold", "ood")}
        plain = {"plain RM": ("plain",)}
        parts.append(f"## {table.task.capitalize()}\n")
        parts.append(grid("RM₀ on samples of", STALENESS, policies, table.on))
        parts.append(grid("", EFFECTS, plain, table.get))
        parts.append(grid("minus the plain RM", EFFECTS, arms, table.gain))
        parts.append(grid("climbs", CLIMBS, plain | arms, table.get))
        if table.policies:
            arms = {title(arm): (arm,) for arm in table.policies}
            parts.append(grid("PPO on", WORTH, arms, table.get))
            parts.append(games(table))
    return "\n".join(parts)


def pictures(folder: Path, out: Path) -> None:
    """Draws, per task, dose and response, and gold over KL of the policies."""
    from matplotlib import figure, rcParams

    rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    rows = read_rows(folder)
    for task in sorted({row[0] for row in rows}):
        every = Table(rows, task)
        fresh = Table([row for row in rows if row[1] not in OLD], task)
        for draw in (doses, *([paths] if fresh.policies else [])):
            page = figure.Figure(layout="constrained")
            draw(page, every if draw is doses else fresh)
            page.savefig(out / f"{task}-{draw.__name__}.png", dpi=110)


def doses(page, table: Table) -> None:
    """Accuracy and gap on shifted samples, minus the plain RM's, over J's rise in one climb.

    The lengths of the climbs stand beside the points; worlds of all studies.
    """
    page.set_size_inches(12, 4.5)
    columns = list(EFFECTS.items())[:2]
    for axes, (heading, (metric, _)) in zip(page.subplots(1, 2), columns, strict=True):
        for name in ("first", "stale", "exact", "literal"):
            arms = [arm for arm in table.arms() if kind(arm) == name and table.get(arm, "climb.J")]
            if not arms:
                continue
            rises = [max(1e-4, t_test(table.get(arm, "climb.J").values())[0]) for arm in arms]
            points = [t_test(table.gain(arm, metric).values())[:3] for arm in arms]
            y, low, high = np.reshape(points, (-1, 3)).T
            line = dict(color=colour(name), label=NAMES[name][0].partition(", η")[0], capsize=3)
            axes.errorbar(rises, y, np.nan_to_num([y - low, high - y]), fmt="o", **line)
            for arm, x, height in zip(arms, rises, y, strict=True):
                axes.annotate(
                    f" {arm.partition('@')[2]}", (x, height), fontsize=8, color=colour(arm)
                )
        axes.axhline(0, color="#BBBBBB", lw=1)
        axes.set(xscale="log", xlabel="rise of J in one climb", ylabel=heading)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def paths(page, table: Table) -> None:
    """Gold over KL along each arm's way from SFT; mean over the worlds that all arms have."""
    page.set_size_inches(8, 4)
    axes = page.subplots()
    ways = {arm: table.path(arm) for arm in table.policies if arm != "dpo"}
    worlds = sorted(set.intersection(*map(set, ways.values())))
    x = np.linspace(0, min((ways[a][s][0][-1] for a in ways for s in worlds), default=0), 60)
    for arm, way in ways.items():
        gold = [np.interp(x, *way[seed]) for seed in worlds]
        axes.plot(x, np.mean(gold, axis=0) if worlds else x, label=title(arm))
    axes.set(xlabel="KL to SFT, nats", ylabel="gold, SD above SFT")
    axes.legend()
