"""Train from a file of preference pairs, as if it were your own.

    python examples/your_own_preferences.py           # about two minutes

Writes preferences.jsonl, one {"prompt", "chosen", "rejected"} a line: two replies to a message of
the support world, in the order of an annotator who errs now and then. Then runs

    minirlhf train --pairs preferences.jsonl

The chosen replies become the demonstrations, and the reward model's accuracy is that on pairs whose
prompts it has not seen. Give your own file instead of ours to train on your own preferences.
"""

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from minirlhf.app.cli import main as minirlhf
from minirlhf.worlds.support import make_world


def preference_pairs(rng: np.random.Generator) -> list[dict[str, str]]:
    """Two different demonstrations of each prompt, in the annotator's order."""
    world = make_world(rng=rng)
    replies = defaultdict(set)
    for prompt, reply in world.demonstrations:
        replies[prompt].add(reply)
    pairs = []
    for prompt, different in replies.items():
        for a, b in itertools.combinations(sorted(different)[:3], 2):
            chosen, rejected = (a, b) if world.annotate(prompt, a, b, rng) else (b, a)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"))
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    pairs = preference_pairs(np.random.default_rng(0))
    path = options.out / "preferences.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    print(f"{path}: {len(pairs)} pairs, the first: {json.dumps(pairs[0])}", flush=True)
    minirlhf(["train", "--pairs", str(path), "--out", str(options.out / "run")])


if __name__ == "__main__":
    main()
