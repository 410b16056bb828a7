"""Repeating a recorded run, and saying whether its figures agree."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from spectral_surgery.errors import InputError
from spectral_surgery.formats import DataOptions
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.selection import Selection

COMPARED = ("outcome", "sentence", "chain", "question_zero", "claims", "random", "candidates", "rows", "measures")
"""What must agree; times and versions need not."""
TOLERANCE = 1e-6


def recorded(path: Path) -> dict[str, Any]:
    """Returns the content of a verdict.json.

    Raises:
        InputError: If it is none.
    """
    try:
        verdict = json.loads(path.read_text(encoding="utf-8"))
        verdict["options"]["options"], verdict["adapter"]["digest"], verdict["candidates"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no verdict.json of a refine run ({type(error).__name__}: {error}).") from error
    return dict(verdict)


def options_of(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of :func:`~spectral_surgery.refining.refine` that a recorded run had."""
    kept = verdict["options"]
    kinds: dict[str, Any] = {
        "options": RefineOptions,
        "rows": DataOptions,
        "selection": Selection,
        "model": ModelOptions,
        "batching": BatchOptions,
    }
    found = {name: _rebuilt(kind, kept[name]) for name, kind in kinds.items()}
    return {**{name: kept[name] for name in ("data", "train_data", "task_data")}, **found}


def _rebuilt(kind: Any, values: Mapping[str, Any]) -> Any:
    names = {field.name for field in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names})


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns what differs between two verdicts, one line each; figures may differ by a millionth of their size."""
    found = []
    for key in COMPARED:
        old, new = (dict(_leaves(key, verdict[key])) for verdict in (before, after))
        for name in dict.fromkeys([*old, *new]):
            if not _same(old.get(name), new.get(name)):
                found.append(f"{name}: {old.get(name)} then, {new.get(name)} now")
    return found


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}", part)
    elif isinstance(value, list):
        for i, part in enumerate(value):
            label = part.get("name", i) if isinstance(part, Mapping) else i
            yield from _leaves(f"{name}.{label}", part)
    else:
        yield name, value


def _same(one: Any, other: Any) -> bool:
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other)]
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE) if all(numbers) else bool(one == other)
