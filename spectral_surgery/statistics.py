"""Paired comparison of per-example scores: intervals, tests, and a fixed order of tests at one error rate.

Two adapters are always scored on the same examples, so everything here works on their per-example differences.
Re-scoring one and the same adapter moves a benchmark by more than most claimed gains; only the paired difference says
whether an edit did anything.

- 0/1 scores: Tango's score interval for the difference of paired proportions (Tango, Statistics in Medicine 17, 1998).
  With few discordant examples a percentile bootstrap claims too much; with none this interval still has a width.
- losses: the studentised bootstrap (Efron and Tibshirani, 1993, ch. 12), for examples or groups of examples.
- 0/1 scores, one-sided: McNemar's exact test that the difference is above zero, and the score test of the ratio of two
  paired proportions that it is above a given one (Tang, Tang and Chan, Statistics in Medicine 22, 2003).
- several candidates: fixed-sequence testing. Candidates are ordered beforehand from surest to boldest and tested in
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

Counts = np.ndarray | float | int
"""How often something was seen: one number, or one a case."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits."""

    estimate: float
    low: float
    high: float


def paired_proportions(
    wins: int | float, losses: int | float, n: int | float, *, confidence: float = 0.95
) -> Interval:
    """Returns Tango's two-sided score interval for the difference of two paired proportions.

    Args:
        wins: Examples that only the first gets right.
        losses: Examples that only the second gets right.
        n: Examples in all. Counts need not be whole.
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

    edge, counts = 1 - 1e-12, (wins, losses, n)
    low = high = math.copysign(1.0, estimate)
    if losses < n:
        low = float(brentq(_tango_distance, -edge, min(estimate, edge), args=(*counts, z), xtol=1e-12))
    if wins < n:
        high = float(brentq(_tango_distance, max(estimate, -edge), edge, args=(*counts, -z), xtol=1e-12))
    return Interval(estimate, low, high)


def _tango_distance(delta: float, wins: int | float, losses: int | float, n: int | float, z: float) -> float:
    return _tango_score(wins, losses, n, delta) - z


def _tango_score(wins: int | float, losses: int | float, n: int | float, delta: float) -> float:
    """Returns the score statistic of the hypothesis that the difference is ``delta``, decreasing in delta."""
    b = -wins - losses + (2 * n - wins + losses) * delta
    c = -losses * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * q + delta * (1 - delta))
    difference = wins - losses - n * delta
    if difference == 0:
        return 0.0
    return difference / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, difference)


def mcnemar(wins: Counts, losses: Counts) -> np.ndarray:
    """Returns McNemar's exact one-sided p-values that the first is better; 1 without discordant examples.

    Args:
        wins: Examples that only the first gets right.
        losses: Examples that only the second gets right.
    """
    from scipy.special import bdtrc

    wins, both = np.asarray(wins, dtype=float), np.asarray(wins, dtype=float) + np.asarray(losses, dtype=float)
    return np.where(wins > 0, bdtrc(np.maximum(wins, 1) - 1, both.astype(np.int64), 0.5), 1.0)


def paired_ratio(both: Counts, wins: Counts, losses: Counts, n: int | float, ratio: float) -> np.ndarray:
    """Returns one-sided p-values that the first's proportion is above ``ratio`` times the second's.

    The score test of Tang, Tang and Chan (2003, Eq. 5): the standard error is that of the likeliest table on the
    hypothesis' edge, so that it is right also where no example is discordant.

    Args:
        both: Examples that both get right.
        wins: Examples that only the first gets right.
        losses: Examples that only the second gets right.
        n: Examples in all. Counts need not be whole.
        ratio: In (0, 1).
    """
    from scipy.special import ndtr

    both, wins, losses = (np.asarray(counts, dtype=float) for counts in (both, wins, losses))
    some = both + wins + losses
    a = n * (1 + ratio)
    b = (both + losses) * ratio**2 - (both + wins + 2 * losses)
    c = losses * (1 - ratio) * some / n
    only_second = (-b + np.sqrt(np.maximum(b * b - 4 * a * c, 0))) / (2 * a)
    variance = n * ((1 + ratio) * only_second + some * (ratio - 1) / n)
    difference = both + wins - ratio * (both + losses)
    score = np.divide(difference, np.sqrt(np.maximum(variance, 0)), out=np.zeros_like(some), where=variance > 0)
    return np.asarray(ndtr(-score))


def clopper_pearson(hits: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Returns the exact two-sided interval of a proportion."""
    from scipy.stats import binomtest

    limits = binomtest(hits, n).proportion_ci(confidence, method="exact")
    return Interval(hits / n, float(limits.low), float(limits.high))


def student(means: Counts, errors: Counts, groups: int) -> np.ndarray:
    """Returns one-sided p-values that means are above zero, by Student's t; 1 where an error is zero.

    Args:
        means: Means over examples.
        errors: Their standard errors.
        groups: Independent groups of examples, at least 2.
    """
    from scipy.special import stdtr

    t = np.divide(means, errors, out=np.full(np.broadcast(means, errors).shape, -np.inf), where=np.asarray(errors) > 0)
    return np.asarray(stdtr(groups - 1, -t))


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
    t = _resampled(sums, counts, estimate, resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(t, [tail, 1 - tail], method="closest_observation")
    return Interval(estimate, float(estimate - high * error), float(estimate - low * error))


def bootstrap_p(
    values: Float[np.ndarray, " examples"],
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 4000,
    seed: int = 0,
) -> float:
    """Returns the one-sided p-value that a mean is above zero, by the studentised bootstrap.

    The same resamples as :func:`bootstrap_mean`'s: under level a where its lower limit at confidence 1 - 2a is above
    zero, up to one resample.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    sums, counts = _by_group(values, groups)
    if len(sums) < 2:
        raise ValueError(f"{len(sums)} group of examples has no interval; at least 2 are needed.")
    estimate, error = map(float, _ratio(sums, counts))
    if error == 0:
        return 1 / (1 + resamples) if estimate > 0 else 1.0
    count = int((_resampled(sums, counts, estimate, resamples, seed) >= estimate / error).sum())
    return (1 + count) / (1 + resamples)


def mean_error(values: Float[np.ndarray, " examples"], groups: Sequence[str] | None = None) -> tuple[float, float]:
    """Returns the mean over examples and its standard error over groups; infinite with fewer than two groups."""
    sums, counts = _by_group(values, groups)
    if len(sums) < 2:
        return float(values.mean()), math.inf
    mean, error = _ratio(sums, counts)
    return float(mean), float(error)


def _resampled(sums: np.ndarray, counts: np.ndarray, estimate: float, resamples: int, seed: int) -> np.ndarray:
    """Returns the t statistic of every bootstrap sample around the estimate.

    How often each group was drawn, times the groups' moments, gives every sample's moments.
    """
    m = len(sums)
    drawn = np.random.default_rng(seed).integers(0, m, (resamples, m))
    drawn += np.arange(resamples)[:, None] * m
    often = np.bincount(drawn.ravel(), minlength=resamples * m).reshape(resamples, m).astype(float)
    sums = sums - estimate * counts
    total, size, squares, products, sizes = (often @ np.stack([sums, counts, sums**2, sums * counts, counts**2], 1)).T
    means = total / size
    residual = squares - 2 * means * products + means**2 * sizes
    errors = np.sqrt(np.where(residual > 1e-12 * squares, residual, 0) * m / (m - 1)) / size
    without_error = np.select([means > 0, means < 0], [np.inf, -np.inf], 0.0)
    return np.divide(means, errors, out=without_error, where=errors > 0)


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
