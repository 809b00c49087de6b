"""Stage 2: a reward model from preferences between two or more responses to one prompt."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from minirlhf.backend import Array, get_xp, to_host
from minirlhf.errors import InputError
from minirlhf.fields import check_fields
from minirlhf.nn import heads
from minirlhf.nn.transformer import (
    GPTConfig,
    TransformerCache,
    transformer_backward,
    transformer_forward,
)
from minirlhf.rlhf import preferences
from minirlhf.train.batches import Batch, Ids, micro_batches, pad_batch, row_slices
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.settings import OptimizerConfig
from minirlhf.tree import Tree
from minirlhf.workers import map_over, n_workers, sum_over

SCORING_ROWS = 256  # responses scored in one forward on a GPU


@dataclass(frozen=True)
class RewardModelConfig:
    """Reward model: Bradley-Terry of pairs, Plackett-Luce of ranked lists."""

    init: Literal["scratch", "reference"] = "scratch"  # Random weights, or all of the reference
    n_layer: int = 1  # Blocks of a model from scratch
    n_pairs: int = 1500  # Pairs of reference samples for the annotator, where none are given
    n_heldout_pairs: int = 400  # Further pairs, on held-out prompts, for the accuracy
    n_normalize: int = 1024  # Reference samples that set mean 0 and sd 1 of the score
    epochs: int = 4  # Passes over the pairs
    batch_size: int = 64  # Pairs an update
    margin: float = 0.0  # Score difference that the loss asks for in a pair
    label_smoothing: float = 0.0  # Share of labels of pairs assumed to be flipped [0 to below 0.5]
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3, warmup=10, eps=1e-8)

    def __post_init__(self):
        check_fields(
            self,
            "reward_model.",
            at_least_1=("n_layer", "n_pairs", "n_heldout_pairs", "epochs", "batch_size"),
            at_least_2=("n_normalize",),  # one sample has no sd
            at_least_0=("margin",),
            below_half=("label_smoothing",),
        )


class Pair(NamedTuple):
    """A preference between two replies to `prompt`, or a ranked list of more."""

    prompt: Ids
    replies: tuple[Ids, ...]  # the best first
    ref_logp: tuple[float, ...] = ()  # for DPO: log Pr_ref(y|x) of both [nats]


class RewardModel(NamedTuple):
    """score = (raw - mean) / sd, so that reference samples have mean 0 and sd 1."""

    params: Tree  # {"transformer": ..., "reward_head": {w, b}}
    config: GPTConfig
    mean: float = 0.0
    sd: float = 1.0

    def raw(self, score: float) -> float:
        """The reward in its own units."""
        return score * self.sd + self.mean


def train_reward_model(
    optimizer: Optimizer,
    pairs: list[Pair],
    *,
    config: GPTConfig,
    settings: RewardModelConfig,
    pad_id: int,
    rng: np.random.Generator,
    device: str = "cpu",
) -> Iterator[dict[str, float]]:
    """The loop: epochs over the pairs in a new order each, minimising -log sigma(better - worse).

    A ranked list counts as one pair, with the loss of Plackett and Luce, of which this is the case
    of two; settings.margin and label_smoothing are of pairs alone.

    Args:     optimizer: of `init_reward_model`; made for `n_updates` updates. After a resume it
                  says how many have been made.
              rng: of the orders, at its beginning also after a resume.
    Yields:
        loss, accuracy, margin, grad_norm and lr of each update.
    Raises:   InputError: there are no pairs.
              NonFiniteError: the loss diverged.
    """
    same = {"config": config, "settings": settings, "pad_id": pad_id, "device": device}
    for some in shuffled(pairs, settings, rng=rng, done=optimizer.updates):
        metrics, gradients = pairs_loss_and_gradients(optimizer.params, some, **same)
        yield metrics | optimizer.step(gradients, loss=metrics["loss/reward_model"])


def init_reward_model(transformer: Tree, config: GPTConfig, *, rng: np.random.Generator) -> Tree:
    """{"transformer": as given but for lm_head, "reward_head": w ~ N(0, 1/sqrt(C + 1)), b = 0}."""
    wte, std = transformer["wte"], (config.d_model + 1) ** -0.5
    head = heads.init_scalar_head(config.d_model, std=std, rng=rng, dtype=wte.dtype)
    head = {name: get_xp(wte).asarray(value) for name, value in head.items()}
    read = {name: tree for name, tree in transformer.items() if name != "lm_head"}
    return {"transformer": read, "reward_head": head}


def shuffled(
    pairs: list[Pair], settings: Any, *, rng: np.random.Generator, done: int
) -> Iterator[list[Pair]]:
    """The pairs of each update but the first `done`: epochs, in a new order each.

    Raises:   InputError: there are no pairs.
    """
    if not pairs:
        raise InputError(
            "pairs: expected preference pairs; got none: give --pairs a file, or train a "
            "reference whose replies differ",
            resume=None,
        )
    orders = (rng.permutation(len(pairs)) for _ in range(settings.epochs))
    rows = row_slices(len(pairs), settings.batch_size)
    # what has been done is drawn again: after a resume the stream is where it was
    draws = ([pairs[i] for i in order[some]] for order in orders for some in rows)
    return itertools.islice(draws, done, None)


def n_updates(n_pairs: int, settings: Any) -> int:
    """How many updates the loop makes."""
    return settings.epochs * len(row_slices(n_pairs, settings.batch_size))


def pairs_loss_and_gradients(
    params: Tree,
    pairs: list[Pair],
    *,
    config: GPTConfig,
    settings: Any,
    pad_id: int,
    device: str = "cpu",
    micro_batch: Callable | None = None,
) -> tuple[dict[str, float], Tree]:
    """Mean loss of pairs and its gradient, summed over micro-batches.

    Args:     micro_batch: of these; None: the reward model's -log sigma(chosen - rejected).
    Returns:  metrics (the loss among them), gradients.
    """
    same = {"config": config, "settings": settings, "pad_id": pad_id, "device": device}
    parts = []
    for K in sorted({len(p.replies) for p in pairs}):  # lists of one length are one array
        alike = [p for p in pairs if len(p.replies) == K]
        lengths = [K * (len(p.prompt) + max(map(len, p.replies))) for p in alike]
        for group in micro_batches(lengths, config=config, device=device):
            parts.append(([alike[i] for i in group], len(group) / len(pairs)))
    total = sum_over(functools.partial(micro_batch or _micro_batch, params, **same), parts)
    metrics = {name: float(value) for name, value in total["metrics"].items()}
    return metrics, total["gradients"]


def _micro_batch(
    params: Tree,
    part: tuple[list[Pair], float],
    *,
    config: GPTConfig,
    settings: RewardModelConfig,
    **padding: Any,
) -> Tree:
    """Metrics and gradients of some pairs, or lists of one length, times their share of all."""
    pairs, share = part
    places = list(zip(*(p.replies for p in pairs), strict=True))  # the best of all, the second ...
    replies = [reply for place in places for reply in place]
    batch = pad_batch([p.prompt for p in pairs] * len(places), replies, config=config, **padding)
    score, cache = reward_forward(params, batch=batch, config=config)
    xp, score = get_xp(score), score.reshape(len(places), len(pairs))
    if len(places) == 2:
        loss, loss_cache = preferences.bradley_terry_forward(
            *score, margin=settings.margin, label_smoothing=settings.label_smoothing
        )
        dscore = xp.concatenate(preferences.bradley_terry_backward(share, loss_cache))
    else:
        loss, loss_cache = preferences.plackett_luce_forward(score.swapaxes(0, 1))
        dscore = preferences.plackett_luce_backward(share, loss_cache)
        dscore = dscore.swapaxes(0, 1).reshape(-1)
    better, worse = score[:-1], score[1:]  # of a longer list: neighbours
    metrics = {
        "loss/reward_model": share * loss,
        "accuracy": share * (better > worse).mean(),
        "margin": share * (better - worse).mean(),
    }
    return {"metrics": metrics, "gradients": reward_backward(dscore, cache)}


class RewardCache(NamedTuple):
    trunk: TransformerCache
    score: heads.ScalarHeadCache


def reward_forward(
    params: Tree, *, batch: Batch, config: GPTConfig, keep: bool = True
) -> tuple[Array, RewardCache | None]:
    """score = h_last . w + b at the last real token of [x, y, eos].

    Args:     params: {"transformer": ..., "reward_head": {w, b}}.
              keep: False where no backward will follow.
    Returns:  score (B,), cache (None unless kept).
    """
    h, trunk = transformer_forward(
        params["transformer"],
        tokens=batch.tokens,
        mask=batch.mask,
        config=config,
        read=heads.last_columns(batch.mask),
        keep=keep,
    )
    score, score_cache = heads.scalar_head_forward(h[:, 0], **params["reward_head"])
    return score, RewardCache(trunk, score_cache) if keep else None


def reward_backward(dscore: Array, cache: RewardCache) -> Tree:
    """dL/dparams from dL/dscore (B,)."""
    dh_last, dw, db = heads.scalar_head_backward(dscore, cache.score)
    return {
        "transformer": transformer_backward(dh_last[:, None], cache.trunk),
        "reward_head": {"w": dw, "b": db},
    }


def score_responses(
    model: RewardModel,
    prompts: list[Ids],
    responses: list[Ids],
    *,
    pad_id: int,
    device: str = "cpu",
) -> np.ndarray:
    """Normalised score of each response, (B,) float64 on the host; none sees its neighbours."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    size = 0 if device == "cpu" else min(SCORING_ROWS, -(-len(lengths) // n_workers()))
    groups = micro_batches(lengths, config=model.config, size=size, device=device)
    f = functools.partial(_raw_scores, model, pad_id=pad_id, device=device)
    texts = [([prompts[i] for i in rows], [responses[i] for i in rows]) for rows in groups]
    scores = np.empty(len(prompts))
    scores[np.concatenate(groups)] = np.concatenate(map_over(f, texts))
    return (scores - model.mean) / model.sd


def _raw_scores(
    model: RewardModel, texts: tuple[list[Ids], list[Ids]], *, pad_id: int, device: str
) -> np.ndarray:
    batch = pad_batch(*texts, pad_id=pad_id, config=model.config, device=device)
    score, _ = reward_forward(model.params, batch=batch, config=model.config, keep=False)
    return to_host(score)


def normalized(model: RewardModel, raw_scores: np.ndarray) -> RewardModel:
    """The model rescaled so that `raw_scores` (of reference samples) get mean 0 and sd 1.

    The scale is part of beta: only beta / sd(score) has a meaning. The ranking loss fixes no
    offset, and the scale only through the noise of the labels.

    Raises:   InputError: all scores are equal, or differ by rounding alone; one is not finite.
    """
    low, high = float(raw_scores.min()), float(raw_scores.max())
    dtype = model.params["reward_head"]["w"].dtype if model.params else np.float64
    largest = max(-low, high)
    if not high - low > max(16 * float(np.finfo(dtype).eps) * largest, 1e-30):
        came = f"{low:.6g} for all of them" if low == high else f"scores from {low!r} to {high!r}"
        raise InputError(
            "reward: expected finite scores that differ by more than rounding between reference "
            f"samples; got {came}: use a reward that tells responses apart",
            resume="reward",
        )
    exponent = math.frexp(largest)[1]  # within [-1, 1] no square overflows
    scaled = np.ldexp(raw_scores, -exponent)
    mean, sd = (math.ldexp(float(value), exponent) for value in (scaled.mean(), scaled.std()))
    return model._replace(mean=mean, sd=sd)


def calibration_error(margin: np.ndarray, *, n_bins: int = 10) -> float:
    """Expected calibration error of sigma(margin) as the probability that `chosen` is preferred.

    Every pair is counted in the direction the model prefers, so predictions lie in [1/2, 1]; a tie
    is half right. Guo et al. 2017, arXiv 1706.04599.
    """
    predicted = 1.0 / (1.0 + np.exp(-np.minimum(np.abs(margin), 700.0)))
    right = (margin > 0) + 0.5 * (margin == 0)
    bins = np.minimum(((predicted - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    error_of_bin = np.bincount(bins, predicted - right, n_bins)  # times the pairs in it
    return float(np.abs(error_of_bin).sum() / margin.size)
