"""Published recipes as settings: what each changes of the defaults, which are PPO's.

Advantages, ratio, clip, aggregation and the kind of penalty are their authors'. What belongs to a
model and a reward stays ours: learning rate, beta, batch, and 8 responses to a prompt. A recipe is
where one starts: each of its settings is an option.
"""

from typing import Any

from minirlhf.errors import InputError

_GROUP = {"samples_per_prompt": 8, "whiten_advantages": False}
_GRPO = {**_GROUP, "advantages": "group", "aggregation": "seq-mean-token-mean"}
_K3 = {"kl_mode": "loss_k3_tok"}  # k3 of each token in the loss
_PPO: dict[str, dict[str, Any]] = {
    # Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, arXiv 1909.08593
    "ppo": {},
    # Shao et al. 2024, arXiv 2402.03300
    "grpo": {**_GRPO, **_K3},
    # Liu et al. 2025, arXiv 2503.20783: neither the sd of a group nor the length divides. (Their
    # own runs have no penalty; here it is GRPO's.)
    "dr-grpo": {
        **_GROUP,
        **_K3,
        "advantages": "group-mean",
        "aggregation": "seq-mean-token-sum-norm",
    },
    # Yu et al. 2025, arXiv 2503.14476: clip-higher, a mean over tokens, no penalty. A group of
    # equal rewards has no advantages here; DAPO draws another in its place
    "dapo": {**_GRPO, "aggregation": "token-mean", "clip_eps_high": 0.28, "kl_coef": 0.0},
    # Ahmadian et al. 2024, arXiv 2402.14740: one step a batch, the penalty in the reward
    "rloo": {
        **_GROUP,
        "advantages": "leave-one-out",
        "aggregation": "seq-mean-token-sum",
        "clip": "none",
        "epochs": 1,
        "minibatches": 1,
    },
    # Zheng et al. 2025, arXiv 2507.18071: one ratio a response, clipped very near to 1. (They
    # write no penalty out; here it is GRPO's.)
    "gspo": {**_GRPO, **_K3, "ratio": "sequence", "clip_eps": 3e-4, "clip_eps_high": 4e-4},
    # MiniMax 2025, arXiv 2506.13585: the weight is cut from above alone; no penalty. At 5 as in
    # ScaleRL (Khatri et al. 2025, arXiv 2510.13786)
    "cispo": {
        **_GRPO,
        "ratio": "clipped-weight",
        "clip": "book",
        "clip_eps_high": 4.0,
        "aggregation": "token-mean",
        "kl_coef": 0.0,
    },
}
RECIPES = {name: {"ppo": changes} for name, changes in _PPO.items()}  # fields of TrainConfig
# Rafailov et al. 2023, arXiv 2305.18290: from pairs, in the place of reward model and PPO
RECIPES["dpo"] = {"stages": "sft,dpo"}


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
