"""The memory at hand, asked before anything large is made, and kept once it is had."""

import ctypes
import math
import os
from contextlib import suppress
from pathlib import Path

from minirlhf.errors import InputError

CGROUPS = ("memory.max", "memory/memory.limit_in_bytes")  # of version 2, of version 1


def available_memory() -> float:
    """Bytes that the system can give and its cgroup allows; inf where nobody says."""
    found = [math.inf]
    try:
        after = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
        found.append(1024 * int(after.split()[0]))
    except (OSError, IndexError):
        with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in CGROUPS:
        with suppress(OSError, ValueError):  # there is none, or its limit is "max"
            found.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(found)


def require_memory(needs: dict[str, int]) -> None:
    """Refuse options or files whose needs [bytes] exceed the memory; named is what takes most."""
    needed, free = sum(needs.values()), available_memory()
    if needed > free:
        least = min(free, max(needs.values()) - 1)
        names = ", ".join(name for name, size in needs.items() if size > least)
        raise InputError(
            f"{names}: expected sizes that fit into the memory at hand, "
            f"{free / 2**30:.1f} GiB; got at least {needed / 2**30:.4g} GiB: choose smaller ones"
        )


def keep_freed_memory() -> None:
    """Let the C allocator keep freed blocks instead of giving them back to the system.

    Arrays over 128 KiB are otherwise mapped and zeroed anew each time, which costs plain NumPy code
    a third of its time. Called once at program start; where there is no glibc it does nothing.
    """
    with suppress(AttributeError, OSError, TypeError):  # macOS, musl, Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD of malloc.h
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
