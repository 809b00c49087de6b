"""The workloads of the benchmark: their sizes, their folders, the work that is in them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from programs import Program
from protocol import Peer, PPOSettings, Workload

from minirlhf.nn.heads import init_scalar_head
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.train.batches import Batch
from minirlhf.train.policy import policy_forward
from minirlhf.tree import Tree, tree_items

AGREE = {  # largest difference of a result, relative to its norm, in float32
    "loss": 1e-3,
    "sample": 1e-4,
    "logprobs": 1e-4,
    "adamw": 1e-2,  # a step is nearly the gradient's sign, also where that is rounding
    "update": 1e-2,
    "iteration": 5e-2,  # four of them
}


@dataclass(frozen=True)
class Sizes:
    """A workload: B prompts of P tokens, R tokens of response each, and a model of this size."""

    vocab_size: int
    d_model: int
    n_layer: int
    n_head: int
    prompt_len: int
    response_len: int
    batch_size: int
    parts: tuple[str, ...] = Peer.parts
    block: str = "gpt2"
    d_ff: int = 0  # of llama; 0: 4 d_model


def gpt_of(w: Sizes | Workload) -> GPTConfig:
    """The transformer of a workload."""
    n_ctx = w.prompt_len + w.response_len
    sizes = {"n_layer": w.n_layer, "n_head": w.n_head, "d_model": w.d_model}
    return GPTConfig(w.vocab_size, n_ctx, **sizes, block=w.block, d_ff=w.d_ff)


WORKLOADS = {
    "nano": Sizes(64, 32, 2, 2, 8, 8, 256),
    "toy": Sizes(512, 128, 4, 4, 16, 48, 64),
    "small": Sizes(2048, 256, 6, 8, 64, 128, 32),
    "gpt2": Sizes(50257, 768, 12, 12, 128, 128, 8, ("update", "logprobs")),
    "stories": Sizes(32000, 288, 6, 6, 16, 48, 32, block="llama", d_ff=768),
}
SGEMM_SIZE = 1536  # of the square matrices whose product is the measure of the machine
PPO = PPOSettings(
    clip_eps=0.2,
    value_clip_eps=0.2,
    vf_coef=0.1,
    kl_coef=0.05,
    gamma=1.0,
    lam=0.95,
    epochs=4,
    learning_rate=1e-4,
    beta1=0.9,
    beta2=0.95,
    eps=1e-5,
    max_grad_norm=1.0,
)


def write_workload(folder: Path, name: str, sizes: Sizes, threads: int, seed: int = 0) -> None:
    """workload.json and arrays.npz, from which every program starts."""
    rng = np.random.default_rng(seed)
    gpt, shape = gpt_of(sizes), (sizes.batch_size, sizes.response_len)
    head = {"rng": rng, "dtype": np.float32}
    policy = {
        "transformer": init_transformer(gpt, rng=rng),
        "value_head": init_scalar_head(gpt.d_model, std=0.05, **head),
    }
    trees = {
        "policy": policy,
        "reference": {"transformer": init_transformer(gpt, rng=rng)},
        "reward": {
            "transformer": init_transformer(gpt, rng=rng),
            "reward_head": init_scalar_head(gpt.d_model, std=0.1, **head),
        },
    }
    tokens = rng.integers(gpt.vocab_size, size=(sizes.batch_size, gpt.n_ctx))
    batch = Batch(tokens, np.ones(tokens.shape, np.float32), sizes.prompt_len)
    out, _ = policy_forward(policy, batch=batch, config=gpt, keep=False)
    near = 0.1 * rng.standard_normal((2, *shape))
    arrays = {
        "tokens": tokens,
        "old_logp": out.logp + near[0],
        "old_values": out.values + near[1],
        "advantages": rng.standard_normal(shape),
        "returns": rng.standard_normal(shape),
    }
    arrays = {key: a if key == "tokens" else a.astype(np.float32) for key, a in arrays.items()}
    for owner, tree in trees.items():
        arrays |= {f"{owner}.{path}": leaf for path, leaf in tree_items(tree)}
    np.savez(folder / "arrays.npz", **arrays)
    fields = asdict(sizes) | {"name": name, "threads": threads, "seed": seed, "ppo": asdict(PPO)}
    del fields["parts"]
    if sizes.block == "gpt2":  # an older checkout knows no other: compare.py
        del fields["block"], fields["d_ff"]
    (folder / "workload.json").write_text(json.dumps(fields), encoding="utf-8")


def matmul_gflop(sizes: Sizes, part: str) -> float | None:
    """10^9 multiplications and additions that the dense products of a part need.

    Counted once for what has to be computed: logits where a token is predicted, and in the last
    block no queries and no MLP at the other prompt positions. Backward: twice the forward.
    """
    C, L, V, R = sizes.d_model, sizes.n_layer, sizes.vocab_size, sizes.response_len
    T = sizes.prompt_len + R - 1  # nothing follows the last token
    mlp = 6 * C * sizes.d_ff if sizes.block == "llama" else 16 * C * C
    block = (8 * C * C + mlp) * T + 4 * C * T * T
    last = 6 * C * C * T + (2 * C * C + mlp) * R + 4 * C * T * R
    forward = sizes.batch_size * ((L - 1) * block + last + 2 * C * V * R) / 1e9
    return {"loss": 3 * forward, "update": 3 * forward, "logprobs": forward}.get(part)


def tree_of(arrays: dict[str, np.ndarray]) -> Tree:
    """Arrays with dotted paths as the tree they were."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = array
    blocks = tree["transformer"]["blocks"]
    tree["transformer"]["blocks"] = [blocks[str(i)] for i in range(len(blocks))]
    return tree


def logprobs_of(params: Tree, tokens: np.ndarray, workload: Workload) -> np.ndarray:
    """(B, R) log-probs of given responses by the full forward."""
    batch = Batch(tokens, np.ones(tokens.shape, np.float32), workload.prompt_len)
    return policy_forward(params, batch=batch, config=gpt_of(workload), keep=False)[0].logp


def disagreement(folder: Path, part: str, program: Program) -> str:
    """What a program computes unlike ours, which must have been asked first; "" if nothing.

    Compared are results from one initial state: gradients, log-probs (of sampled tokens too, by
    our full forward), and by how much parameters moved.
    """
    answer = program.ask(do="check", part=part)
    if answer["file"] is None:
        return ""
    workload = Workload.load(folder)
    with np.load(answer["file"]) as file:
        got = dict(file)
    expected_file = folder / f"expected-{part}.npz"
    if part == "sample":
        wanted = {
            "logp": logprobs_of(tree_of(workload.parameters("policy")), got["tokens"], workload)
        }
    elif not expected_file.exists():
        np.savez(expected_file, **got)
        return ""
    else:
        with np.load(expected_file) as file:
            wanted = dict(file)
    if part in ("adamw", "update", "iteration"):
        start = {f"policy.{path}": array for path, array in workload.parameters("policy").items()}
        got, wanted = ({k: a - start.get(k, 0.0) for k, a in d.items()} for d in (got, wanted))
    for name, array in wanted.items():
        error = float(np.linalg.norm(got[name] - array) / max(np.linalg.norm(array), 1e-6))
        if not error <= AGREE[part]:
            return f"{name} differs by {error:.1e} of its norm"
    return ""
