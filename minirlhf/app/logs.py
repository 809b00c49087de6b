"""The log of a run as stages of rows, by our names of the metrics."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf.runs.log import read_metrics


class Log(NamedTuple):
    """Each row has its step, and numbers by the names of train/metrics.py; what is none is nan."""

    source: str
    title: str
    stages: dict[str, list[dict[str, Any]]]
    unknown: list[str] = []
    folder: Path | None = None  # of a run of ours


def read_log(path: str | Path) -> Log:
    """The log of a run folder."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in read_metrics(path):
        numbers = {name: math.nan if x is None else x for name, x in row.items()}
        stages.setdefault(row["stage"], []).append(numbers)
    return Log("minirlhf", Path(path).name, stages, folder=Path(path))
