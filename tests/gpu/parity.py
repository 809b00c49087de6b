"""A whole tiny training, SFT and PPO, on a GPU and on the CPU: where do they part?

    python tests/gpu/parity.py ITERATIONS       one JSON object on stdout

Seed and coins are the same, so ids differ only where rounding moves a log-prob across one of them;
from there on the two runs learn from other samples.
"""

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import devices

from minirlhf.backend import to_device, to_host
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.ppo import Task, new_policy, train_ppo
from minirlhf.train.rollout import Samples
from minirlhf.train.sampler import sample_responses
from minirlhf.train.settings import PPOConfig
from minirlhf.train.sft import SFTConfig, train_sft
from minirlhf.tree import Tree, tree_map

CONFIG = GPTConfig(vocab_size=32, n_ctx=24, n_layer=2, n_head=4, d_model=32)
WANTED, STOP, PAD = 5, 30, 31  # ids: what is rewarded, what ends a response, padding
MAX_TOKENS = 12


def training(device: str, iterations: int) -> Iterator[tuple[Samples, np.ndarray]]:
    """After as many steps of SFT: the samples of each iteration, and the parameters after it."""
    rng_init, rng_data, rng_sft, rng_rollout, rng_shuffle = np.random.default_rng(0).spawn(5)
    prompts = [rng_data.integers(30, size=n).tolist() for n in rng_data.integers(2, 9, size=16)]
    examples = [([*p], [*rng_data.integers(30, size=4).tolist(), STOP]) for p in prompts]
    params = {"transformer": init_transformer(CONFIG, rng=rng_init)}
    params = tree_map(functools.partial(to_device, device=device), params)
    same = {"config": CONFIG, "pad_id": PAD, "device": device}

    sft = SFTConfig(steps=iterations, batch_size=8)
    tuned = Optimizer(params, sft.optimizer, total_steps=sft.steps)
    for _ in train_sft(tuned, examples, settings=sft, rng=rng_sft, **same):
        pass

    def sample(policy: Tree) -> Samples:
        limits = {"stop_id": STOP, "max_tokens": MAX_TOKENS}
        return sample_responses(policy, prompts, rng=rng_rollout, **limits, **same)

    def score(samples: Samples) -> np.ndarray:
        return np.array([float(ids.count(WANTED)) for ids in samples.response_ids])

    settings = PPOConfig(iterations=iterations, batch_size=len(prompts))
    optimizer = new_policy(tuned.params, settings, rng=rng_init)
    known = {"config": CONFIG, "settings": settings, "rng": rng_shuffle}
    for turn in train_ppo(optimizer, tuned.params, Task(sample, score, STOP), **known):
        yield turn.rollout.samples, to_host(optimizer.flat).copy()


def compared(iterations: int) -> dict[str, Any]:
    """How many responses of each iteration are the same, and how far the parameters are apart."""
    same, distance = [], []
    runs = (training(device, iterations) for device in ("cpu", devices.OURS))
    for (here, flat), (there, other) in zip(*runs, strict=True):
        pairs = zip(here.response_ids, there.response_ids, strict=True)
        same.append(float(np.mean([a == b for a, b in pairs])))
        distance.append(float(np.abs(flat - other).max()))
    parted = next((i for i, share in enumerate(same) if share < 1), None)
    return {"iterations": iterations, "parted": parted, "same": same, "distance": distance}


if __name__ == "__main__":
    devices.arrange()
    print(json.dumps(compared(int(sys.argv[1]))))
