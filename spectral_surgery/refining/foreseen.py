"""What a run will take, by arithmetic, before any weight is loaded: memory at the peak, and time at least."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_surgery.calibration import TokenizedExample, prompt_ids, tokenize
from spectral_surgery.estimating import GIB, estimate
from spectral_surgery.keeping import Keep
from spectral_surgery.refining.bench import RUNGS
from spectral_surgery.refining.candidates import BETWEEN, POWERS, RESHAPED_STRENGTHS, STEP_SIZES, STRENGTHS
from spectral_surgery.refining.descent import Steps
from spectral_surgery.refining.job import Job
from spectral_surgery.refining.searching import RATES, WEIGHTS

PERMUTED = 40
"""Rows that a random order of the answer's gates is scored on."""


def foreseen(job: Job) -> str:
    """Returns memory and time in a sentence.

    Memory is that of measuring, which is the most that is taken: scoring keeps nothing for a backward pass. Time is
    that of the matrix products at this machine's speed, so it is the least that can be; free answers come on top.

    Raises:
        BaseModelError: If the base model's configuration cannot be had.
    """
    task, options = job.task, job.options
    keep = [_rows(job, part) for part in job.keep]
    found = estimate(
        job.adapter, [*task.measuring.tokenized.examples, *keep[0]], job.selection, job.rows, job.model, job.batching
    )
    tuned = bool(options.steps) and options.ladder != "controls"
    reshaped = 5 * len(RESHAPED_STRENGTHS)
    candidates = 2 + sum(strength < 1 for strength in STRENGTHS) + reshaped
    if options.ladder != "controls":
        candidates += 2 * len(STEP_SIZES)
    candidates += tuned * (len(WEIGHTS) * len(POWERS) + (len(WEIGHTS) - 1) * len(BETWEEN) + len(RATES))
    survivors = candidates if task.swapped else candidates * (RUNGS[0] + (1 - RUNGS[0]) / 2)
    scored = _tokens(task.validation.tokenized.examples) + _tokens(keep[1])
    tested = _tokens(task.test.tokenized.examples) + _tokens(keep[2])
    forward = survivors * scored + tested * (survivors if task.swapped else 10)
    row = found.tokens / max(found.rows, 1)
    forward += options.permutations * PERMUTED * row
    # Rows of task and keep go forward and back, and those of keep once more through the base.
    forward += tuned * (len(WEIGHTS) + len(RATES)) * options.steps * (2 + 3) * Steps().rows * row
    matrix = 2 * found.costs.matrix
    seconds = (found.costs.operations(found.tokens) + matrix * forward) / found.speed
    memory = f"{found.peak / GIB:.1f} GiB" if found.peak > 0.1 * GIB else f"{found.peak / 2**20:.0f} MiB"
    room = "" if found.memory is None else f" of {found.memory:.0f} GiB"
    return f"Memory: about {memory}{room} on {found.device}; time: {_time(seconds)} or more"


def _rows(job: Job, keep: Keep) -> list[TokenizedExample]:
    """Returns keep rows as tokens; prompts, which have no answers yet, as long as they can become."""
    if keep.kind == "labelled":
        return tokenize(keep.examples, job.tokenizer, job.rows.max_length).examples
    new = job.options.keep_tokens
    lengths = [len(prompt_ids(row, job.tokenizer)) for row in keep.examples]
    return [TokenizedExample((0,) * min(length + new, job.rows.max_length), length, "") for length in lengths]


def _tokens(rows: Sequence[TokenizedExample]) -> int:
    return sum(len(row.input_ids) for row in rows)


def _time(seconds: float) -> str:
    return f"{max(round(seconds), 1)} s" if seconds < 90 else f"{seconds / 60:.0f} min"
