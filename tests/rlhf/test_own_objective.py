"""The objective that rlhf/README.md writes step by step is right, as its reader will paste it."""

import re
import textwrap

import numpy as np
import pytest
from sources import PACKAGE
from tolerances import assert_close

from minirlhf.app import cases
from minirlhf.backend import as_float
from minirlhf.gradcheck import check_pair
from minirlhf.rlhf import objectives


@pytest.fixture(scope="module")
def pair():
    """(forward, backward) of the code in the README, as if it stood in objectives.py."""
    text = (PACKAGE / "rlhf" / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## An objective of your own") :]
    code = textwrap.dedent(re.search(r"   ```python\n(.*?)   ```", section, re.DOTALL)[1])
    names = dict(vars(objectives))
    exec(code, names)
    return names["gmpo_forward"], names["gmpo_backward"]


def drawn(seed):
    (logp,), constants = cases.make_of_tokens(cases.Draw(np.random.default_rng(seed)))
    return logp, {name: constants[name] for name in ("old_logp", "advantages", "weights")}


@pytest.mark.parametrize("clip", objectives.CLIPS)
@pytest.mark.parametrize("seed", range(5))
def test_its_gradient(pair, seed, clip):
    logp, constants = drawn(seed)
    check_pair(*pair, logp, **constants, clip=clip)


@pytest.mark.parametrize("clip", objectives.CLIPS)
@pytest.mark.parametrize("seed", range(5))
def test_its_formula(pair, seed, clip):
    logp, c = drawn(seed)
    mask, total = c["weights"] > 0, 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        near = []
        for i in np.flatnonzero(mask[b]):
            x, A = logp[b, i] - c["old_logp"][b, i], c["advantages"][b, i]
            sides = {"ppo": (A >= 0, A < 0), "book": (True, False), "none": (False, False)}[clip]
            x = min(x, 0.2) if sides[0] else x
            near.append(max(x, -0.2) if sides[1] else x)
        total -= c["weights"][b, t] * np.exp(np.mean(near)) * c["advantages"][b, t]
    assert_close(pair[0](logp, **c, clip=clip)[0], total)


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.int8])
def test_its_dtypes(pair, dtype):
    shape, rng = (2, 3), np.random.default_rng(0)
    logp, old_logp, advantages = rng.integers(0, 2, (3, *shape)).astype(dtype)
    same = {"old_logp": old_logp, "advantages": advantages, "weights": np.ones(shape, dtype)}
    loss, cache = pair[0](logp, **same)
    assert loss.dtype == pair[1](1.0, cache).dtype == as_float(logp).dtype
