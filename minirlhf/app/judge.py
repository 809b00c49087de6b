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
import importlib
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

from minirlhf.app.tables import BAD, GOOD, rows_table
from minirlhf.disk import shorten
from minirlhf.errors import InputError
from minirlhf.exact import judge as exact
from minirlhf.exact.judge import Answer, Arrays, Verdict
from minirlhf.exact.libraries import LIBRARIES
from minirlhf.worlds import rewards

Framework = Literal["auto", "numpy", "own", "torch", "jax"]
Placement = Literal["loss", "reward"]
NAMES = {  # what a function may ask for -> how libraries call it
    "logp": "logps logprob logprobs log_prob log_probs new_logp new_logps new_logprobs pi_logps lp "
    "per_token_logps policy_logps curr_logprobs action_log_probs",
    "ref_logp": "ref_logps ref_logprob ref_logprobs ref_log_prob ref_log_probs reference_logps "
    "reference_logprobs ref_per_token_logps logprobs_reference log_probs_ref log_probs_base "
    "base_action_log_probs reference_policy_logprobs",
    "old_logp": "old_logps old_logprob old_logprobs old_log_prob old_log_probs log_probs_old "
    "old_per_token_logps old_action_log_probs prev_logprobs rollout_log_probs generation_logprobs",
    "mask": "response_mask completion_mask action_mask loss_mask token_mask masks",
    "advantages": "advantage adv",
    "rewards": "reward scores token_level_rewards",
    "values": "value old_values",
    "gamma": "discount",
    "lam": "lambd lambda_ gae_lambda",
    "group": "index group_ids uid",
    "group_size": "num_generations",
}
GROUP = 3  # responses
SETTINGS = {"gamma": 1.0, "lam": 0.95, "group_size": GROUP, "group": np.zeros(GROUP, dtype=int)}
KINDS = [{"logp", "old_logp", "ref_logp", "advantages", "mask"}, {"rewards", "values", "mask"}]
PARTS = {"kl": "the penalty", "reward": "the advantages"}
CLAIMS = [*exact.KL_MEANS, *exact.REWARD_MEANS]
STEP = 1e-5  # of central differences: extrapolated, their error is STEP^4 and rounding


class Report(NamedTuple):
    """What a function does: first of all on the policy's own samples, or with exact values."""

    verdicts: list[Verdict]
    reads_padding: bool  # what stands where the mask is 0 changes it

    @property
    def descends(self) -> str:
        """A name of KL_MEANS or REWARD_MEANS of exact/judge.py, "nothing" or "none of these"."""
        return self.verdicts[0].descends

    @property
    def right(self) -> bool:
        """It is the gradient of the penalty, or of the reward, and nothing else."""
        return self.verdicts[0].claim == self.verdicts[0].part and not self.reads_padding

    def holds(self, claim: str) -> bool:
        """Does it descend this, as it is printed: "kl", "0.04 x kl", "nothing"?"""
        name = claim.rpartition(" x ")[2].removeprefix(exact.MEAN)
        if name not in (*CLAIMS, exact.NOTHING):
            raise InputError(
                f"judge: expected a claim like kl, mean_kl or '0.04 x kl', of one of "
                f"{', '.join(CLAIMS)}, {exact.NOTHING}; got {shorten(claim)!r}: name one"
            )
        first = {verdict.part: verdict.claim for verdict in reversed(self.verdicts)}
        return claim in first.values() and not self.reads_padding


def judge(
    f: Callable[..., Any] | str,
    *,
    placement: Placement = "loss",
    framework: Framework = "auto",
    names: dict[str, str] | None = None,
    size: tuple[int, int] = (4, 4),
    seed: int = 0,
) -> Report:
    """What the expected gradient of a function is the gradient of.

    Args:     f: the function; or file.py:function, module:function, or a name of LIBRARIES.
              placement: "loss": it is differentiated. "reward": it is a number for each token that
                  is taken off the reward, a constant, as in PPO; logp is then the sampler's.
              framework: who differentiates; "auto": the one that the function uses; "own": it
                  returns (number, gradient (1, T) at logp) itself.
              names: {a parameter of f: one of NAMES} where its own name does not say it.
              size: tokens of the world's vocabulary, and of its longest response.
              seed: of the world's transformers.
    Raises:   InputError: it cannot be called, or does not return finite numbers that fit.
    """
    if isinstance(f, str) and f in LIBRARIES:
        row = LIBRARIES[f]
        f, placement, framework = row.f, row.placement, row.framework
    elif isinstance(f, str) and ":" not in f:
        raise InputError(
            f"judge: expected file.py:function, module:function or one of {', '.join(LIBRARIES)}; "
            f"got {shorten(f)!r}: name one"
        )
    f = rewards.load_function(f, "judge") if isinstance(f, str) else f
    call, asked = _by_name(f, names or {})
    if min(size) < 2 or (size[0] - 1) ** size[1] > 2000:
        raise InputError(
            "judge: expected at least 2 tokens, and at most 2000 responses of the greatest length; "
            f"got --size {size[0]} {size[1]}: choose smaller ones, like 4 4"
        )
    adapt = _numbers if placement == "reward" or "rewards" in asked else _slopes
    seen: list[bool] = []
    answer = _watched(adapt(call, _used_by(f) if framework == "auto" else framework), seen)
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
    """Raise AssertionError unless f descends what is claimed: "kl", "0.04 x kl", "nothing".

    Args:     about: of `judge`.
    """
    report = judge(f, **about)
    if not report.holds(claim):
        raise AssertionError(f"expected {claim}; {'; '.join(sentences(report))}")


def sentences(report: Report) -> list[str]:
    """The verdicts in words."""
    said = []
    for v in report.verdicts:
        words = exact.meaning(v.descends if v.factor else f"nearest is {v.nearest}")
        said.append(f"{PARTS[v.part]}, {v.given}: descends {v.claim} ({words})")
        if v.value_is != exact.NONE:
            said.append(f"its value is on average {v.value_is}")
    return said + ["it reads what stands at padding"] * report.reads_padding


# -- a function as an answer ---------------------------------------------------------------------
def _by_name(f: Callable[..., Any], names: dict[str, str]) -> tuple[Callable, set[str]]:
    """f as a function of the arrays by our names, and which of them it asks for."""
    meanings = {theirs: ours for ours, known in NAMES.items() for theirs in (ours, *known.split())}
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"judge: expected a function; got {shorten(repr(f))}: name one") from error
    asked = {}
    for parameter in parameters:
        ours = names.get(parameter.name) or meanings.get(parameter.name)
        is_set = parameter.default is not parameter.empty or parameter.kind == 4  # **others
        if ours in NAMES and parameter.kind in (1, 3) and not (is_set and ours in ("gamma", "lam")):
            asked[parameter.name] = ours
        elif not is_set:
            raise InputError(
                f"judge: expected parameters called {', '.join(NAMES)} or alike; got "
                f"{str(parameter)!r}: say what it is, as in --names {parameter.name}=logp"
            )
    wanted = set(asked.values())
    if not any(wanted & {"logp", "rewards"} and wanted <= {*kind, *SETTINGS} for kind in KINDS):
        raise InputError(
            "judge: expected a function of logp, old_logp, ref_logp, advantages, mask, or one of "
            f"rewards, values, mask; got one of {', '.join(sorted(wanted)) or 'nothing'}: write a "
            "function around it"
        )

    def call(arrays: dict[str, Any]) -> Any:
        if len(arrays["mask"]) > 1 and "mask" not in asked.values():
            arrays = {**arrays, "rewards": arrays["rewards"].sum(-1)}
        given = SETTINGS | arrays
        try:
            return f(**{theirs: given[ours] for theirs, ours in asked.items()})
        except Exception as error:  # the user's code may raise anything
            raise InputError(
                f"judge: expected it to take arrays {tuple(arrays['mask'].shape)}; it raised "
                f"{type(error).__name__}: {shorten(str(error), 200)}: correct it, or say with "
                "--framework whose arrays it takes"
            ) from error

    return call, wanted


def _used_by(f: Callable[..., Any]) -> str:
    """The framework that a function's code names; or else its module, if that is one."""
    while hasattr(f, "func") or hasattr(f, "__wrapped__"):  # partial, decorated
        f = getattr(f, "func", None) or f.__wrapped__
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


def _watched(answer: Answer, seen: list[bool]) -> Answer:
    """The same answer, finite; `seen` gets whether what stands at padding changes it."""

    def watched(arrays: Arrays) -> tuple[float, np.ndarray]:
        def counted(arrays: Arrays) -> np.ndarray:
            value, of_tokens = answer(arrays)
            return np.append(value, of_tokens[real])

        real = arrays["mask"] > 0
        found = counted(arrays)
        if not np.isfinite(found).all():
            raise InputError(f"judge: expected finite numbers; got {found}: guard its divisions")
        if not (any(seen) or real.all()):
            moved = arrays.keys() & {"logp", "old_logp", "ref_logp", "values"}
            other = {name: np.where(real, arrays[name], 2.0 + len(name)) for name in moved}
            same = np.allclose(found, counted(arrays | other), rtol=1e-5, atol=1e-7)
            seen.append(not same)
        of_tokens = np.zeros(real.shape)
        of_tokens[real] = found[1:]
        return float(found[0]), of_tokens

    return watched


def _real(out: Any, *shapes: tuple[int, ...]) -> Any:
    """What counts of (loss, metrics), if it is of real numbers and one of these shapes."""
    out = out[0] if isinstance(out, (tuple, list)) and out else out
    kind, shape = getattr(out, "dtype", type(out).__name__), tuple(getattr(out, "shape", ()))
    if "float" not in str(kind) or shape not in shapes:
        raise InputError(
            f"judge: expected real numbers of shape {' or '.join(map(str, shapes))}; got {kind} of "
            f"shape {shape}: return a loss, or its terms for each token"
        )
    return out


def _framework(name: str) -> tuple[Any, Callable, Callable]:
    """The module, what makes its arrays, and a context in which they are float64."""
    try:
        module = importlib.import_module("numpy" if name == "own" else name)
    except ImportError as error:
        raise InputError(
            f"judge: expected {name}; {error}: install it, or another --framework"
        ) from error
    if name == "jax":
        return module, module.numpy.asarray, lambda: module.enable_x64(True)
    return module, module.tensor if name == "torch" else np.asarray, contextlib.nullcontext


def _numbers(call: Callable, framework: str) -> Answer:
    """Its numbers for tokens, or for the responses of a group, as constants."""
    _, to, context = _framework(framework)

    def numbers(arrays: Arrays) -> tuple[float, np.ndarray]:
        shape = arrays["mask"].shape
        with context():
            out = call({name: to(array) for name, array in arrays.items()})
            out = _real(out, shape, shape[:1] if shape[0] > 1 else shape[1:])
            out = out.detach().numpy() if framework == "torch" else np.asarray(out)
        of_tokens = out.reshape(shape[0], -1) + np.zeros(shape)
        return float((of_tokens * arrays["mask"]).sum()), of_tokens

    return numbers


def _slopes(call: Callable, framework: str) -> Answer:
    """The value of a loss, and its slopes at logp."""
    module, to, context = _framework(framework)

    def total(logp: Any, arrays: dict[str, Any]) -> Any:
        mask = arrays["mask"]
        shapes = (), (1,), (1, 1), tuple(mask.shape), tuple(mask.shape[1:])
        terms = _real(call({**arrays, "logp": logp}), *shapes)
        if mask.shape[1] not in getattr(terms, "shape", ()):
            return terms.sum() if hasattr(terms, "sum") else terms
        return (mask.reshape(terms.shape) * terms).sum()

    def by_differences(logp: np.ndarray, arrays: Arrays) -> tuple[float, np.ndarray]:
        slope = np.zeros_like(logp)
        for t in np.flatnonzero(arrays["mask"]):
            step = STEP * (np.arange(logp.size) == t)
            ends = [total(logp + k * step, arrays) for k in (1, -1, 2, -2)]
            near, far = (ends[0] - ends[1]) / (2 * STEP), (ends[2] - ends[3]) / (4 * STEP)
            if abs(near - far) > 1e-6 + 1e-4 * abs(near):
                raise InputError(
                    f"judge: expected a smooth function in float64; over steps of {STEP} its slope "
                    f"is {near:.6g}, over twice that {far:.6g}: is it float32, or rounded?"
                )
            slope[0, t] = (4 * near - far) / 3
        return total(logp, arrays), slope

    def by_itself(logp: np.ndarray, arrays: Arrays) -> tuple[float, np.ndarray]:
        out = call(arrays)
        is_pair = isinstance(out, tuple) and len(out) == 2
        return total(logp, arrays), _real(out[1] if is_pair else out, logp.shape)

    def by_torch(logp: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
        value = total(logp.requires_grad_(), arrays)
        if not getattr(value, "requires_grad", False):
            return value, 0 * logp.detach()
        return value.detach(), module.autograd.grad(value, logp, materialize_grads=True)[0]

    by = {"numpy": by_differences, "own": by_itself, "torch": by_torch}.get(framework)
    by = by or module.jit(module.value_and_grad(total))

    def slopes(arrays: Arrays) -> tuple[float, np.ndarray]:
        with context():
            value, slope = by(to(arrays["logp"]), {name: to(a) for name, a in arrays.items()})
            return float(value), np.asarray(slope, dtype=np.float64)

    return slopes


# -- the command ---------------------------------------------------------------------------------
def judge_command(
    function: tyro.conf.Positional[str],
    *,
    placement: Placement = "loss",
    framework: Framework = "auto",
    names: tuple[str, ...] = (),
    expect: str = "",
    size: tuple[int, int] = (4, 4),
    seed: int = 0,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """What the expected gradient of a KL term, a loss or advantages descends, by enumeration.

    Args:
        function: file.py:function, module:function, the name of a library's, or libraries: all.
        placement: loss: it is differentiated; reward: it is a constant taken off each token's.
        framework: Who differentiates; auto: what it uses; own: it returns (number, gradient).
        names: What its parameters are where their names do not say it, like x=logp y=ref_logp.
        expect: What it should descend, like kl or "0.04 x kl"; exit status 1 if it does not.
        size: Tokens of the world's vocabulary, and of its longest response.
        seed: Of the world's transformers.
        json_: Print the numbers as JSON.
    Returns:
        exit status: 0, or 1 if the claim fails.
    """
    about = {"size": size, "seed": seed}
    if function == "libraries":
        return _show_libraries({name: judge(name, **about) for name in LIBRARIES}, json_)
    named = dict(word.partition("=")[::2] for word in names)
    report = judge(function, placement=placement, framework=framework, names=named, **about)
    holds, said = not expect or report.holds(expect), sentences(report)
    rows = [{**v._asdict(), **row, "of": PARTS[v.part]} for v in report.verdicts for row in v.rows]
    if json_:
        found = {"function": function, "holds": holds, "said": said, **report._asdict()}
        print(json.dumps({**found, "verdicts": [v._asdict() for v in report.verdicts]}))
        return 0 if holds else 1
    columns = {"": "{of}", "given": "{given}", "KL": "{kl_seq:.2f}", "value": "{value:+.3f}"}
    table = rows_table(shorten(function), columns | NUMBERS, rows, texts=(0, 1))
    table.caption = "error |mean - g| / |g|, noise of one sample / |g|, where g would be right"
    said += [f"not as expected: {expect}"] * (not holds)
    style = GOOD if holds and (expect or report.right) else BAD
    Console().print(table, *(Text(sentence, style) for sentence in said), sep="\n")
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
    columns = {"": "{name}", "term": "{term}", "descends": "{descends}", **NUMBERS}
    Console().print(rows_table(title, columns, rows, texts=(0, 1, 2)))
    return 0
