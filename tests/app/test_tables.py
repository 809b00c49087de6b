"""Tables in a terminal, wide or narrow, or in a pipe: no number is cut or folded."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from minirlhf.app import check, exact
from minirlhf.app.check import Result
from minirlhf.app.tables import ROWS, penalty_table, result_in_full
from minirlhf.worlds.world import World

NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]\d+)?")
ELLIPSIS = "\u2026"
rng = np.random.default_rng(0)


class Recorder(Console):
    """A console of some width without a terminal behind it; remembers the tables it was given."""

    def __init__(self, width):
        super().__init__(width=width, file=io.StringIO(), markup=False, emoji=False)
        self.tables = []

    def print(self, *objects, **options):
        self.tables += [thing for thing in objects if hasattr(thing, "columns")]
        super().print(*objects, **options)

    @property
    def lines(self):
        return self.file.getvalue().splitlines()


def history(*, iterations=2, depths=6):
    """Numbers as wide as a run can make them: one that has gone badly wrong."""
    end = {
        "exact/fraction": -13.43881,
        "exact/kl_seq": 1234.5678,
        "exact/gold": -12.3456,
        "exact/flatness": 1.23e-15,
        "exact/reward": -3.45678,
        "exact/gap_by_depth": [2.40647] * depths,
    }
    return [{**end, "iteration": i} for i in range(iterations)]


RUNS = [
    {
        "name": name,
        "kl_coef": beta,
        "seed": seed,
        "iterations": 150,
        "seconds": 120.4,
        "frontier": 3.45678,
        "history": history(),
    }
    for name in ("PPO, linear decay", "min(ratio, 1 + e) A (textbook)")
    for beta in (0.25, 10.0)
    for seed in (0, 1)
]
KL = [
    {
        "name": "k3 as loss, per token (GRPO)",
        "sampler": sampler,
        "gives": "g - k3 as loss",
        "error": 6.9e-16,
        "right": False,
        "cosine": -0.6874,
        "noise": 123462.123,
    }
    for sampler in ("theta", "old", "ref")
]
CHECKED = [
    Result(
        "train/ppo.py",
        "kl_loss: reward_and_loss_full",
        "logits, logp",
        1234567,
        [1.2e-16, 1e-9, 0.0],
        "",
    ),
    Result("whole losses", "PPO: loss_rho_k3_tok", "30 tensors", 1921, [2.5e-14], "bad"),
]


def results():
    """A finished run of the support world."""
    numbers = dict.fromkeys(ROWS, -123.4567)
    samples = SimpleNamespace(responses=["It is on its way."] * 2)
    return SimpleNamespace(
        prompts=["Where is my kettle?"] * 2,
        reference=numbers,
        policy=numbers,
        reference_samples=samples,
        policy_samples=samples,
        seconds={"sft": 1.0},
    )


WORLD = World("support", [], [], [], gold=lambda prompt, reply: -12.345)
SHOWN = {
    "kl": lambda console: console.print(*exact.kl_tables(KL)),
    "runs of one seed": lambda console: console.print(*exact.optimum_tables(RUNS[::2])),
    "runs": lambda console: console.print(*exact.optimum_tables(RUNS)),
    "check": lambda console: console.print(check.results_table(CHECKED)),
    "train": lambda console: console.print(*result_in_full(results(), WORLD)),
    "score": lambda console: console.print(
        penalty_table(["a-long-token"] * 3, *(1000 * rng.standard_normal((2, 3))))
    ),
}


def cells(table):
    """The text of every cell."""
    for column in table.columns:
        yield from (str(cell) for cell in column.cells)


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("shown", SHOWN)
def test_every_number_is_whole(shown, width):
    console = Recorder(width)
    SHOWN[shown](console)
    assert console.tables
    assert ELLIPSIS not in console.file.getvalue()
    assert max(map(len, console.lines)) <= width
    text = " ".join(console.lines)
    found = NUMBER.findall(text)
    for table in console.tables:
        for number in (n for cell in cells(table) for n in NUMBER.findall(cell)):
            assert number in found, f"{number} is nowhere in one piece:\n" + "\n".join(
                console.lines
            )


def test_a_cut_number_would_be_seen():
    """The test above can fail: a table of Rich's own cuts or folds."""
    table = Table()
    for head in ("name", "first", "second"):
        table.add_column(head)
    table.add_row("a long name of something", "123456.789", "987654.321")
    console = Recorder(20)
    console.print(table)
    text = console.file.getvalue()
    assert ELLIPSIS in text or "123456.789" not in text


def as_text(table, *, width):
    """What a terminal of this width shows."""
    console = Recorder(width)
    console.print(table)
    return console.file.getvalue()


def test_penalty_table_sums_its_tokens():
    logp, ref_logp = np.array([-1.0, -2.5, -0.5]), np.array([-1.5, -2.0, -3.0])
    text = as_text(penalty_table(["[a]", " b", "\\n"], logp, ref_logp), width=80)
    assert "\\n" in text and "\\\\" not in text  # as it came
    assert "[a]" in text and "-4.0000" in text and "-6.5000" in text
    assert "+2.5000" in text.splitlines()[-2]  # 0.5 - 0.5 + 2.5


def test_penalty_table_in_a_narrow_terminal_cuts_no_number():
    logp, ref_logp = np.array([-10.125, -0.5, -99.0]), np.array([-11.0, -123.4567, -1.0])
    text = as_text(penalty_table([" a-long-token", "b", " c"], logp, ref_logp), width=40)
    assert ELLIPSIS not in text and max(map(len, text.splitlines())) <= 40
    for number in ("-10.1250", "-123.4567", "+122.9567", "-109.6250", "-135.4567", "+25.8317"):
        assert number in text, number
    rows = (line.split("\u2502")[1] for line in text.splitlines() if "\u2502" in line)
    tokens = "".join(cell.strip() for cell in rows)
    assert tokens == "a-long-tokenbcsum"  # folded, all of it


def test_the_words_of_the_final_table_are_explained_below_it():
    console = Recorder(80)
    console.print(*result_in_full(results(), WORLD))
    said = " ".join(" ".join(console.lines).split())
    for word in ("proxy: ", "gold: ", "distinct-2: "):
        assert said.count(word) == 1, word
    without = results()
    for numbers in (without.reference, without.policy):
        numbers["gold"] = float("nan")
    console = Recorder(80)
    console.print(*result_in_full(without, World("names", [], [], [])))
    assert "gold" not in console.file.getvalue()
