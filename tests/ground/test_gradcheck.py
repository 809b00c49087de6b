"""The checker is checked: errors planted in right backwards are refused, right ones never are."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from minirlhf.app import check
from minirlhf.app.cases import TABLE, Draw, make_block
from minirlhf.app.check import WHOLE_LOSSES, check_command
from minirlhf.gradcheck import (
    GradientError,
    absolute_term,
    argument_names,
    central_difference,
    check_directions,
    check_pair,
    complex_step,
    directional_derivative,
    relative_error,
)
from minirlhf.nn import heads, layers, transformer
from minirlhf.nn.attention import attention_backward
from minirlhf.nn.layers import (
    embedding_backward,
    embedding_forward,
    gelu_backward,
    gelu_forward,
    layernorm_backward,
    layernorm_forward,
    linear_backward,
    linear_forward,
)
from minirlhf.nn.transformer import block_backward, block_forward
from minirlhf.tree import tree_items, tree_map

FEWER = settings(max_examples=settings().max_examples // 5 or 1)


@st.composite
def arrays(draw, shape, *, scales=(0.1, 1.0, 3.0), offsets=(0.0, 1.0)):
    """A float64 normal array; Hypothesis draws shape, scale, offset and seed, not the entries."""
    shape = draw(shape)
    scale, offset = draw(st.sampled_from(scales)), draw(st.sampled_from(offsets))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.asarray(scale * rng.standard_normal(shape) + offset)


def shapes(*, min_dims=1, max_dims=3):
    return array_shapes(min_dims=min_dims, max_dims=max_dims, max_side=4)


def layernorm_arguments(seed=0, shape=(2, 3, 5)):
    rng = np.random.default_rng(seed)
    C = shape[-1]
    return rng.standard_normal(shape), rng.standard_normal(C), rng.standard_normal(C)


def then(backward, change):
    """The backward with its gradients, a list, changed by `change`."""

    def wrong(dout, cache):
        gradients = backward(dout, cache)
        if not isinstance(gradients, tuple):
            return change([gradients])[0]
        return tuple(change(list(gradients)))

    return wrong


def changed(tree, path, change):
    """The tree with change(leaf) in place of the leaf at `path`."""
    paths = (p for p, _ in tree_items(tree))
    return tree_map(lambda leaf: change(leaf) if next(paths) == path else leaf, tree)


def one_entry(factor):
    """Multiplies an array's largest entry; an array of zeros gets a first entry instead."""

    def change(a):
        a = a.copy()
        entry = np.unravel_index(np.abs(a).argmax(), a.shape)
        a[entry] = factor * a[entry] if a[entry] else 1e-3
        return a

    return change


# --- wrong numbers in single operations


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name.replace(" ", "_"))
def test_every_row_refuses_an_error_of_a_thousandth_in_one_entry(row):
    draw = Draw(np.random.default_rng(3))
    arguments, constants = row.make(draw)
    paths = [path for path, _ in tree_items(list(arguments))]
    for path in draw.rng.permutation(paths)[: 1 if row.is_model else 3]:
        wrong = then(row.backward, lambda g, path=path: changed(g, path, one_entry(1.001)))
        report = check_pair(row.forward, wrong, *arguments, raises=False, **constants)
        name, _, inside = path.partition(".")
        name = argument_names(row.forward, len(arguments))[int(name)]
        worst = max(report.findings, key=lambda f: f.error / f.tolerance)
        assert not report.ok
        assert worst.argument in ("all", f"{name}.{inside}".strip("."))


@given(st.integers(0, 2**32 - 1), st.sampled_from((0, 1, 2)), st.sampled_from((0.999, 1.001)))
def test_a_factor_on_one_gradient_is_refused(seed, i, factor):
    def change(gradients):
        gradients[i] = factor * gradients[i]
        return gradients

    with pytest.raises(GradientError, match="layernorm: WRONG"):
        check_pair(layernorm_forward, then(layernorm_backward, change), *layernorm_arguments(seed))


@given(st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_the_message_names_the_argument_and_the_entry(seed, entry):
    factor = np.ones(5)
    factor[entry] = 1.001
    _, gain, _ = arguments = layernorm_arguments(seed)
    x = arguments[0]
    xhat = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    assume(np.abs(xhat.sum((0, 1))[entry]) > 1e-3)
    wrong = then(layernorm_backward, lambda g: [g[0], g[1] * factor, g[2]])
    with pytest.raises(GradientError) as error:
        check_pair(layernorm_forward, wrong, *arguments, dout=np.ones(x.shape))
    first, second, *_ = str(error.value).splitlines()
    assert first == "layernorm: WRONG"
    assert second.split()[:4] == ["WRONG", "complex", "step", f"gain[{entry}]:"]


def test_the_message_names_the_path_into_a_tree():
    (x, p), constants = make_block(Draw(np.random.default_rng(0)))

    def change(gradients):
        gradients[1]["mlp"]["up"]["w"][2, 7] *= 1.001
        return gradients

    with pytest.raises(GradientError, match=r"WRONG complex step +p\.mlp\.up\.w\[2, 7\]: backward"):
        check_pair(block_forward, then(block_backward, change), x, p, **constants)


def without_the_mean(dy, cache):
    xhat, gain, rstd = cache
    dxhat = dy * gain
    dx = rstd * (dxhat - xhat * (dxhat * xhat).mean(axis=-1, keepdims=True))
    return dx, *layernorm_backward(dy, cache)[1:]


def without_the_variance(dy, cache):
    _, gain, rstd = cache
    dxhat = dy * gain
    dx = rstd * (dxhat - dxhat.mean(axis=-1, keepdims=True))
    return dx, *layernorm_backward(dy, cache)[1:]


def with_bessel(dy, cache):
    """The derivative for the variance with C - 1."""
    xhat, gain, rstd = cache
    C, dxhat = xhat.shape[-1], dy * gain
    along = (dxhat * xhat).sum(axis=-1, keepdims=True) / (C - 1)
    return rstd * (dxhat - dxhat.mean(axis=-1, keepdims=True) - xhat * along), *layernorm_backward(
        dy, cache
    )[1:]


def with_another_eps(dy, cache):
    rstd = 1.0 / np.sqrt(1.0 / cache.rstd**2 - 1e-5)
    return layernorm_backward(dy, cache._replace(rstd=rstd))


@pytest.mark.parametrize(
    "wrong",
    [without_the_mean, without_the_variance, with_bessel, with_another_eps],
    ids=lambda f: f.__name__,
)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_term_missing_in_layernorm_is_refused(wrong, seed):
    with pytest.raises(GradientError, match=r"WRONG \w+ \w+ +x\["):
        check_pair(layernorm_forward, wrong, *layernorm_arguments(seed))


def test_repeated_ids_must_add_up():
    def last_one_wins(dy, cache):
        dtable = np.zeros(cache.shape)
        dtable[cache.ids] = dy
        return dtable

    table = np.random.default_rng(0).standard_normal((4, 2))
    check_pair(embedding_forward, last_one_wins, table, ids=np.array([3, 1]))
    with pytest.raises(GradientError, match="table"):
        check_pair(embedding_forward, last_one_wins, table, ids=np.array([3, 1, 3]))


def test_a_gradient_in_float32_accuracy_is_refused():
    def rounded(gradients):
        return [g.astype(np.float32).astype(np.float64) for g in gradients]

    with pytest.raises(GradientError, match="complex step"):
        check_pair(layernorm_forward, then(layernorm_backward, rounded), *layernorm_arguments())


# --- wrong shapes, order, dtypes; nan


def swapped(gradients):
    return [gradients[1], gradients[0], gradients[2]]


def test_gradients_in_another_order_are_refused():
    rng = np.random.default_rng(0)
    square = rng.standard_normal((3, 3)), rng.standard_normal((3, 3)), rng.standard_normal(3)
    with pytest.raises(GradientError, match="linear: WRONG"):
        check_pair(linear_forward, then(linear_backward, swapped), *square)
    oblong = rng.standard_normal((3, 2)), rng.standard_normal((2, 4)), rng.standard_normal(4)
    with pytest.raises(GradientError, match=r"gradient of x as float64 \(3, 2\); got float64 \(2"):
        check_pair(linear_forward, then(linear_backward, swapped), *oblong)


SHAPES_AND_DTYPES = {
    "an axis too many": (lambda g: [g[0], g[1][None], g[2]], r"gain as float64 \(5,\); got .*1, 5"),
    "not summed over the rows": (lambda g: [g[0], g[0], g[2]], r"gain as float64 \(5,\)"),
    "a number": (lambda g: [g[0], g[1], 0.0], r"bias as float64 \(5,\); got float \(\)"),
    "nothing": (lambda g: [g[0], None, g[2]], r"gain as float64 \(5,\); got NoneType"),
    "float32": (lambda g: [g[0].astype(np.float32), *g[1:]], r"x as float64 .*; got float32"),
    "complex": (lambda g: [g[0] + 0j, *g[1:]], r"x as float64 .*; got complex128"),
    "one too few": (lambda g: g[:2], "expected 3 gradients, one for each of x, gain, bias; got 2"),
    "one too many": (lambda g: [*g, g[0]], "expected 3 gradients, .*; got 4"),
}


@pytest.mark.parametrize("plant", SHAPES_AND_DTYPES)
def test_a_wrong_shape_or_dtype_is_refused(plant):
    change, message = SHAPES_AND_DTYPES[plant]
    with pytest.raises(GradientError, match=message):
        check_pair(layernorm_forward, then(layernorm_backward, change), *layernorm_arguments())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_entry_that_is_not_finite_is_refused(value):
    def change(gradients):
        gradients[1][3] = value
        return gradients

    with pytest.raises(GradientError, match=r"gain\[3\]: backward -?(nan|inf)"):
        check_pair(layernorm_forward, then(layernorm_backward, change), *layernorm_arguments())


def test_a_forward_that_is_not_finite_is_refused():
    def forward(x):
        return x * np.array([1.0, math.nan]), None

    with pytest.raises(GradientError, match="WRONG"):
        check_pair(forward, lambda dout, cache: dout, np.ones(2))


def test_trees_of_gradients_must_have_the_keys_of_the_argument():
    (x, p), constants = make_block(Draw(np.random.default_rng(0)))

    def drop(gradients):
        return [gradients[0], {k: v for k, v in gradients[1].items() if k != "ln2"}]

    def reorder(gradients):
        return [gradients[0], dict(reversed(gradients[1].items()))]

    with pytest.raises(GradientError, match=r"block: .* missing are p\.ln2\.gain, p\.ln2\.bias"):
        check_pair(block_forward, then(block_backward, drop), x, p, **constants)
    with pytest.raises(GradientError, match=r"missing are p\.ln1\.gain, .*; got also p$"):
        check_pair(block_forward, then(block_backward, lambda g: [g[0], g[0]]), x, p, **constants)
    check_pair(block_forward, then(block_backward, reorder), x, p, **constants)


# --- written memory


def writes(owner):
    """A layer norm that writes into what belongs to `owner`."""

    def forward(x, gain, bias, *, scale):
        y, cache = layernorm_forward(x, gain, bias)
        if owner == "argument":
            gain += 1.0
        if owner == "constant":
            scale *= 2.0
        return y, (cache, {"scale": [scale]})

    def backward(dy, cache):
        gradients = layernorm_backward(dy, cache[0])
        if owner == "borrowed argument":
            cache[0].gain[0] = 0.0
        if owner == "cache":
            cache[0].rstd[...] *= 2.0
        if owner == "constant in the cache":
            cache[1]["scale"][0] *= 2.0
        if owner == "dout":
            dy *= 2.0
        return gradients

    return forward, backward


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ("argument", "the forward wrote into gain"),
        ("constant", "the forward wrote into scale"),
        ("borrowed argument", "the backward wrote into gain"),
        ("cache", "the backward wrote into the cache"),
        ("constant in the cache", "the backward wrote into scale"),
        ("dout", "the backward wrote into dout"),
    ],
)
def test_written_memory_is_refused(owner, message):
    forward, backward = writes(owner)
    with pytest.raises(GradientError, match=message):
        check_pair(forward, backward, *layernorm_arguments(), scale=np.ones(2))


def test_a_backward_that_counts_its_calls_is_refused():
    calls = []

    def backward(dout, cache):
        calls.append(None)
        return gelu_backward(dout, cache) * len(calls)

    with pytest.raises(GradientError, match="a second backward gave another gradient of x"):
        check_pair(gelu_forward, backward, np.ones(2))


def test_arguments_must_be_float64_arrays():
    for x in (np.ones(2, dtype=np.float32), np.ones(2, dtype=int), [1.0, 2.0], 1.0):
        with pytest.raises(ValueError, match="expected float64 arrays; x"):
            check_pair(gelu_forward, gelu_backward, x)


# --- whole models, along random directions


def whole_sft(seed):
    return WHOLE_LOSSES["supervised fine-tuning"](Draw(np.random.default_rng(seed)))


PATHS = [path for path, _ in tree_items(whole_sft(0)[1])]
WRONG_TENSORS = {
    "a thousandth": lambda g: 1.001 * g,
    "a thousandth of one entry": one_entry(1.001),
    "nothing": np.zeros_like,
    "nan in one entry": one_entry(math.nan),
}


@pytest.mark.parametrize("plant", WRONG_TENSORS)
@FEWER
@given(seed=st.integers(0, 2**32 - 1), path=st.sampled_from(PATHS))
def test_an_error_in_one_tensor_of_a_model_is_refused_by_name(plant, seed, path):
    loss, params, gradients = whole_sft(seed)
    wrong = changed(gradients, path, WRONG_TENSORS[plant])
    rng = np.random.default_rng(seed)
    check_directions(loss, params, gradients, rng=rng)
    report = check_directions(loss, params, wrong, rng=rng, raises=False)
    blamed = {f.argument for f in report.findings if f.error > f.tolerance}
    assert blamed == {"all", path}
    with pytest.raises(GradientError, match=path.replace(".", r"\.")):
        check_directions(loss, params, wrong, rng=rng)


def attention_without_the_row_sum(dout, cache):
    return attention_backward(dout, cache._replace(out=np.zeros_like(cache.out)))


def without_the_tied_share(dlogits, cache):
    dh, dwte = policy_logits_backward(dlogits, cache)
    return dh, np.zeros_like(dwte)


def one_position_off(dy, cache, **more):
    return embedding_backward(np.roll(dy, 1, axis=1), cache, **more)


policy_logits_backward = heads.logits_backward
DROPPED_TERMS = {
    "tied logits": (heads, "logits_backward", without_the_tied_share),
    "row sum of the softmax": (transformer, "attention_backward", attention_without_the_row_sum),
    "mean of the layer norm": (layers, "layernorm_backward", without_the_mean),
    "embedding of the neighbour": (layers, "embedding_backward", one_position_off),
}


@pytest.mark.parametrize("plant", DROPPED_TERMS)
def test_a_term_missing_somewhere_in_a_model_is_refused(plant, monkeypatch):
    monkeypatch.setattr(*DROPPED_TERMS[plant])
    loss, params, gradients = whole_sft(1)
    with pytest.raises(GradientError, match="direction +all:"):
        check_directions(loss, params, gradients, rng=np.random.default_rng(0))


WRONG_TREES = {
    "transposed": ("blocks.1.attn.out.w", lambda g: g.T, r"blocks\.1\.attn\.out\.w"),
    "an axis too many": ("blocks.0.ln1.gain", lambda g: g[None], r"ln1\.gain as .*; got .*\(1, 8"),
    "float32": ("ln_f.bias", lambda g: g.astype(np.float32), r"ln_f\.bias as float64.*float32"),
    "no leaf": ("wpe", lambda g: {}, r"missing are transformer\.wpe; got also none"),
}


@pytest.mark.parametrize("plant", WRONG_TREES)
def test_a_wrong_leaf_in_a_tree_is_refused(plant):
    path, change, message = WRONG_TREES[plant]
    loss, params, gradients = whole_sft(2)
    wrong = changed(gradients, f"transformer.{path}", change)
    with pytest.raises(GradientError, match=message):
        check_directions(loss, params, wrong, rng=np.random.default_rng(0))


def test_a_missing_leaf_in_a_tree_is_refused():
    loss, params, gradients = whole_sft(2)
    del gradients["transformer"]["blocks"][1]["mlp"]["down"]["b"]
    with pytest.raises(GradientError, match=r"missing are .*blocks\.1\.mlp\.down\.b;"):
        check_directions(loss, params, gradients, rng=np.random.default_rng(0))


# --- no false alarms


def softmax_forward(x):
    y = np.exp(x - x.real.max(axis=-1, keepdims=True))
    y /= y.sum(axis=-1, keepdims=True)
    return y, y


def softmax_backward(dy, y):
    return y * (dy - (dy * y).sum(axis=-1, keepdims=True))


def bilinear_forward(p, x):
    return (x @ p["w"][0]) * p["scale"], (p, x)


def bilinear_backward(dy, cache):
    p, x = cache
    w, scale = p["w"][0], p["scale"]
    dw = x.reshape(-1, x.shape[-1]).T @ (dy * scale).reshape(-1, dy.shape[-1])
    return {"w": [dw], "scale": (dy * (x @ w)).sum()}, (dy * scale) @ w.T


def absolute_forward(x):
    return np.abs(x), np.sign(x)


def absolute_backward(dy, sign):
    return dy * sign


@given(arrays(shapes(min_dims=0, max_dims=4)))
def test_right_elementwise_pairs_pass(x):
    check_pair(lambda x: (x * x * x, x), lambda dy, x: 3 * x * x * dy, x)
    check_pair(lambda x: (1 / (1 + x * x), x), lambda dy, x: -2 * x / (1 + x * x) ** 2 * dy, x)


@given(arrays(shapes(), scales=(0.1, 1.0, 30.0), offsets=(0.0, 20.0)))
def test_a_right_softmax_passes(x):
    check_pair(softmax_forward, softmax_backward, x)


@given(shapes(max_dims=2), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_right_trees_and_numbers_pass(lead, i, o, seed):
    rng = np.random.default_rng(seed)
    p = {"w": [rng.standard_normal((i, o))], "scale": np.array(rng.standard_normal())}
    check_pair(bilinear_forward, bilinear_backward, p, rng.standard_normal((*lead, i)))


@given(arrays(shapes()))
def test_a_forward_that_takes_no_complex_numbers(x):
    assume((np.abs(x) > 1e-3).all())
    report = check_pair(absolute_forward, absolute_backward, x, smooth=False)
    assert {f.method for f in report.findings} == {"central difference"}
    assert math.isnan(report.worst("complex step"))
    wrong = then(absolute_backward, lambda g: [one_entry(1.001)(g[0])])
    dout = np.ones(x.shape)
    with pytest.raises(GradientError, match="central difference"):
        check_pair(absolute_forward, wrong, x, dout=dout, smooth=False)


def test_a_report_can_be_had_without_raising():
    wrong = then(gelu_backward, lambda g: [1.001 * g[0]])
    x = np.linspace(-1, 1, 3)
    assert check_pair(gelu_forward, gelu_backward, x, name="mine").ok
    report = check_pair(gelu_forward, wrong, x, raises=False, name="mine")
    assert not report.ok
    assert str(report).startswith("mine: WRONG\n")
    assert 1e-5 < report.worst("central difference") < 1e-2
    assert 1e-5 < report.worst("complex step") < 1e-2


# --- the command


def test_the_command_finds_every_gradient_right(capsys):
    assert check_command(cases=1) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("all right") and "WRONG" not in out
    assert out.count(" ok ") == len(TABLE) + len(WHOLE_LOSSES)
    assert all(row.operation in out for row in TABLE)


def test_the_command_says_what_is_wrong(capsys, monkeypatch):
    row = next(row for row in TABLE if row.operation == "linear")
    right = WHOLE_LOSSES["supervised fine-tuning"]
    factor = then(row.backward, lambda g: [1.001 * g[0], *g[1:]])
    shape = then(row.backward, lambda g: [g[0], g[1].T[..., None], g[2]])
    rows = [row, row._replace(backward=factor, mode="factor")]
    rows += [row._replace(backward=shape, mode="shape")]

    def zeroed(draw):
        loss, params, gradients = right(draw)
        return loss, params, changed(gradients, "transformer.ln_f.bias", np.zeros_like)

    monkeypatch.setattr(check, "TABLE", rows)
    monkeypatch.setattr(check, "WHOLE_LOSSES", {"right": right, "sft": zeroed})
    assert check_command(cases=3) == 1
    out = capsys.readouterr().out
    assert out.count(" ok ") - out.count("  ok    ") == 2
    assert "linear: factor: WRONG\n  WRONG complex step       x[" in out
    assert "linear: shape: expected the gradient of w as float64" in out
    assert "sft: WRONG\n  WRONG direction          transformer.ln_f.bias: backward 0, " in out
    assert out.rstrip().endswith("WRONG: linear: factor; linear: shape; sft")


# --- the parts


@given(arrays(shapes(max_dims=2)), st.integers(0, 2**32 - 1))
def test_numeric_derivatives_of_a_known_function(x, seed):
    dout = np.random.default_rng(seed).standard_normal(x.shape)
    truth = np.exp(x) * dout

    def f(args):
        return np.exp(args[0])

    assert np.abs(central_difference(f, [x], dout)[0] - truth).max() <= 1e-6 * np.abs(truth).max()
    (numeric,) = complex_step(lambda args: (f(args) * dout).sum(), [x])
    np.testing.assert_allclose(numeric, truth, rtol=1e-14)
    along = directional_derivative(lambda args: (f(args) * dout).sum(), [x], [truth])
    np.testing.assert_allclose(along, (truth * truth).sum(), rtol=1e-13)


def test_relative_error_by_hand():
    # |1.1 - 1| / (1 + 0.01); zero where equal; never smaller than infinite for nan
    error = relative_error(np.array([1.1, 0.0, math.nan]), np.array([1.0, 0.0, 0.0]), 0.01)
    np.testing.assert_allclose(error, [0.1 / 1.01, 0.0, math.inf])


def test_the_absolute_term_by_hand():
    numerics = [np.array([0.5, -4.0]), {"w": np.array([2.0])}]
    assert absolute_term(numerics, 0.0, 1e-10) == pytest.approx(0.01 * 4)  # largest of all
    assert absolute_term(numerics, 0.0, 1e-6) == pytest.approx(0.1 * 4)
    assert absolute_term([np.zeros(2)], 0.0, 1e-10) == pytest.approx(0.01 * 0.01)
    eps = np.finfo(np.float64).eps
    assert absolute_term([], 3.0, 1e-10) == pytest.approx(1e-4 + 4 * eps * 3 / 1e-10)
    assert absolute_term([], 3.0, 1e-6) == pytest.approx(1e-3 + 4 * eps * 3 / 6e-6 / 1e-6)


def absolute_loss(x):
    return 1e-8 * np.abs(x).sum(), x


def tiny_square(x):
    return 1e-13 * (x * x).sum(), x


def small_mean(x):
    return (x * x).mean() / 1e6, x


@pytest.mark.parametrize(
    ("forward", "backward", "smooth"),
    [
        (absolute_loss, lambda dout, x: -dout * 1e-8 * np.sign(x), False),  # the wrong sign
        (tiny_square, lambda dout, x: dout * 0 * x, True),  # nothing at all
        (small_mean, lambda dout, x: dout * 1.1 * 2 * x / x.size / 1e6, False),  # 10 % too much
    ],
)
def test_errors_in_small_gradients_are_found(forward, backward, smooth):
    x = np.array([0.7, -1.3, 2.1])
    with pytest.raises(GradientError):
        check_pair(forward, backward, x, dout=np.array(1.0), smooth=smooth)


def test_argument_names_come_from_the_signature():
    def forward(x, w, *, mask):
        return x, None

    assert argument_names(forward, 2) == ["x", "w"]
    assert argument_names(lambda *arrays: None, 2) == ["argument 0", "argument 1"]


@given(st.data())
def test_strategies_draw_what_they_say(data):
    shape = data.draw(shapes(min_dims=2))
    assert 2 <= len(shape) <= 3 and all(1 <= side <= 4 for side in shape)
    x = data.draw(arrays(st.just(shape), scales=(0.0,), offsets=(7.0,)))
    assert x.shape == shape and x.dtype == np.float64 and (x == 7.0).all()
    assert data.draw(arrays(shapes())).ndim >= 1
