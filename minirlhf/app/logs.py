"""Logs of training, ours and others', as series under our names; theirs are in logs.toml."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf.disk import read_text, read_toml, shorten
from minirlhf.errors import InputError
from minirlhf.runs.folder import STAGES
from minirlhf.runs.log import TENSORBOARD, read_metrics, require

# what counts the steps: the first of these that a log has; if it has none, its rows are counted
STEPS = ("global_step", "training/global_step", "trainer/global_step", "step", "Step", "_step")
TABLES = read_toml(Path(__file__).with_name("logs.toml"))  # program: its stage, its names: ours
Rows = list[dict[str, Any]]


class Log(NamedTuple):
    source: str  # what wrote it, by its names: minirlhf, or a table of logs.toml
    stages: dict[str, list[dict[str, float]]]  # rows of "step" and numbers, by our names
    unknown: list[str]  # names in the log that have none of ours
    folder: Path | None  # of a run of ours


def read_log(path: str | Path) -> Log:
    """A run of ours, or a log of TRL, verl, OpenRLHF: what they, W&B or TensorBoard wrote.

    Steps rise; of several rows with one step, as after a resume, what came last counts. A row has
    the names that were logged there, with nan where that is no number.

    Raises:   InputError: there is no log, it is damaged, or none of its names is known.
    """
    path = Path(path)
    folder = path if (path / "metrics.jsonl").exists() else None
    rows = read_metrics(folder) if folder else _rows(_file_in(path))
    ours = [row for row in rows if row.get("stage") in [*STAGES]]
    is_ours = bool(folder or ours)
    rows = ours if is_ours else [{_plain(name): x for name, x in row.items()} for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    if is_ours:
        source, stage = "minirlhf", ""
        table = {name: name for name in names if name not in ("step", "stage")}
    else:
        source = _recognised(names, path)
        stage, table = TABLES[source]["stage"], TABLES[source]["names"]
    counter = next(filter(names.__contains__, STEPS), None)
    stages: dict[str, dict[int, dict[str, float]]] = {name: {} for name in STAGES}
    for number, row in enumerate(rows):
        step = _number(row.get(counter)) if counter else number
        known = {here: _number(row[there]) for there, here in table.items() if there in row}
        if known and math.isfinite(step):
            of_step = stages[stage or row["stage"]].setdefault(int(step), {"step": int(step)})
            of_step.update(known)
    unknown = [name for name in names if name not in {*table, *STEPS, "stage"}]
    series = {name: [of[step] for step in sorted(of)] for name, of in stages.items() if of}
    return Log(source, series, unknown, folder)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _recognised(names: dict[str, None], path: Path) -> str:
    """The program: of the tables the first that explains most of the names."""
    source = max(TABLES, key=lambda name: len(names.keys() & TABLES[name]["names"]))
    if not names.keys() & TABLES[source]["names"]:
        known = ", ".join(next(iter(table["names"])) for table in TABLES.values())
        raise InputError(
            f"{path}: expected metrics of minirlhf, TRL, verl or OpenRLHF (like {known}); got "
            f"{shorten(', '.join(names)) or 'none'}: log under such names"
        )
    return source


def _plain(name: str) -> str:
    """The name that a trainer gives, without what transformers, OpenRLHF or W&B put before it."""
    name = name.rpartition(" - ")[2].removeprefix("train/")
    return f"eval_{name[5:]}" if name.startswith("eval/") else name


# -- files ----------------------------------------------------------------------------------------
def _file_in(path: Path) -> Path:
    """In a folder trainer_state.json, or that of its last checkpoint-N; else the folder itself."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda p: (len(str(p)), p))
    found += path.glob("trainer_state.json")
    if not found and not any(path.rglob("*tfevents*")):
        raise InputError(
            f"{path}: expected a run folder, trainer_state.json or event files of TensorBoard; got "
            "a folder without: name a log in JSON or CSV, or the folder that a trainer wrote"
        )
    return found[-1] if found else path


def _rows(path: Path) -> Rows:
    """The rows of a file, or of a folder with event files, under the names that stand there."""
    if path.is_dir() or "tfevents" in path.name:
        return _event_rows(path)
    text = read_text(path)
    try:
        return _json_rows(text) if text.lstrip()[0] in "{[" else _csv_rows(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(
            f"{path}: expected JSON, a JSON object a line, or CSV; got "
            f"{shorten(text)!r} ({error}): name a log in one of these"
        ) from error


def _json_rows(text: str) -> Rows:
    """trainer_state.json, a list of rows, or a row a line; in verl "data" holds the numbers."""
    try:
        rows = json.loads(text)
    except ValueError:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(rows, dict):
        rows = rows.get("log_history", [rows])
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise ValueError("no rows of names and numbers")
    return [row.pop("data") | row if isinstance(row.get("data"), dict) else row for row in rows]


def _csv_rows(text: str) -> Rows:
    """A column a name; W&B adds extrema, and the run to each name. An empty cell is no number."""
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count))
    names = [name for name in reader.fieldnames if not name.endswith(("__MIN", "__MAX"))]
    if len(runs := {name.rpartition(" - ")[0] for name in names if " - " in name}) > 1:
        raise ValueError(f"columns of {len(runs)} runs: keep those of one")
    return [{name: row[name] for name in names if row[name]} for row in reader]


def _event_rows(path: Path) -> Rows:
    """The scalars in event files of TensorBoard, of one run or of the stages of one of ours."""
    require("tensorboard", str(path), "export the log as CSV")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    parts, rows = sorted({file.parent for file in path.rglob("*tfevents*")}) or [path], []
    for part in parts:
        home = part.resolve() if part.is_dir() else part.resolve().parent
        is_ours = home.parent.name == TENSORBOARD and home.name in STAGES
        if len(parts) > 1 and not is_ours:
            raise InputError(
                f"{path}: expected event files of one run; got {len(parts)} folders with some: "
                f"name one, like {part}"
            )
        log = EventAccumulator(str(part), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        found = [(tag, e.step, e.value) for tag in log.Tags()["scalars"] for e in log.Scalars(tag)]
        for tag in log.Tags()["tensors"]:
            tensors = [(e.step, make_ndarray(e.tensor_proto)) for e in log.Tensors(tag)]
            found += [(tag, step, x.item()) for step, x in tensors if x.size == 1]
        by_step = {}
        for tag, step, value in found:
            by_step.setdefault(step, {"stage": home.name} if is_ours else {})[tag] = value
        rows += [{"step": step, **row} for step, row in by_step.items()]
    return rows
