"""What is measured of a reward model and of a policy: {metric: number}, with eval.py's measures.

An answer set is (prompts, m groups of k responses, gold (m, k)). SD: a judge's rewards are counted
in SDs of its own on SFT samples, above their mean: Eq. 1 fixes neither scale nor offset of an RM.
"""

from pathlib import Path

import numpy as np
import torch

import data
import eval as measures
import ppo

TIE = 0.25  # a smaller gold gap is a tie, in SDs of gold


def answer_set(prompts: list[str], groups: list[list[str]]) -> tuple:
    return prompts, groups, measures.scored(None, prompts, groups)


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


def rewards_on(model: tuple, answers: tuple) -> np.ndarray:
    """Rewards (m, k) by a loaded (reward model, tokenizer)."""
    return measures.scored(model, *answers[:2])


def in_sd(x, of: np.ndarray) -> np.ndarray:
    """How many SDs of `of` (SFT's) above its mean."""
    return (np.asarray(x) - of.mean()) / (of.std() or 1.0)


def final_kl(policy: Path) -> float:
    """Nats from SFT, over the last five steps of its PPO; 0 of SFT."""
    log = data.read_jsonl(policy / "log.jsonl")
    return float(np.mean([row.get("objective/kl", 0.0) for row in log[-5:]]))


def of_reward_model(model: tuple, sets: dict[str, tuple], D: tuple | None) -> dict[str, float]:
    """What an RM is worth on answer sets by name, one of which is "sft", and on pairs of D.

    Of each set: accuracy in % with ties of gold left out, raw (acc) and at the same gold gap as on
    SFT samples (matched; matched_sft is SFT's own, over the same bins); rank correlation; mean
    reward; J, margin and variance of the reward difference in SDs (_sd). Of "sft" and "shifted" the
    last three raw, too, because by scale alone they can rise. D: pairs held out; None: not asked.
    """
    row = {}
    if D:
        margins, truth = (x @ [1, -1] for x in (rewards_on(model, D), D[2]))
        right = 100 * measures.agreement(margins, truth)[truth != 0].mean()
        row = {"D.noisy": 100 * measures.agreement(margins, 1).mean(), "D.gold": right}
    on_sft, gold_on_sft = rewards_on(model, sets["sft"]), sets["sft"][2]
    scaled, unit = (in_sd(on_sft, on_sft), in_sd(gold_on_sft, gold_on_sft)), on_sft.std() or 1.0
    for name, some in sets.items():
        x = on_sft if name == "sft" else rewards_on(model, some)
        pair = in_sd(x, on_sft), in_sd(some[2], gold_on_sft)
        matched = measures.matched_accuracy(scaled, pair, measures.GAP_EDGES)
        found = {"acc": 100 * measures.pair_accuracy(*pair, TIE)[0], "reward": pair[0].mean()}
        found |= {"matched": 100 * matched["second"], "matched_sft": 100 * matched["first"]}
        found |= {"rho": measures.rank_correlation(*pair)[0]}
        found |= {f"{key}_sd": value for key, value in measures.spread(x, unit).items()}
        if name in ("sft", "shifted"):
            found |= measures.spread(x)
        row |= {f"{name}.{key}": value for key, value in found.items()}
    return row


def of_policy(policy: Path, reference: Path, own: tuple, sft: tuple, rivals: dict) -> dict:
    """What a policy is worth on its answer set: gold is compared with {name: a rival's answer set}.

    kl: nats from the reference. win.X, lose.X: % of answers; a gold gap below TIE is neither.
    """
    loaded, (ref_policy, _) = ppo.load_policy(str(policy)), ppo.load_policy(str(reference))
    row, gold = {"kl": measures.kl_to(*loaded, ref_policy, *own[:2])}, in_sd(own[2], sft[2])
    row |= {"gold": gold.mean(), "bleu": measures.self_bleu(own[1])}
    for name, theirs in rivals.items():
        sides = measures.win_tie_lose(gold, in_sd(theirs[2], sft[2]), TIE)
        row |= {f"{side}.{name}": sides[side] for side in ("win", "lose")}
    return row


def of_rollouts(policy: Path, gold_on_sft: np.ndarray, parts: int) -> dict[str, float]:
    """Gold over KL during PPO, in so many points: each a mean over its share of the steps."""
    row = {}
    for i, some in enumerate(np.array_split(data.read_jsonl(policy / "rollouts.jsonl"), parts)):
        gold = [answer_set(step["prompts"], step["responses"])[2].mean() for step in some]
        row[f"path_kl{i}"] = np.mean([step["kl"] for step in some])
        row[f"path_gold{i}"] = in_sd(np.mean(gold), gold_on_sft)
    return row


@torch.no_grad()
def of_climb(model: tuple, adapted: tuple, log: list[dict], answers: tuple) -> dict[str, float]:
    """What one climb does, from the looks in the log of MetaRM's RM, and from its θ'.

    J, L: their change. ratio: J's rise over the predicted one (Eq. 8); holds: % of looks where it
    is in 0.7 to 1.3. cosine: of grad L and grad J. multiplied: % of the change of these answers'
    rewards (squares within a prompt) that one factor for all rewards makes. head: % of the squared
    length of the climb that lies along the reward head, which multiplies all rewards, too.
    """
    looks = [row for row in log if "cosine" in row]
    ratio = np.array([row["rise"] / (row["predicted_rise"] or np.nan) for row in looks])
    of = {"J": [row["rise"] for row in looks], "L": [row["loss_change"] for row in looks]}
    of |= {"cosine": [row["cosine"] for row in looks], "ratio": ratio}
    of |= {"holds": 100 * (abs(ratio - 1) <= 0.3)}
    before, after = rewards_on(model, answers), rewards_on(adapted, answers)
    before, change = (x - x.mean(axis=1, keepdims=True) for x in (before, after - before))
    of["multiplied"] = 100 * (before * change).sum() ** 2 / ((before**2).sum() * (change**2).sum())
    theta, there = (dict(m.named_parameters()) for m, _ in (model, adapted))
    step = {name: (there[name] - p).double() for name, p in theta.items()}
    head = theta["score.weight"].double()
    along = (step["score.weight"] * head).sum() ** 2 / (head**2).sum()
    of["head"] = 100 * float(along / sum((x**2).sum() for x in step.values()))
    return {f"climb.{name}": float(np.mean(values)) for name, values in of.items()}
