"""What every estimator is on average: the gradient table, GAE's bias, the surrogate, the noise.

MATH's statements are closed forms, functions of a table of logits, differentiated here by the
complex step. The package sums what its own losses and backward passes give for each response.
"""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import DIFFERENT, ENUMERATION, LOOPS, assert_close

from gradients import flatness_table, gae_table, gather_nodes, logits_at_kl
from minirlhf.exact.enumeration import PrefixTree, Responses, all_responses, enumerate_responses
from minirlhf.exact.expected import (
    PLACEMENTS,
    beside,
    gradient_moments,
    kl_gradient_table,
    make_random_world,
    penalty_dlogits,
    policy_gradient_dlogits,
)
from minirlhf.exact.optimum import evaluate_exactly, objective_gradient, policy_values, soft_optimum
from minirlhf.exact.tiny import make_tiny_world
from minirlhf.rlhf.advantages import gae, token_rewards
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.rlhf.logprobs import log_softmax

FEWER = settings(max_examples=settings().max_examples // 5 or 1)  # where an example takes long
SEEDS = range(5)
STALE = "biased: samples of old"


class Tables(NamedTuple):
    """Three policies as tables of logits on one tree."""

    tree: PrefixTree
    responses: Responses
    logits: dict  # (N, V) of theta, old and ref
    rewards: np.ndarray  # (M,)


def random_tables(tree, *, seed, scale=0.8):
    rng = np.random.default_rng(seed)
    shape = (tree.n_nodes, tree.vocab_size)
    logits = {name: scale * rng.standard_normal(shape) for name in ("theta", "old", "ref")}
    return Tables(tree, all_responses(tree), logits, rng.standard_normal(tree.leaf_node.shape))


def of_transformers(seed, **sizes):
    world = make_random_world(seed=seed, **sizes)
    return Tables(world.tree, world.responses, world.logits, world.rewards)


@st.composite
def tables(draw, *, T=4):
    V = draw(st.integers(2, 4))
    tree = enumerate_responses(
        vocab_size=V,
        max_tokens=draw(st.integers(1, T)),
        stop_id=draw(st.none() | st.integers(0, V - 1)),
        n_prompts=draw(st.integers(1, 2)),
    )
    scale = draw(st.sampled_from([0.1, 0.8, 1.5]))
    return random_tables(tree, seed=draw(st.integers(0, 2**32 - 1)), scale=scale)


# -- MATH's closed forms -------------------------------------------------------------------------


def log_rows(z):
    """log softmax of each row; also of complex tables, and of many at once."""
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def gradient(f, z):
    """df/dz of a function of tables (..., N, V), every entry at once by the complex step."""
    steps = 1e-30j * np.eye(z.size).reshape(-1, *z.shape)
    return f(z + steps).imag.reshape(z.shape) / 1e-30


class ClosedForms:
    """The gradients that MATH speaks of, for one world and one sampler."""

    def __init__(self, world, sampler):
        self.mask, self.nodes, self.tokens = (
            getattr(world.responses, name) for name in ("mask", "nodes", "tokens")
        )
        self.theta, self.ref = world.logits["theta"], world.logits["ref"]
        self.sampler = world.logits[sampler]
        self.even = 1 / world.tree.n_prompts

    def logp(self, z):
        """(..., M, T), 0 at padding."""
        return np.where(self.mask > 0, log_rows(z)[..., self.nodes, self.tokens], 0.0)

    def probs(self, z):
        """(..., M) of prompt and response."""
        return self.even * np.exp(self.logp(z).sum(axis=-1))

    def kl(self, p, q):
        log_ratio = (self.logp(p) - self.logp(q)).sum(axis=-1)
        return (self.probs(p) * log_ratio).sum(axis=-1)

    def by_token(self, z, term):
        """sum over the sampler's prefixes, which do not move, of term(row of z, row of ref)."""
        rows = term(log_rows(z), log_rows(self.ref))[..., self.nodes] * self.mask
        return (self.probs(self.sampler)[:, None] * rows).sum(axis=(-2, -1))

    def grad(self, f):
        return gradient(f, self.theta)

    def g(self):
        return self.grad(lambda z: self.kl(z, self.ref))

    def zero(self):
        return np.zeros_like(self.theta)

    def away_from_the_sampler(self):
        return -self.grad(lambda z: self.kl(self.sampler, z))

    def forward(self):
        return self.grad(lambda z: self.kl(self.ref, z))

    def partial(self):
        def reverse(log_p, log_q):
            return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)

        return self.grad(lambda z: self.by_token(z, reverse))

    def forward_by_token(self):
        def forward(log_p, log_q):
            return (np.exp(log_q) * (log_q - log_p)).sum(axis=-1)

        return self.grad(lambda z: self.by_token(z, forward))

    def g_less_forward_by_token(self):
        return self.g() - self.forward_by_token()

    def k2_as_a_number(self):
        """The probability is differentiated, the k2 of each token is not."""
        k2 = 0.5 * (self.logp(self.theta) - self.logp(self.ref)) ** 2
        return self.grad(lambda z: (self.probs(z) * k2.sum(axis=1)).sum(axis=-1))

    def on_samples_of_old(self, place):
        """Old's probabilities and penalties are numbers; the policy's own logs are differentiated.

        sum_y old(y) [ sum_t ratio_t (penalty from t on)_t + loss(y) ]
        """
        mode, p, ref = KL_MODES[place.kl_mode], self.probs(self.sampler), self.logp(self.ref)
        old = self.logp(self.sampler)
        estimate = {
            "k1": lambda x: x,
            "k2": lambda x: 0.5 * x * x,
            "k3": lambda x: np.exp(-x) - 1 + x,
        }

        def full(z):
            """(..., M, T) KL over the vocabulary at each token."""
            log_p, log_q = log_rows(z), log_rows(self.ref)
            rows = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
            return rows[..., self.nodes] * self.mask

        def from_here_on(x):
            return x[:, ::-1].cumsum(axis=1)[:, ::-1]

        later = from_here_on(full(self.theta)) - full(self.theta)

        def f(z):
            logp = self.logp(z)
            total = 0.0
            if mode.in_reward:
                named = mode.in_reward
                penalty = full(self.sampler) if named == "full" else estimate[named](old - ref)
                total = total + np.exp(logp - old) * from_here_on(penalty * self.mask)
            if mode.in_loss == "token":
                total = total + estimate[mode.estimator](logp - ref)
            if mode.in_loss in ("full", "rao_blackwell"):
                total = total + full(z)
            if mode.in_loss == "rao_blackwell":
                total = total + logp * later
            total = (np.zeros(logp.shape) + total * self.mask).sum(axis=-1)
            if mode.in_loss == "sequence":
                total = total + estimate[mode.estimator]((logp - ref).sum(axis=-1))
            return (p * total).sum(axis=-1)

        return self.grad(f)

    def of(self, place):
        """The gradient that stands beside the placement."""
        if place.gives == STALE:
            return self.on_samples_of_old(place)
        return GIVES[place.gives](self)


# What stands beside each placement, and the gradient it speaks of.
GIVES = {
    "g": ClosedForms.g,
    "partial": ClosedForms.partial,
    "0": ClosedForms.zero,
    "-grad KL(old||pi)": ClosedForms.away_from_the_sampler,
    "-grad KL(ref||pi)": ClosedForms.away_from_the_sampler,
    "grad KL(ref||pi)": ClosedForms.forward,
    "the same by token": ClosedForms.forward_by_token,
    "g - k3 as loss, per token": ClosedForms.g_less_forward_by_token,
    "biased": ClosedForms.k2_as_a_number,
    "partial, old prefixes": ClosedForms.partial,
}


def placed(world, place):
    """(M, T, V) of every response, and how likely each is."""
    dlogits = penalty_dlogits(
        world.responses,
        world.logits["theta"],
        old_logits=world.logits[place.sampler],
        ref_logits=world.logits["ref"],
        kl_mode=place.kl_mode,
        gamma=place.gamma,
    )
    return dlogits, ClosedForms(world, place.sampler).probs(world.logits[place.sampler])


def mean_of(world, place):
    dlogits, probs = placed(world, place)
    return gather_nodes(world.tree, world.responses, dlogits, weights=probs)


def exact_g(world):
    """grad KL(pi || ref): the gradient of J for no reward and beta = -1."""
    logs = [log_rows(world.logits[name]) for name in ("theta", "ref")]
    return objective_gradient(world.tree, *logs, 0 * world.rewards, kl_coef=-1.0)


# -- the gradient table --------------------------------------------------------------------------


def test_the_table_has_every_mode_and_every_row_its_closed_form():
    assert {place.kl_mode for place in PLACEMENTS} == set(KL_MODES)
    assert {place.gives for place in PLACEMENTS} == {*GIVES, STALE}
    on, off = ({p.kl_mode for p in PLACEMENTS if p.sampler == s} for s in ("theta", "old"))
    assert on == off == set(KL_MODES)
    for place in PLACEMENTS:
        assert place.right == (place.gives == "g")
        assert place.sampler == "ref" if "KL(ref||pi)" in place.gives[:6] else True


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("place", PLACEMENTS, ids=lambda p: f"{p.name}, {p.sampler}")
def test_a_placement_of_the_penalty(place, seed):
    """Transformers, a tree with a stop token: right is right to 1e-8, wrong is wrong by 1e-2."""
    world = of_transformers(seed)
    mean, g = mean_of(world, place), ClosedForms(world, "theta").g()
    error = beside(mean, g)["error"]
    assert error < ENUMERATION if place.right else error > DIFFERENT
    closed = ClosedForms(world, place.sampler).of(place)
    assert np.abs(mean - closed).max() < ENUMERATION * np.abs(g).max()


@FEWER
@given(tables())
def test_every_placement_on_any_tree(world):
    """Tables of any size, with and without a stop token: each row is what it says it is."""
    assert_close(exact_g(world), ClosedForms(world, "theta").g())
    for place in PLACEMENTS:
        closed = ClosedForms(world, place.sampler).of(place)
        assert_close(mean_of(world, place), closed, ENUMERATION)


@pytest.mark.parametrize("stop_id", [None, 1])
def test_the_closed_forms_differ_from_each_other(stop_id):
    tree = enumerate_responses(vocab_size=3, max_tokens=3, stop_id=stop_id)
    world = random_tables(tree, seed=0)
    forms = {
        (place.gives, place.sampler): ClosedForms(world, place.sampler).of(place)
        for place in PLACEMENTS
        if place.sampler != "ref" and place.gives != STALE
    }
    forms = [form for (gives, sampler), form in forms.items() if (gives, sampler) != ("g", "old")]
    assert len(forms) == 9
    for i, a in enumerate(forms):
        for b in forms[:i]:
            assert np.abs(a - b).max() > DIFFERENT


@given(tables(T=1))
def test_in_one_step_partial_is_all_there_is(world):
    """No early token, no later prefix: the partial gradients are g."""
    for place in PLACEMENTS:
        if place.gives == "partial":
            assert_close(mean_of(world, place), ClosedForms(world, "theta").g(), ENUMERATION)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_table_in_the_parameters_of_a_transformer(seed):
    rows = kl_gradient_table(seed=seed)
    assert [row["name"] for row in rows] == [place.name for place in PLACEMENTS]
    for row in rows:
        assert row["error"] < ENUMERATION if row["right"] else row["error"] > DIFFERENT
        assert abs(row["cosine"]) <= 1 + LOOPS and row["noise"] > 0
        assert row["cosine"] > 1 - ENUMERATION if row["right"] else row["cosine"] < 1 - 1e-4
    (as_printed,) = (row for row in rows if row["gives"] == "0")
    assert as_printed["cosine"] == 0.0  # nothing is left of it
    assert as_printed["error"] == pytest.approx(1.0, abs=LOOPS)
    noise = {(row["name"], row["sampler"]): row["noise"] for row in rows}
    assert noise["full KL as loss", "theta"] < noise["k2 as loss, per token", "theta"]  # same mean


def test_a_seed_is_a_world():
    first, again, other = (make_random_world(seed=seed) for seed in (0, 0, 1))
    assert (first.rewards == again.rewards).all() and (first.rewards != other.rewards).all()
    for name in ("theta", "old", "ref"):
        assert (first.logits[name] == again.logits[name]).all()
        assert first.probs(name).sum() == pytest.approx(1.0, abs=LOOPS)
        for other_name in {"theta", "old", "ref"} - {name}:
            assert np.abs(first.logits[name] - first.logits[other_name]).max() > DIFFERENT
    assert first.tree.n_nodes == 40 and first.rewards.shape == (121,)
    small = make_random_world(seed=0, vocab_size=3, max_tokens=2, d_model=4)
    assert small.logits["theta"].shape == (3, 3)


@pytest.mark.parametrize("kl_seq", [0.02, 1.0])
def test_a_policy_at_a_distance_from_the_reference(kl_seq):
    world = make_random_world(seed=3)
    logits, ref = logits_at_kl(world, kl_seq), world.logits["ref"]
    on_tree = (world.tree, log_softmax(logits), log_softmax(ref), world.rewards)
    assert evaluate_exactly(*on_tree, kl_coef=0.0).kl_seq == pytest.approx(kl_seq, abs=1e-9)
    shares = (logits - ref) / (world.logits["theta"] - ref)
    assert_close(shares, np.full_like(shares, shares[0, 0]))  # on the straight line


@pytest.mark.parametrize("seed", range(2))
def test_the_jacobian_and_one_backward_give_the_same_mean(seed):
    """The mean of the responses' gradients is the gradient of their mean."""
    world = make_random_world(seed=seed, vocab_size=3, max_tokens=3, d_model=4)
    jacobian = world.jacobian("theta")
    rng = np.random.default_rng(seed)
    random = rng.standard_normal(world.logits["theta"].shape)
    pulled = world.pull_back(random, world.policies["theta"])
    assert_close(random.reshape(-1) @ jacobian, pulled)
    for place in PLACEMENTS[::3]:
        dlogits, probs = placed(world, place)
        estimates = []
        for dz, nodes, mask in zip(
            dlogits, world.responses.nodes, world.responses.mask, strict=True
        ):
            dense = np.zeros_like(random)
            for t in range(int(mask.sum())):
                dense[nodes[t]] += dz[t]
            estimates.append(world.pull_back(dense, world.policies["theta"]))
        mean, _ = gradient_moments(np.stack(estimates), probs)
        gathered = gather_nodes(world.tree, world.responses, dlogits, weights=probs)
        assert_close(mean, world.pull_back(gathered, world.policies["theta"]))


# -- the parts -----------------------------------------------------------------------------------


@given(tables())
def test_gathering_is_a_sum_over_responses_and_skips_padding(world):
    rng = np.random.default_rng(0)
    dlogits = rng.standard_normal((*world.responses.mask.shape, world.tree.vocab_size))
    dlogits[world.responses.mask == 0] = np.nan  # padding may hold anything
    weights = rng.random(len(dlogits)) * (rng.random(len(dlogits)) < 0.7)
    expected = np.zeros((world.tree.n_nodes, world.tree.vocab_size))
    for y, weight in enumerate(weights):
        for t in range(int(world.responses.mask[y].sum())):
            expected[world.responses.nodes[y, t]] += weight * dlogits[y, t]
    assert_close(gather_nodes(world.tree, world.responses, dlogits, weights=weights), expected)


@FEWER
@given(tables())
def test_the_policy_gradient_is_advantage_times_score(world):
    """A_t (1[a = y_t] - pi(a|s_t)); with Q - V its mean is grad J, exactly."""
    advantages = np.random.default_rng(0).standard_normal(world.responses.mask.shape)
    z = world.logits["theta"]
    got = policy_gradient_dlogits(world.responses, z, advantages)
    pi = np.exp(log_rows(z))
    nodes, tokens, mask = (getattr(world.responses, n) for n in ("nodes", "tokens", "mask"))
    for y, t in np.argwhere(mask > 0):
        score = -pi[nodes[y, t]]
        score[tokens[y, t]] += 1.0
        assert_close(got[y, t], advantages[y, t] * score)
    assert (got[mask == 0] == 0).all()

    args = (world.tree, log_rows(z), log_rows(world.logits["ref"]), world.rewards)
    q, values = policy_values(*args, kl_coef=0.5)
    exact = policy_gradient_dlogits(world.responses, z, (q - values[:, None])[nodes, tokens])
    probs = ClosedForms(world, "theta").probs(z)
    mean = gather_nodes(world.tree, world.responses, exact, weights=probs)
    assert_close(mean, objective_gradient(*args, kl_coef=0.5))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_moments_by_a_loop(M, P, seed):
    rng = np.random.default_rng(seed)
    gradients, probs = rng.standard_normal((M, P)), rng.dirichlet(np.ones(M))
    mean = [sum(probs[y] * gradients[y, i] for y in range(M)) for i in range(P)]
    variance = sum(probs[y] * (gradients[y, i] - mean[i]) ** 2 for y in range(M) for i in range(P))
    for got, expected in zip(gradient_moments(gradients, probs), (mean, variance), strict=True):
        assert_close(got, expected)


def test_a_mean_beside_the_exact_gradient():
    a, b = np.array([[3.0, 0.0], [0.0, 4.0]]), np.array([[0.0, 4.0], [3.0, 0.0]])
    assert beside(a, a) == {"error": 0.0, "cosine": 1.0, "noise": 0.0}
    assert beside(0 * a, a) == {"error": 1.0, "cosine": 0.0, "noise": 0.0}  # and no warning
    assert beside(-a, a, 9.0) == {"error": 2.0, "cosine": -1.0, "noise": pytest.approx(3 / 5)}
    assert beside(a + 0.05, a)["error"] == pytest.approx(0.1 / 5)  # |(.05, .05, .05, .05)| = .1
    assert beside(-2 * a, a)["cosine"] == -1.0 and beside(a, b)["cosine"] == 0.0
    assert beside(a + b, a)["cosine"] == pytest.approx(0.5**0.5)
    assert beside(a, a, -1e-30)["noise"] == 0.0  # of rounding


@FEWER
@given(tables(), st.sampled_from(["none", "ppo", "book"]))
def test_the_surrogate_is_the_policy_gradient_times_the_ratio(world, form):
    """A_t ratio_t (1[a = y_t] - pi(a|s_t)), and 0 where the clip has cut it off."""
    nodes, tokens = world.responses.nodes, world.responses.tokens
    advantages = np.random.default_rng(0).standard_normal(world.responses.mask.shape)
    z, old_logp = world.logits["theta"], log_rows(world.logits["old"])[nodes, tokens]
    got = policy_gradient_dlogits(world.responses, z, advantages, old_logp=old_logp, form=form)
    ratio = np.exp(log_rows(z)[nodes, tokens] - old_logp)
    above, below = ratio > 1.2, ratio < 0.8
    cut = {"none": 0 * above, "book": above, "ppo": np.where(advantages > 0, above, below)}[form]
    kept = np.where(cut, 0.0, ratio)[..., None]
    assert_close(got, kept * policy_gradient_dlogits(world.responses, z, advantages))
    same = log_rows(z)[nodes, tokens]  # at equal policies no clip cuts
    got = policy_gradient_dlogits(world.responses, z, advantages, old_logp=same, form=form)
    assert_close(got, policy_gradient_dlogits(world.responses, z, advantages))


# -- GAE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_is_unbiased_at_lambda_1_or_with_exact_values(seed):
    rows = {(row["value"], row["lam"]): row for row in gae_table(seed=seed)}
    assert len(rows) == 15
    for (value, lam), row in rows.items():
        assert row["noise"] > 0
        if value == "exact" or lam == 1.0:
            assert row["bias"] < ENUMERATION
    for value in ("zero", "exact + 0.5 noise"):
        assert rows[value, 0.0]["bias"] > DIFFERENT
        assert rows[value, 0.95]["bias"] < rows[value, 0.0]["bias"]
    (row,) = (r for r in gae_table(seed=seed, lams=(0.5,)) if r["value"] == "zero")
    assert row == rows["zero", 0.5]


@FEWER
@given(tables(), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_the_bias_of_gae_on_any_tree(world, lam, right_values):
    """The closed form: E[sum_t A_t s_t] with A written out as a sum of temporal differences."""
    beta, z, responses = 0.5, world.logits["theta"], world.responses
    log_pi, log_ref = log_rows(z), log_rows(world.logits["ref"])
    args = (world.tree, log_pi, log_ref, world.rewards)
    values = policy_values(*args, kl_coef=beta).values
    if not right_values:
        values = values + np.random.default_rng(0).standard_normal(values.shape)
    log_ratio = np.where(
        responses.mask > 0, (log_pi - log_ref)[responses.nodes, responses.tokens], 0
    )
    rewards = token_rewards(world.rewards, log_ratio, mask=responses.mask, kl_coef=beta)
    advantages, _ = gae(rewards, values[responses.nodes], mask=responses.mask, gamma=1.0, lam=lam)
    dlogits = policy_gradient_dlogits(responses, z, advantages)
    probs = ClosedForms(world, "theta").probs(z)
    mean = gather_nodes(world.tree, responses, dlogits, weights=probs)
    exact = objective_gradient(*args, kl_coef=beta)
    if right_values or lam == 1.0:
        assert_close(mean, exact, ENUMERATION)
    elif len(world.tree.levels) == 1:
        assert_close(mean, exact, ENUMERATION)  # one step: any value is a baseline


# -- the noise on the way to the optimum ---------------------------------------------------------


def test_the_noise_of_k1_vanishes_at_the_optimum():
    world = make_tiny_world(max_tokens=4, n_demonstrations=1, rng=np.random.default_rng(0))
    rows = flatness_table(world, kl_coef=0.5, shares=(0.0, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0))
    assert rows[0]["k1"] == pytest.approx(rows[0]["full"], rel=LOOPS)  # at the reference: KL 0
    for row, after in zip(rows, rows[1:], strict=False):
        assert after["k1"] < row["k1"] and after["gap"] < row["gap"]
    assert rows[-1]["share"] == 1.0
    assert abs(rows[-1]["gap"]) < LOOPS and rows[-1]["k1"] < LOOPS
    assert rows[-1]["full"] > DIFFERENT
    assert all(row["full"] > row["k1"] for row in rows[1:])


def test_the_noise_by_a_loop_over_responses():
    world = make_tiny_world(max_tokens=2, n_demonstrations=1, rng=np.random.default_rng(0))
    beta, share, tree, ref = 0.5, 0.5, world.tree, world.demonstrator
    (row,) = flatness_table(world, kl_coef=beta, shares=(share,))
    log_pi = soft_optimum(tree, ref, share * world.rewards, kl_coef=beta).log_probs
    pi = np.exp(log_pi)
    args = (tree, log_pi, ref, world.rewards)
    values = policy_values(*args, kl_coef=beta).values
    kl_token = (pi * (log_pi - ref)).sum(axis=1)
    means = {"k1": np.zeros_like(pi), "full": np.zeros_like(pi)}
    second = {"k1": 0.0, "full": 0.0}
    responses = all_responses(tree)
    for y, r in enumerate(world.rewards):
        n = int(responses.mask[y].sum())
        path = [(responses.nodes[y, t], responses.tokens[y, t]) for t in range(n)]
        p = np.prod([pi[at] for at in path])
        for name in means:
            one = np.zeros_like(pi)
            for t, (s, a) in enumerate(path):
                k1 = sum(log_pi[at] - ref[at] for at in path[t:])
                full = sum(kl_token[node] for node, _ in path[t:])
                advantage = r - beta * (k1 if name == "k1" else full) - values[s]
                one[s] = -advantage * pi[s]
                one[s, a] += advantage
                if name == "full":
                    one[s] -= beta * pi[s] * (log_pi[s] - ref[s] - kl_token[s])
            means[name] += p * one
            second[name] += p * (one**2).sum()
    for name, mean in means.items():
        assert_close(mean, objective_gradient(*args, kl_coef=beta))
        assert_close(row[name], second[name] - (mean**2).sum())
