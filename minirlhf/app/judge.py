"""`minirlhf judge`: a KL term of your own, or of a library, against the exact answer.

    judge(lambda logp, ref_logp, mask: (mask * 0.5 * (logp - ref_logp) ** 2).sum()).descends
                                                     "token_kl": a part of the penalty's gradient
    assert_descends(my_loss, "kl")                   for a test, in one line

A term is a function of one sampled response, arrays (1, T): it takes those of NAMES that it asks
for by name, and returns a number, or a number for each token, which are then summed over the mask.
In NumPy it is differentiated by complex step, or by central differences where it does not take
complex numbers; in PyTorch and JAX as they differentiate it, so that a detach or a stop_gradient
counts.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from minirlhf.app.tables import BAD, GOOD, number_table
from minirlhf.errors import InputError
from minirlhf.exact.judge import MEANS, NONE, NOTHING, SAMPLERS, Slopes, Verdict, judge_slopes
from minirlhf.worlds import rewards

Framework = Literal["auto", "numpy", "torch", "jax"]
Form = Literal["loss", "reward"]
NAMES = {  # what a term may ask for -> how libraries call it
    "logp": "logp logps logprobs log_probs log_prob new_logps new_logprobs per_token_logps "
    "policy_logps pi_logps lp",
    "ref_logp": "ref_logp ref_logps ref_logprobs ref_log_probs ref_log_prob ref_per_token_logps "
    "reference_logps reference_logprobs log_probs_base ref_lp",
    "old_logp": "old_logp old_logps old_logprobs old_log_probs old_log_prob old_per_token_logps",
    "mask": "mask response_mask completion_mask action_mask loss_mask masks",
    "advantages": "advantages advantage adv",
    "log_ratio": "log_ratio logratio log_ratios kl lr",
}
STEP = 1e-5  # of central differences: extrapolated, their error is STEP^4 and rounding


class Report(NamedTuple):
    """What the term does, on-policy and on the samples of an old policy."""

    on_policy: Verdict
    off_policy: Verdict
    reads_padding: bool  # what stands where the mask is 0 changes it

    @property
    def descends(self) -> str:
        """On-policy: a name of MEANS, "nothing" or "none of these"."""
        return self.on_policy.descends

    @property
    def right(self) -> bool:
        """On-policy it is the gradient of the penalty, and nothing else."""
        return self.on_policy.right and not self.reads_padding


def judge(
    f: Callable[..., Any] | str,
    *,
    form: Form = "loss",
    framework: Framework = "auto",
    names: dict[str, str] | None = None,
    seed: int = 0,
) -> Report:
    """What the expected gradient of a KL term is the gradient of.

    Args:     f: the term; or its name, file.py:function or module:function.
              form: "loss": it is differentiated. "reward": it is a number for each token that is
                  taken off the reward, a constant, as in PPO; logp is then that of who sampled.
              framework: who differentiates; "auto": the one that the function's module imports.
              names: {a parameter of f: one of NAMES} where its own name does not say it.
              seed: of the world's transformers.
    Raises:   InputError: it cannot be called, or returns no numbers of the right shape.
    """
    f = rewards.load_function(f, "judge") if isinstance(f, str) else f
    slopes = slopes_of(f, form=form, framework=framework, names=names)
    reads_padding = False

    def watched(arrays: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
        nonlocal reads_padding
        found, real = slopes(arrays), arrays["mask"][0] > 0
        if not (reads_padding or real.all()):
            moved = {k: np.where(real, a, 2 + i) for i, (k, a) in enumerate(arrays.items())}
            again = slopes({**moved, "mask": arrays["mask"]})
            pairs = [(found[1][real], again[1][real])] + [found[:1] + again[:1]] * (form == "loss")
            reads_padding = not all(np.allclose(*pair, rtol=1e-5, atol=1e-7) for pair in pairs)
        return found

    verdicts = judge_slopes(watched, form=form, seed=seed)
    return Report(*verdicts, reads_padding)


def assert_descends(
    f: Callable[..., Any] | str, what: str, *, factor: float = 1.0, **about
) -> None:
    """Raise AssertionError unless f descends factor times this one of MEANS, or "nothing".

    Args:     about: of `judge`.
    """
    if what not in (*MEANS, NOTHING):
        raise InputError(f"judge: expected one of {', '.join(MEANS)} or nothing; got {what!r}")
    report = judge(f, **about)
    found = report.on_policy
    scaled = what == NOTHING or abs(found.factor - factor) <= 1e-6 * abs(factor)
    if found.descends != what or not scaled or report.reads_padding:
        raise AssertionError(f"expected {factor:g} x {what}; {sentence(report)}")


def sentence(report: Report) -> str:
    """The verdict in words."""
    verdict = report.on_policy
    if verdict.descends == NONE:
        said = f"it descends {NONE} (nearest: {verdict.nearest})"
    elif verdict.descends == NOTHING:
        said = "its expected gradient is 0: it descends nothing and adds noise"
    else:
        way = "descends" if verdict.factor > 0 else "ascends"
        size = abs(verdict.factor)
        times = "" if abs(size - 1) < 1e-6 else f"{size:.4g} x "
        said = f"it {way} {times}{MEANS[verdict.descends]}"
    return said + ("; and it reads what stands at padding" if report.reads_padding else "")


# -- a function as slopes ------------------------------------------------------------------------
def slopes_of(
    f: Callable[..., Any], *, form: str = "loss", framework: str = "auto", names=None
) -> Slopes:
    """Value and slopes of a term at one response, as `exact.judge.judge_slopes` wants them."""
    call = _by_name(f, names or {})
    framework = _imported_by(f) if framework == "auto" else framework
    if form == "reward":
        return _terms(call, framework)
    return {"numpy": _numpy, "torch": _torch, "jax": _jax}[framework](call)


def _by_name(f: Callable[..., Any], names: dict[str, str]) -> Callable[..., Any]:
    """f as a function of the arrays by our names."""
    meanings = {theirs: ours for ours, known in NAMES.items() for theirs in known.split()}
    asked = {}
    for parameter in inspect.signature(f).parameters.values():
        ours = names.get(parameter.name) or meanings.get(parameter.name)
        if ours in NAMES:
            asked[parameter.name] = ours
        elif parameter.default is parameter.empty and parameter.kind not in (2, 4):  # *a, **k
            raise InputError(
                f"judge: expected parameters that say what they are, like {', '.join(NAMES)}; got "
                f"{parameter.name!r}: name it, as in names={{{parameter.name!r}: 'logp'}}"
            )

    def call(arrays: dict[str, Any]) -> Any:
        arrays = {**arrays, "log_ratio": arrays["logp"] - arrays["ref_logp"]}
        arrays["advantages"] = 0 * arrays["old_logp"]
        return f(**{theirs: arrays[ours] for theirs, ours in asked.items()})

    return call


def _imported_by(f: Callable[..., Any]) -> str:
    """Which of torch and jax the module of a function has imported; numpy if neither."""
    values = getattr(inspect.unwrap(f), "__globals__", {}).values()
    roots = {
        getattr(value, "__name__", "").partition(".")[0]
        for value in values
        if inspect.ismodule(value)
    }
    found = [name for name in ("torch", "jax") if name in roots]
    if len(found) > 1:
        raise InputError("judge: expected torch or jax; its module imports both: say framework=")
    return found[0] if found else "numpy"


def _total(out: Any, mask: Any) -> Any:
    """A number: terms of tokens are summed over the mask."""
    shape = tuple(getattr(out, "shape", ()))
    if shape in ((), (1,)):
        return out if shape == () else out[0]
    if shape not in (tuple(mask.shape), tuple(mask.shape)[1:]):
        raise InputError(
            f"judge: expected a number, or one for each token, {tuple(mask.shape)}; got {shape}"
        )
    return (mask.reshape(shape) * out).sum()


def _numpy(call: Callable) -> Slopes:
    def value(logp: np.ndarray, arrays: dict) -> Any:
        return _total(np.asarray(call({**arrays, "logp": logp})), arrays["mask"])

    def central(arrays: dict, t: int) -> float:
        def difference(h: float) -> float:
            step = np.zeros_like(arrays["logp"])
            step[0, t] = h
            up, down = (value(arrays["logp"] + s * step, arrays) for s in (1, -1))
            return float(np.real(up - down)) / (2 * h)

        return (4 * difference(STEP) - difference(2 * STEP)) / 3

    def complex_step(arrays: dict, t: int) -> float:
        logp = arrays["logp"].astype(np.complex128)
        logp[0, t] += 1e-30j
        return float(np.imag(value(logp, arrays))) * 1e30

    def slopes(arrays: dict) -> tuple[float, np.ndarray]:
        T = arrays["logp"].shape[1]
        numbers = np.array([central(arrays, t) for t in range(T)])
        try:
            exact = np.array([complex_step(arrays, t) for t in range(T)])
        except TypeError:  # it compares, or takes no complex numbers
            exact = numbers
        same = np.allclose(exact, numbers, rtol=1e-4, atol=1e-6)  # abs() and .real are not analytic
        return float(np.real(value(arrays["logp"], arrays))), exact if same else numbers

    return slopes


def _torch(call: Callable) -> Slopes:
    torch = importlib.import_module("torch")

    def slopes(arrays: dict) -> tuple[float, np.ndarray]:
        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        logp = tensors["logp"].requires_grad_()
        total = _total(call(tensors), tensors["mask"])
        if not getattr(total, "requires_grad", False):
            return float(total), np.zeros(logp.shape[1])
        (slope,) = torch.autograd.grad(total, logp)
        return float(total.detach()), slope.numpy()[0]

    return slopes


def _jax(call: Callable) -> Slopes:
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)

    def loss(logp: Any, others: dict) -> Any:
        return _total(call({**others, "logp": logp}), others["mask"])

    both = jax.jit(jax.value_and_grad(loss))

    def slopes(arrays: dict) -> tuple[float, np.ndarray]:
        others = {name: array for name, array in arrays.items() if name != "logp"}
        value, slope = both(arrays["logp"], others)
        return float(value), np.asarray(slope)[0]

    return slopes


def _terms(call: Callable, framework: str) -> Slopes:
    """The number of each token, in the place of slopes."""

    def terms(arrays: dict) -> tuple[float, np.ndarray]:
        made = {n: sys.modules["torch"].tensor(a) for n, a in arrays.items()}
        out = np.asarray(call(made if framework == "torch" else arrays), dtype=np.float64)
        if out.size != arrays["mask"].size:
            raise InputError(
                f"judge: expected a number for each token in the reward, {arrays['mask'].shape}; "
                f"got {out.shape}: return it before it is summed"
            )
        out = out.reshape(-1)
        return float((out * arrays["mask"][0]).sum()), out

    return terms


# -- the command ---------------------------------------------------------------------------------
def judge_command(
    function: str,
    *,
    form: Form = "loss",
    framework: Framework = "auto",
    claim: str = "",
    seed: int = 0,
    json_: bool = False,
) -> int:
    """What the expected gradient of a KL term descends, by enumeration.

    Args:
        function: file.py:function or module:function, of logp, ref_logp, old_logp, mask.
        form: loss: it is differentiated; reward: it is a constant taken off each token's reward.
        framework: Who differentiates; auto: what the function's module imports.
        claim: What it should descend, like kl; exit status 1 if it does not.
        seed: Of the world's transformers.
        json_: Print the numbers as JSON.
    Returns:
        exit status: 0, or 1 if the claim fails.
    """
    if claim and claim not in (*MEANS, NOTHING):
        raise InputError(f"--claim: expected one of {', '.join(MEANS)}; got {claim!r}")
    report = judge(function, form=form, framework=framework, seed=seed)
    holds = not claim or (report.descends == claim and abs(report.on_policy.factor - 1) < 1e-6)
    holds = holds and not report.reads_padding if claim else True
    if json_:
        kept = {"function": function, "form": form, "sentence": sentence(report), "holds": holds}
        kept |= {"reads_padding": report.reads_padding}
        kept |= {s: v._asdict() for s, v in zip(SAMPLERS, report[:2], strict=True)}
        print(json.dumps(kept, indent=1))
        return 0 if holds else 1
    show(report, function)
    return 0 if holds else 1


def show(report: Report, title: str) -> None:
    """The report as a table and a sentence."""
    console = Console()
    table = number_table(title, "samples of", "KL", "value", "error", "cosine", "noise", texts=(0,))
    for verdict, who in zip(report[:2], ("the policy", "an old policy"), strict=True):
        for row in verdict.rows:
            cells = (f"{row['kl_seq']:.2f}", f"{row['value']:+.3f}", f"{row['error']:.1e}")
            table.add_row(who, *cells, f"{row['cosine']:+.3f}", f"{row['noise']:.2f}")
    table.caption = "error: |mean - g| / |g|, g = grad KL(pi || ref); noise of one sample / |g|"
    console.print(table)
    off = report.off_policy
    console.print(Text(f"on-policy {sentence(report)}", GOOD if report.right else BAD))
    console.print(f"on the samples of an old policy: {MEANS.get(off.descends, off.descends)}")
