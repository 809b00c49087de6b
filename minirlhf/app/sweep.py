"""`minirlhf sweep`: a run for each choice of what varies, side by side, each in its own process.

    minirlhf sweep --beta 0 0.05 0.2 --seed 1 2 3
    minirlhf.sweep(ppo={"kl_coef": [0, 0.05, 0.2]}, seed=[1, 2, 3]).figure()

FOLDER/NAME is a run like any other, NAME.toml what it is to be, NAME.log what it has said. Where
PPO alone varies, the first run of a seed trains reference and reward model and the others fork from
it: bit for bit what they would be if each trained its own.
"""

import argparse
import contextlib
import io
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from minirlhf.app import api, pictures
from minirlhf.app.commands import parse_config
from minirlhf.app.pictures import shown
from minirlhf.app.progress import say, track
from minirlhf.app.tables import ROWS, NumberTable, html, number_table
from minirlhf.disk import new_numbered_folder, shorten, to_json
from minirlhf.errors import InputError
from minirlhf.runs.config import TrainConfig, flat, load_config, save_config
from minirlhf.runs.lock import locked
from minirlhf.runs.pipeline import read_result
from minirlhf.runs.session import fork_run
from minirlhf.train.settings import PPOConfig
from minirlhf.workers import usable_cores

LISTS = {f"--{name}" for name, value in flat(TrainConfig()) if isinstance(value, tuple)}
COLUMNS = ("proxy", "gold", "reward", "kl_seq", "entropy", "length", "repeated_bigrams")
SECONDS_BETWEEN_LOOKS = 0.1


class Planned(NamedTuple):
    """A run that is to be."""

    settings: dict[str, Any]  # what varies, but for the seed -> its value here
    config: TrainConfig  # with its folder
    origin: TrainConfig  # what reference and reward model come of

    def has(self, name: str) -> bool:
        return (self.config.out / name).exists()

    def beside(self, ending: str) -> Path:
        return self.config.out.with_name(self.config.out.name + ending)

    def row(self) -> dict[str, Any]:
        """What varies, and the policy's columns of the final table."""
        about = {"name": self.config.out.name, "settings": self.settings}
        about |= {"seed": self.config.seed, "kl_coef": _kl_coef(self.config)}
        return read_result(self.config.out).policy | about


class Sweep(NamedTuple):
    """Runs, and what came of them."""

    folder: Path
    rows: list[dict[str, Any]]  # of each finished run: name, settings, seed, kl_coef, proxy, ..
    failed: dict[str, str]  # name -> status and the last line that it said

    @property
    def runs(self) -> dict[str, api.Run]:
        """The finished runs, opened, by name."""
        return {row["name"]: api.open_run(self.folder / row["name"]) for row in self.rows}

    def means(self) -> list[dict[str, str]]:
        """A line for each setting: what varies, the number of runs, mean ± sd over seeds."""
        names = [name for name in COLUMNS if any(row[name] == row[name] for row in self.rows)]
        groups: dict[tuple, list[dict]] = {}
        for row in self.rows:
            groups.setdefault(tuple(row["settings"].items()), []).append(row)
        lines = []
        for varied, same in groups.items():
            line = {name * (name not in COLUMNS) or f"--{name}": shown(x) for name, x in varied}
            line["runs"] = str(len(same))
            for name in names:
                values = [row[name] for row in same]
                sd = [np.std(values, ddof=1)] if len(same) > 1 else []
                line[name] = " ± ".join(map(ROWS[name][1].format, [np.mean(values), *sd]))
            lines.append(line)
        return lines

    def table(self) -> NumberTable:
        lines = self.means()
        n_texts = len(self.rows[0]["settings"]) or 1  # of seeds alone: their number
        table = number_table("means ± sd over seeds", *lines[0], texts=tuple(range(n_texts)))
        for line in lines:
            table.add_row(*line.values())
        return table

    def __repr__(self) -> str:
        return f"Sweep({str(self.folder)!r}, {len(self.rows)} runs, {len(self.failed)} failed)"

    def _repr_html_(self) -> str:
        return html(self.table()) if self.rows else f"<p>{escape(repr(self))}</p>"

    def figure(self) -> Any:
        """A matplotlib figure: what was gained against how far it went, each run a point."""
        return pictures.frontier_figure(self.rows)


def sweep(
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    jobs: int = 0,
    progress: bool = True,
    **changes: Any,
) -> Sweep:
    """A run for each choice among the values of those changes that are lists.

    Args:     config: settings to start from; None: the defaults.
              out: folder of the sweep; what was interrupted in it goes on. None: runs/sweep-N.
              jobs: runs at a time; 0: one for each core.
              progress: show a bar and notes on stderr.
              changes: as of `minirlhf.train`, with recipe, and a reward by its name; a list, like
                  ppo={"kl_coef": [0, 0.05]}, holds values to try.
    Raises:   InputError: a setting cannot be used, or the folder holds other runs.
    """
    choices = (
        (varied, api.configured(config, fields.pop("recipe", "ppo"), fields))
        for varied, fields in _choices(changes)
    )
    return run_all(plan(choices), out, jobs, progress=progress)


def _choices(changes: dict[str, Any], prefix: str = "") -> Iterator[tuple[dict, dict]]:
    """({"ppo.kl_coef": a value}, the changes with it) for each choice among lists of values."""
    if not changes:
        yield {}, {}
        return
    (name, value), *others = changes.items()
    if isinstance(value, dict):
        inner = _choices(value, f"{prefix}{name}.")
        first = [(varied, {name: fields}) for varied, fields in inner]
    elif isinstance(value, list | range):
        first = [({prefix + name: x}, {name: x}) for x in value]
    else:
        first = [({}, {name: value})]
    for (varied, field), (more, fields) in itertools.product(first, _choices(dict(others), prefix)):
        yield varied | more, field | fields


def sweep_command(arguments: list[str]) -> int:
    """minirlhf sweep --OPTION VALUE VALUE .. [flags]."""
    mine, words = _own_options(arguments)
    to = [] if mine.out is None else ["--out", mine.out]
    found = run_all(plan(_typed_choices(words, to)), mine.out, mine.jobs)
    if mine.json:
        print(to_json({"rows": found.rows, "failed": found.failed}).decode(), end="")
    console = Console(markup=False, emoji=False, highlight=False, stderr=mine.json)
    if found.rows:
        picture = pictures.save(found.figure(), found.folder / "frontier.png")
        console.print(found.table(), f"frontier: {picture}", sep="\n")
    failed = f"; failed: {', '.join(found.failed)}" if found.failed else ""
    console.print(f"runs: {found.folder}{failed}", soft_wrap=True)
    return int(bool(found.failed))


def _own_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Those of the sweep itself, and the words that are left."""
    ours = argparse.ArgumentParser(
        prog="minirlhf sweep",
        usage="%(prog)s --OPTION VALUE VALUE .. [OPTIONS]",
        description="A run for each choice among the values of any options of train, like --beta, "
        "--seed, --recipe, --config or --ppo.lam, side by side; then a table, and a picture of "
        "what was gained against how far the policy went. Again with the same --out, it goes on.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    ours.add_argument("--out", metavar="FOLDER", help="default: runs/sweep-N with the next free N")
    ours.add_argument("--jobs", metavar="N", type=int, default=0, help="runs at a time; 0: cores")
    ours.add_argument("--json", action="store_true", help="print the numbers as JSON")
    try:
        return ours.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        said = f"{error.argument_name}: expected a value; got: {error.message}: correct it"
        raise InputError(said) from error


def _typed_choices(words: list[str], once: list[str]) -> Iterator[tuple[dict, TrainConfig]]:
    """({"ppo.kl_coef": a value}, its configuration) for each choice among values of options."""
    axes: dict[str, list[str]] = {}
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    for start, end in itertools.pairwise([0, *starts, len(words)]):
        if end - start > 2 and words[start] not in LISTS:
            axes[words[start]] = axes.get(words[start], []) + words[start + 1 : end]
        else:
            once = once + words[start:end]
    for values in itertools.product(*axes.values()):
        varied = dict(zip(axes, values, strict=True))
        with contextlib.redirect_stderr(io.StringIO()):  # what a recipe sets is in the run's log
            config = parse_config([*once, *itertools.chain(*varied.items())])
        yield {flag[2:].replace("-", "_"): value for flag, value in varied.items()}, config


def plan(choices: Iterable[tuple[dict[str, Any], TrainConfig]]) -> list[Planned]:
    """The runs, each in a folder that is named by what varies.

    Args:     choices: ({option or field: what was chosen}, the configuration that makes).
    Raises:   InputError: nothing varies, two choices are the same, or train would refuse one.
    """
    planned: dict[str, Planned] = {}
    for varied, config in choices:
        if not (config.is_dpo or config.stages == "all"):
            raise InputError(f"--stages: expected all of them; got {config.stages}: leave it out")
        has = varied | dict(flat(config)) | {"beta": _kl_coef(config)}
        settings = {name.removeprefix("ppo."): has[name] for name in varied if name != "seed"}
        if "beta" in settings:
            settings = {"kl_coef": settings.pop("beta"), **settings}
        parts = [f"{n}-{shown(value)}" for n, value in {**settings, "seed": config.seed}.items()]
        name = re.sub(r"[^\w.+-]+", "-", "_".join(parts))
        if name in planned:
            raise InputError(f"sweep: expected different values; got {name} twice: drop one")
        config = replace(config, out=Path(name), workers=config.workers or 1)
        same = {"out": None, "ppo": PPOConfig(temperature=config.ppo.temperature)}
        origin = config if config.is_dpo else replace(config, **same)  # DPO's run shares nothing
        planned[name] = Planned(settings, config, origin)
    if len(planned) < 2:
        raise InputError(
            "sweep: expected several values of an option, like --beta 0 0.2; got one of each: "
            "name more, or use minirlhf train"
        )
    return list(planned.values())


def _kl_coef(config: TrainConfig) -> float:
    return (config.dpo if config.is_dpo else config.ppo).kl_coef


def run_all(
    planned: list[Planned], out: str | Path | None, jobs: int, *, progress: bool = True
) -> Sweep:
    """Do what is not done yet, `jobs` runs at a time; interrupted, every run can go on.

    Raises:   InputError: the folder holds other runs, or somebody is at work in it.
    """
    if jobs < 0:
        raise InputError(f"--jobs: expected 0 or more; got {jobs}: choose such a number")
    out = new_numbered_folder("sweep") if out is None else Path(out)
    runs = [run._replace(config=replace(run.config, out=out / run.config.out)) for run in planned]
    _refuse_others(runs, out)
    failed: dict[str, str] = {}
    with locked(out), contextlib.closing(_ended(runs, jobs or usable_cores())) as ended:
        for run in runs:
            save_config(run.beside(".toml"), run.config)
        steps = range(sum(run.has("result.json") for run in runs), len(runs))
        steps = track(steps, "runs") if progress else steps
        try:
            for _, (run, status) in zip(steps, ended, strict=False):
                if status:
                    lines = run.beside(".log").read_text("utf-8", "replace").split("\n")
                    last = next((line for line in reversed(lines) if line.strip()), "")
                    failed[run.config.out.name] = f"status {status}: {shorten(last, 600)}"
                    if progress:
                        say(f"failed: {run.config.out}, {failed[run.config.out.name]}")
        except KeyboardInterrupt as stop:
            done = sum(run.has("result.json") for run in runs)
            again = f"the same with --out {shlex.quote(str(out))} goes on"
            stop.args = (f"{done} of {len(runs)} runs are finished; {again}",)
            raise
    return Sweep(out, [run.row() for run in runs if run.has("result.json")], failed)


def _refuse_others(runs: list[Planned], out: Path) -> None:
    """A folder may hold these runs, as they are planned, and no others."""
    files = {run.beside(".toml"): replace(run.config, out=None) for run in runs}
    folders = [path.with_name(f"{path.name}.toml") for path in out.glob("*/")]
    for path in sorted([*folders, *out.glob("*.toml")]):
        known = path in files and path.exists()
        if not known or replace(load_config(path), out=None) != files[path]:
            raise InputError(
                f"--out {out}: expected a new folder, or one with these runs; it holds another, "
                f"{path.stem}: choose another folder"
            )


def _ended(runs: list[Planned], jobs: int) -> Iterator[tuple[Planned, int]]:
    """(run, exit status) as they end, so many at a time; who leaves ends those at work."""
    waiting, working = [run for run in runs if not run.has("result.json")], {}
    try:
        while waiting or working:
            for run in list(waiting):
                words = _words(run, runs, working.values()) if len(working) < jobs else []
                if words:
                    waiting.remove(run)
                    with open(run.beside(".log"), "ab") as log:
                        command = [sys.executable, "-m", "minirlhf", *words]
                        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                        working[subprocess.Popen(command, **streams)] = run
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for process in [process for process in working if process.poll() is not None]:
                yield working.pop(process), process.returncode
    finally:
        for process in working:  # a run can go on whenever it is ended
            process.terminate()
        for process in working:
            process.wait()


def _words(run: Planned, runs: list[Planned], working: Iterable[Planned]) -> list[str]:
    """How the run begins or goes on; none while another trains a reward model for it."""
    folder = run.config.out
    if not run.has("config.toml"):
        same = [other for other in runs if other.origin == run.origin]
        begun = (other for other in same if other.has("config.toml"))
        lead = next((other for other in begun if other.has("reward_model")), None)
        if lead is None:
            alone = not any(other in same for other in working)
            return ["train", "--config", str(run.beside(".toml"))] if alone else []
        shutil.rmtree(folder, ignore_errors=True)  # of a fork that was interrupted
        fork_run(lead.config.out, folder, ppo=run.config.ppo)
    return ["resume", str(folder)]
