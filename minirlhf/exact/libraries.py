"""What the libraries do: their KL terms, as formulas of ours, for `judge.py`.

Which library has which term, and where that was read, is in libraries.toml. The arrays are (1, T),
of one response. Terms of tokens are summed: a divisor that all responses of a batch share is left
out, a response's own length is kept.
"""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Term = Callable[..., Any]


def k1(logp, ref_logp):
    return logp - ref_logp


def k3(logp, ref_logp):
    """exp(-k1) - 1 + k1."""
    return np.exp(ref_logp - logp) - 1 + logp - ref_logp


def through_k2(term: Term, most: float = np.inf) -> Term:
    """The term's value and k2's gradient k1: which is k3's gradient + k3 times the score, too."""

    def through(logp, ref_logp, mask):
        value, slope = term(logp, ref_logp), mask * (logp - ref_logp)
        return (mask * np.minimum(value, most)).sum(), np.where(value < most, slope, 0.0)

    return through


def mean(term: Term) -> Term:
    """Over the tokens of the response."""
    return lambda logp, ref_logp, mask: (mask * term(logp, ref_logp)).sum() / mask.sum()


def response_ratio(of: str) -> Term:
    """pi / old of the whole response times its k1, now or as it was when sampled: a constant."""

    def term(logp, old_logp, ref_logp, mask):
        then = {"logp": logp, "old_logp": old_logp}[of]
        return np.exp((mask * (logp - old_logp)).sum()) * (mask * (then - ref_logp)).sum()

    return term


TERMS: dict[str, Term] = {
    "k1": k1,
    "k2": lambda logp, ref_logp: 0.5 * (logp - ref_logp) ** 2,
    "k3": k3,
    "|k1|": lambda logp, ref_logp: abs(logp - ref_logp),
    "k3, at most 10": lambda logp, ref_logp: np.minimum(k3(logp, ref_logp), 10.0),
    "k1, gradient of k2": through_k2(k1),
    "k3, gradient of k2": through_k2(k3),
    "k3 + score x k3, at most 10": through_k2(k3, most=10.0),
    "token ratio x k3": lambda logp, old_logp, ref_logp: (
        np.exp(logp - old_logp) * k3(logp, ref_logp)
    ),
    "response ratio x k1": response_ratio("logp"),
    "response's k1, in the reward": response_ratio("old_logp"),
    "mean of -k1": mean(lambda logp, ref_logp: ref_logp - logp),
    "mean of k3 of 1/ratio": mean(lambda logp, ref_logp: k3(ref_logp, logp)),
}


class Library(NamedTuple):
    """A row of libraries.toml."""

    term: str  # of TERMS
    where: str  # repository: file
    as_of: str  # commit or release
    placement: str = "loss"
    framework: str = "numpy"  # "own": a pair, the value and its own gradient


_READ = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
LIBRARIES = {
    name: Library(where=source["where"], as_of=source["as_of"], **row)
    for source in _READ["sources"]
    for name, row in source["rows"].items()
}
