"""CUDA kernels on a CPU: what `cupy.RawModule` is to CuPy, for arrays of the fake GPU.

The source is compiled by g++ below cuda_on_cpu.h, which gives CUDA's words their meaning. Arrays
stand between two stretches of nan, which a kernel may neither read nor write.
"""

import contextlib
import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakegpu import FakeArray, fakegpu

from minirlhf import kernels

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
SOURCE = Path(kernels.__file__).with_suffix(".cu")
GUARD = 64  # entries of nan before and behind an array
C_TYPES = {"long long": ctypes.c_longlong, "double": ctypes.c_double, "int": ctypes.c_int}
SCALARS = {"long long": np.int64, "double": np.float64, "int": np.int32}
HAS_COMPILER = shutil.which("g++") is not None


def parameters(source):
    """{kernel: [(type, name), ...]} as its source has them."""
    return {
        name: [tuple(" ".join(part.split()).rsplit(" ", 1)) for part in text.split(",")]
        for name, text in kernels.SIGNATURE.findall(source)
    }


def wrappers(source):
    """C functions that launch the kernels: launch_foo(n_blocks, n_threads, arguments of foo)."""
    for name, arguments in parameters(source).items():
        declared = ", ".join(f"{kind} {word}" for kind, word in arguments)
        given = ", ".join(word for _, word in arguments)
        yield (
            f'extern "C" const char* launch_{name}(long long blocks, long long size, {declared}) '
            f"{{ return cpu::launch(blocks, size, [=] {{ {name}({given}); }}); }}"
        )


@functools.cache
def library(source, options):
    """The shared library of a source. Raises RuntimeError with what the compiler said."""
    text = "\n".join([HEADER.read_text(), source, *wrappers(source)])
    key = hashlib.sha256(repr((text, options)).encode()).hexdigest()[:16]
    folder = Path(tempfile.mkdtemp(prefix="minirlhf-kernels-"))
    path = folder / f"{key}.cpp"
    path.write_text(text)
    flags = "-std=c++20 -O1 -U_FORTIFY_SOURCE -shared -fPIC".split()
    command = ["g++", *flags, *options, str(path), "-o", str(path) + ".so"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"g++: {run.stderr}")
    loaded = ctypes.CDLL(str(path) + ".so")
    shutil.rmtree(folder)  # loaded is loaded
    return loaded


class Guarded:
    """A copy of an array between guards of nan; `put_back` after the launch.

    Each array of a launch has a nan of its own, its number's, so that one copied from the guard of
    another is seen.
    """

    def __init__(self, array, number):
        self.array, n, self.may_change = array, array.size, False
        self.memory = np.empty(n + 2 * GUARD, dtype=array.dtype)
        bytes_ = self.bytes()
        bytes_[:], bytes_[:, 0] = 255, number  # every bit of the exponent is set
        self.inside = slice(GUARD, GUARD + n)
        self.memory[self.inside] = array.ravel()
        self.guards = self.outside()

    def bytes(self):
        return self.memory.view(np.uint8).reshape(len(self.memory), -1)

    def outside(self):
        return np.r_[self.bytes()[:GUARD], self.bytes()[-GUARD:]]

    @property
    def address(self):
        return self.memory.ctypes.data + GUARD * self.memory.itemsize

    def put_back(self, name):
        if (self.outside() != self.guards).any():
            raise AssertionError(f"{name}: wrote beyond the ends of an array")
        held = self.memory[self.inside].reshape(self.array.shape)
        if not self.may_change and held.tobytes() != self.array.tobytes():
            raise AssertionError(f"{name}: wrote to an array that is const")
        if self.may_change:
            self.array[...] = held


def weakly(x):
    """x when it is asked for; an array that nobody holds any longer is none."""
    return weakref.ref(x) if type(x) is FakeArray else lambda: x


class CpuModule:
    """As `cupy.RawModule`: the kernels of a source by name."""

    edit = staticmethod(lambda source: source)  # what a test plants
    launched = []  # names, in the order of the launches

    def __init__(self, *, code, options=()):
        self.source, self.options = self.edit(code), options
        self.parameters = parameters(self.source)

    def compile(self):
        self.library = library(self.source, self.options)

    def get_function(self, name):
        types = [kind for kind, _ in self.parameters[name]]
        function = getattr(self.library, f"launch_{name}")
        pointers = [C_TYPES.get(kind, ctypes.c_void_p) for kind in types]
        function.argtypes = [ctypes.c_longlong, ctypes.c_longlong, *pointers]
        function.restype = ctypes.c_char_p
        real = {"-Dreal=float": np.float32, "-Dreal=double": np.float64}[self.options[0]]
        entries = {"real*": real, "double*": np.float64, "long long*": np.int64, "bool*": np.bool_}

        def launch(grid, block, arguments):
            if CpuStream.captured is not None:
                held = [weakly(x) for x in arguments]
                CpuStream.captured.append(lambda: run(grid, block, [x() for x in held]))
                return
            fakegpu.operations.append(name)
            run(grid, block, arguments)

        def run(grid, block, arguments):
            self.launched.append(name)
            (blocks,), (threads,), guarded, passed = grid, block, {}, []
            for i, (x, kind) in enumerate(zip(arguments, types, strict=True)):
                what = f"{name}: argument {i}, {kind}"
                if kind in SCALARS:
                    assert type(x) is SCALARS[kind], what
                    passed.append(x)
                    continue
                if type(x) is np.uintp and x == 0:  # as a null pointer
                    passed.append(0)
                    continue
                assert type(x) is FakeArray and x.held.flags.c_contiguous, what
                assert x.dtype == entries[kind.removeprefix("const ")], what
                copy = guarded.setdefault(x.held.ctypes.data, Guarded(x.held, i))
                copy.may_change |= not kind.startswith("const ")
                passed.append(copy.address)
            error = function(blocks, threads, *passed)
            assert error is None, f"{name}: {error.decode()}"
            for copy in guarded.values():
                copy.put_back(name)

        return launch


class CpuStream:
    """As `cupy.cuda.Stream`: what is sent to it is done at once, or kept for a graph.

    Stricter than CUDA in a capture: kernels and memory that is not filled, nothing else.
    """

    now = None  # the one that is entered
    captured = None  # launches, while one is capturing

    def __init__(self, null=False, non_blocking=False, ptds=False):
        self.non_blocking = non_blocking

    def __enter__(self):
        assert CpuStream.now is None
        CpuStream.now = self
        return self

    def __exit__(self, *error):
        CpuStream.now = None

    def begin_capture(self, mode=None):
        assert self.non_blocking and CpuStream.now is self, "CUDA cannot capture the null stream"
        CpuStream.captured, self.sent = [], len(fakegpu.operations)

    def end_capture(self):
        launches, CpuStream.captured = CpuStream.captured, None
        sent = fakegpu.operations[self.sent :]
        assert not sent, f"in a graph: {sent}"
        return CpuGraph(launches)


class CudaError(RuntimeError):
    """As `cupy.cuda.runtime.CUDARuntimeError`."""


class CpuGraph:
    """As `cupy.cuda.Graph`. It does not keep the arrays: who lets go of them is found out."""

    def __init__(self, launches):
        self.nodes = launches

    def launch(self, stream=None):
        fakegpu.operations.append("graph")
        for node in self.nodes:
            node()


def empty(shape, dtype):
    """Memory that nobody has written to: nan, or -1."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 255
    return FakeArray(array)


CUDA = SimpleNamespace(
    Stream=CpuStream,
    runtime=SimpleNamespace(CUDARuntimeError=CudaError, getDevice=lambda: fakegpu.device),
    driver=SimpleNamespace(CUDADriverError=CudaError),
)


@contextlib.contextmanager
def kernels_on_the_fake_gpu(edit=lambda source: source):
    """`fakegpu` has a RawModule, so minirlhf launches kernels on it: those of edit(kernels.cu)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakegpu, "RawModule", CpuModule, raising=False)
        patch.setattr(fakegpu, "empty", empty, raising=False)
        patch.setattr(fakegpu, "cuda", CUDA, raising=False)
        patch.setattr(CpuModule, "edit", staticmethod(edit))
        patch.setattr(CpuModule, "launched", [])
        kernels.compiled.cache_clear()
        try:
            yield CpuModule
        finally:
            kernels.compiled.cache_clear()
