"""Options: from what is typed to values, or to one sentence; and what the help of `train` shows.

tyro reads the options off a function or a dataclass, and converts what is typed. Its refusals,
boxes of several lines, become a sentence here.
"""

import argparse
import contextlib
import difflib
import functools
import io
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from minirlhf.disk import shorten
from minirlhf.errors import InputError

REFUSALS = (  # of tyro -> ours
    (r"Error parsing (\S+): invalid literal .*: ('.*')", r"\1: expected a whole number; got \2"),
    (r"Error parsing (\S+): could not convert .*: ('.*')", r"\1: expected a number; got \2"),
    (r"invalid choice (.*) for argument '(.*?)'.*\((.*?),?\)\.", r"\2: expected one of \3; got \1"),
    (r"Missing value for argument '(.*)'\..*", r"\1: expected a value; got none"),
    (r"Missing from [^:]*: (\S+).*", r"expected also \1; got none"),
    (r"Error parsing (\S+): (.*)", r"\1: expected another value; got: \2"),
)
SHOWN = {  # what `train --help` shows; all others are in --help-all
    "your own data": (
        *("corpus", "pairs", "columns", "reward", "init"),
        *("max-prompt-tokens", "max-response-tokens"),
    ),
    "the run": ("out", "stages", "seed", "device", "workers", "eval-every", "checkpoint-every"),
    "the model": ("model.n-layer", "model.n-head", "model.d-model", "vocab-size"),
    "fine-tuning": ("sft.steps", "sft.batch-size", "sft.optimizer.learning-rate"),
    "the reward model": ("reward-model.epochs",),
    "PPO; or DPO, with --stages sft,dpo": (
        *("ppo.iterations", "ppo.batch-size", "ppo.temperature", "ppo.kl-coef", "ppo.kl-target"),
        *("ppo.optimizer.learning-rate", "dpo.kl-coef"),
    ),
}


def parse(command: Callable[..., int], arguments: list[str], name: str) -> Callable[[], int]:
    """The command with what was typed as its arguments; its parameters are the options."""

    @functools.wraps(command)  # tyro looks at the signature, and calls
    def later(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    known, hints = [], get_type_hints(command, include_extras=True)
    hints.pop("return", None)
    for parameter, hint in hints.items():
        renamed = (getattr(of_tyro, "name", None) for of_tyro in getattr(hint, "__metadata__", ()))
        known.append(next(filter(None, renamed), parameter))
    return read(later, arguments, name, known)


def read(target: Any, arguments: list[str], name: str, known: list[str], **about: Any) -> Any:
    """target(...) with what tyro makes of the arguments.

    Args:     known: names of options, the nearest of which is named beside an unknown one.
              about: further arguments of tyro.cli.
    Raises:   InputError: an option or its value is wrong.
              SystemExit: the help was asked for, and has been shown.
    """
    if "--out=" in arguments or ("--out", "") in itertools.pairwise(arguments):
        raise InputError("--out: expected a folder; got an empty name: leave it out, or name one")
    box, see = io.StringIO(), f"see minirlhf {name} --help"
    flags = ["--" + option.replace("_", "-") for option in known]
    about |= {"args": arguments, "prog": f"minirlhf {name}", "return_unknown_args": True}
    try:
        with contextlib.redirect_stderr(box):
            value, unknown = tyro.cli(target, **about)
    except SystemExit as end:
        if not end.code:
            raise
        said, words = _sentence(end, box.getvalue(), see), (w.partition("=")[0] for w in arguments)
        unknown = [w for w in words if w.startswith("--") and w.replace("_", "-") not in flags]
        if not (unknown and said.startswith("expected also")):  # or with a slip in its name
            raise InputError(said) from end
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
        near += [f"--corpus {shorten(unknown[0])}"] * (name == "train" and unknown[0][:1] != "-")
        see = f"perhaps {near[0]} is meant" if near else see
        raise InputError(f"expected an option of {name}; got {shorten(unknown[0])!r}: {see}")
    return value


def _sentence(end: SystemExit, box: str, see: str) -> str:
    """What tyro put into a box; or, if it is there because of a refusal of ours, that one."""
    parts = re.split("[─-]{3,}", re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", box))  # first its title
    said = next(filter(None, (" ".join(part.split()) for part in parts[1:])), "")
    error = end.__context__
    while error is not None and not isinstance(error, InputError):
        error = error.__context__
    if said.startswith("invalid choice"):  # the box breaks a line inside 'sft,reward'
        said = re.sub(r"(?<=\w), (?=\w)", ",", said)
    if error is not None:  # one of three optimisers says no more than "optimizer."
        stage = re.match(r"Error parsing (\w+\.)optimizer: optimizer\.", said)
        return (stage[1] if stage else "") + str(error)
    found = (re.fullmatch(theirs, said) for theirs, _ in REFUSALS)
    ours = (m.expand(text) for m, (_, text) in zip(found, REFUSALS, strict=True) if m)
    return f"{next(ours, said)}: {see}"


# -- of a configuration ---------------------------------------------------------------------------
def options_of(config: Any, prefix: str = "") -> Iterator[tuple[list[str], str | None, str]]:
    """(names, default, what it is) of every field; a switch has two names, and says its default."""
    says = dict(re.findall(r"^    (\w+): (.*)$", type(config).__doc__ or "", re.MULTILINE))
    hints = get_type_hints(type(config))
    for field, value in vars(config).items():
        name, text = field.replace("_", "-"), says.get(field, "")
        if is_dataclass(value):
            yield from options_of(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            names = [prefix + name, f"{prefix}no-{name}"]
            yield names, None, f"{text} [{'yes' if value else 'no'}]"
        else:
            choices = get_args(hints[field]) if get_origin(hints[field]) is Literal else ()
            default = "(none)" if value in (None, "", ()) else str(value)
            shown = f" [{', '.join(filter(None, choices))}]" if choices else ""
            yield [prefix + name], default, text + shown


def add_help(parser: argparse.ArgumentParser, config: Any, *, everything: bool) -> None:
    """Let the parser's help show the options: those of SHOWN, or all of them by stage."""
    rows = {row[0][0]: row for row in options_of(config)}
    groups = SHOWN
    if everything:
        groups = {}
        for name in rows:
            groups.setdefault(name.rpartition(".")[0] or "the run", []).append(name)
    for title, shown in groups.items():
        group = parser.add_argument_group(title)
        for names, default, text in map(rows.__getitem__, shown):
            look = {"action": "store_true"} if default is None else {"metavar": default}
            flags = [f"--{name}" for name in names]
            group.add_argument(*flags, help=text.replace("%", "%%"), **look)
