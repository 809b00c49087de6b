"""Progress bars: a moving bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0


def track(steps: Iterable, title: str) -> Iterator:
    """Iterate over `steps` (which has a length) and show how far it is, on stderr."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=len(steps), rate="")
            started = time.perf_counter()
            for done, step in enumerate(steps, 1):
                yield step
                rate = done / max(time.perf_counter() - started, 1e-9)
                progress.update(task, advance=1, rate=f"{rate:.1f}/s")
    else:
        yield from _track_lines(steps, title)


def _track_lines(steps: Iterable, title: str) -> Iterator:
    total = len(steps)
    started = last = time.perf_counter()
    for done, step in enumerate(steps, 1):
        yield step
        now = time.perf_counter()
        if done == total or now - last >= SECONDS_BETWEEN_LINES:
            last, spent = now, now - started
            rate = done / max(spent, 1e-9)
            left = (total - done) / rate
            print(
                f"{title}: {done}/{total}, {rate:.1f}/s, {spent:.0f} s spent, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
