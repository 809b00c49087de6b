"""Trees: nested dicts and lists with arrays as leaves. Parameters, gradients and moments are trees.

The keys of a parameter dict are the keyword names of the function that consumes it, so a layer is
called as `layernorm_forward(x, **p["ln1"])`, and its gradients come back under the same keys.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from minirlhf.backend import Array, get_xp

Tree = Any  # Array | dict[str, Tree] | list[Tree]


def tree_map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply f leaf by leaf to one tree, or to several of the same structure.

    Raises:   ValueError: the trees differ in their keys or lengths.
    """
    if isinstance(tree, dict):
        for other in rest:
            if other.keys() != tree.keys():
                raise ValueError(f"tree_map: expected the keys {list(tree)}; got {list(other)}")
        return {key: tree_map(f, tree[key], *(other[key] for other in rest)) for key in tree}
    if isinstance(tree, list):
        for other in rest:
            if len(other) != len(tree):
                raise ValueError(f"tree_map: expected {len(tree)} entries; got {len(other)}")
        return [tree_map(f, *leaves) for leaves in zip(tree, *rest, strict=True)]
    return f(tree, *rest)


def tree_items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """(path, leaf) in a fixed order; a path reads like "blocks.0.attn.qkv.w"."""
    if isinstance(tree, dict | list):
        children = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, child in children:
            yield from tree_items(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def tree_leaves(tree: Tree) -> list[Array]:
    """The leaves in the order of `tree_items`."""
    return [leaf for _, leaf in tree_items(tree)]


def tree_sum(trees: Iterable[Tree]) -> Tree:
    """Leafwise sum, in the order they come; the first tree's memory becomes the sum's."""
    trees = iter(trees)
    total = next(trees)
    for tree in trees:
        total = tree_map(operator.iadd, total, tree)
        del tree  # before the next is made
    return total


def tree_copy(tree: Tree) -> Tree:
    """A tree that shares no memory with `tree`: what a snapshot (`old`, `ref`) must be."""
    return tree_map(lambda x: x.copy(), tree)


def tree_size(tree: Tree) -> int:
    """The number of entries of all leaves together."""
    return sum(leaf.size for leaf in tree_leaves(tree))


def tree_pack(tree: Tree) -> tuple[Array, Tree]:
    """All leaves in one flat buffer (N,), and the tree again as views into that buffer.

    An optimiser updates the buffer in place; whoever holds the views sees the new values.

    Raises:   ValueError: the leaves differ in dtype.
    """
    leaves = tree_leaves(tree)
    if len({leaf.dtype for leaf in leaves}) != 1:
        raise ValueError("tree_pack: expected leaves of one dtype; got several")
    flat = get_xp(*leaves).concatenate([leaf.reshape(-1) for leaf in leaves])
    return flat, tree_unpack(flat, tree)


def tree_unpack(flat: Array, like: Tree) -> Tree:
    """Views into the buffer `flat` (N,), in the structure and shapes of `like`."""
    leaves = tree_leaves(like)
    ends = itertools.accumulate(leaf.size for leaf in leaves)
    views = map(lambda leaf, end: flat[end - leaf.size : end].reshape(leaf.shape), leaves, ends)
    return tree_map(lambda _: next(views), like)


def global_norm(tree: Tree) -> float:
    """sqrt(sum of the squares of all entries of all leaves), summed in float64 on the host."""
    return math.sqrt(sum(float((leaf * leaf).sum(dtype="float64")) for leaf in tree_leaves(tree)))
