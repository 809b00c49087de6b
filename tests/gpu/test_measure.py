"""tests/gpu/run end to end, at tiny sizes on the stand-in: what it writes is whole."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from cpu_kernels import HAS_COMPILER
from sources import ROOT

ENV = os.environ | {"PYTHON": sys.executable}  # which need not be the first python3 of the path

from minirlhf.backend import cuda_is_available

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no g++ to run the kernels on a CPU")
RUN = ROOT / "tests" / "gpu" / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    command = ["bash", str(RUN), "--dry", "--out", str(folder)]
    run = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith((folder / "gpu.md").read_text() + "\n")
    return folder


def test_every_side_does_every_part_and_agrees(folder):
    found = json.loads((folder / "gpu.json").read_text())
    sides = ["plain", "kernels"]
    if importlib.util.find_spec("torch"):
        sides.append("PyTorch eager")
        assert found["notes"] == []
    assert list(dict.fromkeys(row["side"] for row in found["rows"])) == sides
    assert len(found["rows"]) == 4 * len(sides)
    assert all(row["agrees"] and row["seconds"] > 0 for row in found["rows"])
    sent = {row["side"]: row["launches"] for row in found["rows"] if row["part"] == "update"}
    assert 0 < sent["kernels"] < sent["plain"]


def test_the_tests_and_the_training_ran(folder):
    found = json.loads((folder / "gpu.json").read_text())
    assert found["tests"]["passed"] == 6 and "failed" not in found["tests"]
    assert found["parity"]["parted"] is None and len(found["parity"]["distance"]) == 2


def test_the_table_says_that_it_was_a_rehearsal(folder):
    said = (folder / "gpu.md").read_text()
    assert said.startswith("A dry run on the stand-in for a GPU, without a GPU")
    assert "| tiny, update |" in said and "- `pytest -m gpu`: 6 passed." in said
    assert "samples the CPU's ids for all 2 iterations" in said


@pytest.mark.skipif(cuda_is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(tmp_path):
    command = ["bash", str(RUN), "--out", str(tmp_path)]
    run = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "expected CuPy and a GPU" in run.stderr and "use --dry" in run.stderr
