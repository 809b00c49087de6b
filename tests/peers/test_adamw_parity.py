"""AdamW, clipping by the global norm and the schedules against PyTorch's and transformers'."""

import math
import os

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from minirlhf.nn.adam import adamw_step, clip_global_norm, init_adamw, scheduled_lr
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.settings import OptimizerConfig
from minirlhf.tree import tree_items

pytestmark = pytest.mark.peers
torch.set_num_threads(1)

STEPS = 50
TRAJECTORY_RTOL = 1e-12  # float64; of the largest entry of each tensor


def start(dtype=np.float64):
    """Matrices and vectors of different scales."""
    rng = np.random.default_rng(0)

    def normal(scale, *shape):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    return {
        "wte": normal(1.0, 5, 4),
        "blocks": [
            {"w": normal(10.0, 4, 3), "b": normal(1.0, 3)},
            {"w": normal(0.01, 3, 1), "b": normal(1.0, 1)},
        ],
    }


def peer_of(params):
    return {path: torch.tensor(array, requires_grad=True) for path, array in tree_items(params)}


def peer_gradients(p, step):
    """Of a loss with curvature, valleys and one jump of scale; rows of wte are used in turn."""
    scale = 1e3 if step == 20 else 1.0
    used = torch.arange(len(p["wte"])) % 3 == step % 3
    hidden = torch.tanh(p["wte"][used] @ p["blocks.0.w"] + p["blocks.0.b"])
    out = hidden @ p["blocks.1.w"] + p["blocks.1.b"]
    loss = (out - math.sin(step)).square().mean() + 0.01 * p["blocks.0.w"].square().sum()
    return torch.autograd.grad(scale * loss, list(p.values()))


def as_tree(gradients):
    wte, w0, b0, w1, b1 = (g.numpy() for g in gradients)
    return {"wte": wte, "blocks": [{"w": w0, "b": b0}, {"w": w1, "b": b1}]}


def assert_same_parameters(params, p, rtol):
    for path, array in tree_items(params):
        theirs = p[path].detach().numpy()
        assert np.abs(array - theirs).max() <= rtol * np.abs(theirs).max(), path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eps": 1e-8, "beta2": 0.95},
        {"eps": 1e-3, "beta1": 0.8, "beta2": 0.98},
        {"beta1": 0.0, "beta2": 0.5},
        {"weight_decay": 0.1},
        {"weight_decay": 0.01, "learning_rate": 0.3, "eps": 1e-8},
        {"max_grad_norm": 0.5, "weight_decay": 0.1},
        {"max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_the_trajectory_is_that_of_torch(settings):
    """Optimizer, 50 steps; theirs has the decay in a param group of the matrices only."""
    config = OptimizerConfig(**{"learning_rate": 0.02, "schedule": "constant"} | settings)
    params = start()
    ours, p = Optimizer(params, config, total_steps=STEPS), peer_of(params)
    groups = [
        {"params": [t for t in p.values() if t.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [t for t in p.values() if t.ndim == 1], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps
    )
    for step in range(STEPS):
        # The gradient at the peer's parameters serves both: rounding does not build up through it.
        gradients = peer_gradients(p, step)
        for tensor, gradient in zip(p.values(), gradients, strict=True):
            tensor.grad = gradient.clone()
        peer_norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(p.values(), config.max_grad_norm)
        peer.step()
        norm = ours.step(as_tree(gradients), loss=0.0)["grad_norm"]
        assert abs(norm - peer_norm) <= 1e-13 * peer_norm
        assert_same_parameters(ours.params, p, TRAJECTORY_RTOL)
    moved = [np.abs(x - y).max() for (_, x), (_, y) in _both(ours.params, params)]
    assert min(moved) > 0.1


def _both(one, other):
    return zip(tree_items(one), tree_items(other), strict=True)


def test_the_trajectory_of_a_closed_loop():
    """The same with each side's own gradients, evaluated at its own parameters."""
    params = start()
    config = OptimizerConfig(learning_rate=0.02, schedule="constant", max_grad_norm=0.0)
    ours, p = Optimizer(params, config, total_steps=STEPS), peer_of(params)
    peer = torch.optim.AdamW(p.values(), lr=0.02, eps=config.eps, weight_decay=0.0)
    for step in range(STEPS):
        ours.step(as_tree(peer_gradients(peer_of(ours.params), step)), loss=0.0)
        for tensor, gradient in zip(p.values(), peer_gradients(p, step), strict=True):
            tensor.grad = gradient
        peer.step()
    assert_same_parameters(ours.params, p, 1e-10)


def test_the_trajectory_in_float32():
    params = start(np.float32)
    config = OptimizerConfig(learning_rate=0.02, schedule="constant", max_grad_norm=0.0)
    ours, p = Optimizer(params, config, total_steps=STEPS), peer_of(params)
    peer = torch.optim.AdamW(p.values(), lr=0.02, eps=config.eps, weight_decay=0.0)
    for step in range(STEPS):
        gradients = peer_gradients(p, step)
        for tensor, gradient in zip(p.values(), gradients, strict=True):
            tensor.grad = gradient.clone()
        peer.step()
        ours.step(as_tree(gradients), loss=0.0)
    assert ours.flat.dtype == ours.state.mean.dtype == ours.state.var.dtype == np.float32
    assert_same_parameters(ours.params, p, 1e-5)


def test_gradients_may_come_in_another_order():
    """A tree is a dict: what a file or a backward gives need not have the parameters' key order."""
    params = {"b": np.zeros(1), "w": np.ones((2, 1))}
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", max_grad_norm=0.0)
    ours = Optimizer(params, config, total_steps=1)
    ours.step({"w": np.zeros((2, 1)), "b": np.ones(1)}, loss=0.0)
    assert (ours.params["w"] == 1).all()
    assert abs(ours.params["b"][0] + 0.1 / (1 + config.eps)) < 1e-12


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_tensorflow_form_is_its_formula(eps, weight_decay):
    """alpha_t = alpha sqrt(1 - b2^t) / (1 - b1^t);  theta -= alpha_t m / (sqrt(v) + eps-hat)."""
    rng = np.random.default_rng(0)
    flat = rng.standard_normal(6)
    alpha, b1, b2 = 0.02, 0.9, 0.98
    theta, m, v = flat.tolist(), [0.0] * 6, [0.0] * 6
    state = init_adamw(flat)
    for t in range(1, STEPS + 1):
        gradient = rng.standard_normal(6) * 10.0 ** rng.integers(-6, 2)
        state = adamw_step(
            flat,
            gradient,
            state,
            learning_rate=alpha,
            beta1=b1,
            beta2=b2,
            eps=eps,
            weight_decay=weight_decay,
            form="tf",
        )
        for i in range(6):
            g = float(gradient[i])
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            alpha_t = alpha * math.sqrt(1 - b2**t) / (1 - b1**t)
            theta[i] -= alpha * weight_decay * theta[i]
            theta[i] -= alpha_t * m[i] / (math.sqrt(v[i]) + eps)
        np.testing.assert_allclose(flat, theta, rtol=1e-13)
    assert state.step == STEPS


def test_the_two_forms_agree_when_eps_is_translated():
    """The TensorFlow form with eps-hat = eps sqrt(1 - b2^t) at step t is torch.optim.AdamW."""
    rng = np.random.default_rng(1)
    flat = rng.standard_normal(6)
    peer = torch.tensor(flat, requires_grad=True)
    optimizer = torch.optim.AdamW([peer], lr=0.02, betas=(0.9, 0.98), eps=1e-2, weight_decay=0.0)
    state = init_adamw(flat)
    for t in range(1, STEPS + 1):
        gradient = rng.standard_normal(6)
        peer.grad = torch.tensor(gradient)
        optimizer.step()
        eps_hat = 1e-2 * math.sqrt(1 - 0.98**t)
        state = adamw_step(
            flat, gradient, state, learning_rate=0.02, beta2=0.98, eps=eps_hat, form="tf"
        )
        np.testing.assert_allclose(flat, peer.detach().numpy(), rtol=1e-12)


def test_with_one_eps_the_first_step_of_tensorflow_is_smaller():
    """By (|g| + eps) / (|g| + eps / sqrt(1 - b2)): much where gradients are as small as eps."""
    gradient = np.array([1e-6, 1e-4, 1.0])
    moves = {}
    for form in ("torch", "tf"):
        flat = np.zeros(3)
        adamw_step(flat, gradient, init_adamw(flat), learning_rate=1.0, eps=1e-5, form=form)
        moves[form] = -flat
    expected = (gradient + 1e-5) / (gradient + 1e-5 / math.sqrt(1 - 0.999))
    np.testing.assert_allclose(moves["tf"] / moves["torch"], expected, rtol=1e-12)


# -- the global norm -----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-14), (np.float32, 1e-6)])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 26.0, 27.0, 1e3])  # the norm is 26.4
def test_clip_by_the_global_norm(max_norm, dtype, rtol):
    rng = np.random.default_rng(0)
    parts = [s * rng.standard_normal(n).astype(dtype) for s, n in ((1.0, 400), (0.1, 7), (15.0, 1))]
    flat = np.concatenate(parts)
    peers = [torch.zeros(len(part), dtype=getattr(torch, flat.dtype.name)) for part in parts]
    for peer, part in zip(peers, parts, strict=True):
        peer.requires_grad_(True).grad = torch.tensor(part)
    peer_norm = torch.nn.utils.clip_grad_norm_(peers, max_norm).item()
    clipped, norm = clip_global_norm(flat.copy(), max_norm)
    assert clipped.dtype == dtype and 26.3 < peer_norm < 26.4
    assert abs(norm - peer_norm) <= rtol * peer_norm
    theirs = torch.cat([peer.grad for peer in peers]).numpy()
    np.testing.assert_allclose(clipped, theirs, rtol=2 * rtol)
    if max_norm > peer_norm:
        assert np.array_equal(clipped, flat)


# -- schedules -----------------------------------------------------------------------------------

# Ours and transformers' differ in the warm-up only: update k = 0, 1, .. of W has peak * (k + 1) / W
# here and peak * k / W there, where the first update is lost to a learning rate of 0. Both reach
# the peak's neighbourhood after W updates and agree from update W on, in which both have the peak.


def peer_schedule(make, peak, n, **settings):
    """The learning rates of n updates."""
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=peak)
    schedule = make(optimizer, **settings)
    rates = []
    for _ in range(n):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return np.array(rates)


@pytest.mark.parametrize(("total", "warmup"), [(40, 0), (40, 1), (40, 12), (6, 5)])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_schedules_of_transformers(kind, floor, total, warmup):
    peak = 3e-4
    counts = {"num_warmup_steps": warmup, "num_training_steps": total}
    if kind == "constant":
        theirs = peer_schedule(
            transformers.get_constant_schedule_with_warmup, peak, total, num_warmup_steps=warmup
        )
    elif kind == "cosine" and floor:
        make = transformers.get_cosine_with_min_lr_schedule_with_warmup
        theirs = peer_schedule(make, peak, total, min_lr_rate=floor, **counts)
    elif kind == "cosine":
        theirs = peer_schedule(transformers.get_cosine_schedule_with_warmup, peak, total, **counts)
    elif floor:
        make = transformers.get_polynomial_decay_schedule_with_warmup
        theirs = peer_schedule(make, peak, total, power=1.0, lr_end=floor * peak, **counts)
    else:
        theirs = peer_schedule(transformers.get_linear_schedule_with_warmup, peak, total, **counts)
    ours = np.array(
        [
            scheduled_lr(k, peak=peak, total=total, warmup=warmup, kind=kind, floor=floor)
            for k in range(total)
        ]
    )
    np.testing.assert_allclose(ours[warmup:], theirs[warmup:], rtol=1e-12)
    if warmup > 1:  # the rise: ours is theirs one update later, and ends at the peak
        np.testing.assert_allclose(ours[: warmup - 1], theirs[1:warmup], rtol=1e-12)
    if warmup:
        assert theirs[0] == 0 < ours[0]
        assert abs(ours[warmup - 1] - peak) <= 1e-15 * peak


def test_past_the_last_update_the_floor_stays():
    for kind, make in (
        ("linear", transformers.get_polynomial_decay_schedule_with_warmup),
        ("cosine", transformers.get_cosine_with_min_lr_schedule_with_warmup),
    ):
        end = {"lr_end": 0.02} if kind == "linear" else {"min_lr_rate": 0.2}
        theirs = peer_schedule(make, 0.1, 11, num_warmup_steps=2, num_training_steps=10, **end)[-1]
        ours = [
            scheduled_lr(k, peak=0.1, total=10, warmup=2, kind=kind, floor=0.2)
            for k in (10, 11, 99)
        ]
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_optimizer_follows_its_schedule(kind):
    """Optimizer.learning_rate before each of its steps, against torch.optim.lr_scheduler."""
    config = OptimizerConfig(learning_rate=0.1, schedule=kind, max_grad_norm=0.0)
    ours = Optimizer({"w": np.ones((1, 1))}, config, total_steps=8)
    rates = []
    for _ in range(8):
        rates.append(ours.learning_rate)
        ours.step({"w": np.ones((1, 1))}, loss=0.0)
    if kind == "linear":
        make = torch.optim.lr_scheduler.LinearLR
        theirs = peer_schedule(make, 0.1, 8, start_factor=1.0, end_factor=0.0, total_iters=8)
    else:
        theirs = peer_schedule(torch.optim.lr_scheduler.CosineAnnealingLR, 0.1, 8, T_max=8)
    np.testing.assert_allclose(rates, theirs, rtol=1e-12)
