"""What fits: limits on tokens that follow from the data, held-out prompts that differ within them,
and what a run takes of memory, told from its sizes alone."""

import math
from array import array
from dataclasses import replace

import numpy as np
from numpy.random import Generator

from minirlhf.memory import require_memory
from minirlhf.nn.sampling import PIECE_FLOATS
from minirlhf.nn.transformer import GPTConfig, kept_floats, parameter_shapes
from minirlhf.runs.config import ModelConfig, TrainConfig
from minirlhf.tree import tree_leaves
from minirlhf.worlds.files import split_world
from minirlhf.worlds.tokens import Tokenizer
from minirlhf.worlds.world import World

WHOLE = 95  # percent of the texts that the default limits leave whole
SHORT = 32  # tokens: no default limit cuts a shorter text, it would save little
FLOATS = 1 << 27  # of one sequence in a forward and its backward: 512 MB
COPIES = 5  # of the policy: itself, its gradient, two moments, the reference
PROCESS = 20 << 20  # bytes of a worker's own, measured: 27 to 41 MB


def fit_world(world: World, tokenizer: Tokenizer, config: TrainConfig, rng: Generator) -> World:
    """A world with its limits, and notes on what they cut; of files, split by prompts as cut."""
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
    """The limits that are set, or leave 95 % whole, or fit into the room; and a note on them."""
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


# -- memory --------------------------------------------------------------------------------------
def check_run(config: TrainConfig, gpt: GPTConfig, longest: tuple[int, int]) -> None:
    """Refuse a run that the memory at hand cannot hold. (On a GPU memory is another one.)"""
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
    needs = {
        "--model.d-model, --model.n-layer": COPIES * blocks,
        "--model.n-ctx": COPIES * positions,
        "--max-prompt-tokens, --max-response-tokens": activations,
        "--vocab-size": COPIES * vocabulary,
        "--reward-model.n-layer": COPIES * 48 * layers * C * C,
        "--workers": (config.workers - 1) * in_worker,
        "--sft.batch-size": 100 * config.sft.batch_size,
        most: samples_bytes(gpt, drawn[most], longest),
    }
    require_memory(needs)


def samples_bytes(gpt: GPTConfig, n: int, longest: tuple[int, int]) -> int:
    """Of n responses: their tokens and hidden states, and a piece of them while it is drawn."""
    (P, R), C = longest, gpt.d_model
    P //= 2  # prompts that are half as long as they may be
    of_row = P * kept_floats(gpt, P) + 2 * gpt.n_layer * C * (P + R) + 4 * gpt.vocab_size
    return 4 * min(n * of_row, max(of_row, PIECE_FLOATS)) + n * (20 + 4 * C) * R
