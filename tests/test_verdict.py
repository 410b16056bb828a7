"""Verdicts on planted truths: the outcome, and that sentences say what was shown and no more."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from spectral_surgery.judging.choosing import Judgement, judge, judge_swapped
from spectral_surgery.judging.claims import Contender, RandomGates, claims, compare, random_gates, rivals
from spectral_surgery.judging.replaying import ErrorRate
from spectral_surgery.judging.rule import Rule
from spectral_surgery.judging.trials import BASE, UNEDITED, Scores, Split
from spectral_surgery.judging.verdict import Verdict, decide
from tests.splits import AGREEMENT, DRIFT, LOSS, Means, rows, split

KEEP, GAIN = Rule(), Rule(may_lose=0.0)
YOURS = {BASE: (0.85, 0.8), UNEDITED: (0.97, 0.35)}
STRENGTHS = {f"strength {s}": (0.97 - 0.24 * (1 - s) ** 1.5, 0.35 + 0.4 * (1 - s)) for s in (0.9, 0.8, 0.7, 0.6, 0.5)}
MISLEADING = re.compile(r"\b(alpha|target|calibration|guard|replay|same as)\b")


def contenders(names: Means) -> list[Contender]:
    found = []
    for name in names:
        if name.startswith("strength"):
            found.append(Contender(name, "strength", equivalent=f"lora_alpha 16 -> {16 * float(name[9:]):g}"))
        elif name.startswith("continue"):
            found.append(Contender(name, "continue", command="spectral-surgery refine mine --only continue"))
        elif name not in (BASE, UNEDITED):
            found.append(Contender(name, "one-step"))
    return found


def judged(means: Means, n: int = 1000, rule: Rule = KEEP, **measures: object) -> Judgement:
    one, other = (split(means, n, seed, **measures) for seed in (1, 2))  # type: ignore[arg-type]
    return judge(one, other, rule, [name for name in means if not name.startswith("continue")], 0.05)


def verdict(means: Means, n: int = 1000, rule: Rule = KEEP, **options: object) -> Verdict:
    found = decide(judged(means, n, rule), rule, contenders(means), **options)  # type: ignore[arg-type]
    assert not MISLEADING.search(" ".join([found.sentence, *found.notes, *(one.sentence for one in found.claims)]))
    return found


def test_a_refined_adapter_is_shown_against_strengths_and_random_gates() -> None:
    found = verdict({**YOURS, **STRENGTHS, "gates": (0.965, 0.7)}, random=RandomGates(199, 0.005, "gain"))
    assert (found.outcome, found.winner) == ("refined", "gates")
    assert re.match(
        r"Refined \(gates\): other skills 3\d\.\d % -> 7\d\.\d % \(base 8\d\.\d %; \d\d % of", found.sentence
    )
    assert re.search(r"task 96\.\d % -> 96\.\d % \(base 8\d\.\d %\)", found.sentence)
    assert "Shown against your adapter, strength 0.9 and the same gates in random order." in found.sentence
    assert [one.passed for one in found.claims] == [True, True, True]
    assert [one.against for one in found.claims][::2] == [UNEDITED, "random"]


def test_a_strength_that_wins_is_a_result_with_its_equivalent() -> None:
    found = verdict({**YOURS, **STRENGTHS}, 2000)
    assert found.outcome == "refined"
    assert found.winner
    assert f"A plain strength is enough, {found.winner} (lora_alpha 16 -> " in found.sentence
    assert [one.against for one in found.claims] == [UNEDITED], "it is not held against strengths"


def test_what_is_not_shown_to_differ_from_a_strength_is_not_called_the_same() -> None:
    strength, alike = {"strength 0.9": (0.965, 0.6)}, {"gates": (0.965, 0.605)}
    found = decide(
        Judgement(*_two({**YOURS, **strength, **alike}, alike), winner="gates"), KEEP, contenders(strength | alike)
    )
    assert [one.passed for one in found.claims] == [True, False]
    assert "Shown against your adapter. Not shown to differ from strength 0.9: task " in found.sentence
    assert "intervals" in found.sentence


def _two(means: Means, order: Means) -> tuple:
    found = judge(split(means, 1000, 1), split(means, 1000, 2), KEEP, list(order), 0.05)
    assert found.winner == next(iter(order))
    return found.validation, found.test, 0.05, found.order, found.chain


def test_after_a_comparison_that_failed_nothing_further_is_claimed() -> None:
    means = {**YOURS, "gates": (0.965, 0.6), "continue 1e-3": (0.9, 0.5)}
    found = verdict(means, random=RandomGates(199, 0.3, "gain"))
    assert [(one.against, one.passed) for one in found.claims] == [
        (UNEDITED, True),
        ("random", False),
        ("continue 1e-3", False),
    ]
    assert "Not shown to differ from the same gates in random order (p = 0.3, 199 orders)" in found.sentence
    assert found.claims[2].sentence.startswith("Not claimed, because a comparison before failed")


def test_continued_training_that_does_more_is_said_with_its_command() -> None:
    found = verdict({**YOURS, "gates": (0.965, 0.6), "continue 1e-3": (0.972, 0.75)})
    assert found.outcome == "refined"
    assert "less of what was asked for than continue 1e-3 (run: spectral-surgery refine mine" in found.sentence
    assert found.sentence.count("continue 1e-3") == 1


def test_continued_training_that_meets_the_rule_alone_is_a_note() -> None:
    found = verdict({**YOURS, "gates": (0.7, 0.6), "continue 1e-3": (0.972, 0.75)})
    assert found.outcome == "leave_alone"
    assert any("Continued training meets the rule where no edit does: continue 1e-3" in note for note in found.notes)


def test_a_rival_gave_up_at_least_as_much_of_the_task_and_is_the_nearest_of_those() -> None:
    means = {**YOURS, **STRENGTHS, "gates": (0.93, 0.8)}
    one = Judgement(split(means, 3000, 1), split(means, 3000, 2), 0.05, ("gates",), (), "gates")
    chain = judge(one.validation, one.test, Rule(may_lose=0.1), ["gates"], 0.05).chain
    one = Judgement(one.validation, one.test, 0.05, ("gates",), chain, "gates")
    against = claims(one, "gates", {found.name: found for found in contenders(means)}, Rule(may_lose=0.1))[1].against
    level = {name: found.task.mean() for name, found in one.test.scores.items()}
    under = [name for name in STRENGTHS if level[name] <= level["gates"]]
    assert under
    assert against == max(under, key=lambda name: level[name])


def test_a_rival_that_keeps_more_of_the_task_is_no_match() -> None:
    means = {**YOURS, "strength 0.9": (0.968, 0.5), "gates": (0.94, 0.7)}
    one = Judgement(split(means, 2000, 1), split(means, 2000, 2), 0.05, (), (), "gates")
    found = compare(one, "gates", Contender("strength 0.9", "strength"), KEEP)
    assert found.skills.low > 0 > found.task.high
    assert not found.ahead
    assert not found.behind


def test_rivals_for_the_test_rows_are_those_around_every_finalist() -> None:
    means = {**YOURS, **STRENGTHS, "gates": (0.93, 0.8), "continue 1e-3": (0.95, 0.6)}
    found = rivals(split(means, 3000), ["gates", "strength 0.9"], contenders(means), KEEP)
    assert {"strength 0.7", "strength 0.6", "continue 1e-3"} <= set(found)
    assert "strength 0.9" not in found, "a finalist is scored anyway"
    assert rivals(split(means, 3000), [], contenders(means), KEEP) == []
    best = rivals(
        split({**means, "strength 1.1": (0.99, 0.36)}), ["gates"], [Contender("strength 1.1", "strength")], GAIN
    )
    assert best == ["strength 1.1"]


def test_random_gates_count_what_does_as_well() -> None:
    found = random_gates(0.3, [0.1] * 190 + [0.3] * 4 + [-math.inf] * 4 + [math.nan], KEEP)
    assert (found.permutations, found.p) == (199, 5 / 200)


@pytest.mark.parametrize(
    ("edits", "n", "words"),
    [
        ({"a": (0.97, 0.2), "b": (0.9, 0.3)}, 600, "nothing gained, none of the 2 edits tried kept more"),
        ({"a": (0.8, 0.6), "b": (0.7, 0.7)}, 600, "the task would lose, all 2 edits that gained something lost more"),
        ({"a": (0.965, 0.6), "b": (0.96, 0.7)}, 100, "100 rows of the task can show a difference of about 4.3 points"),
    ],
)
def test_leave_it_alone_gives_its_reason(edits: Means, n: int, words: str) -> None:
    found = verdict({**YOURS, **edits}, n)
    assert (found.outcome, found.winner, found.claims) == ("leave_alone", None, ())
    assert found.sentence.startswith("Leave it alone: ")
    assert words in found.sentence


def test_rows_that_might_show_it_are_counted_only_where_somebody_may_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edits = {**YOURS, "a": (0.95, 0.6)}
    assert re.search(r"1000 rows of the task can show .*; about [89]\d00 rows might", verdict(edits, 1000).sentence)
    monkeypatch.setattr("spectral_surgery.judging.verdict.MOST_TIMES", 5)
    assert "might" not in verdict(edits, 1000).sentence


def test_an_adapter_that_is_not_better_than_its_base_is_told_so() -> None:
    found = verdict({**YOURS, UNEDITED: (0.85, 0.35), "a": (0.85, 0.6)})
    assert (found.outcome, found.winner) == ("not_better_than_base", None)
    assert "not shown to do the task better than its base model" in found.sentence
    assert found.question_zero.better_than_base is False
    worse = verdict({**YOURS, UNEDITED: (0.6, 0.35), "a": (0.6, 0.6)})
    assert "does the task worse than its base model: -2" in worse.sentence


def test_an_edit_that_repairs_an_adapter_beyond_its_base_is_an_answer() -> None:
    found = verdict({**YOURS, UNEDITED: (0.7, 0.35), "repaired": (0.95, 0.36)}, rule=GAIN)
    assert (found.outcome, found.winner) == ("refined", "repaired")
    assert "shown to be no worse" in found.sentence
    assert any("not shown to do the task better than its base" in note for note in found.notes)


def seen(agreement: float, drift: float, n: int = 300) -> Split:
    rng = np.random.default_rng(0)
    ones, hard = np.ones(n), rng.gamma(2, 0.5, n)
    few = np.clip(ones - rng.exponential(1 - agreement, n), 0, 1)
    scores = {
        BASE: Scores(rng.uniform(0, 0.6, n), 0 * hard),
        UNEDITED: Scores(ones, hard),
        "a": Scores(few, drift * hard * rng.uniform(0.9, 1.1, n)),
    }
    return Split(AGREEMENT, DRIFT, rows(n), rows(n), scores)


def test_with_seen_rows_only_nothing_is_called_better() -> None:
    one = seen(0.99, 0.29)
    found = decide(judge(one, one, KEEP, ["a"], 0.05), KEEP, [Contender("a", "one-step")], seen_rows_only=True)
    assert found.outcome == "refined"
    assert "answers your task prompts as before (99 % agreement, seen rows)" in found.sentence
    assert "71 % of the drift from the base undone" in found.sentence
    assert "task accuracy was not tested: pass 150 or more unseen rows with --data" in found.sentence
    assert "better" not in " ".join([found.sentence, *found.notes, *(one.sentence for one in found.claims)])
    assert found.question_zero.better_than_base is None


def test_a_better_task_cannot_come_from_seen_rows() -> None:
    one = seen(0.99, 0.29)
    found = decide(judge(one, one, GAIN, ["a"], 0.05), GAIN, [Contender("a", "one-step")], seen_rows_only=True)
    assert found.outcome == "leave_alone"
    assert "cannot be shown on seen rows" in found.sentence


def test_losses_are_told_in_their_unit() -> None:
    means = {BASE: (3.0, 0.01), UNEDITED: (1.0, 1.0), "a": (0.99, 0.3)}
    found = decide(judged(means, task=LOSS, skills=DRIFT), KEEP, [Contender("a", "one-step")])
    assert found.outcome == "refined"
    assert "(drift from the base, nats per token) 1.0" in found.sentence
    assert "lose less than 0.02 nats per token" in found.sentence


def test_notes_say_what_bears_on_the_error_rate() -> None:
    means = {**YOURS, "gates": (0.965, 0.7)}
    found = verdict(means, earlier=2, error_rate=ErrorRate(0.031, 0.024, 0.04, 2000, "task"))
    assert "2 earlier verdicts used these test rows, so the error rate of this one is 0.0167, not 0.05." in found.notes
    assert any("3.1 % (2.4 to 4.0 %) of 2000 replays" in note for note in found.notes)
    bad = verdict(means, error_rate=ErrorRate(0.2, 0.18, 0.22, 2000, "task"))
    assert any("take the verdict with caution" in note for note in bad.notes)


def test_swapped_halves_are_a_note() -> None:
    means = {BASE: (0.4, 0.8), UNEDITED: (0.97, 0.35), "gates": (0.97, 0.7)}
    found = decide(judge_swapped(split(means, 800), Rule(may_lose=0.05), ["gates"], 0.05), KEEP, contenders(means))
    assert found.winner == "gates"
    assert any("each half chose and the other half confirmed" in note for note in found.notes)
    assert any("confirmed both ways" in note for note in found.notes)


def test_the_record_is_plain_json_even_without_limits() -> None:
    found = verdict({**YOURS, "a": (0.9, 0.5)}, 5)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert set(record) == {
        "outcome", "sentence", "notes", "winner", "chain", "question_zero", "claims", "random", "error_rate",
    }  # fmt: skip
    losses = decide(judged({**YOURS, "a": (0.9, 0.5)}, 5, task=LOSS, skills=DRIFT), KEEP, [Contender("a", "x")])
    assert losses.record()["question_zero"]["task"]["low"] is None or losses.question_zero.task.low > -math.inf
