"""Tables of expected gradients that several case studies, or their tests, read."""

import numpy as np

from minirlhf.backend import Array, get_xp
from minirlhf.exact import enumeration, expected, optimum
from minirlhf.exact.enumeration import PrefixTree, Responses
from minirlhf.exact.expected import RandomWorld, Row, error_and_noise, make_random_world
from minirlhf.exact.ground_truth import TokenWorld
from minirlhf.exact.tree_policy import tree_gradient, tree_logits
from minirlhf.rlhf import kl
from minirlhf.rlhf.advantages import gae, token_rewards
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.tree import Tree, tree_map


def gather_nodes(
    tree: PrefixTree, responses: Responses, dlogits: Array, *, weights: Array
) -> Array:
    """sum_y w(y) dz(y), each token's share at its own prefix: (N, V).

    Args:     dlogits: (M, T, V).
              weights: (M,) usually the probability of y.
    """
    xp = get_xp(dlogits, weights)
    total = xp.zeros((tree.n_nodes, tree.vocab_size), dtype=dlogits.dtype)
    kept = (weights[:, None] * responses.mask)[..., None]
    xp.add.at(total, responses.nodes, xp.where(kept > 0, kept * dlogits, 0.0))
    return total


# -- advantages ----------------------------------------------------------------------------------
def gae_table(*, seed: int = 0, kl_coef: float = 0.5, lams=(0.0, 0.5, 0.8, 0.95, 1.0)) -> list[Row]:
    """Bias and noise of the policy gradient by GAE, for a value that is exact, 0, or off.

    bias   |E[sum_t A_t grad logp_t] - grad J| / |grad J| in the parameters of a transformer
    noise  sqrt of the trace of the covariance of one response's gradient / |grad J|

    Unbiased at lam = 1, and with an exact value (Schulman et al. 2016, arXiv 1506.02438).
    """
    world = make_random_world(seed=seed)
    responses, log_pi, log_ref = world.responses, world.log_probs("theta"), world.log_probs("ref")
    args = (world.tree, log_pi, log_ref, world.rewards)
    jacobian, probs = world.jacobian("theta"), world.probs("theta")
    g = optimum.objective_gradient(*args, kl_coef=kl_coef).reshape(-1) @ jacobian
    exact = optimum.policy_values(*args, kl_coef=kl_coef).values
    off = exact + 0.5 * np.random.default_rng(seed).standard_normal(exact.shape)
    k1, mask = (log_pi - log_ref)[responses.nodes, responses.tokens], responses.mask
    rewards, rows = token_rewards(world.rewards, k1, mask=mask, kl_coef=kl_coef), []
    for name, values in (("exact", exact), ("zero", 0.0 * exact), ("exact + 0.5 noise", off)):
        for lam in lams:
            advantages, _ = gae(rewards, values[responses.nodes], mask=mask, lam=lam)
            dlogits = expected.policy_gradient_dlogits(responses, world.logits["theta"], advantages)
            row = error_and_noise(world, dlogits, jacobian, g, probs)
            rows.append({"value": name, "lam": lam, "bias": row["error"], "noise": row["noise"]})
    return rows


def logits_at_kl(world: RandomWorld, kl_seq: float) -> np.ndarray:
    """Logits ref + x (theta - ref) with KL(pi || ref) = kl_seq, or x = 2^20 if none has: (N, V)."""
    ref, log_ref, no_reward = world.logits["ref"], world.log_probs("ref"), 0.0 * world.rewards

    def at(x: float) -> np.ndarray:
        return ref + x * (world.logits["theta"] - ref)

    def is_too_far(x: float) -> bool:
        args = (world.tree, log_softmax(at(x)), log_ref, no_reward)
        return optimum.evaluate_exactly(*args, kl_coef=0.0).kl_seq > kl_seq

    low, high = 0.0, 1.0
    while not is_too_far(high) and high < 2**20:
        low, high = high, 2 * high
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if is_too_far(middle) else (middle, high)
    return at(low)


def flatness_table(world: TokenWorld, *, kl_coef: float, shares: tuple[float, ...]) -> list[Row]:
    """The noise of one sample's policy gradient on the way to the optimum, exact values known.

    The way is pi_s ~ ref exp(s r / beta): the reference at s = 0, the optimum at s = 1, where
    r - beta log_ratio is the same for every response. With the sampled k1 in the reward the noise
    then vanishes; with the KL over the whole vocabulary in the reward (and its own step in the
    loss) it does not, because beta sum_t KL_t still varies from response to response.

    gap                 J* - J [reward units]
    k1, full            trace of the covariance of one response's gradient, in logits
    """
    tree, responses = world.tree, enumeration.all_responses(world.tree)
    log_ref, mask, rows = world.demonstrator, responses.mask, []
    best = optimum.soft_optimum(tree, log_ref, world.rewards, kl_coef=kl_coef)
    for share in shares:
        at_share = optimum.soft_optimum(tree, log_ref, share * world.rewards, kl_coef=kl_coef)
        args = (tree, log_pi := at_share.log_probs, log_ref, world.rewards)
        probs = np.exp(enumeration.response_logprobs(tree, log_pi))
        value = optimum.evaluate_exactly(*args, kl_coef=kl_coef)
        row = {"share": share, "gap": float(best.objective - value.objective)}
        values = optimum.policy_values(*args, kl_coef=kl_coef).values[responses.nodes]
        k1 = (log_pi - log_ref)[responses.nodes, responses.tokens]
        full, full_cache = kl.full_kl_forward(log_pi, ref_logits=log_ref)
        for name, kl_token in (("k1", k1), ("full", full[responses.nodes])):
            rewards = token_rewards(world.rewards, kl_token, mask=mask, kl_coef=kl_coef)
            advantages, _ = gae(rewards, values, mask=mask, lam=1.0)
            dlogits = expected.policy_gradient_dlogits(responses, log_pi, advantages)
            if name == "full":
                own_step = kl.full_kl_backward(np.ones(tree.n_nodes), full_cache)  # (N, V)
                dlogits = dlogits - kl_coef * own_step[responses.nodes]
            mean = gather_nodes(tree, responses, dlogits, weights=probs)
            # the tokens of one response stand at different prefixes: their squares add up
            second = probs @ ((dlogits * dlogits).sum(axis=-1) * mask).sum(axis=-1)
            row[name] = float(second - (mean * mean).sum())
        rows.append(row)
    return rows


def scores(world: RandomWorld, log_pi: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """sum_t slope_t grad log pi(y_t|.) of each response, in logits: (M, N V) from (M, T)."""
    responses, (N, V), rows = world.responses, log_pi.shape, np.arange(len(slopes))
    found, pi, slopes = np.zeros((len(slopes), N, V)), np.exp(log_pi), slopes * responses.mask
    for t in range(slopes.shape[1]):
        node, token = responses.nodes[:, t], responses.tokens[:, t]
        found[rows, node] -= slopes[:, t, None] * pi[node]
        found[rows, node, token] += slopes[:, t]
    return found.reshape(len(slopes), -1)


def beside(mean: np.ndarray, g: np.ndarray) -> dict[str, float]:
    """Error, cosine and length of a mean gradient beside g, in |g|."""
    return expected.beside(mean, g) | {"length": float(np.linalg.norm(mean) / np.linalg.norm(g))}


def up_along_the_gradient(world: RandomWorld, kl_seq: float) -> tuple[Tree, np.ndarray]:
    """theta = old + x grad E[r], x such that KL(old || theta) = c x^2 is about that.

    Returns:  its parameters, and log pi (N, V).
    """
    tree, r, old, log_old = world.tree, world.rewards, world.policies["old"], world.log_probs("old")
    slope = optimum.objective_gradient(tree, log_old, log_old, r, kl_coef=0.0)
    uphill = tree_gradient(slope, old, **world.where)

    def at(x: float) -> tuple[Tree, np.ndarray]:
        params = tree_map(lambda a, d: a + x * d, old, uphill)
        return params, log_softmax(tree_logits(params, **world.where))

    near = optimum.evaluate_exactly(tree, log_old, at(1e-3)[1], r, kl_coef=0.0).kl_seq
    return at(1e-3 * float(kl_seq / near) ** 0.5)
