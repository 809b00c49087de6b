"""When is a policy gradient by GAE biased, and how far can PPO's surrogate be followed?

    python examples/05_advantages_and_surrogate.py       # a few seconds

    A_t = td_t + lambda A_{t+1},   td_t = reward_t + V_{t+1} - V_t,
    reward_t = -beta log_ratio_t, and the reward of the whole response at its last token

E[sum_t A_t grad log pi(y_t)] is grad J if lambda = 1, whatever V, or if V is exact, whatever
lambda. Otherwise it is biased; what lambda < 1 buys is less noise. Expect 1e-15 in those two cases
and the bias of a wrong V to shrink as lambda goes to 1.

The second table leaves the policy that sampled, `old`, along grad J and asks whether the gradient
of PPO's surrogate still points along grad J where it has arrived. Expect a cosine of 1 at the start
and the clip to lose the direction long before the unclipped surrogate does: it takes away what is
to be gained by going on with old samples.

Nothing is sampled: every expectation is a sum over all responses of a small world.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from threadpoolctl import threadpool_limits

from minirlhf.app.exact import gae_table as show_gae
from minirlhf.app.exact import surrogate_table as show_surrogate
from minirlhf.app.pictures import draw_advantages
from minirlhf.exact.expected import gather_nodes, policy_gradient_dlogits, relative_error
from minirlhf.exact.experiments import gae_table, make_random_world, surrogate_table
from minirlhf.exact.optimum import objective_gradient, policy_values
from minirlhf.memory import keep_freed_memory
from minirlhf.rlhf.advantages import gae, token_rewards
from minirlhf.rlhf.logprobs import log_softmax


def by_hand(seed: int, beta: float) -> None:
    """The expected gradient in logits for two values and three lambdas, beside grad J."""
    world = make_random_world(seed=seed)  # a random transformer, reference and reward
    tree, responses, logits = world.tree, world.responses, world.logits["theta"]
    log_pi, log_ref = log_softmax(logits), log_softmax(world.logits["ref"])
    on_tree = (tree, log_pi, log_ref, world.rewards)
    grad_j = objective_gradient(*on_tree, kl_coef=beta)  # (N, V)
    exact = policy_values(*on_tree, kl_coef=beta).values  # (N,) V(s), the penalty in it

    nodes, tokens, mask = responses.nodes, responses.tokens, responses.mask  # (M, T) each
    log_ratio = np.where(mask > 0, (log_pi - log_ref)[nodes, tokens], 0.0)
    rewards = token_rewards(world.rewards, log_ratio, mask=mask, kl_coef=beta)
    print(f"{len(mask)} responses, J = {exact[0]:.4f}; error of E[estimate] / |grad J|, in logits:")
    for name, values in (("V exact", exact), ("V = 0", np.zeros_like(exact))):
        for lam in (0.0, 0.95, 1.0):
            advantages, _ = gae(rewards, values[nodes], mask=mask, gamma=1.0, lam=lam)
            dlogits = policy_gradient_dlogits(responses, logits, advantages)  # (M, T, V)
            mean = gather_nodes(tree, responses, dlogits, weights=world.probs("theta"))
            bias = float(relative_error(mean, grad_j))
            print(f"  {name:8} lambda {lam:4.2f}  {bias:8.1e}")
    print()


@threadpool_limits.wrap(limits=1)
def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta", type=float, default=0.5, help="reward units per nat")
    default = Path("runs/examples/05_advantages_and_surrogate.png")
    parser.add_argument("--picture", type=Path, default=default)
    options = parser.parse_args()

    by_hand(options.seed, options.beta)

    bias = gae_table(seed=options.seed, kl_coef=options.beta)
    surrogate = surrogate_table(seed=options.seed, kl_coef=options.beta)
    console = Console(width=110)
    print("the same in the parameters of the transformer, with the noise of one sample:")
    console.print(show_gae(bias))
    console.print(show_surrogate(surrogate))

    free = [row["bias"] for row in bias if row["value"] == "exact" or row["lam"] == 1.0]
    rest = [row["bias"] for row in bias if not (row["value"] == "exact" or row["lam"] == 1.0)]
    noise = {row["lam"]: row["noise"] for row in bias if row["value"] == "exact"}
    print(
        f"With an exact value, or at lambda = 1, the bias is at most {max(free):.0e}; in all other "
        f"cells it is between {min(rest):.2f} and {max(rest):.1f} times |grad J|.\n"
        f"With an exact value lambda = {min(noise):g} has {noise[min(noise)]:.2f} of noise, "
        f"lambda = {max(noise):g} has {noise[max(noise)]:.2f}."
    )
    for name in ("clipped", "unclipped"):
        good = [row["kl_old_seq"] for row in surrogate if row[name] > 0.95]
        last = surrogate[-1]
        print(
            f"{name}: the cosine is above .95 up to KL(old || theta) = {max(good, default=0):.2g}; "
            f"at {last['kl_old_seq']:.2g} it is {last[name]:.2f}"
        )
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    print(f"picture: {draw_advantages(bias, surrogate, options.picture)}")


if __name__ == "__main__":
    main()
