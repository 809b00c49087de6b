"""Linear, layer norm, GELU, embedding: each forward with its hand-written backward below it.

    foo_forward(x, w, ...) -> out, cache          differentiable arrays first, constants by keyword
    foo_backward(dout, cache) -> dx, dw, ...      dL/d(argument), in the order of the arguments

A cache borrows the arguments of its forward; do not write to them before the backward has run.
"""

import math
from typing import NamedTuple

from minirlhf.backend import Array, get_xp


class LinearCache(NamedTuple):
    x: Array  # (..., I) borrowed
    w: Array  # (I, O) borrowed


def linear_forward(x: Array, w: Array, b: Array) -> tuple[Array, LinearCache]:
    """y = x w + b over the last axis.

    Args:
        x: (..., I) activations.
        w: (I, O) weight, input first.
        b: (O,) bias.
    Returns:
        y (..., O), cache.
    Raises:
        ValueError: x's last axis, w and b do not fit each other.
    """
    if w.ndim != 2 or x.shape[-1] != w.shape[0] or b.shape != w.shape[1:]:
        raise ValueError(
            "linear: expected x (..., I), w (I, O) and b (O,); "
            f"got {x.shape}, {w.shape} and {b.shape}"
        )
    get_xp(x, w, b)
    y = x.reshape(-1, x.shape[-1]) @ w  # (rows, O) one large product beats many small ones
    y += b
    return y.reshape(*x.shape[:-1], w.shape[1]), LinearCache(x, w)


def linear_backward(dy: Array, cache: LinearCache) -> tuple[Array, Array, Array]:
    """dx = dy w^T,  dw = sum_rows x^T dy,  db = sum_rows dy.

    Args:
        dy: (..., O) dL/dy.
    Returns:
        dx (..., I), dw (I, O), db (O,).
    """
    x, w = cache
    x_rows = x.reshape(-1, x.shape[-1])  # (rows, I)
    dy_rows = dy.reshape(-1, dy.shape[-1])  # (rows, O)
    dx = (dy_rows @ w.T).reshape(x.shape)
    return dx, x_rows.T @ dy_rows, dy_rows.sum(axis=0)


class LayerNormCache(NamedTuple):
    x: Array  # (..., C) borrowed
    gain: Array  # (C,) borrowed
    mean: Array  # (..., 1)
    rstd: Array  # (..., 1) 1 / sqrt(var + eps)


def layernorm_forward(
    x: Array, gain: Array, bias: Array, *, eps: float = 1e-5
) -> tuple[Array, LayerNormCache]:
    """y = gain * (x - mean) / sqrt(var + eps) + bias; mean and biased var over the last axis.

    Ba, Kiros & Hinton 2016, "Layer Normalization".

    Args:
        x: (..., C) activations.
        gain: (C,) scale.
        bias: (C,) shift.
        eps: added to the variance.
    Returns:
        y (..., C) in x's dtype, cache.
    Raises:
        ValueError: gain or bias is not (C,).
    """
    C = x.shape[-1]
    if gain.shape != (C,) or bias.shape != (C,):
        raise ValueError(
            f"layernorm: expected gain and bias of shape ({C},), x's last axis; "
            f"got {gain.shape} and {bias.shape}"
        )
    xp = get_xp(x, gain, bias)
    mean = x.mean(axis=-1, keepdims=True)  # (..., 1)
    xhat = x - mean  # (..., C) new memory: ours to overwrite
    var = xp.square(xhat).mean(axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / xp.sqrt(var + eps)  # (..., 1)
    xhat *= rstd
    y = xhat * gain
    y += bias
    return y, LayerNormCache(x, gain, mean, rstd)


def layernorm_backward(dy: Array, cache: LayerNormCache) -> tuple[Array, Array, Array]:
    """dx = rstd * (dxhat - mean_C(dxhat) - xhat * mean_C(dxhat * xhat)),  dxhat = dy * gain.

    Args:
        dy: (..., C) dL/dy.
    Returns:
        dx (..., C), dgain (C,), dbias (C,).
    """
    x, gain, mean, rstd = cache
    C = x.shape[-1]
    xhat = x - mean
    xhat *= rstd  # (..., C) elementwise, so recomputed and not cached
    dgain = (dy * xhat).reshape(-1, C).sum(axis=0)
    dbias = dy.reshape(-1, C).sum(axis=0)
    dx = dy * gain  # dxhat
    along_xhat = (dx * xhat).mean(axis=-1, keepdims=True)  # (..., 1)
    dx -= dx.mean(axis=-1, keepdims=True)  # through the mean
    xhat *= along_xhat
    dx -= xhat  # through the variance
    dx *= rstd
    return dx, dgain, dbias


GELU_SCALE = math.sqrt(2.0 / math.pi)  # Python floats keep float32 arrays in float32
GELU_CUBIC = 0.044715


class GeluCache(NamedTuple):
    slope: (
        Array  # (...) dy/dx: the tanh is at hand in the forward, so its derivative is taken there
    )


def gelu_forward(x: Array) -> tuple[Array, GeluCache]:
    """y = x/2 (1 + t),  t = tanh(u),  u = sqrt(2/pi) (x + 0.044715 x^3): the GELU of GPT-2.

    Hendrycks & Gimpel 2016, arXiv 1606.08415, the tanh form.

    Args:
        x: (...) activations.
    Returns:
        y (...), cache.
    """
    xp = get_xp(x)
    x2 = x * x
    t = x2 * (GELU_SCALE * GELU_CUBIC)
    t += GELU_SCALE
    t *= x  # u; x * x * x because x ** 3 is a hundred times slower
    xp.tanh(t, out=t)
    # dy/dx = (1 + t)/2 + x/2 (1 - t^2) u',  u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)
    x2 *= 1.5 * GELU_SCALE * GELU_CUBIC
    x2 += 0.5 * GELU_SCALE
    x2 *= x  # x u' / 2
    slope = t * t
    slope -= 1.0
    slope *= x2  # -x/2 (1 - t^2) u'
    t += 1.0
    t *= 0.5  # (1 + t) / 2
    xp.subtract(t, slope, out=slope)
    t *= x
    return t, GeluCache(slope)


def gelu_backward(dy: Array, cache: GeluCache) -> Array:
    """dx = dy * ((1 + t)/2 + x/2 (1 - t^2) u'),  u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)."""
    return dy * cache.slope


class EmbeddingCache(NamedTuple):
    shape: tuple[int, int]  # of the table
    ids: Array  # (...) borrowed


def embedding_forward(table: Array, *, ids: Array) -> tuple[Array, EmbeddingCache]:
    """y = table[ids], one row for each id.

    Args:
        table: (N, C) one row an id.
        ids: (...) integers in [0, N); checked where they enter the program, not here.
    Returns:
        y (..., C), cache.
    """
    get_xp(table, ids)
    return table[ids], EmbeddingCache(table.shape, ids)


def embedding_backward(dy: Array, cache: EmbeddingCache) -> Array:
    """dtable[i] = sum of dy over the places where ids == i.

    Args:
        dy: (..., C) dL/dy.
    Returns:
        dtable (N, C).
    """
    xp = get_xp(dy, cache.ids)
    dtable = xp.zeros(cache.shape, dtype=dy.dtype)
    xp.add.at(dtable, cache.ids, dy)
    return dtable
