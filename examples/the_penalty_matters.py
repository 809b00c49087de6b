"""Does the KL penalty matter? PPO with beta = 0, the default and a very large beta, five seeds.

    python examples/the_penalty_matters.py            # about 8 minutes on two cores

For every seed the reference and the reward model are trained once; PPO then starts three times
from the same reference, with the same reward model and the same random streams: only beta differs.
The proxy reward is what PPO sees; the gold reward, computed from the text, is what was wanted.

Prints a line for every run, the table of means, in how many seeds each of seven claims holds, and
replies before and after. Writes the_penalty_matters.png beside the run folders and, with
--picture, somewhere else as well; and the_penalty_seen.png, replies to one prompt token by token.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np

from minirlhf.app import coloured, pictures
from minirlhf.app.api import open_run
from minirlhf.memory import keep_freed_memory
from minirlhf.runs.config import TrainConfig, load_config
from minirlhf.runs.log import read_jsonl
from minirlhf.runs.pipeline import run_stages
from minirlhf.runs.session import fork_run, open_session, reopen_session
from minirlhf.train.settings import PPOConfig

DEFAULT = PPOConfig().kl_coef
BETAS = (0.0, DEFAULT, 5.0)
COLUMNS = ("proxy", "gold", "kl_seq", "entropy", "length", "distinct_2", "repeated_bigrams")
EVAL_EVERY = 2  # PPO iterations between two points of the picture


def run_seed(seed: int, out: Path) -> dict[str, dict]:
    """The three runs of one seed: {"reference" | beta: metrics}, and replies of each."""
    keep_freed_memory()
    base = out / f"seed{seed}-beta{DEFAULT:g}"
    config = TrainConfig(out=base, seed=seed, eval_every=EVAL_EVERY)
    results = {DEFAULT: run_stages(open_session(config))}
    settings = load_config(base / "config.toml").ppo
    for beta in BETAS:
        if beta != DEFAULT:
            folder = out / f"seed{seed}-beta{beta:g}"
            fork_run(base, folder, ppo=dataclasses.replace(settings, kl_coef=beta))
            results[beta] = run_stages(reopen_session(folder))
    rows = {f"{beta:g}": results[beta].policy for beta in BETAS}
    rows["reference"] = results[DEFAULT].reference
    replies = {f"{beta:g}": results[beta].policy_samples.responses[:8] for beta in BETAS}
    replies["reference"] = results[DEFAULT].reference_samples.responses[:8]
    for name in ("reference", *(f"{beta:g}" for beta in BETAS)):
        cells = "  ".join(f"{column} {rows[name][column]:7.3f}" for column in COLUMNS)
        print(f"seed {seed}  {name:>9}  {cells}", flush=True)
    found = {"seed": seed, "rows": rows, "replies": replies, "claims": claims(rows)}
    return found | {"prompts": results[0.0].prompts[:8]}


def claims(rows: dict[str, dict]) -> dict[str, bool]:
    """What the README says, for one seed."""
    ref, default, free, tight = (rows[k] for k in ("reference", f"{DEFAULT:g}", "0", "5"))
    return {
        "default: gold rises by >= 0.25": default["gold"] - ref["gold"] >= 0.25,
        "beta 0: proxy higher than default": free["proxy"] > default["proxy"],
        "beta 0: kl_seq > 5 x default": free["kl_seq"] > 5 * default["kl_seq"],
        "beta 0: repeated bigrams >= 2 x default": (
            free["repeated_bigrams"] >= 2 * default["repeated_bigrams"]
        ),
        "beta 0: gold lower than default by >= 1": default["gold"] - free["gold"] >= 1.0,
        "beta 0: gold below the reference": free["gold"] < ref["gold"],
        "beta 5: kl_seq < 0.3": tight["kl_seq"] < 0.3,
    }


def path_of(folder: Path, reference: dict[str, float]) -> np.ndarray:
    """(points, 3): sqrt(kl_seq), proxy and gold on held-out prompts along the run."""
    rows = read_jsonl(folder / "metrics.jsonl")
    rows = [row for row in rows if row["stage"] == "ppo" and "eval/gold" in row]
    keys = ("eval/kl_seq", "eval/proxy", "eval/gold")
    points = [[row[key] for key in keys] for row in rows]
    points = np.array([[0.0, reference["proxy"], reference["gold"]], *points])
    points[:, 0] = np.sqrt(np.maximum(points[:, 0], 0.0))
    return points


def draw(seeds: list[dict], out: Path, path: Path) -> None:
    """Proxy and gold against the distance from the reference, means and seeds; gold at the end."""
    figure, ((proxy, gold, end),) = pictures.new_figure(12, 3.8, 1, 3, width_ratios=(3, 3, 2))
    x = "distance from the reference, √kl_seq [nats^½]"
    for axis, column in ((proxy, 1), (gold, 2)):
        lines = {}
        for beta, look in zip((DEFAULT, 0.0), pictures.LOOKS, strict=False):
            folders = [out / f"seed{seed['seed']}-beta{beta:g}" for seed in seeds]
            starts = [seed["rows"]["reference"] for seed in seeds]
            runs = np.array([path_of(*of_seed) for of_seed in zip(folders, starts, strict=True)])
            axis.scatter(runs[..., 0], runs[..., column], s=6, alpha=0.4, color=look["color"])
            mean = runs.mean(axis=0)
            lines[f"β = {beta:g}: mean of {len(seeds)} seeds"] = (mean[:, 0], mean[:, column])
        pictures.draw_lines(axis, lines)
    pictures.say(proxy, "proxy, what PPO sees: it rises and rises", x, "on held-out prompts")
    pictures.say(gold, "gold, what is wanted: without a penalty it is lost", x)
    names = ["0", f"{DEFAULT:g}", "5", "reference"]
    for i, name in enumerate(names):
        values = [seed["rows"][name]["gold"] for seed in seeds]
        end.plot([i] * len(values), values, "o", color=pictures.BLUE, alpha=0.5)
        end.hlines(np.mean(values), i - 0.3, i + 0.3, color=pictures.BLACK)
    end.set_xticks(range(len(names)), [f"β = {n}" if n != "reference" else n for n in names])
    pictures.say(end, "gold at the end: every seed, and the mean", "")
    print(f"picture: {pictures.save(figure, path)}")


def draw_tokens(seed: dict, out: Path, path: Path) -> None:
    """What each token pays, with the penalty and without, in replies to the first prompt."""
    rows, prompt = {}, seed["prompts"][0]
    for beta in (f"{DEFAULT:g}", "0"):
        run = open_run(out / f"seed{seed['seed']}-beta{beta}")
        reply = seed["replies"][beta][0]
        rows[f"β = {beta}: reply to {prompt!r}"] = run.score(prompt, reply)._asdict()
    print(f"picture: {coloured.picture(rows, path)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/the_penalty_matters"))
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--picture", type=Path, help="a further copy of the picture")
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out}: expected a new folder; it exists: choose another --out")
    options.out.mkdir(parents=True)

    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes) as pool:
        jobs = [(seed, options.out) for seed in options.seeds]
        seeds = pool.starmap(run_seed, jobs, chunksize=1)
    (options.out / "results.json").write_text(json.dumps(seeds, indent=1))

    print(f"\nmean +- sd over {len(seeds)} seeds")
    for name in ("reference", *(f"{beta:g}" for beta in BETAS)):
        values = np.array([[seed["rows"][name][column] for column in COLUMNS] for seed in seeds])
        sds = values.std(0, ddof=int(len(seeds) > 1))
        cells = (
            f"{column} {mean:.3f} +- {sd:.3f}"
            for column, mean, sd in zip(COLUMNS, values.mean(0), sds, strict=True)
        )
        print(f"{name:>9}: " + ", ".join(cells))
    print("\nclaim: in how many of the seeds it holds")
    verdicts = [claims(seed["rows"]) for seed in seeds]
    for claim in verdicts[0]:
        print(f"  {sum(v[claim] for v in verdicts)} of {len(seeds)}  {claim}")
    first = seeds[0]
    print(f"\nreplies, seed {first['seed']}")
    for i, prompt in enumerate(first["prompts"]):
        print(f"\n  {prompt}")
        for name in ("reference", f"{DEFAULT:g}", "0"):
            print(f"    {name:>9}: {first['replies'][name][i]}")
    print()
    picture = options.out / "the_penalty_matters.png"
    draw(seeds, options.out, picture)
    draw_tokens(first, options.out, options.out / "the_penalty_seen.png")
    if options.picture:
        shutil.copy2(picture, options.picture)


if __name__ == "__main__":
    main()
