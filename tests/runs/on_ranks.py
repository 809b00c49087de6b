"""What test_mpi.py runs on every rank: `mathematics`, `gpus`, `python OUT`, or a command.

All checks are made by all ranks: what does not hold ends the job with a traceback. With the number
of GPUs that a process sees in MINIRLHF_STAND_IN the stand-in is minirlhf's "cuda".
"""

import os
import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from fakegpu import FakeArray, fakegpu
from fakenccl import Device, NcclCommunicator, NcclError, gpus_of_the_stand_in, nccl
from tiny import CONFIG, ppo_step
from tiny_run import flat, tiny_config, write_names
from tolerances import MICRO_BATCH, assert_close, assert_trees_close

import minirlhf
from minirlhf import backend, workers
from minirlhf.app import cli
from minirlhf.backend import to_host
from minirlhf.errors import InputError
from minirlhf.ranks import Ranks, alone, n_ranks, take_device, together
from minirlhf.runs import folder, pipeline
from minirlhf.train import batches
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import tree_leaves, tree_map
from minirlhf.workers import map_over, sum_over

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", 0)))
GPUS = os.environ.get("MINIRLHF_STAND_IN", "")  # how many; and "bare": without NCCL
PLANTED = os.environ.get("MINIRLHF_PLANTED", "")  # what goes wrong, where
ASKED = []  # what this rank's reward has been asked
FAULTS = {"refusal": InputError("planted: expected nothing"), "bug": ZeroDivisionError("planted")}


def square(x):
    return x * x


def tree(x):
    return {"a": np.full(2, x, np.float32), "b": [np.full((1, 2), 10.0 * x), 0.5 * x]}


def all_have(array):
    """Does every rank have the same bits?"""
    return workers.ranks is None or len({*workers.ranks.comm.allgather(array.tobytes())}) == 1


def parts_are_shared():
    for count in range(2 * n_ranks()):
        parts = list(range(count))
        assert map_over(square, parts) == [x * x for x in parts]
        if not parts:
            continue
        total, n = sum_over(tree, parts), sum(parts)
        assert total["a"].dtype == np.float32 and total["a"].tolist() == [n, n]
        assert total["b"][0].tolist() == [[10.0 * n] * 2] and total["b"][1] == 0.5 * n
    with alone():
        assert map_over(os.getenv, ["HOME"]) == [os.getenv("HOME")]  # nobody else takes part


def one_step(device="cpu"):
    """(response ids, gradient of the first update, parameters after all) in float64."""
    seen, step = [], Optimizer.step

    def spy(optimizer, gradients, **told):
        seen.append(gradients)
        return step(optimizer, gradients, **told)

    Optimizer.step = spy
    try:
        ids, _, params, _ = ppo_step(device, settings=PPOConfig(batch_size=6, minibatches=2))
    finally:
        Optimizer.step = step
    return ids, tree_map(to_host, seen[0]), params


def mathematics():
    """Sums, maps and a step of PPO are those of one process."""
    batches.MICRO_BATCH_TOKENS, batches.MICRO_BATCH_FLOATS = 8, 0
    with together():
        n = n_ranks()
        parts_are_shared()
        with alone():
            ids, gradient, params = one_step()
        ids_of_all, gradient_of_all, params_of_all = one_step()
        assert ids_of_all == ids
        assert_trees_close(gradient_of_all, gradient, MICRO_BATCH[np.float64])
        assert_close(params_of_all, params, 1e-8)  # Adam divides by the root of small numbers
        assert all_have(flat(gradient_of_all)) and all_have(params_of_all)
        assert n == 1 or not all_have(np.array(RANK))
    print(f"rank {RANK} of {n}: as one")


def on_gpu(x):
    """On this rank's, of three dtypes, one of them whole numbers."""
    device = fakegpu.asarray
    return {
        "a": device(np.full(2, x, np.float32)),
        "b": [device(np.full((1, 2), 10.0 * x)), device(np.array(0.5 * x))],
        "n": device(np.array([x, 7 * x])),
        "empty": device(np.zeros((0, 3))),
    }


def watched(seen):
    """`Ranks.sum_over`, which may not wait for a GPU, and sends one message for each dtype."""
    asked = Ranks.sum_over

    def sum_over(ranks, f, parts):
        before = fakegpu.operations.count("allReduce")
        with fakegpu.no_sync():
            total = asked(ranks, f, parts)
        leaves = tree_leaves(total)
        assert {(type(leaf), leaf.on) for leaf in leaves} == {(FakeArray, RANK)}
        messages = fakegpu.operations.count("allReduce") - before
        assert messages == len({leaf.dtype for leaf in leaves})
        seen.append(len(parts))
        return total

    return sum_over


def gpus_share_the_parts():
    for count in range(1, 2 * n_ranks()):
        parts, n = list(range(1, count + 1)), count * (count + 1) // 2
        total = sum_over(on_gpu, parts)
        assert total["a"].dtype == np.float32 and total["empty"].shape == (0, 3)
        assert total["n"].dtype == int and total["n"].get().tolist() == [n, 7 * n]
        assert tree_map(to_host, total["b"][0]).tolist() == [[10.0 * n] * 2]
        assert total["a"].get().tolist() == [n, n] and total["b"][1].get() == 0.5 * n
        found = map_over(on_gpu, parts)
        assert {leaf.on for leaf in tree_leaves(found)} == {RANK}
        assert_trees_close(tree_map(to_host, found), tree_map(to_host, list(map(on_gpu, parts))), 0)
    with pytest.raises(TypeError, match="numbers that NCCL adds up; got bool"):
        sum_over(lambda x: fakegpu.asarray(np.array([x > 1])), [1, 2])


def calls_that_nccl_refuses():
    """The stand-in is one of it only if it sees them."""
    gpus, x, host = workers.ranks.gpus, fakegpu.asarray(np.arange(3.0)), np.arange(3.0)
    n, here, elsewhere = n_ranks(), x.data.ptr, host.ctypes.data
    right = [here, here, 3, nccl.NCCL_FLOAT64, nccl.NCCL_SUM, 0]
    wrong = [(0, elsewhere), (1, elsewhere), (2, 2), (2, 4), (3, nccl.NCCL_FLOAT32), (4, 2), (5, 8)]
    for i, other in wrong:
        with pytest.raises(NcclError):
            gpus.allReduce(*right[:i], other, *right[i + 1 :])
    other = fakegpu.asarray(np.arange(3.0 + RANK))  # as many as no other rank has
    with pytest.raises(NcclError, match="different things"):
        gpus.allReduce(*[other.data.ptr] * 2, 3 + RANK, *right[3:])
    gpus.allReduce(*right)
    assert x.get().tolist() == [0.0, n, 2.0 * n]
    key = workers.ranks.comm.bcast(nccl.get_unique_id())
    Device(0).use()
    with pytest.raises(NcclError, match="duplicate GPU"):
        NcclCommunicator(n, key, RANK)
    if RANK:
        with pytest.raises(TypeError, match=f"an array of GPU {RANK} while GPU 0"):
            x + 1.0
        with pytest.raises(NcclError, match="another GPU"):
            gpus.allReduce(*right)
    Device(RANK).use()


def one_gpu_a_rank():
    """Sums, maps and a step of PPO on GPUs are those of one process of NumPy."""
    with together():
        n, seen = n_ranks(), []
        take_device("cuda")
        assert fakegpu.device == RANK
        with alone():
            ids, gradient, params = one_step()
        Ranks.sum_over, plain = watched(seen), Ranks.sum_over
        ids_of_all, gradient_of_all, params_of_all = one_step("cuda")
        Ranks.sum_over = plain
        assert len(seen) == 8 and min(seen) == n  # each has a share of each minibatch
        assert ids_of_all == ids
        assert_trees_close(gradient_of_all, gradient, MICRO_BATCH[np.float64])
        assert_close(params_of_all, params, 1e-8)  # as above
        assert all_have(flat(gradient_of_all)) and all_have(params_of_all)
        groups = {"lengths": [5] * 7, "config": CONFIG, "device": "cuda"}
        assert len(batches.micro_batches(**groups)) == n
        with alone():
            assert len(batches.micro_batches(**groups)) == 1
        gpus_share_the_parts()
        calls_that_nccl_refuses()
    print(f"rank {RANK} of {n}: as one")


def chance(text):
    """A reward that says something else in each process, and each time."""
    ASKED.append(text)
    return random.Random(os.getpid() + len(ASKED)).random()


def from_python(out):
    """`minirlhf.train` with a reward that all ranks have to hear from one."""
    with together():
        names = write_names(f"{out}.txt") if RANK == 0 else f"{out}.txt"
        ready = {"corpus": names, "reward": chance, "progress": False}
        run = minirlhf.train(tiny_config(out, eval_every=0), **ready)
        assert bool(ASKED) == (RANK == 0)  # nobody else was asked
        assert all_have(flat(run.policy))
        replies = run.sample(["a", "b", "c"])
    assert run.sample(["a", "b", "c"]) == replies  # by itself, after the block
    print(f"rank {RANK}: as one")


def same_everywhere(save_params):
    def save(session, name, params, *more, **scale):
        assert all_have(flat(tree_map(to_host, params))), name
        save_params(session, name, params, *more, **scale)

    return save


def planted(sample_batch):
    def sample(*arguments):
        kind, rank, iteration = PLANTED.split()
        sample.calls += 1
        if kind == "slow":
            time.sleep(0.3)
        elif (RANK, sample.calls) == (int(rank), int(iteration)):
            raise FAULTS[kind]
        return sample_batch(*arguments)

    sample.calls = 0
    return sample


def command():
    """A command of minirlhf, with much work for many ranks in every batch."""
    batches.MICRO_BATCH_TOKENS, batches.MICRO_BATCH_FLOATS = 16, 0
    folder.save_params = same_everywhere(folder.save_params)
    if PLANTED:
        pipeline._sample_batch = planted(pipeline._sample_batch)
        Path(os.environ["MINIRLHF_PIDS"], str(RANK)).write_text(str(os.getpid()))
    cli.main()


def stand_in(how):
    """Let it be minirlhf's "cuda", as long as what is returned is not closed."""
    (n, *bare), array_module = how.split(), backend.array_module
    backend.array_module = lambda name: fakegpu if name == "cuda" else array_module(name)
    return gpus_of_the_stand_in(int(n), has_nccl=not bare)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    with ExitStack() as stack:
        if GPUS:
            stack.enter_context(stand_in(GPUS))
        if what == "mathematics":
            mathematics()
        elif what == "gpus":
            one_gpu_a_rank()
        elif what == "python":
            from_python(Path(*rest))
        else:
            command()
