"""`minirlhf check`: every backward of the package against the derivative of its forward."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from minirlhf import gradcheck
from minirlhf.app import cases
from minirlhf.app.cases import FULL, TABLE, Draw, Row
from minirlhf.app.progress import track
from minirlhf.app.tables import BAD, GOOD, NumberTable, number_table, show
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf import imitation, objectives, preferences
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.train import policy, ppo, reward_model, sft
from minirlhf.train.batches import Batch
from minirlhf.tree import Tree, tree_items, tree_size

Whole = tuple[Callable[[Tree], Any], Tree, Tree]  # params -> loss, the parameters, their gradients


def two_blocks(draw: Draw, B: int) -> tuple[GPTConfig, Batch]:
    """Sizes of a model, and B prompts with their responses."""
    config = GPTConfig(vocab_size=11, n_ctx=8, n_layer=2, n_head=draw.pick((1, 2, 4)), d_model=8)
    return config, cases.drawn_batch(draw, config, B, 3, 4)


def whole_sft(draw: Draw) -> Whole:
    config, batch = two_blocks(draw, 3)
    params = cases.drawn_model(draw, config)

    def loss(params):
        out, _ = policy.policy_forward(params, batch=batch, config=config)
        weights = objectives.token_weights(batch.response_mask)
        return imitation.cross_entropy_forward(out.logp, weights=weights)[0]

    return loss, params, sft.sft_loss_and_gradients(params, batch, config)[1]


def whole_bradley_terry(draw: Draw) -> Whole:
    config, batch = two_blocks(draw, 6)  # three chosen, then three rejected
    params = cases.drawn_model(draw, config, "reward_head")

    def forward(params):
        score, cache = reward_model.reward_forward(params, batch=batch, config=config)
        loss, loss_cache = preferences.bradley_terry_forward(score[:3], score[3:], margin=0.2)
        return loss, cache, loss_cache

    _, cache, loss_cache = forward(params)
    dscore = np.concatenate(preferences.bradley_terry_backward(1.0, loss_cache))
    return lambda params: forward(params)[0], params, reward_model.reward_backward(dscore, cache)


def whole_ppo(draw: Draw, **changes: Any) -> Whole:
    """Clip, clipped value, entropy, penalty; the gradient as the training step computes it."""
    config, batch = two_blocks(draw, 4)
    settings = replace(FULL, micro_batch_size=draw.pick((0, 1, 3)), **changes)
    (params,), constants = cases.drawn_ppo_case(draw, config, batch, settings)
    experience = constants["experience"]
    gradients, *_ = ppo.minibatch_gradients(params, experience, config=config, settings=settings)
    return lambda params: cases.ppo_loss_held(params, **constants)[0], params, gradients


RATIOS = [name for name in objectives.SURROGATES if name != "token"]
WHOLE_LOSSES: dict[str, Callable[[Draw], Whole]] = {
    "supervised fine-tuning": whole_sft,
    "Bradley-Terry": whole_bradley_terry,
    **{f"PPO: {mode}": functools.partial(whole_ppo, kl_mode=mode) for mode in KL_MODES},
    **{f"PPO: ratio {r}": functools.partial(whole_ppo, ratio=r, dual_clip=0.0) for r in RATIOS},
}


# -- checking ------------------------------------------------------------------------------------
class Result(NamedTuple):
    """One line of the printed table: the worst of several cases."""

    file: str
    name: str
    arguments: str
    entries: int  # differentiated, over all cases
    errors: list[float]  # worst relative ones: by steps, differences, dot product; nan: not run
    message: str  # of the first case that failed; empty: all are right


def check_row(row: Row, *, n_cases: int, seed: Sequence[int]) -> Result:
    """`check_pair` on random cases."""
    reports, entries = [], 0
    for case in range(n_cases):
        arrays, constants = row.make(Draw(np.random.default_rng([*seed, case])))
        entries += tree_size(arrays)
        pair = (row.forward, row.backward, *arrays)
        reports.append(_report(gradcheck.check_pair, *pair, name=row.name, **constants))
    names = ", ".join(gradcheck.argument_names(row.forward, len(arrays)))
    return Result(row.file, row.name, names, entries, *_worst(reports))


def check_whole_loss(name: str, *, seed: Sequence[int]) -> Result:
    """`check_directions` through all parameters together, and through each tensor alone."""
    rng = np.random.default_rng(seed)
    loss, params, gradients = WHOLE_LOSSES[name](Draw(rng))
    report = _report(gradcheck.check_directions, loss, params, gradients, rng=rng, name=name)
    group, tensors = "whole losses, two blocks, by directions", len(list(tree_items(params)))
    return Result(group, name, f"{tensors} tensors", tree_size(params), *_worst([report]))


def _report(check: Callable, *args: Any, **settings: Any) -> gradcheck.Report:
    """The report; of a wrong shape or dtype, or memory written to, only the sentence."""
    try:
        return check(*args, raises=False, **settings)
    except gradcheck.GradientError as error:
        return gradcheck.Report(str(error), [])


def _worst(reports: list[gradcheck.Report]) -> tuple[list[float], str]:
    """The worst error of each method, and what the first report that is not right says."""
    errors = []
    for methods in (("complex step", "direction"), ("central difference",), ("dot product",)):
        found = (f.error for r in reports for f in r.findings if f.method in methods)
        errors.append(max(found, default=math.nan))
    wrong = (str(r) if r.findings else r.name for r in reports if not (r.findings and r.ok))
    return errors, next(wrong, "")


def results_table(results: list[Result]) -> NumberTable:
    """The worst errors line by line."""
    title = "Every backward against the derivative of its forward, in float64"
    heads = ("operation (differentiated by)", "entries")
    table = number_table(title, *heads, "complex\nstep", "central\ndiff.", "dot\nproduct", "")
    for file, of_file in itertools.groupby(results, key=lambda result: result.file):
        table.add_section()
        table.add_row(Text(file, "bold"))
        for result in of_file:
            operation, _, mode = result.name.partition(": ")
            label = f"  {operation}({result.arguments}){mode and ': '}{mode}"
            shown = ("" if math.isnan(e) else f"{e:.1e}" if e else "0" for e in result.errors)
            verdict = Text("WRONG", f"bold {BAD}") if result.message else Text("ok", GOOD)
            table.add_row(label, f"{result.entries:,}", *shown, verdict)
    table.caption = (
        "Relative errors, the worst of all entries and cases. Allowed: "
        f"{gradcheck.COMPLEX_TOLERANCE:.0e} by complex step, direction and dot product, "
        f"{gradcheck.CENTRAL_TOLERANCE:.0e} by central difference."
    )
    return table


def check_command(*, seed: int = 0, cases: int = 10) -> int:
    """Check every gradient of the package and print the table.

    Args:
        seed: Of the random cases.
        cases: Random cases of a pair; of a whole model, which takes long, one.
    """
    if seed < 0 or cases < 1:
        raise InputError(
            f"check: expected --seed >= 0 and --cases >= 1; got {seed} and {cases}: choose such"
        )
    started = time.perf_counter()
    checks: list[Callable[..., Result]] = [
        functools.partial(check_row, row, n_cases=1 if row.is_model else cases) for row in TABLE
    ]
    checks += [functools.partial(check_whole_loss, name) for name in WHOLE_LOSSES]
    steps = track(list(enumerate(checks)), "checking gradients")
    results = [check(seed=[seed, i]) for i, check in steps]
    wrong = {result.name: result.message for result in results if result.message}
    verdict = f"WRONG: {'; '.join(wrong)}" if wrong else "all right"
    size = f"{len(results)} checks, {sum(result.entries for result in results):,} entries"
    show(results_table(results), *(f"\n{message}" for message in wrong.values()))
    show(f"{size}, {time.perf_counter() - started:.0f} s: {verdict}")
    return 1 if wrong else 0
