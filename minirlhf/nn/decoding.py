"""One token at a time: keys and values of the tokens so far are kept, and a new one looks at them.

The numbers are those of `transformer_forward`, up to rounding; no backward follows.
"""

import math
from typing import NamedTuple

from minirlhf.backend import Array, fused, get_xp
from minirlhf.nn import layers, transformer
from minirlhf.nn.attention import rotary_forward, split_heads, split_qkv, unnormalised_attention
from minirlhf.nn.transformer import GPTConfig
from minirlhf.tree import Tree


class KVCache(NamedTuple):
    """Keys and values of all tokens so far: what one more token has to look at."""

    keys: list[Array]  # L times (B, K, S, D), S columns preallocated
    values: list[Array]  # L times (B, K, S, D)
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
    K, D = config.heads["n_kv_head"], config.d_model // config.n_head
    last = xp.full((B, 1), P - 1)
    h, cache = transformer.transformer_forward(
        params, tokens=tokens, mask=mask, config=config, read=last
    )
    kv = KVCache([], [], xp.zeros((B, P + max_new), dtype=mask.dtype))
    kv.mask[:, :P] = mask
    for block in cache.blocks:
        _, *both = split_qkv(block.attention.qkv, **config.heads)  # keys are rotated already
        for store, x in zip((kv.keys, kv.values), both, strict=True):
            columns = xp.zeros((B, K, P + max_new, D), dtype=x.dtype)
            columns[:, :, :P] = split_heads(x, K)
            store.append(columns)
    return h[:, 0], kv


@fused
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
    (H, K), eps, D = config.heads.values(), config.ln_eps, config.d_model // config.n_head
    kv.mask[:, column] = mask
    seen = kv.mask[:, : column + 1]  # (B, S)
    position = xp.maximum((seen > 0).sum(axis=1, keepdims=True) - 1, 0)  # (B, 1) `positions_of`
    allowed = seen[:, None, None, :].copy()  # (B, 1, 1, S)
    allowed[..., column] = 1.0  # a token sees itself, also where its sequence has ended
    x = params["wte"][tokens]  # (B, C)
    if "wpe" in params:
        x += params["wpe"][position[:, 0]]
    rotation = transformer.rotation_of(params, position, config)
    for p, keys, values in zip(params["blocks"], kv.keys, kv.values, strict=True):
        n, _ = transformer.norm_forward(x, p["ln1"], eps=eps)
        qkv, _ = layers.linear_forward(n[:, None], **p["attn"]["qkv"])  # (B, 1, (H + 2K) D)
        if rotation is not None:
            qkv, _ = rotary_forward(qkv, **rotation)
        q, k, v = split_qkv(qkv, H, K)
        keys[:, :, column : column + 1] = split_heads(k, K)
        values[:, :, column : column + 1] = split_heads(v, K)
        q_rows = (q * (1.0 / math.sqrt(D))).reshape(-1, K, H // K, D)  # a group's below each other
        exp_scores, total = unnormalised_attention(q_rows, keys[:, :, : column + 1], allowed)
        a = exp_scores @ values[:, :, : column + 1]  # (B, K, G, D)
        a /= total
        a, _ = layers.linear_forward(a.reshape(x.shape), **p["attn"]["out"])
        a += x
        n, _ = transformer.norm_forward(a, p["ln2"], eps=eps)
        x, _ = transformer.mlp_forward(n, p["mlp"], keep=False)
        x += a
    h, _ = transformer.norm_forward(x, params["ln_f"], eps=eps)
    return h
