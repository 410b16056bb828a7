"""The whole run: measure once, try a ladder, choose on validation rows, confirm on test rows, say what was found.

The order is fixed and no step looks ahead: gates are found on the measuring rows, chosen on the validation rows, and
only finalists and their rivals ever see the test rows.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spectral_surgery import processes
from spectral_surgery.adapter import Adapter
from spectral_surgery.errors import RunError
from spectral_surgery.judging import ledger
from spectral_surgery.judging.choosing import Judgement, choose, judge, judge_swapped
from spectral_surgery.judging.claims import RandomGates, random_gates, rivals
from spectral_surgery.judging.replaying import ErrorRate, replay
from spectral_surgery.judging.rule import merit
from spectral_surgery.judging.trials import BASE, UNEDITED
from spectral_surgery.judging.verdict import Verdict, decide
from spectral_surgery.live.loading import load
from spectral_surgery.refining.bench import RUNGS, Part, Progress, Times, Tried, halved
from spectral_surgery.refining.cache import Cache
from spectral_surgery.refining.candidates import RIVALS, Candidate, references
from spectral_surgery.refining.descent import Steps
from spectral_surgery.refining.few_rows import few_rows
from spectral_surgery.refining.instrument import ANSWER, checked, warnings
from spectral_surgery.refining.job import Job
from spectral_surgery.refining.permuting import permuted, shuffled
from spectral_surgery.refining.ready import DRIFT, Ready, looked_at, make_ready, measured
from spectral_surgery.refining.scoring import answer_loss_objective, answer_loss_of, loss_objective, per_example
from spectral_surgery.refining.searching import Evidence, Extent, extent, ladder, temperature
from spectral_surgery.refining.showing import tested

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Everything that a run found out, before it is written down."""

    ready: Ready
    candidates: dict[str, Candidate]
    tried: Tried
    judgement: Judgement
    verdict: Verdict
    evidence: Evidence
    times: Times
    earlier: int
    """Verdicts that other runs gave on the same test rows before."""
    checks: list[dict[str, Any]]
    """Scores by another instrument, where one was asked for."""
    few_rows: list[dict[str, Any]]
    """Tuning and continued training on few rows, where that was asked for."""


def run(job: Job, cache_folder: Path, *, progress: Progress | None = None) -> Found:
    """Returns what was found.

    Args:
        job: What :func:`prepare` returned.
        cache_folder: Where intermediate results go; a run that was interrupted goes on from them.
        progress: Called with (what, done, in all).

    Raises:
        DataError: If the adapter does its own training rows worse than the base does.
        RunError: If something fails midway.
    """
    times = Times()
    with times.of("loading"):
        live = load(job.adapter, job.model, paths=job.paths, tokenizer=job.tokenizer, checked=True)
    cache = Cache(cache_folder, job.context)
    with times.of("measuring"):
        job = looked_at(job, live, cache)
    ready = make_ready(job, live, cache, times, progress)
    with times.of("measuring"):
        evidence = measured(ready, progress)
    with times.of("finding gates"):
        size = _extent(ready)
        candidates = [*references(), *_ladder(ready, evidence, size, progress)]
    return _judged(ready, evidence, candidates, size, times, progress)


def _extent(ready: Ready) -> Extent:
    """Returns how much is tried, after timing one pass where there is a budget."""
    options = ready.job.options
    if options.seconds is None:
        return extent(options, 0.0, 0, 0.0)
    first = ready.validation.first(32, 32)
    start = time.perf_counter()
    per_example(ready.bench.live, first.task.tokenized, answer_loss_of)
    per_example(ready.bench.live, first.keep.tokenized, ready.keep_loss)
    took = time.perf_counter() - start
    row = processes.of_first(lambda: took) / (len(first.task) + len(first.keep))
    steps = Steps()
    part = len(ready.validation.task) + len(ready.validation.keep)
    # Forward and backward take as long as three forward passes; on keep rows there is one more, of the base.
    found = extent(options, row, part, (3 + 4) * steps.rows * row)
    log.info(
        "Budget %s: %d keep weights of few-step tuning, %d learning rates of continued training, %s more even "
        "spectra, %d random orders.",
        options.budget,
        found.weights,
        found.rates,
        "with" if found.reshaped else "no",
        found.permutations,
    )
    return found


def _ladder(ready: Ready, evidence: Evidence, size: Extent, progress: Progress | None) -> list[Candidate]:
    job, live = ready.job, ready.bench.live
    found = ladder(live, evidence, job.options, size, ready.bench.cache, job.rows.seed, progress)
    if ready.bench.task.measure.lower_is_better:
        found.append(temperature(live, ready.measuring.task, ready.bench.cache))
    return found


def _judged(
    ready: Ready,
    evidence: Evidence,
    candidates: list[Candidate],
    size: Extent,
    times: Times,
    progress: Progress | None,
) -> Found:
    job, rule, bench = ready.job, ready.job.rule, ready.bench
    if job.task.swapped:  # rows that choose also confirm, so all are scored as they would be written
        candidates = [candidate.written(job.adapter) for candidate in candidates]
    known = {candidate.name: candidate for candidate in candidates}
    edits = [c.name for c in candidates if c.family not in (*RIVALS, "base", "unedited")]
    contenders = [candidate.contender for candidate in candidates]
    # What took steps to find costs little to score, and on few rows neighbours on the trade-off lead by luck.
    always = [c.name for c in candidates if c.family in ("base", "unedited", "strength", "descend", *RIVALS)]
    earlier = processes.of_first(lambda: ledger.earlier(job.test_digest, job.run_key))
    level = rule.level(earlier)
    with times.of("trying"):
        part = ready.validation + ready.test if job.task.swapped else ready.validation
        # Halves that also confirm must not decide who is scored on them.
        tried = halved(bench, candidates, always, part, progress, () if job.task.swapped else RUNGS)
    edits = [name for name in edits if name in tried.split.scores]
    with times.of("confirming"):
        if job.task.swapped:
            judgement = judge_swapped(tried.split, rule, edits, level)
        else:
            order = choose(tried.split, rule, edits)
            beside = [*rivals(tried.split, order, contenders, rule), *_shown(tried, candidates)]
            names = dict.fromkeys([BASE, UNEDITED, *order, *beside])
            written = [known[name].written(job.adapter) for name in names]
            test = bench.split(ready.test, bench.tried(written, ready.test, "confirming", progress))
            judgement = judge(tried.split, test, rule, edits, level)
    random: RandomGates | None = None
    if judgement.winner and known[judgement.winner].gates:
        with times.of("random"):
            part = tested(ready, judgement).first(24, 16)
            random = _random(ready, evidence, known[judgement.winner], part, size.permutations, progress)
    rate = _replayed(job, judgement, edits, level)
    verdict = decide(
        judgement,
        rule,
        contenders,
        random=random,
        error_rate=rate,
        earlier=earlier,
        seen_rows_only=job.task.seen_only,
    )
    processes.of_first(lambda: ledger.note(job.test_digest, job.run_key, outcome=verdict.outcome))
    checks: list[dict[str, Any]] = []
    if job.check:
        with times.of("another instrument"):
            checks = checked(job.check, bench, _standing(job, known, verdict.winner), progress)
        verdict = replace(verdict, sentence=" ".join([verdict.sentence, *warnings(checks)]))
    few: list[dict[str, Any]] = []
    if job.options.few_rows and job.options.steps:
        with times.of("16, 32 and all rows"):
            few = few_rows(ready, evidence, tested(ready, judgement), progress)
    return Found(ready, known, tried, judgement, verdict, evidence, times, earlier, checks, few)


def _standing(job: Job, known: dict[str, Candidate], winner: str | None) -> dict[str, Candidate]:
    """Returns base, unedited and, where one won, the answer as it is written."""
    found = {BASE: known[BASE], UNEDITED: known[UNEDITED]}
    return found | ({ANSWER: known[winner].written(job.adapter)} if winner else {})


def _shown(tried: Tried, candidates: list[Candidate]) -> list[str]:
    """Returns rivals that are shown on test rows whatever is chosen."""
    return [c.name for c in candidates if c.family in RIVALS and c.name in tried.split.scores]


def _replayed(job: Job, judgement: Judgement, edits: list[str], level: float) -> ErrorRate | None:
    if not job.options.replays:
        return None
    return replay(
        judgement.validation,
        judgement.test,
        job.rule,
        edits,
        judgement.level if judgement.swapped else level,
        swapped=judgement.swapped is not None,
        times=job.options.replays,
        seed=job.rows.seed,
    )


def _random(
    ready: Ready, evidence: Evidence, winner: Candidate, part: Part, count: int, progress: Progress | None
) -> RandomGates | None:
    """Returns the winner beside random orders of its own gates within modules, at the same edit size.

    Judged by losses in one forward pass on a part of the test rows, whatever the task is scored by.
    """
    if not count or not shuffled(winner.gates, evidence.task):
        return None
    bench = replace(
        ready.bench,
        task=answer_loss_objective(ready.job.batching),
        skills=loss_objective(ready.keep_loss, DRIFT, ready.job.batching),
    )
    if ready.job.task.seen_only:
        bench = replace(bench, task=ready.bench.task)
    tried = [*references(), winner, *permuted(winner, evidence.task, count, ready.job.rows.seed)]
    split = bench.split(part, bench.tried(tried, part, "random orders", progress))
    merits = {candidate.name: merit(split, candidate.name, ready.job.rule) for candidate in tried[2:]}
    return random_gates(merits.pop(winner.name), list(merits.values()), ready.job.rule)


def check_agrees(found: Found, written: Adapter, winner: Candidate) -> None:
    """Scores a written adapter again.

    Raises:
        RunError: If the file does not score as what was confirmed.
    """
    part = found.ready.test.first(64, 64)
    again = found.ready.bench.scores(replace(winner, gates=None, adapter=written), part)
    before = found.ready.bench.scores(winner.written(found.ready.job.adapter), part)
    for one, other in ((again.task, before.task), (again.skills, before.skills)):
        if not np.allclose(one, other, rtol=1e-5, atol=1e-6):
            raise RunError(
                f"The written adapter does not score as the one that was confirmed: {one.mean():.6g} against "
                f"{other.mean():.6g}. It is not to be used."
            )
