"""A transformer on a tree of prefixes: its log-probs at every prefix, and the way back.

`tree_logits` goes down the tree level by level with a KV cache, so each prefix is computed once.
`tree_gradient` turns dL/dlogits at every prefix (`objective_gradient` has those of J) into
dL/dparams: the ordinary forward and backward over the longest prefixes, whose columns pass through
all the others.
"""

import numpy as np

from minirlhf.backend import Array, get_xp
from minirlhf.exact.enumeration import PrefixTree, all_responses
from minirlhf.nn.decoding import decode_step, prefill
from minirlhf.nn.heads import logits_forward, output_matrix
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.train.batches import Batch, Ids, pad_batch, row_slices
from minirlhf.train.policy import policy_backward, policy_forward
from minirlhf.tree import Tree, tree_sum

ROWS = 4096  # longest prefixes in one forward and backward: bounds memory, changes no result


def tree_logits(params: Tree, *, tree: PrefixTree, prompts: list[Ids], config: GPTConfig) -> Array:
    """z(s, a), the logits of every token after every prefix: (N, V).

    Args:     params: {"transformer": ...}.
              tree: on the device of the parameters.
              prompts: ids of the tree's prompts, in order.
    Raises:   ValueError: the tree's vocabulary or prompts are not the model's, or T is too long.
    """
    transformer, w = params["transformer"], output_matrix(params["transformer"])
    xp, same = get_xp(tree.parent, w), {"config": config}
    batch = _prompt_batch(tree, prompts, config, w.real.dtype, xp)
    more = len(tree.levels) - 1
    h, kv = prefill(transformer, tokens=batch.tokens, mask=batch.mask, max_new=more, **same)
    logits = [logits_forward(h, w)[0]]
    pairs = zip(tree.levels, tree.levels[1:], strict=False)
    for column, (before, level) in enumerate(pairs, batch.prompt_len):
        kv = kv.rows(tree.parent[level] - before.start)  # a copy for each continuation
        tokens = tree.token[level]
        mask = xp.ones(tokens.shape, dtype=kv.mask.dtype)
        h = decode_step(transformer, kv, tokens=tokens, mask=mask, column=column, **same)
        logits.append(logits_forward(h, w)[0])
    return xp.concatenate(logits)


def tree_log_probs(
    params: Tree, *, tree: PrefixTree, prompts: list[Ids], config: GPTConfig
) -> Array:
    """log pi(a|s) of every token after every prefix: (N, V), in the parameters' dtype [nats]."""
    return log_softmax(tree_logits(params, tree=tree, prompts=prompts, config=config))


def tree_gradient(
    dlogits: Array, params: Tree, *, tree: PrefixTree, prompts: list[Ids], config: GPTConfig
) -> Tree:
    """dL/dparams = sum over prefixes s and tokens a of dL/dz(s, a) dz(s, a)/dparams.

    Args:     dlogits: (N, V) dL/dz at every prefix.
              params, tree, prompts, config: as `tree_logits`.
    Returns:  {"transformer": ...} keyed like params.
    """
    params = {"transformer": params["transformer"]}
    wte = params["transformer"]["wte"]
    xp, dtype = get_xp(dlogits, wte), wte.dtype
    batch, nodes = _longest_prefixes(tree, prompts, config, dtype, xp)

    def of_rows(rows: slice) -> Tree:
        out, cache = policy_forward(params, batch=batch.rows(rows), config=config)
        mine = nodes[rows]  # (rows, T) -1 where another row stands for the prefix
        dlogits_rows = xp.where((mine >= 0)[..., None], dlogits[xp.maximum(mine, 0)], 0.0)
        return policy_backward(dlogits_rows.astype(dtype), xp.zeros_like(out.logp), None, cache)

    return tree_sum(map(of_rows, row_slices(nodes.shape[0], ROWS)))


def _prompt_batch(tree: PrefixTree, prompts: list[Ids], config: GPTConfig, dtype, xp) -> Batch:
    """The prompts alone, on the tree's device; refuses a tree that is not the model's."""
    longest = max(map(len, prompts)) + len(tree.levels)
    same = (tree.vocab_size, len(prompts)) == (config.vocab_size, tree.n_prompts)
    if not same or longest > config.n_ctx:
        raise ValueError(
            f"tree policy: expected a tree of {config.vocab_size} tokens, as many prompts as it "
            f"has, and at most {config.n_ctx} positions; got {tree.vocab_size} tokens, "
            f"{len(prompts)} prompts for {tree.n_prompts}, and {longest} positions"
        )
    batch = pad_batch(prompts, [[] for _ in prompts], pad_id=0, config=config, dtype=dtype)
    return batch._replace(tokens=xp.asarray(batch.tokens), mask=xp.asarray(batch.mask))


def _longest_prefixes(
    tree: PrefixTree, prompts: list[Ids], config: GPTConfig, dtype, xp
) -> tuple[Batch, Array]:
    """Every prefix that no other continues as a row (rows, P+T), and its columns' nodes (rows, T).

    A node belongs to the first row that passes through it; -1 at other rows, and at padding.
    """
    tree = tree.to("cpu")
    responses = all_responses(tree)
    continued = np.zeros(tree.n_nodes, dtype=bool)
    continued[tree.parent[tree.n_prompts :]] = True
    ends, leaf = np.unique(tree.leaf_node, return_index=True)  # one response for each prefix
    leaf = leaf[~continued[ends]]
    nodes = np.where(responses.mask > 0, responses.nodes, -1)[leaf]
    _, first = np.unique(nodes, return_index=True)
    mine = np.full(nodes.size, -1)
    mine[first] = nodes.reshape(-1)[first]
    start = _prompt_batch(tree, prompts, config, dtype, np).rows(responses.prompt[leaf])
    tokens = np.concatenate([start.tokens, responses.tokens[leaf]], axis=1)
    mask = np.concatenate([start.mask, responses.mask[leaf].astype(dtype)], axis=1)
    batch = Batch(xp.asarray(tokens), xp.asarray(mask), start.prompt_len)
    return batch, xp.asarray(mine.reshape(nodes.shape))
