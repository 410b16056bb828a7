"""Which prompts are nearly the same as one of many others, by the words that they use.

A prompt is the set of its words, without case and punctuation; a character of a script that puts no spaces between
words counts as a word. Words that stand in more than half of the other prompts, such as those of a chat template or
of one instruction for all rows, tell nothing and are left out. Two prompts are near-duplicates where their sets
overlap by four fifths (Jaccard), or where their words are the same in the same order.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

ALIKE = 0.8
"""Words in common, as a share of the words of either, from which two prompts are near-duplicates."""
COMMON = 0.5
"""A word in more than this share of the prompts is left out."""
ENOUGH = 10
"""Prompts from which on a word can be called common."""

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def near_duplicates(prompts: Sequence[str], others: Sequence[str]) -> list[bool]:
    """Whether each prompt is a near-duplicate of any of the others.

    Every pair whose overlap reaches :data:`ALIKE` shares one of the first few of its rarest words (prefix filtering,
    Chaudhuri, Ganti and Kaushik 2006), so only pairs that do are compared.
    """
    theirs = [_words(other) for other in others]
    frequency = Counter(word for words in theirs for word in set(words))
    common = {word for word, count in frequency.items() if len(theirs) >= ENOUGH and count > COMMON * len(theirs)}
    exact = {tuple(words) for words in theirs}
    sets = [frozenset(words) - common for words in theirs]
    by_word: dict[str, set[frozenset[str]]] = defaultdict(set)
    for words in sets:
        for word in _prefix(words, frequency):
            by_word[word].add(words)

    def is_near(prompt: str) -> bool:
        ours = _words(prompt)
        words = frozenset(ours) - common
        candidates = (other for word in _prefix(words, frequency) for other in by_word.get(word, ()))
        return tuple(ours) in exact or any(_overlap(words, other) >= ALIKE for other in candidates)

    return [is_near(prompt) for prompt in prompts]


def _words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _prefix(words: frozenset[str], frequency: Counter[str]) -> list[str]:
    """The rarest words of a set: as many as it can lack of another's and one more."""
    rarest = sorted(words, key=lambda word: (frequency[word], word))
    return rarest[: int((1 - ALIKE) * len(words) + 1e-9) + 1]


def _overlap(ours: frozenset[str], theirs: frozenset[str]) -> float:
    return len(ours & theirs) / len(ours | theirs)
