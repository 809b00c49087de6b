"""Tables a person looks at: numbers are never cut, however narrow the terminal; text folds."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from minirlhf.app.coloured import template
from minirlhf.app.pictures import METRICS
from minirlhf.disk import shorten
from minirlhf.runs.pipeline import Result
from minirlhf.worlds.world import World

GOOD, BAD = "#0072b2", "#d55e00"  # blue and vermilion: every eye can tell them apart
ROWS, WORDS = METRICS["rows"], METRICS["words"]


class NumberTable(Table):
    """Cuts no number: text folds, and columns that find no room stand below, in a further table."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        texts = [column for column in self.columns if not column.no_wrap]
        pieces, room = [], 0
        for column in (column for column in self.columns if column.no_wrap):
            text = Text("\n".join(map(str, (column.header, *column.cells))))
            width = console.measure(text).maximum + sum(self.padding[1::2]) + 1
            if width > room:
                pieces.append([*texts])
                room = options.max_width - 1 - 10 * len(texts)
            pieces[-1].append(column)
            room -= width
        for piece in pieces:
            table = copy.copy(self)
            kept = [column for column in self.columns if column in piece]
            table.columns = [replace(column, _index=i) for i, column in enumerate(kept)]
            table.title = self.title if piece is pieces[0] else None
            table.caption = self.caption if piece is pieces[-1] else None
            yield from Table.__rich_console__(table, console, options)


def number_table(title: str, *heads: str, texts: tuple[int, ...] = (0,), **look) -> NumberTable:
    """A table of numbers; `texts` says which of its columns are text."""
    table = NumberTable(title=title, **{"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), **look})
    for i, head in enumerate(heads):
        number = {"justify": "right", "no_wrap": True}
        table.add_column(head, **{"overflow": "fold"} if i in texts else number)
    return table


def rows_table(title: str, columns: dict[str, str], rows: list[dict], **look) -> NumberTable:
    """A line for each of `rows`; `columns` has the heads and how a row is shown, "{name:.3f}"."""
    table = number_table(title, *columns, **look)
    for row in rows:
        table.add_row(*(form.format(**row) for form in columns.values()))
    return table


def show(*things: Any, stderr: bool = False) -> None:
    """Print texts, unbroken, and tables; brackets and colons in a user's text mean themselves."""
    console = Console(markup=False, emoji=False, highlight=False, stderr=stderr)
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str))


def result_in_full(result: Result, world: World) -> Iterator[Table | Text | str]:
    """The table *reference vs policy* on held-out prompts, then replies before and after."""
    yield result_table(result, world)
    words = [meaning for name, meaning in WORDS.items() if np.isfinite(result.policy[name])]
    yield Text(f"{'. '.join(words)}.", "dim")
    if result.prompts:
        replies = (result.reference_samples.responses, result.policy_samples.responses)
        first = (texts[:6] for texts in (result.prompts, *replies))
        yield replies_table("before and after", world, *first, with_prompts=True)
    spent = {**result.seconds, "in all": sum(result.seconds.values())}
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items())
    yield f"training time in {'this' if result.prompts else 'its last'} session: {stages}"


def result_table(result: Result, world: World) -> NumberTable:
    """The columns of `metrics.response_metrics`, of reference and policy beside each other."""
    of_world = f"held-out prompts of the world {shorten(world.name)!r}"
    title = f"{len(result.prompts) or ''} replies to {of_world}".strip()
    table = number_table(title, "", "reference", "policy", box=box.HEAVY_HEAD, padding=(0, 1))
    for name, (label, form) in ROWS.items():
        if np.isfinite(result.policy.get(name, np.nan)):
            numbers = (form.format(of[name]) for of in (result.reference, result.policy))
            table.add_row(Text(label), *numbers)
    return table


def html(table: Table) -> str:
    """The table for a notebook; what it shows of a user's text is escaped."""
    return template("table.html").render(table=table)


def replies_table(title: str, world: World, prompts, *replies, with_prompts=False) -> Table:
    """Replies of the reference and of a policy side by side, each above its gold reward."""
    table = Table(title=title, show_lines=True)
    for head in (*["prompt"] * with_prompts, *("reference", "policy")[: len(replies)]):
        table.add_column(head, ratio=1, overflow="fold")
    for prompt, *texts in zip(prompts, *replies, strict=True):
        cells = [Text(printable(prompt))] * with_prompts
        for text in texts:
            cells.append(Text(printable(text)))
            gold = world.gold_or_none(prompt, text)
            if gold is not None:
                cells[-1].append(f"\ngold {gold:+.2f}", style=GOOD if gold > 0 else BAD)
        table.add_row(*cells)
    return table


def printable(text: str) -> str:
    """The text with control characters, which an untrained policy may write, as a replacement."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def penalty_table(pieces: list[str], logp: np.ndarray, ref_logp: np.ndarray) -> Table:
    """Token by token log pi_theta, log pi_ref, their difference; the last row is the sum [nats]."""
    table = Table(title="log pi_theta - log pi_ref by token [nats]", padding=(0, 1, 0, 0))
    table.add_column("token", overflow="fold", min_width=1)
    for column in ("log\npi_theta", "log\npi_ref", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    difference = logp - ref_logp
    for piece, ours, theirs, d in zip(pieces, logp, ref_logp, difference, strict=True):
        style = BAD if d > 0.5 else GOOD if d < -0.5 else ""
        table.add_row(Text(piece), f"{ours:.4f}", f"{theirs:.4f}", Text(f"{d:+.4f}", style))
    table.add_section()
    total = Text(f"{difference.sum():+.4f}", "bold")
    table.add_row("sum", f"{logp.sum():.4f}", f"{ref_logp.sum():.4f}", total)
    return table
