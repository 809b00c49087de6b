"""Results a person looks at: the final table, replies side by side, curves, a penalty on a text."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minirlhf.runs.log import read_jsonl
from minirlhf.runs.pipeline import Result
from minirlhf.worlds.world import World

ROWS = {  # metric of `evaluate.response_metrics` -> (label, format)
    "proxy": ("proxy reward (what training sees)", "{:.2f}"),
    "gold": ("gold reward (what is wanted)", "{:.2f}"),
    "reward": ("your reward", "{:.3f}"),
    "kl_seq": ("kl_seq, sum of log-ratios [nats]", "{:.2f}"),
    "kl_full_seq": ("kl_full_seq, whole vocabulary [nats]", "{:.2f}"),
    "entropy": ("entropy [nats per token]", "{:.2f}"),
    "length": ("length [tokens]", "{:.1f}"),
    "distinct_2": ("distinct-2, all replies", "{:.3f}"),
    "repeated_bigrams": ("repeated bigrams inside a reply", "{:.3f}"),
    "ended": ("replies that end by themselves", "{:.2f}"),
}


def print_result(result: Result, world: World, console: Console, *, n_samples: int = 6) -> None:
    """The table *reference vs policy* on held-out prompts, then replies before and after."""
    n = len(result.prompts)
    table = Table(title=f"{n} replies to held-out prompts of the world {world.name!r}")
    for column in ("", "reference", "policy"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, (label, form) in ROWS.items():
        if np.isfinite(result.policy[name]):
            table.add_row(
                Text(label), form.format(result.reference[name]), form.format(result.policy[name])
            )
    console.print(table)
    console.print(samples_table(result, world, n_samples))
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    total = sum(result.seconds.values())
    console.print(f"training time in this session: {stages}; {total:.0f} s in all")


def samples_table(result: Result, world: World, n: int) -> Table:
    """Prompt, reply of the reference, reply of the policy, with the gold reward of each."""
    table = Table(title="before and after", show_lines=True)
    for column in ("prompt", "reference", "policy"):
        table.add_column(column, ratio=1)

    for prompt, before, after in list(
        zip(
            result.prompts,
            result.reference_samples.responses,
            result.policy_samples.responses,
            strict=True,
        )
    )[:n]:
        cells = (reply_cell(world, prompt, reply) for reply in (before, after))
        table.add_row(Text(printable(prompt)), *cells)
    return table


def gold_or_none(world: World, prompt: str, reply: str) -> float | None:
    """The gold reward, or None where the world has none for this prompt."""
    try:
        return world.gold(prompt, reply) if world.gold else None
    except ValueError:  # a prompt that the world does not know
        return None


def reply_cell(world: World, prompt: str, reply: str) -> Text:
    """A reply, and its gold reward below it in green or red."""
    text = Text(printable(reply))
    gold = gold_or_none(world, prompt, reply)
    if gold is not None:
        text.append(f"\ngold {gold:+.2f}", style="green" if gold > 0 else "red")
    return text


def printable(text: str) -> str:
    """The text with control characters, which an untrained policy may write, as a replacement."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def save_curves(folder: Path) -> Path:
    """curves.png: reward, KL, entropy and repetition of the PPO stage against its iterations."""
    from matplotlib.figure import Figure

    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["stage"] == "ppo"]
    panels = [
        ("reward", [("objective/scores", "proxy"), ("objective/gold", "gold")]),
        ("KL to the reference [nats per reply]", [("objective/kl", "kl_seq")]),
        ("entropy [nats per token]", [("policy/entropy_avg", "entropy")]),
        ("reply length [tokens]", [("response_length/mean", "length")]),
    ]
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for key, label in lines:
            points = [(row["step"] + 1, row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("PPO iteration", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    path = folder / "curves.png"
    figure.savefig(path, dpi=130)
    return path


def penalty_table(pieces: list[str], logp: np.ndarray, ref_logp: np.ndarray) -> Table:
    """Token by token: log pi_theta, log pi_ref, their difference; the last row is the sum [nats].

    Where the terminal is narrow the tokens are folded; the numbers are never cut.
    """
    table = Table(
        title="Penalty = sum over tokens of  log pi_theta - log pi_ref  [nats]",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("token", overflow="fold", min_width=1)
    for column in ("log\npi_theta", "log\npi_ref", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    difference = logp - ref_logp
    for piece, ours, theirs, d in zip(pieces, logp, ref_logp, difference, strict=True):
        style = "red" if d > 0.5 else "blue" if d < -0.5 else ""
        table.add_row(
            Text(repr(piece)[1:-1]), f"{ours:.4f}", f"{theirs:.4f}", Text(f"{d:+.4f}", style)
        )
    table.add_section()
    table.add_row(
        *("sum", f"{logp.sum():.4f}", f"{ref_logp.sum():.4f}"),
        Text(f"{difference.sum():+.4f}", "bold"),
    )
    return table
