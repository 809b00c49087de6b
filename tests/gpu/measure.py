"""Tests, parity, time, memory and launches on this machine's GPU: one JSON file, one table.

    bash tests/gpu/run [--dry] [--out FOLDER]

What fails or does not fit into the time is noted, and the rest goes on. --dry: tiny sizes, minirlhf
on the stand-in for a GPU and PyTorch on the CPU: it shows that all of this runs, and no time.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT, BENCHMARKS = HERE.parents[1], HERE.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS)]

from programs import Program
from workloads import WORKLOADS, Sizes, disagreement, write_workload

from minirlhf.errors import InputError

SECONDS = 460  # for everything
TESTS, PARITY = 120, 60  # at most
A_PART = 1.0  # seconds that a part is timed for, after its first calls
PARTS = ("iteration", "update", "sample", "logprobs")
SIZES = {name: WORKLOADS[name] for name in ("nano", "toy", "small", "gpt2")}
TINY = {"tiny": Sizes(11, 8, 2, 2, 3, 4, 4)}
SIDES = {  # what is timed: its program, its variant
    "plain": ("ours.py", "plain"),
    "kernels": ("ours.py", "kernels"),
    "PyTorch eager": ("peer_torch.py", "eager"),
    "PyTorch CUDA graphs": ("peer_torch.py", "graphs"),
}


class Report:
    """What has been found so far, written whenever something is added."""

    def __init__(self, folder: Path, dry: bool):
        self.patience = 10 if dry else 1  # a rehearsal proves no times, and machines are busy
        self.end = time.monotonic() + SECONDS * self.patience
        self.folder, self.dry = folder, dry
        self.found: dict[str, Any] = {"device": device(dry), "dry": dry, "notes": []}
        self.found |= {"tests": None, "parity": None, "rows": [], "memory": []}
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def note(self, sentence: str) -> None:
        print(f"  {sentence}", flush=True)
        self.found["notes"].append(sentence)
        self.write()

    def write(self) -> None:
        (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")
        (self.folder / "gpu.md").write_text(markdown(self.found))


def device(dry: bool) -> dict[str, Any]:
    """Names and versions."""
    versions = {"numpy": np.__version__}
    if importlib.util.find_spec("torch"):
        import torch

        versions["torch"] = torch.__version__
    if dry:
        return {"name": "the stand-in, no GPU", **versions}
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "name": properties["name"].decode(),
        "memory": int(properties["totalGlobalMem"]),
        "capability": f"{properties['major']}.{properties['minor']}",
        "cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "cupy": cupy.__version__,
        **versions,
    }


def output_of(report: Report, what: str, command: list[str], seconds: float) -> str | None:
    """What a command prints; a note and None where it takes too long or cannot begin."""
    try:
        limit = {"timeout": min(seconds * report.patience, report.left())}
        path = os.pathsep.join(map(str, (ROOT, HERE, BENCHMARKS)))
        env = os.environ | {"PYTHONPATH": path}
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, **limit)
    except subprocess.TimeoutExpired:
        return report.note(f"{what}: not done within its time")
    if run.returncode not in (0, 1, 5):  # 1: a test failed; 5: there was none
        return report.note(f"{what}: {(run.stderr.strip().splitlines() or ['it ended'])[-1]}")
    return run.stdout


def tests(report: Report) -> None:
    """pytest -m gpu: how many passed, and which failed."""
    missing = [m for m in ("pytest", "hypothesis") if importlib.util.find_spec(m) is None]
    if missing:
        return report.note(f"pytest -m gpu: not run, {' and '.join(missing)} not installed")
    how = "-q -m gpu --tb=line --continue-on-collection-errors".split()
    if report.dry:
        how += ["-p", "dry", "tests/ground/test_gpu.py", "-k", "there_and_back or decode_step"]
    command = [sys.executable, "-m", "pytest", *how]
    said = output_of(report, "pytest -m gpu", command, TESTS)
    if said is not None:
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", said)}
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, flags=re.MULTILINE)
        report.found["tests"] = counts | {"which": failed}
        report.write()


def parity(report: Report) -> None:
    command = [sys.executable, "tests/gpu/parity.py", "2" if report.dry else "20"]
    said = output_of(report, "parity", command, PARITY)
    if said:
        report.found["parity"] = json.loads(said.splitlines()[-1])


def sides(report: Report) -> dict[str, tuple[str, str]]:
    has_torch = importlib.util.find_spec("torch") is not None
    if not has_torch:
        report.note("PyTorch is not installed: minirlhf alone is timed")
    of = {name: side for name, side in SIDES.items() if has_torch or side[0] == "ours.py"}
    if report.dry:
        of.pop("PyTorch CUDA graphs", None)  # there are none on a CPU
    return of


def measure(report: Report, name: str, sizes: Sizes) -> None:
    """Rows of a workload: each side in a program of its own, compared before it is timed."""
    with tempfile.TemporaryDirectory() as folder:
        write_workload(Path(folder), name, sizes, threads=1)
        for side, (file, variant) in sides(report).items():
            if report.left() < 10:
                return report.note(f"{name}, {side}: no time left")
            print(f"{name}, {side}", flush=True)
            try:
                command = [sys.executable, str(BENCHMARKS / file)]
                with Program(command, Path(folder), variant, threads=8) as program:
                    watch = threading.Timer(report.left(), program.process.kill)
                    watch.start()
                    try:
                        ask_all(report, program, Path(folder), {"workload": name, "side": side})
                    finally:
                        watch.cancel()
            except InputError as error:
                report.note(f"{name}, {side}: {error}")


def ask_all(report: Report, program: Program, folder: Path, row: dict[str, str]) -> None:
    for part in PARTS:
        different = disagreement(folder, part, program)
        if different:
            report.note(f"{row['workload']}, {row['side']}, {part}: {different}")
        first = program.ask(do="time", part=part, repeats=1)["seconds"][0]
        repeats = 1 if report.dry else int(np.clip(A_PART / max(first, 1e-6), 3, 50))
        laps = program.ask(do="time", part=part, repeats=repeats)["seconds"]
        low, median, high = np.percentile(laps, [25, 50, 75])
        times = {"seconds": median, "quartiles": [low, high], "n": len(laps)}
        report.found["rows"].append({**row, "part": part, **times, "agrees": not different})
        report.write()
    memory = program.ask(do="device_memory")["bytes"]
    report.found["memory"].append({**row, "bytes": memory})
    for part in ("update", "sample"):  # last: the profiler may not get on with everything
        n = program.ask(do="launches", part=part)["n"]
        for found in report.found["rows"]:
            if all(found[key] == x for key, x in {**row, "part": part}.items()):
                found["launches"] = n
    report.write()


def markdown(found: dict[str, Any]) -> str:
    """The table, with the device's name above it, and a sentence for all else."""
    names = [name for name in SIDES if any(row["side"] == name for row in found["rows"])]
    versions = ", ".join(f"{k} {v}" for k, v in found["device"].items() if k in ("cupy", "torch"))
    head = (
        f"**{found['device']['name']}**, float32 without TF32, {versions}: milliseconds, the median"
    )
    if found["dry"]:
        head = "A dry run on the stand-in for a GPU, without a GPU: the times below mean nothing."
    lines = [head, "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    of = {(row["workload"], row["part"], row["side"]): row for row in found["rows"]}
    for workload, part in dict.fromkeys(key[:2] for key in of):
        cells = [cell(of.get((workload, part, name))) for name in names]
        lines.append(f"| {workload}, {part} | {' | '.join(cells)} |")
    held = {(row["workload"], row["side"]): row["bytes"] for row in found["memory"]}
    for workload in dict.fromkeys(key[0] for key in held):
        cells = [held.get((workload, name)) for name in names]
        cells = ["–" if n is None else f"{n / 2**20:.0f} MB" for n in cells]
        lines.append(f"| {workload}, memory of the GPU | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *sentences(found), ""])


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    n = row.get("launches")
    doubt = "" if row["agrees"] else " (computes something else)"
    return f"{1e3 * row['seconds']:.4g}" + (f" ({n} kernels)" if n else "") + doubt


def sentences(found: dict[str, Any]) -> list[str]:
    said, parity = [], found["parity"]
    if found["tests"] is not None:
        counts = ", ".join(f"{n} {word}" for word, n in found["tests"].items() if word != "which")
        said.append(f"- `pytest -m gpu`: {counts}. {' '.join(found['tests']['which'])}".strip())
    if parity is not None:
        n, parted = parity["iterations"], parity["parted"]
        at = f"for all {n} iterations" if parted is None else f"until iteration {parted} of {n}"
        last = parity["distance"][n - 1 if parted is None else max(parted - 1, 0)]
        said.append(
            f"- A whole training samples the CPU's ids {at}; the parameters are then {last:.1e} "
            "apart at most."
        )
    return said + [f"- {note}" for note in found["notes"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, without a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder")
    options = parser.parse_args()
    os.environ["MINIRLHF_BENCH_DEVICE"] = "stand-in" if options.dry else "cuda"
    try:
        report = Report(options.out, options.dry)
    except Exception as error:  # of many kinds: no cupy, no driver, no GPU
        sys.exit(f"tests/gpu/run: expected CuPy and a GPU; {error}: use --dry without one")
    tests(report)
    parity(report)
    for name, sizes in (TINY if options.dry else SIZES).items():
        measure(report, name, sizes)
    report.write()
    print((report.folder / "gpu.md").read_text())


if __name__ == "__main__":
    main()
