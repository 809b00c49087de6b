"""What an iteration of PPO was like, by the names that the field uses; what is held out in the
stages before it; and the final table. Nothing here is trained on.

One number means the same everywhere: `objective/kl` is kl_seq, the penalty summed over a response
and averaged over responses [nats]; what is called _avg is a mean over tokens.
"""

import math
from collections import Counter
from dataclasses import replace
from itertools import cycle, islice, pairwise

import numpy as np

from minirlhf.backend import Array, get_xp, to_host
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.advantages import masked_mean, masked_var
from minirlhf.rlhf.kl import LOG_RATIO_LIMIT, clamp_log_ratio, kl_estimate, summed_penalty
from minirlhf.rlhf.logprobs import response_sum
from minirlhf.runs.session import Score, Session
from minirlhf.train import dpo, ppo
from minirlhf.train.batches import pad_batch, row_slices
from minirlhf.train.policy import policy_forward
from minirlhf.train.reward_model import Pair, RewardModel, calibration_error, score_responses
from minirlhf.train.rollout import Rollout, Samples, score_rollout
from minirlhf.train.settings import PPOConfig
from minirlhf.train.sft import Example
from minirlhf.tree import Tree

OTHER_COINS = 1_000_003  # beyond the seed: no stream of the training


def iteration_metrics(
    iteration: ppo.Iteration, *, settings: PPOConfig, stop_id: int
) -> dict[str, float]:
    """What a batch of samples was like, by the field's names, and `mean_of_updates`."""
    rollout, experience, updates, kl_coef, *_ = iteration
    mask, values, returns = rollout.batch.response_mask, rollout.values, experience.returns
    kl_token = ppo.rollout_penalty(rollout, settings)
    non_score_reward = -kl_coef * response_sum(kl_token, mask=mask).mean()
    score = ppo.final_score(rollout, settings=settings, stop_id=stop_id)
    cut = (mask > 0) & (rollout.old_logp - rollout.ref_logp < -LOG_RATIO_LIMIT)
    kl_seq = summed_penalty(rollout.old_logp, rollout.ref_logp, mask=mask)
    n_ended = ppo.ended(rollout, stop_id).sum()
    metrics = {
        "objective/kl": kl_seq.mean(),
        "objective/kl_sd": kl_seq.std(),
        "objective/kl_full_seq": response_sum(rollout.kl_full, mask=mask).mean(),
        "objective/clamped_log_ratios": cut.sum(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -response_sum(rollout.old_logp, mask=mask).mean(),
        "objective/non_score_reward": non_score_reward,
        "objective/scores": rollout.score.mean(),
        "objective/scores_sd": rollout.score.std(),
        "objective/rlhf_reward": score.mean() + non_score_reward,
        "policy/entropy_avg": masked_mean(rollout.entropy, mask=mask),
        "val/num_eos_tokens": n_ended,
        "response_length/mean": mask.sum(axis=1).mean(),
        "response_length/clip_ratio": 1.0 - n_ended / len(mask),
    }
    if settings.has_critic:
        metrics |= {
            "ppo/val/mean": masked_mean(values, mask=mask),
            "ppo/val/var": masked_var(values, mask=mask),
            "ppo/val/error": masked_mean((values - returns) * (values - returns), mask=mask),
            "ppo/val/var_explained": explained_variance(values, returns, mask=mask),
            "ppo/returns/mean": masked_mean(returns, mask=mask),
            "ppo/returns/var": masked_var(returns, mask=mask),
        }
        # while V and the KL are 0, the return k tokens before the last one is (gamma lam)^k score
        xp = get_xp(mask)
        k = xp.maximum(mask.sum(axis=1, keepdims=True) - 1 - xp.arange(mask.shape[1]), 0)
        of_score = (settings.gamma * settings.lam) ** k * score[:, None]
        metrics["ppo/returns/score_square"] = masked_mean(of_score * of_score, mask=mask)
    metrics |= _of_responses(rollout, stop_id)
    if rollout.samples.sampler_logp is not None:  # unbiased: the samples are the sampler's
        gap = rollout.samples.sampler_logp - rollout.old_logp
        metrics["policy/kl_sampler_k3_token"] = masked_mean(kl_estimate(gap, "k3"), mask=mask)
    metrics = {name: float(value) for name, value in metrics.items()}
    return metrics | mean_of_updates(updates, settings)


def mean_of_updates(updates: list[ppo.Update], settings: PPOConfig) -> dict[str, float]:
    """Means over the updates; the clamped log-ratios are counted; nan where none was made."""
    rows = [
        update_metrics(step, minibatch, settings) | applied for minibatch, step, applied in updates
    ]
    mean = {name: float(np.mean([row[name] for row in rows])) for name in (rows or [{}])[0]}
    clamped = sum(row["policy/clamped_log_ratios"] for row in rows)
    first = {"policy/approxkl_first": rows[0]["policy/approxkl_avg"]} if rows else {}
    counts = {"policy/clamped_log_ratios": clamped, "policy/updates": len(rows)}
    return mean | first | counts


def _of_responses(rollout: Rollout, stop_id: int) -> dict[str, Array]:
    """Are they drawn as they are scored; what repeats in them, and what the score goes along with.

    objective/surprise is the mean of sum_t (-log pi(y_t|.) - H(pi(.|s_t))), H the entropy: 0 up to
    its standard error where the responses are samples of pi, and of no other temperature or age.
    """
    mask, n = rollout.batch.response_mask, len(rollout.score)
    surprise = response_sum(-rollout.old_logp - rollout.entropy, mask=mask)
    score = to_host(rollout.score).astype(np.float64)
    plain = [[i for i in ids if i != stop_id] for ids in rollout.samples.response_ids]
    repeats = np.array([repeated_bigram_share(ids) for ids in plain])
    length = np.array([len(ids) for ids in plain], dtype=np.float64)
    return {
        "objective/surprise": surprise.mean(),
        "objective/surprise_se": surprise.std() / n**0.5,
        "response/repeated_bigrams": repeats.mean(),
        "response/distinct_2": distinct_2(plain),
        "response/corr_score_length": correlation(score, length),
        "response/corr_score_repeats": correlation(score, repeats),
    }


def repeated_bigram_share(ids: list[int]) -> float:
    """1 - distinct bigrams / bigrams inside one response: 0 when nothing repeats."""
    bigrams = list(zip(ids, ids[1:], strict=False))
    return 1.0 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def distinct_2(responses: list[list[int]]) -> float:
    """Distinct bigrams / bigrams of all responses together (Li et al. 2016, arXiv 1510.03055)."""
    counts = Counter(b for ids in responses for b in zip(ids, ids[1:], strict=False))
    return len(counts) / counts.total() if counts else 0.0


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else 0.0


def explained_variance(values: Array, returns: Array, *, mask: Array) -> float:
    """1 - mean (V - R)^2 / Var(R); nan where the returns do not vary, up to rounding."""
    error = masked_mean((values - returns) * (values - returns), mask=mask)
    variance = float(masked_var(returns, mask=mask))
    if not variance > 1e-12 * float(masked_mean(returns * returns, mask=mask)):
        return math.nan
    return 1.0 - float(error) / variance


def update_metrics(
    step: ppo.MinibatchGradient, experience: ppo.Experience, settings: PPOConfig
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


# -- held out, before PPO --------------------------------------------------------------------------
def sft_loss(
    params: Tree, examples: list[Example], *, config: GPTConfig, batch_size: int, **padding
) -> float:
    """Mean cross-entropy of the response tokens of all examples [nats per token]."""
    total = tokens = 0.0
    for rows in row_slices(len(examples), batch_size):
        prompts, responses = zip(*examples[rows], strict=True)
        batch = pad_batch(prompts, responses, config=config, **padding)
        logp = policy_forward(params, batch=batch, config=config, keep=False)[0].logp
        mask = batch.response_mask
        total -= float(get_xp(logp).where(mask > 0, logp, 0.0).sum())
        tokens += float(mask.sum())
    return total / tokens


def pair_metrics(
    params: Tree,
    pairs: list[Pair],
    gold_difference: np.ndarray | None = None,
    *,
    config: GPTConfig,
    **padding,
) -> dict[str, float]:
    """`margin_metrics` of pairs not learnt from, of neighbours in a list; and the loss."""
    rows = [(p.prompt, *two) for p in pairs for two in pairwise(p.replies)]
    prompts, *both = map(list, zip(*rows, strict=True))
    model = RewardModel(params, config)
    better, worse = (score_responses(model, prompts, replies, **padding) for replies in both)
    loss = float(np.logaddexp(0.0, worse - better).mean())
    return {"heldout/loss_reward_model": loss, **margin_metrics(better - worse, gold_difference)}


def margin_metrics(margin: np.ndarray, gold_difference: np.ndarray | None) -> dict[str, float]:
    """What is to be known of the margins, reward of the better - reward of the worse, of pairs.

    accuracy           share of pairs with a margin above 0
    calibration_error  ECE: mean |Pr predicted - share observed| over ten bins of sigma(margin)
    gold_accuracy      share ordered as the gold reward orders them (pairs with equal gold left out)
    """
    metrics = {
        "heldout/accuracy": float((margin > 0).mean()),
        "heldout/calibration_error": calibration_error(margin),
        "heldout/margin": float(margin.mean()),
    }
    if gold_difference is not None:
        differs = gold_difference != 0
        agree = (margin > 0) == (gold_difference > 0)
        metrics["heldout/gold_accuracy"] = float(agree[differs].mean()) if differs.any() else 0.0
    return metrics


def heldout_dpo(
    params: Tree, pairs: list[Pair], gold=None, *, settings: dpo.DPOConfig, **same
) -> dict[str, float]:
    """`margin_metrics` of the implicit rewards of pairs not learnt from; and the loss."""
    logp = dpo.reply_logps(params, pairs, **same)
    loss = dpo.dpo_metrics(logp, pairs, settings)[0]["loss/dpo"]
    chosen, rejected = settings.kl_coef * (logp - np.array([p.ref_logp for p in pairs]).T)
    return {"heldout/loss_dpo": float(loss), **margin_metrics(chosen - rejected, gold)}


# -- held out, at the end ------------------------------------------------------------------------
def response_metrics(rollout: Rollout, score: Score, *, stop_id: int) -> dict[str, float]:
    """The columns of the final table, means over responses; README.md says what they are."""
    samples, world = rollout.samples, score.world
    gold = world.golds(samples.prompts, samples.responses) if world.gold else math.nan
    mask = to_host(rollout.batch.response_mask) > 0
    log_ratio = to_host(rollout.old_logp - rollout.ref_logp).astype(np.float64)
    full = to_host(rollout.kl_full).astype(np.float64)
    plain = [[i for i in ids if i != stop_id] for ids in samples.response_ids]
    proxy = float(to_host(rollout.score).astype(np.float64).mean())
    return {
        "proxy": proxy,
        "gold": float(np.mean(gold)),
        "reward": score.model.raw(proxy) if world.reward else math.nan,
        "kl_seq": float(np.where(mask, log_ratio, 0.0).sum(axis=1).mean()),
        "kl_full_seq": float(np.where(mask, full, 0.0).sum(axis=1).mean()),
        "entropy": float(to_host(rollout.entropy)[mask].mean()),
        "length": float(mask.sum(axis=1).mean()),
        "distinct_2": distinct_2(plain),
        "repeated_bigrams": float(np.mean([repeated_bigram_share(ids) for ids in plain])),
        "ended": float(np.mean([stop_id in ids for ids in samples.response_ids])),
    }


def evaluate(
    session: Session, policy: Tree, reference: Tree, score: Score
) -> tuple[dict[str, float], Samples]:
    """Held-out metrics, one response a prompt, always with the same coins: two calls compare."""
    config = session.config
    prompts = list(islice(cycle(session.world.heldout_prompts), config.eval_prompts))
    settings = replace(config.ppo, kl_mode="reward_k1")  # keeps no whole distributions
    samples = session.fresh_samples(policy, prompts, config.seed + OTHER_COINS)
    same = {"score": score, "config": session.gpt, "settings": settings}
    rollout = score_rollout(policy, reference, samples, **same)
    return response_metrics(rollout, score, stop_id=session.tokenizer.eos), samples
