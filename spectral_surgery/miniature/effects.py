"""Scores of adapters from several training seeds on the same examples, and differences with intervals of both kinds.

A difference varies with the training seed and with the examples. Values (seeds, examples) are taken as crossed: every
adapter of a family sees the same examples. The variance of their mean is estimated by

    s_seeds^2 / seeds + s_examples^2 / examples

with the variances of the seeds' means and of the examples' means; the noise that is neither's is in both terms, so the
sum is rather too large than too small. Limits are Student's t, its degrees of freedom by Satterthwaite (Biometrics
Bulletin 2, 1946). A bootstrap over three seeds would be too narrow: it takes the variance of three for that of many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from spectral_surgery.evaluating.records import read_records
from spectral_surgery.results.runs import BASE, UNEDITED, Run
from spectral_surgery.statistics import Interval, paired_proportions

LEVEL = 0.95


@dataclass(frozen=True)
class Edit:
    """One cell of the tables: what was done to an adapter."""

    policy: str
    rows: int | None = None
    energy: str | None = None
    modules: str | None = None
    own: bool = False
    """Measured on rows of its own task."""


BASE_MODEL, AS_TRAINED = Edit(BASE), Edit(UNEDITED)


@dataclass(frozen=True)
class Effect:
    """An estimate with the independent parts of its variance."""

    value: float
    parts: tuple[tuple[float, float], ...]
    """(variance, degrees of freedom) each; no degrees of freedom where one adapter says nothing of others."""

    def interval(self, level: float = LEVEL) -> Interval:
        """Returns Student's limits; infinite where a part has no degrees of freedom."""
        from scipy.stats import t

        if any(freedom < 1 for _, freedom in self.parts):
            return Interval(self.value, -math.inf, math.inf)
        total = sum(variance for variance, _ in self.parts)
        if not total:
            return Interval(self.value, self.value, self.value)
        freedom = total**2 / sum(variance**2 / own for variance, own in self.parts)
        half = float(t.ppf(0.5 + level / 2, freedom)) * math.sqrt(total)
        return Interval(self.value, self.value - half, self.value + half)


def mean(effects: Sequence[Effect]) -> Effect:
    """Returns the mean of independent effects, such as those of several families."""
    n = len(effects)
    parts = [(variance / n**2, freedom) for effect in effects for variance, freedom in effect.parts]
    return Effect(math.fsum(effect.value for effect in effects) / n, tuple(parts))


def negated(effect: Effect) -> Effect:
    """Returns an effect with the other sign."""
    return Effect(-effect.value, effect.parts)


def crossed(values: Float[np.ndarray, "seeds examples"]) -> Effect:
    """Returns the mean of values that vary with seeds and with examples.

    Where no value differs from zero, the variance is that of as many unchanged right-or-wrong answers as there are
    examples, so that no change on few examples is no certainty.
    """
    seeds, examples = values.shape
    if not values.any():
        half = paired_proportions(0, 0, examples, confidence=LEVEL).high
        return Effect(0.0, ((_variance_of(half, examples - 1), examples - 1.0), (0.0, seeds - 1.0)))
    return Effect(float(values.mean()), (_part(values.mean(1)), _part(values.mean(0))))


def over_adapters(values: Float[np.ndarray, " adapters"]) -> Effect:
    """Returns the mean of one value an adapter, those left out that have none (NaN)."""
    values = values[~np.isnan(values)]
    return Effect(float(values.mean()), (_part(values),)) if len(values) else Effect(math.nan, ((0.0, 0.0),))


def _part(means: Float[np.ndarray, " n"]) -> tuple[float, float]:
    n = len(means)
    return (float(means.var(ddof=1)) / n if n > 1 else 0.0), n - 1.0


def _variance_of(half: float, freedom: int) -> float:
    from scipy.stats import t

    return (half / float(t.ppf(0.5 + LEVEL / 2, max(freedom, 1)))) ** 2


@dataclass(frozen=True)
class Scores:
    """Every family's scores by what was done."""

    cells: Mapping[tuple[str, Edit], Float[np.ndarray, "seeds examples"]]
    """By family and edit."""

    def families(self) -> list[str]:
        """Returns the families in order."""
        return list(dict.fromkeys(family for family, _ in self.cells))

    def edits(self) -> list[Edit]:
        """Returns everything that was done to some family's adapters, in order."""
        return list(dict.fromkeys(edit for _, edit in self.cells))

    def score(self, family: str, edit: Edit) -> Effect:
        """Returns a mean score."""
        return crossed(self.cells[family, edit])

    def gain(self, family: str, edit: Edit, against: Edit = AS_TRAINED) -> Effect:
        """Returns the difference of an edit's score from another's, paired by adapter and example."""
        return crossed(self.cells[family, edit] - self.cells[family, against])


def collect(studies: Mapping[tuple[str, int], tuple[Path, Sequence[Run]]], own: str) -> Scores:
    """Returns the scores of sweeps' runs.

    Args:
        studies: Folder and runs of every adapter, by family and seed.
        own: What a study calls the adapter that is measured on its own task's rows.
    """
    found: dict[tuple[str, Edit], list[np.ndarray]] = {}
    for (family, _), (folder, runs) in studies.items():
        for run in runs:
            edit = Edit(run.policy, run.rows, run.energy, run.modules, run.name == own)
            if edit.own and run.policy in (BASE, UNEDITED):
                continue  # the same adapter again
            records = read_records(folder / "records" / f"{run.about['records']}.jsonl")
            by_document = sorted((record.doc_hash, record.value) for record in records)
            found.setdefault((family, edit), []).append(np.array([value for _, value in by_document]))
    return Scores({cell: np.stack(rows) for cell, rows in found.items()})
