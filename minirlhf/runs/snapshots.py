"""What each token of a reply pays; and snapshots.jsonl, the same prompts at moments of PPO.

A snapshot is a few replies of the policy as it is then, always to the first held-out prompts and
with the same coins: what differs from one to the next is the policy.
"""

from typing import Any

import numpy as np

from minirlhf.backend import to_host
from minirlhf.disk import write_whole
from minirlhf.ranks import leave_to_first
from minirlhf.rlhf.advantages import gae, token_rewards
from minirlhf.rlhf.kl import summed_penalty
from minirlhf.runs.log import jsonl, read_jsonl
from minirlhf.runs.metrics import OTHER_COINS
from minirlhf.runs.session import Session
from minirlhf.train.policy import policy_forward
from minirlhf.train.ppo import final_score, rollout_penalty
from minirlhf.train.rollout import Samples, Scorer, score_rollout
from minirlhf.tree import Tree

PROMPTS, LIKELIEST = 4, 5


def token_rows(
    session: Session, policy: Tree, reference: Tree, samples: Samples, *, scores, kl_coef: float
) -> list[dict[str, Any]]:
    """What each reply of `samples` pays: a dict each, of `app.api.TokenScores`'s fields.

    reward_token      -beta times what kl_mode takes off the reward of each token, and the score on
                      the last token; None without a score
    value, advantage  None without a value head; advantage, of GAE, also without a score

    Args:     scores: (B,) normalised; None where there is no reward yet.
    """
    settings = session.config.ppo
    same = {"config": session.gpt, "settings": settings}
    judged = scores is not None
    known = scores if judged else np.zeros(len(samples.response_ids))
    rollout = score_rollout(policy, reference, samples, score=lambda _: known, **same)
    mask, values, has_critic = rollout.batch.response_mask, rollout.values, "value_head" in policy
    final = final_score(rollout, settings=settings, stop_id=session.tokenizer.eos)
    penalty = rollout_penalty(rollout, settings)
    rewards = token_rewards(final, penalty, mask=mask, kl_coef=kl_coef)
    advantages, _ = gae(rewards, values, mask=mask, gamma=settings.gamma, lam=settings.lam)
    arrays = {"logp": rollout.old_logp, "ref_logp": rollout.ref_logp, "entropy": rollout.entropy}
    arrays["value"] = values if has_critic else None
    arrays["reward_token"] = rewards if judged else None
    arrays["advantage"] = advantages if judged and has_critic else None
    arrays = {name: a if a is None else to_host(a).astype(np.float64) for name, a in arrays.items()}
    kl_seq = summed_penalty(arrays["logp"], arrays["ref_logp"], mask=to_host(mask))
    heads = {"top": policy, "ref_top": reference}
    likeliest = {name: _likeliest(session, params, samples) for name, params in heads.items()}
    rows = []
    for i, (prompt, response) in enumerate(zip(samples.prompts, samples.responses, strict=True)):
        ids = [int(token) for token in samples.response_ids[i]]
        row = {"prompt": prompt, "response": response}
        row |= {"pieces": session.tokenizer.pieces(ids), "ids": ids}
        for name, array in arrays.items():
            row[name] = None if array is None else array[i, : len(ids)]
        row |= {name: tops[i][: len(ids)] for name, tops in likeliest.items()}
        row["kl_seq"] = float(kl_seq[i])
        row["score"] = float(known[i]) if judged else None
        row["gold"] = session.world.gold_or_none(prompt, response)
        rows.append(row | {"kl_coef": float(kl_coef)})
    return rows


def _likeliest(session: Session, params: Tree, samples: Samples) -> list[list[list]]:
    """(B, T, 5) [piece, probability], the likeliest first."""
    temperature = session.config.ppo.temperature
    same = {"batch": samples.batch, "config": session.gpt, "keep": False}
    logits = to_host(policy_forward(params, **same)[0].logits) / temperature  # (B, T, V)
    rows = []
    for z in logits:  # a reply at a time: of a large vocabulary a copy counts
        ids = np.argpartition(-z, range(LIKELIEST), axis=-1)[:, :LIKELIEST]  # each in its place
        best = np.take_along_axis(z, ids, axis=-1)
        p = np.exp(best - best[:, :1]) / np.exp(z - best[:, :1]).sum(axis=-1, keepdims=True)
        shares = p.astype(np.float64).round(4).tolist()
        tops = zip(map(session.tokenizer.pieces, ids), shares, strict=True)
        rows.append([list(map(list, zip(*top, strict=True))) for top in tops])
    return rows


def moments(session: Session) -> set[int]:
    """After how many iterations of PPO a snapshot is taken: at the beginning, and N times."""
    n, total = session.config.snapshots, session.config.ppo.iterations
    return {round(i * total / n) for i in range(n + 1)} if n else set()


def take_snapshot(
    session: Session, policy: Tree, reference: Tree, *, score: Scorer, done: int, kl_coef: float
) -> None:
    """Add the replies after `done` iterations; what is there of later ones is made again."""
    prompts = session.world.heldout_prompts[:PROMPTS]
    samples = session.fresh_samples(policy, prompts, session.config.seed + OTHER_COINS)
    rows = token_rows(session, policy, reference, samples, scores=score(samples), kl_coef=kl_coef)
    _keep(session, rows, done)


@leave_to_first
def _keep(session: Session, rows: list[dict[str, Any]], done: int) -> None:
    path = session.folder / "snapshots.jsonl"
    before = read_jsonl(path, {"step": int}) if path.exists() else []
    kept = [row for row in before if row["step"] < done]
    write_whole(path, jsonl(kept + [{"step": done, **row} for row in rows]))
