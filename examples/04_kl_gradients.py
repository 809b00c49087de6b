"""Where must the KL penalty stand so that its gradient is the gradient of the KL?

    python examples/04_kl_gradients.py                   # a few seconds

    g = grad KL(pi || ref) = E_{y ~ pi}[ log_ratio(y) grad log pi(y) ],
    log_ratio(y) = log pi(y) - log pi_ref(y)

An estimator of the penalty may have the right mean and yet a derivative with the wrong one. Here
every response of a small world is enumerated, so the mean of a sampled gradient is a sum and not an
estimate: error = |E[estimate] - g| / |g|. Expect 1e-16 or so where a placement is right, and a
tenth or more where it is wrong; the penalty as a loss (k1, the formula as often printed) has a
gradient whose mean is 0.

First by hand, for a policy that is a table of logits (3 tokens, 4 steps, 81 responses); then every
placement, in the parameters of a transformer, with the noise of a single sample.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from threadpoolctl import threadpool_limits

from minirlhf.app.exact import kl_table
from minirlhf.app.pictures import draw_kl
from minirlhf.exact.enumeration import all_responses, enumerate_responses, response_logprobs
from minirlhf.exact.expected import cosine, gather_nodes, penalty_dlogits, relative_error
from minirlhf.exact.experiments import kl_gradient_table
from minirlhf.exact.optimum import evaluate_exactly, objective_gradient
from minirlhf.memory import keep_freed_memory
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.rlhf.logprobs import log_softmax

MODES = ("reward_k1", "loss_k1", "loss_k2_seq", "loss_k2_tok", "loss_full", "loss_rb", "reward_k3")


def by_hand(seed: int) -> None:
    """A table policy, on-policy: the expected gradient in its logits beside g."""
    tree = enumerate_responses(vocab_size=3, max_tokens=4)
    responses = all_responses(tree)
    rng = np.random.default_rng(seed)
    logits, ref_logits = rng.standard_normal((2, tree.n_nodes, tree.vocab_size))  # (N, V) each
    log_pi, log_ref = log_softmax(logits), log_softmax(ref_logits)
    probs = np.exp(response_logprobs(tree, log_pi))  # (M,) of every response
    no_reward = np.zeros_like(probs)

    def exact_kl(logits: np.ndarray) -> float:
        on_tree = (tree, log_softmax(logits), log_ref, no_reward)
        return float(evaluate_exactly(*on_tree, kl_coef=0.0).kl_seq)

    # J = -beta KL without a reward, so beta = -1 makes its gradient that of the KL.
    g = objective_gradient(tree, log_pi, log_ref, no_reward, kl_coef=-1.0)
    step = 1e-5 * rng.standard_normal(logits.shape)
    slope = (exact_kl(logits + step) - exact_kl(logits - step)) / 2
    print(f"{probs.size} responses with probabilities that sum to {probs.sum():.12f}")
    print(f"KL(pi || ref) = {exact_kl(logits):.6f} nats")
    print(f"along a random direction g says {(g * step).sum() / 1e-5:+.8f}", end=", ")
    print(f"a central difference {slope / 1e-5:+.8f}\n")

    print(f"{'kl_mode':12}  {'error':>8}  {'cosine':>7}   what its expected gradient is")
    for kl_mode in MODES:
        dlogits = penalty_dlogits(  # (M, T, V) what each response contributes
            responses, logits, old_logits=logits, ref_logits=ref_logits, kl_mode=kl_mode
        )
        mean = gather_nodes(tree, responses, dlogits, weights=probs)  # (N, V), summed with p(y)
        error = float(relative_error(mean, g))
        vanishes = np.abs(mean).max() < 1e-12 * np.abs(g).max()
        angle = "none" if vanishes else f"{float(cosine(mean, g)):+.3f}"
        print(f"{kl_mode:12}  {error:8.1e}  {angle:>7}   {KL_MODES[kl_mode].gradient}")


@threadpool_limits.wrap(limits=1)
def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("runs/examples/04_kl_gradients.png"))
    options = parser.parse_args()

    by_hand(options.seed)

    rows = kl_gradient_table(seed=options.seed)
    print("\nand in the parameters of a transformer (4 tokens, 4 steps), every placement:")
    Console(width=110).print(kl_table(rows))
    right = [row for row in rows if row["error"] < 1e-8]
    wrong = [row for row in rows if row["error"] >= 1e-8]
    calm, wild = (pick(right, key=lambda row: row["noise"]) for pick in (min, max))
    print(
        f"{len(right)} of {len(rows)} placements have the gradient of the KL, to "
        f"{max(row['error'] for row in right):.0e} of its length; the other {len(wrong)} are off "
        f"by {min(row['error'] for row in wrong):.2f} to "
        f"{max(row['error'] for row in wrong):.1f} times its length.\n"
        f"Among the right ones the noise of one sample runs from {calm['noise']:.2f} "
        f"({calm['name']}) to {wild['noise']:.1f} ({wild['name']})."
    )
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    print(f"picture: {draw_kl(rows, options.picture)}")


if __name__ == "__main__":
    main()
