"""Processes of mpiexec that train together: `mpiexec -n 4 minirlhf train ..`.

    with together():
        ...                         sum_over and map_over share their parts among all ranks

Every rank runs the same program. It works on its share of the parts of a batch; `sum_over` ends in
an Allreduce (of NCCL, on GPUs), `map_over` in an Allgather, so that all know the same and make the
same update. What is not shared (files, the user's reward, words on the terminal) is rank 0's. The
first that fails ends the job. Without mpiexec mpi4py is not imported, and all this does nothing.
"""

import atexit
import functools
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np

from minirlhf import backend, workers
from minirlhf.backend import Array, get_xp
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
        from mpi4py import MPI

        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        here = comm.Split_type(MPI.COMM_TYPE_SHARED)  # those of this machine
        self.place, self.n_here = here.rank, here.size
        self.gpus: Any = None  # their communicator, once there was a sum

    def map_over(self, f: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
        """`workers.map_over`, by all ranks together."""
        with alone():
            mine = workers.map_over(f, parts[self.rank :: self.size])
        found = self.comm.allgather(mine)
        return [found[i % self.size][i // self.size] for i in range(len(parts))]

    def sum_over(self, f: Callable[[Part], Tree], parts: list[Part]) -> Tree:
        """`workers.sum_over`, by all ranks together: the same bits on each, one message a dtype."""
        mine, like = parts[self.rank :: self.size], None
        with alone():
            tree = workers.sum_over(f, mine) if mine else None
        tree = tree_map(lambda a: np.asarray(a) if np.isscalar(a) else a, tree)
        if len(parts) < self.size:  # who has no part adds 0, to arrays that it has to hear of
            like = tree_map(lambda a: (a.shape, a.reshape(-1)[:0]), tree) if mine else None
            like = self.comm.bcast(like)
        tree = tree if mine else tree_map(lambda a: get_xp(a[1]).zeros(a[0], a[1].dtype), like)
        leaves, sums = tree_leaves(tree), {}
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            flat, views = tree_pack([leaf for leaf in leaves if leaf.dtype == dtype])
            self._add_up(flat)
            sums[dtype] = iter(views)
        return tree_map(lambda leaf: next(sums[leaf.dtype]), tree)

    def _add_up(self, flat: Array) -> None:
        """flat (N,) becomes its sum over all ranks, in place; from a GPU to a GPU by NCCL."""
        xp = get_xp(flat)
        if xp is np:
            self.comm.Allreduce(None, flat)  # in place
            return
        if self.gpus is None:
            nccl = self.nccl = _nccl(xp)
            key = self.comm.bcast(nccl.get_unique_id() if self.rank == 0 else None)
            self.gpus = nccl.NcclCommunicator(self.size, key, self.rank)
        kind = getattr(self.nccl, f"NCCL_{flat.dtype.name.upper()}", None)
        if kind is None:
            raise TypeError(f"sum_over: expected numbers that NCCL adds up; got {flat.dtype}")
        here, stream = flat.data.ptr, xp.cuda.get_current_stream().ptr
        self.gpus.allReduce(here, here, flat.size, kind, self.nccl.NCCL_SUM, stream)


def _nccl(xp: Any) -> Any:
    """cupy.cuda.nccl, which `import cupy` leaves out, and which warns where there is no libnccl."""
    with warnings.catch_warnings(action="ignore"):
        return importlib.import_module(f"{xp.__name__}.cuda.nccl")


def take_device(device: str) -> None:
    """Refuse one that is not there, fewer GPUs than ranks, or no NCCL; a rank takes its own GPU."""
    xp = backend.array_module(device)
    if xp is np or _joined is None:
        return
    if (n := xp.cuda.runtime.getDeviceCount()) < _joined.n_here:
        raise InputError(
            f"mpiexec: expected {_joined.n_here} GPUs, one for each rank of a machine, and each "
            f"rank to see all; found {n}: start fewer ranks, or set CUDA_VISIBLE_DEVICES"
        )
    if not _nccl(xp).available:
        raise InputError(
            "mpiexec: expected NCCL, by which GPUs add up; cupy finds none: pip install "
            "nvidia-nccl-cu12 (for cuda13: -cu13), or train on one GPU without mpiexec"
        )
    xp.cuda.Device(_joined.place).use()


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
                atexit.register(_abort, comm, getattr(error, "status", 1 + refused), _joined)
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


def _abort(comm: Any, status: int, kept: Ranks | None) -> None:
    """Kept to the end: the GPUs' communicator, for once dropped it waits for the other ranks."""
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
