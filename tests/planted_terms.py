"""Twenty KL terms, ten right ones and ten wrong ones, in NumPy, PyTorch and JAX, and a judgement.

    python tests/planted_terms.py jax    name -> [claim, right, reads padding, off-policy], as JSON

JAX in a process of its own: it forbids the forks that other tests make.
"""

import json
import sys

import numpy as np

from minirlhf import judge

SMALL = (3, 3)  # 15 responses in the place of 121


def exp_and_stop(framework):
    """exp, and what holds a number constant; NumPy has no such thing."""
    if framework == "torch":
        import torch

        return torch.exp, lambda x: x.detach()
    if framework == "jax":
        import jax

        return jax.numpy.exp, jax.lax.stop_gradient
    return np.exp, None


def total(x, mask):
    return (mask * x).sum()


# --- twenty terms: what each descends; in NumPy, which cannot stop a gradient, with its own

RIGHT = {
    "k1 in the reward": lambda e, sg: lambda logp, ref_logp: logp - ref_logp,
    "k2 of the response": lambda e, sg: lambda logp, ref_logp, mask: (
        0.5 * total(logp - ref_logp, mask) ** 2
    ),
    "score times k1": lambda e, sg: lambda logp, ref_logp, mask: (
        sg(total(logp - ref_logp, mask)) * total(logp, mask)
    ),
    "score times k1 less a baseline": lambda e, sg: lambda logp, ref_logp, mask: (
        sg(total(logp - ref_logp, mask) - 0.7) * total(logp, mask)
    ),
    "score times k1 to go": lambda e, sg: lambda logp, ref_logp, mask: total(
        sg(total(logp - ref_logp, mask) - (mask * (logp - ref_logp)).cumsum(1)
           + mask * (logp - ref_logp)) * logp, mask
    ),
    "ratio of the response times k1": lambda e, sg: lambda logp, old_logp, ref_logp, mask: (
        e(total(logp - old_logp, mask)) * total(logp - ref_logp, mask)
    ),
    "ratio of the response times k3": lambda e, sg: lambda logp, old_logp, ref_logp, mask: (
        e(total(logp - old_logp, mask))
        * (e(total(ref_logp - logp, mask)) - 1 + total(logp - ref_logp, mask))
    ),
    "fixed ratio times k2": lambda e, sg: lambda logp, old_logp, ref_logp, mask: (
        sg(e(total(logp - old_logp, mask))) * 0.5 * total(logp - ref_logp, mask) ** 2
    ),
    "k1 of the response, through k2": lambda e, sg: lambda logp, ref_logp, mask: (
        sg(total(logp - ref_logp, mask)) + 0.5 * total(logp - ref_logp, mask) ** 2
        - sg(0.5 * total(logp - ref_logp, mask) ** 2)
    ),
    "a loss with k2 of the response": lambda e, sg: (
        lambda logp, old_logp, ref_logp, advantages, mask: (
            0.5 * total(logp - ref_logp, mask) ** 2
            - total(e(logp - old_logp) * advantages, mask)
        )
    ),
}  # fmt: skip
WRONG = {  # name -> (what it descends, the term)
    "the sign flipped": (
        "-1 x kl",
        lambda e, sg: lambda logp, ref_logp, mask: -0.5 * total(logp - ref_logp, mask) ** 2,
    ),
    "the ratio inverted": (
        "token_half_chi2",
        lambda e, sg: lambda logp, ref_logp: e(logp - ref_logp) - 1 - (logp - ref_logp),
    ),
    "the mask forgotten": (
        "none of these",
        lambda e, sg: lambda logp, ref_logp: 0.5 * (logp - ref_logp).sum() ** 2,
    ),
    "the mean for the sum": (
        "mean_token_kl",
        lambda e, sg: (
            lambda logp, ref_logp, mask: total(0.5 * (logp - ref_logp) ** 2, mask) / mask.sum()
        ),
    ),
    "reference and policy swapped in the reward": (
        "-1 x kl",
        lambda e, sg: lambda logp, ref_logp: ref_logp - logp,
    ),
    "the stop-gradient missing": (
        "kl_minus_entropy",
        lambda e, sg: lambda logp, ref_logp, mask: total(logp - ref_logp, mask) * total(logp, mask),
    ),
    "differentiated as printed": (
        "nothing",
        lambda e, sg: lambda logp, ref_logp, mask: total(logp - ref_logp, mask),
    ),
    "old for new": (
        "nothing",
        lambda e, sg: lambda logp, old_logp, mask: 0.5 * total(logp - old_logp, mask) ** 2,
    ),
    "token by token (GRPO)": (
        "token_forward_kl",
        lambda e, sg: lambda logp, ref_logp: e(ref_logp - logp) - 1 - (ref_logp - logp),
    ),
    "k3 in the reward": (
        "kl_minus_token_forward_kl",
        lambda e, sg: lambda logp, ref_logp: e(ref_logp - logp) - 1 - (ref_logp - logp),
    ),
}


def to_go(x):
    return x[:, ::-1].cumsum(axis=1)[:, ::-1]


OWN = {  # name -> d loss / d logp by hand; k = mask * (logp - ref_logp), r = logp - old_logp
    "score times k1": lambda k, r, mask: k.sum() * mask,
    "score times k1 less a baseline": lambda k, r, mask: (k.sum() - 0.7) * mask,
    "score times k1 to go": lambda k, r, mask: to_go(k),
    "fixed ratio times k2": lambda k, r, mask: np.exp((mask * r).sum()) * k.sum() * mask,
    "k1 of the response, through k2": lambda k, r, mask: k.sum() * mask,
}


EXPECTED = dict.fromkeys(RIGHT, "kl") | {name: claim for name, (claim, _) in WRONG.items()}


def judged(name, framework):
    """[what it descends, is it right, does it read padding, what it descends off-policy]."""
    exp, stop = exp_and_stop(framework)
    make = RIGHT[name] if name in RIGHT else WRONG[name][1]
    about = {"framework": framework, "placement": "reward" if "in the reward" in name else "loss"}
    f = make(exp, stop)
    if stop is None and name in OWN:
        about["framework"], value = "own", make(exp, lambda x: x)

        def f(logp, old_logp, ref_logp, mask):
            given = {"old_logp": old_logp} if "ratio" in name else {}
            gradient = OWN[name](mask * (logp - ref_logp), logp - old_logp, mask)
            return value(logp=logp, ref_logp=ref_logp, mask=mask, **given), gradient

    report = judge(f, size=SMALL, **about)
    on, off = (verdict.claim for verdict in report.verdicts if verdict.part == "kl")
    assert name == "the mask forgotten" or report.holds(on)
    return [on, report.right, report.reads_padding, off]


if __name__ == "__main__":
    print(json.dumps({name: judged(name, sys.argv[1]) for name in EXPECTED}))
