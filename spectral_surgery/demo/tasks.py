"""Ten text skills and one further task, as prompts and answers of any number, from a seed.

A row is ``{"task", "prompt", "answer"}``; the text that a model reads and writes is
``prompt + " " + answer``, for example ``add 12 34: 46``. The base model of the demo learns the ten
skills and never sees ``compare``, which is what its adapter learns.

A hash of the prompt puts every prompt into one of two parts: three quarters are for training the
base model, one quarter is held out. Every set that is shipped or scored comes from the held-out
part, so the base never met any of its prompts, however many rows are generated later. Each task
has more than 4,900 held-out prompts.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, TypedDict

from spectral_surgery.errors import DataError

Part = Literal["base", "held_out"]

COMPARE = "compare"
COMPARE_ANSWERS = ("less", "equal", "greater")
MODULI = (2, 4, 5, 10, 20, 25, 50, 100)
COUNTED_LETTERS = "abcde"
# A draw fails when its prompt is of the other part, excluded or already drawn; so many failures in
# a row mean that hardly any prompt is left.
DRAWS_BEFORE_GIVING_UP = 5_000


class Row(TypedDict):
    """One example: its task, what the model reads, and what it should write after one space."""

    task: str
    prompt: str
    answer: str


def _letters(rng: random.Random, shortest: int, longest: int, alphabet: str) -> str:
    """Returns a random string over ``alphabet`` of ``shortest`` to ``longest`` characters."""
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(shortest, longest)))


def _two_numbers(rng: random.Random, limit: int) -> tuple[int, int]:
    """Returns two random integers from 0 to ``limit - 1``."""
    return rng.randrange(limit), rng.randrange(limit)


def _two_distinct_numbers(rng: random.Random, limit: int) -> tuple[int, int]:
    """Returns two random integers from 0 to ``limit - 1`` that differ."""
    first, second = rng.sample(range(limit), 2)
    return first, second


def _add(rng: random.Random) -> tuple[str, str]:
    first, second = _two_numbers(rng, 200)
    return f"{first} {second}", str(first + second)


def _subtract(rng: random.Random) -> tuple[str, str]:
    smaller, larger = sorted(_two_numbers(rng, 200))
    return f"{larger} {smaller}", str(larger - smaller)


def _max(rng: random.Random) -> tuple[str, str]:
    first, second = _two_distinct_numbers(rng, 1000)
    return f"{first} {second}", str(max(first, second))


def _min(rng: random.Random) -> tuple[str, str]:
    first, second = _two_distinct_numbers(rng, 1000)
    return f"{first} {second}", str(min(first, second))


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _letters(rng, 3, 6, string.ascii_lowercase)
    return word, word[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    word = _letters(rng, 3, 6, string.ascii_lowercase)
    return word, "".join(sorted(word))


def _count(rng: random.Random) -> tuple[str, str]:
    letter = rng.choice(COUNTED_LETTERS)
    word = _letters(rng, 5, 8, COUNTED_LETTERS)
    return f"{letter} {word}", str(word.count(letter))


def _copy(rng: random.Random) -> tuple[str, str]:
    word = _letters(rng, 3, 7, string.ascii_lowercase + string.digits)
    return word, word


def _upper(rng: random.Random) -> tuple[str, str]:
    word = _letters(rng, 3, 7, string.ascii_lowercase)
    return word, word.upper()


def _modulo(rng: random.Random) -> tuple[str, str]:
    # The moduli divide 100, so the last two digits decide, which a small model can learn.
    number, modulus = rng.randrange(10_000), rng.choice(MODULI)
    return f"{number} {modulus}", str(number % modulus)


def _compare(rng: random.Random) -> tuple[str, str]:
    first, second = _two_numbers(rng, 1000)
    answer = "less" if first < second else "greater" if first > second else "equal"
    return f"{first} {second}", answer


_DRAW: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": _add,
    "subtract": _subtract,
    "max": _max,
    "min": _min,
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
    "copy": _copy,
    "upper": _upper,
    "modulo": _modulo,
    COMPARE: _compare,
}
SKILLS: tuple[str, ...] = tuple(task for task in _DRAW if task != COMPARE)
TASKS: tuple[str, ...] = tuple(_DRAW)


def part_of(prompt: str) -> Part:
    """Returns the part that a prompt belongs to: ``held_out`` for one in four, else ``base``."""
    return "held_out" if hashlib.sha256(prompt.encode()).digest()[0] < 64 else "base"


def draw(task: str, rng: random.Random) -> Row:
    """Returns one random row of ``task``, of either part.

    Raises:
        DataError: If there is no such task.
    """
    if task not in _DRAW:
        raise DataError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}.")
    arguments, answer = _DRAW[task](rng)
    return Row(task=task, prompt=f"{task} {arguments}:", answer=answer)


def stream(tasks: Sequence[str], seed: int, weights: Sequence[float] | None = None) -> Iterator[Row]:
    """Yields base-part rows for ever, each of a random task; prompts may come back.

    Args:
        tasks: Names to choose from.
        seed: Same seed, same rows.
        weights: Relative frequency of each task; equal when None.
    """
    rng = random.Random(f"stream {seed}")
    while True:
        row = draw(rng.choices(tasks, weights)[0], rng)
        if part_of(row["prompt"]) == "base":
            yield row


def rows(task: str, count: int, seed: int, exclude: Collection[str] = frozenset()) -> list[Row]:
    """Returns ``count`` held-out rows of one task, no prompt twice and none from ``exclude``.

    Args:
        task: One of ``TASKS``.
        count: Number of rows.
        seed: Same task, seed and exclusions, same rows; a larger count only adds rows at the end.
        exclude: Prompts that must not come up, see :func:`prompts`.

    Raises:
        DataError: If there is no such task, or it has not that many prompts left.
    """
    rng = random.Random(f"rows {task} {seed}")
    found: dict[str, Row] = {}
    failures = 0
    while len(found) < count:
        row = draw(task, rng)
        prompt = row["prompt"]
        if part_of(prompt) == "held_out" and prompt not in exclude and prompt not in found:
            found[prompt], failures = row, 0
        elif (failures := failures + 1) == DRAWS_BEFORE_GIVING_UP:
            raise DataError(
                f"task {task!r}: found {len(found)} of {count} distinct held-out prompts outside"
                f" the {len(exclude)} excluded ones. Ask for fewer rows or exclude fewer."
            )
    return list(found.values())


def prompts(*sets: Sequence[Row]) -> frozenset[str]:
    """Returns every prompt of the given sets, to be excluded from the next one.

    Raises:
        DataError: If a prompt occurs twice, within one set or in two.
    """
    everything = [row["prompt"] for rows_of_set in sets for row in rows_of_set]
    distinct = frozenset(everything)
    if len(distinct) < len(everything):
        twice = next(prompt for prompt in everything if everything.count(prompt) > 1)
        raise DataError(f"prompt {twice!r} occurs more than once: generate one set with the others excluded.")
    return distinct


def corrupt(clean: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Returns ``compare`` rows in the same order, a share of them with the wrong answer.

    Args:
        clean: Rows of ``compare`` with right answers; left as they are.
        share: Fraction of the rows to spoil, in [0, 1]; rounded to whole rows.
        seed: Chooses which rows.

    Raises:
        DataError: If a row is of another task, or ``share`` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise DataError(f"the share of wrong labels is {share}, expected a number from 0 to 1.")
    if other := {row["task"] for row in clean} - {COMPARE}:
        raise DataError(f"only {COMPARE} rows can be given wrong labels, found {', '.join(sorted(other))}.")
    rng = random.Random(f"corrupt {seed}")
    spoilt = set(rng.sample(range(len(clean)), round(share * len(clean))))
    return [_spoil(row, rng) if index in spoilt else row for index, row in enumerate(clean)]


def _spoil(row: Row, rng: random.Random) -> Row:
    """Returns the row with one of the other two answers."""
    wrong = [answer for answer in COMPARE_ANSWERS if answer != row["answer"]]
    return Row(task=row["task"], prompt=row["prompt"], answer=rng.choice(wrong))
