"""RLHF in NumPy and CuPy, written to be read: every operation beside its gradient."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {  # name -> where it is defined; imported at first use, so `import minirlhf` is cheap
    "GPTConfig": "nn.transformer",
    "init_transformer": "nn.transformer",
    "generate": "nn.sampling",
    "pad_batch": "train.batches",
    "policy_forward": "train.policy",
    "policy_backward": "train.policy",
    "summed_penalty": "rlhf.kl",
    "enumerate_responses": "exact.enumeration",
    "evaluate_exactly": "exact.optimum",
    "soft_optimum": "exact.optimum",
    "tree_log_probs": "exact.tree_policy",
    "check_pair": "gradcheck",
    "check_directions": "gradcheck",
    "TrainConfig": "runs.config",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minirlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minirlhf.{_HOME[name]}"), name)
