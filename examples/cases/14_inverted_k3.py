"""What does a KL penalty descend when the ratio in k3 is inverted?

    python examples/cases/14_inverted_k3.py        # 3 s on two cores

k3 = exp(-lr) - 1 + lr with lr = log pi - log pi_ref estimates KL(pi||ref) from samples of pi. With
the ratio turned round it is exp(lr) - 1 - lr: approx_kl3 in natolambert/rlhf-book,
code/policy_gradients/loss.py, as of commit a66b0bf, a loss there (coefficient 0 in all shipped
settings). A reader who switched it on saw early spikes (issue 489); that run was not repeated. Here
its gradient is exact on random transformers, replies enumerated, at three distances from the
reference; and it trains a table of 300 actions, as does its cure: k2 as loss.

Expect it to descend half of chi^2(pi||ref) = E_pi[exp(lr)] - 1 (of whole replies; by token, as
there, that of each next token, the prefixes held fixed): its slope is exp(lr) - 1. Near the
reference every penalty is lr^2 / 2, and it is harmless; far away exp(lr) explodes where pi >> ref,
and just there samples come from. The slope of k3 the right way round, 1 - exp(-lr), is below 1
there: it holds too little, and turning the ratio back is no cure. Control: a reference to which no
action is rare; the spikes go, but J does not come back: they need not be why it is lost.
"""

# %% Gradients, everything enumerated
import numpy as np

from gradients import gather_nodes, logits_at_kl
from minirlhf.app.pictures import LOOKS, draw_lines, new_figure, say
from minirlhf.exact.enumeration import response_logprobs
from minirlhf.exact.expected import beside, make_random_world
from minirlhf.exact.optimum import objective_gradient
from minirlhf.nn.adam import adamw_step, init_adamw
from minirlhf.rlhf.kl import ESTIMATORS
from minirlhf.rlhf.logprobs import log_softmax, token_logprobs_backward, token_logprobs_forward
from study import Case, column, spread

case = Case("14_inverted_k3", __doc__)
CURE, SCHULMAN, FAULT = PENALTIES = ("k2", "k3", "inverted k3")


def slope_of(penalty, log_ratio):
    """d penalty / d log_ratio."""
    return np.expm1(log_ratio) if penalty == FAULT else ESTIMATORS[penalty](log_ratio)[1]


def measure(world, logits):
    """{penalty: error of its mean gradient in |grad KL|, by token and of whole replies}."""
    replies, log_pi, log_ref = world.responses, log_softmax(logits), world.log_probs("ref")
    logp, cache = token_logprobs_forward(logits[replies.nodes], targets=replies.tokens)
    tokens = (logp - log_ref[replies.nodes, replies.tokens]) * replies.mask
    whole, p = tokens.sum(axis=1, keepdims=True), np.exp(response_logprobs(world.tree, log_pi))
    g = objective_gradient(world.tree, log_pi, log_ref, 0 * p, kl_coef=-1.0)  # grad KL
    rows = {name: {"chi^2": p @ np.expm1(whole[:, 0])} for name in PENALTIES}
    for name, row in rows.items():
        for which, log_ratio in (("error, by token", tokens), ("error, whole", whole)):
            each = token_logprobs_backward(slope_of(name, log_ratio) * replies.mask, cache)
            row["mean"] = gather_nodes(world.tree, replies, each, weights=p)
            row[which] = beside(row["mean"], g)["error"]
    return rows


KLS, exact, agrees = (0.02, 0.2, 1.0), {}, []
for seed in case.seeds:
    world = make_random_world(seed=seed)
    for kl in KLS:
        logits = logits_at_kl(world, kl)
        for name, row in measure(world, logits).items():
            exact.setdefault(f"KL {kl}: {name}", []).append(row)
    step = 1e-6 * case.rng(seed).standard_normal(logits.shape)
    ahead, back = (measure(world, logits + s)[CURE]["chi^2"] for s in (step, -step))
    agrees.append(abs((row["mean"] * step).sum() / ((ahead - back) / 4) - 1) < 1e-6)
case.table("Mean gradient against grad KL", exact, ("chi^2", "error, by token", "error, whole"))

# %% Training a table of actions
ACTIONS, PEAKED, BATCH, COEFFICIENT, STEPS = 300, 3.0, 128, 0.5, 30 if case.fast else 300


def train(penalty, seed, peaked=PEAKED):
    """Share of the best E[r] - beta KL; the penalty's gradient, its largest in medians: spike."""
    (ref, reward), rng = np.random.default_rng(seed).standard_normal((2, ACTIONS)), case.rng(seed)
    log_ref, logits, state, norms = log_softmax(peaked * ref), peaked * ref, init_adamw(ref), []
    for _ in range(STEPS):
        logp = log_softmax(logits)
        p = np.exp(logp)
        actions = rng.choice(ACTIONS, size=BATCH, p=p / p.sum())
        scores = np.eye(ACTIONS)[actions] - p  # grad log pi of each sample
        own = COEFFICIENT * slope_of(penalty, (logp - log_ref)[actions]) @ scores / BATCH
        slope = own - (reward[actions] - reward[actions].mean()) @ scores / BATCH
        state = adamw_step(logits, slope, state, learning_rate=0.05, eps=1e-8)
        norms.append(np.linalg.norm(own))
    some = (log_ref, logp, log_softmax(log_ref + reward / COEFFICIENT))  # the last is the optimum
    first, last, most = (np.exp(x) @ (reward - COEFFICIENT * (x - log_ref)) for x in some)
    row = {"share of J*": (last - first) / (most - first), "KL": p @ (logp - log_ref)}
    return {**row, "norms": norms, "spike": max(norms) / np.median(norms)}


runs = {name: [train(name, seed) for seed in case.seeds] for name in PENALTIES}
runs["control: none is rare"] = [train(FAULT, seed, peaked=1.0) for seed in case.seeds]
case.table("Trained, with the penalty's own gradients", runs, ("share of J*", "KL", "spike"))

error = column(exact, "error, by token")
near, far, cured = (error[f"KL {x}"] for x in (f"0.02: {FAULT}", f"1.0: {FAULT}", f"1.0: {CURE}"))
share, spike = (column(runs, name) for name in ("share of J*", "spike"))
case.claim("inverted k3: its mean gradient is that of half chi^2 of whole replies, to 1e-6", agrees)
case.claim("by token it errs by under 0.3 |grad KL| at KL 0.02", near < 0.3)
case.claim("trained, its largest gradient is over 20 medians", spike[FAULT] > 20)
calm = (spike[CURE] < 10) & (spike["control: none is rare"] < 10)
case.claim("under 10 with its cure, and (control) where no action is rare", calm)
case.claim("it ends with less of J* than its cure", share[FAULT] < share[CURE])

# %% The picture and the answer
figure, ((left, right),) = new_figure(10, 3.6, 1, 2)
by_token = {n: [np.median(error[f"KL {kl}: {n}"]) for kl in KLS] for n in PENALTIES}
draw_lines(left, {name: (KLS, of) for name, of in by_token.items()}, log="xy")
say(left, "error by token: small near, large far (medians)", "KL(pi || ref)", "in |grad KL|")
steps = {name: (np.arange(STEPS), rows[0]["norms"]) for name, rows in runs.items()}
draw_lines(right, steps, [{**look, "marker": "", "lw": 0.8} for look in LOOKS], log="y")
say(right, "spikes: the penalty's own gradient, first seed", "step", "its length")
case.unexpected("k3 the right way round has no spikes, but ends below its inverse on average.")
seen = f"By token inverted k3 errs by {spread(near)} |grad KL| at KL 0.02, {spread(far)} at 1 (k2 "
seen += f"{spread(cured)}); it spikes to {np.median(spike[FAULT]):.0f} medians. Share of J*: "
seen += ", ".join(f"{name} {spread(share[name])}" for name in (FAULT, CURE, SCHULMAN)) + "."
case.finish(figure, varied="k3 or its inverse; distance; rare actions", seen=seen)
