"""Sampling draws from the distribution it says, stops where it says, and can be repeated."""

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, Letters, make_ids, make_params, sampled
from tolerances import CHI_SQUARE_P, CHI_SQUARE_Z, KV_CACHE, LOOPS, assert_close

from minirlhf.nn import sampling
from minirlhf.nn.heads import VOCABULARY_PIECE, logits_forward
from minirlhf.nn.sampling import Sampling, draw_tokens, generate, next_logits, sampling_logprobs
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.train.batches import pad_batch
from minirlhf.train.policy import policy_forward
from minirlhf.train.rollout import score_rollout
from minirlhf.train.settings import PPOConfig

PARAMS = make_params(seed=3, heads=())
STOP, PAD = Letters.eos, Letters.pad
ALMOST_1 = np.nextafter(1.0, 0.0)


class Coins:
    """Stands for a Generator: hands out uniforms that were fixed beforehand."""

    def __init__(self, u):
        self.u = np.asarray(u, dtype=np.float64)

    def random(self, shape):
        assert self.u.shape == shape
        return self.u


def prompts_of(ids, dtype=np.float64, pad_id=PAD):
    return pad_batch(ids, [[]] * len(ids), pad_id=pad_id, config=CONFIG, dtype=dtype)


def run(ids, *, rng, max_new=5, params=PARAMS, stop_id=STOP, pad_id=PAD, **settings):
    """Response tokens and mask, (B, max_new) each."""
    batch = prompts_of(ids, pad_id=pad_id)
    out = generate(
        params["transformer"],
        tokens=batch.tokens,
        mask=batch.mask,
        config=CONFIG,
        max_new=max_new,
        stop_id=stop_id,
        pad_id=pad_id,
        rng=rng,
        sampling=Sampling(**settings),
    )
    P = batch.prompt_len
    assert out.tokens.shape == out.mask.shape == (len(ids), P + max_new)
    assert_close(out.tokens[:, :P], batch.tokens, 0.0)  # the prompt stands as given
    assert_close(out.mask[:, :P], batch.mask, 0.0)
    return out.tokens[:, P:], out.mask[:, P:]


# -- frequencies ---------------------------------------------------------------------------------


def assert_drawn_from(ids, probs):
    """Pearson's chi-square of counts against probabilities; refuses below CHI_SQUARE_P."""
    counts = np.bincount(ids, minlength=len(probs))
    assert (counts[probs == 0] == 0).all()
    expected = len(ids) * probs
    cells = expected >= 5  # the rest is one cell
    observed = np.append(counts[cells], counts[~cells].sum())
    expected = np.append(expected[cells], expected[~cells].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    df = len(expected) - 1
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    # Wilson & Hilferty 1931: the cube root of chi-square / df is nearly normal.
    limit = df * (1 - 2 / (9 * df) + CHI_SQUARE_Z * math.sqrt(2 / (9 * df))) ** 3
    assert chi_square < limit, f"chi-square {chi_square:.1f} > {limit:.1f}, p < {CHI_SQUARE_P}"


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.7},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_generate_draws_what_the_scorer_scores(settings):
    """First and second tokens of 6,000 responses, against the training forward's logits."""
    n, (prompt,) = 6000, make_ids([3])
    tokens, mask = run([prompt] * n, rng=np.random.default_rng(0), max_new=2, **settings)
    vocabulary = [[v] for v in range(CONFIG.vocab_size)]
    batch = pad_batch([prompt] * len(vocabulary), vocabulary, pad_id=PAD, config=CONFIG)
    h = policy_forward(PARAMS, batch=batch, config=CONFIG)[0].logits[0, 0]
    assert_drawn_from(tokens[:, 0], np.exp(sampling_logprobs(h, **settings)))
    # The second token after the most frequent first one, through the KV cache.
    first = np.bincount(tokens[:, 0][tokens[:, 0] != STOP]).argmax()
    after = pad_batch([[*prompt, int(first)]], [[0]], pad_id=PAD, config=CONFIG)
    h = policy_forward(PARAMS, batch=after, config=CONFIG)[0].logits[0, 0]
    second = tokens[:, 1][tokens[:, 0] == first]
    assert len(second) > 500 and mask[tokens[:, 0] == first, 1].all()
    assert_drawn_from(second, np.exp(sampling_logprobs(h, **settings)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_without_cuts_the_sampler_and_the_training_forward_agree(temperature):
    """top_k 0, top_p 1, as in PPO: exactly the log-probs that the ratio is made of."""
    logits = 3 * np.random.default_rng(0).standard_normal((4, 11))
    assert_close(
        sampling_logprobs(logits, temperature=temperature),
        log_softmax(logits, temperature=temperature),
    )


@pytest.mark.parametrize("wrong", [{"temperature": 1.3}, {"top_k": 9}])
def test_the_chi_square_test_sees_a_wrong_setting(wrong):
    logits = np.random.default_rng(0).standard_normal(11)
    u = np.random.default_rng(1).random((6000, 1))
    probs = np.exp(sampling_logprobs(logits))
    right, other = (
        draw_tokens(np.repeat(p[None], len(u), axis=0), u)
        for p in (probs, np.exp(sampling_logprobs(logits, **wrong)))
    )
    assert_drawn_from(right, probs)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_drawn_from(other, probs)


# -- one draw ------------------------------------------------------------------------------------


@st.composite
def distributions(draw):
    """(B, V) with some exact zeros, normalised or not."""
    B, V = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    probs = rng.random((B, V)) ** draw(st.sampled_from([1, 20])) * (rng.random((B, V)) < 0.6)
    probs[np.arange(B), rng.integers(V, size=B)] = 0.3
    return (draw(st.sampled_from([1.0, 1e-20, 7.0])) * probs).astype(
        draw(st.sampled_from([np.float32, np.float64]))
    )


LARGE_FROM = st.sampled_from([1, 4096])  # a vocabulary of more tokens is drawn from in two steps


@given(distributions(), st.sampled_from([0.0, 1e-300, 0.3, 0.5, ALMOST_1, 1.0]), LARGE_FROM)
def test_a_token_of_probability_0_is_never_drawn(probs, u, large_from):
    """Nor one beyond the vocabulary, should a coin just below 1 be rounded up to 1."""
    with mock.patch.object(sampling, "VOCABULARY_PIECE", large_from):
        ids = draw_tokens(probs, np.full((len(probs), 1), u))
    assert (probs[np.arange(len(probs)), ids] > 0).all()


@given(distributions(), st.integers(0, 99), LARGE_FROM)
def test_the_draw_is_the_inverse_of_the_cumulative_distribution(probs, seed, large_from):
    u = np.random.default_rng(seed).random((len(probs), 1))
    expected = []
    for row, coin in zip(probs.astype(np.float64), u[:, 0], strict=True):
        masses = np.cumsum(row)  # the first token at which the mass exceeds the coin
        expected.append(next(i for i, mass in enumerate(masses) if mass > coin * masses[-1]))
    with mock.patch.object(sampling, "VOCABULARY_PIECE", large_from):
        assert draw_tokens(probs, u).tolist() == expected


def test_a_large_vocabulary_is_read_and_drawn_from_in_pieces():
    """The same logits and tokens as in one piece; two steps of the draw round by 1e-16."""
    rng, V = np.random.default_rng(0), 2 * VOCABULARY_PIECE + 7
    h, w = rng.standard_normal((20, 6)), rng.standard_normal((V, 6))
    assert_close(next_logits(h, w), logits_forward(h, w)[0])
    probs, u = np.exp(next_logits(h, w)), rng.random((20, 1))
    probs[:, ::3] = 0.0
    cdf = probs.cumsum(axis=1)
    assert draw_tokens(probs, u).tolist() == (cdf <= u * cdf[:, -1:]).sum(axis=1).tolist()


def test_the_ends_of_the_coin():
    probs = np.array([[0.0, 0.5, 0.5, 0.0]])
    for u, token in [(0.0, 1), (0.4999, 1), (0.5, 2), (ALMOST_1, 2)]:
        assert draw_tokens(probs, np.array([[u]])).tolist() == [token]


# -- cuts ----------------------------------------------------------------------------------------

# Probabilities .4, .3, .2, .1 in a scrambled order.
P4 = np.array([0.2, 0.4, 0.1, 0.3])


def kept(logits, **settings):
    return np.flatnonzero(np.isfinite(sampling_logprobs(logits, **settings))).tolist()


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.39}, [1]),  # .4 holds .39 already
        ({"top_p": 0.41}, [1, 3]),  # .4 does not, .4 + .3 does
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [0, 1, 3]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [1]),  # never nobody
        ({"top_k": 3, "top_p": 0.75}, [1, 3]),  # of .44, .33, .22: .44 + .33 = .77
    ],
)
def test_top_k_and_top_p_keep_the_most_likely(settings, tokens):
    assert kept(np.log(P4), **settings) == tokens
    logp = sampling_logprobs(np.log(P4), **settings)
    expected = P4[tokens] / P4[tokens].sum()  # cut and renormalised
    assert_close(np.exp(logp[tokens]), expected)
    rows = sampling_logprobs(np.log(np.stack([P4, P4[::-1]])), **settings)  # row by row
    assert_close(np.exp(rows[1]), np.exp(logp)[::-1])


def test_the_temperature_comes_before_the_cut():
    # At temperature 2 probabilities are proportional to sqrt(p): .632, .548, .447, .316 of 1.943,
    # so the two largest hold .607 and not .7.
    assert kept(np.log(P4), temperature=2.0, top_p=0.65) == [0, 1, 3]
    assert kept(np.log(P4), temperature=1.0, top_p=0.65) == [1, 3]


def test_ties_with_the_last_one_kept_are_kept():
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.2]))
    assert kept(logits, top_k=2) == [0, 1, 2, 3]
    assert kept(logits, top_p=0.5) == [0, 1, 2, 3]


def test_temperature_0_is_greedy():
    logits = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0]])
    logp = sampling_logprobs(logits, temperature=0.0)
    assert np.exp(logp).tolist() == [[0, 1, 0], [1, 0, 0]]  # of a tie the first
    ids = make_ids((3, 1))
    greedy, _ = run(ids, rng=np.random.default_rng(0), temperature=0.0)
    other_coins, _ = run(ids, rng=np.random.default_rng(1), temperature=0.0)
    assert_close(greedy, other_coins, 0.0)
    cold, _ = run(ids, rng=np.random.default_rng(0), temperature=1e-4)
    assert_close(cold, greedy, 0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-40, 1e-46, 1e-300])
def test_a_temperature_near_0_is_greedy_too(temperature, dtype):
    """float32 takes 1e-46 for 0: (z - max) / 0 would be nan."""
    logits = np.array([[1.0, 3.0, 2.0], [-5.0, -7.0, -6.0]], dtype=dtype)
    for cuts in ({}, {"top_k": 2}, {"top_p": 0.5}):
        logp = sampling_logprobs(logits, temperature=temperature, **cuts)
        assert np.exp(logp).tolist() == [[0, 1, 0], [1, 0, 0]] and logp.dtype == dtype


def test_the_settings_of_a_sampler_have_their_defaults():
    logits = np.random.default_rng(0).standard_normal((3, 5))
    assert Sampling() == (1.0, 0, 1.0)
    assert_close(sampling_logprobs(logits, **Sampling()._asdict()), sampling_logprobs(logits), 0.0)
    ids = make_ids((3, 1))
    batch = prompts_of(ids)
    fixed = {"tokens": batch.tokens, "mask": batch.mask, "config": CONFIG, "max_new": 4}
    fixed |= {"stop_id": STOP, "pad_id": PAD}
    by_default = generate(PARAMS["transformer"], **fixed, rng=np.random.default_rng(0))
    as_run, _ = run(ids, rng=np.random.default_rng(0), max_new=4)
    assert_close(by_default.tokens[:, batch.prompt_len :], as_run, 0.0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_probs_are_normalised_in_the_dtype_of_the_logits(settings, dtype):
    logits = (30 * np.random.default_rng(0).standard_normal((5, 11)) + 1e4).astype(dtype)
    logp = sampling_logprobs(logits, **settings)
    assert logp.dtype == dtype
    assert_close(np.exp(logp).sum(axis=-1), np.ones(5), 1e-6)
    assert sampling_logprobs(logits, temperature=0.0).dtype == dtype


def test_a_logit_of_minus_infinity_is_never_drawn():
    logits = np.array([[0.0, -np.inf, 1.0]])
    for settings in SETTINGS:
        assert np.exp(sampling_logprobs(logits, **settings))[0, 1] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": t} for t in (-1.0, math.inf, math.nan)),
        *({"top_p": p} for p in (0.0, 1.5, math.nan)),
        {"top_k": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected a finite temperature >= 0, top_k >= 0"):
        sampling_logprobs(np.zeros(3), **wrong)


# -- responses -----------------------------------------------------------------------------------


def many(n=60, seed=0, **settings):
    """Responses to prompts of several lengths; some stop early, some never."""
    lengths = np.random.default_rng(seed).integers(1, 7, size=n)
    ids = make_ids(lengths, seed=seed)
    return ids, *run(ids, rng=np.random.default_rng(seed + 1), **settings)


def test_the_stop_token_is_counted_once_and_ends_the_mask():
    _, tokens, mask = many()
    lengths = mask.sum(axis=1).astype(int)
    assert lengths.min() == 1 and lengths.max() == 5  # all kinds are there
    ended = 0
    for row, length in zip(tokens, lengths, strict=True):
        assert (row[length:] == PAD).all()
        assert (row[: length - 1] != STOP).all()
        ended += row[length - 1] == STOP
        assert length == 5 or row[length - 1] == STOP
    assert_close(mask, (np.arange(5) < lengths[:, None]).astype(float), 0.0)
    assert 5 < ended < 60
    assert ((tokens == STOP) & (mask > 0)).sum() == ended


def test_padding_may_be_the_stop_token_or_any_other():
    """What stands behind the stop token is nobody's business: only the mask says what is real."""
    _, tokens, mask = many()
    for pad_id in (STOP, 0):
        _, other_tokens, other_mask = many(pad_id=pad_id)
        assert_close(other_mask, mask, 0.0)
        assert_close(np.where(mask > 0, other_tokens, 0), np.where(mask > 0, tokens, 0), 0.0)
        assert (other_tokens[mask == 0] == pad_id).all()


def test_a_response_depends_on_its_own_coins_only():
    ids, lengths_of_others = make_ids((3, 1, 5, 2)), (1, 6)
    coins = np.random.default_rng(0).random((4, 6))
    tokens, mask = run(ids, rng=Coins(coins), max_new=6)
    assert len({tuple(row) for row in tokens}) >= 3  # or anything would pass
    for row in range(4):
        for extra in lengths_of_others:  # alone, and with a mate that moves the padding
            mates = [ids[row], *make_ids([extra], seed=9)]
            u = np.stack([coins[row], np.full(6, 0.5)])
            with_mate, mate_mask = run(mates, rng=Coins(u), max_new=6)
            assert_close(with_mate[0], tokens[row], 0.0)
            assert_close(mate_mask[0], mask[row], 0.0)
        alone, _ = run([ids[row]], rng=Coins(coins[row : row + 1]), max_new=6)
        assert_close(alone[0], tokens[row], 0.0)


def test_all_coins_are_drawn_at_once():
    """So the generator is in the same state however soon everybody has stopped."""
    ids = make_ids((2, 3))
    short, long = np.random.default_rng(0), np.random.default_rng(0)
    run(ids, rng=short, max_new=4)
    long.random((2, 4))
    assert short.random() == long.random()


@pytest.mark.parametrize("every", [1, 2, 10**9])
def test_stopping_early_changes_nothing(every, monkeypatch):
    ids = make_ids([2] * 6)
    u = np.random.default_rng(0).random((6, 7))
    found = [run(ids, rng=Coins(u), max_new=7)]
    eager = make_params(seed=3, heads=())
    eager["transformer"]["ln_f"]["bias"] += 40 * eager["transformer"]["wte"][STOP]  # stops at once
    found.append(run(ids, rng=Coins(u), max_new=7, params=eager))
    assert (found[1][1].sum(axis=1) == 1).all()
    monkeypatch.setattr(sampling, "ALIVE_CHECK_EVERY", (every, every))
    for params, (tokens, mask) in zip((PARAMS, eager), found, strict=True):
        other_tokens, other_mask = run(ids, rng=Coins(u), max_new=7, params=params)
        assert_close(other_tokens, tokens, 0.0)
        assert_close(other_mask, mask, 0.0)


def test_a_batch_that_has_stopped_costs_no_more_steps(monkeypatch):
    steps = []
    decode_step = sampling.decode_step
    monkeypatch.setattr(
        sampling, "decode_step", lambda *a, **k: steps.append(1) or decode_step(*a, **k)
    )
    eager = make_params(seed=3, heads=())
    eager["transformer"]["ln_f"]["bias"] += 40 * eager["transformer"]["wte"][STOP]
    run(make_ids([2] * 6), rng=np.random.default_rng(0), max_new=8, params=eager)
    assert len(steps) == 0
    run(make_ids([2] * 6), rng=np.random.default_rng(0), max_new=8, stop_id=-1)
    assert len(steps) == 7  # nobody stops: all but the last token are looked at


@pytest.mark.parametrize("max_new", [1, 2, 7])
def test_max_new(max_new):
    tokens, mask = run(make_ids((3, 2)), rng=np.random.default_rng(0), max_new=max_new, stop_id=-1)
    assert tokens.shape == (2, max_new) and mask.all()


def test_generate_refuses():
    ids = make_ids((3, 2))
    for max_new in (0, -1):
        with pytest.raises(ValueError, match=f"expected max_new >= 1; got {max_new}"):
            run(ids, rng=np.random.default_rng(0), max_new=max_new)
    with pytest.raises(ValueError, match=r"prompt \+ max_new <= 12, the model's positions; got 13"):
        run(ids, rng=np.random.default_rng(0), max_new=10)
    run(ids, rng=np.random.default_rng(0), max_new=9)  # 3 + 9 just fit
    batch = prompts_of(ids)
    for mask in (batch.mask[:, ::-1].copy(), np.array([[1.0, 1, 1], [0, 0, 0]])):
        with pytest.raises(ValueError, match="expected prompts padded on the left"):
            generate(
                PARAMS["transformer"],
                tokens=batch.tokens,
                mask=mask,
                config=CONFIG,
                max_new=2,
                stop_id=STOP,
                pad_id=PAD,
                rng=np.random.default_rng(0),
            )


# -- as PPO uses it ------------------------------------------------------------------------------


def test_sampled_and_scored_log_probs_agree():
    """The old log-probs of the training forward are those of the tokens that were drawn."""
    samples = sampled(PARAMS, ["abc", "d", "gg", ""], seed=0, max_tokens=5, temperature=0.7)
    out, _ = policy_forward(PARAMS, batch=samples.batch, config=CONFIG, temperature=0.7)
    for row, ids in enumerate(samples.response_ids):
        for t, token in enumerate(ids):
            prefix = [*samples.prompt_ids[row], *ids[:t]]
            one = pad_batch([prefix], [[token]], pad_id=PAD, config=CONFIG)
            logits = policy_forward(PARAMS, batch=one, config=CONFIG)[0].logits[0, 0]
            expected = sampling_logprobs(logits, temperature=0.7)[token]
            assert_close(out.logp[row, t], expected, KV_CACHE[np.float64])
    # Ids, texts and the batch speak of the same responses.
    mask = samples.batch.response_mask > 0
    for row, ids in enumerate(samples.response_ids):
        assert samples.batch.responses[row][mask[row]].tolist() == ids
        assert samples.responses[row] == Letters().decode(ids)
    assert mask.any(axis=0).all() and (samples.batch.mask > 0).any(axis=0).all()  # trimmed


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_hidden_states_of_the_sampler_are_those_of_the_training_forward(dtype, monkeypatch):
    """So PPO need not run the policy again; replies that stop leave the batch on the way."""
    monkeypatch.setattr(sampling, "ALIVE_CHECK_EVERY", (1, 1))
    monkeypatch.setattr(sampling, "DROP_BELOW", 1.0)
    policy, reference = (make_params(seed=s, dtype=dtype) for s in (3, 4))
    samples = sampled(policy, ["abc", "d", "ga", "bbbb", "", "ce"] * 6, seed=0)
    lengths = {len(ids) for ids in samples.response_ids}
    assert len(lengths) > 3 and samples.hidden.shape[:2] == samples.batch.responses.shape

    def scored(samples):
        return score_rollout(
            policy,
            reference,
            samples,
            score=lambda samples: np.zeros(len(samples.responses)),
            config=CONFIG,
            settings=PPOConfig(micro_batch_size=5, kl_mode="loss_full"),
        )

    quick, anew = scored(samples), scored(samples._replace(hidden=None))
    mask = samples.batch.response_mask > 0
    for name in ("old_logp", "ref_logp", "ref_logits", "values", "entropy", "kl_full"):
        got, expected = getattr(quick, name)[mask], getattr(anew, name)[mask]
        assert got.dtype == dtype
        assert_close(got, expected, KV_CACHE[dtype])


def test_log_probs_of_a_distribution_sum_to_1_over_all_responses():
    """Every response of up to two tokens, the stop token included: sum_y pi(y|x) = 1."""
    (prompt,) = make_ids([2])
    V = CONFIG.vocab_size
    responses = [[STOP]] + [[a, b] for a in range(V) if a != STOP for b in range(V)]
    batch = pad_batch([prompt] * len(responses), responses, pad_id=PAD, config=CONFIG)
    logp = policy_forward(PARAMS, batch=batch, config=CONFIG)[0].logp
    total = np.exp((logp * batch.response_mask).sum(axis=1)).sum()
    assert total == pytest.approx(1.0, abs=100 * LOOPS)
