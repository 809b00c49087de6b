"""Causal self-attention over left- and right-padded sequences, and rotary positions.

B sequences, T tokens, H heads of D channels, K heads of keys and values: H of them, or fewer, each
of which serves a group of G = H / K heads of queries (Ainslie et al. 2023, arXiv 2305.13245).
Queries may be fewer than keys: the last block of a transformer only computes the Q columns that
somebody reads. qkv (B, T, (H + 2K) D) holds queries, keys and values side by side, as one linear
layer makes them.
"""

import math
from typing import NamedTuple

from minirlhf.backend import Array, fused, get_xp, surely_within
from minirlhf.nn.layers import TakeColumnsCache, take_columns_backward, take_columns_forward

SAFE_SCORE = 60.0  # exp of +-60, and sums of it, neither overflow nor vanish in float32


@fused
def causal_mask(mask: Array) -> Array:
    """allowed[b, 0, i, j]: may position i look at j?  If j <= i and j is no padding, or j = i.

    The diagonal stays open, so that no row of a softmax is empty: padding looks at itself, and
    nobody looks at padding.

    Args:     mask: (B, T) 1 at real tokens, 0 at padding.
    Returns:  (B, 1, T, T) 1 or 0 in the mask's dtype, broadcast over the heads.
    """
    xp = get_xp(mask)
    position = xp.arange(mask.shape[1])
    past = position[:, None] >= position[None, :]  # (T, T)
    itself = position[:, None] == position[None, :]
    return ((past & (mask > 0)[:, None, None, :]) | itself).astype(mask.dtype)


def unnormalised_attention(q: Array, k: Array, allowed: Array) -> tuple[Array, Array]:
    """E_ij = exp(q_i k_j) over the allowed j, exactly 0 at the others, and its row sums.

    The softmax is E / sum; the division is left to the output, which is smaller. The row's maximum
    is subtracted before exp, which cancels in the softmax, wherever that could matter.

    Args:     q: (B, K, G Q, D) queries, already divided by sqrt(D); a group's below each other.
              k: (B, K, T, D) keys.
              allowed: 1 or 0, broadcast to (B, K, G Q, T), with at least one 1 a row.
    Returns:  E (B, K, G Q, T), total (B, K, G Q, 1).
    """
    xp = get_xp(q, k, allowed)
    exp_scores = q @ k.swapaxes(-1, -2)  # (B, K, G Q, T) scores so far, exp comes below
    # .real: gradient checks pass complex numbers x + ih, which have no order
    if not surely_within(exp_scores.real, SAFE_SCORE):
        # -inf lies below any score, and a row's maximum is finite: it has an allowed entry
        exp_scores = xp.where(allowed > 0, exp_scores, -xp.inf)
        exp_scores -= exp_scores.real.max(axis=-1, keepdims=True)
    xp.exp(exp_scores, out=exp_scores)
    exp_scores *= allowed  # exactly 0 at the others, also where no maximum was subtracted
    total = exp_scores @ xp.ones((exp_scores.shape[-1], 1), dtype=exp_scores.dtype)
    return exp_scores, total


def split_heads(x: Array, n_head: int) -> Array:
    """(B, T, H D) -> (B, H, T, D), a view."""
    B, T, width = x.shape
    return x.reshape(B, T, n_head, width // n_head).swapaxes(1, 2)


def split_qkv(qkv: Array, n_head: int, n_kv_head: int) -> tuple[Array, Array, Array]:
    """queries (..., H D), keys and values (..., K D), views of qkv.

    Raises:   ValueError: the width of qkv is not (H + 2K) D, or H is no multiple of K.
    """
    D, rest = divmod(qkv.shape[-1], n_head + 2 * n_kv_head)
    if rest or n_head % n_kv_head:
        raise ValueError(
            f"attention: expected qkv (.., (H + 2K) D) with H = {n_head} a multiple of "
            f"K = {n_kv_head}; got {qkv.shape}"
        )
    edges = n_head * D, (n_head + n_kv_head) * D
    return qkv[..., : edges[0]], qkv[..., edges[0] : edges[1]], qkv[..., edges[1] :]


class AttentionCache(NamedTuple):
    qkv: Array  # (B, T, (H + 2K) D) borrowed
    q: Array  # (B, Q, H D) queries read, divided by sqrt(D)
    exp_scores: Array  # (B, K, G Q, T) E
    total: Array  # (B, K, G Q, 1) row sums of E
    out: Array  # (B, Q, H D)
    n_head: int
    taken: TakeColumnsCache | None  # which columns the queries are


@fused
def attention_forward(
    qkv: Array, *, n_head: int, n_kv_head: int = 0, allowed: Array, read: Array | None = None
) -> tuple[Array, AttentionCache]:
    """out_i = sum_j A_ij v_j,  A = softmax_j(q_i k_j / sqrt(D)) over the allowed j, head by head.

    Vaswani et al. 2017, arXiv 1706.03762, equation 1. The queries of a group stand below each
    other, so that a matrix product serves all that share a key.

    Args:     qkv: (B, T, (H + 2K) D).
              n_head, n_kv_head: H and K, which divides it; 0: as many.
              allowed: (B, 1, T, T) from `causal_mask`.
              read: (B, Q) columns whose output is wanted, each at most once; None: all T.
    Returns:  out (B, Q, H D), cache.
    Raises:   ValueError: as `split_qkv`.
    """
    xp, B, K = get_xp(qkv, allowed), len(qkv), n_kv_head or n_head
    (q, k, v), taken = split_qkv(qkv, n_head, K), None
    if read is not None:
        q, taken = take_columns_forward(q, columns=read)
        allowed = take_columns_forward(allowed[:, 0], columns=read)[0][:, None]  # (B, 1, Q, T)
    Q, D = q.shape[1], k.shape[-1] // K
    q = q * (1.0 / math.sqrt(D))  # (B, Q, H D) smaller than the scores Q x T
    if n_head > K:
        allowed = xp.tile(allowed, (1, 1, n_head // K, 1))  # (B, 1, G Q, T)
    q_rows = split_heads(q, n_head).reshape(B, K, -1, D)  # (B, K, G Q, D)
    exp_scores, total = unnormalised_attention(q_rows, split_heads(k, K), allowed)
    sums = (exp_scores @ split_heads(v, K)).reshape(B, n_head, Q, D)
    out = xp.empty(q.shape, dtype=qkv.dtype)
    # the division of the softmax, on D columns instead of T; the heads write where they belong
    xp.divide(sums, total.reshape(B, n_head, Q, 1), out=split_heads(out, n_head))
    return out, AttentionCache(qkv, q, exp_scores, total, out, n_head, taken)


@fused
def attention_backward(dout: Array, cache: AttentionCache) -> Array:
    """dv = A^T do,  dA = do v^T,  dS = A (dA - sum_j A dA),  (dq, dk) = (dS k, dS^T q) / sqrt(D).

    With A = E / total the division is made once on do:  A^T do = E^T (do / total), and so on. The
    row sum needs no pass over Q x T:  sum_j A_ij dA_ij = do_i . out_i. The sum over the queries of
    a group is in the products.  (B, Q, H D) -> (B, T, (H + 2K) D).
    """
    qkv, q, exp_scores, total, out, H, taken = cache
    xp, (B, K, rows, _), Q = get_xp(dout, qkv), exp_scores.shape, q.shape[1]
    _, k, v = split_qkv(qkv, H, K)
    dqkv = xp.empty_like(qkv)
    dq_all, dk, dv = split_qkv(dqkv, H, K)  # views to write to
    dout_over_total = split_heads(dout, H) / total.reshape(B, H, Q, 1)
    row_sum = xp.einsum("bhqd,bhqd->bhq", dout_over_total, split_heads(out, H))
    dout_over_total = dout_over_total.reshape(B, K, rows, -1)  # (B, K, G Q, D)

    xp.matmul(exp_scores.swapaxes(-1, -2), dout_over_total, out=split_heads(dv, K))
    dscore = dout_over_total @ split_heads(v, K).swapaxes(-1, -2)  # (B, K, G Q, T) dA so far
    dscore -= row_sum.reshape(B, K, rows, 1)
    dscore *= exp_scores  # 0 where not allowed
    q_rows = split_heads(q, H).reshape(B, K, rows, -1)
    xp.matmul(dscore.swapaxes(-1, -2), q_rows, out=split_heads(dk, K))  # q is scaled already
    dq_BHQD = (dscore @ split_heads(k, K)).reshape(B, H, Q, -1)
    dq = xp.empty_like(out)
    # of the q before it was scaled
    xp.multiply(dq_BHQD, 1.0 / math.sqrt(dq_BHQD.shape[-1]), out=split_heads(dq, H))
    dq_all[...] = dq if taken is None else take_columns_backward(dq, taken)
    return dqkv


# -- rotary positions ----------------------------------------------------------------------------
class RotaryCache(NamedTuple):
    cos: Array  # (B, T, 1, D/2) borrowed
    sin: Array  # (B, T, 1, D/2) borrowed
    n_rotated: int


def rotary_angles(positions: Array, *, n: int, theta: float, dtype) -> dict[str, Array]:
    """cos and sin of position * theta^(-i / n), i = 0 .. n - 1: (B, T) -> (B, T, 1, n) each.

    Su et al. 2021, arXiv 2104.09864; n = D / 2.
    """
    xp = get_xp(positions)
    angles = positions[..., None, None] * theta ** (-xp.arange(n) / n)  # in float64
    return {"cos": xp.cos(angles).astype(dtype), "sin": xp.sin(angles).astype(dtype)}


def rotary_forward(
    x: Array, *, cos: Array, sin: Array, n_rotated: int
) -> tuple[Array, RotaryCache]:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head's channels.

    A query and a key at positions i and j then have a product that depends on i - j alone.

    Args:     x: (B, T, .. D) heads side by side, of which the first n_rotated are rotated: those of
                  queries and keys.
              cos, sin: of `rotary_angles`.
    Returns:  y, shaped like x; cache.
    """
    return _rotated(x, cos, sin, n_rotated), RotaryCache(cos, sin, n_rotated)


def rotary_backward(dy: Array, cache: RotaryCache) -> Array:
    """The transposed rotation: by the opposite angle."""
    return _rotated(dy, cache.cos, -cache.sin, cache.n_rotated)


def _rotated(x: Array, cos: Array, sin: Array, n_rotated: int) -> Array:
    B, T, _ = x.shape
    get_xp(x, cos, sin)
    y = x.copy()
    halves = [array.reshape(B, T, -1, 2, cos.shape[-1])[:, :, :n_rotated] for array in (x, y)]
    (a, b), (new_a, new_b) = ((of[..., 0, :], of[..., 1, :]) for of in halves)  # views
    new_a[...] = a * cos - b * sin
    new_b[...] = b * cos + a * sin
    return y
