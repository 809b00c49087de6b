"""Advantages: what GAE must satisfy, that padding enters nowhere, and what its bias is."""

import math

import numpy as np
import pytest
from fakegpu import fakegpu
from hypothesis import given
from hypothesis import strategies as st
from tiny import ragged, with_junk
from tolerances import DIFFERENT, ENUMERATION, LOOPS, assert_close

from minirlhf.rlhf.advantages import gae, masked_mean, masked_var, masked_whiten, token_rewards
from minirlhf.rlhf.imitation import cross_entropy_forward
from minirlhf.rlhf.kl import (
    KL_MODES,
    full_kl_forward,
    future_kl,
    kl_estimate,
    sequence_kl_loss_forward,
    token_kl_loss_forward,
)
from minirlhf.rlhf.logprobs import response_sum
from minirlhf.runs.metrics import iteration_metrics
from minirlhf.train.batches import Batch
from minirlhf.train.ppo import Iteration, make_experience
from minirlhf.train.rollout import Rollout, Samples
from minirlhf.train.settings import PPOConfig

GAMMAS = st.sampled_from([0.0, 0.5, 0.99, 1.0])
LAMBDAS = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def drawn(case):
    rng, mask = case
    rewards, values = rng.standard_normal((2, *mask.shape))
    return rewards, values, mask, rng


# -- GAE -----------------------------------------------------------------------------------------


@given(ragged(), GAMMAS)
def test_lambda_1_is_the_return_minus_the_value(case, gamma):
    rewards, values, mask, _ = drawn(case)
    advantages, returns = gae(rewards, values, mask=mask, gamma=gamma, lam=1.0)
    discounted = np.zeros_like(rewards)
    for b, t in zip(*np.nonzero(mask), strict=True):
        length = int(mask[b].sum())
        discounted[b, t] = sum(gamma ** (i - t) * rewards[b, i] for i in range(t, length))
    assert_close(advantages, (discounted - values) * mask)
    assert_close(returns, discounted)


@given(ragged(), GAMMAS)
def test_lambda_0_is_the_one_step_error(case, gamma):
    rewards, values, mask, _ = drawn(case)
    following = np.pad(values * mask, ((0, 0), (0, 1)))[:, 1:]  # 0 after the last token
    advantages, _ = gae(rewards, values, mask=mask, gamma=gamma, lam=0.0)
    assert_close(advantages, (rewards + gamma * following - values) * mask)


@given(ragged(), GAMMAS, LAMBDAS)
def test_linear_in_rewards_and_values_together(case, gamma, lam):
    rewards, values, mask, rng = drawn(case)
    other_rewards, other_values = rng.standard_normal((2, *mask.shape))
    one = gae(rewards, values, mask=mask, gamma=gamma, lam=lam)
    other = gae(other_rewards, other_values, mask=mask, gamma=gamma, lam=lam)
    both = gae(
        rewards - 3 * other_rewards, values - 3 * other_values, mask=mask, gamma=gamma, lam=lam
    )
    for i in range(2):
        assert_close(both[i], one[i] - 3 * other[i])


@given(ragged(), GAMMAS, LAMBDAS)
def test_a_padded_batch_is_its_sequences_one_by_one(case, gamma, lam):
    rewards, values, mask, _ = drawn(case)
    batch = gae(with_junk(rewards, mask), with_junk(values, mask), mask=mask, gamma=gamma, lam=lam)
    for b, length in enumerate(mask.sum(axis=1).astype(int)):
        alone = gae(
            rewards[b : b + 1, :length],
            values[b : b + 1, :length],
            mask=np.ones((1, length)),
            gamma=gamma,
            lam=lam,
        )
        for whole, single in zip(batch, alone, strict=True):
            assert_close(whole[b, :length], single[0])
            assert (whole[b, length:] == 0).all()


def test_the_defaults_are_those_of_the_field():
    rewards, values = np.random.default_rng(0).standard_normal((2, 2, 4))
    mask = np.ones((2, 4))
    by_default = gae(rewards, values, mask=mask)
    assert_close(by_default, gae(rewards, values, mask=mask, gamma=1.0, lam=0.95), 0.0)


def test_a_response_that_was_cut_off_ends_in_value_0():
    # reward 1 at the last token, value 2 everywhere: 1 + 0 - 2, whatever gamma and lambda are.
    values = np.array([[2.0, 2.0]])
    for gamma, lam in [(1.0, 0.95), (0.9, 0.0)]:
        advantages, _ = gae(
            np.array([[0.0, 1.0]]), values, mask=np.ones((1, 2)), gamma=gamma, lam=lam
        )
        assert advantages[0, 1] == -1.0


GAPS = [[[1.0, 0, 1]], [[0.0, 1, 1]], [[1.0, 1, 0], [0, 0, 1]], [[False, True, False]]]


@pytest.mark.parametrize("mask", GAPS, ids=str)
def test_a_mask_with_a_gap_is_refused(mask):
    """GAE would carry what comes after the gap into it, and promises 0 there."""
    mask = np.array(mask)
    x = np.ones(mask.shape)
    with pytest.raises(ValueError, match="gae: expected a mask with padding on the right alone"):
        gae(x, x, mask=mask)
    with pytest.raises(ValueError, match="token_rewards: expected .*, padding on its right"):
        token_rewards(x[:, 0], x, mask=mask, kl_coef=0.1)


def test_a_gpu_waits_once_for_the_look_at_the_mask():
    """In token_rewards; GAE, which comes after it with the same mask, does not wait."""
    host = np.ones((2, 3)), np.array([[1.0, 1, 1], [1, 0, 0]])
    x, mask = (fakegpu.asarray(a) for a in host)
    before = fakegpu.sync_count
    rewards = token_rewards(x[:, 0], x, mask=mask, kl_coef=0.1)
    assert fakegpu.sync_count - before == 1
    with fakegpu.no_sync():
        gae(rewards, x, mask=mask)
    with pytest.raises(ValueError, match="padding on its right"):
        token_rewards(x[:, 0], x, mask=fakegpu.asarray(host[1][:, ::-1].copy()), kl_coef=0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_stay(dtype):
    rewards, values, mask = np.ones((3, 2, 4), dtype=dtype)
    outputs = [
        *gae(rewards, values, mask=mask),
        *masked_whiten(rewards, mask=mask),
        masked_mean(rewards, mask=mask),
        token_rewards(rewards[:, 0], values, mask=mask, kl_coef=0.1),
    ]
    assert {x.dtype for x in outputs} == {np.dtype(dtype)}


def test_errors_name_what_was_expected_and_what_came():
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"gae: .* one shape; got \(2, 3\), \(2, 2\)"):
        gae(x, x[:, :2], mask=x)
    with pytest.raises(ValueError, match=r"expected score \(B,\).*; got \(3,\), \(2, 3\)"):
        token_rewards(np.zeros(3), x, mask=x, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"token_rewards: .*got \(2,\), \(2, 2\) and \(2, 3\)"):
        token_rewards(np.zeros(2), x[:, :2], mask=x, kl_coef=0.1)
    with pytest.raises(ValueError, match="at least one token in every response"):
        token_rewards(np.zeros(2), x, mask=np.array([[1.0, 1, 0], [0, 0, 0]]), kl_coef=0.1)


def test_arguments_are_not_written_to():
    rng = np.random.default_rng(0)
    rewards, values = rng.standard_normal((2, 2, 3))
    mask = np.array([[1.0, 1, 1], [1, 0, 0]])
    score = np.ones(2)
    before = [x.copy() for x in (rewards, values, mask, score)]
    token_rewards(score, rewards, mask=mask, kl_coef=0.2)
    gae(rewards, values, mask=mask)
    masked_whiten(rewards, mask=mask)
    for x, copy in zip((rewards, values, mask, score), before, strict=True):
        assert_close(x, copy, 0.0)


# -- means over real tokens ----------------------------------------------------------------------


@given(ragged(max_B=4, max_T=6), st.sampled_from([1e-3, 1.0, 1e3]))
def test_whitened_advantages_have_mean_0_and_variance_1(case, scale):
    rng, mask = case
    x = scale * (rng.standard_normal(mask.shape) + 5)
    white, divided_by = masked_whiten(x, mask=mask)
    kept = white[mask > 0]
    assert abs(kept.mean()) < 1e-9
    var = masked_var(x, mask=mask)
    assert kept.var() == pytest.approx(var / (var + 1e-8), abs=1e-9)  # 1, or 0 for one token
    if var > 1e-3:
        assert kept.var() == pytest.approx(1.0, abs=2e-5)
    shifted, _ = masked_whiten(x, mask=mask, shift_mean=False)
    assert shifted[mask > 0].mean() == pytest.approx(x[mask > 0].mean())  # rewards keep their mean
    assert_close(white * divided_by, (x - masked_mean(x, mask=mask)) * mask, 1e-10 * scale)


@given(ragged(max_B=4, max_T=6))
def test_padding_enters_no_mean(case):
    rng, mask = case
    x = rng.standard_normal(mask.shape)
    junk = with_junk(x, mask, junk=[np.nan, np.inf, -np.inf])
    for function in (masked_mean, masked_var):
        assert_close(function(junk, mask=mask), function(x, mask=mask), 0.0)
    for clean, dirty in zip(
        masked_whiten(x, mask=mask), masked_whiten(junk, mask=mask), strict=True
    ):
        assert_close(dirty, clean, 0.0)
    wider = [np.pad(a, ((0, 0), (2, 3))) for a in (x, mask)]
    assert_close(masked_mean(wider[0], mask=wider[1]), masked_mean(x, mask=mask))
    assert_close(masked_var(wider[0], mask=wider[1]), masked_var(x, mask=mask))


def test_an_empty_mask_gives_0():
    x, mask = np.array([[np.nan, np.inf, -np.inf]] * 2), np.zeros((2, 3))
    assert masked_mean(x, mask=mask) == 0.0
    assert masked_var(x, mask=mask) == 0.0
    white, scale = masked_whiten(x, mask=mask)
    assert (white == 0).all() and np.isfinite(scale)
    assert all((a == 0).all() for a in gae(x, x, mask=mask))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [13580.0, -13580.1, 1e-3, 0.1, 1e9 / 3, 1e30, -1e37])
@pytest.mark.parametrize("shape", [(1, 3), (7, 13), (64, 50)])
def test_equal_numbers_are_whitened_to_0(dtype, size, shape):
    """In float32 the mean of many 13580s is 13580.001: a distance of ten times sqrt(eps)."""
    x, mask = np.full(shape, size, dtype=dtype), np.ones(shape, dtype=dtype)
    mask[-1, 1:] = 0
    for junk in (x, with_junk(x, mask, junk=[np.nan, np.inf, -np.inf])):
        white, scale = masked_whiten(junk, mask=mask)
        assert (white == 0).all() and scale == pytest.approx(1e-4)
        assert masked_var(junk, mask=mask) == 0
        kept, _ = masked_whiten(junk, mask=mask, shift_mean=False)
        assert (kept[mask > 0] == x[0, 0]).all() and kept.dtype == dtype


def test_whitening_integers_gives_what_it_gives_for_floats():
    for dtype in (np.int32, np.int64, np.uint8):
        white, scale = masked_whiten(np.array([[1, 2, 3]], dtype=dtype), mask=np.ones((1, 3)))
        assert_close(white, [[-math.sqrt(1.5), 0.0, math.sqrt(1.5)]], 1e-6)  # sd sqrt(2/3)
        assert scale == pytest.approx(math.sqrt(2 / 3))


@pytest.mark.parametrize("eps", [0.0, 1e-46, -1.0])
def test_whitening_needs_an_eps(eps):
    with pytest.raises(ValueError, match=f"masked_whiten: expected eps > 0, .* got {eps}"):
        masked_whiten(np.ones((1, 2), dtype=np.float32), mask=np.ones((1, 2)), eps=eps)


def test_no_tokens_at_all_have_no_variance():
    x = np.ones((2, 0))
    assert masked_var(x, mask=x) == masked_mean(x, mask=x) == 0
    assert masked_whiten(x, mask=x)[0].shape == (2, 0)


def test_one_token_is_whitened_to_0():
    white, scale = masked_whiten(np.array([[3.0]]), mask=np.ones((1, 1)))
    assert white.tolist() == [[0.0]] and scale == pytest.approx(1e-4)


# -- what PPO holds constant ---------------------------------------------------------------------

STOP = 9
MASK = np.array([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
TOKENS = np.array([[1, 2, 3, 4], [5, STOP, 0, 0], [6, 1, STOP, STOP]])  # the first one is cut off


def make_rollout(*, junk=0.0):
    """Three responses after a prompt of two tokens; all padding holds `junk`."""
    rng = np.random.default_rng(0)
    old_logp, ref_logp, values, entropy, kl_full = (
        np.where(MASK > 0, x, junk) for x in rng.standard_normal((5, *MASK.shape))
    )
    tokens = np.concatenate([np.ones((3, 2), dtype=int), TOKENS], axis=1)
    batch = Batch(tokens, np.concatenate([np.ones((3, 2)), MASK], axis=1), 2)
    samples = Samples([[1, 1]] * 3, [[1]] * 3, batch)
    score = np.array([1.0, -2.0, 0.5])
    return Rollout(samples, old_logp, ref_logp, None, values, entropy, kl_full, score)


def experience_of(rollout, *, kl_coef=0.3, **settings):
    known = {"settings": PPOConfig(**settings), "stop_id": STOP}
    experience = make_experience(rollout, kl_coef=kl_coef, **known)
    iteration = Iteration(rollout, experience, [], kl_coef, kl_coef, None)
    return experience, iteration_metrics(iteration, **known)


@pytest.mark.parametrize("kl_mode", KL_MODES)
def test_experience(kl_mode):
    """Rewards, GAE, whitening in this order: returns are taken before the whitening."""
    rollout, estimator = make_rollout(), KL_MODES[kl_mode].in_reward
    got, metrics = experience_of(rollout, kl_mode=kl_mode)
    score = rollout.score
    if estimator == "full":
        kl_token = rollout.kl_full
    else:
        kl_token = kl_estimate(rollout.old_logp - rollout.ref_logp, estimator or "k1")
    rewards = token_rewards(score, kl_token, mask=MASK, kl_coef=0.3 if estimator else 0.0)
    advantages, returns = gae(rewards, rollout.values, mask=MASK, gamma=1.0, lam=0.95)
    white, scale = masked_whiten(advantages, mask=MASK)
    assert_close(got.advantages, white)
    assert_close(got.returns, returns)
    assert_close(got.kl_loss_coef * scale, 0.3)  # a penalty in the loss is divided as they are
    assert scale > 1.1
    for name in ("old_logp", "ref_logp"):
        assert_close(getattr(got, name), getattr(rollout, name), 0.0)
    assert_close(got.old_values, rollout.values, 0.0)
    plain, _ = experience_of(rollout, kl_mode=kl_mode, whiten_advantages=False, gamma=0.9, lam=0.5)
    assert_close(plain.advantages, gae(rewards, rollout.values, mask=MASK, gamma=0.9, lam=0.5)[0])
    assert plain.kl_loss_coef == 0.3
    # The penalty is summed over each response: nats a response, not a token. What the reward holds
    # of it is the mode's estimate, or nothing.
    penalty = ((rollout.old_logp - rollout.ref_logp) * MASK).sum(axis=1)
    assert metrics["objective/kl"] == pytest.approx(penalty.mean())
    given = -0.3 * (kl_token * MASK).sum(axis=1).mean() if estimator else 0.0
    assert metrics["objective/non_score_reward"] == pytest.approx(given)
    assert metrics["objective/rlhf_reward"] == pytest.approx(score.mean() + given)
    assert metrics["objective/scores"] == pytest.approx(score.mean())
    assert metrics["val/num_eos_tokens"] == 2
    assert metrics["response_length/mean"] == 3


def test_a_missing_stop_token_costs_and_padding_is_none():
    """The first response has no stop token; the third one's padding looks like one."""
    rollout = make_rollout()
    plain, fined = (
        experience_of(rollout, missing_eos_penalty=c, whiten_advantages=False)[0]
        for c in (0.0, 5.0)
    )
    # gamma = 1: the return of the last token is its reward.
    assert_close((plain.returns - fined.returns)[:, 0] > 0, [True, False, False])
    assert (plain.returns - fined.returns)[0, 3] == pytest.approx(5.0)
    unstopped = rollout.samples.batch._replace(tokens=rollout.batch.tokens.copy())
    unstopped.tokens[2, 4] = 1  # now only its padding reads STOP
    rollout = rollout._replace(samples=rollout.samples._replace(batch=unstopped))
    fined, metrics = experience_of(rollout, missing_eos_penalty=5.0, whiten_advantages=False)
    assert (plain.returns - fined.returns)[2, 2] == pytest.approx(5.0)
    assert metrics["val/num_eos_tokens"] == 1


def test_scores_are_cut_and_rewards_are_whitened_without_their_mean():
    rollout = make_rollout()
    settings = {"whiten_advantages": False, "lam": 1.0, "kl_coef": 0.0}
    cut, metrics = experience_of(rollout, score_clip=0.75, **settings)
    assert_close(cut.returns[:, 0], [0.75, -0.75, 0.5])
    assert metrics["objective/scores"] == pytest.approx(rollout.score.mean())  # as it was given
    assert metrics["objective/rlhf_reward"] == pytest.approx(0.5 / 3)
    white, _ = experience_of(rollout, whiten_rewards=True, **settings)
    rewards = token_rewards(rollout.score, 0 * MASK, mask=MASK, kl_coef=0.0)
    rewards, _ = masked_whiten(rewards, mask=MASK, shift_mean=False)
    assert_close(white.returns[:, 0], rewards.sum(axis=1))


def test_beta_in_the_loss_is_divided_by_all_that_whitening_divides_by():
    """With lam = 1 and V = 0 the penalty in the reward and the one in the loss keep one beta."""
    rollout = make_rollout()
    got, _ = experience_of(rollout, kl_mode="reward_and_loss_k3", whiten_rewards=True)
    kl_token = kl_estimate(rollout.old_logp - rollout.ref_logp, "k3")
    rewards = token_rewards(rollout.score, kl_token, mask=MASK, kl_coef=0.3)
    rewards, reward_scale = masked_whiten(rewards, mask=MASK, shift_mean=False)
    advantages, _ = gae(rewards, rollout.values, mask=MASK, gamma=1.0, lam=0.95)
    _, advantage_scale = masked_whiten(advantages, mask=MASK)
    assert_close(got.kl_loss_coef, 0.3 / (reward_scale * advantage_scale))
    assert abs(reward_scale - 1) > 0.1


def test_the_penalty_for_a_missing_stop_token_is_not_cut():
    rollout = make_rollout()  # the first response has none, and a score of 1
    settings = {"score_clip": 0.75, "missing_eos_penalty": 2.0, "whiten_advantages": False}
    got, _ = experience_of(rollout, kl_coef=0.0, lam=1.0, **settings)
    assert got.returns[0, 0] == pytest.approx(0.75 - 2.0)


def test_broadcasting_is_refused():
    x, row = np.ones((2, 3)), np.ones((1, 3))
    for call in (
        lambda: masked_mean(x, mask=np.ones(3)),
        lambda: masked_whiten(x, mask=row),
        lambda: masked_whiten(row, mask=x),
        lambda: masked_var(row, mask=x),
        lambda: cross_entropy_forward(x, weights=row),
        lambda: token_kl_loss_forward(x, old_logp=x, ref_logp=x, weights=row, estimator="k2"),
        lambda: sequence_kl_loss_forward(x, old_logp=x, ref_logp=row, weights=x, estimator="k2"),
        lambda: full_kl_forward(x, ref_logits=row),
        lambda: future_kl(x, mask=row),
        lambda: response_sum(x, mask=row),
    ):
        with pytest.raises(ValueError, match=r"of one shape; got \("):
            call()


@pytest.mark.parametrize("junk", [1e6, np.nan])
def test_padding_changes_no_experience_and_no_metric(junk):
    for settings in ({}, {"whiten_rewards": True, "aggregation": "seq-mean-token-mean"}):
        clean, metrics = experience_of(make_rollout(), **settings)
        dirty, dirty_metrics = experience_of(make_rollout(junk=junk), **settings)
        assert dirty_metrics == metrics
        for name in ("advantages", "returns", "weights", "kl_loss_coef"):
            assert_close(getattr(dirty, name), getattr(clean, name), 0.0)


# -- the bias of GAE, by enumeration -------------------------------------------------------------

V, T = 3, 3
RESPONSES = np.array(list(np.ndindex(*[V] * T)))  # (27, T)
NODES = sum(V**t for t in range(T))
NODE = np.array(
    [
        [sum(V**i for i in range(t)) + int(sum(y[i] * V**i for i in range(t))) for t in range(T)]
        for y in RESPONSES
    ]
)


class Toy:
    """A policy with a row of logits a prefix; rewards at every token; everything enumerated."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        logits = rng.standard_normal((NODES, V))
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        self.token_p = p[NODE, RESPONSES]  # (27, T)
        self.prob = self.token_p.prod(axis=1)
        # d log p(token) / d logits of its prefix: one-hot - p, (27, T, V)
        self.score = np.eye(V)[RESPONSES] - p[NODE]
        final = rng.standard_normal(len(RESPONSES))
        kl_token = rng.standard_normal((NODES, V))[NODE, RESPONSES]
        self.rewards = token_rewards(final, kl_token, mask=np.ones_like(kl_token), kl_coef=0.5)
        to_go = self.rewards[:, ::-1].cumsum(axis=1)[:, ::-1]
        weight, total = np.zeros(NODES), np.zeros(NODES)
        np.add.at(weight, NODE, self.prob[:, None])
        np.add.at(total, NODE, self.prob[:, None] * to_go)
        self.values = total / weight  # V(prefix) = E[reward to go]

    def policy_gradient(self, advantages):
        """E[sum_t score_t A_t] in the logits, (NODES, V)."""
        out = np.zeros((NODES, V))
        np.add.at(out, NODE, self.prob[:, None, None] * self.score * advantages[..., None])
        return out

    def gae_gradient(self, values, lam):
        advantages, _ = gae(
            self.rewards, values[NODE], mask=np.ones(NODE.shape), gamma=1.0, lam=lam
        )
        return self.policy_gradient(advantages)

    def true_gradient(self):
        """d/dlogits of E[sum of rewards] = E[score of every token x the whole return]."""
        whole = np.broadcast_to(self.rewards.sum(axis=1, keepdims=True), NODE.shape)
        return self.policy_gradient(whole)

    def bias(self, values, lam):
        """|gradient with GAE - true gradient|, relative to the true one."""
        true = self.true_gradient()
        return np.linalg.norm(self.gae_gradient(values, lam) - true) / np.linalg.norm(true)


@pytest.mark.parametrize("seed", range(3))
def test_gae_is_unbiased_at_lambda_1_or_with_the_exact_value(seed):
    toy = Toy(seed)
    assert toy.prob.sum() == pytest.approx(1.0, abs=LOOPS)
    noise = np.random.default_rng(seed).standard_normal(NODES)
    for lam in (0.0, 0.5, 0.95, 1.0):
        assert toy.bias(toy.values, lam) < ENUMERATION
    for values in (0 * noise, noise, toy.values + 0.5 * noise):
        assert toy.bias(values, 1.0) < ENUMERATION
        biases = [toy.bias(values, lam) for lam in (0.0, 0.5, 0.95)]
        assert biases[0] > biases[1] > biases[2] > DIFFERENT / 2
        assert biases[0] > 10 * DIFFERENT
