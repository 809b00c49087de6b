"""Every forward has its backward directly below it and a row in the table of gradients."""

import ast
import importlib
import inspect

import pytest
from sources import FILES, PACKAGE, ROOT, each, parse

from minirlhf.app.cases import TABLE

FORWARD, BACKWARD = "_forward", "_backward"
# what stands in kernels.py stands for forwards and backwards of other files
OTHERS = [path for path in FILES if path.name != "kernels.py"]


def public_forwards(tree):
    """Names of the public functions *_forward that stand at the top level."""
    names = (node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    return [name for name in names if name.endswith(FORWARD) and not name.startswith("_")]


def without_backward(tree):
    """The forwards whose backward is not the statement directly below them."""
    below = dict(zip(tree.body, [*tree.body[1:], None], strict=False))
    for node, following in below.items():
        if isinstance(node, ast.FunctionDef) and node.name in public_forwards(tree):
            wanted = node.name.removesuffix(FORWARD) + BACKWARD
            if not (isinstance(following, ast.FunctionDef) and following.name == wanted):
                yield node.name


def without_forward(tree):
    """The public functions *_backward that no forward stands above."""
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    for name in names:
        if name.endswith(BACKWARD) and not name.startswith("_"):
            if name.removesuffix(BACKWARD) + FORWARD not in names:
                yield name


def without_row(pairs, table):
    """The (forward, backward) that no row checks together; an adapter counts for what it wraps."""
    checked = [tuple(map(inspect.unwrap, (row.forward, row.backward))) for row in table]
    return [pair[0].__name__ for pair in pairs if tuple(map(inspect.unwrap, pair)) not in checked]


def pairs_of(path):
    """The pairs of a file of the package, as functions."""
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in public_forwards(parse(path)):
        yield getattr(module, name), getattr(module, name.removesuffix(FORWARD) + BACKWARD)


WITH_PAIRS = [path for path in OTHERS if public_forwards(parse(path))]


@each(OTHERS)
def test_the_backward_stands_directly_below_its_forward(path):
    assert not list(without_backward(parse(path)))
    assert not list(without_forward(parse(path)))


@each(WITH_PAIRS)
def test_every_pair_has_a_row_in_the_table(path):
    missing = without_row(pairs_of(path), TABLE)
    assert not missing, f"add a row to TABLE in minirlhf/app/cases.py for {missing}"


def test_pairs_are_found_where_they_are():
    found = {str(path.relative_to(PACKAGE)) for path in WITH_PAIRS}
    assert found >= {"nn/layers.py", "nn/attention.py", "rlhf/kl.py", "train/ppo.py"}


# --- what is missing is found


def test_a_planted_forward_without_a_row_is_found():
    pair = next(pairs_of(PACKAGE / "nn" / "layers.py"))
    operation = pair[0].__name__.removesuffix(FORWARD)
    assert without_row([pair], TABLE) == []
    assert without_row([pair], [row for row in TABLE if row.operation != operation]) == [
        pair[0].__name__
    ]
    other_backward = next(row.backward for row in TABLE if row.operation != operation)
    assert without_row([(pair[0], other_backward)], TABLE) == [pair[0].__name__]


SAMPLE = """
class FooCache: ...
def foo_forward(x): ...
def foo_backward(dout, cache): ...
def _helper_forward(x): ...
"""


@pytest.mark.parametrize(
    "source",
    [
        SAMPLE.replace("def foo_backward", "def bar_backward"),
        SAMPLE.replace("def foo_backward", "x = 1\ndef foo_backward"),
        SAMPLE.replace("def foo_backward", "def between(): ...\ndef foo_backward"),
        SAMPLE + "def last_forward(x): ...",
    ],
)
def test_a_planted_forward_without_its_backward_is_found(source):
    assert list(without_backward(ast.parse(SAMPLE))) == []
    assert len(list(without_backward(ast.parse(source)))) == 1


def test_a_planted_backward_without_its_forward_is_found():
    assert list(without_forward(ast.parse(SAMPLE))) == []
    source = SAMPLE + "def stray_backward(dout, cache): ..."
    assert list(without_forward(ast.parse(source))) == ["stray_backward"]
