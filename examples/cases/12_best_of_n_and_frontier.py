"""How much of a learned reward should be taken, and by which way?

    python examples/cases/12_best_of_n_and_frontier.py        # 65 s on two cores

No policy has more E[proxy] at its KL(pi||ref) than pi_beta = ref exp(proxy / beta) / Z: the exact
frontier of what RLHF can reach. The proxy is a Bradley-Terry fit to 2,000 pairs of the reference's
replies, of each seed's own, linear in the counts of words: it cannot see that a second answer is
worth nothing. Proxy and gold are exact along the frontier, for the best of n draws by the proxy,
q(y) = ref(y) (F^n - F-^n) / (F - F-), and for PPO, trained from samples at four beta. Gao, Schulman
and Hilton (arXiv 2210.10760) found for the gain in gold, with d = sqrt(KL), the law d (a - b d) for
best-of-n and d (a - b log d) for RL.

Expect the proxy to rise all the way and gold to rise, turn and fall below the reference; PPO just
under the frontier; the KL of best-of-n under log n - (n-1)/n (arXiv 2401.01879), with less proxy
and more gold than the frontier at the same KL, so that the KL alone does not say how far a reward
was taken. Control: a proxy that sees what saturates, fitted to the same pairs, has no fold. To see
it differently, fit to 20,000 pairs: more of the same pairs does not move the peak.
"""

# %% A proxy of each seed's own, and one that can see saturation
import numpy as np

from desk import fit_bradley_terry
from gao import fit_gao
from minirlhf.app.pictures import LOOKS, draw_lines, new_figure, say
from study import Arm, Case, spread

case = Case("12_best_of_n_and_frontier", __doc__)
BETAS, DRAWS = np.geomspace(8, 0.05, 40), (2, 4, 8, 16, 64, 256, 1024, 4096)
proxies, rich = {}, {}
for seed, desk in zip(case.seeds, case.desks, strict=True):
    pairs = desk.draw_pairs(desk.ref, 2000, rng=case.rng(seed))
    for of, features in ((proxies, desk.counts), (rich, desk.rich_features)):
        of[seed] = desk.standardised(features @ fit_bradley_terry(features, pairs))

# %% The exact frontier, best-of-n, and PPO beside them
PPO = [f"PPO, beta {beta}" for beta in (1.0, 0.5, 0.25, 0.1)]
runs = case.train(
    lambda desk, seed: {
        name: Arm({"kl_coef": float(name.split()[-1])}, reward=proxies[seed]) for name in PPO
    },
    measure_every=60,
)


def points(desk, reward, policies):
    """KL, E[reward] and gold of some policies: (3, n)."""
    return np.array([(desk.kl(p), p @ reward, p @ desk.gold) for p in policies]).T


families = {"frontier": [], "best of n": [], "PPO": [], "control": []}
along, equal, trained = [], {f"best of {n}": [] for n in DRAWS}, {name: [] for name in PPO}
for i, (seed, desk) in enumerate(zip(case.seeds, case.desks, strict=True)):
    proxy, start = proxies[seed], desk.ref @ desk.gold
    frontier = points(desk, proxy, (desk.optimum(proxy, beta=beta) for beta in BETAS))
    best_of = points(desk, proxy, (desk.best_of(proxy, n=n) for n in DRAWS))
    ppo = points(desk, proxy, (runs[name][i].probs for name in PPO))
    control = points(desk, rich[seed], (desk.optimum(rich[seed], beta=beta) for beta in BETAS))
    for of, found in zip(families.values(), (frontier, best_of, ppo, control), strict=True):
        of.append(found)
    for n, (kl, reward, gold) in zip(DRAWS, best_of.T, strict=True):
        most, gold_there = (np.interp(kl, frontier[0], line) for line in frontier[1:])
        row = {"KL": kl, "bound": np.log(n) - (n - 1) / n, "proxy": reward, "gold": gold}
        row |= {"less proxy": most - reward, "more gold": gold - gold_there}
        equal[f"best of {n}"].append(row)
    objectives = frontier[1] - BETAS * frontier[0]  # J*(beta): E[proxy] <= J*(beta) + beta KL
    for name, (kl, reward, gold) in zip(PPO, ppo.T, strict=True):
        row = {"KL": kl, "proxy": reward, "gold": gold}
        trained[name].append({**row, "below": (objectives + BETAS * kl).min() - reward})
    kl, _, gold = frontier
    row = {"gold of ref": start, "peak": gold.max(), "at KL": kl[gold.argmax()], "end": gold[-1]}
    row["as ref at KL"] = np.interp(-start, -gold[kl > 1], kl[kl > 1])
    for law in ("linear", "log"):
        row[f"R2, {law}"] = fit_gao(kl, gold - start, law=law).r_squared
        row[f"best-of-n, {law}"] = fit_gao(best_of[0], best_of[2] - start, law=law).r_squared
    along.append({**row, "control's end": control[2, -1]})
gold_of = ("gold of ref", "peak", "at KL", "as ref at KL", "end", "control's end")
case.table("Gold along the frontier", {"": along}, gold_of)
laws = ("R2, linear", "R2, log", "best-of-n, linear", "best-of-n, log")
case.table("R^2 of Gao's laws for the gain in gold (expected: log for RL)", {"": along}, laws)
case.table("Best of n, and the frontier at the same KL", equal, tuple(equal["best of 2"][0]))
case.table(
    "PPO: how far below the frontier its proxy is", trained, ("KL", "proxy", "below", "gold")
)

fold = {name: np.array([row[name] for row in along]) for name in along[0]}
less, more, room = (
    np.array([[f(row) for row in rows] for rows in equal.values()])
    for f in (lambda r: r["less proxy"], lambda r: r["more gold"], lambda r: r["bound"] - r["KL"])
)
below = np.array([[row["below"] for row in rows] for rows in trained.values()])
case.claim("gold gains 0.2 at least along the frontier", fold["peak"] > fold["gold of ref"] + 0.2)
case.claim("and ends 1 below the reference", fold["end"] < fold["gold of ref"] - 1)
case.claim("control: it ends above that peak", fold["control's end"] > fold["peak"])
case.claim("best of n, for each n: KL within its bound", (room > 0).all(axis=0))
case.claim("less proxy and more gold at the same KL", (np.minimum(less, more) > 0.01).all(axis=0))
case.claim("PPO ends within 0.05 of the frontier", (below < 0.05).all(axis=0))
case.claim("the linear law fits the frontier better", fold["R2, linear"] > fold["R2, log"])

# %% The picture and the answer
figure, ((left, right),) = new_figure(10, 3.8, 1, 2)
mean = {name: np.mean(of, axis=0) for name, of in families.items()}
root = {name: line[0] ** 0.5 for name, line in mean.items()}
looks = [{**LOOKS[0], "marker": ""}, LOOKS[1], {**LOOKS[2], "ls": ""}, LOOKS[3]]
draw_lines(left, {name: (root[name], mean[name][1]) for name in list(mean)[:3]}, looks)
draw_lines(right, {name: (root[name], mean[name][2]) for name in mean}, looks)
say(left, "proxy: nothing lies above the frontier", "sqrt KL(pi || ref)", "reward units")
say(right, "gold: it turns, but not for the control", "sqrt KL(pi || ref)", "reward units")
sixteen = DRAWS.index(16)
seen = f"Gold peaks at {spread(fold['peak'])} (KL {spread(fold['at KL'])}) and is the reference's "
seen += (
    f"again at KL {spread(fold['as ref at KL'], 1)}; best of 16 has {spread(less[sixteen])} less "
)
seen += f"proxy and {spread(more[sixteen])} more gold than the frontier at its KL."
case.unexpected("Gao's log law for RL fits the exact frontier worse than the linear one.")
case.finish(figure, varied="beta; n of best-of-n; the proxy's pairs", seen=seen)
