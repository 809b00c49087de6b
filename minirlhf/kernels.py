"""What the functions marked `backend.fused` do on a GPU: launches of the kernels in kernels.cu.

A launch has its function's name, takes the module that the function stands in, `its`, and the
function's arguments, and returns what the function returns. Or it raises NotImplementedError, and
the plain lines run. MINIRLHF_KERNELS=0 in the environment turns all launches off.

`advance` records its kernels as one CUDA graph, which a launch of a few microseconds then repeats.
"""

import functools
import math
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np

from minirlhf.backend import get_xp
from minirlhf.tree import tree_leaves

SIGNATURE = re.compile(r"^KERNEL (\w+)\(([^)]*)\)", re.MULTILINE)  # in kernels.cu
FEW = 1 << 25  # multiplications of the largest product in a graph: for larger ones, cuBLAS

_of_graph: list | None = None  # arrays of the kernels that are being made for a graph


def launch(plain, array, *arguments, **constants):
    """plain(..) of arrays like `array` by the launch of its name; else by its own lines."""
    if os.environ.get("MINIRLHF_KERNELS") == "0" or not compiled(get_xp(array), array.dtype):
        return plain(*arguments, **constants)
    try:
        its = sys.modules[plain.__module__]
        return globals()[plain.__name__](its, *arguments, **constants)
    except NotImplementedError:
        return plain(*arguments, **constants)


@functools.cache
def compiled(xp, dtype):
    """{kernel: (what launches it, types of its arguments)}, where `real` is dtype; or nothing."""
    if dtype.char not in "fd" or not hasattr(xp, "RawModule"):
        return {}
    source = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
    real = {"f": "float", "d": "double"}[dtype.char]
    try:
        module = xp.RawModule(code=source, options=(f"-Dreal={real}",))
        module.compile()
    except Exception as error:  # of many kinds: no compiler, another driver, an unknown GPU
        warnings.warn(f"minirlhf: plain operations replace kernels.cu: {error}", stacklevel=2)
        return {}
    types = {"real*": dtype, "double*": np.float64, "long long*": np.int64}
    types |= {"bool*": np.bool_, "double": np.float64, "long long": np.int64, "int": np.int32}
    kernels = {}
    for name, arguments in SIGNATURE.findall(source):
        words = (argument.replace("const ", "").split() for argument in arguments.split(","))
        kernels[name] = module.get_function(name), [types[" ".join(w[:-1])] for w in words]
    return kernels


def need(*all_of_these):
    if not all(all_of_these):
        raise NotImplementedError


def run(name, like, given, outputs, *numbers, grid="row"):
    """Launch a kernel, whose arguments are arrays, given and written to, a size, and numbers.

    Args:     like: its last axis, or its size, is the size; its dtype is `real`.
              given, outputs: an array, None where the kernel takes it that there is none, or of
                  the outputs the shape of a new one.
              grid: a block for a "row" of `like`, of more threads for a "long row", for 8
                  "column"s, "8 rows of 8" or "8 rows of 32" of them; a thread for an "entry"; 256
                  blocks for all "together", or "one".
    Returns:  the outputs.
    """
    need(like.size, like.ndim)
    xp, C, n = get_xp(like), like.shape[-1], like.size
    kernel, types = compiled(xp, like.dtype)[name]
    outputs = [xp.empty(x, dtype=like.dtype) if isinstance(x, tuple) else x for x in outputs]
    arrays = [*given, *outputs]
    for x, dtype in zip(arrays, types, strict=False):
        need(x is None or (type(x) is type(like) and x.dtype == dtype))
    need(*(x is None or x.flags.c_contiguous for x in outputs))
    arrays = [np.uintp(0) if x is None else xp.ascontiguousarray(x) for x in arrays]
    blocks, threads, size = {
        "row": (n // C, min(256, -(-C // 32) * 32), C),
        "column": (-(-C // 8), 512, C),
        "long row": (n // C, 256 if C <= 4096 else 1024, C),
        "8 rows of 8": (-(-C // 8) * -(-n // C // 8), 512, C),
        "8 rows of 32": (-(-C // 32) * -(-n // C // 8), 256, C),
        "entry": (-(-n // 256), 256, n),
        "together": (256, 256, n),
        "one": (1, 256, n),
    }[grid]
    numbers = [of(x) for of, x in zip(types[len(arrays) :], (size, *numbers), strict=True)]
    kernel((blocks,), (threads,), (*arrays, *numbers))
    if _of_graph is not None:
        _of_graph.append(arrays)
    return outputs


def few_rows(x, w, transposed=False):
    """x w, or x w^T, of few rows: CuPy lets no product of cuBLAS into a graph."""
    O, I = w.shape if transposed else w.shape[::-1]
    need(x.shape[1:] == (I,))
    y = get_xp(x, w).empty((len(x), O), dtype=x.dtype)
    name, grid = (
        ("few_rows_transposed", "8 rows of 32") if transposed else ("few_rows", "8 rows of 8")
    )
    return run(name, y, (x, w), [y], len(x), I, grid=grid)[0]


def as_a_graph(xp, f):
    """f(), which launches kernels alone, done once; returns what does all of it again, on the
    same memory, where it finds what f goes by; and that memory, to be kept."""
    global _of_graph
    _of_graph, stream = [], capturing_stream(xp, xp.cuda.runtime.getDevice())
    try:
        f()  # what is not loaded yet cannot be captured
        _of_graph.clear()
        try:
            with stream:
                stream.begin_capture()
                try:
                    f()
                finally:
                    graph = stream.end_capture()
        except (xp.cuda.runtime.CUDARuntimeError, xp.cuda.driver.CUDADriverError) as error:
            warnings.warn(f"minirlhf: kernels are launched one by one: {error}", stacklevel=2)
            return f, []
        return graph.launch, _of_graph
    finally:
        _of_graph = None


@functools.cache  # one for all graphs of a GPU: CuPy keeps the memory of each stream for itself
def capturing_stream(xp, device):
    return xp.cuda.Stream(non_blocking=True)


# -- layers ----------------------------------------------------------------------------------------
def sum_rows(its, x):
    C = x.shape[-1:]
    return run("column_sums", x, (x, None), [C, None], x.size // C[0], grid="column")[0]


def norm(layers, x, x_bias, residual, gain, bias, eps):
    """x + x_bias + residual (None: there is none) in the memory of x, its norm, and the cache."""
    vectors = [a for a in (x_bias, gain, bias) if a is not None]
    need(*(a.shape == x.shape[-1:] for a in vectors), 2.0**-126 <= eps <= 2.0**126)
    need(residual is None or residual.shape == x.shape)
    total = None if residual is None else x
    outputs = total, x.shape, x.shape, x.shape[:-1]
    _, y, xhat, rstd = run("norm_forward", x, (x, x_bias, residual, gain, bias), outputs, eps)
    kind = layers.RMSNormCache if bias is None else layers.LayerNormCache
    return total, y, kind(xhat, gain, rstd[..., None])


def layernorm_forward(its, x, gain, bias, *, eps=1e-5):
    return norm(its, x, None, None, gain, bias, eps)[1:]


def rmsnorm_forward(its, x, gain, *, eps=1e-5):
    return norm(its, x, None, None, gain, None, eps)[1:]


def layernorm_backward(its, dy, cache):
    return norm_backward(dy, cache, True)


def rmsnorm_backward(its, dy, cache):
    return norm_backward(dy, cache, False)[:2]


def norm_backward(dy, cache, centred):
    need(dy.shape == cache[0].shape)
    (dx,) = run("norm_backward", dy, (dy, *cache), [dy.shape], centred)
    C = dy.shape[-1:]
    dbias, dgain = run("column_sums", dy, (dy, cache[0]), [C, C], dy.size // C[0], grid="column")
    return dx, dgain, dbias


def gelu_forward(its, x, *, keep=True, bias=None):
    """Of x + bias."""
    need(bias is None or bias.shape == x.shape[-1:])
    outputs = x.shape, x.shape if keep else None
    y, slope = run("gelu_forward", x, (x, bias), outputs, x.shape[-1], grid="entry")
    return y, its.GeluCache(slope) if keep else None


def swiglu_forward(its, gate, up, *, keep=True):
    need(gate.shape == up.shape)
    outputs = up.shape, *([up.shape] * 2 if keep else [None] * 2)
    y, *kept = run("swiglu_forward", up, (gate, up), outputs, grid="entry")
    return y, its.SwiGLUCache(up, *kept) if keep else None


def swiglu_backward(its, dy, cache):
    need(dy.shape == cache.up.shape)
    return tuple(run("swiglu_backward", dy, (dy, *cache), [dy.shape] * 2, grid="entry"))


# -- attention -------------------------------------------------------------------------------------
def causal_mask(its, mask):
    need(mask.ndim == 2)
    allowed = get_xp(mask).empty((len(mask), 1, *mask.shape[1:] * 2), dtype=mask.dtype)
    return run("causal_mask", allowed, [mask], [allowed])[0]


def split_heads(qkv, bias, columns, H, K):
    """qkv with its bias, the scaled queries, and those, keys and values head by head."""
    (B, T, W), Q = qkv.shape, qkv.shape[1] if columns is None else columns.shape[1]
    D, G = W // (H + 2 * K), H // K
    need(W == (H + 2 * K) * D, H == G * K, columns is None or columns.shape == (B, Q))
    shapes = [(B, Q, H * D), (B, K, G * Q, D), (B, K, T, D), (B, K, T, D)]
    outputs = None if bias is None else qkv.shape, *shapes
    sizes = T, Q, D, K, 1.0 / math.sqrt(D)
    biased, *heads = run("split_heads", qkv, (qkv, bias, columns), outputs, *sizes)
    return qkv if bias is None else biased, *heads


def attention_forward(its, qkv, *, n_head, n_kv_head=0, allowed, read=None, bias=None):
    """Of qkv + bias."""
    need(qkv.ndim == 3, allowed.shape == (len(qkv), 1, *qkv.shape[1:2] * 2))
    K = n_kv_head or n_head
    qkv, q, q_heads, k, v = split_heads(qkv, bias, read, n_head, K)
    E, Q, D = q_heads @ k.swapaxes(-1, -2), q.shape[1], k.shape[-1]  # (B, K, G Q, T)
    sizes = Q, K * E.shape[2]
    _, total = run("masked_exp", E, (allowed, read), (E, E.shape[:-1]), *sizes)
    (out,) = run("over_total", q, (E @ v, total), [q.shape], Q, D, False)
    taken = None if read is None else its.TakeColumnsCache(qkv.shape[1], read)
    return out, its.AttentionCache(qkv, q, E, total[..., None], out, n_head, taken)


def attention_backward(its, dout, cache):
    qkv, q, E, total, out, H, taken = cache
    need(dout.shape == out.shape)
    (_, K, _, T), columns = E.shape, None if taken is None else taken.columns
    _, _, q_heads, k, v = split_heads(qkv, None, columns, H, K)
    Q, D = q.shape[1], k.shape[-1]
    (do,) = run("over_total", dout, (dout, total), [q_heads.shape], Q, D, True)
    dv, dscore = E.swapaxes(-1, -2) @ do, do @ v.swapaxes(-1, -2)
    run("softmax_backward", dscore, (E, total), [dscore])
    dq, dk = dscore @ k, dscore.swapaxes(-1, -2) @ q_heads
    sizes = T, Q, D, K, 1.0 / math.sqrt(D)
    return run("join_heads", qkv, (dq, dk, dv, columns), [qkv.shape], *sizes)[0]


# -- transformer -----------------------------------------------------------------------------------
def linear(its, x, w, b=None):
    """x w, the bias that is still to be added, and the cache of `linear_forward`."""
    need(w.ndim == 2, x.shape[-1] == w.shape[0], b is None or b.shape == w.shape[1:])
    if _of_graph is not None:  # no backward follows a token
        return few_rows(x, w), b, None
    y = (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[1])
    return y, b, its.layers.LinearCache(x, w, b is not None)


def mlp_forward(its, x, p, *, keep):
    """y, the bias that is still to be added, cache."""
    u, b, up = linear(its, x, **p["up"])
    gate = None
    if "gate" in p:
        need(b is None)
        g, b, gate = linear(its, x, **p["gate"])
        need(b is None)
        h, activation = its.layers.swiglu_forward(g, u, keep=keep)
    else:
        h, activation = gelu_forward(its.layers, u, keep=keep, bias=b)
    y, b, down = linear(its, h, **p["down"])
    return y, b, its.MLPCache(up, gate, activation, down)


def block_forward(its, x, p, *, config, allowed, rotation=None, read=None, keep=True):
    """Biases and residuals are added by the kernels that read them."""
    attn, eps = p["attn"], config.ln_eps
    read = None if read is None else get_xp(read).ascontiguousarray(read)  # once for all kernels
    n, ln1 = its.norm_forward(x, p["ln1"], eps=eps)
    qkv, b, qkv_cache = linear(its, n, **attn["qkv"])
    rotary = None
    if rotation is not None:
        need(b is None)
        qkv, rotary = its.rotary_forward(qkv, **rotation)
    stands_in = sys.modules[its.AttentionCache.__module__]
    same = {"allowed": allowed, "read": read, "bias": b}
    a, attention = attention_forward(stands_in, qkv, **config.heads, **same)
    a, b, out = linear(its, a, **attn["out"])
    x, taken = (x, None) if read is None else its.layers.take_columns_forward(x, columns=read)
    a, n, ln2 = norm(its.layers, a, b, x, p["ln2"]["gain"], p["ln2"].get("bias"), eps)

    y, b, mlp = mlp_forward(its, n, p["mlp"], keep=keep)
    run("add_bias", y, (b, a), [y], y.shape[-1], grid="entry")
    cache = its.BlockCache(ln1, qkv_cache, rotary, attention, taken, out, ln2, mlp)
    return y, cache if keep else None


# -- one more token --------------------------------------------------------------------------------
def decode_step(its, params, kv, *, tokens, mask, column, config, steps=None):
    """Four products a layer, and what stands between them; at column + steps (B,), if there are."""
    (H, K), blocks, S = config.heads.values(), params["blocks"], kv.mask.shape[1]
    xp, wte, wpe = get_xp(mask), params["wte"], params.get("wpe")
    D, cos, sin = config.d_model // config.n_head, None, None
    need(D <= 256, 0 <= column < S, kv.mask.dtype == wte.dtype)
    x = xp.empty((len(tokens), wte.shape[1]), dtype=wte.dtype)
    outputs = x, xp.empty(len(tokens), dtype=np.int64), kv.mask
    sizes = len(wte), 0 if wpe is None else len(wpe), S, column
    _, position, _ = run("embed_token", x, (wte, wpe, tokens, mask, steps), outputs, *sizes)
    if wpe is None:
        angle = xp.empty((len(tokens), D // 2), dtype=x.dtype)
        cos, sin = run("angles", angle, [position], (angle, angle.shape), config.rope_theta)
    norms = [p[name] for p in blocks for name in ("ln1", "ln2")] + [params["ln_f"]]

    def next_norm(x, bias, residual):
        p = norms.pop(0)
        return norm(its.layers, x, bias, residual, p["gain"], p.get("bias"), config.ln_eps)[:2]

    _, n = next_norm(x, None, None)
    for p, keys, values in zip(blocks, kv.keys, kv.values, strict=True):
        need(keys.shape == values.shape == (len(x), K, S, D))
        qkv, b, _ = linear(its.transformer, n, **p["attn"]["qkv"])
        score = xp.empty((len(x), H, S), dtype=x.dtype)
        given = qkv, b, cos, sin, kv.mask, steps
        outputs, sizes = (keys, values, score, x.shape), (column, H, K, D, 1.0 / math.sqrt(D))
        *_, a = run("attend", score, given, outputs, *sizes, grid="long row")
        a, b, _ = linear(its.transformer, a, **p["attn"]["out"])
        a, n = next_norm(a, b, x)
        y, b, _ = mlp_forward(its.transformer, n, p["mlp"], keep=False)
        x, n = next_norm(y, b, a)
    return n


def draw_into(its, log_probs, out, *, h, draws, step, who, onto=None):
    """Onto: ids, real, alive and steps, to be written to; None: new arrays, and no steps."""
    xp, b, (_, R, C), (u, _, *ends) = get_xp(h), len(log_probs), out.hidden.shape, draws
    need(h.shape == (b, C), u.shape[1] == R, out.tokens.shape == out.mask.shape)
    sizes = C, R, out.tokens.shape[1], step, *ends
    outputs = *out, *(onto or (xp.empty(b, dtype=np.int64), (b,), (b,), None))
    ids, real, alive, _ = run("draw_into", log_probs, (log_probs, h, u, *who), outputs, *sizes)[3:]
    return its.Last(who[0], ids, real, alive)


def advance(its, params, kv, out, last, *, draws, step, config):
    """A graph, made at the first of the steps that differ in nothing but their number."""
    if last.again is not None:
        last.again[0]()
        return last
    b, largest = len(last.ids), max(leaf.size for leaf in tree_leaves(params))
    temperature, top_k, top_p = draws.sampling
    need(temperature >= its.COLDEST, top_k == 0, top_p == 1, b <= 8 or b * largest <= FEW)
    xp, stands_in = get_xp(draws.u), sys.modules[its.KVCache.__module__]
    column = out.tokens.shape[1] - draws.u.shape[1] - 1
    ids, real, alive = (a.copy() for a in last[1:4])
    steps = xp.full(b, step)

    def one_more():
        same = {"tokens": ids, "mask": real, "column": column, "steps": steps}
        h = decode_step(stands_in, params, kv, **same, config=config)
        logits = few_rows(h, its.output_matrix(params), transposed=True)
        log_probs = log_softmax(its, logits, temperature=temperature)
        same = {"h": h, "draws": draws, "step": 0, "who": (last.rows, alive)}
        draw_into(its, log_probs, out, **same, onto=(ids, real, alive, steps))

    return its.Last(last.rows, ids, real, alive, as_a_graph(xp, one_more))


# -- log-probs -------------------------------------------------------------------------------------
def positive(temperature):
    """A float, as `check_positive` has it."""
    need(2.0**-126 <= temperature <= 2.0**126)
    return float(temperature)


def token_logprobs_forward(its, logits, *, targets, temperature=1.0, in_place=False):
    need(logits.shape[:-1] == targets.shape)
    outputs = logits if in_place else logits.shape, targets.shape, targets.shape
    tau = positive(temperature)
    exp_z, total, logp = run("token_logprobs_forward", logits, (logits, targets), outputs, tau)
    return logp, its.TokenLogprobsCache(exp_z, total, targets, temperature)


def token_logprobs_backward(its, dlogp, cache):
    need(dlogp.shape == cache.total.shape)
    given, tau = (dlogp, *cache[:3]), positive(cache.temperature)
    return run("token_logprobs_backward", cache.exp_z, given, [cache.exp_z.shape], tau)[0]


def log_softmax(its, logits, *, temperature=1.0):
    given, outputs, tau = [logits], [logits.shape], positive(temperature)
    return run("log_softmax", logits, given, outputs, tau, grid="long row")[0]


def sampling_logprobs(its, logits, *, temperature=1.0, top_k=0, top_p=1.0):
    need(top_p == 1, top_k == 0 or top_k >= logits.shape[-1])
    return log_softmax(its, logits, temperature=temperature)


def entropy_forward(its, logits, *, temperature=1.0):
    outputs, tau = (logits.shape, logits.shape, logits.shape[:-1]), positive(temperature)
    probs, log_probs, entropy = run("entropy_forward", logits, [logits], outputs, tau)
    return entropy, its.EntropyCache(probs, log_probs, entropy, temperature)


def entropy_backward(its, dentropy, cache):
    need(dentropy.shape == cache.entropy.shape)
    given, tau = (dentropy, *cache[:3]), positive(cache.temperature)
    return run("entropy_backward", cache.probs, given, [cache.probs.shape], tau)[0]


# -- the losses, the optimiser ---------------------------------------------------------------------
def ppo_clip_forward(
    its, logp, *, old_logp, advantages, weights, clip_eps=0.2, clip="ppo", dual_clip=None
):
    need(logp.shape == old_logp.shape == advantages.shape == weights.shape)
    low, high = its._clip_range(clip_eps, clip, dual_clip)
    outputs = logp.shape, get_xp(logp).empty(logp.shape, dtype=bool), ()
    given = logp, old_logp, advantages, weights
    sizes = its.CLIPS.index(clip), 1 - low, 1 + high, dual_clip or 0.0, its.kl.LOG_RATIO_LIMIT
    slope, clipped, loss = run("ppo_clip_forward", logp, given, outputs, *sizes, grid="one")
    return loss, its.PPOClipCache(slope, clipped, weights)


def value_loss_forward(its, values, *, old_values, returns, weights, clip_eps=0.2):
    need(values.shape == old_values.shape == returns.shape == weights.shape)
    given, bound = (values, old_values, returns, weights), -1.0 if clip_eps is None else clip_eps
    slope, loss = run("value_loss_forward", values, given, [values.shape, ()], bound, grid="one")
    return loss, its.ValueLossCache(slope, weights)


def clip_global_norm(its, dflat, max_norm):
    xp = get_xp(dflat)
    sums, norm = xp.empty(256, dtype=np.float64), xp.empty((), dtype=np.float64)
    run("squares", dflat, [dflat], [sums], grid="together")
    run("clip_norm", dflat, [sums], [dflat, norm], max_norm, grid="together")
    return dflat, norm


def move_if_finite(its, flat, *others, numbers, step, rates):
    dflat, mean, var, *decay = others
    lr, beta1, beta2, eps, form = rates.values()
    need(form in ("torch", "tf"), 2.0**-126 <= eps <= 2.0**126)
    correction1, correction2 = 1 - beta1 ** (step + 1), math.sqrt(1 - beta2 ** (step + 1))
    step_size, root_scale = lr / correction1, 1 / correction2
    if form == "tf":
        step_size, root_scale = step_size * correction2, 1.0
    given = numbers, dflat, *(decay or [None])
    sizes = numbers.size, lr, beta1, beta2, eps, step_size, root_scale
    run("move_if_finite", flat, given, [flat, mean, var], *sizes, grid="entry")
