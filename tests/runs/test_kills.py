"""Killed by SIGKILL anywhere, a run that is resumed ends in the same bytes.

A few are killed, or MINIRLHF_KILLS=100 of them; `pytest -s` shows what was hit.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_run import STAGES, as_flags, differences, files_under, metrics, outcome, tiny_config

from minirlhf.app.cli import main
from minirlhf.runs import pipeline
from minirlhf.runs.checkpoint import load_state
from minirlhf.train import batches

WHOM = ("parent", "worker", "group")
SECONDS = 60  # in which a run ends, or hangs


def start(folder: Path, *arguments) -> int:
    """`minirlhf ARGUMENTS` in a forked process: its number. What it says is in FOLDER.log."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.setsid()
        sys.stdout = sys.stderr = open(f"{folder}.log", "a", encoding="utf-8")
        # a checkpoint at every step of every stage, and work for two workers in every batch
        pipeline.CHECKPOINT_SECONDS, pipeline.CHECKPOINT_SHARE = 0.0, float("inf")
        batches.MICRO_BATCH_TOKENS, batches.MICRO_BATCH_FLOATS = 16, 0
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def end_of(pid: int) -> int:
    """The exit status of a process, negative where a signal ended it."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    raise AssertionError(f"process {pid}: expected its end within {SECONDS} s; it hangs")


def workers_of(pid: int) -> list[int]:
    with suppress(OSError):
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    return []


def kill(pid: int, whom: str, draw: random.Random) -> str:
    """Whom it hit: without a worker the parent."""
    workers = workers_of(pid)
    with suppress(ProcessLookupError):
        if whom == "group":
            os.killpg(pid, signal.SIGKILL)
        elif whom == "worker" and workers:
            os.kill(draw.choice(workers), signal.SIGKILL)
            return whom
        else:
            os.kill(pid, signal.SIGKILL)
            whom = "parent"
    return whom


def lines_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def all_of(folder: Path) -> dict:
    """Everything but times: what was made, the names of all files, settings, state, encoding."""
    _, meta = load_state(folder / "checkpoint")
    meta.pop("log")  # sizes of files that hold times
    lines = (folder / "config.toml").read_text().splitlines()
    settings = [line for line in lines if not line.startswith("out = ")]
    return {**outcome(folder), "meta": meta, "files": sorted(files_under(folder))} | {
        "config.toml": settings,
        "world.json": json.loads((folder / "world.json").read_text()),
    }


class Campaign:
    """One run that nobody disturbed, and the same one killed again and again."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw, self.hit = folder, random.Random(seed), Counter()
        self.flags = as_flags(
            tiny_config(
                folder / "whole",
                workers=2,
                checkpoint_every=2,
                sft__steps=20,
                reward_model__epochs=6,
                ppo__iterations=6,
                ppo__kl_target=0.05,
                ppo__kl_horizon=100.0,
            )
        )
        assert end_of(start(folder / "whole", "train", *self.flags)) == 0
        self.whole = all_of(folder / "whole")
        stages = [row["stage"] for row in metrics(folder / "whole")]
        self.starts = {stage: stages.index(stage) for stage in dict.fromkeys(stages)}
        self.starts["end"] = len(stages)

    def strike(self, run: Path, command: list, whom: str, stage: str) -> None:
        """Run the command and kill it somewhere in the stage, or let it end before."""
        end = self.starts[{"sft": "reward_model", "reward_model": "ppo", "ppo": "end"}[stage]]
        lines = self.draw.randrange(self.starts[stage], end)
        pid = start(run, *command)
        while lines_of(run) < lines and not os.waitid(
            os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.001)
        time.sleep(self.draw.uniform(0, 0.02))
        hit = kill(pid, whom, self.draw)
        status = end_of(pid)
        # without a worker it says how to go on; or it had ended before
        allowed = (0, 2) if hit == "worker" else (0, -signal.SIGKILL)
        assert status in allowed, (hit, stage, status, Path(f"{run}.log").read_text()[-2000:])
        self.hit["ended before" if status == 0 else f"{hit} in {stage}"] += 1

    def next_command(self, run: Path) -> list:
        opened = (run / "config.toml").exists()
        return ["resume", run] if opened else ["train", *self.flags, "--out", run]

    def one_run(self, name: str, stages: list[str]) -> None:
        """A run, killed in these stages, resumed to its end."""
        run = self.folder / name
        for whom, stage in zip(self.draw.sample(WHOM, 3), stages, strict=True):
            self.strike(run, self.next_command(run), whom, stage)
        said = Path(f"{run}.log")
        assert end_of(start(run, *self.next_command(run))) == 0, said.read_text()[-2000:]
        assert "Traceback" not in said.read_text()
        assert differences(self.whole, all_of(run)) == [], name


@pytest.mark.skipif(sys.platform != "linux", reason="forked workers are Linux's")
def test_a_run_that_is_killed_ends_in_the_same_bytes(tmp_path):
    kills, seed = int(os.environ.get("MINIRLHF_KILLS", 6)), random.randrange(10**6)
    campaign, runs = Campaign(tmp_path, seed), 0
    while campaign.hit.total() < kills:
        stages = list(STAGES)
        if runs % 2:  # perhaps one of them twice
            stages = sorted(campaign.draw.choices(STAGES, k=3), key=STAGES.index)
        campaign.one_run(f"run{runs}", stages)
        runs += 1
    print(f"seed {seed}: {campaign.hit.total()} kills of {runs} runs: {dict(campaign.hit)}")
