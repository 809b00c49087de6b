"""Files as nobody wrote them: every file of a run, of corpora and of pairs, mutated at random.

Whatever it reads, the product goes on or refuses in one sentence: no other exception, nothing above
SECONDS, nothing above MEMORY. MINIRLHF_MUTATIONS=2000 makes as many of each file; the seed of a
mutation is in the name under which it fails.
"""

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from tiny_run import VOWELS, changed, files_under, tiny_config, train, write_names, write_pairs

from minirlhf.app.api import open_run
from minirlhf.errors import LONGEST, InputError
from minirlhf.runs import pipeline
from minirlhf.runs.config import load_config
from minirlhf.runs.session import open_session, reopen_session

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory by setrlimit")
MUTATIONS = int(os.environ.get("MINIRLHF_MUTATIONS", "30"))
SECONDS, MEMORY = 10, 2 << 30
RUN_FILES = [  # of a run whose reward model is learnt from pairs
    *("config.toml", "world.json", "tiktoken.json", "metrics.jsonl", "samples.jsonl"),
    *("reference/config.json", "reference/model.safetensors"),
    *(f"reward_model/{name}" for name in ("config.json", "model.safetensors", "heads.safetensors")),
    *(f"policy/{name}" for name in ("config.json", "model.safetensors", "heads.safetensors")),
    *("checkpoint/state.safetensors", "result.json"),
]
TEXTS = ["names.txt", "verses.txt", "examples.jsonl", "pairs.jsonl", "dialogues.jsonl"]


# --- what is done to a file

HOSTILE = [
    *(None, True, -1, 0, 1, 2, 0.5, -0.5, 10**9, 10**18, 10**30, -(10**30), 1e-320, 1e300, -1e300),
    *("", " ", "x", "\0", "\ud800", "x" * 100_000, "../../x", [], {}, [[]], [1, 2], {"a": 1}),
]


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, insert, repeat, blank."""
    data = bytearray(data)
    at, to = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    few = slice(at, at + draw.randint(1, 20))
    kind = draw.randrange(8)
    if kind == 0 and data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[few] = draw.randbytes(len(data[few]))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[few]
    elif kind == 4:
        data[at:at] = draw.randbytes(draw.randint(1, 20))
    elif kind == 5:
        data[at:at] = data[at:to]
    elif kind == 6:
        data[few] = bytes(len(data[few]))
    else:
        data = bytearray(
            draw.choice([b"", b"\0", b"{}", b"[]", b"null", b"\xff\xfe", b"a\n", b"[" * 9999])
        )
    return bytes(data)


def mutate_value(value, draw: random.Random):
    """Somewhere in nested dicts and lists: another value, none, or one under another name."""
    value = copy.deepcopy(value)
    holders, todo = [], [value]
    while todo:
        holder = todo.pop()
        if isinstance(holder, dict | list) and holder:
            holders.append(holder)
            todo += holder.values() if isinstance(holder, dict) else holder
    if not holders:
        return draw.choice(HOSTILE)
    holder = draw.choice(holders[:200])
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    kind = draw.randrange(10)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(["x", "", str(key) * 2])] = holder[key]
    elif kind == 2 and isinstance(holder[key], int | float):
        holder[key] = draw.choice(
            [holder[key] + 1, -holder[key], holder[key] * 1000, holder[key] / 2]
        )
    elif kind == 3:
        holder[key] = copy.deepcopy(draw.choice(holders))
    else:
        holder[key] = draw.choice(HOSTILE)
    return value


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    text = json.dumps(mutate_value(json.loads(data), draw))
    return (text.replace("1e+300", "1e999") if draw.random() < 0.3 else text).encode()


def mutate_lines(data: bytes, draw: random.Random) -> bytes:
    """JSON lines: a value in one of them, or lines lost, repeated, swapped."""
    lines = data.splitlines(keepends=True)
    i = draw.randrange(len(lines))
    if draw.random() < 0.7:
        lines[i] = mutate_json(lines[i], draw) + b"\n"
    else:
        lines[i:i] = draw.choice([[], [lines[i]], [b"\n"], [b"5\n"], [lines[-1].strip()]])
        del lines[draw.randrange(len(lines))]
    return b"".join(lines)


def mutate_toml(data: bytes, draw: random.Random) -> bytes:
    """A line lost, repeated, or with another value."""
    lines = data.decode().splitlines(keepends=True)
    i = draw.randrange(len(lines))
    values = [
        "-1",
        "0",
        "1",
        "3",
        "1e300",
        "-inf",
        "nan",
        "true",
        '""',
        '"x"',
        "[]",
        "{}",
        "1979-05-27",
    ]
    values += [
        str(10**9),
        str(10**18),
        str(10**30),
        "9" * 5000,
        '"\\u0000"',
        '"' + "x" * 99_999 + '"',
    ]
    values += ["[" * 3000, "1e-320", '"../x"']
    if draw.random() < 0.8:
        lines[i] = f"{lines[i].partition('=')[0]}= {draw.choice(values)}\n"
    else:
        lines[i : i + 1] = draw.choice(
            [[], [lines[i]] * 2, ["x = 1\n"], ["[ppo]\n"], ["[[ppo]]\n"]]
        )
    return "".join(lines).encode()


def mutate_tensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file: its header, the text of ours in it, the length of it, or its numbers."""
    size = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    kind = draw.randrange(5)
    if kind == 0:
        size = draw.choice([0, 1, size - 1, size + 1, size + 8, 10**6, 2**40, 2**63, 2**64 - 1])
        return size.to_bytes(8, "little") + data[8:]
    if kind == 1:
        at = draw.randrange(0, len(numbers), 4)
        strange = np.float32(draw.choice([np.nan, np.inf, 1e38, -1e38, 1e-40, 0, 1]))
        numbers[at : at + 4] = strange.tobytes()
    elif kind == 2 and (key := next(iter(header.get("__metadata__", {})), None)):
        with contextlib.suppress(ValueError):
            inner = mutate_value(json.loads(header["__metadata__"][key]), draw)
            header["__metadata__"][key] = json.dumps(inner)
    else:
        header = mutate_value(header, draw)
    if draw.random() < 0.7 and isinstance(header, dict):
        said = header.get("__metadata__")
        if isinstance(said, dict):  # without a digest it is believed, and looked at more closely
            said.pop("minirlhf_sha256", None)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(numbers)


BY_SUFFIX = {
    ".json": mutate_json,
    ".jsonl": mutate_lines,
    ".toml": mutate_toml,
    ".safetensors": mutate_tensors,
}


def mutations(name: str, data: bytes):
    """(number, mutated content): every other one knows the format."""
    for i in range(MUTATIONS):
        draw = random.Random(zlib.crc32(f"{name} {i}".encode()))
        of_format = BY_SUFFIX.get(Path(name).suffix, mutate_bytes)
        yield i, (of_format if i % 2 else mutate_bytes)(data, draw)


# --- what is done with it


class Enough(Exception):
    """It trains: no need to see the end."""


class TooLong(BaseException):  # not an OSError as TimeoutError is, which is refused in a sentence
    """It hangs."""


def a_few_steps(steps, title):
    for i, step in enumerate(steps):
        if i == 8:
            raise Enough
        yield step


def look(folder):
    run = open_run(folder)
    run.sample(["tea 1"] * 2)
    run.score("tea 1", "good yes")
    with contextlib.suppress(InputError):
        _ = run.metrics
    run.curves()


def resume(folder):
    pipeline.run_stages(reopen_session(folder, track=a_few_steps))


@contextlib.contextmanager
def bounded():
    """The time and the memory that anything here may take."""

    def too_long(*_):
        raise TooLong(f"longer than {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def outcome_of(action, *arguments) -> str:
    """ "" if it went on or refused in one sentence; else what happened instead."""
    try:
        with bounded(), np.errstate(all="ignore"):
            action(*arguments)
    except Enough:
        return ""
    except InputError as error:
        said = str(error)
        return "" if said.isprintable() and 10 < len(said) <= LONGEST else f"says {said!r}"
    except BaseException as error:  # also a panic of Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"[:300]
    return ""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_names(folder / "names.txt", 20)
    write_pairs(folder / "pairs.jsonl", 12)
    (folder / "verses.txt").write_text("rain\nfalls down\n\nsun\ncomes up\n\nwind\ngoes by\n\n" * 3)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    examples = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    turns = [f"\n\nHuman: {row['prompt']}\n\nAssistant: " for row in rows]
    dialogues = [
        {"chosen": turn + row["chosen"], "rejected": turn + row["rejected"]}
        for turn, row in zip(turns, rows, strict=True)
    ]
    for name, lines in (("examples.jsonl", examples), ("dialogues.jsonl", dialogues)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, texts):
    """A finished run, which every mutation is put into and taken out of again."""
    config = tiny_config(
        tmp_path_factory.mktemp("damaged") / "run", pairs=str(texts / "pairs.jsonl")
    )
    changes = {"sft.steps": 2, "reward_model.epochs": 1, "ppo.iterations": 2, "vocab_size": 262}
    train(changed(config, changes | {"eval_prompts": 4, "reward_model.n_normalize": 8}))
    return config.out


def put_back(folder: Path, files: dict[str, bytes]) -> None:
    now = files_under(folder)
    for name in now.keys() - files.keys():
        (folder / name).unlink()
    for name, data in files.items():
        if now.get(name) != data:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_damaged_file_of_a_run(run, name):
    whole, wrong = files_under(run), []
    for i, data in mutations(name, whole[name]):
        for action in (look, resume):
            (run / name).write_bytes(data)
            if said := outcome_of(action, run):
                wrong.append(f"{name} {i}, {action.__name__}: {said}")
            put_back(run, whole)
    assert not wrong, f"{len(wrong)} of {2 * MUTATIONS}:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("name", TEXTS)
def test_a_damaged_text(texts, tmp_path, name):
    kind = {"pairs": "pairs", "dialogues": "pairs"}.get(name.partition(".")[0], "corpus")
    wrong = []
    for i, data in mutations(name, (texts / name).read_bytes()):
        (tmp_path / name).write_bytes(data)
        changes = {kind: str(tmp_path / name), "vocab_size": 262}
        changes |= {} if kind == "pairs" else {"reward": VOWELS}
        config = changed(tiny_config(tmp_path / "run"), changes)
        if said := outcome_of(open_session, config):
            wrong.append(f"{name} {i}: {said}")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert not wrong, f"{len(wrong)} of {MUTATIONS}:\n" + "\n".join(wrong[:20])


def test_the_campaign_notices_what_it_looks_for(run, monkeypatch):
    def waits():
        time.sleep(30)

    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.1)
    assert outcome_of(waits).startswith("TooLong")
    assert "Unable to allocate" in outcome_of(lambda: np.ones(MEMORY))
    assert outcome_of(lambda: {}["x"]).startswith("KeyError")
    assert outcome_of(load_config, run / "config.toml") == ""
