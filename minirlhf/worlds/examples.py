"""Rows to examples and preferences; rows that teach nothing are left out and counted.

example     (prompt, response)
preference  (prompt, best reply, .., worst reply): a pair has two replies, a ranked list more
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable
from heapq import heappop, heappush
from operator import itemgetter
from pathlib import Path
from typing import Any

from numpy.random import Generator

from minirlhf.disk import shorten
from minirlhf.errors import InputError
from minirlhf.worlds.readers import Rows

Texts = tuple[str, ...]
Messages = list[tuple[str, str]]  # role, content

_TURN = "\n\nAssistant:"  # of Anthropic's HH-RLHF dialogues (Bai et al. 2022, arXiv 2204.05862)
_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for them
_HALF = re.compile("[\ud800-\udfff]")
_OVERHEAD = 300  # bytes of a row beside its characters, about: Python's strings and lists


class Skip(Exception):
    """Why a row is left out."""


class Kept:
    """What is kept of the rows of a file, how many were read, and why others were left out.

    Of more than max_chars characters a random part: the rows with the smallest uniform numbers.
    """

    def __init__(
        self, path: str | Path, rows: Rows, convert: Callable, *, max_chars: int, rng: Generator
    ):
        self.path, self.n_read, heap, size = path, 0, [], 0
        self.skipped: dict[str, list[int]] = defaultdict(list)  # reason -> lines
        for number, row in rows:
            self.n_read += 1
            for texts in self._tried(convert, number, row):
                heappush(heap, (-rng.random(), self.n_read, (number, texts)))
                size += sum(map(len, texts)) + _OVERHEAD
                while size > max_chars and len(heap) > 1:
                    size -= sum(map(len, heappop(heap)[2][1])) + _OVERHEAD
        if not self.n_read:
            raise InputError(f"{path}: expected text; the file is empty: fill it or name another")
        self.rows = [row for _, _, row in sorted(heap, key=itemgetter(1))]

    def _tried(self, convert: Callable, number: int, row: Any) -> list[Texts]:
        """[the converted row], or [] and one more that is skipped; a refusal names the line."""
        try:
            if None in row:
                raise Skip(row[None])
            return [convert(row)]
        except Skip as why:
            self.skipped[str(why)].append(number)
            return []
        except InputError as error:
            raise InputError(f"{self.path}:{number}: {error}") from error

    def finish(self, convert: Callable[[Texts], Texts], what: str, notes: list[str]) -> list[Texts]:
        """The rows, converted once more now that all are known; what was left out, as a note."""
        rows = [new for n, texts in self.rows for new in self._tried(convert, n, texts)]
        skipped = ", ".join(
            f"{len(n):,} {why} (line {', '.join(map(str, n[:3]))}{', ..' * (len(n) > 3)})"
            for why, n in self.skipped.items()
        )
        if not rows:
            raise InputError(
                f"{self.path}: expected {what}; got none to use, but {skipped}: correct them"
            )
        n_usable = self.n_read - sum(map(len, self.skipped.values()))
        plural = what.removesuffix("s") if n_usable == 1 else what
        said = f"{self.path}: read {n_usable:,} {plural}{', skipped ' * bool(skipped)}{skipped}"
        if n_usable > len(rows):
            said += f"; kept {len(rows):,}, drawn at random: --max-text-mb keeps more"
        notes.append(said)
        return rows


# --- a corpus
def examples_of(kept: Kept, notes: list[str]) -> tuple[list[Texts], str]:
    """(prompt, response) of every example, and the joiner between them, as README.md has it."""
    whole = [texts[0] for _, texts in kept.rows if len(texts) == 1]
    n_lines = sum("\n" in text for text in whole)
    n_words = sum(len(text.split(None, 1)) > 1 for text in whole)
    joiner = " " if 2 * n_words >= len(whole) else ""
    joiner = "\n" if whole and 2 * n_lines >= len(whole) else joiner

    def in_two(texts: Texts) -> Texts:
        if len(texts) == 2:
            return texts
        (text,) = texts
        at = joiner.strip(" ") or None  # a space stands for any white space
        parts = text.split(at, 1) if joiner else (text[0], text[1:])
        prompt, response = (part.strip() for part in (*parts, "")[:2])
        if not response:
            raise Skip("without a response")
        return prompt, response

    return kept.finish(in_two, "examples", notes), joiner


def as_example(row: dict) -> Texts:
    """(prompt, response), or (text,) that is to be split."""
    if {"prompt", "response"} <= row.keys():
        return _prompt(row), _reply(row["response"])
    if "messages" not in row:
        return (_text(row["text"]),)
    messages = _messages(row["messages"])
    while messages and messages[-1][0] != "assistant":
        messages.pop()
    if len(messages) < 2:
        raise Skip("without a reply")
    return _dialogue(messages[:-1]), messages[-1][1]


# --- preferences
def preferences_of(kept: Kept, notes: list[str]) -> list[Texts]:
    """(prompt, best reply, .., worst reply); without those that are given in two orders."""
    orders = defaultdict(set)
    for _, (prompt, *replies) in kept.rows:
        orders[prompt, frozenset(replies)].add(tuple(replies))

    def agreed(texts: Texts) -> Texts:
        if len(orders[texts[0], frozenset(texts[1:])]) > 1:
            raise Skip("contradictory")
        return texts

    return kept.finish(agreed, "preferences", notes)


def as_preference(row: dict) -> Texts:
    """(prompt, best reply, .., worst reply)."""
    if not {"chosen", "rejected"} <= row.keys():
        texts = (_prompt(row), *_ranked(row["responses"], row["ranking"]))
    elif isinstance(row["chosen"], list | dict):
        texts = _split_messages(row)
    elif row.get("prompt") is None:
        texts = _split_dialogues(_text(row["chosen"]), _text(row["rejected"]))
    else:
        texts = (_prompt(row), _text(row["chosen"]), _text(row["rejected"]))
    if len(set(texts[1:])) < len(texts[1:]):
        raise Skip("equal")
    return texts


def _ranked(responses: Any, ranking: Any) -> list[str]:
    """The responses from the best to the worst; the best has the smallest rank."""
    lists = isinstance(responses, list) and isinstance(ranking, list)
    ranks = [x for x in ranking if type(x) in (int, float) and math.isfinite(x)] if lists else []
    if not lists or not len(ranks) == len(ranking) == len(responses):
        raise InputError(
            "expected a list of responses and a list of as many ranks, the smallest for the best; "
            f"got {shorten(repr(responses))} and {shorten(repr(ranking))}: correct it"
        )
    if len(set(ranks)) < max(2, len(ranks)):
        raise Skip("with equal ranks")
    in_order = sorted(zip(ranks, responses, strict=True), key=itemgetter(0))
    return [_reply(response) for _, response in in_order]


def _split_dialogues(chosen: str, rejected: str) -> Texts:
    r"""The prompt goes up to and including the last "\n\nAssistant:" before the two differ."""
    end = os.path.commonprefix([chosen, rejected]).rfind(_TURN) + len(_TURN)
    if end < len(_TURN):
        raise Skip(f"without a prompt or a shared beginning up to {_TURN!r}")
    return tuple(map(_text, (chosen[:end], chosen[end:], rejected[end:])))


def _split_messages(row: dict) -> Texts:
    """The prompt is what both dialogues share, below the column prompt unless they repeat it."""
    chosen, rejected = _messages(row["chosen"]), _messages(row["rejected"])
    if chosen == rejected:
        raise Skip("equal")
    n = len(os.path.commonprefix([chosen, rejected]))
    shared, replies = chosen[:n], (chosen[n:], rejected[n:])
    if not all(replies):
        raise Skip("empty")
    given = row.get("prompt", row.get("messages"))
    if given is not None and (not shared or shared[0][0] == "assistant"):
        asked = given if isinstance(given, list) else [{"role": "user", "content": given}]
        shared = _messages(asked) + shared
    if not shared or any(reply[0][0] != "assistant" for reply in replies):
        raise Skip("without a prompt that both share")
    return _dialogue(shared), *map(_continued, replies)


# --- texts and messages
def _is_blank(value: Any) -> bool:
    return value is None or isinstance(value, str) and not value.strip()


def _text(value: Any) -> str:
    """The text without outer white space."""
    if _is_blank(value):
        raise Skip("empty")
    if not isinstance(value, str):
        raise InputError(f"expected text; got {shorten(repr(value))}: correct it")
    if _HALF.search(value):
        raise Skip("with half a surrogate pair")
    return value.strip()


def _prompt(row: dict) -> str:
    """The prompt, and below it what an instruction is about."""
    if isinstance(row["prompt"], list):
        return _dialogue(_messages(row["prompt"]))
    about = [] if _is_blank(row.get("input")) else [row["input"]]
    return "\n\n".join(map(_text, [row["prompt"], *about]))


def _reply(value: Any) -> str:
    return _continued(_messages(value)) if isinstance(value, list) else _text(value)


def _messages(value: Any) -> Messages:
    """(role, content) of each message that says something; ShareGPT calls them from and value."""
    messages = []
    for message in value if isinstance(value, list) else [value]:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise InputError(
                f"expected messages with role and content; got {shorten(repr(message))}: correct it"
            )
        if not _is_blank(content := message.get("content", message.get("value"))):
            messages.append((_ROLES.get(role, role), _text(content)))
    return messages


def _dialogue(messages: Messages) -> str:
    """A prompt: one message as it is, several as in HH-RLHF, up to the reply that is asked for."""
    if len(messages) < 2:
        return _text("".join(content for _, content in messages))
    return "\n\n".join([*_turns(messages), "Assistant:"])


def _continued(messages: Messages) -> str:
    """A reply, and what followed it."""
    return _text("\n\n".join([*(said for _, said in messages[:1]), *_turns(messages[1:])]))


def _turns(messages: Messages) -> list[str]:
    return [f"{_SPEAKERS.get(role, role.capitalize())}: {content}" for role, content in messages]
