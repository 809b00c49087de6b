"""How close does PPO come to the exact optimum, and what keeps it away?

    python examples/07_ppo_against_the_optimum.py        # under a minute on two cores

    J(pi) = E_pi[r] - beta KL(pi || ref),   J* = beta log Z,
    J* - J(pi) = beta KL(pi || pi*) = sum over prefixes s of beta Pr(s) KL(pi(.|s) || pi*(.|s))

A small transformer learns to imitate the tiny support desk: that is the reference. Its own optimum
is known, because all 137,257 replies can be enumerated. Then it is trained from samples, in three
ways: PPO with a learning rate that falls to 0, PPO with a constant rate, and one-step REINFORCE
with a leave-one-out baseline (RLOO). Where each stands is exact and has no error bar.

fraction = (J - J(ref)) / (J* - J(ref)): 0 at the reference, 1 at the optimum. Expect .998 with the
falling rate and with RLOO, and a constant rate to lose several times as much and to fluctuate. The
last table splits what is lost by the position of the token.
"""

import argparse
import multiprocessing
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from minirlhf.app.pictures import draw_optimum
from minirlhf.exact.experiments import TrainingRun, optimum_runs, train_run
from minirlhf.exact.ground_truth import fit_reference, make_ground_truth, small_transformer
from minirlhf.exact.optimum import evaluate_exactly
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
    parser.add_argument("--beta", type=float, default=0.5, help="reward units per nat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=100)
    default = Path("runs/examples/07_ppo_against_the_optimum.png")
    parser.add_argument("--picture", type=Path, default=default)
    options = parser.parse_args()
    beta, seed = options.beta, options.seed

    world = make_tiny_world(rng=np.random.default_rng([seed, 0]))
    config = small_transformer(world)
    reference = fit_reference(world, config=config, seed=seed)

    truth = make_ground_truth(world, reference, config=config, kl_coef=beta)
    best = truth.optimum
    at_best = evaluate_exactly(
        world.tree, best.log_probs, truth.ref_log_probs, world.rewards, kl_coef=beta
    )
    print(f"{world.rewards.size:,} replies; J(ref) = {truth.ref_reward:.4f}")
    print(f"J* = beta log Z = {best.objective:.6f}, J of pi* itself = {at_best.objective:.6f}")
    print(f"at pi*: E[r] = {at_best.reward:.4f}, KL = {at_best.kl_seq:.4f} nats\n", flush=True)

    runs = optimum_runs(iterations=options.iterations, betas=(beta,))
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, initializer=threadpool_limits, initargs=(1,)) as pool:
        jobs = [(run, seed, reference) for run in runs]
        results = {row["name"]: row for row in pool.starmap(train, jobs, chunksize=1)}

    print("fraction of the optimum")
    print(f"{'iteration':>18}" + "".join(f"{name:>20}" for name in results))
    histories = [row["history"] for row in results.values()]
    for rows in list(zip(*histories, strict=True))[:: max(1, len(histories[0]) // 5)]:
        cells = "".join(f"{row['exact/fraction']:20.4f}" for row in rows)
        print(f"{rows[0]['iteration']:18}{cells}")
    print(f"{'seconds':>18}" + "".join(f"{row['seconds']:20.0f}" for row in results.values()))

    print("\nwhat is lost at each token, as a share of J* - J(ref)")
    ends = {name: row["history"][-1] for name, row in results.items()}
    positions = range(1, world.max_response_tokens + 1)
    print(f"{'':18}" + "".join(f"{f'token {t}':>10}" for t in positions) + f"{'sum':>10}")
    for name, end in ends.items():
        lost = end["exact/gap_by_depth"]
        print(f"{name:18}" + "".join(f"{x:10.5f}" for x in [*lost, sum(lost)]))

    linear, constant = (ends[f"PPO, {rate}"] for rate in ("linear decay", "constant rate"))
    gaps = np.array([end["exact/gap_by_depth"] for end in (linear, constant)])
    worst = int(gaps[1].argmax())
    late = [row["exact/fraction"] for row in results["PPO, constant rate"]["history"][-5:]]
    print(
        f"\nThe constant rate loses {gaps[1].sum() / gaps[0].sum():.1f} times as much as the "
        f"falling one: {(gaps[1] / gaps[0]).min():.1f} to {(gaps[1] / gaps[0]).max():.1f} times as "
        f"much at each token,\nand the largest share at token {worst + 1} "
        f"({gaps[1, worst] / gaps[1].sum():.0%}). Over its last {len(late)} measurements it moved "
        f"between {min(late):.4f} and {max(late):.4f}.\n"
        "Var(r - beta log_ratio), 0 at the optimum: "
        + ", ".join(f"{name} {end['exact/flatness']:.1e}" for name, end in ends.items())
    )
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    print(f"picture: {draw_optimum(list(results.values()), options.picture)}")


if __name__ == "__main__":
    main()
