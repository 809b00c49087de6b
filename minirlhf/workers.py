"""Rows of a batch side by side: in threads, since NumPy computes without the interpreter's lock.

    with side_by_side(2):
        for result in map_rows(f, slices): ...      f(rows) for each slice, two at a time, in order

Who computes what changes no number: the slices are given, and the results come in their order. The
BLAS must be told to use one thread a worker (threadpoolctl), or the workers wait for each other.
"""

import contextlib
import contextvars
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

_pool: ThreadPoolExecutor | None = None
_n_workers = 1
_thread = threading.local()  # .is_worker: a worker does not wait for workers


@contextlib.contextmanager
def side_by_side(n_workers: int) -> Iterator[None]:
    """Within the block `map_rows` uses n_workers threads; 0: one for each core we may use."""
    global _pool, _n_workers
    before = _pool, _n_workers
    n_workers = n_workers or usable_cores()
    with ThreadPoolExecutor(n_workers, initializer=_become_a_worker) as pool:
        _pool, _n_workers = (pool, n_workers) if n_workers > 1 else (None, 1)
        try:
            yield
        finally:
            _pool, _n_workers = before


def n_workers() -> int:
    """How many slices are worked on at a time here."""
    return 1 if getattr(_thread, "is_worker", False) else _n_workers


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_rows(f: Callable[[slice], Result], slices: list[slice]) -> Iterator[Result]:
    """f(rows) for each slice, in order. No more results wait to be fetched than there are workers.

    Raises:
        whatever f raises.
    """
    if n_workers() == 1 or len(slices) < 2:
        yield from map(f, slices)
        return
    pool, ahead = _pool, _n_workers
    waiting = deque()
    for rows in slices:
        waiting.append(pool.submit(contextvars.copy_context().run, f, rows))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _become_a_worker() -> None:
    _thread.is_worker = True
