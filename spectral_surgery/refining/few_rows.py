"""How few rows are enough: few-step tuning beside continued training on the first 16, the first 32, and all of them.

Which of the two does more depends on how many examples there are: r numbers a module overfit later than whole factors.
Everything here is shown and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import Tensor

from spectral_surgery.calibration import Tokenized
from spectral_surgery.judging.rule import gain_interval, pair
from spectral_surgery.judging.trials import BASE, UNEDITED, Split
from spectral_surgery.refining.bench import CONFIDENCE, Part, Progress, mean_of
from spectral_surgery.refining.candidates import Candidate, few_steps
from spectral_surgery.refining.descent import Steps, Term, carry_on, descend
from spectral_surgery.refining.ready import Ready
from spectral_surgery.refining.searching import LEAST_MARGIN, RATES, WEIGHTS, Evidence

SIZES = (16, 32)
"""Rows of the task, and as many of other skills; all measuring rows come after them."""


def few_rows(ready: Ready, evidence: Evidence, part: Part, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Returns both ways' scores on test rows, for every number of measuring rows.

    Args:
        ready: The loaded model.
        evidence: Of all measuring rows; its scales serve for all numbers of them.
        part: Test rows.
        progress: Called with candidates done.
    """
    count = max(len(evidence.task_term.rows.examples), len(evidence.keep_term.rows.examples))
    sizes = [*(size for size in SIZES if size < count), count]
    references = {name: ready.bench.scores(Candidate(name, name, ""), part) for name in (BASE, UNEDITED)}
    found: list[dict[str, Any]] = []
    total = len(sizes) * (1 + len(RATES))
    for size in sizes:
        tried = {}
        for candidate in _both(ready, evidence, size):
            written = candidate.written(ready.job.adapter)
            tried[candidate.name] = ready.bench.scores(written, part)
            if progress:
                progress("16, 32 and all rows", len(found) + len(tried), total)
        found += _told(size, ready.bench.split(part, {**references, **tried}), list(tried))
    return found


def _both(ready: Ready, evidence: Evidence, size: int) -> Iterator[Candidate]:
    """Yields few-step tuning, and continued training at every learning rate, on the first rows of each term."""
    from safetensors.torch import load_file, save_file

    job, live, cache = ready.job, ready.bench.live, ready.bench.cache
    weight = round(max(job.options.share, LEAST_MARGIN) * WEIGHTS[0], 6)
    steps = Steps(count=job.options.steps, seed=job.rows.seed)
    terms = [_first(term, size) for term in evidence.terms(weight)]
    digests = [[row.digest for row in term.rows.examples] for term in terms]
    key = (weight, steps, digests, [term.scale for term in terms])
    gates = cache.arrays(("few rows", *key), lambda: descend(live, terms, steps))
    yield replace(few_steps(gates, weight)[0], name="few-step tuning")
    save = partial(save_file, metadata={"format": "pt"})
    for rate in RATES:

        def train(rate: float = rate) -> dict[str, Tensor]:
            return dict(carry_on(live, terms, steps, learning_rate=rate).tensors)

        tensors = cache.file(("few rows, continue", rate, *key), ".safetensors", train, save, load_file)
        yield Candidate(f"continue lr {rate:g}", "continue", "", adapter=replace(live.adapter, tensors=tensors))


def _first(term: Term, size: int) -> Term:
    return replace(term, rows=Tokenized(term.rows.examples[:size], term.rows.truncated))


def _told(size: int, split: Split, names: list[str]) -> list[dict[str, Any]]:
    """Returns means, and for continued training by how much few-step tuning is better, paired."""
    tuning, *_ = names
    found = []
    for name in names:
        scores = split.scores[name]
        one: dict[str, Any] = {"rows": size, "name": name, "ahead": None}
        one |= {side: mean_of(getattr(scores, side)) for side in ("task", "skills")}
        if name != tuning:
            pairs = {side: pair(split, tuning, name, side) for side in ("task", "skills")}
            one["ahead"] = {side: asdict(gain_interval(both, CONFIDENCE)) for side, both in pairs.items()}
        found.append(one)
    return found
