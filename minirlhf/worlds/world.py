"""A world: where prompts, demonstrations and rewards come from."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator

from minirlhf.rlhf.exact import PrefixTree


@dataclass(frozen=True)
class World:
    """Everything that training needs to know about its subject; text only, no tokens, no arrays.

    The full text of an example is prompt + joiner + response. A world has at least one source of
    preference: `annotate` (simulated annotator), `pairs` (given by the user) or `reward`, which
    replaces the reward model. `gold` is the true reward: logged, never trained on.
    """

    name: str
    demonstrations: list[tuple[str, str]]  # (prompt, response), what SFT imitates
    train_prompts: list[str]
    heldout_prompts: list[str]  # disjoint from train_prompts, unless there is one prompt in all
    heldout_demonstrations: list[tuple[str, str]] = field(default_factory=list)  # of those prompts
    gold: Callable[[str, str], float] | None = None  # (prompt, response) -> true reward
    annotate: Callable[[str, str, str, Generator], bool] | None = None  # (prompt, a, b, rng): a?
    pairs: list[tuple[str, str, str]] | None = None  # (prompt, chosen, rejected)
    reward: Callable[[str], float] | None = None  # full text -> reward
    joiner: str = " "
    max_prompt_tokens: int = 32  # suggestion, special tokens included
    max_response_tokens: int = 32  # suggestion, the end token included
    notes: tuple[str, ...] = ()  # what was dropped or cut, one sentence each, to be shown

    def full_text(self, prompt: str, response: str) -> str:
        """prompt + joiner + response, the text that `reward` sees."""
        return prompt + self.joiner + response


@dataclass(frozen=True)
class TokenWorld:
    """A world of few tokens and short responses, in ids: everything about it can be computed.

    Its vocabulary has no special tokens: what the policy may say is what can be enumerated. N
    prefixes and M responses as in `rlhf/exact.py`.
    """

    name: str
    tokens: tuple[str, ...]  # the V tokens by name
    stop_id: int  # the token that ends a response, and belongs to it
    prompts: list[list[int]]  # ids of each prompt, all of one length, equally likely
    max_response_tokens: int  # T
    tree: PrefixTree
    rewards: np.ndarray  # (M,) the proxy: what is maximised
    gold: np.ndarray  # (M,) the true reward: what is wanted
    score: Callable[[list[list[int]], list[list[int]]], np.ndarray]  # (prompts, responses) -> (B,)
    demonstrator: np.ndarray  # (N, V) log-probs of who writes the demonstrations, -inf where never
    demonstrations: list[tuple[list[int], list[int]]]  # (prompt, response), what SFT imitates

    def text(self, ids: list[int]) -> str:
        """The names of the ids, separated by spaces where they are longer than a letter."""
        names = [self.tokens[i] for i in ids]
        return ("" if all(len(name) == 1 for name in self.tokens) else " ").join(names)


def rectangle(responses: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids, at least one, as tokens (B, T) and mask (B, T), padded on the right."""
    lengths = np.array([len(ids) for ids in responses])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, dtype=np.int64)
    tokens[mask] = np.concatenate(responses)
    return tokens, mask.astype(np.float64)
