"""Everything that can be set about a run: one frozen dataclass a stage, one flag a field."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from minirlhf.disk import read_text, write_whole
from minirlhf.errors import InputError
from minirlhf.train.ppo import PPOConfig
from minirlhf.train.reward_model import RewardModelConfig
from minirlhf.train.sft import SFTConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class ModelConfig:
    """The policy's transformer; its vocabulary and positions follow from the world."""

    n_layer: int = 2
    """Blocks."""
    n_head: int = 4
    """Attention heads; divides d_model."""
    d_model: int = 64
    """Channels."""

    def __post_init__(self):
        if min(self.n_layer, self.n_head, self.d_model) < 1 or self.d_model % self.n_head:
            raise InputError(
                "model: expected n_layer, n_head, d_model >= 1 with n_head dividing d_model; "
                f"got {self.n_layer}, {self.n_head}, {self.d_model}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Supervised fine-tuning, reward model, PPO."""

    out: Path = Path("runs/support")
    """Run folder."""
    seed: int = 0
    """Of every random stream."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the arrays live: NumPy or CuPy."""
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
    """Longest prompt; 0: what the world suggests."""
    max_response_tokens: int = 0
    """Longest response, the stop token included; 0: what the world suggests."""
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
        elif isinstance(value, int | float):
            lines.append(f"{f.name} = {value!r}\n")
        else:
            text = str(value).replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'{f.name} = "{text}"\n')
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
    return dataclasses.replace(default, **changes)


def _cast(current: Any, value: Any, where: str) -> Any:
    kind = type(current)
    wanted = {bool: bool, int: int, float: (int, float), str: str}.get(kind, str)
    if not isinstance(value, wanted) or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"{where}: expected {kind.__name__}; got {value!r}: correct it")
    return value if isinstance(current, str | bool) else type(current)(value)
