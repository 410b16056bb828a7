"""The folder beside an adapter in which its training keeps checkpoints, until the adapter is written.

It carries the same manifest as the adapter will, with everything that decides what the training gives; only a training
with the same record goes on from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectral_surgery.adapter import saving
from spectral_surgery.errors import InputError, OutputError
from spectral_surgery.manifest import run_record
from spectral_surgery.training.options import TrainOptions


def work_folder(folder: Path) -> Path:
    """Returns where a training keeps its checkpoints: beside the adapter to come."""
    return folder.parent / f"{folder.name}.training"


def check_folders(options: TrainOptions) -> None:
    """Checks that every seed's adapter may be written and its checkpoints may be begun."""
    for seed in options.schedule.seeds:
        folder = options.folder(seed)
        work = work_folder(folder)
        if work.exists() and any(work.iterdir()) and not saving.is_ours(work):
            raise OutputError(
                f"{work} is where the checkpoints go, and it was not written by spectral-surgery. Choose "
                f"another --output."
            )
        if options.resume:
            continue
        saving.check_output(folder, overwrite=options.overwrite)
        if work.exists() and not options.overwrite:
            raise OutputError(
                f"{work} holds checkpoints of an unfinished training. Pass --resume to go on, or "
                f"--overwrite to begin anew."
            )


def unfinished(folder: Path, record: Mapping[str, Any]) -> Path | None:
    """Returns the last whole checkpoint of a training, or None where there is none or the adapter is written.

    Args:
        folder: Where the adapter goes.
        record: Everything that decides what the training gives.

    Raises:
        InputError: If the checkpoints are those of another training; the message says what differs.
        OutputError: If the adapter is there already, but of another training.
    """
    if finished(folder, record):
        return None
    if folder.exists():
        saving.check_output(folder, overwrite=False)
    work = work_folder(folder)
    if not saving.is_ours(work):
        return None
    if different := _differences(_recorded(work), record):
        raise InputError(
            f"The checkpoints in {work} are of another training: {'; '.join(different[:5])}. Pass what they were made "
            f"with, or --overwrite in place of --resume to begin anew."
        )
    steps = {int(path.name.rpartition("-")[2]): path for path in work.glob("checkpoint-*")}
    # The state is written last: a checkpoint without it was cut off.
    whole = [steps[step] for step in sorted(steps) if (steps[step] / "trainer_state.json").is_file()]
    return whole[-1] if whole else None


def finished(folder: Path, record: Mapping[str, Any]) -> bool:
    """Returns whether an adapter is there and is what a training of this record gives."""
    return saving.is_ours(folder) and not _differences(_recorded(folder), record)


def begin(folder: Path, record: Mapping[str, Any], *, resume: bool) -> Path:
    """Returns the folder for a training's checkpoints, made anew unless it is resumed."""
    work = work_folder(folder)
    if not (resume and saving.is_ours(work)):
        if saving.is_ours(work):
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        manifest = {**run_record(), "training": record}
        (work / saving.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return work


def _recorded(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / saving.MANIFEST).read_text(encoding="utf-8")).get("training") or {})


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {there.get(name)!r} and is now {value!r}"
        for name, value in wanted.items()
        if there.get(name) != value
    ]
