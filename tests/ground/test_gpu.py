"""CuPy on a GPU gives NumPy's numbers. Skipped where there is none."""

import functools

import numpy as np
import pytest
from kernel_cases import CASES, compare
from tiny import CONFIG, Letters, generated, make_ids, make_params, moved, ppo_step
from tolerances import CUPY_PAIR, CUPY_UPDATE, assert_close

from minirlhf.app.cases import TABLE, Draw
from minirlhf.backend import array_module, get_xp, to_device, to_host
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.train.batches import pad_batch
from minirlhf.train.settings import OptimizerConfig, PPOConfig
from minirlhf.tree import tree_items

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture(autouse=True, params=["1", "0"], ids=["kernels", "plain"])
def with_kernels_and_without(request, monkeypatch):
    """Everything twice: as kernels.cu, and operation by operation."""
    monkeypatch.setenv("MINIRLHF_KERNELS", request.param)


def there(value):
    return moved(value, lambda array: to_device(array, "cuda"))


def assert_same(on_gpu, expected, tolerance):
    """Trees of arrays: there they lie on the GPU, here they are NumPy's."""
    ours, theirs = list(tree_items(on_gpu)), list(tree_items(expected))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert get_xp(a) is array_module("cuda")
        assert a.dtype == b.dtype
        assert_close(to_host(a), b, tolerance)


def test_there_and_back():
    for x in (np.arange(6.0).reshape(2, 3), np.float32([1.5]), np.array([[1, 2]])):
        y = to_device(x, "cuda")
        assert get_xp(y) is array_module("cuda") and y.dtype == x.dtype
        assert_close(to_host(y), x, 0.0)
        y += 1
        assert_close(to_host(to_device(x, "cuda")), x, 0.0)


@DTYPES
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_pairs(row, dtype):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        arrays, constants = moved(
            row.make(Draw(rng)), lambda a: a.astype(dtype) if a.dtype == np.float64 else a
        )
        out, cache = row.forward(*arrays, **constants)
        dout = np.asarray(rng.standard_normal(np.shape(out)), dtype=dtype)
        gradients = row.backward(dout, cache)
        device_arrays, device_constants = there((arrays, constants))
        device_out, device_cache = row.forward(*device_arrays, **device_constants)
        device_gradients = row.backward(there(dout), device_cache)
        if not isinstance(gradients, tuple):
            gradients, device_gradients = (gradients,), (device_gradients,)
        assert_same(device_out, np.asarray(out), CUPY_PAIR[dtype])
        assert_same(list(device_gradients), list(gradients), CUPY_PAIR[dtype])


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_cases_of_the_kernels(name, dtype):
    make, _ = CASES[name]
    there = {"move": functools.partial(to_device, device="cuda"), "tolerance": CUPY_PAIR[dtype]}
    for seed in range(5):
        compare(make(Draw(np.random.default_rng(seed))), dtype, **there)


@DTYPES
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5, "top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}],
    ids=str,
)
def test_the_same_ids_are_sampled(settings, dtype):
    params = make_params(seed=3, dtype=dtype)["transformer"]
    ids = make_ids(np.random.default_rng(0).integers(1, 6, size=40))
    batch = pad_batch(ids, [[]] * 40, pad_id=Letters.pad, config=CONFIG, dtype=dtype)

    def run(params, batch):
        return generated(params, batch, **settings)

    expected, got = run(params, batch), run(*there((params, batch)))
    assert_same([got.tokens, got.mask], [expected.tokens, expected.mask], 0.0)
    real = expected.mask[:, -6:, None] > 0  # anything stands at padding
    hidden = (np.where(real, h, 0.0) for h in (to_host(got.hidden), expected.hidden))
    assert_close(*hidden, CUPY_PAIR[dtype])
    assert len({tuple(row) for row in expected.tokens[:, -6:]}) > 3


@DTYPES
@pytest.mark.parametrize("kl_mode", KL_MODES)
def test_one_ppo_update(kl_mode, dtype):
    settings = PPOConfig(
        kl_mode=kl_mode,
        batch_size=6,
        epochs=2,
        minibatches=2,
        micro_batch_size=2,
        ent_coef=0.1,
        value_clip_eps=0.2,
        optimizer=OptimizerConfig(weight_decay=0.1),
    )
    ids, mask, flat, metrics = ppo_step("cpu", settings=settings, dtype=dtype)
    device_ids, device_mask, device_flat, device_metrics = ppo_step(
        "cuda", settings=settings, dtype=dtype
    )
    assert device_ids == ids
    assert_close(device_mask, mask, 0.0)
    assert_close(device_flat, flat, CUPY_UPDATE[dtype])
    assert device_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert device_metrics[name] == pytest.approx(value, rel=1e-2, abs=1e-3), name


def test_two_runs_with_one_seed_give_the_same_ids():
    """Atomic adds may differ in the last bits from run to run; what is sampled may not."""
    runs = [ppo_step("cuda", settings=PPOConfig(batch_size=6, epochs=1)) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert_close(runs[0][2], runs[1][2], CUPY_UPDATE[np.float64])
