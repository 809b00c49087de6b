"""Lines as charts, which chart.html draws."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MOST_POINTS = 300


class Line(NamedTuple):
    label: str
    x: Sequence[float]
    y: Sequence[float | None]  # None: no number, a gap
    look: str = "l0"  # its class in page.html
    dots: bool = False
    tag: str = ""  # of its first dot


def chart(title: str, unit: str, x: str, lines: list[Line], **more: Any) -> dict[str, Any]:
    """What chart.html needs to draw the lines on one pair of axes; `more` goes with it."""
    across = _range([v for line in lines for v in line.x], 0.0)
    up = _range([w for line in lines for w in line.y if w is not None], 0.05)
    axes = {"box": [*across, *up], "x_ticks": ticks(*across), "y_ticks": ticks(*up)}
    axes["lines"] = [line._asdict() | {"x": [*line.x], "y": [*line.y]} for line in lines]
    more = dict.fromkeys(("metric", "healthy", "says", "law")) | more
    return more | axes | {"title": title, "unit": unit, "x": x}


def _range(values: list[float], margin: float) -> tuple[float, float]:
    """From the least to the largest, and some room."""
    low, high = min(values), max(values)
    room = margin * (high - low) if high - low > 1e-9 * abs(high) else 0.1 * abs(high) or 1.0
    return float(low - room), float(high + room)


def ticks(low: float, high: float, most: int = 5) -> list[tuple[float, str]]:
    """Round numbers from low to high, and how they are written."""
    ten = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(ten * m for m in (1, 2, 5, 10) if (high - low) / (ten * m) <= most)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    whole = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(i * step, f"{i * step:,.{digits}f}".replace("-", "\N{MINUS SIGN}")) for i in whole]


def thinned(x: list, y: list) -> tuple[list, list]:
    """Of a long series the ends, and the least and the largest of each stretch."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), MOST_POINTS // 2):
        known = [i for i in stretch.tolist() if y[i] is not None] or [int(stretch[0])]
        kept |= {min(known, key=y.__getitem__), max(known, key=y.__getitem__)}
    return [x[i] for i in sorted(kept)], [y[i] for i in sorted(kept)]


def number(x: float | None) -> str:
    """Three digits, or whole thousands; what is rounding is 0."""
    if x is None or not math.isfinite(x):
        return "\N{EN DASH}"
    text = f"{x:,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:#.3g}".rstrip(".")
    return "0" if abs(x) < 1e-6 else text.replace("-", "\N{MINUS SIGN}")
