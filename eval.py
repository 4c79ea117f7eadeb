"""The report: what one run shows, with the gold reward of the toy world as the judge.

Concept: in the toy world the truth is known, so each claim of the paper becomes a number. First come the
measures: arrays in, numbers out, no model in sight. `measure` turns all that was seen into a dict of figures,
`report` that dict into text, `figures` into pictures. Sampling and scoring are plumbing and come last.

    python eval.py --run runs/toy --seed 0

samples k responses of every policy of the run (sft, dpo, ppo-r, reseeded-r, metarm-r) to the test and OOD
prompts, scores them by the reward models, and writes into the run figures/*.png, report.md and, last,
results.json: it is there only when all is. Samples and scores stay in RUN/eval; a cut-off costs little.
"""

import json
import os
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

# --------------------------------------------------------------- measures: does an RM put responses in order?
# Shapes throughout: m prompts, k responses each; rewards and gold are (m, k). Only responses to ONE prompt
# are ever compared: preference pairs and J see nothing else.


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

    `first` and `second` are (rewards, gold); `edges` bound the bins of |gold gap|, the lowest being the tie.
    As a policy narrows, its responses differ less in truth too, and pairs get harder for ANY reward model:
    raw accuracy falls without the RM being any worse. So accuracy is taken bin by bin, and both sets averaged
    with one set of weights: the first's shares, over the bins where both have `minimum` pairs (NaN: no bin).
    """
    bins, right = [], []
    for rewards, gold in (first, second):
        gap, gold_gap = reward_gaps(rewards, gold)
        bins.append(np.where(gold_gap == 0, -1, np.digitize(np.abs(gold_gap), edges) - 1))
        right.append(agreement(gap, gold_gap))
    shared = [b for b in range(len(edges) - 1) if min((bins[0] == b).sum(), (bins[1] == b).sum()) >= minimum]
    weights = np.array([(bins[0] == b).sum() for b in shared], float)
    result = {}
    for name, which, ok in zip(("first", "second"), bins, right):
        by_bin = np.array([ok[which == b].mean() for b in shared])
        result[name] = float(weights @ by_bin / weights.sum()) if shared else float("nan")
        result[f"{name}_pairs"] = int(np.isin(which, shared).sum())
    return result


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis; equal values share the mean of theirs."""
    x = np.asarray(x, float)
    below, equal = (x[..., None, :] < x[..., :, None]).sum(-1), (x[..., None, :] == x[..., :, None]).sum(-1)
    return below + (equal + 1) / 2


def rank_correlation(rewards: np.ndarray, gold: np.ndarray) -> tuple[float, int]:
    """(mean Spearman correlation within a prompt, prompts used); where a side is constant there is none."""
    a, b = (ranks(x) - ranks(x).mean(-1, keepdims=True) for x in (rewards, gold))
    length = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    used = length > 0
    rho = (a * b).sum(-1)[used] / length[used]
    return (float(rho.mean()) if used.any() else float("nan")), int(used.sum())


# --------------------------------------------------------- measures: how far apart does an RM hold responses?

def spread(rewards: np.ndarray, scale: float = 1.0) -> dict:
    """{"J", "margin", "variance"} of rewards / scale, (m, k): Eq. 2; the mean |r_i - r_j|; and the mean
    (r_i - r_j)^2, the variance of the difference of two responses in random order (paper, Figure 1).

    An RM that merely doubles its rewards raises all three and has learned nothing, and PPO, which rescales
    rewards, cannot see it. Hence `scale`: the SD of the same RM's rewards on SFT samples.
    """
    rewards = np.asarray(rewards, float) / scale
    gap, _ = reward_gaps(rewards, rewards)
    return {"J": float(metarm.difference_loss(torch.as_tensor(rewards))), "margin": float(np.abs(gap).mean()),
            "variance": float((gap ** 2).mean())}


# -------------------------------------------------------------------------------- measures: policies and text

def win_tie_lose(ours: np.ndarray, theirs: np.ndarray, tie: float) -> dict:
    """Percent {"win", "tie", "lose"} by the judge's rewards, two arrays of one shape: entry i of ours meets
    entry i of theirs, to the same prompt. A tie is a difference below `tie`, or none."""
    gap = np.asarray(ours, float) - np.asarray(theirs, float)
    tied = (np.abs(gap) < tie) | (gap == 0)
    return {"win": 100 * float((~tied & (gap > 0)).mean()), "tie": 100 * float(tied.mean()),
            "lose": 100 * float((~tied & (gap < 0)).mean())}


def bleu(hypothesis: list[str], references: list[list[str]], longest: int = 5) -> list[float]:
    """BLEU-1 .. BLEU-longest of a list of words against others (Papineni et al. 2002), each between 0 and 1.

    Smoothed: an order without any match counts as 0.1 matches (method 1 of Chen & Cherry 2014, as in
    Texygen's Self-BLEU), or one missing 5-gram would make the score 0. Orders longer than the hypothesis do
    not count.
    """
    def ngrams(words, n):
        return Counter(zip(*(words[i:] for i in range(n))))

    logs = []
    for n in range(1, min(longest, len(hypothesis)) + 1):
        ours, most = ngrams(hypothesis, n), Counter()
        for reference in references:
            most |= ngrams(reference, n)  # as often as the one reference that has it most often
        logs.append(np.log(max((ours & most).total(), 0.1) / ours.total()))
    if not logs:
        return [float([] in references)] * longest
    closest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    too_short = min(0.0, 1 - closest / len(hypothesis))
    return [float(np.exp(np.mean(logs[:n]) + too_short)) for n in range(1, longest + 1)]


def self_bleu(responses: list[list[str]]) -> float:
    """Each of a prompt's k responses against the k-1 others, averaged over n = 2..5, responses and prompts.
    1: all say the same. Lower is more diverse (paper, Table 3; Zhu et al. 2018)."""
    words = [[text.split() for text in group] for group in responses]
    return float(np.mean([bleu(group[i], group[:i] + group[i + 1:])[1:]
                          for group in words for i in range(len(group))]))


def distinct_share(responses: list[list[str]]) -> float:
    """Different texts among all responses to all prompts; a policy with one answer for all has 1/(m·k)."""
    texts = [text for group in responses for text in group]
    return len(set(texts)) / len(texts)


def mean_words(responses: list[list[str]]) -> float:
    return float(np.mean([len(text.split()) for group in responses for text in group]))


def averaged(values: list[float], groups: int) -> list[float]:
    """Means over `groups` consecutive stretches of about equal length (at most one a value)."""
    return [float(np.mean(part)) for part in np.array_split(values, min(groups, len(values)))]


# ----------------------------------------------------------------------------- from what was seen to figures

RL_ARMS = ("ppo", "reseeded", "metarm")  # ARM-r: an arm's policy of round r, and the RM behind it (ppo: rm0)
NAMES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO on RM0", "reseeded": "reseeded RM", "metarm": "MetaRM",
         "rm0": "RM0", "oracle": "gold-label RM", "gold": "gold reward"}
COLOURS = {"sft": "#777777", "dpo": "#E69F00", "ppo": "#0072B2", "rm0": "#0072B2", "reseeded": "#009E73",
           "metarm": "#D55E00", "oracle": "#CC79A7", "gold": "#000000"}  # Okabe & Ito: safe for all eyes
GAP_EDGES = np.array([0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3])  # bins of |gold gap|, in SDs


@dataclass
class Seen:
    """All that the figures rest on. `policy` and `rm` are names, `domain` is "test" or "ood"."""
    prompts: dict    # domain -> m texts
    responses: dict  # (policy, domain) -> m lists of k texts
    gold: dict       # (policy, domain) -> (m, k) rewards by the judge
    scores: dict     # (rm, policy, domain) -> (m, k) rewards
    held_out: dict   # rm, or "gold" -> (n,) reward of chosen minus rejected, on the held-out pairs of D
    rollouts: dict   # policy -> its PPO steps, [{"step", "kl", "scores" (b, g), "gold" (b, g)}]
    epochs: dict     # rm -> [[share of its epoch, accuracy on the held-out pairs]]


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
    policies = [policy for policy, domain in seen.gold if domain == "test"]
    last, gold_sft = last_rounds(policies), seen.gold["sft", "test"]
    shifted, gold_sd = f"ppo-{last['ppo']}", gold_sft.std() or 1.0  # the common shifted set: vanilla PPO's

    def in_sd(rewards, name):  # how many SDs above the RM's mean on SFT samples
        on_sft = seen.scores[name, "sft", "test"]
        return (np.asarray(rewards) - on_sft.mean()) / (on_sft.std() or 1.0)

    curves = []
    for policy, steps in seen.rollouts.items():
        proxy = [in_sd(step["scores"], trainer_of(policy)) for step in steps]
        gold = [(step["gold"] - gold_sft.mean()) / gold_sd for step in steps]
        columns = {"step": [step["step"] for step in steps], "kl": [step["kl"] for step in steps],
                   "proxy": [x.mean() for x in proxy], "gold": [x.mean() for x in gold]}
        if gold[0].shape[1] > 1:
            columns |= {f"{name}_variance": [spread(x)["variance"] for x in values]
                        for name, values in (("proxy", proxy), ("gold", gold))}
        curves.append({"policy": policy, "steps": len(steps),
                       **{name: averaged(values, 8) for name, values in columns.items()}})

    rms = {name: measure_rm(seen, name, shifted, tie * gold_sd, gold_sd)
           for name in seen.held_out if name != "gold"}
    rows = {policy: measure_policy(seen, policy, policies, tie * gold_sd) for policy in policies}
    for policy, row in rows.items():
        proxy = seen.scores.get((trainer_of(policy), policy, "test"))
        row |= {"proxy": None if proxy is None else in_sd(proxy, trainer_of(policy)).mean(),
                "gold": (seen.gold[policy, "test"].mean() - gold_sft.mean()) / gold_sd,
                "kl": next((curve["kl"][-1] for curve in curves if curve["policy"] == policy), None)}
    shown = [p for p in policies if p in ("sft", "dpo") or arm_of(p) in last.items()]
    examples = [{"prompt": prompt, "answers": [
        {"policy": p, "text": seen.responses[p, "test"][i][0], "gold": seen.gold[p, "test"][i, 0],
         "proxy": in_sd(seen.scores[trainer_of(p), p, "test"][i, 0], trainer_of(p))}
        for p in shown if rows[p]["proxy"] is not None]} for i, prompt in enumerate(seen.prompts["test"][:5])]
    results = {"prompts": {domain: len(texts) for domain, texts in seen.prompts.items()}, "gold_sd": gold_sd,
               "k": gold_sft.shape[1], "ceiling": agreement(seen.held_out["gold"], 1).mean(), "last": last,
               "tie": tie * gold_sd, "shifted": shifted, "rms": rms, "policies": rows, "curves": curves,
               "epochs": seen.epochs, "examples": examples}
    return {**results, "illness": illness(results), "claims": claims(results)}


def measure_rm(seen: Seen, name: str, shifted: str, tie: float, gold_sd: float) -> dict:
    """One RM: accuracy on D, SFT samples, the common shifted set, OOD and its own policy; and its spread."""
    edges = np.array([tie, *(edge for edge in gold_sd * GAP_EDGES if edge > tie), np.inf])
    sets = {key: (seen.scores[name, *key], gold) for key, gold in seen.gold.items()
            if (name, *key) in seen.scores}
    on_sft, margins, truth = sets["sft", "test"], seen.held_out[name], seen.held_out["gold"]
    row = {"d_noisy": agreement(margins, 1).mean(), "d_gold": agreement(margins, truth)[truth != 0].mean(),
           "sft": pair_accuracy(*on_sft, tie)[0], "reward_sd": float(on_sft[0].std()) or 1.0}
    own = shifted if name == "rm0" else name
    for column, key in (("shifted", (shifted, "test")), ("ood", (shifted, "ood")), ("own", (own, "test"))):
        if key in sets:
            row[column] = matched_accuracy(on_sft, sets[key], edges)
            row[column]["raw"] = pair_accuracy(*sets[key], tie)[0]
    for column, key in (("sft", ("sft", "test")), ("shifted", (shifted, "test"))):
        rewards, gold = sets[key]
        gold_variance = spread(gold, gold_sd)["variance"]
        row[f"spread_{column}"] = {"raw": spread(rewards), "sd": spread(rewards, row["reward_sd"])}
        row[f"relative_{column}"] = row[f"spread_{column}"]["sd"]["variance"] / (gold_variance or np.nan)
        row[f"rank_{column}"] = rank_correlation(rewards, gold)[0]
    return row


def measure_policy(seen: Seen, policy: str, policies: list[str], tie: float) -> dict:
    """One policy: its texts, and win/tie/lose against SFT, DPO and the other arms' policies of its round."""
    texts, rounds = seen.responses[policy, "test"], arm_of(policy)[1]
    rivals = {"sft": "sft", "dpo": "dpo", **{arm: f"{arm}-{rounds}" for arm in RL_ARMS}}
    against = {rival: {domain: win_tie_lose(seen.gold[policy, domain], seen.gold[name, domain], tie)
                       for domain in seen.prompts if {(policy, domain), (name, domain)} <= seen.gold.keys()}
               for rival, name in rivals.items() if name in policies and name != policy}
    net = {rival: row["test"]["win"] - row["test"]["lose"] for rival, row in against.items()}
    return {"words": mean_words(texts), "distinct": distinct_share(texts), "self_bleu": self_bleu(texts),
            "against": against, "net": net}


def dig(tree: dict, *path):
    """tree[path[0]][path[1]]..., or None where the run lacks it or the figure is NaN (too few pairs)."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return None if tree is None or tree != tree else tree


def illness(results: dict) -> list[dict]:
    """What must be there before a cure is judged, a row each; "holds": True, False or None (cannot tell)."""
    rm0, late = results["rms"]["rm0"], {}
    for key in ("proxy", "gold"):  # gain over the second half of PPO: its last against its second quarter
        path = [x for curve in results["curves"] if arm_of(curve["policy"])[0] == "ppo" for x in curve[key]]
        q = len(path) // 4
        late[key] = np.mean(path[-q:]) - np.mean(path[q:2 * q]) if q else None

    def falls(before, after):
        return after < before

    def matched(name):
        return [dig(results, "rms", name, "shifted", side) for side in ("first", "second")]

    def spreads(unit, key):
        return [dig(rm0, where, unit, key) for where in ("spread_sft", "spread_shifted")]

    def policy(key):
        return [dig(results, "policies", name, key) for name in ("sft", results["shifted"])]

    noisy = 0.5 + 0.1 * (2 * results["ceiling"] - 1)  # what 60 % by gold comes to under the flips
    rows = [  # what; before and after PPO; the criterion in words and as a test; display scale
        ("RM0 on held-out pairs of D, % right by their noisy labels (before: chance)", [0.5, rm0["d_noisy"]],
         f"≥ {100 * noisy:.1f}: 60 seen through the flipped labels, whose ceiling is "
         f"{100 * results['ceiling']:.1f}", lambda _, x: x >= noisy, 100),
        ("the same by gold labels, %", [0.5, rm0["d_gold"]], "≥ 60", lambda _, x: x >= 0.6, 100),
        ("RM0 on the policy's samples at the same gold gap, % right", matched("rm0"),
         "≥ 10 points lower", lambda before, after: before - after >= 0.1, 100),
        ("an RM trained freshly on gold labels of such samples, on those pairs, % right", matched("oracle"),
         "after: ≥ 5 points above RM0", lambda _, x: x - matched("rm0")[1] >= 0.05, 100),
        ("J of RM0", spreads("raw", "J"), "falls", falls, 1),
        ("variance of RM0's reward difference, SD²", spreads("sd", "variance"), "falls", falls, 1),
        ("that variance over the gold difference's", [dig(rm0, "relative_sft"), dig(rm0, "relative_shifted")],
         "falls", falls, 1),
        ("RM0's reward of the policy, SD above SFT", policy("proxy"), "goes up", lambda _, x: x > 0, 1),
        ("gold reward of the policy, SD above SFT", policy("gold"),
         f"stalls or turns: over the second half of PPO it gains {show(late['gold'])}, less than a quarter "
         f"of the {show(late['proxy'])} of RM0's reward",
         lambda *_: late["gold"] < late["proxy"] / 4 if late["gold"] is not None else None, 1),
        ("mean length, words", policy("words"), "at least half", lambda before, x: x >= before / 2, 1),
        ("distinct responses, %", policy("distinct"), "≥ 50", lambda _, x: x >= 0.5, 100)]
    found = []
    for what, (before, after), criterion, test, scale in rows:
        holds = None if before is None or after is None else test(before, after)
        found.append({"what": what, "criterion": criterion, "holds": None if holds is None else bool(holds),
                      "before": before and scale * before, "after": after and scale * after})
    return found


CLAIMS = (  # of the paper: the figure to compare, display scale, margin (what one seed must show), in words
    ("rms", "", ("shifted", "second"), 100, 2, "RM: tells shifted responses apart better, % right"),
    ("rms", " adapted", ("shifted", "second"), 100, 2, "RM: the same with MetaRM's θ' for θ, % right"),
    ("rms", "", ("ood", "second"), 100, 2, "RM: tells responses to OOD prompts apart better, % right"),
    ("rms", "", ("d_gold",), 100, -2, "RM: no less accurate on held-out pairs of D (gold labels), % right"),
    ("rms", "", ("spread_shifted", "sd", "J"), 1, 0.01, "RM: larger J on the shifted set, SD units"),
    ("rms", " adapted", ("spread_shifted", "sd", "J"), 1, 0.01, "RM: the same with θ' for θ, SD units"),
    ("policies", "", ("gold",), 1, 0.1, "policy: more gold reward, SD above SFT"),
    ("policies", "", ("net", "sft"), 1, 5, "policy: better against SFT, wins minus losses, %"),
    ("policies", "", ("net", "dpo"), 1, 5, "policy: better against DPO, wins minus losses, %"),
    ("policies", "", ("self_bleu",), -1, 0.02, "policy: more diverse answers, minus Self-BLEU"))


def claims(results: dict) -> list[dict]:
    """MetaRM's last round beside the vanilla side (RM0, PPO on RM0) and the control (the reseeded plain RM).

    "points": for, against or neither way, by MetaRM - vanilla. "control_as_well": the reseeded side does as
    well as MetaRM, so the lookahead did not make the difference. Claims the run cannot speak to are left out.
    """
    last, found = results["last"].get("metarm"), []
    for group, suffix, path, scale, margin, what in CLAIMS:
        names = (f"metarm-{last}{suffix}", "rm0" if group == "rms" else f"ppo-{last}", f"reseeded-{last}")
        values = (dig(results, group, name, *path) for name in names)
        ours, vanilla, control = (None if x is None else scale * x for x in values)
        if ours is None or vanilla is None:
            continue
        gain = ours - vanilla
        points = "for" if gain >= margin else "against" if margin < 0 or gain <= -margin else "neither way"
        found.append({"what": what, "metarm": ours, "vanilla": vanilla, "control": control, "margin": margin,
                      "points": points,
                      "control_as_well": None if control is None else bool(control > ours - abs(margin))})
    return found


# ------------------------------------------------------------------------------------------------ the report

REPORT = """# What this run shows

A small language model, the SFT policy, answers customers at a help desk. A reward model, **RM0**, learns from
preference pairs D between its answers, and PPO moves the policy towards what RM0 likes. The answers drift
away from those that RM0 has learned from, and it judges them worse: that is the illness. **MetaRM** (Dou et
al., arXiv 2405.00438) trains the RM anew each round on the same D, and takes each gradient at θ', one small
step after driving apart its rewards for fresh, unlabelled responses of the current policy.

Two controls get the same PPO steps: RM0 kept for all rounds, and a **reseeded RM**, a plain one trained anew
each round with another seed and order of D. It matters: a policy trained on RM0 has sought out RM0's own
mistakes, so any other RM judges its answers better. Only what goes beyond the reseeded RM can be MetaRM's
doing.

The judge is the gold reward, rules that no model was shown. The figures are from {test} test prompts (OOD:
{ood} prompts on other topics), {k} responses each. SD is the standard deviation on SFT samples, of gold for
gold and of each RM for that RM: an RM that doubles its rewards has learned nothing. Two responses tie when
their gold rewards differ by less than {tie} ({tie_sd} SD).

**This is one seed, and one seed proves nothing**: the tables describe this run; they are no evidence on the
method.

## 1. Is the illness there?

RM0 and its policy, before PPO (SFT samples) and after {rounds} round(s) of it. Pairs are compared *at the
same gold gap*: as a policy narrows, its responses differ less in truth too, and any RM finds such pairs
harder. {true} of {signs} signs are there, {false} are not, {none} cannot be told (too few pairs, or the run
lacks a part). Pairs behind the third row: {pairs}.

{illness}
![reward difference over PPO](figures/fig1_reward_difference.png)

![proxy and gold reward over KL](figures/gold_over_kl.png)

## 2. Each round against SFT (the paper's Table 1)

Win / tie / lose in % by the gold reward, response against response; in brackets the mean gold reward, SD
above SFT.

{table1}
The policies themselves. RM: the reward by the RM behind them (RM0 for SFT and DPO), SD above SFT. KL to SFT
in nats a response, at the end of PPO. Distinct: different texts among all responses.

{policies}
## 3. The last round against the others (the paper's Table 2)

Win / tie / lose in % by the gold reward. PPO and reseeded: at the same round, so after equally many PPO
steps.

{table2}
## 4. The reward models

Accuracy in %. D: held-out pairs, by their noisy labels (ceiling {ceiling}: the rest are flipped) and by gold.
SFT: pairs of SFT samples. Shifted: one set for all RMs, the samples of *{shifted}*. OOD: that policy's
samples to OOD prompts. Own: samples of the policy that the RM trained. The last three are at the gold gaps of
the SFT pairs; in brackets, without that. ρ: rank correlation with gold within a prompt, on the shifted set.
θ': the RM after one more climb of J. RM0's own mistakes made the shifted set, so compare MetaRM with the
reseeded RM.

{accuracy}
How far apart the RMs hold responses to one prompt, on the shifted set: J (Eq. 2) and the mean |difference|,
raw and in SD units, and the variance of the difference over the gold difference's, both in SD units.

{spread}
![accuracy over the epoch](figures/fig4_rm_accuracy.png)

![reward differences](figures/fig5_reward_difference_distribution.png)

## 5. Diversity (the paper's Table 3)

Self-BLEU over n = 2..5 among the responses to one prompt: lower is more diverse.

{table3}
## 6. Five test prompts

The first five of the file and each policy's first response, none picked. RM: by the RM behind the policy (RM0
for SFT and DPO), SD above its mean on SFT samples. Gold: in points.

{examples}
## 7. In plain words

{words}
"""


def show(x, digits: int = 2, scale: float = 1) -> str:
    return "–" if x is None or x != x else f"{round(scale * x, digits) + 0.0:.{digits}f}".replace("-", "−")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in line) + " |\n"
                   for line in lines)


def title(name: str) -> str:
    arm, rounds = arm_of(name)
    return NAMES[arm] + (f", round {rounds}" if rounds else "") + (", θ'" if " adapted" in name else "")


def report(results: dict) -> str:
    """report.md from the figures alone: for somebody who has seen neither the code nor the paper."""
    policies, rms, last, signs = (results[key] for key in ("policies", "rms", "last", "illness"))
    rounds, ends = range(1, max(last.values()) + 1), [f"{arm}-{r}" for arm, r in last.items()]

    def versus(policy, rival, domain="test"):
        verdict = dig(policies, policy, "against", rival, domain)
        return " / ".join(show(verdict[side], 0) for side in ("win", "tie", "lose")) if verdict else "–"

    def both(row, column):
        matched, raw = (show(dig(row, column, kind), 1, 100) for kind in ("second", "raw"))
        return f"{matched} ({raw})" if column in row else "–"

    def example(prompt, answers):
        rows = [[title(a["policy"]), a["text"].strip() or "*(empty)*", show(a["proxy"]), show(a["gold"])]
                for a in answers]
        quoted = prompt.strip().replace("\n", "\n> ")
        return f"> {quoted}\n\n" + table(["policy", "response", "RM", "gold"], rows)

    return REPORT.format(
        test=results["prompts"]["test"], ood=results["prompts"].get("ood", 0), k=results["k"],
        tie=show(results["tie"]), tie_sd=show(results["tie"] / results["gold_sd"]), rounds=last["ppo"],
        signs=len(signs), **{name: sum(sign["holds"] is answer for sign in signs)
                             for name, answer in (("true", True), ("false", False), ("none", None))},
        pairs="{first_pairs} before, {second_pairs} after".format(**rms["rm0"]["shifted"]),
        illness=table(["", "before", "after", "criterion", "there?"], [
            [sign["what"], *(show(x, 3 if x and abs(x) < 10 else 1) for x in (sign["before"], sign["after"])),
             sign["criterion"],
             {True: "yes", False: "**no**", None: "–"}[sign["holds"]]] for sign in signs]),
        table1=table(["arm", *(f"round {r}" for r in rounds)], [
            [NAMES[arm], *(f"{versus(p, 'sft')} ({show(dig(policies, p, 'gold'))})" for r in rounds
                           for p in [f"{arm}-{r}"])] for arm in last]),
        policies=table(["policy", "RM", "gold", "KL", "words", "distinct %"], [
            [title(p), show(row["proxy"]), show(row["gold"]), show(row["kl"], 1), show(row["words"], 1),
             show(row["distinct"], 0, 100)] for p, row in policies.items()]),
        table2=table(["arm", "against SFT", "PPO on RM0", "DPO", "reseeded RM", "SFT, on OOD prompts"], [
            [title(p), *(versus(p, rival) for rival in ("sft", "ppo", "dpo", "reseeded")),
             versus(p, "sft", "ood")] for p in ends]),
        ceiling=show(results["ceiling"], 1, 100), shifted=title(results["shifted"]),
        accuracy=table(["RM", "D, noisy", "D, gold", "SFT", "shifted", "OOD", "own", "ρ"], [
            [title(name), *(show(row[key], 1, 100) for key in ("d_noisy", "d_gold", "sft")),
             *(both(row, column) for column in ("shifted", "ood", "own")), show(row["rank_shifted"])]
            for name, row in rms.items()]),
        spread=table(["RM", "J", "J, SD units", "mean difference", "in SD", "variance over gold's"], [
            [title(name), *(show(row["spread_shifted"][unit][key], 3) for key in ("J", "margin")
                            for unit in ("raw", "sd")), show(row["relative_shifted"])]
            for name, row in rms.items()]),
        table3=table(["policy", "Self-BLEU"], [
            [title(p), show(policies[p]["self_bleu"])] for p in ("sft", "dpo", *ends) if p in policies]),
        examples="\n".join(example(**row) for row in results["examples"]), words=plain_words(results))


def plain_words(results: dict) -> str:
    """What pointed for and against the paper, made from the figures: no verdict is written beforehand."""
    missing, found = [sign["what"] for sign in results["illness"] if not sign["holds"]], results["claims"]
    text = ("Every sign of the illness is there, so there is something to cure.\n\n" if not missing else
            f"Not every sign of the illness is there, which weakens what follows. Missing or untold: "
            f"{'; '.join(missing)}.\n\n")
    if not found:
        return text + "The run has no MetaRM round, so nothing can be said about the method."
    sides = {side: [claim for claim in found if claim["points"] == side]
             for side in ("for", "against", "neither way")}
    tally = ", ".join(f"{len(rows)} {side}" for side, rows in sides.items())
    text += (f"The paper's claims, for round {results['last']['metarm']} of MetaRM beside the vanilla side "
             f"(RM0, and PPO on RM0 for as many rounds): {tally}. A difference within the margin points "
             f"neither way; a negative margin allows for a loss. The last column tells whether the reseeded "
             f"RM does as well as MetaRM, within the margin; if it does, the lookahead is not what made the "
             f"difference.\n\n")
    text += table(["claim", "MetaRM", "vanilla", "reseeded", "margin", "points", "reseeded as well?"], [
        [claim["what"], *(show(claim[key]) for key in ("metarm", "vanilla", "control", "margin")),
         claim["points"], {True: "yes", False: "no", None: "–"}[claim["control_as_well"]]]
        for claim in found])
    beyond = [claim for claim in sides["for"] if claim["control_as_well"] is False]
    for side, rows in (("For the paper, beyond the control", beyond),
                       ("Against the paper", sides["against"])):
        text += f"\n{side}: " + ("; ".join(claim["what"] for claim in rows) or "nothing") + ".\n"
    return text + "\nAnother seed may change any of these lines."


# ---------------------------------------------------------------------------------------------- the pictures

def figures(results: dict, seen: Seen, folder: Path) -> None:
    """The four pictures. A title says what this run's numbers say; an arm has one colour throughout."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    rms, shifted, curves, last = (results[key] for key in ("rms", "shifted", "curves", "last"))

    def save(figure, name, heading):
        figure.suptitle(heading, fontsize=11.5)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.tmp", dpi=150, format="png")
        os.replace(folder / f"{name}.tmp", folder / f"{name}.png")
        plt.close(figure)

    def differences(name, policy):
        rewards = seen.scores[name, policy, "test"]
        return reward_gaps(rewards, rewards)[0] / rms[name]["reward_sd"]

    # Figure 1 of the paper: does the reward difference shrink, and by more than the truth does?
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), width_ratios=(1.5, 1))
    vanilla = [curve for curve in curves if arm_of(curve["policy"])[0] == "ppo" and "gold_variance" in curve]
    starts, ends = np.cumsum([0] + [curve["steps"] for curve in vanilla]), {}
    for name, key in (("rm0", "proxy_variance"), ("gold", "gold_variance")):
        x = [start + step for start, curve in zip(starts, vanilla) for step in curve["step"]]
        y = np.array([value for curve in vanilla for value in curve[key]])
        if len(y) and y[0] > 0:
            left.plot(x, y / y[0], color=COLOURS[name], ls="--" if name == "gold" else "-", label=NAMES[name])
            ends[name] = y[-1] / y[0]
    left.axhline(1, color="#BBBBBB", lw=0.8, zorder=0)
    left.set(xlabel="PPO step", ylabel="variance of the difference\n(share of its start)", ylim=(0, None))
    left.legend(*left.get_legend_handles_labels())
    both = {"before PPO": differences("rm0", "sft"), "after PPO": differences("rm0", shifted)}
    edges = np.linspace(-1, 1, 42) * max(np.quantile(np.abs(np.concatenate([*both.values()])), 0.99), 1e-6)
    for (label, x), arm in zip(both.items(), ("sft", "ppo")):  # x and -x: neither response is the first
        right.hist(np.concatenate([x, -x]), edges, density=True, color=COLOURS[arm], alpha=0.55, label=label)
    right.set(xlabel="RM0's reward difference, SD on SFT samples", ylabel="density")
    right.legend()
    save(figure, "fig1_reward_difference", f"Over PPO, the variance of RM0's reward difference goes to "
         f"{show(ends.get('rm0'))} of its start, the gold difference's to {show(ends.get('gold'))}")

    # Figure 4: what does the meta step cost in accuracy on D?
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in results["epochs"].items():
        (arm, rounds), (x, y) = arm_of(name), np.array(points).T
        axes.plot(x, 100 * y, {1: ".:", 2: ".--"}.get(rounds, ".-"), color=COLOURS[arm], label=title(name))
    axes.axhline(100 * results["ceiling"], color="black", lw=0.8, ls="-.", label="ceiling (flipped labels)")
    axes.set(xlabel="share of the epoch", ylabel="accuracy on held-out pairs of D, %")
    axes.legend(fontsize=8, ncols=2)
    ends = [100 * points[-1][1] for points in results["epochs"].values()]
    save(figure, "fig4_rm_accuracy", "No accuracy was logged over the epoch" if not ends else
         f"After one epoch, the RMs' accuracies lie within {show(np.ptp(ends), 1)} points")

    # Figure 5: who holds shifted responses further apart, each on the scale of its own rewards?
    figure, axes = plt.subplots(figsize=(7, 4))
    names = [name for name in ("rm0", *(f"{arm}-{last.get(arm)}" for arm in RL_ARMS)) if name in rms]
    x = {name: np.abs(differences(name, shifted)) for name in names}
    edges = np.linspace(0, max(np.quantile(np.concatenate([*x.values()]), 0.99), 1e-6), 26)
    for name in names:
        axes.hist(x[name], edges, density=True, histtype="step", lw=1.8, color=COLOURS[arm_of(name)[0]],
                  label=f"{title(name)}: mean {show(x[name].mean())}")
    axes.set(ylabel="density", xlabel=f"|reward difference| of two responses of {title(shifted)}, SD on SFT")
    axes.legend()
    ratio = x[names[-1]].mean() / (x["rm0"].mean() or np.nan)
    save(figure, "fig5_reward_difference_distribution", "On the shifted set, the mean |reward difference| of "
         f"{NAMES[arm_of(names[-1])[0]]} is {show(ratio)} times RM0's")

    # Gao et al. 2022: what the policy pays in KL, what it believes to get for it, and what it gets
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4), sharex=True, sharey=True)
    for axes, key, heading in zip(panels, ("proxy", "gold"), ("reward by the RM in use", "gold reward")):
        for curve in curves:
            arm, rounds = arm_of(curve["policy"])
            axes.plot(curve["kl"], curve[key], color=COLOURS[arm], label=NAMES[arm] if rounds == 1 else None)
            axes.plot(curve["kl"][-1], curve[key][-1], "o", color=COLOURS[arm], ms=5)
        axes.axhline(0, color="#BBBBBB", lw=0.8, zorder=0)
        axes.set_title(f"{heading} (dot: end of a round)", fontsize=10)
        axes.set(xlabel="KL to the SFT policy, nats a response", ylabel="SD above SFT")
    panels[0].legend(*panels[0].get_legend_handles_labels())
    end = results["policies"][shifted]
    save(figure, "gold_over_kl", f"After PPO, RM0 puts its policy {show(end['proxy'])} SD above SFT, "
         f"the gold reward {show(end['gold'])} SD")


# -------------------------------------------------------------------------------------------------- plumbing

@dataclass
class EvalConfig:
    run: str = field(metadata={"help": "folder of a run as run.sh lays it out, e.g. runs/toy"})
    seed: int = field(default=0, metadata={"help": "of the sampling, the same for every policy"})
    k: int = field(default=5, metadata={"help": "responses a prompt"})
    temperature: float = field(default=1.0, metadata={"help": "divides the logits"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus to sample from (paper: 0.9)"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "of the sampling (paper: 1.1)"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest response, in tokens"})
    batch_size: int = field(default=256, metadata={"help": "responses sampled or scored at once"})
    tie: float = field(default=0.25, metadata={"help": "gold gaps under this many SDs on SFT are ties"})


def judge(prompts: list[str], responses: list[list[str]]) -> np.ndarray:
    """(m, k) gold rewards: the one place where the truth comes in, or where another judge would."""
    return np.array([[data.gold_reward(prompt, text) for text in group]
                     for prompt, group in zip(prompts, responses)])


def layout(run: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The policies and the reward models that a run holds so far, {name: folder}, in the tables' order."""
    rounds = [f"{arm}-{r}" for arm in RL_ARMS for r in range(1, 100) if (run / f"{arm}-{r}").is_dir()]
    policies = {"sft": run / "sft", "dpo": run / "dpo", **{name: run / name / "policy" for name in rounds}}
    models = {"rm0": run / "rm0"}
    for name in rounds:
        models |= {name: run / name / "rm", f"{name} adapted": run / name / "adapted"}
    models["oracle"] = run / "oracle" / "rm"
    for folder in (run / "sft", run / "rm0", run / "ppo-1" / "policy"):
        if not folder.is_dir():
            raise ValueError(f"--run {run}: {folder} is missing, and a report needs at least sft, rm0 and "
                             f"ppo-1/policy; finish the run first (bash run.sh)")
    return tuple({name: path for name, path in all_.items() if path.is_dir()} for all_ in (policies, models))


def kept(path: Path, made_from: dict, make) -> list[dict]:
    """The rows in the file `path` if they were made from the same things, else make()'s, kept there."""
    if path.exists():
        head, *rows = data.read_jsonl(path)
        if head == {"made_from": made_from}:
            return rows
    rows = make()
    data.write_jsonl(path, [{"made_from": made_from}, *rows])
    return rows


def look(config: EvalConfig, policies: dict, models: dict, prints: dict) -> Seen:
    """Samples and scores whatever is not yet in RUN/eval. `prints`: fingerprints of all inputs by name."""
    from tqdm import tqdm
    run, device, last = Path(config.run), rm.pick_device(), last_rounds(policies)
    (run / "eval").mkdir(exist_ok=True)
    options = {name: value for name, value in asdict(config).items() if name not in ("run", "tie")}
    prompts = {domain: data.read_prompts(run / "data" / f"prompts-{domain}.jsonl")
               for domain in ("test", "ood") if domain == "test" or "prompts-ood" in prints}
    pairs = data.read_preferences(run / "pairs" / "valid.jsonl")
    # the held-out pairs of D join the sample sets, with k = 2 "responses", chosen and rejected
    texts = {("D", "pairs"): ([pair["prompt"] for pair in pairs],
                              [[pair["chosen"], pair["rejected"]] for pair in pairs])}

    def sample(policy, domain):
        model, tokenizer = ppo.load_policy(str(policies[policy]))
        groups = ppo.sample_responses(model.to(device), tokenizer, prompts[domain], **options)
        return [{"prompt": prompt, "responses": group} for prompt, group in zip(prompts[domain], groups)]

    jobs = [(policy, domain) for policy in policies for domain in prompts
            if domain == "test" or policy == "sft" or arm_of(policy) in last.items()]
    for policy, domain in tqdm(jobs, desc="eval: sampling", mininterval=1):
        made_from = {"policy": prints[policy], "prompts": prints[f"prompts-{domain}"], **options}
        rows = kept(run / "eval" / f"{policy}-{domain}.jsonl", made_from, lambda: sample(policy, domain))
        texts[policy, domain] = (prompts[domain], [row["responses"] for row in rows])

    def score(name, keys):
        model, tokenizer = rm.load_reward_model(str(models[name]))
        model.to(device)
        for key in keys:
            flat = [(prompt, text) for prompt, group in zip(*texts[key]) for text in group]
            rewards = rm.score(model, tokenizer, *zip(*flat), config.batch_size)
            yield {"set": list(key), "rewards": rewards.reshape(len(texts[key][0]), -1).tolist()}

    scores, shifted = {}, f"ppo-{last['ppo']}"
    for name in tqdm(models, desc="eval: scoring", mininterval=1):
        keys = [("D", "pairs"), ("sft", "test"), (shifted, "test"), (shifted, "ood"),
                *((policy, "test") for policy in policies if trainer_of(policy) == name)]
        keys = [key for key in dict.fromkeys(keys) if key in texts]
        made_from = {"rm": prints[f"rm {name}"], "pairs": prints["pairs"], **options,
                     "samples": [[*key, prints.get(key[0]), prints.get(f"prompts-{key[1]}")] for key in keys]}
        path = run / "eval" / f"scores-{name.replace(' ', '-')}.jsonl"
        for row in kept(path, made_from, lambda: list(score(name, keys))):
            scores[name, *row["set"]] = np.array(row["rewards"])

    gold = {key: judge(*pair) for key, pair in texts.items()}
    scores["gold", "D", "pairs"] = gold.pop(("D", "pairs"))
    held_out = {name: scores[name, "D", "pairs"] @ [1, -1] for name in (*models, "gold")}
    rollouts, epochs = {}, {}
    for policy, folder in policies.items():
        if (folder / "rollouts.jsonl").exists() and trainer_of(policy) in models:
            rollouts[policy] = [{"step": row["step"], "kl": row["kl"], "scores": np.array(row["scores"]),
                                 "gold": judge(row["prompts"], row["responses"])}
                                for row in data.read_jsonl(folder / "rollouts.jsonl")]
    for name, folder in models.items():
        if name != "oracle" and (folder / "log.jsonl").exists():  # the oracle was trained on other pairs
            log = data.read_jsonl(folder / "log.jsonl")
            epochs[name] = [[row["step"] / max(1, log[-1]["step"]), row["accuracy"]]
                            for row in log if "accuracy" in row]
    responses = {key: groups for key, (_, groups) in texts.items()}
    epochs = {name: points for name, points in epochs.items() if points}
    return Seen(prompts, responses, gold, scores, held_out, rollouts, epochs)


def tidy(x):
    """x in JSON's own types; floats rounded to 6 digits, NaN as null: one seed, the same bytes."""
    return json.loads(json.dumps(x, default=lambda number: number.item()), parse_constant=lambda _: None,
                      parse_float=lambda digits: round(float(digits), 6) + 0.0)  # + 0.0: no "-0.0"


def evaluate(config: EvalConfig) -> None:
    run = Path(config.run)
    if config.k < 2:
        raise ValueError(f"--k {config.k}: a difference between responses needs at least 2 of them")
    policies, models = layout(run)
    inputs = {**policies, **{f"rm {name}": path for name, path in models.items()},
              **{f"prompts-{domain}": run / "data" / f"prompts-{domain}.jsonl" for domain in ("test", "ood")},
              "pairs": run / "pairs" / "valid.jsonl",
              "measures": Path(__file__), "judge": Path(data.__file__)}  # an edited rule counts
    prints = {name: data.fingerprint(str(path)) for name, path in inputs.items() if path.exists()}
    options = {name: value for name, value in asdict(config).items() if name != "run"}
    stage = tidy({"options": options, "inputs": prints})
    with data.locked(str(run / "eval.lock")):
        if (data.read_json(run / "results.json") or {}).get("stage") == stage:
            print(f"eval.py: {run / 'report.md'} is up to date, with the same options and inputs: skipped")
            return
        seen = look(config, policies, models, prints)
        found = measure(seen, config.tie)
        # results.json vouches for report and pictures: first the old one goes, last the new one comes
        (run / "results.json").unlink(missing_ok=True)
        (run / "figures").mkdir(exist_ok=True)
        figures(found, seen, run / "figures")
        data.write_text(run / "report.md", report(found))
        text = json.dumps(tidy({"stage": stage, **found}), indent=1, sort_keys=True, ensure_ascii=False)
        data.write_text(run / "results.json", text + "\n")
    points = Counter(claim["points"] for claim in found["claims"])
    print(f"eval.py: {run / 'report.md'}: {sum(sign['holds'] is True for sign in found['illness'])} of "
          f"{len(found['illness'])} signs of the illness; the paper's claims: {points['for']} for, "
          f"{points['against']} against, {points['neither way']} neither way (one seed)")


def main(argv: list[str] | None = None) -> int:
    return data.command("eval.py", EvalConfig, evaluate, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
