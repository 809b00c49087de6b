"""RLHF from Python: train, open a run, sample from it, score with it, look at its curves.

    run = minirlhf.train(corpus="names.txt", reward=my_reward, ppo={"iterations": 10})
    run.sample(["A"])                  replies of the policy
    run.score("A", "nna").kl_seq       the penalty of a reply [nats]
    run.curves()                       a figure

The command line does its work through the same functions.
"""

from dataclasses import is_dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minirlhf.app import coloured, pictures, tables
from minirlhf.app.diagnose import check_names, watched
from minirlhf.app.progress import say, track, watch
from minirlhf.disk import read_object
from minirlhf.errors import InputError
from minirlhf.fields import with_fields
from minirlhf.memory import keep_freed_memory
from minirlhf.nn.sampling import Sampling
from minirlhf.runs import pipeline
from minirlhf.runs.config import TrainConfig
from minirlhf.runs.folder import is_saved, last_kl_coef
from minirlhf.runs.log import read_metrics
from minirlhf.runs.session import Session, open_session, reopen_session
from minirlhf.runs.snapshots import token_rows
from minirlhf.train import recipes
from minirlhf.train.batches import pad_batch
from minirlhf.train.rollout import Samples
from minirlhf.worlds.rewards import Reward
from minirlhf.worlds.world import World

BARS = {"track": track, "say": say, "watch": watch}


def train(
    config: TrainConfig | None = None,
    *,
    reward: Reward = "",
    recipe: str = "ppo",
    progress: bool = True,
    **changes: Any,
) -> "Run":
    """Supervised fine-tuning, reward model, PPO (or DPO); what `minirlhf train` does.

    Args:     config: settings to start from; None: the defaults.
              reward: of your own, in the place of a reward model: a function of the text, of
                  (prompt, response), or of lists of them (texts, or prompts and responses); or the
                  name of one, file.py:function, or of a ready-made one, like length.
              recipe: whose settings to change: grpo, dr-grpo, dapo, rloo, gspo, cispo, dpo.
              progress: show bars and notes on stderr.
              changes: fields of TrainConfig; a nested one as a dataclass or a dict, like
                  ppo={"kl_coef": 0.1}.
    Returns:  the Run; its folder is config.out, or runs/WORLD-N with the next free N. Where
              `stages` end before there is a policy, the reference stands for it.
    Raises:   InputError: a setting or a file cannot be used.
    """
    named = {"reward": reward} if reward and not callable(reward) else {}
    config = configured(config, recipe, changes | named)
    function = reward if callable(reward) else ""
    return _finish(open_session(config, reward=function, **(BARS if progress else {})), function)


def configured(config: TrainConfig | None, recipe: str, changes: dict[str, Any]) -> TrainConfig:
    """`config`, None for the defaults, with a recipe and changes; one may be "ppo.kl_coef"."""
    if not isinstance(config, TrainConfig | None):
        raise InputError(
            f"train: expected a TrainConfig; got {config!r}: read it with runs.config.load_config"
        )
    settings = recipes.recipe(recipe)
    whole = [name for name, part in changes.items() if is_dataclass(part) and name in settings]
    if recipe != "ppo" and (config is not None or whole):
        came = whole[0] if whole else "a config"
        raise InputError(
            f"train: expected a recipe with changes to it; got {came} too, which has all settings: "
            "leave one out, or give a dict of changes"
        )
    config = with_fields(config or TrainConfig(), settings, "train")
    for name, value in _nested(changes).items():
        try:
            config = with_fields(config, {name: value}, "train")
        except InputError as error:  # one of three optimisers says no more than "optimizer."
            where = f"{name}." if str(error).startswith("optimizer.") else ""
            raise InputError(f"{where}{error}") from error
    check_names(config.halt_on)
    return config


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"ppo.kl_coef": 1} as {"ppo": {"kl_coef": 1}}."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        *stages, name = path.split(".")
        fields = found
        for stage in stages:
            fields = fields.setdefault(stage, {})
        fields[name] = value
    return found


def resume(
    folder: str | Path,
    *,
    reward: Reward = "",
    accept_changed_reward: bool = False,
    iterations: int = 0,
    progress: bool = True,
) -> "Run":
    """Go on with an interrupted run; its result is that of a run that was never interrupted.

    Args:     reward: the run's own again: a function that has no importable name, a file that was
                  moved, or the code of a run that came from somebody else, if you trust it.
              accept_changed_reward: go on with it though its source has changed.
              iterations: PPO goes on to so many in all; 0: as config.toml says.
    """
    asked = {"reward": reward, "accept_changed_reward": accept_changed_reward}
    asked |= {"iterations": iterations, **(BARS if progress else {})}
    return _finish(reopen_session(folder, **asked), reward)


def open_run(folder: str | Path, *, reward: Reward = "") -> "Run":
    """A run, to sample from and to score with, also before PPO has ended: see `load_models`.

    Args:     reward: as of `resume`; `score` and `replies` ask it.
    Raises:   InputError: the folder holds no run that has a reference.
    """
    return Run(reopen_session(folder, reward=reward, look=True, say=say))


def _finish(session: Session, reward: Reward) -> "Run":
    run_session(session)
    reward = reward if callable(reward) else session.config.reward
    return Run(reopen_session(session.folder, reward=reward, look=True, say=session.say))


def run_session(session: Session) -> pipeline.Result | None:
    """The stages that are not done yet, and the final comparison."""
    session.watch = watched(session)
    keep_freed_memory()
    with np.errstate(all="ignore"):  # what is not finite is looked for at every update
        return pipeline.run_stages(session)


class TokenScores(NamedTuple):
    """What a response pays, token by token; T tokens, in nats. `runs.snapshots.token_rows`."""

    prompt: str
    response: str
    pieces: list[str]  # T pieces of text
    ids: list[int]
    logp: np.ndarray  # (T,) log pi_theta(y_t|.)
    ref_logp: np.ndarray  # (T,) log pi_ref(y_t|.)
    entropy: np.ndarray  # (T,) of pi_theta(.|x, y_<t)
    value: np.ndarray | None  # (T,) V(x, y_<t) [reward units]; None without a critic
    reward_token: np.ndarray | None  # (T,) -beta kl_token, and the score at the end
    advantage: np.ndarray | None  # (T,) of GAE, not whitened [reward units]
    top: list[list[list]]  # (T, 5) [piece, probability] of the policy's likeliest
    ref_top: list[list[list]]  # and of the reference's
    kl_seq: float  # sum over t of logp - ref_logp: the penalty
    score: float  # normalised reward of the whole response
    gold: float | None  # the world's true reward, where there is one
    kl_coef: float  # beta, as training left it
    reward: float | None  # the user's own in its units, where there is one
    no_score: str  # why score and reward are nan: they are not there yet, or cannot be had

    @property
    def kl_token(self) -> np.ndarray:
        """(T,) logp - ref_logp."""
        return self.logp - self.ref_logp

    @property
    def objective(self) -> float:
        """score - beta Penalty: what training maximises the mean of."""
        return self.score - self.kl_coef * self.kl_seq

    def __repr__(self) -> str:
        return f"TokenScores({self.response!r}, kl_seq={self.kl_seq:.4f})"

    def _repr_html_(self) -> str:
        return coloured.html([self._asdict()])


class Replies(list):
    """Texts, one for each prompt; a notebook shows them beside it, with their gold reward."""

    def __init__(self, replies: list[str], prompts: list[str], world: World):
        super().__init__(replies)
        self.prompts, self.world = prompts, world

    def _repr_html_(self) -> str:
        table = tables.replies_table("", self.world, self.prompts, self, with_prompts=True)
        table.columns[1].header = "reply"
        return tables.html(table)


class Run:
    """A run: its settings, metrics and models. Made by `train` and `open_run`."""

    def __init__(self, session: Session):
        self.session, self.folder, self.config = session, session.folder, session.config
        self.policy, self.reference = pipeline.load_models(session)
        self.is_trained = self.policy is not self.reference

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: "stage", "step", and that step's numbers."""
        return read_metrics(self.folder)

    @property
    def result(self) -> dict[str, dict[str, float]]:
        """The final table: {"reference": {...}, "policy": {...}, "seconds": {...}}."""
        return read_object(self.folder / "result.json")

    def sample(
        self,
        prompts: str | list[str],
        *,
        reference: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Replies:
        """One reply to each prompt, of the policy or of the reference.

        Args:     prompts: repeat a prompt for several replies to it.
                  temperature: 0 takes the most likely token.
                  top_k, top_p: keep the k most likely tokens, or those that hold this mass; 0, 1:
                      all.
        Raises:   InputError: a prompt is empty, or a number is out of its range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if top_k < 0 or not 0 < top_p <= 1 or not 0 <= temperature < float("inf") or seed < 0:
            raise InputError(
                "sample: expected a finite temperature >= 0, top_k >= 0, 0 < top_p <= 1 and "
                f"seed >= 0; got {temperature}, {top_k}, {top_p} and {seed}: choose such numbers"
            )
        if not prompts:
            return Replies([], [], self.session.world)
        limit = self.session.world.max_prompt_tokens
        n = max(map(len, map(self.session.tokenizer.prompt_ids, prompts)))
        if n > limit and not (reference and self.is_trained):  # of two calls the first says so
            self.session.note(f"a prompt of {n} tokens is cut to its last {limit}, as in training")
        params = self.reference if reference else self.policy
        rng, sampling = np.random.default_rng(seed), Sampling(temperature, top_k, top_p)
        samples = self.session.sample(params, prompts, rng, sampling)
        return Replies(samples.responses, prompts, self.session.world)

    def score(self, prompt: str, response: str) -> TokenScores:
        """log pi_theta and log pi_ref of each token of a response, the penalty, and the reward.

        Raises:   InputError: a text is empty or longer than training's limit.
        """
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise InputError("score: expected two texts; got others: score one reply at a time")
        session, tokenizer = self.session, self.session.tokenizer
        ids = [session.prompt_ids(prompt)], [session.response_ids(response)]
        whole = tokenizer.prompt_ids(prompt), tokenizer.response_ids(response)
        for name, found, limit in zip(("prompt", "response"), whole, session.longest, strict=True):
            if len(found) > limit:
                raise InputError(
                    f"{name}: expected at most {limit} tokens, as in training; got {len(found)}: "
                    f"shorten it, or train with a larger --max-{name}-tokens"
                )
        batch = pad_batch(*ids, pad_id=tokenizer.pad, config=session.gpt)
        samples = Samples(*ids, batch, prompts=[prompt], responses=[response])
        return self._priced(samples)[0]

    def replies(
        self, prompts: list[str], *, reference: bool = False, seed: int = 0
    ) -> list[TokenScores]:
        """A reply to each prompt, sampled as in training, of policy or reference, and its score."""
        params = self.reference if reference else self.policy
        return self._priced(self.session.fresh_samples(params, prompts, seed))

    def _priced(self, samples: Samples) -> list[TokenScores]:
        session, scores, model = self.session, None, None
        own = session.world.reward is not None
        no_score = f"the run has no {'scale of your reward' if own else 'reward model'} yet"
        if self.config.is_dpo:
            no_score = "DPO has no reward model; its implicit reward is beta * log-ratio"
        if is_saved(session, "reward_model"):
            model, no_score = pipeline.reward_stage(session, self.reference), ""
            try:
                scores = session.score_with(model)(samples)
            except InputError as error:
                if not own:
                    raise
                no_score = str(error)
        kl_coef = last_kl_coef(session)
        both = self.policy, self.reference
        found = []
        for row in token_rows(session, *both, samples, scores=scores, kl_coef=kl_coef):
            row["score"] = np.nan if scores is None else row["score"]
            reward = model.raw(row["score"]) if own and model else np.nan if own else None
            found.append(TokenScores(**row, reward=reward, no_score=no_score))
        return found

    def report(self, out: str | Path | None = None) -> Path:
        """Write the page of `minirlhf report`, into the folder of the run if no file is named."""
        from minirlhf.app import page

        return page.report([self.folder], out=out)

    def curves(self) -> Any:
        """A matplotlib figure: losses of all stages; reward, KL, entropy and length in PPO."""
        ended = (self.folder / "result.json").exists()
        last = pipeline.read_result(self.folder).policy if ended else None
        return pictures.curves_figure(self.metrics, last)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        if not (self.folder / "result.json").exists():
            return f"<p>{escape(repr(self))}, not finished</p>"
        result = pipeline.read_result(self.folder)
        return tables.html(tables.result_table(result, self.session.world))
