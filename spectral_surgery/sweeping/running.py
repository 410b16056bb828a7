"""What is left of a study, run by switching gates in one loaded model; one line a run.

A folder of a study holds ``runs.jsonl`` (one line a run), ``records/`` (one file a scoring, a line for every document,
named by the hash of everything that the scores depend on) and ``sensitivities/`` (measured once per adapter, data and
seed). A line is written when its records are on disk, so an interrupted study goes on where it stopped. Lines whose
key the study no longer has, because adapter, rows, suite or versions changed, move to ``earlier.jsonl``.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from spectral_surgery.editing import gates_for
from spectral_surgery.errors import OutputError
from spectral_surgery.evaluating.evaluation import score
from spectral_surgery.evaluating.records import Record, paired, read_records, spell, write_records
from spectral_surgery.evaluating.tasks import PRIMARY
from spectral_surgery.evaluating.variants import active, load_variants
from spectral_surgery.live import Live
from spectral_surgery.measurement import Measurement
from spectral_surgery.measuring import measure_prepared
from spectral_surgery.policies import parse
from spectral_surgery.results.runs import BASE, RUNS, UNEDITED, Run, Score, distinct, read_runs
from spectral_surgery.selection import Selection
from spectral_surgery.sensitivity_file import load_measurement, save_measurement
from spectral_surgery.sweeping.grid import Item
from spectral_surgery.sweeping.preparing import Ready, Rows
from spectral_surgery.sweeping.study import Level, constraint_of

EARLIER = "earlier.jsonl"
"""Lines that no longer belong to the study."""
NAMES: Mapping[str, str] = {"gsm8k": "GSM8K", "humaneval": "HumanEval", "commonsense_qa": "CSQA", "ifeval": "IFEval"}
"""What the paper's tables call its tasks."""

Progress = Callable[[int, int], None]
"""(runs done, runs in all)."""

log = logging.getLogger(__name__)


def left(ready: Ready, folder: Path) -> list[Item]:
    """Returns the runs that a folder does not have yet.

    Raises:
        OutputError: If the folder holds something else.
    """
    check_folder(folder)
    done = {run.key for run in read_runs(folder)} if (folder / RUNS).exists() else set()
    return [item for item in ready.items if ready.key(item) not in done]


def check_folder(folder: Path) -> None:
    """Checks that a folder is new, empty, or that of a study.

    Raises:
        OutputError: If it holds something else.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RUNS).exists()):
        raise OutputError(f"{folder} is not the folder of a study. Choose a new one with --output.")


def run_study(ready: Ready, folder: Path, *, progress: Progress | None = None) -> list[Run]:
    """Returns all runs of a study, after running those that are left.

    Raises:
        OutputError: If the folder holds something else, or another sweep is writing to it.
        RunError: If something fails midway; what was done is kept.
    """
    from filelock import FileLock, Timeout

    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _tidy(folder, {ready.key(item) for item in ready.items})
            _run_left(ready, folder, left(ready, folder), progress)
    except Timeout as error:
        raise OutputError(f"Another sweep is writing to {folder}. Wait for it, or choose another --output.") from error
    order = {ready.key(item): number for number, item in enumerate(ready.items)}
    return sorted(distinct(read_runs(folder)), key=lambda run: order[run.key])


def _tidy(folder: Path, keys: set[str]) -> None:
    """Leaves whole lines of these keys in the file of runs; moves others, and drops one that was never finished."""
    path = folder / RUNS
    found = read_runs(path) if path.exists() else []
    if stale := [run for run in found if run.key not in keys]:
        log.info("%d earlier runs are no longer part of the study; moved to %s.", len(stale), EARLIER)
        _append(folder / EARLIER, stale)
    kept = distinct([run for run in found if run.key in keys])
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{RUNS}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.writelines(run.line() for run in kept)
    os.chmod(name, 0o644)
    os.replace(name, path)


def _append(path: Path, runs: Iterable[Run]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(run.line() for run in runs)
        file.flush()
        os.fsync(file.fileno())


@dataclass
class _Bench:
    """The loaded model, and what was already worked out with it."""

    ready: Ready
    folder: Path
    lives: Mapping[str, Live]
    """By adapter's path: one model, switched."""
    held: Mapping[str, str]
    """Name of each adapter in the model, by path."""
    measured: dict[str, Measurement] = field(default_factory=dict)

    def records(self, item: Item) -> list[Record]:
        """Returns the records of an item, scored once for all items that compute the same."""
        path = self.folder / "records" / f"{self.ready.scores[item]}.jsonl"
        if not path.exists():
            live = self.lives[item.adapter.path]
            with active(live, self.held[item.adapter.path]):
                found = score(live, {item.policy: self._opened(item, live)}, self.ready.suites[item.suite])
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{os.getpid()}-{path.name}")
            write_records(new, found)
            os.replace(new, path)
        return [replace(record, variant=item.policy) for record in read_records(path)]

    def _opened(self, item: Item, live: Live) -> Callable[[], AbstractContextManager[None]]:
        if item.policy == BASE:
            return live.base
        if item.policy == UNEDITED:
            return nullcontext
        gates = gates_for(
            self.ready.adapters[item.adapter.path],
            parse(item.policy),
            None if item.rows is None else first(self.measurement(item), item.rows),
            constraint=constraint_of(item.policy, str(item.energy)),
            selection=Selection((str(item.modules),)),
            seed=item.seed,
        )
        return partial(live.gated, gates)

    def measurement(self, item: Item) -> Measurement:
        """Returns the sensitivities on all of an item's measuring rows, from the file where they are known."""
        rows = self.ready.of(item)
        if rows.key not in self.measured:
            path = self.folder / "sensitivities" / f"{rows.key}.safetensors"
            if not path.exists():
                self._measure(item, rows, path)
            self.measured[rows.key] = load_measurement(path)
        return self.measured[rows.key]

    def _measure(self, item: Item, rows: Rows, path: Path) -> None:
        name = self.held[item.adapter.path]
        whole = self.lives[item.adapter.path]
        live = Live(whole.model, whole.adapter, adapter_name=name, paths=rows.prepared.paths)
        with active(live, name):
            save_measurement(measure_prepared(rows.prepared, live, self.ready.study.batching), path)


def first(measured: Measurement, count: int) -> Measurement:
    """Returns a measurement of the first examples alone: what measuring only these would have given."""
    modules = {
        path: replace(module, gate_gradient=module.gate_gradient[:count], output_energy=module.output_energy[:count])
        for path, module in measured.modules.items()
    }
    return Measurement(modules, measured.digests[:count], np.asarray(measured.losses)[:count], measured.about)


def _run_left(ready: Ready, folder: Path, items: Sequence[Item], progress: Progress | None) -> None:
    if not items:
        return
    live, _ = load_variants(ready.candidates)
    held = dict(zip(ready.adapters, live.model.peft_config, strict=True))
    lives = {}
    for path, name in held.items():
        with active(live, name):
            lives[path] = Live(live.model, ready.adapters[path], tokenizer=live.tokenizer, adapter_name=name)
    bench = _Bench(ready, folder, lives, held)
    unedited = {(item.adapter, item.suite): item for item in ready.items if item.policy == UNEDITED}
    for done, item in enumerate(items, 1):
        reference = bench.records(unedited[item.adapter, item.suite]) if item.policy != UNEDITED else None
        found = bench.records(item)
        run = Run(
            key=ready.key(item),
            name=item.adapter.name,
            policy=item.policy,
            rows=item.rows,
            energy=item.energy,
            modules=item.modules,
            seed=item.seed,
            scores=scores(found, reference, ready.study.ifeval),
            about={
                "adapter": item.adapter.path,
                "adapter_sha256": ready.adapters[item.adapter.path].digest,
                "base_model": ready.candidates.base_model,
                "suite": item.suite,
                "measuring_rows": item.adapter.data if item.rows else None,
                "records": ready.scores[item],
            },
        )
        _append(folder / RUNS, [run])
        if progress:
            progress(done, len(items))


def scores(records: Sequence[Record], unedited: Sequence[Record] | None, ifeval: Level) -> dict[str, Score]:
    """Returns what records score by task, each task by the metric that its score means, and paired differences."""
    found = {}
    kept = [record for record in records if _primary(record.score)]
    reference = [record for record in unedited or records if _primary(record.score)]
    for pair in paired(reference, kept):
        name = task_name(pair.score, {record.score for record in kept}, ifeval)
        value = float(pair.b.mean())
        if unedited is None:
            found[name] = Score(value=value, examples=len(pair.b))
            continue
        gap = pair.difference()
        low, high = (limit if math.isfinite(limit) else None for limit in (gap.low, gap.high))
        found[name] = Score(
            value=value, examples=len(pair.b), difference=gap.estimate, low=low, high=high, p=pair.p_value()
        )
    return found


def _primary(score: tuple[str, str, str]) -> bool:
    task, metric, kept = score
    return task not in PRIMARY or (metric, kept) in PRIMARY[task]


def task_name(score: tuple[str, str, str], every: Iterable[tuple[str, str, str]], ifeval: Level) -> str:
    """Returns what tables call a score: the task, with metric and filter where it has several."""
    task, metric, _ = score
    if task == "ifeval":
        level: Level = "prompt" if metric.startswith("prompt") else "instruction"
        return NAMES[task] if level == ifeval else f"{NAMES[task]} ({level}s)"
    alone = sum(other[0] == task for other in every) == 1
    return NAMES.get(task, task) if alone else spell(score)
