"""The loaded model with its rows: the base answers, losses and scores are defined, sensitivities are measured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from spectral_surgery.calibration import Tokenized, TokenizedExample, batches, tokenize
from spectral_surgery.divergence import Agreement, Divergence, reference
from spectral_surgery.errors import DataError
from spectral_surgery.judging.trials import Measure
from spectral_surgery.keeping import Keep, answer_by
from spectral_surgery.live import Live
from spectral_surgery.measurement import Measurement
from spectral_surgery.measuring import measure_together
from spectral_surgery.refining.bench import Bench, Part, Progress, Times
from spectral_surgery.refining.cache import Cache
from spectral_surgery.refining.closeness import with_distance
from spectral_surgery.refining.descent import Term
from spectral_surgery.refining.guessing import guess
from spectral_surgery.refining.job import Job
from spectral_surgery.refining.scoring import (
    LossOf,
    Objective,
    Rows,
    answer_loss_objective,
    answer_loss_of,
    exact_objective,
    loss_objective,
    per_example,
)
from spectral_surgery.refining.searching import LEAST_SCALE, Evidence
from spectral_surgery.sensitivity_file import load_measurement, save_measurement

log = logging.getLogger(__name__)

DRIFT = Measure("drift from the base", "nats per token", lower_is_better=True)
AGREEMENT = Measure("agreement with your adapter", "share of answer tokens", lower_is_better=False)


@dataclass(frozen=True)
class Ready:
    """A loaded model with its rows: the base has answered, and everything can be scored."""

    job: Job
    bench: Bench
    measuring: Part
    validation: Part
    test: Part
    keep_loss: LossOf
    """What is to be kept, differentiable."""
    task_loss: LossOf
    """What few-step tuning minimises of the task."""


def looked_at(job: Job, live: Live, cache: Cache) -> Job:
    """Returns the job with a guess whether its rows were in the training; where the user said nothing, it decides.

    Only measuring rows are looked at: the others choose and confirm.
    """
    rows = job.task.measuring.tokenized

    def losses() -> dict[str, np.ndarray]:
        with live.base():
            base = per_example(live, rows, answer_loss_of)
        return {"base": base, "own": per_example(live, rows, answer_loss_of)}

    found = cache.arrays(("losses", [row.digest for row in rows.examples]), losses)
    guessed = guess(found["base"], found["own"], job.task.source)
    if job.task.said:
        return replace(job, guess=guessed)
    log.info("%s", guessed.sentence)
    return replace(job, guess=guessed, task=replace(job.task, seen_only=guessed.seen))


def make_ready(job: Job, live: Live, cache: Cache, times: Times, progress: Progress | None) -> Ready:
    """Lets the base answer the prompts, and returns what everything is scored by."""
    with times.of("answers of the base"):
        rows = [_keep_rows(job, live, keep, cache, progress) for keep in job.keep]
        together = Tokenized([example for part in rows for example in part.tokenized.examples], 0)
        keep_loss, skills = _skills(job, live, together)
    task_loss, task = _task(job, live)
    tasks = (job.task.measuring, job.task.validation, job.task.test)
    measuring, validation, test = (
        Part(mine, kept, tuple(keep.categories)) for mine, kept, keep in zip(tasks, rows, job.keep, strict=True)
    )
    bench = Bench(live, task, skills, cache, job.batching)
    return Ready(job, bench, measuring, validation, test, keep_loss, task_loss)


def _keep_rows(job: Job, live: Live, keep: Keep, cache: Cache, progress: Progress | None) -> Rows:
    """Returns keep rows with answers: their own, or those of the base, which are worked out once."""
    if keep.kind == "labelled":
        return Rows(keep.examples, tokenize(keep.examples, job.tokenizer, job.rows.max_length))

    def answer() -> list[list[Any]]:
        told = partial(progress, "the base answers") if progress else None
        with live.base():
            found = answer_by(
                live,
                keep,
                job.tokenizer,
                max_new_tokens=job.options.keep_tokens,
                max_length=job.rows.max_length,
                progress=told,
            )
        pairs = zip(found.keep.examples, found.tokenized.examples, strict=True)
        return [[row.answer, tokens.input_ids, tokens.answer_start] for row, tokens in pairs]

    answers = cache.json(("answers", [row.digest for row in keep.examples]), answer)
    examples = [replace(row, answer=text) for row, (text, _, _) in zip(keep.examples, answers, strict=True)]
    tokens = [
        TokenizedExample(tuple(ids), start, row.digest) for row, (_, ids, start) in zip(examples, answers, strict=True)
    ]
    return Rows(examples, Tokenized(tokens, 0))


def _skills(job: Job, live: Live, together: Tokenized) -> tuple[LossOf, Objective]:
    """Returns the loss that few-step tuning keeps low, and what other skills are scored by."""
    if job.keep[0].kind == "labelled":
        loss = job.options.objective not in ("exact", "choice")
        exact = exact_objective(job.options.normalise, job.batching)
        return answer_loss_of, answer_loss_objective(job.batching) if loss else exact
    with live.base():
        said = reference(live, together, job.batching)
    return partial(Divergence, said), loss_objective(partial(Divergence, said), DRIFT, job.batching)


def _task(job: Job, live: Live) -> tuple[LossOf, Objective]:
    """Returns the loss that few-step tuning minimises of the task, and what the task is scored by."""
    if not job.task.seen_only:
        return answer_loss_of, job.objective
    parts = (job.task.measuring, job.task.validation, job.task.test)
    together = Tokenized([example for part in parts for example in part.tokenized.examples], 0)
    said = reference(live, together, job.batching)
    return partial(Divergence, said), loss_objective(partial(Agreement, said), AGREEMENT, job.batching)


def measured(ready: Ready, progress: Progress | None) -> Evidence:
    """Returns sensitivities of task and other skills at the unedited adapter, and the scales of both."""
    job, live, cache = ready.job, ready.bench.live, ready.bench.cache
    rows, keep = ready.measuring.task, ready.measuring.keep
    with live.base():
        base = [per_example(live, rows.tokenized, answer_loss_of), per_example(live, keep.tokenized, ready.keep_loss)]
    own = [per_example(live, rows.tokenized, answer_loss_of), per_example(live, keep.tokenized, ready.keep_loss)]
    _check_template(ready, base[0], own[0])
    learned, forgot = float((base[0] - own[0]).mean()), max(float((own[1] - base[1]).mean()), LEAST_SCALE)
    task = _measurement(live, rows, answer_loss_of, cache, job, partial(progress, "measuring") if progress else None)
    kept = _measurement(live, keep, ready.keep_loss, cache, job, partial(progress, "measuring") if progress else None)
    return Evidence(
        task,
        kept,
        Term(ready.task_loss, rows.tokenized, max(learned, LEAST_SCALE)),
        Term(_kept(ready, own[1], forgot), keep.tokenized, forgot),
        signed=not job.task.seen_only,
    )


def _kept(ready: Ready, own: np.ndarray, forgot: float) -> LossOf:
    """Returns the loss on keep rows with the distance of the states from the base's, each counting as ``forgot``."""
    live, rows = ready.bench.live, ready.measuring.keep.tokenized
    moved = float((per_example(live, rows, with_distance(live, ready.keep_loss, 1.0)) - own).mean())
    return with_distance(live, ready.keep_loss, forgot / moved if moved > 0 else 0.0)


def _measurement(
    live: Live, rows: Rows, loss_of: LossOf, cache: Cache, job: Job, progress: Callable[[int, int], None] | None
) -> Measurement:
    digests = [example.digest for example in rows.examples]

    def compute() -> Measurement:
        return measure_together(
            live,
            batches(rows.tokenized, token_budget=job.batching.tokens),
            digests,
            loss=loss_of(rows.tokenized),
            checkpointing=job.model.gradient_checkpointing,
            progress=progress,
        )

    kind = "own loss" if loss_of is answer_loss_of else "drift"
    parts = ("measurement", kind, digests)
    return cache.file(parts, ".safetensors", compute, partial(save_measurement, overwrite=True), load_measurement)


def _check_template(ready: Ready, base: np.ndarray, own: np.ndarray) -> None:
    """Stops where the adapter does rows of its own training worse than the base: the prompt format is wrong.

    Raises:
        DataError: If it does.
    """
    job, live = ready.job, ready.bench.live
    if job.task.seen is not None:
        own = per_example(live, job.task.seen.tokenized, answer_loss_of)
        with live.base():
            base = per_example(live, job.task.seen.tokenized, answer_loss_of)
    elif not (job.task.seen_only and job.task.said):
        return
    if own.mean() > base.mean():
        raise DataError(
            f"On rows of its own training the adapter's loss is {own.mean():.3f} nats per token and the base's "
            f"{base.mean():.3f}, so these rows do not look as they did in training. Most often the prompt format or "
            f"chat template differs: see the row printed above, --format, --response-marker and --tokenizer."
        )
