"""The study's page: statistics, stop rules, verdicts, tables and pictures, all from the rows of study.csv.

    python docs/study/study.py --phase page        (the rules are in study.py's first lines)

No model and no run is looked at here: whoever has study.csv and settings.json can make README.md again, to the letter.
"""

import csv
import functools
import math
from pathlib import Path

import numpy as np

from eval import stop_round

# ------------------------------------------------------------------------------------------------------- statistics

def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t. With t = sqrt(df) tan(a) the density is a power of the cosine: Simpson's rule does it."""
    a = math.atan(t / math.sqrt(df))
    x = np.linspace(0, abs(a), 2001)
    y = np.cos(x) ** (df - 1) * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    area = (y[0] + y[-1] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum()) * (x[1] - x[0]) / 3
    return 0.5 + math.copysign(float(area), t)


@functools.cache
def t_quantile(p: float, df: int) -> float:
    """The t with t_cdf(t, df) = p, by halving."""
    low, high = -1e4, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def t_interval(values, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high): the t interval over seeds; of one seed there is none (NaN)."""
    x = np.asarray([v for v in values if v == v], float)
    if len(x) < 2:
        return (float(x.mean()) if len(x) else math.nan), math.nan, math.nan
    half = t_quantile(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def paired(ours: dict, theirs: dict) -> list[float]:
    """Differences seed by seed, over the seeds that have both."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def p_value(differences) -> float:
    """Two-sided, of the one-sample t test of a mean of 0."""
    x = np.asarray(differences, float)
    if len(x) < 2:
        return math.nan
    error = x.std(ddof=1) / math.sqrt(len(x))
    return 2 * (1 - t_cdf(abs(x.mean()) / error, len(x) - 1)) if error > 0 else float(x.mean() == 0)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down: the smallest p times n, the next times n - 1 ..., never falling, at most 1. NaN stays out."""
    real, adjusted, top = [p for p in p_values if p == p], {}, 0.0
    for rank, p in enumerate(sorted(real)):
        top = max(top, min(1.0, (len(real) - rank) * p))
        adjusted.setdefault(p, top)
    return [adjusted.get(p, math.nan) for p in p_values]


def equivalent(interval: tuple, margin: float) -> str:
    """Is the whole interval within the margin on both sides? yes, no (all of it outside), unclear."""
    _, low, high = interval
    if not (low == low and high == high):
        return "unclear"
    return "yes" if -margin < low and high < margin else "no" if low > margin or high < -margin else "unclear"


def better(interval: tuple, p: float, margin: float) -> str:
    """yes: above 0, p < 0.05 (give Holm's). no: the whole interval below the least gain worth having. Else unclear."""
    mean, _, high = interval
    return "yes" if mean > 0 and p < 0.05 else "no" if high < margin else "unclear"


def at_equal_kl(kl: list[float], gold: list[float], grid: list[float]) -> list[float]:
    """Gold reward when the policy had come this far: the curve's running maximum of KL, interpolated; NaN beyond it."""
    far = np.maximum.accumulate(np.concatenate([[0.0], kl]))
    return [float(np.interp(x, far, np.concatenate([[0.0], gold]))) if x <= far[-1] else math.nan for x in grid]


# ------------------------------------------------------------------------------------------------------- the rows

COLUMNS = ("task", "seed", "arm", "round", "metric", "value")
Table = dict  # {(task, arm, round, metric): {seed: value}}


def read_rows(path: Path) -> list[tuple]:
    """(task, seed, arm, round, metric, value) of each line; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as lines:
        return [(row["task"], int(row["seed"]), row["arm"], int(row["round"]), row["metric"], float(row["value"]))
                for row in csv.DictReader(lines)]


def table_of(rows: list[tuple]) -> Table:
    table: Table = {}
    for task, seed, arm, round_, metric, value in rows:
        table.setdefault((task, arm, round_, metric), {})[seed] = value
    return table


def minus(a: dict, b: dict) -> dict:
    """{seed: a - b} over the seeds that have both."""
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def net(table: Table, task: str, arm: str, round_: int, rival: str) -> dict:
    """{seed: wins minus losses, points}, against `rival` of the same round (DPO and SFT have one)."""
    return minus(table.get((task, arm, round_, f"win.{rival}"), {}), table.get((task, arm, round_, f"lose.{rival}"), {}))


def best_rounds(table: Table, task: str, arm: str, last: int) -> dict:
    """{seed: the round, of 1 to `last`, with the highest gold reward on VALIDATION prompts}: the secondary analysis."""
    best: dict = {}
    for (t, a, round_, metric), values in sorted(table.items()):
        if (t, a, metric) == (task, arm, "gold.valid") and 1 <= round_ <= last:
            for seed, value in values.items():
                if seed not in best or value > best[seed][1]:
                    best[seed] = round_, value
    return {seed: round_ for seed, (round_, _) in best.items()}


def at_best(table: Table, task: str, arm: str, last: int, metric: str) -> dict:
    return {seed: table[task, arm, round_, metric][seed] for seed, round_ in best_rounds(table, task, arm, last).items()
            if seed in table.get((task, arm, round_, metric), {})}


# ------------------------------------------------------------------------------------------------------- stop rules

# What somebody without labels can look at after each round; "+" go on while it is at least the threshold, "-" at most.
STOP_RULES = {"always the primary round (trivial)": None, "KL to SFT stays below": ("kl", "-"),
              "reward spread on fresh samples stays above": ("own.variance_sd", "+"), "J on fresh samples stays above": ("own.J_sd", "+"),
              "successive RMs agree on fresh samples": ("own.disagree", "-"), "accuracy on held-out D stays above": ("D.noisy", "+")}


def best_threshold(signals: list[list[float]], gold: list[list[float]], sign: str) -> float:
    """Of all values that were seen, the threshold whose stops have the highest mean gold reward (the first of equals)."""
    worth = {threshold: np.mean([g[stop_round(s, threshold, sign) - 1] for s, g in zip(signals, gold)])
             for threshold in sorted({value for signal in signals for value in signal})}
    return max(worth, key=worth.get) if worth else math.nan


def by_round(table: Table, task: str, arm: str, metric: str) -> dict:
    """{seed: [round 1, round 2, ...]}, as far as there is no gap."""
    found: dict = {}
    for round_ in range(1, 100):
        for seed, value in table.get((task, arm, round_, metric), {}).items():
            if len(found.setdefault(seed, [])) == round_ - 1:
                found[seed].append(value)
    return found


def judge_rules(table: Table, task: str, arm: str, thresholds: dict, primary: int) -> dict:
    """{rule: {"round": [a seed each], "hit": best or next to it?, "lost": gold against the best, "gain": against primary}}."""
    gold, rows = by_round(table, task, arm, "gold"), {}
    for rule, what in STOP_RULES.items():
        signals = by_round(table, task, arm, what[0]) if what else {}
        if what and rule not in thresholds:
            continue
        row = {"round": [], "hit": [], "lost": [], "gain": []}
        for seed, g in sorted(gold.items()):
            stop = min(stop_round(signals[seed], thresholds[rule], what[1]) if what and seed in signals else primary, len(g))
            row["round"].append(stop)
            row["hit"].append(abs(stop - 1 - int(np.argmax(g))) <= 1)
            row["lost"].append(max(g) - g[stop - 1])
            row["gain"].append(g[stop - 1] - g[min(primary, len(g)) - 1])
        rows[rule] = row
    return rows


# ------------------------------------------------------------------------------------------------------- verdicts

CONTROLS = ("reseeded", "random", "ocrm")
METHOD = "metarm-first"
SEEDS = 8  # of the main phase, at least: fewer decide nothing


def claims(table: Table, task: str, settings: dict, primary: int) -> list[dict]:
    """A row for each claim of the paper: {"claim", "kind", "margin", "paper", "values": {arm: {seed: figure}}}; figures are
    differences to the claim's baseline, so that 0 is "no better", and an arm's may be held against a control's."""
    get = lambda arm, metric, r=primary: table.get((task, arm, r, metric), {})
    arms, ood = (METHOD, *CONTROLS), max([r for t, a, r, _ in table if t == task and a == f"{METHOD}@ood=1"], default=0)
    etas = [f"{METHOD}@eta={eta:g}" for eta in settings.get("etas", {}).get(task, [])]
    dialogue = task == "dialogue"

    def rows(metric):
        return {arm: minus(get(arm, metric), get("ppo", metric)) for arm in arms}

    def farthest(dicts):  # of several differences, each over the seeds, the one whose interval reaches farthest from 0
        return max(dicts, key=lambda d: max(map(abs, np.nan_to_num(t_interval(d.values())))), default={})

    return [dict(zip(("claim", "kind", "margin", "paper", "values"), row)) for row in (
        ("orders shifted samples better than RM₀ (accuracy at the same gold gap, points)", "better", "accuracy", "yes (Fig. 5), no figure",
         rows("shifted.matched")),
        ("orders samples that no RM chose better than RM₀ (accuracy at the same gold gap, points)", "better", "accuracy", "–", rows("gold.matched")),
        ("holds shifted samples further apart than RM₀ (mean gap, SD)", "better", "spread", "yes (Fig. 5), no figure",
         rows("shifted.margin_sd")),
        ("identifies subtle differences OOD (accuracy, points)", "better", "accuracy", "yes, no figure", rows("ood.matched")),
        ("policy better than PPO (wins − losses, points)", "better", "win", "+39, +60" if dialogue else "+31",
         {arm: net(table, task, arm, primary, "ppo") for arm in arms}),
        ("policy better than DPO (wins − losses, points)", "better", "win", "+14, +51" if dialogue else "+24",
         {arm: net(table, task, arm, primary, "dpo") for arm in arms}),
        ("OOD policy better than PPO there (wins − losses on OOD prompts, points)", "better", "win", "yes (Fig. 3)",
         {arm: net(table, task, f"{arm}@ood=1", ood, "ppo.ood") for arm in arms}),
        ("keeps accuracy on D (points against RM₀)", "stays", "accuracy", "yes (Fig. 4)", rows("D.noisy")),
        ("only small fluctuations on D (accuracy against RM₀, the worst of rounds 1–3, points)", "stays", "accuracy", "yes (Fig. 4)",
         {arm: farthest([minus(get(arm, "D.noisy", r), get("ppo", "D.noisy", r)) for r in range(1, primary + 1)]) for arm in arms}),
        ("insensitive to η (win rate against SFT, the worse of η/5 and 2η, points)", "stays", "win", "yes (Table 2: 1 point)",
         {METHOD: farthest([minus(get(eta, "win.sft"), get(METHOD, "win.sft")) for eta in etas])}),
        (f"rounds pay (wins − losses against SFT, round {primary} over round 1, points)", "better", "win",
         "+34, +39" if dialogue else "+35",
         {arm: minus(net(table, task, arm, primary, "sft"), net(table, task, arm, 1, "sft")) for arm in arms}),
        (f"a decline after round {primary} (wins − losses against SFT, round {primary} over round {primary + 1}, points)", "better", "win", "+7, +9" if dialogue else "−13 (a round later: +9)",
         {arm: minus(net(table, task, arm, primary, "sft"), net(table, task, arm, primary + 1, "sft")) for arm in arms}),
    )]


def verdicts(table: Table, task: str, settings: dict, primary: int, margins: dict) -> list[dict]:
    """The claims, decided by the rules in study.py's header: "verdict", "interval", "p", and each control's answer."""
    found = claims(table, task, settings, primary)
    ps = holm([p_value(list(row["values"][METHOD].values())) if row["kind"] == "better" else math.nan for row in found])
    for row, p in zip(found, ps):
        ours, margin = row["values"][METHOD], margins[row["margin"]]
        row["interval"], row["p"] = t_interval(ours.values()), p
        row["verdict"] = "not run" if not ours else better(row["interval"], p, margin) if row["kind"] == "better" else equivalent(row["interval"], margin)
        row["controls"] = {}
        for control in CONTROLS:
            theirs = row["values"].get(control, {})
            if row["kind"] == "stays":
                row["controls"][control] = equivalent(t_interval(theirs.values()), margin) if theirs else "–"
            else:
                low = t_interval(paired(ours, theirs))[1]
                row["controls"][control] = "–" if low != low else "no" if low > 0 else "yes"
    return found


def where_it_helps(table: Table, task: str, boundary: dict, only: tuple) -> dict[str, dict]:
    """{what is moved: {metric: {seed: MetaRM minus the reseeded plain RM under it}}}, on the seeds of the boundary; what the
    control knows nothing of (`only`) is held against it as it is."""
    get = lambda arm, metric: table.get((task, arm, 2, metric), {})
    seeds = {seed for knobs in boundary.values() if knobs for seed in get(f"{METHOD}@{knobs}", "gold")}
    found = {}
    for label, knobs in boundary.items():
        suffix = f"@{knobs}" if knobs else ""
        rival = "reseeded" + ("" if knobs.split("=")[0] in only else suffix)
        row = {metric: {seed: x for seed, x in minus(get(METHOD + suffix, metric), get(rival, metric)).items() if seed in seeds}
               for metric in ("gold", "shifted.matched", "gold.matched")}
        found |= {label: row} if row["gold"] else {}
    return found


# ------------------------------------------------------------------------------------------------------- the page

NAMES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO on RM₀", "ppo-tuned": "PPO on RM₀, KL weight tuned", "reseeded": "plain RM, reseeded",
         "random": "random lookahead", "metarm-first": "MetaRM, first order", "metarm-exact": "MetaRM, exact", "adapted": "MetaRM, θ′ scores",
         "joint": "joint: L − λJ", "ocrm": "OCRM, τ = 0.01", "ocrm-tuned": "OCRM, τ tuned", "oracle": "gold labels on S"}
COLOURS = dict(zip(NAMES, "#999999 #CC79A7 #0072B2 #56B4E9 #009E73 #8C6D31 #D55E00 #A33B00 #FF9E4A #7B3294 #E0C000 #B39700 #000000".split()))


def named(arm: str) -> str:
    base, _, override = arm.partition("@")
    return NAMES.get(base, base) + (f", {override.replace('eta', 'η').replace('@', ', ')}" if override else "")


def show(values, digits: int = 2) -> str:
    """mean [low, high] over seeds, or –."""
    x, low, high = t_interval(values.values() if isinstance(values, dict) else values)
    if x != x:
        return "–"
    text = f"{x:.{digits}f}" + ("" if low != low else f" [{low:.{digits}f}, {high:.{digits}f}]")
    return text.replace("-", "−")


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in [headings, ["---"] * len(headings), *rows]) if rows else "*(not run)*\n"


def page(table: Table, settings: dict, rules: str, primary: int, margins: dict, boundary: dict, only: tuple) -> str:
    """README.md from the rows alone."""
    tasks = [task for task in ("dialogue", "summary") if any(key[0] == task for key in table)]
    body = "\n".join(task_page(table, task, settings, primary, margins, boundary, only) for task in tasks)
    return f"""# What MetaRM does, over seeds, where the truth is known

{findings(table, settings, primary, margins)}
Made by `bash run.sh study`; every figure is recomputed from [study.csv](study.csv) (a test sees to that), the models are those
of the toy world (two layers, 132 thousand weights, gold reward = a table of rules). Figures are means over seeds with 95 % t
intervals. SD: of gold on SFT samples for gold, of an RM's rewards on SFT samples for that RM. What holds for a tiny model
need not hold for a large one; what does not hold here needs a reason why it should there.

{body}
## Rules, fixed beforehand

```
{rules}
```

Settings chosen on the tuning seeds ([settings.json](settings.json); gold reward on validation prompts, SD above SFT):

{markdown(["task", "arm", "knob", "settings tried: gold", "chosen"], [[*row] for row in tuning_rows(settings)])}"""


def tuning_rows(settings: dict) -> list[list[str]]:
    return [[task, named(arm), trial["knob"], ", ".join(f"{value}: {worth:.2f}" for value, worth in trial["gold"].items()),
             f"{trial['chosen']:g}" + (", an end of the range" if f"{trial['chosen']:g}" in (list(trial["gold"])[0], list(trial["gold"])[-1]) else "")]
            for task, arms in settings.get("trials", {}).items() for arm, trial in arms.items()]


def findings(table: Table, settings: dict, primary: int, margins: dict) -> str:
    """The first screen, which the project's README quotes too."""
    lines = []
    for task in [task for task in ("dialogue", "summary") if (task, METHOD, primary, "gold") in table]:
        rows = [row for row in verdicts(table, task, settings, primary, margins) if row["verdict"] != "not run"]
        seeds = len(table[task, METHOD, primary, "gold"])
        said = {word: ", ".join(row["claim"].partition(" (")[0] for row in rows if row["verdict"] == word) or "none" for word in ("yes", "no", "unclear")}
        get = lambda arm, metric: table.get((task, arm, 0 if arm == "dpo" else primary, metric), {})
        lines += [f"**{task.capitalize()}**, {seeds} seeds{f' so far of {SEEDS}, which decide nothing' if seeds < SEEDS else ''}. The paper's claims that hold: "
                  f"{said['yes']}. That do not: {said['no']}. Unclear: {said['unclear']}.\n",
                  markdown([f"round {primary}", "gold reward, SD above SFT", "gold, minus PPO on RM₀", "wins − losses against SFT", "its RM right on vanilla PPO's samples, %"], [
                      [NAMES[arm], show(get(arm, "gold")), "–" if arm == "ppo" else show(minus(get(arm, "gold"), get("ppo", "gold"))),
                       show(minus(get(arm, "win.sft"), get(arm, "lose.sft")), 0), show(get(arm, "shifted.matched"), 1)] for arm in NAMES if arm != "sft"])]
    return "\n".join(lines) + "\n" if lines else "Not run yet.\n"


def differs(ours: dict, theirs: dict, digits: int = 2) -> str:
    """'higher: 0.31 [0.12, 0.50]', 'lower: ...' or 'no different: ...': a difference, seed by seed, and what its interval says."""
    _, low, high = t_interval(minus(ours, theirs).values())
    return f"{'higher' if low > 0 else 'lower' if high < 0 else 'no different'}: {show(minus(ours, theirs), digits)}"


def meaning(table: Table, task: str, primary: int) -> str:
    """What the tables say, in words; the words follow from the intervals."""
    get = lambda arm, metric: table.get((task, arm, 0 if arm in ("sft", "dpo") else primary, metric), {})
    have = lambda *arms: [arm for arm in arms if get(arm, "gold")]
    gold = sorted(have(*[arm for arm in NAMES if arm not in ("sft", "oracle")]), key=lambda arm: -t_interval(get(arm, "gold").values())[0])
    against = lambda metric, other, arms, digits=2: "; ".join(f"{NAMES[arm]} {differs(get(arm, metric), get(other, metric), digits)}" for arm in arms)
    moved = have(METHOD, *CONTROLS)
    lines = [
        f"**The illness.** RM₀ promises {show(get('ppo', 'rm'))} SD more than SFT for its policy; gold gives {show(get('ppo', 'gold'))}. RM₀ orders "
        f"{show(get('ppo', 'sft.acc'), 1)} % of SFT's pairs right, and of its policy's, at the same gold gap, "
        f"{show(get('ppo', 'shifted.matched'), 1)} %.",
        f"**Far away, or optimised against?** On samples of a policy that was trained on the gold reward, {show(get('sft', 'by_gold.kl'), 1)} nats from SFT, "
        f"no RM had a say in what was chosen. There RM₀ is right in {show(get('ppo', 'gold.matched'), 1)} %: against SFT's pairs "
        f"{differs(get('ppo', 'gold.matched'), get('ppo', 'sft.acc'), 1)} points; against its own policy's {differs(get('ppo', 'gold.matched'), get('ppo', 'shifted.matched'), 1)}.",
        f"**Gold reward against PPO on RM₀.** {against('gold', 'ppo', moved)}.",
        f"**Accuracy against RM₀ on vanilla PPO's samples, points.** {against('shifted.matched', 'ppo', moved, 1)}. On samples that no RM chose: "
        f"{against('gold.matched', 'ppo', moved, 1)}. What is gained on the first only is RM₀'s own mistakes, which any other RM does not share.",
        f"**Figure 5.** J on shifted samples against RM₀'s: {against('shifted.J', 'ppo', have(METHOD, 'metarm-exact', 'joint', 'random', 'reseeded'), 3)}. "
        f"At θ′ of {NAMES[METHOD]}, against its θ: J {differs(get(METHOD, 'adapted.shifted.J'), get(METHOD, 'shifted.J'), 3)}; accuracy "
        f"{differs(get(METHOD, 'adapted.shifted.matched'), get(METHOD, 'shifted.matched'), 1)}.",
        f"**Which pairs weigh more at θ′.** ρ of a pair's gain in weight with its gold gap: {show(get(METHOD, 'weight.rho_gap'))} (above 0: the informative "
        f"ones); flipped labels gain {show(get(METHOD, 'weight.flipped'), 3)} more than right ones.",
        "**What works best here**, by gold reward (labels on S left out): " + "; ".join(f"{NAMES[arm]} {show(get(arm, 'gold'))}" for arm in gold[:4]) + "."
        + (f" Gold labels on S would give {show(get('oracle', 'gold'))}." if have("oracle") else ""),
    ]
    return "".join(f"- {line}\n" for line in lines)


def task_page(table: Table, task: str, settings: dict, primary: int, margins: dict, boundary: dict, only: tuple) -> str:
    get = lambda arm, metric, r=primary: table.get((task, arm, r, metric), {})
    rounds = sorted({r for t, a, r, _ in table if t == task and a == METHOD})
    arms = [arm for arm in NAMES if any((t, a) == (task, arm) for t, a, *_ in table)]
    rl = [arm for arm in arms if arm not in ("sft", "dpo")]
    last = lambda arm: 0 if arm in ("sft", "dpo") else primary
    wtl = lambda arm, r, rival: "–" if not get(arm, f"win.{rival}", r) else " / ".join(
        f"{t_interval(x.values())[0]:.0f}" for x in (get(arm, f"win.{rival}", r), {s: 100 - get(arm, f"win.{rival}", r)[s] - get(
            arm, f"lose.{rival}", r)[s] for s in get(arm, f"win.{rival}", r)}, get(arm, f"lose.{rival}", r)))
    verdict_rows = [[row["claim"], f"**{row['verdict']}**", show(row["values"][METHOD]), "–" if row["p"] != row["p"] else f"{row['p']:.3f}",
                     row["paper"], *row["controls"].values()] for row in verdicts(table, task, settings, primary, margins)]
    etas = [f"{METHOD}@eta={eta:g}" for eta in settings.get("etas", {}).get(task, [])]
    grid, curves = (1.0, 2.0, 4.0, 6.0), {}
    for arm in rl:  # gold when the policy had come so far, on its way through the rounds
        for seed in get(arm, "gold", 1):
            points = [(table[task, arm, r, f"curve{i}.kl"][seed], table[task, arm, r, f"curve{i}.gold"][seed])
                      for r in rounds for i in range(3) if seed in table.get((task, arm, r, f"curve{i}.kl"), {})]
            for x, y in zip(grid, at_equal_kl(*zip(*points), grid) if points else []):
                curves.setdefault((arm, x), {})[seed] = y
    on = lambda arm, metric: show(get(arm, metric), 1)
    theta = [arm for arm in arms if get(arm, "adapted.shifted.J")]
    moved = where_it_helps(table, task, boundary, only)
    seeds = len(next(iter(moved.values()), {}).get("gold", {}))
    of_ood = [arm for arm in NAMES if any((t, a) == (task, f"{arm}@ood=1") for t, a, *_ in table)]
    ood = f"""### OOD: S and PPO on OOD prompts (win / tie / lose on OOD test prompts, %)

{markdown(["policy", "SFT", "PPO on RM₀, there"], [[named(arm), *(wtl(f"{arm}@ood=1", max(r for t, a, r, _ in table if (t, a) == (
    task, f"{arm}@ood=1")), rival) for rival in ("sft.ood", "ppo.ood"))] for arm in of_ood])}
![OOD]({task}-ood.png)

""" if of_ood else ""
    where = f"""### Where does it help? MetaRM minus the reseeded plain RM, {seeds} seeds, round 2

{markdown(["what is moved", "gold, SD", "accuracy, shifted", "accuracy, no RM chose"], [[label, *(show(row[metric], digits) for metric, digits in (
    ("gold", 2), ("shifted.matched", 1), ("gold.matched", 1)))] for label, row in moved.items()])}
![where it helps]({task}-boundary.png)

""" if len(moved) > 1 else ""
    thresholds = settings.get("thresholds", {})
    stops = judge_rules(table, task, METHOD, thresholds.get(task, {}), primary)
    borrowed = judge_rules(table, task, METHOD, thresholds.get("summary" if task == "dialogue" else "dialogue", {}), primary)
    return f"""## {task.capitalize()}

### In words
{meaning(table, task, primary)}
### Verdicts
MetaRM (first order) at round {primary} against the baseline that the claim names; p by Holm over this table; the paper's own
figure; and whether a control *does as well*.

{markdown(["claim", "verdict", "figure [95 %]", "p", "paper", *(NAMES[c] for c in CONTROLS)], verdict_rows)}
### Table 1: against SFT, round by round (win / tie / lose, %)

{markdown(["policy", *(f"round {r}" for r in rounds)], [[named(arm), *(wtl(arm, r if arm in rl else 0, "sft") for r in rounds)] for arm in arms[1:]])}
### Table 2: round {primary} against the others (win / tie / lose, %), and gold reward (SD above SFT)

{markdown(["policy", "SFT", "PPO on RM₀", "DPO", "gold", "gold, best round by validation", "promised by its RM", "KL, nats"], [
    [named(arm), *(wtl(arm, last(arm), rival) for rival in ("sft", "ppo", "dpo")), show(get(arm, "gold", last(arm))),
     show(at_best(table, task, arm, primary, "gold")), show(get(arm, "rm", last(arm))), show(get(arm, "kl", last(arm)), 1)]
    for arm in [*arms, *etas]])}
### Gold at equal KL (SD above SFT, when the policy was so many nats from SFT; seeds that got there)

{markdown(["policy", *(f"{x:g} nats" for x in grid)], [[named(arm), *(show(curves.get((arm, x), {})) for x in grid)] for arm in rl])}
![gold over KL]({task}-gold_over_kl.png)

### Table 3: diversity at round {primary} (lower is more diverse)

{markdown(["policy", "Self-BLEU, n = 2–5", "embedding cosine", "distinct", "words"], [[named(arm), show(get(arm, "bleu", last(arm))),
    show(get(arm, "cosine", last(arm)), 3), show(get(arm, "distinct", last(arm))), show(get(arm, "words", last(arm)), 1)] for arm in arms])}
{ood}### The reward models at round {primary} (accuracy in %; matched: at the same gold gap)
Samples no RM chose: of a policy that PPO trained on the gold reward until it was {show(get("sft", "by_gold.kl", 0), 1)} nats from
SFT; vanilla PPO's last policy, on whose samples the others are measured, is {show(get("ppo", "kl", max(rounds, default=0)), 1)} nats away.

{markdown(["RM", "D, noisy", "D, gold", "vanilla PPO's samples", "matched", "samples no RM chose", "matched", "own policy's", "OOD", "ρ, shifted"], [
    [named(arm), *(on(arm, m) for m in ("D.noisy", "D.gold", "shifted.acc", "shifted.matched", "gold.acc", "gold.matched", "own.acc", "ood.acc")),
     show(get(arm, "shifted.rho"))] for arm in rl])}
How far apart they hold vanilla PPO's samples, raw and in SD:

{markdown(["RM", "J", "J, SD", "gap", "gap, SD", "variance", "variance, SD²"], [[named(arm), *(show(get(arm, f"shifted.{m}"), 3) for m in (
    "J", "J_sd", "margin", "margin_sd", "variance", "variance_sd"))] for arm in rl])}
![accuracy]({task}-accuracy.png)
![Figure 1]({task}-fig1.png)
![Figure 4]({task}-fig4.png)
![Figure 5]({task}-fig5.png)

### The mechanism, round {primary}
θ is kept and θ′ thrown away (Eq. 5). cos: of ∇L and ∇J, above 0 where the aims conflict. climb: what the step to θ′ does to L
and J. weight: 1 − σ(margin), its change from θ to θ′ on held-out pairs of D; ρ with |gold gap| above 0: informative pairs gain.

{markdown(["RM", "J at θ", "J at θ′", "matched at θ", "matched at θ′", "gap at θ, SD", "gap at θ′, SD"], [[named(arm), *(show(get(arm, m), 3) for m in (
    "shifted.J", "adapted.shifted.J", "shifted.matched", "adapted.shifted.matched", "shifted.margin_sd", "adapted.shifted.margin_sd"))]
    for arm in dict.fromkeys(["ppo", *theta, "joint", "random", "reseeded"]) if get(arm, "shifted.J")])}
{markdown(["RM", "cos, early", "cos, late", "climb of L", "by Taylor", "climb of J", "weight", "ρ with the gold gap", "flipped − right"], [
    [named(arm), *(show(get(arm, m), 3) for m in ("cos.early", "cos.late", "climb.L", "climb.L_taylor", "climb.J", "weight.mean",
                                                  "weight.rho_gap", "weight.flipped"))] for arm in theta])}
{where}### When to stop: rules for somebody without labels, thresholds from the tuning seeds
Does a threshold carry over to another task? The last column has the one that the other task's tuning seeds gave.

{markdown(["rule", "threshold", "stops at round", "best round or next to it, %", "gold lost to the best", f"gained on always round {primary}",
           "gold lost to the best, by the other task's threshold"], [
    [rule, "–" if rule not in thresholds.get(task, {}) else f"{thresholds[task][rule]:.3g}",
     f"{np.mean(row['round']):.1f}", f"{100 * np.mean(row['hit']):.0f}", show(row["lost"]), show(row["gain"]),
     show(borrowed.get(rule, {}).get("lost", []))] for rule, row in stops.items() if row["round"]])}"""


# ------------------------------------------------------------------------------------------------------- pictures

def pictures(table: Table, task: str, folder: Path, primary: int, boundary: dict, only: tuple) -> None:
    """One message each; an arm has one colour throughout. Written whole or not at all."""
    from matplotlib import figure, rcParams
    from PIL import Image  # matplotlib brings it
    rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 11})
    mean = lambda arm, metric, r=primary: t_interval(table.get((task, arm, r, metric), {}).values())
    rounds = sorted({r for t, a, r, _ in table if (t, a) == (task, METHOD)})
    arms = [arm for arm in NAMES if (task, arm, primary, "gold") in table]

    def draw(name, heading, paint, size=(9, 4), panels=1, **labels):
        canvas = figure.Figure(size, layout="constrained")
        row = canvas.subplots(1, panels, sharey=True, squeeze=False)[0]
        paint(*row)
        canvas.suptitle(heading, x=0.01, ha="left")
        for axes in row:
            axes.set(**labels)
            axes.label_outer()
        if row[-1].get_legend_handles_labels()[0]:
            row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        canvas.savefig(folder / f"{name}.tmp", dpi=110, format="png")
        with Image.open(folder / f"{name}.tmp") as picture:  # 256 colours at half the bytes; by coverage, or rare ones are merged
            few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(folder / f"{name}.tmp", "png", optimize=True)
        (folder / f"{name}.tmp").replace(folder / f"{task}-{name}.png")

    def over_kl(left, right):
        for axes, key, heading in ((left, "gold", "gold reward"), (right, "rm", "promised by the arm's own RM")):
            axes.set_title(heading, fontsize="medium")
            for arm in arms:
                points = [(mean(arm, f"curve{i}.kl", r)[0], mean(arm, f"curve{i}.{key}", r)[0]) for r in rounds for i in range(3)]
                axes.plot(*zip(*points), ".-", color=COLOURS[arm], lw=1.8, label=named(arm))

    def spread(axes):
        places = [(r, i) for r in rounds for i in range(3)]  # a third of a round's PPO steps each
        for judge, at_sft, label, style in (("rm", "sft.variance_sd", "by RM₀", "-"), ("gold", "sft.gold_variance", "by gold", "--")):
            points = [mean("ppo", at_sft, 1), *(mean("ppo", f"curve{i}.{judge}_variance", r) for r, i in places)]
            axes.errorbar([0, *(r - 1 + (i + 0.5) / 3 for r, i in places)], [p[0] for p in points],
                          [[p[0] - p[1] for p in points], [p[2] - p[0] for p in points]], fmt=f"o{style}",
                          color=COLOURS["ppo"] if style == "-" else "#000000", capsize=3, label=label)

    def epoch(axes):
        for arm, r, style in (("ppo", 1, "-"), ("reseeded", 1, "-"), *((METHOD, r, s) for r, s in zip(rounds, (":", "--", "-")))):
            if mean(arm, "epoch0", r)[0] == mean(arm, "epoch0", r)[0]:
                axes.plot([0, .25, .5, .75, 1], [mean(arm, f"epoch{i}", r)[0] for i in range(0, 17, 4)], style, color=COLOURS[arm],
                          label="RM₀" if arm == "ppo" else f"{named(arm)}, round {r}")

    def distribution(axes):
        for arm in [arm for arm in arms if arm != "ppo-tuned"]:  # it has RM₀ too
            axes.plot([mean(arm, f"shifted.gap{q}")[0] for q in (10, 25, 50, 75, 90)], [90, 75, 50, 25, 10], ".-", color=COLOURS[arm],
                      label="RM₀" if arm == "ppo" else named(arm))

    def bars(axes, rows, heading=None):  # (label, colour, interval)
        for y, (label, colour, (x, low, high)) in enumerate(reversed(rows)):
            axes.plot([low, high], [y, y], color=colour, lw=2.5)
            axes.plot(x, y, "o", color=colour)
        axes.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
        axes.axvline(0, color="#BBBBBB", lw=1)
        axes.set_title(heading, fontsize="medium")

    def against(*row):
        for axes, metric, heading in zip(row, ("shifted.matched", "gold.matched"), ("on vanilla PPO's samples", "on samples that no RM chose")):
            bars(axes, [(named(arm), COLOURS[arm], t_interval(minus(table.get((task, arm, primary, metric), {}), table.get(
                (task, "ppo", primary, metric), {})).values())) for arm in others], heading)

    others = [arm for arm in arms if arm not in ("ppo", "ppo-tuned")]  # these have RM₀ itself
    ood = [(NAMES[arm.partition("@")[0]], COLOURS[arm.partition("@")[0]], t_interval(net(table, task, arm, max(
        r for t, a, r, _ in table if (t, a) == (task, arm)), "sft.ood").values()))
        for arm in (f"{base}@ood=1" for base in NAMES) if any((t, a) == (task, arm) for t, a, *_ in table)]
    seeds = len(table.get((task, METHOD, primary, "gold"), {}))
    draw("gold_over_kl", f"What the policies are worth, and what their RMs promise, {seeds} seeds", over_kl, (11, 4.5), 2,
         xlabel="KL to the SFT policy, nats", ylabel="reward, SD above SFT")
    draw("fig1", "Spread of two answers to one prompt, while PPO goes on against RM₀", spread, xlabel="rounds of PPO done",
         ylabel="variance of the difference, SD²", ylim=(0, None), xticks=[0, *rounds])
    draw("fig4", "Accuracy on held-out pairs of D over the one epoch", epoch, xlabel="share of the epoch", ylabel="right, % (noisy labels)")
    draw("fig5", "How far apart the RMs hold two of vanilla PPO's answers", distribution, (9, 4.5), xlabel="gap |r − r′|, SD", ylabel="pairs further apart, %")
    draw("accuracy", f"Accuracy at the same gold gap, RM of round {primary} minus RM₀ (95 %)", against,
         (9, 1.5 + 0.3 * len(others)), 2, xlabel="points")
    if ood:
        draw("ood", "Against SFT on OOD prompts, S and PPO there (95 %)", lambda axes: bars(axes, ood), (9, 1.5 + 0.35 * len(ood)),
             xlabel="wins − losses, points")

    def helps(*row):
        for axes, metric, heading in zip(row, ("gold", "shifted.matched", "gold.matched"), (
                "gold reward, SD", "accuracy, PPO's samples, points", "accuracy, no RM chose, points")):
            bars(axes, [(label, COLOURS[METHOD], t_interval(figures[metric].values())) for label, figures in moved.items()], heading)

    moved = where_it_helps(table, task, boundary, only)
    if len(moved) > 1:
        draw("boundary", "Where does it help? MetaRM minus the reseeded plain RM, round 2 (95 %)", helps, (11, 1.5 + 0.35 * len(moved)), 3)
