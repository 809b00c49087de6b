"""DPO's loop: the policy learns an order against a reference; parts and padding are moot."""

import itertools
import math

import numpy as np
import pytest
from tiny import CONFIG, Letters, make_params, toy_pairs, toy_rankings
from tolerances import BATCH_COMPOSITION, MICRO_BATCH, assert_close, assert_trees_close

from minirlhf.errors import InputError
from minirlhf.runs.metrics import heldout_dpo
from minirlhf.train import batches
from minirlhf.train.dpo import (
    DPOConfig,
    dpo_metrics,
    dpo_micro_batch,
    reply_logps,
    train_dpo,
    with_reference,
)
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.policy import policy_forward
from minirlhf.train.reward_model import Pair, n_updates, pairs_loss_and_gradients
from minirlhf.train.settings import OptimizerConfig
from minirlhf.tree import tree_copy, tree_items, tree_leaves, tree_map

SAME = {"config": CONFIG, "pad_id": Letters.pad}
LOSSES = [{}, {"loss": "ipo"}, {"label_smoothing": 0.2}, {"loss": "ipo", "label_smoothing": 0.2}]


def model(seed=0, dtype=np.float64):
    return make_params(seed=seed, dtype=dtype, heads=())


def started(reference, pairs, **changes):
    """An optimiser of a copy of the reference, and the loop that moves it."""
    defaults = {"epochs": 6, "batch_size": 16, "optimizer": OptimizerConfig(learning_rate=1e-2)}
    settings = DPOConfig(**{**defaults, **changes})
    updates = n_updates(len(pairs), settings)
    optimizer = Optimizer(reference, settings.optimizer, total_steps=updates)
    pairs, rng = with_reference(pairs, reference, **SAME), np.random.default_rng(1)
    return optimizer, train_dpo(optimizer, pairs, settings=settings, rng=rng, **SAME)


def loss_and_gradients(params, pairs, settings):
    same = {"settings": settings, "micro_batch": dpo_micro_batch, **SAME}
    return pairs_loss_and_gradients(params, pairs, **same)


def test_it_learns_a_preference_and_the_reference_stays():
    reference, pairs, heldout = (
        model(dtype=np.float32),
        toy_pairs(96, seed=0),
        toy_pairs(64, seed=1),
    )
    kept = tree_copy(reference)
    optimizer, loop = started(reference, pairs)
    rows = list(loop)
    assert len(rows) == 6 * 6 and rows[0].keys() == rows[-1].keys()
    assert rows[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)  # it is the reference
    assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert rows[-1]["loss/dpo"] < 0.3 and rows[-1]["rewards/accuracies"] > 0.9
    assert rows[-1]["rewards/chosen"] - rows[-1]["rewards/rejected"] == pytest.approx(
        rows[-1]["rewards/margins"], rel=1e-4
    )
    heldout = with_reference(heldout, reference, **SAME)
    found = heldout_dpo(optimizer.params, heldout, np.ones(64), settings=DPOConfig(), **SAME)
    assert found["heldout/loss_dpo"] < 0.6
    assert found["heldout/accuracy"] == found["heldout/gold_accuracy"] > 0.75
    for (path, a), (_, b) in zip(tree_items(reference), tree_items(kept), strict=True):
        assert np.array_equal(a, b), path


@pytest.mark.parametrize("changes", LOSSES)
def test_the_gradient_is_that_of_the_loss(changes):
    """Along one direction through all parameters, in float64."""
    params, settings = model(), DPOConfig(**changes)
    pairs = with_reference(toy_pairs(5, seed=2), model(seed=1), **SAME)
    rng = np.random.default_rng(3)
    direction = tree_map(lambda a: rng.standard_normal(a.shape), params)

    def at(h):
        there = tree_map(lambda a, d: a + h * d, params, direction)
        metrics, gradients = loss_and_gradients(there, pairs, settings)
        return metrics["loss/dpo"], gradients

    leaves = zip(tree_leaves(at(0.0)[1]), tree_leaves(direction), strict=True)
    slope = sum(float((gradient * move).sum()) for gradient, move in leaves)
    rise = at(1e-5)[0] - at(-1e-5)[0]
    assert abs(slope) > 0.01 and rise / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_a_reply_alone_has_the_log_prob_that_it_has_among_others():
    params, pairs = model(), toy_pairs(7, seed=4)
    found = reply_logps(params, pairs, **SAME)
    for i, pair in enumerate(pairs):
        for place, reply in enumerate(pair.replies):
            batch = batches.pad_batch([pair.prompt], [reply], dtype=np.float64, **SAME)
            alone = policy_forward(params, batch=batch, config=CONFIG, keep=False)[0].logp.sum()
            assert_close(found[place, i], alone, BATCH_COMPOSITION[np.float64])


@pytest.mark.parametrize("changes", LOSSES)
def test_micro_batches_and_the_order_of_pairs_change_nothing(monkeypatch, changes):
    params, settings = model(), DPOConfig(**changes)
    pairs = with_reference(toy_pairs(9, seed=5), model(seed=1), **SAME)
    whole = loss_and_gradients(params, pairs, settings)
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", 16)
    monkeypatch.setattr(batches, "MICRO_BATCH_FLOATS", 0)
    order = np.random.default_rng(0).permutation(9)
    parts = loss_and_gradients(params, [pairs[i] for i in order], settings)
    tolerance = 100 * MICRO_BATCH[np.float64]
    for name, value in whole[0].items():
        assert_close(parts[0][name], value, tolerance)
    assert_trees_close(parts[1], whole[1], tolerance)


def test_of_a_ranked_list_the_best_and_the_worst_are_the_pair():
    lists = toy_rankings(6, seed=6)
    ends = [Pair(p.prompt, (p.replies[0], p.replies[-1])) for p in lists]
    found, expected = (with_reference(some, model(), **SAME) for some in (lists, ends))
    for pair, other in zip(found, expected, strict=True):
        assert pair[:2] == other[:2]
        assert_close(pair.ref_logp, other.ref_logp)


def test_it_goes_on_where_the_optimiser_stands():
    reference, pairs = model(dtype=np.float32), toy_pairs(21, seed=0)
    optimizer, loop = started(reference, pairs, epochs=2, batch_size=8)
    rows = list(loop)
    part, loop = started(reference, pairs, epochs=2, batch_size=8)
    first = list(itertools.islice(loop, 4))
    again, loop = started(reference, pairs, epochs=2, batch_size=8)
    again.load_state_tree(part.state_tree())
    assert first + list(loop) == rows and len(rows) == 6
    assert np.array_equal(again.flat, optimizer.flat)


def test_metrics_by_hand():
    logp = np.array([[-2.0, -1.0], [-4.0, -1.5]])
    pairs = [Pair([], ([], []), ref_logp=both) for both in ((-3.0, -3.0), (-2.0, -3.0))]
    metrics, _ = dpo_metrics(logp, pairs, DPOConfig(kl_coef=0.5))
    # log-ratios: chosen 1, 1; rejected -1, 1.5; times beta: 0.5, 0.5; -0.5, 0.75
    assert metrics["rewards/chosen"] == 0.5 and metrics["rewards/rejected"] == 0.125
    assert metrics["rewards/margins"] == 0.375 and metrics["rewards/accuracies"] == 0.5
    assert metrics["logps/chosen"] == -1.5 and metrics["logps/rejected"] == -2.75
    loss = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(0.25))) / 2
    assert metrics["loss/dpo"] == pytest.approx(loss)


def test_no_pairs_are_refused():
    with pytest.raises(InputError, match="expected preference pairs; got none"):
        list(started(model(), [])[1])
