"""What is measured of a policy and of a reward model: {metric: number}, with eval.py's measures.

An answer set is (prompts, m groups of k responses, gold (m, k)). SD: rewards and gold are counted
in SDs of the same judge's rewards on SFT samples, above their mean there, because Eq. 1 fixes
neither scale nor offset of a reward model.
"""

from pathlib import Path

import numpy as np

import data
import eval as measures
import ppo
import rm

TIE = 0.25  # a smaller gold gap is a tie, in SDs of gold


def answer_set(prompts: list[str], groups: list[list[str]]) -> tuple:
    gold = [[data.gold_reward(x, y) for y in ys] for x, ys in zip(prompts, groups, strict=True)]
    return prompts, groups, np.array(gold)


def answers(policy: Path, prompts: dict[str, list[str]], seed: int) -> dict[str, tuple]:
    """A policy's answer sets, k = 5 at temperature 1: {part: (prompts, groups, gold)}.

    What was sampled once is kept beside the policy's folder.
    """
    every, kept = sum(prompts.values(), []), policy.with_name(f"{policy.name}-answers.jsonl")
    if not kept.exists():
        options = {"k": 5, "max_new_tokens": 48, "batch_size": 640, "seed": seed}
        groups = ppo.sample_responses(*ppo.load_policy(str(policy)), every, **options)
        rows = zip(every, groups, strict=True)
        data.write_jsonl(kept, [{"prompt": prompt, "responses": group} for prompt, group in rows])
    groups = iter([row["responses"] for row in data.read_jsonl(kept)])
    return {part: answer_set(some, [next(groups) for _ in some]) for part, some in prompts.items()}


def rewards_on(model: tuple, prompts: list[str], groups: list[list[str]]) -> np.ndarray:
    """Rewards (m, k) by a loaded (reward model, tokenizer)."""
    asked = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    rewards = rm.score(*model, asked, sum(groups, []), batch_size=640)
    return rewards.double().reshape(len(groups), -1).numpy()


def in_sd(x, of: np.ndarray) -> np.ndarray:
    """How many SDs of `of` (SFT's) above its mean."""
    return (np.asarray(x) - of.mean()) / (of.std() or 1.0)


def final_kl(policy: Path) -> float:
    """Nats from SFT, over the last five steps of its PPO."""
    log = data.read_jsonl(policy / "log.jsonl")
    return float(np.mean([row["objective/kl"] for row in log[-5:]]))


def of_policy(own: dict, sft: dict, rivals: dict[str, dict]) -> dict[str, float]:
    """What a policy is worth by gold. own, sft, rivals: answer sets by part."""
    gold = {part: in_sd(own[part][2], sft[part][2]) for part in own}
    texts = own["test"][1]
    row = {
        "gold": gold["test"].mean(),
        "gold.valid": gold["valid"].mean(),
        "gold.ood": gold["ood"].mean(),
        "words": measures.mean_words(texts),
        "distinct": measures.distinct_share(texts),
        "bleu": measures.self_bleu(texts),
    }
    for name, rival in rivals.items():
        for part, label in (("test", name), ("ood", f"{name}.ood")):
            theirs = in_sd(rival[part][2], sft[part][2])
            against = measures.win_tie_lose(gold[part], theirs, TIE)
            row |= {f"{side}.{label}": against[side] for side in ("win", "lose")}
    return row


def of_rollouts(policy: Path, reward_on_sft, gold_on_sft, parts: int = 3) -> dict[str, float]:
    """Gold and predicted reward over KL during PPO, in a few points per round (Gao et al. 2022).

    And the variance of the difference of two rollouts to one prompt, SD²: the paper's Figure 1.
    """
    steps, row = data.read_jsonl(policy / "rollouts.jsonl"), {}
    for i, some in enumerate(np.array_split(steps, min(parts, len(steps)))):
        row[f"curve{i}.kl"] = np.mean([step["kl"] for step in some])
        gold = [answer_set(step["prompts"], step["responses"])[2] for step in some]
        predicted = [step["scores"] for step in some]
        for name, rewards, on_sft in (
            ("gold", gold, gold_on_sft),
            ("rm", predicted, reward_on_sft),
        ):
            rewards = in_sd(np.concatenate(rewards), on_sft)
            row[f"curve{i}.{name}"] = rewards.mean()
            row[f"curve{i}.{name}_variance"] = measures.spread(rewards)["variance"]
    return row


def of_reward_model(model: tuple, sets: dict, sft: tuple, pairs: list[dict]) -> tuple[dict, dict]:
    """What an RM is worth: (figures, its rewards on each set).

    sets: {name: answer set}. For each set, and for SFT's: accuracy in % with ties of gold left out,
    raw (acc) and at the same gold gap as on SFT samples (matched; matched_sft is SFT's own, over
    the same bins); rank correlation; J, margin and variance, raw and in SDs of this RM's rewards on
    SFT samples, because by scale alone they can rise. pairs: held-out pairs of D.
    """
    on_sft, gold_on_sft = rewards_on(model, *sft[:2]), sft[2]
    texts = [[pair["chosen"], pair["rejected"]] for pair in pairs]
    prompts, _, gold = answer_set([pair["prompt"] for pair in pairs], texts)
    margins, truth = rewards_on(model, prompts, texts) @ [1, -1], gold @ [1, -1]
    row = {
        "D.noisy": 100 * measures.agreement(margins, 1).mean(),
        "D.gold": 100 * measures.agreement(margins, truth)[truth != 0].mean(),
    }
    rewards = {"sft": on_sft, "D": margins, "D.truth": truth}
    for name, (prompts, groups, gold) in ({"sft": sft} | sets).items():
        rewards[name] = x = on_sft if name == "sft" else rewards_on(model, prompts, groups)
        pair = in_sd(x, on_sft), in_sd(gold, gold_on_sft)
        scaled = in_sd(on_sft, on_sft), in_sd(gold_on_sft, gold_on_sft)
        matched = measures.matched_accuracy(scaled, pair, measures.GAP_EDGES)
        row[f"{name}.acc"] = 100 * measures.pair_accuracy(*pair, TIE)[0]
        row[f"{name}.matched"] = 100 * matched["second"]
        row[f"{name}.matched_sft"] = 100 * matched["first"]
        row[f"{name}.rho"] = measures.rank_correlation(*pair)[0]
        for scale, unit in ((1.0, ""), (on_sft.std() or 1.0, "_sd")):
            spread = measures.spread(x, scale)
            row |= {f"{name}.{key}{unit}": value for key, value in spread.items()}
        row[f"{name}.gold_variance"] = measures.spread(pair[1])["variance"]
        if name == "shifted":  # the distribution in the paper's Figure 5
            gaps = np.abs(measures.reward_gaps(*pair)[0])
            row |= {f"{name}.gap{q}": np.quantile(gaps, q / 100) for q in (10, 25, 50, 75, 90)}
    return row, rewards


def of_mechanism(folder: Path, at: dict, beyond: dict) -> dict[str, float]:
    """What the paper leaves open: do grad L and grad J agree, and which pairs weigh more at θ'?

    A pair's weight in Eq. 4 is 1 - σ(margin). folder: the RM, for its log. at, beyond: rewards by θ
    and by θ' on held-out pairs of D.
    """
    log = [row for row in data.read_jsonl(folder / "log.jsonl") if "cosine" in row]
    third = max(1, len(log) // 3)
    more = 1 / (1 + np.exp(beyond["D"])) - 1 / (1 + np.exp(at["D"]))  # the weight's change
    truth = at["D.truth"]

    def mean(rows, name, less=None):
        return float(np.mean([row[name] - (row[less] if less else 0) for row in rows]))

    row = {
        "cos.early": mean(log[:third], "cosine"),
        "cos.late": mean(log[-third:], "cosine"),
        "climb.L": mean(log, "vanilla_loss_adapted", "vanilla_loss"),
        "climb.L_taylor": mean(log, "first_order_gain"),
        "climb.J": mean(log, "difference_adapted", "difference"),
        "weight.mean": more.mean(),
        "weight.rho_gap": measures.rank_correlation([more], [np.abs(truth)])[0],
    }
    if (truth < 0).any() and (truth >= 0).any():
        row["weight.flipped"] = more[truth < 0].mean() - more[truth >= 0].mean()
    return row


def of_training(log: Path) -> dict[str, float]:
    """Accuracy on held-out D at the start, the quarters and the end of training (Figure 4)."""
    if not log.exists():  # θ' has none
        return {}
    accuracy = [100 * row["accuracy"] for row in data.read_jsonl(log) if "accuracy" in row]
    last = len(accuracy) - 1
    return {f"epoch{4 * i}": accuracy[round(i * last / 4)] for i in range(5) if accuracy}


def disagreement(rewards: np.ndarray, others: np.ndarray) -> float:
    """% of pairs of responses to one prompt that two reward models order differently."""
    return 100 * (1 - measures.agreement(*measures.reward_gaps(rewards, others)).mean())
