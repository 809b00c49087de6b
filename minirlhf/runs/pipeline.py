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
from minirlhf.nn.sampling import Sampling
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.runs import checkpoint
from minirlhf.runs.config import TrainConfig
from minirlhf.runs.evaluate import evaluate, gold_of
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
from minirlhf.runs.session import Score, Session, cut_notes, open_session, reopen_session
from minirlhf.train.metrics import iteration_metrics
from minirlhf.train.optimizer import NonFiniteError, Optimizer
from minirlhf.train.ppo import Iteration, Task, train_ppo
from minirlhf.train.reward_model import (
    Pair,
    RewardModel,
    init_reward_model,
    n_updates,
    normalized,
    pair_metrics,
    train_reward_model,
)
from minirlhf.train.rollout import Samples
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
    return run_stages(open_session(config, **shown))


def resume(folder: str | Path, **shown: Any) -> Result:
    """Go on where a run stopped: finished stages are read back, PPO from its last checkpoint."""
    return run_stages(reopen_session(folder, **shown))


def load_models(session: Session) -> tuple[Tree, Tree]:
    """(policy, reference) of a finished run.

    Raises:
        InputError: the run has no policy yet.
    """
    folder = session.folder / "policy"
    if not is_saved(folder):
        raise InputError(
            f"{folder}: expected a trained policy; found none: finish the run with `minirlhf "
            f"resume {session.folder}`"
        )
    transformer, gpt, heads = checkpoint.load_model(folder)
    check_same_model(folder, gpt, session.gpt)
    head = stored_head(heads, "value_head", folder)
    policy = session.on_device({"transformer": transformer, "value_head": head})
    return policy, {"transformer": reference_stage(session)}


def run_stages(session: Session) -> Result:
    """The stages in order; a stage whose result lies in the folder is not run again."""
    for note in cut_notes(session):
        session.say(note)
    n_workers = session.config.workers if session.config.device == "cpu" else 1
    with threadpool_limits(limits=session.config.threads or None), side_by_side(n_workers):
        result = _run_stages(session)
    write_whole(session.folder / "result.json", _result_json(result))
    return result


def _run_stages(session: Session) -> Result:
    reference = {"transformer": _stage(session, "sft", reference_stage)}
    model = _stage(session, "reward_model", reward_stage, reference)
    score = session.score_with(model)
    policy = _stage(session, "ppo", ppo_stage, reference, score)
    started = time.perf_counter()
    valued = {**reference, "value_head": policy["value_head"]}
    reference_metrics, reference_samples = evaluate(session, valued, reference, score)
    policy_metrics, policy_samples = evaluate(session, policy, reference, score)
    session.seconds["evaluation"] = time.perf_counter() - started
    return Result(
        reference_metrics,
        policy_metrics,
        policy_samples.prompts,
        reference_samples,
        policy_samples,
        session.seconds,
    )


def _stage(session: Session, name: str, stage: Callable, *inputs: Any) -> Any:
    started = time.perf_counter()
    out = stage(session, *inputs)
    session.seconds[name] = time.perf_counter() - started
    return out


def reference_stage(session: Session) -> Tree:
    """Stage 1: the transformer fine-tuned on the demonstrations, frozen from here on."""
    folder = session.folder / "reference"
    if is_saved(folder):
        params, gpt, _ = checkpoint.load_model(folder)
        check_same_model(folder, gpt, session.gpt)
        return session.on_device(params)
    begin_stage(session, "sft", folder, before=("reward_model", "checkpoint", "policy"))
    settings = session.config.sft
    examples, heldout = (
        [(session.prompt_ids(p), session.response_ids(r)) for p, r in demonstrations]
        for demonstrations in (session.world.demonstrations, session.world.heldout_demonstrations)
    )
    same = {"config": session.gpt, **session.padding}
    start = session.on_device(init_transformer(session.gpt, rng=session.rng["init"]))
    optimizer = Optimizer({"transformer": start}, settings.optimizer, total_steps=settings.steps)
    loop = train_sft(optimizer, examples, settings=settings, rng=session.rng["sft"], **same)
    session.follow(loop, "sft", settings.steps, "supervised fine-tuning")
    if heldout:
        loss = sft_loss(optimizer.params, heldout, batch_size=settings.batch_size, **same)
        session.log.metrics(settings.steps, "sft", {"heldout/loss_sft": loss})
    transformer = optimizer.params["transformer"]
    checkpoint.save_model(folder, transformer, session.gpt, meta=token_meta(session))
    return transformer


def reward_stage(session: Session, reference: Tree) -> RewardModel:
    """Stage 2: a reward model from pairs, or the scale of the user's own reward.

    Either way the score gets mean 0 and sd 1 on fresh reference samples.
    """
    folder = session.folder / "reward_model"
    settings = session.config.reward_model
    n_layer = settings.n_layer if settings.init == "scratch" else session.gpt.n_layer
    gpt = replace(session.gpt, n_layer=n_layer)
    if is_saved(folder) if session.world.reward is None else (folder / "scale.json").exists():
        return load_reward_model(session, folder, gpt)
    begin_stage(session, "reward_model", folder, before=("checkpoint", "policy"))
    model = RewardModel({}, gpt)
    if session.world.reward is None:
        model = learn_preferences(session, reference, gpt)
    rng = session.rng["normalize"]
    samples = session.sample(
        reference, _draw(session.world.train_prompts, settings.n_normalize, rng), rng
    )
    model = normalized(model, session.score_with(model)(samples))
    save_reward_model(session, folder, model)
    return model


def learn_preferences(session: Session, reference: Tree, gpt: GPTConfig) -> RewardModel:
    """A reward model trained on pairs, not yet normalised; its held-out accuracy is logged."""
    settings, rng = session.config.reward_model, session.rng["reward_model"]
    pairs, heldout, gold_difference = preference_pairs(session, reference)
    start = reference["transformer"]
    if settings.init == "scratch":
        start = session.on_device(init_transformer(gpt, rng=session.rng["reward_init"]))
    updates = n_updates(len(pairs), settings)
    optimizer = Optimizer(
        init_reward_model(start, gpt, rng=rng), settings.optimizer, total_steps=updates
    )
    loop = train_reward_model(
        optimizer, pairs, config=gpt, settings=settings, rng=rng, **session.padding
    )
    session.follow(loop, "reward_model", updates, "reward model")
    model = RewardModel(optimizer.params, gpt)
    if heldout:
        metrics = pair_metrics(model, heldout, gold_difference=gold_difference, **session.padding)
        session.log.metrics(updates, "reward_model", metrics)
        session.say(_accuracy_line(metrics, len(heldout)))
    return model


def _accuracy_line(metrics: dict[str, float], n: int) -> str:
    line = (
        f"reward model: accuracy {metrics['heldout/accuracy']:.3f} on {n} held-out pairs, "
        f"calibration error {metrics['heldout/calibration_error']:.3f}"
    )
    if "heldout/gold_accuracy" in metrics:
        line += f", {metrics['heldout/gold_accuracy']:.3f} against the gold order"
    return line


def preference_pairs(session: Session, reference: Tree) -> tuple[list[Pair], list[Pair], Any]:
    """Pairs to learn from, held-out pairs, and the held-out difference of gold (or None).

    Given pairs are split by prompt; otherwise the annotator compares two reference samples.

    Raises:
        InputError: no given pair of a training prompt differs within the limit on tokens.
    """
    if session.world.pairs is not None:
        parts = split_pairs(session.world.pairs, train_prompts=session.world.train_prompts)
        train, heldout = (_differing_pairs(session, part) for part in parts)
        if dropped := len(session.world.pairs) - len(train) - len(heldout):
            session.say(
                f"dropped {dropped} of {len(session.world.pairs)} pairs that are equal in their "
                f"first {session.max_response_tokens} tokens"
            )
        if not train:
            raise InputError(
                "pairs: expected pairs to train on that differ in their first "
                f"{session.max_response_tokens} tokens; got none: raise --max-response-tokens"
            )
        return train, heldout, None
    settings = session.config.reward_model
    train, _ = annotated_pairs(session, reference, session.world.train_prompts, settings.n_pairs)
    heldout, difference = annotated_pairs(
        session, reference, session.world.heldout_prompts, settings.n_heldout_pairs
    )
    return train, heldout, difference


def _differing_pairs(session: Session, pairs: list[TextPair]) -> list[Pair]:
    """The pairs as ids, without those that no longer differ where they are cut."""
    ids = [
        Pair(session.prompt_ids(p), session.response_ids(c), session.response_ids(r))
        for p, c, r in pairs
    ]
    return [pair for pair in ids if pair.chosen != pair.rejected]


def annotated_pairs(
    session: Session, reference: Tree, prompts: list[str], n: int
) -> tuple[list[Pair], np.ndarray | None]:
    """n pairs of reference samples in the annotator's order; equal replies are left out.

    Returns:
        pairs, gold(chosen) - gold(rejected) of each (None without a gold reward).
    """
    drawn = _draw(prompts, n, session.rng["pairs"])
    first, second = (session.sample(reference, drawn, session.rng["pairs"]) for _ in range(2))
    gold = [gold_of(s, session.world) for s in (first, second)] if session.world.gold else None
    pairs, difference = [], []
    for i, prompt in enumerate(drawn):
        a, b = first.responses[i], second.responses[i]
        if first.response_ids[i] == second.response_ids[i]:
            continue
        a_wins = session.world.annotate(prompt, a, b, session.rng["annotator"])
        winner, loser = (first, second) if a_wins else (second, first)
        pairs.append(Pair(first.prompt_ids[i], winner.response_ids[i], loser.response_ids[i]))
        if gold:
            difference.append((gold[0][i] - gold[1][i]) * (1 if a_wins else -1))
    return pairs, np.array(difference) if gold else None


def ppo_stage(session: Session, reference: Tree, score: Score) -> Tree:
    """Stage 3: PPO from the reference, with checkpoints.

    Raises:
        NonFiniteError: a loss is not finite; the message names the last good checkpoint.
    """
    settings, config = session.config.ppo, session.config
    optimizer = _new_policy(session, reference)
    done, kl_coef = load_ppo_state(session, optimizer)
    task = Task(lambda policy: _sample_batch(session, policy), score, session.tokenizer.eos)
    loop = train_ppo(
        optimizer,
        reference,
        task,
        config=session.gpt,
        settings=settings,
        rng=session.rng["shuffle"],
        kl_coef=kl_coef,
    )
    steps, started = session.track(range(done, settings.iterations), "PPO"), time.perf_counter()
    try:
        for step, iteration in zip(steps, loop, strict=False):
            metrics, done = _metrics(session, iteration), step + 1
            metrics["time/iteration"] = time.perf_counter() - started
            metrics["episode"] = done * settings.batch_size
            if config.eval_every and done % config.eval_every == 0:
                heldout, _ = evaluate(session, optimizer.params, reference, score)
                metrics |= {f"eval/{name}": value for name, value in heldout.items()}
            session.log.metrics(step, "ppo", metrics)
            session.log.samples(step, sample_rows(session, iteration.rollout))
            if done % config.checkpoint_every == 0 or done == settings.iterations:
                save_ppo_state(session, optimizer, done, iteration.next_kl_coef)
            started = time.perf_counter()
    except NonFiniteError as error:
        kept = session.folder / "checkpoint"
        last = f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint yet"
        raise NonFiniteError(f"PPO iteration {done}: {error} ({last})") from error
    policy = optimizer.params
    checkpoint.save_model(
        session.folder / "policy",
        policy["transformer"],
        session.gpt,
        heads={"value_head": policy["value_head"]},
        meta=token_meta(session),
    )
    return policy


def _new_policy(session: Session, reference: Tree) -> Optimizer:
    """The optimiser of a copy of the reference with a value head that says 0 everywhere."""
    settings, rng = session.config.ppo, session.rng["init"]
    dtype = reference["transformer"]["wte"].dtype
    head = init_scalar_head(session.gpt.d_model, std=0.0, rng=rng, dtype=dtype)
    policy = {
        "transformer": tree_copy(reference["transformer"]),
        "value_head": session.on_device(head),
    }
    total = settings.iterations * settings.updates_per_iteration
    return Optimizer(policy, settings.optimizer, total_steps=total)


def _sample_batch(session: Session, policy: Tree) -> Samples:
    """Responses to the next batch of training prompts."""
    settings, rng = session.config.ppo, session.rng
    prompts = _draw(session.world.train_prompts, settings.batch_size, rng["prompts"])
    return session.sample(policy, prompts, rng["rollout"], Sampling(settings.temperature))


def _metrics(session: Session, iteration: Iteration) -> dict[str, float]:
    """Those of the iteration, and the gold reward of its samples, which nobody trains on."""
    settings, stop_id = session.config.ppo, session.tokenizer.eos
    metrics = iteration_metrics(iteration, settings=settings, stop_id=stop_id)
    if session.world.gold is not None:
        gold = gold_of(iteration.rollout.samples, session.world)
        metrics["objective/gold"] = float(np.mean(gold))
    return metrics


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
