"""`--log`: metrics.jsonl once more, in a format that other programs show.

A mirror follows line by line. With the first line of a session it is made anew from metrics.jsonl:
what a rewind has cut off is gone from it too, so that of a resumed run is that of one which was
never interrupted.
"""

import csv
import io
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minirlhf.disk import plain, refuse_link, write_whole, writing
from minirlhf.errors import InputError
from minirlhf.runs.log import RunLog, read_metrics

TENSORBOARD, CSV = "tensorboard", "metrics.csv"  # in the run folder
Row = dict[str, Any]


@contextmanager
def mirrored(log: RunLog, kind: str) -> Iterator[None]:
    """In the block each line of the log goes into its mirror too; kind "": it has none."""
    if not kind:
        yield
        return
    require(kind)
    folder, see, made = log.metrics_path.parent, log.watch, False
    mirror = _TensorBoard(folder) if kind == "tensorboard" else _Csv(folder)

    def watch(step: int, stage: str, values: Row) -> None:
        nonlocal made
        with writing(mirror.path):
            if not (made and mirror.add({"step": step, "stage": stage, **plain(values)})):
                mirror.make(read_metrics(folder))
        made = True
        see(step, stage, values)

    log.watch = watch
    try:
        yield
        if not made:  # there was no new line; the last one may have been killed on its way here
            mirror.make(read_metrics(folder))
    finally:
        mirror.close()


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


class _Csv:
    """metrics.csv: a column a name, in the order in which names came; an empty cell: no number."""

    def __init__(self, folder: Path):
        self.path, self.names = folder / CSV, {}

    def make(self, rows: list[Row]) -> None:
        self.names = {name: name for row in rows for name in row}
        write_whole(self.path, self._lines([self.names, *rows]))

    def add(self, row: Row) -> bool:
        """Append a line; False: it has a new name, so all lines need a new column."""
        if row.keys() <= self.names.keys():
            with open(self.path, "ab") as file:
                file.write(self._lines([row]))
            return True
        return False

    def _lines(self, rows: list[Row]) -> bytes:
        csv.DictWriter(text := io.StringIO(newline=""), self.names).writerows(rows)
        return text.getvalue().encode()

    def close(self) -> None:
        """Nothing is open."""


class _TensorBoard:
    """tensorboard/STAGE: event files, so that a stage is a run of its own there."""

    def __init__(self, folder: Path):
        self.path, self.writers = folder / TENSORBOARD, {}

    def make(self, rows: list[Row]) -> None:
        refuse_link(self.path)
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> bool:
        from tensorboard.summary import Writer

        stage = row["stage"]
        if stage not in self.writers:
            self.writers[stage] = Writer(str(self.path / stage))
        for name in row.keys() - {"step", "stage"}:
            value = math.nan if row[name] is None else row[name]
            self.writers[stage].add_scalar(name, value, row["step"])
        self.writers[stage].flush()
        return True

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers = {}
