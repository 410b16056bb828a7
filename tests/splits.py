"""Made-up scores with a planted truth: rows of all candidates share their difficulty, as paired scores do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spectral_surgery.judging.trials import BASE, UNEDITED, Measure, RowSet, Scores, Split

ACCURACY = Measure("exact answers", "share of rows", lower_is_better=False, binary=True)
LOSS = Measure("loss of the answer", "nats per token", lower_is_better=True)
DRIFT = Measure("drift from the base", "nats per token", lower_is_better=True)
AGREEMENT = Measure("agreement with your adapter", "share of answer tokens", lower_is_better=False)

Means = Mapping[str, tuple[float, float]]
"""Task and other skills by candidate."""


def rows(n: int, groups: Sequence[str] | None = None) -> RowSet:
    return RowSet(tuple(f"{i:012x}" for i in range(n)), tuple(groups or map(str, range(n))), ("",) * n)


def scores(rng: np.random.Generator, measure: Measure, n: int, means: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Returns every candidate's scores on n rows; for 0/1 scores about 2 % of the rows differ by chance alone."""
    ease = rng.uniform(size=n)
    if measure.binary:
        noisy = {name: np.clip(ease + 0.02 * rng.standard_normal(n), 0, 1) for name in means}
        return {name: (noisy[name] < mean).astype(float) for name, mean in means.items()}
    hardness = rng.gamma(2, 0.5, n)
    return {name: mean * hardness * np.exp(0.2 * rng.standard_normal(n) - 0.02) for name, mean in means.items()}


def split(means: Means, n: int = 600, seed: int = 0, task: Measure = ACCURACY, skills: Measure = ACCURACY) -> Split:
    """Returns a split of n rows of each side."""
    rng = np.random.default_rng(seed)
    one = scores(rng, task, n, {name: pair[0] for name, pair in means.items()})
    other = scores(rng, skills, n, {name: pair[1] for name, pair in means.items()})
    return Split(task, skills, rows(n), rows(n), {name: Scores(one[name], other[name]) for name in means})


def exact(
    task: Mapping[str, Sequence[float]],
    skills: Mapping[str, Sequence[float]] | None = None,
    task_measure: Measure = ACCURACY,
    skills_measure: Measure = ACCURACY,
) -> Split:
    """Returns a split with just these scores; base and unedited are the first's where they are missing.

    Without skills these are one row on which all are alike.
    """
    sides = []
    for side in (task, skills or {name: [1.0] for name in task}):
        arrays = {name: np.asarray(values, dtype=float) for name, values in side.items()}
        first = next(iter(arrays.values()))
        sides.append({BASE: first, UNEDITED: first, **arrays})
    n, m = len(sides[0][UNEDITED]), len(sides[1][UNEDITED])
    found = {name: Scores(sides[0][name], sides[1][name]) for name in sides[0]}
    return Split(task_measure, skills_measure, rows(n), rows(m), found)


def grouped(one: Split, size: int) -> Split:
    """Returns the same scores with every ``size`` neighbouring rows in one group."""
    task = rows(len(one.task_rows), [str(i // size) for i in range(len(one.task_rows))])
    skills = rows(len(one.skills_rows), [str(i // size) for i in range(len(one.skills_rows))])
    return Split(one.task, one.skills, task, skills, one.scores)


def answers(right: int, wrong: int) -> list[float]:
    return [1.0] * right + [0.0] * wrong


def curve(points: int = 10, cost: float = 0.12, gain: float = 0.4) -> dict[str, tuple[float, float]]:
    """Returns base, unedited and ever bolder edits that lose the task ever faster."""
    found = {BASE: (0.85, 0.8), UNEDITED: (0.97, 0.35)}
    for i in range(1, points + 1):
        found[f"edit {i}"] = (0.97 - cost * (i / points) ** 2.5, 0.35 + gain * i / points)
    return found
