"""Everything that can be set about a run: one frozen dataclass a stage, one flag a field."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from minirlhf.disk import read_text, write_whole
from minirlhf.errors import InputError
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.rlhf.objectives import AGGREGATIONS
from minirlhf.train.ranges import check_numbers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 1e-3
    """Highest learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: int = 0
    """Updates over which the learning rate rises."""
    floor: float = 0.0
    """Last learning rate as a share of the highest."""
    beta1: float = 0.9
    """Decay of the mean of the gradient."""
    beta2: float = 0.999
    """Decay of the mean of its square."""
    eps: float = 1e-5
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; biases and layer norms are spared."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this global norm; 0 leaves it as it is."""
    form: Literal["torch", "tf"] = "torch"
    """Where eps stands: as in PyTorch, or as in TensorFlow 1."""

    def __post_init__(self):
        check_numbers(
            self,
            "optimizer.",
            at_least_0=("learning_rate", "warmup", "weight_decay", "max_grad_norm"),
            above_0=("eps",),
            shares=("floor",),
            decays=("beta1", "beta2"),
        )


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
        check_numbers(self, "model.", at_least_1=("n_layer", "n_head", "d_model"))
        if self.d_model % self.n_head:
            raise InputError(
                f"model.n_head: expected a divisor of d_model = {self.d_model}; got {self.n_head}"
            )


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations."""

    steps: int = 850
    """Updates."""
    batch_size: int = 32
    """Demonstrations an update."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=3e-3, warmup=30, floor=0.05, beta2=0.98, eps=1e-8, weight_decay=0.01
        )
    )

    def __post_init__(self):
        check_numbers(self, "sft.", at_least_0=("steps",), at_least_1=("batch_size",))


@dataclass(frozen=True)
class RewardModelConfig:
    """Bradley-Terry reward model."""

    init: Literal["scratch", "reference"] = "scratch"
    """Start from random weights, or from the reference's (then n_layer is the reference's)."""
    n_layer: int = 1
    """Blocks of a model from scratch."""
    n_pairs: int = 1500
    """Pairs of reference samples that the annotator compares (a world without given pairs)."""
    n_heldout_pairs: int = 400
    """Further pairs, on held-out prompts, for the accuracy."""
    n_normalize: int = 1024
    """Reference samples that set mean 0 and sd 1 of the score."""
    epochs: int = 4
    """Passes over the pairs."""
    batch_size: int = 64
    """Pairs an update."""
    margin: float = 0.0
    """Score difference that the loss asks for."""
    label_smoothing: float = 0.0
    """Share of labels assumed to be flipped [0 to below 0.5]."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3, warmup=10, eps=1e-8)
    )

    def __post_init__(self):
        check_numbers(
            self,
            "reward_model.",
            at_least_1=(
                *("n_layer", "n_pairs", "n_heldout_pairs", "n_normalize"),
                *("epochs", "batch_size"),
            ),
            at_least_0=("margin", "label_smoothing"),
        )
        if self.label_smoothing >= 0.5:  # from there on the loss prefers what was rejected
            raise InputError(
                "reward_model.label_smoothing: expected at least 0 and less than 0.5; "
                f"got {self.label_smoothing}: choose such a number"
            )


@dataclass(frozen=True)
class PPOConfig:
    """PPO with the summed KL penalty."""

    iterations: int = 30
    """Batches of fresh samples."""
    batch_size: int = 128
    """Prompts, and responses, an iteration."""
    epochs: int = 4
    """Passes over each batch."""
    minibatches: int = 2
    """Updates a pass."""
    micro_batch_size: int = 0
    """The most responses in one forward and backward; bounds memory, changes no result. 0: as many
    as suit a core's cache (on a GPU: the minibatch)."""
    temperature: float = 1.0
    """Of sampling and of every log-prob [> 0]."""
    kl_coef: Annotated[float, tyro.conf.arg(aliases=["--beta"])] = 0.2
    """beta, weight of the penalty [units of the normalised score per nat]."""
    kl_mode: Literal[tuple(KL_MODES)] = "reward_k1"  # type: ignore[valid-type]
    """Where the penalty stands and which estimator it uses."""
    kl_target: float = 0.0
    """Wanted kl_seq [nats per response]: adapts kl_coef. 0: kl_coef stays fixed."""
    kl_horizon: float = 1280.0
    """Episodes over which an adaptive kl_coef may change by up to 20 %: ten default batches."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE's lambda."""
    whiten_advantages: bool = True
    """Advantages to mean 0, variance 1 over the batch's tokens."""
    whiten_rewards: bool = False
    """Token rewards to variance 1 (the mean stays)."""
    clip: Literal["ppo", "book", "none"] = "ppo"
    """Clipped surrogate: PPO's, the one-sided min(ratio, 1+e) of a textbook, or none."""
    clip_eps: float = 0.2
    """e below 1, and above it unless clip_eps_high is set."""
    clip_eps_high: float = 0.0
    """e above 1 (clip-higher). 0: as clip_eps."""
    dual_clip: float = 0.0
    """c > 1: bounds the objective from below by c A where A < 0. 0: off."""
    value_clip_eps: float = 0.0
    """Clips the value's move from the rollout's [reward units]. 0: off."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    aggregation: Literal[AGGREGATIONS] = "token-mean"  # type: ignore[valid-type]
    """How token losses become one number."""
    target_kl: float = 0.0
    """No further update once mean KL(old || policy) exceeds 1.5 of it [nats per token]. 0: off."""
    missing_eos_penalty: float = 0.0
    """Taken off the (cut) score of a response without its stop token [score units]."""
    score_clip: float = 0.0
    """Cuts the score to [-c, c] [score units]. 0: off."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-4, beta2=0.95)
    )

    def __post_init__(self):
        check_numbers(
            self,
            "ppo.",
            at_least_1=("iterations", "batch_size", "epochs", "minibatches"),
            at_least_0=(
                *("micro_batch_size", "kl_coef", "kl_target", "clip_eps", "clip_eps_high"),
                *("dual_clip", "value_clip_eps", "vf_coef", "ent_coef", "target_kl"),
                *("missing_eos_penalty", "score_clip"),
            ),
            above_0=("temperature", "kl_horizon"),
            shares=("gamma", "lam"),
        )
        if self.minibatches > self.batch_size:
            raise InputError(
                f"ppo.minibatches: expected at most batch_size = {self.batch_size}; "
                f"got {self.minibatches}"
            )
        if self.kl_target and not self.kl_coef:
            raise InputError(
                "ppo.kl_target: expected kl_coef > 0 with it, because the controller multiplies "
                "kl_coef; got 0: start from a larger kl_coef"
            )
        if self.dual_clip and self.dual_clip <= 1:
            raise InputError(
                f"ppo.dual_clip: expected 0 (off) or more than 1; got {self.dual_clip}"
            )

    @property
    def clip_range(self) -> tuple[float, float]:
        """(e_low, e_high)."""
        return self.clip_eps, self.clip_eps_high or self.clip_eps


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
