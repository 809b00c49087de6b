"""The stages as loops; to call the module, `minirlhf.train(..)`, is to call `app.api.train`."""

import importlib
import inspect
import sys
import types
from typing import Any


class _Train(types.ModuleType):
    def __call__(self, *args: Any, **changes: Any) -> Any:
        return importlib.import_module("minirlhf.app.api").train(*args, **changes)

    @property
    def __doc__(self) -> str:
        train = importlib.import_module("minirlhf.app.api").train
        return f"minirlhf.train{inspect.signature(train)}\n\n{inspect.getdoc(train)}"


sys.modules[__name__].__class__ = _Train
