"""The command line: minirlhf train | resume | score | sample | exact | check."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from minirlhf import __version__
from minirlhf.app.check import check_command
from minirlhf.app.exact import ExactOptions, exact_command
from minirlhf.app.progress import track
from minirlhf.app.tables import gold_or_none, penalty_table, print_result, reply_cell, save_curves
from minirlhf.backend import keep_freed_memory, to_host
from minirlhf.errors import InputError
from minirlhf.rlhf.kl import summed_penalty
from minirlhf.runs import pipeline
from minirlhf.runs.config import TrainConfig, load_config
from minirlhf.runs.folder import last_kl_coef
from minirlhf.runs.run import Run, open_run, open_saved_run
from minirlhf.train.batches import pad_batch
from minirlhf.train.policy import policy_forward
from minirlhf.train.rollout import Samples
from minirlhf.tree import Tree

USAGE = """\
minirlhf: RLHF policy optimisation, from scratch, with the exact gradients

  minirlhf train                  SFT, reward model and PPO on the support world; before and after
  minirlhf resume RUN             go on from the last checkpoint
  minirlhf score RUN --prompt .. --response ..    log pi_theta - log pi_ref, token by token
  minirlhf sample RUN --prompt ..                 replies of policy and reference side by side
  minirlhf exact                  the exact optimum, KL and gradients beside every estimate
  minirlhf check                  check every gradient of the package

minirlhf COMMAND --help shows the options of a command. With MINIRLHF_TRACEBACK=1 in the environment
a refusal shows where in the program it came from.
"""


@dataclass(frozen=True)
class ResumeOptions:
    """Go on with an interrupted run; its result is that of a run that was never interrupted.

    PPO goes on from its last checkpoint; the other stages (supervised fine-tuning, reward model)
    start again if they were not finished."""

    run: tyro.conf.Positional[Path]
    """Run folder."""


@dataclass(frozen=True)
class ScoreOptions:
    """The penalty of one response: log pi_theta - log pi_ref, token by token."""

    run: tyro.conf.Positional[Path]
    """Run folder of a finished run."""
    prompt: str
    """The prompt x."""
    response: str
    """The response y."""


@dataclass(frozen=True)
class SampleOptions:
    """Replies of the policy and of the reference to one prompt, side by side."""

    run: tyro.conf.Positional[Path]
    """Run folder of a finished run."""
    prompt: str
    """The prompt x."""
    n: int = 3
    """Replies of each."""
    temperature: float = 1.0
    """Of the sampling; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Keep the most likely tokens that hold this mass; 1: all."""
    seed: int = 0
    """Of the sampling."""


@dataclass(frozen=True)
class CheckOptions:
    """Check every hand-written gradient by complex step and by central differences."""

    seed: int = 0
    """Of the arrays."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit status 0: done; 1: a check failed; 2: the input was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    keep_freed_memory()
    if hasattr(sys.stdout, "reconfigure"):  # what the terminal cannot show becomes a "?"
        sys.stdout.reconfigure(errors="replace")
    try:
        status = run_command(arguments)
    except InputError as error:
        if os.environ.get("MINIRLHF_TRACEBACK"):
            raise
        print(f"minirlhf: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        goes_on = "; `minirlhf resume RUN` goes on" if arguments[0] in ("train", "resume") else ""
        print(f"minirlhf: interrupted{goes_on}", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output has gone: `minirlhf check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def run_command(arguments: list[str]) -> int:
    """Dispatch on the first word."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "resume": resume,
        "score": score,
        "sample": sample,
        "exact": exact,
        "check": check,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(f"minirlhf {__version__}")
        return 0
    name, *rest = arguments
    if name not in commands:
        raise InputError(
            f"expected one of {', '.join(commands)}; got {name!r}: see minirlhf --help"
        )
    return commands[name](rest)


def parse(kind: type, command: str, arguments: list[str], **options):
    """Options of a command from its flags, by tyro."""
    return tyro.cli(kind, args=arguments, prog=f"minirlhf {command}", **options)


def train(arguments: list[str]) -> int:
    """minirlhf train [--config FILE] [flags]: the flags overrule the file."""
    config_file, arguments = _take_option(arguments, "--config")
    config = parse(
        TrainConfig,
        "train",
        arguments,
        default=load_config(config_file) if config_file else TrainConfig(),
        description=(TrainConfig.__doc__ or "")
        + "\n\n--config FILE reads a TOML file like a run's config.toml; flags overrule it.",
    )
    return _show(open_run(config, track=track, say=_say))


def resume(arguments: list[str]) -> int:
    """minirlhf resume RUN."""
    options = parse(ResumeOptions, "resume", arguments)
    return _show(open_saved_run(options.run, track=track, say=_say))


def _show(run: Run) -> int:
    with np.errstate(all="ignore"):  # what is not finite is looked for at every update
        result = pipeline.run_stages(run)
    console = _console()
    print_result(result, run.world, console)
    console.print(f"curves: {save_curves(run.folder)}", soft_wrap=True)
    console.print(f"run folder: {run.folder}", soft_wrap=True)
    return 0


def score(arguments: list[str]) -> int:
    """minirlhf score RUN --prompt X --response Y."""
    options = parse(ScoreOptions, "score", arguments)
    run, policy, reference = _open_finished(options.run)
    _refuse_to_cut(run, prompt=options.prompt, response=options.response)
    prompt_ids = run.prompt_ids(options.prompt)
    response_ids = run.response_ids(options.response)
    batch = pad_batch([prompt_ids], [response_ids], pad_id=run.tokenizer.pad, config=run.gpt)
    how = {"batch": batch, "config": run.gpt, "temperature": run.config.ppo.temperature}
    logp, ref_logp = (
        policy_forward(params, **how, keep=False)[0].logp for params in (policy, reference)
    )
    pieces = run.tokenizer.pieces(batch.responses[0].tolist())
    logp64, ref_logp64 = (to_host(a).astype(np.float64) for a in (logp, ref_logp))
    penalty = summed_penalty(logp64, ref_logp64, mask=batch.response_mask.astype(np.float64))[0]
    console = _console()
    console.print(penalty_table(pieces, logp64[0], ref_logp64[0]))
    console.print(f"log Pr_theta(y|x) - log Pr_ref(y|x) = {penalty:+.4f} nats", soft_wrap=True)
    scoring = run.score_with(pipeline.reward_stage(run, reference))
    samples = Samples([options.prompt], [options.response], [prompt_ids], [response_ids], batch)
    proxy = scoring(samples)[0]
    beta = last_kl_coef(run)
    console.print(
        f"score {proxy:+.4f}; with beta = {beta:g}: score - beta * Penalty = "
        f"{proxy - beta * penalty:+.4f}",
        soft_wrap=True,
    )
    gold = gold_or_none(run.world, options.prompt, options.response)
    if gold is not None:
        console.print(f"gold reward {gold:+.2f}")
    return 0


def sample(arguments: list[str]) -> int:
    """minirlhf sample RUN --prompt X."""
    options = parse(SampleOptions, "sample", arguments)
    if not (
        options.n >= 1 and options.top_k >= 0 and 0 < options.top_p <= 1
    ) or not 0 <= options.temperature < float("inf"):
        raise InputError(
            "sample: expected n >= 1, a finite temperature >= 0, top_k >= 0 and 0 < top_p <= 1; "
            f"got {options.n}, {options.temperature}, {options.top_k} and {options.top_p}"
        )
    _refuse_negative(options.seed)
    run, policy, reference = _open_finished(options.run)
    _refuse_to_cut(run, prompt=options.prompt)
    table = Table(title=f"replies to {options.prompt!r}", show_lines=True)
    table.add_column("reference", ratio=1)
    table.add_column("policy", ratio=1)
    columns = []
    for params in (reference, policy):
        samples = run.sample(
            params,
            [options.prompt] * options.n,
            np.random.default_rng(options.seed),
            options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
        columns.append(
            [reply_cell(run.world, options.prompt, reply) for reply in samples.responses]
        )
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    _console().print(table)
    return 0


def check(arguments: list[str]) -> int:
    """minirlhf check."""
    options = parse(CheckOptions, "check", arguments)
    _refuse_negative(options.seed)
    return check_command(seed=options.seed)


def exact(arguments: list[str]) -> int:
    """minirlhf exact."""
    return exact_command(parse(ExactOptions, "exact", arguments))


def _open_finished(folder: Path) -> tuple[Run, Tree, Tree]:
    """A run with its policy and its reference, on the CPU."""
    run = open_saved_run(folder, device="cpu", look=True)
    policy, reference = pipeline.load_models(run)
    return run, policy, reference


def _refuse_negative(seed: int) -> None:
    if seed < 0:
        raise InputError(f"--seed: expected at least 0; got {seed}: choose such a number")


def _refuse_to_cut(run: Run, *, prompt: str, response: str = "") -> None:
    """Training cuts texts that are too long; numbers that a person asked for are of the whole."""
    for name, ids, limit in (
        ("prompt", run.tokenizer.prompt_ids(prompt), run.max_prompt_tokens),
        ("response", run.tokenizer.response_ids(response), run.max_response_tokens),
    ):
        if len(ids) > limit:
            raise InputError(
                f"{name}: expected at most {limit} tokens, as in training; got {len(ids)}: "
                f"shorten it, or train with a larger --max-{name}-tokens"
            )


def _console() -> Console:
    """Standard output; brackets and colons in texts of the user mean themselves."""
    return Console(markup=False, emoji=False)


def _take_option(arguments: list[str], name: str) -> tuple[str, list[str]]:
    """The value of `name VALUE` or `name=VALUE`, and the other arguments."""
    for i, argument in enumerate(arguments):
        if argument == name:
            if i + 1 == len(arguments):
                raise InputError(f"{name}: expected a file after it; got nothing: name one")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith(name + "="):
            return argument.removeprefix(name + "="), arguments[:i] + arguments[i + 1 :]
    return "", arguments


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
