"""Every tolerance of the tests, in one place, each with its reason.

`assert_close(actual, expected, T)` asks for  max |actual - expected| <= T max(1, max |expected|).
A pair of numbers {float64: .., float32: ..} is picked by the dtype of the run, `T[dtype]`.
"""

import numpy as np

from minirlhf.tree import tree_items

# The same code on the same numbers in arrays of the same shape: not one bit may differ. So the
# log-ratio of the first update is 0, and not merely small.
SAME_FORWARD = 0.0

# The same numbers through NumPy itself and through the stand-in for a GPU, which runs NumPy.
STAND_IN = 0.0

# A formula as Python loops against the same formula on arrays: the order of additions differs.
LOOPS = 1e-12

# One token at a time against the whole sequence, and other paddings or batch mates: products with
# other numbers of rows take other paths through the BLAS, a few ulp a layer. A wrong position, a
# visible pad or a stale key changes the first or second digit.
KV_CACHE = {np.float64: 1e-10, np.float32: 1e-4}
PADDING = {np.float64: 1e-10, np.float32: 1e-4}
BATCH_COMPOSITION = {np.float64: 1e-10, np.float32: 1e-4}

# What PPO scores from the sampler's hidden states in float32, on models of two small blocks: an ulp
# or two of a log-prob around 6, summed over a dozen tokens.
SAMPLER_HIDDEN = 1e-5

# Gradients of micro-batches added up, against one large batch; relative to the norm of all of them.
MICRO_BATCH = {np.float64: 1e-12, np.float32: 1e-5}

# Numbers of a whole float32 run on several ranks against those of one process: sums in another
# order, which Adam's root of small numbers enlarges update by update: 2e-7 was the most. A part
# that is lost, or counted twice, moves the first or second digit.
RANKS = 1e-4

# A float32 run against the float64 run of the same numbers, relative to the largest entry: 6e-8 a
# rounding, a hundred roundings in a row, gradients somewhat worse.
FLOAT32_FORWARD, FLOAT32_GRADIENT = 1e-5, 1e-4

# Expected gradients and values by enumeration of all responses in float64: nothing is sampled, so
# what agrees does so to rounding. What does not agree differs by more than DIFFERENT.
ENUMERATION, DIFFERENT = 1e-8, 1e-2

# A derivative by the complex step, Im f(x + 1e-30 i) / 1e-30: nothing cancels, so it is as good as
# f itself. By central differences at a relative step of 1e-5: rounding leaves 1e-11, and the cubic
# term 1e-10 times a third derivative.
COMPLEX_STEP, DIFFERENCES = 1e-10, 1e-6

# The frontier is found by bisection on beta: its KL is right to 1e-15, times a slope of beta.
FRONTIER = 1e-9

# exp(x) - 1 - x, relative: a few roundings (1e-16 or 6e-8) on either side of the seam |x| = 0.5,
# where expm1(x) - x loses 2 / |x| = 4 of them.
K3 = {np.float64: 1e-15, np.float32: 5e-7}

# Fixtures that are printed with three to five digits.
PRINTED = 5e-3

# Observed against expected frequencies: refuse below this probability. Seeds are fixed, so it
# bounds only how often a new seed would have to be looked at.
CHI_SQUARE_P, CHI_SQUARE_Z = 1e-4, 3.719

# NumPy against CuPy on one operation, relative to the largest entry: other orders of summation and
# other exp and tanh. A whole update adds Adam, which divides by the root of small numbers.
CUPY_PAIR = {np.float64: 1e-12, np.float32: 1e-5}
CUPY_UPDATE = {np.float64: 1e-8, np.float32: 1e-3}

# A kernel's text run on a CPU against NumPy's lines, relative to the largest entry: another order
# of summation, one division less or more, the C library's exp. A whole update divides by the root
# of small numbers besides.
KERNEL = {np.float64: 1e-12, np.float32: 1e-5}
KERNEL_UPDATE = {np.float64: 1e-9, np.float32: 1e-3}


def assert_close(actual, expected, tolerance=LOOPS):
    """Same shape, and max |actual - expected| <= tolerance max(1, max |expected|)."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{actual.shape} instead of {expected.shape}"
    scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)))
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=tolerance * scale)


def assert_trees_close(actual, expected, tolerance):
    """Leaf by leaf, relative to the norm of the whole expected tree; same shapes and dtypes."""
    ours, theirs = list(tree_items(actual)), list(tree_items(expected))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    norm = np.sqrt(sum(float((leaf.astype(np.float64) ** 2).sum()) for _, leaf in theirs))
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        error = float(np.abs(a.astype(np.float64) - b).max(initial=0.0))
        assert error <= tolerance * norm, f"{path}: differs by {error:.3g}, the norm is {norm:.3g}"
