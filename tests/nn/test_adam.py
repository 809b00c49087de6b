"""The optimiser: Adam's formula, the schedules, the clip, and what a bad gradient may not do."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_params
from tolerances import LOOPS, assert_close, assert_trees_close

from minirlhf import workers
from minirlhf.crew import side_by_side
from minirlhf.errors import InputError
from minirlhf.nn.adam import adamw_step, clip_global_norm, decay_mask, init_adamw, scheduled_lr
from minirlhf.train.optimizer import NonFiniteError, Optimizer
from minirlhf.train.settings import OptimizerConfig
from minirlhf.tree import global_norm, tree_copy, tree_items, tree_map

SETTINGS = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.98, "eps": 1e-3}


def run(theta, gradients, **settings):
    """Parameters after each of the gradients."""
    flat, path = theta.copy(), []
    state = init_adamw(flat)
    for g in gradients:
        state = adamw_step(flat, g, state, **{**SETTINGS, **settings})
        path.append(flat.copy())
    assert state.step == len(gradients)
    return path


@st.composite
def problems(draw):
    n, steps = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return rng.standard_normal(n), scale * rng.standard_normal((steps, n))


# -- the formula ---------------------------------------------------------------------------------


@given(problems(), st.sampled_from([0.0, 0.1]), st.sampled_from(["torch", "tf"]))
def test_adamw(problem, decay, form):
    theta, gradients = problem
    lr, b1, b2, eps = SETTINGS.values()
    expected = theta.tolist()
    m, v = [0.0] * len(expected), [0.0] * len(expected)
    for k, g in enumerate(gradients.tolist(), start=1):
        for i in range(len(expected)):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            expected[i] -= lr * decay * expected[i]  # first, as torch does
            if form == "torch":
                m_hat, v_hat = m[i] / (1 - b1**k), v[i] / (1 - b2**k)
                expected[i] -= lr * m_hat / (math.sqrt(v_hat) + eps)
            else:
                step_size = lr * math.sqrt(1 - b2**k) / (1 - b1**k)
                expected[i] -= step_size * m[i] / (math.sqrt(v[i]) + eps)
    got = run(theta, gradients, weight_decay=decay, form=form)[-1]
    assert_close(got, expected)


@pytest.mark.parametrize("form", ["torch", "tf"])
def test_the_first_step_is_the_sign_of_the_gradient(form):
    gradient = np.array([3.0, -1e-3, 50.0])
    (theta,) = run(np.zeros(3), [gradient], eps=1e-30, form=form)
    assert_close(theta, -0.01 * np.sign(gradient))  # mhat = g, sqrt(vhat) = |g|


@given(problems())
def test_tensorflows_rule_is_torchs_with_a_smaller_eps(problem):
    """eps_hat = eps sqrt(1 - b2^k) makes them equal; with the same eps TensorFlow steps less."""
    theta, gradients = problem
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for k, g in enumerate(gradients, start=1):
        flat = {}
        eps_hat = SETTINGS["eps"] * math.sqrt(1 - SETTINGS["beta2"] ** k)
        for name, form, eps in [
            ("torch", "torch", SETTINGS["eps"]),
            ("tf", "tf", eps_hat),
            ("tf, same eps", "tf", SETTINGS["eps"]),
        ]:
            flat[name] = theta.copy()
            state = init_adamw(theta)._replace(step=k - 1, mean=m.copy(), var=v.copy())
            state = adamw_step(flat[name], g, state, **{**SETTINGS, "eps": eps}, form=form)
        assert_close(flat["tf"], flat["torch"])
        assert (np.abs(flat["tf, same eps"] - theta) <= np.abs(flat["torch"] - theta)).all()
        m, v = state.mean, state.var


def test_decay_works_on_the_parameter_and_not_through_the_gradient():
    theta = np.array([2.0, -4.0])
    (plain,) = run(theta, [np.ones(2)])
    (decayed,) = run(theta, [np.ones(2)], weight_decay=np.array([0.5, 0.0]))
    assert_close(decayed - plain, [-0.01 * 0.5 * 2.0, 0.0])


def test_decay_spares_biases_and_layer_norms():
    params = make_params()
    mask = decay_mask(params)
    offset = 0
    for path, leaf in tree_items(params):
        here = mask[offset : offset + leaf.size]
        offset += leaf.size
        assert (here == (0.0 if path.endswith((".b", "bias", "gain")) else 1.0)).all(), path
    assert offset == len(mask) and mask.dtype == np.float64


def test_adam_updates_in_place_and_keeps_the_dtype():
    flat, gradient = np.ones(3, dtype=np.float32), np.ones(3, dtype=np.float32)
    view, before = flat[1:], gradient.copy()
    state = adamw_step(flat, gradient, init_adamw(flat), learning_rate=0.1, weight_decay=0.1)
    assert {flat.dtype, state.mean.dtype, state.var.dtype} == {np.dtype(np.float32)}
    assert (view < 1).all()  # a view sees the update
    assert_close(gradient, before, 0.0)


@pytest.mark.parametrize("eps", [0.0, 1e-46, -1e-8, math.nan])
def test_an_eps_that_is_0_in_float32_is_refused(eps):
    """A parameter that never had a gradient would move by 0 / 0."""
    flat = np.ones(2, dtype=np.float32)
    with pytest.raises(ValueError, match=f"adamw: expected eps > 0, .*; got {eps}"):
        adamw_step(flat, 0 * flat, init_adamw(flat), learning_rate=0.1, eps=eps)
    adamw_step(flat, 0 * flat, init_adamw(flat), learning_rate=0.1, eps=1e-30)
    assert (flat == 1).all()


def test_another_form_is_refused():
    with pytest.raises(ValueError, match='expected form "torch" or "tf"; got \'jax\''):
        adamw_step(np.ones(1), np.ones(1), init_adamw(np.ones(1)), learning_rate=1.0, form="jax")


# -- schedules and clip --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [2.0, 1.5, 1.0, 0.5, 0.0]),
        ("cosine", [2.0, 1 + math.cos(math.pi / 4), 1.0, 1 - math.cos(math.pi / 4), 0.0]),
        ("constant", [2.0] * 5),
    ],
)
def test_schedules(kind, expected):
    got = [scheduled_lr(step, peak=2.0, total=4, kind=kind) for step in range(5)]
    assert got == pytest.approx(expected, abs=LOOPS)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_warm_up_and_floor(kind):
    settings = {"peak": 2.0, "total": 12, "warmup": 4, "kind": kind, "floor": 0.1}
    rates = [scheduled_lr(step, **settings) for step in range(20)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])  # never 0, and the peak at the end
    assert rates[4] == pytest.approx(2.0)
    end = 2.0 if kind == "constant" else 0.2
    assert rates[12:] == pytest.approx([end] * 8)  # and it stays there
    assert all(a >= b - LOOPS for a, b in zip(rates[4:], rates[5:], strict=False))
    middle = {"linear": 1.1, "cosine": 1.1, "constant": 2.0}[kind]  # (2 + 0.2) / 2
    assert rates[8] == pytest.approx(middle)


def test_schedules_refuse_another_kind():
    with pytest.raises(ValueError, match="expected linear, cosine or constant; got 'step'"):
        scheduled_lr(0, peak=1.0, total=1, kind="step")


@given(st.integers(1, 5), st.floats(0.01, 100), st.integers(0, 99))
def test_clip(n, max_norm, seed):
    g = 3 * np.random.default_rng(seed).standard_normal(n)
    norm = math.sqrt(sum(x * x for x in g.tolist()))
    clipped, got = clip_global_norm(g.copy(), max_norm)
    assert float(got) == pytest.approx(norm)
    factor = min(1.0, max_norm / (norm + 1e-6))
    assert_close(clipped, [factor * x for x in g.tolist()])
    assert clipped.dtype == g.dtype
    assert np.linalg.norm(clipped) <= max_norm * (1 + LOOPS)
    half, _ = clip_global_norm(g.astype(np.float32), max_norm)
    assert half.dtype == np.float32


def test_clip_keeps_zero_and_takes_infinity():
    clipped, norm = clip_global_norm(np.zeros(3), 1.0)
    assert (clipped == 0).all() and norm == 0
    g = np.array([3.0, 4.0])
    assert_close(clip_global_norm(g.copy(), float("inf"))[0], g, 0.0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("max_norm", "whole"), [(0.0, 1 << 15), (2.0, 7)])
@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_piece_by_piece_it_is_the_same_update(n_workers, max_norm, whole, decay, monkeypatch):
    """To the last bit, by any number of workers; but pieces order the sum of the norm."""
    params, found = make_params(), []
    for piece, n in ((whole, 1), (7, n_workers)):
        monkeypatch.setattr(workers, "PIECE", piece)
        with side_by_side(n):
            optimizer = optimizer_of(params, weight_decay=decay, max_grad_norm=max_norm)
            for step in range(3):
                norm = optimizer.step(gradients_like(params, seed=step), loss=0.0)["grad_norm"]
        found.append((optimizer.flat, optimizer.dflat, *optimizer.state[1:]))
        assert norm == pytest.approx(global_norm(gradients_like(params, seed=2)), rel=1e-6)
    assert all(map(np.array_equal, *found))


# -- the optimiser -------------------------------------------------------------------------------


def gradients_like(params, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return tree_map(lambda a: (scale * rng.standard_normal(a.shape)).astype(a.dtype), params)


def optimizer_of(params, *, total_steps=10, **settings):
    return Optimizer(params, OptimizerConfig(**settings), total_steps=total_steps)


def test_the_optimiser_is_adamw_on_all_tensors_with_schedule_and_clip():
    params = make_params()
    settings = {"learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 2.0, "warmup": 2}
    optimizer = optimizer_of(params, **settings, schedule="cosine", beta2=0.98, form="tf")
    flat = np.concatenate([leaf.ravel() for _, leaf in tree_items(params)])
    state, decay = init_adamw(flat), decay_mask(params)
    for step in range(4):
        gradients = gradients_like(params, seed=step)
        step_said = optimizer.step(gradients, loss=0.0)
        assert step_said["grad_norm"] == pytest.approx(global_norm(gradients))
        dflat = np.concatenate([leaf.ravel() for _, leaf in tree_items(gradients)])
        lr = scheduled_lr(step, peak=0.01, total=10, warmup=2, kind="cosine")
        state = adamw_step(
            flat,
            clip_global_norm(dflat, 2.0)[0],
            state,
            learning_rate=lr,
            beta2=0.98,
            eps=1e-5,
            weight_decay=0.1 * decay,
            form="tf",
        )
    assert_close(optimizer.flat, flat)
    assert [path for path, _ in tree_items(optimizer.params)] == [p for p, _ in tree_items(params)]


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": 0.02},
        {"schedule": "constant"},
        {"warmup": 3},
        {"floor": 0.5},
        {"beta1": 0.5},
        {"beta2": 0.5},
        {"eps": 1e-2},
        {"weight_decay": 0.5},
        {"max_grad_norm": 0.01},
        {"form": "tf"},
    ],
    ids=str,
)
def test_every_setting_does_something(setting):
    params, base = make_params(), {"learning_rate": 0.01, "eps": 1e-3, "max_grad_norm": 0.1}
    ends = []
    for settings in (base, {**base, **setting}):
        optimizer = optimizer_of(params, **settings)
        for step in range(3):
            optimizer.step(gradients_like(params, seed=step), loss=0.0)
        ends.append(optimizer.flat)
    assert np.abs(ends[0] - ends[1]).max() > 1e-5


def test_no_clip_is_no_clip():
    params = make_params()
    free, wide = (optimizer_of(params, max_grad_norm=c, eps=1.0) for c in (0.0, 1e9))
    for optimizer in (free, wide):
        optimizer.step(gradients_like(params, scale=100.0), loss=0.0)
    assert_close(free.flat, wide.flat)


def test_the_optimiser_owns_its_parameters():
    """It writes into its own buffer: a snapshot taken before, and the tree it was given, stay."""
    params = make_params()
    given_copy = tree_copy(params)
    optimizer = optimizer_of(params)
    old = tree_copy(optimizer.params)
    optimizer.step(gradients_like(params), loss=0.0)
    assert_trees_close(params, given_copy, 0.0)
    assert_trees_close(old, given_copy, 0.0)
    moved = tree_map(lambda a, b: np.abs(a - b).max(), optimizer.params, params)
    assert all(distance > 0 for _, distance in tree_items(moved))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(bad, max_grad_norm, dtype):
    params = make_params(dtype=dtype)
    optimizer = optimizer_of(params, max_grad_norm=max_grad_norm)
    optimizer.step(gradients_like(params), loss=0.5)
    before = optimizer.state_tree()
    before = {name: array.copy() for name, array in before.items()}
    gradients = gradients_like(params, seed=1)
    gradients["transformer"]["blocks"][1]["mlp"]["up"]["w"][0, 0] = bad
    with pytest.raises(NonFiniteError, match=r"transformer\.blocks\.1\.mlp\.up\.w is not finite"):
        optimizer.step(gradients, loss=0.5)
    after = optimizer.state_tree()
    for name, array in before.items():
        assert_close(after[name], array, 0.0)
    optimizer.step(gradients_like(params, seed=1), loss=0.5)  # and it can go on


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(loss):
    params = make_params()
    optimizer = optimizer_of(params)
    with pytest.raises(NonFiniteError, match=rf"the loss \({loss}\) is not finite: lower"):
        optimizer.step(gradients_like(params), loss=loss)
    assert_trees_close(optimizer.params, params, 0.0)
    assert optimizer.state.step == 0
    assert issubclass(NonFiniteError, InputError)  # one sentence on the command line


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_saved_state_goes_on_bit_for_bit(dtype):
    params = make_params(dtype=dtype)
    settings = {"weight_decay": 0.1, "warmup": 2, "schedule": "cosine"}
    straight = optimizer_of(params, **settings)
    for step in range(6):
        straight.step(gradients_like(params, seed=step), loss=0.0)
    first = optimizer_of(params, **settings)
    for step in range(3):
        first.step(gradients_like(params, seed=step), loss=0.0)
    saved = {name: array.copy() for name, array in first.state_tree().items()}
    second = optimizer_of(make_params(seed=9, dtype=dtype), **settings)
    views = second.params
    second.load_state_tree(saved)
    assert_trees_close(views, first.params, 0.0)  # whoever held the parameters sees them
    assert second.learning_rate == first.learning_rate
    for step in range(3, 6):
        second.step(gradients_like(params, seed=step), loss=0.0)
    for name, array in straight.state_tree().items():
        assert_close(second.state_tree()[name], array, 0.0)
    # What was loaded is the optimiser's own: training on leaves the checkpoint as it was.
    assert_close(saved["mean"], first.state_tree()["mean"], 0.0)


def test_gradients_are_matched_by_name_and_not_by_order():
    params = {"a": np.zeros(2), "b": np.zeros(3)}
    gradients = {"b": np.full(3, -1.0), "a": np.full(2, 1.0)}
    optimizer = optimizer_of(params)
    optimizer.step(gradients, loss=0.0)
    assert (optimizer.params["a"] < 0).all() and (optimizer.params["b"] > 0).all()
