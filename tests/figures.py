"""Measures the published figures again and rewrites the tables between their markers.

    python tests/figures.py --list            their names, what runs for each, how long it takes
    python tests/figures.py optimum kl        these two
    python tests/figures.py                   all of them
    python tests/figures.py --out FOLDER      keep what the commands left behind ...
    python tests/figures.py --from FOLDER     ... and render that again without running anything
    python tests/figures.py --check           every marker has a producer, every producer a marker

A table stands in a README.md between two lines that GitHub does not show:

    <!-- figures: NAME -->
    <!-- /figures -->

NAME is one of FIGURES below, which says what runs and how its output becomes Markdown. In which
README the markers stand is found by searching; so is the published copy of a picture, by its name.
Commands run in a folder of their own, with the package that is installed. Speed is measured on a
quiet machine, or not at all.
"""

import argparse
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import figure_tables as tables

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


class Source(NamedTuple):
    """Commands that are run one after the other, as a reader would type them."""

    minutes: float  # on two quiet cores
    commands: tuple[str, ...]
    pictures: dict[str, str] = {}  # what it draws -> name of the published copy
    needs: tuple[str, ...] = ()  # files, modules and programs without which it is left out


SEEDS = "--seeds 0 1 2 3 4"
BENCH = "python tests/benchmarks/bench.py"
SMALL_ONES = "--peers --workloads nano toy small --rounds 5"
CASES = [path.stem for path in sorted((ROOT / "examples" / "cases").glob("[0-9][0-9]_*.py"))]
DIAGNOSIS = "28_names_what_went_wrong"
SOURCES = {
    "support": Source(
        8,
        ("python examples/the_penalty_matters.py --out runs",),
        {f"runs/{name}.png": f"{name}.png" for name in ("the_penalty_matters", "the_penalty_seen")},
    ),
    "cases": Source(
        20,
        tuple(f"python examples/cases/{case}.py --out {case}" for case in CASES),
        {f"{case}/{case}.png": f"{case}.png" for case in CASES},
    ),
    "diagnosis": Source(
        5,
        (f"python examples/cases/{DIAGNOSIS}.py --out {DIAGNOSIS}",),
        {f"{DIAGNOSIS}/{DIAGNOSIS}.png": f"{DIAGNOSIS}.png"},
    ),
    "stories": Source(
        30,
        ("python examples/get_stories15m.py model", "python examples/stories.py model --out runs"),
        needs=("npm",),
    ),
    "recipes": Source(9, ("python examples/recipes_compared.py --out runs",)),
    "gradients": Source(
        0.1, ("minirlhf exact --parts kl --out exact",), {"exact/kl.png": "exact_kl.png"}
    ),
    "libraries": Source(0.2, ("minirlhf judge libraries --json",)),
    "optimum": Source(
        6,
        (f"minirlhf exact --parts optimum {SEEDS} --out exact",),
        {"exact/optimum.png": "exact_optimum.png"},
    ),
    "randomwalks": Source(
        6,
        (
            "python examples/randomwalks.py --graph-seed 1000 --seeds 0 1 2",
            "python examples/randomwalks.py --graph-seed 1002 --seeds 0 1 2",
        ),
    ),
    "exact-size": Source(1, ("python tests/benchmarks/bench_exact.py --out exact",)),
    "own-text": Source(
        5,
        (
            f"minirlhf train --corpus {DATA}/names.txt --out names "
            "--reward minirlhf.worlds.rewards:vowel_share",
            f"minirlhf train --corpus {DATA}/tinyshakespeare.txt --out plays "
            "--reward minirlhf.worlds.rewards:short_words",
            "python examples/your_own_preferences.py --out pairs",
        ),
        needs=(str(DATA / "names.txt"), str(DATA / "tinyshakespeare.txt")),
    ),
    "bench": Source(
        40,
        (
            f"{BENCH} {SMALL_ONES} --parts loss sample logprobs iteration --growth --out 1",
            f"{BENCH} {SMALL_ONES} --parts adamw update --out 2",
            f"{BENCH} --peers --workloads stories --rounds 5 --out 3",
            f"{BENCH} --peers --beside PyTorch --workloads gpt2 --rounds 3 --out 4",
        ),
        {"1/bench.png": "bench.png", "1/bench_growth.png": "bench_growth.png"},
        needs=("torch", "jax", "trl"),
    ),
    "tricks": Source(3, ("python tests/benchmarks/bench_tricks.py --out tricks",)),
    "gpu": Source(0, ()),
}

FIGURES: dict[str, tuple[str, Callable[[Path], str]]] = {  # name -> (source, its Markdown)
    "support": ("support", tables.support),
    "cases": ("cases", tables.cases),
    "diagnosis": ("diagnosis", tables.diagnosis),
    "stories": ("stories", tables.stories),
    "recipes": ("recipes", tables.recipes),
    "kl": ("gradients", tables.kl),
    "kl4": ("gradients", tables.kl4),
    "libraries": ("libraries", tables.libraries),
    "optimum": ("optimum", tables.optimum),
    "randomwalks": ("randomwalks", tables.randomwalks),
    "exact-size": ("exact-size", tables.exact_size),
    "own-text": ("own-text", tables.own_text),
    "bench": ("bench", tables.bench),
    "tricks": ("tricks", tables.tricks),
    "gpu": ("gpu", tables.gpu),
}


# -- running -------------------------------------------------------------------------------------


def missing(source: Source) -> list[str]:
    """What a source needs and this machine lacks."""

    def is_here(name: str) -> bool:
        return Path(name).exists() if "/" in name else bool(find_spec(name) or shutil.which(name))

    return [name for name in source.needs if not is_here(name)]


def argv(command: str) -> list[str]:
    """The command as this interpreter runs it from any folder."""
    first, *rest = shlex.split(command)
    if first == "python":
        return [sys.executable, str(ROOT / rest[0]), *rest[1:]]
    return [sys.executable, "-m", first, *rest]


class FailedError(Exception):
    """A command that did not end well, in one sentence."""


def run(source: Source, folder: Path) -> None:
    """Run the commands in a new folder; what they print is kept in output.txt."""
    folder.mkdir(parents=True)
    for command in source.commands:
        print(f"  {command}", flush=True)
        with open(folder / "output.txt", "a", encoding="utf-8") as output:
            known = {"cwd": folder, "stdout": output, "stderr": subprocess.STDOUT}
            status = subprocess.run(argv(command), **known).returncode
        if status != 0:
            said = (folder / "output.txt").read_text("utf-8", errors="replace").splitlines()
            raise FailedError(f"{command} ended with status {status}: {(said or ['nothing'])[-1]}")


# -- publishing ----------------------------------------------------------------------------------


def readmes(root: Path) -> list[Path]:
    """Where markers may stand."""
    places = ("README.md", "minirlhf/**/README.md", "tests/**/README.md", "examples/README.md")
    return [path for place in places for path in sorted(root.glob(place))]


def replaced(text: str, name: str, figure: str) -> str:
    """The text with another table between the markers of a name."""
    block = re.compile(rf"^<!-- figures: {name} -->$.*?^<!-- /figures -->$", re.M | re.S)
    new = f"<!-- figures: {name} -->\n\n{figure}\n\n<!-- /figures -->"
    return block.sub(lambda match: new, text)


def publish(name: str, figure: str, root: Path) -> list[Path]:
    """Write a table into every README with its markers; which these are."""
    written = []
    for path in readmes(root):
        text = path.read_text(encoding="utf-8")
        if f"<!-- figures: {name} -->" in text.splitlines():
            written.append(path.relative_to(root))
            path.write_text(replaced(text, name, figure), encoding="utf-8")
    return written


def publish_pictures(source: Source, folder: Path, root: Path) -> None:
    """Copy what was drawn over the published copies of that name."""
    for drawn, name in source.pictures.items():
        for place in ("examples/**", "minirlhf/**", "tests/**"):
            for path in root.glob(f"{place}/{name}"):
                shutil.copyfile(folder / drawn, path)
                print(f"  {path.relative_to(root)}")


def problems(root: Path) -> Iterator[str]:
    """Markers without a producer, producers without a marker, markers that are not in pairs."""
    seen = set()
    for path in readmes(root):
        where, text = path.relative_to(root), path.read_text(encoding="utf-8")
        names = re.findall(r"^<!-- (?:figures: (\S+)|/figures) -->$", text, re.M)  # "": the end
        for name, end in itertools.zip_longest(names[::2], names[1::2]):
            if not name or end != "":
                yield f"{where}: a marker is not followed by its end: {name or '/figures'}"
        for name in filter(None, names):
            seen.add(name)
            if name not in FIGURES:
                yield f"{where}: nothing in tests/figures.py makes {name!r}"
    for name in FIGURES:
        if name not in seen:
            yield f"{name}: no README has a line <!-- figures: {name} -->"


# -- the command ---------------------------------------------------------------------------------


def remake(names: list[str], folder: Path, *, stored: bool, root: Path = ROOT) -> int:
    """Run what these figures need, unless it is stored, and publish them; how many failed."""
    failed = 0
    for key in dict.fromkeys(FIGURES[name][0] for name in names):
        source, started = SOURCES[key], time.perf_counter()
        mine = [name for name in names if FIGURES[name][0] == key]
        if not stored and (lacking := missing(source)):
            print(f"{', '.join(mine)}: left as it is, for want of {', '.join(lacking)}")
            continue
        print(", ".join(mine), *([] if stored else [f"(about {source.minutes:g} min)"]), flush=True)
        try:
            if not stored:
                run(source, folder / key)
            texts = {name: FIGURES[name][1](folder / key) for name in mine}
            publish_pictures(source, folder / key, root)
        except (FailedError, OSError, LookupError, ValueError, StopIteration) as error:
            print(f"  FAILED, left as it is: {error!r}")
            failed += 1
            continue
        for name, text in texts.items():
            places = publish(name, text, root)
            failed += not places
            print(f"  {name}:", ", ".join(map(str, places)) or "no README has its markers")
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 1 where a figure could not be made or markers and producers differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of them")
    parser.add_argument("--list", action="store_true", help="names, minutes, commands")
    parser.add_argument("--check", action="store_true", help="markers and producers, nothing runs")
    parser.add_argument("--out", type=Path, help="new folder for what the commands leave behind")
    parser.add_argument("--from", type=Path, dest="stored", help="such a folder: nothing runs")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - FIGURES.keys():
        parser.error(f"expected names of {', '.join(FIGURES)}; got {', '.join(unknown)}")
    names = options.names or list(FIGURES)
    if options.check:
        found = list(problems(ROOT))
        print(*found, sep="\n", end="\n" * bool(found))
        return 1 if found else 0
    if options.list:
        for key in dict.fromkeys(FIGURES[name][0] for name in names):
            together = ", ".join(name for name in names if FIGURES[name][0] == key)
            commands = SOURCES[key].commands or ("nothing runs",)
            print(f"{together}: {SOURCES[key].minutes:g} min", *commands, sep="\n    ")
        return 0
    if options.out and options.out.exists():
        parser.error(f"--out {options.out}: expected a new folder; it exists: choose another")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.stored or options.out or Path(temporary)
        return 1 if remake(names, folder.resolve(), stored=bool(options.stored)) else 0


if __name__ == "__main__":
    sys.exit(main())
