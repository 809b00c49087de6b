"""A run folder has one process at work in it. The lock dies with that process, however it dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path

from filelock import FileLock, Timeout

from minirlhf.disk import writing
from minirlhf.errors import InputError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """In the block nobody else gets into such a block; the file `.lock` says who is in it."""
    path, who = folder / ".lock", "another process"
    # through no link; a process that is forked in the block does not hold it
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            with suppress(OSError, ValueError):
                who = f"process {int(path.read_text())}"
            raise InputError(
                f"{folder}: expected a run that nobody is at work on; {who} is: wait until it has "
                "ended, or end it"
            ) from error
        except OSError as error:
            if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):  # a disk without locks
                raise
    try:
        with suppress(OSError):  # a full disk
            path.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()
