"""Why does a policy leave its reference when the KL penalty stands in the loss?

    python examples/cases/13_penalty_without_gradient.py        # 5 s on two cores

Teaching code may add coefficient * mean(log pi - log pi_ref) to the loss and differentiate it; so
do scripts of chapter 7 of "Build a Reasoning Model (From Scratch)" as of commit f79c9cd
(rasbt/reasoning-from-scratch, 7_5_plus_kl.py, line 229). The number is an estimate of the KL, and
one expects its gradient to pull towards the reference. But the gradient of a sample is grad log pi,
whatever the reference says, and E[grad log pi] = grad 1 = 0. The book reports a run that falls
apart into random tokens, the entropy rising where the KL is the only gradient, and that a smaller
coefficient does not help; it names the sum over tokens and a vanishing policy gradient. Its runs
were not repeated, and this does not decide between the causes. Here the term acts on a table of 50
actions, every advantage 0, beside three cures with the same coefficient and seeds.

Expect a gradient of mean 0 whose noise is not 0, and Adam, which divides a gradient by its own
size, to make steps of it at any coefficient: the KL grows. An action that is not sampled has the
small, steady gradient -p(a): Adam makes it a full step, so rare actions gain and entropy rises. The
cures do not move from the reference, where each sample's gradient is 0, and return to it from
elsewhere. Control: steps of the same length without Adam. To see it differently: BATCH = 64 or
PEAKED = 1; the KL grows, the entropy need not.
"""

# %% A policy that is a table; the penalties and Adam are the package's own
import numpy as np

from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.enumeration import Responses
from minirlhf.exact.expected import gradient_moments, penalty_dlogits
from minirlhf.nn.adam import adamw_step, init_adamw
from minirlhf.rlhf.logprobs import log_softmax
from study import Case, spread

case = Case("13_penalty_without_gradient", __doc__)
ACTIONS, PEAKED, BATCH, RATE, STEPS = 50, 2.0, 8, 0.02, 50 if case.fast else 400
FAULT, SMALLER, PLAIN = "k1 as loss", "  coefficient / 100", "  without Adam"
CURES = {"k2 as loss": "loss_k2_tok", "k3 as loss": "loss_k3_tok", "k1 in the reward": "reward_k1"}
MODES = {FAULT: "loss_k1", **CURES}


def start(seed, away):
    """Logits of the policy and of its reference: (1, 50) each."""
    ref, noise = case.rng(seed).standard_normal((2, 1, ACTIONS))
    return PEAKED * ref + away * noise, PEAKED * ref


def gradients(actions, logits, ref, kl_mode):
    """Of each sampled action, a reply of one token: (n, 50)."""
    column = actions[:, None]
    samples = Responses(0 * actions, 0 * column, column, 1.0 + 0 * column)
    tables = {"old_logits": logits.copy(), "ref_logits": ref}
    return penalty_dlogits(samples, logits, kl_mode=kl_mode, **tables)[:, 0]


def train(seed, kl_mode, away=0.0, coefficient=1.0, plain_step=0.0):
    """What has changed at the end; as "lines" KL and entropy at every step."""
    (logits, ref), rng = start(seed, away), np.random.default_rng(seed)
    state, logp_ref, lines, moved = init_adamw(logits[0]), log_softmax(ref)[0], [], 0.0
    for _ in range(STEPS + 1):
        logp, before = log_softmax(logits)[0], logits.copy()
        p = np.exp(logp)
        lines.append((p @ (logp - logp_ref), -p @ logp))
        actions = rng.choice(ACTIONS, size=BATCH, p=p / p.sum())
        slope = coefficient * gradients(actions, logits, ref, kl_mode).mean(axis=0)
        if plain_step:  # as long as Adam's: E|slope|^2 = (1 - p . p) / batch
            logits -= plain_step * slope / ((1 - p @ p) / BATCH) ** 0.5
        else:
            state = adamw_step(logits[0], slope, state, learning_rate=RATE, eps=1e-8)
        moved += ((logits - before) ** 2).sum() / (STEPS + 1)
    (first, _), (last, _), gain = lines[0], lines[-1], lines[-1][1] - lines[0][1]
    rare = p[logp_ref.argsort()[:20]].sum()
    row = {"KL at the start": first, "KL": last, "entropy gained": gain, "rarest 20": rare}
    return {**row, "step": moved**0.5, "lines": np.array(lines)}


# %% The gradient, exactly: its mean along grad KL and its noise, away from the reference
exact = {name: [] for name in MODES}
for seed in case.seeds:
    logits, ref = start(seed, 0.7)
    logp = log_softmax(logits)[0]
    p, log_ratio = np.exp(logp), logp - log_softmax(ref)[0]
    g = p * (log_ratio - p @ log_ratio)  # grad KL(pi || ref) in the logits
    for name, kl_mode in MODES.items():
        mean, variance = gradient_moments(gradients(np.arange(ACTIONS), logits, ref, kl_mode), p)
        row = {"mean along grad KL": mean @ g / (g @ g), "noise": (variance / (g @ g)) ** 0.5}
        exact[name].append({**row, "size": np.abs(mean).max()})
case.table("Gradient of one sample, in units of |grad KL|", exact, ("mean along grad KL", "noise"))

# %% Training: from the reference, and from elsewhere
runs = {name: [train(seed, mode) for seed in case.seeds] for name, mode in MODES.items()}
runs[SMALLER] = [train(seed, "loss_k1", coefficient=0.01) for seed in case.seeds]
pairs = zip(case.seeds, runs[FAULT], strict=True)
runs[PLAIN] = [train(seed, "loss_k1", plain_step=row["step"]) for seed, row in pairs]
runs = {name: runs[name] for name in (FAULT, SMALLER, PLAIN, *CURES)}
case.table("From the reference on", runs, ("KL", "entropy gained", "rarest 20", "step"))
back = {name: [train(s, mode, away=0.7) for s in case.seeds] for name, mode in MODES.items()}
case.table("From elsewhere on", back, ("KL at the start", "KL"))

kl, there = ({n: np.array([row["KL"] for row in of[n]]) for n in of} for of in (runs, back))
rare = [np.array([row["rarest 20"] for row in runs[n]]) for n in (FAULT, "k2 as loss")]
case.claim("k1 as loss: its mean gradient is 0", [row["size"] < 1e-12 for row in exact[FAULT]])
case.claim("and its KL ends over 0.1", np.minimum(kl[FAULT], there[FAULT]) > 0.1)
case.claim("also at a hundredth of the coefficient", kl[SMALLER] > 0.1)
case.claim("the 20 rarest actions have twice the probability they had", rare[0] > 2 * rare[1])
case.claim("control: without Adam the KL is a third less at least", kl[PLAIN] < kl[FAULT] * 2 / 3)
case.claim("cures: the KL stays at 0", sum(kl[name] for name in CURES) < 1e-9)
case.claim("and from elsewhere it falls below 0.02", sum(there[name] for name in CURES) < 0.06)

# %% The picture and the answer
figure, axes = new_figure(12, 3.4, 1, 3)
shown, every = {n: runs[n] for n in (FAULT, SMALLER, PLAIN, "k2 as loss")}, slice(0, None, 25)
for axis, of, column in zip(axes[0], (shown, shown, back), (0, 1, 0), strict=True):
    mean = {n.strip(): np.mean([row["lines"] for row in of[n]], axis=0)[every] for n in of}
    draw_lines(axis, {n: (np.arange(STEPS + 1)[every], mean[n][:, column]) for n in mean})
say(axes[0, 0], "KL: it should stay 0", "step", "nats")
say(axes[0, 1], "entropy: rare actions gain, with Adam", "step", "nats")
say(axes[0, 2], "KL from elsewhere: it should fall to 0", "step", "nats")
seen = f"With every advantage 0, k1 as loss takes the KL from 0 to {spread(kl[FAULT])} nats "
seen += f"({spread(kl[SMALLER])} at coefficient / 100; {spread(kl[PLAIN])} without Adam)."
case.unexpected("without Adam the entropy does not rise: noise alone does not do it.")
case.finish(figure, varied="the term; Adam or not", seen=seen)
