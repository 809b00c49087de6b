"""Progress bars: a moving bar with rate and time left on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from rich import progress
from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0


def say(line: str) -> None:
    """A note beside the bars, on stderr; where it cannot be written, work goes on without it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def track(steps: Iterable, title: str) -> Iterator:
    """Iterate over `steps` (which has a length) and show how far it is, on stderr.

    A range that begins at 20 of 30 is one of which 20 steps have been done before. What a title
    has `beside` it is shown too.
    """
    started, first = time.perf_counter(), steps.start if isinstance(steps, range) else 0
    with (_bar if sys.stderr.isatty() else _lines)(title, first, first + len(steps)) as show:
        for made, step in enumerate(steps, 1):
            yield step
            spent = max(time.perf_counter() - started, 1e-9)
            show(first + made, spent, made / spent)


def _shown(title: str, rate: float) -> str:
    return f"{rate:.1f}/s{getattr(title, 'beside', '')}"


@contextlib.contextmanager
def _bar(title: str, first: int, total: int) -> Iterator[Callable[[int, float, float], None]]:
    done = (progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[rate]}")
    times = (progress.TimeElapsedColumn(), "left", progress.TimeRemainingColumn())
    columns = ("{task.description:24}", *done, *times)
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, completed=first, total=total, rate="")
        yield lambda done, _, rate: bar.update(task, completed=done, rate=_shown(title, rate))


@contextlib.contextmanager
def _lines(title: str, _: int, total: int) -> Iterator[Callable[[int, float, float], None]]:
    last = 0.0

    def show(done: int, spent: float, rate: float) -> None:
        nonlocal last
        if done == total or spent - last >= SECONDS_BETWEEN_LINES:
            last, left = spent, (total - done) / rate
            times = f"{spent:.0f} s spent, {left:.0f} s left"
            say(f"{title}: {done}/{total}, {_shown(title, rate)}, {times}")

    yield show
