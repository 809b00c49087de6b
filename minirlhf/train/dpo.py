"""DPO: the policy learns from pairs alone, in the place of stages 2 and 3. Nothing is sampled.

The policy is its own reward model: beta (log pi - log pi_ref) of a reply stands where the score
would. Of a ranked list the best and the worst reply are the pair.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.random import Generator

from minirlhf.backend import Array, get_xp, to_host
from minirlhf.fields import check_fields
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.logprobs import response_sum
from minirlhf.rlhf.preferences import BradleyTerryCache, dpo_backward, dpo_forward
from minirlhf.train.batches import micro_batches, pad_batch
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.policy import policy_backward, policy_forward
from minirlhf.train.reward_model import Pair, pairs_loss_and_gradients, shuffled
from minirlhf.train.settings import OptimizerConfig
from minirlhf.tree import Tree
from minirlhf.workers import map_over


@dataclass(frozen=True)
class DPOConfig:
    """DPO: the policy from pairs, in the place of reward model and PPO."""

    kl_coef: float = 0.5  # beta [units of the judge's reward per nat]
    # DPO's -log sigma, or IPO's squared distance of a pair's log-ratios from 1 / (2 beta)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0  # Share of labels assumed to be flipped [0 to below 0.5]: cDPO
    epochs: int = 2  # Passes over the pairs
    batch_size: int = 64  # Pairs an update
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup=10, eps=1e-8)

    def __post_init__(self):
        counts, shares = ("epochs", "batch_size"), ("label_smoothing",)
        check_fields(self, "dpo.", at_least_1=counts, above_0=("kl_coef",), below_half=shares)


def train_dpo(
    optimizer: Optimizer, pairs: list[Pair], *, settings: DPOConfig, rng: Generator, **same: Any
) -> Iterator[dict[str, float]]:
    """The loop: epochs over the pairs in a new order each. Arguments as of `train_reward_model`.

    Args:     optimizer: of a copy of the reference.
              pairs: `with_reference`, which never moves.
              same: config, pad_id, device.
    Yields:
        `dpo_metrics` of each update's pairs, grad_norm and lr.
    Raises:   InputError: there are no pairs.
              NonFiniteError: the loss diverged.
    """
    same |= {"settings": settings, "micro_batch": dpo_micro_batch}
    for some in shuffled(pairs, settings, rng=rng, done=optimizer.updates):
        metrics, gradients = pairs_loss_and_gradients(optimizer.params, some, **same)
        yield metrics | optimizer.step(gradients, loss=metrics["loss/dpo"])


def dpo_micro_batch(
    params: Tree, part: tuple[list[Pair], float], *, settings: DPOConfig, **same: Any
) -> Tree:
    """Metrics, the loss among them, and gradients of some pairs, times their share of all."""
    pairs, share = part
    seq_logp, (cache, mask) = _forward(params, pairs, **same)
    metrics, loss_cache = dpo_metrics(seq_logp, pairs, settings)
    dseq_logp = get_xp(seq_logp).concatenate(dpo_backward(share, loss_cache))
    dlogp = dseq_logp[:, None] * mask  # log Pr(y|x) is the sum over the tokens
    metrics = {name: share * x for name, x in metrics.items()}
    return {"metrics": metrics, "gradients": policy_backward(None, dlogp, None, cache)}


def dpo_metrics(
    logp: Array, pairs: list[Pair], settings: DPOConfig
) -> tuple[dict[str, Array], BradleyTerryCache]:
    """The loss of pairs and their implicit rewards beta (log pi - log pi_ref), by TRL's names.

    Args:     logp: (2, B) log Pr(y|x) of the chosen and of the rejected replies [nats].
    Returns:  metrics, the cache of `dpo_forward`.
    """
    ref_logp = get_xp(logp).array([p.ref_logp for p in pairs], dtype=logp.dtype).T  # (2, B)
    of_loss = {name: getattr(settings, name) for name in ("kl_coef", "loss", "label_smoothing")}
    loss, cache = dpo_forward(*(logp - ref_logp), **of_loss)
    chosen, rejected = settings.kl_coef * (logp - ref_logp)
    metrics = {
        "loss/dpo": loss,
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": logp[0].mean(),
        "logps/rejected": logp[1].mean(),
    }
    return metrics, cache


def with_reference(pairs: list[Pair], reference: Tree, **same: Any) -> list[Pair]:
    """The pairs, of lists the best and the worst, with what the reference says of them."""
    logps = reply_logps(reference, pairs, **same).T.tolist() if pairs else []
    return [
        Pair(p.prompt, (p.replies[0], p.replies[-1]), tuple(logp))
        for p, logp in zip(pairs, logps, strict=True)
    ]


def reply_logps(params: Tree, pairs: list[Pair], *, config: GPTConfig, **padding: Any) -> Array:
    """log Pr(y|x) of the best and, in a second row, of the worst replies: (2, B) on the host."""
    lengths = [2 * (len(p.prompt) + max(map(len, p.replies))) for p in pairs]
    groups = micro_batches(lengths, config=config, device=padding.get("device", "cpu"))
    f = functools.partial(_forward, params, config=config, keep=False, **padding)
    found = map_over(f, [[pairs[i] for i in rows] for rows in groups])
    logps = np.concatenate([to_host(seq_logp) for seq_logp, _ in found], axis=1)
    return logps[:, np.argsort(np.concatenate(groups))]


def _forward(
    params: Tree, pairs: list[Pair], *, config: GPTConfig, keep: bool = True, **padding: Any
) -> tuple[Array, tuple]:
    replies = [p.replies[0] for p in pairs] + [p.replies[-1] for p in pairs]
    batch = pad_batch([p.prompt for p in pairs] * 2, replies, config=config, **padding)
    out, cache = policy_forward(params, batch=batch, config=config, keep=keep, keep_logits=False)
    seq_logp = response_sum(out.logp, mask=batch.response_mask)
    return seq_logp.reshape(2, -1), (cache, batch.response_mask)
