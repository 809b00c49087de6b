"""How often does `minirlhf diagnose` name what went wrong in a run, and how often does it cry wolf?

    python examples/cases/28_names_what_went_wrong.py        # 300 s on two cores

A curve says that something is wrong and seldom what. Tools that name a cause are tried on curves
that their authors drew; here the causes are planted in real runs: settings that go wrong (no
penalty, k1 as loss, a rate too high ..), rewards that pay for a fault, and faults put into the
package while it trains (the sign of the penalty, padding that is counted, a sampler at another
temperature, k3 the wrong way round ..). Beside them stand runs in which nothing is wrong, of every
recipe that has a penalty. Worlds, sizes, beta, temperature and the placement of the penalty change
with the seed (plants.py); limits of the rules were chosen with seeds 1 to 9. A run counts as right
if the first finding is the planted cause: what follows from it may stand below. Expect that what
can be computed again, or must hold exactly, is named in every run, and that the causes that only a
curve shows are the ones mixed up. Expect little early warning: a rule is early where it speaks
before the fall of gold can be seen in gold itself. To see it differently, plant two causes at once,
or take a column out of the log. `python examples/cases/plants.py --only "inverted k3" --seeds 1`
trains a single run.
"""

# %% Runs with a planted cause, and healthy ones
import numpy as np

from minirlhf.app.pictures import new_figure, say
from minirlhf.app.rules import RULES
from plants import measure
from study import Case

case = Case("28_names_what_went_wrong", __doc__)
runs = measure(case)
planted = [run for run in runs if run.expected]
healthy = [run for run in runs if not run.expected]

# %% What is named first, cause by cause
causes = list(dict.fromkeys(run.cause for run in runs))
of_cause = {cause: [run for run in runs if run.cause == cause] for cause in causes}
rows = {
    cause: [{"right": float(run.right), "first": run.first or "nothing"} for run in of]
    for cause, of in of_cause.items()
}
case.table("Right first finding", rows, ("right",))
for run in runs:
    if not run.right:
        others = ", ".join(rule for rule, _ in run.found[1:])
        print(f"{run.cause}, seed {run.seed}: {run.first or 'nothing'} first; then {others or '-'}")


# %% Rule by rule: hits, alarms, and whether it speaks before gold is seen to fall
def told_of(rule):
    """How often it is right where it was planted, and where it speaks besides."""
    own = [run for run in planted if run.expected == rule]
    said = [(run, dict(run.found)[rule]) for run in runs if rule in dict(run.found)]
    live = RULES[rule].holds is not None  # else it is made again from the folder
    leads = [run.gold_fell - row for run, row in said if live and run.gold_fell is not None]
    return {
        "runs": len(own),
        "first": sum(run.right for run in own),
        "first elsewhere": sum(run.first == rule != run.expected for run in planted),
        "below another": sum(run.first != rule for run, _ in said),
        "in healthy runs": sum(not run.expected for run, _ in said),
        "gold fell": len(leads),
        "lead": float(np.median(leads)) if leads else 0.0,
    }


by_rule = {rule: told_of(rule) for rule in RULES}
case.found |= {"rules": by_rule, "healthy": len(healthy)}
case.found["causes"] = {c: [of[0].expected, [r.first for r in of]] for c, of in of_cause.items()}
words = {rule: [{k: f"{x:g}" for k, x in told.items()}] for rule, told in by_rule.items()}
case.table("Rules", words, tuple(words["repetition"][0]))

# %% What holds in each seed
seeds = case.seeds


def share(of, seed):
    return np.mean([run.right for run in of if run.seed == seed])


case.claim(
    "the planted cause is named first in 90 % of the runs",
    [share(planted, s) >= 0.9 for s in seeds],
)
case.claim(
    "no more than one healthy run in twenty has a finding",
    [share(healthy, s) >= 0.95 for s in seeds],
)

# %% The picture: cause by first finding
columns = [*(rule for rule in RULES if any(run.first == rule for run in runs)), ""]
figure, axes = new_figure(10, 9, 1, 1)
axis, shares = axes[0, 0], np.zeros((len(causes), len(columns)))
small = {"fontsize": 7, "ha": "center", "va": "center"}
for (y, x), _ in np.ndenumerate(shares):
    shares[y, x] = np.mean([run.first == columns[x] for run in of_cause[causes[y]]])
    if number := shares[y, x]:
        axis.text(x, y, f"{number:.0%}", color="w" if number > 0.6 else "k", **small)
axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
named = [column or "nothing" for column in columns]
axis.set_xticks(range(len(columns)), named, rotation=60, ha="right", fontsize=7)
axis.set_yticks(range(len(causes)), causes, fontsize=7)
say(axis, "Share of runs by first finding: each cause has one column", "first finding", "planted")

# %% The answer
right, alarms = (sum(r.right for r in planted), sum(not r.right for r in healthy))
case.finish(
    figure,
    varied="25 causes, 6 healthy settings; worlds, sizes, beta",
    seen=f"The planted cause is the first finding in {right} of {len(planted)} runs "
    f"({right / len(planted):.0%}); a healthy run has a finding in {alarms} of {len(healthy)}.",
)
