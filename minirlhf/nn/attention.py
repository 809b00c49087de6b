"""Causal self-attention over left- and right-padded sequences.

B sequences, T tokens, C channels, H heads, D = C / H channels a head. Queries may be fewer than
keys: the last block of a transformer only computes the Q columns that somebody reads.
"""

import math
from typing import NamedTuple

from minirlhf.backend import Array, get_xp, surely_within
from minirlhf.nn.layers import TakeColumnsCache, take_columns_backward, take_columns_forward

SAFE_SCORE = 60.0  # exp of +-60, and sums of it, neither overflow nor vanish in float32


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


def unnormalised_attention(q_BHQD: Array, k_BHTD: Array, allowed: Array) -> tuple[Array, Array]:
    """E_ij = exp(q_i k_j) over the allowed j, exactly 0 at the others, and its row sums.

    The softmax is E / sum; the division is left to the output, which is smaller. The row's maximum
    is subtracted before exp, which cancels in the softmax, wherever that could matter.

    Args:     q_BHQD: (B, H, Q, D) queries, already divided by sqrt(D).
              k_BHTD: (B, H, T, D) keys.
              allowed: 1 or 0, broadcast to (B, H, Q, T), with at least one 1 a row.
    Returns:  E (B, H, Q, T), total (B, H, Q, 1).
    """
    xp = get_xp(q_BHQD, k_BHTD, allowed)
    exp_scores = q_BHQD @ k_BHTD.swapaxes(-1, -2)  # (B, H, Q, T) scores so far, exp comes below
    # .real: gradient checks pass complex numbers x + ih, which have no order
    if not surely_within(exp_scores.real, SAFE_SCORE):
        # -inf lies below any score, and a row's maximum is finite: it has an allowed entry
        exp_scores = xp.where(allowed > 0, exp_scores, -xp.inf)
        exp_scores -= exp_scores.real.max(axis=-1, keepdims=True)
    xp.exp(exp_scores, out=exp_scores)
    exp_scores *= allowed  # exactly 0 at the others, also where no maximum was subtracted
    total = exp_scores @ xp.ones((exp_scores.shape[-1], 1), dtype=exp_scores.dtype)  # (B, H, Q, 1)
    return exp_scores, total


def split_heads(x: Array, n_head: int) -> Array:
    """(B, T, C) -> (B, H, T, D), a view."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


class AttentionCache(NamedTuple):
    qkv: Array  # (B, T, 3C) borrowed
    q: Array  # (B, Q, C) queries read, divided by sqrt(D)
    exp_scores: Array  # (B, H, Q, T) E
    total: Array  # (B, H, Q, 1) row sums of E
    out: Array  # (B, Q, C)
    taken: TakeColumnsCache | None  # which columns the queries are


def attention_forward(
    qkv: Array, *, n_head: int, allowed: Array, read: Array | None = None
) -> tuple[Array, AttentionCache]:
    """out_i = sum_j A_ij v_j,  A = softmax_j(q_i k_j / sqrt(D)) over the allowed j, head by head.

    Vaswani et al. 2017, arXiv 1706.03762, equation 1.

    Args:     qkv: (B, T, 3C) queries, keys and values side by side, as one linear layer makes them.
              n_head: H.
              allowed: (B, 1, T, T) from `causal_mask`.
              read: (B, Q) columns whose output is wanted, each at most once; None: all T.
    Returns:  out (B, Q, C), cache.
    Raises:   ValueError: the width of qkv is not 3 C with C a multiple of n_head.
    """
    B, T, C3 = qkv.shape
    if C3 % (3 * n_head) != 0:
        raise ValueError(
            f"attention: expected qkv (B, T, 3C) with C a multiple of n_head = {n_head}; "
            f"got {qkv.shape}"
        )
    xp = get_xp(qkv, allowed)
    C = C3 // 3
    q, taken = qkv[..., :C], None
    if read is not None:
        q, taken = take_columns_forward(q, columns=read)
        allowed = take_columns_forward(allowed[:, 0], columns=read)[0][:, None]  # (B, 1, Q, T)
    q = q * (1.0 / math.sqrt(C // n_head))  # (B, Q, C) smaller than the scores Q x T
    k_BHTD, v_BHTD = (split_heads(qkv[..., i * C : (i + 1) * C], n_head) for i in (1, 2))
    exp_scores, total = unnormalised_attention(split_heads(q, n_head), k_BHTD, allowed)
    out = xp.empty(q.shape, dtype=qkv.dtype)  # (B, Q, C)
    out_BHQD = split_heads(out, n_head)  # a view: the heads write where they belong
    xp.matmul(exp_scores, v_BHTD, out=out_BHQD)
    out_BHQD /= total  # the division of the softmax, on D columns instead of T
    return out, AttentionCache(qkv, q, exp_scores, total, out, taken)


def attention_backward(dout: Array, cache: AttentionCache) -> Array:
    """dv = A^T do,  dA = do v^T,  dS = A (dA - sum_j A dA),  dq = dS k / sqrt(D),  dk = dS^T q.

    With A = E / total the division is made once on do:  A^T do = E^T (do / total), and so on. The
    row sum needs no pass over Q x T:  sum_j A_ij dA_ij = do_i . out_i.  (B, Q, C) -> (B, T, 3C).
    """
    qkv, q, exp_scores, total, out, taken = cache
    xp = get_xp(dout, qkv)
    H, C = exp_scores.shape[1], out.shape[-1]
    k_BHTD, v_BHTD = (split_heads(qkv[..., i * C : (i + 1) * C], H) for i in (1, 2))
    dqkv = xp.empty_like(qkv)
    dk, dv = (split_heads(dqkv[..., i * C : (i + 1) * C], H) for i in (1, 2))  # views to write to
    dout_over_total = split_heads(dout, H) / total
    row_sum = xp.einsum("bhqd,bhqd->bhq", dout_over_total, split_heads(out, H))  # (B, H, Q)

    xp.matmul(exp_scores.swapaxes(-1, -2), dout_over_total, out=dv)
    dscore = dout_over_total @ v_BHTD.swapaxes(-1, -2)  # (B, H, Q, T) dA so far
    dscore -= row_sum[..., None]
    dscore *= exp_scores  # 0 where not allowed
    xp.matmul(dscore.swapaxes(-1, -2), split_heads(q, H), out=dk)
    dq = xp.empty_like(out)
    xp.matmul(dscore, k_BHTD, out=split_heads(dq, H))
    dq *= 1.0 / math.sqrt(C // H)  # of the q before it was scaled
    dqkv[..., :C] = dq if taken is None else take_columns_backward(dq, taken)
    return dqkv
