"""Training on a world that is small enough to know the answer, and how far the answer is away.

The stages are those of any other run: supervised fine-tuning makes the reference, PPO (or one-step
REINFORCE) improves it from samples. Only the measuring differs: every response is enumerated, so
J, J*, the KL and the gradient noise are exact, and no evaluation has an error bar.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minirlhf.backend import get_xp
from minirlhf.exact.optimum import Optimum, by_depth, evaluate_exactly, optimality_gap, soft_optimum
from minirlhf.exact.token_world import TokenWorld
from minirlhf.exact.tree_policy import tree_logits
from minirlhf.nn.heads import init_scalar_head
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.rlhf.advantages import masked_whiten, rloo_advantages
from minirlhf.rlhf.logprobs import log_softmax, response_sum
from minirlhf.train.metrics import mean_of_updates
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.ppo import (
    Experience,
    Task,
    final_score,
    make_experience,
    rollout_penalty,
    train_ppo,
)
from minirlhf.train.rollout import Rollout, Samples, sample_responses
from minirlhf.train.settings import OptimizerConfig, PPOConfig, SFTConfig
from minirlhf.train.sft import train_sft
from minirlhf.tree import Tree, tree_copy

SFT = SFTConfig(  # of the tiny world: close to the Markov chain that wrote the demonstrations
    steps=400,
    batch_size=512,
    optimizer=OptimizerConfig(learning_rate=3e-3, eps=1e-8, max_grad_norm=0.0),
)
PPO = PPOConfig(
    iterations=150,
    batch_size=256,
    epochs=4,
    minibatches=4,
    kl_coef=0.5,
    vf_coef=0.5,
    optimizer=OptimizerConfig(learning_rate=2e-3, eps=1e-8, max_grad_norm=0.0),
)
RLOO = dataclasses.replace(  # one step a batch, no critic, no ratio to clip
    PPO,
    epochs=1,
    minibatches=1,
    vf_coef=0.0,
    clip="none",
    # Without a bound on the step one bad batch can make a reply too rare to be seen again.
    optimizer=dataclasses.replace(PPO.optimizer, learning_rate=3e-3, max_grad_norm=0.3),
)


def small_transformer(world: TokenWorld, *, n_layer: int = 1) -> GPTConfig:
    """The sizes of a policy for a token world: about 13,000 parameters a block."""
    positions = len(world.prompts[0]) + world.max_response_tokens
    return GPTConfig(len(world.tokens), positions, n_layer=n_layer, n_head=4, d_model=32)


def fit_reference(
    world: TokenWorld, *, config: GPTConfig, settings: SFTConfig = SFT, seed: int
) -> Tree:
    """Supervised fine-tuning on the world's demonstrations.

    Returns:
        {"transformer": ...}, the frozen reference of everything that follows.
    """
    rng_init, rng_batches = np.random.default_rng(seed).spawn(2)
    start = {"transformer": init_transformer(config, rng=rng_init)}
    optimizer = Optimizer(start, settings.optimizer, total_steps=settings.steps)
    loop = train_sft(
        optimizer,
        world.demonstrations,
        config=config,
        settings=settings,
        pad_id=world.stop_id,
        rng=rng_batches,
    )
    for _ in loop:
        pass
    return tree_copy(optimizer.params)


class GroundTruth(NamedTuple):
    """What is known about one world, one reference and one beta. Arrays on the host, float64."""

    world: TokenWorld
    config: GPTConfig
    reference: Tree  # {"transformer": ...}
    kl_coef: float  # beta [reward units per nat]
    ref_log_probs: np.ndarray  # (N, V) of the reference
    optimum: Optimum
    ref_reward: float  # E_ref[r] = J(ref)

    def log_probs(self, params: Tree) -> np.ndarray:
        """(N, V) of a policy, normalised in float64 whatever its parameters' dtype."""
        return log_probs_on_tree(params, world=self.world, config=self.config)


def log_probs_on_tree(params: Tree, *, world: TokenWorld, config: GPTConfig) -> np.ndarray:
    """log pi(a|s) at every prefix of the world: (N, V) in float64, for parameters on the CPU."""
    logits = tree_logits(params, tree=world.tree, prompts=world.prompts, config=config)
    return log_softmax(logits.astype(np.float64))


def make_ground_truth(
    world: TokenWorld, reference: Tree, *, config: GPTConfig, kl_coef: float
) -> GroundTruth:
    """The optimum of max E[r] - beta KL(pi || reference) on this world.

    Raises:
        ValueError: no policy is better than the reference, as where all rewards are equal.
    """
    ref = log_probs_on_tree(reference, world=world, config=config)
    optimum = soft_optimum(world.tree, ref, world.rewards, kl_coef=kl_coef)
    value = evaluate_exactly(world.tree, ref, ref, world.rewards, kl_coef=kl_coef)
    if not optimum.objective - value.reward > 1e-9:
        raise ValueError(
            "ground truth: expected rewards that a policy can improve on; the optimum "
            f"{float(optimum.objective):.6g} is no better than the reference: change the rewards"
        )
    return GroundTruth(world, config, reference, kl_coef, ref, optimum, float(value.reward))


def measure(truth: GroundTruth, params: Tree) -> dict[str, float | list[float]]:
    """Where a policy stands, exactly.

    exact/fraction     (J - E_ref[r]) / (J* - E_ref[r]): 0 at the reference, 1 at the optimum
    exact/objective    J [reward units]; exact/optimum is J*
    exact/reward, exact/gold, exact/kl_seq [nats], exact/entropy_seq [nats]
    exact/flatness     Var(r - beta log_ratio), 0 at the optimum
    exact/gap_by_depth J* - J split by the number of tokens before, as shares of J* - E_ref[r]
    """
    world, beta = truth.world, truth.kl_coef
    log_probs = truth.log_probs(params)
    on_tree = (world.tree, log_probs, truth.ref_log_probs)
    value = evaluate_exactly(*on_tree, world.rewards, kl_coef=beta)
    wanted = evaluate_exactly(*on_tree, world.gold, kl_coef=0.0)
    gap = optimality_gap(world.tree, log_probs, truth.optimum)
    best, gain = float(truth.optimum.objective), float(truth.optimum.objective) - truth.ref_reward
    return {
        "exact/fraction": (float(value.objective) - truth.ref_reward) / gain,
        "exact/objective": float(value.objective),
        "exact/optimum": best,
        "exact/reward": float(value.reward),
        "exact/gold": float(wanted.reward),
        "exact/kl_seq": float(value.kl_seq),
        "exact/entropy_seq": float(value.entropy_seq),
        "exact/flatness": float(value.flatness),
        "exact/gap_by_depth": (by_depth(world.tree, gap) / gain).tolist(),
    }


class Trained(NamedTuple):
    params: Tree  # {"transformer": ..., "value_head": ...}
    history: list[dict]  # "iteration", the metrics of `measure` and of the updates before


def train_on_world(
    truth: GroundTruth,
    *,
    settings: PPOConfig,
    seed: int,
    baseline: str = "critic",
    measure_every: int = 10,
) -> Trained:
    """PPO from the truth's reference on, measured exactly at the start, on the way and at the end.

    Args:
        settings: the truth's beta, fixed; temperature 1, which is what is enumerated.
        baseline: "critic" (GAE), or "leave_one_out" (the other responses to the same prompt).
        measure_every: iterations between two measurements.
    Raises:
        ValueError: another baseline, or settings that the ground truth does not speak of.
    """
    _check_settings(truth, settings, baseline)
    config, reference, world = truth.config, truth.reference, truth.world
    rng_rollout, rng_shuffle = np.random.default_rng([seed, 1]).spawn(2)
    dtype = reference["transformer"]["wte"].dtype
    head = init_scalar_head(config.d_model, std=0.0, rng=rng_rollout, dtype=dtype)
    start = {"transformer": tree_copy(reference["transformer"]), "value_head": head}
    total = settings.iterations * settings.updates_per_iteration
    optimizer = Optimizer(start, settings.optimizer, total_steps=total)
    task = Task(
        lambda policy: sample_world(
            policy, world, settings.batch_size, config=config, rng=rng_rollout
        ),
        lambda samples: world.score(samples.prompt_ids, samples.response_ids),
        world.stop_id,
    )
    advantages_of = {"critic": make_experience, "leave_one_out": _leave_one_out(len(world.prompts))}
    loop = train_ppo(
        optimizer,
        reference,
        task,
        config=config,
        settings=settings,
        rng=rng_shuffle,
        advantages_of=advantages_of[baseline],
    )
    history = [{"iteration": 0, **measure(truth, optimizer.params)}]
    for iteration, turn in enumerate(loop, 1):
        if iteration % measure_every == 0 or iteration == settings.iterations:
            exact = measure(truth, optimizer.params)
            metrics = mean_of_updates(turn.updates, settings)
            history.append({"iteration": iteration, **exact, **metrics})
    return Trained(optimizer.params, history)


def _check_settings(truth: GroundTruth, settings: PPOConfig, baseline: str) -> None:
    s = settings
    if baseline not in ("critic", "leave_one_out") or not math.isclose(s.kl_coef, truth.kl_coef):
        raise ValueError(
            'train_on_world: expected baseline "critic" or "leave_one_out" and the beta '
            f"{truth.kl_coef} of the ground truth; got {baseline!r} and {s.kl_coef}"
        )
    if s.temperature != 1 or s.kl_target:
        raise ValueError(
            "train_on_world: expected temperature 1 and a fixed beta (kl_target 0), which is what "
            f"is enumerated; got {s.temperature} and {s.kl_target}"
        )
    if baseline == "leave_one_out" and (s.gamma != 1 or s.whiten_rewards):
        raise ValueError(
            "train_on_world: expected gamma 1 and rewards that are not whitened beside whole "
            f"responses (leave_one_out); got {s.gamma} and {s.whiten_rewards}"
        )


def sample_world(
    params: Tree, world: TokenWorld, n: int, *, config: GPTConfig, rng: np.random.Generator
) -> Samples:
    """n responses, the prompts in turn."""
    prompts = [world.prompts[i % len(world.prompts)] for i in range(n)]
    samples = sample_responses(
        params,
        prompts,
        config=config,
        stop_id=world.stop_id,
        pad_id=world.stop_id,
        max_tokens=world.max_response_tokens,
        rng=rng,
    )
    texts = [[world.text(ids) for ids in lists] for lists in (prompts, samples.response_ids)]
    return samples._replace(prompts=texts[0], responses=texts[1])


def _leave_one_out(n_prompts: int) -> Callable[..., Experience]:
    """`make_experience` with RLOO advantages of whole responses, the prompts in turn."""

    def experience_of(
        rollout: Rollout, *, settings: PPOConfig, kl_coef: float, stop_id: int
    ) -> Experience:
        same = {"settings": settings, "stop_id": stop_id}
        mask, score = rollout.batch.response_mask, final_score(rollout, **same)
        kl_token = rollout_penalty(rollout, settings)
        seq_reward = score - kl_coef * response_sum(kl_token, mask=mask)
        group = get_xp(mask).arange(mask.shape[0]) % n_prompts
        advantages, scale = rloo_advantages(seq_reward, group=group, mask=mask), 1.0
        if settings.whiten_advantages:
            advantages, scale = masked_whiten(advantages, mask=mask)
        experience = make_experience(rollout, kl_coef=kl_coef, **same)
        return experience._replace(advantages=advantages, kl_loss_coef=kl_coef / scale)

    return experience_of
