"""minirlhf.train(config=None, *, reward="", progress=True, **changes) runs the three stages.

`minirlhf.train` names both that function and this room, the stages as loops: calling the module is
calling `minirlhf.app.api.train`, whose help says what it takes.
"""

import importlib
import sys
import types
from typing import Any


class _Train(types.ModuleType):
    def __call__(self, *args: Any, **changes: Any) -> Any:
        return importlib.import_module("minirlhf.app.api").train(*args, **changes)


sys.modules[__name__].__class__ = _Train
