"""How does one know that a policy is optimal?

    python examples/cases/23_flatness.py        # 2 s on two cores

A run has stopped rising: is it at its best, or stuck? The best policy there is, pi* = ref exp(r /
beta) / Z, needs no search to recognise: taking logs, r - beta log_ratio = beta log Z = J* for
*every* reply, however good or bad. So the penalty is no wall but a spring, which gives a reply of
reward r the log-ratio r / beta - log Z and no more. Each seed has a proxy of its own, fitted to
2,000 pairs of the reference; varied is the share s of the way, pi_s = ref exp(s r / beta) / Z.

Expect r - beta log_ratio to be one number at the optimum, over all 137,257 replies, and only there:
along the way it is r (1 - s) + const, so its variance says how far is left on this way. It is no
proof: samples see only what the policy says, and one that says a single reply has variance 0 too,
far from J* (the control); look at the entropy beside it. It follows that at the optimum the sampled
policy gradient, less the exact value, with k1 in the reward is 0 for every single reply: no noise
is left. With the KL of the whole vocabulary in the reward and the loss noise remains, for beta
sum_t KL_t still varies from reply to reply. To see it differently change BETA or REPLIES.
"""

# %% The spring: six replies at the optimum
import numpy as np

from desk import Desk, fit_bradley_terry
from gradients import flatness_table
from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.optimum import soft_optimum
from study import Case, spread

case = Case("23_flatness", __doc__)
BETA, SHARES = 0.5, (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
REPLIES = ("ANS", "ANS DET", "ANS DET ANS", "POL ANS DET", "HED HED REF", "UNS")
desk, short = case.desk, Desk(max_tokens=min(4, case.max_tokens))


def fitted_proxy(seed):
    pairs = desk.draw_pairs(desk.ref, 2000, rng=case.rng(seed))
    return fit_bradley_terry(desk.counts, pairs)  # (7,) a weight for each token


weights = [fitted_proxy(seed) for seed in case.seeds]
replies = {reply: [] for reply in REPLIES}
ranges, stuck = [], []
for w in weights:
    reward = desk.standardised(desk.counts @ w)
    best = soft_optimum(desk.tree, desk.ref_log_probs, reward, kl_coef=BETA)  # token by token
    log_ratio = np.log(desk.probs(best.log_probs)) - desk.ref_logp
    flat = reward - BETA * log_ratio
    log_z = np.log(desk.ref @ np.exp(reward / BETA))
    ranges.append(max(np.ptp(flat), abs(flat - BETA * log_z).max()))
    y = int(reward.argmax())  # a policy that says this only: J = r - beta (0 - log ref)
    stuck.append(BETA * log_z - reward[y] - BETA * desk.ref_logp[y])
    for reply in REPLIES:
        y = desk.leaf(reply)
        row = {"ref, %": 100 * desk.ref[y], "pi*, %": 100 * desk.ref[y] * np.exp(log_ratio[y])}
        row |= {"r": reward[y], "log_ratio": log_ratio[y], "r - beta log_ratio": flat[y]}
        replies[reply].append(row)
case.table(f"At the optimum of beta = {BETA}", replies, tuple(replies["ANS"][0]))
level = [row["r - beta log_ratio"] for row in replies["ANS"]]

# %% On the way: the variance of r - beta log_ratio, and the noise of one sample
way = {}  # {share: [a row for each seed]}
for w in weights:
    world = short.with_reward(short.standardised(short.counts @ w))
    for row in flatness_table(world, kl_coef=BETA, shares=SHARES):
        p = short.optimum(row["share"] * world.rewards, beta=BETA)
        flat = world.rewards - BETA * (np.log(p) - short.ref_logp)
        row["Var(r - beta log_ratio)"] = p @ (flat - p @ flat) ** 2
        way.setdefault(row["share"], []).append(row)
columns = ("gap", "Var(r - beta log_ratio)", "k1", "full")
title = "On the way: J* - J, and the variance of one sample's gradient"
case.table(title, {f"share {share:g}": rows for share, rows in way.items()}, columns)
got = {name: np.array([[row[name] for row in rows] for rows in way.values()]) for name in columns}

gap, spreads, k1, full = got.values()  # (shares, seeds) each
for text, holds in {
    "at the optimum r - beta log_ratio is beta log Z for all, to 1e-9": np.array(ranges) < 1e-9,
    "control: a policy of one reply, variance 0 too, is 1 or more below J*": np.array(stuck) >= 1,
    "its variance falls at every step of the way": (np.diff(spreads, axis=0) < 0).all(axis=0),
    "noise of k1 and of the full KL are equal at the reference": abs(k1[0] - full[0]) < 1e-9,
    "that of k1 is 0 at the optimum, to 1e-9": k1[-1] < 1e-9,
    "that of the full KL is not: over 0.3 there": full[-1] > 0.3,
}.items():
    case.claim(text, holds)

# %% The picture
figure, ((left, right),) = new_figure(9, 3.5, 1, 2)
reward, lines = np.linspace(-3, 4, 8), {}
for share in (0.0, 0.5, 1.0):
    log_z = np.log(desk.ref @ np.exp(share * desk.proxy / BETA))
    lines[f"share {share:g}"] = (reward, reward - BETA * (share * reward / BETA - log_z))
draw_lines(left, lines)
say(left, "at the optimum every reply has the same", "r of a reply", "r - beta log_ratio")
lines = {"k1 in the reward": k1, "full KL": full, "Var(r - beta log_ratio)": spreads}
draw_lines(right, {name: (gap[:-1].mean(1), x[:-1].mean(1)) for name, x in lines.items()}, log="xy")
right.invert_xaxis()
say(right, "towards the optimum only k1's noise goes to 0", "J* - J [reward units]", "variance")

# %% The answer
case.finish(
    figure,
    varied="the way to the optimum; k1 or the full KL",
    seen=f"At the optimum r - beta log_ratio is {spread(level)} for all replies, equal to "
    f"{max(ranges):.0e}; the noise of k1 falls from {spread(k1[0])} to {spread(k1[-1])}, that of "
    f"the full KL to {spread(full[-1])}.",
)
