"""Data-parallel training by mpiexec: how fast it is here, and where more machines stop helping.

    python tests/benchmarks/bench_mpi.py            # a few minutes on two cores

Measured: whole PPO iterations of *toy* by 1, 2, 4 processes of one thread each, in turns. The share
of their time that goes into sums and gathers is told apart from waiting for the slowest. A round in
which other programs took more than 6 % of the machine is done again, at most twice; --patience lets
it wait for a quiet machine before that. Where the machine is never quiet, the column in CPU seconds
says more: the computing of one process by that of the busiest rank, without sums and gathers.

Modelled: n machines, each as fast as a core of this one, behind a network.

    T(n) = alone + sum over the calls of map_over and sum_over of (slowest(n) + sent(n))
    sent(n), a sum:     2 (n - 1) latency + 2 (n - 1) / n bytes / bandwidth
    sent(n), a gather:    (n - 1) latency +   (n - 1) / n bytes / bandwidth

`alone` is what each rank does for itself, AdamW above all. The slowest of n is measured, too: one
process works on the shares of all n, one after the other.
"""

import argparse
import itertools
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from programs import busy_seconds
from protocol import Workload
from workloads import WORKLOADS, write_workload

from minirlhf import workers
from minirlhf.ranks import Ranks, alone, together
from minirlhf.tree import tree_leaves

LATENCY = 50e-6  # seconds of one message in a network without tricks
NETWORKS = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 1e10 / 8, "100 Gbit/s": 1e11 / 8}  # bytes a second
MACHINES = (1, 2, 4, 8)
PARTS = {"toy": "iteration", "small": "iteration", "gpt2": "update"}  # what is timed of each
QUIET = 0.06  # of the machine: so much others may take in a round
ROOT = Path(__file__).parents[2]


class Metered:
    """A communicator that notes what is sent, and for how long; first all wait for the slowest."""

    def __init__(self, comm: Any):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.waiting = self.sending = self.cpu = 0.0
        self.n_bytes = self.n_sums = 0

    def _timed(self, send, *arguments):
        began, cpu = time.perf_counter(), time.process_time()
        self.comm.Barrier()
        met = time.perf_counter()
        answer = send(*arguments)
        self.waiting += met - began
        self.sending += time.perf_counter() - met
        self.cpu += time.process_time() - cpu
        return answer

    def Allreduce(self, ours, flat):
        self.n_bytes += flat.nbytes
        self.n_sums += flat.size > 16  # a few numbers in float64 go by themselves
        self._timed(self.comm.Allreduce, ours, flat)

    def allgather(self, part):
        return self._timed(self.comm.allgather, part)

    def bcast(self, value):
        return self._timed(self.comm.bcast, value)


class Rehearsal(Ranks):
    """n ranks played by one process: how long the slowest would take, and what they would send."""

    def __init__(self, n: int):
        self.rank, self.size = 0, n
        self.inside = self.slowest = 0.0  # CPU s: in all shares, in the slowest of each call
        self.sums, self.gathers = [], []  # bytes of each

    def _shares(self, work, parts):
        found, took = [], []
        with alone():
            for rank in range(self.size):
                began = time.process_time()
                share = parts[rank :: self.size]
                found.append(work(share) if share else None)
                took.append(time.process_time() - began)
        self.inside += sum(took)
        self.slowest += max(took)
        return found

    def map_over(self, f, parts):
        found = self._shares(lambda share: workers.map_over(f, share), parts)
        self.gathers.append(len(pickle.dumps(found)))
        return [found[i % self.size][i // self.size] for i in range(len(parts))]

    def sum_over(self, f, parts):
        trees = self._shares(lambda share: workers.sum_over(f, share), parts)
        self.sums.append(sum(leaf.nbytes for leaf in tree_leaves(trees[0])))
        with alone():
            return workers.sum_over(lambda tree: tree, [tree for tree in trees if tree is not None])

    def sent(self, latency: float, bandwidth: float) -> float:
        """Seconds of all sums and gathers."""
        n = self.size
        each = [(2, size) for size in self.sums] + [(1, size) for size in self.gathers]
        return sum(k * ((n - 1) * latency + (n - 1) / n * size / bandwidth) for k, size in each)


def on_this_rank(folder: Path, repeats: int) -> None:
    """Time `repeats` turns of the workload; rank 0 prints what it saw of one."""
    with together():
        call = opened(folder)
        call()
        comm = None
        if workers.ranks:
            comm = workers.ranks.comm = Metered(workers.ranks.comm)
        began, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        for _ in range(repeats):
            call()
        spent, own = time.perf_counter() - began, time.process_time() - own
        both = own, own - (comm.cpu if comm else 0.0)  # CPU seconds in all, and of computing
        of_all = comm.comm.allgather(both) if comm else [both]
        others = busy_seconds() - busy - sum(cpu for cpu, _ in of_all)
        row = {"seconds": spent / repeats, "others": others / spent / os.cpu_count()}
        row["computing"] = max(computing for _, computing in of_all) / repeats
        for name in ("waiting", "sending", "n_bytes", "n_sums"):
            row[name] = getattr(comm, name, 0) / repeats
        print(json.dumps(row))


def opened(folder: Path):
    """A turn of the workload in a folder, to be called."""
    from ours import MiniRLHF

    from minirlhf.memory import keep_freed_memory

    keep_freed_memory()
    workload = Workload.load(folder)
    return getattr(MiniRLHF(workload, ""), PARTS[workload.name])


def rehearsed(folder: Path, n: int) -> tuple[Rehearsal, float]:
    """A turn by n ranks, played by this process, and the seconds of one that n would compute."""
    call = opened(folder)
    call()
    ranks = workers.ranks = Rehearsal(n)
    began = time.process_time()
    call()
    spent = time.process_time() - began
    workers.ranks = None
    return ranks, spent - ranks.inside + ranks.slowest


def started(folder: Path, n: int, repeats: int) -> dict[str, float]:
    """What rank 0 of n printed."""
    environment = {f"OMPI_ALLOW_RUN_AS_ROOT{end}": "1" for end in ("", "_CONFIRM")}
    environment |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # Open MPI's
    environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = ["mpiexec", "-n", str(n), sys.executable, __file__, "--rank", folder, "--repeats"]
    command = [*map(str, words), str(repeats)]
    run = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout)


def quiet(patience: float) -> None:
    """Return when the machine has been idle for two seconds, or after `patience` seconds."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        busy = busy_seconds()
        time.sleep(2)
        if busy_seconds() - busy < 2 * os.cpu_count() * QUIET:
            return


def one_round(
    folder: Path, ranks: list[int], repeats: int, patience: float
) -> dict[int, dict[str, float]]:
    """What each number of ranks took, in turn; the quietest of at most three tries."""
    tries = []
    while len(tries) < 3:
        quiet(patience)
        tries.append({n: started(folder, n, repeats) for n in ranks})
        if max(row["others"] for row in tries[-1].values()) <= QUIET:
            break
    return min(tries, key=lambda by_n: max(row["others"] for row in by_n.values()))


def measure(folder: Path, found: list[dict[int, dict[str, float]]]) -> list[list[str]]:
    """The rows of the table of rounds; within a round the speed of the machine is one."""
    rows = []
    for by_n in found:
        print(
            *(f"{n}: {row['seconds']:.2f} s, others {row['others']:.0%}" for n, row in by_n.items())
        )
    for n in found[0]:
        mine = [by_n[n] for by_n in found]
        faster = [by_n[1]["seconds"] / by_n[n]["seconds"] for by_n in found]
        computing = [by_n[1]["computing"] / by_n[n]["computing"] for by_n in found]
        seconds = statistics.median(row["seconds"] for row in mine)
        share = {
            name: statistics.median(row[name] / row["seconds"] for row in mine)
            for name in ("waiting", "sending")
        }
        ring = 2 * (n - 1) / n
        volume = ring * mine[0]["n_bytes"] / max(mine[0]["n_sums"], 1)
        rows.append(
            [
                str(n),
                f"{1000 * seconds:.0f}",
                f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f})",
                f"{statistics.median(computing):.2f}",
                f"{share['sending']:.1%}",
                f"{share['waiting']:.1%}",
                f"{volume / 1e6:.2f}",
                f"{4 * ring * n_parameters(folder) / 1e6:.2f}",
            ]
        )
    return rows


def n_parameters(folder: Path) -> int:
    """Of the policy with its value head."""
    return sum(array.size for array in Workload.load(folder).parameters("policy").values())


def modelled(folder: Path) -> Iterator[list[str]]:
    """The rows of the model: how many times as fast n machines are as one, on each network."""
    one = 0.0
    for n in MACHINES:
        ranks, computed = rehearsed(folder, n)
        one = one or computed  # the first is of one machine
        total = {name: computed + ranks.sent(LATENCY, b) for name, b in NETWORKS.items()}
        row = [Workload.load(folder).name, str(n), f"{computed:.2f}", f"{one / computed:.2f}"]
        row += [f"{one / seconds:.2f}" for seconds in total.values()]
        ring = 2 * (n - 1) / n * sum(ranks.sums) / len(ranks.sums)
        saved = one - computed - ranks.sent(LATENCY, math.inf)
        least = ranks.sent(0.0, 1.0) / saved if saved > 0 else math.inf  # bytes a second
        yield [*row, f"{ring / 1e6:.1f}", f"{8e-9 * least:.2f}" if n > 1 else ""]


def show(head: list[str], rows: Iterable[list[str]]) -> None:
    """A table in Markdown, row by row."""
    for row in itertools.chain((head, ["---"] * len(head)), rows):
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=4, help="iterations a round")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for quiet")
    parser.add_argument("--models", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rank", type=Path, help="for mpiexec: be one, on this folder")
    options = parser.parse_args()
    if options.rank:
        on_this_rank(options.rank, options.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in {"toy", *options.models}:
            (Path(folder) / name).mkdir()
            write_workload(Path(folder) / name, name, WORKLOADS[name], threads=1)
        head = ["processes", "ms an iteration", "times as fast", "in CPU s", "sending", "waiting"]
        head += ["MB sent an update", "4 P 2 (n - 1) / n"]
        if options.rounds:
            toy, ranks = Path(folder) / "toy", sorted({1, *options.ranks})
            how = toy, ranks, options.repeats, options.patience
            show(head, measure(toy, [one_round(*how) for _ in range(options.rounds)]))
        head = ["workload", "machines", "CPU s without sending", "times as fast", *NETWORKS]
        rows = (row for name in options.models for row in modelled(Path(folder) / name))
        show([*head, "MB sent an update", "no gain below [Gbit/s]"], rows)


if __name__ == "__main__":
    main()
