"""What each trick of the fast path is worth: the same work with the trick and without, in turns.

    python tests/benchmarks/bench_tricks.py              about three minutes

One process and one thread; the medians of the ratios of neighbouring laps.
"""

import argparse
import contextlib
import json
import math
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from bench import columns
from ours import MiniRLHF
from protocol import Workload
from threadpoolctl import threadpool_limits
from workloads import WORKLOADS, write_workload

from minirlhf.app.progress import track
from minirlhf.memory import keep_freed_memory
from minirlhf.nn import attention, layers, transformer
from minirlhf.train import batches, policy, rollout

ROUNDS = 9
SECONDS_A_LAP = 0.1


def plain_gelu(x, *, keep=True):
    """The formula as it is printed, with x * x * x for x ** 3 (which takes 15 times as long)."""
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    t = np.tanh(u)
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (
        1 + 3 * 0.044715 * x * x
    )
    return 0.5 * x * (1 + t), layers.GeluCache(slope)


def plain_layernorm(x, gain, bias, *, eps=1e-5):
    mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    return gain * xhat + bias, layers.LayerNormCache(xhat, gain, rstd)


def plain_layernorm_backward(dy, cache):
    xhat, gain, rstd = cache
    dxhat = dy * gain
    along = (dxhat * xhat).mean(axis=-1, keepdims=True)
    dx = rstd * (dxhat - dxhat.mean(axis=-1, keepdims=True) - xhat * along)
    rows = dy.shape[-1]
    return dx, (dy * xhat).reshape(-1, rows).sum(axis=0), dy.reshape(-1, rows).sum(axis=0)


def every_column(params, *, read, **constants):
    """All hidden states of the last block, of which those that are read are then taken."""
    h, _ = transformer.transformer_forward(params, read=None, **constants)
    return h[np.arange(len(h))[:, None], read], None


def everything_kept(params, **constants):
    return transformer.transformer_forward(params, **{**constants, "keep": True})


def scored_anew(params, *, hidden=None, **constants):
    return policy.policy_forward(params, **constants)


def patched(*targets):
    """A context with (module, name, value) set."""

    @contextlib.contextmanager
    def context():
        with contextlib.ExitStack() as stack:
            for module, name, value in targets:
                stack.enter_context(mock.patch.object(module, name, value))
            yield

    return context


WITHOUT = {  # trick -> (part it shows in, how to do without it)
    "no maximum in the softmax where no score exceeds 60": (
        "loss",
        patched((attention, "surely_within", lambda x, limit: False)),
    ),
    "GELU in place, with exp for tanh": ("loss", patched((layers, "gelu_forward", plain_gelu))),
    "layer norm whose sums are products": (
        "loss",
        patched(
            (layers, "layernorm_forward", plain_layernorm),
            (layers, "layernorm_backward", plain_layernorm_backward),
        ),
    ),
    "embedding gradient: sorted runs instead of `add.at`": (
        "loss",
        patched((layers, "scatter_add", np.add.at)),
    ),
    "micro-batches that suit a core's cache": (
        "loss",
        patched((batches, "MICRO_BATCH_TOKENS", 1 << 40)),
    ),
    "last block: only the columns that somebody reads": (
        "logprobs",
        patched((policy, "transformer_forward", every_column)),
    ),
    "no caches where no backward follows": (
        "logprobs",
        patched((policy, "transformer_forward", everything_kept)),
    ),
    "old log-probs from the sampler's hidden states": (
        "iteration",
        patched((rollout, "policy_forward", scored_anew)),
    ),
}


def seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def ratio(ours: MiniRLHF, part: str, without) -> float:
    """How many times as long it takes without the trick."""
    run, ratios = getattr(ours, part), []
    repeats = max(1, round(SECONDS_A_LAP / seconds(run)))
    for _ in range(ROUNDS):
        with_it = sum(seconds(run) for _ in range(repeats))
        with without():
            ratios.append(sum(seconds(run) for _ in range(repeats)) / with_it)
    return float(np.median(ratios))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_tricks"))
    options = parser.parse_args(arguments)
    keep_freed_memory()
    rows = [{"trick": trick, "part": part} for trick, (part, _) in WITHOUT.items()]
    names = ("nano", "toy")
    for name in names:
        with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
            write_workload(Path(folder), name, WORKLOADS[name], threads=1)
            ours = MiniRLHF(Workload.load(Path(folder)), "")
            for row in track(rows, name):
                row[name] = ratio(ours, *WITHOUT[row["trick"]])
    print("\ntime without the trick / time with it\n")
    cells = ([r["trick"], r["part"], *(f"{r[name]:.2f}" for name in names)] for r in rows)
    print(columns(["", "shows in", *names], *cells))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench_tricks.json").write_text(json.dumps(rows, indent=1))
    print(f"\nnumbers: {options.out / 'bench_tricks.json'}")


if __name__ == "__main__":
    main()
