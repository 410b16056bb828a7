"""Whether one candidate meets the rule: intervals and p-values against independent oracles, and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from spectral_surgery.errors import RunError
from spectral_surgery.judging.rule import Margins, Rule, check, gains, margins, merit, smallest_difference, surety
from spectral_surgery.judging.trials import BASE, UNEDITED, Measure, Scores, Split
from spectral_surgery.statistics import Interval, paired_proportions, paired_ratio
from tests.splits import ACCURACY, AGREEMENT, DRIFT, LOSS, answers, curve, exact, grouped, rows, split


def as_pair(margins: Margins) -> tuple[float, float]:
    return margins.task, margins.skills


def test_margins_are_shares_of_the_score_of_what_was_learned_and_of_the_drift() -> None:
    accuracy = exact({BASE: answers(5, 5), UNEDITED: answers(8, 2)}, {UNEDITED: answers(5, 5)})
    assert as_pair(margins(accuracy, Rule())) == pytest.approx((0.016, 0))
    assert as_pair(margins(accuracy, Rule(may_lose=0.0))) == pytest.approx((0, 0.01))
    losses = exact({BASE: [2, 2], UNEDITED: [1, 2]}, {BASE: [0, 0], UNEDITED: [0.4, 0.6]}, LOSS, DRIFT)
    assert as_pair(margins(losses, Rule(may_lose=0.1))) == pytest.approx((0.05, 0))
    assert as_pair(margins(losses, Rule(may_lose=0.0))) == pytest.approx((0, 0.025))


def test_a_margin_of_losses_is_a_share_of_one_nat_at_most() -> None:
    hopeless = exact({BASE: [12, 14], UNEDITED: [1, 2]}, {BASE: [0, 0], UNEDITED: [0.4, 0.6]}, LOSS, DRIFT)
    assert margins(hopeless, Rule(may_lose=0.1)).task == pytest.approx(0.1)


def test_gain_of_0_1_scores_is_tangos_interval_and_positive_is_better() -> None:
    one = exact({"a": answers(8, 2), "b": answers(5, 5)}, {"a": answers(1, 9), "b": answers(1, 9)})
    assert gains(one, "a", "b", confidence=0.9) == paired_proportions(3, 0, 10, confidence=0.9)
    assert gains(one, "b", "a").estimate == pytest.approx(-0.3)


def test_gain_of_losses_is_positive_where_the_loss_is_lower() -> None:
    one = split({BASE: (2, 0), UNEDITED: (1, 1), "a": (0.8, 1)}, 200, task=LOSS, skills=DRIFT)
    found = gains(one, "a", UNEDITED)
    assert 0 < found.low < found.estimate < found.high
    assert gains(one, "a", UNEDITED) == found, "the resampling is seeded"


def test_gain_of_grouped_0_1_scores_is_wider_than_that_of_rows_by_themselves() -> None:
    alone = exact({"a": np.repeat(answers(28, 12), 5), "b": np.repeat(answers(12, 28), 5)})
    one, other = gains(alone, "a", "b"), gains(grouped(alone, 5), "a", "b")
    assert other.high - other.low > 1.8 * (one.high - one.low)


@pytest.mark.parametrize("size", [1, 4])
def test_without_any_difference_nothing_is_better_and_few_rows_do_not_show_no_worse(size: int) -> None:
    def no_worse(right: int) -> float:
        same = exact({UNEDITED: answers(right, 0), "a": answers(right, 0)})
        return surety(grouped(same, size), "a", Rule(may_lose=0.05))[0]

    same = exact({UNEDITED: answers(40, 8), "a": answers(40, 8)})
    assert surety(grouped(same, size), "a", Rule(may_lose=0.0))[0] == 1
    assert gains(grouped(same, size), "a", UNEDITED).low < -0.01
    assert no_worse(40 * size) > 0.05
    assert no_worse(80 * size) < 0.05


def test_a_better_task_is_mcnemars_exact_test() -> None:
    task = {UNEDITED: [1] * 50 + [0] * 7 + [1] * 2 + [0] * 41, "a": [1] * 50 + [1] * 7 + [0] * 2 + [0] * 41}
    one = exact(task)
    assert surety(one, "a", Rule(may_lose=0.0))[0] == pytest.approx(binomtest(7, 9, alternative="greater").pvalue)


def test_a_margin_of_0_1_scores_is_a_test_of_their_ratio() -> None:
    task = {UNEDITED: [1] * 150 + [0] * 2 + [1] * 3 + [0] * 45, "a": [1] * 150 + [1] * 2 + [0] * 3 + [0] * 45}
    one = exact(task)
    assert surety(one, "a", Rule(may_lose=0.05))[0] == pytest.approx(float(paired_ratio(150, 2, 3, 200, 0.95)))


def test_a_margin_of_losses_is_tested_with_its_own_error() -> None:
    one = split({BASE: (1.9, 0), UNEDITED: (1, 1), "a": (1.01, 0.5)}, 300, task=LOSS, skills=DRIFT)
    assert (one.scores[BASE].task - one.scores[UNEDITED].task).mean() < 1
    base, yours, edit = (one.scores[name].task for name in (BASE, UNEDITED, "a"))
    oracle = ttest_1samp(yours - edit + 0.02 * (base - yours), 0, alternative="greater").pvalue
    assert surety(one, "a", Rule(may_lose=0.02))[0] == pytest.approx(oracle, abs=0.03)


def test_p_and_interval_agree_at_the_level() -> None:
    for seed in range(20):
        one = split({BASE: (2, 0), UNEDITED: (1, 1), "a": (0.97, 1)}, 80, seed, task=LOSS, skills=DRIFT)
        p = surety(one, "a", Rule(may_lose=0.0))[0]
        if abs(p - 0.05) > 0.001:
            assert (p < 0.05) == (gains(one, "a", UNEDITED, confidence=0.9).low > 0)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("task", "level"), [(ACCURACY, 0.95), (LOSS, 1.0)])
def test_a_candidate_on_the_margins_edge_is_confirmed_no_more_often_than_the_level(
    task: Measure, level: float, size: int
) -> None:
    rng, found = np.random.default_rng(1), []
    for _ in range(120):
        if task is ACCURACY:
            yours = (rng.random(120) < level).astype(float)
            edit = yours * (rng.random(120) < 0.95)
            base = yours
        else:
            yours, noise = rng.gamma(2, 0.5, 120), rng.normal(0, 0.05, 120)
            base = 2 * yours
            edit = yours + noise + 0.05 * (base - yours)
        one = exact({BASE: np.repeat(base, size), UNEDITED: np.repeat(yours, size), "a": np.repeat(edit, size)},
                    task_measure=task)  # fmt: skip
        found.append(surety(grouped(one, size), "a", Rule(may_lose=0.05))[0] <= 0.05)
    assert 0.005 <= np.mean(found) <= 0.1


def test_nearly_perfect_agreement_on_few_rows_is_not_taken_for_certain() -> None:
    def surely(n: int) -> float:
        same = exact({UNEDITED: [1.0] * n, "a": [1.0] * (n - 1) + [0.98]}, task_measure=AGREEMENT)
        return surety(same, "a", Rule())[0]

    assert surely(50) > 0.05 > surely(200)


def test_one_row_shows_nothing() -> None:
    for measure in (ACCURACY, LOSS):
        scores = {BASE: [1.0], UNEDITED: [0.0], "a": [1.0]}
        one = exact(scores, scores, measure, measure)
        assert min(surety(one, "a", Rule())) > 0.05
    assert gains(one, "a", UNEDITED) == Interval(-1.0, -math.inf, math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_by_name_and_row(bad: float) -> None:
    one = exact({UNEDITED: [1, 2, 3], "a": [1, bad, 3]}, task_measure=LOSS)
    with pytest.raises(RunError, match=rf"a: the score \(loss of the answer\) of row 000000000001 is {bad}"):
        check(one, ["a"])


def test_missing_scores_wrong_lengths_and_wrong_values_are_refused() -> None:
    one = exact({UNEDITED: [1, 0], "a": [1, 0.5]})
    with pytest.raises(RunError, match=r"should be 0 or 1 on every row, but 0\.5 to 1 was found"):
        check(one, ["a"])
    with pytest.raises(RunError, match="b has no scores"):
        check(one, ["b"])
    short = Split(ACCURACY, ACCURACY, rows(3), rows(1), one.scores)
    with pytest.raises(RunError, match="has 2 values for 3 rows"):
        check(short)
    none = Split(ACCURACY, ACCURACY, rows(0), rows(0), {n: Scores(np.ones(0), np.ones(0)) for n in (BASE, UNEDITED)})
    with pytest.raises(RunError, match="0 values for 0 rows"):
        check(none)


def test_merit_is_the_gain_inside_the_margin_only() -> None:
    one = split(curve(4), 2000)
    assert 0.05 < merit(one, "edit 1", Rule()) < 0.15
    assert merit(one, "edit 4", Rule()) == -math.inf
    assert merit(one, "edit 1", Rule(may_lose=0.0)) == gains(one, "edit 1", UNEDITED).estimate


def test_smallest_difference_is_about_four_points_at_200_rows() -> None:
    assert smallest_difference(200) == pytest.approx(0.0395, abs=1e-3)
    assert smallest_difference(0) == math.inf
