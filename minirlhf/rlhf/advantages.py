"""From a score and a penalty to advantages: token rewards, GAE, groups, moments and whitening.

Everything here is a constant for the policy's gradient: the penalty enters what a token earned, and
no derivative passes through it. Arrays are (B, T) over response tokens, with mask 1 at real tokens
(the stop token included) and 0 at the padding on the right.
"""

import numpy as np

from minirlhf.backend import Array, as_float, check_positive, check_same_shape, get_xp
from minirlhf.rlhf.kl import clamp_log_ratio


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


ADVANTAGES = ("gae", "group", "group-mean", "leave-one-out", "batch")


def advantages_without_critic(
    rewards: Array, *, mask: Array, form: str, samples_per_prompt: int = 1
) -> Array:
    """Advantages from the rewards of a batch alone, R_i = sum_t reward_it for each response.

    group          A_i = (R_i - mean) / (sd + 1e-4)    GRPO (Shao et al. 2024, arXiv 2402.03300)
    group-mean     A_i = R_i - mean                    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783)
    leave-one-out  A_i = R_i - mean of the others      RLOO (Ahmadian et al. 2024, arXiv 2402.14740)
    batch          A_t = sum_{i >= t} reward_i         REINFORCE++ (Hu et al. 2025, arXiv
                                                       2501.03262), whose baseline is whitening;
                                                       `gae` with V = 0 and lambda = 1

    Means and the sd (with G - 1) are over the G responses to one prompt, and A_i stands at every
    token of response i. R_i is in its own mean: E[A_i grad log pi] is (G-1)/G of the gradient for
    group-mean, all of it for leave-one-out, which is G/(G-1) times as much. Dividing by the sd
    weighs each prompt by 1/sd, and a penalty in the reward with it.

    Args:     rewards: (B, T) from `token_rewards`; responses to one prompt stand together.
              mask: (B, T).
              form: one of ADVANTAGES but gae.
              samples_per_prompt: G; at least 2 unless form is batch.
    Returns:  (B, T) [reward units; group: none], 0 at padding.
    Raises:   ValueError: the shapes differ, another form, or B is no multiple of G.
    Tested by: tests/rlhf/test_equations.py::test_advantages_without_critic
    """
    check_same_shape("advantages", rewards=rewards, mask=mask)
    G, xp = samples_per_prompt, get_xp(rewards, mask)
    if form not in ADVANTAGES[1:] or (form != "batch" and (G < 2 or len(rewards) % G)):
        raise ValueError(
            f"advantages: expected one of {', '.join(ADVANTAGES[1:])}, and but for batch groups of "
            f"at least 2 responses; got {form!r}, and {len(rewards)} responses in groups of {G}"
        )
    rewards = xp.where(mask > 0, as_float(rewards), 0.0)
    if form == "batch":
        return gae(rewards, xp.zeros_like(rewards), mask=mask, lam=1.0)[0]
    R = rewards.sum(axis=1).reshape(-1, G)
    R = R - R[:, :1]  # equal rewards are then exactly 0, as is their mean
    centred = R - R.mean(axis=1, keepdims=True)
    if form == "group":
        centred = centred / (centred.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    elif form == "leave-one-out":
        centred = centred * (G / (G - 1))
    return xp.where(mask > 0, centred.reshape(-1, 1), 0.0)


IMPORTANCE = ("none", "tis", "mis")


def importance_weights(
    logp: Array, sampler_logp: Array, *, mask: Array, form: str, cap: float = 2.0
) -> Array:
    """What corrects an advantage where the sampler is not quite the policy: w_t, constant.

    ratio_t = pi_old(y_t|.) / sampler(y_t|.), as where a sampler rounds its weights to fewer bits;
    |log ratio_t| is cut at 20.

    tis    min(ratio, C)                         truncated (Yao et al. 2025, a blog post)
    mis    ratio within [1/C, C], 0 elsewhere    masked (IcePop, Ling team 2025, arXiv 2510.18855)

    Args:     logp: (B, T) of the policy that is trained, before its updates [nats].
              sampler_logp: (B, T) of the policy that drew the tokens.
              cap: C > 1.
    Returns:  (B, T) >= 0, 0 at padding.
    Raises:   ValueError: the shapes differ, another form, or C <= 1.
    Tested by: tests/rlhf/test_equations.py::test_importance_weights
    """
    check_same_shape("importance", logp=logp, sampler_logp=sampler_logp, mask=mask)
    if form not in IMPORTANCE[1:] or not cap > 1:
        raise ValueError(f"importance: expected tis or mis, and cap > 1; got {form!r} and {cap}")
    xp = get_xp(logp, sampler_logp, mask)
    logp, sampler_logp = (xp.where(mask > 0, as_float(x), 0.0) for x in (logp, sampler_logp))
    ratio = xp.exp(clamp_log_ratio(logp - sampler_logp)[0])
    cut = xp.minimum(ratio, cap)
    if form == "mis":
        cut = xp.where((ratio > cap) | (ratio < 1 / cap), 0.0, ratio)
    return xp.where(mask > 0, cut, 0.0)


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
