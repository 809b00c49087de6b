"""How long the package is, and what one reads to understand PPO: within the design's budgets."""

import ast
import io
import tokenize

import pytest
from sources import FILES, PACKAGE, ROOT, parse

REFERENCE = ("nn", "rlhf", "train")
# Functions at the edge, to which everything has to be told, may take ten arguments.
LEAVES = {"generate", "sample_responses", "adamw_step"}


def lines_of(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def imported(path):
    """The files of the package that a file imports."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield modules.get(f"{node.module}.{alias.name}") or modules.get(node.module)
        elif isinstance(node, ast.Import):
            yield from (modules.get(alias.name) for alias in node.names)


def needed_for(path):
    """A file and all it imports, directly or not."""
    seen, todo = set(), [path]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += [other for other in imported(path) if other is not None]
    return seen


def functions():
    """(name, lines, arguments) of every function."""
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n_arguments = len(node.args.args) + len(node.args.kwonlyargs)
                name = f"{path.relative_to(PACKAGE)}:{node.name}"
                yield name, node.end_lineno - node.lineno + 1, n_arguments


def comments_of(path):
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def figures():
    reference = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in REFERENCE]
    for_ppo = needed_for(PACKAGE / "train" / "ppo.py")
    found = list(functions())
    loop = next(lines for name, lines, _ in found if name.endswith("ppo.py:train_ppo"))
    wide = [(n, name) for name, _, n in found if name.partition(":")[2] not in LEAVES]
    return {
        "lines of the package": sum(map(lines_of, FILES)),
        "lines of the reference": sum(map(lines_of, reference)),
        "files to understand PPO": len(for_ppo),
        "lines to understand PPO": sum(map(lines_of, for_ppo)),
        "lines of the loop": loop,
        "longest file": max((lines_of(path), path.name) for path in FILES),
        "longest function": max((lines, name) for name, lines, _ in found),
        "most arguments": max(wide),
        "most arguments of a leaf": max((n, name) for name, _, n in found),
        "lines of README.md": lines_of(ROOT / "README.md"),
        "comments per 100 lines of the reference": (
            100 * sum(map(comments_of, reference)) / sum(map(lines_of, reference))
        ),
    }


MOST = {
    "lines of the package": 16_590,
    "lines of the reference": 4_500,
    "files to understand PPO": 20,
    "lines to understand PPO": 3_800,
    "lines of the loop": 40,
    "longest file": 500,
    "longest function": 60,
    "most arguments": 8,
    "most arguments of a leaf": 10,
    "lines of README.md": 220,
}
LEAST = {"comments per 100 lines of the reference": 7}


def over(found):
    """What does not fit, in words."""
    size = {name: value[0] if isinstance(value, tuple) else value for name, value in found.items()}
    too_many = [f"{n}: {found[n]} > {most}" for n, most in MOST.items() if size[n] > most]
    return too_many + [
        f"{n}: {found[n]} < {least}" for n, least in LEAST.items() if size[n] < least
    ]


def test_the_package_keeps_within_its_budgets(capsys):
    found = figures()
    with capsys.disabled():
        print("\n" + "; ".join(f"{name} {value}" for name, value in found.items()))
    assert not over(found)


@pytest.mark.parametrize("name", [*MOST, *LEAST])
def test_a_budget_that_is_exceeded_is_named(name):
    found = dict.fromkeys(MOST, 0) | dict.fromkeys(LEAST, 100)
    assert not over(found)
    found[name] = 10**6 if name in MOST else 0
    assert len(over(found)) == 1 and over(found)[0].startswith(name)


def test_imports_are_followed_to_the_end():
    needed = {path.name for path in needed_for(PACKAGE / "train" / "ppo.py")}
    assert {"ppo.py", "kl.py", "transformer.py", "backend.py", "errors.py"} <= needed
    assert not {"pipeline.py", "cli.py", "metrics.py", "preferences.py"} & needed
