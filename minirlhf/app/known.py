"""The tiny desk for page.html: a world whose optimum is known at every beta, to play with.

Its replies are the leaves of a tree; what is known of a prefix is a sum over the leaves below it,
which a browser does too. `data` has what it needs; the rest stands there without JavaScript.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from minirlhf.app.charts import Line, chart
from minirlhf.disk import plain
from minirlhf.exact import ground_truth, optimum, tiny
from minirlhf.exact.enumeration import Responses, all_responses, response_logprobs
from minirlhf.exact.ground_truth import GroundTruth

Row = dict[str, Any]
BETAS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0)


def known_world(*, iterations: int = 20, max_tokens: int = 5) -> Row:
    """Train a policy there by PPO: it, its reference and the optima, exactly; 19,608 replies."""
    rng = np.random.default_rng(0)
    world = tiny.make_tiny_world(max_tokens=max_tokens, n_demonstrations=1, rng=rng)
    reference = tiny.tiny_reference(0, max_tokens=max_tokens)
    settings = replace(ground_truth.PPO, iterations=iterations)
    where = {"config": ground_truth.small_transformer(world), "kl_coef": settings.kl_coef}
    truth = ground_truth.make_ground_truth(world, reference, **where)
    trained = ground_truth.train_on_world(truth, settings=settings, seed=0)
    end, tree, policy = trained.history[-1], world.tree, truth.log_probs(trained.params)
    numbers = {
        "parent": np.concatenate([tree.parent, tree.leaf_node]),
        "token": np.concatenate([tree.token, tree.leaf_token]),
        "reward": world.rewards,
        "gold": world.gold,
        "ref": response_logprobs(tree, truth.ref_log_probs),
        "policy": response_logprobs(tree, policy),
    }
    shown = {
        "likeliest under the reference": int(numbers["ref"].argmax()),
        "best by gold": int(world.gold.argmax()),
        "best by proxy": int(world.rewards.argmax()),
    }
    data = {"kl_coef": truth.kl_coef, "tokens": world.tokens, "shown": [*shown.values()]}
    data |= {name: of.round(5).tolist() for name, of in numbers.items()}
    replies = all_responses(tree)
    rows = [optimum_at(truth, replies, beta) for beta in np.geomspace(20.0, 0.03, 40)]
    root, d = end["exact/kl_seq"] ** 0.5, [row["kl_seq"] ** 0.5 for row in rows]
    lines = [
        Line("proxy of π*", d, [row["proxy"] for row in rows]),
        Line("gold of π*", d, [row["gold"] for row in rows], "l1"),
        Line("PPO", [root, root], [end["exact/reward"], end["exact/gold"]], "l4 loose", dots=True),
    ]
    return {
        "data": data,
        "end": end,
        "iterations": iterations,
        "optima": [optimum_at(truth, replies, beta) for beta in BETAS],
        "chart": chart("the frontier", "reward units", "√KL to the reference [√nats]", lines),
        "replies": {name: priced(truth, replies, i, policy) for name, i in shown.items()},
    }


def optimum_at(truth: GroundTruth, replies: Responses, beta: float) -> Row:
    """What pi* ~ pi_ref exp(r / beta) is worth, and what it says most often."""
    world, ref = truth.world, truth.ref_log_probs
    best = optimum.soft_optimum(world.tree, ref, world.rewards, kl_coef=beta).log_probs
    value = optimum.evaluate_exactly(world.tree, best, ref, world.rewards, kl_coef=beta)
    p = np.exp(response_logprobs(world.tree, best))
    said = replies.tokens[p.argmax()][replies.mask[p.argmax()] > 0]
    row = {"beta": beta, "reply": " ".join(world.tokens[a] for a in said), "share": p.max()}
    row |= {"proxy": value.reward, "gold": p @ world.gold}
    return plain(row | {"kl_seq": value.kl_seq, "objective": value.objective})


def priced(truth: GroundTruth, replies: Responses, leaf: int, policy: np.ndarray) -> list[Row]:
    """Of each token of a reply log pi* - log pi_ref, and what is known of its prefix s.

    best is V*(s), value and q are V(s) and Q(s, a) of the policy, and lost is beta Pr(s)
    KL(pi(.|s) || pi*(.|s)), which over all prefixes sums to J* - J.
    """
    tree, ref, best = truth.world.tree, truth.ref_log_probs, truth.optimum
    ours = optimum.policy_values(tree, policy, ref, truth.world.rewards, kl_coef=truth.kl_coef)
    lost = optimum.optimality_gap(tree, policy, best)
    said, rows = replies.mask[leaf] > 0, []
    for s, a in zip(replies.nodes[leaf, said], replies.tokens[leaf, said], strict=True):
        row = {"token": truth.world.tokens[a], "d": best.log_probs[s, a] - ref[s, a]}
        row |= {"best": best.values[s], "value": ours.values[s], "q": ours.q[s, a]}
        rows.append(plain(row | {"lost": lost[s]}))
    return rows
