"""A reward of one's own in a run: whose code runs, whether it is still the same, its numbers."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from tiny_run import (
    VOWELS,
    as_flags,
    call,
    changed,
    differences,
    files_under,
    interrupted_after,
    metrics,
    outcome,
    refusal,
    tiny_config,
    train,
    write_pairs,
)

import minirlhf
from minirlhf.errors import InputError
from minirlhf.runs import pipeline
from minirlhf.runs import session as session_module
from minirlhf.runs.config import load_config, save_config
from minirlhf.runs.own_reward import fingerprint
from minirlhf.train.settings import PPOConfig
from minirlhf.worlds.rewards import vowel_share

COUNT = "def count(text):\n    return text.count('a')\n"
SCORE = ("--prompt", "k", "--response", "alo")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, names):
    """A run with a reward in the file beside it; no test changes either."""
    home = tmp_path_factory.mktemp("home")
    (home / "mine.py").write_text(COUNT)
    config = tiny_config(home / "run", corpus=names, reward=f"{home}/mine.py:count")
    train(config)
    return home


@pytest.fixture
def home(finished, tmp_path, monkeypatch):
    """A copy of it, the reward too: what one does to it, one does to nobody else."""
    copy = shutil.copytree(finished, tmp_path / "home")
    config = changed(load_config(copy / "run/config.toml"), {"reward": f"{copy}/mine.py:count"})
    save_config(copy / "run/config.toml", config)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "state/minirlhf").mkdir(parents=True)
    named = [config.reward, fingerprint(config.reward)]
    (tmp_path / "state/minirlhf/rewards.jsonl").write_text(json.dumps(named) + "\n")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """The machine of somebody who has named nothing yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other state"))


def unfinished(run):
    """As if it had stopped before PPO."""
    shutil.rmtree(run / "policy")
    for name in ("result.json", "checkpoint/state.safetensors"):
        (run / name).unlink()


# --- whose code it is


FOREIGN = {  # what a stranger's config.toml may name: here and there {run}, with code in it
    "a file in the folder": "{run}/evil.py:f",
    "a file beside the caller": "evil.py:f",
    "a module beside the caller": "evil:f",
    "a module in a package": "package.evil:f",
    "a link": "{run}/link.py:f",
    "a program": "os:system",
    "our own import": "minirlhf.worlds.rewards:load_reward",
    "no name": "{run}/evil.py",
}


@pytest.mark.parametrize("reward", FOREIGN.values(), ids=FOREIGN)
def test_a_strangers_run_runs_no_code_of_theirs(home, capsys, monkeypatch, reward):
    run, mark = home / "run", home / "executed"
    code = f"open({str(mark)!r}, 'w')\ndef f(text): return float(len(text))\n"
    (run / "package").mkdir()
    for name in ("evil.py", "package/__init__.py", "package/evil.py"):
        (run / name).write_text(code)
    (run / "link.py").symlink_to(run / "evil.py")
    named = reward.format(run=run)
    text = (run / "config.toml").read_text()
    text = re.sub(r"(?m)^reward = .*", f"reward = {json.dumps(named)}", text)
    (run / "config.toml").write_text(text)
    world = json.loads((run / "world.json").read_text())
    monkeypatch.chdir(run)
    # with whatever digest: of the file itself, none, that of a reward that the user did name
    for sha256 in (fingerprint(named), "", None, world["reward_sha256"]):
        (run / "world.json").write_text(json.dumps(world | {"reward_sha256": sha256}))
        before = files_under(run)
        assert call(capsys, "sample", run, "--prompt", "k")[0] == 0
        status, out, _ = call(capsys, "score", run, *SCORE)
        assert status == 0 and "no score: " in out and f"trust it, add --reward {named}" in out
        assert "nan" not in out
        for command in (("resume", run), ("train", "--config", run / "config.toml")):
            message = refusal(capsys, *command)
            assert "expected a reward that you named" in message and named in message
        opened = minirlhf.open_run(run)
        assert opened.sample("k") and np.isnan(opened.score("k", "alo").score)
        with pytest.raises(InputError, match="a reward that you named"):
            minirlhf.resume(run, progress=False)
        assert files_under(run) == before
    assert not mark.exists()


def test_code_of_a_run_from_elsewhere_runs_once_it_is_named(home, elsewhere, capsys):
    run, reward = home / "run", f"{home}/mine.py:count"
    unfinished(run)
    message = refusal(capsys, "resume", run)
    assert message.startswith(f"{run}: expected a reward that you named; its own is code that")
    assert message.endswith(f": if you trust it, add --reward {reward}")
    assert call(capsys, "resume", run, "--reward", "mine.py:count")[0] == 0
    assert call(capsys, "resume", run)[0] == 0  # from then on it is the user's own
    assert "your reward" in call(capsys, "score", run, *SCORE)[1]
    (home / "mine.py").write_text(COUNT.replace("'a'", "'b'"))  # but no other code is
    assert "no score: " in call(capsys, "score", run, *SCORE)[1]


def test_a_configuration_of_a_run_from_elsewhere_too(home, elsewhere, capsys):
    flags = ["train", "--config", home / "run/config.toml", "--out", home / "again"]
    assert "if you trust it, add --reward" in refusal(capsys, *flags)
    assert call(capsys, *flags, "--reward=mine.py:count")[0] == 0
    assert differences(outcome(home / "run"), outcome(home / "again")) == [
        "reward_model/scale.json"  # which has the name
    ] or outcome(home / "run") == outcome(home / "again")
    save_config(home / "my.toml", changed(load_config(home / "run/config.toml"), {"out": None}))
    assert call(capsys, "train", "--config", home / "my.toml", "--out", home / "b")[0] == 0


def test_what_is_minirlhfs_own_needs_no_name(tmp_path, names, elsewhere, capsys):
    config = tiny_config(tmp_path / "run", corpus=names, reward="length:4")
    train(config)
    assert not (tmp_path / "other state").exists()
    for command in (("resume", config.out), ("score", config.out, *SCORE)):
        status, out, _ = call(capsys, *command)
        assert status == 0 and "your reward" in out


def test_where_nothing_can_be_remembered_the_name_is_asked_for(tmp_path, names, monkeypatch):
    (tmp_path / "mine.py").write_text(COUNT)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    reward = f"{tmp_path}/mine.py:count"
    run = minirlhf.train(tiny_config(tmp_path / "run", corpus=names, reward=reward), progress=False)
    assert run.score("k", "alo").reward == pytest.approx(1.0)  # it was named just now
    with pytest.raises(InputError, match="if you trust it, add --reward"):
        minirlhf.resume(run.folder, progress=False)
    minirlhf.resume(run.folder, reward=reward, progress=False)


def test_a_name_is_remembered_once(home, capsys, tmp_path):
    kept = tmp_path / "state/minirlhf/rewards.jsonl"
    before = kept.read_text()
    for flags in ((), ("--reward", "mine.py:count")):
        assert call(capsys, "resume", home / "run", *flags)[0] == 0
    assert kept.read_text() == before and before.count("\n") == 1


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[]\n" * 3, b""])
def test_a_damaged_memory_forgets(home, capsys, tmp_path, content):
    (tmp_path / "state/minirlhf/rewards.jsonl").write_bytes(content)
    assert "if you trust it, add --reward" in refusal(capsys, "resume", home / "run")
    assert call(capsys, "resume", home / "run", "--reward", "mine.py:count")[0] == 0


# --- whether it is the same


def test_a_changed_reward_is_refused_unless_it_is_accepted(home, capsys):
    run = home / "run"
    unfinished(run)
    (home / "mine.py").write_text(f"raise SystemExit('it ran')\n{COUNT}")
    before = files_under(run)
    message = refusal(capsys, "resume", run)
    assert "has changed" in message and "--accept-changed-reward" in message  # it did not run
    assert "has changed" in refusal(capsys, "resume", run, "--reward", "mine.py:count")
    assert files_under(run) == before
    (home / "mine.py").write_text(f"{COUNT}# the same numbers\n")
    assert "has changed" in refusal(capsys, "resume", run)
    assert call(capsys, "resume", run, "--accept-changed-reward")[0] == 0
    assert call(capsys, "resume", run)[0] == 0  # it is the run's own now
    assert "your reward 1" in call(capsys, "score", run, *SCORE)[1]


def test_a_changed_reward_gives_no_score_until_it_is_accepted(home, capsys):
    run = home / "run"
    (home / "mine.py").write_text(COUNT.replace("'a'", "'l'"))
    before = files_under(run)
    status, out, _ = call(capsys, "score", run, *SCORE)
    how = f"it has changed: restore it, or take it as it is with `minirlhf resume {run} --accept"
    assert status == 0 and "no score: " in out and how in out
    assert files_under(run) == before
    assert call(capsys, "resume", run, "--accept-changed-reward")[0] == 0
    assert minirlhf.open_run(run).score("k", "alo").reward == pytest.approx(1.0)
    result = json.loads((run / "result.json").read_text())  # the policy is judged by it
    assert result["policy"]["reward"] != json.loads(before["result.json"])["policy"]["reward"]


def test_another_function_of_the_file_is_a_change(home, capsys):
    (home / "mine.py").write_text(f"{COUNT}\n\ndef other(text):\n    return 1.0\n")
    flags = ("--reward", "mine.py:other")
    assert "has changed" in refusal(capsys, "resume", home / "run", *flags)
    assert len({fingerprint(f"{home}/mine.py:{name}") for name in ("count", "other")}) == 2


def test_a_moved_reward_stops_only_what_needs_it(home, capsys):
    run = home / "run"
    before = call(capsys, "sample", run, "--prompt", "k")
    score = call(capsys, "score", run, *SCORE)[1]
    (home / "sub").mkdir()
    (home / "mine.py").rename(home / "sub/moved.py")
    assert call(capsys, "sample", run, "--prompt", "k") == before
    status, out, _ = call(capsys, "score", run, *SCORE)
    assert status == 0 and "no score: reward: expected a Python file" in out
    assert out.splitlines()[: out.count("\n") - 3] == score.splitlines()[: out.count("\n") - 3]
    assert "--reward where it is now" in refusal(capsys, "resume", run)
    new = ("--reward", "sub/moved.py:count")
    assert call(capsys, "score", run, *SCORE, *new)[1] == score
    assert call(capsys, "resume", run, *new)[0] == 0
    assert load_config(run / "config.toml").reward == f"{home}/sub/moved.py:count"
    assert call(capsys, "score", run, *SCORE)[1] == score  # it is known there now
    assert call(capsys, "resume", run)[0] == 0


def test_a_changed_list_of_words_is_a_changed_reward(tmp_path, names, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("alo\nmitru\n")
    digest = fingerprint("words:list.txt")
    (tmp_path / "moved.txt").write_text("alo\nmitru\n")
    assert fingerprint("words:moved.txt") == digest
    (tmp_path / "list.txt").write_text("alo\n")
    assert fingerprint("words:list.txt") != digest
    assert fingerprint("length:3") != fingerprint("length:4") != ""


def test_a_function_of_python_is_the_same_by_its_source(tmp_path, names):
    def first(text):
        return float(text.count("a"))

    def second(text):
        return float(text.count("o"))

    class Counter:
        def __call__(self, text):
            return float(text.count("a"))

    second.__qualname__ = first.__qualname__
    assert fingerprint(first) != fingerprint(second) != ""
    assert fingerprint(Counter()) == fingerprint(Counter()) != ""
    assert fingerprint(len) == ""  # has no source: it cannot be compared
    assert fingerprint(vowel_share) == fingerprint(VOWELS)
    run = minirlhf.train(tiny_config(tmp_path / "run", corpus=names), reward=first, progress=False)
    with pytest.raises(InputError, match="python:.*first: expected the reward that the run began"):
        minirlhf.resume(run.folder, reward=second, progress=False)
    minirlhf.resume(run.folder, reward=second, accept_changed_reward=True, progress=False)
    minirlhf.resume(run.folder, reward=second, progress=False)


def test_a_run_with_a_reward_model_has_no_reward_to_name(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", pairs=write_pairs(tmp_path / "pairs.jsonl"))
    train(config)
    assert "leave out --reward" in refusal(capsys, "resume", config.out, "--reward", "length")
    assert "reward_sha256" not in json.loads((config.out / "world.json").read_text())
    assert "your reward" not in call(capsys, "score", config.out, *SCORE)[1]


def test_a_fork_has_the_reward_of_its_run(home, capsys):
    fork = session_module.fork_run(home / "run", home / "fork", ppo=PPOConfig(iterations=1))
    assert call(capsys, "resume", fork)[0] == 0


# --- a broken one is told, and how to go on


def test_it_is_asked_before_anything_is_done(home, names, monkeypatch):
    monkeypatch.setattr(pipeline, "reference_stage", lambda session: 1 / 0)
    for body in ("1 / 0", "'a'", "float('nan')", "exit()", "[1]"):
        (home / "broken.py").write_text(f"def f(texts):\n    return {body}\n")
        config = tiny_config(home / "new", corpus=names, reward="broken.py:f")
        with pytest.raises(InputError, match="broken.py:f: expected .*: correct the function$"):
            train(config)
        assert not (home / "new").exists()


def test_what_it_is_given_and_that_it_is_constant_is_noted(home, names):
    said = []
    (home / "new.py").write_text("def same(reply_text):\n    return 2\n")
    config = tiny_config(home / "other", corpus=names, reward=f"{home}/new.py:same")
    session_module.open_session(config, say=said.append)
    notes = [line for line in said if line.startswith(f"note: {config.reward}: ")]
    assert "gets the text, prompt and reply together, as reply_text" in notes[0]
    assert notes[1].endswith("gave 2 to each of the first 4 texts") and len(notes) == 2
    said.clear()
    (home / "new.py").write_text("def same(response):\n    return len(response)\n")
    session_module.open_session(changed(config, {"out": home / "more"}), say=said.append)
    assert not [line for line in said if config.reward in line]


def test_what_takes_long_is_said_before(home, names):
    said = []
    config = tiny_config(home / "other", corpus=names, reward=f"{home}/mine.py:count")
    train(config, say=lambda line: said.append((line, files_under(config.out).keys())))
    lines, made = zip(*said, strict=True)
    scale = lines.index("scaling the reward on 24 samples of the reference")
    last = lines.index("evaluating reference and policy, 12 replies of each")
    assert "reward_model/scale.json" not in made[scale] and "result.json" not in made[last]


def test_before_ppo_there_is_no_score_of_ones_own_reward(home, names, capsys):
    config = tiny_config(home / "other", corpus=names, reward=f"{home}/mine.py:count", stages="sft")
    train(config)
    out = call(capsys, "score", config.out, *SCORE)[1]
    assert "no score: the run has no scale of your reward yet" in out


def test_a_run_of_a_corpus_alone_gets_its_reward_later(home, names, capsys, monkeypatch):
    config = tiny_config(home / "other", corpus=names, stages="sft")
    with pytest.raises(InputError, match="got neither"):
        train(changed(config, {"stages": "sft,reward"}))
    status, out, err = call(capsys, "train", *as_flags(config))
    assert status == 0 and "; no preferences yet; stages to run: sft" in err
    assert f"done: sft; `minirlhf resume {config.out} --reward ..` goes on" in out
    assert call(capsys, "sample", config.out, "--prompt", "k")[0] == 0
    for _ in range(2):
        message = refusal(capsys, "resume", config.out)
        assert f"go on with `minirlhf resume {config.out} --reward ..` or train" in message
    monkeypatch.setattr(pipeline, "ppo_stage", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(capsys, "resume", config.out, "--reward", f"{home}/mine.py:count")[0] == 130
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(home.parent / "state"))
    assert call(capsys, "resume", config.out)[0] == 0  # it is the run's own by now
    whole = tiny_config(home / "whole", corpus=names, reward=f"{home}/mine.py:count")
    train(whole)
    assert differences(outcome(config.out), outcome(whole.out)) == []


def test_an_error_in_training_says_how_to_go_on(home, names, capsys):
    """And it is so."""
    fuse = home / "fuse"
    code = f"import os\n\n\ndef count(text):\n    if os.path.exists({str(fuse)!r}):\n"
    (home / "mine.py").write_text(f"{code}        raise ValueError('no')\n    return len(text)\n")
    out = home / "a new run"
    config = tiny_config(out, corpus=names, reward="mine.py:count")
    session = session_module.open_session(config, track=interrupted_after("PPO", 1, SystemExit))
    with pytest.raises(SystemExit):
        pipeline.run_stages(session)
    fuse.touch()
    message = refusal(capsys, "resume", out)
    assert f"ValueError in line 6 of {home}/mine.py: no" in message
    how = f"minirlhf resume '{out}' --accept-changed-reward"
    assert message.endswith(f"correct the function and go on with `{how}`")
    (home / "mine.py").write_text(f"{COUNT}")
    assert call(capsys, "resume", out, "--accept-changed-reward")[0] == 0


def test_an_error_of_a_function_of_python_says_how_to_go_on(tmp_path, names, monkeypatch):
    calls = []

    def breaks(texts):
        calls.append(texts)
        return [1.0 / (len(calls) < 3) + len(text) for text in texts]

    config = tiny_config(tmp_path / "run", corpus=names)
    with pytest.raises(InputError) as refused:
        minirlhf.train(config, reward=breaks, progress=False)
    how = f"minirlhf.resume('{config.out}', reward=.., accept_changed_reward=True)"
    assert str(refused.value).endswith(how) and (config.out / "reward_model").exists()


# --- its numbers


def test_the_reward_is_shown_in_its_own_units(tmp_path, names, capsys):
    config = tiny_config(
        tmp_path / "run", corpus=names, reward=VOWELS, ppo__batch_size=8, eval_every=1
    )
    result = train(config)
    samples = [json.loads(line) for line in (config.out / "samples.jsonl").read_text().splitlines()]
    for row in metrics(config.out, "ppo"):
        texts = [s["prompt"] + s["response"] for s in samples if s["step"] == row["step"]]
        assert len(texts) == 8  # all of them
        assert row["objective/reward"] == pytest.approx(np.mean(list(map(vowel_share, texts))))
        assert 0 <= row["eval/reward"] <= 1
    assert row["eval/reward"] == pytest.approx(result.policy["reward"])
    assert "your reward 0.5" in call(capsys, "score", config.out, *SCORE)[1]


@pytest.mark.parametrize("unit", ["1e-7", "1e200", "3e298", "-3e298"])
def test_rewards_of_any_size_are_learnt_from(home, names, capsys, unit):
    (home / "big.py").write_text(f"def big(text):\n    return {unit} * len(text)\n")
    config = tiny_config(home / "new", corpus=names, reward="big.py:big", ppo__iterations=1)
    status, out, _ = call(capsys, "train", *as_flags(config))
    assert status == 0 and max(map(len, out.splitlines())) < 120
    (row,) = metrics(home / "new", "ppo")
    assert 0.3 < row["objective/scores_sd"] < 3 and abs(row["objective/scores"]) < 3
    assert 1 < row["objective/reward"] / float(unit) < 40
    assert call(capsys, "resume", home / "new")[0] == 0


def test_a_reward_beyond_what_sums_hold_is_refused(home, names, capsys):
    (home / "big.py").write_text("def big(text):\n    return 1e300 * (1 + len(text))\n")
    config = tiny_config(home / "new", corpus=names, reward="big.py:big")
    message = refusal(capsys, "train", *as_flags(config))
    assert "big.py:big: expected a finite number of at most 1e+300" in message


def test_the_score_has_mean_0_at_the_temperature_of_training(tmp_path, names):
    config = tiny_config(
        tmp_path / "run",
        corpus=names,
        reward="length",
        eval_prompts=400,
        reward_model__n_normalize=400,
        ppo__temperature=0.4,
        ppo__iterations=1,
        max_response_tokens=16,
        sft__steps=60,
    )
    result = train(config)
    assert abs(result.reference["proxy"]) < 0.25


@pytest.mark.parametrize(
    "scale",
    [
        '{"score_mean": 1e999, "score_sd": 1.0}',
        '{"score_mean": 0.5, "score_sd": 1e999}',
        '{"score_mean": 0.0, "score_sd": 1e-320}',
        '{"score_mean": 0.5, "score_sd": -1.0}',
        '{"score_mean": 0.5, "score_sd": 0.0}',
        '{"score_mean": NaN, "score_sd": 1.0}',
        '{"score_mean": 0.5, "score_sd": NaN}',
        '{"score_mean": 1e300, "score_sd": 1e-30}',
        '{"score_mean": true, "score_sd": true}',
    ],
)
def test_a_scale_that_none_can_be_is_refused(home, capsys, scale):
    (home / "run/reward_model/scale.json").write_text(scale)
    for command in (("score", home / "run", *SCORE), ("resume", home / "run")):
        assert "scale.json" in refusal(capsys, *command)


def test_one_sample_has_no_sd(capsys, tmp_path):
    flags = as_flags(tiny_config(tmp_path / "run", reward_model__n_normalize=2))
    flags[flags.index("--reward-model.n-normalize") + 1] = "1"
    status, _, err = call(capsys, "train", *flags)
    assert status == 2 and "n_normalize: expected at least 2; got 1" in " ".join(err.split())
    assert not os.path.exists(tmp_path / "run")
