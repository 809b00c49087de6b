"""The whole way: text -> reference -> reward model -> policy, into one run folder.

    config.toml                      what was asked for, resolved
    world.json                       limits, and the digest of the texts that it trains on
    tiktoken.json                    the encoding
    reference/ reward_model/ policy/ models in Hugging Face GPT-2 layout
    checkpoint/                      the state of PPO, to go on from bit for bit
    metrics.jsonl samples.jsonl      one object a step
    result.json                      the final table

Every stage draws from a random stream of its own, so a stage that is read back from the folder
leaves the others' numbers as they are: that is what makes `resume` exact.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from minirlhf.backend import array_module, to_device, to_host
from minirlhf.disk import parse_object, read_text, settled, write_whole
from minirlhf.errors import InputError
from minirlhf.nn.heads import init_scalar_head
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.rlhf.kl import KL_MODES, summed_penalty
from minirlhf.train import checkpoint
from minirlhf.train.batches import row_slices
from minirlhf.train.config import RewardModelConfig, TrainConfig, load_config, save_config
from minirlhf.train.evaluate import evaluate, gold_of
from minirlhf.train.optimizer import NonFiniteError, Optimizer
from minirlhf.train.ppo import (
    PPOConfig,
    make_experience,
    next_kl_coef,
    ppo_update,
    rollout_metrics,
)
from minirlhf.train.reward_model import (
    Pair,
    RewardModel,
    normalized,
    pair_metrics,
    score_responses,
    train_reward_model,
)
from minirlhf.train.rollout import (
    Rollout,
    Samples,
    prompt_ids,
    response_ids,
    sample_responses,
    score_rollout,
)
from minirlhf.train.run_log import RunLog
from minirlhf.train.sft import sft_loss, train_sft
from minirlhf.train.tokens import (
    Tokenizer,
    load_tokenizer,
    load_tokenizer_by_name,
    save_tokenizer,
    train_tokenizer,
)
from minirlhf.tree import Tree, tree_copy, tree_map
from minirlhf.worlds.files import (
    TextPair,
    absolute_reward,
    corpus_world,
    load_reward,
    split_pairs,
)
from minirlhf.worlds.support import make_world
from minirlhf.worlds.world import World

STREAMS = (
    "world", "init", "sft", "pairs", "annotator", "reward_init", "reward_model", "normalize",
    "prompts", "rollout", "shuffle",
)  # fmt: skip
SAMPLES_LOGGED = 8


def no_progress(steps: Iterable, title: str) -> Iterable:
    """The default `track`: shows nothing."""
    return steps


class Result(NamedTuple):
    reference: dict[str, float]  # columns of `evaluate.response_metrics`
    policy: dict[str, float]
    prompts: list[str]
    reference_samples: Samples
    policy_samples: Samples
    seconds: dict[str, float]  # time of each stage


@dataclass
class Run:
    """What the stages share. Arrays live on `config.device`."""

    config: TrainConfig
    world: World
    tokenizer: Tokenizer
    gpt: GPTConfig
    rng: dict[str, np.random.Generator]
    track: Callable[[Iterable, str], Iterable]
    say: Callable[[str], None]
    seconds: dict[str, float]

    @property
    def folder(self) -> Path:
        return self.config.out

    @cached_property
    def log(self) -> RunLog:
        """Opened by the first stage that writes: to look at a run changes nothing in its folder."""
        return RunLog(self.folder)

    @property
    def max_prompt_tokens(self) -> int:
        return self.config.max_prompt_tokens or self.world.max_prompt_tokens

    @property
    def max_response_tokens(self) -> int:
        return self.config.max_response_tokens or self.world.max_response_tokens

    def prompt_ids(self, text: str) -> list[int]:
        return prompt_ids(self.tokenizer, text, max_tokens=self.max_prompt_tokens)

    def response_ids(self, text: str) -> list[int]:
        return response_ids(self.tokenizer, text, max_tokens=self.max_response_tokens)

    def on_device(self, tree: Tree) -> Tree:
        return tree_map(lambda array: to_device(array, self.config.device), tree)

    def sample(
        self,
        params: Tree,
        prompts: list[str],
        rng: np.random.Generator,
        temperature: float = 1.0,
        **cut: Any,
    ) -> Samples:
        """Responses of a policy; `cut` (top_k, top_p) is for looking, never for learning."""
        return sample_responses(
            params,
            prompts,
            tokenizer=self.tokenizer,
            config=self.gpt,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            rng=rng,
            temperature=temperature,
            device=self.config.device,
            **cut,
        )

    def score_with(self, model: RewardModel) -> "Score":
        """What PPO maximises of this run's samples."""
        return Score(self.world, model, self.tokenizer.pad, self.config.device)

    def evaluate(
        self, policy: Tree, reference: Tree, score: "Score"
    ) -> tuple[dict[str, float], Samples]:
        """Held-out metrics, always with the same coins: two calls compare like with like."""
        prompts = self.world.heldout_prompts
        repeats = -(-self.config.eval_prompts // len(prompts))
        return evaluate(
            policy,
            reference,
            (prompts * repeats)[: self.config.eval_prompts],
            world=self.world,
            tokenizer=self.tokenizer,
            score=score,
            config=self.gpt,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            temperature=self.config.ppo.temperature,
            seed=self.config.seed + 1_000_003,
            score_mean=score.model.mean,
            score_sd=score.model.sd,
            micro_batch_size=self.config.ppo.micro_batch_size,
            device=self.config.device,
        )


class Score(NamedTuple):
    """The normalised score of samples: of the reward model, or of the user's own reward."""

    world: World
    model: RewardModel
    pad_id: int
    device: str

    def __call__(self, samples: Samples) -> np.ndarray:
        if self.world.reward is None:
            return score_responses(
                self.model,
                samples.prompt_ids,
                samples.response_ids,
                pad_id=self.pad_id,
                device=self.device,
            )
        texts = map(self.world.full_text, samples.prompts, samples.responses)
        raw = np.array([self.world.reward(text) for text in texts], dtype=np.float64)
        return (raw - self.model.mean) / self.model.sd


def build_world(config: TrainConfig, rng: np.random.Generator) -> World:
    """The support world, or the user's own text.

    Raises:
        InputError: options that contradict each other, or files that cannot be used.
    """
    if config.corpus or config.pairs:
        return corpus_world(
            config.corpus or None,
            unit=config.corpus_unit,
            reward=config.reward or None,
            pairs_path=config.pairs or None,
            rng=rng,
        )
    world = make_world(rng=rng)
    return replace(world, reward=load_reward(config.reward)) if config.reward else world


def open_run(
    config: TrainConfig,
    *,
    track: Callable[[Iterable, str], Iterable] = no_progress,
    say: Callable[[str], None] = lambda line: None,
    resume: bool = False,
    look: bool = False,
) -> Run:
    """World, encoding and random streams of a run; a new one gets its folder.

    Args:
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
    streams = np.random.default_rng(config.seed).spawn(len(STREAMS))
    rng = dict(zip(STREAMS, streams, strict=True))
    look = look and bool(config.corpus or config.pairs)  # the support world needs no files
    world = _stored_world(config) if look else build_world(config, rng["world"])
    for note in world.notes:
        say(note)
    if resume:
        tokenizer = load_tokenizer(config.out)
    elif config.encoding:
        tokenizer = load_tokenizer_by_name(config.encoding)
    else:
        examples = [text for example in world.demonstrations for text in example]
        texts = examples + world.train_prompts + world.heldout_prompts
        tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    max_prompt = config.max_prompt_tokens or world.max_prompt_tokens
    max_response = config.max_response_tokens or world.max_response_tokens
    gpt = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        n_ctx=max_prompt + max_response,
        n_layer=config.model.n_layer,
        n_head=config.model.n_head,
        d_model=config.model.d_model,
    )
    if resume and not look:
        _same_world(config.out, world)
    if not resume:
        for note in unused_options(config):
            say(note)
        config = _with_absolute_paths(config)
    run = Run(config, world, tokenizer, gpt, rng, track, say, {})
    if not resume:
        _ = run.log  # refuses a folder that cannot be written
        save_tokenizer(tokenizer, config.out)
        _save_world(config.out, world)
        save_config(config.out / "config.toml", config)
    return run


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


def cut_notes(run: Run) -> list[str]:
    """What the limits on tokens cut off, one sentence each."""
    world, tokenizer = run.world, run.tokenizer
    pairs = world.pairs or []
    texts = {  # what -> (texts, whole ids of one, limit, what is said further)
        "prompts": (
            set(world.train_prompts + world.heldout_prompts),
            *(tokenizer.prompt_ids, run.max_prompt_tokens),
            "see --max-prompt-tokens",
        ),
        "demonstrations": (
            [response for _, response in world.demonstrations],
            *(tokenizer.response_ids, run.max_response_tokens),
            "without a stop token; see --max-response-tokens",
        ),
        "replies in pairs": (
            [reply for _, chosen, rejected in pairs for reply in (chosen, rejected)],
            *(tokenizer.response_ids, run.max_response_tokens),
            "without a stop token; see --max-response-tokens",
        ),
    }
    notes = []
    for what, (items, ids_of, limit, further) in texts.items():
        if cut := sum(len(ids_of(text)) > limit for text in items):
            notes.append(f"cut {cut} of {len(items)} {what} to {limit} tokens, {further}")
    return notes


def next_folder(config: TrainConfig) -> Path:
    """runs/WORLD-N with the first N that is free."""
    world = Path(config.corpus or config.pairs or "support").stem
    n = 0
    while (folder := Path("runs") / f"{world}-{n}").exists():
        n += 1
    return folder


def train(config: TrainConfig, **shown: Any) -> Result:
    """SFT, reward model, PPO and the final comparison, from nothing.

    Args:
        shown: `track` (wraps a range of steps to show progress) and `say` (prints a line).
    """
    return run_stages(open_run(config, **shown))


def resume(folder: str | Path, **shown: Any) -> Result:
    """Go on where a run stopped: finished stages are read back, PPO from its last checkpoint."""
    return run_stages(open_saved_run(folder, **shown))


def open_saved_run(folder: str | Path, *, device: str | None = None, **shown: Any) -> Run:
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
    return open_run(replace(config, device=device or config.device), resume=True, **shown)


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


def load_models(run: Run) -> tuple[Tree, Tree]:
    """(policy, reference) of a finished run.

    Raises:
        InputError: the run has no policy yet.
    """
    folder = run.folder / "policy"
    if not _saved(folder):
        raise InputError(
            f"{folder}: expected a trained policy; found none: finish the run with `minirlhf "
            f"resume {run.folder}`"
        )
    transformer, gpt, heads = checkpoint.load_model(folder)
    _same_model(folder, gpt, run.gpt)
    head = _head(heads, "value_head", folder)
    policy = run.on_device({"transformer": transformer, "value_head": head})
    return policy, {"transformer": reference_stage(run)}


def last_kl_coef(run: Run) -> float:
    """beta as training left it: where it is adaptive, not the configured one."""
    folder = run.folder / "checkpoint"
    if not checkpoint.has_state(folder):
        return run.config.ppo.kl_coef
    return checkpoint.load_state(folder)[1].get("kl_coef", run.config.ppo.kl_coef)


def run_stages(run: Run) -> Result:
    """The stages in order; a stage whose result lies in the folder is not run again."""
    for note in cut_notes(run):
        run.say(note)
    with threadpool_limits(limits=run.config.threads or None):
        result = _run_stages(run)
    write_whole(run.folder / "result.json", _result_json(result))
    return result


def _run_stages(run: Run) -> Result:
    reference = {"transformer": _stage(run, "sft", reference_stage)}
    model = _stage(run, "reward_model", reward_stage, reference)
    score = run.score_with(model)
    policy = _stage(run, "ppo", ppo_stage, reference, score)
    started = time.perf_counter()
    reference_metrics, reference_samples = run.evaluate(
        {**reference, "value_head": policy["value_head"]}, reference, score
    )
    policy_metrics, policy_samples = run.evaluate(policy, reference, score)
    run.seconds["evaluation"] = time.perf_counter() - started
    return Result(
        reference_metrics,
        policy_metrics,
        policy_samples.prompts,
        reference_samples,
        policy_samples,
        run.seconds,
    )


def _stage(run: Run, name: str, stage: Callable, *inputs: Any) -> Any:
    started = time.perf_counter()
    out = stage(run, *inputs)
    run.seconds[name] = time.perf_counter() - started
    return out


def reference_stage(run: Run) -> Tree:
    """Stage 1: the transformer fine-tuned on the demonstrations, frozen from here on."""
    folder = run.folder / "reference"
    if _saved(folder):
        params, gpt, _ = checkpoint.load_model(folder)
        _same_model(folder, gpt, run.gpt)
        return run.on_device(params)
    _begin(run, "sft", folder, before=("reward_model", "checkpoint", "policy"))
    settings = run.config.sft
    examples, heldout = (
        [(run.prompt_ids(p), run.response_ids(r)) for p, r in demonstrations]
        for demonstrations in (run.world.demonstrations, run.world.heldout_demonstrations)
    )
    known = {"config": run.gpt, "pad_id": run.tokenizer.pad, "device": run.config.device}
    transformer = train_sft(
        run.on_device(init_transformer(run.gpt, rng=run.rng["init"])),
        examples,
        settings=settings,
        rng=run.rng["sft"],
        log=run.log,
        track=run.track,
        **known,
    )
    if heldout:
        loss = sft_loss(
            {"transformer": transformer}, heldout, batch_size=settings.batch_size, **known
        )
        run.log.metrics(settings.steps, "sft", {"heldout/loss_sft": loss})
    checkpoint.save_model(folder, transformer, run.gpt, meta=_token_meta(run))
    return transformer


def reward_stage(run: Run, reference: Tree) -> RewardModel:
    """Stage 2: a reward model from pairs, or the scale of the user's own reward.

    Either way the score gets mean 0 and sd 1 on fresh reference samples.
    """
    folder = run.folder / "reward_model"
    settings = run.config.reward_model
    n_layer = settings.n_layer if settings.init == "scratch" else run.gpt.n_layer
    gpt = replace(run.gpt, n_layer=n_layer)
    if _saved(folder) if run.world.reward is None else (folder / "scale.json").exists():
        return _load_reward_model(run, folder, gpt)
    _begin(run, "reward_model", folder, before=("checkpoint", "policy"))
    model = RewardModel({}, gpt)
    if run.world.reward is None:
        model = learn_preferences(run, reference, gpt)
    rng = run.rng["normalize"]
    samples = run.sample(reference, _draw(run.world.train_prompts, settings.n_normalize, rng), rng)
    model = normalized(model, run.score_with(model)(samples))
    _save_reward_model(run, folder, model)
    return model


def learn_preferences(run: Run, reference: Tree, gpt: GPTConfig) -> RewardModel:
    """A reward model trained on pairs, not yet normalised; its held-out accuracy is logged."""
    settings = run.config.reward_model
    pairs, heldout, gold_difference = preference_pairs(run, reference)
    start = reference["transformer"]
    if settings.init == "scratch":
        start = run.on_device(init_transformer(gpt, rng=run.rng["reward_init"]))
    known = {"pad_id": run.tokenizer.pad, "device": run.config.device}
    model = train_reward_model(
        start,
        pairs,
        config=gpt,
        settings=settings,
        rng=run.rng["reward_model"],
        log=run.log,
        track=run.track,
        **known,
    )
    if heldout:
        metrics = pair_metrics(model, heldout, gold_difference=gold_difference, **known)
        updates = settings.epochs * len(row_slices(len(pairs), settings.batch_size))
        run.log.metrics(updates, "reward_model", metrics)
        run.say(_accuracy_line(metrics, len(heldout)))
    return model


def _accuracy_line(metrics: dict[str, float], n: int) -> str:
    line = (
        f"reward model: accuracy {metrics['heldout/accuracy']:.3f} on {n} held-out pairs, "
        f"calibration error {metrics['heldout/calibration_error']:.3f}"
    )
    if "heldout/gold_accuracy" in metrics:
        line += f", {metrics['heldout/gold_accuracy']:.3f} against the gold order"
    return line


def preference_pairs(run: Run, reference: Tree) -> tuple[list[Pair], list[Pair], Any]:
    """Pairs to learn from, held-out pairs, and the held-out difference of gold (or None).

    Given pairs are split by prompt; otherwise the annotator compares two reference samples.

    Raises:
        InputError: no given pair of a training prompt differs within the limit on tokens.
    """
    if run.world.pairs is not None:
        parts = split_pairs(run.world.pairs, train_prompts=run.world.train_prompts)
        train, heldout = (_differing_pairs(run, part) for part in parts)
        if dropped := len(run.world.pairs) - len(train) - len(heldout):
            run.say(
                f"dropped {dropped} of {len(run.world.pairs)} pairs that are equal in their first "
                f"{run.max_response_tokens} tokens"
            )
        if not train:
            raise InputError(
                "pairs: expected pairs to train on that differ in their first "
                f"{run.max_response_tokens} tokens; got none: raise --max-response-tokens"
            )
        return train, heldout, None
    settings = run.config.reward_model
    train, _ = annotated_pairs(run, reference, run.world.train_prompts, settings.n_pairs)
    heldout, difference = annotated_pairs(
        run, reference, run.world.heldout_prompts, settings.n_heldout_pairs
    )
    return train, heldout, difference


def _differing_pairs(run: Run, pairs: list[TextPair]) -> list[Pair]:
    """The pairs as ids, without those that no longer differ where they are cut."""
    ids = [Pair(run.prompt_ids(p), run.response_ids(c), run.response_ids(r)) for p, c, r in pairs]
    return [pair for pair in ids if pair.chosen != pair.rejected]


def annotated_pairs(
    run: Run, reference: Tree, prompts: list[str], n: int
) -> tuple[list[Pair], np.ndarray | None]:
    """n pairs of reference samples in the annotator's order; equal replies are left out.

    Returns:
        pairs, gold(chosen) - gold(rejected) of each (None without a gold reward).
    """
    drawn = _draw(prompts, n, run.rng["pairs"])
    first, second = (run.sample(reference, drawn, run.rng["pairs"]) for _ in range(2))
    gold = [gold_of(s, run.world) for s in (first, second)] if run.world.gold else None
    pairs, difference = [], []
    for i, prompt in enumerate(drawn):
        a, b = first.responses[i], second.responses[i]
        if first.response_ids[i] == second.response_ids[i]:
            continue
        a_wins = run.world.annotate(prompt, a, b, run.rng["annotator"])
        winner, loser = (first, second) if a_wins else (second, first)
        pairs.append(Pair(first.prompt_ids[i], winner.response_ids[i], loser.response_ids[i]))
        if gold:
            difference.append((gold[0][i] - gold[1][i]) * (1 if a_wins else -1))
    return pairs, np.array(difference) if gold else None


def ppo_stage(run: Run, reference: Tree, score: Score) -> Tree:
    """Stage 3: PPO from the reference, with checkpoints.

    Raises:
        NonFiniteError: a loss is not finite; the message names the last good checkpoint.
    """
    settings = run.config.ppo
    wte = reference["transformer"]["wte"]
    value_head = init_scalar_head(run.gpt.d_model, std=0.0, rng=run.rng["init"], dtype=wte.dtype)
    policy = {
        "transformer": tree_copy(reference["transformer"]),
        "value_head": run.on_device(value_head),
    }
    optimizer = Optimizer(
        policy,
        settings.optimizer,
        total_steps=settings.iterations * settings.epochs * settings.minibatches,
    )
    first, kl_coef = _load_ppo_state(run, optimizer)
    for iteration in run.track(range(first, settings.iterations), "PPO"):
        started = time.perf_counter()
        try:
            metrics, rollout, kl_coef = ppo_iteration(run, optimizer, reference, score, kl_coef)
        except NonFiniteError as error:
            kept = run.folder / "checkpoint"
            last = f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint yet"
            raise NonFiniteError(f"PPO iteration {iteration}: {error} ({last})") from error
        metrics["time/iteration"] = time.perf_counter() - started
        metrics["episode"] = (iteration + 1) * settings.batch_size
        done = iteration + 1
        if run.config.eval_every and done % run.config.eval_every == 0:
            heldout, _ = run.evaluate(optimizer.params, reference, score)
            metrics |= {f"eval/{name}": value for name, value in heldout.items()}
        run.log.metrics(iteration, "ppo", metrics)
        run.log.samples(iteration, _sample_rows(run, rollout))
        if done % run.config.checkpoint_every == 0 or done == settings.iterations:
            _save_ppo_state(run, optimizer, done, kl_coef)
    policy = optimizer.params
    checkpoint.save_model(
        run.folder / "policy",
        policy["transformer"],
        run.gpt,
        heads={"value_head": policy["value_head"]},
        meta=_token_meta(run),
    )
    return policy


def ppo_iteration(
    run: Run, optimizer: Optimizer, reference: Tree, score: Score, kl_coef: float
) -> tuple[dict[str, float], Rollout, float]:
    """Sample, score, learn.

    Returns:
        metrics, the rollout, the next kl_coef.
    """
    settings = run.config.ppo
    prompts = _draw(run.world.train_prompts, settings.batch_size, run.rng["prompts"])
    policy = optimizer.params
    samples = run.sample(policy, prompts, run.rng["rollout"], settings.temperature)
    rollout = score_rollout(
        policy,
        reference,
        samples,
        score=score,
        config=run.gpt,
        temperature=settings.temperature,
        keep_ref_logits=KL_MODES[settings.kl_mode].in_loss in ("full", "rao_blackwell"),
        micro_batch_size=settings.micro_batch_size,
        device=run.config.device,
    )
    known = {"settings": settings, "kl_coef": kl_coef, "stop_id": run.tokenizer.eos}
    experience = make_experience(rollout, **known)
    metrics = rollout_metrics(rollout, experience, **known)
    if run.world.gold is not None:
        metrics["objective/gold"] = float(np.mean(gold_of(samples, run.world)))
    metrics |= ppo_update(
        optimizer,
        experience,
        config=run.gpt,
        settings=settings,
        rng=run.rng["shuffle"],
    )
    kl_coef = next_kl_coef(kl_coef, kl_seq=metrics["objective/kl"], settings=settings)
    return metrics, rollout, kl_coef


# -- what lies in the run folder -----------------------------------------------------------------


def _begin(run: Run, stage: str, folder: Path, *, before: tuple[str, ...]) -> None:
    """Start a stage whose `folder` does not exist yet, with an empty log of its own.

    Args:
        before: folders of later stages. If one of them exists, this stage was once finished and
            its folder has been lost: to run it again would not fit what was made from it.
    Raises:
        InputError: one of the folders `before` exists.
    """
    for name in before:
        if _saved(run.folder / name):
            raise InputError(
                f"{folder}: expected it beside {run.folder / name}, which was made with it; found "
                "nothing in it: restore it, or train again in another folder"
            )
    run.log.restart(stage)


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


_KEPT = ("name", "joiner", "max_prompt_tokens", "max_response_tokens")  # fields of a world


def _stored_world(config: TrainConfig) -> World:
    """What sampling and scoring need of a world of files, which may be gone by now."""
    path = config.out / "world.json"
    stored = parse_object(read_text(path), str(path))
    kept = {name: stored.get(name) for name in _KEPT}
    kinds = [type(value) for value in kept.values()]
    if kinds != [str, str, int, int]:
        raise InputError(f"{path}: expected {', '.join(_KEPT)}; got {kept}: restore the file")
    reward = load_reward(config.reward) if config.reward else None
    return World(demonstrations=[], train_prompts=[], heldout_prompts=[], reward=reward, **kept)


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


def _save_ppo_state(run: Run, optimizer: Optimizer, done: int, kl_coef: float) -> None:
    meta = {
        "iterations_done": done,
        "kl_coef": kl_coef,
        "rng": {
            name: run.rng[name].bit_generator.state for name in ("prompts", "rollout", "shuffle")
        },
        "log": run.log.position(),
    }
    checkpoint.save_state(run.folder / "checkpoint", optimizer.state_tree(), meta)


def _load_ppo_state(run: Run, optimizer: Optimizer) -> tuple[int, float]:
    """(iterations done, kl_coef): those of the checkpoint, or the start's."""
    folder = run.folder / "checkpoint"
    if not checkpoint.has_state(folder):
        _begin(run, "ppo", folder, before=("policy",))
        return 0, run.config.ppo.kl_coef
    arrays, meta = checkpoint.load_state(folder)
    shapes = {name: array.shape for name, array in arrays.items()}
    expected = {name: array.shape for name, array in optimizer.state_tree().items()}
    if shapes != expected or meta.keys() != {"iterations_done", "kl_coef", "rng", "log"}:
        raise InputError(
            f"{folder}: expected the state of this run, with the arrays {expected}; got {shapes} "
            f"and {', '.join(meta)}: restore the folder"
        )
    optimizer.load_state_tree(arrays)
    for name, state in meta["rng"].items():
        run.rng[name].bit_generator.state = state
    run.log.rewind(meta["log"])
    return meta["iterations_done"], meta["kl_coef"]


def _save_reward_model(run: Run, folder: Path, model: RewardModel) -> None:
    scale = {"score_mean": model.mean, "score_sd": model.sd}
    if run.world.reward is not None:
        text = json.dumps({"reward": run.config.reward, **scale}, indent=2) + "\n"
        write_whole(folder / "scale.json", text.encode())
        return
    checkpoint.save_model(
        folder,
        model.params["transformer"],
        model.config,
        heads={"reward_head": model.params["reward_head"]},
        meta={**_token_meta(run), **scale},
    )


def _load_reward_model(run: Run, folder: Path, expected: GPTConfig) -> RewardModel:
    if run.world.reward is not None:
        path = folder / "scale.json"
        return RewardModel({}, expected, *_scale(parse_object(read_text(path), str(path)), path))
    transformer, gpt, heads = checkpoint.load_model(folder)
    _same_model(folder, gpt, expected)
    head = _head(heads, "reward_head", folder)
    params = run.on_device({"transformer": transformer, "reward_head": head})
    return RewardModel(params, gpt, *_scale(checkpoint.load_config(folder), folder))


def _scale(entries: dict[str, Any], path: Path) -> tuple[float, float]:
    """(mean, sd) of the score."""
    mean, sd = entries.get("score_mean"), entries.get("score_sd")
    if not (isinstance(mean, float) and isinstance(sd, float) and sd > 0):
        raise InputError(
            f"{path}: expected the numbers score_mean and score_sd > 0; got {mean!r} and {sd!r}: "
            "restore the folder"
        )
    return mean, sd


def _same_model(folder: Path, got: GPTConfig, expected: GPTConfig) -> None:
    if got != expected:
        raise InputError(f"{folder}: expected {expected}; got {got}: restore the folder")


def _head(heads: dict[str, Tree], name: str, folder: Path) -> Tree:
    if name not in heads:
        raise InputError(
            f"{folder}: expected the tensors of a {name} in heads.safetensors; found none: "
            "restore the folder"
        )
    return heads[name]


def _saved(folder: Path) -> bool:
    """Does a folder that is written whole exist, also in the middle of being replaced?"""
    try:
        settled(folder)
    except InputError:
        return False
    return True


def _token_meta(run: Run) -> dict[str, int]:
    t = run.tokenizer
    return {"bos_token_id": t.bos, "eos_token_id": t.eos, "pad_token_id": t.pad}


def _result_json(result: Result) -> bytes:
    finite = lambda row: {k: v if np.isfinite(v) else None for k, v in row.items()}  # noqa: E731
    content = {
        "reference": finite(result.reference),
        "policy": finite(result.policy),
        "seconds": result.seconds,
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _sample_rows(run: Run, rollout: Rollout) -> list[dict[str, Any]]:
    """The first samples with the two numbers of the objective: score and kl_seq [nats]."""
    samples = rollout.samples
    kl_seq = summed_penalty(rollout.old_logp, rollout.ref_logp, mask=rollout.batch.response_mask)
    columns = (samples.prompts, samples.responses, to_host(rollout.score), to_host(kl_seq))
    rows = []
    for prompt, response, score, kl in list(zip(*columns, strict=True))[:SAMPLES_LOGGED]:
        row = {"prompt": prompt, "response": response, "score": score, "kl_seq": kl}
        if run.world.gold is not None:
            row["gold"] = float(run.world.gold(prompt, response))
        rows.append(row)
    return rows


def _draw(items: list[str], n: int, rng: np.random.Generator) -> list[str]:
    """n items without repetition, or in whole shuffled rounds if there are fewer than n."""
    rounds = [rng.permutation(len(items)) for _ in range(-(-n // len(items)))]
    return [items[i] for i in np.concatenate(rounds)[:n]]
