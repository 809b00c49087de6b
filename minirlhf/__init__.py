"""RLHF in NumPy and CuPy, written to be read: every operation beside its gradient.

    run = minirlhf.train(ppo={"iterations": 10})      supervised fine-tuning, reward model, PPO
    run.sample(["Where is my kettle?"])               replies of the trained policy
    run.score("Where is my kettle?", "On its way.")   the summed KL penalty, token by token

dir(minirlhf) lists the public names; help(minirlhf.TrainConfig) says what can be set.
"""

import importlib

__version__ = "0.1.0"

_HOME = {  # name -> where it is defined; imported at first use, so `import minirlhf` is cheap
    "Run": "app.api",
    "open_run": "app.api",
    "resume": "app.api",
    "sweep": "app.sweep",
    "diagnose": "app.diagnose",
    "TrainConfig": "runs.config",
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
    "optimality_gap": "exact.optimum",
    "tree_log_probs": "exact.tree_policy",
    "judge": "app.judge",
    "assert_descends": "app.judge",
    "check_pair": "gradcheck",
    "check_directions": "gradcheck",
}
__all__ = ["train", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    if name == "train":  # the room of the loops, which can be called
        return importlib.import_module("minirlhf.train")
    if name not in _HOME:
        raise AttributeError(f"module 'minirlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minirlhf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
