"""GPT-2 and Llama: embed, L blocks of attention and MLP with residual connections, a last norm.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Touvron et al. 2023,
arXiv 2302.13971. Parameters (every w is (in, out)):

    {"wte": (V, C), "wpe": (n_ctx, C),
     "blocks": [{"ln1": {gain, bias}, "attn": {"qkv": {w, b}, "out": {w, b}},
                 "ln2": {gain, bias}, "mlp": {"up": {w, b}, "down": {w, b}}}, ...],
     "ln_f": {gain, bias}}

Llama's blocks are the same but for four things, each seen by what its parameters have: no biases,
norms without a mean, a "gate" in the MLP, and in the place of wpe rotary positions. An output
matrix of its own is "lm_head" (V, C).

B sequences, T tokens, C channels, V vocabulary, L layers. What reads the output h (B, T, C) is in
heads.py.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from minirlhf.backend import Array, check_ids, fused, get_xp
from minirlhf.nn import layers
from minirlhf.nn.attention import (
    AttentionCache,
    RotaryCache,
    attention_backward,
    attention_forward,
    causal_mask,
    rotary_angles,
    rotary_backward,
    rotary_forward,
)
from minirlhf.tree import Tree, tree_items, tree_map


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a transformer."""

    vocab_size: int  # V
    n_ctx: int  # the longest sequence, padding not counted; GPT-2 learns so many positions
    n_layer: int = 2  # L
    n_head: int = 4  # H
    d_model: int = 64  # C, a multiple of n_head
    ln_eps: float = 1e-5
    block: Literal["gpt2", "llama"] = "gpt2"
    n_kv_head: int = 0  # K, of Llama: heads of keys and values, a divisor of n_head; 0: n_head
    d_ff: int = 0  # F, of Llama: channels inside the MLP; 0: 4 C
    rope_theta: float = 10000.0  # of Llama: base of the wavelengths of its rotary positions
    tied: bool = True  # of Llama: is the output matrix the token embedding?

    def __post_init__(self):
        for name in ("vocab_size", "n_ctx", "n_layer", "n_head", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: expected {name} >= 1; got {getattr(self, name)}")
        even = 1 if self.block == "gpt2" else 2  # rotary positions turn pairs of channels
        if self.d_model % (even * self.n_head) != 0:
            raise ValueError(
                f"GPTConfig: expected d_model a multiple of {even} n_head; "
                f"got {self.d_model} and {self.n_head}"
            )

    @property
    def heads(self) -> dict[str, int]:
        """H and K, as the attention is told them."""
        return {"n_head": self.n_head, "n_kv_head": self.n_kv_head or self.n_head}


def kept_floats(sizes: GPTConfig, T: int) -> int:
    """Floats kept of each of T tokens by a forward, at most; H T of a block are the attention's."""
    C, F = sizes.d_model, sizes.d_ff or 4 * sizes.d_model
    of_block = 12 * C + 4 * F if sizes.block == "llama" else 9 * C + 2 * F
    return sizes.n_layer * (of_block + sizes.n_head * T)


def parameter_shapes(config: GPTConfig) -> Tree:
    """The tree at the top of this file with its shape at each leaf."""
    C, (H, K), is_llama = config.d_model, config.heads.values(), config.block == "llama"
    F, vocabulary = config.d_ff or 4 * C, (config.vocab_size, C)

    def linear(i, o):
        return {"w": (i, o)} if is_llama else {"w": (i, o), "b": (o,)}

    norm = {"gain": (C,)} if is_llama else {"gain": (C,), "bias": (C,)}
    gate = {"gate": linear(C, F)} if is_llama else {}
    block = {
        "ln1": norm,
        "attn": {"qkv": linear(C, C // H * (H + 2 * K)), "out": linear(C, C)},
        "ln2": norm,
        "mlp": {**gate, "up": linear(C, F), "down": linear(F, C)},
    }
    positions = {} if is_llama else {"wpe": (config.n_ctx, C)}
    output = {} if config.tied else {"lm_head": vocabulary}
    blocks = [block] * config.n_layer
    return {"wte": vocabulary, **positions, "blocks": blocks, "ln_f": norm, **output}


def init_transformer(config: GPTConfig, *, rng: np.random.Generator, dtype=np.float32) -> Tree:
    """Weights N(0, 0.02), those that write into the residual stream 0.02 / sqrt(2L); biases 0.

    Drawn on the host from `rng`, so that a seed means the same model on every device.
    """
    shapes, std = parameter_shapes(config), 0.02
    paths = (path for path, _ in tree_items(shapes))

    def drawn(shape: tuple[int, ...]) -> Array:
        path = next(paths)
        if len(shape) == 1:  # a gain, or a bias
            return np.full(shape, 1.0 if path.endswith("gain") else 0.0, dtype=dtype)
        # 2L terms are added up in the residual stream
        n_terms = 2 * config.n_layer if path.endswith(("out.w", "down.w")) else 1
        return (std / n_terms**0.5 * rng.standard_normal(shape)).astype(dtype)

    return tree_map(drawn, shapes)


def check_tokens(tokens: np.ndarray, mask: np.ndarray, config: GPTConfig) -> None:
    """Refuse what would give a wrong number: called on the host, where a batch enters the program.

    Raises:   ValueError: shapes differ, ids are no integers or outside the vocabulary, a mask is
                  empty or not 0/1, or a sequence has more tokens than the model has positions.
    """
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise ValueError(
            f"tokens: expected tokens and mask of one shape (B, T); got {tokens.shape} "
            f"and {mask.shape}"
        )
    check_ids("tokens", tokens, config.vocab_size)
    if tokens.size == 0 or not ((mask == 0) | (mask == 1)).all() or not mask.any(axis=1).all():
        raise ValueError("mask: expected 0 and 1 with at least one 1 in every sequence")
    longest = int(mask.sum(axis=1).max())
    if longest > config.n_ctx:
        raise ValueError(
            f"tokens: expected at most {config.n_ctx} tokens a sequence, the model's positions; "
            f"got {longest}"
        )


def positions_of(mask: Array) -> Array:
    """(B, T) index of each real token among those of its sequence; padding repeats one."""
    xp = get_xp(mask)
    return xp.maximum((mask > 0).cumsum(axis=1) - 1, 0)  # 0 also before the first real token


# -- what the two kinds of block do in their own way -----------------------------------------------
def norm_forward(x: Array, p: Tree, *, eps: float) -> tuple[Array, Any]:
    """Layer norm, or RMSNorm where p has no bias."""
    norm = layers.layernorm_forward if "bias" in p else layers.rmsnorm_forward
    return norm(x, **p, eps=eps)


def norm_backward(dy: Array, cache: Any) -> tuple[Array, Tree]:
    """dx, and gradients keyed like p."""
    if isinstance(cache, layers.RMSNormCache):
        dx, dgain = layers.rmsnorm_backward(dy, cache)
        return dx, {"gain": dgain}
    dx, dgain, dbias = layers.layernorm_backward(dy, cache)
    return dx, {"gain": dgain, "bias": dbias}


def through_linear(dy: Array, cache: layers.LinearCache) -> tuple[Array, Tree]:
    """dx, and gradients keyed like p of a linear layer: {w, b}, or {w}."""
    dx, *gradients = layers.linear_backward(dy, cache)
    return dx, dict(zip(("w", "b"), gradients, strict=False))


class MLPCache(NamedTuple):
    up: layers.LinearCache
    gate: layers.LinearCache | None
    activation: layers.GeluCache | layers.SwiGLUCache
    down: layers.LinearCache


def mlp_forward(x: Array, p: Tree, *, keep: bool = True) -> tuple[Array, MLPCache]:
    """down(gelu(up)), or where p has a gate  down(swish(gate) * up).  (..., C) -> (..., C)."""
    u, up = layers.linear_forward(x, **p["up"])  # (..., F)
    gate = None
    if "gate" in p:
        g, gate = layers.linear_forward(x, **p["gate"])
        a, activation = layers.swiglu_forward(g, u, keep=keep)
    else:
        a, activation = layers.gelu_forward(u, keep=keep)
    y, down = layers.linear_forward(a, **p["down"])
    return y, MLPCache(up, gate, activation, down)


def mlp_backward(dy: Array, cache: MLPCache) -> tuple[Array, Tree]:
    """dx, and gradients keyed like p."""
    da, ddown = through_linear(dy, cache.down)  # (..., F)
    if cache.gate is None:
        dx, dup = through_linear(layers.gelu_backward(da, cache.activation), cache.up)
        return dx, {"up": dup, "down": ddown}
    dg, du = layers.swiglu_backward(da, cache.activation)
    (dx, dup), (dx_gate, dgate) = through_linear(du, cache.up), through_linear(dg, cache.gate)
    dx += dx_gate  # x reaches y through both
    return dx, {"gate": dgate, "up": dup, "down": ddown}


def rotation_of(params: Tree, positions: Array, config: GPTConfig) -> dict[str, Any] | None:
    """What `rotary_forward` is told at these positions; None where there is a wpe."""
    if "wpe" in params:
        return None
    D, n_rotated = config.d_model // config.n_head, sum(config.heads.values())
    angles = {"n": D // 2, "theta": config.rope_theta, "dtype": params["wte"].dtype}
    return {"n_rotated": n_rotated, **rotary_angles(positions, **angles)}


# -- a block, and all of them ----------------------------------------------------------------------
class BlockCache(NamedTuple):
    ln1: layers.LayerNormCache | layers.RMSNormCache
    qkv: layers.LinearCache
    rotary: RotaryCache | None
    attention: AttentionCache
    taken: layers.TakeColumnsCache | None
    out: layers.LinearCache
    ln2: layers.LayerNormCache | layers.RMSNormCache
    mlp: MLPCache


@fused
def block_forward(
    x: Array,
    p: Tree,
    *,
    config: GPTConfig,
    allowed: Array,
    rotation: dict[str, Any] | None = None,
    read: Array | None = None,
    keep: bool = True,
) -> tuple[Array, BlockCache | None]:
    """x <- x + Attention(Norm1(x));  y = x + MLP(Norm2(x)).

    Args:     x: (B, T, C) residual stream.
              p: one entry of params["blocks"].
              allowed: (B, 1, T, T) who may look at whom.
              rotation: of `rotation_of`.
              read: (B, Q) columns that are wanted of y, each at most once; None: all T.
              keep: False where no backward will follow.
    Returns:  y (B, Q, C), cache (None unless kept).
    """
    n, ln1 = norm_forward(x, p["ln1"], eps=config.ln_eps)  # (B, T, C)
    qkv, qkv_cache = layers.linear_forward(n, **p["attn"]["qkv"])  # (B, T, (H + 2K) D)
    rotary = None
    if rotation is not None:
        qkv, rotary = rotary_forward(qkv, **rotation)
    a, attention = attention_forward(qkv, **config.heads, allowed=allowed, read=read)
    a, out = layers.linear_forward(a, **p["attn"]["out"])  # (B, Q, C) from here on
    x, taken = (x, None) if read is None else layers.take_columns_forward(x, columns=read)
    a += x  # the first residual connection

    n, ln2 = norm_forward(a, p["ln2"], eps=config.ln_eps)
    y, mlp = mlp_forward(n, p["mlp"], keep=keep)
    y += a  # the second
    cache = BlockCache(ln1, qkv_cache, rotary, attention, taken, out, ln2, mlp)
    return y, cache if keep else None


def block_backward(dy: Array, cache: BlockCache) -> tuple[Array, Tree]:
    """The lines of `block_forward` undone from the last to the first.

    dy (B, Q, C) -> dx (B, T, C), gradients keyed like p.
    """
    dn, dmlp = mlp_backward(dy, cache.mlp)
    da, dln2 = norm_backward(dn, cache.ln2)
    da += dy  # a reaches y directly and through the MLP

    dout, dout_linear = through_linear(da, cache.out)  # (B, Q, C)
    dqkv = attention_backward(dout, cache.attention)  # every position is a key
    if cache.rotary is not None:
        dqkv = rotary_backward(dqkv, cache.rotary)
    dn, dqkv_linear = through_linear(dqkv, cache.qkv)
    dx, dln1 = norm_backward(dn, cache.ln1)
    if cache.taken is not None:
        da = layers.take_columns_backward(da, cache.taken)  # (B, T, C)
    dx += da  # x reaches a directly and through the attention
    attn = {"qkv": dqkv_linear, "out": dout_linear}
    return dx, {"ln1": dln1, "attn": attn, "ln2": dln2, "mlp": dmlp}


class TransformerCache(NamedTuple):
    wte: layers.EmbeddingCache
    wpe: layers.EmbeddingCache | None
    blocks: list[BlockCache]
    ln_f: layers.LayerNormCache | layers.RMSNormCache


def transformer_forward(
    params: Tree,
    *,
    tokens: Array,
    mask: Array,
    config: GPTConfig,
    read: Array | None = None,
    keep: bool = True,
) -> tuple[Array, TransformerCache | None]:
    """h = Norm_f(block_L(... block_1(wte[tokens] + wpe[positions]))), or without wpe.

    Positions count real tokens only and nobody looks at padding, so neither the side nor the
    content of the padding changes any number at a real token.

    Args:     params: the tree at the top of this file.
              tokens: (B, T) ids in [0, V), anything in range at padding.
              mask: (B, T) 1 at real tokens, 0 at padding.
              read: (B, Q) columns at which h is wanted, each at most once; None: all T. The last
                  block computes no others: theirs serve as keys and values only.
              keep: False where no backward will follow: the memory of one block serves the next.
    Returns:  h (B, Q, C), cache (None unless kept).
    """
    x, wte = layers.embedding_forward(params["wte"], ids=tokens)  # (B, T, C)
    positions, wpe, blocks = positions_of(mask), None, []
    if "wpe" in params:
        x_position, wpe = layers.embedding_forward(params["wpe"], ids=positions)
        x += x_position
    same = {"config": config, "keep": keep, "rotation": rotation_of(params, positions, config)}
    same["allowed"] = causal_mask(mask)  # (B, 1, T, T), the same for all blocks
    for i, p in enumerate(params["blocks"]):
        is_last = i == config.n_layer - 1  # before it every column is somebody's key
        x, cache = block_forward(x, p, read=read if is_last else None, **same)
        blocks.append(cache)
    h, ln_f = norm_forward(x, params["ln_f"], eps=config.ln_eps)
    return h, TransformerCache(wte, wpe, blocks, ln_f) if keep else None


def transformer_backward(dh: Array, cache: TransformerCache, *, dwte: Array | None = None) -> Tree:
    """dL/dparams from dL/dh (B, Q, C), block by block from the last to the first.

    Args:     dwte: (V, C) the logits' share where they read wte; the embedding's is added in place.
    Returns:  a tree keyed like params.
    """
    dx, dln_f = norm_backward(dh, cache.ln_f)  # (B, Q, C)
    dblocks = []
    for block in reversed(cache.blocks):
        dx, dp = block_backward(dx, block)  # (B, T, C) from the last block on
        dblocks.insert(0, dp)
    dparams = {"wte": layers.embedding_backward(dx, cache.wte, dtable=dwte)}
    if cache.wpe is not None:
        dparams["wpe"] = layers.embedding_backward(dx, cache.wpe)
    return dparams | {"blocks": dblocks, "ln_f": dln_f}
