"""What was scored: every candidate's per-row scores on the same rows, and which way is better.

Two things are scored. The *task* is what the adapter was trained for; the *other skills* are what the base model could
do before. Every score is one number per row, so all comparisons are paired; rows are known by content hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

BASE = "base"
"""Name of the base model without an adapter among the candidates."""
UNEDITED = "unedited"
"""Name of the adapter as it was trained among the candidates."""


@dataclass(frozen=True)
class Measure:
    """What a score is."""

    name: str
    """In a user's words, such as ``exact answers``."""
    unit: str
    """Such as ``nats per token`` or ``share of rows``."""
    lower_is_better: bool
    binary: bool = False
    """Every row scores 0 or 1."""

    def gain(self, ours: Float[np.ndarray, " rows"], theirs: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        """Returns by how much ours is better, row by row."""
        return theirs - ours if self.lower_is_better else ours - theirs


@dataclass(frozen=True)
class RowSet:
    """The rows that something was scored on, in order."""

    digests: tuple[str, ...]
    """Content hashes."""
    groups: tuple[str, ...]
    """Rows of one group, such as paraphrases, are resampled together."""
    categories: tuple[str, ...]
    """What kind of row it is, for tables by kind; may be all alike."""

    def __len__(self) -> int:
        return len(self.digests)


@dataclass(frozen=True)
class Scores:
    """One candidate's scores on one split."""

    task: Float[np.ndarray, " task_rows"]
    skills: Float[np.ndarray, " keep_rows"]


@dataclass(frozen=True)
class Split:
    """All candidates' scores on the same rows; base and unedited are always among them."""

    task: Measure
    skills: Measure
    task_rows: RowSet
    skills_rows: RowSet
    scores: Mapping[str, Scores]
    """By candidate name; see :data:`BASE` and :data:`UNEDITED`."""

    def only(self, task: np.ndarray, skills: np.ndarray) -> Split:
        """Returns the split of these rows, given as positions or as truth values."""
        return Split(
            self.task,
            self.skills,
            _picked(self.task_rows, task),
            _picked(self.skills_rows, skills),
            {name: Scores(found.task[task], found.skills[skills]) for name, found in self.scores.items()},
        )


def _picked(rows: RowSet, which: np.ndarray) -> RowSet:
    return RowSet(*(tuple(np.asarray(values, dtype=object)[which]) for values in vars(rows).values()))
