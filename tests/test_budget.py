"""The budgets: how much there is to read, in the format of `ruff format --line-length 100`."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = {"metarm.py": 285, "rm.py": 347, "ppo.py": 440, "data.py": 491, "eval.py": 415}  # <= 1980
CODE_PER_COMMENT = {"metarm.py": 4, "rm.py": 4, "ppo.py": 4, "data.py": 7, "eval.py": 7}
LINES = {"run.sh": 185, "tests/*.py tests/*.sh": 3600, "docs/**/*.py": 2200}
LINES |= {"docs/study/*.py": 1250, "docs/by_hand.py": 71}


def text_of(path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def lines_of(nodes) -> set[int]:
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


def is_docstring(node) -> bool:
    value = getattr(node, "value", None)
    return isinstance(node, ast.Expr) and isinstance(getattr(value, "value", None), str)


def is_option(node) -> bool:
    """add("--x", ...) or parser.add_argument("--x", ...)."""
    function = getattr(node, "func", None)
    return "add" == getattr(function, "id", "") or "add_argument" == getattr(function, "attr", "")


def count(source: str) -> tuple[int, int, int]:
    """(lines of code, those of them that list options, comments, beside code or by the line)."""
    nodes = [*ast.walk(ast.parse(source))]
    lines = enumerate(map(str.strip, source.splitlines()), 1)
    code = {i for i, line in lines if line and not line.startswith("#")}
    code -= lines_of(filter(is_docstring, nodes))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = sum(token.type == tokenize.COMMENT for token in tokens)
    return len(code), len(code & lines_of(filter(is_option, nodes))), comments


@pytest.mark.parametrize("name", CODE)
def test_lines_of_code_and_comments(name):
    code, options, comments = count(text_of(name))
    assert code <= CODE[name]
    assert code - options <= CODE_PER_COMMENT[name] * comments


@pytest.mark.parametrize("patterns", LINES)
def test_lines_in_all(patterns):
    files = [path for pattern in patterns.split() for path in ROOT.glob(pattern)]
    lines = sum(len(text_of(path).splitlines()) for path in files)
    assert 0 < lines <= LINES[patterns]


def test_width_of_run_sh_and_words_of_the_readme():
    assert [line for line in text_of("run.sh").splitlines() if len(line) > 120] == []
    assert len(text_of("README.md").split()) <= 1600
