"""The stages as loops: supervised fine-tuning, reward model, PPO.

`minirlhf.train` names both this room and the function that runs all three: calling the module,
minirlhf.train(...), is calling `minirlhf.app.api.train`.
"""

import importlib
import sys
import types
from typing import Any


class _Train(types.ModuleType):
    def __call__(self, *args: Any, **changes: Any) -> Any:
        return importlib.import_module("minirlhf.app.api").train(*args, **changes)


sys.modules[__name__].__class__ = _Train
