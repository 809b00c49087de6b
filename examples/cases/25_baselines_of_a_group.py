"""What do the baselines and divisors of RLOO, Dr. GRPO and GRPO do to the expected gradient?

    python examples/cases/25_baselines_of_a_group.py        # 3 s on two cores

Without a critic a reply is compared with the others to its prompt: with their mean (RLOO, arXiv
2402.14740), with the mean of all (Dr. GRPO, 2503.20783), or that divided by their sd (GRPO,
2402.03300, which also divides a reply's tokens by their number). Varied are these. Every pair of
replies of a small world is enumerated (121 x 121; three random transformers, rewards N(0, 1), a
world of its own for each seed): means and noise are exact, beside grad J = grad E[r] in the
parameters of the transformer.

Expect no error if the baseline is made of the other reply alone, because it knows nothing of this
one and E[grad log pi] = 0; half of grad J, (G - 1) / G, where a reply is in its own mean; and
another direction if the sd divides, of a pair the sign alone. In a large group mu and sigma are
constants, and GRPO is grad J / sigma. 1 / |y| weighs replies, so it turns any of them. Less noise
is no merit of its own: a shorter gradient has less. To see it differently take other rewards.
"""

# %% Every pair of replies
import numpy as np

from gradients import beside, scores
from minirlhf.app.pictures import new_figure, say
from minirlhf.exact.expected import make_random_world
from minirlhf.rlhf.advantages import advantages_without_critic
from study import Case, column, spread

case = Case("25_baselines_of_a_group", __doc__)
FORMS = {"RLOO": "leave-one-out", "Dr. GRPO": "group-mean", "GRPO, not divided by |y|": "group"}
FORMS |= {"RLOO, divided by |y|": "leave-one-out", "GRPO": "group"}
LARGE = "GRPO, not divided by |y|, a large group"


def of_pairs(world):
    """{objective: error, cosine, length and noise of a pair's gradient}."""
    p, r, mask = world.probs("theta"), world.rewards, world.responses.mask
    s = scores(world, world.log_probs("theta"), mask) @ world.jacobian("theta")  # (M, P)
    g, products, M = (p * r) @ s, s @ s.T, len(p)
    both = np.stack(np.broadcast_arrays(r[:, None], r), axis=-1).reshape(-1, 1)  # (2 M M, 1)
    centred = both - p @ r
    advantages = {"no baseline": both, "baseline E r": centred}
    advantages[LARGE] = centred / np.sqrt(p @ (r - p @ r) ** 2)
    for name, form in FORMS.items():
        known = {"mask": np.ones_like(both), "form": form, "samples_per_prompt": 2}
        advantages[name] = advantages_without_critic(both, **known)
    rows = {}
    for name, A in advantages.items():
        divided = name == "GRPO" or name.endswith(", divided by |y|")
        share = 1 / mask.sum(axis=1) if divided else np.ones(M)
        first, second = np.moveaxis(A.reshape(M, M, 2), -1, 0)  # of reply i, of reply j
        first, second = first * share[:, None], second * share
        mean = 0.5 * p * (first @ p + p @ second) @ s
        own = np.diag(products)
        square = first**2 * own[:, None] + second**2 * own + 2 * first * second * products
        variance = 0.25 * p @ square @ p - mean @ mean
        rows[name] = {**beside(mean, g), "noise": np.sqrt(variance / (g @ g))}
    return rows


found = {}
for seed in case.seeds:
    for name, row in of_pairs(make_random_world(seed=seed)).items():
        found.setdefault(name, []).append(row)
case.table("A pair of replies, beside grad J", found, ("error", "cosine", "length", "noise"))

error, cosine, length = (column(found, name) for name in ("error", "cosine", "length"))
free = [error[name] for name in ("no baseline", "baseline E r", "RLOO")]
case.claim("no error (1e-12) without the reply in its own baseline", np.max(free, axis=0) < 1e-12)
half = np.abs(error["Dr. GRPO"] - 0.5), np.abs(cosine["Dr. GRPO"] - 1)
case.claim("Dr. GRPO: half of grad J (1e-12)", np.max(half, axis=0) < 1e-12)
case.claim("a large group: grad J over sigma (1e-12)", np.abs(cosine[LARGE] - 1) < 1e-12)
case.claim("GRPO of pairs has another direction", cosine["GRPO, not divided by |y|"] < 0.9999)
turned = cosine["RLOO, divided by |y|"]
case.claim("1/|y| turns RLOO: a cosine below 0.995", turned < 0.995)
case.claim("all keep an acute angle with grad J", np.min([*cosine.values()], axis=0) > 0)

# %% The picture
figure, ((left, right),) = new_figure(10, 3.4, 1, 2)
names = list(found)
for axis, values in ((left, cosine), (right, length)):
    means = [values[name].mean() for name in names]
    sds = [values[name].std(ddof=1) if len(case.seeds) > 1 else 0.0 for name in names]
    axis.errorbar(means, range(len(names)), xerr=sds, fmt="o", color="black")
    axis.set_yticks(range(len(names)), names if axis is left else [""] * len(names), fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1.0, color="0.7", zorder=0)
say(left, "direction: the sd and 1/|y| turn it", "cosine with grad J")
say(right, "length: (G - 1) / G, 1 / sigma, 1 / |y|", "length in |grad J|")

# %% The answer
case.finish(
    figure,
    varied="what is taken off a reply's reward, what divides it",
    seen=f"Of pairs: RLOO 0 off grad J, Dr. GRPO half of it, GRPO a cosine of "
    f"{spread(cosine['GRPO, not divided by |y|'])}, with 1/|y| {spread(cosine['GRPO'])}; RLOO with "
    f"1/|y| {spread(turned)}. A large group: GRPO is grad J over sigma.",
)
