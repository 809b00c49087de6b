"""What a run leaves behind: metrics.jsonl and samples.jsonl, one JSON object a line; mirrors."""

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from minirlhf import disk
from minirlhf.errors import InputError

TENSORBOARD, CSV = "tensorboard", "metrics.csv"  # in the run folder
Row = dict[str, Any]
Add = Callable[[Row], bool]  # append a line to a mirror; False: it has to be made anew for it

_METRICS, _SAMPLES = {"step": int, "stage": str}, {"step": int}  # what every line has


class RunLog:
    """Appends to the two files of a run folder, a line at once; `watch` sees those of metrics."""

    def __init__(self, folder: str | Path, watch: Callable[..., None] = lambda *row: None):
        folder, self.watch = Path(folder), watch
        self.paths = folder / "metrics.jsonl", folder / "samples.jsonl"
        self.metrics_path, self.samples_path = self.paths
        with disk.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path, has in zip(self.paths, (_METRICS, _SAMPLES), strict=True):
                disk.refuse_link(path)
                path.touch()
                _mend(path)
                read_jsonl(path, has)  # refuse a damaged one before hours of work stand below it

    def metrics(self, step: int, stage: str, values: dict[str, Any]) -> None:
        """Append {"step", "stage", **values} to metrics.jsonl; NaN and inf become null."""
        _append(self.metrics_path, jsonl([{"step": step, "stage": stage, **values}]))
        self.watch(step, stage, values)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append {"step", **sample} to samples.jsonl for each sample."""
        _append(self.samples_path, jsonl({"step": step, **sample} for sample in samples))

    def position(self) -> dict[str, int]:
        """Sizes of the files [bytes]; so much of them is on the disk now: no power cut takes it."""
        sizes = {}
        for path in self.paths:
            with disk.writing(path), open(path, "r+b") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        return sizes

    def restart(self, stage: str) -> None:
        """Drop the lines that `stage` wrote before it was interrupted: it begins again."""
        kept = 0
        for line in disk.read_bytes(self.metrics_path).splitlines(keepends=True):
            if disk.parse_object(line, str(self.metrics_path))["stage"] == stage:
                break
            kept += len(line)
        self._cut(kept, 0)  # samples are PPO's, which is the last stage

    def rewind(self, position: dict[str, int], stage: str, step: int) -> None:
        """Drop what was written after `position`, where `step` of `stage` has to be the last."""
        last = {"step": step, "stage": stage}, {"step": step} if stage == "ppo" else {}
        ends = [position.get(path.name) for path in self.paths]
        for path, end, expected in zip(self.paths, ends, last, strict=True):
            data, row = disk.read_bytes(path), None
            if type(end) is int and 0 <= end <= len(data):
                *_, line = [b"{}\n", *data[:end].splitlines(keepends=True)]
                row = disk.parse_object(line, str(path)) if line.endswith(b"\n") else None
            if row is None or {name: row.get(name) for name in expected or row} != expected:
                raise InputError(
                    f"{path}: expected {expected or 'nothing'} up to byte {end}, as at the last "
                    f"checkpoint; got {len(data)} bytes of something else: restore the file"
                )
        self._cut(*ends)

    def _cut(self, *ends: int) -> None:
        for path, end in zip(self.paths, ends, strict=True):
            with disk.writing(path):
                os.truncate(path, end)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, each with its step and stage."""
    return read_jsonl(Path(folder) / "metrics.jsonl", _METRICS)


def read_jsonl(path: str | Path, has: dict[str, type] | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with what it `has` to; half a last line is dropped."""
    data, rows = disk.read_bytes(path), []
    for number, line in enumerate(data[: _whole(data)].split(b"\n"), 1):
        if line.strip():
            rows.append(disk.parse_object(line, f"{path}:{number}"))
            for key, kind in (has or {}).items():
                if type(rows[-1].get(key)) is not kind:
                    raise InputError(
                        f"{path}:{number}: expected a line with its {key}; got "
                        f"{disk.shorten(line.decode())!r}: restore the file"
                    )
    return rows


def jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    """A line a row, as `read_jsonl` reads it; NaN and inf become null."""
    lines = (json.dumps(disk.plain(row), ensure_ascii=False) + "\n" for row in rows)
    # a lone surrogate becomes its escape backslash-udXXX, which JSON reads back
    return "".join(lines).encode(errors="backslashreplace")


def _append(path: Path, data: bytes) -> None:
    with disk.writing(path), open(path, "ab") as file:
        file.write(data)


def _whole(data: bytes) -> int:
    """How many bytes there are without an unfinished last line; only its newline may be missing."""
    tail = data[data.rfind(b"\n") + 1 :]
    try:
        disk.parse_object(tail, "")
    except InputError:
        return len(data) - len(tail)
    return len(data)


def _mend(path: Path) -> None:
    """Cut off an unfinished last line; give a whole one its newline."""
    data = disk.read_bytes(path)
    size = _whole(data)
    os.truncate(path, size)
    if size and not data[:size].endswith(b"\n"):
        _append(path, b"\n")


# -- mirrors: --log ------------------------------------------------------------------------------
# metrics.jsonl once more, in a format that other programs show. A mirror follows line by line; the
# first line of a session makes it anew from metrics.jsonl, without what a rewind has cut off: that
# of a resumed run is that of one which was never interrupted.
@contextmanager
def mirrored(log: RunLog, kind: str) -> Iterator[None]:
    """In the block each line of the log goes into its mirror too; kind "": it has none."""
    if not kind:
        yield
        return
    require(kind)
    folder, see, add = log.metrics_path.parent, log.watch, None
    path = folder / (CSV if kind == "csv" else TENSORBOARD)

    def watch(step: int, stage: str, values: Row) -> None:
        nonlocal add
        with disk.writing(path):
            if not (add and add({"step": step, "stage": stage, **disk.plain(values)})):
                add = make(path, read_metrics(folder))
        see(step, stage, values)

    log.watch = watch
    with ExitStack() as opened:
        make = _csv if kind == "csv" else partial(_event_files, opened)
        yield
        if add is None:  # no new line; the last one may have been killed on its way here
            make(path, read_metrics(folder))


def require(kind: str, where: str = "--log tensorboard", instead: str = "take --log csv") -> None:
    """Raise InputError where the library of a format is not installed."""
    try:
        if kind == "tensorboard":
            import tensorboard.summary  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{where}: expected the package tensorboard, which knows event files; it is not "
            f"installed: pip install tensorboard, or {instead}"
        ) from error


def _csv(path: Path, rows: list[Row]) -> Add:
    """A column a name, in the order in which names came; an empty cell: no number."""
    names = {name: name for row in rows for name in row}

    def lines(rows: list[Row]) -> bytes:
        csv.DictWriter(text := io.StringIO(newline=""), names).writerows(rows)
        return text.getvalue().encode()

    def add(row: Row) -> bool:
        known = row.keys() <= names.keys()
        if known:
            _append(path, lines([row]))
        return known

    disk.write_whole(path, lines([names, *rows]))
    return add


def _event_files(opened: ExitStack, path: Path, rows: list[Row]) -> Add:
    """tensorboard/STAGE, so that a stage is a run of its own there."""
    from tensorboard.summary import Writer

    writers: dict[str, Writer] = {}

    def add(row: Row) -> bool:
        stage = row["stage"]
        if stage not in writers:
            writers[stage] = Writer(str(path / stage))
            opened.callback(writers[stage].close)
        for name in (name for name in row if name not in ("step", "stage")):
            value = math.nan if row[name] is None else row[name]
            writers[stage].add_scalar(name, value, row["step"])
        writers[stage].flush()
        return True

    disk.refuse_link(path)
    shutil.rmtree(path, ignore_errors=True)
    for row in rows:
        add(row)
    return add
