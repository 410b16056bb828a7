"""``spectral-surgery refine``: a better adapter, or an honest "leave it alone"."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from spectral_surgery import processes
from spectral_surgery.cli import console
from spectral_surgery.cli.commands import OfAdapter, together
from spectral_surgery.errors import InputError
from spectral_surgery.formats import DataOptions
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.selection import Selection

if TYPE_CHECKING:
    from spectral_surgery.refining.entry import Refinement
    from spectral_surgery.refining.job import Job


@dataclass(frozen=True, kw_only=True)
class Refine(OfAdapter):
    """Returns a better adapter, or an honest "leave it alone", with the cheap explanations ruled out on held-out rows.

    Measures once, tries a ladder of edits live in one loaded model, chooses on some of your rows, confirms on others,
    and keeps what fine-tuning made the model forget.
    """

    task_data: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[ROWS]")] = None
    """Rows of the task where you cannot say whether the adapter was trained on them: it is guessed from the losses,
    and doubt counts as trained on. Better say it with --data or --train-data."""
    data: str | None = None
    """Rows of the task that the adapter was not trained on: a JSONL, JSON, CSV or Parquet file, or a Hub id."""
    train_data: str | None = None
    """Rows that it was trained on. Alone, they can say how close an edit stays to your adapter, never that it is
    better."""
    output: Path | None = None
    """Folder for verdict, report and, only when it won, the refined adapter; by default ADAPTER-refined in this
    folder. An interrupted run goes on from it."""
    options: RefineOptions = field(default_factory=RefineOptions)
    selection: Selection = field(default_factory=lambda: Selection(("all",)))
    rows: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    batching: BatchOptions = field(default_factory=BatchOptions)
    overwrite: bool = False
    """Replace an earlier verdict in the output folder."""
    dry_run: bool = False
    """Check everything and say what would be done, without loading the base model's weights."""
    reproduce: Path | None = None
    """A verdict.json: repeat its run with the same options and say whether the figures agree."""
    push_to_hub: str | None = None
    """Hub repository to upload adapter and card to, where the adapter won; never the rows."""
    private: bool = False
    """Make that repository private."""
    push_report: bool = False
    """Upload the report as well; it may show your rows."""

    def run(self) -> None:
        """Prints the verdict and where the files are."""
        from spectral_surgery.refining.entry import carry_out, check_folder
        from spectral_surgery.report import summary, unavailable

        command = self._repeated() if self.reproduce else self
        command.options.check()
        adapter = self.load()
        output = self.output or Path(f"{Path(self.adapter).name}-refined")
        together(lambda: check_folder(output, overwrite=self.overwrite, adapter=adapter), self._check_push)
        job = command._prepared(adapter)
        if self.dry_run:
            print(f"Would refine {self.adapter} and write to {output}.")
            return
        try:
            with console.stages() as progress:
                found = carry_out(job, output, overwrite=self.overwrite, progress=progress)
        except KeyboardInterrupt:
            print("Stopped. The same command goes on from here.", file=sys.stderr)
            raise
        print(summary(found.verdict, output, examples=not command.options.no_examples))
        if missing := unavailable():
            print(missing)
        if self.reproduce:
            self._say_whether_it_agrees(found)
        processes.of_first(lambda: self._push(found))

    def _prepared(self, adapter: Any) -> Job:
        from spectral_surgery.refining.foreseen import foreseen
        from spectral_surgery.refining.job import prepare, serving_note
        from spectral_surgery.refining.rows import first_row

        job = prepare(
            adapter,
            self.data,
            train_data=self.train_data,
            task_data=self.task_data,
            options=self.options,
            rows=self.rows,
            selection=self.selection,
            model=self.model,
            batching=self.batching,
        )
        first = first_row(job.task.measuring, job.tokenizer)
        print(f"Base model: {job.base_model}")
        if note := serving_note(job):
            print(note)
        print(f"The first row, its answer in [[ ]]: {first if len(first) <= 400 else f'... {first[-400:]}'}")
        for line in describe(job):
            print(line)
        print(foreseen(job))
        return job

    def _check_push(self) -> None:
        if (self.private or self.push_report) and not self.push_to_hub:
            raise InputError("--private and --push-report belong to --push-to-hub REPOSITORY.")

    def _push(self, found: Refinement) -> None:
        if not self.push_to_hub:
            return
        if found.adapter is None:
            print("Nothing was uploaded, because no adapter won.")
            return
        from spectral_surgery.refining.publish import publish

        url = publish(found, self.push_to_hub, private=self.private, report=self.push_report)
        print(f"Uploaded adapter and card{' and report' if self.push_report else ''}: {url}")

    def _repeated(self) -> Refine:
        """Returns the command with the options of the recorded run; --data and --train-data may name moved files."""
        from spectral_surgery.refining.repeating import options_of, recorded

        assert self.reproduce is not None
        kept = options_of(recorded(self.reproduce))
        moved = {name: getattr(self, name) or kept[name] for name in ("data", "train_data", "task_data")}
        consent = self.options.confirm_run_unsafe_code  # never taken from a file that someone else may have written
        options = replace(kept["options"], confirm_run_unsafe_code=consent)
        return replace(self, **{**kept, **moved, "options": options})

    def _say_whether_it_agrees(self, found: Refinement) -> None:
        from spectral_surgery.refining.repeating import differences, recorded

        assert self.reproduce is not None
        different = differences(recorded(self.reproduce), found.verdict)
        if not different:
            print(f"The figures agree with {self.reproduce}.")
            return
        print(f"{len(different)} figures differ from {self.reproduce}, the first {min(20, len(different))} are:")
        print("\n".join(different[:20]))


def describe(job: Job) -> list[str]:
    """Returns what will be done with which rows, in lines."""
    task, keep = job.task, job.keep
    kind = "rows it was trained on" if task.seen_only else "unseen rows"
    if not task.said:
        kind = "seen in training or not: guessed once the model is loaded"
    split = "halves that each choose and confirm" if task.swapped else "to choose and to confirm"
    lines = [
        f"Rows of the task: {len(task.measuring)} measuring rows, {len(task.validation)} + {len(task.test)} {split} "
        f"({kind}; {task.duplicates} duplicates dropped)",
        f"Other skills: {len(keep[0].rows)} + {len(keep[1].rows)} + {len(keep[2].rows)} "
        + ("rows with answers" if keep[0].kind == "labelled" else "prompts, answered by the base"),
        f"Smallest difference these rows can show: about {100 * task.smallest_difference:.1f} points where one row in "
        f"twenty differs",
    ]
    if job.check:
        tasks = ", ".join(f"{name} ({count} requests)" for name, count in job.check.requests.items())
        lines.append(f"Another instrument, for base, yours and the answer: {tasks}")
    if task.seen_only and task.said:
        lines.append("With seen rows only, nothing can be said about how well the task is done.")
    return lines
