"""The report on a run, and the comparison of any two policies by a reward model.

    python eval.py --run runs/toy                            judged by the toy world's gold reward
    python eval.py --run runs/hh --judge runs/hh/judge/rm    judged by a reward model
    python eval.py --runs runs/toy-0,runs/toy-1              the tables over several seeds, printed
    python eval.py --judge RM --policies A,B --prompts FILE --out DIR

--run writes RUN/figures, answers (in AlpacaEval's format, for GPT-4 as the judge: see README.md),
report.md and, last, results.json. It keeps its samples in RUN/eval.
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
COLOURS = dict(ppo="#0072B2", reseeded="#009E73", metarm="#D55E00")
MIN_PAIRS = 20  # no accuracy is told on fewer pairs
TIE = 0.25  # a smaller gold gap is a tie, in SDs
GAP_EDGES = (TIE, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, np.inf)  # bins of |gold gap|, in SDs
GAP_SHARES = np.arange(0, 0.98, 0.02)  # of |reward gap|, for the paper's Figure 5


# ------------------------------------ measures: arrays in, numbers out; m prompts, k responses each
def reward_gaps(rewards: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r_i - r_j and gold_i - gold_j of all i < j of each prompt: (m, k) twice -> (m·k(k-1)/2,)."""
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


def matched_accuracy(first: tuple, second: tuple, edges, minimum: int = 20) -> dict:
    """{"first", "second"}: accuracy on two sets, (rewards, gold), AT THE SAME GOLD GAP.
    As a policy narrows, its responses differ less in truth too: harder for any RM. So accuracy is
    taken in bins of |gold gap| with `minimum` pairs of both sets, weighted by the first's pairs."""
    pairs, shares = [], []  # in each bin: how many pairs, and the share of them ordered as by gold
    for rewards, gold in (first, second):
        gap, gold_gap = reward_gaps(rewards, gold)
        right, size = agreement(gap, gold_gap)[gold_gap != 0], np.abs(gold_gap[gold_gap != 0])
        pairs.append(np.histogram(size, edges)[0])
        shares.append(np.histogram(size, edges, weights=right)[0] / np.maximum(pairs[-1], 1))
    weights = np.where(np.minimum(*pairs) >= minimum, pairs[0], 0)
    means = np.array(shares) @ weights / (weights.sum() or np.nan)
    return {"first": means[0], "second": means[1]}


def rank_correlation(rewards: np.ndarray, gold: np.ndarray) -> tuple[float, int]:
    """(mean Spearman correlation within a prompt, prompts used); a constant side has none."""
    # sum_j sign(x_i - x_j) is twice the rank of x_i less the mean rank: all that Pearson needs
    a, b = (np.sign(x[:, :, None] - x[:, None, :]).sum(-1) for x in np.array([rewards, gold]))
    length = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    found = (a * b).sum(-1)[length > 0] / length[length > 0]
    return (float(found.mean()) if len(found) else np.nan), len(found)


def spread(rewards: np.ndarray, scale: float = 1.0) -> dict:
    """How far apart an RM holds responses: J of Eq. 2, mean |r_i - r_j|, mean (r_i - r_j)^2. An RM
    that doubles its rewards, (m, k), raises all three and has learned nothing: hence `scale`."""
    gap, _ = reward_gaps(rewards / scale, rewards)
    J = float(metarm.difference_loss(torch.as_tensor(rewards / scale)))
    return {"J": J, "margin": float(np.abs(gap).mean()), "variance": float((gap**2).mean())}


def win_tie_lose(ours: np.ndarray, theirs: np.ndarray, tie: float) -> dict:
    """Percent {"win", "tie", "lose"} of our entries against theirs; a gap < tie, or 0, is a tie."""
    gap = ours - theirs
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
def arm_of(name: str) -> tuple[str, int]:
    """("metarm", 2) of "metarm-2" and of "metarm-2 adapted", ("sft", 0) of "sft"."""
    arm, _, rounds = name.split()[0].partition("-")
    return arm, int(rounds or 0)


def title(name: str) -> str:
    arm, rounds = arm_of(name)
    of_round = f", round {rounds}" if rounds else ""
    return NAMES[arm] + of_round + (", θ'" if name.endswith(" adapted") else "")


def trainer_of(policy: str) -> str:
    """The RM that a policy was trained on; RM0 also stands in for SFT and DPO, which had none."""
    return policy if arm_of(policy)[0] in ("reseeded", "metarm") else "rm0"


def last_rounds(policies) -> dict[str, str]:
    """{arm: its policy of the last round}, for the arms that PPO trains."""
    return {arm_of(name)[0]: name for name in sorted(policies, key=arm_of) if arm_of(name)[1]}


def measure(prompts, responses, scores, rollouts, epochs, kl, by="gold") -> dict:
    """All figures of a run, as results.json holds them.
    prompts: {domain: texts}; domains are "test", "ood" and "pairs", the held-out pairs of D.
    responses: {(policy, domain): m lists of k texts}; [chosen, rejected] at ("D", "pairs").
    scores: {(judge, policy, domain): (m, k) rewards}; judges are the RMs and `by`.
    rollouts: {policy: one {"kl": nats, "scores": (b, g) rewards, `by`: (b, g)} per PPO step}.
    epochs: {RM: [[step, % right on D]]}. kl: {policy: nats per response}.
    """

    def in_sd(judge, rewards):  # SDs of this judge's rewards on SFT samples, above their mean
        on_sft = scores[judge, "sft", "test"]
        return (np.asarray(rewards) - on_sft.mean()) / (on_sft.std() or 1.0)

    if len(prompts["pairs"]) < MIN_PAIRS:  # too few to tell anything: 3 of 3 right is no 100 %
        scores = {key: x * np.nan if key[2] == "pairs" else x for key, x in scores.items()}
    z = {key: in_sd(key[0], rewards) for key, rewards in scores.items()}
    names = [policy for policy, domain in responses if domain == "test"]
    last, policies, curves, examples = last_rounds(names), {}, {}, []
    for policy in names:
        texts, rounds, against = responses[policy, "test"], arm_of(policy)[1], {}
        figures = {"RM": z[trainer_of(policy), policy, "test"].mean(), "KL": kl.get(policy)}
        figures |= {by: z[by, policy, "test"].mean(), "words": mean_words(texts)}
        figures |= {"distinct": distinct_share(texts), "Self-BLEU": self_bleu(texts)}
        for rival, domain in responses:  # SFT, DPO, and the other arms' policies of the same round
            comparable = rounds and arm_of(rival)[1] in (0, rounds) and rival != policy
            if comparable and (policy, domain) in responses:
                name = ARMS[arm_of(rival)[0]] + (", OOD" if domain == "ood" else "")
                against[name] = win_tie_lose(z[by, policy, domain], z[by, rival, domain], TIE)
        policies[policy] = {"against": against, "figures": figures}
    for policy, steps in rollouts.items():
        curves[policy] = {"KL": [step["kl"] for step in steps]}
        for name, judge, key in (("RM", trainer_of(policy), "scores"), (by, by, by)):
            rewards = [in_sd(judge, step[key]) for step in steps]
            variance = [spread(x)["variance"] if x.shape[1] > 1 else np.nan for x in rewards]
            curves[policy] |= {name: [x.mean() for x in rewards], f"variance by {name}": variance}
    shown = [policy for policy in names if policy in ("sft", "dpo", *last.values())]
    for i, prompt in enumerate(prompts["test"][:5]):
        examples.append([prompt, {title(x): responses[x, "test"][i][0] for x in shown}])
    results = dict(by=by, tie=TIE, k=len(texts[0]), last=last, policies=policies, curves=curves)
    results |= dict(prompts={domain: len(texts) for domain, texts in prompts.items()})
    results |= dict(epochs=epochs, examples=examples)
    results["ceiling"] = 100 * agreement(scores[by, "D", "pairs"] @ [1, -1], 1).mean()
    models = [judge for judge, policy, _ in scores if policy == "D" and judge != by]
    results["rms"] = {name: measure_rm(scores, z, name, last["ppo"], by) for name in models}
    return results | {"criteria": criteria(results)}


def measure_rm(scores: dict, z: dict, name: str, shifted: str, by: str) -> dict:
    """One RM's accuracy, off D at the gold gaps of SFT samples, and spread. z: `scores` in SDs."""
    ours, truth = scores[name, "D", "pairs"], scores[by, "D", "pairs"]
    right = {"D, noisy": 100 * agreement(ours @ [1, -1], 1).mean()}
    right[f"D, {by}"] = 100 * pair_accuracy(ours, truth)[0]
    row, on_sft = {"accuracy": right}, (z[name, "sft", "test"], z[by, "sft", "test"])
    for column, domain in (("shifted", "test"), ("OOD", "ood")):
        if (name, shifted, domain) in z:
            there = z[name, shifted, domain], z[by, shifted, domain]
            found = matched_accuracy(on_sft, there, GAP_EDGES)
            right |= {f"SFT for {column}": 100 * found["first"], column: 100 * found["second"]}
    for column, policy in (("sft", "sft"), ("shifted", shifted)):
        ours, truth = z[name, policy, "test"], z[by, policy, "test"]
        far, gaps = spread(ours), np.abs(reward_gaps(ours, ours)[0])
        row[column] = {"J": spread(scores[name, policy, "test"])["J"], "J, SD units": far["J"]}
        row[column] |= {"gap, SD": far["margin"], "variance, SD²": far["variance"]}
        row[column] |= {"gaps": np.quantile(gaps, GAP_SHARES).tolist()}
        row[column] |= {"ratio": far["variance"] / (spread(truth)["variance"] or np.nan)}
        row[column] |= {"ρ": rank_correlation(ours, truth)[0]}
    return row


def criteria(results: dict) -> dict[str, dict]:
    """What must hold if RM0 went stale: {what: {"before", "after", "criterion", "holds"}}."""
    by, rms, end, found = results["by"], results["rms"], results["last"]["ppo"], {}

    def add(what, was, now, sign, bound, lacks=f"fewer than {MIN_PAIRS} pairs"):
        holds = bool(now > bound if sign == ">" else now < bound)
        found[what] = dict(before=was, after=now, criterion=f"{sign} {show(bound)}", holds=holds)
        if np.isnan([now, bound]).any():
            found[what] = dict(before=None, after=None, criterion=f"left out: {lacks}", holds=None)

    rm0, right = rms["rm0"], rms["rm0"]["accuracy"]
    fresh = rms["oracle"]["accuracy"] if "oracle" in rms else dict.fromkeys(right, np.nan)
    bar = 50 + (results["ceiling"] - 50) / 5  # a fifth of the way from chance to what `by` gets
    add("RM0 right on held-out pairs of D, %", None, right["D, noisy"], ">", bar)
    add(f"the same by {by}, %", None, right[f"D, {by}"], ">", 60)
    was, now = right["SFT for shifted"], right["shifted"]
    add(f"RM0 right on answers at the same gap by {by}, %", was, now, "<", was - 10)
    was, then = fresh["SFT for shifted"], fresh["shifted"]
    lacks = "no such RM, or few pairs"
    add("a new RM, trained on gold labels there, %", was, then, ">", now + 5, lacks)
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
    """Draws the four pictures."""
    by, curves, rms, last = (results[key] for key in ("by", "curves", "rms", "last"))

    def draw(name, lines, xlabel, heading):  # lines: x, y, arm, style, label
        axes = figure.Figure((9, 4), layout="tight").subplots()
        for x, y, arm, style, label in lines:
            axes.plot(x, y, style, color=COLOURS.get(arm, COLOURS["ppo"]), label=label, lw=2.2)
        axes.set(xlabel=xlabel, title=heading)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.figure.savefig(folder / f"{name}.png", dpi=150)

    def smooth(arm, key):  # a step has few rollouts: each point is the mean of up to 9 steps
        y = np.array(sum((curves[x][key] for x in curves if arm_of(x)[0] == arm), []), float)
        return [y[i - min(4, i) : i + min(4, i) + 1].mean() for i in range(len(y))]

    def by_both(arms, kind=""):  # a line per arm by its RM, and one by `by`, over KL
        lines = []
        for key, judge, style in (("RM", "its RM", "-"), (by, by, "--")):
            for arm in arms:
                label = f"{NAMES[arm]}, by {judge}"
                lines.append((smooth(arm, "KL"), smooth(arm, kind + key), arm, style, label))
        return lines

    # Paper's Figure 1: RM0 holds its policy's answers less and less apart. And in truth?
    lines = [(range(len(y)), y, *rest) for _, y, *rest in by_both(["ppo"], "variance by ")]
    draw("fig1_reward_difference", lines, "PPO step", "Variance of two answers' reward gap, SD²")
    # Gao et al. 2022: what a policy pays in KL, what its RM predicts for that, and what it gets.
    draw("gold_over_kl", by_both(last), "KL to SFT, nats per answer", "Mean reward, SD above SFT")
    # Paper's Figure 4: does the meta step cost accuracy on D?
    lines = []
    for name, points in results["epochs"].items():
        arm, rounds = arm_of(name)
        style = {1: ":", 2: "--"}.get(rounds, "-")
        lines.append((*np.array(points).T, arm, style, title(name)))
    draw("fig4_rm_accuracy", lines, "training step", "Right on held-out pairs of D, %")
    # Paper's Figure 5: which RM holds the shifted policy's answers further apart?
    lines = []
    for name in dict.fromkeys(trainer_of(policy) for policy in last.values()):
        gaps, arm = rms[name]["shifted"]["gaps"], arm_of(name)[0]
        lines.append((gaps, 100 * (1 - GAP_SHARES), arm, "-", title(name)))
    draw("fig5_reward_gaps", lines, "reward gap, SD", "Shifted answers with a larger gap, %")


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
    digits = 1 if abs(mean) >= 10 else 2 if abs(mean) >= 1 else 3
    return f"{round(mean, 3) + 0.0:.{digits}f}{sd}".replace("-", "−")  # + 0.0: no −0.000


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
        for name in runs[0][part]:
            those = [run[part].get(name, {}) for run in runs]
            those = [row.get(group, {}) for row in those] if group else those
            if those[0]:
                label = title(name) if group else name
                rows[label] = {key: show(*[row.get(key) for row in those]) for key in keys}
        keys = [key for key in keys if any(row[key] != "–" for row in rows.values())]
        lines = [["", *keys], ["---"] * (len(keys) + 1)]
        lines += [[label, *(row[key] for key in keys)] for label, row in rows.items()]
        found.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return found


def report(results: dict, judge: str) -> str:
    """report.md, for somebody who has seen neither code nor paper; `judge` is --judge."""
    n, right, by = results["prompts"], show(results["ceiling"]), "the judge" if judge else "gold"
    criteria, policies, rivals, accuracy, spreads = tables([results])
    end, examples = title(results["last"]["ppo"]), ""
    for prompt, answers in results["examples"]:
        examples += f"\n> {' '.join(prompt.split())}\n\n"
        examples += "".join(f"- **{who}**: {' '.join(x.split())}\n" for who, x in answers.items())
    truth = f"the reward model {judge}" if judge else "a rule that no arm was shown"
    return f"""# What this run shows
{criteria.count("| yes |")} of {len(results["criteria"])} signs of a stale RM are there (section 1).
Section 2 compares MetaRM with its control. **One seed proves nothing**; figures vary by machine.

A reward model (RM) gives each answer of a policy, a language model, a number: its reward. **RM0**
learns from D: pairs of answers, labelled, with some errors, which one is better. **PPO** trains a
policy, **SFT** at first, to get high rewards from RM0. Its answers move away from those in D, and
RM0 no longer tells them apart: it is *stale*. **MetaRM** (arXiv 2405.00438) trains a new RM before
each round of PPO, on the same D and on fresh answers without labels. Each step moves temporarily
from the RM's parameters θ to θ', where the rewards of these answers differ more, computes D's
gradient there, and applies it at θ. Its control is a **reseeded RM**: a plain one, trained on D
each round with another seed. PPO finds its own RM's mistakes, so any other RM judges its answers
better; only what goes beyond the control is due to MetaRM. **DPO** trains SFT on D without an RM.

The truth is what {by} says: {truth}. It agrees with the labels of
{right} % of {n["pairs"]} held-out pairs of D. Policies give {results["k"]} answers to each of
{n["test"]} test and {n.get("ood", 0)} OOD prompts (of another domain). SD: the standard deviation
of a judge's rewards of SFT's answers. Less than {TIE} SD apart is a tie. –: cannot be told.
## 1. Did RM0 go stale?
Before: on SFT's answers. After: on those of {end}. A stale RM0 is right on D
(rows 1, 2), but not on the new answers (row 3), which a new RM can learn to judge (row 4). Row 3
compares pairs with the same gap by {by}: as a policy narrows, its answers differ less in truth too,
and any RM finds them harder to tell apart. RM0's rewards of them lie closer together (rows 5 to 7;
J: Eq. 2) and higher (row 8), but {by} has not grown (row 9). Rows 10, 11: no collapsed answers.

{criteria}
![variance of the reward difference](figures/fig1_reward_difference.png)
![predicted and {by} reward over KL](figures/gold_over_kl.png)
## 2. The policies (the paper's Tables 1 to 3)
RM: mean reward by the policy's own RM (RM0 for SFT and DPO), SD above SFT. {by}: the same by {by}.
KL: distance from SFT, nats per answer. words: mean length. distinct: share of different texts.
Self-BLEU: overlap among the answers to one prompt; low is diverse. Second table, % by {by}: the
row's answers win / tie / lose against the column's of the same round.

{policies}
{rivals}
## 3. The reward models (the paper's Figures 4 and 5)
First, % of pairs in the right order. D: held-out pairs, by their labels (noisy) and by {by}.
shifted, OOD: answers of {end} to test and OOD prompts. SFT for shifted: SFT's
with the same gaps by {by}. θ': the RM after one more move to θ'. Second, shifted answers: J, mean
gap of two rewards, its variance, the ratio to that by {by}, and rank correlation ρ with {by}.

{accuracy}
{spreads}
![accuracy on D over training](figures/fig4_rm_accuracy.png)
![gaps of the reward models](figures/fig5_reward_gaps.png)
## 4. The first answers to the first five test prompts
{examples}"""


# ------------------------------------------------------------------------ samples, scores, commands
def sampled(args, path: Path, policy: str, loaded, prompts: list[str]) -> list[list[str]]:
    """k responses to each prompt, kept at `path` as long as policy, prompts and options stay.
    loaded: the policy's (model, tokenizer)."""
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
    """Rewards (m, k) of k responses to m prompts, by (reward model, tokenizer); None is gold."""
    prompts = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    texts = [text for group in groups for text in group]
    if judge is None:
        rewards = [data.gold_reward(x, y) for x, y in zip(prompts, texts, strict=True)]
    else:
        rewards = rm.score(judge[0].to(rm.pick_device()), judge[1], prompts, texts)
    return torch.as_tensor(rewards, dtype=torch.float64).reshape(len(groups), -1).numpy()


@torch.no_grad()
def kl_to(policy, tokenizer, reference, prompts, groups, temperature=1.0, longest=48) -> float:
    """KL of a policy to the reference, nats per response: the mean log-ratio of its samples."""
    rows = [rm.encode(tokenizer, x, y) for x, ys in zip(prompts, groups, strict=True) for y in ys]
    rows = [(x, y[:longest]) for x, y in rows]  # cut off there: no EOS was sampled
    device, total = rm.pick_device(), 0.0
    for start in range(0, len(rows), 64):
        batch = ppo.policy_batch(tokenizer, rows[start : start + 64], device)
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
    """What `measure` finds in samples of each policy, scored by each RM. Writes RUN/answers."""
    judge = rm.load_reward_model(args.judge) if args.judge else None
    last, by = last_rounds(policies), "judge" if judge else "gold"
    prompts = {"test": data.read_prompts(run / "data" / "prompts-test.jsonl")}
    if (run / "data" / "prompts-ood.jsonl").exists():
        prompts["ood"] = data.read_prompts(run / "data" / "prompts-ood.jsonl")
    responses, kl, rollouts, scores, epochs = {}, {}, {}, {}, {}
    reference, _ = ppo.load_policy(str(policies["sft"]))
    for policy, folder in policies.items():
        loaded = ppo.load_policy(str(folder))
        domains = prompts if policy in ("sft", *last.values()) else ["test"]
        texts = [prompt for domain in domains for prompt in prompts[domain]]
        kept = run / "eval" / f"{policy}.jsonl"
        groups = iter(sampled(args, kept, str(folder), loaded, texts))
        for domain in domains:
            responses[policy, domain] = [next(groups) for _ in prompts[domain]]
        own = prompts["test"], responses[policy, "test"]
        write_answers(run / "answers" / f"{policy}.json", policy, *own)
        kl[policy] = kl_to(*loaded, reference, *own, args.temperature, args.max_new_tokens)
        if (folder / "rollouts.jsonl").exists():
            rollouts[policy] = data.read_jsonl(folder / "rollouts.jsonl")
            for step in rollouts[policy]:
                step[by] = scored(judge, step["prompts"], step["responses"])
    source = "pairs" if (run / "pairs").exists() else "data"  # real preferences lie in data/
    pairs = data.read_preferences(run / source / "valid.jsonl")
    prompts["pairs"] = [pair["prompt"] for pair in pairs]
    responses["D", "pairs"] = [[pair["chosen"], pair["rejected"]] for pair in pairs]
    for name, folder in {by: None, **models}.items():
        model = rm.load_reward_model(str(folder)) if folder else judge
        for (policy, domain), groups in responses.items():
            if name in (by, trainer_of(policy)) or policy in ("D", "sft", last["ppo"]):
                texts = prompts[domain], groups
                scores[name, policy, domain] = scored(model, *texts)
        if folder and name != "oracle" and (folder / "log.jsonl").exists():
            log = [row for row in data.read_jsonl(folder / "log.jsonl") if "accuracy" in row]
            epochs[name] = [[row["step"], 100 * row["accuracy"]] for row in log]
    return measure(prompts, responses, scores, rollouts, epochs, kl, by)


def evaluate(args) -> None:
    """--run. results.json comes last, as it vouches for the rest; six digits, null for NaN."""
    if args.k < 2:
        raise data.Mistake(f"--k {args.k}: a difference between responses needs at least 2 of them")
    run, arms = Path(args.run), [f"{arm}-{r}" for arm in COLOURS for r in range(1, 100)]
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
    text = json.dumps(look(args, run, policies, models))
    found = json.loads(text, parse_float=lambda x: round(float(x), 6), parse_constant={}.get)
    figures(found, run / "figures")
    data.write_text(run / "report.md", report(found, args.judge))
    data.write_jsonl(run / "results.json", [found])
    print(run / "report.md")


def compare(args) -> None:
    """--policies: who wins by a reward model, and the answers of both, for another judge."""
    names, groups = args.policies.split(","), []
    if len(names) != 2 or not (args.judge and args.prompts and args.out):
        raise data.Mistake("--policies needs two names, A,B, and --judge, --prompts and --out")
    judge, prompts = rm.load_reward_model(args.judge), data.read_prompts(args.prompts)
    with data.output_folder(args.out) as work:
        for letter, name in zip("AB", names, strict=True):
            loaded = ppo.load_policy(name)
            groups.append(sampled(args, work / f"{letter}.jsonl", name, loaded, prompts))
            write_answers(work / f"{letter}.json", name, prompts, groups[-1])
        rewards = np.array([scored(judge, prompts, group) for group in groups])
        found = win_tie_lose(*rewards, TIE * rewards.std())
        data.write_jsonl(work / "results.json", [{"policies": names, "judge": args.judge, **found}])
    print(f"{names[0]} against {names[1]} by {args.judge}: win / tie / lose {show(found)} %")


def run_command(args) -> None:
    if args.runs:
        runs = [data.read_jsonl(Path(run) / "results.json")[0] for run in args.runs.split(",")]
        print(f"{len(runs)} seeds, mean ± SD (win - lose for win / tie / lose): {args.runs}\n")
        print("\n".join(tables(runs)), end="")
    else:
        (evaluate if args.run else compare)(args)


def main(argv: list[str] | None = None) -> int:
    parser = data.new_parser("eval.py", __doc__)
    add, ways = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--run", help="report on this folder of a run, as run.sh lays it out")
    ways.add_argument("--runs", help="the tables over these runs, A,B,C: seeds of one setting")
    ways.add_argument("--policies", help="compare two policies, A,B: folders or hub names")
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
