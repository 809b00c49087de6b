"""Stage 2: from ranked responses to a loss on their scores. Bradley-Terry, Plackett-Luce.

A reward model gives each response a score; only differences of scores to one prompt matter.
"""

from typing import NamedTuple

from minirlhf.backend import Array, as_float, get_xp


def log_sigmoid(x: Array) -> Array:
    """log sigma(x) = min(x, 0) - log1p(exp(-|x|)), finite for every finite x."""
    xp, x = get_xp(x), as_float(x)
    # .real, and no abs: gradient checks pass complex numbers x + ih (gradcheck.py)
    negative = x.real < 0
    return xp.where(negative, x, 0.0) - xp.log1p(xp.exp(xp.where(negative, x, -x)))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return get_xp(x).exp(log_sigmoid(x))


class BradleyTerryCache(NamedTuple):
    slope: Array  # (B,) d loss_b / d (difference of scores), divided by B


def bradley_terry_forward(
    score_chosen: Array, score_rejected: Array, *, margin: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Array, BradleyTerryCache]:
    """loss = -mean_b [(1 - f) log sigma(d_b) + f log sigma(-d_b)],  d = chosen - rejected - margin.

    Bradley & Terry 1952: Pr(a preferred to b) = sigma(score_a - score_b). f is the share of labels
    assumed to be flipped.

    Args:     score_chosen: (B,) scores of the preferred responses.
              score_rejected: (B,) of the others.
              margin: difference that is asked for [score units].
              label_smoothing: f in [0, 0.5).
    Returns:  loss () [nats per pair], cache.
    Raises:   ValueError: shapes differ, there is no pair, or f is out of range.
    Tested by: tests/rlhf/test_equations.py::test_bradley_terry_fixture
    """
    if score_chosen.shape != score_rejected.shape or score_chosen.size == 0:
        raise ValueError(
            "bradley_terry: expected score_chosen and score_rejected of one shape (B,), B > 0; "
            f"got {score_chosen.shape} and {score_rejected.shape}"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"bradley_terry: expected label_smoothing in [0, 0.5); got {label_smoothing}"
        )
    get_xp(score_chosen, score_rejected)
    flipped = label_smoothing
    difference = as_float(score_chosen) - as_float(score_rejected) - margin  # (B,)
    losses = -(1 - flipped) * log_sigmoid(difference) - flipped * log_sigmoid(-difference)
    slope = flipped * sigmoid(difference) - (1 - flipped) * sigmoid(-difference)
    n = difference.size
    return losses.sum() / n, BradleyTerryCache(slope / n)


def bradley_terry_backward(dloss: Array, cache: BradleyTerryCache) -> tuple[Array, Array]:
    """dscore_chosen = -sigma(-d) / B,  dscore_rejected = +sigma(-d) / B   (f = 0, dloss = 1)."""
    dchosen = dloss * cache.slope
    return dchosen, -dchosen  # a shift of both changes nothing


class PlackettLuceCache(NamedTuple):
    choice: Array  # (B, K, K) probability of item i at step k, 0 for items already taken


def plackett_luce_forward(scores: Array) -> tuple[Array, PlackettLuceCache]:
    """loss = -mean_b sum_k [score_k - log sum_{i>=k} exp(score_i)], items in ranked order.

    Plackett 1975, Luce 1959: the ranking is built by choosing the best of what remains, with
    probability proportional to the worth exp(score). K = 2 is Bradley-Terry.

    Args:     scores: (B, K) in the order of their rank, the best first.
    Returns:  loss () [nats per list], cache.
    Raises:   ValueError: no list, or fewer than two responses.
    Tested by: tests/rlhf/test_equations.py::test_plackett_luce_fixtures
    """
    if scores.ndim != 2 or scores.shape[0] < 1 or scores.shape[1] < 2:
        raise ValueError(
            f"plackett_luce: expected scores (B, K) with B >= 1 and K >= 2; got {scores.shape}"
        )
    xp, scores = get_xp(scores), as_float(scores)
    B, K = scores.shape
    item = xp.arange(K)
    remaining = item[:, None] <= item[None, :]  # (K, K): at step k, items k, k+1, ...
    log_worth = xp.where(remaining, scores[:, None, :], -xp.inf)  # (B, K, K)
    top = log_worth.real.max(axis=2, keepdims=True)  # finite: step k has item k itself
    choice = xp.exp(log_worth - top)  # exp(-inf): exactly 0 for items already taken
    total = choice.sum(axis=2, keepdims=True)  # (B, K, 1)
    loss = (top[..., 0] + xp.log(total[..., 0]) - scores).sum() / B
    return loss, PlackettLuceCache(choice / total)


def plackett_luce_backward(dloss: Array, cache: PlackettLuceCache) -> Array:
    """dscore_i = (sum_{k <= rank(i)} softmax_{>=k}(score)_i - 1) / B."""
    B = cache.choice.shape[0]
    return dloss * (cache.choice.sum(axis=1) - 1.0) / B
