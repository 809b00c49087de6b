"""`minirlhf exact`: every estimate and every trained policy beside the exact answer."""

import functools
import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from threadpoolctl import threadpool_limits

from minirlhf.app import pictures as pictures
from minirlhf.app.progress import track
from minirlhf.backend import keep_freed_memory
from minirlhf.disk import new_folder, next_numbered_folder, write_whole
from minirlhf.errors import InputError
from minirlhf.exact import experiments
from minirlhf.exact.ground_truth import fit_reference, log_probs_on_tree, small_transformer
from minirlhf.exact.tiny import make_tiny_world
from minirlhf.exact.token_world import TokenWorld
from minirlhf.tree import Tree

Row = dict[str, Any]
Part = Literal[
    "kl", "gae", "surrogate", "flatness", "optimum", "placement", "clip", "overoptimisation"
]
PARTS: tuple[Part, ...] = Part.__args__
EQUAL, DIFFERENT = 1e-8, 1e-2  # a right placement errs by less than the one, a wrong one by more


@dataclass(frozen=True)
class ExactOptions:
    """The exact answer on small worlds, and how far every estimate and every policy is from it.

    kl                where the penalty stands and what its gradient is then
    gae, surrogate    bias of advantages; how long PPO's surrogate can be followed
    flatness          why the noise of the sampled penalty vanishes at the optimum
    optimum           PPO and one-step REINFORCE against J* = beta log Z
    placement, clip   the same training with other placements of the penalty, other clips
    overoptimisation  proxy and gold along the exact frontier, best-of-n, PPO
    """

    parts: tuple[Part, ...] = PARTS
    """Which experiments."""
    seeds: tuple[int, ...] = (0,)
    """Each trains a reference of its own, and every policy from it."""
    iterations: int = 150
    """Of the runs in optimum."""
    out: Path | None = None
    """Folder for exact.json and the pictures; default: runs/exact-N with the next free N."""
    processes: int = 2
    """Training runs side by side, one thread each."""


def exact_command(options: ExactOptions) -> int:
    """Run the experiments, print their tables, write exact.json and the pictures.

    Returns:
        exit status: 0, or 1 if an identity that must hold to rounding did not.
    Raises:
        InputError: an option is out of its range, or the folder holds results already.
    """
    started = time.perf_counter()
    _check_options(options)
    out = new_folder(options.out or next_numbered_folder("exact"), holds="exact.json")
    results = run_experiments(options)
    write_whole(out / "exact.json", (json.dumps(results, indent=1) + "\n").encode())
    console = Console()
    show_tables(results, console)
    for path in draw_pictures(results, out):
        console.print(f"picture: {path}", soft_wrap=True, highlight=False)
    claims = check_claims(results)
    for claim, holds in claims.items():
        console.print(Text(f"{'holds' if holds else 'FAILS'}: {claim}", "" if holds else "red"))
    spent = time.perf_counter() - started
    console.print(f"numbers: {out / 'exact.json'}; {spent:.0f} s in all", soft_wrap=True)
    return 0 if all(claims.values()) else 1


def _check_options(options: ExactOptions) -> None:
    if not options.parts or not options.seeds or min(options.seeds, default=0) < 0:
        raise InputError(
            "exact: expected at least one part and one seed, none below 0; got "
            f"{len(options.parts)} parts and seeds {list(options.seeds)}: name some"
        )
    if options.iterations < 1 or options.processes < 1:
        raise InputError(
            "exact: expected iterations >= 1 and processes >= 1; "
            f"got {options.iterations} and {options.processes}: choose such numbers"
        )


# -- running -------------------------------------------------------------------------------------


def run_experiments(options: ExactOptions) -> Row:
    """All numbers of the chosen parts, as exact.json holds them; each process has one thread."""
    analytic: dict[str, Callable[[], Any]] = {
        "kl": experiments.kl_gradient_table,
        "gae": experiments.gae_table,
        "surrogate": experiments.surrogate_table,
        "flatness": _flatness,
    }
    runs = _training_runs(options)
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, initializer=_start_worker) as pool:
        wanted = [part for part in options.parts if part in analytic]
        tables = [pool.apply_async(analytic[part]) for part in wanted]
        seeds = tuple(dict.fromkeys(options.seeds)) if runs else ()
        fits = [pool.apply_async(_fit, (seed,)) for seed in seeds]
        references = dict(zip(seeds, _gather(fits, "fitting the references"), strict=True))
        jobs = [(run, seed) for run in runs for seed in seeds]
        training = [pool.apply_async(_train, (*job, references[job[1]])) for job in jobs]
        results: Row = dict(zip(wanted, [table.get() for table in tables], strict=True))
        results["runs"] = _gather(training, "training policies")
        if "overoptimisation" in options.parts:
            curves = [pool.apply_async(_overoptimisation, (ref,)) for ref in references.values()]
            results["overoptimisation"] = _gather(curves, "exact curves")
    return results


def _training_runs(options: ExactOptions) -> list[experiments.TrainingRun]:
    runs = []
    if "optimum" in options.parts:
        runs += experiments.optimum_runs(iterations=options.iterations)
    if "placement" in options.parts:
        runs += experiments.placement_runs()
    if "clip" in options.parts:
        runs += experiments.clip_runs()
    if "overoptimisation" in options.parts:
        runs += experiments.overoptimisation_runs()
    return runs


def _gather(pending: list, title: str) -> list:
    return [job.get() for job in track(pending, title)]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the workers
    keep_freed_memory()
    threadpool_limits(1)


@functools.cache
def _world() -> TokenWorld:
    """The tiny desk without its demonstrations: what is the same for all seeds."""
    return make_tiny_world(n_demonstrations=1, rng=np.random.default_rng(0))


def _fit(seed: int) -> Tree:
    world = make_tiny_world(rng=np.random.default_rng([seed, 0]))
    return fit_reference(world, config=small_transformer(world), seed=seed)


def _train(run: experiments.TrainingRun, seed: int, reference: Tree) -> Row:
    config = small_transformer(_world())
    with np.errstate(all="ignore"):  # some of these runs are meant to go wrong
        return experiments.train_run(run, _world(), reference, config=config, seed=seed)


def _overoptimisation(reference: Tree) -> Row:
    world = _world()
    ref = log_probs_on_tree(reference, world=world, config=small_transformer(world))
    return experiments.overoptimisation(world, ref)


def _flatness() -> list[Row]:
    world = make_tiny_world(max_tokens=4, n_demonstrations=1, rng=np.random.default_rng(0))
    return experiments.flatness_table(world)


# -- showing -------------------------------------------------------------------------------------


def draw_pictures(results: Row, out: Path) -> list[Path]:
    """One picture for each experiment that was run."""
    paths, runs = [], results["runs"]
    if "kl" in results:
        paths.append(pictures.draw_kl(results["kl"], out / "kl.png"))
    if "gae" in results or "surrogate" in results:
        tables = results.get("gae", []), results.get("surrogate", [])
        paths.append(pictures.draw_advantages(*tables, out / "advantages.png"))
    if "flatness" in results:
        paths.append(pictures.draw_flatness(results["flatness"], out / "flatness.png"))
    optimum = of_part(runs, "optimum")
    if optimum:
        paths.append(pictures.draw_optimum(optimum, out / "optimum.png"))
    groups = {
        title: of_part(runs, part)
        for part, title in (("placement", "placement of the penalty"), ("clip", "clip"))
        if of_part(runs, part)
    }
    if groups:
        paths.append(pictures.draw_runs(groups, out / "placement_and_clip.png"))
    if "overoptimisation" in results:
        path = out / "overoptimisation.png"
        ends = _linear_of_first_seed(runs)
        paths.append(pictures.draw_overoptimisation(results["overoptimisation"][0], ends, path))
    return paths


def of_part(runs: list[Row], *parts: str) -> list[Row]:
    """The runs of some experiments."""
    return [run for run in runs if run["part"] in parts]


def _linear_of_first_seed(runs: list[Row]) -> list[Row]:
    """Runs that can be laid over the exact curve of the first seed's reference."""
    chosen = of_part(runs, "optimum", "overoptimisation")
    linear = [run for run in chosen if run["name"] == "PPO, linear decay"]
    return [run for run in linear if run["seed"] == linear[0]["seed"]]


def check_claims(results: Row) -> dict[str, bool]:
    """What must hold whatever the seed: identities to rounding, and the frontier."""
    claims = {}
    if "kl" in results:
        right = [row["error"] for row in results["kl"] if row["right"]]
        wrong = [row["error"] for row in results["kl"] if not row["right"]]
        claims[f"{len(right)} right placements err by less than {EQUAL:g}"] = max(right) < EQUAL
        claims[f"{len(wrong)} wrong placements err by more than {DIFFERENT:g}"] = (
            min(wrong) > DIFFERENT
        )
    if "gae" in results:
        unbiased = [row["bias"] for row in results["gae"] if row["lam"] == 1.0]
        unbiased += [row["bias"] for row in results["gae"] if row["value"] == "exact"]
        claims["GAE is unbiased at lambda = 1, and with exact values"] = max(unbiased) < EQUAL
    if "flatness" in results:
        at_optimum = results["flatness"][-1]
        claims["at the optimum k1's noise is 0 and the full KL's is not"] = (
            at_optimum["k1"] < EQUAL and at_optimum["full"] > DIFFERENT
        )
    if results["runs"]:
        ends = [(run["history"][-1]["exact/reward"], run["frontier"]) for run in results["runs"]]
        under = all(reward <= frontier + EQUAL for reward, frontier in ends)
        claims[f"{len(ends)} trained policies lie under the exact frontier"] = under
        sums = [
            abs(sum(row["exact/gap_by_depth"]) - 1 + row["exact/fraction"])
            for run in results["runs"]
            for row in run["history"]
        ]
        claims["J* - J is the sum of its shares by depth"] = max(sums) < 1e-6
    return claims


def show_tables(results: Row, console: Console) -> None:
    """The numbers a person looks at."""
    for part, show in (
        ("kl", kl_table),
        ("gae", gae_table),
        ("surrogate", surrogate_table),
        ("flatness", flatness_table),
    ):
        if part in results:
            console.print(show(results[part]))
    for part, title in (
        ("optimum", "trained policies against their exact optimum"),
        ("placement", "the penalty in other places"),
        ("clip", "three clips, large steps"),
    ):
        runs = of_part(results["runs"], part)
        if runs:
            console.print(runs_table(runs, title))
        if part == "optimum" and runs:
            console.print(depth_table(runs))
    if "overoptimisation" in results:
        first = results["overoptimisation"][0]
        console.print(overoptimisation_table(first, _linear_of_first_seed(results["runs"])))
        console.print(gao_table(first["fits"]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def kl_table(rows: list[Row]) -> Table:
    """Every placement: its error, cosine and noise against g = grad KL(pi || ref)."""
    title = "expected gradient of the penalty against g = grad KL(pi || ref), by enumeration"
    table = _table(title, "placement", "error", "cosine", "noise", "gives")
    samplers = {"theta": "on-policy", "old": "samples of old", "ref": "samples of the reference"}
    for sampler, heading in samplers.items():
        table.add_section()
        table.add_row(Text(heading, "bold"))
        for row in (row for row in rows if row["sampler"] == sampler):
            error = Text(f"{row['error']:.1e}", "green" if row["right"] else "red")
            numbers = (f"{row['cosine']:+.3f}", f"{row['noise']:.2f}")
            table.add_row(f"  {row['name']}", error, *numbers, row["gives"])
    return table


def gae_table(rows: list[Row]) -> Table:
    """Bias (and noise) of the policy gradient for each value and lambda."""
    lams = list(dict.fromkeys(row["lam"] for row in rows))
    title = "policy gradient by GAE: bias / |grad J|  (noise of one sample / |grad J|)"
    table = _table(title, "value", *(f"lambda {lam:g}" for lam in lams))
    for value in dict.fromkeys(row["value"] for row in rows):
        cells = [f"{r['bias']:.1e} ({r['noise']:.2f})" for r in rows if r["value"] == value]
        table.add_row(value, *cells)
    return table


def surrogate_table(rows: list[Row]) -> Table:
    """How the surrogate's gradient turns away from grad J as theta leaves old."""
    title = "PPO's surrogate as theta leaves old along grad J"
    columns = ("kl_old_seq", "objective", "clipped", "unclipped", "clip_fraction")
    heads = ("KL(old||theta)", "J", "cos, clipped", "cos, unclipped", "clip fraction")
    table = _table(title, *heads)
    for row in rows:
        table.add_row(f"{row['kl_old_seq']:.2g}", *(f"{row[c]:.3f}" for c in columns[1:]))
    return table


def flatness_table(rows: list[Row]) -> Table:
    """Variance of one sample's gradient against the distance to the optimum."""
    title = "variance of one sample's policy gradient, exact values as the baseline"
    table = _table(title, "J* - J", "k1 in the reward", "full KL in reward and loss")
    for row in rows:
        table.add_row(*(f"{row[name]:.2e}" for name in ("gap", "k1", "full")))
    return table


def runs_table(runs: list[Row], title: str) -> Table:
    """Runs of the same name and beta in one line: mean, sd and least over the seeds."""
    heads = ("beta", "share of J*", "least", "KL", "gold", "Var", "s a run")
    table = _table(f"{title}; {_of_seeds(runs)}", "", *heads)
    for name, beta, same in _by_name_and_beta(runs):
        ends = [run["history"][-1] for run in same]
        kl, gold, var = (
            float(np.mean([end[f"exact/{key}"] for end in ends]))
            for key in ("kl_seq", "gold", "flatness")
        )
        shares = [end["exact/fraction"] for end in ends]
        spread = f" ± {np.std(shares):.4f}" if len(shares) > 1 else ""
        table.add_row(
            *(name, f"{beta:g}", f"{np.mean(shares):.4f}{spread}", f"{min(shares):.4f}"),
            *(f"{kl:.3f}", f"{gold:.3f}", f"{var:.1e}"),
            f"{np.mean([run['seconds'] for run in same]):.0f}",
        )
    table.caption = (
        "share of J*: (J - E_ref r) / (J* - E_ref r). Var: of r - beta log_ratio over responses, "
        "0 at the optimum."
    )
    return table


def depth_table(runs: list[Row]) -> Table:
    """Where J* - J is lost: its share at each token of the response."""
    depths = len(runs[0]["history"][-1]["exact/gap_by_depth"])
    title = f"where the rest is lost: (J* - J) / (J* - E_ref r) by token; {_of_seeds(runs)}"
    table = _table(title, "", "beta", *(f"token {t + 1}" for t in range(depths)), "sum")
    for name, beta, same in _by_name_and_beta(runs):
        lost = np.mean([run["history"][-1]["exact/gap_by_depth"] for run in same], axis=0)
        table.add_row(name, f"{beta:g}", *(f"{x:.5f}" for x in [*lost, lost.sum()]))
    return table


def _of_seeds(runs: list[Row]) -> str:
    n = len({run["seed"] for run in runs})
    return f"{n} seed{'s' * (n > 1)}, {runs[0]['iterations']} iterations"


def _by_name_and_beta(runs: list[Row]) -> list[tuple[str, float, list[Row]]]:
    groups: dict[tuple[str, float], list[Row]] = {}
    for run in runs:
        groups.setdefault((run["name"], run["kl_coef"]), []).append(run)
    return [(*key, same) for key, same in groups.items()]


def overoptimisation_table(result: Row, runs: list[Row]) -> Table:
    """The exact curve, best-of-n and the ends of PPO runs from one reference, by their KL."""
    seed = f", seed {runs[0]['seed']}" if runs else ""
    table = _table(f"over-optimisation{seed}", "", "KL", "proxy", "most at this KL", "gold")
    rows = [
        (f"optimum, beta {row['kl_coef']:g}", row["kl_seq"], row["reward"], None, row["gold"])
        for row in result["curve"]
    ]
    rows += [
        (f"best of {row['n']}", row["kl_seq"], row["reward"], None, row["gold"])
        for row in result["best_of_n"]
    ]
    for run in runs:
        end = run["history"][-1]
        numbers = (end["exact/kl_seq"], end["exact/reward"], run["frontier"], end["exact/gold"])
        rows.append((f"PPO, beta {run['kl_coef']:g}", *numbers))
    for name, *numbers in sorted(rows, key=lambda row: row[1]):
        table.add_row(name, *("" if x is None else f"{x:.3f}" for x in numbers))
    return table


def gao_table(fits: list[Row]) -> Table:
    """Gao's laws for the gain in gold, as fitted."""
    title = "Gao's laws for the gain in gold, d = sqrt(KL)"
    table = _table(title, "of", "law", "a", "b", "R2", "KL at the peak")
    for fit in fits:
        law = "d (a - b d)" if fit["law"] == "linear" else "d (a - b log d)"
        numbers = (f"{fit[name]:.3f}" for name in ("alpha", "slope", "r_squared"))
        table.add_row(fit["of"], law, *numbers, f"{fit['peak']:.2f}")
    return table
