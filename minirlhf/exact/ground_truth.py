"""Training on a world that is small enough to know the answer, and how far the answer is away.

The stages are those of any other run: supervised fine-tuning makes the reference, PPO (or one-step
REINFORCE) improves it from samples. Only the measuring differs: every response is enumerated, so
J, J*, the KL and the gradient noise are exact, and no evaluation has an error bar.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from minirlhf.exact import optimum
from minirlhf.exact.enumeration import PrefixTree
from minirlhf.exact.tree_policy import tree_logits
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.train import ppo
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.rollout import Samples
from minirlhf.train.sampler import sample_as_set, sample_responses
from minirlhf.train.settings import OptimizerConfig, PPOConfig
from minirlhf.train.sft import SFTConfig, train_sft
from minirlhf.tree import Tree, tree_copy, tree_pack


@dataclass(frozen=True)
class TokenWorld:
    """A world of few tokens and short responses, in ids: everything about it can be computed.

    Its vocabulary has no special tokens: what the policy may say is what can be enumerated. N
    prefixes and M responses as in `exact/enumeration.py`.
    """

    tokens: tuple[str, ...]  # the V tokens by name
    stop_id: int  # the token that ends a response, and belongs to it
    prompts: list[list[int]]  # ids of each prompt, all of one length, equally likely
    config: GPTConfig  # the sizes of its policies
    tree: PrefixTree
    rewards: np.ndarray  # (M,) the proxy: what is maximised
    gold: np.ndarray  # (M,) the true reward: what is wanted
    score: Callable[[list[list[int]], list[list[int]]], np.ndarray]  # (prompts, responses) -> (B,)
    demonstrator: np.ndarray  # (N, V) log-probs of who writes the demonstrations, -inf where never
    demonstrations: list[tuple[list[int], list[int]]]  # (prompt, response), what SFT imitates

    def log_probs(self, params: Tree) -> np.ndarray:
        """log pi(a|s) (N, V) of a policy on the CPU, normalised in float64 whatever its dtype."""
        logits = tree_logits(params, tree=self.tree, prompts=self.prompts, config=self.config)
        return log_softmax(logits.astype(np.float64))


def rectangle(responses: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids, at least one, as tokens (B, T) and mask (B, T), padded on the right."""
    lengths = np.array([len(ids) for ids in responses])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, dtype=np.int64)
    tokens[mask] = np.concatenate(responses)
    return tokens, mask.astype(np.float64)


# The settings of the tiny world; the reference comes close to the chain that it imitates.
_ADAM = OptimizerConfig(learning_rate=3e-3, eps=1e-8, max_grad_norm=0.0)
SFT = SFTConfig(steps=400, batch_size=512, optimizer=_ADAM)
_PPO = PPOConfig(iterations=150, batch_size=256, epochs=4, minibatches=4, kl_coef=0.5, vf_coef=0.5)
PPO = replace(_PPO, optimizer=replace(_ADAM, learning_rate=2e-3))
# One step a batch, no critic, no ratio to clip. Without a bound on the step one bad batch can make
# a reply too rare to be seen again.
_BOUNDED = replace(_ADAM, max_grad_norm=0.3)
RLOO = replace(PPO, epochs=1, minibatches=1, clip="none", optimizer=_BOUNDED)
RLOO = replace(RLOO, advantages="leave-one-out", samples_per_prompt=RLOO.batch_size)


def small_transformer(vocab_size: int, n_ctx: int, *, n_layer: int = 1) -> GPTConfig:
    """About 13,000 parameters a block."""
    return GPTConfig(vocab_size, n_ctx, n_layer=n_layer, n_head=4, d_model=32)


def fit_reference(world: TokenWorld, *, settings: SFTConfig = SFT, seed: int) -> Tree:
    """{"transformer": ...} fine-tuned on the demonstrations of the world, frozen after that."""
    rng_init, rng_batches = np.random.default_rng(seed).spawn(2)
    start = {"transformer": init_transformer(world.config, rng=rng_init)}
    optimizer = Optimizer(start, settings.optimizer, total_steps=settings.steps)
    same = {"config": world.config, "settings": settings, "pad_id": world.stop_id}
    for _ in train_sft(optimizer, world.demonstrations, rng=rng_batches, **same):
        pass
    return tree_copy(optimizer.params)


class GroundTruth(NamedTuple):
    """What is known about one world, one reference and one beta. Arrays on the host, float64."""

    world: TokenWorld
    reference: Tree  # {"transformer": ...}
    kl_coef: float  # beta [reward units per nat]
    ref_log_probs: np.ndarray  # (N, V) of the reference
    optimum: optimum.Optimum
    ref_reward: float  # E_ref[r] = J(ref)


def make_ground_truth(world: TokenWorld, reference: Tree, *, kl_coef: float) -> GroundTruth:
    """The optimum of max E[r] - beta KL(pi || reference) on this world.

    Raises:   ValueError: no policy is better than the reference, as where all rewards are equal.
    """
    ref = world.log_probs(reference)
    best = optimum.soft_optimum(world.tree, ref, world.rewards, kl_coef=kl_coef)
    value = optimum.evaluate_exactly(world.tree, ref, ref, world.rewards, kl_coef=kl_coef)
    if not best.objective - value.reward > 1e-9:
        raise ValueError(
            "ground truth: expected rewards that a policy can improve on; the optimum "
            f"{float(best.objective):.6g} is no better than the reference: change the rewards"
        )
    return GroundTruth(world, reference, kl_coef, ref, best, float(value.reward))


def measure(truth: GroundTruth, params: Tree) -> dict[str, float | list[float]]:
    """Where a policy stands, exactly.

    exact/fraction     (J - E_ref[r]) / (J* - E_ref[r]): 0 at the reference, 1 at the optimum
    exact/objective    J [reward units]; exact/optimum is J*
    exact/reward, exact/gold, exact/kl_seq [nats], exact/entropy_seq [nats]
    exact/flatness     Var(r - beta log_ratio), 0 at the optimum
    exact/gap_by_depth J* - J split by the number of tokens before, as shares of J* - E_ref[r]
    """
    world, log_probs = truth.world, truth.world.log_probs(params)
    on_tree = (world.tree, log_probs, truth.ref_log_probs)
    value = optimum.evaluate_exactly(*on_tree, world.rewards, kl_coef=truth.kl_coef)
    wanted = optimum.evaluate_exactly(*on_tree, world.gold, kl_coef=0.0)
    gap = optimum.optimality_gap(world.tree, log_probs, truth.optimum)
    best, start = truth.optimum.objective, truth.ref_reward
    exact = {**value._asdict(), "optimum": best, "gold": wanted.reward}
    exact["fraction"] = (value.objective - start) / (best - start)
    by_depth = optimum.by_depth(world.tree, gap) / (best - start)
    numbers = {f"exact/{name}": float(number) for name, number in exact.items()}
    return {**numbers, "exact/gap_by_depth": by_depth.tolist()}


class Trained(NamedTuple):
    params: Tree  # {"transformer": ..., "value_head": ...}
    history: list[dict]  # "iteration", the metrics of `measure`


def train_on_world(
    truth: GroundTruth, *, settings: PPOConfig, seed: int, measure_every=10
) -> Trained:
    """PPO from the truth's reference on, measured exactly at the start, on the way and at the end.

    Args:     settings: the truth's beta, fixed; temperature 1, which is what is enumerated.
              measure_every: iterations between two measurements.
    Raises:   ValueError: settings that the ground truth does not speak of.
    """
    beta, tau, target = settings.kl_coef, settings.temperature, settings.kl_target
    if not math.isclose(beta, truth.kl_coef) or tau != 1 or target:
        raise ValueError(
            f"train_on_world: expected the beta {truth.kl_coef} of the ground truth, kl_target 0 "
            f"and temperature 1, which is what is enumerated; got {beta}, {target} and {tau}"
        )
    history = [{"iteration": 0, **measure(truth, truth.reference)}]
    turns = ppo_on_world(truth.world, truth.reference, settings=settings, seed=seed)
    for iteration, (params, _) in enumerate(turns, 1):
        if iteration % measure_every == 0 or iteration == settings.iterations:
            history.append({"iteration": iteration, **measure(truth, params)})
    return Trained(params, history)


def ppo_on_world(
    world: TokenWorld, reference: Tree, *, settings: PPOConfig, seed: int, start: Tree | None = None
) -> Iterator[tuple[Tree, ppo.Iteration]]:
    """PPO on a world of tokens, from samples: the policy, which is written to, at every iteration.

    Args:     start: parameters to go on from, as they were yielded; None: the reference.
    """
    rng_rollout, rng_shuffle = np.random.default_rng([seed, 1]).spawn(2)
    optimizer = ppo.new_policy(reference, settings, rng=rng_rollout)
    if start is not None:
        optimizer.flat[...] = tree_pack(start)[0]
    draw = {"world": world, "n": settings.batch_size, "rng": rng_rollout}
    sample = functools.partial(sample_world, **draw, together=settings.samples_per_prompt)
    same = {"config": world.config, "settings": settings}
    task = ppo.Task(
        lambda policy: sample_as_set(sample, policy, **same),
        lambda samples: world.score(samples.prompt_ids, samples.response_ids),
        world.stop_id,
    )
    for turn in ppo.train_ppo(optimizer, reference, task, rng=rng_shuffle, **same):
        yield optimizer.params, turn


def sample_world(params: Tree, world: TokenWorld, n: int, *, rng: Generator, together=1) -> Samples:
    """n responses, the prompts in turn, each of them so many times together."""
    prompts = [world.prompts[i // together % len(world.prompts)] for i in range(n)]
    limits = {"max_tokens": len(world.tree.levels), "stop_id": world.stop_id}
    same = {"pad_id": world.stop_id, "config": world.config, "rng": rng}
    return sample_responses(params, prompts, **limits, **same)


def optimum_runs(*, iterations: int = 150) -> Iterator[tuple[str, PPOConfig]]:
    """Names and settings: PPO with two schedules, and one-step REINFORCE, for several beta."""
    constant = replace(_ADAM, learning_rate=1e-3, schedule="constant")
    for beta in (1.0, 0.5, 0.25):
        same = {"kl_coef": beta, "iterations": iterations}
        yield "PPO, linear decay", replace(PPO, **same)
        yield "PPO, constant rate", replace(PPO, **same, optimizer=constant)
        yield "one-step RLOO", replace(RLOO, **same)
