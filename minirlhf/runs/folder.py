"""What a run leaves in its folder: writing it, reading it back, refusing what does not fit."""

import json
from pathlib import Path
from typing import Any

from minirlhf.backend import to_host
from minirlhf.disk import parse_object, read_text, settled, write_whole
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.kl import summed_penalty
from minirlhf.runs import checkpoint
from minirlhf.runs.session import Session
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.reward_model import RewardModel
from minirlhf.train.rollout import Rollout
from minirlhf.tree import Tree

SAMPLES_LOGGED = 8  # replies of each iteration that go into samples.jsonl


def last_kl_coef(session: Session) -> float:
    """beta as training left it: where it is adaptive, not the configured one."""
    folder = session.folder / "checkpoint"
    if not checkpoint.has_state(folder):
        return session.config.ppo.kl_coef
    return checkpoint.load_state(folder)[1].get("kl_coef", session.config.ppo.kl_coef)


def begin_stage(session: Session, stage: str, folder: Path, *, before: tuple[str, ...]) -> None:
    """Start a stage whose `folder` does not exist yet, with an empty log of its own.

    Args:
        before: folders of later stages. If one of them exists, this stage was once finished and
            its folder has been lost: to run it again would not fit what was made from it.
    Raises:
        InputError: one of the folders `before` exists.
    """
    for name in before:
        if is_saved(session.folder / name):
            raise InputError(
                f"{folder}: expected it beside {session.folder / name}, which was made with it; "
                "found nothing in it: restore it, or train again in another folder"
            )
    session.log.restart(stage)


def save_ppo_state(session: Session, optimizer: Optimizer, done: int, kl_coef: float) -> None:
    meta = {
        "iterations_done": done,
        "kl_coef": kl_coef,
        "rng": {
            name: session.rng[name].bit_generator.state
            for name in ("prompts", "rollout", "shuffle")
        },
        "log": session.log.position(),
    }
    checkpoint.save_state(session.folder / "checkpoint", optimizer.state_tree(), meta)


def load_ppo_state(session: Session, optimizer: Optimizer) -> tuple[int, float]:
    """(iterations done, kl_coef): those of the checkpoint, or the start's."""
    folder = session.folder / "checkpoint"
    if not checkpoint.has_state(folder):
        begin_stage(session, "ppo", folder, before=("policy",))
        return 0, session.config.ppo.kl_coef
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
        session.rng[name].bit_generator.state = state
    session.log.rewind(meta["log"])
    return meta["iterations_done"], meta["kl_coef"]


def save_reward_model(session: Session, folder: Path, model: RewardModel) -> None:
    scale = {"score_mean": model.mean, "score_sd": model.sd}
    if session.world.reward is not None:
        text = json.dumps({"reward": session.config.reward, **scale}, indent=2) + "\n"
        write_whole(folder / "scale.json", text.encode())
        return
    checkpoint.save_model(
        folder,
        model.params["transformer"],
        model.config,
        heads={"reward_head": model.params["reward_head"]},
        meta={**token_meta(session), **scale},
    )


def load_reward_model(session: Session, folder: Path, expected: GPTConfig) -> RewardModel:
    if session.world.reward is not None:
        path = folder / "scale.json"
        return RewardModel({}, expected, *_scale(parse_object(read_text(path), str(path)), path))
    transformer, gpt, heads = checkpoint.load_model(folder)
    check_same_model(folder, gpt, expected)
    head = stored_head(heads, "reward_head", folder)
    params = session.on_device({"transformer": transformer, "reward_head": head})
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


def check_same_model(folder: Path, got: GPTConfig, expected: GPTConfig) -> None:
    if got != expected:
        raise InputError(f"{folder}: expected {expected}; got {got}: restore the folder")


def stored_head(heads: dict[str, Tree], name: str, folder: Path) -> Tree:
    if name not in heads:
        raise InputError(
            f"{folder}: expected the tensors of a {name} in heads.safetensors; found none: "
            "restore the folder"
        )
    return heads[name]


def is_saved(folder: Path) -> bool:
    """Does a folder that is written whole exist, also in the middle of being replaced?"""
    try:
        settled(folder)
    except InputError:
        return False
    return True


def token_meta(session: Session) -> dict[str, int]:
    t = session.tokenizer
    return {"bos_token_id": t.bos, "eos_token_id": t.eos, "pad_token_id": t.pad}


def sample_rows(session: Session, rollout: Rollout) -> list[dict[str, Any]]:
    """The first samples with the two numbers of the objective: score and kl_seq [nats]."""
    samples = rollout.samples
    kl_seq = summed_penalty(rollout.old_logp, rollout.ref_logp, mask=rollout.batch.response_mask)
    columns = (samples.prompts, samples.responses, to_host(rollout.score), to_host(kl_seq))
    rows = []
    for prompt, response, score, kl in list(zip(*columns, strict=True))[:SAMPLES_LOGGED]:
        row = {"prompt": prompt, "response": response, "score": score, "kl_seq": kl}
        if session.world.gold is not None:
            row["gold"] = float(session.world.gold(prompt, response))
        rows.append(row)
    return rows
