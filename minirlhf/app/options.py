"""Options are the parameters of a command, or the fields of a dataclass, each with what the
docstring says of it; argparse makes values of what is typed, or one sentence.
"""

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from minirlhf.disk import read_toml, shorten
from minirlhf.errors import InputError

TABLES = read_toml(Path(__file__).with_suffix(".toml"))
SHOWN = TABLES["shown"]  # title -> options in `train --help`
REQUIRED = inspect.Parameter.empty


class Option(NamedTuple):
    name: str  # in Python: run, json_, ppo__iterations; or ppo.kl_coef
    hint: Any
    default: Any
    says: str
    is_flag: bool = True


def of_command(command: Callable) -> list[Option]:
    """Its parameters; those after a * are flags."""
    hints, says = get_type_hints(command), _said(command)
    return [
        Option(name, hints[name], p.default, says.get(name, ""), p.kind is p.KEYWORD_ONLY)
        for name, p in inspect.signature(command).parameters.items()
        if p.kind is not p.VAR_KEYWORD
    ]


def of_config(config: Any, prefix: str = "") -> Iterator[Option]:
    """The fields of a dataclass and of those in it; what they are now is the default."""
    hints, says = get_type_hints(type(config)), _said(type(config))
    for name, value in vars(config).items():
        if is_dataclass(value):
            yield from of_config(value, f"{prefix}{name}.")
        else:
            yield Option(prefix + name, hints[name], value, says.get(name, ""))


def _said(of: Any) -> dict[str, str]:
    return dict(re.findall(r"^    (\w+): (.*)$", inspect.getdoc(of) or "", re.MULTILINE))


def call(command: Callable[..., int], words: list[str], name: str) -> int:
    """The command with what was typed as its arguments."""
    options = of_command(command)
    parser = Parser(name, command, *(o.name.upper() for o in options if not o.is_flag))
    parser.add(options)
    return command(**parser.read(words))


class Parser(argparse.ArgumentParser):
    """Refuses by InputError, and has no defaults: it reads what was typed."""

    def __init__(self, name: str, command: Callable, *usage: str, **known: Any):
        self.lists: set[str] = set()
        super().__init__(
            f"minirlhf {name}",
            " ".join(["%(prog)s", *usage, "[OPTIONS]"]),
            (inspect.getdoc(command) or "").partition("\n\nArgs:")[0],
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 30),
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            **known,
        )

    def add(self, options: Iterable[Option], title: str | None = "", *, several=False) -> None:
        """Options under a title of the help, or None: not shown; each may take several values."""
        group = self.add_argument_group(title) if title else self
        for name, hint, default, says, is_flag in options:
            flag = "--" + name.strip("_").replace("__", ".").replace("_", "-")
            kind = hint if get_origin(hint) in (None, Literal) else get_args(hint)[0]
            needed = default is REQUIRED or not is_flag
            known: dict[str, Any] = {"metavar": name.upper() if needed else _shown(default)}
            if is_flag:
                known |= {"dest": name, "required": needed}
            if get_origin(kind) is Literal:
                known["choices"] = get_args(kind)
                says += f" [{', '.join(filter(None, get_args(kind)))}]"
            elif kind is bool:
                off = re.sub(r"([^-.][^.]*)$", r"no-\1", flag)
                says += f" [yes; {off}]" if default else ""
                known = {"dest": name, "action": "store_true"}
                self.add_argument(off, dest=name, action="store_false", help=argparse.SUPPRESS)
            else:
                known["type"] = _path if kind is Path else kind
            if get_origin(hint) is tuple:
                known["nargs"] = "*"
                self.lists.add(name)
            elif several and kind is not bool:
                known["nargs"] = "+"
            known["help"] = argparse.SUPPRESS if title is None else says.replace("%", "%%")
            group.add_argument(flag if is_flag else name, **known)

    def read(self, words: list[str]) -> dict[str, Any]:
        """The value of each option that was typed, by its name; or, by SystemExit, the help."""
        words = [re.sub(r"^--[\w.-]+", lambda of: of[0].replace("_", "-"), word) for word in words]
        flags = [word.partition("=")[0] for word in words if re.match(r"--\w", word)]
        unknown = [flag for flag in flags if flag not in self._option_string_actions]
        if not unknown:  # else what is missing may be there with a slip in its name
            found, unknown = self.parse_known_args(words)
        if unknown:
            came, command = unknown[0], self.prog.split()[-1]
            near = difflib.get_close_matches(came, self._option_string_actions, 1)
            near += [f"--corpus {shorten(came)}"] * (command == "train" and came[:1] != "-")
            see = f"perhaps {near[0]} is meant" if near else f"see {self.prog} --help"
            raise InputError(f"expected an option of {command}; got {shorten(came)!r}: {see}")
        return {name: tuple(x) if name in self.lists else x for name, x in vars(found).items()}

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", flush=True)  # argparse hides that it cannot write

    def error(self, message: str) -> None:
        for theirs, ours in TABLES["sentences"].items():
            message = re.sub(theirs, ours, message)
        raise InputError(f"{message}: see {self.prog} --help")


def _path(word: str) -> Path:
    if not word:
        raise ValueError("an empty name")
    return Path(word)


def _shown(default: Any) -> str:
    """What stands behind the name of an option in a help."""
    words = default if isinstance(default, tuple) else [default]
    return " ".join(str(word) for word in words if word not in (None, "")) or "(none)"
