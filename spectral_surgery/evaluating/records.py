"""One scored example, the file that holds many, and the paired comparison of two variants on the same examples.

A :class:`Record` says what one variant scored on one example by one metric. Everything that is ever said about two
variants (tables, intervals, tests, sweeps) comes from such records: :func:`paired` joins those of two variants by
their documents, insists that both saw the same documents with the same prompts, and gives per-example arrays.

Pure, except for :func:`read_records` and :func:`write_records`, which are JSON Lines.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spectral_surgery.errors import DataError
from spectral_surgery.statistics import Interval, bootstrap_mean, paired_proportions

FLIPS = 9999
"""Random sign flips of a test whose values are not independent 0/1 scores."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one variant scored on one example by one metric."""

    variant: str
    """Name of what was scored, such as base, unedited, or an adapter's folder."""
    task: str
    metric: str
    """lm-evaluation-harness's own key, such as exact_match or prompt_level_strict_acc."""
    filter: str = "none"
    """How the answer was taken from the text, such as strict-match; none where there is only one way."""
    doc_hash: str
    """Hash of the example's row; a second equal row has ``#2`` behind it."""
    part: int = 0
    """Number within the example where it has several scores, as IFEval has one an instruction."""
    prompt_hash: str
    """Hash of what the model was given, few-shot examples included."""
    value: float
    """The score; finite."""
    cluster: str = ""
    """Records with one name are resampled together: an IFEval prompt's instructions. Empty: its own."""
    truncated: bool = False
    """Whether the answer ended at the token limit rather than by itself."""

    @property
    def score(self) -> tuple[str, str, str]:
        """What the value is a score of: task, metric and filter."""
        return self.task, self.metric, self.filter

    @property
    def example(self) -> tuple[str, int]:
        """What the value is a score on."""
        return self.doc_hash, self.part


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes records, one JSON object a line, in a folder that nobody reads yet."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)


def read_records(path: Path) -> list[Record]:
    """Returns the records of a file.

    Raises:
        DataError: If it cannot be read, or a line is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Give a records file of spectral-surgery.") from error
    return [_record(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _record(line: str, place: str) -> Record:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON ({error}).") from error
    known = {field.name: str(field.type) for field in fields(Record)}
    kinds = {"str": str, "int": int, "float": int | float, "bool": bool}
    fits = isinstance(row, dict) and all(name in known and isinstance(row[name], kinds[known[name]]) for name in row)
    try:
        record = Record(**row) if fits else None
    except TypeError:
        record = None
    if record is None or not math.isfinite(record.value):
        raise DataError(
            f"{place} is not a scored example. Expected an object with {', '.join(known)} and a finite value."
        )
    return record


@dataclass(frozen=True)
class Paired:
    """Two variants' values on the same examples, by one metric of one task."""

    score: tuple[str, str, str]
    """Task, metric and filter."""
    a: Float[np.ndarray, " examples"]
    b: Float[np.ndarray, " examples"]
    groups: tuple[str, ...]
    """A name an example; those of one name are resampled together."""
    truncated: tuple[int, int]
    """How many answers of each ended at the token limit."""

    @cached_property
    def clustered(self) -> bool:
        """Whether some examples belong together."""
        return len(set(self.groups)) < len(self.groups)

    @cached_property
    def binary(self) -> bool:
        """Whether all values are right or wrong."""
        return bool(np.isin(self.a, (0, 1)).all() and np.isin(self.b, (0, 1)).all())

    @property
    def wins(self) -> int:
        """Examples on which b's value is higher."""
        return int((self.b > self.a).sum())

    @property
    def losses(self) -> int:
        """Examples on which b's value is lower."""
        return int((self.b < self.a).sum())

    def difference(self, *, confidence: float = 0.95, seed: int = 0) -> Interval:
        """Returns the mean of b - a with its interval.

        Tango's score interval for right and wrong; the studentised bootstrap, by group, for other values and for
        examples that belong together. Without any difference such a bootstrap would claim certainty, so the limits
        are then those of as many unchanged right-or-wrong examples as there are groups, where the values are 0 and 1.
        One group of other values has no limits: they are infinite.
        """
        n = len(set(self.groups))
        unchanged = not (self.wins or self.losses)
        if self.binary and (unchanged or not self.clustered):
            return paired_proportions(self.wins, self.losses, n, confidence=confidence)
        difference = self.b - self.a
        if n < 2:
            return Interval(float(difference.mean()), -math.inf, math.inf)
        return bootstrap_mean(difference, groups=self.groups, confidence=confidence, seed=seed)

    def p_value(self, *, seed: int = 0) -> float:
        """Returns the two-sided p value of "no difference": McNemar's exact test for right and wrong.

        Other values, and examples that belong together, are tested by flipping the sign of each group's sum (Fisher's
        randomisation test; all flips where groups are few, else 9,999 random ones). No difference at all gives 1.
        """
        from scipy.stats import permutation_test

        if self.binary and not self.clustered:
            return mcnemar(self.wins, self.losses)
        number = np.unique(np.asarray(self.groups), return_inverse=True)[1]
        sums = np.bincount(number, self.b - self.a)
        sums = sums[sums != 0]
        if len(sums) < 2:
            return 1.0
        test = permutation_test(
            (sums,), np.sum, permutation_type="samples", vectorized=True, n_resamples=FLIPS, batch=256, rng=seed
        )
        return float(test.pvalue)


def mcnemar(wins: int, losses: int) -> float:
    """Returns the exact two-sided p value of McNemar's test; 1 where no example changed."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def paired(a: Sequence[Record], b: Sequence[Record]) -> list[Paired]:
    """Returns the paired values of two variants, one :class:`Paired` for every task, metric and filter.

    Args:
        a: One variant's records.
        b: The other's, of the same tasks.

    Raises:
        DataError: If the two hold different tasks, metrics or filters, different documents, or the same documents
            with different prompts; or if one holds a document twice. All of it is named together.
    """
    first, second = _by_score(a), _by_score(b)
    faults = [fault for name in {**first, **second} for fault in _differences(name, first.get(name), second.get(name))]
    if faults or not first:
        raise DataError("\n".join(faults) or "There are no records to compare.")
    return [_joined(name, first[name], second[name]) for name in first]


def _by_score(records: Sequence[Record]) -> dict[tuple[str, str, str], dict[tuple[str, int], Record]]:
    """Returns the records by what they score, then by example.

    Raises:
        DataError: If an example stands twice.
    """
    counts = Counter((record.score, record.example) for record in records)
    if twice := [key for key, count in counts.items() if count > 1]:
        name, (doc, _) = twice[0]
        raise DataError(
            f"{spell(name)}: document {doc[:12]} is scored {counts[twice[0]]} times by one variant "
            f"({len(twice)} such examples). Give each variant a name and a records file of its own."
        )
    found: dict[tuple[str, str, str], dict[tuple[str, int], Record]] = {}
    for record in records:
        found.setdefault(record.score, {})[record.example] = record
    return found


def _differences(
    name: tuple[str, str, str],
    a: Mapping[tuple[str, int], Record] | None,
    b: Mapping[tuple[str, int], Record] | None,
) -> list[str]:
    """Returns why the two variants' records of one score cannot be compared; nothing where they can."""
    if not a or not b:
        return [f"{spell(name)}: only one of the two has it. Score both on the same tasks with the same settings."]
    if lone := set(a) ^ set(b):
        return [
            f"{spell(name)}: {len(set(a) & set(b))} documents are in both, {len(lone)} in one only. "
            f"Score both on the same documents (the same data, --limit and --samples)."
        ]
    if changed := [key for key in a if a[key].prompt_hash != b[key].prompt_hash]:
        return [
            f"{spell(name)}: {len(changed)} of {len(a)} documents had different prompts, so a difference may come "
            f"from the prompt. Score both with the same few-shot examples, chat template and lm-eval version."
        ]
    return []


def _joined(name: tuple[str, str, str], a: Mapping[tuple[str, int], Record], b: Mapping[Any, Record]) -> Paired:
    keys = list(a)
    return Paired(
        score=name,
        a=np.array([a[key].value for key in keys], dtype=float),
        b=np.array([b[key].value for key in keys], dtype=float),
        groups=tuple(a[key].cluster or f"{key[0]}/{key[1]}" for key in keys),
        truncated=(sum(a[key].truncated for key in keys), sum(b[key].truncated for key in keys)),
    )


def spell(score: tuple[str, str, str]) -> str:
    """Returns the name of a score for a message or a table: ``task metric``, and the filter where it has a name."""
    task, metric, kept = score
    return f"{task} {metric}" if kept == "none" else f"{task} {metric} ({kept})"
