"""The tokenizer of a Llama, a SentencePiece BPE, as a tiktoken.Encoding, in and out.

Kudo & Richardson 2018 (arXiv 1808.06226). Both join the neighbours of lowest rank, leftmost first:
tiktoken from bytes on, SentencePiece from characters on, or the bytes of those it does not know. So
the first ranks make the table's characters out of their bytes, and the others find them made: the
ids are those of the reference for any text. `Tokenizer.rank_of` leads from ids to ranks.

Three differences, so that every text comes back from its ids. "▁" (U+2581) in a text is a space
there, its own three bytes here. Before a prompt that begins with a space the Metaspace of
transformers 5 puts no second one; we do, as SentencePiece and transformers 4. And the names of
special tokens in a text are plain text.
"""

import json
import struct
from itertools import pairwise
from operator import ge
from pathlib import Path
from typing import Any

from minirlhf import disk
from minirlhf.worlds.tokens import Tokenizer, make_tokenizer, merges_of

_PATTERN = " *[^ ]+| +"  # no piece has a space after another character
_SPACE = "▁"  # as it stands in the files
_BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
_LONGEST_PIECE = 256  # characters; the time to check a piece grows with its square
# a space before a text, as transformers 4 writes it, and we, and as transformers 5 does
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, _REPLACE]}
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "split": False}


# -- in ------------------------------------------------------------------------------------------
def from_json(content: dict, specials: dict[str, int], settings: dict) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Args:     specials: ids of its special tokens.
              settings: tokenizer_config.json, which names bos, eos and pad. Without a pad, which
                  changes no number, it is the unknown token, which is in no text, or eos.
    """
    model = content["model"]
    form = content.get("normalizer"), content.get("pre_tokenizer")
    schemes = ((None, _METASPACE | {"prepend_scheme": name}) for name in ("first", "always"))
    if form not in ((_PREPEND, None), *schemes):
        raise ValueError(f"it has another normalizer or pre_tokenizer: {json.dumps(form)}")
    vocab = model["vocab"] | specials
    eos, bos, pad, unk = (settings.get(f"{role}_token") for role in ("eos", "bos", "pad", "unk"))
    roles = [eos or "</s>", bos or "<s>", None, pad or unk or "<unk>"]
    roles[3] = roles[3] if roles[3] in vocab else roles[0]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    first = {a + b: i for i, (a, b) in reversed([*enumerate(merges)])}
    order = sorted(first, key=first.__getitem__)
    tokenizer = _tokenizer(vocab, order, specials, roles)
    # the list may have every split of a piece; the one that happens stands before the next piece
    position = {pair: i for i, pair in enumerate(merges)}
    happens = [position.get(p, len(merges)) for p in _merges(tokenizer.encoding._mergeable_ranks)]
    if any(map(ge, happens, [*sorted(first.values())[1:], len(merges)])):
        raise ValueError("its merges are not those that follow from the order of its pieces")
    return tokenizer


def read_bin(path: str | Path, *, n_rows: int) -> Tokenizer:
    """The tokenizer.bin of llama2.c: <unk>, <s>, </s>, 256 bytes, then pieces with their scores.

    The piece with the highest score is made first. Equal scores, which runs of spaces have, join
    the leftmost pair: a run grows from its left, as it does where the longer piece comes first.
    """
    data, scores, found, at = disk.read_bytes(path), [], [], 4
    advice = "name the one that was exported for this model"
    with disk.refusing(path, "a tokenizer.bin of llama2.c", advice, struct.error):
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            at += 8 + size
            if size < 1 or at > len(data):
                raise ValueError(f"a piece of {size} bytes stands at byte {at - size}")
            scores.append(score)
            found.append(data[at - size : at].decode().replace(" ", _SPACE))
        if len(found) != n_rows:
            raise ValueError(f"it has {len(found)} pieces for {n_rows} rows of the embedding")
        # old files have the character of this number in the place of the name of a byte
        of_bytes = zip(found[3:], _BYTES.items(), strict=False)
        if any(piece.replace(_SPACE, " ") not in (name, chr(b)) for piece, (name, b) in of_bytes):
            raise ValueError("its pieces 3 to 258 are not the bytes")
        specials = {"<unk>": 0, "<s>": 1, "</s>": 2}
        names = [*specials, *_BYTES, *found[259:]]
        order = [i for i in range(259, n_rows) if len(names[i]) > 1]
        order.sort(key=lambda i: (-scores[i], -len(names[i])))
        for i, j in pairwise(order):
            if not scores[i] > scores[j] and (names[i] + names[j]).strip(_SPACE):
                raise ValueError(f"{names[i]!r} and {names[j]!r} have scores without an order")
        ids, roles = {name: i for i, name in enumerate(names)}, ["</s>", "<s>", None, "<unk>"]
        return _tokenizer(ids, [names[i] for i in order], specials, roles)


def _tokenizer(
    vocab: dict[str, int], order: list[str], specials: dict[str, int], roles: list[str | None]
) -> Tokenizer:
    """From the ids of all names, and the pieces of more than one character, first made first."""
    if missing := [name for name in (*roles[:2], _SPACE, *_BYTES) if name not in vocab]:
        raise ValueError(f"it has no piece {missing[0]!r}")
    specials = specials | {name: vocab[name] for name in roles if name}
    pieces = [name for name in vocab if name not in specials and name not in _BYTES]
    if max(map(len, (*pieces, *order))) > _LONGEST_PIECE:
        raise ValueError(f"it has a piece of more than {_LONGEST_PIECE} characters")
    if across := [piece for piece in pieces if " " in piece or _SPACE in piece.lstrip(_SPACE)]:
        raise ValueError(f"its piece {across[0]!r} has a space that is not at its beginning")
    if max(map(vocab.get, _BYTES)) > min(map(vocab.get, pieces)):
        raise ValueError("its pieces do not stand after those for bytes")
    in_bytes = {piece: piece.replace(_SPACE, " ").encode() for piece in (*pieces, *order)}
    ranks = {bytes([byte]): byte for byte in range(256)}
    characters = [in_bytes[piece] for piece in pieces if len(piece) == 1]
    parts = (character[:n] for character in characters for n in range(2, len(character) + 1))
    for token in (*parts, *map(in_bytes.get, order)):
        ranks.setdefault(token, len(ranks))
    made, many = {a + b for a, b in _merges(ranks)}, {piece for piece in pieces if len(piece) > 1}
    if other := {*order, *many} - made or made - many:
        raise ValueError(f"its merges and its pieces do not agree about {min(other)!r}")
    numbers = {name: len(ranks) + i for i, name in enumerate(specials)}
    of_ids = {i: numbers[name] for name, i in specials.items()}
    of_ids |= {vocab[name]: byte for name, byte in _BYTES.items()}
    of_ids |= {vocab[piece]: ranks[in_bytes[piece]] for piece in pieces}
    if sorted(of_ids) != [*range(len(vocab))]:
        raise ValueError(f"its ids are not 0 to {len(vocab) - 1}, each once")
    rank_of = [of_ids[i] for i in range(len(vocab))]
    return make_tokenizer("sentencepiece", _PATTERN, ranks, numbers, roles=roles, rank_of=rank_of)


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The two parts that make each piece, by rank; without those that make a character."""
    pairs = (pair for pair in merges_of(ranks) if len(b"".join(pair).decode(errors="replace")) > 1)
    return [tuple(part.decode().replace(" ", _SPACE) for part in pair) for pair in pairs]


# -- out -----------------------------------------------------------------------------------------
def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The parts of a tokenizer.json with which transformers gives the ids of `prompt_ids`."""
    encoding, vocab = tokenizer.encoding, dict(tokenizer.specials)
    for i, rank in enumerate(tokenizer.rank_of):
        if not encoding.is_special_token(rank):
            token = encoding.decode_single_token_bytes(rank)
            byte = f"<0x{token[0]:02X}>"
            is_byte = len(token) == 1 and byte not in vocab
            vocab[byte if is_byte else token.decode().replace(" ", _SPACE)] = i
    merges = _merges(encoding._mergeable_ranks)
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": merges}
    name = tokenizer.names()[1]
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ([bos, {"Sequence": {"id": text, "type_id": 0}}] for text in "AB")
    begin = {"type": "TemplateProcessing", "single": first, "pair": first + second}
    begin["special_tokens"] = {name: {"id": name, "ids": [tokenizer.bos], "tokens": [name]}}
    back = _REPLACE | {"pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    decoder = {"type": "Sequence", "decoders": steps}
    return {"normalizer": _PREPEND, "post_processor": begin, "decoder": decoder, "model": model}
