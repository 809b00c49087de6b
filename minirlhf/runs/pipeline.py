"""The whole way: text -> reference -> reward model -> policy, into one run folder; or without the
reward model, by DPO.

`run_stages` names the stages, which stand below it in this order. A stage hands its texts, a random
stream and an optimiser to a loop of `train/`, follows it with a log, and leaves a folder; where the
folder is there already, the stage is read back from it (README.md says what a run leaves where).
"""

import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from minirlhf.crew import side_by_side
from minirlhf.disk import read_object, refuse_link, to_json, write_whole
from minirlhf.errors import InputError
from minirlhf.nn.sampling import Sampling
from minirlhf.nn.transformer import GPTConfig, init_transformer, parameter_shapes
from minirlhf.ranks import ask_first, is_first, leave_to_first, n_ranks
from minirlhf.runs import folder, snapshots
from minirlhf.runs.log import mirrored, read_metrics
from minirlhf.runs.metrics import evaluate, heldout_dpo, iteration_metrics, pair_metrics, sft_loss
from minirlhf.runs.session import Score, Session
from minirlhf.train import dpo, reward_model
from minirlhf.train.optimizer import NonFiniteError, Optimizer
from minirlhf.train.ppo import Task, new_policy, train_ppo
from minirlhf.train.reward_model import Pair, RewardModel
from minirlhf.train.rollout import Samples
from minirlhf.train.sampler import sample_as_set
from minirlhf.train.sft import train_sft
from minirlhf.tree import Tree, tree_leaves
from minirlhf.worlds.examples import Texts
from minirlhf.worlds.files import split_pairs

TITLES = {"sft": "supervised fine-tuning", "reward_model": "reward model"}
TITLES |= {"dpo": "DPO", "ppo": "PPO"}
# Checkpoints of all stages but PPO: not more often, and of the time not more than this share
CHECKPOINT_SECONDS, CHECKPOINT_SHARE = 10.0, 0.02
# Their held-out loss: measured so often before the end, on about so many rows, or this share of
# those trained on (a sixth of the time in all), if that is less; what is noise
LOOKS, LOOK_ROWS, LOOK_SHARE, NOISE = 10, 400, 0.05, 0.02
_NUMBERS = {float, int, type(None)}  # in result.json
HELDOUT = {stage: f"heldout/loss_{stage}" for stage in ("sft", "reward_model", "dpo")}


class Result(NamedTuple):
    reference: dict[str, float]  # columns of `metrics.response_metrics`
    policy: dict[str, float]
    prompts: list[str]
    reference_samples: Samples
    policy_samples: Samples
    seconds: dict[str, float]  # time of each stage


def load_models(session: Session) -> tuple[Tree, Tree]:
    """(policy, reference); before PPO has ended the policy of its checkpoint, or the reference."""
    config, settings = session.config, session.config.ppo
    saved = {name for name in ("policy", "reference") if folder.is_saved(session, name)}
    if not saved:
        raise InputError(
            f"{session.folder / 'policy'}: expected a trained policy; found none: finish the run "
            f"with `minirlhf resume {shlex.quote(str(session.folder))}`"
        )
    reference = reference_stage(session)
    if "policy" in saved:
        heads = ["value_head"] if settings.has_critic and not config.is_dpo else []
        return folder.load_params(session, "policy", session.gpt, *heads), reference
    if not folder.has_state(session, "ppo"):
        session.note(f"{session.folder} has no policy yet: its reference stands for it")
        return reference, reference
    optimizer = new_policy(reference, settings, rng=session.rng["init"])
    done, *_ = folder.load_state(session, "ppo", optimizer, settings.iterations, reference)
    session.note(f"the policy is that after {done} of {settings.iterations} iterations of PPO")
    return optimizer.params, reference


def run_stages(session: Session) -> Result | None:
    """The stages in order, and the comparison; None where config.stages end before the policy."""
    config = session.config
    if session.stored is None:
        session.say(f"run {config.out}: finished; its texts or reward have gone or changed since")
        return ask_first(read_result)(config.out)
    with (
        session.at_work(),
        mirrored(session.log, config.log if is_first() else ""),
        threadpool_limits(limits=config.threads or None),
        side_by_side(config.workers if config.device == "cpu" else 1),
    ):
        refuse_link(session.folder / "checkpoint")
        folder.settle_settings(session)
        session.say(banner(session))
        reference = _run("sft", reference_stage, session)
        if config.stages == "sft":
            return None
        if config.is_dpo:
            score = session.score_with(RewardModel({}, session.gpt))
            policy = _run("dpo", dpo_stage, session, reference)
        else:
            score = session.score_with(_run("reward_model", reward_stage, session, reference))
            if config.stages == "sft,reward":
                return None
            policy = _run("ppo", ppo_stage, session, reference, score)
        session.say(f"evaluating reference and policy, {config.eval_prompts:,} replies of each")
        before, first = _run("evaluation", evaluate, session, reference, reference, score)
        after, last = _run("evaluation", evaluate, session, policy, reference, score)
        content = to_json({"reference": before, "policy": after, "seconds": session.seconds})
        leave_to_first(write_whole)(session.folder / "result.json", content)
    return Result(before, after, last.prompts, first, last, session.seconds)


def _run(stage: str, make: Callable, session: Session, *made: Any) -> Any:
    """What a stage makes; how long it takes is noted, and its checkpoint dropped, but PPO's."""
    session.stage, session.steps, started = stage, "", time.perf_counter()
    result = make(session, *made)
    session.seconds[stage] = session.seconds.get(stage, 0.0) + time.perf_counter() - started
    if stage in HELDOUT:
        leave_to_first(rmtree)(folder.state_of(session, stage), ignore_errors=True)
    return result


def read_result(run: Path) -> Result:
    """The comparison of a finished run without its replies, refused if it is none."""
    path = run / "result.json"
    parts = [read_object(path).get(name) for name in ("reference", "policy", "seconds")]
    for part in parts:
        if not (isinstance(part, dict) and {type(x) for x in part.values()} <= _NUMBERS):
            raise InputError(f"{path}: expected numbers; got others: restore the file")
        part.update({key: math.nan for key, x in part.items() if x is None})
    return Result(*parts[:2], [], None, None, parts[2])


def banner(session: Session) -> str:
    """What is about to be done, on one line."""
    world, config = session.world, session.config
    n = sum(map(math.prod, tree_leaves(parameter_shapes(session.gpt))))
    texts = (world.demonstrations, world.train_prompts, world.heldout_prompts)
    sizes = "{:,} demonstrations, {:,} prompts, {:,} held out".format(*map(len, texts))
    pairs = "pairs of its own samples" if world.annotate else "no preferences yet"
    pairs = pairs if world.pairs is None else f"{len(world.pairs):,} pairs in all"
    source = pairs if world.reward is None else f"the reward {config.reward}"
    done = {stage: folder.is_saved(session, folder.STAGES[stage]) for stage in config.order}
    done[config.order[-1]] = (session.folder / "result.json").exists()
    left = [stage.removesuffix("_model") for stage in done if not done[stage]]
    asked = [name for name in left if config.stages == "all" or name in config.stages]
    to_run = ", ".join(asked) or "none, all are done"
    to_run += f"; {n_ranks()} processes of mpiexec" if n_ranks() > 1 else ""
    return f"run {session.folder}: {n:,} parameters; {sizes}; {source}; stages to run: {to_run}"


def _follow(session: Session, stage: str, loop: Iterable, steps: range) -> Iterator:
    """(step, what the loop yields) for the steps that are left, with progress."""
    title, unit = TITLES[stage], "iteration" if stage == "ppo" else "step"
    session.made, session.kept, session.steps = steps.start, steps.start, f"{steps.stop} {unit}s"
    if 0 < steps.start < steps.stop:
        session.say(f"stage {stage} goes on after {steps.start} of {session.steps}")
    try:
        for step, result in zip(session.track(steps, title), loop, strict=False):
            session.made = step + 1
            yield step, result
    except NonFiniteError as error:
        last = "no checkpoint yet"
        if session.kept:
            last = f"the last good checkpoint is {folder.state_of(session, stage)}"
        raise NonFiniteError(f"{title} {unit} {session.made}: {error} ({last})") from error


def _learn(
    session: Session, stage: str, optimizer: Optimizer, loop: Iterable, n: int, measure: Callable
) -> dict[str, float]:
    """Run a stage, any but PPO; `measure` is asked of slices of n held-out rows, at last of all."""
    n_steps = optimizer.total_steps
    trained = n_steps * getattr(session.config, stage).batch_size
    some = slice(None, None, round(n / min(LOOK_ROWS, LOOK_SHARE * trained + 1)) or 1)
    due = {n_steps * i // LOOKS for i in range(LOOKS + 1)} if n else ()

    def look(done: int) -> dict[str, float]:
        return measure(some if done < n_steps else slice(None)) if done in due else {}

    done, *_ = folder.load_state(session, stage, optimizer, n_steps)
    saved, pause = time.perf_counter(), CHECKPOINT_SECONDS
    last = look(done)
    for step, metrics in _follow(session, stage, loop, range(done, n_steps)):
        session.log.metrics(step, stage, metrics | last)  # held out: as it was before this step
        if (began := time.perf_counter()) - saved >= pause:
            folder.save_state(session, stage, optimizer, step + 1)
            saved = time.perf_counter()
            pause = max(CHECKPOINT_SECONDS, (saved - began) / CHECKPOINT_SHARE)
        last = look(step + 1)  # not in the checkpoint: after a resume it is made again
    if last:
        session.log.metrics(n_steps, stage, last)
        rows = len(range(n)[some])
        _note_memorised(session, stage, n_steps, last if rows == n else measure(some), rows)
    return last


@leave_to_first
def _note_memorised(session: Session, stage: str, n_steps: int, last: dict, n: int) -> None:
    """Say so if the loss of n held-out rows was clearly lower on the way, their order no worse."""
    name, right = HELDOUT[stage], "heldout/accuracy"
    rows = [row for row in read_metrics(session.folder) if row["stage"] == stage]
    looks = [r for r in rows if r["step"] < n_steps and isinstance(r.get(name), float)]
    low = min(looks, key=lambda row: row[name], default=last)
    share = low.get(right, 1.0)
    rose = last.get(right, 0.0) - share > 2 * math.sqrt(share * (1 - share) / n)
    if last[name] > (1 + NOISE) * low[name] and not rose:
        flag, option = stage.replace("_", "-"), f"--sft.steps {low['step']}"
        if stage != "sft":
            fewer = getattr(session.config, stage).epochs * low["step"] // n_steps
            slower = f"a lower --{flag}.optimizer.learning-rate"
            option = f"--{flag}.epochs {fewer}" if fewer else slower
        session.note(
            f"{TITLES[stage]}: the held-out loss was lowest, {low[name]:.3f}, after {low['step']} "
            f"of {n_steps} steps and rose to {last[name]:.3f}, as texts are learnt by heart: set "
            f"{option} in a new run"
        )


def reference_stage(session: Session) -> Tree:
    """Stage 1: {"transformer": ...} fine-tuned on the demonstrations, frozen from here on."""
    if folder.is_saved(session, "reference"):
        return folder.load_params(session, "reference", session.gpt)
    folder.begin_stage(session, "sft")
    settings, world = session.config.sft, session.world
    examples = [session.example_ids(*texts) for texts in world.demonstrations]
    heldout = [session.example_ids(*texts) for texts in world.heldout_demonstrations]
    same = {"config": session.gpt, **session.padding}
    first = {"transformer": session.on_device(session.first_weights())}
    optimizer = Optimizer(first, settings.optimizer, total_steps=settings.steps)
    del first  # of a large model each copy counts
    loop = train_sft(optimizer, examples, settings=settings, rng=session.rng["sft"], **same)

    def measure(rows: slice) -> dict[str, float]:
        size = settings.batch_size
        return {HELDOUT["sft"]: sft_loss(optimizer.params, heldout[rows], batch_size=size, **same)}

    n = len(heldout)
    if found := _learn(session, "sft", optimizer, loop, n, measure):
        loss = found[HELDOUT["sft"]]
        session.say(f"fine-tuning: {loss:.3f} nats per token on {n:,} held-out demonstrations")
    folder.save_params(session, "reference", optimizer.params, session.gpt)
    return optimizer.params


def reward_stage(session: Session, reference: Tree) -> RewardModel:
    """Stage 2: a reward model from pairs, or the scale of the user's own reward.

    Either way the score gets mean 0 and sd 1 on fresh reference samples, drawn as PPO draws.
    """
    settings, gpt = session.config.reward_model, session.gpt
    gpt = replace(gpt, tied=True)  # nobody reads its logits
    if settings.init == "scratch":
        gpt = replace(gpt, n_layer=settings.n_layer)
    if folder.is_saved(session, "reward_model"):
        return folder.load_reward_model(session, gpt)
    folder.begin_stage(session, "reward_model")
    model = RewardModel({}, gpt)
    if session.world.reward is None:
        model = learn_preferences(session, reference, gpt)
    rng = session.rng["normalize"]
    prompts = draw_prompts(session.world.train_prompts, settings.n_normalize, rng)
    session.say(f"scaling the reward on {len(prompts):,} samples of the reference")
    samples = session.sample(reference, prompts, rng, Sampling(session.config.ppo.temperature))
    model = reward_model.normalized(model, session.score_with(model)(samples))
    folder.save_reward_model(session, model)
    return model


def learn_preferences(session: Session, reference: Tree, gpt: GPTConfig) -> RewardModel:
    """A reward model trained on pairs, not yet normalised."""
    start = reference["transformer"]
    if session.config.reward_model.init == "scratch":
        start = session.on_device(init_transformer(gpt, rng=session.rng["reward_init"]))
    params = reward_model.init_reward_model(start, gpt, rng=session.rng["reward_model"])
    pairs = preference_pairs(session, reference)
    train = partial(reward_model.train_reward_model, config=gpt)
    measure = partial(pair_metrics, config=gpt, **session.padding)
    return RewardModel(_learn_pairs(session, "reward_model", params, pairs, train, measure), gpt)


def dpo_stage(session: Session, reference: Tree) -> Tree:
    """In the place of stages 2 and 3: the policy from pairs, against the reference."""
    if folder.is_saved(session, "policy"):
        return folder.load_params(session, "policy", session.gpt)
    folder.begin_stage(session, "dpo")
    same = {"config": session.gpt, **session.padding}
    *pairs, gold_difference = preference_pairs(session, reference)
    pairs = [dpo.with_reference(some, reference, **same) for some in pairs]
    measure = partial(heldout_dpo, settings=session.config.dpo, **same)
    train = partial(dpo.train_dpo, config=session.gpt)
    params = _learn_pairs(session, "dpo", reference, (*pairs, gold_difference), train, measure)
    folder.save_params(session, "policy", params, session.gpt)
    return params


def _learn_pairs(
    session: Session, stage: str, start: Tree, pairs: tuple, train: Callable, measure: Callable
) -> Tree:
    """What `train` makes of a copy of `start` and of what `preference_pairs` gives."""
    settings, (pairs, heldout, gold_difference) = getattr(session.config, stage), pairs
    updates, n = reward_model.n_updates(len(pairs), settings), len(heldout)
    optimizer = Optimizer(start, settings.optimizer, total_steps=updates)
    loop = train(optimizer, pairs, settings=settings, rng=session.rng[stage], **session.padding)

    def look(rows: slice) -> dict[str, float]:
        gold = None if gold_difference is None else gold_difference[rows]
        return measure(optimizer.params, heldout[rows], gold)

    if metrics := _learn(session, stage, optimizer, loop, n, look):
        gold = metrics.get("heldout/gold_accuracy")
        session.say(
            f"{TITLES[stage]}: accuracy {metrics['heldout/accuracy']:.3f} on {n} held-out pairs, "
            f"loss {metrics[HELDOUT[stage]]:.3f}, "
            f"calibration error {metrics['heldout/calibration_error']:.3f}"
            + ("" if gold is None else f", {gold:.3f} against the gold order")
        )
    return optimizer.params


def preference_pairs(session: Session, reference: Tree) -> tuple[list[Pair], list[Pair], Any]:
    """Pairs to learn from, held-out pairs, and the held-out difference of gold (or None)."""
    world, settings = session.world, session.config.reward_model
    if world.pairs is None and world.annotate is None:
        how = f"`minirlhf resume {shlex.quote(str(session.folder))} --reward ..` or train --pairs"
        raise InputError(f"expected a reward or pairs; got none: go on with {how}", resume=None)
    if world.pairs is None:
        draw = partial(annotated_pairs, session, reference)
        train, _ = draw(world.train_prompts, settings.n_pairs)
        return train, *draw(world.heldout_prompts, settings.n_heldout_pairs)
    parts = split_pairs(world.pairs, train_prompts=world.train_prompts)
    train, heldout = (_differing_pairs(session, part) for part in parts)
    within = f"in their first {session.world.max_response_tokens} tokens"
    if dropped := len(world.pairs) - len(train) - len(heldout):
        session.note(f"dropped {dropped} of {len(world.pairs)} pairs that are equal {within}")
    if not train:
        raise InputError(
            f"pairs: expected some that differ {within}; got none: raise --max-response-tokens",
            resume=None,
        )
    return train, heldout, None


def _differing_pairs(session: Session, pairs: list[Texts]) -> list[Pair]:
    """The pairs as ids, without those that no longer differ where they are cut."""
    differing = []
    for texts in pairs:
        prompt, *replies = session.example_ids(*texts)
        if len(set(map(bytes, replies))) == len(replies):
            differing.append(Pair(prompt, tuple(replies)))
    return differing


def annotated_pairs(
    session: Session, reference: Tree, prompts: list[str], n: int
) -> tuple[list[Pair], np.ndarray | None]:
    """n pairs of reference samples, without equal ones, and their difference of gold (or None)."""
    world, rng = session.world, session.rng
    drawn = draw_prompts(prompts, n, rng["pairs"])
    first, second = (session.sample(reference, drawn, rng["pairs"]) for _ in range(2))
    pairs, difference = [], []
    for i, prompt in enumerate(drawn):
        if first.response_ids[i] == second.response_ids[i]:
            continue
        a_wins = world.annotate(prompt, first.responses[i], second.responses[i], rng["annotator"])
        winner, loser = (first, second) if a_wins else (second, first)
        replies = winner.response_ids[i], loser.response_ids[i]
        pairs.append(Pair(first.prompt_ids[i], replies))
        if world.gold:
            chosen, rejected = (world.gold(prompt, of.responses[i]) for of in (winner, loser))
            difference.append(chosen - rejected)
    return pairs, np.array(difference) if world.gold else None


def ppo_stage(session: Session, reference: Tree, score: Score) -> Tree:
    """Stage 3: PPO from the reference, with checkpoints."""
    folder.begin_stage(session, "ppo")
    settings, config, stop_id = session.config.ppo, session.config, session.tokenizer.eos
    total, task = settings.iterations, Task(partial(_sample_batch, session), score, stop_id)
    optimizer = new_policy(reference, settings, rng=session.rng["init"])
    done, kl_coef, origin = folder.load_state(session, "ppo", optimizer, total, reference)
    how = {"config": session.gpt, "settings": settings, "rng": session.rng["shuffle"]}
    loop = train_ppo(optimizer, origin, task, kl_coef=kl_coef, **how)
    looks = snapshots.moments(session)
    look = partial(snapshots.take_snapshot, session, score=score)
    if looks and not done:
        look(optimizer.params, reference, done=0, kl_coef=settings.kl_coef)
    started = time.perf_counter()
    for step, iteration in _follow(session, "ppo", loop, range(done, total)):
        metrics = iteration_metrics(iteration, settings=settings, stop_id=stop_id)
        metrics["time/iteration"] = time.perf_counter() - started
        done = step + 1
        metrics["episode"] = done * settings.batch_size
        if session.world.gold is not None:  # of the samples: nobody trains on it
            samples = iteration.rollout.samples
            golds = session.world.golds(samples.prompts, samples.responses)
            metrics["objective/gold"] = np.mean(golds)
        if session.world.reward is not None:
            metrics["objective/reward"] = score.model.raw(metrics["objective/scores"])
        if config.eval_every and done % config.eval_every == 0:
            heldout, _ = evaluate(session, optimizer.params, reference, score)
            metrics |= {f"eval/{name}": value for name, value in heldout.items()}
        session.log.metrics(step, "ppo", metrics)
        session.log.samples(step, folder.sample_rows(session, iteration.rollout))
        beta, origin = iteration.next_kl_coef, iteration.next_reference
        if done in looks:
            look(optimizer.params, origin, done=done, kl_coef=beta)
        if done % config.checkpoint_every == 0 or done == total or session.stop:
            state = {"reference": origin, "kl_coef": float(beta)}
            folder.save_state(session, "ppo", optimizer, done, **state)
        if session.stop:
            raise session.stop
        started = time.perf_counter()
    folder.save_params(session, "policy", optimizer.params, session.gpt)
    return optimizer.params


def _sample_batch(session: Session, policy: Tree) -> Samples:
    """G responses to each of the next training prompts, those to one prompt together."""
    settings, rng = session.config.ppo, session.rng
    G = settings.samples_per_prompt
    prompts = draw_prompts(session.world.train_prompts, settings.batch_size // G, rng["prompts"])
    prompts = [prompt for prompt in prompts for _ in range(G)]
    drawn = {"rng": rng["rollout"], "sampling": Sampling(settings.temperature)}
    sample = partial(session.sample, prompts=prompts, **drawn)
    return sample_as_set(sample, policy, config=session.gpt, settings=settings)


def draw_prompts(items: list[str], n: int, rng: np.random.Generator) -> list[str]:
    """n items without repetition, or in whole shuffled rounds if there are fewer than n."""
    rounds = [rng.permutation(len(items)) for _ in range(-(-n // len(items)))]
    return [items[i] for i in np.concatenate(rounds)[:n]]
