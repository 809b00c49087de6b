"""Pictures of the benchmark: ratios, share of the machine's peak, growth."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]
COLOURS = {
    "PyTorch": "#0072B2",  # Okabe and Ito: a colour-blind reader can tell them apart
    "torch.compile": "#56B4E9",
    "JAX": "#E69F00",
    "TRL": "#000000",
}
TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of ratios
AXES = {
    "batch_size": "responses in the batch",
    "response_len": "tokens of a response",
    "d_model": "channels",
    "vocab_size": "vocabulary",
}


def draw(rows: list[Row], growth: list[Row], out: Path) -> list[Path]:
    """The pictures that these results allow, as files in `out`."""
    paths = []
    if any(row["program"] in COLOURS for row in rows):
        paths.append(draw_ratios(rows, out / "bench.png"))
    if growth:
        paths.append(draw_growth(growth, out / "bench_growth.png"))
    return paths


def draw_ratios(rows: list[Row], path: Path) -> Path:
    """How many times as long as ours each peer takes: a bar a peer, its quartiles as a line."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(3.6 * len(workloads) + 1, 3.4), layout="constrained")
    axes = figure.subplots(1, len(workloads), squeeze=False)[0]
    for axis, workload in zip(axes, workloads, strict=True):
        same = [r for r in rows if r["workload"] == workload and r["program"] in COLOURS]
        parts = list(dict.fromkeys(row["part"] for row in same))
        for row in same:
            names = [r["program"] for r in same if r["part"] == row["part"]]
            width = 0.8 / len(names)
            place = parts.index(row["part"]) + width * (names.index(row["program"]) + 0.5) - 0.4
            low, high = row["quartiles"]
            axis.bar(
                place,
                row["ratio"],
                width,
                color=COLOURS[row["program"]],
                alpha=0.4 if row["noisy"] else 1.0,
                yerr=[[row["ratio"] - low], [high - row["ratio"]]],
            )
            axis.text(place, high, f" {row['ratio']:.2g}", rotation=90, fontsize=7, ha="center")
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set_yscale("log")
        ends = [end for row in same for end in row["quartiles"]]
        bottom, top = 0.9 * min(1.0, *ends), 1.2 * max(1.0, *ends)  # the number above stays inside
        axis.set_ylim(bottom, top)
        ticks = [tick for tick in TICKS if bottom <= tick <= top]
        axis.set_yticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.set_xticks(range(len(parts)), parts)
        axis.set_title(workload, fontsize=10)
    figure.axes[0].set_ylabel("time / minirlhf's time")
    handles = [figure.axes[0].bar(0, 0, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=4, fontsize=8)
    return _save(figure, path)


def draw_growth(rows: list[Row], path: Path) -> Path:
    """Time and memory of the PPO loss against each size, both axes logarithmic."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(2, len(AXES))
    for column, (name, label) in enumerate(AXES.items()):
        same = [row for row in rows if row["axis"] == name]
        values = [row["value"] for row in same]
        for panel, key, unit in (
            (panels[0, column], "seconds", 1e3),
            (panels[1, column], "memory", 1 / 2**20),
        ):
            panel.plot(values, [unit * row[key] for row in same], marker="o")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(values, map(str, values))
        panels[1, column].set_xlabel(label)
    panels[0, 0].set_ylabel("PPO loss and gradients [ms]")
    panels[1, 0].set_ylabel("memory above the libraries' [MiB]")
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    return path
