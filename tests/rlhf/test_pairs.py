"""Every row of the table of gradients, with sizes and settings drawn by Hypothesis."""

import contextlib

import numpy as np
import pytest
from fakegpu import fakegpu, numpy_as_on_a_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HypothesisDraw, arrays_in, map_arrays

from minirlhf.app.cases import TABLE
from minirlhf.app.check import WHOLE_LOSSES
from minirlhf.backend import to_host
from minirlhf.gradcheck import check_directions, check_pair
from minirlhf.tree import tree_items

MODELS = [row for row in TABLE if row.is_model]
SMALL = [row for row in TABLE if not row.is_model]
FEWER = settings(max_examples=settings().max_examples // 10 or 1)  # a model takes long
SOME = settings(max_examples=settings().max_examples // 5 or 1)  # where no number is in question


@st.composite
def cases(draw, row):
    """(arrays, constants, seed of dout) of a row."""
    return *row.make(HypothesisDraw(draw)), draw(st.integers(0, 2**32 - 1))


def each(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name.replace(" ", "_"))


def run(row, arrays, constants, dout):
    """Output, cache, and the gradients as {path: array}."""
    out, cache = row.forward(*arrays, **constants)
    gradients = row.backward(dout, cache)
    gradients = list(gradients) if isinstance(gradients, tuple) else [gradients]
    return out, cache, dict(tree_items(gradients))


def norm(arrays):
    return float(np.sqrt(sum((np.asarray(a) ** 2).sum() for a in arrays)))


# --- the gradient


@each(SMALL)
@given(data=st.data())
def test_backward_is_the_derivative(row, data):
    arrays, constants, seed = data.draw(cases(row))
    check_pair(row.forward, row.backward, *arrays, seed=seed, name=row.name, **constants)


@each(MODELS)
@FEWER
@given(data=st.data())
def test_backward_of_a_model_is_the_derivative(row, data):
    arrays, constants, seed = data.draw(cases(row))
    check_pair(row.forward, row.backward, *arrays, seed=seed, name=row.name, **constants)


@pytest.mark.parametrize("name", WHOLE_LOSSES, ids=lambda name: name.replace(" ", "_"))
@FEWER
@given(data=st.data())
def test_whole_loss_along_random_directions(name, data):
    draw = HypothesisDraw(data.draw)
    loss, params, gradients = WHOLE_LOSSES[name](draw)
    check_directions(loss, params, gradients, rng=draw.rng, name=name)


# --- float32 stays float32


@each(TABLE)
@given(data=st.data())
def test_float32_stays_float32_and_near_float64(row, data):
    arrays, constants, seed = data.draw(cases(row))
    rng = np.random.default_rng(seed)
    out, _ = row.forward(*arrays, **constants)
    dout = rng.standard_normal(np.shape(out))
    exact, _, exact_gradients = run(row, arrays, constants, dout)

    def narrow(a):
        return a.astype(np.float32) if a.dtype == np.float64 else a

    out, cache, gradients = run(
        row, *map_arrays(narrow, [arrays, constants]), dout.astype(np.float32)
    )
    for array in arrays_in([out, cache, list(gradients.values())]):
        assert array.dtype != np.float64
    largest = max(1.0, *(np.abs(a).max() for a in arrays_in(arrays)))
    rounding = max(1e-6 * largest, 1e-7 * largest**2)  # of the input, and of scores, its products
    assert norm([out - exact]) <= 1e-4 * norm([exact]) + rounding
    errors = [gradients[path] - exact_gradients[path] for path in exact_gradients]
    assert norm(errors) <= 1e-4 * norm(exact_gradients.values()) + rounding


# --- memory


@each(TABLE)
@SOME
@given(data=st.data())
def test_results_share_no_memory_with_what_the_caller_owns(row, data):
    arrays, constants, _ = data.draw(cases(row))
    out, cache = row.forward(*arrays, **constants)
    dout = np.ones(np.shape(out))
    gradients = arrays_in(row.backward(dout, cache))
    given_away = arrays_in([arrays, constants])
    assert not any(np.shares_memory(out, a) for a in given_away)
    for i, gradient in enumerate(gradients):
        for other in [*given_away, *arrays_in(cache), *gradients[:i], dout, out]:
            assert not np.shares_memory(gradient, other)


# --- other array modules


@each(TABLE)
@SOME
@given(data=st.data())
def test_same_numbers_on_every_array_module(row, xp, data):
    arrays, constants, seed = data.draw(cases(row))
    rng = np.random.default_rng(seed)
    with numpy_as_on_a_gpu() if xp is fakegpu else contextlib.nullcontext():
        out, _ = row.forward(*arrays, **constants)
        dout = np.asarray(rng.standard_normal(np.shape(out)))
        expected, _, expected_gradients = run(row, arrays, constants, dout)

    moved = map_arrays(xp.asarray, [arrays, constants, dout])
    with fakegpu.no_sync() if xp is fakegpu else contextlib.nullcontext():
        out, cache, gradients = run(row, *moved)
    for array in arrays_in([out, cache, list(gradients.values())]):
        assert xp is np or type(array) is xp.ndarray
    scale = max(1.0, norm([expected, *expected_gradients.values()]))
    tolerance = 0.0 if xp in (np, fakegpu) else 1e-12 * scale
    pairs = [(out, expected), *((gradients[k], expected_gradients[k]) for k in gradients)]
    for got, wanted in pairs:
        got = got if xp is np else to_host(got)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        assert norm([got - wanted]) <= tolerance
