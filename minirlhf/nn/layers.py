"""Linear, norms, GELU, SwiGLU, embedding, columns: each forward with its backward below it.

    foo_forward(x, w, ...) -> out, cache          differentiable arrays first, constants by keyword
    foo_backward(dout, cache) -> dx, dw, ...      dL/d(argument), in the order of the arguments

A cache borrows the arguments of its forward; do not write to them before the backward has run.
"""

import math
from typing import NamedTuple

import numpy as np

from minirlhf.backend import Array, as_float, check_ids, check_positive, fused, get_xp, scatter_add


class LinearCache(NamedTuple):
    x: Array  # (..., I) borrowed
    w: Array  # (I, O) borrowed
    has_bias: bool


def linear_forward(x: Array, w: Array, b: Array | None = None) -> tuple[Array, LinearCache]:
    """y = x w + b over the last axis.

    Args:     x: (..., I) activations.
              w: (I, O) weight, input first.
              b: (O,) bias; None: there is none.
    Returns:  y (..., O), cache.
    Raises:   ValueError: x's last axis, w and b do not fit each other.
    """
    shape_b = w.shape[1:] if b is None else b.shape
    if w.ndim != 2 or x.shape[-1] != w.shape[0] or shape_b != w.shape[1:]:
        raise ValueError(
            "linear: expected x (..., I), w (I, O) and b (O,); "
            f"got {x.shape}, {w.shape} and {shape_b}"
        )
    get_xp(x, w, *([] if b is None else [b]))
    y = x.reshape(-1, x.shape[-1]) @ w  # (rows, O) one large product beats many small ones
    if b is not None:
        y += b  # the product is ours to overwrite
    return y.reshape(*x.shape[:-1], w.shape[1]), LinearCache(x, w, b is not None)


def linear_backward(dy: Array, cache: LinearCache) -> tuple[Array, ...]:
    """dx = dy w^T,  dw = sum_rows x^T dy,  db = sum_rows dy.

    (..., O) -> dx (..., I), dw (I, O) and, where there is a bias, db (O,).
    """
    x, w, has_bias = cache
    x_rows = x.reshape(-1, x.shape[-1])  # (rows, I)
    dy_rows = dy.reshape(-1, dy.shape[-1])  # (rows, O)
    dx = (dy_rows @ w.T).reshape(x.shape)  # (..., I)
    dw = x_rows.T @ dy_rows
    return (dx, dw, sum_rows(dy_rows)) if has_bias else (dx, dw)


@fused
def sum_rows(x: Array) -> Array:
    """(..., C) -> (C,), summed over all axes but the last: as a product, where the BLAS adds."""
    rows = x.reshape(-1, x.shape[-1])
    return get_xp(x).ones(len(rows), dtype=x.dtype) @ rows


class LayerNormCache(NamedTuple):
    xhat: Array  # (..., C) (x - mean) / sqrt(var + eps)
    gain: Array  # (C,) borrowed
    rstd: Array  # (..., 1) 1 / sqrt(var + eps)


@fused
def layernorm_forward(
    x: Array, gain: Array, bias: Array, *, eps: float = 1e-5
) -> tuple[Array, LayerNormCache]:
    """y = gain * xhat + bias,  xhat = (x - mean) / sqrt(var + eps), over the last axis.

    Ba, Kiros & Hinton 2016, "Layer Normalization"; var is the biased one.

    Args:     x: (..., C) activations.
              gain: (C,) scale.
              bias: (C,) shift.
              eps: > 0, added to the variance: a constant row has none.
    Returns:  y (..., C) in x's dtype, cache.
    Raises:   ValueError: gain or bias is not (C,), or eps is not positive.
    """
    C = x.shape[-1]
    if gain.shape != (C,) or bias.shape != (C,):
        raise ValueError(
            f"layernorm: expected gain and bias of shape ({C},), x's last axis; "
            f"got {gain.shape} and {bias.shape}"
        )
    check_positive("layernorm", "eps", eps)
    xp = get_xp(x, gain, bias)
    mean = x @ xp.full(C, 1.0 / C, dtype=x.dtype)  # (...) a product: the BLAS adds fastest
    xhat = x - mean[..., None]  # (..., C) new memory: ours to overwrite
    var = xp.einsum("...c,...c->...", xhat, xhat)  # (...) squared and summed in one pass
    var *= 1.0 / C
    var += eps
    rstd = (1.0 / xp.sqrt(var))[..., None]  # (..., 1)
    xhat *= rstd
    y = xhat * gain  # not in place: the backward reads xhat
    y += bias
    return y, LayerNormCache(xhat, gain, rstd)


@fused
def layernorm_backward(dy: Array, cache: LayerNormCache) -> tuple[Array, Array, Array]:
    """dx = rstd * (dxhat - mean_C(dxhat) - xhat * mean_C(dxhat * xhat)),  dxhat = dy * gain.

    (..., C) -> dx (..., C), dgain (C,), dbias (C,).
    """
    xhat, gain, rstd = cache
    get_xp(dy, xhat)
    gain_over_C = gain * (1.0 / gain.shape[0])  # then the means over C are products
    along = dy * xhat  # (..., C); times gain: dxhat * xhat
    dgain, dbias = sum_rows(along), sum_rows(dy)
    mean_dxhat = (dy @ gain_over_C)[..., None]  # (..., 1)
    mean_along = (along @ gain_over_C)[..., None]  # (..., 1) of dxhat * xhat
    dx = dy * gain
    dx -= mean_dxhat  # through the mean
    dx -= xhat * mean_along  # through the variance
    dx *= rstd  # common to the three ways
    return dx, dgain, dbias


class RMSNormCache(NamedTuple):
    xhat: Array  # (..., C) x / sqrt(mean x^2 + eps)
    gain: Array  # (C,) borrowed
    rrms: Array  # (..., 1) 1 / sqrt(mean x^2 + eps)


@fused
def rmsnorm_forward(x: Array, gain: Array, *, eps: float = 1e-5) -> tuple[Array, RMSNormCache]:
    """y = gain * xhat,  xhat = x / sqrt(mean(x^2) + eps): a layer norm without mean and bias.

    Zhang & Sennrich 2019, arXiv 1910.07467.

    Args:     x: (..., C) activations.
              gain: (C,) scale.
              eps: > 0, added to the mean square: a row of zeros has none.
    Returns:  y (..., C) in x's dtype, cache.
    Raises:   ValueError: gain is not (C,), or eps is not positive.
    """
    C = x.shape[-1]
    if gain.shape != (C,):
        raise ValueError(f"rmsnorm: expected gain of shape ({C},); got {gain.shape}")
    check_positive("rmsnorm", "eps", eps)
    xp = get_xp(x, gain)
    mean_square = xp.einsum("...c,...c->...", x, x)  # (...) squared and summed in one pass
    mean_square *= 1.0 / C
    mean_square += eps
    rrms = (1.0 / xp.sqrt(mean_square))[..., None]  # (..., 1)
    xhat = x * rrms
    return xhat * gain, RMSNormCache(xhat, gain, rrms)


@fused
def rmsnorm_backward(dy: Array, cache: RMSNormCache) -> tuple[Array, Array]:
    """dx = rrms * (dxhat - xhat * mean_C(dxhat * xhat)),  dxhat = dy * gain.

    (..., C) -> dx (..., C), dgain (C,).
    """
    xhat, gain, rrms = cache
    get_xp(dy, xhat)
    along = dy * xhat  # (..., C); times gain: dxhat * xhat
    dx = dy * gain
    dx -= xhat * (along @ (gain * (1.0 / gain.shape[0])))[..., None]  # through the mean square
    dx *= rrms
    return dx, sum_rows(along)


GELU_SCALE = 2.0 * math.sqrt(2.0 / math.pi)  # Python floats keep float32 arrays in float32
GELU_CUBIC = 0.044715


class GeluCache(NamedTuple):
    slope: Array  # (...) dy/dx: its sigmoid is at hand in the forward, so it is taken there


@fused
def gelu_forward(x: Array, *, keep: bool = True) -> tuple[Array, GeluCache | None]:
    """y = x s,  s = sigma(v) = (1 + tanh(v/2))/2,  v = 2 sqrt(2/pi) (x + 0.044715 x^3): GPT-2's.

    Hendrycks & Gimpel 2016, arXiv 1606.08415, the tanh form, written with the sigmoid because exp
    is twice as fast as tanh.

    Args:     x: (...) activations.
              keep: False where no backward will follow: the slope is not computed.
    Returns:  y (...), cache (None unless kept).
    """
    xp, x = get_xp(x), as_float(x)
    slope = x * x  # x^2 so far; x * x * x because x ** 3 is a hundred times slower
    s = slope * (-GELU_SCALE * GELU_CUBIC)
    s -= GELU_SCALE
    s *= x  # -v so far
    with np.errstate(over="ignore"):  # exp(-v) = inf gives s = 0, as it should be
        xp.exp(s, out=s)
    s += 1.0  # 1 / s so far
    y = x / s
    if not keep:
        return y, None
    xp.divide(1.0, s, out=s)  # now it is s
    # dy/dx = s + x s (1 - s) v',  v' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
    slope *= 3.0 * GELU_SCALE * GELU_CUBIC
    slope += GELU_SCALE  # v'
    slope *= 1.0 - s  # 0 at a large x, before x can make it large: no difference of large numbers
    slope *= y  # x s (1 - s) v'
    slope += s
    return y, GeluCache(slope)


def gelu_backward(dy: Array, cache: GeluCache) -> Array:
    """dx = dy * (s + x s (1 - s) v'),  v' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)."""
    return dy * cache.slope


class SwiGLUCache(NamedTuple):
    up: Array  # (...) borrowed
    swish: Array  # (...) gate * sigma(gate)
    slope: Array  # (...) dswish/dgate


@fused
def swiglu_forward(
    gate: Array, up: Array, *, keep: bool = True
) -> tuple[Array, SwiGLUCache | None]:
    """y = swish * up,  swish = gate s,  s = sigma(gate) = 1 / (1 + exp(-gate)).

    Shazeer 2020, arXiv 2002.05202.

    Args:     gate, up: (...) two linear images of the same activations.
              keep: False where no backward will follow.
    Returns:  y (...), cache (None unless kept).
    """
    xp, gate, up = get_xp(gate, up), as_float(gate), as_float(up)
    with np.errstate(over="ignore"):  # exp(-gate) = inf gives swish = 0, as it should be
        s = xp.exp(-gate)
    s += 1.0  # 1 / s so far
    swish = gate / s
    y = swish * up
    if not keep:
        return y, None
    xp.divide(1.0, s, out=s)  # now it is s
    slope = 1.0 - s  # dswish/dgate = s + gate s (1 - s)
    slope *= swish
    slope += s
    return y, SwiGLUCache(up, swish, slope)


@fused
def swiglu_backward(dy: Array, cache: SwiGLUCache) -> tuple[Array, Array]:
    """dgate = dy * up * (s + gate s (1 - s)),  dup = dy * gate s."""
    dgate = dy * cache.up
    dgate *= cache.slope
    return dgate, dy * cache.swish


class EmbeddingCache(NamedTuple):
    shape: tuple[int, int]  # of the table
    ids: Array  # (...) borrowed


def embedding_forward(table: Array, *, ids: Array) -> tuple[Array, EmbeddingCache]:
    """y = table[ids], one row for each id.

    Args:     table: (N, C) one row an id.
              ids: (...) integers in [0, N).
    Returns:  y (..., C), cache.
    Raises:   ValueError: ids are no integers, or (in main memory) out of range.
    """
    get_xp(table, ids)
    check_ids("embedding", ids, len(table))
    return table[ids], EmbeddingCache(table.shape, ids)


def embedding_backward(dy: Array, cache: EmbeddingCache, *, dtable: Array | None = None) -> Array:
    """dtable[i] += sum of dy over the places where ids == i.  (..., C) -> (N, C).

    Args:     dtable: (N, C) what the table got elsewhere, added to in place; None: zeros.
    """
    if dtable is None:
        dtable = get_xp(dy, cache.ids).zeros(cache.shape, dtype=dy.dtype)
    scatter_add(dtable, cache.ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
    return dtable


class TakeColumnsCache(NamedTuple):
    n_columns: int  # T
    columns: Array  # (B, Q) borrowed


def take_columns_forward(x: Array, *, columns: Array) -> tuple[Array, TakeColumnsCache]:
    """y[b, i] = x[b, columns[b, i]]: of each sequence, the positions that are read.

    Args:     x: (B, T, C) activations.
              columns: (B, Q) integers in [0, T), each at most once a sequence.
    Returns:  y (B, Q, C), cache.
    """
    xp = get_xp(x, columns)
    return x[xp.arange(len(x))[:, None], columns], TakeColumnsCache(x.shape[1], columns)


def take_columns_backward(dy: Array, cache: TakeColumnsCache) -> Array:
    """dx is dy at the columns that were taken and 0 elsewhere.  (B, Q, C) -> (B, T, C)."""
    n_columns, columns = cache
    xp = get_xp(dy, columns)
    B, _, C = dy.shape
    dx = xp.zeros((B, n_columns, C), dtype=dy.dtype)
    dx[xp.arange(B)[:, None], columns] = dy  # no column twice, so nothing is to be added up
    return dx
