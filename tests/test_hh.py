"""docs/hh: short pairs are chosen, accuracies have the right intervals, and the table is of hh."""

import importlib
import json
import re
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


def test_what_hh_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(HH)
    stages = importlib.import_module("stages")
    preset = (HH.parent.parent / "run.sh").read_text().split("hh | hh-smoke) #")[1]
    preset = preset.split('if [ "$preset" = hh-smoke ]')[0]
    longest = re.search(r"longest=\((.*?)\)", preset)[1]
    preset = preset.replace('"${longest[@]}"', longest)
    for name, flags in stages.PRESET.items():  # computed for the batches that hh has
        given = re.search(rf"\b{name}_flags=\((.*?)\)", preset, re.DOTALL)[1].split()
        given = dict(zip(given[::2], given[1::2], strict=True))
        assert {f"--{key}": str(value) for key, value in flags.items()}.items() <= given.items()
    stages.main()
    table = capsys.readouterr().out
    assert table.strip() in (HH / "README.md").read_text()
    assert max(memory for *_, memory in stages.stages().values()) <= 20
    log = tmp_path / "log"
    log.write_text(
        "== runs/hh/rm0\nrm.py: 60 s, 9.0 GB, GPU 1.5 GB\n== runs/hh/metarm-1/rm\n"
        "metarm.py: 120 s, 9.0 GB, GPU 2.5 GB\n== runs/hh/judge/rm\nrm.py: 30 s, 9.0 GB, GPU 2.0 GB"
        "\n== runs/hh/ppo-1/policy\nppo.py: error: NaN\neval.py: 6 s, 3.0 GB\n"
    )
    stages.main(str(log))
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    seen = {row[1].strip(): [x.strip() for x in row[-4:-1]] for row in rows if len(row) > 5}
    assert seen["rm"] == ["2", "1.5", "2.0"] and seen["metarm"] == ["1", "2.0", "2.5"]
    assert seen["ppo"] == ["0", "0.0", "0.0"] and seen["eval"] == ["1", "0.1", "3.0"]
