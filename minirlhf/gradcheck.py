"""Check a hand-written backward: ours, or that of an operation of your own.

    def cube_forward(x):                 # arrays in; out, cache
        return x * x * x, (x,)
    def cube_backward(dout, cache):      # dL/dout, cache in; dL/dx
        return 3 * cache[0] * cache[0] * dout
    print(check_pair(cube_forward, cube_backward, np.linspace(-1, 1, 5)))

Four independent tests, all in float64:

    central difference  every entry,  (f(x + h) - f(x - h)) / 2h, good to 1e-6
    complex step        every entry,  Im f(x + ih) / h with h = 1e-30: no cancellation, good to 1e-10;
                        needs a forward that accepts complex numbers and compares only real parts
                        (Squire & Trapp 1998; Martins, Sturdza & Alonso 2003)
    dot product         <v, J u> = <J^T v, u> for random u, v: the backward is the transpose
    direction           a whole loss along random directions, one extra forward each
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minirlhf.tree import Tree, tree_items, tree_map

CENTRAL_TOLERANCE = 1e-6
COMPLEX_TOLERANCE = 1e-10
COMPLEX_H = 1e-30
CENTRAL_H = 6e-6  # near (3 eps |f| / |f'''|)^(1/3), where truncation and rounding balance


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
                f"  {verdict} {f.method:18} {f.argument}{list(f.entry)}: backward {f.analytic:.12g}, "
                f"{f.numeric:.12g} expected, relative error {f.error:.1e} (<= {f.tolerance:.0e})"
            )
        return "\n".join(lines)


def relative_error(analytic: np.ndarray, numeric: np.ndarray, tolerance: float) -> np.ndarray:
    """|a - n| / (|n| + s), s = 0.01 (0.1 for differences) of the argument's largest entry, or of 1.

    The absolute term s matters where an entry is 0 by cancellation, as the gradient of the key
    bias of an attention layer is. nan counts as infinitely wrong.
    """
    share = 0.01 if tolerance < 1e-8 else 0.1
    scale = share * max(1.0, float(np.abs(numeric).max(initial=0.0)))
    error = np.abs(analytic - numeric) / (np.abs(numeric) + scale)
    return np.where(np.isnan(error), np.inf, error)


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
    its arguments, dout or the cache, and a second backward on the same cache gives the same.

    Args:
        forward: (*arrays, **constants) -> (out, cache); out is one array or number.
        backward: (dout, cache) -> one gradient an argument, in order (bare if there is one).
        arrays: differentiable arguments: float64 arrays, or trees of them.
        dout: dL/dout; drawn from `seed` if None.
        smooth: also run the complex step; False for a forward that cannot take complex numbers.
        constants: keyword arguments of forward that are not differentiated.
        raises: raise GradientError when something is wrong; False returns the report only.
    Returns:
        Report: the worst entry of every argument by every method.
    Raises:
        GradientError: see above.
        ValueError: an argument is not float64.
    """
    name = name or getattr(forward, "__name__", "pair").removesuffix("_forward")
    for path, leaf in tree_items(list(arrays)):
        if not isinstance(leaf, np.ndarray) or leaf.dtype != np.float64:
            raise ValueError(f"check_pair: expected float64 arrays; argument {path} is not one")
    rng = np.random.default_rng(seed)
    before = tree_map(np.copy, list(arrays))
    out, cache = forward(*arrays, **constants)
    if dout is None:
        dout = rng.standard_normal(np.shape(out))
    frozen = [(a, a.copy()) for a in _arrays_in((cache, dout, list(constants.values())))]
    gradients = _as_list(backward(dout, cache), len(arrays))
    again = _as_list(backward(dout, cache), len(arrays))
    _check_manners(name, list(arrays), before, gradients, again, frozen)

    f = lambda args: (np.asarray(forward(*args, **constants)[0]) * dout).sum()  # noqa: E731
    values = lambda args: np.asarray(forward(*args, **constants)[0])  # noqa: E731
    findings = []
    for i in range(len(arrays)):
        label = f"argument {i}"
        numeric = central_difference(values, list(arrays), i, dout)
        findings += _compare("central difference", label, gradients[i], numeric, CENTRAL_TOLERANCE)
        if smooth:
            numeric = complex_step(f, list(arrays), i)
            findings += _compare("complex step", label, gradients[i], numeric, COMPLEX_TOLERANCE)
    if smooth:
        findings += dot_product(f, list(arrays), gradients, rng=rng)
    report = Report(name, findings)
    if raises and not report.ok:
        raise GradientError(str(report))
    return report


def central_difference(values: Callable, args: list[Tree], i: int, dout: np.ndarray) -> Tree:
    """d<values(args), dout> / d args[i] ~ <values(x + h) - values(x - h), dout> / 2h, every entry."""

    def one(x: np.ndarray, evaluate: Callable) -> np.ndarray:
        grad = np.zeros(x.shape)
        for entry in np.ndindex(x.shape):
            h = CENTRAL_H * max(1.0, abs(x[entry]))
            sides = []
            for sign in (1, -1):
                moved = x.copy()
                moved[entry] += sign * h
                sides.append((evaluate(moved), moved[entry]))
            (up, x_up), (down, x_down) = sides
            grad[entry] = ((up - down) * dout).sum() / (x_up - x_down)
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
    f: Callable, args: list[Tree], gradients: list[Tree], *, rng: np.random.Generator
) -> list[Finding]:
    """<dout, J u> by one complex step against <J^T dout, u> from the backward, for one random u."""
    direction = tree_map(lambda a: rng.standard_normal(a.shape), args)
    numeric = directional_derivative(f, args, direction)
    products = tree_map(lambda g, u: float((g * u).sum()), gradients, direction)
    analytic = sum(value for _, value in tree_items(products))
    size = sum(abs(value) for _, value in tree_items(products))
    error = abs(analytic - numeric) / max(1e-2, size, abs(numeric))
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
    """|<g, u> - Im loss(theta + ihu)/h| <= 1e-10 |g| for random unit u: a whole model in a few passes.

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
    whole = np.sqrt(sum(float((g * g).sum()) for _, g in tree_items(gradients)))
    paths = [path for path, _ in tree_items(params)]
    findings = []
    for only in [None] * n_directions + paths:
        direction = _unit_direction(params, only, rng)
        numeric = directional_derivative(loss, params, direction)
        parts = tree_map(lambda g, u: float((g * u).sum()), gradients, direction)
        analytic = sum(value for _, value in tree_items(parts))
        scale = whole
        if only is not None:
            tensor = dict(tree_items(gradients))[only]
            scale = max(float(np.sqrt((tensor * tensor).sum())), 1e-3 * whole)
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
        return scale * np.random.default_rng(seed).standard_normal(shape) + offset

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
    """Apply `one(leaf, evaluate)` to every leaf of args[i]; evaluate(leaf) is f with it replaced."""

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
    method: str, label: str, analytic: Tree, numeric: Tree, tolerance: float
) -> list[Finding]:
    findings = []
    for (path, a), (_, n) in zip(tree_items(analytic), tree_items(numeric), strict=True):
        if n.size == 0:
            continue
        error = relative_error(a, n, tolerance)
        entry = np.unravel_index(int(np.argmax(error)), error.shape)
        where = f"{label} {path}".strip()
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


def _check_manners(name, arrays, before, gradients, again, frozen) -> None:
    """Shapes, dtypes, and nobody writes into what belongs to somebody else."""
    for (path, x), (_, old), (_, g), (_, g2) in zip(
        *(tree_items(tree) for tree in (arrays, before, gradients, again)), strict=True
    ):
        if not isinstance(g, np.ndarray) or g.shape != x.shape or g.dtype != x.dtype:
            got = f"{getattr(g, 'dtype', type(g).__name__)} {np.shape(g)}"
            raise GradientError(
                f"{name}: expected the gradient of argument {path} as float64 {x.shape}; got {got}"
            )
        if not np.array_equal(x, old):
            raise GradientError(f"{name}: argument {path} was written to")
        if not np.array_equal(g, g2, equal_nan=True):
            raise GradientError(f"{name}: a second backward on one cache gave another gradient")
    for array, copy in frozen:
        if not np.array_equal(array, copy, equal_nan=True):
            raise GradientError(f"{name}: the backward wrote into the cache, dout or a constant")


def _as_list(gradients: Any, n: int) -> list[Any]:
    """A backward of one argument returns it bare; of several, a tuple."""
    listed = list(gradients) if isinstance(gradients, tuple) else [gradients]
    if len(listed) != n:
        raise GradientError(f"expected {n} gradients, one an argument; got {len(listed)}")
    return listed


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
