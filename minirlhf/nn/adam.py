"""AdamW, learning-rate schedules, clipping by the global norm.

The optimiser works on one flat buffer that holds every parameter (`tree_pack`); the tree of
parameters are views into it and see the update.
"""

import functools
import math
from typing import NamedTuple

from minirlhf.backend import Array, as_float, check_positive, fused, get_xp
from minirlhf.tree import Tree, tree_leaves
from minirlhf.workers import over_pieces


class AdamWState(NamedTuple):
    step: int  # updates done so far
    mean: Array  # (N,) running mean of the gradient
    var: Array  # (N,) running mean of its square


def init_adamw(flat: Array) -> AdamWState:
    """Both moments 0, in memory that is only taken when they are written to."""
    xp = get_xp(flat)
    mean, var = xp.zeros(flat.shape, dtype=flat.dtype), xp.zeros(flat.shape, dtype=flat.dtype)
    return AdamWState(0, mean, var)


def adamw_step(
    flat: Array,
    dflat: Array,
    state: AdamWState,
    *,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-5,
    weight_decay: Array | float = 0.0,
    form: str = "torch",
) -> AdamWState:
    """theta -= lr (mhat / (sqrt(vhat) + eps) + decay theta),  mhat = m/(1-b1^k), vhat = v/(1-b2^k).

    Kingma & Ba 2015, arXiv 1412.6980; decoupled decay: Loshchilov & Hutter 2019, 1711.05101. The
    decay is applied first, as torch.optim.AdamW does. form="tf" is TensorFlow 1's rule,
    theta -= lr * sqrt(1-b2^k)/(1-b1^k) * m / (sqrt(v) + eps): with the same eps its early steps
    are smaller.

    Args:     flat: (N,) parameters, updated in place.
              dflat: (N,) dL/dflat.
              state: from `init_adamw` or the last step; its moments are updated in place.
              eps: > 0, added to the root of vhat: a gradient that is always 0 has none.
              weight_decay: one number, or (N,) so that biases and layer norms are spared.
    Returns:  the state with its step advanced.
    Raises:   ValueError: another form, or eps is not positive.
    """
    if form not in ("torch", "tf"):
        raise ValueError(f'adamw: expected form "torch" or "tf"; got {form!r}')
    check_positive("adamw", "eps", eps)
    xp, g = get_xp(flat, dflat), as_float(dflat)
    m, v, k = state.mean, state.var, state.step + 1
    correction1, correction2 = 1 - beta1**k, math.sqrt(1 - beta2**k)  # both moments began at 0
    step_size = learning_rate * (1.0 if form == "torch" else correction2) / correction1
    m *= beta1  # in place from here on: the buffers hold all parameters of a model
    m += (1 - beta1) * g
    v *= beta2
    update = g * g
    update *= 1 - beta2
    v += update
    xp.sqrt(v, out=update)
    if form == "torch":
        update *= 1 / correction2  # sqrt(vhat), and eps is added to that
    update += eps
    xp.divide(m, update, out=update)
    update *= step_size
    flat *= 1.0 - learning_rate * weight_decay  # decoupled: not through the gradient
    flat -= update
    return state._replace(step=k)


def decay_mask(params: Tree) -> Array:
    """(N,) 1 at entries of matrices, 0 at biases and layer norms, in the order of `tree_pack`."""
    leaves = tree_leaves(params)
    xp = get_xp(*leaves)
    return xp.concatenate(
        [xp.full(leaf.size, 1.0 if leaf.ndim > 1 else 0.0, dtype=leaf.dtype) for leaf in leaves]
    )


def scheduled_lr(
    step: int, *, peak: float, total: int, warmup: int = 0, kind: str = "linear", floor: float = 0.0
) -> float:
    """Learning rate of update `step` (0, 1, ...): a linear rise to `peak`, then the schedule.

    linear:   peak to floor * peak along a line,
    cosine:   along half a period of a cosine,
    constant: peak.

    Args:     total: number of updates; the floor is reached after the last one.
              warmup: updates of the rise.
              floor: lowest value as a share of the peak.
    Raises:   ValueError: another kind.
    """
    if kind not in ("linear", "cosine", "constant"):
        raise ValueError(f"schedule: expected linear, cosine or constant; got {kind!r}")
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (floor + (1 - floor) * left)


@fused
def clip_global_norm(dflat: Array, max_norm: float) -> tuple[Array, Array]:
    """g * min(1, max_norm / (|g| + 1e-6)), |g| over all parameters at once.

    Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063.

    Args:     dflat: (N,), written to.
    Returns:  the clipped gradient (N,) and |g| before clipping, 0-d float64.
    """
    xp, dflat = get_xp(dflat), as_float(dflat)
    norm = xp.sqrt(sum(over_pieces(_sum_of_squares, dflat)))
    scale = xp.minimum(1.0, max_norm / (norm + 1e-6))  # 0-d on the device: nobody waits for it
    over_pieces(functools.partial(_multiply, scale.astype(dflat.dtype)), dflat)
    return dflat, norm


def _sum_of_squares(piece: Array) -> Array:
    return (piece * piece).sum(dtype="float64")  # many terms


def _multiply(scale: Array, piece: Array) -> None:
    piece *= scale
