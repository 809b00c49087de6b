"""trlX's randomwalks: graph, walks, metrics, tree and exact optimum as the benchmark has them."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tilt
from tolerances import assert_close

from minirlhf.exact.enumeration import all_responses, response_logprobs
from minirlhf.exact.ground_truth import rectangle
from minirlhf.exact.optimum import evaluate_exactly, optimality_gap, soft_optimum
from walks_on_a_graph import (
    GOAL,
    LETTERS,
    letters,
    make_graph,
    make_randomwalks,
    measure,
    measure_leaves,
)

KL_COEFS = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


class Fixture(NamedTuple):
    """What the benchmark's own code gives for a seed, and the exact answers to it."""

    seed: int
    n_edges: int  # without the goal's to itself
    shortest: tuple[int, ...]  # of nodes 1 .. 20
    before_goal: tuple[int, ...]
    edges: str
    first_walks: tuple[str, ...]
    dataset: tuple[str, str, str]  # optimality, reach, mean length
    late: int  # walks that arrive with their 10th letter
    uniform: tuple[str, str]  # optimality, P(reach)
    optimum: tuple[str, ...]  # E r / KL / J*, a beta each
    shortest_kl: str  # mean over starts of -log(probability of the shortest walks)
    levels: tuple[int, ...]


SEED_1000 = Fixture(
    seed=1000,
    n_edges=51,
    shortest=(3, 4, 2, 4, 3, 5, 5, 3, 3, 3, 4, 4, 2, 5, 4, 4, 4, 3, 4, 4),
    before_goal=(3, 13),
    edges="1:3,9,20 2:4,10,14,17 3:0,11,19 4:1,18 5:3,7,8,12 6:2,16,17,20 7:2 8:3,7 9:13 "
    "10:1,6,9,13 11:1 12:1,4,5,6,7,18 13:0,1 14:17 15:9,20 16:5,9 17:6,9,14 18:3,20 19:10 "
    "20:1,8,18",
    first_walks=("sda", "fda", "ebjnbdtkna"),
    dataset=("0.3515", "0.560", "47.3"),
    late=55,
    uniform=("0.3462", "0.5530"),
    optimum=(
        "0.5068 / 0.0815 / 0.4253",
        "0.6623 / 0.3128 / 0.5059",
        "0.9070 / 1.0865 / 0.6897",
        "0.9749 / 1.5408 / 0.8208",
        "0.9954 / 1.8189 / 0.9045",
        "1.0000 / 1.9364 / 0.9612",
        "1.0000 / 1.9385 / 0.9806",
    ),
    shortest_kl="1.9385",
    levels=(20, 49, 119, 274, 616, 1385, 3076, 6843, 15162),
)
SEED_1002 = Fixture(
    seed=1002,
    n_edges=42,
    shortest=(2, 3, 3, 5, 5, 3, 4, 4, 4, 2, 3, 5, 3, 4, 4, 3, 5, 4, 3, 2),
    before_goal=(1, 10, 20),
    edges="1:0 2:14,20 3:13,14,16,20 4:9,14,17 5:15 6:1,16 7:13 8:13,15 9:6,12,16,17 10:0,8,17 "
    "11:2,3,20 12:7 13:1 14:18,19 15:8,12,13 16:10,12,15 17:12,15 18:4,13 19:1 20:0",
    first_walks=("oseotba", "qka", "jrmhnba"),
    dataset=("0.7902", "0.985", "6.22"),
    late=17,
    uniform=("0.7852", "0.9834"),
    optimum=(
        "0.8359 / 0.0243 / 0.8115",
        "0.8750 / 0.0821 / 0.8339",
        "0.9436 / 0.3078 / 0.8820",
        "0.9835 / 0.5855 / 0.9250",
        "0.9978 / 0.7744 / 0.9590",
        "1.0000 / 0.8311 / 0.9834",
        "1.0000 / 0.8320 / 0.9917",
    ),
    shortest_kl="0.8320",
    levels=(20, 39, 67, 103, 149, 208, 274, 347, 428),
)


@pytest.fixture(scope="module", params=[SEED_1000, SEED_1002], ids=lambda known: str(known.seed))
def known(request):
    return request.param


@pytest.fixture(scope="module")
def graph(known):
    return make_graph(known.seed)


@pytest.fixture(scope="module")
def world(known):
    return make_randomwalks(seed=known.seed)


@pytest.fixture(scope="module")
def leaves(graph, world):
    return measure_leaves(graph, world.tree)


def measured(graph, *words):
    return measure(graph, *rectangle([[LETTERS.index(c) for c in word] for word in words]))


# ---------------------------------------------------------------- graph and walks


def test_the_edges_are_the_benchmarks(known, graph):
    rows = [np.flatnonzero(row) for row in graph.adjacency]
    assert rows[GOAL].tolist() == [GOAL]
    listed = [f"{i}:{','.join(map(str, row))}" for i, row in enumerate(rows) if i != GOAL]
    assert " ".join(listed) == known.edges
    assert graph.adjacency.sum() - 1 == known.n_edges
    assert tuple(np.flatnonzero(graph.adjacency[1:, GOAL]) + 1) == known.before_goal


def test_the_shortest_walks_are_the_benchmarks(known, graph):
    assert graph.shortest[GOAL] == 1
    assert tuple(graph.shortest[1:]) == known.shortest


def test_the_walks_are_the_benchmarks(known, graph, world):
    assert len(graph.walks) == 1000
    assert tuple(map(letters, graph.walks[:3])) == known.first_walks
    metrics = measure(graph, *rectangle(graph.walks))
    optimality, reach, length = known.dataset
    assert f"{metrics.optimality.mean():.4f}" == optimality
    assert f"{metrics.reached.mean():.3f}" == reach
    assert f"{metrics.length.mean():.{len(length.split('.')[1])}f}" == length
    assert not metrics.illegal.any()
    late = (metrics.reached > 0) & (metrics.length == 10)
    assert late.sum() == known.late and not metrics.optimality[late].any()


def test_the_random_draws_repeat():
    assert make_graph(1000).walks == make_graph(1000).walks != make_graph(1002).walks


# From seed 3 only f and g ever get to a; from seed 46 the far ones get there with letter ten.
@pytest.mark.parametrize(
    "seed, far",
    [
        (3, "none for b, c, d, e, h, i, j, k, l, m, n, o, p, q, r, s, t, u"),
        (46, "none for d, k, q"),
    ],
)
def test_a_graph_whose_optimality_is_0_over_0_is_refused(seed, far):
    with pytest.raises(ValueError, match=f"fewer than 10 letters; got, from seed {seed}, {far}"):
        make_randomwalks(seed=seed)


# ---------------------------------------------------------------- metrics

# Seed 1000: b -> d, j, u; d -> a, l, t; d is 2 letters from a and b is 3.
CASES = {
    # a walk: (optimality, reached, illegal, length)
    "da": (1, 1, 0, 2),
    "bda": (1, 1, 0, 3),
    "bdlbda": (4 / 7, 1, 0, 6),  # (10 - 6) / (10 - 3)
    "dlbdlbdla": (0, 0, 1, 100),  # l -> a is no edge
    "dlbdlbda": (2 / 8, 1, 0, 8),
    "ba": (0, 0, 1, 100),
    "dba": (0, 0, 1, 100),  # d -> b is no edge; b -> a neither
    "bjna": (6 / 7, 1, 0, 4),
    "bb": (0, 0, 1, 100),
    "d": (0, 0, 0, 100),
    "dlbdlbdlb": (0, 0, 0, 100),  # legal, and never there
    "dlbdlbdlbd": (0, 0, 0, 100),
    "dtknbdlbda": (0, 1, 0, 10),  # there with the 10th letter: (10 - 10) / 8
    "dab": (1, 1, 0, 2),  # what follows the goal does not count
    "dbda": (0, 0, 1, 100),  # nor what follows a broken edge
}


@pytest.mark.parametrize("walk", CASES)
def test_metrics_by_hand(walk):
    got = [float(x[0]) for x in measured(make_graph(1000), walk)]
    assert_close(got, np.array(CASES[walk], dtype=float))


def test_metrics_do_not_see_padding():
    graph = make_graph(1000)
    together = measured(graph, *CASES)
    for i, walk in enumerate(CASES):
        for batch, alone in zip(together, measured(graph, walk), strict=True):
            assert batch[i] == alone[0]
    walks, mask = rectangle([[3], [3, 11, 1, 3, 0]])  # padding is 0, which is the goal
    assert measure(graph, walks, mask).reached.tolist() == [0, 1]


def optimality_in_loops(graph, walk):
    """The benchmark's sentence, a letter at a time."""
    length = 100
    for i, node in enumerate(walk):
        if i > 0 and not graph.adjacency[walk[i - 1]][node]:
            break
        if node == 0:
            length = i + 1
            break
    bound = 10 if length == 100 else length
    return (10 - bound) / (10 - graph.shortest[walk[0]])


@given(seed=st.integers(0, 2**32 - 1))
def test_optimality_is_the_formula_in_loops(graph, seed):
    rng, walks = np.random.default_rng(seed), []
    for _ in range(20):
        walk = [int(rng.integers(1, 21))]
        for _ in range(rng.integers(0, 10)):
            edges = np.flatnonzero(graph.adjacency[walk[-1]])
            walk.append(int(rng.choice(edges if rng.random() < 0.9 else 21)))
        walks.append(walk)
    expected = np.array([optimality_in_loops(graph, walk) for walk in walks])
    assert_close(measure(graph, *rectangle(walks)).optimality, expected, 0.0)


# ---------------------------------------------------------------- the world


def test_the_tree_holds_the_live_legal_prefixes(known, world):
    sizes = tuple(level.stop - level.start for level in world.tree.levels)
    assert sizes == known.levels
    # every prefix has 21 letters after it, and each that is not a start uses up one of them
    assert len(world.rewards) == 21 * sum(sizes) - (sum(sizes) - 20)


def test_the_benchmarks_tree_has_27544_prefixes():
    assert sum(SEED_1000.levels) == 27_544


def test_the_world_is_21_letters_and_20_starts(known, graph, world):
    assert "".join(world.tokens) == "abcdefghijklmnopqrstu" and world.stop_id == GOAL == 0
    assert world.prompts == [[i] for i in range(1, 21)]
    assert sorted({walk[0] for walk in graph.walks}) == [i for (i,) in world.prompts]
    assert world.config.n_ctx - 1 == 9 == len(world.tree.levels)
    assert [p + r for p, r in world.demonstrations] == graph.walks
    assert all(len(p) == 1 and 1 <= len(r) <= 9 for p, r in world.demonstrations)
    np.testing.assert_array_equal(world.rewards, world.gold)


def test_score_gives_every_leaf_its_reward(world):
    everything = all_responses(world.tree)
    lengths = everything.mask.sum(axis=1).astype(int).tolist()
    responses = [
        ids[:n] for ids, n in zip(everything.tokens.tolist(), lengths, strict=True)
    ]  # without padding
    prompts = [world.prompts[i] for i in everything.prompt]
    np.testing.assert_array_equal(world.score(prompts, responses), world.rewards)


def test_illegal_late_and_lost_responses_earn_nothing(graph, world, leaves):
    last = all_responses(world.tree).mask.sum(axis=1) == 9
    arrives = leaves.reached > 0
    assert not world.rewards[leaves.illegal > 0].any()
    assert not world.rewards[arrives & last].any() and (arrives & last).any()
    assert (world.rewards[arrives & ~last] > 0).all()
    assert world.rewards.max() == 1
    ends = arrives | (leaves.illegal > 0)
    assert last[~ends].all()  # nothing else ends a response early


def test_the_demonstrator_takes_each_edge_alike(graph, world):
    p = np.exp(world.demonstrator)
    assert_close(p.sum(axis=1), np.ones(world.tree.n_nodes))
    assert_close(p[:20], (graph.adjacency / graph.adjacency.sum(axis=1, keepdims=True))[1:])
    possible = np.isfinite(response_logprobs(world.tree, world.demonstrator))
    everything = all_responses(world.tree)
    walks = np.concatenate([everything.prompt[:, None] + 1, everything.tokens], axis=1)
    legal = graph.adjacency[walks[:, :-1], walks[:, 1:]] | (everything.mask == 0)
    np.testing.assert_array_equal(possible, legal.all(axis=1))


# ---------------------------------------------------------------- exact answers


def test_the_uniform_walk_is_worth_what_is_printed(known, world, leaves):
    uniform = (world.tree, world.demonstrator, world.demonstrator)
    value = evaluate_exactly(*uniform, world.rewards, kl_coef=0.1)
    assert f"{value.reward:.4f}" == known.uniform[0]
    assert f"{value.kl_seq:.4f}" == "0.0000"
    assert (
        f"{evaluate_exactly(*uniform, leaves.reached, kl_coef=0.1).reward:.4f}"
        == (known.uniform[1])
    )
    assert evaluate_exactly(*uniform, leaves.illegal, kl_coef=0.1).reward == 0


def test_sampled_walks_agree_with_the_exact_answer(graph, world):
    # 1,000 draws: four standard errors of the mean
    optimality = measure(graph, *rectangle(graph.walks)).optimality
    uniform = (world.tree, world.demonstrator, world.demonstrator)
    exact = evaluate_exactly(*uniform, world.rewards, kl_coef=0.1).reward
    assert abs(optimality.mean() - exact) < 4 * optimality.std() / 1000**0.5


@pytest.mark.parametrize("row, kl_coef", list(enumerate(KL_COEFS)))
def test_the_kl_regularised_optimum_is_what_is_printed(known, world, row, kl_coef):
    tree, ref, rewards = world.tree, world.demonstrator, world.rewards
    optimum = soft_optimum(tree, ref, rewards, kl_coef=kl_coef)
    value = evaluate_exactly(tree, optimum.log_probs, ref, rewards, kl_coef=kl_coef)
    printed = f"{value.reward:.4f} / {value.kl_seq:.4f} / {optimum.objective:.4f}"
    assert printed == known.optimum[row]
    assert_close(value.objective, optimum.objective)


def test_the_kl_of_a_small_beta_is_that_of_the_shortest_walks(known, world):
    tree = world.tree
    p = np.exp(response_logprobs(tree, world.demonstrator)) * tree.n_prompts
    shortest = np.bincount(tree.prompt[tree.leaf_node], weights=p * (world.rewards == 1))
    assert f"{-np.log(shortest).mean():.4f}" == known.shortest_kl


def test_letters_off_the_graph_stay_impossible(world):
    # -inf of the demonstrator: no NaN, no warning, and the two ways to the optimum agree
    tree, ref, rewards = world.tree, world.demonstrator, world.rewards
    optimum = soft_optimum(tree, ref, rewards, kl_coef=0.1)
    np.testing.assert_array_equal(np.isneginf(optimum.log_probs), np.isneginf(ref))
    by_nodes = response_logprobs(tree, optimum.log_probs)
    by_leaves, log_z = tilt(tree, ref, rewards, kl_coef=0.1)
    possible = np.isfinite(by_nodes)
    np.testing.assert_array_equal(np.isfinite(by_leaves), possible)
    assert_close(by_leaves[possible], by_nodes[possible])
    assert_close(0.1 * log_z, optimum.values[:20])
    value = evaluate_exactly(tree, ref, ref, rewards, kl_coef=0.1)
    gap = optimality_gap(tree, ref, optimum)
    assert gap.min() > -1e-12
    assert_close(gap.sum(), optimum.objective - value.objective)
    assert_close(optimality_gap(tree, optimum.log_probs, optimum).sum(), 0.0)
