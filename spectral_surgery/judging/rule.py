"""The user's rule, and how surely one candidate meets it: paired scores in, intervals and p-values out.

The rule has one knob, ``may_lose``. Above zero it asks for more of the other skills, with the task not worse than that
share of its score; zero asks for a better task, with the other skills not worse. Either way two things must be shown,
so a candidate's p-value is the larger of two (intersection-union test: Berger, Technometrics 24, 1982).

A margin that is a share of a measured score is itself measured. It is not plugged in: what is tested is one number a
row, ``gain + share * reference > 0``, so that the margin's own sampling error counts.

How it is tested depends on the scores:

- 0 or 1, every row for itself: McNemar's exact test without a margin, the score test of a ratio of paired proportions
  with one, because losing at most 2 % of a score is a ratio above 0.98.
- anything else, and rows in groups: the studentised bootstrap by group, because both of those take rows for
  independent.
- the same, but hardly any group differs: a bootstrap never draws the difference it has not seen and would be sure of
  far too much. Then the first kind of test, for as many rows as there are groups.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float

from spectral_surgery.errors import RunError
from spectral_surgery.judging.trials import BASE, UNEDITED, Measure, RowSet, Split
from spectral_surgery.statistics import (
    Interval,
    bootstrap_mean,
    bootstrap_p,
    mcnemar,
    mean_error,
    paired_proportions,
    paired_ratio,
)

FEWEST_GROUPS = 8
"""With fewer groups of rows the bootstrap shows nothing."""
FEWEST_DIFFERENT = 10
"""With fewer groups that differ, and most that do not, the bootstrap is not trusted."""

Side = Literal["task", "skills"]


@dataclass(frozen=True)
class Rule:
    """What is asked for, and how surely."""

    may_lose: float = 0.02
    """Share of the task's score that may be lost for other skills, in [0, 1); 0 asks for a better task."""
    error_rate: float = 0.05
    """Probability of confirming anything wrongly, before it is shared with earlier verdicts on the same rows."""
    finalists: int = 10
    """At most so many candidates are confirmed."""
    skills_may_lose: float = 0.02
    """With ``may_lose`` 0: share of the other skills' score that may be lost."""
    drift_may_grow: float = 0.05
    """With ``may_lose`` 0: share by which a loss on other skills, or the drift from the base, may grow."""

    @property
    def wanted(self) -> Side:
        """The side on which more is asked for."""
        return "skills" if self.may_lose else "task"

    def level(self, earlier: int = 0) -> float:
        """Returns the error rate of a verdict that comes after ``earlier`` others on the same rows."""
        return self.error_rate / (1 + earlier)

    def share(self, side: Side, measure: Measure) -> float:
        """Returns which share of the reference may be lost on one side."""
        if side == "task" or side == self.wanted:
            return self.may_lose if side == "task" else 0.0
        return self.drift_may_grow if measure.lower_is_better else self.skills_may_lose


@dataclass(frozen=True)
class Margins:
    """How much worse than the unedited adapter still counts as not worse, in each measure's unit."""

    task: float
    skills: float


@dataclass(frozen=True)
class Pair:
    """Two candidates' scores on the same rows, and what may be lost between them."""

    measure: Measure
    rows: RowSet
    ours: Float[np.ndarray, " rows"]
    theirs: Float[np.ndarray, " rows"]
    reference: Float[np.ndarray, " rows"]
    """What the margin is a share of, row by row."""
    share: float

    @cached_property
    def gain(self) -> Float[np.ndarray, " rows"]:
        """By how much ours is better."""
        return self.measure.gain(self.ours, self.theirs)

    @cached_property
    def spare(self) -> Float[np.ndarray, " rows"]:
        """Gain and margin: its mean is above zero where ours is not worse by the margin."""
        return self.gain + self.share * self.reference

    @cached_property
    def groups(self) -> tuple[str, ...] | None:
        """Names of the groups; None where every row is its own."""
        return None if len(set(self.rows.groups)) == len(self.rows) else self.rows.groups

    @property
    def kind(self) -> Literal["counts", "few", "mean"]:
        """How the pair is tested: see above."""
        bounded = self._bounded and not (self.share and self.measure.lower_is_better)
        if self.measure.binary and bounded and self.groups is None:
            return "counts"
        return "few" if bounded and self._hardly_differs else "mean"

    @property
    def _bounded(self) -> bool:
        """Whether scores are shares, of which wins and losses can be counted."""
        both = np.concatenate([self.ours, self.theirs])
        return self.measure.binary or (not self.measure.lower_is_better and bool(both.min() >= 0 and both.max() <= 1))

    @property
    def _hardly_differs(self) -> bool:
        names = self.rows.groups
        different = {name for name, gain in zip(names, self.gain, strict=True) if gain}
        return len(different) < min(FEWEST_DIFFERENT, len(set(names)) / 2)

    def counts(self) -> tuple[float, float, float, float]:
        """Returns both, wins, losses and rows, scaled to as many independent rows as the groups are worth.

        A share counts in part. The number is Kish's, n^2 / sum of squared group sizes: rows of a group are taken for
        copies of each other, which is the worst that they can be.
        """
        n = len(self.rows)
        worth = n / sum(size**2 for size in Counter(self.rows.groups).values())
        both, wins, losses = np.minimum(self.ours, self.theirs), np.maximum(self.gain, 0), np.maximum(-self.gain, 0)
        return float(both.sum()) * worth, float(wins.sum()) * worth, float(losses.sum()) * worth, n * worth


def pair(split: Split, ours: str, theirs: str, side: Side, share: float = 0.0) -> Pair:
    """Returns two candidates' scores on one side.

    Raises:
        RunError: If a score is missing or not finite.
    """
    measure, rows = (split.task, split.task_rows) if side == "task" else (split.skills, split.skills_rows)
    scores = [_scores(split, name, side, rows, measure) for name in (ours, theirs, BASE, UNEDITED)]
    return Pair(measure, rows, scores[0], scores[1], _reference(measure, side, scores[2], scores[3]), share)


def _reference(measure: Measure, side: Side, base: np.ndarray, unedited: np.ndarray) -> np.ndarray:
    """Returns what a margin is a share of: the score; of a drift the drift; of a task's loss what was learned.

    A base that never gives the answer's form has a huge loss, and a share of that would allow anything. So where more
    than a nat per token was learned, the share is of one nat: two percent of it are two percent of perplexity.
    """
    if not measure.lower_is_better:
        return unedited * (1 if unedited.mean() >= 0 else -1)
    if side == "skills":
        return unedited
    learned = base - unedited
    return learned if learned.mean() < 1 else np.ones_like(learned)


def _scores(split: Split, name: str, side: Side, rows: RowSet, measure: Measure) -> np.ndarray:
    if name not in split.scores:
        raise RunError(f"{name} has no scores among {len(split.scores)} candidates; score it on these rows first.")
    values = np.asarray(getattr(split.scores[name], side), dtype=float)
    what = f"{name}: the score ({measure.name})"
    if len(values) != len(rows) or not len(rows):
        raise RunError(f"{what} has {len(values)} values for {len(rows)} rows.")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise RunError(f"{what} of row {rows.digests[row][:12]} is {values[row]}. Nothing can be compared with that.")
    if measure.binary and not ((values == 0) | (values == 1)).all():
        raise RunError(f"{what} should be 0 or 1 on every row, but {values.min():g} to {values.max():g} was found.")
    return values


def check(split: Split, names: Iterable[str] = ()) -> None:
    """Raises RunError when a score of base, unedited or one of ``names`` is missing or not finite."""
    for name in (*names, BASE, UNEDITED):
        pair(split, name, UNEDITED, "task")
        pair(split, name, UNEDITED, "skills")


def required(split: Split, name: str, rule: Rule, side: Side) -> Pair:
    """Returns a candidate beside the unedited adapter, with what the rule lets it lose on this side."""
    measure = split.task if side == "task" else split.skills
    return pair(split, name, UNEDITED, side, rule.share(side, measure))


def margins(split: Split, rule: Rule) -> Margins:
    """Returns the margins as estimated on these rows, for display; they are tested by :func:`surety`."""
    sides = (required(split, UNEDITED, rule, "task"), required(split, UNEDITED, rule, "skills"))
    return Margins(*(float(side.share * side.reference.mean()) for side in sides))


def gains(split: Split, ours: str, theirs: str, side: Side = "task", confidence: float = 0.9) -> Interval:
    """Returns by how much ``ours`` is better than ``theirs``, positive is better, with a two-sided interval.

    Tango's score interval, or the studentised bootstrap by group; see above for which. Without limits where rows are
    too few for the bootstrap.

    Args:
        split: With both candidates.
        ours: Name of a candidate.
        theirs: Name of another.
        side: The task, or the other skills.
        confidence: Two-sided; a one-sided statement at level a reads the matching limit of 1 - 2a.
    """
    return gain_interval(pair(split, ours, theirs, side), confidence)


def gain_interval(compared: Pair, confidence: float) -> Interval:
    """Returns the interval of a pair's mean gain."""
    estimate = float(compared.gain.mean())
    if compared.kind != "mean":
        _, wins, losses, n = compared.counts()
        found = paired_proportions(wins, losses, n, confidence=confidence)
        return Interval(estimate, found.low, found.high)
    if len(set(compared.rows.groups)) < FEWEST_GROUPS:
        return Interval(estimate, -math.inf, math.inf)
    return bootstrap_mean(compared.gain, groups=compared.groups, confidence=confidence)


def p_value(compared: Pair) -> float:
    """Returns the one-sided p-value that ours is better, or not worse by the margin where the pair has one."""
    if compared.kind == "mean":
        few = len(set(compared.rows.groups)) < FEWEST_GROUPS
        return 1.0 if few else bootstrap_p(compared.spare, groups=compared.groups)
    both, wins, losses, n = compared.counts()
    if compared.share:
        return float(paired_ratio(both, wins, losses, n, 1 - compared.share))
    return float(mcnemar(math.floor(wins), math.ceil(losses)))


def surety(split: Split, name: str, rule: Rule) -> tuple[float, float]:
    """Returns the one-sided p-values of the rule's requirements on the task and on the other skills."""
    return p_value(required(split, name, rule, "task")), p_value(required(split, name, rule, "skills"))


def spare(split: Split, name: str, rule: Rule, side: Side) -> tuple[float, float]:
    """Returns the mean by which a candidate meets the rule on one side, and its standard error."""
    needed = required(split, name, rule, side)
    return mean_error(needed.spare, needed.groups)


def merit(split: Split, name: str, rule: Rule) -> float:
    """Returns what the rule wants most of: the gain on one side, -inf where the other side is out of its margin.

    One number, fixed before anything is drawn, so that permutations of the gates can be counted by it.
    """
    kept: Side = "task" if rule.may_lose else "skills"
    if spare(split, name, rule, kept)[0] < 0:
        return -math.inf
    return float(pair(split, name, UNEDITED, rule.wanted).gain.mean())


def smallest_difference(rows: int, discordance: float = 0.05) -> float:
    """Returns about the smallest difference of two shares that so many rows can show: 2.5 sqrt(discordance / rows).

    Args:
        rows: Test rows.
        discordance: Share of rows on which the two differ.
    """
    return 2.5 * math.sqrt(discordance / rows) if rows else math.inf
