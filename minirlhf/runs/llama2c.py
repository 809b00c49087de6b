"""llama2.c's files of weights, karpathy's tinyllamas among them: read, never written.

karpathy/llama2.c: run.c, memory_map_weights (version 0, the format without a magic number). Seven
integers, then float32 arrays one after the other, each of all layers, (out, in). Of a head's
channels, those that rotary positions turn together stand beside each other; here half a head apart.
"""

import math
from pathlib import Path

import numpy as np

from minirlhf import disk
from minirlhf.nn.transformer import GPTConfig
from minirlhf.tree import Tree

HEADER = 7 * 4  # bytes
EPS = 1e-5  # of the norms, which the file does not say


def load_llama2c(path: str | Path) -> tuple[Tree, GPTConfig]:
    """Parameters, float32 on the host, and sizes of a model.bin."""
    data = disk.read_bytes(path)
    advice = "name a folder of transformers, or such a file"
    with disk.refusing(path, "a model of llama2.c (its version 0)", advice):
        sizes = np.frombuffer(data[:HEADER], "<i4").tolist() if len(data) > HEADER else [0] * 7
        C, F, L, H, K, V, n_ctx = sizes
        D, is_tied, V = C // max(H, 1), V > 0, abs(V)
        if min(sizes[:5]) < 1 or not V or n_ctx < 1 or C != D * H or D % 2 or H % K:
            raise ValueError(f"got the sizes {sizes}")
        config = GPTConfig(V, n_ctx, L, H, C, EPS, "llama", K, F, tied=is_tied)
        n_floats = (len(data) - HEADER) // 4
        shapes = {"wte": (V, C), "ln1": (L, C), "q": (L, C, C)}  # in the order of the file
        shapes |= {"k": (L, K * D, C), "v": (L, K * D, C), "out": (L, C, C), "ln2": (L, C)}
        shapes |= {"gate": (L, F, C), "down": (L, C, F), "up": (L, F, C), "ln_f": (C,)}
        shapes["angles"] = (2, n_ctx, D // 2)  # cos and sin, which we make ourselves
        shapes |= {} if is_tied else {"lm_head": (V, C)}
        if n_floats != sum(map(math.prod, shapes.values())) or len(data) % 4:
            raise ValueError(f"got {len(data):,} bytes, which do not fit the sizes {sizes}")
        arrays, floats = {}, np.frombuffer(data[HEADER:], "<f4").astype(np.float32)
        for name, shape in shapes.items():
            arrays[name], floats = np.split(floats, [math.prod(shape)])
            arrays[name] = arrays[name].reshape(shape)
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("got numbers that are not finite")

    for name in "qk":
        arrays[name] = arrays[name].reshape(L, -1, D // 2, 2, C).swapaxes(2, 3).reshape(L, -1, C)

    def linear(i: int, *names: str) -> Tree:
        return {"w": np.concatenate([arrays[name][i] for name in names]).T.copy()}  # (in, out)

    def block(i: int) -> Tree:
        mlp = {name: linear(i, name) for name in ("gate", "up", "down")}
        ln1, ln2 = ({"gain": arrays[name][i]} for name in ("ln1", "ln2"))
        attn = {"qkv": linear(i, "q", "k", "v"), "out": linear(i, "out")}
        return {"ln1": ln1, "attn": attn, "ln2": ln2, "mlp": mlp}

    params = {"wte": arrays["wte"], "blocks": [block(i) for i in range(L)]}
    params["ln_f"] = {"gain": arrays["ln_f"]}
    return params | ({} if is_tied else {"lm_head": arrays["lm_head"]}), config
