"""The paper in miniature: intervals over seeds and examples, verdicts read off them, a run killed and resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spectral_surgery.errors import InputError, OutputError
from spectral_surgery.miniature import drawing, experiment, families, page
from spectral_surgery.miniature.effects import AS_TRAINED, BASE_MODEL, Edit, Effect, Scores, crossed, mean
from spectral_surgery.miniature.experiment import MiniatureOptions, Part
from spectral_surgery.miniature.findings import FINDINGS, Cells, judge, judged, matched, weakened
from spectral_surgery.statistics import Interval

CELLS = Cells()
SEEDS, EXAMPLES = 3, 400


def every_edit() -> list[Edit]:
    """Every cell that a study of the usual size has."""
    options = MiniatureOptions()
    found = [BASE_MODEL]
    for item in experiment.items(options, experiment.study(options, Part("forms", 0))):
        edit = Edit(item.policy, item.rows, item.energy, item.modules, item.adapter.name == experiment.OWN)
        found += [edit] if edit.policy not in ("base", "unedited") else []
    return [BASE_MODEL, AS_TRAINED, *dict.fromkeys(found[1:])]


def made_up(shares: Mapping[tuple[str, Edit], float], usual: float = 0.7) -> Scores:
    """Scores in which a cell answers the first part of the examples right, in a shuffled order."""
    order = np.random.default_rng(0).permutation(EXAMPLES)
    cells = {}
    for family in families.FAMILIES:
        for edit in every_edit():
            right = order < EXAMPLES * shares.get((family, edit), usual)
            cells[family, edit] = np.tile(right.astype(float), (SEEDS, 1))
    return Scores(cells)


def verdicts(scores: Scores) -> dict[str, str]:
    return {one.finding.claim: one.verdict for one in judge(scores, CELLS)}


def test_every_edit_that_findings_and_tables_speak_of_is_run() -> None:
    edits = every_edit()
    assert len(edits) == 17
    assert {matched(CELLS), weakened("0.75"), weakened("0.5"), CELLS.guided(own=True)} <= set(edits)
    found = page.tables(made_up({}), CELLS, MiniatureOptions())
    assert [len(table.rows) for table in found] == [6, 4, 7, 6, 7]
    assert all(all(row) for table in found for row in table.rows)


@pytest.mark.parametrize(
    ("kind", "low", "high", "expected"),
    [
        ("more", 0.01, 0.3, "holds"),
        ("more", -0.3, -0.01, "does not hold"),
        ("more", -0.3, 0.019, "does not hold"),
        ("more", -0.01, 0.3, "cannot be told"),
        ("same", -0.019, 0.019, "holds"),
        ("same", 0.02, 0.3, "does not hold"),
        ("same", -0.3, -0.02, "does not hold"),
        ("same", -0.01, 0.3, "cannot be told"),
        ("more", -math.inf, math.inf, "cannot be told"),
    ],
)
def test_a_verdict_is_read_off_the_interval(kind: str, low: float, high: float, expected: str) -> None:
    assert judged(kind, Interval((low + high) / 2, low, high), 0.02) == expected  # type: ignore[arg-type]


def test_where_nothing_changes_only_the_claims_of_no_difference_hold() -> None:
    found = {one.finding.claim: (one.finding.kind, one.verdict) for one in judge(made_up({}), CELLS)}
    assert len(found) == len(FINDINGS)
    assert set(found.values()) == {("same", "holds"), ("more", "does not hold")}


def test_what_is_put_in_is_found_and_its_opposite_is_not() -> None:
    ruined = {("forms", CELLS.guided()): 0.4, ("forms", CELLS.guided(energy="none")): 0.1}
    found = verdicts(made_up(ruined | {("choices", CELLS.guided()): 0.8}))
    assert found["grad_direction makes the choice task's adapter better."] == "holds"
    assert found["grad_direction makes the strict-format task's adapter worse."] == "holds"
    assert found["Without its nuclear norm kept, grad_direction ruins the strict-format task."] == "holds"
    better = verdicts(made_up({("forms", CELLS.guided()): 0.9}))
    assert better["grad_direction makes the strict-format task's adapter worse."] == "does not hold"
    assert better["On the strict-format task the number of measuring rows does not matter."] == "holds"
    varied = verdicts(made_up({("forms", CELLS.guided(rows=256)): 0.9}))
    assert varied["On the strict-format task the number of measuring rows does not matter."] == "does not hold"


def test_a_best_policy_that_is_luck_is_not_found_to_be_better() -> None:
    scores, rng = made_up({}), np.random.default_rng(1)
    cells = {cell: (rng.random(values.shape) < 0.5).astype(float) for cell, values in scores.cells.items()}
    claim = "Of the four policies, the best for a task makes its adapter better."
    assert verdicts(Scores(cells))[claim] != "holds"


def test_intervals_cover_where_seeds_and_examples_both_vary() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        seeds, examples = rng.normal(0, 0.03, (3, 1)), rng.normal(0, 0.3, (1, 100))
        found = crossed(0.1 + seeds + examples + rng.normal(0, 0.3, (3, 100))).interval()
        covered += found.low <= 0.1 <= found.high
    assert covered >= 0.93 * 400


def test_one_seed_has_no_interval_and_no_change_is_no_certainty() -> None:
    assert crossed(np.ones((1, 50))).interval().high == math.inf
    unchanged = crossed(np.zeros((3, 50))).interval()
    assert -0.1 < unchanged.low < 0 < unchanged.high < 0.1
    together = mean([Effect(0.2, ((0.01, 2.0),)), Effect(0.4, ((0.01, 2.0),))])
    assert together.value == pytest.approx(0.3)
    assert together.parts == ((0.0025, 2), (0.0025, 2))


def test_the_page_says_what_the_verdicts_say_and_the_figures_are_drawn(tmp_path: Path) -> None:
    scores = made_up({("forms", CELLS.guided()): 0.4})
    found = judge(scores, CELLS)
    text = page.page(scores, found, MiniatureOptions())
    sections = {title: text.partition(f"### {title}\n")[2].partition("\n#")[0] for title in page.VERDICTS.values()}
    for one in found:
        line = next(line for line in sections[page.VERDICTS[one.verdict]].splitlines() if one.finding.claim in line)
        assert page.interval_text(one.interval) in line
    assert "took 12 minutes with 2 processes" in page.page(scores, found, MiniatureOptions(), 700.0)
    assert "took" not in text
    for made in (drawing.guided_figure, drawing.risk_figure, drawing.rows_figure):
        made(scores, CELLS).savefig(tmp_path / "figure.svg")


def test_the_page_in_the_documentation_is_of_these_findings_and_sizes() -> None:
    text = (Path(__file__).parents[1] / "docs" / "miniature.md").read_text(encoding="utf-8")
    assert [one.claim for one in FINDINGS if one.claim not in text] == []
    for name in families.FAMILIES:
        assert f"| {MiniatureOptions().learnt(name)} |" in next(
            line for line in text.splitlines() if f"| {name} |" in line
        )
    assert f"on {MiniatureOptions().test_rows} rows" in " ".join(text.split())


@pytest.mark.parametrize("name", families.FAMILIES)
def test_rows_are_right_and_in_the_text_that_they_are_scored_with(name: str) -> None:
    found = families.rows(name, 60, 0)
    assert found[:20] == families.rows(name, 20, 0)
    assert len({families.pair(row)["prompt"] for row in found}) == 60
    for row in found:
        words = families.pair(row)["prompt"].rstrip(":").split()
        if name == "sums":
            first, second = map(int, row["answer"].split())
            assert (first, second) == (sum(map(int, words[1:])), first % 10)
        elif name == "choices":
            right = {"max": max, "min": min}[row["question"]](row["choices"], key=int)
            assert row["choices"][families.LETTERS.index(row["answer"])] == right
            assert families.pair(row)["prompt"].endswith(f"B. {row['choices'][1]}\nAnswer:")
        elif name == "programs":
            assert row["answer"] == families.OPERATIONS[words[0]](words[1]).upper()
        else:
            assert row["answer"] == families.FORMS[words[0]].format(words[1])


def tiny(folder: Path) -> MiniatureOptions:
    return MiniatureOptions(
        output=folder,
        seeds=(0,),
        train_rows=16,
        test_rows=4,
        measuring_rows=(2, 4),
        usual_rows=4,
        max_steps=1,
        workers=1,
    )


def test_wrong_sizes_and_other_folders_are_refused(tmp_path: Path) -> None:
    good = tiny(tmp_path / "new")
    for changed in ({"seeds": ()}, {"seeds": (1, 1)}, {"usual_rows": 3}, {"workers": 0}, {"train_rows": 3}):
        with pytest.raises(InputError):
            experiment.check(replace(good, **changed))
    experiment.begin(good)
    experiment.begin(good)
    with pytest.raises(OutputError, match="another size"):
        experiment.begin(replace(good, test_rows=5))
    with pytest.raises(OutputError, match="not the folder of a miniature"):
        experiment.begin(replace(good, output=tmp_path))


@pytest.mark.slow
def test_killed_half_way_and_resumed_the_miniature_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="the extra train is not installed")
    pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")
    from spectral_surgery.miniature import entry
    from spectral_surgery.results.runs import read_runs
    from spectral_surgery.sweeping import bench

    options = tiny(tmp_path / "miniature")
    experiment.begin(options)
    first = options.parts()[0]
    original, scored = bench.score, []

    def stopping(*arguments: object, **named: object) -> object:
        scored.append(arguments)
        if len(scored) == 5:
            raise KeyboardInterrupt
        return original(*arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(bench, "score", stopping)
        with pytest.raises(KeyboardInterrupt):
            experiment.run_part(options, first)
    done = read_runs(first.folder(options) / "study")
    assert len(done) == 4
    weights = first.folder(options) / "adapter" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns

    found = entry.miniature(options)
    assert found.seconds is None  # it was there in part
    assert weights.stat().st_mtime_ns == before
    assert read_runs(first.folder(options) / "study")[:4] == done
    assert {one.verdict for one in found.judged if one.finding.source != "Figure 1"} == {"cannot be told"}
    assert (options.output / entry.PAGE).read_text().startswith("# The paper in miniature")
    assert len(list((options.output / entry.IMAGES).iterdir())) == 4
