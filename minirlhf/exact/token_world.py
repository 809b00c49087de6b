"""What the tiny world is made of, and trlX's randomwalks (examples/)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minirlhf.exact.enumeration import PrefixTree


@dataclass(frozen=True)
class TokenWorld:
    """A world of few tokens and short responses, in ids: everything about it can be computed.

    Its vocabulary has no special tokens: what the policy may say is what can be enumerated. N
    prefixes and M responses as in `exact/enumeration.py`.
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


def rectangle(responses: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids, at least one, as tokens (B, T) and mask (B, T), padded on the right."""
    lengths = np.array([len(ids) for ids in responses])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, dtype=np.int64)
    tokens[mask] = np.concatenate(responses)
    return tokens, mask.astype(np.float64)
