"""What each rule of rules.toml looks at: in which rows of a log it holds.

A rule looks at columns of the log and says in which rows it holds; it speaks where it holds in so
many rows on end. Whether it holds in a row hangs on that row and those before, so a rule says the
same while a run trains and afterwards. Where a metric that it needs is missing it is silent. Those
without `holds` are not seen in a log: diagnose.py makes numbers of a run folder again.

How often each is right, on runs with a planted cause and on healthy ones, is measured by
examples/cases/28_names_what_went_wrong.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minirlhf.disk import read_toml
from minirlhf.runs.config import TrainConfig

Shown = dict[str, np.ndarray]  # words -> (n,) what is shown of it as evidence


class Seen:
    """The rows of a stage as columns, and the settings of the run where they are known."""

    def __init__(self, rows: list[dict[str, Any]], config: TrainConfig | None = None):
        self.config, self.steps, self.columns = config, [], {}
        for row in rows:
            self.add(row["step"], row)

    def add(self, step: int, row: dict[str, Any]) -> None:
        """A row more; one that a resumed run makes again takes the place of the former."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
        n = len(self.steps)
        for name in self.columns.keys() | row.keys() - {"step", "stage"}:
            column, x = self.columns.setdefault(name, []), row.get(name)
            column[n:] = []
            column += [np.nan] * (n - len(column)) + [np.nan if x is None else float(x)]
        self.steps.append(step)

    def __getitem__(self, name: str) -> np.ndarray:
        """(n,) a column."""
        return np.array(self.columns.get(name, [np.nan] * len(self.steps)))

    def few(self, name: str) -> np.ndarray:
        """(n,) the mean of each entry and the two before it."""
        x, n = np.nan_to_num(self[name]), np.arange(1, len(self.steps) + 1)
        sums = np.cumsum(np.concatenate([np.zeros(3), x]))
        return (sums[3:] - sums[:-3]) / np.minimum(n, 3)

    def has(self, name: str) -> bool:
        known = self.config is not None if name == "config" else name in self.columns
        return known and (name == "config" or not np.isnan(self[name]).all())

    def show(self, *names: str) -> Shown:
        return {name: self[name] for name in names}


class Rule(NamedTuple):
    """As rules.toml has it."""

    name: str
    severity: str
    cause: str
    knob: str
    source: str
    measured: str = ""
    limits: dict[str, float] = {}
    needs: tuple[str, ...] = ()
    rows: int = 3
    holds: Callable[..., tuple[np.ndarray, Shown]] | None = None  # (Seen, **limits)

    def look(self, seen: Seen) -> tuple[int, str] | None:
        """(the step from which it holds, the evidence), once it has held long enough."""
        if self.holds is None or len(seen.steps) < self.rows or not all(map(seen.has, self.needs)):
            return None
        with np.errstate(all="ignore"):  # a row may lack a number: nan, where nothing holds
            holds, shown = self.holds(seen, **self.limits)
        counts = np.convolve(holds, np.ones(self.rows), "valid")
        if not (counts == self.rows).any():
            return None
        i = int((counts == self.rows).argmax())
        return seen.steps[i], evidence(seen.steps, shown, i)


def evidence(steps: list[int], shown: Shown, i: int) -> str:
    """Metrics in row i and in the last one."""
    last = len(steps) - 1
    first = [f"{words} {x[i]:.3g}" for words, x in shown.items()]
    text = f"step {steps[i]}: {', '.join(first)}"
    if last > i:
        text += f"; step {steps[last]}: {', '.join(f'{x[last]:.3g}' for x in shown.values())}"
    return text


# -- it computes something else than it should ---------------------------------------------------
def _non_finite(seen: Seen) -> tuple[np.ndarray, Shown]:
    names = ("loss/policy_avg", "loss/value_avg", "objective/scores", "objective/kl", "grad_norm")
    bad = {n: ~np.isfinite(seen[n]) for n in names if seen.has(n)}
    bad = {n: b & np.maximum.accumulate(~b) for n, b in bad.items() if b.any()}  # known before
    return sum(bad.values(), np.zeros(len(seen.steps), bool)) > 0, seen.show(*bad)


def _penalty_sign(seen: Seen, nats: float) -> tuple[np.ndarray, Shown]:
    paid, kl = seen["objective/non_score_reward"], seen["objective/kl"]
    shown = seen.show("objective/non_score_reward", "objective/kl")
    return (paid > 0) & (kl > nats), shown


def _not_sampled(at_once: bool) -> Callable[..., tuple[np.ndarray, Shown]]:
    """Is the mean of -log pi(y) off the entropy: from the first batches on, or later alone?"""

    def holds(seen: Seen, errors: float, share: float) -> tuple[np.ndarray, Shown]:
        error, total = seen["objective/surprise_se"], np.cumsum(seen["objective/surprise"])
        off = total / np.sqrt(np.cumsum(error * error))
        large = np.abs(total) > share * np.cumsum(seen["objective/entropy"])
        apart = (np.abs(off) > errors) & large
        early = off[min(1, len(off) - 1)] * np.sign(off[apart.argmax()]) > 0.5 * errors
        shown = seen.show("objective/surprise", "objective/surprise_se")
        return apart & (early == at_once), {"standard errors in all": off, **shown}

    return holds


_another_sampler, _late_samples = _not_sampled(at_once=True), _not_sampled(at_once=False)


def _ratio_not_one(seen: Seen, most: float) -> tuple[np.ndarray, Shown]:
    return seen["policy/approxkl_first"] > most, seen.show("policy/approxkl_first")


def _ratio_always_one(seen: Seen, most: float) -> tuple[np.ndarray, Shown]:
    still = (seen["policy/approxkl_avg"] < most) & (seen["policy/updates"] > 1)
    learns = (seen["lr"] > 0) & (seen["grad_norm"] > 0)
    return still & learns, seen.show("policy/approxkl_avg", "policy/updates")


def _score_position(seen: Seen, share: float) -> tuple[np.ndarray, Shown]:
    """At step 0, with V = 0 and KL = 0, the return k tokens before the end is lam^k score."""
    s, n = seen.config.ppo, len(seen.steps)
    plain = s.has_critic and not (s.whiten_rewards or s.missing_eos_penalty or s.score_clip)
    plain = plain and s.gamma == 1
    length = max(1, round(seen["response_length/mean"][0]))
    powers = s.lam ** (2 * np.arange(length))
    score = seen["objective/scores"] ** 2 + seen["objective/scores_sd"] ** 2
    square = seen["ppo/returns/mean"] ** 2 + seen["ppo/returns/var"]
    expected = score * powers.mean()
    first = np.arange(n) == 0
    shown = {"mean square of the returns": square, "expected": expected}
    return first & plain & (square < share * expected), shown


def _penalty_gradient(seen: Seen) -> tuple[np.ndarray, Shown]:
    wrong = seen.config.ppo.kl_mode in ("loss_k1", "reward_k2", "reward_k3")
    return (seen["objective/kl_coef"] > 0) & wrong, seen.show("objective/kl")


def _inverted_k3(seen: Seen, most: float, nats: float) -> tuple[np.ndarray, Shown]:
    """On samples of pi, k3 has the mean of the KL a token; inverted, that of chi^2 - KL."""
    of_token = seen.few("objective/kl_full_seq") / seen.few("response_length/mean")
    times = seen.few("loss/kl_avg") / of_token
    inverts = seen.config.ppo.kl_mode == "loss_k3_tok"
    inverts &= seen.config.ppo.aggregation == "token-mean"
    shown = {"loss/kl_avg over the KL of a token": times, **seen.show("objective/kl_full_seq")}
    return (times > most) & (seen["objective/kl_full_seq"] > nats) & inverts, shown


def _reference_is_policy(seen: Seen, most: float) -> tuple[np.ndarray, Shown]:
    moved = np.cumsum(np.nan_to_num(seen["policy/approxkl_avg"]))
    same = np.abs(seen["objective/kl"]) < 1e-3 * most
    return same & (moved - seen["policy/approxkl_avg"] > most), seen.show(
        "objective/kl", "policy/approxkl_avg"
    )


def _reference_resets(seen: Seen) -> tuple[np.ndarray, Shown]:
    every = seen.config.ppo.reset_reference_every
    steps = np.array(seen.steps)
    return (steps >= 2 * every) & (every > 0), seen.show("objective/kl")


def _reward_scale(seen: Seen, least: float, most: float) -> tuple[np.ndarray, Shown]:
    sd, first = seen["objective/scores_sd"], np.arange(len(seen.steps)) == 0
    beta = seen["objective/kl_coef"]
    shown = {"objective/scores_sd": sd, "beta": beta, "beta in units of sd": beta / sd}
    return first & ((sd < least) | (sd > most)), shown


def _reward_drift(seen: Seen, sds: float, times: float) -> tuple[np.ndarray, Shown]:
    """At KL d a score with Gaussian tails and sd 1 gains at most sqrt(2 d): Donsker-Varadhan."""
    score, kl = seen.few("objective/scores"), np.maximum(seen.few("objective/kl_full_seq"), 0)
    gain = score - score[0]
    shown = seen.show("objective/scores", "objective/kl_full_seq")
    return np.abs(gain) > sds + times * np.sqrt(2 * kl), shown


# -- it computes what it should, to no good ------------------------------------------------------
def _value_not_learning(seen: Seen, share: float) -> tuple[np.ndarray, Shown]:
    still = seen["ppo/val/var"] <= share * seen["ppo/returns/var"]
    later = np.arange(len(seen.steps)) > 0  # a new critic says 0
    return still & later, seen.show("ppo/val/var", "ppo/returns/var")


def _missing_eos(seen: Seen, most: float) -> tuple[np.ndarray, Shown]:
    shown = seen.show("response_length/clip_ratio", "response_length/mean")
    return seen["response_length/clip_ratio"] > most, shown


def _penalty_too_strong(seen: Seen, most: float) -> tuple[np.ndarray, Shown]:
    """At the optimum score - beta kl_seq is one number: both vary alike."""
    paid = seen.few("objective/kl_coef") * seen.few("objective/kl_sd")
    times = paid / seen.few("objective/scores_sd")
    shown = {"sd of beta kl_seq over sd of the score": times}
    return times > most, {**shown, **seen.show("objective/kl", "objective/scores")}


def _step_too_large(seen: Seen, clipped: float, nats: float) -> tuple[np.ndarray, Shown]:
    far, cut = seen["policy/approxkl_avg"], seen["policy/clipfrac_avg"]
    names = ("policy/clipfrac_avg", "policy/approxkl_avg", "policy/updates", "lr")
    shown = seen.show(*filter(seen.has, names))
    return ((cut > clipped) & (far > 0.1 * nats)) | (far > nats), shown


def _tied(what: str, metric: str) -> Callable[..., tuple[np.ndarray, Shown]]:
    def holds(seen: Seen, corr: float, times: float, least: float) -> tuple[np.ndarray, Shown]:
        grown = seen.few(metric) > times * max(seen[metric][0], least)
        return (seen.few(what) > corr) & grown, seen.show(what, metric)

    return holds


_pays_length = _tied("response/corr_score_length", "response_length/mean")
_pays_repetition = _tied("response/corr_score_repeats", "response/repeated_bigrams")


def _penalty_too_weak(seen: Seen, nats: float, share: float) -> tuple[np.ndarray, Shown]:
    gain = seen.few("objective/scores") - seen["objective/scores"][0]
    paid = seen.few("objective/kl_coef") * seen.few("objective/kl")
    shown = seen.show("objective/kl", "objective/scores", "objective/kl_coef")
    return (seen.few("objective/kl") > nats) & (paid < share * gain), shown


def _kl_runaway(seen: Seen, nats: float) -> tuple[np.ndarray, Shown]:
    return seen.few("objective/kl") > nats, seen.show("objective/kl")


def _over_optimisation(seen: Seen, errors: float) -> tuple[np.ndarray, Shown]:
    gold, n = seen.few("objective/gold"), np.arange(1, len(seen.steps) + 1)
    steps = np.diff(seen["objective/gold"], prepend=seen["objective/gold"][:1])
    error = np.sqrt(np.cumsum(steps * steps) / 2 / n) * np.sqrt(2 / 3)  # of two means of three
    falls = np.maximum.accumulate(gold) - gold > errors * error
    rises = seen.few("objective/scores") > seen["objective/scores"][0]
    return falls & rises & (n > 5), seen.show("objective/gold", "objective/scores")


def _far_from_start(metric: str) -> Callable[..., tuple[np.ndarray, Shown]]:
    def holds(seen: Seen, least: float, most: float, floor: float) -> tuple[np.ndarray, Shown]:
        times = seen.few(metric) / max(seen[metric][0], floor)
        return (times < least) | (times > most), seen.show(metric)

    return holds


_entropy_collapse = _far_from_start("policy/entropy_avg")
_length_drift = _far_from_start("response_length/mean")
_repetition = _far_from_start("response/repeated_bigrams")


def _negative_kl(seen: Seen, errors: float) -> tuple[np.ndarray, Shown]:
    kl = seen["objective/kl"]
    se = seen["objective/kl_sd"] / np.sqrt(seen["episode"] / (np.array(seen.steps) + 1))
    return kl < -errors * se - 1e-3, {"objective/kl": kl, "its standard error": se}


RULES = {
    name: Rule(name, **fields, holds=globals().get(f"_{name.replace('-', '_')}"))
    for name, fields in read_toml(Path(__file__).with_name("rules.toml")).items()
}
