"""Where a program of the benchmark computes: MINIRLHF_BENCH_DEVICE is cpu, cuda or stand-in.

The stand-in is tests/fakegpu.py with the kernels on it, and PyTorch on the CPU: it shows that the
programs run, and no time.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from minirlhf import backend

DEVICE = os.environ.get("MINIRLHF_BENCH_DEVICE", "cpu")
OURS = "cpu" if DEVICE == "cpu" else "cuda"  # as minirlhf is told it
TORCHS = "cuda" if DEVICE == "cuda" else "cpu"
_for_good = []


def arrange() -> None:
    """Where the stand-in is asked for, let it be minirlhf's "cuda" from now on."""
    if DEVICE != "stand-in" or _for_good:
        return
    sys.path.append(str(Path(__file__).parent.parent))
    from cpu_kernels import kernels_on_the_fake_gpu
    from fakegpu import fakegpu

    array_module = backend.array_module
    backend.array_module = lambda name: fakegpu if name == "cuda" else array_module(name)
    _for_good.append(kernels_on_the_fake_gpu())
    _for_good[0].__enter__()


def wait() -> None:
    """Until minirlhf's device has done all that it was sent."""
    if DEVICE == "cuda":
        backend.array_module(OURS).cuda.runtime.deviceSynchronize()


def held() -> int:
    """Most bytes of the device that minirlhf has taken, freed ones that its pool keeps included."""
    return backend.array_module(OURS).get_default_memory_pool().total_bytes()


def launched(f: Callable[[], object]) -> int | None:
    """Kernels that f sends to the GPU, as NVIDIA's profiler counts them; None: it cannot be asked.

    PyTorch brings the profiler along, which sees all kernels of the process, CuPy's too.
    """
    if DEVICE == "stand-in":
        from fakegpu import fakegpu

        before = len(fakegpu.operations)
        f()
        return len(fakegpu.operations) - before
    try:
        from torch import profiler
    except ImportError:
        return None
    import torch

    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as seen:
        f()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)
