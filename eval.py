"""The report on a run, with the toy world's gold reward as the judge; and two policies before any other judge.

Concept: in the toy world the truth is known, so each claim of the paper becomes a number. First come the measures:
arrays in, numbers out, no model in sight; then the figures, the report and the pictures; sampling and scoring last.

    python eval.py --run runs/toy --seed 0

samples k responses of each policy of the run to the test and OOD prompts (kept in RUN/eval: a cut-off costs little),
scores them by the reward models, and writes RUN/figures/*.png, report.md and, last, results.json. For any two
policies and any prompts, judged by a reward model; or by a human or an LLM, who sees pairs of answers without names:

    python eval.py --judge RM --policies A,B --prompts FILE --out DIR
    python eval.py --blind    --policies A,B --prompts FILE --out DIR
    python eval.py --verdicts verdicts.jsonl --key DIR/key.json
"""

import hashlib
import json
import os
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

import data
import metarm
import ppo
import rm

# ------------------------------------------------------------------- measures: does an RM put responses in order?
# Shapes throughout: m prompts, k responses each; rewards and gold are (m, k). Only responses to ONE prompt are ever
# compared: preference pairs and J see nothing else.


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
    """Pair accuracy on two sets AT THE SAME GOLD GAP: {"first", "second", "first_pairs", "second_pairs"}.

    `first` and `second` are (rewards, gold); `edges` bound the bins of |gold gap|, the lowest being the tie. As a
    policy narrows, its responses differ less in truth too, and pairs get harder for ANY reward model: raw accuracy
    falls without the RM being any worse. So accuracy is taken bin by bin, and both sets averaged with one set of
    weights: the first's shares, over the bins where both have `minimum` pairs (NaN: no such bin)."""
    gaps = [[x[gap[1] != 0] for x in gap] for gap in (reward_gaps(*first), reward_gaps(*second))]
    pairs = [np.histogram(np.abs(gold_gap), edges)[0] for _, gold_gap in gaps]
    right = [np.histogram(np.abs(gold_gap), edges, weights=agreement(gap, gold_gap))[0] for gap, gold_gap in gaps]
    shared = np.minimum(*pairs) >= max(minimum, 1)
    weights = pairs[0][shared] / max(pairs[0][shared].sum(), 1)
    accuracy = [float(weights @ (x / np.maximum(n, 1))[shared]) if shared.any() else float("nan")
                for x, n in zip(right, pairs)]
    return {"first": accuracy[0], "second": accuracy[1],
            "first_pairs": int(pairs[0][shared].sum()), "second_pairs": int(pairs[1][shared].sum())}


def rank_correlation(rewards: np.ndarray, gold: np.ndarray) -> tuple[float, int]:
    """(mean Spearman correlation within a prompt, prompts used); where a side is constant there is none."""
    # sum_j sign(x_i - x_j) is twice the rank of x_i, ties averaged, less the mean rank: all that Pearson needs
    a, b = (np.sign(np.asarray(x)[..., :, None] - np.asarray(x)[..., None, :]).sum(-1) for x in (rewards, gold))
    length = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    used = length > 0
    return (float(((a * b).sum(-1)[used] / length[used]).mean()) if used.any() else float("nan")), int(used.sum())


# ------------------------------------------------------------- measures: how far apart does an RM hold responses?

def spread(rewards: np.ndarray, scale: float = 1.0) -> dict:
    """{"J", "margin", "variance"} of rewards / scale, (m, k): Eq. 2; the mean |r_i - r_j|; and the mean (r_i - r_j)^2,
    the variance of the difference of two responses in random order (paper, Figure 1).

    An RM that merely doubles its rewards raises all three and has learned nothing, and PPO, which rescales rewards,
    cannot see it. Hence `scale`: the SD of the same RM's rewards on SFT samples."""
    rewards = np.asarray(rewards, float) / scale
    gap, _ = reward_gaps(rewards, rewards)
    return {"J": float(metarm.difference_loss(torch.as_tensor(rewards))), "margin": float(np.abs(gap).mean()),
            "variance": float((gap ** 2).mean())}


# -------------------------------------------------------------------------------------- measures: policies and text

def win_tie_lose(ours: np.ndarray, theirs: np.ndarray, tie: float) -> dict:
    """Percent {"win", "tie", "lose"} by the judge's rewards, two arrays of one shape: entry i of ours meets entry i
    of theirs, to the same prompt. A tie is a difference below `tie`, or none."""
    gap = np.asarray(ours, float) - np.asarray(theirs, float)
    tied = (np.abs(gap) < tie) | (gap == 0)
    return {"win": 100 * float((~tied & (gap > 0)).mean()), "tie": 100 * float(tied.mean()),
            "lose": 100 * float((~tied & (gap < 0)).mean())}


def bleu(hypothesis: list[str], references: list[list[str]], longest: int = 5) -> list[float]:
    """BLEU-1 .. BLEU-longest of a list of words against others (Papineni et al. 2002), each between 0 and 1.

    Smoothed: an order without any match counts as 0.1 matches (method 1 of Chen & Cherry 2014, as in Texygen's
    Self-BLEU), or one missing 5-gram would make the score 0. Orders longer than the hypothesis do not count."""
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
    """Each of a prompt's k responses against the k-1 others, averaged over n = 2..5, responses and prompts. 1: all
    say the same. Lower is more diverse (paper, Table 3; Zhu et al. 2018)."""
    words = [[text.split() for text in group] for group in responses]
    return float(np.mean([bleu(group[i], group[:i] + group[i + 1:])[1:] for group in words for i in range(len(group))]))


def distinct_share(responses: list[list[str]]) -> float:
    """Different texts among all responses to all prompts; a policy with one answer for all has 1/(m·k)."""
    texts = [text for group in responses for text in group]
    return len(set(texts)) / len(texts)


def mean_words(responses: list[list[str]]) -> float:
    return float(np.mean([len(text.split()) for group in responses for text in group]))


# ------------------------------------------------------------------------------------ from what was seen to figures

RL_ARMS = ("ppo", "reseeded", "metarm")  # ARM-r: an arm's policy of round r, and the RM behind it (ppo: rm0)
NAMES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO on RM0", "reseeded": "reseeded RM", "metarm": "MetaRM", "rm0": "RM0",
         "oracle": "gold-label RM", "gold": "gold reward"}
COLOURS = {"ppo": "#0072B2", "rm0": "#0072B2", "reseeded": "#009E73", "metarm": "#D55E00", "gold": "#000000"}  # Okabe-Ito
GAP_EDGES = (0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, np.inf)  # bins of |gold gap|, in SDs


@dataclass
class Seen:
    """All that the figures rest on. A policy is a name, a domain "test" or "ood", a judge an RM's name or "gold"."""
    prompts: dict    # domain -> m texts
    responses: dict  # (policy, domain) -> m lists of k texts
    scores: dict     # (judge, policy, domain) -> (m, k) rewards; (judge, "D", "pairs"): of chosen and rejected, (n, 2)
    rollouts: dict   # policy -> its PPO steps, [{"step", "kl", "scores" (b, g), "gold" (b, g)}]
    epochs: dict     # rm -> [[training step, % right on the held-out pairs of D]]


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


def measure(seen: Seen, tie: float = 0.25) -> dict:
    """All figures of the report, plain numbers by name; `tie` in SDs of gold on SFT samples."""
    policies = [policy for policy, domain in seen.responses if domain == "test"]
    last, curves, rows = last_rounds(policies), {}, {}

    def in_sd(judge, rewards):  # how many SDs above the judge's mean on SFT samples
        on_sft = seen.scores[judge, "sft", "test"]
        return (np.asarray(rewards) - on_sft.mean()) / (on_sft.std() or 1.0)

    z = {key: in_sd(key[0], rewards) for key, rewards in seen.scores.items()}
    for policy, steps in seen.rollouts.items():
        curves[policy] = {name: [step[name] for step in steps] for name in ("step", "kl")}
        for name, judge, key in (("proxy", trainer_of(policy), "scores"), ("gold", "gold", "gold")):
            rewards = [in_sd(judge, step[key]) for step in steps]
            curves[policy] |= {name: [x.mean() for x in rewards], f"{name}_variance": [
                spread(x)["variance"] if x.shape[1] > 1 else np.nan for x in rewards]}
    for policy in policies:
        texts, rivals = seen.responses[policy, "test"], [  # SFT, DPO, and the other arms' policies of the same round
            rival for rival in policies if rival != policy and arm_of(rival)[1] in (0, arm_of(policy)[1])]
        rows[policy] = {
            "proxy": z[trainer_of(policy), policy, "test"].mean(), "gold": z["gold", policy, "test"].mean(),
            "kl": np.mean(curves[policy]["kl"][-5:]) if policy in curves else None, "words": mean_words(texts),
            "distinct": distinct_share(texts), "self_bleu": self_bleu(texts), "against": {
                arm_of(rival)[0]: {domain: win_tie_lose(z["gold", policy, domain], z["gold", rival, domain], tie)
                                   for domain in seen.prompts if {(policy, domain), (rival, domain)} <= seen.responses.keys()}
                for rival in rivals}}
    examples = [{"prompt": prompt, "answers": [
        {"policy": policy, "text": seen.responses[policy, "test"][i][0], "proxy": z[trainer_of(policy), policy, "test"][i, 0],
         "gold": z["gold", policy, "test"][i, 0]} for policy in policies if policy in ("sft", "dpo", *last.values())]}
        for i, prompt in enumerate(seen.prompts["test"][:5])]
    labels = seen.scores["gold", "D", "pairs"] @ [1, -1]
    results = {"prompts": {domain: len(texts) for domain, texts in seen.prompts.items()}, "last": last, "tie": tie,
               "k": z["gold", "sft", "test"].shape[1], "gold_sd": seen.scores["gold", "sft", "test"].std(),
               "pairs": len(labels), "ceiling": agreement(labels, 1).mean(), "policies": rows, "curves": curves,
               "epochs": seen.epochs, "examples": examples,
               "rms": {name: measure_rm(seen.scores, z, name, last["ppo"], tie)
                       for name, policy, _ in z if policy == "D" and name != "gold"}}
    return {**results, "illness": illness(results)}


def measure_rm(raw: dict, z: dict, name: str, shifted: str, tie: float) -> dict:
    """One RM: accuracy and spread on D, on SFT samples, on the common shifted set (vanilla PPO's samples) and on its
    like for OOD prompts. `raw` holds the rewards, `z` the same in SDs."""
    margins, truth = (raw[judge, "D", "pairs"] @ [1, -1] for judge in (name, "gold"))
    sft, edges = (z[name, "sft", "test"], z["gold", "sft", "test"]), [tie, *(edge for edge in GAP_EDGES if edge > tie)]
    row = {"d_noisy": agreement(margins, 1).mean(), "d_gold": agreement(margins, truth)[truth != 0].mean(),
           "sft": pair_accuracy(*sft, tie)[0]}
    for column, domain in (("shifted", "test"), ("ood", "ood")):
        pair = z[name, shifted, domain], z["gold", shifted, domain]
        row[column] = {**matched_accuracy(sft, pair, edges), "raw": pair_accuracy(*pair, tie)[0]}
    for column, policy in (("sft", "sft"), ("shifted", shifted)):
        ours, gold = z[name, policy, "test"], z["gold", policy, "test"]
        apart = {"raw": spread(raw[name, policy, "test"]), "sd": spread(ours), "gold": spread(gold)}
        row |= {f"spread_{column}": apart, f"rank_{column}": rank_correlation(ours, gold)[0],
                f"relative_{column}": apart["sd"]["variance"] / (apart["gold"]["variance"] or np.nan)}
    return row


def dig(tree: dict, path: str):
    """tree["a"]["b"] for the path "a b", or None where the run lacks it or the figure is NaN (too few pairs)."""
    for key in path.split():
        tree = (tree or {}).get(key)
    return None if tree != tree else tree


def illness(results: dict) -> list[dict]:
    """What must be there before a cure is judged, a row each; "holds": True, False or None (cannot tell)."""
    rm0, oracle = dig(results, "rms rm0"), dig(results, "rms oracle")
    sft, first, end = (results["policies"][name] for name in ("sft", "ppo-1", results["last"]["ppo"]))
    least = 0.5 + 0.1 * (2 * results["ceiling"] - 1)  # what 60 % by gold comes to under the flips
    falls = ("falls", lambda a, b: b < a)
    rows = (  # what; before and after PPO; display scale; the criterion, in words and as a test
        ("RM0 on held-out pairs of D, % right by their noisy labels (before: chance)", 0.5, rm0["d_noisy"], 100,
         f"≥ {100 * least:.1f}: 60 seen through the flips", lambda a, b: b >= least),
        ("the same by gold labels, %", 0.5, rm0["d_gold"], 100, "≥ 60", lambda a, b: b >= 0.6),
        ("RM0 on the policy's samples at the same gold gap, % right", dig(rm0, "shifted first"),
         dig(rm0, "shifted second"), 100, "≥ 10 points lower", lambda a, b: a - b >= 0.1),
        ("an RM freshly trained on gold labels of such samples, on those pairs, % right", dig(oracle, "shifted first"),
         dig(oracle, "shifted second"), 100, "≥ 5 points above RM0", lambda a, b: b - rm0["shifted"]["second"] >= 0.05),
        ("J of RM0", dig(rm0, "spread_sft raw J"), dig(rm0, "spread_shifted raw J"), 1, *falls),
        ("variance of RM0's reward difference, SD²", dig(rm0, "spread_sft sd variance"),
         dig(rm0, "spread_shifted sd variance"), 1, *falls),
        ("that variance over the gold difference's", dig(rm0, "relative_sft"), dig(rm0, "relative_shifted"), 1, *falls),
        ("RM0's reward of the policy, SD above SFT", sft["proxy"], end["proxy"], 1, "goes up", lambda a, b: b > 0),
        ("gold reward of the policy, SD above SFT (before: after the first round)", None if first is end else
         first["gold"], end["gold"], 1, "stalls or turns: from the first to the last round it gains at most 0.1 while "
         f"RM0's reward goes up ({show(first['proxy'])} to {show(end['proxy'])})",
         lambda a, b: b - a <= 0.1 and end["proxy"] > first["proxy"]),
        ("mean length, words", sft["words"], end["words"], 1, "at least half", lambda a, b: b >= a / 2),
        ("distinct responses, %", sft["distinct"], end["distinct"], 100, "≥ 50", lambda a, b: b >= 0.5))
    return [{"what": what, "criterion": criterion, "before": a and scale * a, "after": b and scale * b,
             "holds": None if None in (a, b) else bool(test(a, b))} for what, a, b, scale, criterion, test in rows]


# -------------------------------------------------------------------------------------------------------- the report

# Columns of the tables: heading, where in a row the figure is, digits, scale
POLICIES = (("RM", "proxy", 2, 1), ("gold", "gold", 2, 1), ("KL", "kl", 1, 1), ("words", "words", 1, 1),
            ("distinct %", "distinct", 0, 100), ("Self-BLEU", "self_bleu", 2, 1))
ACCURACY = (("D, noisy", "d_noisy", 1, 100), ("D, gold", "d_gold", 1, 100), ("SFT", "sft", 1, 100),
            ("shifted", "shifted second", 1, 100), ("raw", "shifted raw", 1, 100), ("OOD", "ood second", 1, 100),
            ("raw", "ood raw", 1, 100), ("ρ", "rank_shifted", 2, 1))
SPREAD = (("J", "spread_shifted raw J", 3, 1), ("J, SD units", "spread_shifted sd J", 3, 1),
          ("mean difference", "spread_shifted raw margin", 3, 1), ("in SD", "spread_shifted sd margin", 3, 1),
          ("variance over gold's", "relative_shifted", 2, 1))


def show(x, digits: int = 2, scale: float = 1) -> str:
    return "–" if x is None or x != x else f"{round(scale * x, digits) + 0.0:.{digits}f}".replace("-", "−")


def title(name: str) -> str:
    arm, rounds = arm_of(name)
    return NAMES[arm] + (f", round {rounds}" if rounds else "") + (", θ'" if " adapted" in name else "")


def report(results: dict) -> str:
    """report.md from the figures alone: for somebody who has seen neither the code nor the paper."""
    policies, rms, last, signs, prompts = (results[key] for key in ("policies", "rms", "last", "illness", "prompts"))
    rounds, there = max(arm_of(name)[1] for name in last.values()), Counter(sign["holds"] for sign in signs)

    def table(header, rows):
        return "".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in line) + " |\n"
                       for line in (header, ["---"] * len(header), *rows))

    def figure_table(rows, columns):
        return table(["", *(heading for heading, *_ in columns)], [
            [title(name), *(show(dig(row, path), *how) for _, path, *how in columns)] for name, row in rows.items()])

    def versus(policy, rival, domain="test"):
        verdict = dig(policies, f"{policy} against {rival} {domain}")
        return " / ".join(show(verdict[side], 0) for side in ("win", "tie", "lose")) if verdict else "–"

    illness_table = table(["", "before", "after", "criterion", "there?"], [
        [sign["what"], *(show(x, 3 if x and abs(x) < 10 else 1) for x in (sign["before"], sign["after"])),
         sign["criterion"], {True: "yes", False: "**no**", None: "–"}[sign["holds"]]] for sign in signs])
    against_sft = table(["", *(f"round {r + 1}" for r in range(rounds))], [
        [NAMES[arm], *(versus(f"{arm}-{r + 1}", "sft") for r in range(rounds))] for arm in last])
    against_others = table(["", "SFT", "PPO on RM0", "DPO", "reseeded RM", "SFT, on OOD prompts"], [
        [title(name), *(versus(name, rival) for rival in ("sft", "ppo", "dpo", "reseeded")), versus(name, "sft", "ood")]
        for name in last.values()])
    examples = ["> " + example["prompt"].strip().replace("\n", "\n> ") + "\n\n" + table(
        ["", "response", "RM", "gold"], [[title(a["policy"]), a["text"].strip() or "*(empty)*", show(a["proxy"]),
                                          show(a["gold"])] for a in example["answers"]])
                for example in results["examples"]]
    return f"""# What this run shows

A small language model (**SFT**) answers customers at a help desk. A reward model, **RM0**, learns from pairs D of its
answers, and PPO moves the policy to where RM0 likes it: away from what RM0 learned from, so that RM0 judges it worse.
That is the illness. **MetaRM** (Dou et al., arXiv 2405.00438) trains the RM anew each round on the same D, but takes
each gradient at θ', one small step after driving apart its rewards for fresh, unlabelled answers. Two controls get as
many PPO steps: RM0 throughout, and a **reseeded RM**, plain, trained anew each round with another seed. A policy
trained on RM0 has sought out RM0's own mistakes, so *any* other RM judges its answers better: only what goes beyond the
reseeded RM can be MetaRM's doing. **This is one seed, and one seed proves nothing.**

The judge is the gold reward, rules that no model was shown, on {prompts["test"]} test prompts (OOD: {prompts["ood"]} on
other topics), {results["k"]} responses each. SD: the standard deviation on SFT samples, of gold for gold and of each RM
for that RM, as an RM that doubles its rewards has learned nothing. Gold gaps below {results["tie"]} SD are ties.

## 1. Is the illness there?

RM0 and its policy before PPO (SFT samples) and after it. Of {len(signs)} signs, {there[True]} are there, {there[False]}
are not, {there[None]} cannot be told. *At the same gold gap*: as a policy narrows, its answers differ less in truth too,
and are harder to tell apart for any RM.

{illness_table}
![reward difference over PPO](figures/fig1_reward_difference.png)
![promised and gold reward over KL](figures/gold_over_kl.png)

## 2. The policies (the paper's Tables 1 to 3)

Win / tie / lose in % by gold, response against response: each round against SFT; the last round against the others (PPO
and reseeded RM at the same round, after equally many PPO steps).

{against_sft}
{against_others}
RM: the reward by the RM behind the policy (RM0 for SFT and DPO), SD above SFT, like gold. KL to SFT: nats a response.
Distinct: different texts among all. Self-BLEU (n = 2..5, among the responses to one prompt): lower is more diverse.

{figure_table(policies, POLICIES)}
## 3. The reward models

Accuracy in %. D: {results["pairs"]} held-out pairs, by noisy labels (ceiling {show(results["ceiling"], 1, 100)}) and by gold.
Shifted: the samples of *{title(last["ppo"])}*, one set for all RMs, made of RM0's own mistakes. OOD: its samples to OOD
prompts. Both at the gold gaps of the SFT pairs; raw: without that. ρ: rank correlation with gold within a prompt. Then,
as ρ on the shifted set, how far apart the RMs hold two responses: J (Eq. 2), the mean |difference|, and the variance of
the difference over that of the gold difference. θ': the RM after one more climb of J.

{figure_table(rms, ACCURACY)}
{figure_table(rms, SPREAD)}
![accuracy over the epoch](figures/fig4_rm_accuracy.png)
![reward differences](figures/fig5_reward_difference_distribution.png)

## 4. Five test prompts

The first five of the file and each policy's first response, none picked. RM and gold: SD above SFT's mean.

""" + "\n".join(examples)


# ------------------------------------------------------------------------------------------------------ the pictures

def figures(results: dict, seen: Seen, folder: Path) -> None:
    """The four pictures. A heading says what this run's numbers say; an arm has one colour throughout."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    rms, last = results["rms"], results["last"]

    def draw(name, heading, lines, **labels):
        figure = Figure((9, 4), layout="tight")
        axes = figure.subplots()
        for x, y, of, style, label in lines:
            axes.plot(x, y, style, color=COLOURS[of], label=label, lw=2.2)
        axes.set_title(heading, loc="left", fontsize=12)
        axes.set(**labels)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the data, never on it
        figure.savefig(folder / f"{name}.tmp", dpi=150, format="png")
        os.replace(folder / f"{name}.tmp", folder / f"{name}.png")

    def steps(arm, key):  # a figure of all PPO steps of an arm, round after round
        return np.array([x for name, curve in results["curves"].items() if arm_of(name)[0] == arm for x in curve[key]])

    # Figure 1 of the paper: RM0 holds its policy's answers less and less apart. Do they differ less in truth, too?
    lines, width = [], 9
    for of, unit, key, style in (("rm0", "sd", "proxy_variance", "-"), ("gold", "gold", "gold_variance", "--")):
        y = [rms["rm0"]["spread_sft"][unit]["variance"], *steps("ppo", key)]  # running means: a step has few rollouts
        lines.append((range(len(y)), [np.mean(y[max(0, i - 4):i + 5]) for i in range(len(y))], of, style, f"by {NAMES[of]}"))
    ends = [show(rms["rm0"][f"spread_{on}"][unit]["variance"]) for unit in ("sd", "gold") for on in ("sft", "shifted")]
    draw("fig1_reward_difference", f"Over PPO, RM0's reward difference goes from {ends[0]} to {ends[1]} SD², "
         f"the gold one from {ends[2]} to {ends[3]}", lines, xlabel="PPO step", ylim=(0, None),
         ylabel="variance of the reward difference\nof two answers to one prompt, SD²")

    # Gao et al. 2022: what the policy pays in KL, what the RM in use promises for it, and what it gets
    lines, end = [], results["policies"][last["ppo"]]
    for key, style, what in (("proxy", "-", "by its RM"), ("gold", "--", "by gold")):
        for arm in last:
            kl, y = steps(arm, "kl"), steps(arm, key)
            bins = np.floor(8 * kl / max(1, *kl))
            x, y = ([values[bins == b].mean() for b in np.unique(bins)] for values in (kl, y))
            lines.append((x, y, arm, style, f"{NAMES[arm]}, {what}"))
    draw("gold_over_kl", f"RM0 promises {show(end['proxy'])} SD more than SFT, the gold reward gives {show(end['gold'])}",
         lines, xlabel="KL to the SFT policy, nats a response", ylabel="mean reward, SD above SFT")

    # Figure 4: what does the meta step cost in accuracy on D?
    lines = [(*np.array(points).T, arm_of(name)[0], {1: ":", 2: "--"}.get(arm_of(name)[1], "-"), title(name))
             for name, points in results["epochs"].items()]
    ends = [y[-1] for _, y, *_ in lines] or [np.nan]
    draw("fig4_rm_accuracy", f"After one epoch on D, the RMs lie within {show(np.ptp(ends), 1)} points of each other",
         lines, xlabel="training step", ylabel=f"accuracy on {results['pairs']} held-out pairs of D, %")

    # Figure 5: who holds the shifted policy's answers further apart, each on the scale of its own rewards?
    gaps = {name: np.abs(reward_gaps(*[seen.scores[name, last["ppo"], "test"]] * 2)[0]) / seen.scores[name, "sft", "test"].std()
            for name in dict.fromkeys(map(trainer_of, last.values()))}
    edges = np.linspace(0, max(1e-6, *(np.quantile(x, 0.99) for x in gaps.values())), 13)
    draw("fig5_reward_difference_distribution", "Mean |reward difference|: " + ", ".join(
        f"{title(name)} {show(x.mean())} SD" for name, x in gaps.items()), [
        ((edges[1:] + edges[:-1]) / 2, 100 * np.histogram(x, edges)[0] / len(x), arm_of(name)[0], "-", title(name))
        for name, x in gaps.items()], ylim=(0, None), ylabel="share of pairs of answers, %",
        xlabel=f"|reward difference| of two answers of {title(last['ppo'])}, SD")


# ------------------------------------------------------------------------------------ two policies, any other judge

INSTRUCTIONS = """# How to judge

Each line of pairs.jsonl holds a prompt and two answers to it, by two models in random order. Decide which answer serves
the person better: it does what is asked, is true, harms nobody and wastes no words. Neither place nor length is merit.
Write verdicts.jsonl, one line for each id, none left out and none twice, like {"id": "1-3fa2c9", "verdict": "1"}
with "1" if answer_1 is better, "2" if answer_2 is, "tie" if neither is. (The judge must see no other file.)
"""


def compared(names: list[str], judge: str, gap: np.ndarray, tie: float = 0.0) -> dict:
    """{"win", "tie", "lose"} -> [percent, and its 95 % interval] by the judge's rewards, first minus second, (m, k).

    Wilson's interval (1927), of use at 0 and 100 % too. k answers to one prompt are no k independent trials, so it
    counts the m prompts: right for k = 1, on the safe side for more."""
    found, n, z2 = {}, len(gap), 1.96 ** 2
    for side, share in win_tie_lose(gap, 0 * gap, tie).items():
        p = share / 100
        centre, half = p + z2 / (2 * n), np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
        found[side] = [share, *(float(100 * (centre + s * half) / (1 + z2 / n)) for s in (-1, 1))]
    print(f"eval.py: {names[0]} against {names[1]} by {judge}: " + ", ".join(
        f"{side} {x:.1f} % [{low:.1f}, {high:.1f}]" for side, (x, low, high) in found.items()))
    return found


def compare(config: "EvalConfig") -> None:
    """Two policies on the same prompts: judged by a reward model, or written out for a judge who must not know whose
    answer is whose."""
    names = config.policies.split(",")
    if len(names) != 2:
        raise ValueError(f"--policies {config.policies}: two folders or hub names are needed, as A,B")
    config.first, config.second = names  # for data.stage: what they hold counts, not what they are called
    with data.stage("eval.py", config, ["prompts", "judge", "first", "second"], ("out", "policies")) as work:
        if work is None:
            return
        judge = config.judge and rm.load_reward_model(config.judge)  # first: a wrong folder is found at once
        prompts = data.read_prompts(config.prompts)
        ours, theirs = (sampled(config, name, prompts, work / f"{which}.jsonl")
                        for name, which in zip(names, ("first", "second")))
        if judge:
            first, second = scored(config, judge, [(prompts, ours), (prompts, theirs)])
            found = compared(names, config.judge, first - second, config.tie * np.std([first, second]))
            data.write_jsonl(work / "rewards.jsonl", [{"first": a.tolist(), "second": b.tolist()} for a, b in zip(first, second)])
            data.write_text(work / "results.json", json.dumps({"policies": names, "judge": config.judge, **found}) + "\n")
            return
        pairs, answer_1, coin = [], {}, random.Random(config.seed)
        for prompt, *groups in zip(prompts, ours, theirs):
            for answers in zip(*groups):
                side = coin.randrange(2)
                pair = {"prompt": prompt, "answer_1": answers[side], "answer_2": answers[1 - side]}
                id = f"{len(pairs) + 1}-{hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:6]}"
                answer_1[id] = side  # 0: it is the first policy's
                pairs.append({"id": id, **pair})
        data.write_jsonl(work / "pairs.jsonl", pairs)
        data.write_text(work / "key.json", json.dumps({"policies": names, "prompts": len(prompts), "answer_1": answer_1}))
        data.write_text(work / "INSTRUCTIONS.md", INSTRUCTIONS)


def unblind(config: "EvalConfig") -> dict:
    """Verdicts on blinded pairs back to win/tie/lose of the key's first policy. Each id needs just one."""
    key, seen = data.read_json(Path(config.key)), {}
    if not isinstance(key, dict) or "answer_1" not in key:
        raise ValueError(f"--key {config.key}: not a key.json that eval.py --blind wrote")
    for number, row in data.read_lines(config.verdicts):
        id, verdict = row.get("id"), row.get("verdict")
        wrong = ("is not in the key" if not isinstance(id, str) or id not in key["answer_1"] else
                 f"has a verdict already, in line {seen[id][0]}" if id in seen else
                 verdict not in ("1", "2", "tie") and f'needs "1", "2" or "tie" for a verdict, not {json.dumps(verdict)}')
        if wrong:
            raise ValueError(f"{config.verdicts}, line {number}: id {json.dumps(id)} {wrong}")
        seen[id] = number, {"1": 1, "2": -1, "tie": 0}[verdict]
    missing = [id for id in key["answer_1"] if id not in seen]
    if missing:
        raise ValueError(f'{config.verdicts}, after line {number}: id "{missing[0]}" has no verdict, as {len(missing)} in all')
    gap = np.array([seen[id][1] * (1 - 2 * side) for id, side in key["answer_1"].items()]).reshape(key["prompts"], -1)
    return compared(key["policies"], f"the verdicts in {config.verdicts}", gap)


# ---------------------------------------------------------------------------------------------------------- plumbing

@dataclass
class EvalConfig:
    run: str = field(default="", metadata={"help": "report on this folder of a run, as run.sh lays it out"})
    judge: str = field(default="", metadata={"help": "compare --policies by this reward model (folder or hub name)"})
    blind: bool = field(default=False, metadata={"help": "write answers of --policies as pairs without names"})
    policies: str = field(default="", metadata={"help": "two policies, A,B (folders or hub names)"})
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


SAMPLING = ("seed", "k", "temperature", "top_p", "repetition_penalty", "max_new_tokens", "batch_size")


def sampled(config: EvalConfig, policy: str, prompts: list[str], path: Path) -> list[list[str]]:
    """k responses to each prompt; kept in the file `path`, so that a cut-off costs one policy's samples."""
    if not path.exists():
        model, tokenizer = ppo.load_policy(policy)
        groups = ppo.sample_responses(model.to(rm.pick_device()), tokenizer, prompts,
                                      **{name: getattr(config, name) for name in SAMPLING})
        data.write_jsonl(path, [{"prompt": prompt, "responses": group} for prompt, group in zip(prompts, groups)])
    return [row["responses"] for row in data.read_jsonl(path)]


def scored(config: EvalConfig, judge: tuple, sets: list[tuple]) -> list[np.ndarray]:
    """Rewards (m, k) of each set, (m prompts, m lists of k responses), by a (reward model, tokenizer)."""
    flat = [(prompt, text) for prompts, groups in sets for prompt, group in zip(prompts, groups) for text in group]
    rewards = rm.score(judge[0].to(rm.pick_device()), judge[1], *map(list, zip(*flat)), config.batch_size).double()
    parts = rewards.split([len(groups) * len(groups[0]) for _, groups in sets])
    return [part.reshape(len(groups), -1).numpy() for part, (_, groups) in zip(parts, sets)]


def look(config: EvalConfig, policies: dict[str, Path], models: dict[str, Path]) -> Seen:
    """Samples each policy (kept in RUN/eval), scores by each RM, and reads the logs of a run."""
    from tqdm import tqdm
    run, last = Path(config.run), last_rounds(policies)
    (run / "eval").mkdir(exist_ok=True)
    prompts = {domain: data.read_prompts(run / "data" / f"prompts-{domain}.jsonl") for domain in ("test", "ood")}
    pairs = data.read_preferences(run / "pairs" / "valid.jsonl")
    sets = {("D", "pairs"): ([row["prompt"] for row in pairs], [[row["chosen"], row["rejected"]] for row in pairs])}
    for policy, folder in tqdm(policies.items(), desc="eval: sampling", mininterval=1):
        asked = prompts if policy in ("sft", *last.values()) else {"test": prompts["test"]}
        made_from = [data.fingerprint(str(folder)), asked, *(getattr(config, name) for name in SAMPLING)]
        path = run / "eval" / f"{policy}-{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]}.jsonl"
        groups = iter(sampled(config, str(folder), sum(asked.values(), []), path))
        sets |= {(policy, domain): (texts, [next(groups) for _ in texts]) for domain, texts in asked.items()}

    def gold(prompts, responses):
        return np.array([[data.gold_reward(x, text) for text in group] for x, group in zip(prompts, responses)])

    scores = {("gold", *key): gold(*texts) for key, texts in sets.items()}
    for name, folder in tqdm(models.items(), desc="eval: scoring", mininterval=1):
        keys = [(policy, domain) for policy, domain in sets if domain == "pairs" or policy == last["ppo"]
                or domain == "test" and (policy == "sft" or trainer_of(policy) == name)]
        judge = rm.load_reward_model(str(folder))
        scores |= zip([(name, *key) for key in keys], scored(config, judge, [sets[key] for key in keys]))
    rollouts = {policy: [{"step": row["step"], "kl": row["kl"], "scores": np.array(row["scores"]),
                          "gold": gold(row["prompts"], row["responses"])} for row in data.read_jsonl(path)]
                for policy, folder in policies.items() if (path := folder / "rollouts.jsonl").exists()}
    epochs = {name: [[row["step"], 100 * row["accuracy"]] for row in data.read_jsonl(path) if "accuracy" in row]
              for name, folder in models.items() if name != "oracle" and (path := folder / "log.jsonl").exists()}
    responses = {key: groups for key, (_, groups) in sets.items() if key[1] in prompts}
    return Seen(prompts, responses, scores, rollouts, {name: points for name, points in epochs.items() if points})


def evaluate(config: EvalConfig) -> None:
    """The report on a run. results.json comes last, and vouches for the report and the pictures."""
    run, rounds = Path(config.run), [f"{arm}-{r}" for arm in RL_ARMS for r in range(1, 100)]
    if config.k < 2:
        raise ValueError(f"--k {config.k}: a difference between responses needs at least 2 of them")
    models = {"rm0": run / "rm0", **{f"{name}{what}": run / name / part for name in rounds for what, part in (
        ("", "rm"), (" adapted", "adapted"))}, "oracle": run / "oracle" / "rm"}
    policies = {"sft": run / "sft", "dpo": run / "dpo", **{name: run / name / "policy" for name in rounds}}
    models, policies = ({name: folder for name, folder in all_.items() if folder.is_dir()} for all_ in (models, policies))
    for name in {"sft", "ppo-1", *map(trainer_of, policies)} - {*policies, *models}:
        raise ValueError(f"--run {run}: no {name} (a report needs sft, ppo-1/policy and each policy's reward model); finish "
                         f"the run first (bash run.sh)")
    inputs = [*policies.values(), *models.values(), run / "data", run / "pairs", __file__, data.__file__]
    stage = [{**asdict(config), "run": None}, *(data.fingerprint(str(path)) for path in inputs)]
    with data.locked(str(run / "eval.lock")):
        if (data.read_json(run / "results.json") or {}).get("stage") == stage:
            print(f"eval.py: {run / 'report.md'} is up to date, with the same options and inputs: skipped")
            return
        seen = look(config, policies, models)
        found = measure(seen, config.tie)
        (run / "results.json").unlink(missing_ok=True)
        (run / "figures").mkdir(exist_ok=True)
        figures(found, seen, run / "figures")
        data.write_text(run / "report.md", report(found))
        # JSON's own types, 6 digits, NaN as null, no "-0.0": one seed, the same bytes
        tidy = json.loads(json.dumps({**found, "stage": stage}, default=lambda x: x.item()), parse_constant=lambda _: None,
                          parse_float=lambda digits: round(float(digits), 6) + 0.0)
        data.write_text(run / "results.json", json.dumps(tidy, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    print(f"eval.py: {run / 'report.md'}: {sum(sign['holds'] is True for sign in found['illness'])} of "
          f"{len(found['illness'])} signs of the illness (one seed)")


WAYS = {"run": evaluate, "judge policies prompts out": compare, "blind policies prompts out": compare, "verdicts key": unblind}


def choose(config: EvalConfig) -> None:
    """What to do follows from the flags that are given."""
    given = {name for way in WAYS for name in way.split() if getattr(config, name)}
    for way, body in WAYS.items():
        if given == set(way.split()):
            return body(config)
    flags = [" ".join(f"--{name}" for name in names) for names in (sorted(given), *map(str.split, WAYS))]
    raise ValueError(f"{flags[0] or 'no flag'} given, but these belong together: {'; or '.join(flags[1:])}")


def main(argv: list[str] | None = None) -> int:
    return data.command("eval.py", EvalConfig, choose, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
