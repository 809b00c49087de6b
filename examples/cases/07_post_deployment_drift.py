"""Why do replies drift after RLHF, although the score prefers the new style only slightly?

    python examples/cases/07_post_deployment_drift.py        # 70 s on two cores

After release the replies grow longer and longer. The reward model scores long replies only a little
higher, the penalty has been on from the first update, and long replies, which by now pay much of
it, still get positive advantages. Here the judges add a fifth of a unit a token to gold, and a
reward model is fitted to 8,000 of their pairs. Varied: beta, and the judges: as the control honest
ones, and ones who take that fifth off. Last, three rounds, each of which takes the policy of the
round before as its reference.

Expect an equilibrium and no accident. The penalty lr = log pi - log ref is 0 at the start, whatever
beta, and grows only as log pi does. A reply gains probability while beta lr < r - V, so it rests at
lr = r / beta - log Z: a small gap in r is a factor exp(gap / beta) in probability. The cure is
judges who do not pay for length; a larger beta gives up most of the gain in gold as well. A style
that the first token decides is paid by this token alone; that length is, too, was expected and is
wrong: each token but the end pays its share. A reset makes the spring slack: K rounds at beta end
where one at beta / K does. To see it differently change PER_TOKEN or BETA.
"""

# %% A small preference, as arms of one experiment
import numpy as np

from desk import fit_bradley_terry, tilted
from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.optimum import soft_optimum
from minirlhf.exact.tiny import POL
from study import Arm, Case, ends, mean_lines, spread, values

PER_TOKEN, BETA, ROUNDS, RESETS = 0.2, 0.2, 3, "beta .6, three rounds"
case = Case("07_post_deployment_drift", __doc__)


def learned(desk, seed, per_token):
    """The reward model of judges who add this to gold for every token of a reply."""
    judge = desk.gold + per_token * desk.lengths
    pairs = desk.draw_pairs(desk.ref, 8000, rng=case.rng(seed), gold=judge)
    return desk.standardised(desk.rich_features @ fit_bradley_terry(desk.rich_features, pairs))


def arms(desk, seed):
    def arm(per_token, beta, **phases):
        return Arm({"kl_coef": beta}, learned(desk, seed, per_token), 40, **phases)

    reset = arm(PER_TOKEN, ROUNDS * BETA, new_reference=True)
    return {
        "beta .2": arm(PER_TOKEN, BETA),
        "beta 1": arm(PER_TOKEN, 5 * BETA),
        "honest judges": arm(0.0, BETA),
        "judges like it short": arm(-PER_TOKEN, BETA),
        RESETS: arm(PER_TOKEN, ROUNDS * BETA, then=(reset, reset)),
    }


runs = case.train(arms, measure_every=4)

# %% Where it comes to rest: the trained policies, and the exact optima
desks, seeds = case.desks, np.arange(len(case.seeds))
reward = [learned(desk, seed, PER_TOKEN) for desk, seed in zip(desks, case.seeds, strict=True)]
best = [desks[i].optimum(reward[i], beta=BETA) for i in seeds]
rest = [desks[i].describe(best[i]) for i in seeds]
rows = {"reference": [run.rows[0] for run in runs["beta .2"]], **ends(runs), "optimum at .2": rest}
columns = ("length", "kl_seq", "gold")
case.table("Replies at the end", rows, (*columns, "entropy_seq"))

length, kl, gold = ({n: values(r, name) for n, r in runs.items()} for name in columns)
start, drift = length["beta .2"][:, 0], np.ptp(length["beta .2"][:, [0, -1]], axis=1)
rest_kl = np.array([row["kl_seq"] for row in rest])
case.claim("trained, KL rests within 15 % of it", np.abs(kl["beta .2"][:, -1] / rest_kl - 1) < 0.15)
case.claim("replies have grown by a token", length["beta .2"][:, -1] > start + 1)
case.claim("beta 1 leaves less than .6 of the drift", length["beta 1"][:, -1] < start + 0.6 * drift)
honest = length["honest judges"][:, -1]
case.claim("control: honest judges leave less than half of it", honest < start + drift / 2)

# %% Which token pays, if the first one decides the style, and if each token counts
words = "POL ANS DET DET POL".split()[: case.max_tokens - 1]


def paid(desk, preference):
    best = soft_optimum(desk.tree, desk.ref_log_probs, preference, kl_coef=BETA)
    return desk.log_ratios(best.log_probs, " ".join(words))


opening = [paid(d, 0.6 * (d.responses.tokens[:, 0] == POL)) for d in desks]
counted = [paid(d, PER_TOKEN * d.lengths) for d in desks]
later = [np.abs(x[1:]).max() < 1e-9 for x in opening]
case.claim("a style that the first token decides: no later one pays 1e-9", later)
case.claim("length: each token pays .05 nats or more", [x[:-1].min() > 0.05 for x in counted])

# %% Resets: three rounds at .6 are one at .2
chained = [desk.ref for desk in desks]
for _ in range(ROUNDS):
    chained = [tilted(chained[i], reward[i], beta=ROUNDS * BETA) for i in seeds]
same = [np.abs(chained[i] - best[i]).max() < 1e-10 for i in seeds]
case.claim("three rounds at beta .6 are the optimum at .2, to 1e-10", same)
trained = kl[RESETS][:, -1]
case.claim("and trained end within 15 % of its KL", np.abs(trained / rest_kl - 1) < 0.15)

# %% The picture
figure, ((one, two, three),) = new_figure(13, 3.6, 1, 3)
one_round = {name: runs[name] for name in runs if name != RESETS}
draw_lines(one, mean_lines(one_round, "iteration", "length"))
say(one, "tokens: the drift comes to rest", "PPO iteration")
places = [f"{i} {word}" for i, word in enumerate([*words, "EOS"], 1)]
profile = {"the first token decides": opening, "each token counts": counted}
draw_lines(two, {name: (places, np.mean(of, axis=0)) for name, of in profile.items()})
say(two, "log pi - log ref of each token: who pays", "token", "nats")
compared = {name: runs[name] for name in ("beta .2", RESETS)}
draw_lines(three, mean_lines(compared, "iteration", "kl_seq"))
three.axhline(rest_kl.mean(), color="gray", lw=0.8)
say(three, "KL to the first reference: resets end at the same rest (gray)", "PPO iteration", "nats")

# %% The answer
end = {n: f"{spread(length[n][:, -1], 1)} (gold {spread(gold[n][:, -1], 1)})" for n in runs}
seen = (
    f"Replies of {spread(start, 1)} tokens have {end['beta .2']} at beta .2, {end['beta 1']} at 1, "
)
seen += f"{end['honest judges']} with honest judges; three rounds at .6: {end[RESETS]}."
case.unexpected("the first token pays for all only where it alone decides; not for length.")
case.finish(figure, varied="beta; the judges; resets of the reference", seen=seen)
