"""Rewards to begin with: text -> number in [0, 1]. Use: --reward minirlhf.worlds.rewards:NAME."""

import re


def vowel_share(text: str) -> float:
    """Vowels / letters; 0 without letters. Over-optimised, names become "aaaa"."""
    letters = [c for c in text.lower() if c.isalpha()]
    return sum(c in "aeiou" for c in letters) / max(len(letters), 1)


def short_words(text: str) -> float:
    """Words of at most four letters / words; 0 without words."""
    words = _words(text)
    return sum(len(word) <= 4 for word in words) / max(len(words), 1)


def distinct_words(text: str) -> float:
    """Distinct words / words, regardless of case; 0 without words. Punishes repetition."""
    words = _words(text)
    return len(set(words)) / max(len(words), 1)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())
