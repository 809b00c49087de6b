"""`minirlhf exact`: every estimate and every trained policy beside the exact answer."""

import functools
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from threadpoolctl import threadpool_limits

from minirlhf.app import pictures
from minirlhf.app.progress import track
from minirlhf.app.tables import BAD, GOOD, number_table, rows_table
from minirlhf.disk import new_folder, new_numbered_folder, write_whole
from minirlhf.errors import InputError
from minirlhf.exact import experiments, ground_truth
from minirlhf.exact.tiny import make_tiny_world
from minirlhf.memory import keep_freed_memory
from minirlhf.tree import Tree
from minirlhf.workers import without_interrupts

Row = dict[str, Any]
Part = Literal[
    "kl", "gae", "surrogate", "flatness", "optimum", "placement", "clip", "overoptimisation"
]
PARTS: tuple[Part, ...] = Part.__args__
TITLES = {  # of the parts that are runs of training
    "optimum": "trained policies against their exact optimum",
    "placement": "the penalty in other places",
    "clip": "three clips, large steps",
}
EQUAL, DIFFERENT = 1e-8, 1e-2  # a right placement errs by less than the one, a wrong one by more


def exact_command(
    *,
    parts: tuple[Part, ...] = PARTS,
    seeds: tuple[int, ...] = (0,),
    iterations: int = 150,
    out: Path | None = None,
    processes: int = 2,
) -> int:
    """The exact answer on small worlds; how far from it are every estimate and policy.

    - kl: where the penalty stands and what its gradient is then
    - gae, surrogate: bias of advantages; how long PPO's surrogate can be followed
    - flatness: why the noise of the sampled penalty vanishes at the optimum
    - optimum: PPO and one-step REINFORCE against J* = beta log Z
    - placement, clip: the same training, the penalty elsewhere; with other clips
    - overoptimisation: proxy and gold along the exact frontier, best-of-n, PPO

    Args:
        parts: Which experiments.
        seeds: Each trains a reference of its own, and every policy from it.
        iterations: Of the runs in optimum.
        out: Folder for exact.json and the pictures; default: runs/exact-N with the next free N.
        processes: Training runs side by side, one thread each.
    Returns:
        exit status: 0, or 1 if an identity that must hold to rounding did not.
    Raises:
        InputError: an option is out of its range, or the folder holds results already.
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
    console = Console()
    show_tables(results, console)
    for path in draw_pictures(results, out):
        console.print(f"picture: {path}", soft_wrap=True, highlight=False)
    claims = check_claims(results)
    for claim, holds in claims.items():
        console.print(Text(f"{'holds' if holds else 'FAILS'}: {claim}", "" if holds else BAD))
    spent = time.perf_counter() - started
    console.print(f"numbers: {out / 'exact.json'}; {spent:.0f} s in all", soft_wrap=True)
    return 0 if all(claims.values()) else 1


# -- running -------------------------------------------------------------------------------------
def run_experiments(parts: tuple, seeds: tuple, *, iterations: int, processes: int) -> Row:
    """All numbers of the chosen parts, as exact.json holds them; each process has one thread."""
    analytic = {
        "kl": experiments.kl_gradient_table,
        "gae": experiments.gae_table,
        "surrogate": experiments.surrogate_table,
        "flatness": _flatness,
    }
    runs = experiments.optimum_runs(iterations=iterations) + experiments.placement_runs()
    runs += experiments.clip_runs() + experiments.overoptimisation_runs()
    runs = [run for run in runs if run.part in parts]
    seeds = seeds if runs else ()
    n_jobs = max(len(runs) * len(seeds), len(parts), len(seeds))
    new_pool = multiprocessing.get_context("spawn").Pool
    if hasattr(signal, "pthread_sigmask"):  # POSIX
        resource_tracker.ensure_running()  # now, because to start it lets interrupts in again
    with without_interrupts():
        crew = new_pool(min(processes, n_jobs), initializer=_start_worker)
    with crew as pool:

        def each(f: Callable[..., Any], jobs: Iterable[tuple], title: str) -> list:
            pending = [pool.apply_async(f, job) for job in jobs]
            return [done.get() for done in track(pending, title)]

        tables = {part: pool.apply_async(analytic[part]) for part in parts if part in analytic}
        of_seeds = [(seed,) for seed in seeds]
        references = each(ground_truth.tiny_reference, of_seeds, "fitting the references")
        fitted = list(zip(references, seeds, strict=True))
        jobs = [(*of_seed, run) for run in runs for of_seed in fitted]
        results: Row = {"runs": each(_train, jobs, "training policies")}
        if "overoptimisation" in parts:
            results["overoptimisation"] = each(_overoptimisation, fitted, "exact curves")
        return {**{part: table.get() for part, table in tables.items()}, **results}


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the workers
    keep_freed_memory()
    threadpool_limits(1)


@functools.cache
def _tiny() -> dict[str, Any]:
    """The tiny desk without its demonstrations, and a model for it: the same for all seeds."""
    world = make_tiny_world(n_demonstrations=1, rng=np.random.default_rng(0))
    return {"world": world, "config": ground_truth.small_transformer(world)}


def _train(reference: Tree, seed: int, run: experiments.TrainingRun) -> Row:
    with np.errstate(all="ignore"):  # some of these runs are meant to go wrong
        return experiments.train_run(run, reference=reference, seed=seed, **_tiny())


def _overoptimisation(reference: Tree, seed: int) -> Row:
    ref = ground_truth.log_probs_on_tree(reference, **_tiny())
    return experiments.overoptimisation(_tiny()["world"], ref)


def _flatness() -> list[Row]:
    world = make_tiny_world(max_tokens=4, n_demonstrations=1, rng=np.random.default_rng(0))
    return experiments.flatness_table(world)


# -- showing -------------------------------------------------------------------------------------
def draw_pictures(results: Row, out: Path) -> list[Path]:
    """One picture for each experiment that was run."""
    runs, paths = results["runs"], []

    def draw(name: str, picture: Callable[..., Path], *data: Any) -> None:
        if any(data):
            paths.append(picture(*(part or [] for part in data), out / name))

    draw("kl.png", pictures.draw_kl, results.get("kl"))
    draw("advantages.png", pictures.draw_advantages, results.get("gae"), results.get("surrogate"))
    draw("flatness.png", pictures.draw_flatness, results.get("flatness"))
    draw("optimum.png", pictures.draw_optimum, of_part(runs, "optimum"))
    both = {TITLES[part]: of_part(runs, part) for part in ("placement", "clip")}
    both = {title: same for title, same in both.items() if same}
    draw("placement_and_clip.png", pictures.draw_runs, both)
    if "overoptimisation" in results:
        draw("overoptimisation.png", pictures.draw_overoptimisation, *_of_first_seed(results))
    return paths


def of_part(runs: list[Row], *parts: str) -> list[Row]:
    """The runs of some experiments."""
    return [run for run in runs if run["part"] in parts]


def _of_first_seed(results: Row) -> tuple[Row, list[Row]]:
    """The exact curve of the first seed's reference, and the runs that can be laid over it."""
    chosen = of_part(results["runs"], "optimum", "overoptimisation")
    linear = [run for run in chosen if run["name"] == "PPO, linear decay"]
    first = [run for run in linear if run["seed"] == linear[0]["seed"]]
    return results["overoptimisation"][0], first


def check_claims(results: Row) -> dict[str, bool]:
    """What must hold whatever the seed: identities to rounding, and the frontier."""
    claims, runs = {}, results["runs"]
    if "kl" in results:
        right = [row["error"] for row in results["kl"] if row["right"]]
        wrong = [row["error"] for row in results["kl"] if not row["right"]]
        claims[f"{len(right)} right placements err by less than {EQUAL:g}"] = max(right) < EQUAL
        claim = f"{len(wrong)} wrong placements err by more than {DIFFERENT:g}"
        claims[claim] = min(wrong) > DIFFERENT
    if "gae" in results:
        free = (row for row in results["gae"] if row["lam"] == 1.0 or row["value"] == "exact")
        unbiased = all(row["bias"] < EQUAL for row in free)
        claims["GAE is unbiased at lambda = 1, and with exact values"] = unbiased
    if "flatness" in results:
        end = results["flatness"][-1]
        claim = "at the optimum k1's noise is 0 and the full KL's is not"
        claims[claim] = end["k1"] < EQUAL and end["full"] > DIFFERENT
    if runs:
        under = all(run["history"][-1]["exact/reward"] <= run["frontier"] + EQUAL for run in runs)
        claims[f"{len(runs)} trained policies lie under the exact frontier"] = under
        measured = (row for run in runs for row in run["history"])
        lost = [sum(row["exact/gap_by_depth"]) - 1 + row["exact/fraction"] for row in measured]
        claims["J* - J is the sum of its shares by depth"] = max(map(abs, lost)) < 1e-6
    return claims


def show_tables(results: Row, console: Console) -> None:
    """The numbers a person looks at."""
    analytic = {"kl": kl_table, "gae": gae_table}
    analytic |= {"surrogate": surrogate_table, "flatness": flatness_table}
    tables = [table(results[part]) for part, table in analytic.items() if part in results]
    for part, title in TITLES.items():
        if runs := of_part(results["runs"], part):
            tables.append(runs_table(runs, title))
            tables += [depth_table(runs)] if part == "optimum" else []
    if "overoptimisation" in results:
        curve, runs = _of_first_seed(results)
        tables += [overoptimisation_table(curve, runs), gao_table(curve["fits"])]
    for table in tables:
        console.print(table)


def kl_table(rows: list[Row]) -> Table:
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
    return table


def gae_table(rows: list[Row]) -> Table:
    """Bias and noise of the policy gradient for each value and lambda."""
    lams = (f"lambda\n{lam:g}" for lam in dict.fromkeys(row["lam"] for row in rows))
    table = number_table("policy gradient by GAE", "value", *lams)
    for (value,), same in pictures.grouped(rows, "value").items():
        table.add_row(f"{value}: bias", *(f"{row['bias']:.1e}" for row in same))
        table.add_row("  noise", *(f"{row['noise']:.2f}" for row in same))
    table.caption = "bias: |mean - grad J| / |grad J|. noise: sd of one sample / |grad J|."
    return table


def surrogate_table(rows: list[Row]) -> Table:
    """How the surrogate's gradient turns away from grad J as theta leaves old."""
    columns = {"KL\n(old||theta)": "{kl_old_seq:.2g}", "J": "{objective:.3f}"}
    columns |= {f"cosine,\n{name}": f"{{{name}:.3f}}" for name in ("clipped", "unclipped")}
    columns["clip\nfraction"] = "{clip_fraction:.3f}"
    return rows_table("PPO's surrogate as theta leaves old along grad J", columns, rows, texts=())


def flatness_table(rows: list[Row]) -> Table:
    """Variance of one sample's gradient against the distance to the optimum."""
    columns = {"J* - J": "{gap:.2e}", "k1 in\nthe reward": "{k1:.2e}"}
    columns["full KL in\nreward and loss"] = "{full:.2e}"
    title = "variance of one sample's policy gradient, exact values as the baseline"
    return rows_table(title, columns, rows, texts=())


def runs_table(runs: list[Row], title: str) -> Table:
    """Runs of the same name and beta in one line: means, and of several seeds sd and least."""
    spread = {"sd": np.std, "least": np.min} if len({run["seed"] for run in runs}) > 1 else {}
    heads = ("share\nof J*", *spread, "KL", "gold", "Var", "s a\nrun")
    table = number_table(f"{title}; {_of_seeds(runs)}", "", *heads)
    for (name, beta), same in pictures.grouped(runs, "name", "kl_coef").items():
        ends = [run["history"][-1] for run in same]
        shares = [end["exact/fraction"] for end in ends]
        cells = [f"{of(shares):.4f}" for of in (np.mean, *spread.values())]
        for key, form in (("kl_seq", ".3f"), ("gold", ".3f"), ("flatness", ".1e")):
            cells.append(f"{np.mean([end[f'exact/{key}'] for end in ends]):{form}}")
        cells.append(f"{np.mean([run['seconds'] for run in same]):.0f}")
        table.add_row(f"{name}, beta {beta:g}", *cells)
    table.caption = "share of J*: (J - E_ref r) / (J* - E_ref r). Var: of r - beta log_ratio over "
    table.caption += "responses, 0 at the optimum."
    return table


def depth_table(runs: list[Row]) -> Table:
    """Where J* - J is lost: its share at each token of the response."""
    depths = len(runs[0]["history"][-1]["exact/gap_by_depth"])
    title = f"where J is lost: thousandths of J* - E_ref r, by token; {_of_seeds(runs)}"
    table = number_table(title, "", *(f"token\n{t + 1}" for t in range(depths)), "sum")
    for (name, beta), same in pictures.grouped(runs, "name", "kl_coef").items():
        lost = np.mean([run["history"][-1]["exact/gap_by_depth"] for run in same], axis=0)
        cells = (f"{1000 * x:.2f}" for x in [*lost, lost.sum()])
        table.add_row(f"{name}, beta {beta:g}", *cells)
    return table


def _of_seeds(runs: list[Row]) -> str:
    n = len({run["seed"] for run in runs})
    return f"{n} seed{'s' * (n > 1)}, {runs[0]['iterations']} iterations"


def overoptimisation_table(result: Row, runs: list[Row]) -> Table:
    """The exact curve, best-of-n and the ends of PPO runs from one reference, by their KL."""
    names = {"": "{name}", "KL": "{kl_seq:.3f}", "proxy": "{reward:.3f}"}
    columns = {**names, "most at\nthis KL": "{most}", "gold": "{gold:.3f}"}
    rows = []
    for row in result["curve"] + result["best_of_n"]:
        name = f"best of {row['n']}" if "n" in row else f"optimum, beta {row['kl_coef']:g}"
        rows.append({**row, "name": name, "most": ""})
    for run in runs:
        end = {key.removeprefix("exact/"): x for key, x in run["history"][-1].items()}
        most = f"{run['frontier']:.3f}"
        rows.append({**end, "name": f"PPO, beta {run['kl_coef']:g}", "most": most})
    rows.sort(key=lambda row: row["kl_seq"])
    seed = f", seed {runs[0]['seed']}" if runs else ""
    return rows_table(f"over-optimisation{seed}", columns, rows)


def gao_table(fits: list[Row]) -> Table:
    """Gao's laws for the gain in gold, as fitted."""
    laws = {"linear": "d (a - b d)", "log": "d (a - b log d)"}
    fits = [{**fit, "law": laws[fit["law"]]} for fit in fits]
    columns = {"of": "{of}", "law": "{law}", "a": "{alpha:.3f}", "b": "{slope:.3f}"}
    columns |= {"R2": "{r_squared:.3f}", "KL at\nthe peak": "{peak:.2f}"}
    title = "Gao's laws for the gain in gold, d = sqrt(KL)"
    return rows_table(title, columns, fits, texts=(0, 1))
