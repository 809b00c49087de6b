"""How should helpfulness and safety be combined, if neither may pay for the other?

    python examples/cases/09_competing_constraints.py        # 10 s on two cores

Two reward models are fitted to two kinds of judgement, helpfulness and safety, and one number has
to be optimised. A product that maximises their average turns out informative and unsafe. The world
must allow it, so here is its construction: helpfulness judges go by gold without its safety part,
and like an unsafe promise by LIKES units ("we refund everything" sounds helpful); safety judges
take off 1.5 for it and .5 for an upsell. Gold, which nobody is paid for, has the 1.5. Each model is
a Bradley-Terry fit to 16,000 pairs. They are combined by the average; by that of scores with sd 1;
by the minimum of these; by a gate, helpfulness where safety is above a threshold and its lowest
value elsewhere; with a multiplier on safety, raised until unsafe replies are no more frequent than
under the reference. Each combination is given sd 1 under the reference, so that one beta means one
thing; the policy is the exact optimum. Control: judges who do not like unsafe promises.

By construction the average pays for a promise where LIKES > 1.5: its exchange rate is an accident
of two units (with sd 1 each, safety's unit is small, for unsafe replies are rare). Expect minimum
and gate not to trade, the minimum to gain no more once safety's top is reached, the multiplier to
find the rate that is wanted. To see it differently change LIKES.
"""

# %% Two kinds of judges
import numpy as np

from desk import fit_bradley_terry
from minirlhf.app.pictures import draw_lines, new_figure, say
from study import Case, spread

LIKES, BETAS = 2.5, (4.0, 2.0, 1.0, 0.5, 0.25)
THRESHOLD = -0.6  # of safety: an upsell (-0.4) passes, a promise (-1.4) does not
case = Case("09_competing_constraints", __doc__)
desk = case.desk
answers, details, _, _, upsells, _, promises = desk.counts.T
informative, unsafe = (answers > 0) & (details > 0), promises > 0
safety = -1.5 * promises - 0.5 * upsells
ref = {"informative": desk.ref @ informative, "unsafe": desk.ref @ unsafe}


def fitted(judge, rng):
    """What a reward model with rich features learns from a judge; mean 0 under the reference."""
    pairs = desk.draw_pairs(desk.ref, 16_000, rng=rng, gold=judge)
    reward = desk.rich_features @ fit_bradley_terry(desk.rich_features, pairs)
    return reward - desk.ref @ reward


# %% Five ways to make one number of two
def with_multiplier(helpful, safe, beta):
    for multiplier in np.arange(0.0, 10.0, 0.1):
        reward = desk.standardised(helpful + multiplier * safe)
        if desk.optimum(reward, beta=beta) @ unsafe <= ref["unsafe"]:
            return reward


def optima(seed, likes, beta):
    """What each combination makes of the policy: {combination: a row}."""
    rng = case.rng(seed)
    helpful, safe = fitted(desk.gold - safety + likes * promises, rng), fitted(safety, rng)
    sd_1 = desk.standardised(helpful), desk.standardised(safe)
    rewards = {
        "average": helpful + safe,
        "average of sd 1": sd_1[0] + sd_1[1],
        "minimum": np.minimum(*sd_1),
        "gate": np.where(safe > THRESHOLD, helpful, helpful.min()),
        "multiplier": with_multiplier(helpful, safe, beta),
    }
    rows = {}
    for name, reward in rewards.items():
        reward = desk.standardised(reward)
        p = desk.optimum(reward, beta=beta)
        rates = {"informative": p @ informative, "unsafe": p @ unsafe}
        # at the reference, where the penalty is 0, this is the advantage of the whole reply
        rows[name] = {**desk.describe(p), **rates, "A": reward[desk.leaf("ANS DET UNS")]}
    return rows


def by_name(of_seeds, prefix=""):
    return {prefix + name: [rows[name] for rows in of_seeds] for name in of_seeds[0]}


found = {beta: by_name([optima(seed, LIKES, beta) for seed in case.seeds]) for beta in BETAS}
control = by_name([optima(seed, 0.0, BETAS[-1]) for seed in case.seeds], "control: ")

# %% What became of the policy at the smallest beta; A is the first advantage of ANS DET UNS
ended = {**found[BETAS[-1]], "control: average": control["control: average"]}
reference = [{**desk.describe(desk.ref), **ref, "A": "-"} for _ in case.seeds]
columns = ("informative", "unsafe", "gold", "kl_seq", "A")
case.table(f"Replies at beta {BETAS[-1]}", {"reference": reference, **ended}, columns)
useful, rate, gold = (
    {name: np.array([row[column] for row in rows]) for name, rows in ended.items()}
    for column in columns[:3]
)
safest = np.maximum(rate["minimum"], rate["gate"])
wins = np.minimum(gold["gate"], gold["multiplier"]) - gold["average"]
less = useful["gate"] - useful["minimum"]
case.claim("the average is unsafe in more than a fifth of its replies", rate["average"] > 0.2)
case.claim("minimum and gate are unsafe in less than 1 of 1,000", safest < 0.001)
case.claim("the minimum is informative in 20 points fewer replies than the gate", less > 0.2)
case.claim("gate and multiplier have .4 more gold than the average", wins > 0.4)
for name in ("average of sd 1", "control: average"):
    case.claim(f"{name}: less unsafe than the reference", rate[name] < ref["unsafe"])

# %% The picture
figure, axes = new_figure(10, 3.6, 1, 2)
for axis, column in zip(axes[0], ("unsafe", "informative"), strict=True):
    means = {
        arm: [np.mean([r[column] for r in found[b][arm]]) for b in BETAS] for arm in found[4.0]
    }
    draw_lines(axis, {arm: (BETAS, of_arm) for arm, of_arm in means.items()})
    axis.set_xscale("log", base=2)
    axis.axhline(ref[column], color="gray", lw=0.8)
say(axes[0, 0], "unsafe: the average of raw scores trades for it", "beta", "share of replies")
say(axes[0, 1], "informative: the minimum forgoes it; gray: the reference", "beta")

# %% The answer
shown = ("average", "gate", "minimum")
percent = [", ".join(f"{n} {spread(100 * of[n], 0)}" for n in shown) for of in (rate, useful)]
text = "averaging trades nothing by itself (control); of scores with sd 1 it has more gold than the"
case.unexpected(f"{text} gate: {spread(gold['average of sd 1'])} against {spread(gold['gate'])}.")
seen = f"Unsafe replies in %: {percent[0]}. Informative: {percent[1]}."
case.finish(figure, varied="how two scores become one; beta", seen=seen)
