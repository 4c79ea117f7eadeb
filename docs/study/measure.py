"""What is measured of a reward model and of a policy: {metric: number}, with eval.py's measures.

An answer set is (prompts, m groups of k responses, gold (m, k)). SD: rewards and gold are counted
in SDs of the same judge's rewards on SFT samples, above their mean there, because Eq. 1 fixes
neither scale nor offset of a reward model.
"""

from pathlib import Path

import numpy as np
import torch

import data
import eval as measures
import ppo
import rm

TIE = 0.25  # a smaller gold gap is a tie, in SDs of gold


def answer_set(prompts: list[str], groups: list[list[str]]) -> tuple:
    gold = [[data.gold_reward(x, y) for y in ys] for x, ys in zip(prompts, groups, strict=True)]
    return prompts, groups, np.array(gold)


def answers(policy: Path, prompts: Path, seed: int) -> tuple:
    """A policy's answer set, k = 5 at temperature 1; kept beside the policy's folder."""
    kept = policy.with_name(f"{policy.name}-{prompts.name}")
    if not kept.exists():
        asked, options = data.read_prompts(prompts), {"max_new_tokens": 48, "batch_size": 640}
        groups = ppo.sample_responses(*ppo.load_policy(str(policy)), asked, 5, seed=seed, **options)
        rows = zip(asked, groups, strict=True)
        data.write_jsonl(kept, [{"prompt": prompt, "responses": group} for prompt, group in rows])
    rows = data.read_jsonl(kept)
    return answer_set([row["prompt"] for row in rows], [row["responses"] for row in rows])


def pair_set(pairs: list[dict]) -> tuple:
    """Preference pairs as an answer set: k = 2, the chosen response first."""
    texts = [[pair["chosen"], pair["rejected"]] for pair in pairs]
    return answer_set([pair["prompt"] for pair in pairs], texts)


def rewards_on(model: tuple, prompts: list[str], groups: list[list[str]], gold=None) -> np.ndarray:
    """Rewards (m, k) by a loaded (reward model, tokenizer)."""
    asked = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    rewards = rm.score(*model, asked, sum(groups, []), batch_size=640)
    return rewards.double().reshape(len(groups), -1).numpy()


def in_sd(x, of: np.ndarray) -> np.ndarray:
    """How many SDs of `of` (SFT's) above its mean."""
    return (np.asarray(x) - of.mean()) / (of.std() or 1.0)


def final_kl(policy: Path) -> float:
    """Nats from SFT, over the last five steps of its PPO; 0 of SFT."""
    log = data.read_jsonl(policy / "log.jsonl")
    return float(np.mean([row.get("objective/kl", 0.0) for row in log[-5:]]))


def of_reward_model(model: tuple, sets: dict[str, tuple], held_out: tuple) -> dict[str, float]:
    """What an RM is worth on answer sets by name, one of which is "sft".

    Of each set: accuracy in % with ties of gold left out, raw (acc) and at the same gold gap as on
    SFT samples (matched; matched_sft is SFT's own, over the same bins); rank correlation; mean
    reward in SDs of SFT's; J, margin and variance of the reward difference, raw and (_sd) in SDs,
    because by scale alone they can rise. held_out: the pairs of D that it was not trained on.
    """
    margins, truth = rewards_on(model, *held_out) @ [1, -1], held_out[2] @ [1, -1]
    row = {
        "D.noisy": 100 * measures.agreement(margins, 1).mean(),
        "D.gold": 100 * measures.agreement(margins, truth)[truth != 0].mean(),
    }
    on_sft, gold_on_sft = rewards_on(model, *sets["sft"]), sets["sft"][2]
    scaled = in_sd(on_sft, on_sft), in_sd(gold_on_sft, gold_on_sft)
    for name, some in sets.items():
        x = on_sft if name == "sft" else rewards_on(model, *some)
        pair = in_sd(x, on_sft), in_sd(some[2], gold_on_sft)
        matched = measures.matched_accuracy(scaled, pair, measures.GAP_EDGES)
        row[f"{name}.acc"] = 100 * measures.pair_accuracy(*pair, TIE)[0]
        row[f"{name}.matched"] = 100 * matched["second"]
        row[f"{name}.matched_sft"] = 100 * matched["first"]
        row[f"{name}.rho"] = measures.rank_correlation(*pair)[0]
        row[f"{name}.reward"] = pair[0].mean()
        for scale, unit in ((1.0, ""), (on_sft.std() or 1.0, "_sd")):
            spread = measures.spread(x, scale)
            row |= {f"{name}.{key}{unit}": value for key, value in spread.items()}
    return row


def of_rules(model: tuple, name: str, answers: tuple) -> dict[str, float]:
    """% of pairs ordered as a rule of gold alone orders them, where its points differ, by rule."""
    rewards, row = rewards_on(model, *answers), {}
    parts = [[data.gold_parts(x, y) for y in ys] for x, ys in zip(*answers[:2], strict=True)]
    for rule in parts[0][0]:
        points = np.array([[part[rule] for part in group] for group in parts])
        right, pairs = measures.pair_accuracy(rewards, points)
        if pairs >= 100:
            row[f"{name}.rule.{rule}"] = 100 * right
    return row


def of_weights(margins: np.ndarray, truth: np.ndarray, at: str) -> dict[str, float]:
    """Mean weight in Eq. 4, 1 - σ(margin), of pairs whose label gold confirms, and of flipped ones.

    margins, truth: reward and gold of the chosen response less those of the rejected.
    """
    weights, sides = 1 / (1 + np.exp(margins)), {"right": truth > 0, "flipped": truth < 0}
    return {f"{at}.weight.{side}": weights[which].mean() for side, which in sides.items()}


@torch.no_grad()
def of_climb(model: tuple, adapted: tuple, log: list[dict]) -> dict[str, float]:
    """What one climb does to J, to L and to the weights, from the log of MetaRM's RM and its θ'.

    moved: % of weights that the climb changes in float32; moved_bf16: if they were kept in bf16.
    """
    looks = [row for row in log if "cosine" in row]
    rises = {"J": ("difference_adapted", "difference")}
    rises |= {"L": ("vanilla_loss_adapted", "vanilla_loss")}
    row = {"climb.cosine": float(np.mean([look["cosine"] for look in looks]))}
    for name, (after, before) in rises.items():
        row[f"climb.{name}"] = float(np.mean([look[after] - look[before] for look in looks]))
    theta, beyond = (
        torch.nn.utils.parameters_to_vector(m.parameters()) for m, _ in (model, adapted)
    )
    kept = theta.bfloat16()
    row["moved"] = 100 * (beyond != theta).float().mean().item()
    row["moved_bf16"] = 100 * ((kept + (beyond - theta)).bfloat16() != kept).float().mean().item()
    return row
