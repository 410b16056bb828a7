"""What a run found, as the plain JSON of verdict.json: the only thing that report, card and terminal are made from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from spectral_surgery import __version__, processes
from spectral_surgery.judging.rule import margins
from spectral_surgery.judging.trials import BASE, UNEDITED, Scores, Split
from spectral_surgery.judging.verdict import plain
from spectral_surgery.keeping import degenerate
from spectral_surgery.manifest import run_record
from spectral_surgery.refining.bench import mean_of
from spectral_surgery.refining.candidates import RIVALS, Candidate
from spectral_surgery.refining.job import serving_note
from spectral_surgery.refining.rows import first_row
from spectral_surgery.refining.run import Found
from spectral_surgery.refining.scoring import Rows
from spectral_surgery.refining.showing import exact_answers, said, tested
from spectral_surgery.report import facts
from spectral_surgery.selection import kind, layer

SCHEMA = 1
SHOWN_TASK, SHOWN_KEEP = 48, 32
"""Test rows that base, unedited and refined answer, for the reader."""


def record(found: Found) -> dict[str, Any]:
    """Returns the verdict file's content; the last model time is spent on the answers that it shows."""
    job, verdict = found.ready.job, found.verdict
    with found.times.of("examples"):
        shown = _Answers(found)
    judged = verdict.record()
    core = {
        **{key: judged[key] for key in ("outcome", "sentence", "chain", "question_zero", "claims", "random")},
        "rule": {
            "may_lose": job.rule.may_lose,
            "error_rate": job.rule.error_rate,
            "earlier_verdicts": found.earlier,
            "level": found.judgement.level,
            "seen_rows_only": job.task.seen_only,
            "swapped": found.judgement.swapped is not None,
        },
        "measures": _measures(found),
        "candidates": [_candidate(found, candidate) for candidate in found.candidates.values()],
    }
    with found.times.of("exact answers"):
        exact = _exact(found, core)
    return {
        "schema": SCHEMA,
        "created": run_record()["time"],
        "version": __version__,
        "command": " ".join(["spectral-surgery", *sys.argv[1:]]),
        **core,
        "notes": [*_guessed(found), *judged["notes"], *_broken(shown)],
        "error_rate": judged["error_rate"],
        "adapter": _adapter(found),
        "rows": _rows(found),
        "exact": exact,
        "checks": plain(found.checks),
        "few_rows": plain(found.few_rows),
        "categories": _categories(found),
        "examples": [] if job.options.no_examples else shown.examples(),
        "generations": shown.generations(),
        "gates": _gates(found),
        "edit": _edit(found),
        "times": {what: round(seconds, 3) for what, seconds in found.times.spent.items()},
        "environment": _environment(),
        "options": _options(found),
    }


def _exact(found: Found, core: Mapping[str, Any]) -> dict[str, Any]:
    """Returns exact answers of everything that stands side by side, from base to the answer."""
    names = [one.candidate["name"] for one in facts.standings(core)]
    shown = [found.candidates[name].written(found.ready.job.adapter) for name in names]
    exact: dict[str, Any] = plain(exact_answers(found.ready, tested(found.ready, found.judgement), shown))
    return exact


def winner(found: Found) -> Candidate | None:
    """Returns the confirmed candidate as it is written, or None."""
    name = found.verdict.winner
    return found.candidates[name].written(found.ready.job.adapter) if name else None


class _Answers:
    """Greedy answers of base, unedited and refined to some test rows."""

    def __init__(self, found: Found) -> None:
        self.part = tested(found.ready, found.judgement).first(SHOWN_TASK, SHOWN_KEEP)
        chosen = winner(found)
        self.who = {BASE: found.candidates[BASE], UNEDITED: found.candidates[UNEDITED]}
        self.who |= {"refined": chosen} if chosen else {}
        self.longest = found.ready.job.options.keep_tokens
        self.task = self._by(found, self.part.task)
        self.keep = self._by(found, self.part.keep)
        self.labelled = found.ready.job.keep[0].kind == "labelled"

    def _by(self, found: Found, rows: Rows) -> dict[str, list[str]]:
        return {who: said(found.ready.bench, candidate, rows, self.longest) for who, candidate in self.who.items()}

    def examples(self) -> list[dict[str, Any]]:
        """Returns every row with the three answers, and what the edit did to it."""
        task = _shown(self.part.task, self.task, "task", answered=True)
        keep = _shown(self.part.keep, self.keep, "other skills", answered=self.labelled)
        return task + keep

    def generations(self) -> dict[str, Any] | None:
        """Returns how many answers to prompts of other skills are empty, and how many run in a loop."""
        if not self.part.keep.examples:
            return None
        counts = {who: degenerate(said) for who, said in self.keep.items()}
        return {
            "n": len(self.part.keep),
            "empty": {who: int(empty.sum()) for who, (empty, _) in counts.items()},
            "loops": {who: int(loops.sum()) for who, (_, loops) in counts.items()},
        }


def _shown(rows: Rows, said: Mapping[str, Sequence[str]], what: str, *, answered: bool) -> list[dict[str, Any]]:
    """Returns rows with their answers; ``fixed`` and ``broken`` are by the row's own answer, or else the base's."""
    found = []
    for i, row in enumerate(rows.examples):
        reference = row.answer if answered else said[BASE][i]
        right = {who: answers[i].strip() == reference.strip() for who, answers in said.items()}
        change = "same"
        if "refined" in right and right["refined"] != right[UNEDITED]:
            change = "fixed" if right["refined"] else "broken"
        found.append(
            {
                "prompt": row.prompt,
                "answer": row.answer if answered else None,
                "base": said[BASE][i],
                "unedited": said[UNEDITED][i],
                "refined": said["refined"][i] if "refined" in said else None,
                "change": change,
                "kind": what,
            }
        )
    return found


def _guessed(found: Found) -> list[str]:
    """Returns what was guessed about the rows, and how to say it; a warning where unseen rows look memorised."""
    job = found.ready.job
    if job.guess is None:
        return []
    if not job.task.said:
        return [job.guess.sentence]
    return [job.guess.warning] if job.guess.memorised and not job.task.seen_only else []


def _broken(shown: _Answers) -> list[str]:
    """Returns a warning where the refined adapter's answers to other prompts break down more often than yours."""
    made = shown.generations()
    if made is None or "refined" not in made["empty"]:
        return []
    bad = {who: made["empty"][who] + made["loops"][who] for who in made["empty"]}
    if bad["refined"] <= bad[UNEDITED] + 1:
        return []
    return [
        f"Of {made['n']} answers to prompts of other skills {bad['refined']} are empty or run in a loop with the "
        f"refined adapter, {bad[UNEDITED]} with yours: look at them before you use it."
    ]


def _adapter(found: Found) -> dict[str, Any]:
    job = found.ready.job
    return {
        "name": job.adapter.name,
        "digest": job.adapter.digest,
        "base_model": job.base_model,
        "modules": len(job.paths),
        "components": sum(len(found.evidence.task.modules[path].S) for path in job.paths),
        "rank": max(len(found.evidence.task.modules[path].S) for path in job.paths),
        "serving_note": serving_note(job),
    }


def _measures(found: Found) -> dict[str, Any]:
    margin = margins(found.judgement.test, found.ready.job.rule)
    split = found.judgement.test
    return {
        "task": {**asdict(split.task), "margin": margin.task},
        "skills": {**asdict(split.skills), "margin": margin.skills},
    }


def _rows(found: Found) -> dict[str, Any]:
    ready, job, task = found.ready, found.ready.job, found.ready.job.task
    first = None if job.options.no_examples else first_row(task.measuring, job.tokenizer)
    return {
        **{f"{name}": len(getattr(ready, name).task) for name in ("measuring", "validation", "test")},
        **{f"keep_{name}": len(getattr(ready, name).keep) for name in ("measuring", "validation", "test")},
        "seen": len(task.seen) if task.seen else 0,
        "duplicates": task.duplicates,
        "smallest_difference": task.smallest_difference,
        "guess": asdict(job.guess) if job.guess and not task.said else None,
        "source": task.source,
        "keep_source": job.keep[0].source,
        "first": first,
    }


def _candidate(found: Found, candidate: Candidate) -> dict[str, Any]:
    name, judgement = candidate.name, found.judgement
    validation = found.tried.split if judgement.swapped is None else judgement.validation
    edit = candidate.written(found.ready.job.adapter).adapter if candidate.gates else None
    return {
        "name": name,
        "family": candidate.family,
        "what": candidate.what,
        "equivalent": candidate.equivalent,
        "edit_size": edit.report.size if edit and edit.report else None,
        "validation": _means(validation.scores.get(name)),
        "test": _means(judgement.test.scores.get(name)),
        "stage": _stage(found, candidate),
    }


def _means(scores: Scores | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    return {side: mean_of(getattr(scores, side)) for side in ("task", "skills")}


def _stage(found: Found, candidate: Candidate) -> str:
    name, judgement = candidate.name, found.judgement
    if name == found.verdict.winner:
        return "winner"
    if name in judgement.confirmed:
        return "confirmed"
    if name in judgement.order:
        return "finalist"
    if name in found.tried.dropped:
        return f"dropped after {found.tried.dropped[name]} rows"
    tested = name in judgement.test.scores and judgement.swapped is None
    return "rival" if tested or candidate.family in RIVALS else "validation"


def _categories(found: Found) -> list[dict[str, Any]]:
    split: Split = found.judgement.test
    kinds = np.array(split.skills_rows.categories)
    names = {"base": BASE, "unedited": UNEDITED, "refined": found.verdict.winner}
    if len(set(kinds)) < 2:
        return []
    return [
        {
            "name": str(category),
            "n": int((kinds == category).sum()),
            **{
                key: float(split.scores[name].skills[kinds == category].mean()) if name else None
                for key, name in names.items()
            },
        }
        for category in sorted(set(kinds))
    ]


def _gates(found: Found) -> list[dict[str, Any]] | None:
    chosen = winner(found)
    if chosen is None or chosen.gates is None or chosen.adapter is None or chosen.adapter.report is None:
        return None
    return [
        {
            "module": path,
            "layer": layer(path),
            "kind": kind(path),
            "gates": edit.gates.tolist(),
            "S": edit.S.tolist(),
            "S_edited": (edit.S * edit.gates).tolist(),
        }
        for path, edit in chosen.adapter.report.modules.items()
    ]


def _edit(found: Found) -> dict[str, Any] | None:
    chosen = winner(found)
    if chosen is None or chosen.adapter is None or chosen.adapter.report is None:
        return None
    report = chosen.adapter.report
    dtype = next(iter(chosen.adapter.updates.values())).stored.dtype
    return {
        "components": report.components,
        "edited": report.edited,
        "size": report.size,
        "rounding": max(module.rounding for module in report.modules.values()),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _environment() -> dict[str, Any]:
    found = run_record()
    about = {"python": found["python"], "platform": found["platform"], "processes": str(processes.count())}
    return {**about, **found["versions"]}


def _options(found: Found) -> dict[str, Any]:
    job = found.ready.job
    groups: dict[str, Any] = {"options": job.options, "rows": job.rows, "model": job.model, "batching": job.batching}
    groups |= {"selection": job.selection}
    given = {name: json.loads(json.dumps(asdict(options))) for name, options in groups.items()}
    sources = {"data": job.data, "train_data": job.train_data, "task_data": job.task_data}
    return {"adapter": job.adapter.name, **sources, **given}
