"""The stand-in's NCCL is called as CuPy's is. What it adds up and refuses: runs/on_ranks.py."""

import importlib
import inspect
import re
import warnings

import fakegpu as fakegpu_file
import fakenccl
import pytest
from fakegpu import fakegpu
from fakenccl import gpus_of_the_stand_in

cupy = fakegpu_file.cupy
pytestmark = pytest.mark.skipif(cupy is None, reason="cupy is not installed")


def arguments(compiled):
    """Names, by the first line of its docstring: name(self, int first, second=1) -> int."""
    first = compiled.__doc__.strip().splitlines()[0]
    found = re.search(r"\((.*)\)", first)[1].split(", ")
    names = (part.split("=")[0].split()[-1] for part in found if part)
    return [name for name in names if name != "self"]


def same_arguments(ours, compiled):
    return [x for x in inspect.signature(ours).parameters if x != "self"] == arguments(compiled)


def test_devices_and_streams_are_those_of_cupy():
    ours, theirs = fakenccl.cuda, cupy.cuda
    assert same_arguments(ours.Device, theirs.Device)
    assert same_arguments(ours.Device.use, theirs.Device.use)
    assert same_arguments(ours.runtime.getDeviceCount, theirs.runtime.getDeviceCount)
    assert same_arguments(ours.get_current_stream, theirs.get_current_stream)
    assert hasattr(theirs.Stream.null, "ptr") and hasattr(theirs.MemoryPointer, "ptr")
    assert theirs.Stream.null.ptr == fakenccl.STREAM
    assert hasattr(cupy.ndarray, "data") and hasattr(cupy.ndarray, "__reduce__")
    assert not same_arguments(lambda device: None, theirs.get_current_stream)  # it can fail


def test_nccl_has_to_be_imported():
    """`import cupy` brings none: so is the stand-in."""
    with gpus_of_the_stand_in(2):
        assert not hasattr(fakegpu.cuda, "nccl")
        assert importlib.import_module("fakegpu.cuda.nccl") is fakenccl.nccl
        assert fakegpu.cuda.runtime.getDeviceCount() == 2
        with pytest.raises(RuntimeError, match="invalid device ordinal 2"):
            fakegpu.cuda.Device(2).use()
    assert not hasattr(fakegpu, "cuda")


def test_calls_of_nccl_are_those_of_cupy():
    with warnings.catch_warnings(action="ignore"):
        theirs = importlib.import_module("cupy.cuda.nccl")
    if not theirs.available:
        pytest.skip("cupy finds no libnccl: pip install nvidia-nccl-cu12")
    ours = fakenccl.nccl
    assert same_arguments(ours.NcclCommunicator, theirs.NcclCommunicator)
    assert same_arguments(ours.NcclCommunicator.allReduce, theirs.NcclCommunicator.allReduce)
    key = theirs.get_unique_id()  # needs no GPU
    assert type(key) is type(ours.get_unique_id()) and len(key) == len(ours.get_unique_id())
    numbers = {name: value for name, value in vars(ours).items() if name.startswith("NCCL_")}
    assert numbers and {name: getattr(theirs, name) for name in numbers} == numbers
