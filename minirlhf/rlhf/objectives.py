"""The losses of PPO and its kin: the surrogates, value and KL.

Each returns a number to minimise. Means over tokens are sums with weights: `token_weights` turns a
mask into w (B, T), and every loss is sum_t w_t l_t. Weights are made once for a whole minibatch, so
cutting it into micro-batches and adding up their losses and gradients changes nothing.
SURROGATES has the objectives by name: one of your own is one more row (README.md shows how).
"""

from typing import NamedTuple

from minirlhf.backend import Array, as_float, check_same_shape, fused, get_xp
from minirlhf.rlhf import kl

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
    seq-mean-token-sum-norm  1 / constant               a fixed denominator (Dr. GRPO, Liu et al.
                                                        2025, arXiv 2503.20783); PPO takes N x the
                                                        model's positions

    Args:     mask: (B, T) 1 at response tokens.
              mode: one of AGGREGATIONS.
              constant: for seq-mean-token-sum-norm; None takes B x T.
    Returns:  (B, T) in the mask's dtype (a mask of integers or booleans: `as_float`); zero
              everywhere if the mask is.
    Raises:   ValueError: another mode.
    """
    xp, mask = get_xp(mask), as_float(mask)
    kept = (mask > 0).astype(mask.dtype)
    lengths = kept.sum(axis=1, keepdims=True)  # (B, 1)
    responses = xp.maximum((lengths > 0).sum(), 1).astype(mask.dtype)  # those with a token
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

    Returns:  (), cache.
    Raises:   ValueError: x and weights differ in shape.
    """
    check_same_shape("weighted_sum", x=x, weights=weights)
    xp, x, weights = get_xp(x, weights), as_float(x), as_float(weights)
    kept = xp.where(weights == 0, 0.0, x)  # a selection, not a product: 0 * inf would be nan
    return (weights * kept).sum(), WeightedSumCache(weights)


def weighted_sum_backward(dloss: Array, cache: WeightedSumCache) -> Array:
    """dx_t = dloss w_t."""
    return dloss * cache.weights


# -- what is maximised ---------------------------------------------------------------------------
CLIPS = ("ppo", "book", "none")


class PPOClipCache(NamedTuple):
    slope: Array  # (B, T) d obj_t / d logp_t
    clipped: Array  # (B, T) boolean: obj does not follow the ratio, whichever bound it met
    weights: Array  # (B, T) borrowed


@fused
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

    Schulman et al. 2017, arXiv 1707.06347, equation 7; ratio_t = exp(logp_t - old_logp_t). Only
    this surrogate is differentiated. A is constant; beta is inside A unless kl_mode says otherwise.
    clip="book" is min(ratio, 1 + e_high) A, as a textbook prints it: for A < 0 no lower bound.
    clip="none" is ratio A. Two e: clip-higher (Yu et al. 2025, arXiv 2503.14476). dual_clip c > 1
    bounds obj from below by c A where A < 0 (Ye et al. 2020, arXiv 1912.09729).

    Args:     logp: (B, T) log pi_theta(y_t|.) [nats].
              old_logp: (B, T) of the policy that sampled; |logp - old_logp| is cut at 20.
              advantages: (B, T) A_t [reward units, or whitened].
              weights: (B, T) from `token_weights`.
              clip_eps: e, or (e_low, e_high).
    Returns:  loss () [advantage units], cache.
    Raises:   ValueError: shapes differ, or a setting is out of range.
    Tested by: tests/rlhf/test_equations.py::test_ppo_clip
    """
    check_same_shape(
        "ppo_clip", logp=logp, old_logp=old_logp, advantages=advantages, weights=weights
    )
    low, high = _clip_range(clip_eps, clip, dual_clip)
    xp = get_xp(logp, old_logp, advantages, weights)
    logp, old_logp, advantages, weights = map(as_float, (logp, old_logp, advantages, weights))
    clamped, inside = kl.clamp_log_ratio(logp - old_logp)
    ratio = xp.exp(clamped)  # (B, T)
    obj = slope = ratio * advantages  # d ratio / d logp = ratio; another obj sets its own slope
    moves = inside  # where obj follows ratio; at a tie it does, or the first update had no slope
    if clip == "ppo":  # .real: gradient checks pass complex numbers x + ih, which have no order
        above = (advantages >= 0) & (ratio.real > 1 + high)
        below = (advantages < 0) & (ratio.real < 1 - low)
        obj = xp.where(above, (1 + high) * advantages, obj)
        obj = xp.where(below, (1 - low) * advantages, obj)
        moves = moves & ~(above | below)
    elif clip == "book":
        above = ratio.real > 1 + high  # whatever the sign of A
        obj = xp.where(above, (1 + high) * advantages, obj)
        moves = moves & ~above
    if dual_clip is not None:
        floored = (advantages < 0) & (obj.real < dual_clip * advantages)
        obj = xp.where(floored, dual_clip * advantages, obj)
        moves = moves & ~floored
    slope = xp.where(moves & (weights > 0), slope, 0.0)  # padding may hold inf or nan
    loss = -(weights * xp.where(weights > 0, obj, 0.0)).sum()
    return loss, PPOClipCache(slope, ~moves, weights)


def ppo_clip_backward(dloss: Array, cache: PPOClipCache) -> Array:
    """dlogp_t = -dloss w_t ratio_t A_t where obj follows the ratio, else 0.

    It does so for A >= 0 up to 1 + e_high, and for A < 0 down to 1 - e_low. There, with
    `token_logprobs_backward`, the logits get for every token a of the vocabulary

        dz_a = -w_t ratio_t A_t (1[a = y_t] - P_a) / tau        (dloss = 1)

    with the penalty inside A_t: the rewards it was made of hold -beta kl_token.
    Tested by: tests/rlhf/test_equations.py::test_the_gradient_on_the_logits
    """
    return -dloss * cache.weights * cache.slope


def _clip_range(
    clip_eps: float | tuple[float, float], clip: str, dual_clip: float | None
) -> tuple[float, float]:
    """(e_low, e_high), all settings of `ppo_clip` being in range."""
    low, high = clip_eps if isinstance(clip_eps, tuple) else (clip_eps, clip_eps)
    floor_allowed = dual_clip is None or dual_clip > 1
    if clip not in CLIPS or min(low, high) < 0 or not floor_allowed:
        raise ValueError(
            f"ppo_clip: expected one of {', '.join(CLIPS)}, clip_eps >= 0 and dual_clip > 1; "
            f"got {clip!r}, {clip_eps} and {dual_clip}"
        )
    return low, high


class GSPOCache(NamedTuple):
    clipped: Array  # (B, T)
    clip: PPOClipCache
    share: Array  # (B, T) 1 / |y| at the tokens of a response, 0 at padding


def gspo_forward(
    logp: Array, *, old_logp: Array, advantages: Array, weights: Array, **clip
) -> tuple[Array, GSPOCache]:
    """PPO's objective with one ratio for all tokens of a response, s = (pi(y) / old(y))^(1/|y|).

    GSPO, Zheng et al. 2025, arXiv 2507.18071: log s is the mean of the tokens' log-ratios, so with
    one A a response the clip keeps or drops it as a whole. Their clip_eps are 3e-4 and 4e-4.

    Args:     as `ppo_clip_forward`; clip: its settings.
    Returns:  loss () [advantage units], cache.
    Raises:   ValueError: as `ppo_clip_forward`.
    Tested by: tests/rlhf/test_equations.py::test_gspo
    """
    check_same_shape("gspo", logp=logp, old_logp=old_logp, weights=weights)
    xp, logp, old_logp, weights = get_xp(logp, weights), *map(as_float, (logp, old_logp, weights))
    kept = (weights > 0).astype(weights.dtype)
    share = kept / xp.maximum(kept.sum(axis=1, keepdims=True), 1)
    log_ratio = xp.where(kept > 0, logp - old_logp, 0.0)
    log_s = kept * (share * log_ratio).sum(axis=1, keepdims=True)  # (B, T) the same along y
    same = {"old_logp": 0.0 * log_s.real, "advantages": advantages, "weights": weights}
    loss, cache = ppo_clip_forward(log_s, **same, **clip)
    return loss, GSPOCache(cache.clipped, cache, share)


def gspo_backward(dloss: Array, cache: GSPOCache) -> Array:
    """dlogp_i = (1/|y|) sum_t of what `ppo_clip_backward` gives the tokens of the response."""
    dlog_s = ppo_clip_backward(dloss, cache.clip)  # 0 at padding
    return cache.share * dlog_s.sum(axis=1, keepdims=True)


class CISPOCache(NamedTuple):
    clipped: Array  # (B, T) boolean: the weight was cut, though its gradient was not
    slope: Array  # (B, T) weight_t A_t
    weights: Array  # (B, T) borrowed


def cispo_forward(
    logp: Array,
    *,
    old_logp: Array,
    advantages: Array,
    weights: Array,
    clip_eps: float | tuple[float, float] = 0.2,
    clip: str = "ppo",
) -> tuple[Array, CISPOCache]:
    """loss = -sum_t w_t c_t A_t logp_t,  c = clip(ratio, 1 - e_low, 1 + e_high), held constant.

    CISPO, MiniMax 2025, arXiv 2506.13585: the weight is cut, and every token keeps its gradient,
    also where PPO's clip drops it. clip="book" cuts from above alone, as they do; "none" nowhere.

    Args:     as `ppo_clip_forward`.
    Returns:  loss () [advantage units times nats], cache.
    Raises:   ValueError: shapes differ, or a setting is out of range.
    Tested by: tests/rlhf/test_equations.py::test_cispo
    """
    check_same_shape("cispo", logp=logp, old_logp=old_logp, advantages=advantages, weights=weights)
    low, high = _clip_range(clip_eps, clip, None)
    xp = get_xp(logp, old_logp, advantages, weights)
    logp, old_logp, advantages, weights = map(as_float, (logp, old_logp, advantages, weights))
    clamped, inside = kl.clamp_log_ratio(logp - old_logp)
    ratio, kept = xp.exp(clamped), weights > 0
    too_low = (clip == "ppo") & (ratio.real < 1 - low)
    too_high = (clip != "none") & (ratio.real > 1 + high)
    weight = xp.where(too_high, 1 + high, xp.where(too_low, 1 - low, ratio))
    slope = xp.where(kept, weight * advantages, 0.0)
    loss = -(weights * slope * xp.where(kept, logp, 0.0)).sum()
    return loss, CISPOCache(too_low | too_high | ~inside, slope, weights)


def cispo_backward(dloss: Array, cache: CISPOCache) -> Array:
    """dlogp_t = -dloss w_t c_t A_t."""
    return -dloss * cache.weights * cache.slope


SURROGATES = {  # what --ppo.ratio names: forward(logp, *, old_logp, advantages, weights, clip ..)
    "token": (ppo_clip_forward, ppo_clip_backward),
    "sequence": (gspo_forward, gspo_backward),
    "clipped-weight": (cispo_forward, cispo_backward),
}


class ValueLossCache(NamedTuple):
    slope: Array  # (B, T) d loss_t / d values_t
    weights: Array  # (B, T) borrowed


@fused
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

    Args:     values: (B, T) V(x, y_<t) of the current parameters [reward units].
              old_values: (B, T) of the rollout.
              returns: (B, T) targets from `gae`.
              weights: (B, T).
              clip_eps: e [reward units]; None leaves 1/2 (V - R)^2.
    Returns:  loss (), cache.
    Raises:   ValueError: shapes differ.
    Tested by: tests/rlhf/test_equations.py::test_value_loss
    """
    check_same_shape(
        "value_loss", values=values, old_values=old_values, returns=returns, weights=weights
    )
    xp = get_xp(values, old_values, returns, weights)
    values, old_values, returns, weights = map(as_float, (values, old_values, returns, weights))
    error = values - returns  # (B, T)
    if clip_eps is not None:
        moved = values - old_values
        too_high, too_low = moved.real > clip_eps, moved.real < -clip_eps
        edge = old_values - returns + xp.where(too_high, clip_eps, -clip_eps).astype(returns.dtype)
        # inside the range both errors are the same one, so only beyond it can the clipped one win
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


SAMPLED = {  # KLMode.in_loss of the sampled tokens' log-probs alone
    "token": (kl.token_kl_loss_forward, kl.token_kl_loss_backward),
    "sequence": (kl.sequence_kl_loss_forward, kl.sequence_kl_loss_backward),
}


class KLLossCache(NamedTuple):
    mode: kl.KLMode
    sampled: kl.TokenKLCache | kl.SequenceKLCache | None
    full: kl.FullKLCache | None
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
    """The share of the penalty that `kl_mode` (kl.KL_MODES) puts into the loss; 0 if there is none.

    token       sum_t w_t rho_t k(logp_t - ref_logp_t)
    sequence    sum_b w_b rho_b k(sum_t logp - ref_logp)
    full        sum_t w_t KL(pi(.|s_t) || ref(.|s_t))
    rao_blackwell   the same number; its gradient adds sum_t w_t grad logp_t (later tokens' KL)

    Args:     logits: (B, T, V) of the current policy; used by full and rao_blackwell.
              logp: (B, T) of the sampled tokens [nats].
              old_logp, ref_logp: (B, T), constant.
              ref_logits: (B, T, V), constant; None unless full or rao_blackwell.
              weights: (B, T) from `token_weights`.
              temperature: tau > 0.
    Returns:  loss () [nats times the weights' unit], cache.
    Raises:   ValueError: another kl_mode, or shapes that do not fit.
    """
    mode, weights = kl.named(kl.KL_MODES, "kl_loss", kl_mode), as_float(weights)
    loss = (0.0 * weights).sum()  # a 0 that stands on the weights' device, in their dtype
    sampled = full = future = None
    if mode.in_loss in SAMPLED:
        given = {"old_logp": old_logp, "ref_logp": ref_logp, "weights": weights}
        estimate, _ = SAMPLED[mode.in_loss]
        loss, sampled = estimate(logp, estimator=mode.estimator, ratio=mode.ratio, **given)
    elif mode.needs_ref_logits:
        kl_token, full = kl.full_kl_forward(logits, ref_logits=ref_logits, temperature=temperature)
        loss, _ = weighted_sum_forward(kl_token, weights=weights)
        if mode.in_loss == "rao_blackwell":
            future = kl.future_kl(kl_token, mask=weights)
    return loss, KLLossCache(mode, sampled, full, weights, future, logits.shape)


def kl_loss_backward(dloss: Array, cache: KLLossCache) -> tuple[Array, Array]:
    """dlogits (B, T, V) and dlogp (B, T); the one that the mode does not use is 0."""
    xp = get_xp(cache.weights)
    dlogits = xp.zeros(cache.logits_shape, dtype=cache.weights.dtype)
    dlogp = xp.zeros_like(cache.weights)
    if cache.sampled is not None:
        _, backward = SAMPLED[cache.mode.in_loss]
        dlogp = backward(dloss, cache.sampled)
    if cache.full is not None:
        dlogits = kl.full_kl_backward(dloss * cache.weights, cache.full)
    if cache.future is not None:
        dlogp = dloss * cache.weights * cache.future  # REINFORCE on the later KL
    return dlogits, dlogp
