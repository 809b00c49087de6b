"""Models in Hugging Face's GPT-2 and Llama layouts, and training states. safetensors, no pickle.

Names and shapes: huggingface/transformers, models/gpt2/modeling_gpt2.py, whose Conv1D keeps weights
(in, out) as we do, and models/llama/modeling_llama.py, whose linear layers keep them (out, in) and
queries, keys and values apart. A tied output matrix is not stored.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import deserialize, safe_open

from minirlhf import disk
from minirlhf.backend import Array, to_host
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig, parameter_shapes
from minirlhf.tree import Tree, tree_items, tree_leaves, tree_map

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_HEADS, STATE = "heads.safetensors", "state.safetensors"
Heads = dict[str, dict[str, Array]]  # {"value_head": {"w": .., "b": ..}}
_STATE_KEY = "minirlhf_state"
_DIGEST = "minirlhf_sha256"  # in a file's metadata, which transformers writes anew


class Kind(NamedTuple):
    """How transformers writes a kind of model: see checkpoint.toml."""

    prefix: str
    architecture: str
    plain: dict[str, list]
    sizes: dict[str, list]
    names: dict[str, str]

    @property
    def allowed(self) -> dict[str, list]:
        """`plain`, with None, which TOML does not have."""
        return {name: values or [None] for name, values in self.plain.items()}


_TABLES = disk.read_toml(Path(__file__).with_suffix(".toml"))
KINDS = {block: Kind(**table) for block, table in _TABLES.items()}


class Slot(NamedTuple):
    """Where a parameter stands in the file: one tensor, or the columns of several."""

    names: list[str]
    shape: tuple[int, ...]  # of ours
    widths: list[int]  # last axis of each
    is_transposed: bool


def _layout(config: GPTConfig) -> Tree:
    """The parameter tree with a Slot at every leaf."""
    kind, D = KINDS[config.block], config.d_model // config.n_head
    H, K = config.heads.values()
    shapes = parameter_shapes(config)
    paths = (path.split(".") for path, _ in tree_items(shapes))

    def slot(shape: tuple[int, ...]) -> Slot:
        keys = next(paths)
        name = ".".join(kind.names.get(key, key) for key in keys)
        names = [name.format(part) for part in "qkv"] if "{}" in name else [name]
        widths = [H * D, K * D, K * D] if len(names) > 1 else [shape[-1]]
        return Slot(names, shape, widths, config.block == "llama" and keys[-1] == "w")

    return tree_map(slot, shapes)


def save_model(
    folder: str | Path,
    params: Tree,
    config: GPTConfig,
    *,
    heads: Heads | None = None,
    meta: dict[str, Any] | None = None,
    scale: dict[str, float] | None = None,
    files: dict[str, bytes] | None = None,
) -> None:
    """Write model.safetensors and config.json, which transformers loads as a causal model.

    A crash leaves the old model or the new one. Other files in the folder stay.

    Args:     params: the parameter tree, float32 or float64, on either device.
              heads: {"value_head": {"w", "b"}}, ...; they go to heads.safetensors.
              meta: further entries of config.json, like bos_token_id and eos_token_id.
              scale: score_mean and score_sd of a reward model, for config.json. transformers
                  loads a GPT-2 as GPT2ForSequenceClassification, whose logit is (raw - mean) / sd.
              files: further files of the folder.
    """
    kind, tensors = KINDS[config.block], {}

    def put(slot, array):
        array = _host(array)
        if array.shape != slot.shape or array.dtype not in (np.float32, np.float64):
            raise ValueError(
                f"save_model: expected {slot.names[0]} of shape {slot.shape} in float32 or "
                f"float64; got {array.shape} in {array.dtype}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"save_model: expected finite numbers; {slot.names[0]} has NaN or inf")
        parts = np.split(array, np.cumsum(slot.widths)[:-1], axis=-1)
        for name, part in zip(slot.names, parts, strict=True):
            whole = name if name == "lm_head.weight" else kind.prefix + name
            tensors[whole] = np.ascontiguousarray(part.T if slot.is_transposed else part)

    tree_map(put, _layout(config), params)
    heads, meta, files = heads or {}, meta or {}, files or {}
    entries = _entries(config, str(next(iter(tensors.values())).dtype)) | (scale or {})
    if scale and config.block == "gpt2":
        entries |= {"architectures": ["GPT2ForSequenceClassification"]}
        entries |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        heads = {**heads, "ln_f": {"bias": tensors["transformer.ln_f.bias"]}}
        tensors |= _classifier(heads["ln_f"]["bias"], heads["reward_head"], **scale)
    format = {"format": "pt"}  # transformers asks for it
    files = files | {_CONFIG: disk.to_json(entries | meta), _WEIGHTS: save(tensors, format)}
    of_heads = {f"minirlhf.{path}": _host(array) for path, array in tree_items(heads)}
    files[_HEADS] = save(of_heads, format) if heads else None
    disk.write_whole_folder(folder, files)


def _entries(config: GPTConfig, dtype: str) -> dict[str, Any]:
    """What config.json says of the network."""
    kind = KINDS[config.block]
    entries = {"model_type": config.block, "architectures": [kind.architecture]}
    entries |= {name: allowed[0] for name, allowed in kind.allowed.items()}
    entries |= {name: getattr(config, field) for name, (field, _) in kind.sizes.items()}
    if config.block == "gpt2":
        entries |= {"n_inner": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        entries["num_key_value_heads"] = config.heads["n_kv_head"]
        entries["intermediate_size"] = config.d_ff or 4 * config.d_model
    return entries | {"torch_dtype": dtype}


def _classifier(
    bias: np.ndarray, head: dict[str, Array], score_mean: float, score_sd: float
) -> dict[str, np.ndarray]:
    """ln_f.bias and score.weight of transformers' head, which has no bias of its own.

    (h + d) . v = (h . w + b - mean) / sd   with   v = w / sd,   d = w (b - mean) / (w . w).
    """
    w = to_host(head["w"])[:, 0].astype(np.float64)
    shift = w * ((float(head["b"][0]) - score_mean) / (w @ w))
    shifted, weight = (bias + shift).astype(bias.dtype), (w / score_sd)[None].astype(bias.dtype)
    return {"transformer.ln_f.bias": shifted, "score.weight": weight}


def load_model(folder: str | Path, *, dtype: Any = None) -> tuple[Tree, GPTConfig, Heads]:
    """Parameters, GPTConfig and heads ({}: none) that `save_model` or transformers wrote, checked.

    Args:     dtype: of all arrays; None keeps the stored one (float16 and bfloat16 become float32).
    """
    folder = disk.settled(folder)
    config = _gpt_config(disk.read_object(folder / _CONFIG), folder / _CONFIG)
    path, stored = _stored_model(folder, KINDS[config.block].prefix)
    if config.n_layer > len(stored):  # before a layout of 10^9 layers is made
        raise InputError(
            f"{path}: expected {config.n_layer} layers, by config.json; got {len(stored)} tensors "
            "in all: use the config.json that belongs to the weights"
        )
    layout = _layout(config)

    def get(slot: Slot) -> np.ndarray:
        shapes = [(*slot.shape[:-1], width) for width in slot.widths]
        shapes = [shape[::-1] if slot.is_transposed else shape for shape in shapes]
        both = zip(slot.names, shapes, strict=True)
        parts = [_float_tensor(stored, name, shape, path, dtype) for name, shape in both]
        parts = [part.T if slot.is_transposed else part for part in parts]
        return np.ascontiguousarray(np.concatenate(parts, axis=-1)) if len(parts) > 1 else parts[0]

    params = tree_map(lambda slot: np.ascontiguousarray(get(slot)), layout)
    heads = _load_heads(folder / _HEADS, config, dtype)
    if "ln_f" in heads:  # of a reward model, whose model.safetensors has what transformers needs
        params["ln_f"] |= heads.pop("ln_f")
        stored.pop("score.weight", None)
    wte = layout["wte"].names[0]
    if config.tied and not np.array_equal(stored.pop("lm_head.weight", stored[wte]), stored[wte]):
        raise InputError(
            f"{path}: expected an output matrix tied to the embedding; lm_head.weight differs "
            f"from {wte}: use a model with tie_word_embeddings"
        )
    wanted = {name for slot in tree_leaves(layout) for name in slot.names}
    buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    wanted |= {name for name in stored if name.endswith(buffers)}
    if extra := sorted(stored.keys() - wanted):
        raise InputError(
            f"{path}: expected the tensors of {config.n_layer} {config.block} layers; got also "
            f"{disk.shorten(', '.join(extra[:3]), 120)} ({len(extra)} in all): name the folder of "
            "a plain GPT-2 or Llama"
        )
    return params, config, heads


def _stored_model(folder: Path, prefix: str) -> tuple[Path, dict[str, np.ndarray]]:
    """The tensors of model.safetensors or of its parts, and the file that a message may name."""
    path, index = folder / _WEIGHTS, folder / f"{_WEIGHTS}.index.json"
    parts = [path]
    if not path.exists() and index.exists():
        path, listed = index, disk.read_object(index).get("weight_map")
        names = set(map(str, listed.values())) if isinstance(listed, dict) else set()
        if not names or any(Path(name).name != name for name in names):
            raise InputError(
                f"{index}: expected a weight_map that names files beside it; got "
                f"{disk.shorten(str(listed))}: restore the file"
            )
        parts = [folder / name for name in sorted(names)]
    elif not path.exists() and (folder / "pytorch_model.bin").exists():
        raise InputError(
            f"{folder}: expected {_WEIGHTS}; got pytorch_model.bin, a pickle, which is never read: "
            "convert it with save_pretrained of transformers"
        )
    stored: dict[str, np.ndarray] = {}
    for part in parts:
        for name, array in _read_tensors(part)[0].items():
            bare = name.removeprefix(prefix)
            if bare in stored:
                raise InputError(
                    f"{part}: expected each tensor once; got {bare} a second time, as {name}: "
                    "save the model again with save_pretrained"
                )
            stored[bare] = array
    return path, stored


def _gpt_config(entries: dict[str, Any], path: Path) -> GPTConfig:
    """GPTConfig from a config.json of transformers; what it leaves out has its kind's default."""

    def refuse(name, expected):
        raise InputError(
            f"{path}: expected {name} to be {expected}; got "
            f"{disk.shorten(repr(entries.get(name)))}: only plain GPT-2 and Llama models can be "
            "loaded"
        )

    block = entries.get("model_type")
    if block not in KINDS:
        refuse("model_type", "'gpt2' or 'llama'")
    kind, sizes = KINDS[block], {"block": block}
    if isinstance(rope := entries.get("rope_parameters"), dict):  # of transformers 5
        scaled = None if rope.get("rope_type", "default") == "default" else rope
        theta = {"rope_theta": rope.get("rope_theta", 10000.0)}
        entries = entries | theta | {"rope_scaling": entries.get("rope_scaling") or scaled}
    for name, allowed in kind.allowed.items():
        if entries.get(name, allowed[0]) not in allowed:
            refuse(name, " or ".join(map(json.dumps, allowed)).replace('"', "'"))
    for name, (field, default) in kind.sizes.items():
        value = entries.get(name, default)
        if name == "num_key_value_heads" and entries.get(name) is None:
            value = sizes["n_head"]
        if name == "rope_theta" and type(value) is int:
            value = float(value)
        is_size = type(default) is not bool
        if type(value) is not type(default) or (is_size and not 0 < value < math.inf):
            refuse(name, "a number above 0" if is_size else "true or false")
        sizes[field] = value
    C, H = sizes["d_model"], sizes["n_head"]
    name, width = ("n_inner", 4 * C) if block == "gpt2" else ("head_dim", C // H)
    if entries.get(name) not in (None, width):
        refuse(name, f"null or {width}")
    if C % H or (block == "llama" and C // H % 2):
        refuse("n_embd" if block == "gpt2" else "hidden_size", f"a multiple of n_head = {H}")
    if H % sizes.get("n_kv_head", H):
        refuse("num_key_value_heads", f"a divisor of {H}")
    return GPTConfig(**sizes)


def _load_heads(path: Path, config: GPTConfig, dtype: Any) -> Heads:
    """{"value_head": {"w": ..}} from tensors named minirlhf.value_head.w; {} without a file."""
    stored = _read_tensors(path)[0] if path.exists() else {}
    names = {tuple(name.split(".")) for name in stored}
    heads: Heads = {}
    for head in sorted({name[1] for name in names if len(name) == 3}):
        C = config.d_model
        shapes = {"bias": (C,)} if head == "ln_f" else {"w": (C, 1), "b": (1,)}
        names -= {("minirlhf", head, key) for key in shapes}
        heads[head] = {
            key: _float_tensor(stored, f"minirlhf.{head}.{key}", shape, path, dtype)
            for key, shape in shapes.items()
        }
    if names:
        raise InputError(
            f"{path}: expected tensors named minirlhf.HEAD.KEY; got {'.'.join(min(names))}: "
            "the file is not ours, remove it"
        )
    return heads


def _float_tensor(stored: dict, name: str, shape: tuple, path: Path, dtype: Any) -> np.ndarray:
    """One stored tensor, checked."""
    array = stored.get(name)
    if array is None or array.shape != shape or array.dtype.kind != "f":
        came = "none" if array is None else f"{array.shape} in {array.dtype}"
        raise InputError(
            f"{path}: expected {name} of shape {shape}, by config.json, in floating point; got "
            f"{came}: use the config.json that belongs to the weights, and a whole model, not "
            "quantised"
        )
    stored_dtype = np.float32 if array.dtype == np.float16 else array.dtype
    with np.errstate(over="ignore"):  # a number beyond float32 becomes inf, and is refused
        array = array.astype(dtype or stored_dtype, copy=False)  # fresh and C-contiguous already
    if not np.isfinite(array).all():
        raise InputError(
            f"{path}: expected finite numbers; {name} has NaN or inf: take an earlier checkpoint"
        )
    return array


def save_state(folder: str | Path, arrays: dict[str, Array], meta: dict[str, Any]) -> None:
    """Write arrays, of any numbers, and what JSON holds exactly to state.safetensors."""
    outline = {name: f"{i}.{name}" for i, name in enumerate(arrays)}
    tensors = {outline[name]: _host(array) for name, array in arrays.items()}
    text = json.dumps({"outline": outline, "meta": meta}, allow_nan=False)
    disk.refuse_link(folder)
    disk.write_whole(Path(folder) / STATE, save(tensors, {_STATE_KEY: text}))


def load_state(folder: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `save_state` wrote: the arrays, in fresh memory, and meta."""
    path = disk.settled(folder) / STATE
    tensors, metadata = _read_tensors(path)
    if _STATE_KEY not in metadata:
        raise InputError(
            f"{path}: expected a training state of minirlhf; got another safetensors file: name "
            "the checkpoint folder of a run"
        )
    header = disk.parse_object(metadata[_STATE_KEY], str(path))
    expected, others = "a training state's outline and meta", (KeyError, TypeError, AttributeError)
    with disk.refusing(path, expected, "restore the file", *others):
        arrays = {name: tensors[key] for name, key in header["outline"].items()}
        return arrays, {**header["meta"]}


def _host(array: Array) -> np.ndarray:
    """The array in main memory, C-contiguous: safetensors 0.8 writes others as garbage."""
    # not ascontiguousarray, which makes 0-d arrays 1-d
    return np.asarray(to_host(array), order="C")


def save(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file that knows the digest of all it says; the same bytes for the same tensors.

    That of the library orders metadata at random, and holds everything in memory twice.
    """
    metadata = metadata | {_DIGEST: digest_of(tensors, metadata)}
    header, end = {"__metadata__": metadata}, 0
    in_order = sorted(tensors.items(), key=lambda item: -item[1].itemsize)  # each is aligned
    for name, array in in_order:
        kind = "BOOL" if array.dtype == bool else f"{array.dtype.kind}{8 * array.itemsize}".upper()
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    little = (array.astype(array.dtype.newbyteorder("<"), copy=False) for _, array in in_order)
    data = (array.reshape(-1).view(np.uint8) for array in little)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def digest_of(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 of metadata, names, types, shapes and numbers."""
    sha = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, array in sorted(tensors.items()):
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha.update(array.reshape(-1).view(np.uint8))
    return sha.hexdigest()


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors, in fresh memory, and the metadata of a safetensors file; damage is refused."""
    if not path.is_file():
        raise InputError(f"{path}: expected a file; found none: check the path")
    expected = "a safetensors file; it is corrupt, cut short or of another kind"
    # of sizes and types that they cannot hold NumPy and safetensors raise anything
    with disk.refusing(path, expected, "restore it from a copy", Exception):
        with safe_open(path, framework="numpy") as file:  # compares header and size of the file
            metadata = file.metadata() or {}
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            tensors = {
                name: file.get_tensor(name) for name, kind in kinds.items() if kind != "BF16"
            }
        if len(tensors) < len(kinds):  # NumPy has no such numbers, the upper halves of float32
            for name, raw in deserialize(path.read_bytes()):
                if raw["dtype"] == "BF16":
                    halves = np.frombuffer(raw["data"], "<u2").astype(np.uint32)
                    tensors[name] = (halves << 16).view(np.float32).reshape(raw["shape"])
    digest = metadata.pop(_DIGEST, None)
    if digest is not None and digest != digest_of(tensors, metadata):
        raise InputError(
            f"{path}: expected what was written there; it has changed since, as its SHA-256 "
            "shows: restore it from a copy"
        )
    return tensors, metadata
