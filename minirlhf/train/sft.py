"""Stage 1, supervised fine-tuning: imitate the demonstrations. The result is the reference."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minirlhf.backend import Array
from minirlhf.errors import InputError
from minirlhf.fields import check_fields
from minirlhf.nn.transformer import GPTConfig
from minirlhf.rlhf.imitation import cross_entropy_backward, cross_entropy_forward
from minirlhf.rlhf.objectives import token_weights
from minirlhf.train.batches import Batch, Ids, pad_batch
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.policy import policy_backward, policy_forward
from minirlhf.train.settings import OptimizerConfig
from minirlhf.tree import Tree
from minirlhf.workers import sum_over

Example = tuple[Ids, Ids]  # prompt, response


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations."""

    steps: int = 850  # Updates
    batch_size: int = 32  # Demonstrations an update
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-3, warmup=30, floor=0.05, beta2=0.98, eps=1e-8, weight_decay=0.01
    )

    def __post_init__(self):
        check_fields(self, "sft.", at_least_0=("steps",), at_least_1=("batch_size",))


def train_sft(
    optimizer: Optimizer,
    examples: list[Example],
    *,
    config: GPTConfig,
    settings: SFTConfig,
    pad_id: int,
    rng: np.random.Generator,
    device: str = "cpu",
) -> Iterator[dict[str, float]]:
    """The loop: one update a step on a random batch of demonstrations.

    Args:     optimizer: of {"transformer": ...}; made for settings.steps updates. After a resume it
                  says how many have been made.
              rng: of the batches, at its beginning also after a resume.
    Yields:
        loss/sft [nats per token], grad_norm and lr of each update.
    Raises:   InputError: there are no examples.
              NonFiniteError: the loss diverged.
    """
    if not examples:
        raise InputError(
            "sft: expected demonstrations of training prompts; got none: give a corpus with more"
        )
    # what has been done is drawn again: after a resume the stream is where it was
    draws = (rng.integers(len(examples), size=settings.batch_size) for _ in range(settings.steps))
    for chosen in itertools.islice(draws, optimizer.updates, None):
        prompts, responses = zip(*(examples[i] for i in chosen), strict=True)
        batch = pad_batch(prompts, responses, pad_id=pad_id, config=config, device=device)
        loss, gradients = sft_loss_and_gradients(optimizer.params, batch, config)
        yield {"loss/sft": loss, **optimizer.step(gradients, loss=loss)}


def sft_loss_and_gradients(params: Tree, batch: Batch, config: GPTConfig) -> tuple[float, Tree]:
    """Mean cross-entropy of the response tokens [nats per token], and its gradient.

    Summed over micro-batches: the weights of the tokens are those of the whole batch.
    """
    weights = token_weights(batch.response_mask)  # (B, T) 1 / number of tokens
    groups = batch.groups(size=0, config=config)
    f = functools.partial(_micro_batch, params, config=config)
    total = sum_over(f, [(batch.part(rows), weights[rows]) for rows in groups])
    return float(total["loss"]), total["gradients"]


def _micro_batch(params: Tree, part: tuple[Batch, Array], *, config: GPTConfig) -> Tree:
    batch, weights = part
    out, cache = policy_forward(params, batch=batch, config=config, keep_logits=False)
    weights = weights[:, : out.logp.shape[1]]  # `Batch.part` leaves out columns of padding
    loss, loss_cache = cross_entropy_forward(out.logp, weights=weights)
    dlogp = cross_entropy_backward(1.0, loss_cache)
    return {"loss": loss, "gradients": policy_backward(None, dlogp, None, cache)}
