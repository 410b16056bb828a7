"""What may be claimed of a confirmed candidate beyond "than the unedited adapter", in fixed order at one level.

Against the unedited adapter it was confirmed. Then: against a plain strength, against random gates, against continued
training; after the first that fails no further one is claimed. (Confirmation and these claims are two families, each
with its own error rate.)

A rival is **matched** on the test rows' task scores: of a family's candidates that score no higher on the task than
the winner, the one that scores highest. Such a rival has given up at least as much of the task, so it had at least as
much to gain; a coarse ladder of strengths can only help it. The other skills are compared on other rows, so that this
choice does not bias the comparison; nothing is interpolated. Where all score higher on the task, the lowest is taken,
and then nothing is claimed. With ``may_lose`` 0 the rival is the one with the best task on validation rows among those
whose other skills are within the margin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spectral_surgery.judging.choosing import Judgement
from spectral_surgery.judging.rule import Rule, Side, gain_interval, p_value, pair, spare
from spectral_surgery.judging.trials import UNEDITED, Measure, Split
from spectral_surgery.statistics import Interval

FAMILIES = ("strength", "continue")
"""Families that the winner is held against by their matched member."""


@dataclass(frozen=True)
class Contender:
    """What the verdict needs to know of a candidate besides its scores."""

    name: str
    family: str
    """``strength``, ``continue`` and so on."""
    equivalent: str | None = None
    """The same in one line of another program's settings, such as ``lora_alpha 16 -> 12.8``."""
    command: str | None = None
    """How to make it, where it is not an edit of this adapter."""


@dataclass(frozen=True)
class Claim:
    """One comparison of the winner."""

    against: str
    passed: bool
    sentence: str


@dataclass(frozen=True)
class RandomGates:
    """The winner beside permutations of its own gates."""

    permutations: int
    p: float
    statistic: str
    """What was counted."""


@dataclass(frozen=True)
class Comparison:
    """The winner beside one rival, on test rows."""

    rival: Contender
    task: Interval
    """The winner's gain over the rival, positive is better, two-sided at 1 - 2 level."""
    skills: Interval
    """The same in other skills."""
    ahead: bool
    """The winner is shown to have more of what the rule asks for, and no less of the rest."""
    behind: bool
    """The rival is shown to have more of what the rule asks for, and no less of the rest."""


def random_gates(winner: float, permuted: Sequence[float], rule: Rule) -> RandomGates:
    """Returns p = (1 + count) / (1 + permutations), where a permutation counts that does as well as the winner.

    Args:
        winner: :func:`spectral_surgery.judging.rule.merit` of the winner on test rows.
        permuted: The same of every permutation; NaN, a broken model, does not count.
        rule: What was asked for.
    """
    count = int((np.asarray(permuted, dtype=float) >= winner).sum())
    statistic = "gain in other skills, task within its margin"
    if rule.wanted == "task":
        statistic = "gain on the task, other skills within their margin"
    return RandomGates(len(permuted), (1 + count) / (1 + len(permuted)), statistic)


def rivals(validation: Split, order: Sequence[str], contenders: Iterable[Contender], rule: Rule) -> list[str]:
    """Returns which candidates to score on the test rows besides the finalists, so that each has its match there.

    Of every family in :data:`FAMILIES` and for every finalist, the two nearest at or under its task score and the
    nearest above, as far as validation rows tell; with ``may_lose`` 0 the one with the best task.
    """
    found: dict[str, None] = {}
    for family in FAMILIES:
        names = [one.name for one in contenders if one.family == family and one.name in validation.scores]
        if rule.wanted == "task":
            found |= dict.fromkeys(_best_task(validation, names, rule) if order else [])
            continue
        for finalist in order:
            ahead = {name: _ahead(validation, finalist, name, "task") for name in names if name != finalist}
            under = sorted((name for name in ahead if ahead[name] >= 0), key=lambda name: ahead[name])
            above = sorted((name for name in ahead if ahead[name] < 0), key=lambda name: -ahead[name])
            found |= dict.fromkeys(under[:2] + above[:1])
    return [name for name in found if name not in order]


def _ahead(split: Split, ours: str, theirs: str, side: Side) -> float:
    return float(pair(split, ours, theirs, side).gain.mean())


def _best_task(validation: Split, names: Sequence[str], rule: Rule) -> list[str]:
    """Returns the name with the best task among those whose other skills are within the margin, if there is one."""
    able = [name for name in names if spare(validation, name, rule, "skills")[0] >= 0]
    return sorted(able, key=lambda name: -_ahead(validation, name, UNEDITED, "task"))[:1]


def compare(judgement: Judgement, winner: str, rival: Contender, rule: Rule) -> Comparison:
    """Returns the winner beside one rival, on test rows at the judgement's level."""
    test, level = judgement.test, judgement.level
    kept: Side = "task" if rule.wanted == "skills" else "skills"
    lead = _ahead(test, winner, rival.name, kept)
    one, other = pair(test, winner, rival.name, rule.wanted), pair(test, rival.name, winner, rule.wanted)
    # With may_lose 0 both are within the margin of the other skills; above zero the task decides who is matched.
    free = rule.wanted == "task"
    return Comparison(
        rival,
        gain_interval(pair(test, winner, rival.name, "task"), 1 - 2 * level),
        gain_interval(pair(test, winner, rival.name, "skills"), 1 - 2 * level),
        ahead=(free or lead >= 0) and p_value(one) <= level,
        behind=(free or lead <= 0) and p_value(other) <= level,
    )


def comparisons(
    judgement: Judgement, winner: str, family: str, contenders: Mapping[str, Contender], rule: Rule
) -> list[Comparison]:
    """Returns the winner beside its match in a family, first, and beside a member that is shown to be ahead of it."""
    test, validation = judgement.test, judgement.validation
    members = [one.name for one in contenders.values() if one.family == family and one.name != winner]
    names = [name for name in members if name in test.scores]
    if rule.wanted == "task":
        matched = _best_task(validation, [name for name in names if name in validation.scores], rule)
        return [compare(judgement, winner, contenders[name], rule) for name in matched]
    lead = {name: (_ahead(test, winner, name, "task"), -_ahead(test, UNEDITED, name, "skills")) for name in names}
    under = sorted((name for name in names if lead[name][0] >= 0), key=lambda name: (lead[name][0], -lead[name][1]))
    above = sorted((name for name in names if lead[name][0] <= 0), key=lambda name: (-lead[name][0], -lead[name][1]))
    chosen = dict.fromkeys(under[:1] + above[:1])
    return [compare(judgement, winner, contenders[name], rule) for name in chosen]


def claims(
    judgement: Judgement,
    winner: str,
    contenders: Mapping[str, Contender],
    rule: Rule,
    random: RandomGates | None = None,
) -> list[Claim]:
    """Returns the comparisons of the winner in fixed order; those after the first failure are not claimed."""
    found = [_against_unedited(judgement, winner)]
    family = contenders[winner].family if winner in contenders else ""
    for kind in ("strength", "random", "continue"):
        if kind == "random" and random:
            found.append(_against_random(random, judgement.level))
        elif kind != "random" and kind != family:
            beside = comparisons(judgement, winner, kind, contenders, rule)
            found += [_against_rival(judgement, one, rule) for one in beside[:1]]
    failed = False
    for i, claim in enumerate(found):
        if failed and claim.passed:
            found[i] = Claim(
                claim.against, False, f"Not claimed, because a comparison before failed: {claim.sentence}"
            )
        failed |= not claim.passed
    return found


def _against_unedited(judgement: Judgement, winner: str) -> Claim:
    tested = next(found for found in judgement.chain if found.name == winner)
    sentence = f"Against your adapter: {both_gains(judgement, tested.task, tested.skills)}."
    return Claim(UNEDITED, tested.passed, sentence)


def _against_random(random: RandomGates, level: float) -> Claim:
    if random.p <= level:
        words = "Its gates do more than the same gates in random order"
    else:
        words = "Not shown to differ from the same gates in random order"
    return Claim("random", random.p <= level, f"{words} (p = {random.p:.3g}, {random.permutations} orders).")


def _against_rival(judgement: Judgement, found: Comparison, rule: Rule) -> Claim:
    name, gained = found.rival.name, both_gains(judgement, found.task, found.skills)
    if found.ahead and rule.wanted == "skills":
        sentence = f"It keeps more of the other skills than {name}, which keeps no more of the task: {gained}."
    elif found.ahead:
        sentence = f"It scores higher on the task than {name}: {gained}."
    elif found.behind:
        sentence = f"It does less of what was asked for than {name}: {gained}."
    else:
        sentence = f"Not shown to differ from {name}: {gained}."
    return Claim(name, found.ahead, sentence)


def both_gains(judgement: Judgement, task: Interval, skills: Interval) -> str:
    """Returns two gains in words, with their intervals."""
    level = f"{100 * (1 - 2 * judgement.level):.3g} % intervals"
    test = judgement.test
    return (
        f"task {gained(test.task, task)}, other skills {gained(test.skills, skills)}; {level}, plus is in its favour"
    )


def gained(measure: Measure, interval: Interval) -> str:
    """Returns a gain with its interval in the measure's unit; shares as points of a hundred."""
    factor, unit = (100, "points") if measure.unit.startswith("share") else (1, measure.unit)
    estimate, low, high = (factor * value for value in (interval.estimate, interval.low, interval.high))
    limits = f"{low:+.2g} to {high:+.2g}" if np.isfinite([low, high]).all() else "too few rows for an interval"
    return f"{estimate:+.2g} {unit} ({limits})"
