"""Responses of a policy to prompts; and of a sampler that is not quite the policy."""

from collections.abc import Callable

import numpy as np

from minirlhf.backend import Array, get_xp, to_host
from minirlhf.nn.sampling import Sampling, generate
from minirlhf.nn.transformer import GPTConfig
from minirlhf.train.batches import Batch, Ids, pad_batch
from minirlhf.train.policy import policy_forward
from minirlhf.train.rollout import Samples
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import Tree, tree_map


def sample_responses(
    params: Tree,
    prompts: list[Ids],
    *,
    config: GPTConfig,
    stop_id: int,
    pad_id: int,
    max_tokens: int,
    rng: np.random.Generator,
    sampling: Sampling = Sampling(),
    device: str = "cpu",
) -> Samples:
    """y ~ pi(. | x) for every prompt, until the stop token or max_tokens.

    PPO samples with top_k 0 and top_p 1: what is sampled must be what is scored.

    Args:     params: {"transformer": ...}.
    """
    dtype = params["transformer"]["wte"].dtype
    batch = pad_batch(
        prompts, [[] for _ in prompts], pad_id=pad_id, config=config, dtype=dtype, device=device
    )
    out = generate(
        params["transformer"],
        tokens=batch.tokens,
        mask=batch.mask,
        config=config,
        max_new=max_tokens,
        stop_id=stop_id,
        pad_id=pad_id,
        rng=rng,
        sampling=sampling,
    )
    batch = Batch(out.tokens, out.mask, batch.prompt_len).trimmed()
    tokens, mask = to_host(batch.responses), to_host(batch.response_mask) > 0
    responses = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    return Samples(prompts, responses, batch, out.hidden[:, : tokens.shape[1]])


def sample_as_set(
    sample: Callable[[Tree], Samples], policy: Tree, *, config: GPTConfig, settings: PPOConfig
) -> Samples:
    """Responses of the policy; with `sampler_bits` of its weights in so short a mantissa.

    That stands for a sampler that is not quite what is trained, like one in bfloat16 (7 bits). The
    responses then bring the log-probs that they were drawn by, for `importance_weights`.
    """
    if not settings.sampler_bits:
        return sample(policy)
    sampler = tree_map(lambda x: round_mantissa(x, bits=settings.sampler_bits), policy)
    samples, tau = sample(sampler), settings.temperature
    batch = samples.batch
    logp = 0.0 * batch.response_mask
    for rows in batch.groups(size=settings.micro_batch_size, config=config):
        out, _ = policy_forward(
            sampler, batch=batch.rows(rows), config=config, temperature=tau, keep=False
        )
        logp[rows] = out.logp
    return samples._replace(hidden=None, sampler_logp=logp)  # the policy's own are not these


def round_mantissa(x: Array, *, bits: int) -> Array:
    """x to the nearest number whose mantissa has so many bits after the leading one."""
    xp = get_xp(x)
    mantissa, exponent = xp.frexp(x)  # 0.5 <= |mantissa| < 1
    return xp.ldexp(xp.rint(mantissa * 2.0 ** (bits + 1)), exponent - bits - 1).astype(x.dtype)
