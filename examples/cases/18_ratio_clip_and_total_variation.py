"""Does PPO's clip hold rare tokens too tight and frequent ones too loose?

    python examples/cases/18_ratio_clip_and_total_variation.py        # 50 s on two cores

PPO stops following a token when its ratio pi / old leaves 1 +- eps. DPPO (arXiv 2602.04879) and
DRPO (2606.09821) say that this over-penalises rare tokens and under-penalises frequent ones. DPPO
bounds the shift |pi - old| by delta, a token's share of its state's total variation (TV); DRPO
charges its square (not tried). Here a transformer follows one batch of *all* replies, with exact
advantages, for 40 Adam steps, by either rule and by none, compared at equal TV. Each seed has its
own old policy and reward model. Nothing is sampled: this is about direction and not about noise.

Expect the clip to let a token move by eps old: a rare token is cut when it has moved almost
nothing, a frequent one after a shift that is most of the TV of its state. (How *often* they are cut
differs little: by the end nearly all are.) At equal TV the bound on the shift should have more
reward than the clip; that the clip has more than no rule, stopped in time, is not to be expected.
Control: an untrained transformer as old, whose V tokens are alike likely, where eps old = eps / V
is one number and both rules are one. To see it differently change EPS, DELTAS or STEPS.
"""

# %% One batch of all replies of up to four tokens, followed as far as a rule lets it
import numpy as np

from desk import Desk, fit_bradley_terry
from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.enumeration import prefix_logprobs
from minirlhf.exact.optimum import policy_values
from minirlhf.exact.tree_policy import tree_gradient, tree_logits
from minirlhf.nn.transformer import init_transformer
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.settings import OptimizerConfig
from minirlhf.tree import tree_copy
from study import Case, spread

case = Case("18_ratio_clip_and_total_variation", __doc__)
EPS, DELTAS, STEPS, MOVED = (0.1, 0.2, 0.5), (0.003, 0.01, 0.03, 0.1), 40, "moved when cut, %"
ADAM = OptimizerConfig(learning_rate=1e-3, eps=1e-8, max_grad_norm=0.0, schedule="constant")
desk = Desk(max_tokens=min(4, case.max_tokens))
tree, V, config = desk.tree, desk.tree.vocab_size, case.desk.world.config
where = {"tree": tree, "prompts": desk.world.prompts, "config": config}


def policy(params):
    return log_softmax(tree_logits(params, **where).astype(np.float64))  # (N, V)


def follow(start, reward, rule, size):
    """(TV of a state, reward) after each step; how far each token had moved when it was cut."""
    log_old, optimizer = policy(start), Optimizer(tree_copy(start), ADAM, total_steps=STEPS)
    q, values = policy_values(tree, log_old, log_old, reward, kl_coef=0.0)
    advantages, reach = q - values[:, None], np.exp(prefix_logprobs(tree, log_old))
    old, first_cut, path = np.exp(log_old), np.full(q.shape, np.nan), []
    for _ in range(STEPS + 1):
        log_pi = policy(optimizer.params)
        pi = np.exp(log_pi)
        tv = 0.5 * np.abs(pi - old).sum(axis=1) @ reach / reach.sum()
        path.append((tv, desk.probs(log_pi) @ reward))
        moved = pi / old - 1 if rule == "ratio" else pi - old
        cut = np.sign(advantages) * moved > size
        first_cut = np.where(cut & np.isnan(first_cut), np.abs(pi - old), first_cut)
        slope = np.where(cut, 0.0, pi * advantages)  # of old's mean of ratio x advantage
        dlogits = -reach[:, None] * (slope - pi * slope.sum(axis=1, keepdims=True))
        optimizer.step(tree_gradient(dlogits, optimizer.params, **where), loss=0.0)
    return np.array(path).T, old, reach[:, None] * old, first_cut


# %% Every rule, under every seed
EDGES = (0.0, 0.03, 0.1, 0.3, 1.0)
BINS = {f"{a:g} to {b:g}": (a, b) for a, b in zip(EDGES, EDGES[1:], strict=False)}
RULES = list(enumerate(("within the ratio", "within the shift", "no rule, stopped")))
tokens, found, apart, ends = {name: [] for name in BINS}, [], [], []
for seed, reference in zip(case.seeds, case.references, strict=True):
    pairs = desk.draw_pairs(desk.ref, 2000, rng=case.rng(seed))
    reward = desk.standardised(desk.counts @ fit_bradley_terry(desk.counts, pairs))
    by_ratio = [follow(reference, reward, "ratio", eps) for eps in EPS]
    _, old, weight, moved = by_ratio[1]
    for name, (low, high) in BINS.items():
        here = (old >= low) & (old < high)
        cut, total = here & ~np.isnan(moved), weight[here].sum()
        row = {"tokens": total / weight.sum(), "cut": weight[cut].sum() / total}
        row[MOVED] = 100 * (weight * moved)[cut].sum() / max(weight[cut].sum(), 1e-12)
        tokens[name].append(row)
    shifts = [follow(reference, reward, "shift", delta) for delta in DELTAS]
    bounded = [np.array([path[:, -1] for path, *_ in of]).T for of in (by_ratio, shifts)]
    ends.append([*bounded, follow(reference, reward, "ratio", np.inf)[0]])
    found.append([np.interp(ends[-1][0][0], *line) for line in ends[-1]])
    blank = {"transformer": init_transformer(config, rng=case.rng(seed))}
    blank["transformer"]["wte"] *= 0.02  # all tokens about alike likely
    both = [[(blank, reward, "ratio", eps), (blank, reward, "shift", eps / V)] for eps in EPS]
    apart.append([np.ptp([follow(*setting)[0][1, -1] for setting in two]) for two in both])
found, apart = np.array(found), np.array(apart)  # (seeds, rules, EPS), (seeds, EPS)

# %% What was cut, and how far each rule came
case.table("By a token's probability; ratio within 1 +- 0.2", tokens, ("tokens", "cut", MOVED))
columns = tuple(f"eps {eps:g}" for eps in EPS)
of_rules = {rule: [dict(zip(columns, x, strict=True)) for x in found[:, i]] for i, rule in RULES}
case.table("Reward at the TV at which the ratio ends", of_rules, columns)
moved = {name: np.array([row[MOVED] for row in of]) for name, of in tokens.items()}
rare, *_, frequent = moved.values()
gain = found[:, 1] / found[:, 0] - 1
case.claim("frequent tokens move 10 times as far (by definition of the clip)", frequent > 10 * rare)
case.claim("equal TV: the bound on the shift has more reward, each eps", (gain > 0).all(axis=1))
case.claim("control: within 0.03 if all tokens are alike likely", (apart < 0.03).all(axis=1))

# %% The picture: the first seed
figure, ((left, right),) = new_figure(9, 3.6, 1, 2)
draw_lines(left, {rule: ends[0][i] for i, rule in RULES})
say(left, "at equal TV the ratio has less than the shift", "TV of a state", "reward units")
right.bar(list(BINS), [of.mean() for of in moved.values()], log=True)
say(right, "percent that a token had moved when the clip cut it", "probability under old", "%")

# %% The answer
clip, shift, none = (spread(found[:, i, 1]) for i, _ in RULES)
text = f"no rule, stopped at that TV, has {none}: more than the clip ({clip}), less than the shift"
case.unexpected(f"rare tokens are not cut more often; at eps 0.2 {text} ({shift}).")
seen = f"At equal TV (eps 0.2) a bound on the shift has {spread(100 * gain[:, 1], 0)} % more reward"
seen += f" than the clip; {spread(apart[:, 1], 3)} apart if all tokens are alike. When cut, rare "
seen += f"tokens have moved {spread(rare, 1)} %, frequent {spread(frequent, 0)} %."
case.finish(figure, varied="the rule: ratio, shift or none; its width", seen=seen)
