"""Where DPO, cDPO and IPO come to rest if they see all pairs: exactly, on a desk of 400 replies.

The slope of the loss over all pairs is that of `dpo_backward`; Newton's method finds where it is 0.
"""

import dataclasses

import numpy as np
import pytest

from desk import Desk, tilted
from minirlhf.exact.ground_truth import SFT, make_ground_truth, measure
from minirlhf.exact.tiny import tiny_reference
from minirlhf.rlhf.preferences import dpo_backward, dpo_forward, sigmoid
from minirlhf.train.dpo import DPOConfig
from minirlhf.train.settings import OptimizerConfig
from study import dpo_on_world


@pytest.fixture(scope="module")
def desk():
    return Desk(max_tokens=3)


def chances(reward):
    """Pr(a is preferred to b) of Bradley and Terry: (M, M)."""
    return sigmoid(reward[:, None] - reward)


def at_rest(p, win, *, beta, **of_loss):
    """(M,) the policy at which the loss over all pairs of p's replies is least.

    Each pair (a, b) has the weight p_a p_b, and a is preferred with the chance win_ab.
    """
    M, log_ratio, both = p.size, np.zeros(p.size), np.outer(p, p)
    labels = M * M * (both * win).reshape(-1)  # the loss of a batch is a plain mean
    for _ in range(100):
        _, cache = dpo_forward(log_ratio.repeat(M), np.tile(log_ratio, M), kl_coef=beta, **of_loss)
        chosen, rejected = (d.reshape(M, M) for d in dpo_backward(labels, cache))
        slope = chosen.sum(axis=1) + rejected.sum(axis=0)
        h = beta * (log_ratio[:, None] - log_ratio)
        is_square = of_loss.get("loss") == "ipo"
        bend = both * (2.0 if is_square else beta * beta * sigmoid(h) * sigmoid(-h))
        # a shift of all log-ratios changes no pair: the last term holds it
        curvature = np.diag(bend.sum(axis=1)) - bend + both
        step = np.linalg.solve(curvature / p[:, None], slope / p)
        log_ratio = log_ratio - step
        if np.abs(step).max() < 1e-12:
            return tilted(p, log_ratio, beta=1.0)
    raise AssertionError("it does not come to rest")


def kl(p, q):
    return float(p @ (np.log(p) - np.log(q)))


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.2])
def test_dpo_rests_at_the_optimum_of_rlhf(desk, beta):
    """Rafailov et al. 2023: pi* = ref exp(r / beta) / Z, whatever the pairs, if all are seen."""
    best = desk.optimum(desk.proxy, beta=beta)
    found = at_rest(desk.ref, chances(desk.proxy), beta=beta)
    np.testing.assert_allclose(found, best, atol=1e-10)
    assert abs(kl(found, best)) < 1e-10 < 0.2 < kl(best, desk.ref)
    pairs_of_others = tilted(desk.ref, desk.gold, beta=2.0)  # weights, not the reference
    log_ratio = np.log(at_rest(pairs_of_others, chances(desk.proxy), beta=beta) / pairs_of_others)
    np.testing.assert_allclose(tilted(desk.ref, log_ratio, beta=1.0), best, atol=1e-10)


@pytest.mark.parametrize("beta", [0.5, 0.05])
def test_ipo_rests_at_the_tilt_by_the_chance_of_winning(desk, beta):
    """Azar et al. 2023: pi = ref exp(Pr(y beats a reply of ref) / beta) / Z: a bounded reward."""
    win = chances(desk.proxy)
    wanted = tilted(desk.ref, win @ desk.ref, beta=beta)
    np.testing.assert_allclose(at_rest(desk.ref, win, beta=beta, loss="ipo"), wanted, atol=1e-10)
    smoothed = at_rest(desk.ref, win, beta=beta, loss="ipo", label_smoothing=0.1)
    np.testing.assert_allclose(  # flipped labels are a larger beta, and nothing else
        smoothed, tilted(desk.ref, win @ desk.ref, beta=beta / 0.8), atol=1e-10
    )
    # certain labels, which send DPO to infinity, leave it at rest
    sure = (desk.proxy[:, None] > desk.proxy) + 0.5 * (desk.proxy[:, None] == desk.proxy)
    log_ratio = np.log(at_rest(desk.ref, sure, beta=beta, loss="ipo") / desk.ref)
    assert np.ptp(log_ratio) < 1 / beta


@pytest.mark.parametrize("flipped, away", [(0.01, 0.00046), (0.1, 0.0390), (0.2, 0.1432)])
def test_cdpo_rests_short_of_the_optimum(desk, flipped, away):
    """KL(cDPO || pi*) at beta = 0.5, where KL(pi* || ref) is 0.6456: it stays nearer to ref."""
    win, best = chances(desk.proxy), desk.optimum(desk.proxy, beta=0.5)
    found = at_rest(desk.ref, win, beta=0.5, label_smoothing=flipped)
    assert kl(best, desk.ref) == pytest.approx(0.6456, abs=5e-5)
    assert kl(found, best) == pytest.approx(away, rel=0.01)
    assert kl(found, desk.ref) < kl(best, desk.ref)
    apart = [np.ptp(np.log(p / desk.ref)) for p in (found, best)]
    assert apart[0] < apart[1] == pytest.approx(np.ptp(desk.proxy) / 0.5)


def test_cdpo_is_dpo_on_flipped_labels_and_cures_none(desk):
    win, flipped = chances(desk.proxy), 0.1
    noisy = (1 - flipped) * win + flipped * (1 - win)
    same = {"beta": 0.5, "label_smoothing": flipped}
    np.testing.assert_allclose(
        at_rest(desk.ref, win, **same), at_rest(desk.ref, noisy, beta=0.5), atol=1e-10
    )
    best = desk.optimum(desk.proxy, beta=0.5)
    plain, smoothed = at_rest(desk.ref, noisy, beta=0.5), at_rest(desk.ref, noisy, **same)
    assert kl(plain, best) < 0.5 * kl(smoothed, best)


# --- the transformer, from pairs of its reference's samples


@pytest.fixture(scope="module")
def trained():
    """What a policy is worth after DPO, by its settings."""
    world = Desk(max_tokens=3).world
    settings = dataclasses.replace(SFT, steps=150, batch_size=256)
    reference = tiny_reference(101, settings=settings, max_tokens=3, n_demonstrations=20_000)
    truth = make_ground_truth(world, reference, kl_coef=0.5)
    desk = Desk(max_tokens=3, ref_log_probs=truth.ref_log_probs)
    numbers = desk.draw_pairs(desk.ref, 8000, rng=np.random.default_rng(1), gold=desk.proxy)
    pairs = desk.as_pairs(numbers)
    assert len(pairs) == (numbers[:, 0] != numbers[:, 1]).sum()
    learn = OptimizerConfig(learning_rate=2e-3, warmup=10, eps=1e-8)

    def after(**changes):
        settings = DPOConfig(kl_coef=0.5, epochs=2, batch_size=256, optimizer=learn, **changes)
        *_, (params, _) = dpo_on_world(world, reference, pairs, settings=settings, seed=1)
        return measure(truth, params)

    return after, desk


def test_dpo_on_the_desk_comes_near_the_optimum(trained):
    after, _ = trained
    found = after()
    assert found["exact/fraction"] > 0.9 and found["exact/objective"] < found["exact/optimum"]


def test_ipo_on_the_desk_stays_where_it_rests(trained):
    after, desk = trained
    found = after(loss="ipo")
    rest = tilted(desk.ref, chances(desk.proxy) @ desk.ref, beta=0.5)
    assert found["exact/kl_seq"] == pytest.approx(desk.kl(rest), abs=0.02)
    assert found["exact/reward"] == pytest.approx(rest @ desk.proxy, abs=0.05)
