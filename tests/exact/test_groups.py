"""Advantages of groups: what their gradient is on average, by every pair or triple of responses."""

import itertools

import numpy as np
import pytest
from tolerances import assert_close

from minirlhf.exact.expected import make_random_world
from minirlhf.rlhf.advantages import advantages_without_critic, importance_weights
from minirlhf.rlhf.objectives import SURROGATES, token_weights

WORLD = make_random_world(seed=3, vocab_size=3, max_tokens=3, d_model=8)
PROBS, MASK = WORLD.probs("theta"), WORLD.responses.mask
REWARDS = np.zeros(MASK.shape)
REWARDS[np.arange(len(MASK)), MASK.sum(axis=1).astype(int) - 1] = WORLD.rewards


def scores(name="theta"):
    """(M, N V) of each response: how often token a follows prefix s, less what pi expects."""
    (N, V), responses = WORLD.logits[name].shape, WORLD.responses
    pi, found = np.exp(WORLD.log_probs(name)), np.zeros((len(MASK), N, V))
    for y, t in zip(*np.nonzero(MASK), strict=True):
        node = responses.nodes[y, t]
        found[y, node] -= pi[node]
        found[y, node, responses.tokens[y, t]] += 1
    return found.reshape(len(MASK), -1)


SCORES = scores()
EXACT = (PROBS * WORLD.rewards) @ SCORES  # grad E[r] in logits


def expected(G, form):
    """E of (1/G) sum_i A_i grad log pi(y_i), over every group of G independent responses."""
    total = 0.0
    for y in itertools.product(range(len(MASK)), repeat=G):
        rows = list(y)
        A = advantages_without_critic(
            REWARDS[rows], mask=MASK[rows], form=form, samples_per_prompt=G
        )
        total = total + PROBS[rows].prod() * (A[:, 0] @ SCORES[rows]) / G
    return total


@pytest.mark.parametrize("G", [2, 3])
def test_leave_one_out_is_the_gradient_and_the_mean_a_share_of_it(G):
    assert_close(expected(G, "leave-one-out"), EXACT, 1e-12)
    assert_close(expected(G, "group-mean"), (G - 1) / G * EXACT, 1e-12)


@pytest.mark.parametrize("G", [2, 3])
def test_the_sd_turns_the_gradient(G):
    """GRPO's is no multiple of it: near in direction, and in groups of two a sign alone."""
    mean = expected(G, "group")
    cosine = mean @ EXACT / np.sqrt((mean @ mean) * (EXACT @ EXACT))
    assert 0.7 < cosine < 0.9999
    if G == 2:
        rows = advantages_without_critic(
            REWARDS[:2], mask=MASK[:2], form="group", samples_per_prompt=2
        )
        assert_close(np.abs(rows[:, 0]), np.full(2, 0.5**0.5), 1e-3)


def surrogate_gradient(name, logp, old_logp, advantages, weights, **clip):
    forward, backward = SURROGATES[name]
    same = {"old_logp": old_logp, "advantages": advantages, "weights": weights, **clip}
    return -backward(1.0, forward(logp, **same)[1])


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_at_old_every_ratio_has_the_policy_gradient(name, aggregation):
    """Where the advantage and the weight are the same along a response: w A at each token."""
    logp = WORLD.log_probs("theta")[WORLD.responses.nodes, WORLD.responses.tokens]
    A = WORLD.rewards[:, None] * MASK
    weights = token_weights(MASK, mode=aggregation)
    assert_close(surrogate_gradient(name, logp, logp, A, weights), weights * A, 1e-14)


def test_a_mean_over_the_tokens_of_a_response_turns_the_gradient():
    lengths = MASK.sum(axis=1)
    divided = (PROBS * WORLD.rewards / lengths) @ SCORES
    cosine = divided @ EXACT / np.sqrt((divided @ divided) * (EXACT @ EXACT))
    assert 0.5 < cosine < 0.99


def test_importance_weights_of_tokens_keep_the_sampler_s_prefixes():
    """Their product over a response is right; one alone corrects its own token's draw."""
    sampler, at = WORLD.probs("old"), (WORLD.responses.nodes, WORLD.responses.tokens)
    logp, sampler_logp = (WORLD.log_probs(name)[at] for name in ("theta", "old"))
    ratio = importance_weights(logp, sampler_logp, mask=MASK, form="tis", cap=1e6)
    assert_close(sampler * ratio.prod(axis=1, where=MASK > 0), PROBS, 1e-12)
    A = WORLD.rewards[:, None] * MASK

    def error(weights):
        """Of E_sampler[sum_t weight_t A grad log pi_t], weights (M, T), as a share of |grad|."""
        mean = 0.0
        for t in range(MASK.shape[1]):
            part = np.zeros((len(MASK), *WORLD.logits["theta"].shape))
            rows = np.flatnonzero(MASK[:, t])
            node, token = WORLD.responses.nodes[rows, t], WORLD.responses.tokens[rows, t]
            part[rows, node] -= np.exp(WORLD.log_probs("theta"))[node]
            part[rows, node, token] += 1
            mean = mean + (sampler * weights[:, t] * A[:, t]) @ part.reshape(len(MASK), -1)
        return np.linalg.norm(mean - EXACT) / np.linalg.norm(EXACT)

    whole = ratio.prod(axis=1, where=MASK > 0)[:, None] * MASK
    assert error(whole) < 1e-12 < 0.01 < error(ratio) < error(MASK)
