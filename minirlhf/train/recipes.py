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
