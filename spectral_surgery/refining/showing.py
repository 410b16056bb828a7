"""What the candidates answer: greedy answers beside the scores that decided, for the reader and as no test.

A loss says how likely the right answer was, not whether it was given. So where the task, or the other skills, were
judged by anything else, the share of exact answers of all that are shown is worked out on some test rows, each paired
with the unedited adapter's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from spectral_surgery.judging.choosing import Judgement
from spectral_surgery.judging.rule import gain_interval, pair
from spectral_surgery.judging.trials import UNEDITED, Measure, Scores, Split
from spectral_surgery.refining.bench import CONFIDENCE, Bench, Part, mean_of
from spectral_surgery.refining.candidates import Candidate
from spectral_surgery.refining.ready import Ready
from spectral_surgery.refining.rows import row_set
from spectral_surgery.refining.scoring import NORMALISERS, Rows, answers, longest_answer

EXACT = Measure("exact answers", "share of rows", lower_is_better=False, binary=True)
LONGEST = 256
"""Tokens; where the rows' own answers are longer, nobody writes the same twice, and nothing is generated."""


def tested(ready: Ready, judgement: Judgement) -> Part:
    """Returns the rows that confirmed: of halves that changed places, those of the answer's direction."""
    both = ready.validation + ready.test
    sides = ((both.task, judgement.test.task_rows), (both.keep, judgement.test.skills_rows))
    places = []
    for rows, confirmed in sides:
        digests = set(confirmed.digests)
        places.append([i for i, row in enumerate(rows.examples) if row.digest in digests])
    return both.at(*places)


def said(bench: Bench, candidate: Candidate, rows: Rows, longest: int | None = None) -> list[str]:
    """Returns a candidate's greedy answer to every row, worked out once.

    Args:
        bench: The loaded model.
        candidate: What answers.
        rows: The prompts.
        longest: Tokens an answer may have; by default by the rows' own answers.
    """

    def answer() -> list[str]:
        with candidate.open(bench.live):
            return answers(bench.live, rows, bench.batching, longest=longest)

    if not len(rows):
        return []
    digests = [row.digest for row in rows.examples]
    found: list[str] = bench.cache.json(("said", candidate.key, longest, digests), answer)
    return found


def exact_answers(ready: Ready, part: Part, shown: Sequence[Candidate]) -> dict[str, Any]:
    """Returns the shares of exact answers of task and other skills; None for a side that has none to show.

    A side is left out where it was judged by exact answers, has no answers of its own, was seen in training, or has
    longer answers than :data:`LONGEST`.

    Args:
        ready: The loaded model.
        part: Test rows, of which the first ``--exact-rows`` of each side are answered.
        shown: Base, unedited and whatever else; what changes no answer is left out.
    """
    job = ready.job
    some = part.first(job.options.exact_rows, job.options.exact_rows)
    judged = ready.bench.task.measure.name, ready.bench.skills.measure.name
    wanted = (not job.task.seen_only, job.keep[0].kind == "labelled")
    rows = [
        some_rows if wants and name != EXACT.name and _short(some_rows) else None
        for some_rows, name, wants in zip((some.task, some.keep), judged, wanted, strict=True)
    ]
    who = [candidate for candidate in shown if candidate.temperature == 1]
    found = {
        candidate.name: Scores(
            *(_right(ready, candidate, one) if one else np.zeros(0) for one in rows),
        )
        for candidate in who
    }
    sets = (row_set(some.task.examples), row_set(some.keep.examples))
    split = Split(EXACT, EXACT, *sets, found)
    return {
        side: _shares(split, side, len(whole)) if one else None
        for side, one, whole in zip(("task", "skills"), rows, (part.task, part.keep), strict=True)
    }


def _short(rows: Rows) -> bool:
    return 0 < longest_answer(rows) <= LONGEST


def _right(ready: Ready, candidate: Candidate, rows: Rows) -> np.ndarray:
    """Returns which answers are the rows' own, as 0 and 1."""
    same = NORMALISERS[ready.job.options.normalise]
    pairs = zip(said(ready.bench, candidate, rows), rows.examples, strict=True)
    return np.array([same(answer) == same(row.answer) for answer, row in pairs], dtype=float)


def _shares(split: Split, side: Any, of: int) -> dict[str, Any]:
    """Returns every candidate's share of exact answers, and its paired gain over the unedited adapter."""
    scores: Mapping[str, np.ndarray] = {name: getattr(found, side) for name, found in split.scores.items()}
    listed = []
    for name, right in scores.items():
        compared = None if name == UNEDITED else gain_interval(pair(split, name, UNEDITED, side), CONFIDENCE)
        gain = asdict(compared) if compared else None
        listed.append({"name": name, **mean_of(right), "gain": gain})
    return {"n": len(next(iter(scores.values()))), "of": of, "scores": listed}
