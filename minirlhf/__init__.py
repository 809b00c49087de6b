"""RLHF in NumPy and CuPy, written to be read: every operation beside its gradient.

    run = minirlhf.train(ppo={"iterations": 10})      supervised fine-tuning, reward model, PPO
    run.sample(["Where is my kettle?"])               replies of the trained policy
    run.score("Where is my kettle?", "On its way.")   the summed KL penalty, token by token

dir(minirlhf) lists the public names; help(minirlhf.TrainConfig) says what can be set.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {  # where it is defined: names; imported at first use, so `import minirlhf` is cheap
    "app.api": "Run open_run resume",
    "app.sweep": "sweep",
    "app.diagnose": "diagnose",
    "app.judge": "judge assert_descends",
    "runs.config": "TrainConfig",
    "nn.transformer": "GPTConfig init_transformer",
    "nn.sampling": "generate",
    "train.batches": "pad_batch",
    "train.policy": "policy_forward policy_backward",
    "rlhf.kl": "summed_penalty",
    "exact.enumeration": "enumerate_responses",
    "exact.optimum": "evaluate_exactly soft_optimum optimality_gap",
    "exact.tree_policy": "tree_log_probs",
    "gradcheck": "check_pair check_directions",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = ["train", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    if name == "train":  # the room of the loops, which can be called
        return importlib.import_module("minirlhf.train")
    if name not in _HOME:
        raise AttributeError(f"module 'minirlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minirlhf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
