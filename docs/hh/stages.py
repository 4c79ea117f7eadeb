"""Prints seconds, peak memory and tokens per second of each stage of an hh or hh-smoke run.

    bash run.sh hh-smoke --model models/smollm2 --data short.jsonl 2>&1 | tee smoke.log
    python docs/hh/stages.py runs/hh-smoke smoke.log

Seconds and memory are what each command printed at its end: loading is included, and of a stage
that was killed, only the last part. Tokens of training: each prompt once and all its responses,
per epoch, without padding and diagnostics. Tokens of `policy` and `meta`: those generated.
"""

import re
import sys
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import rm


def tokens_of(run: Path, out: Path, tokenizer) -> int:
    """Returns how many tokens the stage that wrote `out` read in training, or else generated."""

    def read(path: Path, most: int = 512) -> tuple[int, int]:  # tokens, rows
        rows = [(row.pop("prompt"), row) for row in data.read_jsonl(path)]
        rows = [(prompt, row.get("responses", row.values())) for prompt, row in rows]
        groups = [[rm.encode(tokenizer, prompt, text) for text in texts] for prompt, texts in rows]
        groups = [group for group in groups if rm.row_lengths([group])[0] <= most]
        return sum(len(g[0][0]) + sum(len(ids) for _, ids in g) for g in groups), len(groups)

    if out.name in ("meta", "policy"):
        rows = data.read_jsonl(out / ("samples.jsonl" if out.name == "meta" else "rollouts.jsonl"))
        texts = [text for row in rows for text in row["responses"]]
        texts = sum(([text] if isinstance(text, str) else text for text in texts), [])
        return sum(len(rm.encode(tokenizer, "", text)[1]) for text in texts)
    if out.name == "sft":
        epochs = 2 if (run / "made_by").read_text().startswith("hh ") else 1
        return epochs * read(run / "data" / "sft.jsonl")[0]
    if out.parent.name == "judge":
        return 2 * read(run / "data" / "judge.jsonl")[0]
    tokens, pairs = read(run / "data" / "train.jsonl")
    if out.parent.name.startswith("metarm"):  # one prompt of S per pair of D
        of_S, prompts = read(out.parent / "meta" / "samples.jsonl")
        tokens += of_S * pairs // prompts
    return tokens


def main(folder: str, log: str) -> None:
    run, text = Path(folder), Path(log).read_text(errors="replace")
    tokenizer = AutoTokenizer.from_pretrained(run / "sft")
    print("| stage | seconds | peak GB | GPU GB | tokens | tokens per second |\n|" + "---|" * 6)
    for part in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        out = Path(part.split("\n")[0])
        took = re.findall(r"\.py: (\d+) s, ([\d.]+) GB(?:, GPU ([\d.]+) GB)?$", part, re.MULTILINE)
        for (seconds, *peak), name in zip(took, (out.relative_to(folder), "eval"), strict=False):
            tokens = 0 if str(name) in ("data", "eval") else tokens_of(run, out, tokenizer)
            row = [name, seconds, *peak, tokens, tokens // max(int(seconds), 1)]
            print("|", " | ".join(str(x or "–") for x in row), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
