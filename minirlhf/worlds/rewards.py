"""A reward of one's own: which functions can be one, how it is found and called; and three to use.

    --reward minirlhf.worlds.rewards:vowel_share     or file.py:function

The names of its parameters say what a function wants: text (prompt and response as one text), or
(prompt, response); lists of them where the names are plural: texts, (prompts, responses).
"""

import importlib
import importlib.util
import inspect
import numbers
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from minirlhf.disk import shorten
from minirlhf.errors import InputError

_PLURALS = {"texts", "prompts", "responses", "completions", "replies"}


@dataclass(frozen=True)
class UserReward:
    """The user's function, checked: a finite number for each reply.

    Raises:   InputError: the function takes something else, raised, or returned something else;
                  quotes the text and the value.
    """

    function: Callable
    name: str = "reward"

    def __post_init__(self):
        if len(self._wants) > 2:
            raise InputError(
                f"{self.name}: expected a function of text, (prompt, response), texts or "
                f"(prompts, responses); got the parameters {', '.join(self._wants)}: give those "
                "beyond two a default"
            )

    @property
    def _wants(self) -> list[str]:
        """Names of the parameters without a default; of a built-in function: text."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            return ["text"]
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [p.name for p in parameters if p.kind in kinds and p.default is p.empty] or ["text"]

    def __call__(self, prompts: list[str], responses: list[str], texts: list[str]) -> list[float]:
        """The reward of each reply; texts[i] is prompts[i] and responses[i] as one text."""
        columns = (texts,) if len(self._wants) == 1 else (prompts, responses)
        if _PLURALS & set(self._wants):
            values = self._ask(texts[0], *map(list, columns))
            values = values.tolist() if hasattr(values, "tolist") else values
        else:
            values = [self._ask(*row) for row in zip(texts, *columns, strict=True)]
        if not isinstance(values, list | tuple) or len(values) != len(texts):
            raise InputError(
                f"{self.name}: expected a list of {len(texts)} numbers, one a reply; got "
                f"{shorten(repr(values))}: correct the function"
            )
        return [self._number(value, text) for value, text in zip(values, texts, strict=True)]

    def _ask(self, text: str, *arguments: Any) -> Any:
        try:
            return self.function(*arguments)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise InputError(
                f"{self.name}: expected a number for the text {shorten(text)!r}; it raised "
                f"{type(error).__name__}: {shorten(str(error))}: correct the function"
            ) from error

    def _number(self, value: Any, text: str) -> float:
        number = value.item() if getattr(value, "shape", None) == () else value
        if not isinstance(number, numbers.Real) or not abs(number) <= sys.float_info.max:
            raise InputError(
                f"{self.name}: expected a finite number for the text {shorten(text)!r}; got "
                f"{shorten(repr(value))}: correct the function"
            )
        return float(number)


def absolute_reward(where: str) -> str:
    """The same function, named so that it is found from any directory if it lies in a file."""
    source, _, name = where.rpartition(":")
    return f"{os.path.abspath(source)}:{name}" if source.endswith(".py") else where


def load_reward(reward: str | Callable) -> UserReward:
    """A function, or the one at "package.module:function" or "file.py:function", checked.

    The module may lie in the current directory.

    Raises:   InputError: there is no such module, file or function, its import fails, or it cannot
                  be called.
    """
    if callable(reward):
        return UserReward(reward)
    source, _, name = reward.rpartition(":")
    if source == "python":
        raise InputError(
            f"reward: expected the function {name} again, which the run was given in Python; got "
            "its name alone: pass reward= to minirlhf.open_run or minirlhf.resume"
        )
    if not (source and name):
        raise InputError(
            f"reward: expected module:function or file.py:function; got {reward!r}: for example "
            "minirlhf.worlds.rewards:vowel_share"
        )
    if source.endswith(".py") and not Path(source).is_file():
        raise InputError(f"reward: expected a Python file {source}; found none: check the path")
    try:
        module = _import(source)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise InputError(
            f"reward: expected to import {source}; it raised {type(error).__name__}: "
            f"{shorten(str(error), 120)}: check the name and the code"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        came = "found none" if function is None else f"got {shorten(repr(function))}"
        raise InputError(f"reward: expected a function {name} in {source}; {came}: check the name")
    return UserReward(function, reward)


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


def name_of(reward: str | Callable) -> str:
    """module:function where the function can be found again; python:NAME where it cannot."""
    if isinstance(reward, str):
        return absolute_reward(reward)
    module, name = getattr(reward, "__module__", ""), getattr(reward, "__qualname__", "reward")
    found = getattr(sys.modules.get(module), name, None) is reward and module != "__main__"
    return f"{module}:{name}" if found else f"python:{name}"


# -- three to begin with: text -> number in [0, 1] ------------------------------------------------
def vowel_share(text: str) -> float:
    """Vowels / letters; 0 without letters. Over-optimised, names become "aaaa"."""
    letters = [c for c in text.lower() if c.isalpha()]
    return sum(c in "aeiou" for c in letters) / max(len(letters), 1)


def short_words(text: str) -> float:
    """Words of at most four letters / words; 0 without words."""
    words = _words(text)
    return sum(len(word) <= 4 for word in words) / max(len(words), 1)


def distinct_words(text: str) -> float:
    """Distinct words / words, regardless of case; 0 without words. Punishes repetition."""
    words = _words(text)
    return len(set(words)) / max(len(words), 1)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())
