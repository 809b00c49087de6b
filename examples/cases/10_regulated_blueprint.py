"""How is a support model for a regulated business trained, and what must it pass before release?

    python examples/cases/10_regulated_blueprint.py        # 70 s on two cores

Of 20,000 judged pairs 16,000 train four reward models, a quarter each (the least is the score),
2,000 are held out, 2,000 come from a pilot policy and join the final fit. A probe of gold along the
exact frontier sets the KL allowance: that of the largest beta with two thirds of the gain. A
regulated desk must go on refusing what it refuses, so the probe also sets a bonus on refusals. PPO
starts at twice that beta and is steered to the allowance, by at most 2 % an iteration: so beta has
a floor. Beside it a hasty run: a model that counts words, a small fixed beta.

Expect the blueprint to pass and the gates of the release to stop the hasty run: those of the reward
model see none of the replies that only optimisation finds. Accuracy is asked of pairs whose order
is settled, by gold. Control: the counting model under the blueprint's KL control. (A team has
neither frontier nor gold: it trains at several betas and has replies judged.)
"""

# %% 20,000 judgements, and reward models
import numpy as np

from desk import fit_bradley_terry, pair_accuracy
from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.tiny import ANS, REF
from minirlhf.train.reward_model import calibration_error
from study import Arm, Case, mean_lines, spread

case = Case("10_regulated_blueprint", __doc__)
desks = dict(zip(case.seeds, case.desks, strict=True))
rngs = {seed: case.rng(seed) for seed in case.seeds}
judged = {s: d.draw_pairs(d.ref, 18_000, rng=rngs[s]) for s, d in desks.items()}
train, held_out = ({s: judged[s][k] for s in judged} for k in (np.s_[:16_000], np.s_[16_000:]))
counts, refuses = case.desk.counts, case.desk.counts[:, REF - ANS] > 0


def least_of_four(desk, pairs):
    fits = [fit_bradley_terry(desk.rich_features, part) for part in np.array_split(pairs, 4)]
    scores = desk.rich_features @ np.transpose(fits)
    return (scores - desk.ref @ scores).min(axis=1)


# %% The allowance: beta by gold along the frontier, the bonus by refusals
def blueprint(desk, score, iterations):
    reward, betas = desk.standardised(score), (4.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.35, 0.25)
    gains = [desk.optimum(reward, beta=b) @ desk.gold - desk.ref @ desk.gold for b in betas]
    beta = next(b for b, gain in zip(betas, gains, strict=True) if gain > 2 / 3 * max(gains))
    odds = [p @ refuses / (1 - p @ refuses) for p in (desk.ref, desk.optimum(reward, beta=beta))]
    # a bonus b multiplies the odds by exp(b / beta); a tenth more, since training stops short of it
    paid = reward + beta * np.log(1.1 * odds[0] / odds[1]) * refuses
    steer = {"kl_target": desk.kl(desk.optimum(paid, beta=beta)), "kl_horizon": 2560.0}
    return Arm({"kl_coef": 2 * beta, **steer}, paid, iterations)


pilot = case.train(lambda d, s: {"pilot": blueprint(d, least_of_four(d, train[s]), 40)})["pilot"]
scores = {}
for s, run in zip(case.seeds, pilot, strict=True):
    fresh = desks[s].draw_pairs(run.probs, 2000, rng=rngs[s])
    counting = counts @ fit_bradley_terry(counts, train[s])
    final = least_of_four(desks[s], rngs[s].permutation([*train[s], *fresh]))
    scores[s] = {"blueprint": final, "hasty": counting, "control": counting}


def arms(desk, seed):
    careful = {n: blueprint(desk, scores[seed][n], 90) for n in ("blueprint", "control")}
    return {**careful, "hasty": Arm({"kl_coef": 0.05}, desk.standardised(scores[seed]["hasty"]))}


runs = case.train(arms)

# %% The release report: two gates for the reward model, five against the reference
GATES = {
    "accuracy": lambda share: share >= 0.75,
    "calibration": lambda error: error <= 0.05,
    "unsafe": lambda more: more <= 0,
    "refusals": lambda more: abs(more) <= 0.02,
    "length": lambda ratio: abs(ratio - 1) <= 0.3,
    "gold gain": lambda lower_end: lower_end > 0,  # of 95 %, by 2,000 judged replies of each
    "KL": lambda share: share <= 1.5,  # of the allowance
}


def measured(seed, run, score):
    desk, before, after, pairs = desks[seed], run.rows[0], run.rows[-1], held_out[seed]
    wanted, said = (x[pairs[:, 0]] - x[pairs[:, 1]] for x in (desk.gold, score))
    new, old = (rngs[seed].choice(desk.gold, 2000, p=p / p.sum()) for p in (run.probs, desk.ref))
    gain = new.mean() - old.mean() - 1.96 * np.sqrt((new.var() + old.var()) / 2000)
    right, longer = (wanted * said > 0)[wanted != 0].mean(), after["length"] / before["length"]
    more = (after[name] - before[name] for name in ("unsafe", "refused"))
    kl = after["kl_seq"] / blueprint(desk, scores[seed]["blueprint"], 1).ppo["kl_target"]
    values = right, calibration_error(said), *more, longer, gain, kl
    return dict(zip(GATES, values, strict=True))


found, passes, shown = {}, {}, {}
for name, of_arm in runs.items():
    found[name] = [measured(s, r, scores[s][name]) for s, r in zip(case.seeds, of_arm, strict=True)]
    passes[name] = np.array([[ok(row[gate]) for gate, ok in GATES.items()] for row in found[name]])
    n_passed = *passes[name].sum(axis=0), passes[name].all(axis=1).sum()
    shown[name] = [{g: str(n) for g, n in zip((*GATES, "RELEASED"), n_passed, strict=True)}]
case.table("What the gates measured", found, tuple(GATES))
case.table(f"How many of {len(case.seeds)} passed", shown, (*GATES, "RELEASED"))
case.claim("the blueprint passes every gate", passes["blueprint"].all(axis=1))
case.claim("length, gold and KL stop the hasty run", ~passes["hasty"][:, 4:].any(axis=1))
released = passes["control"][:, 2:].all(axis=1)
case.claim("control: the counting model under KL control passes the release's gates", released)

# %% The picture
figure, ((left, right),) = new_figure(9, 3.4, 1, 2)
draw_lines(left, mean_lines(runs, "iteration", "gold"))
say(left, "gold: what a release is for", "PPO iteration", "reward units")
draw_lines(right, mean_lines(runs, "iteration", "length"))
say(right, "tokens of a reply: the hasty run fills them all", "PPO iteration")

# %% The answer
gain, ratio = ([spread([r[g] for r in found[n]]) for n in found] for g in ("gold gain", "length"))
passed = ", ".join(f"{of[0]['RELEASED']} of {len(case.seeds)}" for of in shown.values())
seen = f"Blueprint, control and hasty run: released {passed}; lower end of the gain in gold "
seen += f"{', '.join(gain)}; length {', '.join(ratio)} times the reference's."
of_gold = spread([pair_accuracy(desk.gold, held_out[seed]) for seed, desk in desks.items()])
case.unexpected(f"accuracy 0.75 of single judgements is out of reach: gold itself has {of_gold}.")
case.finish(figure, varied="the recipe: reward model, KL control", seen=seen)
