"""Does it matter for training where the penalty stands, and how the ratio is clipped?

    python examples/08_placement_and_clip.py             # about 40 s on two cores

    J(pi) = E_pi[r] - beta KL(pi || ref),   fraction = (J - J(ref)) / (J* - J(ref))

Example 04 says which placements of the penalty have the right gradient. Here the same PPO is
trained with five of them, right and wrong, with the same samples at the start and beta = 0.5, and
compared by its exact fraction of the optimum. Expect the right ones near 1, per-token losses below
(their gradient is partial, or belongs to another KL), and the penalty as a loss (k1, as often
printed) far below 0: its mean gradient is 0, so nothing holds the policy.

The second table makes PPO's steps large (8 epochs, a learning rate of 8e-3 that stays) and compares
its clip with min(ratio, 1 + eps) A, as some textbooks print it, and with none. Expect them in this
order. Fewer iterations than in example 07 keep it short: 40 and 30 instead of 150.
"""

import argparse
import multiprocessing
from pathlib import Path

import numpy as np
from rich.console import Console
from threadpoolctl import threadpool_limits

from minirlhf.app.exact import runs_table
from minirlhf.app.pictures import draw_runs
from minirlhf.exact.experiments import TrainingRun, clip_runs, placement_runs, train_run
from minirlhf.exact.ground_truth import fit_reference, small_transformer
from minirlhf.exact.tiny import make_tiny_world
from minirlhf.memory import keep_freed_memory
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.tree import Tree


def train(run: TrainingRun, seed: int, reference: Tree) -> dict:
    """One policy, in a process of its own, which makes its own copy of the world."""
    keep_freed_memory()
    world = make_tiny_world(n_demonstrations=1, rng=np.random.default_rng(0))
    config = small_transformer(world)
    with np.errstate(all="ignore"):  # some of these runs are meant to go wrong
        return train_run(run, world, reference, config=config, seed=seed)


@threadpool_limits.wrap(limits=1)
def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, nargs=2, default=(40, 30), metavar=("A", "B"))
    default = Path("runs/examples/08_placement_and_clip.png")
    parser.add_argument("--picture", type=Path, default=default)
    options = parser.parse_args()
    seed, (of_placements, of_clips) = options.seed, options.iterations

    world = make_tiny_world(rng=np.random.default_rng([seed, 0]))
    reference = fit_reference(world, config=small_transformer(world), seed=seed)

    runs = clip_runs(iterations=of_clips) + placement_runs(iterations=of_placements)
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, initializer=threadpool_limits, initargs=(1,)) as pool:
        results = pool.starmap(train, [(run, seed, reference) for run in runs], chunksize=1)
    placements = [row for row in results if row["part"] == "placement"]
    clips = [row for row in results if row["part"] == "clip"]

    console = Console(width=110)
    console.print(runs_table(placements, "the penalty in other places"))
    print("expected gradient of each, with g = grad KL(pi || ref):")
    for run in placement_runs():
        print(f"  {run.name:28} {KL_MODES[run.settings.kl_mode].gradient}")
    print()
    console.print(runs_table(clips, "three clips, large steps"))
    for title, rows in (("placement", placements), ("clip", clips)):
        share = {row["name"]: row["history"][-1]["exact/fraction"] for row in rows}
        order = sorted(share, key=share.get, reverse=True)
        print(f"{title}, best first: {' > '.join(order)}")
        worse = [name for name in order if share[name] < 0]
        print(f"  worse than the reference: {', '.join(worse) or 'none'}")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    groups = {"placement of the penalty": placements, "clip, with large steps": clips}
    print(f"picture: {draw_runs(groups, options.picture)}")


if __name__ == "__main__":
    main()
