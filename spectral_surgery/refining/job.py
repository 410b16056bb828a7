"""What a run needs except the base model's weights, and every check that needs none."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_surgery import __version__, processes
from spectral_surgery.adapter import Adapter
from spectral_surgery.calibration import data_digest
from spectral_surgery.formats import DataOptions
from spectral_surgery.judging import ledger
from spectral_surgery.judging.rule import Rule
from spectral_surgery.keeping import Keep
from spectral_surgery.live.loading import base_name, check_fits, load_config, load_tokenizer
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.refining.guessing import Guess
from spectral_surgery.refining.instrument import prepare_check
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.refining.rows import TaskRows, keep_rows, task_rows
from spectral_surgery.refining.scoring import (
    Objective,
    answer_loss_objective,
    choice_objective,
    choices_of,
    custom_objective,
    exact_objective,
)
from spectral_surgery.refining.searching import others
from spectral_surgery.selection import Selection, select

if TYPE_CHECKING:
    from spectral_surgery.evaluating.suite import Suite


SHOWN_ONLY = ("exact_rows", "check_suite", "check_limit", "confirm_run_unsafe_code", "few_rows", "no_examples")
"""Options that change what is shown beside a verdict, never the verdict."""


@dataclass(frozen=True)
class Job:
    """Everything that a run needs except the base model's weights."""

    adapter: Adapter
    paths: list[str]
    tokenizer: Any
    task: TaskRows
    keep: tuple[Keep, Keep, Keep]
    """To measure on, to choose on, to test on."""
    options: RefineOptions
    rows: DataOptions
    model: ModelOptions
    batching: BatchOptions
    base_model: str
    selection: Selection
    data: str | None
    """Rows that the adapter was not trained on, as they were named."""
    train_data: str | None
    """Rows that it was trained on."""
    task_data: str | None
    """Rows of which the user did not say whether it was."""
    objective: Objective
    """What the user asked for; agreement takes its place where only seen rows are there."""
    check: Suite | None
    """Benchmarks that are scored once the answer is confirmed."""
    guess: Guess | None = None
    """Whether the losses look as if the rows were seen in training; known once the model is loaded."""

    @property
    def rule(self) -> Rule:
        """What is asked for."""
        return Rule(may_lose=self.options.share, error_rate=self.options.error_rate)

    @property
    def context(self) -> str:
        """Hash of what every result depends on."""
        options, rows = self.options, self.rows
        ways = [
            options.objective,
            self.objective.source,
            options.normalise,
            options.keep_tokens,
            rows.max_length,
            rows.seed,
        ]
        found = [__version__, self.adapter.digest, self.base_model, self.paths, ways, asdict(self.model)]
        return ledger.digest_of([json.dumps(found)])

    @property
    def run_key(self) -> str:
        """Hash of everything that the verdict depends on: a run that is repeated or resumed is the same run."""
        decide = {name: value for name, value in asdict(self.options).items() if name not in SHOWN_ONLY}
        return ledger.digest_of([json.dumps([self.context, decide, asdict(self.rows), self.task.seen_only])])

    @property
    def test_digest(self) -> str:
        """Hash of the rows that the verdict is made on."""
        rows = self.task.test.examples
        return data_digest([*rows, *self.task.validation.examples] if self.task.swapped else rows)


def prepare(
    adapter: Adapter,
    data: str | None = None,
    *,
    train_data: str | None = None,
    task_data: str | None = None,
    options: RefineOptions | None = None,
    rows: DataOptions | None = None,
    selection: Selection | None = None,
    model: ModelOptions | None = None,
    batching: BatchOptions | None = None,
) -> Job:
    """Returns what a run needs, after every check that needs no base model weights.

    Raises:
        InputError: Whatever is wrong with options, modules, rows, tokenizer, or the fit of adapter and base model.
    """
    options, rows, model = options or RefineOptions(), rows or DataOptions(), model or ModelOptions()
    batching = batching or BatchOptions()
    options.check()
    processes.check(model.device, model.device_map)
    selection = selection or Selection(("all",))
    paths = select(adapter.updates, selection)
    config = load_config(adapter, model)
    tokenizer = load_tokenizer(adapter, model)
    task, objective, keep = read(data, train_data, task_data, options, rows, tokenizer, batching, adapter.folder)
    chat = any(row.templated for row in task.measuring.examples)
    check = prepare_check(options, tokenizer, config, adapter, chat=chat)
    others(adapter, options.also)
    check_fits(adapter, config, trust_remote_code=model.trust_remote_code)
    name = base_name(adapter, model)
    return Job(
        adapter=adapter,
        paths=paths,
        tokenizer=tokenizer,
        task=task,
        keep=keep,
        options=options,
        rows=rows,
        model=model,
        batching=batching,
        base_model=name,
        selection=selection,
        data=data,
        train_data=train_data,
        task_data=task_data,
        objective=objective,
        check=check,
    )


def read(
    data: str | None,
    train_data: str | None,
    task_data: str | None,
    options: RefineOptions,
    rows: DataOptions,
    tokenizer: Any,
    batching: BatchOptions,
    folder: Path | None = None,
) -> tuple[TaskRows, Objective, tuple[Keep, Keep, Keep]]:
    """Returns the rows of the task, what it is scored by, and the rows of other skills.

    All of it needs no adapter; only the chat template in its ``folder`` comes first where there is one.

    Raises:
        InputError: What is wrong with the rows, or with the objective on them.
    """
    task = task_rows(data, train_data, rows, tokenizer, folder, task_data)
    return task, _objective(options, task, batching), keep_rows(options, rows, task, tokenizer, folder)


def _objective(options: RefineOptions, task: TaskRows, batching: BatchOptions) -> Objective:
    if options.objective == "loss":
        return answer_loss_objective(batching)
    if options.objective == "exact":
        return exact_objective(options.normalise, batching)
    if options.objective == "choice":
        examples = [*task.measuring.examples, *task.validation.examples, *task.test.examples]
        return choice_objective(choices_of(examples), batching)
    return custom_objective(options.objective, batching)


def serving_note(job: Job) -> str | None:
    """Returns on which base it is judged and on which it will be served, where the two differ or rounding differs."""
    measured, recorded = job.base_model, job.adapter.config.raw.get("base_model_name_or_path")
    loaded = "4 bits" if job.model.load_in_4bit else "8 bits" if job.model.load_in_8bit else _stored_bits(measured)
    judged = f"{measured} in {loaded}" if loaded else measured
    other = recorded if recorded and recorded != measured else None
    if not (loaded or other):
        return None
    served = f"The adapter's configuration names {other} as its base. " if other else ""
    return f"Judged on {judged}. {served}On a base that is stored otherwise, such as 16 bits, figures may differ."


def _stored_bits(name: str) -> str | None:
    """Returns the bits of a base that its name says is quantised, such as unsloth/...-bnb-4bit."""
    found = re.search(r"(?<![a-z0-9])([48])[-_]?bit|(?<![a-z0-9])(awq|gptq|nf4|fp8|int[48])(?![a-z0-9])", name.lower())
    return None if not found else f"{found[1]} bits" if found[1] else found[2].upper()
