"""How does one know that a policy is optimal? r - beta log_ratio is the same for every reply.

    python examples/06_flatness.py                       # a few seconds

    pi*(y) = pi_ref(y) exp(r(y) / beta) / Z    maximises    J(pi) = E_pi[r] - beta KL(pi || pi_ref)

Taking logs, r(y) - beta log_ratio(y) = beta log Z = J* for every reply y, however good or bad. So
the penalty is no wall but a spring: a reply whose reward is r gets the log-ratio r / beta - log Z
and no more. Expect one number in the last column of the first table, at the optimum only.

It follows that at the optimum a sampled policy gradient with the penalty of the same sample (k1) in
the reward is 0 for every single reply: no noise is left. With the KL over the whole vocabulary
instead noise remains, because beta sum_t KL_t still varies from reply to reply. The second table
shows the variance of one sample on the way from the reference, where the two are equal.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from threadpoolctl import threadpool_limits

from minirlhf.app.exact import flatness_table as show_flatness
from minirlhf.app.pictures import draw_flatness
from minirlhf.exact.enumeration import all_responses, response_logprobs
from minirlhf.exact.experiments import flatness_table
from minirlhf.exact.optimum import evaluate_exactly, soft_optimum, tilt
from minirlhf.exact.tiny import make_tiny_world
from minirlhf.memory import keep_freed_memory

REPLIES = ("ANS", "ANS DET", "ANS DET ANS DET ANS DET", "POL ANS DET", "HED HED REF", "UNS")


def make_world(max_tokens: int):
    """The tiny support desk; its reference here is the Markov chain itself, nothing is trained."""
    return make_tiny_world(max_tokens=max_tokens, n_demonstrations=1, rng=np.random.default_rng(0))


@threadpool_limits.wrap(limits=1)
def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beta", type=float, default=0.5, help="reward units per nat")
    parser.add_argument("--picture", type=Path, default=Path("runs/examples/06_flatness.png"))
    options = parser.parse_args()
    beta = options.beta

    world = make_world(max_tokens=6)
    tree, log_ref, rewards = world.tree, world.demonstrator, world.rewards
    best = soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    _, log_z = tilt(tree, log_ref, rewards, kl_coef=beta)  # the same reply by reply
    logp, ref_logp = (response_logprobs(tree, table) for table in (best.log_probs, log_ref))
    log_ratio = logp - ref_logp  # (M,) of every reply
    flat = rewards - beta * log_ratio

    responses = all_responses(tree)
    everything = zip(responses.tokens, responses.mask, strict=True)
    texts = [world.text([i for i in ids[m > 0] if i != world.stop_id]) for ids, m in everything]
    print(f"beta = {beta:g}, {len(texts):,} replies, beta log Z = {beta * float(log_z[0]):.6f}")
    head = f"{'reply':24} {'ref':>9} {'optimum':>9} {'r':>8} {'log_ratio':>10}"
    print(f"{head} {'r - beta log_ratio':>19}")
    for text in REPLIES:
        y = texts.index(text)
        chances = f"{np.exp(ref_logp[y]):9.2e} {np.exp(logp[y]):9.2e}"
        print(f"{text:24} {chances} {rewards[y]:+8.3f} {log_ratio[y]:+10.3f} {flat[y]:19.6f}")
    print(f"over all replies it lies between {flat.min():.12f} and {flat.max():.12f}")
    for name, table in (("reference", log_ref), ("optimum", best.log_probs)):
        value = evaluate_exactly(tree, table, log_ref, rewards, kl_coef=beta)
        objective = round(float(value.objective), 6) + 0.0  # no -0.000000
        print(f"{name:9}  J = {objective:.6f}   Var(r - beta log_ratio) = {value.flatness:.2g}")

    rows = flatness_table(make_world(max_tokens=4), kl_coef=beta)  # shorter replies: 2,801 of them
    Console(width=100).print(show_flatness(rows))
    first, last = rows[0], rows[-1]
    calmer = sum(row["k1"] < row["full"] for row in rows)
    print(
        f"At the reference one sample's variance is {first['k1']:.3f} by k1 and "
        f"{first['full']:.3f} by the full KL; at the optimum {last['k1']:.0e} and "
        f"{last['full']:.3f}.\n"
        f"k1 is the less noisy one in {calmer} of {len(rows)} rows."
    )
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    print(f"picture: {draw_flatness(rows, options.picture)}")


if __name__ == "__main__":
    main()
