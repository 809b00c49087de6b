"""What transformers reads and writes beside the weights: tokenizer out, a whole model in.

tiktoken joins the neighbours of lowest rank, transformers those that stand first in a list of
merges. The last two parts into which the ranks join a token's bytes are its merge, and both ways
give the same ids.
"""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minirlhf import disk
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig
from minirlhf.runs import sentencepiece
from minirlhf.runs.checkpoint import digest_of, load_model
from minirlhf.runs.llama2c import load_llama2c
from minirlhf.tree import Tree, tree_items, tree_size
from minirlhf.worlds import tokens
from minirlhf.worlds.tokens import Tokenizer, merges_of

# what GPT-2 does not let tokens cross; the possessive form of tiktoken, which is faster
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# each byte as a printable character, as in GPT-2's encoder.py: printable bytes are themselves
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_REST = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTERS = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_REST)}
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}
_LONGEST_TOKEN = 256  # bytes; the time to check a token grows with its square
# a conversation as worlds/examples.py writes it, in the sequences of tokens.Tokenizer
_CHAT_TEMPLATE = disk.read_text(Path(__file__).with_name("chat.jinja")).replace("\n", "")


# -- out -----------------------------------------------------------------------------------------
def companions(tokenizer: Tokenizer, sides: dict, generation: dict) -> dict[str, bytes]:
    """The files beside a model with which AutoTokenizer and generate do as we do.

    In a text the names of special tokens are these tokens, as everywhere in transformers; with
    `split_special_tokens=True` they are plain text, as for us. `sides` are entries of
    tokenizer_config.json, `generation` those of generation_config.json.
    """
    roles = zip(("eos", "bos", "sep", "pad"), tokenizer.names(), strict=True)
    named = {f"{role}_token": name for role, name in roles if name}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.sep is not None:
        kind["chat_template"] = _CHAT_TEMPLATE
    return {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": disk.to_json(kind | named | sides),
        "generation_config.json": disk.to_json(generation),
    }


@functools.lru_cache(maxsize=1)
def _tokenizer_json(tokenizer: Tokenizer) -> bytes:
    exactly = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    specials = tokenizer.specials.items()
    added = [{"id": i, "content": name, "special": True} | exactly for name, i in specials]
    parts = sentencepiece.to_json(tokenizer) if tokenizer.rank_of else _as_byte_level(tokenizer)
    return json.dumps({"version": "1.0", "added_tokens": added} | parts).encode()


def _as_byte_level(tokenizer: Tokenizer) -> dict[str, Any]:
    encoding, ranks = tokenizer.encoding, tokenizer.encoding._mergeable_ranks
    # {1,3}+ is possessive for tiktoken but (?:{1,3})+ in Oniguruma's dialect; at the end of an
    # alternative, where the encodings of tiktoken have it, it need not be possessive
    pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", encoding._pat_str)
    written = {token: "".join(map(_CHARACTERS.get, token)) for token in ranks}
    vocab = {written[token]: i for token, i in ranks.items()} | tokenizer.specials
    merges = [" ".join(map(written.get, pair)) for pair in merges_of(ranks)]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    model["ignore_merges"] = True  # a piece that is a token is this token, merges or not
    decoder = _byte_level(use_regex=True)
    return {"pre_tokenizer": _split_by(pattern), "decoder": decoder, "model": model}


def _split_by(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer of transformers that does what tiktoken does with a pattern."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    steps = [split | {"invert": False}, _byte_level(use_regex=False)]
    return {"type": "Sequence", "pretokenizers": steps}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    """`use_regex`: splits by GPT-2's pattern too."""
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return plain | {"use_regex": use_regex}


# -- in ------------------------------------------------------------------------------------------
class Start(NamedTuple):
    """A model to start from."""

    transformer: Tree  # float32, on the host
    config: GPTConfig
    tokenizer: Tokenizer
    says: str  # what was read
    sha256: str  # of the weights


def read_model(path: str | Path) -> Start:
    """A GPT-2 or Llama of transformers with its tokenizer, or a FILE.bin of llama2.c.

    A GPT-2's stop token is ours. Our other special tokens get rows of their own, the mean of all
    embeddings: at first they are as likely as an average token (Hewitt 2021, "Initializing New Word
    Embeddings"). A Llama keeps its own special tokens and gets no others.
    """
    path = Path(path)
    if path.suffix == ".bin":
        transformer, config = load_llama2c(path)
        source = path.with_name("tokenizer.bin")
        tokenizer = sentencepiece.read_bin(source, n_rows=config.vocab_size)
    else:
        try:
            path = disk.settled(path)
        except InputError as error:
            make = f"AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained(DIR)"
            raise InputError(f"--init {error}, or make it: {make}, AutoTokenizer too") from error
        transformer, config, _ = load_model(path, dtype=np.float32)
        tokenizer, source = read_tokenizer(path, n_rows=config.vocab_size)
    n, n_new = tokenizer.vocab_size, max(0, tokenizer.vocab_size - config.vocab_size)
    for name in {"wte", "lm_head"} & transformer.keys():
        table = transformer[name]
        mean = np.broadcast_to(table.mean(axis=0), (n_new, config.d_model))
        transformer[name] = np.concatenate([table, mean])[:n]  # rows of no token are left out
    new = f", {n_new} of them new, with the mean of all embeddings" if n_new else ""
    name = {"gpt2": "GPT-2", "llama": "Llama"}[config.block]
    says = (
        f"{path}: a {name} of {config.n_layer} blocks, {config.n_head} heads, {config.d_model} "
        f"channels and {config.n_ctx} positions, {tree_size(transformer):,} parameters; {n:,} "
        f"tokens of its {Path(source).name}{new}"
    )
    sha256 = digest_of(dict(tree_items(transformer)), {})
    return Start(transformer, replace(config, vocab_size=n), tokenizer, says, sha256)


def read_tokenizer(folder: Path, *, n_rows: int) -> tuple[Tokenizer, str]:
    """The tokenizer of a GPT-2 or a Llama as a tiktoken.Encoding, and the name of its file.

    Args:     n_rows: rows of the embedding. After them our special tokens get their ids; a Llama's
                  own do, and it gets no sep.
    """
    places = (folder / "tokenizer.json", folder / "vocab.json")
    path = next((path for path in places if path.exists()), None)
    if path is None:
        raise InputError(
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt; found neither: save "
            "the tokenizer beside the model with save_pretrained"
        )
    content = disk.read_object(path)
    if path.name == "vocab.json":
        lines = disk.read_text(folder / "merges.txt").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        model = {"vocab": content, "merges": merges}
        content = {"model": model, "pre_tokenizer": _byte_level(use_regex=True)}
    settings = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        settings |= disk.read_object(file) if file.exists() else {}
    settings |= {role: of.get("content") for role, of in settings.items() if isinstance(of, dict)}
    known = "a byte-level BPE as GPT-2's, or a SentencePiece BPE as Llama's"
    others, advice = (KeyError, AttributeError, TypeError), "name a folder whose tokenizer is one"
    with disk.refusing(path, known, advice, *others):
        model = content["model"]
        of_pieces = model.get("byte_fallback") and "<0x00>" in model["vocab"]  # tokens for bytes
        specials = _special_tokens(content, "ignore_merges" if of_pieces else "byte_fallback")
        if max([*model["vocab"].values(), *specials.values()], default=0) >= n_rows:
            raise ValueError(f"it has ids that are not among the {n_rows} rows of the embedding")
        if of_pieces:
            return sentencepiece.from_json(content, specials, settings), path.name
        pattern, ranks, specials = _byte_level_bpe(content, specials)
        eos = settings.get("eos_token") if settings else tokens.EOS
        if eos in specials:
            specials[tokens.EOS] = specials.pop(eos)  # the name by which we know it
        specials = tokens.with_ours(specials, n_rows)
        return tokens.make_tokenizer("gpt2", pattern, ranks, specials), path.name


def _special_tokens(content: dict[str, Any], option: str) -> dict[str, int]:
    """The ids of the special tokens of a plain BPE; raises as `_byte_level_bpe`."""
    model, added = content["model"], content.get("added_tokens") or []
    if (kind := model.get("type", "BPE")) != "BPE":  # old files leave it out
        raise ValueError(f"its model is {kind!r}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", option):
        if model.get(name):
            raise ValueError(f"its BPE has {name} = {model[name]!r}")
    if plain := [token["content"] for token in added if not token["special"]]:
        raise ValueError(f"it has an added token that is no special one, {plain[0]!r}")
    return {token["content"]: token["id"] for token in added}


def _byte_level_bpe(
    content: dict[str, Any], added: dict[str, int]
) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """(pattern, ranks, special tokens); a ValueError says what is not supported."""
    model, pre = content["model"], content.get("pre_tokenizer")
    if normalizer := content.get("normalizer"):
        raise ValueError(f"it has a normalizer, {normalizer['type']!r}")
    known = {pattern: _split_by(pattern) for pattern in (tokens.PATTERN, GPT2_PATTERN)}
    patterns = [pattern for pattern, splits in known.items() if pre == splits]
    plain = {"use_regex": True, **(pre or {}), "trim_offsets": True}
    if not patterns and plain != _byte_level(use_regex=True):
        raise ValueError(f"its pre_tokenizer is {json.dumps(pre)}")

    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges, made = [(_in_bytes(a), _in_bytes(b)) for a, b in pairs], {a + b for a, b in pairs}
    specials, ranks = dict(added), {}
    for token, i in model["vocab"].items():
        if token not in added and (len(token) == 1 or token in made):
            ranks[_in_bytes(token)] = i
        elif token not in added and model.get("ignore_merges"):
            raise ValueError(f"no merge makes its token {token!r}")
        else:
            specials.setdefault(token, i)
    if max(map(len, ranks), default=0) > _LONGEST_TOKEN:
        raise ValueError(f"it has a token of more than {_LONGEST_TOKEN} bytes")
    if merges != list(merges_of(ranks)):
        raise ValueError("its merges are not those that follow from the order of its ids")
    return (patterns or [GPT2_PATTERN])[0], ranks, specials


def _in_bytes(token: str) -> bytes:
    if unknown := [character for character in token if character not in _BYTES]:
        raise ValueError(f"its token {token!r} has {unknown[0]!r}, which stands for no byte")
    return bytes(map(_BYTES.__getitem__, token))
