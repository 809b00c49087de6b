"""Reward and KL jump together and the replies get worse: what happened at that update?

    python examples/cases/08_hacking_spike.py        # 90 s on two cores

A run that was calm for hundreds of updates shows a spike: reward up, KL up, and people dislike the
replies. Two suspects are known here because they were put there. At iteration 20 of PPO with beta =
0.5 either beta falls to 0.2, or a new reward model pays 4 sd more for a reply that ends with an
upsell (SAL). A third arm goes on with nothing changed, and so shows what a restart does.

Expect the same three signs from both, since the optimum ref exp(r / beta) / Z moves whether beta or
r is changed; and a lag for the bonus, because PPO is not paid for what it has not yet sampled. What
tells them apart is the replies: a bonus has words of its own. First aid, a roll-back to the
checkpoint before and a KL that is steered to a target, bounds the harm and does not end it: what KL
there is goes to the bonus. The cause is shown by removing it: the same policy, spike and all, goes
on without the bonus, or with another reward model, the least of 8 that were fitted to 300 pairs
each (Coste et al. 2023, arXiv 2310.02743). Change BONUS, or the token that it is paid for.
"""

# %% Calm, then a change, then a remedy: three phases of 20 iterations
import numpy as np

from desk import fit_bradley_terry
from minirlhf.app.pictures import draw_lines, new_figure, say
from study import Arm, Case, column, mean_lines, spread, values

case = Case("08_hacking_spike", __doc__)
BONUS, STEERED = 4.0, {"kl_target": 0.7, "kl_horizon": 512.0}


def phase(beta=0.5, reward=None, then=(), **ppo):
    optimizer = {"learning_rate": 2e-3, "schedule": "constant"}
    ppo = {"kl_coef": beta, "optimizer": optimizer, **ppo}
    return Arm(ppo, reward=reward, iterations=20, then=then)


def arms(desk, seed):
    last = [desk.reply(leaf).split()[-1:] == ["SAL"] for leaf in range(desk.ref.size)]
    spiked = desk.proxy + BONUS * np.array(last)
    rng = case.rng(seed)
    eight = [desk.draw_pairs(desk.ref, 300, rng=rng) for _ in range(8)]
    scores = [desk.standardised(desk.counts @ fit_bradley_terry(desk.counts, p)) for p in eight]
    other = desk.standardised(np.min(scores, axis=0))
    bonus, steered = phase(reward=spiked), phase(reward=spiked, **STEERED)
    return {
        "nothing changes": phase(then=(phase(),)),
        "beta falls to 0.2": phase(then=(phase(0.2),)),
        "a bonus appears": phase(then=(bonus,)),
        "beta, then kl_target": phase(then=(phase(0.2), phase(0.2, **STEERED))),
        "rolled back, kl_target": phase(then=(steered,)),
        "bonus, then removed": phase(then=(bonus, phase())),
        "bonus, then least of 8": phase(then=(bonus, phase(reward=other))),
    }


runs = case.train(arms, measure_every=4)

# %% What one sees, and when it began
spikes = ("beta falls to 0.2", "a bonus appears")
t0 = max(row["iteration"] for row in runs["nothing changes"][0].rows if row.get("phase") == 0)


def change_point(run, name):
    """The last iteration before the cut that leaves the least variance on its two sides."""
    rows = run.rows[1:]
    curve = np.array([row[name] for row in rows])
    rest = [curve[:i].var() * i + curve[i:].var() * (curve.size - i) for i in range(1, curve.size)]
    return rows[int(np.argmin(rest))]["iteration"]


def level(rows):
    """Means over the last 12 iterations: single ones wander, the learning rate is constant."""
    names = ("paid", "gold", "kl_seq", "length", "upsold", "kl_coef")
    return {name: np.mean([row[name] for row in rows[1:][-3:]]) for name in names}


calm = [[row for row in run.rows if row["iteration"] <= t0] for run in runs["nothing changes"]]
lines = {"before": [level(rows) for rows in calm]}
lines |= {name: [level(run.rows) for run in of_arm] for name, of_arm in runs.items()}
untreated = ("before", "nothing changes", *spikes)
treated = tuple(name for name in lines if name not in untreated)
for title, names in ((f"At iteration {t0}, and 20 later", untreated), ("With a remedy", treated)):
    case.table(title, {name: lines[name] for name in names}, tuple(lines["before"][0]))

gold, kl, paid = (column(lines, name) for name in ("gold", "kl_seq", "paid"))
where = {}
for spike in spikes:
    cuts = np.array([[change_point(run, c) for run in runs[spike]] for c in ("paid", "kl_seq")])
    print(f"{spike}: reward turns at {spread(cuts[0], 1)}, KL at {spread(cuts[1], 1)}")
    lag = cuts - t0
    together = (np.ptp(cuts, axis=0) <= 4) & (lag.min(axis=0) >= 0) & (lag.max(axis=0) <= 12)
    case.claim(f"{spike}: reward and KL turn together, 0 to 12 iterations later", together)
    up = (paid[spike] - paid["nothing changes"] > 0.5) & (kl[spike] - kl["nothing changes"] > 1)
    down = gold["nothing changes"] - gold[spike] > 0.2
    where[spike] = cuts[0]
    case.claim(f"{spike}: 0.5 more reward, 1 more KL, 0.2 less gold than without", up & down)
case.claim("the bonus shows 4 iterations or more after its cause", where[spikes[1]] >= t0 + 4)
aided, worst = gold["rolled back, kl_target"], gold["a bonus appears"]
cured = np.min([gold["bonus, then removed"], gold["bonus, then least of 8"]], axis=0)
case.claim("control: without the bonus gold rises again by 0.2", cured - worst > 0.2)
case.claim("rolled back and steered, gold lies between", (aided > worst) & (aided < cured))

# %% The picture
figure, ((left, middle, right),) = new_figure(12, 3.4, 1, 3)
draw_lines(left, mean_lines({name: runs[name] for name in untreated[1:]}, "iteration", "kl_seq"))
say(left, "KL jumps where something changed", "PPO iteration", "nats")
x, y, z = (values(runs[spikes[1]], c)[:, 1:].mean(axis=0) for c in ("iteration", "paid", "gold"))
draw_lines(middle, {"reward that is paid": (x, y), "gold": (x, z)})
say(middle, "a bonus appears: reward up, gold down", "PPO iteration", "reward units")
remedies = {name: runs[name] for name in (spikes[1], *treated[1:])}
draw_lines(right, mean_lines(remedies, "iteration", "gold"))
say(right, "first aid bounds the harm, only the cause ends it", "PPO iteration", "gold")

# %% The answer
case.finish(
    figure,
    varied="beta or a bonus at iteration 20; the remedy",
    seen=f"Gold {spread(gold['before'])} before, {spread(worst)} with the bonus; rolled back and "
    f"steered {spread(aided)}; bonus removed {spread(gold['bonus, then removed'])}, "
    f"other model {spread(gold['bonus, then least of 8'])}.",
)
