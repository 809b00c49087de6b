"""A small SentencePiece table, in the files of llama2.c and of transformers, and naive encoders."""

import re
import struct
from collections import Counter
from itertools import pairwise

SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<unk>", "<s>", "</s>"]
CORPUS = (
    "Once upon a time, there was a girl. Once there was a dog; the dog was sad and said so. "
    "One day an old man came to the den, and the man and the dog and the girl ate an apple. "
    "été était à l'été, l'été était là, 日本語 日本 日本語で 日本, даже да, да же дажe 😀😀 ok 😀😀"
)
# text with many merges, and anything else
LETTERS = "  Once upon a time, thered dogs. élàt日本語でдаже😀▁ü\n\r\t\x00\U0010ffff"


def trained(corpus=CORPUS, n=80):
    """(pieces with their scores) as SentencePiece's: merges, runs of spaces, then characters."""
    words = Counter(re.findall(f"{SPACE}?[^{SPACE}]+", SPACE + corpus.replace(" ", SPACE)))
    words = {tuple(word): times for word, times in words.items()}
    made = []
    while len(made) < n:
        pairs = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if a + b not in made:
            made.append(a + b)
        words = {joined(word, a, b): times for word, times in words.items()}
    scored = [(piece, -float(i)) for i, piece in enumerate(made)]
    for at, n_spaces in ((0, 2), (5, 4), (9, 3), (30, 5)):  # their ids stand in between
        scored.insert(at, (SPACE * n_spaces, -1e9))
    characters = sorted(set(corpus.replace(" ", SPACE)))
    return scored + [(c, -float(n + i)) for i, c in enumerate(characters)]


def joined(parts, a, b):
    out, parts = [], list(parts)
    while parts:
        n = 2 if parts[:2] == [a, b] else 1
        out.append("".join(parts[:n]))
        del parts[:n]
    return tuple(out)


PIECES = trained()
VOCAB = {name: i for i, name in enumerate([*SPECIALS, *BYTES, *(piece for piece, _ in PIECES)])}
SCORES = dict(PIECES)


def to_bin(pieces=PIECES, *, names=True):
    """tokenizer.bin of llama2.c; `names`: <0x41> for a byte, as it writes it now, or A."""
    marked = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
    marked += [(name if names else chr(i), 0.0) for i, name in enumerate(BYTES)]
    entries = [(text.replace(SPACE, " ").encode(), score) for text, score in [*marked, *pieces]]
    packed = [struct.pack("<fi", score, len(text)) + text for text, score in entries]
    return struct.pack("<i", max(len(text) for text, _ in entries)) + b"".join(packed)


def splits(vocab=VOCAB, scores=SCORES):
    """Every split of each piece in two pieces, as transformers lists them: by score, long first."""
    found = [
        (scores[piece], len(piece[:i]), (piece[:i], piece[i:]))
        for piece in scores
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    return [list(pair) for *_, pair in sorted(found, key=lambda row: (-row[0], -row[1]))]


def to_json(vocab=VOCAB, merges=None):
    """tokenizer.json as transformers 4 writes it for a Llama."""
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [replace | {"pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    steps += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True}
    model |= {"byte_fallback": True, "ignore_merges": False}
    exactly = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": vocab[name], "content": name, "special": True} | exactly for name in SPECIALS
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": model | {"vocab": vocab, "merges": splits() if merges is None else merges},
    }


def metaspace(content, scheme="first"):
    """The same tokenizer.json as transformers 5 writes it."""
    pre = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    return content | {"normalizer": None, "pre_tokenizer": pre}


def encode_as_llama2c(text, vocab=VOCAB, scores=SCORES):
    """run.c's encode: characters or their bytes, then the best neighbours, until none is left."""
    parts = list(SPACE + text.replace(SPACE, "\ue000").replace(" ", SPACE))
    while True:
        best, at = -1e10, None
        for i, pair in enumerate(map("".join, pairwise(parts))):
            if pair in scores and scores[pair] > best:
                best, at = scores[pair], i
        if at is None:
            break
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    ids = []
    for part in parts:
        known = [vocab[part]] if part in vocab else None
        ids += known or [3 + byte for byte in part.replace("\ue000", SPACE).encode()]
    return ids
