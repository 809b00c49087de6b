"""The crew of workers.py: other processes of this machine, which share the work of a batch.

    with side_by_side(2):
        ...                         sum_over and map_over use two cores

Many small NumPy calls in threads wait for the interpreter's lock more than they compute, so the
crew are processes, forked at the first use. Where forking is not safe, anywhere but on Linux, they
are threads.

Tell the BLAS to use one thread (threadpoolctl), or they wait for each other.
"""

import contextlib
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

from minirlhf import workers
from minirlhf.errors import InputError
from minirlhf.ranks import n_ranks
from minirlhf.workers import Part, Result


@contextlib.contextmanager
def side_by_side(n_workers: int) -> Iterator[None]:
    """Within the block `sum_over` and `map_over` use n_workers; 0: one for each core we may use,
    or one for each process of mpiexec.

    For NumPy arrays only. A daemon of multiprocessing may have no children, and works alone.
    """
    before = workers.engaged()
    workers.engage(resolved(n_workers), _new_crew)
    try:
        yield
    finally:
        workers.engage(*before)


def _new_crew(n: int) -> Any:
    return (_Processes if workers.CAN_FORK else ThreadPoolExecutor)(n)


def _work_alone() -> None:
    """In a forked process: the crew belongs to the one who forked it."""
    workers.dismiss(forget=True)
    workers.engage(1, _new_crew)
    workers.ranks = None


if workers.CAN_FORK:
    os.register_at_fork(after_in_child=_work_alone)


def resolved(n_workers: int) -> int:
    """The number that `side_by_side` makes of this one."""
    alone = multiprocessing.current_process().daemon or (n_ranks() > 1 and not n_workers)
    return 1 if alone else n_workers or usable_cores()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes started here never see Ctrl-C, which is for the one who starts them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


BLOCK = 1 << 31  # bytes of addresses for the arrays of an answer; only what is used takes memory


class _Processes:
    """n forked processes, each at the end of a pipe; `map` and `shutdown` as an Executor has them.

    (ProcessPoolExecutor's own threads take 5 ms of a PPO iteration of 75 ms.) The arrays of an
    answer come through a block of shared memory: through the pipe, the gradient of 15 million
    parameters took a fifth of the time of its loss.
    """

    def __init__(self, n: int):
        self.crew: list[tuple[BaseProcess, Connection, mmap.mmap]] = []
        new = multiprocessing.get_context("fork").Process
        for _ in range(n):
            (ours, theirs), block = multiprocessing.Pipe(), mmap.mmap(-1, BLOCK)
            process = new(target=_serve, args=(theirs, ours, block), daemon=True)
            with warnings.catch_warnings(), without_interrupts():
                # Python 3.12 warns of threads beside a fork; the BLAS's are idle and not used there
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()  # so that its end is noticed
            self.crew.append((process, ours, block))

    def map(self, f: Callable[[Part], Result], shares: list[Part], lend=False) -> Iterator[Result]:
        """[f(share) of each]. Lend: the next call may write into arrays of the answers."""
        for (_, pipe, _), share in zip(self.crew, shares, strict=False):
            with contextlib.suppress(ConnectionError):  # there will be no answer either
                pipe.send_bytes(_Pickler.dumps((f, share), 5))
        return (_received(pipe, block, lend) for _, pipe, block in self.crew[: len(shares)])

    def shutdown(self) -> None:
        for process, pipe, _ in self.crew:
            process.kill()
            process.join()
            pipe.close()


def _serve(pipe: Connection, other_end: Connection, block: mmap.mmap) -> None:
    """A worker's life: one message after the other, until the one who forked it has ended."""
    other_end.close()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            arrays: list[pickle.PickleBuffer] = []
            answer = _answer(pipe.recv_bytes(), arrays.append)
            block.seek(0)
            sizes = [block.write(array.raw()) for array in arrays]
            pipe.send((answer, sizes))


def _answer(message: bytes, keep: Callable[[pickle.PickleBuffer], Any]) -> bytes:
    """f(share) of a message, or its error; one that does not survive the way is told in words."""
    try:
        f, share = pickle.loads(message)
        return pickle.dumps((f(share), None), protocol=5, buffer_callback=keep)
    except Exception as error:
        error.add_note(f"in a worker: {traceback.format_exc()}")
        with contextlib.suppress(Exception):
            pickle.loads(answer := pickle.dumps((None, error)))
            return answer
        return pickle.dumps((None, RuntimeError(f"in a worker: {error!r}")))


def _received(pipe: Connection, block: mmap.mmap, lend: bool) -> Any:
    try:
        message, sizes = pipe.recv()
        ends = zip(itertools.accumulate(sizes), sizes, strict=True)
        arrays = [memoryview(block)[end - size : end] for end, size in ends]
        answer, error = pickle.loads(message, buffers=arrays if lend else map(bytearray, arrays))
    except (EOFError, ConnectionError) as error:
        raise InputError(
            "workers: expected an answer; a worker process has ended, perhaps for want of "
            "memory: set fewer workers in config.toml"
        ) from error
    if error is not None:
        raise error
    return answer


def _named(name: int) -> np.ndarray:
    """The shared array in this process: a forked one has it under the same name."""
    return workers.shared[name]


class _Pickler(ForkingPickler):
    """A shared array goes by its name, any other one as it is."""

    def reducer_override(self, value: Any) -> Any:
        return (_named, (id(value),)) if id(value) in workers.shared else NotImplemented
