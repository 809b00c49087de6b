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
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minirlhf.tree import Tree, tree_items, tree_map

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
        errors = [f.error for f in self.findings if f.method == method]
        return max(errors) if errors else float("nan")

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

    Args:
        numerics: the numeric gradient of every argument.
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

    Args:
        forward: (*arrays, **constants) -> (out, cache); out is one array or number.
        backward: (dout, cache) -> one gradient an argument, in order (bare if there is one).
        arrays: differentiable arguments: float64 arrays, or trees of them.
        dout: dL/dout; drawn from `seed` if None.
        smooth: also run the complex step; False for a forward that cannot take complex numbers.
        constants: keyword arguments of forward that are not differentiated.
        raises: raise GradientError when a number is wrong; False only returns the report.
    Returns:
        Report: the worst entry of every argument by every method.
    Raises:
        GradientError: a wrong number; a wrong shape or dtype, or memory written to (always).
        ValueError: an argument is not float64.
    """
    name = name or getattr(forward, "__name__", "pair").removesuffix("_forward")
    labels = argument_names(forward, len(arrays))
    named = dict(zip(labels, arrays, strict=True))
    for path, leaf in tree_items(named):
        if not isinstance(leaf, np.ndarray) or leaf.dtype != np.float64:
            raise ValueError(f"check_pair: expected float64 arrays; {path} is not one")
    rng = np.random.default_rng(seed)
    owned = [(path, leaf, leaf.copy()) for path, leaf in tree_items(named)]
    owned += [(key, a, a.copy()) for key in constants for a in _arrays_in(constants[key])]
    out, cache = forward(*arrays, **constants)
    _check_untouched(f"{name}: the forward", owned)
    if dout is None:
        dout = rng.standard_normal(np.shape(out))
    owned += [("the cache", a, a.copy()) for a in _arrays_in(cache)]
    owned += [("dout", a, a.copy()) for a in _arrays_in(dout)]
    gradients = _gradients_like(name, named, backward(dout, cache))
    again = _gradients_like(name, named, backward(dout, cache))
    _check_untouched(f"{name}: the backward", owned)
    for (path, g), (_, g2) in zip(tree_items(gradients), tree_items(again), strict=True):
        if not np.array_equal(g, g2, equal_nan=True):
            raise GradientError(f"{name}: a second backward gave another gradient of {path}")
    gradients = list(gradients.values())

    f = lambda args: (np.asarray(forward(*args, **constants)[0]) * dout).sum()  # noqa: E731
    values = lambda args: np.asarray(forward(*args, **constants)[0])  # noqa: E731
    args, indices = list(arrays), range(len(arrays))
    size = float(np.abs(np.asarray(out) * dout).sum())
    numerics = [central_difference(values, args, i, dout) for i in indices]
    findings = _compare("central difference", labels, gradients, numerics, size, CENTRAL_TOLERANCE)
    if smooth:
        numerics = [complex_step(f, args, i) for i in indices]
        findings += _compare("complex step", labels, gradients, numerics, size, COMPLEX_TOLERANCE)
        findings += dot_product(f, args, gradients, size=size, rng=rng)
    report = Report(name, findings)
    if raises and not report.ok:
        raise GradientError(str(report))
    return report


def central_difference(values: Callable, args: list[Tree], i: int, dout: np.ndarray) -> Tree:
    """d<values(args), dout> / d args[i] ~ (4 D(h) - D(2h)) / 3, two central differences an entry.

    D(h) = <values(x + h) - values(x - h), dout> / 2h errs by h^2 f'''/6 + O(h^4): the combination
    has no h^2 term, so a function that bends sharply raises no false alarm.
    """

    def one(x: np.ndarray, evaluate: Callable) -> np.ndarray:
        grad = np.zeros(x.shape)
        for entry in np.ndindex(x.shape):
            h = CENTRAL_H * max(1.0, abs(x[entry]))
            slopes = []
            for step in (h, 2 * h):
                up, down = x.copy(), x.copy()
                up[entry] += step
                down[entry] -= step
                rise = ((evaluate(up) - evaluate(down)) * dout).sum()
                slopes.append(rise / (up[entry] - down[entry]))
            grad[entry] = (4 * slopes[0] - slopes[1]) / 3
        return grad

    return _leafwise(one, values, args, i)


def complex_step(f: Callable, args: list[Tree], i: int) -> Tree:
    """df / d args[i] = Im f(x + ih) / h on every entry: nothing is subtracted, nothing cancels."""
    args = [tree_map(lambda a: a.astype(complex), arg) for arg in args]  # for code working in place

    def one(x: np.ndarray, evaluate: Callable) -> np.ndarray:
        grad = np.zeros(x.shape)
        for entry in np.ndindex(x.shape):
            moved = x.copy()
            moved[entry] += 1j * COMPLEX_H
            grad[entry] = evaluate(moved).imag / COMPLEX_H
        return grad

    return _leafwise(one, f, args, i)


def directional_derivative(f: Callable, args: list[Tree], direction: list[Tree]) -> float:
    """d f(args + s direction) / ds at s = 0 by the complex step: one forward, all parameters."""
    moved = tree_map(lambda a, u: a + (1j * COMPLEX_H) * u, args, direction)
    return float(np.asarray(f(moved)).imag / COMPLEX_H)


def dot_product(
    f: Callable,
    args: list[Tree],
    gradients: list[Tree],
    *,
    size: float,
    rng: np.random.Generator,
) -> list[Finding]:
    """<dout, J u> by one complex step against <J^T dout, u> from the backward, for one random u.

    The error is relative to the sum of the sizes of all products g * u.
    """
    direction = tree_map(lambda a: rng.standard_normal(a.shape), args)
    numeric = directional_derivative(f, args, direction)
    products = tree_map(lambda g, u: float((g * u).sum()), gradients, direction)
    analytic = sum(value for _, value in tree_items(products))
    total = sum(float(np.abs(value)) for _, value in tree_items(products))
    scale = total + absolute_term([], size, COMPLEX_TOLERANCE)
    error = abs(analytic - numeric) / scale if np.isfinite(total) else float("inf")
    return [
        Finding("dot product", "all", (), analytic, numeric, _nan_is_inf(error), COMPLEX_TOLERANCE)
    ]


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

    Args:
        loss: params -> number; takes complex leaves.
        params: tree of float64 arrays.
        gradients: tree of the same structure, dL/dparams.
    Returns:
        Report; `error` is relative to |g| (per tensor: to that tensor's |g|, or 1e-3 of the whole).
    Raises:
        GradientError: an error exceeds 1e-10.
    """
    by_path = dict(tree_items(_tree_like(name, params, gradients)))
    whole = np.sqrt(sum(float((g * g).sum()) for g in by_path.values()))
    paths = list(by_path)
    findings = []
    for only in [None] * n_directions + paths:
        direction = _unit_direction(params, only, rng)
        numeric = directional_derivative(loss, params, direction)
        moved = dict(tree_items(direction))
        along = paths if only is None else [only]
        analytic = sum(float((by_path[path] * moved[path]).sum()) for path in along)
        scale = whole
        if only is not None:
            scale = max(float(np.sqrt((by_path[only] ** 2).sum())), 1e-3 * whole)
        error = abs(analytic - numeric) / max(scale, 1e-300)
        findings.append(
            Finding(
                "direction",
                only or "all",
                (),
                analytic,
                numeric,
                _nan_is_inf(error),
                COMPLEX_TOLERANCE,
            )
        )
    report = Report(name, findings)
    if raises and not report.ok:
        raise GradientError(str(report))
    return report


def argument_names(forward: Callable[..., Any], n: int) -> list[str]:
    """Names of the first `n` positional parameters of `forward`: what it is differentiated by."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # a compiled function may have none
        parameters = []
    names = [p.name for p in parameters if p.kind in positional][:n]
    return names + [f"argument {i}" for i in range(len(names), n)]


# -- Hypothesis strategies -----------------------------------------------------------------------


def shapes(*, min_rank: int = 1, max_rank: int = 3, min_side: int = 1, max_side: int = 4):
    """Strategy: a tuple of `min_rank` to `max_rank` sides."""
    from hypothesis import strategies as st

    side = st.integers(min_side, max_side)
    return st.lists(side, min_size=min_rank, max_size=max_rank).map(tuple)


def arrays(shape, *, scales=(0.1, 1.0, 3.0), offsets=(0.0, 1.0)):
    """Strategy: a float64 normal array; Hypothesis draws scale, offset and seed, not the entries.

    Args:
        shape: a tuple, or a strategy for one.
    """
    from hypothesis import strategies as st

    shape = st.just(shape) if isinstance(shape, tuple) else shape

    def draw_array(shape, scale, offset, seed):
        return np.asarray(scale * np.random.default_rng(seed).standard_normal(shape) + offset)

    seeds = st.integers(0, 2**32 - 1)
    return st.builds(draw_array, shape, st.sampled_from(scales), st.sampled_from(offsets), seeds)


def masks(B: int, T: int, *, side: str = "right"):
    """Strategy: a 0/1 mask (B, T) with 1 to T real tokens a row, padding on `side`."""
    from hypothesis import strategies as st

    def to_mask(lengths):
        mask = (np.arange(T) < np.array(lengths)[:, None]).astype(np.float64)
        return mask if side == "right" else mask[:, ::-1].copy()

    return st.lists(st.integers(1, T), min_size=B, max_size=B).map(to_mask)


# -- details -------------------------------------------------------------------------------------


def _leafwise(one: Callable, f: Callable, args: list[Tree], i: int) -> Tree:
    """`one(leaf, evaluate)` of every leaf of args[i]; evaluate(leaf) is f with it replaced."""

    def visit(tree: Tree, rebuild: Callable) -> Tree:
        if isinstance(tree, dict):
            return {k: visit(v, lambda x, k=k: rebuild({**tree, k: x})) for k, v in tree.items()}
        if isinstance(tree, list):
            return [
                visit(v, lambda x, k=k: rebuild([*tree[:k], x, *tree[k + 1 :]]))
                for k, v in enumerate(tree)
            ]
        return one(tree, lambda x: f(rebuild(x)))

    return visit(args[i], lambda x: [*args[:i], x, *args[i + 1 :]])


def _compare(
    method: str,
    labels: list[str],
    analytic: list[Tree],
    numeric: list[Tree],
    size: float,
    tolerance: float,
) -> list[Finding]:
    """The worst entry of every leaf of every argument."""
    scale = absolute_term(numeric, size, tolerance)
    findings = []
    by_label = [dict(zip(labels, trees, strict=True)) for trees in (analytic, numeric)]
    for (where, a), (_, n) in zip(*map(tree_items, by_label), strict=True):
        if n.size == 0:
            continue
        error = relative_error(a, n, scale)
        entry = np.unravel_index(int(np.argmax(error)), error.shape)
        findings.append(
            Finding(
                method,
                where,
                tuple(int(k) for k in entry),
                float(a[entry]),
                float(n[entry]),
                float(error[entry]),
                tolerance,
            )
        )
    return findings


def _check_untouched(who: str, owned: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Nobody writes into what belongs to somebody else."""
    for what, array, copy in owned:
        if not np.array_equal(array, copy, equal_nan=True):
            raise GradientError(f"{who} wrote into {what}")


def _gradients_like(name: str, named: dict[str, Tree], returned: Any) -> dict[str, Tree]:
    """Gradients by argument name: a single one comes bare, several come as a tuple."""
    listed = list(returned) if isinstance(returned, tuple) else [returned]
    if len(listed) != len(named):
        raise GradientError(
            f"{name}: expected {len(named)} gradients, one for each of {', '.join(named)}; "
            f"got {len(listed)}"
        )
    return _tree_like(name, named, dict(zip(named, listed, strict=True)))


def _tree_like(name: str, tree: Tree, gradients: Tree, path: str = "") -> Tree:
    """`gradients` in the order of `tree`; refused where keys, shapes or dtypes differ."""
    if isinstance(tree, dict | list):
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        got = type(gradients).__name__
        if isinstance(gradients, dict | list):
            got = list(gradients) if isinstance(gradients, dict) else list(range(len(gradients)))
        if got != keys and (isinstance(got, str) or set(got) != set(keys)):
            of = f"gradients of {path}" if path else "gradients"
            raise GradientError(f"{name}: expected {of} under the keys {keys}; got {got}")
        down = [
            _tree_like(name, tree[key], gradients[key], f"{path}.{key}" if path else str(key))
            for key in keys
        ]
        return dict(zip(keys, down, strict=True)) if isinstance(tree, dict) else down
    if (
        not isinstance(gradients, np.ndarray | np.generic)
        or gradients.shape != tree.shape
        or gradients.dtype != tree.dtype
    ):
        got = f"{getattr(gradients, 'dtype', type(gradients).__name__)} {np.shape(gradients)}"
        raise GradientError(
            f"{name}: expected the gradient of {path} as {tree.dtype} {tree.shape}; got {got}"
        )
    return np.asarray(gradients)


def _arrays_in(value: Any) -> list[np.ndarray]:
    """Every array inside nested tuples, lists and dicts."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [array for item in value for array in _arrays_in(item)]
    return []


def _unit_direction(params: Tree, only: str | None, rng: np.random.Generator) -> Tree:
    """A random tree of norm 1: over all leaves, or 0 except at the path `only`."""
    items = dict(tree_items(params))
    drawn = {
        path: rng.standard_normal(leaf.shape) * (only in (None, path))
        for path, leaf in items.items()
    }
    norm = np.sqrt(sum((u * u).sum() for u in drawn.values()))
    leaves = iter(drawn.values())
    return tree_map(lambda _: next(leaves) / norm, params)


def _nan_is_inf(error: float) -> float:
    return float("inf") if error != error else float(error)
