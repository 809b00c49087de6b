"""What a policy is worth on held-out prompts, in numbers a person can compare."""

import dataclasses
import math
from itertools import cycle, islice

import numpy as np

from minirlhf.backend import to_host
from minirlhf.nn.sampling import Sampling
from minirlhf.runs.metrics import distinct_2, repeated_bigram_share
from minirlhf.runs.session import Score, Session
from minirlhf.train.rollout import Rollout, Samples, score_rollout
from minirlhf.tree import Tree
from minirlhf.worlds.world import World


def response_metrics(
    rollout: Rollout, *, world: World, stop_id: int, score_mean: float = 0.0, score_sd: float = 1.0
) -> dict[str, float]:
    """The columns of the final table, means over responses; README.md says what they are."""
    samples = rollout.samples
    mask = to_host(rollout.batch.response_mask) > 0
    log_ratio = to_host(rollout.old_logp - rollout.ref_logp).astype(np.float64)
    full = to_host(rollout.kl_full).astype(np.float64)
    plain = [[i for i in ids if i != stop_id] for ids in samples.response_ids]
    proxy = float(to_host(rollout.score).astype(np.float64).mean())
    return {
        "proxy": proxy,
        "gold": float(np.mean(gold_of(samples, world))) if world.gold else math.nan,
        "reward": proxy * score_sd + score_mean if world.reward else math.nan,
        "kl_seq": float(np.where(mask, log_ratio, 0.0).sum(axis=1).mean()),
        "kl_full_seq": float(np.where(mask, full, 0.0).sum(axis=1).mean()),
        "entropy": float(to_host(rollout.entropy)[mask].mean()),
        "length": float(mask.sum(axis=1).mean()),
        "distinct_2": distinct_2(plain),
        "repeated_bigrams": float(np.mean([repeated_bigram_share(ids) for ids in plain])),
        "ended": float(np.mean([stop_id in ids for ids in samples.response_ids])),
    }


def gold_of(samples: Samples, world: World) -> list[float]:
    """The world's true reward of every response."""
    pairs = zip(samples.prompts, samples.responses, strict=True)
    return [float(world.gold(prompt, response)) for prompt, response in pairs]


def evaluate(
    session: Session, policy: Tree, reference: Tree, score: Score
) -> tuple[dict[str, float], Samples]:
    """Held-out metrics, one response a prompt, always with the same coins: two calls compare."""
    config = session.config
    prompts = list(islice(cycle(session.world.heldout_prompts), config.eval_prompts))
    rng = np.random.default_rng(config.seed + 1_000_003)  # no stream of the training
    settings = dataclasses.replace(config.ppo, kl_mode="reward_k1")  # keeps no whole distributions
    samples = session.sample(policy, prompts, rng, Sampling(settings.temperature))
    samples = samples._replace(hidden=None)  # scored anew: a policy's KL to itself is exactly 0
    rollout = score_rollout(
        policy, reference, samples, score=score, config=session.gpt, settings=settings
    )
    scale = {"score_mean": score.model.mean, "score_sd": score.model.sd}
    stop_id = session.tokenizer.eos
    return response_metrics(rollout, world=session.world, stop_id=stop_id, **scale), samples
