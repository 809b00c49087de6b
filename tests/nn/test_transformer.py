"""The model: who sees whom, padding, batch mates, the KV cache, dtypes; and so through PPO's loss.

Whether the gradients are right is checked in test_pairs.py; here, what they must not depend on.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, Letters, make_batch, make_ids, make_params
from tolerances import (
    BATCH_COMPOSITION,
    FLOAT32_FORWARD,
    FLOAT32_GRADIENT,
    KV_CACHE,
    LOOPS,
    MICRO_BATCH,
    PADDING,
    SAME_FORWARD,
    assert_close,
    assert_trees_close,
)

from minirlhf.nn.decoding import decode_step, prefill
from minirlhf.nn.heads import init_scalar_head, logits_backward, logits_forward
from minirlhf.nn.transformer import (
    GPTConfig,
    check_tokens,
    init_transformer,
    transformer_backward,
    transformer_forward,
)
from minirlhf.rlhf.imitation import cross_entropy_backward, cross_entropy_forward
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.rlhf.logprobs import entropy_forward
from minirlhf.rlhf.objectives import AGGREGATIONS, token_weights
from minirlhf.runs.metrics import mean_of_updates, update_metrics
from minirlhf.train import ppo
from minirlhf.train.batches import Batch, pad_batch, row_slices
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.policy import policy_backward, policy_forward
from minirlhf.train.ppo import Experience, minibatch_gradients, ppo_update
from minirlhf.train.reward_model import reward_backward, reward_forward
from minirlhf.train.settings import OptimizerConfig, PPOConfig
from minirlhf.tree import tree_items, tree_map

DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])
PARAMS = {
    dtype: make_params(dtype=dtype, heads=("value_head", "reward_head"))
    for dtype in (np.float64, np.float32)
}


def hidden(batch, dtype=np.float64):
    return transformer_forward(
        PARAMS[dtype]["transformer"], tokens=batch.tokens, mask=batch.mask, config=CONFIG
    )[0]


def policy(batch, dtype=np.float64):
    return policy_forward(PARAMS[dtype], batch=batch, config=CONFIG)[0]


def widened(batch, left, right, rng):
    """The same sequences with more padding, and random ids in all of it."""
    sides = ((0, 0), (left, right))
    mask = np.pad(batch.mask, sides)
    tokens = np.where(mask > 0, np.pad(batch.tokens, sides), rng.integers(11, size=mask.shape))
    return Batch(tokens, mask, batch.prompt_len + left)


# -- who sees whom -------------------------------------------------------------------------------


def test_no_position_sees_a_later_token():
    batch = make_batch((4, 4), (5, 5))
    before = hidden(batch)
    for t in range(batch.tokens.shape[1]):
        tokens = batch.tokens.copy()
        tokens[:, t:] = (tokens[:, t:] + 3) % 7
        after = hidden(batch._replace(tokens=tokens))
        assert_close(after[:, :t], before[:, :t], PADDING[np.float64])
        assert (np.abs(after[:, t:] - before[:, t:]).max(axis=-1) > 1e-3).all()  # all later ones do


def test_the_gradient_of_a_position_reaches_no_later_token():
    batch = make_batch((4, 4), (5, 5))
    batch.tokens[:] = np.arange(9)  # every token once, so a row of dwte is a position
    _, cache = transformer_forward(
        PARAMS[np.float64]["transformer"], tokens=batch.tokens, mask=batch.mask, config=CONFIG
    )
    rng = np.random.default_rng(0)
    for t in range(9):
        dh = np.zeros((2, 9, CONFIG.d_model))
        dh[:, t] = rng.standard_normal((2, CONFIG.d_model))
        dwte = np.abs(transformer_backward(dh, cache)["wte"]).max(axis=1)
        assert (dwte[: t + 1] > 0).all() and (dwte[t + 1 :] == 0).all()


@DTYPES
@given(left=st.integers(0, 3), right=st.integers(0, 3), seed=st.integers(0, 99))
def test_padding_changes_nothing(dtype, left, right, seed):
    """Neither its side nor its length nor what stands in it: hidden states, log-probs, values."""
    batch = make_batch(seed=seed, dtype=dtype)
    wide = widened(batch, left, right, np.random.default_rng(seed))
    real = batch.mask > 0
    assert_close(hidden(wide, dtype)[wide.mask > 0], hidden(batch, dtype)[real], PADDING[dtype])
    narrow_out, wide_out = policy(batch, dtype), policy(wide, dtype)
    real = batch.response_mask > 0
    columns = slice(0, real.shape[1])
    assert_close(wide_out.logp[:, columns][real], narrow_out.logp[real], PADDING[dtype])
    assert_close(wide_out.values[:, columns][real], narrow_out.values[real], PADDING[dtype])
    assert_close(wide_out.logits[:, columns][real], narrow_out.logits[real], PADDING[dtype])


def test_what_stands_in_the_padding_changes_not_one_bit():
    batch = make_batch()
    other = widened(batch, 0, 0, np.random.default_rng(0))
    assert (other.tokens != batch.tokens).any()
    real = batch.mask > 0
    assert_close(hidden(other)[real], hidden(batch)[real], SAME_FORWARD)


def test_a_sequence_alone_is_the_sequence_in_a_batch():
    prompts, responses = (3, 1, 4, 2), (2, 5, 1, 4)
    ids = make_ids([*prompts, *responses])
    out = policy(make_batch(prompts, responses))
    for row in range(4):
        alone = pad_batch([ids[row]], [ids[4 + row]], pad_id=Letters.pad, config=CONFIG)
        alone = alone._replace(mask=alone.mask.astype(np.float64))
        single = policy(alone)
        n = responses[row]
        assert_close(single.logp[0], out.logp[row, :n], BATCH_COMPOSITION[np.float64])
        assert_close(single.values[0], out.values[row, :n], BATCH_COMPOSITION[np.float64])


def test_padding_gets_no_gradient():
    """Exactly 0, and not only small: in the embedding, and through what is written there."""
    batch = make_batch()  # pad is an id of its own
    params = PARAMS[np.float64]
    _, cache = transformer_forward(
        params["transformer"], tokens=batch.tokens, mask=batch.mask, config=CONFIG
    )
    dh = np.random.default_rng(0).standard_normal((*batch.tokens.shape, CONFIG.d_model))
    gradients = transformer_backward(dh * batch.mask[..., None], cache)
    assert (gradients["wte"][Letters.pad] == 0).all()
    used = int(batch.mask.sum(axis=1).max())
    assert (gradients["wpe"][used:] == 0).all() and (gradients["wpe"][:used] != 0).any(axis=1).all()
    other = widened(batch, 0, 0, np.random.default_rng(1))
    _, other_cache = transformer_forward(
        params["transformer"], tokens=other.tokens, mask=other.mask, config=CONFIG
    )
    assert_trees_close(
        transformer_backward(dh * batch.mask[..., None], other_cache), gradients, LOOPS
    )


@DTYPES
@given(left=st.integers(0, 2), right=st.integers(0, 2))
def test_padding_changes_no_gradient(dtype, left, right):
    batch = make_batch(dtype=dtype)

    def gradients(batch):
        out, cache = policy_forward(PARAMS[dtype], batch=batch, config=CONFIG)
        weights = token_weights(batch.response_mask)
        _, loss = cross_entropy_forward(out.logp, weights=weights)
        dlogp = cross_entropy_backward(1.0, loss)
        return policy_backward(None, dlogp, out.values * weights, cache)

    wide = widened(batch, left, right, np.random.default_rng(0))
    assert_trees_close(gradients(wide), gradients(batch), 10 * PADDING[dtype])


# -- one token at a time -------------------------------------------------------------------------


@DTYPES
@given(seed=st.integers(0, 99), extra=st.integers(0, 2))
def test_the_kv_cache_gives_the_full_forward(dtype, seed, extra):
    """Prompts padded on the left; two sequences end early, and their padding is junk."""
    params = PARAMS[dtype]["transformer"]
    batch = widened(
        make_batch((3, 1, 4, 2), (5, 2, 5, 1), seed=seed, dtype=dtype),
        extra,
        0,
        np.random.default_rng(seed),
    )
    P, R = batch.prompt_len, batch.responses.shape[1]
    full = hidden(batch, dtype)
    h, kv = prefill(
        params, tokens=batch.tokens[:, :P], mask=batch.mask[:, :P], config=CONFIG, max_new=R
    )
    assert_close(h, full[:, P - 1], KV_CACHE[dtype])
    for column in range(P, P + R):
        mask = batch.mask[:, column]
        h = decode_step(
            params, kv, tokens=batch.tokens[:, column], mask=mask, column=column, config=CONFIG
        )
        assert h.dtype == dtype
        assert_close(h[mask > 0], full[mask > 0, column], KV_CACHE[dtype])
    assert_close(kv.mask, batch.mask, 0.0)


def test_a_finished_sequence_moves_no_other():
    params = PARAMS[np.float64]["transformer"]
    batch = make_batch((2, 3), (3, 3))
    P = batch.prompt_len

    def steps(second_is_alive):
        h, kv = prefill(
            params, tokens=batch.tokens[:, :P], mask=batch.mask[:, :P], config=CONFIG, max_new=3
        )
        mask = np.array([1.0, second_is_alive])
        for column in range(P, P + 3):
            tokens = batch.tokens[:, column]
            h = decode_step(params, kv, tokens=tokens, mask=mask, column=column, config=CONFIG)
        return h[0]

    assert_close(steps(0.0), steps(1.0), SAME_FORWARD)


# -- tied weights, the start, dtypes -------------------------------------------------------------


def test_one_table_is_read_at_both_ends():
    batch, params = make_batch(), PARAMS[np.float64]
    wte = params["transformer"]["wte"]
    out, cache = policy_forward(params, batch=batch, config=CONFIG)
    P = batch.prompt_len
    h = hidden(batch)[:, P - 1 : -1]
    assert_close(out.logits, h @ wte.T)  # position t - 1 predicts token t
    dlogits = np.random.default_rng(0).standard_normal(out.logits.shape)
    zero = np.zeros_like(out.logp)
    gradients = policy_backward(dlogits, zero, zero, cache)
    dh, dwte_head = logits_backward(dlogits, logits_forward(h, wte)[1])
    dwte_embedding = transformer_backward(dh, cache.trunk)["wte"]
    assert min(np.abs(dwte_head).max(), np.abs(dwte_embedding).max()) > 0.1  # both count
    assert_close(gradients["transformer"]["wte"], dwte_embedding + dwte_head)


def test_the_value_stands_before_the_token_it_judges():
    """V(x, y_<t): moved by the prompt and the tokens before t, and not by token t itself."""
    batch = make_batch((3, 3), (4, 4))
    before = policy(batch).values
    for t in range(4):
        tokens = batch.tokens.copy()
        tokens[:, batch.prompt_len + t] = (tokens[:, batch.prompt_len + t] + 1) % 7
        moved = np.abs(policy(batch._replace(tokens=tokens)).values - before) > 1e-6
        assert not moved[:, : t + 1].any() and moved[:, t + 1 :].all()


def test_init():
    config = GPTConfig(vocab_size=500, n_ctx=100, n_layer=3, n_head=4, d_model=64)
    params = init_transformer(config, rng=np.random.default_rng(0))
    for path, leaf in tree_items(params):
        assert leaf.dtype == np.float32
        residual = path.endswith(("out.w", "down.w"))  # what writes into the residual stream
        if leaf.ndim == 2:
            std = 0.02 / np.sqrt(6) if residual else 0.02  # sqrt(2 L), L = 3
            assert leaf.std() == pytest.approx(std, rel=0.05), path
            assert abs(leaf.mean()) < 4 * std / np.sqrt(leaf.size), path
        else:
            assert (leaf == (1.0 if path.endswith("gain") else 0.0)).all(), path
    assert [leaf.shape for _, leaf in tree_items(params)][:2] == [(500, 64), (100, 64)]
    again = init_transformer(config, rng=np.random.default_rng(0), dtype=np.float64)
    assert_trees_close(tree_map(lambda a: a.astype(np.float32), again), params, SAME_FORWARD)
    other = init_transformer(config, rng=np.random.default_rng(1))
    assert np.abs(other["wte"] - params["wte"]).max() > 0.01


def test_init_of_heads():
    rng = np.random.default_rng(0)
    value = init_scalar_head(64, std=0.0, rng=rng, dtype=np.float32)
    assert (value["w"] == 0).all() and (value["b"] == 0).all()
    reward = init_scalar_head(4000, std=4001**-0.5, rng=rng, dtype=np.float32)
    assert reward["w"].std() == pytest.approx(4001**-0.5, rel=0.05)
    assert {x.dtype for x in (*value.values(), *reward.values())} == {np.dtype(np.float32)}


def test_float32_stays_float32_and_near_float64():
    batch = {dtype: make_batch(dtype=dtype) for dtype in (np.float64, np.float32)}
    outs, gradients, scores = {}, {}, {}
    for dtype in batch:
        params = tree_map(lambda a, d=dtype: a.astype(d), PARAMS[np.float32])  # the same numbers
        outs[dtype], cache = policy_forward(params, batch=batch[dtype], config=CONFIG)
        weights = token_weights(batch[dtype].response_mask)
        _, loss = cross_entropy_forward(outs[dtype].logp, weights=weights)
        dvalues = outs[dtype].values * weights
        gradients[dtype] = policy_backward(None, cross_entropy_backward(1.0, loss), dvalues, cache)
        scores[dtype], reward_cache = reward_forward(params, batch=batch[dtype], config=CONFIG)
        gradients[dtype]["reward"] = reward_backward(scores[dtype], reward_cache)
    single, double = outs[np.float32], outs[np.float64]
    for a, b in zip((*single, scores[np.float32]), (*double, scores[np.float64]), strict=True):
        assert (a.dtype, b.dtype) == (np.float32, np.float64)
        assert_close(a, b, FLOAT32_FORWARD)
    assert {leaf.dtype for _, leaf in tree_items(gradients[np.float32])} == {np.dtype(np.float32)}
    as_double = tree_map(lambda a: a.astype(np.float64), gradients[np.float32])
    assert_trees_close(as_double, gradients[np.float64], FLOAT32_GRADIENT)


@pytest.mark.parametrize("kl_mode", KL_MODES)
def test_ppo_stays_float32(kl_mode):
    settings = PPOConfig(kl_mode=kl_mode, ent_coef=0.1, value_clip_eps=0.2, dual_clip=3.0)
    gradients, loss, logp, *_ = minibatch_gradients(
        PARAMS[np.float32],
        make_experience_of(make_batch(dtype=np.float32), np.float32),
        config=CONFIG,
        settings=settings,
    )
    assert np.isfinite(loss) and logp.dtype == np.float32
    assert {leaf.dtype for _, leaf in tree_items(gradients)} == {np.dtype(np.float32)}


# -- what is refused -----------------------------------------------------------------------------

GOOD = np.array([[1, 2, 3], [4, 5, 6]])
ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (GOOD, ONES[:, :2], r"one shape \(B, T\); got \(2, 3\) and \(2, 2\)"),
        (GOOD[0], ONES[0], r"one shape \(B, T\); got \(3,\) and \(3,\)"),
        (GOOD.astype(float), ONES, "expected integers; got float64"),
        (GOOD, 0.5 * ONES, "expected 0 and 1 with at least one 1 in every sequence"),
        (GOOD, np.array([[1.0, 1, 1], [0, 0, 0]]), "at least one 1 in every sequence"),
        (GOOD, np.array([[1.0, 1, np.nan], [1, 1, 1]]), "expected 0 and 1"),
        (GOOD[:0], ONES[:0], "at least one 1"),
        (GOOD - 2, ONES, r"expected ids in \[0, 11\); got -1 to 4"),
        (GOOD + 5, ONES, r"expected ids in \[0, 11\); got 6 to 11"),
        (np.ones((1, 13), dtype=int), np.ones((1, 13)), "at most 12 tokens .* got 13"),
    ],
)
def test_tokens_that_would_give_a_wrong_number_are_refused(tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        check_tokens(tokens, mask, CONFIG)


def test_good_tokens_pass():
    check_tokens(GOOD, ONES, CONFIG)
    check_tokens(GOOD.astype(np.int32), ONES > 0, CONFIG)
    # Padding does not count: 13 columns with 12 tokens fit 12 positions.
    mask = np.ones((1, 13))
    mask[0, 0] = 0
    check_tokens(np.ones((1, 13), dtype=int), mask, CONFIG)


@pytest.mark.parametrize(
    "wrong", [{"n_layer": 0}, {"vocab_size": 0}, {"n_head": 3}, {"d_model": 0}, {"n_ctx": -1}]
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match="GPTConfig: expected"):
        replace(CONFIG, **wrong)


def test_a_longer_prompt_than_positions_is_refused_by_pad_batch():
    with pytest.raises(ValueError, match="at most 12 tokens"):
        make_batch((9, 1), (4, 1))
    with pytest.raises(ValueError, match="as many non-empty prompts as responses"):
        make_batch((0, 1), (4, 1))


# -- extremes ------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("kl_mode", KL_MODES)
def test_logits_of_ten_thousand_stay_finite(dtype, kl_mode):
    batch = make_batch(dtype=dtype)
    params = copy.deepcopy(PARAMS[dtype])
    params["transformer"]["ln_f"]["gain"] *= 1e4
    out, _ = policy_forward(params, batch=batch, config=CONFIG)
    assert np.abs(out.logits).max() > 1e4 and out.logp.min() < -1e4
    assert np.isfinite(out.logp).all()
    assert np.isfinite(entropy_forward(out.logits)[0]).all()
    gradients, loss, *_ = minibatch_gradients(
        params,
        make_experience_of(batch, dtype),  # of the moderate policy: ratios beyond exp
        config=CONFIG,
        settings=PPOConfig(kl_mode=kl_mode, ent_coef=0.1),
    )
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for _, leaf in tree_items(gradients))


# -- the reward model ----------------------------------------------------------------------------


@DTYPES
def test_a_score_depends_on_nobody_else(dtype):
    prompts, responses = make_ids((3, 1, 4, 2)), make_ids((2, 5, 1, 4), seed=1)

    def score(rows):
        batch = pad_batch(
            [prompts[i] for i in rows],
            [responses[i] for i in rows],
            pad_id=Letters.pad,
            config=CONFIG,
            dtype=dtype,
        )
        return reward_forward(PARAMS[dtype], batch=batch, config=CONFIG)[0]

    together = score([0, 1, 2, 3])
    for rows in ([0], [1], [2], [3], [3, 1], [2, 0, 1]):
        assert_close(score(rows), together[rows], BATCH_COMPOSITION[dtype])
    assert len(set(np.round(together, 3))) == 4


def test_a_score_reads_the_last_real_token_and_what_is_before_it():
    batch = make_batch((2, 2), (3, 3))
    before, _ = reward_forward(PARAMS[np.float64], batch=batch, config=CONFIG)
    for column in range(5):
        tokens = batch.tokens.copy()
        tokens[:, column] = (tokens[:, column] + 1) % 7
        after, _ = reward_forward(
            PARAMS[np.float64], batch=batch._replace(tokens=tokens), config=CONFIG
        )
        assert (np.abs(after - before) > 1e-6).all()


# -- PPO's loss ----------------------------------------------------------------------------------


def make_experience_of(batch, dtype=np.float64, *, mode="token-mean", on_policy=False):
    """What PPO holds constant, near a policy: old a little away from it (or it), ref further."""
    rng = np.random.default_rng(5)
    out = policy(batch, dtype)

    def near(x, distance):
        return (x + distance * rng.standard_normal(x.shape)).astype(dtype)

    return Experience(
        batch=batch,
        old_logp=out.logp if on_policy else near(out.logp, 0.2),
        ref_logp=near(out.logp, 0.5),
        ref_logits=near(out.logits, 0.5),
        old_values=near(out.values, 0.3),
        advantages=near(0 * out.values, 1.0),
        returns=near(out.values, 1.0),
        weights=token_weights(batch.response_mask, mode=mode),
        kl_loss_coef=1.0,
    )


@DTYPES
def test_the_first_ratio_is_exactly_1(dtype):
    """The same rows in the same shapes: the log-ratio is 0, not one bit away, and nothing clips."""
    batch = make_batch(dtype=dtype)
    again = policy(batch, dtype)
    assert_close(again.logp - policy(batch, dtype).logp, np.zeros_like(again.logp), SAME_FORWARD)
    experience = make_experience_of(batch, dtype, on_policy=True)
    settings = PPOConfig()
    step = minibatch_gradients(PARAMS[dtype], experience, config=CONFIG, settings=settings)
    metrics = update_metrics(step, experience, settings)
    assert metrics["policy/approxkl_avg"] == metrics["policy/kl_old_k3_token"] == 0.0
    assert (metrics["policy/clipfrac_avg"], metrics["val/ratio"]) == (0.0, 1.0)


@DTYPES
def test_other_rows_in_the_batch_change_the_ratio_by_rounding_only(dtype):
    batch = make_batch(dtype=dtype)
    whole = policy(batch, dtype)
    for index in (slice(0, 1), slice(1, 3), np.array([3, 0]), np.array([2])):
        part = policy(batch.rows(index), dtype)
        assert_close(part.logp, whole.logp[index], BATCH_COMPOSITION[dtype])
        assert_close(part.values, whole.values[index], BATCH_COMPOSITION[dtype])


@pytest.mark.parametrize(
    "kl_mode", ["reward_k1", "loss_k2_tok", "loss_k3_seq", "loss_rb", "loss_rho_k3"]
)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_micro_batches_change_nothing(mode, kl_mode):
    experience = make_experience_of(make_batch(), mode=mode)
    settings = PPOConfig(
        aggregation=mode, kl_mode=kl_mode, ent_coef=0.1, value_clip_eps=0.2, vf_coef=0.5
    )

    def run(size):
        return minibatch_gradients(
            PARAMS[np.float64],
            experience,
            config=CONFIG,
            settings=replace(settings, micro_batch_size=size),
        )

    gradients, loss, logp, values, clipped, parts = run(0)
    for size in (1, 2, 3):
        got = run(size)
        assert_trees_close(got[0], gradients, MICRO_BATCH[np.float64])
        assert_close(got[1], loss)
        real = experience.batch.response_mask > 0
        assert_close(got.logp[real], logp[real])
        assert_close(got.values[real], values[real])
        assert np.array_equal(got.clipped[real], clipped[real])
        assert got.parts == pytest.approx(parts)


def optimizer_and_experience(**settings):
    optimizer = Optimizer(
        make_params(), OptimizerConfig(schedule="constant", **settings), total_steps=8
    )
    return optimizer, make_experience_of(make_batch(), on_policy=True)


def test_a_learning_rate_of_0_leaves_every_ratio_at_1():
    optimizer, experience = optimizer_and_experience(learning_rate=0.0)
    settings = PPOConfig(epochs=3, minibatches=1, batch_size=4, kl_mode="loss_rb")
    updates = ppo_update(
        optimizer, experience, config=CONFIG, settings=settings, rng=np.random.default_rng(0)
    )
    metrics = mean_of_updates(updates, settings)
    assert metrics["policy/updates"] == 3
    assert metrics["policy/clipfrac_avg"] == metrics["policy/clamped_log_ratios"] == 0
    assert metrics["policy/approxkl_avg"] < 1e-28  # rows in another order: rounding
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize(("target_kl", "made"), [(0.0, 8), (1e-12, 1), (1e3, 8)])
def test_epochs_end_when_the_policy_has_moved_too_far(target_kl, made):
    """The first update finds k3 = 0; the second sees what the first has done, and is not made."""
    optimizer, experience = optimizer_and_experience(learning_rate=1e-3)
    settings = PPOConfig(epochs=4, minibatches=2, batch_size=4, target_kl=target_kl)
    updates = ppo_update(
        optimizer, experience, config=CONFIG, settings=settings, rng=np.random.default_rng(0)
    )
    metrics = mean_of_updates(updates, settings)
    assert metrics["policy/updates"] == made == optimizer.state.step
    assert optimizer.state.step + optimizer.skipped == 8  # the schedule counts them all


def test_every_epoch_sees_every_response_once(monkeypatch):
    seen = []
    optimizer, experience = optimizer_and_experience(learning_rate=1e-3)
    inner = ppo.minibatch_gradients

    def spy(params, minibatch, **constants):
        seen.append(minibatch.old_logp[:, 0].tolist())
        mask = minibatch.batch.response_mask  # weights are made anew for these rows
        assert_close(minibatch.weights, mask / mask.sum())
        return inner(params, minibatch, **constants)

    monkeypatch.setattr(ppo, "minibatch_gradients", spy)
    ppo_update(
        optimizer,
        experience,
        config=CONFIG,
        settings=PPOConfig(epochs=5, minibatches=2, batch_size=4),
        rng=np.random.default_rng(0),
    )
    everyone = sorted(experience.old_logp[:, 0].tolist())
    assert [len(rows) for rows in seen] == [2, 2] * 5
    epochs = [seen[i] + seen[i + 1] for i in range(0, 10, 2)]
    assert all(sorted(order) == everyone for order in epochs)
    assert len({tuple(order) for order in epochs}) > 1  # in a new order


def test_row_slices():
    assert row_slices(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert row_slices(5, 0) == row_slices(5, 9) == [slice(0, 5)]
    assert row_slices(0, 2) == row_slices(0, 0) == []


@given(left=st.integers(0, 2), right=st.integers(0, 2))
def test_trimming_changes_nothing(left, right):
    batch = make_batch()
    wide = Batch(
        np.pad(batch.tokens, ((0, 0), (left, right)), constant_values=Letters.pad),
        np.pad(batch.mask, ((0, 0), (left, right))),
        batch.prompt_len + left,
    )
    trimmed = wide.trimmed()
    assert trimmed.prompt_len == batch.prompt_len
    assert_close(trimmed.tokens, batch.tokens, 0.0)
    assert_close(trimmed.mask, batch.mask, 0.0)
    assert_close(policy(trimmed).logp, policy(batch).logp, SAME_FORWARD)


def test_a_prompt_batch_without_responses_has_no_log_probs():
    batch = pad_batch(make_ids((3, 2)), [[], []], pad_id=Letters.pad, config=CONFIG)
    out = policy(batch._replace(mask=batch.mask.astype(np.float64)))
    assert out.logp.shape == (2, 0) and out.values.shape == (2, 0)
    looked, _ = policy_forward(PARAMS[np.float64], batch=batch, config=CONFIG, keep=False)
    assert looked.logp.shape == (2, 0)
