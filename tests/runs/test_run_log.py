"""The run log: one JSON object a line, finite, readable after a crash."""

import errno
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.errors import InputError
from minirlhf.runs.log import RunLog, read_jsonl, read_metrics


def test_metrics_and_samples_come_back(tmp_path):
    log = RunLog(tmp_path / "run")
    log.metrics(1, "ppo", {"objective/kl": 0.5, "note": "é", "n": 3})
    log.samples(1, [{"prompt": "hé\n\u2028", "ids": np.array([1, 2])}, {"prompt": "\ud800"}])
    log.metrics(2, "ppo", {"objective/kl": np.float32(0.25), "on": True, "none": None})
    assert read_jsonl(tmp_path / "run/metrics.jsonl") == [
        {"step": 1, "stage": "ppo", "objective/kl": 0.5, "note": "é", "n": 3},
        {"step": 2, "stage": "ppo", "objective/kl": 0.25, "on": True, "none": None},
    ]
    assert read_jsonl(tmp_path / "run/samples.jsonl") == [
        {"step": 1, "prompt": "hé\n\u2028", "ids": [1, 2]},
        {"step": 1, "prompt": "\ud800"},
    ]


@given(st.floats() | st.floats(width=32).map(np.float32) | st.floats().map(np.array))
def test_numbers_are_finite_or_null(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("log")
    RunLog(folder).metrics(0, "sft", {"loss": value})
    line = json.loads((folder / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] == (float(value) if math.isfinite(value) else None)


def test_each_line_is_in_the_file_at_once(tmp_path):
    log = RunLog(tmp_path)
    for step in range(3):
        log.metrics(step, "sft", {})
        assert len(read_jsonl(tmp_path / "metrics.jsonl")) == step + 1


def test_wrong_values_are_refused_and_leave_no_trace(tmp_path):
    log = RunLog(tmp_path)
    with pytest.raises(TypeError, match="object"):
        log.metrics(0, "sft", {"loss": object()})
    with pytest.raises(TypeError, match="object"):
        log.samples(0, [{"prompt": "a"}, {"prompt": object()}])
    assert read_jsonl(log.metrics_path) == read_jsonl(log.samples_path) == []


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_torn_last_line_is_dropped_and_cut_off_on_resume(tmp_path, cut):
    log = RunLog(tmp_path)
    log.metrics(1, "ppo", {"a": "é"})
    log.metrics(2, "ppo", {"a": "é"})
    data = log.metrics_path.read_bytes()
    log.metrics_path.write_bytes(data[:-cut])
    steps = [1, 2] if cut == 1 else [1]  # only the newline is missing: the line is whole
    assert [line["step"] for line in read_jsonl(log.metrics_path)] == steps
    RunLog(tmp_path).metrics(3, "ppo", {})
    assert [line["step"] for line in read_jsonl(log.metrics_path)] == [*steps, 3]


@pytest.mark.parametrize("bad", [b"{", b"[1]", b'{"a": NaN}', b"\xff"])
def test_a_bad_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: expected"):
        read_jsonl(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="found none"):
        read_jsonl(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="got a folder"):
        read_jsonl(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected a place to write to"):
        RunLog(tmp_path / "file")


def test_what_a_position_counts_is_on_the_disk(tmp_path, monkeypatch):
    """Else a power cut could leave a checkpoint that is ahead of its log."""
    log, synced, original = RunLog(tmp_path), {}, os.fsync

    def fsync(handle):
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    log.metrics(1, "ppo", {})
    log.samples(1, [{"prompt": "a"}])
    position = log.position()
    for path in (log.metrics_path, log.samples_path):
        assert synced[path.stat().st_ino] == position[path.name] == path.stat().st_size > 0


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    log.metrics(1, "ppo", {})
    log.samples(1, [{"prompt": "a"}])
    position = json.loads(json.dumps(log.position()))
    log.metrics(2, "ppo", {})
    log.samples(2, [{"prompt": "a"}])
    RunLog(tmp_path).rewind(position, "ppo", 1)
    assert [line["step"] for line in read_jsonl(log.metrics_path)] == [1]
    assert [line["step"] for line in read_jsonl(log.samples_path)] == [1]
    log.metrics_path.write_bytes(b"")
    with pytest.raises(InputError, match="got 0"):
        log.rewind(position, "ppo", 1)


@pytest.mark.parametrize(
    "position, stage, step",
    [
        ({}, "ppo", 1),
        ({"metrics.jsonl": 0, "samples.jsonl": 0}, "ppo", 1),
        ({"metrics.jsonl": -1}, "ppo", 1),
        ({"metrics.jsonl": "26"}, "ppo", 1),
        ({"metrics.jsonl": 10**9}, "ppo", 1),
        ({"metrics.jsonl": 20}, "ppo", 1),  # in the middle of a line
        ({"samples.jsonl": 0}, "ppo", 1),
        ({}, "ppo", 0),  # the last line is of another step,
        ({}, "sft", 1),  # another stage
        ({"samples.jsonl": 0}, "sft", 1),
    ],
)
def test_a_position_that_was_never_a_checkpoints_is_refused(tmp_path, position, stage, step):
    log = RunLog(tmp_path)
    log.metrics(1, "ppo", {})
    log.samples(1, [{"prompt": "a"}])
    true = log.position() if position or (stage, step) != ("ppo", 1) else {}
    before = log.metrics_path.read_bytes(), log.samples_path.read_bytes()
    with pytest.raises(InputError, match="as at the last checkpoint"):
        log.rewind(true | position, stage, step)
    assert before == (log.metrics_path.read_bytes(), log.samples_path.read_bytes())


@pytest.mark.parametrize("line", [b'{"x": 1}', b'{"step": "1", "stage": "ppo"}', b'{"step": 1}'])
def test_a_line_without_its_step_or_stage_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "stage": "sft"}\n' + line + b"\n")
    for read in (read_metrics, RunLog):
        with pytest.raises(InputError, match=r"metrics.jsonl:2: expected a line with its st"):
            read(tmp_path)


@pytest.mark.parametrize("call", ["write", "fsync", "truncate"])
def test_a_disk_that_refuses_is_one_sentence(tmp_path, monkeypatch, call):
    log = RunLog(tmp_path)
    log.metrics(1, "ppo", {})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "write":
        log.metrics_path.unlink()
        log.metrics_path.symlink_to("/dev/full")
    else:
        monkeypatch.setattr(os, call, full)
    acts = {"write": lambda: log.metrics(2, "ppo", {}), "fsync": log.position}
    acts["truncate"] = lambda: log.restart("ppo")
    with pytest.raises(
        InputError, match=r"metrics.jsonl: expected a place to write to; got No space left"
    ):
        acts[call]()


def test_who_watches_sees_each_line_after_it_has_been_written(tmp_path):
    seen = []

    def watch(step, stage, values):
        seen.append((step, stage, values))
        assert read_metrics(tmp_path)[-1] == {"step": step, "stage": stage, **values}

    log = RunLog(tmp_path, watch)
    log.metrics(0, "sft", {"loss/sft": 2.0})
    log.metrics(1, "sft", {"loss/sft": 1.0})
    assert seen == [(0, "sft", {"loss/sft": 2.0}), (1, "sft", {"loss/sft": 1.0})]
