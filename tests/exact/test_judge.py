"""The exact gradients that a foreign function is held against, and the rows of its verdict."""

import numpy as np
import pytest

from gradients import gae_table, gather_nodes
from minirlhf.exact import judge
from minirlhf.exact.expected import beside, kl_gradient_table, penalty_dlogits
from minirlhf.exact.libraries import LIBRARIES, TERMS
from minirlhf.exact.optimum import objective_gradient
from minirlhf.exact.tree_policy import tree_logits
from minirlhf.rlhf.advantages import gae
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.tree import tree_leaves, tree_map

DIVERGENCES = {  # of rows of log-probs (.., n)
    "kl": lambda p, q: (np.exp(p) * (p - q)).sum(-1),
    "forward_kl": lambda p, q: (np.exp(q) * (q - p)).sum(-1),
    "half_chi2": lambda p, q: 0.5 * (np.exp(2 * p - q)).sum(-1),
    "l1": lambda p, q: abs(np.exp(p) - np.exp(q)).sum(-1),
}


def log_response(world, log_pi):
    at = log_pi[world.responses.nodes, world.responses.tokens]
    return (at * world.responses.mask).sum(axis=1)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("whole", [True, False])
def test_each_gradient_is_that_of_its_divergence(name, whole):
    """Along a random direction of the parameters, against differences of the divergence."""
    setting = judge.make_settings(0, 3, 3)[1]
    world, D = setting.world, DIVERGENCES[name]
    ref, frozen = world.log_probs("ref"), np.exp(world.log_probs("theta"))
    reach = np.zeros(len(frozen))  # how likely the policy, as it is, gets to a prefix
    np.add.at(reach, world.responses.nodes, world.probs("theta")[:, None] * world.responses.mask)
    rng = np.random.default_rng(1)
    direction = tree_map(lambda a: rng.standard_normal(a.shape), world.policies["theta"])

    def value(h):
        params = tree_map(lambda a, d: a + h * d, world.policies["theta"], direction)
        log_pi = log_softmax(tree_logits(params, **world.where))
        if whole:
            return D(log_response(world, log_pi), log_response(world, ref))
        return reach @ D(log_pi, ref)

    h = 1e-5
    numeric = (8 * (value(h) - value(-h)) - value(2 * h) + value(-2 * h)) / (12 * h)
    c = judge.exact_gradients(setting, judge.kl_slopes(setting), "theta")
    flat = np.concatenate([leaf.reshape(-1) for leaf in tree_leaves(direction)])
    ours = c[name if whole else f"token_{name}"] @ flat
    assert ours == pytest.approx(numeric, rel=1e-6, abs=1e-8)


def answer_of(slope):
    return lambda arrays: (0.0, slope(**arrays) * arrays["mask"])


def verdicts(slope, placement="loss", **about):
    settings = judge.make_settings()
    about = {"placement": placement, "with_reward": False, **about}
    return list(judge.judge_loss(answer_of(slope), settings, **about))


def d(logp, ref_logp, **_):
    return logp - ref_logp


ROWS = {  # kl_mode -> placement, the term (in the reward) or its slope by hand
    "reward_k1": ("reward", d),
    "reward_k2": ("reward", lambda **a: 0.5 * d(**a) ** 2),
    "reward_k3": ("reward", lambda **a: np.expm1(-d(**a)) + d(**a)),
    "loss_k1": ("loss", lambda logp, **_: 0 * logp + 1),
    "loss_k2_tok": ("loss", d),
    "loss_k2_seq": ("loss", lambda mask, **a: (mask * d(**a)).sum()),
    "loss_k3_tok": ("loss", lambda **a: -np.expm1(-d(**a))),
    "loss_k3_seq": ("loss", lambda mask, **a: -np.expm1(-(mask * d(**a)).sum())),
}


def test_the_rows_are_those_of_the_table_of_placements():
    """The farthest distance, on-policy, is the world of `minirlhf exact --parts kl`."""
    table = {r["kl_mode"]: r for r in reversed(kl_gradient_table()) if r["sampler"] == "theta"}
    for mode, (placement, slope) in ROWS.items():
        row = verdicts(slope, placement)[0].rows[-1]
        for number in ("error", "cosine", "noise"):
            assert row[number] == pytest.approx(table[mode][number], rel=1e-8, abs=1e-8), mode


@pytest.mark.parametrize("mode", ["reward_k1", "reward_k3", "loss_k2_seq", "loss_k3_tok"])
def test_the_rows_on_samples_of_old_are_those_of_the_losses_of_the_package(mode):
    placement, slope = ROWS[mode]
    world = judge.make_settings()[-1].world
    theta, old, ref = (world.logits[name] for name in ("theta", "old", "ref"))
    others = {"old_logits": old, "ref_logits": ref, "kl_mode": mode}
    dlogits = penalty_dlogits(world.responses, theta, **others)  # (M, T, V)
    mean = gather_nodes(world.tree, world.responses, dlogits, weights=world.probs("old"))
    args = (world.tree, world.log_probs("theta"), world.log_probs("ref"), 0 * world.rewards)
    g = world.pull_back(objective_gradient(*args, kl_coef=-1.0), world.policies["theta"])
    off = world.pull_back(mean, world.policies["theta"])
    row = verdicts(slope, placement)[1].rows[-1]
    for number in ("error", "cosine"):
        assert row[number] == pytest.approx(beside(off, g)[number], rel=1e-8)


def test_a_factor_that_depends_on_the_distance_is_none():
    calls = iter(range(10**6))

    def slope(mask, logp, ref_logp, **_):  # 121 responses at each distance
        return (1 + next(calls) // 121) * (mask * (logp - ref_logp)).sum()

    on, _ = verdicts(slope)
    assert on.claim == judge.NONE and on.nearest == "kl"


def test_the_rows_of_an_estimator_are_those_of_the_table_of_gae():
    table = {row["value"]: row for row in gae_table() if row["lam"] == 0.95}

    def answer(arrays):
        advantages, _ = gae(arrays["rewards"], arrays["values"], mask=arrays["mask"], lam=0.95)
        return 0.0, advantages

    exact, zero, off = judge.judge_advantages(answer, judge.make_settings())
    assert exact.claim == "reward" and zero.claim == off.claim == judge.NONE
    for verdict, name in ((exact, "exact"), (zero, "zero")):
        row = verdict.rows[-1]
        assert row["error"] == pytest.approx(table[name]["bias"], rel=1e-8, abs=1e-12)
        assert row["noise"] == pytest.approx(table[name]["noise"], rel=1e-8)


def test_on_samples_of_old():
    """-KL(old || pi), token ratios, no correction, and the whole response's ratio: each named."""

    def ratio(logp, old_logp, **_):
        return np.exp(logp - old_logp)

    def whole(logp, old_logp, ref_logp, mask, **_):
        lr = (mask * (logp - ref_logp)).sum()
        return np.exp((mask * (logp - old_logp)).sum()) * (lr + 1)

    said = [
        verdicts(slope)[1].claim
        for slope in (lambda mask, **_: mask, lambda **a: ratio(**a) * d(**a), d, whole)
    ]
    stale = "token_kl on samples of old"
    assert said == ["minus_kl_old", "token_kl by token ratios", stale, "kl"]


def test_a_mean_that_is_rounding_is_nothing_and_a_small_share_is_seen():
    assert verdicts(lambda mask, **_: 1e6 * mask)[0].claim == judge.NOTHING
    (mixed, _) = verdicts(lambda mask, **a: (mask * d(**a)).sum() - 0.02 * np.expm1(-d(**a)))
    assert mixed.claim == judge.NONE and mixed.nearest == "kl"


def test_every_library_has_a_source():
    for name, row in LIBRARIES.items():
        assert row.as_of and (row.as_of == "the paper" or ": " in row.where), name
        assert row.placement in ("loss", "reward") and row.term in TERMS
