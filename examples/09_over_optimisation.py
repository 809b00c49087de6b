"""How much of a learned reward should be taken? The exact curve of over-optimisation.

    python examples/09_over_optimisation.py              # about 40 s on two cores

    pi_beta(y) ~ pi_ref(y) exp(proxy(y) / beta)  has the largest E[proxy] of all with its KL

The proxy is linear in the counts of tokens, the gold reward saturates: so the proxy rises for ever
and the gold reward turns. Along the family pi_beta both are exact here, and so is best-of-n, the
best of n draws from the reference by the proxy:

    q(y) = ref(y) (F(r)^n - F-(r)^n) / (F(r) - F-(r)),   KL <= log n - (n-1)/n

Expect the proxy to rise all the way, gold to rise, turn and end below the reference, best-of-n to
have less proxy and more gold at the same KL, and PPO, trained from samples at several beta, to lie
just under the curve of the proxy: no policy at its KL can lie above. The laws of Gao et al. (2022),
d (a - b d) and d (a - b log d) with d = sqrt(KL), are fitted to the gain in gold.
"""

import argparse
import multiprocessing
from pathlib import Path

import numpy as np
from rich.console import Console
from threadpoolctl import threadpool_limits

from minirlhf.app.exact import gao_table, overoptimisation_table
from minirlhf.app.pictures import draw_overoptimisation
from minirlhf.exact.experiments import (
    TrainingRun,
    overoptimisation,
    overoptimisation_runs,
    train_run,
)
from minirlhf.exact.ground_truth import fit_reference, log_probs_on_tree, small_transformer
from minirlhf.exact.optimum import frontier_reward
from minirlhf.exact.tiny import make_tiny_world
from minirlhf.memory import keep_freed_memory
from minirlhf.tree import Tree


def train(run: TrainingRun, seed: int, reference: Tree) -> dict:
    """One policy, in a process of its own, which makes its own copy of the world."""
    keep_freed_memory()
    world = make_tiny_world(n_demonstrations=1, rng=np.random.default_rng(0))
    return train_run(run, world, reference, config=small_transformer(world), seed=seed)


@threadpool_limits.wrap(limits=1)
def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--betas", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=60, help="of PPO")
    default = Path("runs/examples/09_over_optimisation.png")
    parser.add_argument("--picture", type=Path, default=default)
    options = parser.parse_args()
    seed = options.seed

    world = make_tiny_world(rng=np.random.default_rng([seed, 0]))
    config = small_transformer(world)
    reference = fit_reference(world, config=config, seed=seed)
    ref = log_probs_on_tree(reference, world=world, config=config)  # (N, V) the model's own

    context = multiprocessing.get_context("spawn")
    with context.Pool(2, initializer=threadpool_limits, initargs=(1,)) as pool:
        runs = overoptimisation_runs(iterations=options.iterations, betas=options.betas)
        jobs = [(run, seed, reference) for run in runs]
        training = pool.starmap_async(train, jobs, chunksize=1)
        result = overoptimisation(world, ref)  # the curve, best-of-n and the fits
        ends = training.get()

    Console(width=110).print(overoptimisation_table(result, ends))
    Console(width=110).print(gao_table(result["fits"]))

    curve, start = result["curve"], result["reference"]
    top = max(curve, key=lambda row: row["gold"])
    print(f"reference: proxy {start['reward']:.3f}, gold {start['gold']:.3f}")
    rises = bool((np.diff([row["reward"] for row in curve]) > 0).all())
    print(
        f"along the curve the proxy {'rises' if rises else 'does not rise'} at every step; ", end=""
    )
    print(f"gold is highest at beta = {top['kl_coef']:g}: {top['gold']:.3f}, ", end="")
    print(f"KL {top['kl_seq']:.2f}, and ends at {curve[-1]['gold']:.3f}")
    drawn = max(result["best_of_n"], key=lambda row: row["gold"])
    print(f"best-of-n is best at n = {drawn['n']}: {drawn['gold']:.3f}, KL {drawn['kl_seq']:.2f}")

    print("\nPPO: E[proxy] beside the most that any policy has at the same KL")
    below = 0
    for run in ends:
        end = run["history"][-1]
        kl_seq, reward = end["exact/kl_seq"], end["exact/reward"]
        most = frontier_reward(world.tree, ref, world.rewards, kl_seq=kl_seq)
        below += reward <= most
        print(f"  beta {run['kl_coef']:<5g} KL {kl_seq:7.3f}  {reward:.4f} <= {most:.4f}", end="  ")
        print(f"{most - reward:.4f} below; gold {end['exact/gold']:+.3f}")
    print(f"{below} of {len(ends)} trained policies lie under the exact curve")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    print(f"picture: {draw_overoptimisation(result, ends, options.picture)}")


if __name__ == "__main__":
    main()
