"""Which rows are which: measured on, chosen on, tested on; of the task, and of what is to be kept.

Rows of ``--data`` were not in the training; rows of ``--train-data`` were. On an adapter that fitted wrong labels the
sign of a sensitivity on training rows can be the wrong way round, so training rows alone can only say how close an
edit stays to the unedited adapter: never which strength is best, and never that anything got better.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectral_surgery.calibration import hash_order, load_examples, preview, split_examples, tokenize
from spectral_surgery.errors import DataError
from spectral_surgery.formats import DataOptions, Example
from spectral_surgery.judging.choosing import FEW_ROWS
from spectral_surgery.judging.rule import smallest_difference
from spectral_surgery.judging.trials import RowSet
from spectral_surgery.keeping import Keep, load_keep, split_keep
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.refining.scoring import Rows

log = logging.getLogger(__name__)

FEWEST = 60
"""With fewer rows nothing can be shown."""
MOST_VALIDATION = 400
"""More rows to choose on would be better used to test."""


@dataclass(frozen=True)
class TaskRows:
    """The task's rows, in three parts that share no group."""

    measuring: Rows
    validation: Rows
    test: Rows
    seen: Rows | None
    """Rows that the adapter was trained on, where they were given beside unseen ones."""
    seen_only: bool
    """Whether the three parts are rows that the adapter was trained on; until a guess, that they were."""
    said: bool
    """Whether the user said so, or that it was not."""
    swapped: bool
    """Whether validation and test are halves that each choose and confirm."""
    duplicates: int
    source: str

    @property
    def smallest_difference(self) -> float:
        """About the smallest difference of two shares of rows that the test rows can show."""
        return smallest_difference(len(self.test))


def task_rows(
    data: str | None,
    train_data: str | None,
    options: DataOptions,
    tokenizer: Any,
    folder: Path | None,
    task_data: str | None = None,
) -> TaskRows:
    """Returns the task's rows, read and divided by content hash.

    Args:
        data: Rows that the adapter was not trained on.
        train_data: Rows that it was trained on.
        options: How they are read.
        tokenizer: The base model's.
        folder: The adapter's folder, whose chat template comes first, or None.
        task_data: Rows of which the user does not say whether it was.

    Raises:
        DataError: If there are none or too few, or a row is given both as seen and as unseen.
    """
    _check_named(data, train_data, task_data)
    unseen = load_examples(data, options, tokenizer, folder) if data else []
    seen = load_examples(train_data, options, tokenizer, folder) if train_data else []
    _check_apart(unseen, seen, data, train_data)
    rows, source = (unseen, data) if data else (seen, train_data)
    if task_data:
        rows, source = load_examples(task_data, options, tokenizer, folder), task_data
    count = len(hash_order(rows, options.seed))
    if count < FEWEST:
        raise DataError(
            f"{source} has {count} different rows, expected at least {FEWEST}: with so few, differences under "
            f"{100 * smallest_difference(max(count // 2, 1)):.0f} points cannot be shown. Pass more rows."
        )
    measuring = min(options.count(), count // 3)
    swapped = count - measuring < FEW_ROWS
    validation = (count - measuring) // 2 if swapped else min(MOST_VALIDATION, (count - measuring) // 3)
    splits = split_examples(rows, (measuring, validation, 0), options.seed)
    used = {row.digest for row in (*splits.calibration, *splits.validation)}
    test = [row for row in hash_order(rows, options.seed) if row.digest not in used]
    if not test:
        raise DataError(
            f"{source} has {len({row.group for row in rows})} groups of rows that belong together, and none is left "
            f"to test on. Pass rows of more groups, or another --group-column."
        )

    def as_rows(examples: Sequence[Example]) -> Rows:
        return Rows(examples, tokenize(examples, tokenizer, options.max_length))

    return TaskRows(
        as_rows(splits.calibration),
        as_rows(splits.validation),
        as_rows(test),
        as_rows(hash_order(seen, options.seed)[: options.count()]) if data and seen else None,
        seen_only=not data,
        said=not task_data,
        swapped=swapped,
        duplicates=splits.duplicates,
        source=str(source),
    )


def _check_named(data: str | None, train_data: str | None, task_data: str | None) -> None:
    """Raises DataError when no rows are named, or some of them with a word about the training and some without."""
    if task_data and (data or train_data):
        raise DataError(
            f"{task_data} stands beside {'--data' if data else '--train-data'} without a word about whether the "
            f"adapter was trained on it. Say it of both: --data for rows that it was not trained on, --train-data for "
            f"rows that it was."
        )
    if not (data or train_data or task_data):
        raise DataError(
            "There are no rows. Pass --data with rows that the adapter was not trained on, --train-data with rows "
            "that it was, or a file behind the adapter's name where you cannot say: then it is guessed."
        )


def _check_apart(unseen: Sequence[Example], seen: Sequence[Example], data: str | None, train_data: str | None) -> None:
    both = {row.digest for row in unseen} & {row.digest for row in seen}
    if both:
        raise DataError(
            f"{len(both)} rows are both in {data} and in {train_data}, so they are not unseen. "
            f"Remove them from --data."
        )
    prompts = {row.group for row in unseen} & {row.group for row in seen}
    if prompts:
        log.warning("%d prompts of --data are also in --train-data, with other answers.", len(prompts))


def keep_rows(
    options: RefineOptions, rows: DataOptions, task: TaskRows, tokenizer: Any, folder: Path | None
) -> tuple[Keep, Keep, Keep]:
    """Returns the rows or prompts of other skills: to measure on, to choose on, to test on.

    Raises:
        DataError: If they cannot be read, or are too few.
    """
    examples = [*task.measuring.examples, *task.validation.examples, *task.test.examples]
    chat = any(example.templated for example in examples)
    keep = load_keep(
        options.keep,
        DataOptions(seed=rows.seed, max_length=rows.max_length),
        tokenizer,
        folder,
        examples,
        chat=chat,
        category_column=options.keep_category_column,
    )
    if len(keep.rows) < FEWEST:
        raise DataError(
            f"{options.keep} has {len(keep.rows)} different rows or prompts that do not resemble the task, expected "
            f"at least {FEWEST}: a third each to measure on, to choose on and to test on. Pass more, or --keep auto."
        )
    measuring, validation, test = split_keep(keep, rows.seed)
    return replace(measuring, rows=measuring.rows[: rows.count()]), validation, test


def row_set(examples: Sequence[Example], categories: Sequence[str] | None = None) -> RowSet:
    """Returns what identifies the rows."""
    return RowSet(
        tuple(example.digest for example in examples),
        tuple(example.group for example in examples),
        tuple(categories) if categories is not None else ("",) * len(examples),
    )


def first_row(rows: Rows, tokenizer: Any) -> str:
    """Returns the first row as the model reads it, its answer in ``[[ ]]``."""
    return preview(rows.tokenized.examples[0], tokenizer)
