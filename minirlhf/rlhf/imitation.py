"""The loss of stage 1, supervised fine-tuning: imitate demonstrated responses."""

from minirlhf.backend import Array
from minirlhf.rlhf.objectives import WeightedSumCache, weighted_sum_backward, weighted_sum_forward


def cross_entropy_forward(logp: Array, *, weights: Array) -> tuple[Array, WeightedSumCache]:
    """loss = -sum_t w_t logp_t: the mean negative log-probability of the demonstrated tokens.

    Args:     logp: (B, T) from `token_logprobs_forward` [nats].
              weights: (B, T).
    Returns:  loss () [nats per token, with token-mean weights], cache.
    """
    loss, cache = weighted_sum_forward(logp, weights=weights)
    return -loss, cache


def cross_entropy_backward(dloss: Array, cache: WeightedSumCache) -> Array:
    """dlogp_t = -dloss w_t. With token_logprobs_backward:  dz_a = w_t (P_a - 1[a = y_t]) / tau."""
    return -weighted_sum_backward(dloss, cache)
