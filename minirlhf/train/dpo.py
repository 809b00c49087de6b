"""DPO: the policy learns from pairs alone, in the place of stages 2 and 3. Nothing is sampled.

The policy is its own reward model: beta (log pi - log pi_ref) of a reply stands where the score
would. Of a ranked list the best and the worst reply are the pair.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from minirlhf.backend import Array, get_xp, to_host
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.logprobs import sequence_logprob_backward, sequence_logprob_forward
from minirlhf.rlhf.preferences import BradleyTerryCache, dpo_backward, dpo_forward
from minirlhf.train.batches import micro_batches, pad_batch
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.policy import policy_backward, policy_forward
from minirlhf.train.reward_model import Pair, shuffled
from minirlhf.train.settings import DPOConfig
from minirlhf.tree import Tree
from minirlhf.workers import map_over, sum_over


def train_dpo(
    optimizer: Optimizer,
    reference: Tree,
    pairs: list[Pair],
    *,
    config: GPTConfig,
    settings: DPOConfig,
    rng: np.random.Generator,
    **padding: Any,
) -> Iterator[dict[str, float]]:
    """The loop: epochs over the pairs in a new order each, against a reference that never moves.

    Args:     optimizer: of a copy of the reference; made for `reward_model.n_updates` updates.
                  After a resume it says how many have been made.
              rng: of the orders, at its beginning also after a resume.
              padding: pad_id, and device if it is none of the CPU.
    Yields:
        `dpo_metrics` of each update's pairs, grad_norm and lr.
    Raises:   InputError: there are no pairs.
              NonFiniteError: the loss diverged.
    """
    orders = shuffled(len(pairs), settings, rng=rng, done=optimizer.updates)
    ref_logp = reply_logps(reference, pairs, config=config, **padding)
    for chosen in orders:
        part = [pairs[i] for i in chosen], ref_logp[:, chosen]
        metrics, gradients = dpo_loss_and_gradients(
            optimizer.params, *part, config=config, settings=settings, **padding
        )
        yield metrics | optimizer.step(gradients, loss=metrics["loss/dpo"])


def dpo_loss_and_gradients(
    params: Tree, pairs: list[Pair], ref_logp: np.ndarray, *, settings: DPOConfig, **same: Any
) -> tuple[dict[str, float], Tree]:
    """Metrics of the pairs, the loss among them, and its gradient: sums over micro-batches.

    Args:     ref_logp: (2, B) `reply_logps` of the reference [nats].
              same: config, and padding as of `train_dpo`.
    """
    parts = [
        ([pairs[i] for i in rows], ref_logp[:, rows], len(rows) / len(pairs))
        for rows in _groups(pairs, **same)
    ]
    total = sum_over(functools.partial(_micro_batch, params, settings=settings, **same), parts)
    return {name: float(x) for name, x in total["metrics"].items()}, total["gradients"]


def _micro_batch(
    params: Tree, part: tuple[list[Pair], np.ndarray, float], *, settings: DPOConfig, **same: Any
) -> Tree:
    """Metrics and gradients of some pairs, times their share of all."""
    pairs, ref_logp, share = part
    seq_logp, (cache, seq_cache) = _forward(params, pairs, **same)
    xp = get_xp(seq_logp)
    metrics, loss_cache = dpo_metrics(seq_logp, xp.asarray(ref_logp), settings)
    dseq_logp = xp.concatenate(dpo_backward(share, loss_cache))
    dlogp = sequence_logprob_backward(dseq_logp, seq_cache)
    metrics = {name: share * x for name, x in metrics.items()}
    return {"metrics": metrics, "gradients": policy_backward(None, dlogp, None, cache)}


def dpo_metrics(
    logp: Array, ref_logp: Array, settings: DPOConfig
) -> tuple[dict[str, Array], BradleyTerryCache]:
    """The loss of pairs and their implicit rewards beta (log pi - log pi_ref), by TRL's names.

    Args:     logp, ref_logp: (2, B) of the chosen and of the rejected replies [nats].
    Returns:  metrics, the cache of `dpo_forward`.
    """
    of_loss = {"loss": settings.loss, "label_smoothing": settings.label_smoothing}
    loss, cache = dpo_forward(*(logp - ref_logp), kl_coef=settings.kl_coef, **of_loss)
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


def reply_logps(params: Tree, pairs: list[Pair], **same: Any) -> np.ndarray:
    """log Pr(y|x) of the chosen and of the rejected replies: (2, B) on the host [nats]."""
    groups = _groups(pairs, **same)
    f = functools.partial(_reply_logps, params, **same)
    logps = map_over(f, [[pairs[i] for i in rows] for rows in groups])
    return np.concatenate(logps, axis=1)[:, np.argsort(np.concatenate(groups))]


def _reply_logps(params: Tree, pairs: list[Pair], **same: Any) -> np.ndarray:
    return to_host(_forward(params, pairs, keep=False, **same)[0])


def _forward(
    params: Tree, pairs: list[Pair], *, config: GPTConfig, keep: bool = True, **padding: Any
) -> tuple[Array, tuple]:
    """log Pr(y|x) of the chosen replies and, in a second row, of the rejected ones; caches."""
    replies = [p.replies[0] for p in pairs] + [p.replies[-1] for p in pairs]
    batch = pad_batch([p.prompt for p in pairs] * 2, replies, config=config, **padding)
    out, cache = policy_forward(params, batch=batch, config=config, keep=keep)
    seq_logp, seq_cache = sequence_logprob_forward(out.logp, mask=batch.response_mask)
    return seq_logp.reshape(2, -1), (cache, seq_cache)


def _groups(pairs: list[Pair], *, config: GPTConfig, device="cpu", **_: Any) -> list[np.ndarray]:
    lengths = [2 * (len(p.prompt) + max(map(len, p.replies))) for p in pairs]
    return micro_batches(lengths, config=config, device=device)
