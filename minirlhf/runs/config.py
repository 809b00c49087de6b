"""Everything that can be set about a run: one frozen dataclass a stage, one flag a field."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from minirlhf.disk import read_text, write_whole
from minirlhf.errors import InputError
from minirlhf.train.settings import (
    ModelConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    check_numbers,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class TrainConfig:
    """Supervised fine-tuning, reward model, PPO."""

    out: Path | None = None
    """Run folder, a new one; default: runs/WORLD-N with the next free N."""
    seed: int = 0
    """Of every random stream."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the arrays live: NumPy or CuPy."""
    workers: int = 0
    """Processes that share the work of a batch on the CPU; 0: one for each core."""
    threads: int = 1
    """Threads of NumPy's matrix products in each; 0: as many as it likes. Small models lose by
    more."""
    corpus: str = ""
    """Your own text instead of the support world: one example a line, documents between blank
    lines, or JSONL with prompt and response."""
    corpus_unit: Literal["auto", "line", "document"] = "auto"
    """What one example of the corpus is."""
    pairs: str = ""
    """Preference pairs as JSONL (prompt, chosen, rejected) for the reward model."""
    reward: str = ""
    """module:function of your own reward, text -> number, instead of a reward model."""
    encoding: str = ""
    """A known tiktoken encoding such as gpt2; empty: train a small one on the corpus."""
    vocab_size: int = 768
    """Ids of the encoding that is trained."""
    max_prompt_tokens: int = 0
    """Longest prompt, at least 3; 0: what the world suggests."""
    max_response_tokens: int = 0
    """Longest response, at least 2, the stop token included; 0: what the world suggests."""
    eval_prompts: int = 256
    """Held-out prompts of the final table."""
    eval_every: int = 10
    """PPO iterations between two evaluations; 0: only at the end."""
    checkpoint_every: int = 10
    """PPO iterations between two checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def __post_init__(self):
        check_numbers(
            self,
            "",
            at_least_1=("vocab_size", "eval_prompts", "checkpoint_every"),
            at_least_0=(
                *("seed", "workers", "threads"),
                *("max_prompt_tokens", "max_response_tokens", "eval_every"),
            ),
        )
        for name, least, why in (
            ("max_prompt_tokens", 3, "a start, a token, a separator"),
            ("max_response_tokens", 2, "a token and the stop token"),
        ):
            if 0 < getattr(self, name) < least:
                raise InputError(
                    f"{name}: expected at least {least} ({why}), or 0; got {getattr(self, name)}: "
                    "choose such a number"
                )


def to_toml(config: Any, prefix: str = "") -> str:
    """A dataclass of numbers, strings, booleans and further dataclasses as TOML."""
    lines, tables = [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            name = f"{prefix}{f.name}"
            tables.append(f"\n[{name}]\n{to_toml(value, name + '.')}")
        elif isinstance(value, bool):
            lines.append(f"{f.name} = {str(value).lower()}\n")
        elif value is None:
            continue
        elif isinstance(value, int | float):
            lines.append(f"{f.name} = {value!r}\n")
        else:
            text = json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{f.name} = {text}\n")  # a string of JSON is one of TOML
    return "".join(lines + tables)


def save_config(path: Path, config: TrainConfig) -> None:
    """Write the resolved configuration of a run."""
    write_whole(path, to_toml(config).encode())


def load_config(path: str | Path) -> TrainConfig:
    """Read a TOML file; what it leaves out has its default.

    Raises:
        InputError: no TOML, an unknown field, or a value of the wrong type.
    """
    try:
        values = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: expected TOML; got {error}: correct it") from error
    return _fill(TrainConfig(), values, str(path))


def _fill(default: Any, values: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(type(default))
    changes = {}
    for name, value in values.items():
        if name not in hints:
            raise InputError(
                f"{where}: expected one of {', '.join(hints)}; got {name!r}: correct the name"
            )
        current = getattr(default, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise InputError(f"{where}: expected {name} to be a table; got {value!r}")
            changes[name] = _fill(current, value, f"{where}: {name}")
        else:
            changes[name] = _cast(current, value, f"{where}: {name}")
            choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else (value,)
            if value not in choices:
                raise InputError(
                    f"{where}: {name}: expected one of {', '.join(choices)}; got {value!r}: "
                    "correct it"
                )
    return dataclasses.replace(default, **changes)


def _cast(current: Any, value: Any, where: str) -> Any:
    kind = type(current) if isinstance(current, bool | int | float) else str  # a path is a string
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"{where}: expected {kind.__name__}; got {value!r}: correct it")
    return Path(value) if current is None or isinstance(current, Path) else kind(value)
