"""From a prompt to a response: one token at a time from softmax(z / temperature), until it stops.

Random numbers are drawn on the host and used through the inverse distribution function, so a seed
gives the same responses on a CPU and on a GPU.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from minirlhf.backend import Array, as_float, fused, get_xp
from minirlhf.nn.decoding import KVCache, decode_step, prefill
from minirlhf.nn.heads import VOCABULARY_PIECE, logits_forward, output_matrix
from minirlhf.nn.transformer import GPTConfig, kept_floats
from minirlhf.tree import Tree
from minirlhf.workers import map_over, n_workers

PIECE_FLOATS = 1 << 27  # most that a piece of a batch may need beside its logits: 512 MB
ALIVE_CHECK_EVERY = 4, 8  # steps between looks at who has stopped: on a CPU; on a GPU, which waits
DROP_BELOW = 0.75  # share still alive below which those that have stopped leave the batch
COLDEST = 2.0**-126  # below it float32 takes a temperature for 0


class Sampling(NamedTuple):
    """Which distribution tokens are drawn from: what `sampling_logprobs` makes of the logits."""

    temperature: float = 1.0  # tau >= 0; 0: always the most likely token
    top_k: int = 0  # only so many tokens, the most likely; 0: all
    top_p: float = 1.0  # only the most likely that together have this mass, in (0, 1]; 1: all


def next_logits(h: Array, w: Array) -> Array:
    """z = h w^T of few rows, (B, C) -> (B, V).

    Of a large vocabulary piece by piece as w h^T, each turned round while it is in the cache: the
    BLAS then reads w as it lies in memory and copies none of it.
    """
    if len(w) <= VOCABULARY_PIECE:
        return logits_forward(h, w)[0]
    logits = get_xp(h, w).empty((len(h), len(w)), dtype=h.dtype)
    for start in range(0, len(w), VOCABULARY_PIECE):
        piece = slice(start, start + VOCABULARY_PIECE)
        logits[:, piece] = (w[piece] @ h.T).T
    return logits


@fused
def sampling_logprobs(
    logits: Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Array:
    """log-probabilities that the sampler draws from: softmax(z / temperature) cut and renormalised.

    top_k keeps the k most likely tokens. top_p then keeps the smallest set of most likely tokens
    that holds at least the mass top_p (Holtzman et al. 2020, arXiv 1904.09751). Tokens tied with
    the last one kept are kept too. temperature 0 puts all mass on the most likely token, and so
    does one that float32 takes for 0.

    Args:     logits: (..., V).
              temperature, top_k, top_p: the fields of `Sampling`.
    Returns:  (..., V) log-probabilities [nats], -inf where cut.
    Raises:   ValueError: a setting is out of range.
    """
    if not 0 <= temperature < float("inf") or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "sampling: expected a finite temperature >= 0, top_k >= 0 and 0 < top_p <= 1; "
            f"got {temperature}, {top_k} and {top_p}"
        )
    xp, logits = get_xp(logits), as_float(logits)
    V = logits.shape[-1]
    if temperature < COLDEST:
        best = xp.argmax(logits, axis=-1)[..., None] == xp.arange(V)  # of a tie the first
        return xp.where(best, 0.0, -xp.inf).astype(logits.dtype)
    z = logits - logits.max(axis=-1, keepdims=True)  # new memory: ours to overwrite
    z /= temperature  # 0 stays 0, however cold
    if 0 < top_k < V:
        kth = xp.sort(z, axis=-1)[..., V - top_k : V - top_k + 1]  # (..., 1)
        z = xp.where(z >= kth, z, -xp.inf)
    if top_p < 1:
        p = xp.exp(z)
        p /= p.sum(axis=-1, keepdims=True)
        descending = xp.sort(p, axis=-1)[..., ::-1]
        mass_before = descending.cumsum(axis=-1) - descending  # of the more likely tokens
        rarest = xp.where(mass_before < top_p, descending, 1.0).min(axis=-1, keepdims=True)
        z = xp.where(p >= rarest, z, -xp.inf)
    z -= xp.log(xp.exp(z).sum(axis=-1, keepdims=True))
    return z


def next_logprobs(params: Tree, h: Array, sampling: Sampling) -> Array:
    """log-probabilities of what comes after h, (B, C) -> (B, V)."""
    logits = next_logits(h, output_matrix(params))
    return sampling_logprobs(logits, **sampling._asdict())


def draw_tokens(probs: Array, u: Array) -> Array:
    """The token whose interval of the cumulative distribution holds u; never one of probability 0.

    Args:     probs: (B, V) >= 0, not necessarily normalised.
              u: (B, 1) uniform in [0, 1), float64.
    Returns:  (B,) ids.
    """
    xp, (B, V) = get_xp(probs, u), probs.shape
    if V <= VOCABULARY_PIECE:
        return _interval(probs, u)
    side = math.isqrt(V - 1) + 1  # a square of tokens: first its row, then the token in it
    square = xp.zeros((B, side * side), dtype=probs.dtype)
    square[:, :V] = probs
    square = square.reshape(B, side, side)
    mass = square.sum(axis=-1, dtype=xp.float64)  # (B, side)
    row = _interval(mass, u)  # (B,)
    above = xp.where(xp.arange(side) < row[:, None], mass, 0.0).sum(axis=-1, keepdims=True)
    rest = xp.maximum(u * mass.sum(axis=-1, keepdims=True) - above, 0.0)  # of it in the row
    within = square[xp.arange(B), row]  # (B, side)
    return row * side + _interval(within, rest / mass[xp.arange(B), row][:, None])


def _interval(mass: Array, u: Array) -> Array:
    """Whose interval of the cumulative distribution holds u (B, 1); never one of mass 0."""
    xp = get_xp(mass, u)
    cdf = mass.cumsum(axis=-1, dtype=xp.float64)  # in float32 the ids would move
    total = cdf[:, -1:]
    # <= and not <: a mass of 0 has an empty interval; the minimum is for u -> 1
    return xp.minimum((cdf <= u * total).sum(axis=-1), (cdf < total).sum(axis=-1))


class Generation(NamedTuple):
    tokens: Array  # (B, P+R) prompt as given, then the response: ids, the stop token, padding
    mask: Array  # (B, P+R) 1 at real tokens of prompt and response; the stop token is one of them
    hidden: Array  # (B, R, C) h that each token of the response was drawn from, anything at padding


class Draws(NamedTuple):
    """How the tokens of B responses are drawn."""

    u: Array  # (B, R) uniforms, one for each token
    sampling: Sampling
    stop_id: int
    pad_id: int  # what stands after the stop token


class Last(NamedTuple):
    """The b sequences that are still in the batch, and the token that each has drawn last."""

    rows: Array  # (b,) which of all B they are
    ids: Array  # (b,)
    real: Array  # (b,) 1, or 0 where it stands behind the end
    alive: Array  # (b,) 1 where more will be drawn
    again: Any = None  # on a GPU: (launches all that `advance` does at once, the memory for it)


@fused
def draw_into(
    log_probs: Array,
    out: Generation,
    *,
    h: Array,
    draws: Draws,
    step: int,
    who: tuple[Array, Array],
) -> Last:
    """The next token of some of the B sequences, written to `out` with what it was drawn from.

    Args:     log_probs: (b, V).
              h: (b, C).
              step: which of the R tokens it is.
              who: (b,) rows in `out`, (b,) 1 until the stop token has been drawn.
    """
    (rows, alive), (u, _, stop_id, pad_id) = who, draws
    xp, column = get_xp(log_probs, h, u, rows, alive), out.tokens.shape[1] - u.shape[1] + step
    ids = draw_tokens(xp.exp(log_probs), u[rows, step][:, None])
    ids = xp.where(alive > 0, ids, pad_id)
    out.tokens[rows, column] = ids
    out.mask[rows, column] = alive
    out.hidden[rows, step] = h
    return Last(rows, ids, alive, alive * (ids != stop_id))


@fused
def advance(
    params: Tree,
    kv: KVCache,
    out: Generation,
    last: Last,
    *,
    draws: Draws,
    step: int,
    config: GPTConfig,
) -> Last:
    """One token more: the model looks at the last one, and `draw_into` draws the next."""
    column = out.tokens.shape[1] - draws.u.shape[1] + step - 1  # of the last one
    token = {"tokens": last.ids, "mask": last.real, "column": column}
    h = decode_step(params, kv, **token, config=config)  # (b, C)
    log_probs = next_logprobs(params, h, draws.sampling)
    return draw_into(log_probs, out, h=h, draws=draws, step=step, who=(last.rows, last.alive))


def generate(
    params: Tree,
    *,
    tokens: Array,
    mask: Array,
    config: GPTConfig,
    max_new: int,
    stop_id: int,
    pad_id: int,
    rng: np.random.Generator,
    sampling: Sampling = Sampling(),
) -> Generation:
    """Sample y_t ~ pi(. | x, y_<t) for up to `max_new` steps; a response ends with its stop token.

    Args:     params: transformer parameters.
              tokens: (B, P) prompts padded on the left.
              mask: (B, P).
              max_new: R, the most tokens a response may have, the stop token included.
              stop_id: the token that ends a response (EOS) and belongs to it.
              pad_id: what stands after it, with mask 0.
              rng: draws all B x R uniforms at once, so the coins of a row depend on no other row.
              sampling: temperature and cuts.
    Returns:  Generation with R = max_new columns after the prompt.
    Raises:   ValueError: a prompt is empty, ends in padding, or leaves no room for max_new tokens.
    """
    xp = get_xp(tokens, mask)
    B, P = tokens.shape
    if max_new < 1:
        raise ValueError(f"generate: expected max_new >= 1; got {max_new}")
    if not bool((mask[:, -1] == 1).all()):
        raise ValueError("generate: expected prompts padded on the left; one ends in padding")
    longest = int(mask.sum(axis=1).max()) + max_new
    if longest > config.n_ctx:
        raise ValueError(
            f"generate: expected prompt + max_new <= {config.n_ctx}, the model's positions; "
            f"got {longest}"
        )
    u = xp.asarray(rng.random((B, max_new)))
    # of a row: what `prefill` keeps of the prompt, keys and values of all its columns
    floats = P * kept_floats(config, P) + 2 * config.n_layer * config.d_model * (P + max_new)
    each = min(-(-B // n_workers()), max(1, PIECE_FLOATS // floats))  # the first rounded up
    pieces = [slice(start, start + each) for start in range(0, B, each)]
    f = functools.partial(_extend, params, config=config)
    parts = [
        (tokens[rows], mask[rows], Draws(u[rows], sampling, stop_id, pad_id)) for rows in pieces
    ]
    return Generation(*map(xp.concatenate, zip(*map_over(f, parts), strict=True)))


def _extend(params: Tree, part: tuple[Array, Array, Draws], *, config: GPTConfig) -> Generation:
    """Prompts with their responses, drawn until all have stopped.

    Every ALIVE_CHECK_EVERY steps, responses that have stopped leave the batch if at most the share
    DROP_BELOW of it is still alive.

    Args:     part: tokens (B, P) and mask (B, P) of prompts, and how their responses are drawn.
    """
    tokens, mask, draws = part
    xp, (B, max_new) = get_xp(tokens, mask, draws.u), draws.u.shape
    pads = xp.full((B, max_new), draws.pad_id, dtype=tokens.dtype)
    zeros = xp.zeros((B, max_new), dtype=mask.dtype)
    out = Generation(
        xp.concatenate([tokens, pads], axis=1),
        xp.concatenate([mask, zeros], axis=1),
        xp.zeros((B, max_new, config.d_model), dtype=params["wte"].dtype),
    )
    h, kv = prefill(params, tokens=tokens, mask=mask, config=config, max_new=max_new)
    log_probs, who = next_logprobs(params, h, draws.sampling), (xp.arange(B), mask[:, -1])
    last = draw_into(log_probs, out, h=h, draws=draws, step=0, who=who)
    for step in range(1, max_new):
        if (step - 1) % ALIVE_CHECK_EVERY[xp is not np] == 0:
            n_alive = int((last.alive > 0).sum())
            if n_alive == 0:
                break  # the rest of `out` is padding already
            if n_alive <= DROP_BELOW * len(last.rows):
                left = xp.flatnonzero(last.alive)
                last, kv = Last(*(a[left] for a in last[:-1])), kv.rows(left)  # `again`: anew
        last = advance(params, kv, out, last, draws=draws, step=step, config=config)
    return out
