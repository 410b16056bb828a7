"""Choice and confirmation against planted truths: how often the good is found, and how seldom the bad is."""

from __future__ import annotations

import numpy as np
import pytest

from spectral_surgery.judging.choosing import answer, choose, confirm, finalists, halves, joined, judge, judge_swapped
from spectral_surgery.judging.rule import Rule
from spectral_surgery.judging.trials import BASE, UNEDITED, Measure, Scores, Split
from spectral_surgery.statistics import clopper_pearson
from tests.splits import ACCURACY, DRIFT, LOSS, answers, curve, exact, grouped, split

KEEP, GAIN = Rule(), Rule(may_lose=0.0)


def order(task: list[float], skills: list[float], rule: Rule = KEEP, error: float = 0.01) -> list[int]:
    errors = np.full(len(task), error)
    return finalists(np.array(task), errors, np.array(skills), errors, rule).tolist()


def test_finalists_are_the_edge_of_the_trade_off_from_the_surest_to_the_boldest() -> None:
    task, skills = [0.02, 0.01, 0.015, 0.005, 0.01], [0.05, 0.20, 0.10, 0.15, 0.20]
    assert order(task, skills) == [0, 2, 1], "3 is dominated by 1, and 4 is its equal"


def test_the_hopeless_and_the_lossy_are_left_out() -> None:
    assert order([0.02, -0.005, -0.05], [0.05, 0.1, 0.2]) == [0, 1]
    assert order([0.02, 0.03], [-0.01, 0.0]) == []
    assert order([-0.05], [0.3]) == []


def test_what_is_safer_but_less_sure_to_be_confirmed_does_not_begin_the_chain() -> None:
    assert order([0.05, 0.03, 0.01], [0.02, 0.05, 0.4]) == [1, 2], "two, three and one standard errors"
    assert order([0.03, 0.02], [0.02, 0.025]) == [0, 1], "two and two: the safer of equals"
    assert order([0.05, 0.045], [0.05, 0.09]) == [0, 1], "five and four and a half: both are sure"


def test_more_than_ten_are_thinned_evenly_with_both_ends_kept() -> None:
    boldness = np.linspace(0.1, 0.5, 40)
    found = order(list(0.06 - boldness / 10), list(boldness))
    assert len(found) == 10
    assert (found[0], found[-1]) == (0, 39)
    assert set(np.diff(found)) == {4, 5}


def test_for_a_better_task_the_surest_comes_first() -> None:
    errors = np.array([0.01, 0.03, 0.02, 0.01])
    found = finalists(np.array([0.04, 0.2, 0.1, 0.3]), errors, np.array([0.0, 0.1, 0.1, -0.1]), errors, GAIN)
    assert found.tolist() == [1, 2, 0], "3 loses other skills"


def test_base_and_unedited_are_never_finalists_and_nothing_comes_of_nothing() -> None:
    one = split(curve())
    assert choose(one, KEEP, [BASE, UNEDITED]) == []
    assert set(choose(one, KEEP, list(one.scores))) <= {f"edit {i}" for i in range(1, 11)}
    assert confirm(one, [], KEEP, 0.05) == []
    assert answer([], one, KEEP) is None


def test_chain_stops_at_the_first_failure_and_the_last_confirmed_is_the_answer() -> None:
    validation, test = split(curve(), 3000, 1), split(curve(), 3000, 2)
    found = judge(validation, test, KEEP, list(test.scores), 0.05)
    assert [one.passed for one in found.chain] == [True] * (len(found.chain) - 1) + [False]
    assert found.winner == found.chain[-2].name
    assert found.confirmed[-1] == found.winner
    bold = found.chain[-1]
    assert bold.task_p > 0.05 > bold.skills_p
    assert bold.task.estimate < 0 < bold.skills.low
    assert confirm(test, ["edit 10", "edit 2"], KEEP, 0.05)[0].passed is False
    assert len(confirm(test, ["edit 10", "edit 2"], KEEP, 0.05)) == 1


def test_test_rows_need_only_hold_the_finalists() -> None:
    validation, test = split(curve(), 1000, 1), split(curve(), 1000, 2)
    wanted = {BASE, UNEDITED, *choose(validation, KEEP, list(validation.scores))}
    part = Split(test.task, test.skills, test.task_rows, test.skills_rows,
                 {name: test.scores[name] for name in wanted})  # fmt: skip
    assert judge(validation, part, KEEP, list(validation.scores), 0.05).winner


def test_for_a_better_task_the_confirmed_one_with_the_best_validation_task_is_the_answer() -> None:
    means = {BASE: (0.5, 0.6), UNEDITED: (0.7, 0.5), "a": (0.8, 0.5), "b": (0.9, 0.5), "c": (0.95, 0.2)}
    found = judge(split(means, 800, 1), split(means, 800, 2), GAIN, list(means), 0.05)
    assert set(found.confirmed) == {"a", "b"}
    assert found.winner == "b"


def rate(hits: list[bool]) -> float:
    return float(np.mean(hits))


@pytest.mark.parametrize(("task", "skills", "n", "runs"), [(ACCURACY, ACCURACY, 1500, 12), (LOSS, DRIFT, 400, 6)])
def test_a_good_candidate_among_many_is_found(task: Measure, skills: Measure, n: int, runs: int) -> None:
    means = dict(curve(12))
    if task is LOSS:
        means = {name: (2 - t, 1 - s) for name, (t, s) in means.items()} | {BASE: (3.0, 0.01), UNEDITED: (1.03, 0.65)}
    found = []
    for seed in range(runs):
        one, other = split(means, n, seed, task, skills), split(means, n, 1000 + seed, task, skills)
        rule = Rule(may_lose=0.04) if task is LOSS else KEEP
        winner = judge(one, other, rule, list(means), 0.05).winner
        found.append(winner is not None)
    assert rate(found) >= 0.8


@pytest.mark.parametrize("rule", [KEEP, GAIN], ids=["keep", "gain"])
@pytest.mark.parametrize(("task", "skills"), [(ACCURACY, ACCURACY), (LOSS, DRIFT)])
@pytest.mark.parametrize("untrue", ["task", "skills"])
def test_whatever_is_untrue_of_all_is_confirmed_no_more_often_than_the_level(
    rule: Rule, task: Measure, skills: Measure, untrue: str
) -> None:
    """The candidates lie on the edge of one requirement and are good in the other."""
    kept = "task" if rule is KEEP else "skills"
    hits = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        splits = [planted(rng, task, skills, untrue, untrue == kept) for _ in range(2)]
        hits.append(judge(splits[0], splits[1], rule, list(splits[0].scores), 0.05).winner is not None)
    assert clopper_pearson(int(np.sum(hits)), len(hits), confidence=0.99).low <= 0.05


def planted(
    rng: np.random.Generator, task: Measure, skills: Measure, untrue: str, margin: bool, n: int = 100
) -> Split:
    """Returns five candidates that are good on one side and on the other just not good enough."""
    sides = {}
    for side, measure in (("task", task), ("skills", skills)):
        if side != untrue:
            sides[side] = good(rng, measure, n)
        else:
            sides[side] = edge(rng, measure, n, (0.05 if measure is DRIFT else 0.02) if margin else 0.0)
    names = list(sides["task"])
    found = {name: Scores(sides["task"][name], sides["skills"][name]) for name in names}
    one = exact({UNEDITED: answers(n, 0)}, {UNEDITED: answers(n, 0)})
    return Split(task, skills, one.task_rows, one.skills_rows, found)


def good(rng: np.random.Generator, measure: Measure, n: int) -> dict[str, np.ndarray]:
    if measure.binary:
        yours = (rng.random(n) < 0.5).astype(float)
        return {BASE: 0 * yours, UNEDITED: yours} | {f"c{i}": np.maximum(yours, rng.random(n) < 0.7) for i in range(5)}
    yours = rng.gamma(2, 0.5, n)
    base = 3 * yours if measure is LOSS else 0 * yours
    return {BASE: base, UNEDITED: yours} | {f"c{i}": yours * rng.uniform(0.2, 0.8, n) for i in range(5)}


def edge(rng: np.random.Generator, measure: Measure, n: int, share: float) -> dict[str, np.ndarray]:
    if measure.binary:
        yours, mine = (rng.random(n) < 0.9).astype(float), {}
        for i in range(5):
            fresh = np.where(rng.random(n) < 0.15, rng.random(n) < 0.9, yours).astype(float)
            mine[f"c{i}"] = fresh * (rng.random(n) >= share)
        return {BASE: yours * (rng.random(n) < 0.2), UNEDITED: yours} | mine
    yours = rng.gamma(2, 0.5, n)
    base = 3 * yours if measure is LOSS else 0 * yours
    allowed = share * (base - yours if measure is LOSS else yours)
    mine = {f"c{i}": yours + allowed + rng.normal(0, 0.1, n) for i in range(5)}
    return {BASE: base, UNEDITED: yours} | mine


def test_halves_are_by_group_and_do_not_depend_on_the_order_of_rows() -> None:
    one = grouped(split(curve(3), 240), 3)
    first, second = halves(one)
    assert len(first.task_rows) == len(second.task_rows) == 120
    assert not set(first.task_rows.groups) & set(second.task_rows.groups)
    assert set(first.task_rows.digests) | set(second.task_rows.digests) == set(one.task_rows.digests)
    shuffled = np.random.default_rng(0).permutation(240)
    again, _ = halves(one.only(shuffled, shuffled))
    assert set(again.task_rows.digests) == set(first.task_rows.digests)


def test_joined_halves_are_the_whole() -> None:
    one = split(curve(3), 100)
    whole = joined(*halves(one))
    assert set(whole.task_rows.digests) == set(one.task_rows.digests)
    assert whole.scores["edit 1"].task.sum() == one.scores["edit 1"].task.sum()


def two_halves(per_half: dict[str, tuple[tuple[float, float], tuple[float, float]]], n: int = 500) -> Split:
    """Returns exact shares of right answers on either half: of the task, and of other skills.

    The easy rows of a half are the same for all candidates.
    """
    empty = exact({UNEDITED: answers(n, 0)}, {UNEDITED: answers(n, 0)})
    first, second = halves(empty)
    sides = []
    for side, one, other in (
        (0, first.task_rows, second.task_rows),
        (1, first.skills_rows, second.skills_rows),
    ):
        place = {digest: i for half in (one, other) for i, digest in enumerate(half.digests)}
        half_of = {digest: half for half, found in enumerate((one, other)) for digest in found.digests}
        rows = empty.task_rows if side == 0 else empty.skills_rows
        sides.append({
            name: np.array([float(place[d] < shares[side][half_of[d]] * n / 2) for d in rows.digests])
            for name, shares in per_half.items()
        })  # fmt: skip
    found = {name: Scores(sides[0][name], sides[1][name]) for name in per_half}
    return Split(empty.task, empty.skills, empty.task_rows, empty.skills_rows, found)


FIXED = {BASE: ((0.5, 0.5), (0.9, 0.9)), UNEDITED: ((0.9, 0.9), (0.2, 0.2))}


def test_swapped_halves_confirm_at_half_the_level_and_prefer_what_is_confirmed_both_ways() -> None:
    mild, bold = ((0.92, 0.92), (0.5, 0.5)), ((0.9, 0.6), (0.8, 0.8))
    one = two_halves({**FIXED, "mild": mild, "bold": bold})
    found = judge_swapped(one, KEEP, list(one.scores), 0.05)
    assert found.swapped
    assert {found.order, found.swapped.order} == {("mild", "bold"), ("mild",)}
    assert (found.winner, found.both_ways) == ("mild", True)
    assert found.level == found.swapped.level == 0.025
    assert found.validation.task_rows == found.swapped.test.task_rows


def test_what_is_confirmed_one_way_only_is_the_answer_with_its_own_direction() -> None:
    tempting, solid = ((0.92, 0.3), (0.9, 0.9)), ((0.91, 0.91), (0.6, 0.6))
    one = two_halves({**FIXED, "tempting": tempting, "solid": solid})
    found = judge_swapped(one, KEEP, list(one.scores), 0.05)
    assert found.swapped
    assert (found.winner, found.both_ways) == ("solid", False)
    assert (found.order, found.swapped.order) == (("solid",), ("tempting",))
    assert not found.swapped.confirmed


def test_swapped_halves_that_disagree_confirm_nothing() -> None:
    one = two_halves({**FIXED, "a": ((0.9, 0.3), (0.9, 0.9)), "b": ((0.3, 0.9), (0.9, 0.9))})
    found = judge_swapped(one, KEEP, list(one.scores), 0.05)
    assert found.winner is None
    assert found.swapped
    assert {found.order, found.swapped.order} == {("a",), ("b",)}


def test_swapped_halves_with_nothing_to_find_have_no_winner() -> None:
    one = split({BASE: (0.6, 0.9), UNEDITED: (0.9, 0.4), "worse": (0.5, 0.3)}, 300)
    found = judge_swapped(one, KEEP, ["worse"], 0.05)
    assert (found.winner, found.chain, found.both_ways) == (None, (), False)
