"""One batch of experience: sample responses, then score them with policy, reference and reward."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minirlhf.backend import Array, get_xp, to_device, to_host
from minirlhf.errors import InputError
from minirlhf.nn.sampling import generate
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.kl import full_kl_forward
from minirlhf.rlhf.logprobs import entropy_forward
from minirlhf.train.batches import Batch, Ids, pad_batch
from minirlhf.train.policy import policy_forward
from minirlhf.tree import Tree
from minirlhf.workers import map_over
from minirlhf.worlds.tokens import Tokenizer


class Samples(NamedTuple):
    """Responses to prompts, as text and as ids."""

    prompts: list[str]
    responses: list[str]
    prompt_ids: list[Ids]
    response_ids: list[Ids]  # with the stop token if the response reached it
    batch: Batch
    hidden: Array | None = None  # (B, R, C) what the heads of the policy that drew them read


ScoreFunction = Callable[[Samples], np.ndarray]  # (B,) normalised scores on the host


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, max_tokens: int) -> Ids:
    """[bos, ..., sep], with the last tokens of a prompt that is too long."""
    ids = tokenizer.prompt_ids(prompt)
    return ids if len(ids) <= max_tokens else [ids[0], *ids[len(ids) - max_tokens + 1 :]]


def response_ids(tokenizer: Tokenizer, response: str, *, max_tokens: int) -> Ids:
    """[..., eos], or the first max_tokens ids of a response that is too long: it has no eos then.

    Raises:
        InputError: the response is empty.
    """
    if not response:
        raise InputError("response: expected some text; got an empty response: write one")
    return tokenizer.response_ids(response)[:max_tokens]


def sample_responses(
    params: Tree,
    prompts: list[str],
    *,
    tokenizer: Tokenizer,
    config: GPTConfig,
    max_prompt_tokens: int,
    max_response_tokens: int,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    device: str = "cpu",
) -> Samples:
    """y ~ pi(. | x) for every prompt, until the stop token or max_response_tokens.

    PPO samples with top_k 0 and top_p 1: what is sampled must be what is scored.

    Args:
        params: {"transformer": ...}.
    """
    ids = [prompt_ids(tokenizer, p, max_tokens=max_prompt_tokens) for p in prompts]
    batch, responses, hidden = sample_ids(
        params,
        ids,
        stop_id=tokenizer.eos,
        pad_id=tokenizer.pad,
        config=config,
        max_response_tokens=max_response_tokens,
        rng=rng,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        device=device,
    )
    texts = [tokenizer.decode(r) for r in responses]
    return Samples(list(prompts), texts, ids, responses, batch, hidden)


def sample_ids(
    params: Tree,
    prompts: list[Ids],
    *,
    stop_id: int,
    pad_id: int,
    config: GPTConfig,
    max_response_tokens: int,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    device: str = "cpu",
) -> tuple[Batch, list[Ids], Array]:
    """`sample_responses` for prompts that are ids already.

    Returns:
        prompts and responses as one batch, the responses without their padding, and the hidden
        states (B, R, C) that they were drawn from.
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
        max_new=max_response_tokens,
        stop_id=stop_id,
        pad_id=pad_id,
        rng=rng,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    batch = Batch(out.tokens, out.mask, batch.prompt_len).trimmed()
    tokens, mask = to_host(batch.responses), to_host(batch.response_mask) > 0
    responses = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    return batch, responses, out.hidden[:, : tokens.shape[1]]


class Rollout(NamedTuple):
    """What PPO learns from; arrays (B, R) over response tokens, constants from here on."""

    samples: Samples
    old_logp: Array  # log pi_old [nats]
    ref_logp: Array  # log pi_ref [nats]
    ref_logits: Array | None  # (B, R, V), only where the loss needs the whole distribution
    values: Array  # V(x, y_<t) [reward units]
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
    score: ScoreFunction,
    config: GPTConfig,
    temperature: float = 1.0,
    keep_ref_logits: bool = False,
    micro_batch_size: int = 0,
    device: str = "cpu",
) -> Rollout:
    """Log-probs under old and ref, values, entropy and score of sampled responses.

    The policy's hidden states are those of the sampler, if the samples bring them: only its heads
    are computed again. The KV cache rounds otherwise than the training forward, so the ratio of the
    first update is 1 up to rounding; without hidden states, and with minibatches of the same
    shapes, it is exactly 1.

    Args:
        policy: {"transformer": ..., "value_head": ...}, the one that drew the samples.
        reference: {"transformer": ...}, a frozen copy.
    """
    batch = samples.batch
    groups = batch.groups(size=micro_batch_size, config=config)
    f = functools.partial(
        _score_part,
        policy,
        reference,
        config=config,
        temperature=temperature,
        keep_ref_logits=keep_ref_logits,
    )
    xp, known = get_xp(batch.mask), samples.hidden
    parts = map_over(
        f, [(batch.part(rows), None if known is None else known[rows]) for rows in groups]
    )
    arrays = {
        name: xp.zeros((*batch.responses.shape, *array.shape[2:]), dtype=array.dtype)
        for name, array in parts[0].items()
    }
    for rows, part in zip(groups, parts, strict=True):
        for name, array in part.items():
            arrays[name][rows, : array.shape[1]] = array
    scores = to_device(score(samples).astype(arrays["values"].dtype), device)
    ref_logits = arrays.pop("ref_logits", None)
    return Rollout(samples=samples, score=scores, ref_logits=ref_logits, **arrays)


def _score_part(
    policy: Tree,
    reference: Tree,
    part: tuple[Batch, Array | None],
    *,
    config: GPTConfig,
    temperature: float,
    keep_ref_logits: bool,
) -> dict[str, Array]:
    """The arrays of a Rollout, but for the score, of some of its rows."""
    batch, hidden = part
    how = {"batch": batch, "config": config, "temperature": temperature, "keep": False}
    old, _ = policy_forward(policy, hidden=hidden, **how)
    ref, _ = policy_forward(reference, **how)
    entropy, _ = entropy_forward(old.logits, temperature=temperature)
    kl_full, _ = full_kl_forward(old.logits, ref_logits=ref.logits, temperature=temperature)
    arrays = {"old_logp": old.logp, "ref_logp": ref.logp, "values": old.values}
    arrays |= {"entropy": entropy, "kl_full": kl_full}
    return arrays | ({"ref_logits": ref.logits} if keep_ref_logits else {})
