"""Parts of a batch side by side, on several cores.

    with side_by_side(2):
        total = sum_over(f, parts)      f(part) + f(part) + ..., trees of arrays
        results = map_over(f, parts)    [f(part), f(part), ...]

Many small NumPy calls in threads wait for the interpreter's lock more than they compute, so the
workers are processes, forked at the first use: a ProcessPoolExecutor. Arrays from `share` are not
copied into its messages: all processes see one memory, and what an optimiser writes there all of
them see. Where forking is not safe, anywhere but on Linux, the workers are threads.

Tell the BLAS to use one thread (threadpoolctl), or the workers wait for each other.
"""

import contextlib
import copyreg
import functools
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

import numpy as np

from minirlhf.backend import Array, get_xp
from minirlhf.errors import InputError
from minirlhf.tree import Tree, tree_leaves, tree_pack, tree_sum, tree_unpack

Part, Result = TypeVar("Part"), TypeVar("Result")
CAN_FORK = sys.platform == "linux"

_n = 1  # how many work side by side here, this process among them
_pool: Executor | None = None  # the n - 1 others, once there was something to do
_shared = weakref.WeakValueDictionary()  # id -> array in memory that forked processes see


@contextlib.contextmanager
def side_by_side(n_workers: int) -> Iterator[None]:
    """Within the block `sum_over` and `map_over` use n_workers; 0: one for each core we may use.

    For NumPy arrays only. A process that multiprocessing runs as a daemon may not have children,
    and works alone.
    """
    global _n
    alone = multiprocessing.current_process().daemon
    before, _n = _n, 1 if alone else n_workers or usable_cores()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # or the pool's threads wait up to 5 ms to send a part
    _dismiss()
    try:
        yield
    finally:
        _dismiss()
        sys.setswitchinterval(interval)
        _n = before


def n_workers() -> int:
    """How many parts are worked on at a time here."""
    return _n


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_over(f: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
    """[f(part) for each part], in order.

    Raises:   whatever f raises.
    """
    n = min(_n, len(parts)) or 1
    done = _run(functools.partial(_map, f), [parts[k::n] for k in range(n)])
    return [done[i % n][i // n] for i in range(len(parts))]


def sum_over(f: Callable[[Part], Tree], parts: list[Part]) -> Tree:
    """Sum of f(part), trees of arrays and numbers: each worker adds up its own, then all are added.

    Args:     f: returns new memory each time; the sum is made in it.
    Raises:   ValueError: there is no part.
              whatever f raises.
    """
    if not parts:
        raise ValueError("sum_over: expected at least one part; got none")
    n = min(_n, len(parts))
    return tree_sum(_run(functools.partial(_sum, f), [parts[k::n] for k in range(n)]))


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


def share_tree(tree: Tree) -> Tree:
    """`share` for all leaves at once."""
    return share_packed(tree)[1]


# -- the pool ------------------------------------------------------------------------------------
def _map(f: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
    return [f(part) for part in parts]


def _sum(f: Callable[[Part], Tree], parts: list[Part]) -> Tree:
    return tree_sum(map(f, parts))


def _run(f: Callable[[list[Part]], Result], shares: list[list[Part]]) -> list[Result]:
    """[f(share), ...]: the first share here, the others in the pool."""
    if len(shares) == 1:
        return [f(shares[0])]
    try:
        pool = _executor()
        if CAN_FORK:
            others = [pool.submit(_answer, _dumps((f, share))) for share in shares[1:]]
        else:
            others = [pool.submit(f, share) for share in shares[1:]]
        return [f(shares[0]), *(other.result() for other in others)]
    except BrokenProcessPool as error:
        _dismiss()
        raise InputError(
            "workers: expected an answer; a worker process has ended, perhaps for want of "
            "memory: use fewer --workers, or a smaller --ppo.micro-batch-size"
        ) from error


def _executor() -> Executor:
    global _pool
    if _pool is None and CAN_FORK:
        context = multiprocessing.get_context("fork")
        _pool = ProcessPoolExecutor(_n - 1, mp_context=context, initializer=_begin)
        with warnings.catch_warnings():
            # Python 3.12 warns of threads beside a fork; the BLAS's are idle and not used there
            warnings.simplefilter("ignore", DeprecationWarning)
            _pool.submit(int)  # forks all of them
    elif _pool is None:
        _pool = ThreadPoolExecutor(_n - 1)
    return _pool


def _dismiss() -> None:
    """Let the others go; `_executor` makes new ones."""
    global _pool
    if _pool is not None:
        _pool.shutdown()
    _pool = None


def _work_alone() -> None:
    """In a forked process: the pool belongs to the one who forked it."""
    global _n, _pool
    _n, _pool = 1, None


if CAN_FORK:
    os.register_at_fork(after_in_child=_work_alone)


def _begin() -> None:
    """A worker's first act: leave Ctrl-C to the one who forked it, and end when that one does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: wait([parent.sentinel]) and os._exit(1), daemon=True).start()


def _answer(message: bytes) -> Any:
    """f(share) of a message; an error that does not survive the way back is told in words."""
    try:
        f, share = pickle.loads(message)
        return f(share)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"in a worker: {error!r}") from None
        raise


def _reduced(value: np.ndarray) -> tuple:
    """How an array is pickled: a shared one by its name, any other one as it is."""
    return (_named, (id(value),)) if id(value) in _shared else value.__reduce_ex__(5)


def _named(name: int) -> np.ndarray:
    """The shared array in this process: a forked one has it under the same name."""
    return _shared[name]


class _Pickler(pickle.Pickler):
    dispatch_table = {**copyreg.dispatch_table, np.ndarray: _reduced}


def _dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(value)
    return stream.getvalue()
