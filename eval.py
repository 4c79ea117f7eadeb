"""The report on a run, with the toy world's gold reward as the judge; and two policies before any other judge.

Concept: in the toy world the truth is known, so each claim of the paper becomes a number. First come the measures:
arrays in, numbers out, no model in sight. `measure` turns what was seen into a dict of figures, `report` that dict
into text, `figures` into pictures. Sampling and scoring are plumbing and come last.

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
    weights: the first's shares, over the bins where both have `minimum` pairs (NaN: no such bin).
    """
    pairs, right = [], []
    for rewards, gold in (first, second):
        gap, gold_gap = (x[reward_gaps(rewards, gold)[1] != 0] for x in reward_gaps(rewards, gold))
        pairs.append(np.histogram(np.abs(gold_gap), edges)[0])
        right.append(np.histogram(np.abs(gold_gap), edges, weights=agreement(gap, gold_gap))[0])
    shared = np.minimum(*pairs) >= max(minimum, 1)
    weights = pairs[0][shared] / pairs[0][shared].sum()
    accuracy = [float(weights @ (x[shared] / n[shared])) if shared.any() else float("nan") for x, n in zip(right, pairs)]
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
    cannot see it. Hence `scale`: the SD of the same RM's rewards on SFT samples.
    """
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


def wilson(percent: float, n: int, z: float = 1.96) -> list[float]:
    """The 95 % interval, in percent, of a share seen in n trials (Wilson 1927); of use at 0 and 100 % too."""
    p = percent / 100
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [100 * float((centre + side) / (1 + z * z / n)) for side in (-half, half)]


def bleu(hypothesis: list[str], references: list[list[str]], longest: int = 5) -> list[float]:
    """BLEU-1 .. BLEU-longest of a list of words against others (Papineni et al. 2002), each between 0 and 1.

    Smoothed: an order without any match counts as 0.1 matches (method 1 of Chen & Cherry 2014, as in Texygen's
    Self-BLEU), or one missing 5-gram would make the score 0. Orders longer than the hypothesis do not count.
    """
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
NAMES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO on RM0", "reseeded": "reseeded RM", "metarm": "MetaRM",
         "rm0": "RM0", "oracle": "gold-label RM", "gold": "gold reward"}
COLOURS = {"sft": "#777777", "ppo": "#0072B2", "rm0": "#0072B2", "reseeded": "#009E73", "metarm": "#D55E00",
           "gold": "#000000"}  # Okabe & Ito: safe for all eyes
GAP_EDGES = np.array([0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3])  # bins of |gold gap|, in SDs


@dataclass
class Seen:
    """All that the figures rest on. A policy is a name, a domain "test" or "ood", a judge an RM's name or "gold"."""
    prompts: dict    # domain -> m texts
    responses: dict  # (policy, domain) -> m lists of k texts
    scores: dict     # (judge, policy, domain) -> (m, k) rewards; (judge, "D", "pairs"): of chosen and rejected, (n, 2)
    rollouts: dict   # policy -> its PPO steps, [{"step", "kl", "scores" (b, g), "gold" (b, g)}]
    epochs: dict     # rm -> [[share of its epoch, accuracy on the held-out pairs of D]]


def arm_of(name: str) -> tuple[str, int]:
    """"metarm-2" and "metarm-2 adapted" -> ("metarm", 2); "sft" -> ("sft", 0)."""
    arm, _, rounds = name.split()[0].partition("-")
    return arm, int(rounds or 0)


def last_rounds(policies) -> dict[str, int]:
    """The last round of each RL arm that has any (in the dict, later rounds replace earlier ones)."""
    return {arm: rounds for arm, rounds in sorted(map(arm_of, policies), key=lambda x: x[1]) if rounds}


def trainer_of(policy: str) -> str:
    """The RM whose rewards a policy was trained on; RM0 also stands in for SFT and DPO, which had none."""
    return policy if arm_of(policy)[0] in ("reseeded", "metarm") else "rm0"


def measure(seen: Seen, tie: float = 0.25) -> dict:
    """All figures of the report, plain numbers by name; `tie` in SDs of gold on SFT samples."""
    policies = [policy for policy, domain in seen.responses if domain == "test"]
    last, gold_sd = last_rounds(policies), seen.scores["gold", "sft", "test"].std() or 1.0
    tie, shifted = tie * gold_sd, f"ppo-{last['ppo']}"  # whose samples are the common shifted set

    def in_sd(judge, rewards):  # how many SDs above the judge's mean on SFT samples
        on_sft = seen.scores[judge, "sft", "test"]
        return (np.asarray(rewards) - on_sft.mean()) / (on_sft.std() or 1.0)

    curves = {policy: {name: [step[name] for step in steps] for name in ("step", "kl")}
              for policy, steps in seen.rollouts.items()}
    for policy, curve in curves.items():
        for name, judge, key in (("proxy", trainer_of(policy), "scores"), ("gold", "gold", "gold")):
            rewards = [in_sd(judge, step[key]) for step in seen.rollouts[policy]]
            curve[name] = [x.mean() for x in rewards]
            curve[f"{name}_variance"] = [spread(x)["variance"] if x.shape[1] > 1 else np.nan for x in rewards]

    rows, rivals = {}, {"sft": ("sft", 0), "dpo": ("dpo", 0)}
    for policy in policies:
        texts, rms_score = seen.responses[policy, "test"], seen.scores.get((trainer_of(policy), policy, "test"))
        rivals |= {arm: (arm, arm_of(policy)[1]) for arm in RL_ARMS}  # the other arms' policies of the same round
        against = {rival: {domain: win_tie_lose(*(seen.scores["gold", p, domain] for p in (policy, name)), tie)
                           for domain in seen.prompts if {(policy, domain), (name, domain)} <= seen.responses.keys()}
                   for name in policies for rival in rivals if rivals[rival] == arm_of(name) and name != policy}
        rows[policy] = {
            "proxy": None if rms_score is None else in_sd(trainer_of(policy), rms_score).mean(),
            "gold": in_sd("gold", seen.scores["gold", policy, "test"]).mean(),
            "kl": np.mean(curves[policy]["kl"][-5:]) if policy in curves else None,
            "words": mean_words(texts), "distinct": distinct_share(texts), "self_bleu": self_bleu(texts),
            "against": against, "net": {r: x["test"]["win"] - x["test"]["lose"] for r, x in against.items()}}
    examples = [{"prompt": prompt, "answers": [
        {"policy": p, "text": seen.responses[p, "test"][i][0], "gold": seen.scores["gold", p, "test"][i, 0],
         "proxy": in_sd(trainer_of(p), seen.scores[trainer_of(p), p, "test"][i, 0])}
        for p in policies if arm_of(p)[1] in (0, last.get(arm_of(p)[0])) and rows[p]["proxy"] is not None]}
        for i, prompt in enumerate(seen.prompts["test"][:5])]
    labels = seen.scores["gold", "D", "pairs"] @ [1, -1]
    results = {"prompts": {domain: len(texts) for domain, texts in seen.prompts.items()}, "last": last, "tie": tie,
               "k": len(seen.responses["sft", "test"][0]), "pairs": len(labels), "ceiling": agreement(labels, 1).mean(),
               "gold_sd": gold_sd, "shifted": shifted, "policies": rows, "curves": curves, "epochs": seen.epochs,
               "examples": examples, "rms": {name: measure_rm(seen, name, shifted, tie, gold_sd)
                                             for name, policy, _ in seen.scores if policy == "D" and name != "gold"}}
    return {**results, "illness": illness(results), "claims": claims(results)}


def measure_rm(seen: Seen, name: str, shifted: str, tie: float, gold_sd: float) -> dict:
    """One RM: accuracy and spread on D, on SFT samples, on the common shifted set and on its like for OOD prompts."""
    def on(*key):
        return [seen.scores[judge, *key] for judge in (name, "gold")]

    edges = np.array([tie, *(edge for edge in gold_sd * GAP_EDGES if edge > tie), np.inf])
    margins, truth = (rewards @ [1, -1] for rewards in on("D", "pairs"))
    row = {"d_noisy": agreement(margins, 1).mean(), "d_gold": agreement(margins, truth)[truth != 0].mean(),
           "sft": pair_accuracy(*on("sft", "test"), tie)[0], "reward_sd": float(on("sft", "test")[0].std()) or 1.0}
    for column, domain in (("shifted", "test"), ("ood", "ood")):
        if (shifted, domain) in seen.responses:
            row[column] = matched_accuracy(on("sft", "test"), on(shifted, domain), edges)
            row[column]["raw"] = pair_accuracy(*on(shifted, domain), tie)[0]
    for column, policy in (("sft", "sft"), ("shifted", shifted)):
        rewards, gold = on(policy, "test")
        apart = {"raw": spread(rewards), "sd": spread(rewards, row["reward_sd"]), "gold": spread(gold, gold_sd)}
        row |= {f"spread_{column}": apart, f"rank_{column}": rank_correlation(rewards, gold)[0],
                f"relative_{column}": apart["sd"]["variance"] / (apart["gold"]["variance"] or np.nan)}
    return row


def illness(results: dict) -> list[dict]:
    """What must be there before a cure is judged, a row each; "holds": True, False or None (cannot tell)."""
    rm0, oracle = results["rms"]["rm0"], results["rms"].get("oracle", {"shifted": {"first": None, "second": None}})
    sft, first, end = (results["policies"][name] for name in ("sft", "ppo-1", results["shifted"]))
    same_gap, fresh, before, after = rm0["shifted"], oracle["shifted"], rm0["spread_sft"], rm0["spread_shifted"]
    least = 0.5 + 0.1 * (2 * results["ceiling"] - 1)  # what 60 % by gold comes to under the flips
    rows = (  # what; before and after PPO; the criterion in words and as a test; display scale
        ("RM0 on held-out pairs of D, % right by their noisy labels (before: chance)", 0.5, rm0["d_noisy"],
         f"≥ {100 * least:.1f}, which is 60 less the flips", lambda a, b: b >= least, 100),
        ("the same by gold labels, %", 0.5, rm0["d_gold"], "≥ 60", lambda a, b: b >= 0.6, 100),
        ("RM0 on the policy's samples at the same gold gap, % right", same_gap["first"], same_gap["second"],
         "≥ 10 points lower", lambda a, b: a - b >= 0.1, 100),
        ("an RM trained freshly on gold labels of such samples, on those pairs, % right", fresh["first"],
         fresh["second"], "≥ 5 points above RM0", lambda a, b: b - same_gap["second"] >= 0.05, 100),
        ("J of RM0", before["raw"]["J"], after["raw"]["J"], "falls", lambda a, b: b < a, 1),
        ("variance of RM0's reward difference, SD²", before["sd"]["variance"], after["sd"]["variance"], "falls",
         lambda a, b: b < a, 1),
        ("that variance over the gold difference's", rm0["relative_sft"], rm0["relative_shifted"], "falls",
         lambda a, b: b < a, 1),
        ("RM0's reward of the policy, SD above SFT", sft["proxy"], end["proxy"], "goes up", lambda a, b: b > 0, 1),
        ("gold reward of the policy, SD above SFT; before: after the first round of PPO",
         None if first is end else first["gold"], end["gold"], f"gains at most 0.1 from first to last round, while "
         f"RM0's reward goes up ({show(first['proxy'])} to {show(end['proxy'])})",
         lambda a, b: b - a <= 0.1 and end["proxy"] > first["proxy"], 1),
        ("mean length, words", sft["words"], end["words"], "at least half", lambda a, b: b >= a / 2, 1),
        ("distinct responses, %", sft["distinct"], end["distinct"], "≥ 50", lambda a, b: b >= 0.5, 100))
    return [{"what": what, "criterion": criterion, "before": a and scale * a, "after": b and scale * b,
             "holds": None if None in (a, b) or a != a or b != b else bool(test(a, b))}
            for what, a, b, criterion, test, scale in rows]


CLAIMS = (  # of the paper, in words; the figure that tells (more is better), its scale, and what counts as level
    ("RM: tells shifted responses apart, % right", "rms", "", ("shifted", "second"), 100, 2),
    ("RM: the same with MetaRM's θ' for θ", "rms", " adapted", ("shifted", "second"), 100, 2),
    ("RM: tells responses to OOD prompts apart, % right", "rms", "", ("ood", "second"), 100, 2),
    ("RM: keeps its accuracy on held-out pairs of D (gold labels), %", "rms", "", ("d_gold",), 100, 2),
    ("RM: J on the shifted set, SD units", "rms", "", ("spread_shifted", "sd", "J"), 1, 0.01),
    ("RM: the same with θ' for θ", "rms", " adapted", ("spread_shifted", "sd", "J"), 1, 0.01),
    ("policy: gold reward, SD above SFT", "policies", "", ("gold",), 1, 0.1),
    ("policy: against SFT, wins minus losses, %", "policies", "", ("net", "sft"), 1, 5),
    ("policy: against DPO, wins minus losses, %", "policies", "", ("net", "dpo"), 1, 5),
    ("policy: diversity of answers, minus Self-BLEU", "policies", "", ("self_bleu",), -1, 0.02))


def claims(results: dict) -> list[dict]:
    """MetaRM's last round beside RM0 (and PPO on it for as many rounds) and beside the reseeded plain RM: "ahead",
    "level" or "behind" (None: the run has no such part). Only what is ahead of both can be the lookahead's doing."""
    last, found = results["last"].get("metarm"), []
    for what, group, suffix, path, scale, margin in CLAIMS:
        values = [dig(results, group, name, *path) for name in (
            f"metarm-{last}{suffix}", "rm0" if group == "rms" else f"ppo-{last}", f"reseeded-{last}")]
        ours, *others = (None if x is None else scale * x for x in values)
        if ours is not None and others[0] is not None:
            how = [None if x is None else "ahead" if ours - x >= margin else "behind" if x - ours >= margin else "level"
                   for x in others]
            found.append({"what": what, "margin": margin, "metarm": ours, "vanilla": others[0], "reseeded": others[1],
                          "to_vanilla": how[0], "to_reseeded": how[1]})
    return found


def dig(tree: dict, *path):
    """tree[path[0]][path[1]]..., or None where the run lacks it or the figure is NaN (too few pairs)."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return None if tree is None or tree != tree else tree


# -------------------------------------------------------------------------------------------------------- the report

REPORT = """# What this run shows

A small language model (**SFT**) answers customers at a help desk. A reward model, **RM0**, learns from preference
pairs D between its answers, and PPO moves the policy towards what RM0 likes: away from the answers that RM0 learned
from, so that RM0 judges it worse. That is the illness. **MetaRM** (Dou et al., arXiv 2405.00438) trains the RM anew
each round on the same D, taking each gradient at θ', one small step after driving apart its rewards for fresh,
unlabelled answers. Two controls get the same PPO steps: RM0 throughout, and a **reseeded RM**, plain, but trained anew
each round with another seed. A policy trained on RM0 has sought out RM0's own mistakes, so *any* other RM judges its
answers better: only what goes beyond the reseeded RM can be MetaRM's doing.

The judge is the gold reward, rules that no model was shown, on {test} test prompts (OOD: {ood} on other topics), {k}
responses each. SD: the standard deviation on SFT samples, of gold for gold and of each RM for that RM: an RM that
doubles its rewards has learned nothing. Responses tie when their gold rewards differ by less than {tie} ({tie_sd} SD).

**This is one seed, and one seed proves nothing**: the tables describe this run, not the method.

## 1. Is the illness there?

RM0 and its policy before PPO (SFT samples) and after {rounds} round(s) of it: {signs}. *At the same gold gap*: as a
policy narrows, its answers differ less in truth too, and any RM finds them harder to tell apart.

{illness}
![reward difference over PPO](figures/fig1_reward_difference.png)

![promised and gold reward over KL](figures/gold_over_kl.png)

## 2. The policies (the paper's Tables 1 to 3)

Each round against SFT: win / tie / lose in % by the gold reward, response against response.

{table1}
The last round against the others; PPO and reseeded RM at the same round, so after equally many PPO steps.

{table2}
RM: the reward by the RM behind the policy (RM0 for SFT and DPO), SD above SFT. KL to SFT: nats a response, at the end.
Distinct: different texts among all. Self-BLEU (n = 2..5, among the responses to one prompt): lower is more diverse.

{policies}
## 3. The reward models

Accuracy in %. D: {pairs} held-out pairs, by their noisy labels (ceiling {ceiling}: the rest are flipped) and by gold.
Shifted: the samples of *{shifted}*, one set for all RMs, made of RM0's own mistakes. OOD: that policy's samples to OOD
prompts. Both at the gold gaps of the SFT pairs; raw: without that. ρ: rank correlation with gold within a prompt,
shifted set. θ': the RM after one more climb of J.

{accuracy}
How far apart the RMs hold two responses to one prompt, on the shifted set: J (Eq. 2), the mean |difference|, and the
variance of the difference over that of the gold difference.

{spread}
![accuracy over the epoch](figures/fig4_rm_accuracy.png)

![reward differences](figures/fig5_reward_difference_distribution.png)

## 4. Five test prompts

The first five of the file and each policy's first response, none picked. RM: as above. Gold: in points.

{examples}
## 5. In plain words

{sickness} MetaRM's last round beside RM0 (and PPO on it for as many rounds) and beside the reseeded RM; a difference
below the margin is level. {ahead}

{claims}
Another seed may change any of these lines.
"""
# columns of tables: heading, where the figure is, digits, scale
POLICY_COLUMNS = (("RM", ("proxy",), 2, 1), ("gold", ("gold",), 2, 1), ("KL", ("kl",), 1, 1),
                  ("words", ("words",), 1, 1), ("distinct %", ("distinct",), 0, 100), ("Self-BLEU", ("self_bleu",), 2, 1))
ACCURACY_COLUMNS = (("D, noisy", ("d_noisy",), 1, 100), ("D, gold", ("d_gold",), 1, 100), ("SFT", ("sft",), 1, 100),
                    ("shifted", ("shifted", "second"), 1, 100), ("raw", ("shifted", "raw"), 1, 100),
                    ("OOD", ("ood", "second"), 1, 100), ("raw", ("ood", "raw"), 1, 100), ("ρ", ("rank_shifted",), 2, 1))
SPREAD_COLUMNS = (("J", ("spread_shifted", "raw", "J"), 3, 1), ("J, SD units", ("spread_shifted", "sd", "J"), 3, 1),
                  ("mean difference", ("spread_shifted", "raw", "margin"), 3, 1),
                  ("in SD", ("spread_shifted", "sd", "margin"), 3, 1), ("variance over gold's", ("relative_shifted",), 2, 1))


def show(x, digits: int = 2, scale: float = 1) -> str:
    return "–" if x is None or x != x else f"{round(scale * x, digits) + 0.0:.{digits}f}".replace("-", "−")


def title(name: str) -> str:
    arm, rounds = arm_of(name)
    return NAMES[arm] + (f", round {rounds}" if rounds else "") + (", θ'" if " adapted" in name else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in line) + " |\n"
                   for line in (header, ["---"] * len(header), *rows))


def report(results: dict) -> str:
    """report.md from the figures alone: for somebody who has seen neither the code nor the paper."""
    policies, last, signs, found = (results[key] for key in ("policies", "last", "illness", "claims"))

    def versus(policy, rival, domain="test"):
        verdict = dig(policies, policy, "against", rival, domain)
        return " / ".join(show(verdict[side], 0) for side in ("win", "tie", "lose")) if verdict else "–"

    def figure_table(rows, columns):
        return table(["", *(heading for heading, *_ in columns)], [
            [title(name), *(show(dig(row, *path), *how) for _, path, *how in columns)] for name, row in rows.items()])

    examples = ["> " + example["prompt"].strip().replace("\n", "\n> ") + "\n\n" + table(
        ["policy", "response", "RM", "gold"], [[title(a["policy"]), a["text"].strip() or "*(empty)*", show(a["proxy"]),
                                                show(a["gold"])] for a in example["answers"]])
                for example in results["examples"]]
    count = Counter(sign["holds"] for sign in signs)
    missing = "; ".join(sign["what"] for sign in signs if not sign["holds"])
    ahead = {key: f"{sum(row[key] == 'ahead' for row in found)} of {len(found)}" for key in ("to_vanilla", "to_reseeded")}
    both = "; ".join(row["what"] for row in found if row["to_vanilla"] == row["to_reseeded"] == "ahead")
    return REPORT.format(
        test=results["prompts"]["test"], ood=results["prompts"].get("ood", 0), k=results["k"], pairs=results["pairs"],
        tie=show(results["tie"]), tie_sd=show(results["tie"] / results["gold_sd"]), rounds=last["ppo"],
        signs=f"{count[True]} of {len(signs)} signs are there, {count[False]} not, {count[None]} cannot be told (too few "
              f"pairs, or the run lacks a part)",
        illness=table(["", "before", "after", "criterion", "there?"], [
            [sign["what"], *(show(x, 3 if x and abs(x) < 10 else 1) for x in (sign["before"], sign["after"])),
             sign["criterion"], {True: "yes", False: "**no**", None: "–"}[sign["holds"]]] for sign in signs]),
        table1=table(["", *(f"round {r + 1}" for r in range(max(last.values())))], [
            [NAMES[arm], *(versus(f"{arm}-{r + 1}", "sft") for r in range(max(last.values())))] for arm in last]),
        table2=table(["", "SFT", "PPO on RM0", "DPO", "reseeded RM", "SFT, on OOD prompts"], [
            [title(p), *(versus(p, rival) for rival in ("sft", "ppo", "dpo", "reseeded")), versus(p, "sft", "ood")]
            for p in (f"{arm}-{r}" for arm, r in last.items())]),
        policies=figure_table(policies, POLICY_COLUMNS), accuracy=figure_table(results["rms"], ACCURACY_COLUMNS),
        spread=figure_table(results["rms"], SPREAD_COLUMNS), ceiling=show(results["ceiling"], 1, 100),
        shifted=title(results["shifted"]), examples="\n".join(examples),
        sickness=f"Missing or untold signs of the illness, which weakens what follows: {missing}." if missing else
                 "Every sign of the illness is there.",
        ahead=f"It is ahead of RM0 in {ahead['to_vanilla']} lines and of the reseeded RM in {ahead['to_reseeded']}; of "
              f"both, which alone speaks for the lookahead: {both or 'nowhere'}.",
        claims=table(["", "MetaRM", "RM0", "MetaRM is", "reseeded", "MetaRM is", "margin"], [
            [row["what"], show(row["metarm"]), show(row["vanilla"]), row["to_vanilla"], show(row["reseeded"]),
             row["to_reseeded"] or "–", show(row["margin"])] for row in found]))
