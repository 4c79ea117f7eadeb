"""run.sh, with an interpreter that only writes down what it is told to run. (Whole: kill.sh)"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = f"""#!/usr/bin/env bash
case $*: in
  -:) [ "$GPU" = 1 ] || echo "RuntimeError: Found no NVIDIA driver"; exit ;;
  "-c "*) exec "{sys.executable}" "$@" ;;
esac
echo "${{METARM_DEVICE:-}} $PWD $*" >> "$LOG"
case $*: in *typo*) exit 2 ;; *eval.py*) touch "$3/results.json" ;; esac
while [ $# -gt 0 ]; do case $1 in --out | --save_adapted) mkdir -p "$2" ;; esac; shift; done
"""


@pytest.fixture
def call(tmp_path):
    home, log = tmp_path / "a repository", tmp_path / "log"
    (tmp_path / "elsewhere").mkdir()
    home.mkdir()
    for name in ("run.sh", "data.py", "rm.py", "metarm.py", "ppo.py", "eval.py"):
        shutil.copy(ROOT / name, home)
        os.utime(home / name, (0, 0))  # older than any results.json
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run(words, cwd=home, gpu=1, **more):
        log.write_text("")
        more |= {"PATH": os.environ["PATH"], "GPU": f"{gpu}", "LOG": f"{log}"}
        more.setdefault("PYTHON", f"{tmp_path}/python")
        command = ["bash", os.path.relpath(home / "run.sh", cwd), *words.split()]
        done = subprocess.run(command, cwd=cwd, env=more, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()

    run.home = home
    return run


def test_hh_needs_cuda_and_the_toy_leaves_it_alone(call):
    status, told, commands = call("hh --data d --model m", gpu=0)
    assert (status, commands, told.count("\n")) == (2, [], 1)
    assert "Found no NVIDIA driver; METARM_DEVICE=cpu bash run.sh hh" in told
    status, told, commands = call("hh-smoke", gpu=0)
    assert status == 0 and "no NVIDIA driver" in told and "run.sh: 11 of 11 stages, " in told
    status, told, commands = call("hh", gpu=0, METARM_DEVICE="cuda:7")
    assert status == 0 and "run.sh: 23 of 23 stages, " in told and len(commands) == 24  # a report
    assert all(command.startswith("cuda:7 ") for command in commands)
    status, told, commands = call("smoke")
    assert status == 0 and told.count("smoke runs on the CPU") == 1 and len(commands) == 16
    assert all(command.startswith("cpu ") for command in commands)
    assert told.splitlines()[-1].endswith("bash run.sh hh")


def test_micro_batches_of_all_training_may_change_on_the_way(call):
    _, _, commands = call("hh-smoke --micro_batch_size 3")
    assert sum(" --lr " in command for command in commands) == 9
    for command in commands:
        assert (" --lr " in command) == (" --micro_batch_size 3 --out " in command)
    shutil.rmtree(call.home / "runs/hh-smoke/dpo")
    (call.home / "runs/hh-smoke/results.json").unlink()
    status, _, commands = call("hh-smoke --micro_batch_size 2")
    assert status == 0 and len(commands) == 2 and " --micro_batch_size 2 --out " in commands[0]


def test_seeds_are_decimal(call):
    for seed in ("-1", "x", "0x8", str(2**64)):
        status, told, commands = call(f"hh --seed {seed}")
        assert (status, commands) == (2, []) and f"--seed {seed}: give 0 to 9999" in told
    for seed, said in (("08", "8"), ("010", "10"), ("00", "0")):
        status, _, commands = call(f"hh-smoke --seed {seed} --run r{seed}")
        assert status == 0 and f" --seed {said} " in commands[0]
        assert f"--seed {said}1" in f"{commands}"


def test_only_a_run_that_has_trained_owns_its_folder(call):
    right = "hh --data d --model m --ood o"
    for wrong in ("--data typo", "--ood typo", "--model typo"):
        assert call(f"{right} {wrong}")[0] == 2
    assert call(right)[0] == 0
    assert call(right)[1:] == ("== finished: runs/hh/report.md\n", [])
    status, told, commands = call(f"{right} --model other")
    assert (status, commands) == (2, []) and "runs/hh: made with other options" in told
    (call.home / "mine/data").mkdir(parents=True)  # not a run's
    assert call(f"{right} --run mine")[0] == 2 and (call.home / "mine/data").exists()


def test_comments_and_the_report_may_change(call):
    edits = [("rm.py", '"""The reward', '"""A reward'), ("ppo.py", "    # [clipping]", "    # [c]")]
    edits += [("run.sh", "--judge", "--k 3 --judge"), ("eval.py", "TIE = ", "TIE = 2 * ")]
    ran = []
    for name, old, new in [("rm.py", "", ""), *edits, ("data.py", "word too few", "too short")]:
        text = (call.home / name).read_text()
        assert old in text
        (call.home / name).write_text(text.replace(old, new, 1))
        status, _, commands = call("hh-smoke")
        assert status == (2 if name == "data.py" else 0)
        ran.append(len(commands))
    assert ran == [12, 0, 0, 1, 1, 0]  # all; nothing; the report


def test_paths_are_seen_from_the_callers_folder(call):
    elsewhere = call.home.parent / "elsewhere"
    status, _, commands = call("hh-smoke --data d --run r", elsewhere, PYTHON="../python")
    assert status == 0 and (elsewhere / "r/results.json").exists()
    assert f"{elsewhere} ../a repository/data.py split --source d " in commands[0]
    assert call("hh-smoke", elsewhere)[0] == 0
    assert (call.home / "runs/hh-smoke/results.json").exists()
