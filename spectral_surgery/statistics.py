"""Paired comparison of per-example scores: intervals, tests, and a fixed order of tests at one error rate.

Two adapters are always scored on the same examples, so everything here works on their per-example differences.
Re-scoring one and the same adapter moves a benchmark by more than most claimed gains; only the paired difference says
whether an edit did anything.

- 0/1 scores: Tango's score interval for the difference of paired proportions (Tango, Statistics in Medicine 17, 1998).
  With few discordant examples a percentile bootstrap claims too much; with none this interval still has a width.
- losses: the studentised bootstrap (Efron and Tibshirani, 1993, ch. 12), for examples or groups of examples.
- several candidates: fixed-sequence testing. Candidates are ordered beforehand from safest to boldest and tested in
  that order, each at the full error rate, up to the first failure (Maurer, Hothorn and Lehmacher, 1995).

All functions are pure; a bootstrap takes a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits."""

    estimate: float
    low: float
    high: float


def paired_proportions(wins: int, losses: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Returns Tango's two-sided score interval for the difference of two paired proportions.

    Args:
        wins: Examples that only the first gets right.
        losses: Examples that only the second gets right.
        n: Examples in all.
        confidence: Two-sided; a one-sided bound at level 1 - a uses 1 - 2 a here.

    Raises:
        ValueError: If there are no examples, or more discordant ones than examples.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if n < 1 or min(wins, losses) < 0 or wins + losses > n:
        raise ValueError(f"wins {wins}, losses {losses} of {n} examples are impossible.")
    z = norm.ppf(0.5 + confidence / 2)
    estimate = (wins - losses) / n

    def root(sign: int, start: float, end: float) -> float:
        def distance(delta: float) -> float:
            return _tango_score(wins, losses, n, delta) - sign * z

        return float(brentq(distance, start, end, xtol=1e-12))

    edge = 1 - 1e-12
    low = -1.0 if losses == n else root(1, -edge, min(estimate, edge))
    high = 1.0 if wins == n else root(-1, max(estimate, -edge), edge)
    return Interval(estimate, low, high)


def _tango_score(wins: int, losses: int, n: int, delta: float) -> float:
    """Returns the score statistic of the hypothesis that the difference is ``delta``, decreasing in delta."""
    b = -wins - losses + (2 * n - wins + losses) * delta
    c = -losses * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * q + delta * (1 - delta))
    difference = wins - losses - n * delta
    if difference == 0:
        return 0.0
    return difference / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, difference)


def bootstrap_mean(
    values: Float[np.ndarray, " examples"],
    *,
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Returns the studentised bootstrap interval of a mean, two-sided.

    Args:
        values: One value an example, such as a difference of two losses.
        groups: A name an example; examples of one group are resampled together. By default each is its own.
        confidence: Two-sided level.
        resamples: Bootstrap samples.
        seed: Of the resampling.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    sums, counts = _by_group(values, groups)
    m = len(sums)
    if m < 2:
        raise ValueError(f"{m} group of examples has no interval; at least 2 are needed.")
    estimate, error = map(float, _ratio(sums, counts))
    if error == 0:
        return Interval(estimate, estimate, estimate)
    drawn = np.random.default_rng(seed).integers(0, m, (resamples, m))
    means, errors = _ratio(sums[drawn], counts[drawn])
    t = np.divide(means - estimate, errors, out=np.full(resamples, np.inf), where=errors > 0)
    t = np.where(errors > 0, t, np.sign(means - estimate) * np.inf)
    tail = (1 - confidence) / 2
    low, high = np.quantile(t, [tail, 1 - tail], method="closest_observation")
    return Interval(estimate, float(estimate - high * error), float(estimate - low * error))


def _by_group(values: Float[np.ndarray, " examples"], groups: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    if groups is None:
        return values.astype(float), np.ones(len(values))
    number = np.unique(np.asarray(groups), return_inverse=True)[1]
    return np.bincount(number, values), np.bincount(number).astype(float)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[Any, Any]:
    """Returns the mean over examples and its standard error over groups, along the last axis."""
    m = sums.shape[-1]
    mean = sums.sum(-1) / counts.sum(-1)
    residual = sums - np.asarray(mean)[..., None] * counts
    return mean, np.sqrt((residual**2).sum(-1) * m / (m - 1)) / counts.sum(-1)
