"""Stage 3: proximal policy optimisation with a KL penalty to the reference.

One iteration:  sample  ->  score  ->  token rewards  ->  advantages  ->  epochs of clipped updates.

    maximise E_{y ~ pi_theta} [ r(x, y) - beta sum_t (log pi_theta(y_t|.) - log pi_ref(y_t|.)) ]
"""

import functools
from typing import NamedTuple

import numpy as np

from minirlhf.backend import Array, get_xp
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.advantages import gae, masked_mean, masked_var, masked_whiten, token_rewards
from minirlhf.rlhf.kl import (
    KL_MODES,
    LOG_RATIO_LIMIT,
    adaptive_kl_coef,
    clamp_log_ratio,
    kl_estimate,
    penalty_in_reward,
    summed_penalty,
)
from minirlhf.rlhf.logprobs import EntropyCache, entropy_backward, entropy_forward, response_sum
from minirlhf.rlhf.objectives import (
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
from minirlhf.train.batches import Batch
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.policy import PolicyCache, policy_backward, policy_forward
from minirlhf.train.rollout import Rollout
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import Tree
from minirlhf.workers import sum_over


class Experience(NamedTuple):
    """A rollout, or rows of it, with everything the loss holds constant. Arrays are (B, R).

    The weights are those of the whole batch; `ppo_update` makes them anew for each minibatch.
    """

    batch: Batch
    old_logp: Array
    ref_logp: Array
    ref_logits: Array | None  # (B, R, V)
    old_values: Array
    advantages: Array
    returns: Array
    weights: Array  # of each token in the loss
    kl_loss_coef: Array | float  # beta in the units of the (whitened) advantages, per nat

    def rows(self, index) -> "Experience":
        """The sequences that `index` picks; the weights stay as they are."""
        return self._of(self.batch.rows(index), index)

    def part(self, index) -> "Experience":
        """`rows` in as few columns as they need: Batch.part."""
        return self._of(self.batch.part(index), index)

    def _of(self, batch: Batch, index) -> "Experience":
        constant, R = ("batch", "kl_loss_coef"), batch.responses.shape[1]
        arrays = {name: a for name, a in self._asdict().items() if name not in constant}
        picked = {name: a if a is None else a[index][:, :R] for name, a in arrays.items()}
        return self._replace(batch=batch, **picked)


class PPOLossCache(NamedTuple):
    policy: PolicyCache
    clip: PPOClipCache
    value: ValueLossCache
    kl: KLLossCache | None
    entropy: EntropyCache | None
    entropy_sum: WeightedSumCache | None
    settings: PPOConfig
    kl_loss_coef: Array | float
    logp: Array  # for the metrics
    values: Array  # for the metrics
    parts: dict[str, Array]  # the terms of the loss


def ppo_loss_forward(
    params: Tree, *, experience: Experience, config: GPTConfig, settings: PPOConfig
) -> tuple[Array, PPOLossCache]:
    """loss = L_clip + vf_coef L_V + beta L_KL - ent_coef H, each a weighted sum over tokens.

    L_KL is there only if `kl_mode` puts the penalty into the loss.

    Args:
        params: {"transformer": ..., "value_head": ...}.
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
        loss = loss + e.kl_loss_coef * kl_loss
        parts["loss/kl_avg"] = kl_loss
    if s.ent_coef:
        entropy, entropy_cache = entropy_forward(out.logits, temperature=s.temperature)
        bonus, entropy_sum = weighted_sum_forward(entropy, weights=e.weights)
        loss = loss - s.ent_coef * bonus
    terms = (policy, clip, value, kl, entropy_cache, entropy_sum)
    return loss, PPOLossCache(*terms, s, e.kl_loss_coef, out.logp, out.values, parts)


def ppo_loss_backward(dloss: Array | float, cache: PPOLossCache) -> Tree:
    """dL/dparams: the terms of the loss undone, added up on logits, log-probs and values."""
    dlogp = ppo_clip_backward(dloss, cache.clip)
    dvalues = value_loss_backward(dloss * cache.settings.vf_coef, cache.value)
    dlogits = None
    if cache.kl is not None:
        dlogits, dlogp_kl = kl_loss_backward(dloss * cache.kl_loss_coef, cache.kl)
        dlogp += dlogp_kl
    if cache.entropy is not None:
        dentropy = weighted_sum_backward(-dloss * cache.settings.ent_coef, cache.entropy_sum)
        dlogits_entropy = entropy_backward(dentropy, cache.entropy)
        dlogits = dlogits_entropy if dlogits is None else dlogits + dlogits_entropy
    return policy_backward(dlogits, dlogp, dvalues, cache.policy)


def ended(rollout: Rollout, stop_id: int) -> Array:
    """(B,) boolean: did the response reach its stop token?"""
    return ((rollout.batch.responses == stop_id) & (rollout.batch.response_mask > 0)).any(axis=1)


def final_score(rollout: Rollout, *, settings: PPOConfig, stop_id: int) -> Array:
    """(B,) the score cut to [-c, c], less the penalty for a missing stop token."""
    xp, c = get_xp(rollout.score), settings.score_clip
    score = xp.clip(rollout.score, -c, c) if c else rollout.score
    missing = 1.0 - ended(rollout, stop_id).astype(score.dtype)
    return score - settings.missing_eos_penalty * missing


def rollout_penalty(rollout: Rollout, settings: PPOConfig) -> Array:
    """(B, R) what `kl_mode` takes off the reward of each token, before beta [nats]."""
    log_ratio = rollout.old_logp - rollout.ref_logp
    return penalty_in_reward(settings.kl_mode, log_ratio=log_ratio, kl_full=rollout.kl_full)


def make_experience(
    rollout: Rollout, *, settings: PPOConfig, kl_coef: float, stop_id: int
) -> Experience:
    """Token rewards, advantages and returns of a rollout.

    A penalty in the reward uses the rollout's log-probs and is constant over the epochs. One in
    the loss stands beside the advantages: its beta is divided by whatever whitening divided the
    rewards and the advantages by, so that beta means the same in both places.

    Args:
        kl_coef: beta [reward units per nat].
    """
    s, mask = settings, rollout.batch.response_mask
    score = final_score(rollout, settings=s, stop_id=stop_id)
    rewards = token_rewards(score, rollout_penalty(rollout, s), mask=mask, kl_coef=kl_coef)
    reward_scale = advantage_scale = 1.0
    if s.whiten_rewards:
        rewards, reward_scale = masked_whiten(rewards, mask=mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.values, mask=mask, gamma=s.gamma, lam=s.lam)
    if s.whiten_advantages:
        advantages, advantage_scale = masked_whiten(advantages, mask=mask)
    return Experience(
        batch=rollout.batch,
        old_logp=rollout.old_logp,
        ref_logp=rollout.ref_logp,
        ref_logits=rollout.ref_logits,
        old_values=rollout.values,
        advantages=advantages,
        returns=returns,
        weights=token_weights(mask, mode=s.aggregation),
        kl_loss_coef=kl_coef / (reward_scale * advantage_scale),
    )


def rollout_metrics(
    rollout: Rollout, experience: Experience, *, settings: PPOConfig, kl_coef: float, stop_id: int
) -> dict[str, float]:
    """What a batch of samples was like, by the field's names; `objective/kl` is kl_seq [nats]."""
    mask, values, returns = rollout.batch.response_mask, rollout.values, experience.returns
    penalty = rollout_penalty(rollout, settings)
    non_score_reward = -kl_coef * response_sum(penalty, mask=mask).mean()
    score = final_score(rollout, settings=settings, stop_id=stop_id).mean()
    cut = (mask > 0) & (rollout.old_logp - rollout.ref_logp < -LOG_RATIO_LIMIT)
    error = masked_mean((values - returns) * (values - returns), mask=mask)
    returns_var = masked_var(returns, mask=mask)
    metrics = {
        "objective/kl": summed_penalty(rollout.old_logp, rollout.ref_logp, mask=mask).mean(),
        "objective/kl_full_seq": response_sum(rollout.kl_full, mask=mask).mean(),
        "objective/clamped_log_ratios": cut.sum(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -response_sum(rollout.old_logp, mask=mask).mean(),
        "objective/non_score_reward": non_score_reward,
        "objective/scores": rollout.score.mean(),
        "objective/scores_sd": rollout.score.std(),
        "objective/rlhf_reward": score + non_score_reward,
        "policy/entropy_avg": masked_mean(rollout.entropy, mask=mask),
        "ppo/val/mean": masked_mean(values, mask=mask),
        "ppo/val/var": masked_var(values, mask=mask),
        "ppo/val/error": error,
        "ppo/val/var_explained": 1.0 - error / max(float(returns_var), 1e-12),
        "ppo/returns/mean": masked_mean(returns, mask=mask),
        "ppo/returns/var": returns_var,
        "val/num_eos_tokens": ended(rollout, stop_id).sum(),
        "response_length/mean": mask.sum(axis=1).mean(),
    }
    return {name: float(value) for name, value in metrics.items()}


class MinibatchGradient(NamedTuple):
    gradients: Tree
    loss: float
    logp: Array  # (B, R) of the current policy
    values: Array  # (B, R)
    clipped: Array  # (B, R) boolean: the objective does not follow the ratio
    parts: dict[str, float]  # terms of the loss


def minibatch_gradients(
    params: Tree, experience: Experience, *, config: GPTConfig, settings: PPOConfig
) -> MinibatchGradient:
    """Loss and gradient of one minibatch, summed over micro-batches.

    The weights of the tokens were made for the whole minibatch, so losses and gradients of its
    parts add up to those of the whole, whatever the lengths of the responses.
    """
    groups = experience.batch.groups(size=settings.micro_batch_size, config=config)
    f = functools.partial(
        _micro_batch, params, shape=experience.weights.shape, config=config, settings=settings
    )
    total = sum_over(f, [(rows, experience.part(rows)) for rows in groups])
    return MinibatchGradient(
        total["gradients"],
        float(total["loss"]),
        total["logp"],
        total["values"],
        total["clipped"] > 0,
        {name: float(term) for name, term in total["parts"].items()},
    )


def _micro_batch(
    params: Tree,
    part: tuple[Array, Experience],
    *,
    shape: tuple[int, int],
    config: GPTConfig,
    settings: PPOConfig,
) -> Tree:
    """What some rows add to everything that is summed over the minibatch; `shape` is its (B, R)."""
    rows, experience = part
    loss, cache = ppo_loss_forward(params, experience=experience, config=config, settings=settings)
    xp, R = get_xp(cache.logp), cache.logp.shape[1]
    tokens = {"logp": cache.logp, "values": cache.values, "clipped": cache.clip.clipped}
    term = {"loss": loss, "parts": cache.parts, "gradients": ppo_loss_backward(1.0, cache)}
    for name, array in tokens.items():
        term[name] = xp.zeros(shape, dtype=cache.logp.dtype)
        term[name][rows, :R] = array
    return term


def update_metrics(
    step: MinibatchGradient, experience: Experience, settings: PPOConfig
) -> dict[str, float]:
    """How far the policy and its values are from those that sampled, over real tokens.

    policy/kl_old_k3_token is an unbiased estimate of KL(old || theta): the samples are old's, so
    its log-ratio is old_logp - logp.
    """
    e, mask = experience, experience.batch.response_mask
    xp = get_xp(step.logp, step.values, mask)
    log_ratio = step.logp - e.old_logp
    clamped, inside = clamp_log_ratio(log_ratio)
    ratio = xp.exp(clamped)
    eps = settings.value_clip_eps or float("inf")
    moved = step.values - e.old_values
    edge = e.old_values + xp.clip(moved, -eps, eps)
    larger = xp.abs(edge - e.returns) > xp.abs(step.values - e.returns)
    value_clipped = (xp.abs(moved) > eps) & larger
    metrics = {
        "policy/approxkl_avg": masked_mean(0.5 * log_ratio * log_ratio, mask=mask),
        "policy/kl_old_k3_token": masked_mean(kl_estimate(-log_ratio, "k3"), mask=mask),
        "policy/clipfrac_avg": masked_mean(step.clipped.astype(mask.dtype), mask=mask),
        "val/clipfrac_avg": masked_mean(value_clipped.astype(mask.dtype), mask=mask),
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
    rng: np.random.Generator,
) -> dict[str, float]:
    """Epochs x minibatches of updates on one batch of experience; means of their metrics.

    Each epoch goes through the responses in a new order. With target_kl no further update is made
    once the policy has moved 1.5 target_kl away from the one that sampled; the learning rate goes
    on as if all had been made.
    """
    xp, n_updates = get_xp(experience.weights), settings.epochs * settings.minibatches
    constant = experience.weights.shape[0] / settings.minibatches * config.n_ctx
    history: list[dict[str, float]] = []
    for _ in range(settings.epochs):
        order = rng.permutation(experience.weights.shape[0])
        for rows in np.array_split(order, settings.minibatches):
            minibatch = experience.rows(xp.asarray(rows))
            mask = minibatch.batch.response_mask
            weights = token_weights(mask, mode=settings.aggregation, constant=constant)
            minibatch = minibatch._replace(weights=weights)
            step = minibatch_gradients(
                optimizer.params, minibatch, config=config, settings=settings
            )
            metrics = update_metrics(step, minibatch, settings)
            moved = metrics["policy/kl_old_k3_token"]
            if settings.target_kl and moved > 1.5 * settings.target_kl:
                optimizer.skip(n_updates - len(history))
                return _mean(history)
            learning_rate = optimizer.learning_rate
            grad_norm = optimizer.step(step.gradients, loss=step.loss)
            history.append({**metrics, **step.parts, "grad_norm": grad_norm, "lr": learning_rate})
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
