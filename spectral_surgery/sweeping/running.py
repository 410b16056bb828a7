"""What is left of a study, run: by this process, or by workers of Ray (:mod:`.workers`). One line a run.

Two rounds: sensitivities and what the edits are held against first, then the edits that need sensitivities. Everything
is kept as it comes, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from spectral_surgery.errors import OutputError
from spectral_surgery.measurement import Measurement
from spectral_surgery.results.runs import Run
from spectral_surgery.sweeping.bench import Bench, Result, Work
from spectral_surgery.sweeping.folder import StudyFolder, check_folder, left
from spectral_surgery.sweeping.grid import Item
from spectral_surgery.sweeping.preparing import Ready
from spectral_surgery.sweeping.workers import WorkerOptions, hired

Progress = Callable[[int, int], None]
"""(runs done, runs in all)."""

Measured = Callable[[Item], Measurement | None]
"""An item's sensitivities, where it needs any."""

Doing = Callable[[Sequence[Work], Measured], Iterator[tuple[Work, Result]]]
"""Does some work, in any order, and yields each piece with what came of it."""


def run_study(
    ready: Ready, folder: Path, workers: WorkerOptions | None = None, *, progress: Progress | None = None
) -> list[Run]:
    """Returns all runs of a study, after running those that are left.

    Args:
        ready: The study, checked.
        folder: Where its runs are and go.
        workers: How many processes share the work, and where; by default this one does it.
        progress: Called with runs done and runs in all.

    Raises:
        OutputError: If the folder holds something else, or another sweep is writing to it.
        RunError: If something fails midway; what was done is kept.
    """
    from filelock import FileLock, Timeout

    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    there = StudyFolder(ready, folder)
    try:
        with FileLock(folder / ".lock", timeout=0):
            there.tidy()
            _run_left(there, workers or WorkerOptions(), progress)
    except Timeout as error:
        raise OutputError(f"Another sweep is writing to {folder}. Wait for it, or choose another --output.") from error
    return there.runs()


def _run_left(there: StudyFolder, workers: WorkerOptions, progress: Progress | None) -> None:
    items = left(there.ready, there.folder)
    waiting = there.complete(items)
    if not waiting:
        return
    with _doing(there.ready, workers) as do:
        for works in there.rounds(waiting):
            for work, found in do(works, there.measurement):
                there.keep(work, found)
                waiting = there.complete(waiting)
                if progress:
                    progress(len(items) - len(waiting), len(items))


def _doing(ready: Ready, workers: WorkerOptions) -> AbstractContextManager[Doing]:
    return hired(ready, workers) if workers.by_ray else nullcontext(_here(ready))


def _here(ready: Ready) -> Doing:
    """Returns what does work in this process, in the given order."""
    bench = Bench.load(ready)

    def do(works: Sequence[Work], measured: Measured) -> Iterator[tuple[Work, Result]]:
        for work in works:
            yield work, bench.do(work, None if work.measures else measured(work.item))

    return do
