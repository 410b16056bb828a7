"""The command that runs studies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from spectral_surgery.cli import console
from spectral_surgery.cli.commands import Command
from spectral_surgery.errors import InputError
from spectral_surgery.evaluating.suite import SuiteOptions
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.sweeping.presets import MISSING, PresetOptions, preset_study
from spectral_surgery.sweeping.workers import WorkerOptions, check_workers

if TYPE_CHECKING:
    from spectral_surgery.sweeping.grid import Item
    from spectral_surgery.sweeping.study import Study


@dataclass(frozen=True, kw_only=True)
class Sweep(Command):
    """Runs a study: adapters by policies by settings, measured once, scored in one loaded model, a line a run.

    An interrupted study goes on where it stopped; nothing is repeated, and nothing is reused that depends on something
    that changed.
    """

    study: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="STUDY.toml")] = None
    """What is varied, over which adapters, on which rows; docs/experiments.md explains the file."""
    preset: PresetOptions = field(default_factory=PresetOptions)
    suite: SuiteOptions = field(default_factory=SuiteOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    workers: WorkerOptions = field(default_factory=WorkerOptions)
    output: Path | None = None
    """Folder of the runs; by default the study's or the preset's name, in this folder."""
    dry_run: bool = False
    """Check everything and show what is left, without loading the base model's weights."""

    def run(self) -> None:
        """Runs what is left, and prints the tables."""
        from spectral_surgery.sweeping.folder import left
        from spectral_surgery.sweeping.grid import counted, spell_out
        from spectral_surgery.sweeping.preparing import prepare_study
        from spectral_surgery.sweeping.running import run_study

        study = self._study()
        check_workers(self.workers, study.model)
        output = self.output or Path(self.study.stem if self.study else str(self.preset.preset))
        if output.is_file():
            raise InputError(f"{output} is a file. Choose a folder with --output.")
        items = spell_out(study)
        print(grid_text(items))
        print(counted(items))
        if self.preset.preset:
            print(f"Not reproduced from the authors' code: {MISSING}.")
        if self.preset.preset and not self.preset.adapters:
            if self.dry_run:
                print("Give --base-model and --adapters TASK=ADAPTER to check and run it.")
                return
            raise InputError(
                f"--preset {self.preset.preset} needs its adapters: --adapters TASK=ADAPTER for each task."
            )
        ready = prepare_study(study)
        remaining = left(ready, output)
        print(f"{len(items) - len(remaining)} of {len(items)} are done; {len(remaining)} are left.")
        if self.dry_run:
            if 0 < len(remaining) < len(items):
                print(grid_text(remaining))
            return
        with console.progress("running", "runs") as progress:
            runs = run_study(ready, output, self.workers, progress=progress)
        self._show(runs, output)

    def _study(self) -> Study:
        from spectral_surgery.sweeping.study import read_study

        if (self.study is None) == (self.preset.preset is None):
            raise InputError("Give a study file, or --preset for a table or figure of the paper: one of the two.")
        if self.study is None:
            if self.suite.suite != SuiteOptions().suite:
                raise InputError(
                    "--suite is given with --preset, which has its own tasks. Write a study file instead."
                )
            return preset_study(self.preset, self.suite, self.model, BatchOptions())
        if (self.preset, self.suite, self.model) != (PresetOptions(), SuiteOptions(), ModelOptions()):
            raise InputError(f"Options of scoring, model and presets stand in {self.study} itself. Leave them out.")
        return read_study(self.study)

    def _show(self, runs: list, output: Path) -> None:
        from spectral_surgery.results.summary import tables
        from spectral_surgery.results.writing import write

        print()
        print(write(tables(runs), "text"))
        print(f"Wrote {output}. Figures: spectral-surgery report {output} --figures {output}-figures")


def grid_text(items: list[Item]) -> str:
    """Returns the runs of a grid as a table: a line for every adapter, suite and policy, with how many runs."""
    from spectral_surgery.tables import table

    counts = Counter((item.adapter.name, item.suite, item.policy) for item in items)
    rows = []
    for (name, suite, policy), count in counts.items():
        own = [item for item in items if (item.adapter.name, item.suite, item.policy) == (name, suite, policy)]
        axes = [[getattr(item, axis) for item in own] for axis in ("rows", "energy", "modules", "seed")]
        shown = [" ".join(str(value) for value in dict.fromkeys(values) if value is not None) for values in axes]
        suite = suite if len(suite) <= 40 else f"...{suite[-37:]}"
        rows.append([name, suite, policy, *shown, str(count)])
    return table(["adapter", "suite", "policy", "rows", "energy", "modules", "seeds", "runs"], rows, left=7)
