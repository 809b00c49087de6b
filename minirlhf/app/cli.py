"""The command line: minirlhf train | resume | score | sample | exact | check.

Nothing but this file is imported until a command is known: `minirlhf --version` answers at once.
"""

import importlib
import os
import sys

from minirlhf import __version__
from minirlhf.errors import InputError

USAGE = """\
minirlhf: RLHF policy optimisation, from scratch, with the exact gradients

  minirlhf train                  SFT, reward model and PPO on the support world; before and after
  minirlhf resume RUN             go on from the last checkpoint
  minirlhf score RUN --prompt .. --response ..    log pi_theta - log pi_ref, token by token
  minirlhf sample RUN --prompt ..                 replies of policy and reference side by side
  minirlhf exact                  the exact optimum, KL and gradients beside every estimate
  minirlhf check                  check every gradient of the package

minirlhf COMMAND --help shows the options of a command. With MINIRLHF_TRACEBACK=1 in the environment
a refusal shows where in the program it came from.
"""
COMMANDS = {  # name -> module and function; its arguments are the options, its docstring the help
    "train": "commands:train",
    "resume": "commands:resume",
    "score": "commands:score",
    "sample": "commands:sample",
    "exact": "exact:exact_command",
    "check": "check:check_command",
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit status 0: done; 1: a check failed; 2: the input was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if hasattr(sys.stdout, "reconfigure"):  # what the terminal cannot show becomes a "?"
        sys.stdout.reconfigure(errors="replace")
    try:
        status = run_command(arguments)
    except InputError as error:
        if os.environ.get("MINIRLHF_TRACEBACK"):
            raise
        print(f"minirlhf: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt as stop:  # a run says how it goes on
        print(f"minirlhf: interrupted{f'; {stop}' if stop.args else ''}", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output has gone: `minirlhf check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def run_command(arguments: list[str]) -> int:
    """Dispatch on the first word."""
    name, *rest = arguments or ["help"]
    if name in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if name in ("-V", "--version", "version"):
        print(f"minirlhf {__version__}")
        return 0
    if name not in COMMANDS:
        raise InputError(
            f"expected one of {', '.join(COMMANDS)}; got {name!r}: see minirlhf --help"
        )
    module, _, function = COMMANDS[name].partition(":")
    command = getattr(importlib.import_module(f"minirlhf.app.{module}"), function)
    from minirlhf.backend import keep_freed_memory

    keep_freed_memory()
    if name == "train":  # a file may hold the options that its flags leave open
        return command(rest)
    import tyro

    return tyro.cli(command, args=rest, prog=f"minirlhf {name}")
