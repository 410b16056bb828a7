"""A verdict as text and as figures, and how the report is written."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verdicts

from spectral_surgery import report
from spectral_surgery.errors import InputError, OutputError, RunError
from spectral_surgery.report import drawing, facts, figures, methods, modules, page, writing
from spectral_surgery.report.picture import along, picture, place


@pytest.fixture(scope="module")
def refined() -> dict[str, Any]:
    return verdicts.refined()


@pytest.mark.parametrize("name", verdicts.ALL)
def test_the_summary_fits_a_terminal_and_begins_with_what_to_do(name: str) -> None:
    verdict = verdicts.ALL[name]()
    lines = report.summary(verdict).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == facts.outcome(verdict).headline
    assert lines[2][:40] in facts.sentence(verdict)


def test_the_table_has_base_yours_strength_rival_and_refined_with_their_scores(refined: dict[str, Any]) -> None:
    shown = report.summary(refined)
    by_name = {c["name"]: c["test"] for c in refined["candidates"]}
    rows = {
        "base model, no adapter": "base",
        "your adapter": "unedited",
        "best strength: 0.6": "strength 0.6",
        "continue lr 1e-3": "continue lr 1e-3",
        "refined: few-step tuning 0.2": "few-step tuning 0.2",
    }
    found = [next(line for line in shown.splitlines() if line.startswith(label)) for label in rows]
    for line, name in zip(found, rows.values(), strict=True):
        for key in ("task", "skills"):
            mean, se = by_name[name][key]["mean"], by_name[name][key]["se"]
            ends = [max(mean - 1.96 * se, 0), min(mean + 1.96 * se, 1)]
            assert f"{100 * mean:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" in line
    assert [shown.index(line) for line in found] == sorted(shown.index(line) for line in found)


def test_of_three_prompts_one_is_a_broken_one(refined: dict[str, Any]) -> None:
    shown = report.summary(refined)
    assert shown.partition("fixed, other skills")[2].count("  refined   ") == 3
    assert "broken, task: Which is larger, 1006 or 1060?" in shown
    assert "Which is larger" not in report.summary(refined, examples=False)


def test_next_steps_are_commands_with_names_quoted(refined: dict[str, Any], tmp_path: Path) -> None:
    verdict = copy.deepcopy(refined)
    verdict["adapter"]["name"] = "my lora; rm -rf ~"
    (tmp_path / "adapter").mkdir()
    shown = report.summary(verdict, tmp_path)
    assert f"spectral-surgery inspect 'my lora; rm -rf ~' {tmp_path / 'adapter'} --html" in shown
    assert f"spectral-surgery restore {tmp_path / 'adapter'}" in shown
    assert "report.html" not in shown
    left = report.summary(verdicts.leave_alone(), tmp_path)
    assert "restore" not in left


def test_what_a_terminal_would_obey_is_spelt_out(refined: dict[str, Any]) -> None:
    verdict = copy.deepcopy(refined)
    verdict["examples"][1]["unedited"] = "\x1b]0;title\x07\u202eabc\r\nnext"
    verdict["notes"] = ["\x1b[2Jgone"]
    shown = report.summary(verdict)
    assert "\\u001b]0;title\\u0007\\u202eabc next" in shown
    assert "\\u001b[2Jgone" in shown
    assert not any(ord(c) < 32 and c != "\n" for c in shown)


def test_what_languages_need_stays_visible() -> None:
    kept = "naïve 日本語 मे\u200dरा 👩\u200d🔬\tend\n"
    assert facts.visible(kept) == kept


def test_a_recovered_share_is_only_told_where_something_clear_was_lost(refined: dict[str, Any]) -> None:
    means = {c["family"]: c["test"]["skills"]["mean"] for c in refined["candidates"] if c["stage"] == "winner"}
    by_name = {c["name"]: c["test"]["skills"]["mean"] for c in refined["candidates"] if c["test"]}
    share = (means["descend"] - by_name["unedited"]) / (by_name["base"] - by_name["unedited"])
    assert facts.recovered(refined) == pytest.approx(share)
    unclear = copy.deepcopy(refined)
    unclear["question_zero"]["skills"]["high"] = 0.01
    assert facts.recovered(unclear) is None
    assert facts.recovered(verdicts.leave_alone()) is None


def test_continued_training_that_won_is_no_refined_adapter(refined: dict[str, Any]) -> None:
    verdict = copy.deepcopy(refined)
    for candidate in verdict["candidates"]:
        candidate["stage"] = {"winner": "confirmed", "rival": "winner"}.get(candidate["stage"], candidate["stage"])
    verdict["candidates"][5]["stage"] = "validation"
    verdict |= {"outcome": "leave_alone", "gates": None, "edit": None}
    assert facts.outcome(verdict).headline == "Leave it alone and continue training"
    assert [one.role for one in facts.standings(verdict)] == ["base", "yours", "strength", "rival"]


def test_limits_that_rows_cannot_set_are_shown_as_unknown() -> None:
    unit = facts.Unit("loss", "nats per token", percent=False, lower_is_better=True)
    assert unit.gain({"estimate": 0.5, "low": None, "high": None}) == "+0.500 [?, ?]"
    assert unit.gain({"estimate": -0.0001, "low": -0.25, "high": 0.0}) == "+0.000 [-0.250, 0.000]"


def test_the_methods_paragraph_has_the_numbers_of_the_run_and_cites(refined: dict[str, Any]) -> None:
    shown = methods.paragraph(refined)
    for words in (
        "rank 16, 42 modules, 672 components",
        "14 candidates, 6 of them plain strengths, were compared on 800 task rows",
        "4 finalists",
        "changes 471 of 672 components, relative size of the edit 0.213",
        "199 permutations",
        "arXiv 2603.03995",
        "Tango",
    ):
        assert words in shown
    assert "Tango" not in methods.paragraph(verdicts.not_better())
    assert "not tested" in methods.paragraph(verdicts.seen_rows())


@pytest.mark.parametrize("name", verdicts.ALL)
def test_better_is_always_right_and_up(name: str) -> None:
    drawn = picture(verdicts.ALL[name]())
    assert drawn is not None
    for axis, unit in enumerate(drawn.units):
        low, high = sorted(drawn.spans[axis])
        better, worse = (low, high) if unit.lower_is_better else (high, low)
        assert (drawn.share(axis, better), drawn.share(axis, worse)) == pytest.approx((1, 0))
        assert all(0 < drawn.share(axis, point.at[axis]) < 1 for point in drawn.points)
        assert len(drawn.ticks(axis)) >= 3


def test_the_curve_runs_from_the_base_over_the_strengths_to_the_adapter(refined: dict[str, Any]) -> None:
    drawn = picture(refined)
    assert drawn is not None
    assert [strength for strength, _ in drawn.curve] == [0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert drawn.curve_rows == "validation"
    validation = {c["name"]: c["validation"] for c in refined["candidates"]}
    assert drawn.curve[2][1] == tuple(validation["strength 0.6"][key]["mean"] for key in ("task", "skills"))
    yours = next(c["test"]["task"]["mean"] for c in refined["candidates"] if c["name"] == "unedited")
    assert drawn.limit == pytest.approx(yours - refined["measures"]["task"]["margin"])


def test_a_base_far_away_is_drawn_at_the_edge_with_its_value() -> None:
    verdict = copy.deepcopy(verdicts.not_better())
    near, base = picture(verdict), next(c for c in verdict["candidates"] if c["name"] == "base")
    assert near is not None
    assert near.points[0].label == "base model"
    base["test"]["task"]["mean"] = 12.573
    far = picture(verdict)
    assert far is not None
    assert far.points[0].label == "← base model at 12.573"
    assert "12.573" in far.points[0].tip
    assert far.share(0, far.points[0].at[0]) == pytest.approx(0.025)
    assert max(far.spans[0]) < 2
    assert all(min(far.spans[0]) <= at[0] <= max(far.spans[0]) for _, at in far.curve)


def test_labels_keep_clear_of_each_other_of_points_and_of_the_edge() -> None:
    rng = np.random.default_rng(0)
    bounds = (0.0, 0.0, 400.0, 300.0)
    for _ in range(20):
        anchors = [(float(x), float(y)) for x, y in rng.uniform((60, 60), (340, 240), (6, 2))]
        marks = [(x - 6, y - 6, 12.0, 12.0) for x, y in anchors]
        boxes = place(anchors, [(70.0, 14.0)] * 6, marks, bounds, gap=10.0)
        for a, b in itertools.combinations([*boxes, *marks], 2):
            if a in boxes or b in boxes:
                wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
                high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
                assert max(min(wide, 70.0), 0) * max(min(high, 14.0), 0) <= 30
        assert all(x >= 0 and y >= 0 and x + w <= 400 and y + h <= 300 for x, y, w, h in boxes)


def test_boxes_along_a_line_leave_no_gap() -> None:
    boxes = along([(0.0, 0.0), (100.0, 0.0)], 6.0)
    assert all(b[0] <= a[0] + a[2] for a, b in itertools.pairwise(boxes))
    assert (boxes[0][0], boxes[-1][0]) == (-3, 97)


def test_gates_are_placed_by_layer_and_kind_with_one_in_the_middle(refined: dict[str, Any]) -> None:
    found = modules.gate_map(refined)
    assert found is not None
    assert found.kinds == list(verdicts.KINDS)
    assert found.rows == ["0", "1", "2", "3", "4", "5"]
    assert found.cells[(3, "o_proj")]["module"] == "model.layers.3.self_attn.o_proj"
    assert found.share(1.0) == 0.5
    gates = [found.share(gate) for module in refined["gates"] for gate in module["gates"]]
    assert (min(gates) == 0) or (max(gates) == 1)
    assert 0 <= min(gates) <= max(gates) <= 1


def test_several_modules_of_a_kind_in_a_layer_have_a_row_each() -> None:
    experts = [
        {"module": f"layers.0.experts.{i}.up_proj", "layer": 0, "kind": "up_proj", "gates": [0.5 + i, 1.0],
         "S": [2.0, 1.0], "S_edited": [1.0 + 2 * i, 1.0]}
        for i in range(2)
    ]  # fmt: skip
    found = modules.gate_map({"gates": experts})
    assert found is not None
    assert found.rows == ["0", "0"]
    assert [found.cells[(i, "up_proj")]["module"] for i in (0, 1)] == [one["module"] for one in experts]


def test_spectra_are_relative_to_the_largest_of_their_kind(refined: dict[str, Any]) -> None:
    found = {one.kind: one for one in modules.spectra(refined)}["v_proj"]
    chosen = [module for module in refined["gates"] if module["kind"] == "v_proj"]
    top = max(module["S"][0] for module in chosen)
    np.testing.assert_allclose(found.before[2], np.array(chosen[2]["S"]) / top)
    np.testing.assert_allclose(found.after[5], np.maximum(np.array(chosen[5]["S_edited"]) / top, 1e-3))


def test_figures_show_the_verdict_s_points_and_gates(refined: dict[str, Any]) -> None:
    figure = figures.tradeoff(refined)
    assert figure is not None
    axis = figure.axes[0]
    points = {tuple(np.ravel(line.get_xydata())) for line in axis.lines if len(line.get_xdata()) == 1}
    winner = next(c["test"] for c in refined["candidates"] if c["stage"] == "winner")
    assert (winner["task"]["mean"], winner["skills"]["mean"]) in points
    assert {text.get_text() for text in axis.texts} >= {"refined", "your adapter", "base model", "strength 0.6"}
    heat = figures.gates(refined)
    assert heat is not None
    image = np.asarray(heat.axes[0].images[0].get_array())
    np.testing.assert_allclose(image[4], next(m for m in refined["gates"] if m["layer"] == 4)["gates"])


def test_figure_texts_are_at_least_seven_points(refined: dict[str, Any]) -> None:
    import matplotlib

    with matplotlib.rc_context(figures.STYLE):
        for draw in (figures.tradeoff, figures.gates, figures.spectra):
            figure = draw(refined)
            assert figure is not None
            figure.draw_without_rendering()
            shown = figure.findobj(lambda artist: hasattr(artist, "get_fontsize") and artist.get_text())
            assert min(text.get_fontsize() for text in shown) >= 7


def test_pictures_are_told_apart_without_colour(refined: dict[str, Any]) -> None:
    drawn = picture(refined)
    assert drawn is not None
    svg = drawing.tradeoff(drawn, 640, 420)
    greys = []
    for ink in (drawing.INKS[role] for role in ("yours", "strength")):
        red, green, blue = (int(ink[i : i + 2], 16) for i in (1, 3, 5))
        greys.append(0.3 * red + 0.59 * green + 0.11 * blue)
    assert abs(greys[0] - greys[1]) > 50
    assert all(f">{point.label}</text>" in svg for point in drawn.points)


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, refined: dict[str, Any]) -> None:
    assert report.unavailable() is None
    monkeypatch.setattr(writing, "find_spec", lambda name: None if name == "jinja2" else object())
    line = report.unavailable()
    assert line is not None
    assert "jinja2 not installed" in line
    assert "pip install 'spectral-surgery[report]'" in line
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"needs jinja2.*\[report\]"):
        page.render(refined)
    assert report.summary(refined).startswith("Use the refined adapter")


def test_files_of_others_are_never_overwritten(tmp_path: Path) -> None:
    verdict = verdicts.not_better()
    (tmp_path / "report.html").write_text("<!doctype html>mine")
    with pytest.raises(OutputError, match="no report of ours"):
        report.write_report(verdict, tmp_path)
    (tmp_path / "report.html").unlink()
    (tmp_path / "figures").mkdir()
    with pytest.raises(OutputError, match="not of a report of ours"):
        report.write_report(verdict, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "figures"]


def test_a_failure_in_the_middle_leaves_the_earlier_report_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write_report(verdicts.not_better(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "replace", full)
    with pytest.raises(RunError, match="No space left"):
        report.write_report(verdicts.leave_alone(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
