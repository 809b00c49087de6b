"""Published recipes as settings, from recipes.toml: what each changes of the defaults, and why."""

import tomllib
from pathlib import Path
from typing import Any

from minirlhf.errors import InputError

# name -> fields of TrainConfig
RECIPES: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)


def recipe(name: str) -> dict[str, Any]:
    """The fields of TrainConfig that a recipe sets.

    Raises:   InputError: there is none of this name.
    """
    if name not in RECIPES:
        raise InputError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}: choose one")
    return RECIPES[name]


def says(name: str, config: Any) -> str:
    """What a recipe has set, as one would type it, and what something else overruled.

    Args:     config: the TrainConfig that came of it.
    """
    lines: dict[bool, list[str]] = {True: [], False: []}
    for stage, changes in recipe(name).items():
        nested = isinstance(changes, dict)
        of = getattr(config, stage) if nested else config
        for field, value in (changes if nested else {stage: changes}).items():
            switch = "no-" if value is False else ""
            flag = f"--{f'{stage}.' if nested else ''}{switch}{field.replace('_', '-')}"
            words = flag if isinstance(value, bool) else f"{flag} {value}"
            lines[getattr(of, field) == value].append(words)
    nothing = "nothing" if lines[False] else "the defaults"
    said = f"recipe {name}: {' '.join(lines[True]) or nothing}"
    return said + (f"; overruled: {' '.join(lines[False])}" if lines[False] else "")
