"""One run of an experiment, and the file that holds many: JSON Lines, one line a run.

A run is one adapter edited in one way (or not at all) and scored. Whatever made it, a sweep or the paper's authors,
tables and figures are made of runs alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spectral_surgery.errors import DataError

RUNS = "runs.jsonl"
"""Name of the file of runs in a sweep's folder."""

UNEDITED, BASE = "unedited", "base"
"""What stands in place of a policy for the adapter as it was trained, and for the model without it."""

RISK = "IFEval"
"""The task in which a loss counts as a risk (the paper's Figure 4)."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a run scored in one task, and its paired difference from the unedited adapter."""

    value: float
    """Mean over examples."""
    examples: int | None = None
    """How many; None where it is not known."""
    difference: float | None = None
    """From the unedited adapter on the very same examples; None where it was not paired."""
    low: float | None = None
    """Lower 95 % limit of the difference."""
    high: float | None = None
    p: float | None = None
    """Two-sided p value of no difference."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One adapter, edited in one way and scored."""

    key: str
    """Hash of everything that the scores depend on."""
    name: str
    """What tables call the adapter, such as Llama-3.1-8B; several adapters of different tasks may share it."""
    policy: str
    """As the command line spells it; unedited, or base for the model alone."""
    rows: int | None = None
    """Measuring rows; None where they do not matter, as for an adapter scored once."""
    energy: str | None = None
    """What the edit kept; None where it does not matter."""
    modules: str | None = None
    """Which modules were edited; None where it does not matter."""
    seed: int = 0
    scores: Mapping[str, Score]
    """By task."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Hashes, options and versions, for the record."""

    def line(self) -> str:
        """Returns the run as one line of a file, its end included."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False) + "\n"


def read_runs(path: Path) -> list[Run]:
    """Returns the runs in a file, or in a sweep's folder.

    A last line without its end is a run that was interrupted while it was written; it is left out.

    Raises:
        DataError: If the file cannot be read, or a line is not a run.
    """
    path = path / RUNS if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Give what spectral-surgery sweep wrote.") from error
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [_run(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _run(line: str, place: str) -> Run:
    try:
        row = json.loads(line)
        scores = {task: Score(**score) for task, score in row.pop("scores").items()}
        run = Run(**row, scores=scores)
        fits = all(math.isfinite(score.value) for score in scores.values())
        fits &= all(isinstance(getattr(run, name), str) for name in ("key", "name", "policy"))
        fits &= all(isinstance(getattr(run, name), str | None) for name in ("energy", "modules"))
        fits &= isinstance(run.rows, int | None) and isinstance(run.seed, int)
    except (ValueError, TypeError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise DataError(f"{place} is not a run. Give a runs.jsonl that spectral-surgery sweep wrote.")
    return run


def distinct(runs: Sequence[Run]) -> list[Run]:
    """Returns the last run of every key, in the order in which the keys first appear."""
    return list({run.key: run for run in runs}.values())
