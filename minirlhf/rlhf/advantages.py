"""From a score and a penalty to advantages: token rewards, GAE, masked moments and whitening.

Everything here is a constant for the policy's gradient: the penalty enters what a token earned, and
no derivative passes through it. Arrays are (B, T) over response tokens, with mask 1 at real tokens
(the stop token included) and 0 at the padding on the right.
"""

import numpy as np

from minirlhf.backend import Array, as_float, check_positive, check_same_shape, get_xp


def token_rewards(score: Array, kl_token: Array, *, mask: Array, kl_coef: float) -> Array:
    """reward_t = -beta kl_token_t + 1[t is the last response token] score.

    Ziegler et al. 2019, arXiv 1909.08593. kl_token is the rollout's and stays constant over all
    epochs. The score lands on the stop token itself, or on the last token of a cut-off response.

    Args:     score: (B,) reward of the whole response [reward units].
              kl_token: (B, T) estimate of the penalty per token [nats].
              mask: (B, T).
              kl_coef: beta [reward units per nat].
    Returns:  rewards (B, T) [reward units], 0 at padding.
    Raises:   ValueError: shapes do not fit, or a row of the mask is empty or has a gap.
    Tested by: tests/rlhf/test_equations.py::test_end_of_sequence_reward
    """
    if kl_token.shape != mask.shape or score.shape != mask.shape[:1]:
        raise ValueError(
            "token_rewards: expected score (B,), kl_token (B, T) and mask (B, T); "
            f"got {score.shape}, {kl_token.shape} and {mask.shape}"
        )
    xp = get_xp(score, kl_token, mask)
    if not bool((mask[:, :1] > 0).any(axis=1).all() & ~_has_gap(mask)):  # one look: a GPU waits
        raise ValueError(
            "token_rewards: expected at least one token in every response, padding on its right"
        )
    rewards = -kl_coef * xp.where(mask > 0, as_float(kl_token), 0.0)  # (B, T) each token pays
    last = (xp.arange(mask.shape[1]) * (mask > 0)).max(axis=1)  # (B,)
    # the last token, and not each one, gets the score: before it nobody knew the whole response
    rewards[xp.arange(mask.shape[0]), last] += score
    return rewards


def gae(
    rewards: Array, values: Array, *, mask: Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Array, Array]:
    """A_t = td_t + gamma lam A_{t+1},  td_t = reward_t + gamma V_{t+1} - V_t,  returns = A + V.

    Schulman et al. 2016, arXiv 1506.02438. V after the last token is 0, also where a response was
    cut off. lam = 1 gives return - V (unbiased for any V), lam = 0 the one-step TD error.

    Args:     rewards: (B, T) from `token_rewards`.
              values: (B, T) V(x, y_<t) of the rollout, before token t.
              mask: (B, T).
              gamma: discount.
              lam: lambda.
    Returns:  advantages (B, T), returns (B, T), both 0 at padding.
    Raises:   ValueError: the shapes differ, or (in main memory) a row of the mask has a gap.
    Tested by: tests/rlhf/test_equations.py::test_gae
    """
    check_same_shape("gae", rewards=rewards, values=values, mask=mask)
    xp = get_xp(rewards, values, mask)
    if xp is np and _has_gap(mask):  # on a GPU `token_rewards` has looked, and waited, already
        raise ValueError("gae: expected a mask with padding on the right alone; a row has a gap")
    values = xp.where(mask > 0, as_float(values), 0.0)  # so the value after the last token is 0
    rewards = xp.where(mask > 0, as_float(rewards), 0.0)
    advantages = xp.zeros_like(values)
    next_value = next_advantage = xp.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(mask.shape[1])):
        td = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = td + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def _has_gap(mask: Array) -> Array:
    """() boolean: does a token stand to the right of padding?"""
    return ((mask[:, 1:] > 0) & ~(mask[:, :-1] > 0)).any()


def rloo_advantages(seq_reward: Array, *, group: Array, mask: Array) -> Array:
    """A_i = R_i - mean of the other R_j of the same prompt, the same at every token of response i.

    REINFORCE with a leave-one-out baseline: = G/(G-1) (R_i - mean R) for G responses to a prompt.
    Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740.

    Args:     seq_reward: (B,) R = score - beta kl_seq of each response [reward units].
              group: (B,) which prompt a response answers: one integer a prompt.
              mask: (B, T).
    Returns:  (B, T) [reward units], 0 at padding.
    Raises:   ValueError: shapes do not fit, or a prompt has a single response.
    Tested by: tests/rlhf/test_equations.py::test_rloo
    """
    if seq_reward.shape != mask.shape[:1] or group.shape != mask.shape[:1]:
        raise ValueError(
            "rloo: expected seq_reward (B,), group (B,) and mask (B, T); "
            f"got {seq_reward.shape}, {group.shape} and {mask.shape}"
        )
    xp, seq_reward = get_xp(seq_reward, group, mask), as_float(seq_reward)
    _, group = xp.unique(group, return_inverse=True)  # 0, 1, ...
    total, count = xp.zeros_like(seq_reward), xp.zeros_like(seq_reward)
    xp.add.at(total, group, seq_reward)
    xp.add.at(count, group, xp.ones_like(seq_reward))
    if not bool((count[group] > 1).all()):
        raise ValueError("rloo: expected at least two responses to every prompt; one has one")
    others = (total[group] - seq_reward) / (count[group] - 1)  # independent of response i
    return xp.where(mask > 0, (seq_reward - others)[:, None], 0.0)


def masked_mean(x: Array, *, mask: Array) -> Array:
    """sum(mask x) / sum(mask); 0 where the mask is empty. Padding may hold anything, inf included.

    Args:     x: any shape.
              mask: the same shape.
    Returns:  (), in x's dtype; of integers, booleans and float16 in that of `as_float`.
    Raises:   ValueError: x and mask differ in shape.
    """
    check_same_shape("masked_mean", x=x, mask=mask)
    xp, x = get_xp(x, mask), as_float(x)
    count = xp.maximum((mask > 0).sum(), 1).astype(x.dtype)  # or float32 / int gives float64
    return xp.where(mask > 0, x, 0.0).sum() / count


def masked_var(x: Array, *, mask: Array) -> Array:
    """mean((x - mean)^2) over the mask: the biased variance, defined for a single token too."""
    centred, _ = _centred(x, mask)
    return masked_mean(centred * centred, mask=mask)


def _centred(x: Array, mask: Array) -> tuple[Array, Array]:
    """x - mean and the mean over the mask: exactly 0 and x where all x are equal."""
    xp, x = get_xp(x, mask), as_float(x)
    if x.size == 0:
        return x.copy(), masked_mean(x, mask=mask)
    # the mean of equal numbers may be off by a rounding; that of their distances from one is 0
    top = xp.where(mask > 0, x, -xp.inf).max()
    top = xp.where(top > -xp.inf, top, 0.0)  # -inf: the mask is empty
    mean_below = masked_mean(x - top, mask=mask)
    return (x - top) - mean_below, top + mean_below


def masked_whiten(
    x: Array, *, mask: Array, shift_mean: bool = True, eps: float = 1e-8
) -> tuple[Array, Array]:
    """(x - mean) / sqrt(var + eps) over the mask; the mean is added back if not shift_mean.

    Biased variance, as in lm-human-preferences. Equal numbers give 0, however large they are.

    Returns:  whitened (same shape, 0 at padding), and the scale sqrt(var + eps) it was divided by:
              a penalty that stands in the loss beside whitened advantages is divided by it too.
    Raises:   ValueError: x and mask differ in shape, or eps is not positive.
    """
    check_positive("masked_whiten", "eps", eps)
    xp = get_xp(x, mask)
    centred, mean = _centred(x, mask)
    scale = xp.sqrt(masked_mean(centred * centred, mask=mask) + eps)
    white = centred / scale
    if not shift_mean:
        white = white + mean
    return xp.where(mask > 0, white, 0.0), scale
