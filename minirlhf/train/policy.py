"""Where the network and the mathematics meet: a policy's log-probs and values of given responses.

params = {"transformer": ..., "value_head": {w, b}}; without a value head there are no values. The
hidden state that predicts token t, h_{t-1}, also gives V(x, y_<t).
"""

import functools
from typing import NamedTuple

from minirlhf.backend import Array, get_xp
from minirlhf.nn import heads
from minirlhf.nn.transformer import (
    GPTConfig,
    TransformerCache,
    transformer_backward,
    transformer_forward,
)
from minirlhf.rlhf import logprobs
from minirlhf.train.batches import Batch
from minirlhf.tree import Tree


class PolicyOutput(NamedTuple):
    logits: Array | None  # (B, T, V) that predict the response tokens; None unless kept
    logp: Array  # (B, T) log pi(y_t | x, y_<t) [nats]
    values: Array | None  # (B, T) V(x, y_<t) [reward units]


class PolicyCache(NamedTuple):
    trunk: TransformerCache
    logits: heads.LogitsCache
    logp: logprobs.TokenLogprobsCache
    values: heads.ScalarHeadCache | None
    is_tied: bool  # the logits read the token embedding


def policy_forward(
    params: Tree,
    *,
    batch: Batch,
    config: GPTConfig,
    temperature: float = 1.0,
    hidden: Array | None = None,
    keep: bool = True,
    keep_logits: bool = True,
) -> tuple[PolicyOutput, PolicyCache | None]:
    """logits, log-probs and values of the response tokens of a batch.

    Args:     hidden: (B, at least T, C) the transformer's output that predicts the response tokens,
                  where it is known from sampling them. No backward can follow.
              keep: False where no backward will follow: it takes less time and memory.
              keep_logits: False where only a backward reads them: one array (B, T, V) less.
    Returns:  PolicyOutput, cache (None unless kept).
    """
    xp = get_xp(batch.tokens)
    B, columns = batch.tokens.shape
    before = xp.arange(batch.prompt_len - 1, columns - 1)  # column t - 1 predicts token t
    if hidden is None:
        h, trunk = transformer_forward(
            params["transformer"],
            tokens=batch.tokens[:, :-1],
            mask=batch.mask[:, :-1],
            config=config,
            read=xp.broadcast_to(before, (B, len(before))),
            keep=keep,
        )
    else:
        h, trunk, keep = hidden[:, : len(before)], None, False
    w = heads.output_matrix(params["transformer"])
    logits, logits_cache = heads.logits_forward(h, w)  # h (B, T, C)
    f = functools.partial(logprobs.token_logprobs_forward, temperature=temperature)
    if keep:
        logp, logp_cache = f(logits, targets=batch.responses, in_place=not keep_logits)
    else:  # the softmax is nobody's
        logp_cache = None
        logp = logprobs.by_columns(lambda z, y: f(z, targets=y)[0], logits, batch.responses)
    values = values_cache = None
    if "value_head" in params:
        values, values_cache = heads.scalar_head_forward(h, **params["value_head"])
    is_tied = "lm_head" not in params["transformer"]
    cache = PolicyCache(trunk, logits_cache, logp_cache, values_cache, is_tied)
    return PolicyOutput(logits if keep_logits else None, logp, values), cache if keep else None


def policy_backward(
    dlogits: Array | None, dlogp: Array, dvalues: Array | None, cache: PolicyCache
) -> Tree:
    """dL/dparams from dL/dlogits (None: 0), dL/dlogp and dL/dvalues (None without a value head)."""
    dlogits_total = logprobs.token_logprobs_backward(dlogp, cache.logp)
    if dlogits is not None:
        dlogits_total += dlogits
    dh, dw = heads.logits_backward(dlogits_total, cache.logits)
    del dlogits_total  # the largest of all arrays
    gradients = {}
    if cache.values is not None:
        dh_value, dw_value, db_value = heads.scalar_head_backward(dvalues, cache.values)
        dh += dh_value
        gradients["value_head"] = {"w": dw_value, "b": db_value}
    if cache.is_tied:  # one table, read at both ends
        dtransformer = transformer_backward(dh, cache.trunk, dwte=dw)
    else:
        dtransformer = transformer_backward(dh, cache.trunk) | {"lm_head": dw}
    return {"transformer": dtransformer, **gradients}
