"""The penalty: its values, its gradients in every placement, its coefficient, its clamps.

The gradients are expected gradients: of a policy with one row of logits for each prefix, summed
over all 27 responses of three tokens from three. Nothing is sampled, so right is right to 1e-8.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import with_junk
from tolerances import DIFFERENT, ENUMERATION, K3, LOOPS, PRINTED, assert_close

from gradients import gather_nodes
from minirlhf.errors import InputError
from minirlhf.exact.enumeration import all_responses, enumerate_responses
from minirlhf.exact.expected import penalty_dlogits
from minirlhf.rlhf.kl import (
    ESTIMATORS,
    KL_MODES,
    LOG_RATIO_LIMIT,
    adaptive_kl_coef,
    clamp_log_ratio,
    expm1_minus,
    full_kl_backward,
    full_kl_forward,
    kl_estimate,
    penalty_in_reward,
    sequence_kl_loss_backward,
    sequence_kl_loss_forward,
    summed_penalty,
    token_kl_loss_backward,
    token_kl_loss_forward,
)
from minirlhf.rlhf.logprobs import token_logprobs_forward
from minirlhf.rlhf.objectives import kl_loss_backward, kl_loss_forward
from minirlhf.train.settings import PPOConfig


def distribution(*p):
    return np.array(p)


def exact_kl(p, q):
    return float((p * np.log(p / q)).sum())


def expectation(p, q, estimator):
    return float((p * kl_estimate(np.log(p / q), estimator)).sum())


def variance(p, q, estimator):
    values = kl_estimate(np.log(p / q), estimator)
    return float((p * values * values).sum() - (p * values).sum() ** 2)


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "q", "kl", "k2"),
    [
        ((0.7, 0.2, 0.1), (0.3, 0.4, 0.3), 0.34462, 0.35966),
        ((0.9, 0.1), (0.8, 0.2), 0.03669, 0.03027),
    ],
)
def test_the_bias_of_k2_has_no_fixed_sign(p, q, kl, k2):
    p, q = distribution(*p), distribution(*q)
    assert exact_kl(p, q) == pytest.approx(kl, abs=5e-6)
    assert expectation(p, q, "k1") == pytest.approx(kl, abs=5e-6)
    assert expectation(p, q, "k3") == pytest.approx(kl, abs=5e-6)
    assert expectation(p, q, "k2") == pytest.approx(k2, abs=5e-6)
    negative = p[kl_estimate(np.log(p / q), "k1") < 0].sum()
    assert negative == pytest.approx(1 - p[0])  # k1 < 0 wherever p < q


def test_the_variance_of_k3_is_not_always_the_smaller_one():
    p, q = distribution(0.98, 0.02), distribution(0.5, 0.5)
    assert exact_kl(p, q) == pytest.approx(0.595, abs=5e-4)
    assert variance(p, q, "k1") == pytest.approx(0.297, abs=5e-4)
    assert variance(p, q, "k3") == pytest.approx(8.32, abs=5e-3)


def test_the_inverted_k3_has_the_mean_of_another_divergence():
    p, q = distribution(0.7, 0.2, 0.1), distribution(0.3, 0.4, 0.3)
    inverted = float((p * kl_estimate(np.log(q / p), "k3")).sum())  # e^lr - 1 - lr
    chi_square = float((p * p / q).sum()) - 1
    assert inverted == pytest.approx(chi_square - exact_kl(p, q), abs=LOOPS)
    assert abs(inverted - exact_kl(p, q)) > DIFFERENT


def test_a_truncated_sampler_can_make_the_mean_of_k1_negative():
    p, q = distribution(0.5, 0.3, 0.15, 0.05), distribution(0.6, 0.3, 0.05, 0.05)
    top_2 = distribution(0.5, 0.3, 0.0, 0.0) / 0.8
    assert float((top_2 * kl_estimate(np.log(p / q), "k1")).sum()) == pytest.approx(
        -0.114, abs=5e-4
    )
    assert exact_kl(p, q) == pytest.approx(0.0736, abs=5e-5)


@pytest.mark.parametrize(
    ("mu", "kl", "bias", "sd"),
    [
        (0.1, 0.005, (0.0, 0.0025, 0.0), (20.0, 1.42, 1.42)),
        (1.0, 0.5, (0.0, 0.25, 0.0), (2.0, 1.73, 1.70)),
    ],
)
def test_two_normals(mu, kl, bias, sd):
    """pi = N(0, 1), ref = N(mu, 1): relative bias mu^2 / 4 of k2, and sd / KL, by quadrature."""
    x, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    log_ratio = mu * mu / 2 - mu * x  # log N(x; 0, 1) - log N(x; mu, 1)
    for estimator, relative_bias, relative_sd in zip(ESTIMATORS, bias, sd, strict=True):
        values = kl_estimate(log_ratio, estimator)
        mean = float((weights * values).sum())
        spread = math.sqrt(float((weights * (values - mean) ** 2).sum()))
        assert mean / kl - 1 == pytest.approx(relative_bias, abs=1e-6)
        assert spread / kl == pytest.approx(relative_sd, abs=PRINTED)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 4.0]))
def test_means_signs_and_zero(seed, scale):
    rng = np.random.default_rng(seed)
    # |log p/q| <= 16: below 20, where k3 would be cut and its mean no longer be the KL.
    p, q = (np.exp(z) / np.exp(z).sum() for z in scale * rng.uniform(-1, 1, size=(2, 5)))
    assert exact_kl(p, q) >= 0
    assert_close(expectation(p, q, "k1"), exact_kl(p, q))
    assert_close(expectation(p, q, "k3"), exact_kl(p, q))
    for estimator in ("k2", "k3"):
        assert (kl_estimate(np.log(p / q), estimator) >= 0).all()
    for estimator in ESTIMATORS:
        assert (kl_estimate(np.log(p / p), estimator) == 0).all()  # theta = ref
    logp, ref_logp, mask = np.log(p)[None], np.log(q)[None], np.ones((1, 5))
    there = summed_penalty(logp, ref_logp, mask=mask)
    assert_close(summed_penalty(ref_logp, logp, mask=mask), -there, 0.0)  # k1 is antisymmetric
    assert summed_penalty(logp, logp, mask=mask) == 0.0


def exp_minus_1_minus(x):
    """exp(x) - 1 - x in float64 without cancellation: its series where |x| < 1."""
    if abs(x) < 1:
        return math.fsum(x**n / math.factorial(n) for n in range(2, 25))
    return math.exp(x) - 1.0 - x


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_k3_is_exact_at_small_and_large_log_ratios(dtype):
    x = np.concatenate([np.logspace(-9, np.log10(20), 200), [0.0099, 0.0101, 0.4999, 0.5, 0.5001]])
    x = np.concatenate([x, -x]).astype(dtype)
    expected = np.array([exp_minus_1_minus(float(v)) for v in x])
    got = expm1_minus(x)
    assert got.dtype == dtype
    assert np.abs(got / expected - 1).max() < K3[dtype]
    naive = np.exp(x) - 1 - x  # what the function is there for
    assert np.abs(naive / expected - 1).max() > 0.5
    inside = (x >= -20) & (x <= 20)
    assert inside.sum() > 390
    assert_close(kl_estimate(-x[inside], "k3"), got[inside], 0.0)
    assert expm1_minus(np.zeros(1, dtype=dtype)) == 0.0


def test_clamps_are_counted_and_everything_stays_finite():
    log_ratio = np.array([-1e4, -20.5, -20.0, -3.0, 0.0, 3.0, 20.0, 20.5, 1e4])
    clamped, inside = clamp_log_ratio(log_ratio)
    assert clamped.tolist() == [-20.0, -20.0, -20.0, -3.0, 0.0, 3.0, 20.0, 20.0, 20.0]
    assert (~inside).sum() == 4 and LOG_RATIO_LIMIT == 20.0
    k3 = kl_estimate(log_ratio, "k3")
    assert np.isfinite(k3).all()
    assert k3[0] == k3[2] == pytest.approx(math.exp(20) - 21)
    # Upwards exp(-log_ratio) dies out by itself: k3 = log_ratio - 1 and pulls back for ever.
    assert k3[-3] == pytest.approx(19 + math.exp(-20)) and k3[-1] == 1e4 - 1
    slope = ESTIMATORS["k3"](log_ratio)[1]
    assert slope[0] == slope[1] == 0 and slope[2] != 0
    assert slope[-1] == 1 and slope[-2] == pytest.approx(1.0)
    # k1 and k2 need no clamp, so the penalty in the reward is never cut.
    assert kl_estimate(log_ratio, "k1")[0] == -1e4
    assert kl_estimate(log_ratio, "k2")[0] == 5e7
    float32, _ = clamp_log_ratio(log_ratio.astype(np.float32))
    assert float32.dtype == np.float32
    far = np.array([-1e30, 1e4, 1e30], dtype=np.float32)  # no power of it overflows on the way
    assert_close(kl_estimate(far, "k3"), [math.exp(20) - 21, 1e4 - 1, 1e30], 1e-6)


def test_nan_is_not_hidden_by_the_clamp():
    clamped, _ = clamp_log_ratio(np.array([np.nan]))
    assert np.isnan(clamped).all()


@pytest.mark.parametrize("kl_mode", KL_MODES)
@pytest.mark.parametrize("distance", [1e4, -1e4])
def test_losses_and_gradients_stay_finite_at_extreme_log_ratios(kl_mode, distance):
    logits = np.zeros((1, 2, 3))
    logits[..., 0] = distance
    logp, _ = token_logprobs_forward(logits, targets=np.zeros((1, 2), dtype=int))
    loss, cache = kl_loss_forward(
        logits,
        logp,
        kl_mode=kl_mode,
        old_logp=logp - distance,
        ref_logp=logp + distance,
        ref_logits=-logits,
        weights=np.ones((1, 2)),
    )
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in kl_loss_backward(1.0, cache))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_full_kl_is_never_negative(dtype):
    """Two policies that nearly agree: rounding alone would leave -4e-7 in float32."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((50, 40, 30))).astype(dtype)
    for distance in (0.0, 1e-8, 1e-4):
        ref_logits = logits + (distance * rng.standard_normal(logits.shape)).astype(dtype)
        kl_token, cache = full_kl_forward(logits, ref_logits=ref_logits)
        assert (kl_token >= 0).all() and kl_token.dtype == dtype
        assert kl_token.max() < 1e-6
        # The gradient is that of the sum: over the vocabulary it adds up to 0.
        dlogits = full_kl_backward(np.ones_like(kl_token), cache)
        assert np.abs(dlogits.sum(axis=-1)).max() < 2e-6
    assert (cache.kl_token < 0).any() == (dtype == np.float32)  # or nothing was tried


def test_a_complex_step_goes_through_a_kl_that_was_lifted_to_0():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((40, 40, 30))
    ref_logits = logits + 1e-9 * rng.standard_normal(logits.shape)
    kl_token, cache = full_kl_forward(logits, ref_logits=ref_logits)
    lifted = np.argwhere(cache.kl_token < 0)
    assert len(lifted) > 10 and (kl_token[cache.kl_token < 0] == 0).all()
    dlogits = full_kl_backward(np.ones_like(kl_token), cache)
    for b, t in lifted[:5]:
        moved = logits.astype(complex)
        a = np.abs(dlogits[b, t]).argmax()
        moved[b, t, a] += 1e-30j
        got = full_kl_forward(moved, ref_logits=ref_logits)[0][b, t].imag / 1e-30
        assert abs(got) > 1e-11 and got == pytest.approx(dlogits[b, t, a], abs=1e-15)


X = np.zeros((2, 3))
LOSSES = {"token_kl_loss": token_kl_loss_forward, "sequence_kl_loss": sequence_kl_loss_forward}
BACKWARDS = {"token_kl_loss": token_kl_loss_backward, "sequence_kl_loss": sequence_kl_loss_backward}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("argument", ["logp", "old_logp", "ref_logp", "weights"])
def test_shapes_of_kl_losses_are_checked(loss, argument):
    """Each of the four alone: broadcasting would make a number of any of them."""
    arguments = {"logp": X, "old_logp": X, "ref_logp": X, "weights": X, argument: X[:1]}
    logp = arguments.pop("logp")
    with pytest.raises(ValueError, match=f"{loss}: expected logp, old_logp, .* of one shape; got"):
        LOSSES[loss](logp, **arguments, estimator="k2")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ratio", ["none", "differentiated", "held"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_enters_no_kl_loss(loss, ratio, estimator):
    """nan at padding, in any of the three: the same loss, and a slope of exactly 0 there."""
    weights = np.array([[0.25, 0.25, 0.25, 0.0], [0.25, 0.0, 0.0, 0.0]])
    clean = dict(
        zip(
            ("logp", "old_logp", "ref_logp"),
            np.random.default_rng(0).standard_normal((3, 2, 4)),
            strict=True,
        )
    )

    def run(logp, **constants):
        settings = {"weights": weights, "estimator": estimator, "ratio": ratio}
        value, cache = LOSSES[loss](logp, **constants, **settings)
        return value, BACKWARDS[loss](1.0, cache)

    value, slope = run(**clean)
    assert (slope[weights == 0] == 0).all() and (slope[weights > 0] != 0).all()
    for name in clean:
        dirty = {**clean, name: with_junk(clean[name], weights, junk=[np.nan])}
        dirty_value, dirty_slope = run(**dirty)
        assert_close(dirty_value, value, 0.0)
        assert_close(dirty_slope, slope, 0.0)


@pytest.mark.parametrize("loss", LOSSES.values())
def test_other_ratios_are_refused(loss):
    with pytest.raises(ValueError, match='expected ratio "none", "differentiated" or "held"; got'):
        loss(X, old_logp=X, ref_logp=X, weights=X, estimator="k2", ratio="both")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_ratio_that_is_held_is_a_factor_of_value_and_slope(loss, estimator):
    logp, old_logp, ref_logp = np.random.default_rng(0).standard_normal((3, 1, 1))
    arguments = {"ref_logp": ref_logp, "weights": np.ones((1, 1)), "estimator": estimator}
    (plain, cache), (held, held_cache), (moved, moved_cache) = (
        LOSSES[loss](logp, old_logp=old_logp, **arguments, ratio=ratio)
        for ratio in ("none", "held", "differentiated")
    )
    rho = math.exp((logp - old_logp).item())
    assert_close([held, moved], [rho * plain] * 2)
    caches = (getattr(c, "whole", c) for c in (cache, held_cache, moved_cache))
    slope, held_slope, moved_slope = (c.slope for c in caches)
    assert_close(held_slope, rho * slope)
    assert_close(moved_slope, held_slope + rho * plain)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="kl_mode: expected one of reward_k1, .*; got 'reward'"):
        penalty_in_reward("reward", log_ratio=X, kl_full=X)
    with pytest.raises(ValueError, match="kl_loss: expected one of reward_k1, .*; got 'loss_k4'"):
        kl_loss_forward(
            np.zeros((2, 3, 4)),
            X,
            kl_mode="loss_k4",
            old_logp=X,
            ref_logp=X,
            ref_logits=None,
            weights=X,
        )
    with pytest.raises(
        ValueError, match=r"penalty_in_reward: .* one shape; got \(2, 3\), \(1, 3\)"
    ):
        penalty_in_reward("reward_k1", log_ratio=X, kl_full=X[:1])


def test_unknown_estimators_are_refused():
    with pytest.raises(ValueError, match="kl_estimate: expected one of k1, k2, k3; got 'k4'"):
        kl_estimate(X, "k4")
    with pytest.raises(ValueError, match="kl_loss: expected one of k1, k2, k3; got 'k4'"):
        token_kl_loss_forward(X, old_logp=X, ref_logp=X, weights=X, estimator="k4")


# -- gradients by enumeration --------------------------------------------------------------------

V, T = 3, 3
TREE = enumerate_responses(vocab_size=V, max_tokens=T)
ALL = all_responses(TREE)
NODE, RESPONSES, NO_PADDING = ALL.nodes, ALL.tokens, ALL.mask  # (27, T) each
NODES = TREE.n_nodes


def make_table(seed):
    return 0.8 * np.random.default_rng(seed).standard_normal((NODES, V))


THETA, OLD, REF = (make_table(seed) for seed in range(3))


def log_rows(table):
    """log softmax of each row, also for complex tables."""
    return table - np.log(np.exp(table).sum(axis=-1, keepdims=True))


def token_logps(table):
    """(27, T) of all responses."""
    return log_rows(table)[NODE, RESPONSES]


def response_probs(table):
    """(27,)"""
    return np.exp(token_logps(table).sum(axis=1))


def gradient(f, table):
    """df/dtable of a function of a complex table, one entry at a time, exact to rounding."""
    result = np.zeros_like(table)
    for entry in np.ndindex(table.shape):
        moved = table.astype(complex)
        moved[entry] += 1e-30j
        result[entry] = f(moved).imag / 1e-30
    return result


def kl(p_table, q_table):
    """KL of whole responses."""
    logs = token_logps(p_table), token_logps(q_table)
    return (np.exp(logs[0].sum(axis=1)) * (logs[0] - logs[1]).sum(axis=1)).sum()


def tokenwise(term, sampler):
    """theta -> sum over frozen prefixes of Pr_sampler(prefix) term(theta's row, ref's row)."""

    def f(table):
        rows = term(log_rows(table), log_rows(REF))[NODE]  # (27, T)
        return (response_probs(sampler)[:, None] * rows).sum()

    return f


def reverse_kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def forward_kl(log_p, log_q):
    return (np.exp(log_q) * (log_q - log_p)).sum(axis=-1)


G = gradient(lambda table: kl(table, REF), THETA)
FORWARD = gradient(lambda table: kl(REF, table), THETA)
PARTIAL = gradient(tokenwise(reverse_kl, THETA), THETA)
FORWARD_BY_TOKEN = gradient(tokenwise(forward_kl, THETA), THETA)
K2_AS_A_REWARD = gradient(
    lambda table: (
        response_probs(table) * 0.5 * ((token_logps(THETA) - token_logps(REF)) ** 2).sum(axis=1)
    ).sum(),
    THETA,
)
# What stands beside each mode in KL_MODES, and the gradient it speaks of.
EXPECTED = {
    "g": G,
    "g, also off-policy": G,
    "biased": K2_AS_A_REWARD,
    "g - forward KL token by token": G - FORWARD_BY_TOKEN,
    "0: noise only (the formula as printed)": np.zeros_like(G),
    "partial": PARTIAL,
    "partial, at old prefixes": PARTIAL,
    "forward KL token by token (GRPO)": FORWARD_BY_TOKEN,
    "grad KL(ref || pi_theta)": FORWARD,
}


def expected_gradient(kl_mode, sampler):
    """E_{y ~ sampler} of the penalty's gradient in the tables of logits, through the package."""
    dlogits = penalty_dlogits(ALL, THETA, old_logits=sampler, ref_logits=REF, kl_mode=kl_mode)
    return gather_nodes(TREE, ALL, dlogits, weights=response_probs(sampler))


def difference(a, b):
    return np.abs(a - b).max()


def test_the_references_of_the_gradient_table():
    assert kl(THETA, REF) > 0 and kl(REF, REF) == 0.0
    assert response_probs(THETA).sum() == pytest.approx(1.0, abs=LOOPS)
    # E[log_ratio s] is the same gradient: the derivative inside the log adds E[s] = 0.
    score = gradient(
        lambda table: (
            response_probs(THETA)
            * (token_logps(THETA) - token_logps(REF)).sum(axis=1)
            * token_logps(table).sum(axis=1)
        ).sum(),
        THETA,
    )
    assert difference(score, G) < ENUMERATION
    references = [G, FORWARD, PARTIAL, FORWARD_BY_TOKEN, K2_AS_A_REWARD, 0 * G]
    for i, a in enumerate(references):
        for b in references[:i]:
            assert difference(a, b) > DIFFERENT  # or the table could not tell them apart


@pytest.mark.parametrize("kl_mode", KL_MODES)
def test_gradient_on_policy(kl_mode):
    """Sampled from theta itself."""
    text = KL_MODES[kl_mode].gradient
    got = expected_gradient(kl_mode, THETA)
    assert difference(got, EXPECTED[text]) < ENUMERATION
    if not text.startswith("g,") and text != "g":
        assert difference(got, G) > DIFFERENT


@pytest.mark.parametrize("kl_mode", [m for m, mode in KL_MODES.items() if not mode.in_reward])
def test_gradient_off_policy(kl_mode):
    """Sampled from old: only an importance ratio keeps the gradient."""
    got = expected_gradient(kl_mode, OLD)
    if "also off-policy" in KL_MODES[kl_mode].gradient:
        assert difference(got, G) < ENUMERATION
    else:
        assert difference(got, G) > DIFFERENT
    if kl_mode == "loss_rho_k3_tok":
        assert difference(got, gradient(tokenwise(reverse_kl, OLD), THETA)) < ENUMERATION
    if kl_mode == "loss_k1":  # pushes theta away from the policy that sampled
        away = -gradient(lambda table: kl(OLD, table), THETA)
        assert difference(got, away) < ENUMERATION


def test_every_mode_has_a_place():
    for name, mode in KL_MODES.items():
        assert mode.in_reward or mode.in_loss, name
        assert mode.gradient in EXPECTED, name
        assert (mode.estimator is not None) == (mode.in_loss in ("token", "sequence")), name


def test_the_full_kl_has_the_right_mean_and_less_variance():
    p = response_probs(THETA)
    token, _ = full_kl_forward(THETA[NODE], ref_logits=REF[NODE])
    full = token.sum(axis=1)
    k1 = summed_penalty(token_logps(THETA), token_logps(REF), mask=NO_PADDING)
    k3 = kl_estimate(k1, "k3")
    means = {name: (p * values).sum() for name, values in [("full", full), ("k1", k1), ("k3", k3)]}
    assert_close(list(means.values()), [kl(THETA, REF)] * 3)
    assert (full >= 0).all() and (k1 < 0).any()
    assert (p * full**2).sum() < 0.5 * (p * k1**2).sum()  # equal means, so this orders variances


# -- the coefficient -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl_seq", "expected"),
    [
        (6.0, 0.2),  # on target: as it was
        (6.6, 0.2 * (1 + 0.1 * 64 / 10000)),  # 10 % too far: e = 0.1
        (5.4, 0.2 * (1 - 0.1 * 64 / 10000)),
        (60.0, 0.2 * (1 + 0.2 * 64 / 10000)),  # e is cut at 0.2
        (0.0, 0.2 * (1 - 0.2 * 64 / 10000)),
        (-5.0, 0.2 * (1 - 0.2 * 64 / 10000)),  # a mean of k1 may be negative
    ],
)
def test_adaptive_coefficient(kl_seq, expected):
    got = adaptive_kl_coef(0.2, kl_seq=kl_seq, target=6.0, horizon=10000.0, n_episodes=64)
    assert got == pytest.approx(expected, rel=LOOPS)


@given(st.floats(0, 100), st.floats(0.01, 10), st.integers(1, 512))
def test_adaptive_coefficient_goes_the_right_way(kl_seq, target, n):
    """Too far from the reference: a heavier penalty. The unit is the summed KL of a response."""
    got = adaptive_kl_coef(1.0, kl_seq=kl_seq, target=target, horizon=10000.0, n_episodes=n)
    assert np.sign(got - 1.0) == np.sign(kl_seq / target - 1.0) or got == 1.0
    assert abs(got - 1.0) <= 0.2 * n / 10000 + LOOPS
    # Nats a response over a target in nats a response: a common factor drops out.
    assert got == pytest.approx(
        adaptive_kl_coef(1.0, kl_seq=7 * kl_seq, target=7 * target, horizon=1e4, n_episodes=n)
    )


@pytest.mark.parametrize("n_episodes", [9, 10, 11, 50, 51, 10**6])
@pytest.mark.parametrize(("kl_seq", "factor"), [(0.0, 0.8), (99.0, 1.2)])
def test_one_batch_changes_the_coefficient_by_a_fifth_at_most(n_episodes, kl_seq, factor):
    """As coded by its authors beta would be 0 at 50 episodes, and negative beyond."""
    got = adaptive_kl_coef(0.5, kl_seq=kl_seq, target=6.0, horizon=10.0, n_episodes=n_episodes)
    assert got == pytest.approx(0.5 * (factor if n_episodes >= 10 else 1 + 0.9 * (factor - 1)))
    short = adaptive_kl_coef(0.5, kl_seq=kl_seq, target=0.5, horizon=0.5, n_episodes=n_episodes)
    assert short == pytest.approx(0.5 * factor)


def test_settings_refuse_a_batch_beyond_the_horizon():
    with pytest.raises(InputError, match="ppo.kl_horizon: expected at least batch_size = 8.*got 7"):
        PPOConfig(kl_target=6.0, batch_size=8, kl_horizon=7.0)
    PPOConfig(kl_target=6.0, batch_size=8, kl_horizon=8.0)
    PPOConfig(kl_target=0.0, batch_size=8, kl_horizon=7.0)  # beta stays fixed


def test_a_horizon_of_episodes_changes_the_coefficient_by_a_fifth():
    kl_coef = 1.0
    for _ in range(100):
        kl_coef = adaptive_kl_coef(kl_coef, kl_seq=99.0, target=1.0, horizon=1e4, n_episodes=100)
    assert kl_coef == pytest.approx(math.exp(0.2), rel=1e-3)  # (1 + 0.2 / 100)^100


@pytest.mark.parametrize(
    "wrong", [{"target": 0.0}, {"horizon": 0.0}, {"target": -1.0}, {"target": math.nan}]
)
def test_adaptive_coefficient_refuses(wrong):
    settings = {"kl_seq": 1.0, "target": 6.0, "horizon": 1e4, "n_episodes": 1, **wrong}
    with pytest.raises(ValueError, match="expected target > 0 and horizon > 0"):
        adaptive_kl_coef(0.2, **settings)


@pytest.mark.parametrize(("old", "new"), [((0.6, 0.4), (0.98, 0.02)), ((0.98, 0.02), (0.6, 0.4))])
def test_the_distance_that_ends_the_epochs_is_the_kl_from_old(old, new):
    """policy/kl_old_k3_token, weighted by old's probabilities, is KL(old || theta) exactly."""
    old, new = np.log(old), np.log(new)
    kl = (np.exp(old) * (old - new)).sum()
    k3 = kl_estimate(-(new - old), "k3")  # as update_metrics has it: log_ratio = logp - old_logp
    assert (np.exp(old) * k3).sum() == pytest.approx(kl)
    inverted = kl_estimate(new - old, "k3")  # mean: chi-squared minus KL
    assert abs((np.exp(old) * inverted).sum() / kl - 1) > 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_ratio_of_a_response_keeps_its_digits_far_from_the_reference(estimator, dtype):
    """log rho = 0.25 exactly; as a difference of log-ratios it would lose the digits of 1e5."""
    old_logp = np.full((1, 2), -1.0, dtype=dtype)
    logp = old_logp + dtype(0.125)
    for ref_logp in (old_logp - dtype(1e5 / 3), np.full_like(old_logp, -np.inf)):
        same = {"ref_logp": ref_logp, "weights": np.ones_like(logp), "estimator": estimator}
        plain, _ = sequence_kl_loss_forward(logp, old_logp=old_logp, **same)
        held, _ = sequence_kl_loss_forward(logp, old_logp=old_logp, **same, ratio="held")
        assert plain > 0 and held == np.exp(dtype(0.25)) * plain
