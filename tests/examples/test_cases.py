"""Every case study: its form, a fast run, and (marked slow) the direction that it claims."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parents[2] / "examples" / "cases").glob("[0-9][0-9]_*.py"))
MOST_LINES = 120
OPEN_TO_A_CASE = {"dataclasses", "math", "pathlib", "numpy", "minirlhf"}
OPEN_TO_A_CASE |= {"study", "desk", "gao", "gradients", "other_optima", "plants"}


@pytest.fixture
def run_case(monkeypatch, tmp_path, capsys):
    """run(path, *options) -> (what it found, what it printed)."""

    def run(path: Path, *options: str) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", [str(path), "--out", str(tmp_path), *options])
        runpy.run_path(str(path), run_name="__main__")
        assert (tmp_path / f"{path.stem}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        return json.loads((tmp_path / f"{path.stem}.json").read_text()), capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_form_of_a_case(path):
    text = path.read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text)).splitlines()
    assert len(text.splitlines()) <= MOST_LINES
    assert (
        doc[0].endswith("?")
        and doc[2].split("#")[0].strip() == f"python examples/cases/{path.name}"
    )
    assert re.search(r"# \d+ s on two cores$", doc[2])
    assert len(re.findall(r"^# %% \S", text, flags=re.M)) >= 3
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names]
            )
            assert {name.split(".")[0] for name in names} <= OPEN_TO_A_CASE
            assert not any(name.startswith("minirlhf.runs") for name in names)


def test_no_two_cases_have_one_number():
    numbers = [path.name[:2] for path in CASES]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_case_runs(run_case, path):
    found, printed = run_case(path, "--fast", "--seeds", "1", "2")
    assert found["seen"] in " ".join(printed.split()) and found["tables"] and found["claims"]
    assert all(len(holds) == 2 for holds in found["claims"].values())


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_direction_that_a_case_claims(run_case, path):
    """One seed that no published figure used; a claim says what must differ, and by how much."""
    found, _ = run_case(path, "--seeds", "11")
    assert all(all(holds) for holds in found["claims"].values()), found["claims"]
