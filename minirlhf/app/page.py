"""A run, or several, as one page to look at and to hand on: report.html, complete in itself.

What is drawn stands there as numbers too, as the run has logged them; nothing is loaded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from string import Formatter

import numpy as np

from minirlhf import __version__
from minirlhf.app import api, charts, coloured, pictures
from minirlhf.app.charts import Line, chart
from minirlhf.app.diagnose import diagnose
from minirlhf.app.pictures import METRICS, Row
from minirlhf.disk import plain, refusing, write_whole
from minirlhf.errors import InputError
from minirlhf.exact import enumeration, ground_truth, optimum, tiny
from minirlhf.runs.config import TrainConfig, flat, load_config
from minirlhf.runs.log import read_jsonl, read_metrics
from minirlhf.runs.pipeline import read_result
from minirlhf.runs.snapshots import PROMPTS

MOST_RUNS, MOST_MOMENTS = 5, 9
BETAS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0)
ROOT = "√KL to the reference [√nats]"
PANELS, STORY = METRICS["panels"], METRICS["story"]


class Recorded:
    """What a run folder says, ended or not, without its models."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.config = dict(flat(load_config(self.folder / "config.toml")))  # {"ppo.kl_coef": 0.2}
        self.rows = read_metrics(self.folder)
        samples, has = self.folder / "samples.jsonl", {"step": int, "prompt": str, "response": str}
        self.samples = read_jsonl(samples, has) if samples.exists() else []
        self.ends, self.seconds = {}, {}  # the final table, and the time of each stage
        if (self.folder / "result.json").exists():
            reference, policy, *_, self.seconds = read_result(self.folder)
            self.ends = plain({"reference": reference, "policy": policy})
        self.curves = pictures.curves(self.rows, self.ends.get("policy", {}))

    def of_ppo(self, name: str) -> list[float | None]:
        return self.curves.get(("ppo", name), ([], []))[1]

    @property
    def story(self) -> dict[str, tuple[float, float]]:
        """{row of the final table: (before, after)}, or as far as PPO has come."""
        found = {}
        for name, logged in STORY.items():
            ends = [end.get(name) for end in self.ends.values()]
            values = [x for x in ends or self.of_ppo(logged) if x is not None]
            if len(values) > 1:
                found[name] = values[0], values[-1]
        return found

    def parting(self, other: "Recorded") -> tuple | None:
        """(line, metric, value there, value here) where this run leaves the other one."""
        for there, here in zip(other.rows, self.rows, strict=False):
            for name in there | here:
                if there.get(name) != here.get(name) and not name.startswith("time/"):
                    return there, name, there.get(name), here.get(name)
        return None


def report(folders: Sequence[str | Path], *, out: Path | None = None, exact: bool = False) -> Path:
    """Write the page of a run, or of several side by side; `exact`: with that of the tiny world.

    Args:     out: the file; None: report.html in the folder of one run, else in the working one.
    Raises:   InputError: no run or too many, or damaged files.
    """
    if len(folders) > MOST_RUNS or not (folders or exact):
        raise InputError(
            f"report: expected 1 to {MOST_RUNS} run folders, or --exact; got {len(folders)}: name "
            "folders that `minirlhf train` wrote"
        )
    out = Path(out or Path(*folders[: len(folders) == 1]) / "report.html")
    runs = map(Recorded, map(Path, folders), short_names(folders))
    write_whole(out, page([*runs], exact=exact).encode())
    return out


def short_names(folders: Sequence[str | Path]) -> list[str]:
    """The names of folders, behind as many of those above them as tell them apart."""
    paths = [Path(folder).resolve().parts for folder in folders]
    longer = ([str(Path(*path[-n:])) for path in paths] for n in range(1, 4096))  # deep enough
    return next(names for names in longer if len(set(names)) == len(set(paths)))


def page(runs: list[Recorded], *, exact: bool = False) -> str:
    """The HTML of what is known of the runs."""
    defaults = {name: value for name, value in flat(TrainConfig()) if name != "out"}
    return coloured.template("page.html").render(
        runs=runs,
        findings=[(run, diagnose(run.folder)) for run in runs],
        replies=replies(runs),
        stages=[*stages(runs)],
        known=known_world() if exact else None,
        figures=[*paths(*runs), *histograms(*runs)] if len(runs) == 1 else [*frontier(runs)],
        defaults=defaults,
        changed={name for run in runs for name in defaults if run.config[name] != defaults[name]},
        metrics=METRICS,
        version=__version__,
    )


# -- replies -------------------------------------------------------------------------------------
def replies(runs: list[Recorded]) -> Row:
    """The same prompts in columns of token rows: moments of a run, or what policies say now."""
    why, columns = "", []
    snapshots = [path for run in runs if (path := run.folder / "snapshots.jsonl").exists()]
    kept = len(runs) == len(snapshots) == 1
    try:
        if runs:
            columns = moments(*snapshots) if kept else asked(runs)
    except InputError as error:
        why = str(error)
    return {"why": why, "columns": columns, "moments": kept}


def moments(path: Path) -> list[tuple[str, list[Row]]]:
    """(label, replies) of the first snapshot of a run, of the last, and of some between."""
    from jinja2 import UndefinedError

    rows = read_jsonl(path, {"step": int})
    steps = sorted({row["step"] for row in rows})
    some = np.linspace(0, len(steps) - 1, min(len(steps), MOST_MOMENTS)).round().astype(int)
    labels = {steps[i]: f"after {steps[i]} iterations" if i else "the reference" for i in some}
    found = [(of, [row for row in rows if row["step"] == step]) for step, of in labels.items()]
    expected, advice = "the same replies at every moment", "restore the file, or move it away"
    with refusing(path, expected, advice, LookupError, TypeError, UndefinedError):
        coloured.html(rows, document=True)
        tuple(zip(*(some for _, some in found), strict=True))
    return found


def asked(runs: list[Recorded]) -> list[tuple[str, list[Row]]]:
    """(label, replies) of each run, of one beside its reference; what pays most stands first."""
    opened = [api.open_run(run.folder) for run in runs]
    logged = (row["prompt"] for row in runs[0].samples)
    prompts = [*opened[0].session.world.heldout_prompts, *logged]
    same = {"prompts": [*dict.fromkeys(prompts)][:PROMPTS], "seed": opened[0].config.seed}
    if not (prompts and any(run.is_trained for run in opened)):
        raise InputError(
            "replies: expected a policy, and held-out prompts or logged replies; found none: see "
            "minirlhf score"
        )
    found = [(run.name, of.replies(**same)) for run, of in zip(runs, opened, strict=True)]
    found = [(f"{name}: β = {rows[0].kl_coef:g}", rows) for name, rows in found]
    if len(runs) == 1:
        first = opened[0].replies(**same, reference=True)
        found = [("the reference, priced by the policy", first), *found]
    paid = np.max([[row.kl_seq for row in rows] for _, rows in found], axis=0)
    return [(label, [rows[i]._asdict() for i in np.argsort(-paid)]) for label, rows in found]


# -- curves --------------------------------------------------------------------------------------
def stages(runs: list[Recorded]) -> Iterator[tuple[str, list[Row]]]:
    """Of each stage that has run its title and its charts."""
    measured = {of for run in runs for of in run.curves}
    for stage, title in METRICS["stages"].items():
        panels = [of for of in PANELS.values() if measured & {(stage, n) for n in of["metrics"]}]
        if panels:
            yield title, [panel(runs, stage, of) for of in panels]


def panel(runs: list[Recorded], stage: str, of: Row) -> Row:
    """A chart with its sentences; of several runs one metric each, and no reading."""
    lines, values, alone = [], {}, len(runs) == 1
    for i, run in enumerate(runs):
        found = {n: run.curves[stage, n] for n in of["metrics"] if (stage, n) in run.curves}
        for j, (name, (x, y)) in enumerate([*found.items()][: None if alone else 1]):
            held = pictures.is_held(name)
            label = of.get("labels", {}).get(name, "held out" if held else "training")
            points, dots = charts.thinned(x, y), held and len(x) < 60
            lines.append(Line(label if alone else run.name, *points, f"l{i + j}", dots=dots))
            values.setdefault(held, [v for v in y if v is not None])
    ours, held = values.get(False) or values[True], values.get(True, [])
    told = {"metric": of["metrics"][0], "healthy": of["healthy"]}
    told["says"] = sentence(of["says"], numbers_of(ours, held)) if alone else []
    x = "PPO iterations" if stage == "ppo" else "updates"
    return chart(of["title"], of["unit"], x, lines, **told)


def numbers_of(ours: list[float], held: list[float]) -> dict[str, float]:
    """What sentences may speak of: metrics.toml."""
    first, last, most = ours[0], ours[-1], max(ours)
    held = held or [math.nan]
    found = {"first": first, "last": last, "change": last - first, "most": most}
    found |= {"span": most - min(ours), "fall": most - last, "exp": math.exp(min(last, 700.0))}
    found["ratio"] = last / first if first > 0 else math.nan
    return found | {"held": held[-1], "rise": held[-1] - min(held)}


def sentence(says: list[tuple], numbers: dict[str, float]) -> list[str | float]:
    """The first that fits, as texts and numbers in turn."""
    text = next((text for of, least, text in says if numbers[of] >= least), "")
    pairs = ((said, numbers.get(of)) for said, of, *_ in Formatter().parse(text))
    return [part for pair in pairs for part in pair if part not in (None, "")]


def paths(run: Recorded) -> Iterator[Row]:
    """PPO's way from the reference: score, and gold or reward, against d, the root of the KL."""
    for name in METRICS["gains"]:
        pairs = zip(run.of_ppo(STORY["kl_seq"]), run.of_ppo(STORY[name]), strict=False)
        points = [(max(k, 0.0) ** 0.5, y) for k, y in pairs if None not in (k, y)]
        if len(points) > 1:
            (d, y), law, look = np.array(points).T, None, "l0" if name == "proxy" else "l1"
            lines = [Line("PPO", *charts.thinned(d, y), look, dots=True)]
            if len(points) >= 8 and d.max() > 0.3:
                start, at = run.story[name][0], np.linspace(0, d.max(), 40)
                law = fitted(d, y - start)
                gain = at * (law["alpha"] - law["beta"] * at)
                lines.append(Line("fitted law", at, start + gain, "fit"))
            yield chart(f"{name} on the way", PANELS[STORY[name]]["unit"], ROOT, lines, law=law)


def fitted(d: np.ndarray, gain: np.ndarray) -> dict[str, float]:
    """gain = d (alpha - beta d) by least squares; and the KL of its top, if the path passes it.

    The form that Gao et al. 2022, arXiv 2210.10760, have for best-of-n; theirs for RL, with log d
    in the place of d, fits the optima of worlds that can be enumerated less well.
    """
    terms = np.stack([d, -d * d], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(terms, gain, rcond=None)
    left, spread = gain - terms @ [alpha, beta], gain - gain.mean()
    explained = 1 - left @ left / max(spread @ spread, 1e-30)
    peak = (alpha / (2 * beta)) ** 2 if 0 < alpha <= 2 * beta * d.max() else math.nan
    return plain({"alpha": alpha, "beta": beta, "explained": explained, "peak": peak})


def histograms(run: Recorded) -> Iterator[Row]:
    """Logged replies of the first and of the last fifth of the iterations."""
    steps = sorted({row["step"] for row in run.samples})
    n = len(steps) // 5 or 1
    parts = {f"first {n} iterations": steps[:n], f"last {n} iterations": steps[-n:]}
    rows = [{**row, "length": float(len(row["response"]))} for row in run.samples]
    for name, unit in METRICS["samples"].items():
        some = [row for row in rows if isinstance(row.get(name), float)]
        values = [[row[name] for row in some if row["step"] in part] for part in parts.values()]
        if steps[1:] and all(values):
            edges = np.histogram_bin_edges(np.concatenate(values), 14)
            lines = []
            for label, numbers, look in zip(parts, values, ("l1 area", "l0 area"), strict=True):
                share = np.histogram(numbers, edges)[0] / len(numbers)
                y = np.concatenate([[0.0], np.repeat(share, 2), [0.0]])
                lines.append(Line(label, np.repeat(edges, 2), y, look))
            title, x = f"{name} of the logged replies", f"{name} [{unit}]"
            yield chart(title, "share of replies", x, lines)


def frontier(runs: list[Recorded]) -> Iterator[Row]:
    """Where several runs have ended: score, and gold or reward, against the root of their KL."""
    for name in METRICS["gains"]:
        lines, points = [], []
        for i, run in enumerate(runs):
            if run.ends and name in run.story:
                beta = run.config["dpo.kl_coef" if "dpo" in run.config["stages"] else "ppo.kl_coef"]
                before, after = run.story[name]
                d = max(run.story["kl_seq"][1], 0.0) ** 0.5
                points += [(0.0, before), (d, after)]
                look = {"look": f"l{i} loose", "dots": True, "tag": f"β {beta:g}"}
                lines.append(Line(run.name, [d], [after], **look))
        if len(lines) > 1:
            x, y = zip(*sorted(set(points)), strict=True)
            lines.append(Line("from the reference on", x, y, "fit"))
            yield chart(f"{name} for its KL", PANELS[STORY[name]]["unit"], ROOT, lines)


# -- the tiny desk, whose optimum is known at every beta -----------------------------------------
# Its replies are the leaves of a tree; what is known of a prefix is a sum over the leaves below it,
# which a browser does too. `data` has what it needs; the rest stands there without JavaScript.
def known_world(*, iterations: int = 20, max_tokens: int = 5) -> Row:
    """A policy trained on it by PPO, its reference and the optima, exactly; 19,608 replies."""
    rng = np.random.default_rng(0)
    world = tiny.make_tiny_world(max_tokens=max_tokens, n_demonstrations=1, rng=rng)
    reference = tiny.tiny_reference(0, max_tokens=max_tokens)
    settings = replace(ground_truth.PPO, iterations=iterations)
    truth = ground_truth.make_ground_truth(world, reference, kl_coef=settings.kl_coef)
    trained = ground_truth.train_on_world(truth, settings=settings, seed=0)
    end, tree, policy = trained.history[-1], world.tree, world.log_probs(trained.params)
    numbers = {
        "parent": np.concatenate([tree.parent, tree.leaf_node]),
        "token": np.concatenate([tree.token, tree.leaf_token]),
        "reward": world.rewards,
        "gold": world.gold,
        "ref": enumeration.response_logprobs(tree, truth.ref_log_probs),
        "policy": enumeration.response_logprobs(tree, policy),
    }
    shown = {
        "likeliest under the reference": int(numbers["ref"].argmax()),
        "best by gold": int(world.gold.argmax()),
        "best by proxy": int(world.rewards.argmax()),
    }
    data = {"kl_coef": truth.kl_coef, "tokens": world.tokens, "shown": [*shown.values()]}
    data |= {name: of.round(5).tolist() for name, of in numbers.items()}
    replies = enumeration.all_responses(tree)
    rows = [optimum_at(truth, replies, beta) for beta in np.geomspace(20.0, 0.03, 40)]
    root, d = end["exact/kl_seq"] ** 0.5, [row["kl_seq"] ** 0.5 for row in rows]
    lines = [
        Line("proxy of π*", d, [row["proxy"] for row in rows]),
        Line("gold of π*", d, [row["gold"] for row in rows], "l1"),
        Line("PPO", [root, root], [end["exact/reward"], end["exact/gold"]], "l4 loose", dots=True),
    ]
    return {
        "data": data,
        "end": end,
        "iterations": iterations,
        "optima": [optimum_at(truth, replies, beta) for beta in BETAS],
        "chart": chart("the frontier", "reward units", ROOT, lines),
        "replies": {name: priced(truth, replies, i, policy) for name, i in shown.items()},
    }


def optimum_at(truth: ground_truth.GroundTruth, replies: enumeration.Responses, beta: float) -> Row:
    """What pi* ~ pi_ref exp(r / beta) is worth, and what it says most often."""
    world, ref = truth.world, truth.ref_log_probs
    best = optimum.soft_optimum(world.tree, ref, world.rewards, kl_coef=beta).log_probs
    value = optimum.evaluate_exactly(world.tree, best, ref, world.rewards, kl_coef=beta)
    p = np.exp(enumeration.response_logprobs(world.tree, best))
    said = replies.tokens[p.argmax()][replies.mask[p.argmax()] > 0]
    row = {"beta": beta, "reply": " ".join(world.tokens[a] for a in said), "share": p.max()}
    row |= {"proxy": value.reward, "gold": p @ world.gold}
    return plain(row | {"kl_seq": value.kl_seq, "objective": value.objective})


def priced(
    truth: ground_truth.GroundTruth, replies: enumeration.Responses, leaf: int, policy: np.ndarray
) -> list[Row]:
    """Of each token of a reply log pi* - log pi_ref, and what is known of its prefix s.

    best is V*(s), value and q are V(s) and Q(s, a) of the policy, and lost is beta Pr(s)
    KL(pi(.|s) || pi*(.|s)), which over all prefixes sums to J* - J.
    """
    tree, ref, best = truth.world.tree, truth.ref_log_probs, truth.optimum
    ours = optimum.policy_values(tree, policy, ref, truth.world.rewards, kl_coef=truth.kl_coef)
    lost = optimum.optimality_gap(tree, policy, best)
    said, rows = replies.mask[leaf] > 0, []
    for s, a in zip(replies.nodes[leaf, said], replies.tokens[leaf, said], strict=True):
        row = {"token": truth.world.tokens[a], "d": best.log_probs[s, a] - ref[s, a]}
        row |= {"best": best.values[s], "value": ours.values[s], "q": ours.q[s, a]}
        rows.append(plain(row | {"lost": lost[s]}))
    return rows
