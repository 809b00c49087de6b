"""Checkpoints: equal after a round trip, whole or not at all, and everything foreign refused."""

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from minirlhf.disk import read_object
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.runs.checkpoint import load_model, load_state, save_model, save_state
from minirlhf.tree import tree_items, tree_map

CONFIG = GPTConfig(vocab_size=7, n_ctx=5, n_layer=2, n_head=2, d_model=4, ln_eps=1e-6)


def model(seed=0, dtype=np.float32):
    return init_transformer(CONFIG, rng=np.random.default_rng(seed), dtype=dtype)


def heads(seed=0):
    rng = np.random.default_rng(seed)
    return {"value_head": {"w": rng.standard_normal((4, 1)), "b": np.zeros(1)}}


def assert_same(got, expected):
    got, expected = dict(tree_items(got)), dict(tree_items(expected))
    assert got.keys() == expected.keys()
    for path, array in expected.items():
        assert got[path].dtype == array.dtype, path
        assert got[path].shape == array.shape, path
        assert np.array_equal(got[path], array), path


# --- models


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_model_comes_back(tmp_path, dtype):
    save_model(
        tmp_path / "a/b", model(dtype=dtype), CONFIG, heads=heads(), meta={"eos_token_id": 3}
    )
    params, config, got_heads = load_model(tmp_path / "a/b")
    assert config == CONFIG
    assert_same(params, model(dtype=dtype))
    assert_same(got_heads, heads())
    assert read_object(tmp_path / "a/b/config.json")["eos_token_id"] == 3


def test_loaded_arrays_are_ours_to_write(tmp_path):
    save_model(tmp_path, model(), CONFIG, heads=heads())
    params, _, got_heads = load_model(tmp_path)
    for path, array in [*tree_items(params), *tree_items(got_heads)]:
        assert type(array) is np.ndarray and array.flags.writeable, path
        assert array.flags.c_contiguous and array.flags.aligned, path
        array += 1
    assert_same(load_model(tmp_path)[0], model())


def test_dtype_converts_everything(tmp_path):
    save_model(tmp_path, model(), CONFIG, heads=heads())
    params, _, got_heads = load_model(tmp_path, dtype=np.float64)
    assert_same(params, tree_map(lambda x: x.astype(np.float64), model()))
    assert {a.dtype.name for _, a in tree_items(got_heads)} == {"float64"}


def test_arrays_that_are_not_c_contiguous_are_saved_right(tmp_path):
    # safetensors 0.8.0 writes the memory as it lies, so a transposed view would come back wrong
    views = tree_map(lambda x: np.asfortranarray(x) if x.ndim > 1 else x[::-1][::-1], model())
    wide = np.random.default_rng(1).standard_normal((4, 14)).astype(np.float32)
    views["wte"] = wide.T[::2]
    save_model(tmp_path, views, CONFIG)
    expected = model() | {"wte": np.ascontiguousarray(wide.T[::2])}
    assert_same(load_model(tmp_path)[0], expected)


def test_arrays_of_any_device_are_saved(tmp_path, xp):
    there = tree_map(xp.asarray, model())
    save_model(tmp_path, there, CONFIG, heads=tree_map(xp.asarray, heads()))
    save_state(tmp_path, {"moments": there["wte"]}, {})
    assert_same(load_model(tmp_path)[0], model())
    assert_same(load_model(tmp_path)[2], heads())
    assert_same(load_state(tmp_path)[0], {"moments": model()["wte"]})


def test_names_and_metadata_are_hugging_face_s(tmp_path):
    save_model(tmp_path, model(), CONFIG, heads=heads())
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(tensors) == 2 + 12 * CONFIG.n_layer + 2
    qkv = tensors["transformer.h.1.attn.c_attn.weight"]
    assert np.array_equal(qkv, model()["blocks"][1]["attn"]["qkv"]["w"])
    assert "lm_head.weight" not in tensors and not any("minirlhf" in name for name in tensors)
    header = (tmp_path / "model.safetensors").read_bytes()[8:2000]
    assert b'"__metadata__":{"format":"pt","minirlhf_sha256":"' in header


def test_a_reward_model_is_a_classifier_of_transformers(tmp_path):
    """Its logit is (raw score - mean) / sd without a bias, and ours comes back to the last bit."""
    head = {"w": np.float32([[0.5], [-1], [2], [0.25]]), "b": np.float32([0.75])}
    params = tree_map(lambda x: x + np.float32(0.125), model())
    save_model(
        tmp_path,
        params,
        CONFIG,
        heads={"reward_head": head},
        scale={"score_mean": -3.0, "score_sd": 0.5},
    )
    got, _, got_heads = load_model(tmp_path)
    assert_same(got, params)
    assert_same(got_heads, {"reward_head": head})
    stored = load_file(tmp_path / "model.safetensors")
    v, bias = stored["score.weight"], stored["transformer.ln_f.bias"]
    normal = np.random.default_rng(0).standard_normal(4)
    ours, theirs = (normal + b for b in (params["ln_f"]["bias"], bias))
    assert v.shape == (1, 4) and v.dtype == bias.dtype == np.float32
    assert theirs @ v[0] == pytest.approx((ours @ head["w"][:, 0] + 0.75 + 3.0) / 0.5, rel=1e-5)
    entries = read_object(tmp_path / "config.json")
    assert entries["architectures"] == ["GPT2ForSequenceClassification"]
    assert entries["id2label"] == {"0": "score"}


def test_further_files_are_written_with_the_model(tmp_path):
    save_model(tmp_path / "m", model(), CONFIG, files={"tokenizer.json": b"{}"})
    assert (tmp_path / "m/tokenizer.json").read_bytes() == b"{}"


def test_a_flipped_bit_is_noticed(tmp_path):
    """In any byte of a file of tensors: it is refused, or says what it said."""
    save_model(tmp_path, model(), CONFIG, heads=heads())
    rng = np.random.default_rng(0)
    for name in ("model.safetensors", "heads.safetensors"):
        data = (tmp_path / name).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        harmless = 0
        for place in {*range(start - 40), *range(start, len(data), 7), len(data) - 1}:
            damaged = bytearray(data)
            damaged[place] ^= 1 << rng.integers(8)
            (tmp_path / name).write_bytes(damaged)
            try:
                params, _, got_heads = load_model(tmp_path)
            except InputError as error:
                assert "\n" not in str(error)
                continue
            harmless += 1
            assert place < start  # the name of the digest itself, or a space
            assert_same(params, model())
            assert_same(got_heads, heads())
        assert harmless < 20
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match="model.safetensors: .* its SHA-256 shows"):
        damaged = bytearray((tmp_path / "model.safetensors").read_bytes())
        damaged[-3] ^= 0x10
        (tmp_path / "model.safetensors").write_bytes(damaged)
        load_model(tmp_path)


def test_the_same_model_is_the_same_bytes(tmp_path):
    for i in range(8):  # the library orders metadata at random
        save_model(tmp_path / str(i), model(), CONFIG, heads=heads())
    for name in ("model.safetensors", "heads.safetensors"):
        assert len({(tmp_path / str(i) / name).read_bytes() for i in range(8)}) == 1


def test_saving_again_forgets_old_heads_and_keeps_other_files(tmp_path):
    folder = tmp_path / "policy"
    save_model(folder, model(), CONFIG, heads=heads())
    (folder / "tiktoken.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes/config.json").write_text("mine")
    save_model(folder, model(1), CONFIG)
    params, _, got_heads = load_model(folder)
    assert_same(params, model(1))
    assert got_heads == {}
    assert (folder / "tiktoken.json").read_text() == "{}"
    assert (folder / "notes/config.json").read_text() == "mine"
    assert os.listdir(tmp_path) == ["policy"]


def test_a_model_that_does_not_fit_is_not_saved(tmp_path):
    wrong_shape = model() | {"wpe": np.zeros((6, 4), np.float32)}
    with pytest.raises(ValueError, match=r"wpe.weight of shape \(5, 4\) .*; got \(6, 4\)"):
        save_model(tmp_path / "m", wrong_shape, CONFIG)
    with pytest.raises(ValueError, match="float16"):
        save_model(tmp_path / "m", model(dtype=np.float16), CONFIG)
    with pytest.raises(ValueError, match="keys"):
        save_model(tmp_path / "m", model() | {"head": np.zeros(1)}, CONFIG)
    broken = model()
    broken["blocks"][1]["mlp"]["up"]["b"][2] = np.nan
    with pytest.raises(ValueError, match="h.1.mlp.c_fc.bias has NaN or inf"):
        save_model(tmp_path / "m", broken, CONFIG)
    assert not (tmp_path / "m").exists()


# --- models of others


def foreign(folder, *, change=lambda tensors: tensors, prefix="transformer.", **config):
    """A folder as transformers writes it, then changed."""
    save_model(folder, model(), CONFIG)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("transformer.", prefix): array for name, array in tensors.items()}
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    entries = json.loads((folder / "config.json").read_text()) | config
    entries = {key: value for key, value in entries.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(entries))
    return folder


def test_names_without_prefix_and_old_buffers_are_read(tmp_path):
    def add_buffers(tensors):
        mask = {f"h.{i}.attn.bias": np.tri(5, dtype=np.uint8)[None, None] for i in range(2)}
        masked = {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(2)}
        return tensors | mask | masked | {"lm_head.weight": tensors["wte.weight"]}

    folder = foreign(tmp_path, change=add_buffers, prefix="", n_ctx=5, n_inner=16)
    assert_same(load_model(folder)[0], model())


def test_left_out_entries_have_the_defaults_of_gpt2(tmp_path):
    foreign(
        tmp_path,
        activation_function="absent",
        tie_word_embeddings="absent",
        n_inner="absent",
        layer_norm_epsilon="absent",
    )
    assert load_model(tmp_path)[1].ln_eps == 1e-5


def test_half_precision_becomes_float32(tmp_path):
    foreign(tmp_path, change=lambda t: {k: v.astype(np.float16) for k, v in t.items()})
    expected = tree_map(lambda x: x.astype(np.float16).astype(np.float32), model())
    assert_same(load_model(tmp_path)[0], expected)


def test_bfloat16_becomes_float32(tmp_path):
    # bfloat16 is the upper half of float32: write the halves, then rename their type
    foreign(tmp_path, change=lambda t: {k: (v.view("u4") >> 16).astype("u2") for k, v in t.items()})
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"U16"', b'"BF16"').rstrip()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    expected = tree_map(lambda x: (x.view("u4") >> 16 << 16).view(np.float32), model())
    assert_same(load_model(tmp_path)[0], expected)


def sharded(folder, **weight_map):
    """The tensors of `foreign` in two files, and their index."""
    foreign(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    of_file = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)} | weight_map
    for file in {"model-0.safetensors", "model-1.safetensors"}:
        part = {name: array for name, array in tensors.items() if of_file[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of_file}))
    return folder


def test_a_model_in_parts_is_read(tmp_path):
    assert_same(load_model(sharded(tmp_path))[0], model())
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match="model-1.safetensors: expected a file; found none"):
        load_model(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": "../a"}}])
def test_a_damaged_index_of_parts_is_refused(tmp_path, index):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="index.json: expected a weight_map that names files"):
        load_model(tmp_path)


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    sharded(tmp_path)
    shutil.copy(tmp_path / "model-0.safetensors", tmp_path / "model-1.safetensors")
    with pytest.raises(InputError, match="expected each tensor once; got .* a second time"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mistral"}, "model_type to be 'gpt2' or 'llama'; got 'mistral'"),
        ({"model_type": "absent"}, "model_type to be 'gpt2' or 'llama'; got None"),
        ({"activation_function": "relu"}, "activation_function .*got 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx to be false"),
        ({"scale_attn_weights": False}, "scale_attn_weights to be true"),
        ({"add_cross_attention": True}, "add_cross_attention to be false"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings to be true"),
        ({"n_inner": 15}, "n_inner to be null or 16; got 15"),
        ({"n_embd": 0}, "n_embd to be a number above 0"),
        ({"n_layer": "2"}, "n_layer to be a number above 0; got '2'"),
        ({"n_layer": True}, "n_layer to be a number above 0; got True"),
        ({"n_head": 3}, "n_embd to be a multiple of n_head = 3"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon"),
        ({"n_positions": 6}, r"wpe.weight of shape \(6, 4\), by config.json, .*; got \(5, 4\)"),
        ({"vocab_size": 8}, r"wte.weight of shape \(8, 4\)"),
        ({"n_layer": 3}, "expected h.2.ln_1.weight .*; got none"),
        ({"n_layer": 10**9}, "expected 1000000000 layers, by config.json; got 28 tensors"),
        ({"n_embd": 10**9, "n_head": 1}, r"wte.weight of shape \(7, 1000000000\)"),
        ({"n_layer": 1}, r"got also h.1.attn.c_attn.bias, .* \(12 in all"),
    ],
)
def test_a_foreign_config_is_refused(tmp_path, config, message):
    foreign(tmp_path, **config)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "wpe" not in k}, "wpe.weight .*; got none"),
        (lambda t: t | {"score.weight": np.zeros(3)}, "got also score.weight"),
        (
            lambda t: t | {"wpe.weight": t["transformer.wpe.weight"]},
            "each tensor once; got wpe.weight a second time, as (transformer.)?wpe.weight",
        ),
        (
            lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] * 2},
            "lm_head.weight differs",
        ),
        (
            lambda t: {k: v.astype(np.int8) for k, v in t.items()},
            r"floating point; got \(.*\) in int8",
        ),
        (lambda t: {k: v * np.float32(np.nan) for k, v in t.items()}, "wte.weight has NaN or inf"),
    ],
)
def test_foreign_tensors_are_refused(tmp_path, change, message):
    foreign(tmp_path, change=change)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_foreign_heads_are_refused(tmp_path):
    save_model(tmp_path, model(), CONFIG)
    save_file({"score.weight": np.zeros(3)}, tmp_path / "heads.safetensors")
    with pytest.raises(InputError, match="expected tensors named minirlhf.HEAD.KEY; got score"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda w, b: {"w": w.reshape(-1), "b": b},
        lambda w, b: {"w": w, "b": b.reshape(1, 1)},
        lambda w, b: {"w": w[1:], "b": b},
        lambda w, b: {"w": w},
        lambda w, b: {"w": w, "b": b, "x": b},
        lambda w, b: {"w": w.astype(np.int64), "b": b},
        lambda w, b: {"w": w * np.inf, "b": b},
        lambda w, b: {},
    ],
)
@pytest.mark.parametrize("head", ["value_head", "ln_f"])
def test_a_head_of_another_shape_is_refused(tmp_path, head, change):
    save_model(tmp_path, model(), CONFIG)
    w, b = np.ones((4, 1), np.float32), np.zeros(1, np.float32)
    tensors = {f"minirlhf.{head}.{key}": array for key, array in change(w, b).items()}
    save_file(tensors or {"minirlhf.x": b}, tmp_path / "heads.safetensors")
    with pytest.raises(InputError, match="heads.safetensors: expected"):
        load_model(tmp_path)


def test_numbers_beyond_the_type_asked_for_are_refused(tmp_path):
    foreign(tmp_path, change=lambda t: {name: x.astype("f8") * 1e300 for name, x in t.items()})
    assert load_model(tmp_path)[0]["wte"].dtype == np.float64
    with pytest.raises(InputError, match="wte.weight has NaN or inf"):
        load_model(tmp_path, dtype=np.float32)


@pytest.mark.parametrize(
    ("shape", "kind"), [([1] * 70, "F32"), ([10**19, 0], "F32"), ([4], "F8_E4M3"), ([2], "I16")]
)
def test_tensors_that_numpy_cannot_hold_are_refused(tmp_path, shape, kind):
    save_model(tmp_path, model(), CONFIG)
    n = 0 if 0 in shape else 4
    header = {"wte.weight": {"dtype": kind, "shape": shape, "data_offsets": [0, n]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * n)
    with pytest.raises(InputError, match="model.safetensors: expected") as caught:
        load_model(tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["model.safetensors", "heads.safetensors", "config.json"])
def test_truncated_and_foreign_files_are_refused(tmp_path, name):
    save_model(tmp_path, model(), CONFIG, heads=heads())
    data = (tmp_path / name).read_bytes()
    sizes = {0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 3}
    for damaged in [*(data[:size] for size in sizes), b"PK\x03\x04" * 99, b"\x80\x04pickle"]:
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name}: expected") as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected a folder; found none"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json: expected a file; found none"):
        load_model(tmp_path)
    save_model(tmp_path, model(), CONFIG)
    with pytest.raises(InputError, match="expected a folder; got a file"):
        load_model(tmp_path / "config.json")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors: expected a file; found none"):
        load_model(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors: expected a file; found none"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(InputError, match="a pickle, which is never read"):
        load_model(tmp_path)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(InputError, match="expected a place to write to"):
            save_model(folder, model(), CONFIG)
        with pytest.raises(InputError, match="expected a place to write to"):
            save_state(folder, {}, {})


# --- states

leaves = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from("f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 ?".split()),
    st.integers(0, 9),
)
arrays = st.dictionaries(st.text("ab.0é", max_size=3), leaves, max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children),
    max_leaves=5,
)  # fmt: skip


@given(arrays, st.dictionaries(st.text(), json_values))
def test_any_state_comes_back(tmp_path_factory, arrays, meta):
    folder = tmp_path_factory.mktemp("state")
    save_state(folder, arrays, meta)
    got, got_meta = load_state(folder)
    assert list(got) == list(arrays) and got_meta == meta
    assert_same(got, arrays)
    assert all(array.flags.writeable and array.flags.c_contiguous for array in got.values())


def test_values_come_back_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(3)
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324, 0.1])
    arrays = {"moments": rng.standard_normal((3, 4)).T, "odd": special, "count": np.array(7)}
    save_state(tmp_path, arrays, {"rng": rng.bit_generator.state})
    expected = rng.random(5)
    got, meta = load_state(tmp_path)
    assert got["moments"].tobytes() == np.ascontiguousarray(arrays["moments"]).tobytes()
    assert got["odd"].tobytes() == special.tobytes()
    resumed = np.random.default_rng(0)
    resumed.bit_generator.state = meta["rng"]
    assert np.array_equal(resumed.random(5), expected)


@pytest.mark.parametrize(
    ("meta", "error"), [({"a": float("nan")}, ValueError), ({"a": np.int64(3)}, TypeError)]
)
def test_meta_that_json_does_not_hold_is_refused(tmp_path, meta, error):
    with pytest.raises(error):
        save_state(tmp_path, {}, meta)
    assert not os.listdir(tmp_path)


def test_a_bad_state_is_refused(tmp_path):
    with pytest.raises(InputError, match="found none"):
        load_state(tmp_path)
    path = tmp_path / "state.safetensors"
    save_file({"a": np.zeros(2)}, path)
    with pytest.raises(InputError, match="got another safetensors file"):
        load_state(tmp_path)
    for outline in (3, [], {"a": "1.a"}, {"a": {"x": "0.a"}}):
        text = json.dumps({"outline": outline, "meta": {}})
        save_file({"0.a": np.zeros(2)}, path, {"minirlhf_state": text})
        with pytest.raises(InputError, match="expected a training state's outline"):
            load_state(tmp_path)
    save_state(tmp_path, {"a": np.zeros(9)}, {})
    data = path.read_bytes()
    for size in (0, 5, 60, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="corrupt, cut short or of another kind"):
            load_state(tmp_path)


# --- whole or not at all


class Crash(BaseException):
    """The power goes off: nothing after it runs, no clean-up either."""


STEPS = [(os, "fsync"), (os, "replace"), (os, "link"), (os, "mkdir"), (shutil, "rmtree")]


def fail_at(monkeypatch, step, error):
    """Let the step-th of all calls that touch the disk raise; returns the calls so far.

    Before it is synced a file may lack its second half.
    """
    calls = []

    def patch(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == step:
                if name == "fsync" and stat.S_ISREG(os.fstat(args[0]).st_mode):
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module, name in STEPS:
        patch(module, name)
    return calls


def crash_everywhere(monkeypatch, error, prepare, write, check):
    """Fail write() at its first step, then at its second ... until it goes through."""
    for step in range(1, 99):
        prepare()
        with monkeypatch.context() as patched:
            calls = fail_at(patched, step, error)
            try:
                write()
            except (Crash, InputError):
                check(step)
            if len(calls) < step:
                return step - 1
    raise AssertionError("write() never went through")


@pytest.mark.parametrize("error", [Crash(), OSError(28, "No space left on device")])
def test_a_crash_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, error):
    folder = tmp_path / "policy"
    smaller = GPTConfig(vocab_size=3, n_ctx=2, n_layer=1, n_head=1, d_model=2)

    def write_old():
        save_model(folder, model(), CONFIG, heads=heads())
        (folder / "tiktoken.json").write_text("{}")

    def write_new():
        rng = np.random.default_rng(1)
        save_model(folder, init_transformer(smaller, rng=rng), smaller, meta={"kind": "new"})

    outcomes = set()

    def check(step):
        params, config, got_heads = load_model(folder)
        outcomes.add(config)
        if config == CONFIG:
            assert_same(params, model())
            assert_same(got_heads, heads())
        else:
            assert config == smaller and got_heads == {}
            assert read_object(folder / "config.json")["kind"] == "new"
        if isinstance(error, OSError):
            assert ".policy.new" not in os.listdir(tmp_path)
        write_new()  # the next save goes through and cleans up
        assert load_model(folder)[1] == smaller
        assert os.listdir(tmp_path) == ["policy"]
        assert (folder / "tiktoken.json").read_text() == "{}"

    steps = crash_everywhere(monkeypatch, error, write_old, write_new, check)
    assert steps >= 8 and outcomes == {CONFIG, smaller}


@pytest.mark.parametrize("error", [Crash(), OSError(28, "No space left on device")])
def test_a_crash_leaves_the_old_state_or_the_new_one(tmp_path, monkeypatch, error):
    outcomes = set()

    def check(step):
        tree, meta = load_state(tmp_path)
        assert np.array_equal(tree["a"], np.full(3, meta["version"]))
        outcomes.add(meta["version"])

    def write(version):
        save_state(tmp_path, {"a": np.full(3, version)}, {"version": version})

    steps = crash_everywhere(monkeypatch, error, lambda: write(1), lambda: write(2), check)
    assert steps >= 3 and outcomes == {1, 2}
    assert load_state(tmp_path)[1] == {"version": 2}


def test_a_crash_at_the_first_save_leaves_nothing_to_load(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    outcomes = set()

    def check(step):
        try:
            assert_same(load_model(folder)[0], model())
            outcomes.add("whole")
        except InputError as error:
            assert "found none" in str(error)
            outcomes.add("nothing")

    crash_everywhere(
        monkeypatch,
        Crash(),
        lambda: shutil.rmtree(folder, ignore_errors=True),
        lambda: save_model(folder, model(), CONFIG),
        check,
    )
    assert outcomes == {"whole", "nothing"}


def test_a_second_crash_does_not_lose_the_only_copy(tmp_path, monkeypatch):
    folder = tmp_path / "m"

    def crash_between_the_renames():
        save_model(folder, model(), CONFIG)
        os.replace(folder, tmp_path / ".m.old")

    crash_everywhere(
        monkeypatch,
        Crash(),
        crash_between_the_renames,
        lambda: save_model(folder, model(), CONFIG),
        lambda step: assert_same(load_model(folder)[0], model()),
    )
    assert os.listdir(tmp_path) == ["m"]


def test_every_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, renamed = set(), []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def note_rename(source, target):
        source = Path(source)
        if source.name.endswith(".new"):
            files = [source, *source.iterdir()] if source.is_dir() else [source]
            renamed.extend(path.stat().st_ino for path in files)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    save_model(tmp_path / "m", model(), CONFIG, heads=heads())
    save_state(tmp_path / "s", {}, {})
    assert len(renamed) == 5 and set(renamed) <= synced
    assert {tmp_path.stat().st_ino, (tmp_path / "s").stat().st_ino} <= synced


def test_disks_without_hard_links_keep_other_files_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    save_model(tmp_path / "m", model(), CONFIG)
    (tmp_path / "m/tiktoken.json").write_text("{}")
    save_model(tmp_path / "m", model(1), CONFIG)
    assert (tmp_path / "m/tiktoken.json").read_text() == "{}"
