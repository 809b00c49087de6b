"""Causal self-attention over left- and right-padded sequences.

B sequences, T tokens, C channels, H heads, D = C / H channels a head.
"""

import math
from typing import NamedTuple

from minirlhf.backend import Array, get_xp

MASKED = -1e9  # a score that exp turns into exactly 0, and that is finite in float32


def causal_mask(mask: Array) -> Array:
    """allowed[b, 0, i, j]: may position i look at j?  If j <= i and j is no padding, or j = i.

    The diagonal stays open, so that no row of a softmax is empty: padding looks at itself, and
    nobody looks at padding.

    Args:
        mask: (B, T) 1 at real tokens, 0 at padding.
    Returns:
        (B, 1, T, T) boolean, broadcast over the heads.
    """
    xp = get_xp(mask)
    position = xp.arange(mask.shape[1])
    past = position[:, None] >= position[None, :]  # (T, T)
    itself = position[:, None] == position[None, :]
    return (past & (mask > 0)[:, None, None, :]) | itself


def attention_weights(q_BHTD: Array, k_BHSD: Array, allowed: Array) -> Array:
    """softmax_j(q_i k_j / sqrt(D)) over the allowed j; exactly 0 at the others.

    Args:
        q_BHTD: (B, H, T, D) queries.
        k_BHSD: (B, H, S, D) keys.
        allowed: boolean, broadcast to (B, H, T, S), with at least one True a row.
    Returns:
        (B, H, T, S) weights; each row sums to 1.
    """
    xp = get_xp(q_BHTD, k_BHSD, allowed)
    weights = q_BHTD @ k_BHSD.swapaxes(-1, -2)  # (B, H, T, S)
    weights *= 1.0 / math.sqrt(q_BHTD.shape[-1])
    weights = xp.where(allowed, weights, MASKED)
    weights -= weights.real.max(axis=-1, keepdims=True)
    xp.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def split_heads(x: Array, n_head: int) -> Array:
    """(B, T, C) -> (B, H, T, D), a view."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


class AttentionCache(NamedTuple):
    qkv: Array  # (B, T, 3C) borrowed
    weights: Array  # (B, H, T, T)
    out: Array  # (B, T, C)


def attention_forward(qkv: Array, *, n_head: int, allowed: Array) -> tuple[Array, AttentionCache]:
    """out_i = sum_j A_ij v_j,  A = softmax_j(q_i k_j / sqrt(D)) over the allowed j, head by head.

    Vaswani et al. 2017, arXiv 1706.03762, equation 1.

    Args:
        qkv: (B, T, 3C) queries, keys and values side by side, as one linear layer makes them.
        n_head: H.
        allowed: (B, 1, T, T) from `causal_mask`.
    Returns:
        out (B, T, C), cache.
    Raises:
        ValueError: the width of qkv is not 3 C with C a multiple of n_head.
    """
    B, T, C3 = qkv.shape
    if C3 % (3 * n_head) != 0:
        raise ValueError(
            f"attention: expected qkv (B, T, 3C) with C a multiple of n_head = {n_head}; "
            f"got {qkv.shape}"
        )
    xp = get_xp(qkv, allowed)
    C = C3 // 3
    q_BHTD, k_BHTD, v_BHTD = (split_heads(qkv[..., i * C : (i + 1) * C], n_head) for i in range(3))
    weights = attention_weights(q_BHTD, k_BHTD, allowed)
    out = xp.empty((B, T, C), dtype=qkv.dtype)
    xp.matmul(weights, v_BHTD, out=split_heads(out, n_head))
    return out, AttentionCache(qkv, weights, out)


def attention_backward(dout: Array, cache: AttentionCache) -> Array:
    """dv = A^T do,  dA = do v^T,  dS = A (dA - sum_j A dA) / sqrt(D),  dq = dS k,  dk = dS^T q.

    The row sum needs no pass over T x T:  sum_j A_ij dA_ij = do_i . out_i.

    Args:
        dout: (B, T, C) dL/dout.
    Returns:
        dqkv (B, T, 3C).
    """
    qkv, weights, out = cache
    xp = get_xp(dout, qkv)
    H = weights.shape[1]
    C = out.shape[-1]
    q_BHTD, k_BHTD, v_BHTD = (split_heads(qkv[..., i * C : (i + 1) * C], H) for i in range(3))
    dqkv = xp.empty_like(qkv)
    dq, dk, dv = (split_heads(dqkv[..., i * C : (i + 1) * C], H) for i in range(3))
    dout_BHTD = split_heads(dout, H)

    xp.matmul(weights.swapaxes(-1, -2), dout_BHTD, out=dv)
    dscore = dout_BHTD @ v_BHTD.swapaxes(-1, -2)  # (B, H, T, T) dA so far
    dscore -= (dout_BHTD * split_heads(out, H)).sum(axis=-1, keepdims=True)
    dscore *= weights  # 0 where not allowed
    dscore *= 1.0 / math.sqrt(C // H)
    xp.matmul(dscore, k_BHTD, out=dq)
    xp.matmul(dscore.swapaxes(-1, -2), q_BHTD, out=dk)
    return dqkv
