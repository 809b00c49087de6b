"""What a case's arm is paid, beside what the desk says of the policy."""

import pytest

import study


def test_rows_hold_what_the_arm_is_paid(monkeypatch, tmp_path):
    argv = ["a_case.py", "--fast", "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    case = study.Case("a_case", "A question?")
    runs = case.train(
        lambda desk, seed: {"proxy": study.Arm(), "gold": study.Arm(reward=desk.gold)},
        measure_every=2,
    )
    for name, (run,) in runs.items():
        assert len(run.rows) == 3
        for row in run.rows:
            assert row["paid"] == pytest.approx(row[name], abs=1e-12)
