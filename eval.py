r"""The report on a run, and the comparison of any two policies by a reward model.

    python eval.py --run runs/toy                            judged by the toy world's gold reward
    python eval.py --run runs/hh --judge runs/hh/judge/rm    judged by a reward model
    python eval.py --runs runs/toy-0,runs/toy-1              the tables over several seeds, printed
    python eval.py --judge RM --policies A,B --prompts FILE --out DIR

--run writes RUN/figures/*.png, report.md, answers/*.json and, last, results.json; it keeps samples
in RUN/eval. Answers are in AlpacaEval's format. GPT-4 as the judge, as in the paper, is then

    alpaca_eval --model_outputs RUN/answers/metarm-3.json --reference_outputs RUN/answers/sft.json \
        --annotators_config alpaca_eval_gpt4 --fn_metric get_winrate --sort_by win_rate
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import data
import metarm
import ppo
import rm


# ------------------------------------ measures: arrays in, numbers out; m prompts, k responses each
def reward_gaps(rewards: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r_i - r_j and gold_i - gold_j of all i < j of each prompt: (m, k) twice -> (m·k(k-1)/2,)."""
    rewards, gold = np.asarray(rewards, float), np.asarray(gold, float)
    if rewards.ndim != 2 or rewards.shape != gold.shape or rewards.shape[1] < 2:
        raise ValueError(f"(m, k) twice, k >= 2, is needed; got {rewards.shape} and {gold.shape}")
    i, j = np.triu_indices(rewards.shape[1], 1)
    return (rewards[:, i] - rewards[:, j]).ravel(), (gold[:, i] - gold[:, j]).ravel()


def agreement(gap: np.ndarray, gold_gap: np.ndarray) -> np.ndarray:
    """1 where the gap has the sign of the gold gap, 0 where it has the other, 1/2 if one is 0."""
    return 0.5 + 0.5 * np.sign(gap) * np.sign(gold_gap)


def pair_accuracy(rewards: np.ndarray, gold: np.ndarray, tie: float = 0.0) -> tuple[float, int]:
    """(share of pairs ordered as gold orders them, pairs used); |gold gap| < tie, or 0, is out."""
    gap, gold_gap = reward_gaps(rewards, gold)
    right = agreement(gap, gold_gap)[(np.abs(gold_gap) >= tie) & (gold_gap != 0)]
    return (float(right.mean()) if len(right) else np.nan), len(right)


def matched_accuracy(first: tuple, second: tuple, edges: np.ndarray, minimum: int = 20) -> dict:
    """Accuracy on two sets, (rewards, gold), AT THE SAME GOLD GAP: {"first", "second", *_pairs}.

    As a policy narrows, its responses differ less in truth too: harder for any RM. So accuracy is
    taken in bins of |gold gap| with `minimum` pairs of both sets, weighted by the first's pairs.
    """
    pairs, shares, found = [], [], {}
    for rewards, gold in (first, second):
        gap, gold_gap = reward_gaps(rewards, gold)
        right, size = agreement(gap, gold_gap)[gold_gap != 0], np.abs(gold_gap[gold_gap != 0])
        pairs.append(np.histogram(size, edges)[0])
        shares.append(np.histogram(size, edges, weights=right)[0] / np.maximum(pairs[-1], 1))
    used = np.minimum(*pairs) >= max(minimum, 1)
    for name, share, n in zip(("first", "second"), shares, pairs, strict=True):
        mean = np.average(share[used], weights=pairs[0][used]) if used.any() else np.nan
        found |= {name: float(mean), f"{name}_pairs": int(n[used].sum())}
    return found


def rank_correlation(rewards: np.ndarray, gold: np.ndarray) -> tuple[float, int]:
    """(mean Spearman correlation within a prompt, prompts used); a constant side has none."""
    # sum_j sign(x_i - x_j) is twice the rank of x_i less the mean rank: all that Pearson needs
    both = np.asarray(rewards), np.asarray(gold)
    a, b = (np.sign(x[:, :, None] - x[:, None, :]).sum(-1) for x in both)
    length = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    found = (a * b).sum(-1)[length > 0] / length[length > 0]
    return (float(found.mean()) if len(found) else np.nan), len(found)


def spread(rewards: np.ndarray, scale: float = 1.0) -> dict:
    """How far apart an RM holds responses: J of Eq. 2, mean |r_i - r_j|, mean (r_i - r_j)^2. An RM
    that doubles its rewards, (m, k), raises all three and has learned nothing: hence `scale`."""
    rewards = np.asarray(rewards, float) / scale
    gap, _ = reward_gaps(rewards, rewards)
    J = float(metarm.difference_loss(torch.as_tensor(rewards)))
    return {"J": J, "margin": float(np.abs(gap).mean()), "variance": float((gap**2).mean())}


def win_tie_lose(ours: np.ndarray, theirs: np.ndarray, tie: float) -> dict:
    """Percent {"win", "tie", "lose"} of our entries against theirs; a gap < tie, or 0, is a tie."""
    gap = np.asarray(ours, float) - np.asarray(theirs, float)
    tied = (np.abs(gap) < tie) | (gap == 0)
    sides = {"win": ~tied & (gap > 0), "tie": tied, "lose": ~tied & (gap < 0)}
    return {side: 100 * float(which.mean()) for side, which in sides.items()}


def bleu(hypothesis: list[str], references: list[list[str]], longest: int = 5) -> list[float]:
    """BLEU-1 .. BLEU-longest of a list of words against others (Papineni et al. 2002), in 0 .. 1.
    An n-gram length without a match counts as 0.1 matches (method 1 of Chen & Cherry 2014)."""
    logs, texts = [], [hypothesis, *references]
    for n in range(1, min(longest, len(hypothesis)) + 1):
        ours, *others = (Counter(zip(*(x[i:] for i in range(n)), strict=False)) for x in texts)
        most = Counter()
        for other in others:
            most |= other  # an n-gram counts as often as in the text that has it most often
        logs.append(np.log(max((ours & most).total(), 0.1) / ours.total()))
    if not logs:
        return [float([] in references)] * longest
    closest = min((abs(len(words) - len(hypothesis)), len(words)) for words in references)[1]
    too_short = min(0.0, 1 - closest / len(hypothesis))
    return [float(np.exp(np.mean(logs[:n]) + too_short)) for n in range(1, longest + 1)]


def self_bleu(responses: list[list[str]]) -> float:
    """Mean BLEU-2..5 of each response against the others to its prompt; 1: all say the same."""
    found = []
    for group in responses:
        words = [text.split() for text in group]
        found += [bleu(words[i], words[:i] + words[i + 1 :])[1:] for i in range(len(words))]
    return float(np.mean(found))


def distinct_share(responses: list[list[str]]) -> float:
    """Different texts among all responses; a policy with one answer for all has 1/(m·k)."""
    return len({text for group in responses for text in group}) / sum(map(len, responses))


def mean_words(responses: list[list[str]]) -> float:
    return float(np.mean([len(text.split()) for group in responses for text in group]))


# ------------------------------------------------------------------------ what is measured of a run
# Policies are called "sft", "dpo" and ARM-r (after round r of an arm). RMs are called "rm0",
# "oracle" (of gold labels), ARM-r (behind that policy) and "metarm-r adapted" (that RM at θ').
# `by` is whose word is taken for the truth: "gold" or, with --judge, "judge".

ARMS = dict(sft="SFT", dpo="DPO", ppo="PPO on RM0", reseeded="reseeded RM", metarm="MetaRM")
NAMES = ARMS | dict(rm0="RM0", oracle="gold-label RM")
COLOURS = dict(ppo="#0072B2", reseeded="#009E73", metarm="#D55E00")
GAP_EDGES = (0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, np.inf)  # bins of |gold gap|, in SDs
MIN_PAIRS = 20  # no accuracy is told on fewer pairs


def arm_of(name: str) -> tuple[str, int]:
    """("metarm", 2) of "metarm-2" and of "metarm-2 adapted", ("sft", 0) of "sft"."""
    arm, _, rounds = name.split()[0].partition("-")
    return arm, int(rounds or 0)


def title(name: str) -> str:
    arm, rounds = arm_of(name)
    return NAMES[arm] + f", round {rounds}" * (rounds > 0) + ", θ'" * name.endswith(" adapted")


def trainer_of(policy: str) -> str:
    """The RM that a policy was trained on; RM0 also stands in for SFT and DPO, which had none."""
    return policy if arm_of(policy)[0] in ("reseeded", "metarm") else "rm0"


def last_rounds(policies) -> dict[str, str]:
    """{arm: its policy of the last round}, for the arms that PPO trains."""
    return {arm_of(name)[0]: name for name in sorted(policies, key=arm_of) if arm_of(name)[1]}


def measure(prompts, responses, scores, rollouts, epochs, kl, by="gold", tie=0.25) -> dict:
    """All figures of a run, as results.json holds them.

    prompts: {domain: texts}; domains are "test", "ood" and "pairs", the held-out pairs of D.
    responses: {(policy, domain): m lists of k texts}; [chosen, rejected] at ("D", "pairs").
    scores: {(judge, policy, domain): (m, k) rewards}; judges are the RMs and `by`.
    rollouts: {policy: one {"KL": nats, "RM": (b, g) rewards, `by`: (b, g)} per PPO step}.
    epochs: {RM: [[step, % right on D]]}. kl: {policy: nats per response}.
    tie: rewards closer than this many SDs of `by` are tied.
    """

    def in_sd(judge, rewards):  # SDs of this judge's rewards on SFT samples, above their mean
        on_sft = scores[judge, "sft", "test"]
        return (np.asarray(rewards) - on_sft.mean()) / (on_sft.std() or 1.0)

    if len(prompts["pairs"]) < MIN_PAIRS:  # too few to tell anything
        scores = {key: x * np.nan if key[2] == "pairs" else x for key, x in scores.items()}
    z = {key: in_sd(key[0], rewards) for key, rewards in scores.items()}
    names, policies, curves = [x for x, domain in responses if domain == "test"], {}, {}
    for policy in names:
        texts, rounds, against = responses[policy, "test"], arm_of(policy)[1], {}
        figures = {"RM": z[trainer_of(policy), policy, "test"].mean(), "KL": kl.get(policy)}
        figures |= {by: z[by, policy, "test"].mean(), "words": mean_words(texts)}
        figures |= {"distinct": distinct_share(texts), "Self-BLEU": self_bleu(texts)}
        for rival, domain in responses:  # SFT, DPO, and the other arms' policies of the same round
            in_round = rounds and arm_of(rival)[1] in (0, rounds) and rival != policy
            if in_round and (policy, domain) in responses:
                name = ARMS[arm_of(rival)[0]] + ", OOD" * (domain == "ood")
                against[name] = win_tie_lose(z[by, policy, domain], z[by, rival, domain], tie)
        policies[policy] = {"against": against, "figures": figures}
    for policy, steps in rollouts.items():
        curves[policy] = {"KL": [step["KL"] for step in steps]}
        for name, judge in (("RM", trainer_of(policy)), (by, by)):
            rewards = [in_sd(judge, step[name]) for step in steps]
            variance = [spread(x)["variance"] if x.shape[1] > 1 else np.nan for x in rewards]
            curves[policy] |= {name: [x.mean() for x in rewards], f"variance by {name}": variance}
    last, models = last_rounds(names), [x for x, y, _ in scores if y == "D" and x != by]
    results = dict(by=by, tie=tie, k=len(texts[0]), last=last, policies=policies, curves=curves)
    results["prompts"] = {domain: len(texts) for domain, texts in prompts.items()}
    results["epochs"], results["examples"] = epochs, []
    for i, prompt in enumerate(prompts["test"][:5]):
        shown = [policy for policy in names if policy in ("sft", "dpo", *last.values())]
        answers = {title(policy): responses[policy, "test"][i][0] for policy in shown}
        results["examples"].append([prompt, answers])
    results["ceiling"] = 100 * agreement(scores[by, "D", "pairs"] @ [1, -1], 1).mean()
    results["rms"] = {name: measure_rm(scores, z, name, last["ppo"], by, tie) for name in models}
    return results | {"criteria": criteria(results)}


def measure_rm(scores: dict, z: dict, name: str, shifted: str, by: str, tie: float) -> dict:
    """One RM: % right, and how far apart it holds responses of SFT and of the shifted policy. `z`
    is `scores` in SDs. Accuracy off D is taken at the same gold gap as on SFT samples."""
    ours, truth = scores[name, "D", "pairs"], scores[by, "D", "pairs"]
    right = {"D, noisy": 100 * agreement(ours @ [1, -1], 1).mean()}
    right[f"D, {by}"] = 100 * pair_accuracy(ours, truth)[0]
    row, sft = {"accuracy": right}, (z[name, "sft", "test"], z[by, "sft", "test"])
    edges = [tie, *(edge for edge in GAP_EDGES if edge > tie)]
    for column, domain in (("shifted", "test"), ("OOD", "ood")):
        if (name, shifted, domain) in z:
            pair = z[name, shifted, domain], z[by, shifted, domain]
            found = matched_accuracy(sft, pair, edges, MIN_PAIRS)
            right |= {f"SFT for {column}": 100 * found["first"], column: 100 * found["second"]}
    for column, policy in (("sft", "sft"), ("shifted", shifted)):
        pair = z[name, policy, "test"], z[by, policy, "test"]
        ours, theirs = spread(pair[0]), spread(pair[1])["variance"] or np.nan
        row[column] = {"J": spread(scores[name, policy, "test"])["J"], "J, SD units": ours["J"]}
        row[column] |= {"gap, SD": ours["margin"], "variance, SD²": ours["variance"]}
        gaps = np.abs(reward_gaps(*[z[name, policy, "test"]] * 2)[0])
        row[column] |= {"gaps": np.quantile(gaps, np.arange(0, 0.98, 0.02)).tolist()}
        row[column] |= {"ratio": ours["variance"] / theirs, "ρ": rank_correlation(*pair)[0]}
    return row


def criteria(results: dict) -> dict[str, dict]:
    """What must hold if RM0 went stale: {what: {"before", "after", "criterion", "holds"}}."""
    by, rms, end, found = results["by"], results["rms"], results["last"]["ppo"], {}

    def add(what, before, after, sign, bound, lacks=""):
        found[what] = dict(before=before, after=after, criterion=f"{sign} {show(bound)}")
        found[what]["holds"] = bool(after > bound if sign == ">" else after < bound)
        if np.isnan([after, bound]).any():
            found[what] = dict(before=None, after=None, criterion=f"left out: {lacks}", holds=None)

    rm0, right, few = rms["rm0"], rms["rm0"]["accuracy"], f"fewer than {MIN_PAIRS} pairs"
    fresh = rms["oracle"]["accuracy"] if "oracle" in rms else dict.fromkeys(right, np.nan)
    bar = 50 + (results["ceiling"] - 50) / 5  # a fifth of the way from chance to what `by` gets
    add("RM0 right on held-out pairs of D, %", None, right["D, noisy"], ">", bar, few)
    add(f"the same by {by}, %", None, right[f"D, {by}"], ">", 60, few)
    was, now = right["SFT for shifted"], right["shifted"]
    add(f"RM0 right on answers at the same gap by {by}, %", was, now, "<", was - 10, few)
    was, then = fresh["SFT for shifted"], fresh["shifted"]
    add("a new RM, trained on gold labels there, %", was, then, ">", now + 5, "no such RM")
    names = "J of RM0", "variance of RM0's reward difference, SD²", f"the same over that by {by}"
    for key, what in zip(("J", "variance, SD²", "ratio"), names, strict=True):
        add(what, rm0["sft"][key], rm0["shifted"][key], "<", rm0["sft"][key])
    sft, first, last = (results["policies"][name]["figures"] for name in ("sft", "ppo-1", end))
    add("reward predicted by RM0, SD above SFT", sft["RM"], last["RM"], ">", sft["RM"])
    bound = first[by] + 0.1 if end != "ppo-1" else np.nan
    add(f"{by} reward, SD (before: round 1)", first[by], last[by], "<", bound, "one round only")
    add("mean length, words", sft["words"], last["words"], ">", sft["words"] / 2)
    add("distinct responses, share", sft["distinct"], last["distinct"], ">", 0.5)
    return found


# ------------------------------------------------------------------------------ pictures and report
def figures(results: dict, folder: Path) -> None:
    """Draws the four pictures, under headings that say what this run's numbers say."""
    from matplotlib import figure

    by, curves, rms, last = (results[key] for key in ("by", "curves", "rms", "last"))

    def smooth(arm, key):  # a step has few rollouts: each point is the mean of up to 9 steps
        y = np.array(sum((curves[x][key] for x in curves if arm_of(x)[0] == arm), []), float)
        return [y[i - min(4, i) : i + min(4, i) + 1].mean() for i in range(len(y))]

    def draw(name, heading, lines, xlabel, ylabel):  # lines: x, y, arm, style, label
        axes = figure.Figure((9, 4), layout="tight").subplots()
        for x, y, arm, style, label in lines:
            axes.plot(x, y, style, color=COLOURS.get(arm, COLOURS["ppo"]), label=label, lw=2.2)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(heading, loc="left")
        if lines:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.figure.savefig(folder / f"{name}.tmp", dpi=150, format="png")
        (folder / f"{name}.tmp").replace(folder / f"{name}.png")

    def over_ppo(arms, keys, kl):
        lines, ends = [], []
        for key, style, judge in zip(keys, ("-", "--"), ("its RM", by), strict=True):
            for arm in arms:
                y, label = smooth(arm, key), f"{NAMES[arm]}, by {judge}"
                lines.append((smooth(arm, "KL") if kl else range(len(y)), y, arm, style, label))
            y = smooth("ppo", key)
            ends.append(f"{show(*y[:1])} → {show(*y[-1:])} by {judge}")
        return f"PPO on RM0: {', '.join(ends)}", lines

    # Paper's Figure 1: RM0 holds its policy's answers less and less apart. And in truth?
    keys = "variance by RM", f"variance by {by}"
    y = "variance of two answers' gap, SD²"
    draw("fig1_reward_difference", *over_ppo(["ppo"], keys, False), "PPO step", y)
    # Gao et al. 2022: what a policy pays in KL, what its RM predicts for that, and what it gets.
    x = "KL to the SFT policy, nats per response"
    draw("gold_over_kl", *over_ppo(last, ("RM", by), True), x, "mean reward, SD above SFT")
    # Paper's Figure 4: does the meta step cost accuracy on D?
    lines = []
    for name, points in results["epochs"].items():
        style = {1: ":", 2: "--"}.get(arm_of(name)[1], "-")
        lines.append((*np.array(points).T, arm_of(name)[0], style, title(name)))
    apart = show(np.ptp([line[1][-1] for line in lines] or [0]))
    heading = f"At the end, the RMs lie within {apart} points of each other"
    draw("fig4_rm_accuracy", heading, lines, "step", "right on held-out pairs of D, %")
    # Paper's Figure 5: which RM holds the shifted policy's answers further apart?
    lines = []
    for name in dict.fromkeys(map(trainer_of, last.values())):
        far, label = (
            rms[name]["shifted"],
            f"{title(name)}\n(mean {show(rms[name]['shifted']['gap, SD'])})",
        )
        lines.append((far["gaps"], 100 - 2 * np.arange(49), arm_of(name)[0], "-", label))
    heading = f"How far apart RMs hold two answers of {title(last['ppo'])}"
    draw("fig5_reward_gaps", heading, lines, "gap |r - r'|, SD of the RM", "pairs further apart, %")


def show(*values) -> str:
    """A figure as the report shows it; of several runs, mean ± SD (win - lose; how many hold)."""
    told = [x for x in values if x is not None and x == x]
    if not told or isinstance(told[0], str):
        return told[0] if len(set(told)) == 1 else "–"
    if isinstance(told[0], bool):
        return f"{sum(told)} of {len(told)}" if len(values) > 1 else "yes" if told[0] else "**no**"
    if isinstance(told[0], dict):
        if len(values) == 1:
            return " / ".join(f"{told[0][side]:.0f}" for side in ("win", "tie", "lose"))
        told = [x["win"] - x["lose"] for x in told]
    mean, sd = np.mean(told), f" ± {show(np.std(told, ddof=1))}" if len(told) > 1 else ""
    digits = 1 + (abs(mean) < 10) + (abs(mean) < 1)
    return f"{round(mean, 3) + 0.0:.{digits}f}{sd}".replace("-", "−")


def tables(runs: list[dict]) -> list[str]:
    """Five tables in markdown, of one run or over several, less the columns that are empty."""
    by, found = runs[0]["by"], []
    for part, group, keys in (
        ("criteria", "", ["before", "after", "criterion", "holds"]),
        ("policies", "figures", ["RM", by, "KL", "words", "distinct", "Self-BLEU"]),
        ("policies", "against", [x + ood for ood in ("", ", OOD") for x in ARMS.values()]),
        ("rms", "accuracy", ["D, noisy", f"D, {by}", "SFT for shifted", "shifted", "OOD"]),
        ("rms", "shifted", ["J", "J, SD units", "gap, SD", "variance, SD²", "ratio", "ρ"]),
    ):
        rows = {}
        for name in [name for name, row in runs[0][part].items() if row.get(group, row)]:
            those = [run[part].get(name, {}) for run in runs]
            those, label = [row.get(group, row) for row in those], title(name) if group else name
            rows[label] = {key: show(*[row.get(key) for row in those]) for key in keys}
        keys = [key for key in keys if any(row[key] != "–" for row in rows.values())]
        lines = [["", *keys], ["---"] * (len(keys) + 1)]
        lines += [[label, *(row[key] for key in keys)] for label, row in rows.items()]
        found.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return found


def report(results: dict, judge: str) -> str:
    """report.md, for somebody who has seen neither code nor paper; `judge` is --judge."""
    n, right, by = results["prompts"], show(results["ceiling"]), "the judge" if judge else "gold"
    end = title(results["last"]["ppo"])
    criteria, policies, rivals, accuracy, spreads = tables([results])
    examples = ""
    for prompt, answers in results["examples"]:
        examples += f"\n> {' '.join(prompt.split())}\n\n"
        examples += "".join(f"- **{who}**: {' '.join(x.split())}\n" for who, x in answers.items())
    truth = "Gold is the truth: rules that no model was shown."
    if judge:
        truth = f"The judge is a reward model, {judge}, trained on pairs that no arm saw."
    return f"""# What this run shows
A language model, SFT, answers people. A reward model, RM0, learns from pairs D of its answers which
is better. PPO trains the policy to get high rewards from RM0. Its answers move away from D, and RM0
no longer tells them apart: it is stale. MetaRM (Dou et al., arXiv 2405.00438) trains a new RM each
round, on the same D. Each step moves temporarily to θ', where rewards of fresh, unlabelled answers
differ more, computes D's gradient there, and applies it at θ. PPO on RM0 finds RM0's own mistakes,
so any other RM judges its answers better. The control is a reseeded RM: a plain one, trained again
each round with another seed. Only what goes beyond it is due to MetaRM.

{truth}
It agrees with the labels of {right} % of {n["pairs"]} held-out pairs of D.
A policy gives {results["k"]} answers to each of {n["test"]} test and {n.get("ood", 0)} OOD prompts.
One SD is that of a judge's rewards of SFT's answers. Gaps below {results["tie"]} SD are ties.
**One seed: one seed proves nothing.** The figures of one seed also differ between machines.

## 1. Did RM0 go stale?
Before PPO (SFT) and after it ({end}). –: it cannot be told.
At the same gap by {by}: as a policy narrows, its answers differ less in truth too, and any RM finds
them harder to tell apart.

{criteria}
![variance of the reward difference](figures/fig1_reward_difference.png)
![predicted and {by} reward over KL](figures/gold_over_kl.png)

## 2. The policies (the paper's Tables 1 to 3)
RM: reward predicted by the policy's RM (RM0 for SFT and DPO), SD above SFT. {by}: the same by {by}.
KL to SFT on these answers, nats per answer. distinct: share of different texts. Self-BLEU among the
answers to one prompt: lower is more diverse. Second table: win / tie / lose in % by {by}.

{policies}
{rivals}
## 3. The reward models (the paper's Figures 4 and 5)
% right on held-out pairs of D, by their noisy labels and by {by}; on answers of SFT and of {end}
(shifted: to test prompts). Second table, on shifted answers: J (Eq. 2), mean gap, variance of the
gap, its ratio to the one by {by}, rank correlation ρ with {by}. θ': after one more climb of J.

{accuracy}
{spreads}
![accuracy on D over training](figures/fig4_rm_accuracy.png)
![gaps of the reward models](figures/fig5_reward_gaps.png)

## 4. The first answers to the first five test prompts
{examples}"""


# ------------------------------------------------------------------------ samples, scores, commands
def sampled(args, path: Path, policy: str, prompts: list[str]) -> list[list[str]]:
    """k responses to each prompt, kept at `path` as long as policy, prompts and options stay."""
    options = {x: vars(args)[x] for x in "seed k temperature max_new_tokens batch_size".split()}
    made_from = {"policy": policy, "prompts": prompts, **options}
    newest = max((file.stat().st_mtime for file in Path(policy).glob("*")), default=0)
    if path.exists() and path.stat().st_mtime > newest:
        kept, *rows = data.read_jsonl(path)
        if kept == made_from:
            return [row["responses"] for row in rows]
    model, tokenizer = ppo.load_policy(policy)
    groups = ppo.sample_responses(model.to(rm.pick_device()), tokenizer, prompts, **options)
    data.write_jsonl(path, [made_from, *({"responses": group} for group in groups)])
    return groups


def scored(judge, prompts: list[str], groups: list[list[str]], batch_size=640) -> np.ndarray:
    """Rewards (m, k) of k responses to m prompts, by (reward model, tokenizer); None is gold."""
    prompts = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    texts = [text for group in groups for text in group]
    if judge is None:
        rewards = torch.tensor(list(map(data.gold_reward, prompts, texts)), dtype=torch.float64)
    else:
        rewards = rm.score(judge[0].to(rm.pick_device()), judge[1], prompts, texts, batch_size)
    return rewards.double().reshape(len(groups), -1).numpy()


@torch.no_grad()
def kl_to(policy, tokenizer, reference, prompts, groups, temperature=1.0, longest=48) -> float:
    """KL of a policy to the reference, nats per response: the mean of log pi(y|x) - log pi_ref(y|x)
    over samples of the policy, at the temperature of the sampling."""
    rows = [rm.encode(tokenizer, x, y) for x, ys in zip(prompts, groups, strict=True) for y in ys]
    rows = [(x, y[:longest]) for x, y in rows]  # cut off there: no EOS was sampled
    device, total = rm.pick_device(), 0.0
    for start in range(0, len(rows), 64):
        batch = ppo.collate(tokenizer, rows[start : start + 64], device)
        for model, sign in ((policy, 1), (reference, -1)):
            logprobs = ppo.response_logprobs(model.to(device), batch, temperature)
            total += sign * logprobs.double().sum().item()
    return total / len(rows)


def write_answers(path: Path, generator: str, prompts: list[str], groups: list[list[str]]) -> None:
    """The first response to each prompt in AlpacaEval's format. What HH-RLHF puts around a question
    goes. AlpacaEval joins two files by their instructions, so each is there once."""
    rows = {}
    for prompt, group in zip(prompts, groups, strict=True):
        text = prompt.strip().removeprefix("Human:").removesuffix("Assistant:").strip()
        rows[text] = {"instruction": text, "output": group[0].strip(), "generator": generator}
    data.write_text(path, json.dumps(list(rows.values()), indent=1, ensure_ascii=False) + "\n")


def look(args, run: Path, policies: dict[str, Path], models: dict[str, Path]) -> dict:
    """What `measure` finds in samples of each policy, scored by each RM."""
    judge = rm.load_reward_model(args.judge) if args.judge else None
    last, by = last_rounds(policies), "judge" if judge else "gold"
    prompts = {"test": data.read_prompts(run / "data" / "prompts-test.jsonl")}
    if (run / "data" / "prompts-ood.jsonl").exists():
        prompts["ood"] = data.read_prompts(run / "data" / "prompts-ood.jsonl")
    pairs = run / ("pairs" if (run / "pairs").exists() else "data")  # real preferences lie in data/
    pairs = data.read_preferences(pairs / "valid.jsonl")
    responses, scores, rollouts, epochs, kl = {}, {}, {}, {}, {}
    reference, _ = ppo.load_policy(str(policies["sft"]))
    for policy, folder in policies.items():
        asked = prompts if policy in ("sft", *last.values()) else {"test": prompts["test"]}
        texts = [prompt for domain in asked.values() for prompt in domain]
        groups = sampled(args, run / "eval" / f"{policy}.jsonl", str(folder), texts)
        for domain, texts in asked.items():
            responses[policy, domain], groups = groups[: len(texts)], groups[len(texts) :]
        own = prompts["test"], responses[policy, "test"]
        write_answers(run / "answers" / f"{policy}.json", policy, *own)
        model, tokenizer = ppo.load_policy(str(folder))
        kl[policy] = kl_to(model, tokenizer, reference, *own, args.temperature, args.max_new_tokens)
        if (folder / "rollouts.jsonl").exists():
            rollouts[policy] = []
            for row in data.read_jsonl(folder / "rollouts.jsonl"):
                gold = scored(judge, row["prompts"], row["responses"], args.batch_size)
                rollouts[policy].append({"KL": row["kl"], "RM": np.array(row["scores"]), by: gold})
    prompts["pairs"] = [pair["prompt"] for pair in pairs]
    responses["D", "pairs"] = [[pair["chosen"], pair["rejected"]] for pair in pairs]
    for name, folder in {by: None, **models}.items():
        model = rm.load_reward_model(str(folder)) if folder else judge
        if folder and name != "oracle" and (folder / "log.jsonl").exists():
            log = [row for row in data.read_jsonl(folder / "log.jsonl") if "accuracy" in row]
            epochs[name] = [[row["step"], 100 * row["accuracy"]] for row in log]
        for (policy, domain), groups in responses.items():
            own = domain == "test" and (policy == "sft" or trainer_of(policy) == name)
            if own or name == by or policy in ("D", last["ppo"]):
                texts = prompts[domain], groups
                scores[name, policy, domain] = scored(model, *texts, args.batch_size)
    return measure(prompts, responses, scores, rollouts, epochs, kl, by, args.tie)


def evaluate(args) -> None:
    """--run. results.json comes last: it vouches for pictures, report and answers."""
    run, arms = Path(args.run), [f"{arm}-{r}" for arm in COLOURS for r in range(1, 100)]
    policies = {x: run / x for x in ("sft", "dpo")} | {x: run / x / "policy" for x in arms}
    models = {"rm0": run / "rm0"} | {x: run / x / "rm" for x in ("oracle", *arms)}
    models |= {f"{x} adapted": run / x / "adapted" for x in arms}
    policies = {name: path for name, path in policies.items() if path.is_dir()}
    models = {name: path for name, path in models.items() if path.is_dir()}
    for name in sorted({"sft", "ppo-1"} - {*policies} | {*map(trainer_of, policies)} - {*models}):
        raise data.Mistake(f"--run {run}: no policy or RM of {name}; finish the run: bash run.sh")
    if args.k < 2:
        raise data.Mistake(f"--k {args.k}: a difference between responses needs at least 2 of them")
    (run / "results.json").unlink(missing_ok=True)
    for folder in ("eval", "answers", "figures"):
        (run / folder).mkdir(exist_ok=True)

    def six_digits(text):
        return round(float(text), 6) + 0.0  # no -0.0: one seed, the same bytes

    found = json.dumps(look(args, run, policies, models))
    found = json.loads(found, parse_float=six_digits, parse_constant={}.get)  # NaN becomes null
    figures(found, run / "figures")
    data.write_text(run / "report.md", report(found, args.judge))
    data.write_jsonl(run / "results.json", [found])
    holds = [row["holds"] for row in found["criteria"].values()]
    print(f"{run / 'report.md'}: {holds.count(True)} of {len(holds)} criteria hold (one seed)")


def summarise(args) -> None:
    """--runs: the tables over the runs of several seeds, printed, to be pasted."""
    runs = [data.read_jsonl(Path(run) / "results.json")[0] for run in args.runs.split(",")]
    print(f"{len(runs)} seeds, mean ± SD (win - lose in place of win / tie / lose): {args.runs}\n")
    print("\n".join(tables(runs)), end="")


def compare(args) -> None:
    """--policies: who wins by a reward model, and the answers of both, for another judge."""
    names, groups = args.policies.split(","), []
    if len(names) != 2 or not (args.judge and args.prompts and args.out):
        raise data.Mistake("--policies needs two names, A,B, and --judge, --prompts and --out")
    judge, prompts = rm.load_reward_model(args.judge), data.read_prompts(args.prompts)
    with data.output_folder(args.out) as work:
        for letter, name in zip("AB", names, strict=True):
            groups.append(sampled(args, work / f"{letter}.jsonl", name, prompts))
            write_answers(work / f"{letter}.json", name, prompts, groups[-1])
        rewards = np.array([scored(judge, prompts, group, args.batch_size) for group in groups])
        found = win_tie_lose(*rewards, args.tie * rewards.std())
        data.write_jsonl(work / "results.json", [{"policies": names, "judge": args.judge, **found}])
    print(f"{names[0]} against {names[1]} by {args.judge}: win / tie / lose {show(found)} %")


def run_command(args) -> None:
    (evaluate if args.run else summarise if args.runs else compare)(args)


def main(argv: list[str] | None = None) -> int:
    parser = data.new_parser("eval.py", __doc__)
    add, ways = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--run", help="report on this folder of a run, as run.sh lays it out")
    ways.add_argument("--runs", help="the tables over these runs, A,B,C: seeds of one setting")
    ways.add_argument("--policies", help="compare two policies, A,B: folders or hub names")
    add("--judge", default="", help="the reward model that judges --policies or --run")
    add("--prompts", default="", help=".jsonl with a `prompt` per row, for --policies")
    add("--out", default="", help="folder for results.json and the answers, A.json and B.json")
    add("--tie", type=float, default=0.25, help="closer rewards are ties, in SDs of the judge's")
    add("--seed", type=int, default=0, help="of the sampling, the same for each policy")
    add("--k", type=int, default=5, help="responses per prompt")
    add("--temperature", type=float, default=1.0, help="divides the logits")
    add("--max_new_tokens", type=int, default=48, help="longest response, in tokens")
    add("--batch_size", type=int, default=640, help="responses sampled or scored at once")
    return data.command(parser, run_command, argv)


if __name__ == "__main__":
    sys.exit(main())
