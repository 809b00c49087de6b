"""A session works on a run: its settings, world, encoding and random streams; opened and forked.

Every stage draws from a random stream of its own, so a stage that is read back from the folder
leaves the others' numbers as they are: that is what makes `resume` exact.
"""

import hashlib
import json
import os
import shlex
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property, partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from minirlhf.backend import to_device
from minirlhf.crew import resolved
from minirlhf.disk import locked, new_numbered_folder, read_object, to_json, write_whole
from minirlhf.errors import InputError
from minirlhf.nn.sampling import Sampling
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.ranks import Silent, ask_first, is_first, leave_to_first, n_ranks, take_device
from minirlhf.runs import hugging_face, own_reward
from minirlhf.runs.config import TrainConfig, load_config, rate_notes, save_config, unused_options
from minirlhf.runs.limits import check_run, fit_world
from minirlhf.runs.log import RunLog, require
from minirlhf.train.reward_model import RewardModel, score_responses
from minirlhf.train.rollout import Samples
from minirlhf.train.sampler import sample_responses
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import Tree, tree_map
from minirlhf.workers import share_packed
from minirlhf.worlds import files, support, tokens
from minirlhf.worlds.rewards import Reward, load_reward, name_of
from minirlhf.worlds.world import World

STREAMS = "world init sft pairs annotator reward_init reward_model normalize".split()
STREAMS += "prompts rollout shuffle dpo".split()
# what world.json keeps of a world: enough to sample from a run and to score with it
KEPT = {"name": str, "joiner": str, "max_prompt_tokens": int, "max_response_tokens": int}
BEGAN = Path("checkpoint", "config.toml")  # the settings that what is in the folder was made with
TOKENIZER_CHARS = 8_000_000  # of the texts that an encoding is trained on


@dataclass
class Session:
    """What the stages share. Arrays live on `config.device`."""

    config: TrainConfig
    world: World
    tokenizer: tokens.Tokenizer
    rng: dict[str, Generator]
    track: Callable[[Iterable, str], Iterable] = lambda steps, title: steps  # shows progress
    say: Callable[[str], None] = lambda line: None  # prints a line
    watch: Callable[[int, str, dict], None] = lambda *row: None  # sees each line of metrics.jsonl
    stop: InputError | None = None  # set by who watches: PPO stops after this iteration
    seconds: dict[str, float] = field(default_factory=dict)  # time of each stage
    stored: TrainConfig | None = None  # config.toml as it was then; None: opened to look
    stage: str = "sft"  # at work now
    steps: str = ""  # of it in all; "": it is at none of them
    made: int = 0  # of these steps
    kept: int = 0  # of these steps, in the checkpoint

    @property
    def folder(self) -> Path:
        return self.config.out

    @cached_property
    def log(self) -> RunLog:
        """Opened by the first stage that writes: to look at a run changes nothing in its folder."""
        if not is_first():
            return Silent()
        return RunLog(self.folder, lambda *row: self.watch(*row))  # who watches may change

    @property
    def padding(self) -> dict[str, Any]:
        """What every function that pads sequences to a batch has to be told."""
        return {"pad_id": self.tokenizer.pad, "device": self.config.device}

    @property
    def longest(self) -> tuple[int, int]:
        """The limits [tokens] of a prompt and of a response."""
        return self.world.max_prompt_tokens, self.world.max_response_tokens

    @cached_property
    def gpt(self) -> GPTConfig:
        """The policy's sizes: those asked for, with room for the longest prompt and response."""
        model, (prompt, response) = self.config.model, self.longest
        n_ctx = model.n_ctx or prompt + response
        if n_ctx < prompt + response:
            raise InputError(
                f"model.n_ctx: expected at least {prompt + response} positions, {prompt} for a "
                f"prompt and {response} for a response; got {n_ctx}: lower --max-prompt-tokens or "
                "--max-response-tokens"
            )
        sizes = asdict(replace(model, n_ctx=n_ctx))
        if model.block == "llama":  # what 0 stands for, as its folder will say
            sizes["n_kv_head"] = model.n_kv_head or model.n_head
            sizes["d_ff"] = model.d_ff or 4 * model.d_model
        return GPTConfig(self.tokenizer.vocab_size, **sizes)

    def first_weights(self) -> Tree:
        """Of the policy, on the host: random ones, or those of --init as the run began."""
        if not self.config.init:
            return init_transformer(self.gpt, rng=self.rng["init"])
        start = ask_first(hugging_face.read_model)(self.config.init)
        outline = ask_first(read_object)(self.folder / "world.json")
        if start.sha256 != outline.get("init_sha256"):
            raise InputError(
                f"{self.config.init}: expected the weights that were there when the run began; "
                "they have changed: restore the folder, or train in a new one"
            )
        return start.transformer

    def prompt_ids(self, text: str) -> list[int]:
        return self.tokenizer.prompt_ids(text, self.world.max_prompt_tokens)

    def response_ids(self, text: str) -> list[int]:
        return self.tokenizer.response_ids(text, self.world.max_response_tokens)

    def example_ids(self, prompt: str, *replies: str) -> tuple[array, ...]:
        """A prompt and replies to it to train on, as ids that take little memory."""
        lists = self.prompt_ids(prompt), *map(self.response_ids, replies)
        return tuple(array("i", ids) for ids in lists)

    def on_device(self, tree: Tree) -> Tree:
        """A copy on the device, on a CPU where all workers see it."""
        return share_packed(tree_map(lambda a: to_device(a, self.config.device), tree))[1]

    def sample(
        self, params: Tree, prompts: list[str], rng: Generator, sampling: Sampling = Sampling()
    ) -> Samples:
        """Responses of a policy; top_k and top_p are for looking, never for learning."""
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        ends = {"stop_id": self.tokenizer.eos, "max_tokens": self.world.max_response_tokens}
        samples = sample_responses(
            params, ids, config=self.gpt, rng=rng, sampling=sampling, **ends, **self.padding
        )
        responses = [self.tokenizer.decode(ids) for ids in samples.response_ids]
        for i, ids in enumerate(samples.response_ids):
            if ids[-1] != self.tokenizer.eos:  # the limit may have cut a character
                responses[i] = responses[i].removesuffix("\ufffd")
        return samples._replace(prompts=list(prompts), responses=responses)

    def fresh_samples(self, params: Tree, prompts: list[str], seed: int) -> Samples:
        """Replies as training draws them, without what its sampler knows: they are scored anew."""
        rng, sampling = np.random.default_rng(seed), Sampling(self.config.ppo.temperature)
        return self.sample(params, prompts, rng, sampling)._replace(hidden=None)

    def score_with(self, model: RewardModel) -> "Score":
        """What PPO maximises of this run's samples."""
        return Score(self.world, model, self.padding)

    def note(self, line: str) -> None:
        """Say what is worth knowing and no fault."""
        self.say(f"note: {line}")

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """In the block the folder is this process's; a refusal in it says how to go on."""
        with locked(self.folder) if is_first() else nullcontext():
            how = f"minirlhf resume {shlex.quote(str(self.folder))}"
            try:
                yield
            except InputError as stop:
                if stop.resume == "reward" and self.world.reward:
                    how += " --accept-changed-reward"
                if stop.resume is not None:
                    stop.args = InputError(f"{stop}; then go on with `{how}`").args
                raise
            except KeyboardInterrupt as stop:
                made = f": {self.made} of {self.steps} made, {self.kept} in the checkpoint"
                where = f"in stage {self.stage}{made if self.steps else ''}"
                stop.args = (f"{where}; `{how}` goes on",)
                raise


class Score(NamedTuple):
    """The normalised score of samples: of the reward model, or of the user's own reward."""

    world: World
    model: RewardModel
    padding: dict[str, Any]

    def __call__(self, samples: Samples) -> np.ndarray:
        if self.world.reward is None:
            ids = samples.prompt_ids, samples.response_ids
            if not self.model.params:  # DPO learns no scores
                return np.full(len(ids[1]), np.nan)
            return score_responses(self.model, *ids, **self.padding)
        try:
            rewards = ask_first(self.world.rewards)(samples.prompts, samples.responses)
        except InputError as error:
            error.resume = None  # the reward says itself how its run goes on
            raise
        return (np.array(rewards, dtype=np.float64) - self.model.mean) / self.model.sd


def _on_all_ranks(opens: Callable[..., Session]) -> Callable[..., Session]:
    """Rank 0 opens it; the others get what it found, but for the reward, which they never ask."""

    @wraps(opens)
    def opened(*arguments: Any, **options: Any) -> Session:
        session = leave_to_first(opens)(*arguments, **options)
        if n_ranks() == 1:
            return session
        found = ask_first(_found)(session)
        take_device(found["config"].device)
        shown = {name: options[name] for name in ("track", "say", "watch") if name in options}
        return session or Session(**found, **shown)

    return opened


def _found(session: Session) -> dict[str, Any]:
    world = replace(session.world, reward=bool(session.world.reward) or None)
    kept = {name: getattr(session, name) for name in ("config", "tokenizer", "rng", "stored")}
    return {"world": world, **kept}


@_on_all_ranks
def open_session(config: TrainConfig, *, reward: Reward = "", **shown: Any) -> Session:
    """A new run. A function may be its reward; `shown`: track, say and watch of the Session."""
    take_device(config.device)  # refuse what is not there before anything is written
    require(config.log)
    _refuse_a_run(config.out)
    rng, reward = _streams(config), reward or config.reward
    config.refuse_in_dpo(reward)
    world = build_world(config, reward and load_reward(reward, config.reward_timeout), rng["world"])
    notes = [*(own_reward.try_reward(world) if world.reward else ()), *unused_options(config)]
    digests = {"reward_sha256": own_reward.fingerprint(reward)} if reward else {}
    if config.init:
        start = hugging_face.read_model(config.init)
        notes += [f"--init: {start.says}", *rate_notes(config)]
        digests["init_sha256"] = start.sha256
        model = {f.name: getattr(start.config, f.name) for f in fields(config.model)}
        config = replace(config, model=model)
    tokenizer = start.tokenizer if config.init else _new_tokenizer(config, world)
    world = fit_world(world, tokenizer, config, rng["world"])
    given = (name for name in ("corpus", "pairs", "init") if getattr(config, name))
    paths = {name: os.path.abspath(getattr(config, name)) for name in given}  # from any directory
    workers = resolved(config.workers)  # another number would round otherwise
    config = replace(config, workers=workers, reward=name_of(reward), **paths)
    session = Session(config, world, tokenizer, rng, **shown)
    check_run(config, session.gpt, session.longest)  # sizes may contradict each other
    out = config.out or new_numbered_folder(world.name)
    session.config, session.world = replace(config, out=out), own_reward.going_on(world, out)
    for note in (*world.notes, *notes):
        session.note(note)
    with locked(out):
        _refuse_a_run(out)  # of another process, which has been faster
        _ = session.log  # refuses a folder that cannot be written
        tokens.save_tokenizer(tokenizer, out)
        write_whole(out / "world.json", to_json(_outline(world) | digests))
        own_reward.remember(config.reward, digests.get("reward_sha256", ""))
        _begin(out, session.config)
    session.stored = session.config
    return session


def _refuse_a_run(out: Path | None) -> None:
    if out and os.path.exists(out) and not os.path.isdir(out):
        raise InputError(f"--out {out}: expected a folder; got a file: choose another name")
    if out and os.path.exists(out / "config.toml"):
        raise InputError(
            f"--out {out}: expected a new folder; it holds a run: go on with `minirlhf resume "
            f"{shlex.quote(str(out))}`, or choose another folder"
        )


@_on_all_ranks
def reopen_session(
    folder: str | Path,
    *,
    iterations: int = 0,
    reward: Reward = "",
    accept_changed_reward: bool = False,
    look: bool = False,
    **shown: Any,
) -> Session:
    """A run that lies in a folder, finished or not.

    Args:     iterations: of PPO, in all; 0: as config.toml says.
              reward, accept_changed_reward: `named` and `changed` of `own_reward.reopened`.
              look: to sample and score alone, on the CPU: reads no texts, and no reward before it
                  is asked. So is a finished run whose texts or reward have gone or changed.
    """
    folder = Path(folder)
    if not os.path.exists(folder / "config.toml"):
        raise InputError(
            f"{folder}: expected a run folder with config.toml; found none: name the folder that "
            "`minirlhf train --out` wrote"
        )
    stored = load_config(folder / "config.toml")
    ppo = replace(stored.ppo, iterations=iterations or stored.ppo.iterations)
    stored.refuse_in_dpo(reward or stored.reward, iterations)
    stages = stored.stages if stored.is_dpo else "all"
    device = "cpu" if look else stored.device
    config = replace(stored, out=folder, device=device, stages=stages, ppo=ppo)
    take_device(config.device)
    ended = not (look or reward or accept_changed_reward or ppo != stored.ppo)
    ended = ended and (folder / "result.json").exists() and stored == load_config(folder / BEGAN)
    look = look or (ended and own_reward.sources_gone(stored))
    rng, own, tokenizer = _streams(config), None, tokens.load_tokenizer(folder)
    if config.reward or reward:
        own = cache(partial(own_reward.reopened, folder, config, reward, accept_changed_reward))
    if look and (config.corpus or config.pairs):
        world = _stored_world(folder / "world.json")
    else:
        named = own() if own and not look else ""
        try:
            world = _same_world(folder, config, named, tokenizer, rng["world"])
        except InputError:
            if not ended:
                raise
            look, world = True, _stored_world(folder / "world.json")
    if own and look:
        world = replace(world, reward=lambda *replies: own()(*replies))
    elif own:
        world = own_reward.going_on(world, folder)
        own_reward.try_reward(world)
        with locked(folder):
            own_reward.keep_reward(folder, stored, reward or config.reward)
    config = replace(config, reward=name_of(reward or config.reward))
    session = Session(config, world, tokenizer, rng, **shown)
    if not look:
        session.stored = load_config(folder / "config.toml")
        check_run(config, session.gpt, session.longest)
    return session


def fork_run(
    folder: str | Path, out: str | Path, *, ppo: PPOConfig, eval_every: int | None = None
) -> Path:
    """A new run with the encoding, reference and reward model of another; a resume is PPO alone."""
    folder, out = Path(folder), Path(out)
    shared = ("tiktoken.json", "world.json", "reference", "reward_model", "metrics.jsonl")
    missing = [name for name in shared if not (folder / name).exists()]
    if missing or out.exists():
        came = f"{out}, which exists" if out.exists() else f"no {missing[0]} in {folder}"
        raise InputError(f"fork: expected a run with its reward model and a new folder; got {came}")
    config = load_config(folder / "config.toml")
    if ppo.temperature != config.ppo.temperature:
        raise InputError(
            f"fork: expected the temperature {config.ppo.temperature}, at which the score was "
            f"scaled; got {ppo.temperature}: train a run of its own"
        )
    out.mkdir(parents=True)
    for name in shared:
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy2
        copy(folder / name, out / name)
    RunLog(out).restart("ppo")
    every = config.eval_every if eval_every is None else eval_every
    _begin(out, replace(config, out=out, ppo=ppo, eval_every=every))
    return out


def _begin(folder: Path, config: TrainConfig) -> None:
    """Make a run of the folder; it is one by its config.toml, so that comes last."""
    for name in (BEGAN, "config.toml"):
        save_config(folder / name, config)


def _streams(config: TrainConfig) -> dict[str, Generator]:
    return dict(zip(STREAMS, np.random.default_rng(config.seed).spawn(len(STREAMS)), strict=True))


def _new_tokenizer(config: TrainConfig, world: World) -> tokens.Tokenizer:
    """The encoding that was asked for, or one trained on the world's texts."""
    if config.encoding:
        return tokens.load_tokenizer_by_name(config.encoding)
    examples = [text for row in world.demonstrations + (world.pairs or []) for text in row]
    texts = examples + world.train_prompts + world.heldout_prompts
    every = 1 + sum(map(len, texts)) // TOKENIZER_CHARS
    return tokens.train_tokenizer(texts[::every], vocab_size=config.vocab_size)


def build_world(config: TrainConfig, reward: Reward, rng: Generator) -> World:
    """The support world, or the user's own text, all of it to train on (`fit_world` splits it)."""
    if not (config.corpus or config.pairs):
        return replace(support.make_world(rng=rng), reward=reward or None)
    return files.corpus_world(
        config.corpus or None,
        pairs_path=config.pairs or None,
        reward=reward or None,
        unit=config.corpus_unit,
        columns=config.columns,
        judged=config.stages != "sft",
        max_chars=config.max_text_mb * 10**6,
        rng=rng,
    )


def _outline(world: World) -> dict[str, Any]:
    """What sampling and scoring need, and the SHA-256 of all texts that training reads."""
    texts = (world.demonstrations, world.train_prompts, world.heldout_prompts, world.pairs)
    outline = {name: getattr(world, name) for name in KEPT}
    for name, part in (("sha256", texts), ("pairs_sha256", world.pairs)):
        digest = hashlib.sha256()
        for piece in json.JSONEncoder().iterencode(part):  # all of it as one string would be large
            digest.update(piece.encode())
        outline[name] = digest.hexdigest()
    return outline


def _same_world(
    folder: Path, config: TrainConfig, reward: Reward, tokenizer: tokens.Tokenizer, rng: Generator
) -> World:
    """The world that a run began with, maybe a corpus alone; another one is refused, by what is."""
    world = build_world(replace(config, stages="sft"), reward, rng)
    world = fit_world(world, tokenizer, config, rng)
    kept, now = read_object(folder / "world.json"), _outline(world)
    if kept.get("sha256") == now["sha256"]:
        return world
    what = "pairs" if kept.get("pairs_sha256") != now["pairs_sha256"] else "corpus"
    what = what if config.seed == load_config(folder / BEGAN).seed else "seed"
    raise InputError(
        f"{folder / 'world.json'}: expected the texts that the run began with; got others, by a "
        f"change of {what}, or of how files are read: restore it, or train in a new folder"
    )


def _stored_world(path: Path) -> World:
    """What sampling and scoring need of a world of files, which may be gone by now."""
    stored = read_object(path)
    kept = {name: stored.get(name) for name in KEPT}
    fits = [type(value) for value in kept.values()] == list(KEPT.values())
    if not (fits and kept["max_prompt_tokens"] > 2 and kept["max_response_tokens"] > 1):
        raise InputError(f"{path}: expected {', '.join(KEPT)}; got {kept}: restore the file")
    return World(demonstrations=[], train_prompts=[], heldout_prompts=[], **kept)
