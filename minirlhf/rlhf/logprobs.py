"""log pi(y_t | x, y_<t), its sum over a response, and the entropy, from logits.

`logits` (B, T, V) are already shifted: logits[:, t] predict targets[:, t]. Every function takes the
sampling temperature tau and works on z / tau: old, current and reference log-probs must all be at
the temperature of sampling, or the ratio is not 1 at the first step.
"""

from collections.abc import Callable
from typing import NamedTuple

from minirlhf.backend import (
    Array,
    as_float,
    check_ids,
    check_positive,
    check_same_shape,
    fused,
    get_xp,
)


@fused
def log_softmax(logits: Array, *, temperature: float = 1.0) -> Array:
    """log P_a = z_a/tau - log sum_b exp(z_b/tau), by subtraction of the maximum.

    Args:     logits: (..., V).
              temperature: tau > 0.
    Returns:  (..., V) log-probabilities [nats], new memory.
    Raises:   ValueError: the temperature is not positive.
    """
    check_positive("log_softmax", "temperature", temperature)
    xp, logits = get_xp(logits), as_float(logits)
    # .real: gradient checks pass complex numbers x + ih, which have no order (gradcheck.py)
    z = logits - logits.real.max(axis=-1, keepdims=True)  # (..., V) <= 0: exp cannot overflow
    z *= 1.0 / temperature  # twice as fast as the division
    z -= xp.log(xp.exp(z).sum(axis=-1, keepdims=True))
    return z


class TokenLogprobsCache(NamedTuple):
    exp_z: Array  # (B, T, V) exp((z - max)/tau), P before it is normalised
    total: Array  # (B, T) sum_a exp_z
    targets: Array  # (B, T) borrowed
    temperature: float


@fused
def token_logprobs_forward(
    logits: Array, *, targets: Array, temperature: float = 1.0, in_place: bool = False
) -> tuple[Array, TokenLogprobsCache]:
    """logp_t = z_{t,y_t}/tau - log sum_a exp(z_{t,a}/tau).

    Args:     logits: (B, T, V).
              targets: (B, T) the tokens y_t.
              temperature: tau > 0.
              in_place: True where nobody reads the logits again: exp_z takes their memory.
    Returns:  logp (B, T) [nats], cache.
    Raises:   ValueError: shapes do not fit, targets are no ids, or the temperature is not positive.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            "token_logprobs: expected logits (B, T, V) and targets (B, T); "
            f"got {logits.shape} and {targets.shape}"
        )
    check_positive("token_logprobs", "temperature", temperature)
    check_ids("token_logprobs: targets", targets, logits.shape[-1])
    xp, logits = get_xp(logits, targets), as_float(logits)
    highest = logits.real.max(axis=-1, keepdims=True)
    z = xp.subtract(logits, highest, out=logits if in_place else None)  # (B, T, V)
    z *= 1.0 / temperature
    logp = xp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]  # (B, T)
    exp_z = xp.exp(z, out=z)  # in the memory of z, which nobody reads again
    total = exp_z @ xp.ones(exp_z.shape[-1], dtype=exp_z.dtype)  # a product: the BLAS adds
    logp = logp - xp.log(total)  # P itself is never made: one pass over (B, T, V) less
    return logp, TokenLogprobsCache(exp_z, total, targets, temperature)


@fused
def token_logprobs_backward(dlogp: Array, cache: TokenLogprobsCache) -> Array:
    """dz_a = dlogp (1[a = y] - P_a) / tau.  (B, T) -> (B, T, V)."""
    exp_z, total, targets, temperature = cache
    xp = get_xp(dlogp, exp_z)
    dlogp_over_tau = dlogp / temperature
    dlogits = exp_z * (-dlogp_over_tau / total)[..., None]  # the -P_a of every token a
    B, T = targets.shape
    dlogits[xp.arange(B)[:, None], xp.arange(T), targets] += dlogp_over_tau  # no place twice
    return dlogits


SLICE_FLOATS = 1 << 20  # of one array: what `by_columns` takes of a large vocabulary at a time


def by_columns(f: Callable[..., Array], *arrays: Array) -> Array:
    """f of arrays (B, T, ..), some columns at a time: what f makes beside its result stays small.

    Args:     f: to (B, T); what it says of a column depends on no other.
              arrays: the first is logits (B, T, V).
    """
    B, T, V = arrays[0].shape
    step = max(1, SLICE_FLOATS // (B * V))
    parts = [f(*(a[:, t : t + step] for a in arrays)) for t in range(0, max(T, 1), step)]
    return get_xp(*parts).concatenate(parts, axis=1)


def response_sum(x: Array, *, mask: Array) -> Array:
    """sum_t mask_t x_t of each response, (B, T) -> (B,). Padding may hold anything, inf included.

    Raises:   ValueError: x and mask differ in shape.
    """
    check_same_shape("response_sum", x=x, mask=mask)
    # a selection, not a product: 0 * inf would be nan
    return get_xp(x, mask).where(mask > 0, as_float(x), 0.0).sum(axis=-1)


class EntropyCache(NamedTuple):
    probs: Array  # (B, T, V)
    log_probs: Array  # (B, T, V)
    entropy: Array  # (B, T)
    temperature: float


@fused
def entropy_forward(logits: Array, *, temperature: float = 1.0) -> tuple[Array, EntropyCache]:
    """H_t = -sum_a P_a log P_a of the whole vocabulary.

    Args:     logits: (B, T, V).
              temperature: tau > 0.
    Returns:  entropy (B, T) [nats], cache.
    """
    xp = get_xp(logits)
    log_probs = log_softmax(logits, temperature=temperature)  # (B, T, V)
    probs = xp.exp(log_probs)
    log_probs = xp.where(probs.real > 0, log_probs, 0.0)  # 0 log 0 = 0, also at logits of -inf
    entropy = -(probs * log_probs).sum(axis=-1)  # (B, T)
    return entropy, EntropyCache(probs, log_probs, entropy, temperature)


@fused
def entropy_backward(dentropy: Array, cache: EntropyCache) -> Array:
    """dz_a = -dH P_a (log P_a + H) / tau.  (B, T) -> (B, T, V)."""
    probs, log_probs, entropy, temperature = cache
    dlogits = log_probs + entropy[..., None]
    dlogits *= probs  # dH/dz sums to 0 over the vocabulary: a shift of all logits changes nothing
    dlogits *= (-dentropy / temperature)[..., None]
    return dlogits
