"""Logs of training, ours and others', as series under our names."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf.runs.log import read_metrics


class Log(NamedTuple):
    source: str  # minirlhf, trl-ppo, trl-grpo, ..: what wrote it, by its names
    title: str
    stages: dict[str, list[dict[str, float]]]  # rows of "step" and numbers, by our names
    unknown: list[str]  # names in the log that have none of ours
    folder: Path | None  # of a run of ours


def read_log(path: str | Path) -> Log:
    """A run folder.

    A row has every name of its stage, nan where the log has no number; steps rise.

    Raises:   InputError: it is no run, or its metrics.jsonl is damaged.
    """
    path, found = Path(path), {}
    for row in read_metrics(path):
        found.setdefault(row.pop("stage"), []).append(row)
    stages = {stage: _series(rows) for stage, rows in found.items()}
    return Log("minirlhf", path.name, stages, [], path)


def _series(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Rows by rising step, of several with one step the last; each with all names."""
    names = dict.fromkeys(name for row in rows for name in row)
    by_step = {row["step"]: {name: _number(row.get(name)) for name in names} for row in rows}
    return [by_step[step] | {"step": step} for step in sorted(by_step)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
