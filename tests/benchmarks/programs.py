"""Programs that the benchmark runs, each in a process of its own, and what it reads off them."""

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from minirlhf.disk import shorten
from minirlhf.errors import InputError

Row = dict[str, Any]

PAUSE = 0.25  # seconds in which the threads of whoever computed last stop spinning for more work


class Program:
    """An implementation at work in a process of its own."""

    def __init__(self, command: list[str], folder: Path, variant: str, threads: int):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        limits = {name: str(threads) for name in names}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | limits,
        )
        try:
            self.ask(do="hello")
            self.memory_at_start = memory_of(self.process.pid)
            self.name = self.ask(do="open", folder=str(folder), variant=variant)["name"]
        except InputError:
            self.close()
            raise

    def ask(self, **request: Any) -> Row:
        """Raises InputError if the program cannot do it, with its own words."""
        self._send(request)
        return self._answer()

    def _send(self, request: Row) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer will tell
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def _answer(self) -> Row:
        line = self.process.stdout.readline()
        if line:
            answer = json.loads(line)
        else:
            self.log.seek(0)
            answer = {"error": (self.log.read().strip().splitlines() or ["it ended"])[-1]}
        if "error" in answer:
            raise InputError(f"{shorten(' '.join(self.process.args[1:]), 80)}: {answer['error']}")
        return answer

    def lap(self, part: str, repeats: int) -> float:
        """Seconds a call, the median of `repeats` calls, on a machine that has come to rest."""
        time.sleep(PAUSE)
        return float(np.median(self.ask(do="time", part=part, repeats=repeats)["seconds"]))

    def memory_above_start(self, part: str) -> int:
        """Most bytes above those of the libraries alone, of the program and its children."""
        self._send({"do": "run", "part": part, "repeats": 3})
        peak, has_answered = 0, False
        while not has_answered:
            has_answered = bool(select.select([self.process.stdout], [], [], 0.005)[0])
            peak = max(peak, memory_of(self.process.pid))
        self._answer()
        return peak - self.memory_at_start

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def family(pid: int) -> list[int]:
    """A process and all that came from it (Linux)."""
    pids = [pid]
    for parent in pids:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):  # of each of its threads
            with contextlib.suppress(OSError):
                pids += map(int, children.read_text().split())
    return pids


def memory_of(pid: int) -> int:
    """Bytes that a process and its children hold; what they share is counted once (Linux).

    Without the code of libraries, of which a process is counted less the more others use it.
    """
    total = 0
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kinds = ("Pss_Anon:", "Pss_Shmem:")
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))
    return total


def busy_seconds() -> float:
    """CPU seconds of the whole machine since it started, also those that a host took away.

    0 where the system does not tell: then no round is done again.
    """
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds(pids: list[int]) -> float:
    """CPU seconds of these processes so far."""
    total = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
