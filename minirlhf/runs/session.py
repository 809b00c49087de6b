"""A session works on a run: its settings, world, encoding and random streams; opened and forked.

Every stage draws from a random stream of its own, so a stage that is read back from the folder
leaves the others' numbers as they are: that is what makes `resume` exact.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from minirlhf.backend import array_module, to_device
from minirlhf.disk import next_numbered_folder, read_object, to_json, write_whole
from minirlhf.errors import InputError
from minirlhf.nn.sampling import Sampling
from minirlhf.nn.transformer import GPTConfig
from minirlhf.runs import sizes
from minirlhf.runs.config import TrainConfig, load_config, save_config
from minirlhf.runs.log import RunLog
from minirlhf.train.optimizer import NonFiniteError
from minirlhf.train.reward_model import RewardModel, score_responses
from minirlhf.train.rollout import Samples, sample_responses
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import Tree, tree_map
from minirlhf.workers import share_packed
from minirlhf.worlds import files, support, tokens
from minirlhf.worlds.rewards import load_reward, name_of
from minirlhf.worlds.world import World

STREAMS = (
    "world", "init", "sft", "pairs", "annotator", "reward_init", "reward_model", "normalize",
    "prompts", "rollout", "shuffle",
)  # fmt: skip
Reward = str | Callable[..., Any]  # module:function, or the function itself
# what world.json keeps of a world: enough to sample from a run and to score with it
KEPT = {"name": str, "joiner": str, "max_prompt_tokens": int, "max_response_tokens": int}


def no_progress(steps: Iterable, title: str) -> Iterable:
    """The default `track`: shows nothing."""
    return steps


@dataclass
class Session:
    """What the stages share. Arrays live on `config.device`."""

    config: TrainConfig
    world: World
    tokenizer: tokens.Tokenizer
    rng: dict[str, Generator]
    track: Callable[[Iterable, str], Iterable] = no_progress  # wraps steps, to show progress
    say: Callable[[str], None] = lambda line: None  # prints a line
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

    @cached_property
    def gpt(self) -> GPTConfig:
        """The policy's sizes: those asked for, with room for the longest prompt and response."""
        n_ctx = self.max_prompt_tokens + self.max_response_tokens
        return GPTConfig(self.tokenizer.vocab_size, n_ctx, **asdict(self.config.model))

    def prompt_ids(self, text: str) -> list[int]:
        return self.tokenizer.prompt_ids(text, self.max_prompt_tokens)

    def response_ids(self, text: str) -> list[int]:
        return self.tokenizer.response_ids(text, self.max_response_tokens)

    def on_device(self, tree: Tree) -> Tree:
        """A copy on the device, on a CPU where all workers see it."""
        return share_packed(tree_map(lambda a: to_device(a, self.config.device), tree))[1]

    def sample(
        self, params: Tree, prompts: list[str], rng: Generator, sampling: Sampling = Sampling()
    ) -> Samples:
        """Responses of a policy; top_k and top_p are for looking, never for learning."""
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        ends = {"stop_id": self.tokenizer.eos, "max_tokens": self.max_response_tokens}
        samples = sample_responses(
            params, ids, config=self.gpt, rng=rng, sampling=sampling, **ends, **self.padding
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

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note how long the block takes."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started


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


def open_session(config: TrainConfig, *, reward: Reward = "", **shown: Any) -> Session:
    """A new run: its world, encoding and random streams, and a folder to open it from again.

    Args:     reward: a function in the place of config.reward, which names one.
              shown: `track` and `say` of the Session.
    Raises:   InputError: the folder holds a run already, or a setting or file cannot be used.
    """
    array_module(config.device)  # refuse a device that is not there before anything is written
    world_name = Path(config.corpus or config.pairs or "support").stem
    out = config.out or next_numbered_folder(world_name)
    if os.path.exists(out / "config.toml"):
        raise InputError(
            f"--out {out}: expected a new folder; it holds a run: go on with `minirlhf "
            "resume`, or choose another folder"
        )
    rng, reward = _streams(config), reward or config.reward
    world = build_world(config, reward, rng["world"])
    config = replace(
        config,
        out=out,
        corpus=config.corpus and os.path.abspath(config.corpus),  # resumed from any directory
        pairs=config.pairs and os.path.abspath(config.pairs),
        reward=name_of(reward),
    )
    session = Session(config, world, _new_tokenizer(config, world), rng, **shown)
    sizes.check_run(config, session.gpt, session.max_response_tokens)
    for note in (*world.notes, *unused_options(config)):
        session.say(note)
    _ = session.log  # refuses a folder that cannot be written
    tokens.save_tokenizer(session.tokenizer, out)
    write_whole(out / "world.json", to_json(_outline(world)))
    save_config(out / "config.toml", config)
    return session


def reopen_session(
    folder: str | Path, *, device: str = "", reward: Reward = "", look: bool = False, **shown: Any
) -> Session:
    """A run that lies in a folder, finished or not.

    Args:     device: instead of the one it was trained on.
              reward: as of `open_session`.
              look: it is only sampled from and scored with, for which its texts are not read.
    Raises:   InputError: the folder holds no run, its files are damaged, or its texts have changed
                  since it began.
    """
    folder = Path(folder)
    if not os.path.exists(folder / "config.toml"):
        raise InputError(
            f"{folder}: expected a run folder with config.toml; found none: name the folder that "
            "`minirlhf train --out` wrote"
        )
    config = load_config(folder / "config.toml")
    config = replace(config, out=folder, device=device or config.device)
    array_module(config.device)
    rng, reward = _streams(config), reward or config.reward
    config = replace(config, reward=name_of(reward))
    if look and (config.corpus or config.pairs):
        world = _stored_world(folder / "world.json", reward)
    else:
        world = build_world(config, reward, rng["world"])
        if read_object(folder / "world.json").get("sha256") != _outline(world)["sha256"]:
            raise InputError(
                f"{folder / 'world.json'}: expected the texts that the run began with; the corpus, "
                "the pairs or the seed have changed: restore them, or train in a new folder"
            )
    session = Session(config, world, tokens.load_tokenizer(folder), rng, **shown)
    if not look:
        sizes.check_run(config, session.gpt, session.max_response_tokens)
    for note in world.notes:
        session.say(note)
    return session


def fork_run(
    folder: str | Path, out: str | Path, *, ppo: PPOConfig, eval_every: int | None = None
) -> Path:
    """A new run folder with the encoding, reference and reward model of another, and its own PPO.

    `resume(out)` then runs the PPO stage alone: what differs between two forks is PPO's settings.

    Raises:   InputError: `folder` has no reference and reward model yet, or `out` exists.
    """
    folder, out = Path(folder), Path(out)
    shared = ("tiktoken.json", "world.json", "reference", "reward_model")
    missing = [name for name in shared if not (folder / name).exists()]
    if missing or out.exists():
        came = f"{out}, which exists" if out.exists() else f"no {missing[0]} in {folder}"
        raise InputError(f"fork: expected a run with its reward model and a new folder; got {came}")
    config = load_config(folder / "config.toml")
    out.mkdir(parents=True)
    for name in shared:
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy2
        copy(folder / name, out / name)
    every = config.eval_every if eval_every is None else eval_every
    save_config(out / "config.toml", replace(config, out=out, ppo=ppo, eval_every=every))
    return out


def _streams(config: TrainConfig) -> dict[str, Generator]:
    return dict(zip(STREAMS, np.random.default_rng(config.seed).spawn(len(STREAMS)), strict=True))


def _new_tokenizer(config: TrainConfig, world: World) -> tokens.Tokenizer:
    """The encoding that was asked for, or one trained on the world's texts."""
    if config.encoding:
        return tokens.load_tokenizer_by_name(config.encoding)
    examples = [text for example in world.demonstrations for text in example]
    texts = examples + world.train_prompts + world.heldout_prompts
    return tokens.train_tokenizer(texts, vocab_size=config.vocab_size)


def build_world(config: TrainConfig, reward: Reward, rng: Generator) -> World:
    """The support world, or the user's own text.

    Raises:   InputError: options that contradict each other, or files that cannot be used.
    """
    if not (config.corpus or config.pairs):
        world = support.make_world(rng=rng)
        return replace(world, reward=load_reward(reward)) if reward else world
    given = {"pairs_path": config.pairs or None, "reward": reward or None}
    return files.corpus_world(config.corpus or None, unit=config.corpus_unit, rng=rng, **given)


def _outline(world: World) -> dict[str, Any]:
    """What sampling and scoring need, and the SHA-256 of all texts that training reads."""
    texts = (world.demonstrations, world.train_prompts, world.heldout_prompts, world.pairs)
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return {name: getattr(world, name) for name in KEPT} | {"sha256": digest}


def _stored_world(path: Path, reward: Reward) -> World:
    """What sampling and scoring need of a world of files, which may be gone by now."""
    stored = read_object(path)
    kept = {name: stored.get(name) for name in KEPT}
    if [type(value) for value in kept.values()] != list(KEPT.values()):
        raise InputError(f"{path}: expected {', '.join(KEPT)}; got {kept}: restore the file")
    function = load_reward(reward) if reward else None
    return World(demonstrations=[], train_prompts=[], heldout_prompts=[], reward=function, **kept)


def unused_options(config: TrainConfig) -> list[str]:
    """Options unlike their default that change nothing beside the others, one sentence each."""

    def turned(settings: Any) -> set[str]:
        values, default = vars(settings), vars(type(settings)())
        return {name for name in values if values[name] != default[name]}

    of_run, of_model, notes = turned(config), turned(config.reward_model), []
    if "corpus_unit" in of_run and (not config.corpus or config.corpus.endswith(".jsonl")):
        notes.append("--corpus-unit changes nothing without a corpus of plain text")
    if config.encoding and "vocab_size" in of_run:
        notes.append("--vocab-size changes nothing beside --encoding")
    if config.reward and of_model - {"n_normalize"}:
        notes.append("of --reward-model.* only n-normalize changes anything beside --reward")
    if config.pairs and of_model & {"n_pairs", "n_heldout_pairs"}:
        notes.append("--reward-model.n-pairs and n-heldout-pairs change nothing beside --pairs")
    return notes


def cut_notes(session: Session) -> list[str]:
    """What the limits on tokens cut off, one sentence each."""
    world, tokenizer = session.world, session.tokenizer
    of_prompts = (tokenizer.prompt_ids, session.max_prompt_tokens, "see --max-prompt-tokens")
    unended = "without a stop token; see --max-response-tokens"
    of_replies = (tokenizer.response_ids, session.max_response_tokens, unended)
    table = (
        ("prompts", set(world.train_prompts + world.heldout_prompts), *of_prompts),
        ("demonstrations", [response for _, response in world.demonstrations], *of_replies),
        ("replies in pairs", [text for _, *two in world.pairs or [] for text in two], *of_replies),
    )
    notes = []
    for what, texts, ids_of, limit, further in table:
        if cut := sum(len(ids_of(text)) > limit for text in texts):
            notes.append(f"cut {cut} of {len(texts)} {what} to {limit} tokens, {further}")
    return notes
