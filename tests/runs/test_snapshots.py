"""What each token pays, as training counts it, at moments of a run that may be interrupted."""

import numpy as np
import pytest
from tiny_run import interrupted_after, resume, tiny_config, train, write_names

import minirlhf
from minirlhf.runs.log import read_jsonl

ROWS = {"prompt", "response", "pieces", "ids", "logp", "ref_logp", "entropy", "value", "step"}
ROWS |= {"reward_token", "advantage", "top", "ref_top", "kl_seq", "score", "gold", "kl_coef"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of five iterations with a snapshot before it and after the second, third and fifth."""
    out = tmp_path_factory.mktemp("snapshots") / "run"
    train(tiny_config(out, snapshots=3, ppo__iterations=5, max_prompt_tokens=40))
    return out


def rows_of(folder):
    return read_jsonl(folder / "snapshots.jsonl")


def test_they_are_taken_at_the_beginning_and_so_often(folder):
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [3] * 4 + [5] * 4
    prompts = [row["prompt"] for row in rows]
    assert prompts[:4] * 4 == prompts and len(set(prompts[:4])) == 4


def test_a_row_has_numbers_of_every_token_that_fit_together(folder):
    beta = 0.2
    for row in rows_of(folder):
        assert row.keys() == ROWS
        for name in ROWS & {"logp", "ref_logp", "entropy", "value", "reward_token", "advantage"}:
            assert len(row[name]) == len(row["pieces"]) == len(row["ids"])
        kl_token = np.subtract(row["logp"], row["ref_logp"])
        assert row["kl_seq"] == pytest.approx(kl_token.sum(), abs=1e-12)
        if row["step"] == 0:
            assert not kl_token.any()  # the policy is the reference
        expected = -beta * kl_token
        expected[-1] += row["score"]
        np.testing.assert_allclose(row["reward_token"], expected, atol=1e-6)
        following = np.append(row["value"][1:], 0.0)
        delta, gae = np.array(row["reward_token"]) + following - row["value"], 0.0
        for t in reversed(range(len(delta))):
            gae = delta[t] + 0.95 * gae
            assert row["advantage"][t] == pytest.approx(gae, abs=1e-5)
        for t, likeliest in enumerate(row["top"]):
            shares = [share for _, share in likeliest]
            assert len(shares) == 5 and shares == sorted(shares, reverse=True)
            for piece, share in likeliest:
                if piece == row["pieces"][t]:
                    assert share == pytest.approx(np.exp(row["logp"][t]), abs=1e-4)


def test_the_last_ones_are_what_score_says_of_the_finished_run(folder):
    run = minirlhf.open_run(folder)
    for row in rows_of(folder)[-4:]:
        if not row["response"] or row["ids"][-1] != run.session.tokenizer.eos:
            continue  # score would end it with the stop token
        said = run.score(row["prompt"], row["response"])
        if said.ids == row["ids"]:  # sampled as these tokens, and not as others of one text
            for name in ("logp", "ref_logp", "entropy", "value", "reward_token", "advantage"):
                np.testing.assert_allclose(getattr(said, name), row[name], atol=1e-5)
            assert said.kl_seq == pytest.approx(row["kl_seq"], abs=1e-5)
            assert said.score == pytest.approx(row["score"], abs=1e-5) and said.gold == row["gold"]


def test_they_change_nothing_else_and_survive_an_interruption(folder, tmp_path):
    plain = tiny_config(tmp_path / "plain", ppo__iterations=5, max_prompt_tokens=40)
    train(plain)
    policy = "policy/model.safetensors"
    assert (plain.out / policy).read_bytes() == (folder / policy).read_bytes()
    assert not (plain.out / "snapshots.jsonl").exists()
    same = {"ppo__iterations": 5, "max_prompt_tokens": 40, "checkpoint_every": 2}
    cut = tiny_config(tmp_path / "cut", snapshots=3, **same)
    with pytest.raises(KeyboardInterrupt):
        train(cut, track=interrupted_after("PPO", 3))
    assert {row["step"] for row in rows_of(cut.out)} == {0, 2, 3}  # 3 is made again
    resume(cut.out)
    assert rows_of(cut.out) == rows_of(folder)


def test_without_critic_or_gold_there_is_none(tmp_path):
    corpus = write_names(tmp_path / "names.txt")
    config = tiny_config(tmp_path / "run", corpus=corpus, reward="length", snapshots=1)
    minirlhf.train(config, recipe="ppo", progress=False, ppo={"advantages": "batch"})
    for row in rows_of(config.out):
        assert row["value"] is row["advantage"] is row["gold"] is None
        assert row["reward_token"] is not None
