"""This checkout beside another one: whole PPO iterations, in turns.

    git worktree add /tmp/old 20ee5ee
    python tests/benchmarks/compare.py /tmp/old --workloads nano toy --rounds 7

Both are programs of the benchmark, and what they compute is compared first. Given is the median of
the ratios within a round: below 1 this checkout is faster. Beside itself it shows the noise.
"""

import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from bench import OURS, PARTS, columns, quartiles, rounds
from programs import Program
from workloads import WORKLOADS, disagreement, write_workload

from minirlhf.crew import usable_cores
from minirlhf.errors import InputError

THIS = Path(__file__).parents[2]
# Its iteration was not yet the loop of a training: these are the calls of that loop then.
BEFORE_THE_MOVE = """
import minirlhf.app.bench_ours as ours
from minirlhf.train.ppo import rollout_metrics
from minirlhf.train.rollout import sample_ids

make = ours.make_experience

def make_experience(rollout, **known):
    experience = make(rollout, **known)
    rollout_metrics(rollout, experience, **known)
    return experience

def iteration(self):
    self.policy, ends = self.optimizer.params, {"stop_id": ours.NO_STOP, "pad_id": ours.PAD}
    prompts = self.batch.tokens[:, : self.workload.prompt_len].tolist()
    sizes = {"config": self.config, "max_response_tokens": self.workload.response_len}
    batch, _, hidden = sample_ids(self.policy, prompts, rng=self.rng, **ends, **sizes)
    self.learn(batch.tokens, hidden)

ours.make_experience, ours.MiniRLHF.iteration = make_experience, iteration
ours.main()
"""


@dataclass(frozen=True)
class CompareOptions:
    """Time this checkout and another one in turns."""

    old: tyro.conf.Positional[Path]
    """Folder of the other checkout."""
    workloads: tuple[Literal[tuple(WORKLOADS)], ...] = ("nano", "toy")  # type: ignore[valid-type]
    """Which sizes."""
    part: Literal[tuple(PARTS)] = "iteration"  # type: ignore[valid-type]
    """What is timed."""
    rounds: int = 7
    """Times each is asked."""
    threads: int = 0
    """Cores that each may use; 0: all there are."""


def command(checkout: Path) -> list[str]:
    """What starts the program of a checkout, with the package of that checkout."""
    benchmarks = checkout.resolve() / "tests" / "benchmarks"
    if (benchmarks / "ours.py").exists():
        code = "import ours; ours.main()"
    elif (checkout / "minirlhf" / "app" / "bench_ours.py").exists():
        code = BEFORE_THE_MOVE
    else:
        raise InputError(
            f"{checkout}: expected a checkout of minirlhf; found none: name its folder"
        )
    first = [str(checkout.resolve()), str(benchmarks)]
    return [sys.executable, "-c", f"import sys; sys.path[:0] = {first}\n{code}"]


def compare(options: CompareOptions) -> int:
    """Measure and print a line for each workload; 1 if the two compute different things."""
    commands = {"old": command(options.old), OURS: command(THIS)}
    threads, part, status = options.threads or usable_cores(), options.part, 0
    table = [["", "old [ms]", "this [ms]", "this / old", "half of the ratios"]]
    for name in options.workloads:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_workload(folder, name, WORKLOADS[name], threads)
            programs = {
                who: stack.enter_context(Program(words, folder, "", threads))
                for who, words in commands.items()
            }
            for program in programs.values():
                if wrong := disagreement(folder, part, program):
                    print(f"WRONG {name}: {PARTS[part]}: {wrong}")
                    status = 1
            laps = rounds(programs, part, options.rounds, name)
        old, ours = (f"{1e3 * np.median(laps[who]):.1f}" for who in ("old", OURS))
        low, middle, high = quartiles(laps[OURS], laps["old"])
        table.append([name, old, ours, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
    print(f"\n{PARTS[part]}, {options.rounds} rounds, {threads} threads\n\n{columns(*table)}")
    return status


def main(arguments: list[str] | None = None) -> None:
    try:
        status = compare(tyro.cli(CompareOptions, args=arguments, prog="compare.py"))
    except InputError as error:
        print(f"compare: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
