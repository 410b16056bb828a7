"""Tables and figures of a run file: what is fixed, what varies, and how it is written."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_surgery.cli import main
from spectral_surgery.errors import DataError
from spectral_surgery.results.comparisons import Setting, gain, guided_and_random, reward_and_risk, usual
from spectral_surgery.results.published import published_runs
from spectral_surgery.results.runs import UNEDITED, Run, Score, distinct, read_runs
from spectral_surgery.results.summary import View, differences_table, tables
from spectral_surgery.results.writing import Table, write


def run(policy: str, value: float, **values: object) -> Run:
    scores = {
        str(values.pop("task", "rows")): Score(value=value, examples=40, difference=0.1, low=-0.1, high=0.3, p=0.2)
    }
    told = {"key": f"{policy}{values}{scores}", "name": "mine", "rows": 64, "energy": "none", "modules": "all"}
    return Run(**{**told, **values}, policy=policy, scores=scores)  # type: ignore[arg-type]


def unedited(value: float, **values: object) -> Run:
    return run(UNEDITED, value, rows=None, energy=None, modules=None, **values)


SETTING = Setting(64, "none", "all")


def test_a_run_comes_back_from_its_line(tmp_path: Path) -> None:
    runs = [unedited(0.5), run("scale:strength=0.5", 0.25)]
    (tmp_path / "runs.jsonl").write_text("".join(one.line() for one in runs))
    assert read_runs(tmp_path) == runs


def test_a_line_that_was_being_written_is_left_out_and_another_broken_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    line = unedited(0.5).line()
    path.write_text(line + line[:30])
    assert read_runs(path) == [unedited(0.5)]
    path.write_text(line + line[:30] + "\n" + line)
    with pytest.raises(DataError, match="line 2 is not a run"):
        read_runs(path)
    path.write_text('{"key": "k", "name": "n", "policy": "p", "rows": "many", "scores": {}}\n')
    with pytest.raises(DataError, match="line 1 is not a run"):
        read_runs(path)


def test_the_unedited_adapter_of_a_sweep_is_scored_once_and_held_against_every_setting() -> None:
    runs = [unedited(0.5), run("flat", 0.75), run("flat", 0.25, energy="nuclear")]
    assert gain(runs, ("mine", "rows"), "flat", SETTING) == 0.25
    assert gain(runs, ("mine", "rows"), "flat", Setting(64, "nuclear", "all")) == -0.25
    assert gain(runs, ("mine", "rows"), "scale", SETTING) is None


def test_seeds_are_averaged() -> None:
    runs = [unedited(0.5), run("random_index", 0.25, seed=0), run("random_index", 0.5, seed=1)]
    assert gain(runs, ("mine", "rows"), "random_index", SETTING) == -0.125


def test_the_setting_of_most_runs_is_shown_unless_the_paper_s_was_run() -> None:
    runs = [unedited(0.5), run("flat", 0.5), run("scale", 0.5), run("flat", 0.5, energy="nuclear")]
    assert usual(runs) == SETTING
    assert usual([*runs, run("flat", 0.5, rows=128, energy="nuclear", modules="residual")]) == Setting()


def test_a_gain_in_the_task_of_risk_is_no_risk_and_a_missing_task_gives_no_point() -> None:
    both = [unedited(0.5, task=task) for task in ("A", "IFEval")]
    better = [run("flat", 0.75, task="A"), run("flat", 0.75, task="IFEval")]
    (point,) = reward_and_risk([*both, *better], SETTING)
    assert (point.x, point.y) == (0.25, 0)
    assert reward_and_risk([*both, better[0]], SETTING) == []
    assert guided_and_random([*both, *better], SETTING, "flat", "random_index") == []


def test_a_table_for_every_axis_that_varies_and_intervals_where_they_are_known() -> None:
    runs = [unedited(0.5), run("grad_direction", 0.6), run("grad_direction", 0.7, rows=32)]
    titles = [found.title for found in tables(runs)]
    assert titles == ["Policies", "Measuring rows", "Differences"]
    row = differences_table(runs).rows[1]
    assert list(row[:3]) == ["mine", "rows", "grad_direction"]
    assert list(row[-5:]) == ["0.6000", "+0.1000", "[-0.1000, +0.3000]", "0.2", "40"]


def test_the_last_run_of_a_key_counts() -> None:
    first, again = unedited(0.5, key="one"), unedited(0.6, key="one")
    assert distinct([first, again]) == [again]


TABLE = Table("A & b", ["name", "task", "x_1"], [["a|b", "50 %", "0.5"]], "A note.")


def test_four_formats() -> None:
    assert "a|b   50 %  0.5" in write([TABLE], "text")
    assert "| a\\|b | 50 % | 0.5 |" in write([TABLE], "markdown")
    assert r"a|b & 50 \% & 0.5 \\" in write([TABLE], "latex")
    assert r"\caption{A \& b. A note.}" in write([TABLE], "latex")
    rows = list(csv.reader(io.StringIO(write([TABLE], "csv"))))
    assert rows == [["table", "name", "task", "x_1"], ["A & b", "a|b", "50 %", "0.5"]]


def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, figures = tmp_path / "table.tex", tmp_path / "figures"
    told = ["report", "--published", "--format", "latex", "--output", str(out), "--figures", str(figures)]
    assert main([*told, "--figure-format", "svg"]) == 0
    assert "Llama-3.1-8B & IFEval & 0.305 & 0.306 & 0.312 & 0.321 & 0.223" in out.read_text()
    assert sorted(path.stem for path in figures.iterdir()) == [
        "energy",
        "guided-and-random",
        "measuring-rows",
        "modules",
        "reward-and-risk",
    ]
    assert main(told) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_neither_or_both_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert main(["report", str(tmp_path), "--published"]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_figures_of_runs_that_vary_nothing_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from spectral_surgery.results.drawing import save

    some = [
        one for one in published_runs() if one.rows == 128 and one.modules == "residual" and one.energy == "nuclear"
    ]
    paths = save(some, tmp_path, "svg", View())
    assert [path.stem for path in paths] == ["guided-and-random", "reward-and-risk"]


def test_tables_need_neither_torch_nor_matplotlib() -> None:
    program = (
        "import sys; from spectral_surgery.results.summary import paper_tables; paper_tables(); "
        "sys.exit(bool({'torch', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
