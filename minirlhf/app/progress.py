"""Progress: a moving bar with the key figures of a stage on a terminal, plain lines elsewhere."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from rich import progress
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from minirlhf.app.pictures import METRICS

SECONDS_BETWEEN_LINES = 10.0
FIGURES = METRICS["bar"]
BLOCKS, ASCII, WIDTH = "▁▂▃▄▅▆▇█", "_.-=+*#@", 16  # of a sparkline

_figures: dict[str, list[float]] = {}  # of the stage at work: what each was, step by step


def say(line: str) -> None:
    """A note beside the bars, on stderr; where it cannot be written, work goes on without it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def watch(step: int, stage: str, values: dict) -> None:
    """Keep the key figures of a step, to be shown beside the bar."""
    for name, label in FIGURES.items():
        if name in values:
            _figures.setdefault(label, []).append(values[name])


def track(steps: Iterable, title: str) -> Iterator:
    """Iterate over `steps`, which has a length; show on stderr how far it is, and what is watched.

    A range that begins at 20 of 30 is one of which 20 steps have been done before.
    """
    started, first = time.perf_counter(), steps.start if isinstance(steps, range) else 0
    _figures.clear()
    with (_bar if sys.stderr.isatty() else _lines)(title, first, first + len(steps)) as show:
        for made, step in enumerate(steps, 1):
            yield step
            spent = max(time.perf_counter() - started, 1e-9)
            show(first + made, spent, made / spent)


def figures(console: Console) -> Columns:
    """The last value and the history of each key figure, as many in a line as find room."""
    blocks = ASCII if console.options.ascii_only else BLOCKS
    cells = [
        Text.assemble(f"{label:9}{x[-1]:>8.3g} ", (f"{sparkline(x, blocks):{WIDTH}}", "cyan"))
        for label, x in list(_figures.items())
    ]
    return Columns(cells, padding=(0, 2))


def sparkline(history: list[float], blocks: str = BLOCKS) -> str:
    """A character for each step, or for the mean of some; from the lowest to the highest."""
    finite = [value for value in history if math.isfinite(value)]
    if not finite:
        return ""
    means = np.array([part.mean() for part in np.array_split(finite, min(len(finite), WIDTH))])
    spread = np.ptp(means)
    if spread <= 1e-9 * np.abs(means).max():  # rounding
        spread = math.inf
    heights = (means - means.min()) / spread
    return "".join(blocks[round(height * (len(blocks) - 1))] for height in heights)


def _speed(rate: float) -> str:
    return f"{rate:.1f}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each"


@contextlib.contextmanager
def _bar(title: str, first: int, total: int) -> Iterator[Callable[[int, float, float], None]]:
    console = Console(stderr=True)
    made, left = progress.MofNCompleteColumn(), progress.TimeRemainingColumn()
    columns = ("{task.description}", made, left)
    if (room := console.width - 66) > 0:
        wide, spent = progress.BarColumn(min(room, 40)), progress.TimeElapsedColumn()
        columns = ("{task.description:24}", wide, made, "{task.fields[rate]}", spent, "left", left)
    bar = progress.Progress(*columns, console=console)
    shown = {"get_renderable": lambda: Group(bar, figures(console)), "refresh_per_second": 10}
    with Live(console=console, **shown):
        task = bar.add_task(title, completed=first, total=total, rate="")
        yield lambda done, _, rate: bar.update(task, completed=done, rate=_speed(rate))


@contextlib.contextmanager
def _lines(title: str, _: int, total: int) -> Iterator[Callable[[int, float, float], None]]:
    last = 0.0

    def show(done: int, spent: float, rate: float) -> None:
        nonlocal last
        if done == total or spent - last >= SECONDS_BETWEEN_LINES:
            last, left = spent, (total - done) / rate
            figures = [f"{label} {x[-1]:.3g}" for label, x in list(_figures.items())[:3]]
            times = f"{spent:.0f} s spent, {left:.0f} s left"
            say(", ".join([f"{title}: {done}/{total}", _speed(rate), *figures, times]))

    yield show
