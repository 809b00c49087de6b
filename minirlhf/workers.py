"""Parts of a batch side by side, on several cores.

    with side_by_side(2):
        total = sum_over(f, parts)      f(part) + f(part) + ..., trees of arrays
        results = map_over(f, parts)    [f(part), f(part), ...]

Many small NumPy calls in threads wait for the interpreter's lock more than they compute, so the
workers are processes, forked at the first use. Arrays from `share` are not copied into messages to
them: all processes see one memory, and what an optimiser writes there all of them see. Where
forking is not safe, anywhere but on Linux, the workers are threads.

Tell the BLAS to use one thread (threadpoolctl), or the workers wait for each other.
"""

import contextlib
import functools
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import numpy as np

from minirlhf.backend import Array, get_xp
from minirlhf.errors import InputError
from minirlhf.tree import Tree, tree_leaves, tree_pack, tree_sum, tree_unpack

Part, Result = TypeVar("Part"), TypeVar("Result")
CAN_FORK = sys.platform == "linux"

_n = 1  # how many work side by side here, this process among them
_crew: "_Processes | ThreadPoolExecutor | None" = None  # the n - 1 others, once there was work
_shared = weakref.WeakValueDictionary()  # id -> array in memory that forked processes see


@contextlib.contextmanager
def side_by_side(n_workers: int) -> Iterator[None]:
    """Within the block `sum_over` and `map_over` use n_workers; 0: one for each core we may use.

    For NumPy arrays only. A daemon of multiprocessing may have no children, and works alone.
    """
    global _n
    before, _n = _n, resolved(n_workers)
    _dismiss()
    try:
        yield
    finally:
        _dismiss()
        _n = before


def n_workers() -> int:
    """How many parts are worked on at a time here."""
    return _n


def resolved(n_workers: int) -> int:
    """The number that `side_by_side` makes of this one."""
    return 1 if multiprocessing.current_process().daemon else n_workers or usable_cores()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_over(f: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
    """[f(part) for each part], in order.

    Raises:   whatever f raises.
    """
    done = _run(list, f, parts)
    return [done[i % len(done)][i // len(done)] for i in range(len(parts))]


def sum_over(f: Callable[[Part], Tree], parts: list[Part]) -> Tree:
    """Sum of f(part), trees of arrays and numbers: each worker adds up its own, then all are added.

    Args:     f: returns new memory each time; the sum is made in it.
    Raises:   ValueError: there is no part.
              whatever f raises.
    """
    if not parts:
        raise ValueError("sum_over: expected at least one part; got none")
    return tree_sum(_run(tree_sum, f, parts))


def share(array: np.ndarray) -> np.ndarray:
    """A copy that all workers see, written to by one process only; on a GPU a plain copy."""
    if not CAN_FORK or get_xp(array) is not np:
        return array.copy()
    _dismiss()  # who was forked before does not see it: the next use forks anew
    memory = mmap.mmap(-1, max(array.nbytes, 1))  # anonymous and shared: children inherit it
    block = np.ndarray(array.shape, array.dtype, memory)
    block[...] = array
    _shared[id(block)] = block
    return block


def share_packed(tree: Tree) -> tuple[Array, Tree]:
    """`tree_pack` in memory that all workers see: one flat buffer, and the tree as views of it."""
    flat = share(tree_pack(tree)[0])
    views = tree_unpack(flat, tree)
    if id(flat) in _shared:
        _shared.update((id(leaf), leaf) for leaf in tree_leaves(views))
    return flat, views


# -- the crew ------------------------------------------------------------------------------------
def _work(collect: Callable, f: Callable, share: list) -> Any:
    return collect(map(f, share))


def _run(collect: Callable, f: Callable, parts: list) -> list:
    """[collect(f(part), ..) of each share]: the first is worked on here, the others by the crew."""
    global _crew
    n, work = min(_n, len(parts)), functools.partial(_work, collect, f)
    if n < 2:
        return [work(parts)]
    _crew = _crew or (_Processes if CAN_FORK else ThreadPoolExecutor)(_n - 1)
    try:
        answers = _crew.map(work, [parts[k::n] for k in range(1, n)])
        return [work(parts[::n]), *answers]
    except BaseException:
        _dismiss()  # answers may be under way that nobody will fetch
        raise


def _dismiss() -> None:
    """Let the others go; `_run` makes new ones."""
    global _crew
    if _crew is not None:
        _crew.shutdown()
    _crew = None


def _work_alone() -> None:
    """In a forked process: the crew belongs to the one who forked it."""
    global _n, _crew
    _n, _crew = 1, None


if CAN_FORK:
    os.register_at_fork(after_in_child=_work_alone)


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


class _Processes:
    """n forked processes, each at the end of a pipe; `map` and `shutdown` as an Executor has them.

    (ProcessPoolExecutor's own threads take 5 ms of a PPO iteration of 75 ms.)
    """

    def __init__(self, n: int):
        self.crew: list[tuple[BaseProcess, Connection]] = []
        new = multiprocessing.get_context("fork").Process
        for _ in range(n):
            ours, theirs = multiprocessing.Pipe()
            process = new(target=_serve, args=(theirs, ours), daemon=True)
            with warnings.catch_warnings(), without_interrupts():
                # Python 3.12 warns of threads beside a fork; the BLAS's are idle and not used there
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()  # so that its end is noticed
            self.crew.append((process, ours))

    def map(self, f: Callable[[Part], Result], shares: list[Part]) -> Iterator[Result]:
        pipes = [pipe for _, pipe in self.crew[: len(shares)]]
        for pipe, share in zip(pipes, shares, strict=True):
            with contextlib.suppress(ConnectionError):  # there will be no answer either
                pipe.send_bytes(_Pickler.dumps((f, share), 5))
        return (_received(pipe) for pipe in pipes)

    def shutdown(self) -> None:
        for process, pipe in self.crew:
            process.kill()
            process.join()
            pipe.close()


def _serve(pipe: Connection, other_end: Connection) -> None:
    """A worker's life: one message after the other, until the one who forked it has ended."""
    other_end.close()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _answer(message: bytes) -> bytes:
    """f(share) of a message, or its error; one that does not survive the way is told in words."""
    try:
        f, share = pickle.loads(message)
        return pickle.dumps((f(share), None), protocol=5)
    except Exception as error:
        error.add_note(f"in a worker: {traceback.format_exc()}")
        with contextlib.suppress(Exception):
            pickle.loads(answer := pickle.dumps((None, error)))
            return answer
        return pickle.dumps((None, RuntimeError(f"in a worker: {error!r}")))


def _received(pipe: Connection) -> Any:
    try:
        answer, error = pipe.recv()
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
    return _shared[name]


class _Pickler(ForkingPickler):
    """A shared array goes by its name, any other one as it is."""

    def reducer_override(self, value: Any) -> Any:
        return (_named, (id(value),)) if id(value) in _shared else NotImplemented
