"""The fused kernels, without a GPU: their text runs on a CPU, and NVIDIA's compiler accepts it.

On a GPU the pairs call kernels.cu through kernels.py; here the fake GPU launches the same text,
compiled by g++ (cpu_kernels.py). What this cannot show: speed, a GPU's rounding and its exp.
"""

import ast
import importlib
import inspect
import re

import numpy as np
import nvrtc
import pytest
from cpu_kernels import (
    HAS_COMPILER,
    SOURCE,
    CpuModule,
    CpuStream,
    CudaError,
    kernels_on_the_fake_gpu,
    parameters,
)
from fakegpu import fakegpu, numpy_as_on_a_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, compare
from sources import FILES, ROOT, parse
from tiny import CONFIG, HypothesisDraw, generated, make_batch, make_params, moved, ppo_step
from tolerances import KERNEL, KERNEL_UPDATE, assert_close, assert_trees_close

from minirlhf import backend, kernels
from minirlhf.app.cases import TABLE, Draw
from minirlhf.backend import to_host
from minirlhf.nn import layers, sampling
from minirlhf.rlhf import logprobs
from minirlhf.train.optimizer import NonFiniteError, Optimizer
from minirlhf.train.settings import OptimizerConfig, PPOConfig
from minirlhf.tree import tree_items, tree_map

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no g++ to run the kernels on a CPU")
TEXT = SOURCE.read_text(encoding="utf-8")
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture(scope="module", autouse=True)
def kernels_are_launched():
    with kernels_on_the_fake_gpu():
        yield


# -- the same numbers ------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=min(80, settings().max_examples))  # a thread of a GPU costs a CPU a lot
@given(data=st.data())
def test_a_kernel_gives_the_numbers_of_the_plain_lines(name, dtype, data):
    make, kernels = CASES[name]
    launched = compare(make(HypothesisDraw(data.draw)), dtype)
    assert set(launched) & set(kernels.split())


def test_every_kernel_has_a_case():
    named = {kernel for _, kernels in CASES.values() for kernel in kernels.split()}
    assert named == set(parameters(TEXT))
    assert len(re.findall("__global__ void", TEXT)) == 1  # in the macro: no kernel without it


def marked(tree):
    """The functions of a file that are marked @fused."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            if "fused" in map(ast.unparse, node.decorator_list):
                yield node.name


def test_every_function_that_is_marked_has_a_launch_that_takes_its_arguments():
    names = []
    for path in FILES:
        for name in marked(parse(path)):
            names.append(name)
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            plain = inspect.signature(getattr(importlib.import_module(module), name))
            its, *launch = inspect.signature(getattr(kernels, name)).parameters.items()
            assert its[0] == "its"
            for (ours, mine), theirs in zip(launch, plain.parameters.values(), strict=False):
                same = (theirs.name, theirs.kind, theirs.default)
                assert (ours, mine.kind, mine.default) == same, f"{name}: {theirs}"
            assert len(launch) >= len(plain.parameters), name
    assert len(names) == len(set(names)) > 15


def there(value):
    return moved(value, fakegpu.asarray)


def back(tree):
    return tree_map(to_host, tree)


@DTYPES
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_pair_gives_numpys_numbers_where_there_are_kernels(row, dtype):
    def cast(a):
        return a.astype(dtype) if a.dtype == np.float64 else a

    for seed in range(2):
        rng = np.random.default_rng(seed)
        arrays, constants = moved(row.make(Draw(rng)), cast)
        with numpy_as_on_a_gpu():
            out, cache = row.forward(*arrays, **constants)
            dout = np.asarray(rng.standard_normal(np.shape(out)), dtype=dtype)
            gradients = row.backward(dout, cache)
        with fakegpu.no_sync():
            device_arrays, device_constants = there((arrays, constants))
            device_out, device_cache = row.forward(*device_arrays, **device_constants)
            device_gradients = row.backward(there(dout), device_cache)
        if not isinstance(gradients, tuple):
            gradients, device_gradients = (gradients,), (device_gradients,)
        # a model of several layers gathers their errors
        tolerance = KERNEL[dtype] * (10 if row.is_model else 1)
        assert to_host(device_out).dtype == np.asarray(out).dtype
        assert_close(to_host(device_out), out, tolerance)
        assert_trees_close(back(list(device_gradients)), list(gradients), tolerance)


@pytest.mark.parametrize("forward_has_a_kernel", [True, False])
@pytest.mark.parametrize("name", ["layernorm", "rmsnorm", "swiglu", "token_logprobs", "entropy"])
def test_a_forward_of_one_kind_and_a_backward_of_the_other_fit(
    name, forward_has_a_kernel, monkeypatch
):
    f, arrays, constants = CASES[name][0](Draw(np.random.default_rng(5)))
    if len(arrays) < 2 or "keep" in constants:
        f, arrays, constants = CASES[name][0](Draw(np.random.default_rng(2)))
    forward, backward = f.__closure__[1].cell_contents, f.__closure__[0].cell_contents
    *arguments, dout = map(fakegpu.array, arrays)
    *host, host_dout = (a.copy() for a in arrays)
    out, cache = forward(*host, **constants)
    expected = backward(host_dout, cache)
    monkeypatch.setenv("MINIRLHF_KERNELS", "1" if forward_has_a_kernel else "0")
    CpuModule.launched.clear()
    out, cache = forward(*arguments, **there(constants))
    assert bool(CpuModule.launched) == forward_has_a_kernel
    monkeypatch.setenv("MINIRLHF_KERNELS", "0" if forward_has_a_kernel else "1")
    got = backward(dout, cache)
    assert bool(CpuModule.launched)  # one of the two
    got, expected = (x if isinstance(x, tuple) else (x,) for x in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert_close(to_host(a), b, KERNEL[np.float64])


# -- whole steps -----------------------------------------------------------------------------------


@pytest.fixture
def cuda_is_the_stand_in(monkeypatch):
    array_module = backend.array_module
    monkeypatch.setattr(
        backend, "array_module", lambda name: fakegpu if name == "cuda" else array_module(name)
    )


UPDATE_KERNELS = (  # all but those of Llama
    "causal_mask norm_forward split_heads masked_exp over_total add_bias gelu_forward "
    "token_logprobs_forward entropy_forward entropy_backward token_logprobs_backward norm_backward "
    "column_sums softmax_backward join_heads log_softmax embed_token attend draw_into few_rows "
    "few_rows_transposed "
    "ppo_clip_forward value_loss_forward squares clip_norm move_if_finite"
)


@DTYPES
@pytest.mark.parametrize("form", ["torch", "tf"])
def test_a_whole_update_of_ppo(form, dtype, cuda_is_the_stand_in):
    settings = PPOConfig(
        batch_size=6,
        epochs=1,
        ent_coef=0.1,
        value_clip_eps=0.2,
        kl_mode="loss_full" if dtype == np.float64 else "reward_k1",
        optimizer=OptimizerConfig(weight_decay=0.1, form=form),
    )
    with numpy_as_on_a_gpu():
        ids, mask, flat, metrics = ppo_step("cpu", settings=settings, dtype=dtype)
    CpuModule.launched.clear()
    device_ids, device_mask, device_flat, device_metrics = ppo_step(
        "cuda", settings=settings, dtype=dtype
    )
    assert set(CpuModule.launched) == set(UPDATE_KERNELS.split())
    assert device_ids == ids
    assert_close(device_mask, mask, 0.0)
    assert_close(device_flat, flat, KERNEL_UPDATE[dtype])
    assert device_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-4)
    start = [leaf.ravel() for _, leaf in tree_items(make_params(seed=1, dtype=dtype))]
    assert np.abs(flat - np.concatenate(start)).max() > 1e-5  # something was learnt


def on_the_stand_in(dtype, **settings):
    params = there(make_params(dtype=dtype))
    return Optimizer(params, OptimizerConfig(learning_rate=0.1, **settings), total_steps=9)


def gradients_of(optimizer, seed=0):
    rng = np.random.default_rng(seed)
    return tree_map(
        lambda a: fakegpu.array(rng.standard_normal(a.shape), a.dtype), optimizer.params
    )


@DTYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_waits_once_and_one_that_is_refused_changes_nothing(bad, dtype):
    optimizer = on_the_stand_in(dtype, weight_decay=0.1)
    half, before = fakegpu.array(0.5), fakegpu.sync_count
    told = optimizer.step(gradients_of(optimizer), loss=half, parts={"half": half})
    assert fakegpu.sync_count == before + 1 and "move_if_finite" in CpuModule.launched
    assert told["half"] == 0.5 and optimizer.updates == 1
    state = optimizer.state_tree()
    gradients = gradients_of(optimizer, seed=1)
    gradients["transformer"]["ln_f"]["bias"][0] = bad
    for wrong, loss, said in (
        (gradients, half, "gradient of transformer.ln_f.bias is not"),
        (gradients_of(optimizer), fakegpu.array(bad), f"the loss .{bad}. is not"),
    ):
        with pytest.raises(NonFiniteError, match=said):
            optimizer.step(wrong, loss=loss)
        for name, array in optimizer.state_tree().items():
            assert_close(array, state[name], 0.0)
    optimizer.step(gradients_of(optimizer), loss=0.5)
    assert optimizer.updates == 2


def test_an_update_that_overflows_is_told():
    optimizer = on_the_stand_in(np.float32)
    optimizer.config = OptimizerConfig(learning_rate=1e39)
    made = pytest.raises(NonFiniteError, match="the update made transformer.wte nan or inf")
    with made, np.errstate(all="ignore"):
        optimizer.step(gradients_of(optimizer), loss=0.0)


@pytest.mark.parametrize("every", [1, 3])
def test_responses_that_leave_the_batch_are_those_of_the_plain_lines(every, monkeypatch):
    monkeypatch.setattr(sampling, "ALIVE_CHECK_EVERY", (every, every))
    monkeypatch.setattr(sampling, "DROP_BELOW", 1.0)
    params = make_params(seed=3)["transformer"]
    batch = make_batch([3, 1, 4, 2] * 4, [1] * 16)
    batch = batch._replace(tokens=batch.tokens[:, :4], mask=batch.mask[:, :4])
    fakegpu.operations.clear()
    expected, got = generated(params, batch), generated(*there((params, batch)))
    assert len(set(expected.mask.sum(axis=1))) > 4
    assert bool(fakegpu.operations.count("graph")) == (every > 1)  # all of them make new graphs
    assert_close(to_host(got.tokens), expected.tokens, 0.0)
    assert_close(to_host(got.mask), expected.mask, 0.0)
    real = expected.mask[:, 4:, None] > 0
    hidden = (np.where(real, h, 0.0) for h in (to_host(got.hidden), expected.hidden))
    assert_close(*hidden, KERNEL[np.float64] * 10)


def drawn_without_end(B=3, **settings):
    """Ten tokens each, by NumPy and by the stand-in; how many graphs it was sent."""
    params = make_params(seed=3)["transformer"]
    prompts = {"tokens": np.ones((B, 2), np.int64), "mask": np.ones((B, 2))}
    same = {"config": CONFIG, "max_new": 10, "stop_id": -1, "pad_id": 0}
    same["sampling"] = sampling.Sampling(**settings)
    fakegpu.operations.clear()
    expected, got = (
        sampling.generate(a, **b, **same, rng=np.random.default_rng(1))
        for a, b in ((params, prompts), there((params, prompts)))
    )
    assert_close(to_host(got.tokens), expected.tokens, 0.0)
    assert_close(to_host(got.hidden), expected.hidden, KERNEL[np.float64] * 10)
    return fakegpu.operations.count("graph")


def test_from_the_third_token_on_a_token_is_one_operation():
    assert drawn_without_end() == 8
    after = fakegpu.operations[fakegpu.operations.index("graph") :]
    looks = {"__gt__", "sum"}  # at who has stopped
    assert set(after) <= {"graph", "concatenate"} | looks and after.count("sum") == 1


def test_a_graph_is_made_of_nothing_but_kernels():
    x = fakegpu.array(np.ones(3))
    with pytest.raises(AssertionError, match="in a graph: ..__add__"):
        kernels.as_a_graph(fakegpu, lambda: x + x)


def test_a_graph_keeps_the_memory_that_it_works_on():
    logits = fakegpu.array(np.ones((2, 3)))
    launch, kept = kernels.as_a_graph(fakegpu, lambda: logprobs.log_softmax(logits))
    launch()
    kept.clear()  # on a GPU: others may have it now
    with pytest.raises(AssertionError, match="log_softmax: argument 0"):
        launch()


@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}])
def test_a_distribution_that_is_cut_makes_no_graph(cut):
    assert drawn_without_end(**cut) == 0


def test_large_products_are_left_to_cublas(monkeypatch):
    monkeypatch.setattr(kernels, "FEW", 1)
    assert drawn_without_end(B=9) == 0 and drawn_without_end(B=8) == 8


def test_one_sentence_warns_where_nothing_can_be_captured(monkeypatch):
    def refuse(stream):
        CpuStream.captured = None
        raise CudaError("not permitted")

    monkeypatch.setattr(CpuStream, "end_capture", refuse)
    with pytest.warns(UserWarning, match="launched one by one: not permitted"):
        assert drawn_without_end() == 0


# -- where the plain lines answer ------------------------------------------------------------------


def launched_by(f, *args, **kwargs):
    CpuModule.launched.clear()
    result = f(*args, **kwargs)
    return result, list(CpuModule.launched)


def test_numpy_takes_the_plain_lines():
    x, gain, bias = np.random.default_rng(0).standard_normal((3, 5))
    (y, cache), launched = launched_by(layers.layernorm_forward, x, gain, bias)
    assert launched == []
    plain, _ = layers.layernorm_forward.__wrapped__(x, gain, bias)
    assert_close(y, plain, 0.0)


def test_one_setting_turns_the_kernels_off(monkeypatch):
    x = fakegpu.array(np.ones((2, 3)))
    assert launched_by(layers.gelu_forward, x)[1] == ["gelu_forward"]
    monkeypatch.setenv("MINIRLHF_KERNELS", "0")
    assert launched_by(layers.gelu_forward, x)[1] == []


@pytest.mark.parametrize("dtype", [np.complex128, np.float16, np.int64])
def test_other_dtypes_take_the_plain_lines(dtype):
    x = np.arange(6).reshape(2, 3).astype(dtype)
    (y, _), launched = launched_by(layers.gelu_forward, fakegpu.array(x))
    assert launched == []
    assert_close(to_host(y), layers.gelu_forward(x)[0], 0.0)


def test_two_dtypes_take_the_plain_lines():
    x, gain = fakegpu.array(np.ones((2, 3))), fakegpu.array(np.ones(3, dtype=np.float32))
    assert launched_by(layers.rmsnorm_forward, x, gain)[1] == []


def test_empty_arrays_take_the_plain_lines():
    (y, _), launched = launched_by(layers.gelu_forward, fakegpu.array(np.ones((0, 3))))
    assert launched == [] and y.shape == (0, 3)


@pytest.mark.parametrize(
    ("f", "arrays", "constants", "message"),
    [
        (layers.layernorm_forward, [(2, 3), (3,), (2,)], {}, "expected gain and bias of shape"),
        (layers.layernorm_forward, [(2, 3), (3,), (3,)], {"eps": 0.0}, "expected eps > 0"),
        (layers.rmsnorm_forward, [(2, 3), (2,)], {}, "expected gain of shape"),
        (logprobs.log_softmax, [(2, 3)], {"temperature": 0.0}, "expected temperature > 0"),
    ],
)
def test_mistakes_are_refused_in_the_words_of_the_plain_lines(f, arrays, constants, message):
    with pytest.raises(ValueError, match=message):
        f(*(fakegpu.array(np.ones(shape)) for shape in arrays), **constants)


def test_targets_that_are_no_ids_are_refused():
    logits, targets = fakegpu.array(np.ones((1, 2, 3))), fakegpu.array(np.ones((1, 2)))
    with pytest.raises(ValueError, match="expected integers"):
        logprobs.token_logprobs_forward(logits, targets=targets)


def test_host_and_device_together_are_refused():
    with pytest.raises(TypeError, match="expected arrays of one library"):
        layers.rmsnorm_forward(fakegpu.array(np.ones((2, 3))), np.ones(3))


def test_one_sentence_warns_where_the_source_does_not_compile():
    x = np.array([[0.5, -2.0]])
    with kernels_on_the_fake_gpu(lambda source: source + "\nthis is no C"):
        with pytest.warns(UserWarning, match="plain operations replace kernels.cu") as warned:
            for _ in range(2):
                (y, _), launched = launched_by(layers.gelu_forward, fakegpu.array(x))
    assert len(warned) == 1 and launched == []
    assert_close(to_host(y), layers.gelu_forward(x)[0], 0.0)


# -- NVIDIA's compiler -----------------------------------------------------------------------------

needs_nvrtc = pytest.mark.skipif(
    nvrtc.path() is None, reason="nvidia-cuda-nvrtc-cu12 is not installed: it is in [peers]"
)


@needs_nvrtc
@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("gpu", ["sm_75", "sm_80", "sm_90"])
def test_every_kernel_compiles_for_a_gpu_without_a_warning(gpu, real):
    options = f"-Dreal={real}", f"--gpu-architecture={gpu}", "--std=c++11"  # cupy's default
    compiled, said, ptx = nvrtc.compile_source(TEXT, *options)
    assert compiled and said.strip() == ""
    assert set(re.findall(r"\.entry (\w+)", ptx)) == set(parameters(TEXT))


@needs_nvrtc
def test_nvidias_compiler_refuses_what_is_no_cuda_and_warns_of_what_is_unused():
    for planted, word in (("this is no C", "error"), ("KERNEL f() { int unused; }", "unused")):
        _, said, _ = nvrtc.compile_source(
            TEXT + planted, "-Dreal=float", "--gpu-architecture=sm_80"
        )
        assert word in said


@needs_nvrtc
def test_float_kernels_of_rows_compute_nothing_in_double():
    """A gaming GPU does sixty float32 operations in the time of one in float64."""
    _, _, ptx = nvrtc.compile_source(TEXT, "-Dreal=float", "--gpu-architecture=compute_80")
    in_double = {
        entry.split("(")[0].strip()
        for entry in ptx.split(".entry")[1:]
        if re.search(r"\b(add|sub|mul|fma|div|sqrt)\.(\w+\.)?f64", entry)
    }
    assert in_double == {"angles", "draw_into", "squares", "clip_norm", "move_if_finite"}


# -- planted errors --------------------------------------------------------------------------------

PLANTED = {  # what is wrong: (what stands in the source, what stands there instead)
    "a missing barrier before the sums of the warps are written": (
        "    __syncthreads();  // somebody may still be reading what was there before\n",
        "",
    ),
    "a missing barrier before the sums of the warps are read": (
        "of_warp[threadIdx.x / 32] = x;\n    __syncthreads();",
        "of_warp[threadIdx.x / 32] = x;",
    ),
    "a missing barrier between two halvings": (
        "        __syncthreads();\n        if (at / 8 < half)",
        "        if (at / 8 < half)",
    ),
    "logits overwritten before the target's is read": (
        "    __syncthreads();  // read before it is overwritten\n",
        "",
    ),
    "a missing barrier after the sums of the runs": (
        "    __syncthreads();\n    double before",
        "    double before",
    ),
    "a barrier that half of a block waits at": (
        "        __syncthreads();\n        if (at / 8 < half) {",
        "        if (at / 8 < half) {\n            __syncthreads();",
    ),
    "half of a warp in the mask": ("sync(0xffffffffu, x,", "sync(0x0000ffffu, x,"),
    "a shuffle that begins at eight": ("step = 16", "step = 8"),
    "uninitialised shared memory": ("lane < n_warps ? of_warp[lane]", "lane < 32 ? of_warp[lane]"),
    "a maximum that begins at zero": ("largest ? of_warp[0] : T(0)", "T(0)"),
    "a stride of 32 instead of a block": ("i += blockDim.x)", "i += 32)"),
    "a row that begins one too late": ("i = threadIdx.x; i < (n)", "i = threadIdx.x + 1; i < (n)"),
    "one entry too many": ("if (i >= (n)) return", "if (i > (n)) return"),
    "half of a row": ("EACH(j, T) sum += exp_s", "EACH(j, T / 2) sum += exp_s"),
    "a forgotten eps": (" / C + (real)eps)", " / C)"),
    "a mean that is not taken off": ("(dy[c] * gain[c] - mean_dxhat", "(dy[c] * gain[c]"),
    "a wrong sign in the norm's backward": ("- xhat[c] * mean_along", "+ xhat[c] * mean_along"),
    "a residual that is forgotten": (" + added + residual[at + c]", " + added"),
    "the bias of another column": (
        "y[i] += bias ? bias[i % C]",
        "y[i] += bias ? bias[(i + 1) % C]",
    ),
    "a bias before a gelu that is forgotten": ("x = bias ? u[i] + bias[i % F]", "x = bias ? u[i]"),
    "a column that is not there": ("if (at >= 8 || c >= C) return", "if (at >= 8) return"),
    "a gelu without its cubic slope": ("(1 + 3 * cubic * square)", "(1 + cubic * square)"),
    "dgate and dup exchanged": ("dup[i] = dy[i] * swish[i]", "dup[i] = dy[i] * slope[i]"),
    "a token that sees the next one": ("(j <= i &&", "(j <= i + 1 &&"),
    "a softmax that sees what is not allowed": ("score[j] = allowed[j] > 0 ?", "score[j] = true ?"),
    "a maximum over what is not allowed": ("if (allowed[j] > 0) highest", "highest"),
    "the mask of another sequence": ("b = blockIdx.x / of_batch", "b = blockIdx.x / of_batch / 2"),
    "the mask of another query": ("i = blockIdx.x % Q;\n    const long long t = c", "i = 0, t = c"),
    "a column that is not the one given": ("s = t < Q && columns ?", "s = false ?"),
    "a gradient at columns that nobody took": ("else if (i >= 0) x", "else x"),
    "keys in the place of values": (
        "(head < H + K ? k_heads : v_heads)",
        "(true ? k_heads : v_heads)",
    ),
    "a key that is scaled": (
        "(head < H + K ? dk : dv)[",
        "(real)scale * (head < H + K ? dk : dv)[",
    ),
    "another head's total": ("/ total[row];", "/ total[row / 2];"),
    "a softmax's backward without its sum": ("(dscore[j] - sum)", "(dscore[j])"),
    "a maximum that is not taken off": (
        "exp((logits[a] - *highest) * per_tau)",
        "exp(logits[a] * per_tau)",
    ),
    "a temperature that is forgotten": (
        "d = dlogp[blockIdx.x] / (real)temperature",
        "d = dlogp[blockIdx.x]",
    ),
    "an entropy of the wrong sign": ("real d = -dentropy", "real d = dentropy"),
    "nan where a probability is 0": (
        "log_probs[at + a] = p > 0 ? log_p : (real)0",
        "log_probs[at + a] = log_p",
    ),
    "a token of probability 0": ("p > 0 && before > drawn", "before >= drawn"),
    "runs that are added up before they are there": (
        "of_run[threadIdx.x] = sum;\n    __syncthreads();",
        "of_run[threadIdx.x] = sum;",
    ),
    "a run that counts itself": (
        "of_run[run] = total, total += of_this;",
        "of_run[run] = total += of_this;",
    ),
    "the last token of an interval": (" && found == V", ""),
    "a step that all rows take": ("(alive[b] > 0) ? pad", "true ? pad"),
    "who has stopped goes on": ("ids[b] == stop ? 0 : alive[b]", "alive[b]"),
    "a row of another's coins": ("u[row * R + step]", "u[b * R + step]"),
    "a position that counts padding": ("n_real += seen[s] > 0", "n_real += 1"),
    "a token that does not see itself": ("j == column || seen", "seen"),
    "padding that is seen": ("seen[j] > 0 ? warp", "true ? warp"),
    "a missing barrier before the scores": (
        "d] = v[d];\n    }\n    __syncthreads();",
        "d] = v[d];\n    }",
    ),
    "a missing barrier after the sums of the warps": (
        "sums[threadIdx.x] = sum;\n        __syncthreads();",
        "sums[threadIdx.x] = sum;",
    ),
    "a missing barrier before the next sums": (
        "        __syncthreads();\n        sums[threadIdx.x] = sum;",
        "        sums[threadIdx.x] = sum;",
    ),
    "a key that is not kept": ("keys[column * D + d] = k[d], ", ""),
    "a rotation the other way": ("x * cos[i] - y * sin[i] :", "x * cos[i] + y * sin[i] :"),
    "the angles of another sequence": ("cos += b * (D / 2), ", ""),
    "a step that is forgotten": ("column += steps ? steps[b] : 0, seen", "seen"),
    "a key at the column of the first step": ("column += steps ? steps[b] : 0;", ""),
    "the coins of the first step": ("step += steps ? steps[b] : 0;", ""),
    "a step that is not counted": ("if (steps) steps[b]++;", ""),
    "a token after the end that is real": ("is_real[b] = alive[b]", "is_real[b] = 1"),
    "an angle of the next wavelength": ("pow(theta, -i / (double)n)", "pow(theta, -(i + 1.) / n)"),
    "a product without its last rows": (
        "tiles * 8;\n    real sum[8] = {};\n    x +=",
        "tiles * 8;\n    real sum[8] = {};\n    b -= 8, x +=",
    ),
    "a missing barrier before the sums are added": (
        "column] = of_warp;\n    }\n    __syncthreads();",
        "column] = of_warp;\n    }",
    ),
    "half the terms of a product": ("i < I; i += 64)", "i < I; i += 128)"),
    "half of a warp's terms": ("of_warp += __shfl_xor_sync(0xffffffffu, of_warp, 16);", ""),
    "the column beside it": ("total += sums[row][i][column]", "total += sums[row][i][column ^ 1]"),
    "a row of logits that is not there": ("if (lane == 0 && first + row < b)", "if (lane == 0)"),
    "logits of every second channel": ("i = lane; i < I; i += 32", "i = lane; i < I; i += 64"),
    "a clip from below that is forgotten": ("below ? least : ratio", "ratio"),
    "a slope beyond the clip": ("weights[t] > 0 && !clipped[t] ?", "weights[t] > 0 ?"),
    "padding in the loss": (
        "if (weights[t] > 0) sum += weights[t] * obj;",
        "sum += weights[t] * obj;",
    ),
    "a value clip that loses": ("edge * edge > error * error", "true"),
    "half a loss": ("*loss = sum / 2", "*loss = sum"),
    "the form of a bias correction": ("* (real)root_scale + (real)eps", "+ (real)eps"),
    "a beta in the place of the other": ("(real)(1 - beta2) * (g", "(real)(1 - beta1) * (g"),
    "a step that is not refused": ("if (!isfinite(numbers[k])) return;", ";"),
    "a gradient clipped upwards": ("scale > 1 ? 1 : scale", "scale < 1 ? 1 : scale"),
    "a stride of one block too few": (
        "i += gridDim.x * 256LL)\n        sum",
        "i += (gridDim.x - 1) * 256LL)\n        sum",
    ),
}


@pytest.mark.parametrize("what", PLANTED, ids=lambda what: what.replace(" ", "_"))
def test_a_planted_error_is_caught(what):
    old, new = PLANTED[what]
    assert TEXT.count(old) == 1, what
    with kernels_on_the_fake_gpu(lambda source: source.replace(old, new)):
        assert any(map(is_caught, likely_cases(TEXT.index(old))))


def likely_cases(place):
    """All cases: first those of the kernel that stands at this place of the source."""
    kernel = [word for word, *_ in kernels.SIGNATURE.findall(TEXT[:place])][-1:]
    return [
        make
        for make, _ in sorted(CASES.values(), key=lambda case: not set(kernel) & {*case[1].split()})
    ]


def is_caught(make):
    for seed in range(12):
        try:
            compare(make(Draw(np.random.default_rng(seed))), np.float64)
        except AssertionError:
            return True
    return False


def test_nothing_planted_nothing_caught():
    assert not any(is_caught(make) for make, _ in CASES.values())
