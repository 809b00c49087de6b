"""What the case studies beside this file share: seeds, training side by side, tables, files.

    case = Case("03_omitted_reference", __doc__)       reads --seeds, --out, --fast
    runs = case.train({"beta 0.5": Arm(), "beta 0": Arm({"kl_coef": 0.0})})
    case.table("at the end", ends(runs), ("gold", "proxy", "kl_seq"))
    case.claim("without the penalty gold is lower", [...])     one truth a seed
    case.finish(figure, varied="beta", seen="one sentence with the numbers")

The world is the tiny support desk and the policy a small transformer, trained from samples by the
package's own loops; what it has become is measured by enumeration. Each seed has a reference of its
own; the default seeds were used for nothing else, no setting was chosen by them.
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from desk import Desk
from minirlhf.app.pictures import save
from minirlhf.app.progress import track
from minirlhf.crew import without_interrupts
from minirlhf.disk import write_whole
from minirlhf.exact import ground_truth
from minirlhf.exact.ground_truth import TokenWorld
from minirlhf.exact.tiny import MAX_TOKENS, tiny_reference
from minirlhf.fields import with_fields
from minirlhf.memory import keep_freed_memory
from minirlhf.runs.metrics import mean_of_updates
from minirlhf.train.dpo import DPOConfig, train_dpo, with_reference
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.reward_model import Pair, n_updates
from minirlhf.train.settings import OptimizerConfig, PPOConfig
from minirlhf.tree import Tree, tree_copy
from minirlhf.workers import CAN_FORK

Row = dict[str, Any]
SEEDS = (101, 102, 103, 104, 105)


class Arm(NamedTuple):
    """One way to train; what is not said is PPO as `exact.ground_truth.PPO` has it, beta = 0.5."""

    ppo: dict[str, Any] = {}  # fields of PPOConfig; "optimizer" is a dict of its fields
    reward: np.ndarray | None = None  # (M,) what is paid for each reply; None: the desk's proxy
    iterations: int = 60
    new_reference: bool = False  # as a later phase: what the policy has become is the reference
    then: tuple["Arm", ...] = ()  # phases after it, which go on from its policy

    def settings(self, fast: bool) -> PPOConfig:
        small = {"iterations": min(self.iterations, 4), "batch_size": 32}
        size = small if fast else {"iterations": self.iterations}
        group = min(self.ppo.get("samples_per_prompt", 1), 32 if fast else math.inf)
        changes = {**size, **self.ppo, "samples_per_prompt": group}
        return with_fields(ground_truth.PPO, changes, "ppo")


class PairsArm(NamedTuple):
    """DPO from pairs of the reference's samples, which the proxy judges."""

    dpo: dict[str, Any] = {}  # fields of DPOConfig
    n_pairs: int = 12_800  # as many replies as 100 iterations of 256

    def settings(self, fast: bool) -> DPOConfig:
        rate = OptimizerConfig(learning_rate=3e-3, warmup=10, eps=1e-8)
        own = {"kl_coef": 0.5, "epochs": 1 if fast else 4, "batch_size": 256, "optimizer": rate}
        return DPOConfig(**{**own, **self.dpo})


Arms = dict[str, Arm | PairsArm]


class Run(NamedTuple):
    """What became of an arm under one seed."""

    rows: list[Row]  # over the iterations: `Desk.describe`, "paid" E[reward], metrics of PPO
    log_probs: np.ndarray  # (N, V) of the policy at the end
    probs: np.ndarray  # (M,) of each reply


class Case:
    """One case study: its options, its results, its files."""

    def __init__(self, name: str, doc: str):
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
        parser.add_argument("--out", type=Path, default=Path("runs/cases") / name)
        parser.add_argument("--fast", action="store_true", help="tiny sizes, to see that it runs")
        is_script = Path(sys.argv[0]).stem == name  # in a notebook the arguments are the kernel's
        options = parser.parse_args(sys.argv[1:] if is_script else [])
        self.name, self.seeds, self.fast, self.out = name, options.seeds, options.fast, options.out
        question = doc.splitlines()[0]
        self.found: dict[str, Any] = {"question": question, "seeds": self.seeds}
        self.found |= {"tables": {}, "claims": {}, "unexpected": []}
        self.max_tokens = 3 if self.fast else MAX_TOKENS
        self.console = Console(width=124, highlight=False)
        self.console.print(question, style="bold")

    def rng(self, seed: int) -> np.random.Generator:
        """For what a case draws itself, apart from the streams of training."""
        return np.random.default_rng([seed, 2])

    @functools.cached_property
    def desk(self) -> Desk:
        """The desk whose reference is the chain that writes the demonstrations."""
        return Desk(max_tokens=self.max_tokens)

    @functools.cached_property
    def references(self) -> list[Tree]:
        """For each seed a transformer that has learned to imitate the chain."""
        return self._each(_fit, [(seed, self.fast) for seed in self.seeds], "fitting references")

    @functools.cached_property
    def desks(self) -> list[Desk]:
        """For each seed the desk whose reference is that transformer."""
        return [_desk_of(reference, self.max_tokens) for reference in self.references]

    def train(
        self, arms: Arms | Callable[[Desk, int], Arms], measure_every: int = 10
    ) -> dict[str, list[Run]]:
        """Every arm under every seed, side by side: {name: [a Run for each seed]}.

        Args:     arms: by name; or a function that makes them of a seed's desk and the seed.
        """
        pairs = list(zip(self.desks, self.seeds, strict=True))
        of_seeds = [arms(desk, seed) if callable(arms) else arms for desk, seed in pairs]
        setting = (self.max_tokens, self.fast, measure_every)
        jobs = [
            (of_seed[name], reference, seed, *setting)
            for name in of_seeds[0]
            for of_seed, reference, seed in zip(of_seeds, self.references, self.seeds, strict=True)
        ]
        done, n = self._each(_train, jobs, "training policies"), len(self.seeds)
        return {name: done[i * n : (i + 1) * n] for i, name in enumerate(of_seeds[0])}

    def table(self, title: str, rows: dict[str, list[Row]], columns: tuple[str, ...]) -> None:
        """Print mean ± sd over the seeds of each column, and keep the values.

        Args:     rows: {name of the line: [a row for each seed]}; texts are shown as of the first.
        """
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        for name in ("", *columns):
            table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
        for name, of_seeds in rows.items():
            values = [[row[column] for row in of_seeds] for column in columns]
            cells = [v[0] if isinstance(v[0], str) else spread(v) for v in values]
            table.add_row(name, *cells)
        kept = {name: [{c: r[c] for c in columns} for r in of] for name, of in rows.items()}
        self.found["tables"][title] = kept
        self.console.print(table)

    def claim(self, text: str, holds: list[bool]) -> None:
        """Print for how many of the seeds it holds."""
        holds = [bool(truth) for truth in holds]
        self.found["claims"][text] = holds
        self.console.print(f"{sum(holds)} of {len(holds)}: {text}")

    def unexpected(self, text: str) -> None:
        """Print, and keep, an expectation that did not hold."""
        self.found["unexpected"].append(text)
        self.console.print(f"Not as expected: {text}")

    def finish(self, figure: Any, *, varied: str, seen: str) -> None:
        """Print what was seen, and write NAME.png and NAME.json."""
        self.console.print(f"\n{seen}\n")
        picture, numbers = (self.out / f"{self.name}.{kind}" for kind in ("png", "json"))
        self.out.mkdir(parents=True, exist_ok=True)
        save(figure, picture)
        self.found |= {"varied": varied, "seen": seen}
        write_whole(numbers, (json.dumps(self.found, indent=1) + "\n").encode())
        self.console.print(f"picture: {picture}\nnumbers: {numbers}", soft_wrap=True)

    def _each(self, f: Callable[[tuple], Any], jobs: list[tuple], title: str) -> list:
        """[f(job) for each job], two at a time in forked processes where that is safe."""
        keep_freed_memory()
        with threadpool_limits(1), np.errstate(all="ignore"):  # some arms are meant to go wrong
            if self.fast or not CAN_FORK:
                return [f(job) for job in track(jobs, title)]
            with without_interrupts():
                pool = multiprocessing.get_context("fork").Pool(2)
            with pool:
                pending = [pool.apply_async(f, (job,)) for job in jobs]
                return [answer.get() for answer in track(pending, title)]


# -- what is printed and drawn -------------------------------------------------------------------
def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± sd of a number over the seeds, as text."""
    mean, sd = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def ends(runs: dict[str, list[Run]]) -> dict[str, list[Row]]:
    """The last row of every run: what `Case.table` takes."""
    return {name: [run.rows[-1] for run in of_arm] for name, of_arm in runs.items()}


def values(runs: list[Run], column: str) -> np.ndarray:
    """One column of the runs of an arm: (seeds, rows)."""
    return np.array([[row.get(column, np.nan) for row in run.rows] for run in runs])


def mean_lines(runs: dict[str, list[Run]], x: str, y: str) -> dict[str, tuple]:
    """{arm: (means of x, means of y)} over the seeds, for `pictures.draw_lines`."""
    return {
        name: (values(of_arm, x).mean(axis=0), values(of_arm, y).mean(axis=0))
        for name, of_arm in runs.items()
    }


def column(lines: dict[str, list[Row]], name: str) -> dict[str, np.ndarray]:
    """One column of what `Case.table` takes: {line: (seeds,)}."""
    return {line: np.array([row[name] for row in rows]) for line, rows in lines.items()}


# -- what runs in a worker -----------------------------------------------------------------------
def _fit(job: tuple[int, bool]) -> Tree:
    seed, fast = job
    if not fast:
        return tiny_reference(seed)
    short = dataclasses.replace(ground_truth.SFT, steps=30, batch_size=64)
    return tiny_reference(seed, settings=short, max_tokens=3, n_demonstrations=2000)


def _desk_of(reference: Tree, max_tokens: int) -> Desk:
    """The desk whose reference is this transformer."""
    return Desk(max_tokens=max_tokens, ref_log_probs=_chain(max_tokens).world.log_probs(reference))


@functools.cache
def _chain(max_tokens: int) -> Desk:
    return Desk(max_tokens=max_tokens)


def _train(job: tuple) -> Run:
    """All phases of an arm, one after the other, measured every few iterations."""
    arm, reference, seed, max_tokens, fast, measure_every = job
    if isinstance(arm, PairsArm):
        return _train_on_pairs(arm, reference, _desk_of(reference, max_tokens), seed, fast)
    desk, start, first = _desk_of(reference, max_tokens), None, 0
    paid = desk.proxy if arm.reward is None else arm.reward
    rows = [{"iteration": 0, **desk.describe(desk.ref), "paid": float(desk.ref @ paid)}]
    for number, phase in enumerate((arm, *arm.then)):
        if phase.new_reference:
            reference = {"transformer": start["transformer"]}
        settings = phase.settings(fast)
        world = desk.world if phase.reward is None else desk.with_reward(phase.reward)
        same = {"settings": settings, "seed": seed + 1000 * number, "start": start}
        for i, (params, turn) in enumerate(ground_truth.ppo_on_world(world, reference, **same), 1):
            if i % measure_every == 0 or i == settings.iterations:
                log_probs = desk.world.log_probs(params)
                probs = desk.probs(log_probs)
                row = {"iteration": first + i, **desk.describe(probs)}
                row["paid"] = float(probs @ world.rewards)
                row |= mean_of_updates(turn.updates, settings)
                rows.append({**row, "phase": number, "kl_coef": turn.kl_coef})
        start, first = tree_copy(params), first + settings.iterations
    return Run(rows, log_probs, desk.probs(log_probs))


def _train_on_pairs(arm: PairsArm, reference: Tree, desk: Desk, seed: int, fast: bool) -> Run:
    """One phase, measured at its end."""
    rng = np.random.default_rng([seed, 3])
    n = 200 if fast else arm.n_pairs
    pairs = desk.as_pairs(desk.draw_pairs(desk.ref, n, rng=rng, gold=desk.proxy))
    same = {"settings": arm.settings(fast), "seed": seed}
    *_, (params, metrics) = dpo_on_world(desk.world, reference, pairs, **same)
    log_probs = desk.world.log_probs(params)
    probs = desk.probs(log_probs)
    ends = (desk.describe(p) | {"paid": float(p @ desk.proxy)} for p in (desk.ref, probs))
    rows = [{"iteration": i, **row} for i, row in enumerate(ends)]
    return Run([rows[0], {**rows[1], **metrics, "phase": 0}], log_probs, probs)


def dpo_on_world(
    world: TokenWorld, reference: Tree, pairs: list[Pair], *, settings: DPOConfig, seed: int
) -> Iterator[tuple[Tree, dict[str, float]]]:
    """DPO on a world of tokens: the policy, which is written to, and metrics at every update.

    Args:     pairs: of the reference's samples, as from `Desk.draw_pairs` and `as_pairs`.
    """
    same = {"config": world.config, "pad_id": world.stop_id}
    updates, rng = n_updates(len(pairs), settings), np.random.default_rng([seed, 1])
    optimizer = Optimizer(reference, settings.optimizer, total_steps=updates)
    pairs = with_reference(pairs, reference, **same)
    for metrics in train_dpo(optimizer, pairs, settings=settings, rng=rng, **same):
        yield optimizer.params, metrics
