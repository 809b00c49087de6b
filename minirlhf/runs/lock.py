"""A run folder has one process at work in it. The lock dies with that process, however it dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from weakref import WeakSet

from minirlhf.disk import writing
from minirlhf.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl, msvcrt = None, __import__("msvcrt")

_held: WeakSet[FileIO] = WeakSet()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """In the block nobody else gets into such a block; the file `.lock` says who is in it.

    Raises:   InputError: another process is in it, or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "ab+", buffering=0, opener=_no_link)
    with file:
        _held.add(file)
        _lock(file, folder)
        with suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _lock(file: FileIO, folder: Path) -> None:
    """For as long as the file is open, here or in a process forked from here."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(1 << 30)  # beyond what is read of it
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        pid = file.read(20).decode(errors="replace")
        who = f"process {pid}" if pid.isdecimal() else "another process"
        raise InputError(
            f"{folder}: expected a run that nobody is at work on; {who} is: wait until it has "
            "ended, or end it"
        ) from error
    except OSError:  # a disk without locks
        pass


if hasattr(os, "register_at_fork"):  # a worker that outlives its parent must not keep the folder
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])
