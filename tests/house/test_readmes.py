"""What the READMEs say is there: links, lines of code and their tests, commands; Python runs."""

import ast
import contextlib
import doctest
import functools
import io
import re
import shlex

import figures
import pytest
from sources import ROOT

from minirlhf.app.cli import COMMANDS, run_command

FRONT_PAGE_LINES = 220
PAGES = figures.readmes(ROOT)


def name_of(path):
    return str(path.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# --- reading Markdown

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CODE_SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")  # a span may go on in the next line


def blocks(text, language):
    """The code blocks of one language."""
    return [code for found, code in FENCE.findall(text) if found == language]


def prose(text):
    """The text without its code blocks."""
    return FENCE.sub("", text)


def one_line(text):
    return " ".join(text.split())


# --- links

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text):
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page, root):
    """Links to files that are not there, or not in the repository; anchors without a heading."""
    text = prose(page.read_text(encoding="utf-8"))
    for target in LINK.findall(re.sub(r"\$[^$]+\$", "", CODE_SPAN.sub("", text))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or not there.is_relative_to(root):
            yield target
        elif anchor and anchor not in anchors(there.read_text(encoding="utf-8")):
            yield target


# --- from a derivation to its line and its test

# Code: [ppo.py](ppo.py), `make_experience`: `the line`. Test: `tests/train/test_ppo.py::test_name`.
PLACE = re.compile(
    r"Code: \[[^\]]+\]\((?P<file>[^)]+)\), `(?P<function>[\w.]+)`: `(?P<line>[^`]+)`\. "
    r"Test: `tests/[\w/]+\.py::\w+`"
)


@functools.cache
def parsed(source):
    return ast.parse(source)


@functools.cache
def definition(source, dotted):
    """The function or class of that name, methods as Class.method; None if there is none."""
    node = parsed(source)
    for name in dotted.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        inside = (child for child in ast.walk(node) if isinstance(child, kinds))
        node = next((child for child in inside if child.name == name and child is not node), None)
        if node is None:
            return None
    return node


def wrong_places(page, root):
    """What `Code: ... Test: ...` of a page names and is not so."""
    text = one_line(prose(page.read_text(encoding="utf-8")))
    found = list(PLACE.finditer(text))
    if len(found) != len(re.findall(r"\bCode: ", text)):
        starts = {place.start() for place in found}
        for other in re.finditer(r"\bCode: ", text):
            if other.start() not in starts:
                yield f"not in the form of PLACE: {text[other.start() : other.start() + 80]}"
    for place in found:
        file, function, line = place.groups()
        source = page.parent / file
        code = source.read_text(encoding="utf-8") if source.is_file() else ""
        node = definition(code, function)
        if node is None:
            yield f"{file} has no {function}"
        elif one_line(line) not in map(one_line, ast.get_source_segment(code, node).splitlines()):
            yield f"{function} in {file} has no line {line}"
    for test, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        tests = root / test
        if not tests.is_file() or not definition(tests.read_text("utf-8"), name):
            yield f"{test} has no {name}"


# --- commands


def command_lines(text):
    """Every command that a page shows: lines of sh blocks, and spans of code, as words."""
    lines = [line for code in blocks(text, "sh") for line in code.replace("\\\n", " ").splitlines()]
    lines += map(one_line, CODE_SPAN.findall(prose(text)))
    for line in lines:
        for part in line.split("&&"):
            with contextlib.suppress(ValueError):  # a span with one quotation mark
                yield shlex.split(part, comments=True)


@functools.cache
def flags_of(command):
    """The options that `minirlhf COMMAND --help` speaks of, and of `train` --help-all."""
    said = io.StringIO()
    for flag in ("--help", "--help-all")[: 1 + (command == "train")]:
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
            run_command([command, flag])
    return set(re.findall(r"--[\w.-]+", said.getvalue()))


def wrong_commands(text, root):
    """Commands of minirlhf that there are not, their unknown flags, scripts that are missing."""
    for words in command_lines(text):
        for first, second in zip(words, words[1:], strict=False):
            at, at_command = first.split("/")[-1], re.fullmatch(r"[a-z]+", second)
            if at in ("python", "python3") and second.endswith(".py"):
                if not (root / second).is_file():
                    yield f"{first} {second}"
            if at != "minirlhf" or not at_command or words[0] in ("from", "import"):
                continue
            if second not in COMMANDS:
                yield f"minirlhf {second}"
                continue
            flags = (word.partition("=")[0] for word in words if word.startswith("--"))
            yield from (f"minirlhf {second} {f}" for f in flags if f not in flags_of(second))


# --- the pages


def test_every_room_has_its_page():
    rooms = {path.parent for path in ROOT.glob("minirlhf/*/__init__.py")}
    rooms |= {ROOT, ROOT / "tests", ROOT / "tests" / "benchmarks", ROOT / "examples"}
    assert {path.parent for path in PAGES} >= rooms


@each_page
def test_links_lead_somewhere(page):
    assert list(broken_links(page, ROOT)) == []


@each_page
def test_derivations_end_at_their_line_and_their_test(page):
    assert list(wrong_places(page, ROOT)) == []


@each_page
def test_commands_are_commands(page):
    assert list(wrong_commands(page.read_text(encoding="utf-8"), ROOT)) == []


def run_block(code, name):
    """A block of Python in a namespace of its own: what `>>>` shows is compared."""
    if ">>> " not in code:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
        return
    test = doctest.DocTestParser().get_doctest(code, {"__name__": "__main__"}, name, name, 0)
    doctest.DebugRunner().run(test)


PYTHON = [
    pytest.param(code, id=f"{name_of(page)}-{i}")
    for page in PAGES
    for i, code in enumerate(blocks(page.read_text(encoding="utf-8"), "python"))
]


@pytest.mark.parametrize("code", PYTHON)
def test_every_python_block_runs_on_its_own(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        run_block(code, "README.md")


def test_the_front_page_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= FRONT_PAGE_LINES


def test_every_table_of_figures_can_be_measured_again(capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().out


# --- what is wrong is found

PAGE = """\
# A page

## Here & there

[code](room/code.py), [there](#here--there), [web](https://example.org), `[not](a link)`, $[x](y)$

Code: [code.py](room/code.py), `Box.double`: `return 2 * x`.
Test: `tests/test_code.py::test_double`.

```sh
.venv/bin/pip install . && .venv/bin/minirlhf train --ppo.kl-coef 0.1 \\
  --out runs/a  # and --nothing else
python room/code.py
```

`minirlhf resume RUN`, `from minirlhf import train`, `minirlhf COMMAND --help`
"""
CODE = "class Box:\n    def double(x):\n        return 2 * x\n\n\ndef other():\n    return 3 * x\n"


@pytest.fixture
def page(tmp_path):
    test = "def test_double(): ..."
    files = {"README.md": PAGE, "room/code.py": CODE, "tests/test_code.py": test}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path / "README.md"


def faults(page):
    """What all readers find."""
    root, text = page.parent, page.read_text(encoding="utf-8")
    return [*broken_links(page, root), *wrong_places(page, root), *wrong_commands(text, root)]


def test_a_right_page_has_no_faults(page):
    assert faults(page) == []


@pytest.mark.parametrize(
    ("right", "wrong", "found"),
    [
        ("(room/code.py), [there]", "(room/cod.py), [there]", "room/cod.py"),
        ("(room/code.py), [there]", "(../page.md), [there]", "../page.md"),
        ("#here--there", "#here-there", "#here-there"),
        ("2 * x`", "3 * x`", "Box.double in room/code.py has no line return 3 * x"),
        ("2 * x`", "2 *`", "Box.double in room/code.py has no line return 2 *"),
        ("Box.double", "double_it", "room/code.py has no double_it"),
        ("::test_double", "::test_doubl", "tests/test_code.py has no test_doubl"),
        ("tests/test_code", "tests/test_cod", "tests/test_cod.py has no test_double"),
        ("`Box.double`:", "`Box.double`", "not in the form of PLACE: Code: [code.py](room/"),
        ("minirlhf resume", "minirlhf resum", "minirlhf resum"),
        ("minirlhf train --ppo", "minirlhf bench --ppo", "minirlhf bench"),
        ("--ppo.kl-coef", "--ppo.kl-coeff", "minirlhf train --ppo.kl-coeff"),
        ("python room/code.py", "python room/cod.py", "python room/cod.py"),
    ],
)
def test_a_planted_fault_is_found(page, right, wrong, found):
    assert right in PAGE
    (page.parent.parent / "page.md").write_text("outside", encoding="utf-8")
    page.write_text(PAGE.replace(right, wrong), encoding="utf-8")
    (fault,) = faults(page)
    assert fault.startswith(found)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1 / 0", ZeroDivisionError),
        ("np.zeros(3)", NameError),
        (">>> 1 + 1\n3\n", doctest.DocTestFailure),
        (">>> np.zeros(3)\n", doctest.UnexpectedException),
    ],
)
def test_a_block_that_does_not_run_is_seen(code, error):
    run_block("import numpy as np\nnp.zeros(3)", "before")
    with pytest.raises(error):
        run_block(code, "planted")


def test_blocks_are_found_by_their_language():
    text = "```python\na\n```\n\n```\nb\n```\n\n```sh\nc\n```\n\n```python\nd\n\n```\n"
    assert blocks(text, "python") == ["a\n", "d\n\n"]
    assert prose(text).split() == []
