"""Every hand-written gradient of a whole loss against PyTorch's autograd, parameter by parameter.

The model and the losses are written here a second time, from the formulas, the way one writes them
in PyTorch; the only thing shared is the parameters. Losses are aggregated from masks, not from our
token weights. All in float64, at places away from the ties of min, max and clip: there torch.min
splits the gradient between its two arguments and we give it to the unclipped one.
"""

from collections import OrderedDict

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from minirlhf.nn.heads import init_scalar_head
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.rlhf.objectives import AGGREGATIONS, token_weights
from minirlhf.rlhf.preferences import (
    bradley_terry_backward,
    bradley_terry_forward,
    plackett_luce_backward,
    plackett_luce_forward,
)
from minirlhf.runs.metrics import mean_of_updates
from minirlhf.train.batches import pad_batch
from minirlhf.train.dpo import DPOConfig, dpo_micro_batch, with_reference
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.policy import policy_forward
from minirlhf.train.ppo import (
    Experience,
    make_experience,
    minibatch_gradients,
    ppo_loss_backward,
    ppo_loss_forward,
    ppo_update,
)
from minirlhf.train.reward_model import (
    Pair,
    pairs_loss_and_gradients,
    reward_backward,
    reward_forward,
)
from minirlhf.train.rollout import Rollout, Samples
from minirlhf.train.settings import OptimizerConfig, PPOConfig
from minirlhf.train.sft import sft_loss_and_gradients
from minirlhf.tree import tree_items, tree_map

pytestmark = pytest.mark.peers
torch.set_num_threads(1)

CONFIG = GPTConfig(vocab_size=13, n_ctx=12, n_layer=2, n_head=2, d_model=8, ln_eps=1e-4)
PROMPTS, RESPONSES = (3, 1, 5, 2, 4, 2, 6, 1), (4, 6, 1, 3, 5, 2, 6, 6)  # lengths
LOSS_RTOL, GRAD_RTOL = 1e-12, 1e-10
ZERO_SUM = 8 * 2.2e-16  # roundings in a sum that cancels to 0, relative to its magnitudes
KL_COEF = 0.7
KL_IN_LOSS = [name for name, mode in KL_MODES.items() if mode.in_loss]


# -- the model in PyTorch ------------------------------------------------------------------------


def leaves_of(params):
    """{path: tensor that wants a gradient}."""
    return OrderedDict(
        (path, torch.tensor(array, requires_grad=True)) for path, array in tree_items(params)
    )


def hidden_states(p, tokens, mask, prefix="transformer."):
    """GPT-2 with functions of torch.nn.functional; p maps paths to tensors."""

    def linear(x, name):
        return F.linear(x, p[f"{prefix}{name}.w"].T, p[f"{prefix}{name}.b"])

    def layer_norm(x, name):
        gain, bias = p[f"{prefix}{name}.gain"], p[f"{prefix}{name}.bias"]
        return F.layer_norm(x, gain.shape, gain, bias, eps=CONFIG.ln_eps)

    B, T = tokens.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0).long()
    x = F.embedding(tokens, p[f"{prefix}wte"]) + F.embedding(positions, p[f"{prefix}wpe"])
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    allowed = (causal & mask.bool()[:, None, :]) | torch.eye(T, dtype=torch.bool)
    for i in range(CONFIG.n_layer):
        qkv = linear(layer_norm(x, f"blocks.{i}.ln1"), f"blocks.{i}.attn.qkv")
        q, k, v = (y.view(B, T, CONFIG.n_head, -1).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
        x = x + linear(a.transpose(1, 2).reshape(B, T, -1), f"blocks.{i}.attn.out")
        u = linear(layer_norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.mlp.up")
        x = x + linear(F.gelu(u, approximate="tanh"), f"blocks.{i}.mlp.down")
    return layer_norm(x, "ln_f")


def response_logits_and_values(p, tokens, mask, P):
    h = hidden_states(p, tokens, mask)[:, P - 1 : -1]
    values = F.linear(h, p["value_head.w"].T, p["value_head.b"]).squeeze(-1)
    return F.linear(h, p["transformer.wte"]), values


def scores_of(p, tokens, mask):
    """The reward head at the last real token."""
    h = hidden_states(p, tokens, mask)
    columns = torch.arange(tokens.shape[1]).expand_as(tokens)
    last = columns.masked_fill(mask == 0, -1).amax(dim=1)
    h_last = h[torch.arange(len(last)), last]
    return F.linear(h_last, p["reward_head.w"].T, p["reward_head.b"]).squeeze(-1)


# -- the losses in PyTorch -----------------------------------------------------------------------


def aggregate(losses, mask, mode, constant):
    """Token losses (B, T) to one number."""
    losses = torch.where(mask, losses, 0.0)
    if mode == "token-mean":
        return losses[mask].mean()
    if mode == "seq-mean-token-mean":
        return torch.stack(
            [row[kept].mean() for row, kept in zip(losses, mask, strict=True)]
        ).mean()
    if mode == "seq-mean-token-sum":
        return losses.sum(dim=1).mean()
    return losses.sum() / constant


def sequence_aggregate(losses, mask, mode, constant):
    """Sequence losses (B,): each carries the weight that each of its tokens has in `aggregate`."""
    if mode == "token-mean":
        return losses.sum() / mask.sum()
    if mode == "seq-mean-token-mean":
        return (losses / mask.sum(dim=1)).mean()
    if mode == "seq-mean-token-sum":
        return losses.mean()
    return losses.sum() / constant


def estimate(d, estimator):
    return {"k1": d, "k2": d.square() / 2, "k3": torch.exp(-d) - 1 + d}[estimator]


def kl_loss(logits, ref_logits, logp, old_logp, ref_logp, mask, kl_mode, mode, constant):
    """Each placement of the penalty in the loss, in the words of KL_MODES."""
    log_ratio, from_old = logp - ref_logp, logp - old_logp
    seq_log_ratio = torch.where(mask, log_ratio, 0.0).sum(1)
    seq_rho = torch.where(mask, from_old, 0.0).sum(1).exp()
    token = {
        "loss_k1": lambda: estimate(log_ratio, "k1"),
        "loss_k2_tok": lambda: estimate(log_ratio, "k2"),
        "loss_k3_tok": lambda: estimate(log_ratio, "k3"),
        "reward_and_loss_k3": lambda: estimate(log_ratio, "k3"),
        "loss_rho_k3_tok": lambda: from_old.exp() * estimate(log_ratio, "k3"),
    }
    sequence = {
        "loss_k2_seq": lambda: estimate(seq_log_ratio, "k2"),
        "loss_k3_seq": lambda: estimate(seq_log_ratio, "k3"),
        "loss_rho_k1": lambda: seq_rho * estimate(seq_log_ratio, "k1"),
        "loss_rho_k2": lambda: seq_rho.detach() * estimate(seq_log_ratio, "k2"),
        "loss_rho_k3": lambda: seq_rho * estimate(seq_log_ratio, "k3"),
    }
    if kl_mode in token:
        return aggregate(token[kl_mode](), mask, mode, constant)
    if kl_mode in sequence:
        return sequence_aggregate(sequence[kl_mode](), mask, mode, constant)
    kl_token = kl_divergence(Categorical(logits=logits), Categorical(logits=ref_logits))
    if kl_mode == "loss_rb":  # logp - sg(logp) is 0 in value and the score function in gradient
        kept = torch.where(mask, kl_token.detach(), 0.0)
        later = torch.stack([kept[:, t + 1 :].sum(1) for t in range(kept.shape[1])], dim=1)
        kl_token = kl_token + (logp - logp.detach()) * later
    else:
        assert kl_mode in ("loss_full", "reward_and_loss_full")
    return aggregate(kl_token, mask, mode, constant)


def clipped_objective(ratio, advantages, settings):
    low, high = 1 - settings.clip_eps, 1 + (settings.clip_eps_high or settings.clip_eps)
    objective = ratio * advantages
    if settings.clip == "ppo":
        objective = torch.min(objective, ratio.clamp(low, high) * advantages)
    elif settings.clip == "book":
        objective = ratio.clamp(max=high) * advantages
    if settings.dual_clip:
        floored = torch.max(objective, settings.dual_clip * advantages)
        objective = torch.where(advantages < 0, floored, objective)
    return objective


def value_errors(values, old_values, returns, eps):
    errors = F.mse_loss(values, returns, reduction="none")
    if eps:
        near = torch.clamp(values, old_values - eps, old_values + eps)
        errors = torch.max(errors, F.mse_loss(near, returns, reduction="none"))
    return errors / 2


def ppo_loss(p, experience, settings, *, constant):
    """PPO's loss of one minibatch. Constants arrive as arrays, padding may hold anything finite."""
    e, s = experience, settings
    tokens, mask = torch.tensor(e.batch.tokens), torch.tensor(e.batch.mask)
    P = e.batch.prompt_len
    kept = mask[:, P:].bool()

    def fixed(array):
        return torch.where(kept, torch.tensor(array), 0.0)

    logits, values = response_logits_and_values(p, tokens, mask, P)
    logits = logits / s.temperature
    logp = F.log_softmax(logits, dim=-1).gather(-1, tokens[:, P:, None]).squeeze(-1)
    old_logp, ref_logp, advantages = fixed(e.old_logp), fixed(e.ref_logp), fixed(e.advantages)
    log_ratio = torch.where(kept, logp - old_logp, 0.0)
    if s.ratio == "sequence":  # GSPO: the mean of the tokens' log-ratios, for each of them
        whole = log_ratio.sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)
        log_ratio = whole.expand_as(log_ratio)
    ratio = log_ratio.clamp(-20, 20).exp()

    def mean(losses):
        return aggregate(losses, kept, s.aggregation, constant)

    objective = clipped_objective(ratio, advantages, s)
    if s.ratio == "clipped-weight":  # CISPO: a weight without a gradient
        edges = {"none": (None, None), "book": (None, 1.2), "ppo": (0.8, 1.2)}[s.clip]
        weight = ratio if s.clip == "none" else ratio.clamp(*edges)
        objective = weight.detach() * advantages * torch.where(kept, logp, 0.0)
    loss = -mean(objective)
    errors = value_errors(values, fixed(e.old_values), fixed(e.returns), s.value_clip_eps)
    loss = loss + s.vf_coef * mean(errors)
    if KL_MODES[s.kl_mode].in_loss:
        ref_logits = torch.tensor(e.ref_logits) / s.temperature
        penalty = kl_loss(
            logits, ref_logits, logp, old_logp, ref_logp, kept, s.kl_mode, s.aggregation, constant
        )
        loss = loss + float(e.kl_loss_coef) * penalty
    if s.ent_coef:
        loss = loss - s.ent_coef * mean(Categorical(logits=logits).entropy())
    return loss


# -- comparing -----------------------------------------------------------------------------------


def assert_close(ours, theirs, rtol, name):
    """The largest difference, as a share of the largest entry of the tensor."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, name
    scale = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= rtol * scale, (name, np.abs(ours - theirs).max() / scale)


def assert_gradients_agree(gradients, p, loss):
    """Every parameter's gradient; none may be 0 as a whole, or the comparison would say nothing."""
    theirs = torch.autograd.grad(loss, list(p.values()))
    ours = dict(tree_items(gradients))
    assert ours.keys() == p.keys()
    for (path, _), tensor in zip(p.items(), theirs, strict=True):
        assert tensor.abs().max() > 1e-9, f"{path}: the gradient is 0"
        assert_close(ours[path], tensor, GRAD_RTOL, path)


# -- our side ------------------------------------------------------------------------------------


def model(seed, *, head):
    """Weights of order 1 / sqrt(width), all biases away from 0 and all gains from 1."""
    rng = np.random.default_rng(seed)
    params = {
        "transformer": init_transformer(CONFIG, rng=rng, dtype=np.float64),
        head: init_scalar_head(CONFIG.d_model, std=0.3, rng=rng, dtype=np.float64),
    }
    return tree_map(lambda x: x + 0.3 * rng.standard_normal(x.shape), params)


def batch_of(rng, prompts=PROMPTS, responses=RESPONSES):
    """Prompts padded on the left, responses on the right; the padding holds arbitrary tokens."""
    ids = [
        [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
        for lengths in (prompts, responses)
    ]
    batch = pad_batch(*ids, pad_id=0, config=CONFIG, dtype=np.float64)
    junk = rng.integers(0, CONFIG.vocab_size, batch.tokens.shape)
    return batch._replace(tokens=np.where(batch.mask > 0, batch.tokens, junk))


def experience_at(params, *, temperature, aggregation, seed=0):
    """Constants around the current policy, so that every branch of every clip is taken.

    Ratios keep 0.03 away from the edges of all settings below, moves of the value 0.05.
    """
    rng = np.random.default_rng(seed)
    batch = batch_of(rng)
    out, _ = policy_forward(params, batch=batch, config=CONFIG, temperature=temperature)
    B, R = out.logp.shape
    real = batch.response_mask > 0
    ratio, signs = np.ones((2, B, R))
    ratios = [0.4, 0.7, 0.85, 0.97, 1.04, 1.15, 1.25, 1.4, 2.0, 3.5]
    ratio[real], signs[real] = rng.permutation(
        np.resize([(r, sign) for r in ratios for sign in (-1.0, 1.0)], (int(real.sum()), 2))
    ).T
    moves = rng.choice([-0.6, -0.25, -0.1, 0.1, 0.25, 0.6], (B, R))
    ref_logits = out.logits + 0.4 * rng.standard_normal(out.logits.shape)
    ref_logp = torch.log_softmax(torch.tensor(ref_logits) / temperature, -1)
    ref_logp = ref_logp.gather(-1, torch.tensor(batch.responses)[..., None])[..., 0].numpy()
    mask = batch.response_mask
    experience = Experience(
        batch=batch,
        old_logp=out.logp - np.log(ratio),
        ref_logp=ref_logp,
        ref_logits=ref_logits,
        old_values=out.values - moves,
        advantages=signs * rng.uniform(0.5, 2.0, (B, R)),
        returns=out.values + rng.standard_normal((B, R)),
        weights=token_weights(mask, mode=aggregation),
        kl_loss_coef=1.3 * KL_COEF,
    )
    junk = {  # what stands at padding must not matter
        name: np.where(mask > 0, getattr(experience, name), 5.0 * rng.standard_normal((B, R)))
        for name in ("old_logp", "ref_logp", "old_values", "advantages", "returns")
    }
    return experience._replace(**junk)


CLIPS = {
    "ppo": {},
    "asymmetric": {"clip_eps": 0.1, "clip_eps_high": 0.3},
    "dual": {"dual_clip": 1.7},
    "book": {"clip": "book"},
    "book_dual": {"clip": "book", "dual_clip": 3.0, "clip_eps": 5.0},
    "none": {"clip": "none"},
    "none_dual": {"clip": "none", "dual_clip": 3.0},
}
EVERYTHING_ON = {"ent_coef": 0.3, "value_clip_eps": 0.2, "vf_coef": 0.6, "temperature": 0.8}


def assert_ppo_parity(settings):
    params = model(0, head="value_head")
    experience = experience_at(
        params, temperature=settings.temperature, aggregation=settings.aggregation
    )
    ours, cache = ppo_loss_forward(params, experience=experience, config=CONFIG, settings=settings)
    gradients = ppo_loss_backward(1.0, cache)
    p = leaves_of(params)
    theirs = ppo_loss(p, experience, settings, constant=experience.weights.size)
    assert_close(ours, theirs.detach(), LOSS_RTOL, "loss")
    assert_gradients_agree(gradients, p, theirs)
    return experience, cache


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl_mode", [*KL_IN_LOSS, "reward_k1"])
def test_ppo_loss_with_every_kl_mode(kl_mode, aggregation):
    settings = PPOConfig(kl_mode=kl_mode, aggregation=aggregation, **EVERYTHING_ON)
    assert_ppo_parity(settings)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", CLIPS)
def test_ppo_loss_with_every_clip(clip, aggregation):
    settings = PPOConfig(aggregation=aggregation, **EVERYTHING_ON, **CLIPS[clip])
    experience, cache = assert_ppo_parity(settings)
    # The comparison says something: each branch of the surrogate has tokens, in both signs.
    real = experience.weights > 0
    follows = cache.surrogate.slope[real] != 0
    positive = experience.advantages[real] > 0
    assert follows[positive].any() and follows[~positive].any()
    if settings.clip == "ppo":
        assert (~follows[positive]).any()
    if settings.clip == "ppo" or settings.dual_clip:
        assert (~follows[~positive]).any()
    assert 0 < (cache.value.slope[real] == 0).sum() < real.sum()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", ["ppo", "book", "none"])
@pytest.mark.parametrize("ratio", ["sequence", "clipped-weight"])
def test_ppo_loss_with_every_ratio(ratio, clip, aggregation):
    settings = PPOConfig(ratio=ratio, clip=clip, aggregation=aggregation, **EVERYTHING_ON)
    experience, cache = assert_ppo_parity(settings)
    real = experience.weights > 0
    clipped = cache.surrogate.clipped[real]
    assert clip == "none" or (clipped.any() and not clipped.all())


@pytest.mark.parametrize("kl_mode", KL_IN_LOSS)
def test_each_part_of_the_loss_alone(kl_mode):
    """Only the penalty: advantages 0, so that no larger term covers a wrong one."""
    settings = PPOConfig(kl_mode=kl_mode, vf_coef=0.0, temperature=1.7)
    params = model(1, head="value_head")
    experience = experience_at(params, temperature=1.7, aggregation="token-mean", seed=1)
    experience = experience._replace(advantages=np.zeros_like(experience.advantages))
    ours, cache = ppo_loss_forward(params, experience=experience, config=CONFIG, settings=settings)
    gradients = ppo_loss_backward(1.0, cache)
    p = leaves_of(params)
    theirs = ppo_loss(p, experience, settings, constant=None)
    assert_close(ours, theirs.detach(), LOSS_RTOL, "loss")
    for name in ("w", "b"):  # nothing asks for a value here: 0 on both sides, which is no evidence
        del p[f"value_head.{name}"]
        assert not gradients["value_head"][name].any()
    del gradients["value_head"]
    frozen = {f"value_head.{name}": torch.tensor(params["value_head"][name]) for name in ("w", "b")}
    theirs = ppo_loss({**p, **frozen}, experience, settings, constant=None)
    assert_gradients_agree(gradients, p, theirs)


def test_log_ratios_beyond_the_limit():
    """exp sees at most +-20: the same number and no gradient beyond, like torch.clamp(..).exp()."""
    settings = PPOConfig(clip="none", vf_coef=0.1)
    params = model(0, head="value_head")
    experience = experience_at(params, temperature=1.0, aggregation="token-mean")
    for column, shift in ((0, 25.0), (1, -25.0)):  # log-ratios of 25 and -25
        experience.old_logp[:, column] = -2.0 - shift
    ours, cache = ppo_loss_forward(params, experience=experience, config=CONFIG, settings=settings)
    gradients = ppo_loss_backward(1.0, cache)
    p = leaves_of(params)
    theirs = ppo_loss(p, experience, settings, constant=None)
    assert abs(theirs) > 1e6  # e^20 is in it
    assert_close(ours, theirs.detach(), LOSS_RTOL, "loss")
    assert_gradients_agree(gradients, p, theirs)


@pytest.mark.parametrize("kl_mode", ["loss_rb", "loss_rho_k3", "reward_k1"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole(kl_mode, aggregation):
    settings = PPOConfig(
        kl_mode=kl_mode, aggregation=aggregation, micro_batch_size=2, **EVERYTHING_ON
    )
    params = model(2, head="value_head")
    experience = experience_at(
        params, temperature=settings.temperature, aggregation=aggregation, seed=2
    )
    gradients, ours, *_ = minibatch_gradients(params, experience, config=CONFIG, settings=settings)
    p = leaves_of(params)
    theirs = ppo_loss(p, experience, settings, constant=experience.weights.size)
    assert_close(ours, theirs.detach(), LOSS_RTOL, "loss")
    assert_gradients_agree(gradients, p, theirs)


# -- a whole update ------------------------------------------------------------------------------


def rollout_of(policy, reference, rng):
    batch = batch_of(rng)
    old, _ = policy_forward(policy, batch=batch, config=CONFIG, temperature=0.8)
    ref, _ = policy_forward(reference, batch=batch, config=CONFIG, temperature=0.8)
    nothing = np.zeros_like(old.logp)
    return Rollout(
        samples=Samples([], [], batch),
        old_logp=old.logp,
        ref_logp=ref.logp,
        ref_logits=ref.logits,
        values=old.values,
        entropy=nothing,
        kl_full=nothing,
        score=rng.standard_normal(old.logp.shape[0]),
    )


def torch_experience(rollout, settings, *, kl_coef, stop_id):
    """Rewards, advantages and returns from a rollout, sequence by sequence and without padding."""
    s, batch = settings, rollout.batch
    B, R = rollout.old_logp.shape
    advantages, returns = torch.zeros(B, R).double(), torch.zeros(B, R).double()
    kept = torch.tensor(batch.response_mask).bool()
    in_reward = KL_MODES[s.kl_mode].in_reward
    for i in range(B):
        n = int(kept[i].sum())
        d = torch.tensor(rollout.old_logp[i, :n] - rollout.ref_logp[i, :n])
        if in_reward == "full":
            penalty = torch.tensor(rollout.kl_full[i, :n])
        else:
            penalty = estimate(d, in_reward) if in_reward else torch.zeros(n).double()
        rewards = -kl_coef * penalty
        score = max(-s.score_clip, min(s.score_clip, rollout.score[i]))
        if stop_id not in batch.responses[i, :n]:
            score = score - s.missing_eos_penalty
        rewards[-1] += score
        values = torch.tensor(rollout.values[i, :n])
        td = rewards + s.gamma * F.pad(values[1:], (0, 1)) - values
        power = torch.arange(n) - torch.arange(n)[:, None]  # [t, i] = i - t
        discount = torch.where(power >= 0, (s.gamma * s.lam) ** power.double(), 0.0)
        advantages[i, :n] = discount @ td
        returns[i, :n] = advantages[i, :n] + values
    var, mean = torch.var_mean(advantages[kept], correction=0)
    scale = (var + 1e-8).sqrt()
    return Experience(
        batch=batch,
        old_logp=rollout.old_logp,
        ref_logp=rollout.ref_logp,
        ref_logits=rollout.ref_logits,
        old_values=rollout.values,
        advantages=((advantages - mean) / scale).numpy(),
        returns=returns.numpy(),
        weights=np.empty_like(rollout.old_logp),  # not read: ppo_loss works from the mask
        kl_loss_coef=kl_coef / float(scale),
    )


@pytest.mark.parametrize(
    ("kl_mode", "aggregation", "ent_coef"),
    [
        ("reward_k1", "token-mean", 0.0),
        ("loss_rb", "seq-mean-token-mean", 0.01),
        ("reward_and_loss_k3", "seq-mean-token-sum", 0.0),
        ("loss_rho_k2", "seq-mean-token-sum-norm", 0.01),
    ],
)
def test_a_whole_ppo_iteration_is_a_torch_training_loop(kl_mode, aggregation, ent_coef):
    """From a rollout's log-probs to new parameters: 3 epochs x 2 minibatches of AdamW.

    In PyTorch: torch.optim.AdamW with weight decay on matrices, clip_grad_norm_, LinearLR.
    """
    settings = PPOConfig(
        epochs=3,
        minibatches=2,
        batch_size=8,
        micro_batch_size=3,
        temperature=0.8,
        kl_mode=kl_mode,
        aggregation=aggregation,
        gamma=0.98,
        lam=0.9,
        ent_coef=ent_coef,
        missing_eos_penalty=0.5,
        score_clip=1.5,
        value_clip_eps=0.3,
        clip_eps=0.17,
        optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.1, max_grad_norm=0.3),
    )
    kl_coef, stop_id, total_steps = 0.3, 7, 9
    policy, reference = model(3, head="value_head"), model(3, head="value_head")
    rng = np.random.default_rng(4)
    reference = tree_map(lambda x: x + 0.02 * rng.standard_normal(x.shape), reference)
    rollout = rollout_of(policy, reference, rng)

    optimizer = Optimizer(policy, settings.optimizer, total_steps=total_steps)
    experience = make_experience(rollout, settings=settings, kl_coef=kl_coef, stop_id=stop_id)
    updates = ppo_update(
        optimizer, experience, config=CONFIG, settings=settings, rng=np.random.default_rng(11)
    )
    metrics = mean_of_updates(updates, settings)

    p = leaves_of(policy)
    groups = [
        {"params": [t for t in p.values() if t.ndim > 1], "weight_decay": 0.1},
        {"params": [t for t in p.values() if t.ndim == 1], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=0.01, eps=settings.optimizer.eps)
    falling = torch.optim.lr_scheduler.LinearLR(
        peer, start_factor=1.0, end_factor=0.0, total_iters=total_steps
    )
    constants = torch_experience(rollout, settings, kl_coef=kl_coef, stop_id=stop_id)
    order_rng = np.random.default_rng(11)
    norms = []
    for _ in range(settings.epochs):
        order = order_rng.permutation(8)
        for rows in (order[:4], order[4:]):
            minibatch = constants.rows(rows)
            constant = len(rows) * CONFIG.n_ctx
            loss = ppo_loss(p, minibatch, settings, constant=constant)
            peer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(p.values(), 0.3)))
            peer.step()
            falling.step()
    moved = max(np.abs(p[k].detach().numpy() - v).max() for k, v in tree_items(policy))
    assert max(norms) > 0.3 and moved > 0.02  # the norm is cut, and there is something to compare
    assert 0.05 < metrics["policy/clipfrac_avg"] < 0.9
    assert abs(metrics["grad_norm"] - np.mean(norms)) < 1e-9
    for path, array in tree_items(optimizer.params):
        assert_close(array, p[path].detach(), 1e-10, path)


# -- stages 1 and 2 ------------------------------------------------------------------------------


def test_sft_loss():
    """F.cross_entropy with ignore_index at prompts and padding, as in any fine-tuning script."""
    params = {"transformer": model(0, head="value_head")["transformer"]}
    batch = batch_of(np.random.default_rng(0))
    ours, gradients = sft_loss_and_gradients(params, batch, CONFIG)

    p = leaves_of(params)
    tokens, mask = torch.tensor(batch.tokens), torch.tensor(batch.mask)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, : batch.prompt_len] = -100
    logits = F.linear(hidden_states(p, tokens, mask), p["transformer.wte"])
    theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(ours, theirs.detach(), LOSS_RTOL, "loss")
    assert_gradients_agree(gradients, p, theirs)


def reward_case(n_lists, n_responses):
    """A reward model and lists of responses to the same prompt, row by row: the best come first."""
    params = model(6, head="reward_head")
    rng = np.random.default_rng(6)
    prompts = [n for n in (3, 1, 5)[:n_lists] for _ in range(n_responses)]
    batch = batch_of(rng, prompts=prompts, responses=rng.integers(1, 7, len(prompts)))
    score, cache = reward_forward(params, batch=batch, config=CONFIG)
    p = leaves_of(params)
    theirs = scores_of(p, torch.tensor(batch.tokens), torch.tensor(batch.mask))
    assert_close(score, theirs.detach(), LOSS_RTOL, "score")
    shape = (n_lists, n_responses)
    return score.reshape(shape), cache, p, theirs.view(shape)


def assert_reward_gradients_agree(dscore, cache, p, theirs):
    """A ranking loss does not see what shifts all scores alike: there the gradient is 0."""
    ours = dict(tree_items(reward_backward(dscore, cache)))
    for path in ("reward_head.b", "transformer.ln_f.bias"):
        (peer,) = torch.autograd.grad(theirs, [p.pop(path)], retain_graph=True)
        rounding = ZERO_SUM * np.abs(dscore).sum()
        assert np.abs(ours.pop(path)).max() < rounding and peer.abs().max() < rounding
    assert_gradients_agree(ours, p, theirs)


def test_scores_of_the_reward_model():
    """The gradient of a sum of scores with arbitrary weights: every parameter has one."""
    score, cache, p, peer_score = reward_case(3, 2)
    weights = np.random.default_rng(7).standard_normal(score.shape)
    theirs = (peer_score * torch.tensor(weights)).sum()
    assert_gradients_agree(reward_backward(weights.reshape(-1), cache), p, theirs)


@pytest.mark.parametrize(("margin", "smoothing"), [(0.0, 0.0), (0.4, 0.0), (0.3, 0.15)])
def test_bradley_terry_through_the_reward_model(margin, smoothing):
    score, cache, p, peer_score = reward_case(3, 2)
    ours, loss_cache = bradley_terry_forward(
        score[:, 0], score[:, 1], margin=margin, label_smoothing=smoothing
    )
    dscore = np.stack(bradley_terry_backward(1.0, loss_cache), axis=1).reshape(-1)

    logits = peer_score[:, 0] - peer_score[:, 1] - margin
    labels = torch.full_like(logits, 1 - smoothing)
    theirs = F.binary_cross_entropy_with_logits(logits, labels)
    assert_close(ours, theirs.detach(), LOSS_RTOL, "loss")
    assert_reward_gradients_agree(dscore, cache, p, theirs)


@pytest.mark.parametrize("n_responses", [2, 4])
def test_plackett_luce_through_the_reward_model(n_responses):
    score, cache, p, peer_score = reward_case(3, n_responses)
    ours, loss_cache = plackett_luce_forward(score)
    dscore = plackett_luce_backward(1.0, loss_cache).reshape(-1)

    remaining = peer_score.flip(1).logcumsumexp(dim=1).flip(1)  # log-sum-exp from here to the end
    theirs = (remaining - peer_score).sum(dim=1).mean()
    assert_close(ours, theirs.detach(), LOSS_RTOL, "loss")
    assert_reward_gradients_agree(dscore, cache, p, theirs)


def test_the_losses_at_extreme_scores():
    """Differences of +-60 and of 1000: finite, with the gradient of logcumsumexp."""
    scores = np.array([[60.0, 0.0, -3.0], [-60.0, 0.0, 1.0], [0.0, 1000.0, 1e-3]])
    peer = torch.tensor(scores, requires_grad=True)
    remaining = peer.flip(1).logcumsumexp(dim=1).flip(1)
    theirs = (remaining - peer).sum(1).mean()
    ours, cache = plackett_luce_forward(scores)
    assert_close(ours, theirs.detach(), LOSS_RTOL, "loss")
    (dscores,) = torch.autograd.grad(theirs, [peer])
    assert_close(plackett_luce_backward(1.0, cache), dscores, LOSS_RTOL, "dscores")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_through_the_policy(loss, smoothing):
    """As one writes it in PyTorch: log-probs of both replies, minus the reference's."""
    params, reference, beta = model(8, head="value_head"), model(9, head="value_head"), 0.3
    del params["value_head"]
    rng, (x, y) = np.random.default_rng(8), (PROMPTS[:4], RESPONSES)
    ids = [[rng.integers(0, CONFIG.vocab_size, n).tolist() for n in some] for some in (x, y)]
    replies = zip(ids[1][:4], ids[1][4:], strict=True)
    pairs = [Pair(*row) for row in zip(ids[0], replies, strict=True)]
    same = {"config": CONFIG, "pad_id": 0}
    pairs = with_reference(pairs, reference, **same)
    settings = DPOConfig(kl_coef=beta, loss=loss, label_smoothing=smoothing)
    same |= {"settings": settings, "micro_batch": dpo_micro_batch}
    metrics, gradients = pairs_loss_and_gradients(params, pairs, **same)

    def seq_logp(p, prompt, reply):
        tokens = torch.tensor([[*prompt, *reply]])
        h = hidden_states(p, tokens, torch.ones_like(tokens))
        logits = F.linear(h, p["transformer.wte"])[0, len(prompt) - 1 : -1]
        return F.log_softmax(logits, -1)[torch.arange(len(reply)), torch.tensor(reply)].sum()

    p, frozen, losses = leaves_of(params), leaves_of(reference), []
    for prompt, replies, _ in pairs:
        with torch.no_grad():
            ref = [seq_logp(frozen, prompt, reply) for reply in replies]
        chosen, rejected = (seq_logp(p, prompt, y) - r for y, r in zip(replies, ref, strict=True))
        for share, lead in ((1 - smoothing, chosen - rejected), (smoothing, rejected - chosen)):
            square = (lead - 1 / (2 * beta)).square()
            losses.append(share * (-F.logsigmoid(beta * lead) if loss == "sigmoid" else square))
    theirs = torch.stack(losses).sum() / len(pairs)
    assert_close(metrics["loss/dpo"], theirs.detach(), LOSS_RTOL, "loss")
    assert_gradients_agree(gradients, p, theirs)
