"""Two policies that stand beside the optimum, exactly: the best of n draws, and where GRPO rests.

As in `exact/optimum.py` a policy is a table log_probs (N, V), one row for each prefix of a tree,
and rewards (M,) has one number a response.
"""

import numpy as np

from minirlhf.backend import Array, as_float, check_same_shape, get_xp
from minirlhf.exact.enumeration import PrefixTree, check_rows, response_logprobs


def best_of_n(ref_logp: Array, rewards: Array, *, n: int) -> Array:
    """log Pr of the best of n draws: q(y) = ref(y) (F(r)^n - F-(r)^n) / (F(r) - F-(r)).

    F is the distribution function of the reward under ref and F- its limit from the left; among
    draws that tie for the best one is taken at random. KL(q || ref) <= log n - (n-1)/n
    (Beirami et al. 2024, arXiv 2401.01879).

    Args:     ref_logp: (M,) log Pr(y|x) of every response to one prompt under the reference [nats].
              rewards: (M,); neighbours that differ by 1e-9 of the whole range, or by rounding, are
                  ties.
              n: number of draws >= 1.
    Returns:  (M,) [nats].
    Raises:   ValueError: n < 1, shapes differ, or a reward is nan or inf.
    """
    check_same_shape("best_of_n", ref_logp=ref_logp, rewards=rewards)
    if n < 1:
        raise ValueError(f"best_of_n: expected n >= 1; got {n}")
    xp = get_xp(ref_logp, rewards)
    if not bool(xp.isfinite(rewards).all()):
        raise ValueError("best_of_n: expected finite rewards; got nan or inf")
    order = xp.argsort(rewards)
    rising = as_float(rewards)[order]
    # a share of the range, so that neither unit nor zero of the reward matter, and eight roundings
    rounding = 8 * float(xp.finfo(rising.dtype).eps) * xp.maximum(rising[-1], -rising[0])
    steps = rising[1:] - rising[:-1] > 1e-9 * rising[-1] - 1e-9 * rising[0] + rounding
    group = xp.zeros(rewards.shape, dtype=order.dtype)  # (M,) 0 at the lowest reward
    group[order[1:]] = steps.cumsum()
    mass = xp.zeros(int(group.max()) + 1, dtype=ref_logp.dtype)
    xp.add.at(mass, group, xp.exp(ref_logp))
    drawn = mass > 0
    mass = xp.where(drawn, mass, 1.0)  # a group that is never drawn keeps the weight 1
    cdf = xp.where(drawn, mass, 0.0).cumsum()
    share = xp.where(drawn, xp.clip(mass / xp.where(cdf > 0, cdf, 1.0), 0.0, 1.0), 1.0)
    # log (F^n - F-^n) - log (F - F-) = n log F + log(1 - (1 - share)^n) - log mass
    others = xp.where(share < 1, share, 0.0)
    wins = xp.where(share < 1, -xp.expm1(n * xp.log1p(-others)), 1.0)
    cdf = cdf / cdf[-1]  # 1 at the top, and not nearly: it is raised to the power n
    weight = n * xp.log(xp.where(drawn, cdf, 1.0)) + xp.log(wins) - xp.log(mass)
    return ref_logp + weight[group]


def grpo_rest(
    tree: PrefixTree,
    ref_log_probs: Array,
    rewards: Array,
    *,
    kl_coef: float,
    by_length: bool = True,
    by_sd: bool = True,
) -> Array:
    """Where GRPO's expected gradient vanishes, which is not pi*: log pi (N, V), of one prompt.

    For large groups A = (r - mu) / sigma, over the policy's own responses. The loss has A log pi
    and beta k3 of each token, both with the weight 1/|y|. With c(s, a) = E[1/|y| | s, a] and
    A(s, a) = E[A/|y| | s, a] / c(s, a) its gradient in the logits is 0 where

        pi(a|s) = beta ref(a|s) / (beta + lambda(s) / c(s, a) - A(s, a)),   sum_a pi(a|s) = 1

    k3 pulls to ref by the forward KL, at prefixes as given, so the tails are as heavy as 1/A and
    not exp(A). (That form: Grill et al. 2020, arXiv 2007.12509.) mu and sigma are found by
    iteration.

    Args:     ref_log_probs: (N, V);  rewards: (M,);  kl_coef: beta > 0.
              by_length, by_sd: False leaves out 1/|y|, 1/sigma: Dr. GRPO has neither.
    Raises:   ValueError: beta is not positive, shapes do not fit, or mu and sigma do not settle.
    Tested by: tests/exact/test_exact.py::test_grpo_rests_where_its_expected_gradient_is_0
    """
    check_rows(tree, ref_log_probs=ref_log_probs)
    check_same_shape("grpo_rest", leaf_node=tree.leaf_node, rewards=rewards)
    if not 0 < kl_coef < np.inf:
        raise ValueError(f"grpo_rest: expected kl_coef > 0 and finite; got {kl_coef}")
    depth = np.repeat(np.arange(len(tree.levels)), [v.stop - v.start for v in tree.levels])
    share = 1.0 / (1.0 + depth[tree.leaf_node]) if by_length else np.ones(rewards.shape)
    log_pi, moments = ref_log_probs, (np.inf, np.inf)
    for _ in range(1000):
        p = np.exp(response_logprobs(tree, log_pi))
        mu = float(p @ rewards)
        sigma = float(np.sqrt(p @ (rewards - mu) ** 2)) if by_sd else 1.0
        if np.allclose(moments, (mu, sigma), rtol=1e-13, atol=1e-13):
            return log_pi
        moments = mu, sigma
        log_pi = _forward_kl_rest(tree, ref_log_probs, (rewards - mu) / sigma, share, kl_coef)
    raise ValueError(f"grpo_rest: expected mu and sigma to settle; got {mu} and {sigma}")


def _forward_kl_rest(
    tree: PrefixTree, ref_log_probs: Array, advantages: Array, share: Array, kl_coef: float
) -> Array:
    """log pi (N, V) of the formula of `grpo_rest`, from the leaves to the prompt."""
    ref, log_pi = np.exp(ref_log_probs), np.empty_like(ref_log_probs)
    c, cA = np.ones_like(ref), np.zeros_like(ref)  # (N, V)
    c[tree.leaf_node, tree.leaf_token] = share
    cA[tree.leaf_node, tree.leaf_token] = share * advantages
    for level in reversed(tree.levels):
        pull, A, r = kl_coef * ref[level], cA[level] / c[level], 1 / c[level]
        # one term is 1 here, so the sum is at least 1; it is convex: Newton only goes up
        lam = np.where(pull > 0, (pull - kl_coef + A) / r, -np.inf).max(axis=-1, keepdims=True)
        for _ in range(100):
            room = np.where(pull > 0, kl_coef + lam * r - A, 1.0)
            above = (pull / room).sum(axis=-1, keepdims=True) - 1
            lam = lam + above / (pull * r / room**2).sum(axis=-1, keepdims=True)
            if np.abs(above).max() < 1e-15:
                break
        pi = pull / room
        log_pi[level] = np.log(np.where(pi > 0, pi, 1.0)) + np.where(pi > 0, 0.0, -np.inf)
        if level.start > 0:
            at = tree.parent[level], tree.token[level]
            c[at], cA[at] = (pi * c[level]).sum(axis=-1), (pi * cA[level]).sum(axis=-1)
    return log_pi
