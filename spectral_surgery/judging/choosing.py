"""Choice on validation rows, confirmation on test rows.

    order = choose(validation, rule, names)             # at most ten, surest first, then bolder
    chain = confirm(test, order, rule, level)           # each at the full level, up to the first failure
    winner = answer(chain, validation, rule)

Choosing the boldest candidate inside the margin and then testing that one mostly fails: validation flatters what it
chooses. In a fixed order from safe to bold every candidate has the full level, since a later one is tested only after
all before it were confirmed (Maurer, Hothorn and Lehmacher, 1995). Safe is what is likeliest to be confirmed, not what
changes least: an edit whose gain is too small to be shown would end the chain before it began.

:func:`judge` does all three; :func:`judge_swapped` does it twice on halves of too few rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from jaxtyping import Float, Int

from spectral_surgery.judging.rule import Rule, check, gain_interval, p_value, pair, required, spare
from spectral_surgery.judging.trials import BASE, UNEDITED, RowSet, Scores, Split
from spectral_surgery.statistics import Interval

FEW_ROWS = 600
"""Under so many unseen rows validation and test are swapped."""
HOPELESS = 1.0
"""A candidate so many standard errors outside the rule on validation rows is not tested.

Chosen by simulation of planted trade-offs (200 to 1,000 rows, 1 to 5 % of them discordant, 8 to 60 candidates): from 0
to 2 the gain that is confirmed hardly changes.
"""
SURE = 4.0
"""Being more standard errors inside the rule than this counts for nothing more.

In a simulation of such trade-offs it changed the gain that is confirmed by less than two in a hundred. It keeps the
two halves of few rows from beginning with different candidates where both are sure.
"""


@dataclass(frozen=True)
class Confirmation:
    """One candidate's test."""

    name: str
    task: Interval
    """Gain against the unedited adapter, positive is better, two-sided at 1 - 2 level."""
    skills: Interval
    """The same in other skills."""
    task_p: float
    """One-sided, of the rule's requirement on the task, its margin included."""
    skills_p: float
    """One-sided, of the rule's requirement on the other skills."""
    passed: bool


@dataclass(frozen=True)
class Judgement:
    """What was chosen and confirmed, and on which rows."""

    validation: Split
    test: Split
    level: float
    """Of every test in the chain, and of the claims about the winner."""
    order: tuple[str, ...]
    """Finalists, surest first, then bolder."""
    chain: tuple[Confirmation, ...]
    """Up to and with the first failure."""
    winner: str | None
    swapped: Judgement | None = None
    """The same with the halves exchanged, where rows were too few for both splits."""
    both_ways: bool = False
    """The winner was confirmed on both halves."""

    @property
    def confirmed(self) -> tuple[str, ...]:
        """Names of the confirmed candidates."""
        return tuple(found.name for found in self.chain if found.passed)


def choose(validation: Split, rule: Rule, candidates: Iterable[str]) -> list[str]:
    """Returns the finalists from surest to boldest, at most ``rule.finalists``; empty where nothing has a chance.

    With ``may_lose`` above zero these are candidates on the trade-off's edge: none other has as much of both. The
    first is the one that meets both requirements by the most standard errors, or the safest of those that do so by
    :data:`SURE`. The others have more of the other skills, and go from the least of them to the most. With
    ``may_lose`` 0 they go from the surest gain of the task to the least sure.

    Args:
        validation: With base, unedited and all candidates.
        rule: What is asked for.
        candidates: Names; base and unedited are left out.
    """
    names = [name for name in dict.fromkeys(candidates) if name not in (BASE, UNEDITED)]
    check(validation, names)
    if not names:
        return []
    task, skills = (np.array([spare(validation, name, rule, side) for name in names]).T for side in ("task", "skills"))
    return [names[i] for i in finalists(task[0], task[1], skills[0], skills[1], rule)]


def finalists(
    task: Float[np.ndarray, " n"],
    task_error: Float[np.ndarray, " n"],
    skills: Float[np.ndarray, " n"],
    skills_error: Float[np.ndarray, " n"],
    rule: Rule,
) -> Int[np.ndarray, " k"]:
    """Returns which of n candidates are tested, in order.

    Args:
        task: By how much each meets the rule on the task: its gain and the margin.
        task_error: Standard errors of these.
        skills: The same on the other skills.
        skills_error: The same of the other skills.
        rule: What is asked for.
    """
    wanted, error, kept, kept_error = (skills, skills_error, task, task_error)
    if rule.wanted == "task":
        wanted, error, kept, kept_error = (task, task_error, skills, skills_error)
    alive = (wanted > 0) & (kept >= -HOPELESS * kept_error)
    if rule.wanted == "skills":
        alive &= ~_dominated(task, skills)
    found, z = np.flatnonzero(alive), _errors_above(wanted, error)
    if rule.wanted == "task":
        return found[np.argsort(-z[found], kind="stable")][: rule.finalists]
    found = found[np.argsort(skills[found], kind="stable")]
    sure = np.minimum(z, _errors_above(kept, kept_error)).clip(max=SURE)[found]
    found = found[int(np.argmax(sure)) :] if len(found) else found
    return found[np.unique(np.linspace(0, max(len(found) - 1, 0), rule.finalists).round().astype(int))[: len(found)]]


def _errors_above(value: Float[np.ndarray, " n"], error: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Returns how many standard errors each is above zero."""
    return np.divide(value, error, out=np.full(len(value), np.inf), where=error > 0)


def _dominated(task: np.ndarray, skills: np.ndarray) -> np.ndarray:
    """Returns which candidates have another that is as good in both and better in one, or equal and earlier."""
    as_good = (task[:, None] >= task) & (skills[:, None] >= skills)
    better = (task[:, None] > task) | (skills[:, None] > skills)
    earlier = np.arange(len(task))[:, None] < np.arange(len(task))
    return np.asarray((as_good & (better | earlier)).any(0))


def confirm(test: Split, order: Sequence[str], rule: Rule, level: float) -> list[Confirmation]:
    """Returns the tests of the candidates in this order, up to and with the first failure.

    Args:
        test: With base, unedited and the candidates; nothing may have been chosen on these rows.
        order: Names, fixed beforehand.
        rule: What must be shown: both requirements.
        level: Of each test and of all together.
    """
    chain: list[Confirmation] = []
    for name in order:
        chain.append(_tested(test, name, rule, level))
        if not chain[-1].passed:
            break
    return chain


def _tested(test: Split, name: str, rule: Rule, level: float) -> Confirmation:
    task_p, skills_p = (p_value(required(test, name, rule, side)) for side in ("task", "skills"))
    task, skills = (gain_interval(pair(test, name, UNEDITED, side), 1 - 2 * level) for side in ("task", "skills"))
    return Confirmation(name, task, skills, task_p, skills_p, max(task_p, skills_p) <= level)


def answer(chain: Sequence[Confirmation], validation: Split, rule: Rule) -> str | None:
    """Returns the candidate to keep, None when none was confirmed.

    The last confirmed one, the boldest; with ``may_lose`` 0 the confirmed one with the best task on validation rows.
    """
    confirmed = [found.name for found in chain if found.passed]
    if not confirmed:
        return None
    return confirmed[-1] if rule.wanted == "skills" else max(confirmed, key=lambda name: _gain(validation, name, rule))


def _gain(split: Split, name: str, rule: Rule) -> float:
    return float(pair(split, name, UNEDITED, rule.wanted).gain.mean())


def judge(validation: Split, test: Split, rule: Rule, candidates: Iterable[str], level: float) -> Judgement:
    """Returns choice, confirmation and answer. ``test`` need only hold base, unedited and the finalists."""
    order = choose(validation, rule, candidates)
    chain = confirm(test, order, rule, level)
    return Judgement(validation, test, level, tuple(order), tuple(chain), answer(chain, validation, rule))


def judge_swapped(split: Split, rule: Rule, candidates: Iterable[str], level: float) -> Judgement:
    """Returns the judgement where all unseen rows serve both for choice and for confirmation, half by half.

    What is chosen on one half is confirmed on the other at half the level, and the other way, so whatever is confirmed
    either way is confirmed at the level (Bonferroni). The answer is confirmed both ways if any is, and the boldest of
    those; the judgement returned is that of its direction.

    Args:
        split: All unseen rows, with all candidates scored on all of them.
        rule: What is asked for.
        candidates: Names.
        level: Of both directions together.
    """
    names = list(candidates)
    first, second = halves(split)
    ways = [judge(*pairing, rule, names, level / 2) for pairing in ((first, second), (second, first))]
    both = set(ways[0].confirmed) & set(ways[1].confirmed)
    found = both or set(ways[0].confirmed) | set(ways[1].confirmed)
    if not found:
        return replace(ways[0], swapped=ways[1])
    winner = max(sorted(found), key=lambda name: _gain(split, name, rule))
    way, other = ways if winner in ways[0].confirmed else reversed(ways)
    return replace(way, winner=winner, swapped=other, both_ways=bool(both))


def halves(split: Split) -> tuple[Split, Split]:
    """Returns two halves of the rows that keep groups whole; which half is decided by the groups' content hashes."""
    task, skills = _half(split.task_rows), _half(split.skills_rows)
    return split.only(task, skills), split.only(~task, ~skills)


def joined(one: Split, other: Split) -> Split:
    """Returns the rows of both splits, with the candidates that were scored on both."""
    names = [name for name in one.scores if name in other.scores]
    scores = {
        name: Scores(*(np.concatenate(parts) for parts in zip(_arrays(one, name), _arrays(other, name), strict=True)))
        for name in names
    }
    return Split(
        one.task, one.skills, _both(one.task_rows, other.task_rows), _both(one.skills_rows, other.skills_rows), scores
    )


def _arrays(split: Split, name: str) -> tuple[np.ndarray, np.ndarray]:
    return split.scores[name].task, split.scores[name].skills


def _both(one: RowSet, other: RowSet) -> RowSet:
    return RowSet(*(a + b for a, b in zip(vars(one).values(), vars(other).values(), strict=True)))


def _half(rows: RowSet) -> np.ndarray:
    """Returns which rows are in the first half.

    Groups are taken in the order of a hash of their rows' hashes, each into the half that has fewer rows.
    """
    members: dict[str, list[str]] = {}
    for group, digest in zip(rows.groups, rows.digests, strict=True):
        members.setdefault(group, []).append(digest)
    order = sorted(members, key=lambda group: sha256("".join(sorted(members[group])).encode()).hexdigest())
    first: set[str] = set()
    sizes = [0, 0]
    for group in order:
        half = int(sizes[0] > sizes[1])
        sizes[half] += len(members[group])
        if half == 0:
            first.add(group)
    return np.array([group in first for group in rows.groups])
