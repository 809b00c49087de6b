"""A session works on a run: its settings, world, encoding and random streams; opened and forked.

Every stage draws from a random stream of its own, so a stage that is read back from the folder
leaves the others' numbers as they are: that is what makes `resume` exact.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minirlhf.backend import array_module, to_device
from minirlhf.disk import next_numbered_folder, parse_object, read_text, write_whole
from minirlhf.errors import InputError
from minirlhf.nn.sampling import Sampling
from minirlhf.nn.transformer import GPTConfig
from minirlhf.runs.config import TrainConfig, load_config, save_config
from minirlhf.runs.log import RunLog
from minirlhf.train.optimizer import NonFiniteError
from minirlhf.train.reward_model import RewardModel, score_responses
from minirlhf.train.rollout import Samples, sample_responses
from minirlhf.train.settings import PPOConfig, RewardModelConfig
from minirlhf.tree import Tree, tree_map
from minirlhf.workers import share_tree
from minirlhf.worlds.files import corpus_world
from minirlhf.worlds.rewards import absolute_reward, load_reward, name_of
from minirlhf.worlds.support import make_world
from minirlhf.worlds.tokens import (
    Tokenizer,
    load_tokenizer,
    load_tokenizer_by_name,
    save_tokenizer,
    train_tokenizer,
)
from minirlhf.worlds.world import World

STREAMS = (
    "world", "init", "sft", "pairs", "annotator", "reward_init", "reward_model", "normalize",
    "prompts", "rollout", "shuffle",
)  # fmt: skip
Reward = str | Callable[..., Any]  # module:function, or the function itself
_KEPT = ("name", "joiner", "max_prompt_tokens", "max_response_tokens")  # fields of a world


def no_progress(steps: Iterable, title: str) -> Iterable:
    """The default `track`: shows nothing."""
    return steps


@dataclass
class Session:
    """What the stages share. Arrays live on `config.device`."""

    config: TrainConfig
    world: World
    tokenizer: Tokenizer
    gpt: GPTConfig
    rng: dict[str, np.random.Generator]
    track: Callable[[Iterable, str], Iterable]
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)  # time of each stage

    @property
    def folder(self) -> Path:
        return self.config.out

    @cached_property
    def log(self) -> RunLog:
        """Opened by the first stage that writes: to look at a run changes nothing in its folder."""
        return RunLog(self.folder)

    @property
    def padding(self) -> dict[str, Any]:
        """What every function that pads sequences to a batch has to be told."""
        return {"pad_id": self.tokenizer.pad, "device": self.config.device}

    @property
    def max_prompt_tokens(self) -> int:
        return self.config.max_prompt_tokens or self.world.max_prompt_tokens

    @property
    def max_response_tokens(self) -> int:
        return self.config.max_response_tokens or self.world.max_response_tokens

    def prompt_ids(self, text: str) -> list[int]:
        return self.tokenizer.prompt_ids(text, self.max_prompt_tokens)

    def response_ids(self, text: str) -> list[int]:
        return self.tokenizer.response_ids(text, self.max_response_tokens)

    def on_device(self, tree: Tree) -> Tree:
        """A copy on the device, on a CPU where all workers see it."""
        return share_tree(tree_map(lambda array: to_device(array, self.config.device), tree))

    def sample(
        self,
        params: Tree,
        prompts: list[str],
        rng: np.random.Generator,
        sampling: Sampling = Sampling(),
    ) -> Samples:
        """Responses of a policy; top_k and top_p are for looking, never for learning."""
        samples = sample_responses(
            params,
            [self.prompt_ids(prompt) for prompt in prompts],
            config=self.gpt,
            stop_id=self.tokenizer.eos,
            max_tokens=self.max_response_tokens,
            rng=rng,
            sampling=sampling,
            **self.padding,
        )
        responses = [self.tokenizer.decode(ids) for ids in samples.response_ids]
        return samples._replace(prompts=list(prompts), responses=responses)

    def score_with(self, model: RewardModel) -> "Score":
        """What PPO maximises of this run's samples."""
        return Score(self.world, model, self.padding)

    def follow(self, loop: Iterable[dict], stage: str, n_steps: int, title: str) -> None:
        """Let a loop run to its end: progress, and a line of metrics for each of its steps."""
        done = 0
        try:
            for step, metrics in zip(self.track(range(n_steps), title), loop, strict=False):
                self.log.metrics(step, stage, metrics)
                done = step + 1
        except NonFiniteError as error:
            raise NonFiniteError(f"{title} step {done}: {error}") from error


class Score(NamedTuple):
    """The normalised score of samples: of the reward model, or of the user's own reward."""

    world: World
    model: RewardModel
    padding: dict[str, Any]

    def __call__(self, samples: Samples) -> np.ndarray:
        if self.world.reward is None:
            ids = samples.prompt_ids, samples.response_ids
            return score_responses(self.model, *ids, **self.padding)
        raw = np.array(self.world.rewards(samples.prompts, samples.responses), dtype=np.float64)
        return (raw - self.model.mean) / self.model.sd


def build_world(config: TrainConfig, reward: Reward, rng: np.random.Generator) -> World:
    """The support world, or the user's own text.

    Raises:
        InputError: options that contradict each other, or files that cannot be used.
    """
    if config.corpus or config.pairs:
        return corpus_world(
            config.corpus or None,
            unit=config.corpus_unit,
            reward=reward or None,
            pairs_path=config.pairs or None,
            rng=rng,
        )
    world = make_world(rng=rng)
    return replace(world, reward=load_reward(reward)) if reward else world


def open_session(
    config: TrainConfig,
    *,
    track: Callable[[Iterable, str], Iterable] = no_progress,
    say: Callable[[str], None] = lambda line: None,
    reward: Reward = "",
    resume: bool = False,
    look: bool = False,
) -> Session:
    """World, encoding and random streams of a run; a new one gets its folder.

    Args:
        reward: a function in the place of config.reward, which names one.
        resume: the run lies in its folder already.
        look:   ... and is only sampled from and scored with, for which its texts are not read.
    Raises:
        InputError: the folder already holds a run (and resume is False), or its texts have changed
            since it began (and resume is True).
    """
    array_module(config.device)  # refuse a device that is not there before anything is written
    if config.out is None:
        config = replace(config, out=next_folder(config))
    if not resume and (config.out / "config.toml").exists():
        raise InputError(
            f"--out {config.out}: expected a new folder; it holds a run: go on with `minirlhf "
            "resume`, or choose another folder"
        )
    if callable(reward):
        config = replace(config, reward=name_of(reward))
    streams = np.random.default_rng(config.seed).spawn(len(STREAMS))
    rng = dict(zip(STREAMS, streams, strict=True))
    look = look and bool(config.corpus or config.pairs)  # the support world needs no files
    reward = reward or config.reward
    world = _stored_world(config, reward) if look else build_world(config, reward, rng["world"])
    for note in world.notes:
        say(note)
    tokenizer = load_tokenizer(config.out) if resume else _new_tokenizer(config, world)
    session = Session(config, world, tokenizer, _sizes(config, world, tokenizer), rng, track, say)
    if not resume:
        _begin_folder(session)
    elif not look:
        _same_world(config.out, world)
    return session


def _new_tokenizer(config: TrainConfig, world: World) -> Tokenizer:
    """The encoding that was asked for, or one trained on the world's texts."""
    if config.encoding:
        return load_tokenizer_by_name(config.encoding)
    examples = [text for example in world.demonstrations for text in example]
    texts = examples + world.train_prompts + world.heldout_prompts
    return train_tokenizer(texts, vocab_size=config.vocab_size)


def _sizes(config: TrainConfig, world: World, tokenizer: Tokenizer) -> GPTConfig:
    max_prompt = config.max_prompt_tokens or world.max_prompt_tokens
    max_response = config.max_response_tokens or world.max_response_tokens
    return GPTConfig(
        vocab_size=tokenizer.vocab_size,
        n_ctx=max_prompt + max_response,
        n_layer=config.model.n_layer,
        n_head=config.model.n_head,
        d_model=config.model.d_model,
    )


def _begin_folder(session: Session) -> None:
    """Write what a run can be opened with again."""
    for note in unused_options(session.config):
        session.say(note)
    session.config = _with_absolute_paths(session.config)
    _ = session.log  # refuses a folder that cannot be written
    save_tokenizer(session.tokenizer, session.folder)
    _save_world(session.folder, session.world)
    save_config(session.folder / "config.toml", session.config)


def reopen_session(folder: str | Path, *, device: str | None = None, **shown: Any) -> Session:
    """A run that lies in a folder, finished or not.

    Args:
        device: instead of the one it was trained on.
    Raises:
        InputError: the folder holds no run, or its files are damaged.
    """
    path = Path(folder) / "config.toml"
    if not path.exists():
        raise InputError(
            f"{folder}: expected a run folder with config.toml; found none: name the folder that "
            "`minirlhf train --out` wrote"
        )
    config = replace(load_config(path), out=Path(folder))
    return open_session(replace(config, device=device or config.device), resume=True, **shown)


def fork_run(
    folder: str | Path, out: str | Path, *, ppo: PPOConfig, eval_every: int | None = None
) -> Path:
    """A new run folder with the encoding, reference and reward model of another, and its own PPO.

    `resume(out)` then runs the PPO stage alone: what differs between two forks is PPO's settings.

    Raises:
        InputError: `folder` has no reference and reward model yet, or `out` exists.
    """
    folder, out = Path(folder), Path(out)
    shared = ("tiktoken.json", "world.json", "reference", "reward_model")
    missing = [name for name in shared if not (folder / name).exists()]
    if missing or out.exists():
        came = f"{out}, which exists" if out.exists() else f"no {missing[0]} in {folder}"
        raise InputError(f"fork: expected a run with its reward model and a new folder; got {came}")
    config = load_config(folder / "config.toml")
    out.mkdir(parents=True)
    for name in shared[:2]:
        shutil.copy2(folder / name, out)
    for name in shared[2:]:
        shutil.copytree(folder / name, out / name)
    every = config.eval_every if eval_every is None else eval_every
    save_config(out / "config.toml", replace(config, out=out, ppo=ppo, eval_every=every))
    return out


def next_folder(config: TrainConfig) -> Path:
    """runs/WORLD-N with the first N that is free."""
    return next_numbered_folder(Path(config.corpus or config.pairs or "support").stem)


def unused_options(config: TrainConfig) -> list[str]:
    """Options unlike their default that change nothing beside the others, one sentence each."""
    default = TrainConfig()

    def turned(*names: str, of: Any = config, beside: Any = default) -> bool:
        return any(getattr(of, name) != getattr(beside, name) for name in names)

    of_model = {"of": config.reward_model, "beside": default.reward_model}
    learning = [f.name for f in fields(RewardModelConfig) if f.name != "n_normalize"]
    notes = []
    if turned("corpus_unit") and (not config.corpus or config.corpus.endswith(".jsonl")):
        notes.append("--corpus-unit changes nothing without a corpus of plain text")
    if config.encoding and turned("vocab_size"):
        notes.append("--vocab-size changes nothing beside --encoding")
    if config.reward and turned(*learning, **of_model):
        notes.append("of --reward-model.* only n-normalize changes anything beside --reward")
    if config.pairs and turned("n_pairs", "n_heldout_pairs", **of_model):
        notes.append("--reward-model.n-pairs and n-heldout-pairs change nothing beside --pairs")
    return notes


def cut_notes(session: Session) -> list[str]:
    """What the limits on tokens cut off, one sentence each."""
    world, tokenizer = session.world, session.tokenizer
    pairs = world.pairs or []
    texts = {  # what -> (texts, whole ids of one, limit, what is said further)
        "prompts": (
            set(world.train_prompts + world.heldout_prompts),
            *(tokenizer.prompt_ids, session.max_prompt_tokens),
            "see --max-prompt-tokens",
        ),
        "demonstrations": (
            [response for _, response in world.demonstrations],
            *(tokenizer.response_ids, session.max_response_tokens),
            "without a stop token; see --max-response-tokens",
        ),
        "replies in pairs": (
            [reply for _, chosen, rejected in pairs for reply in (chosen, rejected)],
            *(tokenizer.response_ids, session.max_response_tokens),
            "without a stop token; see --max-response-tokens",
        ),
    }
    notes = []
    for what, (items, ids_of, limit, further) in texts.items():
        if cut := sum(len(ids_of(text)) > limit for text in items):
            notes.append(f"cut {cut} of {len(items)} {what} to {limit} tokens, {further}")
    return notes


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """So that `resume` finds the files from any directory."""
    return replace(
        config,
        corpus=config.corpus and os.path.abspath(config.corpus),
        pairs=config.pairs and os.path.abspath(config.pairs),
        reward=absolute_reward(config.reward),
    )


def _digest(world: World) -> str:
    """SHA-256 of all texts that training reads."""
    texts = (world.demonstrations, world.train_prompts, world.heldout_prompts, world.pairs)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _stored_world(config: TrainConfig, reward: Reward) -> World:
    """What sampling and scoring need of a world of files, which may be gone by now."""
    path = config.out / "world.json"
    stored = parse_object(read_text(path), str(path))
    kept = {name: stored.get(name) for name in _KEPT}
    kinds = [type(value) for value in kept.values()]
    if kinds != [str, str, int, int]:
        raise InputError(f"{path}: expected {', '.join(_KEPT)}; got {kept}: restore the file")
    function = load_reward(reward) if reward else None
    return World(demonstrations=[], train_prompts=[], heldout_prompts=[], reward=function, **kept)


def _save_world(folder: Path, world: World) -> None:
    kept = {name: getattr(world, name) for name in _KEPT}
    content = {**kept, "sha256": _digest(world)}
    write_whole(folder / "world.json", (json.dumps(content, indent=2) + "\n").encode())


def _same_world(folder: Path, world: World) -> None:
    path = folder / "world.json"
    if parse_object(read_text(path), str(path)).get("sha256") != _digest(world):
        raise InputError(
            f"{path}: expected the texts that the run began with; the corpus, the pairs or the "
            "seed have changed: restore them, or train in a new folder"
        )
