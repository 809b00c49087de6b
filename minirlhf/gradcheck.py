"""Check a hand-written backward: ours, or that of an operation of your own.

    def cube_forward(x):                 # arrays in; out, cache
        return x * x * x, (x,)
    def cube_backward(dout, cache):      # dL/dout, cache in; dL/dx
        return 3 * cache[0] * cache[0] * dout
    print(check_pair(cube_forward, cube_backward, np.linspace(-1, 1, 5)))

Four independent tests, all in float64:

    central difference  every entry,  (4 D(h) - D(2h)) / 3 with D(h) = (f(x + h) - f(x - h)) / 2h,
                        good to 1e-6
    complex step        every entry,  Im f(x + ih) / h with h = 1e-30: nothing cancels, good to
                        1e-10; needs a forward that takes complex numbers and compares real parts
                        (Squire & Trapp 1998; Martins, Sturdza & Alonso 2003)
    dot product         <v, J u> = <J^T v, u> for random u, v: the backward is the transpose
    direction           a whole loss along random directions, one extra forward each
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from minirlhf.tree import Tree, global_norm, tree_copy, tree_items, tree_leaves, tree_map

CENTRAL_TOLERANCE = 1e-6
COMPLEX_TOLERANCE = 1e-10
COMPLEX_H = 1e-30
CENTRAL_H = 6e-6  # times max(1, |x|); leaves an error of eps |f| / h from rounding


class GradientError(AssertionError):
    """The backward is not the derivative of the forward; the message holds the report."""


class Finding(NamedTuple):
    """The worst entry that one method found in one argument."""

    method: str  # "central difference", "complex step", "dot product" or "direction"
    argument: str  # name of the argument, with the path into it if it is a tree
    entry: tuple[int, ...]
    analytic: float
    numeric: float
    error: float  # relative, see `relative_error`
    tolerance: float


class Report(NamedTuple):
    name: str
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        return all(f.error <= f.tolerance for f in self.findings)

    def worst(self, method: str) -> float:
        """The largest relative error that `method` found; nan if it was not run."""
        return max((f.error for f in self.findings if f.method == method), default=math.nan)

    def __str__(self) -> str:
        lines = [f"{self.name}: {'ok' if self.ok else 'WRONG'}"]
        for f in sorted(self.findings, key=lambda f: -f.error / f.tolerance):
            verdict = "ok   " if f.error <= f.tolerance else "WRONG"
            lines.append(
                f"  {verdict} {f.method:18} {f.argument}{list(f.entry) or ''}: backward "
                f"{f.analytic:.12g}, {f.numeric:.12g} expected, relative error {f.error:.1e} "
                f"(<= {f.tolerance:.0e})"
            )
        return "\n".join(lines)


def relative_error(analytic: np.ndarray, numeric: np.ndarray, scale: float) -> np.ndarray:
    """|a - n| / (|n| + scale). nan counts as infinitely wrong.

    The absolute term matters where an entry is 0 by cancellation, as the gradient of the key bias
    of an attention layer is. `absolute_term` says how large it is.
    """
    error = np.abs(analytic - numeric) / (np.abs(numeric) + scale)
    return np.where(np.isnan(error), np.inf, error)


def absolute_term(numerics: list[Tree], size: float, tolerance: float) -> float:
    """0.01 (0.1 for differences) of the largest entry of all arguments, and what rounding costs.

    A complex step errs by eps |f|, a difference by eps |f| / h. A largest entry below 0.01 counts
    as 0.01, since numbers of size 1 inside f round too: scale a loss that is far smaller up.

    Args:     numerics: the numeric gradient of every argument.
              size: |f|, the sum of |out * dout|.
    """
    is_step = tolerance == COMPLEX_TOLERANCE
    largest = max((np.abs(n).max(initial=0.0) for _, n in tree_items(numerics)), default=0.0)
    rounding = 4 * np.finfo(np.float64).eps * size / (1.0 if is_step else CENTRAL_H)
    return (0.01 if is_step else 0.1) * max(0.01, float(largest)) + rounding / tolerance


def check_pair(
    forward: Callable[..., tuple[Any, Any]],
    backward: Callable[..., Any],
    *arrays: Tree,
    dout: np.ndarray | None = None,
    smooth: bool = True,
    seed: int = 0,
    name: str | None = None,
    raises: bool = True,
    **constants: Any,
) -> Report:
    """Check that backward(dout, cache) is dout times the Jacobian of forward, argument by argument.

    Also checked: the gradients have the arguments' shapes and dtype, neither function writes into
    the arguments, the constants, dout or the cache, and a second backward gives the same.

    Args:     forward: (*arrays, **constants) -> (out, cache); out is one array or number.
              backward: (dout, cache) -> one gradient an argument, in order (bare if there is one).
              arrays: differentiable arguments: float64 arrays, or trees of them.
              dout: dL/dout; drawn from `seed` if None.
              smooth: also run the complex step; False where forward takes no complex numbers.
              constants: keyword arguments of forward that are not differentiated.
              raises: raise GradientError when a number is wrong; False only returns the report.
    Returns:  Report: the worst entry of every argument by every method.
    Raises:   GradientError: a wrong number; a wrong shape or dtype, or memory written to (always).
              ValueError: an argument is not float64.
    """
    name = name or getattr(forward, "__name__", "pair").removesuffix("_forward")
    named = dict(zip(argument_names(forward, len(arrays)), arrays, strict=True))
    for path, leaf in tree_items(named):
        if not isinstance(leaf, np.ndarray) or leaf.dtype != np.float64:
            raise ValueError(f"check_pair: expected float64 arrays; {path} is not one")
    rng = np.random.default_rng(seed)
    out, dout, gradients = _call_twice(name, forward, backward, named, constants, dout, rng)
    values = lambda args: np.asarray(forward(*args.values(), **constants)[0])  # noqa: E731
    f = lambda args: (values(args) * dout).sum()  # noqa: E731
    size = float(np.abs(np.asarray(out) * dout).sum())
    numeric = central_difference(values, named, dout)
    findings = _compare("central difference", gradients, numeric, size, CENTRAL_TOLERANCE)
    if smooth:
        numeric = complex_step(f, named)
        findings += _compare("complex step", gradients, numeric, size, COMPLEX_TOLERANCE)
        findings.append(_dot_product(f, named, gradients.values(), size, rng))
    return _judged(Report(name, findings), raises)


def central_difference(values: Callable, args: Tree, dout: np.ndarray) -> Tree:
    """d<values(args), dout> / dargs ~ (4 D(h) - D(2h)) / 3, two central differences an entry.

    D(h) = <values(x + h) - values(x - h), dout> / 2h errs by h^2 f'''/6 + O(h^4): the combination
    has no h^2 term, so a function that bends sharply raises no false alarm.
    """
    args = tree_copy(args)

    def gradient(leaf: np.ndarray) -> np.ndarray:
        grad = np.zeros(leaf.shape)
        for entry in np.ndindex(leaf.shape):
            x = leaf[entry]
            h = CENTRAL_H * max(1.0, abs(x))
            slopes = []
            for step in (h, 2 * h):
                leaf[entry] = up = x + step
                above = np.array(values(args))  # a copy: it may be a view of the leaf
                leaf[entry] = down = x - step
                slopes.append(((above - values(args)) * dout).sum() / (up - down))
            leaf[entry] = x
            grad[entry] = (4 * slopes[0] - slopes[1]) / 3
        return grad

    return tree_map(gradient, args)


def complex_step(f: Callable, args: Tree) -> Tree:
    """df / dargs = Im f(x + ih) / h on every entry: nothing is subtracted, nothing cancels."""
    args = tree_map(lambda a: a.astype(complex), args)  # all of them, for code working in place

    def gradient(leaf: np.ndarray) -> np.ndarray:
        grad = np.zeros(leaf.shape)
        for entry in np.ndindex(leaf.shape):
            leaf[entry] += 1j * COMPLEX_H
            grad[entry] = f(args).imag / COMPLEX_H
            leaf[entry] = leaf[entry].real
        return grad

    return tree_map(gradient, args)


def directional_derivative(f: Callable, args: Tree, direction: Tree) -> float:
    """d f(args + s direction) / ds at s = 0 by the complex step: one forward, all parameters."""
    moved = tree_map(lambda a, u: a + (1j * COMPLEX_H) * u, args, direction)
    return float(np.asarray(f(moved)).imag / COMPLEX_H)


def check_directions(
    loss: Callable[[Tree], Any],
    params: Tree,
    gradients: Tree,
    *,
    rng: np.random.Generator,
    n_directions: int = 4,
    name: str = "loss",
    raises: bool = True,
) -> Report:
    """|<g, u> - Im loss(theta + ihu)/h| <= 1e-10 |g| for random unit u: few passes a whole model.

    After the directions through all tensors, one through each tensor alone says where an error is.

    Args:     loss: params -> number; takes complex leaves.
              params: tree of float64 arrays.
              gradients: tree of the same structure, dL/dparams.
    Returns:  Report; `error` is relative to |g| (per tensor: to that tensor's |g|, or 1e-3 of the
                  whole).
    Raises:   GradientError: an error exceeds 1e-10.
    """
    by_path, findings = _by_path(name, params, gradients), []
    whole = global_norm(by_path)
    one_by_one = [(path, [path]) for path, gradient in by_path.items() if gradient.size]
    for what, along in [("all", list(by_path))] * n_directions + one_by_one:
        drawn = {path: rng.standard_normal(by_path[path].shape) for path in along}
        norm, paths = global_norm(drawn), iter(by_path)
        direction = tree_map(lambda _: drawn.get(next(paths), 0.0) / norm, params)  # noqa: B023
        numeric = directional_derivative(loss, params, direction)
        analytic = sum(float((by_path[path] * drawn[path]).sum()) for path in along) / norm
        scale = max(global_norm([by_path[path] for path in along]), 1e-3 * whole, 1e-300)
        findings.append(_summed("direction", what, analytic, numeric, scale))
    return _judged(Report(name, findings), raises)


def argument_names(forward: Callable[..., Any], n: int) -> list[str]:
    """Names of the first `n` positional parameters of `forward`: what it is differentiated by."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind in positional][:n]
    return names + [f"argument {i}" for i in range(len(names), n)]


# -- details -------------------------------------------------------------------------------------
def _judged(report: Report, raises: bool) -> Report:
    if raises and not report.ok:
        raise GradientError(str(report))
    return report


def _call_twice(
    name: str, forward: Callable, backward: Callable, named: dict, constants: dict, dout, rng
) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """out, dout and the gradients by path; refused where a call writes or does not repeat."""
    owned = [(path, leaf, leaf.copy()) for path, leaf in tree_items(named)]
    owned += [(key, a, a.copy()) for key in constants for a in _arrays_in(constants[key])]
    out, cache = forward(*named.values(), **constants)
    _check_untouched(f"{name}: the forward", owned)
    if dout is None:
        dout = rng.standard_normal(np.shape(out))
    owned += [("the cache", a, a.copy()) for a in _arrays_in(cache)]
    owned += [("dout", a, a.copy()) for a in _arrays_in(dout)]
    gradients, again = (_by_argument(name, named, backward(dout, cache)) for _ in range(2))
    _check_untouched(f"{name}: the backward", owned)
    for path, g in gradients.items():
        if not np.array_equal(g, again[path], equal_nan=True):
            raise GradientError(f"{name}: a second backward gave another gradient of {path}")
    return out, dout, gradients


def _check_untouched(who: str, owned: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Nobody writes into what belongs to somebody else."""
    for what, array, copy in owned:
        if not np.array_equal(array, copy, equal_nan=True):
            raise GradientError(f"{who} wrote into {what}")


def _by_argument(name: str, named: dict[str, Tree], returned: Any) -> dict[str, np.ndarray]:
    """The gradients by path: of one argument it comes bare, of several as a tuple."""
    listed = list(returned) if isinstance(returned, tuple) else [returned]
    if len(listed) != len(named):
        raise GradientError(
            f"{name}: expected {len(named)} gradients, one for each of {', '.join(named)}; "
            f"got {len(listed)}"
        )
    return _by_path(name, named, dict(zip(named, listed, strict=True)))


def _by_path(name: str, tree: Tree, gradients: Tree) -> dict[str, np.ndarray]:
    """The leaves of `gradients` in the order of `tree`; refused where paths or shapes differ."""
    expected, got = dict(tree_items(tree)), dict(tree_items(gradients))
    if expected.keys() != got.keys():
        missing = ", ".join(path for path in expected if path not in got)
        added = ", ".join(path for path in got if path not in expected)
        raise GradientError(
            f"{name}: expected a gradient for each array of the arguments; missing are "
            f"{missing or 'none'}; got also {added or 'none'}"
        )
    for path, leaf in expected.items():
        g = got[path]
        is_array = isinstance(g, np.ndarray | np.generic)
        if not is_array or (g.shape, g.dtype) != (leaf.shape, leaf.dtype):
            came = f"{getattr(g, 'dtype', type(g).__name__)} {np.shape(g)}"
            raise GradientError(
                f"{name}: expected the gradient of {path} as {leaf.dtype} {leaf.shape}; got {came}"
            )
    return {path: np.asarray(got[path]) for path in expected}


def _arrays_in(value: Any) -> list[np.ndarray]:
    """Every array inside nested tuples, lists and dicts."""
    if isinstance(value, np.ndarray):
        return [value]
    items = list(value.values()) if isinstance(value, dict) else value
    if isinstance(items, tuple | list):
        return [array for item in items for array in _arrays_in(item)]
    return []


def _compare(
    method: str, analytic: dict[str, np.ndarray], numeric: Tree, size: float, tolerance: float
) -> list[Finding]:
    """The worst entry of every leaf of every argument."""
    scale = absolute_term(numeric, size, tolerance)
    findings = []
    for path, n in tree_items(numeric):
        if n.size > 0:
            error = relative_error(analytic[path], n, scale)
            entry = tuple(map(int, np.unravel_index(error.argmax(), error.shape)))
            numbers = [float(array[entry]) for array in (analytic[path], n, error)]
            findings.append(Finding(method, path, entry, *numbers, tolerance))
    return findings


def _dot_product(f: Callable, args: Tree, gradients: Iterable, size: float, rng) -> Finding:
    """<dout, J u> by one complex step against <J^T dout, u> from the backward, for one random u."""
    direction = tree_map(lambda a: rng.standard_normal(a.shape), args)
    numeric = directional_derivative(f, args, direction)
    pairs = zip(gradients, tree_leaves(direction), strict=True)
    products = [float((g * u).sum()) for g, u in pairs]
    scale = sum(map(abs, products)) + absolute_term([], size, COMPLEX_TOLERANCE)
    return _summed("dot product", "all", sum(products), numeric, scale)


def _summed(method: str, argument: str, analytic: float, numeric: float, scale: float) -> Finding:
    """What a method says about all entries together: |analytic - numeric| / scale."""
    error = abs(analytic - numeric) / float(scale)
    error = math.inf if math.isnan(error) else error
    return Finding(method, argument, (), analytic, numeric, error, COMPLEX_TOLERANCE)
