"""A run of DPO, --stages sft,dpo: what it leaves, where it goes on, what it refuses."""

import json
import math
import os
import shutil

import numpy as np
import pytest
from tiny_run import (
    VOWELS,
    call,
    changed,
    differences,
    files_under,
    interrupted_after,
    leaves,
    metrics,
    outcome,
    refusal,
    resume,
    tiny_config,
    train,
    updates,
    write_names,
    write_pairs,
)

import minirlhf
from minirlhf.app.commands import parse_config
from minirlhf.errors import InputError
from minirlhf.runs import checkpoint, pipeline
from minirlhf.runs.config import TrainConfig, load_config, rate_notes, save_config, unused_options

PROMPT = "My kettle leaks"


def dpo_config(out, **changes):
    small = {"dpo__batch_size": 8, "dpo__optimizer__warmup": 1}
    return tiny_config(out, stages="sft,dpo", **small, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, result, what was said) of one run on the support world, which no test changes."""
    out, said = tmp_path_factory.mktemp("finished") / "run", []
    return out, train(dpo_config(out), say=said.append), said


@pytest.fixture
def every_step(monkeypatch):
    """A checkpoint after each step."""
    monkeypatch.setattr(pipeline, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "CHECKPOINT_SHARE", float("inf"))


def test_a_run_leaves_a_policy_and_no_reward_model(finished):
    out, result, said = finished
    files = files_under(out)
    made = {name.split("/")[0] for name in files if "/" in name}
    assert made == {"reference", "policy", "checkpoint"}
    assert not [name for name in files if "heads" in name or "state" in name]
    assert load_config(out / "config.toml").stages == "sft,dpo"
    assert {row["stage"] for row in metrics(out)} == {"sft", "dpo"}
    assert any(line.endswith("stages to run: sft, dpo") for line in said)
    assert any(line.startswith("DPO: accuracy ") and "gold order" in line for line in said)
    assert result.policy_samples.responses != result.reference_samples.responses
    assert result.reference["kl_seq"] == 0 < result.policy["kl_full_seq"]
    assert math.isnan(result.policy["proxy"]) and np.isfinite(result.policy["gold"])
    assert result.seconds.keys() == {"sft", "dpo", "evaluation"}
    assert json.loads((out / "result.json").read_text())["policy"]["proxy"] is None


def test_every_update_logs_what_trl_logs(finished):
    rows, last = updates(finished[0], "dpo"), metrics(finished[0], "dpo")[-1]
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    names |= {"logps/chosen", "logps/rejected", "loss/dpo", "grad_norm", "lr"}
    assert names <= rows[0].keys() and [row["step"] for row in rows] == list(range(len(rows)))
    assert rows[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)
    for row in rows:
        margin = row["rewards/chosen"] - row["rewards/rejected"]
        assert row["rewards/margins"] == pytest.approx(margin, abs=1e-5)
    heldout = {"loss_dpo", "accuracy", "margin", "calibration_error", "gold_accuracy"}
    assert {f"heldout/{name}" for name in heldout} <= last.keys()


def test_its_table_its_replies_and_its_numbers(finished, capsys):
    out, _, _ = finished
    copy = shutil.copytree(out, out.parent / "copy")
    status, shown, err = call(capsys, "resume", copy)
    assert status == 0 and "stages to run: none, all are done" in err
    assert "gold reward" in shown and "kl_seq" in shown and "proxy" not in shown
    assert (copy / "curves.png").exists()
    status, shown, _ = call(capsys, "sample", out, "--prompt", PROMPT)
    assert status == 0 and "policy" in shown and "reference" in shown
    status, shown, _ = call(capsys, "score", out, "--prompt", PROMPT, "--response", "Sorry.")
    scores = minirlhf.open_run(out).score(PROMPT, "Sorry.")
    assert scores.kl_coef == 0.5 and scores.kl_seq != 0 and math.isnan(scores.score)
    assert status == 0 and "no score: DPO has no reward model; its implicit reward is" in shown


def test_given_pairs_are_learnt(tmp_path):
    config = dpo_config(tmp_path / "run", pairs=write_pairs(tmp_path / "pairs.jsonl"))
    config = changed(config, {"dpo.epochs": 8, "dpo.optimizer.learning_rate": 1e-2})
    train(config)
    rows = updates(config.out, "dpo")
    assert rows[-1]["rewards/margins"] > 0.5 and rows[-1]["loss/dpo"] < 0.6
    assert metrics(config.out, "dpo")[-1]["heldout/accuracy"] > 0.6


@pytest.mark.parametrize("stops", [("supervised fine-tuning", 3), ("DPO", 1), ("DPO", 5)])
def test_a_resumed_run_is_the_uninterrupted_one(finished, tmp_path, every_step, stops):
    config = dpo_config(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt, match=f"{stops[1]} of . steps made, {stops[1]} in the"):
        train(config, track=interrupted_after(*stops))
    if stops[0] == "DPO":  # until it has ended the reference stands for the policy
        assert not minirlhf.open_run(config.out).is_trained
    resume(config.out)
    assert differences(outcome(finished[0]), outcome(config.out)) == []
    assert files_under(finished[0]).keys() == files_under(config.out).keys()


@pytest.mark.parametrize(
    "owner, name, count", [(checkpoint, "save_model", 2), (pipeline, "rmtree", 2)]
)
@pytest.mark.parametrize("after", [False, True])
def test_it_may_stop_at_the_end_of_the_stage(
    finished, tmp_path, monkeypatch, every_step, owner, name, count, after
):
    calls, original = [], getattr(owner, name)

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and not after:
            raise KeyboardInterrupt
        original(*args, **kwargs)
        if len(calls) == count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(KeyboardInterrupt):
            train(dpo_config(tmp_path / "run"))
    resume(tmp_path / "run")
    assert differences(outcome(finished[0]), outcome(tmp_path / "run")) == []
    assert files_under(finished[0]).keys() == files_under(tmp_path / "run").keys()


def test_a_run_of_fine_tuning_goes_on_with_dpo_and_not_back(finished, tmp_path):
    """config.toml may say which way it goes, until the policy has begun."""
    out = tmp_path / "run"
    train(changed(dpo_config(out), {"stages": "sft"}))
    path = out / "config.toml"
    save_config(path, changed(load_config(path), {"stages": "sft,dpo"}))
    resume(out)
    assert differences(outcome(finished[0]), outcome(out)) == []
    save_config(path, changed(load_config(path), {"stages": "all"}))
    with pytest.raises(InputError, match="expected stages = 'sft,dpo', as until now; got 'all'"):
        resume(out)
    ppo = tiny_config(tmp_path / "ppo")
    with pytest.raises(KeyboardInterrupt):
        train(ppo, track=interrupted_after("PPO", 1))
    path = ppo.out / "config.toml"
    save_config(path, changed(load_config(path), {"stages": "sft,dpo"}))
    with pytest.raises(InputError, match="expected stages = 'all', as until now; got 'sft,dpo'"):
        resume(ppo.out)


def test_what_a_finished_stage_was_made_with_stays(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    path = out / "config.toml"
    save_config(path, changed(load_config(path), {"dpo.kl_coef": 0.1}))
    with pytest.raises(InputError, match="expected dpo.kl_coef = 0.5, as until now; got 0.1"):
        resume(out)
    shutil.rmtree(out / "reference")
    save_config(path, changed(load_config(path), {"dpo.kl_coef": 0.5}))
    with pytest.raises(InputError, match="reference: expected it beside what dpo made with it"):
        resume(out)


def test_a_reward_beside_it_is_refused_and_so_are_iterations_of_ppo(finished, tmp_path, capsys):
    names, pairs = write_names(tmp_path / "n.txt"), write_pairs(tmp_path / "p.jsonl")
    dpo = ("train", "--stages", "sft,dpo", "--out", tmp_path / "run")
    said = (
        "--stages sft,dpo: expected pairs (--pairs, or the support world's), and neither a reward "
    )
    assert said in refusal(capsys, *dpo, "--corpus", names, "--reward", VOWELS)
    assert said in refusal(capsys, *dpo, "--pairs", pairs, "--reward", VOWELS)
    assert "got a corpus alone: give --pairs" in refusal(capsys, *dpo, "--corpus", names)
    with pytest.raises(InputError, match="got a reward: give --pairs FILE"):
        minirlhf.train(dpo_config(tmp_path / "run"), reward=len, progress=False)
    assert not os.path.exists(tmp_path / "run")
    before = files_under(finished[0])
    assert said in refusal(capsys, "resume", finished[0], "--reward", VOWELS)
    said = "got --ppo.iterations 9: give"
    assert said in refusal(capsys, "resume", finished[0], "--ppo.iterations", 9)
    assert files_under(finished[0]) == before


def test_beta_is_that_of_the_stage_that_runs():
    def betas(*arguments):
        config = parse_config([*arguments, "--beta", "0.3"])
        return config.ppo.kl_coef, config.dpo.kl_coef

    assert betas() == (0.3, 0.5) and betas("--stages", "sft") == (0.3, 0.5)
    assert betas("--stages", "sft,dpo") == betas("--stages=sft,dpo") == (0.2, 0.3)


def test_options_of_the_other_way_are_said(tmp_path):
    dpo = changed(TrainConfig(), {"stages": "sft,dpo"})
    for changes, said in (
        ({"ppo.kl_coef": 0.1, "eval_every": 5}, ["--eval-every, --ppo.kl-coef change"]),
        ({"ppo.lam": 0.5, "ppo.importance_cap": 3.0}, ["--ppo.importance-cap, --ppo.lam change"]),
        ({"reward_model.epochs": 9}, ["--reward-model.epochs changes"]),
        ({"reward_model.n_pairs": 9, "ppo.temperature": 0.7, "dpo.epochs": 9}, []),
    ):
        notes = unused_options(changed(dpo, changes))
        assert notes == [f"{options} nothing with --stages sft,dpo" for options in said]
    (note,) = unused_options(changed(TrainConfig(), {"dpo.epochs": 9}))
    assert note == "--dpo.epochs changes nothing without --stages sft,dpo"
    (note,) = rate_notes(dpo)
    assert "--dpo.optimizer.learning-rate 1e-5" in note and "ppo" not in note


def test_a_ranked_list_may_be_learnt_from(tmp_path):
    rows = [
        {"prompt": f"tea {i}", "responses": ["good good", "so so", "bad bad"], "ranking": [0, 1, 2]}
        for i in range(20)
    ]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dpo_config(tmp_path / "run", pairs=str(path))
    train(config)
    assert updates(config.out, "dpo")[-1]["rewards/margins"] != 0


# what each field of DPO changes: the updates of the stage, and nothing before it
TURNS = {
    "dpo.kl_coef": 2.0,
    "dpo.loss": "ipo",
    "dpo.label_smoothing": 0.2,
    "dpo.epochs": 3,
    "dpo.batch_size": 7,
    "dpo.optimizer.learning_rate": 1e-3,
    "dpo.optimizer.schedule": "cosine",
    "dpo.optimizer.warmup": 3,
    "dpo.optimizer.floor": 0.5,
    "dpo.optimizer.beta1": 0.5,
    "dpo.optimizer.beta2": 0.5,
    "dpo.optimizer.eps": 1e-2,
    "dpo.optimizer.weight_decay": 1.0,
    "dpo.optimizer.max_grad_norm": 1e-2,
    "dpo.optimizer.form": "tf",
}


@pytest.fixture(scope="module")
def one_reference(tmp_path_factory):
    """The config of a run that has been fine-tuned on pairs, whose DPO has not begun."""
    folder = tmp_path_factory.mktemp("reference")
    config = dpo_config(folder / "run", pairs=write_pairs(folder / "pairs.jsonl"))
    train(changed(config, {"stages": "sft"}))
    return config


def gone_on(config, out, changes):
    """What DPO with these settings makes of the reference."""
    shutil.copytree(config.out, out)
    stored = load_config(out / "config.toml")
    save_config(out / "config.toml", changed(stored, {"stages": "sft,dpo", **changes}))
    resume(out)
    return outcome(out)


def test_every_field_of_dpo_is_turned_and_changes_the_run(one_reference, tmp_path):
    fields = {path for path, _ in leaves(TrainConfig()) if path.startswith("dpo.")}
    assert TURNS.keys() == fields
    base = gone_on(one_reference, tmp_path / "base", {})
    for path, value in TURNS.items():
        found = differences(base, gone_on(one_reference, tmp_path / path, {path: value}))
        assert {"metrics of dpo", "policy/model.safetensors"} <= set(found), path
        assert not [key for key in found if key.startswith(("metrics of sft", "reference"))]


def test_workers_change_who_computes_and_no_result(one_reference, tmp_path):
    one, two = (
        gone_on(one_reference, tmp_path / str(n), {"workers": n})["metrics of dpo"] for n in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        for name, value in a.items():
            if isinstance(value, float):
                assert value == pytest.approx(b[name], abs=1e-3, rel=1e-2), name
