"""Pictures for people: what `minirlhf train`, `minirlhf exact` and the examples save.

At most five lines an axis, in colours that every eye can tell apart (Okabe and Ito) and with a
marker each. A number that differs from 0 by rounding alone is drawn as 0.
"""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from minirlhf.disk import plain, read_toml, write_whole

Row = dict[str, Any]
METRICS = read_toml(Path(__file__).with_name("metrics.toml"))
ROUNDING = 1e-12  # below, an error is rounding
BLUE, VERMILION, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
LOOKS = [  # of the lines of an axis, in their order
    {"color": BLUE, "marker": "o", "ls": "-"},
    {"color": VERMILION, "marker": "s", "ls": "--"},
    {"color": GREEN, "marker": "^", "ls": "-."},
    {"color": PURPLE, "marker": "D", "ls": ":"},
    {"color": BLACK, "marker": "v", "ls": (0, (6, 1))},
]


def new_figure(width: float, height: float, rows: int, columns: int, **options):
    """(figure, its axes as an array (rows, columns)); matplotlib is imported here at last."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def draw_lines(axis, lines: dict[str, tuple], looks: list[dict] = LOOKS, log: str = "") -> None:
    """Each line {label: (x, y), or () for none} in a look of its own; `log`: "x", "y" or both."""
    axis.set(**{f"{name}scale": "log" for name in log})
    for look, (label, points) in zip(looks, lines.items(), strict=False):
        axis.plot(*points, **{"label": label, "ms": 3.5, "lw": 1.4, **look})


def say(axis, title: str, x: str, y: str = "", *, legend: dict | None = None) -> None:
    """What the axis shows and what to see in it; where the legend stands, if there is one."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend(**{"fontsize": 7, **(legend or {})})


def draw_tokens(axis, replies: dict[str, tuple], *, limit: float, width: int = 12) -> None:
    """Each reply {heading: (tokens, numbers)} as boxes with a number each, `width` boxes a line.

    White is 0; what is beyond -limit or limit has their colour; what has no number is hatched.
    """
    y, look = 0.0, {"fontsize": 7, "ha": "center", "va": "center", "parse_math": False}
    for heading, (tokens, numbers) in replies.items():
        axis.text(0, y, heading, fontsize=8, weight="bold", parse_math=False)
        for i, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
            x, top, shown = i % width, y - i // width - 0.15, round(number, 2) + 0.0  # no -0.00
            text = f"{token.strip()}\n{shown:+.2f}"
            share = 0.78 * min(abs(number) / limit, 1.0)
            fill = {"facecolor": (VERMILION if number > 0 else BLUE, share)}
            if np.isnan(number):
                fill, text = {"facecolor": "w", "hatch": "///"}, token.strip()
            axis.fill_between([x, x + 0.96], top - 0.8, top, edgecolor="silver", lw=0.5, **fill)
            axis.text(x + 0.48, top - 0.4, text, **look)
        y -= -(-len(tokens) // width) + 0.5
    axis.set(xlim=(0, width), ylim=(y + 0.3, 0.4))
    axis.set_axis_off()


def save(figure, path: Path) -> Path:
    """The figure as a file, with a grid on every axis."""
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format=path.suffix[1:])
    write_whole(path, drawn.getvalue())
    return path


def grouped(rows: list[Row], *names: str) -> dict[tuple, list[Row]]:
    """{values under these names: the rows that have them}, like (name, beta): runs, one a seed."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def curves(rows: list[Row], last: Row) -> dict[tuple[str, str], tuple[list, list]]:
    """{(stage, metric): (after how many steps it was measured, its numbers, None for nan)}.

    `last` is the final table: the evaluation after PPO's last step, where that has none.
    """
    found: dict[tuple[str, str], tuple[list, list]] = {}
    if rows and rows[-1]["stage"] == "ppo":
        rows = [*rows[:-1], {f"eval/{name}": x for name, x in last.items()} | rows[-1]]
    for row in rows:
        for name, number in row.items():
            if isinstance(number, int | float | None):
                x, y = found.setdefault((row["stage"], name), ([], []))
                x.append(row["step"] + (not name.startswith("heldout/")))  # that: before it
                y.append(plain(number))
    return {of: (x, y) for of, (x, y) in found.items() if {*y} - {None}}


def is_held(name: str) -> bool:
    """Is a metric of texts that nobody trains on?"""
    return name.startswith(("heldout/", "eval/"))


def curves_figure(metrics: list[Row], last: Row | None = None) -> Any:
    """What a run's metrics, and the last table of PPO, say of each stage that it went through."""
    found, panels = curves(metrics, last or {}), []
    for stage, of in itertools.product(METRICS["stages"], METRICS["panels"].values()):
        lines = {name: found[stage, name] for name in of["metrics"] if (stage, name) in found}
        if lines and "curve" in of:
            panels.append(("PPO iteration" if stage == "ppo" else "update", of, lines))
    columns = min(3, len(panels)) or 1
    n_rows = -(-len(panels) // columns) or 1
    figure, axes = new_figure(3.7 * columns, 2.8 * n_rows, n_rows, columns)
    for axis, (x, of, lines) in zip(axes.flat, panels, strict=False):
        for look, (name, points) in zip(LOOKS, lines.items(), strict=False):
            label = "held out" if is_held(name) else "training"
            every = -(-len(points[0]) // 20)  # 850 markers would hide the line
            draw_lines(axis, {label: points}, [{**look, "markevery": every}])
        axis.xaxis.get_major_locator().set_params(integer=True)
        say(axis, of["title"], x, of["unit"])
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    return figure


def shown(value: Any) -> str:
    """A setting as one would type it."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def frontier_figure(rows: list[Row]) -> Any:
    """What runs gained against how far they went: each run faint, the means over seeds joined.

    A row has kl_seq, proxy, gold, kl_coef, and `settings`, {what varies: its value}, where it is
    not beta alone: what varies besides gets lines of its own.
    """
    lines: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row["kl_coef"]):
        varied = dict(row.get("settings") or {"kl_coef": row["kl_coef"]})
        along = "kl_coef" if "kl_coef" in varied else next(iter(varied))
        point = shown(varied.pop(along))
        line = ", ".join(f"{name} {shown(value)}" for name, value in varied.items())
        lines.setdefault(line, {}).setdefault(point, []).append(row)
    gains = METRICS["gains"].items()
    panels = [of for of in gains if any(np.isfinite(row.get(of[0], np.nan)) for row in rows)]
    figure, (axes,) = new_figure(4.6 * len(panels), 3.6, 1, len(panels))
    for axis, (name, title) in zip(axes, panels, strict=True):
        for look, (label, points) in zip(itertools.cycle(LOOKS), lines.items(), strict=False):
            means = []
            for point, same in points.items():
                x, y = np.array([(max(row["kl_seq"], 0.0) ** 0.5, row[name]) for row in same]).T
                axis.scatter(x, y, s=12, alpha=0.35, color=look["color"])
                means.append((x.mean(), y.mean()))
                beside = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
                axis.annotate(point, means[-1], **beside)
            draw_lines(axis, {label: tuple(zip(*means, strict=True))}, [look])
        distance = "distance from the reference, √kl_seq [nats^½]"
        say(axis, f"{title}; beside a point its {along}", distance)
    return figure


def draw_kl(rows: list[Row], path: Path) -> Path:
    """Left: error of the expected gradient of every placement. Right: noise of one sample."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, ((left, right),) = new_figure(11, 0.32 * len(names) + 1.4, 1, 2, sharey=True)
    lanes = {"theta": ("o", 0.2, "on-policy"), "old": ("s", 0.0, "samples of an old policy")}
    lanes["ref"] = ("^", -0.2, "samples of the reference")
    for (sampler,), same in grouped(rows, "sampler").items():
        marker, offset, label = lanes[sampler]
        places = [offset - names.index(row["name"]) for row in same]
        colours = [BLUE if row["right"] else VERMILION for row in same]
        for axis, name in ((left, "error"), (right, "noise")):
            values = [0.0 if abs(row[name]) < ROUNDING else row[name] for row in same]
            axis.scatter(values, places, c=colours, marker=marker, s=22)
        left.scatter([], [], c="gray", marker=marker, s=22, label=label)
    for colour, label in ((BLUE, "right: its mean is g"), (VERMILION, "wrong")):
        left.fill_between([], [], [], color=colour, label=label)
    left.set_xscale("symlog", linthresh=0.1, linscale=0.4)
    left.set_xticks([0, 0.1, 1, 10, 100, 1000], ["0: exact", "0.1", "1", "10", "100", "1000"])
    left.set_yticks([-i for i in range(len(names))], names)
    error = "|mean − g| / |g|,  g = ∇KL(π‖ref), all responses enumerated"
    title = "error of the mean gradient of the penalty: only 0 is right"
    say(left, title, error, legend={"loc": "lower right"})
    right.set_xscale("log")
    say(right, "noise of one sample: lower is better", "sd of one sample's gradient / |g|")
    return save(figure, path)


def geometric_mean(values: Any) -> np.ndarray:
    """Over the first axis, the seeds; what is 0 to rounding counts as 1e-12."""
    return np.exp(np.log(np.maximum(values, ROUNDING)).mean(axis=0))


def draw_optimum(runs: list[Row], path: Path) -> Path:
    """A row for each beta: what is lost, and its spread, over training; what is lost by token."""
    y = "(J* − J) / (J* − J_ref)"  # 1 at the reference
    said = (
        ("β = {:g}: what is still lost; 0 is the optimum", "iteration", y),
        ("Var(r − β·log-ratio): 0 at the optimum", "iteration", "[reward units²]"),
        ("what is lost at the end, by token", "position of the token", y),
    )
    betas = sorted(grouped(runs, "kl_coef").items(), reverse=True)
    figure, axes = new_figure(12, 2.9 * len(betas) + 0.4, len(betas), 3, sharey="col")
    for ((beta,), same), row in zip(betas, axes, strict=True):
        lost, spread, by_token = {}, {}, {}
        for (name,), seeds in grouped(same, "name").items():
            histories = [run["history"] for run in seeds]
            at = [m["iteration"] for m in histories[0]]
            left = [[1 - m["exact/fraction"] for m in history] for history in histories]
            flat = [[m["exact/flatness"] for m in history] for history in histories]
            ends = [history[-1]["exact/gap_by_depth"] for history in histories]
            lost[name], spread[name] = (at, geometric_mean(left)), (at, geometric_mean(flat))
            by_token[name] = range(1, len(ends[0]) + 1), geometric_mean(ends)
        for axis, lines, labels in zip(row, (lost, spread, by_token), said, strict=True):
            draw_lines(axis, lines, log="y")
            say(axis, labels[0].format(beta), *labels[1:])
    return save(figure, path)
