"""`minirlhf bench`: its arithmetic, its refusals, and a run as short as it gets."""

import io
import json
import re
import sys
from pathlib import Path

import bench
import numpy as np
import pytest
from bench import BenchOptions, memory_table, notes, part_rows, results_table
from bench_pictures import draw
from programs import Program, busy_seconds, family, memory_of, own_seconds
from rich.console import Console
from tiny_run import call, refusal
from workloads import WORKLOADS, Sizes, disagreement, matmul_gflop, tree_of, write_workload

from minirlhf.errors import InputError
from minirlhf.nn.transformer import init_transformer
from minirlhf.tree import tree_items

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TINY = Sizes(11, 8, 2, 2, 3, 4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workload")
    write_workload(folder, "tiny", TINY, threads=2)
    return folder


@pytest.fixture
def program(folder):
    program = Program([sys.executable, "-m", "minirlhf.app.bench_ours"], folder, "", threads=2)
    with program:
        yield program


# --- workloads


def test_a_tree_comes_back_from_its_paths():
    params = {"transformer": init_transformer(TINY.gpt, rng=np.random.default_rng(0))}
    back = tree_of(dict(tree_items(params)))
    assert list(tree_items(back)) == list(tree_items(params))


def test_work_is_counted_by_hand():
    """One block, C = 2, P = 1, R = 2, V = 3: T = 2 columns go in, both are read."""
    sizes = Sizes(3, 2, 1, 1, 1, 2, 5)
    qkv, attention = 2 * 2 * 6 * 2, 4 * 2 * 2 * 2
    out_and_mlp, logits = 2 * 9 * 2 * 2 * 2, 2 * 2 * 3 * 2
    forward = 5 * (qkv + attention + out_and_mlp + logits) / 1e9
    assert matmul_gflop(sizes, "logprobs") == pytest.approx(forward)
    assert matmul_gflop(sizes, "loss") == pytest.approx(3 * forward)
    assert matmul_gflop(sizes, "sample") is None


# --- programs


def test_our_program_does_every_part_and_agrees_with_itself(folder, program):
    assert program.name.startswith("minirlhf ")
    for part in (*TINY.parts, "sgemm"):
        if part != "sgemm":
            assert disagreement(folder, part, program) == ""
            assert disagreement(folder, part, program) == "", "from the same start again"
        assert program.lap(part, 2) > 0


@pytest.mark.parametrize("part", ["loss", "logprobs", "adamw", "iteration", "sample"])
def test_a_program_that_computes_something_else_is_found(folder, program, part, monkeypatch):
    assert disagreement(folder, part, program) == ""
    answer = program.ask(do="check", part=part)["file"]
    with np.load(answer) as file:
        results = dict(file)
    name = "logp" if "logp" in results else "policy.transformer.blocks.0.attn.qkv.w"
    with np.load(folder / "arrays.npz") as file:
        start = dict(file)
    moved = results[name] - (start[name] if part in ("adamw", "iteration") else 0.0)
    results[name] = results[name] + 0.1 * moved
    np.savez(answer, **results)
    monkeypatch.setattr(program, "ask", lambda **request: {"file": answer})
    assert disagreement(folder, part, program).startswith(f"{name} differs by 1.0e-01")


def test_a_program_that_cannot_is_quoted(folder, program):
    with pytest.raises(InputError, match=r"expected one of .*; got 'poetry'"):
        program.ask(do="time", part="poetry", repeats=1)
    with pytest.raises(InputError, match="No module named"):
        Program([sys.executable, "-m", "minirlhf.app.nothing"], folder, "", threads=1)


@ON_LINUX
def test_memory_and_time_are_those_of_a_program_and_its_children(folder, program):
    pids = family(program.process.pid)
    assert len(pids) == 2 and pids[0] == program.process.pid  # itself and one worker
    assert memory_of(program.process.pid) > memory_of(pids[1]) > 2**20
    before = own_seconds(pids), busy_seconds()
    assert program.memory_above_start("loss") > 0
    program.lap("loss", 40)
    assert own_seconds(pids) >= before[0] and busy_seconds() >= before[1]


# --- figures


def laps(**seconds):
    return {"minirlhf": [1.0, 2.0, 4.0], "sgemm": [0.1, 0.1, 0.1], **seconds}


def rows_of(other, wrong=""):
    sizes = WORKLOADS["toy"]
    return part_rows("toy", "loss", sizes, laps(PyTorch=other), {"minirlhf": "", "PyTorch": wrong})


def test_ratios_are_taken_within_a_round():
    ours, other = rows_of([3.0, 6.0, 12.0])
    assert other["ratio"] == 3.0 and not other["noisy"]
    assert ours["ratio"] == 1.0 and ours["seconds"] == 2.0
    assert ours["gflops"] == pytest.approx(matmul_gflop(WORKLOADS["toy"], "loss") / 2.0)
    assert ours["sgemm_gflops"] == pytest.approx(2 * workloads.SGEMM_SIZE**3 / 1e8)
    assert rows_of([1.0, 6.0, 40.0])[1]["noisy"]


def test_what_must_be_known_is_said():
    assert list(notes(rows_of([3.0, 6.0, 12.0]))) == []
    assert "too noisy to conclude: toy" in "".join(notes(rows_of([1.0, 6.0, 40.0])))
    assert "WRONG toy" in "".join(notes(rows_of([3.0, 6.0, 12.0], wrong="logp differs")))


def test_the_table_and_the_pictures_show_them(tmp_path):
    rows = rows_of([3.0, 6.0, 12.0])
    rows[0]["memory"], rows[1]["memory"] = 2**20, 3 * 2**20
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(results_table(rows))
    console.print(memory_table(rows))
    shown = console.export_text()
    assert re.search(r"toy: PPO loss, gradients +2000.0 .* 3.00", shown)
    assert re.search(r"toy +1 +3\b", shown)
    growth = [
        {"axis": axis, "value": value, "seconds": 0.1 * i, "memory": i * 2**20}
        for axis, values in bench.GROWTH.items()
        for i, value in enumerate(values, 1)
    ]
    paths = draw(rows, growth, tmp_path)
    assert [path.name for path in paths] == ["bench.png", "bench_growth.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert draw(rows[:1], [], tmp_path) == []


# --- the command


@ON_LINUX
def test_a_short_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.WORKLOADS, "nano", TINY)
    monkeypatch.setattr(bench, "SECONDS_A_LAP", 0.01)
    monkeypatch.setattr(bench, "PEERS", {"Nobody": ("peer_nobody.py", "", "no_such_library")})
    out = tmp_path / "bench"
    flags = ("--workloads", "nano", "--rounds", "2", "--out", out)
    status, printed, _ = call(capsys, "bench", "--peers", *flags)
    assert status == 0 and "not installed, so left out: Nobody" in printed
    results = json.loads((out / "bench.json").read_text())
    assert [row["part"] for row in results["rows"]] == list(bench.PARTS)
    assert all(row["seconds"] > 0 for row in results["rows"])
    assert results["rows"][0]["memory"] is not None
    assert "nano: PPO iteration" in printed
    assert "it holds results" in refusal(capsys, "bench", *flags)


@ON_LINUX
def test_growth_is_measured_along_every_axis(monkeypatch):
    monkeypatch.setattr(bench, "GROWTH_BASE", TINY)
    monkeypatch.setattr(bench, "GROWTH", {"batch_size": (2, 4), "vocab_size": (11,)})
    rows = bench.measure_growth(threads=1)
    assert [(r["axis"], r["value"]) for r in rows] == [
        *(("batch_size", 2), ("batch_size", 4), ("vocab_size", 11)),
    ]
    assert all(row["seconds"] > 0 for row in rows)


def test_a_peer_that_is_not_there_is_left_out_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PEERS", {"Nobody": ("peer_nobody.py", "", "no_such_library")})
    assert bench.implementations(BenchOptions(peers=True), "toy") == ["minirlhf"]
    monkeypatch.setattr(bench, "PEERS", {"Json": ("peer_json.py", "", "json")})
    assert bench.implementations(BenchOptions(peers=True), "toy") == ["minirlhf", "Json"]
    with pytest.raises(InputError, match="peer_json.py; found none here: run it in a clone"):
        bench.start("Json", tmp_path, 1)


def test_the_peers_programs_are_there():
    folder = Path(__file__).parent
    assert all((folder / file).exists() for file, _, _ in bench.PEERS.values())


@pytest.mark.parametrize("flags", [("--rounds", "0"), ("--threads", "-1")])
def test_options_out_of_range_are_refused(capsys, tmp_path, flags):
    assert "expected rounds >= 1" in refusal(capsys, "bench", *flags, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
