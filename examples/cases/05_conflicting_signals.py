"""The score rises, replies get longer, KL rises, no alarm goes off: which signal is to be believed?

    python examples/cases/05_conflicting_signals.py        # 90 s on two cores

Three curves seem to quarrel. The reward model says that things get better; the replies get wordy;
the distance to the reference grows although it is penalised and every step is clipped. Here all
three are watched on the way to an optimum that is known, with beta = 0.35 and PPO's clip at 0.05,
0.2 and 0.5.

Expect no quarrel. The penalty is a spring: a reply pulls with r and rests where its log-ratio is

    log p(y) / ref(y) = r(y) / beta - log Z,

so score, length and KL are three views of one equilibrium, and stop together. The clip bounds what
one batch may change, measured from the policy that sampled it and not from the reference: it sets
the speed and leaves the resting place alone. Control: twice the beta moves it. Whether it is a good
place is for gold to say; in this one gold is above the reference's and below what it passed. Change
`kl_coef` to move the spring's rest, `clip_eps` to see that it does not.
"""

# %% One beta, three clips, and one arm with a stiffer spring
import numpy as np

from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.optimum import soft_optimum
from study import Arm, Case, ends, mean_lines, spread, values

case = Case("05_conflicting_signals", __doc__)
BETA, CLIPS = 0.35, (0.05, 0.2, 0.5)
arms = {f"clip {eps}": Arm({"kl_coef": BETA, "clip_eps": eps}, iterations=100) for eps in CLIPS}
arms["beta 0.7, clip 0.2"] = Arm({"kl_coef": 2 * BETA}, iterations=100)
runs = case.train(arms, measure_every=5)
optima = []  # by backward induction, token by token
for desk in case.desks:
    best = soft_optimum(desk.tree, desk.ref_log_probs, desk.proxy, kl_coef=BETA)
    optima.append(desk.probs(best.log_probs))
rests = [desk.describe(p) for desk, p in zip(case.desks, optima, strict=True)]
start = [run.rows[0] for run in runs["clip 0.2"]]

# %% Where they went, and how fast
columns = ("proxy", "length", "kl_seq", "gold")
rows = {"reference": start, **ends(runs), "exact optimum, beta 0.35": rests}
case.table("After 100 iterations", rows, columns)
early = {name: [run.rows[1] for run in of_arm] for name, of_arm in runs.items()}
case.table("After 5 iterations", early, (*columns, "policy/clipfrac_avg"))


def share(run_rows, seed, name):
    """How much of the way from the reference to the optimum a curve has gone."""
    first, last = start[seed][name], rests[seed][name]
    return (np.array([row[name] for row in run_rows]) - first) / (last - first)


shares = {  # (seeds, iterations) of the arm with clip 0.2
    name: np.array([share(run.rows, i, name) for i, run in enumerate(runs["clip 0.2"])])
    for name in ("proxy", "length", "kl_seq")
}
kl = {name: values(of_arm, "kl_seq") for name, of_arm in runs.items()}
clipped = np.array([kl[f"clip {eps}"] for eps in CLIPS])  # (clips, seeds, iterations)
apart = np.ptp(clipped[:, :, -1], axis=0)
at_rest = np.max([np.abs(way[:, -1] - 1) for way in shares.values()], axis=0)
case.claim("score, length and KL end within 10 % of the optimum's", at_rest < 0.1)
slow = clipped[0, :, 1] < 0.6 * clipped[2, :, 1]
case.claim("after 5 iterations clip 0.05 has less than 0.6 of the KL of clip 0.5", slow)
case.claim("at the end KL differs by less than 0.2 between the clips", apart < 0.2)
moved = kl["clip 0.2"][:, -1] - kl["beta 0.7, clip 0.2"][:, -1]
case.claim("control: twice the beta ends with 1 nat less KL", moved > 1)

# %% The spring, at the exact optimum and at the end of training
stretch, gaps = [], []
for desk, p, run in zip(case.desks, optima, runs["clip 0.2"], strict=True):
    log_z = np.log(desk.ref @ np.exp(desk.proxy / BETA))
    rest = desk.proxy / BETA - log_z
    stretch.append(np.abs(np.log(p) - desk.ref_logp - rest).max())
    gap = np.log(run.probs) - desk.ref_logp - rest
    gaps.append(np.sqrt(run.probs @ gap**2))
print(f"log-ratio less r / beta - log Z, trained: rms {spread(gaps)} nats")
case.claim(
    "at the optimum every reply rests at r / beta - log Z, to 1e-6", np.array(stretch) < 1e-6
)

# %% The picture
figure, ((left, middle, right),) = new_figure(12, 3.4, 1, 3)
x = values(runs["clip 0.2"], "iteration").mean(axis=0)
draw_lines(left, {name: (x, way.mean(axis=0)) for name, way in shares.items()})
say(left, "three symptoms of one equilibrium (1: the optimum)", "PPO iteration", "share of the way")
draw_lines(middle, mean_lines(runs, "iteration", "kl_seq"))
say(middle, "the clip sets the speed, beta the end", "PPO iteration", "KL [nats]")
likely = np.argsort(-run.probs)[:400]
right.axline((0, 0), slope=1, color="gray", lw=1)
right.scatter(rest[likely], (np.log(run.probs) - desk.ref_logp)[likely], s=6)
say(right, "a spring: the 400 likeliest replies at rest", "r / beta - log Z", "log-ratio [nats]")

# %% The answer
soon, late = (", ".join(spread(c) for c in clipped[:, :, i]) for i in (1, -1))
case.finish(
    figure,
    varied="PPO's clip: 0.05, 0.2, 0.5; beta: 0.35, 0.7",
    seen=f"KL after 5 iterations: {soon} by clip; at the end: {late}; at the exact optimum: "
    f"{spread([row['kl_seq'] for row in rests])}.",
)
