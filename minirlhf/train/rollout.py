"""One batch of experience: sampled responses, scored with policy, reference and reward."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minirlhf.backend import Array, get_xp
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.kl import KL_MODES, full_kl_forward
from minirlhf.rlhf.logprobs import by_columns, entropy_forward
from minirlhf.train.batches import Batch, Ids
from minirlhf.train.policy import policy_forward
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import Tree
from minirlhf.workers import map_over


class Samples(NamedTuple):
    """Responses to prompts."""

    prompt_ids: list[Ids]
    response_ids: list[Ids]  # with the stop token if the response reached it
    batch: Batch
    hidden: Array | None = None  # (B, T, C) what the heads of the policy that drew them read
    prompts: list[str] | tuple = ()  # the same as text, where there is a text
    responses: list[str] | tuple = ()
    sampler_logp: Array | None = None  # (B, T) [nats] of who drew them, where not the policy


Scorer = Callable[[Samples], np.ndarray]  # (B,) normalised scores on the host


class Rollout(NamedTuple):
    """What PPO learns from; arrays (B, T) over response tokens, constants from here on."""

    samples: Samples
    old_logp: Array  # log pi_old [nats]
    ref_logp: Array  # log pi_ref [nats]
    ref_logits: Array | None  # (B, T, V), only where the loss needs the whole distribution
    values: Array  # V(x, y_<t) [reward units]; 0 of a policy without a value head
    entropy: Array  # of pi_old [nats]
    kl_full: Array  # KL(pi_old(.|s_t) || pi_ref(.|s_t)) over the whole vocabulary [nats]
    score: Array  # (B,) normalised reward of the whole response

    @property
    def batch(self) -> Batch:
        return self.samples.batch


def score_rollout(
    policy: Tree,
    reference: Tree,
    samples: Samples,
    *,
    score: Scorer,
    config: GPTConfig,
    settings: PPOConfig,
) -> Rollout:
    """Log-probs under old and ref, values, entropy and score of sampled responses.

    The policy's hidden states are those of the sampler, if the samples bring them: only its heads
    are computed again. The KV cache rounds otherwise than the training forward, so the ratio of the
    first update is 1 up to rounding; without hidden states, and with minibatches of the same
    shapes, it is exactly 1.

    Args:     policy: {"transformer": ..., "value_head": ...}; without a value head values are 0.
              reference: {"transformer": ...}, a frozen copy.
              settings: the temperature, the size of a micro-batch, and whether `kl_mode` needs the
                  reference's whole distributions.
    """
    batch, hidden = samples.batch, samples.hidden
    xp, groups = get_xp(batch.mask), batch.groups(size=settings.micro_batch_size, config=config)
    f = functools.partial(_score_part, policy, reference, config=config, settings=settings)
    parts = map_over(
        f, [(batch.part(rows), None if hidden is None else hidden[rows]) for rows in groups]
    )
    arrays = {
        name: xp.zeros((*batch.responses.shape, *array.shape[2:]), dtype=array.dtype)
        for name, array in parts[0].items()
    }
    for rows, part in zip(groups, parts, strict=True):
        for name, array in part.items():
            arrays[name][rows, : array.shape[1]] = array  # a part may have fewer columns
    scores = xp.asarray(score(samples).astype(arrays["values"].dtype))
    ref_logits = arrays.pop("ref_logits", None)
    return Rollout(samples=samples, score=scores, ref_logits=ref_logits, **arrays)


def _score_part(
    policy: Tree,
    reference: Tree,
    part: tuple[Batch, Array | None],
    *,
    config: GPTConfig,
    settings: PPOConfig,
) -> dict[str, Array]:
    """The arrays of a Rollout, but for the score, of some of its rows."""
    batch, hidden = part
    tau = settings.temperature
    same = {"batch": batch, "config": config, "temperature": tau, "keep": False}
    old, _ = policy_forward(policy, hidden=hidden, **same)
    ref, _ = policy_forward(reference, **same)
    arrays = {"old_logp": old.logp, "ref_logp": ref.logp}
    arrays["values"] = 0.0 * old.logp if old.values is None else old.values
    arrays["entropy"] = by_columns(lambda z: entropy_forward(z, temperature=tau)[0], old.logits)
    arrays["kl_full"] = by_columns(
        lambda z, ref_z: full_kl_forward(z, ref_logits=ref_z, temperature=tau)[0],
        old.logits,
        ref.logits,
    )
    if KL_MODES[settings.kl_mode].needs_ref_logits:
        arrays["ref_logits"] = ref.logits
    return arrays
