"""From ranked responses to a loss: on their scores (stage 2), or on a policy's log-ratios (DPO).

A reward model gives each response a score; only differences of scores to one prompt matter. In DPO
the policy is its own reward model: the score of a response is beta times its log-ratio.
"""

from typing import NamedTuple

from minirlhf.backend import Array, as_float, check_positive, get_xp


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
    slope: Array  # (B,) d loss_b / d (difference of what is compared), divided by B


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
    _check_pairs(
        "bradley_terry", label_smoothing, score_chosen=score_chosen, score_rejected=score_rejected
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


def dpo_forward(
    log_ratio_chosen: Array,
    log_ratio_rejected: Array,
    *,
    kl_coef: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Array, BradleyTerryCache]:
    """loss = mean_b [(1 - f) l(x_b) + f l(-x_b)],  x = log_ratio_chosen - log_ratio_rejected.

    sigmoid  l(x) = -log sigma(beta x)    Bradley-Terry of the implicit reward beta log_ratio: DPO
                                          (Rafailov et al. 2023, arXiv 2305.18290, equation 7),
                                          with f > 0 cDPO (Mitchell 2023)
    ipo      l(x) = (x - 1 / (2 beta))^2  IPO (Azar et al. 2023, arXiv 2310.12036, equation 17)

    Args:     log_ratio_chosen, log_ratio_rejected: (B,) each, sum_t log pi - log pi_ref [nats].
              kl_coef: beta > 0 [reward units per nat].
              loss: sigmoid or ipo.
              label_smoothing: f in [0, 0.5), the share of labels assumed to be flipped.
    Returns:  loss () [nats per pair; of ipo nats^2], cache.
    Raises:   ValueError: shapes differ, there is no pair, another loss, f or beta is out of range.
    Tested by: tests/rlhf/test_equations.py::test_dpo_fixture
    """
    chosen, rejected, f = as_float(log_ratio_chosen), as_float(log_ratio_rejected), label_smoothing
    _check_pairs("dpo", f, log_ratio_chosen=chosen, log_ratio_rejected=rejected)
    check_positive("dpo", "kl_coef", kl_coef)
    if loss == "sigmoid":
        scores = kl_coef * chosen, kl_coef * rejected
        value, cache = bradley_terry_forward(*scores, label_smoothing=f)
        return value, BradleyTerryCache(kl_coef * cache.slope)
    if loss != "ipo":
        raise ValueError(f"dpo: expected the loss sigmoid or ipo; got {loss!r}")
    x, lead, n = chosen - rejected, 1 / (2 * kl_coef), chosen.size
    losses = (1 - f) * (x - lead) * (x - lead) + f * (x + lead) * (x + lead)
    return losses.sum() / n, BradleyTerryCache(2 * (x - (1 - 2 * f) * lead) / n)


def dpo_backward(dloss: Array, cache: BradleyTerryCache) -> tuple[Array, Array]:
    """dlog_ratio_chosen = -beta sigma(-beta x) / B, rejected the opposite   (sigmoid, f = 0)."""
    return bradley_terry_backward(dloss, cache)


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


def _check_pairs(where: str, label_smoothing: float, **arrays: Array) -> None:
    (chosen, rejected), names = arrays.values(), " and ".join(arrays)
    if chosen.shape != rejected.shape or chosen.size == 0:
        raise ValueError(
            f"{where}: expected {names} of one shape (B,), B > 0; "
            f"got {chosen.shape} and {rejected.shape}"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{where}: expected label_smoothing in [0, 0.5); got {label_smoothing}")
