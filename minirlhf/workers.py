"""Parts of a batch side by side: what the loops call. Who does the work stands in crew.py.

    total = sum_over(f, parts)      f(part) + f(part) + ..., trees of arrays
    results = map_over(f, parts)    [f(part), f(part), ...]

Without a crew all parts are worked on here, one after the other. Arrays from `share` are not copied
into messages to a crew of processes: all see one memory, in which `over_pieces` lets an optimiser
write side by side.
"""

import functools
import mmap
import sys
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from minirlhf.backend import Array, get_xp
from minirlhf.tree import Tree, tree_leaves, tree_pack, tree_sum, tree_unpack

Part, Result = TypeVar("Part"), TypeVar("Result")
CAN_FORK = sys.platform == "linux"
PIECE = 1 << 15  # parameters that a core's cache holds, with gradient and moments

_n = 1  # how many work side by side here, this process among them
_new_crew: Callable[[int], Any] | None = None  # n others, with map and shutdown of an Executor
_crew: Any = None  # the n - 1 others, once there was work
ranks: Any = None  # processes of mpiexec that share the parts: see ranks.py
shared = weakref.WeakValueDictionary()  # id -> array in memory that forked processes see


def engage(n: int, new_crew: Callable[[int], Any] | None) -> None:
    """Let n work from here on: this process, and n - 1 others of `new_crew`."""
    global _n, _new_crew
    dismiss()
    _n, _new_crew = n, new_crew


def dismiss(*, forget: bool = False) -> None:
    """Let the others go; the next use makes new ones. Forget: they belong to another process."""
    global _crew
    if _crew is not None and not forget:
        _crew.shutdown()
    _crew = None


def engaged() -> tuple[int, Callable[[int], Any] | None]:
    """What `engage` was told last."""
    return _n, _new_crew


def n_workers() -> int:
    """How many parts are worked on at a time."""
    return _n * (1 if ranks is None else ranks.size)


def map_over(f: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
    """[f(part) for each part], in order.

    Raises:   whatever f raises.
    """
    return (_map if ranks is None else ranks.map_over)(f, parts)


def sum_over(f: Callable[[Part], Tree], parts: list[Part]) -> Tree:
    """Sum of f(part), trees of arrays and numbers: each worker adds up its own, then all are added.

    Args:     f: returns new memory each time; the sum is made in it.
    Raises:   ValueError: there is no part.
              whatever f raises.
    """
    if not parts:
        raise ValueError("sum_over: expected at least one part; got none")
    if ranks is not None:
        return ranks.sum_over(f, parts)
    return tree_sum(_run(tree_sum, f, parts))


def over_pieces(f: Callable[..., Result], *arrays: Array) -> list[Result]:
    """[f(a piece of each array), ..] of arrays (N,), in order. f may write into the pieces.

    A piece stays in the cache for all that is done to it; a GPU takes the arrays as they are. The
    workers share the pieces if they see the arrays; ranks do not.
    """
    size = PIECE if get_xp(*arrays) is np else len(arrays[0])
    pieces = [slice(start, start + size) for start in range(0, len(arrays[0]), size)]
    all_see_them = all(id(array) in shared for array in arrays)
    return list((_map if all_see_them else map)(functools.partial(_on_piece, f, arrays), pieces))


def _on_piece(f: Callable, arrays: tuple, piece: slice) -> Any:
    return f(*(array[piece] for array in arrays))


def _map(f: Callable, parts: list) -> list:
    done = _run(list, f, parts)
    return [done[i % len(done)][i // len(done)] for i in range(len(parts))]


def _run(collect: Callable, f: Callable, parts: list) -> list:
    """[collect(f(part), ..) of each share]: the first is worked on here, the others by the crew."""
    global _crew
    n, work = min(_n, len(parts)), functools.partial(_work, collect, f)
    if n < 2:
        return [work(parts)]
    _crew = _crew or _new_crew(_n - 1)
    try:
        lend = {"lend": True} if collect is tree_sum and CAN_FORK else {}  # what is summed is read
        answers = _crew.map(work, [parts[k::n] for k in range(1, n)], **lend)
        return [work(parts[::n]), *answers]
    except BaseException:
        dismiss()  # answers may be under way that nobody will fetch
        raise


def _work(collect: Callable, f: Callable, share: list) -> Any:
    return collect(map(f, share))


def share(array: np.ndarray) -> np.ndarray:
    """A copy that all workers see; nobody writes where another does. On a GPU a plain copy."""
    if not CAN_FORK or get_xp(array) is not np:
        return array.copy()
    dismiss()  # who was forked before does not see it: the next use forks anew
    memory = mmap.mmap(-1, max(array.nbytes, 1))  # anonymous and shared: children inherit it
    block = np.ndarray(array.shape, array.dtype, memory)
    block[...] = array
    shared[id(block)] = block
    return block


def share_packed(tree: Tree) -> tuple[Array, Tree]:
    """`tree_pack` in memory that all workers see: one flat buffer, and the tree as views of it."""
    flat = share(tree_pack(tree)[0])
    views = tree_unpack(flat, tree)
    if id(flat) in shared:
        shared.update((id(leaf), leaf) for leaf in tree_leaves(views))
    return flat, views
