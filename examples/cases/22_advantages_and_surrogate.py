"""When is a policy gradient by GAE biased, and how far can PPO's surrogate be followed?

    python examples/cases/22_advantages_and_surrogate.py        # 3 s on two cores

    A_t = td_t + lambda A_{t+1},   td_t = reward_t + V_{t+1} - V_t,
    reward_t = -beta log_ratio_t, and the reward of the whole response at its last token

PPO estimates advantages with a critic V and then takes several steps on the samples of `old`. Both
are approximations. Varied are lambda and V (exact, 0, exact + noise), and how far theta has left
old along grad J. Each seed is a world of its own: three random transformers over four tokens, four
steps, rewards N(0, 1). Nothing is sampled: every expectation is a sum over all responses.

Expect E[sum_t A_t grad log pi(y_t)] = grad J if lambda = 1, whatever V, for the V_t telescope to a
baseline; or if V is exact, whatever lambda, for then E[td_t | y_<=t] is the advantage. Otherwise it
is biased, less as lambda goes to 1; what lambda < 1 buys is less noise. And expect a cosine of the
surrogate's gradient with grad J(theta) of 1 at old, which the clip loses long before the unclipped
surrogate does: it takes away what is to be gained by going on with old samples. To see it
differently change BETA, or the lambdas and the steps in exact/experiments.py.
"""

# %% By hand: one world, the expected gradient in logits beside grad J
import numpy as np

from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.app.study import Case, spread
from minirlhf.exact.expected import gather_nodes, policy_gradient_dlogits, relative_error
from minirlhf.exact.experiments import gae_table, make_random_world, surrogate_table
from minirlhf.exact.optimum import objective_gradient, policy_values
from minirlhf.rlhf.advantages import gae, token_rewards

case = Case("22_advantages_and_surrogate", __doc__)
BETA = 0.5
world = make_random_world(seed=case.seeds[0])
tree, responses = world.tree, world.responses
log_pi, log_ref = world.log_probs("theta"), world.log_probs("ref")
grad_j = objective_gradient(tree, log_pi, log_ref, world.rewards, kl_coef=BETA)  # (N, V)
exact = policy_values(tree, log_pi, log_ref, world.rewards, kl_coef=BETA).values  # (N,)

nodes, tokens, mask = responses.nodes, responses.tokens, responses.mask  # (M, T) each
log_ratio = np.where(mask > 0, (log_pi - log_ref)[nodes, tokens], 0.0)
rewards = token_rewards(world.rewards, log_ratio, mask=mask, kl_coef=BETA)
print(f"{len(mask)} responses; error of E[estimate] as a share of |grad J|, in logits:")
for name, values in (("V exact", exact), ("V = 0", 0 * exact)):
    for lam in (0.0, 0.95, 1.0):
        advantages, _ = gae(rewards, values[nodes], mask=mask, gamma=1.0, lam=lam)
        dlogits = policy_gradient_dlogits(responses, world.logits["theta"], advantages)
        mean = gather_nodes(tree, responses, dlogits, weights=world.probs("theta"))
        print(f"  {name:8} lambda {lam:4.2f}  {float(relative_error(mean, grad_j)):8.1e}")

# %% The same in the parameters of the transformer, with the noise of one sample
bias, surrogate = {}, {}  # {(V, lambda): [a row for each seed]}, {KL(old || theta): [...]}
for seed in case.seeds:
    for row in gae_table(seed=seed, kl_coef=BETA):
        bias.setdefault((row["value"], row["lam"]), []).append(row)
    for row in surrogate_table(seed=seed, kl_coef=BETA):
        surrogate.setdefault(round(row["kl_old_seq"], 4), []).append(row)
named = {f"V {value}, lambda {lam:g}": rows for (value, lam), rows in bias.items()}
case.table("The gradient by GAE, as shares of |grad J|", named, ("bias", "noise"))
named = {f"KL(old || theta) {kl:g}": rows for kl, rows in surrogate.items()}
columns = ("unclipped", "clipped", "clip_fraction")
case.table("Cosine of the surrogate's gradient with grad J(theta)", named, columns)


def column(rows, name):
    """(keys, seeds)"""
    return np.array([[row[name] for row in of_key] for of_key in rows.values()])


free = np.array([value == "exact" or lam == 1.0 for value, lam in bias])
off, noise = column(bias, "bias"), column(bias, "noise")
zero = off[[value == "zero" for value, _ in bias]]
calm = noise[[value == "exact" for value, _ in bias]]
kept, clipped, cut = (column(surrogate, name) for name in columns)
case.claim("no bias (1e-12) at lambda = 1 and with an exact V", (off[free] < 1e-12).all(axis=0))
case.claim("bias over 0.001 in every other cell", (off[~free] > 1e-3).all(axis=0))
case.claim("V = 0: less bias at every larger lambda", (np.diff(zero, axis=0) < 0).all(axis=0))
case.claim("V exact: more noise at lambda = 1 than at 0", calm[-1] > calm[0])
case.claim(
    "surrogate: a cosine over 0.99 at KL 0.001, clipped or not", np.minimum(kept, clipped)[1] > 0.99
)
case.claim("at KL 0.03 the clip has less of a cosine than no clip", (kept > clipped)[3])

# %% The picture
figure, ((left, middle, right),) = new_figure(12, 3.4, 1, 3)
values, lams = dict.fromkeys(value for value, _ in bias), sorted({lam for _, lam in bias})
for axis, of in ((left, off), (middle, noise)):
    means = of.mean(axis=1).reshape(len(values), len(lams))
    draw_lines(axis, {f"V: {v}": (lams, m) for v, m in zip(values, means, strict=True)})
say(left, "bias: 0 at lambda = 1 and with an exact V", "lambda", "share of |grad J|")
say(middle, "noise: what a smaller lambda saves", "lambda", "sd of one sample / |grad J|")
names = ("cosine, not clipped", "cosine, clipped", "share of tokens cut")
lines = {
    n: (list(surrogate), of.mean(axis=1)) for n, of in zip(names, (kept, clipped, cut), strict=True)
}
draw_lines(right, lines, log="x")
say(right, "PPO's surrogate: the clip loses the direction first", "KL(old || theta) [nats]")

# %% The answer
case.finish(
    figure,
    varied="lambda, the value; the distance from old",
    seen=f"GAE with V = 0 is off by {spread(zero[0])} of |grad J| at lambda 0, {spread(zero[3])} "
    f"at 0.95, 0 at 1. At KL 0.03 from old the cosine of PPO's surrogate with grad J is "
    f"{spread(clipped[3])} with the clip and {spread(kept[3])} without.",
)
