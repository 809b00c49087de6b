"""Processes of mpiexec that train together: `mpiexec -n 4 minirlhf train ..`.

    with together():
        ...                         sum_over and map_over share their parts among all ranks

Every rank runs the same program. It works on its share of the parts of a batch; `sum_over` ends in
an Allreduce, `map_over` in an Allgather, so that all know the same and make the same update. What
is not shared (files, the user's reward, words on the terminal) is rank 0's. The first rank that
fails ends the job. Without mpiexec mpi4py is not imported, and all this does nothing.
"""

import atexit
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np

from minirlhf import workers
from minirlhf.errors import InputError
from minirlhf.tree import Tree, tree_leaves, tree_map, tree_pack
from minirlhf.workers import Part, Result

# of their _SIZE and _RANK: Open MPI; MPICH, Intel MPI and srun; MVAPICH; PMIx, which has no _SIZE
LAUNCHERS = ("OMPI_COMM_WORLD", "PMI", "MV2_COMM_WORLD", "PMIX")
PATIENCE = 10.0  # seconds that the others leave rank 0 to say what all found wrong

_joined: "Ranks | None" = None


class Ranks:
    """Those of a communicator of mpi4py, this process among them."""

    def __init__(self, comm: Any):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size

    def map_over(self, f: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
        """`workers.map_over`, by all ranks together."""
        with alone():
            mine = workers.map_over(f, parts[self.rank :: self.size])
        found = self.comm.allgather(mine)
        return [found[i % self.size][i // self.size] for i in range(len(parts))]

    def sum_over(self, f: Callable[[Part], Tree], parts: list[Part]) -> Tree:
        """`workers.sum_over`, by all ranks together: the same bits on each, one message a dtype."""
        mine, tree, like = parts[self.rank :: self.size], None, None
        with alone():
            if mine:
                tree = tree_map(np.asarray, workers.sum_over(f, mine))
        if len(parts) < self.size:  # who has no part adds 0, to arrays that it has to hear of
            like = tree_map(lambda a: (a.shape, a.dtype), tree) if mine else None
            like = self.comm.bcast(like)
        tree = tree if mine else tree_map(lambda about: np.zeros(*about), like)
        leaves, sums = tree_leaves(tree), {}
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            flat, views = tree_pack([leaf for leaf in leaves if leaf.dtype == dtype])
            self.comm.Allreduce(None, flat)  # in place
            sums[dtype] = iter(views)
        return tree_map(lambda leaf: next(sums[leaf.dtype]), tree)


@contextmanager
def together() -> Iterator[None]:
    """In the block the processes of mpiexec share the work; all but rank 0 are silent.

    Raises:   InputError: mpi4py is not there, or belongs to another MPI than mpiexec does.
              whatever the block raises; with this process the job then ends.
    """
    global _joined
    rank, comm = max(_told("RANK", 0)), None
    with ExitStack() as silent:
        try:
            comm = _communicator()
            if comm:
                workers.ranks = _joined = Ranks(comm)
            if comm and rank:
                nowhere = silent.enter_context(open(os.devnull, "w", encoding="utf-8"))
                for redirect in (redirect_stdout, redirect_stderr):
                    silent.enter_context(redirect(nowhere))
            yield
        except (Exception, KeyboardInterrupt) as error:
            if rank:
                time.sleep(PATIENCE)  # by then rank 0 has said it, and nobody is left
                error.args = (f"rank {rank}: {error}",)
            if comm:
                refused = isinstance(error, InputError | MemoryError | OSError)
                atexit.register(_abort, comm, getattr(error, "status", 1 + refused))
            raise
        finally:
            workers.ranks = _joined = None


def _told(what: str, default: int) -> list[int]:
    """The launchers' _SIZE or _RANK of this process."""
    found = [os.environ.get(f"{launcher}_{what}", "") for launcher in LAUNCHERS]
    return [int(number) for number in found if number.isdecimal()] or [default]


def _communicator() -> Any:
    """Of all processes that mpiexec started; None if there is but this one."""
    n = max(_told("SIZE", 1))
    if n == 1 and "PMIX_RANK" not in os.environ:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no library of MPI
        if n == 1:
            return None
        raise InputError(
            f"mpiexec: expected mpi4py, by which its {n} processes train together; got: {error}: "
            "pip install 'minirlhf[mpi]', or run one process without mpiexec"
        ) from error
    if n not in (1, MPI.COMM_WORLD.size):
        raise InputError(
            f"mpiexec: expected {n} processes, as it started; mpi4py knows {MPI.COMM_WORLD.size}, "
            "of another MPI: install mpi4py for the MPI that mpiexec belongs to"
        )
    return MPI.COMM_WORLD if MPI.COMM_WORLD.size > 1 else None


def _abort(comm: Any, status: int) -> None:
    sys.stdout.flush()
    time.sleep(1.0)  # mpiexec passes on what was said, but no longer once a rank has aborted
    comm.Abort(status)


@contextmanager
def alone() -> Iterator[None]:
    """In the block this rank works by itself, and nothing is sent."""
    before, workers.ranks = workers.ranks, None
    try:
        yield
    finally:
        workers.ranks = before


def n_ranks() -> int:
    """How many processes train together."""
    return _joined.size if _joined else 1


def is_first() -> bool:
    """Is this rank 0, or the only one?"""
    return not (_joined and _joined.rank)


def leave_to_first(f: Callable) -> Callable:
    """Rank 0 calls f; the others go on, with None, and may have called it at other times."""

    @functools.wraps(f)
    def left(*arguments, **options):
        with alone():
            return f(*arguments, **options) if is_first() else None

    return left


def ask_first(f: Callable) -> Callable:
    """Rank 0 calls f; all ranks, which have to ask alike, get what it returns."""

    @functools.wraps(f)
    def asked(*arguments, **options):
        answer, ranks = leave_to_first(f)(*arguments, **options), workers.ranks
        return answer if ranks is None else ranks.comm.bcast(answer)

    return asked


class Silent:
    """In the place of what writes, on the other ranks: every call of it does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None
