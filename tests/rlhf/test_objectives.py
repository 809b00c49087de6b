"""Losses: which way each slope points, at the edges too, and what must not change a loss."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import ragged, with_junk
from tolerances import LOOPS, assert_close

from minirlhf.rlhf.imitation import cross_entropy_backward, cross_entropy_forward
from minirlhf.rlhf.logprobs import token_logprobs_forward
from minirlhf.rlhf.objectives import (
    AGGREGATIONS,
    kl_loss_backward,
    kl_loss_forward,
    ppo_clip_backward,
    ppo_clip_forward,
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
    ("ppo", None, 0.5, (0.5, 0.5, 0.5, 0, 0)),
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


# Below the normal numbers an advantage has no digits left in which two objectives could differ.
ADVANTAGES = st.floats(-3, 3, allow_subnormal=False)


@given(st.floats(-3, 3), ADVANTAGES, st.sampled_from([0.1, 0.2, 0.5]))
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


def test_the_defaults_are_a_fifth():
    logp, old_logp, advantages = np.random.default_rng(0).standard_normal((3, 4, 5))
    weights = np.ones((4, 5))
    same = {"old_logp": old_logp, "advantages": advantages, "weights": weights}
    by_default, _ = ppo_clip_forward(logp, **same)
    assert by_default == ppo_clip_forward(logp, **same, clip_eps=0.2, clip="ppo")[0]
    same = {"old_values": old_logp, "returns": advantages, "weights": weights}
    assert value_loss_forward(logp, **same)[0] == value_loss_forward(logp, **same, clip_eps=0.2)[0]


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
        with pytest.raises(ValueError, match="expected one of ppo, book, none"):
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


@pytest.mark.parametrize("clip_eps", [None, 0.2])
@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_padding_enters_no_value_loss(clip_eps, junk):
    """nan at padding, in any of the three: the same loss, and a slope of exactly 0 there."""
    values, old_values, returns = np.random.default_rng(0).standard_normal((3, 2, 4))
    weights = np.array([[0.25, 0.25, 0.25, 0.0], [0.25, 0.0, 0.0, 0.0]])

    def run(values, old_values, returns):
        loss, cache = value_loss_forward(
            values, old_values=old_values, returns=returns, weights=weights, clip_eps=clip_eps
        )
        return loss, value_loss_backward(1.0, cache)

    loss, slope = run(values, old_values, returns)
    assert (slope[weights == 0] == 0).all() and (slope[weights > 0] != 0).any()
    for which in range(3):
        arrays = [values, old_values, returns]
        arrays[which] = with_junk(arrays[which], weights, junk=[junk])
        dirty_loss, dirty_slope = run(*arrays)
        assert_close(dirty_loss, loss, 0.0)
        assert_close(dirty_slope, slope, 0.0)


@pytest.mark.parametrize("clip", ["ppo", "book", "none"])
def test_padding_enters_no_clipped_surrogate(clip):
    logp, old_logp, advantages = np.random.default_rng(0).standard_normal((3, 2, 4))
    weights = np.array([[0.25, 0.25, 0.25, 0.0], [0.25, 0.0, 0.0, 0.0]])

    def run(logp, old_logp, advantages):
        loss, cache = ppo_clip_forward(
            logp, old_logp=old_logp, advantages=advantages, weights=weights, clip=clip
        )
        return loss, ppo_clip_backward(1.0, cache)

    loss, slope = run(logp, old_logp, advantages)
    assert (slope[weights == 0] == 0).all()
    for which in range(3):
        arrays = [logp, old_logp, advantages]
        arrays[which] = with_junk(arrays[which], weights, junk=[np.nan])
        dirty_loss, dirty_slope = run(*arrays)
        assert_close(dirty_loss, loss, 0.0)
        assert_close(dirty_slope, slope, 0.0)


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
