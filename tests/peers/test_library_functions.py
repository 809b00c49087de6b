"""Single functions against the conventions of the field, written again in PyTorch from formulas.

Sequences are handled one by one without padding, masks by indexing, sums by explicit discount
matrices: nothing here has the shape of the code it checks. Where libraries differ, the test names
the convention that is meant and shows the number of another one to be different:

    variance in whitening     biased (lm-human-preferences), not the unbiased one of TRL
    value loss                1/2 max(..), the mean over tokens
    score                     on the last response token, not on the one after it
    V after a cut-off         0
    KL of the controller      summed over the response, in nats
"""

import decimal
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from minirlhf.nn.attention import attention_backward, attention_forward, causal_mask
from minirlhf.nn.layers import gelu_backward, gelu_forward, layernorm_backward, layernorm_forward
from minirlhf.rlhf.advantages import gae, masked_mean, masked_var, masked_whiten, token_rewards
from minirlhf.rlhf.kl import (
    ESTIMATORS,
    adaptive_kl_coef,
    expm1_minus,
    full_kl_backward,
    full_kl_forward,
    kl_estimate,
    summed_penalty,
)
from minirlhf.rlhf.logprobs import (
    entropy_backward,
    entropy_forward,
    log_softmax,
    token_logprobs_backward,
    token_logprobs_forward,
)
from minirlhf.rlhf.objectives import (
    AGGREGATIONS,
    token_weights,
    value_loss_backward,
    value_loss_forward,
    weighted_sum_forward,
)
from minirlhf.rlhf.preferences import (
    bradley_terry_backward,
    bradley_terry_forward,
    log_sigmoid,
    sigmoid,
)
from minirlhf.runs.metrics import calibration_error, iteration_metrics, update_metrics
from minirlhf.train.batches import Batch
from minirlhf.train.ppo import Experience, Iteration, MinibatchGradient, make_experience
from minirlhf.train.reward_model import RewardModel, normalized
from minirlhf.train.rollout import Rollout, Samples
from minirlhf.train.settings import PPOConfig

pytestmark = pytest.mark.peers
torch.set_num_threads(1)

LENGTHS = (4, 7, 1, 5, 7, 2)
MASK = (np.arange(7) < np.array(LENGTHS)[:, None]).astype(np.float64)
RTOL = 1e-12


def assert_close(ours, theirs, rtol=RTOL):
    """The largest difference, as a share of the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and np.isfinite(theirs).all()
    assert np.abs(ours - theirs).max() <= rtol * np.abs(theirs).max()


def noise(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def with_junk(x):
    """Large finite numbers at padding."""
    return np.where(MASK > 0, x, 1e6 * noise(*x.shape, seed=99))


def rows(x):
    """Each response's numbers, without padding."""
    return [torch.tensor(row[:n]) for row, n in zip(x, LENGTHS, strict=True)]


def padded(sequences):
    return np.stack([F.pad(s, (0, MASK.shape[1] - len(s))).numpy() for s in sequences])


# -- from scores to advantages -------------------------------------------------------------------


def loop_gae(rewards, values, gamma, lam):
    """The backward loop of lm-human-preferences and most others, on one unpadded sequence."""
    advantages, next_advantage = [], 0.0
    for t in range(len(rewards) - 1, -1, -1):
        value_after = values[t + 1] if t + 1 < len(values) else 0.0
        delta = rewards[t] + gamma * value_after - values[t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages.insert(0, next_advantage)
    return torch.stack(advantages)


def mixed_returns(rewards, values, gamma, lam):
    """(1 - lam) sum_k lam^(k-1) (k-step return) - V: the definition of Schulman et al., eq. 16."""
    n = len(rewards)
    advantages = []
    for t in range(n):
        total = torch.zeros(()).double()
        for k in range(1, n - t + 1):
            end = t + k
            k_step = sum(gamma**i * rewards[t + i] for i in range(k))
            if end < n:
                k_step = k_step + gamma**k * values[end]
                weight = (1 - lam) * lam ** (k - 1)
            else:  # the episode has ended: all longer returns are this one
                weight = lam ** (k - 1)
            total = total + weight * (k_step - values[t])
        advantages.append(total)
    return torch.stack(advantages)


@pytest.mark.parametrize("definition", [loop_gae, mixed_returns])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (1.0, 1.0), (0.97, 0.6)])
def test_gae(definition, gamma, lam):
    rewards, values = noise(*MASK.shape, seed=1), noise(*MASK.shape, seed=2)
    advantages, returns = gae(
        with_junk(rewards), with_junk(values), mask=MASK, gamma=gamma, lam=lam
    )
    theirs = padded(
        [definition(r, v, gamma, lam) for r, v in zip(rows(rewards), rows(values), strict=True)]
    )
    assert_close(advantages, theirs)
    assert_close(returns, theirs + values * MASK)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_rewards(estimator):
    """-beta kl at every token, the score on the last one: EOS itself, or the last before a cut."""
    logp, ref_logp, score = noise(*MASK.shape, seed=1), noise(*MASK.shape, seed=2), noise(6, seed=3)
    kl_token = kl_estimate(logp - ref_logp, estimator)
    ours = token_rewards(score, with_junk(kl_token), mask=MASK, kl_coef=0.15)
    theirs = []
    for d, s in zip(rows(logp - ref_logp), score, strict=True):
        kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
        rewards = -0.15 * kl
        rewards[-1] += s
        theirs.append(rewards)
    assert_close(ours, padded(theirs))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean):
    """(x - mean) rsqrt(biased variance + 1e-8), the mean added back without shift_mean."""
    x = 3.0 + 2.0 * noise(*MASK.shape, seed=1)
    white, scale = masked_whiten(with_junk(x), mask=MASK, shift_mean=shift_mean)
    values = torch.cat(rows(x))
    var, mean = torch.var_mean(values, correction=0)
    theirs = (values - mean) * torch.rsqrt(var + 1e-8) + (0.0 if shift_mean else mean)
    assert_close(white[MASK > 0], theirs)
    assert (white[MASK == 0] == 0).all()
    assert_close(scale, (var + 1e-8).sqrt())
    assert_close(masked_mean(with_junk(x), mask=MASK), mean)
    assert_close(masked_var(with_junk(x), mask=MASK), var)
    unbiased = torch.var(values)
    assert abs(scale**2 / unbiased - 1) > 0.03  # TRL's and verl's is another number


def test_whitening_of_one_token_is_finite():
    """The unbiased variance of one number is nan; the biased one is 0."""
    white, _ = masked_whiten(np.array([[5.0, 9.0]]), mask=np.array([[1.0, 0.0]]))
    assert (white == 0).all()


@pytest.mark.parametrize("eps", [0.2, 0.05, None])
def test_value_loss(eps):
    """1/2 mean max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2), and its gradient."""
    values, old, returns = (noise(*MASK.shape, seed=i, scale=0.5) for i in (1, 2, 3))
    weights = token_weights(MASK)
    ours, cache = value_loss_forward(
        with_junk(values),
        old_values=with_junk(old),
        returns=with_junk(returns),
        weights=weights,
        clip_eps=eps,
    )
    V = torch.tensor(values, requires_grad=True)
    kept = torch.tensor(MASK).bool()
    v, v_old, target = V[kept], torch.tensor(old)[kept], torch.tensor(returns)[kept]
    losses = (v - target) ** 2
    if eps is not None:
        near = torch.minimum(torch.maximum(v, v_old - eps), v_old + eps)
        losses = torch.maximum(losses, (near - target) ** 2)
    theirs = 0.5 * losses.mean()
    assert_close(ours, theirs.detach())
    assert_close(value_loss_backward(1.0, cache), torch.autograd.grad(theirs, V)[0])


# -- the penalty ---------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator):
    """Value and slope of -log r, (log r)^2 / 2 and (r - 1) - log r with r = ref / pi."""
    log_ratio = noise(*MASK.shape, seed=1, scale=2.0)
    x = torch.tensor(log_ratio, requires_grad=True)
    r = (-x).exp()
    theirs = {"k1": -r.log(), "k2": r.log() ** 2 / 2, "k3": (r - 1) - r.log()}[estimator]
    assert_close(kl_estimate(log_ratio, estimator), theirs.detach())
    slope = torch.autograd.grad(theirs.sum(), x)[0]
    assert_close(ESTIMATORS[estimator](log_ratio)[1], slope)


def test_k3_to_the_last_digits():
    """exp(x) - 1 - x relative to 50 decimal digits, from |x| = 1e-8 to 20, float64 and float32."""
    x = np.concatenate([s * np.logspace(-8, math.log10(20), 400) for s in (-1.0, 1.0)])
    with decimal.localcontext() as context:
        context.prec = 50
        exact = [decimal.Decimal(v).exp() - 1 - decimal.Decimal(v) for v in x.tolist()]
        theirs = np.array([float(v) for v in exact])
    assert (np.abs(expm1_minus(x) / theirs - 1) < 1e-10).all()
    single = x.astype(np.float32)
    with decimal.localcontext() as context:
        context.prec = 50
        exact = [decimal.Decimal(v).exp() - 1 - decimal.Decimal(v) for v in single.tolist()]
        theirs = np.array([float(v) for v in exact])
    assert (np.abs(expm1_minus(single) / theirs - 1) < 5e-5).all()


def test_the_penalty_is_a_difference_of_sequence_log_probabilities():
    logits, ref_logits = noise(6, 7, 11, seed=1), noise(6, 7, 11, seed=2)
    targets = np.random.default_rng(3).integers(0, 11, (6, 7))
    logp, _ = token_logprobs_forward(logits, targets=targets)
    ref_logp, _ = token_logprobs_forward(ref_logits, targets=targets)
    ours = summed_penalty(with_junk(logp), with_junk(ref_logp), mask=MASK)
    theirs = []
    for i, n in enumerate(LENGTHS):
        y = torch.tensor(targets[i, :n])
        log_pi = Categorical(logits=torch.tensor(logits[i, :n])).log_prob(y).sum()
        log_ref = Categorical(logits=torch.tensor(ref_logits[i, :n])).log_prob(y).sum()
        theirs.append(log_pi - log_ref)
    assert_close(ours, torch.stack(theirs))


def test_the_adaptive_controller():
    """200 batches of the controller of lm-human-preferences: value <- value (1 + e n / horizon)."""
    rng = np.random.default_rng(0)
    ours, theirs = 0.2, torch.tensor(0.2, dtype=torch.float64)
    target, horizon, n = 6.0, 10_000, 256
    seen = []
    for kl in rng.gamma(2.0, 4.0, 200):
        ours = adaptive_kl_coef(
            ours, kl_seq=float(kl), target=target, horizon=horizon, n_episodes=n
        )
        error = torch.clamp(torch.tensor(kl / target - 1), -0.2, 0.2)
        theirs = theirs * (1 + error * n / horizon)
        seen.append(float(error))
        assert abs(ours - theirs) <= RTOL * theirs
    assert -0.2 in np.round(seen, 12) and 0.2 in np.round(seen, 12) and len(set(seen)) > 10


# -- aggregation ---------------------------------------------------------------------------------


def aggregate(losses, mode):
    """The four modes on a list of unpadded sequences; the constant is that of a (6, 7) batch."""
    return {
        "token-mean": lambda: torch.cat(losses).mean(),
        "seq-mean-token-mean": lambda: torch.stack([x.mean() for x in losses]).mean(),
        "seq-mean-token-sum": lambda: torch.stack([x.sum() for x in losses]).mean(),
        "seq-mean-token-sum-norm": lambda: torch.cat(losses).sum() / (6 * 7),
    }[mode]()


def test_aggregation():
    losses = noise(*MASK.shape, seed=1)
    theirs = {mode: aggregate(rows(losses), mode).item() for mode in AGGREGATIONS}
    for mode in AGGREGATIONS:
        ours, _ = weighted_sum_forward(with_junk(losses), weights=token_weights(MASK, mode=mode))
        assert_close(ours, theirs[mode])
    assert len({round(x, 6) for x in theirs.values()}) == 4  # four different numbers
    weights = token_weights(MASK, mode="seq-mean-token-sum-norm", constant=1000)
    ours, _ = weighted_sum_forward(losses, weights=weights)
    assert_close(ours, torch.cat(rows(losses)).sum() / 1000)


# -- the metrics of an update and of a batch -----------------------------------------------------


def test_the_metrics_of_an_update():
    """approxkl = mean (logp - old)^2 / 2; clipfrac: the share of tokens that the loss clipped."""
    old_logp, logp = noise(*MASK.shape, seed=1), noise(*MASK.shape, seed=1)
    logp = logp + noise(*MASK.shape, seed=2, scale=0.3)
    advantages = noise(*MASK.shape, seed=3)
    tokens = np.zeros((6, 8), dtype=np.int64)
    batch = Batch(tokens, np.concatenate([np.ones((6, 1)), MASK], axis=1), 1)
    junk = with_junk(np.zeros_like(MASK))
    settings = PPOConfig(clip_eps=0.2, clip_eps_high=0.3)
    clipped = np.zeros_like(MASK, dtype=bool)
    clipped[:, 0] = True
    ours = update_metrics(
        MinibatchGradient({}, 0.0, with_junk(logp), junk, clipped, {}),
        Experience(
            batch=batch,
            old_logp=with_junk(old_logp),
            ref_logp=junk,
            ref_logits=None,
            old_values=junk,
            advantages=with_junk(advantages),
            returns=junk,
            weights=MASK,
            kl_loss_coef=1.0,
        ),
        settings,
    )
    d = torch.cat(rows(logp - old_logp))
    ratio = d.exp()
    theirs = {
        "policy/approxkl_avg": 0.5 * (d**2).mean(),
        "policy/kl_old_k3_token": (ratio - 1 - d).mean(),  # samples of old: its k3 has -d
        "policy/clipfrac_avg": torch.cat(rows(clipped)).double().mean(),
        "val/ratio": ratio.mean(),
        "val/ratio_var": ratio.var(correction=0),
        "policy/clamped_log_ratios": torch.tensor(0),
    }
    assert 0.1 < theirs["policy/clipfrac_avg"] < 0.9
    for name, value in theirs.items():
        assert abs(ours[name] - value.item()) <= RTOL * abs(value.item()), name


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_the_experience_of_a_rollout(whiten_rewards):
    """Rewards, optional whitening without shift, GAE, returns before whitening; and the metrics."""
    stop_id, kl_coef, penalty = 5, 0.15, 0.7
    rng = np.random.default_rng(0)
    responses = rng.integers(0, 5, MASK.shape)
    for row in (0, 2, 3):  # these have stopped; row 5 has the stop token in its padding only
        responses[row, LENGTHS[row] - 1] = stop_id
    responses[5, LENGTHS[5] :] = stop_id
    tokens = np.concatenate([np.zeros((6, 1), dtype=np.int64), responses], axis=1)
    batch = Batch(tokens, np.concatenate([np.ones((6, 1)), MASK], axis=1), 1)
    old_logp, ref_logp, values, entropy, kl_full = (noise(*MASK.shape, seed=i) for i in range(5))
    score = 2.0 * rng.standard_normal(6)
    ids = [row[:n].tolist() for row, n in zip(responses, LENGTHS, strict=True)]
    rollout = Rollout(
        samples=Samples([[0]] * 6, ids, batch),
        old_logp=with_junk(old_logp),
        ref_logp=with_junk(ref_logp),
        ref_logits=None,
        values=with_junk(values),
        entropy=with_junk(entropy),
        kl_full=with_junk(kl_full),
        score=score,
    )
    settings = PPOConfig(
        whiten_rewards=whiten_rewards, missing_eos_penalty=penalty, score_clip=1.5, gamma=0.98
    )
    known = {"settings": settings, "kl_coef": kl_coef, "stop_id": stop_id}
    experience = make_experience(rollout, **known)
    iteration = Iteration(rollout, experience, [], kl_coef, kl_coef, None)
    ours = iteration_metrics(iteration, settings=settings, stop_id=stop_id)

    log_ratio = rows(old_logp - ref_logp)
    stopped = [0, 2, 3]
    final = [min(1.5, max(-1.5, s)) - penalty * (i not in stopped) for i, s in enumerate(score)]
    rewards = [-kl_coef * d for d in log_ratio]
    for r, s in zip(rewards, final, strict=True):
        r[-1] += s
    divided_by = 1.0
    if whiten_rewards:
        var, mean = torch.var_mean(torch.cat(rewards), correction=0)
        divided_by = torch.sqrt(var + 1e-8)
        rewards = [(r - mean) * torch.rsqrt(var + 1e-8) + mean for r in rewards]
    raw = [loop_gae(r, v, 0.98, 0.95) for r, v in zip(rewards, rows(values), strict=True)]
    returns = [a + v for a, v in zip(raw, rows(values), strict=True)]
    var, mean = torch.var_mean(torch.cat(raw), correction=0)
    advantages = [(a - mean) * torch.rsqrt(var + 1e-8) for a in raw]
    assert_close(experience.returns, padded(returns))
    assert_close(experience.advantages, padded(advantages))
    assert_close(experience.kl_loss_coef, kl_coef * torch.rsqrt(var + 1e-8) / divided_by)

    kl_seq = torch.stack([d.sum() for d in log_ratio])
    all_values, all_returns = torch.cat(rows(values)), torch.cat(returns)
    error = F.mse_loss(all_values, all_returns)
    theirs = {
        "objective/kl": kl_seq.mean(),
        "objective/kl_full_seq": torch.stack([k.sum() for k in rows(kl_full)]).mean(),
        "objective/entropy": -torch.stack([lp.sum() for lp in rows(old_logp)]).mean(),
        "objective/non_score_reward": -kl_coef * kl_seq.mean(),
        "objective/scores": torch.tensor(score).mean(),
        "objective/rlhf_reward": torch.tensor(final).mean() - kl_coef * kl_seq.mean(),
        "policy/entropy_avg": torch.cat(rows(entropy)).mean(),
        "ppo/val/mean": all_values.mean(),
        "ppo/val/var": all_values.var(correction=0),
        "ppo/val/error": error,
        "ppo/val/var_explained": 1 - error / all_returns.var(correction=0),
        "ppo/returns/mean": all_returns.mean(),
        "ppo/returns/var": all_returns.var(correction=0),
        "val/num_eos_tokens": torch.tensor(3),
        "response_length/mean": torch.tensor(LENGTHS).double().mean(),
    }
    for name, value in theirs.items():
        assert abs(ours[name] - value.item()) <= 1e-11 * abs(value.item()), name


# -- distributions -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_log_probs_and_entropy(scale, temperature):
    """torch.log_softmax, F.cross_entropy and Categorical.entropy of logits / temperature."""
    logits, upstream = noise(3, 4, 11, seed=1, scale=scale), noise(3, 4, seed=2)
    targets = np.random.default_rng(3).integers(0, 11, (3, 4))
    z = torch.tensor(logits, requires_grad=True)
    dist = Categorical(logits=z / temperature)
    assert_close(
        log_softmax(logits, temperature=temperature), (z / temperature).log_softmax(-1).detach()
    )
    for (ours, cache), backward, theirs in (
        (
            token_logprobs_forward(logits, targets=targets, temperature=temperature),
            token_logprobs_backward,
            -F.cross_entropy(
                (z / temperature).flatten(0, 1), torch.tensor(targets).flatten(), reduction="none"
            ).view(3, 4),
        ),
        (entropy_forward(logits, temperature=temperature), entropy_backward, dist.entropy()),
    ):
        peer = theirs.detach().numpy()
        assert np.abs(ours - peer).max() <= RTOL * max(1.0, np.abs(peer).max())
        (dz,) = torch.autograd.grad((theirs * torch.tensor(upstream)).sum(), z, retain_graph=True)
        difference = np.abs(backward(upstream, cache) - dz.numpy()).max()
        assert difference <= RTOL * max(1.0, dz.abs().max().item())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_kl(temperature):
    """torch.distributions.kl_divergence, and its gradient in the first distribution's logits."""
    logits, ref_logits = noise(3, 4, 11, seed=1, scale=2.0), noise(3, 4, 11, seed=2, scale=2.0)
    upstream = noise(3, 4, seed=3)
    ours, cache = full_kl_forward(logits, ref_logits=ref_logits, temperature=temperature)
    z = torch.tensor(logits, requires_grad=True)
    theirs = kl_divergence(
        Categorical(logits=z / temperature),
        Categorical(logits=torch.tensor(ref_logits) / temperature),
    )
    assert_close(ours, theirs.detach())
    (dz,) = torch.autograd.grad((theirs * torch.tensor(upstream)).sum(), z)
    assert_close(full_kl_backward(upstream, cache), dz)


def test_log_sigmoid_and_bradley_terry_at_the_ends():
    """F.logsigmoid, torch.sigmoid and F.softplus from -1000 to 1000, with the gradient."""
    x = np.concatenate([[-1000.0, -100.0, -40.0, 0.0, 40.0, 100.0, 1000.0], noise(20, scale=3.0)])
    peer = torch.tensor(x, requires_grad=True)
    np.testing.assert_allclose(log_sigmoid(x), F.logsigmoid(peer).detach(), rtol=1e-13)
    np.testing.assert_allclose(sigmoid(x), torch.sigmoid(peer).detach(), rtol=1e-12)
    ours, cache = bradley_terry_forward(x, np.zeros_like(x))
    theirs = F.softplus(-peer).mean()
    assert_close(ours, theirs.detach())
    (dx,) = torch.autograd.grad(theirs, peer)
    dchosen, drejected = bradley_terry_backward(1.0, cache)
    np.testing.assert_allclose(dchosen, dx, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(drejected, -dx, rtol=1e-12, atol=1e-300)


# -- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_layernorm(scale):
    x, gain, bias, dy = noise(5, 6, seed=1, scale=scale), *noise(2, 6, seed=2), noise(5, 6, seed=3)
    ours, cache = layernorm_forward(x, gain, bias, eps=1e-5)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, gain, bias)]
    theirs = F.layer_norm(leaves[0], (6,), leaves[1], leaves[2], eps=1e-5)
    assert_close(ours, theirs.detach())
    gradients = torch.autograd.grad(theirs, leaves, torch.tensor(dy))
    for mine, peer in zip(layernorm_backward(dy, cache), gradients, strict=True):
        assert_close(mine, peer)


def test_gelu():
    x = np.concatenate([np.linspace(-30, 30, 301), noise(100)])
    peer = torch.tensor(x, requires_grad=True)
    theirs = F.gelu(peer, approximate="tanh")
    ours, cache = gelu_forward(x)
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-12, atol=1e-14)
    (dx,) = torch.autograd.grad(theirs.sum(), peer)
    np.testing.assert_allclose(gelu_backward(np.ones_like(x), cache), dx, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n_head", [1, 2, 4])
def test_attention(n_head):
    """torch.nn.functional.scaled_dot_product_attention with padding on both sides of a row."""
    B, T, C = 3, 6, 8
    qkv, dout = noise(B, T, 3 * C, seed=1, scale=2.0), noise(B, T, C, seed=2)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0.0]])
    ours, cache = attention_forward(qkv, n_head=n_head, allowed=causal_mask(mask))
    leaf = torch.tensor(qkv, requires_grad=True)
    heads = [y.reshape(B, T, n_head, C // n_head).transpose(1, 2) for y in leaf.split(C, dim=-1)]
    seen = torch.tensor(mask).bool()
    allowed = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for b in range(B):
        for i in range(T):
            for j in range(i + 1):
                allowed[b, 0, i, j] = seen[b, j] or i == j
    theirs = F.scaled_dot_product_attention(*heads, attn_mask=allowed).transpose(1, 2)
    theirs = theirs.reshape(B, T, C)
    assert_close(ours, theirs.detach())
    (dqkv,) = torch.autograd.grad(theirs, leaf, torch.tensor(dout))
    assert_close(attention_backward(dout, cache), dqkv)


# -- the reward model ----------------------------------------------------------------------------


def test_normalisation_is_gain_and_bias():
    """score -> gain score + bias with gain = 1 / sd, bias = -gain mean: mean 0, biased sd 1."""
    raw = 3.0 + 2.0 * noise(256)
    model = normalized(RewardModel({}, None), raw)
    std, mean = torch.std_mean(torch.tensor(raw), correction=0)
    assert_close(model.mean, mean)
    assert_close(model.sd, std)


def test_calibration_error():
    """ECE over ten equal bins of confidence in [1/2, 1]; the accuracy is that of the argmax."""
    margin = noise(80, scale=1.5)  # few, so that some bins are too sure and others not enough
    confidence = torch.sigmoid(torch.tensor(margin).abs())
    right = torch.tensor(margin) > 0
    edges = torch.linspace(0.5, 1.0, 11).double()
    theirs, gaps = 0.0, []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            gaps.append((confidence[inside].mean() - right[inside].double().mean()).item())
            theirs += inside.double().mean().item() * abs(gaps[-1])
    assert min(gaps) < -0.02 and max(gaps) > 0.02
    assert abs(calibration_error(margin) - theirs) < 1e-12
