"""The user's own files: split into prompt and response, split into train and held-out, refused."""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.errors import InputError
from minirlhf.worlds.files import _split_prompts, corpus_world, split_pairs, split_world
from minirlhf.worlds.rewards import (
    UserReward,
    distinct_words,
    load_reward,
    name_of,
    short_words,
    vowel_share,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
VOWELS = "minirlhf.worlds.rewards:vowel_share"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_jsonl(path, *entries):
    return write(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def world_of(path, **options):
    options = {"reward": VOWELS, "rng": np.random.default_rng(0)} | options
    return split_world(corpus_world(path, **options), rng=options["rng"], key=str)


def world_of_text(tmp_path, text, **options):
    return world_of(write(tmp_path / "corpus.txt", text), **options)


# --- plain text


@pytest.mark.parametrize(
    ("text", "unit", "joiner", "demonstration"),
    [
        ("a:\nb c\nd\n\na:\ne f", "document", "\n", ("a:", "b c\nd")),
        ("a:\r\nb c\r\n\r\na:\r\ne f\r\n", "document", "\n", ("a:", "b c")),
        ("\ufeffa:\n b\n\n\n \na:\nc \n", "document", "\n", ("a:", "b")),
        ("the cat sat\nthe dog", "line", " ", ("the", "cat sat")),
        ("the  cat\tsat\n\nthe dog", "line", " ", ("the", "cat\tsat")),
        ("one two\n\none three", "document", " ", ("one", "two")),
        ("emma\neva", "line", "", ("e", "mma")),
        ("émma\néva", "line", "", ("é", "mma")),
    ],
)
def test_examples_by_hand(tmp_path, text, unit, joiner, demonstration):
    world = world_of_text(tmp_path, text, unit=unit)
    assert world.joiner == joiner
    assert world.demonstrations[0] == demonstration


def test_auto_is_document_from_two_blank_lines_and_one_in_a_hundred_lines(tmp_path):
    def text(n_lines, n_gaps):
        lines = [f"a{i}: b" for i in range(n_lines)]
        return "\n\n".join(["\n".join(lines[i :: n_gaps + 1]) for i in range(n_gaps + 1)])

    assert world_of_text(tmp_path, text(200, 2)).joiner == "\n"
    assert world_of_text(tmp_path, text(201, 2)).joiner == " "
    assert world_of_text(tmp_path, text(10, 1)).joiner == " "
    assert world_of_text(tmp_path, text(100, 0)).joiner == " "
    assert world_of_text(tmp_path, text(200, 2), unit="line").joiner == " "


def test_what_is_dropped_is_counted(tmp_path):
    world = world_of_text(tmp_path, "a b\na b\na c\nalone\nd e", unit="line")
    read, dropped = world.notes
    assert read.endswith("read 4 examples, skipped 1 without a response (line 4)")
    assert dropped == "dropped 1 of 4 examples that are there already"
    (read,) = world_of_text(tmp_path, "a b\nc d", unit="line").notes
    assert read == f"{tmp_path / 'corpus.txt'}: read 2 examples"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"a\nb", r"expected examples; got none to use, but 2 without a response \(line 1, 2\)"),
    ],
)
def test_an_unusable_corpus_is_one_sentence(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        world_of(write(tmp_path / "corpus.txt", content))
    assert "corpus.txt: " in str(caught.value) and "\n" not in str(caught.value)


def test_one_example_is_no_plural(tmp_path):
    assert world_of_text(tmp_path, "a b", unit="line").notes[0].endswith(": read 1 example")


def test_a_missing_corpus_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="found none"):
        world_of(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="got a folder"):
        world_of(tmp_path)


def test_choices_that_do_not_fit_are_refused(tmp_path):
    corpus = write(tmp_path / "c.txt", "a b\nc d")
    pairs = write_jsonl(tmp_path / "p.jsonl", {"prompt": "p", "chosen": "c", "rejected": "r"})
    with pytest.raises(InputError, match="got neither"):
        world_of(corpus, reward=None)
    assert world_of(corpus, reward=None, judged=False).reward is None  # for fine-tuning alone
    for judged in (True, False):
        with pytest.raises(InputError, match="got both"):
            world_of(corpus, pairs_path=pairs, judged=judged)


# --- train and held-out prompts


@given(
    st.dictionaries(st.text(min_size=1), st.integers(1, 50), min_size=2), st.integers(0, 2**32 - 1)
)
def test_prompts_are_split_into_two_disjoint_parts(weights, seed):
    train, heldout = _split_prompts(weights, np.random.default_rng(seed), set())
    assert train and heldout
    assert sorted(train + heldout) == sorted(weights)
    assert len(heldout) <= max(1, round(0.15 * len(weights)))
    share = sum(weights[prompt] for prompt in heldout) / sum(weights.values())
    smallest = min(weights.values()) / sum(weights.values())
    assert share <= max(0.2, smallest)
    assert (train, heldout) == _split_prompts(weights, np.random.default_rng(seed), set())


def test_about_15_percent_of_many_prompts_are_held_out():
    train, heldout = _split_prompts(
        {str(i): 1 for i in range(200)}, np.random.default_rng(0), set()
    )
    assert (len(train), len(heldout)) == (170, 30)
    other = _split_prompts({str(i): 1 for i in range(200)}, np.random.default_rng(1), set())[1]
    assert heldout != other


def test_a_single_prompt_is_in_both_lists(tmp_path):
    assert _split_prompts({"a": 3}, np.random.default_rng(0), set()) == (["a"], ["a"])
    corpus = write(tmp_path / "c.txt", "one two\none three\n")
    assert [n for n in world_of(corpus).notes if "one prompt in all" in n]
    corpus = write(tmp_path / "c.txt", "one two\ntwo three\n")
    assert not [n for n in world_of(corpus).notes if "one prompt in all" in n]


def test_prompts_that_look_alike_are_on_the_same_side(tmp_path):
    lines = "\n".join(f"{'abcdefghij'[i % 10]}{i} text {i}" for i in range(40))
    corpus = corpus_world(
        write(tmp_path / "c.txt", lines), reward=VOWELS, rng=np.random.default_rng(0)
    )
    assert len(corpus.train_prompts) == 40 and corpus.heldout_prompts == []
    for seed in range(5):
        world = split_world(corpus, rng=np.random.default_rng(seed), key=lambda prompt: prompt[0])
        train, heldout = ({p[0] for p in ps} for ps in (world.train_prompts, world.heldout_prompts))
        assert train and heldout and not train & heldout
        assert len(world.demonstrations) + len(world.heldout_demonstrations) == 40
    world = split_world(corpus, rng=np.random.default_rng(0), key=lambda prompt: "all")
    assert world.train_prompts == world.heldout_prompts == corpus.train_prompts
    assert "trained on and evaluated on" in world.notes[-1]


@given(
    st.dictionaries(st.text(min_size=1), st.integers(1, 50), min_size=1),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_a_prompt_of_the_pairs_is_always_trained_on(weights, seed, data):
    judged = data.draw(st.sets(st.sampled_from(sorted(weights)), min_size=1, max_size=3))
    train, heldout = _split_prompts(weights, np.random.default_rng(seed), judged)
    assert judged & set(train) and heldout
    assert set(train) | set(heldout) == set(weights)
    assert len(weights) == 1 or not set(train) & set(heldout)
    plain = _split_prompts(weights, np.random.default_rng(seed), set())
    if judged & set(plain[0]):
        assert (train, heldout) == plain  # nothing else changes


def test_pairs_of_one_prompt_beside_a_corpus_are_trained_on(tmp_path):
    corpus = write(tmp_path / "c.txt", "\n".join(f"p{i} text {i}" for i in range(12)))
    pairs = write_jsonl(tmp_path / "p.jsonl", {"prompt": "p3", "chosen": "a", "rejected": "b"})
    for seed in range(20):
        world = world_of(corpus, pairs_path=pairs, reward=None, rng=np.random.default_rng(seed))
        assert "p3" in world.train_prompts and world.heldout_prompts


def test_demonstrations_of_heldout_prompts_are_kept_apart(tmp_path):
    corpus = write(tmp_path / "c.txt", "\n".join(f"p{i % 7} text {i}" for i in range(30)))
    world = world_of(corpus)
    assert {p for p, _ in world.heldout_demonstrations} == set(world.heldout_prompts)
    assert {p for p, _ in world.demonstrations} == set(world.train_prompts)
    assert len(world.demonstrations) + len(world.heldout_demonstrations) == 30


def test_a_reward_in_a_file_is_named_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_of("mine.py:f") == f"{tmp_path / 'mine.py'}:f"
    assert name_of("package.module:f") == "package.module:f"
    assert name_of("") == ""


# --- pairs


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)


@given(st.lists(st.tuples(texts, texts, texts).filter(lambda p: p[1].strip() != p[2].strip())))
def test_any_pairs_come_back(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    pairs = [tuple(text.strip() for text in pair) for pair in [*pairs, ("p", "c", "r")]]
    write_jsonl(path, *({"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs))
    both = {(p, r, c) for p, c, r in pairs}
    found = corpus_world(None, pairs_path=path, rng=np.random.default_rng(0)).pairs
    assert found == [pair for pair in pairs if pair not in both]


def pairs_file(tmp_path, n=40):
    entries = [
        {"prompt": f"p{i % (n // 2)}", "chosen": f"good {i}", "rejected": "bad"} for i in range(n)
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", *entries)


def test_pairs_alone_make_a_world(tmp_path):
    world = world_of(None, pairs_path=pairs_file(tmp_path), reward=None)
    assert (len(world.train_prompts), len(world.heldout_prompts)) == (17, 3)
    assert world.reward is None and world.joiner == " " and len(world.pairs) == 40
    chosen = {(prompt, chosen) for prompt, chosen, _ in world.pairs}
    assert len(world.demonstrations) == 34 and set(world.demonstrations) <= chosen
    train, heldout = split_pairs(world.pairs, train_prompts=world.train_prompts)
    assert (len(train), len(heldout)) == (34, 6)
    assert {prompt for prompt, _, _ in heldout} == set(world.heldout_prompts)


def test_pairs_beside_a_corpus_share_its_split(tmp_path):
    corpus = write(tmp_path / "c.txt", "\n".join(f"p{i} text {i}" for i in range(20)))
    world = world_of(corpus, pairs_path=pairs_file(tmp_path, n=60), reward=None)
    assert set(world.train_prompts) | set(world.heldout_prompts) == {f"p{i}" for i in range(30)}
    assert all(response.startswith("text") for _, response in world.demonstrations)
    train, heldout = split_pairs(world.pairs, train_prompts=world.train_prompts)
    assert train and heldout and len(train) + len(heldout) == 60


# --- the reward function


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_text(reward, text):
    """The reward of one reply, all of whose text is the response."""
    (value,) = reward([""], [text], [text])
    return value


def test_a_reward_from_the_current_directory_and_from_a_file(here):
    write(here / "my_reward_helper.py", "WEIGHT = 2")
    code = "from my_reward_helper import WEIGHT\ndef count(text): return WEIGHT * len(text)"
    write(here / "my_reward_one.py", code)
    assert of_text(load_reward("my_reward_one:count"), "abc") == 6.0
    (here / "sub").mkdir()
    write(here / "sub/my_reward_two.py", "def one(text): return 1")
    assert of_text(load_reward("sub/my_reward_two.py:one"), "abc") == 1.0
    assert of_text(load_reward(f"{here / 'sub/my_reward_two.py'}:one"), "abc") == 1.0


def test_a_reward_by_its_module():
    reward = load_reward(VOWELS)
    assert of_text(reward, "ab") == 0.5 and type(of_text(reward, "ab")) is float


def test_a_world_takes_a_function_too_and_checks_it(tmp_path):
    corpus = write(tmp_path / "c.txt", "a b\nc d")
    assert of_text(world_of(corpus, reward=len).reward, "abc") == 3.0
    with pytest.raises(InputError, match="finite"):
        of_text(world_of(corpus, reward=lambda text: None).reward, "abc")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("vowels", "expected file.py:function, module:function, length, .*; got 'vowels'"),
        ("module:", "expected file.py:function"),
        (":f", "expected file.py:function"),
        ("no_such_module_here:f", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("nowhere.py:f", "expected a Python file nowhere.py; found none"),
        ("minirlhf.worlds.rewards:nothing", "expected a function nothing in .*; found none"),
        ("math:pi", "expected a function pi in math; got 3.14"),
        ("broken_syntax.py:f", "SyntaxError"),
        ("raises_at_import:f", "RuntimeError in line 1 of .*/raises_at_import.py: boom"),
        ("leaves_at_import.py:f", "it raised SystemExit"),
    ],
)
def test_a_reward_that_cannot_be_had_is_one_sentence(here, where, message):
    write(here / "broken_syntax.py", "def f(:")
    write(here / "raises_at_import.py", "raise RuntimeError('boom')")
    write(here / "leaves_at_import.py", "raise SystemExit(3)")
    with pytest.raises(InputError, match=f"reward: .*{message}") as caught:
        load_reward(where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [None, "1.0", math.nan, math.inf, -np.float32(np.inf), [1.0], np.zeros(1), 1j, 10**400]
    + [np.complex64(1), np.str_("1"), np.array(np.nan)],
)
def test_a_reward_that_is_no_finite_number_is_refused(value):
    expected = r"finite number of at most 1e\+300 for the text 'some text'; got"
    with pytest.raises(InputError, match=expected) as caught:
        of_text(UserReward(lambda text: value), "some text")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), np.array(2.0)])
def test_every_kind_of_number_is_a_reward(value):
    reward = of_text(UserReward(lambda text: value), "")
    assert reward == 2.0 and type(reward) is float


def test_a_reward_that_raises_quotes_the_text_shortened():
    with pytest.raises(InputError, match=r"'x{57}\.\.\.'; it raised ZeroDivisionError"):
        of_text(UserReward(lambda text: 1 / 0), "x" * 500)


PAIR = ["p", "q"], ["ab", "abc"], ["p ab", "q abc"]


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (lambda text: len(text), [4, 5]),
        (lambda prompt, response: 10 * len(prompt) + len(response), [12, 13]),
        (lambda texts: [len(text) for text in texts], [4, 5]),
        (lambda prompts, responses: np.array([len(r) for r in responses]), [2, 3]),
        (lambda prompts, completions: [float(len(c)) for c in completions], [2, 3]),
        (lambda text, weight=2: weight * len(text), [8, 10]),
        (len, [4, 5]),
        (UserReward, None),
    ],
)
def test_the_names_of_the_parameters_say_what_a_reward_wants(function, values):
    if values is None:  # a class: what it makes is no number
        with pytest.raises(InputError, match="expected a finite number"):
            UserReward(function)(*PAIR)
    else:
        assert UserReward(function)(*PAIR) == values


@pytest.mark.parametrize("answer", [[1.0], [1.0, 2.0, 3.0], 1.0, None, "ab", {1, 2}])
def test_a_batch_of_rewards_has_one_a_reply(answer):
    with pytest.raises(InputError, match="expected a list of 2 numbers, one a reply; got"):
        UserReward(lambda texts: answer)(*PAIR)


def test_a_reward_of_three_things_is_refused():
    with pytest.raises(InputError, match="got the parameters a, b, c"):
        UserReward(lambda a, b, c: 0.0)


def test_a_reward_that_leaves_the_program_is_one_sentence():
    with pytest.raises(InputError, match="it raised SystemExit"):
        of_text(UserReward(lambda text: sys.exit(3)), "x")


def test_the_name_of_a_function_is_one_that_finds_it_again():
    assert name_of(vowel_share) == VOWELS and load_reward(VOWELS).function is vowel_share
    assert name_of(lambda text: 0.0).startswith("python:")
    assert name_of(VOWELS) == VOWELS and name_of("") == ""
    with pytest.raises(InputError, match="expected the function f again"):
        load_reward("python:f")


def test_shipped_rewards_by_hand():
    assert vowel_share("Emma") == 2 / 4
    assert short_words("To be, or naught else") == 4 / 5
    assert distinct_words("the cat, The dog") == 3 / 4


@given(st.text())
def test_shipped_rewards_are_between_0_and_1(text):
    for reward in (vowel_share, short_words, distinct_words):
        assert 0 <= of_text(UserReward(reward), text) <= 1


# --- text that nobody here wrote


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return world_of(path)


def test_names():
    world = real("names.txt")
    assert world.joiner == "" and len(world.train_prompts) + len(world.heldout_prompts) == 26
    assert set(world.train_prompts).isdisjoint(world.heldout_prompts)
    assert 0.8 * 29_494 <= len(world.demonstrations) < 29_494  # distinct names
    assert ("e", "mma") in world.demonstrations or "e" in world.heldout_prompts
    assert all(len(prompt) == 1 for prompt in world.train_prompts)


def test_shakespeare():
    world = real("tinyshakespeare.txt")
    assert world.joiner == "\n"
    prompts = world.train_prompts + world.heldout_prompts
    speakers = sum(prompt.endswith(":") for prompt in prompts)
    assert speakers > 0.9 * len(prompts)
    assert 0.8 <= len(world.demonstrations) / 7_083 <= 0.99
    assert max(len(response) for _, response in world.demonstrations) > 1_000  # whole
    most = Counter(prompt for prompt, _ in world.demonstrations).most_common(1)[0]
    assert most[1] > 100
