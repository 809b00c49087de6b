"""How fast the ordinary functions are, beside PyTorch, JAX and TRL.

    python tests/benchmarks/bench.py                               a few minutes, ours alone
    python tests/benchmarks/bench.py --peers --workloads nano toy  beside all that are installed

Every implementation is a program of its own that reads one workload from a folder; a round asks
each in turn, and what is reported are medians of the ratios within a round, because the machine's
speed changes more between rounds than the implementations differ.
"""

import contextlib
import importlib.util
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import bench_pictures as pictures
import numpy as np
import tyro
from programs import Program, busy_seconds, family, own_seconds
from workloads import SGEMM_SIZE, WORKLOADS, Sizes, disagreement, matmul_gflop, write_workload

from minirlhf.app.progress import track
from minirlhf.crew import usable_cores
from minirlhf.disk import new_folder, new_numbered_folder, write_whole
from minirlhf.errors import InputError

Row = dict[str, Any]

PARTS = {
    "loss": "PPO loss, gradients",
    "sample": "sampling, KV cache",
    "logprobs": "reference log-probs",
    "adamw": "AdamW, one step",
    "update": "one update: loss, gradients, clip, AdamW",
    "iteration": "whole PPO iteration",
}
OURS = "minirlhf"
PEERS = {  # name -> (program in this folder, variant, library)
    "PyTorch": ("peer_torch.py", "eager", "torch"),
    "torch.compile": ("peer_torch.py", "compile", "torch"),
    "JAX": ("peer_jax.py", "", "jax"),
    "TRL": ("peer_trl.py", "", "trl"),
}
SECONDS_A_LAP = 0.5  # a time is the median of as many calls as fill this
BUSY_SHARE = 0.06  # of the machine in other hands: such a round is done again
SPREAD = 0.25  # of a ratio's quartiles around its median: more, and it is marked as noisy
ATTEMPTS = 3  # at one round
SLOW_ROUNDS = 3  # of a peer whose one iteration takes longer than all others' together
SGEMM_GFLOP = 2 * SGEMM_SIZE**3 / 1e9
GROWTH_BASE = replace(WORKLOADS["toy"], batch_size=32)
GROWTH = {
    "batch_size": (8, 16, 32, 64, 128, 256),
    "response_len": (16, 48, 112, 240, 496),
    "d_model": (64, 128, 256, 512),
    "vocab_size": (128, 512, 2048, 8192, 32768),
}


@dataclass(frozen=True)
class BenchOptions:
    """Time the PPO loss, sampling, log-probs, AdamW, an update and a whole PPO iteration."""

    workloads: tuple[Literal[tuple(WORKLOADS)], ...] = tuple(WORKLOADS)  # type: ignore[valid-type]
    """Which sizes."""
    parts: tuple[Literal[tuple(PARTS)], ...] = tuple(PARTS)  # type: ignore[valid-type]
    """What is timed."""
    peers: bool = False
    """Beside PyTorch, torch.compile, JAX and TRL, as far as they are installed."""
    beside: tuple[Literal[tuple(PEERS)], ...] = ()  # type: ignore[valid-type]
    """With --peers: these alone; none named: all."""
    rounds: int = 7
    """Times each is asked; the medians are reported."""
    threads: int = 0
    """Cores that each may use; 0: all there are."""
    growth: bool = False
    """Also time and memory against batch, length, width and vocabulary."""
    out: Path | None = None
    """Folder for bench.json and the pictures; default: runs/bench-N with the next free N."""


def main(arguments: list[str] | None = None) -> None:
    """Exit status 0: done; 1: an implementation computes something else; 2: wrong input."""
    try:
        status = run_benchmark(tyro.cli(BenchOptions, args=arguments, prog="bench.py"))
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def run_benchmark(options: BenchOptions) -> int:
    """Measure, print the tables, write bench.json and the pictures; the exit status.

    Raises:
        InputError: an option is out of its range, or the folder holds results already.
    """
    if options.rounds < 1 or options.threads < 0 or not options.workloads or not options.parts:
        raise InputError(
            "expected rounds >= 1, threads >= 0, a workload and a part; got "
            f"{options.rounds}, {options.threads}, {list(options.workloads)} and "
            f"{list(options.parts)}: choose such values"
        )
    out = new_folder(options.out or new_numbered_folder("bench"), holds="bench.json")
    threads = options.threads or usable_cores()
    missing = [n for n, (_, _, library) in PEERS.items() if not importlib.util.find_spec(library)]
    if options.peers and missing:
        print(f"not installed, so left out: {', '.join(missing)}")
    results: Row = {"threads": threads, "machine": machine(), "growth": [], "rows": []}
    rows: list[Row] = results["rows"]
    if options.growth:
        results["growth"] += measure_growth(threads)
    for name in options.workloads:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, Path(folder), options, threads)
        write_whole(out / "bench.json", (json.dumps(results, indent=1) + "\n").encode())
    print(results_table(rows), memory_table(rows), *notes(rows), sep="\n")
    for path in pictures.draw(rows, results["growth"], out):
        print(f"picture: {path}")
    print(f"numbers: {out / 'bench.json'}")
    return 1 if any(row["disagrees"] for row in rows) else 0


# -- measuring -----------------------------------------------------------------------------------


def measure(name: str, folder: Path, options: BenchOptions, threads: int) -> list[Row]:
    """All parts of one workload, a row for each implementation of each."""
    sizes = WORKLOADS[name]
    parts = [part for part in options.parts if part in sizes.parts]
    write_workload(folder, name, sizes, threads)
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        names = implementations(options, name)
        programs = {n: stack.enter_context(start(n, folder, threads)) for n in names}
        for part in parts:
            able = {n: p for n, p in programs.items() if n != "TRL" or part == "iteration"}
            wrong = {n: disagreement(folder, part, program) for n, program in able.items()}
            laps = rounds(able, part, options.rounds, f"{name}: {PARTS[part]}")
            rows += part_rows(name, part, sizes, laps, wrong)
    for row in rows:
        row["version"] = programs[row["program"]].name
        if row["part"] == sizes.parts[0]:  # the loss; of gpt2 a whole update
            with start(row["program"], folder, threads) as program:
                row["memory"] = program.memory_above_start(row["part"])
    return rows


def implementations(options: BenchOptions, workload: str) -> list[str]:
    """Ours, and the peers that are installed; TRL for whole iterations of the smaller workloads.

    Of Llama only PyTorch has one here.
    """
    if not options.peers:
        return [OURS]
    installed = [n for n, (_, _, library) in PEERS.items() if importlib.util.find_spec(library)]
    installed = [n for n in installed if n in (options.beside or PEERS)]
    left_out = set()
    if workload not in ("nano", "toy") or "iteration" not in options.parts:
        left_out.add("TRL")
    if WORKLOADS[workload].block == "llama":
        left_out |= {"JAX", "TRL"}
    return [OURS, *(n for n in installed if n not in left_out)]


def start(name: str, folder: Path, threads: int) -> Program:
    """The program of an implementation, opened on a workload."""
    file, variant, _ = PEERS.get(name, ("ours.py", "", ""))
    return Program([sys.executable, str(Path(__file__).with_name(file))], folder, variant, threads)


def rounds(programs: dict[str, Program], part: str, n: int, title: str) -> dict[str, list[float]]:
    """Seconds a call, round by round. A round in which others used the machine is done again.

    Each round begins with another implementation; ours also multiplies matrices in each.
    """
    repeats = {}
    for name, program in programs.items():
        first = program.lap(part, 1)
        repeats[name] = max(1, round(SECONDS_A_LAP / first))
    laps: dict[str, list[float]] = {name: [] for name in (*programs, "sgemm")}
    names = list(programs)
    for k in track(range(n), title):
        for attempt in range(ATTEMPTS):
            lap = {}
            busy, started = _others(programs), time.perf_counter()
            for name in names[k % len(names) :] + names[: k % len(names)]:
                if name == "TRL" and k >= SLOW_ROUNDS:
                    continue
                lap[name] = programs[name].lap(part, repeats[name])
            lap["sgemm"] = programs[OURS].lap("sgemm", 3)
            taken = (_others(programs) - busy) / (time.perf_counter() - started) / usable_cores()
            if taken <= BUSY_SHARE or attempt == ATTEMPTS - 1:
                break
        for name, seconds in lap.items():
            laps[name].append(seconds)
    return laps


def _others(programs: dict[str, Program]) -> float:
    """CPU seconds so far that were not spent by the programs."""
    mine = [pid for program in programs.values() for pid in family(program.process.pid)]
    return busy_seconds() - own_seconds(mine)


def part_rows(
    workload: str, part: str, sizes: Sizes, laps: dict[str, list[float]], wrong: dict[str, str]
) -> list[Row]:
    """Medians of what the rounds gave."""
    gflop = matmul_gflop(sizes, part)
    peak = SGEMM_GFLOP / float(np.median(laps["sgemm"]))
    rows = []
    for name in wrong:
        seconds = float(np.median(laps[name]))
        low, middle, high = quartiles(laps[name], laps[OURS])
        rows.append(
            {
                "workload": workload,
                "part": part,
                "what": PARTS[part],
                "program": name,
                "seconds": seconds,
                "laps": laps[name],
                "ratio": middle,  # how many times as long as ours
                "quartiles": [low, high],
                "noisy": high - low > SPREAD * middle,
                "gflops": gflop / seconds if gflop else None,
                "sgemm_gflops": peak,
                "memory": None,
                "disagrees": wrong[name],
            }
        )
    return rows


def quartiles(laps: list[float], others: list[float]) -> tuple[float, float, float]:
    """25 %, 50 % and 75 % of the ratios laps / others within a round."""
    ratios = [a / b for a, b in zip(laps, others, strict=False)]
    low, middle, high = np.percentile(ratios, (25, 50, 75)).tolist()
    return low, middle, high


def measure_growth(threads: int) -> list[Row]:
    """Time and memory of the PPO loss as one size grows and the others stay."""
    points = [(axis, value) for axis, values in GROWTH.items() for value in values]
    rows = []
    for axis, value in track(points, "growth"):
        sizes = replace(GROWTH_BASE, **{axis: value})
        with tempfile.TemporaryDirectory() as folder:
            write_workload(Path(folder), "growth", sizes, threads)
            with start(OURS, Path(folder), threads) as program:
                memory, seconds = program.memory_above_start("loss"), program.lap("loss", 3)
        rows.append({"axis": axis, "value": value, "seconds": seconds, "memory": memory})
    return rows


def machine() -> Row:
    """What the figures belong to."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


# -- showing -------------------------------------------------------------------------------------


def columns(*rows: list[str]) -> str:
    """The first column to the left, the others to the right, each as wide as it must be.

    Nothing is ever cut to the width of a terminal.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def results_table(rows: list[Row]) -> str:
    """A line a part of a workload: our time, and how many times as long the peers take."""
    peers = list(dict.fromkeys(row["program"] for row in rows if row["program"] != OURS))
    table = [["", "ms", "of peak", *peers]]
    for (workload, part), same in by_line(rows):
        ours = same[OURS]
        rate, others = ours["gflops"], [same.get(name) for name in peers]
        table.append(
            [
                f"{workload} {part}",
                f"{1e3 * ours['seconds']:.1f}",
                f"{rate / ours['sgemm_gflops']:.0%}" if rate else "",
                *(f"{'~' if r['noisy'] else ''}{r['ratio']:.2f}" if r else "" for r in others),
            ]
        )
    title = "time, and how many times as long the others take (~: too noisy to tell)"
    return f"\n{title}\n\n{columns(*table)}\n"


def memory_table(rows: list[Row]) -> str:
    """A line a workload: parameters, batch and the part, above the libraries alone."""
    names = list(dict.fromkeys(row["program"] for row in rows if row["memory"] is not None))
    if not names:
        return ""
    table = [["", *names]]
    for (workload, part), same in by_line(rows):
        if any(row["memory"] is not None for row in same.values()):
            known = [same.get(name) for name in names]
            table.append(
                [f"{workload} {part}", *(f"{r['memory'] / 2**20:.0f}" if r else "" for r in known)]
            )
    return f"memory above the libraries' [MiB]\n\n{columns(*table)}\n"


def by_line(rows: list[Row]) -> Iterator[tuple[tuple[str, str], dict[str, Row]]]:
    """(workload, part) and its rows by implementation."""
    for key in dict.fromkeys((row["workload"], row["part"]) for row in rows):
        yield key, {r["program"]: r for r in rows if (r["workload"], r["part"]) == key}


def notes(rows: list[Row]) -> Iterator[str]:
    """What a reader must know beside the table."""
    for row in rows:
        what = f"{row['workload']}: {row['what']}, {row['program']}"
        if row["disagrees"]:
            yield f"WRONG {what}: {row['disagrees']}"
        elif row["noisy"]:
            low, high = row["quartiles"]
            yield (
                f"too noisy to conclude: {what}: half of the ratios lie outside {low:.2f} to "
                f"{high:.2f}; run it again with more --rounds on a quieter machine"
            )


if __name__ == "__main__":
    main()
