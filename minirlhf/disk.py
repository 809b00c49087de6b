"""Files: what the user gives is read strictly, what we write is written whole or not at all.

A reader never sees half a file: bytes go to a temporary neighbour, are flushed to the disk
(fsync), and then take the name in one rename. A folder cannot be renamed over another, so a folder
of several files takes two renames; between them only `.NAME.old` exists, and `settled` finds it.
"""

import itertools
import json
import math
import os
import shutil
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from minirlhf.errors import InputError
from minirlhf.memory import require_memory


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; refused if it is none, or larger than the memory at hand."""
    try:
        check_regular(path)
        require_memory({str(path): os.path.getsize(path)})
        return Path(path).read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: str | Path, error: OSError) -> InputError:
    """What a file that could not be read means for the person who named it."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path or repr(path)}: expected a file; found none: check it")
    return InputError(f"{path}: expected a readable file; got: {error.strerror or error}")


def check_regular(path: str | Path) -> None:
    """Refuse what is no plain file: to open a pipe waits for its other end, a device has no end."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL in it, or half a surrogate pair
        raise InputError(f"{path}: expected a path; got text that is none: check it") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: expected a file; got a folder: name a file in it")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: expected a file; got a pipe or a device: save it as a file")


def read_text(path: str | Path) -> str:
    r"""The content of a UTF-8 text file, not blank; line ends as "\n", no byte order mark."""
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text; got the byte {data[error.start]:#04x} in line "
            f"{data.count(10, 0, error.start) + 1}: save the file as UTF-8"
        ) from error
    if not text.strip():
        raise InputError(f"{path}: expected text; the file is empty: fill it or name another")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_object(text: str | bytes, where: str) -> dict:
    """A JSON object, without NaN and Infinity; `where` opens the message if it is none."""

    def refuse_constant(name):
        raise ValueError(f"{name} is not JSON")

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, parse_constant=refuse_constant)
        if not isinstance(value, dict):
            raise ValueError("no object in braces")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: expected a JSON object; got {shorten(str(text))!r} ({error}): correct it"
        ) from error
    return value


def read_object(path: str | Path) -> dict:
    """The JSON object in a file."""
    return parse_object(read_text(path), str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    text = read_text(path)
    with refusing(path, "TOML", "correct it", RecursionError):  # of tables in tables
        return tomllib.loads(text)


def to_json(content: dict) -> bytes:
    """A JSON object as the content of a file, one entry a line; see `plain`."""
    return (json.dumps(plain(content), indent=2, allow_nan=False) + "\n").encode()


def plain(value: Any) -> Any:
    """The value in JSON's own types: NumPy numbers as Python's, NaN and inf as None."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, dict):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if value is None or isinstance(value, str | int | float):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    raise TypeError(f"JSON: expected numbers, strings, dicts and lists; got {type(value)}")


def new_numbered_folder(name: str) -> Path:
    """Make runs/NAME-N with the first N that is free: two processes never get the same one."""
    for n in itertools.count():
        folder = Path("runs") / f"{name}-{n}"
        with writing(folder), suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def new_folder(out: Path, *, holds: str) -> Path:
    """Make the folder for results; `holds` is the file by which older ones are known."""
    if (out / holds).exists():
        raise InputError(f"--out {out}: expected a new folder; it holds results: choose another")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return out


def shorten(text: str, limit: int = 60) -> str:
    """The text on one line, cut with "..." if it is longer than `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def refusing(where: str | Path, expected: str, advice: str, *others: type) -> Iterator[None]:
    """In the block a ValueError, which says what came, and others are an InputError."""
    try:
        yield
    except (ValueError, *others) as error:
        came = shorten(str(error) if isinstance(error, ValueError) else repr(error), 160)
        raise InputError(f"{where}: expected {expected}; {came}: {advice}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """In the block what the disk or the permissions refuse is an InputError that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: expected a place to write to; got {error.strerror or error}: free some space "
            "or choose another folder"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """In the block this process alone is at work on the folder; the lock dies with it."""
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
                f"{folder}: expected a run that nobody is at work on; {who} is: wait, or end it"
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


@contextmanager
def _new_beside(path: Path) -> Iterator[Path]:
    """The neighbour `.NAME.new`, which the block writes and gives the name; gone if it fails."""
    new = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(new)  # of a writer that crashed
            yield new
        finally:
            _remove(new)


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old file or the new one."""
    path = Path(path).absolute()
    with _new_beside(path) as new:
        _write_synced(new, data)
        os.replace(new, path)
        _sync_folder(path.parent)


def write_whole_folder(folder: str | Path, files: dict[str, bytes | None]) -> None:
    """Write several files of one folder so that a crash leaves all old ones or all new ones.

    Other content of the folder stays; a file that is None goes. During the swap there is a moment
    in which only `.NAME.old` exists: read through `settled`. One writer at a time.
    """
    refuse_link(folder)
    folder = Path(folder).absolute()
    old = _old_name(folder)
    with _new_beside(folder) as new:
        current = folder if folder.exists() else old
        if current.exists():
            shutil.copytree(
                current,
                new,
                symlinks=True,
                ignore=lambda at, names: files if Path(at) == current else (),
                copy_function=lambda source, at: _write_synced(Path(at), Path(source).read_bytes()),
            )
        new.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            if data is not None:
                _write_synced(new / name, data)
        _sync_folder(new)
        if folder.exists():
            _remove(old)
            os.replace(folder, old)
        os.replace(new, folder)
        _sync_folder(folder.parent)
        _remove(old)


def refuse_link(path: str | Path) -> None:
    """A link in a run folder may lead anywhere: nothing is written through it."""
    if os.path.islink(path):
        raise InputError(
            f"{path}: expected it in the run folder; got a link to {os.readlink(path)}, which is "
            "not written through: put what it leads to in its place"
        )


def settled(folder: str | Path) -> Path:
    """Where the content of a folder written by `write_whole_folder` is now."""
    folder = Path(folder)
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise InputError(f"{folder}: expected a folder; got a file: name the folder it is in")
    old = _old_name(folder.absolute())
    if not os.path.isdir(old):
        raise InputError(f"{folder}: expected a folder; found none: check the path")
    return old


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link, not what it leads to; what stays is found out later."""
    with suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:  # a new one: an old name may be a link to anywhere
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut; Windows has no such call."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
