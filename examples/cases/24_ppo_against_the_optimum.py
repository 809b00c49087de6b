"""How close does PPO come to the exact optimum, and what keeps it away?

    python examples/cases/24_ppo_against_the_optimum.py        # 80 s on two cores

    J(pi) = E_pi[r] - beta KL(pi || ref),   J* = beta log Z,
    J* - J(pi) = beta KL(pi || pi*) = sum over prefixes s of beta Pr(s) KL(pi(.|s) || pi*(.|s))

A curve that has become flat does not say how far the best is. Here it is known: all 137,257 replies
of the desk are enumerated, for the reference that a transformer has learned under each seed. It is
then trained from samples in three ways: PPO with a learning rate that falls to 0 from twice the
constant, PPO with a constant rate, and one-step REINFORCE with a leave-one-out baseline (RLOO).
What is lost has no error bar; it is a share of J* - J(ref), 1 at the reference and 0 at the
optimum.

Expect less than 1 % to be lost with the falling rate and by RLOO, and a constant rate to lose
several times as much and to fluctuate: near the optimum the gradient is small, its noise moves the
policy by as much as the rate lets it, so what is left is the noise and not the distance. The last
table splits it by the position of the token. Control: the constant rate, cut to a tenth for the
last 20 iterations, loses less at once. To see it differently change BETA or the rates.
"""

# %% Three ways to train, and a constant rate that is cut at the end
import numpy as np

from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.optimum import by_depth, evaluate_exactly, optimality_gap, soft_optimum
from study import Arm, Case, spread, values

case = Case("24_ppo_against_the_optimum", __doc__)
BETA, RATE = 0.5, {"learning_rate": 1e-3, "schedule": "constant"}
constant = {"kl_coef": BETA, "optimizer": RATE}
cut = Arm({"kl_coef": BETA, "optimizer": {**RATE, "learning_rate": 1e-4}}, iterations=20)
one_step = {"epochs": 1, "minibatches": 1, "clip": "none"}
one_step |= {"advantages": "leave-one-out", "samples_per_prompt": 256}  # there is one prompt
one_step |= {"kl_coef": BETA, "optimizer": {"max_grad_norm": 0.3}}
FALLS, SAME, RLOO, CUT = ("PPO, rate to 0", "PPO, constant rate", "one-step RLOO", "control: cut")
arms = {
    FALLS: Arm({"kl_coef": BETA}, iterations=100),
    SAME: Arm(constant, iterations=100),
    RLOO: Arm(one_step, iterations=100),
    CUT: Arm(constant, iterations=80, then=(cut,)),
}
runs = case.train(arms)

# %% What is lost, at the end and by token
best = [soft_optimum(d.tree, d.ref_log_probs, d.proxy, kl_coef=BETA) for d in case.desks]
top = np.array([b.objective for b in best])[:, None]
room = top - np.array([d.ref @ d.proxy for d in case.desks])[:, None]
lost = {
    name: (top - values(of, "proxy") + BETA * values(of, "kl_seq")) / room
    for name, of in runs.items()
}  # (seeds, measurements)
at_end, by_token = {}, {}
for name, of_seeds in runs.items():
    at_end[name], by_token[name] = [], []
    for i, (run, desk) in enumerate(zip(of_seeds, case.desks, strict=True)):
        policies = (run.log_probs, desk.ref_log_probs)
        value = evaluate_exactly(desk.tree, *policies, desk.proxy, kl_coef=BETA)
        row = {"lost, %": 100 * lost[name][i, -1], "KL": float(value.kl_seq)}
        row["mean of the last 5, %"] = 100 * lost[name][i, -5:].mean()
        at_end[name].append({**row, "flatness": float(value.flatness)})
        gap = optimality_gap(desk.tree, run.log_probs, best[i])
        parts = 100 * by_depth(desk.tree, gap) / room[i]
        by_token[name].append({f"token {t}": float(x) for t, x in enumerate(parts, 1)})
columns = tuple(at_end[FALLS][0])
case.table("Where training ended", at_end, columns)
case.table("What is lost at each token, % of J* - J(ref)", by_token, tuple(by_token[FALLS][0]))

falls, same, rloo, after = (lost[name][:, -1] for name in (FALLS, SAME, RLOO, CUT))
whole = np.array([[sum(row.values()) for row in of] for of in by_token.values()]) / 100
ends = np.array([falls, same, rloo, after])
case.claim(
    "J* - J is the sum of what is lost at each token, to 1e-6",
    (abs(whole - ends) < 1e-6).all(axis=0),
)
case.claim("the falling rate loses less than 1 %", falls < 0.01)
case.claim("one-step RLOO loses less than 1 %", rloo < 0.01)
case.claim("the constant rate loses over 3 times as much as the falling one", same > 3 * falls)
case.claim(
    "control: after the cut it loses less than half of the constant rate", after < 0.5 * same
)

# %% The picture
figure, ((left, right),) = new_figure(9, 3.6, 1, 2)
draw_lines(
    left,
    {name: (values(runs[name], "iteration")[0], of.mean(axis=0)) for name, of in lost.items()},
    log="y",
)
say(left, "what is lost: a constant rate keeps it up", "PPO iteration", "(J* - J) / (J* - J_ref)")
tokens = {name: [np.mean([row[t] for row in of]) for t in of[0]] for name, of in by_token.items()}
draw_lines(right, {name: (range(1, len(x) + 1), x) for name, x in tokens.items()}, log="y")
say(right, "where the rest is lost", "position of the token", "% of J* - J_ref")

# %% The answer
case.finish(
    figure,
    varied="the schedule of the rate; PPO or RLOO",
    seen=f"PPO with a rate that falls loses {spread(100 * falls)} % of J* - J(ref), a constant one "
    f"{spread(100 * same)} %, RLOO {spread(100 * rloo)} %; the constant rate cut to a tenth, "
    f"{spread(100 * after)} %.",
)
