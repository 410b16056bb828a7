"""A verdict as plain text for a terminal of a hundred columns: what to do first, then why, then what next."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectral_surgery.report import facts, methods
from spectral_surgery.report.facts import Verdict, shortened, visible
from spectral_surgery.tables import table

WIDTH = 100
PROMPTS = 3
"""Prompts that are shown with their answers."""
CLAIMS = {True: "shown", False: "not shown"}


def render(verdict: Verdict, folder: Path | None = None, *, examples: bool = True) -> str:
    """Returns the text.

    Args:
        verdict: What refine wrote as verdict.json.
        folder: Where verdict, report and adapter were written; None where nothing was.
        examples: Whether prompts and answers are shown.
    """
    parts = [
        _head(verdict),
        _standings(verdict),
        _claims(verdict),
        _checks(verdict),
        _few_rows(verdict),
        _notes(verdict),
        _prompts(verdict) if examples else "",
        _times(verdict),
        _next(verdict, folder) if folder else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _head(verdict: Verdict) -> str:
    head = facts.outcome(verdict).headline
    lines = [head, "=" * len(head), _wrapped(facts.sentence(verdict))]
    if same := facts.equivalent(verdict):
        lines.append(_wrapped(f"The same without a new file: {same}"))
    return "\n".join(lines)


def _standings(verdict: Verdict) -> str:
    units = [facts.unit(verdict, key) for key in ("task", "skills")]
    found = facts.standings(verdict)
    if not found:
        return ""
    beside = facts.exact(verdict)
    rows = [
        [
            _line(one.label, 28 if beside else 40),
            *(unit.score(one.score(key)) for unit, key in zip(units, ("task", "skills"), strict=True)),
            *(exact.score(one.candidate["name"]) for exact in beside),
        ]
        for one in found
    ]
    exact_titles = [{"task": "task, exact %", "skills": "others, exact %"}[one.key] for one in beside]
    shown = table(["", "task", "other skills", *exact_titles], rows)
    lower = " and ".join(dict.fromkeys(unit.name for unit in units if unit.lower_is_better))
    note = f"Task: {units[0].label}; other skills: {units[1].label}; test rows, mean [95 % interval]."
    lines = [shown, _wrapped(note + (f" Lower is better: {lower}." if lower else ""))]
    own = next((one.gain for one in found if one.role == "refined"), None)
    gain = own or verdict["question_zero"]
    if gain:
        told = ", ".join(
            f"{words} {unit.gain(gain[key])} {unit.gains}"
            for words, key, unit in zip(("task", "other skills"), ("task", "skills"), units, strict=True)
        )
        share = facts.recovered(verdict)
        back = f"; about {100 * share:.0f} % of what your adapter had forgotten is back" if share is not None else ""
        over = "over your adapter" if own else "of your adapter over its base"
        lines.append(_wrapped(f"Gain {over}, paired, positive is better: {told}{back}."))
    lines += map(_wrapped, facts.exact_gains(verdict))
    return "\n".join(lines)


def _claims(verdict: Verdict) -> str:
    width = max((len(CLAIMS[claim["passed"]]) for claim in verdict["claims"]), default=0)
    return "\n".join(
        _wrapped(claim["sentence"], f"{CLAIMS[claim['passed']].ljust(width)}  ") for claim in verdict["claims"]
    )


def _notes(verdict: Verdict) -> str:
    serving = verdict["adapter"]["serving_note"]
    return "\n".join(_wrapped(note, "note: ") for note in [*verdict["notes"], *([serving] if serving else [])])


def _checks(verdict: Verdict) -> str:
    """Looks with other eyes: free answers that broke down, and the scores by another instrument."""
    lines = []
    if found := methods.free_answers(verdict):
        lines.append(_wrapped(f"{found[0]} to prompts of other skills: {found[1]}"))
    rows = []
    for check in facts.checks(verdict):
        rows.append([_line(f"{check.name}, {check.rows} rows", 44), "", ""])
        rows += [[f"  {who}", score, check.gains.get(who, "")] for who, score in check.scores.items()]
    if rows:
        lines.append(table(["by another instrument", "mean [95 %]", "gain over yours [95 %]"], rows))
        lines.append("Scored after the answer was confirmed; the rule did not look at it.")
    return "\n".join(lines)


def _few_rows(verdict: Verdict) -> str:
    header, rows = facts.few_rows(verdict)
    if not rows:
        return ""
    narrow = [[*row[:4]] for row in rows]
    note = "By number of measuring rows, and as many of other skills, on test rows: shown, not tested."
    return f"{table(header[:4], narrow, left=2)}\n{_wrapped(note)}"


def _prompts(verdict: Verdict) -> str:
    """A fixed and a broken one before others, so that the worse news is not left out."""
    sorts = facts.examples(verdict)
    chosen = [*sorts["fixed"][:1], *sorts["broken"][:1], *sorts["fixed"][1:], *sorts["broken"][1:], *sorts["same"]]
    return "\n\n".join(_prompt(one) for one in chosen[:PROMPTS])


def _prompt(one: Mapping[str, Any]) -> str:
    change = f"{one['change']}, " if one["refined"] is not None else ""
    lines = [_wrapped(_line(one["prompt"], 240), f"{change}{one['kind']}: ")]
    for words, key in (("expected", "answer"), ("base", "base"), ("yours", "unedited"), ("refined", "refined")):
        if one[key] is not None:
            lines.append(f"  {words:<8}  {_line(one[key], WIDTH - 12) or '(empty)'}")
    return "\n".join(lines)


def _line(text: str, most: int) -> str:
    """The text in one line, its beginning kept, nothing in it that a terminal would obey."""
    flat = visible(" ".join(text.split()))
    return flat if len(flat) <= most else f"{flat[: most - 2]} …"


def _wrapped(text: str, start: str = "") -> str:
    indent = " " * len(start)
    lines = [
        line
        for paragraph in visible(shortened(text, 2000)).split("\n")
        for line in textwrap.wrap(paragraph, WIDTH - len(start)) or [""]
    ]
    return "\n".join((start if i == 0 else indent) + line for i, line in enumerate(lines))


def _times(verdict: Verdict) -> str:
    spent = verdict["times"]
    if not spent:
        return ""
    told = ", ".join(f"{what} {facts.duration(seconds)}" for what, seconds in spent.items())
    return _wrapped(f"Time {facts.duration(sum(spent.values()))}: {told}.")


def _next(verdict: Verdict, folder: Path) -> str:
    from spectral_surgery.report import writing

    refined = verdict["outcome"] == facts.REFINED
    paths = {
        "report": folder / writing.REPORT,
        "figures": folder / writing.FIGURES,
        "verdict": folder / "verdict.json",
    }
    if refined:
        paths = {"adapter": folder / "adapter", **paths}
    lines = [f"{words:<8}  {visible(str(path))}" for words, path in paths.items() if path.exists()]
    mine, ours = shlex.quote(verdict["adapter"]["name"]), shlex.quote(str(folder / "adapter"))
    commands = [f"spectral-surgery inspect {mine}{f' {ours}' if refined else ''} --html inspection.html"]
    commands += [f"spectral-surgery restore {ours}"] if refined else []
    return "\n".join([*lines, "", "Next:", *(f"  {visible(command)}" for command in commands)]).lstrip("\n")
