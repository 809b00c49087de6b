"""Every gradient of the package, checked: what `minirlhf check` runs and prints.

TABLE has a row for each mode of each pair: the forward, its backward, and a recipe that draws a
small case. WHOLE_LOSSES are the losses of training, differentiated through all parameters of a
model at once. The same rows run in tests/test_pairs.py, where Hypothesis does the drawing.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from minirlhf.app.progress import track
from minirlhf.backend import get_xp
from minirlhf.gradcheck import (
    CENTRAL_TOLERANCE,
    COMPLEX_TOLERANCE,
    GradientError,
    argument_names,
    check_directions,
    check_pair,
)
from minirlhf.nn import attention, heads, layers, transformer
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.rlhf import kl, logprobs, objectives
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.train import policy, ppo
from minirlhf.train.batches import Batch
from minirlhf.train.policy import PolicyOutput
from minirlhf.train.ppo import Experience
from minirlhf.train.settings import PPOConfig
from minirlhf.train.sft import sft_loss_and_gradients
from minirlhf.tree import Tree, tree_items, tree_map, tree_size

Case = tuple[list[Tree], dict[str, Any]]  # differentiable arguments, constants
PADDING = 77.0  # what stands where nothing may look
GAP = 1e-2  # least distance from a kink


class Draw:
    """Where a case comes from: sizes and settings one by one, entries from a seeded generator.

    tests/test_pairs.py lets Hypothesis answer `integer` and `pick`, so a failing case is minimised.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, options: Sequence[Any]) -> Any:
        """One of `options`."""
        return options[self.integer(0, len(options) - 1)]

    def normal(self, *shape: int) -> np.ndarray:
        """Independent N(0, 1) entries."""
        return self.rng.standard_normal(shape)


class Row(NamedTuple):
    """One mode of one pair. An adapter carries the pair it adapts in `__wrapped__`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    make: Callable[[Draw], Case]
    mode: str = ""

    @property
    def operation(self) -> str:
        return self.forward.__name__.removesuffix("_forward")

    @property
    def name(self) -> str:
        return f"{self.operation}: {self.mode}" if self.mode else self.operation

    @property
    def file(self) -> str:
        """Where the pair stands, as nn/layers.py."""
        return "/".join(self.forward.__module__.split(".")[1:]) + ".py"

    @property
    def is_model(self) -> bool:
        """A block or more: many entries, so fewer cases."""
        return self.file.startswith(("nn/transformer", "train/"))


# -- drawing -------------------------------------------------------------------------------------


def leading(draw: Draw) -> tuple[int, ...]:
    """Up to two axes before the last: what works on the last axis takes any number of them."""
    return tuple(draw.integer(1, 3) for _ in range(draw.integer(0, 2)))


def scaled(draw: Draw, *shape: int, scales: Sequence[float] = (0.1, 1.0, 3.0)) -> np.ndarray:
    """N(0, scale^2) entries."""
    return draw.pick(scales) * draw.normal(*shape)


def drawn_mask(draw: Draw, B: int, T: int, side: str = "right") -> np.ndarray:
    """(B, T) with 1 to T ones a row and the zeros on `side`."""
    lengths = np.array([draw.integer(1, T) for _ in range(B)])
    mask = (np.arange(T) < lengths[:, None]).astype(np.float64)
    return mask if side == "right" else mask[:, ::-1].copy()


def drawn_weights(draw: Draw) -> np.ndarray:
    """(B, T) token weights of a right-padded batch, in every aggregation."""
    mask = drawn_mask(draw, draw.integer(1, 3), draw.integer(1, 4))
    return objectives.token_weights(mask, mode=draw.pick(objectives.AGGREGATIONS))


def away_from(x: np.ndarray, kinks: Iterable[float]) -> np.ndarray:
    """x with the entries near a kink moved to the gap's edge: there is no derivative at a kink."""
    for kink in kinks:
        near = np.abs(x - kink) < GAP
        x = np.where(near, kink + np.where(x < kink, -GAP, GAP), x)
    return x


def drawn_log_ratio(draw: Draw, *shape: int, kinks: Iterable[float] = ()) -> np.ndarray:
    """log pi_theta - log pi_other: small or large; one entry may be 0, the same policy."""
    log_ratio = away_from(scaled(draw, *shape, scales=(0.003, 0.2, 1.0)), kinks)
    if draw.pick((True, False)):
        log_ratio.flat[0] = 0.0
    return log_ratio


def clip_kinks(clip_eps: float | tuple[float, float], dual_clip: float | None) -> list[float]:
    """The log-ratios at which the clipped surrogate bends."""
    low, high = clip_eps if isinstance(clip_eps, tuple) else (clip_eps, clip_eps)
    return [math.log(1 - low), math.log(1 + high), *([math.log(dual_clip)] if dual_clip else [])]


def drawn_value_targets(
    draw: Draw, values: np.ndarray, clip_eps: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """old_values and returns for which max(error^2, clipped error^2) has a derivative at values."""
    while True:
        moved, error = 0.5 * draw.normal(*values.shape), draw.normal(*values.shape)
        if clip_eps is None:
            return values - moved, values - error
        clipped = np.abs(moved) > clip_eps
        edge = error - moved + np.copysign(clip_eps, moved)
        bends = np.abs(np.abs(moved) - clip_eps) < GAP
        tied = clipped & (np.abs(np.abs(edge) - np.abs(error)) < GAP)
        if not (bends | tied).any():
            return values - moved, values - error


# -- nn/ -----------------------------------------------------------------------------------------


def make_linear(draw: Draw) -> Case:
    I, O = draw.integer(1, 4), draw.integer(1, 4)
    return [scaled(draw, *leading(draw), I), draw.normal(I, O), draw.normal(O)], {}


def make_layernorm(scale: float, offset: float, draw: Draw) -> Case:
    C = draw.integer(3, 6)
    x = draw.normal(*leading(draw), C)
    x /= np.minimum(x.std(axis=-1, keepdims=True), 1.0)  # near a flat row it bends too sharply
    return [scale * x + offset, draw.normal(C), draw.normal(C)], {}


def make_gelu(draw: Draw) -> Case:
    return [scaled(draw, *leading(draw), draw.integer(1, 5))], {}


def make_embedding(draw: Draw) -> Case:
    N, shape = draw.integer(1, 5), leading(draw)
    return [draw.normal(N, draw.integer(1, 4))], {"ids": np.array(draw.rng.integers(N, size=shape))}


def drawn_columns(draw: Draw, B: int, T: int) -> np.ndarray | None:
    """(B, Q) distinct columns of each sequence, in any order; or None, all of them."""
    if draw.pick((True, False)):
        return None
    return draw.rng.permuted(np.tile(np.arange(T), (B, 1)), axis=1)[:, : draw.integer(1, T)]


def make_take_columns(draw: Draw) -> Case:
    B, T = draw.integer(1, 3), draw.integer(1, 4)
    columns = draw.rng.permuted(np.tile(np.arange(T), (B, 1)), axis=1)[:, : draw.integer(1, T)]
    return [draw.normal(B, T, draw.integer(1, 4))], {"columns": columns}


def make_attention(side: str, scale: float, draw: Draw) -> Case:
    B, T, H, D = draw.integer(1, 2), draw.integer(1, 3), draw.integer(1, 2), draw.integer(1, 2)
    allowed = attention.causal_mask(drawn_mask(draw, B, T, side))
    constants = {"n_head": H, "allowed": allowed, "read": drawn_columns(draw, B, T)}
    return [scale * scaled(draw, B, T, 3 * H * D)], constants


def make_tied_logits(draw: Draw) -> Case:
    C = draw.integer(1, 4)
    return [scaled(draw, *leading(draw), C), draw.normal(draw.integer(1, 5), C)], {}


def make_scalar_head(draw: Draw) -> Case:
    C = draw.integer(1, 4)
    return [scaled(draw, *leading(draw), C), draw.normal(C, 1), draw.normal(1)], {}


def drawn_transformer(draw: Draw, config: GPTConfig) -> Tree:
    """Parameters well away from the initial ones, where a wrong bias or gain would not show."""
    params = init_transformer(config, rng=draw.rng, dtype=np.float64)
    return tree_map(lambda a: a + 0.5 * draw.normal(*a.shape), params)


def drawn_head(draw: Draw, config: GPTConfig) -> Tree:
    return {"w": draw.normal(config.d_model, 1), "b": draw.normal(1)}


def tiny_config(draw: Draw) -> GPTConfig:
    H = draw.pick((1, 2))
    return GPTConfig(vocab_size=draw.integer(2, 3), n_ctx=4, n_layer=1, n_head=H, d_model=4)


def drawn_batch(draw: Draw, config: GPTConfig, *, B: int, P: int, R: int) -> Batch:
    """Prompts padded on the left, responses on the right; any ids at padding."""
    mask = np.concatenate([drawn_mask(draw, B, P, "left"), drawn_mask(draw, B, R)], axis=1)
    return Batch(draw.rng.integers(config.vocab_size, size=(B, P + R)), mask, P)


def tiny_batch(draw: Draw, config: GPTConfig) -> Batch:
    return drawn_batch(
        draw, config, B=draw.integer(1, 2), P=draw.integer(1, 2), R=draw.integer(1, 2)
    )


def make_block(draw: Draw) -> Case:
    config = tiny_config(draw)
    mask = tiny_batch(draw, config).mask
    p = drawn_transformer(draw, config)["blocks"][0]
    constants = {"n_head": config.n_head, "allowed": attention.causal_mask(mask)}
    constants["read"] = drawn_columns(draw, *mask.shape)
    return [draw.normal(*mask.shape, config.d_model), p], constants


def make_transformer(draw: Draw) -> Case:
    config = tiny_config(draw)
    batch = tiny_batch(draw, config)
    constants = {"tokens": batch.tokens, "mask": batch.mask, "config": config}
    constants["read"] = drawn_columns(draw, *batch.mask.shape)
    return [drawn_transformer(draw, config)], constants


# -- rlhf/ ---------------------------------------------------------------------------------------

LOGIT_SCALES = (0.1, 1.0, 30.0)  # at 30 nearly all probability lies on one token


def drawn_logits(draw: Draw) -> np.ndarray:
    """(B, T, V)."""
    shape = draw.integer(1, 2), draw.integer(1, 3), draw.integer(1, 5)
    return scaled(draw, *shape, scales=LOGIT_SCALES) + draw.pick((0.0, 20.0))


def make_token_logprobs(draw: Draw) -> Case:
    logits = drawn_logits(draw)
    targets = draw.rng.integers(logits.shape[-1], size=logits.shape[:-1])
    return [logits], {"targets": targets, "temperature": draw.pick((1.0, 0.7, 2.0))}


def make_sequence_logprob(draw: Draw) -> Case:
    mask = drawn_mask(draw, draw.integer(1, 3), draw.integer(1, 4), draw.pick(("left", "right")))
    return [scaled(draw, *mask.shape)], {"mask": mask}


def make_entropy(draw: Draw) -> Case:
    return [drawn_logits(draw)], {"temperature": draw.pick((1.0, 0.7, 2.0))}


def make_full_kl(draw: Draw) -> Case:
    logits = drawn_logits(draw)
    ref_logits = logits + drawn_log_ratio(draw, *logits.shape)
    return [logits], {"ref_logits": ref_logits, "temperature": draw.pick((1.0, 0.7, 2.0))}


def drawn_logps(draw: Draw, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """logp, old_logp, ref_logp (B, T); padding holds anything."""
    logp = draw.normal(*weights.shape)
    old_logp = logp - drawn_log_ratio(draw, *weights.shape)
    ref_logp = logp - drawn_log_ratio(draw, *weights.shape)
    return logp, old_logp, np.where(weights > 0, ref_logp, PADDING)


def make_kl_loss_of_samples(estimator: str, ratio: str, draw: Draw) -> Case:
    weights = drawn_weights(draw)
    logp, old_logp, ref_logp = drawn_logps(draw, weights)
    constants = {"old_logp": old_logp, "ref_logp": ref_logp, "weights": weights}
    if ratio == "stop":
        constants["held_logp"] = logp.copy()
    return [logp], {**constants, "estimator": estimator, "ratio": ratio}


def make_kl_loss_cut(draw: Draw) -> Case:
    """Log-ratios beyond +-20, where exp is cut: k3 and its ratio are flat there."""
    weights = drawn_weights(draw)
    logp = draw.normal(*weights.shape)
    beyond = draw.pick((25.0, -25.0)) + draw.normal(*weights.shape)
    constants = {"old_logp": logp - beyond, "ref_logp": logp - beyond, "weights": weights}
    return [logp], {**constants, "estimator": "k3", "ratio": draw.pick(("none", "both"))}


@functools.wraps(kl.sequence_kl_loss_forward)
def sequence_kl_loss_held(logp, *, held_logp, old_logp, **constants):
    """With the ratio exp(sum held_logp - old_logp): a constant, as its backward treats it."""
    moving = old_logp + (logp - held_logp)
    return kl.sequence_kl_loss_forward(logp, old_logp=moving, **constants)


@functools.wraps(objectives.kl_loss_forward)
def kl_loss_held(logits, logp, *, held, kl_mode, old_logp, weights, **constants):
    """kl_loss, where what its backward takes for a constant comes from `held`, the policy's output.

    loss_rho_k2: the ratio. loss_rb: its backward is deliberately not the derivative of its value,
    but of the value + sum_t w_t logp_t (KL of the later tokens, held). That the *expectation* of
    such a gradient is the KL's takes an enumeration of all responses, not a derivative.
    """
    mode = KL_MODES[kl_mode]
    if mode.ratio == "stop":
        old_logp = old_logp + (logp - held.logp)
    loss, cache = objectives.kl_loss_forward(
        logits, logp, kl_mode=kl_mode, old_logp=old_logp, weights=weights, **constants
    )
    if mode.in_loss == "rao_blackwell":
        kl_token, _ = kl.full_kl_forward(
            held.logits,
            ref_logits=constants["ref_logits"],
            temperature=constants["temperature"],
        )
        loss = loss + (weights * kl.future_kl(kl_token, mask=weights) * logp).sum()
    return loss, cache


def holds_something(kl_mode: str) -> bool:
    """Does the backward of this mode take a factor of the loss for a constant?"""
    mode = KL_MODES[kl_mode]
    return mode.ratio == "stop" or mode.in_loss == "rao_blackwell"


def make_kl_loss(kl_mode: str, draw: Draw) -> Case:
    weights = drawn_weights(draw)
    logp, old_logp, ref_logp = drawn_logps(draw, weights)
    logits = scaled(draw, *weights.shape, draw.integer(1, 4), scales=LOGIT_SCALES)
    whole = KL_MODES[kl_mode].needs_ref_logits
    constants = {
        "kl_mode": kl_mode,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "ref_logits": logits + draw.normal(*logits.shape) if whole else None,
        "weights": weights,
        "temperature": draw.pick((1.0, 0.7, 2.0)),
    }
    if holds_something(kl_mode):
        constants["held"] = PolicyOutput(logits.copy(), logp.copy(), None)
    return [logits, logp], constants


def make_weighted_sum(draw: Draw) -> Case:
    weights = drawn_weights(draw)
    return [scaled(draw, *weights.shape)], {"weights": weights}


def make_bradley_terry(draw: Draw) -> Case:
    B = draw.integer(1, 5)
    constants = {"margin": draw.pick((0.0, 0.5)), "label_smoothing": draw.pick((0.0, 0.1))}
    scales = (0.1, 1.0, 30.0)
    return [scaled(draw, B, scales=scales), scaled(draw, B, scales=scales)], constants


def make_ranking(draw: Draw) -> Case:
    return [scaled(draw, draw.integer(1, 3), draw.integer(2, 4), scales=(0.1, 1.0, 30.0))], {}


def make_ppo_clip(clip: str, clip_eps: Any, dual_clip: float | None, draw: Draw) -> Case:
    weights = drawn_weights(draw)
    logp = draw.normal(*weights.shape)
    log_ratio = drawn_log_ratio(draw, *weights.shape, kinks=clip_kinks(clip_eps, dual_clip))
    advantages = draw.normal(*weights.shape)
    if draw.pick((True, False)):
        advantages.flat[-1] = 0.0
    constants = {"old_logp": logp - log_ratio, "advantages": advantages, "weights": weights}
    return [logp], {**constants, "clip_eps": clip_eps, "clip": clip, "dual_clip": dual_clip}


def make_ppo_clip_cut(draw: Draw) -> Case:
    """Log-ratios beyond +-20, where exp is cut: the loss is flat there even without clipping."""
    weights = drawn_weights(draw)
    logp, advantages = draw.normal(2, *weights.shape)
    old_logp = logp - draw.pick((25.0, -25.0)) - draw.normal(*weights.shape)
    constants = {"old_logp": old_logp, "advantages": advantages, "weights": weights}
    return [logp], {**constants, "clip": "none"}


def make_value_loss(clip_eps: float | None, draw: Draw) -> Case:
    weights = drawn_weights(draw)
    values = scaled(draw, *weights.shape)
    old_values, returns = drawn_value_targets(draw, values, clip_eps)
    constants = {"old_values": old_values, "returns": returns, "weights": weights}
    return [values], {**constants, "clip_eps": clip_eps}


# -- train/ --------------------------------------------------------------------------------------


@functools.wraps(policy.policy_forward)
def policy_as_one_array(params, **constants):
    """logits, logp and values side by side, (B, R, V + 2): a pair has one output."""
    out, cache = policy.policy_forward(params, **constants)
    columns = [out.logits, out.logp[..., None]]
    columns += [] if out.values is None else [out.values[..., None]]
    return get_xp(out.logits).concatenate(columns, axis=-1), cache


@functools.wraps(policy.policy_backward)
def policy_from_one_array(dout, cache):
    V = cache.logits.wte.shape[0]
    dvalues = None if cache.values is None else dout[..., V + 1]
    return policy.policy_backward(dout[..., :V], dout[..., V], dvalues, cache)


def make_policy(draw: Draw) -> Case:
    config = tiny_config(draw)
    params = {"transformer": drawn_transformer(draw, config)}
    if draw.pick((True, False)):
        params["value_head"] = drawn_head(draw, config)
    constants = {"batch": tiny_batch(draw, config), "temperature": draw.pick((1.0, 0.7))}
    return [params], {**constants, "config": config}


def make_reward(draw: Draw) -> Case:
    config = tiny_config(draw)
    params = {
        "transformer": drawn_transformer(draw, config),
        "reward_head": drawn_head(draw, config),
    }
    return [params], {"batch": tiny_batch(draw, config), "config": config}


@functools.wraps(ppo.ppo_loss_forward)
def ppo_loss_held(params, *, held, experience, config, settings):
    """ppo_loss, with `kl_loss_held` for its penalty where `held` is given."""
    loss, cache = ppo.ppo_loss_forward(
        params, experience=experience, config=config, settings=settings
    )
    if held is not None:
        e, temperature = experience, settings.temperature
        loss = loss - e.kl_loss_coef * cache.parts["loss/kl_avg"]
        out, _ = policy.policy_forward(
            params, batch=e.batch, config=config, temperature=temperature
        )
        kl_loss, _ = kl_loss_held(
            out.logits,
            out.logp,
            held=held,
            kl_mode=settings.kl_mode,
            old_logp=e.old_logp,
            ref_logp=e.ref_logp,
            ref_logits=e.ref_logits,
            weights=e.weights,
            temperature=temperature,
        )
        loss = loss + e.kl_loss_coef * kl_loss
    return loss, cache


def drawn_ppo_case(draw: Draw, config: GPTConfig, batch: Batch, settings: PPOConfig) -> Case:
    """A policy, and an experience that keeps away from the kinks of the loss at that policy."""
    params = {
        "transformer": drawn_transformer(draw, config),
        "value_head": drawn_head(draw, config),
    }
    out, _ = policy.policy_forward(
        params, batch=batch, config=config, temperature=settings.temperature
    )
    shape = out.logp.shape
    kinks = clip_kinks(settings.clip_range, settings.dual_clip or None)
    old_values, returns = drawn_value_targets(draw, out.values, settings.value_clip_eps or None)
    experience = Experience(
        batch=batch,
        old_logp=out.logp - drawn_log_ratio(draw, *shape, kinks=kinks),
        ref_logp=out.logp - 0.5 * draw.normal(*shape),
        ref_logits=out.logits + draw.normal(*out.logits.shape),
        old_values=old_values,
        advantages=draw.normal(*shape),
        returns=returns,
        weights=objectives.token_weights(batch.response_mask, mode=settings.aggregation),
        kl_loss_coef=np.array(0.21),
    )
    held = out if holds_something(settings.kl_mode) else None
    constants = {"experience": experience, "config": config, "settings": settings}
    return [params], {**constants, "held": held}


def full_settings(kl_mode: str, **changes: Any) -> PPOConfig:
    """Every term of the PPO loss at once."""
    terms = {"value_clip_eps": 0.2, "vf_coef": 0.5, "ent_coef": 0.2, "temperature": 0.9}
    return PPOConfig(kl_mode=kl_mode, **{**terms, **changes})


def make_ppo_loss(draw: Draw) -> Case:
    settings = full_settings(
        draw.pick(tuple(KL_MODES)),
        clip=draw.pick(("ppo", "book", "none")),
        dual_clip=draw.pick((0.0, 3.0)),
        value_clip_eps=draw.pick((0.2, 0.0)),
        ent_coef=draw.pick((0.2, 0.0)),
        aggregation=draw.pick(objectives.AGGREGATIONS),
    )
    config = tiny_config(draw)
    return drawn_ppo_case(draw, config, tiny_batch(draw, config), settings)


# -- the table -----------------------------------------------------------------------------------


def row(
    file: Any, operation: str, make: Callable[..., Case], *settings: Any, mode: str = ""
) -> Row:
    """The pair `operation` of a file, with `make` told the settings of this mode."""
    pair = [getattr(file, f"{operation}_{way}") for way in ("forward", "backward")]
    return Row(*pair, functools.partial(make, *settings), mode)


def kl_loss_row(kl_mode: str) -> Row:
    made = row(objectives, "kl_loss", make_kl_loss, kl_mode, mode=kl_mode)
    return made._replace(forward=kl_loss_held) if holds_something(kl_mode) else made


def sequence_kl_loss_held_row(k: str) -> Row:
    made = row(kl, "sequence_kl_loss", make_kl_loss_of_samples, k, "stop", mode=f"{k}, ratio held")
    return made._replace(forward=sequence_kl_loss_held)


TABLE = [
    row(layers, "linear", make_linear),
    row(layers, "layernorm", make_layernorm, 1.0, 0.0),
    row(layers, "layernorm", make_layernorm, 30.0, 5.0, mode="scale 30, offset 5"),
    row(layers, "layernorm", make_layernorm, 0.1, 5.0, mode="scale 0.1, offset 5"),
    row(layers, "gelu", make_gelu),
    row(layers, "embedding", make_embedding),
    row(layers, "take_columns", make_take_columns),
    row(attention, "attention", make_attention, "left", 1.0, mode="left padding"),
    row(attention, "attention", make_attention, "right", 1.0, mode="right padding"),
    row(attention, "attention", make_attention, "right", 8.0, mode="scores beyond exp"),
    row(heads, "tied_logits", make_tied_logits),
    row(heads, "scalar_head", make_scalar_head),
    row(transformer, "block", make_block),
    row(transformer, "transformer", make_transformer),
    row(logprobs, "token_logprobs", make_token_logprobs),
    row(logprobs, "sequence_logprob", make_sequence_logprob),
    row(logprobs, "entropy", make_entropy),
    row(kl, "full_kl", make_full_kl),
    *[
        row(kl, f"{unit}_kl_loss", make_kl_loss_of_samples, k, ratio, mode=f"{k}{mode}")
        for unit in ("token", "sequence")
        for ratio, mode in (("none", ""), ("both", ", ratio"))
        for k in ("k1", "k2", "k3")
    ],
    *[sequence_kl_loss_held_row(k) for k in ("k1", "k2", "k3")],
    row(kl, "token_kl_loss", make_kl_loss_cut, mode="beyond the cut"),
    row(kl, "sequence_kl_loss", make_kl_loss_cut, mode="beyond the cut"),
    row(objectives, "weighted_sum", make_weighted_sum),
    row(objectives, "cross_entropy", make_weighted_sum),
    row(objectives, "bradley_terry", make_bradley_terry),
    row(objectives, "ranked_pairs", make_ranking),
    row(objectives, "plackett_luce", make_ranking),
    row(objectives, "ppo_clip", make_ppo_clip, "ppo", 0.2, None, mode="ppo"),
    row(objectives, "ppo_clip", make_ppo_clip, "ppo", (0.2, 0.4), None, mode="clip-higher"),
    row(objectives, "ppo_clip", make_ppo_clip, "ppo", 0.2, 3.0, mode="dual clip"),
    row(objectives, "ppo_clip", make_ppo_clip, "book", 0.2, None, mode="book"),
    row(objectives, "ppo_clip", make_ppo_clip, "none", 0.2, None, mode="none"),
    row(objectives, "ppo_clip", make_ppo_clip_cut, mode="beyond the cut"),
    row(objectives, "value_loss", make_value_loss, None, mode="not clipped"),
    row(objectives, "value_loss", make_value_loss, 0.2, mode="clipped"),
    *[kl_loss_row(kl_mode) for kl_mode in KL_MODES],
    Row(policy_as_one_array, policy_from_one_array, make_policy),
    row(policy, "reward", make_reward),
    Row(ppo_loss_held, ppo.ppo_loss_backward, make_ppo_loss),
]


# -- whole losses --------------------------------------------------------------------------------


class WholeLoss(NamedTuple):
    """A loss of training: `make` gives params -> loss, the parameters, and their gradients."""

    name: str
    make: Callable[[Draw], tuple[Callable[[Tree], Any], Tree, Tree]]


def two_blocks(draw: Draw) -> GPTConfig:
    return GPTConfig(vocab_size=11, n_ctx=8, n_layer=2, n_head=draw.pick((1, 2, 4)), d_model=8)


def whole_sft(draw: Draw):
    config = two_blocks(draw)
    batch = drawn_batch(draw, config, B=3, P=3, R=4)
    params = {"transformer": drawn_transformer(draw, config)}

    def loss(params):
        out, _ = policy.policy_forward(params, batch=batch, config=config)
        weights = objectives.token_weights(batch.response_mask)
        return objectives.cross_entropy_forward(out.logp, weights=weights)[0]

    return loss, params, sft_loss_and_gradients(params, batch, config)[1]


def whole_bradley_terry(draw: Draw):
    config = two_blocks(draw)
    batch = drawn_batch(draw, config, B=6, P=3, R=4)  # three chosen, then three rejected
    params = {
        "transformer": drawn_transformer(draw, config),
        "reward_head": drawn_head(draw, config),
    }

    def forward(params):
        score, cache = policy.reward_forward(params, batch=batch, config=config)
        loss, loss_cache = objectives.bradley_terry_forward(score[:3], score[3:], margin=0.2)
        return loss, cache, loss_cache

    _, cache, loss_cache = forward(params)
    dscore = np.concatenate(objectives.bradley_terry_backward(1.0, loss_cache))
    return lambda params: forward(params)[0], params, policy.reward_backward(dscore, cache)


def whole_ppo(kl_mode: str, draw: Draw):
    """Clip, clipped value, entropy, penalty; the gradient as the training step computes it."""
    config = two_blocks(draw)
    batch = drawn_batch(draw, config, B=4, P=3, R=4)
    settings = full_settings(kl_mode, micro_batch_size=draw.pick((0, 1, 3)))
    (params,), constants = drawn_ppo_case(draw, config, batch, settings)
    experience = constants["experience"]
    gradients, *_ = ppo.minibatch_gradients(params, experience, config=config, settings=settings)
    return lambda params: ppo_loss_held(params, **constants)[0], params, gradients


WHOLE_LOSSES = [
    WholeLoss("supervised fine-tuning", whole_sft),
    WholeLoss("Bradley-Terry", whole_bradley_terry),
    *[WholeLoss(f"PPO: {mode}", functools.partial(whole_ppo, mode)) for mode in KL_MODES],
]


# -- running and printing ------------------------------------------------------------------------


class Result(NamedTuple):
    """One line of the printed table: the worst of several cases."""

    file: str
    name: str
    arguments: str
    entries: int  # differentiated, over all cases
    complex_step: float  # worst relative error, nan if not run
    central: float
    dot_product: float
    ok: bool
    message: str  # of the first case that failed


def check_row(row: Row, *, cases: int, seed: Sequence[int]) -> Result:
    """`check_pair` on random cases."""
    reports, messages, entries, names = [], [], 0, []
    for case in range(cases):
        arrays, constants = row.make(Draw(np.random.default_rng([*seed, case])))
        entries += tree_size(arrays)
        names = argument_names(row.forward, len(arrays))
        try:
            report = check_pair(
                row.forward, row.backward, *arrays, name=row.name, raises=False, **constants
            )
        except GradientError as error:  # a shape, a dtype, memory written to: no numbers to show
            messages.append(str(error))
            continue
        reports.append(report)
        messages += [] if report.ok else [str(report)]
    methods = ("complex step", "central difference", "dot product")
    errors = [max((r.worst(m) for r in reports), default=math.nan) for m in methods]
    ok, message = not messages, "".join(messages[:1])
    return Result(row.file, row.name, ", ".join(names), entries, *errors, ok, message)


def check_whole_loss(whole: WholeLoss, *, seed: Sequence[int]) -> Result:
    """`check_directions` through all parameters together, and through each tensor alone."""
    rng = np.random.default_rng(seed)
    loss, params, gradients = whole.make(Draw(rng))
    tensors = f"{len(list(tree_items(params)))} tensors"
    try:
        report = check_directions(loss, params, gradients, rng=rng, name=whole.name, raises=False)
    except GradientError as error:
        errors, message = [math.nan] * 3, str(error)
    else:
        errors = [report.worst("direction"), math.nan, math.nan]
        message = "" if report.ok else str(report)
    group = "whole losses, two blocks, by directions"
    return Result(group, whole.name, tensors, tree_size(params), *errors, not message, message)


def run_checks(
    *,
    seed: int = 0,
    cases_per_row: int = 10,
    track: Callable[[Sequence[Any], str], Iterable[Any]] = lambda steps, title: steps,
) -> list[Result]:
    """Check every row of TABLE on random cases (a whole model on one), then every whole loss.

    Args:
        track: wraps the list of checks, to show progress.
    """
    checks = [
        functools.partial(check_row, row, cases=1 if row.is_model else cases_per_row)
        for row in TABLE
    ]
    checks += [functools.partial(check_whole_loss, whole) for whole in WHOLE_LOSSES]
    numbered = list(enumerate(checks))
    return [check(seed=[seed, i]) for i, check in track(numbered, "checking gradients")]


def print_table(results: list[Result], console: Console | None = None) -> None:
    """The worst errors line by line; below them, in full, what is wrong."""
    console = console or Console()
    table = Table(
        title="Every backward against the derivative of its forward, in float64",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("operation (differentiated by)", overflow="fold")
    for heading in ("entries", "complex\nstep", "central\ndiff.", "dot\nproduct", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    files = [None, *(result.file for result in results)]
    for before, result in zip(files, results, strict=False):
        if result.file != before:
            table.add_section()
            table.add_row(f"[bold]{result.file}[/bold]")
        operation, _, mode = result.name.partition(": ")
        called = f"  {operation}({result.arguments}){mode and ': '}{mode}"
        errors = (result.complex_step, result.central, result.dot_product)
        shown = ["" if math.isnan(e) else f"{e:.1e}" if e else "0" for e in errors]
        verdict = "[green]ok[/green]" if result.ok else "[bold red]WRONG[/bold red]"
        table.add_row(called, f"{result.entries:,}", *shown, verdict)
    console.print(table)
    console.print(
        "Relative errors, the worst of all entries and cases. Allowed: "
        f"{COMPLEX_TOLERANCE:.0e} by complex step, direction and dot product, "
        f"{CENTRAL_TOLERANCE:.0e} by central difference.",
        style="dim",
    )
    for result in results:
        if not result.ok:
            console.print(f"\n{result.message}", markup=False, highlight=False, soft_wrap=True)


def check_command(*, seed: int = 0, cases: int = 10) -> int:
    """Check every gradient of the package and print the table.

    Args:
        seed: of the random cases.
        cases: random cases a row.
    Returns:
        exit status: 0 if every gradient is right, else 1.
    """
    started = time.perf_counter()
    results = run_checks(seed=seed, cases_per_row=cases, track=track)
    print_table(results)
    wrong = [result.name for result in results if not result.ok]
    verdict = f"WRONG: {'; '.join(wrong)}" if wrong else "all right"
    entries = sum(result.entries for result in results)
    spent = time.perf_counter() - started
    print(f"{len(results)} checks, {entries:,} entries, {spent:.0f} s: {verdict}")
    return 1 if wrong else 0
