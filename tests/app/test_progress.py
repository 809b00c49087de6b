"""The key figures of a stage: under the bar on a terminal, in the line elsewhere."""

import io
import math
import os
import re
import select
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from tiny_run import as_flags, tiny_config, train

from minirlhf.app import progress
from minirlhf.app.progress import sparkline

PPO = {
    "objective/scores": 0.5,
    "objective/kl": 2.25,
    "objective/gold": -1.0,
    "policy/entropy_avg": 1.5,
    "response_length/mean": 23.0,
    "objective/kl_coef": 0.2,
    "loss/policy": 9.0,
}


def shown(width, values=None, *, steps=3, encoding="utf-8"):
    """The lines under the bar after so many steps."""
    for _ in progress.track(range(steps), "PPO"):
        progress.watch(0, "ppo", PPO if values is None else values)
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(force_terminal=True, file=file, width=width, color_system=None)
    console.print(progress.figures(console))
    file.flush()
    return [line.rstrip() for line in file.buffer.getvalue().decode(encoding).splitlines()]


# --- a history in a few characters


def test_a_sparkline_goes_from_the_lowest_to_the_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([-3.0, 5.0, 1.0]) == "▁█▅"
    assert sparkline([2.0] * 3) == "▁▁▁" and sparkline([0.0]) == "▁" and sparkline([]) == ""


def test_a_long_history_is_shown_by_means():
    assert sparkline(range(1600)) == "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██"
    assert sparkline([0, 8] * 16) == "▁" * 16
    assert sparkline([0.2] * 1001) == "▁" * 16  # the means differ by rounding


def test_what_is_not_finite_has_no_height():
    assert sparkline([0, math.nan, math.inf, 1]) == "▁█"
    assert sparkline([math.nan]) == ""


# --- under the bar


def test_two_figures_a_line_in_80_columns_and_one_in_40():
    lines = shown(80)
    assert [line.split() for line in lines] == [
        ["score", "0.5", "▁▁▁", "kl_seq", "2.25", "▁▁▁"],
        ["gold", "-1", "▁▁▁", "entropy", "1.5", "▁▁▁"],
        ["length", "23", "▁▁▁", "beta", "0.2", "▁▁▁"],
    ]
    narrow = shown(40)
    assert [line.split()[0] for line in narrow] == "score kl_seq gold entropy length beta".split()
    assert max(map(len, lines)) < 80 and max(map(len, narrow)) < 40


def test_each_stage_has_its_figures():
    row = {"loss/sft": 2.5, "heldout/loss_sft": 2.75, "lr": 0.1}
    assert [line.split() for line in shown(40, row, steps=1)] == [
        ["loss", "2.5", "▁"],
        ["held", "out", "2.75", "▁"],
    ]
    row = {"loss/reward_model": math.nan, "accuracy": 0.75, "heldout/loss_reward_model": 0.5}
    assert [line.split()[:2] for line in shown(40, row)][0] == ["loss", "nan"]
    assert shown(40, {"objective/reward": 3.0})[0].split()[0] == "reward"
    assert shown(40, {}) == []  # nothing is watched, as by judge, and nothing is left of before


def test_where_blocks_cannot_be_written_there_are_plain_characters():
    assert shown(40, {"accuracy": 1.0}, encoding="ascii")[0].split() == ["accuracy", "1", "___"]


def test_the_figures_are_in_the_line_elsewhere(capsys):
    for _ in progress.track(range(3), "PPO"):
        progress.watch(0, "ppo", PPO)
    (line,) = capsys.readouterr().err.splitlines()
    figures = "score 0.5, kl_seq 2.25, gold -1"
    assert re.fullmatch(rf"PPO: 3/3, [\d.]+/s, {figures}, \d+ s spent, 0 s left", line)


def test_what_a_run_logs_is_what_is_shown(tmp_path):
    """By the names of its log: each stage has three figures at least."""
    found = {}

    def watch(step, stage, values):
        labels = {progress.FIGURES[name] for name in values if name in progress.FIGURES}
        found.setdefault(stage, set()).update(labels)

    train(tiny_config(tmp_path / "run"), watch=watch)
    assert found["sft"] == {"loss"}  # the support world holds no demonstrations out
    assert found["reward_model"] == {"loss", "held out", "accuracy"}
    assert found["ppo"] == {"score", "kl_seq", "gold", "entropy", "length", "beta"}


def test_slow_steps_say_how_long_each_takes(capsys, monkeypatch):
    times = iter((0.0, 42.0, 84.0))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    list(progress.track(range(2), "runs"))
    assert "runs: 2/2, 42 s each, 84 s spent" in capsys.readouterr().err


# --- on a terminal


def on_terminal(columns, arguments, interrupt_at):
    """(exit status, all that `minirlhf` writes to a terminal); SIGINT once that text is there."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    looks = {"TERM": "xterm-256color", "COLUMNS": str(columns), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "minirlhf", *arguments]
    how: dict = dict.fromkeys(("stdin", "stdout", "stderr"), theirs) | {"env": os.environ | looks}
    # tests that run in the background ignore Ctrl-C, and so would their children
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    written = b""
    with subprocess.Popen(command, **how) as process:
        os.close(theirs)
        while select.select([ours], [], [], 60)[0]:
            try:
                written += os.read(ours, 1 << 16)
            except OSError:  # it has ended
                break
            if interrupt_at and re.search(interrupt_at, written.decode(errors="ignore")):
                process.send_signal(signal.SIGINT)
                interrupt_at = ""
        else:
            process.kill()
    os.close(ours)
    return process.returncode, written.decode()


def test_a_run_on_a_terminal_shows_them_and_ctrl_c_leaves_it_as_it_was(tmp_path):
    config = tiny_config(tmp_path / "run", ppo__iterations=3000, eval_every=0)
    status, text = on_terminal(80, ["train", *as_flags(config)], r"kl_seq +\S+ [▁-█]")
    assert status == 130
    assert re.search(r"score +\S+ [▁-█]+ +kl_seq +\S+ [▁-█]", text)
    assert re.search(r"reward model .*4/4", text) and re.search(r"held out +\S+ [▁-█]", text)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 3  # the cursor is shown again
    *_, last = text.rstrip().split("\r\n")
    assert "minirlhf: interrupted; in stage ppo:" in text[text.rindex("\x1b[?25h") :]
    assert last.endswith("goes on")
