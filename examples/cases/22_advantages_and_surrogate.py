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
differently change BETA or KLS.
"""

# %% GAE: its bias, and the noise of one sample, in the parameters of a transformer
import numpy as np

from gradients import gae_table, gather_nodes
from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.expected import beside, make_random_world, policy_gradient_dlogits
from minirlhf.exact.optimum import evaluate_exactly, objective_gradient, policy_values
from minirlhf.exact.tree_policy import tree_gradient, tree_logits
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.tree import tree_map
from study import Case, column, spread

case = Case("22_advantages_and_surrogate", __doc__)
BETA, KLS = 0.5, (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3)
bias = {}  # {(V, lambda): [a row for each seed]}
for seed in case.seeds:
    for row in gae_table(seed=seed, kl_coef=BETA):
        bias.setdefault((row["value"], row["lam"]), []).append(row)
named = {f"V {value}, lambda {lam:g}": rows for (value, lam), rows in bias.items()}
case.table("The gradient by GAE, as shares of |grad J|", named, ("bias", "noise"))


# %% By hand: PPO's surrogate as theta leaves old, whose samples and exact advantages stay
def surrogate_along(world):
    """A row for each of KLS: old + x grad J, x such that KL(old || theta) = c x^2 is about that."""
    tree, responses = world.tree, world.responses
    at = (responses.nodes, responses.tokens)
    old, log_old, probs = world.policies["old"], world.log_probs("old"), world.probs("old")
    judged = {"ref_log_probs": world.log_probs("ref"), "rewards": world.rewards, "kl_coef": BETA}
    q, values = policy_values(tree, log_old, **judged)
    advantages = (q - values[:, None])[at]
    slope = tree_gradient(objective_gradient(tree, log_old, **judged), old, **world.where)

    def leave(x):
        params = tree_map(lambda a, d: a + x * d, old, slope)
        logits = tree_logits(params, **world.where)
        log_pi = log_softmax(logits)
        kl = evaluate_exactly(tree, log_old, log_pi, world.rewards, kl_coef=0.0).kl_seq
        return params, logits, log_pi, float(kl)

    for kl in KLS:
        params, logits, log_pi, _ = leave(1e-3 * (kl / leave(1e-3)[-1]) ** 0.5)
        true, row = world.pull_back(objective_gradient(tree, log_pi, **judged), params), {}
        for name, clip in (("unclipped", "none"), ("clipped", "ppo")):
            of_old = {"old_logp": log_old[at], "form": clip}
            each = policy_gradient_dlogits(responses, logits, advantages, **of_old)
            mean = gather_nodes(tree, responses, each, weights=probs)
            row[name] = beside(world.pull_back(mean, params), true)["cosine"]
        weights, cut = probs[:, None] * responses.mask, ~each.any(axis=-1)  # by the clip
        yield {**row, "clip_fraction": float((weights * cut).sum() / weights.sum())}


rows = [list(surrogate_along(make_random_world(seed=seed))) for seed in case.seeds]
surrogate = dict(zip(KLS, zip(*rows, strict=True), strict=True))  # {KL: a row for each seed}
named = {f"KL(old || theta) about {kl:g}": of_kl for kl, of_kl in surrogate.items()}
columns = ("unclipped", "clipped", "clip_fraction")
case.table("Cosine of the surrogate's gradient with grad J(theta)", named, columns)

free = np.array([value == "exact" or lam == 1.0 for value, lam in bias])
off, noise = (np.array([*column(bias, name).values()]) for name in ("bias", "noise"))
zero = off[[value == "zero" for value, _ in bias]]
calm = noise[[value == "exact" for value, _ in bias]]
kept, clipped, cut = (np.array([*column(surrogate, name).values()]) for name in columns)
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
