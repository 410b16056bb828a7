"""The replayed error rate: that what is replayed is null, tests agree with the run's, and cheating is seen."""

from __future__ import annotations

import numpy as np
import pytest

from spectral_surgery.judging import replaying
from spectral_surgery.judging.replaying import evidence, replay
from spectral_surgery.judging.rule import Rule, Side, spare, surety
from spectral_surgery.judging.trials import BASE, UNEDITED, Measure
from tests.splits import ACCURACY, DRIFT, LOSS, curve, grouped, split

KEEP, GAIN = Rule(), Rule(may_lose=0.0)
KINDS = [(ACCURACY, ACCURACY), (LOSS, DRIFT), (ACCURACY, DRIFT)]
EDITS = [f"edit {i}" for i in range(1, 11)]


def means(task: Measure, skills: Measure) -> dict[str, tuple[float, float]]:
    found = {}
    for name, (t, s) in curve().items():
        found[name] = (t if task is ACCURACY else 2.0 - t, s if skills is ACCURACY else 1.0 - s)
    return found | ({BASE: (3.0, found[BASE][1])} if task is LOSS else {})


@pytest.mark.parametrize(("task", "skills"), KINDS)
@pytest.mark.parametrize("rule", [KEEP, GAIN], ids=["keep", "gain"])
@pytest.mark.parametrize("size", [1, 3])
def test_evidence_as_observed_is_the_runs_own(task: Measure, skills: Measure, rule: Rule, size: int) -> None:
    one, sides = grouped(split(means(task, skills), 300, 0, task, skills), size), ("task", "skills")
    for i, side in enumerate(sides):
        found = evidence(one, EDITS, rule, side, 0, np.random.default_rng(0))  # type: ignore[arg-type]
        own = np.array([spare(one, name, rule, side) for name in EDITS])  # type: ignore[arg-type]
        assert found.mean[0] == pytest.approx(own[:, 0])
        assert found.error[0] == pytest.approx(own[:, 1])
        exact = (task, skills)[i].binary and size == 1
        p = [surety(one, name, rule)[i] for name in EDITS]
        assert found.p[0] == pytest.approx(p, abs=1e-9 if exact else 0.035)


@pytest.mark.parametrize("side", ["task", "skills"])
@pytest.mark.parametrize(("task", "skills"), KINDS)
@pytest.mark.parametrize("rule", [KEEP, GAIN], ids=["keep", "gain"])
def test_what_is_replayed_lies_on_the_edge_of_the_requirement(
    side: Side, task: Measure, skills: Measure, rule: Rule
) -> None:
    one = split(means(task, skills), 200, 0, task, skills)
    found = evidence(one, EDITS, rule, side, 4000, np.random.default_rng(1))
    of_mean = found.mean.std(0) / np.sqrt(4000)
    assert (np.abs(found.mean.mean(0)) <= 5 * of_mean + 1e-12).all()
    assert (np.mean(found.p <= 0.05, 0) <= 0.075).all()


@pytest.mark.parametrize(("task", "skills"), KINDS)
@pytest.mark.parametrize("rule", [KEEP, GAIN], ids=["keep", "gain"])
def test_the_error_rate_is_at_most_what_was_promised(task: Measure, skills: Measure, rule: Rule) -> None:
    one, other = (split(means(task, skills), 300, seed, task, skills) for seed in (0, 1))
    found = replay(one, other, rule, EDITS, 0.05)
    assert found.replays == 2000
    assert found.low <= found.estimate <= found.high
    assert found.low <= 0.05
    assert found.estimate < 0.065


def test_swapped_halves_keep_the_level_of_both_directions() -> None:
    one, other = split(curve(), 200, 0), split(curve(), 200, 1)
    single = replay(one, other, KEEP, EDITS, 0.025, times=1000)
    both = replay(one, other, KEEP, EDITS, 0.025, times=1000, swapped=True)
    assert single.estimate <= both.estimate <= 0.065


def test_confirming_on_the_rows_that_chose_is_seen_in_the_error_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    one = split({BASE: (0.5, 0.9), UNEDITED: (0.9, 0.5)} | {f"edit {i}": (0.9, 0.7) for i in range(30)}, 400)
    names = list(one.scores)
    honest = replay(one, one, GAIN, names, 0.05, times=500)
    same = np.random.default_rng(5).integers(0, 2**32)

    def cheating(*args: object) -> object:
        return evidence(*args[:-1], np.random.default_rng(same))  # type: ignore[arg-type]

    monkeypatch.setattr(replaying, "evidence", cheating)
    assert replay(one, one, GAIN, names, 0.05, times=500).low > 0.05 >= honest.low


def test_only_candidates_scored_on_both_splits_take_part() -> None:
    one, other = split(curve(4), 300, 0), split(curve(2), 300, 1)
    assert replay(one, other, KEEP, EDITS[:4], 0.05, times=200) == replay(one, other, KEEP, EDITS[:2], 0.05, times=200)
    assert replay(one, other, KEEP, [BASE, UNEDITED], 0.05).replays == 0


def test_the_seed_decides() -> None:
    one, other = split(curve(), 200, 0), split(curve(), 200, 1)
    first, again, another = (replay(one, other, KEEP, EDITS, 0.05, times=300, seed=s) for s in (1, 1, 2))
    assert first == again
    assert (first.estimate, another.estimate) != (0, 0)
