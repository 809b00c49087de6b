"""The Llama block: what its parts are, and that nothing it must not depend on changes a number.

Its gradients are rows of the table, in test_pairs.py; transformers' Llama is in tests/peers.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, Letters, make_batch
from tolerances import KV_CACHE, LOOPS, PADDING, assert_close, assert_trees_close

from minirlhf.nn.attention import attention_forward, causal_mask, rotary_angles, rotary_forward
from minirlhf.nn.decoding import decode_step, prefill
from minirlhf.nn.heads import output_matrix
from minirlhf.nn.layers import rmsnorm_forward, swiglu_forward
from minirlhf.nn.sampling import Sampling, generate
from minirlhf.nn.transformer import (
    GPTConfig,
    init_transformer,
    parameter_shapes,
    transformer_forward,
)
from minirlhf.train.batches import Batch
from minirlhf.train.policy import policy_backward, policy_forward
from minirlhf.tree import tree_items, tree_map

LLAMA = replace(CONFIG, block="llama", n_head=4, n_kv_head=2, d_model=16, d_ff=10, tied=False)
DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])


def params_of(config, dtype=np.float64, seed=0):
    """Well away from the initial ones."""
    rng = np.random.default_rng(seed)
    params = init_transformer(config, rng=rng, dtype=np.float64)
    return tree_map(lambda a: (a + 0.3 * rng.standard_normal(a.shape)).astype(dtype), params)


def widened(batch, left, right):
    """More padding on both sides, and anything in it."""
    rng, B = np.random.default_rng(0), len(batch.mask)
    pad = ((0, 0), (left, right))
    tokens, mask = np.pad(batch.tokens, pad), np.pad(batch.mask, pad)
    junk = rng.integers(LLAMA.vocab_size, size=(B, mask.shape[1]))
    return Batch(np.where(mask > 0, tokens, junk), mask, batch.prompt_len + left)


def test_rms_norm_divides_by_the_root_of_the_mean_square():
    x, gain = np.array([[3.0, 4.0, 0.0, 0.0]]), np.array([1.0, 2.0, 3.0, 4.0])
    y, _ = rmsnorm_forward(x, gain, eps=1e-12)
    assert_close(y, [[3.0 / 2.5, 2 * 4.0 / 2.5, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"expected gain of shape \(4,\)"):
        rmsnorm_forward(x, gain[:3])


@DTYPES
def test_swiglu_of_large_numbers_is_finite(dtype):
    gate = np.array([-1e4, -90.0, 0.0, 90.0, 1e4], dtype=dtype)
    y, cache = swiglu_forward(gate, np.full(5, 2.0, dtype=dtype))
    assert_close(y, np.maximum(2 * gate, 0.0), 1e-6)
    assert_close(cache.slope, np.array([0.0, 0.0, 0.5, 1.0, 1.0], dtype=dtype), 1e-6)
    assert y.dtype == dtype


@given(i=st.integers(0, 200), j=st.integers(0, 200), moved=st.integers(0, 55))
def test_a_rotated_product_depends_on_the_distance_alone(i, j, moved):
    q, k = np.random.default_rng(0).standard_normal((2, 8))

    def product(i, j):
        positions = np.array([[i, j]])
        angles = rotary_angles(positions, n=4, theta=1e4, dtype=np.float64)
        turned, _ = rotary_forward(np.array([[q, k]]), n_rotated=1, **angles)
        assert_close(np.linalg.norm(turned[0, 0]), np.linalg.norm(q))
        return turned[0, 0] @ turned[0, 1]

    assert_close(product(i + moved, j + moved), product(i, j), LOOPS)


def test_values_are_not_rotated():
    x = np.random.default_rng(0).standard_normal((1, 3, 4 * 6))
    angles = rotary_angles(np.arange(3)[None], n=3, theta=1e4, dtype=np.float64)
    y, _ = rotary_forward(x, n_rotated=3, **angles)
    assert np.array_equal(y[..., 18:], x[..., 18:]) and np.array_equal(y[:, 0], x[:, 0])
    assert (y[:, 1:, :18] != x[:, 1:, :18]).all()


def test_a_group_is_its_keys_and_values_repeated():
    """Two heads of keys for four of queries, against four where neighbours are equal."""
    rng, D = np.random.default_rng(0), 4
    q, k, v = rng.standard_normal((2, 3, 4 * D)), *rng.standard_normal((2, 2, 3, 2 * D))
    allowed = causal_mask(np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]))
    read = np.array([[2, 1], [1, 2]])
    few, _ = attention_forward(
        np.concatenate([q, k, v], axis=-1), n_head=4, n_kv_head=2, allowed=allowed, read=read
    )
    k, v = (np.repeat(x.reshape(2, 3, 2, D), 2, axis=2).reshape(2, 3, -1) for x in (k, v))
    many, _ = attention_forward(
        np.concatenate([q, k, v], axis=-1), n_head=4, allowed=allowed, read=read
    )
    assert_close(few, many)


@DTYPES
@given(left=st.integers(0, 3), right=st.integers(0, 3), seed=st.integers(0, 99))
def test_padding_changes_nothing(dtype, left, right, seed):
    params = {"transformer": params_of(LLAMA, dtype)}
    narrow = make_batch(seed=seed, dtype=dtype)
    real = narrow.response_mask > 0

    def run(batch):
        out, cache = policy_forward(params, batch=batch, config=LLAMA)
        columns = slice(0, real.shape[1])
        gradients = policy_backward(None, batch.response_mask / real.sum(), None, cache)
        assert out.logp.dtype == dtype
        return out.logp[:, columns][real], gradients

    (logp, gradients), (wide_logp, wide_gradients) = run(narrow), run(widened(narrow, left, right))
    assert_close(wide_logp, logp, PADDING[dtype])
    assert_trees_close(wide_gradients, gradients, 10 * PADDING[dtype])


@DTYPES
@given(seed=st.integers(0, 99), extra=st.integers(0, 2))
def test_the_kv_cache_gives_the_full_forward(dtype, seed, extra):
    params = params_of(LLAMA, dtype)
    batch = widened(make_batch((3, 1, 4, 2), (5, 2, 5, 1), seed=seed, dtype=dtype), extra, 0)
    P, T = batch.prompt_len, batch.responses.shape[1]
    full, _ = transformer_forward(params, tokens=batch.tokens, mask=batch.mask, config=LLAMA)
    start = {"tokens": batch.tokens[:, :P], "mask": batch.mask[:, :P]}
    h, kv = prefill(params, **start, config=LLAMA, max_new=T)
    assert kv.keys[0].shape == (4, LLAMA.n_kv_head, P + T, 4)
    assert_close(h, full[:, P - 1], KV_CACHE[dtype])
    for column in range(P, P + T):
        mask = batch.mask[:, column]
        step = {"tokens": batch.tokens[:, column], "mask": mask, "column": column}
        h = decode_step(params, kv, **step, config=LLAMA)
        assert h.dtype == dtype
        assert_close(h[mask > 0], full[mask > 0, column], KV_CACHE[dtype])


def test_the_sampler_draws_from_the_output_matrix():
    """The most likely token of the full forward, one after the other."""
    params, tokens = params_of(LLAMA), np.array([[7, 1, 2, 8]])
    out = generate(
        params,
        tokens=tokens,
        mask=np.ones(tokens.shape),
        config=LLAMA,
        max_new=5,
        stop_id=Letters.pad,
        pad_id=Letters.pad,
        rng=np.random.default_rng(0),
        sampling=Sampling(0.0),
    )
    assert not np.array_equal(output_matrix(params), params["wte"])
    h, _ = transformer_forward(params, tokens=out.tokens, mask=out.mask, config=LLAMA)
    n = int(out.mask.sum())
    best = (h @ params["lm_head"].T).argmax(axis=-1)[0, 3 : n - 1]
    assert np.array_equal(out.tokens[0, 4:n], best) and n > 5


def test_an_output_matrix_of_its_own_has_a_gradient_of_its_own():
    """Tied, the table gets the sum of what the two get apart."""
    apart, batch = params_of(LLAMA), make_batch()
    apart["lm_head"] = apart["wte"].copy()
    together = {name: tree for name, tree in apart.items() if name != "lm_head"}

    def gradients(params):
        config = replace(LLAMA, tied="lm_head" not in params)
        out, cache = policy_forward({"transformer": params}, batch=batch, config=config)
        return policy_backward(None, np.ones(out.logp.shape), None, cache)["transformer"]

    two, one = gradients(apart), gradients(together)
    assert min(np.abs(two["wte"]).max(), np.abs(two["lm_head"]).max()) > 0.01
    assert_close(one["wte"], two["wte"] + two["lm_head"])


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_the_parameters(tied):
    for config in (replace(LLAMA, tied=tied), CONFIG):
        params = init_transformer(config, rng=np.random.default_rng(0))
        shapes = dict(tree_items(parameter_shapes(config)))
        assert shapes == {path: leaf.shape for path, leaf in tree_items(params)}
        assert ("lm_head" in params) == (not config.tied)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"n_head": 8, "d_model": 24}, "a multiple of 2 n_head"), ({"n_layer": 0}, "n_layer >= 1")],
)
def test_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**vars(LLAMA), **sizes})


def test_heads_that_do_not_divide_are_refused():
    qkv = np.zeros((1, 2, 5 * 4))
    with pytest.raises(ValueError, match=r"H = 3 a multiple of K = 1|\(H \+ 2K\) D"):
        attention_forward(qkv, n_head=4, n_kv_head=3, allowed=causal_mask(np.ones((1, 2))))
