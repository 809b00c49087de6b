"""Limits on tokens that follow from the data, and prompts held out that differ within them."""

import math
from array import array
from dataclasses import replace

import numpy as np
from numpy.random import Generator

from minirlhf.nn.transformer import kept_floats
from minirlhf.runs.config import ModelConfig, TrainConfig
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
    world = world.continued() if tokenizer.sep is None else world
    prompts = [len(tokenizer.prompt_ids(p)) for p in world.train_prompts + world.heldout_prompts]
    replies = [len(tokenizer.response_ids(text)) for _, text in world.demonstrations]
    judged = [text for _, *texts in world.pairs or [] for text in texts]
    in_pairs = [len(tokenizer.response_ids(text)) for text in judged]
    if of_files := bool(config.corpus or config.pairs):
        room = most_tokens(config.model, tokenizer.vocab_size)
        most_prompt, most, notes = _chosen(config, room, prompts, replies + in_pairs)
    else:
        most_prompt = config.max_prompt_tokens or world.max_prompt_tokens
        most, notes = config.max_response_tokens or world.max_response_tokens, []
    unended = "without a stop token; see --max-response-tokens"
    for what, lengths, limit, further in (
        ("prompts", prompts, most_prompt, "see --max-prompt-tokens"),
        ("demonstrations", replies, most, unended),
        ("replies in pairs", in_pairs, most, unended),
    ):
        if cut := sum(length > limit for length in lengths):
            notes.append(f"cut {cut} of {len(lengths)} {what} to {limit} tokens, {further}")

    def as_cut(prompt: str) -> bytes:
        return bytes(array("i", tokenizer.prompt_ids(prompt, most_prompt)))

    if of_files:
        world = split_world(world, rng=rng, key=as_cut)
    else:
        trained = set(map(as_cut, world.train_prompts))
        if again := sum(as_cut(prompt) in trained for prompt in world.heldout_prompts):
            notes.append(f"{again} held-out prompts are, as they are cut, also among training's")
    limits = {"max_prompt_tokens": most_prompt, "max_response_tokens": most}
    return replace(world, **limits, notes=(*world.notes, *notes))


def _chosen(config: TrainConfig, room: int, prompts: list[int], replies: list[int]) -> tuple:
    """The limits that are set; for the others those that leave 95 % of the lengths whole, or less.

    Less where they exceed the room: then half of it is for the response. And a note on the choice.
    """
    prompt = config.max_prompt_tokens or _enough(prompts)
    response = config.max_response_tokens or _enough(replies)
    whole = prompt, response
    least = 3 if config.max_response_tokens else room // 2  # a prompt leaves half, if it may
    response = config.max_response_tokens or min(response, max(2, room // 2, room - prompt))
    prompt = config.max_prompt_tokens or min(prompt, max(3, least, room - response))
    flags = [f"--max-prompt-tokens {prompt}"] * (not config.max_prompt_tokens)
    flags += [f"--max-response-tokens {response}"] * (not config.max_response_tokens)
    why = f"{WHOLE} % of the texts are whole"
    if (prompt, response) != whole:
        holds = "the model's positions" if room == config.model.n_ctx else f"{FLOATS >> 18} MB"
        why = f"{holds} hold a sequence ({why} with {whole[0]} and {whole[1]})"
    return prompt, response, [f"chosen so that {why}: {', '.join(flags)}"] * bool(flags)


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
