"""GPT-2: embed, L blocks of attention and MLP with residual connections, a final layer norm.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Parameters, in the
layout of Hugging Face's GPT-2 (every w is (in, out)):

    {"wte": (V, C), "wpe": (n_ctx, C),
     "blocks": [{"ln1": {gain, bias}, "attn": {"qkv": {w, b}, "out": {w, b}},
                 "ln2": {gain, bias}, "mlp": {"up": {w, b}, "down": {w, b}}}, ...],
     "ln_f": {gain, bias}}

B sequences, T tokens, C channels, V vocabulary, L layers. What reads the output h (B, T, C) is in
heads.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minirlhf.backend import Array, check_ids, get_xp
from minirlhf.nn import layers
from minirlhf.nn.attention import (
    AttentionCache,
    attention_backward,
    attention_forward,
    causal_mask,
    split_heads,
    unnormalised_attention,
)
from minirlhf.tree import Tree


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a transformer."""

    vocab_size: int  # V
    n_ctx: int  # learned positions: the longest sequence, padding not counted
    n_layer: int = 2  # L
    n_head: int = 4  # H
    d_model: int = 64  # C, a multiple of n_head
    ln_eps: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "n_ctx", "n_layer", "n_head", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: expected {name} >= 1; got {getattr(self, name)}")
        if self.d_model % self.n_head != 0:
            raise ValueError(
                f"GPTConfig: expected d_model a multiple of n_head; "
                f"got {self.d_model} and {self.n_head}"
            )


def kept_floats(sizes: GPTConfig, T: int) -> int:
    """Floats kept of each of T tokens by a forward: 17 C, and H rows of attention, a block."""
    return sizes.n_layer * (17 * sizes.d_model + sizes.n_head * T)


def init_transformer(config: GPTConfig, *, rng: np.random.Generator, dtype=np.float32) -> Tree:
    """Weights N(0, 0.02), those that write into the residual stream 0.02 / sqrt(2L); biases 0.

    Drawn on the host from `rng`, so that a seed means the same model on every device.
    """
    C, std = config.d_model, 0.02

    def normal(*shape, std=std):
        return (std * rng.standard_normal(shape)).astype(dtype)

    def linear(i, o, std=std):
        return {"w": normal(i, o, std=std), "b": np.zeros(o, dtype=dtype)}

    def layernorm():
        return {"gain": np.ones(C, dtype=dtype), "bias": np.zeros(C, dtype=dtype)}

    residual_std = std / (2 * config.n_layer) ** 0.5  # 2L terms are added up there
    return {
        "wte": normal(config.vocab_size, C),
        "wpe": normal(config.n_ctx, C),
        "blocks": [
            {
                "ln1": layernorm(),
                "attn": {"qkv": linear(C, 3 * C), "out": linear(C, C, residual_std)},
                "ln2": layernorm(),
                "mlp": {"up": linear(C, 4 * C), "down": linear(4 * C, C, residual_std)},
            }
            for _ in range(config.n_layer)
        ],
        "ln_f": layernorm(),
    }


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


class BlockCache(NamedTuple):
    ln1: layers.LayerNormCache
    qkv: layers.LinearCache
    attention: AttentionCache
    taken: layers.TakeColumnsCache | None
    out: layers.LinearCache
    ln2: layers.LayerNormCache
    up: layers.LinearCache
    gelu: layers.GeluCache
    down: layers.LinearCache


def block_forward(
    x: Array,
    p: Tree,
    *,
    n_head: int,
    allowed: Array,
    eps: float = 1e-5,
    read: Array | None = None,
    keep: bool = True,
) -> tuple[Array, BlockCache | None]:
    """x <- x + Attention(LN1(x));  y = x + MLP(LN2(x)),  MLP = down(gelu(up)).

    Args:     x: (B, T, C) residual stream.
              p: one entry of params["blocks"].
              allowed: (B, 1, T, T) who may look at whom.
              read: (B, Q) columns that are wanted of y, each at most once; None: all T.
              keep: False where no backward will follow.
    Returns:  y (B, Q, C), cache (None unless kept).
    """
    n, ln1 = layers.layernorm_forward(x, **p["ln1"], eps=eps)  # (B, T, C)
    qkv, qkv_cache = layers.linear_forward(n, **p["attn"]["qkv"])  # (B, T, 3C)
    a, attention = attention_forward(qkv, n_head=n_head, allowed=allowed, read=read)
    a, out = layers.linear_forward(a, **p["attn"]["out"])  # (B, Q, C) from here on
    x, taken = (x, None) if read is None else layers.take_columns_forward(x, columns=read)
    a += x  # the first residual connection

    n, ln2 = layers.layernorm_forward(a, **p["ln2"], eps=eps)
    u, up = layers.linear_forward(n, **p["mlp"]["up"])  # (B, Q, 4C)
    g, gelu = layers.gelu_forward(u, keep=keep)
    y, down = layers.linear_forward(g, **p["mlp"]["down"])  # (B, Q, C)
    y += a  # the second
    cache = BlockCache(ln1, qkv_cache, attention, taken, out, ln2, up, gelu, down)
    return y, cache if keep else None


def block_backward(dy: Array, cache: BlockCache) -> tuple[Array, Tree]:
    """The lines of `block_forward` undone from the last to the first.

    dy (B, Q, C) -> dx (B, T, C), gradients keyed like p.
    """
    dg, dw_down, db_down = layers.linear_backward(dy, cache.down)  # (B, Q, 4C)
    du = layers.gelu_backward(dg, cache.gelu)
    dn, dw_up, db_up = layers.linear_backward(du, cache.up)
    da, dgain2, dbias2 = layers.layernorm_backward(dn, cache.ln2)
    da += dy  # a reaches y directly and through the MLP

    dout, dw_out, db_out = layers.linear_backward(da, cache.out)  # (B, Q, C)
    dqkv = attention_backward(dout, cache.attention)  # (B, T, 3C): every position is a key
    dn, dw_qkv, db_qkv = layers.linear_backward(dqkv, cache.qkv)
    dx, dgain1, dbias1 = layers.layernorm_backward(dn, cache.ln1)
    if cache.taken is not None:
        da = layers.take_columns_backward(da, cache.taken)  # (B, T, C)
    dx += da  # x reaches a directly and through the attention
    return dx, {
        "ln1": {"gain": dgain1, "bias": dbias1},
        "attn": {"qkv": {"w": dw_qkv, "b": db_qkv}, "out": {"w": dw_out, "b": db_out}},
        "ln2": {"gain": dgain2, "bias": dbias2},
        "mlp": {"up": {"w": dw_up, "b": db_up}, "down": {"w": dw_down, "b": db_down}},
    }


class TransformerCache(NamedTuple):
    wte: layers.EmbeddingCache
    wpe: layers.EmbeddingCache
    blocks: list[BlockCache]
    ln_f: layers.LayerNormCache


def transformer_forward(
    params: Tree,
    *,
    tokens: Array,
    mask: Array,
    config: GPTConfig,
    read: Array | None = None,
    keep: bool = True,
) -> tuple[Array, TransformerCache | None]:
    """h = LN_f(block_L(... block_1(wte[tokens] + wpe[positions]))).

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
    x_position, wpe = layers.embedding_forward(params["wpe"], ids=positions_of(mask))
    x += x_position
    allowed = causal_mask(mask)  # (B, 1, T, T), the same for all blocks
    blocks = []
    for i, p in enumerate(params["blocks"]):
        is_last = i == config.n_layer - 1  # before it every column is somebody's key
        x, cache = block_forward(
            x,
            p,
            n_head=config.n_head,
            allowed=allowed,
            eps=config.ln_eps,
            read=read if is_last else None,
            keep=keep,
        )
        blocks.append(cache)
    h, ln_f = layers.layernorm_forward(x, **params["ln_f"], eps=config.ln_eps)
    return h, TransformerCache(wte, wpe, blocks, ln_f) if keep else None


def transformer_backward(dh: Array, cache: TransformerCache) -> Tree:
    """dL/dparams from dL/dh (B, Q, C), block by block from the last to the first.

    A tree keyed like params; "wte" is the embedding's share, the logits' is added outside.
    """
    dx, dgain, dbias = layers.layernorm_backward(dh, cache.ln_f)  # (B, Q, C)
    dblocks = []
    for block in reversed(cache.blocks):
        dx, dp = block_backward(dx, block)  # (B, T, C) from the last block on
        dblocks.insert(0, dp)
    return {
        "wte": layers.embedding_backward(dx, cache.wte),
        "wpe": layers.embedding_backward(dx, cache.wpe),
        "blocks": dblocks,
        "ln_f": {"gain": dgain, "bias": dbias},
    }


class KVCache(NamedTuple):
    """Keys and values of all tokens so far: what one more token has to look at."""

    keys: list[Array]  # L times (B, H, S, D), S columns preallocated
    values: list[Array]  # L times (B, H, S, D)
    mask: Array  # (B, S) 1 at columns that hold a real token

    def rows(self, index: Array) -> "KVCache":
        """A copy for the sequences that `index` picks, each as often as it is named."""
        return KVCache(
            [k[index] for k in self.keys], [v[index] for v in self.values], self.mask[index]
        )


def prefill(
    params: Tree, *, tokens: Array, mask: Array, config: GPTConfig, max_new: int
) -> tuple[Array, KVCache]:
    """Run the prompt once and keep its keys and values, with room for `max_new` more columns.

    Args:     tokens: (B, P) prompts, padded on the left: the last column holds a real token.
              mask: (B, P).
    Returns:  h (B, C) at the last column, cache.
    """
    xp = get_xp(tokens, mask)
    B, P = tokens.shape
    C, H = config.d_model, config.n_head
    last = xp.full((B, 1), P - 1)
    h, cache = transformer_forward(params, tokens=tokens, mask=mask, config=config, read=last)
    kv = KVCache([], [], xp.zeros((B, P + max_new), dtype=mask.dtype))
    kv.mask[:, :P] = mask
    for block in cache.blocks:
        qkv = block.attention.qkv  # (B, P, 3C)
        for store, start in ((kv.keys, C), (kv.values, 2 * C)):
            columns = xp.zeros((B, H, P + max_new, C // H), dtype=qkv.dtype)
            columns[:, :, :P] = split_heads(qkv[..., start : start + C], H)
            store.append(columns)
    return h[:, 0], kv


def decode_step(
    params: Tree, kv: KVCache, *, tokens: Array, mask: Array, column: int, config: GPTConfig
) -> Array:
    """h of one more token a sequence; `kv` is extended in place at `column`.

    The same numbers as `transformer_forward` on the whole sequence, up to rounding, without
    computing the earlier positions again.

    Args:     tokens: (B,) the new ids.
              mask: (B,) 1 where the new token is real, 0 where the sequence has already ended.
              column: where the token stands, counted from the first column of the prompt.
    Returns:  h (B, C).
    """
    xp = get_xp(tokens, mask)
    C, H, eps = config.d_model, config.n_head, config.ln_eps
    kv.mask[:, column] = mask
    seen = kv.mask[:, : column + 1]  # (B, S)
    position = positions_of(seen)[:, -1]  # (B,)
    allowed = seen[:, None, None, :].copy()  # (B, 1, 1, S)
    allowed[..., column] = 1.0  # a token sees itself, also where its sequence has ended
    x = params["wte"][tokens] + params["wpe"][position]  # (B, C)
    for p, keys, values in zip(params["blocks"], kv.keys, kv.values, strict=True):
        n, _ = layers.layernorm_forward(x, **p["ln1"], eps=eps)
        qkv, _ = layers.linear_forward(n, **p["attn"]["qkv"])  # (B, 3C)
        q, k, v = (qkv[:, i * C : (i + 1) * C].reshape(-1, H, C // H) for i in range(3))
        keys[:, :, column] = k
        values[:, :, column] = v
        q = q * (1.0 / math.sqrt(C // H))  # (B, H, D)
        exp_scores, total = unnormalised_attention(q[:, :, None], keys[:, :, : column + 1], allowed)
        a = exp_scores @ values[:, :, : column + 1]  # (B, H, 1, D)
        a /= total
        a, _ = layers.linear_forward(xp.ascontiguousarray(a).reshape(-1, C), **p["attn"]["out"])
        a += x
        n, _ = layers.layernorm_forward(a, **p["ln2"], eps=eps)
        u, _ = layers.linear_forward(n, **p["mlp"]["up"])
        g, _ = layers.gelu_forward(u, keep=False)
        x, _ = layers.linear_forward(g, **p["mlp"]["down"])
        x += a
    h, _ = layers.layernorm_forward(x, **params["ln_f"], eps=eps)
    return h
