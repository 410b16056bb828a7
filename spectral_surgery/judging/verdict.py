"""The verdict: what was found, in sentences that claim no more than was shown.

    verdict = decide(judgement, rule, contenders, random=..., error_rate=...)
    json.dumps(verdict.record())

A verdict is one of three: *refined*; *leave it alone*, with the reason; *not better than the base*, because then the
adapter is not worth refining unless an edit makes it so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spectral_surgery.judging.choosing import Confirmation, Judgement, joined
from spectral_surgery.judging.claims import (
    FAMILIES,
    Claim,
    Contender,
    RandomGates,
    both_gains,
    claims,
    comparisons,
    gained,
)
from spectral_surgery.judging.replaying import ErrorRate
from spectral_surgery.judging.rule import (
    Rule,
    gain_interval,
    margins,
    p_value,
    pair,
    required,
    smallest_difference,
    spare,
)
from spectral_surgery.judging.trials import BASE, UNEDITED, Measure, Split
from spectral_surgery.statistics import Interval, mean_error

Outcome = Literal["refined", "leave_alone", "not_better_than_base"]
UNSEEN_ROWS = 150
"""How many unseen rows are asked for where there are none."""


@dataclass(frozen=True)
class QuestionZero:
    """The unedited adapter beside the base, on all rows that judged."""

    task: Interval
    """Gain over the base, positive is better, two-sided at 1 - 2 level."""
    skills: Interval
    """The same in other skills; mostly negative."""
    better_than_base: bool | None
    """Whether it is shown to do the task better; None where only seen rows were there."""


@dataclass(frozen=True)
class Verdict:
    """Everything that a completed run concludes."""

    outcome: Outcome
    sentence: str
    notes: tuple[str, ...]
    winner: str | None
    chain: tuple[Confirmation, ...]
    question_zero: QuestionZero
    claims: tuple[Claim, ...]
    random: RandomGates | None
    error_rate: ErrorRate | None

    def record(self) -> dict[str, Any]:
        """Returns the verdict as plain JSON; limits that do not exist are null."""
        record: dict[str, Any] = plain(asdict(self))
        return record


def plain(value: Any) -> Any:
    """Returns plain JSON; limits that do not exist, which are infinite, are null."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decide(
    judgement: Judgement,
    rule: Rule,
    contenders: Iterable[Contender],
    *,
    random: RandomGates | None = None,
    error_rate: ErrorRate | None = None,
    earlier: int = 0,
    seen_rows_only: bool = False,
) -> Verdict:
    """Returns the verdict.

    Args:
        judgement: Its test rows must hold base, unedited, the chain and the rivals.
        rule: What was asked for.
        contenders: What is known of the candidates.
        random: The winner beside permutations of its gates, where that was done.
        error_rate: Of the replays, where they were done.
        earlier: Verdicts of other runs on the same test rows.
        seen_rows_only: The task's score is agreement with the unedited adapter, on rows it was trained on.
    """
    known = {contender.name: contender for contender in contenders}
    zero = question_zero(judgement, seen_rows_only)
    winner = judgement.winner
    if winner and zero.better_than_base is False and not _better(judgement, winner, BASE):
        winner = None
    found = claims(judgement, winner, known, rule, random) if winner else []
    outcome: Outcome = "not_better_than_base" if zero.better_than_base is False else "leave_alone"
    if winner:
        outcome = "leave_alone" if _family(known, winner) == "continue" else "refined"
        sentence = _won(judgement, winner, rule, known, found, seen_rows_only)
    elif outcome == "leave_alone":
        sentence = f"Leave it alone: {_reason(judgement, rule, seen_rows_only)}."
    else:
        sentence = _not_better(judgement, zero)
    notes = _notes(judgement, rule, known, zero, error_rate, earlier, winner)
    return Verdict(
        outcome,
        sentence,
        tuple(notes),
        winner,
        judgement.chain,
        zero,
        tuple(found),
        random if winner else None,
        error_rate,
    )


def question_zero(judgement: Judgement, seen_rows_only: bool = False) -> QuestionZero:
    """Returns the unedited adapter beside the base, on validation and test rows: neither was chosen on any."""
    split = joined(judgement.validation, judgement.test)
    task, skills = (pair(split, UNEDITED, BASE, side) for side in ("task", "skills"))
    confidence = 1 - 2 * judgement.level
    better = None if seen_rows_only else p_value(task) <= judgement.level
    return QuestionZero(gain_interval(task, confidence), gain_interval(skills, confidence), better)


def _better(judgement: Judgement, ours: str, theirs: str) -> bool:
    return p_value(pair(judgement.test, ours, theirs, "task")) <= judgement.level


def _family(known: Mapping[str, Contender], name: str) -> str:
    return known[name].family if name in known else ""


def _not_better(judgement: Judgement, zero: QuestionZero) -> str:
    rows = len(judgement.validation.task_rows) + len(judgement.test.task_rows)
    found = gained(judgement.test.task, zero.task)
    if zero.task.high < 0:
        return (
            f"Your adapter does the task worse than its base model: {found} on {rows} rows. Nothing else is claimed."
        )
    return (
        f"Your adapter is not shown to do the task better than its base model: {found} on {rows} rows. "
        f"Nothing else is claimed."
    )


def _won(
    judgement: Judgement,
    winner: str,
    rule: Rule,
    known: Mapping[str, Contender],
    found: list[Claim],
    seen_rows_only: bool,
) -> str:
    """Returns the sentence for a confirmed candidate: the figures, what it is, and what it was shown against."""
    test = judgement.test
    if seen_rows_only:
        figures = _seen(test, winner)
    elif rule.wanted == "skills":
        figures = (
            f"{_from_to(test, winner, 'skills')}; {_from_to(test, winner, 'task')}, "
            f"shown to lose less than {_allowance(test, rule)}"
        )
    else:
        figures = f"{_from_to(test, winner, 'task')}; {_from_to(test, winner, 'skills')}, shown to be no worse"
    beside = [
        one
        for family in FAMILIES
        if _family(known, winner) != family
        for one in comparisons(judgement, winner, family, known, rule)
    ]
    ahead = [one.rival for one in beside if one.behind]
    parts = [f"{_head(known, winner)}: {figures}.", *_standing(found, [rival.name for rival in ahead])]
    parts += [f"It does less of what was asked for than {_described(rival)}." for rival in ahead]
    return " ".join(parts)


def _allowance(split: Split, rule: Rule) -> str:
    """Returns how much of the task may be lost, in words."""
    if split.task.lower_is_better:
        return f"{margins(split, rule).task:.2g} {split.task.unit}"
    return f"{100 * rule.may_lose:.3g} % of its score"


def _head(known: Mapping[str, Contender], winner: str) -> str:
    one = known.get(winner, Contender(winner, ""))
    if one.family == "strength":
        return f"A plain strength is enough, {_described(one)}"
    if one.family == "continue":
        return f"Leave it alone and continue training instead, {_described(one)}"
    return f"Refined ({_described(one)})"


def _described(one: Contender) -> str:
    extra = one.equivalent or (f"run: {one.command}" if one.command else None)
    return f"{one.name} ({extra})" if extra else one.name


def _from_to(split: Split, winner: str, side: Literal["task", "skills"]) -> str:
    """Returns how a score moved: ``other skills 35.0 % -> 63.1 % (base 74.4 %; 71 % of what was lost is back)``."""
    measure, words = (split.task, "task") if side == "task" else (split.skills, "other skills")
    base, before, after = (
        _score(measure, float(getattr(split.scores[name], side).mean())) for name in (BASE, UNEDITED, winner)
    )
    lost, back = (float(pair(split, name, UNEDITED, side).gain.mean()) for name in (BASE, winner))
    extra = f"base {base}"
    if side == "skills" and lost > 0 and back > 0:
        extra += f"; {100 * min(back / lost, 1):.0f} % of what was lost is back"
    unit = "" if measure.unit.startswith("share") else f" ({measure.name}, {measure.unit})"
    return f"{words}{unit} {before} -> {after} ({extra})"


def _score(measure: Measure, value: float) -> str:
    """Returns a score in words; without its unit, except for shares."""
    return f"{100 * value:.1f} %" if measure.unit.startswith("share") else f"{value:.3g}"


def _seen(test: Split, winner: str) -> str:
    """Returns what can be said without unseen rows: nothing about how well the task is done."""
    agreement = float(test.scores[winner].task.mean())
    lost, back = (float(pair(test, name, UNEDITED, "skills").gain.mean()) for name in (BASE, winner))
    words = "of the drift from the base undone" if test.skills.lower_is_better else "of the lost other skills back"
    undone = f"{100 * min(back / lost, 1):.0f} % {words}" if lost > 0 else _from_to(test, winner, "skills")
    return (
        f"answers your task prompts as before ({100 * agreement:.0f} % agreement, seen rows); {undone}; "
        f"task accuracy was not tested: pass {UNSEEN_ROWS} or more unseen rows with --data"
    )


def _standing(found: list[Claim], ahead: list[str]) -> list[str]:
    """Returns what the winner was shown against, up to the last claim that passed, and the first that did not.

    Args:
        found: Claims in order.
        ahead: Rivals that are said to be ahead anyway.
    """
    names = {UNEDITED: "your adapter", "random": "the same gates in random order"}
    passed = [names.get(claim.against, claim.against) for claim in found if claim.passed]
    failed = [claim.sentence for claim in found if not claim.passed and claim.against not in ahead]
    together = " and ".join([", ".join(passed[:-1]), passed[-1]]) if len(passed) > 1 else "".join(passed)
    return [f"Shown against {together}.", *failed[:1]]


def _reason(judgement: Judgement, rule: Rule, seen_rows_only: bool) -> str:
    """Returns why nothing was confirmed."""
    if seen_rows_only and rule.wanted == "task":
        return f"a higher task score cannot be shown on seen rows. Pass {UNSEEN_ROWS} or more unseen rows with --data"
    ways = [way for way in (judgement, judgement.swapped) if way]
    tested = [_failed(way, way.chain[0], rule) for way in ways if way.chain]
    if not tested:
        return _untested(judgement, rule)
    return max(tested)[1]


def _untested(judgement: Judgement, rule: Rule) -> str:
    """Returns why no candidate was worth a test, as far as validation rows tell."""
    split = judgement.validation
    names = [name for name in split.scores if name not in (BASE, UNEDITED)]
    gaining = [name for name in names if spare(split, name, rule, rule.wanted)[0] > 0]
    if not gaining:
        more = "kept more of the other skills" if rule.wanted == "skills" else "did more of the task"
        return f"nothing gained, none of the {len(names)} edits tried {more} than your adapter"
    return _would_lose(split, rule, f"all {len(gaining)} edits that gained something")


def _would_lose(split: Split, rule: Rule, what: str) -> str:
    if rule.wanted == "task":
        return f"other skills would lose, {what} lost more of them than counts as not worse"
    return f"the task would lose, {what} lost more than {_allowance(split, rule)}"


def _failed(way: Judgement, first: Confirmation, rule: Rule) -> tuple[int, str]:
    """Returns why the surest candidate failed on test rows, after a number that is highest for too few rows."""
    kept: Literal["task", "skills"] = "task" if rule.wanted == "skills" else "skills"
    kept_p, wanted_p = (first.task_p, first.skills_p) if kept == "task" else (first.skills_p, first.task_p)
    if kept_p > way.level and spare(way.test, first.name, rule, kept)[0] < 0:
        return 1, _would_lose(way.test, rule, f"the surest edit ({first.name})")
    if wanted_p > way.level and spare(way.test, first.name, rule, rule.wanted)[0] <= 0:
        return 0, f"nothing gained, what {first.name} gained on validation rows was not there on test rows"
    side = kept if kept_p >= wanted_p else rule.wanted
    return 2, _too_few(way, first, rule, side)


MOST_TIMES = 100
"""So many times the rows nobody collects for one verdict, so no number is named beyond."""


def _too_few(way: Judgement, first: Confirmation, rule: Rule, side: Literal["task", "skills"]) -> str:
    """Returns that the rows cannot show it, the smallest difference that they can, and how many might."""
    needed = required(way.test, first.name, rule, side)
    n, error = len(needed.rows), mean_error(needed.gain, needed.groups)[1]
    smallest = 2.5 * error if 0 < error < math.inf else smallest_difference(n)
    factor, unit = (100, "points") if needed.measure.unit.startswith("share") else (1, needed.measure.unit)
    words = "task" if side == "task" else "other skills"
    there = abs(float(needed.spare.mean()))
    times = (smallest / there) ** 2 if there else math.inf
    enough = f"; about {_round_up(n * times)} rows might" if 1 < times <= MOST_TIMES else ""
    found = both_gains(way, first.task, first.skills)
    return (
        f"not enough rows to show it. The surest edit, {first.name}: {found}. {n} rows of the {words} can show "
        f"a difference of about {factor * smallest:.2g} {unit}{enough}"
    )


def _round_up(rows: float) -> int:
    step = 10 ** max(math.floor(math.log10(rows)) - 1, 1)
    return math.ceil(rows / step) * step


def _notes(
    judgement: Judgement,
    rule: Rule,
    known: Mapping[str, Contender],
    zero: QuestionZero,
    error_rate: ErrorRate | None,
    earlier: int,
    winner: str | None,
) -> list[str]:
    """Returns what else a reader of the verdict should know."""
    notes = []
    if winner and zero.better_than_base is False:
        found = gained(judgement.test.task, zero.task)
        notes.append(f"Your adapter itself is not shown to do the task better than its base ({found}); {winner} is.")
    if judgement.winner and not winner:
        met = f"The edit {judgement.winner} met the rule"
        notes.append(f"{met}, but is not shown to do the task better than the base either.")
    if zero.skills.low >= 0:
        notes.append("Your adapter kept all of the other skills on these rows, so there is nothing to get back.")
    if judgement.swapped:
        notes.append(_swapped(judgement, winner))
    if earlier:
        verdicts = f"{earlier} earlier verdict{'s' * (earlier > 1)} used these test rows"
        notes.append(
            f"{verdicts}, so the error rate of this one is {rule.level(earlier):.3g}, not {rule.error_rate:g}."
        )
    if not winner:
        notes += _continuing(judgement, rule, known)
    if error_rate and error_rate.replays:
        notes.append(_replayed(error_rate, rule.level(earlier)))
    return notes


def _swapped(judgement: Judgement, winner: str | None) -> str:
    how = "Rows were few, so each half chose and the other half confirmed, each at half the error rate"
    if not winner:
        return f"{how}."
    return f"{how}; {winner} was confirmed {'both ways' if judgement.both_ways else 'one way only'}."


def _continuing(judgement: Judgement, rule: Rule, known: Mapping[str, Contender]) -> list[str]:
    """Returns which continued trainings meet the rule where no edit does, each tested at its share of the level."""
    names = [name for name in judgement.test.scores if _family(known, name) == "continue"]
    sides = [[required(judgement.test, name, rule, side) for side in ("task", "skills")] for name in names]
    met = [
        name
        for name, both in zip(names, sides, strict=True)
        if max(map(p_value, both)) <= judgement.level / len(names)
    ]
    return [f"Continued training meets the rule where no edit does: {_described(known[name])}." for name in met]


def _replayed(rate: ErrorRate, level: float) -> str:
    found = f"{100 * rate.estimate:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f} %)"
    sentence = (
        f"With nothing to find, choice and confirmation confirmed something in {found} of {rate.replays} replays."
    )
    if rate.low > level:
        sentence += f" That is more than the {100 * level:.3g} % intended: take the verdict with caution."
    return sentence
