"""The desk as vectors over its replies: what the tree says, and reward models fitted to pairs."""

import numpy as np
import pytest

from desk import Desk, fit_bradley_terry, pair_accuracy, tilted
from minirlhf.exact import optimum
from minirlhf.exact.tiny import EOS


@pytest.fixture(scope="module")
def desk():
    return Desk(max_tokens=3)


def test_a_policy_is_what_the_tree_says_of_it(desk):
    best = optimum.soft_optimum(desk.tree, desk.ref_log_probs, desk.proxy, kl_coef=0.5)
    p = desk.optimum(desk.proxy, beta=0.5)
    np.testing.assert_allclose(p, desk.probs(best.log_probs), atol=1e-14)
    args = (desk.tree, best.log_probs, desk.ref_log_probs)
    value = optimum.evaluate_exactly(*args, desk.proxy, kl_coef=0.5)
    found = desk.describe(p)
    assert found["proxy"] == pytest.approx(float(value.reward), abs=1e-12)
    assert found["kl_seq"] == pytest.approx(float(value.kl_seq), abs=1e-12)
    assert found["entropy_seq"] == pytest.approx(float(value.entropy_seq), abs=1e-12)
    assert found["proxy"] - 0.5 * found["kl_seq"] == pytest.approx(float(best.objective), abs=1e-12)
    assert desk.kl(desk.ref) == pytest.approx(0.0, abs=1e-14)
    assert desk.best_of(desk.proxy, n=1) == pytest.approx(desk.ref, abs=1e-14)


def test_what_is_counted_by_hand(desk):
    leaf = desk.leaf("ANS ANS DET")
    assert desk.reply(leaf) == "ANS ANS DET"
    p = np.zeros(desk.ref.size)
    p[leaf] = 1.0
    found = desk.describe(p)
    assert found["length"] == 3 and found["repeats"] == pytest.approx(1 / 3)
    assert (found["answered"], found["unsafe"], found["top"]) == (1, 0, 1)
    assert found["top_reply"] == "ANS ANS DET" and found["entropy_seq"] == 0
    assert found["likely"].startswith("ANS ANS DET (100%), ")
    assert found["gold"] == pytest.approx(1.5 + 0.6 - 0.35 - 0.4)
    assert desk.reply(desk.leaf("")) == ""


def test_distinct_2_is_what_batches_of_samples_have(desk):
    p, rng = desk.optimum(desk.proxy, beta=0.5), np.random.default_rng(0)
    kept = (desk.responses.mask > 0) & (desk.responses.tokens != EOS)
    replies = [row[k].tolist() for row, k in zip(desk.responses.tokens, kept, strict=True)]
    batches = [[replies[i] for i in rng.choice(p.size, 32, p=p)] for _ in range(400)]
    pairs = [
        [pair for ids in batch for pair in zip(ids, ids[1:], strict=False)] for batch in batches
    ]
    different = np.mean([len(set(of_batch)) for of_batch in pairs])
    found = different / np.mean([len(of_batch) for of_batch in pairs])
    assert desk.distinct_2(p, n=32) == pytest.approx(found, rel=0.02)  # 1 % is one sd
    alone = np.zeros(p.size)
    alone[desk.leaf("ANS ANS DET")] = 1.0
    assert desk.distinct_2(alone, n=4) == pytest.approx(2 / 8)  # ANS ANS and ANS DET, of 4 x 2
    assert desk.distinct_2(np.eye(p.size)[desk.leaf("ANS")]) == 0  # no pair at all


def test_what_each_token_pays_sums_to_the_log_ratio(desk):
    best = optimum.soft_optimum(desk.tree, desk.ref_log_probs, desk.proxy, kl_coef=0.5)
    log_ratio = np.log(desk.optimum(desk.proxy, beta=0.5)) - desk.ref_logp
    for reply, n in (("ANS", 2), ("ANS DET", 3), ("ANS DET ANS", 3)):  # EOS, where there is room
        paid = desk.log_ratios(best.log_probs, reply)
        assert paid.shape == (n,)
        assert paid.sum() == pytest.approx(log_ratio[desk.leaf(reply)], abs=1e-12)


def test_the_published_numbers_of_the_chain():
    found = Desk().describe(Desk().ref)  # shared thinking: E len 2.65, H 5.396, gold 1.057
    assert found["length"] == pytest.approx(2.65, abs=0.005)
    assert found["entropy_seq"] == pytest.approx(5.396, abs=0.0005)
    assert found["gold"] == pytest.approx(1.057, abs=0.0005)


def test_bradley_terry_finds_the_judge_it_was_taught_by(desk):
    weights = np.array([1.0, 0.5, -0.5, -1.0, -1.0, -0.5, -2.0])
    judge = desk.counts @ weights
    pairs = desk.draw_pairs(desk.ref, 40_000, rng=np.random.default_rng(0), gold=judge)
    found = fit_bradley_terry(desk.counts, pairs, l2=1e-6)
    seen = desk.ref @ (desk.counts > 0) > 0.05  # hardly any pair speaks of the others
    np.testing.assert_allclose(found[seen], weights[seen], atol=0.1)
    lead = (judge[pairs] * [1, -1]).sum(axis=1)
    expected = np.mean(1 / (1 + np.exp(-np.abs(lead))))  # the judge's own hit rate
    assert pair_accuracy(judge, pairs) == pytest.approx(expected, abs=0.01)


def test_bradley_terry_without_a_contradiction_says_so():
    features = np.array([[1.0], [0.0]])
    with pytest.raises(ValueError, match="converge; raise l2"):
        fit_bradley_terry(features, np.array([[0, 1]] * 5), l2=0.0)


def test_a_standardised_reward_and_the_world_that_pays_it(desk):
    reward = desk.standardised(desk.gold)
    assert desk.ref @ reward == pytest.approx(0, abs=1e-12)
    assert desk.ref @ reward**2 == pytest.approx(1, abs=1e-12)
    assert desk.sd(3 * reward - 1) == pytest.approx(3, abs=1e-12)
    world = desk.with_reward(reward)
    for leaf in (0, 17, desk.ref.size - 1):
        kept = desk.responses.mask[leaf] > 0
        reply = desk.responses.tokens[leaf][kept].tolist()
        assert world.score([[0]], [reply])[0] == reward[leaf]


def test_resets_of_the_reference_are_a_smaller_beta(desk):
    p = desk.ref
    for _ in range(3):
        p = tilted(p, desk.proxy, beta=0.6)
    np.testing.assert_allclose(p, desk.optimum(desk.proxy, beta=0.2), atol=1e-14)
    never = np.where(np.arange(p.size) == 5, 0.0, p)  # what the reference never says stays so
    assert tilted(never, desk.proxy, beta=1e-4)[5] == 0
    assert tilted(never, desk.proxy, beta=1e-4).sum() == pytest.approx(1)


def test_the_log_ratios_of_a_reply_add_up_to_its_penalty(desk):
    best = optimum.soft_optimum(desk.tree, desk.ref_log_probs, desk.proxy, kl_coef=0.5)
    p = desk.optimum(desk.proxy, beta=0.5)
    for reply, n_tokens in (("ANS DET", 3), ("ANS DET POL", 3), ("", 1)):  # an EOS, where it fits
        ratios, leaf = desk.log_ratios(best.log_probs, reply), desk.leaf(reply)
        assert ratios.shape == (n_tokens,)
        assert ratios.sum() == pytest.approx(np.log(p[leaf] / desk.ref[leaf]), abs=1e-12)


def test_gold_along_the_optima_of_a_reward(desk):
    betas = np.geomspace(10, 0.02, 12)
    found = desk.gold_along(desk.proxy, betas)
    ends = [desk.describe(desk.optimum(desk.proxy, beta=beta)) for beta in betas]
    np.testing.assert_allclose(found["gold"], [row["gold"] for row in ends], atol=1e-12)
    assert (found["last"], found["last_kl"]) == (ends[-1]["gold"], ends[-1]["kl_seq"])
    assert (np.diff(found["kl_seq"]) > 0).all()
    assert found["peak"] == found["gold"].max() > found["last"]  # the proxy is over-optimised
    assert found["kl_seq"][found["gold"].argmax()] == found["peak_kl"]
    honest = desk.gold_along(desk.gold, betas)
    assert honest["peak"] == honest["last"] <= desk.gold.max()
