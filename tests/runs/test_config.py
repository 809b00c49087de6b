"""The configuration: every field through TOML and back, and nothing wrong gets in."""

import ast
import dataclasses
import math
import re
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import as_flags, changed, leaves, tiny_config

from minirlhf.app.commands import parse_config
from minirlhf.errors import InputError
from minirlhf.fields import with_fields
from minirlhf.runs import config as config_module
from minirlhf.runs.config import TrainConfig, load_config, save_config, to_toml
from minirlhf.train.reward_model import RewardModelConfig
from minirlhf.train.settings import PPOConfig

PACKAGE = Path(config_module.__file__).parents[1]
TEXT_FIELDS = ("corpus", "pairs", "reward", "encoding")


def hint_of(path):
    """The declared type of a field."""
    *parents, name = path.split(".")
    owner = TrainConfig()
    for parent in parents:
        owner = getattr(owner, parent)
    return get_type_hints(type(owner))[name]


def other_value(path, value):
    """A legal value unlike the default."""
    hint = hint_of(path)
    if path == "ppo.ratio":
        return "sequence"  # the other one has no dual clip
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint)[::-1] if choice != value)
    if isinstance(value, bool):
        return not value
    if path == "model.d_model":
        return 32
    if path == "model.n_head":
        return 2
    if isinstance(value, tuple):
        return ("any",) if path == "halt_on" else ('prompt=my "title"', "response=body")
    if path in (
        *("ppo.dual_clip", "max_prompt_tokens", "max_response_tokens"),
        *("ppo.importance_cap", "ppo.samples_per_prompt"),  # of a batch of 129
    ):
        return type(value)(3)  # the least above 0 that makes sense
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 3 + 0.125
    return Path("other folder") if path == "out" else 'C:\\text "1".txt'


FIELDS = dict(leaves(TrainConfig()))
NEEDS = {  # what else must be set
    "ppo.samples_per_prompt": {"ppo.batch_size": 129},
    "ppo.importance": {"ppo.sampler_bits": 7},
    **{f"model.{name}": {"model.block": "llama"} for name in ("n_kv_head", "d_ff", "tied")},
}


# --- there and back


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_survives_toml(tmp_path, path):
    changes = {**NEEDS.get(path, {}), path: other_value(path, FIELDS[path])}
    config = changed(TrainConfig(), changes)
    assert config != TrainConfig()
    save_config(tmp_path / "config.toml", config)
    again = load_config(tmp_path / "config.toml")
    assert again == config
    assert {p: type(v) for p, v in leaves(again)} == {p: type(v) for p, v in leaves(config)}


def test_all_fields_at_once_survive_toml(tmp_path):
    others = {path: other_value(path, v) for path, v in FIELDS.items()}
    del others["ppo.advantages"]  # without a critic some of them would change nothing
    config = changed(TrainConfig(), others)
    assert all(value != FIELDS[path] for path, value in leaves(config) if path in others)
    save_config(tmp_path / "config.toml", config)
    assert load_config(tmp_path / "config.toml") == config


@given(
    texts=st.fixed_dictionaries({name: st.text() for name in TEXT_FIELDS}),
    out=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    seed=st.integers(0, 2**63 - 1),
    rate=st.floats(0, 1e300),
    beta=st.floats(0, 1e3),
)
def test_any_text_and_number_survives_toml(tmp_path_factory, texts, out, seed, rate, beta):
    """Quotes, back-slashes, line ends, tabs, NUL, signs of every alphabet."""
    changes = {**texts, "out": Path(out), "seed": seed, "ppo.kl_coef": beta}
    config = changed(TrainConfig(), {**changes, "sft.optimizer.learning_rate": rate})
    path = tmp_path_factory.mktemp("config") / "config.toml"
    save_config(path, config)
    assert load_config(path) == config


def test_the_file_is_plain_toml():
    tables = tomllib.loads(to_toml(TrainConfig()))
    assert tables["ppo"]["optimizer"]["beta2"] == 0.95
    assert tables["ppo"]["whiten_advantages"] is True
    sizes = {"n_layer": 2, "n_head": 4, "d_model": 64, "n_ctx": 0, "ln_eps": 1e-5}
    sizes |= {"block": "gpt2", "n_kv_head": 0, "d_ff": 0, "rope_theta": 1e4, "tied": True}
    assert tables["model"] == sizes
    assert "out" not in tables  # None: chosen when the run begins


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    (tmp_path / "c.toml").write_text("seed = 3\n[ppo]\nkl_coef = 1\n[ppo.optimizer]\neps = 0.5\n")
    config = load_config(tmp_path / "c.toml")
    expected = {"seed": 3, "ppo.kl_coef": 1.0, "ppo.optimizer.eps": 0.5}
    assert config == changed(TrainConfig(), expected)
    assert type(config.ppo.kl_coef) is float  # a whole number for a float is meant so


def test_the_default_optimizers_of_the_stages_stay_theirs(tmp_path):
    """A table that sets one field keeps the stage's own defaults of the others."""
    (tmp_path / "c.toml").write_text("[sft.optimizer]\neps = 0.5\n")
    optimizer = load_config(tmp_path / "c.toml").sft.optimizer
    assert optimizer.warmup == TrainConfig().sft.optimizer.warmup == 30


# --- what is refused


@pytest.mark.parametrize(
    "text, said",
    [
        ("sead = 1", "sead"),
        ("[ppo]\nbeta = 1", "ppo: expected one of iterations"),
        ("[ppo.optimizer]\nlr = 1", "ppo.optimizer: expected one of learning_rate"),
        ("[grpo]\nx = 1", "grpo"),
        ("seed = 1.5", "seed: expected int; got 1.5"),
        ('seed = "1"', "seed: expected int"),
        ("seed = true", "seed: expected int; got True"),
        ("[ppo]\nkl_coef = false", "kl_coef: expected float; got False"),
        ("[ppo]\nwhiten_rewards = 1", "whiten_rewards: expected bool; got 1"),
        ("corpus = 3", "corpus: expected str; got 3"),
        ("out = 3", "out: expected a path; got 3"),
        ('columns = "a=b"', "columns: expected a list of texts; got 'a=b'"),
        ("columns = [1]", "columns: expected a list of texts; got [1]"),
        ("out = []", "out: expected a path"),
        ("ppo = 3", "ppo: expected a table, PPOConfig or a dict; got 3"),
        ("seed = 2020-01-01", "seed: expected int"),
        ('device = "gpu"', "device: expected one of cpu, cuda; got 'gpu'"),
        ('[ppo]\nclip = "trpo"', "clip: expected one of ppo, book, none; got 'trpo'"),
        ('[ppo]\nkl_mode = "k4"', "kl_mode: expected one of reward_k1"),
        ('[sft.optimizer]\nschedule = "step"', "schedule: expected one of linear"),
        ("seed = ", "expected TOML"),
        ("seed = 1\nseed = 2", "expected TOML"),
        ("[ppo", "expected TOML"),
        ("just text", "expected TOML"),
        ("", "the file is empty"),
        ("\xff", None),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence_that_names_it(tmp_path, text, said):
    path = tmp_path / "wrong.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        load_config(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert (said or "UTF-8") in message


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a file; found none"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(InputError, match="got a folder"):
        load_config(tmp_path)


IMPOSSIBLE = {
    "seed": -1,
    "workers": -1,
    "threads": -1,
    "vocab_size": 0,
    "max_text_mb": 0,
    "max_prompt_tokens": -1,
    "max_response_tokens": -1,
    "eval_prompts": 0,
    "eval_every": -1,
    "reward_timeout": -0.5,
    "checkpoint_every": 0,
    "snapshots": -1,
    "model.n_layer": 0,
    "model.n_head": 3,  # does not divide 64
    "model.d_model": 0,
    "model.n_ctx": -1,
    "model.ln_eps": 0.0,
    "model.n_kv_head": -1,
    "model.d_ff": -1,
    "model.rope_theta": 0.0,
    "sft.steps": -1,
    "sft.batch_size": 0,
    "reward_model.n_layer": 0,
    "reward_model.n_pairs": 0,
    "reward_model.n_heldout_pairs": 0,
    "reward_model.n_normalize": 1,
    "reward_model.epochs": 0,
    "reward_model.batch_size": 0,
    "reward_model.margin": math.inf,
    "reward_model.label_smoothing": 0.5,
    "dpo.kl_coef": 0.0,
    "dpo.label_smoothing": 0.5,
    "dpo.epochs": 0,
    "dpo.batch_size": 0,
    "ppo.iterations": 0,
    "ppo.batch_size": 0,
    "ppo.epochs": 0,
    "ppo.minibatches": 0,
    "ppo.micro_batch_size": -1,
    "ppo.temperature": 0.0,
    "ppo.kl_coef": -0.1,
    "ppo.kl_target": -1.0,
    "ppo.kl_horizon": 0.0,
    "ppo.gamma": 1.1,
    "ppo.lam": -0.1,
    "ppo.clip_eps": -0.2,
    "ppo.clip_eps_high": -0.2,
    "ppo.dual_clip": 0.5,
    "ppo.value_clip_eps": -0.1,
    "ppo.vf_coef": math.nan,
    "ppo.ent_coef": math.inf,
    "ppo.target_kl": -0.1,
    "ppo.samples_per_prompt": 0,
    "ppo.reset_reference_every": -1,
    "ppo.sampler_bits": 24,
    "ppo.importance_cap": 1.0,
    "ppo.missing_eos_penalty": math.nan,
    "ppo.score_clip": -1.0,
    **{
        f"{stage}.optimizer.{name}": value
        for stage in ("sft", "reward_model", "dpo", "ppo")
        for name, value in {
            "learning_rate": -1e-3,
            "warmup": -1,
            "floor": 1.5,
            "beta1": 1.0,
            "beta2": -0.1,
            "eps": 0.0,
            "weight_decay": -0.1,
            "max_grad_norm": -1.0,
        }.items()
    },
}


def test_every_number_has_an_impossible_value():
    numbers = {path for path, value in FIELDS.items() if type(value) in (int, float)}
    assert numbers == IMPOSSIBLE.keys()


@pytest.mark.parametrize("path", IMPOSSIBLE)
def test_impossible_numbers_are_refused_and_named(path):
    with pytest.raises(InputError) as error:
        changed(TrainConfig(), {path: IMPOSSIBLE[path]})
    message = str(error.value)
    assert path.split(".")[-1] in message and "expected" in message and "\n" not in message
    with pytest.raises(InputError):  # nan is never in a range
        changed(TrainConfig(), {path: math.nan})


def test_a_prompt_and_a_response_need_room():
    for name, least in (("max_prompt_tokens", 3), ("max_response_tokens", 2)):
        for value in (0, least, least + 1):
            assert dict(leaves(changed(TrainConfig(), {name: value})))[name] == value
        for value in range(1, least):
            with pytest.raises(InputError, match=f"{name}: expected at least {least}"):
                changed(TrainConfig(), {name: value})


def test_labels_may_be_flipped_less_than_half_of_the_time():
    for value in (0.0, 0.49):
        assert RewardModelConfig(label_smoothing=value).label_smoothing == value
    for value in (-0.1, 0.5, 1.0):
        with pytest.raises(InputError, match="label_smoothing: expected at least 0"):
            RewardModelConfig(label_smoothing=value)


def test_more_minibatches_than_responses_are_refused():
    with pytest.raises(InputError, match="minibatches"):
        changed(TrainConfig(), {"ppo.batch_size": 3, "ppo.minibatches": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_prompt": 3}, "samples_per_prompt: expected a divisor of 128; got 3"),
        ({"advantages": "group"}, "samples_per_prompt: expected at least 2 with advantages group"),
        ({"advantages": "batch", "gamma": 0.9}, "gamma: expected 1 with advantages batch; got 0.9"),
        ({"advantages": "batch", "value_clip_eps": 0.2}, "value_clip_eps: expected 0 without"),
        ({"ratio": "clipped-weight", "dual_clip": 3.0}, "dual_clip: expected 0 with clipped-weig"),
        (
            {"advantages": "group", "samples_per_prompt": 2, "whiten_rewards": True},
            "whiten_rewards: expected False with group; got True",
        ),
        ({"importance": "mis"}, "importance: expected none, or sampler_bits with it: .*; got mis"),
    ],
)
def test_what_would_change_nothing_beside_another_setting_is_refused(changes, message):
    with pytest.raises(InputError, match=f"ppo.{message}"):
        PPOConfig(**changes)


def test_a_dict_of_a_nested_field_goes_over_what_is_there():
    start = changed(TrainConfig(), {"ppo.kl_coef": 0.3, "ppo.optimizer.eps": 0.5})
    config = with_fields(start, {"ppo": {"clip_eps": 0.1, "optimizer": {"beta1": 0.5}}}, "train")
    assert (config.ppo.kl_coef, config.ppo.clip_eps) == (0.3, 0.1)
    assert (config.ppo.optimizer.eps, config.ppo.optimizer.beta1) == (0.5, 0.5)
    with pytest.raises(InputError, match="^ppo.optimizer: expected one of .*; got 'beta3'"):
        with_fields(start, {"ppo": {"optimizer": {"beta3": 0.5}}}, "train")


# --- flags


def test_every_field_is_a_flag():
    config = changed(
        TrainConfig(),
        {
            path: other_value(path, value)
            for path, value in FIELDS.items()
            if path not in (*TEXT_FIELDS, "out", "ppo.advantages")
        },
    )
    config = changed(config, {"corpus": "my text.txt", "out": Path("a/b")})
    assert parse_config(as_flags(config)) == config
    assert parse_config([]) == TrainConfig()


def test_every_field_is_documented():
    """The comment at a field is its help, on the command line and in help()."""
    config = TrainConfig()
    for part in (config, config.model, config.sft, config.sft.optimizer):
        assert_documented(part)
    for part in (config.reward_model, config.ppo):
        assert_documented(part)


def assert_documented(config):
    said = dict(re.findall(r"^    (\w+): (.+)$", type(config).__doc__, re.MULTILINE))
    for f in dataclasses.fields(config):
        assert len(said.get(f.name, "")) > 4 or f.name == "optimizer", f.name
        assert "type: ignore" not in said.get(f.name, "")


# --- Python 3.11


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_the_package_is_python_3_11(path):
    """The grammar of 3.11, and no name that the standard library has only since 3.12."""
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 11))
    newer = {"typing": {"override"}, "itertools": {"batched"}}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not newer.get(node.module, set()) & {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr not in newer.get(node.value.id, set())


# --- values are values


def test_configurations_are_frozen_and_share_nothing():
    one, other = TrainConfig(), TrainConfig()
    for part in (one, one.ppo, one.ppo.optimizer):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.seed = 1
    assert one == other and hash(one.ppo) == hash(other.ppo)
    assert tiny_config("a") == tiny_config("a") != tiny_config("b")
