"""The benchmark of random walks: it runs with small settings, prints its numbers, and draws.

It trains in a pool of two processes. Here it is a pool of threads, so that the small settings,
which are patched into the module, are theirs too.
"""

import dataclasses
import importlib.util
import multiprocessing.pool
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minirlhf.exact.ground_truth import SFT

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run_example(monkeypatch, tmp_path, capsys):
    """run(name, *options, **replaced) -> what `python examples/name.py options` prints."""

    def run(name: str, *options: str, **replaced) -> str:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert f"python examples/{name}.py" in module.__doc__
        for attribute, value in replaced.items():
            monkeypatch.setattr(module, attribute, value)
        threads = SimpleNamespace(Pool=multiprocessing.pool.ThreadPool)
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: threads)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
        monkeypatch.chdir(tmp_path)
        module.main()
        picture = Path("runs/examples") / f"{name}.png"
        assert picture.read_bytes().startswith(PNG)
        printed = capsys.readouterr().out
        assert f"picture: {picture}" in printed
        return printed

    return run


def the_line(printed: str, start: str) -> str:
    """The one line that starts so."""
    (line,) = (line for line in printed.splitlines() if line.strip().startswith(start))
    return line.strip()


@pytest.mark.parametrize("graph_seed, uniform", [(1000, "0.3462"), (1002, "0.7852")])
def test_randomwalks(run_example, graph_seed, uniform):
    settings = dataclasses.replace(SFT, steps=5, batch_size=32)
    options = ("--graph-seed", str(graph_seed), "--iterations", "1")
    printed = run_example("randomwalks", *options, SFT_HERE=settings, N_SAMPLES=500)
    assert f"the uniform walk: {uniform}" in printed
    columns = "J* J/J* centred reference optimum policy KL* KL P(illegal)".split()
    assert columns == the_line(printed, "seed   beta").split()[2:]
    for beta in ("0.1", "0.02"):
        (row,) = re.findall(rf"^ *0 +{beta} (.*)$", printed, flags=re.MULTILINE)
        values = dict(zip(columns, map(float, row.split()), strict=True))
        assert values["J/J*"] < 1 and values["centred"] < 1
        assert values["J*"] == pytest.approx(
            values["optimum"] - float(beta) * values["KL*"], abs=1e-3
        )
        assert 0 < values["P(illegal)"] < 1
    away = float(re.search(r"([-+][\d.]+) standard errors away", printed)[1])
    assert abs(away) < 5
