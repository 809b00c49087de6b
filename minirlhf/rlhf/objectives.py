"""The losses of the three stages: cross-entropy; Bradley-Terry and Plackett-Luce; PPO.

Each returns a number to minimise. Means over tokens are sums with weights: `token_weights` turns a
mask into w (B, T), and every loss is sum_t w_t l_t. Weights are made once for a whole minibatch, so
cutting it into micro-batches and adding up their losses and gradients changes nothing.
"""

from typing import NamedTuple

from minirlhf.backend import Array, check_same_shape, get_xp
from minirlhf.rlhf.kl import (
    KL_MODES,
    FullKLCache,
    SequenceKLCache,
    TokenKLCache,
    clamp_log_ratio,
    full_kl_backward,
    full_kl_forward,
    future_kl,
    sequence_kl_loss_backward,
    sequence_kl_loss_forward,
    token_kl_loss_backward,
    token_kl_loss_forward,
)

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


def token_weights(mask: Array, *, mode: str = "token-mean", constant: float | None = None) -> Array:
    """The weight of each token in a loss; 0 at padding. N responses, M tokens in all.

    token-mean               1 / M                      every token counts alike (the default)
    seq-mean-token-mean      1 / (N length)             every response counts alike (GRPO)
    seq-mean-token-sum       1 / N                      mean over responses of sums over tokens
    seq-mean-token-sum-norm  1 / constant               a fixed denominator (Dr. GRPO, 2503.20783);
                                                        PPO takes N x the model's positions

    Args:
        mask: (B, T) 1 at response tokens.
        mode: one of AGGREGATIONS.
        constant: for seq-mean-token-sum-norm; None takes B x T.
    Returns:
        (B, T) in the mask's dtype; zero everywhere if the mask is.
    Raises:
        ValueError: another mode.
    """
    xp = get_xp(mask)
    kept = (mask > 0).astype(mask.dtype)
    lengths = kept.sum(axis=1, keepdims=True)  # (B, 1)
    responses = xp.maximum((lengths > 0).sum(), 1).astype(mask.dtype)
    if mode == "token-mean":
        return kept / xp.maximum(kept.sum(), 1)
    if mode == "seq-mean-token-mean":
        return kept / (xp.maximum(lengths, 1) * responses)
    if mode == "seq-mean-token-sum":
        return kept / responses
    if mode == "seq-mean-token-sum-norm":
        return kept / float(constant or mask.size)
    raise ValueError(f"token_weights: expected one of {', '.join(AGGREGATIONS)}; got {mode!r}")


class WeightedSumCache(NamedTuple):
    weights: Array  # (B, T) borrowed


def weighted_sum_forward(x: Array, *, weights: Array) -> tuple[Array, WeightedSumCache]:
    """sum_t w_t x_t. Padding (w = 0) may hold anything, inf included.

    Returns:
        (), cache.
    Raises:
        ValueError: x and weights differ in shape.
    """
    check_same_shape("weighted_sum", x=x, weights=weights)
    xp = get_xp(x, weights)
    return (weights * xp.where(weights == 0, 0.0, x)).sum(), WeightedSumCache(weights)


def weighted_sum_backward(dloss: Array, cache: WeightedSumCache) -> Array:
    """dx_t = dloss w_t."""
    return dloss * cache.weights


# -- stage 1: imitation --------------------------------------------------------------------------


def cross_entropy_forward(logp: Array, *, weights: Array) -> tuple[Array, WeightedSumCache]:
    """loss = -sum_t w_t logp_t: the mean negative log-probability of the demonstrated tokens.

    Args:
        logp: (B, T) from `token_logprobs_forward` [nats].
        weights: (B, T).
    Returns:
        loss () [nats per token, with token-mean weights], cache.
    """
    loss, cache = weighted_sum_forward(logp, weights=weights)
    return -loss, cache


def cross_entropy_backward(dloss: Array, cache: WeightedSumCache) -> Array:
    """dlogp_t = -dloss w_t. With token_logprobs_backward:  dz = w (P - onehot) / tau."""
    return -weighted_sum_backward(dloss, cache)


# -- stage 2: preferences ------------------------------------------------------------------------


def log_sigmoid(x: Array) -> Array:
    """log sigma(x) = min(x, 0) - log1p(exp(-|x|)), finite for every finite x."""
    xp = get_xp(x)
    negative = x.real < 0
    return xp.where(negative, x, 0.0) - xp.log1p(xp.exp(xp.where(negative, x, -x)))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return get_xp(x).exp(log_sigmoid(x))


class BradleyTerryCache(NamedTuple):
    slope: Array  # (B,) d loss_b / d (difference of scores), divided by B


def bradley_terry_forward(
    score_chosen: Array,
    score_rejected: Array,
    *,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Array, BradleyTerryCache]:
    """loss = -mean_b [(1 - s) log sigma(d_b) + s log sigma(-d_b)],  d = chosen - rejected - margin.

    Bradley & Terry 1952: Pr(a preferred to b) = sigma(score_a - score_b). s is the share of labels
    assumed to be flipped.

    Args:
        score_chosen: (B,) scores of the preferred responses.
        score_rejected: (B,) of the others.
        margin: difference that is asked for [score units].
        label_smoothing: s in [0, 0.5).
    Returns:
        loss () [nats per pair], cache.
    Raises:
        ValueError: shapes differ, there is no pair, or s is out of range.
    Tested by: tests/test_equations.py::test_bradley_terry_fixture
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
    s = label_smoothing
    difference = score_chosen - score_rejected - margin
    losses = -(1 - s) * log_sigmoid(difference) - s * log_sigmoid(-difference)
    slope = s * sigmoid(difference) - (1 - s) * sigmoid(-difference)
    n = difference.size
    return losses.sum() / n, BradleyTerryCache(slope / n)


def bradley_terry_backward(dloss: Array, cache: BradleyTerryCache) -> tuple[Array, Array]:
    """dscore_chosen = -sigma(-d) / B,  dscore_rejected = +sigma(-d) / B   (s = 0, dloss = 1)."""
    dchosen = dloss * cache.slope
    return dchosen, -dchosen


class RankedPairsCache(NamedTuple):
    slope: Array  # (B, K, K) d loss / d (score_i - score_j), 0 unless i is ranked above j


def ranked_pairs_forward(scores: Array) -> tuple[Array, RankedPairsCache]:
    """loss = -mean over lists and over the K(K-1)/2 ranked pairs of log sigma(score_i - score_j).

    Ouyang et al. 2022, arXiv 2203.02155, equation 1. Only pairs with i ranked above j: over all
    ordered pairs the loss would be least at equal scores.

    Args:
        scores: (B, K) scores of K responses in the order of their rank, the best first.
    Returns:
        loss () [nats per pair], cache.
    Raises:
        ValueError: fewer than two responses.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"ranked_pairs: expected scores (B, K) with K >= 2; got {scores.shape}")
    xp = get_xp(scores)
    B, K = scores.shape
    rank = xp.arange(K)
    above = rank[:, None] < rank[None, :]  # (K, K)
    difference = scores[:, :, None] - scores[:, None, :]  # (B, K, K)
    n = B * K * (K - 1) // 2
    loss = -xp.where(above, log_sigmoid(difference), 0.0).sum() / n
    return loss, RankedPairsCache(xp.where(above, -sigmoid(-difference), 0.0) / n)


def ranked_pairs_backward(dloss: Array, cache: RankedPairsCache) -> Array:
    """dscore_i = sum_j slope_ij - sum_j slope_ji."""
    return dloss * (cache.slope.sum(axis=2) - cache.slope.sum(axis=1))


class PlackettLuceCache(NamedTuple):
    choice: Array  # (B, K, K) probability of item i at step k, 0 for items already taken


def plackett_luce_forward(scores: Array) -> tuple[Array, PlackettLuceCache]:
    """loss = -mean_b sum_k [score_k - log sum_{i>=k} exp(score_i)], items in ranked order.

    Plackett 1975, Luce 1959: the ranking is built by choosing the best of what remains, with
    probability proportional to the worth exp(score). K = 2 is Bradley-Terry.

    Args:
        scores: (B, K) in the order of their rank, the best first.
    Returns:
        loss () [nats per list], cache.
    Raises:
        ValueError: fewer than two responses.
    Tested by: tests/test_equations.py::test_plackett_luce_fixtures
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"plackett_luce: expected scores (B, K) with K >= 2; got {scores.shape}")
    xp = get_xp(scores)
    B, K = scores.shape
    item = xp.arange(K)
    remaining = item[:, None] <= item[None, :]  # (K, K): at step k, items k, k+1, ...
    z = scores - scores.real.max(axis=1, keepdims=True)
    worth = xp.where(remaining, z[:, None, :], -xp.inf)  # (B, K, K)
    top = worth.real.max(axis=2, keepdims=True)
    choice = xp.where(remaining, xp.exp(xp.where(remaining, worth - top, 0.0)), 0.0)
    total = choice.sum(axis=2, keepdims=True)
    loss = (top[..., 0] + xp.log(total[..., 0]) - z).sum() / B
    return loss, PlackettLuceCache(choice / total)


def plackett_luce_backward(dloss: Array, cache: PlackettLuceCache) -> Array:
    """dscore_i = (sum_{k <= rank(i)} softmax_{>=k}(score)_i - 1) / B."""
    B = cache.choice.shape[0]
    return dloss * (cache.choice.sum(axis=1) - 1.0) / B


# -- stage 3: PPO --------------------------------------------------------------------------------


class PPOClipCache(NamedTuple):
    slope: Array  # (B, T) d obj_t / d logp_t
    clipped: Array  # (B, T) boolean: obj does not follow the ratio
    weights: Array  # (B, T) borrowed


def ppo_clip_forward(
    logp: Array,
    *,
    old_logp: Array,
    advantages: Array,
    weights: Array,
    clip_eps: float | tuple[float, float] = 0.2,
    clip: str = "ppo",
    dual_clip: float | None = None,
) -> tuple[Array, PPOClipCache]:
    """loss = -sum_t w_t obj_t,  obj = min(ratio A, clip(ratio, 1 - e_low, 1 + e_high) A).

    Schulman et al. 2017, arXiv 1707.06347, equation 7; ratio_t = exp(logp_t - old_logp_t).
    clip="book" is Clip(ratio) A with Clip(ratio) = min(ratio, 1 + e_high), as a textbook prints it:
    for A < 0 it is no lower bound. clip="none" is ratio A. Two e: clip-higher (2503.14476).
    dual_clip c > 1 bounds obj from below by c A where A < 0 (1912.09729).
    At a tie the slope of the unclipped branch is taken: at ratio = 1 the first update counts.

    Args:
        logp: (B, T) log pi_theta(y_t|.) [nats].
        old_logp: (B, T) of the policy that sampled; |logp - old_logp| is cut at 20.
        advantages: (B, T), constant.
        weights: (B, T) from `token_weights`.
        clip_eps: e, or (e_low, e_high).
    Returns:
        loss () [advantage units], cache.
    Raises:
        ValueError: shapes differ, or a setting is out of range.
    Tested by: tests/test_equations.py::test_ppo_clip
    """
    check_same_shape(
        "ppo_clip", logp=logp, old_logp=old_logp, advantages=advantages, weights=weights
    )
    low, high = clip_eps if isinstance(clip_eps, tuple) else (clip_eps, clip_eps)
    floor_allowed = dual_clip is None or dual_clip > 1
    if clip not in ("ppo", "book", "none") or min(low, high) < 0 or not floor_allowed:
        raise ValueError(
            'ppo_clip: expected clip "ppo", "book" or "none", clip_eps >= 0 and dual_clip > 1; '
            f"got {clip!r}, {clip_eps} and {dual_clip}"
        )
    xp = get_xp(logp, old_logp, advantages, weights)
    clamped, inside = clamp_log_ratio(logp - old_logp)
    ratio = xp.exp(clamped)
    obj = ratio * advantages
    moves = inside  # where obj follows ratio
    if clip == "ppo":
        above = (advantages >= 0) & (ratio.real > 1 + high)
        below = (advantages < 0) & (ratio.real < 1 - low)
        obj = xp.where(above, (1 + high) * advantages, obj)
        obj = xp.where(below, (1 - low) * advantages, obj)
        moves = moves & ~(above | below)
    elif clip == "book":
        above = ratio.real > 1 + high
        obj = xp.where(above, (1 + high) * advantages, obj)
        moves = moves & ~above
    if dual_clip is not None:
        floored = (advantages < 0) & (obj.real < dual_clip * advantages)
        obj = xp.where(floored, dual_clip * advantages, obj)
        moves = moves & ~floored
    slope = xp.where(moves & (weights > 0), ratio * advantages, 0.0)
    loss = -(weights * xp.where(weights > 0, obj, 0.0)).sum()
    return loss, PPOClipCache(slope, ~moves, weights)


def ppo_clip_backward(dloss: Array, cache: PPOClipCache) -> Array:
    """dlogp_t = -dloss w_t ratio_t A_t where obj follows the ratio, else 0.

    It does so for A >= 0 up to 1 + e_high, and for A < 0 down to 1 - e_low.
    """
    return -dloss * cache.weights * cache.slope


class ValueLossCache(NamedTuple):
    slope: Array  # (B, T) d loss_t / d values_t
    weights: Array  # (B, T) borrowed


def value_loss_forward(
    values: Array,
    *,
    old_values: Array,
    returns: Array,
    weights: Array,
    clip_eps: float | None = 0.2,
) -> tuple[Array, ValueLossCache]:
    """loss = 1/2 sum_t w_t max((V - R)^2, (V_c - R)^2),  V_c = V_old + clip(V - V_old, -e, e).

    As in lm-human-preferences (Ziegler et al. 2019, arXiv 1909.08593). R is held constant.

    Args:
        values: (B, T) V(x, y_<t) of the current parameters [reward units].
        old_values: (B, T) of the rollout.
        returns: (B, T) targets from `gae`.
        weights: (B, T).
        clip_eps: e [reward units]; None leaves 1/2 (V - R)^2.
    Returns:
        loss (), cache.
    Raises:
        ValueError: shapes differ.
    Tested by: tests/test_equations.py::test_value_loss
    """
    check_same_shape(
        "value_loss", values=values, old_values=old_values, returns=returns, weights=weights
    )
    xp = get_xp(values, old_values, returns, weights)
    error = values - returns
    if clip_eps is not None:
        moved = values - old_values
        too_high, too_low = moved.real > clip_eps, moved.real < -clip_eps
        edge = old_values - returns + xp.where(too_high, clip_eps, -clip_eps).astype(returns.dtype)
        clipped_wins = (too_high | too_low) & ((edge * edge) > (error * error).real)
        slope = xp.where(clipped_wins, 0.0, error)  # at the edge V_c no longer follows V
        error = xp.where(clipped_wins, edge, error)
    else:
        slope = error
    loss = 0.5 * (weights * xp.where(weights > 0, error * error, 0.0)).sum()
    return loss, ValueLossCache(xp.where(weights > 0, slope, 0.0), weights)


def value_loss_backward(dloss: Array, cache: ValueLossCache) -> Array:
    """dV_t = dloss w_t (V_t - R_t), or 0 where the clipped error is the larger one."""
    return dloss * cache.weights * cache.slope


class KLLossCache(NamedTuple):
    in_loss: str | None  # which of the four below
    sampled: TokenKLCache | SequenceKLCache | None
    full: FullKLCache | None
    weights: Array  # (B, T) borrowed
    future: Array | None  # (B, T) later KL, constant
    logits_shape: tuple[int, ...]


def kl_loss_forward(
    logits: Array,
    logp: Array,
    *,
    kl_mode: str,
    old_logp: Array,
    ref_logp: Array,
    ref_logits: Array | None,
    weights: Array,
    temperature: float = 1.0,
) -> tuple[Array, KLLossCache]:
    """The share of the penalty that `kl_mode` (KL_MODES) puts into the loss; 0 if there is none.

    token       sum_t w_t rho_t k(logp_t - ref_logp_t)
    sequence    sum_b w_b rho_b k(sum_t logp - ref_logp)
    full        sum_t w_t KL(pi(.|s_t) || ref(.|s_t))
    rao_blackwell   the same number; its gradient adds sum_t w_t dlogp_t (KL of the later tokens)

    Args:
        logits: (B, T, V) of the current policy; used by full and rao_blackwell.
        logp: (B, T) of the sampled tokens [nats].
        old_logp, ref_logp: (B, T), constant.
        ref_logits: (B, T, V), constant; None unless full or rao_blackwell.
        weights: (B, T) from `token_weights`.
        temperature: tau > 0.
    Returns:
        loss () [nats times the weights' unit], cache.
    Raises:
        ValueError: another kl_mode, or shapes that do not fit.
    """
    if kl_mode not in KL_MODES:
        raise ValueError(f"kl_loss: expected one of {', '.join(KL_MODES)}; got {kl_mode!r}")
    mode = KL_MODES[kl_mode]
    sampled = full = future = None
    if mode.in_loss in ("token", "sequence"):
        estimate = token_kl_loss_forward if mode.in_loss == "token" else sequence_kl_loss_forward
        loss, sampled = estimate(
            logp,
            old_logp=old_logp,
            ref_logp=ref_logp,
            weights=weights,
            estimator=mode.estimator,
            ratio=mode.ratio,
        )
    elif mode.in_loss in ("full", "rao_blackwell"):
        kl_token, full = full_kl_forward(logits, ref_logits=ref_logits, temperature=temperature)
        loss, _ = weighted_sum_forward(kl_token, weights=weights)
        if mode.in_loss == "rao_blackwell":
            future = future_kl(kl_token, mask=weights)
    else:
        loss = (0.0 * weights).sum()
    return loss, KLLossCache(mode.in_loss, sampled, full, weights, future, logits.shape)


def kl_loss_backward(dloss: Array, cache: KLLossCache) -> tuple[Array, Array]:
    """dlogits (B, T, V) and dlogp (B, T); the one that the mode does not use is 0."""
    xp = get_xp(cache.weights)
    dlogits = xp.zeros(cache.logits_shape, dtype=cache.weights.dtype)
    dlogp = xp.zeros_like(cache.weights)
    if cache.in_loss == "token":
        dlogp = token_kl_loss_backward(dloss, cache.sampled)
    elif cache.in_loss == "sequence":
        dlogp = sequence_kl_loss_backward(dloss, cache.sampled)
    elif cache.in_loss in ("full", "rao_blackwell"):
        dlogits = full_kl_backward(dloss * cache.weights, cache.full)
        if cache.in_loss == "rao_blackwell":
            dlogp = dloss * cache.weights * cache.future
    return dlogits, dlogp
