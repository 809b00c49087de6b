"""What a run leaves in its folder: writing it, reading it back, refusing what does not fit.

config.toml                      what was asked for, resolved
world.json                       limits, and the digest of the texts that it trains on
tiktoken.json                    the encoding
reference/ reward_model/ policy/ models of transformers with their tokenizer
checkpoint/                      the state of PPO, to go on from bit for bit
metrics.jsonl samples.jsonl      one object a step
result.json                      the final table
"""

from contextlib import suppress
from typing import Any

import numpy as np

from minirlhf.backend import to_host
from minirlhf.disk import read_object, settled, to_json, write_whole_folder
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.kl import summed_penalty
from minirlhf.runs import checkpoint, hugging_face
from minirlhf.runs.evaluate import gold_of
from minirlhf.runs.session import Session
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.reward_model import RewardModel
from minirlhf.train.rollout import Rollout
from minirlhf.tree import Tree

# what the stages leave, in this order -> the stage's name in the log
STAGES = {"reference": "sft", "reward_model": "reward_model", "checkpoint": "ppo", "policy": "ppo"}
SAMPLES_LOGGED = 8  # replies of each iteration that go into samples.jsonl


def is_saved(session: Session, name: str) -> bool:
    """Does a folder of the run exist, also in the middle of being replaced?"""
    with suppress(InputError):
        return settled(session.folder / name).is_dir()
    return False


def begin_stage(session: Session, name: str) -> None:
    """Start the stage that makes a folder, which does not exist yet, with an empty log of its own.

    Raises:   InputError: a later folder exists. So this stage was once finished and its folder has
                  been lost: to run it again would not fit what was made from it.
    """
    made = list(STAGES)
    for later in made[made.index(name) + 1 :]:
        if is_saved(session, later):
            raise InputError(
                f"{session.folder / name}: expected it beside {session.folder / later}, which was "
                "made with it; found nothing in it: restore it, or train again in another folder"
            )
    session.log.restart(STAGES[name])


def save_params(
    session: Session, name: str, params: Tree, config: GPTConfig, **scale: float
) -> None:
    """{"transformer": ..., head: ...} as a model of transformers, with its tokenizer.

    Args:     scale: score_mean and score_sd of a reward model; they stand in config.json too.
    """
    encoding = session.tokenizer
    ids = {f"{token}_token_id": getattr(encoding, token) for token in ("bos", "eos", "pad")}
    heads = {head: tree for head, tree in params.items() if head != "transformer"}
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0}
    sampling["temperature"] = session.config.ppo.temperature if name == "policy" else 1.0
    sampling["max_new_tokens"] = session.max_response_tokens
    # scores are read at the right end, replies are written there
    sides = {"padding_side": "right" if scale else "left", "model_max_length": config.n_ctx}
    files = hugging_face.companions(encoding, sides, ids | sampling)
    further = {"heads": heads, "meta": ids, "scale": scale, "files": files}
    checkpoint.save_model(session.folder / name, params["transformer"], config, **further)


def load_params(session: Session, name: str, expected: GPTConfig, *heads: str) -> Tree:
    """{"transformer": ...} and the heads that should be there, on the device.

    Raises:   InputError: the model has other sizes or other heads, or its files are damaged.
    """
    folder = session.folder / name
    transformer, config, found = checkpoint.load_model(folder, dtype=np.float32)
    if config != expected:
        raise InputError(f"{folder}: expected {expected}; got {config}: restore the folder")
    if found.keys() != set(heads):
        wanted, came = (", ".join(names) or "no head" for names in (heads, found))
        raise InputError(
            f"{folder}: expected {wanted} in heads.safetensors; got {came}: restore the folder"
        )
    return session.on_device({"transformer": transformer, **found})


def save_reward_model(session: Session, model: RewardModel) -> None:
    """The model; of a reward of one's own, which is no model, the scale alone."""
    scale = {"score_mean": model.mean, "score_sd": model.sd}
    if session.world.reward is None:
        save_params(session, "reward_model", model.params, model.config, **scale)
    else:
        content = to_json({"reward": session.config.reward, **scale})
        write_whole_folder(session.folder / "reward_model", {"scale.json": content})


def load_reward_model(session: Session, expected: GPTConfig) -> RewardModel:
    """What `save_reward_model` wrote."""
    params, scale_in = {}, "scale.json"
    if session.world.reward is None:
        params = load_params(session, "reward_model", expected, "reward_head")
        scale_in = "config.json"
    path = settled(session.folder / "reward_model") / scale_in
    entries = read_object(path)
    mean, sd = entries.get("score_mean"), entries.get("score_sd")
    if not (isinstance(mean, float) and isinstance(sd, float) and sd > 0):
        raise InputError(
            f"{path}: expected the numbers score_mean and score_sd > 0; got {mean!r} and {sd!r}: "
            "restore the folder"
        )
    return RewardModel(params, expected, mean, sd)


def save_ppo_state(session: Session, optimizer: Optimizer, done: int, kl_coef: float) -> None:
    """What PPO goes on from, bit for bit, after `done` iterations."""
    streams = ("prompts", "rollout", "shuffle")
    rng = {name: session.rng[name].bit_generator.state for name in streams}
    log = session.log.position()
    meta = {"iterations_done": done, "kl_coef": kl_coef, "rng": rng, "log": log}
    checkpoint.save_state(session.folder / "checkpoint", optimizer.state_tree(), meta)


def load_ppo_state(session: Session, optimizer: Optimizer) -> tuple[int, float]:
    """(iterations done, kl_coef): those of the checkpoint, or the start's."""
    folder = session.folder / "checkpoint"
    if not checkpoint.has_state(folder):
        begin_stage(session, "checkpoint")
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


def last_kl_coef(session: Session) -> float:
    """beta as training left it: where it is adaptive, not the configured one."""
    folder, configured = session.folder / "checkpoint", session.config.ppo.kl_coef
    if not checkpoint.has_state(folder):
        return configured
    return checkpoint.load_state(folder)[1].get("kl_coef", configured)


def sample_rows(session: Session, rollout: Rollout) -> list[dict[str, Any]]:
    """The first samples with the two numbers of the objective: score and kl_seq [nats]."""
    samples = rollout.samples
    kl_seq = summed_penalty(rollout.old_logp, rollout.ref_logp, mask=rollout.batch.response_mask)
    columns = {"prompt": samples.prompts, "response": samples.responses}
    columns |= {"score": to_host(rollout.score), "kl_seq": to_host(kl_seq)}
    if session.world.gold is not None:
        columns["gold"] = gold_of(samples, session.world)
    rows = list(zip(*columns.values(), strict=True))[:SAMPLES_LOGGED]
    return [dict(zip(columns, row, strict=True)) for row in rows]
