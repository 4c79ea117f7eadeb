"""Writes the preference rows whose two texts have at most so many tokens, unchanged and in order.

    python docs/hh/short.py models/smollm2 pairs.jsonl.gz 128 > short.jsonl
    python docs/hh/short.py models/smollm2 pairs.jsonl.gz 128 sort > by-length.jsonl

With `sort`, the shortest row comes first. Small machines need short rows: time grows with tokens.
"""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import rm


def main(model: str, source: str, limit: str, sort: str = "") -> None:
    tokenizer, kept = AutoTokenizer.from_pretrained(model), []
    for where, row in data.read_lines(source):
        texts = [data.split_row(row, key, where) for key in ("chosen", "rejected")]
        length = max(sum(map(len, rm.encode(tokenizer, *text))) for text in texts)
        if length <= int(limit):
            kept.append((length, row))
    for _, row in sorted(kept, key=lambda pair: pair[0]) if sort else kept:
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
