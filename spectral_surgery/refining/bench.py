"""The loaded model as a bench: any candidate in, its per-row scores out, each worked out once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from spectral_surgery.calibration import Tokenized
from spectral_surgery.judging.trials import Scores, Split
from spectral_surgery.live import Live
from spectral_surgery.options import BatchOptions
from spectral_surgery.refining.cache import Cache
from spectral_surgery.refining.candidates import Candidate
from spectral_surgery.refining.rows import row_set
from spectral_surgery.refining.scoring import Objective, Rows, Vector

Progress = Callable[[str, int, int], None]
"""(what, done, in all)."""


@dataclass(frozen=True)
class Part:
    """Rows of the task and rows of other skills that serve one purpose."""

    task: Rows
    keep: Rows
    categories: tuple[str, ...]
    """Of the keep rows."""

    def at(self, task: Sequence[int], keep: Sequence[int]) -> Part:
        """Returns these rows of each."""
        return Part(self.task.at(task), self.keep.at(keep), tuple(self.categories[i] for i in keep))

    def first(self, task: int, keep: int) -> Part:
        """Returns so many rows of each, from the start."""
        return self.at(range(min(task, len(self.task))), range(min(keep, len(self.keep))))

    def after(self, other: Part) -> Part:
        """Returns the rows that follow those of :meth:`first`."""
        return self.at(range(len(other.task), len(self.task)), range(len(other.keep), len(self.keep)))

    def __add__(self, other: Part) -> Part:
        """Returns the rows of both."""
        return Part(_joined(self.task, other.task), _joined(self.keep, other.keep), self.categories + other.categories)


def _joined(one: Rows, other: Rows) -> Rows:
    tokens = Tokenized(
        one.tokenized.examples + other.tokenized.examples, one.tokenized.truncated + other.tokenized.truncated
    )
    return Rows([*one.examples, *other.examples], tokens)


@dataclass
class Times:
    """Where the time went, in seconds."""

    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Counts the time while open."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.spent.values())


@dataclass(frozen=True)
class Bench:
    """A loaded model, and what rows are scored by."""

    live: Live
    task: Objective
    skills: Objective
    cache: Cache
    batching: BatchOptions

    def scores(self, candidate: Candidate, part: Part) -> Scores:
        """Returns a candidate's scores on some rows."""
        return Scores(
            self._scored(candidate, self.task, part.task),
            self._scored(candidate, self.skills, part.keep),
        )

    def _scored(self, candidate: Candidate, objective: Objective, rows: Rows) -> Vector:
        if not len(rows):
            return np.zeros(0)

        def score() -> Vector:
            with candidate.open(self.live):
                return objective.score(self.live, rows)

        digests = [row.digest for row in rows.examples]
        return self.cache.array(("scores", objective.measure, candidate.key, digests), score)

    def split(self, part: Part, scores: Mapping[str, Scores]) -> Split:
        """Returns candidates' scores on these rows as one value."""
        return Split(
            self.task.measure,
            self.skills.measure,
            row_set(part.task.examples),
            row_set(part.keep.examples, part.categories),
            scores,
        )

    def tried(
        self, candidates: Sequence[Candidate], part: Part, what: str, progress: Progress | None = None
    ) -> dict[str, Scores]:
        """Returns every candidate's scores, by name."""
        found = {}
        for candidate in candidates:
            found[candidate.name] = self.scores(candidate, part)
            if progress:
                progress(what, len(found), len(candidates))
        return found


@dataclass(frozen=True)
class Tried:
    """What successive halving left, and what it dropped."""

    split: Split
    """Scores of the survivors on all rows."""
    dropped: dict[str, int]
    """Number of task rows after which a candidate was dropped, by name."""

    @cached_property
    def names(self) -> list[str]:
        """The survivors, base and unedited among them."""
        return list(self.split.scores)


def halved(
    bench: Bench, candidates: Sequence[Candidate], always: Iterable[str], part: Part, progress: Progress | None
) -> Tried:
    """Returns scores on all rows of those candidates that are no clear losers on the first quarter.

    After a quarter of the rows the half of the candidates goes on that is dominated by the fewest others; ties go on.

    Args:
        bench: The loaded model.
        candidates: What is tried, base and unedited among them.
        always: Names that go on in any case.
        part: The rows.
        progress: Called while scoring.
    """
    first = part.first(max(32, len(part.task) // 4), max(32, len(part.keep) // 4))
    rest = part.after(first)
    early = bench.tried(candidates, first, "trying", progress)
    split = bench.split(first, early)
    kept = {*always, *_best_half(split)}
    survivors = [candidate for candidate in candidates if candidate.name in kept]
    late = bench.tried(survivors, rest, "trying on", progress) if len(rest.task) or len(rest.keep) else None
    whole = {name: _appended(early[name], late[name]) if late else early[name] for name in _names(survivors)}
    dropped = {name: len(first.task) for name in _names(candidates) if name not in kept}
    return Tried(bench.split(part, whole), dropped)


def _names(candidates: Iterable[Candidate]) -> list[str]:
    return [candidate.name for candidate in candidates]


def _appended(early: Scores, late: Scores) -> Scores:
    return Scores(np.concatenate([early.task, late.task]), np.concatenate([early.skills, late.skills]))


def _best_half(split: Split) -> list[str]:
    names = list(split.scores)
    sign = [-1.0 if measure.lower_is_better else 1.0 for measure in (split.task, split.skills)]
    means = np.array([[sign[0] * s.task.mean(), sign[1] * s.skills.mean()] for s in split.scores.values()])
    beaten = ((means[:, None] <= means).all(2) & (means[:, None] < means).any(2)).sum(1)
    return [name for name, count in zip(names, beaten, strict=True) if count <= np.median(beaten)]
