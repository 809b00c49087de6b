"""The loop: the acts in their order, whoever consumes it; where it begins again; what it counts."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from tiny import CONFIG, Letters, make_params, ppo_step, sampled
from tolerances import SAMPLER_HIDDEN, assert_close

from minirlhf.app.commands import recipe_says
from minirlhf.errors import InputError
from minirlhf.fields import with_fields
from minirlhf.nn.transformer import init_transformer
from minirlhf.rlhf import logprobs
from minirlhf.rlhf.advantages import (
    ADVANTAGES,
    advantages_without_critic,
    importance_weights,
    token_rewards,
)
from minirlhf.rlhf.kl import summed_penalty
from minirlhf.runs.config import TrainConfig
from minirlhf.runs.metrics import explained_variance, iteration_metrics, mean_of_updates
from minirlhf.train import ppo
from minirlhf.train.batches import pad_batch
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.ppo import Task, make_experience, next_kl_coef, ppo_update, train_ppo
from minirlhf.train.recipes import RECIPES, recipe
from minirlhf.train.rollout import Samples, score_rollout
from minirlhf.train.sampler import round_mantissa, sample_as_set
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import tree_copy, tree_map

SETTINGS = PPOConfig(
    iterations=3, batch_size=6, epochs=2, minibatches=2, kl_target=0.5, kl_horizon=10.0
)
PROMPTS = ["abc", "d", "ga", "bbbb", "", "ce"]


def count_a(samples):
    return np.array([float(text.count("a")) for text in samples.responses])


class Coins:
    """Samples whose coins are those of a stream: `drawn` says how many batches were taken."""

    def __init__(self):
        self.drawn = 0

    def __call__(self, params):
        self.drawn += 1
        return sampled(params, PROMPTS, seed=self.drawn)


def start():
    """An optimiser of a policy, and a reference beside it."""
    policy = make_params(seed=1)
    reference = {"transformer": make_params(seed=2)["transformer"]}
    total = SETTINGS.iterations * SETTINGS.updates_per_iteration
    return Optimizer(policy, SETTINGS.optimizer, total_steps=total), reference


def loop(optimizer, reference, *, coins=None, rng=None, **more):
    task = Task(coins or Coins(), count_a, Letters.eos)
    rng = rng or np.random.default_rng(0)
    settings = {"config": CONFIG, "settings": SETTINGS, "rng": rng}
    return train_ppo(optimizer, reference, task, **settings, **more)


def test_the_loop_is_its_acts_one_after_the_other():
    optimizer, reference = start()
    by_loop = list(loop(optimizer, reference))
    by_hand, _ = start()
    coins, rng, beta = Coins(), np.random.default_rng(0), SETTINGS.kl_coef
    same = {"config": CONFIG, "settings": SETTINGS}
    for iteration in by_loop:
        rollout = score_rollout(
            by_hand.params, reference, coins(by_hand.params), score=count_a, **same
        )
        known = {"settings": SETTINGS, "kl_coef": beta, "stop_id": Letters.eos}
        updates = ppo_update(by_hand, make_experience(rollout, **known), rng=rng, **same)
        assert iteration.kl_coef == beta
        beta = next_kl_coef(beta, rollout=rollout, settings=SETTINGS)
        assert iteration.next_kl_coef == beta
        assert_close(iteration.rollout.old_logp, rollout.old_logp, 0.0)
        assert len(iteration.updates) == len(updates) == 4
    assert_close(optimizer.flat, by_hand.flat, 0.0)
    assert len(by_loop) == 3 and by_loop[0].next_kl_coef != by_loop[0].kl_coef


@pytest.mark.parametrize("done", [1, 2])
def test_it_goes_on_where_the_optimiser_stands(done):
    optimizer, reference = start()
    straight = list(loop(optimizer, reference))
    first, coins, rng = start()[0], Coins(), np.random.default_rng(0)
    iterations = loop(first, reference, coins=coins, rng=rng)
    for _ in range(done):
        last = next(iterations)
    again, _ = start()
    again.load_state_tree(first.state_tree())
    rest = list(loop(again, reference, coins=coins, rng=rng, kl_coef=last.next_kl_coef))
    assert len(rest) == 3 - done
    assert_close(again.flat, optimizer.flat, 0.0)
    assert rest[-1].next_kl_coef == straight[-1].next_kl_coef


def test_old_and_reference_stay_what_they_were():
    optimizer, reference = start()
    kept = tree_copy(reference)
    first = next(loop(optimizer, reference))
    before = first.rollout.old_logp.copy()
    list(loop(optimizer, reference))
    assert_close(first.rollout.old_logp, before, 0.0)
    assert_close(reference["transformer"]["wte"], kept["transformer"]["wte"], 0.0)


def without_critic(**changes):
    groups = {"samples_per_prompt": 3, "kl_target": 0.0, "whiten_advantages": False}
    return replace(SETTINGS, **{**groups, "advantages": "group-mean", **changes})


def run_loop(settings, *, sample=None, reference=None):
    """An optimiser from its reference on, and its iterations; prompts as `settings` group them."""
    reference = reference or {"transformer": make_params(seed=2)["transformer"]}
    G = settings.samples_per_prompt
    texts = [text for text in PROMPTS[: len(PROMPTS) // G] for _ in range(G)]
    task = Task(sample or (lambda params: sampled(params, texts, seed=5)), count_a, Letters.eos)
    optimizer = ppo.new_policy(reference, settings, rng=np.random.default_rng(0))
    same = {"config": CONFIG, "settings": settings, "rng": np.random.default_rng(0)}
    return optimizer, list(train_ppo(optimizer, reference, task, **same))


@pytest.mark.parametrize("advantages", ADVANTAGES[1:])
def test_without_a_critic_nothing_is_learned_of_values(advantages):
    optimizer, iterations = run_loop(without_critic(advantages=advantages))
    assert optimizer.params.keys() == {"transformer"}
    for iteration in iterations:
        settings = without_critic(advantages=advantages)
        metrics = iteration_metrics(iteration, settings=settings, stop_id=Letters.eos)
        assert not [name for name in metrics if name.startswith(("ppo/val", "loss/value"))]
        assert (iteration.rollout.values == 0).all()


@pytest.mark.parametrize("advantages", ADVANTAGES[1:])
def test_an_advantage_sees_the_responses_to_its_prompt_alone(advantages):
    settings = without_critic(advantages=advantages)
    _, (first, *_) = run_loop(settings)
    rollout, mask = first.rollout, first.rollout.batch.response_mask
    penalty = rollout.old_logp - rollout.ref_logp
    rewards = token_rewards(rollout.score, penalty, mask=mask, kl_coef=first.kl_coef)
    for rows in (slice(0, 3), slice(3, 6)):
        alone = advantages_without_critic(
            rewards[rows], mask=mask[rows], form=advantages, samples_per_prompt=3
        )
        assert_close(first.experience.advantages[rows], alone)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name):
    changes = {**RECIPES[name].get("ppo", {}), "kl_target": 0.0}
    changes["samples_per_prompt"] = min(3, changes.get("samples_per_prompt", 1))
    settings = replace(SETTINGS, **changes)
    before = make_params(seed=2)["transformer"]
    optimizer, iterations = run_loop(settings)
    assert len(iterations) == 3
    assert not np.allclose(optimizer.params["transformer"]["wte"], before["wte"], atol=1e-6)


def test_a_recipe_that_is_none_is_refused():
    with pytest.raises(InputError, match="expected one of ppo, grpo, .*; got 'trpo'"):
        recipe("trpo")


def test_a_recipe_says_what_it_sets_and_what_was_overruled():
    config = with_fields(TrainConfig(), recipe("grpo"), "train")
    said = recipe_says("grpo", config)
    assert said.startswith("recipe grpo: --ppo.samples-per-prompt 8 --ppo.no-whiten-advantages ")
    assert "overruled" not in said
    config = with_fields(config, {"ppo": {"kl_mode": "reward_k1"}}, "train")
    assert recipe_says("grpo", config).endswith("; overruled: --ppo.kl-mode loss_k3_tok")
    assert recipe_says("ppo", TrainConfig()) == "recipe ppo: the defaults"
    assert recipe_says("dpo", TrainConfig()) == "recipe dpo: nothing; overruled: --stages sft,dpo"


def test_the_reference_becomes_the_policy_every_k_iterations():
    settings = replace(SETTINGS, iterations=5, reset_reference_every=2, kl_target=0.0)
    optimizer, iterations = run_loop(settings)
    start = make_params(seed=2)["transformer"]["wte"]
    wtes = [iteration.next_reference["transformer"]["wte"] for iteration in iterations]
    assert_close(wtes[0], start, 0.0)
    assert (wtes[1] != start).any() and wtes[2] is wtes[1]
    assert (wtes[3] != wtes[1]).any() and wtes[4] is wtes[3]
    # what follows a reset is measured from there: the policy that samples next is the reference
    for at, is_reset in enumerate((True, False, True, False, True)):
        rollout = iterations[at].rollout
        kl = summed_penalty(rollout.old_logp, rollout.ref_logp, mask=rollout.batch.response_mask)
        assert (np.abs(kl).max() < SAMPLER_HIDDEN) == is_reset


@pytest.mark.parametrize("bits", [2, 7])
def test_a_rounded_sampler_brings_its_log_probs_and_weights_correct_them(bits):
    """E_sampler[ratio] = 1; the policy's own log-probs are those of its own weights."""
    settings = replace(SETTINGS, sampler_bits=bits)
    policy = make_params(seed=1)

    def sample(params):
        return sampled(params, PROMPTS * 40, seed=3)

    samples = sample_as_set(sample, policy, config=CONFIG, settings=settings)
    rounded = tree_map(lambda x: round_mantissa(x, bits=bits), policy)
    assert samples.hidden is None and samples.response_ids == sample(rounded).response_ids
    same = {"config": CONFIG, "settings": settings, "score": count_a}
    rollout = score_rollout(policy, rounded, samples, **same)
    assert_close(samples.sampler_logp, rollout.ref_logp)
    mask = rollout.batch.response_mask
    gap = np.where(mask > 0, rollout.old_logp - samples.sampler_logp, 0.0)
    assert np.abs(gap).max() > 2.0 ** -(bits + 4)
    ratio = np.exp(gap.sum(axis=1))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5
    for form in ("tis", "mis"):
        known = {"kl_coef": 0.2, "stop_id": Letters.eos}
        plain = make_experience(rollout, settings=settings, **known)
        corrected = make_experience(
            rollout, settings=replace(settings, importance=form, importance_cap=1.1), **known
        )
        weights = importance_weights(
            rollout.old_logp, samples.sampler_logp, mask=mask, form=form, cap=1.1
        )
        assert_close(corrected.advantages, plain.advantages * weights)
        assert_close(corrected.returns, plain.returns, 0.0)


def test_a_mantissa_is_rounded_to_nearest():
    x = np.array([1.0, 1.2, -1.3, 0.1, 3e-5, 0.0, 1.0 + 2**-7, 1.0 + 2**-8 + 2**-20])
    assert_close(round_mantissa(x, bits=7)[[0, 5, 6, 7]], [1.0, 0.0, 1 + 2**-7, 1 + 2**-7], 0.0)
    for dtype in (np.float32, np.float64):
        for bits in (1, 7, 23):
            got = round_mantissa(x.astype(dtype), bits=bits)
            assert got.dtype == dtype
            assert (np.abs(got - x) <= np.abs(x) * (2.0 ** -(bits + 1) + 1e-7)).all()
            assert_close(round_mantissa(got, bits=bits), got, 0.0)
    bfloat16 = torch_bfloat16(x.astype(np.float32))
    if bfloat16 is not None:
        assert_close(round_mantissa(x.astype(np.float32), bits=7), bfloat16, 0.0)


def torch_bfloat16(x):
    try:
        import torch
    except ImportError:
        return None
    return torch.tensor(x).bfloat16().float().numpy()


def test_the_metrics_of_an_iteration():
    optimizer, reference = start()
    iteration = next(loop(optimizer, reference))
    metrics = iteration_metrics(iteration, settings=SETTINGS, stop_id=Letters.eos)
    rollout, mask = iteration.rollout, iteration.rollout.batch.response_mask
    penalty = summed_penalty(rollout.old_logp, rollout.ref_logp, mask=mask)
    assert metrics["objective/kl"] == pytest.approx(penalty.mean())
    assert metrics["objective/scores"] == pytest.approx(count_a(rollout.samples).mean())
    assert metrics["policy/updates"] == 4
    lr = [update.applied["lr"] for update in iteration.updates]
    assert metrics["lr"] == pytest.approx(np.mean(lr)) and lr == sorted(lr, reverse=True)
    first = iteration.updates[0]
    assert_close(first.step.logp, first.minibatch.old_logp, SAMPLER_HIDDEN)


def test_a_target_below_rounding_makes_no_update_and_no_crash(monkeypatch):
    monkeypatch.setattr(ppo, "kl_from_old", lambda step, minibatch: 1e-9)
    settings = PPOConfig(batch_size=6, target_kl=1e-16)
    *_, flat, metrics = ppo_step("cpu", settings=settings)
    assert metrics["policy/updates"] == 0 and metrics["policy/clamped_log_ratios"] == 0
    assert "grad_norm" not in metrics and np.isfinite(flat).all()
    assert mean_of_updates([], settings) == {"policy/updates": 0, "policy/clamped_log_ratios": 0}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 3.0, 13580.0, -1e-4])
def test_the_explained_variance_of_constant_returns_is_undefined(dtype, value):
    mask = np.ones((2, 3), dtype)
    returns = np.full((2, 3), value, dtype)
    returns[0, 0] = np.nextafter(returns[0, 0], dtype(1e9))  # rounding is no variance
    assert math.isnan(explained_variance(returns * dtype(0.5), returns, mask=mask))


def test_the_explained_variance_by_hand():
    """R = 1, 3 and V = 1, 2: mean error^2 = .5, Var R = 1."""
    values, returns = np.array([[1.0, 2.0, np.nan]]), np.array([[1.0, 3.0, np.inf]])
    mask = np.array([[1.0, 1.0, 0.0]])
    assert explained_variance(values, returns, mask=mask) == pytest.approx(0.5)


@pytest.mark.parametrize("ids", [[1.7, 2], [1.0, 2.0], ["a"], [np.float32(1)]])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(ValueError, match="expected ids that are integers"):
        pad_batch([ids], [[3]], pad_id=9, config=CONFIG)
    with pytest.raises(ValueError, match="expected ids that are integers"):
        pad_batch([[1]], [ids], pad_id=9, config=CONFIG)


def test_of_a_large_vocabulary_two_arrays_are_alive_at_once(monkeypatch):
    """(rows, V) in the loss and in the scoring; the entropies' temporaries are those of a slice."""
    monkeypatch.setattr(logprobs, "SLICE_FLOATS", 1 << 14)
    config = replace(CONFIG, vocab_size=8192, n_ctx=40)
    params = init_transformer(config, rng=np.random.default_rng(0), dtype=np.float64)
    policy = {"transformer": params}
    ids = [[5]] * 4, [[*[7] * 31, 6]] * 4
    batch = pad_batch(*ids, pad_id=0, config=config, dtype=np.float64)
    samples = Samples(*ids, batch)
    settings = PPOConfig(
        advantages="leave-one-out", batch_size=4, samples_per_prompt=4, micro_batch_size=4
    )
    same = {"config": config, "settings": settings}
    array = 4 * 32 * 8192 * 8
    rollout, peak = peak_of(
        lambda: score_rollout(policy, policy, samples, score=lambda s: np.arange(4.0), **same)
    )
    assert 2 * array < peak < 2.5 * array
    experience = make_experience(rollout, settings=settings, kl_coef=0.1, stop_id=6)
    _, peak = peak_of(lambda: ppo.minibatch_gradients(policy, experience, **same))
    assert 2 * array < peak < 2.5 * array


def peak_of(f):
    """f(), and the most bytes that it held at once."""
    tracemalloc.start()
    try:
        return f(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
