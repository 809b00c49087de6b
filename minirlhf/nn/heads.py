"""What reads the transformer's hidden states: next-token logits, a value or a reward.

`h` (B, T, C) is the output of the final norm.
"""

from typing import NamedTuple

import numpy as np

from minirlhf.backend import Array, get_xp

VOCABULARY_PIECE = 4096  # tokens; a vocabulary with more of them is large


def output_matrix(transformer: dict) -> Array:
    """(V, C) whose rows the logits are products with: "lm_head", or else the token embedding."""
    return transformer.get("lm_head", transformer["wte"])


class LogitsCache(NamedTuple):
    h: Array  # (..., C) borrowed
    w: Array  # (V, C) borrowed


def logits_forward(h: Array, w: Array) -> tuple[Array, LogitsCache]:
    """z = h w^T. In GPT-2 w is the token embedding, read backwards (Press & Wolf 2017, 1608.05859).

    Position t predicts token t + 1.

    Args:     h: (..., C) hidden states.
              w: (V, C) of `output_matrix`.
    Returns:  logits (..., V), cache.
    """
    get_xp(h, w)
    logits = h.reshape(-1, h.shape[-1]) @ w.T  # (rows, V)
    return logits.reshape(*h.shape[:-1], w.shape[0]), LogitsCache(h, w)


def logits_backward(dlogits: Array, cache: LogitsCache) -> tuple[Array, Array]:
    """dh = dz w,  dw = sum_rows dz^T h (an embedding's own gradient is added by the caller).

    (..., V) -> dh (..., C), dw (V, C).
    """
    h, w = cache
    dlogits_rows = dlogits.reshape(-1, w.shape[0])  # (rows, V)
    dh = (dlogits_rows @ w).reshape(h.shape)  # (..., C)
    return dh, dlogits_rows.T @ h.reshape(-1, h.shape[-1])


class ScalarHeadCache(NamedTuple):
    h: Array  # (..., C) borrowed
    w: Array  # (C, 1) borrowed


def scalar_head_forward(h: Array, w: Array, b: Array) -> tuple[Array, ScalarHeadCache]:
    """v = h . w + b, one number a position: the value V(x, y_<t) at each t, or a reward.

    Args:     h: (..., C) hidden states.
              w: (C, 1) weight.
              b: (1,) bias.
    Returns:  v (...), cache.
    Raises:   ValueError: w is not (C, 1) or b not (1,).
    """
    if w.shape != (h.shape[-1], 1) or b.shape != (1,):
        raise ValueError(
            f"scalar head: expected w ({h.shape[-1]}, 1) and b (1,); got {w.shape} and {b.shape}"
        )
    get_xp(h, w, b)
    return (h @ w + b)[..., 0], ScalarHeadCache(h, w)


def scalar_head_backward(dv: Array, cache: ScalarHeadCache) -> tuple[Array, Array, Array]:
    """dh = dv w^T,  dw = sum_rows h^T dv,  db = sum dv.  (...) -> (..., C), (C, 1), (1,)."""
    h, w = cache
    dh = dv[..., None] * w[:, 0]  # (..., C)
    dw = h.reshape(-1, h.shape[-1]).T @ dv.reshape(-1, 1)
    return dh, dw, dv.reshape(-1).sum(axis=0, keepdims=True)


def last_columns(mask: Array) -> Array:
    """(B, 1) column of the last real token of each row of a mask (B, T): where a score is read."""
    return (get_xp(mask).arange(mask.shape[1]) * (mask > 0)).max(axis=1, keepdims=True)


def init_scalar_head(d_model: int, *, std: float, rng: np.random.Generator, dtype) -> dict:
    """w ~ N(0, std), b = 0. A value head starts at std 0, a reward head at 1 / sqrt(C + 1).

    Ziegler et al. 2019, arXiv 1909.08593 (code).
    """
    w = std * rng.standard_normal((d_model, 1))  # drawn in float64: one seed, one head
    return {"w": w.astype(dtype), "b": np.zeros(1, dtype=dtype)}
