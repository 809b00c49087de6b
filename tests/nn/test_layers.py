"""Layers at the edges of what floating point holds, and ids that are none."""

import math

import numpy as np
import pytest
from tiny import CONFIG, make_batch, make_params
from tolerances import COMPLEX_STEP, FLOAT32_FORWARD, LOOPS, assert_close

from minirlhf.nn.attention import attention_backward, attention_forward, causal_mask
from minirlhf.nn.layers import embedding_forward, gelu_backward, gelu_forward, layernorm_forward
from minirlhf.nn.transformer import transformer_forward

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


# -- GELU ----------------------------------------------------------------------------------------


@DTYPES
def test_far_out_gelu_is_x_or_0_with_slope_1_or_0(dtype):
    """At x = 428 the terms of the slope are 1e7 times larger than their difference."""
    x = np.array([6.0, 20.0, 427.0, 428.0, 429.0, 1e3, 1e4, 1e6, 1e10, 1e12], dtype=dtype)
    y, cache = gelu_forward(np.concatenate([x, -x]))
    slope = gelu_backward(np.ones_like(y), cache)
    n = len(x)
    assert_close(y[:n] / x, np.ones(n), FLOAT32_FORWARD)
    assert_close(slope[:n], np.ones(n), FLOAT32_FORWARD)
    assert_close(slope[n:], np.zeros(n), FLOAT32_FORWARD)
    assert (slope[1:n] == 1).all() and (slope[n + 2 :] == 0).all()
    assert slope.dtype == dtype


@DTYPES
def test_the_slope_of_gelu_in_either_precision(dtype):
    """The derivative of x/2 (1 + tanh u) by its definition, in float64."""
    x = np.linspace(-8, 8, 201)
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    expected = 0.5 * (1 + np.tanh(u)) + 0.5 * x * (1 - np.tanh(u) ** 2) * du
    y, cache = gelu_forward(x.astype(dtype))
    tolerance = FLOAT32_FORWARD if dtype == np.float32 else LOOPS
    assert_close(gelu_backward(np.ones_like(y), cache), expected, tolerance)


# -- attention -----------------------------------------------------------------------------------


def scores_as_qkv(scores, values):
    """qkv of one head of one channel a position: q_i = 1, so the scores are the keys."""
    return np.stack([np.ones_like(scores), scores, values], axis=-1)


@DTYPES
@pytest.mark.parametrize("size", [1.0, 70.0, 1e9, 2e9, 1e12, 1e30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_attention_takes_any_finite_score(dtype, size, sign):
    """Also scores that lie below what a padded key would have been given, -1e9."""
    scores = (sign * size * np.array([[1.0, 2.0, 3.0, 1.5], [3.0, 1.0, 1.0, 2.0]])).astype(dtype)
    values = np.array([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]], dtype=dtype)
    mask = np.array([[1.0, 1, 1, 1], [0, 1, 1, 1]], dtype=dtype)
    out, cache = attention_forward(
        scores_as_qkv(scores, values), n_head=1, allowed=causal_mask(mask)
    )
    expected = np.zeros((2, 4, 1))
    for b, i in np.ndindex(2, 4):
        seen = [j for j in range(i + 1) if j == i or mask[b, j] > 0]
        logits = [float(scores[b, j]) for j in seen]
        weights = [math.exp(max(z - max(logits), -700.0)) for z in logits]
        total = sum(weights)
        expected[b, i, 0] = (
            sum(w * values[b, j] for w, j in zip(weights, seen, strict=True)) / total
        )
    assert_close(out, expected, FLOAT32_FORWARD)
    assert np.isfinite(attention_backward(np.ones_like(out), cache)).all()


def test_a_complex_step_goes_through_large_scores():
    """What the gradient checks need where the maximum is subtracted."""
    scores, values = np.array([[-3e9, -3e9 + 1.0, -3e9 + 0.5]]), np.array([[1.0, 2.0, 4.0]])
    allowed = causal_mask(np.ones((1, 3)))
    qkv = scores_as_qkv(scores, values)
    _, cache = attention_forward(qkv, n_head=1, allowed=allowed)
    dqkv = attention_backward(np.ones((1, 3, 1)), cache)
    moved = qkv.astype(complex)
    moved[0, 1, 2] += 1e-30j  # a value
    moved[0, 0, 1] += 2e-30j  # a key
    out, _ = attention_forward(moved, n_head=1, allowed=allowed)
    slope = float(out.sum().imag) / 1e-30
    assert slope == pytest.approx(dqkv[0, 1, 2] + 2 * dqkv[0, 0, 1], rel=COMPLEX_STEP)


# -- layer norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, -1e-5, 1e-46, math.nan, math.inf])
def test_an_eps_that_is_0_in_float32_is_refused(eps):
    """A constant row has variance 0: without eps it would be 0 / 0."""
    x, one = np.ones((2, 3), dtype=np.float32), np.ones(3, dtype=np.float32)
    with pytest.raises(ValueError, match=f"layernorm: expected eps > 0, .*; got {eps}"):
        layernorm_forward(x, one, one, eps=eps)
    assert (layernorm_forward(x, one, 0 * one, eps=1e-37)[0] == 0).all()


# -- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, -1], r"embedding: expected ids in \[0, 3\); got -1 to 0"),
        ([0, 3], r"embedding: expected ids in \[0, 3\); got 0 to 3"),
        ([0.0, 1.7], "embedding: expected integers; got float64"),
        ([True, False, True], "embedding: expected integers; got bool"),
    ],
)
def test_ids_that_are_no_rows_of_the_table_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        embedding_forward(np.ones((3, 2)), ids=np.array(ids))
    assert embedding_forward(np.ones((3, 2)), ids=np.zeros((2, 0), dtype=int))[0].shape == (2, 0, 2)


@pytest.mark.parametrize("wrong", [-1, CONFIG.vocab_size])
def test_the_model_refuses_ids_outside_its_vocabulary(wrong):
    batch = make_batch()
    batch.tokens[0, 1] = wrong
    with pytest.raises(ValueError, match=r"embedding: expected ids in \[0, 11\)"):
        transformer_forward(
            make_params()["transformer"], tokens=batch.tokens, mask=batch.mask, config=CONFIG
        )
