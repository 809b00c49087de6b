"""GRPO, Dr. GRPO, RLOO, GSPO, DAPO, CISPO and DPO beside PPO, on the support world, five seeds.

    python examples/recipes_compared.py            # about 9 minutes on two cores

For every seed the reference and the reward model are trained once; each recipe then starts from the
same reference, with the same reward model and the same random streams. DPO learns from the pairs
that the reward model was trained on. Nothing is tuned: the settings are those of `--recipe NAME`.
The proxy is what is paid, gold what was wanted; DPO has no proxy.

Prints the table of means and how often gold rose over the reference's.
"""

import argparse
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from minirlhf.memory import keep_freed_memory
from minirlhf.runs.config import TrainConfig, load_config
from minirlhf.runs.pipeline import run_stages
from minirlhf.runs.session import fork_run, open_session, reopen_session
from minirlhf.train.recipes import RECIPES, recipe

COLUMNS = ("proxy", "gold", "kl_seq", "length", "repeated_bigrams")


def run_seed(seed: int, out: Path) -> dict[str, dict[str, float]]:
    """{"reference" or a recipe: its columns} of one seed."""
    keep_freed_memory()
    base = out / f"seed{seed}-ppo"
    config = TrainConfig(out=base, seed=seed, eval_every=0)
    results = {"ppo": run_stages(open_session(config))}
    ppo = load_config(base / "config.toml").ppo
    for name in RECIPES:
        folder, changes = out / f"seed{seed}-{name}", recipe(name)
        if name == "dpo":  # another way from the reference on
            results[name] = run_stages(open_session(replace(config, out=folder, **changes)))
        elif name != "ppo":
            fork_run(base, folder, ppo=replace(ppo, **changes["ppo"]))
            results[name] = run_stages(reopen_session(folder))
    rows = {"reference": results["ppo"].reference}
    rows |= {name: results[name].policy for name in RECIPES}
    for name, row in rows.items():
        cells = "  ".join(f"{column} {row[column]:7.3f}" for column in COLUMNS)
        print(f"seed {seed}  {name:>9}  {cells}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/recipes_compared"))
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out}: expected a new folder; it exists: choose another --out")
    options.out.mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        seeds = pool.starmap(run_seed, [(seed, options.out) for seed in options.seeds], chunksize=1)
    (options.out / "results.json").write_text(json.dumps(seeds, indent=1))
    print(f"\nmean +- sd over {len(seeds)} seeds; in how many of them gold rose")
    for name in seeds[0]:
        values = np.array([[rows[name][column] for column in COLUMNS] for rows in seeds])
        sds = values.std(0, ddof=int(len(seeds) > 1))
        cells = (
            f"{column} {mean:.3f} +- {sd:.3f}"
            for column, mean, sd in zip(COLUMNS, values.mean(0), sds, strict=True)
        )
        rose = sum(rows[name]["gold"] > rows["reference"]["gold"] for rows in seeds)
        print(f"{name:>9}: {', '.join(cells)}; gold rose in {rose}")


if __name__ == "__main__":
    main()
