"""What happens when the reference model is left out?

    python examples/cases/03_omitted_reference.py        # 75 s on two cores

A team maximises the score of a fixed reward model and nothing else, and the replies turn into one
phrase that is repeated. The reward model is right where it has seen replies, those of the
reference, and wrong beyond; nothing in the objective keeps the policy from going there. Here the
desk's proxy counts words and cannot see that a second answer is worth nothing. Varied is what ties
the policy to the reference: nothing (beta = 0), a fixed penalty (beta = 0.5), or a penalty that is
steered to a KL of 0.7 nats. Expect with beta = 0 a proxy that rises throughout and a gold reward
that rises first, turns, and ends below the reference's, on hardly more than one reply: as beta goes
to 0 the optimum ref exp(r / beta) / Z becomes the single reply with the most proxy. Two cures:
control of the KL, or the same beta = 0 stopped where gold is highest, which takes somebody who
measures gold on the way. The control arm pays the gold reward itself, without any reference: it
ends on one reply too, but on a good one. So the missing reference takes the variety, and the error
of the reward model takes the gold. To see it differently, try "kl_coef": 0.05, or pay the control
with 0.5 * gold + 0.5 * desk.proxy.
"""

# %% The question, as arms of one experiment
from minirlhf.app.pictures import draw_lines, new_figure, say
from study import Arm, Case, ends, mean_lines, spread, values

case = Case("03_omitted_reference", __doc__)
slow = {"optimizer": {"learning_rate": 5e-4}}  # so that the turn of gold can be seen


def arms(desk, seed):
    gold = desk.standardised(desk.gold)
    return {
        "beta 0": Arm({"kl_coef": 0.0, **slow}, iterations=40),
        "beta 0.5": Arm({"kl_coef": 0.5, **slow}, iterations=40),
        "KL steered to 0.7": Arm({"kl_coef": 0.5, "kl_target": 0.7, **slow}, iterations=40),
        "control: beta 0, paid with gold": Arm({"kl_coef": 0.0, **slow}, gold, iterations=40),
    }


runs = case.train(arms, measure_every=1)
free = runs["beta 0"]

# %% What became of it
reference = [run.rows[0] for run in free]
peaks = [max(run.rows, key=lambda row: row["gold"]) for run in free]
rows = {"reference": reference, **ends(runs), "beta 0, stopped at most gold": peaks}
case.table("Worth, at the end", rows, ("gold", "proxy", "kl_seq", "length"))
case.table("Variety, at the end", rows, ("entropy_seq", "distinct_2", "repeats", "top"))
stops = spread([peak["iteration"] for peak in peaks], 0)
print(f"with beta 0 gold is highest after {stops} of {free[0].rows[-1]['iteration']} iterations")

# %% Replies with beta = 0 at three stages, first seed
for stage, row in (("reference", reference), ("most gold", peaks), ("end", ends(runs)["beta 0"])):
    print(f"{stage:>10}: {row[0]['likely']}")

# %% What holds in each seed
start, most = values(free, "gold")[:, 0], values(free, "gold").max(axis=1)
end, paid, variety = (
    [values(of_arm, column)[:, -1] for of_arm in runs.values()]
    for column in ("gold", "proxy", "entropy_seq")
)
case.claim("beta 0 ends with less gold than the reference, by 1 or more", start - end[0] >= 1)
case.claim("and with more proxy than beta 0.5, by 1 or more", paid[0] - paid[1] >= 1)
case.claim("and with an entropy below 1.5 nats a reply", variety[0] < 1.5)
case.claim("beta 0.5 ends 0.2 or more above the reference", end[1] - start >= 0.2)
case.claim("so does the KL steered to 0.7", end[2] - start >= 0.2)
case.claim("so does beta 0 stopped where gold is highest", most - start >= 0.2)
case.claim("control: paid with gold it ends 1 or more above the reference", end[3] - start >= 1)
case.claim("control: its entropy falls below 1.5 nats as well", variety[3] < 1.5)

# %% The picture
figure, axes = new_figure(11, 5.6, 2, 3)
for axis, column, title, unit in (
    (axes[0, 0], "gold", "gold, what is wanted: without a tie it turns", "reward units"),
    (axes[0, 1], "proxy", "proxy, what is paid: it only rises", "reward units"),
    (axes[0, 2], "kl_seq", "how far from the reference", "KL [nats per reply]"),
    (axes[1, 0], "entropy_seq", "entropy: 0 is one reply for everybody", "nats per reply"),
    (axes[1, 1], "distinct_2", "distinct-2 of 256 replies", "different pairs / pairs"),
    (axes[1, 2], "repeats", "tokens equal to the one before", "share"),
):
    draw_lines(axis, mean_lines(runs, "iteration", column))
    say(axis, title, "PPO iteration", unit)

# %% The answer
case.finish(
    figure,
    varied="beta 0, 0.5 or steered; paid by proxy or gold",
    seen=f"gold: reference {spread(start)}; at the end with beta 0 {spread(end[0])}, beta 0.5 "
    f"{spread(end[1])}, KL steered to 0.7 {spread(end[2])}; beta 0 stopped in time "
    f"{spread(most)}; control paid with gold {spread(end[3])}",
)
