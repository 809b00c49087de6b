"""The KL penalty: its value, where it may stand and what its gradient is there, its coefficient.

    Penalty = log Pr_theta(y|x) - log Pr_ref(y|x) = sum_t [log pi_theta(y_t|.) - log pi_ref(y_t|.)]

is an unbiased estimate of KL(pi_theta || pi_ref) when y ~ pi_theta. Whether its gradient is one too
depends on where it stands. With log_ratio(y) for the Penalty of y, and sums over all responses,

    KL      = sum_y pi(y) log_ratio(y)
    grad KL = sum_y pi(y) grad log pi(y) log_ratio(y)  +  sum_y pi(y) grad log pi(y)

because grad pi = pi grad log pi, where grad log pi is called the score function, and because
grad log_ratio = grad log pi. The second sum is sum_y grad pi(y) = grad 1 = 0.

* In the reward the Penalty is a number like any other reward: it multiplies the score function
  (REINFORCE, Williams 1992). E[log_ratio grad log pi] is the first sum: all of grad KL.
* In the loss (`loss_k1`) the Penalty itself is differentiated, at responses already drawn.
  E[grad log pi] is the second sum: 0 on average, so it teaches nothing and adds noise.

KL(pi || ref) is also a sum over prefixes s, of Pr(s) KL(pi(.|s) || ref(.|s)). A gradient is called
partial if it takes the prefixes as given: it ignores that an early token moves the later prefixes.
A penalty in the reward is partial too if a token answers for its own kl_token alone (gamma = 0) and
not for those of the tokens it leads to. KL_MODES has every placement with its gradient.

log_ratio = logp - ref_logp [nats]; as what a token pays it is called kl_token (k1), and its sum
kl_seq. `ref` is the frozen reference; `old` is the policy that sampled: two snapshots, never one.
"""

import math
from typing import NamedTuple

from minirlhf.backend import Array, as_float, check_same_shape, get_xp
from minirlhf.rlhf.logprobs import log_softmax, response_sum


def summed_penalty(logp: Array, ref_logp: Array, *, mask: Array) -> Array:
    """Penalty = sum_t mask_t (logp_t - ref_logp_t) = log Pr_theta(y|x) - log Pr_ref(y|x).

    One number a response, k1 summed over its tokens: it may be negative, and at theta = ref it is
    0 for every response. Reported, and what steers beta; what trains is `penalty_in_reward`.

    Args:     logp: (B, T) log pi_theta(y_t|.) [nats].
              ref_logp: (B, T) log pi_ref(y_t|.) [nats].
              mask: (B, T) 1 at response tokens.
    Returns:  kl_seq (B,) [nats].
    Raises:   ValueError: the shapes differ.
    Tested by: tests/rlhf/test_equations.py::test_summed_penalty_is_the_sequence_log_ratio
    """
    check_same_shape("summed_penalty", logp=logp, ref_logp=ref_logp, mask=mask)
    return response_sum(as_float(logp) - as_float(ref_logp), mask=mask)


def kl_estimate(log_ratio: Array, estimator: str) -> Array:
    """A one-sample estimate of KL(pi || ref) from y ~ pi, elementwise in log_ratio.

    k1 = log_ratio                          unbiased, may be negative
    k2 = log_ratio^2 / 2                    biased, >= 0
    k3 = exp(-log_ratio) - 1 + log_ratio    unbiased, >= 0

    Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).

    Args:     log_ratio: logp - ref_logp [nats], of tokens or of whole responses; for k3 it is cut
                  at -20 before the exponential.
              estimator: one of ESTIMATORS.
    Returns:  the same shape [nats].
    Raises:   ValueError: another estimator.
    """
    return named(ESTIMATORS, "kl_estimate", estimator)(as_float(log_ratio))[0]


def _k1(log_ratio: Array) -> tuple[Array, Array]:
    """log_ratio, 1: the slope is the same for every token, nothing of the reference in it."""
    return log_ratio.copy(), get_xp(log_ratio).ones_like(log_ratio)


def _k2(log_ratio: Array) -> tuple[Array, Array]:
    """log_ratio^2 / 2, log_ratio."""
    return 0.5 * log_ratio * log_ratio, log_ratio.copy()


def _k3(log_ratio: Array) -> tuple[Array, Array]:
    """exp(-log_ratio) - 1 + log_ratio, 1 - exp(-log_ratio); flat where the exponential is cut."""
    xp = get_xp(log_ratio)
    inside = ~(log_ratio.real < -LOG_RATIO_LIMIT)  # above, exp(-log_ratio) dies out by itself
    cut = xp.where(inside, log_ratio, -LOG_RATIO_LIMIT)
    return expm1_minus(-cut), xp.where(inside, -xp.expm1(-cut), 0.0)


ESTIMATORS = {"k1": _k1, "k2": _k2, "k3": _k3}  # log_ratio -> estimate, d estimate / d log_ratio


def named(table: dict, where: str, name: str):
    """The entry of a table.

    Raises:   ValueError: there is none of this name.
    """
    if name not in table:
        raise ValueError(f"{where}: expected one of {', '.join(table)}; got {name!r}")
    return table[name]


# -- where the penalty stands --------------------------------------------------------------------
class KLMode(NamedTuple):
    """One placement of the penalty: what enters the reward, what enters the loss."""

    in_reward: str | None  # k1, k2, k3 or "full": the penalty per token in the reward, a constant
    in_loss: str | None  # "token", "sequence", "full", "rao_blackwell"
    estimator: str | None = None  # of the loss
    ratio: str = "none"  # importance ratio old -> theta in the loss: "differentiated" or "held"
    gradient: str = ""  # the expected gradient of the penalty, on-policy unless stated

    @property
    def needs_ref_logits(self) -> bool:
        """Does the loss compare whole distributions?"""
        return self.in_loss in ("full", "rao_blackwell")


# g = grad KL(pi_theta || ref) of whole responses. Forward KL is KL(ref || pi_theta). Derived in
# Tang & Munos 2025 (2506.09477), Liu et al. 2025 (2510.01555), Shah et al. 2025 (2512.21852) and,
# for rb, Amini et al. 2025 (2504.10637). tests/rlhf/test_kl.py has each of them by enumeration.
KL_MODES = {
    "reward_k1": KLMode("k1", None, gradient="g"),  # the default
    "reward_k2": KLMode("k2", None, gradient="biased"),
    "reward_k3": KLMode("k3", None, gradient="g - forward KL token by token"),
    "loss_k1": KLMode(None, "token", "k1", gradient="0: noise only (the formula as printed)"),
    "loss_k2_tok": KLMode(None, "token", "k2", gradient="partial"),
    "loss_k2_seq": KLMode(None, "sequence", "k2", gradient="g"),
    "loss_k3_tok": KLMode(None, "token", "k3", gradient="forward KL token by token (GRPO)"),
    "loss_k3_seq": KLMode(None, "sequence", "k3", gradient="grad KL(ref || pi_theta)"),
    "reward_and_loss_k3": KLMode("k3", "token", "k3", gradient="g"),
    "reward_and_loss_full": KLMode("full", "full", gradient="g"),
    "loss_full": KLMode(None, "full", gradient="partial"),
    "loss_rb": KLMode(None, "rao_blackwell", gradient="g"),
    "loss_rho_k1": KLMode(
        None, "sequence", "k1", ratio="differentiated", gradient="g, also off-policy"
    ),
    "loss_rho_k2": KLMode(None, "sequence", "k2", ratio="held", gradient="g, also off-policy"),
    "loss_rho_k3": KLMode(
        None, "sequence", "k3", ratio="differentiated", gradient="g, also off-policy"
    ),
    "loss_rho_k3_tok": KLMode(
        None, "token", "k3", ratio="differentiated", gradient="partial, at old prefixes"
    ),
}


def penalty_in_reward(kl_mode: str, *, log_ratio: Array, kl_full: Array) -> Array:
    """kl_token: what `kl_mode` takes off the reward of each token, before beta; 0 if nothing.

    It comes from the policy that sampled and is constant: no gradient passes through it.

    Args:     log_ratio: (B, T) old_logp - ref_logp of the sampled tokens [nats].
              kl_full: (B, T) KL(old(.|s_t) || ref(.|s_t)) over the whole vocabulary [nats].
    Returns:  kl_token (B, T) [nats].
    Raises:   ValueError: another kl_mode, or the shapes differ.
    """
    estimator = named(KL_MODES, "kl_mode", kl_mode).in_reward
    check_same_shape("penalty_in_reward", log_ratio=log_ratio, kl_full=kl_full)
    if estimator is None:
        return get_xp(log_ratio).zeros_like(as_float(log_ratio))
    return as_float(kl_full).copy() if estimator == "full" else kl_estimate(log_ratio, estimator)


# -- the sampled estimators as losses ------------------------------------------------------------
class TokenKLCache(NamedTuple):
    slope: Array  # (B, T) d(ratio * estimate) / d logp
    weights: Array  # (B, T) borrowed


def token_kl_loss_forward(
    logp: Array,
    *,
    old_logp: Array,
    ref_logp: Array,
    weights: Array,
    estimator: str,
    ratio: str = "none",
) -> tuple[Array, TokenKLCache]:
    """sum_t w_t rho_t k(logp_t - ref_logp_t), estimated token by token.

    The prefixes are those that were sampled, so by itself it has the partial gradient at best. With
    k1 and no ratio it is w_t grad logp_t, whatever the reference says: 0 on average.

    Args:     logp: (B, T) current policy [nats].
              old_logp: (B, T) the policy that sampled.
              ref_logp: (B, T) the reference.
              weights: (B, T) weight of each token in the loss.
              estimator: k1, k2 or k3.
              ratio: "none" (rho = 1), "differentiated" (rho_t = exp(logp_t - old_logp_t), a
                  function of theta like k), or "held" (the same number as a constant).
    Returns:  loss () [nats times the weights' unit], cache.
    Raises:   ValueError: the shapes differ, or another estimator or ratio.
    """
    check_same_shape(
        "token_kl_loss", logp=logp, old_logp=old_logp, ref_logp=ref_logp, weights=weights
    )
    logp, old_logp, ref_logp, weights = map(as_float, (logp, old_logp, ref_logp, weights))
    return _kl_loss(logp - ref_logp, logp - old_logp, weights, estimator, ratio)


def token_kl_loss_backward(dloss: Array, cache: TokenKLCache) -> Array:
    """dlogp_t = dloss w_t k'(log_ratio_t), or rho_t (k + k') with the ratio.  () -> (B, T)."""
    return dloss * cache.weights * cache.slope


def _kl_loss(
    log_ratio: Array, log_rho: Array, weights: Array, estimator: str, ratio: str
) -> tuple[Array, TokenKLCache]:
    """sum w rho k(log_ratio), of tokens (B, T) or of whole responses (B, 1)."""
    xp = get_xp(log_ratio, log_rho, weights)
    value, slope = named(ESTIMATORS, "kl_loss", estimator)(log_ratio)
    value, slope = _times_ratio(value, slope, log_rho, ratio)
    loss = (weights * xp.where(weights > 0, value, 0.0)).sum()  # padding may hold inf or nan
    return loss, TokenKLCache(xp.where(weights > 0, slope, 0.0), weights)


def _times_ratio(value: Array, slope: Array, log_rho: Array, ratio: str) -> tuple[Array, Array]:
    """rho k, and its derivative rho (k + k'): without the k where rho is held or clamped."""
    if ratio not in ("none", "differentiated", "held"):
        raise ValueError(
            f'kl_loss: expected ratio "none", "differentiated" or "held"; got {ratio!r}'
        )
    if ratio == "none":
        return value, slope
    xp = get_xp(value, log_rho)
    clamped, inside = clamp_log_ratio(log_rho)
    rho = xp.exp(clamped)
    through_rho = xp.where(inside, value, 0.0) if ratio == "differentiated" else 0.0
    return rho * value, rho * (through_rho + slope)


class SequenceKLCache(NamedTuple):
    whole: TokenKLCache  # of the sums, (B, 1)
    mask: Array  # (B, T)


def sequence_kl_loss_forward(
    logp: Array,
    *,
    old_logp: Array,
    ref_logp: Array,
    weights: Array,
    estimator: str,
    ratio: str = "none",
) -> tuple[Array, SequenceKLCache]:
    """sum_b w_b rho_b k(sum_t log_ratio_bt), estimated on the whole response.

    k2 of the sum has the slope kl_seq grad log pi(y), the same as the Penalty in the reward.

    Args:     as `token_kl_loss_forward`, with rho_b = exp(sum_t logp_bt - old_logp_bt); a
                  response's weight w_b is the weight of its tokens.
    Returns:  loss (), cache.
    Raises:   ValueError: the shapes differ, or another estimator or ratio.
    """
    check_same_shape(
        "sequence_kl_loss", logp=logp, old_logp=old_logp, ref_logp=ref_logp, weights=weights
    )
    logp, old_logp, ref_logp, weights = map(as_float, (logp, old_logp, ref_logp, weights))
    mask = weights > 0  # (B, T)
    # log rho by itself: as a difference of two log-ratios it would lose digits far from ref
    sums = [response_sum(logp - other, mask=mask)[:, None] for other in (ref_logp, old_logp)]
    loss, cache = _kl_loss(*sums, weights.max(axis=-1, keepdims=True), estimator, ratio)
    return loss, SequenceKLCache(cache, mask)


def sequence_kl_loss_backward(dloss: Array, cache: SequenceKLCache) -> Array:
    """dlogp_bt = dloss w_b mask_bt k'(sum_t log_ratio), or rho (k + k').  () -> (B, T)."""
    return token_kl_loss_backward(dloss, cache.whole) * cache.mask  # (B, 1) x (B, T)


# -- the full-vocabulary KL, from logits ---------------------------------------------------------
class FullKLCache(NamedTuple):
    probs: Array  # (B, T, V)
    log_ratio: Array  # (B, T, V) log P - log Q
    kl_token: Array  # (B, T) as summed: rounding may leave it a little below 0
    temperature: float


def full_kl_forward(
    logits: Array, *, ref_logits: Array, temperature: float = 1.0
) -> tuple[Array, FullKLCache]:
    """kl_token_t = sum_a P_{t,a} (log P_{t,a} - log Q_{t,a}) = KL(pi(.|s_t) || ref(.|s_t)).

    Summed over the tokens of y ~ pi it is an unbiased, Rao-Blackwellised estimate of the sequence
    KL, >= 0, mostly with less variance than k1 (Amini et al. 2025, arXiv 2504.10637). As a loss it
    has the partial gradient; `future_kl` supplies the rest.

    Args:     logits: (B, T, V) of pi.
              ref_logits: (B, T, V) of ref, constant.
              temperature: tau > 0, of both.
    Returns:  kl_token (B, T) [nats], cache.
    Raises:   ValueError: the shapes differ, or the temperature is not positive.
    """
    check_same_shape("full_kl", logits=logits, ref_logits=ref_logits)
    xp = get_xp(logits, ref_logits)
    log_p = log_softmax(logits, temperature=temperature)  # (B, T, V)
    log_q = log_softmax(ref_logits, temperature=temperature)
    probs = xp.exp(log_p)
    # .real: gradient checks pass complex numbers x + ih, which have no order (gradcheck.py)
    possible = probs.real > 0  # 0 log 0 = 0, also at logits of -inf
    log_ratio = xp.where(possible, log_p, 0.0) - xp.where(possible, log_q, 0.0)
    kl_token = (probs * log_ratio).sum(axis=-1)  # (B, T)
    # a sum that rounding made negative is 0; the real part alone, so a complex step goes through
    at_least_0 = kl_token - xp.minimum(kl_token.real, 0.0)
    return at_least_0, FullKLCache(probs, log_ratio, kl_token, temperature)


def full_kl_backward(dkl_token: Array, cache: FullKLCache) -> Array:
    """dz_a = dKL P_a (log P_a - log Q_a - KL) / tau.  (B, T) -> (B, T, V)."""
    probs, log_ratio, kl_token, temperature = cache
    dlogits = log_ratio - kl_token[..., None]
    dlogits *= probs
    dlogits *= (dkl_token / temperature)[..., None]
    return dlogits


def future_kl(kl_token: Array, *, mask: Array) -> Array:
    """future_t = sum_{i>t} mask_i kl_token_i: the KL that the tokens after y_t will cost.

    The full-vocabulary KL summed over sampled prefixes has only the partial gradient. Adding
    sum_t logp_t future_t to the loss, with future_t held constant, lets y_t answer for the
    prefixes it leads to: the expected gradient is then exact (Amini et al. 2025, arXiv 2504.10637).

    Args:     kl_token: (B, T) from `full_kl_forward` [nats].
              mask: (B, T) 1 at response tokens.
    Returns:  (B, T) [nats], to be held constant.
    """
    check_same_shape("future_kl", kl_token=kl_token, mask=mask)
    xp = get_xp(kl_token, mask)
    kept = xp.where(mask > 0, as_float(kl_token), 0.0)
    return kept[:, ::-1].cumsum(axis=1)[:, ::-1] - kept  # from the right, without t itself


# -- the coefficient -----------------------------------------------------------------------------
def adaptive_kl_coef(
    kl_coef: float, *, kl_seq: float, target: float, horizon: float, n_episodes: int
) -> float:
    """beta <- beta (1 + e n / horizon),  e = clip(kl_seq / target - 1, -0.2, 0.2).

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2, as coded by its authors, with n / horizon at
    most 1: a batch of more than five horizons would make beta negative and the penalty a prize.

    Args:     kl_coef: beta [reward units per nat].
              kl_seq: mean sequence-summed KL of the batch [nats per response, not per token].
              target: wanted kl_seq [nats].
              horizon: episodes over which beta may change by up to 20 %.
              n_episodes: responses in the batch.
    Returns:  the next beta, at least 0.8 of this one.
    Raises:   ValueError: target or horizon is not positive.
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(
            f"adaptive_kl_coef: expected target > 0 and horizon > 0; got {target} and {horizon}"
        )
    error = min(max(kl_seq / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(n_episodes / horizon, 1.0))


# -- what keeps exp within bounds ----------------------------------------------------------------

LOG_RATIO_LIMIT = 20.0  # exp sees no larger log-ratio; the metrics count how many were cut


def clamp_log_ratio(log_ratio: Array) -> tuple[Array, Array]:
    """The log-ratio cut to [-20, 20] before it enters exp, and where it was inside.

    Returns:  clamped (...), inside (...) boolean: the derivative of the clamp.
    """
    xp, log_ratio = get_xp(log_ratio), as_float(log_ratio)
    # nan counts as inside, so that it stays nan and is found
    inside = ~((log_ratio.real < -LOG_RATIO_LIMIT) | (log_ratio.real > LOG_RATIO_LIMIT))
    limit = xp.where(log_ratio.real > 0, LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT).astype(log_ratio.dtype)
    return xp.where(inside, log_ratio, limit), inside


def expm1_minus(x: Array) -> Array:
    """exp(x) - 1 - x without cancellation: x^2/2! + x^3/3! + ... where |x| < 0.5, expm1 elsewhere.

    Fourteen terms leave out less than a rounding of float64; expm1(x) - x loses 2 / |x| roundings.
    """
    xp, x = get_xp(x), as_float(x)
    small = (x.real < 0.5) & (x.real > -0.5)
    near = xp.where(small, x, 0.0)  # or powers of a large x overflow
    series = xp.zeros_like(near)
    for n in range(15, 1, -1):  # Horner, from the last term to the first
        series *= near
        series += 1 / math.factorial(n)
    series *= near * near
    return xp.where(small, series, xp.expm1(x) - x)
