"""The support world: a customer-support desk in plain words, whose true reward is known.

    customer  Hello, where is my kettle?
    desk      Happy to help. Your kettle is on its way. You can track it online.

All sentences of customers and of the desk and what each is worth stand in `support.toml`, so a
reply can be judged from its text alone. A reward model never sees that judgement: README.md says
what follows from it.

Top down: 1 the grammar · 2 prompts and demonstrations · 3 gold · 4 annotator · 5 the world.
"""

import math
import re
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from numpy.random import Generator

from minirlhf.disk import read_toml
from minirlhf.worlds.world import World

# ---------------------------------------------------------------- 1 the grammar
_TABLES = read_toml(Path(__file__).with_suffix(".toml"))
ITEMS, OPENERS = _TABLES["items"], _TABLES["openers"]
# what a customer may want: its questions, answers and details
INTENTS = {name: SimpleNamespace(**entries) for name, entries in _TABLES["intents"].items()}
SENTENCES = _TABLES["sentences"]  # kind -> those of the desk that fit no intent in particular


# ---------------------------------------------------------------- 2 prompts and demonstrations
class Meaning(NamedTuple):
    """What a sentence of a customer or of the desk is about."""

    kind: str  # question, answer, detail, or a key of SENTENCES (a closing counts as a courtesy)
    intent: str | None = None
    item: str | None = None  # None: names none, so that it fits any


def _fill(sentence: str) -> list[tuple[str, str | None]]:
    """(sentence about the item, item) for each item, or the sentence alone with None."""
    if "{item}" not in sentence:
        return [(sentence, None)]
    return [(sentence.format(item=item), item) for item in ITEMS]


_TOPICS = {  # prompt -> topic: 9 intents x 3 questions x (10 items or none) x 6 openers = 1,296
    prompt[0].upper() + prompt[1:]: Meaning("question", name, item)
    for name, intent in INTENTS.items()
    for opener, pattern in product(OPENERS, intent.questions)
    for question, item in _fill(pattern)
    for prompt in [f"{opener} {question}".strip()]
}
PROMPTS = tuple(_TOPICS)


def _demonstrate(topic: Meaning, rng: Generator) -> str:
    """One reply as people write them: mostly right, rarely chatty, salesy or unsafe."""
    intent, probability, parts = INTENTS[topic.intent], _TABLES["probability"], []

    def sometimes(kind: str) -> None:
        if rng.random() < probability[kind]:
            parts.append(rng.choice(SENTENCES[kind]))

    sometimes("courtesy")
    if rng.random() < probability["answer"]:
        parts.append(rng.choice(intent.answers).format(item=topic.item))
    else:
        leaks = topic.intent == "private" and rng.random() < 0.5
        parts.append(rng.choice(SENTENCES["leak" if leaks else "hedge"]))
    n_details = rng.choice(4, p=probability["details"])
    parts.extend(rng.choice(intent.details, size=n_details, replace=False))
    sometimes("hedge")
    if rng.random() < probability["filler"]:
        parts.insert(rng.integers(len(parts) + 1), rng.choice(SENTENCES["filler"]))
    for kind in ("upsell", "promise", "closing"):
        sometimes(kind)
    return " ".join(parts)


# ---------------------------------------------------------------- 3 gold

GOLD_WEIGHTS = _TABLES["gold"]  # term -> gold for each sentence that it counts
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


def _normalise(sentence: str) -> str:
    """Small letters, single spaces, none before the final mark."""
    words = " ".join(sentence.lower().split())
    return words[:-1].rstrip() + words[-1:]


def _all_meanings() -> dict[str, Meaning]:
    """Normalised sentence -> meaning, for every sentence the desk can say."""
    meanings = {}
    for name, intent in INTENTS.items():
        for sentence, item in chain.from_iterable(map(_fill, intent.answers)):
            meanings[_normalise(sentence)] = Meaning("answer", name, item)
        for sentence in intent.details:
            meanings[_normalise(sentence)] = Meaning("detail", name)
    for kind, sentences in SENTENCES.items():
        for sentence in sentences:
            meanings[_normalise(sentence)] = Meaning("courtesy" if kind == "closing" else kind)
    return meanings


_MEANINGS = _all_meanings()
_NORMALISED_TOPICS = {_normalise(prompt): topic for prompt, topic in _TOPICS.items()}


def _term(sentence: str, topic: Meaning) -> str:
    """The kind of a normalised sentence as a reply on `topic`: a key of GOLD_WEIGHTS."""
    meaning = _MEANINGS.get(sentence, Meaning("garbled"))
    if meaning.kind == "answer":
        right = meaning.intent == topic.intent and meaning.item in (None, topic.item)
        return "answer" if right else "wrong_answer"
    if meaning.kind == "detail":
        return "detail" if meaning.intent == topic.intent else "other_detail"
    return meaning.kind


def count_words(text: str) -> int:
    """Words and marks in a text, the unit of the gold reward's length term."""
    return len(_WORD_OR_MARK.findall(text))


def gold_terms(prompt: str, response: str) -> dict[str, float]:
    """gold = sum over terms of GOLD_WEIGHTS[term] * count(term); here the summands.

    The response is split after each of . ? ! and every sentence looked up, exactly but for capitals
    and spacing. A sentence said again costs "repeated" on top of what its kind costs, and never
    earns twice.

    Returns:  a value for each key of GOLD_WEIGHTS [reward units], in that order.
    Raises:   ValueError: the prompt is not of the grammar, so that nothing can be right or wrong.
    Tested by: tests/worlds/test_support_world.py::test_gold_of_a_worked_example
    """
    topic = _NORMALISED_TOPICS.get(_normalise(prompt))
    if topic is None:
        raise ValueError(
            f"support world: expected one of the {len(PROMPTS):,} prompts of its grammar, as no "
            f"other has a gold reward; got {prompt!r}; take one like {PROMPTS[0]!r}"
        )
    *finished, rest = re.split(r"(?<=[.?!])", response)
    sentences = [_normalise(sentence) for sentence in finished]
    said = [_term(sentence, topic) for sentence in sentences]
    distinct = [_term(sentence, topic) for sentence in set(sentences)]

    count = {term: said.count(term) for term in GOLD_WEIGHTS}
    count["answer"] = min(1, distinct.count("answer"))
    count["detail"] = min(2, distinct.count("detail"))
    count["courtesy"] = min(1, said.count("courtesy"))
    count["extra_courtesy"] = said.count("courtesy") - count["courtesy"]
    same_words = len(said) - len(distinct)
    other_words = distinct.count("answer") - count["answer"]
    count["repeated"] = same_words + other_words
    count["unfinished"] = 1 if rest.strip() else 0
    count["length"] = max(0, count_words(response) - _TABLES["max_words"])
    # `or 0.0`: a term that counts nothing is 0.0, not -0.0
    return {term: weight * count[term] or 0.0 for term, weight in GOLD_WEIGHTS.items()}


def gold_reward(prompt: str, response: str) -> float:
    """gold = sum of `gold_terms`, at most 3.0: the true reward, logged and never trained on."""
    return sum(gold_terms(prompt, response).values())


# ---------------------------------------------------------------- 4 annotator
def annotate(prompt: str, a: str, b: str, rng: Generator) -> bool:
    """Pr(a preferred) = sigmoid((gold(a) - gold(b)) / temperature).

    Bradley & Terry 1952 with the gold reward as strength: a person who mostly, not always, sees the
    better reply.

    Returns:  True if this time the annotator prefers a.
    Tested by: tests/worlds/test_support_world.py::test_annotator_is_logistic_in_the_gold_difference
    """
    difference = (gold_reward(prompt, a) - gold_reward(prompt, b)) / _TABLES["temperature"]
    # (1 + tanh(z / 2)) / 2 is the sigmoid of z, and cannot overflow
    return bool(rng.random() < 0.5 + 0.5 * math.tanh(0.5 * difference))


# ---------------------------------------------------------------- 5 the world
def make_world(*, rng: Generator) -> World:
    """The support desk: a random split of its prompts, and demonstrations for those of training."""
    prompts = [PROMPTS[i] for i in rng.permutation(len(PROMPTS))]
    n_train = round(_TABLES["train_share"] * len(prompts))
    train_prompts, heldout_prompts = prompts[:n_train], prompts[n_train:]
    asked = [train_prompts[i] for i in rng.integers(n_train, size=_TABLES["n_demonstrations"])]
    return World(
        name="support",
        demonstrations=[(prompt, _demonstrate(_TOPICS[prompt], rng)) for prompt in asked],
        train_prompts=train_prompts,
        heldout_prompts=heldout_prompts,
        gold=gold_reward,
        annotate=annotate,
        max_prompt_tokens=24,
        max_response_tokens=32,
    )
