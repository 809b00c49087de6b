"""A reward of one's own: which functions can be one, how it is found and called; and some to use.

The names of its parameters say what a function wants: text (prompt and response as one), response,
or (prompt, response); lists where the names are plural: texts, responses, (prompts, responses).
"""

import functools
import importlib.util
import inspect
import numbers
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from minirlhf.disk import read_text, shorten
from minirlhf.errors import InputError

Reward = str | Callable[..., Any]  # its name, or the function itself
LARGEST = 1e300  # size of a reward: sums of them do not overflow
_PLURALS = {"texts", "prompts", "responses", "completions", "replies"}
_RESPONSES = {"response", "completion", "reply", "answer"} | (_PLURALS - {"texts", "prompts"})


@dataclass(frozen=True)
class UserReward:
    """The user's function, checked: a finite number for each reply, or a refusal that quotes it."""

    function: Callable
    name: str = "reward"
    timeout: float = 0.0  # seconds that a call may take; 0: any
    then: str = "correct the function"  # what to do about an error in it

    def __post_init__(self):
        if len(self._wants) > 2:
            expected = "a function of text, (prompt, response), texts or (prompts, responses)"
            came = f"got the parameters {', '.join(self._wants)}, none with a default"
            raise self._refusal(expected, came)

    @property
    def _wants(self) -> list[str]:
        """Names of the parameters without a default; of a built-in function: text."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            return ["text"]
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [p.name for p in parameters if p.kind in kinds and p.default is p.empty] or ["text"]

    @property
    def guessed(self) -> str:
        """What it is given, where the names of its parameters do not say it; else ""."""
        names, one = " and ".join(self._wants), len(self._wants) == 1
        given = "the text, prompt and reply together," if one else "prompt and reply"
        said = f"{self.name}: gets {given} as {names}; a parameter named response gets the reply"
        return said * bool({*self._wants} - _PLURALS - _RESPONSES - {"text", "prompt", "question"})

    def __call__(self, prompts: list[str], responses: list[str], texts: list[str]) -> list[float]:
        """The reward of each reply; texts[i] is prompts[i] and responses[i] as one text."""
        columns = (texts,) if len(self._wants) == 1 else (prompts, responses)
        if self._wants[0] in _RESPONSES:  # (response, prompt), or a function of the response alone
            columns = (responses, prompts)[: len(self._wants)]
        if _PLURALS & set(self._wants):
            values = self._ask(texts[0], *map(list, columns))
            values = values.tolist() if hasattr(values, "tolist") else values
        else:
            values = [self._ask(*row) for row in zip(texts, *columns, strict=True)]
        if not isinstance(values, list | tuple) or len(values) != len(texts):
            expected = f"a list of {len(texts)} numbers, one a reply"
            raise self._refusal(expected, f"got {shorten(repr(values))}")
        return [self._number(value, text) for value, text in zip(values, texts, strict=True)]

    def _ask(self, text: str, *arguments: Any) -> Any:
        try:
            with _alarm(self.timeout) if self.timeout else nullcontext():
                return self.function(*arguments)
        except BaseException as error:  # the user's code may raise anything
            expected = f"a number for the text {shorten(text)!r}"
            raise self._refusal(expected, _raised(error)) from error

    def _number(self, value: Any, text: str) -> float:
        number = value.item() if getattr(value, "shape", None) == () else value
        if not isinstance(number, numbers.Real) or not abs(number) <= LARGEST:
            expected = f"a finite number of at most {LARGEST:g} for the text {shorten(text)!r}"
            raise self._refusal(expected, f"got {shorten(repr(value))}")
        return float(number)

    def _refusal(self, expected: str, came: str) -> InputError:
        return InputError(f"{self.name}: expected {expected}; {came}: {self.then}")


class Timeout(BaseException):
    """A call took too long. It is no Exception, which the user's code may catch."""


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise Timeout in the block after so many seconds."""

    def ring(*_):
        raise Timeout(f"longer than --reward-timeout {seconds:g}")

    before = signal.signal(signal.SIGALRM, ring)
    every = min(seconds, 1e8)  # again and again, should the code go on in spite of it
    signal.setitimer(signal.ITIMER_REAL, every, every)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def _raised(error: BaseException) -> str:
    """What was raised, and in which line of the user's file; Ctrl-C is raised again."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    ours = (__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours]
    frames = [f for f in frames if not f.filename.startswith("<frozen")]
    theirs = [f for f in frames if f.filename == frames[0].filename]
    where = f" in line {theirs[-1].lineno} of {theirs[-1].filename}" if theirs else ""
    return f"it raised {type(error).__name__}{where}: {shorten(str(error), 120)}"


def load_reward(reward: Reward, timeout: float = 0.0) -> UserReward:
    """A function, the one at "package.module:function" or "file.py:function", or one of ours."""
    if isinstance(reward, UserReward):
        return reward
    if callable(reward):
        return UserReward(reward, name_of(reward), timeout)
    if make := ready_made(reward):
        return UserReward(make(), reward, timeout)
    source, _, name = reward.rpartition(":")
    if source == "python":
        raise InputError(
            f"reward: expected the function {name} again, which the run was given in Python; got "
            "its name alone: pass reward= to minirlhf.open_run or minirlhf.resume"
        )
    if not (source and name):
        raise InputError(
            f"reward: expected file.py:function, module:function, {', '.join(READY_MADE)}; got "
            f"{shorten(reward)!r}: name one of these"
        )
    return UserReward(load_function(reward, "reward"), reward, timeout)


def load_function(place: str, what: str) -> Callable:
    """The function at "package.module:function" or "file.py:function"; `what` opens a refusal."""
    source, _, name = place.rpartition(":")
    if source.endswith(".py") and not Path(source).is_file():
        raise InputError(
            f"{what}: expected a Python file {source}; found none: check the path"
            + ", or say with --reward where it is now" * (what == "reward")
        )
    try:
        module = _import(source)
    except BaseException as error:  # the user's code may raise anything
        raise InputError(
            f"{what}: expected to import {source}; {_raised(error)}: check the name and the code"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        came = "found none" if function is None else f"got {shorten(repr(function))}"
        raise InputError(f"{what}: expected a function {name} in {source}; {came}: check the name")
    return function


def _import(source: str) -> ModuleType:
    """The module of that name or in that file; its own folder, or the current one, is searched."""
    in_file = source.endswith(".py")
    folder = str(Path(source).resolve().parent if in_file else Path.cwd())
    sys.path.insert(0, folder)
    try:
        if not in_file:
            importlib.invalidate_caches()
            return importlib.import_module(source)
        name = f"minirlhf_reward_{Path(source).stem}"
        spec = importlib.util.spec_from_file_location(name, source)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # pickle looks there
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(folder)


def module_file(module: str) -> str:
    """The file of a module, found without running it or its package; "" if it has none."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__file__", None) or ""
    importlib.invalidate_caches()
    places, spec = [os.getcwd(), *sys.path], None
    for end in re.finditer(r"\.|$", module):
        spec = PathFinder.find_spec(module[: end.start()], places)
        places = (spec and spec.submodule_search_locations) or []
    return (spec and spec.origin) or ""


def name_of(reward: Reward) -> str:
    """A name that finds the function from any directory; python:NAME where none does."""
    if not isinstance(reward, str):
        module, name = getattr(reward, "__module__", ""), getattr(reward, "__qualname__", "reward")
        found = getattr(sys.modules.get(module), name, None) is reward and module != "__main__"
        return f"{module}:{name}" if found else f"python:{name}"
    source, _, name = reward.rpartition(":")
    if reward.startswith("words:"):
        return f"words:{os.path.abspath(reward[len('words:') :])}"
    in_file = source.endswith(".py") and not ready_made(reward)
    return f"{os.path.abspath(source)}:{name}" if in_file else reward


# -- ready-made ----------------------------------------------------------------------------------
def vowel_share(text: str) -> float:
    """Vowels / letters; 0 without letters. Over-optimised, names become "aaaa"."""
    return _share(c in "aeiou" for c in text.lower() if c.isalpha())


def short_words(text: str) -> float:
    """Words of at most four letters / words; 0 without words."""
    return _share(len(word) <= 4 for word in _words(text))


def distinct_words(text: str) -> float:
    """Distinct words / words, regardless of case; 0 without words. Punishes repetition."""
    words = _words(text)
    return len(set(words)) / max(len(words), 1)


def _length_near(target: str) -> Callable:
    """Minus the distance of the reply's length in characters to a target."""
    if not re.fullmatch("[0-9]{1,9}", target):
        raise InputError(f"reward: expected length:N; got N = {shorten(target)!r}: give a number")
    return lambda prompt, response: -abs(len(response) - int(target))


def _matches(pattern: str) -> Callable:
    """Matches of a regular expression in the reply."""
    try:
        find = re.compile(pattern).findall
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"reward: expected a regular expression; got {shorten(pattern)!r} ({error}): correct it"
        ) from error
    return lambda prompt, response: len(find(response))


def _listed_words(path: str) -> Callable:
    """Words of the reply that stand in the file / words; 0 without words."""
    listed = set(_words(read_text(path)))
    return lambda prompt, response: _share(word in listed for word in _words(response))


READY_MADE = {  # name, up to the colon before its parameter -> what makes it of the parameter
    "length": lambda _: lambda prompt, response: len(response),
    "length:": _length_near,
    "regex:": _matches,
    "words:": _listed_words,
    **{f.__name__: lambda _, f=f: f for f in (vowel_share, short_words, distinct_words)},
}


def ready_made(reward: str) -> Callable[[], Callable] | None:
    """What makes the reward of this name; None: it is none of ours."""
    kind, colon, parameter = reward.removeprefix(f"{__name__}:").partition(":")
    make = READY_MADE.get(kind + colon)
    return make and functools.partial(make, parameter)


def _share(answers: Iterable[bool]) -> float:
    answers = list(answers)
    return sum(answers) / max(len(answers), 1)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())
