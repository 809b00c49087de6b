"""What each rule of rules.toml looks at: in which rows of a log it holds.

A rule speaks where it holds in so many rows on end. Whether it holds in a row hangs on that row and
those before, so it says the same while a run trains and afterwards; where a metric that it needs is
missing it is silent. Those without a function hold in what diagnose.py makes again from a folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minirlhf.disk import read_toml
from minirlhf.runs.config import TrainConfig

Shown = dict[str, np.ndarray]  # words -> (n,) what is shown as evidence
Held = tuple[np.ndarray, Shown]
Sign = tuple[int, str]  # the step from which something holds, the evidence


class Seen:
    """The rows of a stage as columns, and the settings of the run where they are known."""

    def __init__(self, rows: list[dict[str, Any]], config: TrainConfig | None = None):
        self.config, self.steps, self.rows = config, [], []
        for row in rows:
            self.add(row["step"], row)

    def add(self, step: int, row: dict[str, Any]) -> None:
        """A row more; one that a resumed run makes again takes the place of the former."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
        self.rows[len(self.steps) :] = [row]
        self.steps.append(step)

    def __getitem__(self, name: str) -> np.ndarray:
        """(n,) a column; nan where it has no number."""
        return np.array([row.get(name) for row in self.rows], dtype=float)

    def few(self, name: str) -> np.ndarray:
        """(n,) the mean of each entry and the two before it, of those that are there."""
        x = np.concatenate([np.full(3, np.nan), self[name]])
        sums, counts = np.nancumsum(x), np.cumsum(~np.isnan(x))
        with np.errstate(all="ignore"):
            return (sums[3:] - sums[:-3]) / (counts[3:] - counts[:-3])

    def has(self, name: str) -> bool:
        return self.config is not None if name == "config" else not np.isnan(self[name]).all()

    @property
    def is_first(self) -> np.ndarray:
        return np.arange(len(self.steps)) == 0


class Rule(NamedTuple):
    """As rules.toml has it."""

    name: str
    severity: str
    cause: str
    knob: str
    source: str
    measured: str = ""
    limits: dict[str, Any] = {}
    needs: tuple[str, ...] = ()
    rows: int = 3
    replies: int = 0  # that a batch has at least: of fewer a spread says little
    holds: Callable[..., Held] | None = None  # (Seen, **limits)

    def look(self, seen: Seen) -> Sign | None:
        """(the step from which it holds, the evidence), once it has held long enough."""
        if self.holds is None or len(seen.steps) < self.rows or not all(map(seen.has, self.needs)):
            return None
        if seen.has("episode") and seen["episode"][-1] < self.replies * (seen.steps[-1] + 1):
            return None
        with np.errstate(all="ignore"):  # a row may lack a number: nan, where nothing holds
            holds, beside = self.holds(seen, **self.limits)
        long = np.convolve(holds, np.ones(self.rows), "valid") == self.rows
        shown = {name: seen[name] for name in self.needs if name != "config"}
        return first_sign(seen.steps, beside | shown, long) if long.any() else None


def first_sign(steps: list[int], shown: Shown, holds: np.ndarray) -> Sign:
    """The step from which something holds, and metrics in that row and in the last one."""
    i, last = int(holds.argmax()), len(steps) - 1
    text = f"step {steps[i]}: {', '.join(f'{words} {x[i]:.3g}' for words, x in shown.items())}"
    if last > i:
        text += f"; step {steps[last]}: {', '.join(f'{x[last]:.3g}' for x in shown.values())}"
    return steps[i], text


# -- what more than one rule asks ----------------------------------------------------------------
# Each returns in which rows it holds, and what else is evidence beside the metrics that it needs.
def between(seen: Seen, **limits: list[float]) -> Held:
    """Each of these metrics is above one number and below another."""
    ranges = [(seen[name], *of) for name, of in limits.items()]
    return np.all([(x > least) & (x < most) for x, least, most in ranges], axis=0), {}


def far_from_start(seen: Seen, metric: str, least: float, most: float, floor: float) -> Held:
    times = seen.few(metric) / max(seen[metric][0], floor)
    return (times < least) | (times > most), {}


def tied(seen: Seen, what: str, metric: str, corr: float, times: float, least: float) -> Held:
    """The score goes along with something in the replies, and that has grown."""
    grown = seen.few(metric) > times * max(seen[metric][0], least)
    return (seen.few(what) > corr) & grown, {}


def not_sampled(seen: Seen, errors: float, share: float, at_once: bool) -> Held:
    """Is the mean of -log pi(y) off the entropy: from the first batches on, or later alone?"""
    error, total = seen["objective/surprise_se"], np.nancumsum(seen["objective/surprise"])
    off = total / np.sqrt(np.nancumsum(error * error))
    large = np.abs(total) > share * np.nancumsum(seen["objective/entropy"])
    apart = (np.abs(off) > errors) & large
    early = off[min(1, len(off) - 1)] * np.sign(off[apart.argmax()]) > 0.5 * errors
    return apart & (early == at_once), {"standard errors in all": off}


# -- it computes something else than it should ---------------------------------------------------
def non_finite(seen: Seen) -> Held:
    names = ("loss/policy_avg", "loss/value_avg", "objective/scores", "objective/kl", "grad_norm")
    logged = {name: np.array([name in row for row in seen.rows]) for name in names}
    bad = {name: there & ~np.isfinite(seen[name]) for name, there in logged.items()}
    return np.any([*bad.values()], axis=0), {name: seen[name] for name in bad if bad[name].any()}


def score_position(seen: Seen, share: float) -> Held:
    """At step 0, with V = 0 and KL = 0, the returns are what the score alone makes them."""
    plain = not seen.config.ppo.whiten_rewards
    square = seen["ppo/returns/mean"] ** 2 + seen["ppo/returns/var"]
    off = square < share * seen["ppo/returns/score_square"]
    return seen.is_first & plain & off, {"mean square of the returns": square}


def penalty_gradient(seen: Seen) -> Held:
    wrong = seen.config.ppo.kl_mode in ("loss_k1", "reward_k2", "reward_k3")
    return (seen["objective/kl_coef"] > 0) & wrong, {}


def inverted_k3(seen: Seen, most: float, nats: float) -> Held:
    """On samples of pi, k3 has the mean of the KL a token; inverted, that of chi^2 - KL."""
    s, of_reply = seen.config.ppo, seen.few("objective/kl_full_seq")
    times = seen.few("loss/kl_avg") * seen.few("response_length/mean") / of_reply
    is_k3 = s.kl_mode == "loss_k3_tok" and s.aggregation == "token-mean"
    far = seen["objective/kl_full_seq"] > nats
    return (times > most) & far & is_k3, {"loss/kl_avg over the KL of a token": times}


def reference_is_policy(seen: Seen, most: float) -> Held:
    step = np.nan_to_num(seen["policy/approxkl_avg"])
    moved = np.cumsum(step) - step  # before this row
    return (np.abs(seen["objective/kl"]) < 1e-3 * most) & (moved > most), {}


def reference_resets(seen: Seen) -> Held:
    every = seen.config.ppo.reset_reference_every
    return (np.array(seen.steps) >= 2 * every) & (every > 0), {}


def reward_scale(seen: Seen, least: float, most: float) -> Held:
    sd = seen["objective/scores_sd"]
    beta = seen["objective/kl_coef"] / sd
    off = (sd > 0) & ((sd < least) | (sd > most))
    return seen.is_first & off, {"beta in units of that sd": beta}


def reward_drift(seen: Seen, sds: float, times: float) -> Held:
    """At KL d a score with Gaussian tails and sd 1 gains at most sqrt(2 d): Donsker-Varadhan."""
    score, kl = seen.few("objective/scores"), np.maximum(seen.few("objective/kl_full_seq"), 0)
    return np.abs(score - score[0]) > sds + times * np.sqrt(2 * kl), {}


# -- it computes what it should, to no good ------------------------------------------------------
def value_not_learning(seen: Seen, share: float) -> Held:
    still = seen["ppo/val/var"] <= share * seen["ppo/returns/var"]
    return still & ~seen.is_first, {}  # a new critic says 0


def penalty_too_strong(seen: Seen, most: float) -> Held:
    """At the optimum score - beta kl_seq is one number: both vary alike."""
    paid = seen.few("objective/kl_coef") * seen.few("objective/kl_sd")
    times = paid / np.maximum(seen.few("objective/scores_sd"), 0.5)  # at rest it may not vary
    return times > most, {"sd of beta kl_seq over that of the score": times}


def step_too_large(seen: Seen, clipped: float, nats: float) -> Held:
    far, cut = seen["policy/approxkl_avg"], seen["policy/clipfrac_avg"]
    return ((cut > clipped) & (far > 0.1 * nats)) | (far > nats), {}


def penalty_too_weak(seen: Seen, nats: float, share: float) -> Held:
    gain = seen.few("objective/scores") - seen["objective/scores"][0]
    paid = seen.few("objective/kl_coef") * seen.few("objective/kl")
    return (seen.few("objective/kl") > nats) & (paid < share * gain), {}


def kl_runaway(seen: Seen, nats: float) -> Held:
    kl, of_token = seen.few("objective/kl"), 0.0 if seen.config else 0.1  # others' are longer
    length = seen.few("response_length/mean") if seen.has("response_length/mean") else 1.0
    return (kl > nats) & (kl > of_token * length), {}


def over_optimisation(seen: Seen, errors: float) -> Held:
    gold, n = seen.few("objective/gold"), np.arange(1, len(seen.steps) + 1)
    steps = np.diff(seen["objective/gold"], prepend=seen["objective/gold"][:1])
    error = np.sqrt(np.cumsum(steps * steps) / 2 / n) * np.sqrt(2 / 3)  # of two means of three
    falls = np.maximum.accumulate(gold) - gold > errors * error
    rises = seen.few("objective/scores") > seen["objective/scores"][0]
    return falls & rises & (n > 5), {}


def negative_kl(seen: Seen, errors: float) -> Held:
    kl, n = seen["objective/kl"], np.arange(1, len(seen.steps) + 1)
    if seen.has("objective/kl_sd") and seen.has("episode"):
        error = seen["objective/kl_sd"] / np.sqrt(seen["episode"] / (np.array(seen.steps) + 1))
    else:  # from how it changes from step to step
        change = np.nan_to_num(np.diff(kl, prepend=kl[:1]))
        error = np.sqrt(np.cumsum(change * change) / 2 / n)
    return kl < -errors * error - 1e-3, {"its standard error": error}


RULES = {
    name: Rule(name, holds=globals().get(of.pop("holds", name.replace("-", "_"))), **of)
    for name, of in read_toml(Path(__file__).with_name("rules.toml")).items()
}
