"""Pictures: few lines, colours that every eye can tell apart, rounding drawn as 0, plain words."""

import json

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from minirlhf.app import exact, pictures
from minirlhf.app.pictures import LOOKS, ROUNDING, curves_figure, geometric_mean, grouped
from minirlhf.exact import expected

PALETTE = {look["color"].lower() for look in LOOKS}


def luminance(colour):
    """Relative luminance of sRGB, from 0 (black) to 1."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_looks_differ_by_more_than_colour():
    for name in ("color", "marker", "ls"):
        assert len({str(look[name]) for look in LOOKS}) == len(LOOKS) == 5
    assert not {"#ff0000", "#008000"} & PALETTE
    light = sorted(map(luminance, PALETTE))  # in black and white, too
    assert all(b - a > 0.01 for a, b in zip(light, light[1:], strict=False))


def drawn(monkeypatch, tmp_path, results):
    """The figures of a run of `minirlhf exact`."""
    figures = []

    def save(figure, path):
        figures.append(figure)
        return path

    monkeypatch.setattr(pictures, "save", save)
    for part, rows in results.items():
        exact.PICTURES[part](rows, tmp_path / "a.png")
    return figures


def check_axis(axis):
    lines = [line for line in axis.get_lines() if len(line.get_xdata())]
    assert len(lines) <= 5
    assert all(to_hex(line.get_color()) in PALETTE for line in lines)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines)
    assert axis.get_title() and axis.get_xlabel()
    assert axis.get_title() == axis.get_title().strip()
    for scale, limits in (
        (axis.get_xscale(), axis.get_xlim()),
        (axis.get_yscale(), axis.get_ylim()),
    ):
        assert scale != "log" or min(limits) >= ROUNDING / 10


def test_pictures_of_trained_policies(everything, monkeypatch, tmp_path):
    results = json.loads(json.dumps(everything[1]))
    runs = results["optimum"]
    runs += [{**run, "seed": 1} for run in runs]  # a line is the mean of its seeds
    figures = drawn(monkeypatch, tmp_path, results)
    assert len(figures) == 2
    for figure in figures:
        for axis in figure.axes:
            check_axis(axis)
    by_beta = next(figure for figure in figures if len(figure.axes) == 9)
    assert all(len(axis.get_lines()) == 3 for axis in by_beta.axes)


def test_pictures_of_gradients(monkeypatch, tmp_path):
    results = {"kl": expected.kl_gradient_table()}
    (figure,) = drawn(monkeypatch, tmp_path, results)
    for axis in figure.axes:
        check_axis(axis)
    left, right = figure.axes
    assert left.get_xlim()[0] > -1 and "0: exact" in [t.get_text() for t in left.get_xticklabels()]
    dots = [c for c in left.collections if isinstance(c, PathCollection)]
    points = np.concatenate([np.asarray(c.get_offsets())[:, 0] for c in dots])
    assert (points == 0).sum() == sum(row["right"] for row in results["kl"])  # rounding is 0
    noise = [c for c in right.collections if isinstance(c, PathCollection)]
    assert all((np.asarray(c.get_offsets())[:, 0] > 0).all() for c in noise)


def test_curves_of_a_run():
    rows = [{"stage": "sft", "step": i, "loss/sft": 2.0 - 0.001 * i} for i in range(850)]
    rows += [{"stage": "sft", "step": i, "heldout/loss_sft": 1.2} for i in (0, 425, 850)]
    rows += [
        {"stage": "ppo", "step": step, "objective/scores": 1.0, "objective/reward": 40.0 + step}
        for step in range(3)
    ]
    rows[-1] |= {"eval/reward": 39.0, "eval/gold": None, "objective/kl": "none"}
    figure = curves_figure(rows)
    for axis in figure.axes:
        check_axis(axis)
    lines = {axis.get_title().split(":")[0]: axis.get_lines() for axis in figure.axes}
    assert list(lines) == ["fine-tuning", "score", "your reward"]  # what was measured
    training, held_out = lines["fine-tuning"]
    assert list(training.get_xdata()[[0, -1]]) == [1, 850]
    assert list(held_out.get_xdata()) == [0, 425, 850]
    assert [line.get_label() for line in lines["your reward"]] == ["training", "held out"]
    assert list(lines["your reward"][0].get_ydata()) == [40, 41, 42]  # in its own units
    assert list(lines["your reward"][1].get_xdata()) == [3]
    curves_figure([])  # of a run that was stopped at once


def test_the_last_evaluation_is_drawn():
    """Of the final table, where it is not the one of the last iteration."""
    rows = [{"stage": "ppo", "step": i, "objective/kl": 0.1 * i} for i in range(5)]
    rows[1]["eval/kl_seq"] = 0.2
    last = {"kl_seq": 0.5, "gold": float("nan"), "reward": None}

    def points(rows):
        (axis,) = curves_figure(rows, last).axes  # nothing of gold, which is not known
        return [tuple(xy) for xy in axis.get_lines()[1].get_xydata()]

    assert points(rows) == [(2, 0.2), (5, 0.5)]
    rows[-1]["eval/kl_seq"] = 0.5
    assert points(rows) == [(2, 0.2), (5, 0.5)]


def test_tokens_are_coloured_by_what_they_pay():
    figure, ((axis,),) = pictures.new_figure(4, 3, 1, 1)
    numbers = np.array([3.0, 0.0, -3.0])
    replies = {"a": (["x", " $y", "$"], numbers), "b": (["z"], [np.nan])}
    pictures.draw_tokens(axis, replies, limit=3.0, width=2)
    figure.canvas.draw()  # a lone $ would be an error of mathtext
    colours = (box.get_facecolor()[0] for box in axis.collections)
    red, white, blue, _ = (1 - alpha * (1 - np.array(rgb)) for *rgb, alpha in colours)
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0] and min(white) == 1
    beyond = {"a": (["x", "y"], [30.0, -30.0])}  # has the colour of the limit
    _, ((other,),) = pictures.new_figure(4, 3, 1, 1)
    pictures.draw_tokens(other, beyond, limit=3.0)
    for box, limit in zip(other.collections, axis.collections[::2], strict=False):
        np.testing.assert_array_equal(box.get_facecolor(), limit.get_facecolor())
    assert [box.get_hatch() for box in axis.collections] == [None] * 3 + ["///"]
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["a", "x\n+3.00", "$y\n+0.00", "$\n-3.00", "b", "z"]
    tops = [round(text.get_position()[1], 2) for text in axis.texts]
    assert tops[1] == tops[2] > tops[3] > tops[4] > tops[5]  # two boxes a line


def test_a_line_of_several_seeds_is_their_geometric_mean():
    assert geometric_mean([[1.0, 4.0], [1e-2, 1.0]]) == pytest.approx([0.1, 2.0])
    assert geometric_mean([[0.0], [1.0]]) == pytest.approx([1e-6])  # 0 is shown as 1e-12


def test_rows_are_grouped_by_what_stands_under_some_names():
    rows = [{"name": name, "beta": beta} for name in "ba" for beta in (1, 2, 1)]
    assert list(grouped(rows, "name")) == [("b",), ("a",)]  # in the order of the rows
    groups = grouped(rows, "name", "beta")
    assert {key: len(same) for key, same in groups.items()} == {
        ("b", 1): 2,
        ("b", 2): 1,
        ("a", 1): 2,
        ("a", 2): 1,
    }
    assert groups["a", 1] == [rows[3], rows[5]] and grouped([], "name") == {}


def frontier_row(seed, **changes):
    row = {"name": "x", "seed": seed, "kl_coef": 0.2, "kl_seq": 4.0 + seed, "gold": float(seed)}
    return {**row, "proxy": 1.0, "reward": np.nan, **changes}


def test_the_frontier_joins_the_means_over_seeds_in_the_order_of_beta():
    rows = [frontier_row(seed, kl_coef=beta) for beta in (0.2, 0.0) for seed in (0, 5)]
    rows[2] |= {"kl_seq": -1e-3, "proxy": 7.0}
    figure = pictures.frontier_figure(rows)
    proxy, gold = figure.axes
    for axis in figure.axes:
        check_axis(axis)
        assert [text.get_text() for text in axis.texts] == ["0", "0.2"]
        assert axis.get_title().endswith("beside a point its kl_coef")
        assert sum(len(dots.get_offsets()) for dots in axis.collections) == 4  # every run
    x, y = proxy.get_lines()[0].get_data()
    np.testing.assert_allclose(x, [1.5, 2.5])  # sqrt of 0 and 9, of 4 and 9
    np.testing.assert_allclose(y, [4.0, 1.0])
    np.testing.assert_allclose(gold.get_lines()[0].get_ydata(), [2.5, 2.5])


def test_what_varies_beside_beta_gets_a_line_of_its_own():
    settings = [{"recipe": name, "kl_coef": x} for name in ("ppo", "grpo") for x in (0.0, 0.2)]
    rows = [frontier_row(0, kl_coef=s["kl_coef"], settings=s) for s in settings]
    proxy, _ = pictures.frontier_figure(rows).axes
    check_axis(proxy)
    labels = [text.get_text() for text in proxy.get_legend().get_texts()]
    assert labels == ["recipe ppo", "recipe grpo"]
    rows = [frontier_row(0, settings={"lam": lam}) for lam in (0.9, 0.5)]
    axis = pictures.frontier_figure(rows).axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.9", "0.5"]  # as they were named
    assert axis.get_title().endswith("its lam")
