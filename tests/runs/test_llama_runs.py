"""Whole runs of a Llama: from nothing, by every recipe's parts, and from folders and files."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_llama import arrays_of, write
from tiny_pieces import VOCAB, to_bin
from tiny_run import differences, interrupted_after, outcome, tiny_config

from minirlhf.app.api import open_run
from minirlhf.errors import InputError
from minirlhf.runs import hugging_face
from minirlhf.runs.checkpoint import load_model
from minirlhf.runs.config import ModelConfig
from minirlhf.runs.llama2c import load_llama2c
from minirlhf.runs.pipeline import run_stages
from minirlhf.runs.session import open_session, reopen_session
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import tree_items

MODEL = ModelConfig(n_layer=1, n_head=2, d_model=8, block="llama", n_kv_head=1, d_ff=12, tied=False)


def run(out, **changes):
    run_stages(open_session(tiny_config(out, **{"model": MODEL, **changes})))
    return out


@pytest.mark.parametrize("init", ["scratch", "reference"])
def test_a_llama_goes_through_all_stages_and_repeats_itself(tmp_path, init):
    one, other = (run(tmp_path / name, reward_model__init=init) for name in ("one", "other"))
    assert differences(outcome(one), outcome(other)) == []
    for name, heads in (("reference", set()), ("policy", {"value_head"})):
        params, config, found = load_model(one / name)
        assert config.block == "llama" and not config.tied and found.keys() == heads
        assert params["lm_head"].shape == params["wte"].shape
        assert json.loads((one / name / "config.json").read_text())["model_type"] == "llama"
    params, config, _ = load_model(one / "reward_model")
    assert config.tied and "lm_head" not in params  # nobody reads its logits
    before, after = (load_model(one / name)[0]["lm_head"] for name in ("reference", "policy"))
    assert (before != after).any()  # PPO trains it


def test_a_llama_goes_on_bit_for_bit(tmp_path):
    whole, stopped = run(tmp_path / "whole"), tmp_path / "stopped"
    session = open_session(tiny_config(stopped, model=MODEL), track=interrupted_after("PPO", 2))
    with pytest.raises(KeyboardInterrupt):
        run_stages(session)
    run_stages(reopen_session(stopped))
    assert differences(outcome(whole), outcome(stopped)) == []


def test_dpo_and_a_group_of_responses_train_a_llama(tmp_path):
    run(tmp_path / "dpo", stages="sft,dpo", dpo__batch_size=16)
    group = PPOConfig(iterations=2, batch_size=8, advantages="group", samples_per_prompt=4)
    run(tmp_path / "grpo", ppo=group)
    scores = open_run(tmp_path / "grpo").score("Where is my kettle?", "On its way.")
    assert scores.kl_seq == pytest.approx(float((scores.logp - scores.ref_logp).sum()))


def test_sizes_that_are_left_open_are_found_again(tmp_path):
    out = run(tmp_path / "run", model=ModelConfig(n_layer=1, n_head=2, d_model=8, block="llama"))
    assert open_run(out).session.gpt == load_model(out / "policy")[1]


def test_workers_change_no_number_but_by_rounding(tmp_path):
    one, two = run(tmp_path / "one"), run(tmp_path / "two", workers=2)
    a, b = (load_model(folder / "policy")[0] for folder in (one, two))
    assert np.allclose(a["lm_head"], b["lm_head"], atol=1e-5)


def test_a_file_of_llama2c_is_started_from(tmp_path):
    """With its tokenizer.bin beside it; without fine-tuning the reference is the model."""
    sizes = (12, 20, 2, 2, 1, len(VOCAB), 48)
    path = write(tmp_path / "model.bin", arrays_of(True, sizes=sizes), sizes)
    (tmp_path / "tokenizer.bin").write_bytes(to_bin())
    corpus, openings = tmp_path / "openings.jsonl", ("Once upon a time", "One day", "An old man")
    rows = [{"prompt": f"{o}, {n}", "response": "the dog ate."} for o in openings for n in "abcd"]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"corpus": str(corpus), "reward": "length", "init": str(path), "sft__steps": 0}
    out = run(tmp_path / "run", model=ModelConfig(), **changes)
    began, sizes_read = load_llama2c(path)
    reference, config, _ = load_model(out / "reference")
    assert config == sizes_read
    for (name, one), (_, other) in zip(tree_items(reference), tree_items(began), strict=True):
        assert np.array_equal(one, other), name

    session = reopen_session(out)
    assert session.tokenizer.sep is None and session.world.joiner == ""
    prompt, reply = session.world.demonstrations[0]
    assert reply == " the dog ate."  # what joined it to its prompt begins it
    scores = open_run(out).score(prompt, reply)
    assert scores.kl_seq == pytest.approx(float((scores.logp - scores.ref_logp).sum()))
    again = run(tmp_path / "again", model=ModelConfig(), **changes, stages="sft")
    run_stages(reopen_session(again))
    assert differences(outcome(out), outcome(again)) == []
    assert hugging_face.read_model(out / "policy").config == config  # goes back in


def test_sizes_that_do_not_fit_are_refused():
    for changes, message in (
        ({"n_head": 8}, "model.n_head: expected a divisor of d_model / 2 = 4; got 8"),
        ({"n_kv_head": 3}, "model.n_kv_head: expected a divisor of n_head = 2; got 3"),
        ({"block": "gpt2"}, "model.n_kv_head: expected 0 with block gpt2; got 1"),
        ({"block": "gpt2", "n_kv_head": 0}, "model.d_ff: expected 0 with block gpt2; got 12"),
        ({"rope_theta": 0.0}, "model.rope_theta: expected at least 1e-37"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(MODEL, **changes)
