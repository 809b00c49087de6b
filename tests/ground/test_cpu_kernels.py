"""The stand-in for CUDA gives its words their meaning, and refuses what a GPU leaves undefined."""

import numpy as np
import pytest
from cpu_kernels import HAS_COMPILER, CpuModule
from fakegpu import fakegpu

from minirlhf.backend import to_host

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no g++ to run the kernels on a CPU")
MACRO = '#define KERNEL extern "C" __global__ void\n'


def run(body, x, *, threads=64, blocks=1, const=""):
    """x (n,) after a kernel with this body."""
    code = f"{MACRO}KERNEL f({const}double* x, long long n) {{ {body} }}"
    module = CpuModule(code=code, options=("-Dreal=double",))
    module.compile()
    array = fakegpu.array(np.asarray(x, dtype=np.float64))
    module.get_function("f")((blocks,), (threads,), (array, np.int64(array.size)))
    return to_host(array)


def test_every_thread_of_every_block_knows_its_place():
    body = "const int i = blockIdx.x * blockDim.x + threadIdx.x; x[i] = 1000 * gridDim.x + i;"
    np.testing.assert_array_equal(run(body, np.zeros(192), blocks=3), 3000 + np.arange(192))


def test_behind_a_barrier_everybody_has_written():
    """Thread t takes what thread t + 1 wrote, in a block that runs upwards and one that doesn't."""
    body = """__shared__ double shared[64];
    shared[threadIdx.x] = x[64 * blockIdx.x + threadIdx.x];
    __syncthreads();
    x[64 * blockIdx.x + threadIdx.x] = shared[(threadIdx.x + 1) % 64];"""
    got = run(body, np.arange(128), blocks=2)
    np.testing.assert_array_equal(got, np.roll(np.arange(128).reshape(2, 64), -1, axis=1).ravel())


@pytest.mark.parametrize("other", ["threadIdx.x + 1", "threadIdx.x + 63", "threadIdx.x ^ 32"])
def test_without_the_barrier_somebody_reads_nan(other):
    body = f"""__shared__ double shared[64];
    shared[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = shared[({other}) % 64];"""
    assert np.isnan(run(body, np.arange(64))).any()


def test_shared_memory_holds_nan_before_every_block():
    body = """__shared__ double shared[2];
    if (threadIdx.x == 0) { x[blockIdx.x] = shared[1]; shared[1] = 5; }"""
    assert np.isnan(run(body, np.zeros(3), blocks=3)).all()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("__shfl_xor_sync(~0u, x[threadIdx.x], 5)", np.arange(64) ^ 5),
        (
            "__shfl_down_sync(~0u, x[threadIdx.x], 8)",
            np.where(np.arange(64) % 32 < 24, np.arange(64) + 8, np.arange(64)),
        ),
    ],
)
def test_a_shuffle_takes_the_number_of_another_lane_of_the_warp(word, expected):
    got = run(f"const double y = {word}; x[threadIdx.x] = y;", np.arange(64))
    np.testing.assert_array_equal(got, expected)


def test_shuffles_in_a_row_do_not_mix_their_numbers():
    body = """double y = x[threadIdx.x];
    for (int step = 16; step > 0; step /= 2) y += __shfl_xor_sync(~0u, y, step);
    x[threadIdx.x] = y;"""
    x = np.arange(64.0)
    np.testing.assert_array_equal(run(body, x), np.repeat(x.reshape(2, 32).sum(axis=1), 32))


def test_atomics_count_everybody():
    body = """atomicAdd(x, 1.0); atomicMax(x + 1, double(threadIdx.x));
    atomicMin(x + 2, -double(threadIdx.x));"""
    np.testing.assert_array_equal(run(body, np.zeros(3), blocks=2), [128, 63, -63])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 32) __syncthreads();", "a barrier waits for threads that have ended"),
        ("if (threadIdx.x < 32) __syncthreads();\nelse\n__syncthreads();", "at two barriers"),
        ("if (threadIdx.x != 3) __shfl_xor_sync(~0u, 1.0, 1);", "a lane that does not come"),
        ("__shfl_xor_sync(0xffffu, 1.0, 1);", "a lane shuffles that is not in its mask"),
        ("if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffu, 1.0, 16);", "reads a lane that is"),
        ("if (threadIdx.x == 0) x[n] = 1;", "wrote beyond the ends"),
        ("if (threadIdx.x == 0) x[-1] = 1;", "wrote beyond the ends"),
        ("if (threadIdx.x == 0) *(double*)x = 1;", "const"),
    ],
)
def test_what_a_gpu_leaves_undefined_is_an_error(body, message):
    with pytest.raises(AssertionError, match=message):
        run(body, np.zeros(8), const="const " if message == "const" else "")


def test_an_entry_beyond_the_end_is_nan():
    assert np.isnan(run("x[0] = x[n] + x[-1];", np.zeros(3), threads=32)[0])


@pytest.mark.parametrize("threads", [1, 33, 1056])
def test_blocks_are_whole_warps_of_at_most_1024_threads(threads):
    with pytest.raises(AssertionError, match="a block of an odd size"):
        run("x[0] = 1;", np.zeros(3), threads=threads)


@pytest.mark.parametrize(
    "arguments",
    [
        [fakegpu.array(np.zeros(3)), 3],  # cupy would take a Python number for its own dtype
        [fakegpu.array(np.zeros(3)), np.float64(3)],
        [fakegpu.array(np.zeros(3, np.float32)), np.int64(3)],
        [fakegpu.array(np.zeros((3, 2))).T, np.int64(6)],  # lies in pieces
        [np.zeros(3), np.int64(3)],
    ],
    ids=["int", "double", "float", "strided", "host"],
)
def test_arguments_are_what_the_kernel_declares(arguments):
    module = CpuModule(code=MACRO + "KERNEL f(double* x, long long n) {}", options=["-Dreal=float"])
    module.options = tuple(module.options)
    module.compile()
    with pytest.raises(AssertionError, match="f: argument"):
        module.get_function("f")((1,), (32,), arguments)


def test_a_source_that_is_no_c_is_refused():
    with pytest.raises(RuntimeError, match=r"g\+\+.*error"):
        CpuModule(code="this is no C", options=("-Dreal=float",)).compile()
