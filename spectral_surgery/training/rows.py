"""Rows to labelled tokens, the way measuring does it, so that training and measuring mask alike.

By default only the answer and the end of text that closes it are labelled, and a text that is too long loses the
beginning of its prompt. With the loss on the whole text every token is labelled but the first, which nothing predicts,
and a text that is too long loses its end, as with TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_surgery.calibration import IGNORED, TokenizedExample, data_digest, tokenize
from spectral_surgery.chat import chat_renderer
from spectral_surgery.errors import DataError
from spectral_surgery.formats import Example, Render, readable_examples
from spectral_surgery.reading import read_rows
from spectral_surgery.training.options import TrainOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

WHOLE = 2**31
"""A length that no text has."""


@dataclass(frozen=True)
class TrainingRows:
    """What is learnt from, and what became of the data set."""

    examples: tuple[TokenizedExample, ...]
    """The rows as tokens, in the order of the seeded shuffle, or of the source where all rows are taken."""
    source: str
    """File, folder or Hub id."""
    read: int
    """How many rows the source has."""
    taken: int
    """How many of them the seeded shuffle took."""
    malformed: tuple[str, ...]
    """What was wrong with each row that was taken and dropped."""
    truncated: int
    """How many texts were longer than allowed."""

    @property
    def digest(self) -> str:
        """One content hash of all rows, whatever their order."""
        return data_digest(self.examples)


def load_rows(options: TrainOptions, tokenizer: PreTrainedTokenizerBase) -> TrainingRows:
    """Returns the rows of the options' data set, or of the recipe's own, as labelled tokens.

    Raises:
        DataError: If the data set cannot be read, columns are missing, or no row can be used.
    """
    recipe = options.numbers()
    source = options.rows.data or recipe.dataset
    reading = options.rows.reading(recipe)
    rows = read_rows(source, reading)
    chosen = [rows[i] for i in sampled(len(rows), recipe.max_rows, options.rows.row_seed)]
    shaped = options.rows.format == "recipe" and options.prompts == "training"

    @cache
    def renderer() -> Render:
        return chat_renderer(tokenizer, None)

    examples, malformed = readable_examples(
        chosen,
        reading,
        source=source,
        render=lambda turns: renderer()(turns),
        formatter=recipe.training if shaped else None,
    )
    tokenized, truncated = [], 0
    for example in examples:
        try:
            tokens = _tokens(example, tokenizer, recipe.max_length, options.loss == "text")
        except DataError as fault:
            malformed.append(str(fault))
            continue
        tokenized.append(tokens[0])
        truncated += tokens[1]
    if not tokenized:
        raise DataError(
            f"{source}: none of the {len(chosen)} rows can be used; of the first: {malformed[0]} "
            f"Correct the rows, or choose another --format."
        )
    return TrainingRows(tuple(tokenized), source, len(rows), len(chosen), tuple(malformed), truncated)


def sampled(rows: int, most: int | None, seed: int) -> list[int]:
    """Returns which rows are taken: all in their order, or the first of a seeded shuffle.

    The shuffle is that of ``datasets.Dataset.shuffle(seed=seed)``, so the authors' selection can be made again.
    """
    if most is None or rows <= most:
        return list(range(rows))
    return [int(i) for i in np.random.default_rng(seed).permutation(rows)[:most]]


def _tokens(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, whole: bool
) -> tuple[TokenizedExample, bool]:
    """Returns one row's tokens, and whether it was too long."""
    if not whole:
        found = tokenize([example], tokenizer, max_length)
        return found.examples[0], found.truncated > 0
    found = tokenize([example], tokenizer, WHOLE)
    ids = found.examples[0].input_ids
    return replace(found.examples[0], input_ids=ids[:max_length], answer_start=1), len(ids) > max_length


def columns(examples: Sequence[TokenizedExample]) -> dict[str, list[list[int]]]:
    """Returns the columns ``input_ids`` and ``labels`` that a trainer takes; -100 where nothing is learnt."""
    return {
        "input_ids": [list(example.input_ids) for example in examples],
        "labels": [
            [IGNORED] * example.answer_start + list(example.input_ids[example.answer_start :]) for example in examples
        ],
    }
