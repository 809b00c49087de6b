"""Everything that can be set about a run: one frozen dataclass a stage, one flag a field."""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from minirlhf.disk import read_toml, write_whole
from minirlhf.errors import InputError
from minirlhf.fields import check_fields, with_fields
from minirlhf.train import dpo, reward_model, settings, sft
from minirlhf.train.dpo import DPOConfig
from minirlhf.train.reward_model import RewardModelConfig
from minirlhf.train.sft import SFTConfig


@dataclass(frozen=True)
class ModelConfig:
    """The policy's transformer; its vocabulary follows from the encoding."""

    n_layer: int = 2  # Blocks
    n_head: int = 4  # Attention heads; divides d_model
    d_model: int = 64  # Channels
    n_ctx: int = 0  # Positions; 0: as many as the longest prompt and response take
    ln_eps: float = 1e-5  # Added to the variance in layer norms
    block: Literal["gpt2", "llama"] = "gpt2"  # llama: RMSNorm, SwiGLU and rotary positions
    n_kv_head: int = 0  # Of llama: heads of keys and values, a divisor of n_head; 0: n_head
    d_ff: int = 0  # Of llama: channels inside the MLP; 0: 4 d_model
    rope_theta: float = 10000.0  # Of llama: base of the wavelengths of rotary positions
    tied: bool = True  # Is the output matrix the token embedding? False: of llama alone

    def __post_init__(self):
        sizes, counts = ("n_layer", "n_head", "d_model"), ("n_ctx", "n_kv_head", "d_ff")
        floats = ("ln_eps", "rope_theta")
        check_fields(self, "model.", at_least_1=sizes, at_least_0=counts, above_0=floats)
        C, H, llama = self.d_model, self.n_head, self.block == "llama"
        unit = 2 * H if llama else H  # rotary positions turn pairs of a head's channels
        for name, fits, expected in (
            ("n_head", C % unit == 0, f"a divisor of d_model{' / 2' * llama} = {C * H // unit}"),
            ("n_kv_head", H % (self.n_kv_head or H) == 0, f"a divisor of n_head = {H}"),
            ("n_kv_head", llama or not self.n_kv_head, "0 with block gpt2"),
            ("d_ff", llama or not self.d_ff, "0 with block gpt2"),
            ("tied", llama or self.tied, "True with block gpt2"),
        ):
            if not fits:
                raise InputError(
                    f"model.{name}: expected {expected}; got {getattr(self, name)}: change one"
                )


@dataclass(frozen=True)
class TrainConfig:
    """Supervised fine-tuning, reward model, PPO; or fine-tuning and DPO."""

    out: Path | None = None  # Run folder, a new one; default: runs/WORLD-N with the next free N
    seed: int = 0  # Of every random stream
    device: Literal["cpu", "cuda"] = "cpu"  # Where the arrays live: NumPy or CuPy
    workers: int = 0  # Processes that share the work of a batch on the CPU; 0: one for each core
    threads: int = 1  # Of NumPy's matrix products in each worker; 0: all. More slow small models
    corpus: str = ""  # Your own text, or JSON, CSV, parquet: prompt and response, or messages
    corpus_unit: Literal["auto", "line", "document"] = "auto"  # What one example of the corpus is
    pairs: str = ""  # Preferences: JSON, CSV, parquet; chosen, rejected, or responses, ranking
    columns: tuple[str, ...] = ()  # Columns of other names, like prompt=title response=body
    max_text_mb: int = 64  # Memory for the text of a file [MB]; of more, a part drawn at random
    reward: str = ""  # Instead of a reward model: FILE.py:function, module:function, length ..
    reward_timeout: float = 0.0  # Seconds that a call of the reward may take; 0: any
    init: str = ""  # Folder of a Hugging Face GPT-2 or Llama, or llama2.c's .bin, to start from
    encoding: str = ""  # A known tiktoken encoding such as gpt2; empty: one trained on the text
    vocab_size: int = 768  # Ids of the encoding that is trained
    max_prompt_tokens: int = 0  # Longest prompt, at least 3; 0: so that 95 % are whole
    max_response_tokens: int = 0  # Longest response, at least 2, with its stop token; 0: likewise
    eval_prompts: int = 256  # Held-out prompts of the final table
    eval_every: int = 10  # Iterations between evaluations; 0: at the end
    checkpoint_every: int = 10  # PPO iterations between two checkpoints
    snapshots: int = 0  # Times that PPO's replies to the same prompts are kept, for `report`
    log: Literal["", "tensorboard", "csv"] = ""  # The metrics also in tensorboard/ or metrics.csv
    halt_on: tuple[str, ...] = ()  # Rules of `diagnose` that stop PPO where they hold, or any
    stages: Literal["sft", "sft,reward", "sft,dpo", "all"] = "all"  # To run; `resume` does the rest
    model: ModelConfig = ModelConfig()  # The policy's sizes
    sft: SFTConfig = SFTConfig()  # Stage 1
    reward_model: RewardModelConfig = RewardModelConfig()  # Stage 2
    ppo: settings.PPOConfig = settings.PPOConfig()  # Stage 3
    dpo: DPOConfig = DPOConfig()  # Of --stages sft,dpo

    def __post_init__(self):
        sizes = "vocab_size max_text_mb eval_prompts checkpoint_every".split()
        limits = "max_prompt_tokens max_response_tokens reward_timeout".split()
        counts = "seed workers threads eval_every snapshots".split()
        check_fields(self, "", at_least_1=sizes, at_least_0=counts + limits)
        for name, least in (("max_prompt_tokens", 3), ("max_response_tokens", 2)):
            if 0 < (came := getattr(self, name)) < least:
                raise InputError(f"{name}: expected at least {least}, or 0; got {came}: raise it")

    @property
    def is_dpo(self) -> bool:
        """Does DPO stand in the place of reward model and PPO?"""
        return self.stages == "sft,dpo"

    @property
    def kl_coef(self) -> float:
        """beta [score per nat], where it begins."""
        return (self.dpo if self.is_dpo else self.ppo).kl_coef

    @property
    def order(self) -> list[str]:
        """The stages that the run has, or will have."""
        return ["sft", "dpo"] if self.is_dpo else ["sft", "reward_model", "ppo"]

    def refuse_in_dpo(self, reward: Any, iterations: int = 0) -> None:
        """Raise InputError where DPO would get no pairs, or a reward or iterations of PPO."""
        if self.is_dpo and (reward or iterations or (self.corpus and not self.pairs)):
            came = "a reward" if reward else f"--ppo.iterations {iterations}"
            raise InputError(
                "--stages sft,dpo: expected pairs (--pairs, or the support world's), and neither a "
                f"reward nor PPO; got {came if reward or iterations else 'a corpus alone'}: give "
                "--pairs FILE alone, or take --stages all"
            )


_CLASS = re.compile(r"^class (\w+):\n((?:    .*\n|\n)*)", re.MULTILINE)
_FIELD = re.compile(
    r"^(?:    # (.*)\n)?    (\w+): .+? = .*?(?:  # (?!type:)(.*))?$", re.MULTILINE
)  # the comment above, the name, the comment beside


def _document_fields(*modules: ModuleType) -> None:
    """Let help() of a dataclass show the comments that stand at its fields in the source."""
    for module in modules:
        for name, body in _CLASS.findall(inspect.getsource(module)):
            found = [(field, above or beside) for above, field, beside in _FIELD.findall(body)]
            lines = [f"    {field}: {says}" for field, says in found if says]
            vars(module)[name].__doc__ += "\n".join(["\n\nAttributes:", *lines])


_document_fields(settings, sft, reward_model, dpo, sys.modules[__name__])


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("ppo.optimizer.eps", its value) of every field of a dataclass, or entry of a dict."""
    is_dict = isinstance(config, dict)
    for name, value in config.items() if is_dict else vars(config).items():
        is_nested = isinstance(value, dict) if is_dict else is_dataclass(value)
        if is_nested:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def to_toml(config: Any, prefix: str = "") -> str:
    """A dataclass of numbers, strings, tuples of them, and further dataclasses as TOML."""
    lines, tables = [], []
    for name, value in vars(config).items():
        if is_dataclass(value):
            tables.append(f"\n[{prefix}{name}]\n{to_toml(value, f'{prefix}{name}.')}")
        elif value is not None:  # what JSON writes for a number, a list, a string is TOML too
            value = str(value) if isinstance(value, Path) else value
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{name} = {text}\n")
    return "".join(lines + tables)


def save_config(path: Path, config: TrainConfig) -> None:
    """Write the resolved configuration of a run."""
    write_whole(path, to_toml(config).encode())


def load_config(path: str | Path, start: TrainConfig = TrainConfig()) -> TrainConfig:
    """Read a TOML file; what it leaves out is as in `start`."""
    values = read_toml(path)
    try:
        return with_fields(start, values, "")
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix(': ')}") from error


def unused_options(config: TrainConfig) -> list[str]:
    """Options unlike their default that change nothing beside the others, a sentence a reason."""
    ppo, is_ppo, turned, notes = config.ppo, not config.is_dpo, sorted(_turned(config)), []
    n_pairs = "reward_model.n_pairs reward_model.n_heldout_pairs"
    stages = "ppo. reward_model. eval_every checkpoint_every snapshots halt_on"
    for when, is_so, begins, but in (  # then nothing reads what begins so, but for these
        ("without a critic", is_ppo and not ppo.has_critic, "ppo.lam ppo.vf_coef", ""),
        ("with --ppo.clip none", is_ppo and ppo.clip == "none", "ppo.clip_eps", ""),
        ("without --ppo.importance", is_ppo and ppo.importance == "none", "ppo.importance_cap", ""),
        ("without --corpus", not config.corpus, "corpus_unit", ""),
        ("without --corpus or --pairs", not (config.corpus or config.pairs), "columns", ""),
        ("beside --encoding", config.encoding and not config.init, "vocab_size", ""),
        ("with --model.block gpt2", config.model.block == "gpt2", "model.rope_theta", ""),
        ("beside --init", config.init, "model. encoding vocab_size", ""),
        ("without --reward", not config.reward, "reward_timeout", ""),
        ("beside --reward", config.reward, "reward_model.", "reward_model.n_normalize"),
        ("beside --pairs", config.pairs, n_pairs, ""),
        ("with --stages sft,dpo", not is_ppo, stages, f"ppo.temperature {n_pairs}"),
        ("without --stages sft,dpo", is_ppo, "dpo.", ""),
    ):
        unread = [name for name in turned if name.startswith(tuple(begins.split()))]
        flags = [f"--{name.replace('_', '-')}" for name in unread if name not in but.split()]
        if is_so and flags:
            notes.append(f"{', '.join(flags)} change{'s' * (len(flags) == 1)} nothing {when}")
    return notes


def rate_notes(config: TrainConfig) -> list[str]:
    """Learning rates left as they are for tiny models, beside --init, in one sentence."""
    rates = {"sft": "5e-5", "reward_model": "5e-5", "ppo": "1e-5", "dpo": "1e-5"}
    if config.reward or config.reward_model.init == "scratch":  # of a model that is tiny
        del rates["reward_model"]
    turned = _turned(config)
    flags = [
        f"--{stage.replace('_', '-')}.optimizer.learning-rate {rates[stage]}"
        for stage in config.order
        if stage in rates and f"{stage}.optimizer.learning_rate" not in turned
        if stage != "sft" or config.sft.steps
    ]
    said = "--init: the learning rates are those of tiny models; one that was trained wants less"
    return [f"{said}, like {' '.join(flags)}"] if flags else []


def _turned(config: TrainConfig) -> set[str]:
    """The settings unlike their default, named like ppo.optimizer.eps."""
    default = dict(flat(TrainConfig()))
    return {name for name, value in flat(config) if value != default[name]}
