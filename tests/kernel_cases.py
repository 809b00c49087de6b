"""For each function that has a kernel: how to draw a case, and the two ways to answer it compared.

A case is (f, arrays, constants): f gets the arrays on the device, and what it returns, its cache
and what it has written to are compared with what NumPy's lines do.
"""

import contextlib
import functools

import numpy as np
from cpu_kernels import CpuModule
from fakegpu import fakegpu, numpy_as_on_a_gpu
from tiny import map_arrays
from tolerances import KERNEL, assert_close

from minirlhf.backend import get_xp, to_host
from minirlhf.nn import adam, attention, decoding, layers, sampling, transformer
from minirlhf.nn.transformer import GPTConfig, init_transformer, positions_of, rotation_of
from minirlhf.rlhf import logprobs, objectives
from minirlhf.train import optimizer

# no multiples of a warp or of a block, and those; more than a block has threads
WIDTHS = (1, 2, 3, 7, 31, 32, 33, 64, 100, 255, 256, 257, 300, 521)


def pair(forward, backward):
    """Output, cache and gradients of a pair, from its arguments and dout, the last of them."""

    def both(*arrays, **constants):
        *arguments, dout = arrays
        out, cache = forward(*arguments, **constants)
        return out, cache, backward(dout, cache)

    return both


def lead(draw):
    """Up to two axes before the last: none is a single row."""
    return tuple(draw.integer(1, 4) for _ in range(draw.integer(0, 2)))


def make_norm(draw, bias):
    C, scale = draw.pick(WIDTHS), draw.pick((0.1, 1.0, 1e4, 1e15))
    shape, n = (*lead(draw), C), 2 if bias else 1
    # far from each other, or a row of almost equal numbers loses its digits to any order of sums
    x = scale * (draw.normal(*shape) + draw.pick((0.0, 5.0)) + 4.0 * (np.arange(C) % 3))
    if draw.pick((True, False)):
        x[..., 0] = 0.0 if C > 1 else x[..., 0]
    arrays = x, *draw.normal(n, C), draw.normal(*shape)
    name = "layernorm" if bias else "rmsnorm"
    f = pair(getattr(layers, f"{name}_forward"), getattr(layers, f"{name}_backward"))
    return f, arrays, {"eps": draw.pick((1e-5, 1e-1))}


def make_sum_rows(draw):
    return layers.sum_rows, [draw.normal(draw.integer(1, 200), draw.integer(1, 40))], {}


def make_gelu(draw):
    x = draw.pick((0.1, 1.0, 30.0, 1e15)) * draw.normal(*lead(draw), draw.pick(WIDTHS))
    if draw.pick((True, False)):
        return layers.gelu_forward, [x], {"keep": False}
    return pair(layers.gelu_forward, layers.gelu_backward), [x, draw.normal(*x.shape)], {}


def make_swiglu(draw):
    shape = *lead(draw), draw.pick(WIDTHS)
    gate, up, dy = draw.pick((0.1, 1.0, 300.0)) * draw.normal(3, *shape)
    if draw.pick((True, False)):
        return layers.swiglu_forward, [gate, up], {"keep": False}
    return pair(layers.swiglu_forward, layers.swiglu_backward), [gate, up, dy], {}


def padding_mask(draw, B, T):
    """(B, T) with 1 to T ones a row, on either side."""
    lengths = np.array([draw.integer(1, T) for _ in range(B)])
    mask = (np.arange(T) < lengths[:, None]).astype(np.float64)
    return mask if draw.pick((True, False)) else mask[:, ::-1].copy()


def make_attention(draw):
    B, T, K, D, G = (draw.integer(1, n) for n in (2, 70, 2, 3, 2))
    allowed = attention.causal_mask(padding_mask(draw, B, T))
    x = draw.pick((0.1, 1.0, 4.0)) * draw.normal(B, T, (G + 2) * K * D)
    f, Q = pair(attention.attention_forward, attention.attention_backward), draw.integer(1, T)
    read = np.argsort(draw.rng.random((B, T)), axis=1)[:, :Q] if draw.pick((True, False)) else None
    constants = {"n_head": G * K, "n_kv_head": K, "allowed": allowed, "read": read}
    return f, [x, draw.normal(B, T if read is None else Q, G * K * D)], constants


def make_block(draw):
    """Of either kind; the biases and gains are not what training begins with."""
    B, T, K, G = (draw.integer(1, n) for n in (2, 35, 2, 2))
    H, D, block = G * K, draw.pick((6, 8)), draw.pick(("gpt2", "llama"))
    config = GPTConfig(9, 40, 1, H, H * D, block=block, n_kv_head=K if block == "llama" else H)
    params = init_transformer(config, rng=draw.rng, dtype=np.float64)
    p = map_arrays(lambda a: a + 0.3 * draw.normal(*a.shape), params["blocks"][0])
    mask, Q = padding_mask(draw, B, T), draw.integer(1, T)
    read = np.argsort(draw.rng.random((B, T)), axis=1)[:, :Q]  # no column twice
    constants = {
        "allowed": attention.causal_mask(mask),
        "rotation": rotation_of(params, positions_of(mask), config),
        "read": draw.pick((None, read)),
    }
    width = Q if constants["read"] is not None else T
    arrays = draw.normal(B, T, config.d_model), draw.normal(B, width, config.d_model)

    def f(x, dy, p, **constants):
        y, cache = transformer.block_forward(x, p, config=config, **constants)
        unkept, none = transformer.block_forward(x, p, config=config, keep=False, **constants)
        return y, unkept, none, cache, transformer.block_backward(dy, cache)

    return f, arrays, {"p": p, **constants}


def make_causal_mask(draw):
    B, T = draw.integer(1, 3), draw.integer(1, 70)
    return attention.causal_mask, [padding_mask(draw, B, T)], {}


def drawn_logits(draw, shape):
    """Some at -inf, some far above the others; never all of a row at -inf."""
    logits = draw.pick((0.1, 1.0, 30.0, 1e4)) * draw.normal(*shape) + draw.pick((0.0, -50.0))
    if draw.pick((True, False)):
        logits[draw.normal(*shape) > 0.5] = -np.inf
        logits[..., -1] = 0.0
    return logits


def make_token_logprobs(draw):
    shape = draw.integer(1, 3), draw.integer(1, 3), draw.pick(WIDTHS)
    targets = draw.rng.integers(shape[-1], size=shape[:-1])
    constants = {"temperature": draw.pick((1.0, 0.7, 2.0)), "in_place": draw.pick((True, False))}
    f = pair(logprobs.token_logprobs_forward, logprobs.token_logprobs_backward)
    arrays = drawn_logits(draw, shape), draw.normal(*shape[:-1])
    return f, arrays, {"targets": targets, **constants}


def make_entropy(draw):
    shape = *lead(draw), draw.pick(WIDTHS)
    f = pair(logprobs.entropy_forward, logprobs.entropy_backward)
    tau = {"temperature": draw.pick((1.0, 0.7, 2.0))}
    return f, [drawn_logits(draw, shape), np.array(draw.normal(*shape[:-1]))], tau


def make_log_softmax(draw):
    f = draw.pick((logprobs.log_softmax, sampling.sampling_logprobs))
    logits = drawn_logits(draw, (draw.integer(1, 4), draw.pick(WIDTHS)))
    return f, [logits], {"temperature": draw.pick((1.0, 0.7, 2.0))}


def make_draw_into(draw):
    """Some of N rows draw, some of which have ended."""
    N, V, R, C = draw.integer(1, 4), draw.pick((*WIDTHS, 1500, 4500)), draw.integer(1, 3), 5
    probs, u = draw.rng.random((N, V)), draw.rng.random((N, R))
    probs[draw.rng.random((N, V)) < draw.pick((0.0, 0.5, 0.99))] = 0.0
    probs[0, : draw.integer(0, V)] = 0.0
    probs[np.arange(N), likely := draw.rng.integers(V, size=N)] = 0.3
    u[0] = draw.pick((0.0, u[0, 0], np.nextafter(1.0, 0.0)))
    rows = np.sort(draw.rng.permutation(N)[: draw.integer(1, N)])
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs[rows])
    T = R + draw.integer(1, 3)
    arrays = log_probs, u, draw.normal(len(rows), C), (draw.normal(len(rows)) > 0) * 1.0
    out = [np.zeros((N, T), np.int64), np.zeros((N, T)), np.zeros((N, R, C))]
    constants, stop_id = {"step": draw.integer(0, R - 1)}, int(likely[-1])

    def f(log_probs, u, h, alive, *out, rows, step):  # coins are always in float64
        draws = sampling.Draws(u.astype(np.float64), sampling.Sampling(), stop_id, 1)
        given = {"h": h, "draws": draws, "step": step, "who": (rows, alive)}
        return sampling.draw_into(log_probs, sampling.Generation(*out), **given)

    return f, [*arrays, *out], {"rows": rows, **constants}


def make_decode_step(draw):
    """Of either kind, with prompts of several lengths; some sequences have ended."""
    B, P, K, G = (draw.integer(1, n) for n in (3, 40, 2, 2))
    H, D, block = G * K, draw.pick((6, 8, 34)), draw.pick(("gpt2", "llama"))
    n_kv_head = K if block == "llama" else H
    config = GPTConfig(9, 60, 2, H, H * D, block=block, n_kv_head=n_kv_head)
    params = init_transformer(config, rng=draw.rng, dtype=np.float64)
    params = map_arrays(lambda a: a + 0.3 * draw.normal(*a.shape), params)
    mask, max_new = padding_mask(draw, B, P), draw.integer(1, 5)
    mask[:, -1] = 1.0  # as a prompt ends
    tokens, new = draw.rng.integers(9, size=(B, P)), draw.rng.integers(9, size=(2, B))
    ends = (draw.normal(B) > 0) * 1.0

    def f(mask, ends, params, tokens, new):
        same = {"config": config}
        _, kv = decoding.prefill(params, tokens=tokens, mask=mask, max_new=max_new, **same)
        steps = (new[0], mask[:, -1], P), (new[1], ends, P + max_new - 1)
        found = [
            decoding.decode_step(params, kv, tokens=ids, mask=alive, column=column, **same)
            for ids, alive, column in steps
        ]
        return *found, *kv

    return f, [mask, ends], {"params": params, "tokens": tokens, "new": new}


def make_advance(draw):
    """Several tokens after prompts of several lengths, for more rows than a block takes."""
    B, P, K, G = (draw.integer(1, n) for n in (19, 5, 2, 2))
    R = draw.integer(2, 5)  # of the third on, a graph
    H, D, block, V = G * K, draw.pick((6, 8, 34)), draw.pick(("gpt2", "llama")), draw.pick(WIDTHS)
    sizes = {"block": block, "n_kv_head": K if block == "llama" else H, "tied": draw.pick((0, 1))}
    config = GPTConfig(V, P + R, 2, H, H * D, **sizes)
    params = init_transformer(config, rng=draw.rng, dtype=np.float64)
    params = map_arrays(lambda a: a + 0.3 * draw.normal(*a.shape), params)
    mask, tokens = padding_mask(draw, B, P), draw.rng.integers(V, size=(B, P))
    mask[:, -1] = 1.0  # as a prompt ends
    out = [np.zeros((B, P + R), np.int64), np.zeros((B, P + R)), np.zeros((B, R, H * D))]
    u, stop_id = draw.rng.random((B, R)), int(draw.rng.integers(V))

    def f(mask, *out, params, tokens, u):  # coins are always in float64
        draws = sampling.Draws(u.astype(np.float64), sampling.Sampling(0.7), stop_id, 0)
        h, kv = decoding.prefill(params, tokens=tokens, mask=mask, max_new=R, config=config)
        out, who = sampling.Generation(*out), (get_xp(mask).arange(B), mask[:, -1])
        log_probs = sampling.next_logprobs(params, h, draws.sampling)
        last = sampling.draw_into(log_probs, out, h=h, draws=draws, step=0, who=who)
        for step in range(1, R):
            more = {"draws": draws, "step": step, "config": config}
            last = sampling.advance(params, kv, out, last, **more)
        return *last[:-1], *kv

    return f, [mask, *out], {"params": params, "tokens": tokens, "u": u}


def make_ppo_clip(draw):
    """Log-ratios of all sizes, ties among them; padding holds the worst there is."""
    shape = draw.integer(1, 4), draw.pick(WIDTHS)
    old_logp, advantages, weights = draw.normal(3, *shape)
    logp = old_logp + draw.pick((0.0, 0.1, 1.0, 30.0)) * draw.normal(*shape)
    weights[weights < 0] = 0.0
    advantages[draw.normal(*shape) > 1] = 0.0
    logp[(weights == 0) & (draw.normal(*shape) > 0)] = np.nan
    constants = {
        "clip": draw.pick(objectives.CLIPS),
        "clip_eps": draw.pick((0.2, (0.1, 0.3), 0.0)),
        "dual_clip": draw.pick((None, 3.0)),
    }

    def f(logp, old_logp, advantages, weights, **constants):
        given = {"old_logp": old_logp, "advantages": advantages, "weights": weights}
        return objectives.ppo_clip_forward(logp, **given, **constants)

    return f, [logp, old_logp, advantages, weights / weights.size], constants


def make_value_loss(draw):
    shape = draw.integer(1, 4), draw.pick(WIDTHS)
    values, old_values, returns, weights = draw.normal(4, *shape)
    weights[weights < 0] = 0.0
    values[(weights == 0) & (draw.normal(*shape) > 0)] = np.nan

    def f(values, old_values, returns, weights, **constants):
        given = {"old_values": old_values, "returns": returns, "weights": weights}
        return objectives.value_loss_forward(values, **given, **constants)

    arrays = [values, old_values, returns, weights / weights.size]
    return f, arrays, {"clip_eps": draw.pick((0.2, 0.0, None))}


def make_clip(draw):
    n, scale = draw.pick((1, 255, 257, 66_000)), draw.pick((1e-3, 1.0, 1e10))
    bound, g = draw.pick((1.0, 1e6, float("inf"))), scale * draw.normal(n)
    g[draw.integer(0, n - 1)] *= draw.pick((1.0, 1.0, np.nan, np.inf))
    return functools.partial(adam.clip_global_norm, max_norm=bound), [g], {}


def make_move(draw):
    """Two updates, the second of which may be refused."""
    n, decay = draw.pick((1, 255, 256, 700)), draw.pick(([], [0.3]))
    theta, *gradients = draw.normal(3, n)
    decay = [x * draw.rng.integers(0, 2, n) for x in decay]
    rates = {"learning_rate": 0.1, "beta1": 0.9, "beta2": draw.pick((0.999, 0.5))}
    rates |= {"eps": draw.pick((1e-5, 0.1)), "form": draw.pick(("torch", "tf"))}
    numbers = np.array([[1.0, 2.0], [draw.pick((1.0, np.nan)), draw.pick((1.0, np.inf))]])

    def f(theta, *rest, numbers):
        (_, mean, var), gradients, decay = adam.init_adamw(theta), rest[:2], rest[2:]
        for step, g in enumerate(gradients):
            given = {"numbers": numbers[step].astype(np.float64), "step": step, "rates": rates}
            optimizer.move_if_finite(theta, g, mean, var, *decay, **given)
        return mean, var

    return f, [theta, *gradients, *decay], {"numbers": numbers}


CASES = {  # what is drawn, and the kernels that it launches
    "layernorm": (functools.partial(make_norm, bias=True), "norm_forward norm_backward"),
    "rmsnorm": (functools.partial(make_norm, bias=False), "norm_forward norm_backward"),
    "sum_rows": (make_sum_rows, "column_sums"),
    "gelu": (make_gelu, "gelu_forward"),
    "swiglu": (make_swiglu, "swiglu_forward swiglu_backward"),
    "attention": (make_attention, "split_heads masked_exp over_total softmax_backward join_heads"),
    "block": (make_block, "norm_forward add_bias gelu_forward"),
    "causal_mask": (make_causal_mask, "causal_mask"),
    "token_logprobs": (make_token_logprobs, "token_logprobs_forward token_logprobs_backward"),
    "entropy": (make_entropy, "entropy_forward entropy_backward"),
    "log_softmax": (make_log_softmax, "log_softmax"),
    "decode_step": (make_decode_step, "embed_token angles attend"),
    "advance": (make_advance, "few_rows few_rows_transposed"),
    "draw_into": (make_draw_into, "draw_into"),
    "ppo_clip": (make_ppo_clip, "ppo_clip_forward"),
    "value_loss": (make_value_loss, "value_loss_forward"),
    "clip_global_norm": (make_clip, "squares clip_norm"),
    "move": (make_move, "move_if_finite"),
}


def flat(value):
    """What a call returned, in a row: arrays and the types of the named tuples they are in."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        names = [type(value).__name__] if hasattr(value, "_fields") else []
        return names + [x for item in value for x in flat(item)]
    return [value]


def compare(case, dtype, *, move=fakegpu.array, tolerance=None):
    """AssertionError where the kernels on the fake GPU say something else than NumPy's lines.

    Args:     move: to the fake GPU, or to another.
    Returns:  the kernels that were launched, of a fake GPU.
    """
    f, arrays, constants = case

    def cast(a):
        return a.astype(dtype) if a.dtype == np.float64 else a.copy()

    arrays, constants = map_arrays(cast, (list(arrays), constants))
    there, constants_there = map_arrays(move, (arrays, constants))
    with numpy_as_on_a_gpu(), np.errstate(all="ignore"):
        expected = flat([f(*arrays, **constants), arrays])
    before = len(CpuModule.launched)
    # without kernels some lines wait
    no_sync = fakegpu.no_sync() if move == fakegpu.array else contextlib.nullcontext()
    with no_sync, np.errstate(all="ignore"):
        result = f(*there, **constants_there)
    got = flat([result, there])
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if not hasattr(b, "dtype"):
            assert a == b
            continue
        assert type(a) is type(there[0]) and a.dtype == b.dtype
        assert_close(to_host(a), b, 0.0 if b.dtype == np.int64 else tolerance or KERNEL[dtype])
    return CpuModule.launched[before:]
