"""The report on a run, and the comparison of any two policies by a reward model.

    python eval.py --run runs/toy                            judged by the toy world's gold reward
    python eval.py --run runs/hh --judge runs/hh/judge/rm    judged by a reward model
    python eval.py --runs runs/toy-0,runs/toy-1              the tables over several seeds, printed
    python eval.py --judge RM --policies A,B --prompts FILE --out DIR

--run reads a folder as run.sh lays it out and writes RUN/figures, answers (in AlpacaEval's format,
for GPT-4 as the judge: see README.md), report.md and, last, results.json. It keeps its samples in
RUN/eval, so that a second report of the same run takes seconds.

To reuse a measure, read the first part only: its functions take arrays and texts, no files.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from matplotlib import figure

import data
import metarm
import ppo
import rm

ARMS = dict(sft="SFT", dpo="DPO", ppo="PPO on RM0", reseeded="reseeded RM", metarm="MetaRM")
NAMES = ARMS | dict(rm0="RM0", oracle="gold-label RM")
COLOURS = dict(ppo="#0072B2", reseeded="#009E73", metarm="#D55E00")  # the arms that PPO trains
MIN_PAIRS = 20  # an accuracy on fewer pairs is left out
TIE = 0.25  # a smaller difference between two answers is a tie, in SDs of the judge's rewards
GAP_EDGES = (TIE, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, np.inf)  # bins of |gold gap|, in SDs
CLIMB = ("rise", "predicted_rise", "loss_change", "first_order_gain")  # of metarm.diagnostics
GAP_SHARES = np.arange(0, 0.98, 0.02)  # quantiles of |reward gap|, for the paper's Figure 5


# ---------------------------------------------------------------------------------------- measures
# For whoever compares reward models or policies. There are m prompts with k responses each.
# `rewards` (m, k) are those of the reward model under test, `gold` (m, k) are taken for the truth.
def reward_gaps(rewards: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns r_i - r_j and gold_i - gold_j of all i < j of each prompt: two of (m·k(k-1)/2,)."""
    i, j = np.triu_indices(rewards.shape[1], 1)  # (k(k-1)/2,) each
    return (rewards[:, i] - rewards[:, j]).ravel(), (gold[:, i] - gold[:, j]).ravel()


def agreement(gap: np.ndarray, gold_gap: np.ndarray) -> np.ndarray:
    """Returns 1 where both gaps have the same sign, 0 where opposite ones, 1/2 if one is 0."""
    return 0.5 + 0.5 * np.sign(gap) * np.sign(gold_gap)


def pair_accuracy(rewards: np.ndarray, gold: np.ndarray, tie: float = 0.0) -> tuple[float, int]:
    """Returns (share of pairs that are ordered as gold orders them, number of these pairs).

    Pairs with |gold gap| < tie, or 0, have no right order and are left out. NaN if none is left.
    """
    gap, gold_gap = reward_gaps(rewards, gold)
    right = agreement(gap, gold_gap)[(np.abs(gold_gap) >= tie) & (gold_gap != 0)]
    return (float(right.mean()) if len(right) else np.nan), len(right)


def matched_accuracy(first: tuple, second: tuple, edges, minimum: int = 20) -> dict:
    """Returns {"first", "second"}: accuracy on two sets, (rewards, gold), AT THE SAME GOLD GAP.

    Why: as a policy narrows, its responses differ less in gold reward, too, and any RM finds them
    harder to order. So each set's accuracy is taken in bins of |gold gap| (`edges`, in gold's
    unit). Both are then averaged over the bins with the same weights, the first set's pairs per
    bin. Bins in which a set has fewer than `minimum` pairs are left out; NaN if none is left.
    """
    bins = []
    for rewards, gold in (first, second):
        gap, gold_gap = reward_gaps(rewards, gold)
        size = np.where(gold_gap == 0, -1, np.abs(gold_gap))  # -1: an exact tie is in no bin
        right, _ = np.histogram(size, edges, weights=agreement(gap, gold_gap))
        bins.append([np.histogram(size, edges)[0], right])
    pairs, right = np.array(bins).swapaxes(0, 1)  # number of them in each bin: (2, bins) each
    weights = np.where(pairs.min(0) >= minimum, pairs[0], 0)  # (bins,)
    means = right / np.maximum(pairs, 1) @ weights / (weights.sum() or np.nan)  # (2,)
    return {"first": means[0], "second": means[1]}


def rank_correlation(rewards: np.ndarray, gold: np.ndarray) -> tuple[float, int]:
    """Returns (mean Spearman correlation within a prompt, number of prompts).

    A prompt whose rewards (or gold rewards) are all equal has none. NaN if no prompt is left.
    """
    # sum_j sign(x_i - x_j) = 2 (rank of x_i - mean rank), ties averaged: (m, k). Spearman's
    # coefficient is Pearson's of the ranks; the factor 2 cancels.
    a, b = (np.sign(x[:, :, None] - x[:, None, :]).sum(-1) for x in np.array([rewards, gold]))
    length = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))  # (m,)
    found = (a * b).sum(-1)[length > 0] / length[length > 0]
    return (float(found.mean()) if len(found) else np.nan), len(found)


def spread(rewards: np.ndarray, scale: float = 1.0) -> dict:
    """Returns how far apart an RM scores responses: {"J" of Eq. 2, "margin", "variance"}.

    margin: mean |r_i - r_j|; variance: mean (r_i - r_j)², as in the paper's Figure 1. Rewards are
    divided by scale first: otherwise an RM that merely doubles its rewards would raise all three.
    """
    gap, _ = reward_gaps(rewards / scale, rewards)
    J = float(metarm.difference_loss(torch.as_tensor(rewards / scale)))
    return {"J": J, "margin": float(np.abs(gap).mean()), "variance": float((gap**2).mean())}


def win_tie_lose(ours: np.ndarray, theirs: np.ndarray, tie: float) -> dict:
    """Returns {"win", "tie", "lose"}, % of our rewards against theirs, entry by entry.

    Both have the same shape. A difference below `tie`, or of 0, is a tie.
    """
    gap = ours - theirs
    tied = (np.abs(gap) < tie) | (gap == 0)
    sides = {"win": ~tied & (gap > 0), "tie": tied, "lose": ~tied & (gap < 0)}
    return {side: 100 * float(which.mean()) for side, which in sides.items()}


def bleu(hypothesis: list[str], references: list[list[str]], longest: int = 5) -> list[float]:
    """Returns BLEU-1 .. BLEU-longest of a list of words against other lists, in 0 .. 1.

    An n-gram length without any match counts as 0.1 matches. Source: Papineni et al. 2002; Chen &
    Cherry 2014, method 1.
    """
    texts = [hypothesis, *references]
    logs = []  # log of the share of our n-grams that a reference has, n = 1, 2 ..
    for n in range(1, min(longest, len(hypothesis)) + 1):
        # The n-grams of each text, with their counts.
        ours, *others = (Counter(zip(*(x[i:] for i in range(n)), strict=False)) for x in texts)
        most = Counter()
        for other in others:
            most |= other  # maximum per n-gram over the texts
        logs.append(np.log(max((ours & most).total(), 0.1) / ours.total()))
    if not logs:  # no words: 1 if another text is empty too
        return [float([] in references)] * longest
    # Brevity penalty, against the reference that is nearest in length (the shorter one of a tie).
    closest = min((abs(len(words) - len(hypothesis)), len(words)) for words in references)[1]
    too_short = min(0.0, 1 - closest / len(hypothesis))
    return [float(np.exp(np.mean(logs[:n]) + too_short)) for n in range(1, longest + 1)]


def self_bleu(responses: list[list[str]]) -> float:
    """Returns the mean BLEU-2..5 of each response against the others to its prompt.

    As in the paper's Table 3. It is 1 if all responses to a prompt are equal, lower if they differ.
    """
    found = []
    for group in responses:
        words = [text.split() for text in group]
        found += [bleu(words[i], words[:i] + words[i + 1 :])[1:] for i in range(len(words))]
    return float(np.mean(found))


# ------------------------------------------------------------------------ what is measured of a run
# For readers of results.json. An arm is one way to get the reward models (run.sh): ppo, reseeded or
# metarm. Policies are called "sft", "dpo" and ARM-r (after round r of an arm). RMs are called
# "rm0", "oracle" (trained on gold labels), ARM-r (the RM that trained policy ARM-r) and
# "metarm-r adapted" (that RM at θ'). `by` is what is taken for the truth: "gold" or, with --judge,
# "judge".
def arm_of(name: str) -> tuple[str, int]:
    """Returns ("metarm", 2) of "metarm-2" and of "metarm-2 adapted", ("sft", 0) of "sft"."""
    arm, _, rounds = name.split()[0].partition("-")
    return arm, int(rounds or 0)


def title(name: str) -> str:
    """Returns a policy's or an RM's name for readers: "MetaRM, round 2, θ'"."""
    arm, rounds = arm_of(name)
    return NAMES[arm] + f", round {rounds}" * (rounds > 0) + ", θ'" * name.endswith(" adapted")


def trainer_of(policy: str) -> str:
    """Returns the RM that a policy was trained against; for SFT and DPO, which had none, RM0."""
    return policy if arm_of(policy)[0] in ("reseeded", "metarm") else "rm0"


def last_rounds(policies) -> dict[str, str]:
    """Returns {arm: its policy of the last round}, for the arms that PPO trains."""
    return {arm_of(name)[0]: name for name in sorted(policies, key=arm_of) if arm_of(name)[1]}


def measure(prompts, responses, scores, rollouts, epochs, kl, by="gold") -> dict:
    """Returns all figures of a run, as results.json holds them.

    prompts: {domain: texts}; domains are "test", "ood" and "pairs", the held-out pairs of D.
    responses: {(policy, domain): m lists of k texts}; [chosen, rejected] at ("D", "pairs").
    scores: {(judge, policy, domain): (m, k) rewards}; judges are the RMs and `by`.
    rollouts: {policy: one {"kl": nats, "scores": (b, g) rewards, `by`: (b, g)} per PPO step}.
    epochs: {RM: [[step, % right on D]]}. kl: {policy: nats per response}.
    """

    def in_sd(judge, rewards):
        # Each RM has its own offset and unit. So subtract this judge's mean on SFT's samples and
        # divide by its SD there: rewards of all RMs, and gold, can then be compared.
        on_sft = scores[judge, "sft", "test"]
        return (np.asarray(rewards) - on_sft.mean()) / (on_sft.std() or 1.0)

    if len(prompts["pairs"]) < MIN_PAIRS:  # too few to tell: left out, as NaN
        scores = {key: x * np.nan if key[2] == "pairs" else x for key, x in scores.items()}
    z = {key: in_sd(key[0], rewards) for key, rewards in scores.items()}
    names = [policy for policy, domain in responses if domain == "test"]
    last = last_rounds(names)
    policies = {x: measure_policy(x, responses, z, kl.get(x), by) for x in names}
    curves = {}
    for policy, steps in rollouts.items():
        curves[policy] = {"KL": [step["kl"] for step in steps]}
        for name, judge, key in (("RM", trainer_of(policy), "scores"), (by, by, by)):
            rewards = [in_sd(judge, step[key]) for step in steps]  # one (b, g) per PPO step
            # With one response per prompt (g = 1) there is no difference between responses.
            variance = [spread(x)["variance"] if x.shape[1] > 1 else np.nan for x in rewards]
            curves[policy] |= {name: [x.mean() for x in rewards], f"variance by {name}": variance}
    examples = []  # [prompt, {policy: its first answer}]
    shown = [policy for policy in names if policy in ("sft", "dpo", *last.values())]
    for i, prompt in enumerate(prompts["test"][:5]):
        examples.append([prompt, {title(x): responses[x, "test"][i][0] for x in shown}])
    results = dict(by=by, tie=TIE, k=len(responses["sft", "test"][0]), last=last)
    results |= dict(policies=policies, curves=curves, epochs=epochs, examples=examples)
    results["prompts"] = {domain: len(texts) for domain, texts in prompts.items()}
    # The ceiling: the truth itself disagrees with some of D's noisy labels.
    results["ceiling"] = 100 * agreement(scores[by, "D", "pairs"] @ [1, -1], 1).mean()
    models = [judge for judge, policy, _ in scores if policy == "D" and judge != by]
    results["rms"] = {name: measure_rm(scores, z, name, last["ppo"], by) for name in models}
    return results | {"criteria": criteria(results)}


def measure_policy(policy: str, responses: dict, z: dict, kl: float | None, by: str) -> dict:
    """Returns one policy's {"against": {rival: % win, tie, lose by `by`}, "figures": means}.

    z: `scores` of `measure` in SDs, as are the figures "RM" and `by`.
    """
    texts = sum(responses[policy, "test"], [])  # m·k
    means = {"RM": z[trainer_of(policy), policy, "test"].mean(), "KL": kl}
    means |= {by: z[by, policy, "test"].mean(), "words": np.mean([len(x.split()) for x in texts])}
    # Share of distinct answers: 1/(m·k) if the policy gives one answer to all prompts.
    means |= {"distinct": len({*texts}) / len(texts)}
    means |= {"Self-BLEU": self_bleu(responses[policy, "test"])}
    rounds = arm_of(policy)[1]
    against = {}
    # As the paper's Table 2, per round. Rivals: SFT, DPO, the other arms' policies of this round.
    for rival, domain in responses if rounds else ():
        if rival != policy and arm_of(rival)[1] in (0, rounds) and (policy, domain) in responses:
            name = ARMS[arm_of(rival)[0]] + (", OOD" if domain == "ood" else "")
            against[name] = win_tie_lose(z[by, policy, domain], z[by, rival, domain], TIE)
    return {"against": against, "figures": means}


def measure_rm(scores: dict, z: dict, name: str, shifted: str, by: str) -> dict:
    """Returns one RM's {"accuracy": % of pairs, "sft" and "shifted": its spread on their answers}.

    shifted: name of the policy whose answers are far from D, the last one of arm ppo. z: `scores`
    in SDs.
    """
    # Accuracy on D, by its labels and by the truth: (m, 2) @ (2,) is chosen - rejected.
    right = {"D, noisy": 100 * agreement(scores[name, "D", "pairs"] @ [1, -1], 1).mean()}
    right[f"D, {by}"] = 100 * pair_accuracy(scores[name, "D", "pairs"], scores[by, "D", "pairs"])[0]
    row = {"accuracy": right}
    # Accuracy off D, at the same gold gaps as SFT's answers have (see matched_accuracy).
    on_sft = z[name, "sft", "test"], z[by, "sft", "test"]
    for column, domain in (("shifted", "test"), ("OOD", "ood")):
        if (name, shifted, domain) in z:
            there = z[name, shifted, domain], z[by, shifted, domain]
            found = matched_accuracy(on_sft, there, GAP_EDGES)
            right |= {f"SFT for {column}": 100 * found["first"], column: 100 * found["second"]}
    # How far apart the RM scores the answers, also relative to the truth ("ratio", "ρ").
    for column, policy in (("sft", "sft"), ("shifted", shifted)):
        ours, truth = z[name, policy, "test"], z[by, policy, "test"]
        far = spread(ours)
        gaps = np.abs(reward_gaps(ours, ours)[0])  # (m·k(k-1)/2,)
        row[column] = {"J": spread(scores[name, policy, "test"])["J"], "J, SD units": far["J"]}
        row[column] |= {"gap, SD": far["margin"], "variance, SD²": far["variance"]}
        row[column] |= {"gaps": np.quantile(gaps, GAP_SHARES).tolist()}
        row[column] |= {"ratio": far["variance"] / (spread(truth)["variance"] or np.nan)}
        row[column] |= {"ρ": rank_correlation(ours, truth)[0]}
    return row


def criteria(results: dict) -> dict[str, dict]:
    """Returns what must hold if RM0 went stale: {what: {"before", "after", "criterion", "holds"}}.

    Stale: right on D, wrong on what PPO's policy says now. Before: on SFT's answers; after: on
    those of PPO's last policy. "holds" is None where too little was measured.
    """
    by = results["by"]
    rm0 = results["rms"]["rm0"]
    found = {}

    def require(what, was, now, sign, bound, lacks=f"fewer than {MIN_PAIRS} pairs"):
        holds = bool(now > bound if sign == ">" else now < bound)
        found[what] = dict(before=was, after=now, criterion=f"{sign} {show(bound)}", holds=holds)
        if np.isnan([now, bound]).any():
            found[what] = dict(before=None, after=None, criterion=f"left out: {lacks}", holds=None)

    # The bounds are conventions of this report; the paper has none.
    # RM0 is still right on D ..
    right = rm0["accuracy"]
    bar = 50 + (results["ceiling"] - 50) / 5  # a fifth of the way from chance to the ceiling
    require("RM0 right on held-out pairs of D, %", None, right["D, noisy"], ">", bar)
    require(f"the same by {by}, %", None, right[f"D, {by}"], ">", 60)
    # .. but wrong on the new answers, where an RM trained on labels of them can be right ..
    was, now = right["SFT for shifted"], right["shifted"]
    require(f"RM0 right on answers at the same gap by {by}, %", was, now, "<", was - 10)
    fresh = results["rms"].get("oracle", {"accuracy": dict.fromkeys(right, np.nan)})["accuracy"]
    was, then = fresh["SFT for shifted"], fresh["shifted"]
    lacks = "no such RM, or few pairs"
    require("a new RM, trained on gold labels there, %", was, then, ">", now + 5, lacks)
    # .. its rewards of the new answers differ less (the paper's Figure 1) ..
    sft, end = rm0["sft"], rm0["shifted"]
    names = "J of RM0", "variance of RM0's reward difference, SD²", f"the same over that by {by}"
    for key, what in zip(("J", "variance, SD²", "ratio"), names, strict=True):
        require(what, sft[key], end[key], "<", sft[key])
    # .. it predicts a gain that gold does not show (Gao et al. 2022), and the policy still writes
    # answers of some length that differ.
    last = results["last"]["ppo"]
    sft, first, end = (results["policies"][x]["figures"] for x in ("sft", "ppo-1", last))
    require("reward predicted by RM0, SD above SFT", sft["RM"], end["RM"], ">", sft["RM"])
    bound = first[by] + 0.1 if last != "ppo-1" else np.nan
    require(f"{by} reward, SD (before: round 1)", first[by], end[by], "<", bound, "one round only")
    require("mean length, words", sft["words"], end["words"], ">", sft["words"] / 2)
    require("distinct responses, share", sft["distinct"], end["distinct"], ">", 0.5)
    return found


def rounded(x):
    """Returns results for JSON: floats with six decimals, and None for NaN, which JSON lacks."""
    if isinstance(x, float):  # np.float64 is one
        return round(float(x), 6) if np.isfinite(x) else None
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, (list, tuple)) else x


# ---------------------------------------------------------------------------------------- pictures
# For readers of the report: the paper's Figures 1, 4 and 5, and gold over KL.
def smoothed(results: dict, arm: str, key: str) -> list[float]:
    """Returns an arm's curve over all rounds' PPO steps, as moving means of up to 9 steps."""
    y = sum((x[key] for name, x in results["curves"].items() if arm_of(name)[0] == arm), [])
    return [np.array(y[i - min(4, i) : i + min(4, i) + 1], float).mean() for i in range(len(y))]


def draw_pictures(results: dict, folder: Path) -> None:
    """Writes the report's four pictures into a folder."""

    def save(name, lines, xlabel, heading):  # lines: (x values, y values, arm, style, label)
        axes = figure.Figure((9, 4), layout="tight").subplots()
        for x, y, arm, style, label in lines:
            axes.plot(x, y, style, color=COLOURS.get(arm, COLOURS["ppo"]), label=label, lw=2.2)
        axes.set(xlabel=xlabel, title=heading)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.figure.savefig(folder / f"{name}.png", dpi=150)

    # Each arm by its own RM (solid), against which it was trained, and by the truth (dashed).
    lines = []
    over_kl = []
    for key, judge, style in (("RM", "its RM", "-"), (results["by"], results["by"], "--")):
        for arm in results["last"]:
            drawn_as = arm, style, f"{NAMES[arm]}, by {judge}"
            over_kl.append((smoothed(results, arm, "KL"), smoothed(results, arm, key), *drawn_as))
            if arm == "ppo":
                variance = smoothed(results, arm, f"variance by {key}")
                lines.append((range(len(variance)), variance, *drawn_as))
    # Paper's Figure 1: do RM0's rewards of its policy's answers differ less and less? Does gold's?
    save("fig1_reward_difference", lines, "PPO step", "Variance of two answers' reward gap, SD²")
    # Gao et al. 2022: reward by the policy's RM and by the truth, over the KL it has spent.
    save("gold_over_kl", over_kl, "KL to SFT, nats per answer", "Mean reward, SD above SFT")
    # Paper's Figure 4: does the meta step cost accuracy on D?
    lines = []
    for name, points in results["epochs"].items():
        style = {1: ":", 2: "--"}.get(arm_of(name)[1], "-")
        lines.append((*np.array(points).T, arm_of(name)[0], style, title(name)))
    save("fig4_rm_accuracy", lines, "training step", "Right on held-out pairs of D, %")
    # Paper's Figure 5: which RM scores the shifted policy's answers further apart?
    lines = []
    for name in dict.fromkeys(trainer_of(policy) for policy in results["last"].values()):
        gaps = results["rms"][name]["shifted"]["gaps"]
        lines.append((gaps, 100 * (1 - GAP_SHARES), arm_of(name)[0], "-", title(name)))
    save("fig5_reward_gaps", lines, "reward gap, SD", "Shifted answers with a larger gap, %")


# ------------------------------------------------------------------------------------------ report
# For readers who have seen neither the code nor the paper. A number that is missing shows as "–".
def show(*figures) -> str:
    """Returns a number as text; of several runs, their mean ± SD. None and NaN are left out."""
    told = [x for x in figures if x is not None and not np.isnan(x)]
    if not told:
        return "–"
    mean = np.mean(told)
    digits = 1 + int(abs(mean) < 10) + int(abs(mean) < 1)  # 12.3, 1.23, 0.123
    text = f"{round(mean, 3) + 0.0:.{digits}f}".replace("-", "−")  # + 0.0: no −0.000
    return text + (f" ± {show(np.std(told, ddof=1))}" if len(told) > 1 else "")


def show_sides(*sides) -> str:
    """Returns "win / tie / lose" in %; of several runs, win - lose, as mean ± SD."""
    if len(sides) > 1:
        return show(*(x["win"] - x["lose"] for x in sides if x))
    return " / ".join(f"{sides[0][side]:.0f}" for side in ("win", "tie", "lose"))


def show_holds(*holds) -> str:
    """Returns whether a criterion holds; of several runs, in how many of those that measured it."""
    if len(holds) > 1:
        return f"{holds.count(True)} of {len(holds) - holds.count(None)}"
    return "yes" if holds[0] else "**no**"


def show_text(*texts) -> str:
    """Returns the text of one run, or the one that all runs have."""
    return texts[0] if len({*texts}) == 1 else "–"


def tables(runs: list[dict]) -> list[str]:
    """Returns five tables in markdown, of one run or over several; empty columns are left out.

    Criteria; policies; policies against policies; RMs' accuracy; RMs on the shifted answers.
    """
    by = runs[0]["by"]
    rivals = [arm + ood for ood in ("", ", OOD") for arm in ARMS.values()]
    shown_by = {"criterion": show_text, "holds": show_holds} | dict.fromkeys(rivals, show_sides)
    found = []
    for part, group, columns in (
        ("criteria", "", ["before", "after", "criterion", "holds"]),
        ("policies", "figures", ["RM", by, "KL", "words", "distinct", "Self-BLEU"]),
        ("policies", "against", rivals),
        ("rms", "accuracy", ["D, noisy", f"D, {by}", "SFT for shifted", "shifted", "OOD"]),
        ("rms", "shifted", ["J", "J, SD units", "gap, SD", "variance, SD²", "ratio", "ρ"]),
    ):
        rows = {}
        for name in runs[0][part]:
            entries = [run[part].get(name, {}) for run in runs]  # a run may have fewer rounds
            entries = [x.get(group, {}) if group else x for x in entries]
            for key in columns if entries[0] else ():
                cells = [entry.get(key) for entry in entries]
                text = shown_by.get(key, show)(*cells) if any(x is not None for x in cells) else "–"
                rows.setdefault(title(name) if group else name, {})[key] = text
        columns = [x for x in columns if any(row[x] != "–" for row in rows.values())]
        lines = [["", *columns], ["---"] * (len(columns) + 1)]
        lines += [[label, *(row[x] for x in columns)] for label, row in rows.items()]
        found.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return found


def report(results: dict, judge: str) -> str:
    """Returns the text of report.md: docs/report.txt with its {names} filled in.

    judge: --judge, the reward model that is taken for the truth, or "" for gold.
    """
    names = "criteria", "policies", "rivals", "accuracy", "spreads"
    fill = results | dict(zip(names, tables([results]), strict=True))
    fill |= {"met": fill["criteria"].count("| yes |"), "of": len(results["criteria"])}
    fill |= {"end": title(results["last"]["ppo"]), "ood": results["prompts"].get("ood", 0)}
    fill |= {"by": "the judge" if judge else "gold", "right": show(results["ceiling"])}
    fill["truth"] = f"the reward model {judge}" if judge else "a rule that no arm was shown"
    fill |= {"climbs": "", "answers": ""}
    for name, means in results.get("climbs", {}).items():
        J, J_predicted, L, L_predicted = (show(means[key]) for key in CLIMB)
        fill["climbs"] += f"- {title(name)}: J {J} ({J_predicted}), L {L} ({L_predicted})\n"
    for prompt, answers in results["examples"]:
        told = [f"- **{who}**: {' '.join(text.split())}\n" for who, text in answers.items()]
        fill["answers"] += f"\n> {' '.join(prompt.split())}\n\n{''.join(told)}"
    return Path(__file__).with_name("docs").joinpath("report.txt").read_text("utf-8").format(**fill)


# ----------------------------------------------------------------------------------------- command
# For whoever runs it: how a run's folders become what `measure` takes, and the options.
def sampled(args, path: Path, policy: str, loaded, prompts: list[str]) -> list[list[str]]:
    """Returns k responses to each prompt, kept at `path` while policy, prompts and options stay.

    loaded: the policy's (model, tokenizer).
    """
    options = {x: vars(args)[x] for x in "seed k temperature max_new_tokens batch_size".split()}
    made_from = {"policy": policy, "prompts": prompts, **options}
    newest = max((file.stat().st_mtime for file in Path(policy).glob("*")), default=0)
    if path.exists() and path.stat().st_mtime > newest:
        kept, *rows = data.read_jsonl(path)
        if kept == made_from:
            return [row["responses"] for row in rows]
    groups = ppo.sample_responses(*loaded, prompts, **options)
    data.write_jsonl(path, [made_from, *({"responses": group} for group in groups)])
    return groups


def scored(judge, prompts: list[str], groups: list[list[str]]) -> np.ndarray:
    """Returns rewards (m, k) of k responses to each of m prompts.

    judge: (reward model, tokenizer), or None for the toy world's gold reward.
    """
    pairs = [(x, y) for x, ys in zip(prompts, groups, strict=True) for y in ys]  # m·k
    if judge is None:
        rewards = [data.gold_reward(x, y) for x, y in pairs]
    else:
        rewards = rm.score(judge[0].to(rm.pick_device()), judge[1], *zip(*pairs, strict=True))
    return torch.as_tensor(rewards, dtype=torch.float64).reshape(len(groups), -1).numpy()


@torch.no_grad()
def kl_to(policy, tokenizer, reference, prompts, groups, temperature=1.0, longest=48) -> float:
    """Returns the KL of a policy to the reference, in nats per response.

    It is the mean of log π(y|x) - log π_ref(y|x) over the policy's own samples, `groups` of texts,
    which were sampled at this temperature and with at most `longest` tokens.
    """
    rows = [rm.encode(tokenizer, x, y) for x, ys in zip(prompts, groups, strict=True) for y in ys]
    ends = ppo.end_ids(policy, tokenizer)
    total = 0.0
    for start in range(0, len(rows), 64):
        # A response that was cut off while sampling gets no EOS here, either.
        part = [(x, y[:longest]) for x, y in rows[start : start + 64]]
        batch = ppo.policy_batch(tokenizer, part, policy.device)
        said = batch["input_ids"][:, -batch["mask"].shape[1] :, None]  # (64, t, 1)
        for model, sign in ((policy, 1), (reference, -1)):
            # Log-probabilities of the whole vocabulary at each token: (64, t, vocabulary).
            logprobs = (ppo.states_of(model, batch, "logits").float() / temperature).log_softmax(-1)
            # A chat model has several end tokens, and the text does not keep which: sum over all.
            logprobs[..., ends[0]] = logprobs[..., ends].logsumexp(dim=-1)
            logprobs = logprobs.gather(-1, said)[..., 0].double()  # (64, t)
            total += sign * (logprobs * batch["mask"]).sum().item()
    return total / len(rows)


def write_answers(path: Path, generator: str, prompts: list[str], groups: list[list[str]]) -> None:
    """Writes the first response to each prompt in AlpacaEval's format, for another judge."""
    rows = {}  # AlpacaEval joins files by instruction, so each may occur once only
    for prompt, group in zip(prompts, groups, strict=True):
        # Cut off what HH-RLHF puts around a question.
        text = prompt.strip().removeprefix("Human:").removesuffix("Assistant:").strip()
        rows[text] = {"instruction": text, "output": group[0].strip(), "generator": generator}
    data.write_text(path, json.dumps(list(rows.values()), indent=1, ensure_ascii=False) + "\n")


def look(args, run: Path, policies: dict[str, Path], models: dict[str, Path]) -> dict:
    """Samples each policy, scores with each RM, writes RUN/answers; returns `measure`'s figures.

    Adds "climbs": {RM: means of metarm.diagnostics over its training log}.
    """
    judge = rm.load_reward_model(args.judge) if args.judge else None
    by = "judge" if judge else "gold"
    last = last_rounds(policies)
    files = {x: run / "data" / f"prompts-{x}.jsonl" for x in ("test", "ood")}
    prompts = {x: data.read_prompts(y) for x, y in files.items() if x == "test" or y.exists()}
    responses = {}
    kl = {}
    reference, _ = ppo.load_policy(str(policies["sft"]))
    for policy, folder in policies.items():
        loaded = ppo.load_policy(str(folder))
        # Out of domain, sample only the policies that are compared there: SFT and the last rounds.
        domains = prompts if policy in ("sft", *last.values()) else ["test"]
        texts = [prompt for domain in domains for prompt in prompts[domain]]
        groups = sampled(args, run / "eval" / f"{policy}.jsonl", str(folder), loaded, texts)
        for domain in domains:
            responses[policy, domain] = [groups.pop(0) for _ in prompts[domain]]
        own = prompts["test"], responses[policy, "test"]
        write_answers(run / "answers" / f"{policy}.json", policy, *own)
        kl[policy] = kl_to(*loaded, reference, *own, args.temperature, args.max_new_tokens)
    rollouts = {name: folder / "rollouts.jsonl" for name, folder in policies.items()}
    rollouts = {name: data.read_jsonl(x) for name, x in rollouts.items() if x.exists()}
    for step in sum(rollouts.values(), []):
        step[by] = scored(judge, step["prompts"], step["responses"])
    source = "pairs" if (run / "pairs").exists() else "data"  # real preferences lie in data/
    pairs = data.read_preferences(run / source / "valid.jsonl")
    prompts["pairs"] = [pair["prompt"] for pair in pairs]
    responses["D", "pairs"] = [[pair["chosen"], pair["rejected"]] for pair in pairs]
    scores = {}
    epochs = {}
    climbs = {}
    for name, folder in {by: None, **models}.items():
        model = rm.load_reward_model(str(folder)) if folder else judge
        for (policy, domain), groups in responses.items():
            # The truth scores all; an RM its own policy's answers, and those that all RMs score.
            if name in (by, trainer_of(policy)) or policy in ("D", "sft", last["ppo"]):
                scores[name, policy, domain] = scored(model, prompts[domain], groups)
        if folder and name != "oracle" and (folder / "log.jsonl").exists():
            log = data.read_jsonl(folder / "log.jsonl")
            epochs[name] = [[x["step"], 100 * x["accuracy"]] for x in log if "accuracy" in x]
            log = [row for row in log if "rise" in row]
            if log:  # of a MetaRM RM
                climbs[name] = {key: np.mean([row[key] for row in log]) for key in CLIMB}
    return measure(prompts, responses, scores, rollouts, epochs, kl, by) | {"climbs": climbs}


def evaluate(args) -> None:
    """--run: makes the report. results.json is written last: it says that the rest is there."""
    if args.k < 2:
        raise data.Mistake(f"--k {args.k}: a difference between responses needs at least 2 of them")
    run = Path(args.run)
    arms = [f"{arm}-{r}" for arm in COLOURS for r in range(1, 100)]
    policies = {x: run / x for x in ("sft", "dpo")} | {x: run / x / "policy" for x in arms}
    models = {"rm0": run / "rm0"} | {x: run / x / "rm" for x in ("oracle", *arms)}
    models |= {f"{x} adapted": run / x / "adapted" for x in arms}
    policies = {name: path for name, path in policies.items() if path.is_dir()}
    models = {name: path for name, path in models.items() if path.is_dir()}
    missing = {"sft", "ppo-1"} - {*policies} | {trainer_of(x) for x in policies} - {*models}
    if missing:
        raise data.Mistake(f"--run {run}: no {min(missing)}; finish the run: bash run.sh")
    (run / "results.json").unlink(missing_ok=True)
    for folder in ("eval", "answers", "figures"):
        (run / folder).mkdir(exist_ok=True)
    found = rounded(look(args, run, policies, models))
    draw_pictures(found, run / "figures")
    data.write_text(run / "report.md", report(found, args.judge))
    data.write_jsonl(run / "results.json", [found])
    print(run / "report.md")


def compare(args) -> None:
    """--policies: compares two by a reward model; writes their answers for another judge, too."""
    names = args.policies.split(",")
    if len(names) != 2 or not (args.judge and args.prompts and args.out):
        raise data.Mistake("--policies needs two names, A,B, and --judge, --prompts and --out")
    judge = rm.load_reward_model(args.judge)
    prompts = data.read_prompts(args.prompts)
    rewards = []  # of A and of B, (m, k) each
    with data.output_folder(args.out) as work:
        for x, name in zip("AB", names, strict=True):
            groups = sampled(args, work / f"{x}.jsonl", name, ppo.load_policy(name), prompts)
            write_answers(work / f"{x}.json", name, prompts, groups)
            rewards.append(scored(judge, prompts, groups))
        found = win_tie_lose(*rewards, TIE * np.std(rewards))
        data.write_jsonl(work / "results.json", [{"policies": names, "judge": args.judge, **found}])
    print(f"{args.policies} by {args.judge}: win / tie / lose {show_sides(found)} %")


def run_command(args) -> None:
    """Does what the command line asks for."""
    if args.run:
        evaluate(args)
    elif args.policies:
        compare(args)
    else:
        runs = [data.read_jsonl(Path(run) / "results.json")[0] for run in args.runs.split(",")]
        print(f"{len(runs)} seeds, mean ± SD (win - lose for win / tie / lose): {args.runs}\n")
        print("\n".join(tables(runs)), end="")


def main(argv: list[str] | None = None) -> int:
    parser = data.new_parser("eval.py", __doc__)
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--run", help="report on this folder of a run, as run.sh lays it out")
    ways.add_argument("--runs", help="the tables over these runs, A,B,C: seeds of one setting")
    ways.add_argument("--policies", help="compare two policies, A,B: folders or hub names")
    add = parser.add_argument
    add("--judge", default="", help="the reward model that judges --policies or --run")
    add("--prompts", default="", help=".jsonl with a `prompt` per row, for --policies")
    add("--out", default="", help="folder for results.json and the answers, A.json and B.json")
    add("--seed", type=int, default=0, help="of the sampling, the same for each policy")
    add("--k", type=int, default=5, help="responses per prompt, at least 2")
    add("--temperature", type=float, default=1.0, help="divides the logits")
    add("--max_new_tokens", type=int, default=48, help="longest response, in tokens")
    add("--batch_size", type=int, default=640, help="responses sampled at once")
    return data.command(parser, run_command, argv)


if __name__ == "__main__":
    sys.exit(main())
