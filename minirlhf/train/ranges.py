"""Which numbers a setting may have."""

import math
from typing import Any

from minirlhf.errors import InputError

_RULES = {
    "at_least_1": (lambda x: x >= 1, "at least 1"),
    "at_least_0": (lambda x: x >= 0, "at least 0"),
    "above_0": (lambda x: x > 0, "more than 0"),
    "shares": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "decays": (lambda x: 0 <= x < 1, "at least 0 and less than 1"),
}


def check_numbers(config: Any, where: str, **names_of: tuple[str, ...]) -> None:
    """Check fields of a dataclass: `names_of` says which follow which of _RULES; all are finite.

    Args:
        where: what stands before the name of a field in the message, like "ppo.".
    Raises:
        InputError: a number is out of its range.
    """
    for rule, names in names_of.items():
        in_range, expected = _RULES[rule]
        for name in names:
            value = getattr(config, name)
            if not (math.isfinite(value) and in_range(value)):
                raise InputError(
                    f"{where}{name}: expected {expected}; got {value}: choose such a number"
                )
