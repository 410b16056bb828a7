"""Back from an edited folder to the adapter it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path

from spectral_surgery.adapter import files, saving
from spectral_surgery.errors import AdapterError


def restore(folder: Path, output: Path | None = None) -> Path:
    """Returns the source folder that a written folder's manifest names, after checking that it is unchanged.

    Args:
        folder: A folder, or an image model's .safetensors file, that was written here.
        output: A new folder to copy the source adapter to (a file for a file); by default nothing is copied.

    Raises:
        AdapterError: If the folder has no manifest, or its source is gone or has changed.
        OutputError: If the output folder may not be written.
    """
    record = saving.record(folder)
    if record is None:
        raise AdapterError(f"{folder} has no {saving.MANIFEST}, so it was not written by spectral-surgery.")
    source = record.get("source") or {}
    if not source.get("folder"):
        raise AdapterError(f"{folder} was made from {source.get('name') or 'a loaded model'}, which has no folder.")
    found = Path(source["folder"])
    if not found.exists():
        raise AdapterError(
            f"{folder} was made from {found} ({source['name']}), which is gone. "
            f"Its tensors have sha256 {source['tensors_sha256']}."
        )
    read = files.read_safetensors if found.is_file() else files.read_tensors
    digest = files.digest(read(found)[0])
    if digest != source["tensors_sha256"]:
        raise AdapterError(
            f"{found} has changed since {folder} was made from it: sha256 of its tensors is {digest}, "
            f"expected {source['tensors_sha256']}."
        )
    if output and output.suffix == ".safetensors" and found.is_file():
        saving.write_file(output, lambda new: _copy([found], new.parent, new.name), sources=(found, folder))
    elif output:
        kept = _files(found)
        saving.write_folder(output, lambda new: _copy(kept, new), sources=(found, folder))
    return found


def _files(found: Path) -> list[Path]:
    if found.is_file():
        return [found]
    names = [files.CONFIG, files.WEIGHTS, files.PICKLE]
    return [*(found / name for name in names if (found / name).is_file()), *files.companions(found)]


def _copy(paths: list[Path], new: Path, name: str | None = None) -> None:
    for path in paths:
        shutil.copyfile(path, new / (name or path.name))
