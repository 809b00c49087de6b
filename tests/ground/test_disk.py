"""Files and memory: what is given may be anything, what is written is whole or not there."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minirlhf import disk, memory
from minirlhf.app import pictures
from minirlhf.errors import LONGEST, InputError
from minirlhf.memory import available_memory, require_memory
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.runs.checkpoint import save_model, save_state
from minirlhf.runs.config import TrainConfig, load_config
from minirlhf.runs.log import RunLog
from minirlhf.runs.session import open_session, reopen_session

SMALL = GPTConfig(vocab_size=3, n_ctx=2, n_layer=1, n_head=1, d_model=2)
NAMES = ["", "no/such", "a\0b", "a\udcff", "x" * 300, "line\nbreak", "loop", "dangling", "folder"]
POSIX = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with a name")


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """A folder with things that are no files."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name, target in {"loop": "loop", "dangling": "nowhere"}.items():
        Path(name).symlink_to(target)
    return tmp_path


# --- what is read


READERS = {
    "bytes": disk.read_bytes,
    "text": disk.read_text,
    "toml": load_config,
    "run": reopen_session,
    "corpus": lambda path: open_session(TrainConfig(corpus=str(path), reward="vowel_share")),
    "pairs": lambda path: open_session(TrainConfig(pairs=str(path))),
    "out": lambda path: open_session(TrainConfig(out=path, reward="no.such:function")),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_is_no_file_is_refused_in_one_sentence(strange, name, reader):
    if not name and reader in ("corpus", "pairs"):
        return  # none is given
    before = sorted(os.listdir())
    with pytest.raises(InputError) as error:
        READERS[reader](name)
    said = str(error.value)
    assert said.isprintable() and "expected" in said and len(said) <= LONGEST
    assert sorted(os.listdir()) == before


@POSIX
@pytest.mark.parametrize("reader", ["bytes", "toml", "corpus", "pairs"])
@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/dev/stdin"])
def test_a_pipe_or_a_device_is_not_waited_for(strange, name, reader):
    os.mkfifo("pipe")
    if name == "/dev/stdin" and not Path(name).resolve().exists():
        pytest.skip("standard input is closed")
    with pytest.raises(InputError, match="a pipe or a device|the file is empty"):
        READERS[reader](name)


def test_what_a_file_says_is_never_quoted_whole(tmp_path):
    huge = "x" * 10**6
    for name, content in {
        "a.toml": f"seed = '{huge}'",
        "b.toml": f"{huge} = 1",
        "c.toml": f"[ppo]\nclip = '{huge}'",
        "d.toml": f"seed = {'9' * 5000}",
        "e.toml": f"x = {'[' * 5000}",
        "f.toml": f"seed = {'9' * 4000}",
        "g.toml": f"[ppo]\nkl_coef = {'9' * 400}",
        "h.json": f'["{huge}"]',
        "i.json": '{"a":' * 99_999,
        "j.json": f'{{"a": {"9" * 5000}}}',
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError) as error:
            (load_config if name.endswith("toml") else disk.read_object)(tmp_path / name)
        said = str(error.value)
        assert said.isprintable() and len(said) <= LONGEST and name in said


def test_a_message_is_one_line_of_bounded_length():
    for text in ("a\nb", "\x1b[2J", "\udcff", "\u202e"):
        assert str(InputError(f"expected; got {text}: do")).isprintable()
    long = str(InputError("first " + "x" * 10**7 + ": what to do"))
    assert len(long) == LONGEST and long.startswith("first ") and long.endswith(": what to do")


@pytest.mark.parametrize(
    "field, value",
    [
        ("out", ""),
        ("out", "a\0b"),
        ("out", Path("a\udcff")),
        ("corpus", "a\udcff"),
        ("seed", 2**63),
        ("workers", 10**30),
        ("model", {"n_layer": 10**400}),
        ("ppo", {"kl_coef": 10**400}),
        ("ppo", {"iterations": 10**30}),
    ],
)
def test_a_value_that_no_file_and_no_array_holds_is_refused(field, value):
    with pytest.raises(InputError, match="expected (a path|int|str|float); got"):
        TrainConfig(**{field: value})


# --- what is written


def write_bytes(folder):
    disk.write_whole(folder / "a.json", b"new")


def write_picture(folder):
    figure, _ = pictures.new_figure(1, 1, 1, 1)
    pictures.save(figure, folder / "a.png")


def write_model(folder):
    save_model(folder / "model", init_transformer(SMALL, rng=np.random.default_rng(0)), SMALL)


def write_state(folder):
    save_state(folder / "state", {"a": np.zeros(3)}, {"step": 1})


WRITERS = [write_bytes, write_picture, write_model, write_state]


class ShortFile(io.FileIO):
    """A disk that takes a part and then has no more."""

    def write(self, data):
        super().write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("call", ["open", "os.fsync", "os.replace", "os.open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_leaves_what_was_there(tmp_path, monkeypatch, write, call, number):
    write(tmp_path)  # the old files, which the failing call is to leave
    before, failed = content(tmp_path), []

    def fail(*arguments, **options):
        failed.append(call)
        if call == "open":
            return ShortFile(arguments[0], "w")
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(f"builtins.{call}" if call == "open" else call, fail)
        with pytest.raises(InputError) as error:
            write(tmp_path)
    assert failed and re.search(
        r"expected a place to write to; got .+: free some space", str(error.value)
    )
    if call != "os.open":  # of the folder, which is synced last; and to clean up needs it too
        after = content(tmp_path)
        kept = {name.replace(".model.old/", "model/"): data for name, data in after.items()}
        assert kept == before
    write(tmp_path)
    assert content(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("write", WRITERS)
def test_what_a_writer_that_crashed_left_behind_is_no_obstacle(tmp_path, write):
    write(tmp_path)
    before = content(tmp_path)
    victim = tmp_path.with_name(f"victim of {write.__name__}")
    victim.mkdir()
    (victim / "kept").write_text("kept")
    names = (
        ".a.json.new",
        ".a.png.new",
        ".model.new",
        ".model.old",
        "state/.state.safetensors.new",
    )
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to(victim)):
        for path in (tmp_path / name for name in names):
            path.parent.mkdir(exist_ok=True)
            make(path)
        write(tmp_path)
        for path in (tmp_path / name for name in names):
            disk._remove(path)
        assert content(tmp_path) == before and content(victim) == {"kept": b"kept"}


def test_nothing_is_written_through_a_link_in_a_run_folder(tmp_path):
    """A hostile one would let `resume` empty another folder."""
    victim, run = tmp_path / "victim", tmp_path / "run"
    write_model(tmp_path)
    (tmp_path / "model").rename(victim)
    save_state(victim, {"a": np.zeros(3)}, {"step": 1})
    (victim / "metrics.jsonl").write_text('{"half a line')
    before = content(victim)
    run.mkdir()
    for name in ("model", "state"):
        (run / name).symlink_to(victim)
    for name in ("metrics.jsonl", "a.json"):
        (run / name).symlink_to(victim / name)
    for write in (write_model, write_state, RunLog):
        with pytest.raises(InputError, match="got a link to .*victim"):
            write(run)
    write_bytes(run)  # in the place of the link
    assert not (run / "a.json").is_symlink() and (run / "a.json").read_bytes() == b"new"
    assert content(victim) == before
    linked = tmp_path / "linked"
    linked.symlink_to(run)  # a run folder itself may be one
    disk.write_whole(linked / "b", b"b")
    disk.write_whole_folder(linked / "c", {"d": b"d"})
    assert (run / "b").read_bytes() == b"b" and (run / "c/d").read_bytes() == b"d"


# --- memory


def test_memory_is_what_the_system_and_the_cgroup_allow(tmp_path, monkeypatch):
    assert 2**20 < available_memory() < 2**50
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUPS", [limit])
    free = available_memory()
    for text, most in (("max\n", free), (str(2**70), free), ("5000\n", 5000)):
        limit.write_text(text)
        assert available_memory() == pytest.approx(most, rel=0.5)


def test_what_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * 2**30)
    require_memory({"a": 2**30, "b": 2**31})
    with pytest.raises(InputError, match="^b: expected sizes .* 3.0 GiB; got at least 5 GiB"):
        require_memory({"a": 2**30, "b": 2**32})
    with pytest.raises(InputError, match="^b: "):
        require_memory({"a": 2**30, "b": 2**31, "c": 2**30})
    with pytest.raises(InputError, match="^a, c: "):
        require_memory({"a": 2**33, "b": 2**30, "c": 2**34})


def test_a_file_larger_than_the_memory_is_not_read(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**42)
    with pytest.raises(InputError, match="sparse: expected sizes that fit into the memory"):
        disk.read_bytes(tmp_path / "sparse")


def test_an_import_of_the_package_imports_next_to_nothing():
    """So that there is hardly a moment in which Ctrl-C finds nobody to answer."""
    script = """
import sys
before = {*sys.modules}
import minirlhf.app.cli
print(*{*sys.modules} - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(disk.__file__).parents[1])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    ours = {name for name in done.stdout.split() if name.startswith("minirlhf")}
    assert ours == {"minirlhf", "minirlhf.app", "minirlhf.app.cli", "minirlhf.errors"}, done.stderr
    others = {name.partition(".")[0] for name in done.stdout.split()} - {"minirlhf"}
    assert others <= {"importlib", "warnings"}
