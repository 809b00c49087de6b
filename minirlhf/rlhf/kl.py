"""The KL penalty: the summed log-ratio, its estimators, its gradients, its coefficient.

    Penalty = log Pr_theta(y|x) - log Pr_ref(y|x) = sum_t [log pi_theta(y_t|.) - log pi_ref(y_t|.)]

is an unbiased estimate of KL(pi_theta || pi_ref) when y ~ pi_theta. As a number in the reward it
gives the right gradient. As a loss to differentiate it gives none: E[grad log pi_theta] = 0. The
table KL_MODES names every placement; what each one's expected gradient is stands beside it.

log_ratio = logp - ref_logp, per token, in nats. `ref` is the frozen reference; `old` is the policy
that sampled. They are two snapshots, never one.
"""

from typing import NamedTuple

from minirlhf.backend import Array, check_same_shape, get_xp
from minirlhf.rlhf.logprobs import log_softmax, response_sum

LOG_RATIO_LIMIT = 20.0  # exp sees no larger log-ratio; the metrics count how many were cut


def clamp_log_ratio(log_ratio: Array) -> tuple[Array, Array]:
    """The log-ratio cut to [-20, 20] before it enters exp, and where it was inside.

    Returns:
        clamped (...), inside (...) boolean: the derivative of the clamp.
    """
    xp = get_xp(log_ratio)
    # nan counts as inside, so that it stays nan and is found
    inside = ~((log_ratio.real < -LOG_RATIO_LIMIT) | (log_ratio.real > LOG_RATIO_LIMIT))
    limit = xp.where(log_ratio.real > 0, LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT).astype(log_ratio.dtype)
    return xp.where(inside, log_ratio, limit), inside


def expm1_minus(x: Array) -> Array:
    """exp(x) - 1 - x without cancellation: a series below |x| = 0.01, expm1 above."""
    xp = get_xp(x)
    small = (x.real < 1e-2) & (x.real > -1e-2)
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))
    return xp.where(small, series, xp.expm1(x) - x)


def kl_estimate(log_ratio: Array, estimator: str) -> Array:
    """A one-sample estimate of KL(pi || ref) from y ~ pi, elementwise in log_ratio.

    k1 = log_ratio                          unbiased, may be negative
    k2 = log_ratio^2 / 2                    biased, >= 0
    k3 = exp(-log_ratio) - 1 + log_ratio    unbiased, >= 0

    Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).

    Args:
        log_ratio: (B, T) per token, or (B,) per sequence [nats]. Below -20 k3 stays at k3(-20).
    Returns:
        the same shape [nats].
    Raises:
        ValueError: another estimator.
    """
    if estimator == "k1":
        return log_ratio.copy()
    if estimator == "k2":
        return 0.5 * log_ratio * log_ratio
    if estimator == "k3":
        return expm1_minus(-_cut_for_k3(log_ratio)[0])
    raise ValueError(f"kl_estimate: expected k1, k2 or k3; got {estimator!r}")


def kl_estimate_slope(log_ratio: Array, estimator: str) -> Array:
    """d estimate / d log_ratio: 1, log_ratio, 1 - exp(-log_ratio) (0 where k3 is cut).

    Raises:
        ValueError: another estimator.
    """
    xp = get_xp(log_ratio)
    if estimator == "k1":
        return xp.ones_like(log_ratio)
    if estimator == "k2":
        return log_ratio.copy()
    if estimator == "k3":
        cut, inside = _cut_for_k3(log_ratio)
        return xp.where(inside, -xp.expm1(-cut), 0.0)
    raise ValueError(f"kl_estimate: expected k1, k2 or k3; got {estimator!r}")


def _cut_for_k3(log_ratio: Array) -> tuple[Array, Array]:
    """log_ratio cut from below, where exp(-log_ratio) grows, and where it was not cut."""
    xp = get_xp(log_ratio)
    inside = ~(log_ratio.real < -LOG_RATIO_LIMIT)
    return xp.where(inside, log_ratio, -LOG_RATIO_LIMIT), inside


def summed_penalty(logp: Array, ref_logp: Array, *, mask: Array) -> Array:
    """Penalty = sum_t mask_t (logp_t - ref_logp_t) = log Pr_theta(y|x) - log Pr_ref(y|x).

    One number a response, k1 summed over its tokens: it may be negative, and at theta = ref it is
    0 for every response.

    Args:
        logp: (B, T) log pi_theta(y_t|.) [nats].
        ref_logp: (B, T) log pi_ref(y_t|.) [nats].
        mask: (B, T) 1 at response tokens.
    Returns:
        kl_seq (B,) [nats].
    Raises:
        ValueError: the shapes differ.
    Tested by: tests/test_equations.py::test_summed_penalty_is_the_sequence_log_ratio
    """
    check_same_shape("summed_penalty", logp=logp, ref_logp=ref_logp, mask=mask)
    return response_sum(logp - ref_logp, mask=mask)


# -- the full-vocabulary KL, from logits ---------------------------------------------------------


class FullKLCache(NamedTuple):
    probs: Array  # (B, T, V)
    log_ratio: Array  # (B, T, V) log P - log Q
    kl_token: Array  # (B, T)
    temperature: float


def full_kl_forward(
    logits: Array, *, ref_logits: Array, temperature: float = 1.0
) -> tuple[Array, FullKLCache]:
    """kl_token_t = sum_a P_{t,a} (log P_{t,a} - log Q_{t,a}) = KL(pi(.|s_t) || ref(.|s_t)).

    Summed over the tokens of y ~ pi it is an unbiased, Rao-Blackwellised estimate of the sequence
    KL, >= 0, with less variance than k1 (Amini et al. 2025, arXiv 2504.10637).

    Args:
        logits: (B, T, V) of pi.
        ref_logits: (B, T, V) of ref, constant.
        temperature: tau > 0, of both.
    Returns:
        kl_token (B, T) [nats], cache.
    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    """
    check_same_shape("full_kl", logits=logits, ref_logits=ref_logits)
    xp = get_xp(logits, ref_logits)
    log_p = log_softmax(logits, temperature=temperature)
    log_q = log_softmax(ref_logits, temperature=temperature)
    probs = xp.exp(log_p)
    possible = probs.real > 0  # 0 log 0 = 0, also at logits of -inf
    log_ratio = xp.where(possible, log_p, 0.0) - xp.where(possible, log_q, 0.0)
    kl_token = (probs * log_ratio).sum(axis=-1)
    return kl_token, FullKLCache(probs, log_ratio, kl_token, temperature)


def full_kl_backward(dkl_token: Array, cache: FullKLCache) -> Array:
    """dz_a = dKL P_a (log P_a - log Q_a - KL) / tau.  (B, T) -> (B, T, V)."""
    probs, log_ratio, kl_token, temperature = cache
    dlogits = log_ratio - kl_token[..., None]
    dlogits *= probs
    dlogits *= (dkl_token / temperature)[..., None]
    return dlogits


def future_kl(kl_token: Array, *, mask: Array) -> Array:
    """future_t = sum_{i>t} mask_i kl_token_i: the KL that the tokens after y_t will cost.

    The full-vocabulary KL summed over sampled prefixes has only the partial gradient: it ignores
    that an early token moves the later prefixes. Adding sum_t logp_t sg(future_t) to the loss
    makes the expected gradient exact (Amini et al. 2025, arXiv 2504.10637).

    Args:
        kl_token: (B, T) from `full_kl_forward` [nats].
        mask: (B, T) 1 at response tokens.
    Returns:
        (B, T) [nats], to be held constant.
    """
    check_same_shape("future_kl", kl_token=kl_token, mask=mask)
    xp = get_xp(kl_token, mask)
    kept = xp.where(mask > 0, kl_token, 0.0)
    return kept[:, ::-1].cumsum(axis=1)[:, ::-1] - kept


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

    Args:
        logp: (B, T) current policy [nats].
        old_logp: (B, T) the policy that sampled.
        ref_logp: (B, T) the reference.
        weights: (B, T) weight of each token in the loss.
        estimator: k1, k2 or k3.
        ratio: "none" (rho = 1) or "both" (rho_t = exp(logp_t - old_logp_t), differentiated too).
    Returns:
        loss () [nats times the weights' unit], cache.
    Raises:
        ValueError: the shapes differ, or another estimator or ratio.
    """
    check_same_shape(
        "token_kl_loss", logp=logp, old_logp=old_logp, ref_logp=ref_logp, weights=weights
    )
    xp = get_xp(logp, old_logp, ref_logp, weights)
    log_ratio = logp - ref_logp
    value, slope = kl_estimate(log_ratio, estimator), kl_estimate_slope(log_ratio, estimator)
    if ratio == "both":
        clamped, inside = clamp_log_ratio(logp - old_logp)
        rho = xp.exp(clamped)
        value, slope = rho * value, rho * (xp.where(inside, value, 0.0) + slope)
    elif ratio != "none":
        raise ValueError(f'token_kl_loss: expected ratio "none" or "both"; got {ratio!r}')
    loss = (weights * xp.where(weights > 0, value, 0.0)).sum()
    return loss, TokenKLCache(xp.where(weights > 0, slope, 0.0), weights)


def token_kl_loss_backward(dloss: Array, cache: TokenKLCache) -> Array:
    """dlogp_t = dloss w_t k'(log_ratio_t), or rho_t (k + k') with the ratio.  () -> (B, T)."""
    return dloss * cache.weights * cache.slope


class SequenceKLCache(NamedTuple):
    slope: Array  # (B,)
    seq_weights: Array  # (B,)
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

    Args:
        as `token_kl_loss_forward`; a response's weight w_b is the weight of its tokens.
        ratio: "none", "both" (rho_b = exp(sum_t logp - old_logp), differentiated too), or "stop"
            (the same number, held constant).
    Returns:
        loss (), cache.
    Raises:
        ValueError: the shapes differ, or another estimator or ratio.
    """
    check_same_shape(
        "sequence_kl_loss", logp=logp, old_logp=old_logp, ref_logp=ref_logp, weights=weights
    )
    xp = get_xp(logp, old_logp, ref_logp, weights)
    mask = weights > 0
    seq_weights = weights.max(axis=-1)  # (B,)
    log_ratio = response_sum(logp - ref_logp, mask=mask)
    value, slope = kl_estimate(log_ratio, estimator), kl_estimate_slope(log_ratio, estimator)
    if ratio in ("both", "stop"):
        clamped, inside = clamp_log_ratio(response_sum(logp - old_logp, mask=mask))
        rho = xp.exp(clamped)
        through_rho = xp.where(inside, value, 0.0) if ratio == "both" else 0.0
        value, slope = rho * value, rho * (through_rho + slope)
    elif ratio != "none":
        raise ValueError(f"sequence_kl_loss: expected ratio none, both or stop; got {ratio!r}")
    return (seq_weights * value).sum(), SequenceKLCache(slope, seq_weights, mask)


def sequence_kl_loss_backward(dloss: Array, cache: SequenceKLCache) -> Array:
    """dlogp_bt = dloss w_b mask_bt k'(sum_t log_ratio), or rho (k + k').  () -> (B, T)."""
    return dloss * (cache.seq_weights * cache.slope)[:, None] * cache.mask


class KLMode(NamedTuple):
    """One placement of the penalty: what enters the reward, what enters the loss."""

    in_reward: str | None  # k1, k2, k3 or "full": the penalty per token in the reward, a constant
    in_loss: str | None  # "token", "sequence", "full", "rao_blackwell"
    estimator: str | None = None  # of the loss
    ratio: str = "none"  # importance ratio old -> theta in the loss
    gradient: str = ""  # the expected gradient of the penalty, on-policy unless stated

    @property
    def needs_ref_logits(self) -> bool:
        """Does the loss compare whole distributions?"""
        return self.in_loss in ("full", "rao_blackwell")


# g = grad KL(pi_theta || ref), of whole sequences. "partial" ignores that early tokens move later
# prefixes. Derivations and references: 2506.09477, 2510.01555, 2512.21852, 2504.10637.
KL_MODES = {
    "reward_k1": KLMode("k1", None, gradient="g"),
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
    "loss_rho_k1": KLMode(None, "sequence", "k1", "both", gradient="g, also off-policy"),
    "loss_rho_k2": KLMode(None, "sequence", "k2", "stop", gradient="g, also off-policy"),
    "loss_rho_k3": KLMode(None, "sequence", "k3", "both", gradient="g, also off-policy"),
    "loss_rho_k3_tok": KLMode(None, "token", "k3", "both", gradient="partial, at old prefixes"),
}


def penalty_in_reward(kl_mode: str, *, log_ratio: Array, kl_full: Array) -> Array:
    """The penalty per token that `kl_mode` puts into the reward; 0 if it puts none there.

    Args:
        log_ratio: (B, T) old_logp - ref_logp of the sampled tokens [nats].
        kl_full: (B, T) KL(old(.|s_t) || ref(.|s_t)) over the whole vocabulary [nats].
    Returns:
        (B, T) [nats].
    Raises:
        ValueError: another kl_mode, or the shapes differ.
    """
    if kl_mode not in KL_MODES:
        raise ValueError(f"kl_mode: expected one of {', '.join(KL_MODES)}; got {kl_mode!r}")
    check_same_shape("penalty_in_reward", log_ratio=log_ratio, kl_full=kl_full)
    estimator = KL_MODES[kl_mode].in_reward
    if estimator is None:
        return get_xp(log_ratio).zeros_like(log_ratio)
    return kl_full.copy() if estimator == "full" else kl_estimate(log_ratio, estimator)


# -- the coefficient -----------------------------------------------------------------------------


def adaptive_kl_coef(
    kl_coef: float, *, kl_seq: float, target: float, horizon: float, n_episodes: int
) -> float:
    """beta <- beta (1 + e n / horizon),  e = clip(kl_seq / target - 1, -0.2, 0.2).

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2, as coded by its authors.

    Args:
        kl_coef: beta [reward units per nat].
        kl_seq: mean sequence-summed KL of the batch [nats per response, not per token].
        target: wanted kl_seq [nats].
        horizon: episodes over which beta may change by up to 20 %.
        n_episodes: responses in the batch.
    Returns:
        the next beta.
    Raises:
        ValueError: target or horizon is not positive.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(
            f"adaptive_kl_coef: expected target > 0 and horizon > 0; got {target} and {horizon}"
        )
    error = min(max(kl_seq / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * n_episodes / horizon)
