"""Files that a person brings: every kind and every column is read, or refused in one sentence."""

import csv
import gzip
import io
import json
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.errors import InputError
from minirlhf.worlds import readers
from minirlhf.worlds.files import corpus_world
from minirlhf.worlds.readers import name_and_kind


def read(path, **options):
    """The world of a corpus, all of it to train on."""
    options = {"reward": len, "rng": np.random.default_rng(0)} | options
    return corpus_world(path, **options)


def read_pairs(path, **options):
    return read(None, pairs_path=path, reward=None, **options)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def table(rows, delimiter=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


ROWS = [{"prompt": f"question {i}", "response": f'answer, "{i}"\nis good'} for i in range(40)]
EXAMPLES = [tuple(row.values()) for row in ROWS]

# --- kinds of files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.jsonl", jsonl(*ROWS)),
        ("c.JSONL", jsonl(*ROWS)),
        ("c.ndjson", jsonl(*ROWS)),
        ("c.json", jsonl(*ROWS)),
        ("c.json", json.dumps(ROWS)),
        ("c.json", json.dumps(ROWS, indent=2)),
        ("c.jsonl", "\n " + json.dumps(ROWS) + "\n\n"),
        ("c.json", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS)),  # as jq writes
        # an object that holds the list of rows
        *(
            ("c.json", json.dumps({name: ROWS}))
            for name in ("data", "rows", "examples", "train", "instances")
        ),
        ("c.json", json.dumps({"version": "v2, 1", "n": -4.5, "data": ROWS, "test": []}, indent=2)),
        ("c.json", json.dumps({"data": ROWS, "about": {"n": 40}}, indent=2).replace("\n", "\r\n")),
        ("c.csv", table(ROWS)),
        ("c.CSV", "\ufeff" + table(ROWS, ";")),
        ("c.tsv", table(ROWS, "\t")),
        ("c.csv", table(ROWS, "|")),
        ("c.csv", table(ROWS).replace(',"', ', "').replace("prompt,", "prompt, ")),
        ("c.csv", table(ROWS).replace("\n", "\r\n")),
        # under a name that says nothing, and not learnt as prose
        ("c.txt", jsonl(*ROWS)),
        ("c.txt", json.dumps(ROWS, indent=1)),
        ("c", table(ROWS)),
    ],
)
def test_every_kind_of_file_holds_the_same_examples(tmp_path, name, content):
    path = write(tmp_path / name, content)
    for file in (
        path,
        write(tmp_path / f"{name}.gz", gzip.compress(content.encode(), mtime=0)),
        write(tmp_path / f"wide {name}", content.removeprefix("\ufeff").encode("utf-16")),
    ):
        world = read(file)
        assert world.demonstrations == EXAMPLES, file
        assert world.notes == (f"{file}: read 40 examples",) and world.joiner == " "


def test_the_name_says_what_a_file_is():
    assert name_and_kind("a/plays.JSONL.gz") == ("plays", "json")
    assert name_and_kind("b.tar.csv") == ("b.tar", "csv")
    assert name_and_kind("c.GZ") == ("c", "text") and name_and_kind("d") == ("d", "text")
    assert name_and_kind("e.parquet") == ("e", "parquet")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    other = [{**row, "weights": [0.5] * 3} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(other), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet").demonstrations == EXAMPLES
    content = (tmp_path / "c.parquet").read_bytes()
    assert read(write(tmp_path / "c.txt", content)).demonstrations == EXAMPLES
    packed = write(tmp_path / "c.parquet.gz", gzip.compress(content, mtime=0))
    assert read(packed).demonstrations == EXAMPLES
    with pytest.raises(InputError, match="expected parquet; got .*: correct or restore it"):
        read(write(tmp_path / "c.parquet", content[: len(content) // 2]))


def test_parquet_without_pyarrow_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow, or save the file as .jsonl"):
        read(write(tmp_path / "c.parquet", b"PAR1"))


def test_an_array_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 7)
    for indent in (None, 1):
        path = write(tmp_path / "c.json", json.dumps(ROWS, indent=indent))
        assert read(path).demonstrations == EXAMPLES
        write(path, json.dumps({"n": 40, "data": ROWS, "n again": 40}, indent=indent))
        assert read(path).demonstrations == EXAMPLES
    text = json.dumps(ROWS, indent=1)
    line = text[: text.index("question 20")].count("\n") + 1
    write(path, text.replace('"question 20"', "question 20"))
    with pytest.raises(InputError, match=rf"c.json:{line - 1}: expected JSON objects up to the e"):
        read(path)
    for content in (json.dumps(ROWS)[:-1], json.dumps({"data": ROWS})[:-2]):
        with pytest.raises(
            InputError, match="expected JSON objects up to the end of one list; got the"
        ):
            read(write(path, content))
    for content in (json.dumps(ROWS) * 2, jsonl({"data": ROWS}) * 2):
        with pytest.raises(
            InputError, match="to the end of one list; got '.*: correct or restore it"
        ):
            read(write(path, content))
    for wrong in ([1], ["a"], [[1]], [None]):
        with pytest.raises(InputError, match="c.json:1: expected a JSON object"):
            read(write(path, json.dumps(wrong)))


def test_of_an_object_with_two_lists_one_is_read_and_the_other_named(tmp_path):
    path = write(tmp_path / "c.json", json.dumps({"train": ROWS, "test": ROWS[:3]}))
    world = read(path)
    assert world.demonstrations == EXAMPLES
    assert world.notes[0] == f"{path}: of its lists only one is read, not test"


def test_a_row_that_has_a_list_of_its_own_is_a_row(tmp_path):
    rows = [{**row, "data": [{"text": "not this"}]} for row in ROWS]
    assert read(write(tmp_path / "c.jsonl", jsonl(*rows))).demonstrations == EXAMPLES
    chats = jsonl({"data": [CHAT[1], assistant("a")]}, {"data": [CHAT[3], assistant("b")]})
    world = read(write(tmp_path / "c.jsonl", chats), columns=("messages=data",))
    assert world.demonstrations == [("hi", "a"), ("bye", "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", b"a b\nc \xff d", "expected UTF-8 text; got the byte 0xff in line 2"),
        ("c.txt", b"a b\n\0", "got the byte 0x00 in line 2"),
        ("c.txt", "a b\n".encode("utf-16-le"), "got the byte 0x00 in line 1"),
        ("c.jsonl", b'{"prompt": "\xed\xa0\x80"}', "got the byte 0xed in line 1"),
        ("c.json", b'[\n{"prompt": "\xe4"}]', "got the byte 0xe4 in line 2"),
        (
            "c.txt.gz",
            gzip.compress(b"a b\n" * 99, mtime=0)[:-9],
            "expected a whole file; got Compressed",
        ),
        (
            "c.jsonl.gz",
            gzip.compress(jsonl(*ROWS).encode(), mtime=0)[:-12],
            "expected a whole file; got Compressed",
        ),
        ("c.txt", b"\x1f\x8b and no more", "expected a (readable|whole) file"),
        ("c.txt", "a b\n".encode("utf-16") + b"\x00", "expected a whole file; got 'utf-16"),
        ("c.csv", 'prompt,response\n"a,b\n', "c.csv:2: expected CSV; got unexpected end"),
        ("c.csv", 'prompt,response\nx,"a"b\n', "c.csv:2: expected CSV"),
        ("c.csv", "title,body\na,b\n", "c.csv:1: expected .*; got title, body: name yours: --col"),
        ("c.jsonl", jsonl({"a": 1}), "c.jsonl:1: expected the columns prompt and response, or"),
        ("c.jsonl", jsonl({}), "got none: name yours: --columns prompt=NAME response=NAME"),
        (
            "c.txt",
            "prompt,chosen,rejected\na,b,c\n",
            "got prompt, chosen, .*: give the file as --p",
        ),
        ("c.json", json.dumps({"faq": ROWS}, indent=1), "or text; got faq: name yours: --columns"),
        (
            "c.csv",
            b"PK\3\4\x14\0 book.xlsx",
            "got a ZIP archive, as .xlsx and .docx are: unpack it",
        ),
        ("c.parquet", "no parquet at all", "expected parquet; got|pip install pyarrow"),
        ("c.jsonl", "\n\n", "the file is empty"),
        ("c.csv", "", "the file is empty"),
        ("c.csv", "prompt,response\n", "the file is empty"),
        ("c.json", "[]", "the file is empty"),
    ],
)
def test_what_is_no_corpus_is_refused_in_a_sentence(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_corpus_given_as_pairs_is_told_apart(tmp_path):
    with pytest.raises(InputError, match="got prompt, response: give the file as --corpus"):
        read_pairs(write(tmp_path / "c.jsonl", jsonl(*ROWS)))
    with pytest.raises(InputError, match="got the text 'once upon': give plain text as --corpus"):
        read_pairs(write(tmp_path / "c.txt", "once upon"))


def test_lines_and_documents_have_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 100)
    path = write(tmp_path / "c.txt", "a b\n" + "c " * 60)
    assert [len(response) for _, response in read(path).demonstrations] == [1, 97, 17]
    monkeypatch.setattr(readers, "_LINES", 30)
    world = read(write(path, "a b\n" + "c d\n" * 60), unit="document")
    assert [r.count("\n") for _, r in world.demonstrations] == [28, 28]
    monkeypatch.setattr(readers, "_CHUNK", 50)
    write(tmp_path / "c.json", json.dumps([{"prompt": "a", "response": "b" * 300}]))
    with pytest.raises(InputError, match="c.json:1: expected JSON objects up to"):
        read(tmp_path / "c.json")


# --- columns

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
]
SAID = "System: Be kind.\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"


def assistant(content):
    return {"role": "assistant", "content": content}


def share_gpt(messages):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": " p q ", "response": " r\n", "source": 3}, ("p q", "r")),
        ({"prompt": "p", "completion": "r"}, ("p", "r")),
        ({"instruction": "p", "input": "", "output": "r"}, ("p", "r")),
        ({"instruction": "p", "input": "about", "output": "r"}, ("p\n\nabout", "r")),
        ({"instruction": "p", "input": None, "output": "r"}, ("p", "r")),
        ({"input": "p", "output": "r"}, ("p", "r")),
        ({"Question": "p", "ANSWER": "r"}, ("p", "r")),
        ({"messages": [*CHAT[1:3]]}, ("hi", "hello")),
        ({"messages": [*CHAT, assistant("so long")]}, (SAID, "so long")),
        ({"messages": [*CHAT, assistant("so long"), CHAT[1]]}, (SAID, "so long")),
        ({"prompt": CHAT[1:2], "completion": [assistant("r")]}, ("hi", "r")),
        # ShareGPT
        ({"id": "x", "conversations": share_gpt(CHAT[1:3])}, ("hi", "hello")),
        ({"conversations": share_gpt([*CHAT, assistant("so long"), CHAT[1]])}, (SAID, "so long")),
        ({"conversation": CHAT[1:3]}, ("hi", "hello")),
        ({"text": "once upon a time"}, ("once", "upon a time")),
    ],
)
def test_the_columns_of_a_corpus(tmp_path, row, example):
    world = read(write(tmp_path / "c.jsonl", jsonl(row)))
    assert world.demonstrations == [example] and world.train_prompts == [example[0]]


@pytest.mark.parametrize(
    ("row", "preference"),
    [
        ({"prompt": "p ", "chosen": " c", "rejected": "r", "margin": 1}, ("p", "c", "r")),
        ({"instruction": "p", "chosen_response": "c", "rejected_response": "r"}, ("p", "c", "r")),
        ({"question": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "r")),
        # HH-RLHF: whole dialogues
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: c",
                "rejected": "\n\nHuman: hi\n\nAssistant: d",
            },
            ("Human: hi\n\nAssistant:", "a\n\nHuman: b\n\nAssistant: c", "d"),
        ),
        # TRL, with the prompt in the dialogues and beside them
        (
            {"chosen": [*CHAT, assistant("c")], "rejected": [*CHAT, assistant("r")]},
            (SAID, "c", "r"),
        ),
        (
            {"prompt": CHAT, "chosen": [assistant("c")], "rejected": [assistant("r")]},
            (SAID, "c", "r"),
        ),
        (
            {"prompt": "p", "chosen": [assistant("c")], "rejected": [assistant("r")]},
            ("p", "c", "r"),
        ),
        # UltraFeedback, binarised
        (
            {
                "prompt": "hi",
                "chosen": [CHAT[1], assistant("c")],
                "rejected": [CHAT[1], assistant("r")],
                "score_chosen": 8.0,
            },
            ("hi", "c", "r"),
        ),
        # ShareGPT
        (
            {
                "conversations": share_gpt(CHAT),
                "chosen": share_gpt([assistant("c")])[0],
                "rejected": share_gpt([assistant("r")])[0],
            },
            (SAID, "c", "r"),
        ),
        # a reply that goes on for another turn
        (
            {
                "chosen": [CHAT[1], assistant("c"), CHAT[3], assistant("d")],
                "rejected": [CHAT[1], assistant("r")],
            },
            ("hi", "c\n\nHuman: bye\n\nAssistant: d", "r"),
        ),
        # ranked lists
        ({"prompt": "p", "responses": ["b", "a", "c"], "ranking": [2, 1, 3]}, ("p", *"abc")),
        ({"prompt": "p", "responses": ["b", "a"], "ranking": [1, 0]}, ("p", "a", "b")),
    ],
)
def test_the_columns_of_preferences(tmp_path, row, preference):
    world = read_pairs(write(tmp_path / "p.jsonl", jsonl(row)))
    assert world.pairs == [preference] and world.demonstrations == [preference[:2]]


def test_columns_of_other_names_are_named(tmp_path):
    row = {"Titel": "p", "body": "r", "prompt": "x"}
    path = write(tmp_path / "c.jsonl", jsonl(row))
    assert read(path, columns=("prompt=titel", "response=body")).demonstrations == [("p", "r")]
    path = write(tmp_path / "c.txt", "Titel;body\np;r\n")  # known as a table by these names
    assert read(path, columns=("prompt=Titel", "response=body")).demonstrations == [("p", "r")]
    path = write(tmp_path / "c.jsonl", jsonl({"a": "p", "b": "about", "c": "r"}))
    for prompt in ("instruction=a", "prompt=a"):  # the input beside it, and as the prompt
        named = (prompt, "input=b", "output=c")
        assert read(path, columns=named).demonstrations == [("p\n\nabout", "r")]
    assert read(path, columns=("input=a", "output=c")).demonstrations == [("p", "r")]
    path = write(tmp_path / "p.jsonl", jsonl({"a": "p", "b": ["s", "r"], "c": [2, 1]}))
    named = ("prompt=a", "responses=b", "ranking=c")
    assert read_pairs(path, columns=named).pairs == [("p", "r", "s")]
    for wrong in ("prompt", "prompt=", "title=prompt", "=", "prompt=\udcff"):
        with pytest.raises(InputError, match="--columns: expected MEANING=NAME"):
            read(path, columns=(wrong,))


def test_a_named_column_counts_in_the_files_that_have_it(tmp_path):
    corpus = write(tmp_path / "c.csv", "title,body,prompt\np,r,x\n")
    pairs = write(tmp_path / "p.jsonl", jsonl({"prompt": "q", "chosen": "c", "rejected": "s"}))
    both = {"pairs_path": pairs, "reward": None}
    for columns in (("prompt=title", "response=body"), ("response=body", "prompt=Title")):
        world = read(corpus, columns=columns, **both)
        assert world.demonstrations == [("p", "r")] and world.pairs == [("q", "c", "s")]
    write(pairs, jsonl({"better": "c", "rejected": "s", "ask": "q"}))
    named = ("prompt=title", "prompt=ask", "response=body", "chosen=better")
    world = read(corpus, columns=named, **both)
    assert world.demonstrations == [("p", "r")] and world.pairs == [("q", "c", "s")]
    plain = write(tmp_path / "c.txt", "once upon a time")  # has no columns, and needs none
    assert read(plain, columns=named[1:2] + named[3:], **both).pairs == world.pairs


def test_a_named_column_that_no_file_has_is_refused(tmp_path):
    path = write(tmp_path / "c.jsonl", jsonl({"prompt": "x", "title": "p", "response": "r"}))
    expected = "--columns: expected names of columns; got 'titel', which is in no file: correct"
    with pytest.raises(InputError, match=expected):
        read(path, columns=("prompt=titel",))
    write(path, jsonl({"title": "p", "response": "r"}))
    with pytest.raises(InputError, match="got title, response: correct 'titel' in --columns, it h"):
        read(path, columns=("prompt=titel",))
    with pytest.raises(InputError, match="expected names of columns; got 'title', which is in no"):
        read(write(tmp_path / "c.txt", "once upon a time"), columns=("prompt=title",))


def test_a_named_column_that_a_file_has_is_not_taken_from_another_in_some_rows(tmp_path):
    rows = [{"title": "p", "prompt": "x", "response": "r"}, {"prompt": "x", "response": "r"}]
    rows.append({"title": "q", "response": "s", "about": "t"})  # the first to have about
    path = write(tmp_path / "c.jsonl", jsonl(*rows))
    world = read(path, columns=("prompt=title", "input=about"))
    assert world.demonstrations == [("p", "r"), ("q\n\nt", "s")]
    assert "skipped 1 with other columns (line 2)" in world.notes[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": 3, "rejected": "r"}, "expected text; got 3: correct it"),
        ({"prompt": {}, "chosen": "c", "rejected": "r"}, "expected text; got {}"),
        ({"chosen": ["c"], "rejected": ["r"]}, "expected messages with role and content; got 'c'"),
        ({"chosen": [{"role": "user"}], "rejected": "r"}, "expected messages .*; got 'r'"),
        ({"chosen": [{"role": 1}], "rejected": []}, "expected messages with role and content"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [1]}, "as many ranks, the smallest"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": "12"}, "as many ranks"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [1, True]}, "as many ranks"),
        ({"prompt": "p", "responses": [1, "b"], "ranking": [1, 2]}, "expected text; got 1"),
    ],
)
def test_a_row_of_another_kind_is_refused_by_its_line(tmp_path, row, message):
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path = write(tmp_path / "p.jsonl", jsonl(good) + "\n" + jsonl(row, good))
    with pytest.raises(InputError, match=f"p.jsonl:3: .*{message}") as caught:
        read_pairs(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


BROKEN = ["{", "[1]", '{"prompt": NaN}', "[" * 100_000, "null", "\ufeff{}", '{"prompt": "p", "cho']


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_skipped_counted_and_named(tmp_path, line):
    good = jsonl({"prompt": "p", "chosen": "c", "rejected": "r"})
    path = write(tmp_path / "p.jsonl", f"{good}\n{line}\n{good}{line}")
    world = read_pairs(path)
    assert world.notes[0] == f"{path}: read 2 preferences, skipped 2 broken (line 3, 5)"


def test_a_file_of_broken_lines_alone_is_refused_by_the_first(tmp_path):
    for content in ("{", "null\n{\n", 'what is this\n{"prompt"\n'):
        with pytest.raises(InputError, match="p.jsonl:1: expected a JSON object; got"):
            read_pairs(write(tmp_path / "p.jsonl", content))


def test_broken_lines_are_ten_or_one_in_a_hundred(tmp_path):
    lines = jsonl(*({"prompt": f"p{i}", "response": "r"} for i in range(2000))).split("\n")
    path = tmp_path / "c.jsonl"
    for n, few in ((100, 10), (2000, 20)):
        broken = [line[:-9] if i >= n - few else line for i, line in enumerate(lines[:n])]
        world = read(write(path, "\n".join(broken)))
        first = ", ".join(str(n - few + i) for i in (1, 2, 3))
        said = f"read {n - few:,} examples, skipped {few} broken (line {first}, ..)"
        assert world.notes == (f"{path}: {said}",)
        broken[0] = "what is this"
        with pytest.raises(InputError, match="c.jsonl:1: expected a JSON object; got 'what is th"):
            read(write(path, "\n".join(broken)))


# --- what is skipped, kept and said


def hh(i, chosen, rejected):
    start = f"\n\nHuman: what is {i}?\n\nAssistant:"
    return {"chosen": start + chosen, "rejected": start + rejected}


def test_lines_that_teach_nothing_are_skipped_counted_and_named(tmp_path):
    lines = [hh(i, " it is good", " it is bad") for i in range(30)]
    lines[10] = hh(10, " the same", " the same")
    for i in (20, 22, 24, 26):
        lines[i] = hh(i, " something", "")
    lines[28] = {"chosen": "Human: a", "rejected": "Human: b"}
    lines[29] = hh(29, " half \ud83d", " it is bad")
    path = write(tmp_path / "hh.jsonl.gz", gzip.compress(jsonl(*lines).encode()))
    world = read_pairs(path)
    assert len(world.pairs) == 23 and world.name == "hh"
    assert world.notes == (
        f"{path}: read 23 preferences, skipped 1 equal (line 11), 4 empty (line 21, 23, 25, ..), "
        "1 without a prompt or a shared beginning up to '\\n\\nAssistant:' (line 29), "
        "1 with half a surrogate pair (line 30)",
    )


def test_preferences_in_both_orders_are_contradictory(tmp_path):
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in ("ab", "ac", "ba", "ab")]
    world = read_pairs(write(tmp_path / "p.jsonl", jsonl(*rows)))
    assert world.pairs == [("p", "a", "c")]
    assert "skipped 3 contradictory (line 1, 3, 4)" in world.notes[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "chosen": "c", "rejected": "c"}] * 5, "5 equal \\(line 1, 2, 3, .."),
        ([{"prompt": " ", "chosen": "c", "rejected": "r"}], "1 empty \\(line 1\\): correct"),
        ([{"prompt": "p", "chosen": None, "rejected": "r"}], "1 empty"),
        ([{"prompt": [], "chosen": "c", "rejected": "r"}], "1 empty"),
        ([{"prompt": "\ud83d", "chosen": "c", "rejected": "r"}], "1 with half a surrogate pair"),
        ([{"chosen": [], "rejected": []}], "1 equal"),
        ([{"chosen": CHAT, "rejected": CHAT[:3]}], "1 empty"),
        ([{"chosen": CHAT[:2], "rejected": CHAT[:1] + CHAT[3:]}], "1 without a prompt that both"),
        (
            [{"prompt": "p", "responses": ["a", "b", "c"], "ranking": [1, 2, 2]}],
            "1 with equal ranks",
        ),
        ([{"prompt": "p", "responses": ["a"], "ranking": [1]}], "1 with equal ranks"),
        ([{"prompt": "p", "responses": ["a", "a"], "ranking": [1, 2]}], "1 equal"),
    ],
)
def test_a_file_of_which_nothing_can_be_used_is_refused(tmp_path, rows, message):
    with pytest.raises(
        InputError, match=f"p.jsonl: expected preferences; got none to use, but .*{message}"
    ):
        read_pairs(write(tmp_path / "p.jsonl", jsonl(*rows)))


def test_rows_of_a_table_with_too_many_or_too_few_fields(tmp_path):
    path = write(tmp_path / "c.csv", 'prompt,response\na,b\n\nc,d,e\n"f\ng",h\ni\n')
    world = read(path)
    assert world.demonstrations == [("a", "b"), ("f\ng", "h")]
    skipped = "skipped 1 with other columns (line 4), 1 empty (line 7)"
    assert world.notes == (f"{path}: read 2 examples, {skipped}",)


def test_of_a_large_file_a_part_is_kept(tmp_path):
    n = 3000
    rows = [{"prompt": f"p{i}", "response": "a" * 700} for i in range(n)]
    path = write(tmp_path / "c.jsonl", jsonl(*rows))
    world = read(path, max_chars=500_000)
    kept = [int(prompt[1:]) for prompt in world.train_prompts]
    assert len(kept) == len(world.demonstrations) == 497 and kept == sorted(kept)
    assert abs(np.mean(kept) / n - 0.5) < 0.06  # sd 0.013: from all of the file
    said = "read 3,000 examples; kept 497, drawn at random: --max-text-mb keeps more"
    assert world.notes == (f"{path}: {said}",)
    assert read(path, max_chars=500_000) == world
    other = read(path, max_chars=500_000, rng=np.random.default_rng(1))
    assert other.demonstrations != world.demonstrations


def test_a_large_file_goes_by_while_little_is_held(tmp_path):
    """The peak of Python's own memory, for files of 3 and of 12 MB of which 1 MB is kept."""
    import tracemalloc

    peaks = []
    for n in (4_000, 16_000):
        rows = ({"prompt": f"p{i}", "response": "abc " * 180} for i in range(n))
        path = write(tmp_path / "c.jsonl", jsonl(*rows))
        tracemalloc.start()
        read(path, max_chars=1_000_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 6_000_000


# --- lines or documents


def test_one_blank_line_in_a_list_of_lines_is_said(tmp_path):
    lines = [f"w{i} text {i}" for i in range(40)]
    path = write(tmp_path / "c.txt", "\n".join([*lines[:20], "", *lines[20:]]))
    world = read(path)
    assert len(world.demonstrations) == 40 and world.joiner == " "
    said = "each line is an example; with --corpus-unit document each document"
    assert world.notes[0] == f"{path}: {said}"
    assert len(read(path, unit="document").demonstrations) == 2
    assert not any("--corpus-unit" in note for note in read(path, unit="line").notes)


def test_a_gap_after_the_beginning_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_HEAD", 30)
    path = write(tmp_path / "c.txt", "a b\n" * 10 + "\n\n\n" + "c d\n")
    assert read(path).demonstrations == [("a", "b"), ("c", "d")]


# --- whatever the bytes are

CHATS = [{"chosen": [*CHAT, assistant("c")], "rejected": [*CHAT, assistant("r")]}] * 3
RANKED = [{"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 1, 3]}] * 3
VALID = {
    "c.txt": b"a b c\nd e\n\nf g\n\nh i\n",
    "c.jsonl": jsonl(*ROWS[:4]).encode(),
    "c.json": json.dumps(ROWS[:4], indent=1).encode(),
    "c.csv": table(ROWS[:4]).encode(),
    "c.tsv": table(ROWS[:4], "\t").encode("utf-16"),
    "c.csv.gz": gzip.compress(table(ROWS[:4]).encode(), mtime=0),
    "m.jsonl": jsonl({"messages": CHAT[:3]}).encode(),
    "s.jsonl": (jsonl({"conversations": share_gpt(CHAT[:3])}) * 2).encode(),
    "w.json": json.dumps({"n": 4, "data": ROWS[:4], "test": ROWS[:1]}, indent=1).encode(),
    "p.jsonl": jsonl(hh(1, " a", " b"), *CHATS, *RANKED).encode(),
}


def reads_or_refuses(folder, name, data):
    """A world, or one InputError of one line; nothing else is raised."""
    path = write(folder / name, data)
    for how in (read, read_pairs):
        try:
            world = how(path)
            assert world.demonstrations and all(map(all, world.demonstrations))
        except InputError as refusal:
            assert "\n" not in str(refusal) and len(str(refusal)) < 600, refusal


@settings(max_examples=60)
@given(name=st.sampled_from([*VALID, "c.parquet"]), data=st.binary(max_size=200))
def test_random_bytes(tmp_path_factory, name, data):
    reads_or_refuses(tmp_path_factory.mktemp("bytes"), name, data)


JUNK = [b"", b"\0", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b"\n", b"\n\n", b"\r", b"\\ud800"]
JUNK += [b"null", b"1e999", b"NaN", b"-1", b"true", b'""', b"[[", b"\xff\xfe", b"\x1f\x8b", b"'"]


@pytest.mark.parametrize("name", [*VALID, "c.parquet"])
def test_mutated_files(tmp_path, name):
    draw, valid = random.Random(name), VALID.get(name)
    if valid is None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS[:4]), tmp_path / name)
        valid = (tmp_path / name).read_bytes()
    for _ in range(150):
        data = valid
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(len(data) + 1)
            end = at + draw.choice((0, 0, 1, 3, len(data)))
            data = data[:at] + draw.choice(JUNK) + data[end:]
        reads_or_refuses(tmp_path, name, data)


def test_one_row_with_other_columns_does_not_refuse_the_file(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(3)]
    path = write(tmp_path / "p.jsonl", jsonl(rows[0], {"prompt": "p", "chosen": "c"}, *rows[1:]))
    world = read_pairs(path)
    assert [prompt for prompt, *_ in world.pairs] == ["p0", "p1", "p2"]
    assert "skipped 1 with other columns (line 2)" in world.notes[0]
    with pytest.raises(InputError, match="p.jsonl:1: expected the columns chosen and rejected"):
        read_pairs(write(path, jsonl({"prompt": "p", "chosen": "c"}, *rows)))
