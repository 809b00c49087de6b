"""A SentencePiece table in tiktoken: ids of a naive encoder, any text back, bad files refused."""

import json
import struct
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_pieces import (
    BYTES,
    CORPUS,
    LETTERS,
    SCORES,
    SPACE,
    VOCAB,
    encode_as_llama2c,
    metaspace,
    splits,
    to_bin,
    to_json,
)
from tiny_run import VOWELS, tiny_config, train, write_names

from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.runs.checkpoint import save_model
from minirlhf.runs.hugging_face import companions, read_tokenizer
from minirlhf.runs.sentencepiece import read_bin
from minirlhf.runs.session import reopen_session
from minirlhf.worlds.tokens import load_tokenizer, save_tokenizer

N = len(VOCAB)
texts = st.text() | st.text(LETTERS, max_size=40)


def from_bin(folder, data=None):
    (folder / "tokenizer.bin").write_bytes(to_bin() if data is None else data)
    return read_bin(folder / "tokenizer.bin", n_rows=N)


def from_json(folder, content, **settings):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for name, entries in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(entries))
    return read_tokenizer(folder, n_rows=N)[0]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return from_bin(tmp_path_factory.mktemp("bin"))


def differences(a, b):
    same = {
        "ranks": a.encoding._mergeable_ranks == b.encoding._mergeable_ranks,
        "specials": a.specials == b.specials,
        "pattern": a.encoding._pat_str == b.encoding._pat_str,
        "rank_of": a.rank_of == b.rank_of,
        "roles": (a.bos, a.sep, a.eos, a.pad) == (b.bos, b.sep, b.eos, b.pad),
    }
    return [name for name, equal in same.items() if not equal]


# --- ids


@given(texts)
def test_ids_are_those_of_llama2c_for_any_text(ours, text):
    text = (text or "x").replace("\ue000", "")  # which stands for "▁" in the naive encoder
    assert not text or ours.prompt_ids(text)[1:] == encode_as_llama2c(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Once there", [" Once", " there"]),
        ("      dog", ["     ", " ", " dog"]),  # with the prefix seven: 5, 1, and one joins the dog
        ("  \tdog", ["   ", r"\t", "d", "og"]),  # no piece begins with a space and a tab
        ("  ", ["   "]),
        (SPACE, [" ", r"\xe2", r"\x96", r"\x81"]),
        (" ü日", ["  ", r"\xc3", r"\xbc", "日"]),
        ("<s>", [" ", "<", "s", ">"]),
    ],
)
def test_pieces_by_hand(ours, text, pieces):
    got = ours.pieces(ours.prompt_ids(text))
    assert got == ["<s>", *pieces]


def test_both_forms_of_bytes_in_a_bin_say_the_same(ours, tmp_path):
    assert not differences(ours, from_bin(tmp_path, to_bin(names=False)))


def test_a_megabyte_is_encoded_in_seconds(ours):
    text = (CORPUS + "\n\n") * (10**6 // len(CORPUS.encode()) + 1)
    begun = time.perf_counter()
    assert ours.decode(ours.encode(text)) == text
    assert time.perf_counter() - begun < 10


# --- texts and sequences


@given(texts, texts)
def test_any_text_comes_back(ours, prompt, response):
    prompt = prompt or "  x"
    assert ours.decode(ours.encode(response)) == response
    assert ours.decode(ours.prompt_ids(prompt)) == prompt
    whole = [ours.pad, ours.pad, *ours.prompt_ids(prompt), *ours.response_ids(response), ours.pad]
    assert ours.decode(whole) == prompt + response


@given(st.text("aé€😀日", min_size=1, max_size=12), st.integers(5, 20))
def test_a_cut_stands_between_characters(ours, text, limit):
    beginning = ours.decode(ours.response_ids(text, limit))
    end = ours.decode(ours.prompt_ids(text, limit))
    assert text.startswith(beginning) and text.endswith(end) and beginning


def test_a_response_goes_on_with_the_prompt_and_no_sep_stands_between(ours):
    assert (ours.bos, ours.sep, ours.eos, ours.pad) == (1, None, 2, 0)
    prompt = ours.prompt_ids("Once upon a dog")
    assert ours.pieces(prompt) == ["<s>", " Once", " upon", " a", " dog"]
    for rest in (" there was", ", there was"):
        assert prompt + ours.response_ids(rest)[:-1] == ours.prompt_ids("Once upon a dog" + rest)
    assert ours.decode(ours.response_ids("there")) == "there"
    assert ours.response_ids("") == [ours.eos]


def test_every_id_has_its_bytes_those_that_no_text_has_too(ours):
    assert ours.vocab_size == N
    for byte, name in enumerate(BYTES):
        text = bytes([byte]).decode(errors="replace")
        assert ours.decode([VOCAB[name]]) == text
    for name in ("d", "日", "▁Once", "▁▁▁"):
        assert ours.decode([VOCAB[name]]) == name.replace(SPACE, " ")
    assert ours.encode("d") == [VOCAB["d"]] != [VOCAB["<0x64>"]]
    assert ours.decode([0, 1, 2]) == ""
    for i in (-1, N):
        with pytest.raises(ValueError, match=f"got {i}"):
            ours.decode([i])


def test_half_a_surrogate_pair_is_replaced(ours):
    assert ours.decode(ours.encode("a\ud800 b")) == "a\ufffd b"


def test_a_run_goes_on_with_such_a_table(tmp_path):
    """Under a GPT-2's weights: sampled, scored, saved and opened again, with nothing new in it."""
    config = GPTConfig(vocab_size=N, n_ctx=48, n_layer=1, n_head=2, d_model=8)
    save_model(tmp_path / "init", init_transformer(config, rng=np.random.default_rng(0)), config)
    (tmp_path / "init/tokenizer.json").write_text(json.dumps(to_json()))
    given = {"corpus": write_names(tmp_path / "names.txt"), "reward": VOWELS}
    train(tiny_config(tmp_path / "run", init=str(tmp_path / "init"), **given))
    session = reopen_session(tmp_path / "run", look=True)
    assert session.gpt.vocab_size == N and session.tokenizer.sep is None
    assert not differences(session.tokenizer, read_tokenizer(tmp_path / "run/policy", n_rows=N)[0])
    rows = list(map(json.loads, (tmp_path / "run/samples.jsonl").read_text().splitlines()))
    for row in rows:
        text = session.tokenizer.decode(row["ids"])
        assert row["response"] in (text, text.removesuffix("\ufffd")) and len(row["ids"]) <= 10


# --- files


def canonical(content):
    """The merges that happen, alone, as the tokenizers library trains them."""
    pieces = dict.fromkeys(a + b for a, b in content["model"]["merges"])
    return with_model(merges=list(map(as_made, pieces)))(content)


def as_made(piece):
    """The last merge of a piece."""
    parts = list(piece)
    while len(parts) > 2:
        pairs = list(map("".join, pairwise(parts)))
        i = pairs.index(max(pairs, key=lambda pair: SCORES.get(pair, -1e10)))
        parts[i : i + 2] = [pairs[i]]
    return parts


def as_strings(content):
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    return content | {"model": content["model"] | {"merges": merges}}


@pytest.mark.parametrize(
    "form", [dict, metaspace, lambda c: metaspace(c, "always"), as_strings, canonical]
)
def test_all_forms_of_tokenizer_json_say_what_the_bin_says(ours, tmp_path, form):
    assert not differences(ours, from_json(tmp_path, form(to_json())))


def test_what_we_write_is_read_again(ours, tmp_path):
    save_tokenizer(ours, tmp_path)
    assert not differences(ours, load_tokenizer(tmp_path))
    files = companions(load_tokenizer(tmp_path), {"padding_side": "left"}, {})
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert not differences(ours, read_tokenizer(tmp_path, n_rows=N)[0])
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["bos_token"] == "<s>" and settings["pad_token"] == "<unk>"
    assert "sep_token" not in settings and "chat_template" not in settings


def test_names_of_the_special_tokens_are_those_of_the_settings(tmp_path):
    vocab = VOCAB | {"<end>": N, "<pad>": N + 1}
    content = to_json(vocab)
    content["added_tokens"] += [{"id": N, "content": "<end>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    old = {"eos_token": "</s>", "pad_token": {"content": "<pad>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(old))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    got, source = read_tokenizer(tmp_path, n_rows=N + 2)
    assert (got.bos, got.sep, got.eos, got.pad) == (
        1,
        None,
        N,
        N + 1,
    ) and source == "tokenizer.json"
    assert got.names() == ["<end>", "<s>", None, "<pad>"] and got.decode([0, N, N + 1]) == ""
    assert read_tokenizer(tmp_path, n_rows=N + 50)[0].vocab_size == N + 2


def with_model(**changes):
    return lambda content: content | {"model": content["model"] | changes}


def with_vocab(change):
    return lambda content: with_model(vocab=change(dict(content["model"]["vocab"])))(content)


def without(name):
    return with_vocab(lambda vocab: {token: i for token, i in vocab.items() if token != name})


def renamed(old, new):
    return with_vocab(
        lambda vocab: {new if token == old else token: i for token, i in vocab.items()}
    )


def moved(content, to):
    """The split of "▁girl" that happens, to behind the first of a later piece, or away."""
    merges = content["model"]["merges"]
    assert ["▁", "girl"] == as_made("▁girl") and merges.count(["▁", "girl"]) == 1
    merges = [["▁gir", "l"] if pair == ["▁", "girl"] else pair for pair in merges]
    at = [a + b for a, b in merges].index(to) + 1 if to else len(merges)
    return with_model(merges=[*merges[:at], *([["▁", "girl"]] if to else []), *merges[at:]])(
        content
    )


REFUSED = [
    (with_model(ignore_merges=True), "its BPE has ignore_merges = True"),
    (with_model(dropout=0.1), "its BPE has dropout = 0.1"),
    (with_model(type="Unigram"), "its model is 'Unigram'"),
    (lambda c: c | {"normalizer": None}, "another normalizer or pre_tokenizer: [null, null]"),
    (lambda c: metaspace(c, "never"), '"prepend_scheme": "never"'),
    (lambda c: metaspace(c) | {"normalizer": {"type": "NFKC"}}, '[{"type": "NFKC"}, {"type": "Me'),
    (lambda c: c | {"added_tokens": [{"id": 1, "content": "x", "special": False}]}, "special one"),
    (without(SPACE), "it has no piece '▁'"),
    (without("<0x7F>"), "it has no piece '<0x7F>'"),
    (with_vocab(lambda vocab: vocab | {"d": 0}), "its pieces do not stand after those for bytes"),
    (with_vocab(lambda vocab: vocab | {"d": N - 2}), f"its ids are not 0 to {N - 1}, each once"),
    (with_vocab(lambda vocab: vocab | {"a" * 300: N}), "not among the"),
    (renamed("d", "a" * 300), "it has a piece of more than 256 characters"),
    (with_vocab(lambda vocab: vocab | {"d": None}), "TypeError"),
    (renamed("▁Once", "▁On▁ce"), "its piece '▁On▁ce' has a space that is not at its beginning"),
    (renamed("▁Once", " Once"), "its piece ' Once' has a space that is not at its beginning"),
    (renamed("▁Once", "qwxyz"), "its merges and its pieces do not agree about "),
    (with_model(merges=splits()[3:]), "its merges and its pieces do not agree about "),
    (with_model(merges=[*splits(), ["z", "q"]]), "do not agree about 'zq'"),
    (with_model(merges=[*splits(), ["q" * 10**6, "q"]]), "a piece of more than 256 characters"),
    (with_model(merges=[["a", "b", "c"]]), "too many values"),
    (with_model(merges=None), "TypeError"),
    (lambda c: moved(c, to="▁man"), "not those that follow from the order of its pieces"),
    (lambda c: moved(c, to=""), "not those that follow from the order of its pieces"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_other_tokenizers_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(InputError) as caught:
        from_json(tmp_path, change(to_json()))
    said = str(caught.value)
    assert "tokenizer.json: expected a" in said and message in said
    assert "\n" not in said and len(said) < 400


def test_a_special_token_that_is_named_must_be_there(tmp_path):
    with pytest.raises(InputError, match="it has no piece '<end>': name a folder"):
        from_json(tmp_path, to_json(), tokenizer_config={"eos_token": "<end>"})


def entry(text, score=0.0):
    return struct.pack("<fi", score, len(text)) + text


def instead_of_d(text, score=0.0):
    return to_bin().replace(entry(b"d", SCORES["d"]), entry(text, score))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", f"it has 0 pieces for {N} rows of the embedding"),
        (to_bin() + entry(b"q"), f"it has {N + 1} pieces for {N} rows"),
        (to_bin()[:-1], "stands at byte"),
        (to_bin()[:-9], "requires a buffer"),
        (to_bin() + entry(b""), "a piece of 0 bytes"),
        (to_bin() + struct.pack("<fi", 0.0, -8), "a piece of -8 bytes"),
        (instead_of_d(b"\xff"), "can't decode byte 0xff"),
        (instead_of_d(b"a"), "each once"),
        (instead_of_d(b"a b", -1e6), "a space that is not at its beginning"),
        (instead_of_d(b"xyz", -1e6), "do not agree about 'xyz'"),
        (instead_of_d(b"On", -4.0), "have scores without an order"),
        (instead_of_d(b"On", float("nan")), "have scores without an order"),
        (to_bin().replace(b"<0x41>", b"<0x42>"), "its pieces 3 to 258 are not the bytes"),
    ],
)
def test_other_bins_are_refused_by_name(tmp_path, data, message):
    with pytest.raises(InputError) as caught:
        from_bin(tmp_path, data)
    said = str(caught.value)
    assert "tokenizer.bin: expected a tokenizer.bin of llama2.c; " in said and message in said
    assert "\n" not in said and len(said) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roles": ["</s>", "<s>", None]}, "not enough values"),
        ({"roles": ["</s>", "<s>", None, "<pad>"]}, "KeyError('<pad>')"),
        ({"rank_of": [0, 1, 2]}, "a byte has no id, or an id has no token"),
        ({"rank_of": [*range(N), 10**6]}, "a byte has no id, or an id has no token"),
        ({"rank_of": [*range(N), 1.0]}, "an id is no whole number in its range"),
        ({"rank_of": 5}, "TypeError"),
    ],
)
def test_a_damaged_tiktoken_json_is_refused(ours, tmp_path, change, message):
    save_tokenizer(ours, tmp_path)
    path = tmp_path / "tiktoken.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="expected a tokenizer of minirlhf; ") as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value)
