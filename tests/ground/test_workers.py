"""Workers: who computes changes no result, shared memory is never stale, nobody is left behind."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny import CONFIG, Letters, generated, make_batch, make_ids, make_params
from tolerances import MICRO_BATCH, assert_close, assert_trees_close

from minirlhf import workers
from minirlhf.crew import side_by_side, usable_cores
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig
from minirlhf.train import batches
from minirlhf.train.batches import Batch, micro_batches, pad_batch
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.settings import OptimizerConfig
from minirlhf.train.sft import sft_loss_and_gradients
from minirlhf.tree import tree_map
from minirlhf.workers import map_over, over_pieces, share, share_packed, sum_over

MODES = pytest.mark.parametrize("forks", [True, False], ids=["processes", "threads"])


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", 8)
    monkeypatch.setattr(batches, "MICRO_BATCH_FLOATS", 0)


@pytest.fixture
def forks(request, monkeypatch):
    monkeypatch.setattr(workers, "CAN_FORK", request.param)


def square(x):
    return x * x


def who(x):
    return os.getpid()


def refuse_three(x):
    if x == 3:
        raise ValueError(f"expected no three; got {x}")
    return x


def times(array, x):
    return {"sum": x * array.sum(), "array": x * array}


def copies(arrays):
    return [array.copy() for array in arrays]


def arrays_of(sizes):
    """Every way an array can lie in memory, of sizes below and above what a pipe takes at once."""
    return [
        layout(np.arange(float(4 * n), dtype=dtype).reshape(2, 2 * n))
        for n in sizes
        for dtype in (np.float32, np.int64)
        for layout in (np.ascontiguousarray, np.asfortranarray, lambda a: a[:, ::2], lambda a: a.T)
    ]


@MODES
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_results_come_in_the_order_of_the_parts(monkeypatch, forks, n):
    monkeypatch.setattr(workers, "CAN_FORK", forks)
    with side_by_side(n):
        for count in (1, 2, 3, 7):
            assert map_over(square, list(range(count))) == [x * x for x in range(count)]
            total = sum_over(functools.partial(times, np.arange(3.0)), list(range(count)))
            assert total["sum"] == 3.0 * sum(range(count))
            assert total["array"].tolist() == [x * sum(range(count)) for x in range(3)]
        assert map_over(square, []) == []


@MODES
def test_arrays_of_every_size_and_layout_come_whole_and_may_be_written_to(monkeypatch, forks):
    monkeypatch.setattr(workers, "CAN_FORK", forks)
    sizes = [0, 1, 1 << 12, 1 << 16]
    with side_by_side(3):
        there_and_back = map_over(copies, [arrays_of(sizes)] * 3)
        answers = map_over(arrays_of, [sizes] * 3)
    for answer in (*answers, *there_and_back):
        for got, expected in zip(answer, arrays_of(sizes), strict=True):
            assert got.dtype == expected.dtype and np.array_equal(got, expected)
            got += 1


@pytest.mark.skipif(not workers.CAN_FORK, reason="workers are threads here")
def test_the_work_is_shared_by_as_many_processes():
    with side_by_side(3):
        pids = map_over(who, list(range(6)))
    assert pids[0] == pids[3] == os.getpid()
    assert len(set(pids)) >= 2 and os.getpid() not in pids[1:3]  # one may be done with both shares
    assert map_over(who, [0, 1]) == [os.getpid()] * 2  # after the block, alone
    for pid in set(pids) - {os.getpid()}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@MODES
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_anywhere_is_raised_here_and_the_next_answer_is_its_own(monkeypatch, forks, place):
    monkeypatch.setattr(workers, "CAN_FORK", forks)
    parts = [3 if i == place else i + 10 for i in range(3)]
    with side_by_side(2):
        with pytest.raises(ValueError, match="expected no three; got 3"):
            map_over(refuse_three, parts)
        assert map_over(square, [4, 5, 6]) == [16, 25, 36]


def interrupt_here(x):
    if x == 1:
        raise KeyboardInterrupt
    return x


@MODES
def test_after_an_interruption_no_stale_answer_is_taken(monkeypatch, forks):
    monkeypatch.setattr(workers, "CAN_FORK", forks)
    with side_by_side(2):
        with pytest.raises(KeyboardInterrupt):
            map_over(interrupt_here, [1, 2])
        assert map_over(square, [7, 8]) == [49, 64]


def kill_myself(x):
    if x == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not workers.CAN_FORK, reason="workers are threads here")
def test_a_worker_that_was_killed_is_missed():
    with side_by_side(2):
        with pytest.raises(InputError, match="a worker process has ended"):
            map_over(kill_myself, [0, 1])
        assert map_over(square, [1, 2]) == [1, 4]


@pytest.mark.skipif(not workers.CAN_FORK, reason="workers are threads here")
def test_a_worker_that_was_killed_between_two_calls_is_missed():
    with side_by_side(2):
        pids = map_over(who, [0, 1])
        os.kill(pids[1], signal.SIGKILL)
        time.sleep(0.3)  # until the pool has noticed
        with pytest.raises(InputError, match="a worker process has ended"):
            map_over(square, [1, 2])
        assert map_over(square, [1, 2]) == [1, 4]


def unpicklable(x):
    return (lambda: x) if x == 1 else x


class Refusal(Exception):
    def __init__(self, *, number):
        super().__init__(f"number {number}")


def refuse_by_keyword(x):
    if x == 1:
        raise Refusal(number=x)


@pytest.mark.skipif(not workers.CAN_FORK, reason="workers are threads here")
@pytest.mark.parametrize(
    "f, says", [(unpicklable, "unpicklable|pickle"), (refuse_by_keyword, "in a worker: .*number 1")]
)
def test_what_cannot_come_back_is_told_and_the_crew_goes_on(f, says):
    with side_by_side(2):
        with pytest.raises(Exception, match=says):
            map_over(f, [0, 1])
        assert workers.n_workers() == 2 and map_over(square, [3, 4]) == [9, 16]


@pytest.mark.skipif(not workers.CAN_FORK, reason="workers are threads here")
def test_a_process_forked_inside_the_block_works_alone():
    """It holds the same pipes: an answer could go to the wrong one."""
    with side_by_side(2):
        process = multiprocessing.get_context("fork").Process(target=_exit_with_n_workers)
        process.start()
        process.join()
        assert process.exitcode == 1 and workers.n_workers() == 2


def _exit_with_n_workers():
    os._exit(workers.n_workers())


def test_a_sum_of_nothing_is_refused():
    with side_by_side(2), pytest.raises(ValueError, match="expected at least one part"):
        sum_over(_loss_and_gradient, [])


@MODES
def test_a_sum_stays_what_it_is_while_others_are_made(monkeypatch, forks):
    """Answers are summed up where they came in, which the next ones use again."""
    monkeypatch.setattr(workers, "CAN_FORK", forks)
    with side_by_side(3):
        sums = [sum_over(_loss_and_gradient, [x, 2 * x, 3 * x, 4 * x]) for x in (1.0, 10.0)]
    for total, expected in zip(sums, (10.0, 100.0), strict=True):
        assert total["loss"] == expected and (total["gradients"][0] == expected).all()
        total["gradients"][0] += 1  # it is ours


# --- shared memory


def test_shared_arrays_are_seen_as_they_are_now():
    """Made before or after the fork, whole or as views: never a stale number."""
    before = share(np.ones(4))
    with side_by_side(2):
        after = share(np.arange(6.0).reshape(2, 3))
        for array in (before, after, after[1], after[:, ::2].T, after.reshape(3, 2)[1:]):
            for value in (2.0, -3.0):
                array[...] = value
                results = map_over(functools.partial(np.multiply, array), [1.0, 10.0])
                assert_close(results[0], array, 0.0)
                assert_close(results[1], 10.0 * array, 0.0)
        for i in range(10):  # an address may be given again, its memory is not mistaken
            array = share(np.full(3, float(i)))
            assert [r["sum"] for r in map_over(functools.partial(times, array), [1, 1])] == [
                3.0 * i,
                3.0 * i,
            ]


@MODES
@pytest.mark.parametrize("of", [share, np.copy], ids=["shared", "plain"])
def test_pieces_are_written_to_whoever_works_on_them(monkeypatch, forks, of):
    """Of memory that the others do not see, this process works on all."""
    monkeypatch.setattr(workers, "CAN_FORK", forks)
    monkeypatch.setattr(workers, "PIECE", 3)
    with side_by_side(2):
        a, b = of(np.arange(10.0)), of(np.ones(10))
        assert over_pieces(_write_the_sum, a, b) == [6.0, 15.0, 24.0, 10.0]
    assert (b == np.arange(10.0) + 1).all()


def _write_the_sum(a, b):
    b += a
    return b.sum()


def test_shared_memory_is_given_back():
    count = len(workers.shared)
    files = len(os.listdir("/proc/self/fd")) if workers.CAN_FORK else 0
    arrays = [share(np.ones(3)) for _ in range(5)]
    del arrays
    assert len(workers.shared) == count
    assert not workers.CAN_FORK or len(os.listdir("/proc/self/fd")) == files


def test_a_shared_tree_is_a_copy():
    tree = make_params()
    _, shared = share_packed(tree)
    shared["transformer"]["wte"][:] = 0.0
    assert (tree["transformer"]["wte"] != 0).any()


def test_workers_use_the_parameters_of_the_last_update():
    batch = make_batch((3, 1, 4, 2), (2, 5, 1, 4), dtype=np.float32)
    params = {"transformer": make_params(dtype=np.float32)["transformer"]}
    optimizers = [Optimizer(params, OptimizerConfig(), total_steps=9) for _ in range(2)]
    with side_by_side(2):
        losses = [_losses(optimizers[0], batch)]
    losses.append(_losses(optimizers[1], batch))
    assert losses[0][0] > losses[0][-1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def _losses(optimizer, batch):
    losses = []
    for _ in range(4):
        loss, gradients = sft_loss_and_gradients(optimizer.params, batch, CONFIG)
        optimizer.step(gradients, loss=loss)
        losses.append(loss)
    return losses


# --- results


@pytest.mark.parametrize("n", [2, 3])
def test_gradients_are_those_of_one_worker(n):
    batch, params = make_batch((3, 1, 4, 2), (2, 5, 1, 4)), make_params()
    assert len(batch.groups(size=0, config=CONFIG)) > 2
    params = {"transformer": params["transformer"]}
    loss, gradients = sft_loss_and_gradients(params, batch, CONFIG)
    with side_by_side(n):
        other_loss, other = sft_loss_and_gradients(params, batch, CONFIG)
    assert other_loss == pytest.approx(loss, rel=MICRO_BATCH[np.float64])
    assert_trees_close(other, gradients, MICRO_BATCH[np.float64])


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_same_ids_are_sampled_by_any_number_of_workers(n):
    params = make_params(seed=3)["transformer"]
    ids = make_ids(np.random.default_rng(0).integers(1, 6, size=6))
    batch = pad_batch(ids, [[]] * 6, pad_id=Letters.pad, config=CONFIG, dtype=np.float64)

    def run():
        return generated(params, batch)

    alone = run()
    with side_by_side(n):
        shared = run()
    assert np.array_equal(alone.tokens, shared.tokens)
    assert np.array_equal(alone.mask, shared.mask)


def test_groups_hold_every_row_once_and_like_lengths_together():
    lengths = [5, 1, 9, 2, 7, 7, 3]
    for size in (0, 1, 2, 3, 7, 100):
        groups = micro_batches(lengths, config=CONFIG, size=size)
        assert sorted(np.concatenate(groups).tolist()) == list(range(7))
        assert not size or max(map(len, groups)) <= size
        if len(groups) > 1:
            in_order = [lengths[i] for i in np.concatenate(groups)]
            assert in_order == sorted(lengths, reverse=True)
    assert [g.tolist() for g in micro_batches(lengths, config=CONFIG, device="cuda")] == [
        list(range(7))
    ]


@pytest.mark.parametrize(
    ("gpt", "n", "length", "groups"),
    [
        (GPTConfig(64, 16, 2, 2, 32), 256, 16, 2),  # all would fit, but two workers are to share
        (GPTConfig(512, 64, 4, 4, 128), 64, 64, 10),  # at most 7 sequences, 484 tokens
        (GPTConfig(2048, 192, 6, 8, 256), 32, 192, 16),  # the least: 384 tokens
        (GPTConfig(2048, 192, 6, 8, 256), 9, 192, 6),  # 5 would do, but not be even
        (GPTConfig(2048, 192, 6, 8, 256), 5, 192, 4),
        (GPTConfig(64, 16, 2, 2, 32), 3, 16, 1),  # too little to share
        (GPTConfig(64, 2048, 2, 2, 32), 3, 2048, 3),  # a sequence is not cut
        (GPTConfig(32000, 64, 2, 2, 64), 64, 64, 16),  # a large vocabulary: its least, 256 tokens
        (GPTConfig(50257, 256, 12, 12, 768), 32, 256, 12),  # many parameters: about a thousand
    ],
)
def test_groups_suit_the_cache_and_two_workers(monkeypatch, gpt, n, length, groups):
    monkeypatch.undo()  # the sizes of the package
    got = micro_batches([length] * n, config=gpt)
    assert len(got) == groups
    sizes = [len(group) for group in got]
    assert sum(sizes) == n and max(sizes) - min(sizes) <= 1


def test_a_part_of_a_batch_has_the_columns_it_needs():
    batch = make_batch((3, 1, 4, 2), (2, 5, 1, 4))
    part = batch.part(np.array([1, 3]))
    assert isinstance(part, Batch)
    assert part.prompt_len == 2 and part.responses.shape == (2, 5)
    assert np.array_equal(part.responses[:, :4], batch.responses[[1, 3], :4])


# --- where they run


def test_a_daemon_works_alone():
    """multiprocessing lets it have no children: sweeps that train in a pool."""
    context = multiprocessing.get_context("fork" if workers.CAN_FORK else "spawn")
    with context.Pool(1) as pool:
        assert pool.apply(_workers_of_a_daemon) == 1


def _workers_of_a_daemon():
    with side_by_side(2):
        return workers.n_workers()


def test_zero_means_every_core():
    with side_by_side(0):
        assert workers.n_workers() == usable_cores() >= 1


@pytest.mark.skipif(not workers.CAN_FORK, reason="workers are threads here")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_one_who_forked_them(end):
    script = """
import os, time
from minirlhf.crew import side_by_side
from minirlhf.workers import map_over
def who(x):
    time.sleep(0.2)  # so that none does two shares
    return os.getpid()
with side_by_side(3):
    print(*map_over(who, [0, 1, 2]), flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(set(pids)) == 3
        parent.send_signal(end)
    deadline = time.monotonic() + 20
    while any(_lives(pid) for pid in pids[1:]):
        assert time.monotonic() < deadline, "a worker outlives the one who forked it"
        time.sleep(0.05)


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_trees_of_parts_may_hold_numbers():
    with side_by_side(2):
        total = sum_over(_loss_and_gradient, [1.0, 2.0, 3.0])
    assert total["loss"] == 6.0
    assert tree_map(lambda a: a.tolist(), total["gradients"]) == [[6.0, 6.0]]


def _loss_and_gradient(x):
    return {"loss": np.float32(x), "gradients": [np.full(2, x)]}
