"""Lists of token ids to rectangles: prompts padded on the left, responses on the right.

    tokens (B, P+T)   [pad .. bos prompt sep | response eos pad ..]
    mask   (B, P+T)    0  ..  1    1     1  |    1      1   0  ..

so the tokens of every response begin in column P, and the logits that predict them stand in the
columns P-1 .. P+T-2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minirlhf.backend import Array, get_xp, to_device
from minirlhf.nn.heads import VOCABULARY_PIECE
from minirlhf.nn.transformer import GPTConfig, check_tokens, kept_floats
from minirlhf.workers import n_workers

Ids = list[int]


class Batch(NamedTuple):
    tokens: Array  # (B, P+T)
    mask: Array  # (B, P+T) 1 at real tokens, in the parameters' dtype
    prompt_len: int  # P

    @property
    def responses(self) -> Array:
        """(B, T) response tokens."""
        return self.tokens[:, self.prompt_len :]

    @property
    def response_mask(self) -> Array:
        """(B, T) 1 at response tokens, the stop token included."""
        return self.mask[:, self.prompt_len :]

    def rows(self, index) -> "Batch":
        """The sequences that `index` (a slice, or an array of row numbers) picks."""
        return Batch(self.tokens[index], self.mask[index], self.prompt_len)

    def groups(self, *, size: int, config: GPTConfig) -> list:
        """`micro_batches` of the sequences, as what `part` takes; a GPU is not waited for."""
        if get_xp(self.mask) is not np:
            return row_slices(len(self.mask), size or -(-len(self.mask) // n_workers()))
        lengths = (self.mask > 0).sum(axis=1)
        return micro_batches(lengths, size=size, config=config)

    def part(self, index) -> "Batch":
        """`rows`, without the columns that are padding in all of them (a GPU is not waited for)."""
        batch = self.rows(index)
        return batch.trimmed() if get_xp(batch.mask) is np else batch

    def trimmed(self) -> "Batch":
        """Without the columns at either end in which every sequence is padding."""
        used = (self.mask > 0).any(axis=0)
        first = int(used[: self.prompt_len].argmax())
        last = int(used.shape[0] - used[::-1].argmax())
        columns = slice(first, last)
        return Batch(self.tokens[:, columns], self.mask[:, columns], self.prompt_len - first)


def pad_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    config: GPTConfig,
    dtype=np.float32,
    device: str = "cpu",
) -> Batch:
    """Prompts and responses (lists of ids) as one checked batch.

    Raises:   ValueError: lists of different lengths, an empty prompt, ids that are no integers, or
                  that the model has no room for.
    """
    if len(prompts) != len(responses) or not all(len(p) > 0 for p in prompts):
        raise ValueError(
            f"pad_batch: expected as many non-empty prompts as responses; got {len(prompts)} "
            f"and {len(responses)}, the shortest prompt of {min(map(len, prompts), default=0)} ids"
        )
    before, after = (np.array([len(ids) for ids in lists]) for lists in (prompts, responses))
    P, T = before.max(), after.max()
    column = np.arange(P + T)
    real = (column >= P - before[:, None]) & (column < P + after[:, None])  # (B, P+T)
    ids = np.array([i for pair in zip(prompts, responses, strict=True) for x in pair for i in x])
    if ids.dtype.kind not in "iu":  # an assignment would cut 1.7 to 1
        raise ValueError(f"pad_batch: expected ids that are integers; got {ids.dtype}")
    tokens = np.full(real.shape, pad_id, dtype=np.int64)
    tokens[real], mask = ids, real.astype(dtype)  # row by row, the order in which they stand
    check_tokens(tokens, mask, config)
    return Batch(to_device(tokens, device), to_device(mask, device), int(P))


MICRO_BATCH_FLOATS = 9 << 19  # kept from a forward for its backward: about what a cache holds
MICRO_BATCH_TOKENS = 384  # ... but not fewer: below, products of matrices get slow
LARGE_VOCABULARY_TOKENS = 256  # ... or these, where logits are most of the memory


def micro_batches(
    lengths: Sequence[int], *, config: GPTConfig, size: int = 0, device: str = "cpu"
) -> list[np.ndarray]:
    """Numbers of the sequences in groups, each for one forward and backward.

    With more than one group, sequences of like length stand together, the longest first, so that a
    group holds little padding. On a CPU they do not depend on the number of workers.

    Args:     lengths: tokens of each sequence, of at least one.
              size: the most of a group; 0: as many as suit a core's cache, or the share of a GPU.
    """
    n = len(lengths)
    if not size and device == "cpu":
        longest = int(max(lengths))
        # of a token; its logits, where they are many, count half: they are not kept as long
        floats = max(kept_floats(config, longest), config.vocab_size // 2)
        half = n * longest // 2  # so that two workers have something to do
        is_large = config.vocab_size > VOCABULARY_PIECE
        least = LARGE_VOCABULARY_TOKENS if is_large else MICRO_BATCH_TOKENS
        # a gradient of many parameters takes long to add up: a thousand tokens for 124 million
        n_parameters = config.d_model * (config.vocab_size + 12 * config.n_layer * config.d_model)
        tokens = max(least, n_parameters >> 17, min(MICRO_BATCH_FLOATS // floats, half))
        size = max(1, tokens // longest)
    n_groups = -(-n // size) if size else n_workers()
    if n_groups == 1:
        return [np.arange(n)]
    n_groups = min(n, n_groups + (n_groups % 2 if size else 0))  # even: two have as much to do
    return np.array_split(np.argsort(-np.asarray(lengths), kind="stable"), n_groups)


def row_slices(n: int, size: int) -> list[slice]:
    """Cut n rows into runs of at most `size` (0: one run)."""
    step = size or max(n, 1)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
