"""Limits on tokens that follow from the data, and prompts held out that differ within them."""

import math
from dataclasses import replace

import numpy as np
from numpy.random import Generator

from minirlhf.runs.config import TrainConfig
from minirlhf.train.settings import ModelConfig
from minirlhf.worlds.files import split_world
from minirlhf.worlds.tokens import Tokenizer
from minirlhf.worlds.world import World

WHOLE = 95  # percent of the texts that are not cut by default
SHORT = 32  # tokens: shorter texts are never cut by default, they cost little
FLOATS = 1 << 27  # of one sequence in a forward and its backward: 512 MB


def fit_world(world: World, tokenizer: Tokenizer, config: TrainConfig, rng: Generator) -> World:
    """A world of files with its limits, split: prompts that are equal up to the cut stay together.

    Any other world as it is. `rng` is of `split_world`.
    """
    if not (config.corpus or config.pairs):
        return world
    world = _with_limits(world, tokenizer, config)
    limit = config.max_prompt_tokens or world.max_prompt_tokens

    def seen(prompt: str) -> bytes:
        return np.array(tokenizer.prompt_ids(prompt, limit), dtype=np.int32).tobytes()

    return split_world(world, rng=rng, key=seen)


def _with_limits(world: World, tokenizer: Tokenizer, config: TrainConfig) -> World:
    """The limits that are not set: 95 % of the texts are whole, if the memory allows."""
    set_by_user = config.max_prompt_tokens, config.max_response_tokens
    replies = [reply for _, *texts in world.demonstrations + (world.pairs or []) for reply in texts]
    wanted = [
        _enough([len(ids_of(text)) for text in texts])
        for ids_of, texts in (
            (tokenizer.prompt_ids, world.train_prompts),
            (tokenizer.response_ids, replies),
        )
    ]
    room = most_tokens(config.model, tokenizer.vocab_size)
    prompt, response = (given or n for given, n in zip(set_by_user, wanted, strict=True))
    response = set_by_user[1] or min(response, max(room // 2, room - prompt))
    prompt = set_by_user[0] or min(prompt, max(room // 2, room - response))
    chosen = [
        f"--max-{name}-tokens {n}"
        + (f" (as much as {FLOATS >> 18} MB hold of a sequence)" if n < enough else "")
        for name, n, given, enough in zip(
            ("prompt", "response"), (prompt, response), set_by_user, wanted, strict=True
        )
        if not given
    ]
    note = f"chosen, so that {WHOLE} % of the texts are whole: {', '.join(chosen)}"
    notes = world.notes + (note,) * bool(chosen)
    return replace(world, max_prompt_tokens=prompt, max_response_tokens=response, notes=notes)


def _enough(lengths: list[int]) -> int:
    """The 95th percentile, but at least SHORT if there are such texts."""
    return max(int(np.percentile(lengths, WHOLE, method="inverted_cdf")), min(max(lengths), SHORT))


def most_tokens(model: ModelConfig, vocab_size: int) -> int:
    """The longest sequence whose forward and backward keep within FLOATS.

    a n^2 + b n = FLOATS: attention weights of each block and their gradients, activations, logits.
    """
    a = model.n_head * (model.n_layer + 2)
    b = 17 * model.n_layer * model.d_model + 4 * vocab_size
    return max(4, int((math.sqrt(b * b + 4 * a * FLOATS) - b) / (2 * a)))
