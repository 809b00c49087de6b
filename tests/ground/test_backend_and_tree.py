"""The array module is taken from the arrays, strictly; trees keep their structure."""

import numpy as np
import pytest
from fakegpu import FakeArray, fakegpu
from tiny import make_params
from tolerances import LOOPS

from minirlhf import backend
from minirlhf.backend import (
    array_module,
    cuda_is_available,
    get_xp,
    register_array_module,
    to_device,
    to_host,
)
from minirlhf.errors import InputError
from minirlhf.tree import (
    global_norm,
    tree_copy,
    tree_items,
    tree_leaves,
    tree_map,
    tree_pack,
    tree_size,
    tree_sum,
    tree_unpack,
)

ARRAY = np.arange(3.0)


class Subclass(np.ndarray):
    """Whose operators could do anything."""


# -- backend -------------------------------------------------------------------------------------


def test_arrays_choose_their_module():
    assert get_xp(ARRAY) is np
    assert get_xp(ARRAY, np.zeros((2, 2), dtype=int), np.array(1.0)) is np
    assert get_xp(fakegpu.asarray(ARRAY), fakegpu.asarray(ARRAY)) is fakegpu


@pytest.mark.parametrize(
    "other",
    [
        [1.0, 2.0],
        (1.0,),
        1.0,
        2,
        True,
        None,
        "text",
        np.float64(1.0),
        np.float32(1.0),
        np.int64(1),
        ARRAY.view(Subclass),
        np.ma.masked_array(ARRAY),
        memoryview(b"abc"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_array_is_refused(other):
    kind = type(other).__qualname__
    for arrays in ((other,), (ARRAY, other), (other, ARRAY), (fakegpu.asarray(ARRAY), other)):
        with pytest.raises(TypeError, match=f"expected a numpy or cupy array; got .*{kind}"):
            get_xp(*arrays)


def test_mixtures_are_refused():
    device = fakegpu.asarray(ARRAY)
    for arrays in ((ARRAY, device), (device, ARRAY), (ARRAY, ARRAY, device)):
        with pytest.raises(TypeError, match="arrays of one library; got .*: move them to one"):
            get_xp(*arrays)


def test_only_the_exact_type_is_registered(monkeypatch):
    class Other:
        pass

    class Derived(Other):
        pass

    monkeypatch.setattr(backend, "_MODULE_OF", dict(backend._MODULE_OF))
    register_array_module(Other, np.linalg)
    assert get_xp(Other()) is np.linalg
    with pytest.raises(TypeError, match="Derived"):
        get_xp(Derived())


def test_to_host_passes_numpy_through_and_fetches_the_rest():
    assert to_host(ARRAY) is ARRAY
    fetched = to_host(fakegpu.asarray(ARRAY))
    assert type(fetched) is np.ndarray and fetched.tolist() == ARRAY.tolist()


def test_to_device_copies():
    x = ARRAY.copy()
    there = to_device(x, "cpu")
    there += 1.0
    assert x.tolist() == ARRAY.tolist() and type(there) is np.ndarray
    back = to_device(fakegpu.asarray(ARRAY), "cpu")
    assert type(back) is np.ndarray and back.dtype == ARRAY.dtype


@pytest.mark.parametrize("device", ["gpu", "cuda:0", "CPU", ""])
def test_unknown_devices_are_refused(device):
    with pytest.raises(InputError, match=f"--device: expected cpu or cuda; got {device!r}"):
        to_device(ARRAY, device)


def test_cuda_without_a_gpu_is_an_input_error(monkeypatch):
    monkeypatch.setattr(backend, "cuda_is_available", lambda: False)
    for call in (lambda: to_device(ARRAY, "cuda"), lambda: array_module("cuda")):
        with pytest.raises(InputError, match=r"--device cuda: .* found none: install minirlhf\["):
            call()
    assert array_module("cpu") is np


@pytest.mark.parametrize("error", [ImportError("no cupy"), RuntimeError("no driver")])
def test_a_missing_driver_or_cupy_is_no_gpu(error, monkeypatch):
    class Broken:
        def is_available(self):
            raise error

    monkeypatch.setitem(__import__("sys").modules, "cupy", Broken())
    assert cuda_is_available() is False


# -- trees ---------------------------------------------------------------------------------------


def small_tree():
    return {"a": np.arange(6.0).reshape(2, 3), "blocks": [{"w": np.ones(2)}, {"w": np.zeros(1)}]}


def test_paths_and_order():
    tree = small_tree()
    assert [path for path, _ in tree_items(tree)] == ["a", "blocks.0.w", "blocks.1.w"]
    assert [leaf.size for leaf in tree_leaves(tree)] == [6, 2, 1]
    assert tree_size(tree) == 9
    assert list(tree_items(ARRAY)) == [("", ARRAY)]
    paths = [path for path, _ in tree_items(make_params())]
    assert "transformer.blocks.1.attn.qkv.w" in paths and "value_head.b" in paths


def test_map_keeps_the_structure_and_makes_new_leaves():
    tree = small_tree()
    doubled = tree_map(lambda x: 2 * x, tree)
    assert doubled["blocks"][0]["w"].tolist() == [2.0, 2.0]
    pairs = zip(tree_leaves(tree), tree_leaves(doubled), strict=True)
    assert not any(np.shares_memory(x, y) for x, y in pairs)
    assert tree["blocks"][0]["w"].tolist() == [1.0, 1.0]
    assert tree_map(lambda x, y, z: x.size, tree, tree, tree) == {
        "a": 6,
        "blocks": [{"w": 2}, {"w": 1}],
    }


def test_a_sum_of_trees_takes_the_memory_of_the_first():
    first, second, third = small_tree(), small_tree(), small_tree()
    total = tree_sum(iter([first, second, third]))
    assert total["a"].tolist() == (3 * second["a"]).tolist()
    assert total["blocks"][0]["w"].tolist() == [3.0, 3.0]
    assert np.shares_memory(total["a"], first["a"])
    assert second["a"].tolist() == third["a"].tolist() == small_tree()["a"].tolist()
    numbers = [{"loss": np.float32(1.0)}, {"loss": np.float32(2.0)}]  # what a mean returns
    assert tree_sum(numbers)["loss"] == 3.0


def test_map_refuses_other_structures():
    tree = small_tree()
    with pytest.raises(ValueError, match=r"expected the keys \['a', 'blocks'\]; got \['a'\]"):
        tree_sum([tree, {"a": ARRAY}])
    with pytest.raises(ValueError, match="expected 2 entries; got 1"):
        tree_sum([tree, {"a": tree["a"], "blocks": tree["blocks"][:1]}])


def test_a_snapshot_shares_no_memory():
    """`old` and `ref` are copies, or the KL would be 0 for ever."""
    tree = small_tree()
    snapshot = tree_copy(tree)
    for leaf in tree_leaves(tree):
        leaf += 1.0
    assert snapshot["a"].tolist() == np.arange(6.0).reshape(2, 3).tolist()


def test_pack_gives_one_buffer_and_views_of_it():
    tree = small_tree()
    flat, views = tree_pack(tree)
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 1, 1, 0]
    flat[6] = 7.0
    assert views["blocks"][0]["w"].tolist() == [7.0, 1.0]
    assert tree["blocks"][0]["w"].tolist() == [1.0, 1.0]  # the given tree is not touched
    views["a"][1, 2] = -1.0
    assert flat[5] == -1.0
    again = tree_unpack(2 * flat, tree)
    assert again["a"].shape == (2, 3) and again["a"][1, 2] == -2.0


def test_pack_refuses_two_dtypes():
    with pytest.raises(ValueError, match="leaves of one dtype"):
        tree_pack({"a": np.zeros(1), "b": np.zeros(1, dtype=np.float32)})


def test_global_norm():
    assert global_norm({"a": np.array([3.0]), "b": [np.array([[4.0]])]}) == 5.0
    large = {"a": np.full(2, 1e4, dtype=np.float32)}
    assert global_norm(large) == pytest.approx(np.sqrt(2) * 1e4, rel=LOOPS)


def test_trees_work_on_a_device():
    tree = tree_map(fakegpu.asarray, small_tree())
    flat, views = tree_pack(tree)
    assert type(flat) is FakeArray and type(views["a"]) is FakeArray
    flat += 1.0
    assert to_host(views["blocks"][1]["w"]).tolist() == [1.0]
    assert global_norm(tree) == pytest.approx(global_norm(small_tree()))
