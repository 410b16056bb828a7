"""What every run records: enough to audit, repeat or revert it.

A manifest is a JSON object with the key ``spectral_surgery``. It names the command, versions, seeds, the hashes of
adapter, data and result, and for an edit S, sensitivity and gate of every component.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from spectral_surgery.adapter import Adapter
    from spectral_surgery.measurement import Measurement
    from spectral_surgery.surgery import EditReport
else:
    Adapter = Measurement = EditReport = Any

PACKAGES = ("torch", "transformers", "peft", "safetensors", "accelerate", "datasets", "numpy")


def run_record(command: list[str] | None = None) -> dict[str, Any]:
    """Returns who ran what, when and with which versions."""
    return {
        "spectral_surgery": _version("spectral-surgery"),
        "command": command if command is not None else sys.argv,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def source_record(adapter: Adapter) -> dict[str, Any]:
    """Returns where an adapter came from and its hash."""
    folder = str(adapter.folder.resolve()) if adapter.folder else None
    return {
        "name": adapter.name,
        "folder": folder,
        "tensors_sha256": adapter.digest,
        "recorded_base_model": adapter.config.base_model,
        "recorded_base_revision": adapter.config.base_revision,
    }


def with_result(
    manifest: Mapping[str, Any],
    *,
    source: Mapping[str, Any],
    result: str,
    edit: EditReport | None,
) -> dict[str, Any]:
    """Returns the manifest of a written adapter folder.

    Args:
        manifest: What the caller knows: policy, data, source, components' sensitivities. It wins where keys meet.
        source: The adapter's own record; the caller's ``source`` (the unedited adapter) comes first.
        result: sha256 of the written tensors.
        edit: What was done, by module.
    """
    record = {
        **run_record(),
        "source": dict(source),
        **manifest,
        "result": {"tensors_sha256": result},
    }
    if edit:
        sensitivities = record.pop("sensitivities", {})
        record["modules"] = {
            path: {
                "scale": module.scale,
                "S": _numbers(module.S),
                "gates": _numbers(module.gates),
                **sensitivities.get(path, {}),
                "edit_size": module.size,
                "rounding": module.rounding,
            }
            for path, module in edit.modules.items()
        }
    return record


def sensitivity_record(measurement: Measurement) -> dict[str, dict[str, list[float | None]]]:
    """Returns mean, mean magnitude and standard error of every component's sensitivity, by module path."""
    if not measurement.examples:
        return {}
    return {
        path: {
            "sensitivity_mean": _numbers(module.mean),
            "sensitivity_mean_abs": _numbers(module.mean_abs),
            "sensitivity_standard_error": _numbers(module.standard_error),
        }
        for path, module in measurement.modules.items()
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.9g}") if np.isfinite(value) else None for value in values]


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
