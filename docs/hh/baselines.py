"""Prints how many held-out pairs are ordered as their labels say, with 95 % intervals.

    python docs/hh/baselines.py runs/hh-rm/valid.jsonl runs/hh-rm/plain runs/hh-rm/metarm

Ordered by: the longer answer, the shorter answer, and each reward model folder that is named.
Shares have Wilson intervals. The last column compares with the first reward model, pair by pair.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import rm


def main(path: str, *folders: str) -> None:
    pairs, verdicts = data.read_preferences(path), {}
    longer = np.sign([len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs])
    gaps = {"the longer answer": longer, "the shorter answer": -longer}
    for folder in folders:
        model = rm.load_reward_model(folder)
        rewards = [rm.score(*model, *texts(pairs, side)) for side in ("chosen", "rejected")]
        gaps[folder] = np.sign((rewards[0] - rewards[1]).numpy())
    print("| ordered by | right, % | 95 % interval | minus the first RM, points |")
    print("|---|---|---|---|")
    for name, gap in gaps.items():
        right = verdicts[name] = (1 + gap) / 2  # a tie counts half
        row, n = [name, f"{100 * right.mean():.1f}"], len(pairs)
        low, high = wilson(right.mean(), n)
        row += [f"{100 * low:.1f} to {100 * high:.1f}", ""]
        if name in folders[1:]:
            change = 100 * (right - verdicts[folders[0]])
            half = 1.96 * change.std(ddof=1) / math.sqrt(n)
            row[-1] = f"{change.mean():.1f} ± {half:.1f}"
        print("|", " | ".join(row), "|")


def texts(pairs: list[dict], side: str) -> tuple[list[str], list[str]]:
    return [pair["prompt"] for pair in pairs], [pair[side] for pair in pairs]


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the 95 % interval of a share p of n."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


if __name__ == "__main__":
    main(*sys.argv[1:])
