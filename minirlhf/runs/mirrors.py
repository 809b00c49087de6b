"""`--log`: metrics.jsonl once more, in a format that other programs show.

A mirror follows line by line. With the first line of a session it is made anew from metrics.jsonl:
what a rewind has cut off is gone from it too, so that of a resumed run is that of one which was
never interrupted.
"""

import csv
import io
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from minirlhf.disk import plain, refuse_link, write_whole, writing
from minirlhf.errors import InputError
from minirlhf.runs.log import RunLog, read_metrics

TENSORBOARD, CSV = "tensorboard", "metrics.csv"  # in the run folder
Row = dict[str, Any]
Add = Callable[[Row], bool]  # append a line to a mirror; False: it has to be made anew for it


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
        with writing(path):
            if not (add and add({"step": step, "stage": stage, **plain(values)})):
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
            with open(path, "ab") as file:
                file.write(lines([row]))
        return known

    write_whole(path, lines([names, *rows]))
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
        for name in row.keys() - {"step", "stage"}:
            value = math.nan if row[name] is None else row[name]
            writers[stage].add_scalar(name, value, row["step"])
        writers[stage].flush()
        return True

    refuse_link(path)
    shutil.rmtree(path, ignore_errors=True)
    for row in rows:
        add(row)
    return add
