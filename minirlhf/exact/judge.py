"""Anybody's KL term against the exact answer: what does its gradient descend?

A function of one sampled response is differentiated at *every* response of a small world and summed
with the probabilities: its expected gradient, which is then looked up among the exact gradients of
what a KL term may descend. The world has 4 tokens, 121 responses of up to 4 tokens, and random
transformers; three distances from the reference; sampled by the policy itself, and by an old one.

A gradient is kept as coefficients c (N, V), one a prefix s and token a:

    sum over s, a of c(s, a) grad log pi(a|s)

A loss adds to c(s_t, y_t) its slope at log pi(y_t|s_t). The inner product of two gradients in the
transformer's parameters is c K c', with K (N V, N V) from one backward for each logit.

`app/judge.py` makes `Slopes` of a function in NumPy, PyTorch or JAX, and is what one calls.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minirlhf.exact.experiments import RandomWorld, make_random_world
from minirlhf.exact.tree_policy import tree_logits
from minirlhf.tree import tree_map

DISTANCES = (0.3, 0.6, 1.0)  # shares of the way from the reference to a random policy
SAMPLERS = ("theta", "old")
TINY = 1e-20  # the square of a gradient that is 0 up to rounding
SAME = 1e-6  # relative; central differences err by 1e-9
# Slopes of a function of one response at its log-probs: (value, (T,) d value / d logp)
Slopes = Callable[[dict[str, np.ndarray]], tuple[float, np.ndarray]]

MEANS = {  # what a gradient may be the gradient of
    "kl": "KL(pi || ref): the penalty",
    "forward_kl": "KL(ref || pi)",
    "half_chi2": "half of chi^2(pi || ref)",
    "token_kl": "KL(pi || ref) token by token, prefixes as given: a part of the gradient",
    "token_forward_kl": "KL(ref || pi) token by token, prefixes as given",
    "token_half_chi2": "half of chi^2(pi || ref) token by token, prefixes as given",
    "kl_minus_forward_kl": "KL(pi || ref) - KL(ref || pi): the sequence's k3 in the reward",
    "kl_minus_token_forward_kl": "KL(pi || ref) - KL(ref || pi) token by token: k3 in the reward",
    "score_times_k2": "no divergence: k2 in the reward",
    "kl_minus_entropy": "KL(pi || ref) - entropy: the weight of the score is differentiated too",
    "mean_kl": "KL(pi || ref), each response divided by its length",
    "mean_token_kl": "KL token by token, each response divided by its length",
    "mean_token_forward_kl": "KL(ref || pi) token by token, each divided by its length",
    "mean_token_half_chi2": "half of chi^2 token by token, each divided by its length",
    "mean_nothing": "nothing but length: k1, each response divided by its length",
    "minus_kl_old": "-KL(old || pi): away from the policy that sampled",
}
NOTHING, NONE = "nothing", "none of these"


class Setting(NamedTuple):
    """One distance from the reference and one policy that samples."""

    world: RandomWorld
    sampler: str  # "theta" (on-policy) or "old"
    metric: np.ndarray  # (N V, N V): inner products in the parameters of coefficients
    logp: dict[str, np.ndarray]  # theta, old, ref -> (M, T) of the sampled tokens; noise at padding

    @property
    def kl_seq(self) -> float:
        """KL(theta || ref) [nats]."""
        lr = (self.logp["theta"] - self.logp["ref"]) * self.world.responses.mask
        return float(self.world.probs("theta") @ lr.sum(axis=1))

    def coefficients(self, slopes: np.ndarray) -> np.ndarray:
        """(M, N V) of each response from its slopes (M, T)."""
        responses, tree = self.world.responses, self.world.tree
        c = np.zeros((len(slopes), tree.n_nodes, tree.vocab_size))
        rows = np.arange(len(slopes))[:, None]
        np.add.at(c, (rows, responses.nodes, responses.tokens), slopes * responses.mask)
        return c.reshape(len(slopes), -1)

    def expected(self, slopes: np.ndarray, sampler: str) -> np.ndarray:
        """(N V,) mean of the coefficients over the responses of a policy."""
        return self.world.probs(sampler) @ self.coefficients(slopes)

    def dot(self, a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ self.metric @ b)


@functools.lru_cache(maxsize=4)
def make_settings(seed: int = 0) -> list[Setting]:
    """Three distances, on-policy and on the samples of an old policy."""
    return [_setting(share, sampler, seed) for sampler in SAMPLERS for share in DISTANCES]


def _setting(share: float, sampler: str, seed: int) -> Setting:
    base = make_random_world(seed=seed)
    policies, ref = dict(base.policies), base.policies["ref"]
    policies["theta"] = tree_map(lambda a, b: a + share * (b - a), ref, policies["theta"])
    way = 0.0 if sampler == "theta" else 0.3
    policies["old"] = tree_map(lambda a, b: a + way * (b - a), policies["theta"], policies["old"])
    logits = {name: tree_logits(params, **base.where) for name, params in policies.items()}
    world = base._replace(policies=policies, logits=logits)
    log_pi, responses = world.log_probs("theta"), world.responses
    N, V = log_pi.shape
    # grad log pi(a|s) = grad z(s, a) - sum_b pi(b|s) grad z(s, b)
    jacobian = world.jacobian("theta").reshape(N, V, -1)
    score = jacobian - (np.exp(log_pi)[:, :, None] * jacobian).sum(axis=1, keepdims=True)
    score = score.reshape(N * V, -1)
    rng, logp = np.random.default_rng([seed, 3]), {}
    for name in policies:  # what stands at padding must not matter
        values = world.log_probs(name)[responses.nodes, responses.tokens]
        logp[name] = np.where(responses.mask > 0, values, -1 - rng.random(values.shape))
    if sampler == "theta":
        logp["old"] = logp["theta"]
    return Setting(world, sampler, score @ score.T, logp)


# -- what a gradient may be the gradient of ------------------------------------------------------
def exact_gradients(setting: Setting) -> dict[str, np.ndarray]:
    """MEANS as coefficients (N V,), each the exact gradient; and as samples of old would give it.

    D(pi) = sum_y pi(y) f(log_ratio(y)) has the gradient sum_y pi(y) c(y) grad log pi(y), with
    c = f + f' and any constant more, because E[grad log pi] = 0: log_ratio for the KL,
    1 - exp(-log_ratio) for KL(ref || pi), exp(log_ratio) - 1 for half of chi^2. With the prefixes
    as given each token has a c of its own log-ratio alone. "on samples of old": weighed by old.
    """
    mask = setting.world.responses.mask
    lr = (setting.logp["theta"] - setting.logp["ref"]) * mask  # (M, T)

    def whole(of_tokens: np.ndarray) -> np.ndarray:
        return of_tokens.sum(axis=1, keepdims=True) * mask

    forward, chi2, length = -np.expm1(-lr), np.expm1(lr), mask.sum(axis=1, keepdims=True)
    slopes = {
        "kl": whole(lr),
        "forward_kl": -np.expm1(-whole(lr)),
        "half_chi2": np.expm1(whole(lr)),
        "token_kl": lr,
        "token_forward_kl": forward,
        "token_half_chi2": chi2,
        "kl_minus_forward_kl": whole(lr) + np.expm1(-whole(lr)),
        "kl_minus_token_forward_kl": whole(lr - forward),
        "score_times_k2": whole(0.5 * lr * lr),
        "kl_minus_entropy": whole(lr + setting.logp["theta"] * mask),
        "mean_kl": whole(lr) / length,
        "mean_token_kl": lr / length,
        "mean_token_forward_kl": forward / length,
        "mean_token_half_chi2": chi2 / length,
        "mean_nothing": mask / length,
    }
    found = {name: setting.expected(c, "theta") for name, c in slopes.items()}
    found["minus_kl_old"] = setting.expected(mask, "old")
    if setting.sampler == "old":
        biased = {name: setting.expected(c, "old") for name, c in slopes.items()}
        found |= {f"{name} on samples of old": c for name, c in biased.items()}
    return found


def exact_values(setting: Setting) -> dict[str, float]:
    """What the value of a term may be the mean of, on samples of the policy [nats]."""
    lr = (setting.logp["theta"] - setting.logp["ref"]) * setting.world.responses.mask
    length, p = setting.world.responses.mask.sum(axis=1), setting.world.probs("theta")
    of = {"kl": lr.sum(axis=1), "kl / length": lr.sum(axis=1) / length, "old": 0 * length}
    of["forward_kl"] = -(np.exp(-lr.sum(axis=1))) * lr.sum(axis=1)
    of["half_chi2"] = 0.5 * np.expm1(lr.sum(axis=1))
    of["chi2 - kl"] = np.expm1(lr.sum(axis=1)) - lr.sum(axis=1)
    of["chi2 - kl, token by token"] = (np.expm1(lr) - lr).sum(axis=1)
    return {name: float(p @ x) for name, x in of.items()}


# -- the judgement -------------------------------------------------------------------------------
class Verdict(NamedTuple):
    """What a term's gradient is on average, for one sampler, over all distances."""

    sampler: str
    descends: str  # a name of MEANS, "nothing" or "none of these"
    factor: float  # times its gradient; negative: it ascends
    nearest: str  # the name with the largest |cosine|, for "none of these"
    rows: list[dict[str, float]]  # a distance each: kl_seq, value, error, cosine, noise

    @property
    def right(self) -> bool:
        """Is it the gradient of the penalty, neither more nor less?"""
        return self.descends == "kl" and abs(self.factor - 1) < SAME


def judge_slopes(slopes: Slopes, *, form: str = "loss", seed: int = 0) -> list[Verdict]:
    """A verdict for each sampler.

    Args:     slopes: of one response, from "logp", "old_logp", "ref_logp" and "mask", each (1, T).
              form: "loss", what is differentiated; or "reward", terms (T,) that are constants and
                  multiply the score of their own and of all earlier tokens, as in PPO.
    """
    settings = make_settings(seed)
    return [
        _verdict(sampler, [s for s in settings if s.sampler == sampler], slopes, form)
        for sampler in SAMPLERS
    ]


def _verdict(sampler: str, settings: list[Setting], slopes: Slopes, form: str) -> Verdict:
    known = [exact_gradients(setting) for setting in settings]
    rows, means = [], []
    for setting, gradients in zip(settings, known, strict=True):
        values, c = _of_all(slopes, setting, form)
        probs, g = setting.world.probs(sampler), gradients["kl"]
        mean, size = probs @ c, np.sqrt(setting.dot(g, g))
        square, second = setting.dot(mean, mean), probs @ ((c @ setting.metric) * c).sum(axis=1)
        off = np.sqrt(max(0.0, setting.dot(mean - g, mean - g)))
        zero = square <= SAME * SAME * second
        row = {"kl_seq": setting.kl_seq, "value": probs @ values, "error": off / size}
        row["cosine"] = 0.0 if zero else setting.dot(mean, g) / (np.sqrt(square) * size)
        row["noise"] = np.sqrt(max(0.0, second - square)) / size
        rows.append({name: float(x) for name, x in row.items()})
        means.append(mean * (not zero))
    name, factor, nearest = _look_up(settings, known, means)
    return Verdict(sampler, name, factor, nearest, rows)


def _of_all(slopes: Slopes, setting: Setting, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Values (M,) and coefficients (M, N V) of every response."""
    mask, logp = setting.world.responses.mask, setting.logp
    names = {"logp": "theta" if form == "loss" else "old", "old_logp": "old", "ref_logp": "ref"}
    values, of_tokens = np.zeros(len(mask)), np.zeros(mask.shape)
    for y in range(len(mask)):
        one = {name: logp[policy][y : y + 1].copy() for name, policy in names.items()}
        values[y], of_tokens[y] = slopes({**one, "mask": mask[y : y + 1].copy()})
    if form == "reward":  # a constant that multiplies ratio_t and the scores of all earlier tokens
        to_go = (of_tokens * mask)[:, ::-1].cumsum(axis=1)[:, ::-1]
        of_tokens = to_go * np.exp((logp["theta"] - logp["old"]) * mask)
    return values, setting.coefficients(of_tokens)


def _look_up(
    settings: list[Setting], known: list[dict[str, np.ndarray]], means: list[np.ndarray]
) -> tuple[str, float, str]:
    """(name, factor, nearest): the exact gradient of which the mean is a multiple everywhere."""
    if not any(mean.any() for mean in means):
        return NOTHING, 0.0, NOTHING
    nearest: dict[str, float] = {}
    for name in known[0]:
        factors, angles = [], []
        for setting, gradients, mean in zip(settings, known, means, strict=True):
            d = gradients[name]
            dd, mm, md = setting.dot(d, d), setting.dot(mean, mean), setting.dot(mean, d)
            if not (dd > TINY and mm > TINY):
                break
            factors.append(md / dd)
            off = mean - factors[-1] * d
            angles.append((md / np.sqrt(dd * mm), np.sqrt(max(0.0, setting.dot(off, off)) / mm)))
        else:
            spread = np.ptp(factors) / abs(factors[0])
            if spread < SAME and max(off for _, off in angles) < SAME:
                return name, float(np.mean(factors)), name
            nearest[name] = min(abs(cosine) for cosine, _ in angles)
    return NONE, float("nan"), max(nearest, key=nearest.__getitem__, default=NOTHING)
