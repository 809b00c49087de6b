"""What the commands leave behind as Markdown: one function for each published table.

Each takes the folder in which the commands of its source ran (figures.py) and returns the table.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
mean = statistics.fmean


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(x: float, digits: int) -> str:
    return f"{round(x, digits) + 0.0:.{digits}f}".replace("-", "−")  # + 0.0: no −0.00


def spread(values: list[float], digits: int) -> str:
    return f"{number(mean(values), digits)} ± {number(statistics.stdev(values), digits)}"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def support(folder: Path) -> str:
    """Means over the seeds of the_penalty_matters.py, and in how many of them each claim holds."""
    seeds = read(folder / "runs" / "results.json")
    columns = {
        "proxy": ("proxy reward", 2),
        "gold": ("gold reward", 2),
        "kl_seq": ("`kl_seq` [nats]", 2),
        "entropy": ("entropy [nats/token]", 2),
        "length": ("length [tokens]", 1),
        "distinct_2": ("distinct-2", 3),
        "repeated_bigrams": ("repeated bigrams in a reply", 3),
    }
    betas = _betas(seeds[0]["rows"])
    names = {"reference": "reference"} | {beta: f"β = {beta}" for beta in betas}
    names[betas[1]] = f"**β = {betas[1]}** (default)"
    rows = []
    for key, name in names.items():
        values = {c: [seed["rows"][key][c] for seed in seeds] for c in columns}
        rows.append([name, *(spread(values[c], digits) for c, (_, digits) in columns.items())])
    text = table(["", *(title for title, _ in columns.values())], rows)
    return with_claims(text, [seed.get("claims", {}) for seed in seeds])


def with_claims(text: str, held: list[dict[str, bool]]) -> str:
    """The table, and below it in how many seeds each claim held."""
    said = (f"{claim}: {sum(h[claim] for h in held)} of {len(held)}" for claim in held[0])
    return f"{text}\n\nSeeds in which it held: {'; '.join(said)}." if held[0] else text


def stories(folder: Path) -> str:
    """Means over the seeds of stories.py, and in how many of them each claim holds."""
    found = read(folder / "runs" / "stories.json")
    columns = {"reward": ("good words in a reply", 2), "gold": ("gold", 2)}
    columns |= {"kl_seq": ("`kl_seq` [nats]", 1), "ref_logp": ("log π_ref per token", 2)}
    columns["repeated_bigrams"] = ("repeated bigrams in a reply", 3)
    seeds, rows = list(found["rows"].values()), []
    for key in seeds[0]:
        values = {c: [seed[key][c] for seed in seeds] for c in columns}
        name = key if key == "reference" else f"β = {key}"
        rows.append([name, *(spread(values[c], digits) for c, (_, digits) in columns.items())])
    text = table(["", *(title for title, _ in columns.values())], rows)
    said = zip(rows, (seed["replies"][1] for seed in seeds[0].values()), strict=True)
    told = (f"- {row[0]}: {' '.join(reply.split())} …" for row, reply in said)
    text = with_claims(text, list(found["claims"].values()))
    return "\n".join(
        [
            text,
            "",
            f"An opening, and what follows it (seed {next(iter(found['rows']))}):",
            "",
            *told,
        ]
    )


def recipes(folder: Path) -> str:
    """Means over the seeds of recipes_compared.py, and in how many of them gold rose."""
    seeds = read(folder / "runs" / "results.json")
    columns = {"proxy": "proxy reward", "gold": "gold reward", "kl_seq": "`kl_seq` [nats]"}
    columns |= {"length": "length [tokens]", "repeated_bigrams": "repeated bigrams"}
    rows = []
    for name in seeds[0]:
        values = {c: [seed[name][c] for seed in seeds] for c in columns}
        digits = {"length": 1, "repeated_bigrams": 3}
        cells = [  # without a reward model there is no proxy
            "" if math.isnan(values[c][0]) else spread(values[c], digits.get(c, 2)) for c in columns
        ]
        rose = sum(seed[name]["gold"] > seed["reference"]["gold"] for seed in seeds)
        of = "" if name == "reference" else f"{rose} of {len(seeds)}"
        rows.append([name if name == "reference" else f"`{name}`", *cells, of])
    return table(["", *columns.values(), "gold rose"], rows)


def cases(folder: Path) -> str:
    """What each case study asks, varies and saw, in its own words, with its picture."""
    rows = []
    for path in sorted(folder.glob("*/*_*.json")):
        found, name = read(path), path.stem
        held = [sum(holds) for holds in found["claims"].values()]
        n = len(held) * len(found["seeds"])
        links = f"[{name[:2]}](cases/{name}.py), [picture](cases/{name}.png)"
        wrong = [f" *Not as expected: {text}*" for text in found["unexpected"]]
        texts = (found["question"], found["varied"], "".join([found["seen"], *wrong]))
        rows.append(
            [links, *(text.replace("|", "&#124;") for text in texts), f"{sum(held)} of {n}"]
        )
    heads = ["case", "question", "varied", "seen, mean ± sd over the seeds", "claims that held"]
    return table(heads, rows)


def diagnosis(folder: Path) -> str:
    """Each rule of `minirlhf diagnose`: how often it is right, and whether it warns in time."""
    found = read(next(folder.glob("28_*/28_*.json")))
    n, rows = found["healthy"], []
    for rule, told in found["rules"].items():
        causes = {c: first for c, (expected, first) in found["causes"].items() if expected == rule}
        others = sorted({f or "nothing" for first in causes.values() for f in first} - {rule})
        early = told["gold fell"] and told["lead"] > 0
        lead = f"{number(told['lead'], 0)} iterations ({told['gold fell']} runs)"
        cells = [f"`{rule}`", ", ".join(causes) or "–", f"{told['first']} of {told['runs']}"]
        cells += [", ".join(others) or "–", str(told["first elsewhere"])]
        cells += [str(told["below another"])]
        cells += [f"{told['in healthy runs']} of {n}", f"early: {lead}" if early else "no"]
        rows.append(cells)
    heads = ["rule", "planted", "named first", "else first", "first in other causes"]
    heads += ["listed below another", "in healthy runs", "before gold is seen to fall"]
    return f"{found['seen']}\n\n{table(heads, rows)}"


def _betas(rows: dict[str, Any]) -> list[str]:
    return sorted(rows.keys() - {"reference"}, key=float)


def optimum(folder: Path) -> str:
    """Share of the way to the optimum: a line a method, a column a beta."""
    runs = read(folder / "exact" / "exact.json")["optimum"]
    betas = list(dict.fromkeys(run["kl_coef"] for run in runs))
    rows = []
    for name, iterations in dict.fromkeys((run["name"], run["iterations"]) for run in runs):
        cells = [f"{name}, {iterations} iterations"]
        for beta in betas:
            shares = _last(runs, "fraction", name=name, kl_coef=beta)
            cells.append(f"{number(mean(shares), 4)} ({number(min(shares), 4)})")
        rows.append(cells)
    return table(["", *(f"β = {beta:g}" for beta in betas)], rows)


def _last(runs: Rows, metric: str, **where: Any) -> list[float]:
    """A metric at the end of those runs that have these values."""
    chosen = (run for run in runs if all(run[key] == value for key, value in where.items()))
    return [run["history"][-1][f"exact/{metric}"] for run in chosen]


GIVES = {  # what the program says in ASCII
    "0": "0: noise only",
    "grad KL(ref||pi)": "∇KL(ref‖π_θ), the other direction",
    "the same by token": "∇KL(ref‖π_θ), token by token",
    "g - k3 as loss, per token": "g − that of `loss_k3_tok`",
}


def kl(folder: Path, only: tuple[str, ...] = ()) -> str:
    """The expected gradient of every placement against that of the KL, on and off policy."""
    rows = read(folder / "exact" / "exact.json")["kl"]
    old = {(r["kl_mode"], r["gamma"]): r for r in rows if r["sampler"] == "old"}
    lines = []
    for row in (row for row in rows if row["sampler"] == "theta"):
        if only and (row["kl_mode"] not in only or row["gamma"] != 1):
            continue
        off = old.get((row["kl_mode"], row["gamma"]))
        gives = GIVES.get(row["gives"], row["gives"]).replace("||", "‖")  # | ends a cell
        cells = _error(row) + (_error(off) if off else [""] * 3)
        lines.append([f"`{row['kl_mode']}`", row["name"], gives, *cells])
    head = ["`kl_mode`", "what it is", "expected gradient, y ~ π_θ", "error", "cosine", "noise"]
    return table([*head, "y ~ old: error", "cosine", "noise"], lines)


def _error(row: dict[str, Any]) -> list[str]:
    """Error, in bold where it is rounding, cosine and noise of one sample."""
    error, noise = row["error"], row["noise"]
    shown = f"**{error:.0e}**" if error < 1e-8 else number(error, 2 if error < 10 else 0)
    return [shown, number(row["cosine"], 2), number(noise, 1 if noise < 50 else 0)]


def kl4(folder: Path) -> str:
    return kl(folder, only=("reward_k1", "loss_k1", "loss_k3_tok", "loss_full"))


def libraries(folder: Path) -> str:
    """What the KL term of each library descends; then where it was read."""
    rows = json.loads((folder / "output.txt").read_text(encoding="utf-8"))
    lines, read_in = [], {}
    for row in rows:
        term = row["term"].replace("|", "&#124;")  # | ends a cell
        reward = ", in the reward" * (row["placement"] == "reward")
        off = row["off"].partition(",")[0]
        lines.append([f"`{row['name']}`", term + reward, row["descends"], *_error(row), off])
        read_in.setdefault((row["where"], row["as_of"]), []).append(f"`{row['name']}`")
    head = ["", "term", "descends, y ~ π_θ", "error", "cosine", "noise", "y ~ old"]
    sources = (f"- {', '.join(names)}: {', '.join(place)}" for place, names in read_in.items())
    return "\n".join([table(head, lines), "", *sources])


def randomwalks(folder: Path) -> str:
    """Means over the model seeds, read off the tables that the example prints."""
    groups: dict[tuple[int, float], Rows] = {}
    for line in (folder / "output.txt").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if line.startswith("graph "):
            graph, names = int(words[1].rstrip(":")), []
        elif words[:2] == ["seed", "beta"]:
            names = words
        elif words and names and len(words) == len(names):
            row = dict(zip(names, map(float, words), strict=True))
            groups.setdefault((graph, row["beta"]), []).append(row)
        else:
            names = []
    rows = []
    for (graph, beta), same in groups.items():
        of = {name: mean(row[name] for row in same) for name in same[0]}
        share = f"**{number(of['J/J*'], 4)}** ({number(min(r['J/J*'] for r in same), 4)})"
        columns = {"reference": 4, "optimum": 4, "policy": 4, "KL*": 3, "KL": 3, "P(illegal)": 4}
        others = (number(of[name], digits) for name, digits in columns.items())
        rows.append([str(graph), f"{beta:g}", number(of["J*"], 4), share, *others])
    head = ["graph", "β", "J*", "J / J*, mean (least)", "optimality: reference", "of the optimum"]
    return table([*head, "of the policy", "KL of the optimum", "of the policy", "P(illegal)"], rows)


def exact_size(folder: Path) -> str:
    """Time and memory of the three largest trees."""
    rows = (
        [
            f"{row['max_tokens']} tokens",
            *(f"{row[key]:,}" for key in ("responses", "prefixes")),
            f"{row['enumeration']:.2g} s",
            f"{row['peak_mib']:.0f} MiB",
            f"{row['gradient']:.2g} s",
        ]
        for row in read(folder / "exact" / "bench_exact.json")[-3:]
    )
    head = ["longest reply", "responses", "prefixes", "enumerated, evaluated, optimum", "memory"]
    return table([*head, "∇J in the parameters"], rows)


def own_text(folder: Path) -> str:
    """Names, Shakespeare and preference pairs, on held-out prompts."""
    rows = []
    for name, text, reward in (
        ("names", "32,033 first names (karpathy/makemore)", "share of vowels"),
        ("plays", "1.1 MB of Shakespeare (karpathy/char-rnn)", "share of words of ≤ 4 letters"),
    ):
        reference, policy = (
            read(folder / name / "result.json")[k] for k in ("reference", "policy")
        )
        scores = (number(row["reward"], 3) for row in (reference, policy))
        rows.append([text, reward, *scores, number(policy["kl_seq"], 2)])
    pairs = len((folder / "pairs" / "preferences.jsonl").read_text("utf-8").splitlines())
    said = re.findall(
        r"accuracy ([\d.]+) on (\d+) held-out", (folder / "output.txt").read_text("utf-8")
    )
    accuracy, heldout = said[-1]
    policy = read(folder / "pairs" / "run" / "result.json")["policy"]
    learned = f"reward model: accuracy {accuracy} on {heldout} held-out pairs"
    rows.append([f"{pairs:,} preference pairs", learned, "", "", number(policy["kl_seq"], 2)])
    return table(["text", "reward", "reference", "policy", "`kl_seq`"], rows)


def bench(folder: Path) -> str:
    """Our time, and how many times as long the others take; then what ran where."""
    results = [read(path) for path in sorted(folder.glob("*/bench.json"))]
    rows = [row for result in results for row in result["rows"]]
    peers = [n for n in dict.fromkeys(row["program"] for row in rows) if n != "minirlhf"]
    weighed = [p for p in peers if any(r["memory"] is not None for r in rows if r["program"] == p)]
    lines = []
    for workload, part in dict.fromkeys((row["workload"], row["part"]) for row in rows):
        same = {r["program"]: r for r in rows if (r["workload"], r["part"]) == (workload, part)}
        ours, ms = same["minirlhf"], 1e3 * same["minirlhf"]["seconds"]
        peak = f"{ours['gflops'] / ours['sgemm_gflops']:.0%}" if ours["gflops"] else ""
        times = (same.get(name) for name in peers)
        ratios = (f"{'~' if r['noisy'] else ''}{r['ratio']:.2f}" if r else "" for r in times)
        held = [(same.get(name) or {}).get("memory") for name in ("minirlhf", *weighed)]
        memory = (f"{bytes_ / 2**20:.0f}" if bytes_ else "" for bytes_ in held)
        named = f"{workload}: {ours['what']}"
        lines.append([named, number(ms, 1 if ms < 1000 else 0), peak, *ratios, *memory])
    head = ["", "ms", "of the sgemm peak", *peers, "memory [MiB]", *(f"{n}'s" for n in weighed)]
    versions = dict.fromkeys(row["version"] for row in rows)
    machine = results[0]["machine"]
    where = f"NumPy {machine['numpy']}, Python {machine['python']}, {results[0]['threads']} cores"
    return f"{table(head, lines)}\n\n{', '.join(versions)}; {where}."


def tricks(folder: Path) -> str:
    """Time without a trick / time with it."""
    rows = read(folder / "tricks" / "bench_tricks.json")
    cells = ([r["trick"], r["part"], f"{r['nano']:.2f}", f"{r['toy']:.2f}"] for r in rows)
    return table(["trick", "shows in", "nano", "toy"], cells)


def gpu(folder: Path) -> str:
    return "Nothing has been run on a GPU yet."
