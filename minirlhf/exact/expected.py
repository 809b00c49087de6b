"""What an estimator's gradient is on average, and how noisy one sample of it is.

A sampled response y gives an estimate of a gradient. Here it is computed for *every* response of a
small world and summed with the probabilities, so "unbiased" and "variance" are numbers and not
estimates. Each estimate goes through the package's own losses and backward passes.

Gradients are in logits: dz (M, T, V) is what response y contributes at the prefix of its token t.
A network's backward is linear in dz, so the same mean holds in its parameters.
"""

from typing import NamedTuple

from minirlhf.backend import Array, get_xp
from minirlhf.exact.enumeration import Responses
from minirlhf.rlhf import kl, objectives
from minirlhf.rlhf.advantages import gae, token_rewards
from minirlhf.rlhf.logprobs import token_logprobs_backward, token_logprobs_forward


def policy_gradient_dlogits(
    responses: Responses, logits: Array, advantages: Array, *, old_logp=None, form="none"
) -> Array:
    """dz (M, T, V) of sum_t A_t log pi(y_t|.): one sample of the policy gradient, to be maximised.

    With the log-probs of an old policy, which sampled, of sum_t A_t ratio_t: PPO's surrogate.

    Args:     logits: (N, V) of the policy.
              advantages, old_logp: (M, T), constant.
              form: of the clip, as `ppo_clip_forward` has them.
    """
    logp, cache = token_logprobs_forward(logits[responses.nodes], targets=responses.tokens)
    constants = {"old_logp": logp if old_logp is None else old_logp, "weights": responses.mask}
    _, clip = objectives.ppo_clip_forward(logp, advantages=advantages, clip=form, **constants)
    return token_logprobs_backward(-objectives.ppo_clip_backward(1.0, clip), cache)


def penalty_dlogits(
    responses: Responses,
    logits: Array,
    *,
    old_logits: Array,
    ref_logits: Array,
    kl_mode: str,
    gamma: float = 1.0,
) -> Array:
    """dz (M, T, V) [nats] of the penalty of one response y ~ old: what its gradient descends.

    A penalty in the loss is differentiated. One in the reward is a constant, old's, and multiplies
    ratio_t = pi(y_t|.) / old(y_t|.) and the score of its own and of all earlier tokens, as in PPO
    (reward-to-go; gamma = 0: of its own token alone). On-policy old = the policy, and ratio_t = 1.

    Args:     logits, old_logits, ref_logits: (N, V).
              kl_mode: one of KL_MODES.
              gamma: discount of the reward-to-go.
    """
    mask = responses.mask
    z, z_old, z_ref = (table[responses.nodes] for table in (logits, old_logits, ref_logits))
    logp, cache = token_logprobs_forward(z, targets=responses.tokens)
    old_logp, _ = token_logprobs_forward(z_old, targets=responses.tokens)
    ref_logp, _ = token_logprobs_forward(z_ref, targets=responses.tokens)
    constants = {"old_logp": old_logp, "ref_logp": ref_logp, "ref_logits": z_ref}
    constants |= {"kl_mode": kl_mode, "weights": mask}  # weight 1 a response
    _, loss_cache = objectives.kl_loss_forward(z, logp, **constants)
    dlogits, dlogp = objectives.kl_loss_backward(1.0, loss_cache)
    dlogits = dlogits + token_logprobs_backward(dlogp, cache)
    if kl.KL_MODES[kl_mode].in_reward:
        kl_full, _ = kl.full_kl_forward(z_old, ref_logits=z_ref)
        penalty = kl.penalty_in_reward(kl_mode, log_ratio=old_logp - ref_logp, kl_full=kl_full)
        rewards = token_rewards(0.0 * mask[:, 0], penalty, mask=mask, kl_coef=1.0)
        reward_to_go, _ = gae(rewards, 0.0 * rewards, mask=mask, gamma=gamma, lam=1.0)
        dlogits -= policy_gradient_dlogits(responses, logits, reward_to_go, old_logp=old_logp)
    return dlogits


class Moments(NamedTuple):
    mean: Array  # (P,) expected gradient
    variance: Array  # () E |g|^2 - |E g|^2 of a single sample


def gradient_moments(gradients: Array, probs: Array) -> Moments:
    """Mean, and trace of the covariance, of the gradient of one sampled response.

    Args:     gradients: (M, P) the estimate that each response gives.
              probs: (M,) how likely it is to be sampled.
    """
    mean = probs @ gradients
    second = (probs * (gradients * gradients).sum(axis=-1)).sum()
    return Moments(mean, second - (mean * mean).sum())


def relative_error(estimate: Array, exact: Array) -> Array:
    """|estimate - exact| / |exact|: ()."""
    xp, difference = get_xp(estimate, exact), estimate - exact
    return xp.sqrt((difference * difference).sum() / (exact * exact).sum())


def cosine(estimate: Array, exact: Array) -> Array:
    """Cosine of the angle between two gradients; 0 where one of them is 0: ()."""
    xp = get_xp(estimate, exact)
    norms = xp.sqrt((estimate * estimate).sum() * (exact * exact).sum())
    return xp.where(norms > 0, (estimate * exact).sum() / xp.where(norms > 0, norms, 1.0), 0.0)
