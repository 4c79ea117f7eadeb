"""What the README promises is there: names, options, layout, and a method file that stands alone."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data
import metarm
import ppo
import rm

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module, name", sorted(set(re.findall(r"`(metarm|rm|ppo|data|eval)\.([a-z_]+)`", README))))
def test_every_function_named_exists(module, name):
    assert name == "py" or hasattr(importlib.import_module(module), name)


def test_linked_files_and_pictures_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("command", ["data.py", "rm.py", "metarm.py", "ppo.py", "eval.py"])
def test_every_option_in_run_sh_and_readme_exists(command, capsys):
    """Options beside a command in run.sh (continuation lines too) and README are options of that command."""
    text = re.sub(r"\\\n", " ", (ROOT / "run.sh").read_text(encoding="utf-8")) + README
    used = {option for line in re.findall(rf"(?<!\w){re.escape(command)} [^\n|`]*", text) for option in re.findall(r" (--[a-z_]+)", line)}
    module = importlib.import_module(command[:-3])
    assert module.main(["--help"]) == 0
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    assert used and used <= known, used - known


def test_metarm_runs_without_the_other_files(tmp_path):
    """Copied alone into an empty folder, with nothing but torch importable."""
    (tmp_path / "metarm.py").write_text((ROOT / "metarm.py").read_text(encoding="utf-8"), encoding="utf-8")
    code = ("import sys; sys.modules.update({name: None for name in ('transformers', 'numpy', 'tqdm', 'rm', 'data', 'ppo')});"
            "import torch, metarm; model = torch.nn.Linear(3, 1); x, s = torch.randn(2, 4, 3), torch.randn(6, 3);"
            "info = metarm.metarm_step(model, torch.optim.SGD(model.parameters(), 0.1),"
            "lambda f: -torch.nn.functional.logsigmoid(f(x[0]) - f(x[1])).mean(),"
            "lambda f: metarm.difference_loss(f(s).view(2, 3)), 0.1); assert info['moved'] > 0.5")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_pure_functions_know_no_files():
    for function in (rm.preference_loss, ppo.gae, ppo.policy_loss, ppo.value_loss, ppo.dpo_loss, ppo.kl_penalised_rewards,
                     metarm.difference_loss):
        assert "shape" in function.__doc__.lower() and "Source" in function.__doc__ and "ValueError" in function.__doc__
