"""Losses: which way each slope points, at the edges too, and what must not change a loss."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import ragged, with_junk
from tolerances import LOOPS, assert_close

from minirlhf.rlhf.logprobs import token_logprobs_forward
from minirlhf.rlhf.objectives import (
    AGGREGATIONS,
    bradley_terry_backward,
    bradley_terry_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    kl_loss_backward,
    kl_loss_forward,
    log_sigmoid,
    plackett_luce_backward,
    plackett_luce_forward,
    ppo_clip_backward,
    ppo_clip_forward,
    ranked_pairs_backward,
    ranked_pairs_forward,
    sigmoid,
    token_weights,
    value_loss_backward,
    value_loss_forward,
    weighted_sum_backward,
    weighted_sum_forward,
)

# -- PPO -----------------------------------------------------------------------------------------


def obj_and_slope(ratio, advantage, **settings):
    """The objective of one token and d obj / d ratio (d ratio / d logp is the ratio)."""
    one = np.ones((1, 1))
    loss, cache = ppo_clip_forward(
        np.log(ratio) * one, old_logp=0 * one, advantages=advantage * one, weights=one, **settings
    )
    return -float(loss), -float(ppo_clip_backward(1.0, cache)[0, 0]) / ratio


RATIOS = (0.5, 0.9, 1.1, 1.5, 4.0)
SLOPES = [  # clip, dual clip, advantage, slope in the ratio at each of RATIOS
    ("ppo", None, 1.0, (1, 1, 1, 0, 0)),
    ("book", None, 1.0, (1, 1, 1, 0, 0)),
    ("none", None, 1.0, (1, 1, 1, 1, 1)),
    ("ppo", None, -1.0, (0, -1, -1, -1, -1)),
    ("ppo", 3.0, -1.0, (0, -1, -1, -1, 0)),
    ("ppo", 3.0, 1.0, (1, 1, 1, 0, 0)),
    ("book", None, -1.0, (-1, -1, -1, 0, 0)),
    ("none", None, -1.0, (-1, -1, -1, -1, -1)),
    ("none", 3.0, -1.0, (-1, -1, -1, -1, 0)),
]


@pytest.mark.parametrize(("clip", "dual_clip", "advantage", "slopes"), SLOPES)
def test_slopes_in_the_four_quadrants(clip, dual_clip, advantage, slopes):
    for ratio, slope in zip(RATIOS, slopes, strict=True):
        _, got = obj_and_slope(ratio, advantage, clip_eps=0.2, clip=clip, dual_clip=dual_clip)
        assert got == pytest.approx(slope, abs=LOOPS), ratio


@pytest.mark.parametrize("clip", ["ppo", "book", "none"])
@pytest.mark.parametrize("advantage", [2.0, -1.5])
@pytest.mark.parametrize("clip_eps", [0.2, 0.0, (0.0, 0.0)])
def test_the_first_update_counts(clip, advantage, clip_eps):
    """At ratio 1 both branches tie: value and slope are A, even with an empty range."""
    got = obj_and_slope(1.0, advantage, clip_eps=clip_eps, clip=clip)
    assert got == (advantage, advantage)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.25, 2.0), (0.75, -2.0)])
def test_at_the_edge_the_slope_is_that_of_the_inside(ratio, advantage):
    log_ratio = math.log(ratio)
    exact = math.exp(log_ratio)  # what the code will see
    clip_eps = (1 - exact, exact - 1)  # either may be negative by rounding: take the one in use
    clip_eps = (max(clip_eps[0], 0.0), max(clip_eps[1], 0.0))
    for edge, slope in [(clip_eps, advantage), (tuple(0.999 * e for e in clip_eps), 0.0)]:
        assert obj_and_slope(ratio, advantage, clip_eps=edge)[1] == pytest.approx(slope)


def test_an_asymmetric_range():
    settings = {"clip_eps": (0.1, 0.5)}
    assert obj_and_slope(1.4, 1.0, **settings) == (pytest.approx(1.4), pytest.approx(1.0))
    assert obj_and_slope(1.6, 1.0, **settings) == (pytest.approx(1.5), 0.0)
    assert obj_and_slope(0.95, -1.0, **settings) == (pytest.approx(-0.95), pytest.approx(-1.0))
    assert obj_and_slope(0.85, -1.0, **settings) == (pytest.approx(-0.9), 0.0)


@given(st.floats(-3, 3), st.floats(-3, 3), st.sampled_from([0.1, 0.2, 0.5]))
def test_what_each_clip_is(log_ratio, advantage, eps):
    ratio = math.exp(log_ratio)
    assume(min(abs(ratio - 1 - eps), abs(ratio - 1 + eps)) > 1e-4)
    ppo, _ = obj_and_slope(ratio, advantage, clip_eps=eps)
    book, _ = obj_and_slope(ratio, advantage, clip_eps=eps, clip="book")
    none, _ = obj_and_slope(ratio, advantage, clip_eps=eps, clip="none")
    assert none == pytest.approx(ratio * advantage)
    assert book == pytest.approx(min(ratio, 1 + eps) * advantage)
    assert ppo == pytest.approx(min(none, min(max(ratio, 1 - eps), 1 + eps) * advantage))
    assert ppo <= none + LOOPS  # a lower bound
    if advantage < 0 and ratio > 1 + eps:
        assert book > none  # the book's is not
    dual, _ = obj_and_slope(ratio, advantage, clip_eps=eps, dual_clip=2.0)
    assert dual == pytest.approx(max(ppo, 2 * advantage) if advantage < 0 else ppo)


def test_zero_advantage_gives_no_slope():
    for ratio in RATIOS:
        assert obj_and_slope(ratio, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("log_ratio", [-1e4, 1e4, -25.0, 25.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("clip", ["ppo", "book", "none"])
def test_extreme_ratios_are_finite_and_flat(log_ratio, advantage, clip):
    one = np.ones((1, 1))
    loss, cache = ppo_clip_forward(
        log_ratio * one, old_logp=0 * one, advantages=advantage * one, weights=one, clip=clip
    )
    assert np.isfinite(loss)
    assert ppo_clip_backward(1.0, cache) == 0.0  # the cut at +-20 has no slope
    assert abs(float(loss)) <= math.exp(20) * (1 + LOOPS)


def test_ppo_refuses():
    x = np.zeros((2, 3))
    arguments = {"old_logp": x, "advantages": x, "weights": x}
    with pytest.raises(ValueError, match=r"one shape; got \(2, 2\), \(2, 3\), \(2, 3\)"):
        ppo_clip_forward(x[:, :2], **arguments)
    for wrong in ({"clip": "hard"}, {"clip_eps": -0.1}, {"clip_eps": (0.1, -0.2)}):
        with pytest.raises(ValueError, match='expected clip "ppo", "book" or "none"'):
            ppo_clip_forward(x, **arguments, **wrong)
    for c in (1.0, 0.5, 0.0, -3.0):
        with pytest.raises(ValueError, match="dual_clip > 1; got 'ppo'"):
            ppo_clip_forward(x, **arguments, dual_clip=c)
    with pytest.raises(ValueError, match=r"value_loss: .* got \(2, 3\), \(2, 3\), \(2, 1\)"):
        value_loss_forward(x, old_values=x, returns=x[:, :1], weights=x)


# -- the value -----------------------------------------------------------------------------------


@given(st.floats(-2, 2), st.floats(-2, 2), st.sampled_from([0.1, 0.5]))
def test_the_clipped_value_loss_is_the_larger_one(V, R, eps):
    one = np.ones((1, 1))
    assume(abs(abs(V) - eps) > 1e-4)

    def run(**settings):
        loss, cache = value_loss_forward(
            V * one, old_values=0 * one, returns=R * one, weights=one, **settings
        )
        return float(loss), float(value_loss_backward(1.0, cache)[0, 0])

    plain, slope = run(clip_eps=None)
    assert (plain, slope) == (pytest.approx(0.5 * (V - R) ** 2), pytest.approx(V - R))
    clipped, clipped_slope = run(clip_eps=eps)
    edge = 0.5 * (min(max(V, -eps), eps) - R) ** 2
    assert clipped == pytest.approx(max(plain, edge))
    assume(abs(plain - edge) > 1e-6 or abs(V) < eps)
    # Either the slope of the plain error, or none: the clipped value does not follow V.
    assert clipped_slope == (pytest.approx(V - R) if plain >= edge or abs(V) < eps else 0.0)


# -- weights -------------------------------------------------------------------------------------


@given(ragged(max_B=4))
def test_aggregations(case):
    rng, mask = case
    (B, T), losses = mask.shape, rng.standard_normal(mask.shape)
    lengths = [int(n) for n in mask.sum(axis=1)]
    tokens = [[losses[b, t] for t in range(lengths[b])] for b in range(B)]
    expected = {
        "token-mean": sum(map(sum, tokens)) / sum(lengths),
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in tokens) / B,
        "seq-mean-token-sum": sum(map(sum, tokens)) / B,
        "seq-mean-token-sum-norm": sum(map(sum, tokens)) / (B * T),
    }
    assert set(expected) == set(AGGREGATIONS)
    for mode, value in expected.items():
        weights = token_weights(mask, mode=mode)
        assert (weights[mask == 0] == 0).all()
        loss, cache = weighted_sum_forward(with_junk(losses, mask), weights=weights)
        assert_close(loss, value)
        assert_close(weighted_sum_backward(2.0, cache), 2 * weights, 0.0)
    fixed = token_weights(mask, mode="seq-mean-token-sum-norm", constant=7.0)
    assert_close(fixed, mask / 7.0)


def test_aggregations_at_the_edges():
    nobody = np.zeros((2, 3))
    for mode in AGGREGATIONS:
        assert (token_weights(nobody, mode=mode) == 0).all()
        half_empty = token_weights(np.array([[1.0, 1.0], [0.0, 0.0]]), mode=mode)
        assert np.isfinite(half_empty).all()
        assert token_weights(np.ones((2, 3), dtype=np.float32), mode=mode).dtype == np.float32
    # A response without tokens is no response: the mean goes over one.
    half_empty = token_weights(np.array([[1.0, 1.0], [0.0, 0.0]]), mode="seq-mean-token-sum")
    assert half_empty.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="expected one of token-mean, .*; got 'mean'"):
        token_weights(nobody, mode="mean")


def split_rows(n, rng):
    """Rows 0 .. n-1 in two or more runs."""
    cuts = sorted({0, n, *rng.integers(0, n + 1, size=2).tolist()})
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


@pytest.mark.parametrize("mode", AGGREGATIONS)
@given(ragged(max_B=5))
def test_micro_batches_add_up(mode, case):
    """Weights are made once for all rows, then cut: losses add up, gradients stand side by side."""
    rng, mask = case
    logp, old_logp, ref_logp, advantages, values, returns = rng.standard_normal((6, *mask.shape))
    logits, ref_logits = rng.standard_normal((2, *mask.shape, 3))
    weights = token_weights(mask, mode=mode)

    def run(rows):
        w = weights[rows]
        pairs = [
            (cross_entropy_backward, cross_entropy_forward(logp[rows], weights=w)),
            (
                ppo_clip_backward,
                ppo_clip_forward(
                    logp[rows], old_logp=old_logp[rows], advantages=advantages[rows], weights=w
                ),
            ),
            (
                value_loss_backward,
                value_loss_forward(
                    values[rows], old_values=old_logp[rows], returns=returns[rows], weights=w
                ),
            ),
        ]
        losses = [loss for _, (loss, _) in pairs]
        gradients = [backward(1.0, cache) for backward, (_, cache) in pairs]
        for kl_mode in ("loss_k2_tok", "loss_k3_seq", "loss_rb", "loss_rho_k3"):
            loss, cache = kl_loss_forward(
                logits[rows],
                logp[rows],
                kl_mode=kl_mode,
                old_logp=old_logp[rows],
                ref_logp=ref_logp[rows],
                ref_logits=ref_logits[rows],
                weights=w,
            )
            losses.append(loss)
            gradients += kl_loss_backward(1.0, cache)
        return losses, gradients

    losses, gradients = run(slice(None))
    parts = [run(rows) for rows in split_rows(len(mask), rng)]
    assert_close([sum(p[0][i] for p in parts) for i in range(len(losses))], losses)
    for i, gradient in enumerate(gradients):
        assert_close(np.concatenate([p[1][i] for p in parts]), gradient)


def test_a_penalty_in_the_reward_leaves_the_loss_alone():
    logits = np.random.default_rng(0).standard_normal((1, 2, 3))
    logp, _ = token_logprobs_forward(logits, targets=np.array([[0, 1]]))
    loss, cache = kl_loss_forward(
        logits,
        logp,
        kl_mode="reward_k1",
        old_logp=logp,
        ref_logp=logp - 1,
        ref_logits=None,
        weights=np.ones((1, 2)),
    )
    assert loss == 0.0
    assert all((g == 0).all() for g in kl_loss_backward(1.0, cache))


# -- preferences ---------------------------------------------------------------------------------


@st.composite
def score_lists(draw, *, lo=2, hi=5):
    B, K = draw(st.integers(1, 4)), draw(st.integers(lo, hi))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return draw(st.sampled_from([0.1, 1.0, 10.0])) * rng.standard_normal((B, K))


@given(score_lists(lo=2, hi=2))
def test_bradley_terry_is_plackett_luce_and_ranked_pairs_of_two(scores):
    loss, cache = bradley_terry_forward(scores[:, 0].copy(), scores[:, 1].copy())
    gradient = np.stack(bradley_terry_backward(1.0, cache), axis=1)
    for forward, backward in [
        (plackett_luce_forward, plackett_luce_backward),
        (ranked_pairs_forward, ranked_pairs_backward),
    ]:
        other, other_cache = forward(scores)
        assert_close(other, loss)
        assert_close(backward(1.0, other_cache), gradient)


@given(score_lists())
def test_only_differences_of_scores_matter(scores):
    shift = np.linspace(-50, 50, len(scores))[:, None]  # another one for each prompt
    for forward, backward in [
        (plackett_luce_forward, plackett_luce_backward),
        (ranked_pairs_forward, ranked_pairs_backward),
    ]:
        loss, cache = forward(scores)
        moved, _ = forward(scores + shift)
        assert_close(moved, loss, 1e-10)
        assert_close(backward(1.0, cache).sum(axis=1), np.zeros(len(scores)))
    pair = [scores[:, 0].copy(), scores[:, 1].copy()]
    moved = bradley_terry_forward(*(s + shift[:, 0] for s in pair))
    assert_close(moved[0], bradley_terry_forward(*pair)[0], 1e-10)


@given(score_lists())
def test_descent_puts_the_better_one_higher(scores):
    for forward, backward in [
        (plackett_luce_forward, plackett_luce_backward),
        (ranked_pairs_forward, ranked_pairs_backward),
    ]:
        loss, cache = forward(scores)
        gradient = backward(1.0, cache)
        assert (gradient[:, 0] <= 0).all() and (gradient[:, -1] >= 0).all()
        assert float(forward(scores - 1e-3 * gradient)[0]) <= float(loss)
        # The right order costs less than the wrong one, and less the further it is spread.
        best = np.sort(scores, axis=1)[:, ::-1].copy()
        assert float(forward(best)[0]) <= float(forward(-best)[0])
        assert float(forward(2 * best)[0]) <= float(forward(best)[0])


def test_equal_scores_are_not_the_best_there_is():
    """Over all ordered pairs, as sometimes printed, the loss would be least at equal scores."""
    equal, ranked = np.zeros((1, 3)), np.array([[2.0, 0.0, -2.0]])
    assert float(ranked_pairs_forward(equal)[0]) == pytest.approx(math.log(2))
    assert float(ranked_pairs_forward(ranked)[0]) < 0.2
    assert_close(ranked_pairs_backward(1.0, ranked_pairs_forward(equal)[1]), [[-1 / 3, 0, 1 / 3]])


@pytest.mark.parametrize("smoothing", [0.05, 0.2])
def test_label_smoothing_stops_at_the_odds_it_believes_in(smoothing):
    """The slope is 0 where sigma(d) = 1 - s, and beyond it turns round."""
    best = math.log((1 - smoothing) / smoothing)

    def slope(d):
        _, cache = bradley_terry_forward(np.array([d]), np.array([0.0]), label_smoothing=smoothing)
        return bradley_terry_backward(1.0, cache)[0][0]

    assert slope(best) == pytest.approx(0.0, abs=LOOPS)
    assert slope(best - 0.1) < 0 < slope(best + 0.1)


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
        for forward, backward in [
            (plackett_luce_forward, plackett_luce_backward),
            (ranked_pairs_forward, ranked_pairs_backward),
        ]:
            loss, cache = forward(np.array(scores))
            assert np.isfinite(loss) and np.isfinite(backward(1.0, cache)).all()
    x = np.array([-size, 0.0, size])
    assert_close(log_sigmoid(x), [-size, -math.log(2), 0.0])
    assert_close(sigmoid(x), [0.0, 0.5, 1.0])


def test_preferences_refuse():
    with pytest.raises(ValueError, match=r"one shape \(B,\), B > 0; got \(2,\) and \(3,\)"):
        bradley_terry_forward(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"B > 0; got \(0,\)"):
        bradley_terry_forward(np.zeros(0), np.zeros(0))
    for forward in (plackett_luce_forward, ranked_pairs_forward):
        for shape in ((3, 1), (3,)):
            with pytest.raises(ValueError, match=r"expected scores \(B, K\) with K >= 2; got"):
                forward(np.zeros(shape))
