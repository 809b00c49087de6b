"""Example 00 is the package in one file: the same numbers from both, and what it prints.

On one model with random parameters and ragged random replies the example's log-probs, penalty,
advantages, losses and gradients are compared with those of the package, entry by entry.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny import make_params
from tolerances import assert_close

from minirlhf.exact.enumeration import all_responses, enumerate_responses
from minirlhf.exact.optimum import evaluate_exactly, objective_gradient, soft_optimum
from minirlhf.exact.tree_policy import tree_gradient, tree_log_probs
from minirlhf.nn.adam import adamw_step, init_adamw
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.advantages import gae
from minirlhf.rlhf.kl import summed_penalty
from minirlhf.rlhf.objectives import token_weights
from minirlhf.rlhf.preferences import bradley_terry_backward, bradley_terry_forward
from minirlhf.train.batches import Batch
from minirlhf.train.policy import policy_forward
from minirlhf.train.ppo import Experience, make_experience, ppo_loss_backward, ppo_loss_forward
from minirlhf.train.reward_model import reward_backward, reward_forward
from minirlhf.train.rollout import Samples, score_rollout
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import tree_items, tree_map

PATH = Path(__file__).parents[2] / "examples" / "00_rlhf_in_one_file.py"
SOURCE = PATH.read_text(encoding="utf-8")
SAME = 1e-10  # the same formulas, with sums in another order: 1e-15 a term


def load(source: str = SOURCE) -> ModuleType:
    """The example as a module that has not run yet."""
    module = ModuleType("one_file")
    exec(compile(source, str(PATH), "exec"), module.__dict__)
    return module


ONE = load()
CONFIG = GPTConfig(vocab_size=ONE.V, n_ctx=1 + ONE.T, n_layer=1, n_head=1, d_model=ONE.C)
SETTINGS = PPOConfig(kl_coef=0.3, lam=0.95, clip_eps=0.2, vf_coef=0.1)


def flat(tree) -> dict[str, np.ndarray]:
    """The package's tree under the example's names."""
    prefixes = ("transformer.", "blocks.0.")
    named = {}
    for path, leaf in tree_items(tree):
        for prefix in prefixes:
            path = path.removeprefix(prefix)
        named[path.replace("reward_head", "value_head")] = leaf
    return named


def nested(p: dict[str, np.ndarray]):
    """The example's parameters as the package's tree."""
    template = make_params(config=CONFIG)
    names = iter(flat(template))
    return tree_map(lambda leaf: p[next(names)], template)


def as_reward_model(params):
    return {"transformer": params["transformer"], "reward_head": params["value_head"]}


def random_rows(n: int = 24, *, seed: int = 0) -> np.ndarray:
    """Replies of 0 to T words, each length at least once; the longest have no stop."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((n, 1 + ONE.T), dtype=np.int64)
    rows[:, 0] = rng.choice(ONE.PROMPTS, n)
    for i, row in enumerate(rows):
        n_words = i % (1 + ONE.T)
        row[1 : 1 + n_words] = rng.integers(1, ONE.V, n_words)
    return rows


def as_batch(rows: np.ndarray) -> Batch:
    mask, _ = ONE.reply_masks(rows)
    return Batch(rows, np.concatenate([np.ones((len(rows), 1)), mask], axis=1), 1)


def assert_same_gradients(ours: dict, theirs) -> None:
    theirs = flat(theirs)
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert_close(ours[name], leaf, SAME)


def compare_ppo_loss(one: ModuleType) -> tuple[dict, dict]:
    """Loss and gradients of one batch from both, compared; returned for those who want to spoil."""
    params, rows = make_params(seed=1, config=CONFIG), random_rows()
    rng, p, (mask, _) = np.random.default_rng(2), flat(params), one.reply_masks(rows)
    logp, values, _, cache = one.forward(p, rows)
    old_logp = logp + 0.3 * rng.standard_normal(logp.shape)
    advantages, returns = mask * rng.standard_normal((2, *mask.shape))

    loss, dlogp, dvalues = one.ppo_loss(logp, values, mask, old_logp, advantages, returns)
    gradients = one.backward(dlogp, dvalues, cache)

    experience = Experience(
        batch=as_batch(rows),
        old_logp=old_logp,
        ref_logp=np.zeros_like(logp),
        ref_logits=None,
        old_values=values[:, :-1],
        advantages=advantages,
        returns=returns,
        weights=token_weights(mask),
        kl_loss_coef=0.0,
    )
    expected, its_cache = ppo_loss_forward(
        params, experience=experience, config=CONFIG, settings=SETTINGS
    )
    share_clipped = its_cache.surrogate.clipped[mask > 0].mean()
    assert 0.1 < share_clipped < 0.9  # both sides of the clip are visited
    assert_close(loss, expected, SAME)
    their_gradients = ppo_loss_backward(1.0, its_cache)
    assert_same_gradients(gradients, their_gradients)
    return gradients, their_gradients


# --- the same numbers


def test_the_shapes_are_those_of_the_package():
    assert {
        name: leaf.shape for name, leaf in ONE.imitate(np.random.default_rng(0), 0).items()
    } == {name: leaf.shape for name, leaf in flat(make_params(config=CONFIG)).items()}


def test_log_probs_values_and_penalty():
    params, reference = (make_params(seed=seed, config=CONFIG) for seed in (1, 2))
    rows = random_rows()
    batch, (mask, last) = as_batch(rows), ONE.reply_masks(rows)
    logp, values, log_probs, _ = ONE.forward(flat(params), rows)
    ref_logp, *_ = ONE.forward(flat(reference), rows)
    theirs, _ = policy_forward(params, batch=batch, config=CONFIG)
    ref, _ = policy_forward(reference, batch=batch, config=CONFIG)
    assert_close(logp * mask, theirs.logp * mask, SAME)
    assert_close(values[:, :-1] * mask, theirs.values * mask, SAME)
    assert_close(np.exp(log_probs).sum(axis=-1), np.ones(rows.shape), SAME)
    kl_seq = ONE.penalty(logp, ref_logp, mask).sum(axis=1)
    assert_close(kl_seq, summed_penalty(theirs.logp, ref.logp, mask=mask), SAME)
    assert np.abs(kl_seq).min() > 1e-3
    read = np.take_along_axis(rows, last.argmax(axis=1)[:, None], axis=1)[:, 0]
    assert (last.sum(axis=1) == 1).all() and ((read == ONE.STOP) | (rows[:, -1] != ONE.STOP)).all()


def test_gae_and_returns():
    rng, (mask, _) = np.random.default_rng(3), ONE.reply_masks(random_rows())
    rewards, values = rng.standard_normal((2, *mask.shape))
    ours = ONE.gae(rewards * mask, values, mask)
    for mine, expected in zip(ours, gae(rewards, values, mask=mask, lam=SETTINGS.lam), strict=True):
        assert_close(mine, expected, SAME)


def test_ppo_loss_and_gradients():
    compare_ppo_loss(ONE)


def test_reward_model_loss_and_gradients():
    params, rows = make_params(seed=4, config=CONFIG), random_rows()
    p, (_, last) = flat(params), ONE.reply_masks(rows)
    logp, values, _, cache = ONE.forward(p, rows)
    loss, dd = ONE.bradley_terry(np.subtract(*np.split((values * last).sum(axis=1), 2)))
    gradients = ONE.backward(0 * logp, np.concatenate([dd, -dd])[:, None] * last, cache)

    reward_model = as_reward_model(params)
    score, its_cache = reward_forward(reward_model, batch=as_batch(rows), config=CONFIG)
    expected, bt_cache = bradley_terry_forward(*np.split(score, 2))
    dscore = np.concatenate(bradley_terry_backward(1.0, bt_cache))
    assert_close(ONE.score(p, rows), score, SAME)
    assert_close(loss, expected, SAME)
    assert_same_gradients(gradients, reward_backward(dscore, its_cache))


def test_adam():
    rng, p, state = np.random.default_rng(5), {"a": np.ones((2, 3)), "b": np.zeros(4)}, None
    packed = np.concatenate([leaf.ravel() for leaf in p.values()])
    its_state = init_adamw(packed)
    for rate in (0.1, 0.05, 0.02):
        dp = {name: rng.standard_normal(leaf.shape) for name, leaf in p.items()}
        before = p
        p, state = ONE.adam(p, dp, state, rate)
        assert all(p[name] is not before[name] for name in p)  # a reference stays what it was
        dflat = np.concatenate([leaf.ravel() for leaf in dp.values()])
        how = {"learning_rate": rate, "eps": 1e-6, "form": "tf"}
        its_state = adamw_step(packed, dflat, its_state, **how)
        assert_close(np.concatenate([leaf.ravel() for leaf in p.values()]), packed, SAME)


def test_what_ppo_learns_from_is_the_experience_of_the_package(monkeypatch):
    """Score on the last token, -beta kl_token in the rewards, GAE, whitening: the second batch."""
    reference, judge = (make_params(seed=seed, config=CONFIG) for seed in (1, 4))
    drawn, learnt, sample, ppo_loss = [], [], ONE.sample, ONE.ppo_loss

    def watched_sample(policy, prompts, rng):
        drawn.append((policy, sample(policy, prompts, rng)))
        return drawn[-1][1]

    def watched_loss(*arguments):
        learnt.append(arguments)
        return ppo_loss(*arguments)

    monkeypatch.setattr(ONE, "sample", watched_sample)
    monkeypatch.setattr(ONE, "ppo_loss", watched_loss)
    kl_coef = 50.0  # four small steps away from the reference, the penalty should be felt
    ONE.ppo(flat(reference), flat(judge), kl_coef, np.random.default_rng(6), steps=2)

    policy, rows = drawn[1]
    rollout = score_rollout(
        nested(policy),
        {"transformer": reference["transformer"]},
        Samples([], [], as_batch(rows)),
        score=lambda s: reward_forward(as_reward_model(judge), batch=s.batch, config=CONFIG)[0],
        config=CONFIG,
        settings=SETTINGS,
    )
    assert np.abs(rollout.old_logp - rollout.ref_logp).max() > 1e-2
    known = {"settings": SETTINGS, "stop_id": ONE.STOP}
    expected = make_experience(rollout, kl_coef=kl_coef, **known)
    unpenalised = make_experience(rollout, kl_coef=0.0, **known)
    _, values, mask, old_logp, advantages, returns = learnt[4]  # of the second batch, the first
    assert_close(old_logp * mask, rollout.old_logp * mask, SAME)
    assert_close(values[:, :-1] * mask, rollout.values * mask, SAME)
    assert_close(advantages * mask, expected.advantages, SAME)
    assert_close(returns, expected.returns, SAME)
    assert np.abs(unpenalised.advantages - expected.advantages).max() > 0.1


def test_the_reward_model_is_normalised_on_samples_of_the_reference(monkeypatch):
    drawn, sample = [], ONE.sample
    monkeypatch.setattr(ONE, "sample", lambda *a: drawn.append(sample(*a)) or drawn[-1])
    reference = flat(make_params(seed=1, config=CONFIG))
    reward_model = ONE.learn_reward(reference, np.random.default_rng(7), steps=3, n_pairs=50)
    scores = ONE.score(reward_model, np.concatenate(drawn))
    assert_close([scores.mean(), scores.std()], [0.0, 1.0], SAME)
    assert np.abs(ONE.score(reference, drawn[0]) - ONE.score(reward_model, drawn[0])).max() > 1e-3


@pytest.fixture
def printed_of_random_models(monkeypatch, capsys):
    """What `main` prints if nothing is learnt and all models are random ones."""
    models = [make_params(seed=seed, config=CONFIG) for seed in (1, 2, 3, 4)]
    reference, judge, policy, other = map(flat, models)
    monkeypatch.setattr(ONE, "imitate", lambda rng: reference)
    monkeypatch.setattr(ONE, "learn_reward", lambda ref, rng: judge)
    monkeypatch.setattr(ONE, "ppo", lambda r, m, kl_coef, rng: policy if kl_coef else other)
    ONE.main(kl_coef=0.3)
    return models, capsys.readouterr().out


def test_the_table_is_the_exact_answer(printed_of_random_models):
    (reference, judge, policy, other), printed = printed_of_random_models
    prompts = [[prompt] for prompt in ONE.PROMPTS]
    sizes = {"vocab_size": ONE.V, "max_tokens": ONE.T, "stop_id": ONE.STOP}
    tree = enumerate_responses(**sizes, n_prompts=len(prompts))
    responses = all_responses(tree)
    rows = np.column_stack([np.array(ONE.PROMPTS)[responses.prompt], responses.tokens])
    scores, gold = ONE.score(flat(judge), rows), ONE.gold_reward(rows)

    on_tree = {"tree": tree, "prompts": prompts, "config": CONFIG}
    ref, ours, unleashed = (tree_log_probs(x, **on_tree) for x in (reference, policy, other))
    optimum = soft_optimum(tree, ref, scores, kl_coef=0.3)
    table = read_table(printed)
    for name, log_probs in (
        ("reference", ref),
        ("PPO", ours),
        ("PPO, beta = 0", unleashed),
        ("the optimum", optimum.log_probs),
    ):
        exact = evaluate_exactly(tree, log_probs, ref, scores, kl_coef=0.3)
        its_gold = evaluate_exactly(tree, log_probs, ref, gold, kl_coef=0.3).reward
        expected = [exact.reward, its_gold, exact.kl_seq, exact.objective]
        np.testing.assert_allclose(table[name], expected, rtol=0, atol=6e-4)  # three decimals
    assert f"J* = beta log Z = {optimum.objective:.4f}" in printed
    assert rows.shape[0] == 5602 and "5,602" in ONE.__doc__

    # grad KL(pi || ref) is the gradient of J without a reward at beta = -1
    dlogits = objective_gradient(tree, ours, ref, np.zeros_like(scores), kl_coef=-1.0)
    gradient = tree_gradient(dlogits, policy, **on_tree)
    largest = max(np.abs(leaf).max() for leaf in flat(gradient).values())
    in_loss, in_reward = read_gradients(printed)
    assert in_loss < 1e-12 and in_reward == pytest.approx(largest, rel=0.06)  # two digits


# --- the comparison can fail


@pytest.mark.parametrize("name", sorted(flat(make_params(config=CONFIG))))
def test_a_gradient_a_thousandth_too_long_is_refused(name):
    gradients, theirs = compare_ppo_loss(ONE)
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients | {name: 1.001 * gradients[name]}, theirs)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("dxhat - dxhat.mean(axis=-1, keepdims=True)", "dxhat"),
        ("1 + 3 * 0.044715 * u * u", "1 + 0.044715 * u * u"),
        ("ds.mT @ q", "ds @ q"),
        ("(onehot[:, 1:] - np.exp(log_probs[:, :-1]))", "onehot[:, 1:]"),
        ("ratio * advantages <= bound", "ratio * advantages <= np.inf"),
        ("vf_coef * weights * error", "weights * error"),
    ],
)
def test_an_error_in_the_example_is_found(right, wrong):
    assert SOURCE.count(right) == 1
    with pytest.raises(AssertionError):
        compare_ppo_loss(load(SOURCE.replace(right, wrong)))


# --- the file, and what it prints


def test_the_file_is_short_and_needs_numpy_alone():
    lines = SOURCE.splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 100
    assert f"python examples/{PATH.name}" in ONE.__doc__
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def read_table(printed: str) -> dict[str, list[float]]:
    """Each row's score, gold, kl_seq and J."""
    rows = re.findall(r"^(\w.*?) +(-?\d+\.\d+(?: +-?\d+\.\d+){3})$", printed, flags=re.MULTILINE)
    return {name: [float(x) for x in numbers.split()] for name, numbers in rows}


def read_gradients(printed: str) -> list[float]:
    """The largest entry of the penalty's expected gradient: in the loss, in the reward."""
    places = ("in the loss", "in the reward")
    return [float(re.search(rf"penalty {place}: (\S+)", printed)[1]) for place in places]


def test_a_run_comes_close_to_the_optimum():
    one_core = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", str(PATH)],
        capture_output=True,
        text=True,
        env=one_core,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    table = read_table(run.stdout)
    assert list(table) == ["reference", "PPO", "PPO, beta = 0", "the optimum"]
    score, gold, kl_seq, objective = np.array(list(table.values())).T
    assert kl_seq[0] == 0 and objective[0] < objective[1] <= objective[3] + 1e-3
    assert 0.9 < float(re.search(r"PPO went (\S+) of the way", run.stdout)[1]) <= 1
    assert float(re.search(r"beta log Z = ([\d.]+);", run.stdout)[1]) == pytest.approx(
        objective[3], abs=1e-3
    )
    # without the penalty: further away, a better score, and worse for the customer
    assert kl_seq[2] > 3 * kl_seq[1] and score[2] > score[1] and gold[2] < gold[1]
    assert gold[1] > gold[0]
    in_loss, in_reward = read_gradients(run.stdout)
    assert in_loss < 1e-13 and in_reward > 1e-3
