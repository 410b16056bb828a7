"""The whole job in one call, and the files that it leaves.

OUT/verdict.json    the verdict with every figure; a completed verdict, either way
OUT/report.html     the same as one page, where the report extra is installed; OUT/figures/ beside it
OUT/sensitivities.safetensors    of the task's measuring rows, as measure writes them
OUT/adapter/        the refined adapter, only when it won
OUT/cache/          what was worked out; an interrupted run goes on from it
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_surgery import processes
from spectral_surgery.adapter import Adapter
from spectral_surgery.adapter.saving import MANIFEST, check_output
from spectral_surgery.errors import OutputError
from spectral_surgery.formats import DataOptions
from spectral_surgery.manifest import sensitivity_record
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.refining.bench import Progress
from spectral_surgery.refining.job import Job, prepare
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.refining.record import record, winner
from spectral_surgery.refining.run import Found, check_agrees, run
from spectral_surgery.report import card as card_of
from spectral_surgery.report import unavailable, write_report
from spectral_surgery.selection import Selection
from spectral_surgery.sensitivity_file import save_measurement

VERDICT, ADAPTER, CACHE, CARD = "verdict.json", "adapter", "cache", "README.md"
SENSITIVITIES = "sensitivities.safetensors"


@dataclass(frozen=True)
class Refinement:
    """What refine returns."""

    verdict: Mapping[str, Any]
    """The content of verdict.json."""
    adapter: Adapter | None
    """The refined adapter; None where the verdict is to leave it alone."""
    folder: Path | None
    """Where the files are; None where nothing was written."""

    def __str__(self) -> str:
        """Returns the verdict's sentence."""
        return str(self.verdict["sentence"])


def refine(
    adapter: Adapter | str | Path,
    data: str | Path | None = None,
    *,
    train_data: str | Path | None = None,
    task_data: str | Path | None = None,
    keep: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    options: RefineOptions | None = None,
    rows: DataOptions | None = None,
    selection: Selection | None = None,
    model: ModelOptions | None = None,
    batching: BatchOptions | None = None,
    progress: Progress | None = None,
) -> Refinement:
    """Returns a better adapter, or the reasons to leave it alone.

    Args:
        adapter: The adapter, its folder or Hub id.
        data: Rows that it was not trained on.
        train_data: Rows that it was trained on.
        task_data: Rows of which you cannot say whether it was: it is guessed, and doubt counts as trained on.
        keep: Rows or prompts of other skills; by default what the options say.
        output: Folder for verdict, report and adapter; by default nothing is written.
        overwrite: Replace what an earlier run left in that folder.
        options: How it is refined and judged.
        rows: How rows are read.
        selection: Modules and layers that are edited; by default all.
        model: How the base model is loaded.
        batching: How rows are batched.
        progress: Called with (what, done, in all).

    Raises:
        InputError: Whatever is wrong with the arguments; nothing has been done then.
        RunError: If something fails midway; with an output folder, the next run goes on from there.
    """
    options = options or RefineOptions()
    if keep is not None:
        options = RefineOptions(**{**vars(options), "keep": str(keep)})
    adapter = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    folder = Path(output).expanduser() if output else None
    if folder:
        check_folder(folder, overwrite=overwrite, adapter=adapter)
    job = prepare(
        adapter,
        str(data) if data else None,
        train_data=str(train_data) if train_data else None,
        task_data=str(task_data) if task_data else None,
        options=options,
        rows=rows,
        selection=selection,
        model=model,
        batching=batching,
    )
    return carry_out(job, folder, overwrite=overwrite, progress=progress)


def carry_out(
    job: Job, folder: Path | None, *, overwrite: bool = False, progress: Progress | None = None
) -> Refinement:
    """Returns what came of a prepared job, and writes it where there is a folder."""
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            found = run(job, Path(scratch), progress=progress)
            return Refinement(_verdict(found), _edited(found), None)
    found = run(job, folder / CACHE, progress=progress)
    verdict = _verdict(found)
    processes.of_first(lambda: _write(found, verdict, folder, overwrite))
    return Refinement(verdict, _edited(found), folder)


def _verdict(found: Found) -> dict[str, Any]:
    verdict = record(found)
    return processes.of_first(lambda: verdict)


def _edited(found: Found) -> Adapter | None:
    chosen = winner(found)
    return chosen.adapter if chosen else None


def check_folder(folder: Path, *, overwrite: bool, adapter: Adapter) -> None:
    """Checks that a run may leave its files in a folder: a new one, or one that an interrupted run left.

    Raises:
        OutputError: If it may not.
    """
    check_output(folder / ADAPTER, overwrite=True, sources=(adapter.folder,) if adapter.folder else ())
    if folder.is_file():
        raise OutputError(f"The output {folder} is a file. Choose a folder that does not exist yet.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / VERDICT).exists() and not (folder / CACHE).is_dir():
        raise OutputError(
            f"The output folder {folder} exists and was not written by refine (it has neither {VERDICT} nor {CACHE}), "
            f"so nothing is written there. Choose another folder."
        )
    if (folder / VERDICT).exists() and not overwrite:
        raise OutputError(
            f"The output folder {folder} has a verdict. Pass --overwrite to replace it, or choose another."
        )


def _write(found: Found, verdict: Mapping[str, Any], folder: Path, overwrite: bool) -> None:
    """Writes adapter, report and verdict, the verdict last: where it is, everything is."""
    (folder / VERDICT).unlink(missing_ok=True)
    target, chosen = folder / ADAPTER, winner(found)
    edited = chosen.adapter if chosen else None
    if chosen is None or edited is None:
        if (target / MANIFEST).exists():
            shutil.rmtree(target)
    else:
        manifest = {
            "policy": chosen.name,
            "verdict": verdict["sentence"],
            "sensitivities": sensitivity_record(found.evidence.task),
        }
        source = edited.folder / CARD if edited.folder else None
        text = source.read_text(encoding="utf-8") if source and source.is_file() else None
        card = card_of(verdict, text)

        def finish(new: Path) -> None:
            (new / CARD).write_text(card, encoding="utf-8")
            check_agrees(found, Adapter.load(new), chosen)

        edited.save(target, overwrite=True, manifest=manifest, check=finish)
    save_measurement(found.evidence.task, folder / SENSITIVITIES, overwrite=True)
    if unavailable() is None:
        write_report(verdict, folder, examples=not found.ready.job.options.no_examples)
    staged = folder / f".{VERDICT}"
    staged.write_text(json.dumps(verdict, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    staged.replace(folder / VERDICT)
