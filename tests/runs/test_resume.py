"""A run folder between two sessions: who is at work in it, what may change, where it goes on."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import (
    VOWELS,
    changed,
    differences,
    files_under,
    interrupted_after,
    metrics,
    outcome,
    refusal,
    resume,
    tiny_config,
    train,
    write_pairs,
)

import minirlhf
from minirlhf import crew, disk, memory, workers
from minirlhf.disk import locked
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig
from minirlhf.runs import checkpoint, limits, pipeline
from minirlhf.runs import folder as run_folder
from minirlhf.runs import session as session_module
from minirlhf.runs.config import TrainConfig, load_config, save_config
from minirlhf.runs.log import read_metrics
from minirlhf.train.optimizer import Optimizer
from minirlhf.tree import tree_leaves

SMALL = {"vocab_size": 768, "n_ctx": 64, "n_layer": 2, "n_head": 4, "d_model": 64}
GPT2 = {"vocab_size": 50260, "n_ctx": 1024, "n_layer": 12, "n_head": 12, "d_model": 768}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, names):
    """A finished run, which no test changes."""
    config = tiny_config(tmp_path_factory.mktemp("run") / "run", corpus=names, reward=VOWELS)
    train(config)
    return config.out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def edit(folder, **changes):
    """Other settings in config.toml, as with an editor."""
    path, changes = folder / "config.toml", {k.replace("__", "."): v for k, v in changes.items()}
    save_config(path, changed(load_config(path), changes))


# --- one process at a time


def in_a_process(act):
    """Fork a process that holds a lock until it is killed: its number, once it has it."""
    ready, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act(lambda: os.write(ours, b"1"))
        finally:
            os._exit(1)
    os.close(ours)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    return pid


def holding(folder):
    def act(ready):
        with locked(folder):
            ready()
            time.sleep(60)

    return act


def ended(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_second_process_is_refused_and_told_who_is_first(run, capsys, tmp_path, names):
    pid = in_a_process(holding(run))
    try:
        before = files_under(run)
        said = f"{run}: expected a run that nobody is at work on; process {pid} is"
        assert said in refusal(capsys, "resume", run)
        fresh = tiny_config(tmp_path / "fresh", corpus=names, reward=VOWELS)
        shutil.copytree(run, fresh.out)
        other = in_a_process(holding(fresh.out))
        (fresh.out / "config.toml").unlink()  # it has not got as far as that
        with pytest.raises(InputError, match=f"process {other} is"):
            train(fresh)
        ended(other)
        minirlhf.open_run(run).sample("k")  # who looks needs no lock
        assert files_under(run) == before
    finally:
        ended(pid)
    resume(run)  # the lock has died with its process


def stay(path):
    """A worker's task: say who it is, and be busy."""
    path.write_text(str(os.getpid()))
    time.sleep(60)


@pytest.mark.skipif(not workers.CAN_FORK, reason="workers are threads here")
def test_a_worker_that_outlives_its_parent_keeps_no_lock(run):
    """Only the parent is killed, while its worker is busy."""
    busy = run.parent / "busy"

    def act(ready):
        with locked(run):
            crew._Processes(1).map(stay, [busy])
            while not (busy.exists() and busy.read_text()):
                time.sleep(0.005)
            ready()
            time.sleep(60)

    ended(in_a_process(act))
    worker = int(busy.read_text())
    with locked(run):
        os.kill(worker, 0)  # it is there still
    os.kill(worker, signal.SIGKILL)


def test_a_lock_is_let_go_whatever_happens(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        with pytest.raises(InputError, match=f"process {os.getpid()} is"), locked(tmp_path):
            pass
        raise ZeroDivisionError
    with locked(tmp_path):
        pass
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="expected a place to write to"), locked(tmp_path):
        pass
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_disk_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_numbered_folders_are_never_shared(tmp_path):
    code = "from minirlhf.disk import new_numbered_folder as f\nfor _ in range(20): print(f('x'))"
    command = [sys.executable, "-c", code]
    both = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    made = [line for process in both for line in process.communicate()[0].splitlines()]
    assert len(made) == len(set(made)) == 40


def test_a_numbered_folder_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match="expected a place to write to"):
        disk.new_numbered_folder("x")


# --- every stage goes on from its checkpoint


@pytest.fixture
def at_every_step(monkeypatch):
    """A checkpoint of the first two stages after each of their steps."""
    monkeypatch.setattr(pipeline, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "CHECKPOINT_SHARE", float("inf"))


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """A run whose pairs are samples of its own."""
    config = tiny_config(tmp_path_factory.mktemp("annotated") / "run", reward_model__epochs=4)
    train(config)
    return config


@pytest.mark.parametrize(
    "title, stops",
    [
        ("supervised fine-tuning", (4,)),
        ("supervised fine-tuning", (1, 5, 6)),
        ("reward model", (3,)),  # two batches are an epoch
        ("reward model", (1, 4, 7)),
    ],
)
def test_a_stage_goes_on_where_it_was(tmp_path, annotated, at_every_step, title, stops):
    config, begun = changed(annotated, {"out": tmp_path / "run"}), []

    def stopping_at(step):
        def track(items, name):
            if name == title:
                begun.append(items.start)
            for item in items:
                if name == title and item == step:
                    raise KeyboardInterrupt
                yield item

        return track

    stage = {"reward model": "reward_model"}.get(title, "sft")
    where = f"in stage {stage}: {stops[0]} of . steps made, {stops[0]} in the checkpoint; "
    with pytest.raises(KeyboardInterrupt, match=where + "`minirlhf resume .*/run` goes on"):
        train(config, track=stopping_at(stops[0]))
    for step in stops[1:]:
        with contextlib.suppress(KeyboardInterrupt):
            resume(config.out, track=stopping_at(step))
    resume(config.out, track=stopping_at(None))
    expected = [0, *stops]
    assert begun == expected[: len(begun)] and len(begun) >= 2  # no step was made again
    assert differences(outcome(annotated.out), outcome(config.out)) == []
    assert sorted(p.name for p in (config.out / "checkpoint").iterdir()) == [
        "config.toml",
        "state.safetensors",  # of PPO: the others have left their results
    ]


def test_what_was_held_out_is_measured_as_if_nothing_had_been(
    tmp_path, names, at_every_step, monkeypatch
):
    """Stopped right after a look, or before it: its line comes once."""
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS, stages="sft")
    train(changed(config, {"out": tmp_path / "whole"}))
    loss, looks = pipeline.sft_loss, []

    def stopping(*arguments, **more):
        looks.append(0)
        if len(looks) in (3, 5):
            raise KeyboardInterrupt
        return loss(*arguments, **more)

    monkeypatch.setattr(pipeline, "sft_loss", stopping)
    with pytest.raises(KeyboardInterrupt, match="in stage sft: 2 of 6 steps made, 2 in the chec"):
        train(config, track=interrupted_after("supervised fine-tuning", 4))
    for steps in (1, 3, 9):
        with contextlib.suppress(KeyboardInterrupt):
            session = session_module.reopen_session(
                config.out, track=interrupted_after("supervised fine-tuning", steps)
            )
            session.config = changed(session.config, {"stages": "sft"})
            pipeline.run_stages(session)
    assert metrics(config.out) == metrics(tmp_path / "whole")


def test_checkpoints_of_the_first_stages_take_a_small_share_of_the_time(
    tmp_path, names, monkeypatch
):
    """By a clock of which a save takes 1 s and a step 4 s."""
    now, saves = [0.0], []

    def save(session, stage, optimizer, done, **more):
        saves.append(done)
        now[0] += 1.0

    def track(items, name):
        for item in items:
            now[0] += 4.0
            yield item

    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run_folder, "save_state", save)
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS, sft__steps=40, stages="sft")
    train(config, track=track)
    assert saves == [3, 16, 29]  # after 10 s; then 50 s, as saving took 1 s: two per cent


def test_damaged_headers_of_a_state_are_one_sentence(run):
    """Bytes of the header, and values in it: believed only if whole."""
    session = session_module.reopen_session(run)
    params = pipeline.load_models(session)[0]
    settings = session.config.ppo
    total = settings.iterations * settings.updates_per_iteration
    optimizer = Optimizer(params, settings.optimizer, total_steps=total)
    path = run / "checkpoint/state.safetensors"
    data, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(data[:8], "little")
    run_folder.load_state(session, "ppo", optimizer, settings.iterations)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for at in rng.integers(header, size=rng.integers(1, 4)):
            damaged[at] = rng.choice([damaged[at] ^ 1, *b'0"{}[]:,x\xff'])
        path.write_bytes(damaged)
        log = files_under(run)["metrics.jsonl"]
        try:
            run_folder.load_state(session, "ppo", optimizer, settings.iterations)
        except InputError as error:
            refused += 1
            assert str(run) in str(error) and len(str(error)) < 600
            assert files_under(run)["metrics.jsonl"] == log
    assert refused > 375  # a digit of a random stream's state may be another one


# --- settings that were changed in between


def test_ppo_goes_on_for_longer(tmp_path, names):
    """With a constant learning rate it is the run that had so many from the start."""
    constant = {"ppo__optimizer__schedule": "constant", "corpus": names, "reward": VOWELS}
    train(tiny_config(tmp_path / "long", ppo__iterations=5, **constant))
    train(tiny_config(tmp_path / "run", ppo__iterations=2, **constant))
    said = []
    resume(tmp_path / "run", iterations=5, say=said.append)
    assert differences(outcome(tmp_path / "long"), outcome(tmp_path / "run")) == []
    assert load_config(tmp_path / "run/config.toml").ppo.iterations == 5
    assert "note: the learning rate now follows its schedule to iteration 5" in said
    before = files_under(tmp_path / "run")
    with pytest.raises(InputError, match="expected at least the 5 that are done; got 4"):
        resume(tmp_path / "run", iterations=4)
    assert files_under(tmp_path / "run") == before


def test_a_reference_that_moves_goes_on_where_it_was(tmp_path, names):
    """With K = 2 and a checkpoint after each iteration: also in the middle of a stretch."""
    config = {"ppo__iterations": 5, "ppo__reset_reference_every": 2, "ppo__kl_coef": 5.0}
    config |= {"corpus": names, "reward": VOWELS, "ppo__advantages": "batch"}
    train(tiny_config(tmp_path / "straight", **config))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(tmp_path / "run", **config), track=interrupted_after("PPO", 3))
    resume(tmp_path / "run")
    assert differences(outcome(tmp_path / "straight"), outcome(tmp_path / "run")) == []
    rows = [row for row in read_metrics(tmp_path / "run") if row["stage"] == "ppo"]
    from_start = rows[3]["eval/kl_seq"]  # measured every second iteration
    assert abs(rows[2]["objective/kl"]) < 1e-4 < abs(from_start)  # after a reset it begins at 0
    assert abs(rows[3]["objective/kl"]) > 1e-4


def test_a_run_that_was_stopped_on_its_way_to_more_goes_on(run, names, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        resume(run, iterations=6, track=interrupted_after("PPO", 1))
    assert not (run / "result.json").exists()
    said = []
    resume(run, say=said.append)
    assert (
        any(line.endswith("stages to run: ppo") for line in said) and len(metrics(run, "ppo")) == 6
    )


def test_a_linear_learning_rate_decays_to_the_new_end(run, names, tmp_path):
    minirlhf.resume(run, iterations=6, progress=False)
    rates = [row["lr"] for row in metrics(run, "ppo")]
    train(tiny_config(tmp_path / "long", corpus=names, reward=VOWELS, ppo__iterations=6))
    from_the_start = [row["lr"] for row in metrics(tmp_path / "long", "ppo")]
    assert rates[3:] == from_the_start[3:] and rates[:3] != from_the_start[:3]


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"ppo__kl_coef": 5.0, "ppo__iterations": 6}, "ppo.kl_coef = 0.2"),
        ({"ppo__optimizer__eps": 1e-3}, "ppo.optimizer.eps = "),
        ({"ppo__optimizer__learning_rate": 1e-3}, "ppo.optimizer.learning_rate = "),  # is finished
        ({"sft__steps": 9}, "sft.steps = 6"),
        ({"sft__optimizer__learning_rate": 1e-3}, "sft.optimizer.learning_rate = "),
        ({"reward_model__n_normalize": 9}, "reward_model.n_normalize = 24"),
        ({"ppo__temperature": 0.5}, "ppo.temperature = 1.0"),
        ({"model__n_head": 1}, "model.n_head = 2"),
        ({"vocab_size": 290}, "vocab_size = 300"),
        ({"max_response_tokens": 9}, "max_response_tokens = 10"),
    ],
)
def test_a_setting_by_which_something_was_made_is_refused_by_name(run, capsys, changes, name):
    edit(run, **changes)
    before = files_under(run)
    message = refusal(capsys, "resume", run)
    assert f"{run / 'config.toml'}: expected {name}" in message and "set it back" in message
    assert files_under(run) == before


def test_what_made_nothing_yet_may_change(tmp_path, names):
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS, stages="sft,reward")
    train(config)
    edit(config.out, ppo__kl_coef=0.7, ppo__optimizer__eps=1e-4, checkpoint_every=2, eval_every=0)
    resume(config.out)
    assert metrics(config.out, "ppo")[0]["objective/kl_coef"] == 0.7
    began = load_config(config.out / session_module.BEGAN)
    assert began == load_config(config.out / "config.toml")
    edit(config.out, ppo__kl_coef=0.2)  # from now on it is what the policy was made with
    with pytest.raises(InputError, match=r"expected ppo.kl_coef = 0.7"):
        resume(config.out)


def test_another_number_of_workers_is_said(run):
    said = []
    edit(run, workers=2)
    resume(run, say=said.append)
    assert [line for line in said if line.startswith("note: workers is 2 now: sums are rounded")]


def test_what_was_edited_is_noted(run):
    said = []
    edit(run, eval_every=7, checkpoint_every=3)
    resume(run, say=said.append)
    note = "eval_every 2 -> 7, checkpoint_every 1 -> 3 from here on"
    assert f"note: {run / 'config.toml'}: {note}" in said
    said.clear()
    resume(run, say=said.append)
    assert not [line for line in said if "from here on" in line]


@pytest.mark.parametrize(("when", "kept"), [("before", 1), ("after", 2)])
def test_ctrl_c_while_a_checkpoint_is_written_tells_what_is_in_it(
    tmp_path, names, monkeypatch, when, kept
):
    save, calls = checkpoint.save_state, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 2 and when == "before":
            raise KeyboardInterrupt
        save(*arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_state", stopped)
    config, said = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS), []
    with pytest.raises(KeyboardInterrupt, match=f"2 of 3 iterations made, {kept} in the check"):
        train(config)
    monkeypatch.undo()
    resume(config.out, say=said.append)
    assert f"stage ppo goes on after {kept} of 3 iterations" in said


def test_the_number_of_workers_is_settled_at_the_start(tmp_path, names, monkeypatch):
    """So a resume on other cores adds up in the same order."""
    monkeypatch.setattr(crew, "usable_cores", lambda: 3)
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS, workers=0)
    assert session_module.open_session(config).config.workers == 3
    monkeypatch.setattr(crew, "usable_cores", lambda: 1)
    assert session_module.reopen_session(config.out).config.workers == 3
    assert load_config(config.out / "config.toml").workers == 3


# --- what is said


def test_the_start_says_what_will_be_done(tmp_path, names):
    said = []
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS)
    with pytest.raises(KeyboardInterrupt):
        train(config, say=said.append, track=interrupted_after("PPO", 1))
    session = session_module.reopen_session(config.out)
    n = sum(leaf.size for leaf in tree_leaves(checkpoint.load_model(config.out / "reference")[0]))
    banner = next(line for line in said if line.startswith("run "))
    assert banner.startswith(f"run {config.out}: {n:,} parameters; ")
    assert f"{len(session.world.demonstrations)} demonstrations, " in banner
    assert f"the reward {VOWELS}; stages to run: sft, reward, ppo" in banner
    said.clear()
    resume(config.out, say=said.append)
    assert said[-3].endswith("stages to run: ppo")
    assert said[-2] == "stage ppo goes on after 1 of 3 iterations"
    said.clear()
    resume(config.out, say=said.append)
    assert said[-2].endswith("stages to run: none, all are done")
    pairs = tiny_config(tmp_path / "pairs", pairs=write_pairs(tmp_path / "pairs.jsonl"))
    assert "; 30 pairs in all; " in pipeline.banner(session_module.open_session(pairs))


def test_a_refusal_in_a_run_says_how_to_go_on(tmp_path, names, monkeypatch):
    how = "; then go on with `minirlhf resume '{folder}'`"

    def said(name, stop):
        def fail(*_):
            raise stop

        monkeypatch.setattr(pipeline, "reference_stage", fail)
        folder = tmp_path / name
        with pytest.raises(type(stop)) as refused:
            train(tiny_config(folder, corpus=names, reward=VOWELS))
        return str(refused.value).replace(str(folder), "{folder}")

    mend = "reward: expected --this; got that: mend it"
    assert said("my run", InputError(mend)) == mend + how
    assert said("my -- run", InputError(mend, resume=None)) == mend
    flag = how[:-1] + " --accept-changed-reward`"
    assert said("another run", InputError(mend, resume="reward")) == mend + flag
    stopped = said("last run", KeyboardInterrupt())
    assert stopped == "in stage sft; `minirlhf resume '{folder}'` goes on"


def test_a_part_says_how_it_goes_on(tmp_path, names, capsys):
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS, stages="sft")
    part = minirlhf.train(config, progress=False)
    assert part.sample("k") == part.sample("k", reference=True)
    run = minirlhf.resume(config.out, progress=False)
    assert run.sample("k") and load_config(config.out / "config.toml").stages == "all"


def test_a_metrics_line_without_a_stage_stops_a_resume(run, capsys):
    """As a bad sector leaves it: a line of the same length that is JSON and says something else."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b'{"x": "' + b"y" * (len(lines[1]) - 10) + b'"}\n'
    path.write_bytes(b"".join(lines))
    assert f"{path}:2: expected a line with its step" in refusal(capsys, "resume", run)


def test_a_link_in_the_place_of_the_checkpoint_is_refused(run, finished, capsys):
    """What lies behind it is somebody else's: it was deleted once."""
    other = shutil.copytree(run, run.parent / "other")
    (other / "checkpoint/reward_model").mkdir()
    before = files_under(other)
    shutil.rmtree(run / "checkpoint")
    (run / "checkpoint").symlink_to(other / "checkpoint")
    assert "checkpoint" in refusal(capsys, "resume", run)
    assert files_under(other) == before and (other / "checkpoint/reward_model").exists()


def test_settings_that_were_changed_while_one_waited_are_not_undone(run):
    waiting = session_module.reopen_session(run)
    edit(run, eval_every=7)
    resume(run)
    with pytest.raises(InputError, match="another process has changed them: try it again"):
        pipeline.run_stages(waiting)
    assert load_config(run / "config.toml").eval_every == 7


# --- memory


GIB = 1 << 30


@pytest.mark.parametrize(
    ("changes", "gpt", "longest", "gib", "fits"),
    [
        ({}, {}, (32, 32), 1, True),  # the default run, many cores
        ({"workers": 64}, {}, (32, 32), 2, True),
        ({"workers": 2000}, {}, (32, 32), 8, False),
        ({}, {"n_ctx": 65536, "d_model": 16}, (8, 8), 1, True),  # positions are not tokens
        ({}, {"n_ctx": 840}, (800, 40), 2, True),  # drawn in pieces
        ({"workers": 2}, GPT2, (64, 64), 8, True),  # 124M within 8 GB
        ({"workers": 2}, GPT2, (64, 64), 2, False),
        ({"eval_prompts": 10**9}, {}, (32, 32), 8, False),
        ({}, {"d_model": 10**6}, (32, 32), 64, False),
    ],
)
def test_a_run_is_refused_where_it_does_not_fit_and_only_there(
    monkeypatch, changes, gpt, longest, gib, fits
):
    monkeypatch.setattr(memory, "available_memory", lambda: gib * GIB)
    config = TrainConfig(**{"workers": 16, "pairs": "p", **changes})
    model = GPTConfig(**{**SMALL, "n_ctx": max(64, sum(longest)), **gpt})
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match="fit into the mem"):
        limits.check_run(config, model, longest)
