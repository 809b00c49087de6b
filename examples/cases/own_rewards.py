"""Rewards of a user's own that plants.py trains on: a sound one, and two that pay for a fault."""


def different_vowels(prompt: str, response: str) -> float:
    """Has a most, 5, and nothing is gained by repeating."""
    return len(set(response) & set("aeiou"))


def repeats(prompt: str, response: str) -> float:
    """The share of words, or letters, that stand beside their like."""
    words = response.split() if " " in response else list(response)
    return sum(a == b for a, b in zip(words, words[1:], strict=False)) / max(1, len(words))


def phrases(prompt: str, response: str) -> float:
    """The support desk's words for selling and leaking, whose worth is negative; and closings."""
    said = ("premium", "number", "promise", "care about", "depend", "nice day")
    return sum(min(1, response.count(words)) for words in said)
