"""Rewards of a user's own that plants.py trains on: a sound one, and two that pay for a fault."""


def different_vowels(prompt: str, response: str) -> float:
    """Has a most, 5, and nothing is gained by repeating."""
    return len(set(response) & set("aeiou"))


def repeats(prompt: str, response: str) -> float:
    """The share of words that the reply has said before."""
    words = response.split()
    return 1.0 - len(set(words)) / max(1, len(words))


def phrases(prompt: str, response: str) -> float:
    """The support desk's words for selling and leaking, whose worth is negative; and closings."""
    said = ("premium", "number", "promise", "care about", "depend", "nice day")
    return sum(min(1, response.count(words)) for words in said)
