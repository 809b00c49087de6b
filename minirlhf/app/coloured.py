"""The penalty seen: each token of a reply coloured by log pi_theta - log pi_ref.

One scale wherever it is drawn, from -LIMIT to LIMIT nats, so that texts, runs and moments compare.
No colour is 0; what the policy has made likelier pays, vermilion, and what it has made rarer
earns, blue. Rows are those of `runs.snapshots.token_rows`.
"""

from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from minirlhf.app import charts, pictures
from minirlhf.app.pictures import BLUE, VERMILION, Row
from minirlhf.disk import shorten

LIMIT = 3.0  # nats a token; what is beyond has the colour of the limit
MARKS = 0.1, 1.0, 2.0  # nats from which a token has one mark, two, three: for print, without colour


@cache
def template(name: str) -> Any:
    """A template of this room; what it shows of a user's text is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.loader = jinja2.PackageLoader("minirlhf", "app")
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.globals |= {"limit": LIMIT, "pays": VERMILION, "earns": BLUE, "steps": MARKS}
    tools = (accumulate, differences, extremes, marks, charts.number, span, zip)
    environment.globals |= {tool.__name__: tool for tool in tools}
    return environment.get_template(name)


def differences(row: Row) -> list[float]:
    """log pi_theta - log pi_ref of each token [nats]."""
    return [float(ours - theirs) for ours, theirs in zip(row["logp"], row["ref_logp"], strict=True)]


def span(rows: list[Row]) -> tuple[float, float]:
    """The least and the largest running sum of the replies, 0 among them [nats]."""
    sums = [total for row in rows for total in accumulate(differences(row))]
    return min([0.0, *sums]), max([0.0, *sums])


def extremes(rows: list[Row], n: int = 6) -> list[tuple[float, Row, int]]:
    """(difference, reply, index in it) of the n tokens furthest from 0."""
    found = [(d, row, i) for row in rows for i, d in enumerate(differences(row))]
    return sorted(found, key=lambda of: -abs(of[0]))[:n]


def marks(d: float) -> str:
    """The sign of a difference, so often as it is large; what a print shows."""
    return ("+" if d > 0 else "\N{MINUS SIGN}") * sum(abs(d) >= least for least in MARKS)


def html(rows: list[Row], *, document: bool = False) -> str:
    """The replies below each other, as a part of a page or as one that stands alone."""
    made = template("coloured.html").module
    return str((made.document if document else made.fragment)(rows, span(rows)))


def text(row: Row) -> Text:
    """The reply for a terminal; a token is coloured from the first of MARKS on."""
    tokens = zip(row["pieces"], differences(row), strict=True)
    return Text.assemble(*((of, f"black on {_mixed(d)}" if marks(d) else "") for of, d in tokens))


def side_by_side(rows: list[Row]) -> Table:
    """Replies to one prompt for a terminal, each above what it pays and what it is worth."""
    title = f"replies to {shorten(rows[0]['prompt'])!r}, coloured by log-ratio"
    table = Table(title=title, show_header=False, show_lines=True)
    for _ in rows:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*map(text, rows))
    table.add_row(*(f"penalty {row['kl_seq']:+.4f} nats" for row in rows))
    for name, label in (("score", "score"), ("gold", "gold reward"), ("reward", "your reward")):
        if any(np.isfinite(row[name] or np.nan) for row in rows):
            table.add_row(*(f"{label} {row[name]:+.4g}" for row in rows))
    return table


def _mixed(d: float) -> str:
    """White to the full colour at the limit."""
    share, full = min(1.0, abs(d) / LIMIT), VERMILION if d > 0 else BLUE
    parts = (int(full[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in parts)


def picture(rows: dict[str, Row], path: Path) -> Path:
    """Replies by their headings as a PNG for slides; each token in a box with its number."""
    replies = {
        f"{heading}, penalty {row['kl_seq']:+.2f} nats": (row["pieces"], differences(row))
        for heading, row in rows.items()
    }
    lines = sum(-(-len(row["pieces"]) // 12) + 0.5 for row in rows.values())
    figure, ((axis,),) = pictures.new_figure(11, 0.62 * lines + 0.5, 1, 1)
    pictures.draw_tokens(axis, replies, limit=LIMIT)
    axis.set_title(f"log π − log π_ref of each token [nats]; colours end at ±{LIMIT:g}", fontsize=9)
    return pictures.save(figure, path)
