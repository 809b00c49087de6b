"""Anybody's KL term, loss or advantages against the exact answer: what does the gradient descend?

What a function says of one sampled response is asked at *every* response of a small world and
summed with the probabilities: its expected gradient, which is then looked up among the exact
gradients of what it may descend. At three distances from the reference; on the policy's own
samples, and on those of an old one. `app/judge.py` makes the functions asked here of anybody's.

A gradient in the transformer's P parameters comes from coefficients c, one a prefix s and token a,

    sum over s, a of c(s, a) grad log pi(a|s)

A loss adds to c(s_t, y_t) its slope at log pi(y_t|s_t).
"""

import functools
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minirlhf.exact import optimum
from minirlhf.exact.expected import RandomWorld, beside, make_random_world
from minirlhf.exact.tree_policy import tree_logits
from minirlhf.rlhf.advantages import token_rewards
from minirlhf.tree import tree_map

Arrays = dict[str, np.ndarray]
# What a function gives for one response or group: its value, and slopes or numbers (B, T)
Answer = Callable[[Arrays], tuple[float, np.ndarray]]

DISTANCES = (0.3, 0.6, 1.0)  # shares of the way from the reference to a random policy
OLD = 0.3  # share of the way from that policy to the one that sampled
KL_COEF = 0.5  # of k1 in the rewards that an estimator of advantages gets
VALUES = {  # and the values: share of the exact ones, and standard deviation of noise
    "exact values": (1.0, 0.0),
    "values 0": (0.0, 0.0),
    "values off by 0.5 noise": (1.0, 0.5),
}
SAME = 1e-5  # relative; central differences err by 1e-9, a float32 inside by 1e-6
NOTHING, NONE = "nothing", "none of these"
SAMPLERS = {"samples of the policy": "theta", "samples of an old policy": "old"}

MEANS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
MEAN, STALE, BY_TOKEN = "mean_", " on samples of old", " by token ratios"  # around a name


def meaning(name: str) -> str:
    """A name in words."""
    core = name.removeprefix(MEAN).removesuffix(STALE).removesuffix(BY_TOKEN)
    divided = ", each response divided by its length" * name.startswith(MEAN)
    return MEANS.get(core, core) + divided


class Setting(NamedTuple):
    """One distance from the reference: a world whose policies are theta, old and ref."""

    world: RandomWorld
    score: np.ndarray  # (N V, P) grad log pi(a|s) of theta
    logp: Arrays  # theta, old, ref -> (M, T) of the sampled tokens; anything at padding
    log_ratio: np.ndarray  # (M, T) log theta - log ref; 0 at padding
    ratio: np.ndarray  # (M, T) theta / old; 1 at padding

    def coefficients(self, slopes: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
        """(M, N V) from slopes (M, T) of all responses; (n, G, T): mean over groups y (n, G)."""
        y = np.arange(len(slopes))[:, None] if y is None else y
        _, nodes, tokens, mask = (array[y] for array in self.world.responses)
        c = np.zeros((len(y), self.world.tree.n_nodes, self.world.tree.vocab_size))
        rows, weights = np.arange(len(y))[:, None, None], mask / y.shape[1]
        np.add.at(c, (rows, nodes, tokens), slopes.reshape(mask.shape) * weights)
        return c.reshape(len(y), -1)


@functools.lru_cache(maxsize=8)
def make_settings(seed: int = 0, vocab_size: int = 4, max_tokens: int = 4) -> list[Setting]:
    """Three distances; the reference and the rewards stay."""
    base = make_random_world(seed=seed, vocab_size=vocab_size, max_tokens=max_tokens)
    return [_setting(base, share, np.random.default_rng([seed, 3])) for share in DISTANCES]


def _setting(base: RandomWorld, share: float, rng: np.random.Generator) -> Setting:
    theta, old, ref = (base.policies[name] for name in ("theta", "old", "ref"))
    theta = tree_map(lambda a, b: a + share * (b - a), ref, theta)
    old = tree_map(lambda a, b: a + OLD * (b - a), theta, old)
    policies = {"theta": theta, "old": old, "ref": ref}
    logits = {name: tree_logits(params, **base.where) for name, params in policies.items()}
    world, responses = base._replace(policies=policies, logits=logits), base.responses
    log_pi = world.log_probs("theta")
    jacobian = world.jacobian("theta").reshape(*log_pi.shape, -1)
    # grad log pi(a|s) = grad z(s, a) - sum_b pi(b|s) grad z(s, b)
    score = jacobian - (np.exp(log_pi)[:, :, None] * jacobian).sum(axis=1, keepdims=True)
    score, logp = score.reshape(log_pi.size, -1), {}
    for name in policies:
        values = world.log_probs(name)[responses.nodes, responses.tokens]
        logp[name] = np.where(responses.mask > 0, values, -1 - rng.random(values.shape))
    lr, moved = ((logp["theta"] - logp[name]) * responses.mask for name in ("ref", "old"))
    return Setting(world, score, logp, lr, np.exp(moved))


def times(factor: float, name: str) -> str:
    """As in "0.04 x kl", or "kl" if the factor is 1 in five digits, or 0."""
    return name if f"{factor:.5g}" in ("0", "1") else f"{factor:.5g} x {name}"


# -- what a gradient may be the gradient of ------------------------------------------------------
def kl_slopes(setting: Setting) -> Arrays:
    """Slopes (M, T), whose mean over the policy's responses is what a penalty may descend.

    D(pi) = sum_y pi(y) f(log_ratio(y)) has the gradient sum_y pi(y) c(y) grad log pi(y), with
    c = f + f' and any constant more, because E[grad log pi] = 0: log_ratio for the KL,
    1 - exp(-log_ratio) for KL(ref || pi), exp(log_ratio) - 1 for half of chi^2, its sign for
    sum |pi - ref|. With the prefixes as given each token has a c of its own log-ratio alone.
    """
    mask, lr = setting.world.responses.mask, setting.log_ratio

    def whole(of_tokens: np.ndarray) -> np.ndarray:
        return of_tokens.sum(axis=1, keepdims=True) * mask

    found = {}
    for prefix, x in (("", whole(lr)), ("token_", lr)):
        found[f"{prefix}kl"], found[f"{prefix}forward_kl"] = x, -np.expm1(-x)
        found[f"{prefix}half_chi2"], found[f"{prefix}l1"] = np.expm1(x), np.sign(x)
    found["kl_minus_forward_kl"] = found["kl"] - found["forward_kl"]
    found["kl_minus_token_forward_kl"] = whole(lr - found["token_forward_kl"])
    found["k2_in_reward"] = whole(0.5 * lr * lr)
    found["kl_minus_entropy"] = whole(lr + setting.logp["theta"] * mask)
    return found


def exact_gradients(setting: Setting, slopes: Arrays, who: str) -> Arrays:
    """(P,) the exact gradient of each, and what samples of old make of it.

    name                     E_theta[c]: the gradient itself
    name on samples of old   E_old[c]: nothing corrects for who sampled
    name by token ratios     E_old[theta / old of the token alone, times c]: PPO's surrogate
    """
    world, one = setting.world, setting.world.responses.mask
    slopes = slopes | {MEAN + n: c / one.sum(axis=1, keepdims=True) for n, c in slopes.items()}
    if "kl" in slopes:  # the score alone
        slopes["length"] = one / one.sum(axis=1, keepdims=True)
    means = {name: ("theta", c) for name, c in slopes.items()}
    if who == "old":
        means |= {name + STALE: ("old", c) for name, c in slopes.items()}
        means |= {name + BY_TOKEN: ("old", c * setting.ratio) for name, c in slopes.items()}
        means |= {"minus_kl_old": ("old", one)} if "kl" in slopes else {}
    return {
        name: world.probs(p) @ setting.coefficients(c) @ setting.score
        for name, (p, c) in means.items()
    }


def exact_values(setting: Setting) -> dict[str, float]:
    """What the value of a term may be the mean of, on samples of the policy [nats]."""
    lr, p = setting.log_ratio, setting.world.probs("theta")
    y, length = lr.sum(axis=1), setting.world.responses.mask.sum(axis=1)
    of = {"KL(pi || ref)": y, "KL(ref || pi)": -y / np.exp(y), "chi^2 - KL": np.expm1(y) - y}
    of["half the mean square of the log-ratio"] = 0.5 * y * y
    of["half the mean square of the tokens' log-ratios"] = 0.5 * (lr * lr).sum(axis=1)
    of["chi^2 - KL token by token"] = (np.expm1(lr) - lr).sum(axis=1)
    of |= {f"{name}, divided by the length": x / length for name, x in of.items()}
    return {name: float(p @ x) for name, x in of.items()}


# -- the judgement -------------------------------------------------------------------------------
class Verdict(NamedTuple):
    """What a part of a function descends on average, given who sampled or which values."""

    part: str  # "kl" or "reward": what it is held against
    given: str
    descends: str  # a name of MEANS, "nothing" or "none of these"
    factor: float  # times its gradient; negative: it ascends
    nearest: str  # what fits at the most distances, or has the largest |cosine| there
    value_is: str  # a name of `exact_values`, with its factor, or "none of these"
    rows: list[dict[str, float]]  # a distance each: kl_seq, value, error, cosine, noise

    @property
    def claim(self) -> str:
        """What it descends, as `assert_descends` takes it."""
        return times(self.factor, self.descends)


# Setting, what the mean may be: name -> (P,); of M samples the probs, the values, and c (M, N V)
Estimate = tuple[Setting, Arrays, np.ndarray, np.ndarray, np.ndarray]


def judge_loss(
    answer: Answer, settings: list[Setting], *, placement: str, with_reward: bool
) -> Iterator[Verdict]:
    """A penalty, or a loss without advantages; and what advantages add to its gradient.

    Args:     answer: of arrays (1, T) "logp", "old_logp", "ref_logp", "advantages", "mask"; its
                  slopes at logp, or for the placement "reward" numbers which are constants there
                  and multiply the score of their own and of all earlier tokens, as in PPO.
              with_reward: ask with advantages too: reward - mean, the same at all tokens.
    """
    for given, who in SAMPLERS.items():
        parts = {"kl": [], "reward": []}
        for setting in settings:
            world, logp, mask = setting.world, setting.logp, setting.world.responses.mask
            probs, y = world.probs(who), np.arange(len(mask))[:, None]
            policy = "theta" if placement == "loss" else who
            arrays = {"logp": logp[policy], "old_logp": logp[who], "ref_logp": logp["ref"]}
            arrays |= {"mask": mask, "advantages": 0 * mask}
            values, slopes = _ask(answer, arrays, y)
            if placement == "reward":  # of earlier tokens too
                slopes = (slopes * mask[:, None])[..., ::-1].cumsum(axis=-1)[..., ::-1]
                slopes = slopes if who == "theta" else slopes * setting.ratio[:, None]
            c = setting.coefficients(slopes)
            known = exact_gradients(setting, kl_slopes(setting), who)
            parts["kl"].append((setting, known, probs, values, c))
            if with_reward:
                arrays["advantages"] = (world.rewards - probs @ world.rewards)[:, None] + 0 * mask
                more, slopes = _ask(answer, arrays, y)
                known = exact_gradients(setting, {"reward": -arrays["advantages"]}, who)
                c = setting.coefficients(slopes) - c
                parts["reward"].append((setting, known, probs, more - values, c))
        yield from (_verdict(part, given, found) for part, found in parts.items() if found)


def judge_advantages(
    answer: Answer, settings: list[Setting], *, group_size: int = 1
) -> Iterator[Verdict]:
    """E[sum_t A_t grad log pi_t] against grad J, by every group of independent responses.

    The reward is paid at the last token, and KL_COEF k1 taken off at each.

    Args:     answer: of arrays (G, T) "rewards", "values", "mask"; its numbers are advantages.
    """
    every = [np.arange(len(settings[0].world.rewards))] * group_size
    y = np.stack(np.meshgrid(*every), axis=-1).reshape(-1, group_size)
    cases = VALUES if group_size == 1 else {f"groups of {group_size}": (1.0, 0.0)}
    for given, (share, noise) in cases.items():
        estimates = []
        for i, setting in enumerate(settings):
            world, (_, nodes, tokens, mask) = setting.world, setting.world.responses
            args = (world.tree, world.log_probs("theta"), world.log_probs("ref"), world.rewards)
            q, exact = optimum.policy_values(*args, kl_coef=KL_COEF)
            off = noise * np.random.default_rng(i).standard_normal(exact.shape)
            paid = token_rewards(world.rewards, setting.log_ratio, mask=mask, kl_coef=KL_COEF)
            arrays = {"rewards": paid, "values": (share * exact + off)[nodes], "mask": mask}
            values, advantages = _ask(answer, arrays, y)
            best = exact[nodes] - q[nodes, tokens]
            known = exact_gradients(setting, {"reward": best}, "theta")
            c, probs = setting.coefficients(-advantages, y), world.probs("theta")[y].prod(axis=1)
            estimates.append((setting, known, probs, values, c))
        yield _verdict("reward", given, estimates)


def _ask(answer: Answer, arrays: Arrays, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (n,), and slopes or numbers (n, G, T), of the groups y (n, G) of responses."""
    found = [answer({name: array[group] for name, array in arrays.items()}) for group in y]
    return np.array([value for value, _ in found]), np.stack([of_tokens for _, of_tokens in found])


def _verdict(part: str, given: str, estimates: list[Estimate]) -> Verdict:
    rows, means = [], []
    for setting, known, probs, values, c in estimates:
        g, mean = known[part], probs @ c @ setting.score
        second = probs @ ((c @ (setting.score @ setting.score.T)) * c).sum(axis=1)
        square = mean @ mean
        mean = mean * (square > SAME * SAME * second)  # or it is rounding
        kl_seq = setting.world.probs("theta") @ setting.log_ratio.sum(axis=1)
        row = {"kl_seq": float(kl_seq), "value": float(probs @ values)}
        rows.append(row | beside(mean, g, second - square))
        means.append(mean)
    value_is = NONE
    if part == "kl" and SAMPLERS[given] == "theta":
        exact = [exact_values(setting) for setting, *_ in estimates]
        for name in reversed(exact[0]):
            factors = [row["value"] / of[name] for row, of in zip(rows, exact, strict=True)]
            if SAME < abs(factors[0]) and np.ptp(factors) <= SAME * abs(factors[0]):
                value_is = times(factors[0], name)
    return Verdict(part, given, *_look_up(estimates, means), value_is, rows)


def _look_up(estimates: list[Estimate], means: list[np.ndarray]) -> tuple[str, float, str]:
    """(name, factor, nearest): the exact gradient of which the mean is a multiple everywhere."""
    m, nearest = np.stack(means), {}  # (3, P)
    if not m.any():
        return NOTHING, 0.0, NOTHING
    for name in estimates[0][1]:
        d = np.stack([known[name] for _, known, *_ in estimates])
        dd, mm, md = (d * d).sum(axis=1), (m * m).sum(axis=1), (m * d).sum(axis=1)
        if dd.all() and mm.all():
            factors = md / dd
            off = np.linalg.norm(m - factors[:, None] * d, axis=1) / np.sqrt(mm)
            if off.max() < SAME and np.ptp(factors) < SAME * abs(factors[0]):
                return name, float(factors.mean()), name
            nearest[name] = ((off < SAME) + abs(md) / np.sqrt(dd * mm)).sum()
    return NONE, 0.0, max(nearest, key=nearest.__getitem__, default=NOTHING)
