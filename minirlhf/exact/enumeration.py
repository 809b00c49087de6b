"""The exact answer: every response of a small world, its probability, the optimum, the gradient.

All responses are the paths through a tree of prefixes. A policy is one row of log-probs for each
prefix, wherever it comes from: a table, or a transformer evaluated once at each prefix. Then

    J(pi) = E_{y ~ pi} [ r(y) - beta (log pi(y) - log pi_ref(y)) ]

is a finite sum, and so are its maximum, its gradient, and the variance of anything sampled. Where a
world has several prompts each is the root of a tree of its own, and E is the mean over them too.

N prefixes (nodes), M responses (leaves), V tokens, T tokens in the longest response. In nats.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minirlhf.backend import Array, get_xp, to_device

MOST_LEAVES = 20_000_000  # more responses than that do not fit into the memory of a laptop


class PrefixTree(NamedTuple):
    """Node n is a prefix that a policy has to continue; the prompts themselves come first.

    Token a after prefix n leads to a longer prefix, or it ends the response: (n, a) is a leaf.
    """

    prompt: Array  # (N,) the prompt that it begins with
    parent: Array  # (N,) the prefix without its last token; of a prompt: itself
    token: Array  # (N,) the last token; of a prompt: 0
    leaf_node: Array  # (M,) the prefix that a response ends with,
    leaf_token: Array  # (M,) and the last token after it
    levels: tuple[slice, ...]  # the nodes of 0, 1, ... T-1 tokens
    vocab_size: int  # V

    @property
    def n_prompts(self) -> int:
        return self.levels[0].stop

    @property
    def n_nodes(self) -> int:
        return self.levels[-1].stop

    def to(self, device: str) -> "PrefixTree":
        """A copy on "cpu" or "cuda"."""
        *arrays, levels, vocab_size = self
        return PrefixTree(*(to_device(array, device) for array in arrays), levels, vocab_size)


def grow_tree(
    goes_on: Callable[..., np.ndarray], *, vocab_size: int, max_tokens: int, n_prompts: int = 1
) -> PrefixTree:
    """The tree of all prefixes that `goes_on` lets live, level by level; made on the host.

    Args:     goes_on: (prompt (n,), tokens (n, t)) -> (n, V) boolean: is the prefix with one more
                  token itself to be continued? Where not, and wherever max_tokens is reached, it is
                  a response.
              max_tokens: T.
    Raises:   ValueError: a size is too small, or there are more than MOST_LEAVES responses.
    """
    if vocab_size < 2 or max_tokens < 1 or n_prompts < 1:
        raise ValueError(
            "grow_tree: expected vocab_size >= 2, max_tokens >= 1 and n_prompts >= 1; "
            f"got {vocab_size}, {max_tokens} and {n_prompts}"
        )
    prompt, tokens = np.arange(n_prompts), np.zeros((n_prompts, 0), dtype=np.int64)
    prompts, parents, last_tokens = [prompt], [prompt], [np.zeros(n_prompts, dtype=np.int64)]
    leaf_nodes, leaf_tokens, levels, n_leaves = [], [], [], 0
    for t in range(max_tokens):
        start = levels[-1].stop if levels else 0
        levels.append(slice(start, start + len(tokens)))
        at_least = n_leaves + len(tokens) * vocab_size  # each leads to a response
        if at_least > MOST_LEAVES:
            raise ValueError(
                f"exact: expected a world of at most {MOST_LEAVES:,} responses; it has at least "
                f"{at_least:,}: take fewer tokens, steps or prompts"
            )
        lives = np.zeros((len(tokens), vocab_size), dtype=bool)
        if t < max_tokens - 1:
            lives |= goes_on(prompt, tokens)
        n_leaves += int((~lives).sum())
        node, token = np.nonzero(~lives)
        leaf_nodes.append(start + node)
        leaf_tokens.append(token)
        node, token = np.nonzero(lives)
        prompt, tokens = prompt[node], np.concatenate([tokens[node], token[:, None]], axis=1)
        prompts.append(prompt)
        parents.append(start + node)
        last_tokens.append(token)
    arrays = (prompts, parents, last_tokens, leaf_nodes, leaf_tokens)
    return PrefixTree(*map(np.concatenate, arrays), tuple(levels), vocab_size)


def enumerate_responses(
    *, vocab_size: int, max_tokens: int, stop_id: int | None = None, n_prompts: int = 1
) -> PrefixTree:
    """Every response of up to T tokens: it ends with the stop token, or after T tokens.

    With a stop token M = (V-1)^T + sum_{t<T} (V-1)^t and N = sum_{t<T} (V-1)^t for each prompt;
    without one (None) M = V^T.

    Raises:   ValueError: as `grow_tree`, or the stop token is not in the vocabulary.
    """
    if stop_id is not None and stop_id not in range(vocab_size):
        raise ValueError(f"enumerate: expected stop_id in [0, {vocab_size}); got {stop_id}")
    lives = np.arange(vocab_size) != (-1 if stop_id is None else stop_id)
    sizes = {"vocab_size": vocab_size, "max_tokens": max_tokens, "n_prompts": n_prompts}
    return grow_tree(lambda _, tokens: np.broadcast_to(lives, (len(tokens), vocab_size)), **sizes)


class Responses(NamedTuple):
    """The leaves as a right-padded batch, in the order of `tree.leaf_node`."""

    prompt: Array  # (M,) index of the prompt
    nodes: Array  # (M, T) the prefix that predicts token t; 0 at padding
    tokens: Array  # (M, T) the tokens; 0 at padding
    mask: Array  # (M, T) 1 at real tokens, the last one included


def all_responses(tree: PrefixTree, *, dtype=np.float64) -> Responses:
    """Each leaf as the path that leads to it."""
    xp = get_xp(tree.parent)
    M, T = tree.leaf_node.shape[0], len(tree.levels)
    depth = xp.zeros(tree.n_nodes, dtype=tree.parent.dtype)
    for t, level in enumerate(tree.levels):
        depth[level] = t
    nodes, tokens = (xp.zeros((M, T), dtype=tree.parent.dtype) for _ in range(2))
    node, token, row = tree.leaf_node, tree.leaf_token, xp.arange(M)
    for _ in range(T):  # from the last token to the first; the first is then written again
        nodes[row, depth[node]] = node
        tokens[row, depth[node]] = token
        at_prompt = depth[node] == 0
        token = xp.where(at_prompt, token, tree.token[node])
        node = tree.parent[node]
    mask = xp.arange(T) <= depth[tree.leaf_node][:, None]
    return Responses(node, nodes, tokens, mask.astype(dtype))


# -- probabilities -------------------------------------------------------------------------------
def prefix_logprobs(tree: PrefixTree, log_probs: Array) -> Array:
    """log Pr(s) = -log(n_prompts) + sum_t log pi(s_t | s_<t): how likely a policy gets to s.

    Args:     log_probs: (N, V) log pi(a|s), a row for each prefix.
    Returns:  (N,) [nats].
    Raises:   ValueError: log_probs does not have the tree's shape, or its rows do not sum to 1.
    """
    check_rows(tree, log_probs=log_probs)
    xp = get_xp(log_probs, tree.parent)
    reach = xp.zeros(tree.n_nodes, dtype=log_probs.dtype)
    reach[tree.levels[0]] = -math.log(tree.n_prompts)
    for level in tree.levels[1:]:
        parent, token = tree.parent[level], tree.token[level]
        reach[level] = reach[parent] + log_probs[parent, token]
    return reach


def response_logprobs(tree: PrefixTree, log_probs: Array) -> Array:
    """log Pr(x, y) of every response, the even choice of the prompt included.

    Returns:  (M,) [nats]; exp of it sums to 1.
    """
    reach = prefix_logprobs(tree, log_probs)
    return reach[tree.leaf_node] + log_probs[tree.leaf_node, tree.leaf_token]


def check_rows(tree: PrefixTree, **rows: Array) -> None:
    for name, array in rows.items():
        if array.shape != (tree.n_nodes, tree.vocab_size):
            raise ValueError(
                f"exact: expected {name} of shape {(tree.n_nodes, tree.vocab_size)}, one row for "
                f"each prefix; got {array.shape}"
            )
        off = get_xp(array).exp(array.real).sum(axis=-1) - 1.0
        if not bool(((off < 1e-3) & (off > -1e-3)).all()):
            raise ValueError(
                f"exact: expected {name} to be log-probs, whose exp sums to 1 in each row; the "
                f"sums are off by {float(off.min()):.3g} to {float(off.max()):.3g}: take "
                "log_softmax of logits"
            )
