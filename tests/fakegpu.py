"""The fake GPU: an array module that computes with NumPy and refuses what would go wrong on CuPy.

`FakeArray` holds a NumPy array and stands for an array on the device; `fakegpu` is its module, as
`cupy` is of `cupy.ndarray`. Names and keywords are checked against the installed cupy, which
imports without a driver (without cupy that one check is off).

Refused, on purpose more strictly than CuPy does: host arrays and NumPy scalars in any operation,
NumPy's functions on device arrays, implicit copies to the host, lists as arrays or indices,
submodules (`random`, `linalg`). Counted in `fakegpu.sync_count`, and refused inside
`with fakegpu.no_sync():`: whatever makes the host wait for the device. Named in
`fakegpu.operations`: what would be sent to the device. Views and memory that is not filled are no
operations; the copies that CuPy makes of strided operands are some, but nobody sees them here.
An array lies on the device that was current when it was made (`fakegpu.device`; fakenccl.py chooses
another), and is refused while another one is. Pickled it goes by the host, to where it arrives.

Not seen: ids out of range (CuPy wraps them), repeated positions in `a[ids] = v`, the order of
atomics, a GPU's rounding.
"""

import contextlib
import inspect
import re
from types import ModuleType

import numpy as np
import pytest

from minirlhf.backend import get_xp, register_array_module
from minirlhf.nn import attention, layers
from minirlhf.train import batches

try:
    import cupy
except ImportError:
    cupy = None

ATTRIBUTES = "shape dtype ndim size nbytes itemsize strides flags T real imag".split()
WAITS = {"item", "tolist", "tobytes", "nonzero", "flatnonzero", "argwhere", "unique"}
UNFILLED = {"empty", "empty_like"}
ON_DEVICE = {"allclose", "array_equal", "count_nonzero"}  # NumPy answers a Python number, CuPy 0-d
KEYWORDS = {"einsum": {"dtype", "optimize"}}  # cupy.einsum's signature says **kwargs


def operand(x):
    """The values of a device array, or a Python number; nothing else may enter an operation."""
    if isinstance(x, FakeArray):
        if x.on != fakegpu.device:
            raise TypeError(f"an array of GPU {x.on} while GPU {fakegpu.device} is current")
        return x.held
    if isinstance(x, (int, float, complex)) and not isinstance(x, np.generic):
        return x
    raise TypeError(f"expected a device array or a Python number; got {type(x).__name__}")


def unwrap(x):
    """`operand` for everything in a call's arguments: also shapes, dtypes, lists of arrays."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(unwrap, x))
    return operand(x) if isinstance(x, (FakeArray, np.ndarray, np.generic)) else x


def wrap(x):
    """Results live on the device: reductions give 0-d arrays, never NumPy scalars."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(wrap, x))
    return FakeArray(np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x


def unwrap_index(index):
    """Python ints, slices, None, Ellipsis and device arrays; no host arrays, no lists."""
    if isinstance(index, tuple):
        return tuple(map(unwrap_index, index))
    return index if isinstance(index, (slice, type(None), type(...))) else operand(index)


def computed(result, arguments):
    """Is the result new memory, and not a view of an argument's?"""
    held = [a.held for a in arguments if isinstance(a, FakeArray)]
    results = result if isinstance(result, (list, tuple)) else [result]
    return not all(any(np.may_share_memory(r, a) for a in held) for r in results)


def check_call(name, twin, args, kwargs):
    """TypeError if the function `twin` of cupy does not take these arguments."""
    try:
        signature = inspect.signature(twin)
        signature.bind(*args, **kwargs)
        known = KEYWORDS.get(name, kwargs)
    except ValueError:  # compiled: the first line of the docstring is the signature
        known = re.findall(r"(\w+)\s*[=,)]", twin.__doc__.strip().splitlines()[0])
    except TypeError as error:
        raise TypeError(f"cupy's {name}: {error}") from None
    if unknown := kwargs.keys() - set(known):
        raise TypeError(f"cupy's {name} has no keyword {', '.join(unknown)}")


def forward(name, function, twin):
    """NumPy's `function` for device arrays, its calls checked against its `twin` in cupy."""

    def call(*args, **kwargs):
        if cupy:
            check_call(name, twin, args, kwargs)
        if name in WAITS or (name == "where" and len(args) == 1):
            fakegpu.wait(name)
        enter = operand if isinstance(function, np.ufunc) else unwrap
        result = function(*map(enter, args), **{key: unwrap(x) for key, x in kwargs.items()})
        owner = getattr(function, "__self__", None)  # of a method
        mine = [FakeArray(owner)] if isinstance(owner, np.ndarray) else []
        if name not in UNFILLED and computed(result, [*args, *mine]) or "out" in kwargs:
            fakegpu.operations.append(name)
        if kwargs.get("out") is not None:
            return kwargs["out"]
        return wrap(np.asarray(result) if name in ON_DEVICE else result)

    return call


class FakeArray:
    """An array on the fake device. `held` and `on`, its NumPy array and GPU, are not CuPy's."""

    __slots__ = ("__weakref__", "held", "on")
    __hash__ = None
    __array_ufunc__ = None  # NumPy's operators and functions give way: host + device is refused

    def __init__(self, held):
        self.held, self.on = held, fakegpu.device

    def __reduce__(self):
        return arrived, (self.get(),)

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit copy from the device to the host: use .get()")

    def __array_function__(self, function, *args):
        raise TypeError(f"numpy.{function.__name__} on a device array: use xp.{function.__name__}")

    def __getattr__(self, name):
        if name in ATTRIBUTES:
            return wrap(getattr(self.held, name))
        if name.startswith("_") or (cupy and not hasattr(cupy.ndarray, name)):
            raise AttributeError(f"cupy.ndarray has no {name}")
        method = getattr(operand(self), name)
        if not callable(method):
            raise AttributeError(f"the fake GPU does not offer the attribute {name}")
        return forward(name, method, cupy and getattr(cupy.ndarray, name))

    def get(self):
        if self.held.size:  # or there is nothing to wait for
            fakegpu.wait("get")
        return self.held.copy()

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, FakeArray) and part.dtype == bool for part in parts):
            fakegpu.wait("a boolean index, whose result has an unknown length,")
        result = self.held[unwrap_index(index)]
        if not isinstance(result, np.generic) and computed(result, [self]):  # a number is a view
            fakegpu.operations.append("getitem")
        return wrap(result)

    def __setitem__(self, index, value):
        fakegpu.operations.append("setitem")
        self.held[unwrap_index(index)] = operand(value)

    def __imatmul__(self, other):
        raise TypeError("cupy has no @=: use xp.matmul(a, b, out=buffer)")

    def __len__(self):
        return len(self.held)

    def __iter__(self):
        return (self[i] for i in range(len(self)))  # rows, still on the device

    def __repr__(self):
        return f"FakeArray({self.held!r})"  # not counted: pytest shows values of a failed test


def arrived(held):
    """What was pickled, on the device that is current here."""
    return fakegpu.array(held)


BINARY = "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()
OPERATORS = [
    *[prefix + name for prefix in ("", "r", "i") for name in BINARY],
    *"matmul rmatmul eq ne lt le gt ge neg pos abs invert".split(),
]
CONVERSIONS = "bool int float complex str format".split()  # no index: cupy's arrays have none


def operator_method(name):
    def method(self, *others):
        result = getattr(operand(self), name)(*map(operand, others))
        fakegpu.operations.append(name)
        return self if result is self.held else wrap(result)  # self: it worked in place

    return method


def conversion_method(name):
    def method(self, *spec):
        fakegpu.wait(name)
        return getattr(self.held, name)(*spec)

    return method


for _name in OPERATORS:
    setattr(FakeArray, f"__{_name}__", operator_method(f"__{_name}__"))
for _name in CONVERSIONS:
    setattr(FakeArray, f"__{_name}__", conversion_method(f"__{_name}__"))


class FakeModule:
    """The module of FakeArray: NumPy's functions under the names that cupy has too."""

    __name__ = "fakegpu"
    ndarray = FakeArray

    def __init__(self):
        self.sync_count = 0
        self.operations = []  # names, in their order
        self.may_wait = True
        self.device = 0  # the current one

    def wait(self, what):
        """Called wherever a real device would make the host wait."""
        self.sync_count += 1
        if not self.may_wait:
            raise AssertionError(f"{what} waits for the device inside no_sync()")

    @contextlib.contextmanager
    def no_sync(self):
        before, self.may_wait = self.may_wait, False
        try:
            yield
        finally:
            self.may_wait = before

    def array(self, a, dtype=None):
        """The way from host to device, and a copy on the device."""
        self.operations.append("array")
        return FakeArray(np.array(a.held if isinstance(a, FakeArray) else a, dtype))

    def asarray(self, a, dtype=None):
        same = isinstance(a, FakeArray) and dtype in (None, a.dtype)
        return a if same else self.array(a, dtype)

    def __getattr__(self, name):
        value = getattr(np, name)
        if isinstance(value, ModuleType):
            raise AttributeError(f"xp.{name}: not in minirlhf (random numbers come from the host)")
        if cupy and not hasattr(cupy, name):
            raise AttributeError(f"cupy {cupy.__version__} has no {name}")
        if isinstance(value, type) or not callable(value):  # float32, pi, newaxis
            return value
        call = forward(name, value, cupy and getattr(cupy, name))
        if name == "add":  # the one ufunc method that NumPy and CuPy share for our dtypes
            call.at = forward("add.at", np.add.at, cupy and cupy.add.at)
        return call


def in_order(batch, *, size, config):
    """The micro-batches of a GPU: rows as they come."""
    return batches.row_slices(len(batch.mask), size)


@contextlib.contextmanager
def numpy_as_on_a_gpu():
    """NumPy without the short cuts that a GPU cannot take: then not one bit may differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "surely_within", lambda x, limit: False)
        patch.setattr(batches, "MICRO_BATCH_TOKENS", 1 << 60)  # the whole batch at once
        patch.setattr(batches.Batch, "part", batches.Batch.rows)  # with all its columns
        patch.setattr(batches.Batch, "groups", in_order)
        patch.setattr(layers, "scatter_add", lambda table, *add: get_xp(table).add.at(table, *add))
        yield


fakegpu = FakeModule()
register_array_module(FakeArray, fakegpu)
