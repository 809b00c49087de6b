"""What happens when the policy draws the pairs that its next reward model is fitted to?

    python examples/cases/21_policy_moves_its_reward_model.py        # 5 s on two cores

A team repeats RLHF: replies of the present policy are judged in pairs, the reward model is fitted
anew, the policy optimised against it, and so on for eight rounds. Gauthier, Bach and Jordan
(arXiv 2605.04266, of which only the abstract was read) say that the usual loop drops a steering
term, what the policy does to its next reward model, and so suffers from "alignment collapse":
replies of low quality and high reward, whose feedback reinforces the errors that it exploits. Their
remedy is not tried here. The judges are honest throughout: they prefer by gold, with their noise.
Each round is exact, p(y) = ref(y) exp(r(y) / beta) / Z. Varied: what the reward model sees (counts
of words, or rich features that also see when there are enough), the pairs (of this round, or a fit
to the union of all), the reference (kept, or reset to the policy each round). Two controls take the
cause away: pairs of the reference in every round, so that the policy moves nothing, and a larger
beta, so that it moves less.

Expect the rounds to rest where p is the optimum of the reward model fitted to p's own pairs, and to
get there only if a step of p moves the next optimum by less than itself. With counts and a kept
reference it does not: pairs with little ANS teach that ANS is good, pairs full of it that it is
bad. To see it differently change `beta`, or give the judges a blind spot (`draw_pairs(gold=)`).
"""

# %% The rounds
import numpy as np

from desk import fit_bradley_terry, tilted
from minirlhf.app.pictures import draw_lines, new_figure, say
from study import Case, spread

case = Case("21_policy_moves_its_reward_model", __doc__)
desk, n_rounds, n_pairs = case.desk, 8, 2000
features = {"counts": desk.counts, "rich": desk.rich_features}


def rounds(seed, sees="counts", beta=0.3, keep_pairs=False, reset=False, policy_draws=True):
    """What the policy is like at the start and after each round, under one seed."""
    rng, pairs, p = case.rng(seed), [], desk.ref
    rows = [{**desk.describe(p), "reward": 0.0}]
    for _ in range(n_rounds):
        now = desk.draw_pairs(p if policy_draws else desk.ref, n_pairs, rng=rng)
        pairs = [*pairs, now] if keep_pairs else [now]
        weights = fit_bradley_terry(features[sees], np.concatenate(pairs))
        reward = features[sees] @ weights
        p = tilted(p if reset else desk.ref, reward, beta=beta)
        row = {"reward": float((p - desk.ref) @ reward), "ANS": weights[0], "DET": weights[1]}
        rows.append(desk.describe(p) | row)
    return rows


arms = {
    "counts": {},
    "counts, all pairs": {"keep_pairs": True},
    "counts, reset": {"reset": True},
    "control: ref's pairs": {"policy_draws": False},
    "control: beta 1": {"beta": 1.0},
    "rich": {"sees": "rich"},
    "rich, all pairs": {"sees": "rich", "keep_pairs": True},
    "rich, reset": {"sees": "rich", "reset": True},
}
runs = {name: [rounds(seed, **arm) for seed in case.seeds] for name, arm in arms.items()}

# %% Where they end: "reward" is what the reward model of the last round says, above the reference
last = {name: [run[-1] for run in of_arm] for name, of_arm in runs.items()}
rows = {"reference": [run[0] for run in runs["counts"]]}
rows["counts, one round"] = [run[1] for run in runs["counts"]]
rows["rich, one round"] = [run[1] for run in runs["rich"]]
case.table("After eight rounds", rows | last, ("gold", "reward", "kl_seq", "length", "top_reply"))
each = {f"round {i}": [run[i] for run in runs["counts"]] for i in range(1, n_rounds + 1)}
case.table("counts: what a token is paid, what comes of it", each, ("ANS", "DET", "length", "gold"))

gold = {name: np.array([[row["gold"] for row in run] for run in runs[name]]) for name in arms}
reward = {name: np.array([[row["reward"] for row in run] for run in runs[name]]) for name in arms}
start, plain = gold["counts"][:, 0], gold["counts"]
step = {name: np.abs(np.diff(of_arm))[:, -3:].mean(axis=1) for name, of_arm in gold.items()}
case.claim(
    "counts, kept reference: rounds 7, 8 have gold .5 below the reference, reward above 1",
    (plain[:, -2:].mean(1) < start - 0.5) & (reward["counts"][:, -2:].mean(1) > 1),
)
case.claim("it does not rest: in the end gold moves by more than .1 a round", step["counts"] > 0.1)
paid = np.array([[row["ANS"] for row in run[1:]] for run in runs["counts"]])
turns = (np.diff(np.sign(paid), axis=1) != 0).all(axis=1)
case.claim("it over-corrects: what ANS is paid changes its sign every round", turns)
case.claim(
    "all pairs so far: it rests, gold moves by less than .03 a round, above .95 of one round's",
    (step["counts, all pairs"] < 0.03) & (gold["counts, all pairs"][:, -1] > 0.95 * plain[:, 1]),
)
case.claim(
    "reset each round: counts end above one round, by .05",
    gold["counts, reset"][:, -1] > plain[:, 1] + 0.05,
)
for name in ("control: ref's pairs", "control: beta 1"):
    case.claim(f"{name}: no collapse, gold stays .1 above", gold[name][:, -1] > start + 0.1)
case.claim("rich features: no collapse, gold stays .4 above", gold["rich"][:, -1] > start + 0.4)
case.claim(
    "rich features, reset each round: gold ends .3 above one round's",
    gold["rich, reset"][:, -1] > gold["rich"][:, 1] + 0.3,
)

# %% The picture
figure, ((left, right),) = new_figure(10, 3.6, 1, 2)
rounds_done = np.arange(n_rounds + 1)
for axis, shown in ((left, list(arms)[:5]), (right, list(arms)[5:])):
    draw_lines(axis, {name: (rounds_done, gold[name].mean(axis=0)) for name in shown})
say(left, "counts, kept reference: gold falls over the rounds", "round", "gold")
say(right, "rich features: hardly an error to exploit", "round", "gold")

# %% The answer
print(
    "A collapse is there too with honest judges, whose feedback cannot reinforce an error: not by\n"
    "the paper's mechanism, but as fresh pairs over-correct the last error. Damping ends it."
)
one, kept, reset = (gold[n][:, -1] for n in ("counts", "counts, all pairs", "rich, reset"))
case.unexpected("with honest judges collapse comes from over-correction, not from errors fed back.")
case.finish(
    figure,
    varied="features, pairs, beta, resets of the reference",
    seen=f"Gold is {spread(start)} before, {spread(plain[:, 1])} after one round, {spread(one)} "
    f"after eight; {spread(kept)} if all pairs are kept, {spread(reset)} with rich features and "
    "resets.",
)
