"""The user's own world: a corpus and preference pairs; what a reward may be is in rewards.py.

corpus   plain text (a line or a paragraph is an example) or .jsonl {"prompt", "response"}
pairs    .jsonl {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} with whole dialogues
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.random import Generator

from minirlhf.disk import parse_object, read_text, shorten
from minirlhf.errors import InputError
from minirlhf.worlds.rewards import load_reward
from minirlhf.worlds.world import World

TextPair = tuple[str, str, str]  # prompt, chosen, rejected

HELDOUT_PROMPTS = 0.15  # of the distinct prompts
HELDOUT_EXAMPLES = 0.2  # at most this share of the examples goes with them
_TURN = "\n\nAssistant:"  # of Anthropic's HH-RLHF dialogues (Bai et al. 2022, arXiv 2204.05862)


def corpus_world(
    path: str | Path | None = None,
    *,
    pairs_path: str | Path | None = None,
    reward: str | Callable | None = None,
    unit: str = "auto",
    max_prompt_chars: int = 200,
    max_response_chars: int = 120,
    rng: Generator,
) -> World:
    """A world from files. Preferences come from pairs or from a reward: exactly one of them.

    15 % of the distinct prompts are held out, and with them their demonstrations, but never more
    than 20 % of the examples unless one prompt has more than that (26 first letters of names are
    few prompts). At least one prompt of the pairs is trained on. A single prompt is in both lists.

    Args:     path: corpus; None: the chosen replies of the pairs are the demonstrations.
              pairs_path: preference pairs; their prompts join those of the corpus.
              reward: what `load_reward` takes.
              unit: what is an example of a plain text: "line", "document", or "auto".
              max_prompt_chars, max_response_chars: longer ones are cut at a word border, prompts in
                  front, responses at the end.
              rng: chooses the held-out prompts.
    Raises:   InputError: a file cannot be used, nothing usable is left, or the choices do not fit.
    """
    _check_sources(path, pairs_path, reward)
    notes: list[str] = []
    limits = max_prompt_chars, max_response_chars
    pairs = None if pairs_path is None else _cut_pairs(read_pairs(pairs_path), limits, notes)
    if path is None:
        examples, joiner = [(prompt, chosen) for prompt, chosen, _ in pairs], " "
    else:
        examples, joiner = read_corpus(path, unit=unit, notes=notes)
    cut = _cut_examples(examples, limits, notes)
    examples = list(dict.fromkeys(cut))
    if dropped := len(cut) - len(examples):
        notes.append(f"dropped {dropped} of {len(cut)} examples that occur twice")
    judged = [prompt for prompt, _, _ in pairs or []]
    weights = Counter([prompt for prompt, _ in examples] + judged)
    train_prompts, heldout_prompts = _split_prompts(weights, rng, set(judged))
    if train_prompts == heldout_prompts:
        notes.append("there is one prompt in all: it is trained on and evaluated on")
    demonstrations, heldout_demonstrations = split_pairs(examples, train_prompts=train_prompts)
    return World(
        name=Path(path or pairs_path).stem,
        demonstrations=demonstrations,
        train_prompts=train_prompts,
        heldout_prompts=heldout_prompts,
        heldout_demonstrations=heldout_demonstrations,
        pairs=pairs,
        reward=None if reward is None else load_reward(reward),
        joiner=joiner,
        max_prompt_tokens=_suggested_tokens(weights),
        max_response_tokens=_suggested_tokens(response for _, response in examples),
        notes=tuple(notes),
    )


def _check_sources(path, pairs_path, reward) -> None:
    if (pairs_path is None) == (reward is None):
        came = "neither" if reward is None else "both"
        raise InputError(
            "corpus: expected either preference pairs or a reward function, to say which response "
            f"is better; got {came}: give --pairs FILE or --reward module:function"
        )
    if path is None and pairs_path is None:
        raise InputError("corpus: expected a corpus or preference pairs; got none: give --corpus")


def split_pairs(pairs: list[tuple], *, train_prompts: list[str]) -> tuple[list, list]:
    """(train, held-out): a pair, or an example, belongs where its prompt does."""
    train = set(train_prompts)
    return [p for p in pairs if p[0] in train], [p for p in pairs if p[0] not in train]


# --- the corpus
def read_corpus(
    path: str | Path, *, unit: str, notes: list[str]
) -> tuple[list[tuple[str, str]], str]:
    r"""(prompt, response) of every example, and the joiner between them.

    A paragraph's prompt is its first line (joiner "\n"). Where most examples are one line it is the
    first word (" "); where most are one word, the first character ("").

    Args:     notes: gets a sentence if examples were dropped.
    Raises:   InputError: the file cannot be used, or no example has a prompt and a response.
    """
    if unit not in ("auto", "line", "document"):
        raise InputError(f"unit: expected auto, line or document; got {unit!r}: choose one of them")
    if Path(path).suffix == ".jsonl":
        keys = ("prompt", "response")
        return [_texts(entry, keys, where) for where, entry in _objects(path)], " "
    texts = _units(read_text(path), unit)
    joiner = _joiner(texts)
    examples = [_split_example(text, joiner) for text in texts]
    complete = [(prompt, response) for prompt, response in examples if prompt and response]
    if not complete:
        raise InputError(
            f"{path}: expected examples that can be split into prompt and response; got "
            f"{shorten(texts[0])!r}: give more text, or a .jsonl file with prompt and response"
        )
    if dropped := len(texts) - len(complete):
        notes.append(f"{path}: dropped {dropped} of {len(texts)} examples without a response")
    return complete, joiner


def _units(text: str, unit: str) -> list[str]:
    """The lines, or the paragraphs between blank lines, of a text that is not blank."""
    text = "\n".join(line.rstrip() for line in text.split("\n")).strip()
    paragraphs = re.split(r"\n{2,}", text)
    lines = [line.strip() for line in text.split("\n") if line]
    if unit == "auto":
        unit = "document" if len(paragraphs) - 1 >= 0.01 * len(lines) else "line"
    return lines if unit == "line" else [paragraph.strip() for paragraph in paragraphs]


def _joiner(texts: list[str]) -> str:
    """What stands between prompt and response in most of the texts."""
    if 2 * sum("\n" in text for text in texts) >= len(texts):
        return "\n"
    return " " if 2 * sum(len(text.split()) > 1 for text in texts) >= len(texts) else ""


def _split_example(text: str, joiner: str) -> tuple[str, str]:
    if joiner == "":
        return text[0], text[1:].strip()
    prompt, *rest = text.split("\n" if joiner == "\n" else None, 1)
    return prompt.strip(), rest[0].strip() if rest else ""


# --- preference pairs
def read_pairs(path: str | Path) -> list[TextPair]:
    r"""(prompt, chosen, rejected) of every line, without outer white space.

    A line without "prompt" holds two whole dialogues, as in HH-RLHF; their prompt goes up to and
    including the last "\n\nAssistant:" before they differ.

    Raises:   InputError: the file cannot be used, or a line (named) is not JSON, lacks a key, has
                  another type than text, an empty text, or a chosen equal to the rejected.
    """
    pairs = []
    for where, entry in _objects(path):
        if "prompt" in entry:
            pair = _texts(entry, ("prompt", "chosen", "rejected"), where)
        else:
            pair = _split_dialogues(*_texts(entry, ("chosen", "rejected"), where), where)
        if pair[1] == pair[2]:
            raise InputError(
                f"{where}: expected chosen and rejected to differ; got {shorten(pair[1])!r} twice: "
                "remove the line"
            )
        pairs.append(pair)
    return pairs


def _split_dialogues(chosen: str, rejected: str, where: str) -> TextPair:
    end = os.path.commonprefix([chosen, rejected]).rfind(_TURN)
    if end < 0:
        raise InputError(
            f"{where}: expected a prompt, or dialogues that share a beginning up to {_TURN!r}; got "
            f"{shorten(chosen)!r}: add the key prompt"
        )
    end += len(_TURN)
    prompt, *replies = (text.strip() for text in (chosen[:end], chosen[end:], rejected[end:]))
    if not all(replies):
        raise InputError(
            f"{where}: expected a reply after the last {_TURN!r} of "
            f"{'rejected' if replies[0] else 'chosen'}; got none: remove the line"
        )
    return prompt, *replies


def _objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, parse_object(line, where)


def _texts(entry: dict[str, Any], keys: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The texts under `keys`, without outer white space."""
    for key in keys:
        text = entry.get(key)
        if isinstance(text, str) and text.strip():
            continue
        wrong = f"expected some text as {key}; got {text!r}: fill it or remove the line"
        if key not in entry:
            came = ", ".join(entry) or "none"
            wrong = f"expected the keys {', '.join(keys)}; {key} is missing, got {came}: add it"
        elif not isinstance(text, str):
            wrong = f"expected {key} to be text; got {shorten(repr(text))}: correct it"
        raise InputError(f"{where}: {wrong}")
    return tuple(entry[key].strip() for key in keys)


# --- limits and the split
def _cut_end(text: str, limit: int) -> str:
    """At most `limit` characters from the beginning, whole words if the first one fits."""
    if len(text) <= limit:
        return text
    words_end = next((i for i in range(limit, 0, -1) if text[i].isspace()), limit)
    return text[:words_end].rstrip()


def _cut_front(text: str, limit: int) -> str:
    """At most `limit` characters from the end, whole words if the last one fits."""
    return _cut_end(text[::-1], limit)[::-1]


def _cut_examples(examples: list, limits: tuple[int, int], notes: list[str]) -> list:
    """(prompt, response, ..) cut to the limits [characters]."""
    max_prompt, max_response = limits
    if min(limits) < 1:
        raise InputError(f"limits: expected at least 1 character; got {limits}: raise them")
    cut = [
        (_cut_front(prompt, max_prompt), *(_cut_end(text, max_response) for text in responses))
        for prompt, *responses in examples
    ]
    if shortened := sum(a != b for a, b in zip(cut, examples, strict=True)):
        notes.append(
            f"cut {shortened} of {len(cut)} examples to {max_prompt} characters of prompt and "
            f"{max_response} of response"
        )
    return cut


def _cut_pairs(pairs: list[TextPair], limits: tuple[int, int], notes: list[str]) -> list[TextPair]:
    """The pairs cut to the limits, without those that no longer differ."""
    cut = _cut_examples(pairs, limits, notes)
    kept = [pair for pair in cut if pair[1] != pair[2]]
    if not kept:
        raise InputError(
            f"pairs: expected pairs that differ in their first {limits[1]} characters; got none: "
            "raise the limit of responses"
        )
    if dropped := len(cut) - len(kept):
        notes.append(f"dropped {dropped} of {len(cut)} pairs that are equal after the cut")
    return kept


def _split_prompts(
    weights: dict[str, int], rng: Generator, judged: frozenset[str] | set[str] = frozenset()
) -> tuple[list[str], list[str]]:
    """(train, held-out) prompts.

    Args:     weights: how many examples each has.
              judged: prompts of pairs, of which at least one has to be among those of training.
    """
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


def _suggested_tokens(texts) -> int:
    """Room for the longest text: a small BPE takes a token for two bytes, short texts more."""
    return 4 + math.ceil(max(len(text.encode()) for text in texts) / 2)
