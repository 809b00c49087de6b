"""The user's own world: a corpus and preferences of one's own, and what of them is held out."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path

from numpy.random import Generator

from minirlhf.disk import shorten
from minirlhf.errors import InputError
from minirlhf.worlds.examples import Kept, as_example, as_preference, examples_of, preferences_of
from minirlhf.worlds.readers import name_and_kind, named_columns, rows_of
from minirlhf.worlds.rewards import load_reward
from minirlhf.worlds.world import World

HELDOUT_PROMPTS = 0.15  # of the distinct prompts
HELDOUT_EXAMPLES = 0.2  # at most this share of the examples goes with them


def corpus_world(
    path: str | Path | None = None,
    *,
    pairs_path: str | Path | None = None,
    reward: str | Callable | None = None,
    unit: str = "auto",
    columns: tuple[str, ...] = (),
    judged: bool = True,
    max_chars: int = 64_000_000,
    rng: Generator,
) -> World:
    """A world from one file or two, all prompts to train on; `split_world` holds some of them out.

    Args:     path: corpus; None: the best replies of the pairs are the demonstrations.
              pairs_path: preferences; their prompts join those of the corpus.
              reward: what `load_reward` takes, in the place of pairs.
              unit, columns: --corpus-unit and --columns.
              judged: False: fine-tuning alone, which needs no preferences.
              max_chars: of more characters in a file a part is kept, which rng draws.
    """
    if (pairs_path is None) == (reward is None) and (judged or reward is not None):
        came = "neither" if reward is None else "both"
        raise InputError(
            "corpus: expected either preference pairs or a reward function, to say which response "
            f"is better; got {came}: give --pairs FILE or --reward module:function"
        )
    notes: list[str] = []
    keep = {"max_chars": max_chars, "rng": rng.spawn(1)[0]}  # the split draws what it always drew
    read = {"unit": unit, "named": named_columns(columns), "notes": notes}
    pairs, joiner, of_pairs, of_corpus = None, " ", set(), set()
    if pairs_path is not None:
        rows = rows_of(pairs_path, "pairs", found=of_pairs, **read)
        pairs = preferences_of(Kept(pairs_path, rows, as_preference, **keep), notes)
    if path is None:
        examples = [texts[:2] for texts in pairs]
    else:
        rows = rows_of(path, "corpus", found=of_corpus, **read)
        examples, joiner = examples_of(Kept(path, rows, as_example, **keep), notes)
    if nowhere := {name for _, name in read["named"]} - of_pairs - of_corpus:
        raise InputError(
            f"--columns: expected names of columns; got {shorten(min(nowhere))!r}, which is in no "
            "file: correct it or leave it out"
        )
    distinct = list(dict.fromkeys(examples))
    if dropped := len(examples) - len(distinct):
        notes.append(f"dropped {dropped} of {len(examples)} examples that are there already")
    return World(
        name=name_and_kind(path or pairs_path)[0],
        demonstrations=distinct,
        train_prompts=list(dict.fromkeys(prompt for prompt, *_ in [*distinct, *(pairs or [])])),
        heldout_prompts=[],
        pairs=pairs,
        reward=None if reward is None else load_reward(reward),
        joiner=joiner,
        notes=tuple(notes),
    )


def split_pairs(pairs: list[tuple], *, train_prompts: list[str]) -> tuple[list, list]:
    """(train, held-out): a preference, or an example, belongs where its prompt does."""
    train = set(train_prompts)
    return [p for p in pairs if p[0] in train], [p for p in pairs if p[0] not in train]


def split_world(world: World, *, rng: Generator, key: Callable[[str], Hashable]) -> World:
    """The world with some prompts held out, by their `key`, and with them their demonstrations."""
    keys = {prompt: key(prompt) for prompt in world.train_prompts}
    judged = [keys[prompt] for prompt, *_ in world.pairs or []]
    weights = Counter([keys[prompt] for prompt, _ in world.demonstrations] + judged)
    train_keys, heldout_keys = map(set, _split_prompts(weights, rng, set(judged)))
    train_prompts = [prompt for prompt in keys if keys[prompt] in train_keys]
    train, heldout = split_pairs(world.demonstrations, train_prompts=train_prompts)
    note = "the policy sees one prompt in all: it is trained on and evaluated on"
    return replace(
        world,
        demonstrations=train,
        train_prompts=train_prompts,
        heldout_prompts=[prompt for prompt in keys if keys[prompt] in heldout_keys],
        heldout_demonstrations=heldout,
        notes=world.notes + (note,) * (train_keys == heldout_keys),
    )


def _split_prompts(weights: dict[Hashable, int], rng: Generator, judged: set) -> tuple[list, list]:
    """(train, held-out) prompts, as README.md has it; one that is judged is among the first."""
    prompts = list(weights)
    if len(prompts) == 1:
        return prompts, list(prompts)
    wanted = max(1, round(HELDOUT_PROMPTS * len(prompts)))
    budget = HELDOUT_EXAMPLES * sum(weights.values())
    heldout: set[str] = set()
    for i in rng.permutation(len(prompts)).tolist():
        if len(heldout) < wanted and weights[prompts[i]] <= budget:
            heldout.add(prompts[i])
            budget -= weights[prompts[i]]
    heldout = heldout or {min(prompts, key=weights.__getitem__)}
    if judged and judged <= heldout:
        heldout.remove(next(prompt for prompt in prompts if prompt in judged))
        others = [prompt for prompt in prompts if prompt not in judged]
        heldout = heldout or {min(others, key=weights.__getitem__)}
    return [p for p in prompts if p not in heldout], [p for p in prompts if p in heldout]
