"""The command that trains an adapter by one of the paper's recipes."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spectral_surgery import processes
from spectral_surgery.cli import console
from spectral_surgery.cli.commands import Command
from spectral_surgery.cli.refine import Refine
from spectral_surgery.cli.then import check_following, refine_and_evaluate
from spectral_surgery.errors import AdapterError, InputError
from spectral_surgery.formats import DataOptions
from spectral_surgery.training import TrainOptions

if TYPE_CHECKING:
    from spectral_surgery.training.preparing import Prepared
    from spectral_surgery.training.running import Trained


@dataclass(frozen=True, kw_only=True)
class Train(Command, TrainOptions):
    """Trains an adapter by one of the paper's recipes, on its data or on yours, with TRL and PEFT.

    For several devices: accelerate launch --num-processes N -m spectral_surgery train ...
    """

    then: Literal["nothing", "refine"] = "nothing"
    """What to do with the trained adapter; refine measures and refines it, scores base, unedited and refined, and
    leaves verdict and report."""
    refine_data: str | None = None
    """Rows of the task for refining, which must not be among the training rows; without them it can only say how close
    an edit stays to the adapter."""
    refine_options: str = ""
    """With --then refine: its further options in one text, as in --refine-options="--keep skills.jsonl"."""
    evaluate_suite: str | None = None
    """With --then refine: tasks or files of rows to score in, as for evaluate; by default those rows of --refine-data
    that the verdict was made on."""
    confirm_run_unsafe_code: bool = False
    """Agree that humaneval in --evaluate-suite runs the code that the model writes, on this machine."""
    dry_run: bool = False
    """Check everything and say what would be done, without loading the base model's weights."""

    def run(self) -> None:
        """Trains and says what to do next."""
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report what is trained
        from spectral_surgery.training.preparing import prepare

        if self.then == "refine" and self.adapter.method == "speclora":
            raise InputError("--then refine takes adapters of one low-rank update, and SpecLoRA has scales beside it.")
        prepared = prepare(self)
        if self.refine_data:
            check_unseen(prepared, self.refine_data)
        if self.then == "refine":
            refines = [self._refine(prepared, self.folder(seed)) for seed in self.schedule.seeds]
            check_following(refines, prepared.tokenizer, self.evaluate_suite, unsafe=self.confirm_run_unsafe_code)
        if prepared.processes.first:
            print(described(prepared))
        if self.dry_run:
            return
        from spectral_surgery.training.running import leave_group, train_prepared

        with console.progress("training", "steps") as progress:
            trained = train_prepared(prepared, progress=progress)
        leave_group(prepared)
        if prepared.processes.first:
            for each in trained:
                print(finished(prepared, each, self.refine_data))
                if self.then == "refine":
                    with processes.alone():
                        command = self._refine(prepared, each.folder)
                        refine_and_evaluate(command, self.evaluate_suite, unsafe=self.confirm_run_unsafe_code)

    def _refine(self, prepared: Prepared, folder: Path) -> Refine:
        """Returns the command that refines a trained adapter, as :func:`next_commands` spells it."""
        from spectral_surgery.cli import parse

        _, command = next_commands(prepared, folder, self.refine_data)
        found = parse([*command[1:], *shlex.split(self.refine_options)])
        assert isinstance(found, Refine)
        return found


def described(prepared: Prepared) -> str:
    """Returns what will be trained, as lines of text."""
    from spectral_surgery.calibration import preview

    rows, recipe, options = prepared.rows, prepared.recipe, prepared.options
    taken = "" if rows.taken == rows.read else f", {rows.taken:,} taken by seed {options.rows.row_seed}"
    dropped = f", {len(rows.malformed)} malformed dropped (the first: {rows.malformed[0]})" if rows.malformed else ""
    first = preview(rows.examples[0], prepared.tokenizer)
    devices = prepared.processes.count
    return "\n".join(
        [
            f"Base model: {prepared.model_name}",
            f"Adapter: {options.adapter.method}, rank {recipe.rank}, in {len(prepared.modules)} modules",
            f"Rows: {rows.read:,} in {rows.source}{taken}{dropped}; {rows.truncated:,} shortened to "
            f"{recipe.max_length} tokens",
            f"Batch: {recipe.global_batch} = {devices} device{'s' * (devices > 1)} x {recipe.micro_batch} rows x "
            f"{prepared.accumulation} accumulated; {prepared.steps:,} steps at learning rate {recipe.learning_rate:g}",
            f"The first, what is learnt in [[ ]]: {first if len(first) <= 400 else f'... {first[-400:]}'}",
        ]
    )


def finished(prepared: Prepared, trained: Trained, unseen: str | None) -> str:
    """Returns what came out and the commands that take it further."""
    points = trained.curve.points
    lines = [
        f"Seed {trained.seed}: loss {points[0].loss:.4f} at the first step, {points[-1].loss:.4f} at the last. "
        f"Wrote {trained.folder}, with loss.csv and the manifest."
    ]
    if trained.work:
        lines.append(f"The checkpoints are in {trained.work}.")
    return "\n".join([*lines, *_next(prepared, trained, unseen)])


def _next(prepared: Prepared, trained: Trained, unseen: str | None) -> list[str]:
    from spectral_surgery.adapter import Adapter

    try:
        Adapter.load(trained.folder)
    except AdapterError as error:
        other = (
            " From Python, spectral_surgery.speclora.edit_speclora edits it and save_as_lora makes plain LoRA of it."
            if prepared.options.adapter.method == "speclora"
            else ""
        )
        return [f"It cannot be refined as it is: {error}{other}"]
    return ["Next:", *(f"  {shlex.join(command)}" for command in next_commands(prepared, trained.folder, unseen))]


def next_commands(prepared: Prepared, folder: Path, unseen: str | None = None) -> list[list[str]]:
    """Returns the commands that measure and refine a trained adapter on the rows that it learnt from.

    Args:
        prepared: The training.
        folder: The adapter.
        unseen: Rows that it did not learn from, to refine it on as well.
    """
    options, recipe = prepared.options, prepared.recipe
    rows, base = options.rows, options.base
    data = rows.data or recipe.dataset
    reading = rows.reading(recipe)
    named = {
        "--format": reading.format if rows.data or unseen else None,
        "--data-name": rows.data_name,
        "--prompt-column": rows.prompt_column,
        "--answer-column": rows.answer_column,
        "--text-column": rows.text_column,
        "--response-marker": rows.response_marker,
        "--max-length": str(recipe.max_length) if recipe.max_length != DataOptions.max_length else None,
        "--base-model": options.model if base.base_name else None,
        "--device": "cpu" if base.cpu else None,
    }
    switched = {"--load-in-4bit": base.load_in_4bit, "--trust-remote-code": base.trust_remote_code}
    given = [word for option, value in named.items() if value for word in (option, value)]
    given += [option for option, on in switched.items() if on]
    known = ["--data", unseen, "--train-data", data] if unseen else ["--train-data", data]
    output = folder.parent / f"{folder.name}-refined"
    return [
        ["spectral-surgery", "measure", str(folder), "--data", data, *given],
        ["spectral-surgery", "refine", str(folder), *known, "--output", str(output), *given],
    ]


def check_unseen(prepared: Prepared, unseen: str) -> None:
    """Checks, before anything is trained, that the rows for refining can be read and are not learnt from.

    Raises:
        InputError: If they cannot, or are.
    """
    from spectral_surgery.training.rows import load_rows

    options = prepared.options
    rows = load_rows(replace(options, rows=replace(options.rows, data=unseen, max_rows=None)), prepared.tokenizer)
    learnt = {example.digest for example in prepared.rows.examples}
    if both := sum(example.digest in learnt for example in rows.examples):
        raise InputError(
            f"{both} of the {len(rows.examples)} rows of {unseen} are among the training rows, which would make any "
            f"verdict on them too good. Take them out of one."
        )
