"""`minirlhf report`: its numbers are the run's, its texts are text, it asks for nothing."""

import functools
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from tiny_run import (
    VOWELS,
    call,
    interrupted_after,
    metrics,
    refusal,
    tiny_config,
    train,
    write_pairs,
)

import minirlhf
from minirlhf.app import charts, coloured, page, pictures
from minirlhf.app.page import BETAS, known_world
from minirlhf.app.tables import ROWS
from minirlhf.disk import parse_object
from minirlhf.exact import ground_truth, tiny
from minirlhf.runs.log import read_jsonl

EVIL = "<script>alert(1)</script>&'\"]]>"
MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of other betas, with snapshots; no test changes them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, beta in (("some", 0.2), ("none", 0.0)):
        train(tiny_config(folder / name, ppo__kl_coef=beta, snapshots=2, seed=3))
    return folder / "some", folder / "none"


@pytest.fixture(scope="module")
def shown(runs):
    return Page(page.report(runs[:1]).read_text(encoding="utf-8"))


def read(text):
    """A number as a page writes it."""
    return float(text.replace(",", "").replace("\N{MINUS SIGN}", "-"))


class Page(HTMLParser):
    """What a page holds: its figures, its <data>, the ids, the texts, the scripts that run."""

    def __init__(self, text):
        super().__init__()
        self.text, self.figures, self.data, self.scripts, self.open = text, [], [], 0, []
        self.references, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.open.append(tag)
        self.references += [found[name] for name in ("src", "href", "action") if name in found]
        if tag == "figure":
            self.figures.append({"metric": found.get("data-metric")})
        if tag == "data":
            self.data.append([found["value"], ""])
        self.scripts += tag == "script" and "type" not in found

    def handle_data(self, text):
        if self.open[-1:] == ["data"] and self.data[-1][1] == "":
            self.data[-1][1] = text
        if self.open[-1:] == ["script"] and text.startswith('{"box"'):
            self.figures[-1] |= parse_object(text, "figure")
        elif self.open[-1:] not in (["script"], ["style"]):
            self.words.append(text)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    @property
    def said(self):
        return " ".join(" ".join(self.words).split())

    def lines(self, metric):
        """{label: (x, y)} of the figures of a metric."""
        found = [figure["lines"] for figure in self.figures if figure["metric"] == metric]
        return [{line["label"]: (line["x"], line["y"]) for line in lines} for lines in found]


def measured(run, name):
    """A metric as metrics.jsonl has it: after how many steps, and what."""
    rows = [row for row in metrics(run) if name in row]
    return [row["step"] + ("heldout/" not in name) for row in rows], [row[name] for row in rows]


# --- the numbers


def test_every_curve_is_that_of_metrics_jsonl(shown, runs):
    last = json.loads((runs[0] / "result.json").read_text())["policy"]
    for metric, panel in page.PANELS.items():
        expected = {}
        for name in panel["metrics"]:
            x, y = measured(runs[0], name)
            if name.startswith("eval/") and y and x[-1] < 3:  # the final table is the last one
                x, y = [*x, 3], [*y, last[name.removeprefix("eval/")]]
            if any(of is not None for of in y):
                expected["held out" if pictures.is_held(name) else "training"] = x, y
        found = shown.lines(metric)
        assert found == ([expected] if expected else []), metric
    assert len(shown.lines("objective/kl")[0]["training"][0]) == 3


def test_the_last_value_stands_beside_the_name_of_its_line(shown, runs):
    kl = measured(runs[0], "objective/kl")[1]
    assert [str(kl[-1]), charts.number(kl[-1])] in shown.data
    for value, text in shown.data:  # each is what it says, to the digits shown
        if text.strip() not in ("", "\N{EN DASH}"):
            assert read(text) == pytest.approx(float(value), rel=6e-3, abs=6e-3)


def test_the_table_is_that_of_the_run(shown, runs):
    result = json.loads((runs[0] / "result.json").read_text())
    for name, (_, form) in ROWS.items():
        for end in ("reference", "policy"):
            x = result[end][name]
            if x is not None:
                assert [str(x), form.format(x).replace("-", "\N{MINUS SIGN}")] in shown.data
    total, length = result["policy"]["kl_seq"], result["policy"]["length"]
    assert [str(total / length), charts.number(total / length)] in shown.data  # a mean per token


def paid(text):
    return [float(x) for x in re.findall(r'data-kl-seq="([^"]+)"', text)]


def test_the_replies_are_those_of_the_snapshots(shown, runs):
    rows = read_jsonl(runs[0] / "snapshots.jsonl")
    by_prompt = [row["kl_seq"] for i in range(4) for row in rows[i::4]]
    assert paid(shown.text) == by_prompt and len(rows) == 12
    for label in ("the reference", "after 2 iterations", "after 3 iterations"):
        assert f'data-label="{label}"' in shown.text


def test_without_snapshots_the_policy_is_asked_and_its_score_is_that_of_score(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    (run / "snapshots.jsonl").unlink()
    opened = minirlhf.open_run(run)
    text = opened.report(tmp_path / "page.html").read_text(encoding="utf-8")
    prompts = opened.session.world.heldout_prompts[:4]
    columns = [opened.replies(prompts, reference=ref, seed=3) for ref in (True, False)]
    pairs = sorted(zip(*columns, strict=True), key=lambda pair: -max(of.kl_seq for of in pair))
    assert paid(text) == [of.kl_seq for pair in pairs for of in pair]  # what pays most is first
    same = 0
    for row in columns[1]:
        try:
            again = opened.score(row.prompt, row.response)
        except minirlhf.errors.InputError:  # cut: with a stop token it is too long
            continue
        if again.ids == row.ids:
            same += 1
            assert again.kl_seq == pytest.approx(row.kl_seq, abs=1e-5)
            assert again.score == pytest.approx(row.score, abs=1e-5)
    assert same or all(len(row.ids) == 10 for row in columns[1])


def test_a_long_series_keeps_its_ends_and_its_extremes():
    y = list(np.random.default_rng(0).standard_normal(5000))
    y[2000], y[3001], y[10] = 9.0, -9.0, None
    x, kept = charts.thinned(list(range(5000)), y)
    assert len(x) <= charts.MOST_POINTS + 2 and x == sorted(x)
    assert (x[0], x[-1]) == (0, 4999) and {9.0, -9.0} <= set(kept)
    assert all(y[i] == of for i, of in zip(x, kept, strict=True))
    assert charts.thinned([1, 2], [None, 3.0]) == ([1, 2], [None, 3.0])


def test_a_chart_has_gaps_where_there_was_no_number():
    line = charts.Line("a", [0, 1, 2, 3], [1.0, None, 3.0, 5.0], "here", dots=True)
    drawn = coloured.template("chart.html").module.figure(charts.chart("t", "u", "x", [line]))
    path, rest = re.search(r'<g class="here"><path d="(.*?)"/>(.*?)</g>', drawn, re.DOTALL).groups()
    assert re.sub(r"[\d. ]+", "", path) == "MML" and rest.count("<circle") == 3
    assert Page(drawn).lines(None) == [{"a": ([0, 1, 2, 3], [1.0, None, 3.0, 5.0])}]
    flat = charts.chart("t", "u", "x", [charts.Line("a", [5], [0.2])])
    assert len(flat["y_ticks"]) > 1  # one point, or a level line


@pytest.mark.parametrize("low, high", [(0, 1), (-0.31, 0.07), (850, 12_345), (1e-5, 3e-5), (-7, 7)])
def test_ticks_are_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 6
    for x, text in found:
        assert low - 1e-12 <= x <= high + 1e-12
        assert read(text) == pytest.approx(x, abs=1e-12)


# --- how curves are read


def test_every_panel_has_a_reading_and_every_reading_an_end():
    some = page.numbers_of([1.0, 2.0], [3.0, 4.0])
    for metric, of in page.PANELS.items():
        assert of["metrics"][0] == metric and of["healthy"].endswith(".")
        assert of["metrics"] == sorted(of["metrics"], key=pictures.is_held)  # these stand last
        for number, _, text in of["says"]:
            assert text[-1] in ".?" and number in some
            assert set(re.findall(r"{(\w+)}", text)) <= some.keys()
        assert of["says"][-1][1] == -np.inf and of["says"][-1][0] not in ("rise", "held")


def said(metric, ours, held=()):
    parts = page.sentence(page.PANELS[metric]["says"], page.numbers_of(ours, list(held)))
    return "".join(part if isinstance(part, str) else charts.number(part) for part in parts)


@pytest.mark.parametrize(
    "metric, ours, held, words",
    [
        ("objective/scores", [0.0, 1.5], [], "It rose by 1.50 standard deviations"),
        ("objective/scores", [0.0, -0.5], [], "It fell, from 0 to \N{MINUS SIGN}0.500"),
        ("objective/gold", [1.6, 2.1, 0.1], [], "It ends at 0.100, 2.00 below its best"),
        ("objective/kl", [0.0, -0.3], [], "\N{MINUS SIGN}0.300 is below 0, as no KL can be"),
        ("objective/kl", [0.0, np.log(4.0)], [], "typically 4.00 times as likely"),
        ("objective/kl_coef", [0.2, 0.2], [], "Fixed: a nat costs 0.200"),
        ("objective/kl_coef", [0.0, 0.0], [], "nothing holds the policy"),
        ("policy/entropy_avg", [1.0, 0.05], [], "It collapsed, from 1.00 to 0.0500"),
        ("ppo/val/var_explained", [-0.1, 0.4], [], "It ends at 0.400: the advantages"),
        ("loss/sft", [5.0, 0.0], [2.0, 1.0, 1.5], "Held out it ends 0.500 above its lowest"),
        ("loss/sft", [5.0, 0.0], [], "0 nats are the doubt among 1.00 equally likely tokens"),
        ("loss/reward_model", [0.7, 0.2], [0.7, 0.69], "a judge that guesses"),
        ("response_length/mean", [20.0, 5.0], [], "It shrank from 20.0 to 5.00"),
        ("response_length/mean", [20.0, 5000.0], [], "It grew from 20.0 to 5,000"),
    ],
)
def test_a_sentence_follows_from_the_numbers(metric, ours, held, words):
    assert words in said(metric, ours, held)


def test_the_law_is_found_where_it_holds_and_its_top_only_where_it_was_seen():
    d = np.linspace(0.1, 2.0, 20)
    law = page.fitted(d, d * (0.9 - 0.4 * d))
    assert (law["alpha"], law["beta"], law["explained"]) == pytest.approx((0.9, 0.4, 1.0))
    assert law["peak"] == pytest.approx((0.9 / 0.8) ** 2)
    assert page.fitted(d, d * (0.9 - 0.1 * d))["peak"] is None
    assert page.fitted(d, d * (0.9 + 0.1 * d))["peak"] is None


# --- runs of other kinds


def text_of(capsys, *arguments):
    status, out, err = call(capsys, "report", *arguments)
    assert status == 0, err
    path = Path(out.partition("page: ")[2].partition(", ")[0])
    return Page(path.read_text(encoding="utf-8"))


def test_several_runs_are_laid_over_each_other(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = text_of(capsys, *runs)
    assert (tmp_path / "report.html").exists()
    (kl,) = both.lines("objective/kl")
    assert {name: tuple(xy) for name, xy in kl.items()} == {
        run.name: measured(run, "objective/kl") for run in runs
    }
    assert (
        "none leaves some in ppo at step 0: objective/kl_coef is 0.2 in some and 0.0" in both.said
    )
    assert "ppo.kl_coef 0.2 0.0 0.2" in both.said  # of each run, and the default
    ends = {run.name: json.loads((run / "result.json").read_text()) for run in runs}
    frontier = [figure["lines"] for figure in both.figures if figure["metric"] is None]
    for name, lines in zip(("proxy", "gold"), frontier, strict=True):
        *found, way = lines
        points = [(0.0, end["reference"][name]) for end in ends.values()]
        for line in found:
            end = ends[line["label"]]["policy"]
            points.append((max(end["kl_seq"], 0.0) ** 0.5, end[name]))
            assert (line["x"], line["y"]) == ([points[-1][0]], [end[name]])
        assert [*zip(way["x"], way["y"], strict=True)] == sorted(set(points))
    columns = [[end["policy"]["gold"]] for end in ends.values()]  # of no reference: two may differ
    assert f"gold reward (what is wanted) {columns[0][0]:.2f} {columns[1][0]:.2f}" in (
        both.said.replace("−", "-")
    )
    twins = text_of(capsys, runs[0], runs[0])
    assert "has logged the same as some" in twins.said


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["mon/run", "tue/run"], ["mon/run", "tue/run"]),
        (["mon/x/run", "tue/x/run", "/b"], ["mon/x/run", "tue/x/run", "/b"]),
        (["runs/a", "runs/../runs/a"], ["a", "a"]),
        (["/"], ["/"]),
        ([], []),
    ],
)
def test_runs_of_one_name_are_told_apart_by_the_folders_above(folders, names):
    assert page.short_names(folders) == names


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    assert "expected 1 to 5 run folders" in refusal(capsys, "report")
    assert "expected 1 to 5 run folders" in refusal(capsys, "report", *[runs[0]] * 6)
    assert "found none" in refusal(capsys, "report", tmp_path)
    assert "--out" in refusal(capsys, "report", runs[0], "--out", "")


@pytest.mark.parametrize("title, steps", [("supervised fine-tuning", 2), ("PPO", 2)])
def test_a_run_that_stopped_shows_what_it_has(tmp_path, capsys, title, steps):
    track = interrupted_after(title, steps)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(tmp_path / "run"), track=track)
    found = text_of(capsys, tmp_path / "run")
    assert "This run has not ended" in found.said and "minirlhf resume" in found.said
    if title == "PPO":
        assert found.lines("objective/kl")[0]["training"] == measured(
            tmp_path / "run", "objective/kl"
        )
        assert len(paid(found.text)) == 8
    else:
        assert "Not shown:" in found.said and not found.lines("objective/kl")
        assert len(found.lines("loss/sft")[0]["training"][0]) == steps


def test_dpo_has_its_own_curves(tmp_path, capsys):
    train(tiny_config(tmp_path / "run", stages="sft,dpo", dpo__epochs=1))
    found = text_of(capsys, tmp_path / "run")
    assert set(found.lines("rewards/chosen")[0]) == {"chosen", "rejected"}
    assert found.lines("rewards/chosen")[0]["rejected"] == measured(
        tmp_path / "run", "rewards/rejected"
    )
    assert not found.lines("objective/kl") and "kl_seq" in found.said and paid(found.text)


def test_where_there_is_nobody_to_ask_it_says_so(tmp_path, capsys):
    """Pairs of one's own are not read again, and DPO logs no replies; or there is no policy yet."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    train(tiny_config(tmp_path / "pairs", stages="sft,dpo", pairs=pairs, dpo__epochs=1))
    train(tiny_config(tmp_path / "sft", stages="sft"))
    for name in ("pairs", "sft"):
        assert "Not shown: replies: expected" in text_of(capsys, tmp_path / name).said


def test_a_reward_of_ones_own_has_its_units_and_no_gold(tmp_path, capsys, names):
    config = tiny_config(tmp_path / "run", corpus=names, reward=VOWELS, eval_every=0)
    train(config)
    found = text_of(capsys, tmp_path / "run")
    (reward,) = found.lines("objective/reward")
    assert reward["training"] == measured(tmp_path / "run", "objective/reward")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert reward["held out"] == ([3], [result["policy"]["reward"]])  # the final table alone
    assert not found.lines("objective/gold") and paid(found.text)


# --- what a page must not do


def test_texts_are_text_wherever_they_stand(tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    run = tmp_path / EVIL.replace("/", "|")
    train(tiny_config(run, pairs=pairs, snapshots=1, ppo__iterations=2))
    for name, key in (("samples.jsonl", "response"), ("snapshots.jsonl", "prompt")):
        rows = read_jsonl(run / name)
        content = "".join(json.dumps(row | {key: EVIL}) + "\n" for row in rows)
        (run / name).write_text(content, encoding="utf-8")
    rows = read_jsonl(run / "snapshots.jsonl")
    for row in rows:
        row["pieces"] = [EVIL] * len(row["pieces"])
    (run / "snapshots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = (run / "config.toml").read_text(encoding="utf-8")
    (run / "config.toml").write_text(config.replace("columns = []", 'columns = ["<b>=x"]'))
    for given in ([run], [run, run]):
        out = tmp_path / "page.html"
        found = Page(page.report(given, out=out).read_text(encoding="utf-8"))
        assert found.scripts == 1 and "alert(1)" in found.said  # as text
        assert "<script>alert" not in found.text and "<b>=x" not in found.text
        assert html.escape("<b>=x", quote=False) in found.text or given[1:]


@pytest.mark.parametrize("key, value", [("logp", [0.0]), ("top", 3), ("kl_seq", "x"), ("gold", {})])
def test_damaged_snapshots_are_named_and_hide_nothing_else(runs, tmp_path, key, value):
    run = shutil.copytree(runs[0], tmp_path / "run")
    rows = read_jsonl(run / "snapshots.jsonl")
    rows[5][key] = value
    (run / "snapshots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Page(page.report([run]).read_text(encoding="utf-8"))
    assert "Not shown:" in found.said and "snapshots.jsonl: expected" in found.said
    assert found.lines("objective/kl")


def test_a_page_is_small_and_complete_in_itself(shown):
    assert len(shown.text.encode()) < MOST_BYTES and shown.scripts == 1
    assert shown.references and all(to.startswith("#") for to in shown.references)
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp|import\(", shown.text)
    assert "prefers-color-scheme: dark" in shown.text and "@media print" in shown.text


class Found(NamedTuple):
    findings: list
    unseen: list


def test_findings_follow_the_replies_and_are_text(runs, monkeypatch):
    finding = SimpleNamespace(rule="r<b>", severity="warning", onset=7)
    finding.evidence, finding.cause, finding.knob = "<i>", "c", "k"
    found = Found([finding], ["a rule: without its metric"])
    monkeypatch.setattr(page, "diagnose", lambda folder: found)
    shown = Page(page.page([page.Recorded(runs[0], "some")]))
    assert "warning: r<b> , from step 7 on <i> c First: k" in shown.said
    assert "a rule: without its metric" in shown.said and "<i>" not in shown.text
    assert shown.text.index('id="replies"') < shown.text.index('id="findings"')


def test_a_long_run_makes_no_large_page(runs, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(runs[0] / "config.toml", run)
    rows, rng = metrics(runs[0], "ppo"), np.random.default_rng(0)
    with open(run / "metrics.jsonl", "w") as file:
        for step, noise in enumerate(rng.random(4000)):
            row = {**rows[step % 3], "step": step, "objective/kl": noise}
            file.write(json.dumps(row | {"objective/scores": 1 - noise}) + "\n")
    found = Page(page.report([run]).read_text(encoding="utf-8"))
    assert len(found.text.encode()) < 500_000
    x, y = found.lines("objective/kl")[0]["training"]
    assert (x[0], x[-1]) == (1, 4000) and set(y) < set(measured(run, "objective/kl")[1])


# --- the world that is known


@pytest.fixture(scope="module")
def known():
    """A smaller one, with a reference that has hardly learnt."""
    quick = replace(ground_truth.SFT, steps=20, batch_size=64)
    with pytest.MonkeyPatch.context() as patch:
        less = functools.partial(tiny.tiny_reference, settings=quick, n_demonstrations=500)
        patch.setattr(tiny, "tiny_reference", less)
        return known_world(iterations=1, max_tokens=3)


def tilted(data, beta):
    """Means under pi_ref(y) exp(r(y) / beta) / Z, reply by reply."""
    ref, reward, gold = (np.array(data[name]) for name in ("ref", "reward", "gold"))
    weight = np.exp(ref + reward / beta)
    p, J = weight / weight.sum(), beta * np.log(weight.sum())
    return {
        "kl_seq": (p @ reward - J) / beta,
        "proxy": p @ reward,
        "gold": p @ gold,
        "objective": J,
    }


def test_the_table_of_betas_is_the_tilt_of_what_is_embedded(known):
    assert [row["beta"] for row in known["optima"]] == list(BETAS)
    for row in known["optima"]:
        for name, x in tilted(known["data"], row["beta"]).items():
            assert row[name] == pytest.approx(x, rel=1e-3, abs=1e-4), (row["beta"], name)
    assert len(known["data"]["gold"]) == 7**3 + 7**2 + 7 + 1 <= 20_000


def test_what_is_lost_by_token_is_beta_times_reach_times_kl(known):
    """At the first token, reached with probability 1, in sums over the replies."""
    data, rows = known["data"], known["replies"]["best by gold"]
    first = np.array(data["token"])[-len(data["gold"]) :]
    parent, token = np.array(data["parent"]), np.array(data["token"])
    node = np.arange(len(parent) - len(first), len(parent))
    while (parent[node] > 0).any():
        node = np.where(parent[node] > 0, parent[node], node)
    first = token[node]
    reward, logs = np.array(data["reward"]), {n: np.array(data[n]) for n in ("ref", "policy")}
    beta = data["kl_coef"]
    masses = {name: np.exp(of) for name, of in logs.items()}
    masses["best"] = masses["ref"] * np.exp(reward / beta)
    by = {name: np.bincount(first, of) / of.sum() for name, of in masses.items()}
    lost = beta * (by["policy"] * np.log(by["policy"] / by["best"])).sum()
    value = masses["policy"] @ (reward - beta * (logs["policy"] - logs["ref"]))
    assert rows[0]["lost"] == pytest.approx(lost, rel=1e-2, abs=1e-5)
    assert rows[0]["value"] == pytest.approx(value, abs=1e-3)
    assert rows[0]["best"] == pytest.approx(beta * np.log(masses["best"].sum()), abs=1e-3)
    a = data["tokens"].index(rows[0]["token"])
    assert rows[0]["d"] == pytest.approx(np.log(by["best"][a] / by["ref"][a]), abs=1e-3)


# --- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")
QUIET += ("disable-background-networking", "disable-component-update", "virtual-time-budget=4000")
SPY = """<script>
const errors = [], all = query => [...document.querySelectorAll(query)];
addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => setTimeout(() => {
  const start = all(".priced td").map(at => at.textContent);
  for (const [query, value] of [[".beta input", -6], [".moment input", 1]])
    for (const slider of all(query)) {
      slider.value = value;
      slider.dispatchEvent(new Event("input"));
    }
  for (const svg of all("figure[data-metric] .chart"))
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: 200 }));
  const seen = { errors, start, wide: document.documentElement.scrollWidth, window: innerWidth };
  seen.now = Object.fromEntries(all("[data-now]").map(at => [at.dataset.now, at.textContent]));
  seen.hidden = all("[data-label]").map(at => getComputedStyle(at).display === "none");
  seen.pointed = all("figure[data-metric] .keys data").map(at => at.textContent);
  const shown = top.document.body.appendChild(top.document.createElement("pre"));
  shown.id = "seen";
  shown.textContent = JSON.stringify(seen);
}, 100));
</script>"""


def in_browser(text, folder, *, width=1400):
    """(what the page is like in headless Chromium, which addresses it has asked for).

    In a frame: no window is less than 500 pixels wide.
    """
    inside = html.escape(text.replace("<head>", "<head>" + SPY, 1))
    frame = f'<iframe srcdoc="{inside}" style="border: 0; width: {width}px; height: 900px">'
    outside = f'<!doctype html><meta charset="utf-8">{frame}</iframe>'
    (folder / "page.html").write_text(outside, encoding="utf-8")
    flags = [f"--{flag}" for flag in QUIET]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1600,1000", "--dump-dom"]
    address = (folder / "page.html").as_uri()
    done = subprocess.run([CHROMIUM, *flags, address], capture_output=True, timeout=120)
    dom = done.stdout.decode()
    seen = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    events = json.loads((folder / "net.json").read_text())["events"]
    asked = {  # by the page: the browser has errands of its own
        event["params"]["url"]
        for event in events
        if "file://" in event.get("params", {}).get("network_isolation_key", "")
    }
    return json.loads(html.unescape(seen[1])), asked - {address}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser_it_fits_asks_for_nothing_and_makes_no_error(runs, tmp_path, known, width):
    text = page.page([page.Recorded(runs[0], "some")]).replace("</main>", "")
    seen, asked = in_browser(text, tmp_path, width=width)
    assert seen["errors"] == [] and asked == set()
    assert seen["wide"] <= seen["window"] == width
    assert seen["hidden"] == [False, False, True] * 4  # the slider stands at the second moment


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_optimum_of_the_slider_is_the_exact_one(runs, tmp_path, known, monkeypatch):
    monkeypatch.setattr(page, "known_world", lambda: known)
    seen, asked = in_browser(page.page([], exact=True), tmp_path, width=400)
    assert seen["errors"] == [] and asked == set() and seen["wide"] <= 400
    beta = float(f"{0.5 * 10 ** (-6 / 20):.3g}")
    for name, x in tilted(known["data"], beta).items():
        assert read(seen["now"][name]) == pytest.approx(x, rel=6e-3), name
    rows = [row for some in known["replies"].values() for row in some]
    cells = iter(seen["start"])  # computed there, at the beta of the table
    for row in rows:
        assert next(cells) == row["token"]
        for name, unit in (("d", 1), ("best", 1), ("value", 1), ("q", 1), ("lost", 1000)):
            x = unit * row[name]
            assert read(next(cells)) == pytest.approx(x, rel=1e-2, abs=0.02), (row, name)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_planted_error_and_a_planted_request_are_seen(tmp_path):
    planted = '<!doctype html><html><head></head><body><img src="http://planted.invalid/x.png"><script>x()</script>'
    seen, asked = in_browser(planted + '<p style="width: 999px">wide', tmp_path, width=400)
    assert len(seen["errors"]) == 1 and asked == {"http://planted.invalid/x.png"}
    assert seen["wide"] > seen["window"]
