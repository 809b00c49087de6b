"""How strong should the penalty be?

    python examples/cases/02_regularization_strength.py        # 90 s on two cores

A team fine-tunes with reward minus beta times the divergence from the starting model and asks what
a very high and a very low beta do. Here beta goes from 20 to 0.05. For each seed a reward model is
fitted to 2,000 pairs of the reference's replies (a Bradley-Terry fit that counts words), and the
exact optimum ref exp(r / beta) / Z is computed at every beta: the frontier, as no policy has more
score at its KL. Policies trained by PPO at five betas stand beside it. Expect with a high beta a
policy that does not move: near the reference its KL is Var(r) / (2 beta^2). With a low one the
score rises on, and gold, which rose with it, peaks, falls, and ends far below the reference's: what
is left is the error of the reward model. The control arm is a reward model that sees whether a word
is there at all and whether a reply is too long, fitted to the same pairs: with it a low beta does
no harm. So which beta is right depends on the reward model. PPO comes close to the optimum but for
beta = 20: advantages are scaled to sd 1, so there they are noise and move the policy all the same,
unless they are left as they are. To see it differently, fit to 200 pairs or to 20,000.
"""

# %% A reward model for each seed, from its own pairs
import numpy as np

from desk import fit_bradley_terry
from minirlhf.app.pictures import draw_lines, new_figure, say
from study import Arm, Case, spread

case = Case("02_regularization_strength", __doc__)
desks, reference = case.desks, [desk.describe(desk.ref) for desk in case.desks]
rngs = map(case.rng, case.seeds)
pairs = [desk.draw_pairs(desk.ref, 2000, rng=rng) for desk, rng in zip(desks, rngs, strict=True)]


def fit(features):
    fitted = [fit_bradley_terry(*of_seed) for of_seed in zip(features, pairs, strict=True)]
    each = zip(desks, features, fitted, strict=True)
    return [desk.standardised(x @ weights) for desk, x, weights in each]


scores, able = fit([desk.counts for desk in desks]), fit([desk.rich_features for desk in desks])

# %% The exact frontier: the best policy at every beta
betas = np.geomspace(20, 0.05, 9 if case.fast else 41)
trained_betas = (20, 1, 0.5, 0.25, 0.1)


def at(beta, rewards):
    """The optimum at this beta, described, for each seed."""
    optima = [desk.optimum(r, beta=beta) for desk, r in zip(desks, rewards, strict=True)]
    each = zip(desks, optima, rewards, strict=True)
    return [{**desk.describe(p), "score": p @ r} for desk, p, r in each]


frontier, control = ([at(beta, rewards) for beta in betas] for rewards in (scores, able))
shown = {f"optimum, beta {beta:g}": at(beta, scores) for beta in (*trained_betas, 0.05)}

# %% PPO at five of them
score_of = dict(zip(case.seeds, scores, strict=True))


def arms(desk, seed):
    named = {f"PPO, beta {beta:g}": {"kl_coef": beta} for beta in trained_betas}
    named["PPO, 20, not whitened"] = {"kl_coef": 20, "whiten_advantages": False}
    return {name: Arm(ppo, reward=score_of[seed]) for name, ppo in named.items()}


runs = case.train(arms, measure_every=60)
ends = {
    name: [{**run.rows[-1], "score": run.probs @ r} for run, r in zip(of_arm, scores, strict=True)]
    for name, of_arm in runs.items()
}
*trained, plain = ends.values()
rows = {"reference": [{**row, "score": 0.0} for row in reference], **shown, **ends}
columns = ("score", "gold", "kl_seq", "entropy_seq", "length", "distinct_2")
case.table("What a beta does", rows, columns)


# %% Where gold peaks, and where it falls below the reference's
def column(name, rows):
    return np.array([[row[name] for row in of_beta] for of_beta in rows]).T  # (seeds, betas)


gold, kl, score = (column(name, frontier) for name in ("gold", "kl_seq", "score"))
base, able_gold, peak = column("gold", [reference])[:, 0], column("gold", control), gold.argmax(1)
lost = [betas[of < ref].max(initial=0) for of, ref in zip(gold, base, strict=True)]
print(f"gold is highest at a KL of {spread(kl[range(len(desks)), peak])} nats")
below = [  # how much less score a trained policy has than the frontier at its KL
    max(np.interp(row["kl_seq"], kl[i], score[i]) - row["score"] for row in of_seed)
    for i, of_seed in enumerate(zip(*trained[1:], strict=True))
]
case.claim("beta 20 hardly moves: KL below 0.01 nats", kl[:, 0] < 0.01)
case.claim("the score rises all the way as beta falls", np.diff(score).min(axis=1) > 0)
case.claim("gold is highest between beta 1.2 and 0.3", (betas[peak] > 0.3) & (betas[peak] < 1.2))
case.claim("there it is 0.3 or more above the reference's", gold.max(axis=1) - base >= 0.3)
case.claim("at beta 0.05 it is 2 or more below it", base - gold[:, -1] >= 2)
case.claim("control: a reward model that sees more gains 0.5 there", able_gold[:, -1] - base >= 0.5)
ppo, calm = column("kl_seq", [trained[0], plain]).T
case.claim("control: at beta 20 PPO without whitening goes a tenth as far", ppo > 10 * calm)
case.claim("from beta 1 down PPO ends within 0.1 of the frontier", np.array(below) < 0.1)

# %% The picture
figure, (axes,) = new_figure(12, 3.6, 1, 3)
for axis, name, log, title, unit in (
    (axes[0], "gold", "x", "gold, what is wanted: it peaks and falls", "reward units"),
    (axes[1], "score", "x", "score, what is paid: it only rises", "sd of the reference's"),
    (axes[2], "kl_seq", "xy", "how far the policy goes", "KL [nats per reply]"),
):
    lines = {"optimum": (betas, column(name, frontier).mean(axis=0))}
    lines["control: optimum of a model that sees more"] = betas, column(name, control).mean(axis=0)
    lines["PPO, trained"] = trained_betas, column(name, trained).mean(axis=0)
    draw_lines(axis, lines, log=log)
    axis.invert_xaxis()
    say(axis, title, "beta, the penalty falls to the right", unit)
axes[0].axhline(base.mean(), color="gray", lw=0.8)

# %% The answer
seen = f"gold is highest, {spread(gold.max(axis=1))}, at beta {spread(betas[peak])}; below "
seen += f"{spread(lost)} it is under the reference's {spread(base)}; at 0.05 it is "
seen += f"{spread(gold[:, -1])}, with the abler reward model {spread(able_gold[:, -1])}"
case.unexpected("at beta 20 PPO does move, by the noise of its whitened advantages.")
case.finish(figure, varied="beta from 0.05 to 20", seen=seen)
