"""The benchmark: its arithmetic, its refusals, and a run as short as it gets."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench
import bench_tricks
import compare
import numpy as np
import programs
import pytest
import workloads
from bench import BenchOptions, memory_table, notes, part_rows, results_table
from bench_pictures import draw
from programs import Program, busy_seconds, family, memory_of, own_seconds
from workloads import WORKLOADS, Sizes, disagreement, gpt_of, matmul_gflop, tree_of, write_workload

from minirlhf.errors import InputError
from minirlhf.nn.transformer import init_transformer
from minirlhf.tree import tree_items

HERE = Path(__file__).parent
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TINY = Sizes(11, 8, 2, 2, 3, 4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workload")
    write_workload(folder, "tiny", TINY, threads=2)
    return folder


@pytest.fixture(scope="module")
def program(folder):
    with bench.start("minirlhf", folder, threads=2) as program:
        yield program


def call(capsys, main, *arguments):
    """main(arguments): (exit status, standard output, standard error)."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code, *capsys.readouterr()


def be_quick(monkeypatch):
    """No waiting, however busy the machine is."""
    monkeypatch.setattr(programs, "PAUSE", 0.0)
    monkeypatch.setattr(bench, "SECONDS_A_LAP", 0.01)
    monkeypatch.setattr(bench, "ATTEMPTS", 1)


# --- workloads


def test_a_tree_comes_back_from_its_paths():
    params = {"transformer": init_transformer(gpt_of(TINY), rng=np.random.default_rng(0))}
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
    llama = replace(sizes, block="llama", d_ff=3)  # three products of 2 x 3, not of two of 2 x 8
    fewer = 5 * 2 * (2 * 2 * 8 - 3 * 2 * 3) * 2 / 1e9
    assert matmul_gflop(llama, "logprobs") == pytest.approx(forward - fewer)


# --- programs


def test_our_program_does_every_part_and_agrees_with_itself(folder, program):
    assert program.name.startswith("minirlhf ")
    for part in (*TINY.parts, "sgemm"):
        if part != "sgemm":
            assert disagreement(folder, part, program) == ""
            assert disagreement(folder, part, program) == "", "from the same start again"
        assert program.lap(part, 2) > 0


@pytest.mark.parametrize("part", ["loss", "logprobs", "adamw", "update", "iteration", "sample"])
def test_a_program_that_computes_something_else_is_found(folder, program, part, monkeypatch):
    assert disagreement(folder, part, program) == ""
    answer = program.ask(do="check", part=part)["file"]
    with np.load(answer) as file:
        results = dict(file)
    name = "logp" if "logp" in results else "policy.transformer.blocks.0.attn.qkv.w"
    with np.load(folder / "arrays.npz") as file:
        start = dict(file)
    moved = results[name] - (start[name] if part in ("adamw", "update", "iteration") else 0.0)
    results[name] = results[name] + 0.1 * moved
    np.savez(answer, **results)
    monkeypatch.setattr(program, "ask", lambda **request: {"file": answer})
    assert disagreement(folder, part, program).startswith(f"{name} differs by 1.0e-01")


def test_a_program_that_cannot_is_quoted(folder, program):
    with pytest.raises(InputError, match=r"ours.py: .* expected one of .*; got 'poetry'"):
        program.ask(do="time", part="poetry", repeats=1)
    with pytest.raises(InputError, match="no_such_peer.py"):
        Program([sys.executable, "no_such_peer.py"], folder, "", threads=1)


@ON_LINUX
def test_memory_and_time_are_those_of_a_program_and_its_children(folder, program):
    pids = family(program.process.pid)
    assert len(pids) >= 2 and pids[0] == program.process.pid  # itself and a worker
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


def test_the_tables_show_every_number_whole_in_80_columns():
    rows = []
    for workload, part in (("nano", "adamw"), ("small", "iteration"), ("small", "loss")):
        made = dict.fromkeys(bench.PEERS, [123.4, 12.3, 1234.5])
        found = part_rows(workload, part, WORKLOADS["toy"], laps(**made), dict.fromkeys(made, ""))
        found += part_rows(workload, part, WORKLOADS["toy"], laps(), {"minirlhf": ""})
        memory = 2**40 if part == "loss" else None
        rows += [row | {"seconds": 123.456, "memory": memory} for row in found]
    shown = results_table(rows) + memory_table(rows)
    assert shown.count("~123.40") == 3 * len(bench.PEERS) and shown.count("123456.0") == 3
    assert shown.count("1048576") == len(bench.PEERS) + 1
    assert max(map(len, shown.splitlines())) <= 80
    assert memory_table(rows[-5:]) != "" and memory_table(rows[:5]) == ""


def test_the_pictures_are_drawn(tmp_path):
    rows = rows_of([3.0, 6.0, 12.0])
    growth = [
        {"axis": axis, "value": value, "seconds": 0.1 * i, "memory": i * 2**20}
        for axis, values in bench.GROWTH.items()
        for i, value in enumerate(values, 1)
    ]
    paths = draw(rows, growth, tmp_path)
    assert [path.name for path in paths] == ["bench.png", "bench_growth.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert draw(rows[:1], [], tmp_path) == []


# --- the commands


@ON_LINUX
def test_a_short_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.WORKLOADS, "nano", TINY)
    be_quick(monkeypatch)
    monkeypatch.setattr(bench, "PEERS", {"Nobody": ("peer_nobody.py", "", "no_such_library")})
    out = tmp_path / "bench"
    flags = ("--workloads", "nano", "--rounds", "2", "--out", out)
    status, printed, _ = call(capsys, bench.main, "--peers", *flags)
    assert status == 0 and "not installed, so left out: Nobody" in printed
    results = json.loads((out / "bench.json").read_text())
    assert [row["part"] for row in results["rows"]] == list(bench.PARTS)
    assert all(row["seconds"] > 0 for row in results["rows"])
    assert results["rows"][0]["memory"] is not None
    assert results["rows"][0]["version"].startswith("minirlhf ")
    assert re.search(r"^nano iteration +\d+\.\d$", printed, flags=re.MULTILINE)
    status, _, said = call(capsys, bench.main, *flags)
    assert status == 2 and "it holds results" in said and len(said.splitlines()) == 1


@ON_LINUX
def test_growth_is_measured_along_every_axis(monkeypatch):
    be_quick(monkeypatch)
    monkeypatch.setattr(bench, "GROWTH_BASE", TINY)
    monkeypatch.setattr(bench, "GROWTH", {"batch_size": (2,), "vocab_size": (13,)})
    rows = bench.measure_growth(threads=1)
    assert [(r["axis"], r["value"]) for r in rows] == [("batch_size", 2), ("vocab_size", 13)]
    assert all(row["seconds"] > 0 for row in rows)


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(bench, "PEERS", {"Nobody": ("peer_nobody.py", "", "no_such_library")})
    assert bench.implementations(BenchOptions(peers=True), "toy") == ["minirlhf"]
    monkeypatch.setattr(bench, "PEERS", {"Json": ("peer_json.py", "", "json")})
    assert bench.implementations(BenchOptions(peers=True), "toy") == ["minirlhf", "Json"]
    monkeypatch.setattr(bench, "PEERS", {"JAX": ("peer_jax.py", "", "json")})
    assert bench.implementations(BenchOptions(peers=True), "stories") == ["minirlhf"], "of Llama"


def test_the_peers_programs_are_there():
    assert all((HERE / file).exists() for file, _, _ in bench.PEERS.values())


@pytest.mark.parametrize("flags", [("--rounds", "0"), ("--threads", "-1")])
def test_options_out_of_range_are_refused(capsys, tmp_path, flags):
    status, _, said = call(capsys, bench.main, *flags, "--out", tmp_path / "x")
    assert status == 2 and said.startswith("bench: expected rounds >= 1")
    assert not (tmp_path / "x").exists()


def test_an_interrupted_benchmark_says_so(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_benchmark", interrupted)
    assert call(capsys, bench.main) == (130, "", "bench: interrupted\n")


def test_every_trick_can_be_done_without(tmp_path, capsys, monkeypatch):
    """What is patched still exists, and the work goes on without it."""
    for name in ("nano", "toy"):
        monkeypatch.setitem(bench_tricks.WORKLOADS, name, TINY)
    monkeypatch.setattr(bench_tricks, "ROUNDS", 1)
    monkeypatch.setattr(bench_tricks, "SECONDS_A_LAP", 0.001)
    bench_tricks.main(["--out", str(tmp_path)])
    bench_tricks.MiniRLHF.dismiss()
    rows = json.loads((tmp_path / "bench_tricks.json").read_text())
    assert [row["trick"] for row in rows] == list(bench_tricks.WITHOUT)
    assert all(row["nano"] > 0 and row["toy"] > 0 for row in rows)
    assert rows[-1]["trick"] in capsys.readouterr().out


@ON_LINUX
def test_two_checkouts_take_turns(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(compare.WORKLOADS, "nano", TINY)
    be_quick(monkeypatch)
    root = str(HERE.parents[1])
    flags = (root, "--workloads", "nano", "--rounds", "2")
    status, printed, _ = call(capsys, compare.main, *flags)
    assert status == 0 and re.search(r"^nano +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ to", printed, re.M)
    status, _, said = call(capsys, compare.main, tmp_path, *flags[1:])
    assert status == 2 and "expected a checkout of minirlhf" in said


@pytest.mark.parametrize("name", ["bench.py", "bench_exact.py", "bench_tricks.py", "compare.py"])
def test_each_runs_as_a_script(name, tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / name, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
