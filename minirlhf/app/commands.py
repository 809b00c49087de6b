"""What `minirlhf train`, `resume`, `score` and `sample` do; their arguments are the options."""

import argparse
import functools
import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from minirlhf.app import api, options, pictures, tables
from minirlhf.app.diagnose import check_names
from minirlhf.app.progress import say, track
from minirlhf.disk import shorten
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
    return _show(open_session(parse_config(arguments), track=track, say=say))


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
    return _show(reopen_session(run, iterations=iterations, track=track, say=say, **asked))


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


def score(run: tyro.conf.Positional[Path], *, prompt: str, response: str, reward: str = "") -> int:
    """The penalty of one response: log pi_theta - log pi_ref, token by token.

    Args:
        run: Run folder.
        prompt: The prompt x.
        response: The response y.
        reward: Names the run's reward: where its file lies now, or as you trust its code.
    """
    scores = api.open_run(run, reward=reward).score(prompt, response)
    _print(
        tables.penalty_table(scores.tokens, scores.logp, scores.ref_logp),
        f"log Pr_theta(y|x) - log Pr_ref(y|x) = {scores.kl_seq:+.4f} nats",
        f"no score: {scores.no_score}"
        if scores.no_score
        else f"score {scores.score:+.4f}; with beta = {scores.kl_coef:g}: "
        f"score - beta * Penalty = {scores.objective:+.4f}",
    )
    if scores.reward is not None and not scores.no_score:
        _print(f"your reward {scores.reward:.6g}")
    if scores.gold is not None:
        _print(f"gold reward {scores.gold:+.2f}")
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
    require_memory({"--n": samples_bytes(session.gpt, n, (2, session.max_response_tokens))})
    same = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    prompts = [prompt] * n
    shown = (True, False) if opened.is_trained else (True,)
    replies = (opened.sample(prompts, reference=which, **same) for which in shown)
    _print(
        tables.replies_table(f"replies to {shorten(prompt)!r}", session.world, prompts, *replies)
    )
    return 0


def _print(*things: Any) -> None:
    """Texts, unbroken, and tables; brackets and colons in texts of the user mean themselves."""
    console = _console()
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str))


def _console() -> Console:
    return Console(markup=False, emoji=False, highlight=False)
