"""Check the hand-written derivative of an operation of your own: here RMSNorm.

    python examples/check_your_own_operation.py

Write the forward and, below it, the backward; give `check_pair` some numbers; print the report.
Then see how an error of a thousandth is reported. In a test, let Hypothesis draw the shapes:

    from hypothesis import given, strategies as st
    from hypothesis.extra.numpy import array_shapes, arrays

    @given(arrays(np.float64, array_shapes(), elements=st.floats(-3, 3)))
    def test_rmsnorm(x):
        check_pair(rmsnorm_forward, rmsnorm_backward, x, np.ones(x.shape[-1]))
"""

import numpy as np

from minirlhf.gradcheck import GradientError, check_pair


def rmsnorm_forward(x, gain, *, eps=1e-6):
    """y = gain * xhat,  xhat = x / sqrt(mean(x^2) + eps), the mean over the last axis (1910.07467).

    What it is differentiated by comes first, constants follow by keyword; out and a cache go out.
    """
    rscale = 1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return gain * x * rscale, (x, gain, rscale)


def rmsnorm_backward(dy, cache):
    """dx = rscale (dxhat - xhat mean(dxhat * xhat)),  dxhat = gain dy,  dgain = sum xhat dy."""
    x, gain, rscale = cache
    xhat, dxhat = rscale * x, gain * dy
    dx = rscale * (dxhat - xhat * (dxhat * xhat).mean(axis=-1, keepdims=True))
    return dx, (xhat * dy).reshape(-1, gain.size).sum(axis=0)


def wrong_backward(dy, cache):
    """The second entry of dgain is 0.1 % too large."""
    dx, dgain = rmsnorm_backward(dy, cache)
    dgain[1] *= 1.001
    return dx, dgain


def main():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4))  # float64: a gradient is no number to check in float32
    gain = rng.standard_normal(4)
    report = check_pair(rmsnorm_forward, rmsnorm_backward, x, gain, eps=1e-6)
    print(report)

    print("\nWith 0.1 % too much in one of the 28 numbers it stops with this message:\n")
    try:
        check_pair(rmsnorm_forward, wrong_backward, x, gain, eps=1e-6)
    except GradientError as error:
        print(error)
    else:
        raise SystemExit("the checker let an error through")


if __name__ == "__main__":
    main()
