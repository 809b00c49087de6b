"""When does optimising against a judge make a model agree with a wrong belief more often?

    python examples/cases/20_sycophancy_covariance.py        # 1 s on two cores

A user states something wrong; a reply agrees with it or corrects it, and is warm and detailed to
some degree. Raters compare replies, a reward model r is fitted to 2,000 comparisons, and the policy
becomes ref exp(r / beta) / Z. The paper (arXiv 2602.01002) says that the covariance of agreement
and reward under the reference decides the direction, and derives in closed form the agreement
penalty whose policy, of all that agree no more than before, is nearest in KL to the uncorrected
one: lambda_beta below. Varied are the raters' bias and taste for warmth, and the correction.

Expect d Pr(agree) / d(1/beta) = Cov_pi(agree, r) all along the tilt: so the covariance at the
reference has the sign of the *first* step, not of all. Raters who dislike agreement but love
warmth, which only agreeing replies have, turn it round. lambda = Cov_ref / Var_ref(agree) makes the
first step 0 with the least variance. lambda_beta = beta log (E_ref[exp(r/beta) | agree] /
E_ref[exp(r/beta) | correct]) keeps agreement at the reference's for this beta, with the odds within
agreeing and within correcting replies unchanged. Control: unbiased raters. To change: RATERS, ref.
"""

# %% The replies, the reference, and raters with different tastes
import numpy as np

from desk import fit_bradley_terry
from minirlhf.app.pictures import LOOKS, draw_lines, new_figure, say
from study import Case, spread

case = Case("20_sycophancy_covariance", __doc__)
agree, warmth, detail = (x.ravel().astype(float) for x in np.mgrid[0:2, 0:5, 0:5])
features = np.stack([agree, warmth, detail], axis=1)  # (M, 3)
ref = np.exp(-0.5 * detail - (1 - agree) * warmth) * (agree + (warmth < 2) > 0)
ref *= np.where(agree, 0.3 / ref[agree == 1].sum(), 0.7 / ref[agree == 0].sum())
RATERS = {  # what a rater gives for agreement, for warmth, for detail
    "biased": (0.8, 0.2, 0.3),
    "unbiased": (-1.0, 0.2, 0.3),
    "fond of warmth": (-2.35, 1.0, 0.3),
}


def fitted_reward(taste, rng):
    """r (M,): Bradley-Terry on 2,000 pairs of the reference that these raters compared."""
    pairs = np.minimum(np.searchsorted(ref.cumsum(), rng.random((2000, 2))), ref.size - 1)
    lead = (features[pairs[:, 0]] - features[pairs[:, 1]]) @ taste
    second = rng.random(2000) >= 1 / (1 + np.exp(-lead))
    pairs = np.where(second[:, None], pairs[:, ::-1], pairs)
    return features @ fit_bradley_terry(features, pairs)


def tilt(r, t):
    """ref exp(t r) / Z, t = 1/beta; a copy for each entry of t, in a row."""
    p = ref * np.exp(np.multiply.outer(t, r - r.max()))
    return p / p.sum(axis=-1, keepdims=True)


def cov(p, x, y):
    return p @ (x * y) - (p @ x) * (p @ y)


def kept(r, t):
    """lambda_beta: with r - lambda_beta agree, agreement is as likely as under the reference."""
    of_agreeing, of_correcting = (ref * g @ np.exp(t * r) / (ref @ g) for g in (agree, 1 - agree))
    return np.log(of_agreeing / of_correcting) / t


# %% Along the tilt, for every judge and every correction
BETAS, FAR = {"beta 4": 4.0, "beta 1": 1.0, "beta 0.25": 0.25}, "beta 0.25"
T, H = np.linspace(0.01, 4.0, 40), 1e-4  # 1/beta
rows, lines, worst, excess = {}, {}, [], []
for seed in case.seeds:
    rng, errors = case.rng(seed), []
    rewards = {name: fitted_reward(np.array(taste), rng) for name, taste in RATERS.items()}
    for r in rewards.values():
        for t in T:  # against the derivative in 1/beta, by differences of fourth order
            near, far = (tilt(r, t + h) - tilt(r, t - h) for h in (H, 2 * H))
            errors.append(abs((8 * near - far) @ agree / (12 * H) - cov(tilt(r, t), agree, r)))
    worst.append(max(errors))
    r = rewards["biased"]
    for name, taken in {"less lambda agree": agree, "less as much warmth": warmth}.items():
        rewards[name] = r - cov(ref, agree, r) / cov(ref, agree, taken) * taken
    lines = lines or {name: (T, tilt(reward, T) @ agree) for name, reward in rewards.items()}
    for name, reward in rewards.items():
        less = r - reward if name.startswith("less") else 0 * r
        row = {"Cov_ref": cov(ref, agree, reward), "sd taken off": cov(ref, less, less) ** 0.5}
        row |= {b: tilt(reward, 1 / beta) @ agree for b, beta in BETAS.items()}
        rows.setdefault(name, []).append(row)
    keep = {beta: kept(r, 1 / beta) for beta in BETAS.values()}
    row = {b: tilt(r - keep[beta] * agree, 1 / beta) @ agree for b, beta in BETAS.items()}
    q, p = (tilt(to, 1 / BETAS[FAR]) for to in (r, r - keep[BETAS[FAR]] * agree))
    least = 0.3 * np.log(0.3 / (q @ agree)) + 0.7 * np.log(0.7 / (1 - q @ agree))  # for any p
    excess.append(p[ref > 0] @ np.log(p[ref > 0] / q[ref > 0]) - least)
    less = keep[1.0] * agree
    row |= {"Cov_ref": cov(ref, agree, r - less), "sd taken off": cov(ref, less, less) ** 0.5}
    rows.setdefault("less lambda_beta agree", []).append(row)

columns = ("Cov_ref", *BETAS, "sd taken off")
case.table("Pr(agree), 0.30 under the reference; less is of biased", rows, columns)
got = {name: {c: np.array([row[c] for row in of]) for c in columns} for name, of in rows.items()}
biased, honest, fond, first, _, exact = got.values()
for text, holds in {
    "d Pr(agree) / d(1/beta) is Cov(agree, r) under the policy, to 1e-8": np.array(worst) < 1e-8,
    "biased, Cov_ref > 0: it rises to over 0.9": biased[FAR] > 0.9,
    "control, unbiased, Cov_ref < 0: it falls to under 0.1": honest[FAR] < 0.1,
    "fond of warmth, Cov_ref < 0: it falls at beta 4": fond["beta 4"] < 0.295,
    "fond of warmth: and rises to over 0.5 at beta 0.25": fond[FAR] > 0.5,
    "less lambda agree: within 0.01 of the reference at beta 4": abs(first["beta 4"] - 0.3) < 0.01,
    "less lambda_beta agree: the reference's at beta 0.25": abs(exact[FAR] - 0.3) < 1e-9,
    "and no policy that agrees as rarely is nearer in KL, to 1e-9": np.abs(excess) < 1e-9,
}.items():
    case.claim(text, holds)

# %% The picture: the first seed
figure, ((axis,),) = new_figure(6.5, 3.8, 1, 1)
draw_lines(axis, lines, [{**look, "markevery": 5} for look in LOOKS])
axis.axhline(0.3, color="gray", lw=0.8)
say(axis, "Cov at the reference is the first slope, not the end", "1 / beta", "Pr(agree)")

# %% The answer
seen = f"Agreement of 0.30 becomes {spread(biased[FAR])} by biased raters at beta 0.25, "
seen += f"{spread(first[FAR])} corrected to first order, 0.30 by lambda_beta. Raters fond of "
seen += f"warmth have Cov_ref = {spread(fond['Cov_ref'])} and end at {spread(fond[FAR])}."
case.finish(figure, varied="the judges' bias; three corrections; beta", seen=seen)
