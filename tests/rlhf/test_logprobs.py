"""Log-probs at the edges: impossible tokens, cold temperatures, targets that are no tokens."""

import math
import re

import numpy as np
import pytest
from tolerances import LOOPS, assert_close

from minirlhf.rlhf import logprobs
from minirlhf.rlhf.kl import full_kl_backward, full_kl_forward
from minirlhf.rlhf.logprobs import (
    by_columns,
    entropy_backward,
    entropy_forward,
    log_softmax,
    token_logprobs_backward,
    token_logprobs_forward,
)

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
NEVER = -np.inf  # the logit of a token that is not allowed


@DTYPES
def test_tokens_of_logit_minus_infinity_are_not_there(dtype):
    """Entropy, KL and log-probs of three tokens, of which one is impossible, are those of two."""
    two = np.array([[[0.3, -1.2]]], dtype=dtype)
    three = np.array([[[0.3, NEVER, -1.2]]], dtype=dtype)
    ones = np.ones((1, 1), dtype=dtype)
    (small, small_cache), (entropy, cache) = entropy_forward(two), entropy_forward(three)
    assert entropy.item() == pytest.approx(small.item(), abs=1e-6) and entropy.item() > 0.4
    dlogits = entropy_backward(ones, cache)
    assert_close(dlogits[..., [0, 2]], entropy_backward(ones, small_cache), 1e-6)
    assert dlogits[0, 0, 1] == 0
    # The same for the KL, where the reference may or may not know the token.
    ref_two = np.array([[[-0.5, 0.5]]], dtype=dtype)
    expected, small_cache = full_kl_forward(two, ref_logits=ref_two)
    ref_three = np.array([[[-0.5, NEVER, 0.5]]], dtype=dtype)
    kl_token, cache = full_kl_forward(three, ref_logits=ref_three)
    assert_close(kl_token, expected, 1e-6)
    dlogits = full_kl_backward(ones, cache)
    assert_close(dlogits[..., [0, 2]], full_kl_backward(ones, small_cache), 1e-6)
    assert dlogits[0, 0, 1] == 0
    logp, cache = token_logprobs_forward(three, targets=np.array([[2]]))
    assert logp.item() == pytest.approx(-1.2 - math.log(math.exp(0.3) + math.exp(-1.2)), abs=1e-6)
    assert token_logprobs_backward(ones, cache)[0, 0, 1] == 0


@DTYPES
def test_only_one_possible_token_has_no_entropy(dtype):
    logits = np.array([[[NEVER, 5.0, NEVER]]], dtype=dtype)
    entropy, cache = entropy_forward(logits)
    assert entropy.item() == 0
    assert (entropy_backward(np.ones((1, 1), dtype=dtype), cache) == 0).all()


SCORERS = {
    "log_softmax": lambda logits, tau: log_softmax(logits, temperature=tau),
    "token_logprobs": lambda logits, tau: token_logprobs_forward(
        logits, targets=np.zeros(logits.shape[:-1], dtype=int), temperature=tau
    )[0],
    "entropy": lambda logits, tau: entropy_forward(logits, temperature=tau)[0],
    "full_kl": lambda logits, tau: full_kl_forward(logits, ref_logits=logits, temperature=tau)[0],
}


@DTYPES
@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-46, 1e-40, 1e300, math.nan, math.inf])
@pytest.mark.parametrize("scorer", SCORERS)
def test_temperatures_that_float32_cannot_hold_are_refused(scorer, temperature, dtype):
    logits = np.array([[[1.0, 3.0, 2.0]]], dtype=dtype)
    says = rf"expected temperature > 0, .*; got {re.escape(str(temperature))}"
    with pytest.raises(ValueError, match=says):
        SCORERS[scorer](logits, temperature)


@DTYPES
def test_a_cold_distribution_is_the_most_likely_token(dtype):
    logits = np.array([[[1.0, 3.0, 2.0, 3.0]]], dtype=dtype)
    for temperature in (1e-3, 1e-30):
        p = np.exp(log_softmax(logits, temperature=temperature))
        assert_close(p, [[[0.0, 0.5, 0.0, 0.5]]], 1e-6)
        assert entropy_forward(logits, temperature=temperature)[0].item() == pytest.approx(
            math.log(2)
        )
    assert log_softmax(logits, temperature=1e-30)[0, 0, 2] == pytest.approx(-1e30, rel=1e-6)


def test_a_temperature_divides_distances_and_not_the_logits():
    """Large equal logits keep their even distribution, however the temperature rounds them."""
    logits = np.full((1, 1, 3), 1e7, dtype=np.float32)
    logits[..., 2] += 1.0
    expected = np.array([0.0, 0.0, 1.0]) / 0.7 - math.log(2 + math.exp(1 / 0.7))
    assert_close(log_softmax(logits, temperature=0.7)[0, 0], expected, 1e-6)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[0, -1]], r"token_logprobs: targets: expected ids in \[0, 3\); got -1 to 0"),
        ([[0, 3]], r"targets: expected ids in \[0, 3\); got 0 to 3"),
        ([[0.0, 1.7]], "targets: expected integers; got float64"),
        ([[True, False]], "targets: expected integers; got bool"),
        ([[0]], r"expected logits \(B, T, V\) and targets \(B, T\); got \(1, 2, 3\) and \(1, 1\)"),
    ],
)
def test_targets_that_are_no_tokens_are_refused(targets, message):
    """NumPy would read -1 as the last token of the vocabulary."""
    with pytest.raises(ValueError, match=message):
        token_logprobs_forward(np.zeros((1, 2, 3)), targets=np.array(targets))


def test_a_shift_of_all_logits_changes_nothing():
    logits = np.random.default_rng(0).standard_normal((2, 3, 5))
    for shift in (1e3, -1e8):
        assert_close(log_softmax(logits + shift), log_softmax(logits), abs(shift) * LOOPS)


def test_in_place_the_softmax_takes_the_memory_of_the_logits():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((2, 3, 5)), rng.integers(5, size=(2, 3))
    logp, cache = token_logprobs_forward(logits.copy(), targets=targets, temperature=0.7)
    same, given = token_logprobs_forward(logits, targets=targets, temperature=0.7, in_place=True)
    assert given.exp_z is logits
    assert np.array_equal(same, logp) and np.array_equal(given.exp_z, cache.exp_z)


def test_columns_side_by_side_are_the_whole(monkeypatch):
    """Of a large vocabulary f sees as few columns as `SLICE_FLOATS` holds, and at least one."""
    logits, seen = np.random.default_rng(0).standard_normal((2, 5, 7)), []

    def f(some):
        seen.append(some.shape[1])
        return entropy_forward(some)[0]

    whole = entropy_forward(logits)[0]
    for floats, expected in ((70, [5]), (29, [2, 2, 1]), (3, [1] * 5)):
        monkeypatch.setattr(logprobs, "SLICE_FLOATS", floats)
        assert_close(by_columns(f, logits), whole)
        assert seen == expected
        seen.clear()
