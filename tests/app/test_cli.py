"""The command line: what a person types, what they get, and its exit status."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

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
    leaves,
    metrics,
    outcome,
    refusal,
    tiny_config,
    train,
    write_names,
    write_pairs,
)

import minirlhf
from minirlhf.app import check, cli, commands, exact, options, progress
from minirlhf.app.commands import parse_config
from minirlhf.errors import LONGEST, InputError
from minirlhf.nn.heads import logits_forward
from minirlhf.nn.transformer import transformer_forward
from minirlhf.runs.checkpoint import load_model, load_state
from minirlhf.runs.config import TrainConfig, load_config, save_config
from minirlhf.train.dpo import DPOConfig
from minirlhf.train.settings import PPOConfig
from minirlhf.worlds.tokens import load_tokenizer

ROOT = Path(minirlhf.__file__).parents[1]
PROMPT = "Where is my kettle?"
COMMANDS = "train resume sweep score sample report diagnose exact judge check".split()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A finished run on the support world, at a temperature of its own; no test changes it."""
    out = tmp_path_factory.mktemp("desk") / "run"
    config = tiny_config(out, max_response_tokens=20, ppo__temperature=0.8, ppo__kl_coef=0.3)
    train(config)
    return out


def words(*texts):
    """Console output as one line, whatever the width it was broken to."""
    return " ".join(re.sub(r"[│┃━─┏┓└┘├┤┼╇╈┡┩┳┴]", " ", "\n".join(texts)).split())


# --- finding one's way


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_no_command_shows_all_commands(capsys, arguments):
    status, out, err = call(capsys, *arguments)
    assert status == 0 and err == ""
    assert all(f"minirlhf {command}" in out for command in COMMANDS)
    assert "MINIRLHF_TRACEBACK=1" in out


@pytest.mark.parametrize("arguments", [["--version"], ["-V"], ["version"]])
def test_version(capsys, arguments):
    assert call(capsys, *arguments) == (0, f"minirlhf {minirlhf.__version__}\n", "")


def test_the_version_costs_nothing():
    """Neither NumPy nor anything that draws, parses flags or encodes texts is imported for it."""
    script = """
import sys
from minirlhf.app.cli import main
try:
    main(["--version"])
finally:
    print(sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(PYTHONPATH=str(ROOT)), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    version, libraries = done.stdout.decode().splitlines()
    assert version == f"minirlhf {minirlhf.__version__}"
    assert "minirlhf" in libraries
    for library in ("numpy", "matplotlib", "tyro", "tiktoken", "rich", "threadpoolctl"):
        assert library not in libraries, libraries


def test_matplotlib_waits_for_a_picture():
    """The commands and the pictures themselves are imported without it."""
    modules = "commands, exact, check, pictures, api"
    script = f"import sys; from minirlhf.app import {modules}; print('matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(PYTHONPATH=str(ROOT)), capture_output=True
    )
    assert done.stdout == b"False\n", done.stderr


def test_every_command_is_where_the_table_says():
    assert list(cli.COMMANDS) == COMMANDS
    for place in cli.COMMANDS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(f"minirlhf.app.{module}"), function))


@pytest.mark.parametrize("name", ["trian", "", "--seed", "bench"])
def test_an_unknown_command_is_refused_and_the_known_ones_named(capsys, name):
    message = refusal(capsys, name)
    assert repr(name) in message and all(command in message for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = call(capsys, command, "--help-all" if command == "train" else "--help")
    assert status == 0 and err == ""
    assert max(map(len, out.splitlines())) <= 80
    assert f"minirlhf {command}" in words(out)
    expected = {
        "train": [
            "--config",
            "--beta",
            *("--" + p.replace("_", "-") for p, _ in leaves(TrainConfig())),
        ],
        "resume": ["Run folder", "--ppo.iterations", "last checkpoint"],
        "sweep": ["--out", "--jobs", "--json", "--beta", "--seed"],
        "score": ["--prompt", "--response"],
        "sample": ["--prompt", "--n", "--temperature", "--top-k", "--top-p", "--seed"],
        "report": ["Run folders", "--out", "--exact"],
        "diagnose": ["Run folder", "--json", "--diff"],
        "exact": ["--parts", "--seeds", "--iterations", "--out", "--processes"],
        "judge": ["--placement", "--framework", "--expect", "--size", "--json"],
        "check": ["--seed", "--cases"],
    }[command]
    for option in expected:
        assert option in words(out) or option.rpartition(".")[2] in out, option


def test_the_help_of_train_is_short_and_a_file_changes_its_defaults(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    fields = {path.replace("_", "-") for path, _ in leaves(TrainConfig())}
    chosen = [name for names in options.SHOWN.values() for name in names]
    assert set(chosen) < fields and len(chosen) == len(set(chosen)) < 30
    status, out, err = call(capsys, "train", "--help")
    shown = re.findall(r"^  --([\w.-]+)", out, re.MULTILINE)
    assert status == 0 and err == "" and shown == ["help-all", "config", "recipe", "beta", *chosen]
    assert "--reward-model.epochs 4 " in out
    assert "--ppo.kl-coef 0.2 " in out and len(out.splitlines()) < 68
    everything = call(capsys, "train", "--help-all")[1]
    shown = re.findall(r"^  --([\w.-]+)", everything, re.MULTILINE)
    ours = {"help-all", "config", "recipe", "beta"}
    assert len(shown) == len(set(shown)) and set(shown) == fields | ours
    assert "--ppo.no-whiten-advantages" in everything and "[cpu, cuda]" in everything
    (tmp_path / "c.toml").write_text("[ppo]\nkl_coef = 0.75\n")
    assert "--ppo.kl-coef 0.75 " in call(capsys, "train", "--config", tmp_path / "c.toml", "-h")[1]
    assert list(tmp_path.iterdir()) == [tmp_path / "c.toml"]


def test_a_list_in_a_help_stays_a_list(capsys):
    shown = call(capsys, "exact", "--help")[1].splitlines()
    said = [line.partition(":")[0] for line in shown if line.startswith("- ")]
    parts = {part for line in said for part in line.removeprefix("- ").split(", ")}
    assert parts == set(exact.Part.__args__) and len(said) == 2


def test_the_installed_program_is_this_one():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["minirlhf"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("train --sead 1", "expected an option of train; got '--sead': perhaps --seed is meant"),
        ("train --zzz=1", "expected an option of train; got '--zzz': see minirlhf train --help"),
        ("train --ppo.kl_coeff 1", "perhaps --ppo.kl-coef is meant"),
        ("train --seed one", "--seed: expected a whole number; got 'one'"),
        ("train --seed", "--seed: expected a value; got none"),
        ("train --seed 1 2", "expected an option of train; got '2'"),
        ("train --seed 1 --seed two", "--seed: expected a whole number; got 'two'"),  # the last
        ("train --device gpu", "--device: expected one of 'cpu', 'cuda'; got 'gpu'"),
        ("train --stages ppo", "--stages: expected one of 'sft', 'sft,reward', 'sft,dpo', 'all'"),
        ("train --ppo.batch-size 0", "ppo.batch_size: expected at least 1; got 0"),
        ("train --ppo.kl-mode k4", "--ppo.kl-mode: expected one of 'reward_k1', "),
        ("train --ppo.whiten-rewards maybe", "expected an option of train; got 'maybe'"),
        ("train --model.n-head 3", "model.n_head: expected a divisor of d_model = 64; got 3"),
        (
            "train --sft.optimizer.eps 1e-46",
            "sft.optimizer.eps: expected at least 1e-37 and at most 1e37; got 1e-46",
        ),
        ("train --ppo.optimizer.eps 0", "ppo.optimizer.eps: expected at least 1e-37 and"),
        ("train --ppo.optimizer.eps 1e39", "ppo.optimizer.eps: expected at least 1e-37 and"),
        ("train --ppo.temperature 1e39", "ppo.temperature: expected at least 1e-37 and at most"),
        ("train --seed 1" + 5000 * "0", "--seed: expected a whole number; got '1000"),
        ("train --seed 1" + 30 * "0", "seed: expected int; got 1000"),
        ("train --config=", "'': expected a file; found none"),
        ("train --beta=", "--beta: expected a number; got ''"),
        ("train --beta much", "--beta: expected a number; got 'much'"),
        ("train --out=", "--out: expected a path; got ''"),
        ("resume", "expected also RUN; got none"),
        ("score run --prompt a", "expected also --response; got none"),
        ("sample run", "expected also --prompt; got none"),
        ("sample run --prompt", "--prompt: expected a value; got none"),
        ("sample run --prompt a --n 1.5", "--n: expected a whole number; got '1.5'"),
        ("sample run --promt x", "got '--promt': perhaps --prompt is meant"),
        ("score run --promt=x --response y", "got '--promt': perhaps --prompt is meant"),
        ("train poems.txt", "got 'poems.txt': perhaps --corpus poems.txt is meant"),
        ("check everything", "expected an option of check; got 'everything'"),
        ("exact --parts kl gaee", "--parts: expected one of 'kl', 'optimum'; "),
        ("train " + 10_000 * "x", "got 'xxx"),
        (10_000 * "x", "got 'xxx"),
    ],
    ids=lambda text: text[:30],
)
def test_a_wrong_option_is_one_sentence_that_says_what_to_do(
    capsys, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    message = refusal(capsys, *arguments.split(" "))
    assert said in message and len(message) <= LONGEST
    assert list(tmp_path.iterdir()) == []


def test_an_option_with_a_name_of_its_own_is_the_nearest_by_that_name():
    def command(*, ppo__iterations: int = 0) -> int:
        return ppo__iterations

    assert options.call(command, ["--ppo.iterations", "5"], "resume") == 5
    with pytest.raises(InputError, match="perhaps --ppo.iterations is meant"):
        options.call(command, ["--ppo.iteration", "5"], "resume")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_argument_that_is_no_text_is_refused(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    message = refusal(capsys, command, "--out", os.fsdecode(b"run\xff"))
    assert "expected text in UTF-8; got 'run\\udcff'" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--config", "--beta"])
@pytest.mark.parametrize("after", [[], ["--seed", "3"]])
def test_an_option_without_its_value_is_one_sentence(capsys, flag, after):
    message = refusal(capsys, "train", flag, *after)
    assert f"{flag}: expected a value; got none: see minirlhf train --help" in message


# --- train and resume


def test_train_shows_before_and_after_and_where_it_lies(capsys, tmp_path):
    out = tmp_path / "a run [1]"  # brackets are no markup
    status, shown, err = call(capsys, "train", *as_flags(tiny_config(out)))
    assert status == 0
    for label in ("proxy reward", "gold reward", "kl_seq", "entropy", "length", "distinct-2"):
        assert label in shown, label
    result = json.loads((out / "result.json").read_text())
    row = next(line for line in shown.splitlines() if "gold reward" in line)
    assert re.findall(r"-?\d+\.\d\d", row) == [
        f"{result[who]['gold']:.2f}" for who in ("reference", "policy")
    ]
    for words_of in (
        "proxy: the score of the reward model",
        "gold: the world's own",
        "distinct-2: ",
    ):
        assert words_of in words(shown)
    assert "before and after" in shown and re.search(r"gold [+-]\d", shown)
    assert f"run folder: {out}" in shown and f"curves: {out}/curves.png" in shown
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for title in ("supervised fine-tuning: 6/6", "PPO: 3/3", "reward model: accuracy"):
        assert title in err
    assert "\x1b" not in shown + err  # nobody's terminal: no colours, no cursor


def test_a_run_from_flags_is_the_run_from_python(capsys, tmp_path, names):
    config = tiny_config(tmp_path / "python", corpus=names, reward=VOWELS)
    train(config)
    call(capsys, "train", *as_flags(changed(config, {"out": tmp_path / "flags"})))
    assert differences(outcome(config.out), outcome(tmp_path / "flags")) == []


def test_a_configuration_file_and_flags_that_overrule_it(capsys, tmp_path, names):
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS, ppo__kl_coef=0.7, seed=5)
    save_config(tmp_path / "my.toml", config)
    flags = [f"--config={tmp_path}/my.toml", "--seed", "6", "--ppo.optimizer.eps", "1e-3"]
    assert call(capsys, "train", *flags)[0] == 0
    expected = changed(config, {"seed": 6, "ppo.optimizer.eps": 1e-3})
    assert load_config(tmp_path / "run/config.toml") == expected
    again = tmp_path / "run/config.toml"  # a run's own configuration is such a file
    assert call(capsys, "train", "--config", again, "--out", tmp_path / "again")[0] == 0
    assert differences(outcome(tmp_path / "run"), outcome(tmp_path / "again")) == []


@pytest.mark.parametrize("flags", [["--beta", "0"], ["--beta=0"], ["--ppo.kl-coef", "0"]])
def test_beta_0_switches_the_penalty_off(capsys, tmp_path, names, flags):
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS)
    save_config(tmp_path / "my.toml", config)
    assert call(capsys, "train", "--config", tmp_path / "my.toml", *flags)[0] == 0
    assert load_config(tmp_path / "run/config.toml").ppo.kl_coef == 0.0
    rows = metrics(tmp_path / "run", "ppo")
    assert all(row["objective/kl_coef"] == row["objective/non_score_reward"] == 0 for row in rows)
    assert rows[-1]["objective/kl"] != 0  # and yet it is measured


def test_resume_goes_on_and_shows_the_same(capsys, tmp_path, names, monkeypatch):
    config = tiny_config(tmp_path / "whole", corpus=names, reward=VOWELS)
    _, whole, _ = call(capsys, "train", *as_flags(config))
    with monkeypatch.context() as patch:
        patch.setitem(commands.api.BARS, "track", interrupted_after("PPO", 2))
        parts = changed(config, {"out": tmp_path / "parts"})
        status, out, err = call(capsys, "train", *as_flags(parts))
    assert status == 130 and out == ""
    where = "in stage ppo: 2 of 3 iterations made, 2 in the checkpoint"
    goes_on = f"`minirlhf resume {parts.out}` goes on"
    assert err.splitlines()[-1] == f"minirlhf: interrupted; {where}; {goes_on}"
    status, resumed, err = call(capsys, "resume", tmp_path / "parts")
    assert status == 0 and "stage ppo goes on after 2 of 3 iterations\n" in err
    assert differences(outcome(config.out), outcome(tmp_path / "parts")) == []

    def tables(text):
        return text[: text.index("training time in this session")]

    assert tables(resumed) == tables(whole)


def test_resume_of_a_finished_run_shows_it_again(capsys, desk, tmp_path):
    copy = shutil.copytree(desk, tmp_path / "copy")
    status, out, _ = call(capsys, "resume", copy)
    assert status == 0 and "before and after" in out
    assert differences(outcome(desk), outcome(copy)) == []


# --- score: the formula on any text


def sequence_logprob(folder, tokenizer, prompt, response, temperature):
    """log Pr(y | x) token by token from plain softmax, unpadded, in float64."""
    params, config, _ = load_model(folder, dtype=np.float64)
    prompt, response = tokenizer.prompt_ids(prompt), tokenizer.response_ids(response)
    ids = np.array([prompt + response])
    h, _ = transformer_forward(params, tokens=ids, mask=np.ones(ids.shape), config=config)
    logits = logits_forward(h, params["wte"])[0][0] / temperature
    total = 0.0
    for t, token in enumerate(response):
        row = logits[len(prompt) - 1 + t]
        total += row[token] - np.log(np.exp(row).sum())
    return total


@pytest.mark.parametrize("response", ["It is on its way.", "no", "zzz \U0001f642"])
def test_score_prints_the_penalty_of_any_text(capsys, desk, response):
    before = files_under(desk)
    status, out, err = call(capsys, "score", desk, "--prompt", PROMPT, "--response", response)
    assert status == 0 and err == ""
    tokenizer = load_tokenizer(desk)
    policy, reference = (
        sequence_logprob(desk / name, tokenizer, PROMPT, response, temperature=0.8)
        for name in ("policy", "reference")
    )
    said = words(out)
    printed = float(re.search(r"log Pr_ref\(y\|x\) = ([+-]\d+\.\d+) nats", said).group(1))
    assert abs(policy - reference) > 1e-3
    assert printed == pytest.approx(policy - reference, abs=2e-4)
    rows = [
        [float(number) for number in re.findall(r"[+-]?\d+\.\d{4}\b", line)]
        for line in out.splitlines()
        if line.startswith("│")
    ]
    *tokens, total = rows
    assert len(tokens) == len(tokenizer.response_ids(response))  # the stop token has its row
    assert total == pytest.approx(np.sum(tokens, axis=0), abs=1e-3)  # the sum is the sum
    assert total == pytest.approx([policy, reference, printed], abs=1e-3)
    for ours, theirs, difference in rows:
        assert difference == pytest.approx(ours - theirs, abs=2e-4)
    assert "[nats]" in said  # the unit, and not a style of the console's
    assert files_under(desk) == before


def test_score_of_several_responses_side_by_side_and_into_files(capsys, desk, tmp_path):
    replies = ["It is on its way.", "no"]
    asked = ["score", desk, "--prompt", PROMPT, "--response", *replies]
    status, out, _ = call(capsys, *asked, "--json")
    scores = json.loads(out)["scores"]
    assert status == 0 and [of["response"] for of in scores] == replies
    for of in scores:
        assert sum(of["logp"]) - sum(of["ref_logp"]) == pytest.approx(of["kl_seq"], abs=1e-12)
    page, picture = tmp_path / "a.html", tmp_path / "a.png"
    status, out, err = call(capsys, *asked, "--html", page, "--png", picture)
    assert status == 0 and err == f"page: {page}\npicture: {picture}\n"
    assert picture.stat().st_size > 1000
    for of in scores:
        assert f"penalty {of['kl_seq']:+.4f} nats" in words(out)
        assert f'data-kl-seq="{of["kl_seq"]}"' in page.read_text()
    message = refusal(capsys, *asked, "--html", tmp_path / "a.png")
    assert message.startswith("--html: expected a name in .html; got")


def test_score_prints_the_objective_of_training(capsys, desk):
    _, out, _ = call(capsys, "score", desk, "--prompt", PROMPT, "--response", "It is on its way.")
    number = r"([+-]\d+\.\d+)"
    said = words(out)
    penalty = float(re.search(rf"= {number} nats", said).group(1))
    score, beta, objective = map(
        float, re.search(rf"score {number}; with beta = ([\d.]+): .* = {number}", said).groups()
    )
    assert beta == 0.3
    assert objective == pytest.approx(score - beta * penalty, abs=2e-4)
    assert re.search(r"gold reward [+-]\d", said)


def test_score_uses_the_beta_that_training_arrived_at(capsys, tmp_path, names):
    """An adaptive one ends elsewhere than where the configuration lets it start."""
    config = tiny_config(
        tmp_path / "run", corpus=names, reward=VOWELS, ppo__kl_target=0.01, ppo__kl_horizon=50.0
    )
    train(config)
    _, meta = load_state(config.out / "checkpoint")
    assert abs(meta["kl_coef"] - config.ppo.kl_coef) > 0.005
    _, out, _ = call(capsys, "score", config.out, "--prompt", "k", "--response", "alo")
    assert float(re.search(r"with beta = ([\d.]+):", words(out)).group(1)) == pytest.approx(
        meta["kl_coef"], rel=1e-5
    )
    shutil.rmtree(config.out / "checkpoint")
    _, out, _ = call(capsys, "score", config.out, "--prompt", "k", "--response", "alo")
    assert "with beta = 0.2:" in words(out)


@pytest.mark.parametrize("source", [{"reward": VOWELS}, {"pairs": "pairs.jsonl"}])
def test_a_run_outlives_its_files(capsys, tmp_path, monkeypatch, source):
    """To score and to sample takes what lies in the folder."""
    monkeypatch.chdir(tmp_path)
    write_pairs("pairs.jsonl")
    config = tiny_config(tmp_path / "run", corpus=write_names(tmp_path / "names.txt"), **source)
    train(config)
    commands = (
        ("score", config.out, "--prompt", "k", "--response", "alo"),
        ("sample", config.out, "--prompt", "k"),
    )
    before = [call(capsys, *command)[:2] for command in commands]
    assert [status for status, _ in before] == [0, 0]
    for name in ("names.txt", "pairs.jsonl"):
        (tmp_path / name).unlink()
    assert [call(capsys, *command)[:2] for command in commands] == before


@pytest.mark.parametrize("gone", ["names.txt", "mine.py"])
def test_a_finished_run_shows_its_table_though_its_files_have_gone(capsys, tmp_path, gone):
    (tmp_path / "mine.py").write_text("def count(text):\n    return text.count('a')\n")
    corpus, reward = write_names(tmp_path / "names.txt"), f"{tmp_path / 'mine.py'}:count"
    config = tiny_config(tmp_path / "run", corpus=corpus, reward=reward)
    train(config)
    _, whole, _ = call(capsys, "resume", config.out)
    (tmp_path / gone).unlink()
    before = outcome(config.out)
    status, out, err = call(capsys, "resume", config.out)
    assert status == 0 and f"run {config.out}: finished" in err
    rows = [line for line in whole.splitlines() if "kl_seq" in line or "proxy" in line]
    assert len(rows) >= 2 and all(row in out for row in rows)
    assert words(out).startswith("replies to held-out prompts") and "before and after" not in out
    assert differences(before, outcome(config.out)) == []
    run = minirlhf.resume(config.out, progress=False)
    assert run.result["policy"] == before["result"]["policy"]
    assert "expected" in refusal(capsys, "resume", config.out, "--ppo.iterations", 9)
    stored = load_config(config.out / "config.toml")
    save_config(config.out / "config.toml", changed(stored, {"eval_prompts": 5}))
    assert "found none" in refusal(capsys, "resume", config.out)  # that is to be evaluated anew
    save_config(config.out / "config.toml", stored)
    for damaged in ("{}", '{"reference": {"kl_seq": "x"}, "policy": {}, "seconds": {}}'):
        (config.out / "result.json").write_text(damaged)
        assert "result.json: expected numbers" in refusal(capsys, "resume", config.out)
    (config.out / "result.json").unlink()
    assert "found none" in refusal(capsys, "resume", config.out)


@pytest.mark.parametrize("text", ["kalo\nmitru\n", ""])
def test_a_finished_run_shows_its_table_though_its_texts_have_changed(capsys, tmp_path, text):
    corpus, pairs = Path(write_names(tmp_path / "n.txt")), Path(write_pairs(tmp_path / "p.jsonl"))
    config = tiny_config(tmp_path / "run", corpus=str(corpus), pairs=str(pairs))
    train(config)
    whole, before = corpus.read_text(), outcome(config.out)
    corpus.write_text(text)
    status, out, err = call(capsys, "resume", config.out)
    assert status == 0 and "have gone or changed since" in err and "kl_seq" in out
    assert differences(before, outcome(config.out)) == []
    if text:  # a run that goes on
        longer = ("resume", config.out, "--ppo.iterations", 4)
        assert "by a change of corpus" in refusal(capsys, *longer)
        corpus.write_text(whole)
        pairs.write_text(pairs.read_text().replace("good", "fine"))
        assert "by a change of pairs" in refusal(capsys, *longer)
        stored = load_config(config.out / "config.toml")
        save_config(config.out / "config.toml", changed(stored, {"seed": 5}))
        assert "by a change of seed" in refusal(capsys, *longer)


@pytest.mark.parametrize("stages", ["sft", "sft,reward"])
def test_a_part_is_sampled_from_and_scored_with(capsys, tmp_path, names, stages):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    config = tiny_config(tmp_path / "run", corpus=names, pairs=pairs, stages=stages)
    train(config)
    before = files_under(config.out)
    said = f"note: {config.out} has no policy yet: its reference stands for it\n"
    status, out, err = call(capsys, "sample", config.out, "--prompt", "k")
    assert (status, err) == (0, said) and "reference" in out and "policy" not in out
    status, out, err = call(capsys, "score", config.out, "--prompt", "k", "--response", "alo")
    assert (status, err) == (0, said) and "= +0.0000 nats" in out
    assert ("no score: the run has no reward model yet" in out) == (stages == "sft")
    assert ("score - beta * Penalty" in out) == (stages == "sft,reward")
    assert files_under(config.out) == before


def test_a_prompt_outside_the_worlds_grammar_has_no_gold_and_no_traceback(capsys, desk):
    status, out, _ = call(capsys, "score", desk, "--prompt", "Tell me", "--response", "no")
    assert status == 0 and "gold" not in out


def test_score_refuses_what_it_would_have_to_cut(capsys, desk):
    """A number for half of a text would be a wrong number."""
    long = "You can track it online. " * 9
    message = refusal(capsys, "score", desk, "--prompt", PROMPT, "--response", long)
    assert "response: expected at most 20 tokens" in message
    message = refusal(capsys, "score", desk, "--prompt", long, "--response", "no")
    assert "prompt: expected at most 24 tokens" in message
    status, _, err = call(capsys, "sample", desk, "--prompt", long)  # as training does
    assert status == 0
    assert re.fullmatch("note: a prompt of .* tokens is cut to its last 24, as in training\n", err)
    assert call(capsys, "sample", desk, "--prompt", PROMPT)[2] == ""


# --- sample


def replies(out):
    """(reference, policy) cells of each printed row, joined over its lines."""
    return [line for line in out.splitlines() if line.startswith("│")]


def test_sample_shows_both_side_by_side(capsys, desk):
    before = files_under(desk)
    status, out, err = call(capsys, "sample", desk, "--prompt", PROMPT, "--n", "2")
    assert status == 0 and err == ""
    assert "reference" in out and "policy" in out and f"replies to {PROMPT!r}" in words(out)
    assert len(re.findall(r"gold [+-]\d", out)) == 4
    assert call(capsys, "sample", desk, "--prompt", PROMPT, "--n", "2")[1] == out  # its seed
    other = call(capsys, "sample", desk, "--prompt", PROMPT, "--n", "2", "--seed", "1")[1]
    assert other != out
    assert files_under(desk) == before


@pytest.mark.parametrize(
    "greedy", [["--temperature", "0"], ["--top-k", "1"], ["--top-p", "0.0001"]]
)
def test_the_most_likely_token_needs_no_coins(capsys, desk, greedy):
    outs = [
        call(capsys, "sample", desk, "--prompt", PROMPT, "--n", "1", "--seed", seed, *greedy)[1]
        for seed in (0, 1)
    ]
    assert outs[0] == outs[1] and replies(outs[0])
    reference = call(capsys, "sample", desk, "--prompt", PROMPT, "--n", "1", "--temperature", "0")
    assert reference[1] == outs[0]


@pytest.mark.parametrize(
    "flags",
    [
        *(
            ["--n", "0"],
            ["--temperature", "-1"],
            ["--temperature", "nan"],
            ["--temperature", "inf"],
        ),
        *(["--top-k", "-1"], ["--top-p", "0"], ["--top-p", "2"], ["--top-p", "nan"]),
        ["--seed", "-1"],
    ],
)
def test_sample_refuses_what_cannot_be(capsys, desk, flags):
    assert "sample: expected" in refusal(capsys, "sample", desk, "--prompt", PROMPT, *flags)


@pytest.mark.parametrize("prompt", ["[red]k", "[/red]k", "[link=x]", ":smile: k", "\\[k", "%s {}"])
def test_what_the_user_writes_is_no_markup(capsys, desk, prompt):
    status, out, _ = call(capsys, "sample", desk, "--prompt", prompt, "--n", "1")
    assert status == 0 and repr(prompt) in words(out)
    status, out, _ = call(capsys, "score", desk, "--prompt", "k", "--response", prompt)
    assert status == 0


# --- check


@pytest.mark.parametrize("flags", [["--seed", "-1"], ["--cases", "0"]])
def test_check_refuses_what_cannot_be(capsys, flags):
    assert "check: expected --seed >= 0 and --cases >= 1" in refusal(capsys, "check", *flags)


def test_ctrl_c_in_a_check_speaks_of_no_run(capsys, monkeypatch):
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_command", interrupted)
    status, _, err = call(capsys, "check")
    assert status == 130 and err == "minirlhf: interrupted\n"


@pytest.mark.parametrize("verdict", [0, 1])
def test_check_exits_with_its_verdict(capsys, monkeypatch, verdict):
    seeds = []

    def judged(*, seed: int = 0) -> int:
        seeds.append(seed)
        return verdict

    monkeypatch.setattr(check, "check_command", judged)
    assert call(capsys, "check", "--seed", "7")[0] == verdict
    assert call(capsys, "check")[0] == verdict
    assert seeds == [7, 0]


def test_check_runs_on_a_few_rows(capsys, monkeypatch):
    """The command itself, on three operations."""
    monkeypatch.setattr(check, "TABLE", check.TABLE[:3])
    monkeypatch.setattr(check, "WHOLE_LOSSES", {})
    status, out, _ = call(capsys, "check")
    assert status == 0 and "3 checks" in out and "all right" in out


# --- processes of their own


def environment(**changes):
    kept = {k: v for k, v in os.environ.items() if k not in ("TERM", "COLUMNS", "FORCE_COLOR")}
    return {**kept, "OPENBLAS_NUM_THREADS": "1", **changes}


def test_as_a_program_without_a_terminal(tmp_path, names):
    """No terminal, no TERM, another directory, a reward beside the caller, a numbered folder."""
    (tmp_path / "mine.py").write_text("def reward(text):\n    return text.count('a')\n")
    config = tiny_config(tmp_path / "x", corpus=names, reward="mine:reward")
    flags = as_flags(changed(config, {"out": None}))
    done = subprocess.run(
        [sys.executable, "-m", "minirlhf", "train", *flags],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "run folder: runs/names-0" in done.stdout and "your reward" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr and "Warning" not in done.stderr
    assert re.search(r"^PPO: 3/3, .*/s, .* s left$", done.stderr, re.MULTILINE)
    assert (tmp_path / "runs/names-0/policy/model.safetensors").exists()


def test_a_terminal_that_knows_only_ascii_gets_question_marks(desk):
    done = subprocess.run(
        *(
            [
                sys.executable,
                "-m",
                "minirlhf",
                "sample",
                str(desk),
                "--prompt",
                "\u00e9",
                "--n",
                "1",
            ],
        ),
        env=environment(PYTHONPATH=str(ROOT), PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"replies to '?'" in done.stdout


CAN_BE_INTERRUPTED = {  # also where the tests themselves run in the background; a group of its own
    "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    "start_new_session": True,
}
INTERRUPTS = """
import os, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), 2)
            sum(range(99))
sys.meta_path.insert(0, Interrupt())
from minirlhf.app.cli import main
sys.argv = ["minirlhf", *{arguments!r}]
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal of Ctrl-C")
@pytest.mark.parametrize(
    "module, arguments",
    [
        ("signal", ["train"]),
        ("minirlhf.app.commands", ["train"]),
        ("numpy", ["check"]),
        ("numpy._core._multiarray_umath", ["train"]),
        ("tiktoken._tiktoken", ["sample", "run"]),
        ("rich.console", ["exact"]),
        ("argparse", ["train", "--help"]),
    ],
)
def test_ctrl_c_while_libraries_are_imported_is_one_sentence(tmp_path, module, arguments):
    script = INTERRUPTS.format(module=module, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        **CAN_BE_INTERRUPTED,
    )
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert done.stderr.startswith("minirlhf: interrupted") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


STRANGE_PLACES = {
    "a destructor, where Python reports an exception and goes on": "Interrupted()",
    "an exec, after which Python would end itself by the signal": "exec('Interrupted.__del__(0)')",
}


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal of Ctrl-C")
@pytest.mark.parametrize("place", STRANGE_PLACES)
def test_ctrl_c_in_strange_places_ends_the_program_like_any_other(tmp_path, place):
    script = f"""
import os, signal, sys
from minirlhf.app import check, cli
class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(99))
def command() -> int:
    {STRANGE_PLACES[place]}
    return 0
check.check_command = command
sys.argv = ["minirlhf", "check"]
cli.main()
"""
    (tmp_path / "program.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        capture_output=True,
        **CAN_BE_INTERRUPTED,
    )
    assert (done.returncode, done.stderr) == (130, b"minirlhf: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal of Ctrl-C")
@pytest.mark.parametrize("delay", [0.3, 0.8, 1.6])
def test_ctrl_c_in_exact_leaves_its_processes_quiet(tmp_path, delay):
    process = subprocess.Popen(
        [sys.executable, "-m", "minirlhf", "exact", "--out", str(tmp_path / "exact")],
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **CAN_BE_INTERRUPTED,
    )
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1] == "minirlhf: interrupted"


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal of Ctrl-C")
def test_ctrl_c_and_resume(tmp_path, names, capsys):
    changes = {"corpus": names, "reward": VOWELS, "eval_every": 0, "workers": 2}
    config = tiny_config(tmp_path / "run", ppo__iterations=400, **changes)
    process = subprocess.Popen(
        [sys.executable, "-m", "minirlhf", "train", *as_flags(config)],
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **CAN_BE_INTERRUPTED,
    )
    deadline = time.monotonic() + 60
    while not (config.out / "checkpoint/state.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, the workers too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("minirlhf: interrupted") and "Traceback" not in err
    done = len(metrics(config.out, "ppo"))
    assert 1 <= done < 400
    short = changed(load_config(config.out / "config.toml"), {"ppo.iterations": done + 2})
    save_config(config.out / "config.toml", short)  # no need to run them all
    assert call(capsys, "resume", config.out)[0] == 0
    assert [row["step"] for row in metrics(config.out, "ppo")] == list(range(done + 2))


# --- a system that has no more to give


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"], ["check", "--help"]])
def test_a_full_output_is_one_sentence(arguments):
    command = f"{sys.executable} -m minirlhf {' '.join(arguments)}"
    full = {"> /dev/full": b"No space left", "> /dev/full 2>&1": b"", ">&- 2>&-": b""}
    for stream, said in full.items():
        done = subprocess.run(
            ["sh", "-c", f"{command} {stream}"],
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
        )
        assert done.returncode == (0 if "-" in stream else 2)
        assert said in done.stderr and done.stderr.count(b"\n") == bool(said)


def test_notes_that_cannot_be_written_stop_nothing(monkeypatch):
    with open("/dev/full" if Path("/dev/full").exists() else os.devnull, "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert list(progress.track(range(2), "PPO")) == [0, 1]
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError("Unable to allocate 3 GiB"), "expected enough memory; got Unable to allocate"),
        (MemoryError(), "expected enough memory; got none: choose fewer --workers"),
        (OSError(11, "Resource temporarily unavailable"), "Resource temporarily unavailable"),
        (OSError(5, "Input/output error", "a/b"), "a/b: expected it to be usable; got Input"),
    ],
)
def test_an_exhausted_system_is_no_traceback(capsys, monkeypatch, error, said):
    def exhausted() -> int:
        raise error

    monkeypatch.setattr(check, "check_command", exhausted)
    assert said in refusal(capsys, "check")


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--workers", 10**6),
        ("--model.d-model", 10**6),
        ("--model.n-layer", 10**9),
        ("--max-response-tokens", 10**8),
        ("--max-prompt-tokens", 10**10),
        ("--eval-prompts", 10**9),
        ("--sft.batch-size", 10**9),
        ("--reward-model.n-layer", 10**12),
        ("--reward-model.n-pairs", 10**9),
        ("--reward-model.n-heldout-pairs", 10**9),
        ("--reward-model.n-normalize", 10**9),
        ("--ppo.batch-size", 10**9),
    ],
)
def test_a_size_beyond_the_memory_is_refused_before_anything(capsys, tmp_path, flag, value):
    started = time.perf_counter()
    message = refusal(capsys, "train", "--out", tmp_path / "run", flag, value)
    assert flag in message.partition(": ")[0] and "memory at hand" in message
    assert time.perf_counter() - started < 10 and not (tmp_path / "run").exists()


def test_a_number_of_replies_beyond_the_memory_is_refused(capsys, desk):
    assert "--n: expected sizes" in refusal(
        *(capsys, "sample", desk, "--prompt", PROMPT, "--n", 10**9)
    )


# --- progress


class Terminal:
    """Standard error as a terminal sees it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    assert list(progress.track(range(3), "PPO")) == [0, 1, 2]
    assert "PPO" in terminal.text and "3/3" in terminal.text
    assert re.search(r"\d/s", terminal.text) and "left" in terminal.text


def test_elsewhere_there_are_lines_at_intervals(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(progress.track(range(4), "PPO")) == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"PPO: {i}/4" for i in (1, 2, 3, 4)]
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e9)
    assert list(progress.track(range(4), "PPO")) == [0, 1, 2, 3]
    assert len(capsys.readouterr().err.splitlines()) == 1  # the last one always
    assert list(progress.track(range(3, 3), "PPO")) == []
    assert capsys.readouterr().err == ""


def test_after_a_resume_the_bar_begins_where_the_run_stopped(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(progress.track(range(20, 22), "PPO")) == [20, 21]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["PPO: 21/22", "PPO: 22/22"]
    spent, left = (float(s) for s in re.search(r"(\d+) s spent, (\d+) s left", lines[0]).groups())
    assert left <= spent  # of the rate of this session: not as if it had made 21 steps
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    steps = progress.track(range(20, 22), "PPO")
    next(steps), steps.close()
    assert "20/22" in terminal.text


# --- recipes


def test_a_recipe_is_overruled_by_a_file_and_by_flags(tmp_path, capsys):
    """The nearer to the user the stronger: flags, then the file, then the recipe."""
    file = tmp_path / "c.toml"
    file.write_text('[ppo]\nkl_mode = "reward_k1"\n')
    config = parse_config(
        ["--recipe", "grpo", "--config", str(file), "--ppo.samples-per-prompt", "4"]
    )
    ppo = config.ppo
    assert (ppo.advantages, ppo.kl_mode, ppo.samples_per_prompt) == ("group", "reward_k1", 4)
    said = capsys.readouterr().err
    assert "recipe grpo: --ppo.no-whiten-advantages --ppo.advantages group" in said
    assert "; overruled: --ppo.samples-per-prompt 8 --ppo.kl-mode loss_k3_tok" in said


def test_beta_is_that_of_the_stage_that_runs_and_is_said_once():
    assert parse_config(["--recipe", "dpo", "--beta", "0.3"]).dpo.kl_coef == 0.3
    config = parse_config(["--recipe", "dpo", "--stages", "all", "--beta", "0.3"])
    assert (config.ppo.kl_coef, config.dpo.kl_coef) == (0.3, DPOConfig().kl_coef)
    with pytest.raises(InputError, match="expected --beta or --ppo.kl-coef, .*; got both"):
        parse_config(["--ppo.kl-coef", "0.7", "--beta", "0.3"])


def test_a_recipe_beside_a_whole_configuration_is_refused_in_python():
    for given in ({"config": TrainConfig()}, {"ppo": PPOConfig(iterations=3)}):
        with pytest.raises(InputError, match="expected a recipe with changes to it; got"):
            minirlhf.train(recipe="grpo", progress=False, **given)
