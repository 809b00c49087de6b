"""The columns of the final table, by hand; padding never enters one of them."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, Letters, make_batch, make_params, with_junk
from tiny_run import tiny_config, write_names

from minirlhf.runs import pipeline
from minirlhf.runs import session as session_module
from minirlhf.runs.config import TrainConfig
from minirlhf.runs.metrics import distinct_2, evaluate, repeated_bigram_share, response_metrics
from minirlhf.runs.session import Score
from minirlhf.train import rollout as rollout_module
from minirlhf.train.batches import pad_batch
from minirlhf.train.reward_model import RewardModel
from minirlhf.train.rollout import Rollout, Samples
from minirlhf.train.settings import PPOConfig
from minirlhf.worlds.world import World

EOS = Letters.eos
IDS = st.lists(st.integers(0, 3), max_size=8)


def scoring(world, mean=0.0, sd=1.0):
    return Score(world, RewardModel({}, None, mean, sd), {})


def make_world(**changes):
    prompts = ["abc", "d", "ga", "bb"]
    return World("letters", [("a", "b")], prompts, prompts, **changes)


# --- bigrams


@pytest.mark.parametrize(
    "ids, share",
    [
        ([], 0.0),
        ([5], 0.0),
        ([5, 5], 0.0),
        ([1, 2, 3, 4], 0.0),
        ([5, 5, 5], 0.5),  # 55 55
        ([1, 2, 1, 2, 1], 0.5),  # 12 21 12 21
        ([1, 2, 3, 1, 2, 4], 0.2),  # 12 23 31 12 24
    ],
)
def test_repeated_bigram_share(ids, share):
    assert repeated_bigram_share(ids) == pytest.approx(share)


@pytest.mark.parametrize(
    "responses, value",
    [
        ([], 0.0),
        ([[], [3]], 0.0),  # there is no bigram
        ([[1, 2, 3]], 1.0),
        ([[1, 2, 3], [1, 2]], 2 / 3),  # 12 23 | 12; not 31, which no response holds
        ([[4, 4, 4, 4], [4, 4]], 0.25),
    ],
)
def test_distinct_2(responses, value):
    assert distinct_2(responses) == pytest.approx(value)


@given(st.lists(IDS, max_size=5))
def test_bigram_counts_are_what_they_say(responses):
    pairs = [(a, b) for ids in responses for a, b in zip(ids, ids[1:], strict=False)]
    assert distinct_2(responses) == pytest.approx(len(set(pairs)) / len(pairs) if pairs else 0)
    for ids in responses:
        if len(ids) > 1:
            assert repeated_bigram_share(ids) == pytest.approx(1 - distinct_2([ids]))


# --- the table


def make_rollout(responses, **columns):
    """A rollout of given responses; each column is a list of rows, one number a token."""
    batch = pad_batch([[7, 1, 8]] * len(responses), responses, pad_id=10, config=CONFIG)
    mask = batch.response_mask
    texts = [Letters().decode(ids) for ids in responses]
    prompts = ["abc"] * len(responses)

    def padded(rows):
        out = np.zeros(mask.shape, np.float32)
        for row, values in zip(out, rows, strict=True):
            row[: len(values)] = values
        return with_junk(out, mask, junk=(np.nan, 1e30))

    zeros = [[0.0] * len(ids) for ids in responses]
    score = np.array(columns.pop("score", [0.0] * len(responses)))
    arrays = {name: padded(columns.get(name, zeros)) for name in Rollout._fields[1:7]}
    arrays["ref_logits"] = None
    samples = Samples(
        [[7, 1, 8]] * len(responses), responses, batch, prompts=prompts, responses=texts
    )
    return Rollout(samples, **arrays, score=score)


def test_every_column_by_hand():
    rollout = make_rollout(
        [[0, 1, 0, 1, EOS], [2, EOS], [3, 3, 3]],  # "abab.", "c.", and "ddd" which was cut off
        old_logp=[[-1.0, -2.0, -1.0, -1.0, -3.0], [-0.5, -0.5], [-1.0, -1.0, -4.0]],
        ref_logp=[[-2.0, -2.0, -2.0, -0.5, -3.0], [-1.5, -0.5], [-1.0, -2.0, -1.0]],
        kl_full=[[0.1, 0.2, 0.3, 0.0, 0.0], [0.5, 0.0], [0.2, 0.2, 0.2]],
        entropy=[[1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0], [3.0, 3.0, 3.0]],
        score=[1.0, -1.0, 1.5],
    )
    found = response_metrics(rollout, scoring(make_world()), stop_id=EOS)
    assert found == pytest.approx(
        {
            "proxy": 0.5,
            "gold": math.nan,
            "reward": math.nan,
            "kl_seq": (1.5 + 1.0 - 2.0) / 3,  # 1 + 0 + 1 - .5 + 0 | 1 + 0 | 0 + 1 - 3
            "kl_full_seq": (0.6 + 0.5 + 0.6) / 3,
            "entropy": (5 * 1.0 + 2 * 2.0 + 3 * 3.0) / 10,
            "length": 10 / 3,  # the stop token is one
            "distinct_2": 3 / 5,  # ab ba ab | none in "c" | dd dd: the stop token makes none
            "repeated_bigrams": (1 / 3 + 0 + 1 / 2) / 3,
            "ended": 2 / 3,
        },
        nan_ok=True,
        rel=1e-6,
    )


def test_gold_and_the_users_reward_are_means_over_responses():
    rollout = make_rollout([[0, 1, EOS], [2, EOS]])
    world = make_world(
        gold=lambda prompt, response: len(prompt) + 10 * len(response),
        reward=lambda text: text.count("c"),
    )
    rollout = rollout._replace(score=np.array([-1.0, 0.5]))  # of the rewards 0 and 3
    found = response_metrics(rollout, scoring(world, 2.0, 2.0), stop_id=EOS)
    assert world.golds(rollout.samples.prompts, rollout.samples.responses) == [23.0, 13.0]
    assert found["gold"] == 18.0
    assert found["reward"] == 1.5


def test_the_users_reward_is_asked_once_a_reply(tmp_path):
    """It may be slow. The table's mean is that of what it answered."""
    config = tiny_config(
        tmp_path / "run",
        corpus=write_names(tmp_path / "names.txt"),
        reward="minirlhf.worlds.rewards:vowel_share",
    )
    run, answers = session_module.open_session(config), []
    reward = run.world.reward

    def counted(*replies):
        answers.extend(reward(*replies))
        return answers[-len(replies[0]) :]

    run.world = dataclasses.replace(run.world, reward=counted)
    reference = pipeline.reference_stage(run)
    score = run.score_with(pipeline.reward_stage(run, reference))
    answers.clear()
    head = {"w": np.zeros((8, 1), np.float32), "b": np.zeros(1, np.float32)}
    metrics, _ = evaluate(run, {**reference, "value_head": head}, reference, score)
    assert len(answers) == config.eval_prompts
    assert metrics["reward"] == pytest.approx(np.mean(answers), abs=1e-6)


@pytest.mark.parametrize("size, rows", [(0, {4}), (3, {2}), (1, {1})])
def test_micro_batches_bound_its_memory_too(monkeypatch, size, rows):
    seen, original = set(), rollout_module.policy_forward

    def look(params, *, batch, **constants):
        seen.add(batch.tokens.shape[0])
        return original(params, batch=batch, **constants)

    monkeypatch.setattr(rollout_module, "policy_forward", look)
    policy = make_params(seed=1, dtype=np.float32)
    evaluated(policy, {"transformer": policy["transformer"]}, micro_batch_size=size)
    assert seen == rows


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=4))
def test_padding_never_enters(responses):
    """`make_rollout` fills the padding with nan and 1e30; batch mates only make more of it."""
    rng = np.random.default_rng(0)
    names = ("old_logp", "ref_logp", "values", "entropy", "kl_full")
    columns = {n: [rng.standard_normal(len(ids)).tolist() for ids in responses] for n in names}
    score = scoring(make_world())
    together = response_metrics(make_rollout(responses, **columns), score, stop_id=EOS)
    alone = [
        response_metrics(
            make_rollout([ids], **{n: [column[i]] for n, column in columns.items()}),
            score,
            stop_id=EOS,
        )
        for i, ids in enumerate(responses)
    ]
    for name in ("kl_seq", "kl_full_seq", "length", "repeated_bigrams", "ended"):
        assert together[name] == pytest.approx(np.mean([row[name] for row in alone]), abs=1e-6)
    lengths = [len(ids) for ids in responses]
    entropy = np.average([row["entropy"] for row in alone], weights=lengths)
    assert together["entropy"] == pytest.approx(entropy, abs=1e-6)


# --- sampling for it


class Lengths(session_module.Score):
    """The score of a response is its length."""

    def __call__(self, samples):
        return np.array([float(len(ids)) for ids in samples.response_ids])


def evaluated(policy, reference, *, seed=0, prompts=("abc", "d", "ga", "bbbb"), **ppo):
    config = TrainConfig(
        seed=seed, eval_prompts=len(prompts), ppo=PPOConfig(temperature=0.8, **ppo)
    )
    world = World(
        *("letters", [("a", "b")], list(prompts), list(prompts)),
        gold=lambda prompt, response: response.count("a"),
        max_prompt_tokens=6,
        max_response_tokens=6,
    )
    session = session_module.Session(config, world, Letters(), {})
    session.gpt = CONFIG
    return evaluate(session, policy, reference, Lengths(world, RewardModel({}, CONFIG), {}))


def test_two_policies_get_the_same_coins():
    """So equal policies say the same, and what differs is never the luck of one of them."""
    one = make_params(seed=1, dtype=np.float32)
    reference = {"transformer": make_params(seed=2, dtype=np.float32)["transformer"]}
    metrics, samples = evaluated(one, reference)
    again, same = evaluated(make_params(seed=1, dtype=np.float32), reference)
    assert samples.response_ids == same.response_ids
    assert metrics == pytest.approx(again, nan_ok=True)
    as_reference = {**reference, "value_head": one["value_head"]}
    theirs, other = evaluated(as_reference, reference)
    assert other.response_ids != samples.response_ids  # they are two policies
    assert theirs["kl_seq"] == theirs["kl_full_seq"] == 0.0
    assert metrics["kl_full_seq"] > 0
    assert evaluated(one, reference, seed=1)[1].response_ids != samples.response_ids


def test_it_scores_what_it_sampled():
    policy = make_params(seed=1, dtype=np.float32)
    metrics, samples = evaluated(policy, {"transformer": policy["transformer"]})
    lengths = [len(ids) for ids in samples.response_ids]
    assert metrics["proxy"] == metrics["length"] == np.mean(lengths)
    assert metrics["gold"] == np.mean([text.count("a") for text in samples.responses])
    assert metrics["ended"] == np.mean([ids[-1] == EOS for ids in samples.response_ids])
    assert samples.prompts == ["abc", "d", "ga", "bbbb"]
    # nobody's response depends on who else is asked: its coins are its own row's
    first = evaluated(policy, {"transformer": policy["transformer"]}, prompts=["abc"])[1]
    assert first.response_ids[0] == samples.response_ids[0]


def test_the_helper_batches_are_ragged():
    """The checks above would be empty without padding."""
    mask = make_batch().response_mask
    assert 0 < mask.mean() < 1
