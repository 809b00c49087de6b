"""How long do the ratios of PPO, GSPO and CISPO point along grad J, and what do TIS and MIS mend?

    python examples/cases/27_ratios_off_policy.py        # 4 s on two cores

Once the policy has moved, the samples are those of `old`, and each token's gradient is weighted by
a ratio: rho_t, cut by a clip that also cuts the gradient (PPO); (pi(y)/old(y))^(1/|y|) of the whole
reply (GSPO, arXiv 2507.18071); a cut rho_t that is held constant (CISPO, 2506.13585). Or the
sampler was never old, but rounded, or late: then pi_old / sampler of each token, cut at C (TIS), or
0 beyond (MIS, 2510.18855), multiplies the advantage. Varied are these, and how far theta has moved
from old along grad J. Every reply is enumerated; each seed is a world of three random transformers.

Expect the direction to be kept by all of them near old, lost first by PPO's clip, which takes away
what is to be gained by going on, then by the others: the ratio of a token keeps old's prefixes, and
GSPO's is a root of the right one. Expect of the weights that only the product over a reply mends
all of the error. To see it differently change KLS, or how far the sampler is (LATE).
"""

# %% Samples of old: the cosine of each surrogate's mean gradient with grad J(theta)
import numpy as np

from gradients import beside, scores, up_along_the_gradient
from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.expected import make_random_world
from minirlhf.exact.optimum import objective_gradient
from minirlhf.rlhf.advantages import importance_weights
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.rlhf.objectives import SURROGATES
from study import Case, column, spread

case = Case("27_ratios_off_policy", __doc__)
KLS, LATE, CAP = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0), 0.2, 1.2
RATIOS = {
    "PPO": ("token", "ppo"),
    "PPO without a clip": ("token", "none"),
    "GSPO without a clip": ("sequence", "none"),
    "CISPO": ("clipped-weight", "ppo"),
}


def along(world):
    """A row for each of KLS: the cosine of every ratio at theta, on samples of old."""
    at, p = (world.responses.nodes, world.responses.tokens), world.probs("old")
    centred = (world.rewards - p @ world.rewards)[:, None] * world.responses.mask
    of_old = {"old_logp": world.log_probs("old")[at], "advantages": centred}
    of_old["weights"] = world.responses.mask
    for kl in KLS:
        params, log_pi = up_along_the_gradient(world, kl)
        uphill = objective_gradient(world.tree, log_pi, log_pi, world.rewards, kl_coef=0.0)
        g, row = world.pull_back(uphill, params), {}
        for name, (ratio, clip) in RATIOS.items():
            forward, backward = SURROGATES[ratio]
            slopes = -backward(1.0, forward(log_pi[at], clip=clip, **of_old)[1])
            mean = (p @ scores(world, log_pi, slopes)).reshape(log_pi.shape)
            row[name] = beside(world.pull_back(mean, params), g)["cosine"]
        yield row


worlds = [make_random_world(seed=seed) for seed in case.seeds]
rows = zip(*([*along(world)] for world in worlds), strict=True)
by_kl = {f"KL(old || theta) about {kl:g}": list(of) for kl, of in zip(KLS, rows, strict=True)}
case.table("Cosine with grad J(theta), samples of old", by_kl, tuple(RATIOS))


# %% A sampler that is not the policy: the error that is left
def mended(world):
    """{weight: error} on samples of a policy that is LATE of the way from theta to old."""
    at, mask, r = (
        (world.responses.nodes, world.responses.tokens),
        world.responses.mask,
        world.rewards,
    )
    logits = world.logits["theta"] + LATE * (world.logits["old"] - world.logits["theta"])
    log_pi, probs, jacobian = (
        world.log_probs("theta"),
        world.probs("theta"),
        world.jacobian("theta"),
    )
    logp, sampler_logp = log_pi[at] * mask, log_softmax(logits)[at] * mask
    weights = {"none": mask}
    for form in ("tis", "mis"):
        weights[form] = importance_weights(logp, sampler_logp, mask=mask, form=form, cap=CAP)
    weights["product over the reply"] = np.exp((logp - sampler_logp).sum(axis=1))[:, None] * mask
    g, A = (probs * r) @ scores(world, log_pi, mask) @ jacobian, (r - probs @ r)[:, None]
    of_sampler = np.exp(sampler_logp.sum(axis=1))
    means = {n: of_sampler @ scores(world, log_pi, w * A) for n, w in weights.items()}
    return {name: beside(mean @ jacobian, g) for name, mean in means.items()}


late = [mended(world) for world in worlds]
left_over = {name: [row[name] for row in late] for name in late[0]}
case.table("Samples of another policy, weighted", left_over, ("error", "cosine", "length"))

cosines = np.array([[[row[n] for n in RATIOS] for row in of] for of in by_kl.values()])
case.claim("at KL 0.001 all have a cosine over 0.99", cosines[0].min(axis=1) > 0.99)
clip, others = cosines[3, :, 0], cosines[3, :, 1:].min(axis=-1)
case.claim("at KL 0.1 PPO's clip has the least, the others 0.85", (clip < others) & (others > 0.85))
left = column(left_over, "error")
case.claim("the product over a reply mends it (1e-12)", left["product over the reply"] < 1e-12)
case.claim("TIS, of single tokens, leaves 0.01 or more", left["tis"] > 0.01)

# %% The picture
figure, ((axis, bars),) = new_figure(10, 3.4, 1, 2)
lines = {n: (KLS, m) for n, m in zip(RATIOS, cosines.mean(axis=1).T, strict=True)}
draw_lines(axis, lines, log="x")
say(axis, "the clip loses the direction first", "KL(old || theta) [nats]", "cosine with grad J")
bars.barh(list(left), [error.mean() for error in left.values()], color="0.6")
for row, error in enumerate(left.values()):
    bars.plot(error, [row] * len(error), "o", color="black", markersize=4)
bars.invert_yaxis()
say(bars, "another sampler: what a weight leaves", "error in |grad J|, a dot a world")

# %% The answer
case.finish(
    figure,
    varied="the ratio and how far theta is; the weight of a late sampler",
    seen=f"Cosine at KL 0.1 from old: PPO {spread(clip)}, without the clip "
    f"{spread(cosines[3, :, 1])}, GSPO {spread(cosines[3, :, 2])}, CISPO "
    f"{spread(cosines[3, :, 3])}. A late sampler: error {spread(left['none'])}, TIS "
    f"{spread(left['tis'])}, MIS {spread(left['mis'])}.",
)
