"""Time and memory of the exact answer against the number of responses.

    python tests/benchmarks/bench_exact.py            # about a minute

Eight tokens with EOS, a transformer of one block and 32 channels, float32, one thread; each size in
a process of its own. `policy` evaluates the transformer at every prefix (each once, KV cache),
`optimum` is the soft recursion, J, J* and the gap by prefix, `gradient` is dJ/dparams: forward and
backward of the longest prefixes. Memory is the peak above that of the imported package.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

V = 8


def peak_mib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_size(max_tokens: int) -> dict[str, float]:
    """All steps once, on a tree of up to `max_tokens` tokens."""
    from threadpoolctl import threadpool_limits

    from minirlhf.exact.enumeration import enumerate_responses
    from minirlhf.exact.optimum import (
        evaluate_exactly,
        objective_gradient,
        optimality_gap,
        soft_optimum,
    )
    from minirlhf.exact.tree_policy import tree_gradient, tree_logits
    from minirlhf.memory import keep_freed_memory
    from minirlhf.nn.transformer import GPTConfig, init_transformer
    from minirlhf.rlhf.logprobs import log_softmax

    threadpool_limits(1)
    keep_freed_memory()
    rng = np.random.default_rng(0)
    config = GPTConfig(V, max_tokens + 1, n_layer=1, n_head=4, d_model=32)
    params, reference = (
        {"transformer": init_transformer(config, rng=rng)} for _ in ("policy", "reference")
    )
    base, row, started = peak_mib(), {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        row[name] = time.perf_counter() - started
        started = time.perf_counter()

    tree = enumerate_responses(vocab_size=V, max_tokens=max_tokens, stop_id=0)
    row |= {"max_tokens": max_tokens, "prefixes": tree.n_nodes, "responses": len(tree.leaf_node)}
    lap("tree")
    where = {"tree": tree, "prompts": [[0]], "config": config}
    log_probs = log_softmax(tree_logits(params, **where).astype(np.float64))
    lap("policy")
    ref = log_softmax(tree_logits(reference, **where).astype(np.float64))
    rewards = rng.standard_normal(len(tree.leaf_node))
    started = time.perf_counter()
    optimum = soft_optimum(tree, ref, rewards, kl_coef=0.5)
    value = evaluate_exactly(tree, log_probs, ref, rewards, kl_coef=0.5)
    gap = optimality_gap(tree, log_probs, optimum).sum()
    assert abs(optimum.objective - value.objective - gap) < 1e-9
    lap("optimum")
    row["enumeration"] = row["tree"] + row["policy"] + row["optimum"]
    row["peak_mib"] = peak_mib() - base
    dlogits = objective_gradient(tree, log_probs, ref, rewards, kl_coef=0.5)
    tree_gradient(dlogits.astype(np.float32), params, **where)
    lap("gradient")
    row["peak_with_gradient_mib"] = peak_mib() - base
    return row


def draw(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    responses = [row["responses"] for row in rows]
    for name in ("tree", "policy", "optimum", "gradient"):
        seconds.loglog(responses, [row[name] for row in rows], "-o", ms=3, label=name)
    for name in ("peak_mib", "peak_with_gradient_mib"):
        memory.loglog(responses, [max(row[name], 1) for row in rows], "-o", ms=3, label=name)
    seconds.set_title("seconds", fontsize=9)
    memory.set_title("MiB above the imported package", fontsize=9)
    for axis in (seconds, memory):
        axis.set_xlabel("responses", fontsize=8)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=7, help="T of the largest tree")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_exact"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_size(options.one)))
        return
    columns = "responses prefixes tree policy optimum enumeration gradient peak_mib".split()
    columns.append("peak_with_gradient_mib")
    print("  ".join(f"{column:>11}" for column in ["max_tokens", *columns]))
    rows = []
    for max_tokens in range(3, options.longest + 1):
        command = [sys.executable, __file__, "--one", str(max_tokens)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=-1).stdout))
        cells = [
            f"{rows[-1][c]:11,.3f}" if c not in columns[:2] else f"{rows[-1][c]:11,}"
            for c in columns
        ]
        print(f"{max_tokens:11}  " + "  ".join(cells), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench_exact.json").write_text(json.dumps(rows, indent=1))
    draw(rows, options.out / "bench_exact.png")
    print(f"numbers and picture: {options.out}")


if __name__ == "__main__":
    main()
