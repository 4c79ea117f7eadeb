"""Part 2: are the policies better? Each arm has a chain of its own, of reward models and policies.

In round r of three, S comes from the arm's own last policy, and its reward model has head r - 1,
but for "ppo:rm0", which keeps RM₀: so plain and MetaRM differ by the climb alone. One KL weight,
`policy_kl` of settings.json; gold judges.
"""

from pathlib import Path

import measure
from arms import CLIMB, stage

import ppo
import rm

ROUNDS, PARTS = 3, 3  # of an arm; in each round, the points of gold over KL
POLICIES = f"dpo ppo:rm0 ppo:plain ppo:first@{CLIMB} ppo:gold ppo:adapted@{CLIMB}".split()


def policy(world, arm: str, r: int) -> Path:
    """The folder of an arm's policy after round r, 0 for SFT's. What is missing is trained."""
    if r == 0:
        return world.sft
    if arm == "dpo":  # no reward model, no rounds
        argv = ["--model", world.sft, "--data", world.D / "train.jsonl", *world.flags["dpo"]]
        return stage(world.home / arm, ppo.main, "dpo", *argv, "--seed", world.seed)
    weight, last = world.chosen["policy_kl"], policy(world, arm, r - 1)
    how = last, reward_model(world, arm, r), f"{world.seed}{r}", "--kl_coef", weight
    return world.improve(f"{arm}-{weight}-{r}", *how)


def reward_model(world, arm: str, r: int) -> Path:
    """The reward model that an arm's policy is optimised against in round r."""
    kind = arm.removeprefix("ppo:")
    last = policy(world, arm, r - 1)
    folder = world.reward_model(kind.replace("adapted", "first"), r - 1, last)
    return folder.with_name("adapted") if kind.startswith("adapted") else folder


def figures(world, arm: str, r: int) -> dict[str, float]:
    """All figures of an arm's round r."""

    def answers(policy):
        return measure.answers(policy, world.prompts("test"), world.seed + 1)

    made = policy(world, arm, r)
    rivals = {"SFT": world.sft, "DPO": policy(world, "dpo", 1), "PPO": policy(world, "ppo:rm0", r)}
    theirs = {name: answers(path) for name, path in rivals.items() if path != made}
    own, sft = answers(made), answers(world.sft)
    row = measure.of_policy(made, world.sft, own, sft, theirs)
    if arm != "dpo":
        row |= measure.of_rollouts(made, sft[2], PARTS)
        model = rm.load_reward_model(str(reward_model(world, arm, r)))
        found = measure.of_reward_model(model, {"sft": sft, "own": own}, None)
        row |= {name: found[f"own.{name}"] for name in ("reward", "matched", "matched_sft")}
    return {f"{name}.{r}": float(value) for name, value in row.items()}
