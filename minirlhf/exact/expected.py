"""What an estimator's gradient is on average, and how noisy one sample of it is.

A sampled response y gives an estimate of a gradient. Here it is computed for *every* response of a
small world and summed with the probabilities, so "unbiased" and "variance" are numbers and not
estimates. Each estimate goes through the package's own losses and backward passes.

Gradients are in logits: dz (M, T, V) is what response y contributes at the prefix of its token t.
A network's backward is linear in dz, so the same mean holds in its parameters. The world is a
random one: four tokens, four steps, three random transformers.
"""

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minirlhf.backend import Array
from minirlhf.exact import enumeration, optimum
from minirlhf.exact.enumeration import PrefixTree, Responses
from minirlhf.exact.tree_policy import tree_gradient, tree_logits
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.rlhf import kl, objectives
from minirlhf.rlhf.advantages import gae, token_rewards
from minirlhf.rlhf.logprobs import log_softmax, token_logprobs_backward, token_logprobs_forward
from minirlhf.tree import Tree, tree_map, tree_pack

Row = dict[str, Any]


class RandomWorld(NamedTuple):
    """Three random transformers on a tree, float64; rewards are N(0, 1)."""

    tree: PrefixTree
    responses: Responses
    where: dict[str, Any]  # what `tree_logits` and `tree_gradient` need beside the parameters
    policies: dict[str, Tree]  # theta, old, ref
    logits: dict[str, np.ndarray]  # (N, V) of each
    rewards: np.ndarray  # (M,)

    def log_probs(self, name: str) -> np.ndarray:
        """(N, V) log pi(a|s) of one of the policies."""
        return log_softmax(self.logits[name])

    def probs(self, name: str) -> np.ndarray:
        """(M,) probability of every response under one of the policies."""
        return np.exp(enumeration.response_logprobs(self.tree, self.log_probs(name)))

    def pull_back(self, dlogits: np.ndarray, params: Tree) -> np.ndarray:
        """dL/dparams (P,) of one of the transformers from dL/dlogits (N, V)."""
        return tree_pack(tree_gradient(dlogits, params, **self.where))[0]

    def jacobian(self, name: str) -> np.ndarray:
        """dz(s, a)/dparams of one of the policies: (N V, P), by one backward for each logit."""
        N, V = self.tree.n_nodes, self.tree.vocab_size
        rows = (row.reshape(N, V) for row in np.eye(N * V))
        return np.stack([self.pull_back(row, self.policies[name]) for row in rows])


def make_random_world(*, seed: int, vocab_size=4, max_tokens=4, d_model=16) -> RandomWorld:
    """Transformers of one block around the usual start, with N(0, 0.3^2) on every parameter."""
    rng = np.random.default_rng(seed)
    tree = enumeration.enumerate_responses(vocab_size=vocab_size, max_tokens=max_tokens, stop_id=0)
    config = GPTConfig(vocab_size, max_tokens + 1, n_layer=1, n_head=2, d_model=d_model)
    where = {"tree": tree, "prompts": [[0]], "config": config}

    def policy() -> Tree:
        params = {"transformer": init_transformer(config, rng=rng, dtype=np.float64)}
        return tree_map(lambda a: a + 0.3 * rng.standard_normal(a.shape), params)

    policies = {name: policy() for name in ("theta", "old", "ref")}
    logits = {name: tree_logits(params, **where) for name, params in policies.items()}
    rewards = rng.standard_normal(tree.leaf_node.shape)
    return RandomWorld(tree, enumeration.all_responses(tree), where, policies, logits, rewards)


# -- the gradient of one sample --------------------------------------------------------------------
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


# -- its mean and its noise ------------------------------------------------------------------------
def gradient_moments(gradients: Array, probs: Array) -> tuple[Array, Array]:
    """Mean, and trace of the covariance, of the gradient of one sampled response.

    Args:     gradients: (M, P) the estimate that each response gives.
              probs: (M,) how likely it is to be sampled.
    Returns:  mean (P,), variance () E |g|^2 - |E g|^2 of a single sample.
    """
    mean = probs @ gradients
    second = (probs * (gradients * gradients).sum(axis=-1)).sum()
    return mean, second - (mean * mean).sum()


def beside(mean: np.ndarray, exact: np.ndarray, variance: float = 0.0) -> dict[str, float]:
    """The mean of an estimate, and its variance, beside the exact gradient g.

    error   |mean - g| / |g|
    cosine  of the two; 0 where the mean is 0
    noise   sqrt(variance) / |g|
    """
    difference, square, size = mean - exact, (mean * mean).sum(), (exact * exact).sum()
    return {
        "error": float(np.sqrt((difference * difference).sum() / size)),
        "cosine": float((mean * exact).sum() / np.sqrt(square * size)) if square > 0 else 0.0,
        "noise": float(np.sqrt(max(0.0, variance) / size)),
    }


def error_and_noise(
    world: RandomWorld, dlogits: np.ndarray, jacobian: np.ndarray, g: np.ndarray, probs: np.ndarray
) -> dict[str, float]:
    """`beside` g (P,), of estimates dlogits (M, T, V) of responses with these probs (M,)."""
    M, N, V = len(dlogits), world.tree.n_nodes, world.tree.vocab_size
    at_prefixes = np.zeros((M, N, V))
    kept = dlogits * world.responses.mask[..., None]
    np.add.at(at_prefixes, (np.arange(M)[:, None], world.responses.nodes), kept)
    estimates = at_prefixes.reshape(M, N * V) @ jacobian  # (M, P)
    mean, variance = gradient_moments(estimates, probs)
    return beside(mean * (mean @ mean > 1e-20 * (g @ g)), g, variance)  # or it is rounding


# -- the gradient of the penalty, in every placement -----------------------------------------------
class Placement(NamedTuple):
    """One row of the KL gradient table."""

    name: str
    kl_mode: str
    sampler: str  # who sampled: theta (on-policy), old or ref
    gives: str  # the expected gradient; g = grad KL(pi || ref)
    right: bool  # that is g
    gamma: float  # of the reward-to-go


_READ = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PLACEMENTS = tuple(
    Placement(name, mode, sampler, gives[i], gives[i] == "g", 0.0 if "own token" in name else 1.0)
    for i, sampler in enumerate(("theta", "old", "ref"))
    for name, mode, *gives in _READ["penalties"]
    if i < len(gives)
)


def kl_gradient_table(*, seed: int = 0) -> list[Row]:
    """Every placement `beside` g = grad KL(pi || ref), in the parameters of a transformer."""
    world = make_random_world(seed=seed)
    tree, jacobian = world.tree, world.jacobian("theta")
    log_pi, log_ref = world.log_probs("theta"), world.log_probs("ref")
    exact = optimum.objective_gradient(tree, log_pi, log_ref, 0.0 * world.rewards, kl_coef=-1.0)
    g = exact.reshape(-1) @ jacobian
    rows = []
    for place in PLACEMENTS:
        others = {"old_logits": world.logits[place.sampler], "ref_logits": world.logits["ref"]}
        mode = {"kl_mode": place.kl_mode, "gamma": place.gamma}
        theta = world.logits["theta"]
        dlogits = penalty_dlogits(world.responses, theta, **others, **mode)
        row = error_and_noise(world, dlogits, jacobian, g, world.probs(place.sampler))
        rows.append(place._asdict() | row)
    return rows
