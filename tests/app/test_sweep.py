"""Runs side by side: the same as one by one, whichever fails or is interrupted."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import (
    call,
    changed,
    differences,
    interrupted_after,
    outcome,
    refusal,
    tiny_config,
    train,
)

import minirlhf
from minirlhf.app import sweep
from minirlhf.runs.config import load_config, save_config

RATE = "ppo.optimizer.learning_rate"
NOTHING = sweep.Sweep(Path("none"), [], {})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A file with the settings of a run of a second."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.toml"
    save_config(path, changed(tiny_config("x"), {"out": None, "workers": 0}))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a run, made here and alone, leaves; each is made once."""
    made = {}

    def outcome_of(**changes):
        key = tuple(changes.items())
        if key not in made:
            out = tmp_path_factory.mktemp("alone") / "run"
            train(tiny_config(out, **changes))
            made[key] = outcome(out)
        return made[key]

    return outcome_of


def test_runs_fail_alone_and_the_others_are_as_one_by_one(capsys, tiny, alone, tmp_path):
    """Both runs that train reference and reward model fail in PPO; their forks do not."""
    out = tmp_path / "out"
    words = f"sweep --config {tiny} --ppo.optimizer.learning-rate 1e30 0.01 --seed 0 1 --out {out}"
    status, said, err = call(capsys, *words.split(), "--json")
    assert status == 1
    found = json.loads(said)
    names = [f"optimizer.learning_rate-0.01_seed-{seed}" for seed in (0, 1)]
    assert [row["name"] for row in found["rows"]] == names
    for seed, row in enumerate(found["rows"]):
        assert differences(alone(seed=seed), outcome(out / names[seed])) == []
        config = load_config(out / names[seed] / "config.toml")
        assert config == tiny_config(out / names[seed], seed=seed)
        assert row["settings"] == {"optimizer.learning_rate": 0.01} and row["seed"] == seed
        result = json.loads((out / names[seed] / "result.json").read_text())
        assert {name: row[name] for name in result["policy"]} == result["policy"]
    assert sorted(found["failed"]) == [
        f"optimizer.learning_rate-1e+30_seed-{seed}" for seed in (0, 1)
    ]
    for name, said in found["failed"].items():
        assert said.startswith(
            "status 2: minirlhf: PPO iteration 0: training: expected a finite"
        ), said
        assert f"failed: {out / name}, {said}\n" in err
        assert said.removeprefix("status 2: ") in (out / f"{name}.log").read_text()
    logs = [(out / f"{name}.log").read_text() for name in names]
    assert all("stages to run: ppo\n" in log for log in logs)  # the others had been made
    assert (out / "frontier.png").exists() and "means ± sd over seeds" in err


def test_an_interrupted_sweep_goes_on(capsys, monkeypatch, tiny, alone, tmp_path):
    out = tmp_path / "a folder"
    words = ["sweep", "--config", tiny, "--beta", 0, 0.2, 1, "--ppo.epochs=2"]
    words += ["--jobs", 2, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "track", interrupted_after("runs", 1))
        status, _, err = call(capsys, *words)
    assert status == 130
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    again = f"{len(before)} of 3 runs are finished; the same with --out '{out}' goes on"
    assert err.splitlines()[-1] == f"minirlhf: interrupted; {again}"
    assert 1 <= len(before) < 3
    torn = out / "kl_coef-1_seed-0"  # as a fork that was ended while it was made
    shutil.rmtree(torn, ignore_errors=True)
    (torn / "reference").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    status, said, _ = call(capsys, *words[:-1], out.name)  # wherever it is called from
    assert status == 0 and f"runs: {out.name}" in said
    assert all(path.stat().st_mtime_ns == before[path] for path in before)
    for beta in (0, 0.2, 1):
        found = outcome(out / f"kl_coef-{beta}_seed-0")
        assert differences(alone(ppo__kl_coef=float(beta)), found) == []
    again = minirlhf.sweep(load_config(tiny), ppo={"kl_coef": [0, 0.2, 1]}, out=out, progress=False)
    assert [run.config.ppo.kl_coef for run in again.runs.values()] == [0, 0.2, 1]
    assert [line["runs"] for line in again.means()] == ["1", "1", "1"] and not again.failed
    assert len(again.figure().axes) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "expected several values of an option, like --beta 0 0.2; got one of each"),
        ("--beta 0.1", "got one of each: name more, or use minirlhf train"),
        ("--columns a=b c=d", "got one of each"),
        ("--betta 0 1", "expected an option of sweep; got '--betta': perhaps --beta is meant"),
        ("0 1", "expected an option of sweep; got '0'"),
        ("--beta 0 x", "--beta: expected a number; got 'x'"),
        ("--beta 0 -1", "ppo.kl_coef: expected at least 0; got -1.0"),
        ("--ppo.samples-per-prompt 1 4 --ppo.advantages group", "expected at least 2"),
        ("--beta 0 0.0", "expected different values; got kl_coef-0_seed-0 twice: drop one"),
        ("--stages sft sft,reward", "--stages: expected all of them; got sft: leave it out"),
        ("--beta 0 1 --jobs -1", "--jobs: expected 0 or more; got -1"),
        ("--beta 0 1 --jobs x", "--jobs: expected a whole number; got 'x'"),
        ("--beta 0 1 --out=", "--out: expected a path; got ''"),
        ("--recipe ppo grop", "recipe: expected one of ppo, grpo"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_starts(
    capsys, monkeypatch, tmp_path, words, expected
):
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(capsys, "sweep", *words.split())
    assert list(tmp_path.rglob("*.toml")) == []


def test_a_folder_of_other_runs_is_refused(capsys, tmp_path):
    save_config(tmp_path / "a" / "config.toml", tiny_config(tmp_path / "a"))
    (tmp_path / "b" / "kl_coef-0_seed-0").mkdir(parents=True)
    save_config(tmp_path / "c" / "kl_coef-0_seed-0.toml", tiny_config("x"))
    for name, other in (
        ("a", "config"),
        (".", "a"),
        ("b", "kl_coef-0_seed-0"),
        ("c", "kl_coef-0_seed-0"),
    ):
        message = refusal(capsys, "sweep", "--beta", 0, 1, "--out", tmp_path / name)
        assert f"or one with these runs; it holds another, {other}: choose" in message
    assert not list(tmp_path.rglob("*.log"))


@pytest.fixture
def planned(monkeypatch):
    """The runs that these words of a sweep plan, by name."""

    def of(words):
        found = []
        monkeypatch.setattr(sweep, "run_all", lambda runs, *_: found.extend(runs) or NOTHING)
        sweep.sweep_command(words.split())
        return {run.config.out.name: run for run in found}

    return of


def test_runs_are_named_by_what_varies(planned):
    found = planned("--recipe ppo grpo --reward length words/a.py:f --eval-prompts 5")
    assert list(found)[1] == "recipe-ppo_reward-words-a.py-f_seed-0"
    config = found["recipe-grpo_reward-length_seed-0"].config
    assert config.ppo.advantages == "group" and config.eval_prompts == 5 and config.workers == 1
    both = planned("--sft.optimizer.learning-rate 0.1 1e-2 --ppo.optimizer.learning-rate 1 2")
    name = "sft.optimizer.learning_rate-0.01_optimizer.learning_rate-2_seed-0"
    assert both[name].config.ppo.optimizer.learning_rate == 2
    assert planned("--seed 1 2 --workers 2")["seed-1"].config.workers == 2
    flags = "--stages sft,dpo --seed 3 --beta 0.1 0.2"
    assert planned(flags)["kl_coef-0.2_seed-3"].config.dpo.kl_coef == 0.2


def test_runs_share_what_does_not_depend_on_what_varies(planned):
    def groups(words):
        return len({run.origin for run in planned(words).values()})

    assert groups("--beta 0 1 --ppo.lam 0.5 1") == 1
    assert groups("--beta 0 1 --seed 1 2") == 2
    assert groups("--ppo.temperature 0.5 1") == 2  # at which the score is scaled
    assert groups("--sft.steps 5 10") == 2
    assert groups("--stages sft,dpo --beta 1 2") == 2


def test_from_python_lists_are_swept(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "run_all", lambda planned, *_, **__: planned)
    planned = minirlhf.sweep(
        recipe=["ppo", "dapo"],
        ppo={"clip_eps": [0.1, 0.2], "optimizer": {"eps": [1e-6, 1e-5]}},
        columns=("prompt=title",),
        corpus="x.jsonl",
        eval_prompts=7,
        out=tmp_path,
    )
    assert len(planned) == 8
    last = planned[-1]
    assert last.settings == {"recipe": "dapo", "clip_eps": 0.2, "optimizer.eps": 1e-5}
    assert last.config.out.name == "recipe-dapo_clip_eps-0.2_optimizer.eps-1e-05_seed-0"
    assert last.config.ppo.advantages == "group" and last.config.columns == ("prompt=title",)
    assert last.config.eval_prompts == 7 and last.config.ppo.optimizer.eps == 1e-5
    with pytest.raises(minirlhf.errors.InputError, match="train: expected one of .*; got 'sede'"):
        minirlhf.sweep(sede=[1, 2])
    with pytest.raises(minirlhf.errors.InputError, match="got one of each"):
        minirlhf.sweep()


def test_a_setting_is_not_taken_for_the_metric_of_its_name(tmp_path):
    metrics = dict.fromkeys(sweep.COLUMNS, 1.5)
    rows = [{**metrics, "settings": {"reward": name}} for name in ("length", "regex:x")]
    lines = sweep.Sweep(tmp_path, rows, {}).means()
    assert [line["--reward"] for line in lines] == ["length", "regex:x"]
    assert {line["reward"] for line in lines} == {"1.5"}
