"""What `minirlhf train`, `resume`, `score` and `sample` do; their arguments are the options."""

from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from minirlhf.app import tables
from minirlhf.app.api import open_run
from minirlhf.app.pictures import curves_figure, save
from minirlhf.app.progress import say, track
from minirlhf.errors import InputError
from minirlhf.runs.config import TrainConfig, load_config
from minirlhf.runs.log import read_jsonl
from minirlhf.runs.pipeline import run_stages
from minirlhf.runs.session import Session, open_session, reopen_session

TRAIN_HELP = """Supervised fine-tuning, reward model, PPO, into one run folder.

--config FILE reads a TOML file like a run's config.toml; flags overrule it.
--beta X is short for --ppo.kl-coef X, the weight of the KL penalty."""


def train(arguments: list[str]) -> int:
    """minirlhf train [--config FILE] [flags]."""
    return _show(open_session(parse_config(arguments), track=track, say=say))


def parse_config(arguments: list[str]) -> TrainConfig:
    """The configuration from flags, which overrule the file that `--config` names."""
    file, arguments = _take_option(arguments, "--config")
    beta, rest = _take_option(arguments, "--beta")
    return tyro.cli(
        TrainConfig,
        args=[*rest, "--ppo.kl-coef", beta] if beta else rest,
        prog="minirlhf train",
        default=load_config(file) if file else TrainConfig(),
        description=TRAIN_HELP,
    )


def _take_option(arguments: list[str], name: str) -> tuple[str, list[str]]:
    """The value of `name VALUE` or `name=VALUE`, and the other arguments."""
    for i, argument in enumerate(arguments):
        if argument == name:
            if i + 1 == len(arguments):
                raise InputError(f"{name}: expected a value after it; got nothing: name one")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith(name + "="):
            return argument.removeprefix(name + "="), arguments[:i] + arguments[i + 1 :]
    return "", arguments


def resume(run: tyro.conf.Positional[Path]) -> int:
    """Go on with an interrupted run; its result is that of a run that was never interrupted.

    PPO goes on from its last checkpoint; the other stages (supervised fine-tuning, reward model)
    start again if they were not finished.

    Args:
        run: Run folder.
    """
    return _show(reopen_session(run, track=track, say=say))


def _show(session: Session) -> int:
    with np.errstate(all="ignore"):  # what is not finite is looked for at every update
        result = run_stages(session)
    console, folder = _console(), session.folder
    tables.print_result(result, session.world, console)
    picture = save(curves_figure(read_jsonl(folder / "metrics.jsonl")), folder / "curves.png")
    console.print(f"curves: {picture}", soft_wrap=True)
    console.print(f"run folder: {folder}", soft_wrap=True)
    return 0


def score(run: tyro.conf.Positional[Path], *, prompt: str, response: str) -> int:
    """The penalty of one response: log pi_theta - log pi_ref, token by token.

    Args:
        run: Run folder of a finished run.
        prompt: The prompt x.
        response: The response y.
    """
    scores = open_run(run).score(prompt, response)
    console = _console()
    console.print(tables.penalty_table(scores.tokens, scores.logp, scores.ref_logp))
    console.print(
        f"log Pr_theta(y|x) - log Pr_ref(y|x) = {scores.kl_seq:+.4f} nats", soft_wrap=True
    )
    console.print(
        f"score {scores.score:+.4f}; with beta = {scores.kl_coef:g}: score - beta * Penalty = "
        f"{scores.objective:+.4f}",
        soft_wrap=True,
    )
    if scores.gold is not None:
        console.print(f"gold reward {scores.gold:+.2f}")
    return 0


def sample(
    run: tyro.conf.Positional[Path],
    *,
    prompt: str,
    n: int = 3,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> int:
    """Replies of the policy and of the reference to one prompt, side by side.

    Args:
        run: Run folder of a finished run.
        prompt: The prompt x.
        n: Replies of each.
        temperature: Of the sampling; 0 takes the most likely token.
        top_k: Keep the k most likely tokens; 0: all.
        top_p: Keep the most likely tokens that hold this mass; 1: all.
        seed: Of the sampling.
    """
    if n < 1:
        raise InputError(f"sample: expected n >= 1; got {n}: choose such a number")
    opened = open_run(run)
    same = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    before, after = (opened.sample([prompt] * n, reference=ref, **same) for ref in (True, False))
    table = Table(title=f"replies to {prompt!r}", show_lines=True)
    for name in ("reference", "policy"):
        table.add_column(name, ratio=1, overflow="fold")
    for replies in zip(before, after, strict=True):
        world = opened.session.world
        table.add_row(*(tables.reply_cell(world, prompt, reply) for reply in replies))
    _console().print(table)
    return 0


def _console() -> Console:
    """Standard output; brackets and colons in texts of the user mean themselves."""
    return Console(markup=False, emoji=False)
