"""Intervals against brute force and by the coverage they promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import binomtest, norm, ttest_1samp

from spectral_surgery.statistics import (
    bootstrap_mean,
    bootstrap_p,
    clopper_pearson,
    mcnemar,
    mean_error,
    paired_proportions,
    paired_ratio,
    student,
)


def score_by_brute_force(wins: int, losses: int, n: int, delta: float) -> float:
    """The score statistic with the nuisance parameter found by maximising the trinomial likelihood numerically."""

    def minus_log_likelihood(q: float) -> float:
        p = np.array([q + delta, q, 1 - 2 * q - delta])
        counts = np.array([wins, losses, n - wins - losses])
        return -float((counts * np.log(np.clip(p, 1e-300, None))).sum())

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (wins - losses - n * delta) / np.sqrt(n * (2 * q + delta - delta**2))


@pytest.mark.parametrize(("wins", "losses", "n"), [(12, 2, 50), (7, 7, 100), (1, 0, 30), (20, 5, 400)])
def test_tango_limits_are_where_the_brute_force_score_equals_the_normal_quantile(
    wins: int, losses: int, n: int
) -> None:
    found = paired_proportions(wins, losses, n)
    z = norm.ppf(0.975)
    assert score_by_brute_force(wins, losses, n, found.low) == pytest.approx(z, abs=1e-3)
    assert score_by_brute_force(wins, losses, n, found.high) == pytest.approx(-z, abs=1e-3)
    assert found.estimate == (wins - losses) / n


@pytest.mark.parametrize(("wins", "losses", "n"), [(0, 0, 200), (5, 0, 5), (0, 5, 5), (0, 1, 1)])
def test_tango_interval_has_a_width_and_holds_the_estimate_at_the_edges(wins: int, losses: int, n: int) -> None:
    found = paired_proportions(wins, losses, n)
    assert -1 <= found.low <= found.estimate <= found.high <= 1
    assert found.high - found.low > 0.01


def test_tango_interval_is_mirrored_when_the_two_are_swapped() -> None:
    one, other = paired_proportions(9, 4, 120), paired_proportions(4, 9, 120)
    assert one.low == pytest.approx(-other.high)
    assert one.high == pytest.approx(-other.low)


def test_tango_interval_covers_at_its_level() -> None:
    rng = np.random.default_rng(0)
    n, p = 100, (0.06, 0.03, 0.91)
    hits = []
    for wins, losses, _ in rng.multinomial(n, p, size=1500):
        found = paired_proportions(int(wins), int(losses), n)
        hits.append(found.low <= p[0] - p[1] <= found.high)
    assert 0.93 <= np.mean(hits) <= 0.975


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="wins 3, losses 3 of 5 examples are impossible"):
        paired_proportions(3, 3, 5)


@pytest.mark.parametrize("grouped", [False, True])
def test_bootstrap_covers_the_mean_of_skewed_values_at_its_level(grouped: bool) -> None:
    rng = np.random.default_rng(1)
    hits = []
    for trial in range(400):
        values = rng.exponential(size=60)
        groups = None
        if grouped:
            values = np.repeat(values[:30], 2) + rng.normal(0, 0.1, 60)
            groups = [str(i // 2) for i in range(60)]
        found = bootstrap_mean(values, groups=groups, resamples=500, seed=trial)
        hits.append(found.low <= 1 <= found.high)
    assert 0.91 <= np.mean(hits) <= 0.98


def test_grouping_widens_the_interval_of_repeated_examples() -> None:
    values = np.repeat(np.random.default_rng(2).normal(size=40), 5)
    alone = bootstrap_mean(values)
    together = bootstrap_mean(values, groups=[str(i // 5) for i in range(200)])
    assert together.estimate == pytest.approx(values.mean())
    assert alone.estimate == pytest.approx(values.mean())
    assert (together.high - together.low) > 1.7 * (alone.high - alone.low)


def test_bootstrap_of_one_group_is_refused() -> None:
    with pytest.raises(ValueError, match="1 group of examples has no interval"):
        bootstrap_mean(np.ones(4), groups=["a"] * 4)


def test_equal_values_give_a_point() -> None:
    found = bootstrap_mean(np.full(10, 0.25))
    assert (found.low, found.estimate, found.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 4), (3, 0), (9, 4), (40, 41)])
def test_mcnemar_is_the_exact_sign_test(wins: int, losses: int) -> None:
    oracle = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1.0
    assert float(mcnemar(wins, losses)) == pytest.approx(oracle)
    assert mcnemar(np.array([wins, 0]), np.array([losses, 0])).tolist() == pytest.approx([oracle, 1.0])


@pytest.mark.parametrize("table", [(140, 0, 0, 150, 0.98), (130, 4, 6, 160, 0.98), (90, 3, 12, 120, 0.95)])
def test_paired_ratio_scores_at_the_likeliest_table_on_the_edge(table: tuple[int, int, int, int, float]) -> None:
    both, wins, losses, n, ratio = table

    def minus_log_likelihood(x: np.ndarray) -> float:
        p = probabilities(x)
        if p.min() < -1e-12:
            return 1e9
        counts = np.array([both, wins, losses, n - both - wins - losses])
        return -float((counts * np.log(np.clip(p, 1e-300, None)))[counts > 0].sum())

    def probabilities(x: np.ndarray) -> np.ndarray:
        p_both, p_losses = x
        p_wins = ratio * (p_both + p_losses) - p_both
        return np.array([p_both, p_wins, p_losses, 1 - p_both - p_wins - p_losses])

    # The edge p_wins = 0 is p_losses = p_both (1 - ratio) / ratio; start a little inside.
    start = np.array([both / n * 0.99, both / n * (1 - ratio) * 1.2])
    options = {"xatol": 1e-12, "fatol": 1e-13, "maxiter": 4000}
    p = probabilities(minimize(minus_log_likelihood, start, method="Nelder-Mead", options=options).x)
    variance = n * ((1 - ratio) ** 2 * p[0] + p[1] + ratio**2 * p[2])
    oracle = norm.sf((both + wins - ratio * (both + losses)) / np.sqrt(variance))
    assert float(paired_ratio(both, wins, losses, n, ratio)) == pytest.approx(oracle, abs=1e-4)


def test_paired_ratio_without_discordant_examples_is_sure_only_of_enough_of_them() -> None:
    sure = paired_ratio(np.array([100, 131, 133, 300]), np.zeros(4), np.zeros(4), 300, 0.98)
    assert (sure <= 0.05).tolist() == [False, False, True, True]


def test_bootstrap_p_is_small_exactly_where_the_interval_is_above_zero() -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).exponential(size=50) - 0.8
        p, low = bootstrap_p(values), bootstrap_mean(values, confidence=0.9).low
        assert abs(p - 0.05) < 0.001 or (p < 0.05) == (low > 0)
        assert p == pytest.approx(ttest_1samp(values, 0, alternative="greater").pvalue, abs=0.06)


def test_bootstrap_p_of_equal_values() -> None:
    assert bootstrap_p(np.full(10, 0.25)) < 0.001
    assert bootstrap_p(np.zeros(10)) == 1.0
    with pytest.raises(ValueError, match="1 group of examples has no interval"):
        bootstrap_p(np.ones(4), groups=["a"] * 4)


def test_student_is_the_t_test() -> None:
    values = np.random.default_rng(3).normal(0.2, 1, (30, 4))
    found = student(values.mean(0), values.std(0, ddof=1) / np.sqrt(30), 30)
    assert found.tolist() == pytest.approx(ttest_1samp(values, 0, alternative="greater").pvalue.tolist())
    assert float(student(1.0, 0.0, 10)) == 1.0


def test_mean_error_counts_groups() -> None:
    values = np.repeat(np.random.default_rng(4).normal(size=30), 3)
    groups = [str(i // 3) for i in range(90)]
    assert mean_error(values, groups)[1] == pytest.approx(values[::3].std(ddof=1) / np.sqrt(30))
    assert mean_error(values[:3], groups[:3])[1] == np.inf


def test_clopper_pearson_is_exact() -> None:
    found = clopper_pearson(0, 10)
    assert (found.estimate, found.low) == (0, 0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 10))
