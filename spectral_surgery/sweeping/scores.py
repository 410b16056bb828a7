"""What a run's records score by task, under the names of the paper's tables, beside the unedited adapter's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from spectral_surgery.evaluating.records import Record, paired, spell
from spectral_surgery.evaluating.tasks import PRIMARY
from spectral_surgery.results.runs import Score
from spectral_surgery.sweeping.study import Level

NAMES: Mapping[str, str] = {"gsm8k": "GSM8K", "humaneval": "HumanEval", "commonsense_qa": "CSQA", "ifeval": "IFEval"}
"""What the paper's tables call its tasks."""


def scores(records: Sequence[Record], unedited: Sequence[Record] | None, ifeval: Level) -> dict[str, Score]:
    """Returns what records score by task, each task by the metric that its score means, and paired differences."""
    found = {}
    kept = [record for record in records if _primary(record.score)]
    reference = [record for record in unedited or records if _primary(record.score)]
    for pair in paired(reference, kept):
        name = task_name(pair.score, {record.score for record in kept}, ifeval)
        value = float(pair.b.mean())
        if unedited is None:
            found[name] = Score(value=value, examples=len(pair.b))
            continue
        gap = pair.difference()
        low, high = (limit if math.isfinite(limit) else None for limit in (gap.low, gap.high))
        found[name] = Score(
            value=value, examples=len(pair.b), difference=gap.estimate, low=low, high=high, p=pair.p_value()
        )
    return found


def _primary(score: tuple[str, str, str]) -> bool:
    task, metric, kept = score
    return task not in PRIMARY or (metric, kept) in PRIMARY[task]


def task_name(score: tuple[str, str, str], every: Iterable[tuple[str, str, str]], ifeval: Level) -> str:
    """Returns what tables call a score: the task, with metric and filter where it has several."""
    task, metric, _ = score
    if task == "ifeval":
        level: Level = "prompt" if metric.startswith("prompt") else "instruction"
        return NAMES[task] if level == ifeval else f"{NAMES[task]} ({level}s)"
    alone = sum(other[0] == task for other in every) == 1
    return NAMES.get(task, task) if alone else spell(score)
