"""Several fake GPUs, and NCCL between them: `cupy.cuda` for arrays of the fake GPU, under mpiexec.

    with gpus_of_the_stand_in(2):       each process sees two

A sum is MPI's, of the NumPy memory that the arrays hold. Refused is what NCCL refuses (two ranks on
a GPU), what makes it hang (ranks that ask for different things), and what would reach memory that
is not meant: pointers to the host or to another GPU's memory, a count or a type that is not the
array's. The end of a communicator waits for the other ranks, as NCCL's may.
"""

import contextlib
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from fakegpu import FakeArray, fakegpu

NAMES = "int8 uint8 int32 uint32 int64 uint64 float16 float32 float64".split()
TYPES = {name: number for number, name in enumerate(NAMES)}
STREAM = 0  # the pointer of CUDA's default stream

memory = weakref.WeakValueDictionary()  # address -> array of which somebody asked for the pointer
devices_of = {}  # address -> the GPU it is on


class NcclError(RuntimeError):
    pass


def need(holds, what):
    if not holds:
        raise NcclError(f"NCCL_ERROR_INVALID_USAGE: {what}")


def data(array):
    """`cupy.ndarray.data` of an array."""
    address = array.held.ctypes.data
    memory[address], devices_of[address] = array.held, array.on
    return SimpleNamespace(ptr=address)


def at(address, count, datatype):
    """The array at an address, whole and of this type."""
    held = memory.get(address)
    need(held is not None, "a pointer to no GPU's memory")
    need(devices_of[address] == fakegpu.device, "a pointer to the memory of another GPU")
    need(held.flags.c_contiguous and held.size == count, f"{count} entries of {held.size}")
    need(TYPES.get(held.dtype.name) == datatype, f"type {datatype} for {held.dtype}")
    return held


def get_unique_id():
    return tuple(int(i) for i in np.random.default_rng().integers(-128, 128, size=128))


class NcclCommunicator:
    def __init__(self, ndev, commId, rank):
        from mpi4py import MPI

        self.MPI, self.device, comm = MPI, fakegpu.device, MPI.COMM_WORLD.Dup()
        machine = MPI.Get_processor_name()
        all_of_them = comm.allgather((ndev, commId, rank, (machine, self.device)))
        sizes, keys, ranks, places = map(list, zip(*all_of_them, strict=True))
        need(type(commId) is tuple and len(commId) == 128, "no unique id")
        need(sizes == [len(ranks)] * len(ranks) and keys == [keys[0]] * len(ranks), "other groups")
        need(sorted(ranks) == list(range(ndev)), f"ranks {ranks}")
        need(len(set(places)) == ndev, f"duplicate GPU: {places}")
        self.comm = comm

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
        need(self.device == fakegpu.device, "the communicator of another GPU")
        source, target = at(sendbuf, count, datatype), at(recvbuf, count, datatype)
        need((op, stream) == (NCCL_SUM, STREAM), f"operation {op} on stream {stream}")
        asked = self.comm.allgather((count, datatype, op))
        need(len(set(asked)) == 1, f"ranks that ask for different things: {asked}")
        fakegpu.operations.append("allReduce")
        in_place = sendbuf == recvbuf
        self.comm.Allreduce(self.MPI.IN_PLACE if in_place else source, target)

    def __del__(self):
        if hasattr(self, "comm") and not self.MPI.Is_finalized():
            self.comm.Barrier()


NCCL_SUM = 0
nccl = SimpleNamespace(
    available=True,
    get_unique_id=get_unique_id,
    NcclCommunicator=NcclCommunicator,
    NCCL_SUM=NCCL_SUM,
    **{f"NCCL_{name.upper()}": number for name, number in TYPES.items()},
)


class Device:
    def __init__(self, device=None):
        self.id = fakegpu.device if device is None else device

    def use(self):
        if not 0 <= self.id < cuda.runtime.getDeviceCount():
            raise RuntimeError(f"cudaErrorInvalidDevice: invalid device ordinal {self.id}")
        fakegpu.device = self.id


cuda = SimpleNamespace(
    Device=Device,
    get_current_stream=lambda device_id=-1: SimpleNamespace(ptr=STREAM),
    runtime=SimpleNamespace(getDeviceCount=lambda: 0),
)  # without nccl, which `import cupy` does not bring either


@contextlib.contextmanager
def gpus_of_the_stand_in(n, *, has_nccl=True):
    """`fakegpu` is the module of so many GPUs of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.runtime, "getDeviceCount", lambda: n)
        patch.setattr(fakegpu, "cuda", cuda, raising=False)
        patch.setattr(fakegpu, "device", 0)
        patch.setattr(FakeArray, "data", property(data), raising=False)
        module = nccl if has_nccl else SimpleNamespace(available=False)
        patch.setitem(sys.modules, "fakegpu.cuda.nccl", module)
        yield
