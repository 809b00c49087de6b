"""Which array library holds the numbers: NumPy in main memory, CuPy on a GPU.

Every function of `nn/` and `rlhf/` begins with `xp = get_xp(...)`, so the arrays themselves choose
where the work is done. No other file imports cupy (ranks.py its NCCL).
"""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from minirlhf.errors import InputError

Array = Any  # numpy.ndarray or cupy.ndarray: the same code serves both

_MODULE_OF: dict[type, ModuleType] = {np.ndarray: np}  # array type -> the module that works on it


def register_array_module(array_type: type, module: ModuleType) -> None:
    """Let `get_xp` answer `module` for arrays of exactly the type `array_type`."""
    _MODULE_OF[array_type] = module


def get_xp(*arrays: Array) -> ModuleType:
    """The array module that all `arrays` belong to.

    Strict, because a silent conversion copies between devices or changes the dtype: lists, Python
    and NumPy scalars, ndarray subclasses and mixtures of libraries are refused.

    Raises:   TypeError: an argument is no array, or two arguments belong to different libraries.
    """
    xp = _MODULE_OF.get(type(arrays[0])) or _adopt(arrays[0])
    for array in arrays[1:]:
        other = _MODULE_OF.get(type(array)) or _adopt(array)
        if other is not xp:
            raise TypeError(
                f"expected arrays of one library; got {xp.__name__} and {other.__name__}: "
                "move them to one device with minirlhf.backend.to_device or to_host"
            )
    return xp


def check_same_shape(where: str, **arrays: Array) -> None:
    """Refuse arrays that differ in shape: broadcasting would turn them into a wrong number.

    Raises:   ValueError: they differ; the message begins with `where`.
    """
    shapes = [array.shape for array in arrays.values()]
    if any(shape != shapes[0] for shape in shapes):
        names, got = ", ".join(arrays), ", ".join(map(str, shapes))
        raise ValueError(f"{where}: expected {names} of one shape; got {got}")


def as_float(array: Array) -> Array:
    """The array in a dtype to compute in: booleans, integers and float16 are widened, others pass.

    Booleans, float16 and integers of up to 16 bits become float32, longer integers float64. Left as
    they are, integers would cut a mean or a scale to a whole number without a word.

    Raises:   TypeError: the array holds no numbers.
    """
    dtype = array.dtype
    if dtype.char in "fdFD":  # float32, float64 and their complex kin: as they are, not a copy
        return array
    if dtype.kind not in "biufc":
        raise TypeError(f"expected an array of numbers; got one of dtype {dtype}")
    return array.astype(np.result_type(dtype, np.float32))


def check_positive(where: str, name: str, number: float) -> None:
    """Refuse a number that is not positive, or that float32 would turn into 0 or inf.

    Raises:   ValueError: it is; the message begins with `where` and the number's name.
    """
    if not 2.0**-126 <= number <= 2.0**126:
        raise ValueError(
            f"{where}: expected {name} > 0, neither 0 nor inf in float32; got {number}"
        )


def check_ids(where: str, ids: Array, size: int) -> None:
    """Refuse ids that are no integers, or outside [0, size): NumPy takes -1 for the last row.

    The range is looked at in main memory only; a GPU is not waited for.

    Raises:   ValueError: an id is wrong; the message begins with `where`.
    """
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{where}: expected integers; got {ids.dtype}")
    if get_xp(ids) is np and ids.size and not (ids.min() >= 0 and ids.max() < size):
        raise ValueError(f"{where}: expected ids in [0, {size}); got {ids.min()} to {ids.max()}")


def _adopt(array: Array) -> ModuleType:
    """Register cupy when the first of its arrays appears; refuse anything else."""
    cupy = sys.modules.get("cupy")
    if type(array) is getattr(cupy, "ndarray", None):
        register_array_module(cupy.ndarray, cupy)
        return cupy
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    raise TypeError(f"expected a numpy or cupy array; got {kind}: make it one with xp.asarray")


def fused(plain: Callable) -> Callable:
    """Mark a function that kernels.py does in fewer operations on a GPU; NumPy takes its lines."""

    @functools.wraps(plain)
    def either(first, *rest, **constants):
        array = first
        while isinstance(array, dict | list):  # parameters: any of their arrays
            array = next(iter(array if isinstance(array, list) else array.values()))
        if type(array) is np.ndarray:
            return plain(first, *rest, **constants)
        launch = importlib.import_module("minirlhf.kernels").launch
        return launch(plain, array, first, *rest, **constants)

    return either


def surely_within(x: Array, limit: float) -> bool:
    """Is every |x| < limit?  A GPU is not waited for: there the answer is always no."""
    return get_xp(x) is np and (x.size == 0 or bool(-limit < x.min() and x.max() < limit))


def scatter_add(table: Array, ids: Array, rows: Array) -> None:
    """table[ids[n]] += rows[n] for every n, in place; an id may occur any number of times.

    NumPy sorts the rows by id and sums the runs: equal to add.at up to rounding, and faster. On a
    GPU the rows are added side by side, atomically.

    Args:     table: (N, C).
              ids: (M,) integers in [0, N).
              rows: (M, C).
    """
    xp = get_xp(table, ids, rows)
    if xp is not np:
        xp.add.at(table, ids, rows)
    elif len(ids):
        order = ids.argsort(kind="stable")
        sorted_ids = ids[order]
        starts = np.flatnonzero(np.diff(sorted_ids, prepend=-1))  # of the runs of equal ids
        table[sorted_ids[starts]] += np.add.reduceat(rows[order], starts, axis=0)


def array_module(device: str) -> ModuleType:
    """The array module of a device: numpy for "cpu", cupy for "cuda".

    Raises:   InputError: the device has another name, cupy is not installed, or there is no GPU.
    """
    if device == "cpu":
        return np
    if device != "cuda":
        raise InputError(f"--device: expected cpu or cuda; got {device!r}")
    if not cuda_is_available():
        raise InputError(
            "--device cuda: expected cupy and a working NVIDIA GPU; found none: install "
            "minirlhf[cuda12] or minirlhf[cuda13] on a machine with a GPU, or use --device cpu"
        )
    import cupy

    return cupy


def cuda_is_available() -> bool:
    """Is cupy installed, and does it see a GPU? Without a driver cupy 13 raises, 14 says no."""
    try:
        import cupy

        return bool(cupy.is_available())
    except (ImportError, RuntimeError):
        return False


def to_device(array: Array, device: str) -> Array:
    """A copy of `array` on `device` ("cpu" or "cuda"). A whole tree: tree_map(to_device, ...)."""
    return array_module(device).array(to_host(array))


def to_host(array: Array) -> np.ndarray:
    """The values as a NumPy array; a NumPy array is passed through."""
    return array if isinstance(array, np.ndarray) else array.get()
