"""Is a KL penalty anything but stopping early?

    python examples/cases/16_penalty_as_early_stopping.py        # 60 s on two cores

A policy with beta > 0 comes to rest at some KL from the reference. A policy with beta = 0 passes
that KL on its way and can be stopped there. Is one of them worth more? Gao, Schulman & Hilton
(arXiv 2210.10760) found that a penalty buys proxy at a given KL but no gold: it is "akin to early
stopping". Every seed has its own reference and its own proxy, fitted to 2,000 pairs of that
reference; beta > 0 is trained to its rest, beta = 0 is measured after every small step, and all
are compared at the same KL.

Expect more proxy at rest, always: ref exp(r / beta) / Z has the most proxy of all policies at its
KL. For gold the way decides. Along the natural gradient flow without a penalty, d log pi / d tau =
r - E[r], so stopped at tau it *is* the optimum of beta = 1 / tau, and the claim is exact. That is
the control: walk by the plain gradient of a table instead, or by PPO on a transformer, and beta = 0
goes other ways, one with more gold and one with less. To see it differently change BETAS, or the
learning rate of SMALL_STEPS.
"""

# %% A proxy for each seed, beta > 0 to its rest, beta = 0 step by step
import numpy as np

from desk import fit_bradley_terry
from minirlhf.app.pictures import LOOKS, draw_lines, new_figure, say
from minirlhf.exact.optimum import objective_gradient, policy_values
from minirlhf.rlhf.logprobs import log_softmax
from study import Arm, Case, spread

case = Case("16_penalty_as_early_stopping", __doc__)
BETAS = (1.0, 0.5, 0.25)
SMALL_STEPS = {"epochs": 1, "optimizer": {"learning_rate": 5e-4, "schedule": "constant"}}
proxies = {}
for desk, seed in zip(case.desks, case.seeds, strict=True):
    pairs = desk.draw_pairs(desk.ref, 2000, rng=case.rng(seed))
    proxies[seed] = desk.standardised(desk.counts @ fit_bradley_terry(desk.counts, pairs))

rest = case.train(
    lambda desk, seed: {b: Arm({"kl_coef": b}, proxies[seed]) for b in BETAS}, measure_every=60
)
small = case.train(
    lambda desk, seed: {"path": Arm({"kl_coef": 0.0, **SMALL_STEPS}, proxies[seed], 16)},
    measure_every=1,
)


# %% Without samples: the optimum at every beta, and two ways of a table without a penalty
def point(desk, p, proxy):
    return [desk.kl(p), p @ proxy, p @ desk.gold]


def walk(desk, proxy, most_kl, natural):
    """KL, proxy and gold along beta = 0, by a gradient in the logits of every prefix."""
    log_probs, points = desk.ref_log_probs, [point(desk, desk.ref, proxy)]
    while points[-1][0] < most_kl and len(points) < 1000:
        where = (desk.tree, log_probs, log_probs, proxy)
        if natural:  # the advantages of a reply's tokens add up to r - E[r]
            q, values = policy_values(*where, kl_coef=0.0)
            step = 0.02 * (q - values[:, None])
        else:
            step = 0.5 * objective_gradient(*where, kl_coef=0.0)
        log_probs = log_softmax(log_probs + step)
        points.append(point(desk, desk.probs(log_probs), proxy))
    return points


WAYS = ("the exact optimum", "natural gradient, stopped", "plain gradient, stopped", "PPO, stopped")
NATURAL, PLAIN, PPO = 1, 2, 3
ends, found, curves = [], [], []  # (seeds, betas, 3) and (seeds, ways, betas, 3)
for i, (desk, proxy) in enumerate(zip(case.desks, proxies.values(), strict=True)):
    ends.append([point(desk, rest[beta][i].probs, proxy) for beta in BETAS])
    kl = np.array(ends[-1])[:, 0]
    tilts = [point(desk, desk.optimum(proxy, beta=b), proxy) for b in np.geomspace(50, 0.1, 80)]
    steps = [(row["kl_seq"], row["paid"], row["gold"]) for row in small["path"][i].rows]
    tables = [walk(desk, proxy, 1.2 * kl.max(), natural) for natural in (True, False)]
    curves.append([np.array(points).T for points in (tilts, *tables, steps)])
    found.append([[np.interp(kl, c[0], column) for column in c] for c in curves[-1]])
ends, found = np.array(ends), np.array(found).swapaxes(2, 3)

# %% Everybody at the KL at which a beta comes to rest
columns = ("kl_seq", "proxy", "gold")
for j, beta in enumerate(BETAS):
    at_kl = {f"PPO at rest, beta {beta:g}": ends[:, j]}
    at_kl |= {way: found[:, i, j] for i, way in enumerate(WAYS)}
    rows = {way: [dict(zip(columns, x, strict=True)) for x in at_kl[way]] for way in at_kl}
    case.table(f"At the KL of beta = {beta:g}; stopped is without a penalty", rows, columns)

_, proxy, gold = np.moveaxis(found - ends[:, None], 3, 0)  # (seeds, ways, betas) less the penalty's
for text, holds in (
    (
        "natural gradient, stopped: gold within 0.05 of beta > 0, each beta",
        abs(gold[:, NATURAL]) < 0.05,
    ),
    ("PPO, stopped: at least 0.05 less proxy than beta > 0, each beta", proxy[:, PPO] < -0.05),
    ("PPO, stopped: at least 0.05 less gold than beta > 0, each beta", gold[:, PPO] < -0.05),
    ("plain gradient, stopped: at least 0.15 less proxy, each beta", proxy[:, PLAIN] < -0.15),
    (
        "plain gradient, stopped: at least 0.02 more gold, betas 1 and 0.5",
        gold[:, PLAIN, :2] > 0.02,
    ),
):
    case.claim(text, holds.all(axis=1))

# %% The picture: the first seed
figure, ((left, right),) = new_figure(9, 3.6, 1, 2)
for axis, column in ((left, 1), (right, 2)):
    lines = {way: (c[0] ** 0.5, c[column]) for way, c in zip(WAYS, curves[0], strict=True)}
    draw_lines(axis, lines, [{**look, "marker": ""} for look in LOOKS])
    axis.plot(ends[0, :, 0] ** 0.5, ends[0, :, column], "k*", label="PPO at rest, beta > 0")
    axis.set(xlim=(0, 1.1 * ends[0, :, 0].max() ** 0.5), ylim=(-0.1, 3.5))
say(left, "proxy: a penalty at rest is the frontier", "sqrt(KL)", "reward units")
say(right, "gold: three ways without a penalty, three answers", "sqrt(KL)", "reward units")

# %% The answer
less = [spread(gold[:, way, 1]) for way in (NATURAL, PLAIN, PPO)]
case.unexpected("the claim for gold holds on one way only; PPO stopped has less gold.")
seen = f"Stopped at the KL of beta 0.5, beta 0 has {less[0]} gold more (natural gradient), "
seen += f"{less[1]} (plain gradient), {less[2]} (PPO): akin to early stopping only along the first."
case.finish(figure, varied="a penalty at rest, or none, stopped on three ways", seen=seen)
