"""A small model.bin of llama2.c."""

import struct

import numpy as np

C, F, L, H, K, V, N_CTX = SIZES = (24, 20, 2, 4, 2, 13, 9)


def arrays_of(tied, seed=0, sizes=SIZES):
    """In the order of the file; (out, in)."""
    rng, (C, F, L, H, K, V, N_CTX) = np.random.default_rng(seed), sizes
    D = C // H
    shapes = [(V, C), (L, C), (L, C, C), (L, K * D, C), (L, K * D, C), (L, C, C), (L, C)]
    shapes += [(L, F, C), (L, C, F), (L, F, C), (C,), (N_CTX, D // 2), (N_CTX, D // 2)]
    shapes += [] if tied else [(V, C)]
    return [(0.4 * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


def write(path, arrays, sizes=SIZES, tied=True):
    *others, v, n_ctx = sizes
    header = struct.pack("<7i", *others, v if tied else -v, n_ctx)
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays))
    return path
