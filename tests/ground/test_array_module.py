"""The same numbers on NumPy and on the strict stand-in for a GPU, and no waiting inside a step.

The stand-in refuses host arrays, NumPy's functions and names that CuPy lacks (fakegpu.py), so what
passes here has a good chance on a GPU; test_gpu.py is the proof.
"""

import numpy as np
import pytest
from fakegpu import FakeArray, fakegpu, numpy_as_on_a_gpu
from tiny import (
    CONFIG,
    Letters,
    generated,
    make_batch,
    make_ids,
    make_params,
    moved,
    ppo_step,
    sampled,
)
from tiny_run import train
from tolerances import STAND_IN, assert_close, assert_trees_close

from minirlhf import backend
from minirlhf.app.check import TABLE, Draw
from minirlhf.backend import to_device, to_host
from minirlhf.nn import sampling
from minirlhf.nn.adam import adamw_step, clip_global_norm, init_adamw
from minirlhf.nn.transformer import transformer_forward
from minirlhf.rlhf.advantages import ADVANTAGES, gae, masked_whiten
from minirlhf.rlhf.kl import KL_MODES, summed_penalty
from minirlhf.rlhf.objectives import SURROGATES
from minirlhf.rlhf.preferences import bradley_terry_backward, bradley_terry_forward
from minirlhf.runs.config import ModelConfig, TrainConfig
from minirlhf.train.batches import pad_batch
from minirlhf.train.policy import policy_forward
from minirlhf.train.reward_model import RewardModelConfig, reward_backward, reward_forward
from minirlhf.train.sampler import sample_as_set
from minirlhf.train.settings import OptimizerConfig, PPOConfig
from minirlhf.train.sft import SFTConfig, sft_loss_and_gradients
from minirlhf.tree import tree_items, tree_map


@pytest.fixture(autouse=True)
def the_road_of_a_gpu():
    """NumPy may take short cuts that a GPU cannot; here it does not."""
    with numpy_as_on_a_gpu():
        yield


@pytest.fixture
def cuda_is_the_stand_in(monkeypatch):
    """device="cuda" everywhere in the package means the stand-in."""
    array_module = backend.array_module

    def pretend(device):
        return fakegpu if device == "cuda" else array_module(device)

    monkeypatch.setattr(backend, "array_module", pretend)


def there(value):
    return moved(value, fakegpu.asarray)


def back(tree):
    assert all(type(leaf) is FakeArray for _, leaf in tree_items(tree))
    return tree_map(to_host, tree)


# -- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_pairs_give_numpys_numbers_and_never_wait(row, dtype):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        arrays, constants = moved(
            row.make(Draw(rng)), lambda a: a.astype(dtype) if a.dtype == np.float64 else a
        )
        out, cache = row.forward(*arrays, **constants)
        dout = np.asarray(rng.standard_normal(np.shape(out)), dtype=dtype)
        gradients = row.backward(dout, cache)
        device_arrays, device_constants, device_dout = there((arrays, constants, dout))
        with fakegpu.no_sync():
            device_out, device_cache = row.forward(*device_arrays, **device_constants)
            device_gradients = row.backward(device_dout, device_cache)
        assert_close(back(device_out), out, STAND_IN)
        assert back(device_out).dtype == np.asarray(out).dtype
        if not isinstance(gradients, tuple):
            gradients, device_gradients = (gradients,), (device_gradients,)
        assert_trees_close(back(list(device_gradients)), list(gradients), STAND_IN)


def test_the_rest_of_a_step_never_waits():
    rng = np.random.default_rng(0)
    rewards, values = rng.standard_normal((2, 3, 4))
    mask = np.array([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    flat, dflat = rng.standard_normal((2, 7))

    def run(rewards, values, mask, flat, dflat):
        clipped, norm = clip_global_norm(dflat.copy(), 1.0)
        adamw_step(flat, clipped, init_adamw(flat), learning_rate=0.1, weight_decay=0.1)
        outputs = [*gae(rewards, values, mask=mask), *masked_whiten(rewards, mask=mask)]
        return [*outputs, summed_penalty(rewards, values, mask=mask), flat, norm]

    arguments = [rewards, values, mask, flat, dflat]
    device_arguments = there(arguments)
    with fakegpu.no_sync():
        got = run(*device_arguments)
    for a, b in zip(back(got), run(*arguments), strict=True):
        assert_close(a, b, STAND_IN)


# -- whole steps ---------------------------------------------------------------------------------


def test_supervised_and_reward_model_steps():
    batch = make_batch((3, 1, 4, 2), (2, 5, 1, 4))
    params = make_params(heads=("reward_head",))

    def run(params, batch):
        loss, gradients = sft_loss_and_gradients(params, batch, CONFIG)
        score, cache = reward_forward(params, batch=batch, config=CONFIG)
        preference, loss_cache = bradley_terry_forward(score[:2], score[2:])
        xp = backend.get_xp(score)
        dscore = xp.concatenate(bradley_terry_backward(1.0, loss_cache))
        return loss, float(preference), [gradients, reward_backward(dscore, cache)]

    expected, got = run(params, batch), run(there(params), there(batch))
    assert got[:2] == expected[:2]
    assert_trees_close(back(got[2]), expected[2], STAND_IN)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5, "top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_ids_are_sampled(settings, dtype, monkeypatch):
    # rows leave at the same steps, for what stands in `hidden` at padding depends on it
    monkeypatch.setattr(sampling, "ALIVE_CHECK_EVERY", (4, 4))
    params = make_params(seed=3, dtype=dtype)["transformer"]
    ids = make_ids(np.random.default_rng(0).integers(1, 6, size=20))
    batch = pad_batch(ids, [[]] * 20, pad_id=Letters.pad, config=CONFIG, dtype=dtype)

    def run(params, batch):
        return generated(params, batch, **settings)

    expected = run(params, batch)
    before = fakegpu.sync_count
    device_params, device_batch = there((params, batch))
    got = run(device_params, device_batch)
    # two checks of the prompts; at steps 0 and 4 one look, and one more where some are dropped
    assert fakegpu.sync_count - before <= 2 + 2 * 2
    for a, b in zip(back(list(got)), expected, strict=True):
        assert_close(a, b, 0.0)
        assert a.dtype == b.dtype
    assert len({tuple(row) for row in expected.tokens[:, -6:]}) > 3  # or equality says little


@pytest.mark.parametrize("advantages", ADVANTAGES[1:])
@pytest.mark.parametrize("ratio", SURROGATES)
def test_one_whole_update_without_a_critic(advantages, ratio, cuda_is_the_stand_in):
    settings = PPOConfig(
        batch_size=6,
        samples_per_prompt=3,
        epochs=2,
        minibatches=2,
        advantages=advantages,
        ratio=ratio,
        kl_mode="loss_k3_tok",
        sampler_bits=5,
        importance="mis" if ratio == "token" else "tis",
    )
    results = [ppo_step(device, settings=settings) for device in ("cpu", "cuda")]
    (_, _, flat, metrics), (_, _, device_flat, device_metrics) = results
    assert_close(device_flat, flat, STAND_IN)
    assert device_metrics == metrics


@pytest.mark.parametrize("bits", [2, 7])
def test_a_rounded_sampler(bits, cuda_is_the_stand_in):
    settings, policy = PPOConfig(sampler_bits=bits), make_params(seed=1)
    logp = {}
    for device in ("cpu", "cuda"):
        params = tree_map(lambda array, where=device: to_device(array, where), policy)
        samples = sample_as_set(
            lambda rounded, where=device: sampled(rounded, ["abc", "d"], seed=3, device=where),
            params,
            config=CONFIG,
            settings=settings,
        )
        logp[device] = to_host(samples.sampler_logp)
    assert_close(logp["cuda"], logp["cpu"], STAND_IN)


@pytest.mark.parametrize("kl_mode", KL_MODES)
def test_one_whole_ppo_update(kl_mode, cuda_is_the_stand_in):
    settings = PPOConfig(
        kl_mode=kl_mode,
        batch_size=6,
        epochs=2,
        minibatches=2,
        micro_batch_size=2,
        ent_coef=0.1,
        value_clip_eps=0.2,
        dual_clip=3.0,
        score_clip=1.0,
        missing_eos_penalty=0.5,
        whiten_rewards=True,
        target_kl=10.0,
        optimizer=OptimizerConfig(weight_decay=0.1, warmup=1),
    )
    ids, mask, flat, metrics = ppo_step("cpu", settings=settings)
    device_ids, device_mask, device_flat, device_metrics = ppo_step("cuda", settings=settings)
    assert device_ids == ids
    assert_close(device_mask, mask, STAND_IN)
    assert_close(device_flat, flat, STAND_IN)
    assert device_metrics == metrics
    start = np.concatenate([leaf.ravel() for _, leaf in tree_items(make_params(seed=1))])
    assert np.abs(flat - start).max() > 1e-5  # something was learnt


@pytest.mark.parametrize("stages", ["all", "sft,dpo"])
def test_a_whole_run(cuda_is_the_stand_in, tmp_path, stages):
    """Text to policy, all stages with their files, smallest of all: the same table at the end."""

    def run(device):
        return train(
            TrainConfig(
                out=tmp_path / device,
                device=device,
                stages=stages,
                workers=1,  # or a CPU samples in two halves, which round otherwise
                vocab_size=300,
                eval_prompts=4,
                eval_every=1,
                checkpoint_every=1,
                max_response_tokens=6,
                model=ModelConfig(n_layer=1, n_head=2, d_model=8),
                sft=SFTConfig(steps=2, batch_size=4),
                reward_model=RewardModelConfig(
                    n_pairs=6, n_heldout_pairs=4, n_normalize=8, epochs=1, batch_size=4
                ),
                ppo=PPOConfig(iterations=1, batch_size=4, epochs=1, kl_target=6.0),
            )
        )

    on_cpu, on_device = run("cpu"), run("cuda")
    assert on_device.policy == pytest.approx(on_cpu.policy, rel=0, abs=STAND_IN, nan_ok=True)
    assert on_device.policy_samples.responses == on_cpu.policy_samples.responses


# -- what is refused -----------------------------------------------------------------------------


def test_a_model_and_a_batch_on_two_devices_are_refused():
    params, batch = make_params(), make_batch()
    for mixed in ((there(params), batch), (params, there(batch))):
        with pytest.raises(TypeError, match="expected arrays of one library"):
            policy_forward(mixed[0], batch=mixed[1], config=CONFIG)
    with pytest.raises(TypeError, match="expected arrays of one library"):
        transformer_forward(
            params["transformer"],
            tokens=batch.tokens,
            mask=fakegpu.asarray(batch.mask),
            config=CONFIG,
        )
