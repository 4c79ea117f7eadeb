"""Prints how many held-out pairs are ordered as their labels say, with 95 % intervals.

    python docs/hh/baselines.py runs/hh-rm/valid.jsonl runs/hh-rm/plain runs/hh-rm/metarm

A tie counts half. The last column compares an RM with the first one that is named, pair by pair.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import rm


def main(path: str, *folders: str) -> None:
    pairs = data.read_preferences(path)
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    answers = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    longer = np.sign(np.diff([len(text) for text in answers])[::2])  # 1: the rejected one is longer
    signs = {"the longer answer": -longer, "the shorter answer": longer}
    for folder in folders:
        model, tokenizer = rm.load_reward_model(folder)
        rewards = rm.score(model.to(rm.pick_device()), tokenizer, prompts, answers)
        signs[folder] = np.sign(-np.diff(rewards.numpy())[::2])
    print("| ordered by | right, % | 95 % interval | minus the first RM, points |")
    print("|---|---|---|---|")
    n, z = len(pairs), 1.96
    for name, sign in signs.items():
        p = ((1 + sign) / 2).mean()
        middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        low, high = 100 * (middle - half) / (1 + z**2 / n), 100 * (middle + half) / (1 + z**2 / n)
        row = [name, f"{100 * p:.1f}", f"{low:.1f} to {high:.1f}", ""]  # Wilson's interval
        if name in folders[1:]:
            gain = 50 * (sign - signs[folders[0]])
            row[-1] = f"{gain.mean():+.1f} ± {z * gain.std(ddof=1) / math.sqrt(n):.1f}"
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
