"""From a score and a penalty to advantages: token rewards, GAE, masked moments and whitening.

Everything here is a constant for the policy's gradient. Arrays are (B, T) over response tokens,
with mask 1 at real tokens (the stop token included) and 0 at the padding on the right.
"""

from minirlhf.backend import Array, check_same_shape, get_xp


def token_rewards(score: Array, kl_token: Array, *, mask: Array, kl_coef: float) -> Array:
    """reward_t = -beta kl_token_t + 1[t is the last response token] score.

    Ziegler et al. 2019, arXiv 1909.08593. kl_token is the rollout's and stays constant over all
    epochs. The score lands on the stop token itself, or on the last token of a cut-off response.

    Args:
        score: (B,) reward of the whole response [reward units].
        kl_token: (B, T) estimate of the penalty per token [nats].
        mask: (B, T).
        kl_coef: beta [reward units per nat].
    Returns:
        rewards (B, T) [reward units], 0 at padding.
    Raises:
        ValueError: shapes do not fit, or a response has no token.
    Tested by: tests/test_equations.py::test_end_of_sequence_reward
    """
    if kl_token.shape != mask.shape or score.shape != mask.shape[:1]:
        raise ValueError(
            "token_rewards: expected score (B,), kl_token (B, T) and mask (B, T); "
            f"got {score.shape}, {kl_token.shape} and {mask.shape}"
        )
    if not bool((mask > 0).any(axis=1).all()):
        raise ValueError("token_rewards: expected at least one token in every response")
    xp = get_xp(score, kl_token, mask)
    rewards = -kl_coef * xp.where(mask > 0, kl_token, 0.0)
    last = (xp.arange(mask.shape[1]) * (mask > 0)).max(axis=1)  # (B,)
    rewards[xp.arange(mask.shape[0]), last] += score
    return rewards


def gae(
    rewards: Array, values: Array, *, mask: Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Array, Array]:
    """A_t = td_t + gamma lam A_{t+1},  td_t = reward_t + gamma V_{t+1} - V_t,  returns = A + V.

    Schulman et al. 2016, arXiv 1506.02438. V after the last token is 0, also where a response was
    cut off. lam = 1 gives return - V (unbiased for any V), lam = 0 the one-step TD error.

    Args:
        rewards: (B, T) from `token_rewards`.
        values: (B, T) V(x, y_<t) of the rollout, before token t.
        mask: (B, T).
        gamma: discount.
        lam: lambda.
    Returns:
        advantages (B, T), returns (B, T), both 0 at padding.
    Raises:
        ValueError: the shapes differ.
    Tested by: tests/test_equations.py::test_gae
    """
    check_same_shape("gae", rewards=rewards, values=values, mask=mask)
    xp = get_xp(rewards, values, mask)
    values = xp.where(mask > 0, values, 0.0)
    rewards = xp.where(mask > 0, rewards, 0.0)
    advantages = xp.zeros_like(values)
    next_value = next_advantage = xp.zeros_like(values[:, 0])
    for t in reversed(range(mask.shape[1])):
        td = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = td + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def rloo_advantages(seq_reward: Array, *, group: Array, mask: Array) -> Array:
    """A_i = R_i - mean of the other R_j of the same prompt, the same at every token of response i.

    REINFORCE with a leave-one-out baseline: = G/(G-1) (R_i - mean R) for G responses to a prompt.
    Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740.

    Args:
        seq_reward: (B,) R = score - beta kl_seq of each response [reward units].
        group: (B,) which prompt a response answers: one integer a prompt.
        mask: (B, T).
    Returns:
        (B, T) [reward units], 0 at padding.
    Raises:
        ValueError: shapes do not fit, or a prompt has a single response.
    Tested by: tests/test_equations.py::test_rloo
    """
    if seq_reward.shape != mask.shape[:1] or group.shape != mask.shape[:1]:
        raise ValueError(
            "rloo: expected seq_reward (B,), group (B,) and mask (B, T); "
            f"got {seq_reward.shape}, {group.shape} and {mask.shape}"
        )
    xp = get_xp(seq_reward, group, mask)
    _, group = xp.unique(group, return_inverse=True)  # 0, 1, ...
    total, count = xp.zeros_like(seq_reward), xp.zeros_like(seq_reward)
    xp.add.at(total, group, seq_reward)
    xp.add.at(count, group, xp.ones_like(seq_reward))
    if not bool((count[group] > 1).all()):
        raise ValueError("rloo: expected at least two responses to every prompt; one has one")
    others = (total[group] - seq_reward) / (count[group] - 1)
    return xp.where(mask > 0, (seq_reward - others)[:, None], 0.0)


def masked_mean(x: Array, *, mask: Array) -> Array:
    """sum(mask x) / sum(mask); 0 where the mask is empty. Padding may hold anything, inf included.

    Args:
        x: any shape.
        mask: the same shape.
    Returns:
        (), in x's dtype.
    Raises:
        ValueError: x and mask differ in shape.
    """
    check_same_shape("masked_mean", x=x, mask=mask)
    xp = get_xp(x, mask)
    count = xp.maximum((mask > 0).sum(), 1).astype(x.dtype)
    return xp.where(mask > 0, x, 0.0).sum() / count


def masked_var(x: Array, *, mask: Array) -> Array:
    """mean((x - mean)^2) over the mask: the biased variance, defined for a single token too."""
    centred = x - masked_mean(x, mask=mask)
    return masked_mean(centred * centred, mask=mask)


def masked_whiten(
    x: Array, *, mask: Array, shift_mean: bool = True, eps: float = 1e-8
) -> tuple[Array, Array]:
    """(x - mean) / sqrt(var + eps) over the mask; the mean is added back if not shift_mean.

    Biased variance, as in lm-human-preferences.

    Returns:
        whitened (same shape, 0 at padding), and the scale sqrt(var + eps) it was divided by: a
        penalty that stands in the loss beside whitened advantages is divided by it too.
    """
    xp = get_xp(x, mask)
    mean = masked_mean(x, mask=mask)
    scale = xp.sqrt(masked_var(x, mask=mask) + eps).astype(x.dtype)
    white = (x - mean) / scale
    if not shift_mean:
        white = white + mean
    return xp.where(mask > 0, white, 0.0), scale
