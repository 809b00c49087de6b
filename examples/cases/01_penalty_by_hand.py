"""Which of two responses pays the larger penalty?

    python examples/cases/01_penalty_by_hand.py        # 60 s on two cores

Two responses say the same, one in a word and one in a long sentence; the policy is trained with a
KL penalty against its reference, and somebody asks which of them is penalised more. The penalty of
a response is the sum over its tokens of log pi_theta(y_t) - log pi_ref(y_t). So neither length nor
rarity costs anything: at theta = ref it is 0 for both, and what a response pays is how much more
likely training has made it. Expect a spring: at the optimum ref exp(r / beta) / Z each response is
at rest at log-ratio = r / beta - log Z, and r - beta log-ratio is beta log Z for all of them. The
long response pays more if the reward has drawn the policy to it; one that has become rarer earns.
The control arm pays for brevity: there the long one pays less. Last, the same for sentences of a
support desk after `minirlhf.train`, with a limit: a word of no demonstration, which the encoding
must spell in several tokens, is outside the model's language. Both log-probs are then between -30
and -130, as no policy ever says it, and their difference is an accident and no price. To see it
differently, change `beta`, or write replies of your own into `said`.
"""

# %% By hand: (log pi_theta, log pi_ref) of each token
import numpy as np

import minirlhf
from minirlhf.app.pictures import draw_lines, draw_tokens, new_figure, say
from minirlhf.exact.optimum import soft_optimum
from minirlhf.worlds.support import ITEMS
from study import Arm, Case, spread

case = Case("01_penalty_by_hand", __doc__)
print(f"one token, -2.5 against -4.0, pays {-2.5 + 4.0} nats")
print(f"'Good day', -0.8 -0.4 against -1.5 -2.1, pays {(-0.8 + 1.5) + (-0.4 + 2.1):.1f} nats")

# %% A small desk, where every reply is known: after training, and at the optimum
beta, desks = 0.5, case.desks
replies = ("ANS", "ANS DET", "ANS DET ANS" if case.fast else "ANS DET ANS DET ANS DET")
brief = case.desk.standardised(-case.desk.lengths)
arms = {"trained": Arm({"kl_coef": beta}), "control": Arm({"kl_coef": beta}, reward=brief)}
trained, control = case.train(arms).values()
best = [soft_optimum(d.tree, d.ref_log_probs, d.proxy, kl_coef=beta) for d in desks]  # no Z
rest = [np.log(desks[i].probs(best[i].log_probs)) - desks[i].ref_logp for i in range(len(desks))]
same = [desk.proxy - beta * log_ratio for desk, log_ratio in zip(desks, rest, strict=True)]
rows = {reply: [] for reply in replies}
for i, desk in enumerate(desks):
    policies = {"at theta = ref": desk.ref_log_probs, "trained": trained[i].log_probs}
    policies["control"] = control[i].log_probs
    for reply, of_reply in rows.items():
        leaf = desk.leaf(reply)
        row = {name: desk.log_ratios(of, reply).sum() for name, of in policies.items()}
        row |= {"r": desk.proxy[leaf], "at rest": rest[i][leaf], "r - beta rest": same[i][leaf]}
        of_reply.append(row | {"tokens": desk.log_ratios(trained[i].log_probs, reply)})
columns = ("r", "at theta = ref", "trained", "at rest", "r - beta rest", "control")
case.table("Penalty of a reply in nats; control: paid for brevity", rows, columns)
for reply in replies:
    tokens = np.mean([row["tokens"] for row in rows[reply]], axis=0)
    tokens = zip([*reply.split(), "EOS"], tokens, strict=False)
    print(f"{reply}, trained: " + " ".join(f"{token} {number:+.2f}" for token, number in tokens))

end, known_end, brief_end = (
    np.array([[row[column] for row in rows[reply]] for reply in replies])
    for column in ("trained", "at rest", "control")
)
flat, off = np.ptp(same, axis=1), np.abs(end - known_end).max(axis=0)
case.claim("the long reply pays 2 nats more than the short one", end[2] - end[0] > 2)
case.claim("control: paid for brevity, it pays less", brief_end[2] < brief_end[0])
case.claim("at rest r - beta log-ratio is one number for all replies, to 1e-6", flat < 1e-6)
case.claim("training ends within 0.5 nats of the three rest points", off < 0.5)

# %% The same in words: a support desk trained by minirlhf, kept beside the picture
folder = case.out / f"run-{case.seeds[0]}{'-fast' * case.fast}"
tiny = {"sft": {"steps": 5}, "ppo": {"iterations": 1, "batch_size": 8}, "eval_prompts": 4}
tiny["reward_model"] = {"n_pairs": 8, "n_heldout_pairs": 8, "n_normalize": 8}
sizes = {"out": folder, "seed": case.seeds[0], "progress": False, **(tiny if case.fast else {})}
done = (folder / "policy").exists()
run = minirlhf.open_run(folder) if done else minirlhf.train(**sizes)
said = {
    "short": "Your {} is on its way.",
    "long": "Your {} is on its way. It should arrive on Monday. You can track it online.",
    "short, foreign": "Yes.",
    "long, foreign": "Affirmative, your {} is on its way.",
}
said_once = {word for _, reply in run.session.world.demonstrations for word in reply.split()}
known = {word.strip(".,?") for word in said_once}


def foreign(reply):
    """Words of no demonstration for which the encoding has no token: it spells them."""
    words, encode = [word.strip(".,?") for word in reply.split()], run.session.tokenizer.encode
    return [word for word in words if word not in known and len(encode(f" {word}")) > 1]


sentences, boxes = {name: [] for name in said}, {}
for name, pattern in said.items():
    for item in ITEMS:
        reply = pattern.format(item)
        score, new = run.score(f"Hello, where is my {item}?", reply), foreign(reply)
        row = {"log pi_theta": score.logp.sum(), "log pi_ref": score.ref_logp.sum()}
        sentences[name].append(row | {"penalty": "no price" if new else score.kl_seq})
    price = f"no price, {new[0]!r} is outside the language" if new else f"{score.kl_seq:+.2f} nats"
    numbers = np.where(bool(new), np.nan, score.kl_token)
    boxes[f"{name}: {price}"] = [*score.pieces[:-1], "(end)"], numbers
case.table(f"Sentences, one run, {len(ITEMS)} prompts; in nats", sentences, (*row, "penalty"))

# %% The picture
figure, ((left, right),) = new_figure(12, 4.2, 1, 2, width_ratios=(1, 1.8))
shown = np.argsort(-case.desk.ref)[:40]
shown = shown[np.argsort(np.mean(rest, axis=0)[shown])]
moved = [np.log(run.probs) - desk.ref_logp for run, desk in zip(trained, desks, strict=True)]
x, y = np.mean(rest, axis=0)[shown], np.mean(moved, axis=0)[shown]
draw_lines(left, {"the spring at rest": (x, x), "trained, 40 common replies": (x, y)})
say(left, "replies rest at r / beta - log Z; rare ones lag", "rest point [nats]", "penalty [nats]")
draw_tokens(right, boxes, limit=3.0, width=9)
say(right, "what each token pays: red pays, blue earns, hatched has no price", "")

# %% The answer
prices = [spread([row["penalty"] for row in sentences[name]]) for name in ("short", "long")]
seen = f"At theta = ref both pay 0. Trained, ANS pays {spread(end[0])} nats and {replies[2]} "
seen += f"{spread(end[2])}; in words (one run, ± over 10 prompts) {prices[0]} and {prices[1]}."
case.finish(figure, varied="two replies; their length; what is paid", seen=seen)
