"""Losses on scores: pairs and lists, which way their slopes point, how far they stay finite."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import LOOPS, assert_close

from minirlhf.rlhf.preferences import (
    bradley_terry_backward,
    bradley_terry_forward,
    dpo_backward,
    dpo_forward,
    log_sigmoid,
    plackett_luce_backward,
    plackett_luce_forward,
    sigmoid,
)


@st.composite
def score_lists(draw, *, lo=2, hi=5):
    B, K = draw(st.integers(1, 4)), draw(st.integers(lo, hi))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return draw(st.sampled_from([0.1, 1.0, 10.0])) * rng.standard_normal((B, K))


@given(score_lists(lo=2, hi=2))
def test_bradley_terry_is_plackett_luce_of_two(scores):
    loss, cache = bradley_terry_forward(scores[:, 0].copy(), scores[:, 1].copy())
    gradient = np.stack(bradley_terry_backward(1.0, cache), axis=1)
    other, other_cache = plackett_luce_forward(scores)
    assert_close(other, loss)
    assert_close(plackett_luce_backward(1.0, other_cache), gradient)


@given(score_lists())
def test_only_differences_of_scores_matter(scores):
    shift = np.linspace(-50, 50, len(scores))[:, None]  # another one for each prompt
    loss, cache = plackett_luce_forward(scores)
    moved, _ = plackett_luce_forward(scores + shift)
    assert_close(moved, loss, 1e-10)
    assert_close(plackett_luce_backward(1.0, cache).sum(axis=1), np.zeros(len(scores)))
    pair = [scores[:, 0].copy(), scores[:, 1].copy()]
    moved = bradley_terry_forward(*(s + shift[:, 0] for s in pair))
    assert_close(moved[0], bradley_terry_forward(*pair)[0], 1e-10)


@given(score_lists())
def test_descent_puts_the_better_one_higher(scores):
    forward = plackett_luce_forward
    loss, cache = forward(scores)
    gradient = plackett_luce_backward(1.0, cache)
    assert (gradient[:, 0] <= 0).all() and (gradient[:, -1] >= 0).all()
    assert float(forward(scores - 1e-3 * gradient)[0]) <= float(loss)
    # The right order costs less than the wrong one, and less the further it is spread.
    best = np.sort(scores, axis=1)[:, ::-1].copy()
    assert float(forward(best)[0]) <= float(forward(-best)[0])
    assert float(forward(2 * best)[0]) <= float(forward(best)[0])


@pytest.mark.parametrize("smoothing", [0.05, 0.2])
def test_label_smoothing_stops_at_the_odds_it_believes_in(smoothing):
    """The slope is 0 where sigma(d) = 1 - s, and beyond it turns round."""
    best = math.log((1 - smoothing) / smoothing)

    def slope(d):
        _, cache = bradley_terry_forward(np.array([d]), np.array([0.0]), label_smoothing=smoothing)
        return bradley_terry_backward(1.0, cache)[0][0]

    assert slope(best) == pytest.approx(0.0, abs=LOOPS)
    assert slope(best - 0.1) < 0 < slope(best + 0.1)


@given(score_lists(lo=2, hi=2), st.sampled_from([0.1, 2.0]), st.sampled_from([0.0, 0.1]))
def test_dpo_is_bradley_terry_of_the_implicit_reward(scores, beta, smoothing):
    chosen, rejected = scores[:, 0].copy(), scores[:, 1].copy()
    loss, cache = dpo_forward(chosen, rejected, kl_coef=beta, label_smoothing=smoothing)
    other, other_cache = bradley_terry_forward(
        beta * chosen, beta * rejected, label_smoothing=smoothing
    )
    assert loss == other
    for ours, theirs in zip(
        dpo_backward(1.0, cache), bradley_terry_backward(beta, other_cache), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo_stops_where_the_labels_it_believes_in_lead(beta, smoothing):
    """However sure the labels are, a pair's log-ratios are to differ by (1 - 2 f) / (2 beta)."""
    same = {"kl_coef": beta, "loss": "ipo", "label_smoothing": smoothing}
    for offset, sign in ((-0.1, -1), (0.0, 0), (0.1, 1)):
        x = np.array([(1 - 2 * smoothing) / (2 * beta) + offset])
        slope = dpo_backward(1.0, dpo_forward(x, np.zeros(1), **same)[1])[0][0]
        assert slope == pytest.approx(0.2 * sign, abs=1e-9)


def test_a_margin_asks_for_that_much_more():
    with_margin, _ = bradley_terry_forward(np.array([3.0]), np.array([1.0]), margin=0.5)
    without, _ = bradley_terry_forward(np.array([2.5]), np.array([1.0]))
    assert float(with_margin) == pytest.approx(float(without))


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_extreme_scores_stay_finite(size):
    up, down = np.array([size]), np.array([-size])
    for a, b, loss in [(up, down, 0.0), (down, up, 2 * size)]:
        got, cache = bradley_terry_forward(a, b)
        assert float(got) == pytest.approx(loss)
        assert np.isfinite(bradley_terry_backward(1.0, cache)).all()
    for scores in ([[size, 0.0, -size]], [[-size, 0.0, size]]):
        loss, cache = plackett_luce_forward(np.array(scores))
        assert np.isfinite(loss) and np.isfinite(plackett_luce_backward(1.0, cache)).all()
    x = np.array([-size, 0.0, size])
    assert_close(log_sigmoid(x), [-size, -math.log(2), 0.0])
    assert_close(sigmoid(x), [0.0, 0.5, 1.0])


def test_preferences_refuse():
    with pytest.raises(ValueError, match=r"one shape \(B,\), B > 0; got \(2,\) and \(3,\)"):
        bradley_terry_forward(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"B > 0; got \(0,\)"):
        bradley_terry_forward(np.zeros(0), np.zeros(0))
    for smoothing in (-0.1, 0.5, 1.0, math.nan):  # from a half on, the rejected one is preferred
        with pytest.raises(ValueError, match=rf"label_smoothing in \[0, 0.5\); got {smoothing}"):
            bradley_terry_forward(np.zeros(2), np.zeros(2), label_smoothing=smoothing)
    for loss in ("sigmoid", "ipo"):
        same = {"kl_coef": 0.1, "loss": loss}
        with pytest.raises(ValueError, match=r"dpo: expected log_ratio_chosen and .* and \(3,\)"):
            dpo_forward(np.zeros(2), np.zeros(3), **same)
        with pytest.raises(ValueError, match=r"dpo: expected label_smoothing in \[0, 0.5\); got 1"):
            dpo_forward(np.zeros(2), np.zeros(2), label_smoothing=1, **same)
    with pytest.raises(ValueError, match="dpo: expected kl_coef > 0.*; got 0"):
        dpo_forward(np.zeros(2), np.zeros(2), kl_coef=0.0)
    with pytest.raises(ValueError, match="dpo: expected the loss sigmoid or ipo; got 'hinge'"):
        dpo_forward(np.zeros(2), np.zeros(2), kl_coef=0.1, loss="hinge")
    for shape in ((3, 1), (3,), (0, 3)):
        with pytest.raises(ValueError, match=r"expected scores \(B, K\) with .* K >= 2; got"):
            plackett_luce_forward(np.zeros(shape))
