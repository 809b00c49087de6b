"""Stage 3: proximal policy optimisation and its kin, with a KL penalty to the reference.

    maximise E_{y ~ pi_theta} [ r(x, y) - beta sum_t (log pi_theta(y_t|.) - log pi_ref(y_t|.)) ]

`train_ppo` is the loop; what it calls stands below it, in the order of its lines. In the default
placement of the penalty only the clipped surrogate and the value loss are differentiated: beta is
inside the advantages, which are constants. Schulman et al. 2017, arXiv 1707.06347; Ziegler et al.
2019, arXiv 1909.08593.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from minirlhf.backend import Array, get_xp
from minirlhf.nn.heads import init_scalar_head
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf import kl, logprobs, objectives
from minirlhf.rlhf.advantages import (
    advantages_without_critic,
    gae,
    importance_weights,
    masked_mean,
    masked_whiten,
    token_rewards,
)
from minirlhf.train.batches import Batch
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.policy import PolicyCache, policy_backward, policy_forward
from minirlhf.train.rollout import Rollout, Samples, Scorer, score_rollout
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import Tree, tree_copy
from minirlhf.workers import sum_over


# -- the loop ------------------------------------------------------------------------------------
class Task(NamedTuple):
    """What a policy is trained on."""

    sample: Callable[[Tree], Samples]  # responses of a policy to a batch of prompts
    score: Scorer  # what they are worth
    stop_id: int  # the token that ends a response


class Iteration(NamedTuple):
    """What one turn of the loop leaves behind."""

    rollout: Rollout
    experience: "Experience"
    updates: list["Update"]
    kl_coef: float  # beta that was used [reward units per nat]
    next_kl_coef: float
    next_reference: Tree  # what the next turn is measured from


def train_ppo(
    optimizer: Optimizer,
    reference: Tree,
    task: Task,
    *,
    config: GPTConfig,
    settings: PPOConfig,
    rng: np.random.Generator,
    kl_coef: float | None = None,
) -> Iterator[Iteration]:
    """The loop of RLHF: sample, score, penalise, advantages, epochs of clipped updates, next beta.

    Args:     optimizer: owns the policy; after a resume it says how many updates have been made.
              reference: the frozen copy that the penalty is measured from.
              rng: of the minibatches.
              kl_coef: beta to go on with; None: settings.kl_coef.
    Yields:
        an Iteration, until all of settings.iterations are done.
    """
    same = {"config": config, "settings": settings}
    beta = settings.kl_coef if kl_coef is None else kl_coef
    while optimizer.updates < settings.iterations * settings.updates_per_iteration:
        policy = optimizer.params  # pi_old while we sample and score, pi_theta in the updates
        samples = task.sample(policy)  # y ~ pi_old(.|x)
        rollout = score_rollout(policy, reference, samples, score=task.score, **same)
        experience = make_experience(  # -beta kl_token + score -> advantages
            rollout, settings=settings, kl_coef=beta, stop_id=task.stop_id
        )
        updates = ppo_update(optimizer, experience, rng=rng, **same)
        next_beta = next_kl_coef(beta, rollout=rollout, settings=settings)
        following = next_reference(reference, optimizer, settings)
        yield Iteration(rollout, experience, updates, beta, next_beta, following)
        beta, reference = next_beta, following


def new_policy(reference: Tree, settings: PPOConfig, *, rng: np.random.Generator) -> Optimizer:
    """The optimiser of a copy of the reference; its critic, if any, says 0 everywhere."""
    wte, params = reference["transformer"]["wte"], dict(reference)
    if settings.has_critic:
        head = init_scalar_head(wte.shape[1], std=0.0, rng=rng, dtype=wte.dtype)
        params["value_head"] = {name: get_xp(wte).asarray(array) for name, array in head.items()}
    total = settings.iterations * settings.updates_per_iteration
    return Optimizer(params, settings.optimizer, total_steps=total)


# -- from a rollout to advantages ----------------------------------------------------------------
class Experience(NamedTuple):
    """A rollout, or rows of it, with everything the loss holds constant. Arrays are (B, T).

    The weights are those of the whole batch; `ppo_update` makes them anew for each minibatch.
    """

    batch: Batch
    old_logp: Array
    ref_logp: Array
    ref_logits: Array | None  # (B, T, V)
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
        constant, T = ("batch", "kl_loss_coef"), batch.responses.shape[1]
        arrays = {name: a for name, a in self._asdict().items() if name not in constant}
        picked = {name: a if a is None else a[index][:, :T] for name, a in arrays.items()}
        return self._replace(batch=batch, **picked)


def make_experience(
    rollout: Rollout, *, settings: PPOConfig, kl_coef: float, stop_id: int
) -> Experience:
    """Token rewards, advantages and returns of a rollout.

    A penalty in the reward uses the rollout's log-probs and is constant over the epochs. One in
    the loss stands beside the advantages: its beta is divided by whatever whitening divided the
    rewards and the advantages by, so that beta means the same in both places. (What GRPO divides
    by differs from prompt to prompt, and its beta is not divided.)

    Args:     kl_coef: beta [reward units per nat].
    """
    mask, values, s = rollout.batch.response_mask, rollout.values, settings
    score = final_score(rollout, settings=s, stop_id=stop_id)
    kl_token = rollout_penalty(rollout, s)
    rewards = token_rewards(score, kl_token, mask=mask, kl_coef=kl_coef)
    reward_scale = advantage_scale = 1.0
    if s.whiten_rewards:
        rewards, reward_scale = masked_whiten(rewards, mask=mask, shift_mean=False)
    if s.has_critic:
        advantages, returns = gae(rewards, values, mask=mask, gamma=s.gamma, lam=s.lam)
    else:
        form = {"form": s.advantages, "samples_per_prompt": s.samples_per_prompt}
        advantages, returns = advantages_without_critic(rewards, mask=mask, **form), values  # all 0
    if s.whiten_advantages:
        advantages, advantage_scale = masked_whiten(advantages, mask=mask)
    if s.importance != "none":
        pair, form = (rollout.old_logp, rollout.samples.sampler_logp), {"form": s.importance}
        advantages *= importance_weights(*pair, mask=mask, cap=s.importance_cap, **form)
    return Experience(
        batch=rollout.batch,
        old_logp=rollout.old_logp,
        ref_logp=rollout.ref_logp,
        ref_logits=rollout.ref_logits,
        old_values=values,
        advantages=advantages,
        returns=returns,
        weights=objectives.token_weights(mask, mode=s.aggregation),
        kl_loss_coef=kl_coef / (reward_scale * advantage_scale),
    )


def final_score(rollout: Rollout, *, settings: PPOConfig, stop_id: int) -> Array:
    """(B,) the score cut to [-c, c], less the penalty for a missing stop token."""
    xp, bound = get_xp(rollout.score), settings.score_clip
    score = xp.clip(rollout.score, -bound, bound) if bound else rollout.score
    missing = 1.0 - ended(rollout, stop_id).astype(score.dtype)
    return score - settings.missing_eos_penalty * missing


def ended(rollout: Rollout, stop_id: int) -> Array:
    """(B,) boolean: did the response reach its stop token?"""
    return ((rollout.batch.responses == stop_id) & (rollout.batch.response_mask > 0)).any(axis=1)


def rollout_penalty(rollout: Rollout, settings: PPOConfig) -> Array:
    """(B, T) what `kl_mode` takes off the reward of each token, before beta [nats]."""
    log_ratio = rollout.old_logp - rollout.ref_logp
    return kl.penalty_in_reward(settings.kl_mode, log_ratio=log_ratio, kl_full=rollout.kl_full)


# -- the updates ---------------------------------------------------------------------------------
class Update(NamedTuple):
    """One step of the optimiser, for the metrics."""

    minibatch: Experience
    step: "MinibatchGradient"  # without its gradients
    applied: dict[str, float]  # terms of the loss, grad_norm, lr


def ppo_update(
    optimizer: Optimizer,
    experience: Experience,
    *,
    config: GPTConfig,
    settings: PPOConfig,
    rng: np.random.Generator,
) -> list[Update]:
    """Epochs x minibatches of updates on one batch of experience.

    Each epoch goes through the responses in a new order. With target_kl no further update is made
    once the policy has moved 1.5 target_kl away from the one that sampled; the learning rate goes
    on as if all had been made.
    """
    xp, B = get_xp(experience.weights), experience.weights.shape[0]
    constant = B / settings.minibatches * config.n_ctx  # the denominator of seq-mean-token-sum-norm
    updates: list[Update] = []
    for _ in range(settings.epochs):
        for rows in np.array_split(rng.permutation(B), settings.minibatches):
            minibatch = experience.rows(xp.asarray(rows))
            mask = minibatch.batch.response_mask
            weights = objectives.token_weights(mask, mode=settings.aggregation, constant=constant)
            minibatch = minibatch._replace(weights=weights)
            step = minibatch_gradients(
                optimizer.params, minibatch, config=config, settings=settings
            )
            if settings.target_kl and kl_from_old(step, minibatch) > 1.5 * settings.target_kl:
                optimizer.skip(settings.updates_per_iteration - len(updates))
                return updates
            applied = optimizer.step(step.gradients, loss=step.loss, parts=step.parts)
            kept = minibatch._replace(ref_logits=None), step._replace(gradients=None)
            updates.append(Update(*kept, applied))
    return updates


def kl_from_old(step: "MinibatchGradient", minibatch: Experience) -> float:
    """Mean over tokens of k3(old_logp - logp): an unbiased estimate of KL(old || theta).

    The samples are old's, so the log-ratio is old's over theta's and not the other way round.
    """
    estimate = kl.kl_estimate(minibatch.old_logp - step.logp, "k3")
    return float(masked_mean(estimate, mask=minibatch.batch.response_mask))


class MinibatchGradient(NamedTuple):
    gradients: Tree | None
    loss: Array  # (); nobody has waited for it
    logp: Array  # (B, T) of the current policy
    values: Array  # (B, T)
    clipped: Array  # (B, T) boolean: the objective does not follow the ratio
    parts: dict[str, Array]  # terms of the loss ()


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
        total["loss"],
        total["logp"],
        total["values"],
        total["clipped"] > 0,
        total["parts"],
    )


def _micro_batch(
    params: Tree,
    part: tuple[Array, Experience],
    *,
    shape: tuple[int, int],
    config: GPTConfig,
    settings: PPOConfig,
) -> Tree:
    """What some rows add to everything that is summed over the minibatch; `shape` is its (B, T)."""
    rows, experience = part
    loss, cache = ppo_loss_forward(params, experience=experience, config=config, settings=settings)
    xp, T = get_xp(cache.logp), cache.logp.shape[1]
    tokens = {"logp": cache.logp, "clipped": cache.surrogate.clipped}
    tokens["values"] = experience.old_values if cache.values is None else cache.values
    term = {"loss": loss, "parts": cache.parts, "gradients": ppo_loss_backward(1.0, cache)}
    for name, array in tokens.items():
        term[name] = xp.zeros(shape, dtype=cache.logp.dtype)
        term[name][rows, :T] = array
    return term


# -- the loss ------------------------------------------------------------------------------------
class PPOLossCache(NamedTuple):
    policy: PolicyCache
    surrogate: objectives.PPOClipCache | objectives.GSPOCache | objectives.CISPOCache
    value: objectives.ValueLossCache | None  # only with a critic
    penalty: objectives.KLLossCache | None  # only where `kl_mode` puts it into the loss
    entropy: logprobs.EntropyCache | None
    entropy_sum: objectives.WeightedSumCache | None
    settings: PPOConfig
    kl_loss_coef: Array | float
    logp: Array  # for the metrics
    values: Array | None  # for the metrics
    parts: dict[str, Array]  # the terms of the loss


def ppo_loss_forward(
    params: Tree, *, experience: Experience, config: GPTConfig, settings: PPOConfig
) -> tuple[Array, PPOLossCache]:
    """loss = L_clip + vf_coef L_V + beta L_KL - ent_coef H, each a weighted sum over tokens.

    L_clip is the one of SURROGATES that `ratio` names; L_V is there only with a critic, and L_KL
    only if `kl_mode` puts the penalty into the loss. In the default placement the
    penalty is inside the advantages of L_clip, constants, and no term of its own: what reaches the
    logits is dz_a = -w ratio A (1[a = y] - P_a) / tau where the clip lets it through, 0 elsewhere.

    Args:     params: {"transformer": ..., "value_head": ...}.
    Returns:  loss (), cache.
    """
    batch, weights, tau = experience.batch, experience.weights, settings.temperature
    out, policy = policy_forward(
        params,
        batch=batch,
        config=config,
        temperature=tau,
        keep_logits=bool(settings.ent_coef or kl.KL_MODES[settings.kl_mode].in_loss),
    )
    surrogate_forward, _ = objectives.SURROGATES[settings.ratio]
    loss, surrogate = surrogate_forward(
        out.logp,
        old_logp=experience.old_logp,
        advantages=experience.advantages,  # -beta kl_token is in here
        weights=weights,
        **settings.clipping,
    )
    parts, value = {"loss/policy_avg": loss}, None
    if out.values is not None:
        parts["loss/value_avg"], value = objectives.value_loss_forward(
            out.values,
            old_values=experience.old_values,
            returns=experience.returns,
            weights=weights,
            clip_eps=settings.value_clip_eps or None,
        )
        loss = loss + settings.vf_coef * parts["loss/value_avg"]
    penalty = entropy_cache = entropy_sum = None
    if kl.KL_MODES[settings.kl_mode].in_loss:
        kl_loss, penalty = objectives.kl_loss_forward(
            out.logits,
            out.logp,
            kl_mode=settings.kl_mode,
            old_logp=experience.old_logp,
            ref_logp=experience.ref_logp,
            ref_logits=experience.ref_logits,
            weights=weights,
            temperature=tau,
        )
        loss = loss + experience.kl_loss_coef * kl_loss
        parts["loss/kl_avg"] = kl_loss
    if settings.ent_coef:
        entropy, entropy_cache = logprobs.entropy_forward(out.logits, temperature=tau)
        bonus, entropy_sum = objectives.weighted_sum_forward(entropy, weights=weights)
        loss = loss - settings.ent_coef * bonus
    caches = policy, surrogate, value, penalty, entropy_cache, entropy_sum  # as the fields
    constants = settings, experience.kl_loss_coef
    return loss, PPOLossCache(*caches, *constants, out.logp, out.values, parts)


def ppo_loss_backward(dloss: Array | float, cache: PPOLossCache) -> Tree:
    """dL/dparams: the terms of the loss undone, added up on logits, log-probs and values."""
    _, surrogate_backward = objectives.SURROGATES[cache.settings.ratio]
    dlogp = surrogate_backward(dloss, cache.surrogate)
    dlogits = dvalues = None
    if cache.value is not None:
        dvalues = objectives.value_loss_backward(dloss * cache.settings.vf_coef, cache.value)
    if cache.penalty is not None:
        dkl = dloss * cache.kl_loss_coef
        dlogits, dlogp_penalty = objectives.kl_loss_backward(dkl, cache.penalty)
        dlogp += dlogp_penalty
    if cache.entropy is not None:
        dbonus = -dloss * cache.settings.ent_coef  # a bonus is taken off the loss
        dentropy = objectives.weighted_sum_backward(dbonus, cache.entropy_sum)
        dlogits_entropy = logprobs.entropy_backward(dentropy, cache.entropy)
        dlogits = dlogits_entropy if dlogits is None else dlogits + dlogits_entropy
    return policy_backward(dlogits, dlogp, dvalues, cache.policy)


# -- the next beta, the next reference -----------------------------------------------------------
def next_kl_coef(kl_coef: float, *, rollout: Rollout, settings: PPOConfig) -> float:
    """beta of the next iteration: fixed, or steered towards kl_target."""
    if not settings.kl_target:
        return kl_coef
    mask = rollout.batch.response_mask
    return kl.adaptive_kl_coef(
        kl_coef,
        kl_seq=float(kl.summed_penalty(rollout.old_logp, rollout.ref_logp, mask=mask).mean()),
        target=settings.kl_target,
        horizon=settings.kl_horizon,
        n_episodes=settings.batch_size,
    )


def next_reference(reference: Tree, optimizer: Optimizer, settings: PPOConfig) -> Tree:
    """The reference itself; every `reset_reference_every` iterations a copy of the policy.

    n resets, each at the optimum, end where beta / n would: ref exp(r / beta) is the next ref.
    """
    every = settings.reset_reference_every * settings.updates_per_iteration
    if not every or optimizer.updates % every:
        return reference
    return {"transformer": tree_copy(optimizer.params["transformer"])}
