"""What the stages leave in a run's folder: written, read back, refused where it does not fit."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from minirlhf.backend import to_host
from minirlhf.disk import read_object, settled, shorten, to_json, write_whole_folder
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig
from minirlhf.ranks import ask_first, leave_to_first
from minirlhf.rlhf.kl import summed_penalty
from minirlhf.rlhf.logprobs import response_sum
from minirlhf.runs import checkpoint, hugging_face
from minirlhf.runs.config import flat, load_config, save_config
from minirlhf.runs.session import BEGAN, Session
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.reward_model import RewardModel
from minirlhf.train.rollout import Rollout
from minirlhf.tree import Tree, tree_items, tree_pack, tree_unpack

# what each stage leaves; a run has either the last one or the two before it
STAGES = {"sft": "reference", "reward_model": "reward_model", "ppo": "policy", "dpo": "policy"}
# of each stage the streams that go on from a checkpoint; the others are drawn from their beginning
GO_ON = {**dict.fromkeys(STAGES, ()), "ppo": ("prompts", "rollout", "shuffle")}
FREE = {  # what may change between two sessions; other texts and rewards are refused elsewhere
    *("device", "workers", "threads", "stages", "init", "corpus", "pairs"),
    *("reward", "reward_timeout", "halt_on"),
    *("eval_prompts", "eval_every", "checkpoint_every", "snapshots", "log"),
    *("ppo.iterations", "ppo.micro_batch_size"),
}
SAMPLES_LOGGED = 8  # replies of each iteration that go into samples.jsonl


@ask_first
def is_saved(session: Session, name: str) -> bool:
    """Does a folder of the run exist, also in the middle of being replaced?"""
    with suppress(InputError):
        return settled(session.folder / name).is_dir()
    return False


def state_of(session: Session, stage: str) -> Path:
    """The folder of its checkpoint: PPO's is kept, those of the other stages lie in it."""
    return session.folder / "checkpoint" / ("" if stage == "ppo" else stage)


@ask_first
def has_state(session: Session, stage: str) -> bool:
    """Has it a checkpoint to go on from? A first save that was interrupted leaves none in it."""
    return (state_of(session, stage) / checkpoint.STATE).exists()


def begin_stage(session: Session, stage: str) -> None:
    """Start a stage; refused where its folder was lost, and what was made from it would not fit."""
    kept, names = has_state(session, stage), session.config.order
    for later in names[names.index(stage) + kept :]:  # a policy without its state cannot go on
        if is_saved(session, STAGES[later]) or has_state(session, later):
            lost = state_of(session, stage) if stage == "ppo" else session.folder / STAGES[stage]
            raise InputError(
                f"{lost}: expected it beside what {later} made with it; found nothing in it: "
                "restore it, or train again in another folder"
            )
    if not kept:
        session.log.restart(stage)


@leave_to_first
def save_params(session: Session, name: str, params: Tree, config: GPTConfig, **scale) -> None:
    """{"transformer": ..., head: ...} as a model of transformers; `scale`: of a reward model."""
    encoding = session.tokenizer
    ids = {f"{token}_token_id": getattr(encoding, token) for token in ("bos", "eos", "pad")}
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0}
    sampling["temperature"] = session.config.ppo.temperature if name == "policy" else 1.0
    sampling["max_new_tokens"] = session.world.max_response_tokens
    # scores are read at the right end, replies are written there
    sides = {"padding_side": "right" if scale else "left", "model_max_length": config.n_ctx}
    files = hugging_face.companions(encoding, sides, ids | sampling)
    heads = {head: tree for head, tree in params.items() if head != "transformer"}
    further = {"heads": heads, "meta": ids, "scale": scale, "files": files}
    checkpoint.save_model(session.folder / name, params["transformer"], config, **further)


def load_params(session: Session, name: str, expected: GPTConfig, *heads: str) -> Tree:
    """{"transformer": ...} of the sizes and with the heads that are expected, on the device."""
    folder = session.folder / name
    transformer, config, found = ask_first(checkpoint.load_model)(folder, dtype=np.float32)
    if config != expected:
        raise InputError(f"{folder}: expected {expected}; got {config}: restore the folder")
    if found.keys() != set(heads):
        wanted, came = (", ".join(names) or "no head" for names in (heads, found))
        raise InputError(
            f"{folder}: expected {wanted} in heads.safetensors; got {came}: restore the folder"
        )
    return session.on_device({"transformer": transformer, **found})


@leave_to_first
def save_reward_model(session: Session, model: RewardModel) -> None:
    """The model; of a reward of one's own, which is none, the scale alone."""
    scale = {"score_mean": model.mean, "score_sd": model.sd}
    if session.world.reward is None:
        save_params(session, "reward_model", model.params, model.config, **scale)
    else:
        content = to_json({"reward": session.config.reward, **scale})
        write_whole_folder(session.folder / "reward_model", {"scale.json": content})


def load_reward_model(session: Session, expected: GPTConfig) -> RewardModel:
    """What `save_reward_model` wrote."""
    is_own = session.world.reward is not None
    params = {} if is_own else load_params(session, "reward_model", expected, "reward_head")
    path = session.folder / "reward_model" / ("scale.json" if is_own else "config.json")
    entries = ask_first(lambda: read_object(settled(path.parent) / path.name))()
    mean, sd = entries.get("score_mean"), entries.get("score_sd")
    numbers = isinstance(mean, float) and isinstance(sd, float)
    # `normalized` gives no smaller sd, nor a mean that far from 0
    if not (numbers and 1e-37 <= sd < float("inf") and abs(mean) <= 1e20 * sd):
        raise InputError(
            f"{path}: expected the finite numbers score_mean and score_sd > 0; got "
            f"{shorten(repr(mean))} and {shorten(repr(sd))}: restore the folder"
        )
    return RewardModel(params, expected, mean, sd)


@leave_to_first
def save_state(
    session: Session, stage: str, optimizer: Optimizer, done: int, *, reference=None, **more
) -> None:
    """What a stage goes on from, bit for bit, after `done` steps; of PPO with its kl_coef."""
    rng = {name: session.rng[name].bit_generator.state for name in GO_ON[stage]}
    meta = {"done": done, "rng": rng, "log": session.log.position(), **more}
    try:
        arrays = _arrays(session, optimizer, reference)
        checkpoint.save_state(state_of(session, stage), arrays, meta)
        session.kept = done
    except KeyboardInterrupt:  # before it was written, or after
        session.kept = _read_state(session, stage)[1]["done"] if has_state(session, stage) else 0
        raise


def load_state(
    session: Session, stage: str, optimizer: Optimizer, n_steps: int, reference: Tree | None = None
) -> tuple[int, float | None, Tree | None]:
    """(steps done, kl_coef, reference) of a stage's checkpoint; the last two are PPO's."""
    if not has_state(session, stage):
        return 0, None, reference
    found, meta = _read_state(session, stage)
    done = meta["done"]
    try:
        _check_arrays(found, _arrays(session, optimizer, reference))
        optimizer.load_state_tree(found)
        if not (done <= n_steps and optimizer.updates * n_steps == done * optimizer.total_steps):
            raise ValueError(
                f"expected the updates of at most {n_steps} steps; got {done} steps and "
                f"{optimizer.updates} updates"
            )
        _set_streams({name: session.rng[name] for name in GO_ON[stage]}, meta["rng"])
    except ValueError as error:
        raise _damaged(session, stage, str(error)) from error
    if session.stored:  # else it was opened to look
        session.log.rewind(meta["log"], stage, done - 1)
    if "reference" in found:
        reference = session.on_device(tree_unpack(found["reference"], reference))
    return done, meta.get("kl_coef"), reference


def _arrays(session: Session, optimizer: Optimizer, reference: Tree | None) -> Tree:
    """What a checkpoint holds, on the host: the optimiser's, and PPO's reference if it moves."""
    arrays = optimizer.state_tree()
    if reference and session.config.ppo.reset_reference_every:
        arrays["reference"] = to_host(tree_pack(reference)[0])
    return arrays


def last_kl_coef(session: Session) -> float:
    """beta as training left it: where it is adaptive, not the configured one."""
    if session.config.is_dpo or not has_state(session, "ppo"):
        return session.config.kl_coef
    return _read_state(session, "ppo")[1]["kl_coef"]


@ask_first
def _read_state(session: Session, stage: str) -> tuple[Tree, dict[str, Any]]:
    """The arrays of a checkpoint, and its meta, whose entries are what they should be."""
    arrays, meta = checkpoint.load_state(state_of(session, stage))
    kinds = {"done": int, "rng": dict, "log": dict} | ({"kl_coef": float} if stage == "ppo" else {})
    fits = {name: type(value) for name, value in meta.items()} == kinds
    if not (fits and meta["done"] > 0 and 0 <= meta.get("kl_coef", 0.0) < math.inf):
        came = shorten(str(meta), 120)
        raise _damaged(session, stage, f"expected {', '.join(kinds)}, none below 0; got {came}")
    return arrays, meta


def _check_arrays(arrays: Tree, like: Tree) -> None:
    """Refuse, by ValueError, arrays unlike the optimiser's, or with numbers that cannot be."""
    came, expected = (
        {path: (a.shape, str(a.dtype)) for path, a in tree_items(tree)} for tree in (arrays, like)
    )
    if came != expected:
        raise ValueError(f"expected the arrays {expected}; got {came}")
    for name, array in arrays.items():
        low = -math.inf if name in ("flat", "mean", "reference") else 0
        if not (np.isfinite(array) & (array >= low)).all():
            raise ValueError(f"expected possible numbers; {name} is not finite or below 0")


def _set_streams(rng: dict[str, Generator], states: dict[str, Any]) -> None:
    """Let each stream go on from its state; ValueError if it is of another one, or of none."""
    with suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        for name, stream in rng.items():
            stream.bit_generator.state = states[name]
        if {name: stream.bit_generator.state for name, stream in rng.items()} == states:
            return
    raise ValueError(f"expected the random streams {', '.join(rng) or 'of none'}; got others")


def _damaged(session: Session, stage: str, why: str) -> InputError:
    path = state_of(session, stage) / checkpoint.STATE
    return InputError(f"{path}: {why}: restore the file from a copy")


@leave_to_first
def settle_settings(session: Session) -> None:
    """Let those settings change that may; refuse the others, by which what is there was made.

    May change at any time: FREE. The learning rate of a stage, until the stage is finished. All
    of a stage's own, until it has begun. After a refusal nothing has changed.
    """
    path = session.folder / "config.toml"
    if load_config(path) != session.stored:
        raise InputError(
            f"{path}: expected the settings with which this began; another process has changed "
            "them: try it again"
        )
    was, now = dict(flat(load_config(session.folder / BEGAN))), dict(flat(session.config))
    changed = [name for name in now if now[name] != was[name] and name != "out"]
    finished = {stage for stage in session.config.order if is_saved(session, STAGES[stage])}
    begun = finished | {stage for stage in STAGES if has_state(session, stage)}
    longer = "ppo.iterations" in changed and "ppo" in begun
    for name in changed:
        # the score is scaled at the temperature of training
        stage = "reward_model" if name == "ppo.temperature" else name.partition(".")[0]
        goes_on = stage not in finished or (longer and stage == "ppo")
        is_rate = name.endswith(".optimizer.learning_rate")
        other_way = name == "stages" and "sft,dpo" in (was[name], now[name])
        free = name in FREE and not (other_way and begun & {"ppo", "dpo"})
        free = free or (stage in STAGES and stage not in begun) or (is_rate and goes_on)
        if not free:
            raise InputError(
                f"{path}: expected {name} = {was[name]!r}, as until now; got "
                f"{now[name]!r}: set it back, or train with `--config {path} --out NEW`",
                resume=None,
            )
    if longer:
        least, wanted = _read_state(session, "ppo")[1]["done"], now["ppo.iterations"]
        if wanted < least:
            raise InputError(
                f"--ppo.iterations: expected at least the {least} that are done; got {wanted}: "
                "choose more",
                resume=None,
            )
        session.note(f"the learning rate now follows its schedule to iteration {wanted}")
        (session.folder / "result.json").unlink(missing_ok=True)  # of a policy that goes on
    for name in {"device", "workers", "threads", "ppo.micro_batch_size"} & set(changed):
        session.note(f"{name} is {now[name]} now: sums are rounded otherwise from here on")
    if edited := [f"{n} {was[n]!r} -> {now[n]!r}" for n in changed if n != "stages"]:
        session.note(f"{path}: {', '.join(edited)} from here on")
    for name in ("config.toml", BEGAN) if changed else ():
        save_config(session.folder / name, session.config)


def sample_rows(session: Session, rollout: Rollout) -> list[dict[str, Any]]:
    """The first samples with score and kl_seq [nats], and what `diagnose` holds them against."""
    samples, mask = rollout.samples, rollout.batch.response_mask
    kl_seq = summed_penalty(rollout.old_logp, rollout.ref_logp, mask=mask)
    columns = {"prompt": samples.prompts, "response": samples.responses}
    columns |= {"score": to_host(rollout.score), "kl_seq": to_host(kl_seq)}
    columns["ref_logp_seq"] = to_host(response_sum(rollout.ref_logp, mask=mask))
    columns["tokens"] = to_host(mask.sum(axis=1)).astype(int)
    columns["ids"] = samples.response_ids
    if session.world.gold is not None:
        columns["gold"] = session.world.golds(samples.prompts, samples.responses)
    rows = list(zip(*columns.values(), strict=True))[:SAMPLES_LOGGED]
    return [dict(zip(columns, row, strict=True)) for row in rows]
