"""A disk that fails at any write of a run: one sentence, and a resume that ends in the same bytes.

`MINIRLHF_FAULTS=200 python -m pytest -s tests/runs/test_failing_writes.py` lets so many calls fail.
"""

import builtins
import errno
import os
import random

import pytest
from tiny_run import as_flags, call, differences, outcome, tiny_config, write_pairs

FAULTS = int(os.environ.get("MINIRLHF_FAULTS", 8))
CALLS = ("fsync", "replace", "truncate", "link", "mkdir")  # of os; and open, to write


class Half:
    """A file of which half of what is written arrives."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """Counts the calls that change a folder, and lets one of them fail."""

    def __init__(self, monkeypatch, folder, failing: int, half: bool):
        self.folder, self.failing, self.half, self.names = str(folder), failing, half, []
        for name in CALLS:
            monkeypatch.setattr(os, name, self.watched(name, getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self.opening(open))

    def fails(self, name: str, where) -> bool:
        where = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else where
        if not os.fspath(where).startswith(self.folder):
            return False
        self.names.append(name)
        return len(self.names) == self.failing

    def watched(self, name, original):
        def f(where, *args, **options):
            if self.fails(name, where):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(where, *args, **options)

        return f

    def opening(self, original):
        def f(where, mode="r", *args, **options):
            fails = mode[0] in "wa" and self.fails("open", where)
            if fails and not self.half:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file = original(where, mode, *args, **options)
            return Half(file) if fails else file

        return f


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="asks Linux what a number opens")
def test_whatever_write_fails_it_is_one_sentence_and_nothing_is_lost(tmp_path, capsys):
    pairs, draw = write_pairs(tmp_path / "pairs.jsonl", 20), random.Random(FAULTS)
    config = tiny_config(tmp_path, pairs=pairs, workers=1, checkpoint_every=1)
    flags, refused = as_flags(config), 0

    def train(run, failing, half=False):
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, run, failing, half)
            status, _, err = call(capsys, "train", *flags, "--out", run)
        return status, err, disk.names

    status, _, names = train(tmp_path / "whole", 0)
    assert status == 0 and set(names) >= {"fsync", "replace", "open"}
    whole = outcome(tmp_path / "whole")
    for failing in sorted(draw.sample(range(1, len(names) + 1), min(FAULTS, len(names)))):
        run = tmp_path / f"run{failing}"
        status, err, done = train(run, failing, half=failing % 2 == 0)
        said = [line for line in err.splitlines() if line.startswith("minirlhf: ")]
        assert status in (0, 2) and len(said) == (status == 2) and "Traceback" not in err, err
        refused += status == 2
        again = (
            ("resume", run) if (run / "config.toml").exists() else ("train", *flags, "--out", run)
        )
        status, _, err = call(capsys, *again)
        assert status == 0, (failing, done[-1], err)
        assert differences(whole, outcome(run)) == [], (failing, done[-1])
    print(f"{len(names)} calls, {FAULTS} of them failed, {refused} refusals")
    assert refused > 0
