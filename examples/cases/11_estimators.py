"""Where must the KL penalty stand for its gradient to be the gradient of the KL?

    python examples/cases/11_estimators.py        # 75 s on two cores

J(pi) = E_pi[r] - beta KL(pi||ref) is maximised from samples, and a library may put its estimate of
the KL into the reward, where it is a number, or into the loss, where it is differentiated; and the
estimate may be k1 = lr, k2 = lr^2 / 2 or k3 = exp(-lr) - 1 + lr, with lr = log pi - log pi_ref of
one token or of the whole reply: all near the KL. Varied is the placement: by hand for a table of
logits, then for random transformers, with every reply enumerated, so that the mean of a sampled
gradient is a sum and not an estimate; then in PPO on the support desk, same beta and seeds.

Expect an error of 1e-16 or so where a placement is right, and over 1e-2 where it is wrong (Tang and
Munos, arXiv 2506.09477): g = grad KL = E[lr grad log pi] is k1 in the reward and k2 of the whole
reply as a loss; k1 as a loss, the formula as often printed, has E[grad log pi] = 0 and holds
nothing. So expect J in the order k1 in the reward > k2 as loss by token > k3 as loss by token > k1
as loss. Last, the clip with large steps: PPO's > min(ratio, 1 + eps) A, as some textbooks print it,
> none; the second of these was expected and does not hold here: which is better differs between
seeds. To see it differently, put another name of minirlhf.rlhf.kl.KL_MODES into an arm.
"""

# %% By hand: a table of logits, 3 tokens and 4 steps, all 81 replies
import numpy as np

from gradients import gather_nodes
from minirlhf.app.pictures import draw_lines, new_figure, say
from minirlhf.exact.enumeration import all_responses, enumerate_responses, response_logprobs
from minirlhf.exact.expected import kl_gradient_table, penalty_dlogits
from minirlhf.rlhf.logprobs import log_softmax
from study import Arm, Case, ends, mean_lines, spread, values

case = Case("11_estimators", __doc__)
tree = enumerate_responses(vocab_size=3, max_tokens=4)
rng = case.rng(0)
logits, ref_logits, way = rng.standard_normal((3, tree.n_nodes, 3))  # a row for each prefix


def exact_kl(logits):
    """sum_y pi(y) (log pi(y) - log pi_ref(y))."""
    logp, ref_logp = (response_logprobs(tree, log_softmax(z)) for z in (logits, ref_logits))
    return np.exp(logp) @ (logp - ref_logp)


slope = (exact_kl(logits + 1e-5 * way) - exact_kl(logits - 1e-5 * way)) / 2e-5
print(f"along a random direction the KL rises by {slope:+.6f}, the mean of a penalty's gradient by")
for kl_mode in ("reward_k1", "loss_k2_seq", "loss_k1", "loss_k3_tok"):
    tables = {"old_logits": logits, "ref_logits": ref_logits}
    each = penalty_dlogits(all_responses(tree), logits, kl_mode=kl_mode, **tables)  # of each reply
    probs = np.exp(response_logprobs(tree, log_softmax(logits)))
    mean = gather_nodes(tree, all_responses(tree), each, weights=probs)
    print(f"  {(mean * way).sum():+.6f}  {kl_mode}")

# %% Every placement, in the parameters of a transformer
tables = [kl_gradient_table(seed=seed) for seed in case.seeds]
right, wrong = (
    [[r["error"] for r in t if r["right"] is is_right] for t in tables]
    for is_right in (True, False)
)
on_policy = {
    rows[0]["name"]: rows for rows in zip(*tables, strict=True) if rows[0]["sampler"] == "theta"
}
case.table(
    "Mean gradient of one sample of pi against g", on_policy, ("error", "cosine", "noise", "gives")
)
n_right, n_wrong = len(right[0]), len(wrong[0])
n_on = sum(rows[0]["error"] < 1e-8 for rows in on_policy.values())
case.claim(f"the {n_right} right placements err by less than 1e-8", [max(e) < 1e-8 for e in right])
case.claim(f"the {n_wrong} wrong ones by more than 1e-2", [min(e) > 1e-2 for e in wrong])

# %% What the placement, and the clip, do to training
PLACES = {"k1 in the reward": "reward_k1", "k2 as loss": "loss_k2_tok", "k3 as loss": "loss_k3_tok"}
PLACES["k1 as loss"] = "loss_k1"
CLIPS = {"PPO's clip": "ppo", "textbook's clip": "book", "no clip": "none"}
hard = {"epochs": 8, "optimizer": {"learning_rate": 8e-3, "schedule": "constant"}}
arms = {name: Arm({"kl_mode": mode}) for name, mode in PLACES.items()}
arms |= {name: Arm({**hard, "clip": clip}, iterations=20) for name, clip in CLIPS.items()}
runs = case.train(arms, measure_every=5)
for of_arm in runs.values():
    for run, desk in zip(of_arm, case.desks, strict=True):
        best, first = desk.describe(desk.optimum(desk.proxy, beta=0.5)), run.rows[0]
        most = best["proxy"] - first["proxy"] - 0.5 * best["kl_seq"]
        for row in run.rows:
            row["J / J*"] = (row["proxy"] - first["proxy"] - 0.5 * row["kl_seq"]) / most
case.table("PPO at the end", ends(runs), ("J / J*", "proxy", "kl_seq", "gold", "entropy_seq"))

end = {name: values(of_arm, "J / J*")[:, -1] for name, of_arm in runs.items()}
gold = {name: values(of_arm, "gold")[:, -1] for name, of_arm in runs.items()}
K1, K2, K3, AS_LOSS = PLACES
case.claim("J: k1 in the reward above k2 as loss, by 0.03 J* at least", end[K1] - end[K2] > 0.03)
case.claim("k2 as loss above k3 as loss", end[K2] > end[K3])
case.claim(
    "k3 as loss above k1 as loss, which ends below the reference",
    end[AS_LOSS] < np.minimum(0, end[K3]),
)
case.claim(
    "large steps: PPO's clip above the textbook's", end["PPO's clip"] > end["textbook's clip"]
)
case.claim("and above none", end["PPO's clip"] > end["no clip"])
above = np.sum(end["textbook's clip"] > end["no clip"])
case.unexpected(f"the textbook's clip is above none in {above} of {len(case.seeds)} seeds only.")

# %% The picture and the answer
figure, ((left, middle, right),) = new_figure(13, 4, 1, 3)
errors = [np.mean([row["error"] for row in rows]) for rows in on_policy.values()]
left.barh(list(on_policy), errors)
left.invert_yaxis()
say(left, "error of the mean gradient: only 0 is right", "in |grad KL|")
for axis, names, title in ((middle, PLACES, "placement"), (right, CLIPS, "clip, large steps")):
    draw_lines(axis, mean_lines({name: runs[name] for name in names}, "iteration", "J / J*"))
    axis.set_yscale("symlog", linthresh=1)
    say(axis, f"{title}: 1 is the optimum", "PPO iteration", "J / J*, 0 at the reference")
case.finish(
    figure,
    varied="the placement of the penalty; three clips",
    seen=f"J / J* ends at {spread(end[K1])} with k1 in the reward, {spread(end[K2])} with k2 and "
    f"{spread(end[K3])} with k3 as loss by token, {spread(end[AS_LOSS], 1)} with k1 as loss; "
    f"{n_on} of {len(on_policy)} placements are right on samples of pi.",
)
