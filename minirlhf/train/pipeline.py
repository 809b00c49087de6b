"""The whole way: text -> reference -> reward model -> policy, into one run folder.

    config.toml                      what was asked for, resolved
    tiktoken.json                    the encoding
    reference/ reward_model/ policy/ models in Hugging Face GPT-2 layout
    checkpoint/                      the state of PPO, to go on from bit for bit
    metrics.jsonl samples.jsonl      one object a step
    result.json                      the final table

Every stage draws from a random stream of its own, so a stage that is read back from the folder
leaves the others' numbers as they are: that is what makes `resume` exact.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from minirlhf.backend import array_module, to_device
from minirlhf.disk import parse_object, read_text, settled, write_whole
from minirlhf.errors import InputError
from minirlhf.nn.heads import init_scalar_head
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.train import checkpoint
from minirlhf.train.batches import row_slices
from minirlhf.train.config import TrainConfig, load_config, save_config
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
    Samples,
    ScoreFunction,
    prompt_ids,
    response_ids,
    sample_responses,
    score_rollout,
)
from minirlhf.train.run_log import RunLog
from minirlhf.train.sft import train_sft
from minirlhf.train.tokens import (
    Tokenizer,
    load_tokenizer,
    load_tokenizer_by_name,
    save_tokenizer,
    train_tokenizer,
)
from minirlhf.tree import Tree, tree_copy, tree_map
from minirlhf.worlds.files import corpus_world, load_reward, split_pairs
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
    log: RunLog
    track: Callable[[Iterable, str], Iterable]
    say: Callable[[str], None]
    seconds: dict[str, float]

    @property
    def folder(self) -> Path:
        return self.config.out

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

    def score_with(self, model: RewardModel) -> ScoreFunction:
        """The normalised score: of the reward model, or of the user's own reward."""
        if self.world.reward is not None:

            def score(prompts, responses, prompt_ids, response_ids):
                texts = map(self.world.full_text, prompts, responses)
                raw = np.array([self.world.reward(text) for text in texts], dtype=np.float64)
                return (raw - model.mean) / model.sd

        else:

            def score(prompts, responses, prompt_ids, response_ids):
                return score_responses(
                    model,
                    prompt_ids,
                    response_ids,
                    pad_id=self.tokenizer.pad,
                    device=self.config.device,
                )

        return score

    def evaluate(
        self, policy: Tree, reference: Tree, score: ScoreFunction
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
            device=self.config.device,
        )


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
) -> Run:
    """World, encoding, random streams and log of a run; writes config.toml and tiktoken.json.

    Raises:
        InputError: the folder already holds a run (and resume is False).
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
    world = build_world(config, rng["world"])
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
    log = RunLog(config.out)
    if not resume:
        save_tokenizer(tokenizer, config.out)
        save_config(config.out / "config.toml", config)
    return Run(config, world, tokenizer, gpt, rng, log, track, say, {})


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
    shared = ("tiktoken.json", "reference", "reward_model")
    missing = [name for name in shared if not (folder / name).exists()]
    if missing or out.exists():
        came = f"{out}, which exists" if out.exists() else f"no {missing[0]} in {folder}"
        raise InputError(f"fork: expected a run with its reward model and a new folder; got {came}")
    config = load_config(folder / "config.toml")
    out.mkdir(parents=True)
    for name in shared[1:]:
        shutil.copytree(folder / name, out / name)
    shutil.copy2(folder / shared[0], out)
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


def run_stages(run: Run) -> Result:
    """The stages in order; a stage whose result lies in the folder is not run again."""
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
    examples = [(run.prompt_ids(p), run.response_ids(r)) for p, r in run.world.demonstrations]
    transformer = train_sft(
        run.on_device(init_transformer(run.gpt, rng=run.rng["init"])),
        examples,
        config=run.gpt,
        settings=run.config.sft,
        pad_id=run.tokenizer.pad,
        rng=run.rng["sft"],
        log=run.log,
        track=run.track,
        device=run.config.device,
    )
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
    if run.world.reward is not None:
        model = RewardModel({}, gpt)
    else:
        pairs, heldout, gold_difference = preference_pairs(run, reference)
        start = reference["transformer"]
        if settings.init == "scratch":
            start = run.on_device(init_transformer(gpt, rng=run.rng["reward_init"]))
        model = train_reward_model(
            start,
            pairs,
            config=gpt,
            settings=settings,
            pad_id=run.tokenizer.pad,
            rng=run.rng["reward_model"],
            log=run.log,
            track=run.track,
            device=run.config.device,
        )
        if heldout:
            metrics = pair_metrics(
                model,
                heldout,
                pad_id=run.tokenizer.pad,
                gold_difference=gold_difference,
                device=run.config.device,
            )
            updates = settings.epochs * len(row_slices(len(pairs), settings.batch_size))
            run.log.metrics(updates, "reward_model", metrics)
            run.say(
                f"reward model: accuracy {metrics['heldout/accuracy']:.3f} on {len(heldout)} "
                f"held-out pairs, calibration error {metrics['heldout/calibration_error']:.3f}"
                + (
                    f", {metrics['heldout/gold_accuracy']:.3f} against the gold order"
                    if "heldout/gold_accuracy" in metrics
                    else ""
                )
            )
    rng = run.rng["normalize"]
    prompts = _draw(run.world.train_prompts, settings.n_normalize, rng)
    samples = run.sample(reference, prompts, rng)
    raw = run.score_with(model)(
        samples.prompts, samples.responses, samples.prompt_ids, samples.response_ids
    )
    model = normalized(model, raw)
    _save_reward_model(run, folder, model)
    return model


def preference_pairs(run: Run, reference: Tree) -> tuple[list[Pair], list[Pair], Any]:
    """Pairs to learn from, held-out pairs, and the held-out difference of gold (or None).

    Given pairs are split by prompt; otherwise the annotator compares two reference samples.
    """
    if run.world.pairs is not None:
        train, heldout = split_pairs(run.world.pairs, train_prompts=run.world.train_prompts)
        as_ids = lambda t: Pair(run.prompt_ids(t[0]), *map(run.response_ids, t[1:]))  # noqa: E731
        return [as_ids(t) for t in train], [as_ids(t) for t in heldout], None
    settings = run.config.reward_model
    train, _ = annotated_pairs(run, reference, run.world.train_prompts, settings.n_pairs)
    heldout, difference = annotated_pairs(
        run, reference, run.world.heldout_prompts, settings.n_heldout_pairs
    )
    return train, heldout, difference


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


def ppo_stage(run: Run, reference: Tree, score: ScoreFunction) -> Tree:
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
            metrics, samples, kl_coef = ppo_iteration(run, optimizer, reference, score, kl_coef)
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
        run.log.samples(iteration, _sample_rows(run, samples))
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
    run: Run, optimizer: Optimizer, reference: Tree, score: ScoreFunction, kl_coef: float
) -> tuple[dict[str, float], Samples, float]:
    """Sample, score, learn.

    Returns:
        metrics, the samples, the next kl_coef.
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
    return metrics, samples, kl_coef


# -- what lies in the run folder -----------------------------------------------------------------


def _begin(run: Run, stage: str, folder: Path, *, before: tuple[str, ...]) -> None:
    """Start a stage from nothing; its folder must not be what is missing from a later state.

    Raises:
        InputError: one of the folders `before` which this stage comes is there.
    """
    for name in before:
        if _saved(run.folder / name):
            raise InputError(
                f"{folder}: expected it beside {run.folder / name}, which was made with it; found "
                "nothing in it: restore it, or train again in another folder"
            )
    run.log.restart(stage)


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


def _sample_rows(run: Run, samples: Samples) -> list[dict[str, Any]]:
    rows = []
    for prompt, response in list(zip(samples.prompts, samples.responses, strict=True))[
        :SAMPLES_LOGGED
    ]:
        row = {"prompt": prompt, "response": response}
        if run.world.gold is not None:
            row["gold"] = float(run.world.gold(prompt, response))
        rows.append(row)
    return rows


def _draw(items: list[str], n: int, rng: np.random.Generator) -> list[str]:
    """n items without repetition, or in whole shuffled rounds if there are fewer than n."""
    rounds = [rng.permutation(len(items)) for _ in range(-(-n // len(items)))]
    return [items[i] for i in np.concatenate(rounds)[:n]]
