"""Pictures for people: what `minirlhf train`, `minirlhf exact` and the examples save.

At most five lines an axis, in colours that every eye can tell apart (Okabe and Ito) and with a
marker each. A number that differs from 0 by rounding alone is drawn as 0.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minirlhf.disk import write_whole
from minirlhf.exact.optimum import GaoFit

Row = dict[str, Any]
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

    White is 0, the colours reach from -limit to limit; what has no number, nan, is hatched.
    """
    from matplotlib import colormaps

    y, look = 0.0, {"fontsize": 7, "ha": "center", "va": "center", "parse_math": False}
    for heading, (tokens, numbers) in replies.items():
        axis.text(0, y, heading, fontsize=8, weight="bold")
        for i, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
            x, top, text = i % width, y - i // width - 0.15, f"{token.strip()}\n{number:+.2f}"
            fill = {"facecolor": colormaps["RdBu_r"](0.5 + 0.32 * number / limit)}
            if np.isnan(number):
                fill, text = {"facecolor": "w", "hatch": "///"}, token.strip()
            axis.fill_between([x, x + 0.96], top - 0.8, top, edgecolor="silver", lw=0.5, **fill)
            axis.text(x + 0.48, top - 0.4, text, **look)
        y -= -(-len(tokens) // width) + 0.5
    axis.set(xlim=(0, width), ylim=(y + 0.3, 0.4))
    axis.set_axis_off()


def save(figure, path: Path) -> Path:
    """The figure as a file, with a grid on every axis.

    Raises:   InputError: the disk or the permissions refuse.
    """
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format=path.suffix[1:])
    write_whole(path, drawn.getvalue())
    return path


def _column(rows: list[Row], *names: str) -> tuple[list[float], ...]:
    """Columns of rows; rounding as 0."""
    return tuple(
        [0.0 if abs(row[name]) < ROUNDING else row[name] for row in rows] for name in names
    )


def grouped(rows: list[Row], *names: str) -> dict[tuple, list[Row]]:
    """{values under these names: the rows that have them}, like (name, beta): runs, one a seed."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


CURVES = {  # title -> unit, what is measured while a stage learns, and of what was held out
    "fine-tuning: its loss": ("nats per token", "loss/sft", "heldout/loss_sft"),
    "reward model: its loss": ("nats per pair", "loss/reward_model", "heldout/loss_reward_model"),
    "pairs in the right order": ("share", "accuracy", "heldout/accuracy", "rewards/accuracies"),
    "DPO: its loss": ("per pair", "loss/dpo", "heldout/loss_dpo"),
    "score: what PPO raises": ("sd of the reference's", "objective/scores", "eval/proxy"),
    "gold: what is wanted": ("its own units", "objective/gold", "eval/gold"),
    "your reward": ("its own units", "objective/reward", "eval/reward"),
    "KL to the reference: how far it went": ("nats per reply", "objective/kl", "eval/kl_seq"),
    "entropy: 0 is no choice": ("nats per token", "policy/entropy_avg", "eval/entropy"),
    "length of a reply": ("tokens", "response_length/mean", "eval/length"),
}


def curves_figure(metrics: list[Row], last: Row | None = None) -> Any:
    """The panels of CURVES for which a run's metrics, or the last table of PPO, have numbers."""
    panels = []
    if last and metrics and metrics[-1]["stage"] == "ppo" and "eval/kl_seq" not in metrics[-1]:
        of_last = {f"eval/{name}": x for name, x in last.items() if x == x}
        metrics = [*metrics, {"stage": "ppo", "step": metrics[-1]["step"], **of_last}]
    for title, (unit, *names) in CURVES.items():
        rows = [[row for row in metrics if isinstance(row.get(n), int | float)] for n in names]
        if any(rows):
            panels.append((title, unit, zip(LOOKS, names, rows, strict=False)))
    columns = min(3, len(panels)) or 1
    n_rows = -(-len(panels) // columns) or 1
    figure, axes = new_figure(3.7 * columns, 2.8 * n_rows, n_rows, columns)
    for axis, (title, unit, lines) in zip(axes.flat, panels, strict=False):
        for look, name, rows in (line for line in lines if line[2]):
            counts = name.startswith("heldout/")  # the updates before it, not the one of its row
            points = [row["step"] + (not counts) for row in rows], [row[name] for row in rows]
            label = "held out" if counts or name.startswith("eval/") else "training"
            every = -(-len(rows) // 20)  # 850 markers would hide the line
            draw_lines(axis, {label: points}, [{**look, "markevery": every}])
            x = "PPO iteration" if rows[0]["stage"] == "ppo" else "update"
            axis.xaxis.get_major_locator().set_params(integer=True)
        say(axis, title, x, unit)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
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
        for axis, values in zip((left, right), _column(same, "error", "noise"), strict=True):
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


def draw_advantages(gae: list[Row], surrogate: list[Row], path: Path) -> Path:
    """GAE's bias and noise against lambda; PPO's surrogate as theta leaves old."""
    figure, ((bias, noise, cosines),) = new_figure(12, 3.4, 1, 3)
    values = grouped(gae, "value").items()
    for axis, name in ((bias, "bias"), (noise, "noise")):
        draw_lines(axis, {f"V: {value}": _column(rows, "lam", name) for (value,), rows in values})
    say(bias, "bias: 0 at λ = 1 and with an exact value", "λ of GAE", "|mean − ∇J| / |∇J|")
    say(noise, "noise: what a smaller λ saves", "λ of GAE", "sd of one sample / |∇J|")
    names = {"clipped": "cosine, clipped", "unclipped": "cosine, not clipped"}
    names["clip_fraction"] = "share of tokens cut off"
    lines = {label: _column(surrogate, "kl_old_seq", name) for name, label in names.items()}
    draw_lines(cosines, lines, log="x")
    title = "a cosine of 1: PPO's surrogate points along ∇J"
    say(cosines, title, "KL(old‖θ) [nats per response]", legend={"loc": "center left"})
    return save(figure, path)


def draw_flatness(rows: list[Row], path: Path) -> Path:
    """Noise of one sample's policy gradient against the distance to the optimum."""
    figure, ((axis,),) = new_figure(5.8, 3.8, 1, 1)
    rows = [row for row in rows if row["gap"] > 1e-9]
    names = {"k1": "sampled k1 in the reward", "full": "KL over the whole vocabulary"}
    draw_lines(axis, {label: _column(rows, "gap", n) for n, label in names.items()}, log="xy")
    axis.invert_xaxis()
    title = "towards the optimum k1's noise goes to 0, the full KL's does not"
    say(axis, title, "J* − J [reward units]; the optimum is on the right", "variance of one sample")
    return save(figure, path)


def geometric_mean(values: Any) -> np.ndarray:
    """Over the first axis, the seeds; what is 0 to rounding counts as 1e-12."""
    return np.exp(np.log(np.maximum(values, ROUNDING)).mean(axis=0))


def _lost(run: Row) -> list[tuple]:
    """Along a run, (J* - J) / (J* - E_ref r): 1 at the reference, 0 at the optimum."""
    return [(row["iteration"], 1 - row["exact/fraction"]) for row in run["history"]]


def _means(runs: list[Row], of: Callable[[Row], list[tuple]]) -> dict[str, tuple]:
    """{name: (x, mean of y over the seeds)} of the points that `of` sees in a run."""
    named = grouped(runs, "name").items()
    points = {name: np.array([of(run) for run in same]) for (name,), same in named}
    return {name: (xy[0, :, 0], geometric_mean(xy[..., 1])) for name, xy in points.items()}


def draw_optimum(runs: list[Row], path: Path) -> Path:
    """A row for each beta: what is lost, and its spread, over training; what is lost by token."""

    def spread(run: Row) -> list[tuple]:
        return [(row["iteration"], row["exact/flatness"]) for row in run["history"]]

    def by_token(run: Row) -> list[tuple]:
        return list(enumerate(run["history"][-1]["exact/gap_by_depth"], 1))

    y, lost = "(J* − J) / (J* − J_ref)", "β = {:g}: what is still lost; 0 is the optimum"
    panels = (
        (_lost, lost, "iteration", y),
        (spread, "Var(r − β·log-ratio): 0 at the optimum", "iteration", "[reward units²]"),
        (by_token, "what is lost at the end, by token", "position of the token", y),
    )
    betas = sorted(grouped(runs, "kl_coef").items(), reverse=True)
    figure, axes = new_figure(12, 2.9 * len(betas) + 0.4, len(betas), 3, sharey="col")
    for ((beta,), same), row in zip(betas, axes, strict=True):
        for axis, (points, title, *labels) in zip(row, panels, strict=True):
            draw_lines(axis, _means(same, points), log="y")
            say(axis, title.format(beta), *labels)
    return save(figure, path)


def draw_runs(groups: dict[str, list[Row]], path: Path) -> Path:
    """The distance to the optimum over training: a panel a group, a line a name."""
    figure, axes = new_figure(5.6 * len(groups), 4.2, 1, len(groups))
    for axis, (title, runs) in zip(axes[0], groups.items(), strict=True):
        draw_lines(axis, _means(runs, _lost), log="y")
        top = max(2.0, axis.get_ylim()[1])
        axis.axhspan(1, top, color="gray", alpha=0.15, lw=0, label="worse than the reference")
        axis.set_ylim(top=top)
        y = "(J* − J) / (J* − J_ref): lower is better"
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
        say(axis, title, "iteration", y, legend=below)
    return save(figure, path)


def draw_overoptimisation(result: Row, runs: list[Row], path: Path) -> Path:
    """Proxy and gold against sqrt(KL): the frontier, best-of-n, and where PPO ended."""
    figure, ((left, right),) = new_figure(11, 4.2, 1, 2)
    families = {"π ∝ ref·exp(proxy/β)": result["curve"], "best of n": result["best_of_n"]}
    for axis, key in ((left, "reward"), (right, "gold")):
        lines = {}
        for label, rows in families.items():
            points = [(0.0, result["reference"][key])]
            points += [(_distance(row["kl_seq"]), row[key]) for row in rows]
            lines[label] = tuple(zip(*sorted(points), strict=True))
        draw_lines(axis, lines)
        ends = [run["history"][-1] for run in runs]
        points = [(_distance(end["exact/kl_seq"]), end[f"exact/{key}"]) for end in ends]
        axis.scatter(*zip(*points, strict=True), c=BLACK, marker="*", s=60, label="PPO, trained")
        for run, point in zip(runs, points, strict=True):
            offset = {"xytext": (0, -12), "textcoords": "offset points", "ha": "center"}
            axis.annotate(f"β={run['kl_coef']:g}", point, fontsize=7, **offset)
    d = np.linspace(0.05, _distance(result["curve"][-1]["kl_seq"]), 200)
    laws = {}
    for fit in (fit for fit in result["fits"] if fit["of"] == "tilt"):
        gain = GaoFit(*(fit[name] for name in GaoFit._fields))(d)
        label = f"Gao's law ({fit['law']}), R² = {fit['r_squared']:.3f}"
        laws[label] = (d, result["reference"]["gold"] + gain)
    draw_lines(right, laws, [{**look, "marker": "", "lw": 1} for look in LOOKS[2:]])
    x = "√KL(π‖ref) [nats^½ per response]"
    say(left, "proxy, what is maximised: nothing lies above the curve", x, "E[proxy]")
    say(right, "gold, what is wanted: it rises, turns and falls", x, "E[gold]")
    gold = [row["gold"] for row in result["curve"] + result["best_of_n"]]
    right.set_ylim(min(gold) - 0.3, max(gold) + 0.3)
    return save(figure, path)


def _distance(kl_seq: float) -> float:
    """sqrt(KL); rounding may leave a KL of 0 a little below it."""
    return max(kl_seq, 0.0) ** 0.5
