"""A transformer on a tree of prefixes: the log-probs of the ordinary forward, and the way back."""

import contextlib

import numpy as np
import pytest
from fakegpu import numpy_as_on_a_gpu
from tiny import make_ids, make_params, moved, tilt
from tolerances import (
    COMPLEX_STEP,
    CUPY_PAIR,
    DIFFERENCES,
    DIFFERENT,
    KV_CACHE,
    LOOPS,
    MICRO_BATCH,
    STAND_IN,
    assert_close,
    assert_trees_close,
)

from minirlhf.backend import to_host
from minirlhf.exact import tree_policy
from minirlhf.exact.enumeration import (
    all_responses,
    enumerate_responses,
    grow_tree,
    response_logprobs,
)
from minirlhf.exact.optimum import (
    evaluate_exactly,
    objective_gradient,
    optimality_gap,
    soft_optimum,
)
from minirlhf.exact.tree_policy import tree_gradient, tree_log_probs, tree_logits
from minirlhf.gradcheck import check_directions, directional_derivative
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.train.batches import pad_batch
from minirlhf.train.policy import policy_forward
from minirlhf.tree import tree_items, tree_leaves, tree_map

V, T, N_CTX = 4, 4, 9
CONFIG = GPTConfig(vocab_size=V, n_ctx=N_CTX, n_layer=2, n_head=2, d_model=8)


def irregular(*, n_prompts):
    """What goes on is drawn at random, differently for each prompt; the first one dies at once."""
    rng = np.random.default_rng(5)

    def goes_on(prompt, tokens):
        return (rng.random((len(tokens), V)) < 0.6) & (prompt > 0)[:, None]

    return grow_tree(goes_on, vocab_size=V, max_tokens=T, n_prompts=n_prompts)


def flat(tree):
    return np.concatenate([leaf.reshape(-1) for leaf in tree_leaves(tree)])


def all_over(prompt, tokens):
    return np.zeros((len(tokens), V), dtype=bool)


THREE = enumerate_responses(vocab_size=V, max_tokens=3, stop_id=0, n_prompts=3)

# tree, lengths of the prompts: those of different length are padded on the left
TREES = {
    "stop token": (enumerate_responses(vocab_size=V, max_tokens=T, stop_id=2), [3]),
    "no stop token": (enumerate_responses(vocab_size=V, max_tokens=3), [1]),
    "three prompts": (THREE, [5, 1, 3]),
    "one step": (enumerate_responses(vocab_size=V, max_tokens=1, n_prompts=2), [2, 4]),
    "irregular": (irregular(n_prompts=4), [2, 5, 1, 3]),
    "all over after one": (grow_tree(all_over, vocab_size=V, max_tokens=3), [2]),
}


@pytest.fixture(params=TREES, scope="module")
def where(request):
    tree, lengths = TREES[request.param]
    return {"tree": tree, "prompts": make_ids(lengths, high=V), "config": CONFIG}


def params_of(seed=0, dtype=np.float64, config=CONFIG):
    return make_params(seed=seed, dtype=dtype, heads=(), config=config)


def rewards_of(tree, seed=0):
    return np.random.default_rng(seed).standard_normal(tree.leaf_node.shape)


def exact_gradient(params, log_ref, rewards, *, tree, **where):
    """dJ/dparams at beta = .5: every response counted with its probability."""
    log_probs = tree_log_probs(params, tree=tree, **where)
    dlogits = objective_gradient(tree, log_probs, log_ref, rewards, kl_coef=0.5)
    return tree_gradient(dlogits, params, tree=tree, **where)


# -- forward -------------------------------------------------------------------------------------


def test_the_trees_of_these_tests():
    tree = TREES["irregular"][0]
    depth = all_responses(tree).mask.sum(axis=1)
    prompt = tree.prompt[tree.leaf_node]
    assert set(depth[prompt == 0]) == {1} and set(depth[prompt > 0]) == {1, 2, 3, 4}
    assert TREES["all over after one"][0].n_nodes == 1


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_log_probs_are_those_of_the_padded_batch(where, dtype):
    """Every response as one row of an ordinary batch, against one pass down the tree."""
    tree, prompts = where["tree"], where["prompts"]
    params, everything = params_of(dtype=dtype), all_responses(tree)
    log_probs = tree_log_probs(params, **where)
    assert log_probs.shape == (tree.n_nodes, V) and log_probs.dtype == dtype
    responses = [y[m > 0].tolist() for y, m in zip(everything.tokens, everything.mask, strict=True)]
    batch = pad_batch(
        [prompts[x] for x in everything.prompt], responses, pad_id=0, config=CONFIG, dtype=dtype
    )
    out, _ = policy_forward(params, batch=batch, config=CONFIG)
    for y, response in enumerate(responses):
        n = len(response)
        nodes = everything.nodes[y, :n]
        assert_close(log_probs[nodes, response], out.logp[y, :n], KV_CACHE[dtype])
        assert_close(log_probs[nodes], log_softmax(out.logits[y, :n]), KV_CACHE[dtype])
    assert np.abs(log_probs - log_probs[:1]).max() > DIFFERENT or tree.n_nodes == 1


def test_probabilities_sum_to_1(where):
    log_probs = tree_log_probs(params_of(), **where)
    assert_close(np.exp(log_probs).sum(axis=-1), np.ones(len(log_probs)))
    assert_close(np.exp(response_logprobs(where["tree"], log_probs)).sum(), 1.0)
    assert_close(log_softmax(tree_logits(params_of(), **where)), log_probs, 0.0)


def test_a_value_head_is_not_looked_at(where):
    params = params_of()
    with_head = {**params, "value_head": {"w": np.full((8, 1), np.nan), "b": np.zeros(1)}}
    assert_close(tree_logits(with_head, **where), tree_logits(params, **where), 0.0)
    gradient = tree_gradient(np.ones((where["tree"].n_nodes, V)), with_head, **where)
    assert list(gradient) == ["transformer"]


# -- gradient ------------------------------------------------------------------------------------


def test_the_gradient_of_a_linear_functional(where):
    """sum w(s, a) z(s, a) in random directions, and through each tensor alone."""
    params, rng = params_of(), np.random.default_rng(1)
    weights = rng.standard_normal((where["tree"].n_nodes, V))
    gradient = tree_gradient(weights, params, **where)
    check_directions(lambda p: (weights * tree_logits(p, **where)).sum(), params, gradient, rng=rng)
    assert all(leaf.dtype == np.float64 for leaf in tree_leaves(gradient))


def test_every_prefix_alone_has_its_gradient(where):
    """One logit at a time: no prefix is forgotten, none counted twice by its continuations."""
    params, rng = params_of(), np.random.default_rng(2)
    direction = tree_map(lambda a: rng.standard_normal(a.shape), params)
    slope = directional_derivative(lambda p: tree_logits(p, **where).sum(), params, direction)
    step = tree_map(lambda a, u: a + 1e-30j * u, params, direction)
    slopes = tree_logits(step, **where).imag / 1e-30  # (N, V)
    assert slopes.sum() == pytest.approx(slope, rel=COMPLEX_STEP)
    nodes = np.unique(np.linspace(0, where["tree"].n_nodes - 1, 12).astype(int))
    for node in nodes:
        one = np.zeros_like(slopes)
        one[node, node % V] = 1.0
        gradient = tree_gradient(one, params, **where)
        along = flat(gradient) @ flat(direction)
        assert along == pytest.approx(slopes[node, node % V], abs=COMPLEX_STEP)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_micro_batches_change_nothing(where, dtype, monkeypatch):
    params = params_of(dtype=dtype)
    weights = np.random.default_rng(1).standard_normal((where["tree"].n_nodes, V)).astype(dtype)
    whole = tree_gradient(weights, params, **where)
    monkeypatch.setattr(tree_policy, "ROWS", 3)
    in_threes = tree_gradient(weights, params, **where)
    assert_trees_close(in_threes, whole, MICRO_BATCH[dtype])
    assert all(leaf.dtype == dtype for leaf in tree_leaves(whole))


def test_the_rows_are_the_longest_prefixes(monkeypatch):
    """A prefix that goes on is a column of its continuation, and not a row of its own."""
    seen = []

    def spy(params, *, batch, config):
        seen.append(len(batch.tokens))
        return policy_forward(params, batch=batch, config=config)

    monkeypatch.setattr(tree_policy, "policy_forward", spy)
    monkeypatch.setattr(tree_policy, "ROWS", 10)
    tree = enumerate_responses(vocab_size=V, max_tokens=T, stop_id=2)
    weights = np.ones((tree.n_nodes, V))
    tree_gradient(weights, params_of(), tree=tree, prompts=[[0]], config=CONFIG)
    assert seen == [10, 10, 7]  # 3^3 prefixes of three tokens that are not over


def test_the_exact_gradient_by_central_differences():
    """Every parameter of a model of one block, moved to either side."""
    config = GPTConfig(vocab_size=3, n_ctx=4, n_layer=1, n_head=2, d_model=4)
    tree = enumerate_responses(vocab_size=3, max_tokens=3, stop_id=0)
    where = {"tree": tree, "prompts": [[1]], "config": config}
    params, rewards = params_of(seed=1, config=config), rewards_of(tree)
    log_ref = tree_log_probs(params_of(seed=2, config=config), **where)

    def J(p):
        log_probs = tree_log_probs(p, **where)
        return float(evaluate_exactly(tree, log_probs, log_ref, rewards, kl_coef=0.5).objective)

    gradient = exact_gradient(params, log_ref, rewards, **where)
    size, h = np.linalg.norm(flat(gradient)), 1e-5
    assert size > DIFFERENT
    for (path, leaf), (_, g) in zip(tree_items(params), tree_items(gradient), strict=True):
        for entry in np.ndindex(leaf.shape):
            here = leaf[entry]
            leaf[entry] = here + h
            above = J(params)
            leaf[entry] = here - h
            below = J(params)
            leaf[entry] = here
            assert abs((above - below) / (2 * h) - g[entry]) < DIFFERENCES * size, path


def test_the_exact_gradient_of_two_blocks(where):
    """J of the whole model along random directions, by the complex step."""
    tree, params, rewards = where["tree"], params_of(seed=1), rewards_of(where["tree"])
    log_ref = tree_log_probs(params_of(seed=2), **where)

    def J(p):
        log_probs = tree_log_probs(p, **where)
        return evaluate_exactly(tree, log_probs, log_ref, rewards, kl_coef=0.5).objective

    gradient = exact_gradient(params, log_ref, rewards, **where)
    check_directions(J, params, gradient, rng=np.random.default_rng(0))


def test_float32_gradients(where):
    log_ref = tree_log_probs(params_of(seed=2), **where)
    rewards = rewards_of(where["tree"])
    double = exact_gradient(params_of(seed=1), log_ref, rewards, **where)
    single = exact_gradient(
        params_of(seed=1, dtype=np.float32),
        log_ref.astype(np.float32),
        rewards.astype(np.float32),
        **where,
    )
    assert_trees_close(
        single, tree_map(lambda a: a.astype(np.float32), double), KV_CACHE[np.float32]
    )


# -- theory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_identities_of_the_optimum_for_transformers(where, beta):
    tree, rewards = where["tree"], rewards_of(where["tree"])
    log_pi, log_ref = (tree_log_probs(params_of(seed=seed), **where) for seed in (1, 2))
    best = soft_optimum(tree, log_ref, rewards, kl_coef=beta)
    _, log_z = tilt(tree, log_ref, rewards, kl_coef=beta)
    assert_close(best.objective, beta * log_z.mean())
    J = evaluate_exactly(tree, log_pi, log_ref, rewards, kl_coef=beta).objective
    to_best = evaluate_exactly(tree, log_pi, best.log_probs, rewards, kl_coef=1.0).kl_seq
    gap = optimality_gap(tree, log_pi, best)
    assert_close([gap.sum(), beta * to_best], [best.objective - J] * 2)
    assert best.objective - J > DIFFERENT**2
    at_best = evaluate_exactly(tree, best.log_probs, log_ref, rewards, kl_coef=beta)
    assert_close(at_best.objective, best.objective)
    assert at_best.flatness < LOOPS


# -- array modules -------------------------------------------------------------------------------


def test_every_array_module_gives_the_same_numbers(xp, xp_name, where, monkeypatch):
    monkeypatch.setattr(tree_policy, "ROWS", 5)
    params, rewards = params_of(seed=1), rewards_of(where["tree"])
    weights = np.random.default_rng(3).standard_normal((where["tree"].n_nodes, V))

    def run(params, rewards, weights, tree):
        here = {**where, "tree": tree}
        log_ref = tree_log_probs(params, **here)
        return {
            "log_probs": log_ref,
            "linear": tree_gradient(weights, params, **here),
            "exact": exact_gradient(params, log_ref, rewards, **here),
        }

    args = (params, rewards, weights, where["tree"])
    with numpy_as_on_a_gpu() if xp_name == "fakegpu" else contextlib.nullcontext():
        expected = run(*args)
    got = run(*moved(args, xp.asarray))
    assert all(type(leaf) is xp.ndarray for leaf in tree_leaves(got))
    tolerance = CUPY_PAIR[np.float64] if xp_name == "cupy" else STAND_IN
    assert_trees_close(tree_map(to_host, got), expected, tolerance)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "prompts", "got"),
    [
        (enumerate_responses(vocab_size=3, max_tokens=2), [[0]], "got 3 tokens"),
        (enumerate_responses(vocab_size=V, max_tokens=2), [[0], [1]], "2 prompts for 1"),
        (enumerate_responses(vocab_size=V, max_tokens=4), [[0] * 6], "and 10 positions"),
    ],
)
def test_a_tree_that_is_not_the_models_is_refused(tree, prompts, got):
    where = {"tree": tree, "prompts": prompts, "config": CONFIG}
    for call in (
        lambda: tree_logits(params_of(), **where),
        lambda: tree_gradient(np.zeros((tree.n_nodes, tree.vocab_size)), params_of(), **where),
    ):
        with pytest.raises(ValueError, match=f"tree policy: expected a tree of 4 tokens.*{got}"):
            call()


def test_what_just_fits_is_taken():
    tree = enumerate_responses(vocab_size=V, max_tokens=4)
    where = {"tree": tree, "prompts": [[0] * (N_CTX - 4)], "config": CONFIG}
    assert tree_logits(params_of(), **where).shape == (85, V)
    for prompts, message in (([[]], "non-empty prompts"), ([[V]], r"expected ids in \[0, 4\)")):
        with pytest.raises(ValueError, match=message):
            tree_logits(params_of(), **{**where, "prompts": prompts})
