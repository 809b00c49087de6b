"""What test_mpi.py runs on every rank: `mathematics`, `python OUT`, or a command of minirlhf.

All checks are made by all ranks: what does not hold ends the job with a traceback.
"""

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
from tiny import ppo_step
from tiny_run import flat, tiny_config, write_names
from tolerances import MICRO_BATCH, assert_close, assert_trees_close

import minirlhf
from minirlhf import workers
from minirlhf.app import cli
from minirlhf.errors import InputError
from minirlhf.ranks import alone, n_ranks, together
from minirlhf.runs import folder, pipeline
from minirlhf.train import batches
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.settings import PPOConfig
from minirlhf.workers import map_over, sum_over

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", 0)))
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


def one_step():
    """(response ids, gradient of the first update, parameters after all) in float64."""
    seen, step = [], Optimizer.step

    def spy(optimizer, gradients, **told):
        seen.append(gradients)
        return step(optimizer, gradients, **told)

    Optimizer.step = spy
    try:
        ids, _, params, _ = ppo_step("cpu", settings=PPOConfig(batch_size=6, minibatches=2))
    finally:
        Optimizer.step = step
    return ids, seen[0], params


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
        assert all_have(flat(params)), name
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


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "mathematics":
        mathematics()
    elif what == "python":
        from_python(Path(*rest))
    else:
        command()
