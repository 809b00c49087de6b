"""`minirlhf sweep`: a run for each choice of what varies, side by side, each in its own process.

    minirlhf sweep --beta 0 0.05 0.2 --seed 1 2 3
    minirlhf.sweep(ppo={"kl_coef": [0, 0.05, 0.2]}, seed=[1, 2, 3]).figure()

FOLDER/NAME is a run like any other, NAME.toml what it is to be, NAME.log what it has said. Where
PPO alone varies, the first run of a seed trains reference and reward model and the others fork from
it: bit for bit what they would be if each trained its own.
"""

import contextlib
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

from minirlhf.app import api, commands, pictures
from minirlhf.app.options import Option, Parser, of_command, of_config
from minirlhf.app.pictures import shown
from minirlhf.app.progress import say, track
from minirlhf.app.tables import ROWS, NumberTable, html, number_table, show
from minirlhf.crew import usable_cores
from minirlhf.disk import locked, new_numbered_folder, shorten, to_json
from minirlhf.errors import InputError
from minirlhf.runs.config import TrainConfig, flat, load_config, save_config
from minirlhf.runs.pipeline import read_result
from minirlhf.runs.session import fork_run
from minirlhf.train.settings import PPOConfig

OWN = (
    Option("out", Path | None, None, "default: runs/sweep-N with the next free N"),
    Option("jobs", int, 0, "runs at a time; 0: cores"),
    Option("json", bool, False, "print the numbers as JSON"),
)
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
        about |= {"seed": self.config.seed, "kl_coef": self.config.kl_coef}
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
        for varied, fields in _choices(dict(flat(changes)))
    )
    return run_all(plan(choices), out, jobs, progress=progress)


def _choices(fields: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(what varies, all with it) for each choice among lists of values."""
    lists = {name: values for name, values in fields.items() if isinstance(values, list | range)}
    for values in itertools.product(*lists.values()):
        varied = dict(zip(lists, values, strict=True))
        yield varied, fields | varied


def sweep_command(words: list[str]) -> int:
    """A run for each choice among the values of options of train, side by side.

    Any options, like --beta, --seed, --recipe, --config or --ppo.lam; then a table,
    and a picture of what was gained against how far the policy went. Again with the
    same --out, it goes on.
    """
    parser = Parser("sweep", sweep_command, "--OPTION VALUE VALUE ..")
    parser.add(OWN)
    fields = (option for option in of_config(TrainConfig()) if option.name != "out")
    parser.add([*of_command(commands.configured), *fields], None, several=True)
    typed = parser.read(words)
    out, jobs, json = (typed.pop(option.name, option.default) for option in OWN)
    once = {name: x[0] for name, x in typed.items() if isinstance(x, list) and len(x) == 1}
    choices = _choices(typed | once)
    planned = plan((varied, commands.configured(**fields)) for varied, fields in choices)
    found = run_all(planned, out, jobs)
    if json:
        print(to_json({"rows": found.rows, "failed": found.failed}).decode(), end="")
    failed = f"; failed: {', '.join(found.failed)}" if found.failed else ""
    lines = [f"runs: {found.folder}{failed}"]
    if found.rows:
        picture = pictures.save(found.figure(), found.folder / "frontier.png")
        lines = [found.table(), f"frontier: {picture}", *lines]
    show(*lines, stderr=json)
    return int(bool(found.failed))


def plan(choices: Iterable[tuple[dict[str, Any], TrainConfig]]) -> list[Planned]:
    """The runs of (what varies, configuration), each in a folder that is named by what varies."""
    planned: dict[str, Planned] = {}
    for varied, config in choices:
        if not (config.is_dpo or config.stages == "all"):
            raise InputError(f"--stages: expected all of them; got {config.stages}: leave it out")
        has = varied | dict(flat(config)) | {"beta": config.kl_coef}
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


def run_all(planned: list[Planned], out: str | Path | None, jobs: int, *, progress=True) -> Sweep:
    """Do what is not done yet, `jobs` runs at a time; interrupted, every run can go on."""
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
