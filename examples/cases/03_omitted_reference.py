"""What happens when the reference model is left out?

    python examples/cases/03_omitted_reference.py        # 40 s on two cores

A team maximises the score of a fixed reward model and nothing else, and the replies turn into one
phrase that is repeated. The reward model is right where it has seen replies, those of the
reference, and wrong beyond; nothing in the objective keeps the policy from going there. Here the
desk's proxy counts words and cannot see that a second answer is worth nothing, so the gold reward
of what it likes best is negative.

Expect proxy to rise and gold to fall below the reference's with beta = 0, entropy to go to 0, and
gold to rise with beta = 0.5. Two controls: the gold reward itself in the place of the proxy, where
leaving the reference out does no harm to gold (the cause is the error of the reward model, not the
distance), and the same beta = 0 stopped where gold is highest.
"""

# %% The question, as arms of one experiment
from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.app.study import Arm, Case, ends, mean_lines, spread, values

case = Case("03_omitted_reference", __doc__)


def arms(desk, seed):
    gold = desk.standardised(desk.gold)
    return {
        "beta 0.5": Arm({"kl_coef": 0.5}),
        "beta 0": Arm({"kl_coef": 0.0}),
        "beta 0, gold as the reward": Arm({"kl_coef": 0.0}, reward=gold),
    }


runs = case.train(arms, measure_every=5)

# %% What became of it
free, tied, honest = (runs[name] for name in ("beta 0", "beta 0.5", "beta 0, gold as the reward"))
reference = [run.rows[0] for run in free]
peaks = [max(run.rows, key=lambda row: row["gold"]) for run in free]
rows = {"reference": reference, **ends(runs), "beta 0, stopped at the peak of gold": peaks}
columns = ("gold", "proxy", "kl_seq", "entropy_seq", "length", "repeats", "top")
case.table("Replies at the end", rows, columns)
for name, of_arm in ends(runs).items():
    print(f"most likely, {name}: {of_arm[0]['top_reply']} ({of_arm[0]['top']:.0%})")

start, gold = values(free, "gold")[:, 0], {n: values(r, "gold")[:, -1] for n, r in runs.items()}
case.claim("beta 0 ends with less gold than the reference", gold["beta 0"] < start)
case.claim("beta 0.5 ends with more gold than the reference", gold["beta 0.5"] > start)
case.claim(
    "beta 0 has more proxy than beta 0.5",
    values(free, "proxy")[:, -1] > values(tied, "proxy")[:, -1],
)
case.claim(
    "control: paid with gold, beta 0 ends above the reference",
    values(honest, "gold")[:, -1] > start,
)

# %% The picture
figure, ((left, right),) = new_figure(9, 3.4, 1, 2)
draw_lines(left, mean_lines(runs, "iteration", "gold"))
say(left, "gold: what was wanted", "PPO iteration", "reward units")
draw_lines(right, mean_lines(runs, "iteration", "entropy_seq"))
say(right, "entropy: 0 is one reply for everybody", "PPO iteration", "nats per reply")

# %% The answer
case.finish(
    figure,
    varied="beta 0 or 0.5; who pays: proxy or gold",
    seen=f"Without a reference gold ends at {spread(gold['beta 0'], 2)}, with beta 0.5 at "
    f"{spread(gold['beta 0.5'], 2)}; the reference has {spread(start, 2)}.",
)
