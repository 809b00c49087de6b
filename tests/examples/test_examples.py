"""The examples with exact answers: each runs with small settings, prints its numbers, and draws.

They train in a pool of two processes. Here it is a pool of threads, so that the small settings,
which are patched into the module, are theirs too.
"""

import dataclasses
import importlib.util
import multiprocessing.pool
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minirlhf.exact.ground_truth import SFT, fit_reference
from minirlhf.exact.tiny import make_tiny_world

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


def small_world(*, max_tokens: int = 3, n_demonstrations: int = 500, rng: np.random.Generator):
    """The tiny desk with replies of three tokens."""
    return make_tiny_world(max_tokens=3, n_demonstrations=min(n_demonstrations, 500), rng=rng)


def short_fit(world, *, config, seed):
    """A reference after a few steps."""
    settings = dataclasses.replace(SFT, steps=20, batch_size=64)
    return fit_reference(world, config=config, settings=settings, seed=seed)


SMALL = {"make_tiny_world": small_world, "fit_reference": short_fit}


def numbers(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?", line)]


def the_line(printed: str, start: str) -> str:
    """The one line that starts so."""
    (line,) = (line for line in printed.splitlines() if line.strip().startswith(start))
    return line.strip()


def test_kl_gradients(run_example):
    printed = run_example("04_kl_gradients", "--seed", "3")
    assert "81 responses with probabilities that sum to 1.000000000000" in printed
    by_g, by_difference = numbers(the_line(printed, "along a random direction"))
    assert by_g == pytest.approx(by_difference, abs=1e-7)
    for kl_mode in ("reward_k1", "loss_k2_seq", "loss_rb"):
        assert float(the_line(printed, kl_mode).split()[1]) < 1e-12
    for kl_mode in ("loss_k1", "loss_k2_tok", "loss_full", "reward_k3"):
        assert float(the_line(printed, kl_mode).split()[1]) > 1e-2
    assert "11 of 34 placements have the gradient of the KL" in printed


def test_placement_and_clip(run_example):
    printed = run_example("08_placement_and_clip", "--iterations", "2", "1", **SMALL)
    for name in ("k1 in the reward", "k1 as loss (as printed)", "PPO's clip", "no clip"):
        assert name in printed
    assert the_line(printed, "placement, best first").count(">") == 4
    assert the_line(printed, "clip, best first").count(">") == 2


def test_over_optimisation(run_example):
    options = ("--iterations", "2", "--betas", "1", "0.2")
    printed = run_example("09_over_optimisation", *options, **SMALL)
    for beta in ("1", "0.2"):
        *_, reward, most, below, _ = numbers(the_line(printed, f"beta {beta} "))
        assert reward <= most and below == pytest.approx(most - reward, abs=2e-4)
    assert "2 of 2 trained policies lie under the exact curve" in printed
    assert "the proxy rises at every step" in printed
    assert "best-of-n is best at n =" in printed


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
