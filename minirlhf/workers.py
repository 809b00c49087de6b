"""Parts of a batch side by side, on several cores.

    with side_by_side(2):
        total = sum_over(f, parts)      f(part) + f(part) + ..., trees of arrays
        results = map_over(f, parts)    [f(part), f(part), ...]

Many small NumPy calls in threads wait for the interpreter's lock more than they compute, so the
workers are processes, forked when the block begins. A message carries the function (by its name, or
a functools.partial of it) and its parts. Arrays from `share` are not copied into messages: all
processes see one memory, and what an optimiser writes there all of them see. Where forking is not
safe, anywhere but on Linux, the workers are threads.

Tell the BLAS to use one thread (threadpoolctl), or the workers wait for each other.
"""

import contextlib
import functools
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback
from typing import Any, TypeVar

import numpy as np

from minirlhf.backend import get_xp
from minirlhf.errors import InputError
from minirlhf.tree import Tree, tree_pack, tree_sum, tree_unpack

Part, Result = TypeVar("Part"), TypeVar("Result")
CAN_FORK = sys.platform == "linux"


# -- what callers use ----------------------------------------------------------------------------


@contextlib.contextmanager
def side_by_side(n_workers: int) -> Iterator[None]:
    """Within the block `sum_over` and `map_over` use n_workers; 0: one for each core we may use.

    For NumPy arrays only. Begin it before other threads start. A process that multiprocessing runs
    as a daemon may not have children, and works alone.
    """
    global _crew
    alone = multiprocessing.current_process().daemon
    before, _crew = _crew, Crew(1 if alone else n_workers or usable_cores())
    try:
        yield
    finally:
        _crew.dismiss()
        _crew = before


def n_workers() -> int:
    """How many parts are worked on at a time here."""
    return _crew.n


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_over(f: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
    """[f(part) for each part], in order. Part k is done by worker k mod n.

    Raises:
        whatever f raises.
    """
    n = min(_crew.n, len(parts)) or 1
    done = _crew.run(functools.partial(_map, f), [parts[k::n] for k in range(n)])
    return [done[i % n][i // n] for i in range(len(parts))]


def sum_over(f: Callable[[Part], Tree], parts: list[Part]) -> Tree:
    """Sum of f(part), trees of arrays and numbers: each worker adds up its own, then all are added.

    Args:
        f: returns new memory each time; the sum is made in it.
    Raises:
        ValueError: there is no part.
        whatever f raises.
    """
    if not parts:
        raise ValueError("sum_over: expected at least one part; got none")
    n = min(_crew.n, len(parts))
    return tree_sum(_crew.run(functools.partial(_sum, f), [parts[k::n] for k in range(n)]))


def share(array: np.ndarray) -> np.ndarray:
    """A copy that all workers see, also those that were forked before; written to by one only.

    An array on a GPU is copied there: nobody shares it.
    """
    if not CAN_FORK or get_xp(array) is not np:
        return array.copy()
    fd = os.memfd_create("minirlhf")
    os.truncate(fd, max(array.nbytes, 1))
    memory = mmap.mmap(fd, 0)
    _names[id(memory)] = (fd, next(_serial))
    weakref.finalize(memory, _forget, id(memory), fd)
    block = np.ndarray(array.shape, array.dtype, memory)
    block[...] = array
    return block


def share_tree(tree: Tree) -> Tree:
    """`share` for all leaves at once."""
    return tree_unpack(share(tree_pack(tree)[0]), tree)


# -- the crew ------------------------------------------------------------------------------------


class Crew:
    """This process and n - 1 more (or threads) that wait for messages."""

    def __init__(self, n: int):
        self.n = n
        self._threads = None if CAN_FORK or n == 1 else ThreadPoolExecutor(n - 1)
        self._workers: list[tuple[multiprocessing.Process, Connection]] = []
        for _ in range(n - 1 if CAN_FORK else 0):
            ours, theirs = multiprocessing.Pipe()
            inherited = [ours, *(pipe for _, pipe in self._workers)]
            process = multiprocessing.get_context("fork").Process(
                target=_serve, args=(theirs, inherited), daemon=True
            )
            with warnings.catch_warnings():
                # Python 3.12 warns of threads beside a fork; the BLAS's are idle and not used there
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, f: Callable[[list[Part]], Result], shares: list[list[Part]]) -> list[Result]:
        """[f(share), ...]: at most n shares, the first of them done here."""
        if self._threads:
            waiting = [self._threads.submit(_answer, f, part) for part in shares[1:]]
            return _unless_one_failed([_answer(f, shares[0]), *(w.result() for w in waiting)])
        pipes = [pipe for _, pipe in self._workers[: len(shares) - 1]]
        try:
            for pipe, part in zip(pipes, shares[1:], strict=True):
                _send(pipe, _dumps((f, part), _ByReference))
            results = [_answer(f, shares[0])]
            results += [_loads(_receive(pipe)) for pipe in pipes]
        except BaseException as error:
            self.dismiss()  # answers may be under way that nobody will fetch
            if isinstance(error, EOFError | ConnectionError):
                raise InputError(
                    "workers: expected an answer; a worker process has ended, perhaps for want of "
                    "memory: use fewer --workers, or a smaller --ppo.micro-batch-size"
                ) from error
            raise
        return _unless_one_failed(results)

    def dismiss(self) -> None:
        """Let all go. A crew that was dismissed works alone."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        if self._threads:
            self._threads.shutdown()
        self.n, self._threads, self._workers = 1, None, []


def _serve(pipe: Connection, inherited: list[Connection]) -> None:
    """A worker's life: one message after the other, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked decides
    for other in inherited:
        other.close()  # or the end of the one who forked us would go unnoticed
    while True:
        try:
            _serve_once(pipe)
        except (EOFError, OSError):
            return


def _serve_once(pipe: Connection) -> None:
    """One message, and its answer, or the error: of reading it, of f, or of the answer."""
    message = _receive(pipe)
    try:
        f, part = _loads(message)
        answer = _dumps(f(part))
    except Exception as error:
        try:
            answer = _dumps(ExceptionWithTraceback(error, error.__traceback__))
            _loads(answer)
        except Exception:  # an error that does not survive the way
            answer = _dumps(RuntimeError(f"in a worker: {error!r}"))
    _send(pipe, answer)


def _answer(f: Callable[[Part], Result], part: Part) -> Result | Exception:
    try:
        return f(part)
    except Exception as error:
        return error


def _unless_one_failed(results: list[Result | Exception]) -> list[Result]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _map(f: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
    return [f(part) for part in parts]


def _sum(f: Callable[[Part], Tree], parts: list[Part]) -> Tree:
    return tree_sum(map(f, parts))


_crew = Crew(1)


def _work_alone() -> None:
    """In a forked process: the pipes belong to the one who forked it."""
    global _crew
    _crew = Crew(1)


if CAN_FORK:
    os.register_at_fork(after_in_child=_work_alone)


# -- messages ------------------------------------------------------------------------------------


_names: dict[int, tuple[int, int]] = {}  # id of the memory -> file, serial number
_serial = itertools.count()  # a file's number is given again after it was closed; this is not


def _forget(memory_id: int, fd: int) -> None:
    del _names[memory_id]
    os.close(fd)


@functools.lru_cache(maxsize=4)  # that a worker keeps in reach, freed ones until pushed out
def _attach(pid: int, fd: int, serial: int) -> mmap.mmap:
    with open(f"/proc/{pid}/fd/{fd}", "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _attached(
    pid: int, fd: int, serial: int, offset: int, shape: tuple, dtype: str, strides: tuple
) -> np.ndarray:
    return np.ndarray(shape, dtype, _attach(pid, fd, serial), offset, strides)


class _ByReference(pickle.Pickler):
    """Arrays in shared memory go by reference: whose memory, and where in it."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not np.ndarray:
            return NotImplemented
        block = value
        while isinstance(block.base, np.ndarray):
            block = block.base
        name = _names.get(id(block.base))
        if name is None:
            return NotImplemented
        offset = value.ctypes.data - block.ctypes.data
        return _attached, (os.getpid(), *name, offset, value.shape, value.dtype.str, value.strides)


Message = tuple[bytes, list]  # a pickle, and the memory of its large arrays
LARGE = 1 << 16  # bytes from which an array's memory is sent as it is, without a copy


def _dumps(value: Any, pickler: type[pickle.Pickler] = pickle.Pickler) -> Message:
    stream, beside = io.BytesIO(), []

    def is_small(buffer: pickle.PickleBuffer) -> bool:
        memory = buffer.raw()
        if memory.nbytes >= LARGE:
            beside.append(memory)
        return memory.nbytes < LARGE

    pickler(stream, protocol=5, buffer_callback=is_small).dump(value)
    return stream.getvalue(), beside


def _loads(message: Message) -> Any:
    pickled, beside = message
    return pickle.loads(pickled, buffers=beside)


def _send(pipe: Connection, message: Message) -> None:
    pickled, beside = message
    pipe.send_bytes(pickle.dumps((pickled, [memory.nbytes for memory in beside])))
    for memory in beside:
        pipe.send_bytes(memory)


def _receive(pipe: Connection) -> Message:
    pickled, sizes = pickle.loads(pipe.recv_bytes())
    beside = [np.empty(size, np.uint8) for size in sizes]
    for memory in beside:
        pipe.recv_bytes_into(memory)
    return pickled, beside
