"""Whole runs: what they leave behind, that they repeat, that an interruption changes nothing."""

import dataclasses
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from tiny_run import (
    STAGES,
    VOWELS,
    changed,
    differences,
    files_under,
    flat,
    interrupted_after,
    leaves,
    metrics,
    outcome,
    resume,
    tiny_config,
    train,
    updates,
    write_names,
    write_pairs,
)
from tolerances import SAMPLER_HIDDEN, assert_close

from minirlhf.disk import read_object, write_whole
from minirlhf.errors import InputError
from minirlhf.rlhf.kl import adaptive_kl_coef
from minirlhf.runs import checkpoint, pipeline
from minirlhf.runs import config as config_module
from minirlhf.runs import folder as run_folder
from minirlhf.runs import session as session_module
from minirlhf.runs.checkpoint import load_model, load_state
from minirlhf.runs.config import TrainConfig, load_config, save_config
from minirlhf.runs.log import RunLog, read_jsonl
from minirlhf.runs.metrics import evaluate
from minirlhf.train import ppo as ppo_module
from minirlhf.train.batches import pad_batch
from minirlhf.train.policy import policy_forward
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import tree_copy, tree_items
from minirlhf.worlds.tokens import load_tokenizer, train_tokenizer

CANONICAL = {  # the names that other systems use for a PPO iteration
    *("objective/kl", "objective/kl_coef", "objective/entropy", "objective/non_score_reward"),
    *("objective/scores", "objective/rlhf_reward", "policy/approxkl_avg", "policy/clipfrac_avg"),
    *("policy/entropy_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio"),
    *("val/ratio_var", "ppo/val/mean", "ppo/val/var", "ppo/val/error", "ppo/val/var_explained"),
    *("ppo/returns/mean", "ppo/returns/var", "val/num_eos_tokens", "response_length/mean"),
    *("lr", "grad_norm", "episode"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, result, what was said) of one run, which no test changes."""
    out, said = tmp_path_factory.mktemp("finished") / "run", []
    config = tiny_config(out, ppo__kl_target=0.05, ppo__kl_horizon=100.0)
    return out, train(config, say=said.append), said


# --- the run folder


def test_a_run_leaves_all_its_files(finished):
    out, _, _ = finished
    model = {"config.json", "model.safetensors", "generation_config.json"}
    model |= {"tokenizer.json", "tokenizer_config.json"}
    expected = {
        *("config.toml", "world.json", "tiktoken.json", "result.json"),
        *("metrics.jsonl", "samples.jsonl", ".lock", "checkpoint/config.toml"),
        *("checkpoint/state.safetensors", "policy/heads.safetensors"),
        "reward_model/heads.safetensors",
        *(f"{name}/{file}" for name in ("reference", "reward_model", "policy") for file in model),
    }
    assert set(files_under(out)) == expected  # and nothing temporary


def test_the_configuration_in_the_folder_is_the_one_that_ran(finished):
    out, _, _ = finished
    assert load_config(out / "config.toml") == tiny_config(
        out, ppo__kl_target=0.05, ppo__kl_horizon=100.0
    )


def test_the_models_are_plain_gpt2_of_one_vocabulary(finished):
    out, _, _ = finished
    tokenizer = load_tokenizer(out)
    for name, heads in (
        ("reference", set()),
        ("reward_model", {"reward_head"}),
        ("policy", {"value_head"}),
    ):
        _, gpt, found = load_model(out / name)
        assert gpt.vocab_size == tokenizer.vocab_size and set(found) == heads
        entries = read_object(out / name / "config.json")
        assert entries["eos_token_id"] == tokenizer.eos
        assert entries["pad_token_id"] == tokenizer.pad


def test_every_iteration_logs_the_standard_metrics(finished):
    out, _, _ = finished
    rows = read_jsonl(out / "metrics.jsonl")
    ppo = [row for row in rows if row["stage"] == "ppo"]
    assert [row["step"] for row in ppo] == [0, 1, 2]
    assert [row["episode"] for row in ppo] == [12, 24, 36]
    for row in ppo:
        assert CANONICAL <= row.keys(), CANONICAL - row.keys()
        assert row["time/iteration"] > 0
        numbers = {key: value for key, value in row.items() if not key.startswith("eval/")}
        assert all(isinstance(v, int | float | str) for v in numbers.values()), row  # no null
    assert ["eval/kl_seq" in row for row in ppo] == [False, True, False]  # eval_every = 2


def test_the_stages_log_their_loss_at_every_step(finished):
    out, _, _ = finished
    assert [row["step"] for row in metrics(out, "sft")] == list(range(6))
    assert {"loss/sft", "lr", "grad_norm"} <= metrics(out, "sft")[0].keys()
    steps, heldout = updates(out, "reward_model"), metrics(out, "reward_model")[-1]
    assert [row["step"] for row in steps] == list(range(len(steps))) and len(steps) >= 4
    assert {"loss/reward_model", "accuracy", "margin"} <= steps[0].keys()
    assert {"heldout/accuracy", "heldout/calibration_error", "heldout/gold_accuracy"} <= (
        heldout.keys()
    )
    assert {row["stage"] for row in metrics(out)} == set(STAGES)


def test_metrics_agree_with_each_other(finished):
    for row in metrics(finished[0], "ppo"):
        assert row["objective/non_score_reward"] == pytest.approx(
            -row["objective/kl_coef"] * row["objective/kl"]
        )
        assert row["objective/rlhf_reward"] == pytest.approx(
            row["objective/scores"] + row["objective/non_score_reward"], abs=1e-6
        )
        assert row["ppo/val/var_explained"] == pytest.approx(
            1 - row["ppo/val/error"] / row["ppo/returns/var"], abs=1e-5
        )
        rounding = SAMPLER_HIDDEN  # a KL of distributions, while k1 may be below 0
        assert row["objective/kl_full_seq"] >= (-rounding if row["step"] == 0 else 0)


def test_samples_are_logged_with_their_gold_reward_and_the_numbers_of_the_objective(finished):
    out, _, _ = finished
    samples = read_jsonl(out / "samples.jsonl")
    assert {row["step"] for row in samples} == {0, 1, 2}
    columns = {"step", "prompt", "response", "score", "kl_seq", "ref_logp_seq", "tokens"} | {
        "ids",
        "gold",
    }
    assert all(row.keys() == columns for row in samples)
    rounding = SAMPLER_HIDDEN
    first = [abs(row["kl_seq"]) for row in samples if row["step"] == 0]
    later = [abs(row["kl_seq"]) for row in samples if row["step"] > 0]
    assert max(first) <= rounding < min(later)  # at first it still is the reference


def test_the_score_and_kl_seq_of_a_sample_are_those_of_its_response(tmp_path, monkeypatch):
    """All samples of an iteration are logged here, so their means are the metrics."""
    monkeypatch.setattr(run_folder, "SAMPLES_LOGGED", 12)
    train(tiny_config(tmp_path / "run"))
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    for row in metrics(tmp_path / "run", "ppo"):
        logged = [sample for sample in samples if sample["step"] == row["step"]]
        assert len(logged) == 12 and len({sample["score"] for sample in logged}) > 1
        for column, name in (("score", "objective/scores"), ("kl_seq", "objective/kl")):
            mean = np.mean([sample[column] for sample in logged])
            assert mean == pytest.approx(row[name], abs=1e-5)


def test_the_final_table_compares_reference_and_policy(finished):
    out, result, said = finished
    stored = json.loads((out / "result.json").read_text())
    assert stored["policy"]["gold"] == result.policy["gold"]
    assert stored["policy"]["reward"] is None  # the support world has no reward of the user's
    assert result.reference["kl_seq"] == result.reference["kl_full_seq"] == 0.0
    assert result.policy["kl_full_seq"] > 0
    assert result.reference_samples.prompts == result.policy_samples.prompts
    assert stored["seconds"].keys() == {"sft", "reward_model", "ppo", "evaluation"}
    assert any("held-out pairs" in line and "gold order" in line for line in said)


# --- the same again


def test_same_seed_same_run_other_seed_other_run(finished, tmp_path):
    out, _, _ = finished
    settings = {"ppo__kl_target": 0.05, "ppo__kl_horizon": 100.0}
    train(tiny_config(tmp_path / "same", **settings))
    train(tiny_config(tmp_path / "other", seed=1, **settings))
    assert differences(outcome(out), outcome(tmp_path / "same")) == []
    other = differences(outcome(out), outcome(tmp_path / "other"))
    for what in ("reference", "reward_model", "policy"):
        assert f"{what}/model.safetensors" in other
    assert {"metrics of sft", "metrics of reward_model", "metrics of ppo", "result"} <= set(other)
    assert {"samples.jsonl", "tiktoken.json"} <= set(other)  # another world, too


def test_the_folder_is_never_a_run_already(finished):
    with pytest.raises(InputError, match="holds a run"):
        train(tiny_config(finished[0]))


def test_without_out_runs_are_numbered(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/names-1").mkdir(parents=True)
    config = changed(tiny_config("x", corpus=names, reward=VOWELS), {"out": None})
    opened = [session_module.open_session(config).folder.name for _ in range(3)]
    assert opened == ["names-0", "names-2", "names-3"]


# --- T9: interrupted and resumed is the same as not interrupted


def all_files(folder):
    """What has to be equal bit for bit."""
    _, meta = load_state(folder / "checkpoint")
    meta.pop("log")  # sizes of files that hold times
    return {**outcome(folder), "meta": meta}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, names):
    """(configuration, all that its run left): an adaptive beta, its own pairs, five iterations."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = tiny_config(
        folder / "run",
        corpus=names,
        pairs=write_pairs(folder / "pairs.jsonl"),
        ppo__iterations=5,
        ppo__kl_target=0.05,
        ppo__kl_horizon=100.0,
    )
    train(config)
    coefficients = [row["objective/kl_coef"] for row in metrics(config.out, "ppo")]
    assert len(set(coefficients)) == 5  # beta moves, so losing it would show
    return config, all_files(config.out)


@pytest.mark.parametrize("checkpoint_every", [1, 2, 10])
@pytest.mark.parametrize(
    "title, steps",
    [
        ("supervised fine-tuning", 0),
        ("supervised fine-tuning", 4),
        ("reward model", 3),
        ("PPO", 0),
        ("PPO", 1),
        ("PPO", 3),
        ("PPO", 4),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path, uninterrupted, title, steps, checkpoint_every
):
    config, expected = uninterrupted
    config = changed(config, {"out": tmp_path / "run", "checkpoint_every": checkpoint_every})
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after(title, steps))
    resume(tmp_path / "run")
    assert differences(expected, all_files(tmp_path / "run")) == []


@pytest.mark.parametrize(
    "title, steps", [("supervised fine-tuning", 3), ("reward model", 2), ("PPO", 2)]
)
def test_with_a_simulated_annotator_too(tmp_path, finished, title, steps):
    out, _, _ = finished
    config = changed(load_config(out / "config.toml"), {"out": tmp_path / "run"})
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after(title, steps))
    resume(tmp_path / "run")
    assert differences(all_files(out), all_files(tmp_path / "run")) == []


def crash_at(monkeypatch, owner, name, count, *, after):
    """The count-th call of owner.name ends the program, before or after it did its work."""
    original, calls = getattr(owner, name), iter(range(1, 10**6))

    def crashing(*args, **kwargs):
        call = next(calls)
        if call == count and not after:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if call == count:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, crashing)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "owner, name, count",
    [
        (pipeline, "pair_metrics", 1),
        (pipeline.reward_model, "normalized", 1),
        (checkpoint, "save_model", 1),
        (checkpoint, "save_model", 2),
        (checkpoint, "save_model", 3),
        (checkpoint, "save_state", 1),
        (checkpoint, "save_state", 2),
        (ppo_module, "ppo_update", 4),
        (RunLog, "metrics", 14),
        (RunLog, "samples", 3),
        (pipeline, "write_whole", 1),
        *[(os, "replace", count) for count in range(5, 12)],  # each file and folder gets its name
    ],
)
def test_it_may_stop_at_any_moment(tmp_path, uninterrupted, monkeypatch, owner, name, count, after):
    config, expected = uninterrupted
    config = changed(config, {"out": tmp_path / "run", "checkpoint_every": 2})
    with monkeypatch.context() as patch:
        crash_at(patch, owner, name, count, after=after)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    resume(tmp_path / "run")
    assert differences(expected, all_files(tmp_path / "run")) == []
    assert [name for name in files_under(tmp_path / "run") if name.startswith(".")] == [".lock"]


@pytest.mark.parametrize("count", range(5, 8))
def test_it_may_stop_while_it_scales_ones_own_reward(tmp_path, names, monkeypatch, count):
    config = tiny_config(tmp_path / "whole", corpus=names, reward=VOWELS)
    train(config)
    with monkeypatch.context() as patch:
        crash_at(patch, os, "replace", count, after=False)
        with pytest.raises(KeyboardInterrupt):
            train(changed(config, {"out": tmp_path / "run"}))
    resume(tmp_path / "run")
    assert differences(all_files(config.out), all_files(tmp_path / "run")) == []


def test_interrupted_again_and_again_and_moved(tmp_path, uninterrupted):
    config, expected = uninterrupted
    config = changed(config, {"out": tmp_path / "0"})
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after("supervised fine-tuning", 2))
    for i, (title, steps) in enumerate([("reward model", 1), ("PPO", 1), ("PPO", 1), ("PPO", 2)]):
        (tmp_path / f"{i}").rename(tmp_path / f"{i + 1}")
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / f"{i + 1}", track=interrupted_after(title, steps))
    resume(tmp_path / "4")
    assert differences(expected, all_files(tmp_path / "4")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_a_run_killed_in_the_middle_of_a_line_is_resumed(tmp_path, uninterrupted):
    config, expected = uninterrupted
    config = changed(config, {"out": tmp_path / "run"})
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after("PPO", 2))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "run" / name, "ab") as file:
            file.write(b'{"step": 2, "sta')
    resume(config.out)
    assert differences(expected, all_files(config.out)) == []


def test_a_finished_run_resumed_changes_nothing(finished, tmp_path):
    out, result, _ = finished
    copy = shutil.copytree(out, tmp_path / "copy")
    before = files_under(copy)
    again = resume(copy)
    after = files_under(copy)
    assert {name for name in before if before[name] != after[name]} <= {"result.json"}
    assert before.keys() == after.keys()
    assert again.policy_samples.responses == result.policy_samples.responses
    assert differences(outcome(out), outcome(copy)) == []


# --- the texts that a run began with


def test_a_run_is_resumed_from_any_directory(tmp_path, monkeypatch):
    """The folder names its files by absolute paths, a reward in a file too."""
    write_names(tmp_path / "names.txt")
    (tmp_path / "mine.py").write_text("def reward(text):\n    return text.count('a')\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path / "run", corpus="names.txt", reward="mine.py:reward")
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after("PPO", 1))
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume(tmp_path / "run")
    stored = load_config(tmp_path / "run/config.toml")
    assert stored.corpus == str(tmp_path / "names.txt")
    assert stored.reward == f"{tmp_path / 'mine.py'}:reward"
    monkeypatch.chdir(tmp_path)
    pairs = tiny_config(tmp_path / "other", pairs=os.path.basename(write_pairs("pairs.jsonl")))
    assert session_module.open_session(pairs).config.pairs == str(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("change", ["corpus", "pairs", "seed"])
def test_other_texts_are_refused_on_resume(tmp_path, change):
    config = tiny_config(
        tmp_path / "run",
        corpus=write_names(tmp_path / "names.txt"),
        pairs=write_pairs(tmp_path / "pairs.jsonl"),
    )
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after("PPO", 1))
    if change == "seed":  # which splits the prompts
        stored = load_config(config.out / "config.toml")
        save_config(config.out / "config.toml", changed(stored, {"seed": 1}))
    else:
        path = tmp_path / {"corpus": "names.txt", "pairs": "pairs.jsonl"}[change]
        path.write_text(path.read_text().replace("go", "ga").replace("ka", "ke"))
    before = files_under(config.out)
    with pytest.raises(InputError, match=f"world.json: expected the texts .* change of {change},"):
        resume(config.out)
    assert files_under(config.out) == before


def test_a_run_is_looked_at_without_touching_its_folder(finished, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    (copy / "samples.jsonl").unlink()
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "sta')
    before = files_under(copy)
    run = session_module.reopen_session(copy)
    _, reference = pipeline.load_models(run)
    pipeline.reward_stage(run, reference)
    assert files_under(copy) == before


# --- what is cut, dropped, ignored or shared is said


def test_what_the_limits_on_tokens_cut_is_said_once(tmp_path):
    said = []
    config = tiny_config(
        tmp_path / "run",
        pairs=write_pairs(tmp_path / "pairs.jsonl"),
        max_prompt_tokens=4,
        max_response_tokens=2,
    )
    with pytest.raises(KeyboardInterrupt):
        train(config, say=said.append, track=interrupted_after("PPO", 0))
    world = session_module.reopen_session(config.out).world
    tokenizer = load_tokenizer(config.out)
    prompts = world.train_prompts + world.heldout_prompts
    replies = [reply for _, *both in world.pairs for reply in both]
    demonstrations = [reply for _, reply in world.demonstrations + world.heldout_demonstrations]
    for what, texts, ids, limit in (
        ("prompts", prompts, tokenizer.prompt_ids, 4),
        ("demonstrations", demonstrations, tokenizer.response_ids, 2),
        ("replies in pairs", replies, tokenizer.response_ids, 2),
    ):
        cut = sum(len(ids(text)) > limit for text in texts)
        assert cut > 0
        line = f"note: cut {cut} of {len(texts)} {what} to {limit} tokens"
        assert len([s for s in said if s.startswith(line)]) == 1, said


def test_what_is_whole_is_not_said_to_be_cut(finished, tmp_path):
    said = []
    config = tiny_config(
        tmp_path / "run", pairs=write_pairs(tmp_path / "pairs.jsonl"), max_response_tokens=0
    )
    train(config, say=said.append)
    assert not [line for line in said if line.startswith("note: cut")]


def write_long_pairs(path, shared, different):
    """Pairs whose replies have the first word in common, and pairs that differ at once."""
    rows = [
        {"prompt": f"p{i}", "chosen": "good good good", "rejected": "good good bad"}
        for i in range(shared)
    ] + [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(different)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_that_are_equal_after_the_cut_are_dropped(tmp_path):
    said = []
    pairs = write_long_pairs(tmp_path / "pairs.jsonl", shared=8, different=12)
    config = tiny_config(tmp_path / "run", pairs=pairs, max_response_tokens=2, vocab_size=270)
    train(config, say=said.append)
    assert "note: dropped 8 of 20 pairs that are equal in their first 2 tokens" in said


def test_no_pairs_that_differ_are_refused(tmp_path):
    pairs = write_long_pairs(tmp_path / "pairs.jsonl", shared=8, different=0)
    config = tiny_config(tmp_path / "run", pairs=pairs, max_response_tokens=2, vocab_size=270)
    with pytest.raises(InputError, match=r"pairs: expected .* first 2 tokens; got none"):
        train(config)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"corpus": "", "reward": "", "corpus_unit": "line"}, "--corpus-unit"),
        ({"encoding": "gpt2"}, "--vocab-size"),
        (
            {"reward_model.optimizer.eps": 1e-3, "reward_model.epochs": 5},
            "--reward-model.epochs, --reward-model.optimizer.eps change nothing beside --reward",
        ),
        ({"pairs": "p.jsonl", "reward": "", "reward_model.n_pairs": 7}, "--reward-model.n-pairs"),
        ({"reward_model.epochs": 5}, "--reward-model.epochs changes nothing beside --reward"),
        ({"reward_model.n_normalize": 7}, None),
        ({"ppo.advantages": "batch", "ppo.lam": 0.5}, "--ppo.lam changes nothing without a critic"),
        ({"ppo.advantages": "batch", "ppo.vf_coef": 0.5}, "--ppo.vf-coef changes nothing"),
        ({"ppo.clip": "none", "ppo.clip_eps": 0.1}, "--ppo.clip-eps changes nothing with --ppo.cl"),
        ({"ppo.importance_cap": 3.0}, "--ppo.importance-cap changes nothing without --ppo.import"),
        ({"ppo.lam": 0.5, "ppo.vf_coef": 0.5, "ppo.clip_eps": 0.1}, None),
        ({"reward": "", "pairs": "p.jsonl", "reward_timeout": 1.0}, "--reward-timeout"),
        ({"corpus_unit": "line"}, None),
        ({"corpus": "", "reward": "", "columns": ("prompt=a",)}, "--columns"),
        ({"columns": ("prompt=a",), "corpus": "c.csv"}, None),
        ({"reward": "", "corpus": "", "reward_model.epochs": 5, "vocab_size": 400}, None),
    ],
)
def test_options_that_change_nothing_are_said(changes, said):
    base = TrainConfig(corpus="c.txt", reward=VOWELS, vocab_size=300)
    notes = config_module.unused_options(changed(base, changes))
    assert [said in note for note in notes] == ([True] if said else [])


def test_such_a_note_is_shown(tmp_path, names):
    said = []
    session_module.open_session(
        tiny_config(tmp_path / "run", corpus=names, reward=VOWELS), say=said.append
    )
    assert any("--reward-model" in line for line in said)


def test_the_heldout_demonstrations_have_their_loss(tmp_path, names):
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS, sft__batch_size=3)
    run = session_module.open_session(config)
    reference = pipeline.reference_stage(run)
    heldout = metrics(config.out, "sft")[-1]
    assert len(updates(config.out, "sft")) == heldout["step"] == 6
    prompts = {prompt for prompt, _ in run.world.heldout_demonstrations}
    assert prompts and prompts <= set(run.world.heldout_prompts)
    total = count = 0
    for prompt, response in run.world.heldout_demonstrations:  # one at a time
        batch = pad_batch(
            [run.prompt_ids(prompt)], [run.response_ids(response)], pad_id=0, config=run.gpt
        )
        logp = policy_forward(reference, batch=batch, config=run.gpt)[0].logp
        total, count = total - logp.sum(), count + logp.size
    assert heldout["heldout/loss_sft"] == pytest.approx(total / count, abs=1e-5)


HELDOUT = (("sft", "heldout/loss_sft"), ("reward_model", "heldout/loss_reward_model"))


def test_what_is_held_out_is_measured_ten_times_and_changes_nothing(tmp_path, names, monkeypatch):
    files = {"corpus": names, "pairs": write_pairs(tmp_path / "pairs.jsonl")}
    config = tiny_config(tmp_path / "run", sft__steps=40, reward_model__epochs=20, **files)
    sizes, loss = [], pipeline.sft_loss
    monkeypatch.setattr(pipeline, "LOOK_ROWS", 2)
    monkeypatch.setattr(
        pipeline, "sft_loss", lambda p, rows, **o: sizes.append(len(rows)) or loss(p, rows, **o)
    )
    train(config)
    for (stage, name), n_steps in zip(HELDOUT, (40, 40), strict=True):
        rows = metrics(config.out, stage)
        found = [row for row in rows if name in row]
        assert [row["step"] for row in found] == list(range(0, n_steps + 1, n_steps // 10))
        assert found[-1] is rows[-1] and all(row.keys() >= rows[-1].keys() for row in found)
        assert [row["step"] for row in rows] == list(range(n_steps + 1))  # one line a step
        assert all(np.isfinite(row[name]) for row in found)
        assert [row["step"] for row in updates(config.out, stage)] == list(range(n_steps))
    assert len(sizes) == 12 and set(sizes[:10]) == set(sizes[11:]) and max(sizes[:10]) <= 3
    assert sizes[10] > 3  # at the end of all rows, and of the same for the comparison
    monkeypatch.setattr(pipeline, "LOOKS", 1)
    seldom = changed(config, {"out": tmp_path / "seldom"})
    train(seldom)
    differ = {"metrics", "metrics of sft", "metrics of reward_model"}
    assert set(differences(outcome(config.out), outcome(seldom.out))) == differ
    for stage, _ in HELDOUT:
        assert updates(config.out, stage) == updates(seldom.out, stage)


def test_what_is_learnt_by_heart_is_said(tmp_path, names):
    said, heart = [], "as texts are learnt by heart: set "
    files = {"corpus": write_names(tmp_path / "few.txt", n=12), "reward": VOWELS}
    config = tiny_config(tmp_path / "run", stages="sft", sft__steps=150, **files)
    train(config, say=said.append)
    looks = {
        row["heldout/loss_sft"]: row["step"]
        for row in metrics(config.out, "sft")
        if "heldout/loss_sft" in row
    }
    low, last = min(looks), metrics(config.out, "sft")[-1]["heldout/loss_sft"]
    notes = [line for line in said if heart in line]
    assert 0 < looks[low] < 150 and last > 1.02 * low
    assert notes == [
        f"note: supervised fine-tuning: the held-out loss was lowest, {low:.3f}, after "
        f"{looks[low]} of 150 steps and rose to {last:.3f}, {heart}--sft.steps {looks[low]} in a "
        "new run"
    ]
    said.clear()
    train(changed(config, {"out": tmp_path / "in time", "sft.steps": looks[low]}), say=said.append)
    assert not [line for line in said if heart in line]


@pytest.mark.parametrize(
    "low, epochs, option",
    [
        (30, 4, "--reward-model.epochs 3"),
        (0, 4, "a lower --reward-model.optimizer.learning-rate"),
        (30, 1, "a lower --reward-model.optimizer.learning-rate"),
    ],
)
def test_a_reward_model_that_knows_its_pairs_by_heart(tmp_path, low, epochs, option):
    said = []
    config = tiny_config(tmp_path / "run", reward_model__epochs=epochs)
    run = session_module.open_session(config, say=said.append)

    def look(loss, accuracy):
        return {"heldout/loss_reward_model": loss, "heldout/accuracy": accuracy}

    for step in (0, 10, 20, 30, 40):
        run.log.metrics(step, "reward_model", look(0.5 if step == low else 0.6, 0.7))
    run.log.metrics(0, "sft", look(0.1, 0.9))  # of another stage
    for last in (look(0.505, 0.6), look(0.6, 0.75)):  # noise; sure of more, and right more often
        pipeline._note_memorised(run, "reward_model", 40, last, 1000)
    assert not [line for line in said if "held-out loss" in line]
    # right less often; as often; more often by less than two standard errors
    for n, accuracy in ((1000, 0.65), (1000, 0.7), (45, 0.75), (1000, 0.728)):
        said.clear()
        pipeline._note_memorised(run, "reward_model", 40, look(0.6, accuracy), n)
        assert f"lowest, 0.500, after {low} of 40 steps and rose to 0.600" in said[-1]
        assert f": set {option} in a new run" in said[-1]


# --- forks: the same reference and reward model, other settings of PPO


def test_a_fork_shares_all_but_ppo(finished, tmp_path):
    out, _, _ = finished
    ppo = load_config(out / "config.toml").ppo
    fork = session_module.fork_run(out, tmp_path / "same", ppo=ppo)
    assert metrics(fork, "reward_model") and not metrics(fork, "ppo")
    resume(fork)
    other = changed(ppo, {"kl_coef": 5.0})
    resume(session_module.fork_run(out, tmp_path / "other", ppo=other, eval_every=0))
    original, same = outcome(out), outcome(tmp_path / "same")
    assert differences(original, same) == []  # also the log of the stages that did not run again
    found = differences(same, outcome(tmp_path / "other"))
    assert {"policy/model.safetensors", "metrics of ppo"} <= set(found)
    assert not [name for name in found if name.startswith(("reference/", "reward_model/"))]
    assert load_config(tmp_path / "other/config.toml").eval_every == 0
    assert not any("eval/kl_seq" in row for row in metrics(tmp_path / "other", "ppo"))


def test_a_fork_needs_a_reward_model_and_a_new_folder(finished, tmp_path):
    out, _, _ = finished
    with pytest.raises(InputError, match="exists"):
        session_module.fork_run(out, tmp_path, ppo=PPOConfig())
    half = shutil.copytree(out, tmp_path / "half")
    shutil.rmtree(half / "reward_model")
    with pytest.raises(InputError, match="no reward_model"):
        session_module.fork_run(half, tmp_path / "new", ppo=PPOConfig())
    with pytest.raises(InputError, match="temperature 1.0, at which the score was scaled; got 0.5"):
        session_module.fork_run(out, tmp_path / "new", ppo=PPOConfig(temperature=0.5))
    assert not (tmp_path / "new").exists()


# --- the reference is frozen, and is not the policy that samples


def open_ready(config):
    """A run whose reference and reward model are there: (run, reference, score)."""
    run = session_module.open_session(config)
    reference = pipeline.reference_stage(run)
    return run, reference, run.score_with(pipeline.reward_stage(run, reference))


def digest(tree):
    parts = (path.encode() + leaf.tobytes() for path, leaf in tree_items(tree))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_ppo_never_changes_the_reference(tmp_path, names):
    config = tiny_config(
        tmp_path / "run", corpus=names, reward=VOWELS, ppo__optimizer__weight_decay=0.5
    )
    run, reference, score = open_ready(config)
    before, stored = digest(reference), files_under(tmp_path / "run/reference")
    policy = pipeline.ppo_stage(run, reference, score)
    assert digest(reference) == before
    assert files_under(tmp_path / "run/reference") == stored
    assert np.abs(flat(policy["transformer"]) - flat(reference["transformer"])).max() > 1e-3
    for (path, ours), (_, theirs) in zip(
        tree_items(policy["transformer"]), tree_items(reference["transformer"]), strict=True
    ):
        assert not np.shares_memory(ours, theirs), path


def test_old_and_reference_are_two_snapshots(tmp_path, names, monkeypatch):
    """Equal before the first update, different after it; old is not the policy that learns."""
    rollouts, original = [], ppo_module.make_experience

    def keep(rollout, **constants):
        rollouts.append(rollout)
        return original(rollout, **constants)

    monkeypatch.setattr(ppo_module, "make_experience", keep)
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS)
    run, reference, score = open_ready(config)
    pipeline.ppo_stage(run, reference, score)
    first, second, _ = rollouts
    mask = first.batch.response_mask > 0
    assert_close(first.old_logp[mask], first.ref_logp[mask], SAMPLER_HIDDEN)
    mask = second.batch.response_mask > 0
    assert np.abs(second.old_logp - second.ref_logp)[mask].max() > 1e-3
    ratios = [row["val/ratio_var"] for row in metrics(tmp_path / "run", "ppo")]
    assert min(ratios) > 0  # within an iteration the policy leaves the one that sampled


# --- what the settings do


@pytest.mark.parametrize("minibatches", [1, 3])
def test_without_learning_every_ratio_is_one(tmp_path, names, minibatches):
    """T1: old log-probs, the update's log-probs and the reference's are those of one policy."""
    config = tiny_config(
        tmp_path / "run",
        corpus=names,
        reward=VOWELS,
        ppo__optimizer__learning_rate=0.0,
        ppo__minibatches=minibatches,
        ppo__temperature=0.7,
    )
    result = train(config)
    tolerance = SAMPLER_HIDDEN
    for row in metrics(tmp_path / "run", "ppo"):
        assert row["val/ratio"] == pytest.approx(1.0, abs=tolerance)
        assert row["val/ratio_var"] <= tolerance**2
        assert row["policy/approxkl_avg"] <= tolerance**2
        assert row["policy/clipfrac_avg"] == row["policy/clamped_log_ratios"] == 0
        for name in ("objective/kl", "objective/kl_full_seq", "objective/non_score_reward"):
            assert abs(row[name]) <= tolerance
    assert result.policy == pytest.approx(result.reference, nan_ok=True)
    assert result.policy["kl_seq"] == 0
    assert result.policy_samples.responses == result.reference_samples.responses


def test_the_penalty_holds_the_policy_near_the_reference(tmp_path, names):
    config = tiny_config(
        tmp_path / "free",
        seed=1,
        corpus=names,
        reward=VOWELS,
        eval_every=0,
        ppo__iterations=12,
        ppo__batch_size=24,
        ppo__kl_coef=0.0,
        eval_prompts=64,
    )
    free = train(config).policy
    near = changed(config.ppo, {"kl_coef": 20.0})
    held = resume(session_module.fork_run(config.out, tmp_path / "held", ppo=near)).policy
    assert free["kl_full_seq"] > 10 * held["kl_full_seq"] > 0
    assert free["kl_seq"] > 1.0
    assert free["reward"] > held["reward"]


@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_raises_a_reward_of_ones_own(tmp_path, names, seed):
    result = train(
        tiny_config(
            tmp_path / "run",
            seed=seed,
            corpus=names,
            reward=VOWELS,
            eval_every=0,
            ppo__iterations=15,
            ppo__batch_size=24,
            ppo__kl_coef=0.05,
            eval_prompts=64,
        )
    )
    assert result.policy["reward"] > result.reference["reward"] + 0.15
    assert result.policy["proxy"] > result.reference["proxy"] + 0.5
    assert np.isnan(result.policy["gold"])
    assert not (tmp_path / "run/reward_model/model.safetensors").exists()
    assert metrics(tmp_path / "run", "reward_model") == []  # there is nothing to train


def test_ones_own_reward_on_the_support_world(tmp_path):
    result = train(tiny_config(tmp_path / "run", reward=VOWELS))
    assert 0 <= result.policy["reward"] <= 1 and np.isfinite(result.policy["gold"])
    scale = json.loads((tmp_path / "run/reward_model/scale.json").read_text())
    assert scale["reward"] == VOWELS and 0 < scale["score_sd"] < 1


def test_given_pairs_train_the_reward_model(tmp_path):
    said = []
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    config = tiny_config(tmp_path / "run", pairs=pairs, reward_model__epochs=20)
    train(config, say=said.append)
    steps, heldout = (of(tmp_path / "run", "reward_model") for of in (updates, metrics))
    heldout = heldout[-1]
    assert heldout["heldout/accuracy"] == 1.0 and "heldout/gold_accuracy" not in heldout
    assert steps[-1]["loss/reward_model"] < 0.5 * steps[0]["loss/reward_model"]
    assert [line for line in said if "accuracy 1.000 on 4 held-out pairs" in line]  # 15 % of 30


def test_corpus_and_pairs_together(tmp_path, names):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    train(tiny_config(tmp_path / "run", corpus=names, pairs=pairs))
    assert metrics(tmp_path / "run", "reward_model")[-1]["heldout/accuracy"] >= 0
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    assert all("gold" not in row for row in samples)


def test_a_known_encoding_is_loaded_once_by_its_name(tmp_path, names, monkeypatch):
    """The table of a real one is not at hand everywhere: a stand-in answers to the name."""
    asked = []

    def stand_in(name):
        asked.append(name)
        return train_tokenizer(["kalomi trusen brinova"] * 3, vocab_size=270)

    monkeypatch.setattr(session_module.tokens, "load_tokenizer_by_name", stand_in)
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS, encoding="stand_in")
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after("PPO", 1))
    resume(config.out)
    assert asked == ["stand_in"]  # the folder has the table from then on
    assert load_model(config.out / "policy")[1].vocab_size == 270


def test_notes_about_the_corpus_are_said(tmp_path):
    (tmp_path / "names.txt").write_text("kalo\nmitru\nsenbri\nkalo\nnova\nmika\n")
    said = []
    config = tiny_config(tmp_path / "run", corpus=str(tmp_path / "names.txt"), reward=VOWELS)
    session_module.open_session(config, say=said.append)
    assert [line for line in said if "are there already" in line]


def test_adaptive_beta_follows_its_formula(finished):
    """T10: every beta from the one before and the KL that was measured with it."""
    rows = metrics(finished[0], "ppo")
    for before, after in zip(rows, rows[1:], strict=False):
        assert after["objective/kl_coef"] == adaptive_kl_coef(
            before["objective/kl_coef"],
            kl_seq=before["objective/kl"],
            target=0.05,
            horizon=100.0,
            n_episodes=12,
        )
    _, meta = load_state(finished[0] / "checkpoint")
    assert meta["kl_coef"] not in {row["objective/kl_coef"] for row in rows}  # the next one's


def test_stages_draw_from_streams_of_their_own(tmp_path, names):
    """Another SFT tosses other coins, and yet PPO asks the same prompts."""
    asked = []
    for size in (8, 9):
        config = tiny_config(
            tmp_path / f"{size}", corpus=names, reward=VOWELS, sft__batch_size=size
        )
        train(config)
        asked.append([row["prompt"] for row in read_jsonl(config.out / "samples.jsonl")])
    assert asked[0] == asked[1]
    found = differences(*(outcome(tmp_path / name) for name in ("8", "9")))
    assert {"metrics of sft", "samples.jsonl"} <= set(found) and "tiktoken.json" not in found


def test_evaluation_tosses_the_same_coins_for_every_policy(finished):
    out, result, _ = finished
    run = session_module.reopen_session(out)
    policy, reference = pipeline.load_models(run)
    score = run.score_with(pipeline.reward_stage(run, reference))
    for _ in range(2):  # an evaluation before it changes nothing
        metrics_again, samples = evaluate(run, policy, reference, score)
        assert metrics_again == pytest.approx(result.policy, nan_ok=True)
        assert samples.responses == result.policy_samples.responses
    same = {**tree_copy(reference), "value_head": policy["value_head"]}
    assert evaluate(run, same, reference, score)[1].responses == result.reference_samples.responses


def test_evaluation_is_at_the_temperature_of_training(finished):
    run = session_module.reopen_session(finished[0])
    policy, reference = pipeline.load_models(run)
    score = run.score_with(pipeline.reward_stage(run, reference))
    entropy = []
    for temperature in (0.2, 1.0):
        config = changed(run.config, {"ppo.temperature": temperature})
        at = dataclasses.replace(run, config=config)
        entropy.append(evaluate(at, policy, reference, score)[0]["entropy"])
    assert entropy[0] < 0.9 * entropy[1]


def test_more_evaluation_prompts_than_there_are_go_round(tmp_path, names):
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS, eval_prompts=5)
    run, reference, score = open_ready(config)
    head = {"w": np.zeros((8, 1), np.float32), "b": np.zeros(1, np.float32)}
    _, samples = evaluate(run, {**reference, "value_head": head}, reference, score)
    heldout = run.world.heldout_prompts
    assert 0 < len(heldout) < 5 and samples.prompts == (heldout * 5)[:5]


def test_every_configuration_field_survives_the_folder(finished):
    out, _, _ = finished
    stored = (out / "config.toml").read_text()
    for path, _ in leaves(load_config(out / "config.toml")):
        assert f"{path.split('.')[-1]} = " in stored, path


def test_a_run_that_was_never_opened_leaves_its_folder_free(tmp_path, monkeypatch, names):
    """Killed before config.toml: the folder is free for another try."""

    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS)
    with monkeypatch.context() as patch:
        crash_at(patch, session_module, "save_config", 1, after=False)
        with pytest.raises(KeyboardInterrupt):
            session_module.open_session(config)
    session_module.open_session(config)


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    text = (copy / "config.toml").read_text()
    write_whole(copy / "config.toml", text.replace("d_model = 8", "d_model = 16").encode())
    with pytest.raises(InputError, match="expected model.d_model = 8, .* got 16: set it back"):
        resume(copy)
