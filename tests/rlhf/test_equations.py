"""Every displayed formula again, as naive Python loops over numbers, against the code on arrays.

The second half are worked numbers, with the arithmetic beside them.
"""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, make_ids, make_params, ragged, with_junk
from tolerances import LOOPS, assert_close

from minirlhf.nn.attention import attention_forward, causal_mask
from minirlhf.nn.heads import last_columns, logits_backward, logits_forward, scalar_head_forward
from minirlhf.nn.layers import (
    embedding_backward,
    embedding_forward,
    gelu_forward,
    layernorm_forward,
    linear_forward,
    take_columns_forward,
)
from minirlhf.nn.transformer import positions_of, transformer_forward
from minirlhf.rlhf.advantages import (
    ADVANTAGES,
    IMPORTANCE,
    advantages_without_critic,
    gae,
    importance_weights,
    masked_mean,
    masked_var,
    masked_whiten,
    token_rewards,
)
from minirlhf.rlhf.imitation import cross_entropy_forward
from minirlhf.rlhf.kl import (
    full_kl_forward,
    future_kl,
    kl_estimate,
    sequence_kl_loss_forward,
    summed_penalty,
    token_kl_loss_forward,
)
from minirlhf.rlhf.logprobs import (
    entropy_forward,
    log_softmax,
    response_sum,
    token_logprobs_backward,
    token_logprobs_forward,
)
from minirlhf.rlhf.objectives import (
    cispo_backward,
    cispo_forward,
    gspo_forward,
    ppo_clip_backward,
    ppo_clip_forward,
    token_weights,
    value_loss_backward,
    value_loss_forward,
    weighted_sum_forward,
)
from minirlhf.rlhf.preferences import (
    bradley_terry_forward,
    dpo_backward,
    dpo_forward,
    plackett_luce_backward,
    plackett_luce_forward,
)


@st.composite
def sizes(draw, n, *, most=4):
    """n small sizes, and a Generator."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return *(draw(st.integers(1, most)) for _ in range(n)), rng


def cells(mask):
    """(b, t) of the real tokens."""
    B, T = mask.shape
    return [(b, t) for b in range(B) for t in range(T) if mask[b, t] > 0]


def softmax(row):
    """By the definition; the numbers here are small."""
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def sigma(x):
    return 1.0 / (1.0 + math.exp(-x))


# -- layers --------------------------------------------------------------------------------------


@given(sizes(3))
def test_linear(case):
    rows, I, O, rng = case
    x, w, b = rng.standard_normal((rows, I)), rng.standard_normal((I, O)), rng.standard_normal(O)
    expected = [
        [sum(x[n, i] * w[i, o] for i in range(I)) + b[o] for o in range(O)] for n in range(rows)
    ]
    assert_close(linear_forward(x, w, b)[0], expected)
    assert_close(linear_forward(x[None], w, b)[0], [expected])


@given(sizes(2), st.sampled_from([1e-5, 0.1]))
def test_layernorm(case, eps):
    rows, C, rng = case
    x, gain, bias = 3 * rng.standard_normal((rows, C)) + 1, *rng.standard_normal((2, C))
    expected = []
    for row in x.tolist():
        mean = sum(row) / C
        var = sum((v - mean) ** 2 for v in row) / C
        expected.append(
            [gain[c] * (row[c] - mean) / math.sqrt(var + eps) + bias[c] for c in range(C)]
        )
    assert_close(layernorm_forward(x, gain, bias, eps=eps)[0], expected, 1e-10)


@given(sizes(1, most=20))
def test_gelu(case):
    n, rng = case
    x = 3 * rng.standard_normal(n)
    expected = [
        v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.tolist()
    ]
    assert_close(gelu_forward(x)[0], expected)


@given(sizes(3))
def test_embedding(case):
    N, C, T, rng = case
    table, ids = rng.standard_normal((N, C)), rng.integers(N, size=(2, T))
    y, cache = embedding_forward(table, ids=ids)
    dy = rng.standard_normal(y.shape)
    expected, dtable = np.zeros_like(y), np.zeros_like(table)
    for b in range(2):
        for t in range(T):
            for c in range(C):
                expected[b, t, c] = table[ids[b, t], c]
                dtable[ids[b, t], c] += dy[b, t, c]
    assert_close(y, expected, 0.0)
    assert_close(embedding_backward(dy, cache), dtable)


@given(ragged(), st.sampled_from([(1, 3), (2, 2), (3, 1)]))
def test_attention(case, heads):
    rng, mask = case
    mask = mask[:, ::-1].copy() if rng.random() < 0.5 else mask  # padding left or right
    (B, T), (H, D) = mask.shape, heads
    C = H * D
    qkv = rng.standard_normal((B, T, 3 * C))
    expected = np.zeros((B, T, C))
    for b in range(B):
        for h in range(H):
            q, k, v = (qkv[b, :, part * C + h * D : part * C + (h + 1) * D] for part in range(3))
            for i in range(T):
                seen = [j for j in range(T) if j == i or (j < i and mask[b, j] > 0)]
                scores = [sum(q[i, d] * k[j, d] for d in range(D)) / math.sqrt(D) for j in seen]
                for j, weight in zip(seen, softmax(scores), strict=True):
                    for d in range(D):
                        expected[b, i, h * D + d] += weight * v[j, d]
    out, _ = attention_forward(qkv, n_head=H, allowed=causal_mask(mask))
    assert_close(out, expected)


@given(sizes(4))
def test_heads(case):
    B, T, C, V, rng = case
    h, wte = rng.standard_normal((B, T, C)), rng.standard_normal((V, C))
    w, b = rng.standard_normal((C, 1)), rng.standard_normal(1)
    dlogits = rng.standard_normal((B, T, V))
    logits, dwte, values = np.zeros((B, T, V)), np.zeros((V, C)), np.zeros((B, T))
    for i, t in np.ndindex(B, T):
        values[i, t] = sum(h[i, t, c] * w[c, 0] for c in range(C)) + b[0]
        for a in range(V):
            logits[i, t, a] = sum(h[i, t, c] * wte[a, c] for c in range(C))
            for c in range(C):
                dwte[a, c] += dlogits[i, t, a] * h[i, t, c]
    out, cache = logits_forward(h, wte)
    assert_close(out, logits)
    assert_close(logits_backward(dlogits, cache)[1], dwte)
    assert_close(scalar_head_forward(h, w, b)[0], values)


@given(ragged())
def test_last_columns_and_positions(case):
    rng, mask = case
    B, T = mask.shape
    for side in (mask, mask[:, ::-1].copy()):
        h = rng.standard_normal((B, T, 2))
        last, _ = take_columns_forward(h, columns=last_columns(side))
        positions = positions_of(side)
        for b in range(B):
            real = [t for t in range(T) if side[b, t] > 0]
            assert_close(last[b], h[b, real[-1:]], 0.0)
            for count, t in enumerate(real):
                assert positions[b, t] == count


def naive_gpt(params, ids, *, n_head, eps):
    """GPT-2 on one sequence without padding, one position and one head at a time."""

    def norm(x, gain, bias):
        mean = sum(x) / len(x)
        var = sum((v - mean) ** 2 for v in x) / len(x)
        return [
            g * (v - mean) / math.sqrt(var + eps) + s for v, g, s in zip(x, gain, bias, strict=True)
        ]

    def affine(x, w, b):
        return [sum(x[i] * w[i, o] for i in range(len(x))) + b[o] for o in range(len(b))]

    def gelu(v):
        return v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def plus(x, y):
        return [a + b for a, b in zip(x, y, strict=True)]

    stream = [plus(params["wte"][i], params["wpe"][t]) for t, i in enumerate(ids)]
    for p in params["blocks"]:
        qkv = [affine(norm(x, **p["ln1"]), **p["attn"]["qkv"]) for x in stream]
        C = len(stream[0])
        D = C // n_head
        for t in reversed(range(len(ids))):  # backwards: earlier positions are still untouched
            out = []
            for h in range(n_head):
                lo, hi = h * D, (h + 1) * D
                scores = [
                    sum(qkv[t][c] * qkv[j][C + c] for c in range(lo, hi)) / math.sqrt(D)
                    for j in range(t + 1)
                ]
                weights = softmax(scores)
                for c in range(lo, hi):
                    out.append(sum(weights[j] * qkv[j][2 * C + c] for j in range(t + 1)))
            stream[t] = plus(stream[t], affine(out, **p["attn"]["out"]))
        for t, x in enumerate(stream):
            hidden = [gelu(u) for u in affine(norm(x, **p["ln2"]), **p["mlp"]["up"])]
            stream[t] = plus(x, affine(hidden, **p["mlp"]["down"]))
    return [norm(x, **params["ln_f"]) for x in stream]


@pytest.mark.parametrize("seed", [0, 1])
def test_transformer(seed):
    params = make_params(seed=seed)["transformer"]
    (ids,) = make_ids([5], seed=seed)
    expected = naive_gpt(params, ids, n_head=CONFIG.n_head, eps=CONFIG.ln_eps)
    tokens = np.array([ids])
    h, _ = transformer_forward(params, tokens=tokens, mask=np.ones((1, 5)), config=CONFIG)
    assert_close(h[0], expected, 1e-10)


# -- log-probs -----------------------------------------------------------------------------------


@given(ragged(), st.integers(1, 5), st.sampled_from([0.5, 1.0, 2.0]))
def test_log_probs_and_entropy(case, V, temperature):
    rng, mask = case
    B, T = mask.shape
    logits, targets = 2 * rng.standard_normal((B, T, V)), rng.integers(V, size=(B, T))
    log_p, logp, entropy = np.zeros((B, T, V)), np.zeros((B, T)), np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        p = softmax([z / temperature for z in logits[b, t].tolist()])
        log_p[b, t] = [math.log(v) for v in p]
        logp[b, t] = math.log(p[targets[b, t]])
        entropy[b, t] = -sum(v * math.log(v) for v in p)
    got, _ = token_logprobs_forward(logits, targets=targets, temperature=temperature)
    assert_close(got, logp)
    assert_close(log_softmax(logits, temperature=temperature), log_p)
    assert_close(entropy_forward(logits, temperature=temperature)[0], entropy)
    seq_logp = [0.0] * B
    for b, t in cells(mask):
        seq_logp[b] += logp[b, t]
    assert_close(response_sum(with_junk(logp, mask), mask=mask), seq_logp)


# -- KL ------------------------------------------------------------------------------------------


@given(ragged())
def test_summed_penalty_is_the_sequence_log_ratio(case):
    """sum_t (log pi - log ref) == log Pr_theta(y|x) - log Pr_ref(y|x), logs of whole products."""
    rng, mask = case
    B = len(mask)
    prob, ref_prob = rng.uniform(0.05, 1.0, size=(2, *mask.shape))
    expected = []
    for b in range(B):
        product, ref_product = 1.0, 1.0
        for t in range(mask.shape[1]):
            if mask[b, t] > 0:
                product *= prob[b, t]
                ref_product *= ref_prob[b, t]
        expected.append(math.log(product) - math.log(ref_product))
    logp = with_junk(np.log(prob), mask, junk=[np.nan, np.inf])
    ref_logp = np.log(ref_prob)
    assert_close(summed_penalty(logp, ref_logp, mask=mask), expected)
    ours, theirs = (response_sum(x, mask=mask) for x in (logp, ref_logp))
    assert_close(summed_penalty(logp, ref_logp, mask=mask), ours - theirs)


def k(log_ratio, estimator):
    return {
        "k1": log_ratio,
        "k2": 0.5 * log_ratio**2,
        "k3": math.exp(-log_ratio) - 1.0 + log_ratio,
    }[estimator]


@given(ragged(), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_estimators(case, estimator):
    rng, mask = case
    log_ratio = rng.standard_normal(mask.shape)
    expected = [[k(v, estimator) for v in row] for row in log_ratio.tolist()]
    assert_close(kl_estimate(log_ratio, estimator), expected)


@given(ragged(), st.integers(1, 5), st.sampled_from([0.5, 1.0, 2.0]))
def test_full_kl_and_future_kl(case, V, temperature):
    rng, mask = case
    B, T = mask.shape
    logits, ref_logits = rng.standard_normal((2, B, T, V))
    kl_token, later = np.zeros((B, T)), np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        p = softmax([z / temperature for z in logits[b, t].tolist()])
        q = softmax([z / temperature for z in ref_logits[b, t].tolist()])
        kl_token[b, t] = sum(p[a] * (math.log(p[a]) - math.log(q[a])) for a in range(V))
    for b, t in np.ndindex(B, T):
        later[b, t] = sum(kl_token[b, i] for i in range(t + 1, T) if mask[b, i] > 0)
    got, _ = full_kl_forward(logits, ref_logits=ref_logits, temperature=temperature)
    assert_close(got, kl_token)
    future = future_kl(with_junk(kl_token, mask), mask=mask)
    assert_close(np.where(mask > 0, future, 0.0), np.where(mask > 0, later, 0.0))


RATIOS = st.sampled_from(["none", "differentiated", "held"])


@given(ragged(), st.sampled_from(["k1", "k2", "k3"]), RATIOS)
def test_kl_losses(case, estimator, ratio):
    rng, mask = case
    logp, old_logp, ref_logp = 0.5 * rng.standard_normal((3, *mask.shape))
    weight = rng.uniform(0.1, 1.0, size=len(mask))
    token_loss, sequence_loss = 0.0, 0.0
    for b in range(len(mask)):
        ratio_to_old, to_ref = 0.0, 0.0
        for t in range(mask.shape[1]):
            if mask[b, t] > 0:
                rho = math.exp(logp[b, t] - old_logp[b, t]) if ratio != "none" else 1.0
                token_loss += weight[b] * rho * k(logp[b, t] - ref_logp[b, t], estimator)
                ratio_to_old += logp[b, t] - old_logp[b, t]
                to_ref += logp[b, t] - ref_logp[b, t]
        rho = math.exp(ratio_to_old) if ratio != "none" else 1.0
        sequence_loss += weight[b] * rho * k(to_ref, estimator)
    arguments = {
        "old_logp": with_junk(old_logp, mask, junk=[np.nan, 3.0]),
        "ref_logp": with_junk(ref_logp, mask, junk=[np.nan, 3.0]),
        "weights": weight[:, None] * mask,
        "estimator": estimator,
        "ratio": ratio,
    }
    assert_close(sequence_kl_loss_forward(logp, **arguments)[0], sequence_loss)
    if ratio != "held":
        assert_close(token_kl_loss_forward(logp, **arguments)[0], token_loss)


# -- rewards and advantages ----------------------------------------------------------------------


@given(ragged(), st.sampled_from([0.0, 0.3, 2.0]))
def test_end_of_sequence_reward(case, kl_coef):
    rng, mask = case
    B, T = mask.shape
    score, kl_token = rng.standard_normal(B), rng.standard_normal((B, T))
    expected = np.zeros((B, T))
    for b in range(B):
        last = max(t for t in range(T) if mask[b, t] > 0)
        for t in range(last + 1):
            expected[b, t] = -kl_coef * kl_token[b, t] + (score[b] if t == last else 0.0)
    junk = with_junk(kl_token, mask, junk=[np.nan, 7.0])
    assert_close(token_rewards(score, junk, mask=mask, kl_coef=kl_coef), expected)


@given(ragged(), st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae(case, gamma, lam):
    """A_t = sum_k (gamma lam)^k td_{t+k}: the definition, not the recursion."""
    rng, mask = case
    rewards, values = rng.standard_normal((2, *mask.shape))
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, t in cells(mask):
        length = int(mask[b].sum())
        for i in range(t, length):
            next_value = values[b, i + 1] if i + 1 < length else 0.0
            td = rewards[b, i] + gamma * next_value - values[b, i]
            advantages[b, t] += (gamma * lam) ** (i - t) * td
        returns[b, t] = advantages[b, t] + values[b, t]
    got = gae(with_junk(rewards, mask), with_junk(values, mask), mask=mask, gamma=gamma, lam=lam)
    assert_close(got[0], advantages)
    assert_close(got[1], returns)


@given(ragged(max_B=4), st.integers(2, 4), st.sampled_from(ADVANTAGES[1:]))
def test_advantages_without_critic(case, G, form):
    """Each response beside the G - 1 others to its prompt; of a batch the reward to go."""
    rng, mask = case
    mask = np.repeat(mask, G, axis=0)
    rewards = with_junk(rng.standard_normal(mask.shape), mask)
    total = [
        sum(rewards[b, t] for t in range(mask.shape[1]) if mask[b, t]) for b in range(len(mask))
    ]
    expected = np.zeros(mask.shape)
    for b, t in cells(mask):
        same = [total[i] for i in range(len(mask)) if i // G == b // G]
        others = [total[i] for i in range(len(mask)) if i // G == b // G and i != b]
        centred = total[b] - sum(same) / G
        expected[b, t] = {
            "group": centred / (statistics.stdev(same) + 1e-4),
            "group-mean": centred,
            "leave-one-out": total[b] - sum(others) / (G - 1),
            "batch": sum(rewards[b, i] for i in range(t, mask.shape[1]) if mask[b, i]),
        }[form]
    got = advantages_without_critic(rewards, mask=mask, form=form, samples_per_prompt=G)
    assert_close(got, expected)


def test_equal_rewards_of_a_group_teach_nothing():
    """Exactly: the sd of GRPO would make a rounding of 1e-16 a thousand times as large."""
    rewards, mask = np.full((6, 2), 0.1), np.ones((6, 2))
    rewards[:, 0] = np.repeat([0.7, 1e6], 3)
    for form in set(ADVANTAGES) - {"gae", "batch"}:
        got = advantages_without_critic(rewards, mask=mask, form=form, samples_per_prompt=3)
        assert (got == 0).all()


@pytest.mark.parametrize(
    ("form", "G", "came"), [("group", 1, "1"), ("leave-one-out", 2, "2"), ("gae", 3, "3")]
)
def test_groups_that_do_not_fit_are_refused(form, G, came):
    x = np.ones((3, 2))
    with pytest.raises(ValueError, match=f"got '{form}', and 3 responses in groups of {came}"):
        advantages_without_critic(x, mask=x, form=form, samples_per_prompt=G)


@given(ragged(), st.sampled_from(IMPORTANCE[1:]), st.sampled_from((1.2, 2.0)))
def test_importance_weights(case, form, cap):
    rng, mask = case
    logp, sampler = (with_junk(rng.standard_normal(mask.shape), mask) for _ in range(2))
    expected = np.zeros(mask.shape)
    for b, t in cells(mask):
        ratio = math.exp(logp[b, t] - sampler[b, t])
        inside = 1 / cap <= ratio <= cap
        expected[b, t] = min(ratio, cap) if form == "tis" else ratio if inside else 0.0
    assert_close(importance_weights(logp, sampler, mask=mask, form=form, cap=cap), expected)


def test_importance_weights_of_other_forms_are_refused():
    x = np.ones((2, 3))
    for form, cap in (("none", 2.0), ("tis", 1.0)):
        with pytest.raises(ValueError, match=f"expected tis or mis, and cap > 1; got '{form}'"):
            importance_weights(x, x, mask=x, form=form, cap=cap)


@given(ragged(), st.sampled_from(("ppo", "book", "none")))
def test_gspo(case, clip):
    """PPO's objective of s = (pi(y) / old(y))^(1/|y|), at every token of y."""
    rng, mask = case
    weights = mask * rng.uniform(0.5, 2.0, size=(len(mask), 1))
    logp, old, A = rng.standard_normal((3, *mask.shape))
    logp, A = with_junk(logp, mask, junk=[np.nan, 3.0]), with_junk(A, mask)
    total = 0.0
    for b, t in cells(mask):
        y = [i for i in range(mask.shape[1]) if mask[b, i]]
        s = math.exp(sum(logp[b, i] - old[b, i] for i in y) / len(y))
        clipped = {"ppo": min(max(s, 0.8), 1.2), "book": min(s, 1.2), "none": s}[clip]
        lower = min(s * A[b, t], clipped * A[b, t]) if clip == "ppo" else clipped * A[b, t]
        total -= weights[b, t] * lower
    loss, _ = gspo_forward(logp, old_logp=old, advantages=A, weights=weights, clip=clip)
    assert_close(loss, total)


@given(ragged(), st.sampled_from(("ppo", "book", "none")))
def test_cispo(case, clip):
    """-sum w c A logp with the cut weight c; its gradient does not pass through c."""
    rng, mask = case
    weights = mask * rng.uniform(0.5, 2.0, size=mask.shape)
    logp, old, A = rng.standard_normal((3, *mask.shape))
    logp, A = with_junk(logp, mask, junk=[np.nan, 3.0]), with_junk(A, mask)
    total, slopes = 0.0, np.zeros(mask.shape)
    for b, t in cells(mask):
        ratio = math.exp(logp[b, t] - old[b, t])
        c = {"ppo": min(max(ratio, 0.8), 1.2), "book": min(ratio, 1.2), "none": ratio}[clip]
        slopes[b, t] = -weights[b, t] * c * A[b, t]
        total += slopes[b, t] * logp[b, t]
    loss, cache = cispo_forward(logp, old_logp=old, advantages=A, weights=weights, clip=clip)
    assert_close(loss, total)
    assert_close(cispo_backward(1.0, cache), slopes)


@given(ragged(), st.booleans())
def test_masked_mean_variance_whitening(case, shift_mean):
    rng, mask = case
    x = 2 * rng.standard_normal(mask.shape) + 1
    kept = [x[b, t] for b, t in cells(mask)]
    mean = sum(kept) / len(kept)
    var = sum((v - mean) ** 2 for v in kept) / len(kept)
    scale = math.sqrt(var + 1e-8)
    expected = np.zeros(mask.shape)
    for b, t in cells(mask):
        expected[b, t] = (x[b, t] - mean) / scale + (0.0 if shift_mean else mean)
    junk = with_junk(x, mask, junk=[np.nan, np.inf])
    assert_close(masked_mean(junk, mask=mask), mean)
    assert_close(masked_var(junk, mask=mask), var)
    white, got_scale = masked_whiten(junk, mask=mask, shift_mean=shift_mean)
    assert_close(white, expected, 1e-10)
    assert_close(got_scale, scale)


# -- losses --------------------------------------------------------------------------------------


def random_weights(rng, mask):
    return rng.uniform(0.1, 1.0, size=mask.shape) * mask


@given(ragged())
def test_cross_entropy_and_weighted_sum(case):
    rng, mask = case
    x, weights = rng.standard_normal(mask.shape), random_weights(rng, mask)
    total = sum(weights[b, t] * x[b, t] for b, t in cells(mask))
    assert_close(weighted_sum_forward(with_junk(x, mask), weights=weights)[0], total)
    assert_close(cross_entropy_forward(with_junk(x, mask), weights=weights)[0], -total)


@given(
    ragged(),
    st.sampled_from(["ppo", "book", "none"]),
    st.sampled_from([0.2, (0.1, 0.3), 0.0]),
    st.sampled_from([None, 1.5, 3.0]),
)
def test_ppo_clip(case, clip, clip_eps, dual_clip):
    rng, mask = case
    logp, old_logp, advantages = rng.standard_normal((3, *mask.shape))
    weights = random_weights(rng, mask)
    low, high = clip_eps if isinstance(clip_eps, tuple) else (clip_eps, clip_eps)
    loss = 0.0
    for b, t in cells(mask):
        A, ratio = advantages[b, t], math.exp(logp[b, t] - old_logp[b, t])
        if clip == "ppo":
            obj = min(ratio * A, min(max(ratio, 1 - low), 1 + high) * A)
        elif clip == "book":
            obj = min(ratio, min(max(ratio, 1 - low), 1 + high)) * A  # as printed
        else:
            obj = ratio * A
        if dual_clip and A < 0:
            obj = max(obj, dual_clip * A)
        loss -= weights[b, t] * obj
    got, _ = ppo_clip_forward(
        with_junk(logp, mask, junk=[np.nan, 3.0]),
        old_logp=old_logp,
        advantages=with_junk(advantages, mask),
        weights=weights,
        clip_eps=clip_eps,
        clip=clip,
        dual_clip=dual_clip,
    )
    assert_close(got, loss)


@given(ragged(), st.sampled_from([None, 0.05, 0.5]))
def test_value_loss(case, clip_eps):
    rng, mask = case
    values, old_values, returns = rng.standard_normal((3, *mask.shape))
    weights = random_weights(rng, mask)
    loss = 0.0
    for b, t in cells(mask):
        V, V_old, R = values[b, t], old_values[b, t], returns[b, t]
        error = (V - R) ** 2
        if clip_eps is not None:
            V_c = V_old + min(max(V - V_old, -clip_eps), clip_eps)
            error = max(error, (V_c - R) ** 2)
        loss += 0.5 * weights[b, t] * error
    got, _ = value_loss_forward(
        with_junk(values, mask, junk=[np.nan, 3.0]),
        old_values=old_values,
        returns=with_junk(returns, mask, junk=[np.nan, 3.0]),
        weights=weights,
        clip_eps=clip_eps,
    )
    assert_close(got, loss)


@given(sizes(1), st.sampled_from([0.0, 0.7]), st.sampled_from([0.0, 0.1]))
def test_bradley_terry(case, margin, smoothing):
    B, rng = case
    chosen, rejected = 2 * rng.standard_normal((2, B))
    loss = 0.0
    for b in range(B):
        d = chosen[b] - rejected[b] - margin
        loss -= ((1 - smoothing) * math.log(sigma(d)) + smoothing * math.log(sigma(-d))) / B
    got, _ = bradley_terry_forward(chosen, rejected, margin=margin, label_smoothing=smoothing)
    assert_close(got, loss)


@given(sizes(2))
def test_plackett_luce(case):
    B, K, rng = case
    K += 1
    scores = 2 * rng.standard_normal((B, K))
    lists = 0.0
    for row in scores.tolist():
        for i in range(K):
            lists -= math.log(softmax(row[i:])[0]) / B
    assert_close(plackett_luce_forward(scores)[0], lists)


# -- worked numbers ------------------------------------------------------------------------------


def penalty(logp, ref_logp):
    logp, ref_logp = np.array([logp]), np.array([ref_logp])
    return float(summed_penalty(logp, ref_logp, mask=np.ones_like(logp))[0])


def test_penalty_fixtures():
    assert penalty([-2.5], [-4.0]) == 1.5  # -2.5 - (-4.0)
    # 'Good day': (-0.8 + 1.5) + (-0.4 + 2.1) = 0.7 + 1.7
    assert penalty([-0.8, -0.4], [-1.5, -2.1]) == pytest.approx(2.4, abs=LOOPS)
    # Equal probabilities: 0, however unlikely the response is.
    assert penalty([-7.0, -0.1, -30.0], [-7.0, -0.1, -30.0]) == 0.0
    # One sample, so it may be negative: -4.0 - (-2.5).
    assert penalty([-4.0], [-2.5]) == -1.5


def test_penalty_counts_the_stop_token_and_no_padding():
    logp, ref_logp = np.array([[-1.0, -2.0, 9.0]]), np.array([[-1.5, -4.0, -9.0]])
    # tokens: letter, eos, pad: (-1 + 1.5) + (-2 + 4) = 2.5
    assert summed_penalty(logp, ref_logp, mask=np.array([[1.0, 1.0, 0.0]])) == 2.5


def test_penalty_refuses_other_shapes():
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"one shape; got \(2, 3\), \(2, 2\), \(2, 3\)"):
        summed_penalty(x, x[:, :2], mask=x)


def test_advantage_fixture():
    # One step: 0.5 + 0.9 * 1.0 - 1.2 = 0.2
    advantages, _ = gae(
        np.array([[0.5, 0.0]]), np.array([[1.2, 1.0]]), mask=np.ones((1, 2)), gamma=0.9, lam=0.0
    )
    assert advantages[0, 0] == pytest.approx(0.2, abs=LOOPS)


@pytest.mark.parametrize(("advantage", "direction"), [(2.0, 1.0), (-1.5, -1.0)])
def test_a_good_action_becomes_likelier_and_a_bad_one_less_likely(advantage, direction):
    one = np.ones((1, 1))
    _, cache = ppo_clip_forward(
        -one, old_logp=-one, advantages=advantage * one, weights=one, clip_eps=0.2
    )
    # A step against the gradient moves logp by -dlogp = +A.
    assert -ppo_clip_backward(1.0, cache)[0, 0] == advantage
    assert np.sign(advantage) == direction


@given(ragged(), st.integers(2, 4), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.7]))
def test_the_gradient_on_the_logits(case, V, temperature, kl_coef):
    """dz_a = -w ratio A (1[a = y] - P_a) / tau from the score and the penalty on, loops alone.

    A holds the penalty: it is made of rewards -beta kl_token and, at the last token, the score.
    """
    rng, mask = case
    (B, T), targets = mask.shape, rng.integers(V, size=mask.shape)
    logits, old_logits, ref_logits = rng.standard_normal((3, B, T, V))
    score, weights = rng.standard_normal(B), token_weights(mask)

    def log_p(table, b, t, a):
        return math.log(softmax([z / temperature for z in table[b, t].tolist()])[a])

    expected = np.zeros_like(logits)
    for b, t in cells(mask):
        earned = score[b]  # gamma = lam = 1, V = 0: A_t is the score less the penalty from t on
        for i in range(t, int(mask[b].sum())):
            y = targets[b, i]
            earned -= kl_coef * (log_p(old_logits, b, i, y) - log_p(ref_logits, b, i, y))
        y = targets[b, t]
        ratio = math.exp(log_p(logits, b, t, y) - log_p(old_logits, b, t, y))
        for a in range(V):
            P_a = math.exp(log_p(logits, b, t, a))
            expected[b, t, a] = -weights[b, t] * ratio * earned * ((a == y) - P_a) / temperature

    settings = {"targets": targets, "temperature": temperature}
    logp, cache = token_logprobs_forward(logits, **settings)
    old_logp, _ = token_logprobs_forward(old_logits, **settings)
    ref_logp, _ = token_logprobs_forward(ref_logits, **settings)
    rewards = token_rewards(score, old_logp - ref_logp, mask=mask, kl_coef=kl_coef)
    advantages, _ = gae(rewards, np.zeros_like(rewards), mask=mask, gamma=1.0, lam=1.0)
    _, clip = ppo_clip_forward(
        logp, old_logp=old_logp, advantages=advantages, weights=weights, clip="none"
    )
    assert_close(token_logprobs_backward(ppo_clip_backward(1.0, clip), cache), expected)


def test_value_target_fixture():
    rewards, values = np.array([[0.5, 0.0]]), np.array([[3.0, 4.0]])
    _, returns = gae(rewards, values, mask=np.ones((1, 2)), gamma=0.9, lam=0.0)
    assert returns[0, 0] == pytest.approx(4.1, abs=LOOPS)  # 0.5 + 0.9 * 4.0
    first = np.array([[1.0, 0.0]])
    loss, cache = value_loss_forward(
        values, old_values=values, returns=returns, weights=first, clip_eps=None
    )
    assert 2 * float(loss) == pytest.approx(1.21, abs=LOOPS)  # (4.1 - 3.0)^2; ours is half of it
    # dL/dV = V - R = -1.1: the target is constant, so only V(s) moves, towards it.
    assert_close(value_loss_backward(1.0, cache), [[-1.1, 0.0]])


def test_clipped_value_fixture():
    one = np.ones((1, 1))

    def loss_and_slope(V, V_old, R):
        loss, cache = value_loss_forward(
            V * one, old_values=V_old * one, returns=R * one, weights=one, clip_eps=0.2
        )
        return float(loss), float(value_loss_backward(1.0, cache)[0, 0])

    # V ran 0.5 towards R = 1; V_c = 0.2 is further away: (0.2 - 1)^2 / 2 = 0.32, and no slope.
    assert loss_and_slope(0.5, 0.0, 1.0) == (pytest.approx(0.32), 0.0)
    # V ran away from R = -1: (0.5 + 1)^2 / 2 = 1.125 > (0.2 + 1)^2 / 2, slope V - R.
    assert loss_and_slope(0.5, 0.0, -1.0) == (pytest.approx(1.125), pytest.approx(1.5))
    # Inside the range both errors are the same.
    assert loss_and_slope(0.1, 0.0, 1.0) == (pytest.approx(0.405), pytest.approx(-0.9))


@given(sizes(1), st.sampled_from([0.1, 2.0]), st.sampled_from([0.0, 0.1]))
def test_dpo(case, beta, smoothing):
    B, rng = case
    chosen, rejected = 2 * rng.standard_normal((2, B))
    dpo = ipo = 0.0
    for b in range(B):
        x = chosen[b] - rejected[b]
        for share, lead in ((1 - smoothing, x), (smoothing, -x)):
            dpo -= share * math.log(sigma(beta * lead)) / B
            ipo += share * (lead - 1 / (2 * beta)) ** 2 / B
    same = {"kl_coef": beta, "label_smoothing": smoothing}
    assert_close(dpo_forward(chosen, rejected, **same)[0], dpo)
    assert_close(dpo_forward(chosen, rejected, loss="ipo", **same)[0], ipo)


def test_dpo_fixture():
    # 'Good day' gained 2.4 nats, the other reply lost 0.6: x = 3, h = 0.5 * 3 = 1.5.
    chosen, rejected = np.array([2.4]), np.array([-0.6])
    loss, cache = dpo_forward(chosen, rejected, kl_coef=0.5)
    assert float(loss) == pytest.approx(0.2014, abs=5e-5)  # -log sigma(1.5) = log(1 + e^-1.5)
    dchosen, drejected = dpo_backward(1.0, cache)
    assert float(dchosen[0]) == pytest.approx(-0.0912, abs=5e-5)  # -0.5 sigma(-1.5)
    assert float(drejected[0]) == -float(dchosen[0])
    loss, cache = dpo_forward(chosen, rejected, kl_coef=0.5, loss="ipo")
    assert float(loss) == pytest.approx(4.0)  # (3 - 1 / (2 * 0.5))^2
    assert float(dpo_backward(1.0, cache)[0][0]) == pytest.approx(4.0)  # 2 (3 - 1): x falls
    # 10 % of labels flipped: .9 * 0.2014 + .1 * 1.7014
    loss, _ = dpo_forward(chosen, rejected, kl_coef=0.5, label_smoothing=0.1)
    assert float(loss) == pytest.approx(0.3514, abs=5e-5)


def test_bradley_terry_fixture():
    loss, _ = bradley_terry_forward(np.array([2.0]), np.array([-0.2]))
    assert math.exp(-float(loss)) == pytest.approx(0.900, abs=5e-4)  # sigma(2.2) = 1 / (1 + e^-2.2)
    # Pr = 1/4 needs a difference of log(1/3); the loss is -log(1/4) = 1.386.
    loss, _ = bradley_terry_forward(np.array([math.log(1 / 3)]), np.array([0.0]))
    assert float(loss) == pytest.approx(1.386, abs=5e-4)
    # Equal scores: a coin, log 2.
    loss, _ = bradley_terry_forward(np.array([5.0]), np.array([5.0]))
    assert float(loss) == pytest.approx(math.log(2), abs=LOOPS)


def test_plackett_luce_fixtures():
    # Worths 9, 6, 3: 9/18 * 6/9 * 3/3 = 1/2 * 2/3 * 1 = 1/3.
    loss, cache = plackett_luce_forward(np.log(np.array([[9.0, 6.0, 3.0]])))
    assert math.exp(-float(loss)) == pytest.approx(1 / 3, abs=LOOPS)
    # Slopes: softmax - 1 summed over the steps an item is there for:
    # 1/2 - 1, 1/3 + 2/3 - 1, 1/6 + 1/3 + 1 - 1.
    assert_close(plackett_luce_backward(1.0, cache), [[-0.5, 0.0, 0.5]])
    # log-probabilities of the steps -0.6, -1.3 and 0 add up to -1.9: the first item has the share
    # e^-0.6 of all worth, the second e^-1.3 of what then remains.
    first = math.exp(-0.6)
    second = math.exp(-1.3) * (1 - first)
    scores = np.log(np.array([[first, second, 1 - first - second]]))
    assert float(plackett_luce_forward(scores)[0]) == pytest.approx(1.9, abs=LOOPS)


def test_end_of_sequence_fixture():
    rewards = token_rewards(np.array([0.7]), np.zeros((1, 4)), mask=np.ones((1, 4)), kl_coef=0.2)
    assert rewards.tolist() == [[0.0, 0.0, 0.0, 0.7]]  # 'The cat sat .' -> [0, 0, 0, r]
    # Cut off at two tokens, with a penalty of 0.5 nats each: [-0.2 * 0.5, -0.2 * 0.5 + 0.7]
    mask = np.array([[1.0, 1.0, 0.0, 0.0]])
    rewards = token_rewards(np.array([0.7]), np.full((1, 4), 0.5), mask=mask, kl_coef=0.2)
    assert_close(rewards, [[-0.1, 0.6, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("clip", "ratio", "advantage", "obj", "slope"),
    [
        ("ppo", 3.0, 100.0, 1.2 * 100.0, 0.0),  # above 1.2: capped, and no reason to go on
        ("book", 3.0, 100.0, 1.2 * 100.0, 0.0),
        ("book", 2.0, 1.0, 1.2, 0.0),  # min(2, 1.2) A
        ("book", 0.1, -1.0, -0.1, -0.1),  # min(0.1, 1.2) A: still pushed down
        ("ppo", 0.1, -1.0, -0.8, 0.0),  # min(0.1 A, 0.8 A) = 0.8 A: far enough
    ],
)
def test_clip_fixtures(clip, ratio, advantage, obj, slope):
    one = np.ones((1, 1))
    loss, cache = ppo_clip_forward(
        math.log(ratio) * one,
        old_logp=0.0 * one,
        advantages=advantage * one,
        weights=one,
        clip_eps=0.2,
        clip=clip,
    )
    assert -float(loss) == pytest.approx(obj)
    assert -float(ppo_clip_backward(1.0, cache)[0, 0]) == pytest.approx(slope)  # d obj / d logp
