"""Prints what `bash run.sh hh` takes, stage by stage: computed and, of a run, measured.

    python docs/hh/stages.py              computed, before anybody starts
    bash run.sh hh 2>&1 | tee hh.log
    python docs/hh/stages.py hh.log       and measured, as each command printed it

Computed for HH-RLHF harmless-base and SmolLM2-135M; README.md says how. Left out: loading, text
work, memory traffic, and attention's own arithmetic (under 8 %).
"""

import math
import re
import sys
from pathlib import Path

LAUNCH, SHARE, W = 10e-6, 0.4, 134.5e6  # seconds; of the peak; weights
PEAKS = {  # floating-point operations per second, dense, as NVIDIA states them
    "H100 SXM": {"bf16": 989e12, "float32": 67e12},
    "RTX 4090": {"bf16": 165e12, "float32": 82.6e12},
}
# What a computation of this page is for, as run.sh's hh has it; tests/test_hh.py compares.
PRESET = {
    "sft": {"batch_size": 32, "micro_batch_size": 16, "epochs": 2, "max_length": 320},
    "rm": {"batch_size": 16, "micro_batch_size": 16, "log_every": 100, "max_length": 320},
    "meta": {"meta_batch_size": 16, "micro_batch_size": 8},
    "dpo": {"batch_size": 32, "micro_batch_size": 8, "max_length": 320},
    "sample": {"batch_size": 512, "max_new_tokens": 128, "max_length": 320},
    "ppo": {"steps": 50, "batch_size": 512, "minibatch_size": 32, "micro_batch_size": 32}
    | {"rollouts_per_prompt": 16, "ppo_epochs": 1, "max_new_tokens": 128, "max_length": 320},
}
# Of 42,537 pairs, 0.3 % have two prompts. data.py gives a quarter to the judge, a quarter to S and
# PPO, and the rest to D and SFT. The shares that --max_length keeps, and all numbers of tokens
# below, come from 1,396 pairs of the test split, batched as the stages do.
PAIRS = 42_537 * 0.997
D, SFT, S = 0.868 * 0.49 * PAIRS, 0.894 * 0.49 * PAIRS, 0.812 * PAIRS / 12
# GB: one copy of the weights (a model in training has 4: its own, the gradient, AdamW's two
# averages). Per token, what autograd keeps for the backward pass; per response token, the logits of
# 49,152 words and their gradient; per token of a row whose prompt is read once, its copies of keys
# and values; and these in generation.
COPY, KEPT = 4e-9 * W, {"bf16": 1.16e-3, "float32": 1.56e-3}
LOGITS, REPEATED, CACHED = 0.54e-3, 0.115e-3, 0.035e-3


def stages() -> dict[str, tuple]:
    """Returns {kind: (stages in a run, steps of each, parts of a step, GB)}.

    A part is (launches, tokens times 6 or 2, precision). Launches are the operations that PyTorch
    sent to the device, counted on an untrained model of 30 layers. Reward models are float32.
    """
    generate = 242_000  # launches for 128 tokens, of however many responses
    answers = 45  # tokens of a mean response
    pairs_read = 2 * 109_000 / PRESET["rm"]["log_every"]  # 425 held-out pairs, at every look
    width = 179 + 128  # tokens of a PPO step: the longest of 32 prompts, of 512 responses
    padded = 512 * width
    return {
        "sft": (
            1,
            2 * SFT / 32,
            [(13_800, 6 * 32 * 336, "bf16")],
            4 * COPY + 16 * (274 * KEPT["bf16"] + 255 * (KEPT["bf16"] + LOGITS)),
        ),
        "sample": (
            3,
            5 * S / 512,
            [(generate, 2 * (102 * 100 + 512 * answers), "bf16")],
            2 * COPY + 512 * 320 * CACHED + 1,  # 1: top-p sorts 512 x 49,152 probabilities
        ),
        "metarm": (
            3,
            D / 16,
            # S's prompts are read once, for all k responses. A look also costs three steps.
            [(1.03 * 31_000, 6 * 1.03 * (12_000 + 4_700), "float32"), (230, pairs_read, "float32")],
            7 * COPY + 8 * (191 + 5 * 129) * KEPT["float32"] + 8 * 5 * 320 * REPEATED,
        ),
        "rm": (  # RM 0, three reseeded ones, the judge: two epochs of half as many pairs
            5,
            D / 16,
            [(6_700, 6 * 4_860, "float32"), (230, pairs_read, "float32")],
            4 * COPY + 32 * 320 * KEPT["float32"],
        ),
        "ppo": (
            9,
            50,
            [
                (generate, 2 * (32 * width + 512 * answers), "bf16"),
                (12_400, 2 * 512 * 201, "float32"),  # the RM's scores
                (311_000, (2 * 3 + 6 * 2) * padded, "bf16"),  # three read; two are trained
            ],
            10 * COPY + 32 * (320 * KEPT["bf16"] + 129 * LOGITS),
        ),
        "dpo": (
            1,
            D / 32,
            [(34_000, (2 + 6) * 14_100, "bf16")],
            5 * COPY + 16 * (290 * KEPT["bf16"] + 257 * (KEPT["bf16"] + LOGITS)),
        ),
        "eval": (  # 11 policies answer; the judge scores all rollouts of all rounds
            1,
            1,
            [(33 * generate, 0, "bf16"), (6.5e6, 2 * 9 * 50 * 512 * 201, "float32")],
            3 * COPY + 256 * (826 + 128) * CACHED,
        ),
    }


def measured(log: str) -> dict[str, list]:
    """Returns {kind: [(seconds, GB of the GPU, or of the process), ...]} of run.sh's output."""
    found, kind = {}, ""
    for line in log.splitlines():
        if re.match(r"== \S+$", line):
            out = Path(line[3:])
            kind = {"meta": "sample", "policy": "ppo"}.get(out.name, out.name)
            if kind in ("rm", "rm0"):
                kind = "metarm" if out.parent.name.startswith("metarm") else "rm"
        end = re.search(r"(\w+)\.py: (\d+) s, ([\d.]+) GB(?:, GPU ([\d.]+) GB)?$", line)
        if end:
            kind = "eval" if end[1] == "eval" else kind
            found.setdefault(kind, []).append((int(end[2]), float(end[4] or end[3])))
    return found


def main(log: str = "") -> None:
    took = measured(Path(log).read_text(errors="replace")) if log else {}
    heads = ["stage", "times", "steps", "launches per step", "TFLOP per step"]
    heads += [*(f"{gpu}, min" for gpu in PEAKS), "GB"]
    heads += ["done", "measured, min", "measured, GB"] if log else []
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    total = dict.fromkeys([*PEAKS, "launches alone", *(["measured"] if log else [])], 0.0)
    for kind, (times, steps, parts, memory) in stages().items():
        launches = sum(part[0] for part in parts)
        row = [kind, times, f"{steps:,.0f}", f"{launches:,.0f}"]
        row += [f"{sum(tokens * W for _, tokens, _ in parts) / 1e12:,.0f}"]
        total["launches alone"] += times * steps * launches * LAUNCH / 60
        for gpu, peaks in PEAKS.items():
            slower = (max(n * LAUNCH, x * W / peaks[how] / SHARE) for n, x, how in parts)
            minutes = times * steps * sum(slower) / 60
            row, total[gpu] = [*row, f"{minutes:.0f}"], total[gpu] + minutes
        row.append(math.ceil(memory))
        if log:
            seconds, peaks_seen = zip(*took.get(kind, [(0, 0.0)]), strict=True)
            row += [len(took.get(kind, [])), f"{sum(seconds) / 60:.1f}", max(peaks_seen)]
            total["measured"] += sum(seconds) / 60
        print("|", " | ".join(map(str, row)), "|")
    print("\nHours:", ", ".join(f"{name} {minutes / 60:.1f}" for name, minutes in total.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
