"""docs/hh: short pairs are chosen, and accuracies have the right intervals."""

import importlib
import json
from pathlib import Path

from conftest import write_rows

import rm

HH = Path(__file__).resolve().parent.parent / "docs" / "hh"


def test_short_pairs_and_baselines(policy_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(HH)
    texts = [("ab", "c")] * 7 + [("d", "e")] * 2 + [("f", "g" * 50)]
    pairs = [{"prompt": "Human: x", "chosen": x, "rejected": y} for x, y in texts]
    file, folder = write_rows(tmp_path / "pairs.jsonl", pairs[::-1]), str(tmp_path / "rm")
    importlib.import_module("short").main(policy_folder, file, "40")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == pairs[8::-1]
    rm.main(["--model", policy_folder, "--data", file, "--out", folder, "--batch_size", "10"])
    capsys.readouterr()
    importlib.import_module("baselines").main(file, folder, f"{folder}/")
    lines = capsys.readouterr().out.splitlines()[2:]
    longer, shorter, first, same = [[x.strip() for x in line.split("|")[2:]] for line in lines]
    assert longer[:2] == ["80.0", "49.0 to 94.3"]  # 7 and two halves of 10; Wilson's interval
    right = f"{100 * rm.accuracy(*rm.load_reward_model(folder), pairs):.1f}"
    assert shorter[0] == "20.0" and first[0] == same[0] == right and same[2] == "+0.0 ± 0.0"
