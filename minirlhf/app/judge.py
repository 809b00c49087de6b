"""`minirlhf judge`: a KL term, a loss or advantages of anybody's, against the exact answer.

    judge(lambda logp, ref_logp, mask: (mask * 0.5 * (logp - ref_logp) ** 2).sum()).descends
                                                     "token_kl": a part of the penalty's gradient
    assert_descends(my_loss, "0.04 x kl")            for a test, in one line

A function is asked of one sampled response, arrays (1, T), and takes those of NAMES that it asks
for by name: which they are says what it is. A penalty; with advantages, a loss; with rewards, an
estimator of advantages, of a group of responses (3, T) or (3,) if it asks for the group or for
rewards alone. A loss is a number, or one a token, summed over the mask; of a tuple the first. In
NumPy it is differentiated by central differences, or returns (number, its own gradient).
"""

import contextlib
import functools
import importlib
import inspect
import json
import operator
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.text import Text

from minirlhf.app.progress import track
from minirlhf.app.tables import BAD, GOOD, rows_table, show
from minirlhf.disk import read_toml, shorten
from minirlhf.errors import InputError
from minirlhf.exact import judge as exact
from minirlhf.exact.judge import Answer, Arrays, Verdict
from minirlhf.exact.libraries import LIBRARIES, TERMS
from minirlhf.tree import tree_map
from minirlhf.worlds import rewards

Framework = Literal["auto", "numpy", "own", "torch", "jax"]
Placement = Literal["loss", "reward"]
LOGP = "(per_token_|action_)?log_?p(s|robs?)?"
NAMES = {  # what a function may ask for -> how libraries spell it
    ours: form.replace("LOGP", LOGP)
    for ours, form in read_toml(Path(__file__).with_name("judge.toml")).items()
}
GROUP = 3  # responses
SETTINGS = {"gamma": 1.0, "lam": 0.95, "group_size": GROUP, "group": np.zeros(GROUP, dtype=int)}
KINDS = [{"logp", "old_logp", "ref_logp", "advantages", "mask"}, {"rewards", "values", "mask"}]
PARTS = {"kl": "the penalty", "reward": "the advantages"}
NUMBER = r"(-?\d*\.?\d+(e[-+]?\d+)?)?"  # before the x of a claim
STEP = 1e-5  # of central differences: their error is about 1e-10


class Report(NamedTuple):
    """What a function does: first of all on the policy's own samples, or with exact values."""

    verdicts: list[Verdict]
    reads_padding: bool  # it has a slope where the mask is 0

    def __str__(self) -> str:
        return "\n".join(sentences(self))

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    @property
    def descends(self) -> str:
        """A name of exact/judge.toml, "nothing" or "none of these"."""
        return self.verdicts[0].descends

    @property
    def claims(self) -> dict[str, str]:
        """What each part descends, first of all."""
        return {verdict.part: verdict.claim for verdict in reversed(self.verdicts)}

    @property
    def right(self) -> bool:
        """It is the gradient of the penalty, or of the reward, or of both, and nothing else."""
        return not self.reads_padding and all(part == claim for part, claim in self.claims.items())

    def holds(self, claim: str) -> bool:
        """Does it descend this, in five digits: "kl", "0.04 x kl", "nothing"?"""
        factor, _, name = claim.rpartition(" x ")
        factor = float(factor or 1) if re.fullmatch(NUMBER, factor) else 0.0
        if not factor or name.removeprefix(exact.MEAN) not in (*exact.MEANS, exact.NOTHING):
            raise InputError(
                f"judge: expected a claim like kl, mean_kl or '0.04 x kl', of one of "
                f"{', '.join(exact.MEANS)}, {exact.NOTHING}; got {shorten(claim)!r}: name one"
            )
        return exact.times(factor, name) in self.claims.values() and not self.reads_padding


def judge(
    f: Callable[..., Any] | str,
    *,
    placement: Placement = "loss",
    framework: Framework = "auto",
    size: tuple[int, int] = (4, 4),
    seed: int = 0,
) -> Report:
    """What the expected gradient of a function is the gradient of.

    Args:     f: the function; or file.py:function, module:function, or a name of LIBRARIES.
              placement: "loss": it is differentiated. "reward": it is a number for each token that
                  is taken off the reward, a constant, as in PPO; logp is then the sampler's.
              framework: who differentiates; "auto": the one that the function uses; "own": it
                  returns (number, gradient (1, T) at logp) itself.
              size: tokens of the world's vocabulary, and of its longest response.
              seed: of the world's transformers.
    Raises:   InputError: it cannot be called, or does not return finite numbers that fit.
    """
    if isinstance(f, str) and ":" in f:
        f = rewards.load_function(f, "judge")
    elif isinstance(f, str):
        if f not in LIBRARIES:
            raise InputError(
                f"judge: expected file.py:function, module:function, or one of "
                f"{', '.join(LIBRARIES)}; got {shorten(f)!r}: name one"
            )
        library = LIBRARIES[f]
        f, placement, framework = TERMS[library.term], library.placement, library.framework
    call, asked = _by_name(f)
    fits = len(size) == 2 and min(size) > 1 and (size[0] - 1) ** size[1] <= 2000
    if not fits or seed < 0:
        raise InputError(
            "judge: expected --seed from 0 on, and --size of at least 2 tokens and at most 2000 "
            f"responses of the greatest length; got {seed} and {size}: choose others, like 4 4"
        )
    framework = _used_by(f) if framework == "auto" else framework
    is_constant, seen = placement == "reward" or "rewards" in asked, []
    answer = _answer(call, framework, is_constant=is_constant, seen=seen)
    if "rewards" not in asked:
        about = {"placement": placement, "with_reward": "advantages" in asked}
        found = exact.judge_loss(answer, exact.make_settings(seed, *size), **about)
    elif asked & {"group", "group_size"} or asked == {"rewards"}:
        found = exact.judge_advantages(answer, exact.make_settings(seed, 3, 3), group_size=GROUP)
    else:
        found = exact.judge_advantages(answer, exact.make_settings(seed, *size))
    verdicts = list(found)
    alive = {v.part for v in verdicts if any(row["noise"] or row["cosine"] for row in v.rows)}
    if not alive:
        raise InputError(
            "judge: expected a loss that depends on logp; its gradient is 0 at every response: is "
            "it detached? What is a constant in the reward is judged with --placement reward"
        )
    return Report([v for v in verdicts if v.part in alive], any(seen))


def assert_descends(f: Callable[..., Any] | str, claim: str, **about: Any) -> None:
    """Raise AssertionError unless f descends what is claimed, like "0.04 x kl"; about: of judge."""
    report = judge(f, **about)
    if not report.holds(claim):
        raise AssertionError(f"expected {claim}; {'; '.join(sentences(report))}")


def sentences(report: Report) -> list[str]:
    """The verdicts in words."""
    said = []
    for v in report.verdicts:
        words = exact.meaning(v.descends) if v.factor else f"nearest is {v.nearest}"
        words = "its expected gradient is 0: noise alone" if v.nearest == exact.NOTHING else words
        said.append(f"{PARTS[v.part]}, {v.given}: descends {v.claim} ({words})")
        if v.value_is != exact.NONE:
            said.append(f"its value is on average {v.value_is}")
    return said + ["it reads what stands at padding"] * report.reads_padding


# -- a function as an answer ---------------------------------------------------------------------
def _by_name(f: Callable[..., Any]) -> tuple[Callable, set[str]]:
    """f as a function of the arrays by our names, and which of them it asks for."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError) as error:
        raise InputError(f"judge: expected a function; got {shorten(repr(f))}: name one") from error
    asked = {}
    for name, parameter in signature.parameters.items():
        ours = next((ours for ours, form in NAMES.items() if re.fullmatch(form, name)), name)
        is_set = parameter.default is not parameter.empty or parameter.kind == 4  # **others
        if not (is_set and (ours in ("gamma", "lam") or ours not in NAMES)):
            asked[name] = ours if parameter.kind in (1, 3) else None  # f(x, /), *x
    wanted = set(asked.values())
    if not any(wanted & {"logp", "rewards"} and wanted <= {*kind, *SETTINGS} for kind in KINDS):
        raise InputError(
            "judge: expected parameters like logp, old_logp, ref_logp, advantages, mask, or like "
            f"rewards, values, mask; got {shorten(str(signature))}: wrap it in such a function"
        )

    def call(arrays: dict[str, Any]) -> Any:
        if len(arrays["mask"]) > 1 and "mask" not in asked.values():
            arrays = {**arrays, "rewards": arrays["rewards"].sum(-1)}
        given = SETTINGS | arrays
        return f(**{theirs: given[ours] for theirs, ours in asked.items()})

    return call, wanted


def _used_by(f: Callable[..., Any]) -> str:
    """The framework that a function's code names; or else its module, if that is one."""
    f = inspect.unwrap(getattr(f, "func", f))  # of a partial
    f = f if inspect.isroutine(f) else type(f).__call__
    if not hasattr(f, "__code__"):
        return "numpy"
    named = inspect.getclosurevars(f)
    for values in ({**named.globals, **named.nonlocals}, f.__globals__):
        modules = filter(inspect.ismodule, values.values())
        roots = {module.__name__.partition(".")[0] for module in modules}
        if {"torch", "jax"} <= roots:
            raise InputError("judge: expected torch or jax; it uses both: say --framework")
        if found := [name for name in ("torch", "jax", "numpy") if name in roots]:
            return found[0]
    return "numpy"


def _real(out: Any, *shapes: tuple[int, ...]) -> Any:
    """What counts of (loss, metrics), if it is of real numbers and one of these shapes."""
    out = out[0] if isinstance(out, tuple) and out else out
    kind, shape = getattr(out, "dtype", type(out).__name__), tuple(getattr(out, "shape", ()))
    if "float" not in str(kind) or shape not in shapes:
        raise InputError(
            f"judge: expected real numbers of shape {' or '.join(map(str, shapes))}; got {kind} of "
            f"shape {shape}: return a loss, or its terms for each token"
        )
    return out


def _answer(call: Callable, framework: str, *, is_constant: bool, seen: list[bool]) -> Answer:
    """Value and slopes at logp; or the sum, and numbers. `seen` gets if padding has a slope."""
    try:
        module = importlib.import_module("numpy" if framework == "own" else framework)
    except ImportError as error:
        raise InputError(f"judge: {error}: install it, or choose another --framework") from error
    make = {"torch": "tensor", "jax": "numpy.asarray"}.get(framework, "array")
    to, total = operator.attrgetter(make)(module), functools.partial(_total, call)
    by = {"numpy": _by_differences, "own": _by_itself, "torch": _by_torch}.get(framework)
    by = functools.partial(by, total) if by else module.jit(module.value_and_grad(total))
    by = functools.partial(_constant, call) if is_constant else by

    def ask(arrays: Arrays) -> tuple[float, np.ndarray]:
        with module.enable_x64(True) if framework == "jax" else contextlib.nullcontext():
            made = {name: to(array) for name, array in arrays.items()}
            try:
                value, slope = by(made.get("logp"), made)
            except InputError:
                raise
            except (Exception, SystemExit) as error:  # of the user's code, its backward too
                raise InputError(
                    f"judge: expected it to take arrays {arrays['mask'].shape}; it raised "
                    f"{type(error).__name__}: {shorten(str(error), 200)}: correct it, or say with "
                    "--framework whose arrays it takes"
                ) from error
            value, slope = float(value), np.asarray(slope, dtype=np.float64)
        if not (np.abs([value, *slope.flat]) < 1e100).all():  # beyond, squares overflow
            raise InputError(f"judge: expected finite numbers; got {slope}: guard its divisions")
        return value, slope

    def answer(arrays: Arrays) -> tuple[float, np.ndarray]:
        value, slope = ask(arrays)
        padding = arrays["mask"] == 0
        seen.append(bool(slope[padding].any()))
        if is_constant and padding.any():  # numbers without a slope: with other junk there, too
            junk = {name: np.where(padding, array - 1.7, array) for name, array in arrays.items()}
            _, again = ask({**junk, "mask": arrays["mask"]})
            seen.append(not np.allclose(again, slope, rtol=1e-6))
        return value, slope

    return answer


def _constant(call: Callable, _, arrays: dict[str, Any]) -> tuple[Any, Any]:
    """Numbers of tokens, or of the responses of a group: terms of the reward, or advantages."""
    shape, real = tuple(arrays["mask"].shape), np.asarray(arrays["mask"]) > 0
    out = _real(call(arrays), shape, shape[:1] if shape[0] > 1 else shape[1:])
    out = np.asarray(out.detach() if hasattr(out, "detach") else out)
    of_tokens = np.where(real, out.reshape(shape[0], -1), 0.0)
    return of_tokens.sum(), of_tokens


def _total(call: Callable, logp: Any, arrays: dict[str, Any]) -> Any:
    """A loss; terms of tokens are summed over the mask."""
    mask = arrays["mask"]
    shapes = (), (1,), (1, 1), tuple(mask.shape), tuple(mask.shape[1:])
    terms = _real(call({**arrays, "logp": logp}), *shapes)
    if mask.shape[1] not in getattr(terms, "shape", ()):
        return terms.sum() if hasattr(terms, "sum") else terms
    return (mask.reshape(terms.shape) * terms).sum()


def _by_differences(total: Callable, logp: np.ndarray, arrays: Arrays) -> tuple[float, np.ndarray]:
    slope = np.zeros_like(logp)
    for t in range(logp.size):
        step = STEP * (np.arange(logp.size) == t)
        ends = [total(logp + k * step, tree_map(np.copy, arrays)) for k in (1, -1, 2, -2)]
        near, far = (ends[0] - ends[1]) / (2 * STEP), (ends[2] - ends[3]) / (4 * STEP)
        if abs(near - far) > 1e-6 + 1e-4 * abs(near):
            raise InputError(
                f"judge: expected a smooth function in float64; over steps of {STEP} its slope is "
                f"{near:.6g}, over twice that {far:.6g}: is it float32, or rounded?"
            )
        slope[0, t] = near
    return total(logp, arrays), slope


def _by_itself(total: Callable, logp: np.ndarray, arrays: Arrays) -> tuple[float, np.ndarray]:
    out = total.args[0](tree_map(np.copy, arrays))  # it may write into what it gets
    is_pair = isinstance(out, tuple) and len(out) == 2
    return total(logp, arrays), _real(out[1] if is_pair else out, logp.shape)


def _by_torch(total: Callable, logp: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
    value = total(logp.requires_grad_(), arrays) + 0 * logp.sum()  # the slope of a constant is 0
    value.backward()
    return value.detach(), logp.grad


# -- the command ---------------------------------------------------------------------------------
def judge_command(
    function: str,
    *,
    placement: Placement = "loss",
    framework: Framework = "auto",
    expect: str = "",
    size: tuple[int, int] = (4, 4),
    seed: int = 0,
    json_: bool = False,
) -> int:
    """What a KL term, a loss or advantages of your own descend, by enumeration.

    Args:
        function: file.py:function, module:function, the name of a library's, or libraries: all.
        placement: loss: it is differentiated; reward: a constant, taken off each token's reward.
        framework: Who differentiates; auto: what it uses; own: it returns (number, gradient).
        expect: What it should descend, like kl or "0.04 x kl"; exit status 1 if it does not.
        size: Tokens of the world's vocabulary, and of its longest response.
        seed: Of the world's transformers.
        json_: Print the numbers as JSON.
    """
    about = {"size": size, "seed": seed}
    named = function == "libraries" or function in LIBRARIES
    if named and (placement, framework) != ("loss", "auto") or expect and function == "libraries":
        raise InputError(
            "judge: expected --placement and --framework beside a function of your own alone, and "
            f"--expect not beside libraries; got {function}: leave them out"
        )
    if function == "libraries":
        names = LIBRARIES if json_ else track(LIBRARIES, "judging")
        return _show_libraries({name: judge(name, **about) for name in names}, json_)
    report = judge(function, placement=placement, framework=framework, **about)
    holds, said = not expect or report.holds(expect), sentences(report)
    rows = [{**v._asdict(), **row, "of": PARTS[v.part]} for v in report.verdicts for row in v.rows]
    if json_:
        found = {"function": function, "holds": holds, "said": said, **report._asdict()}
        print(json.dumps({**found, "verdicts": [v._asdict() for v in report.verdicts]}))
        return 0 if holds else 1
    columns = {"": "{of}", "given": "{given}", "KL": "{kl_seq:.2f}", "value": "{value:+.3f}"}
    table = rows_table(shorten(function), columns | NUMBERS, rows, texts=(0, 1))
    table.caption = "error |mean - g| / |g|, noise of one sample / |g|, of three policies. g: what "
    table.caption += "it should descend, the slope of KL(pi || ref), or of the expected reward."
    said += [f"{'as' if holds else 'NOT as'} expected: {expect}"] * bool(expect)
    style = GOOD if holds and (expect or report.right) else BAD
    show(table, *(Text(sentence, style) for sentence in said))
    return 0 if holds else 1


NUMBERS = {"error": "{error:.2g}", "cosine": "{cosine:+.3f}", "noise": "{noise:.2f}"}


def _show_libraries(reports: dict[str, Report], as_json: bool) -> int:
    """A row for each of LIBRARIES, at the largest distance from the reference."""
    rows = []
    for name, report in reports.items():
        on, off = report.verdicts[:2]
        row = {"name": name, **LIBRARIES[name]._asdict(), "value_is": on.value_is, **on.rows[-1]}
        said = [v.claim + f", near {v.nearest}" * (v.claim == exact.NONE) for v in (on, off)]
        rows.append({**row, "descends": said[0], "off": said[1], "off_rows": off.rows[-1]})
    if as_json:
        print(json.dumps(rows))
        return 0
    title = f"what the libraries descend, KL(pi || ref) = {rows[0]['kl_seq']:.2f}"
    columns = {"": "{name}", "descends": "{descends}", **NUMBERS}  # formulas: --json, exact/README
    table = rows_table(title, columns, rows, texts=(1,))
    table.columns[0].justify = "left"
    show(table)
    return 0
