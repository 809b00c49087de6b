"""Training beside the exact answer: what is measured, that it is reached, and that it is the same.

A desk of replies of up to four tokens, so that a run takes seconds.
"""

import dataclasses

import numpy as np
import pytest
from tolerances import ENUMERATION, LOOPS, assert_close, assert_trees_close

from minirlhf.exact.ground_truth import (
    PPO,
    RLOO,
    SFT,
    fit_reference,
    make_ground_truth,
    measure,
    optimum_runs,
    sample_world,
    train_on_world,
)
from minirlhf.exact.optimum import evaluate_exactly, frontier_reward, soft_optimum
from minirlhf.exact.tiny import make_tiny_world
from minirlhf.fields import with_fields
from minirlhf.tree import tree_map

BETA = 0.5
WORLD = make_tiny_world(max_tokens=4, n_demonstrations=20_000, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def reference():
    settings = dataclasses.replace(SFT, steps=150, batch_size=256)
    return fit_reference(WORLD, settings=settings, seed=0)


@pytest.fixture(scope="module")
def truth(reference):
    return make_ground_truth(WORLD, reference, kl_coef=BETA)


def last(trained):
    return trained.history[-1]


def test_the_reference_is_close_to_who_wrote_the_demonstrations(reference):
    ref = WORLD.log_probs(reference)
    away = evaluate_exactly(WORLD.tree, WORLD.demonstrator, ref, WORLD.rewards, kl_coef=1.0)
    assert 0 < away.kl_seq < 0.02
    assert np.exp(ref).sum(axis=1) == pytest.approx(1.0, abs=LOOPS)


def test_where_the_scale_begins_and_ends(truth, reference):
    at_reference = measure(truth, reference)
    assert at_reference["exact/fraction"] == pytest.approx(0.0, abs=LOOPS)
    assert at_reference["exact/kl_seq"] == pytest.approx(0.0, abs=LOOPS)
    assert at_reference["exact/objective"] == pytest.approx(at_reference["exact/reward"])
    assert sum(at_reference["exact/gap_by_depth"]) == pytest.approx(1.0, abs=ENUMERATION)
    best = soft_optimum(WORLD.tree, truth.ref_log_probs, WORLD.rewards, kl_coef=BETA)
    value = evaluate_exactly(
        WORLD.tree, best.log_probs, truth.ref_log_probs, WORLD.rewards, kl_coef=BETA
    )
    assert value.objective == pytest.approx(at_reference["exact/optimum"], abs=LOOPS)
    assert value.flatness == pytest.approx(0.0, abs=LOOPS)


def test_ppo_reaches_the_optimum_and_stays_under_the_frontier(truth, reference):
    fast = with_fields(PPO, {"iterations": 40, "optimizer": {"learning_rate": 4e-3}}, "ppo")
    trained = train_on_world(truth, settings=fast, seed=0, measure_every=20)
    start, middle, end = trained.history
    assert [row["iteration"] for row in trained.history] == [0, 20, 40]
    assert start["exact/fraction"] == pytest.approx(0.0, abs=LOOPS)
    assert 0.5 < middle["exact/fraction"] < end["exact/fraction"] < 1
    assert end["exact/fraction"] > 0.98
    assert end["exact/flatness"] < 0.05 * start["exact/flatness"]
    lost = end["exact/gap_by_depth"]
    assert min(lost) >= 0 and sum(lost) == pytest.approx(1 - end["exact/fraction"], abs=1e-9)
    frontier = frontier_reward(
        WORLD.tree, truth.ref_log_probs, WORLD.rewards, kl_seq=end["exact/kl_seq"]
    )
    assert 0 <= frontier - end["exact/reward"] < 0.05


def test_one_step_reinforce_reaches_it_without_a_critic(truth, reference):
    settings = with_fields(RLOO, {"iterations": 60, "optimizer": {"learning_rate": 6e-3}}, "ppo")
    trained = train_on_world(truth, settings=settings, seed=0, measure_every=60)
    assert last(trained)["exact/fraction"] > 0.98
    assert trained.params.keys() == {"transformer"}


def test_where_the_penalty_stands_decides(truth):
    ends = {}
    for mode in ("reward_k1", "reward_and_loss_full", "loss_k3_tok", "loss_k1"):
        settings = dataclasses.replace(PPO, iterations=15, kl_mode=mode)
        end = last(train_on_world(truth, settings=settings, seed=0))
        ends[mode] = end["exact/fraction"]
        most = {"kl_seq": end["exact/kl_seq"]}
        frontier = frontier_reward(WORLD.tree, truth.ref_log_probs, WORLD.rewards, **most)
        assert end["exact/reward"] <= frontier + ENUMERATION
    assert ends["reward_k1"] > ends["loss_k3_tok"] > ends["loss_k1"]
    assert ends["reward_and_loss_full"] > ends["loss_k3_tok"]
    assert ends["loss_k1"] < 0 < 0.9 < ends["reward_k1"]


def test_a_seed_is_a_run_and_micro_batches_change_nothing(truth, reference):
    short = dataclasses.replace(PPO, iterations=2, batch_size=32)
    again = {"settings": short, "measure_every": 1}
    a, b, c = (train_on_world(truth, seed=s, **again) for s in (0, 0, 1))
    assert a.history == b.history != c.history
    assert_trees_close(a.params, b.params, 0.0)
    small = dataclasses.replace(short, micro_batch_size=3)
    d = train_on_world(truth, settings=small, seed=0, measure_every=1)
    for row, other in zip(a.history, d.history, strict=True):
        assert row["exact/objective"] == pytest.approx(other["exact/objective"], abs=1e-4)


def test_the_reference_is_not_written_to(truth, reference):
    before = tree_map(np.copy, reference)
    train_on_world(truth, settings=dataclasses.replace(PPO, iterations=1), seed=0)
    assert_trees_close(reference, before, 0.0)


def test_samples_follow_the_exact_distribution(reference, truth):
    """The mean proxy reward of samples against E_ref[r], within four standard errors."""
    samples = sample_world(reference, WORLD, 20_000, rng=np.random.default_rng(0))
    rewards = WORLD.score(samples.prompt_ids, samples.response_ids)
    error = rewards.std() / np.sqrt(len(rewards))
    assert abs(rewards.mean() - truth.ref_reward) < 4 * error < 0.05
    assert max(map(len, samples.response_ids)) == len(WORLD.tree.levels)


def test_the_runs_differ_where_their_names_say_so():
    names = [(name, settings.kl_coef) for name, settings in optimum_runs(iterations=7)]
    assert len(set(names)) == len(names) == 9
    assert {settings.iterations for _, settings in optimum_runs(iterations=7)} == {7}
    assert {settings.advantages for _, settings in optimum_runs()} == {"gae", "leave-one-out"}


@pytest.mark.parametrize(
    ("changes", "came"),
    [
        ({"kl_coef": 0.4}, "0.4, 0.0 and 1.0"),
        ({"temperature": 0.5}, "0.5, 0.0 and 0.5"),
        ({"kl_target": 1.0}, "0.5, 1.0 and 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(truth, reference, changes, came):
    with pytest.raises(ValueError, match=f"the beta 0.5 of the ground truth, .*; got {came}"):
        train_on_world(truth, settings=dataclasses.replace(PPO, **changes), seed=0)


def test_rewards_that_cannot_be_improved_are_refused(reference):
    flat = dataclasses.replace(WORLD, rewards=np.ones_like(WORLD.rewards))
    with pytest.raises(ValueError, match="no better than the reference"):
        make_ground_truth(flat, reference, kl_coef=BETA)


def test_numbers_that_are_printed_as_exact_are_host_floats(truth, reference):
    for name, value in measure(truth, reference).items():
        values = value if isinstance(value, list) else [value]
        assert all(type(v) is float for v in values), name
    assert_close(truth.ref_reward, measure(truth, reference)["exact/reward"])
