"""The reward improves and behaviour gets worse: which one setting should be changed?

    python examples/cases/06_tuning_update.py        # 100 s on two cores

A team's run has a better score than last week's, but the replies sell and ramble, many ratios leave
the clip and KL rose early. One knob may be turned. Here the run has beta = 0.2, a constant rate of
8e-3 and 8 epochs a batch, and each arm changes one thing: a quarter of the rate, half the epochs,
no update beyond a KL from the policy that sampled (`target_kl`), or a beta that is steered to a KL
from the reference (`kl_target`, Ziegler et al. 2019, arXiv 1909.08593).

Expect two distances, and knobs of their own. Rate, epochs and target_kl act on KL(old || theta) in
one batch: target_kl and half the epochs clip fewer ratios, a smaller rate hardly. Where the run
settles is beta's affair, at ref exp(r / beta) / Z, and for beta = 0.2 gold is below the reference's
there. J is the share of the way to the optimum of the beta in force, so another beta is another
yardstick. Control: beta fixed at 0.4, about where the controller ends. The last two arms start a
controller above and below the beta it will find. Change `kl_target` to keep more of the reward.
"""

# %% One run, and one change at a time
import numpy as np

from minirlhf.app.pictures import draw_lines, new_figure, say
from study import Arm, Case, column, mean_lines, spread, values

case = Case("06_tuning_update", __doc__)
BETA = 0.2


def arm(rate=8e-3, **ppo):
    optimizer = {"learning_rate": rate, "schedule": "constant"}
    return Arm({"kl_coef": BETA, "epochs": 8, "optimizer": optimizer, **ppo}, iterations=40)


steered = {"kl_target": 0.7, "kl_horizon": 512.0}  # beta changes by up to 10 % a batch of 256
changes = {"as it was": arm(), "rate 2e-3": arm(2e-3), "4 epochs": arm(epochs=4)}
changes |= {"target_kl 0.02": arm(target_kl=0.02), "beta 0.4": arm(kl_coef=0.4)}
changes["kl_target 2"] = arm(**steered | {"kl_target": 2.0})
starts = {f"from beta {beta}": Arm({"kl_coef": beta, **steered}) for beta in (2.0, 0.05)}
runs = case.train(changes | starts, measure_every=4)


# %% What each change did
def share(row, desk):
    """J as a share of the way from the reference to the optimum of the beta in force."""
    beta, start = row["kl_coef"], desk.ref @ desk.proxy
    best = beta * np.log(desk.ref @ np.exp(desk.proxy / beta))
    return (row["proxy"] - beta * row["kl_seq"] - start) / (best - start)


def summary(desk, run):
    """Means over the second half of a run, and the most KL that it had."""
    late = [{**row, "J": share(row, desk)} for row in run.rows[len(run.rows) // 2 :]]
    names = {"clipped": "policy/clipfrac_avg", "ratio var": "val/ratio_var"}
    names |= {name: name for name in ("proxy", "gold", "kl_seq", "kl_coef", "J")}
    mean = {short: np.mean([row[name] for row in late]) for short, name in names.items()}
    return mean | {"most KL": max(row["kl_seq"] for row in run.rows)}


rows = {}
for name, of_arm in runs.items():
    rows[name] = [summary(desk, run) for desk, run in zip(case.desks, of_arm, strict=True)]
columns = ("proxy", "gold", "kl_seq", "kl_coef", "J", "clipped", "ratio var")
case.table("Iterations 20 to 40, one change at a time", {n: rows[n] for n in changes}, columns)
columns = ("proxy", "gold", "kl_seq", "most KL", "kl_coef")
case.table("Steered to a KL of 0.7, iterations 28 to 60", {n: rows[n] for n in starts}, columns)

gold, proxy, clipped, most = (column(rows, c) for c in ("gold", "proxy", "clipped", "most KL"))
start = {name: values(runs["as it was"], name)[:, 0] for name in ("gold", "proxy")}
best_step = np.max([gold[name] for name in ("rate 2e-3", "4 epochs", "target_kl 0.02")], axis=0)
kept = (proxy["kl_target 2"] - start["proxy"]) / (proxy["as it was"] - start["proxy"])
print(f"reference: gold {spread(start['gold'])}; kl_target 2 keeps {spread(kept)} of the gain")
was, stopped = (spread(column(rows, "J")[name]) for name in ("as it was", "target_kl 0.02"))
case.unexpected(f"large steps cost hardly any J at this beta: {was}, with target_kl {stopped}.")
case.claim("as it was, gold is below the reference's", gold["as it was"] < start["gold"])
calmer = clipped["target_kl 0.02"] < 0.5 * clipped["as it was"]
case.claim("target_kl halves the share of clipped ratios", calmer)
higher = gold["kl_target 2"] > best_step + 0.1
case.claim("kl_target has 0.1 more gold than any change of the step", higher)
case.claim("and keeps more than 0.4 of the gain of reward", kept > 0.4)
case.claim("control: beta 0.4, fixed, does it too", gold["beta 0.4"] > best_step + 0.1)
ended = np.min([gold[name] for name in starts], axis=0)
case.claim("from both starts gold ends 0.2 above the reference's", ended > start["gold"] + 0.2)
below, above = most["from beta 0.05"], most["from beta 2.0"]
case.claim("from below it passes through 3 times as much KL as from above", below > 3 * above)

# %% The picture
figure, ((left, right),) = new_figure(9, 3.4, 1, 2)
shown = ("as it was", "rate 2e-3", "target_kl 0.02", "kl_target 2", "beta 0.4")
draw_lines(left, mean_lines({name: runs[name] for name in shown}, "iteration", "gold"))
left.axhline(start["gold"].mean(), color="gray", lw=1)
say(left, "gold: only what acts on beta brings it back (gray: reference)", "PPO iteration", "gold")
draw_lines(right, mean_lines({name: runs[name] for name in starts}, "iteration", "kl_seq"))
right.axhline(0.7, color="gray", lw=1)
say(right, "a controller should start from above (gray: its target)", "PPO iteration", "KL [nats]")

# %% The answer
case.finish(
    figure,
    varied="learning rate, epochs, target_kl, kl_target, beta",
    seen=f"Gold {spread(gold['as it was'])}; changes of the step: at most {spread(best_step)}; "
    f"kl_target: {spread(gold['kl_target 2'])}, {spread(kept)} of the gain kept. "
    f"Controller: KL up to {spread(below, 1)} from below, {spread(above, 1)} from above.",
)
