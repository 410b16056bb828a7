"""Which rows are which, and what may be chosen: every fault is found before a model loads."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import tiny

from spectral_surgery.adapter import Adapter
from spectral_surgery.errors import DataError, InputError
from spectral_surgery.formats import DataOptions
from spectral_surgery.judging.choosing import FEW_ROWS
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.refining.rows import FEWEST, TaskRows, first_row, keep_rows, row_set, task_rows
from spectral_surgery.refining.searching import Extent, extent


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return Adapter.from_model(tiny.lora(tiny.llama()))


def wrote(path: Path, count: int, *, start: int = 0, answer: str = "yes", **columns: object) -> str:
    rows = [{"prompt": f"ask {i}:", "answer": f"{answer} {i}", **columns} for i in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(adapter: Adapter, data: str | None = None, train: str | None = None, **changes: object) -> TaskRows:
    return task_rows(data, train, DataOptions(**changes), tiny.tokenizer(), adapter.folder)  # type: ignore[arg-type]


def digests(*parts: object) -> list[set[str]]:
    return [{row.digest for row in part.examples} for part in parts]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("count", "examples", "sizes", "swapped"),
    [
        (60, 128, (20, 20, 20), True),
        (200, 128, (66, 67, 67), True),
        (FEW_ROWS + 127, 128, (128, 299, 300), True),
        (FEW_ROWS + 128, 128, (128, 200, 400), False),
        (1500, 128, (128, 400, 972), False),
        (300, 16, (16, 142, 142), True),
    ],
)
def test_rows_are_divided_by_their_content(
    tmp_path: Path, adapter: Adapter, count: int, examples: int, sizes: tuple[int, int, int], swapped: bool
) -> None:
    found = read(adapter, wrote(tmp_path / "rows.jsonl", count), examples=examples)
    parts = (found.measuring, found.validation, found.test)
    assert tuple(map(len, parts)) == sizes
    assert found.swapped == swapped
    a, b, c = digests(*parts)
    assert not (a & b)
    assert not (a & c)
    assert not (b & c)
    assert len(a | b | c) == count
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)))
    turned = read(adapter, str(tmp_path / "turned.jsonl"), examples=examples)
    assert digests(turned.measuring, turned.validation, turned.test) == [a, b, c]
    for part in parts:
        assert [row.digest for row in part.examples] == [row.digest for row in part.tokenized.examples]


@pytest.mark.parametrize("count", [1, FEWEST - 1])
def test_too_few_rows_say_what_they_could_show(tmp_path: Path, adapter: Adapter, count: int) -> None:
    rows = wrote(tmp_path / "rows.jsonl", count)
    Path(rows).write_text(Path(rows).read_text() * 3)  # the same rows again are no more rows
    with pytest.raises(DataError, match=rf"has {count} different rows, expected at least 60.*points cannot be shown"):
        read(adapter, rows)


def test_without_rows_nothing_begins(adapter: Adapter) -> None:
    with pytest.raises(DataError, match=r"Pass --data .* --train-data .* or a file"):
        read(adapter)


def test_duplicates_are_counted_once(tmp_path: Path, adapter: Adapter) -> None:
    rows = wrote(tmp_path / "rows.jsonl", 80)
    lines = Path(rows).read_text().splitlines(keepends=True)
    Path(rows).write_text("".join(lines + lines[:7]))
    found = read(adapter, rows)
    assert found.duplicates == 7
    assert len(found.measuring) + len(found.validation) + len(found.test) == 80


def test_a_row_cannot_be_seen_and_unseen(tmp_path: Path, adapter: Adapter) -> None:
    data = wrote(tmp_path / "unseen.jsonl", 80)
    train = wrote(tmp_path / "seen.jsonl", 80, start=75)
    with pytest.raises(DataError, match=r"5 rows are both in .*unseen.jsonl and in .*seen.jsonl"):
        read(adapter, data, train)


def test_a_prompt_seen_with_another_answer_is_a_warning(
    tmp_path: Path, adapter: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    data = wrote(tmp_path / "unseen.jsonl", 80)
    train = wrote(tmp_path / "seen.jsonl", 10, start=77, answer="no")
    with caplog.at_level(logging.WARNING):
        found = read(adapter, data, train)
    assert "3 prompts of --data are also in --train-data" in caplog.text
    assert found.seen is not None
    assert len(found.seen) == 10
    assert not found.seen_only
    assert found.source == data


def test_seen_rows_alone_take_the_place_of_unseen_ones(tmp_path: Path, adapter: Adapter) -> None:
    train = wrote(tmp_path / "seen.jsonl", 90)
    found = read(adapter, None, train)
    assert found.seen_only
    assert found.seen is None
    assert found.source == train
    assert [len(part) for part in (found.measuring, found.validation, found.test)] == [30, 30, 30]


def test_rows_without_a_word_count_as_seen_until_they_are_guessed_about(tmp_path: Path, adapter: Adapter) -> None:
    rows = wrote(tmp_path / "rows.jsonl", 90)
    found = task_rows(None, None, DataOptions(), tiny.tokenizer(), adapter.folder, rows)
    assert (found.said, found.seen_only, found.seen, found.source) == (False, True, None, rows)
    assert [len(part) for part in (found.measuring, found.validation, found.test)] == [30, 30, 30]
    assert read(adapter, rows).said


def test_seen_rows_beside_unseen_ones_are_as_many_as_are_measured(tmp_path: Path, adapter: Adapter) -> None:
    data, train = wrote(tmp_path / "unseen.jsonl", 80), wrote(tmp_path / "seen.jsonl", 50, start=500)
    found = read(adapter, data, train, examples=20)
    assert found.seen is not None
    assert len(found.seen) == 20
    assert not digests(found.seen)[0] & set.union(*digests(found.measuring, found.validation, found.test))


def test_groups_stay_in_one_part(tmp_path: Path, adapter: Adapter) -> None:
    rows = [{"prompt": f"ask {i}:", "answer": "yes", "document": f"d{i % 30}"} for i in range(180)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(adapter, str(path), group_column="document")
    groups = [{row.group for row in part.examples} for part in (found.measuring, found.validation, found.test)]
    assert all(len(part) % 6 == 0 for part in (found.measuring, found.validation, found.test))
    assert not (groups[0] & groups[1])
    assert not (groups[0] & groups[2])
    assert not (groups[1] & groups[2])
    assert len(set.union(*groups)) == 30
    assert set(row_set(found.test.examples).groups) == groups[2]


@pytest.mark.parametrize("groups", [1, 2])
def test_too_few_groups_are_found_before_a_model_loads(tmp_path: Path, adapter: Adapter, groups: int) -> None:
    rows = [{"prompt": f"ask {i}:", "answer": "yes", "document": f"d{i % groups}"} for i in range(90)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="group"):
        read(adapter, str(path), group_column="document")


def test_the_first_row_shows_its_answer(tmp_path: Path, adapter: Adapter) -> None:
    found = read(adapter, wrote(tmp_path / "rows.jsonl", 60))
    row = found.measuring.examples[0]
    assert first_row(found.measuring, tiny.tokenizer()) == f"<s>{row.prompt} [[{row.answer}</s>]]"


# -- other skills -----------------------------------------------------------------------------------------------------


def skills(path: Path, count: int) -> str:
    rows = [
        {"prompt": f"tell {'abcdefghijkl'[i % 12]} of {i}!", "answer": "a", "skill": "xyz"[i % 3]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_other_skills_are_three_parts_with_every_category(tmp_path: Path, adapter: Adapter) -> None:
    task = read(adapter, wrote(tmp_path / "rows.jsonl", 60))
    options = RefineOptions(keep=skills(tmp_path / "keep.jsonl", 90))
    parts = keep_rows(options, DataOptions(), task, tiny.tokenizer(), adapter.folder)
    assert [len(part.rows) for part in parts] == [30, 30, 30]
    assert all(sorted(part.categories) == ["x"] * 10 + ["y"] * 10 + ["z"] * 10 for part in parts)
    assert len(set.union(*digests(*parts))) == 90


def test_too_few_other_skills_are_said_after_those_of_the_task_are_left_out(tmp_path: Path, adapter: Adapter) -> None:
    task = read(adapter, wrote(tmp_path / "rows.jsonl", 60))
    options = RefineOptions(keep=skills(tmp_path / "keep.jsonl", FEWEST - 1))
    with pytest.raises(DataError, match=r"has 59 different rows or prompts .* expected at least 60"):
        keep_rows(options, DataOptions(), task, tiny.tokenizer(), adapter.folder)
    both = tmp_path / "both.jsonl"
    both.write_text(Path(options.keep).read_text() + (tmp_path / "rows.jsonl").read_text())
    with pytest.raises(DataError, match="that do not resemble the task"):
        keep_rows(RefineOptions(keep=str(both)), DataOptions(), task, tiny.tokenizer(), adapter.folder)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"), [("2%", 0.02), ("0.02", 0.02), (" 0 ", 0.0), ("0%", 0.0), ("12.5 %", 0.125), (".5", 0.5)]
)
def test_what_may_be_lost_is_a_share(text: str, share: float) -> None:
    assert RefineOptions(may_lose=text).share == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "2", "100%", "1", "-1%", "two", "nan", "inf", "2%%", "1e3%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--may-lose"):
        RefineOptions(may_lose=text).check()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("45", 45), (" 1.5 m ", 90), (None, None)]
)
def test_a_budget_is_a_time(text: str | None, seconds: float | None) -> None:
    assert RefineOptions(budget=text).seconds == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "ten", "10 minutes", "-5m", "1m30s", "m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--budget"):
        RefineOptions(budget=text).check()


def test_all_faults_are_said_together() -> None:
    wrong = RefineOptions(
        may_lose="all", budget="soon", error_rate=0.5, steps=-1, permutations=-1, replays=-1, keep_tokens=0,
        objective="speed",
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        wrong.check()
    said = str(caught.value)
    names = ("may-lose", "budget", "error-rate", "steps", "permutations", "replays", "keep-tokens", "objective")
    assert all(f"--{name} is" in said for name in names)
    RefineOptions(steps=0, permutations=0, replays=0, keep_tokens=1, objective="mine:score").check()


# -- what fits into a budget ------------------------------------------------------------------------------------------

ORDER = [
    Extent(3, 3, True, 199),
    Extent(3, 3, True, 99),
    Extent(3, 3, True, 19),
    Extent(3, 1, True, 19),
    Extent(1, 1, True, 19),
    Extent(1, 1, False, 19),
    Extent(1, 0, False, 19),
    Extent(0, 0, False, 19),
    Extent(0, 0, False, 0),
]


def test_the_ladder_shrinks_in_the_stated_order_and_never_grows_with_less_time() -> None:
    places = []
    for seconds in [10**6, *range(4000, 0, -7)]:
        found = extent(RefineOptions(budget=f"{seconds}s"), 0.02, 400, 0.5)
        places.append(ORDER.index(found))
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] == len(ORDER) - 1
    assert set(places) == set(range(len(ORDER)))


def test_without_a_budget_nothing_is_left_out() -> None:
    assert extent(RefineOptions(permutations=50), 1.0, 10**6, 1e6) == Extent(3, 3, True, 50)
    assert extent(RefineOptions(steps=0), 0.0, 0, 0.0) == Extent(0, 0, True, 199)
    assert extent(RefineOptions(ladder="controls"), 0.0, 0, 0.0) == Extent(0, 0, True, 199)


@pytest.mark.parametrize("options", [{"steps": 0}, {"ladder": "controls"}, {"permutations": 10}])
def test_a_budget_never_adds_what_was_not_asked_for(options: dict[str, object]) -> None:
    whole = extent(RefineOptions(**options), 0.0, 0, 0.0)  # type: ignore[arg-type]
    for seconds in (1, 30, 300, 3000, 10**6):
        found = extent(RefineOptions(budget=f"{seconds}s", **options), 0.02, 400, 0.5)  # type: ignore[arg-type]
        assert all(getattr(found, name) <= getattr(whole, name) for name in vars(whole))
