"""`minirlhf train`, `resume`, `score`, `sample` and `report`; their arguments are the options."""

import shlex
from pathlib import Path
from typing import Any

from minirlhf.app import api, coloured, page, pictures, tables
from minirlhf.app.options import SHOWN, Parser, of_command, of_config
from minirlhf.app.progress import say
from minirlhf.app.tables import show
from minirlhf.disk import shorten, to_json, write_whole
from minirlhf.errors import InputError
from minirlhf.fields import with_fields
from minirlhf.memory import require_memory
from minirlhf.ranks import leave_to_first
from minirlhf.runs.config import TrainConfig, flat, load_config
from minirlhf.runs.limits import samples_bytes
from minirlhf.runs.log import read_metrics
from minirlhf.runs.own_reward import refuse_foreign_code
from minirlhf.runs.session import Session, open_session, reopen_session
from minirlhf.train import recipes


def train(words: list[str]) -> int:
    """Supervised fine-tuning, reward model, PPO, into one run folder.
    Each option stands with its default.
    """
    return _finish(open_session(parse_config(words), **api.BARS))


def parse_config(words: list[str]) -> TrainConfig:
    """The configuration that is typed; or, by SystemExit, the help has been shown."""
    typed = _parser(TrainConfig()).read(words)
    everything = typed.pop("help_all", False)
    if typed.pop("help", everything):
        _parser(configured(**typed), everything=everything).print_help()
        raise SystemExit(0)
    config = configured(**typed)
    if "recipe" in typed:
        say(recipe_says(typed["recipe"], config))
    return config


def _parser(config: TrainConfig, *, everything: bool = False) -> Parser:
    """Of train; its help shows the options of SHOWN, or all of them by stage."""
    parser = Parser("train", train, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="Show what one needs")
    parser.add_argument("--help-all", action="store_true", help="Show every option")
    parser.add(of_command(configured))
    fields = {option.name.replace("_", "-"): option for option in of_config(config)}
    groups = SHOWN
    if everything:
        groups = {}
        for name in fields:
            groups.setdefault(name.rpartition(".")[0] or "the run", []).append(name)
    for title, names in groups.items():
        parser.add([fields.pop(name) for name in names], title)
    parser.add(fields.values(), None)
    return parser


def configured(
    *, config: str | None = None, recipe: str = "ppo", beta: float | None = None, **fields: Any
) -> TrainConfig:
    """The settings that a recipe, over it a file, and over both single fields make.

    Args:
        config: TOML like a run's; flags overrule it
        recipe: Settings of ppo, grpo, dr-grpo, dapo, rloo, gspo, cispo, dpo
        beta: Short for --ppo.kl-coef; in DPO --dpo.kl-coef
    """
    found = with_fields(TrainConfig(), recipes.recipe(recipe), "train")
    if config is not None:
        found, folder = load_config(config, found), Path(config).parent
        if "reward" not in fields and (folder / "world.json").exists():
            refuse_foreign_code(folder, found.reward)
    found = api.configured(found, "ppo", fields)
    if beta is not None:
        stage = "dpo" if found.is_dpo else "ppo"
        if f"{stage}.kl_coef" in fields:
            raise InputError(
                f"expected --beta or --{stage}.kl-coef, which is the same; got both: drop one"
            )
        found = with_fields(found, {stage: {"kl_coef": beta}}, "train")
    return found


def recipe_says(name: str, config: TrainConfig) -> str:
    """What a recipe has set in it, as one would type it, and what something else overruled."""
    lines: dict[bool, list[str]] = {True: [], False: []}
    now = dict(flat(config))
    for field, value in flat(recipes.recipe(name)):
        stage, dot, option = field.replace("_", "-").rpartition(".")
        words = f"--{stage}{dot}{'no-' * (value is False)}{option}"
        lines[now[field] == value].append(words + f" {value}" * (not isinstance(value, bool)))
    nothing = "nothing" if lines[False] else "the defaults"
    said = f"recipe {name}: {' '.join(lines[True]) or nothing}"
    return said + (f"; overruled: {' '.join(lines[False])}" if lines[False] else "")


def resume(
    run: Path, *, ppo__iterations: int = 0, reward: str = "", accept_changed_reward: bool = False
) -> int:
    """Go on with an interrupted run; it ends as if it had never been interrupted.

    A begun stage goes on from its last checkpoint.

    Args:
        run: Run folder.
        ppo__iterations: PPO goes on to so many in all; 0: as in config.toml.
        reward: Names the run's reward: where its file lies now, or as you trust its code.
        accept_changed_reward: Go on with the reward though its source has changed.
    """
    asked = {"reward": reward, "accept_changed_reward": accept_changed_reward}
    return _finish(reopen_session(run, iterations=ppo__iterations, **asked, **api.BARS))


def _finish(session: Session) -> int:
    _show_result(session, api.run_session(session))
    return 0


@leave_to_first
def _show_result(session: Session, result: Any) -> None:
    folder = session.folder
    if result is None:
        judged = session.world.reward or session.world.pairs or session.world.annotate
        how = f"minirlhf resume {shlex.quote(str(folder))}{'' if judged else ' --reward ..'}"
        show(f"done: {session.config.stages}; `{how}` goes on")
    else:
        show(*tables.result_in_full(result, session.world))
    figure = pictures.curves_figure(read_metrics(folder), result and result.policy)
    show(f"curves: {pictures.save(figure, folder / 'curves.png')}", f"run folder: {folder}")


def score(
    run: Path,
    *,
    prompt: str,
    response: tuple[str, ...],
    reward: str = "",
    json: bool = False,
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
        show(coloured.text(rows[0]), by_token, *_in_words(scores[0]))
    else:
        show(coloured.side_by_side(rows))
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
    run: Path,
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
    show(tables.replies_table(f"replies to {shorten(prompt)!r}", session.world, prompts, *replies))
    return 0


def report(runs: tuple[Path, ...] = (), *, out: Path | None = None, exact: bool = False) -> int:
    """One page to hand on: replies token by token, curves and how to read them.

    Several runs are laid over each other.

    Args:
        runs: Run folders, up to five.
        out: File; default: report.html in the folder of the run; of several runs, here.
        exact: Add the world whose optimum is known, with a slider for beta; needs no run.
    """
    path = page.report(runs, out=out, exact=exact)
    show(f"page: {path}, {path.stat().st_size / 1e6:.2f} MB, complete in itself")
    return 0
