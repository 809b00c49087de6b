"""The experiments of `minirlhf exact` and of cases: functions from settings to plain numbers.

Two worlds are used. A random one (four tokens, four steps, three random transformers) for gradients
and their noise, one response after the other; and the tiny support desk for everything about
optima. Nothing is sampled but where a policy is trained, and what it has become is then exact.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import numpy as np

from minirlhf.exact import enumeration, expected, ground_truth, optimum
from minirlhf.exact.enumeration import PrefixTree, Responses
from minirlhf.exact.ground_truth import PPO, RLOO
from minirlhf.exact.token_world import TokenWorld
from minirlhf.exact.tree_policy import tree_gradient, tree_logits
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import Tree, tree_leaves, tree_map

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
        gradient = tree_gradient(dlogits, params, **self.where)
        return np.concatenate([leaf.reshape(-1) for leaf in tree_leaves(gradient)])

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


# -- the gradient of the penalty, in every placement ---------------------------------------------
class Placement(NamedTuple):
    """One row of the KL gradient table."""

    name: str
    kl_mode: str
    sampler: str  # who sampled: theta (on-policy), old or ref
    gives: str  # the expected gradient; g = grad KL(pi || ref)
    gamma: float = 1.0

    @property
    def right(self) -> bool:
        return self.gives == "g"


STALE = "biased: samples of old"
PENALTIES = (  # name, kl_mode, and what the expected gradient is on samples of theta, old, ref
    ("k1 in the reward", "reward_k1", "g", STALE),
    ("k1 in the reward, own token only", "reward_k1", "partial"),
    ("k1 as loss (as printed)", "loss_k1", "0", "-grad KL(old||pi)", "-grad KL(ref||pi)"),
    ("k2 in the reward", "reward_k2", "biased", STALE),
    ("k2 as loss, sequence", "loss_k2_seq", "g", STALE),
    ("k2 as loss, per token", "loss_k2_tok", "partial", STALE),
    ("k3 in the reward", "reward_k3", "g - k3 as loss, per token", STALE),
    ("k3 as loss, sequence", "loss_k3_seq", "grad KL(ref||pi)", STALE),
    ("k3 as loss, per token (GRPO)", "loss_k3_tok", "the same by token", STALE),
    ("k3 in reward and as loss", "reward_and_loss_k3", "g", STALE),
    ("full KL as loss", "loss_full", "partial", "partial, old prefixes"),
    ("full KL + score x future KL", "loss_rb", "g", STALE),
    ("full KL in reward and as loss", "reward_and_loss_full", "g", STALE),
    ("sequence ratio x k1", "loss_rho_k1", "g", "g"),
    ("sequence ratio, fixed, x k2", "loss_rho_k2", "g", "g"),
    ("sequence ratio x k3", "loss_rho_k3", "g", "g"),
    ("token ratio x k3", "loss_rho_k3_tok", "partial", "partial, old prefixes"),
)
PLACEMENTS = tuple(
    Placement(name, mode, sampler, gives[i], 0.0 if "own token" in name else 1.0)
    for i, sampler in enumerate(("theta", "old", "ref"))
    for name, mode, *gives in PENALTIES
    if i < len(gives)
)


def kl_gradient_table(*, seed: int = 0) -> list[Row]:
    """Every placement against g = grad KL(pi || ref), in the parameters of a transformer.

    error   |E[estimate] - g| / |g|, by enumeration
    cosine  of the two; 0 where the expected gradient is 0
    noise   sqrt(E|estimate|^2 - |E[estimate]|^2) / |g| of a single response
    """
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
        dlogits = expected.penalty_dlogits(world.responses, theta, **others, **mode)
        mean, row = error_and_noise(world, dlogits, jacobian, g, world.probs(place.sampler))
        angle = 0.0 if mean @ mean < 1e-20 * (g @ g) else float(expected.cosine(mean, g))
        rows.append({**place._asdict(), "right": place.right, "cosine": angle, **row})
    return rows


def error_and_noise(
    world: RandomWorld, dlogits: np.ndarray, jacobian: np.ndarray, g: np.ndarray, probs: np.ndarray
) -> tuple[np.ndarray, Row]:
    """The expected gradient in the parameters (P,), and its error and noise as shares of |g|.

    Args:     dlogits: (M, T, V) the estimate that each response gives; probs (M,) how likely it is.
    """
    M, N, V = len(dlogits), world.tree.n_nodes, world.tree.vocab_size
    at_prefixes = np.zeros((M, N, V))
    kept = dlogits * world.responses.mask[..., None]
    np.add.at(at_prefixes, (np.arange(M)[:, None], world.responses.nodes), kept)
    estimates = at_prefixes.reshape(M, N * V) @ jacobian  # (M, P)
    mean, variance = expected.gradient_moments(estimates, probs)
    noise = float(np.sqrt(variance / (g @ g)))
    return mean, {"error": float(expected.relative_error(mean, g)), "noise": noise}


# -- trained policies ----------------------------------------------------------------------------
class TrainingRun(NamedTuple):
    """One policy to be trained."""

    name: str
    settings: PPOConfig


def changed(settings: PPOConfig, *, optimizer: dict[str, Any] | None = None, **fields) -> PPOConfig:
    """The settings with other values of some fields, and of some fields of their optimiser."""
    tuned = dataclasses.replace(settings.optimizer, **(optimizer or {}))
    return dataclasses.replace(settings, optimizer=tuned, **fields)


def optimum_runs(*, iterations: int = 150, betas=(1.0, 0.5, 0.25)) -> list[TrainingRun]:
    """PPO with two schedules, and one-step REINFORCE, for several beta."""
    constant = {"learning_rate": 1e-3, "schedule": "constant"}
    runs = []
    for beta in betas:
        ppo, rloo = (changed(kind, kl_coef=beta, iterations=iterations) for kind in (PPO, RLOO))
        runs.append(TrainingRun("PPO, linear decay", ppo))
        runs.append(TrainingRun("PPO, constant rate", changed(ppo, optimizer=constant)))
        runs.append(TrainingRun("one-step RLOO", rloo))
    return runs


def train_run(run: TrainingRun, world: TokenWorld, reference: Tree, *, seed: int) -> Row:
    """Train one policy from the reference on; its history, and the frontier where it ended."""
    started = time.perf_counter()
    name, settings = run
    where = {"config": ground_truth.small_transformer(world), "kl_coef": settings.kl_coef}
    truth = ground_truth.make_ground_truth(world, reference, **where)
    trained = ground_truth.train_on_world(truth, settings=settings, seed=seed)
    row = {"name": name, "kl_coef": settings.kl_coef, "seed": seed}
    row |= {"iterations": settings.iterations, "seconds": time.perf_counter() - started}
    args, end = (world.tree, truth.ref_log_probs, world.rewards), trained.history[-1]
    row["frontier"] = optimum.frontier_reward(*args, kl_seq=end["exact/kl_seq"])
    return {**row, "history": trained.history}
