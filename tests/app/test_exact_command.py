"""`minirlhf exact`: its tables, its files, its exit status."""

import io
import json

import pytest
from rich.console import Console
from tiny_run import call, refusal

from minirlhf.app import exact
from minirlhf.app.exact import PICTURES, TABLES, check_claims, exact_command
from minirlhf.exact.expected import kl_gradient_table


def shown(results):
    console = Console(width=120, record=True, file=io.StringIO())
    for part, rows in results.items():
        console.print(*TABLES[part](rows))
    return console.export_text()


def test_without_training_it_takes_seconds(tmp_path, capsys):
    out = tmp_path / "run"
    status, printed, _ = call(capsys, "exact", "--parts", "kl", "--out", out)
    assert status == 0
    for text in ("k1 as loss (as printed)", "cosine", "FAILS", "holds:"):
        assert (text in printed) == (text != "FAILS"), text
    results = json.loads((out / "exact.json").read_text())
    assert set(results) == {"kl"}
    rows = kl_gradient_table()
    assert [row["name"] for row in results["kl"]] == [row["name"] for row in rows]
    assert [row["error"] for row in results["kl"]] == pytest.approx(
        [row["error"] for row in rows], abs=1e-9
    )
    assert {path.name for path in out.iterdir()} == {"exact.json", "kl.png"}


def test_training_is_measured_and_drawn(everything):
    out, results = everything
    assert {path.name for path in out.iterdir()} == {"exact.json", "kl.png", "optimum.png"}
    runs = results["optimum"]
    assert len(runs) == 9
    for run in runs:
        assert [row["iteration"] for row in run["history"]] == [0, 1]
        assert run["history"][-1]["exact/reward"] <= run["frontier"] + 1e-8
        assert run["seconds"] > 0
    text = shown(results)
    for words in ("PPO, linear decay", "one-step RLOO", "token", "k2 as loss, sequence"):
        assert words in text, words
    assert all(check_claims(results).values())


@pytest.mark.parametrize(
    ("plant", "claim"),
    [
        (lambda r: r["kl"][0].update(error=1e-7), "right placements"),
        (lambda r: r["kl"][1].update(error=1e-3), "wrong placements"),
        (lambda r: r["optimum"][3].update(frontier=-9.0), "frontier"),
        (lambda r: r["optimum"][0]["history"][-1].update({"exact/fraction": 0.5}), "by depth"),
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


def test_several_seeds_give_means_and_the_least(everything, tmp_path):
    results = json.loads(json.dumps(everything[1]))
    again = json.loads(json.dumps(results["optimum"]))
    for run in again:
        run["seed"] = 1
        run["history"][-1]["exact/fraction"] += 0.5
    runs = results["optimum"] + again
    results["optimum"] = runs
    text = shown(results)
    first = runs[0]["history"][-1]["exact/fraction"]
    assert "2 seeds, 1 iterations" in text
    of_two = (first + 0.25, 0.5 / 2**0.5, first)  # mean, sd and least of two .5 apart
    assert all(f"{share:.4f}" in text for share in of_two)
    for part, rows in results.items():
        assert PICTURES[part](rows, tmp_path / "a.png").stat().st_size > 5_000


def test_a_folder_with_results_is_not_written_over(everything, capsys):
    out, _ = everything
    before = (out / "exact.json").read_bytes()
    assert "expected a new folder" in refusal(capsys, "exact", "--parts", "kl", "--out", out)
    assert (out / "exact.json").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "expected a place to write to" in refusal(
        capsys, "exact", "--out", tmp_path / "file" / "below"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seeds", "-1"), "none below 0"),
        (("--iterations", "0"), "iterations >= 1"),
        (("--processes", "0"), "processes >= 1"),
        (("--parts", "flatness"), "'kl', 'optimum'"),
    ],
)
def test_options_out_of_range_are_refused(capsys, flags, message):
    assert message in refusal(capsys, "exact", *flags)
