"""The source files of the package, for the tests that read them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minirlhf"
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def each(files):
    return pytest.mark.parametrize("path", files, ids=name_of)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))
