"""The whole way: text -> reference -> reward model -> policy, into one run folder.

config.toml                      what was asked for, resolved
world.json                       limits, and the digest of the texts that it trains on
tiktoken.json                    the encoding
reference/ reward_model/ policy/ models in Hugging Face GPT-2 layout
checkpoint/                      the state of PPO, to go on from bit for bit
metrics.jsonl samples.jsonl      one object a step
result.json                      the final table
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from minirlhf.disk import write_whole
from minirlhf.errors import InputError
from minirlhf.nn.heads import init_scalar_head
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.runs import checkpoint
from minirlhf.runs.config import TrainConfig
from minirlhf.runs.evaluate import gold_of
from minirlhf.runs.folder import (
    begin_stage,
    check_same_model,
    is_saved,
    load_ppo_state,
    load_reward_model,
    sample_rows,
    save_ppo_state,
    save_reward_model,
    stored_head,
    token_meta,
)
from minirlhf.runs.run import Run, Score, cut_notes, open_run, open_saved_run
from minirlhf.train.batches import row_slices
from minirlhf.train.optimizer import NonFiniteError, Optimizer
from minirlhf.train.ppo import make_experience, next_kl_coef, ppo_update, rollout_metrics
from minirlhf.train.reward_model import (
    Pair,
    RewardModel,
    normalized,
    pair_metrics,
    train_reward_model,
)
from minirlhf.train.rollout import Rollout, Samples, score_rollout
from minirlhf.train.sft import sft_loss, train_sft
from minirlhf.tree import Tree, tree_copy
from minirlhf.workers import side_by_side
from minirlhf.worlds.files import TextPair, split_pairs


class Result(NamedTuple):
    reference: dict[str, float]  # columns of `evaluate.response_metrics`
    policy: dict[str, float]
    prompts: list[str]
    reference_samples: Samples
    policy_samples: Samples
    seconds: dict[str, float]  # time of each stage


def train(config: TrainConfig, **shown: Any) -> Result:
    """SFT, reward model, PPO and the final comparison, from nothing.

    Args:
        shown: `track` (wraps a range of steps to show progress) and `say` (prints a line).
    """
    return run_stages(open_run(config, **shown))


def resume(folder: str | Path, **shown: Any) -> Result:
    """Go on where a run stopped: finished stages are read back, PPO from its last checkpoint."""
    return run_stages(open_saved_run(folder, **shown))


def load_models(run: Run) -> tuple[Tree, Tree]:
    """(policy, reference) of a finished run.

    Raises:
        InputError: the run has no policy yet.
    """
    folder = run.folder / "policy"
    if not is_saved(folder):
        raise InputError(
            f"{folder}: expected a trained policy; found none: finish the run with `minirlhf "
            f"resume {run.folder}`"
        )
    transformer, gpt, heads = checkpoint.load_model(folder)
    check_same_model(folder, gpt, run.gpt)
    head = stored_head(heads, "value_head", folder)
    policy = run.on_device({"transformer": transformer, "value_head": head})
    return policy, {"transformer": reference_stage(run)}


def run_stages(run: Run) -> Result:
    """The stages in order; a stage whose result lies in the folder is not run again."""
    for note in cut_notes(run):
        run.say(note)
    n_workers = run.config.workers if run.config.device == "cpu" else 1
    with threadpool_limits(limits=run.config.threads or None), side_by_side(n_workers):
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
    if is_saved(folder):
        params, gpt, _ = checkpoint.load_model(folder)
        check_same_model(folder, gpt, run.gpt)
        return run.on_device(params)
    begin_stage(run, "sft", folder, before=("reward_model", "checkpoint", "policy"))
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
    checkpoint.save_model(folder, transformer, run.gpt, meta=token_meta(run))
    return transformer


def reward_stage(run: Run, reference: Tree) -> RewardModel:
    """Stage 2: a reward model from pairs, or the scale of the user's own reward.

    Either way the score gets mean 0 and sd 1 on fresh reference samples.
    """
    folder = run.folder / "reward_model"
    settings = run.config.reward_model
    n_layer = settings.n_layer if settings.init == "scratch" else run.gpt.n_layer
    gpt = replace(run.gpt, n_layer=n_layer)
    if is_saved(folder) if run.world.reward is None else (folder / "scale.json").exists():
        return load_reward_model(run, folder, gpt)
    begin_stage(run, "reward_model", folder, before=("checkpoint", "policy"))
    model = RewardModel({}, gpt)
    if run.world.reward is None:
        model = learn_preferences(run, reference, gpt)
    rng = run.rng["normalize"]
    samples = run.sample(reference, _draw(run.world.train_prompts, settings.n_normalize, rng), rng)
    model = normalized(model, run.score_with(model)(samples))
    save_reward_model(run, folder, model)
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
    first, kl_coef = load_ppo_state(run, optimizer)
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
        run.log.samples(iteration, sample_rows(run, rollout))
        if done % run.config.checkpoint_every == 0 or done == settings.iterations:
            save_ppo_state(run, optimizer, done, kl_coef)
    policy = optimizer.params
    checkpoint.save_model(
        run.folder / "policy",
        policy["transformer"],
        run.gpt,
        heads={"value_head": policy["value_head"]},
        meta=token_meta(run),
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
        keep_ref_logits=KL_MODES[settings.kl_mode].needs_ref_logits,
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


def _result_json(result: Result) -> bytes:
    finite = lambda row: {k: v if np.isfinite(v) else None for k, v in row.items()}  # noqa: E731
    content = {
        "reference": finite(result.reference),
        "policy": finite(result.policy),
        "seconds": result.seconds,
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _draw(items: list[str], n: int, rng: np.random.Generator) -> list[str]:
    """n items without repetition, or in whole shuffled rounds if there are fewer than n."""
    rounds = [rng.permutation(len(items)) for _ in range(-(-n // len(items)))]
    return [items[i] for i in np.concatenate(rounds)[:n]]
