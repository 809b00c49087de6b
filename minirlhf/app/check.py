"""`minirlhf check`: every backward of the package against the derivative of its forward.

TABLE of app/cases.py has the pairs. WHOLE_LOSSES, here, are the losses of training, differentiated
through all parameters of a model at once.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from minirlhf import gradcheck
from minirlhf.app import cases
from minirlhf.app.cases import TABLE, Draw, Row
from minirlhf.app.progress import track
from minirlhf.app.tables import BAD, GOOD, number_table
from minirlhf.errors import InputError
from minirlhf.gradcheck import GradientError, Report
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf import objectives, preferences
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.train import policy, ppo
from minirlhf.train.batches import Batch
from minirlhf.train.sft import sft_loss_and_gradients
from minirlhf.tree import Tree, tree_items, tree_size

# -- whole losses --------------------------------------------------------------------------------


class WholeLoss(NamedTuple):
    """A loss of training: `make` gives params -> loss, the parameters, and their gradients."""

    name: str
    make: Callable[[Draw], tuple[Callable[[Tree], Any], Tree, Tree]]


def two_blocks(draw: Draw, B: int) -> tuple[GPTConfig, Batch]:
    """Sizes of a model, and B prompts with their responses."""
    config = GPTConfig(vocab_size=11, n_ctx=8, n_layer=2, n_head=draw.pick((1, 2, 4)), d_model=8)
    return config, cases.drawn_batch(draw, config, B, 3, 4)


def whole_sft(draw: Draw):
    config, batch = two_blocks(draw, 3)
    params = cases.drawn_model(draw, config)

    def loss(params):
        out, _ = policy.policy_forward(params, batch=batch, config=config)
        weights = objectives.token_weights(batch.response_mask)
        return objectives.cross_entropy_forward(out.logp, weights=weights)[0]

    return loss, params, sft_loss_and_gradients(params, batch, config)[1]


def whole_bradley_terry(draw: Draw):
    config, batch = two_blocks(draw, 6)  # three chosen, then three rejected
    params = cases.drawn_model(draw, config, "reward_head")

    def forward(params):
        score, cache = policy.reward_forward(params, batch=batch, config=config)
        loss, loss_cache = preferences.bradley_terry_forward(score[:3], score[3:], margin=0.2)
        return loss, cache, loss_cache

    _, cache, loss_cache = forward(params)
    dscore = np.concatenate(preferences.bradley_terry_backward(1.0, loss_cache))
    return lambda params: forward(params)[0], params, policy.reward_backward(dscore, cache)


def whole_ppo(kl_mode: str, draw: Draw):
    """Clip, clipped value, entropy, penalty; the gradient as the training step computes it."""
    config, batch = two_blocks(draw, 4)
    settings = cases.full_settings(kl_mode, micro_batch_size=draw.pick((0, 1, 3)))
    (params,), constants = cases.drawn_ppo_case(draw, config, batch, settings)
    experience = constants["experience"]
    gradients, *_ = ppo.minibatch_gradients(params, experience, config=config, settings=settings)
    return lambda params: cases.ppo_loss_held(params, **constants)[0], params, gradients


WHOLE_LOSSES = [
    WholeLoss("supervised fine-tuning", whole_sft),
    WholeLoss("Bradley-Terry", whole_bradley_terry),
    *[WholeLoss(f"PPO: {mode}", functools.partial(whole_ppo, mode)) for mode in KL_MODES],
]


# -- running and printing ------------------------------------------------------------------------


class Result(NamedTuple):
    """One line of the printed table: the worst of several cases."""

    file: str
    name: str
    arguments: str
    entries: int  # differentiated, over all cases
    errors: list[float]  # worst relative error of each method; nan: the method was not run
    message: str  # of the first case that failed; empty: all are right


def check_row(row: Row, *, n_cases: int, seed: Sequence[int]) -> Result:
    """`check_pair` on random cases."""
    reports, entries, names = [], 0, []
    for case in range(n_cases):
        arrays, constants = row.make(Draw(np.random.default_rng([*seed, case])))
        entries += tree_size(arrays)
        names = gradcheck.argument_names(row.forward, len(arrays))
        pair = (row.forward, row.backward, *arrays)
        reports.append(_report(gradcheck.check_pair, *pair, name=row.name, **constants))
    errors = _worst(reports, "complex step", "central difference", "dot product")
    return Result(row.file, row.name, ", ".join(names), entries, *errors)


def check_whole_loss(whole: WholeLoss, *, seed: Sequence[int]) -> Result:
    """`check_directions` through all parameters together, and through each tensor alone."""
    rng = np.random.default_rng(seed)
    loss, params, gradients = whole.make(Draw(rng))
    report = _report(gradcheck.check_directions, loss, params, gradients, rng=rng, name=whole.name)
    tensors = f"{len(list(tree_items(params)))} tensors"
    group = "whole losses, two blocks, by directions"
    return Result(group, whole.name, tensors, tree_size(params), *_worst([report], "direction"))


def _report(check: Callable[..., Report], *args: Any, **settings: Any) -> Report:
    """The report; of a wrong shape or dtype, or memory written to, only the sentence."""
    try:
        return check(*args, raises=False, **settings)
    except GradientError as error:
        return Report(str(error), [])


def _worst(reports: list[Report], *methods: str) -> tuple[list[float], str]:
    """The worst error of each method, and what the first report that is not right says."""
    found = [report for report in reports if report.findings]
    errors = [max((report.worst(m) for report in found), default=math.nan) for m in methods]
    wrong = (r for r in reports if not r.findings or not r.ok)
    return errors, next((str(r) if r.findings else r.name for r in wrong), "")


def print_table(results: list[Result], console: Console) -> None:
    """The worst errors line by line; below them, in full, what is wrong."""
    table = number_table(
        "Every backward against the derivative of its forward, in float64",
        *("operation (differentiated by)", "entries", "complex\nstep", "central\ndiff."),
        *("dot\nproduct", ""),
    )
    file = None
    for result in results:
        if result.file != file:
            file = result.file
            table.add_section()
            table.add_row(Text(file, "bold"))
        operation, _, mode = result.name.partition(": ")
        label = f"  {operation}({result.arguments}){mode and ': '}{mode}"
        shown = [
            "" if math.isnan(error) else f"{error:.1e}" if error else "0" for error in result.errors
        ]
        shown += [""] * (3 - len(shown))
        verdict = Text("WRONG", f"bold {BAD}") if result.message else Text("ok", GOOD)
        table.add_row(label, f"{result.entries:,}", *shown, verdict)
    console.print(table)
    console.print(
        "Relative errors, the worst of all entries and cases. Allowed: "
        f"{gradcheck.COMPLEX_TOLERANCE:.0e} by complex step, direction and dot product, "
        f"{gradcheck.CENTRAL_TOLERANCE:.0e} by central difference.",
        style="dim",
    )
    for result in results:
        if result.message:
            console.print(f"\n{result.message}", markup=False, highlight=False, soft_wrap=True)


def check_command(*, seed: int = 0, cases: int = 10) -> int:
    """Check every gradient of the package and print the table.

    Args:
        seed: Of the random cases.
        cases: Random cases of a pair; of a whole model, which takes long, one.
    Returns:
        exit status: 0 if every gradient is right, else 1.
    """
    if seed < 0 or cases < 1:
        raise InputError(
            f"check: expected --seed >= 0 and --cases >= 1; got {seed} and {cases}: choose such"
        )
    started = time.perf_counter()
    checks: list[Callable[..., Result]] = [
        functools.partial(check_row, row, n_cases=1 if row.is_model else cases) for row in TABLE
    ]
    checks += [functools.partial(check_whole_loss, whole) for whole in WHOLE_LOSSES]
    steps = track(list(enumerate(checks)), "checking gradients")
    results = [check(seed=[seed, i]) for i, check in steps]
    print_table(results, Console())
    wrong = [result.name for result in results if result.message]
    verdict = f"WRONG: {'; '.join(wrong)}" if wrong else "all right"
    entries = sum(result.entries for result in results)
    spent = time.perf_counter() - started
    print(f"{len(results)} checks, {entries:,} entries, {spent:.0f} s: {verdict}")
    return 1 if wrong else 0
