"""llama2.c's model.bin: the numbers of an independent forward, and what is refused."""

import numpy as np
import pytest
from tiny_llama import SIZES, arrays_of, write

from minirlhf.errors import InputError
from minirlhf.nn.heads import logits_forward, output_matrix
from minirlhf.nn.transformer import transformer_forward
from minirlhf.runs.llama2c import load_llama2c

C, F, L, H, K, V, N_CTX = SIZES
D = C // H


def run_c(arrays, tokens):
    """llama2.c's forward, one token after the other, in float64: logits (T, V)."""
    wte, ln1, wq, wk, wv, wo, ln2, w1, w2, w3, ln_f, *_ = (a.astype(np.float64) for a in arrays)
    output = arrays[13].astype(np.float64) if len(arrays) > 13 else wte
    logits = []
    cache = [([], []) for _ in range(L)]

    def norm(x, gain):
        return x / np.sqrt(np.mean(x * x) + 1e-5) * gain

    def rotated(x, position):
        x = x.reshape(-1, D).copy()
        for head in x:
            for i in range(0, D, 2):  # neighbours are turned together
                angle = position / 10000.0 ** (i / D)
                a, b = head[i], head[i + 1]
                head[i] = a * np.cos(angle) - b * np.sin(angle)
                head[i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return x

    for position, token in enumerate(tokens):
        x = wte[token].copy()
        for layer in range(L):
            n = norm(x, ln1[layer])
            q, k = rotated(wq[layer] @ n, position), rotated(wk[layer] @ n, position)
            keys, values = cache[layer]
            keys.append(k)
            values.append((wv[layer] @ n).reshape(K, D))
            heads = []
            for h in range(H):
                g = h // (H // K)
                scores = np.array([q[h] @ key[g] / np.sqrt(D) for key in keys])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                heads.append(sum(w * v[g] for w, v in zip(weights, values, strict=True)))
            x += wo[layer] @ np.concatenate(heads)
            n = norm(x, ln2[layer])
            gate = w1[layer] @ n
            x += w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ n))
        logits.append(output @ norm(x, ln_f))
    return np.array(logits)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_an_independent_forward(tmp_path, tied):
    arrays = arrays_of(tied)
    params, config = load_llama2c(write(tmp_path / "model.bin", arrays, tied=tied))
    assert (config.block, config.tied, config.n_kv_head, config.n_ctx) == ("llama", tied, K, N_CTX)
    tokens = np.random.default_rng(1).integers(V, size=(1, N_CTX))
    mask = np.ones(tokens.shape, dtype=np.float32)
    h, _ = transformer_forward(params, tokens=tokens, mask=mask, config=config)
    ours, expected = logits_forward(h, output_matrix(params))[0][0], run_c(arrays, tokens[0])
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("sizes", "n_bytes", "message"),
    [
        (SIZES, -4, "bytes, which do not fit"),
        (SIZES, 2, "bytes, which do not fit"),
        ((25, *SIZES[1:]), 0, r"the sizes \[25, 20"),
        ((C, F, L, H, 3, V, N_CTX), 0, r"the sizes \[24, 20, 2, 4, 3"),
        ((C, F, L, 0, K, V, N_CTX), 0, "the sizes"),
        ((C, F, 2**30, H, K, V, 2**30), 0, "bytes, which do not fit"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, sizes, n_bytes, message):
    path = write(tmp_path / "model.bin", arrays_of(True), sizes)
    data = path.read_bytes()
    path.write_bytes(data[:n_bytes] if n_bytes < 0 else data + b"\0" * n_bytes)
    with pytest.raises(InputError, match=message):
        load_llama2c(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 28, b"# text, and no model at all\n" * 9])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(InputError, match="expected a model of llama2.c"):
        load_llama2c(tmp_path / "x.bin")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    arrays = arrays_of(True)
    arrays[3][1, 2, 3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        load_llama2c(write(tmp_path / "model.bin", arrays))
