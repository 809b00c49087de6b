"""Limits on tokens that follow from the data, and prompts held out that differ within them."""

import math
from array import array
from dataclasses import replace
from itertools import chain

import numpy as np
from numpy.random import Generator

from minirlhf.nn.transformer import kept_floats
from minirlhf.runs.config import TrainConfig
from minirlhf.train.settings import ModelConfig
from minirlhf.worlds.files import split_world
from minirlhf.worlds.tokens import Tokenizer
from minirlhf.worlds.world import World

WHOLE = 95  # percent of the texts that the default limits leave whole
SHORT = 32  # tokens: no default limit cuts a shorter text, it would save little
FLOATS = 1 << 27  # of one sequence in a forward and its backward: 512 MB


def fit_world(world: World, tokenizer: Tokenizer, config: TrainConfig, rng: Generator) -> World:
    """A world with its limits, and notes on what they cut. One of files is split.

    Prompts that are equal as cut stay together. `rng` is that of `split_world`.
    """
    prompts = [len(tokenizer.prompt_ids(p)) for p in world.train_prompts + world.heldout_prompts]
    rows = [texts for _, *texts in world.demonstrations + (world.pairs or [])]
    replies = [[len(tokenizer.response_ids(text)) for text in texts] for texts in rows]
    if of_files := bool(config.corpus or config.pairs):
        world = _with_limits(world, prompts, list(chain(*replies)), tokenizer.vocab_size, config)
    else:
        world = replace(
            world,
            max_prompt_tokens=config.max_prompt_tokens or world.max_prompt_tokens,
            max_response_tokens=config.max_response_tokens or world.max_response_tokens,
        )
    most_prompt, most = world.max_prompt_tokens, world.max_response_tokens
    unended, n = "without a stop token; see --max-response-tokens", len(world.demonstrations)
    table = (
        ("prompts", prompts, most_prompt, "see --max-prompt-tokens"),
        ("demonstrations", list(chain(*replies[:n])), most, unended),
        ("replies in pairs", list(chain(*replies[n:])), most, unended),
    )
    notes = [
        f"cut {cut} of {len(lengths)} {what} to {limit} tokens, {further}"
        for what, lengths, limit, further in table
        if (cut := sum(length > limit for length in lengths))
    ]

    def as_cut(prompt: str) -> bytes:
        return bytes(array("i", tokenizer.prompt_ids(prompt, most_prompt)))

    if of_files:
        world = split_world(world, rng=rng, key=as_cut)
    else:
        trained = set(map(as_cut, world.train_prompts))
        if again := sum(as_cut(prompt) in trained for prompt in world.heldout_prompts):
            notes.append(f"{again} held-out prompts are, as they are cut, also among training's")
    return replace(world, notes=(*world.notes, *notes))


def _with_limits(
    world: World, prompts: list[int], replies: list[int], vocab_size: int, config: TrainConfig
) -> World:
    """The limits that are set; for the others those that leave 95 % of the texts whole, or less.

    Less where a sequence would take too much memory: then half of it is for the response.

    Args:     prompts, replies: lengths in tokens.
    """
    prompt = config.max_prompt_tokens or _enough(prompts)
    response = config.max_response_tokens or _enough(replies)
    whole, room = (prompt, response), most_tokens(config.model, vocab_size)
    least = 3 if config.max_response_tokens else room // 2  # a prompt leaves half, if it may
    response = config.max_response_tokens or min(response, max(2, room // 2, room - prompt))
    prompt = config.max_prompt_tokens or min(prompt, max(3, least, room - response))
    chosen = [
        f"--max-{name}-tokens {n}"
        for name, n in (("prompt", prompt), ("response", response))
        if not getattr(config, f"max_{name}_tokens")
    ]
    why = f"{WHOLE} % of the texts are whole"
    if (prompt, response) != whole:
        holds = "the model's positions" if room == config.model.n_ctx else f"{FLOATS >> 18} MB"
        why = f"{holds} hold a sequence ({why} with {whole[0]} and {whole[1]})"
    notes = [f"chosen so that {why}: {', '.join(chosen)}"] if chosen else []
    limits = {"max_prompt_tokens": prompt, "max_response_tokens": response}
    return replace(world, **limits, notes=(*world.notes, *notes))


def _enough(lengths: list[int]) -> int:
    """The 95th percentile, or SHORT where that is more and there are such texts."""
    percentile = int(np.percentile(lengths, WHOLE, method="inverted_cdf"))
    return max(percentile, min(max(lengths), SHORT))


def most_tokens(model: ModelConfig, vocab_size: int) -> int:
    """The longest sequence, n tokens, that takes at most FLOATS = a n^2 + b n and fits the model.

    a n^2: attention weights of each block, and two more of the backward; b n: activations, logits.
    """
    a = model.n_head * (model.n_layer + 2)
    b = kept_floats(model, 0) + 4 * vocab_size
    n = max(4, int((math.sqrt(b * b + 4 * a * FLOATS) - b) / (2 * a)))
    return min(n, model.n_ctx or n)
