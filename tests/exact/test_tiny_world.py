"""The support desk in eight tokens: its rewards, its chain, and the figures that are known of it.

The tables are those of EXPERIMENTS, made by another program; the reference is the chain itself.
Tilted moments are also computed here from (proxy, mass, gold) alone, without the tree.
"""

import math

import numpy as np
import pytest
from tolerances import CHI_SQUARE_P, CHI_SQUARE_Z, LOOPS, PRINTED, assert_close

from gao import fit_gao
from minirlhf.exact.enumeration import all_responses, response_logprobs
from minirlhf.exact.ground_truth import rectangle
from minirlhf.exact.optimum import evaluate_exactly, frontier_reward, soft_optimum
from minirlhf.exact.tiny import (
    ANS,
    CHAIN,
    DET,
    EOS,
    HED,
    MAX_TOKENS,
    POL,
    PROXY_BIAS,
    PROXY_WEIGHTS,
    REF,
    SAL,
    TOKENS,
    UNS,
    gold_reward,
    make_tiny_world,
    proxy_reward,
    sample_chain,
    token_counts,
)
from other_optima import best_of_n

WORLD = make_tiny_world(n_demonstrations=2_000, rng=np.random.default_rng(0))
TREE, LEAVES = WORLD.tree, all_responses(WORLD.tree)
LOG_REF = WORLD.demonstrator
REF_LOGP = response_logprobs(TREE, LOG_REF)
REF_PROBS = np.exp(REF_LOGP)
LENGTHS = (LEAVES.mask * (LEAVES.tokens != EOS)).sum(axis=1)  # EOS not counted


SIX_DIGITS = 2e-6  # the proxy's weights are rounded to 5e-7 each, and are multiplied by counts


def printed(value, expected):
    """`value` rounds to what is printed: the string says to how many digits."""
    digits = len(expected.partition(".")[2])
    assert abs(value - float(expected)) <= 0.5 * 10**-digits + LOOPS, f"{value} is not {expected}"


def ids(words):
    return [TOKENS.index(word) for word in words.split()]


def in_lists():
    """The replies as lists of ids."""
    lengths = LEAVES.mask.sum(axis=1).astype(int).tolist()
    return [y[:n] for y, n in zip(LEAVES.tokens.tolist(), lengths, strict=True)]


# -- the rewards ---------------------------------------------------------------------------------


def gold_of(reply):
    """The gold reward of one list of ids, clause by clause."""
    n = {token: reply.count(token) for token in range(len(TOKENS))}
    length = len(reply) - n[EOS]
    total = 0.0
    if n[ANS] >= 1:
        total += 1.5 - 0.15 * reply.index(ANS)
    total += 0.6 * min(n[DET], 2) + 0.3 * min(n[POL], 1)
    total -= 0.4 * n[HED] + 0.5 * n[SAL] + 1.5 * n[UNS] + 0.3 * n[REF]
    for before, token in zip(reply, reply[1:], strict=False):
        if token == before:
            total -= 0.35
    total -= 0.25 * max(length - 4, 0)
    total -= 0.5 * max(n[POL] - 1, 0) + 0.4 * max(n[ANS] - 1, 0)
    return total


def test_rewards_reply_by_reply():
    every = 7  # of 137,257 replies
    replies = in_lists()[::every]
    weights = [0.0, 0.659563, 0.258758, -0.435141, -0.868750, -1.127621, -0.685762, -2.641993]
    assert_close(WORLD.gold[::every], [gold_of(reply) for reply in replies])
    proxy = [sum(weights[token] for token in reply) - 0.046288 for reply in replies]
    assert_close(WORLD.rewards[::every], proxy)
    assert_close(PROXY_WEIGHTS, weights, 0.0)
    assert PROXY_BIAS == -0.046288


@pytest.mark.parametrize(
    ("words", "gold"),
    [
        ("ANS DET POL DET", 3.0),  # 1.5 + 2 * .6 + .3
        ("ANS DET POL DET EOS", 3.0),  # EOS counts for nothing
        ("EOS", 0.0),
        ("ANS", 1.5),
        ("POL ANS", 1.65),  # .3 + 1.5 - .15
        ("POL POL", -0.55),  # .3 - .35 - .5
        ("DET DET DET", 0.5),  # 1.2 - 2 * .35
        ("HED SAL REF UNS", -2.7),  # no reward, so no delay
        ("ANS ANS ANS ANS ANS ANS", -2.75),  # 1.5 - 5 * .35 - 2 * .25 - 5 * .4
        ("REF ANS DET ANS DET POL", 1.65),  # 1.5 - .15 + 1.2 + .3 - .3 - 2 * .25 - .4
    ],
)
def test_gold_by_hand(words, gold):
    assert gold_reward(*rectangle([ids(words)]))[0] == pytest.approx(gold, abs=LOOPS)
    assert gold_of(ids(words)) == pytest.approx(gold, abs=LOOPS)
    # whatever stands behind it in the batch
    tokens, mask = rectangle([ids(words), [UNS] * 6])
    assert gold_reward(tokens, mask)[0] == pytest.approx(gold, abs=LOOPS)
    for junk in range(len(TOKENS)):
        tokens[0][mask[0] == 0] = junk
        assert gold_reward(tokens, mask)[0] == pytest.approx(gold, abs=LOOPS)
    assert proxy_reward(tokens, mask)[0] == pytest.approx(
        sum(PROXY_WEIGHTS[i] for i in ids(words)) + PROXY_BIAS
    )


def test_the_best_replies():
    best = WORLD.gold.max()
    assert best == pytest.approx(3.0, abs=LOOPS)
    winners = [in_lists()[i] for i in np.flatnonzero(WORLD.gold > best - 1e-9)]
    assert ids("ANS DET POL DET EOS") in winners
    assert all(reply[0] == ANS and sorted(reply[:4]) == [ANS, DET, DET, POL] for reply in winners)
    top = int(WORLD.rewards.argmax())
    assert in_lists()[top] == [ANS] * 6
    printed(WORLD.rewards[top], "3.911")
    printed(WORLD.gold[top], "-2.75")
    assert (WORLD.rewards > WORLD.rewards[top] - 1e-9).sum() == 1


def test_counts_and_rectangles():
    tokens, mask = rectangle([[ANS], [DET, DET, EOS]])
    assert tokens.tolist() == [[ANS, 0, 0], [DET, DET, EOS]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    counts = token_counts(tokens, mask)
    assert counts.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0], [1, 0, 2, 0, 0, 0, 0, 0]]


# -- the chain -----------------------------------------------------------------------------------


def test_the_chain_is_the_table_of_logits():
    start = [-4, 2, 0, 1, 0, -1.5, -0.5, -2.5]
    after_ans = [1.5, -1.0, 1.2, 0.6, -0.3, -1.2, -1.5, -2.5]
    after_pol = [0.8, 1.0, 0.8, -1.0, -0.3, -1.2, -1.5, -2.5]
    other = [1.2, 0, 0.8, 0.4, -0.3, -1.2, -1.5, -2.5]
    table = np.array([start, after_ans, other, after_pol, other, other, other, other])
    assert_close(CHAIN, table - np.log(np.exp(table).sum(axis=1, keepdims=True)))
    assert_close(LOG_REF, CHAIN[TREE.token], 0.0)
    for y in (0, 1, 1000, 137_256):
        before = [EOS, *LEAVES.tokens[y]]
        n = int(LEAVES.mask[y].sum())
        logp = sum(CHAIN[a, b] for a, b in zip(before[:n], before[1 : n + 1], strict=True))
        assert REF_LOGP[y] == pytest.approx(logp, rel=LOOPS)


def test_under_the_reference():
    value = evaluate_exactly(TREE, LOG_REF, LOG_REF, WORLD.gold, kl_coef=1.0)
    assert REF_PROBS.sum() == pytest.approx(1.0, abs=LOOPS)
    printed(REF_PROBS @ LENGTHS, "2.65")
    printed(value.entropy_seq, "5.396")
    printed(value.reward, "1.057")
    printed(math.sqrt(value.flatness), ".887")  # at the reference: the variance of the reward
    counts = REF_PROBS @ token_counts(LEAVES.tokens, LEAVES.mask)
    figures = {
        ANS: ".8781", DET: ".7317", POL: ".5507", HED: ".2673", SAL: ".0946", REF: ".1039",
        UNS: ".0274",
    }  # fmt: skip
    for token, expected in figures.items():
        printed(counts[token], expected)
    mean, gold_mean = REF_PROBS @ WORLD.rewards, REF_PROBS @ WORLD.gold
    sd = math.sqrt(REF_PROBS @ (WORLD.rewards - mean) ** 2)
    assert mean == pytest.approx(0.0, abs=SIX_DIGITS)
    assert sd == pytest.approx(1.0, abs=SIX_DIGITS)
    gold_sd = math.sqrt(REF_PROBS @ (WORLD.gold - gold_mean) ** 2)
    covariance = REF_PROBS @ ((WORLD.rewards - mean) * (WORLD.gold - gold_mean))
    printed(covariance / (sd * gold_sd), ".764")


def chi_square_test(observed, expected):
    """Pearson's; the cells that expect fewer than 5 are one cell. Wilson & Hilferty 1931."""
    cells = expected >= 5
    observed = np.append(observed[cells], observed[~cells].sum())
    expected = np.append(expected[cells], expected[~cells].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    df = len(expected) - 1
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    limit = df * (1 - 2 / (9 * df) + CHI_SQUARE_Z * math.sqrt(2 / (9 * df))) ** 3
    assert chi_square < limit, f"chi-square {chi_square:.1f} > {limit:.1f}, p < {CHI_SQUARE_P}"


@pytest.mark.parametrize("max_tokens", [1, 2, 6])
def test_samples_of_the_chain_have_the_exact_frequencies(max_tokens):
    n = 40_000
    world = make_tiny_world(max_tokens=max_tokens, n_demonstrations=1, rng=np.random.default_rng(0))
    leaves = all_responses(world.tree)
    lengths = leaves.mask.sum(axis=1).astype(int).tolist()
    index = {
        tuple(y[:k]): i
        for i, (y, k) in enumerate(zip(leaves.tokens.tolist(), lengths, strict=True))
    }
    replies = sample_chain(n, max_tokens=max_tokens, rng=np.random.default_rng(1))
    observed = np.bincount([index[tuple(reply)] for reply in replies], minlength=len(index))
    expected = n * np.exp(response_logprobs(world.tree, world.demonstrator))
    chi_square_test(observed, expected)
    with pytest.raises(AssertionError, match="chi-square"):
        chi_square_test(observed, np.roll(expected, 1))  # it can tell


def test_a_seed_is_a_set_of_replies():
    first, again, other = (sample_chain(50, rng=np.random.default_rng(s)) for s in (0, 0, 1))
    assert first == again != other
    assert max(map(len, first)) == MAX_TOKENS


# -- the world -----------------------------------------------------------------------------------


def test_the_world_is_what_it_says():
    assert WORLD.tree.leaf_node.shape == (137_257,) and WORLD.tree.n_nodes == 19_608
    assert (WORLD.tokens, WORLD.stop_id, len(WORLD.tree.levels)) == (TOKENS, EOS, 6)
    assert TOKENS == ("EOS", "ANS", "DET", "POL", "HED", "SAL", "REF", "UNS")
    assert_close(WORLD.rewards, proxy_reward(LEAVES.tokens, LEAVES.mask), 0.0)
    assert_close(WORLD.gold, gold_reward(LEAVES.tokens, LEAVES.mask), 0.0)


def test_the_score_of_lists_is_the_reward_of_the_leaves():
    rows = np.random.default_rng(0).permutation(len(REF_LOGP))[:3000]
    replies = in_lists()
    scored = WORLD.score([WORLD.prompts[0]] * len(rows), [replies[i] for i in rows])
    assert_close(scored, WORLD.rewards[rows])
    assert_close(WORLD.score([[EOS]], [replies[5]]), WORLD.rewards[5:6])  # alone, without padding


def test_demonstrations_are_responses():
    assert len(WORLD.demonstrations) == 2000 and WORLD.prompts == [[EOS]]
    everything = {tuple(reply) for reply in in_lists()}
    for prompt, reply in WORLD.demonstrations:
        assert prompt == [EOS] and tuple(reply) in everything
    assert len({tuple(reply) for _, reply in WORLD.demonstrations}) > 300


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_smaller_world(max_tokens):
    world = make_tiny_world(
        max_tokens=max_tokens, n_demonstrations=50, rng=np.random.default_rng(0)
    )
    assert world.config.n_ctx - 1 == len(world.tree.levels) == max_tokens
    assert max(len(reply) for _, reply in world.demonstrations) == max_tokens
    assert world.demonstrator.shape == (world.tree.n_nodes, 8)
    assert np.exp(response_logprobs(world.tree, world.demonstrator)).sum() == pytest.approx(1.0)


# -- figures: the curve --------------------------------------------------------------------------


def tilted(beta):
    """KL, E proxy, E gold, H, E length, by one softmax over all replies."""
    z = REF_LOGP + WORLD.rewards / beta
    logp = z - z.max() - math.log(np.exp(z - z.max()).sum())
    p = np.exp(logp)
    return p @ (logp - REF_LOGP), p @ WORLD.rewards, p @ WORLD.gold, -(p @ logp), p @ LENGTHS


# beta: KL, E proxy, E gold, H, length
CURVE = {
    8: (".007", ".117", "1.136", "5.20", "2.62"),
    4: (".026", ".219", "1.202", "5.04", "2.61"),
    2: (".091", ".394", "1.308", "4.79", "2.61"),
    1.5: (".150", ".494", "1.362", "4.67", "2.64"),
    1: (".300", ".675", "1.439", "4.54", "2.76"),
    0.75: (".498", ".845", "1.480", "4.52", "2.93"),
    0.5: ("1.097", "1.203", "1.477", "4.68", "3.48"),
    0.35: ("2.378", "1.729", "1.325", "4.90", "4.40"),
    0.25: ("4.475", "2.347", ".995", "4.63", "5.35"),
    0.15: ("7.875", "3.014", ".258", "3.58", "5.91"),
    0.1: ("11.353", "3.436", "-.892", "2.67", "5.99"),
    0.05: ("17.335", "3.894", "-2.681", ".24", "6.00"),
}


@pytest.mark.parametrize("beta", CURVE)
def test_the_over_optimisation_curve(beta):
    kl_seq, proxy, gold, entropy, length = CURVE[beta]
    best = soft_optimum(TREE, LOG_REF, WORLD.rewards, kl_coef=beta)
    args = (TREE, best.log_probs, LOG_REF)
    value = evaluate_exactly(*args, WORLD.rewards, kl_coef=beta)
    printed(value.kl_seq, kl_seq)
    printed(value.reward, proxy)
    printed(evaluate_exactly(*args, WORLD.gold, kl_coef=beta).reward, gold)
    printed(value.entropy_seq, entropy)
    printed(evaluate_exactly(*args, LENGTHS, kl_coef=beta).reward, length)
    kl, r, _, h, _ = tilted(beta)
    assert_close([value.kl_seq, value.reward, value.entropy_seq], [kl, r, h])


@pytest.mark.parametrize(("beta", "J"), [(1, 0.375531), (0.5, 0.654675), (0.25, 1.228672)])
def test_the_optimum(beta, J):
    best = soft_optimum(TREE, LOG_REF, WORLD.rewards, kl_coef=beta)
    assert best.objective == pytest.approx(J, abs=SIX_DIGITS)


@pytest.mark.parametrize(
    ("beta", "words"),
    [(8, "ANS EOS"), (0.25, "ANS DET ANS DET ANS DET"), (0.1, "ANS ANS ANS ANS ANS ANS")],
)
def test_the_most_likely_reply(beta, words):
    best = soft_optimum(TREE, LOG_REF, WORLD.rewards, kl_coef=beta)
    y = int(response_logprobs(TREE, best.log_probs).argmax())
    assert LEAVES.tokens[y][: int(LEAVES.mask[y].sum())].tolist() == ids(words)


def bisect(f, low, high, steps=40):
    """Where the falling f crosses 0."""
    for _ in range(steps):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return middle


def test_where_gold_peaks_and_where_it_is_lost():
    betas = np.linspace(0.5, 0.75, 26)
    kl, _, gold, _, _ = np.array([tilted(beta) for beta in betas]).T
    top = int(gold.argmax())
    printed(gold[top], "1.492")
    assert betas[top] == pytest.approx(0.61, abs=0.011) and kl[top] == pytest.approx(0.74, abs=0.02)
    at_ref = REF_PROBS @ WORLD.gold
    beta = bisect(lambda b: at_ref - tilted(b)[2], 0.2, 0.4, steps=20)
    printed(beta, ".264")
    printed(tilted(beta)[0], "4.11")
    entropies = [tilted(beta)[3] for beta in (8, 0.75, 0.35, 0.05)]
    assert np.sign(np.diff(entropies)).tolist() == [-1, 1, -1]  # entropy alone is no alarm


def test_gao_on_the_curve():
    kl_seq, _, gold, _, _ = np.array([tilted(beta) for beta in CURVE]).T
    gain = gold - REF_PROBS @ WORLD.gold
    linear, log = (fit_gao(kl_seq, gain, law=law) for law in ("linear", "log"))
    for value, expected in zip(linear[:3], (".876", ".426", ".999"), strict=True):
        printed(value, expected)
    for value, expected in zip(log[:3], (".514", ".920", ".960"), strict=True):
        printed(value, expected)
    assert linear.peak_kl == pytest.approx(1.06, abs=PRINTED + 0.5e-2)  # of the rounded .876, .426


# -- figures: best of n --------------------------------------------------------------------------

# n: KL, log n - (n-1)/n, E proxy, E gold, gold of the tilt at that KL
DRAWS = {
    1: ("0", "0", "0", "1.057", "1.057"),
    2: (".192", ".193", ".531", "1.426", "1.390"),
    4: (".624", ".636", ".864", "1.604", "1.490"),
    8: ("1.172", "1.204", "1.111", "1.654", "1.471"),
    16: ("1.809", "1.835", "1.355", "1.616", "1.401"),
    64: ("3.170", "3.175", "1.837", "1.422", "1.207"),
    256: ("4.539", "4.549", "2.249", "1.165", ".984"),
    1024: ("5.907", "5.932", "2.591", ".913", ".730"),
    4096: ("7.153", "7.318", "2.835", ".703", None),
    16384: ("8.439", "8.704", "3.045", ".395", None),
}


@pytest.mark.parametrize("n", DRAWS)
def test_best_of_n(n):
    kl_seq, bound, proxy, gold, of_tilt = DRAWS[n]
    logp = best_of_n(REF_LOGP, WORLD.rewards, n=n)
    q = np.exp(logp)
    kl = float(q @ (logp - REF_LOGP))
    printed(kl, kl_seq)
    printed(math.log(n) - (n - 1) / n, bound)
    printed(q @ WORLD.rewards, proxy)
    printed(q @ WORLD.gold, gold)
    if of_tilt and n > 1:
        log_beta = bisect(lambda x: tilted(math.exp(x))[0] - kl, math.log(0.05), 5.0, steps=25)
        _, most, tilt_gold, _, _ = tilted(math.exp(log_beta))
        printed(tilt_gold, of_tilt)
        assert q @ WORLD.rewards < most and q @ WORLD.gold > tilt_gold  # less proxy, more gold


def test_a_point_of_the_frontier():
    value = frontier_reward(TREE, LOG_REF, WORLD.rewards, kl_seq=1.0969)
    printed(value, "1.203")  # beta = 0.5
