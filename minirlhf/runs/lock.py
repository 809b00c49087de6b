"""A run folder has one process at work in it. The lock dies with that process, however it dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minirlhf.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl, msvcrt = None, __import__("msvcrt")

_held: set[int] = set()  # open files


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """In the block nobody else gets into such a block; the file `.lock` says who is in it.

    Raises:   InputError: another process is in it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.open(folder / ".lock", flags, 0o666)
    except OSError as error:
        raise InputError(
            f"{folder}: expected a run folder to write to; got {error.strerror}: choose another"
        ) from error
    _held.add(file)
    try:
        _lock(file, folder)
        with suppress(OSError):  # a full disk
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, str(os.getpid()).encode())
        yield
    finally:
        if file in _held:  # not in a process forked from here
            _held.remove(file)
            os.close(file)


def _lock(file: int, folder: Path) -> None:
    """For as long as the file is open, here or in a process forked from here."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file, 1 << 30, os.SEEK_SET)  # beyond what is read of it
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError) as error:
        os.lseek(file, 0, os.SEEK_SET)
        pid = os.read(file, 20).decode(errors="replace")
        who = f"process {pid}" if pid.isdecimal() else "another process"
        raise InputError(
            f"{folder}: expected a run that nobody is at work on; {who} is: wait until it has "
            "ended, or end it"
        ) from error
    except OSError:  # a disk without locks
        pass


def _let_go() -> None:
    """In a forked process: a worker that outlives its parent must not keep the folder."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
