"""transformers and tokenizers give the ids of our SentencePiece tables, and read what we write."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pieces import LETTERS, SPACE, SPECIALS, VOCAB, metaspace, splits, to_json

os.environ["HF_HUB_OFFLINE"] = "1"
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from minirlhf.runs.hugging_face import companions, read_tokenizer
from minirlhf.runs.sentencepiece import read_bin

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # the peers' own
]

# a folder with the tokenizer.json, or the tokenizer.bin, of a real Llama
FOLDER = os.environ.get("MINIRLHF_LLAMA")
ascii_texts = st.text(st.characters(max_codepoint=127)) | st.text("  etaoins.\n\t", max_size=60)
texts = st.text() | st.text(LETTERS, max_size=40)


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """(our tokenizer, tokenizers with the merges of transformers, AutoTokenizer of our files)."""
    folder = Path(FOLDER) if FOLDER else tmp_path_factory.mktemp("given")
    out = tmp_path_factory.mktemp("out")
    if not FOLDER:
        (folder / "tokenizer.json").write_text(json.dumps(to_json()))
    if (folder / "tokenizer.json").exists():
        content = json.loads((folder / "tokenizer.json").read_text())
        ours, _ = read_tokenizer(folder, n_rows=10**6)
    else:
        data = (folder / "tokenizer.bin").read_bytes()
        ours = read_bin(folder / "tokenizer.bin", n_rows=entries(data))
        content = json.loads(companions(ours, {}, {})["tokenizer.json"])
    for name, data in companions(ours, {"padding_side": "left"}, {}).items():
        (out / name).write_bytes(data)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    return ours, theirs, transformers.AutoTokenizer.from_pretrained(out)


def entries(data):
    n, at = 0, 4
    while at < len(data):
        n, at = n + 1, at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    return n


def usual(text):
    """Texts of which transformers makes no special token and no space that is none."""
    return not any(name in text for name in (*SPECIALS, SPACE))


@settings(max_examples=1000)
@given(ascii_texts)
def test_the_same_ids_on_a_thousand_ascii_strings(trio, text):
    same_ids(trio, text)


@given(texts)
def test_the_same_ids_beyond_ascii(trio, text):
    same_ids(trio, text)


def same_ids(trio, text):
    ours, theirs, auto = trio
    text = text or "x"
    if usual(text):
        ids = ours.prompt_ids(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids[1:]
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids, skip_special_tokens=True) == ours.decode(ids) == text


def test_special_tokens_are_ours(trio):
    ours, _, auto = trio
    assert (auto.bos_token_id, auto.eos_token_id) == (ours.bos, ours.eos)
    assert auto.pad_token_id == ours.pad and auto.sep_token_id is None and ours.sep is None
    once = ours.prompt_ids("Once") + ours.response_ids(" there")
    assert auto("Once there</s>")["input_ids"] == once


@pytest.fixture(scope="module")
def of_transformers_5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    merges = [tuple(pair) for pair in splits()]
    theirs = transformers.LlamaTokenizer(vocab=dict(VOCAB), merges=merges)
    theirs.save_pretrained(folder)
    return read_tokenizer(folder, n_rows=len(VOCAB))[0], theirs


@given(texts)
def test_a_folder_of_transformers_5_gives_its_ids(of_transformers_5, text):
    ours, theirs = of_transformers_5
    if text and usual(text):
        text = text.lstrip(" ") or "x"  # of several spaces at the beginning it drops one
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.prompt_ids(text)[1:]


def test_what_transformers_saves_again_is_read(trio, tmp_path):
    ours, _, auto = trio
    auto.save_pretrained(tmp_path)
    got, _ = read_tokenizer(tmp_path, n_rows=ours.vocab_size)
    assert got.encoding._mergeable_ranks == ours.encoding._mergeable_ranks
    assert got.rank_of == ours.rank_of and got.specials == ours.specials
    assert (got.bos, got.sep, got.eos, got.pad) == (ours.bos, None, ours.eos, ours.pad)


def test_our_forms_are_those_of_transformers():
    """What the tests write as Metaspace is what LlamaTokenizer has."""
    theirs = transformers.LlamaTokenizer(vocab=dict(VOCAB), merges=[tuple(p) for p in splits()])
    content = json.loads(theirs.backend_tokenizer.to_str())
    assert content["pre_tokenizer"] == metaspace({})["pre_tokenizer"]
    assert content["normalizer"] is None
    again = json.loads(tokenizers.Tokenizer.from_str(json.dumps(to_json())).to_str())
    assert again["normalizer"] == to_json()["normalizer"]
    assert again["decoder"] == to_json()["decoder"]
