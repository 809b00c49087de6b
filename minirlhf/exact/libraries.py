"""What the libraries do: their KL terms, as formulas of ours, for `judge.py`.

As read in the file at the commit or release that stands beside it: facts as of then. The arrays are
(1, T), of one response. Terms of tokens are summed: a divisor that all responses of a batch share
is left out, a response's own length is kept.
"""

from collections.abc import Callable
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
    """A row of the table."""

    term: str  # of TERMS
    where: str  # repository: file
    as_of: str  # commit or release
    placement: str = "loss"
    framework: str = "numpy"  # "own": a pair, the value and its own gradient

    @property
    def f(self) -> Term:
        return TERMS[self.term]


TRL = "huggingface/trl: trl/trainer/grpo_trainer.py", "release 1.16.0"
RLOO = "huggingface/trl: trl/trainer/rloo_trainer.py", "release 1.16.0"
VERL = "verl-project/verl: verl/trainer/ppo/core_algos.py", "018f23b"
OPENRLHF = "OpenRLHF/OpenRLHF: openrlhf/models/utils.py", "02a2605"
BEFORE = "NVIDIA-NeMo/RL: nemo_rl/algorithms/loss_functions.py", "005a098"  # PR 2506
AFTER = "NVIDIA-NeMo/RL: nemo_rl/algorithms/loss/loss_functions.py", "006907a"
BOOK = "natolambert/rlhf-book: code/policy_gradients/loss.py", "0c2ba9c"
SCRIPTS = "rasbt/reasoning-from-scratch: ch07/03_rlvr_grpo_scripts_advanced"
CH07 = f"{SCRIPTS}/7_5_plus_kl.py", "5182d71"
CH07_V32 = f"{SCRIPTS}/7_7_improvements/deepseek_v32_style.py", "5144af5"

LIBRARIES = {
    "trl-grpo": Library("token ratio x k3", *TRL),  # use_bias_correction_kl, its default
    "trl-grpo-uncorrected": Library("k3", *TRL),
    "trl-rloo": Library("response's k1, in the reward", *RLOO),
    "verl-reward-k1": Library("k1", *VERL, "reward"),
    "verl-k1": Library("k1", *VERL),
    "verl-abs": Library("|k1|", *VERL),
    "verl-k2": Library("k2", *VERL),
    "verl-k3": Library("k3, at most 10", *VERL),  # low_var_kl
    "verl-k1+": Library("k1, gradient of k2", *VERL, framework="own"),
    "verl-k3+": Library("k3, gradient of k2", *VERL, framework="own"),
    **{f"openrlhf-reward-{k}": Library(k, *OPENRLHF, "reward") for k in ("k1", "k2", "k3")},
    **{f"openrlhf-{k}": Library(k, *OPENRLHF) for k in ("k1", "k2", "k3")},  # use_kl_loss
    "nemo-rl-before-k1": Library("k1", *BEFORE),
    "nemo-rl-before": Library("k3, at most 10", *BEFORE),
    "nemo-rl-after": Library("k3 + score x k3, at most 10", *AFTER, framework="own"),
    "rlhf-book-kl1": Library("mean of -k1", *BOOK),
    "rlhf-book-kl3": Library("mean of k3 of 1/ratio", *BOOK),
    "reasoning-from-scratch": Library("k1", *CH07),
    "reasoning-from-scratch-v32": Library("response ratio x k1", *CH07_V32),
    "deepseek-v3.2": Library("token ratio x k3", "arXiv 2512.02556, eq. 7", "the paper"),
}
