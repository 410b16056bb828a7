"""The loaded model as a bench: any candidate in, its per-row scores out, each worked out once."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool

from spectral_surgery.calibration import Tokenized
from spectral_surgery.judging.trials import Measure, Scores, Split
from spectral_surgery.live import Live
from spectral_surgery.options import BatchOptions
from spectral_surgery.refining.cache import Cache
from spectral_surgery.refining.candidates import Candidate
from spectral_surgery.refining.rows import row_set
from spectral_surgery.refining.scoring import Objective, Rows, Vector
from spectral_surgery.statistics import clopper_pearson

CONFIDENCE = 0.95
"""Of intervals that are shown and are no test."""
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


RUNGS = (1 / 8, 3 / 8)
"""Shares of the rows after which clear losers are dropped."""
FEWEST_ROWS = 32
"""On fewer nothing is dropped."""


def halved(
    bench: Bench,
    candidates: Sequence[Candidate],
    always: Iterable[str],
    part: Part,
    progress: Progress | None,
    rungs: Sequence[float] = RUNGS,
) -> Tried:
    """Returns scores on all rows of those candidates that are no clear losers on the first of them.

    Successive halving: at each rung the half of the candidates goes on that is clearly beaten by the fewest others;
    ties go on.

    Args:
        bench: The loaded model.
        candidates: What is tried, base and unedited among them.
        always: Names that go on in any case.
        part: The rows.
        progress: Called while scoring.
        rungs: Shares of the rows after which losers are dropped.
    """
    kept, always = list(candidates), set(always)
    scores: dict[str, Scores] = {}
    dropped: dict[str, int] = {}
    done = part.first(0, 0)
    for share in (*rungs, 1.0):
        reached = part.first(*(_at_least(share, len(rows)) for rows in (part.task, part.keep)))
        found = bench.tried(kept, reached.after(done), "trying", progress)
        scores = {name: _appended(scores[name], found[name]) if scores else found[name] for name in found}
        done = reached
        if share < 1:
            going_on = always | set(_best_half(bench.split(done, scores), always))
            dropped |= {one.name: len(done.task) for one in kept if one.name not in going_on}
            kept = [one for one in kept if one.name in going_on]
            scores = {name: scores[name] for name in scores if name in going_on}
    return Tried(bench.split(part, scores), dropped)


def _at_least(share: float, rows: int) -> int:
    return min(rows, max(FEWEST_ROWS, round(share * rows)))


def _appended(early: Scores, late: Scores) -> Scores:
    return Scores(np.concatenate([early.task, late.task]), np.concatenate([early.skills, late.skills]))


def _best_half(split: Split, always: Container[str]) -> list[str]:
    """Returns which go on: the half of those not in ``always`` that fewest clearly beat, and any that only one does.

    Clearly beaten is what another leads by more than a standard error of the paired difference in task and in other
    skills: on so few rows neighbours on the trade-off's edge often lead each other by luck.
    """
    names = list(split.scores)
    beaten = _beaten(split).sum(1)
    others = [count for name, count in zip(names, beaten, strict=True) if name not in always]
    limit = max(1.0, float(np.median(others))) if others else 0.0
    return [name for name, count in zip(names, beaten, strict=True) if count <= limit]


def _beaten(split: Split) -> Bool[np.ndarray, "n n"]:
    """Returns whether each candidate (row) is clearly beaten by each other (column)."""

    def led(scores: list[np.ndarray], measure: Measure) -> np.ndarray:
        values = np.array(scores, dtype=np.float64) * (-1 if measure.lower_is_better else 1)
        means, covariance = values.mean(1), np.cov(values, bias=True)
        variance = np.diag(covariance)
        squared_error = (variance[:, None] + variance - 2 * covariance).clip(min=0) / values.shape[1]
        return means - means[:, None] > np.sqrt(squared_error)

    task, skills = zip(*((one.task, one.skills) for one in split.scores.values()), strict=True)
    return led(list(task), split.task) & led(list(skills), split.skills)


def mean_of(values: np.ndarray) -> dict[str, float]:
    """Returns mean and standard error, and for 0/1 scores the exact 95 % limits: at 0 and 1 the error says nothing."""
    n = len(values)
    found = {"mean": float(values.mean()), "se": float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0}
    if not np.isin(values, (0, 1)).all():
        return found
    limits = clopper_pearson(int(values.sum()), n, confidence=CONFIDENCE)
    return {**found, "low": limits.low, "high": limits.high}
