"""`minirlhf exact`: every estimate and every trained policy beside the exact answer."""

import functools
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from threadpoolctl import threadpool_limits

from minirlhf.app import pictures
from minirlhf.app.progress import track
from minirlhf.app.tables import BAD, GOOD, number_table
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


def exact_command(
    *,
    parts: tuple[Part, ...] = PARTS,
    seeds: tuple[int, ...] = (0,),
    iterations: int = 150,
    out: Path | None = None,
    processes: int = 2,
) -> int:
    """The exact answer on small worlds, and how far every estimate and every policy is from it.

    - kl: where the penalty stands and what its gradient is then
    - gae, surrogate: bias of advantages; how long PPO's surrogate can be followed
    - flatness: why the noise of the sampled penalty vanishes at the optimum
    - optimum: PPO and one-step REINFORCE against J* = beta log Z
    - placement, clip: the same training with other placements of the penalty, other clips
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
    out = new_folder(out or next_numbered_folder("exact"), holds="exact.json")
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


def run_experiments(
    parts: tuple[Part, ...], seeds: tuple[int, ...], *, iterations: int, processes: int
) -> Row:
    """All numbers of the chosen parts, as exact.json holds them; each process has one thread."""
    analytic = {
        "kl": experiments.kl_gradient_table,
        "gae": experiments.gae_table,
        "surrogate": experiments.surrogate_table,
        "flatness": _flatness,
    }
    trained = {
        "optimum": functools.partial(experiments.optimum_runs, iterations=iterations),
        "placement": experiments.placement_runs,
        "clip": experiments.clip_runs,
        "overoptimisation": experiments.overoptimisation_runs,
    }
    runs = [run for part, make in trained.items() if part in parts for run in make()]
    seeds = seeds if runs else ()
    with multiprocessing.get_context("spawn").Pool(processes, initializer=_start_worker) as pool:

        def each(f: Callable[..., Any], jobs: Iterable[tuple], title: str) -> list:
            pending = [pool.apply_async(f, job) for job in jobs]
            return [done.get() for done in track(pending, title)]

        tables = {part: pool.apply_async(analytic[part]) for part in parts if part in analytic}
        references = each(_fit, [(seed,) for seed in seeds], "fitting the references")
        fitted = list(zip(seeds, references, strict=True))
        jobs = [(run, *of_seed) for run in runs for of_seed in fitted]
        results: Row = {"runs": each(_train, jobs, "training policies")}
        if "overoptimisation" in parts:
            pairs = [(reference,) for reference in references]
            results["overoptimisation"] = each(_overoptimisation, pairs, "exact curves")
        return {**{part: table.get() for part, table in tables.items()}, **results}


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
    if of_part(runs, "optimum"):
        paths.append(pictures.draw_optimum(of_part(runs, "optimum"), out / "optimum.png"))
    titles = {"placement": "the penalty in other places", "clip": "three clips, large steps"}
    groups = {title: of_part(runs, part) for part, title in titles.items() if of_part(runs, part)}
    if groups:
        paths.append(pictures.draw_runs(groups, out / "placement_and_clip.png"))
    if "overoptimisation" in results:
        first, ends = results["overoptimisation"][0], _linear_of_first_seed(runs)
        picture = out / "overoptimisation.png"
        paths.append(pictures.draw_overoptimisation(first, ends, picture))
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
        claim = f"{len(wrong)} wrong placements err by more than {DIFFERENT:g}"
        claims[claim] = min(wrong) > DIFFERENT
    if "gae" in results:
        free = [row for row in results["gae"] if row["lam"] == 1.0 or row["value"] == "exact"]
        claim = "GAE is unbiased at lambda = 1, and with exact values"
        claims[claim] = max(row["bias"] for row in free) < EQUAL
    if "flatness" in results:
        end = results["flatness"][-1]
        claim = "at the optimum k1's noise is 0 and the full KL's is not"
        claims[claim] = end["k1"] < EQUAL and end["full"] > DIFFERENT
    if results["runs"]:
        ends = [(run["history"][-1]["exact/reward"], run["frontier"]) for run in results["runs"]]
        under = all(reward <= frontier + EQUAL for reward, frontier in ends)
        claims[f"{len(ends)} trained policies lie under the exact frontier"] = under
        measured = [row for run in results["runs"] for row in run["history"]]
        lost = [sum(row["exact/gap_by_depth"]) - 1 + row["exact/fraction"] for row in measured]
        claims["J* - J is the sum of its shares by depth"] = max(map(abs, lost)) < 1e-6
    return claims


def show_tables(results: Row, console: Console) -> None:
    """The numbers a person looks at."""
    tables = {"kl": kl_table, "gae": gae_table}
    tables |= {"surrogate": surrogate_table, "flatness": flatness_table}
    for part, show in tables.items():
        if part in results:
            console.print(show(results[part]))
    titles = {
        "optimum": "trained policies against their exact optimum",
        "placement": "the penalty in other places",
        "clip": "three clips, large steps",
    }
    for part, title in titles.items():
        runs = of_part(results["runs"], part)
        if runs:
            console.print(runs_table(runs, title))
        if runs and part == "optimum":
            console.print(depth_table(runs))
    if "overoptimisation" in results:
        first = results["overoptimisation"][0]
        console.print(overoptimisation_table(first, _linear_of_first_seed(results["runs"])))
        console.print(gao_table(first["fits"]))


def kl_table(rows: list[Row]) -> Table:
    """Every placement: its error, cosine and noise against g = grad KL(pi || ref)."""
    title = "expected gradient of the penalty against g = grad KL(pi || ref), by enumeration"
    heads = ("placement", "error", "cosine", "noise", "gives")
    table = number_table(title, *heads, texts=(0, 4))
    samplers = {"theta": "on-policy", "old": "samples of old", "ref": "samples of the reference"}
    for sampler, heading in samplers.items():
        table.add_section()
        table.add_row(Text(heading, "bold"))
        for row in (row for row in rows if row["sampler"] == sampler):
            error = Text(f"{row['error']:.1e}", GOOD if row["right"] else BAD)
            numbers = (f"{row['cosine']:+.3f}", f"{row['noise']:.2f}")
            table.add_row(f"  {row['name']}", error, *numbers, row["gives"])
    table.caption = "error: |mean - g| / |g|. noise: sd of one sample's gradient / |g|."
    return table


def gae_table(rows: list[Row]) -> Table:
    """Bias and noise of the policy gradient for each value and lambda."""
    lams = list(dict.fromkeys(row["lam"] for row in rows))
    table = number_table("policy gradient by GAE", "value", *(f"lambda\n{lam:g}" for lam in lams))
    for value in dict.fromkeys(row["value"] for row in rows):
        same = [row for row in rows if row["value"] == value]
        table.add_row(f"{value}: bias", *(f"{row['bias']:.1e}" for row in same))
        table.add_row("  noise", *(f"{row['noise']:.2f}" for row in same))
    table.caption = "bias: |mean - grad J| / |grad J|. noise: sd of one sample / |grad J|."
    return table


def surrogate_table(rows: list[Row]) -> Table:
    """How the surrogate's gradient turns away from grad J as theta leaves old."""
    title = "PPO's surrogate as theta leaves old along grad J"
    heads = ("KL\n(old||theta)", "J", "cosine,\nclipped", "cosine,\nunclipped", "clip\nfraction")
    table = number_table(title, *heads, texts=())
    columns = ("objective", "clipped", "unclipped", "clip_fraction")
    for row in rows:
        table.add_row(f"{row['kl_old_seq']:.2g}", *(f"{row[c]:.3f}" for c in columns))
    return table


def flatness_table(rows: list[Row]) -> Table:
    """Variance of one sample's gradient against the distance to the optimum."""
    title = "variance of one sample's policy gradient, exact values as the baseline"
    heads = ("J* - J", "k1 in\nthe reward", "full KL in\nreward and loss")
    table = number_table(title, *heads, texts=())
    for row in rows:
        table.add_row(*(f"{row[name]:.2e}" for name in ("gap", "k1", "full")))
    return table


def runs_table(runs: list[Row], title: str) -> Table:
    """Runs of the same name and beta in one line: means, and of several seeds sd and least."""
    seeds = [("sd", np.std), ("least", np.min)] if len({run["seed"] for run in runs}) > 1 else []
    heads = ("share\nof J*", *(name for name, _ in seeds), "KL", "gold", "Var", "s a\nrun")
    table = number_table(f"{title}; {_of_seeds(runs)}", "", *heads)
    for (name, beta), same in pictures.by_run(runs).items():
        ends = [run["history"][-1] for run in same]
        shares, kl, gold, var = (
            [end[f"exact/{key}"] for end in ends]
            for key in ("fraction", "kl_seq", "gold", "flatness")
        )
        numbers = [np.mean(shares), *(of(shares) for _, of in seeds)]
        seconds = np.mean([run["seconds"] for run in same])
        table.add_row(
            *(f"{name}, beta {beta:g}", *(f"{x:.4f}" for x in numbers), f"{np.mean(kl):.3f}"),
            *(f"{np.mean(gold):.3f}", f"{np.mean(var):.1e}", f"{seconds:.0f}"),
        )
    table.caption = (
        "share of J*: (J - E_ref r) / (J* - E_ref r). Var: of r - beta log_ratio over responses, "
        "0 at the optimum."
    )
    return table


def depth_table(runs: list[Row]) -> Table:
    """Where J* - J is lost: its share at each token of the response."""
    depths = len(runs[0]["history"][-1]["exact/gap_by_depth"])
    title = f"where J is lost: thousandths of J* - E_ref r, by token; {_of_seeds(runs)}"
    table = number_table(title, "", *(f"token\n{t + 1}" for t in range(depths)), "sum")
    for (name, beta), same in pictures.by_run(runs).items():
        lost = np.mean([run["history"][-1]["exact/gap_by_depth"] for run in same], axis=0)
        label = f"{name}, beta {beta:g}"
        table.add_row(label, *(f"{1000 * x:.2f}" for x in [*lost, lost.sum()]))
    return table


def _of_seeds(runs: list[Row]) -> str:
    n = len({run["seed"] for run in runs})
    return f"{n} seed{'s' * (n > 1)}, {runs[0]['iterations']} iterations"


def overoptimisation_table(result: Row, runs: list[Row]) -> Table:
    """The exact curve, best-of-n and the ends of PPO runs from one reference, by their KL."""
    seed = f", seed {runs[0]['seed']}" if runs else ""
    heads = ("", "KL", "proxy", "most at\nthis KL", "gold")
    table = number_table(f"over-optimisation{seed}", *heads)
    rows = []
    for row in result["curve"] + result["best_of_n"]:
        name = f"best of {row['n']}" if "n" in row else f"optimum, beta {row['kl_coef']:g}"
        rows.append((name, row["kl_seq"], row["reward"], None, row["gold"]))
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
    heads = ("of", "law", "a", "b", "R2", "KL at\nthe peak")
    table = number_table(title, *heads, texts=(0, 1))
    for fit in fits:
        law = "d (a - b d)" if fit["law"] == "linear" else "d (a - b log d)"
        numbers = (f"{fit[name]:.3f}" for name in ("alpha", "slope", "r_squared"))
        table.add_row(fit["of"], law, *numbers, f"{fit['peak']:.2f}")
    return table
