"""What a run leaves behind: metrics.jsonl and samples.jsonl, one JSON object a line."""

import json
import os
from pathlib import Path
from typing import Any

from minirlhf.disk import parse_object, plain, read_bytes, refuse_link
from minirlhf.errors import InputError


class RunLog:
    """Appends to the two files of a run folder; every line is in the file when the call returns.

    Goes on where an earlier run stopped: a line that it left unfinished is cut off.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.metrics_path, self.samples_path = folder / "metrics.jsonl", folder / "samples.jsonl"
        self.paths = (self.metrics_path, self.samples_path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in self.paths:
                refuse_link(path)
                path.touch()
                _mend(path)
        except OSError as error:
            raise InputError(
                f"{folder}: expected a run folder to write to; got {error.strerror}: choose another"
            ) from error

    def metrics(self, step: int, stage: str, values: dict[str, Any]) -> None:
        """Append {"step", "stage", **values} to metrics.jsonl; NaN and inf become null.

        Raises:   ValueError: values has a key "step" or "stage".
                  TypeError: a value is neither a number, a string, None, nor a dict or list of
                      them.
        """
        _append(self.metrics_path, [_line({"step": step, "stage": stage}, values)])

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append {"step", **sample} to samples.jsonl for each sample.

        Raises:   ValueError: a sample has a key "step".
                  TypeError: as `metrics`.
        """
        _append(self.samples_path, [_line({"step": step}, sample) for sample in samples])

    def position(self) -> dict[str, int]:
        """Sizes of the files [bytes], for the checkpoint: `rewind` returns to this moment.

        Up to there they are on the disk: no power cut leaves a checkpoint with a shorter log.
        """
        sizes = {}
        for path in self.paths:
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        return sizes

    def restart(self, stage: str) -> None:
        """Drop the lines that `stage` wrote before it was interrupted: it begins again.

        Only PPO, the last stage, writes samples: where a stage begins there are none.
        """
        kept = 0
        for line in self.metrics_path.read_bytes().splitlines(keepends=True):
            if parse_object(line, str(self.metrics_path)).get("stage") == stage:
                break
            kept += len(line)
        self.rewind({self.metrics_path.name: kept, self.samples_path.name: 0})

    def rewind(self, position: dict[str, int]) -> None:
        """Drop the lines written after `position`, so that a resumed run does not repeat them.

        Raises:   InputError: a file is shorter than it was.
        """
        for path in self.paths:
            size, kept = path.stat().st_size, position[path.name]
            if size < kept:
                raise InputError(
                    f"{path}: expected at least {kept} bytes, as at the last checkpoint; got "
                    f"{size}: restore the file"
                )
            os.truncate(path, kept)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. An unfinished last line, of a run that crashed, is dropped.

    Raises:   InputError: the file is missing, or a finished line is no JSON object (says which).
    """
    data = read_bytes(path)
    lines = enumerate(data[: _whole(data)].split(b"\n"), 1)
    return [parse_object(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _line(head: dict[str, Any], values: dict[str, Any]) -> str:
    if clash := sorted(head.keys() & values.keys()):
        raise ValueError(f"run log: expected other keys than {clash}, which are set already")
    return json.dumps(plain(head | values), ensure_ascii=False, allow_nan=False) + "\n"


def _append(path: Path, lines: list[str]) -> None:
    # a lone surrogate becomes its escape backslash-udXXX, which JSON reads back
    with open(path, "ab") as file:
        file.write("".join(lines).encode("utf-8", errors="backslashreplace"))


def _whole(data: bytes) -> int:
    """How many bytes there are without an unfinished last line; only its newline may be missing."""
    tail = data[data.rfind(b"\n") + 1 :]
    try:
        parse_object(tail, "")
    except InputError:
        return len(data) - len(tail)
    return len(data)


def _mend(path: Path) -> None:
    """Cut off an unfinished last line; give a whole one its newline."""
    data = path.read_bytes()
    size = _whole(data)
    os.truncate(path, size)
    if size and not data[:size].endswith(b"\n"):
        _append(path, ["\n"])
