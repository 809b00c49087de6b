"""tests/figures.py: each table from a small output, the markers, the command."""

import json
import sys

import figure_tables as tables
import figures
import pytest


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")


def cells(markdown):
    """The cells of a table, without the line under its head."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert set(lines[1]) <= set("|- ")
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in found}) == 1, "a row has more cells than another"
    return [found[0], *found[2:]]


# --- tables


@pytest.fixture
def support(tmp_path):
    columns = ("proxy", "gold", "kl_seq", "entropy", "length", "distinct_2", "repeated_bigrams")
    names = ("0", "0.2", "5", "reference")
    seeds = [
        {
            "seed": seed,
            "rows": {name: dict.fromkeys(columns, i - 1 + seed) for i, name in enumerate(names)},
            "prompts": ["Hello.", "Where is it?"],
            "replies": {name: ["Same.", f"By\n{name}."] for name in names},
            "claims": {"gold rises": seed == 0},
        }
        for seed in (0, 1)
    ]
    write(tmp_path, "runs/results.json", seeds)
    return tmp_path


def test_support(support):
    text = tables.support(support)
    head, reference, free, default, _ = cells(text)
    assert head[1:4] == ["proxy reward", "gold reward", "`kl_seq` [nats]"]
    assert [reference[0], default[0]] == ["reference", "**β = 0.2** (default)"]
    assert free[:2] == ["β = 0", "−0.50 ± 0.71"] and reference[5] == "2.5 ± 0.7"
    assert text.endswith("Seeds in which it held: gold rises: 1 of 2.")


def test_cases(tmp_path):
    one = {"question": "Why?", "varied": "x", "seen": "|g| is 1.", "seeds": [1, 2]}
    one |= {"claims": {"a": [True, False], "b": [True, True]}, "unexpected": ["y did not."]}
    write(tmp_path, "02_b/02_b.json", one)
    write(tmp_path, "01_a/01_a.json", {**one, "unexpected": []})
    write(tmp_path, "01_a/run-1/result.json", {})  # of a run that a case has made
    head, first, second = cells(tables.cases(tmp_path))
    assert head[-1] == "claims that held" and first[-1] == "3 of 4"
    assert first[0] == "[01](cases/01_a.py), [picture](cases/01_a.png)"
    assert first[1:4] == ["Why?", "x", "&#124;g&#124; is 1."]
    assert second[3].endswith("is 1. *Not as expected: y did not.*")


def test_diagnosis(tmp_path):
    told = {"runs": 2, "first": 1, "first elsewhere": 3, "below another": 6}
    told |= {"in healthy runs": 0, "gold fell": 4}
    causes = {"a fault": ["r", ["r", ""]], "healthy: ppo": ["", ["", ""]]}
    found = {"seen": "One.", "healthy": 5, "causes": causes, "rules": {"r": {**told, "lead": 2.0}}}
    write(tmp_path, "28_a/28_a.json", found)
    text = tables.diagnosis(tmp_path)
    row = cells(text)[1]
    assert text.startswith("One.\n\n| rule ") and row[:4] == ["`r`", "a fault", "1 of 2", "nothing"]
    assert row[4:] == ["3", "6", "0 of 5", "early: 2 iterations (4 runs)"]
    found["rules"]["r"]["lead"] = -1.0
    write(tmp_path, "28_a/28_a.json", found)
    assert cells(tables.diagnosis(tmp_path))[1][-1] == "no"


def test_optimum(tmp_path):
    same = {"name": "PPO", "iterations": 150}
    runs = [
        {**same, "kl_coef": beta, "history": [{}, {"exact/fraction": x}]}
        for beta, x in ((1.0, 0.5), (1.0, 0.75), (0.5, 0.99))
    ]
    write(tmp_path, "exact/exact.json", {"optimum": runs})
    assert cells(tables.optimum(tmp_path)) == [
        ["", "β = 1", "β = 0.5"],
        ["PPO, 150 iterations", "0.6250 (0.5000)", "0.9900 (0.9900)"],
    ]


def test_kl_and_its_four_rows(tmp_path):
    row = {"name": "as loss", "error": 687.2, "cosine": -0.07, "noise": 79.2, "gamma": 1.0}
    right = {**row, "kl_mode": "reward_k1", "gives": "g", "error": 3.6e-16}
    rows = [
        {**right, "sampler": "theta"},
        {**right, "sampler": "theta", "gamma": 0.0, "error": 0.46},
        {**row, "kl_mode": "loss_k1", "sampler": "theta", "gives": "grad KL(ref||pi)"},
        {**row, "kl_mode": "loss_rb", "sampler": "theta", "gives": "partial||x"},
        {**right, "sampler": "old", "noise": 1.44},
    ]
    write(tmp_path, "exact/exact.json", {"kl": rows})
    _, first, own, wrong, _ = cells(tables.kl(tmp_path))
    assert first == ["`reward_k1`", "as loss", "g", *["**4e-16**", "−0.07", "79"],
                     *["**4e-16**", "−0.07", "1.4"]]  # fmt: skip
    assert own[3] == "0.46" and own[6:] == ["", "", ""]
    assert wrong[2:4] == ["∇KL(ref‖π_θ), the other direction", "687"]
    assert [row[0] for row in cells(tables.kl4(tmp_path))[1:]] == ["`reward_k1`", "`loss_k1`"]


def test_libraries(tmp_path):
    row = {"name": "a-k1", "term": "|k1|", "placement": "loss", "descends": "nothing", "error": 1.0,
           "cosine": 0.0, "noise": 0.69, "off": "none of these, near kl", "where": "a/b: c.py",
           "as_of": "1234567"}  # fmt: skip
    rows = [row, {**row, "name": "a-k1-reward", "term": "k1", "placement": "reward"}]
    write(tmp_path, "output.txt", rows)
    text = tables.libraries(tmp_path)
    _, first, second = cells(text)
    assert first == ["`a-k1`", "&#124;k1&#124;", "nothing", "1.00", "0.00", "0.7", "none of these"]
    assert second[1] == "k1, in the reward"
    assert text.endswith("\n\n- `a-k1`, `a-k1-reward`: a/b: c.py, 1234567")


def test_recipes(tmp_path):
    columns = ("proxy", "gold", "kl_seq", "length", "repeated_bigrams")
    rows = {"reference": (0.0, 1.5, 0.0, 15.0, 0.01), "grpo": (0.9, 1.8, 3.0, 21.0, 0.08)}
    rows["dpo"] = (float("nan"), 1.0, 0.5, 15.0, 0.01)
    seed = {name: dict(zip(columns, row, strict=True)) for name, row in rows.items()}
    write(tmp_path, "runs/results.json", [seed, seed])
    _, reference, grpo, dpo = cells(tables.recipes(tmp_path))
    assert reference[-1] == "" and grpo[0] == "`grpo`"
    assert grpo[1:4] == ["0.90 ± 0.00", "1.80 ± 0.00", "3.00 ± 0.00"] and grpo[-1] == "2 of 2"
    assert dpo[1] == "" and dpo[-1] == "0 of 2"


PRINTED = """\
graph 1002: 5 prefixes, 7 responses; the uniform walk: 0.7852

             optimality E[r] of the    KL of optimum, policy
seed   beta          J*       J/J*    centred  reference    optimum     policy        KL*         KL P(illegal)
   0    0.1      0.8000     0.9900     0.9800     0.3000     0.9700     0.9600     1.6000     1.7000     0.0070
   1    0.1      0.8200     0.9800     0.9800     0.3000     0.9700     0.9600     1.6000     1.7000     0.0070

Reference of seed 0: exact optimality 0.3000, of 20,000 samples
0.3 +- 0.1: +0.0 standard errors away.
"""  # noqa: E501


def test_randomwalks(tmp_path):
    write(tmp_path, "output.txt", PRINTED)
    head, row = cells(tables.randomwalks(tmp_path))
    assert head[:4] == ["graph", "β", "J*", "J / J*, mean (least)"]
    assert row[:4] == ["1002", "0.1", "0.8100", "**0.9850** (0.9800)"]
    assert row[4:] == ["0.3000", "0.9700", "0.9600", "1.600", "1.700", "0.0070"]


def test_exact_size(tmp_path):
    row = {"responses": 19608, "prefixes": 2801, "enumeration": 0.0234, "gradient": 1.03}
    rows = [row | {"max_tokens": T, "peak_mib": 12.7} for T in (3, 4, 5, 6)]
    write(tmp_path, "exact/bench_exact.json", rows)
    found = cells(tables.exact_size(tmp_path))[1:]
    assert found[1] == ["5 tokens", "19,608", "2,801", "0.023 s", "13 MiB", "1 s"]
    assert [line[0] for line in found] == ["4 tokens", "5 tokens", "6 tokens"]


def test_own_text(tmp_path):
    for name in ("names", "plays", "pairs/run"):
        ends = {"reference": {"reward": 0.4491}, "policy": {"reward": 0.698, "kl_seq": 3.27}}
        write(tmp_path, f"{name}/result.json", ends)
    write(tmp_path, "pairs/preferences.jsonl", "{}\n" * 1200)
    write(tmp_path, "output.txt", "reward model: accuracy 0.723 on 448 held-out pairs, more\n")
    _, names, _, pairs = cells(tables.own_text(tmp_path))
    assert names[1:] == ["share of vowels", "0.449", "0.698", "3.27"]
    assert pairs[0] == "1,200 preference pairs" and "0.723 on 448 held-out" in pairs[1]


def test_bench(tmp_path):
    row = {"workload": "toy", "part": "loss", "what": "PPO loss", "noisy": False, "gflops": 50.0,
           "sgemm_gflops": 100.0, "memory": 2**21}  # fmt: skip
    ours = row | {"program": "minirlhf", "seconds": 0.25, "ratio": 1.0, "version": "minirlhf 1"}
    peer = row | {"program": "JAX", "ratio": 1.234, "noisy": True, "version": "JAX 2", "seconds": 1}
    alone = ours | {"workload": "gpt2", "seconds": 2.0, "gflops": None, "memory": None}
    machine = {"numpy": "2.4", "python": "3.11"}
    write(tmp_path, "1/bench.json", {"rows": [ours, peer], "machine": machine, "threads": 2})
    write(tmp_path, "2/bench.json", {"rows": [alone], "machine": machine, "threads": 2})
    text = tables.bench(tmp_path)
    assert cells(text) == [
        ["", "ms", "of the sgemm peak", "JAX", "memory [MiB]", "JAX's"],
        ["toy: PPO loss", "250.0", "50%", "~1.23", "2", "2"],
        ["gpt2: PPO loss", "2000", "", "", "", ""],
    ]
    assert text.endswith("minirlhf 1, JAX 2; NumPy 2.4, Python 3.11, 2 cores.")


def test_tricks_and_gpu(tmp_path):
    rows = [{"trick": "less", "part": "loss", "nano": 1.021, "toy": 0.98}]
    write(tmp_path, "tricks/bench_tricks.json", rows)
    assert cells(tables.tricks(tmp_path))[1:] == [["less", "loss", "1.02", "0.98"]]
    assert tables.gpu(tmp_path) == "Nothing has been run on a GPU yet."


# --- markers

PAGE = """\
# Page

<!-- figures: gpu -->
| old | `\\1` |
<!-- /figures -->

in a sentence: `<!-- figures: kl -->` stays

<!-- figures: tricks -->
<!-- /figures -->
"""


def test_only_what_stands_between_the_markers_is_replaced():
    once = figures.replaced(PAGE, "gpu", "new \\1")
    before, after = PAGE.split("| old | `\\1` |\n")
    assert once == before + "\nnew \\1\n\n" + after
    assert figures.replaced(once, "gpu", "new \\1") == once
    assert figures.replaced(PAGE, "kl", "x") == PAGE


def test_markers_and_producers_are_compared(tmp_path, monkeypatch):
    used = {name: figures.FIGURES[name] for name in ("gpu", "tricks")}
    monkeypatch.setattr(figures, "FIGURES", used)
    write(tmp_path, "minirlhf/exact/README.md", PAGE)
    assert list(figures.problems(tmp_path)) == []
    write(tmp_path, "README.md", "<!-- figures: poetry -->\n<!-- /figures -->\n")
    assert list(figures.problems(tmp_path)) == [
        "README.md: nothing in tests/figures.py makes 'poetry'"
    ]
    for broken in ("<!-- figures: gpu -->", "<!-- /figures -->", "<!-- figures: gpu -->\n" * 2):
        write(tmp_path, "README.md", broken + "\n")
        (problem,) = figures.problems(tmp_path)
        assert problem.startswith("README.md: a marker is not followed by its end")
    (tmp_path / "README.md").unlink()
    write(tmp_path, "minirlhf/exact/README.md", "")
    assert list(figures.problems(tmp_path)) == [
        f"{name}: no README has a line <!-- figures: {name} -->" for name in used
    ]


def test_every_marker_has_a_producer_and_every_producer_a_marker():
    assert list(figures.problems(figures.ROOT)) == []


def test_every_figure_has_a_source_and_every_source_a_figure():
    assert {source for source, _ in figures.FIGURES.values()} == set(figures.SOURCES)


def test_what_the_commands_run_is_there():
    for source in figures.SOURCES.values():
        for command in source.commands:
            python, script, *_ = figures.argv(command)
            assert python == sys.executable
            assert script == "-m" or (figures.ROOT / script).exists(), command


# --- the command


def made(*code):
    """A source whose commands are Python."""
    return figures.Source(1, tuple(f"python {code}" for code in code), {"a.png": "published.png"})


def test_figures_are_measured_published_and_rendered_again(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text("open('a.png', 'w').write('drawn'); print('said')")
    monkeypatch.setitem(figures.SOURCES, "gpu", made(script))
    said = lambda folder: (folder / "output.txt").read_text().strip()  # noqa: E731
    monkeypatch.setattr(figures, "FIGURES", {"gpu": ("gpu", said), "kl": ("gradients", said)})
    root, folder = tmp_path / "root", tmp_path / "stored"
    write(root, "README.md", PAGE)
    write(root, "examples/published.png", "old")
    assert figures.remake(["gpu"], folder, stored=False, root=root) == 0
    assert "-->\n\nsaid\n\n<!--" in (root / "README.md").read_text()
    assert (root / "examples/published.png").read_text() == "drawn"
    (folder / "gpu/output.txt").write_text("said again")
    assert figures.remake(["gpu"], folder, stored=True, root=root) == 0
    assert "-->\n\nsaid again\n\n<!--" in (root / "README.md").read_text()
    assert figures.remake(["gpu", "kl"], folder, stored=True, root=root) == 1
    assert "kl\n  FAILED, left as it is: FileNotFoundError" in capsys.readouterr().out


def test_what_fails_or_lacks_something_leaves_its_table(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit('no luck')")
    monkeypatch.setitem(figures.SOURCES, "gpu", made(script))
    write(tmp_path, "README.md", PAGE)
    assert figures.remake(["gpu"], tmp_path / "out", stored=False, root=tmp_path) == 1
    assert "ended with status 1: no luck" in capsys.readouterr().out
    lacking = figures.Source(1, (f"python {script}",), needs=("no_such_module", "/no/such/file"))
    monkeypatch.setitem(figures.SOURCES, "gpu", lacking)
    assert figures.remake(["gpu"], tmp_path / "out2", stored=False, root=tmp_path) == 0
    said = capsys.readouterr().out
    assert "gpu: left as it is, for want of no_such_module, /no/such/file" in said
    assert (tmp_path / "README.md").read_text() == PAGE


def test_the_command(tmp_path, monkeypatch, capsys):
    assert figures.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in figures.FIGURES) and "0.1 min" in listed
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    assert figures.main(["--check"]) == 1
    assert "kl: no README has a line" in capsys.readouterr().out
    for arguments in (["poetry"], ["gpu", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            figures.main(arguments)
        assert stop.value.code == 2
