"""The cases on which `minirlhf check` and the tests check every pair of the package.

TABLE has a row for each mode of each pair: the forward, its backward, and a recipe that draws a
small case. A recipe may draw more constants than one forward takes: it gets those that it names. In
tests/rlhf/test_pairs.py Hypothesis draws from the same recipes.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from minirlhf.backend import get_xp
from minirlhf.nn import attention, heads, layers, transformer
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf import imitation, kl, logprobs, objectives, preferences
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.train import policy, ppo, reward_model
from minirlhf.train.batches import Batch
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import Tree, tree_map

Case = tuple[list[Tree], dict[str, Any]]  # differentiable arguments, constants
PADDING = 77.0  # what stands where nothing may look
GAP = 1e-2  # least distance from a kink
KINKS = [math.log(ratio) for ratio in (1 - 0.2, 1 + 0.2, 1 + 0.4, 3.0)]  # of all clips below
TEMPERATURES = (1.0, 0.7, 2.0)
SCALES, WIDE = (0.1, 1.0, 3.0), (0.1, 1.0, 30.0)  # at 30 one token has nearly all probability
FULL = PPOConfig(value_clip_eps=0.2, vf_coef=0.5, ent_coef=0.2, temperature=0.9)  # every term


class Draw:
    """Where a case comes from; in tests/ Hypothesis answers `integer` and `pick`."""

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


def leading(draw: Draw) -> tuple[int, ...]:
    """Up to two axes before the last: what works on the last axis takes any number of them."""
    return tuple(draw.integer(1, 3) for _ in range(draw.integer(0, 2)))


def scaled(draw: Draw, *shape: int, scales: Sequence[float] = SCALES) -> np.ndarray:
    """N(0, scale^2) entries."""
    return draw.pick(scales) * draw.normal(*shape)


def drawn_mask(draw: Draw, B: int, T: int, side: str = "right") -> np.ndarray:
    """(B, T) with 1 to T ones a row and the zeros on `side`."""
    lengths = np.array([draw.integer(1, T) for _ in range(B)])
    mask = (np.arange(T) < lengths[:, None]).astype(np.float64)
    return mask if side == "right" else mask[:, ::-1].copy()


def drawn_log_ratio(draw: Draw, *shape: int, far: bool = False) -> np.ndarray:
    """log pi_theta - log pi_other, away from the kinks; one entry may be 0, the same policy."""
    if far:  # beyond +-20, where exp is cut: the ratio, k3 and an unclipped loss are flat
        return draw.pick((25.0, -25.0)) + draw.normal(*shape)
    log_ratio = scaled(draw, *shape, scales=(0.003, 0.2, 1.0))
    for kink in KINKS:
        edge = kink + np.where(log_ratio < kink, -GAP, GAP)
        log_ratio = np.where(np.abs(log_ratio - kink) < GAP, edge, log_ratio)
    if draw.pick((True, False)):
        log_ratio.flat[0] = 0.0
    return log_ratio


def drawn_value_targets(draw: Draw, values: np.ndarray, clip_eps: float) -> dict[str, np.ndarray]:
    """old_values and returns for which max(error^2, clipped error^2) has a derivative at values."""
    while True:
        moved, error = 0.5 * draw.normal(*values.shape), draw.normal(*values.shape)
        edge = error - moved + np.copysign(clip_eps, moved)
        bends = np.abs(np.abs(moved) - clip_eps) < GAP
        tied = (np.abs(moved) > clip_eps) & (np.abs(np.abs(edge) - np.abs(error)) < GAP)
        if not clip_eps or not (bends | tied).any():
            return {"old_values": values - moved, "returns": values - error}


def drawn_columns(draw: Draw, B: int, T: int, *, none: bool = True) -> np.ndarray | None:
    """(B, Q) distinct columns of each sequence, in any order; or None, all of them."""
    if none and draw.pick((True, False)):
        return None
    return draw.rng.permuted(np.tile(np.arange(T), (B, 1)), axis=1)[:, : draw.integer(1, T)]


# -- nn/ -----------------------------------------------------------------------------------------
def make_arrays(draw: Draw, axes: str, scales: Sequence[float] = SCALES) -> Case:
    """Arrays and no constants: "." any leading axes, a letter a size, as in ".I,IO,O" of linear."""
    sizes = {letter: (draw.integer(1, 4),) for letter in axes if letter.isalpha()}
    sizes |= {"1": (1,), "K": (draw.integer(2, 4),), ".": leading(draw)}
    shapes = (sum((sizes[axis] for axis in shape), ()) for shape in axes.split(","))
    return [scaled(draw, *shape, scales=scales) for shape in shapes], {}


def make_layernorm(draw: Draw, scale: float, offset: float) -> Case:
    C = draw.integer(3, 6)
    x = draw.normal(*leading(draw), C)
    x /= np.minimum(x.std(axis=-1, keepdims=True), 1.0)  # near a flat row it bends too sharply
    return [scale * x + offset, draw.normal(C), draw.normal(C)], {}


def make_embedding(draw: Draw) -> Case:
    N, shape = draw.integer(1, 5), leading(draw)
    return [draw.normal(N, draw.integer(1, 4))], {"ids": np.array(draw.rng.integers(N, size=shape))}


def make_take_columns(draw: Draw) -> Case:
    B, T = draw.integer(1, 3), draw.integer(1, 4)
    columns = drawn_columns(draw, B, T, none=False)
    return [draw.normal(B, T, draw.integer(1, 4))], {"columns": columns}


def make_attention(draw: Draw, side: str, scale: float, group: int = 1) -> Case:
    B, T, K, D = draw.integer(1, 2), draw.integer(1, 3), draw.integer(1, 2), draw.integer(1, 2)
    allowed = attention.causal_mask(drawn_mask(draw, B, T, side))
    constants = {"n_head": group * K, "n_kv_head": K, "allowed": allowed}
    x = scale * scaled(draw, B, T, (group + 2) * K * D)
    return [x], {**constants, "read": drawn_columns(draw, B, T)}


def make_rotary(draw: Draw) -> Case:
    B, T, n = draw.integer(1, 2), draw.integer(1, 3), draw.integer(1, 2)
    positions = draw.rng.integers(100, size=(B, T))
    angles = attention.rotary_angles(positions, n=n, theta=100.0, dtype=np.float64)
    return [draw.normal(B, T, 3 * 2 * n)], {"n_rotated": draw.integer(1, 3), **angles}


def drawn_model(draw: Draw, config: GPTConfig, head: str = "") -> Tree:
    """Parameters well away from the initial ones, where a wrong bias or gain would not show."""
    params = transformer.init_transformer(config, rng=draw.rng, dtype=np.float64)
    model = {"transformer": tree_map(lambda a: a + 0.5 * draw.normal(*a.shape), params)}
    if head:
        model[head] = {"w": draw.normal(config.d_model, 1), "b": draw.normal(1)}
    return model


LLAMA = {"block": "llama", "n_kv_head": 1, "d_ff": 3, "rope_theta": 10.0}
KINDS = {"gpt2": {}, "llama": LLAMA, "llama, untied": {**LLAMA, "tied": False}}
BLOCKS = ("gpt2", "llama")


def drawn_config(draw: Draw, *kinds: str) -> GPTConfig:
    """A model of one block, of one of these kinds."""
    V, H, sizes = draw.integer(2, 3), draw.pick((1, 2)), KINDS[draw.pick(kinds)]
    return GPTConfig(V, n_ctx=4, n_layer=1, n_head=H, d_model=4, **sizes)


def drawn_batch(draw: Draw, config: GPTConfig, *sizes: int) -> Batch:
    """Prompts padded on the left, responses on the right; any ids at padding. Sizes: B, P, R."""
    B, P, R = sizes or [draw.integer(1, 2) for _ in range(3)]
    mask = np.concatenate([drawn_mask(draw, B, P, "left"), drawn_mask(draw, B, R)], axis=1)
    return Batch(draw.rng.integers(config.vocab_size, size=(B, P + R)), mask, P)


def make_model(draw: Draw, *heads: str, kinds: tuple[str, ...] = BLOCKS) -> Case:
    """A model with one of these heads, or ("") without one, and a batch. Or its transformer."""
    config = drawn_config(draw, *kinds)
    tokens, mask, _ = batch = drawn_batch(draw, config)
    constants = {"tokens": tokens, "mask": mask, "read": drawn_columns(draw, *mask.shape)}
    constants |= {"batch": batch, "config": config, "temperature": draw.pick(TEMPERATURES)}
    model = drawn_model(draw, config, draw.pick(heads) if heads else "")
    return [model if heads else model["transformer"]], constants


def make_block(draw: Draw, kind: str = "gpt2") -> Case:
    (params,), drawn = make_model(draw, kinds=(kind,))
    config, mask = drawn["config"], drawn["mask"]
    positions = transformer.positions_of(mask)
    constants = {"config": config, "allowed": attention.causal_mask(mask), "read": drawn["read"]}
    constants["rotation"] = transformer.rotation_of(params, positions, config)
    return [draw.normal(*mask.shape, config.d_model), params["blocks"][0]], constants


def make_part(draw: Draw, kind: str, name: str) -> Case:
    """Activations and a part of a block's parameters."""
    (x, p), _ = make_block(draw, kind)
    return [x, p[name]], {}


# -- rlhf/ ---------------------------------------------------------------------------------------
def make_of_logits(draw: Draw) -> Case:
    """An operation on logits (B, T, V)."""
    shape = draw.integer(1, 2), draw.integer(1, 3), draw.integer(1, 5)
    logits = scaled(draw, *shape, scales=WIDE) + draw.pick((0.0, 20.0))
    constants = {"targets": draw.rng.integers(shape[-1], size=shape[:-1])}
    constants["ref_logits"] = logits + drawn_log_ratio(draw, *shape)
    return [logits], {**constants, "temperature": draw.pick(TEMPERATURES)}


def make_of_tokens(draw: Draw, far: bool = False, ratio: str = "token") -> Case:
    """An operation on the log-probs (B, T) of tokens; padding holds anything."""
    mask = drawn_mask(draw, draw.integer(1, 3), draw.integer(1, 4), draw.pick(("left", "right")))
    weights = objectives.token_weights(mask, mode=draw.pick(objectives.AGGREGATIONS))
    logp, advantages = draw.normal(2, *mask.shape)
    if draw.pick((True, False)):
        advantages.flat[-1] = 0.0
    log_ratio = drawn_log_ratio(draw, *mask.shape, far=far)
    old_logp = logp - (of_sequences(draw, log_ratio, mask) if ratio == "sequence" else log_ratio)
    ref_logp = logp - drawn_log_ratio(draw, *mask.shape, far=far)
    constants = {"mask": mask, "weights": weights, "advantages": advantages, "old_logp": old_logp}
    constants["ref_logp"] = np.where(mask > 0, ref_logp, PADDING)
    return [logp], {**constants, "held_logp": logp.copy()}


def of_sequences(draw: Draw, log_ratio: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Log-ratios of tokens whose mean over each response is away from a kink, as its first one."""
    noise, lengths = draw.normal(*mask.shape) * mask, np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return log_ratio[:, :1] + noise - noise.sum(axis=1, keepdims=True) / lengths


def hold_ratio(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward with its ratio at held_logp: a constant, as its backward treats it."""

    @functools.wraps(forward)
    def with_held_ratio(logp, *, held_logp, old_logp, **constants):
        return forward(logp, old_logp=old_logp + (logp - held_logp), **constants)

    return with_held_ratio


HELD = {"clipped-weight": hold_ratio(objectives.cispo_forward)}  # of the SURROGATES


@functools.wraps(objectives.kl_loss_forward)
def kl_loss_held(logits, logp, *, held, kl_mode, old_logp, weights, **constants):
    """kl_loss, where what its backward takes for a constant is of `held`, the policy's output."""
    mode, same = KL_MODES[kl_mode], {"kl_mode": kl_mode, "weights": weights, **constants}
    if mode.ratio == "held":
        old_logp = old_logp + (logp - held.logp)
    loss, cache = objectives.kl_loss_forward(logits, logp, old_logp=old_logp, **same)
    if mode.in_loss == "rao_blackwell":  # its backward adds the score times the later tokens' KL
        both = {name: constants[name] for name in ("ref_logits", "temperature")}
        kl_token, _ = kl.full_kl_forward(held.logits, **both)
        loss = loss + (weights * kl.future_kl(kl_token, mask=weights) * logp).sum()
    return loss, cache


def make_kl_loss(draw: Draw, kl_mode: str) -> Case:
    (logp,), constants = make_of_tokens(draw)
    logits = scaled(draw, *logp.shape, draw.integer(1, 4), scales=WIDE)
    whole = KL_MODES[kl_mode].needs_ref_logits
    constants["ref_logits"] = logits + draw.normal(*logits.shape) if whole else None
    constants["held"] = policy.PolicyOutput(logits.copy(), logp.copy(), None)
    constants |= {"kl_mode": kl_mode, "temperature": draw.pick(TEMPERATURES)}
    return [logits, logp], constants


def make_value_loss(draw: Draw, clip_eps: float) -> Case:
    (values,), constants = make_of_tokens(draw)
    targets = drawn_value_targets(draw, values, clip_eps)
    return [values], {**constants, **targets, "clip_eps": clip_eps or None}


# -- train/ --------------------------------------------------------------------------------------
@functools.wraps(policy.policy_forward)
def policy_as_one_array(params, **constants):
    """logits, logp and values side by side, (B, R, V + 2): a pair has one output."""
    out, cache = policy.policy_forward(params, **constants)
    columns = [a[..., None] for a in (out.logp, out.values) if a is not None]
    return get_xp(out.logits).concatenate([out.logits, *columns], axis=-1), cache


@functools.wraps(policy.policy_backward)
def policy_from_one_array(dout, cache):
    V = cache.logits.w.shape[0]
    dvalues = None if cache.values is None else dout[..., V + 1]
    return policy.policy_backward(dout[..., :V], dout[..., V], dvalues, cache)


@functools.wraps(ppo.ppo_loss_forward)
def ppo_loss_held(params, *, held, experience, config, settings):
    """ppo_loss, with `kl_loss_held` for its penalty, and one of HELD for its surrogate."""
    e, tau = experience, settings.temperature
    loss, cache = ppo.ppo_loss_forward(params, experience=e, config=config, settings=settings)
    out, _ = policy.policy_forward(params, batch=e.batch, config=config, temperature=tau)
    constants = {**e._asdict(), **settings.clipping, "held": held, "held_logp": held.logp}
    constants |= {"kl_mode": settings.kl_mode, "temperature": tau}
    if surrogate := HELD.get(settings.ratio):
        policy_loss, _ = surrogate(out.logp, **named_by(surrogate, constants))
        loss = loss + policy_loss - cache.parts["loss/policy_avg"]
    if KL_MODES[settings.kl_mode].in_loss:
        kl_loss, _ = kl_loss_held(out.logits, out.logp, **named_by(kl_loss_held, constants))
        loss = loss + e.kl_loss_coef * (kl_loss - cache.parts["loss/kl_avg"])
    return loss, cache


def drawn_ppo_case(draw: Draw, config: GPTConfig, batch: Batch, settings: PPOConfig) -> Case:
    """A policy, and an experience that keeps away from the kinks of the loss at that policy."""
    params, tau = drawn_model(draw, config, "value_head"), settings.temperature
    out, _ = policy.policy_forward(params, batch=batch, config=config, temperature=tau)
    shape, log_ratio = out.logp.shape, drawn_log_ratio(draw, *out.logp.shape)
    if settings.ratio == "sequence":
        log_ratio = of_sequences(draw, log_ratio, batch.response_mask)
    experience = ppo.Experience(
        batch=batch,
        old_logp=out.logp - log_ratio,
        ref_logp=out.logp - 0.5 * draw.normal(*shape),
        ref_logits=out.logits + draw.normal(*out.logits.shape),
        **drawn_value_targets(draw, out.values, settings.value_clip_eps),
        advantages=draw.normal(*shape),
        weights=objectives.token_weights(batch.response_mask, mode=settings.aggregation),
        kl_loss_coef=np.array(0.21),
    )
    constants = {"experience": experience, "config": config, "settings": settings}
    return [params], {**constants, "held": out}


def make_ppo_loss(draw: Draw) -> Case:
    choices = {"ratio": tuple(objectives.SURROGATES), "kl_mode": tuple(KL_MODES)}
    choices |= {"clip": objectives.CLIPS, "aggregation": objectives.AGGREGATIONS}
    choices |= {"value_clip_eps": (0.2, 0.0), "ent_coef": (0.2, 0.0), "dual_clip": (0.0, 3.0)}
    drawn = {name: draw.pick(options) for name, options in choices.items()}
    if drawn["ratio"] not in ("token", "sequence"):
        drawn["dual_clip"] = 0.0
    settings = replace(FULL, **drawn)
    config = drawn_config(draw, *KINDS)
    return drawn_ppo_case(draw, config, drawn_batch(draw, config), settings)


# -- the table -----------------------------------------------------------------------------------
def named_by(forward: Callable[..., Any], constants: dict[str, Any]) -> dict[str, Any]:
    """Those of the constants that a forward names; an adapter, that it or what it adapts names."""
    signatures = (inspect.signature(forward, follow_wrapped=follow) for follow in (True, False))
    names = {name for signature in signatures for name in signature.parameters}
    return {name: value for name, value in constants.items() if name in names}


def row(forward, make, *args, mode="", backward=None, **settings) -> Row:
    """A pair, on what `make(draw, *args)` draws, with these settings; a list: one of them."""
    name = forward.__name__.replace("_forward", "_backward")
    backward = backward or getattr(sys.modules[forward.__module__], name)

    def case(draw: Draw) -> Case:
        arrays, constants = make(draw, *args)
        for name, value in settings.items():
            constants[name] = draw.pick(value) if isinstance(value, list) else value
        return arrays, named_by(forward, constants)

    return Row(forward, backward, case, mode)


make_scores = functools.partial(make_arrays, scales=WIDE)
make_any_model = functools.partial(make_model, kinds=tuple(KINDS))
make_far_tokens = functools.partial(make_of_tokens, far=True)
CUT = {"estimator": "k3", "ratio": ["none", "differentiated"]}
BRADLEY_TERRY = {"margin": [0.0, 0.5], "label_smoothing": [0.0, 0.1]}
DPO = {"kl_coef": [0.1, 2.0], "label_smoothing": [0.0, 0.1]}
CLIPS = list(objectives.CLIPS)
TABLE = [
    row(layers.linear_forward, make_arrays, ".I,IO,O"),
    row(layers.layernorm_forward, make_layernorm, 1.0, 0.0),
    row(layers.layernorm_forward, make_layernorm, 30.0, 5.0, mode="scale 30, offset 5"),
    row(layers.layernorm_forward, make_layernorm, 0.1, 5.0, mode="scale 0.1, offset 5"),
    row(layers.rmsnorm_forward, make_arrays, ".K,K"),
    row(layers.gelu_forward, make_arrays, ".C"),
    row(layers.swiglu_forward, make_arrays, ".C,.C"),
    row(layers.embedding_forward, make_embedding),
    row(layers.take_columns_forward, make_take_columns),
    row(attention.attention_forward, make_attention, "left", 1.0, mode="left padding"),
    row(attention.attention_forward, make_attention, "right", 1.0, mode="right padding"),
    row(attention.attention_forward, make_attention, "right", 8.0, mode="scores beyond exp"),
    row(attention.attention_forward, make_attention, "left", 1.0, 3, mode="groups of three"),
    row(attention.rotary_forward, make_rotary),
    row(heads.logits_forward, make_arrays, ".C,VC"),
    row(heads.scalar_head_forward, make_arrays, ".C,C1,1"),
    *[row(transformer.norm_forward, make_part, k, "ln1", mode=k, eps=1e-5) for k in BLOCKS],
    *[row(transformer.mlp_forward, make_part, k, "mlp", mode=k) for k in BLOCKS],
    *[row(transformer.block_forward, make_block, k, mode=k) for k in BLOCKS],
    row(transformer.transformer_forward, make_model),
    row(logprobs.token_logprobs_forward, make_of_logits),
    row(logprobs.entropy_forward, make_of_logits),
    row(kl.full_kl_forward, make_of_logits),
    *[
        row(forward, make_of_tokens, estimator=k, ratio=ratio, mode=f"{k}{mode}")
        for forward, ratio, mode in (
            (kl.token_kl_loss_forward, "none", ""),
            (kl.token_kl_loss_forward, "differentiated", ", ratio"),
            (kl.sequence_kl_loss_forward, "none", ""),
            (kl.sequence_kl_loss_forward, "differentiated", ", ratio"),
            (hold_ratio(kl.sequence_kl_loss_forward), "held", ", ratio held"),
        )
        for k in ("k1", "k2", "k3")
    ],
    row(kl.token_kl_loss_forward, make_far_tokens, mode="beyond the cut", **CUT),
    row(kl.sequence_kl_loss_forward, make_far_tokens, mode="beyond the cut", **CUT),
    row(objectives.weighted_sum_forward, make_of_tokens),
    row(imitation.cross_entropy_forward, make_of_tokens),
    row(preferences.bradley_terry_forward, make_scores, "B,B", **BRADLEY_TERRY),
    row(preferences.dpo_forward, make_scores, "B,B", loss="sigmoid", mode="sigmoid", **DPO),
    row(preferences.dpo_forward, make_scores, "B,B", loss="ipo", mode="ipo", **DPO),
    row(preferences.plackett_luce_forward, make_scores, "BK"),
    row(objectives.ppo_clip_forward, make_of_tokens, clip="ppo", mode="ppo"),
    row(objectives.ppo_clip_forward, make_of_tokens, clip_eps=(0.2, 0.4), mode="clip-higher"),
    row(objectives.ppo_clip_forward, make_of_tokens, dual_clip=3.0, mode="dual clip"),
    row(objectives.ppo_clip_forward, make_of_tokens, clip="book", mode="book"),
    row(objectives.ppo_clip_forward, make_of_tokens, clip="none", mode="none"),
    row(objectives.ppo_clip_forward, make_far_tokens, clip="none", mode="beyond the cut"),
    *[
        row(HELD.get(name, forward), make_of_tokens, False, name, mode=f"ratio {name}", clip=CLIPS)
        for name, (forward, _) in objectives.SURROGATES.items()
        if forward is not objectives.ppo_clip_forward
    ],
    row(objectives.value_loss_forward, make_value_loss, 0.0, mode="not clipped"),
    row(objectives.value_loss_forward, make_value_loss, 0.2, mode="clipped"),
    *[row(kl_loss_held, make_kl_loss, mode, mode=mode) for mode in KL_MODES],
    row(policy_as_one_array, make_any_model, "value_head", "", backward=policy_from_one_array),
    row(reward_model.reward_forward, make_model, "reward_head"),
    row(ppo_loss_held, make_ppo_loss),
]
