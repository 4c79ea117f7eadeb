"""What the README promises is there: names, options, files, and a method file that stands alone."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = re.findall(r"`(metarm|rm|ppo|data|eval)\.([A-Za-z_]+)`", README)


def test_every_function_named_exists():
    assert len(NAMES) > 10
    for module, name in NAMES:
        assert name == "py" or hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("page", ["README.md", *map(str, (ROOT / "docs").rglob("*.md"))])
def test_linked_files_and_pictures_exist(page):
    page = ROOT / page
    for target in re.findall(r"\]\((?!http)([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("command", ["data.py", "rm.py", "metarm.py", "ppo.py", "eval.py"])
def test_every_option_in_run_sh_and_readme_exists(command, capsys):
    run_sh = re.sub(r"\\\n", " ", (ROOT / "run.sh").read_text(encoding="utf-8"))
    lines = re.findall(rf"(?<!\w){re.escape(command)} [^\n|`]*", run_sh + README)
    used = set(re.findall(r" (--[a-z_]+)", " ".join(lines)))
    module = importlib.import_module(command[:-3])
    modes = {"data.py": "toy label split", "ppo.py": "sft dpo ppo sample"}.get(command, "").split()
    for mode in modes or [None]:
        assert module.main([mode, "--help"] if mode else ["--help"]) == 0
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    assert used and used <= known, used - known


def test_metarm_needs_nothing_but_torch(tmp_path):
    source = (ROOT / "metarm.py").read_text(encoding="utf-8")
    imports = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imports - set(sys.stdlib_module_names) == {"torch"}
    (tmp_path / "metarm.py").write_text(source, encoding="utf-8")
    code = "import sys\nsys.modules |= dict.fromkeys('transformers numpy rm data ppo'.split())\n"
    code += re.search(r"<!-- snippet: plain-loop -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
