"""`minirlhf exact`: its tables, its files, its exit status."""

import io
import json

import pytest
from rich.console import Console
from tiny_run import call, refusal

from minirlhf.app import exact
from minirlhf.app.exact import check_claims, draw_pictures, exact_command, show_tables
from minirlhf.exact.experiments import kl_gradient_table

ANALYTIC = ("kl", "gae", "surrogate", "flatness")


def shown(results):
    console = Console(width=120, record=True, file=io.StringIO())
    show_tables(results, console)
    return console.export_text()


def test_without_training_it_takes_seconds(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ("--parts", *ANALYTIC, "--processes", "1", "--out", out)
    status, printed, _ = call(capsys, "exact", *flags)
    assert status == 0
    for text in ("k1 as loss (as printed)", "lambda", "cosine", "FAILS", "holds:"):
        assert (text in printed) == (text != "FAILS"), text
    results = json.loads((out / "exact.json").read_text())
    assert set(results) == {*ANALYTIC, "runs"} and results["runs"] == []
    rows = kl_gradient_table()
    assert [row["name"] for row in results["kl"]] == [row["name"] for row in rows]
    assert [row["error"] for row in results["kl"]] == pytest.approx(
        [row["error"] for row in rows], abs=1e-9
    )
    names = {path.name for path in out.iterdir()}
    assert names == {"exact.json", "kl.png", "advantages.png", "flatness.png"}


def test_training_is_measured_and_drawn(everything):
    out, results = everything
    assert {path.name for path in out.iterdir()} == {
        *("exact.json", "kl.png", "optimum.png", "overoptimisation.png")
    }
    runs = results["runs"]
    assert len(runs) == 9 + 2
    for run in runs:
        iterations = [row["iteration"] for row in run["history"]]
        assert iterations == ([0, 1] if run["part"] == "optimum" else [*range(0, 61, 10)])
        assert run["history"][-1]["exact/reward"] <= run["frontier"] + 1e-8
        assert run["seconds"] > 0
    text = shown(results)
    for words in ("PPO, linear decay", "one-step RLOO", "token", "best of 16384", "PPO, beta 0.1"):
        assert words in text, words
    assert all(check_claims(results).values())


@pytest.mark.parametrize(
    ("plant", "claim"),
    [
        (lambda r: r["kl"][0].update(error=1e-7), "right placements"),
        (lambda r: r["kl"][1].update(error=1e-3), "wrong placements"),
        (lambda r: r["runs"][3].update(frontier=-9.0), "frontier"),
        (lambda r: r["runs"][0]["history"][-1].update({"exact/fraction": 0.5}), "by depth"),
    ],
)
def test_a_claim_that_fails_is_seen(everything, plant, claim):
    results = json.loads(json.dumps(everything[1]))
    plant(results)
    failed = [name for name, holds in check_claims(results).items() if not holds]
    assert len(failed) == 1 and claim in failed[0]


def test_a_failed_claim_is_the_exit_status(everything, tmp_path, monkeypatch, capsys):
    results = json.loads(json.dumps(everything[1]))
    results["kl"][0]["error"] = 0.5
    monkeypatch.setattr(exact, "run_experiments", lambda *parts, **options: results)
    assert exact_command(out=tmp_path / "x") == 1
    assert "FAILS: 11 right placements" in capsys.readouterr().out


def test_a_kl_that_rounding_left_below_zero_is_drawn(everything, tmp_path):
    """Its root would be a complex number: best-of-1 is the reference, so its KL is 0."""
    results = json.loads(json.dumps(everything[1]))
    results["overoptimisation"][0]["best_of_n"][0]["kl_seq"] = -1e-16
    exact.of_part(results["runs"], "overoptimisation")[0]["history"][-1]["exact/kl_seq"] = -1e-16
    assert all(path.stat().st_size > 5_000 for path in draw_pictures(results, tmp_path))


def test_several_seeds_give_means_and_the_least(everything, tmp_path):
    results = json.loads(json.dumps(everything[1]))
    again = json.loads(json.dumps(results["runs"]))
    for run in again:
        run["seed"] = 1
        run["history"][-1]["exact/fraction"] += 0.5
    runs = results["runs"] + again
    table = exact.runs_table(exact.of_part(runs, "optimum"), "title")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    first = runs[0]["history"][-1]["exact/fraction"]
    assert "2 seeds, 1 iterations" in text
    assert all(f"{share:.4f}" in text for share in (first + 0.25, 0.25, first))
    results["runs"] = runs
    assert all(path.stat().st_size > 5_000 for path in draw_pictures(results, tmp_path))


def test_a_folder_with_results_is_not_written_over(everything, capsys):
    out, _ = everything
    before = (out / "exact.json").read_bytes()
    assert "expected a new folder" in refusal(capsys, "exact", "--parts", "flatness", "--out", out)
    assert (out / "exact.json").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "expected a folder to write to" in refusal(
        capsys, "exact", "--out", tmp_path / "file" / "below"
    )


@pytest.mark.parametrize("part", ["gae", "surrogate"])
def test_one_part_alone(part, tmp_path, capsys):
    status, printed, _ = call(capsys, "exact", "--parts", part, "--out", tmp_path / "run")
    assert status == 0 and "advantages.png" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seeds", "-1"), "none below 0"),
        (("--iterations", "0"), "iterations >= 1"),
        (("--processes", "0"), "processes >= 1"),
    ],
)
def test_options_out_of_range_are_refused(capsys, flags, message):
    assert message in refusal(capsys, "exact", *flags)
