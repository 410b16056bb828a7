"""The error rate of choice and confirmation, measured on the run's own scores where nothing is true.

No model is needed. If a candidate is neither better nor worse than the unedited adapter, exchanging the two scores of
a row is as likely as not exchanging them. So the run is replayed with the sign of each row's difference (each group's)
drawn at random, once for all candidates, so that they stay as alike as they are. That makes one of the rule's two
requirements untrue of every candidate, just so; the other requirement's scores stay as observed, so that it protects
no more than it did in the run. Every confirmation is then a false one.

- Without a margin the differences are flipped around zero: exactly the null that no candidate differs.
- With a margin the truth has to lie on its edge. Scores of 0 or 1: after the exchange, a right answer of the
  candidates becomes wrong with probability ``share``, in the same rows for all, so every candidate's expected score is
  exactly ``1 - share`` of the unedited adapter's. Other scores: the differences with the margin added are flipped, so
  their mean is zero.

Both requirements are made untrue in turn and the worse rate is reported. Replays confirm by the same exact and score
tests as the run does for 0/1 scores, and by Student's t where the run takes the bootstrap, which would take hours; the
two agree unless rows are few and very skewed. The chain stops at its first failure, so a replay confirms something
exactly when its first finalist passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from spectral_surgery.judging.choosing import finalists
from spectral_surgery.judging.rule import FEWEST_GROUPS, Pair, Rule, Side, check, p_value, required
from spectral_surgery.judging.trials import BASE, UNEDITED, Split
from spectral_surgery.statistics import clopper_pearson, mcnemar, paired_ratio, student

SIDES: tuple[Side, Side] = ("task", "skills")


@dataclass(frozen=True)
class ErrorRate:
    """How often something was confirmed although nothing was there to confirm."""

    estimate: float
    low: float
    """Clopper-Pearson, 95 % two-sided."""
    high: float
    replays: int
    untrue: Side
    """Which requirement was made untrue; the worse of the two is reported."""


@dataclass(frozen=True)
class Evidence:
    """What choice and confirmation look at on one side, of every candidate; one row a replay, or one for all."""

    mean: Float[np.ndarray, "times candidates"]
    """By how much the rule is met: gain and margin."""
    error: Float[np.ndarray, "times candidates"]
    """Standard errors of these."""
    p: Float[np.ndarray, "times candidates"]
    """One-sided."""


def replay(
    validation: Split,
    test: Split,
    rule: Rule,
    candidates: Iterable[str],
    level: float,
    *,
    swapped: bool = False,
    times: int = 2000,
    seed: int = 0,
) -> ErrorRate:
    """Returns how often choice and confirmation confirm anything when nothing is true.

    Args:
        validation: Scores of the candidates.
        test: Scores of the same candidates; those that were scored on one split only take no part, which changes what
            is chosen but not how often it is wrongly confirmed.
        rule: What was asked for.
        candidates: Names.
        level: Of each test in the chain.
        swapped: The two splits are halves, and each is confirmed on what was chosen on the other.
        times: Replays of each null.
        seed: Of the signs.
    """
    both = [name for name in dict.fromkeys(candidates) if name in validation.scores and name in test.scores]
    names = [name for name in both if name not in (BASE, UNEDITED)]
    check(validation, names)
    check(test, names)
    if not names:
        return ErrorRate(0.0, 0.0, 1.0, 0, rule.wanted)
    rng = np.random.default_rng(seed)
    run = _Run(validation, test, rule, names, level, swapped, times)
    hits = {untrue: int(run.false(untrue, rng).sum()) for untrue in SIDES}
    worst = max(SIDES, key=lambda side: hits[side])
    found = clopper_pearson(hits[worst], times)
    return ErrorRate(found.estimate, found.low, found.high, times, worst)


@dataclass(frozen=True)
class _Run:
    """What is replayed."""

    validation: Split
    test: Split
    rule: Rule
    names: Sequence[str]
    level: float
    swapped: bool
    times: int

    def false(self, untrue: Side, rng: np.random.Generator) -> Bool[np.ndarray, " times"]:
        """Returns in which replays something was confirmed although one side is untrue of everything."""
        seen = [
            {side: evidence(split, self.names, self.rule, side, self.times * (side == untrue), rng) for side in SIDES}
            for split in (self.validation, self.test)
        ]
        found = self._confirms(*seen)
        return found | self._confirms(*reversed(seen)) if self.swapped else found

    def _confirms(self, chosen: dict[Side, Evidence], confirmed: dict[Side, Evidence]) -> Bool[np.ndarray, " times"]:
        """Returns in which replays the first finalist passes both tests."""
        passes = np.maximum(confirmed["task"].p, confirmed["skills"].p) <= self.level
        columns = (chosen["task"].mean, chosen["task"].error, chosen["skills"].mean, chosen["skills"].error)
        rows = zip(*np.broadcast_arrays(*columns), strict=True)
        orders = (finalists(a, b, c, d, self.rule) for a, b, c, d in rows)
        return np.array([len(order) > 0 and bool(row[order[0]]) for order, row in zip(orders, passes, strict=True)])


def evidence(
    split: Split, names: Sequence[str], rule: Rule, side: Side, times: int, rng: np.random.Generator
) -> Evidence:
    """Returns what is seen of every candidate on one side: as observed with ``times`` 0, else where it is untrue."""
    pairs = [required(split, name, rule, side) for name in names]
    group = np.unique(np.asarray(pairs[0].rows.groups), return_inverse=True)[1]
    shape = (max(times, 1), group.max() + 1)
    signs = 1.0 - 2.0 * rng.integers(0, 2, shape) if times else np.ones(shape)
    if all(pair.kind == "counts" for pair in pairs):
        kept = rng.random((len(signs), len(group))) >= (pairs[0].share if times else 0)
        return _counted(pairs, signs[:, group], kept.astype(float))
    return _averaged(pairs, signs, group)


def _counted(pairs: Sequence[Pair], signs: np.ndarray, kept: np.ndarray) -> Evidence:
    """Returns the evidence of 0/1 scores after exchanging some rows' scores and keeping only some right answers.

    Args:
        pairs: Of every candidate.
        signs: (times, rows), -1 where a row's two scores are exchanged.
        kept: (times, rows), 0 where the candidates' right answer becomes wrong.
    """
    share, n = pairs[0].share, len(pairs[0].rows)
    gain = np.stack([pair.gain for pair in pairs], 1)
    right = np.stack([np.minimum(pair.ours, pair.theirs) for pair in pairs], 1)
    differ = np.abs(gain)
    both = kept @ right
    wins = (kept @ differ + (kept * signs) @ gain) / 2
    losses = right.sum(0) - both + (differ.sum(0) - signs @ gain) / 2
    mean = (share * both + wins - (1 - share) * losses) / n
    square = (share**2 * both + wins + (1 - share) ** 2 * losses) / n
    error = np.sqrt(np.maximum(square - mean**2, 0) / max(n - 1, 1))
    p = paired_ratio(both, wins, losses, n, 1 - share) if share else mcnemar(wins.round(), losses.round())
    return Evidence(mean, error, p)


def _averaged(pairs: Sequence[Pair], signs: np.ndarray, group: np.ndarray) -> Evidence:
    """Returns the evidence of other scores after changing the sign of some groups.

    Args:
        pairs: Of every candidate.
        signs: (times, groups), -1 where a group's sign is changed.
        group: Number of every row's group.
    """
    n, m = len(group), signs.shape[1]
    sums = np.stack([np.bincount(group, pair.spare, m) for pair in pairs], 1)
    sizes = np.bincount(group, minlength=m)[:, None].astype(float)
    mean = signs @ sums / n
    residual = (sums**2).sum(0) - 2 * mean * (signs @ (sums * sizes)) + mean**2 * (sizes**2).sum()
    error = np.sqrt(np.maximum(residual, 0) * m / max(m - 1, 1)) / n
    p = student(mean, error, m) if m >= FEWEST_GROUPS else np.ones_like(mean)
    for i, pair in enumerate(pairs):
        if pair.kind == "few" and len(signs) == 1:
            p[:, i] = p_value(pair)
        elif pair.kind == "few" and not pair.share:
            p[:, i] = _few(pair, signs, group)
    return Evidence(mean, error, p)


def _few(pair: Pair, signs: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Returns the p-values of one candidate that hardly differs, after changing the sign of some groups."""
    _, wins, losses, n = pair.counts()
    balance = signs @ np.bincount(group, pair.gain, signs.shape[1]) * n / len(group)
    return mcnemar(np.floor((wins + losses + balance) / 2 + 1e-9), np.ceil((wins + losses - balance) / 2 - 1e-9))
