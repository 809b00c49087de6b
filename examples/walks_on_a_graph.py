"""trlX's randomwalks benchmark: 21 letters on a directed graph, and the shortest way to `a`.

    j r m h n b a      a walk: every step along an edge, `a` is the goal and ends it

A prompt is a start letter b .. u, a response up to nine more letters. Its reward is how short the
walk is, 0 where it breaks an edge or never arrives. Graph and 1,000 uniform random walks (the
demonstrations) are those of `examples/randomwalks` in CarperAI/trlx, draw for draw, for any seed;
its PPO run uses seed 1000. Nothing but the reference keeps a policy on the edges.
"""

from typing import NamedTuple

import numpy as np
from numpy.random import RandomState

from minirlhf.exact.enumeration import PrefixTree, all_responses, grow_tree
from minirlhf.exact.ground_truth import TokenWorld, rectangle, small_transformer

LETTERS = tuple("abcdefghijklmnopqrstu")
GOAL = 0  # a
STARTS = range(1, len(LETTERS))
MAX_NODES = 10  # letters of a walk, the start included
FAILED = 100  # the length of a walk that breaks an edge or does not arrive
EDGE_PROBABILITY, N_WALKS = 0.1, 1000


def letters(ids: list[int]) -> str:
    """A walk, or a start, as its letters."""
    return "".join(LETTERS[i] for i in ids)


class Graph(NamedTuple):
    """Who may follow whom, and what was drawn from it. Letter i of a .. u is node i."""

    adjacency: np.ndarray  # (21, 21) bool: [i, j] is an edge from i to j; of the goal: to itself
    shortest: np.ndarray  # (21,) letters on the shortest walk to the goal, both ends included
    walks: list[list[int]]  # 1,000 of 2 to 10 letters


def make_graph(seed: int) -> Graph:
    """The benchmark's graph and walks, from the same draws in the same order.

    Raises:   ValueError: a start has no walk of fewer than 10 letters: its optimality is 0/0.
    """
    rng = RandomState(seed)
    adjacency = draw_adjacency(rng)
    shortest = shortest_walks(adjacency)
    if far := ", ".join(LETTERS[i] for i in np.flatnonzero(shortest >= MAX_NODES)):
        raise ValueError(
            f"randomwalks: expected a graph whose every letter has a walk to a of fewer than "
            f"{MAX_NODES} letters; got, from seed {seed}, none for {far}: take another seed"
        )
    return Graph(adjacency, shortest, [draw_walk(adjacency, rng) for _ in range(N_WALKS)])


def draw_adjacency(rng: RandomState) -> np.ndarray:
    """(21, 21) bool: each edge with probability .1, redrawn until every letter has one to leave by.

    The goal's are drawn too, and then replaced by one to itself.
    """
    n = len(LETTERS)
    adjacency = np.zeros((n, n), dtype=bool)
    while not adjacency.any(axis=1).all():
        adjacency = rng.rand(n, n) > 1 - EDGE_PROBABILITY
        np.fill_diagonal(adjacency, False)
    adjacency[GOAL] = np.arange(n) == GOAL
    return adjacency


def draw_walk(adjacency: np.ndarray, rng: RandomState) -> list[int]:
    """A start that is not the goal, then uniform steps to the goal, or 10 letters."""
    walk = [GOAL]
    while walk[0] == GOAL:
        walk[0] = int(rng.randint(len(LETTERS)))
    while walk[-1] != GOAL and len(walk) < MAX_NODES:
        walk.append(int(rng.choice(np.flatnonzero(adjacency[walk[-1]]))))
    return walk


def shortest_walks(adjacency: np.ndarray) -> np.ndarray:
    """n(i) = 1 + min over edges i -> j of n(j),  n(goal) = 1,  cut at 10: (21, 21) -> (21,)."""
    n = np.where(np.arange(len(LETTERS)) == GOAL, 1, MAX_NODES)
    for _ in range(MAX_NODES):
        n = np.minimum(n, 1 + np.where(adjacency, n, MAX_NODES).min(axis=1))
    return n


class WalkMetrics(NamedTuple):
    """Each (B,), one entry a walk."""

    optimality: np.ndarray  # 1 for a shortest walk, 0 for a failure [reward units]
    reached: np.ndarray  # 1 where it arrives: the mean is P(reach)
    illegal: np.ndarray  # 1 where it breaks an edge before it arrives: the mean is P(illegal)
    length: np.ndarray  # letters up to the goal, 100 where it fails


def measure(graph: Graph, walks: np.ndarray, mask: np.ndarray) -> WalkMetrics:
    """optimality = (10 - bound) / (10 - shortest[start]),  bound = 10 for a failure, else length.

    So a walk whose 10th letter is the goal has reached it and scores 0. What follows the goal, or
    the first broken edge, does not count.

    Args:     walks: (B, L) ids, the start b .. u first.
              mask: (B, L) 1 at real letters.
    """
    real = mask > 0
    broken = np.zeros_like(real)
    broken[:, 1:] = ~graph.adjacency[walks[:, :-1], walks[:, 1:]] & real[:, 1:]
    over = broken | (real & (walks == GOAL))
    last = over.argmax(axis=1)
    illegal = broken[np.arange(len(walks)), last]
    reached = over.any(axis=1) & ~illegal
    length = np.where(reached, last + 1, FAILED)
    bound = np.where(length == FAILED, MAX_NODES, length)
    optimality = (MAX_NODES - bound) / (MAX_NODES - graph.shortest[walks[:, 0]])
    return WalkMetrics(optimality, reached.astype(np.float64), illegal.astype(np.float64), length)


def walk_tree(graph: Graph) -> PrefixTree:
    """The prefixes that are alive: along edges, not yet at the goal; one tree for each start.

    A response ends at the goal, after nine letters, or with its first illegal letter. Whatever
    follows an illegal letter scores 0 as well, so there pi* is the reference and nothing changes
    J*. J(pi) lacks -beta KL(pi || ref) of the letters after an illegal one: it is overstated by
    beta P(illegal) times that KL.
    """

    def goes_on(prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        last = np.column_stack([prompt + STARTS[0], tokens])[:, -1]
        return graph.adjacency[last] & (np.arange(len(LETTERS)) != GOAL)

    return grow_tree(
        goes_on, vocab_size=len(LETTERS), max_tokens=MAX_NODES - 1, n_prompts=len(STARTS)
    )


def measure_leaves(graph: Graph, tree: PrefixTree) -> WalkMetrics:
    """The metrics of every response of the tree, each (M,)."""
    everything = all_responses(tree)
    walks = np.column_stack([everything.prompt + STARTS[0], everything.tokens])
    return measure(graph, walks, np.column_stack([np.ones(len(walks)), everything.mask]))


def uniform_log_probs(graph: Graph, tree: PrefixTree) -> np.ndarray:
    """(N, V) log pi(j|i) = -log(number of edges that leave i) along them, -inf elsewhere."""
    n_edges = graph.adjacency.sum(axis=1, keepdims=True)
    last = tree.token.copy()
    last[tree.levels[0]] = STARTS
    return np.where(graph.adjacency, -np.log(n_edges), -np.inf)[last]


def make_randomwalks(*, seed: int = 1000) -> TokenWorld:
    """The benchmark as a world: reward and gold are both the optimality.

    Raises:   ValueError: as `make_graph`.
    """
    graph = make_graph(seed)
    tree = walk_tree(graph)
    optimality = measure_leaves(graph, tree).optimality

    def score(prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        walks = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return measure(graph, *rectangle(walks)).optimality

    return TokenWorld(
        tokens=LETTERS,
        stop_id=GOAL,
        prompts=[[start] for start in STARTS],
        config=small_transformer(len(LETTERS), MAX_NODES, n_layer=2),
        tree=tree,
        rewards=optimality,
        gold=optimality.copy(),
        score=score,
        demonstrator=uniform_log_probs(graph, tree),
        demonstrations=[(walk[:1], walk[1:]) for walk in graph.walks],
    )
