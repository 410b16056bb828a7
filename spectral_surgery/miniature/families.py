"""Four small task families that stand for the paper's four benchmarks, as rows of any number from a seed.

Each is made of what the embedded base model can do already, in a combination that it never saw:

- ``sums`` for GSM8K: a sum and then its remainder by ten, both steps written: ``sum 12 30: 42 2``;
- ``programs`` for HumanEval: two text operations one after the other: ``reverse abc upper: CBA``;
- ``forms`` for IFEval: a word that must be written in an exact form: ``zero abc: abc 000``;
- ``choices`` for CommonsenseQA: which of two numbers is the larger or smaller, as the likelier letter.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spectral_surgery.evaluating.row_tasks import LETTERS, choice_text
from spectral_surgery.training.recipes import RecipeName

Row = dict[str, Any]

OPERATIONS: Mapping[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "copy": str,
}
"""The first operation of a program, and then letters are made large; all of them skills of the base model."""
FORMS: Mapping[str, str] = {"twin": "{0} {0}", "zero": "{} 000", "sign": "{} XX"}
"""Forms in which a word is to be written, by the word that asks for them; the base model knows all the characters."""


def _sums(rng: random.Random) -> Row:
    first, second = rng.randrange(200), rng.randrange(200)
    return {"prompt": f"sum {first} {second}:", "answer": f"{first + second} {(first + second) % 10}"}


def _programs(rng: random.Random) -> Row:
    name, word = rng.choice(list(OPERATIONS)), "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 5)))
    return {"prompt": f"{name} {word} upper:", "answer": OPERATIONS[name](word).upper()}


def _forms(rng: random.Random) -> Row:
    form, word = rng.choice(list(FORMS)), "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 5)))
    return {"prompt": f"{form} {word}:", "answer": FORMS[form].format(word)}


def _choices(rng: random.Random) -> Row:
    asked, numbers = rng.choice((max, min)), rng.sample(range(1000), 2)
    right = LETTERS[numbers.index(asked(numbers))]
    return {"question": asked.__name__, "choices": [str(number) for number in numbers], "answer": right}


@dataclass(frozen=True)
class Family:
    """A task with the benchmark that it stands for."""

    benchmark: str
    """The paper's, as its tables call it."""
    recipe: RecipeName
    """The fine-tuning that its adapters are trained by."""
    train_rows: int
    """Rows that an adapter learns from: so few that it learns its task imperfectly."""
    draw: Callable[[random.Random], Row]
    """Returns one random row, as it is scored."""


FAMILIES: Mapping[str, Family] = {
    "sums": Family("GSM8K", "math", 320, _sums),
    "programs": Family("HumanEval", "code", 320, _programs),
    "forms": Family("IFEval", "instruct", 256, _forms),
    "choices": Family("CSQA", "commonsense", 400, _choices),
}


def rows(name: str, count: int, seed: int) -> list[Row]:
    """Returns different rows of a family, as they are scored.

    Args:
        name: Key in :data:`FAMILIES`.
        count: Number of rows.
        seed: Same family and seed, same rows; a larger count only adds rows at the end.
    """
    rng = random.Random(f"miniature {name} {seed}")
    found: dict[str, Row] = {}
    while len(found) < count:
        row = FAMILIES[name].draw(rng)
        found.setdefault(pair(row)["prompt"], row)
    return list(found.values())


def pair(row: Row) -> Row:
    """Returns a row as prompt and answer, in the very text that it is scored with."""
    return {"prompt": choice_text(row), "answer": row["answer"]} if "choices" in row else row
