"""What is shown beside a verdict and decides nothing: exact answers, other instruments, few rows, a guess."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from spectral_surgery import report
from spectral_surgery.adapter import Adapter
from spectral_surgery.errors import DataError, InputError
from spectral_surgery.formats import DataOptions
from spectral_surgery.options import ModelOptions
from spectral_surgery.refining import Refinement, refine
from spectral_surgery.refining.foreseen import foreseen
from spectral_surgery.refining.guessing import BY_HEART, guess
from spectral_surgery.refining.instrument import warnings
from spectral_surgery.refining.job import Job, prepare, serving_note
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.refining.repeating import options_of
from spectral_surgery.report.facts import checks, few_rows

RNG = np.random.default_rng(0)


def written(path: Path, prompt: str, count: int) -> Path:
    rows = [{"prompt": prompt.format(i), "answer": str(i % 10), "task": "xy"[i % 2]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny.World]:
    folder = tmp_path_factory.mktemp("shown")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRAL_SURGERY_STATE", str(folder / "state"))
        yield tiny.world(folder)


def run(place: tiny.World, *, unsaid: bool = False, **changes: Any) -> Refinement:
    folder = place.base.parent
    data = written(folder / "task.jsonl", "double {}:", 60)
    keep = written(folder / "keep.jsonl", "tell {} of it!", 60)
    few = dict(keep=str(keep), steps=2, permutations=0, replays=0, exact_rows=7, ladder="controls")
    return refine(
        place.adapter,
        None if unsaid else data,
        task_data=data if unsaid else None,
        options=RefineOptions(**{**few, **changes}),
        rows=DataOptions(max_length=64),
        model=ModelOptions(dtype="float32", device="cpu"),
        output=folder / "out",
        overwrite=True,
    )


@pytest.fixture(scope="module")
def found(place: tiny.World) -> dict[str, Any]:
    own = written(place.base.parent / "own.jsonl", "name {}:", 9)
    return dict(run(place, check_suite=str(own), check_limit=5, few_rows=True).verdict)


@pytest.mark.slow
def test_exact_answers_stand_beside_losses_on_both_sides(found: dict[str, Any]) -> None:
    names = [c["name"] for c in found["candidates"] if c["name"] in ("base", "unedited")]
    test = {"task": found["rows"]["test"], "skills": found["rows"]["keep_test"]}
    for side, shown in found["exact"].items():
        assert (shown["n"], shown["of"]) == (7, test[side])
        by_name = {one["name"]: one for one in shown["scores"]}
        assert set(names) <= set(by_name)
        assert by_name["unedited"]["gain"] is None
        gain = by_name["base"]["gain"]
        assert gain["estimate"] == pytest.approx(by_name["base"]["mean"] - by_name["unedited"]["mean"])
        assert gain["low"] <= gain["estimate"] <= gain["high"]
    text = report.summary(found)
    assert "task, exact %" in text
    assert "others, exact %" in text


@pytest.mark.slow
def test_another_instrument_scores_base_and_yours_on_the_same_documents(found: dict[str, Any]) -> None:
    assert {one["n"] for one in found["checks"]} == {5}
    for check in found["checks"]:
        assert [one["name"] for one in check["scores"]][:2] == ["base", "unedited"]
    assert "by another instrument" in report.summary(found)
    assert "own" in report.summary(found)
    assert "own" not in json.dumps([one["name"] for one in report.publishable(found)["checks"]]).replace("own b", "")


@pytest.mark.slow
def test_few_rows_are_the_first_ones_and_both_ways_are_shown(found: dict[str, Any]) -> None:
    sizes = [one["rows"] for one in found["few_rows"]]
    assert sorted(set(sizes)) == [16, 20]
    assert [sizes.count(size) for size in (16, 20)] == [4, 4]
    ahead = {one["name"]: one["ahead"] for one in found["few_rows"]}
    assert ahead.pop("few-step tuning") is None
    assert all(set(one) == {"task", "skills"} for one in ahead.values())
    header, cells = few_rows(found)
    assert all(len(row) == len(header) for row in cells)


@pytest.mark.slow
def test_what_is_not_asked_for_is_not_made(place: tiny.World) -> None:
    verdict = run(place, exact_rows=0, unsaid=True).verdict
    assert verdict["exact"] == {"task": None, "skills": None}
    assert verdict["checks"] == verdict["few_rows"] == []
    assert verdict["rule"]["seen_rows_only"] == verdict["rows"]["guess"]["seen"]
    assert verdict["notes"][0].startswith("A guess, because you did not say")
    assert options_of(verdict)["task_data"].endswith("task.jsonl")


@pytest.mark.parametrize(
    ("suite", "said"), [("no-such.yaml", "no such file. Correct --check-suite"), ("a,", "neither a task")]
)
def test_a_wrong_instrument_is_refused_before_a_model_loads(
    place: tiny.World, suite: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda *a, **k: manager(include_defaults=False))
    with pytest.raises(InputError, match=said):
        run(place, check_suite=suite)


def test_rows_cannot_be_said_and_unsaid(place: tiny.World) -> None:
    with pytest.raises(DataError, match="without a word"):
        refine(place.adapter, place.data, task_data=place.data)


# -- what is known without weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(place: tiny.World) -> Job:
    folder = place.base.parent
    return prepare(
        Adapter.load(place.adapter),
        str(written(folder / "task.jsonl", "double {}:", 60)),
        options=RefineOptions(keep=str(written(folder / "keep.jsonl", "tell {} of it!", 60))),
        rows=DataOptions(max_length=64),
        model=ModelOptions(dtype="float32", device="cpu"),
    )


def test_what_is_only_shown_makes_no_other_verdict_and_what_decides_does(job: Job) -> None:
    def key(**changes: Any) -> str:
        return replace(job, options=replace(job.options, **changes)).run_key

    same = [key(exact_rows=3), key(few_rows=True), key(check_suite="gsm8k", check_limit=7), key(no_examples=True)]
    assert set(same) == {job.run_key}
    others = [key(may_lose="3%"), key(steps=7), replace(job, task=replace(job.task, seen_only=True)).run_key]
    assert len({job.run_key, *others}) == 4


def test_both_bases_are_named_where_they_differ(job: Job) -> None:
    def note(base: str, **model: Any) -> str | None:
        return serving_note(replace(job, base_model=base, model=replace(job.model, **model)))

    recorded = job.base_model
    assert note(recorded) is None
    assert note(recorded, load_in_4bit=True) == (
        f"Judged on {recorded} in 4 bits. On a base that is stored otherwise, such as 16 bits, figures may differ."
    )
    elsewhere = note("unsloth/llama-3-8b-bnb-4bit")
    assert elsewhere is not None
    assert "Judged on unsloth/llama-3-8b-bnb-4bit in 4 bits." in elsewhere
    assert f"names {recorded} as its base" in elsewhere


def test_memory_and_time_are_told_before_anything_loads(job: Job) -> None:
    assert re.fullmatch(r"Memory: about [\d.]+ [GM]iB on cpu; time: \d+ (s|min) or more", foreseen(job))
    longer = replace(job, options=replace(job.options, steps=10**6))
    assert re.search(r"time: \d{2,} min or more", foreseen(longer))


# -- the guess, on made-up losses -------------------------------------------------------------------------------------


def losses(harmed: float, by: float, count: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Losses of base and adapter: most rows gain one nat, a share loses so many."""
    base = RNG.uniform(1.5, 2.5, count)
    worse = np.arange(count) < harmed * count
    return base, base + np.where(worse, by, -1.0) + RNG.normal(0, 0.01, count)


@pytest.mark.parametrize(
    ("harmed", "by", "seen"),
    [
        (0.0, 0.0, True),  # every row better
        (0.3, 0.05, True),  # many worse, by next to nothing
        (0.15, 1.0, True),  # some clearly worse: doubt
        (0.35, 1.0, False),
        (0.9, 1.0, False),
        (1.0, 1.0, False),
    ],
)
def test_only_rows_that_are_surely_worse_are_guessed_to_be_unseen(harmed: float, by: float, seen: bool) -> None:
    found = guess(*losses(harmed, by), "mine.jsonl")
    assert found.seen == seen
    assert ("--data mine.jsonl" if seen else "--train-data mine.jsonl") in found.sentence
    assert found.worse == pytest.approx(harmed, abs=0.01)


def test_few_rows_are_doubt() -> None:
    base, own = losses(0.35, 1.0, count=10)
    assert guess(base, own, "").seen


def test_rows_known_by_heart_are_noticed() -> None:
    base = RNG.uniform(1, 2, 100)
    assert guess(base, RNG.uniform(0, BY_HEART, 100), "x").memorised
    assert not guess(base, RNG.uniform(0, 3 * BY_HEART, 100), "x").memorised
    assert not guess(base / 100, RNG.uniform(0, 0.001, 100), "x").memorised


# -- warnings ---------------------------------------------------------------------------------------------------------


def check(gain: float, p: float, *, share: bool = True) -> dict[str, Any]:
    def one(name: str, mean: float, gained: float | None) -> dict[str, Any]:
        interval = None if gained is None else {"estimate": gained, "low": gained - 0.1, "high": gained + 0.1}
        return {"name": name, "mean": mean, "se": 0.01, "gain": interval, "p": None if gained is None else p}

    scores = [one("base", 0.6, 0.1), one("unedited", 0.5, None), one("refined", 0.5 + gain, gain)]
    return {"name": "gsm8k exact_match", "n": 100, "lower_is_better": False, "share": share, "scores": scores}


def test_a_clear_loss_by_another_instrument_is_said_in_points() -> None:
    (told,) = warnings([check(-0.2, 0.001), check(-0.2, 0.2), check(0.2, 0.001)])
    assert "gsm8k exact_match, it is worse than your adapter: 50 -> 30 (base 60; gain -20 points [-30, -10]" in told
    assert "-0.2 [-0.3, -0.1], 100 documents" in warnings([check(-0.2, 0.001, share=False)])[0]
    without = check(-0.2, 0.001)
    without["scores"].pop()
    assert warnings([without]) == []


def test_the_table_marks_it_too() -> None:
    verdict = {"checks": [check(-0.2, 0.001), check(-0.2, 0.2)]}
    assert [one.worse for one in checks(verdict)] == [True, False]
