"""minirlhf: RLHF policy optimisation, from scratch, with the exact gradients

  minirlhf train                  SFT, reward model and PPO on the support world; before and after
  minirlhf resume RUN             go on from the last checkpoint
  minirlhf sweep --beta 0 0.2 --seed 1 2          a run for each choice, side by side; the frontier
  minirlhf score RUN --prompt .. --response ..    log pi_theta - log pi_ref, token by token
  minirlhf sample RUN --prompt ..                 replies of policy and reference side by side
  minirlhf report RUN..           one page: replies token by token, curves and how to read them
  minirlhf diagnose RUN           what went wrong in a run or another program's log, with evidence
  minirlhf exact                  the exact optimum, KL and gradients beside every estimate
  minirlhf judge FUNCTION         what your own KL term, loss or advantages descend
  minirlhf check                  check every gradient of the package

minirlhf COMMAND --help shows the options of a command. With MINIRLHF_TRACEBACK=1 in the environment
a refusal shows where in the program it came from.
"""

import importlib
import os
import sys

from minirlhf import __version__
from minirlhf.errors import InputError

# Nothing more is imported until a command is known: --version answers at once, and so does Ctrl-C.
COMMANDS = {  # name -> module and function; its arguments are the options, its docstring the help
    "train": "commands:train",
    "resume": "commands:resume",
    "sweep": "sweep:sweep_command",
    "score": "commands:score",
    "sample": "commands:sample",
    "report": "commands:report",
    "diagnose": "diagnose:diagnose_command",
    "exact": "exact:exact_command",
    "judge": "judge:judge_command",
    "check": "check:check_command",
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit status 0: done; 1: a check failed, or a run; 2: wrong input; 130: Ctrl-C.

    Args:     arguments: None: those of this process, whose signals are then ours as well.
    """
    is_program, said = arguments is None, ""
    arguments = sys.argv[1:] if is_program else arguments
    try:
        if is_program:
            _on_interrupt("leave")
        _mend_streams()
        status = run_command(arguments)
        sys.stdout.flush()
    except SystemExit:  # a help has been shown
        status = 0
    except BrokenPipeError:  # the reader of our output has gone: `minirlhf check | head`
        status = 1
    except KeyboardInterrupt as stop:  # a run says how it goes on
        status, said = 130, f"interrupted{f'; {stop}' if stop.args else ''}"
    except (InputError, MemoryError, OSError) as error:
        if os.environ.get("MINIRLHF_TRACEBACK"):
            raise
        status, said = getattr(error, "status", 2), _sentence(error)
    if is_program:
        _on_interrupt("ignore")
    _leave_message(said)
    exec("")  # one that was interrupted would let Python end by the signal, whatever the status
    sys.exit(status)


def run_command(arguments: list[str]) -> int:
    """Dispatch on the first word."""
    name, *rest = arguments or ["help"]
    for word in arguments:
        if any("\ud800" <= c <= "\udfff" for c in word):  # how Python keeps a byte that is no text
            raise InputError(f"expected text in UTF-8; got {word!r}: rename the file, or retype it")
    if name in ("-h", "--help", "help"):
        print(__doc__, end="")
        return 0
    if name in ("-V", "--version", "version"):
        print(f"minirlhf {__version__}")
        return 0
    if name not in COMMANDS:
        raise InputError(
            f"expected one of {', '.join(COMMANDS)}; got {name[:60]!r}: see minirlhf --help"
        )
    module, _, function = COMMANDS[name].partition(":")
    command = getattr(importlib.import_module(f"minirlhf.app.{module}"), function)
    from minirlhf.app.options import call
    from minirlhf.memory import keep_freed_memory
    from minirlhf.ranks import n_ranks, together

    keep_freed_memory()
    _on_interrupt("raise")
    with together():
        if n_ranks() > 1 and name not in ("train", "resume"):
            raise InputError(
                f"mpiexec: expected minirlhf train or resume, which several processes share; got "
                f"{name}: run it without mpiexec"
            )
        if name in ("train", "sweep"):  # a file may hold the options that its flags leave open
            return command(rest)
        return call(command, rest, name)


# -- Ctrl-C, and streams that are closed or full --------------------------------------------------
def _on_interrupt(answer: str) -> None:
    """What Ctrl-C does: leave on the spot while libraries are imported, which may swallow an
    exception; raise one; be ignored once all is done. Ignored from the beginning it stays so.
    """
    import signal

    now, raises = signal.getsignal(signal.SIGINT), signal.default_int_handler
    if now is _interrupted or (now is raises and answer != "raise"):
        handlers = {"leave": _interrupted, "raise": raises, "ignore": signal.SIG_IGN}
        signal.signal(signal.SIGINT, handlers[answer])
        sys.unraisablehook = _unraisable


def _interrupted(*_) -> None:
    os.write(2, b"minirlhf: interrupted\n")
    os._exit(130)


def _unraisable(raised) -> None:
    """An exception in a destructor is lost, but not Ctrl-C."""
    _interrupted() if raised.exc_type is KeyboardInterrupt else sys.__unraisablehook__(raised)


def _mend_streams() -> None:
    """Output that was closed goes nowhere; what the terminal cannot show becomes a "?"."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def _sentence(error: Exception) -> str:
    """What to tell of an error that is no bug."""
    if isinstance(error, MemoryError):
        error = InputError(
            f"expected enough memory; got {str(error) or 'none'}: choose fewer --workers, or a "
            "smaller --model.d-model, --ppo.batch-size or --ppo.micro-batch-size"
        )
    elif isinstance(error, OSError):
        error = InputError(
            f"{error.filename or 'output'}: expected it to be usable; got "
            f"{error.strerror or error}: free some space or name another"
        )
    return str(error)


def _leave_message(said: str) -> None:
    """Say it, and let what cannot be written any more go nowhere, not into a traceback."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"minirlhf: {said}\n" if said else "")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
