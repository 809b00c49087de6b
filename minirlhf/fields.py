"""Frozen dataclasses of settings: every field has the type, choice and range that it asks for."""

import math
import re
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from minirlhf.errors import InputError

_RULES = {
    "at_least_1": (lambda x: x >= 1, "at least 1"),
    "at_least_2": (lambda x: x >= 2, "at least 2"),
    "at_least_0": (lambda x: x >= 0, "at least 0"),
    # float32 holds no positive number much below or above: 1e-46 would become 0, 1e39 inf
    "above_0": (lambda x: 1e-37 <= x <= 1e37, "at least 1e-37 and at most 1e37"),
    "shares": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "decays": (lambda x: 0 <= x < 1, "at least 0 and less than 1"),
    # of labels; from a half on a loss prefers what was rejected
    "below_half": (lambda x: 0 <= x < 0.5, "at least 0 and less than 0.5"),
}


def check_fields(config: Any, where: str, **names_of: tuple[str, ...]) -> None:
    """Check every field of a frozen dataclass: its type, its choices, its range; all are finite.

    A dict in the place of a nested dataclass becomes one, over the defaults of that field.

    Args:     where: what stands before the name of a field in a message, like "ppo.".
              names_of: which fields follow which of _RULES.
    Raises:   InputError: a field has another type or is out of its range.
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        value = _typed(getattr(config, f.name), hints[f.name], f, where + f.name)
        object.__setattr__(config, f.name, value)  # frozen for everybody else
    for rule, names in names_of.items():
        in_range, expected = _RULES[rule]
        for name in names:
            value = getattr(config, name)
            if not (math.isfinite(value) and in_range(value)):
                raise InputError(
                    f"{where}{name}: expected {expected}; got {value}: choose such a number"
                )


def with_fields(default: Any, values: dict[str, Any], where: str) -> Any:
    """The dataclass with other values of some fields; a dict of those of a nested one.

    Raises:   InputError: a name is no field, or as `check_fields`.
    """
    names = [f.name for f in fields(default)]
    for name in values:
        if name not in names:
            raise InputError(
                f"{where}: expected one of {', '.join(names)}; got {name!r}: correct the name"
            )
    nested = {
        name: with_fields(
            getattr(default, name), value, f"{where}.{name}".removeprefix("train").strip(".")
        )
        for name, value in values.items()
        if isinstance(value, dict) and is_dataclass(getattr(default, name))
    }
    return replace(default, **values | nested)


def _typed(value: Any, hint: Any, f: Field, where: str) -> Any:
    """The value in the type of its field: a whole number as float, a string as Path."""
    choices = get_args(hint)
    if is_dataclass(hint):
        value = with_fields(f.default, value, where) if isinstance(value, dict) else value
        fits, expected = isinstance(value, hint), f"a table, {hint.__name__} or a dict"
    elif get_origin(hint) is Literal:
        fits, expected = value in choices, f"one of {', '.join(choices)}"
    elif get_origin(hint) is tuple:
        fits = isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)
        value, expected = tuple(value) if fits else value, "a list of texts"
    elif value is None and type(None) in choices:
        return None
    else:
        kind = choices[0] if choices else hint
        accepted = {float: (int, float, np.number), int: (int, np.integer), Path: (str, Path)}
        is_flag = isinstance(value, bool | np.bool_)
        no_utf8 = kind in (str, Path) and re.search("[\ud800-\udfff]", str(value))
        no_path = kind is Path and (value == "" or "\0" in str(value))
        too_large = isinstance(value, int) and not -(2**63) <= value < 2**63
        is_kind = isinstance(value, accepted.get(kind, (kind, np.bool_)))
        fits = is_flag == (kind is bool) and is_kind and not (no_utf8 or no_path or too_large)
        value = kind(value) if fits else value
        expected = "a path" if kind is Path else kind.__name__
    if not fits:
        raise InputError(f"{where}: expected {expected}; got {value!r}: correct it")
    return value
