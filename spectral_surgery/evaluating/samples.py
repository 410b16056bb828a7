"""lm-evaluation-harness's logged samples as records: one document by one filter, with a key for every metric.

Both the samples of a run in this process and those that ``--log_samples`` wrote to ``samples_TASK_DATE.jsonl`` come
through here, so whatever is compared is compared in the same way. A metric that is a list per document, as IFEval's
instruction level is, becomes one record an entry, which belong together. Metrics that are no number per document
(the pairs behind a perplexity or a BLEU) cannot be compared per example and are left out.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spectral_surgery.errors import DataError
from spectral_surgery.evaluating.records import Record

Sample = Mapping[str, Any]
"""What lm-evaluation-harness logs of one document by one filter."""

NOT_METRICS = frozenset(
    [
        "doc_id",
        "doc",
        "target",
        "arguments",
        "resps",
        "filtered_resps",
        "filter",
        "metrics",
        "doc_hash",
        "prompt_hash",
        "target_hash",
    ]
)
"""Keys of a sample that are no metrics; releases before ``metrics`` existed are read by leaving these out."""

NAME = re.compile(r"samples_(?P<task>.+?)(_\d{4}-\d\d-\d\dT[\d.:-]+)?\.jsonl")

log = logging.getLogger(__name__)


def from_samples(
    samples: Iterable[Sample], *, variant: str, task: str, truncated: Iterable[bool] | None = None
) -> list[Record]:
    """Returns the records of one task's samples.

    Args:
        samples: In the order in which they were logged.
        variant: Whose they are.
        task: The task's name.
        truncated: For each sample, whether its answer ended at the token limit; by default none did.

    Raises:
        DataError: If a sample has no hash of its document or prompt, no metric with a number, or one that is not
            finite.
    """
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    flags = iter(truncated) if truncated is not None else iter(lambda: False, None)
    for sample, cut in zip(samples, flags, strict=False):
        missing = [key for key in ("doc_hash", "prompt_hash") if not isinstance(sample.get(key), str)]
        if missing:
            raise DataError(
                f"{task}: a sample has no {' and no '.join(missing)}. Score again with lm-eval 0.4.3 or later."
            )
        kept = str(sample.get("filter", "none"))
        seen[sample["doc_hash"], kept] += 1
        again = seen[sample["doc_hash"], kept]
        doc = sample["doc_hash"] + (f"#{again}" if again > 1 else "")
        for metric, values in _metrics(sample):
            found += [
                Record(
                    variant=variant,
                    task=task,
                    metric=metric,
                    filter=kept,
                    doc_hash=doc,
                    part=part,
                    prompt_hash=sample["prompt_hash"],
                    value=_finite(value, task, metric, doc),
                    cluster=doc if len(values) > 1 else "",
                    truncated=cut,
                )
                for part, value in enumerate(values)
            ]
    if not found:
        raise DataError(f"{task}: no sample has a metric that is a number per document.")
    return found


def _metrics(sample: Sample) -> Iterator[tuple[str, list[float]]]:
    """Yields the name and the values of every metric that is a number, or a list of numbers, per document."""
    names = sample.get("metrics") or [key for key in sample if key not in NOT_METRICS]
    for name in names:
        value = sample.get(name)
        several = value if isinstance(value, list) else [value]
        values = [float(entry) for entry in several if isinstance(entry, numbers.Real)]
        if values and len(values) == len(several):
            yield name, values


def _finite(value: float, task: str, metric: str, doc: str) -> float:
    if not math.isfinite(value):
        raise DataError(f"{task} {metric}: document {doc[:12]} has the value {value}. Score it again.")
    return value


def is_run(folder: Path) -> bool:
    """Returns whether a folder holds samples that lm-evaluation-harness logged."""
    return next(_files(folder), None) is not None


def read_run(folder: Path, *, variant: str) -> list[Record]:
    """Returns the records of a folder that lm-evaluation-harness wrote with ``--log_samples``.

    Of several runs of one task the latest is taken, by the date in the files' names.

    Raises:
        DataError: If there are no samples, they are of several models, or a file of them cannot be read.
    """
    latest: dict[str, Path] = {}
    for path in sorted(_files(folder), key=lambda path: path.name):
        task = NAME.fullmatch(path.name)["task"]  # type: ignore[index]
        if task in latest and latest[task].parent != path.parent:
            raise DataError(
                f"{folder} holds {task} of several models, in {latest[task].parent.name} and {path.parent.name}. "
                f"Give one of these folders."
            )
        if task in latest:
            log.warning("%s has several runs of %s; the latest is read, %s.", folder, task, path.name)
        latest[task] = path
    if not latest:
        raise DataError(
            f"{folder} holds no samples_*.jsonl. Run lm_eval with --log_samples and --output_path, and give that."
        )
    return [
        record for task, path in latest.items() for record in from_samples(_lines(path), variant=variant, task=task)
    ]


def read_samples(path: Path, *, variant: str) -> list[Record]:
    """Returns the records of one file of samples that lm-evaluation-harness logged.

    Raises:
        DataError: If it cannot be read, or holds none.
    """
    named = NAME.fullmatch(path.name)
    return from_samples(_lines(path), variant=variant, task=named["task"] if named else path.stem)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("samples_*.jsonl") if NAME.fullmatch(path.name))


def _lines(path: Path) -> list[Sample]:
    """Returns the samples of a file, in the order of their documents."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON Lines ({error}). Score again.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: a line is not an object. Expected what lm_eval --log_samples writes.")
    return sorted(rows, key=lambda row: row.get("doc_id", 0))
