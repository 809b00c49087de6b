"""The loop: the acts in their order, whoever consumes it; where it begins again; what it counts."""

import math

import numpy as np
import pytest
from tiny import CONFIG, Letters, make_params, ppo_step, sampled
from tolerances import SAMPLER_HIDDEN, assert_close

from minirlhf.rlhf.kl import summed_penalty
from minirlhf.train import ppo
from minirlhf.train.batches import pad_batch
from minirlhf.train.metrics import explained_variance, iteration_metrics, mean_of_updates
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.ppo import Task, make_experience, next_kl_coef, ppo_update, train_ppo
from minirlhf.train.rollout import score_rollout
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import tree_copy

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


def test_other_advantages_may_take_the_place_of_gae():
    asked = []

    def nothing(rollout, **known):
        asked.append(known)
        experience = make_experience(rollout, **known)
        return experience._replace(advantages=0.0 * experience.advantages)

    optimizer, reference = start()
    iteration = next(loop(optimizer, reference, advantages_of=nothing))
    assert asked[0]["kl_coef"] == SETTINGS.kl_coef and asked[0]["stop_id"] == Letters.eos
    assert iteration.updates[0].step.parts["loss/policy_avg"] == 0.0


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
