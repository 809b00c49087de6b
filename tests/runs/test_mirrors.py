"""`--log`: the mirrors of metrics.jsonl, read by those who made the formats."""

import csv
import json
import math
import sys

import numpy as np
import pytest
from tiny_run import STAGES, interrupted_after, resume, tiny_config, train

from minirlhf.app.logs import read_log
from minirlhf.errors import InputError
from minirlhf.runs import log as run_log
from minirlhf.runs import session as session_module
from minirlhf.runs.log import RunLog, read_metrics

KINDS = ("csv", "tensorboard")


def mirror_of(folder, kind):
    """Where it lies."""
    return folder / {"csv": "metrics.csv", "tensorboard": "tensorboard"}[kind]


def rows_of(folder, kind):
    """(stage, step) -> the mirror's numbers without times; what is no number is left out."""
    rows = {}
    if kind == "csv":
        with open(folder / "metrics.csv", newline="") as file:
            for row in csv.DictReader(file):
                key = row.pop("stage"), int(row.pop("step"))
                assert key not in rows
                rows[key] = {name: float(cell) for name, cell in row.items() if cell}
    else:
        for stage in (folder / "tensorboard").iterdir():
            for name, step, value in scalars(stage):
                row = rows.setdefault((stage.name, step), {})
                assert name not in row
                row |= {name: value} if math.isfinite(value) else {}
    return {k: {n: x for n, x in row.items() if n != "time/iteration"} for k, row in rows.items()}


def scalars(folder):
    """(tag, step, value) of event files, read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    for tag in events.Tags()["tensors"]:
        assert events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
        for event in events.Tensors(tag):
            yield tag, event.step, make_ndarray(event.tensor_proto).item()


def logged(folder, kind):
    """The same from metrics.jsonl; event files hold float32."""
    digits = np.float32 if kind == "tensorboard" else float
    return {
        (row["stage"], row["step"]): {
            name: float(digits(value))
            for name, value in row.items()
            if name not in ("stage", "step", "time/iteration") and value is not None
        }
        for row in read_metrics(folder)
    }


def small(folder, kind):
    return tiny_config(folder, log=kind, checkpoint_every=2, ppo__iterations=4)


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """(kind, folder) of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(small(folder, request.param))
    return request.param, folder


def test_it_has_the_numbers_of_the_log(whole):
    kind, folder = whole
    rows = rows_of(folder, kind)
    assert rows == logged(folder, kind) and {stage for stage, _ in rows} == set(STAGES)
    assert "eval/gold" in rows["ppo", 1] and "eval/gold" not in rows["ppo", 2]
    other = mirror_of(folder, next(other for other in KINDS if other != kind))
    assert not other.exists()


def test_a_spreadsheet_has_a_column_a_name_in_their_order(tmp_path):
    log = RunLog(tmp_path)
    with run_log.mirrored(log, "csv"):
        log.metrics(0, "sft", {"loss/sft": 2.0, "lr": None})
        first = (tmp_path / "metrics.csv").read_bytes()
        log.metrics(1, "sft", {"loss/sft": math.nan, "lr": 0.1})
        assert (tmp_path / "metrics.csv").read_bytes() == first + b"1,sft,,0.1\r\n"
        log.metrics(0, "ppo", {"lr": 0.2, 'a "name", with marks': 3})
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        'step,stage,loss/sft,lr,"a ""name"", with marks"',
        "0,sft,2.0,,",
        "1,sft,,0.1,",
        "0,ppo,,0.2,3",
    ]


def test_who_watches_sees_a_line_after_its_mirror(tmp_path):
    seen = []

    def watch(step, stage, values):
        seen.append(rows_of(tmp_path, "csv")[stage, step])
        if step == 1:
            raise InputError("expected no more; got enough: stop")

    log = RunLog(tmp_path, watch)
    with pytest.raises(InputError, match="got enough"), run_log.mirrored(log, "csv"):
        log.metrics(0, "ppo", {"lr": 2.0})
        log.metrics(1, "ppo", {"lr": 1.0})
    assert seen == [{"lr": 2.0}, {"lr": 1.0}]


def test_event_files_keep_a_place_for_what_is_no_number(tmp_path):
    log = RunLog(tmp_path)
    with run_log.mirrored(log, "tensorboard"):
        log.metrics(0, "ppo", {"lr": math.inf})
    (row,) = read_log(tmp_path / "tensorboard").stages["ppo"]
    assert row["step"] == 0 and math.isnan(row["lr"])


@pytest.mark.parametrize("title, steps", [("reward model", 2), ("PPO", 3)])
def test_a_resumed_run_has_the_mirror_of_an_uninterrupted_one(whole, tmp_path, title, steps):
    """Stopped after a checkpoint: the lines since then are made again, and stand there once."""
    kind, folder = whole
    config = small(tmp_path / "run", kind)
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after(title, steps))
    resume(config.out)
    assert rows_of(config.out, kind) == rows_of(folder, kind) == logged(config.out, kind)


def test_a_mirror_that_was_killed_or_lost_is_made_again(whole, tmp_path):
    """The last line is in the log and was not yet in the mirror; there is no further line."""
    kind, folder = whole
    expected, path = rows_of(folder, kind), mirror_of(folder, kind)
    if kind == "csv":
        path.write_bytes(path.read_bytes()[:-40])
    else:  # some of its last numbers: one may be the time, which is not compared
        file = next(path.glob("ppo/*"))
        file.write_bytes(file.read_bytes()[:-400])
    assert rows_of(folder, kind) != expected
    resume(folder)
    assert rows_of(folder, kind) == expected


def test_a_resume_may_begin_with_it(tmp_path):
    config = small(tmp_path / "run", "")
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after("PPO", 3))
    said, path = [], config.out / "config.toml"
    path.write_text(path.read_text().replace('log = ""', 'log = "csv"'))
    resume(config.out, say=said.append)
    assert any("log '' -> 'csv' from here on" in line for line in said)
    assert rows_of(config.out, "csv") == logged(config.out, "csv")


def test_without_its_library_it_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", log="tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(
        InputError, match="not installed: pip install tensorboard, or take --log csv"
    ):
        train(config)
    assert not config.out.exists()
    monkeypatch.undo()
    session_module.open_session(config)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(
        InputError, match=r"pip install tensorboard.* then go on with `minirlhf res"
    ):
        resume(config.out)
    assert not read_metrics(config.out)
    assert session_module.reopen_session(config.out, look=True)  # to look needs no library


def test_event_files_without_tensorboard_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    (tmp_path / "events.out.tfevents.1").touch()
    with pytest.raises(InputError, match="pip install tensorboard, or export the log as CSV"):
        read_log(tmp_path)


def test_event_files_are_read_as_one_log_or_a_stage(tmp_path):
    log, folder = RunLog(tmp_path), tmp_path / "tensorboard"
    with run_log.mirrored(log, "tensorboard"):
        for step, stage in ((0, "sft"), (1, "sft"), (0, "ppo"), (7, "ppo")):
            log.metrics(step, stage, {"lr": 0.5})
    whole, part, file = map(read_log, (folder, folder / "ppo", next(folder.glob("ppo/*"))))
    assert (whole.source, whole.folder, list(whole.stages)) == ("minirlhf", None, ["sft", "ppo"])
    assert part.stages == file.stages == {"ppo": whole.stages["ppo"]}
    assert whole.stages["ppo"] == [{"step": 0, "lr": 0.5}, {"step": 7, "lr": 0.5}]
    others = folder.rename(tmp_path / "others")
    with pytest.raises(InputError, match=r"of one run; got 2 folders with some: name one, like"):
        read_log(others)


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, kind):
    log, elsewhere = RunLog(tmp_path / "run"), tmp_path / "elsewhere"
    (elsewhere / "ppo").mkdir(parents=True)
    path = mirror_of(tmp_path / "run", kind)
    path.symlink_to(elsewhere) if kind == "tensorboard" else path.mkdir()
    with pytest.raises(InputError, match=str(path)), run_log.mirrored(log, kind):
        log.metrics(0, "ppo", {"lr": 1.0})
    assert list(elsewhere.iterdir()) == [elsewhere / "ppo"]
    assert json.loads(log.metrics_path.read_text()) == {"step": 0, "stage": "ppo", "lr": 1.0}
