"""Tokenizer: lossless, deterministic, equal to a plain merge loop; bad files are refused."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.errors import InputError
from minirlhf.worlds.tokens import (
    BOS,
    EOS,
    PAD,
    PATTERN,
    SEP,
    Tokenizer,
    load_tokenizer,
    load_tokenizer_by_name,
    save_tokenizer,
    train_tokenizer,
)

CORPUS = [
    "Hello, where is my kettle?",
    "Your kettle is on its way.",
    "Où est ma bouilloire ? 日本語",
]
TOKENIZER = train_tokenizer(CORPUS * 3, vocab_size=330)
DATA = Path(__file__).parents[3] / "shared" / "data"

# letters that the corpus has, so that merges happen, and anything else
texts = st.text() | st.text("helo wrisktyn ?.,\nù日本", max_size=40)


def ranks(tokenizer):
    return tokenizer.encoding._mergeable_ranks


def encode_slowly(text, ranks):
    """In each piece, join the adjacent parts of lowest rank until none is left."""
    ids = []
    for piece in re.findall(PATTERN, text):
        parts = [bytes([b]) for b in piece.encode()]
        while True:
            joined = [a + b for a, b in zip(parts, parts[1:], strict=False)]
            known = [(ranks[token], i) for i, token in enumerate(joined) if token in ranks]
            if not known:
                break
            i = min(known)[1]
            parts[i : i + 2] = [joined[i]]
        ids += [ranks[part] for part in parts]
    return ids


def train_slowly(texts, n_ranks):
    """Count all pairs again after every merge."""
    words = [
        [bytes([b]) for b in piece.encode()] for t in texts for piece in re.findall(PATTERN, t)
    ]
    ranks = {bytes([i]): i for i in range(256)}
    while len(ranks) < n_ranks:
        counts = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        if not counts or max(counts.values()) < 2:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        assert a + b not in ranks
        ranks[a + b] = len(ranks)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [a + b]
                i += 1
    return ranks


@given(texts)
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(texts)
def test_pattern_covers_the_text_in_python_as_in_tiktoken(text):
    assert "".join(re.findall(PATTERN, text)) == text


@given(texts)
def test_tiktoken_equals_a_plain_merge_loop(text):
    assert TOKENIZER.encode(text) == encode_slowly(text, ranks(TOKENIZER))


@given(st.lists(st.text("ab \n1é", max_size=40), min_size=1), st.integers(260, 300))
def test_training_equals_counting_all_pairs_again(corpus, vocab_size):
    if not any(corpus):
        corpus = ["a"]
    got = ranks(train_tokenizer(corpus, vocab_size=vocab_size))
    assert got == train_slowly(corpus, vocab_size - 4)


@given(st.permutations(CORPUS))
def test_ranks_do_not_depend_on_the_order_of_the_texts(corpus):
    assert ranks(train_tokenizer(corpus, vocab_size=280)) == ranks(
        train_tokenizer(CORPUS, vocab_size=280)
    )


def test_first_merges_by_hand():
    # pieces: "aab", " aab", " ab"; pairs: ab 3, aa 2, " a" 2 -> "ab"; then a+ab 2, " "+a 1,
    # " "+ab 1 -> "aab"; then " "+aab 1 and " "+ab 1 -> no pair occurs twice
    tokenizer = train_tokenizer(["aab aab ab"], vocab_size=1000)
    assert list(ranks(tokenizer))[256:] == [b"ab", b"aab"]
    assert tokenizer.vocab_size == 256 + 2 + 4


def test_special_tokens_stand_after_the_ranks():
    n = len(ranks(TOKENIZER))
    assert (TOKENIZER.eos, TOKENIZER.bos, TOKENIZER.sep, TOKENIZER.pad) == (n, n + 1, n + 2, n + 3)
    assert TOKENIZER.vocab_size == n + 4 <= 330


@given(st.lists(st.sampled_from([EOS, BOS, SEP, PAD, "a", " "])).map("".join))
def test_special_names_in_text_are_plain_text(text):
    ids = TOKENIZER.encode(text)
    assert not set(ids) & {TOKENIZER.eos, TOKENIZER.bos, TOKENIZER.sep, TOKENIZER.pad}
    assert TOKENIZER.decode(ids) == text


def test_layout_of_prompt_and_response():
    ids = TOKENIZER.encode("kettle")
    assert TOKENIZER.prompt_ids("kettle") == [TOKENIZER.bos, *ids, TOKENIZER.sep]
    assert TOKENIZER.response_ids("kettle") == [*ids, TOKENIZER.eos]
    assert TOKENIZER.response_ids("") == [TOKENIZER.eos]
    whole = [TOKENIZER.pad, *TOKENIZER.prompt_ids("my "), *TOKENIZER.response_ids("kettle")]
    assert TOKENIZER.decode(whole) == "my kettle"
    with pytest.raises(InputError, match="empty prompt"):
        TOKENIZER.prompt_ids("")


def test_long_prompts_keep_their_end_and_long_responses_their_beginning():
    bos, sep, eos = TOKENIZER.bos, TOKENIZER.sep, TOKENIZER.eos
    a, b, c = map(ord, "xzq")  # no merges
    assert TOKENIZER.prompt_ids("xzq", max_tokens=5) == [bos, a, b, c, sep]
    assert TOKENIZER.prompt_ids("xzq", max_tokens=4) == [bos, b, c, sep]
    assert TOKENIZER.prompt_ids("xzq", max_tokens=2) == [bos, sep]
    assert TOKENIZER.response_ids("xzq", max_tokens=4) == [a, b, c, eos]
    assert TOKENIZER.response_ids("xzq", max_tokens=3) == [a, b, c]  # cut off: no stop token
    with pytest.raises(InputError, match="got an empty prompt"):
        TOKENIZER.prompt_ids("", max_tokens=4)
    with pytest.raises(InputError, match="response: .*got an empty response: write one"):
        TOKENIZER.response_ids("", max_tokens=3)


@given(texts, st.integers(2, 20))
def test_a_limit_is_kept_and_changes_nothing_that_fits(text, limit):
    for ids_of in (TOKENIZER.prompt_ids, TOKENIZER.response_ids):
        whole, cut = ids_of(text + "x"), ids_of(text + "x", limit)
        assert min(limit, len(whole)) - 3 <= len(cut) <= limit
        if len(whole) <= limit:
            assert cut == whole


@given(st.text("aé€😀", min_size=1, max_size=12), st.integers(4, 20))
def test_a_cut_stands_between_characters(text, limit):
    beginning = TOKENIZER.decode(TOKENIZER.response_ids(text, limit))
    end = TOKENIZER.decode(TOKENIZER.prompt_ids(text, limit))
    assert text.startswith(beginning) and text.endswith(end) and beginning


@given(texts)
def test_pieces_are_one_printable_string_a_token(text):
    ids = TOKENIZER.prompt_ids(text + "é\n")
    pieces = TOKENIZER.pieces(ids)
    assert len(pieces) == len(ids)
    assert all(piece and piece.isprintable() for piece in pieces)
    assert pieces[0] == BOS and pieces[-1] == SEP


def test_ids_outside_the_vocabulary_are_refused():
    for i in (-1, TOKENIZER.vocab_size):
        with pytest.raises(ValueError, match=f"got {i}"):
            TOKENIZER.decode([i])
    assert TOKENIZER.decode([0xC3]) == "\ufffd"


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(InputError, match="at least 260.*got 259"):
        train_tokenizer(CORPUS, vocab_size=259)


def test_a_long_text_without_spaces_trains():
    tokenizer = train_tokenizer(["ab" * 20_000], vocab_size=300)
    # "ab", "abab", ... up to the 256 bytes of a part
    assert list(ranks(tokenizer))[256:] == [b"ab" * 2**k for k in range(8)]


# --- files


def same(a: Tokenizer, b: Tokenizer):
    return (ranks(a), a.encoding._special_tokens, a.encoding._pat_str) == (
        ranks(b),
        b.encoding._special_tokens,
        b.encoding._pat_str,
    ) and (a.bos, a.sep, a.eos, a.pad) == (b.bos, b.sep, b.eos, b.pad)


def test_saved_tokenizer_comes_back(tmp_path):
    save_tokenizer(TOKENIZER, tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    assert same(loaded, TOKENIZER)
    assert loaded.encode(CORPUS[2]) == TOKENIZER.encode(CORPUS[2])


def with_entry(**changes):
    return lambda content: content | changes


def with_rank(token, rank):
    return lambda content: content | {"ranks": content["ranks"] | {token: rank}}


def without_rank(content):
    return content | {"ranks": dict(list(content["ranks"].items())[1:])}


@pytest.mark.parametrize(
    "damage",
    [
        with_entry(format="something else"),
        with_entry(ranks=[1, 2]),
        with_entry(special_tokens={EOS: 300}),
        with_entry(special_tokens={EOS: 300, BOS: 301, SEP: 302, PAD: 302}),
        with_entry(special_tokens={EOS: 0, BOS: 301, SEP: 302, PAD: 303}),
        with_entry(special_tokens={EOS: 300, BOS: 301, SEP: 302, PAD: 2**40}),
        with_entry(special_tokens={EOS: 300, BOS: 301, SEP: 302, PAD: True}),
        with_entry(pattern="("),
        with_rank("YWJjZGVm", -1),
        with_rank("YWJjZGVm", 1.5),
        with_rank("YWJjZGVm", 0),
        with_rank("*", 5000),
        with_rank("", 5000),
        without_rank,
        lambda content: {key: content[key] for key in content if key != "pattern"},
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    save_tokenizer(TOKENIZER, tmp_path)
    path = tmp_path / "tiktoken.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(InputError, match="tiktoken.json: expected"):
        load_tokenizer(tmp_path)


def test_what_makes_tiktoken_panic_is_one_sentence(tmp_path):
    """A panic of Rust is no Exception: it would end the program."""
    save_tokenizer(TOKENIZER, tmp_path)
    path = tmp_path / "tiktoken.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"pattern": "((a|b)*)*c(?!d)"}))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="expected a pattern that splits every text") as caught:
        tokenizer.encode("a" * 3000 + "b")
    assert "\n" not in str(caught.value)


def test_a_missing_or_truncated_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="found none"):
        load_tokenizer(tmp_path)
    save_tokenizer(TOKENIZER, tmp_path)
    path = tmp_path / "tiktoken.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(InputError, match="JSON"):
        load_tokenizer(tmp_path)


# --- known encodings


def test_an_unknown_encoding_is_refused():
    with pytest.raises(InputError, match="expected one of .*gpt2.*; got 'gpt9'"):
        load_tokenizer_by_name("gpt9")


@pytest.fixture
def no_tables(monkeypatch, tmp_path):
    """tiktoken as on a machine that never fetched a table."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    return tmp_path


@pytest.mark.parametrize(
    "failure", [OSError("no route to host"), RuntimeError("proxy"), ImportError("requests")]
)
def test_no_network_is_one_sentence(no_tables, monkeypatch, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(tiktoken.load, "read_file", fail)
    with pytest.raises(InputError, match=r"encoding gpt2.*TIKTOKEN_CACHE_DIR") as caught:
        load_tokenizer_by_name("gpt2")
    assert "\n" not in str(caught.value)


def test_a_corrupt_table_is_one_sentence(no_tables, monkeypatch):
    monkeypatch.setattr(tiktoken.load, "read_file", lambda *_: b"not the table")
    with pytest.raises(InputError, match="encoding cl100k_base.*Hash mismatch"):
        load_tokenizer_by_name("cl100k_base")


def test_a_known_encoding_gets_our_tokens_after_its_own(no_tables, monkeypatch, tmp_path):
    def constructor():  # an unused id (256), as cl100k_base has, and a special of its own
        return {
            "name": "known",
            "pat_str": r"\w+|\W+",
            "mergeable_ranks": {bytes([i]): i for i in range(256)} | {b"ab": 257},
            "special_tokens": {EOS: 258, "<|fim|>": 259},
        }

    tiktoken.list_encoding_names()  # fills the registry
    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "known", constructor)
    tokenizer = load_tokenizer_by_name("known")
    assert (tokenizer.eos, tokenizer.bos, tokenizer.sep, tokenizer.pad) == (258, 260, 261, 262)
    assert tokenizer.vocab_size == 263
    assert tokenizer.decode([*tokenizer.prompt_ids("ab"), 259, 256, 258]) == "ab\ufffd"
    assert tokenizer.pieces([256, 257, 259]) == ["\ufffd", "ab", "<|fim|>"]
    save_tokenizer(tokenizer, tmp_path)
    assert same(load_tokenizer(tmp_path), tokenizer)


# --- text that nobody here wrote


@pytest.mark.parametrize("name", ["names", "tinyshakespeare"])
def test_real_text_comes_back(name):
    path = DATA / f"{name}.txt"
    if not path.exists():
        pytest.skip(f"no {path}")
    text = path.read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text], vocab_size=512)
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 512
    assert tokenizer.decode(ids) == text
    assert len(ids) < 0.62 * len(text)
