"""trlX's randomwalks, with the exact optimum of the model beside what PPO makes of it.

    python examples/randomwalks.py                       # about a minute on two cores
    python examples/randomwalks.py --graph-seed 1002     # the other graph of the benchmark

21 letters on a directed graph; a prompt is a start letter, a response a walk to the goal `a` in as
few letters as possible. optimality is 1 for a shortest walk and 0 for one that breaks an edge or
never arrives. A small transformer imitates 1,000 random walks, then PPO maximises

    J(pi) = E_pi[optimality] - beta KL(pi || ref),    J* = beta log Z, the mean over the 20 starts

from samples. Every prefix that is alive can be enumerated (27,544 on graph 1000), so J, J* and the
optimality are exact, and of *this* model: its reference is not the uniform walk. Expect J/J* of
about .99 for both beta. At beta = .1 the optimum itself is content with an optimality below 1, so
there more optimality is a worse run; at beta = .02 it is 1 and both go together.

J leaves out the KL of letters after a broken edge, which is at most beta P(illegal) times that KL.
"""

import argparse
import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from minirlhf.app import pictures
from minirlhf.exact.ground_truth import (
    PPO,
    SFT,
    TokenWorld,
    fit_reference,
    make_ground_truth,
    sample_world,
    train_on_world,
)
from minirlhf.exact.optimum import evaluate_exactly
from minirlhf.memory import keep_freed_memory
from minirlhf.tree import Tree
from walks_on_a_graph import letters, make_graph, make_randomwalks, measure_leaves

SFT_HERE = dataclasses.replace(SFT, steps=300, batch_size=128)
BETAS = (0.1, 0.02)
# With a clip of .2, at a rate of 2e-3 or without its rise over five iterations, some models lose a
# start letter (J/J* of .83 to .94 at beta = .02); so, 16 of 16 came to .994 or more.
OPTIMIZER = dataclasses.replace(PPO.optimizer, learning_rate=1e-3, max_grad_norm=0.5, warmup=80)
CLIP_EPS = 0.1
N_SAMPLES = 20_000
SHOWN = ("f", "m", "p", "u")  # starts whose walks are printed


def train(graph_seed: int, seed: int, beta: float, iterations: int, reference: Tree) -> dict:
    """PPO for one beta, in a process of its own: the table's row, the history, some walks."""
    keep_freed_memory()
    world = make_randomwalks(seed=graph_seed)
    truth = make_ground_truth(world, reference, kl_coef=beta)
    changes = {"kl_coef": beta, "iterations": iterations, "clip_eps": CLIP_EPS}
    settings = dataclasses.replace(PPO, **changes, optimizer=OPTIMIZER)
    trained = train_on_world(truth, settings=settings, seed=seed)
    end = trained.history[-1]

    tree, policy = world.tree, world.log_probs(trained.params)
    best = evaluate_exactly(
        tree, truth.optimum.log_probs, truth.ref_log_probs, world.rewards, kl_coef=beta
    )
    illegal = measure_leaves(make_graph(graph_seed), tree).illegal
    return {
        "seed": seed,
        "beta": beta,
        "J*": end["exact/optimum"],
        "J/J*": end["exact/objective"] / end["exact/optimum"],
        "centred": end["exact/fraction"],
        "reference": truth.ref_reward,
        "optimum": float(best.reward),
        "policy": end["exact/reward"],
        "KL*": float(best.kl_seq),
        "KL": end["exact/kl_seq"],
        "P(illegal)": float(evaluate_exactly(tree, policy, policy, illegal, kl_coef=0.0).reward),
        "history": trained.history,
        "walks": some_walks(trained.params, world),
    }


def some_walks(params: Tree, world: TokenWorld) -> list[str]:
    """One sampled walk from each start of SHOWN, with its optimality."""
    drawn = sample_world(params, world, len(world.prompts), rng=np.random.default_rng(0))
    optimality = world.score(drawn.prompt_ids, drawn.response_ids)
    starts, ways = ([letters(ids) for ids in of] for of in (drawn.prompt_ids, drawn.response_ids))
    walks = zip(starts, ways, optimality, strict=True)
    return [f"{start}{way} {r:.2f}" for start, way, r in walks if start in SHOWN]


def draw(rows: list[dict], path: Path) -> None:
    """J/J* and the optimality over training, means over the seeds; of the optimum as well."""
    figure, ((left, right),) = pictures.new_figure(9.5, 3.6, 1, 2)
    shares, rewards = {}, {}
    for beta, look in zip(BETAS, pictures.LOOKS, strict=False):
        same = [row for row in rows if row["beta"] == beta]
        x = [point["iteration"] for point in same[0]["history"]]
        share = [[point["exact/objective"] / row["J*"] for point in row["history"]] for row in same]
        reward = [[point["exact/reward"] for point in row["history"]] for row in same]
        shares[f"β = {beta:g}"] = (x, np.mean(share, axis=0))
        rewards[f"β = {beta:g}"] = (x, np.mean(reward, axis=0))
        best = np.mean([row["optimum"] for row in same])
        right.axhline(best, ls=":", color=look["color"], label=f"of the optimum, β = {beta:g}")
    pictures.draw_lines(left, shares)
    pictures.draw_lines(right, rewards)
    pictures.say(left, "J / J*: 1 is the model's own optimum", "PPO iteration", "share of J*")
    title = "optimality: 1 is a shortest walk; PPO goes to that of the optimum"
    pictures.say(right, title, "PPO iteration", "E[optimality]")
    print(f"picture: {pictures.save(figure, path)}")


@threadpool_limits.wrap(limits=1)
def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graph-seed", type=int, default=1000, help="of graph and random walks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of model and PPO")
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--picture", type=Path, default=Path("runs/examples/randomwalks.png"))
    options = parser.parse_args()

    world = make_randomwalks(seed=options.graph_seed)
    uniform = world.demonstrator  # a uniform step along the edges
    exact = evaluate_exactly(world.tree, uniform, uniform, world.rewards, kl_coef=0.0)
    print(f"graph {options.graph_seed}: {world.tree.n_nodes:,} prefixes", end=", ")
    print(f"{world.rewards.size:,} responses; the uniform walk: {exact.reward:.4f}", flush=True)
    references = {
        seed: fit_reference(world, settings=SFT_HERE, seed=seed) for seed in options.seeds
    }

    context = multiprocessing.get_context("spawn")
    with context.Pool(2, initializer=threadpool_limits, initargs=(1,)) as pool:
        jobs = [
            (options.graph_seed, seed, beta, options.iterations, reference)
            for seed, reference in references.items()
            for beta in BETAS
        ]
        training = pool.starmap_async(train, jobs, chunksize=1)
        sampled = {seed: sample_optimality(p, world) for seed, p in references.items()}
        rows = training.get()

    columns = [name for name in rows[0] if name not in ("seed", "beta", "history", "walks")]
    print(f"\n{'':45}{'optimality E[r] of the':^33}{'KL of optimum, policy':>22}")
    print("seed   beta " + "".join(f"{name:>11}" for name in columns))
    for row in rows:
        cells = "".join(f"{row[name]:11.4f}" for name in columns)
        print(f"{row['seed']:4} {row['beta']:6g} {cells}")
    for seed, (mean, error) in sampled.items():
        exact = next(row["reference"] for row in rows if row["seed"] == seed)
        print(f"\nReference of seed {seed}: exact optimality {exact:.4f}, of {N_SAMPLES:,} samples")
        print(f"{mean:.4f} +- {error:.4f}: {(mean - exact) / error:+.1f} standard errors away.")
        beta, best = max((row["beta"], row["optimum"]) for row in rows if row["seed"] == seed)
        print(f"At beta = {beta:g} the optimum itself has {best:.4f}: a policy with more has paid")
        print("more for it in KL than it is worth, so that is a worse run and not a better one.")
    print("\nwalks with their optimality")
    seed = options.seeds[0]
    print(f"  reference   {'   '.join(some_walks(references[seed], world))}")
    for row in rows:
        if row["seed"] == seed:
            print(f"  beta {row['beta']:<6g} {'   '.join(row['walks'])}")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, options.picture)


def sample_optimality(params: Tree, world: TokenWorld) -> tuple[float, float]:
    """Mean optimality of sampled walks and its standard error."""
    drawn = sample_world(params, world, N_SAMPLES, rng=np.random.default_rng(1))
    optimality = world.score(drawn.prompt_ids, drawn.response_ids)
    return float(optimality.mean()), float(optimality.std() / N_SAMPLES**0.5)


if __name__ == "__main__":
    main()
