"""Prints the preference pairs of at most so many tokens, in their order: prompt, chosen, rejected.

    python docs/hh/short.py models/smollm2 pairs.jsonl.gz 128 > short.jsonl

The time of a run grows with its tokens.
"""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import rm


def main(model: str, source: str, limit: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    for pair in data.read_preferences(source):
        rows = [rm.encode(tokenizer, pair["prompt"], pair[key]) for key in ("chosen", "rejected")]
        [length] = rm.row_lengths([rows])
        if length <= int(limit):
            print(json.dumps(pair, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
