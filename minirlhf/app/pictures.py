"""Pictures of the exact experiments: what `minirlhf exact` and the examples save."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from minirlhf.exact.optimum import GaoFit

Row = dict[str, Any]
RIGHT_COLOUR, WRONG_COLOUR = "tab:green", "tab:red"
BETA_COLOURS = {2.0: "tab:gray", 1.0: "tab:blue", 0.5: "tab:orange", 0.25: "tab:green"}


def _colour(beta: float) -> str:
    return BETA_COLOURS.get(beta, "tab:red")


def _save(figure: Figure, path: Path) -> Path:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    return path


def draw_kl(rows: list[Row], path: Path) -> Path:
    """Left: error of the expected gradient of every placement. Right: noise of one sample."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(11, 0.36 * len(names) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lanes = {"theta": (0.2, 1.0), "old": (-0.15, 0.6), "ref": (-0.42, 0.35)}  # offset, opacity
    for sampler, (offset, opacity) in lanes.items():
        same = [row for row in rows if row["sampler"] == sampler]
        places = [offset - names.index(row["name"]) for row in same]
        look = {
            "color": [RIGHT_COLOUR if row["right"] else WRONG_COLOUR for row in same],
            "height": 0.2 if sampler == "ref" else 0.34,
            "alpha": opacity,
            "label": {"theta": "on-policy", "old": "samples of old", "ref": "of ref"}[sampler],
        }
        left.barh(places, [max(row["error"], 1e-17) for row in same], left=1e-17, **look)
        right.barh(places, [row["noise"] for row in same], **look)
    left.set_xscale("log")
    left.set_xlim(1e-17, 3 * max(row["error"] for row in rows))
    left.set_yticks([-i for i in range(len(names))], names)
    left.set_title("|E[estimate] − g| / |g|,  g = ∇KL(π‖ref), by enumeration", fontsize=9)
    left.legend(fontsize=7, loc="center", bbox_to_anchor=(0.6, 0.17))  # where the bars are short
    right.set_xscale("log")
    right.set_title("noise of one sample: sd of the estimate / |g|", fontsize=9)
    return _save(figure, path)


def draw_advantages(gae: list[Row], surrogate: list[Row], path: Path) -> Path:
    """GAE's bias and noise against lambda; PPO's surrogate as theta leaves old."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    bias, noise, cosines = figure.subplots(1, 3)
    for value in dict.fromkeys(row["value"] for row in gae):
        rows = [row for row in gae if row["value"] == value]
        lams = [row["lam"] for row in rows]
        bias.semilogy(lams, [max(row["bias"], 1e-17) for row in rows], "-o", ms=3, label=value)
        noise.plot(lams, [row["noise"] for row in rows], "-o", ms=3, label=value)
    bias.set_title("bias of the policy gradient / |∇J|", fontsize=9)
    noise.set_title("noise of one sample / |∇J|", fontsize=9)
    for axis in (bias, noise):
        axis.set_xlabel("GAE's λ", fontsize=8)
    if gae:
        bias.legend(title="value", fontsize=7, title_fontsize=7)
    kl = [row["kl_old_seq"] for row in surrogate]
    for name in ("clipped", "unclipped", "clip_fraction"):
        style = ":" if name == "clip_fraction" else "-o"
        label = name.replace("_", " ")
        cosines.semilogx(kl, [row[name] for row in surrogate], style, ms=3, label=label)
    cosines.set_title("cosine of the surrogate's gradient with ∇J(θ)", fontsize=9)
    cosines.set_xlabel("KL(old‖θ) [nats per response]", fontsize=8)
    cosines.legend(fontsize=7, loc="center left")
    return _save(figure, path)


def draw_flatness(rows: list[Row], path: Path) -> Path:
    """Noise of one sample's policy gradient against the distance to the optimum."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axis = figure.subplots()
    rows = [row for row in rows if row["gap"] > 1e-9]
    gap = [row["gap"] for row in rows]
    axis.loglog(gap, [row["k1"] for row in rows], "-o", label="sampled k1 in the reward")
    axis.loglog(gap, [row["full"] for row in rows], "-s", label="whole-vocabulary KL")
    axis.invert_xaxis()
    axis.set_xlabel("J* − J  (the optimum is on the right)")
    axis.set_ylabel("variance of one sample's gradient")
    axis.set_title("at the optimum r − β·log-ratio is flat: the noise of k1 is gone", fontsize=9)
    axis.legend(fontsize=8)
    return _save(figure, path)


def draw_optimum(runs: list[Row], path: Path) -> Path:
    """1 - fraction and Var(r - beta log_ratio) over training, and where the rest is lost.

    A line is the geometric mean over the seeds.
    """
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    gap, flat, depth = figure.subplots(1, 3)
    styles = {"PPO, linear decay": "-", "PPO, constant rate": ":", "one-step RLOO": "--"}
    for name, beta in dict.fromkeys((run["name"], run["kl_coef"]) for run in runs):
        histories = [r["history"] for r in runs if (r["name"], r["kl_coef"]) == (name, beta)]
        x = [row["iteration"] for row in histories[0]]
        look = {"ls": styles[name], "color": _colour(beta), "label": f"{name}, β = {beta:g}"}
        lost = [[1 - row["exact/fraction"] for row in history] for history in histories]
        gap.semilogy(x, _geometric_mean(lost), **look)
        noise = [[row["exact/flatness"] for row in history] for history in histories]
        flat.semilogy(x, _geometric_mean(noise), **look)
        at_end = _geometric_mean([history[-1]["exact/gap_by_depth"] for history in histories])
        depth.semilogy(range(1, len(at_end) + 1), at_end, **look, marker=".")
    gap.set_title("(J* − J) / (J* − E_ref r)", fontsize=9)
    flat.set_title("Var(r − β·log-ratio): 0 at the optimum", fontsize=9)
    depth.set_title("the same gap at the end, by token", fontsize=9)
    for axis in (gap, flat):
        axis.set_xlabel("iteration", fontsize=8)
    depth.set_xlabel("position of the token", fontsize=8)
    handles = flat.get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize=7)
    return _save(figure, path)


def _geometric_mean(values: list[list[float]]) -> np.ndarray:
    """Over the first axis; what is 0 to rounding counts as 1e-12."""
    return np.exp(np.log(np.maximum(values, 1e-12)).mean(axis=0))


def draw_runs(groups: dict[str, list[Row]], path: Path) -> Path:
    """The distance to the optimum over training: a panel a group, a colour a name."""
    figure = Figure(figsize=(5.5 * len(groups), 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(groups)))
    for axis, (title, runs) in zip(axes, groups.items(), strict=True):
        names = list(dict.fromkeys(run["name"] for run in runs))
        for name in names:
            same = [run for run in runs if run["name"] == name]
            for run in same:
                x = [row["iteration"] for row in run["history"]]
                y = [1 - row["exact/fraction"] for row in run["history"]]
                label = name if run is same[0] else None
                axis.semilogy(x, y, color=f"C{names.index(name)}", label=label)
        axis.axhline(1.0, color="black", lw=0.8)
        axis.annotate(
            "the reference", (1.0, 1.0), xycoords=("axes fraction", "data"), fontsize=7, ha="right"
        )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("iteration", fontsize=8)
        axis.set_ylabel("(J* − J) / (J* − E_ref r)", fontsize=8)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return _save(figure, path)


def _distance(kl_seq: float) -> float:
    """sqrt(KL); rounding may leave a KL of 0 a little below it."""
    return max(kl_seq, 0.0) ** 0.5


def draw_overoptimisation(result: Row, runs: list[Row], path: Path) -> Path:
    """Proxy and gold against sqrt(KL): the frontier, best-of-n, and where PPO ended."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve, drawn = result["curve"], result["best_of_n"]
    for axis, key in ((left, "reward"), (right, "gold")):
        start = [(0.0, result["reference"][key])]
        for rows, style, name in (
            (curve, "-", "optimum at this KL, π ∝ ref·exp(proxy/β)"),
            (drawn, "--s", "best of n"),
        ):
            points = start + [(_distance(row["kl_seq"]), row[key]) for row in rows]
            axis.plot(*zip(*sorted(points), strict=True), style, ms=3, label=name)
        for run in runs:
            end = run["history"][-1]
            label = "PPO" if run is runs[0] else None
            point = (_distance(end["exact/kl_seq"]), end[f"exact/{key}"])
            axis.plot(*point, "o", color="tab:red", ms=5, label=label)
            axis.annotate(f" β={run['kl_coef']:g}", point, fontsize=7)
        axis.set_xlabel("√KL(π‖ref) [nats^½ per response]", fontsize=8)
    left.set_title("proxy: what is maximised; nothing lies above the curve", fontsize=9)
    right.set_title("gold: what is wanted; it falls again", fontsize=9)
    d = np.linspace(0.05, _distance(curve[-1]["kl_seq"]), 200)
    for fit in result["fits"]:
        if fit["of"] == "tilt":
            gain = GaoFit(*(fit[name] for name in GaoFit._fields))(d)
            label = f"Gao's law ({fit['law']}), R² = {fit['r_squared']:.3f}"
            right.plot(d, result["reference"]["gold"] + gain, ":", lw=1, label=label)
    low = min(row["gold"] for row in curve)
    right.set_ylim(low - 0.3, max(row["gold"] for row in drawn) + 0.3)
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    return _save(figure, path)
