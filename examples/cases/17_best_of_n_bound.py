"""How far is the best of n replies from the reference: is its KL log n - (n-1)/n?

    python examples/cases/17_best_of_n_bound.py        # 3 s on two cores

Papers draw best-of-n at a KL of log n - (n-1)/n. Beirami et al. (arXiv 2401.01879) show that this
is an upper bound. Here best-of-n is exact, replies that tie share the win, and each seed judges by
a proxy of its own, fitted to 2,000 pairs of the reference. Varied are n, the grain of the proxy
(rounded to a grid), the temperature of the reference, and how many replies there are.

Expect the bound to hold everywhere, and the win rate against one draw (ties half) to be at most
n / (n+1). The quantile u of the best of n has density n u^(n-1) on (0, 1), and the KL of *that* is
the bound. A group of ties is an interval of u in which the density is flattened to its mean, which
costs KL: so the bound is tight while all groups are small against 1/n. A peaked reference is loose
at small n, where all draws are its favourite. And from n of about 1 / Pr(best group) on the bound
goes on growing while the KL stops at its cap, -log Pr(best group). Control: as many replies, all
alike likely, no two with one reward: there it is nearly an equality. To see it differently change
NS or the settings of the second table.
"""

# %% The exact KL of the best of n, beside the bound
import numpy as np

from desk import Desk, fit_bradley_terry
from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.rlhf.logprobs import log_softmax
from other_optima import best_of_n
from study import Case, spread

case = Case("17_best_of_n_bound", __doc__)
NS = (2, 4, 16, 64, 256, 1024, 4096, 16384)


def measure(ref_logp, reward):
    """A row for each n."""
    ref = np.exp(ref_logp)
    _, group = np.unique(np.round(reward, 9), return_inverse=True)  # replies that tie
    of_ref = np.bincount(group, weights=ref)
    below, rows = of_ref.cumsum() - of_ref, []
    for n in NS:
        logp = best_of_n(ref_logp, reward, n=n)
        p, bound = np.exp(logp), np.log(n) - (n - 1) / n
        wins = np.bincount(group, weights=p) @ (below + 0.5 * of_ref)
        row = {"kl_seq": p @ (logp - ref_logp), "bound": bound, "cap": -np.log(of_ref[-1])}
        row |= {"KL / bound": row["kl_seq"] / bound, "(n+1) losses": (n + 1) * (1 - wins)}
        rows.append({name: float(x) for name, x in row.items()})
    return rows


# %% A proxy for each seed, in several settings
DESKS = {size: Desk(max_tokens=size) for size in (2, case.max_tokens)}
settings = {"as it is": {}}
settings |= {f"rewards rounded to {grain:g} sd": {"grain": grain} for grain in (0.2, 0.5, 2.0)}
settings |= {f"reference at temperature {t:g}": {"temperature": t} for t in (0.2, 2.0)}
settings["replies of two tokens"] = {"size": 2}
found = {name: [] for name in settings}  # {setting: (seeds, NS)}
for seed in case.seeds:
    pairs = case.desk.draw_pairs(case.desk.ref, 2000, rng=case.rng(seed))
    weights = fit_bradley_terry(case.desk.counts, pairs)
    for name, of in settings.items():
        desk = DESKS[of.get("size", case.max_tokens)]
        log_probs = log_softmax(desk.ref_log_probs, temperature=of.get("temperature", 1.0))
        reward = desk.standardised(desk.counts @ weights)
        if "grain" in of:
            reward = of["grain"] * np.round(reward / of["grain"])
        found[name].append(measure(np.log(desk.probs(log_probs)), reward))
M = case.desk.ref.size
found["control: alike likely, no ties"] = [
    measure(np.full(M, -np.log(M)), case.rng(seed).permutation(M).astype(float))
    for seed in case.seeds
]

# %% The tables
columns = ("kl_seq", "bound", "cap", "KL / bound", "(n+1) losses")
of_n = {f"n = {n}": [rows[i] for rows in found["as it is"]] for i, n in enumerate(NS)}
case.table("The desk as it is", of_n, columns)
for n in (16, 1024):
    of_setting = {name: [rows[NS.index(n)] for rows in of] for name, of in found.items()}
    case.table(f"The best of {n}", of_setting, columns)

# %% What holds
table = {  # {setting: {column: (seeds, NS)}}
    name: {c: np.array([[row[c] for row in rows] for rows in of]) for c in columns}
    for name, of in found.items()
}
share = {name: of["KL / bound"] for name, of in table.items()}
below = [np.minimum(of["bound"], of["cap"]) - of["kl_seq"] > -1e-9 for of in table.values()]
wins = [of["(n+1) losses"] > 1 - 1e-6 for of in table.values()]
coarse, few = share["rewards rounded to 2 sd"], share["replies of two tokens"]
peaked, even = share["reference at temperature 0.2"], share["control: alike likely, no ties"]
case.claim("KL <= bound and <= -log Pr(best group), everywhere", np.all(below, axis=(0, 2)))
case.claim("win rate (ties half) <= n/(n+1), everywhere", np.all(wins, axis=(0, 2)))
for text, holds in {
    "the desk as it is: over 90 % of the bound": share["as it is"] > 0.9,
    "rounded to 2 sd: under 85 % of the bound up to n = 1024": coarse[:, :6] < 0.85,
    "two tokens: under 75 % of the bound from n = 1024 on": few[:, 5:] < 0.75,
    "a peaked reference: under 60 % of the bound at n = 2": peaked[:, :1] < 0.6,
    "control: over 99 % of the bound": even > 0.99,
}.items():
    case.claim(text, holds.all(axis=1))

# %% The picture
figure, ((left, right),) = new_figure(9, 3.6, 1, 2)
names = ("as it is", "rewards rounded to 2 sd", "replies of two tokens")
draw_lines(left, {name: (NS, table[name]["kl_seq"].mean(axis=0)) for name in names}, log="x")
left.plot(NS, [row["bound"] for row in found["as it is"][0]], "k-", lw=0.8, label="the bound")
say(left, "KL of the best of n: few replies reach a cap, ties fall behind", "n", "nats")
names += ("reference at temperature 0.2", "control: alike likely, no ties")
draw_lines(right, {name: (NS, share[name].mean(axis=0)) for name in names}, log="x")
right.set_ylim(0, 1.05)
say(right, "KL / bound: 1 where no reply is likely and no two tie", "n", "share")

# %% The answer
case.finish(
    figure,
    varied="n; ties, number of replies, temperature",
    seen=f"At n = 1024 the KL is {spread(share['as it is'][:, 5], 3)} of the bound on the desk, "
    f"{spread(coarse[:, 5])} with rewards rounded to 2 sd and {spread(few[:, 5])} with 57 replies; "
    f"{spread(even[:, 5], 3)} where all are alike likely and none tie.",
)
