"""What a run takes of memory, told from its sizes alone: at least so many bytes, by option."""

import math
from dataclasses import replace

from minirlhf.memory import require_memory
from minirlhf.nn.sampling import PIECE_FLOATS
from minirlhf.nn.transformer import GPTConfig, kept_floats, parameter_shapes
from minirlhf.runs.config import TrainConfig
from minirlhf.tree import tree_leaves

COPIES = 5  # of the policy: itself, its gradient, two moments, the reference
PROCESS = 20 << 20  # bytes of a worker's own, measured: 27 to 41 MB


def check_run(config: TrainConfig, gpt: GPTConfig, longest: tuple[int, int]) -> None:
    """Refuse a run that the memory at hand cannot hold. (On a GPU memory is another one.)

    Args:     config: with the number of workers resolved.
              longest: tokens of a prompt and of a response.
    """
    if config.device != "cpu":
        return
    C, T, shapes = gpt.d_model, sum(longest), parameter_shapes(replace(gpt, n_layer=1))
    blocks = 4 * gpt.n_layer * sum(map(math.prod, tree_leaves(shapes["blocks"])))
    positions = 4 * math.prod(shapes.get("wpe", (0,)))
    vocabulary = 4 * gpt.vocab_size * C * (1 if gpt.tied else 2)
    activations = 4 * T * kept_floats(gpt, T)  # of the longest sequence
    in_worker = PROCESS + blocks + positions + vocabulary + activations
    model, ppo = config.reward_model, config.ppo
    drawn = {  # at once, but one after the other
        "--ppo.batch-size": ppo.batch_size,
        "--eval-prompts": config.eval_prompts,
        "--reward-model.n-normalize": model.n_normalize,
    }
    layers = 0 if config.reward or model.init == "reference" else model.n_layer
    if not (config.pairs or config.reward):
        drawn["--reward-model.n-pairs"] = model.n_pairs
        drawn["--reward-model.n-heldout-pairs"] = model.n_heldout_pairs
    most = max(drawn, key=drawn.__getitem__)
    require_memory(
        {
            "--model.d-model, --model.n-layer": COPIES * blocks,
            "--model.n-ctx": COPIES * positions,
            "--max-prompt-tokens, --max-response-tokens": activations,
            "--vocab-size": COPIES * vocabulary,
            "--reward-model.n-layer": COPIES * 48 * layers * C * C,
            "--workers": (config.workers - 1) * in_worker,
            "--sft.batch-size": 100 * config.sft.batch_size,
            most: samples_bytes(gpt, drawn[most], longest),
        }
    )


def samples_bytes(gpt: GPTConfig, n: int, longest: tuple[int, int]) -> int:
    """Of n responses: their tokens and hidden states, and a piece of them while it is drawn."""
    (P, R), C = longest, gpt.d_model
    P //= 2  # prompts that are half as long as they may be
    of_row = P * kept_floats(gpt, P) + 2 * gpt.n_layer * C * (P + R) + 4 * gpt.vocab_size
    return 4 * min(n * of_row, max(of_row, PIECE_FLOATS)) + n * (20 + 4 * C) * R
