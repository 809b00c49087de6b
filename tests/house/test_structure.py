"""The shape of the package, read from its source: who imports whom, how long, which habits."""

import ast
import graphlib
import io
import re
import subprocess
import sys
import tokenize
import tomllib

import pytest
from sources import FILES, PACKAGE, ROOT, each, name_of, parse

MATHS = [path for path in FILES if path.parent.name in ("nn", "rlhf")]

# A room is a folder or a file directly under minirlhf/. Each may import itself and:
BASE = {"errors", "backend", "tree", "workers"}
MAY_IMPORT = {
    "errors": set(),
    "fields": {"errors"},
    "backend": {"errors", "kernels"},  # by name, when a GPU's array comes
    "kernels": {"backend", "tree"},
    "tree": {"errors", "backend"},
    "memory": {"errors"},
    "disk": {"errors", "memory"},
    "workers": {"errors", "backend", "tree"},
    "ranks": {"backend", "errors", "tree", "workers"},
    "crew": {"errors", "ranks", "workers", ""},
    "gradcheck": {"backend", "tree"},
    "nn": BASE,
    "rlhf": BASE,
    "train": BASE | {"fields", "nn", "rlhf"},
    "exact": BASE | {"nn", "rlhf", "train"},
    "worlds": BASE | {"disk"},
    "runs": BASE
    | {"crew", "disk", "fields", "memory", "ranks", "nn", "rlhf", "train", "worlds", ""},
    "app": BASE
    | {"crew", "disk", "fields", "memory", "gradcheck", "nn", "ranks", "rlhf", "train", "exact"}
    | {"worlds", "runs", ""},
    "__main__": {"app"},
    "": BASE | {"disk", "gradcheck", "nn", "rlhf", "train", "exact", "worlds", "runs", "app"},
}
CORE = {  # these must exist; any other file of nn/ and rlhf/ counts as core too, unless it stands
    "nn": {"layers", "attention", "transformer", "heads", "sampling"},
    "rlhf": {"logprobs", "kl", "advantages", "objectives"},
}
OUTSIDE_CORE = {"__init__", "adam", "exact"}  # here
CORE_LINES, FUNCTION_LINES = 1500, 45
PEERS = {"torch", "transformers", "jax", "tensorflow"}


def walk(node, *, into_functions=True):
    for child in ast.iter_child_nodes(node):
        if into_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from walk(child, into_functions=into_functions)


def imports(tree, *, into_functions=True):
    """Dotted names that the source imports: `from a.b import c` gives a.b.c."""
    for node in walk(tree, into_functions=into_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            where = "." * node.level + (node.module or "")
            yield from (f"{where}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                yield str(node.args[0].value)


def module_of(dotted):
    """The file of the package that `dotted` lies in; None outside of the package."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:n])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if parts[0] == "minirlhf" and candidate in FILES:
                return candidate
    return None


def room_of(path):
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if top == "__init__" else top


def code_lines(source):
    """Numbers of the lines that hold code: no docstrings, comments, blank lines."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        )
        if documented and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def long_functions(source, limit):
    """(name, code lines of the body) of the functions over `limit`; signatures are free."""
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = sum(node.body[0].lineno <= line <= node.end_lineno for line in lines)
            if size > limit:
                yield node.name, size


def bad_randomness(tree):
    """Global or unseeded random numbers, and parameters rng, rng_*, *_rng with a default."""

    def legal(name):
        return name == "default_rng" or name[0].isupper()  # Generator, PCG64, SeedSequence

    for dotted in imports(tree):
        *where, name = dotted.split(".")
        if dotted == "random" or where[:1] == ["random"]:
            yield f"import of {dotted}"
        if where == ["numpy", "random"] and not legal(name):
            yield f"import of {dotted}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not legal(node.attr):
            if ast.unparse(node.value) in ("np.random", "numpy.random"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and not node.args + node.keywords:
            if ast.unparse(node.func).endswith("default_rng"):
                yield "default_rng() without a seed"
        elif isinstance(node, ast.arguments):
            with_default = [*node.posonlyargs, *node.args][::-1][: len(node.defaults)]
            with_default += [
                x for x, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d is not None
            ]
            for argument in with_default:
                if "rng" in argument.arg.split("_"):
                    yield f"{argument.arg} with a default"


# --- the rooms


@pytest.mark.parametrize("room", sorted(set(MAY_IMPORT) - {""}))
def test_the_room_exists(room):
    files = [path for path in FILES if room_of(path) == room and path.name != "__init__.py"]
    assert files, f"minirlhf/{room} has no source: if it moved, change MAY_IMPORT too"


@pytest.mark.parametrize("room", CORE)
def test_the_core_is_where_it_is_counted(room):
    present = {path.stem for path in MATHS if path.parent.name == room}
    assert CORE[room] <= present, f"missing in minirlhf/{room}: {sorted(CORE[room] - present)}"


# minirlhf.train is a room and a function: its __init__ hands a call on to app/api.py.
CALLABLE = PACKAGE / "train" / "__init__.py"


@each([p for p in FILES if p.name == "__init__.py" and p.parent != PACKAGE and p != CALLABLE])
def test_inner_init_files_are_empty(path):
    assert path.read_text(encoding="utf-8").strip() == ""


# --- who imports whom


@each([path for path in FILES if path != CALLABLE])
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"a new room: say in MAY_IMPORT what minirlhf/{room} may import"
    for dotted in imports(parse(path)):
        assert not dotted.startswith("."), f"{dotted}: write the whole name"
        target = module_of(dotted)
        if target is not None:
            assert room_of(target) in MAY_IMPORT[room] | {room}, f"{name_of(path)}: {dotted}"


def test_no_file_imports_itself_in_a_circle():
    graph = {}
    for path in FILES:
        targets = map(module_of, imports(parse(path), into_functions=False))
        graph[name_of(path)] = {name_of(target) for target in targets if target is not None}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


@each(FILES)
def test_cupy_lives_in_backend_and_peers_nowhere(path):
    for dotted in imports(parse(path)):
        library = dotted.split(".")[0]
        assert library not in PEERS, f"{name_of(path)} imports {library}"
        assert library != "cupy" or room_of(path) == "backend"


@each(FILES)
def test_what_is_imported_at_once_is_a_declared_dependency(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w-]+", line).group() for line in project["dependencies"]}
    for dotted in imports(parse(path), into_functions=False):
        library = dotted.split(".")[0]
        known = library in declared | {"minirlhf"} or library in sys.stdlib_module_names
        assert known, f"{name_of(path)}: {dotted} is not in pyproject.toml's dependencies"


def test_the_reference_and_the_exact_worlds_import_with_numpy_alone():
    rooms = ("nn", "rlhf", "train", "exact")
    files = [path for path in FILES if path.parent.name in rooms and path.stem != "__init__"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    script = f"""
import importlib, sys

class OnlyNumPy:
    def find_spec(self, name, path=None, target=None):
        library = name.split(".")[0]
        if library not in sys.stdlib_module_names and library not in ("numpy", "minirlhf"):
            raise ModuleNotFoundError(f"{{name}} is out of bounds there")

sys.meta_path.insert(0, OnlyNumPy())
sys.path.insert(0, {str(ROOT)!r})
for name in {names!r}:
    importlib.import_module(name)
print("imported", len({names!r}))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["imported", str(len(names))] and len(names) >= 4


# --- how long


def test_the_maths_core_stays_small():
    sizes = {
        name_of(path): len(code_lines(path.read_text(encoding="utf-8")))
        for path in MATHS
        if path.stem not in OUTSIDE_CORE
    }
    assert sum(sizes.values()) <= CORE_LINES, sizes


@each(MATHS)
def test_functions_fit_a_screen(path):
    long = list(long_functions(path.read_text(encoding="utf-8"), FUNCTION_LINES))
    assert not long, f"over {FUNCTION_LINES} code lines: {long}"


# --- random numbers


@each(FILES)
def test_random_numbers_come_from_a_given_generator(path):
    assert not list(bad_randomness(parse(path)))


# --- the readers above can fail

SAMPLE = '''"""Module
docstring."""
import a.b
from c import d as e  # 2


def f(x, *, rng=None):  # 3
    """Docstring."""
    # comment
    import late

    text = """not a
    docstring"""

    return (
        importlib.import_module("g")
    )  # 9
'''


def test_code_lines_leaves_out_what_is_not_code():
    assert len(code_lines(SAMPLE)) == 9


def test_long_functions_counts_the_body_alone():
    assert list(long_functions(SAMPLE, 5)) == [("f", 6)]
    assert list(long_functions(SAMPLE, 6)) == []


def test_imports_are_seen_wherever_they_stand():
    assert list(imports(ast.parse(SAMPLE))) == ["a.b", "c.d", "late", "g"]
    assert list(imports(ast.parse(SAMPLE), into_functions=False)) == ["a.b", "c.d"]
    assert list(imports(ast.parse("from ..x import y"))) == ["..x.y"]


@pytest.mark.parametrize(
    "source",
    [
        "np.random.seed(0)",
        "x = numpy.random.rand(3)",
        "from numpy.random import rand",
        "import random",
        "from random import choice",
        "rng = np.random.default_rng()",
        "def f(x, rng=None): pass",
        "def f(x, *, rng_init=default_rng(0)): pass",
        "f = lambda shuffle_rng=0: 1",
    ],
)
def test_bad_randomness_is_seen(source):
    assert len(list(bad_randomness(ast.parse(source)))) == 1


def test_good_randomness_passes():
    good = """
import numpy as np
from numpy.random import Generator, default_rng
def f(x=1, *, rng: np.random.Generator, wrong=2):
    a, b = np.random.default_rng(0).spawn(2)
    return rng.random(3)
"""
    assert list(bad_randomness(ast.parse(good))) == []
