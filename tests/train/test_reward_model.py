"""The reward model: learns an order, knows how sure it is, scores nobody by its neighbours."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, Letters, make_ids, make_params, toy_pairs, toy_rankings
from tiny_run import metrics, tiny_config, write_pairs
from tolerances import BATCH_COMPOSITION

from minirlhf.errors import InputError
from minirlhf.nn.transformer import init_transformer
from minirlhf.runs import metrics as metrics_module
from minirlhf.runs import pipeline
from minirlhf.runs import session as session_module
from minirlhf.runs.checkpoint import load_model
from minirlhf.runs.metrics import pair_metrics
from minirlhf.train import batches, reward_model
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.reward_model import (
    Pair,
    RewardModel,
    RewardModelConfig,
    calibration_error,
    init_reward_model,
    n_updates,
    normalized,
    pairs_loss_and_gradients,
    score_responses,
    train_reward_model,
)
from minirlhf.train.settings import OptimizerConfig
from minirlhf.tree import tree_copy, tree_items, tree_leaves, tree_map

PAD = Letters.pad
EOS = Letters.eos


def trained(pairs, *, transformer=None, **changes):
    """The model, and the metrics of its updates."""
    defaults = {"epochs": 8, "batch_size": 16, "optimizer": OptimizerConfig(learning_rate=2e-2)}
    settings, rng = RewardModelConfig(**{**defaults, **changes}), np.random.default_rng(1)
    start = transformer or init_transformer(CONFIG, rng=np.random.default_rng(0))
    optimizer = Optimizer(
        init_reward_model(start, CONFIG, rng=rng),
        settings.optimizer,
        total_steps=n_updates(len(pairs), settings),
    )
    loop = train_reward_model(
        optimizer, pairs, config=CONFIG, settings=settings, pad_id=PAD, rng=rng
    )
    metrics = list(loop)
    assert len(metrics) == n_updates(len(pairs), settings)
    return RewardModel(optimizer.params, CONFIG), metrics


def some_model(seed=0):
    return RewardModel(make_params(seed=seed, dtype=np.float32, heads=("reward_head",)), CONFIG)


# --- learning


def test_it_learns_a_preference_and_orders_pairs_it_has_not_seen(tmp_path):
    model, rows = trained(toy_pairs(96, seed=0))
    heldout = toy_pairs(64, seed=1)
    transformer = init_transformer(CONFIG, rng=np.random.default_rng(0))
    before = {**model.params, "transformer": transformer}
    same = {"config": CONFIG, "pad_id": PAD}
    assert pair_metrics(before, heldout, **same)["heldout/accuracy"] < 0.8
    after = pair_metrics(model.params, heldout, **same)
    assert after["heldout/accuracy"] > 0.95
    assert after["heldout/margin"] > 1.0
    assert after["heldout/calibration_error"] < 0.1
    assert len(rows) == 8 * 6
    assert rows[0]["loss/reward_model"] == pytest.approx(math.log(2), abs=0.2)  # no idea yet
    assert rows[-1]["loss/reward_model"] < 0.2 and rows[-1]["accuracy"] == 1.0


@pytest.mark.parametrize("changes", [{}, {"margin": 0.5}, {"label_smoothing": 0.2}])
def test_the_gradient_is_that_of_the_loss(changes):
    """Along one direction through all parameters, in float64."""
    params = make_params(heads=("reward_head",))
    pairs, settings = toy_pairs(5, seed=2) + toy_rankings(2, seed=3), RewardModelConfig(**changes)
    rng = np.random.default_rng(3)
    direction = tree_map(lambda a: rng.standard_normal(a.shape), params)

    def at(h):
        there = tree_map(lambda a, d: a + h * d, params, direction)
        metrics, gradients = pairs_loss_and_gradients(
            there, pairs, config=CONFIG, settings=settings, pad_id=PAD
        )
        return metrics["loss/reward_model"], gradients

    leaves = zip(tree_leaves(at(0.0)[1]), tree_leaves(direction), strict=True)
    slope = sum(float((gradient * move).sum()) for gradient, move in leaves)
    rise = at(1e-5)[0] - at(-1e-5)[0]
    assert abs(slope) > 0.01 and rise / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_ranked_lists_are_learned_by_plackett_luce():
    model, rows = trained(toy_rankings(64, seed=0))
    assert rows[0]["loss/reward_model"] == pytest.approx(math.log(24), abs=0.3)  # 4! orders
    assert rows[-1]["loss/reward_model"] < 0.6 * math.log(24)
    heldout = pair_metrics(model.params, toy_rankings(32, seed=1), config=CONFIG, pad_id=PAD)
    assert heldout["heldout/accuracy"] > 0.9  # of neighbours


def test_lists_of_several_lengths_and_pairs_share_a_batch():
    """The mean of the losses of all, each computed alone; micro-batches or not."""
    params, settings = make_params(heads=("reward_head",)), RewardModelConfig()
    same = {"config": CONFIG, "settings": settings, "pad_id": PAD}
    mixed = toy_pairs(3, seed=1) + toy_rankings(2, seed=2) + toy_rankings(3, seed=3, size=3)
    metrics, gradients = pairs_loss_and_gradients(params, mixed, **same)
    alone = [pairs_loss_and_gradients(params, [one], **same) for one in mixed]
    for name, value in metrics.items():
        assert value == pytest.approx(np.mean([m[name] for m, _ in alone]), abs=1e-12), name
    for leaves in zip(*map(tree_leaves, (gradients, *(g for _, g in alone))), strict=True):
        np.testing.assert_allclose(leaves[0], np.mean(leaves[1:], axis=0), atol=1e-12)


def test_it_does_not_write_to_what_it_starts_from(tmp_path):
    start = make_params(dtype=np.float32)["transformer"]
    kept = tree_copy(start)
    model, _ = trained(toy_pairs(16, seed=0), transformer=start, epochs=1)
    moved = 0.0
    for (path, a), (_, b), (_, c) in zip(
        *map(tree_items, (start, kept, model.params["transformer"])), strict=True
    ):
        assert np.array_equal(a, b), path
        moved = max(moved, float(np.abs(a - c).max()))
    assert moved > 1e-3


def test_an_epoch_sees_every_pair_once(tmp_path, monkeypatch):
    seen, original = [], reward_model.pad_batch

    def look(prompts, responses, **constants):
        seen.append([tuple(r) for r in responses[: len(responses) // 2]])
        return original(prompts, responses, **constants)

    monkeypatch.setattr(reward_model, "pad_batch", look)
    pairs = toy_pairs(21, seed=0)
    trained(pairs, epochs=2, batch_size=8)
    assert [len(batch) for batch in seen] == [8, 8, 5] * 2
    chosen = sorted(tuple(pair.replies[0]) for pair in pairs)
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == chosen and first != second  # in a new order


def test_label_smoothing_and_margin_change_the_loss_as_they_should(tmp_path):
    """At equal scores: -log sigma(-margin), and log 2 whatever the smoothing."""
    frozen = OptimizerConfig(learning_rate=0.0)
    same = [Pair([Letters.bos], ([1, EOS], [1, EOS]))] * 4
    for changes, loss in (
        ({"margin": 2.0}, math.log1p(math.exp(2.0))),
        ({"label_smoothing": 0.3}, math.log(2)),
    ):
        row = trained(same, epochs=1, optimizer=frozen, **changes)[1][0]
        assert row["loss/reward_model"] == pytest.approx(loss, rel=1e-5)
        assert row["accuracy"] == 0.0 and row["margin"] == 0.0  # a tie is not a success


def test_no_pairs_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected preference pairs; got none"):
        trained([])


# --- how well it orders


def with_scores(monkeypatch, chosen, rejected):
    """A model whose scores are given."""
    answers = {"chosen": np.array(chosen, float), "rejected": np.array(rejected, float)}
    monkeypatch.setattr(
        metrics_module,
        "score_responses",
        lambda model, prompts, responses, **constants: answers[responses[0]],
    )
    return [Pair([0], ("chosen", "rejected"))] * len(chosen)


def test_accuracy_and_margin_by_hand(monkeypatch):
    pairs = with_scores(monkeypatch, chosen=[1.0, 0.0, 2.0, 0.5], rejected=[0.0, 1.0, 0.0, 0.5])
    same = {"config": CONFIG, "pad_id": PAD}
    found = pair_metrics({}, pairs, np.array([1.0, -2.0, -1.0, 0.0]), **same)
    assert found["heldout/accuracy"] == 0.5  # right, wrong, right, tie
    assert found["heldout/margin"] == 0.5  # of 1, -1, 2, 0
    assert found["heldout/gold_accuracy"] == pytest.approx(2 / 3)  # yes, yes, no, left out
    without = pair_metrics({}, pairs, **same)
    assert "heldout/gold_accuracy" not in without


@pytest.mark.parametrize(
    "margins, expected",
    [
        # sigma(log 3) = 3/4: the model is sure by 3/4 and right in 3 of 4
        ([math.log(3)] * 3 + [-math.log(3)], 0.0),
        # ... and right in 2 of 4
        ([math.log(3)] * 2 + [-math.log(3)] * 2, 0.25),
        # a bin of 4 pairs with the error 1/4, and one of 2 (sigma = 9/10, both right) with 1/10
        ([math.log(3)] * 2 + [-math.log(3)] * 2 + [math.log(9)] * 2, (4 * 0.25 + 2 * 0.1) / 6),
        ([0.0, 0.0], 0.0),  # a tie is half right, and 1/2 was said
        ([1e4, 1e4], 0.0),
        ([1e4, -1e4], 0.5),
        ([-1e4], 1.0),
    ],
)
def test_calibration_error_by_hand(margins, expected):
    assert calibration_error(np.array(margins)) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_calibration_error_is_an_error(margins):
    error = calibration_error(np.array(margins))
    assert 0 <= error <= 1
    assert calibration_error(np.array(margins[::-1])) == pytest.approx(error, abs=1e-12)


def test_a_model_that_speaks_the_truth_is_calibrated():
    rng = np.random.default_rng(0)
    margin = 2 * rng.standard_normal(40_000)
    chosen_first = rng.random(margin.size) < 1 / (1 + np.exp(-margin))
    truthful = np.where(chosen_first, margin, -margin)
    assert calibration_error(truthful) < 0.01
    assert calibration_error(3 * truthful) > 0.05  # over-confident
    assert calibration_error(truthful / 3) > 0.05  # too timid


# --- the scale


def test_normalized_scores_have_mean_0_and_sd_1_on_their_samples():
    prompts, responses = make_ids([2] * 40, seed=1), make_ids(range(1, 6), seed=2) * 8
    raw = score_responses(some_model(), prompts, responses, pad_id=PAD)
    assert abs(raw.mean()) > 0.01 and abs(raw.std() - 1) > 0.1  # it was not so before
    model = normalized(some_model(), raw)
    score = score_responses(model, prompts, responses, pad_id=PAD)
    assert score.dtype == np.float64
    assert score.mean() == pytest.approx(0, abs=1e-12)
    assert score.std() == pytest.approx(1, abs=1e-12)
    assert np.array_equal(np.argsort(score), np.argsort(raw))  # the order is what was learnt


@pytest.mark.parametrize(
    ("scores", "came"),
    [
        (np.full(5, 0.3), "0.3 for all of them"),
        (np.zeros(5), "0 for all of them"),
        (np.array([1.0]), "1 for all of them"),
        (np.array([1e9, 1e9 + 1e-3]), "from 1000000000.0 to 1000000000.001"),  # of a float32 model
        (np.array([0.0, np.nan]), "from nan to nan"),
        (np.array([0.0, np.inf]), "from 0.0 to inf"),
        (np.array([-np.inf, np.inf]), "from -inf to inf"),
    ],
)
def test_scores_that_tell_nothing_apart_are_refused(scores, came):
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match=f"that differ .*{came}"):
        normalized(some_model(), scores)


@pytest.mark.parametrize("scores", [[0.3, 0.1 + 0.2], [5e-31, 0.0], [1.0, 1.0]])
def test_a_reward_that_differs_by_rounding_alone_is_refused(scores):
    with pytest.raises(InputError, match="by more than rounding"):
        normalized(RewardModel({}, CONFIG), np.array(scores))


@pytest.mark.parametrize("center", [0.0, 1.0, -3e5, 1e300, -1e300])
@pytest.mark.parametrize("spread", [1e-20, 1e-7, 1.0, 1e150, 1e200, 1e300])
def test_rewards_of_any_size_get_mean_0_and_sd_1(center, spread):
    """Next to equal is not equal, and no square overflows; a warning would be an error here."""
    noise = np.random.default_rng(0).standard_normal(50)
    noise = np.clip((noise - noise.mean()) / noise.std(), -3, 3)
    raw = center + spread * noise
    if spread < 1e-15 * abs(center):
        with pytest.raises(InputError, match="by more than rounding"):
            normalized(RewardModel({}, CONFIG), raw)
        return
    model = normalized(RewardModel({}, CONFIG), raw)
    score = (raw - model.mean) / model.sd
    tolerance = 1e-8 if spread >= 1e-6 * abs(center) else 1e-3
    assert score.mean() == pytest.approx(0, abs=tolerance)
    assert score.std() == pytest.approx(1, abs=tolerance)
    assert model.raw(score[0]) == pytest.approx(raw[0], rel=1e-12, abs=1e-9 * spread)


def test_the_scale_of_rewards_of_usual_size_is_the_plain_one():
    raw = np.random.default_rng(0).gamma(2.0, 3.0, size=1000)
    model = normalized(RewardModel({}, CONFIG), raw)
    assert (model.mean, model.sd) == (raw.mean(), raw.std())  # to the last bit


# --- T14: nobody's score depends on the batch


def test_a_score_does_not_depend_on_the_batch(monkeypatch):
    prompts = make_ids([1, 4, 2, 6, 3, 1, 5], seed=3)
    responses = make_ids([5, 1, 6, 2, 4, 1, 3], seed=4)
    model = some_model()._replace(mean=0.3, sd=2.0)
    together = score_responses(model, prompts, responses, pad_id=PAD)
    tolerance = BATCH_COMPOSITION[np.float32]
    assert np.ptp(together) > 100 * tolerance
    for i in range(len(prompts)):
        alone = score_responses(model, [prompts[i]], [responses[i]], pad_id=PAD)
        np.testing.assert_allclose(alone, together[i : i + 1], rtol=0, atol=tolerance)
    backwards = score_responses(model, prompts[::-1], responses[::-1], pad_id=PAD)[::-1]
    np.testing.assert_allclose(backwards, together, rtol=0, atol=tolerance)
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", 1)
    monkeypatch.setattr(batches, "MICRO_BATCH_FLOATS", 0)  # one response in a forward
    in_parts = score_responses(model, prompts, responses, pad_id=PAD)
    np.testing.assert_allclose(in_parts, together, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pad", [0, 5, Letters.eos, Letters.pad])
def test_a_score_does_not_depend_on_the_padding(pad):
    """pad == eos too: the last real token is found by the mask, not by its id."""
    prompts, responses = [[7, 1], [7, 2, 3, 4]], [[1, 2, EOS], [3, EOS]]
    expected = score_responses(some_model(), prompts, responses, pad_id=Letters.pad)
    assert np.array_equal(score_responses(some_model(), prompts, responses, pad_id=pad), expected)


def test_the_score_reads_prompt_and_response_to_the_last_token():
    model, score = some_model(), lambda p, r: score_responses(some_model(), [p], [r], pad_id=PAD)[0]
    base = score([7, 1, 2], [3, 4, EOS])
    assert model.mean == 0 and model.sd == 1
    for other in (score([7, 3, 2], [3, 4, EOS]), score([7, 1, 2], [5, 4, EOS])):
        assert abs(other - base) > 1e-3
    assert abs(score([7, 1, 2], [3, 4]) - base) > 1e-3  # without its stop token


# --- where it starts from


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def frozen(out, pairs, **changes):
    """A run whose reward model learns nothing, so that it shows what it starts from."""
    changes = {"reward_model__optimizer__learning_rate": 0.0, **changes}
    run = session_module.open_session(tiny_config(out, pairs=pairs, model__n_layer=2, **changes))
    reference = pipeline.reference_stage(run)
    return pipeline.reward_stage(run, reference), reference["transformer"]


def test_from_the_reference_it_starts_with_the_references_weights(tmp_path, pairs):
    model, reference = frozen(tmp_path / "run", pairs, reward_model__init="reference")
    for (path, ours), (_, theirs) in zip(
        tree_items(model.params["transformer"]), tree_items(reference), strict=True
    ):
        assert np.array_equal(ours, theirs) and not np.shares_memory(ours, theirs), path
    stored = [load_model(tmp_path / "run" / name)[0] for name in ("reward_model", "reference")]
    for (path, ours), (_, theirs) in zip(*map(tree_items, stored), strict=True):
        assert np.array_equal(ours, theirs), path
    assert np.abs(model.params["reward_head"]["w"]).min() > 0
    assert np.all(model.params["reward_head"]["b"] == 0)


def test_from_scratch_it_has_its_own_size_and_weights(tmp_path, pairs):
    model, reference = frozen(tmp_path / "run", pairs, reward_model__init="scratch")
    assert len(reference["blocks"]) == 2 and len(model.params["transformer"]["blocks"]) == 1
    assert not np.array_equal(model.params["transformer"]["wte"], reference["wte"])
    assert load_model(tmp_path / "run/reward_model")[1].n_layer == 1


def test_the_stored_model_scores_as_the_one_in_memory(tmp_path, pairs):
    """What `resume` reads back: the weights and the scale."""
    config = tiny_config(tmp_path / "run", pairs=pairs)
    run = session_module.open_session(config)
    reference = pipeline.reference_stage(run)
    model = pipeline.reward_stage(run, reference)
    again = pipeline.reward_stage(session_module.reopen_session(config.out), reference)
    assert (again.mean, again.sd, again.config) == (model.mean, model.sd, model.config)
    prompts, responses = [[1, 2], [3]], [[4, 5, 6], [7]]
    ours, theirs = (score_responses(m, prompts, responses, pad_id=0) for m in (model, again))
    assert np.array_equal(ours, theirs) and np.ptp(ours) > 0
    assert metrics(config.out, "reward_model")[-1].keys() >= {"heldout/accuracy"}
