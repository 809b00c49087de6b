"""Stage 3: proximal policy optimisation with a KL penalty to the reference.

One iteration:  sample  ->  score  ->  token rewards  ->  advantages  ->  epochs of clipped updates.

    maximise E_{y ~ pi_theta} [ r(x, y) - beta sum_t (log pi_theta(y_t|.) - log pi_ref(y_t|.)) ]
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

from minirlhf.backend import Array, get_xp
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.advantages import gae, masked_mean, masked_var, masked_whiten, token_rewards
from minirlhf.rlhf.kl import (
    KL_MODES,
    adaptive_kl_coef,
    clamp_log_ratio,
    kl_estimate,
    summed_penalty,
)
from minirlhf.rlhf.logprobs import EntropyCache, entropy_backward, entropy_forward
from minirlhf.rlhf.objectives import (
    AGGREGATIONS,
    KLLossCache,
    PPOClipCache,
    ValueLossCache,
    WeightedSumCache,
    kl_loss_backward,
    kl_loss_forward,
    ppo_clip_backward,
    ppo_clip_forward,
    token_weights,
    value_loss_backward,
    value_loss_forward,
    weighted_sum_backward,
    weighted_sum_forward,
)
from minirlhf.train.batches import Batch, row_slices
from minirlhf.train.optimizer import Optimizer, OptimizerConfig
from minirlhf.train.policy import PolicyCache, policy_backward, policy_forward
from minirlhf.train.ranges import check_numbers
from minirlhf.train.rollout import Rollout
from minirlhf.tree import Tree, tree_add


@dataclass(frozen=True)
class PPOConfig:
    """PPO with the summed KL penalty."""

    iterations: int = 30
    """Batches of fresh samples."""
    batch_size: int = 128
    """Prompts, and responses, an iteration."""
    epochs: int = 4
    """Passes over each batch."""
    minibatches: int = 2
    """Updates a pass."""
    micro_batch_size: int = 0
    """Responses in one forward and backward; bounds memory, changes no result. 0: the minibatch."""
    temperature: float = 1.0
    """Of sampling and of every log-prob [> 0]."""
    kl_coef: Annotated[float, tyro.conf.arg(aliases=["--beta"])] = 0.2
    """beta, weight of the penalty [units of the normalised score per nat]."""
    kl_mode: Literal[tuple(KL_MODES)] = "reward_k1"  # type: ignore[valid-type]
    """Where the penalty stands and which estimator it uses."""
    kl_target: float = 0.0
    """Wanted kl_seq [nats per response]: adapts kl_coef. 0: kl_coef stays fixed."""
    kl_horizon: float = 10000.0
    """Episodes over which an adaptive kl_coef may change by up to 20 %."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE's lambda."""
    whiten_advantages: bool = True
    """Advantages to mean 0, variance 1 over the batch's tokens."""
    whiten_rewards: bool = False
    """Token rewards to variance 1 (the mean stays)."""
    clip: Literal["ppo", "book", "none"] = "ppo"
    """Clipped surrogate: PPO's, the one-sided min(ratio, 1+e) of a textbook, or none."""
    clip_eps: float = 0.2
    """e below 1, and above it unless clip_eps_high is set."""
    clip_eps_high: float = 0.0
    """e above 1 (clip-higher). 0: as clip_eps."""
    dual_clip: float = 0.0
    """c > 1: bounds the objective from below by c A where A < 0. 0: off."""
    value_clip_eps: float = 0.0
    """Clips the value's move from the rollout's [reward units]. 0: off."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    aggregation: Literal[AGGREGATIONS] = "token-mean"  # type: ignore[valid-type]
    """How token losses become one number."""
    target_kl: float = 0.0
    """Ends the epochs when mean k3 to the old policy exceeds 1.5 of it [nats per token]. 0: off."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of a response without its stop token [score units]."""
    score_clip: float = 0.0
    """Cuts the score to [-c, c] [score units]. 0: off."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-4, beta2=0.95)
    )

    def __post_init__(self):
        check_numbers(
            self,
            "ppo.",
            at_least_1=("iterations", "batch_size", "epochs", "minibatches"),
            at_least_0=(
                *("micro_batch_size", "kl_coef", "kl_target", "clip_eps", "clip_eps_high"),
                *("dual_clip", "value_clip_eps", "vf_coef", "ent_coef", "target_kl"),
                *("missing_eos_penalty", "score_clip"),
            ),
            above_0=("temperature", "kl_horizon"),
            shares=("gamma", "lam"),
        )
        if self.minibatches > self.batch_size:
            raise InputError(
                f"ppo.minibatches: expected at most batch_size = {self.batch_size}; "
                f"got {self.minibatches}"
            )
        if self.dual_clip and self.dual_clip <= 1:
            raise InputError(
                f"ppo.dual_clip: expected 0 (off) or more than 1; got {self.dual_clip}"
            )

    @property
    def clip_range(self) -> tuple[float, float]:
        """(e_low, e_high)."""
        return self.clip_eps, self.clip_eps_high or self.clip_eps


class Experience(NamedTuple):
    """A rollout, or rows of it, with everything the loss holds constant. Arrays are (B, R)."""

    batch: Batch
    old_logp: Array
    ref_logp: Array
    ref_logits: Array | None  # (B, R, V)
    old_values: Array
    advantages: Array
    returns: Array
    weights: Array  # of each token in the loss
    kl_loss_coef: Array | float  # weight of a penalty in the loss [advantage units per nat]

    def rows(self, index) -> "Experience":
        """The sequences that `index` picks; the weights stay as they are."""
        picked = {
            name: None if getattr(self, name) is None else getattr(self, name)[index]
            for name in self._fields[1:-1]
        }
        return Experience(self.batch.rows(index), **picked, kl_loss_coef=self.kl_loss_coef)


class PPOLossCache(NamedTuple):
    policy: PolicyCache
    clip: PPOClipCache
    value: ValueLossCache
    kl: KLLossCache | None
    entropy: EntropyCache | None
    entropy_sum: WeightedSumCache | None
    logp: Array  # (B, R) kept for the metrics
    parts: dict[str, Array]  # the terms of the loss


def ppo_loss_forward(
    params: Tree, *, experience: Experience, config: GPTConfig, settings: PPOConfig, kl_coef: float
) -> tuple[Array, PPOLossCache]:
    """loss = L_clip + vf_coef L_V - ent_coef H + beta L_KL, each a weighted sum over tokens.

    L_KL is there only if `kl_mode` puts the penalty into the loss.

    Args:
        params: {"transformer": ..., "value_head": ...}.
        kl_coef: beta; `experience.kl_loss_coef` scales it to the units of the advantages.
    Returns:
        loss (), cache.
    """
    e, s = experience, settings
    out, policy = policy_forward(params, batch=e.batch, config=config, temperature=s.temperature)
    clip_loss, clip = ppo_clip_forward(
        out.logp,
        old_logp=e.old_logp,
        advantages=e.advantages,
        weights=e.weights,
        clip_eps=s.clip_range,
        clip=s.clip,
        dual_clip=s.dual_clip or None,
    )
    value_loss, value = value_loss_forward(
        out.values,
        old_values=e.old_values,
        returns=e.returns,
        weights=e.weights,
        clip_eps=s.value_clip_eps or None,
    )
    loss = clip_loss + s.vf_coef * value_loss
    parts = {"loss/policy_avg": clip_loss, "loss/value_avg": value_loss}
    kl = entropy_cache = entropy_sum = None
    if KL_MODES[s.kl_mode].in_loss:
        kl_loss, kl = kl_loss_forward(
            out.logits,
            out.logp,
            kl_mode=s.kl_mode,
            old_logp=e.old_logp,
            ref_logp=e.ref_logp,
            ref_logits=e.ref_logits,
            weights=e.weights,
            temperature=s.temperature,
        )
        loss = loss + kl_coef * e.kl_loss_coef * kl_loss
        parts["loss/kl_avg"] = kl_loss
    if s.ent_coef:
        entropy, entropy_cache = entropy_forward(out.logits, temperature=s.temperature)
        bonus, entropy_sum = weighted_sum_forward(entropy, weights=e.weights)
        loss = loss - s.ent_coef * bonus
    cache = PPOLossCache(policy, clip, value, kl, entropy_cache, entropy_sum, out.logp, parts)
    return loss, cache


def ppo_loss_backward(
    dloss: Array | float,
    cache: PPOLossCache,
    *,
    experience: Experience,
    settings: PPOConfig,
    kl_coef: float,
) -> Tree:
    """dL/dparams: the terms of the loss undone, added up on logits, log-probs and values."""
    dlogp = ppo_clip_backward(dloss, cache.clip)
    dvalues = value_loss_backward(dloss * settings.vf_coef, cache.value)
    dlogits = None
    if cache.kl is not None:
        dlogits, dlogp_kl = kl_loss_backward(dloss * kl_coef * experience.kl_loss_coef, cache.kl)
        dlogp += dlogp_kl
    if cache.entropy is not None:
        dentropy = weighted_sum_backward(-dloss * settings.ent_coef, cache.entropy_sum)
        dlogits_entropy = entropy_backward(dentropy, cache.entropy)
        dlogits = dlogits_entropy if dlogits is None else dlogits + dlogits_entropy
    return policy_backward(dlogits, dlogp, dvalues, cache.policy)


def make_experience(
    rollout: Rollout, *, settings: PPOConfig, kl_coef: float, stop_id: int
) -> tuple[Experience, dict[str, float]]:
    """Rewards, advantages and returns of a rollout, and the metrics that describe it.

    The penalty enters the reward with the rollout's log-probs and is constant over the epochs.
    """
    xp = get_xp(rollout.old_logp)
    s, mask = settings, rollout.batch.response_mask
    stopped = ((rollout.batch.responses == stop_id) & (mask > 0)).any(axis=1)  # (B,)
    score = rollout.score - s.missing_eos_penalty * (1.0 - stopped.astype(mask.dtype))
    if s.score_clip:
        score = xp.clip(score, -s.score_clip, s.score_clip)
    estimator = KL_MODES[s.kl_mode].in_reward
    kl_token = kl_estimate(rollout.old_logp - rollout.ref_logp, estimator or "k1")
    rewards = token_rewards(score, kl_token, mask=mask, kl_coef=kl_coef if estimator else 0.0)
    if s.whiten_rewards:
        rewards, _ = masked_whiten(rewards, mask=mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.values, mask=mask, gamma=s.gamma, lam=s.lam)
    scale = 1.0
    if s.whiten_advantages:
        advantages, scale = masked_whiten(advantages, mask=mask)
    experience = Experience(
        batch=rollout.batch,
        old_logp=rollout.old_logp,
        ref_logp=rollout.ref_logp,
        ref_logits=rollout.ref_logits,
        old_values=rollout.values,
        advantages=advantages,
        returns=returns,
        weights=token_weights(mask, mode=s.aggregation),
        kl_loss_coef=1.0 / scale,
    )
    penalty = summed_penalty(rollout.old_logp, rollout.ref_logp, mask=mask)
    non_score = -kl_coef * float(penalty.mean())
    lengths = mask.sum(axis=1)
    value_error = masked_mean((rollout.values - returns) ** 2, mask=mask)
    returns_var = float(masked_var(returns, mask=mask))
    metrics = {
        "objective/kl": penalty.mean(),
        "objective/kl_full_seq": xp.where(mask > 0, rollout.kl_full, 0.0).sum(axis=1).mean(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -xp.where(mask > 0, rollout.old_logp, 0.0).sum(axis=1).mean(),
        "objective/non_score_reward": non_score,
        "objective/scores": rollout.score.mean(),
        "objective/scores_sd": rollout.score.std(),
        "objective/rlhf_reward": float(score.mean()) + non_score,
        "policy/entropy_avg": masked_mean(rollout.entropy, mask=mask),
        "ppo/val/mean": masked_mean(rollout.values, mask=mask),
        "ppo/val/var": masked_var(rollout.values, mask=mask),
        "ppo/val/error": value_error,
        "ppo/val/var_explained": 1.0 - float(value_error) / max(returns_var, 1e-12),
        "ppo/returns/mean": masked_mean(returns, mask=mask),
        "ppo/returns/var": returns_var,
        "val/num_eos_tokens": stopped.sum(),
        "response_length/mean": lengths.mean(),
    }
    return experience, {name: float(value) for name, value in metrics.items()}


def minibatch_gradients(
    params: Tree, experience: Experience, *, config: GPTConfig, settings: PPOConfig, kl_coef: float
) -> tuple[Tree, float, Array, dict[str, float]]:
    """Gradient of one minibatch, summed over micro-batches.

    The weights of the tokens were made for the whole minibatch, so losses and gradients of its
    parts add up to those of the whole, whatever the lengths of the responses.

    Returns:
        gradients, loss, logp (B, R) of the current policy, terms of the loss.
    """
    gradients, loss, logp, parts = None, 0.0, [], {"val/clipfrac_avg": 0.0}
    real = experience.weights > 0
    for rows in row_slices(experience.weights.shape[0], settings.micro_batch_size):
        part = experience.rows(rows)
        value, cache = ppo_loss_forward(
            params, experience=part, config=config, settings=settings, kl_coef=kl_coef
        )
        dparams = ppo_loss_backward(1.0, cache, experience=part, settings=settings, kl_coef=kl_coef)
        gradients = dparams if gradients is None else tree_add(gradients, dparams)
        loss += float(value)
        logp.append(cache.logp)
        for name, term in cache.parts.items():
            parts[name] = parts.get(name, 0.0) + float(term)
        if settings.value_clip_eps:  # where the clipped error is the larger one, no slope is left
            clipped = (cache.value.slope == 0) & real[rows]
            parts["val/clipfrac_avg"] += float(clipped.sum()) / float(real.sum())
    return gradients, loss, get_xp(*logp).concatenate(logp), parts


def update_metrics(logp: Array, experience: Experience, settings: PPOConfig) -> dict[str, float]:
    """How far one update's policy is from the one that sampled, over real tokens."""
    mask = experience.batch.response_mask
    log_ratio = logp - experience.old_logp
    clamped, inside = clamp_log_ratio(log_ratio)
    ratio = get_xp(logp).exp(clamped)
    low, high = settings.clip_range
    outside = ((experience.advantages >= 0) & (ratio > 1 + high)) | (
        (experience.advantages < 0) & (ratio < 1 - low)
    )
    metrics = {
        "policy/approxkl_avg": masked_mean(0.5 * log_ratio * log_ratio, mask=mask),
        "policy/kl_old_k3_token": masked_mean(kl_estimate(log_ratio, "k3"), mask=mask),
        "policy/clipfrac_avg": masked_mean(outside.astype(logp.dtype), mask=mask),
        "val/ratio": masked_mean(ratio, mask=mask),
        "val/ratio_var": masked_var(ratio, mask=mask),
        "policy/clamped_log_ratios": ((mask > 0) & ~inside).sum(),
    }
    return {name: float(value) for name, value in metrics.items()}


def ppo_update(
    optimizer: Optimizer,
    experience: Experience,
    *,
    config: GPTConfig,
    settings: PPOConfig,
    kl_coef: float,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Epochs x minibatches of updates on one batch of experience; means of their metrics.

    Each epoch goes through the responses in a new order. With target_kl the epochs end early once
    the policy has moved 1.5 target_kl away from the one that sampled.
    """
    B = experience.weights.shape[0]
    size = -(-B // settings.minibatches)
    history: list[dict[str, float]] = []
    for _ in range(settings.epochs):
        order = rng.permutation(B)
        for rows in row_slices(B, size):
            minibatch = experience.rows(get_xp(experience.weights).asarray(order[rows]))
            minibatch = minibatch._replace(
                weights=token_weights(
                    minibatch.batch.response_mask,
                    mode=settings.aggregation,
                    constant=experience.weights.size / settings.minibatches,
                )
            )
            learning_rate = optimizer.learning_rate
            gradients, loss, logp, parts = minibatch_gradients(
                optimizer.params, minibatch, config=config, settings=settings, kl_coef=kl_coef
            )
            grad_norm = optimizer.step(gradients, loss=loss)
            metrics = update_metrics(logp, minibatch, settings)
            history.append({**metrics, **parts, "grad_norm": grad_norm, "lr": learning_rate})
            k3 = metrics["policy/kl_old_k3_token"]
            if settings.target_kl and k3 > 1.5 * settings.target_kl:
                return _mean(history)
    return _mean(history)


def next_kl_coef(kl_coef: float, *, kl_seq: float, settings: PPOConfig) -> float:
    """beta of the next iteration: fixed, or steered towards kl_target."""
    if not settings.kl_target:
        return kl_coef
    return adaptive_kl_coef(
        kl_coef,
        kl_seq=kl_seq,
        target=settings.kl_target,
        horizon=settings.kl_horizon,
        n_episodes=settings.batch_size,
    )


def _mean(history: list[dict[str, float]]) -> dict[str, float]:
    mean = {name: float(np.mean([h[name] for h in history])) for name in history[0]}
    mean["policy/clamped_log_ratios"] = sum(h["policy/clamped_log_ratios"] for h in history)
    mean["policy/updates"] = len(history)
    return mean
