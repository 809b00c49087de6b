"""A GPT-2 of others gets in; the tokenizer beside a model is the one that made its ids."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import (
    CHATS,
    VOWELS,
    differences,
    interrupted_after,
    outcome,
    resume,
    tiny_config,
    train,
)

from minirlhf.disk import read_object
from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.runs import pipeline
from minirlhf.runs.checkpoint import load_model, save_model
from minirlhf.runs.config import TrainConfig, rate_notes
from minirlhf.runs.hugging_face import (
    GPT2_PATTERN,
    companions,
    merges_of,
    read_model,
    read_tokenizer,
)
from minirlhf.runs.session import open_session, reopen_session
from minirlhf.tree import tree_items
from minirlhf.worlds.examples import as_example
from minirlhf.worlds.tokens import BOS, EOS, PAD, PATTERN, SEP, make_tokenizer, train_tokenizer

CORPUS = ["kalo mitru brisen", "senbri novaka ' tru", "Où est ma bouilloire ? 日本語"] * 3
OURS = train_tokenizer(CORPUS, vocab_size=320)
RANKS = OURS.encoding._mergeable_ranks
CONFIG = GPTConfig(vocab_size=len(RANKS) + 7, n_ctx=64, n_layer=2, n_head=2, d_model=8, ln_eps=1e-4)

texts = st.text() | st.text("kalo mitrubsenOù日本語 ?'\n\t", max_size=40)


def tokenizer_json(tokenizer=OURS):
    return json.loads(companions(tokenizer, {}, {})["tokenizer.json"])


def gpt2_json(eos=EOS):
    """tokenizer.json as transformers writes it for a GPT-2, with the ranks of OURS."""
    content = tokenizer_json()
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    names = {name: i for name, i in content["model"]["vocab"].items() if i < len(RANKS)}
    model = content["model"] | {"vocab": names | {eos: len(RANKS)}, "ignore_merges": False}
    added = [content["added_tokens"][0] | {"content": eos, "id": len(RANKS)}]
    return content | {"pre_tokenizer": pre, "model": model, "added_tokens": added}


def write_gpt2(folder, tokenizer=None, config=CONFIG, seed=0):
    """A GPT-2 of somebody else, with a stop token and six rows that nobody uses."""
    folder.mkdir(exist_ok=True)
    save_model(folder, init_transformer(config, rng=np.random.default_rng(seed)), config)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or gpt2_json()))
    return folder


# --- merges and ranks


def encode_by_merges(piece, merges):
    """As transformers: join the neighbours that stand first in the list, until none is left."""
    order = {pair: i for i, pair in enumerate(merges)}
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while pairs := [(order[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in order]:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_every_token_has_its_merge():
    merges = list(merges_of(RANKS))
    assert [a + b for a, b in merges] == list(RANKS)[256:]
    assert all(RANKS[a] < RANKS[a + b] and RANKS[b] < RANKS[a + b] for a, b in merges)


def test_merges_by_hand():
    base = {bytes([i]): i for i in range(256)}
    ranks = base | {b"bc": 300, b"ab": 301, b"abc": 302, b"xyz": 303, b"abcabc": 304}
    # abc: bc has the lower rank, so a + bc; xyz: no rank joins any two of its bytes
    expected = [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"abc", b"abc")]
    assert list(merges_of(ranks)) == expected


@given(st.text("kalomitrubsen ù日", min_size=1, max_size=20))
def test_merges_give_the_ids_of_the_ranks(text):
    merges = list(merges_of(RANKS))
    piece = text.encode()
    joined = [RANKS[part] for part in encode_by_merges(piece, merges)]
    assert joined == OURS.encoding._encode_single_piece(piece)


# --- tokenizers in


def test_our_own_tokenizer_comes_back(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    got, source = read_tokenizer(tmp_path, n_rows=OURS.vocab_size)
    assert source == "tokenizer.json"
    assert got.encoding._pat_str == PATTERN
    assert got.encoding._mergeable_ranks == RANKS
    assert got.encoding._special_tokens == OURS.encoding._special_tokens


@given(texts)
def test_a_gpt2_tokenizer_is_tiktoken_with_its_pattern(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "tokenizer.json").write_text(json.dumps(gpt2_json()))
    got, _ = read_tokenizer(folder, n_rows=CONFIG.vocab_size)
    assert (got.eos, got.bos) == (len(RANKS), CONFIG.vocab_size)
    assert (got.sep, got.pad) == (got.bos + 1, got.bos + 2)
    assert got.encoding._pat_str == GPT2_PATTERN and got.encoding._mergeable_ranks == RANKS
    assert got.decode(got.encode(text)) == text


def test_both_forms_of_files_and_of_merges_say_the_same(tmp_path):
    content = gpt2_json()
    pairs = [merge.split(" ") for merge in content["model"]["merges"]]
    as_pairs = content | {"model": content["model"] | {"merges": pairs}}
    del as_pairs["model"]["type"]  # as in files of 2020
    for name, tokenizer in (("strings", content), ("pairs", as_pairs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    two = tmp_path / "two"
    two.mkdir()
    (two / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (two / "merges.txt").write_text("\n".join(["#version: 0.2", *content["model"]["merges"], ""]))
    got = [
        read_tokenizer(tmp_path / n, n_rows=CONFIG.vocab_size) for n in ("strings", "pairs", "two")
    ]
    assert [source for _, source in got] == ["tokenizer.json", "tokenizer.json", "vocab.json"]
    (first, _), *others = got
    for other, _ in others:
        assert other.encoding._mergeable_ranks == first.encoding._mergeable_ranks
        assert other.encoding._special_tokens == first.encoding._special_tokens


@pytest.mark.parametrize("form", [lambda name: name, lambda name: {"content": name}])
def test_the_stop_token_of_the_model_is_ours(tmp_path, form):
    (tmp_path / "tokenizer.json").write_text(json.dumps(gpt2_json(eos="</s>")))
    got, _ = read_tokenizer(tmp_path, n_rows=CONFIG.vocab_size)
    assert got.eos == CONFIG.vocab_size  # nothing says which: a new one
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": form("</s>")}))
    got, _ = read_tokenizer(tmp_path, n_rows=CONFIG.vocab_size)
    assert got.eos == len(RANKS) and got.bos == CONFIG.vocab_size
    assert set(got.encoding._special_tokens) == {EOS, BOS, SEP, PAD}


def with_model(**changes):
    return lambda content: content | {"model": content["model"] | changes}


def with_pre(**changes):
    return lambda content: content | {"pre_tokenizer": content["pre_tokenizer"] | changes}


def with_vocab(change):
    return lambda content: with_model(vocab=change(dict(content["model"]["vocab"])))(content)


def swapped(content):
    *rest, last, one_more = content["model"]["merges"]
    return with_model(merges=[*rest, one_more, last])(content)


def without(name):
    return lambda vocab: {token: i for token, i in vocab.items() if token != name}


SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
REFUSED = [
    (with_model(type="WordPiece"), "its model is 'WordPiece'"),
    (with_model(type="Unigram", vocab=[["a", 0.0]]), "its model is 'Unigram'"),
    (with_model(dropout=0.1), "its BPE has dropout = 0.1"),
    (with_model(continuing_subword_prefix="##"), "continuing_subword_prefix = '##'"),
    (with_model(byte_fallback=True), "byte_fallback = True"),
    (lambda content: content | {"normalizer": {"type": "NFC"}}, "a normalizer, 'NFC'"),
    (lambda content: content | {"pre_tokenizer": None}, "its pre_tokenizer is null"),
    (with_pre(type="Whitespace"), 'its pre_tokenizer is {"type": "Whitespace"'),
    (with_pre(add_prefix_space=True), '"add_prefix_space": true'),
    (with_pre(use_regex=False), '"use_regex": false'),
    (
        lambda content: (
            content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}}
        ),
        r'"Split", "pattern": {"Regex": ',
    ),
    (
        lambda content: (
            content | {"added_tokens": [{"id": 5, "content": "<tool>", "special": False}]}
        ),
        "an added token that is no special one, '<tool>'",
    ),
    (with_vocab(without("Ā")), "the tokens are not the 256 bytes"),
    (
        with_vocab(lambda vocab: vocab | {"日": 5}),
        "its token '日' has '日', which stands for no byte",
    ),
    (with_vocab(lambda vocab: vocab | {"a": 98}), "two tokens share an id"),
    (with_vocab(lambda vocab: vocab | {"a": 10**6}), "not among the"),
    (with_vocab(lambda vocab: vocab | {"a": "b"}), "TypeError"),
    (with_vocab(lambda vocab: vocab | {"a": 1.5}), "an id is no whole number"),
    (with_vocab(lambda vocab: vocab | {"a": -1}), "an id is no whole number"),
    (swapped, "its merges are not those that follow from the order of its ids"),
    (with_model(merges=["a b c"]), "too many values"),
    (with_model(merges=[[1, 2]]), "TypeError"),
    (with_model(merges=None), "TypeError"),
    (with_model(vocab=[]), "AttributeError"),
    (with_model(vocab={}, merges=[]), "not the 256 bytes"),
    (with_model(ignore_merges=True, merges=[]), "no merge makes its token"),
    (lambda content: {"model": None}, "AttributeError"),
    (lambda content: {"version": "1.0"}, "KeyError('model')"),
    (lambda content: with_model(vocab={"a" * 300: 1}, merges=["a", "a" * 299])(content), "values"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_other_tokenizers_are_refused_by_name(tmp_path, change, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(change(gpt2_json())))
    with pytest.raises(InputError) as caught:
        read_tokenizer(tmp_path, n_rows=CONFIG.vocab_size)
    said = str(caught.value)
    assert "tokenizer.json: expected a byte-level BPE as GPT-2's, or " in said and message in said
    assert "\n" not in said and len(said) < 400


def test_long_tokens_are_refused_before_they_take_time(tmp_path):
    content = gpt2_json()
    vocab = content["model"]["vocab"] | {"a" * 2**k: 10**5 + k for k in range(1, 20)}
    merges = content["model"]["merges"] + [f"{'a' * 2**k} {'a' * 2**k}" for k in range(19)]
    content["model"] |= {"vocab": vocab, "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="it has a token of more than 256 bytes"):
        read_tokenizer(tmp_path, n_rows=10**6)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    write_gpt2(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="expected tokenizer.json, or vocab.json and merges.txt"):
        read_model(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match="merges.txt: expected a file; found none"):
        read_model(tmp_path)


# --- models in


def test_new_tokens_get_the_mean_of_all_embeddings(tmp_path):
    start = read_model(write_gpt2(tmp_path))
    assert start.config == GPTConfig(**vars(CONFIG) | {"vocab_size": CONFIG.vocab_size + 3})
    stored = load_model(tmp_path)[0]
    wte = start.transformer["wte"]
    assert wte.shape == (CONFIG.vocab_size + 3, 8) and wte.dtype == np.float32
    assert np.array_equal(wte[:-3], stored["wte"])
    assert np.allclose(wte[-3:], stored["wte"].mean(axis=0), atol=1e-7)
    for path, array in tree_items(start.transformer):
        if path != "wte":
            assert np.array_equal(array, dict(tree_items(stored))[path]), path
    assert "2 blocks, 2 heads, 8 channels and 64 positions" in start.says
    assert f"{sum(a.size for _, a in tree_items(start.transformer)):,} parameters" in start.says
    assert f"{CONFIG.vocab_size + 3} tokens of its tokenizer.json, 3 of them new" in start.says


def test_rows_that_no_token_uses_are_left_out(tmp_path):
    """Our own tokenizer needs no new tokens: nothing is added to a table with rows to spare."""
    config = GPTConfig(**vars(CONFIG) | {"vocab_size": OURS.vocab_size + 5})
    start = read_model(write_gpt2(tmp_path, tokenizer_json(), config))
    assert len(start.transformer["wte"]) == start.config.vocab_size == OURS.vocab_size


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


def of_gpt2(out, names, gpt2, **changes):
    return tiny_config(out, corpus=names, reward=VOWELS, init=str(gpt2), **changes)


def test_learning_rates_of_tiny_models_are_noted_beside_init():
    def flags(**changes):
        notes = rate_notes(TrainConfig(init="gpt2", **changes))
        assert len(notes) <= 1
        return re.findall(r"(--[a-z.-]+-rate) (\S+)", notes[0]) if notes else []

    sft, ppo = ("--sft.optimizer.learning-rate", "5e-5"), ("--ppo.optimizer.learning-rate", "1e-5")
    readme = (Path(__file__).parents[2] / "minirlhf/runs/README.md").read_text()
    from_reference = {"reward_model": {"init": "reference"}}
    everything = flags(**from_reference)
    assert everything == [sft, ("--reward-model.optimizer.learning-rate", "5e-5"), ppo]
    assert all(" ".join(words) in readme for words in everything)  # as in its example
    assert flags() == [sft, ppo] == flags(reward="length", **from_reference)
    assert flags(sft={"optimizer": {"learning_rate": 1e-4}}) == [ppo]
    assert flags(sft={"optimizer": {"warmup": 3}}) == [sft, ppo]
    rates = {stage: {"optimizer": {"learning_rate": 1e-5}} for stage in ("sft", "ppo")}
    assert flags(**rates) == []


def test_a_run_from_a_gpt2_keeps_its_sizes_and_repeats_itself(tmp_path, names, gpt2, monkeypatch):
    said = []
    config = of_gpt2(tmp_path / "a", names, gpt2)
    train(config, say=said.append)
    assert f"note: --init: {read_model(gpt2).says}" in said
    assert not any("learning rates" in line for line in said)  # they are the test's own
    assert any(re.match("note: --model.*, --vocab-size change nothing beside", s) for s in said)
    _, gpt, _ = load_model(tmp_path / "a/policy")
    assert gpt == read_model(gpt2).config and gpt.n_ctx == 64  # the positions are kept
    monkeypatch.chdir(gpt2.parent)  # a path that is not absolute is found from anywhere
    interrupted = of_gpt2(tmp_path / "b", names, gpt2.name)
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, track=interrupted_after("supervised fine-tuning", 2))
    monkeypatch.chdir(tmp_path)
    resume(tmp_path / "b")
    assert not differences(outcome(tmp_path / "a"), outcome(tmp_path / "b"))


def test_a_finished_reference_needs_its_gpt2_no_more(tmp_path, names, gpt2):
    moved = shutil.copytree(gpt2, tmp_path / "moved")
    config = of_gpt2(tmp_path / "run", names, moved)
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after("PPO", 1))
    shutil.rmtree(moved)
    resume(config.out)
    policy, reference = pipeline.load_models(reopen_session(config.out, look=True))
    assert policy["transformer"].keys() == reference["transformer"].keys()


def test_another_gpt2_than_the_run_began_with_is_refused(tmp_path, names, gpt2):
    moved = shutil.copytree(gpt2, tmp_path / "moved")
    config = of_gpt2(tmp_path / "run", names, moved)
    with pytest.raises(KeyboardInterrupt):
        train(config, track=interrupted_after("supervised fine-tuning", 1))
    for other in ({"seed": 1}, {"config": GPTConfig(**vars(CONFIG) | {"n_ctx": 40})}):
        write_gpt2(moved, **other)
        with pytest.raises(InputError, match="expected the weights that were there when the run"):
            resume(config.out)
    write_gpt2(moved)
    resume(config.out)


def test_texts_longer_than_its_positions_are_refused(tmp_path, names, gpt2):
    config = of_gpt2(tmp_path / "run", names, gpt2, max_prompt_tokens=60)
    with pytest.raises(InputError, match="at least 70 positions, 60 for a prompt and 10 for a"):
        open_session(config)
    assert not (tmp_path / "run").exists()


def test_what_a_run_made_can_be_started_from(tmp_path, names, gpt2):
    train(of_gpt2(tmp_path / "first", names, gpt2))
    start = read_model(tmp_path / "first/policy")
    assert "of its tokenizer.json" in start.says and "new" not in start.says
    second = of_gpt2(tmp_path / "second", names, tmp_path / "first/policy", sft__steps=0)
    session = open_session(second)
    assert session.gpt == start.config
    reference = pipeline.reference_stage(session)
    assert np.array_equal(reference["transformer"]["wte"], start.transformer["wte"])
    entries = read_object(tmp_path / "second/reference/generation_config.json")
    assert entries["eos_token_id"] == session.tokenizer.eos == len(RANKS)
    assert entries["max_new_tokens"] == 10 and entries["top_k"] == 0


def test_counted_repetitions_are_written_for_the_other_dialect():
    """{1,3}+ is possessive for tiktoken; Oniguruma would repeat the repetition."""
    specials = {EOS: 300, BOS: 301, SEP: 302, PAD: 303}
    bytes_only = {bytes([i]): i for i in range(256)}
    known = make_tokenizer("known", r"\p{L}++|\p{N}{1,3}+|\s++$|.", bytes_only, specials)
    split = tokenizer_json(known)["pre_tokenizer"]["pretokenizers"][0]
    assert split["pattern"] == {"Regex": r"\p{L}++|\p{N}{1,3}|\s++$|."}


@pytest.mark.parametrize("messages", CHATS)
def test_the_chat_template_writes_what_training_writes(messages):
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = json.loads(companions(OURS, {}, {})["tokenizer_config.json"])["chat_template"]
    write = environment.from_string(template).render
    prompt, reply = as_example({"messages": messages})
    assert write(messages=messages[:-1]) == f"{BOS}{prompt}{SEP}"
    assert write(messages=messages) == f"{BOS}{prompt}{SEP}{reply}{EOS}"


def test_a_folder_that_is_not_there_is_told_how_to_make_it(tmp_path):
    with pytest.raises(InputError, match="found none: .*from_pretrained.'gpt2'.*AutoTokenizer"):
        open_session(tiny_config(tmp_path / "run", init="gpt2"))
