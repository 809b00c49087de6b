"""Integers, booleans and float16: the numbers of float64, or a refusal; never a wrong number.

The same small whole numbers go through every public function once in float64 and once in another
dtype. Differences that leave an int8, a scale cut to an integer and a sum that float16 cannot hold
would all show.
"""

import functools
import inspect

import numpy as np
import pytest
from tolerances import FLOAT32_FORWARD, assert_close

from minirlhf.backend import as_float
from minirlhf.nn.adam import adamw_step, clip_global_norm, init_adamw
from minirlhf.nn.layers import gelu_forward
from minirlhf.nn.sampling import draw_tokens, sampling_logprobs
from minirlhf.rlhf import advantages, imitation, kl, logprobs, objectives, preferences
from minirlhf.rlhf.kl import KL_MODES

B, T, V = 3, 60, 4  # 180 tokens: more than an int8 can count
MASK = np.arange(T) < np.array([[60], [60], [58]])
TARGETS = np.random.default_rng(1).integers(V, size=(B, T))
DTYPES = (np.bool_, np.int8, np.uint8, np.int16, np.int32, np.int64, np.float16)


def pair(module, name, *, dout=None):
    """A function of the forward's arguments: its output, and the gradients for `dout`."""
    forward, backward = (getattr(module, f"{name}_{way}") for way in ("forward", "backward"))

    def both(*arrays, **constants):
        out, cache = forward(*arrays, **constants)
        gradients = backward(np.ones_like(out) if dout is None else dout, cache)
        return [out, *(gradients if isinstance(gradients, tuple) else (gradients,))]

    return both


def kl_loss(a, kl_mode):
    return pair(objectives, "kl_loss")(
        a.z, a.x, kl_mode=kl_mode, old_logp=a.y, ref_logp=a.w, ref_logits=a.z_ref, weights=a.mask
    )


def kl_losses(a, name, ratios):
    return [
        pair(kl, name)(a.x, old_logp=a.y, ref_logp=a.w, weights=a.mask, estimator=k, ratio=ratio)
        for k in ("k1", "k2", "k3")
        for ratio in ratios
    ]


def surrogate(forward, backward, a):
    out = [
        forward(a.x, old_logp=a.y, advantages=a.w, weights=a.mask, clip=clip)
        for clip in objectives.CLIPS
    ]
    return [x for loss, cache in out for x in (loss, backward(1.0, cache))]


ESTIMATORS = ("k1", "k2", "k3")
CALLS = {  # a has whole numbers: x, y, w (B, T), z, z_ref (B, T, V), and mask (B, T)
    "log_softmax": lambda a: logprobs.log_softmax(a.z),
    "token_logprobs": lambda a: pair(logprobs, "token_logprobs")(a.z, targets=TARGETS),
    "response_sum": lambda a: logprobs.response_sum(a.x, mask=a.mask),
    "entropy": lambda a: pair(logprobs, "entropy")(a.z),
    "summed_penalty": lambda a: kl.summed_penalty(a.x, a.y, mask=a.mask),
    "kl_estimate": lambda a: [kl.kl_estimate(a.x, k) for k in ESTIMATORS],
    "penalty_in_reward": lambda a: [
        kl.penalty_in_reward(mode, log_ratio=a.x, kl_full=a.y) for mode in KL_MODES
    ],
    "token_kl_loss": lambda a: kl_losses(a, "token_kl_loss", ("none", "differentiated")),
    "sequence_kl_loss": lambda a: kl_losses(a, "sequence_kl_loss", ("none", "held")),
    "full_kl": lambda a: pair(kl, "full_kl")(a.z, ref_logits=a.z_ref),
    "future_kl": lambda a: kl.future_kl(a.x, mask=a.mask),
    "clamp_log_ratio": lambda a: kl.clamp_log_ratio(a.x)[0],
    "expm1_minus": lambda a: kl.expm1_minus(kl.clamp_log_ratio(a.x)[0]),
    "token_rewards": lambda a: advantages.token_rewards(a.x[:, 0], a.y, mask=a.mask, kl_coef=0.3),
    "gae": lambda a: list(advantages.gae(a.x, a.y, mask=a.mask, gamma=0.9)),
    "advantages_without_critic": lambda a: [
        advantages.advantages_without_critic(a.x, mask=a.mask, form=form, samples_per_prompt=B)
        for form in advantages.ADVANTAGES[1:]
    ],
    "importance_weights": lambda a: [
        advantages.importance_weights(a.x, a.y, mask=a.mask, form=form)
        for form in advantages.IMPORTANCE[1:]
    ],
    "masked_mean": lambda a: advantages.masked_mean(a.x, mask=a.mask),
    "masked_var": lambda a: advantages.masked_var(a.x, mask=a.mask),
    "masked_whiten": lambda a: [
        *advantages.masked_whiten(a.x, mask=a.mask),
        *advantages.masked_whiten(a.x, mask=a.mask, shift_mean=False),
    ],
    "token_weights": lambda a: [
        objectives.token_weights(a.mask, mode=mode) for mode in objectives.AGGREGATIONS
    ],
    "weighted_sum": lambda a: pair(objectives, "weighted_sum")(a.x, weights=a.mask),
    "cross_entropy": lambda a: pair(imitation, "cross_entropy")(a.x, weights=a.mask),
    "ppo_clip": lambda a: [
        pair(objectives, "ppo_clip")(
            a.x, old_logp=a.y, advantages=a.w, weights=a.mask, clip=clip, dual_clip=2.5
        )
        for clip in ("ppo", "book", "none")
    ],
    **{
        forward.__name__.removesuffix("_forward"): functools.partial(surrogate, forward, backward)
        for forward, backward in list(objectives.SURROGATES.values())[1:]
    },
    "value_loss": lambda a: [
        pair(objectives, "value_loss")(
            a.x, old_values=a.y, returns=a.w, weights=a.mask, clip_eps=eps
        )
        for eps in (None, 0.2)
    ],
    "kl_loss": lambda a: [kl_loss(a, mode) for mode in KL_MODES],
    "log_sigmoid": lambda a: preferences.log_sigmoid(a.x),
    "sigmoid": lambda a: preferences.sigmoid(a.x),
    "bradley_terry": lambda a: pair(preferences, "bradley_terry")(
        a.x[:, 0], a.y[:, 0], margin=0.5, label_smoothing=0.1
    ),
    "dpo": lambda a: pair(preferences, "dpo")(a.x[:, 0], a.x[:, 1], kl_coef=0.1),
    "ipo": lambda a: pair(preferences, "dpo")(a.x[:, 0], a.x[:, 1], kl_coef=0.1, loss="ipo"),
    "plackett_luce": lambda a: pair(preferences, "plackett_luce")(a.x[:, :5]),
    # of nn/ what takes anything but activations
    "by_columns": lambda a: logprobs.by_columns(lambda z: logprobs.entropy_forward(z)[0], a.z),
    "gelu": lambda a: [gelu_forward(a.x)[0], gelu_forward(a.x, keep=False)[0]],
    "sampling_logprobs": lambda a: [
        np.exp(sampling_logprobs(a.z, temperature=temperature, top_k=3, top_p=0.9))
        for temperature in (0.0, 7.0)
    ],
    "draw_tokens": lambda a: draw_tokens(a.mask, np.full((B, 1), 0.999)),
    "clip_global_norm": lambda a: list(clip_global_norm(a.x.reshape(-1).copy(), 0.5)),
}
OTHERS = {"adaptive_kl_coef", "named"}  # take no arrays


class Numbers:
    """The same whole numbers in every dtype; those of int8 and uint8 leave it when subtracted."""

    def __init__(self, dtype):
        rng = np.random.default_rng(0)
        low, high = {np.bool_: (0, 2), np.uint8: (0, 200)}.get(dtype, (-100, 101))
        self.x, self.y, self.w = rng.integers(low, high, size=(3, B, T))
        self.z, self.z_ref = rng.integers(max(low, -3), min(high, 4), size=(2, B, T, V))
        self.mask = MASK

    def to(self, dtype):
        for name, array in vars(self).items():
            setattr(self, name, array.astype(dtype))
        return self


def leaves(value):
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [np.asarray(value)]


def test_every_public_function_is_called_here():
    for module in (logprobs, kl, advantages, objectives, preferences):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            name = name.removesuffix("_forward").removesuffix("_backward")
            assert not own or name in CALLS.keys() | OTHERS, f"{module.__name__}: {name}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_whole_numbers_of_any_dtype_are_the_numbers_of_float64(call, dtype):
    expected = leaves(call(Numbers(dtype).to(np.float64)))
    for got, wanted in zip(leaves(call(Numbers(dtype).to(dtype))), expected, strict=True):
        assert_close(got, wanted, FLOAT32_FORWARD)
        assert got.dtype in (np.float32, np.float64) or got.dtype == wanted.dtype == np.int64


@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("draw_tokens", "clip_global_norm")])
def test_float32_stays_float32_whatever_the_mask_is(name):
    numbers = Numbers(np.int8).to(np.float32)
    for got in leaves(CALLS[name](numbers)):
        assert got.dtype == np.float32
    if name.startswith(("masked", "gae", "token_rewards", "response_sum", "token_weights")):
        numbers.mask = MASK  # booleans
        for got in leaves(CALLS[name](numbers)):
            assert got.dtype == np.float32


def test_what_holds_no_numbers_is_refused():
    words = np.array([["a", "b"]])
    for call in (as_float, kl.expm1_minus, objectives.token_weights):
        with pytest.raises(TypeError, match="expected an array of numbers; got one of dtype <U1"):
            call(words)


def test_floats_pass_as_they_are():
    for dtype in (np.float32, np.float64, np.complex64, np.complex128):
        x = np.ones(3, dtype=dtype)
        assert as_float(x) is x
    widened = {np.bool_: 4, np.int8: 4, np.uint16: 4, np.float16: 4, np.int32: 8, np.uint64: 8}
    for dtype, size in widened.items():
        assert as_float(np.ones(3, dtype=dtype)).dtype == np.dtype(f"f{size}")


def test_parameters_that_are_no_floats_are_refused():
    """The optimiser works in place and cannot widen them."""
    for dtype in (np.int64, np.int8, np.bool_):
        flat = np.ones(3, dtype=dtype)
        with pytest.raises(TypeError):
            adamw_step(flat, np.ones(3), init_adamw(flat), learning_rate=0.1)
    flat = np.zeros(2)
    adamw_step(flat, np.array([100, -100], dtype=np.int8), init_adamw(flat), learning_rate=0.1)
    assert_close(flat, [-0.1, 0.1], 1e-6)  # 100^2 leaves an int8
