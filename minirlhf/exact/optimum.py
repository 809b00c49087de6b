"""What a policy is worth, the optimum, the gradient, over-optimisation: finite sums over a tree.

    J(pi) = E_{y ~ pi} [ r(y) - beta (log pi(y) - log pi_ref(y)) ]

with its maximum J* = beta log Z at pi* ~ pi_ref exp(r / beta). A policy is a table log_probs
(N, V), one row for each prefix of a `PrefixTree`; rewards (M,) has one number a response.
"""

import math
from typing import NamedTuple

from minirlhf.backend import Array, check_same_shape, get_xp
from minirlhf.exact import enumeration
from minirlhf.exact.enumeration import PrefixTree, check_rows, prefix_logprobs


class ExactValue(NamedTuple):
    """What a policy is worth: means over all its responses. Each ()."""

    objective: Array  # J = reward - beta kl_seq [reward units]
    reward: Array  # E[r] [reward units]
    kl_seq: Array  # KL(pi || pi_ref) of whole responses [nats]
    entropy_seq: Array  # H of whole responses, given the prompt [nats]
    flatness: Array  # Var(r - beta log_ratio) among the responses to one prompt: 0 at the optimum


def evaluate_exactly(
    tree: PrefixTree, log_probs: Array, ref_log_probs: Array, rewards: Array, *, kl_coef: float
) -> ExactValue:
    """J(pi) = sum_y pi(y) (r(y) - beta log_ratio(y)),  log_ratio = log pi(y) - log pi_ref(y).

    Args:     log_probs, ref_log_probs: (N, V).
              rewards: (M,) of each response.
              kl_coef: beta [reward units per nat].
    Raises:   ValueError: shapes do not fit the tree, or the reference never says what the policy
                  says.
    """
    check_rows(tree, log_probs=log_probs, ref_log_probs=ref_log_probs)
    check_same_shape("evaluate_exactly", leaf_node=tree.leaf_node, rewards=rewards)
    xp = get_xp(log_probs, ref_log_probs, rewards)
    logp = enumeration.response_logprobs(tree, log_probs)
    p = xp.exp(logp)
    log_ratio = _log_ratio(p, logp, enumeration.response_logprobs(tree, ref_log_probs))
    reward, kl_seq = (p * rewards).sum(), (p * log_ratio).sum()
    shaped = rewards - kl_coef * log_ratio
    prompt = tree.prompt[tree.leaf_node]
    prompt_mean = xp.zeros(tree.n_prompts, dtype=xp.result_type(shaped, xp.float64))
    xp.add.at(prompt_mean, prompt, tree.n_prompts * p * shaped)  # many terms: in float64
    centred = shaped - prompt_mean[prompt].astype(shaped.dtype)
    return ExactValue(
        objective=reward - kl_coef * kl_seq,
        reward=reward,
        kl_seq=kl_seq,
        entropy_seq=-(p * xp.where(p.real > 0, logp, 0.0)).sum() - math.log(tree.n_prompts),
        flatness=(p * centred * centred).sum(),
    )


# -- the optimum ---------------------------------------------------------------------------------
class Optimum(NamedTuple):
    kl_coef: float  # beta [reward units per nat]
    log_probs: Array  # (N, V) log pi*(a|s)
    values: Array  # (N,) V(s) = beta log E_ref[exp(r / beta) | s]; of a prompt: beta log Z
    objective: Array  # () J* = beta log Z, the mean over prompts [reward units]


def soft_optimum(
    tree: PrefixTree, ref_log_probs: Array, rewards: Array, *, kl_coef: float
) -> Optimum:
    """pi*(a|s) = ref(a|s) exp((Q - V)/beta),  V(s) = beta log sum_a ref(a|s) exp(Q(s, a)/beta).

    Q(s, a) is V of the longer prefix, or the reward where a ends the response: one pass from the
    leaves to the prompts (Rafailov et al. 2024, arXiv 2404.12358).

    Args:     as `evaluate_exactly`.
    Raises:   ValueError: beta is not positive and finite, a reward is nan or inf, or shapes do not
                  fit.
    Tested by: tests/exact/test_exact.py::test_tilt_and_soft_values_are_the_same_optimum
    """
    check_rows(tree, ref_log_probs=ref_log_probs)
    check_same_shape("soft_optimum", leaf_node=tree.leaf_node, rewards=rewards)
    _check_positive(kl_coef)
    if not bool(get_xp(rewards).isfinite(rewards).all()):
        raise ValueError("exact: expected finite rewards; got nan or inf")
    xp = get_xp(ref_log_probs, rewards)
    dtype = xp.result_type(ref_log_probs, rewards)
    q = xp.zeros(ref_log_probs.shape, dtype=dtype)
    q[tree.leaf_node, tree.leaf_token] = rewards
    log_probs, values = xp.empty_like(q), xp.zeros(tree.n_nodes, dtype=dtype)
    for level in reversed(tree.levels):
        z = ref_log_probs[level] + q[level] / kl_coef
        z_top = z.real.max(axis=-1, keepdims=True)
        z -= z_top  # or exp(r / beta) overflows at a small beta
        log_sum = xp.log(xp.exp(z).sum(axis=-1, keepdims=True))
        log_probs[level] = z - log_sum
        values[level] = kl_coef * (z_top + log_sum)[:, 0]
        if level.start > 0:
            q[tree.parent[level], tree.token[level]] = values[level]
    return Optimum(kl_coef, log_probs, values, values[tree.levels[0]].mean())


def optimality_gap(tree: PrefixTree, log_probs: Array, optimum: Optimum) -> Array:
    """gap(s) = beta Pr(s) KL(pi(.|s) || pi*(.|s)): what a policy loses at each prefix.

    Summed over the prefixes it is J* - J(pi) = beta KL(pi || pi*), so it says *where* a policy is
    still wrong.

    Args:     log_probs: (N, V).
              optimum: of the same tree, from `soft_optimum`, with its beta.
    Returns:  (N,) [reward units], >= 0.
    """
    check_rows(tree, optimum=optimum.log_probs)
    xp = get_xp(log_probs, optimum.log_probs)
    reach = xp.exp(prefix_logprobs(tree, log_probs))
    p = xp.exp(log_probs)
    kl = (p * _log_ratio(p, log_probs, optimum.log_probs)).sum(axis=-1)
    return optimum.kl_coef * reach * kl


def by_depth(tree: PrefixTree, x: Array) -> Array:
    """Sums of x (N,) over the prefixes of 0, 1, ... T-1 tokens: (T,)."""
    return get_xp(x).stack([x[level].sum() for level in tree.levels])


# -- the gradient --------------------------------------------------------------------------------
class PolicyValues(NamedTuple):
    q: Array  # (N, V) Q(s, a): the penalty of a itself and everything after it
    values: Array  # (N,) V(s) = sum_a pi(a|s) Q(s, a); the mean over prompts is J


def policy_values(
    tree: PrefixTree, log_probs: Array, ref_log_probs: Array, rewards: Array, *, kl_coef: float
) -> PolicyValues:
    """Q(s, a) = -beta log_ratio(s, a) + V(sa), or + r(y) where a ends the response.

    The values of a policy under the reward with the penalty in it: what a critic should learn.

    Args:     as `evaluate_exactly`.
    """
    check_rows(tree, log_probs=log_probs, ref_log_probs=ref_log_probs)
    check_same_shape("policy_values", leaf_node=tree.leaf_node, rewards=rewards)
    xp = get_xp(log_probs, ref_log_probs, rewards)
    p = xp.exp(log_probs)
    q = -kl_coef * _log_ratio(p, log_probs, ref_log_probs)
    q = q.astype(xp.result_type(q, rewards), copy=False)
    q[tree.leaf_node, tree.leaf_token] += rewards
    values = xp.zeros(tree.n_nodes, dtype=q.dtype)
    for level in reversed(tree.levels):
        values[level] = (p[level] * q[level]).sum(axis=-1)
        if level.start > 0:
            q[tree.parent[level], tree.token[level]] += values[level]
    return PolicyValues(q, values)


def objective_gradient(
    tree: PrefixTree, log_probs: Array, ref_log_probs: Array, rewards: Array, *, kl_coef: float
) -> Array:
    """dJ/dz(s, a) = Pr(s) pi(a|s) (Q(s, a) - V(s)): the policy gradient theorem, in logits.

    Sutton et al. 2000. The derivative of log_ratio itself adds E[grad log pi] = 0. A network's
    backward turns it into dJ/dparams. With rewards 0 and beta = -1 it is the gradient of
    KL(pi || pi_ref).

    Args:     as `evaluate_exactly`.
    Returns:  (N, V) [reward units].
    Tested by: tests/exact/test_exact.py::test_exact_gradient_in_logits
    """
    q, values = policy_values(tree, log_probs, ref_log_probs, rewards, kl_coef=kl_coef)
    xp = get_xp(log_probs)
    reach = xp.exp(prefix_logprobs(tree, log_probs))
    return reach[:, None] * xp.exp(log_probs) * (q - values[:, None])


# -- over-optimisation ---------------------------------------------------------------------------
def frontier_reward(
    tree: PrefixTree, ref_log_probs: Array, rewards: Array, *, kl_seq: float
) -> float:
    """The largest E[r] of any policy with KL(pi || ref) <= kl_seq, by bisection on log beta.

    Where kl_seq is more than the optimum has at any beta, it is the largest reward there is.

    Args:     kl_seq: > 0 [nats].
    Raises:   ValueError: kl_seq is not positive.
    """
    _check_positive(kl_seq, "kl_seq")
    spread = float(rewards.max() - rewards.min()) or 1.0
    low, high = math.log(1e-5 * spread), math.log(1e6 * spread)  # of beta; KL falls as it grows
    for _ in range(45):
        middle = 0.5 * (low + high)
        beta = math.exp(middle)
        optimum = soft_optimum(tree, ref_log_probs, rewards, kl_coef=beta)
        value = evaluate_exactly(tree, optimum.log_probs, ref_log_probs, rewards, kl_coef=beta)
        low, high = (middle, high) if float(value.kl_seq) > kl_seq else (low, middle)
    return float(value.reward)


def _log_ratio(p: Array, logp: Array, ref_logp: Array) -> Array:
    """logp - ref_logp where p > 0, and 0 elsewhere: 0 log 0 = 0."""
    xp = get_xp(p, logp, ref_logp)
    possible = p.real > 0
    if bool((possible & (ref_logp.real == -xp.inf)).any()):
        raise ValueError(
            "exact: expected a policy that says only what its reference may say; it says more, "
            "and the KL is infinite: take a reference without -inf"
        )
    return xp.where(possible, logp, 0.0) - xp.where(possible, ref_logp, 0.0)


def _check_positive(value: float, name: str = "kl_coef") -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"exact: expected {name} > 0 and finite; got {value}")
