"""The stand-in refuses what it says it refuses, computes what NumPy computes, and counts waits."""

import copy

import fakegpu as fakegpu_file
import numpy as np
import pytest
from fakegpu import FakeArray, fakegpu
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.backend import get_xp, to_host

IDS = np.array([[0, 2], [1, 1]])
HOST = np.linspace(0.5, 2.0, 4, dtype=np.float32).reshape(2, 2)


def host(x):
    """An array that stays in main memory whatever `x` is."""
    return HOST.copy()


def set_in(array, index, value):
    array[index] = value


def in_place(array, operator, value):
    getattr(array, f"__{operator}__")(value)


# Each is legal NumPy, on x (2, 2) float32 and ids (2, 2) of integers, and a mistake on a device.
MIXED = {
    "device + host": lambda xp, x, ids: x + host(x),
    "host + device": lambda xp, x, ids: host(x) + x,
    "device += host": lambda xp, x, ids: in_place(x, "iadd", host(x)),
    "host += device": lambda xp, x, ids: exec("h += x", {"h": host(x), "x": x}),
    "device @ host": lambda xp, x, ids: x @ host(x),
    "host @ device": lambda xp, x, ids: host(x) @ x,
    "device > host": lambda xp, x, ids: x > host(x),
    "host == device": lambda xp, x, ids: host(x) == x,
    "xp.maximum of both": lambda xp, x, ids: xp.maximum(x, host(x)),
    "xp.matmul of both": lambda xp, x, ids: xp.matmul(x, host(x)),
    "xp.where of both": lambda xp, x, ids: xp.where(x > 1, host(x), 0.0),
    "xp.where, host condition": lambda xp, x, ids: xp.where(host(x) > 1, x, 0.0),
    "xp.einsum of both": lambda xp, x, ids: xp.einsum("ij,ij->i", x, host(x)),
    "xp.concatenate of both": lambda xp, x, ids: xp.concatenate([x, host(x)]),
    "xp.exp of a host array": lambda xp, x, ids: xp.exp(host(x)),
    "out= on the host": lambda xp, x, ids: xp.exp(x, out=host(x)),
    "host ids into add.at": lambda xp, x, ids: xp.add.at(x, np.array([0, 1]), x),
    "host index": lambda xp, x, ids: x[np.array([1, 0])],
    "host mask": lambda xp, x, ids: x[host(x) > 1],
    "host index in a tuple": lambda xp, x, ids: x[:, np.array([1, 0])],
    "list index": lambda xp, x, ids: x[[1, 0]],
    "device index of a host array": lambda xp, x, ids: np.zeros((3, 2))[ids],
    "host value assigned": lambda xp, x, ids: set_in(x, 0, host(x)[0]),
    "device value assigned to host": lambda xp, x, ids: set_in(host(x), 0, x[0]),
}
NUMPY_ON_DEVICE = {
    "np.exp": lambda xp, x, ids: np.exp(x),
    "np.add, host first": lambda xp, x, ids: np.add(host(x), x),
    "np.sum": lambda xp, x, ids: np.sum(x),
    "np.where": lambda xp, x, ids: np.where(x > 1, x, 0.0),
    "np.concatenate": lambda xp, x, ids: np.concatenate([x, x]),
    "np.zeros_like": lambda xp, x, ids: np.zeros_like(x),
    "np.add.at": lambda xp, x, ids: np.add.at(host(x), 0, x[0]),
    "np.asarray": lambda xp, x, ids: np.asarray(x),
    "np.array of a list": lambda xp, x, ids: np.array([x, x]),
    "np.testing": lambda xp, x, ids: np.testing.assert_allclose(x, x),
    "memoryview": lambda xp, x, ids: memoryview(x),
    "xp.array of a list of arrays": lambda xp, x, ids: xp.array([x, x]),
    "range of an array": lambda xp, x, ids: range(ids[0, 0]),
    "list indexed by an array": lambda xp, x, ids: ["a", "b", "c"][ids[0, 0]],
}
NUMPY_NUMBERS = {
    "np.sqrt(n)": lambda xp, x, ids: x * np.sqrt(2),
    "np.float64 first": lambda xp, x, ids: np.float64(2.0) * x,
    "np.float32 too": lambda xp, x, ids: x / np.float32(2.0),
    "np.int64": lambda xp, x, ids: ids + np.int64(1),
    "xp.where with np.float64": lambda xp, x, ids: xp.where(x > 1, x, np.float64(0)),
    "xp.maximum with np.float64": lambda xp, x, ids: xp.maximum(x, np.float64(1)),
    "finfo's numbers": lambda xp, x, ids: x + xp.finfo(x.dtype).eps,
    "assigned": lambda xp, x, ids: set_in(x, 0, np.float64(1)),
}
NOT_IN_CUPY_13 = {
    "put_along_axis": lambda xp, x, ids: xp.put_along_axis(x, ids % 2, 0.0, axis=-1),
    "permute_dims": lambda xp, x, ids: xp.permute_dims(x, (1, 0)),
    "concat": lambda xp, x, ids: xp.concat([x, x]),
    "xp.astype": lambda xp, x, ids: xp.astype(x, xp.float64),
    "xp.pow": lambda xp, x, ids: xp.pow(x, 2),
    ".byteswap": lambda xp, x, ids: x.byteswap(),
}
NOT_IN_CUPY = {
    ".mT": lambda xp, x, ids: x.mT,
    "errstate": lambda xp, x, ids: xp.errstate(over="ignore"),
    "xp.sum(where=)": lambda xp, x, ids: xp.sum(x, where=x > 1),
    ".sum(where=)": lambda xp, x, ids: x.sum(where=x > 1),
    ".mean(where=)": lambda xp, x, ids: x.mean(where=x > 1),
    ".max(initial=)": lambda xp, x, ids: x.max(initial=0.0),
    "ufunc where=": lambda xp, x, ids: xp.log(x, where=x > 1, out=xp.zeros_like(x)),
    "clip(min=, max=)": lambda xp, x, ids: xp.clip(x, min=0.0, max=1.0),
    "einsum(out=)": lambda xp, x, ids: xp.einsum("ij,ij->ij", x, x, out=xp.zeros_like(x)),
    "argsort(stable=)": lambda xp, x, ids: x.argsort(stable=True),
}
NOT_IN_MINIRLHF = {
    "xp.random": lambda xp, x, ids: xp.random.default_rng(0),
    "xp.linalg": lambda xp, x, ids: xp.linalg.norm(x),
    "maximum.reduce": lambda xp, x, ids: xp.maximum.reduce(x),
    "maximum.accumulate": lambda xp, x, ids: xp.maximum.accumulate(x),
    "maximum.at": lambda xp, x, ids: xp.maximum.at(x, (0, 0), 1.0),
    "@=": lambda xp, x, ids: exec("x @= x", {"x": x.copy()}),
    "list into a ufunc": lambda xp, x, ids: xp.exp([1.0, 2.0]),
    "list + array": lambda xp, x, ids: [1.0, 2.0] + x,
    ".base": lambda xp, x, ids: x[0].base,
    ".data": lambda xp, x, ids: x.data,
    ".flat": lambda xp, x, ids: x.flat,
}
cupy = fakegpu_file.cupy
needs_cupy = pytest.mark.skipif(cupy is None, reason="cupy is not installed")
needs_cupy_13 = pytest.mark.skipif(
    cupy is None or not cupy.__version__.startswith("13."), reason="cupy 13, the floor, is not here"
)
MISTAKES = [
    pytest.param(mistake, id=f"{group}: {name}", marks=marks)
    for group, table, marks in [
        ("mixed", MIXED, ()),
        ("numpy on a device array", NUMPY_ON_DEVICE, ()),
        ("numpy number", NUMPY_NUMBERS, ()),
        ("not in cupy", NOT_IN_CUPY, needs_cupy),
        ("not in cupy 13", NOT_IN_CUPY_13, needs_cupy_13),
        ("not in minirlhf", NOT_IN_MINIRLHF, ()),
    ]
    for name, mistake in table.items()
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_pass_on_numpy_and_are_refused_here(mistake):
    mistake(np, HOST.copy(), IDS.copy())  # or the refusal below would prove nothing
    with pytest.raises((TypeError, AttributeError)):
        mistake(fakegpu, fakegpu.asarray(HOST), fakegpu.asarray(IDS))


@needs_cupy
def test_take_along_axis_needs_its_axis():  # NumPy below 2.3 refuses too, so not in the table
    x, ids = fakegpu.asarray(HOST), fakegpu.asarray(IDS % 2)
    with pytest.raises(TypeError, match="axis"):
        fakegpu.take_along_axis(x, ids)
    assert fakegpu.take_along_axis(x, ids, axis=-1).shape == (2, 2)


# Legal code, as the package writes it: x, y (B, T, C) floats, ids (B, T) with 0 <= ids < C.
LEGAL = {
    "arithmetic": lambda xp, x, y, ids: (2 * x - y / 3.0) ** 2 + (-x) % 2.0 - 1 // (1.0 + y * y),
    "comparison": lambda xp, x, y, ids: ((x > y) & (y >= 0.0)) | ~(x != 1.0),
    "integers": lambda xp, x, y, ids: (1 << ids) + (ids ^ 1) - (ids >> 1),
    "matmul": lambda xp, x, y, ids: x @ y.swapaxes(-1, -2),
    "matmul into a buffer": lambda xp, x, y, ids: xp.matmul(
        x, y.swapaxes(-1, -2), out=xp.empty((*x.shape[:2], x.shape[1]), dtype=x.dtype)
    ),
    "einsum": lambda xp, x, y, ids: xp.einsum("btc,btc->bt", x, y),
    "reductions": lambda xp, x, y, ids: [
        x.sum(), x.mean(axis=-1, keepdims=True), xp.square(x).sum(axis=(0, 1)), x.max(axis=-1),
        xp.sum(x, axis=0), ids.argmax(), x.any(), xp.count_nonzero(ids), xp.allclose(x, x),
    ],
    "log-softmax": lambda xp, x, y, ids: (
        (z := x - x.max(axis=-1, keepdims=True)) - xp.log(xp.exp(z).sum(axis=-1, keepdims=True))
    ),
    "gather": lambda xp, x, y, ids: xp.take_along_axis(x, ids[..., None], axis=-1)[..., 0],
    "one-hot": lambda xp, x, y, ids: xp.where(xp.arange(x.shape[-1]) == ids[..., None], x, 0.0),
    "rows, columns, steps": lambda xp, x, y, ids: [x[0], x[:, -1], x[..., ::2, None], x[-1, 0, 0]],
    "index by an array": lambda xp, x, y, ids: x[0, 0][ids],
    "boolean index": lambda xp, x, y, ids: x[x > 0.0],
    "scatter-add": lambda xp, x, y, ids: (
        table := xp.zeros((x.shape[-1], x.shape[-1]), dtype=x.dtype), xp.add.at(table, ids, y),
    ),
    "assignment": lambda xp, x, y, ids: (
        z := x.copy(), set_in(z, (slice(None), 0), 1.0), set_in(z, z < 0.0, 0.0),
        set_in(z, -1, y[0]),
    ),
    "in place": lambda xp, x, y, ids: (
        z := x.copy(), in_place(z, "iadd", y), in_place(z, "imul", 0.5), in_place(z, "isub", y[:1]),
        in_place(z, "itruediv", 3), xp.exp(z, out=z), xp.multiply(z, y, out=z), z.fill(2.0),
    ),
    "joining": lambda xp, x, y, ids: [xp.concatenate([x, y], axis=1), xp.stack([x, y])],
    "casting": lambda xp, x, y, ids: [
        x.astype(xp.float64), ids.astype(x.dtype, copy=False), x * (y > 0.0), xp.asarray(x),
    ],
    "shapes": lambda xp, x, y, ids: [
        x.reshape(-1, x.shape[-1]), x.transpose(0, 2, 1), x.T, x.ravel(), xp.full_like(x, 2.0),
        xp.broadcast_to(x[:1], x.shape), x.shape, x.ndim, x.size, x.dtype, len(x), x[0].nbytes,
    ],
    "unpacking": lambda xp, x, y, ids: [row * 2.0 for row in x],
    "inverse cdf": lambda xp, x, y, ids: (
        cdf := xp.exp(x).cumsum(axis=-1, dtype=xp.float64),
        xp.minimum((cdf <= 0.3 * cdf[..., -1:]).sum(-1), (cdf < cdf[..., -1:]).sum(-1)),
    ),
    "clip and constants": lambda xp, x, y, ids: [xp.clip(x, -xp.pi, 1.0), x[xp.newaxis]],
    "finfo as a Python number": lambda xp, x, y, ids: x + float(xp.finfo(x.dtype).eps),
}  # fmt: skip


@st.composite
def batches(draw):
    B, T, C = (draw(st.integers(1, 3)) for _ in range(3))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x, y = rng.standard_normal((2, B, T, C)).astype(dtype)
    return x, y, rng.integers(C, size=(B, T))


def flatten(result):
    return (
        [x for part in result for x in flatten(part)]
        if isinstance(result, (list, tuple))
        else [result]
    )


@pytest.mark.parametrize("code", LEGAL.values(), ids=LEGAL)
@given(batches())
def test_legal_code_gives_what_numpy_gives(code, batch):
    expected = flatten(code(np, *(a.copy() for a in batch)))
    got = flatten(code(fakegpu, *map(fakegpu.asarray, batch)))
    assert len(got) == len(expected)
    for e, g in zip(expected, got, strict=True):
        if isinstance(g, FakeArray):
            assert (g.shape, g.dtype) == (np.shape(e), np.asarray(e).dtype)
            np.testing.assert_array_equal(g.get(), e)
        else:  # None, a shape, a length: never an array or a NumPy number
            assert type(g) is type(e) and g == e and not isinstance(g, (np.ndarray, np.generic))


def test_results_stay_on_the_device():
    x = fakegpu.asarray(HOST)
    for result in (x.sum(), x[0, 0], x.mean(), fakegpu.max(x), x > 1, fakegpu.array_equal(x, x)):
        assert type(result) is FakeArray


def test_moving_copies():
    h = HOST.copy()
    x = fakegpu.asarray(h)
    back = x.get()
    h += 1.0
    back += 1.0
    np.testing.assert_array_equal(x.get(), HOST)
    assert fakegpu.asarray(x) is x
    assert copy.deepcopy(x).get().tolist() == HOST.tolist()


def test_views_and_out_share_memory_as_on_the_device():
    x, buffer = fakegpu.asarray(HOST), fakegpu.zeros((2, 2), dtype=fakegpu.float32)
    assert fakegpu.exp(x, out=buffer) is buffer
    buffer[0] += 1.0
    buffer.T[1] *= 0.0
    np.testing.assert_allclose(buffer.get(), [[np.exp(0.5) + 1, 0], [np.exp(1.5), 0]], rtol=1e-6)


WAITING = {
    "get": lambda x: x.get(),
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "bool": lambda x: bool(x.sum()),
    "if": lambda x: 1 if x.any() else 0,
    "in": lambda x: 0.5 in x[0],
    "max of Python": lambda x: max(x[0]),
    "f-string": lambda x: f"{x.sum():.3f}",
    "str": lambda x: str(x),
    "boolean index": lambda x: x[x > 1.0],
    "nonzero": lambda x: x.nonzero(),
    "where with one argument": lambda x: fakegpu.where(x > 1.0),
    "flatnonzero": lambda x: fakegpu.flatnonzero(x),
    "to_host": lambda x: to_host(x),
}


@pytest.mark.parametrize("code", WAITING.values(), ids=WAITING)
def test_every_wait_for_the_device_is_counted(code):
    x = fakegpu.asarray(HOST)
    before = fakegpu.sync_count
    code(x)
    assert fakegpu.sync_count > before
    with pytest.raises(AssertionError, match="waits for the device"), fakegpu.no_sync():
        code(x)
    code(x)  # allowed again


def test_arithmetic_does_not_wait():
    x = fakegpu.asarray(HOST)
    before = fakegpu.sync_count
    with fakegpu.no_sync():
        y = fakegpu.where(x > 0.5, fakegpu.exp(x), 0.0) @ x.T
        y /= y.sum(axis=-1, keepdims=True)
        y[y < 0.1] = 0.0
        assert (len(y), y.shape, y.dtype) == (2, (2, 2), np.float32)
        a, _ = x
        assert repr(a)
    assert fakegpu.sync_count == before


def test_it_joins_the_backend():
    x = fakegpu.asarray(HOST)
    assert get_xp(x, x) is fakegpu
    with pytest.raises(TypeError):
        get_xp(x, HOST)
    np.testing.assert_array_equal(to_host(x), HOST)


def test_fixture_moves_there_and_back(xp):
    x = xp.asarray(HOST)
    assert get_xp(x) is xp
    np.testing.assert_array_equal(to_host(x + 1), HOST + 1)
