"""Bad input never yields a wrong number: one sentence, exit status 2, and nothing saved is lost."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
from safetensors.numpy import load_file, save_file
from tiny import CONFIG, Letters, make_params
from tiny_run import (
    VOWELS,
    as_flags,
    call,
    changed,
    files_under,
    interrupted_after,
    metrics,
    refusal,
    tiny_config,
    train,
    write_names,
    write_pairs,
)

from minirlhf.app import cli
from minirlhf.backend import cuda_is_available, get_xp
from minirlhf.nn.transformer import check_tokens
from minirlhf.rlhf.advantages import token_rewards
from minirlhf.rlhf.kl import summed_penalty
from minirlhf.runs import pipeline
from minirlhf.runs.checkpoint import load_state, save_state
from minirlhf.runs.config import load_config, save_config
from minirlhf.train import optimizer as optimizer_module
from minirlhf.train.batches import pad_batch
from minirlhf.train.policy import policy_forward
from minirlhf.train.reward_model import RewardModelConfig
from minirlhf.train.settings import PPOConfig


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_names(folder / "names.txt")
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    """A run with all three models, which no test changes."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_config(out, pairs=str(texts / "pairs.jsonl")))
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def scratch(texts, tmp_path, **changes):
    """The flags of a run on the names that has not begun."""
    settings = {"corpus": str(texts / "names.txt"), "reward": VOWELS, **changes}
    return ["train", *as_flags(tiny_config(tmp_path / "new", **settings))]


# --- shapes, dtypes, ids, masks


def test_wrong_shapes():
    one, two = np.zeros((2, 3)), np.zeros((2, 4))
    for wrong in (
        lambda: summed_penalty(one, two, mask=one),
        lambda: token_rewards(np.zeros(3), one, mask=one, kl_coef=0.1),
        lambda: check_tokens(np.zeros((2, 3), int), two, CONFIG),
        lambda: check_tokens(np.zeros(3, int), np.ones(3), CONFIG),
        lambda: pad_batch([[1]], [[1], [2]], pad_id=0, config=CONFIG),
    ):
        with pytest.raises(ValueError, match=r"expected .*; got"):
            wrong()


def test_wrong_shapes_in_a_checkpoint(run, capsys):
    path = run / "policy/model.safetensors"
    tensors = load_file(path)
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][1:]
    save_file(tensors, path)
    message = refusal(capsys, "sample", run, "--prompt", "tea 1")
    assert "wpe.weight" in message and str(path) in message


def test_wrong_dtypes(run, capsys):
    with pytest.raises(ValueError, match="expected integers; got float64"):
        check_tokens(np.zeros((1, 2)), np.ones((1, 2)), CONFIG)
    with pytest.raises(TypeError, match="expected a numpy or cupy array; got builtins.list"):
        get_xp([1.0])
    path = run / "policy/model.safetensors"
    save_file({name: array.astype(np.int32) for name, array in load_file(path).items()}, path)
    assert str(path) in refusal(capsys, "score", run, "--prompt", "a", "--response", "b")


def test_token_ids_outside_the_vocabulary(run, capsys):
    for ids in ([Letters.vocab_size], [-1]):
        with pytest.raises(ValueError, match=r"expected ids in \[0, 11\)"):
            pad_batch([[1]], [ids], pad_id=0, config=CONFIG)
    # an encoding with more ids than the model has rows
    content = json.loads((run / "tiktoken.json").read_text())
    largest = max(content["special_tokens"].values())
    content["special_tokens"] |= {"<|pad|>": largest + 5}
    (run / "tiktoken.json").write_text(json.dumps(content))
    for command in (["score", "--response", "b"], ["sample"]):
        message = refusal(capsys, command[0], run, "--prompt", "a", *command[1:])
        assert "vocab_size" in message


def test_an_empty_prompt(run, capsys):
    before = files_under(run)
    assert "empty prompt" in refusal(capsys, "sample", run, "--prompt", "")
    assert "empty prompt" in refusal(capsys, "score", run, "--prompt", "", "--response", "b")
    with pytest.raises(ValueError, match="non-empty prompts"):
        pad_batch([[]], [[1]], pad_id=0, config=CONFIG)
    assert files_under(run) == before


def test_an_empty_response(run, capsys):
    before = files_under(run)
    assert "empty response" in refusal(capsys, "score", run, "--prompt", "a", "--response", "")
    assert files_under(run) == before


def test_a_mask_of_zeros():
    tokens = np.zeros((2, 3), int)
    mask = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="mask"):
        check_tokens(tokens, mask, CONFIG)
    with pytest.raises(ValueError, match="expected at least one token in every response"):
        token_rewards(np.zeros(2), mask, mask=mask, kl_coef=0.1)


# --- encodings


def test_an_unknown_encoding(texts, tmp_path, capsys):
    message = refusal(capsys, *scratch(texts, tmp_path, encoding="gpt5"))
    assert "gpt2" in message and "'gpt5'" in message  # what there is, what came
    assert not (tmp_path / "new/config.toml").exists()


def test_an_encoding_whose_table_cannot_be_had(texts, tmp_path, capsys, monkeypatch):
    def no_network(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    message = refusal(capsys, *scratch(texts, tmp_path, encoding="gpt2"))
    assert "no route to host" in message and "TIKTOKEN_CACHE_DIR" in message
    assert not (tmp_path / "new/config.toml").exists()


# --- corrupt and foreign checkpoints


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40  # in the exponent of the last weight
    path.write_bytes(data)


def scribble(path):
    path.write_text("this is no checkpoint")


def edit_json(**changes):
    def edit(path):
        entries = {**json.loads(path.read_text()), **changes}
        kept = {key: value for key, value in entries.items() if value is not None}
        path.write_text(json.dumps(kept))

    return edit


def replaced_by(name):
    """The content of another file or folder of the run."""

    def replace(path):
        if path.is_dir():
            shutil.rmtree(path)
            shutil.copytree(path.parent / name, path)
        else:
            shutil.copy(path.parents[1] / name, path)

    return replace


def delete(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edit_tensors(change):
    def edit(path):
        save_file({name: change(name, array) for name, array in load_file(path).items()}, path)

    return edit


def edit_state(change):
    def edit(path):
        arrays, meta = load_state(path.parent)
        change(arrays, meta)
        save_state(path.parent, arrays, meta)

    return edit


def with_nan(name, array):
    array = array.copy()
    array.flat[0] = np.nan
    return array


LOOK = ("sample", "--prompt", "tea 1")
DAMAGES = [
    ("policy/model.safetensors", cut, LOOK),
    ("policy/model.safetensors", scribble, LOOK),
    ("policy/model.safetensors", delete, LOOK),
    ("policy/model.safetensors", edit_tensors(with_nan), LOOK),
    ("policy/model.safetensors", replaced_by("checkpoint/state.safetensors"), LOOK),
    ("policy/model.safetensors", flip, LOOK),
    ("policy/config.json", edit_json(n_layer=10**9), LOOK),
    ("policy/config.json", scribble, LOOK),
    ("policy/config.json", edit_json(model_type="llama"), LOOK),
    ("policy/heads.safetensors", cut, LOOK),
    ("policy/heads.safetensors", delete, LOOK),
    ("policy/heads.safetensors", flip, LOOK),
    ("policy/heads.safetensors", edit_tensors(lambda _, array: array.reshape(-1, 1, 1)), LOOK),
    ("policy", replaced_by("reward_model"), LOOK),
    ("reference/model.safetensors", cut, ("resume",)),
    ("reference/model.safetensors", flip, ("resume",)),
    ("reference/config.json", edit_json(n_positions=7), ("resume",)),
    ("reference", delete, ("resume",)),
    ("reference", replaced_by("policy"), ("resume",)),  # which has a head
    ("reward_model/model.safetensors", cut, ("resume",)),
    ("reward_model/heads.safetensors", delete, ("resume",)),
    ("reward_model/heads.safetensors", flip, ("resume",)),
    ("reward_model/config.json", edit_json(score_mean=None), ("resume",)),
    ("reward_model/config.json", edit_json(score_sd="large"), ("resume",)),
    ("reward_model/config.json", edit_json(score_sd=0), ("resume",)),
    ("reward_model/config.json", edit_json(score_sd=-1.0), ("resume",)),
    ("reward_model/config.json", edit_json(score_sd=1e-320), ("resume",)),
    ("reward_model/config.json", edit_json(score_mean=1e300), ("resume",)),
    ("reward_model", replaced_by("reference"), ("resume",)),
    ("reward_model", delete, ("resume",)),
    ("checkpoint/state.safetensors", cut, ("resume",)),
    ("checkpoint/state.safetensors", scribble, ("resume",)),
    ("checkpoint/state.safetensors", flip, ("resume",)),
    ("checkpoint/state.safetensors", replaced_by("policy/model.safetensors"), ("resume",)),
    ("checkpoint/state.safetensors", edit_state(lambda a, m: a.pop("mean")), ("resume",)),
    ("checkpoint/state.safetensors", edit_state(lambda a, m: m.pop("kl_coef")), ("resume",)),
    ("checkpoint/state.safetensors", edit_state(lambda a, m: m.pop("rng")), ("resume",)),
    (
        "checkpoint/state.safetensors",
        edit_state(lambda a, m: a.update(flat=a["flat"][1:])),
        ("resume",),
    ),
    (
        "checkpoint/state.safetensors",
        edit_state(lambda a, m: a.update(var=a["var"][1:])),
        ("resume",),
    ),
    *(
        ("checkpoint/state.safetensors", edit_state(change), ("resume",))
        for change in (
            lambda a, m: m["rng"].pop("rollout"),
            lambda a, m: m["rng"].update(x={}),
            lambda a, m: m.update(rng=[]),
            lambda a, m: m["rng"]["prompts"].update(bit_generator="MT19937"),
            lambda a, m: m["rng"]["prompts"]["state"].update(state=-1),
            lambda a, m: m["rng"]["prompts"].update(state="x"),
            lambda a, m: m.update(kl_coef=-5.0),
            lambda a, m: m.update(kl_coef="x", done=1),
            lambda a, m: m.update(done=99),
            lambda a, m: m.update(done=2),  # after the updates of three
            lambda a, m: m.update(done=1.5),
            lambda a, m: m.update(done="1"),
            lambda a, m: m.update(done=0),
            lambda a, m: m.update(done=True),
            lambda a, m: m.update(more=1),
            lambda a, m: m.update(log={}),
            lambda a, m: m.update(log=[1, 2]),
            lambda a, m: m["log"].update({"metrics.jsonl": 0}),
            lambda a, m: m["log"].update({"samples.jsonl": 0}),
            lambda a, m: m["log"].update({"samples.jsonl": 10**9}),
            lambda a, m: a.update(mean=a["mean"].astype(np.float64)),
            lambda a, m: a.update(flat=with_nan("", a["flat"])),
            lambda a, m: a.update(mean=a["mean"] + np.float32(np.inf)),
            lambda a, m: a.update(var=a["var"] - 1),
            lambda a, m: a.update(step=np.array(-5), skipped=np.array(17)),
            lambda a, m: a.update(step=np.array(12.0)),
        )
    ),
    ("checkpoint", delete, ("resume",)),
    ("checkpoint/config.toml", scribble, ("resume",)),
    ("tiktoken.json", scribble, ("resume",)),
    ("tiktoken.json", delete, LOOK),
    ("world.json", scribble, ("resume",)),
    ("world.json", edit_json(sha256=None), ("resume", "--ppo.iterations", 9)),
    ("world.json", edit_json(joiner=None), LOOK),
    ("world.json", edit_json(max_prompt_tokens="24"), LOOK),
    ("world.json", edit_json(max_prompt_tokens=-24), LOOK),
    ("world.json", edit_json(max_response_tokens=0), LOOK),
    ("world.json", delete, LOOK),
    ("config.toml", scribble, ("resume",)),
    ("config.toml", delete, ("resume",)),
    ("metrics.jsonl", cut, ("resume",)),
    ("samples.jsonl", delete, ("resume",)),
]


@pytest.mark.parametrize(
    "name, damage, command",
    DAMAGES,
    ids=[f"{i}-{name}-{damage.__name__}" for i, (name, damage, _) in enumerate(DAMAGES)],
)
def test_a_corrupt_or_foreign_checkpoint(run, capsys, name, damage, command):
    damage(run / name)
    before = files_under(run)
    message = refusal(capsys, command[0], run, *command[1:])
    of_log = ("metrics.jsonl", "samples.jsonl")  # where a state says that they end elsewhere
    assert any(part in message for part in (name.split("/")[0], *of_log)), message
    after = files_under(run)
    for file, content in before.items():
        if file not in ("metrics.jsonl", "samples.jsonl"):  # whose torn line may be cut off
            assert after[file] == content, f"{file} was changed"
    kept = (line for line in before["metrics.jsonl"].splitlines() if line.endswith(b"}"))
    assert after["metrics.jsonl"].splitlines() == list(kept)


def test_a_policy_that_was_lost_is_that_of_the_checkpoint(run, capsys):
    before = call(capsys, LOOK[0], run, *LOOK[1:])[:2]
    delete(run / "policy")
    assert call(capsys, LOOK[0], run, *LOOK[1:])[:2] == before


def test_a_model_with_another_vocabulary(run, capsys, tmp_path, texts):
    """Its ids would mean other words."""
    other = tiny_config(tmp_path / "other", pairs=str(texts / "pairs.jsonl"), vocab_size=265)
    train(other)
    for name, command in (
        ("policy", LOOK),
        ("reward_model", ("resume",)),
        ("reference", ("resume",)),
    ):
        copy = shutil.copytree(run, tmp_path / f"with other {name}")
        shutil.rmtree(copy / name)
        shutil.copytree(tmp_path / "other" / name, copy / name)
        message = refusal(capsys, command[0], copy, *command[1:])
        assert str(copy / name) in message and "265" in message


def test_a_folder_that_is_no_run(tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    for folder in (tmp_path / "none", tmp_path, tmp_path / "file"):
        for command in (("resume",), LOOK, ("score", "--prompt", "a", "--response", "b")):
            message = refusal(capsys, command[0], folder, *command[1:])
            assert str(folder) in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_run_that_is_not_finished(texts, tmp_path, capsys):
    config = tiny_config(tmp_path / "run", corpus=str(texts / "names.txt"), reward=VOWELS)
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after("PPO", 1))
    before = files_under(config.out)
    status, out, err = call(capsys, "sample", config.out, "--prompt", "k")
    assert status == 0 and "policy" in out and files_under(config.out) == before
    assert err == "note: the policy is that after 1 of 3 iterations of PPO\n"
    (config.out / "reference").rename(tmp_path / "elsewhere")
    message = refusal(capsys, "sample", config.out, "--prompt", "k")
    assert "minirlhf resume" in message


# --- files of the user


@pytest.mark.parametrize(
    "line, said",
    [
        ("{oops\n" * 11, "JSON"),  # ten are skipped
        ("[1, 2]\n" * 11, "braces"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "expected text; got 3"),
    ],
)
def test_a_preference_file_with_a_bad_line(texts, tmp_path, capsys, line, said):
    good = (texts / "pairs.jsonl").read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*good[:4], line, *good[4:]]) + "\n")
    message = refusal(capsys, "train", *as_flags(tiny_config(tmp_path / "new", pairs=str(bad))))
    assert message.startswith(f"{bad}:5: ") and said in message  # the line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"corpus": "none.txt"}, "none.txt: expected a file; found none"),
        ({"pairs": "none.jsonl", "reward": ""}, "none.jsonl"),
        ({"reward": ""}, "--pairs FILE or --reward"),
        ({"reward": "vowels"}, "module:function"),
        ({"reward": "no.such.module:f"}, "no.such.module"),
        ({"reward": "minirlhf.worlds.rewards:f"}, "expected a function f"),
        ({"vocab_size": 100}, "vocab_size: expected at least 260"),
    ],
)
def test_files_and_names_that_are_not_there(texts, tmp_path, capsys, changes, said):
    assert said in refusal(capsys, *scratch(texts, tmp_path, **changes))
    assert not (tmp_path / "new/config.toml").exists()


@pytest.mark.parametrize(
    "body, said",
    [
        ("return 'good'", "finite number"),
        ("return float('nan')", "finite number"),
        ("return 1 / (len(text) - len(text))", "it raised ZeroDivisionError in line 2 of"),
        ("raise SystemExit", "it raised SystemExit in line 2 of"),
        ("return 0.5", "scores that differ by more than rounding"),
    ],
)
def test_a_reward_that_is_none(texts, tmp_path, capsys, body, said):
    (tmp_path / "mine.py").write_text(f"def reward(text):\n    {body}\n")
    message = refusal(capsys, *scratch(texts, tmp_path, reward=f"{tmp_path}/mine.py:reward"))
    assert said in message and "mine.py" in message or said.startswith("scores")
    # before anything is done, unless a few texts do not show it: then what was made is kept
    begun = (tmp_path / "new/reference/model.safetensors").exists()
    assert begun == said.startswith("scores") and (begun or not (tmp_path / "new").exists())


def test_a_folder_that_holds_a_run_already(run, texts, tmp_path, capsys):
    before = files_under(run)
    message = refusal(capsys, *scratch(texts, tmp_path), "--out", run)
    assert str(run) in message and "resume" in message
    assert files_under(run) == before


def test_a_file_in_the_place_of_the_folder(texts, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    message = refusal(capsys, "train", "--out", tmp_path / "file", "--corpus", tmp_path / "none")
    assert message.startswith(f"--out {tmp_path / 'file'}: expected a folder; got a file")


def test_a_folder_that_cannot_be_written(texts, tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    message = refusal(capsys, *scratch(texts, tmp_path), "--out", tmp_path / "file/run")
    assert str(tmp_path / "file") in message
    assert (tmp_path / "file").read_text() == "text"


def test_a_wrong_configuration_file(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("[ppo]\nbeta = 1\n")
    assert "'beta'" in refusal(capsys, "train", "--config", tmp_path / "c.toml")
    assert "none.toml" in refusal(capsys, "train", "--config", tmp_path / "none.toml")
    assert "--config" in refusal(capsys, "train", "--config")


# --- nan and inf


def broken_gradient(monkeypatch, at, path="transformer.blocks.0.mlp.up.w"):
    """From the `at`-th minibatch on, one tensor's gradient is nan."""
    original, calls = optimizer_module.Optimizer.step, iter(range(10**6))

    def step(self, gradients, **told):
        if "value_head" in gradients and next(calls) >= at:
            gradients["transformer"]["blocks"][0]["mlp"]["up"]["w"].flat[0] = np.nan
        return original(self, gradients, **told)

    monkeypatch.setattr(optimizer_module.Optimizer, "step", step)


def test_nan_in_a_gradient_stops_training_and_keeps_the_last_checkpoint(
    texts, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        broken_gradient(patch, at=9)  # four updates an iteration: in the third
        message = refusal(capsys, *scratch(texts, tmp_path))
    assert "PPO iteration 2" in message  # counted from 0, as in metrics.jsonl
    assert "transformer.blocks.0.mlp.up.w" in message  # which tensor
    assert str(tmp_path / "new/checkpoint") in message  # what is left
    assert len(metrics(tmp_path / "new", "ppo")) == 2
    # ... which goes on as if nothing had happened, once its cause is gone
    config = load_config(tmp_path / "new/config.toml")
    train(changed(config, {"out": tmp_path / "healthy"}))
    status, _, _ = call(capsys, "resume", tmp_path / "new")
    assert status == 0
    ours, theirs = (
        (tmp_path / name / "policy/model.safetensors").read_bytes() for name in ("new", "healthy")
    )
    assert ours == theirs


def test_nan_before_the_first_checkpoint(texts, tmp_path, capsys, monkeypatch):
    broken_gradient(monkeypatch, at=0)
    message = refusal(capsys, *scratch(texts, tmp_path))
    assert "PPO iteration 0" in message and "no checkpoint yet" in message
    assert not (tmp_path / "new/policy").exists()


def test_nan_in_a_loss(texts, tmp_path, capsys, monkeypatch):
    """The gradients are finite, the number is not."""
    original = pipeline.train_sft.__globals__["sft_loss_and_gradients"]
    monkeypatch.setitem(
        pipeline.train_sft.__globals__,
        "sft_loss_and_gradients",
        lambda *args: (float("inf"), original(*args)[1]),
    )
    message = refusal(capsys, *scratch(texts, tmp_path))
    assert "supervised fine-tuning step 0: " in message and "the loss (inf)" in message
    assert not (tmp_path / "new/reference").exists()  # no half-trained model passes for a whole


@pytest.mark.parametrize("learning_rate", [1e10, 1e30, 1e39])
@pytest.mark.parametrize("updates", [{}, {"ppo__epochs": 1, "ppo__minibatches": 1}])
def test_divergence_leaves_a_finite_checkpoint_or_none(
    texts, tmp_path, capsys, learning_rate, updates
):
    """An update that makes the parameters nan is never saved as the last good one."""
    flags = scratch(texts, tmp_path, ppo__optimizer__learning_rate=learning_rate, **updates)
    message = refusal(capsys, *flags)
    assert "PPO iteration" in message and "learning rate" in message
    assert "transformer." in message or "value_head." in message
    if (tmp_path / "new/checkpoint/state.safetensors").exists():
        arrays, _ = load_state(tmp_path / "new/checkpoint")
        assert np.isfinite(arrays["flat"]).all()
        assert "last good checkpoint" in message
    assert not (tmp_path / "new/policy").exists()


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_divergence_of_the_other_stages(texts, tmp_path, capsys, stage):
    settings = {f"{stage}__optimizer__learning_rate": 1e39, f"{stage}__optimizer__warmup": 0}
    settings |= {"sft__steps": 1} if stage == "sft" else {"pairs": str(texts / "pairs.jsonl")}
    config = tiny_config(tmp_path / "new", **settings)
    if stage == "sft":
        config = changed(config, {"corpus": str(texts / "names.txt"), "reward": VOWELS})
    message = refusal(capsys, "train", *as_flags(config))
    assert "transformer." in message
    title = {"sft": "supervised fine-tuning", "reward_model": "reward model"}[stage]
    assert message.startswith(f"{title} step ")
    folder = {"sft": "reference", "reward_model": "reward_model"}[stage]
    assert not (tmp_path / "new" / folder).exists()


def test_a_diverged_run_is_saved_by_another_learning_rate(texts, tmp_path, capsys):
    """What the message advises: change config.toml, resume."""
    flags = scratch(
        texts, tmp_path, ppo__optimizer__learning_rate=1e39, ppo__optimizer__schedule="constant"
    )
    refusal(capsys, *flags)
    config = load_config(tmp_path / "new/config.toml")
    healthy = changed(config, {"ppo.optimizer.learning_rate": 1e-2})
    save_config(tmp_path / "new/config.toml", healthy)
    status, out, _ = call(capsys, "resume", tmp_path / "new")
    assert status == 0 and "run folder" in out


def test_in_a_process_of_its_own_nothing_else_is_said(texts, tmp_path):
    """No warnings of NumPy beside the sentence, and no traceback."""
    default = RewardModelConfig()
    flags = scratch(texts, tmp_path, ppo__optimizer__learning_rate=1e30, reward_model=default)
    done = subprocess.run(
        [sys.executable, "-m", "minirlhf", *flags], capture_output=True, text=True
    )
    assert done.returncode == 2
    progress = (
        "run ",
        "note: ",
        "supervised fine-tuning: ",
        "fine-tuning: ",
        "reward model: ",
        "scaling ",
        "PPO: ",
        "minirlhf: ",
    )
    lines = done.stderr.splitlines()
    assert all(line.startswith(progress) for line in lines), done.stderr
    assert [line.startswith("minirlhf: ") for line in lines].count(True) == 1


# --- devices


@pytest.mark.skipif(cuda_is_available(), reason="there is a GPU")
def test_device_cuda_without_a_gpu(run, texts, tmp_path, capsys):
    message = refusal(capsys, *scratch(texts, tmp_path, device="cuda"))
    assert message.startswith("--device cuda: expected") and "--device cpu" in message
    assert not (tmp_path / "new").exists()
    # a run that began on a GPU is looked at on the CPU, and says what is missing if it shall go on
    config = load_config(run / "config.toml")
    save_config(run / "config.toml", changed(config, {"device": "cuda"}))
    before = files_under(run)
    assert "--device cuda" in refusal(capsys, "resume", run)
    assert call(capsys, *LOOK[:1], run, *LOOK[1:])[0] == 0
    assert files_under(run) == before


# --- the developer's way to see where it came from


def test_the_traceback_is_there_for_who_asks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINIRLHF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="expected a run folder"):
        cli.main(["resume", str(tmp_path)])


def test_the_gate_is_shut():
    """`policy_forward` does not check its batch again: `pad_batch` did."""
    params = make_params()
    good = pad_batch([[1, 2]], [[3]], pad_id=0, config=CONFIG, dtype=np.float64)
    assert np.isfinite(policy_forward(params, batch=good, config=CONFIG)[0].logp).all()
    for prompts, responses in ([[[1] * 13], [[2]]], [[[1, 99]], [[2]]], [[[]], [[2]]]):
        with pytest.raises(ValueError, match="expected"):
            pad_batch(prompts, responses, pad_id=0, config=CONFIG)


def test_settings_of_ppo_that_cannot_be():
    with pytest.raises(ValueError, match="ppo.batch_size: expected at least 1; got 0"):
        PPOConfig(batch_size=0)
