"""`minirlhf train`, `resume`, `score`, `sample` and `report`; their arguments are the options."""

import argparse
import functools
import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from minirlhf.app import api, coloured, options, page, pictures, tables
from minirlhf.app.diagnose import check_names
from minirlhf.app.progress import say, track, watch
from minirlhf.disk import shorten, to_json, write_whole
from minirlhf.errors import InputError
from minirlhf.memory import require_memory
from minirlhf.runs.config import TrainConfig, load_config
from minirlhf.runs.log import read_metrics
from minirlhf.runs.own_reward import refuse_foreign_code
from minirlhf.runs.session import Session, open_session, reopen_session
from minirlhf.runs.sizes import samples_bytes
from minirlhf.train import recipes
from minirlhf.train.settings import with_fields


def train(arguments: list[str]) -> int:
    """minirlhf train [--config FILE] [--recipe NAME] [flags]."""
    return _show(open_session(parse_config(arguments), track=track, say=say, watch=watch))


def parse_config(arguments: list[str]) -> TrainConfig:
    """The configuration from flags, which overrule `--config`, which overrules `--recipe`.

    Raises:   InputError: a flag, the file or the recipe is wrong.
              SystemExit: the help was asked for, and has been shown.
    """
    ours = argparse.ArgumentParser(
        prog="minirlhf train",
        usage="%(prog)s [OPTIONS]",
        description="Supervised fine-tuning, reward model, PPO, into one run folder. Each option "
        "stands with its default.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30),
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
    )
    ours.add_argument("-h", "--help", action="store_true", help="Show what one needs")
    ours.add_argument("--help-all", action="store_true", help="Show every option")
    ours.add_argument("--config", metavar="FILE", help="TOML like a run's; flags overrule it")
    ours.add_argument("--recipe", metavar="NAME", help=f"Settings of {', '.join(recipes.RECIPES)}")
    ours.add_argument("--beta", metavar="X", help="Short for --ppo.kl-coef; in DPO --dpo.kl-coef")
    try:
        named, rest = ours.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}; got none: name one") from error
    start = TrainConfig()
    if named.recipe is not None:
        start = with_fields(start, recipes.recipe(named.recipe), "train")
    if named.config is not None:
        start = load_config(named.config, start)
    if named.help or named.help_all:
        options.add_help(ours, start, everything=named.help_all)
        print(ours.format_help(), end="")
        raise SystemExit(0)
    of_run = named.config and Path(named.config).with_name("world.json").exists()
    if of_run and not any(word.partition("=")[0] == "--reward" for word in rest):
        refuse_foreign_code(Path(named.config).parent, start.reward)
    known = [name for names, *_ in options.options_of(start) for name in names]
    known += ["config", "recipe", "beta"]
    config = options.read(TrainConfig, rest, "train", known, default=start)
    if named.beta is not None:
        flag = f"--{'dpo' if config.is_dpo else 'ppo'}.kl-coef"
        if any(word.partition("=")[0].replace("_", "-") == flag for word in rest):
            raise InputError(f"expected --beta or {flag}, which is the same; got both: drop one")
        config = options.read(TrainConfig, [flag, named.beta], "train", known, default=config)
    check_names(config.halt_on)
    if named.recipe is not None:
        say(recipes.says(named.recipe, config))
    return config


def resume(
    run: tyro.conf.Positional[Path],
    *,
    iterations: Annotated[int, tyro.conf.arg(name="ppo.iterations")] = 0,
    reward: str = "",
    accept_changed_reward: bool = False,
) -> int:
    """Go on with an interrupted run; it ends as if it had never been interrupted.

    A begun stage goes on from its last checkpoint.

    Args:
        run: Run folder.
        iterations: PPO goes on to so many in all; 0: as in config.toml.
        reward: Names the run's reward: where its file lies now, or as you trust its code.
        accept_changed_reward: Go on with the reward though its source has changed.
    """
    asked = {"reward": reward, "accept_changed_reward": accept_changed_reward}
    asked |= {"iterations": iterations, "track": track, "say": say, "watch": watch}
    return _show(reopen_session(run, **asked))


def _show(session: Session) -> int:
    result, folder, console = api.run_session(session), session.folder, _console()
    if result is None:
        judged = session.world.reward or session.world.pairs or session.world.annotate
        how = f"minirlhf resume {shlex.quote(str(folder))}{'' if judged else ' --reward ..'}"
        _print(f"done: {session.config.stages}; `{how}` goes on")
    else:
        tables.print_result(result, session.world, console)
    figure = pictures.curves_figure(read_metrics(folder), result and result.policy)
    _print(f"curves: {pictures.save(figure, folder / 'curves.png')}", f"run folder: {folder}")
    return 0


def score(
    run: tyro.conf.Positional[Path],
    *,
    prompt: str,
    response: tuple[str, ...],
    reward: str = "",
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
    html: Path | None = None,
    png: Path | None = None,
) -> int:
    """The penalty of a response, or of several: log pi_theta - log pi_ref by token.

    Args:
        run: Run folder.
        prompt: The prompt x.
        response: The response y; several are shown side by side.
        reward: Names the run's reward: where its file lies now, or as you trust its code.
        json: Print every number of every token instead.
        html: Write a page to this file.
        png: Draw a picture into this file.
    """
    if not response:
        raise InputError("--response: expected a text; got none: write one, or several")
    for option, path, kind in (("--html", html, ".html"), ("--png", png, ".png")):
        if path and path.suffix != kind:
            raise InputError(f"{option}: expected a name in {kind}; got {path}: name such a file")
    opened = api.open_run(run, reward=reward)
    scores = [opened.score(prompt, text) for text in response]
    rows = [of._asdict() for of in scores]
    if json:
        print(to_json({"scores": rows}).decode(), end="")
    elif len(rows) == 1:
        by_token = tables.penalty_table(scores[0].pieces, scores[0].logp, scores[0].ref_logp)
        _print(coloured.text(rows[0]), by_token, *_in_words(scores[0]))
    else:
        _print(coloured.side_by_side(rows))
    if html:
        write_whole(html, coloured.html(rows, document=True).encode())
        say(f"page: {html}")
    if png:
        headings = (f"reply {number} to {shorten(prompt)!r}" for number in range(1, len(rows) + 1))
        say(f"picture: {coloured.picture(dict(zip(headings, rows, strict=True)), png)}")
    return 0


def _in_words(of: api.TokenScores) -> list[str]:
    lines = [f"log Pr_theta(y|x) - log Pr_ref(y|x) = {of.kl_seq:+.4f} nats"]
    if of.no_score:
        lines.append(f"no score: {of.no_score}")
    else:
        lines.append(
            f"score {of.score:+.4f}; with beta = {of.kl_coef:g}: "
            f"score - beta * Penalty = {of.objective:+.4f}"
        )
    if of.reward is not None and not of.no_score:
        lines.append(f"your reward {of.reward:.6g}")
    if of.gold is not None:
        lines.append(f"gold reward {of.gold:+.2f}")
    return lines


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
        run: Run folder.
        prompt: The prompt x.
        n: Replies of each.
        temperature: Of the sampling; 0 takes the most likely token.
        top_k: Keep the k most likely tokens; 0: all.
        top_p: Keep the most likely tokens that hold this mass; 1: all.
        seed: Of the sampling.
    """
    if n < 1:
        raise InputError(f"sample: expected n >= 1; got {n}: choose such a number")
    opened = api.open_run(run)
    session = opened.session
    require_memory({"--n": samples_bytes(session.gpt, n, (2, session.longest[1]))})
    same = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    prompts = [prompt] * n
    shown = (True, False) if opened.is_trained else (True,)
    replies = (opened.sample(prompts, reference=which, **same) for which in shown)
    _print(
        tables.replies_table(f"replies to {shorten(prompt)!r}", session.world, prompts, *replies)
    )
    return 0


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (),
    *,
    out: Path | None = None,
    exact: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """One page to hand on: replies token by token, curves and how to read them.

    Several runs are laid over each other.

    Args:
        runs: Run folders, up to five.
        out: File; default: report.html in the folder of the run; of several runs, here.
        exact: Add the world whose optimum is known, with a slider for beta; needs no run.
    """
    path = page.report(runs, out=out, exact=exact)
    _print(f"page: {path}, {path.stat().st_size / 1e6:.2f} MB, complete in itself")
    return 0


def _print(*things: Any) -> None:
    """Texts, unbroken, and tables; brackets and colons in texts of the user mean themselves."""
    console = _console()
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str))


def _console() -> Console:
    return Console(markup=False, emoji=False, highlight=False)
