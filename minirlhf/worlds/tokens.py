"""Text to token ids and back: byte-level BPE, trained here, run by tiktoken.

Sennrich, Haddow & Birch 2016 (arXiv 1508.07909) over bytes as in GPT-2 (Radford et al. 2019). The
base alphabet is all 256 bytes, so every text encodes and decodes to itself.
"""

import base64
import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import add, itemgetter
from pathlib import Path

import tiktoken

from minirlhf.disk import read_object, refusing, settled, shorten, to_json, write_whole
from minirlhf.errors import InputError

EOS, BOS, SEP, PAD = SPECIALS = ("<|endoftext|>", "<|bos|>", "<|sep|>", "<|pad|>")

# Pieces that no token crosses: a word, a number or a run of other signs, each with the space before
# it; a run of white space. Written out character by character, because Python's re and the Rust
# engine of tiktoken disagree on what \s and \w contain; without look-around, so that the time is
# linear. Letters are A-Z, a-z and, leaving out two blocks of punctuation, all that is not ASCII.
_SPACE = " \\t\\n\\r\\f\\v"
_LETTER = "A-Za-z\u00c0-\u1fff\u3040-\U0010ffff"
PATTERN = f" ?[{_LETTER}]+| ?[0-9]+| ?[^{_SPACE}{_LETTER}0-9]+|[{_SPACE}]+"

_FILE = "tiktoken.json"
_FORMAT = "minirlhf tokenizer 1"
_LONGEST_PIECE = 256  # bytes: longer pieces are counted in parts, so that a merge stays local


@dataclass(frozen=True)
class Tokenizer:
    """A tiktoken encoding and the ids of its four special tokens.

    Sequences are [pad .. bos prompt sep | response eos pad ..], without a sep if it is None: a
    model that has never seen one gets none, and its response goes on with the prompt.

    The ids of a SentencePiece table (`runs/sentencepiece.py`) are not the order in which it merges:
    `rank_of` gives each its rank in the encoding. The prompt then begins with a space.
    """

    encoding: tiktoken.Encoding
    bos: int
    sep: int | None
    eos: int
    pad: int
    rank_of: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Largest id + 1: the rows that the embedding needs."""
        return len(self.rank_of) or self.encoding.max_token_value + 1

    @property
    def prefix(self) -> str:
        """What stands before every prompt."""
        return " " if self.rank_of else ""

    @property
    def specials(self) -> dict[str, int]:
        """The ids of the special tokens, in order."""
        ranks, rank_of = self.encoding._special_tokens, self.rank_of
        ids = {name: rank_of.index(rank) for name, rank in ranks.items()} if rank_of else ranks
        return dict(sorted(ids.items(), key=itemgetter(1)))

    @cached_property
    def _ids_of(self) -> dict[int, list[int]]:
        """The ids of each rank: of two the later; of a part of a character those of its bytes."""
        ranks, ids = self.encoding._mergeable_ranks, {r: [i] for i, r in enumerate(self.rank_of)}
        for token, rank in ranks.items():
            ids.setdefault(rank, [ids[ranks[bytes([byte])]][0] for byte in token])
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of the text; a special token's name in it, like "<|endoftext|>", is plain text."""
        try:
            ranks = self.encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, and no Exception
                raise
            raise InputError(
                "encoding: expected a pattern that splits every text; tiktoken gave up "
                f"({shorten(str(error), 99)}): shorten a million blanks, or restore the tokenizer"
            ) from error
        return [i for rank in ranks for i in self._ids_of[rank]] if self.rank_of else ranks

    def decode(self, ids: Sequence[int]) -> str:
        r"""The text of all ids but the special ones; bytes that are not UTF-8 become "\ufffd"."""
        special, ids = self.encoding.is_special_token, [i for i in map(int, ids) if i != self.pad]
        plain = (i for i in ids if not special(self._rank(i)))
        text = b"".join(map(self._bytes, plain)).decode("utf-8", errors="replace")
        return text.removeprefix(self.prefix) if ids[:1] == [self.bos] else text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        r"""One printable string a token: a newline reads "\n", a lone byte "\xe2"."""
        texts = (self._bytes(int(i)).decode("utf-8", errors="backslashreplace") for i in ids)
        return [
            "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
            for text in texts
        ]

    def names(self) -> list[str | None]:
        """Of eos, bos, sep (None if there is none) and pad."""
        ids = self.eos, self.bos, self.sep, self.pad
        return [None if i is None else self._bytes(i).decode() for i in ids]

    def prompt_ids(self, text: str, max_tokens: int | None = None) -> list[int]:
        """[bos, *ids, sep]; of a prompt that is too long, bos and the last max_tokens - 1 of these.

        A cut stands between characters, so that one token more or two may be missing.
        """
        if not text:
            raise InputError("prompt: expected some text; got an empty prompt: write one")
        ids = self.encode(self.prefix + text) + ([] if self.sep is None else [self.sep])
        start = 0 if max_tokens is None else max(0, len(ids) + 1 - max_tokens)
        while start and self._is_inside(ids[start]):
            start += 1
        return [self.bos, *ids[start:]]

    def response_ids(self, text: str, max_tokens: int | None = None) -> list[int]:
        """[*ids, eos]; of a response that is too long, the first max_tokens ids, without an eos.

        Without a limit the empty response is [eos], as a policy that ends at once samples it; with
        one, as for text to train on or to score, it is refused. A cut is as of `prompt_ids`.
        """
        if max_tokens is not None and not text:
            raise InputError("response: expected some text; got an empty response: write one")
        ids = [*self.encode(text), self.eos]
        end = len(ids) if max_tokens is None else min(max_tokens, len(ids))
        while 0 < end < len(ids) and self._is_inside(ids[end]):
            end -= 1
        return ids[: end or max_tokens]

    def _is_inside(self, i: int) -> bool:
        """Does the token begin inside of a character?"""
        return self._bytes(i)[0] & 0xC0 == 0x80

    def _rank(self, i: int) -> int:
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"tokens: expected ids below {self.vocab_size}; got {i}")
        return self.rank_of[i] if self.rank_of else i

    def _bytes(self, i: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(self._rank(i))
        except KeyError:  # cl100k_base leaves ids unused that an untrained policy may sample
            return "\ufffd".encode()


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: give the most frequent adjacent pair the next rank, merge it, repeat.

    Pairs are counted within the pieces of PATTERN; ties go to the pair first in byte order, so the
    order of the texts does not matter. Training ends early when no pair occurs twice: `vocab_size`,
    with the 256 bytes and the 4 special tokens, is the most ids there will be.
    """
    least = 256 + len(SPECIALS)  # each byte is a token
    if vocab_size < least:
        raise InputError(f"vocab_size: expected at least {least}; got {vocab_size}: raise it")
    words: Counter[str] = Counter()  # pieces as bytes, one character a byte; long ones in parts
    pieces = Counter(piece for text in texts for piece in re.findall(PATTERN, text))
    for piece, times in pieces.items():
        data = piece.encode("utf-8", errors="replace").decode("latin-1")
        for start in range(0, len(data), _LONGEST_PIECE):
            words[data[start : start + _LONGEST_PIECE]] += times
    ranks = _train_ranks(words, n_ranks=vocab_size - len(SPECIALS))
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return make_tokenizer("minirlhf", PATTERN, ranks, specials)


def _train_ranks(counts: Counter[str], *, n_ranks: int) -> dict[bytes, int]:
    """Ranks of at most n_ranks tokens, the 256 bytes first, from words and how often they occur.

    A word is a string with one character a token, chr(rank), so that str.split finds a pair. A
    merge changes only the counts beside it. A pair gains only while the later of its tokens is
    made, so that one entry of the heap is enough: popped with an outdated count, it goes back. No
    token arises twice (as a+bc, then as ab+c): within its bytes the earlier merges are the same
    wherever they stand.
    """
    words = sorted(counts.items())
    tokens = [bytes([i]) for i in range(256)]
    pair_counts: Counter[str] = Counter()
    words_with: dict[str, set[int]] = defaultdict(set)

    def pairs(word):
        return map(add, word, word[1:])

    def entry(pair):  # smallest first: the most frequent, then the first in byte order
        return -pair_counts[pair], tokens[ord(pair[0])], tokens[ord(pair[1])], pair

    for w, (word, times) in enumerate(words):
        for pair in pairs(word):
            pair_counts[pair] += times
            words_with[pair].add(w)
    heap = [entry(pair) for pair in pair_counts]
    heapq.heapify(heap)
    while heap and len(tokens) < n_ranks:
        negative_count, a, b, best = heapq.heappop(heap)
        if -negative_count != pair_counts[best]:
            heapq.heappush(heap, entry(best))
            continue
        if -negative_count < 2:
            break
        new = chr(len(tokens))
        tokens.append(a + b)
        made = defaultdict(set)  # pairs with the new token
        for w in words_with.pop(best):
            word, times = words[w]
            parts = word.split(best)
            words[w] = new.join(parts), times
            ends = [part[:1] + part[1:][-1:] for part in parts]  # between them nothing changes
            for pair in pairs(best.join(ends)):
                pair_counts[pair] -= times
            for pair in pairs(new.join(ends)):
                pair_counts[pair] += times
                if new in pair:
                    made[pair].add(w)
        words_with |= made
        for pair in made:
            heapq.heappush(heap, entry(pair))
    return {token: rank for rank, token in enumerate(tokens)}


def load_tokenizer_by_name(name: str) -> Tokenizer:
    """A known encoding of tiktoken ("gpt2", "cl100k_base", ...) and our special tokens after it."""
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise InputError(
            f"encoding: expected one of {', '.join(sorted(names))}; got {name!r}: choose one of "
            "these, or none to train one on the corpus"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # a proxy, a broken cache, no network: any library below may raise
        raise InputError(
            f"encoding {name}: expected its table on the network or in TIKTOKEN_CACHE_DIR; got "
            f"{type(error).__name__} ({shorten(str(error), 120)}): fetch it once with a network, "
            "set TIKTOKEN_CACHE_DIR to a folder with it, or train one on the corpus, with none here"
        ) from error
    specials = with_ours(encoding._special_tokens, encoding.max_token_value + 1)
    return make_tokenizer(name, encoding._pat_str, encoding._mergeable_ranks, specials)


def with_ours(specials: dict[str, int], first: int) -> dict[str, int]:
    """The special tokens and, from the id `first` on, those of SPECIALS that are not among them."""
    missing = [special for special in SPECIALS if special not in specials]
    return specials | {special: first + i for i, special in enumerate(missing)}


def make_tokenizer(
    name: str,
    pattern: str,
    ranks: dict[bytes, int],
    specials: dict[str, int],
    *,
    roles: Sequence[str | None] = SPECIALS,
    rank_of: Sequence[int] = (),
) -> Tokenizer:
    """From the parts of a tiktoken.Encoding, or a ValueError.

    Args:     roles: the names among `specials` of eos, bos, sep (or None) and pad.
              rank_of: that of each id, in ranks or specials, where ids are not ranks.
    """
    ids = [*ranks.values(), *specials.values()]
    if not all(type(i) is int and 0 <= i < 2**31 for i in (*ids, *rank_of)):
        raise ValueError("an id is no whole number in its range")
    if len(set(ids)) != len(ids):  # tiktoken itself would abort with a Rust panic
        raise ValueError("two tokens share an id")
    if b"" in ranks or any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError("the tokens are not the 256 bytes and longer ones")
    if rank_of and not {ranks[bytes([i])] for i in range(256)} <= set(rank_of) <= set(ids):
        raise ValueError("a byte has no id, or an id has no token")
    bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    ids = {name: rank_of.index(i) if rank_of else i for name, i in specials.items()}
    eos, bos, sep, pad = roles
    of_sep = None if sep is None else ids[sep]
    return Tokenizer(bpe, ids[bos], of_sep, ids[eos], ids[pad], tuple(rank_of))


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two parts that make each token, by rank; none where its bytes are joined otherwise."""
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            of_pairs = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
            lowest = min(of_pairs)
            if lowest == math.inf:
                break
            i = of_pairs.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tiktoken.json (`runs/hugging_face.py` writes the tokenizer.json of transformers)."""
    encoding = tokenizer.encoding
    ranks = encoding._mergeable_ranks.items()
    content = {
        "format": _FORMAT,
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "ranks": {base64.b64encode(token).decode("ascii"): rank for token, rank in ranks},
    }
    if tokenizer.rank_of:
        content |= {"roles": tokenizer.names(), "rank_of": tokenizer.rank_of}
    write_whole(Path(folder) / _FILE, to_json(content))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read what `save_tokenizer` wrote."""
    path = settled(folder) / _FILE
    content = read_object(path)
    damage = (KeyError, AttributeError, TypeError)
    with refusing(path, "a tokenizer of minirlhf", "restore the file or train again", *damage):
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {shorten(repr(content['format']))}, not {_FORMAT!r}")
        name, pattern = str(content["name"]), str(content["pattern"])
        specials, stored = content["special_tokens"], content["ranks"].items()
        ranks = {base64.b64decode(token, validate=True): rank for token, rank in stored}
        roles, rank_of = content.get("roles", SPECIALS), content.get("rank_of", ())
        return make_tokenizer(name, pattern, ranks, specials, roles=roles, rank_of=rank_of)
