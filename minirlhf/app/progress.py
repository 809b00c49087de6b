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
    """Iterate over `steps` (which has a length) and show how far it is, on stderr."""
    started = time.perf_counter()
    with (_bar if sys.stderr.isatty() else _lines)(title, len(steps)) as show:
        for done, step in enumerate(steps, 1):
            yield step
            show(done, max(time.perf_counter() - started, 1e-9))


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int, float], None]]:
    done = (progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[rate]}")
    times = (progress.TimeElapsedColumn(), "left", progress.TimeRemainingColumn())
    columns = ("{task.description:24}", *done, *times)
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, rate="")
        yield lambda n, spent: bar.update(task, completed=n, rate=f"{n / spent:.1f}/s")


@contextlib.contextmanager
def _lines(title: str, total: int) -> Iterator[Callable[[int, float], None]]:
    last = 0.0

    def show(done: int, spent: float) -> None:
        nonlocal last
        if done == total or spent - last >= SECONDS_BETWEEN_LINES:
            last, rate = spent, done / spent
            left = (total - done) / rate
            say(f"{title}: {done}/{total}, {rate:.1f}/s, {spent:.0f} s spent, {left:.0f} s left")

    yield show
