"""`minirlhf exact`: every estimate and every trained policy beside the exact answer."""

import json
import multiprocessing
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table
from rich.text import Text
from threadpoolctl import threadpool_limits

from minirlhf.app import pictures
from minirlhf.app.progress import track
from minirlhf.app.tables import BAD, GOOD, number_table, show
from minirlhf.crew import without_interrupts
from minirlhf.disk import new_folder, new_numbered_folder, write_whole
from minirlhf.errors import InputError
from minirlhf.exact import expected, ground_truth
from minirlhf.exact.optimum import frontier_reward
from minirlhf.exact.tiny import make_tiny_world, tiny_reference
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import Tree
from minirlhf.workers import CAN_FORK

Row = dict[str, Any]
Part = Literal["kl", "optimum"]
EQUAL, DIFFERENT = 1e-8, 1e-2  # a right placement errs by less than the one, a wrong one by more


def exact_command(
    *,
    parts: tuple[Part, ...] = Part.__args__,
    seeds: tuple[int, ...] = (0,),
    iterations: int = 150,
    out: Path | None = None,
    processes: int = 2,
) -> int:
    """The exact answer on small worlds; how far from it are every estimate and policy.

    - kl: where the penalty stands and what its gradient is then
    - optimum: PPO and one-step REINFORCE against J* = beta log Z

    Advantages, clips and more: the case studies in examples/cases of a clone.

    Args:
        parts: Which experiments.
        seeds: Each trains a reference of its own, and every policy from it.
        iterations: Of the runs in optimum.
        out: Folder for exact.json and the pictures; default: runs/exact-N with the next free N.
        processes: Training runs side by side, one thread each.
    """
    started = time.perf_counter()
    if not parts or not seeds or min(seeds) < 0 or iterations < 1 or processes < 1:
        raise InputError(
            "exact: expected at least one part and one seed, none below 0, iterations >= 1 and "
            f"processes >= 1; got {len(parts)} parts, seeds {list(seeds)}, {iterations} and "
            f"{processes}: choose such numbers"
        )
    out = new_folder(out or new_numbered_folder("exact"), holds="exact.json")
    results = run_experiments(parts, seeds, iterations=iterations, processes=processes)
    write_whole(out / "exact.json", (json.dumps(results, indent=1) + "\n").encode())
    for part, rows in results.items():
        show(*TABLES[part](rows))
    for part, rows in results.items():
        show(f"picture: {PICTURES[part](rows, out / f'{part}.png')}")
    claims = check_claims(results)
    for claim, holds in claims.items():
        show(Text(f"{'holds' if holds else 'FAILS'}: {claim}", "" if holds else BAD))
    show(f"numbers: {out / 'exact.json'}; {time.perf_counter() - started:.0f} s in all")
    return 0 if all(claims.values()) else 1


# -- running -------------------------------------------------------------------------------------
def run_experiments(parts: tuple, seeds: tuple, *, iterations: int, processes: int) -> Row:
    """All numbers of the chosen parts, as exact.json holds them."""
    results: Row = {}
    if "kl" in parts:
        results["kl"] = expected.kl_gradient_table()
    if "optimum" in parts:
        references = _each(tiny_reference, list(seeds), "fitting the references", processes)
        starts = list(zip(seeds, references, strict=True))
        runs = ground_truth.optimum_runs(iterations=iterations)
        jobs = [(*run, *start) for run in runs for start in starts]
        results["optimum"] = _each(_train, jobs, "training policies", processes)
    return results


def _each(f: Callable[[Any], Any], jobs: list, title: str, processes: int) -> list:
    """[f(job), ..] side by side in forked processes, where that is safe; in one thread each."""
    with threadpool_limits(1):
        if not CAN_FORK:
            return [f(job) for job in track(jobs, title)]
        with warnings.catch_warnings(), without_interrupts():
            warnings.simplefilter("ignore", DeprecationWarning)  # of idle threads beside a fork
            pool = multiprocessing.get_context("fork").Pool(min(processes, len(jobs)))
        with pool:
            return [done for _, done in zip(track(jobs, title), pool.imap(f, jobs), strict=True)]


def _train(job: tuple[str, PPOConfig, int, Tree]) -> Row:
    """One policy, trained from the reference on; its history, and the frontier where it ended."""
    started, (name, settings, seed, reference) = time.perf_counter(), job
    world = make_tiny_world(n_demonstrations=1, rng=np.random.default_rng(0))
    truth = ground_truth.make_ground_truth(world, reference, kl_coef=settings.kl_coef)
    history = ground_truth.train_on_world(truth, settings=settings, seed=seed).history
    row = {"name": name, "kl_coef": settings.kl_coef, "seed": seed}
    row |= {"iterations": settings.iterations, "seconds": time.perf_counter() - started}
    end, args = history[-1], (world.tree, truth.ref_log_probs, world.rewards)
    row["frontier"] = frontier_reward(*args, kl_seq=end["exact/kl_seq"])
    return {**row, "history": history}


# -- showing -------------------------------------------------------------------------------------
def check_claims(results: Row) -> dict[str, bool]:
    """What must hold whatever the seed: identities to rounding, and the frontier."""
    claims = {}
    if rows := results.get("kl"):
        right = [row["error"] for row in rows if row["right"]]
        wrong = [row["error"] for row in rows if not row["right"]]
        claims[f"{len(right)} right placements err by less than {EQUAL:g}"] = max(right) < EQUAL
        claim = f"{len(wrong)} wrong placements err by more than {DIFFERENT:g}"
        claims[claim] = min(wrong) > DIFFERENT
    if runs := results.get("optimum"):
        under = all(run["history"][-1]["exact/reward"] <= run["frontier"] + EQUAL for run in runs)
        claims[f"{len(runs)} trained policies lie under the exact frontier"] = under
        measured = (row for run in runs for row in run["history"])
        lost = [sum(row["exact/gap_by_depth"]) - 1 + row["exact/fraction"] for row in measured]
        claims["J* - J is the sum of its shares by depth"] = max(map(abs, lost)) < 1e-6
    return claims


def kl_tables(rows: list[Row]) -> tuple[Table]:
    """Every placement: its error, cosine and noise against g = grad KL(pi || ref)."""
    title = "expected gradient of the penalty against g = grad KL(pi || ref), by enumeration"
    table = number_table(title, "placement", "error", "cosine", "noise", "gives", texts=(0, 4))
    samplers = {"theta": "on-policy", "old": "samples of old", "ref": "samples of the reference"}
    for (sampler,), same in pictures.grouped(rows, "sampler").items():
        table.add_section()
        table.add_row(Text(samplers[sampler], "bold"))
        for row in same:
            error = Text(f"{row['error']:.1e}", GOOD if row["right"] else BAD)
            numbers = (f"{row['cosine']:+.3f}", f"{row['noise']:.2f}")
            table.add_row(f"  {row['name']}", error, *numbers, row["gives"])
    table.caption = "error: |mean - g| / |g|. noise: sd of one sample's gradient / |g|."
    return (table,)


def optimum_tables(runs: list[Row]) -> tuple[Table, Table]:
    """A line for a name and beta: means, sd and least over seeds; and J* - J by token."""
    n = len({run["seed"] for run in runs})
    of_runs = f"{n} seed{'s' * (n > 1)}, {runs[0]['iterations']} iterations"
    spread = {"sd": lambda x: np.std(x, ddof=1), "least": np.min} if n > 1 else {}
    heads = ("share\nof J*", *spread, "KL", "gold", "Var", "s a\nrun")
    table = number_table(f"trained policies against their exact optimum; {of_runs}", "", *heads)
    table.caption = "share of J*: (J - E_ref r) / (J* - E_ref r). Var: of r - beta log_ratio "
    table.caption += "over responses, 0 at the optimum."
    depths = range(1, len(runs[0]["history"][-1]["exact/gap_by_depth"]) + 1)
    title = f"where J is lost: thousandths of J* - E_ref r, by token; {of_runs}"
    by_depth = number_table(title, "", *(f"token\n{t}" for t in depths), "sum")
    for (name, beta), same in pictures.grouped(runs, "name", "kl_coef").items():
        label, ends = f"{name}, beta {beta:g}", [run["history"][-1] for run in same]
        shares = [end["exact/fraction"] for end in ends]
        cells = [f"{of(shares):.4f}" for of in (np.mean, *spread.values())]
        for key, form in (("kl_seq", ".3f"), ("gold", ".3f"), ("flatness", ".1e")):
            cells.append(f"{np.mean([end[f'exact/{key}'] for end in ends]):{form}}")
        cells.append(f"{np.mean([run['seconds'] for run in same]):.0f}")
        table.add_row(label, *cells)
        lost = np.mean([end["exact/gap_by_depth"] for end in ends], axis=0)
        by_depth.add_row(label, *(f"{1000 * x:.2f}" for x in [*lost, lost.sum()]))
    return table, by_depth


TABLES = {"kl": kl_tables, "optimum": optimum_tables}
PICTURES = {"kl": pictures.draw_kl, "optimum": pictures.draw_optimum}
