"""How many operations a GPU is sent, and how often the host waits for it: counted, not measured.

    python tests/benchmarks/count_launches.py

An update and some steps of decoding run on the stand-in for a GPU (tests/fakegpu.py), with the
fused kernels and without; what each sends to the device is counted. The sizes are those of the
benchmark's workload *toy*, but for the batch, on which no count depends. Time is not in it: nothing
here runs on a GPU. Neither are the copies that CuPy makes of strided operands of a product.
"""

import collections
import contextlib
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from cpu_kernels import CpuModule, kernels_on_the_fake_gpu
from fakegpu import fakegpu
from workloads import WORKLOADS, gpt_of

from minirlhf.nn.heads import init_scalar_head
from minirlhf.nn.sampling import generate
from minirlhf.nn.transformer import init_transformer
from minirlhf.train.batches import Batch
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.ppo import Experience, minibatch_gradients
from minirlhf.train.settings import OptimizerConfig, PPOConfig
from minirlhf.tree import tree_map

TOY = WORKLOADS["toy"]
CONFIG, P, R = gpt_of(TOY), TOY.prompt_len, TOY.response_len
STEPS = 8  # of decoding, over which a look at who has stopped is spread
NO_STOP, PAD = -1, 0


class Count(NamedTuple):
    operations: int
    waits: int
    names: collections.Counter
    kernels: int  # of ours, also those that a graph is made of


def counted(f) -> Count:
    """What f sends to the device."""
    before, waits = len(fakegpu.operations), fakegpu.sync_count
    kernels = len(CpuModule.launched)
    f()
    names, kernels = fakegpu.operations[before:], len(CpuModule.launched) - kernels
    return Count(len(names), fakegpu.sync_count - waits, collections.Counter(names), kernels)


def policy(rng: np.random.Generator):
    """On the stand-in."""
    head = init_scalar_head(CONFIG.d_model, std=0.1, rng=rng, dtype=np.float32)
    params = {"transformer": init_transformer(CONFIG, rng=rng), "value_head": head}
    return tree_map(fakegpu.asarray, params)


def update(B: int = 2) -> Count:
    """The loss of PPO, its gradients, the clip of their norm, AdamW: without regularisers."""
    rng = np.random.default_rng(0)
    settings = PPOConfig(batch_size=B, minibatches=1, optimizer=OptimizerConfig())
    tokens = rng.integers(CONFIG.vocab_size, size=(B, P + R))
    batch = Batch(*map(fakegpu.asarray, (tokens, np.ones((B, P + R), np.float32))), P)
    names = ("old_logp", "ref_logp", "old_values", "advantages", "returns")
    arrays = {name: rng.standard_normal((B, R)).astype(np.float32) for name in names}
    arrays["weights"] = np.full((B, R), 1 / (B * R), np.float32)
    arrays = {name: fakegpu.asarray(array) for name, array in arrays.items()}
    experience = Experience(batch=batch, ref_logits=None, kl_loss_coef=0.0, **arrays)
    optimizer = Optimizer(policy(rng), settings.optimizer, total_steps=4)

    def one():
        same = {"config": CONFIG, "settings": settings}
        step = minibatch_gradients(optimizer.params, experience, **same)
        optimizer.step(step.gradients, loss=step.loss, parts=step.parts)

    one()  # the kernels are compiled
    return counted(one)


def decoding(B: int = 2) -> Count:
    """STEPS steps: a token is drawn, and the model looks at it."""
    params = policy(np.random.default_rng(0))["transformer"]
    prompts = fakegpu.asarray(np.ones((B, P), np.int64)), fakegpu.asarray(np.ones((B, P), "f4"))

    def responses(max_new):
        generate(
            params,
            tokens=prompts[0],
            mask=prompts[1],
            config=CONFIG,
            max_new=max_new,
            stop_id=NO_STOP,
            pad_id=PAD,
            rng=np.random.default_rng(1),
        )

    responses(1)
    short, long = counted(lambda: responses(STEPS)), counted(lambda: responses(2 * STEPS))
    return Count(*(a - b for a, b in zip(long, short, strict=True)))


def counts() -> dict[str, Count]:
    """By what runs and whether with kernels."""
    found = {}
    for how in ("operation by operation", "fused kernels"):
        with kernels_on_the_fake_gpu() if how == "fused kernels" else contextlib.nullcontext():
            found[f"update, {how}"], found[f"{STEPS} tokens, {how}"] = update(), decoding()
    return found


def main() -> None:
    """Print the counts, and what there is most of."""
    for what, (operations, waits, names, kernels) in counts().items():
        print(f"{what}: {operations} operations, {waits} waits; {kernels} kernels of ours")
        print("   " + ", ".join(f"{name} {n}" for name, n in names.most_common(12)))


if __name__ == "__main__":
    main()
