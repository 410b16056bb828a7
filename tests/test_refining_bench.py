"""Scoring each thing once, dropping clear losers early, remembering, and saying what differs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from spectral_surgery.calibration import Tokenized, TokenizedExample
from spectral_surgery.errors import InputError
from spectral_surgery.formats import DataOptions, Example
from spectral_surgery.judging.trials import BASE, UNEDITED, Measure, RowSet, Scores, Split
from spectral_surgery.live import Live
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.refining.bench import Bench, Part, Times, _beaten, halved
from spectral_surgery.refining.cache import Cache
from spectral_surgery.refining.candidates import Candidate, references
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.refining.repeating import differences, options_of, recorded
from spectral_surgery.refining.scoring import Objective, Rows, Vector
from spectral_surgery.selection import Selection


@pytest.fixture(scope="module")
def live() -> Live:
    return Live(tiny.lora(tiny.llama()))


def rows(count: int, name: str) -> Rows:
    examples = [Example(f"{name} {i}", str(i), f"{name} {i // 2}", False, i) for i in range(count)]
    return Rows(examples, Tokenized([TokenizedExample((1, 5, 6), 1, row.digest) for row in examples], count))


def part(task: int, keep: int, name: str = "") -> Part:
    return Part(rows(task, f"task{name}"), rows(keep, f"keep{name}"), tuple("xyz"[i % 3] for i in range(keep)))


@dataclass
class Scale:
    """Scores by a table: how good each candidate is, told by the strength that is open; counts the rows."""

    live: Live
    table: dict[float, float]
    lower: bool
    name: str
    scored: list[tuple[float, int]] = field(default_factory=list)
    opened: list[float] = field(default_factory=lambda: [1.0])

    def objective(self) -> Objective:
        def score(live: Live, some: Rows) -> Vector:
            at = STRENGTH[-1]
            self.scored.append((at, len(some)))
            wiggle = np.array([int(row.digest[:4], 16) / 65535 for row in some.examples])
            return self.table[at] + 0.001 * wiggle

        return Objective(Measure(self.name, "units", lower_is_better=self.lower), score)


STRENGTH: list[float] = [1.0]


@pytest.fixture(autouse=True)
def opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the scorer know which candidate is open."""
    from contextlib import contextmanager

    @contextmanager
    def opened(self: Candidate, live: Live) -> Any:
        STRENGTH.append(0.0 if self.name == BASE else float(self.name.split()[-1]) if " " in self.name else 1.0)
        yield
        STRENGTH.pop()

    monkeypatch.setattr(Candidate, "open", opened)


def candidates(live: Live, strengths: list[float]) -> list[Candidate]:
    path = live.paths[0]
    return [*references(), *(Candidate(f"strength {s:g}", "strength", "", {path: np.full(4, s)}) for s in strengths)]


def bench(
    live: Live, folder: Path, task: dict[float, float], skills: dict[float, float]
) -> tuple[Bench, Scale, Scale]:
    one, other = Scale(live, task, False, "task"), Scale(live, skills, True, "drift")
    return Bench(live, one.objective(), other.objective(), Cache(folder, "here"), BatchOptions()), one, other


TASK = {0.0: 0.1, 1.0: 0.9, 0.9: 0.95, 0.8: 0.8, 0.7: 0.5, 0.6: 0.4, 0.5: 0.2}
DRIFT = {0.0: 0.0, 1.0: 2.0, 0.9: 1.0, 0.8: 0.5, 0.7: 1.5, 0.6: 1.8, 0.5: 1.9}
"""0.9 and 0.8 are on the edge; 0.7, 0.6 and 0.5 are worse in both than these."""


def test_clear_losers_are_dropped_early_and_what_is_always_wanted_stays(live: Live, tmp_path: Path) -> None:
    made, task, skills = bench(live, tmp_path, TASK, DRIFT)
    everything = candidates(live, [0.9, 0.8, 0.7, 0.6, 0.5])
    told: list[tuple[str, int, int]] = []
    found = halved(made, everything, [BASE, UNEDITED, "strength 0.5"], part(200, 160), lambda *at: told.append(at))
    assert set(found.names) == {BASE, UNEDITED, "strength 0.9", "strength 0.8", "strength 0.5"}
    assert found.dropped == {"strength 0.7": 32, "strength 0.6": 32}
    assert [size for at, size in task.scored if at == 0.7] == [32]
    assert [size for at, size in task.scored if at == 0.9] == [32, 43, 125]
    assert [size for at, size in skills.scored if at == 0.9] == [32, 28, 100]
    assert told[6] == ("trying", 7, 7)
    assert told[-1] == ("trying", 5, 5)


def test_only_a_lead_of_more_than_its_error_in_both_scores_is_clear() -> None:
    def right(count: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(np.repeat([0.0, 1.0], [100 - count, count]))

    scores = {
        "safe": Scores(right(90, 0), right(70, 1)),
        "bold": Scores(right(91, 2), right(90, 3)),
        "bold too": Scores(right(91, 2), right(90, 3)),
        "poor": Scores(right(50, 4), right(50, 5)),
    }
    exact, none = Measure("exact", "share", lower_is_better=False), RowSet((), (), ())
    found = _beaten(Split(exact, exact, none, none, scores))
    assert found.tolist() == [[False] * 4, [False] * 4, [False] * 4, [True, True, True, False]]
    loss = Measure("loss", "nats", lower_is_better=True)
    turned = {name: Scores(one.task, -one.skills) for name, one in scores.items()}
    assert _beaten(Split(exact, loss, none, none, turned)).tolist() == found.tolist()


def test_dropped_ones_are_dominated_and_the_edge_never_is_dropped(live: Live, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for trial in range(20):
        strengths = [round(float(s), 3) for s in rng.uniform(0.1, 0.9, 9)]
        task = {0.0: 0.1, 1.0: 0.9, **{s: float(rng.uniform()) for s in strengths}}
        drift = {0.0: 0.0, 1.0: 2.0, **{s: float(rng.uniform(0, 2)) for s in strengths}}
        made, _, _ = bench(live, tmp_path / str(trial), task, drift)
        found = halved(made, candidates(live, strengths), [BASE, UNEDITED], part(64, 64), None)
        better = {s: [o for o in task if task[o] > task[s] + 0.01 and drift[o] < drift[s] - 0.01] for s in strengths}
        for s in strengths:
            if f"strength {s:g}" in found.dropped:
                assert any(task[o] >= task[s] - 0.01 and drift[o] <= drift[s] + 0.01 for o in task if o != s)
        edge = [s for s in strengths if not better[s]]
        kept = {name for name in found.names if name.startswith("strength")}
        clear = [s for s in edge if not any(abs(task[s] - task[o]) < 0.01 for o in task if o != s)]
        assert {f"strength {s:g}" for s in clear} <= kept


@pytest.mark.parametrize(("task_rows", "keep_rows"), [(200, 160), (20, 20), (32, 33), (40, 20), (20, 100), (129, 131)])
def test_scores_in_two_parts_are_those_of_the_whole(
    live: Live, tmp_path: Path, task_rows: int, keep_rows: int
) -> None:
    made, _, _ = bench(live, tmp_path / "a", TASK, DRIFT)
    everything, whole = candidates(live, [0.9, 0.8, 0.7]), part(task_rows, keep_rows)
    found = halved(made, everything, [candidate.name for candidate in everything], whole, None)
    at_once, _, _ = bench(live, tmp_path / "b", TASK, DRIFT)
    for candidate in everything:
        wanted = at_once.scores(candidate, whole)
        np.testing.assert_array_equal(found.split.scores[candidate.name].task, wanted.task)
        np.testing.assert_array_equal(found.split.scores[candidate.name].skills, wanted.skills)
    assert len(found.split.task_rows) == task_rows
    assert found.split.skills_rows.categories == whole.categories


def test_a_candidate_is_scored_once_whatever_it_is_called(live: Live, tmp_path: Path) -> None:
    made, task, _ = bench(live, tmp_path, TASK, DRIFT)
    one, rows_here = candidates(live, [0.9])[-1], part(8, 8)
    first, second = made.scores(one, rows_here), made.scores(one, rows_here)
    np.testing.assert_array_equal(first.task, second.task)
    assert task.scored == [(0.9, 8)]
    made.scores(one, part(8, 8, "other"))
    made.scores(one, rows_here.at([1, 0, 2, 3, 4, 5, 6, 7], [0]))
    assert [size for _, size in task.scored] == [8, 8, 8]
    again, counted, _ = bench(live, tmp_path, TASK, DRIFT)
    again.scores(one, rows_here)
    assert counted.scored == []


def test_parts_of_rows() -> None:
    whole = part(7, 5)
    first = whole.first(3, 10)
    rest = whole.after(first)
    assert [len(side) for side in (first.task, first.keep, rest.task, rest.keep)] == [3, 5, 4, 0]
    together = first + rest
    assert together.task.examples == whole.task.examples
    assert together.categories == whole.categories
    assert together.task.tokenized.examples == whole.task.tokenized.examples
    assert together.keep.examples == whole.keep.examples
    picked = whole.at([6, 0], [4])
    assert [row.row for row in picked.task.examples] == [6, 0]
    assert picked.categories == (whole.categories[4],)
    assert [row.digest for row in picked.task.tokenized.examples] == [row.digest for row in picked.task.examples]


def test_times_add_up_also_where_something_fails() -> None:
    times = Times()
    for _ in range(2):
        with times.of("one"):
            time.sleep(0.01)
    with pytest.raises(KeyError), times.of("two"):
        raise KeyError
    assert set(times.spent) == {"one", "two"}
    assert times.spent["one"] >= 0.02
    assert times.total == sum(times.spent.values())


# -- remembering ------------------------------------------------------------------------------------------------------


def never() -> Any:
    raise AssertionError("worked out again")


def write(text: str, path: Path) -> None:
    path.write_text(text)


def test_what_is_remembered_is_bit_for_bit_what_was_worked_out(tmp_path: Path) -> None:
    cache, values = Cache(tmp_path / "new" / "cache", "context"), np.array([0.1, -0.0, 1e-320, np.pi])
    assert cache.array(("a", 1), lambda: values).tobytes() == values.tobytes()
    assert cache.array(("a", 1), never).tobytes() == values.tobytes()
    named = {"model.layers.0.q_proj": values, "b": np.arange(3)}
    assert list(cache.arrays(("b",), lambda: named)) == list(cache.arrays(("b",), never)) == list(named)
    plain = [["text ü", [1, 2], None]]
    assert cache.json(("c",), lambda: plain) == cache.json(("c",), never) == plain
    assert cache.file(("d",), ".txt", lambda: "content", write, Path.read_text) == "content"
    assert cache.file(("d",), ".txt", never, write, Path.read_text) == "content"
    assert not list(cache.folder.glob("new-*"))


def test_another_context_or_question_is_not_answered_from_it(tmp_path: Path) -> None:
    Cache(tmp_path, "context").array(("a", 1), lambda: np.zeros(2))
    for other, parts in (("other", ("a", 1)), ("context", ("a", 2)), ("context", ("a",)), ("context", ("a1",))):
        assert Cache(tmp_path, other).array(parts, lambda: np.ones(3)).sum() == 3
    assert Cache(tmp_path, "x").key("ab", "c") != Cache(tmp_path, "x").key("a", "bc")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    cache = Cache(tmp_path, "context")

    def half(text: str, new: Path) -> None:
        new.write_text(text[:3])
        raise failure

    with pytest.raises(failure):
        cache.file(("a",), ".txt", lambda: "whole", half, Path.read_text)
    assert list(tmp_path.iterdir()) == []
    assert cache.file(("a",), ".txt", lambda: "whole", write, Path.read_text) == "whole"


def test_a_killed_write_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, pathlib, signal
        from spectral_surgery.refining.cache import Cache

        def half(text, new):
            new.write_text(text[:3])
            os.kill(os.getpid(), signal.SIGKILL)

        Cache(pathlib.Path({str(tmp_path)!r}), "context").file(("a",), ".json", lambda: "whole", half, None)
        """
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert [path.read_text() for path in tmp_path.iterdir()] == ["who"]
    assert Cache(tmp_path, "context").json(("a",), lambda: {"whole": 1}) == {"whole": 1}
    assert Cache(tmp_path, "context").json(("a",), never) == {"whole": 1}


# -- repeating --------------------------------------------------------------------------------------------------------


def verdict() -> dict[str, Any]:
    row = {"name": "strength 0.8", "validation": {"task": {"mean": 0.5, "se": 0.1}}, "test": None, "stage": "winner"}
    return {
        "outcome": "refined", "sentence": "So.", "chain": [], "question_zero": {"better_than_base": True},
        "claims": [{"against": "random", "passed": True}], "random": {"p": 0.005}, "candidates": [row],
        "rows": {"test": 200}, "measures": {"task": {"margin": 0.02}}, "times": {"loading": 1.0},
        "environment": {"torch": "2"}, "created": "then", "adapter": {"digest": "d"}, "options": {"options": {}},
    }  # fmt: skip


def changed(*at: Any, to: Any) -> dict[str, Any]:
    found = copy.deepcopy(verdict())
    place = found
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = to
    return found


def test_times_versions_and_rounding_are_no_differences() -> None:
    assert differences(verdict(), verdict()) == []
    for same in (
        changed("times", "loading", to=9.0),
        changed("environment", "torch", to="3"),
        changed("created", to="now"),
        changed("candidates", 0, "validation", "task", "mean", to=0.5 + 1e-8),
    ):
        assert differences(verdict(), same) == []


@pytest.mark.parametrize(
    ("at", "to", "said"),
    [
        (("outcome",), "leave_alone", "outcome: refined then, leave_alone now"),
        (("candidates", 0, "validation", "task", "mean"), 0.501, "candidates.strength 0.8.validation.task.mean: 0.5"),
        (("candidates", 0, "stage"), "finalist", "stage: winner then, finalist now"),
        (("candidates", 0, "test"), {"task": 0.4}, "test"),
        (("claims", 0, "passed"), False, "claims.0.passed: True then, False now"),
        (("random",), None, "random.p: 0.005 then, None now"),
        (("rows", "test"), 201, "rows.test: 200 then, 201 now"),
        (("question_zero", "better_than_base"), 1.5, "better_than_base"),
    ],
)
def test_a_changed_figure_is_found_and_named(at: tuple[Any, ...], to: Any, said: str) -> None:
    found = differences(verdict(), changed(*at, to=to))
    assert any(said in line for line in found)
    assert len(found) <= 2
    assert differences(changed(*at, to=to), verdict())


def test_a_candidate_that_is_gone_is_found() -> None:
    assert any("strength 0.8" in line for line in differences(verdict(), changed("candidates", to=[])))


def test_the_options_of_a_recorded_run_come_back(tmp_path: Path) -> None:
    given = {
        "options": RefineOptions(may_lose="5%", also=("a", "b"), keep_category_column="kind"),
        "rows": DataOptions(examples=32, group_column="document"),
        "selection": Selection(("q_proj", "v_proj")),
        "model": ModelOptions(base_model="base", load_in_4bit=True),
        "batching": BatchOptions(batch_size=4),
    }
    plain = {name: vars(options) for name, options in given.items()}
    named = {"data": "unseen.jsonl", "train_data": None, "task_data": None}
    kept = {**verdict(), "options": {"adapter": "a", **named, **plain, "later": 1}}
    (tmp_path / "verdict.json").write_text(json.dumps(kept))
    assert options_of(recorded(tmp_path / "verdict.json")) == {**named, **given}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": null}', '{"options": {"options": {}}, "adapter": 1}'])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "verdict.json").write_text(text)
    with pytest.raises(InputError, match=r"is no verdict\.json of a refine run"):
        recorded(tmp_path / "verdict.json")
    with pytest.raises(InputError, match=r"is no verdict\.json"):
        recorded(tmp_path / "absent.json")
