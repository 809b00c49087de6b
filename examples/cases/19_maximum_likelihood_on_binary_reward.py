"""Right or wrong: should one raise the mean of p, or the mean of log p?

    python examples/cases/19_maximum_likelihood_on_binary_reward.py        # 2 s on two cores

With a reward of 0 or 1, RL raises the mean over prompts of p, the chance to be right. MaxRL (arXiv
2602.02710) raises log p = -sum_k fail@k / k instead, fail@k = (1 - p)^k: pass@k for all k. Cut off
at K, the gradient of p gets the weight sum_{k<=K} (1 - p)^(k-1) = (1 - (1-p)^K) / p, which dividing
by the mean reward of K draws gives on average: 1 for K = 1 (RL), 1/p for all k. The paper reports a
Pareto gain over GRPO (weight 1/sd). Here 48 prompts from p = 1e-4 to 0.5 share a linear policy; the
gradients are exact, steps and Adam the same. Varied are the weight and the room in the policy.

Expect RL to leave hard prompts behind, for grad p = p grad log p, and 1/p to reach them. The Pareto
gain should hold where there is room for all; without room 1/p buys pass@n with pass@1: it keeps
every prompt possible and none sure. log p itself needs about 1/p draws; K = 16 is what 16 draws can
give. GRPO's weight, too, is here that of endless draws. Control: prompts that are equally hard. To
see it differently change ROOM. (The paper's 7.9 to 19.2 times fewer draws at test time are not
reproduced; neither a language model nor sampling noise is here.)
"""

# %% A world: prompts of different difficulty, one right reply each, features that they share
import math

import numpy as np

from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.rlhf.logprobs import log_softmax
from study import Case, spread

case = Case("19_maximum_likelihood_on_binary_reward", __doc__)
PROMPTS, REPLIES, STEPS, RATE = 48, 32, 20 if case.fast else 200, 0.05
ROOM = {"room": 24, "no room": 8}  # features of a prompt
ROWS, DRAWS = np.arange(PROMPTS), (1, 16, 256)


def make_world(rng, n_features, hardest=1e-4, easiest=0.5):
    """Features (X, d), number of the right reply (X,), log-probs at the start (X, A)."""
    features = rng.standard_normal((PROMPTS, n_features)) / math.sqrt(n_features)
    right, start = rng.integers(REPLIES, size=PROMPTS), rng.standard_normal((PROMPTS, REPLIES))
    p = np.exp(rng.uniform(math.log(hardest), math.log(easiest), PROMPTS))
    start[ROWS, right] = -np.inf
    start = log_softmax(start) + np.log1p(-p)[:, None]
    start[ROWS, right] = np.log(p)
    return features, right, start


RL, GRPO, MAXRL = "p (RL)", "1/sd (GRPO)", "log p (MaxRL)"
WEIGHTS = {RL: lambda p: 1 + 0 * p, GRPO: lambda p: (p * (1 - p) + 1e-8) ** -0.5}
WEIGHTS |= {"K = 16": lambda p: (1 - (1 - p) ** 16) / p, MAXRL: lambda p: 1 / p}


# %% Gradient ascent on the mean over prompts, p known exactly
def gradient(world, w, weight):
    """p (X,), and the gradient of the mean of f(p) in w (d, A), where weight = f'."""
    features, right, start = world
    pi = np.exp(log_softmax(start + features @ w))
    p = pi[ROWS, right]
    of_logits = -pi * p[:, None]
    of_logits[ROWS, right] += p
    return p, features.T @ (weight(p)[:, None] * of_logits) / PROMPTS


def train(world, weight):
    w, mean, square = np.zeros((world[0].shape[1], REPLIES)), 0.0, 0.0
    for i in range(1, STEPS + 1):
        _, g = gradient(world, w, weight)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        w = w + RATE * mean / (1 - 0.9**i) / (np.sqrt(square / (1 - 0.999**i)) + 1e-12)
    return gradient(world, w, weight)[0]


settings = {room: {"n_features": n} for room, n in ROOM.items()}
settings["control"] = {"n_features": ROOM["room"], "hardest": 0.05, "easiest": 0.05}
found = {room: {name: [] for name in WEIGHTS} for room in settings}
for seed in case.seeds:
    for room, how in settings.items():
        world, w = make_world(case.rng(seed), **how), np.zeros((how["n_features"], REPLIES))
        p0, _ = gradient(world, w, WEIGHTS[RL])
        for name, weight in WEIGHTS.items():
            p = train(world, weight)
            row = {f"pass@{n}": np.mean(1 - (1 - p) ** n) for n in DRAWS}
            for which, here in {"easy": p0 >= 0.01, "hard": p0 < 0.01}.items():
                row[which] = p[here].sum() / max(here.sum(), 1)
            found[room][name].append(row)

# %% What was learned
got = {}  # {(room, name): pass@1, 16, 256, easy, hard; each a number a seed}
for room, rows in found.items():
    columns = tuple(rows[RL][0])[: 3 if room == "control" else 5]
    case.table(f"After {STEPS} steps: {room}", rows, columns)
    for name, of_seeds in rows.items():
        got[room, name] = np.array([list(row.values()) for row in of_seeds]).T
rl, grpo, best = (got["room", name][:3] for name in (RL, GRPO, MAXRL))
equal = got["control", MAXRL][:1] - got["control", RL][:1]
narrow = got["no room", MAXRL] - got["no room", GRPO]
for text, holds in {
    "room: log p has at least 0.15 more than RL in pass@1, 16 and 256": best > rl + 0.15,
    "room: log p has more than GRPO's weight in pass@1, 16 and 256": best > grpo,
    "no room: more than GRPO's weight in pass@16 and 256": narrow[1:3] > 0,
    "no room: but less in pass@1 and on easy prompts": narrow[[0, 3]] < 0,
    "control: equally hard, log p and RL are within 0.1 in pass@1": abs(equal) < 0.1,
}.items():
    case.claim(text, holds.all(axis=0))

# %% The picture
figure, ((left, right),) = new_figure(9, 3.4, 1, 2, sharey=True)
for axis, room in ((left, "room"), (right, "no room")):
    draw_lines(axis, {w: (DRAWS, got[room, w][:3].mean(axis=1)) for w in WEIGHTS}, log="x")
say(left, "room for all prompts: log p is best from the first draw", "draws n", "pass@n")
say(right, "no room: its first draw pays for the others", "draws n")

# %% The answer
less, more = (got["no room", name] for name in (GRPO, MAXRL))
cut, whole = (" and ".join(spread(got[r, n][0]) for r in ROOM) for n in ("K = 16", GRPO))
text = f"K = 16 has less pass@1 than GRPO's weight, with room and without: {cut} against"
case.unexpected(f"{text} {whole} (both without noise).")
seen = f"With room pass@1 is {spread(best[0])} for log p, {spread(grpo[0])} for GRPO's weight, "
seen += f"{spread(rl[0])} for RL; without, {spread(more[0])} against GRPO's {spread(less[0])}, and "
seen += f"pass@16 {spread(more[1])} against {spread(less[1])}."
case.finish(figure, varied="the weight of a prompt; room for all of them", seen=seen)
