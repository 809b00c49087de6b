"""Where do GRPO, Dr. GRPO, RLOO, GSPO, CISPO and DPO come to rest, beside PPO?

    python examples/cases/26_objectives_at_rest.py        # 110 s on two cores

All of them are said to maximise E[r] - beta KL(pi || ref). Each trains the same transformer on the
support desk, from as many replies, with the settings of its recipe (train/recipes.toml) and beta
0.5; the desk has one prompt, so a batch of 256 is one group. The exact optimum, and the exact rest
of GRPO and Dr. GRPO, whose k3 in the loss descends another divergence, stand beside them. Control:
GRPO with the penalty in its reward. CISPO as published (DAPO, too) has none.

Expect whoever has k1 in the reward near the optimum, pi* = ref exp(r / beta) / Z, and so DPO, whose
optimum over all pairs is pi* too. Expect GRPO where its mean gradient is 0,
    pi(a|s) = beta ref(a|s) / (beta + lambda(s) / c(s, a) - A(s, a)),
on this desk further from the reference and with less gold, Dr. GRPO further still, because its
advantages are not divided by an sd above 1. GSPO has GRPO's rest, and with the clip of its authors
(3e-4) moves slowly. Without a penalty nothing rests. To see it differently change BETA.
"""

# %% Nine objectives, from as many replies
import numpy as np

from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.optimum import frontier_reward
from minirlhf.train.recipes import recipe
from other_optima import grpo_rest
from study import Arm, Case, PairsArm, ends, mean_lines, spread

case = Case("26_objectives_at_rest", __doc__)
BETA, GROUP = 0.5, {"samples_per_prompt": 256}
IN_REWARD, FREE = "GRPO, k1 in the reward", "CISPO, no penalty"


def arm(name, **changes):
    return Arm({"kl_coef": BETA, **recipe(name)["ppo"], **GROUP, **changes}, iterations=60)


arms = {
    "PPO": Arm({"kl_coef": BETA}),
    "RLOO": arm("rloo", optimizer={"max_grad_norm": 0.3}),
    "REINFORCE++": Arm({"kl_coef": BETA, "advantages": "batch"}),
    "DPO": PairsArm({"kl_coef": BETA}, n_pairs=60 * 128),
    IN_REWARD: arm("grpo", kl_mode="reward_k1"),
    "GRPO": arm("grpo"),
    "Dr. GRPO": arm("dr-grpo"),
    "GSPO": arm("gspo"),
    FREE: arm("cispo"),
}
runs = case.train(arms, measure_every=15)

# %% Where they should rest, exactly
rows = ends(runs)
for name, of in (("GRPO", True), ("Dr. GRPO", False)):
    asked = {"kl_coef": BETA, "by_length": of, "by_sd": of}
    rests = [d.probs(grpo_rest(d.tree, d.ref_log_probs, d.proxy, **asked)) for d in case.desks]
    pairs = zip(case.desks, rests, strict=True)
    rows[f"rest of {name}"] = [{**d.describe(p), "probs": p} for d, p in pairs]
rows["optimum"] = [d.describe(d.optimum(d.proxy, beta=BETA)) for d in case.desks]
rows["reference"] = [d.describe(d.ref) for d in case.desks]
for of_seeds in rows.values():
    for row, first, best in zip(of_seeds, rows["reference"], rows["optimum"], strict=True):
        j, low, high = (r["proxy"] - BETA * r["kl_seq"] for r in (row, first, best))
        row["share of J*"] = (j - low) / (high - low)
case.table("At the end", rows, ("share of J*", "proxy", "kl_seq", "gold", "length"))


def of(name, column="share of J*"):
    return np.array([row[column] for row in rows[name]])


def nearer(name, to):
    """Is the end of an arm nearer to this rest than to the optimum, by KL(target || policy)?"""
    for run, desk, row in zip(runs[name], case.desks, rows[to], strict=True):
        logp = np.log(np.maximum(run.probs, 1e-300))
        targets = row["probs"], desk.optimum(desk.proxy, beta=BETA)
        rest, best = (p @ (np.log(np.maximum(p, 1e-300)) - logp) for p in targets)
        yield rest < best


def under(row, desk):
    at = {"kl_seq": row["kl_seq"]}
    return row["proxy"] <= frontier_reward(desk.tree, desk.ref_log_probs, desk.proxy, **at) + 1e-9


right = ("PPO", "RLOO", "REINFORCE++", IN_REWARD)
rests = ("rest of GRPO", "rest of Dr. GRPO")
case.claim("with k1 in the reward over 0.95 of J*", np.min([of(n) for n in right], axis=0) > 0.95)
case.claim("DPO over 0.85 of J*", of("DPO") > 0.85)
for name, rest in zip(("GRPO", "Dr. GRPO"), rests, strict=True):
    case.claim(f"{name} ends nearer to its exact rest than to the optimum", [*nearer(name, rest)])
off = [of(r, "kl_seq") > 1.4 * of("optimum", "kl_seq") for r in rests]
off += [of(r, "gold") < of("optimum", "gold") - 0.2 for r in rests]
case.claim("both rests: 1.4 times the optimum's KL or more, 0.2 less gold", np.all(off, axis=0))
slow = of("GSPO", "kl_seq") < 0.5 * of("GRPO", "kl_seq")
case.claim("GSPO's own clip: half of GRPO's KL after as many replies", slow)
gone = of(FREE, "kl_seq") > 10, of(FREE, "gold") < of("reference", "gold")
case.claim("without a penalty: KL over 10, less gold than the reference", np.all(gone, axis=0))
frontier = [[under(rows[n][i], d) for n in arms] for i, d in enumerate(case.desks)]
case.claim("all nine lie under the exact frontier", [all(of_seed) for of_seed in frontier])

# %% The picture
figure, ((left, right_axis),) = new_figure(10, 3.6, 1, 2)
shown = {name: runs[name] for name in ("PPO", "GRPO", "Dr. GRPO", "GSPO", IN_REWARD)}
for axis, column in ((left, "proxy"), (right_axis, "gold")):
    draw_lines(axis, mean_lines(shown, "kl_seq", column))
    for name, mark in (("optimum", "*"), *zip(rests, "sD", strict=True), ("DPO", "P")):
        at = of(name, "kl_seq").mean(), of(name, column).mean()
        axis.plot(*at, mark, color="black", markersize=9, fillstyle="none", label=name)
say(left, "the proxy: each towards its own rest", "KL(pi || ref) [nats]")
say(right_axis, "gold: past the optimum it falls", "KL [nats]", legend={"loc": "lower left"})

# %% The answer
j = {name: spread(of(name)) for name in rows}
case.finish(
    figure,
    varied="the objective, at one beta and as many replies",
    seen=f"Share of J*: PPO {j['PPO']}, RLOO {j['RLOO']}, DPO {j['DPO']}; GRPO {j['GRPO']} (exact "
    f"rest {j[rests[0]]}), Dr. GRPO {j['Dr. GRPO']} ({j[rests[1]]}); GRPO with k1 in its reward "
    f"{j[IN_REWARD]}.",
)
