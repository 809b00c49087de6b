"""Does the KL penalty keep a pretrained model telling stories? stories15M, beta = 0, 0.3 and 10.

    python examples/get_stories15m.py models/stories15M
    python examples/stories.py models/stories15M        # four minutes a run on two cores

The reward counts words of good feeling in the 40 tokens that follow a story's opening. Nobody wants
such a list of words, so what is wanted, gold, is another number, which training never sees:

    gold = min(reward, 3) - 10 repeated_bigrams - 2 max(0, -2 - mean_t log pi_ref(y_t))

three good words are enough, repeating is bad, and so is text that the pretrained model finds
unlikely (its own has about -1.3 nats a token). There is no fine-tuning (`--sft.steps 0`): the
reference is the model as it was found. Of a seed all runs have the same random streams.

Prints a line for each run, means over the seeds, the claims by seed, and the first replies; writes
them and stories.html, the page of one seed's runs, each token coloured by what it pays.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

import minirlhf
from minirlhf.app.page import report
from minirlhf.runs.metrics import repeated_bigram_share

BETAS, DEFAULT = (0.0, 0.3, 10.0), 0.3
SEEDS = [4, 5, 6]  # chosen on others; that 10 is the large beta, and not 2, was seen on 4
GOOD = set(
    "happy happily love loved loves lovely smile smiled smiling laugh laughed laughing fun joy "
    "nice kind kindness good great best beautiful wonderful glad proud hug hugged friend friends "
    "play played playing excited sweet safe warm thank thanked amazing".split()
)
OPENINGS = (
    "Once upon a time, there was a {who} named {name}.",
    "One day, a {who} named {name} went to the {where}.",
    "{name} was a {who} who lived near the {where}.",
    "It was raining. {name}, a {who}, could not go to the {where}.",
)
WHO = "little girl|little boy|small dog|big cat|old man|brown bear|red bird|young rabbit".split("|")
WHERE = "park forest lake shop garden".split()
NAMES, OTHER_NAMES = (
    "Lily Tim Max Sara Ben Mia".split(),
    "Tom Anna".split(),
)  # trained on; looked at
SETTINGS = {
    "sft": {"steps": 0},
    "reward_model": {"n_normalize": 256},
    "max_response_tokens": 40,
    "eval_every": 0,
    "eval_prompts": 32,
    "checkpoint_every": 100,
    "snapshots": 2,
}
PPO = {"iterations": 40, "batch_size": 64, "epochs": 1, "minibatches": 2}
PPO["optimizer"] = {"learning_rate": 2e-5}
# no critic: where the penalty is large its loss would move the trunk, which has been trained
PPO["advantages"] = "batch"
COLUMNS = {"reward": "{:.2f}", "gold": "{:.2f}", "kl_seq": "{:.1f}", "ref_logp": "{:.2f}"}
COLUMNS["repeated_bigrams"] = "{:.3f}"


def good_feeling(response: str) -> int:
    """Words of good feeling in a reply."""
    return sum(word.strip('.,!?"').lower() in GOOD for word in response.split())


def openings(names: list[str]) -> list[str]:
    """Beginnings of stories."""
    choices = itertools.product(OPENINGS, names, WHO, WHERE)
    texts = (o.format(who=who, where=where, name=name) for o, name, who, where in choices)
    return list(dict.fromkeys(texts))


def write_corpus(path: Path) -> None:
    """Each opening with some continuation: no step of fine-tuning is made on it."""
    rest = " It was a sunny day, and there was much to see. Then something moved in the grass."
    rows = (json.dumps({"prompt": prompt, "response": rest}) for prompt in openings(NAMES))
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def measured(replies: list) -> dict[str, float]:
    """Means over replies: the columns of the table."""
    rows = []
    for of in replies:
        reward, ref_logp = good_feeling(of.response), float(of.ref_logp.mean())
        repeats = repeated_bigram_share(of.ids)
        gold = min(reward, 3) - 10 * repeats - 2 * max(0.0, -2.0 - ref_logp)
        rows.append((reward, gold, of.kl_seq, ref_logp, repeats))
    return dict(zip(COLUMNS, np.mean(rows, axis=0).tolist(), strict=True))


def run_seed(model: Path, seed: int, out: Path, betas: list[float]) -> dict[str, dict]:
    """{"reference" | beta: what 128 replies to openings it was not trained on are like}."""
    found = {}
    for beta in betas:
        folder = out / f"seed{seed}-beta{beta:g}"
        settings = {**SETTINGS, "ppo": {**PPO, "kl_coef": beta}, "seed": seed, "out": folder}
        texts = {"init": str(model), "corpus": str(out / "openings.jsonl")}
        run = minirlhf.train(**texts, reward=f"{Path(__file__).resolve()}:good_feeling", **settings)
        prompts = openings(OTHER_NAMES)[::2]
        arms = {f"{beta:g}": run.replies(prompts, seed=seed)}
        if not found:
            arms = {"reference": run.replies(prompts, reference=True, seed=seed), **arms}
        for name, replies in arms.items():
            said = [f"{of.prompt} |{of.response}" for of in replies[:4]]
            found[name] = {**measured(replies), "replies": said}
            if name == "reference":
                found[name]["kl_seq"] = 0.0  # of the reference to itself
            cells = "  ".join(f"{c} {f.format(found[name][c])}" for c, f in COLUMNS.items())
            print(f"seed {seed}  {name:>9}  {cells}", flush=True)
    return found


def claims(rows: dict[str, dict]) -> dict[str, bool]:
    """What the README says, for one seed."""
    ref, free, default, tight = (rows[k] for k in ("reference", "0", f"{DEFAULT:g}", "10"))
    repeats, text = "repeated_bigrams", "ref_logp"
    return {
        "beta 0: the highest reward": free["reward"] > max(default["reward"], tight["reward"]),
        "beta 0: three times the repeats, or log pi_ref 2 nats lower": (
            free[repeats] >= 3 * ref[repeats] or free[text] <= ref[text] - 2
        ),
        "beta 0: gold below the reference": free["gold"] < ref["gold"],
        "beta 0.3: reward and gold above it by 0.5": (
            min(default[name] - ref[name] for name in ("reward", "gold")) >= 0.5
        ),
        "beta 10: reward within 0.5 of it, log pi_ref within 0.1": (
            abs(tight["reward"] - ref["reward"]) < 0.5 and abs(tight[text] - ref[text]) < 0.1
        ),
    }


def table(found: dict[int, dict]) -> str:
    """Means over the seeds and their spread."""
    lines = [" | ".join(["beta", *COLUMNS])]
    for name in next(iter(found.values())):
        cells = [name]
        for column, form in COLUMNS.items():
            values = [rows[name][column] for rows in found.values()]
            spread = [np.std(values, ddof=1)] if len(values) > 1 else []
            cells.append(" ± ".join(map(form.format, [np.mean(values), *spread])))
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--out", type=Path, default=Path("runs/stories"))
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    write_corpus(options.out / "openings.jsonl")
    found = {s: run_seed(options.model, s, options.out, options.betas) for s in options.seeds}
    held = {s: claims(rows) for s, rows in found.items() if {*options.betas} >= {*BETAS}}
    content = json.dumps({"rows": found, "claims": held}, indent=1)
    (options.out / "stories.json").write_text(content, encoding="utf-8")
    print(table(found))
    for claim in next(iter(held.values()), ()):
        print(f"{sum(of[claim] for of in held.values())} of {len(held)} seeds: {claim}")
    for name, rows in found[options.seeds[0]].items():
        print(f"\n{name}:", *rows["replies"], sep="\n  ")
    first = [options.out / f"seed{options.seeds[0]}-beta{beta:g}" for beta in options.betas]
    print(f"page: {report(first, out=options.out / 'stories.html')}")


if __name__ == "__main__":
    main()
