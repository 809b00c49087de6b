"""The exact module against Python loops over every string of tokens, and against its theory.

A policy is a table of log-probs, one row for each prefix. Hypothesis draws the size of the tree,
how far the tables are from even, and a seed.
"""

import itertools
import math
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
from fakegpu import fakegpu
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import moved, tilt
from tolerances import (
    COMPLEX_STEP,
    CUPY_PAIR,
    DIFFERENCES,
    DIFFERENT,
    ENUMERATION,
    FLOAT32_FORWARD,
    FRONTIER,
    LOOPS,
    PRINTED,
    STAND_IN,
    assert_close,
)

from gao import GaoFit, fit_gao
from gradients import gather_nodes
from minirlhf import backend
from minirlhf.backend import to_host
from minirlhf.exact import enumeration
from minirlhf.exact.enumeration import (
    PrefixTree,
    all_responses,
    enumerate_responses,
    grow_tree,
    prefix_logprobs,
    response_logprobs,
)
from minirlhf.exact.expected import make_random_world, penalty_dlogits, policy_gradient_dlogits
from minirlhf.exact.optimum import (
    by_depth,
    evaluate_exactly,
    frontier_reward,
    objective_gradient,
    optimality_gap,
    policy_values,
    soft_optimum,
)
from minirlhf.rlhf.logprobs import log_softmax
from other_optima import best_of_n, grpo_rest

FEWER = settings(max_examples=settings().max_examples // 5 or 1)  # where an example takes long


class World(NamedTuple):
    tree: PrefixTree
    log_pi: np.ndarray  # (N, V)
    log_ref: np.ndarray  # (N, V)
    rewards: np.ndarray  # (M,)
    beta: float

    @property
    def args(self):
        return self.tree, self.log_pi, self.log_ref, self.rewards


def log_rows(z):
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def make_world(tree, *, scale=1.0, beta=0.5, seed=0, holes=False):
    """Random tables; with holes some tokens are impossible, more of them for pi than for ref."""
    rng = np.random.default_rng(seed)
    z_pi, z_ref = scale * rng.standard_normal((2, tree.n_nodes, tree.vocab_size))
    if holes:
        z_ref[:, 1:][rng.random(z_ref[:, 1:].shape) < 0.3] = -np.inf
        z_pi[np.isneginf(z_ref)] = -np.inf
        z_pi[:, 1:][rng.random(z_pi[:, 1:].shape) < 0.2] = -np.inf
    rewards = rng.standard_normal(tree.leaf_node.shape)
    return World(tree, log_rows(z_pi), log_rows(z_ref), rewards, beta)


@st.composite
def sizes(draw, *, V=4, T=4, prompts=3):
    """Arguments of enumerate_responses."""
    vocab_size = draw(st.integers(2, V))
    return {
        "vocab_size": vocab_size,
        "max_tokens": draw(st.integers(1, T)),
        "stop_id": draw(st.none() | st.integers(0, vocab_size - 1)),
        "n_prompts": draw(st.integers(1, prompts)),
    }


@st.composite
def worlds(draw, *, V=4, T=4, prompts=3, holes=True):
    return make_world(
        enumerate_responses(**draw(sizes(V=V, T=T, prompts=prompts))),
        scale=draw(st.sampled_from([0.3, 1.0, 3.0])),
        beta=draw(st.sampled_from([0.1, 0.5, 1.0, 4.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
        holes=holes and draw(st.booleans()),
    )


# -- the same by loops ---------------------------------------------------------------------------


def strings(*, vocab_size, max_tokens, stop_id):
    """Every response: it ends with the stop token, which stands nowhere else, or has T tokens."""
    for n in range(1, max_tokens + 1):
        for y in itertools.product(range(vocab_size), repeat=n):
            if stop_id not in y[:-1] and (n == max_tokens or y[-1] == stop_id):
                yield y


def prefixes(tree):
    """(prompt, tokens) of every node."""
    found = []
    for node, (parent, token) in enumerate(zip(tree.parent, tree.token, strict=True)):
        prompt, tokens = (node, ()) if parent == node else found[parent]
        found.append((prompt, tokens if parent == node else (*tokens, int(token))))
    return found


def paths(tree):
    """(prompt, tokens, [(node, token), ...]) of every response, in the order of the leaves."""
    found = prefixes(tree)
    node = {prefix: n for n, prefix in enumerate(found)}
    for leaf, last in zip(tree.leaf_node, tree.leaf_token, strict=True):
        prompt, tokens = found[leaf]
        y = (*tokens, int(last))
        yield prompt, y, [(node[prompt, y[:t]], y[t]) for t in range(len(y))]


def by_loops(world):
    """One (prompt, path, Pr(y|x), log_ratio, reward) for each response that pi may give."""
    pi, ref = world.log_pi.tolist(), world.log_ref.tolist()
    for (prompt, _, path), reward in zip(paths(world.tree), world.rewards.tolist(), strict=True):
        logp = sum(pi[s][a] for s, a in path)
        if logp > -math.inf:
            yield prompt, path, math.exp(logp), logp - sum(ref[s][a] for s, a in path), reward


# -- the tree ------------------------------------------------------------------------------------


@given(sizes())
def test_the_leaves_are_all_strings_each_once(size):
    tree = enumerate_responses(**size)
    V, T, n_prompts = size["vocab_size"], size["max_tokens"], size.pop("n_prompts")
    everything = all_responses(tree)
    got = []
    for x, y, mask in zip(everything.prompt, everything.tokens, everything.mask, strict=True):
        n = int(mask.sum())
        assert mask.tolist() == [1.0] * n + [0.0] * (T - n) and (y[n:] == 0).all()
        got.append((int(x), tuple(y[:n].tolist())))
    expected = list(itertools.product(range(n_prompts), strings(**size)))
    assert len(got) == len(set(got)) and set(got) == set(expected)
    assert got == [(x, y) for x, y, _ in paths(tree)]  # in the order of the leaves
    assert tree.prompt[tree.leaf_node].tolist() == [x for x, _ in got]
    for (_, _, path), nodes in zip(paths(tree), everything.nodes, strict=True):
        assert nodes.tolist() == [s for s, _ in path] + [0] * (T - len(path))

    b = V if size["stop_id"] is None else V - 1
    n_nodes = sum(b**t for t in range(T))
    n_leaves = V**T if size["stop_id"] is None else b**T + n_nodes
    assert (tree.n_nodes, len(got)) == (n_prompts * n_nodes, n_prompts * n_leaves)
    assert len(set(prefixes(tree))) == tree.n_nodes
    assert [len(tokens) for _, tokens in prefixes(tree)] == [
        t for t, level in enumerate(tree.levels) for _ in range(level.start, level.stop)
    ]


@pytest.mark.parametrize(
    ("max_tokens", "leaves", "nodes"),
    [(5, 19_608, 2_801), (6, 137_257, 19_608), (7, 960_800, 137_257)],
)
def test_eight_tokens(max_tokens, leaves, nodes):
    tree = enumerate_responses(vocab_size=8, max_tokens=max_tokens, stop_id=0)
    assert tree.leaf_node.shape == (leaves,) and tree.n_nodes == nodes


@given(st.integers(2, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_a_tree_of_any_shape(V, T, n_prompts, seed):
    """What goes on is drawn at random for every prompt and prefix."""
    rng = np.random.default_rng(seed)
    shape = (n_prompts, *[V + 1] * (T + 1))  # token + 1 at each place, 0 where there is none
    alive = rng.random(shape) < rng.choice([0.0, 0.3, 0.6, 1.0])

    def lives(x, y):
        return bool(alive[(x, *(a + 1 for a in y), *[0] * (T + 1 - len(y)))])

    def goes_on(prompt, tokens):
        rows = zip(prompt.tolist(), tokens.tolist(), strict=True)
        live = [[lives(x, [*y, a]) for a in range(V)] for x, y in rows]
        return np.array(live, dtype=bool).reshape(-1, V)

    def responses(x, y=()):
        for a in range(V):
            if len(y) + 1 < T and lives(x, (*y, a)):
                yield from responses(x, (*y, a))
            else:
                yield x, (*y, a)

    tree = grow_tree(goes_on, vocab_size=V, max_tokens=T, n_prompts=n_prompts)
    expected = [answer for x in range(n_prompts) for answer in responses(x)]
    got = [(x, y) for x, y, _ in paths(tree)]
    assert len(got) == len(expected) and set(got) == set(expected)
    assert len(tree.levels) == T
    everything = all_responses(tree)
    assert [
        (int(x), tuple(y[m > 0].tolist()))
        for x, y, m in zip(everything.prompt, everything.tokens, everything.mask, strict=True)
    ] == got
    log_pi = make_world(tree, seed=seed).log_pi
    assert_close(np.exp(response_logprobs(tree, log_pi)).sum(), 1.0)


@given(worlds())
def test_probabilities_are_the_chain_rule_and_sum_to_1(world):
    tree, rows = world.tree, world.log_pi.tolist()
    even = -math.log(tree.n_prompts)
    logp = response_logprobs(tree, world.log_pi)
    assert_close(logp, [even + sum(rows[s][a] for s, a in path) for _, _, path in paths(tree)])
    assert_close(np.exp(logp).sum(), 1.0)
    reach = np.exp(prefix_logprobs(tree, world.log_pi))
    for level, depth in zip(tree.levels, itertools.count()):
        ended = sum(
            p for (_, y, _), p in zip(paths(tree), np.exp(logp), strict=True) if len(y) <= depth
        )
        assert_close(reach[level].sum() + ended, 1.0)


# -- the value of a policy -----------------------------------------------------------------------


@given(worlds())
def test_values_are_sums_over_the_responses(world):
    X = world.tree.n_prompts
    value = evaluate_exactly(*world.args, kl_coef=world.beta)
    J, reward, kl, entropy, k3, flatness = ([0.0] * X for _ in range(6))
    for x, _, p, log_ratio, r in by_loops(world):
        J[x] += p * (r - world.beta * log_ratio)
        reward[x] += p * r
        kl[x] += p * log_ratio
        k3[x] += p * (math.exp(-log_ratio) - 1 + log_ratio)
        entropy[x] -= p * math.log(p)
    for x, _, p, log_ratio, r in by_loops(world):
        flatness[x] += p * (r - world.beta * log_ratio - J[x]) ** 2
    expected = [sum(of_prompts) / X for of_prompts in (J, reward, kl, entropy, flatness)]
    assert_close(list(value), expected)
    assert_close(value.objective, value.reward - world.beta * value.kl_seq)
    assert value.kl_seq >= -LOOPS and value.entropy_seq >= -LOOPS and value.flatness >= 0
    if np.isfinite(world.log_pi).all():  # else E[ref / pi] misses what only ref says
        assert_close(value.kl_seq, sum(k3) / X)


@given(worlds())
def test_the_kl_is_a_sum_over_prefixes(world):
    """KL(pi || ref) = sum over s of Pr(s) KL(pi(.|s) || ref(.|s)), and 0 only at the reference."""
    tree, args = world.tree, (world.rewards,)
    reach = np.exp(prefix_logprobs(tree, world.log_pi)).tolist()
    total = 0.0
    for weight, row, ref_row in zip(
        reach, world.log_pi.tolist(), world.log_ref.tolist(), strict=True
    ):
        total += weight * sum(
            math.exp(a) * (a - b) for a, b in zip(row, ref_row, strict=True) if a > -math.inf
        )
    kl = evaluate_exactly(*world.args, kl_coef=world.beta).kl_seq
    assert_close(kl, total)
    itself = evaluate_exactly(tree, world.log_ref, world.log_ref, *args, kl_coef=world.beta)
    assert itself.kl_seq == 0.0
    assert_close(itself.objective, itself.reward)
    if np.abs(np.exp(world.log_pi) - np.exp(world.log_ref))[tree.levels[0]].max() > 0.1:
        assert kl > 0.005 / tree.n_prompts  # Pinsker, at the prompts alone


# -- the optimum ---------------------------------------------------------------------------------


@given(worlds())
def test_tilt_and_soft_values_are_the_same_optimum(world):
    tree, _, log_ref, rewards, beta = world
    best = soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    tilted, log_z = tilt(tree, log_ref, rewards, kl_coef=beta)
    Z = [0.0] * tree.n_prompts
    for x, _, p, _, r in by_loops(world._replace(log_pi=log_ref)):
        Z[x] += p * math.exp(r / beta)
    assert_close(log_z, np.log(Z))
    assert_close(response_logprobs(tree, best.log_probs), tilted)
    assert_close(np.exp(best.log_probs).sum(axis=-1), np.ones(tree.n_nodes))
    assert_close(best.values[tree.levels[0]], beta * log_z)
    assert_close(best.objective, beta * log_z.mean())
    assert_close(
        evaluate_exactly(tree, best.log_probs, log_ref, rewards, kl_coef=beta).objective,
        best.objective,
    )

    # J* - J = beta KL(pi || pi*), prefix by prefix
    J = evaluate_exactly(*world.args, kl_coef=beta).objective
    to_best = evaluate_exactly(tree, world.log_pi, best.log_probs, rewards, kl_coef=1.0).kl_seq
    gap = optimality_gap(tree, world.log_pi, best)
    assert_close([beta * to_best, gap.sum(), by_depth(tree, gap).sum()], [best.objective - J] * 3)
    assert gap.min() >= -LOOPS and best.objective - J >= -LOOPS
    depths = [len(tokens) for _, tokens in prefixes(tree)]
    expected = np.bincount(depths, weights=gap, minlength=len(tree.levels))
    assert_close(by_depth(tree, gap), expected)
    assert_close(optimality_gap(tree, best.log_probs, best), np.zeros(tree.n_nodes))


@given(worlds())
def test_the_optimum_is_flat(world):
    """r - beta log_ratio* is beta log Z for every response; the penalty per token telescopes."""
    tree, _, log_ref, rewards, beta = world
    best = soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    values, q = best.values.tolist(), {}
    for (prompt, _, path), r in zip(paths(tree), rewards.tolist(), strict=True):
        for (s, a), (after, _) in itertools.pairwise([*path, (None, None)]):
            q[s, a] = r if after is None else values[after]
        if all(log_ref[s, a] > -math.inf for s, a in path):
            penalty = [best.log_probs[s, a] - log_ref[s, a] for s, a in path]
            assert_close(penalty, [(q[s, a] - values[s]) / beta for s, a in path])
            assert_close(r - beta * sum(penalty), values[prompt])
    flat = evaluate_exactly(tree, best.log_probs, log_ref, rewards, kl_coef=beta).flatness
    assert flat < LOOPS
    if rewards.shape[0] > tree.n_prompts:
        at_ref = evaluate_exactly(tree, log_ref, log_ref, rewards, kl_coef=beta).flatness
        assert at_ref > 1e6 * flat or at_ref < LOOPS


@given(worlds(), st.sampled_from([0.1, 3.0]))
def test_scale_and_shift_leave_the_optimum(world, c):
    tree, _, log_ref, rewards, beta = world
    best = soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    scaled = soft_optimum(tree, log_ref, c * rewards, kl_coef=c * beta)
    assert_close(scaled.log_probs, best.log_probs)
    assert_close(scaled.objective, c * best.objective)
    shift = np.random.default_rng(0).standard_normal(tree.n_prompts)
    rewards = rewards + shift[tree.prompt[tree.leaf_node]]
    shifted = soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    assert_close(shifted.log_probs, best.log_probs)
    assert_close(shifted.objective, best.objective + shift.mean())


@given(worlds(), st.integers(2, 4))
def test_resets_of_the_reference_divide_beta(world, K):
    """The optimum becomes the reference K times: the same as one optimum at beta / K."""
    tree, _, log_ref, rewards, beta = world
    reference = log_ref
    for _ in range(K):
        reference = soft_optimum(tree, reference, rewards, kl_coef=beta).log_probs
    at_once = soft_optimum(tree, log_ref, rewards, kl_coef=beta / K)
    assert_close(reference, at_once.log_probs)


@given(worlds())
def test_at_a_large_beta_the_optimum_is_the_reference(world):
    tree, _, log_ref, rewards, _ = world
    beta = 1e6
    best = soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    possible = np.isfinite(log_ref)
    moved_by = np.abs(best.log_probs[possible] - log_ref[possible]).max()
    assert moved_by <= np.ptp(rewards) / beta + LOOPS
    at_ref = evaluate_exactly(tree, log_ref, log_ref, rewards, kl_coef=beta)
    assert_close(best.objective, at_ref.reward, 10 / beta)


@given(worlds())
def test_at_a_small_beta_the_optimum_is_the_best_response(world):
    """exp(r / beta) = exp(1e6) is far out of range, and nothing overflows."""
    tree, _, log_ref, rewards, _ = world
    rewards, beta = 1e3 * rewards / np.abs(rewards).max(), 1e-3
    best = soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    _, log_z = tilt(tree, log_ref, rewards, kl_coef=beta)
    assert np.isfinite(best.values).all() and np.isfinite(log_z).all()
    assert not np.isnan(best.log_probs).any()
    top, share = [-math.inf] * tree.n_prompts, [0.0] * tree.n_prompts
    for x, _, p, _, r in by_loops(world._replace(log_pi=log_ref, rewards=rewards)):
        if r > top[x]:
            top[x], share[x] = r, p
    assert_close(best.values[tree.levels[0]], np.add(top, beta * np.log(share)), ENUMERATION)
    assert_close(beta * log_z, best.values[tree.levels[0]], ENUMERATION)
    value = evaluate_exactly(tree, best.log_probs, log_ref, rewards, kl_coef=beta)
    assert_close(value.reward, np.mean(top), ENUMERATION)


@given(worlds())
def test_slopes_of_the_optimum(world):
    """dJ*/dbeta = -KL*, and with eta = 1 / beta: dE*[r]/deta = Var*(r), dKL*/deta = eta Var*(r)."""
    tree, _, log_ref, rewards, beta = world
    curve = [beta * (1 - 1e-5), beta, beta * (1 + 1e-5)]
    best = [soft_optimum(tree, log_ref, rewards, kl_coef=b) for b in curve]
    value = [evaluate_exactly(tree, b.log_probs, log_ref, rewards, kl_coef=beta) for b in best]
    dbeta, deta = curve[2] - curve[0], 1 / curve[2] - 1 / curve[0]
    assert_close((best[2].objective - best[0].objective) / dbeta, -value[1].kl_seq, DIFFERENCES)
    mean, variance = [0.0] * tree.n_prompts, [0.0] * tree.n_prompts
    at_best = world._replace(log_pi=best[1].log_probs)
    for x, _, p, _, r in by_loops(at_best):
        mean[x] += p * r
    for x, _, p, _, r in by_loops(at_best):
        variance[x] += p * (r - mean[x]) ** 2
    variance = np.mean(variance)
    assert_close((value[2].reward - value[0].reward) / deta, variance, DIFFERENCES)
    assert_close((value[2].kl_seq - value[0].kl_seq) / deta, variance / beta, DIFFERENCES)


# -- the gradient --------------------------------------------------------------------------------


@FEWER
@given(worlds(V=3, T=3, prompts=2, holes=False))
def test_exact_gradient_in_logits(world):
    tree, log_pi, log_ref, rewards, beta = world
    got = objective_gradient(*world.args, kl_coef=beta)
    z = log_pi + np.linspace(-1, 1, tree.n_nodes)[:, None]  # logits: log-probs and a constant
    stepped = np.zeros_like(z)
    for logit in np.ndindex(z.shape):
        moved_z = z.astype(complex)
        moved_z[logit] += 1e-30j
        log_probs = log_softmax(moved_z)
        J = evaluate_exactly(tree, log_probs, log_ref, rewards, kl_coef=beta).objective
        stepped[logit] = J.imag / 1e-30
    assert_close(got, stepped, COMPLEX_STEP)
    best = soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    at_best = objective_gradient(tree, best.log_probs, log_ref, rewards, kl_coef=beta)
    assert_close(at_best, np.zeros_like(got))


@given(worlds())
def test_the_gradient_is_the_mean_of_reward_times_score(world):
    """sum over y of pi(y) (r - beta log_ratio) d log pi(y), one response after the other."""
    tree, probs = world.tree, np.exp(world.log_pi)
    got = objective_gradient(*world.args, kl_coef=world.beta)
    expected = np.zeros_like(got)
    for _, path, p, log_ratio, r in by_loops(world):
        for s, a in path:
            score = -probs[s]
            score[a] += 1.0
            expected[s] += p / tree.n_prompts * (r - world.beta * log_ratio) * score
    assert_close(got, expected)
    assert_close(got.sum(axis=-1), np.zeros(tree.n_nodes))  # a constant in all logits does nothing


@given(worlds(V=3, T=3, prompts=2))
def test_values_are_conditional_means(world):
    """Q(s, a): the mean of r - beta log_ratio over the responses through (s, a), from a on."""
    tree, pi, ref = world.tree, world.log_pi, world.log_ref
    got = policy_values(*world.args, kl_coef=world.beta)
    q, possible = np.zeros_like(pi), np.exp(pi) > 0
    for (_, _, path), r in zip(paths(tree), world.rewards.tolist(), strict=True):
        for t, (s, a) in enumerate(path):
            rest = path[t:]
            if all(possible[i] for i in rest):
                p = math.exp(sum(pi[i] for i in rest[1:]))
                q[s, a] += p * (r - world.beta * sum(pi[i] - ref[i] for i in rest))
    assert_close(np.where(possible, got.q, 0.0), np.where(possible, q, 0.0))
    assert_close(got.values, (np.exp(pi) * np.where(possible, q, 0.0)).sum(axis=-1))
    J = evaluate_exactly(*world.args, kl_coef=world.beta).objective
    assert_close(got.values[tree.levels[0]].mean(), J)


# -- best of n -----------------------------------------------------------------------------------


@st.composite
def bandits(draw, *, most=7):
    """(log-probs, rewards) of a few responses: some tie, some are never drawn."""
    M = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = draw(st.sampled_from([0.3, 1.0, 3.0])) * rng.standard_normal(M)
    z[1:][rng.random(M - 1) < draw(st.sampled_from([0.0, 0.4]))] = -np.inf
    order = rng.permutation(M)
    levels = rng.integers(-2, 3, size=M) + 0.1 * rng.standard_normal()
    if np.ptp(levels) > 0:
        return log_rows(z)[order], levels + 1e-12 * rng.random(M)  # equal to 1e-9 of the range
    return log_rows(z)[order], levels + rng.integers(-2, 3, size=M) * np.spacing(levels)


def to_the_power(n):
    """Ours and the naive formula raise an F that is off by a rounding to the power n."""
    return LOOPS * max(1.0, n / 100)


@given(bandits(most=5), st.integers(1, 3))
def test_the_best_of_a_few_draws(bandit, n):
    """All ways to draw n times, and a fair choice among draws that tie."""
    logp, rewards = bandit
    p, levels = np.exp(logp).tolist(), np.round(rewards, 9).tolist()
    expected = [0.0] * len(p)
    for draws in itertools.product(range(len(p)), repeat=n):
        top = max(levels[y] for y in draws)
        winners = [y for y in draws if levels[y] == top]
        for y in winners:
            expected[y] += math.prod(p[d] for d in draws) / len(winners)
    assert_close(np.exp(best_of_n(logp, rewards, n=n)), expected)


@given(bandits(), st.sampled_from([1, 2, 5, 64, 1000, 10**6]))
def test_best_of_n_against_its_formula_and_its_bounds(bandit, n):
    logp, rewards = bandit
    p, levels = np.exp(logp).tolist(), np.round(rewards, 9).tolist()
    got = best_of_n(logp, rewards, n=n)
    q = np.exp(got).tolist()
    expected, kl, wins = [], 0.0, 0.0
    for y, r in enumerate(levels):
        below = math.fsum(p[i] for i in range(len(p)) if levels[i] < r)
        tied = math.fsum(p[i] for i in range(len(p)) if levels[i] == r)
        expected.append(p[y] * ((below + tied) ** n - below**n) / tied if tied > 0 else 0.0)
        if q[y] > 0:
            kl += q[y] * (got[y] - logp[y])
            wins += q[y] * (below + 0.5 * tied)
    tolerance = to_the_power(n)
    assert_close(q, expected, tolerance)
    assert_close(sum(q), 1.0, tolerance)
    assert (np.isneginf(got) >= np.isneginf(logp)).all()  # what is never drawn is never the best
    assert -tolerance <= kl <= math.log(n) - (n - 1) / n + tolerance
    assert 0.5 - tolerance <= wins <= n / (n + 1) + tolerance
    top = max(r for r, mass in zip(levels, p, strict=True) if mass > 0)
    cap = -math.log(sum(mass for r, mass in zip(levels, p, strict=True) if r == top))
    assert kl <= cap + tolerance
    if n == 1:
        assert_close(got, logp)
    assert_close(best_of_n(logp, 0.0 * rewards, n=n), logp, tolerance)  # all tie: any draw


def test_best_of_n_far_out():
    """Distinct rewards, even odds: q(top) = 1 - (1 - 1/M)^n, and no cancellation at a large n."""
    M = 1000
    logp, rewards = np.full(M, -math.log(M)), np.arange(M) * 1.0
    for n in (2, 100, 10**4, 10**6):
        q = np.exp(best_of_n(logp, rewards, n=n))
        tolerance = to_the_power(n)
        assert_close(q[-1], -math.expm1(n * math.log1p(-1 / M)), tolerance)
        assert_close(q.sum(), 1.0, LOOPS)
    kl = float(np.exp(best_of_n(logp, rewards, n=4)) @ (best_of_n(logp, rewards, n=4) - logp))
    assert kl == pytest.approx(math.log(4) - 3 / 4, abs=PRINTED)  # nearly continuous: the bound


# -- over-optimisation ---------------------------------------------------------------------------

BETAS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1)


@FEWER
@given(worlds())
def test_the_curve_rises_as_beta_falls(world):
    tree, _, log_ref, rewards, _ = world
    curve = []
    for beta in BETAS:
        best = soft_optimum(tree, log_ref, rewards, kl_coef=beta).log_probs
        curve.append(evaluate_exactly(tree, best, log_ref, rewards, kl_coef=beta))
        p = np.exp(tilt(tree, log_ref, rewards, kl_coef=beta)[0])
        assert_close(curve[-1].reward, p @ rewards)
    for values in ([at.reward for at in curve], [at.kl_seq for at in curve]):
        assert (np.diff(values) >= -LOOPS).all()


@FEWER
@given(worlds(V=3, T=3, prompts=2), st.sampled_from([0.05, 0.3, 0.7]))
def test_no_policy_is_above_the_frontier(world, share):
    tree, _, log_ref, rewards, beta = world
    log_pi = log_rows(np.logaddexp(world.log_pi, log_ref + math.log(share)))  # nearer to ref
    value = evaluate_exactly(tree, log_pi, log_ref, rewards, kl_coef=beta)
    if value.kl_seq > 1e-6:
        frontier = frontier_reward(tree, log_ref, rewards, kl_seq=float(value.kl_seq))
        assert value.reward <= frontier + FRONTIER
    best = soft_optimum(tree, log_ref, rewards, kl_coef=beta).log_probs
    value = evaluate_exactly(tree, best, log_ref, rewards, kl_coef=beta)
    if value.kl_seq > 1e-6:
        on_it = frontier_reward(tree, log_ref, rewards, kl_seq=float(value.kl_seq))
        assert_close(on_it, value.reward, ENUMERATION)


@FEWER
@given(worlds(V=3, T=3, prompts=1, holes=False), st.sampled_from([2, 4, 16]))
def test_best_of_n_lies_below_the_frontier(world, n):
    tree, _, log_ref, rewards, _ = world
    ref_logp = response_logprobs(tree, log_ref)
    logp = best_of_n(ref_logp, rewards, n=n)
    q = np.exp(logp)
    kl_seq, reward = float(q @ (logp - ref_logp)), float(q @ rewards)
    assert reward <= frontier_reward(tree, log_ref, rewards, kl_seq=kl_seq) + FRONTIER
    assert reward >= float(np.exp(ref_logp) @ rewards) - LOOPS


@given(st.floats(0.2, 2.0), st.floats(0.2, 2.0), st.sampled_from(["linear", "log"]))
def test_gao_fits_recover_what_was_planted(alpha, slope, law):
    kl_seq = np.linspace(0.05, 6.0, 9)
    d = np.sqrt(kl_seq)
    gain = d * (alpha - slope * (d if law == "linear" else np.log(d)))
    fit = fit_gao(kl_seq, gain, law=law)
    assert_close([fit.alpha, fit.slope, fit.r_squared], [alpha, slope, 1.0], COMPLEX_STEP)
    assert_close(fit(d), gain, COMPLEX_STEP)
    peak = math.sqrt(fit.peak_kl)
    assert (fit(peak * np.linspace(0.01, 3.0, 1000)) <= fit(np.array(peak)) + LOOPS).all()

    # With noise: the other law fits worse, and r^2 is what it says.
    noisy = gain + 0.1 * np.random.default_rng(0).standard_normal(9)
    fit = fit_gao(kl_seq, noisy, law=law)
    left, spread = ((noisy - fit(d)) ** 2).sum(), ((noisy - noisy.mean()) ** 2).sum()
    assert fit.r_squared == pytest.approx(1 - left / spread, abs=COMPLEX_STEP)
    for i, shift in itertools.product(range(2), (-0.01, 0.01)):
        moved_fit = fit._replace(**{fit._fields[i]: fit[i] + shift})
        assert ((noisy - moved_fit(d)) ** 2).sum() > left  # least squares


# -- array modules and dtypes --------------------------------------------------------------------

HERE = make_world(
    enumerate_responses(vocab_size=3, max_tokens=3, stop_id=1, n_prompts=2), seed=3, holes=True
)


def everything_of(tree, log_pi, log_ref, rewards):
    """All that the module says about a world."""
    best = soft_optimum(tree, log_ref, rewards, kl_coef=0.5)
    ref_logp = response_logprobs(tree, log_ref)
    args = (tree, log_pi, log_ref, rewards)
    gap = optimality_gap(tree, log_pi, best)
    return [
        list(all_responses(tree)),
        prefix_logprobs(tree, log_pi),
        tree.prompt[tree.leaf_node],
        list(best[1:]),
        list(evaluate_exactly(*args, kl_coef=0.5)),
        [gap, by_depth(tree, gap)],
        list(policy_values(*args, kl_coef=0.5)),
        objective_gradient(*args, kl_coef=0.5),
        [best_of_n(ref_logp, rewards, n=n) for n in (1, 4)],
        frontier_reward(tree, log_ref, rewards, kl_seq=0.2),
    ]


def leaves(value):
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [np.asarray(value if isinstance(value, float | np.generic) else to_host(value))]


def test_every_array_module_gives_the_same_numbers(xp, xp_name):
    host = leaves(everything_of(*HERE.args))
    there = everything_of(*moved(HERE.args, xp.asarray))
    assert type(there[1]) is xp.ndarray
    tolerance = CUPY_PAIR[np.float64] if xp_name == "cupy" else STAND_IN
    for ours, theirs in zip(leaves(there), host, strict=True):
        assert_close(ours, theirs, tolerance)
        assert ours.dtype == theirs.dtype


def test_trees_move_between_devices(monkeypatch):
    monkeypatch.setattr(backend, "array_module", {"cpu": np, "cuda": fakegpu}.get)
    there = HERE.tree.to("cuda")
    back = there.to("cpu")
    for name in ("prompt", "parent", "token", "leaf_node", "leaf_token"):
        assert type(getattr(there, name)) is fakegpu.ndarray
        assert_close(getattr(back, name), getattr(HERE.tree, name), 0.0)
    assert back.levels == there.levels == HERE.tree.levels
    assert back.vocab_size == there.vocab_size == 3


def test_float32_stays_float32():
    single = [HERE.tree, *(a.astype(np.float32) for a in HERE.args[1:])]
    ours, theirs = (leaves(everything_of(*args)[1:-1]) for args in (single, HERE.args))
    for got, expected in zip(ours, theirs, strict=True):
        assert_close(got, expected, FLOAT32_FORWARD)
        assert got.dtype == (np.float32 if expected.dtype == np.float64 else expected.dtype)
    assert all_responses(HERE.tree, dtype=np.float32).mask.dtype == np.float32


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"vocab_size": 1, "max_tokens": 2}, "expected vocab_size >= 2.* got 1, 2 and 1"),
        ({"vocab_size": 2, "max_tokens": 0}, "max_tokens >= 1.* got 2, 0 and 1"),
        ({"vocab_size": 2, "max_tokens": 2, "n_prompts": 0}, "n_prompts >= 1; got 2, 2 and 0"),
        ({"vocab_size": 2, "max_tokens": 2, "stop_id": 2}, r"stop_id in \[0, 2\); got 2"),
        ({"vocab_size": 2, "max_tokens": 2, "stop_id": -1}, r"stop_id in \[0, 2\); got -1"),
    ],
)
def test_sizes_are_checked(size, message):
    with pytest.raises(ValueError, match=message):
        enumerate_responses(**size)


def test_the_limit_is_exact(monkeypatch):
    """27 responses without a stop token; with one 8 + (1 + 2 + 4)."""
    for stop_id, n in ((None, 27), (0, 15)):
        monkeypatch.setattr(enumeration, "MOST_LEAVES", n)
        assert enumerate_responses(vocab_size=3, max_tokens=3, stop_id=stop_id).n_prompts == 1
        monkeypatch.setattr(enumeration, "MOST_LEAVES", n - 1)
        with pytest.raises(ValueError, match=f"at most {n - 1} responses; it has"):
            enumerate_responses(vocab_size=3, max_tokens=3, stop_id=stop_id)


def test_too_many_responses_are_refused_before_the_memory_is_gone():
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="at most 20,000,000 responses; it has"):
            enumerate_responses(vocab_size=50, max_tokens=6)
        assert tracemalloc.get_traced_memory()[1] < 2**31
    finally:
        tracemalloc.stop()


def test_shapes_and_coefficients_are_checked():
    tree, log_pi, log_ref, rewards, beta = HERE
    cut, short = log_pi[:-1], rewards[:-1]
    N, V = log_pi.shape
    says = rf"expected {{}} of shape \({N}, {V}\), one row for each prefix; got \({N - 1}, {V}\)"
    for name, call in {
        "log_probs": lambda: prefix_logprobs(tree, cut),
        "log_probs ": lambda: evaluate_exactly(tree, cut, log_ref, rewards, kl_coef=beta),
        "ref_log_probs": lambda: evaluate_exactly(tree, log_pi, cut, rewards, kl_coef=beta),
        "ref_log_probs ": lambda: policy_values(tree, log_pi, cut, rewards, kl_coef=beta),
        "ref_log_probs  ": lambda: soft_optimum(tree, cut, rewards, kl_coef=beta),
    }.items():
        with pytest.raises(ValueError, match=says.format(name.strip())):
            call()
    for where, call in {
        "evaluate_exactly": lambda: evaluate_exactly(tree, log_pi, log_ref, short, kl_coef=beta),
        "policy_values": lambda: policy_values(tree, log_pi, log_ref, short, kl_coef=beta),
        "soft_optimum": lambda: soft_optimum(tree, log_ref, short, kl_coef=beta),
        "best_of_n": lambda: best_of_n(rewards, short, n=2),
    }.items():
        with pytest.raises(ValueError, match=f"{where}: expected .*rewards of one shape"):
            call()
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"expected kl_coef > 0 and finite; got {beta}"):
            soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    with pytest.raises(ValueError, match="expected kl_seq > 0 and finite; got 0.0"):
        frontier_reward(tree, log_ref, rewards, kl_seq=0.0)
    with pytest.raises(ValueError, match="expected n >= 1; got 0"):
        best_of_n(rewards, rewards, n=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused(bad):
    tree, _, log_ref, rewards, _ = HERE
    rewards = rewards.copy()
    rewards[3] = bad
    for call in (
        lambda: soft_optimum(tree, log_ref, rewards, kl_coef=0.5),
        lambda: best_of_n(response_logprobs(tree, log_ref), rewards, n=2),
    ):
        with pytest.raises(ValueError, match="expected finite rewards; got nan or inf"):
            call()


def never(log_probs, node, token):
    """The same policy, which never says `token` after `node`."""
    log_probs = log_probs.copy()
    log_probs[node, token] = -np.inf
    return log_rows(log_probs)


def test_a_policy_that_says_more_than_its_reference_is_refused():
    tree, log_pi, log_ref, rewards, beta = make_world(HERE.tree)
    log_ref = never(log_ref, 2, 0)
    for call in (evaluate_exactly, policy_values, objective_gradient):
        with pytest.raises(ValueError, match="says more, and the KL is infinite"):
            call(tree, log_pi, log_ref, rewards, kl_coef=beta)
    best = soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    with pytest.raises(ValueError, match="says more"):
        optimality_gap(tree, log_pi, best)
    log_pi = never(log_pi, 2, 0)  # where neither goes nothing is lost
    assert np.isfinite(evaluate_exactly(tree, log_pi, log_ref, rewards, kl_coef=beta)).all()


@pytest.mark.parametrize(
    ("kl_seq", "law"), [([1.0, 2.0], "log"), ([0.0, 1.0, 2.0], "linear"), ([1.0, 2.0, 3.0], "rl")]
)
def test_fits_are_checked(kl_seq, law):
    with pytest.raises(ValueError, match=f"at least 3 points with kl_seq > 0 .* got '{law}'"):
        fit_gao(np.array(kl_seq), np.arange(len(kl_seq)), law=law)


def test_gains_that_cannot_be_fitted_are_refused():
    kl_seq = np.array([1.0, 2.0, 3.0])
    for gain in (np.ones(3), np.arange(2.0)):
        with pytest.raises(ValueError, match="gains that differ"):
            fit_gao(kl_seq, gain, law="linear")


def test_points_that_are_not_finite_are_refused():
    kl_seq, gain = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 3.0])
    for bad in (math.nan, math.inf):
        for at in range(3):
            spoilt = np.where(np.arange(3) == at, bad, 0.0)
            with pytest.raises(ValueError, match="fit_gao: expected law"):
                fit_gao(kl_seq, gain + spoilt, law="linear")
            with pytest.raises(ValueError, match="fit_gao: expected law"):
                fit_gao(kl_seq + spoilt, gain, law="linear")


def test_three_points_are_enough_and_shapes_must_agree():
    kl_seq, gain = np.array([0.25, 1.0, 4.0]), np.array([0.3, 0.5, 0.2])
    assert fit_gao(kl_seq, gain, law="linear").law == "linear"
    with pytest.raises(ValueError, match="fit_gao: expected law"):
        fit_gao(kl_seq, np.append(gain, 0.1), law="linear")
    with pytest.raises(ValueError, match="fit_gao: expected law"):
        fit_gao(kl_seq[:, None], gain, law="linear")


@pytest.mark.parametrize("alpha", [-0.4, 0.0, 0.7])
def test_the_peaks_of_both_laws(alpha):
    """d (a - s d) has its peak at a / 2s, if a > 0; d (a - s log d) at exp(a / s - 1), always."""
    log = GaoFit(alpha, 0.5, 1.0, "log")
    assert log.peak_kl == pytest.approx(math.exp(alpha / 0.5 - 1) ** 2)
    linear = GaoFit(alpha, 0.5, 1.0, "linear")
    assert linear.peak_kl == pytest.approx(alpha**2) if alpha > 0 else math.isnan(linear.peak_kl)
    for slope in (0.0, -0.5):
        for law in ("linear", "log"):
            assert math.isnan(GaoFit(alpha, slope, 1.0, law).peak_kl)


@pytest.mark.parametrize(
    ("gain", "law"),
    [([-2.0, -3.41, -4.73], "linear"), ([1.0, 2.0, 4.0], "linear"), ([1, 4, 9], "log")],
)
def test_where_the_fit_has_no_peak_it_is_nan(gain, law):
    kl_seq = np.array([1.0, 2.0, 3.0] if law == "linear" else [1.0, 4.0, 9.0])
    assert math.isnan(fit_gao(kl_seq, np.array(gain), law=law).peak_kl)


def test_logits_are_refused_where_log_probs_are_expected():
    tree, log_pi, log_ref, rewards, beta = HERE
    logits = log_pi + 1.0
    for call in (evaluate_exactly, policy_values, objective_gradient):
        with pytest.raises(ValueError, match="take log_softmax of logits"):
            call(tree, logits, log_ref, rewards, kl_coef=beta)
    with pytest.raises(ValueError, match="expected ref_log_probs to be log-probs"):
        soft_optimum(tree, logits, rewards, kl_coef=beta)


# -- large, small, single precision --------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("beta", [1e-6, 1e-2, 1.0])
def test_the_optimum_is_a_policy_whatever_the_size_of_the_rewards(size, beta):
    tree, _, log_ref, rewards, _ = HERE
    best = soft_optimum(tree, log_ref, size * rewards, kl_coef=beta)
    assert_close(np.exp(best.log_probs).sum(axis=1), np.ones(tree.n_nodes))
    value = evaluate_exactly(tree, best.log_probs, log_ref, size * rewards, kl_coef=beta)
    assert value.objective <= best.objective + LOOPS * max(1.0, size)
    logp, _ = tilt(tree, log_ref, size * rewards, kl_coef=beta)
    assert np.exp(logp).sum() == pytest.approx(1.0, abs=LOOPS)


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1e5])
def test_frontier_and_best_of_n_do_not_depend_on_the_unit_of_the_reward(size):
    tree, _, log_ref, rewards, _ = make_world(
        enumerate_responses(vocab_size=3, max_tokens=3, stop_id=0)
    )
    for kl_seq in (0.1, 0.7):
        frontier, scaled = (
            frontier_reward(tree, log_ref, s * rewards, kl_seq=kl_seq) for s in (1.0, size)
        )
        assert scaled / size == pytest.approx(frontier, abs=FRONTIER)
    ref_logp = response_logprobs(tree, log_ref)
    plain, scaled = (best_of_n(ref_logp, s * rewards, n=16) for s in (1.0, size))
    assert_close(scaled, plain)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_ties_of_best_of_n_do_not_depend_on_the_zero_of_the_reward(dtype):
    """A difference of 1 in 5 is one, also between a million and a million and five."""
    ref_logp = np.log(np.array([0.1, 0.2, 0.3, 0.15, 0.25]))
    rewards = np.array([0, 5, 1, 1, 0]).astype(dtype)
    plain = best_of_n(ref_logp, rewards, n=3)
    # F = .35, .8, 1 at the rewards 0, 1, 5: two of .3 and .15 share what lies between.
    mass = np.array([0.35**3, 1 - 0.8**3, 0.8**3 - 0.35**3])
    assert_close(np.exp(plain), mass[[0, 1, 2, 2, 0]] * np.array([2 / 7, 1, 2 / 3, 1 / 3, 5 / 7]))
    for shift in (10**6, -(10**6), 1):
        assert_close(best_of_n(ref_logp, rewards + dtype(shift), n=3), plain, 0.0)


def test_rewards_that_differ_by_a_rounding_are_ties():
    """As sums of the same terms in another order do; also where that is all the difference."""
    ref_logp = np.log(np.array([0.5, 0.25, 0.25]))
    apart = best_of_n(ref_logp, np.array([0.0, 1.0, 1.0 + 1e-15]), n=2)
    assert_close(apart, best_of_n(ref_logp, np.array([0.0, 1.0, 1.0]), n=2), 0.0)
    for rewards in ([7.0] * 3, [0.1 + 0.2, 0.3, 0.3], [-1.0, -1.0 - 2e-16, -1.0]):
        assert_close(best_of_n(ref_logp, np.array(rewards), n=9), ref_logp)  # a draw of ref
    tiny = 1e-12 * np.array([1.0, 2.0, 3.0])
    assert_close(best_of_n(ref_logp, tiny, n=2), best_of_n(ref_logp, 1e12 * tiny, n=2))
    near = 1.0 + 1e-9 * np.array([1.0, 2.0, 3.0])  # 1e-9 apart, and no rounding
    assert_close(best_of_n(ref_logp, near, n=2), best_of_n(ref_logp, 1e12 * tiny, n=2))


def test_the_frontier_ends_at_the_largest_reward():
    tree, _, log_ref, rewards, _ = make_world(enumerate_responses(vocab_size=3, max_tokens=2))
    assert frontier_reward(tree, log_ref, rewards, kl_seq=50.0) == pytest.approx(rewards.max())


def test_the_objective_is_reward_less_penalty_also_in_single_precision():
    tree = enumerate_responses(vocab_size=8, max_tokens=6, stop_id=0)  # 137,257 terms
    _, log_pi, log_ref, rewards, beta = make_world(tree)
    double = evaluate_exactly(tree, log_pi, log_ref, rewards, kl_coef=beta)
    tables = (a.astype(np.float32) for a in (log_pi, log_ref, rewards))
    single = evaluate_exactly(tree, *tables, kl_coef=beta)
    assert single.objective == pytest.approx(single.reward - beta * single.kl_seq, abs=1e-6)
    assert_close(np.array(single), np.array(double), FLOAT32_FORWARD)


def test_a_complex_step_goes_through_the_rewards_too():
    """dJ*/dr(y) = Pr*(y) and dJ/dr(y) = Pr(y)."""
    tree, log_pi, log_ref, rewards, beta = HERE
    moved = rewards.astype(complex)
    moved[1] += 1e-30j
    best = soft_optimum(tree, log_ref, moved, kl_coef=beta)
    chance = np.exp(response_logprobs(tree, best.log_probs.real))[1]
    assert best.objective.imag / 1e-30 == pytest.approx(chance, abs=COMPLEX_STEP)
    chance = np.exp(response_logprobs(tree, log_pi))[1]
    value = evaluate_exactly(tree, log_pi, log_ref, moved, kl_coef=beta)
    assert value.objective.imag / 1e-30 == pytest.approx(chance, abs=COMPLEX_STEP)
    values = policy_values(tree, log_pi, log_ref, moved, kl_coef=beta).values
    root_mean = values[: tree.n_prompts].mean()
    assert root_mean.imag / 1e-30 == pytest.approx(chance, abs=COMPLEX_STEP)


def test_the_tables_of_these_tests_differ():
    """The two policies are far from each other, so an identity between them says something."""
    value = evaluate_exactly(*make_world(HERE.tree).args, kl_coef=1.0)
    assert value.kl_seq > 10 * DIFFERENT and value.flatness > DIFFERENT


# --- where GRPO comes to rest


@pytest.mark.parametrize("by_sd", [True, False])
@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("kl_coef", [0.1, 0.5, 20.0])
def test_grpo_rests_where_its_expected_gradient_is_0(kl_coef, by_length, by_sd):
    """By enumeration, through the package's own losses: a large group, k3 of each token."""
    world = make_random_world(seed=1)
    tree, responses, log_ref = world.tree, world.responses, world.log_probs("ref")
    of = {"by_length": by_length, "by_sd": by_sd}
    log_pi = grpo_rest(tree, log_ref, world.rewards, kl_coef=kl_coef, **of)
    p = np.exp(response_logprobs(tree, log_pi))
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    mean = p @ world.rewards
    sd = np.sqrt(p @ (world.rewards - mean) ** 2) if by_sd else 1.0
    lengths = responses.mask.sum(axis=1) if by_length else 1.0
    advantages = ((world.rewards - mean) / sd)[:, None] * responses.mask
    policy = policy_gradient_dlogits(responses, log_pi, advantages)
    same = {"old_logits": log_pi, "ref_logits": log_ref, "kl_mode": "loss_k3_tok"}
    penalty = penalty_dlogits(responses, log_pi, **same)
    both = (gather_nodes(tree, responses, g, weights=p / lengths) for g in (policy, penalty))
    gain, cost = both
    assert np.abs(gain - kl_coef * cost).max() < 1e-12 * max(1.0, kl_coef)
    assert np.abs(gain).max() > 1e-4  # each of the two alone is not 0


def test_grpo_rests_at_the_reference_at_a_large_beta_and_not_at_the_optimum():
    world = make_random_world(seed=1)
    args = world.tree, world.log_probs("ref"), world.rewards
    assert_close(grpo_rest(*args, kl_coef=1e9), world.log_probs("ref"), 1e-6)
    best = soft_optimum(*args, kl_coef=0.5)
    rest = grpo_rest(*args, kl_coef=0.5, by_length=False, by_sd=False)
    value = evaluate_exactly(args[0], rest, *args[1:], kl_coef=0.5)
    assert value.objective < best.objective - 0.01 and value.reward > 0
