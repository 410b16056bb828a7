"""The folder of a study, which one process writes: what is there, what is left, and nothing half-written.

``runs.jsonl`` has one line a run, ``records/`` one file a scoring (a line for every document, named by the hash of
everything that the scores depend on), ``sensitivities/`` one file for each adapter, data and seed. A line is written
when its records and those of the unedited adapter are on disk. Lines whose key the study no longer has, because
adapter, rows, suite or versions changed, move to ``earlier.jsonl``.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from spectral_surgery.errors import OutputError
from spectral_surgery.evaluating.kept import Kept
from spectral_surgery.measurement import Measurement
from spectral_surgery.results.runs import RUNS, UNEDITED, Run, distinct, read_runs
from spectral_surgery.sensitivity_file import load_measurement, save_measurement
from spectral_surgery.sweeping.bench import Result, Work
from spectral_surgery.sweeping.grid import Item
from spectral_surgery.sweeping.preparing import Ready
from spectral_surgery.sweeping.scores import scores
from spectral_surgery.sweeping.study import StudyAdapter

EARLIER = "earlier.jsonl"
"""Lines that no longer belong to the study."""

log = logging.getLogger(__name__)


def check_folder(folder: Path) -> None:
    """Checks that a folder is new, empty, or that of a study.

    Raises:
        OutputError: If it holds something else.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RUNS).exists()):
        raise OutputError(f"{folder} is not the folder of a study. Choose a new one with --output.")


def left(ready: Ready, folder: Path) -> list[Item]:
    """Returns the runs that a folder does not have yet.

    Raises:
        OutputError: If the folder holds something else.
    """
    check_folder(folder)
    done = {run.key for run in read_runs(folder)} if (folder / RUNS).exists() else set()
    return [item for item in ready.items if ready.key(item) not in done]


@dataclass
class StudyFolder:
    """A folder, and the study that it is of."""

    ready: Ready
    folder: Path
    measured: dict[str, Measurement] = field(default_factory=dict)
    """Sensitivities read so far, by key."""

    @property
    def kept(self) -> Kept:
        """Scorings that are there."""
        return Kept(self.folder / "records")

    def tidy(self) -> None:
        """Leaves whole lines of the study in the file of runs; moves others, and drops one that was cut off."""
        path, keys = self.folder / RUNS, {self.ready.key(item) for item in self.ready.items}
        found = read_runs(path) if path.exists() else []
        if stale := [run for run in found if run.key not in keys]:
            log.info("%d earlier runs are no longer part of the study; moved to %s.", len(stale), EARLIER)
            _append(self.folder / EARLIER, stale)
        kept = distinct([run for run in found if run.key in keys])
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=f".{RUNS}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(run.line() for run in kept)
        os.chmod(name, 0o644)
        os.replace(name, path)

    def runs(self) -> list[Run]:
        """Returns the runs that are there, in the study's order."""
        order = {self.ready.key(item): number for number, item in enumerate(self.ready.items)}
        return sorted(distinct(read_runs(self.folder)), key=lambda run: order[run.key])

    def rounds(self, items: Iterable[Item]) -> tuple[list[Work], list[Work]]:
        """Returns what must be done for these items: what depends on nothing, and then what needs sensitivities.

        Sensitivities come first, then what the edits are held against. What computes the same is done once.
        """
        scorings: dict[str, Item] = {}
        for item in items:
            for one in (self.references[item.adapter, item.suite], item):
                if not self.kept.has(self.ready.scores[one]):
                    scorings.setdefault(self.ready.scores[one], one)
        needing = [item for item in scorings.values() if item.rows is not None]
        lacking = {str(path): item for item in needing if not (path := self._sensitivities(item)).exists()}
        plain = sorted((item for item in scorings.values() if item.rows is None), key=lambda item: item.edited)
        measuring = [Work(item, measures=True) for item in lacking.values()]
        return measuring + list(map(Work, plain)), list(map(Work, needing))

    @cached_property
    def references(self) -> dict[tuple[StudyAdapter, str], Item]:
        """The unedited adapter's item of every adapter and suite, which the others are held against."""
        return {(item.adapter, item.suite): item for item in self.ready.items if item.policy == UNEDITED}

    def measurement(self, item: Item) -> Measurement | None:
        """Returns the sensitivities on all of an item's measuring rows; None where it needs none."""
        if item.rows is None:
            return None
        path = self._sensitivities(item)
        if path.stem not in self.measured:
            self.measured[path.stem] = load_measurement(path)
        return self.measured[path.stem]

    def _sensitivities(self, item: Item) -> Path:
        return self.folder / "sensitivities" / f"{self.ready.of(item).key}.safetensors"

    def keep(self, work: Work, found: Result) -> None:
        """Writes what came of a piece of work."""
        if isinstance(found, Measurement):
            save_measurement(found, self._sensitivities(work.item))
        else:
            self.kept.write(self.ready.scores[work.item], found)

    def complete(self, items: Iterable[Item]) -> list[Item]:
        """Writes the lines of those items whose scores are there, and returns the others."""
        waiting = []
        for item in items:
            both = (item, self.references[item.adapter, item.suite])
            if all(self.kept.has(self.ready.scores[one]) for one in both):
                _append(self.folder / RUNS, [self._run(item)])
            else:
                waiting.append(item)
        return waiting

    def _run(self, item: Item) -> Run:
        ready, reference = self.ready, self.references[item.adapter, item.suite]
        found = self.kept.read(ready.scores[item], item.policy)
        beside = None if item.policy == UNEDITED else self.kept.read(ready.scores[reference], UNEDITED)
        return Run(
            key=ready.key(item),
            name=item.adapter.name,
            policy=item.policy,
            rows=item.rows,
            energy=item.energy,
            modules=item.modules,
            seed=item.seed,
            scores=scores(found, beside, ready.study.ifeval),
            about={
                "adapter": item.adapter.path,
                "adapter_sha256": ready.adapters[item.adapter.path].digest,
                "base_model": ready.candidates.base_model,
                "suite": item.suite,
                "measuring_rows": item.adapter.data if item.rows else None,
                "records": ready.scores[item],
            },
        )


def _append(path: Path, runs: Iterable[Run]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(run.line() for run in runs)
        file.flush()
        os.fsync(file.fileno())
