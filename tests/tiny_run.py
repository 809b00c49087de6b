"""Whole runs in a fraction of a second, and what they left behind, ready to be compared."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from minirlhf.app.cli import main
from minirlhf.runs.config import ModelConfig, TrainConfig
from minirlhf.runs.log import read_jsonl
from minirlhf.runs.pipeline import Result, run_stages
from minirlhf.runs.session import open_session, reopen_session
from minirlhf.train.reward_model import RewardModelConfig
from minirlhf.train.settings import OptimizerConfig, PPOConfig
from minirlhf.train.sft import SFTConfig
from minirlhf.tree import tree_items

STAGES = ("sft", "reward_model", "ppo")
VOWELS = "minirlhf.worlds.rewards:vowel_share"


def tiny_config(out, **changes) -> TrainConfig:
    """Every stage on the support world; changes as `ppo__batch_size=4` or `seed=1`."""
    config = TrainConfig(
        out=Path(out),
        workers=1,
        vocab_size=300,
        max_response_tokens=10,
        eval_prompts=12,
        eval_every=2,
        checkpoint_every=1,
        model=ModelConfig(n_layer=1, n_head=2, d_model=8),
        sft=SFTConfig(
            steps=6,
            batch_size=8,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup=2, weight_decay=0.01),
        ),
        reward_model=RewardModelConfig(
            n_pairs=32,
            n_heldout_pairs=16,
            n_normalize=24,
            epochs=2,
            batch_size=16,
            optimizer=OptimizerConfig(learning_rate=5e-3),
        ),
        ppo=PPOConfig(
            iterations=3,
            batch_size=12,
            epochs=2,
            minibatches=2,
            optimizer=OptimizerConfig(learning_rate=1e-2),
        ),
    )
    return changed(config, {name.replace("__", "."): value for name, value in changes.items()})


def train(config, **shown) -> Result | None:
    """A new run, through all its stages."""
    return run_stages(open_session(config, **shown))


def resume(run, **options) -> Result | None:
    """Go on with a run where it stopped."""
    return run_stages(reopen_session(run, **options))


def changed(config, changes):
    """The dataclass with other fields: {"ppo.optimizer.eps": 1e-3, "seed": 1}."""
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        config = dataclasses.replace(
            config, **{first: changed(getattr(config, first), {rest: value}) if rest else value}
        )
    return config


def leaves(config, prefix=""):
    """(dotted path, value) of every field that is not a dataclass itself."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def as_flags(config) -> list[str]:
    """The same configuration as flags of `minirlhf train`."""
    flags = []
    for path, value in leaves(config):
        flag = "--" + path.replace("_", "-")
        if isinstance(value, bool):
            *parents, name = path.replace("_", "-").split(".")
            flags.append("--" + ".".join([*parents, name if value else f"no-{name}"]))
        elif isinstance(value, tuple):
            flags += [flag, *value] if value else []
        elif value is not None and value != "":
            flags += [flag, str(value)]
    return flags


# --- files to train on

SYLLABLES = ("ka", "lo", "mi", "tru", "sen", "bri", "no", "va")


def write_names(path, n=40) -> str:
    """One made-up name a line: the prompt is its first letter."""
    draw = random.Random(0)
    names = {"".join(draw.choices(SYLLABLES, k=draw.randint(2, 3))) for _ in range(n)}
    Path(path).write_text("\n".join(sorted(names)) + "\n", encoding="utf-8")
    return str(path)


def write_pairs(path, n=30) -> str:
    """Preferences in JSONL: the reply that is glad was preferred to the one that is not."""
    draw = random.Random(0)
    lines = []
    for i in range(n):
        thing = draw.choice(("tea", "rain", "work", "music"))
        lines.append(
            {
                "prompt": f"{thing} {i}",
                "chosen": draw.choice(("good good", "good yes", "yes good")),
                "rejected": draw.choice(("bad bad", "bad no", "no bad")),
            }
        )
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


# --- conversations: what training writes for them is what the chat template has to write


def chat(*turns) -> list[dict]:
    """Messages of ("user", "..") and so on."""
    return [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]


SAYS, ASKS, ANSWERS = ("system", " Be\nbrief. "), ("user", "kalo?"), ("assistant", "mi.")
CHATS = (  # each ends with the reply that is learnt
    chat(ASKS, ANSWERS),
    chat(SAYS, ASKS, ANSWERS),
    chat(SAYS, ASKS, ANSWERS, ("user", " And then? "), ("assistant", " tru\n")),
    chat(ASKS, ANSWERS, ("assistant", ""), ("user", "{{ x }}"), ("tool", "3"), ANSWERS),
    chat(("system", " \n"), ASKS, ANSWERS),
)


# --- what a run leaves behind


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith("time/")}


def metrics(folder, stage=None) -> list[dict]:
    """metrics.jsonl without the times, of all stages or of one."""
    rows = map(without_times, read_jsonl(Path(folder) / "metrics.jsonl"))
    return [row for row in rows if stage is None or row["stage"] == stage]


def updates(folder, stage) -> list[dict]:
    """The lines of a stage's updates, without what was held out."""
    rows = (row for row in metrics(folder, stage) if "lr" in row)
    return [{k: x for k, x in row.items() if not k.startswith("heldout/")} for row in rows]


def files_under(folder) -> dict[str, bytes]:
    """Relative name -> content of every file."""
    folder = Path(folder)
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def outcome(folder) -> dict:
    """All that a seed decides about a run: {what: value}, without times and without its name."""
    folder = Path(folder)
    found = {f"metrics of {stage}": metrics(folder, stage) for stage in (*STAGES, "dpo")}
    found["metrics"] = metrics(folder)
    for name, content in files_under(folder).items():
        made = ("reference/", "reward_model/", "policy/", "checkpoint/")
        if name.startswith(made) and not name.endswith(".toml"):
            # the state's meta holds sizes of the log, in which times have more or fewer digits
            found[name] = tensor_bytes(folder / name) if "state." in name else content
        elif name in ("samples.jsonl", "snapshots.jsonl", "tiktoken.json"):
            found[name] = content
    result = json.loads((folder / "result.json").read_text())
    return {**found, "result": {key: result[key] for key in ("reference", "policy")}}


def tensor_bytes(path) -> bytes:
    """A safetensors file without its header."""
    data = Path(path).read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def differences(a: dict, b: dict) -> list[str]:
    """Where two outcomes differ."""
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


# --- runs that are interrupted


def interrupted_after(title: str, steps: int, error=KeyboardInterrupt):
    """A `track` that raises after so many steps of the stage with this title."""

    def track(items, name):
        for done, item in enumerate(items):
            if name == title and done == steps:
                raise error
            yield item

    return track


def flat(tree) -> np.ndarray:
    """All leaves of a tree in one vector."""
    return np.concatenate([leaf.reshape(-1) for _, leaf in tree_items(tree)])


# --- the command line


def call(capsys, *arguments):
    """`minirlhf ARGUMENTS` in this process: (exit status, standard output, standard error)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code or 0, *capsys.readouterr()


def refusal(capsys, *arguments) -> str:
    """The one sentence that a refused command says: exit status 2, no traceback."""
    status, _, err = call(capsys, *arguments)
    said = [line for line in err.splitlines() if line.startswith("minirlhf: ")]
    assert status == 2, err
    assert len(said) == 1 and err.splitlines()[-1] == said[0], err
    assert "Traceback" not in err and "Warning" not in err
    message = said[0].removeprefix("minirlhf: ")
    assert "expected" in message and len(message) <= 600, message
    return message
