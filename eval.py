"""The report on a run, by the toy world's gold reward; and a comparison of any two policies by any other judge.

    python eval.py --run runs/toy                                       (--judge RM: an RM in gold's place)
    python eval.py --runs runs/toy-0,runs/toy-1,runs/toy-2               one table over several seeds
    python eval.py --judge RM --policies A,B --prompts FILE --out DIR   by a reward model
    python eval.py --blind    --policies A,B --prompts FILE --out DIR   by a human or an LLM, who sees no names ...
    python eval.py --verdicts verdicts.jsonl --key DIR/key.json         ... and what came of it

In the toy world the truth is known, so each claim of the paper becomes a number. First come the measures: arrays in,
numbers out, no model in sight; then figures, report and pictures; sampling and scoring last. The first command samples
k responses of each policy to the test and OOD prompts (kept in RUN/eval: a cut-off costs little), scores them, and
writes RUN/figures/*.png, report.md and, last, results.json.
"""

import hashlib
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path

import numpy as np
import torch

import data
import metarm
import ppo
import rm

# m prompts, k responses each. Only responses to ONE prompt are ever compared: preference pairs and J see nothing else.
def reward_gaps(rewards: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r_i - r_j and gold_i - gold_j of all i < j of each prompt: (m, k) twice -> (m·k(k-1)/2,) twice."""
    rewards, gold = np.asarray(rewards, float), np.asarray(gold, float)
    if rewards.ndim != 2 or rewards.shape != gold.shape or rewards.shape[1] < 2:
        raise ValueError(f"rewards and gold must be (m, k), k >= 2; got {rewards.shape} and {gold.shape}")
    i, j = np.triu_indices(rewards.shape[1], 1)
    return (rewards[:, i] - rewards[:, j]).ravel(), (gold[:, i] - gold[:, j]).ravel()


def agreement(gap: np.ndarray, gold_gap: np.ndarray) -> np.ndarray:
    """1 where the gap has the sign of the gold gap, 0 where it has the other, 1/2 where either is zero."""
    return 0.5 + 0.5 * np.sign(gap) * np.sign(gold_gap)


def pair_accuracy(rewards: np.ndarray, gold: np.ndarray, tie: float = 0.0) -> tuple[float, int]:
    """(share of pairs ordered as gold orders them, pairs used); |gold gap| < tie or no gap at all is out."""
    gap, gold_gap = reward_gaps(rewards, gold)
    used = (np.abs(gold_gap) >= tie) & (gold_gap != 0)
    return (float(agreement(gap, gold_gap)[used].mean()) if used.any() else float("nan")), int(used.sum())


def matched_accuracy(first: tuple, second: tuple, edges: np.ndarray, minimum: int = 20) -> dict:
    """Pair accuracy on two sets, (rewards, gold) each, AT THE SAME GOLD GAP: {"first", "second", "first_pairs", ...}.

    As a policy narrows, its responses differ less in truth too, and pairs get harder for ANY reward model: raw accuracy
    falls without the RM being any worse. So accuracy is taken in bins of |gold gap| (`edges`; the lowest is the tie),
    and both sets averaged with the first's shares, over the bins where both have `minimum` pairs (NaN: no such bin)."""
    pairs, right = [], []
    for rewards, gold in (first, second):
        gap, gold_gap = (x[reward_gaps(gold, gold)[0] != 0] for x in reward_gaps(rewards, gold))
        pairs.append(np.histogram(np.abs(gold_gap), edges)[0])
        right.append(np.histogram(np.abs(gold_gap), edges, weights=agreement(gap, gold_gap))[0])
    used = np.minimum(*pairs) >= max(minimum, 1)
    first, second = (float(np.average((x / n)[used], weights=pairs[0][used])) if used.any() else float("nan")
                     for x, n in zip(right, np.maximum(pairs, 1)))
    return {"first": first, "second": second, **{f"{name}_pairs": int(n[used].sum())
                                                 for name, n in zip(("first", "second"), pairs)}}


def rank_correlation(rewards: np.ndarray, gold: np.ndarray) -> tuple[float, int]:
    """(mean Spearman correlation within a prompt, prompts used); where a side is constant there is none."""
    # sum_j sign(x_i - x_j) is twice the rank of x_i, ties averaged, less the mean rank: all that Pearson needs
    a, b = (np.sign(x[..., :, None] - x[..., None, :]).sum(-1) for x in map(np.asarray, (rewards, gold)))
    length = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    used = length > 0
    return (float(((a * b).sum(-1)[used] / length[used]).mean()) if used.any() else float("nan")), int(used.sum())


def spread(rewards: np.ndarray, scale: float = 1.0) -> dict:
    """{"J", "margin", "variance"} of rewards / scale, (m, k): Eq. 2; the mean |r_i - r_j|; and the mean (r_i - r_j)^2,
    the variance of the difference of two responses in random order (paper, Figure 1). An RM that doubles its rewards
    raises all three and has learned nothing. Hence `scale`: the SD of the same RM's rewards on SFT samples."""
    rewards = np.asarray(rewards, float) / scale
    gap, _ = reward_gaps(rewards, rewards)
    return {"J": float(metarm.difference_loss(torch.as_tensor(rewards))), "margin": float(np.abs(gap).mean()),
            "variance": float((gap ** 2).mean())}


def win_tie_lose(ours: np.ndarray, theirs: np.ndarray, tie: float) -> dict:
    """Percent {"win", "tie", "lose"} by the judge's rewards, two arrays of one shape: entry i of ours meets entry i
    of theirs, to the same prompt. A tie is a difference below `tie`, or none."""
    gap = np.asarray(ours, float) - np.asarray(theirs, float)
    tied = (np.abs(gap) < tie) | (gap == 0)
    return {side: 100 * float(which.mean()) for side, which in (
        ("win", ~tied & (gap > 0)), ("tie", tied), ("lose", ~tied & (gap < 0)))}


def bleu(hypothesis: list[str], references: list[list[str]], longest: int = 5) -> list[float]:
    """BLEU-1 .. BLEU-longest of a list of words against others (Papineni et al. 2002), each between 0 and 1. An order
    with no match counts as 0.1 matches (method 1 of Chen & Cherry 2014), one longer than the hypothesis not at all."""
    logs = []
    for n in range(1, min(longest, len(hypothesis)) + 1):
        ours, *others = (Counter(zip(*(words[i:] for i in range(n)))) for words in (hypothesis, *references))
        most = Counter()
        for other in others:
            most |= other  # an n-gram counts as often as in the one reference that has it most often
        logs.append(np.log(max((ours & most).total(), 0.1) / ours.total()))
    if not logs:
        return [float([] in references)] * longest
    closest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    too_short = min(0.0, 1 - closest / len(hypothesis))
    return [float(np.exp(np.mean(logs[:n]) + too_short)) for n in range(1, longest + 1)]


def self_bleu(responses: list[list[str]]) -> float:
    """BLEU of each of a prompt's k responses against the others, mean over n = 2..5, responses and prompts; 1: all say
    the same, lower is more diverse (paper, Table 3; Zhu et al. 2018)."""
    words = [[text.split() for text in group] for group in responses]
    return float(np.mean([bleu(group[i], group[:i] + group[i + 1:])[1:] for group in words for i in range(len(group))]))


def distinct_share(responses: list[list[str]]) -> float:
    """Different texts among all responses to all prompts; a policy with one answer for all has 1/(m·k)."""
    texts = [text for group in responses for text in group]
    return len(set(texts)) / len(texts)


def mean_words(responses: list[list[str]]) -> float:
    return float(np.mean([len(text.split()) for group in responses for text in group]))


# ---------------------------------------------------------------------------------- the report on a run, in figures

RL_ARMS = ("ppo", "reseeded", "metarm")  # ARM-r: an arm's policy of round r, and the RM behind it (ppo: rm0)
NAMES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO on RM0", "reseeded": "reseeded RM", "metarm": "MetaRM", "rm0": "RM0",
         "oracle": "gold-label RM", "gold": "gold"}
COLOURS = {"ppo": "#0072B2", "rm0": "#0072B2", "reseeded": "#009E73", "metarm": "#D55E00", "gold": "#000000"}
# When to stop the rounds, without labels: the rule that did best on the tuning seeds of docs/study, as (signal, go on while
# it is at least "+" or at most "-" this, the value). The value is the toy world's: elsewhere, watch where the signal turns.
STOP = ("KL, nats", "-", 10.31)
GAP_EDGES = (0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, np.inf)  # bins of |gold gap|, in SDs


def arm_of(name: str) -> tuple[str, int]:
    """"metarm-2" and "metarm-2 adapted" -> ("metarm", 2); "sft" -> ("sft", 0)."""
    arm, _, rounds = name.split()[0].partition("-")
    return arm, int(rounds or 0)


def trainer_of(policy: str) -> str:
    """The RM whose rewards a policy was trained on; RM0 also stands in for SFT and DPO, which had none."""
    return policy if arm_of(policy)[0] in ("reseeded", "metarm") else "rm0"


def last_rounds(policies) -> dict[str, str]:
    """{arm: its policy of the last round}, the RL arms only (in a dict, later rounds replace earlier ones)."""
    return {arm_of(name)[0]: name for name in sorted(policies, key=lambda name: arm_of(name)[1]) if arm_of(name)[1]}


def stop_round(signal: list[float], threshold: float, sign: str) -> int:
    """The last round (from 1) before the signal crosses the threshold; round 1 is always taken."""
    taken = 0
    for value in signal:
        if value < threshold if sign == "+" else value > threshold:
            break
        taken += 1
    return max(1, taken)


def before(policy: str) -> str:
    """The RM that MetaRM had a round earlier: "metarm-2" -> "metarm-1"; before round 1, RM0."""
    arm, rounds = arm_of(policy)
    return f"{arm}-{rounds - 1}" if rounds > 1 else "rm0"


def title(name: str) -> str:
    arm, rounds = arm_of(name)
    return NAMES[arm] + (f", round {rounds}" if rounds else "") + (", θ'" if " adapted" in name else "")


def measure(prompts: dict, responses: dict, scores: dict, rollouts: dict, epochs: dict, tie: float = 0.25) -> dict:
    """All figures of a run: rows of {heading: figure}, as the report shows them. `tie`: in SDs of gold.

    Prompts by domain; responses by (policy, domain), chosen and rejected by ("D", "pairs"); scores (m, k) by (an RM's
    name or "gold", policy, domain); rollouts: steps by policy, rewards (b, g); epochs: [[step, % right on D]] by RM."""
    policies = [policy for policy, domain in responses if domain == "test"]
    last, curves, rows = last_rounds(policies), {}, {}

    def in_sd(judge, rewards):  # how many SDs above the judge's mean on SFT samples
        on_sft = scores[judge, "sft", "test"]
        return (np.asarray(rewards) - on_sft.mean()) / (on_sft.std() or 1.0)

    z = {key: in_sd(key[0], rewards) for key, rewards in scores.items()}
    for policy, steps in rollouts.items():
        curves[policy] = {"KL": [step["KL"] for step in steps]}
        for name, judge in (("RM", trainer_of(policy)), ("gold", "gold")):
            rewards = [in_sd(judge, step[name]) for step in steps]
            curves[policy] |= {name: [x.mean() for x in rewards], f"variance by {name}": [
                spread(x)["variance"] if x.shape[1] > 1 else np.nan for x in rewards]}
    for policy in policies:
        texts, rounds = responses[policy, "test"], arm_of(policy)[1]
        against = {NAMES[arm_of(rival)[0]] + ", OOD" * (domain == "ood"): win_tie_lose(
            z["gold", policy, domain], z["gold", rival, domain], tie)
            for rival in policies for domain in prompts  # SFT, DPO, and the other arms' policies of the same round
            if rounds and rival != policy and arm_of(rival)[1] in (0, rounds)
            and (policy, domain) in responses and (rival, domain) in responses}
        rows[policy] = {"against": against, "figures": {
            "RM": z[trainer_of(policy), policy, "test"].mean(), "gold": z["gold", policy, "test"].mean(),
            "KL": np.mean(curves[policy]["KL"][-5:]) if policy in curves else None, "words": mean_words(texts),
            "distinct": distinct_share(texts), "Self-BLEU": self_bleu(texts)}}
    examples = [[prompt, {title(name): {
        "": responses[name, "test"][i][0], "RM": z[trainer_of(name), name, "test"][i, 0],
        "gold": z["gold", name, "test"][i, 0]} for name in policies if name in ("sft", "dpo", *last.values())}]
        for i, prompt in enumerate(prompts["test"][:5])]
    results = {"prompts": {domain: len(texts) for domain, texts in prompts.items()}, "last": last, "tie": tie,
               "k": len(responses["sft", "test"][0]), "policies": rows, "curves": curves, "epochs": epochs,
               "ceiling": 100 * agreement(scores["gold", "D", "pairs"] @ [1, -1], 1).mean(), "examples": examples,
               "rms": {name: measure_rm(scores, z, name, last["ppo"], tie)
                       for name, policy, _ in z if policy == "D" and name != "gold"}}
    return {**results, **stop_signals(results, z), "illness": illness(results)}


def stop_signals(results: dict, z: dict) -> dict:
    """What somebody without labels can look at after each round of MetaRM, and what the rule STOP makes of it."""
    rounds = sorted((name for name in results["policies"] if arm_of(name)[0] == "metarm"), key=arm_of)
    rows, (signal, sign, threshold) = {}, STOP
    for policy in rounds:
        fresh, last_rm = z[policy, policy, "test"], z.get((before(policy), policy, "test"))
        apart = spread(fresh)
        rows[policy] = {"KL, nats": results["policies"][policy]["figures"]["KL"], "J, SD units": apart["J"],
                        "variance, SD²": apart["variance"], "RMs disagree, %": None if last_rm is None else
                        100 * (1 - agreement(*reward_gaps(fresh, last_rm)).mean()),
                        "D, noisy, %": results["rms"][policy]["accuracy"]["D, noisy"]}
    watched = [row[signal] for row in rows.values()]
    told = watched and None not in watched
    return {"signals": rows, "stop after round": stop_round(watched, threshold, sign) if told else None}


def measure_rm(raw: dict, z: dict, name: str, shifted: str, tie: float) -> dict:
    """One RM: accuracy in %, and how far apart it holds SFT's and the shifted policy's responses. `z`: `raw` in SDs."""
    margins, truth = (raw[judge, "D", "pairs"] @ [1, -1] for judge in (name, "gold"))
    sft, edges = (z[name, "sft", "test"], z["gold", "sft", "test"]), [tie, *(edge for edge in GAP_EDGES if edge > tie)]
    row = {"accuracy": {"D, noisy": 100 * agreement(margins, 1).mean(),
                        "D, gold": 100 * agreement(margins, truth)[truth != 0].mean()}}
    for column, domain in (("shifted", "test"), ("OOD", "ood")):
        if (name, shifted, domain) in z:
            pair = z[name, shifted, domain], z["gold", shifted, domain]
            matched = matched_accuracy(sft, pair, edges)
            row["accuracy"] |= {f"SFT for {column}": 100 * matched["first"], column: 100 * matched["second"],
                                f"{column}, raw": 100 * pair_accuracy(*pair, tie)[0]}
    for column, policy in (("sft", "sft"), ("shifted", shifted)):
        pair = z[name, policy, "test"], z["gold", policy, "test"]
        plain, ours, gold = spread(raw[name, policy, "test"]), *map(spread, pair)
        row[column] = {"J": plain["J"], "J, SD units": ours["J"], "gap": plain["margin"], "gap, SD": ours["margin"],
                       "variance, SD²": ours["variance"], "variance of gold": gold["variance"],
                       "ratio": ours["variance"] / (gold["variance"] or np.nan), "ρ": rank_correlation(*pair)[0]}
    gaps = np.abs(reward_gaps(*[z[name, shifted, "test"]] * 2)[0])
    return {**row, "gaps": np.quantile(gaps, np.arange(0, 0.98, 0.02)).tolist()}


def illness(results: dict) -> dict[str, dict]:
    """What must be there before a cure is judged, a row each. "there?": yes or no, None where it cannot be told."""
    rm0, end, policies = results["rms"]["rm0"], results["last"]["ppo"], results["policies"]
    sft, first, last = (policies[name]["figures"] for name in ("sft", "ppo-1", end))
    right, before, after = rm0["accuracy"], rm0["sft"], rm0["shifted"]
    fresh = results["rms"]["oracle"]["accuracy"] if "oracle" in results["rms"] else dict.fromkeys(right, np.nan)
    bar = 50 + (results["ceiling"] - 50) / 5  # what 60 % by gold comes to under the flips
    rows = (  # what; before and after PPO; the criterion; does it hold?
        ("RM0 right on held-out pairs of D, % by noisy labels (before: chance)", 50, right["D, noisy"],
         f"≥ {bar:.1f}: 60 seen through the flips", right["D, noisy"] >= bar),
        ("the same by gold labels, %", 50, right["D, gold"], "≥ 60", right["D, gold"] >= 60),
        ("RM0 right on the policy's samples at the same gold gap, %", right["SFT for shifted"], right["shifted"],
         "≥ 10 points lower", right["SFT for shifted"] - right["shifted"] >= 10),
        ("an RM freshly trained on gold labels of such samples, on those pairs, %", fresh["SFT for shifted"],
         fresh["shifted"], "≥ 5 points above RM0", fresh["shifted"] - right["shifted"] >= 5),
        *((what, before[key], after[key], "falls", after[key] < before[key]) for key, what in (
            ("J", "J of RM0"), ("variance, SD²", "variance of RM0's reward difference, SD²"),
            ("ratio", "that variance over the gold difference's"))),
        ("RM0's reward of the policy, SD above SFT", sft["RM"], last["RM"], "goes up", last["RM"] > sft["RM"]),
        ("gold reward of the policy, SD above SFT (before: after round 1)", first["gold"] if end != "ppo-1" else np.nan,
         last["gold"], "stalls or turns: gains at most 0.1 from the first round to the last while RM0's reward goes up",
         last["gold"] - first["gold"] <= 0.1 and last["RM"] > first["RM"]),
        ("mean length, words", sft["words"], last["words"], "at least half", last["words"] >= sft["words"] / 2),
        ("distinct responses, share", sft["distinct"], last["distinct"], "≥ 0.5", last["distinct"] >= 0.5))
    return {what: {"before": a, "after": b, "criterion": criterion, "there?": None if np.isnan([a, b]).any() else
                   "yes" if holds else "**no**"} for what, a, b, criterion, holds in rows}


def show(x) -> str:
    if isinstance(x, dict):
        return " / ".join(f"{x[side]:.0f}" for side in ("win", "tie", "lose"))
    if x is None or x != x:
        return "–"
    return x if isinstance(x, str) else f"{round(x, 3) + 0.0:.{1 + (abs(x) < 10) + (abs(x) < 1)}f}".replace("-", "−")


def table(rows: dict, group: str = "", corner: str = "") -> str:
    """{name of a row: {heading: figure}} -> markdown; with a `group`, of that part of each row."""
    rows = {title(name): row[group] for name, row in rows.items() if row[group]} if group else rows
    headings = list(dict.fromkeys(heading for row in rows.values() for heading in row))
    lines = [[corner, *headings],
             *([name, *(show(row.get(heading)) for heading in headings)] for name, row in rows.items())]
    lines = [f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in line)} |\n" for line in lines]
    return "".join([lines[0], "|---" * (len(headings) + 1) + "|\n", *lines[1:]])


def report(results: dict, judge: str) -> str:
    """report.md from the figures alone: for somebody who has seen neither the code nor the paper."""
    signs, counts, policies, rms = (results[key] for key in ("illness", "prompts", "policies", "rms"))
    return f"""# What this run shows
A language model (**SFT**) answers people. A reward model, **RM0**, learns from pairs D of answers, and PPO moves the
policy to where RM0 likes it: away from what RM0 learned from, so that RM0 judges it worse. That is the illness.
**MetaRM** (Dou et al., arXiv 2405.00438) trains the RM anew each round on the same D, but takes each gradient at θ',
one small step after driving apart its rewards for fresh, unlabelled answers. Two controls get as many PPO steps: RM0
throughout, and a **reseeded RM**, plain, trained anew each round with another seed. PPO on RM0 seeks out RM0's own
mistakes, so *any* other RM judges its answers better: only what goes beyond the reseeded RM can be MetaRM's doing.

Gold is the judge: {judge}. {results["k"]} responses to each of {counts["test"]} test and {counts.get("ood", 0)} OOD
prompts. SD: the standard deviation on SFT samples, of gold for gold and of each RM for that RM, as an RM that doubles
its rewards has learned nothing. Gaps below {results["tie"]} SD are ties. **One seed, and one seed proves nothing.**

## 1. Is the illness there?
RM0 and its policy before PPO (SFT samples) and after it; –: it cannot be told. *Same gold gap*: as a policy narrows,
its answers differ less in truth too, and are harder to tell apart for any RM.

{table(signs)}
![reward difference over PPO](figures/fig1_reward_difference.png)
![promised and gold reward over KL](figures/gold_over_kl.png)

## 2. The policies (the paper's Tables 1 to 3)
Win / tie / lose in % by gold, response against response; other arms: the policy of the same round.

{table(policies, "against")}
RM: the reward by the RM behind the policy (RM0 for SFT and DPO), SD above SFT, as gold. KL to SFT: nats a response.
Distinct: share of different texts. Self-BLEU (n = 2..5, among the responses to one prompt): lower is more diverse.

{table(policies, "figures")}
## 3. The reward models
% right. D: {counts["pairs"]} held-out pairs, by noisy labels (ceiling {show(results["ceiling"])}) and by gold. Shifted:
*{title(results["last"]["ppo"])}*, one set for all RMs, of RM0's own mistakes; OOD: the same to OOD prompts; both beside
SFT samples at the same gold gaps, and raw. θ': the RM after one more climb of J.

{table(rms, "accuracy")}
How far apart they hold two shifted responses: J (Eq. 2), the mean gap (absolute r - r'), the variance of r - r', that
of gold, and their ratio. ρ: rank correlation with gold within a prompt.

{table(rms, "shifted")}
![accuracy over the epoch](figures/fig4_rm_accuracy.png)
![reward differences](figures/fig5_reward_difference_distribution.png)

{when_to_stop(results)}
## 5. Five test prompts: the first of the file, each policy's first response, RM and gold in SD above SFT's mean

""" + "\n".join(table(rows, corner=prompt) for prompt, rows in results["examples"])


def when_to_stop(results: dict) -> str:
    """The report's advice to somebody without a gold reward."""
    (signal, sign, threshold), last = STOP, results["stop after round"]
    here = f"here: **stop after round {last}**" if last else "here it cannot be told"
    return f"""## 4. When to stop the rounds, if there is no gold reward
What can be seen without labels after each round of MetaRM: KL to SFT; on fresh samples of its policy, how far apart its RM
holds them and how often the RM before it orders two of them the other way round; accuracy on D. The rule that did best on
the tuning seeds of docs/study: go on while *{signal}* is at {'least' if sign == '+' else 'most'} {threshold:g}; {here}.
How it and others fared on the held-back seeds stands there, and that a threshold of KL is one of the task: on the second
task there it was 2.6 nats. A threshold on the spread (*variance*) carried over better.

{table({title(name): row for name, row in results["signals"].items()}, corner="round")}"""


def figures(results: dict, folder: Path) -> None:
    """The four pictures. Headings and legends say what this run's numbers say; an arm has one colour throughout."""
    from matplotlib import figure, rcParams
    rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    rm0, last, shifted = results["rms"]["rm0"], results["last"], results["last"]["ppo"]

    def draw(name, heading, lines, **labels):
        page = figure.Figure((9, 4), layout="tight")
        axes = page.subplots()
        for x, y, of, style, label in lines:
            axes.plot(x, y, style, color=COLOURS[of], label=label, lw=2.2)
        axes.set_title(heading, loc="left")
        axes.set(**labels)
        axes.legend(*axes.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5))  # beside the data
        page.savefig(folder / f"{name}.tmp", dpi=150, format="png")
        (folder / f"{name}.tmp").replace(folder / f"{name}.png")

    def steps(arm, key):  # a figure of all PPO steps of an arm, round after round
        return np.array([x for name, curve in results["curves"].items() if arm_of(name)[0] == arm for x in curve[key]])

    # Figure 1 of the paper: RM0 holds its policy's answers less and less apart. Do they differ less in truth, too?
    lines = []
    for of, key, style in (("rm0", "variance by RM", "-"), ("gold", "variance by gold", "--")):
        y = steps("ppo", key)  # drawn as means of up to 9 steps, since a step has few rollouts
        y = [y[i - min(4, i):i + min(4, i) + 1].mean() for i in range(len(y))]
        lines.append((range(len(y)), y, of, style, f"by {NAMES[of]}"))
    ends = [show(rm0[on][by]) for by in ("variance, SD²", "variance of gold") for on in ("sft", "shifted")]
    draw("fig1_reward_difference", "Variance of the difference of two answers: {} → {} by RM0, {} → {} by gold"
         .format(*ends), lines, xlabel="PPO step", ylabel="variance of the reward difference, SD²", ylim=(0, None))
    # Gao et al. 2022: what the policy pays in KL, what the RM in use promises for it, and what it gets
    lines, end = [], results["policies"][shifted]["figures"]
    for key, style, judge in (("RM", "-", "its RM"), ("gold", "--", "gold")):
        for arm in last:
            bins = np.floor(8 * steps(arm, "KL") / steps(arm, "KL").max(initial=1))
            x, y = ([steps(arm, what)[bins == b].mean() for b in np.unique(bins)] for what in ("KL", key))
            lines.append((x, y, arm, style, f"{NAMES[arm]}, by {judge}"))
    draw("gold_over_kl", f"After PPO, RM0 promises {end['RM']:.2f} SD more than SFT; gold gives {end['gold']:.2f} SD",
         lines, xlabel="KL to the SFT policy, nats a response", ylabel="mean reward, SD above SFT")
    # Figure 4: what does the meta step cost in accuracy on D?
    lines = [(*np.array(points).T, arm_of(name)[0], {1: ":", 2: "--"}.get(arm_of(name)[1], "-"), title(name))
             for name, points in results["epochs"].items() if points]
    apart = np.ptp([y[-1] for _, y, *_ in lines] or [0])
    draw("fig4_rm_accuracy", f"After one epoch on D, the RMs lie within {apart:.1f} points of each other",
         lines, xlabel="training step", ylabel=f"right on {results['prompts']['pairs']} held-out pairs of D, %")
    # Figure 5: who holds the shifted policy's answers further apart, each on the scale of its own rewards?
    rms = {name: results["rms"][name] for name in dict.fromkeys(map(trainer_of, last.values()))}
    draw("fig5_reward_difference_distribution", f"How far apart the RMs hold two answers of {title(shifted)}", [
        (row["gaps"], 100 - 2 * np.arange(len(row["gaps"])), arm_of(name)[0], "-",
         f"{title(name)}\n(mean {show(row['shifted']['gap, SD'])})") for name, row in rms.items()], xlim=(0, None),
        ylim=(0, 100), xlabel="gap |r - r'| of two answers to one prompt, SD", ylabel="pairs further apart, %")


INSTRUCTIONS = """# How to judge
Each line of pairs.jsonl holds a prompt and two answers, by two models in random order. Which one is better: true, to
the point, harmless, no longer than it needs to be? Write verdicts.jsonl, one line for each id, like this:
{"id": "1-3fa2c9", "verdict": "1"}, with "1" for answer_1, "2" for answer_2, "tie" for neither.
"""


def compared(names: list[str], judge: str, gap: np.ndarray, tie: float = 0.0) -> dict:
    """{"win", "tie", "lose"} -> [percent, and its 95 % interval] by the judge's rewards, first minus second, (m, k).
    Wilson's interval (1927) for m trials: k answers to one prompt are no k trials, so k > 1 is on the safe side."""
    found, n, z2 = {}, len(gap), 1.96 ** 2
    for side, percent in win_tie_lose(gap, 0 * gap, tie).items():
        centre, half = percent / 100 + z2 / 2 / n, np.sqrt(z2 * (percent * (100 - percent) / 1e4 + z2 / 4 / n) / n)
        found[side] = [percent, *(float(100 * x / (1 + z2 / n)) for x in (centre - half, centre + half))]
    print(f"eval.py: {names[0]} against {names[1]} by {judge}: " + ", ".join(
        f"{side} {x:.1f} % [{low:.1f}, {high:.1f}]" for side, (x, low, high) in found.items()))
    return found


def compare(config: "EvalConfig") -> None:
    """Two policies on the same prompts, judged by an RM, or written out for a judge who must not know their names."""
    names = config.policies.split(",")
    if len(names) != 2:
        raise ValueError(f"--policies {config.policies}: two folders or hub names are needed, as A,B")
    vars(config).update({"policies A": names[0], "policies B": names[1]})  # for data.stage: what they hold counts
    with data.stage("eval.py", config, ["prompts", "judge", "policies A", "policies B"], ("out", "policies")) as work:
        if work is None:
            return
        judge = config.judge and rm.load_reward_model(config.judge)  # first: a wrong folder is found at once,
        for name in names:
            ppo.load_policy(name)  # and not when the other policy has been sampled
        prompts, pairs, sides, coin = data.read_prompts(config.prompts), [], {}, np.random.default_rng(config.seed)
        groups = [sampled(config, name, prompts, work) for name in names]
        if judge:
            rewards = np.array([scored(config, judge, prompts, group) for group in groups])
            found = compared(names, config.judge, rewards[0] - rewards[1], config.tie * rewards.std())
            return data.write_jsonl(work / "results.json", [{"policies": names, "judge": config.judge, **found}])
        for prompt, *both in zip(prompts, *groups):
            for answers in zip(*both):
                side = int(coin.integers(2))  # answer_1 is the first policy's: 0, the second's: 1
                pair = {"prompt": prompt, "answer_1": answers[side], "answer_2": answers[1 - side]}
                id = f"{len(pairs) + 1}-{hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:6]}"
                pairs.append({"id": id, **pair})
                sides[id] = side
        data.write_jsonl(work / "pairs.jsonl", pairs)
        data.write_jsonl(work / "key.json", [{"policies": names, "prompts": len(prompts), "answer_1": sides}])
        data.write_text(work / "INSTRUCTIONS.md", INSTRUCTIONS)
        print(f"eval.py: {config.out}: {len(pairs)} pairs; a judge gets pairs.jsonl and INSTRUCTIONS.md, nothing else")


def unblind(config: "EvalConfig") -> dict:
    """Verdicts on blinded pairs back to win/tie/lose of the key's first policy. Each id needs just one."""
    key, seen, values = data.read_json(Path(config.key)), {}, {"1": 1, "2": -1, "tie": 0}
    if not isinstance(key, dict) or key.keys() != {"policies", "prompts", "answer_1"}:
        raise ValueError(f"--key {config.key}: not a key.json that eval.py --blind wrote")
    for number, row in data.read_lines(config.verdicts):
        id, verdict = str(row.get("id")), str(row.get("verdict"))
        wrong = (f"is not in {config.key}" if id not in key["answer_1"] else
                 f"has a verdict already, in line {seen[id][0]}" if id in seen else
                 f'needs the verdict "1", "2" or "tie", not "{verdict}"' if verdict not in values else "")
        if wrong:
            raise ValueError(f'{config.verdicts}, line {number}: id "{id}" {wrong}')
        seen[id] = number, values[verdict] * (1 - 2 * key["answer_1"][id])
    for id in key["answer_1"]:
        if id not in seen:
            raise ValueError(f'{config.verdicts}, up to line {number}: id "{id}" has no verdict')
    gaps = np.array([seen[id][1] for id in key["answer_1"]]).reshape(key["prompts"], -1)
    return compared(key["policies"], f"the verdicts in {config.verdicts}", gaps)


# ---------------------------------------------------------------------------------------------------------- plumbing

@dataclass
class EvalConfig:
    run: str = field(default="", metadata={"help": "report on this folder of a run, as run.sh lays it out"})
    runs: str = field(default="", metadata={"help": "print one table over these runs, A,B,C: the seeds of one setting"})
    judge: str = field(default="", metadata={"help": "the reward model that judges --policies or --run"})
    blind: bool = field(default=False, metadata={"help": "write answers of --policies as pairs without names"})
    policies: str = field(default="", metadata={"help": "two policies (folders or hub names), A,B"})
    prompts: str = field(default="", metadata={"help": ".jsonl with a `prompt` a row"})
    out: str = field(default="", metadata={"help": "folder to write a comparison to"})
    verdicts: str = field(default="", metadata={"help": "the verdicts on such pairs, to read back"})
    key: str = field(default="", metadata={"help": "the key.json of the pairs"})
    seed: int = field(default=0, metadata={"help": "of the sampling, the same for each policy, and of the sides"})
    k: int = field(default=5, metadata={"help": "responses a prompt"})
    temperature: float = field(default=1.0, metadata={"help": "divides the logits"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus to sample from (paper: 0.9)"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "of the sampling (paper: 1.1)"})
    max_new_tokens: int = field(default=48, metadata={"help": "longest response, in tokens"})
    batch_size: int = field(default=640, metadata={"help": "responses sampled or scored at once"})
    tie: float = field(default=0.25, metadata={"help": "gaps under this are ties; in SDs of the judge's rewards"})


def sampled(config: EvalConfig, policy: str, prompts: list[str], folder: Path) -> list[list[str]]:
    """k responses to each prompt, kept in a file of `folder`, so that a cut-off costs one policy's samples."""
    options = {name: getattr(config, name) for name in (
        "seed", "k", "temperature", "top_p", "repetition_penalty", "max_new_tokens", "batch_size")}
    made_from = json.dumps([data.fingerprint(policy), prompts, options]).encode()
    path = folder / f"{'-'.join(Path(policy).parts[-2:])}-{hashlib.sha256(made_from).hexdigest()[:12]}.jsonl"
    if not path.exists():
        model, tokenizer = ppo.load_policy(policy)
        groups = ppo.sample_responses(model.to(rm.pick_device()), tokenizer, prompts, **options)
        data.write_jsonl(path, [{"prompt": prompt, "responses": group} for prompt, group in zip(prompts, groups)])
    return [row["responses"] for row in data.read_jsonl(path)]


def scored(config: EvalConfig, judge: tuple, prompts: list[str], groups: list[list[str]]) -> np.ndarray:
    """Rewards (m, k) of k responses to each of m prompts, by a loaded (reward model, tokenizer)."""
    prompts, texts = [x for x, group in zip(prompts, groups) for _ in group], sum(groups, [])
    rewards = rm.score(judge[0].to(rm.pick_device()), judge[1], prompts, texts, config.batch_size)
    return rewards.double().reshape(len(groups), -1).numpy()


def look(config: EvalConfig, policies: dict[str, Path], models: dict[str, Path]) -> dict:
    """What `measure` takes: samples each policy (kept in RUN/eval), scores by each RM, reads the logs of the run."""
    from tqdm import tqdm
    run, last = Path(config.run), last_rounds(policies)
    (run / "eval").mkdir(exist_ok=True)
    files = {domain: run / "data" / f"prompts-{domain}.jsonl" for domain in ("test", "ood")}
    prompts = {domain: data.read_prompts(path) for domain, path in files.items() if domain == "test" or path.exists()}
    pairs = data.read_preferences(run / ("pairs" if (run / "pairs").exists() else "data") / "valid.jsonl")
    responses = {("D", "pairs"): [[row["chosen"], row["rejected"]] for row in pairs]}
    for policy, folder in tqdm(policies.items(), desc="eval: sampling", mininterval=1):
        asked = prompts if policy in ("sft", *last.values()) else {"test": prompts["test"]}
        groups = iter(sampled(config, str(folder), sum(asked.values(), []), run / "eval"))
        responses |= {(policy, domain): [next(groups) for _ in texts] for domain, texts in asked.items()}
    prompts["pairs"] = [row["prompt"] for row in pairs]
    judge = config.judge and rm.load_reward_model(config.judge)

    def gold(prompts, groups):
        return scored(config, judge, prompts, groups) if judge else np.array(
            [[data.gold_reward(x, text) for text in group] for x, group in zip(prompts, groups)])

    scores = {("gold", *key): gold(prompts[key[1]], groups) for key, groups in responses.items()}
    for name, folder in tqdm(models.items(), desc="eval: scoring", mininterval=1):
        model = rm.load_reward_model(str(folder))
        scores |= {(name, policy, domain): scored(config, model, prompts[domain], groups)
                   for (policy, domain), groups in responses.items() if domain == "pairs" or policy == last["ppo"]
                   or domain == "test" and (policy == "sft" or trainer_of(policy) == name
                                            or arm_of(policy)[0] == "metarm" and before(policy) == name)}
    rollouts = {name: [{"KL": row["kl"], "RM": np.array(row["scores"]), "gold": gold(row["prompts"], row["responses"])}
                       for row in data.read_jsonl(path / "rollouts.jsonl")]
                for name, path in policies.items() if (path / "rollouts.jsonl").exists()}
    epochs = {name: [[row["step"], 100 * row["accuracy"]] for row in data.read_jsonl(path / "log.jsonl")
                     if "accuracy" in row]
              for name, path in models.items() if name != "oracle" and (path / "log.jsonl").exists()}
    return {"prompts": prompts, "responses": responses, "scores": scores, "rollouts": rollouts, "epochs": epochs}


def evaluate(config: EvalConfig) -> None:
    """The report on a run. results.json comes last: it vouches for the report and the pictures."""
    run, rounds = Path(config.run), [f"{arm}-{r}" for arm in RL_ARMS for r in range(1, 100)]
    if config.k < 2:
        raise ValueError(f"--k {config.k}: a difference between responses needs at least 2 of them")
    policies = {"sft": run / "sft", "dpo": run / "dpo", **{name: run / name / "policy" for name in rounds}}
    models = {"rm0": run / "rm0", **{f"{name}{what}": run / name / part for name in rounds for what, part in (
        ("", "rm"), (" adapted", "adapted"))}, "oracle": run / "oracle" / "rm"}
    policies, models = ({name: path for name, path in every.items() if path.is_dir()} for every in (policies, models))
    for name, there in (("sft", policies), ("ppo-1", policies), *((trainer_of(policy), models) for policy in policies)):
        if name not in there:
            raise ValueError(f"--run {run}: {name} lacks its policy or reward model; finish the run first: bash run.sh")
    inputs = [*policies.values(), *models.values(), run / "data", run / "pairs", config.judge, __file__, data.__file__]
    stage = [{**asdict(config), "run": None, "judge": None}, *(data.fingerprint(str(path)) for path in inputs)]
    with data.locked(str(run / "eval.lock")):
        if (data.read_json(run / "results.json") or {}).get("stage") == stage:
            return print(f"eval.py: {run / 'report.md'} is up to date, with the same options and inputs: skipped")
        found = measure(**look(config, policies, models), tie=config.tie)
        (run / "results.json").unlink(missing_ok=True)
        (run / "figures").mkdir(exist_ok=True)
        figures(found, run / "figures")
        data.write_text(run / "report.md", report(found, config.judge or "rules that no model was shown"))
        # JSON's own types, 6 digits, NaN as null, no "-0.0": one seed, the same bytes
        tidy = json.loads(json.dumps({**found, "stage": stage}, default=lambda x: x.item()),
                          parse_constant=lambda _: None, parse_float=lambda digits: round(float(digits), 6) + 0.0)
        data.write_text(run / "results.json", json.dumps(tidy, indent=1, ensure_ascii=False) + "\n")
    signs = [sign["there?"] for sign in found["illness"].values()]
    print(f"eval.py: {run / 'report.md'}: {signs.count('yes')} of {len(signs)} signs of the illness (one seed)")


def summarise(config: EvalConfig) -> None:
    """One table over the runs of several seeds: mean and, after it, the SD over the seeds. Printed, to be pasted."""
    runs = {folder: data.read_json(Path(folder) / "results.json") for folder in config.runs.split(",")}
    for folder, found in runs.items():
        if not found:
            raise ValueError(f"--runs {folder}: no results.json there; finish that run first")

    def cell(*path, digits=2):  # over the runs that have it; of a win / tie / lose, the wins less the losses
        found = [reduce(lambda part, key: (part or {}).get(key), path, results) for results in runs.values()]
        values = [x["win"] - x["lose"] if isinstance(x, dict) else x for x in found if x is not None]
        sd = np.std(values, ddof=1) if len(values) > 1 else 0
        return f"{np.mean(values):.{digits}f} ± {sd:.{digits}f}" if values else "–"

    first, seeds = next(iter(runs.values())), len(runs)
    signs = {sign: {"before": cell("illness", sign, "before"), "after": cell("illness", sign, "after"),
                    f"there, of {seeds}": str(sum(found["illness"][sign]["there?"] == "yes" for found in runs.values()))}
             for sign in first["illness"]}
    columns = {  # heading: where the figure is, and its digits
        "policies": {"RM, SD above SFT": ("figures", "RM", 2), "gold, SD above SFT": ("figures", "gold", 2),
                     "win − lose against SFT": ("against", "SFT", 1), "PPO on RM0": ("against", "PPO on RM0", 1),
                     "DPO": ("against", "DPO", 1), "KL, nats": ("figures", "KL", 2),
                     "Self-BLEU": ("figures", "Self-BLEU", 2)},
        "rms": {"D, noisy, %": ("accuracy", "D, noisy", 1), "D, gold, %": ("accuracy", "D, gold", 1),
                "SFT, %": ("accuracy", "SFT for shifted", 1), "shifted, %": ("accuracy", "shifted", 1),
                "OOD, %": ("accuracy", "OOD", 1), "J, shifted": ("shifted", "J", 3),
                "gap, shifted, SD": ("shifted", "gap, SD", 2)}}
    print(f"Over {seeds} seeds ({config.runs}), mean ± SD.\n\n{table(signs, corner='the illness')}", end="")
    for part, corner in (("policies", "policy"), ("rms", "RM")):
        rows = {title(name): {heading: cell(part, name, group, key, digits=digits)
                              for heading, (group, key, digits) in columns[part].items()} for name in first[part]}
        print(f"\n{table(rows, corner=corner)}", end="")


def choose(config: EvalConfig) -> None:
    ways = {"--run": evaluate, "--run --judge": evaluate, "--runs": summarise, "--judge --policies --prompts --out": compare,
            "--blind --policies --prompts --out": compare, "--verdicts --key": unblind}
    given = [f"--{name}" for name, value in asdict(config).items() if isinstance(value, (str, bool)) and value]
    for way, body in ways.items():
        if sorted(given) == sorted(way.split()):
            return body(config)
    raise ValueError(f"{' '.join(given) or 'no flag'} given, but these belong together: {'; or '.join(ways)}")


def main(argv: list[str] | None = None) -> int:
    return data.command("eval.py", EvalConfig, choose, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
