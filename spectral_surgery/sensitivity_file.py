"""A Measurement as a file: safetensors, so that every policy can be computed later without a model.

Per module path: ``S`` and ``ties`` (float64, int64), ``gate_gradient`` and ``output_energy`` (float32, examples x r).
The header holds the examples' content hashes and where the measurement comes from (hashes of adapter and data, base
model).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from spectral_surgery.errors import MeasurementError, OutputError, RunError
from spectral_surgery.measurement import Measurement, ModuleMeasurement

FORMAT = "spectral_surgery.sensitivity"
FIELDS = ("S", "ties", "gate_gradient", "output_energy")


def check_path(path: Path, *, overwrite: bool) -> None:
    """Checks that a sensitivity file may be written.

    Raises:
        OutputError: If the path is taken and not to be overwritten, or is no sensitivity file of ours.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise OutputError(
            f"{path} is a folder. Choose a file name for the sensitivities, such as sensitivity.safetensors."
        )
    try:
        load_measurement(path)
    except MeasurementError as error:
        raise OutputError(f"{path} exists and is no sensitivity file, so it is never overwritten.") from error
    if not overwrite:
        raise OutputError(f"{path} exists. Pass --overwrite to replace it, or choose another name.")


def save_measurement(measurement: Measurement, path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a measurement as one step and returns the path.

    Raises:
        OutputError: If the path may not be written, see :func:`check_path`.
        RunError: If writing fails, such as on a full disk.
    """
    from safetensors.numpy import save

    path = Path(path).expanduser()
    check_path(path, overwrite=overwrite)
    header = {
        "format": FORMAT,
        "digests": json.dumps(measurement.digests),
        "about": json.dumps(dict(measurement.about)),
        "modules": json.dumps(list(measurement.modules)),
    }
    tensors = {"losses": measurement.losses}
    for name, module in measurement.modules.items():
        tensors |= {f"{name}/{field}": _stored(module, field) for field in FIELDS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, save(tensors, metadata=header))
    except OSError as error:
        raise RunError(f"Saving {path} failed ({error}). Nothing was changed there.") from error
    return path


def load_measurement(path: str | Path) -> Measurement:
    """Returns the measurement in a file.

    Raises:
        MeasurementError: If it cannot be read or is no sensitivity file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    if not path.is_file():
        raise MeasurementError(f"There is no sensitivity file {path}. Make one with: spectral-surgery measure.")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MeasurementError(f"{path} is damaged or no safetensors file ({error}). Measure again.") from error
    if header.get("format") != FORMAT:
        raise MeasurementError(f"{path} is no sensitivity file. Make one with: spectral-surgery measure.")
    modules = {
        name: ModuleMeasurement(**{field: _computed(tensors[f"{name}/{field}"]) for field in FIELDS})
        for name in json.loads(header["modules"])
    }
    about, digests = json.loads(header["about"]), tuple(json.loads(header["digests"]))
    return Measurement(modules, digests, tensors["losses"], about)


def _stored(module: ModuleMeasurement, field: str) -> np.ndarray:
    value = np.ascontiguousarray(getattr(module, field))
    return value.astype(np.float32) if value.ndim == 2 else value


def _computed(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float64) if value.dtype == np.float32 else value


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
