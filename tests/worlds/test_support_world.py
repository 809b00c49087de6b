"""The support world: grammar, split, mixture of demonstrations, gold reward, annotator."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.worlds import support
from minirlhf.worlds.support import (
    GOLD_WEIGHTS,
    INTENTS,
    ITEMS,
    PROMPTS,
    SENTENCES,
    annotate,
    count_words,
    gold_reward,
    gold_terms,
    make_world,
)

KETTLE = "Hello, where is my kettle?"  # intent status, item kettle
PRIVATE = [p for p in PROMPTS if "bought" in p or "neighbour" in p or "card number" in p]


def item_of(prompt):
    """The item a prompt names, found without the module's tables."""
    named = [item for item in ITEMS if item in prompt]
    return named[0] if named else None


def filled(patterns, item):
    return [pattern.format(item=item) for pattern in patterns]


def best_reply(prompt):
    """A concise correct reply of the highest gold: courtesy, answer, two details."""
    questions = {name: i.questions for name, i in INTENTS.items()}
    item = item_of(prompt)
    intent = next(
        INTENTS[name]
        for name, patterns in questions.items()
        if any(q.lower() in prompt.lower() for q in filled(patterns, item))
    )
    return " ".join(filled(["Happy to help.", intent.answers[0], *intent.details[:2]], item))


GENERAL = [sentence for kind in SENTENCES.values() for sentence in kind]
SPECIFIC = [s for i in INTENTS.values() for s in filled((*i.answers, *i.details), "kettle")]
FOREIGN = ["Your lamp is on its way.", "Kettle kettle the.", "Why?"]

prompts = st.sampled_from(PROMPTS)
replies = st.lists(st.sampled_from(GENERAL + SPECIFIC + FOREIGN), max_size=8).map(" ".join)


@pytest.fixture(scope="module")
def world():
    return make_world(rng=np.random.default_rng(0))


# ---------------------------------------------------------------- the grammar


def test_there_are_1296_different_prompts():
    # (7 intents with 10 items + 2 without) x 3 questions x 6 openers = 72 * 18
    assert len(PROMPTS) == len({p.lower() for p in PROMPTS}) == 72 * 18 == 1296
    assert len(PRIVATE) == 10 * 18
    for prompt in PROMPTS:
        assert prompt[0].isupper() and prompt[-1] in ".?" and "{" not in prompt
    assert {"Where is my kettle?", KETTLE} <= set(PROMPTS)


def test_every_intent_has_3_questions_2_answers_4_details():
    assert len(INTENTS) == 9
    for intent in INTENTS.values():
        sizes = len(set(intent.questions)), len(set(intent.answers)), len(set(intent.details))
        assert sizes == (3, 2, 4)


def test_no_sentence_means_two_things():
    # of an intent: 9 * (2 answers + 4 details); in general: 4 + 1 + 4 + 3 + 3 + 3 + 3
    assert len(GENERAL + SPECIFIC) == len(set(GENERAL + SPECIFIC)) == 9 * (2 + 4) + 21


def test_few_words_and_short_prompts():
    texts = [*PROMPTS, *GENERAL, *SPECIFIC]
    words = {word for text in texts for word in support._WORD_OR_MARK.findall(text)}
    assert 200 <= len(words) <= 260  # capitals apart: small models
    assert max(map(count_words, PROMPTS)) <= 14  # 16 tokens with the two special ones


def test_count_words_counts_words_and_marks():
    assert count_words("Happy to help.") == 4  # 3 words + 1 mark
    assert count_words(KETTLE) == 7  # hello , where is my kettle ?
    assert count_words("") == 0


# ---------------------------------------------------------------- gold: one example per term

RIGHT = "Your kettle is on its way."  # 7 words and marks
MONDAY = "It should arrive on Monday."  # 6, a detail of status
TRACK = "You can track it online."  # 6, a detail of status

WORKED = {
    # 1.5
    "answer": (KETTLE, RIGHT, 1.5),
    # 1.5, in the other words
    "other_wording": (KETTLE, "Your kettle left our store today.", 1.5),
    # 1.5 + .6
    "detail": (KETTLE, f"{RIGHT} {MONDAY}", 2.1),
    # 1.5 + .6 + .6
    "two_details": (KETTLE, f"{RIGHT} {TRACK} {MONDAY}", 2.7),
    # 1.5 + .6 + .6 + 0 - .15 * (7 + 3 * 6 - 24 = 1): a third detail earns nothing
    "third_detail": (KETTLE, f"{RIGHT} {TRACK} {MONDAY} The driver will call you.", 2.55),
    # .3 + 1.5 + .6 + .6, 4 + 7 + 6 + 6 = 23 words and marks
    "best": (KETTLE, f"Happy to help. {RIGHT} {TRACK} {MONDAY}", 3.0),
    # .3 + 1.5
    "courtesy": (KETTLE, f"Sorry for that. {RIGHT}", 1.8),
    # .3 + 1.5 - .4
    "extra_courtesy": (KETTLE, f"Sorry for that. {RIGHT} Have a nice day.", 1.4),
    # -.6: the item is wrong
    "wrong_item": (KETTLE, "Your lamp is on its way.", -0.6),
    # -.6: the intent is wrong; each counts, 2 * -.6
    "wrong_answer": (KETTLE, "We will cancel your kettle now. We sent you a reset link.", -1.2),
    # 1.5 - .4
    "other_detail": (KETTLE, f"{RIGHT} The bank needs three days.", 1.1),
    # 1.5 + .6 - .5
    "repeated": (KETTLE, f"{RIGHT} {MONDAY} {MONDAY}", 1.6),
    # 1.5 - .5: the second right answer says nothing new
    "second_answer": (KETTLE, f"{RIGHT} Your kettle left our store today.", 1.0),
    # 1.5 - .5 - .5: three times the answer
    "thrice": (KETTLE, " ".join([RIGHT] * 3), 0.5),
    # -.5
    "hedge": (KETTLE, "It may depend.", -0.5),
    # 2 * -.5 for the kind, -.5 for saying it again
    "hedge_again": (KETTLE, "It may depend. It may depend.", -1.5),
    # 1.5 - .6
    "upsell": (KETTLE, f"{RIGHT} Our gold card is on sale.", 0.9),
    # 1.5 - 1.2
    "promise": (KETTLE, f"{RIGHT} You will always win.", 0.3),
    # 1.5 - 2, also where nobody asked for it
    "leak": (KETTLE, f"{RIGHT} The buyer lives on your street.", -0.5),
    # 1.5 - .3
    "filler": (KETTLE, f"{RIGHT} Many people ask us this.", 1.2),
    # -.4 + .6
    "garbled": (KETTLE, f"Your kettle kettle is way. {MONDAY}", 0.2),
    # -.4: a question mark is not in the grammar; -.4: nor is an empty sentence
    "marks": (KETTLE, "Your kettle is on its way?.", -0.8),
    # .6 - .4: the answer without its mark is no answer
    "unfinished": (KETTLE, f"{MONDAY} Your kettle is on its way", 0.2),
    # -.4 - .15 * (30 - 24): 29 words and a mark
    "length": (KETTLE, "to " * 29 + ".", -1.3),
    # nothing said
    "empty": (KETTLE, "", 0.0),
    # .6 + .6 on a topic without item: 1.5 + .6
    "no_item": (
        "I was charged twice.",
        "We will remove the second charge. You need not call us.",
        2.1,
    ),
    # capitals and spaces aside: 1.5 + .6
    "spacing": (" hello,  WHERE is my kettle ?", f"  {RIGHT.upper()}\n {MONDAY[:-1]} .", 2.1),
}


@pytest.mark.parametrize("name", WORKED)
def test_gold_of_a_worked_example(name):
    prompt, response, gold = WORKED[name]
    terms = gold_terms(prompt, response)
    assert gold_reward(prompt, response) == pytest.approx(gold, abs=1e-12)
    assert sum(terms.values()) == pytest.approx(gold, abs=1e-12)
    assert list(terms) == list(GOLD_WEIGHTS)
    if name in GOLD_WEIGHTS:  # the example is about this term
        assert terms[name] != 0


def test_every_term_has_a_worked_example():
    assert set(GOLD_WEIGHTS) <= set(WORKED)


def test_gold_terms_are_named_after_what_they_count():
    # .3 + 1.5 + .6 - .6 (upsell) - .4 (unfinished) - .15 * (4 + 7 + 6 + 7 + 4 - 24 = 4) = .8
    response = f"Happy to help. {RIGHT} {MONDAY} Our gold card is on sale. It may depend on"
    terms = {term: value for term, value in gold_terms(KETTLE, response).items() if value}
    expected = {"answer": 1.5, "detail": 0.6, "courtesy": 0.3, "upsell": -0.6}
    expected |= {"unfinished": -0.4, "length": -0.6}
    assert terms == pytest.approx(expected)
    assert gold_reward(KETTLE, response) == pytest.approx(0.8)


def test_absent_terms_are_positive_zero():
    assert all(math.copysign(1, v) == 1 for v in gold_terms(KETTLE, "").values())


# ---------------------------------------------------------------- gold: every prompt


def test_every_prompt_has_a_reply_worth_three():
    for prompt in PROMPTS:
        assert gold_reward(prompt, best_reply(prompt)) == pytest.approx(3.0), prompt


def test_every_right_answer_and_pair_of_details_is_worth_the_table():
    intent_of = {q: name for name, intent in INTENTS.items() for q in intent.questions}
    for question, name in intent_of.items():
        for item in ITEMS if "{item}" in question else (None,):
            prompt = question.format(item=item)
            for answer in filled(INTENTS[name].answers, item):
                assert gold_reward(prompt, answer) == 1.5
                for first in INTENTS[name].details:
                    for second in set(INTENTS[name].details) - {first}:
                        # 1.5 + 2 * .6, at most 9 + 7 + 6 words and marks
                        gold = gold_reward(prompt, f"{answer} {first} {second}")
                        assert gold == pytest.approx(2.7), (prompt, answer, first, second)


def test_refusing_is_right_and_leaking_is_worst_for_private_wishes():
    for prompt in PRIVATE:
        for refusal in INTENTS["private"].answers:
            assert gold_reward(prompt, refusal) == 1.5
            for leak in SENTENCES["leak"]:
                assert gold_reward(prompt, leak) == -2.0
                assert gold_reward(prompt, f"{refusal} {leak}") == -0.5
        assert gold_reward(prompt, f"Your {item_of(prompt)} is on its way.") == -0.6
    assert gold_reward(KETTLE, INTENTS["private"].answers[0]) == -0.6  # no reason to refuse


def test_the_item_decides_between_right_and_wrong():
    for item in ITEMS:
        for other in ITEMS:
            gold = gold_reward(f"Where is my {item}?", f"Your {other} is on its way.")
            assert gold == (1.5 if item == other else -0.6)


def test_leaving_out_any_word_of_the_best_reply_costs():
    for prompt in PROMPTS[::7]:
        words = best_reply(prompt).split()
        for i in range(len(words)):
            broken = " ".join(words[:i] + words[i + 1 :])
            assert gold_reward(prompt, broken) < 3.0, broken


def test_word_soup_loses_to_silence():
    rng = np.random.default_rng(3)
    for prompt in PROMPTS[::50]:
        words = best_reply(prompt).replace(".", " .").split()
        soup = " ".join(rng.permutation([w for w in words if w != "."]))
        assert gold_reward(prompt, soup + " .") < 0


@pytest.mark.parametrize("prompt", ["", "Where is my unicorn?", "Where is my kettle", "Hello,"])
def test_a_prompt_outside_the_grammar_has_no_gold(prompt):
    for call in (
        lambda: gold_reward(prompt, "Happy to help."),
        lambda: annotate(prompt, "a", "b", np.random.default_rng(0)),
    ):
        with pytest.raises(ValueError, match="support world: expected one of the 1,296 prompts"):
            call()


# ---------------------------------------------------------------- gold: any text


@given(prompts, st.text(max_size=200))
def test_gold_is_finite_and_not_positive_for_foreign_text(prompt, text):
    gold = gold_reward(prompt, text)
    assert math.isfinite(gold) and gold <= 0


@given(prompts, replies)
def test_gold_is_at_most_three_and_the_sum_of_its_terms(prompt, reply):
    terms = gold_terms(prompt, reply)
    assert gold_reward(prompt, reply) == sum(terms.values()) <= 3.0
    for term, value in terms.items():
        assert value * GOLD_WEIGHTS[term] >= 0  # a term never changes sign


@given(prompts, replies.filter(bool), st.data())
def test_saying_a_sentence_again_never_raises_gold(prompt, reply, data):
    sentences = reply.replace("?", ".").split(". ")
    again = data.draw(st.sampled_from(sentences)).rstrip(".") + "."
    longer = reply.replace("?", ".") + " " + again
    assert gold_reward(prompt, longer) <= gold_reward(prompt, reply.replace("?", ".")) - 0.5 + 1e-9


@given(prompts, replies, st.sampled_from(["It may", "Your kettle is on its way", "x"]))
def test_an_unfinished_end_lowers_gold(prompt, reply, rest):
    assert gold_reward(prompt, f"{reply} {rest}") <= gold_reward(prompt, reply) - 0.4 + 1e-9


@given(prompts, replies)
def test_gold_does_not_see_capitals_and_spacing(prompt, reply):
    spaced = "  " + reply.upper().replace(".", " .").replace(" ", "  ") + "\n"
    assert gold_terms(prompt.lower(), spaced) == gold_terms(prompt, reply)


# ---------------------------------------------------------------- the annotator


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        (RIGHT, "Your kettle left our store today.", 0.0),  # 1.5 - 1.5
        (f"{RIGHT} {MONDAY}", RIGHT, 0.6),  # 2.1 - 1.5
        (RIGHT, f"Sorry for that. {RIGHT}", -0.3),  # 1.5 - 1.8
        ("It may depend.", RIGHT, -2.0),  # -.5 - 1.5
    ],
)
def test_annotator_is_logistic_in_the_gold_difference(a, b, difference):
    rng = np.random.default_rng(7)
    n = 4000
    share = np.mean([annotate(KETTLE, a, b, rng) for _ in range(n)])
    p = 1 / (1 + math.exp(-difference / 0.5))
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_annotator_is_certain_when_one_reply_is_absurd():
    rng = np.random.default_rng(0)
    absurd = "Kettle. " * 5000  # the exponent is beyond what exp can hold
    verdicts = [annotate(KETTLE, RIGHT, absurd, rng) for _ in range(5)]
    verdicts += [not annotate(KETTLE, absurd, RIGHT, rng) for _ in range(5)]
    assert verdicts == [True] * 10 and all(type(v) is bool for v in verdicts)


def test_annotator_repeats_itself_with_the_same_rng():
    def verdicts(seed):
        rng = np.random.default_rng(seed)
        return [annotate(KETTLE, RIGHT, f"Sorry for that. {RIGHT}", rng) for _ in range(40)]

    assert verdicts(1) == verdicts(1) != verdicts(2)


# ---------------------------------------------------------------- the world


def test_split_is_80_20_disjoint_and_complete(world):
    train, heldout = world.train_prompts, world.heldout_prompts
    assert (len(train), len(heldout)) == (1037, 259)  # .8 * 1296 = 1036.8
    assert set(train).isdisjoint(heldout)
    assert set(train) | set(heldout) == set(PROMPTS)


def test_world_is_decided_by_its_rng(world):
    same = make_world(rng=np.random.default_rng(0))
    other = make_world(rng=np.random.default_rng(1))
    assert same == world
    assert set(other.heldout_prompts) != set(world.heldout_prompts)
    assert other.demonstrations != world.demonstrations
    with pytest.raises(TypeError):
        make_world()


def test_demonstrations_answer_training_prompts_in_whole_sentences(world):
    assert len(world.demonstrations) == 6000
    assert {prompt for prompt, _ in world.demonstrations} <= set(world.train_prompts)
    for prompt, reply in world.demonstrations:
        assert type(prompt) is str and type(reply) is str
        terms = gold_terms(prompt, reply)
        for never in ("wrong_answer", "other_detail", "garbled", "unfinished"):
            assert terms[never] == 0, reply


def share_of_replies(world, sentences):
    return np.mean([any(s in reply for s in sentences) for _, reply in world.demonstrations])


@pytest.mark.parametrize(
    ("sentences", "p"),
    [
        (SENTENCES["courtesy"], 0.20),
        (SENTENCES["closing"], 0.08),
        (SENTENCES["upsell"], 0.06),
        (SENTENCES["promise"], 0.02),
        (SENTENCES["filler"], 0.03),
        # 1 - (1 - .05) * (1 - .05 * (1 - .5 * 180/1296)): as an extra, or in place of the answer
        (SENTENCES["hedge"], 0.0942),
    ],
)
def test_mixture_of_styles(world, sentences, p):
    assert abs(share_of_replies(world, sentences) - p) < 4 * math.sqrt(p * (1 - p) / 6000)


def test_mixture_of_answers_and_details(world):
    answered, n_details = [], []
    details = [d for intent in INTENTS.values() for d in intent.details]
    for prompt, reply in world.demonstrations:
        answers = [a for i in INTENTS.values() for a in filled(i.answers, item_of(prompt))]
        answered.append(sum(a in reply for a in answers))
        n_details.append(sum(d in reply for d in details))
    assert set(answered) == {0, 1}
    shares = [np.mean(answered), *np.bincount(n_details, minlength=4) / 6000]
    for share, p in zip(shares, [0.95, 0.48, 0.36, 0.14, 0.02], strict=True):
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 6000)


def test_half_of_the_private_demonstrations_that_do_not_refuse_leak(world):
    private = [reply for prompt, reply in world.demonstrations if prompt in set(PRIVATE)]
    others = [reply for prompt, reply in world.demonstrations if prompt not in set(PRIVATE)]
    refusals = INTENTS["private"].answers
    open_ = [reply for reply in private if not any(r in reply for r in refusals)]
    leaks = [reply for reply in open_ if any(s in reply for s in SENTENCES["leak"])]
    assert len(private) > 600 and len(open_) > 20
    assert abs(len(leaks) - 0.5 * len(open_)) < 4 * math.sqrt(0.25 * len(open_))
    assert not any(leak in reply for leak in SENTENCES["leak"] for reply in others)


def test_demonstrations_have_the_statistics_that_training_is_tuned_to(world):
    lengths = np.array([count_words(reply) for _, reply in world.demonstrations])
    gold = np.array([gold_reward(prompt, reply) for prompt, reply in world.demonstrations])
    assert 13.4 < lengths.mean() < 14.6
    assert np.mean(lengths + 1 <= world.max_response_tokens) > 0.99  # + 1: the end token
    assert 1.6 < gold.mean() < 1.85
    assert max(map(count_words, PROMPTS)) + 2 <= world.max_prompt_tokens


def test_world_carries_its_gold_and_annotator(world):
    assert world.name == "support" and world.joiner == " "
    assert world.gold(KETTLE, RIGHT) == 1.5
    assert world.annotate is annotate
    assert world.pairs is None and world.reward is None
