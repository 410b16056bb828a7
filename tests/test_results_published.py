"""The published results: what comes out is what the paper prints, digit by digit, and what its own file says of noise.

Expected figures are typed from the paper's tables and figures, not read from the file that is shipped.
"""

from __future__ import annotations

import pytest

from spectral_surgery.results.comparisons import PAPER, along, best, cells, guided_and_random, noise, reward_and_risk
from spectral_surgery.results.published import MODELS, POLICIES, published_runs
from spectral_surgery.results.summary import Table, View, paper_tables, risk_table

LLAMA, QWEN = MODELS

TABLE_2 = """
Llama-3.1-8B GSM8K .657 .661 .668 .659 .614
Llama-3.1-8B HumanEval .488 .488 .494 .488 .476
Llama-3.1-8B IFEval .305 .306 .312 .321 .223
Llama-3.1-8B CSQA .740 .743 .735 .736 .784
Qwen3-8B GSM8K .815 .810 .802 .805 .816
Qwen3-8B HumanEval .488 .494 .506 .506 .512
Qwen3-8B IFEval .590 .597 .552 .535 .173
Qwen3-8B CSQA .855 .852 .851 .852 .853
"""
TABLE_4 = """
Llama-3.1-8B CSQA grad_direction .785 .782 .784 .783
Llama-3.1-8B CSQA random_index .742 .740 .743 .740
Qwen3-8B IFEval grad_direction .179 .181 .173 .169
Qwen3-8B IFEval random_index .603 .598 .597 .604
"""
TABLE_5 = """
Llama-3.1-8B CSQA grad_direction .740 .744 .790 .784
Llama-3.1-8B GSM8K grad_direction .657 .637 .538 .614
Qwen3-8B HumanEval grad_direction .488 .512 .524 .512
Qwen3-8B IFEval grad_direction .590 .499 .071 .173
"""
FIGURE_3 = {
    (LLAMA, "GSM8K"): (0.004, -0.043),
    (LLAMA, "HumanEval"): (0, -0.012),
    (LLAMA, "IFEval"): (0.001, -0.082),
    (LLAMA, "CSQA"): (0.003, 0.044),
    (QWEN, "GSM8K"): (-0.005, 0.001),
    (QWEN, "HumanEval"): (0.006, 0.024),
    (QWEN, "IFEval"): (0.007, -0.417),
    (QWEN, "CSQA"): (-0.003, -0.002),
}
FIGURE_4 = {
    (LLAMA, "abs_select"): (-0.0007, 0),
    (LLAMA, "smooth_abs"): (0.0040, 0),
    (LLAMA, "random_index"): (0.0023, 0),
    (LLAMA, "grad_direction"): (-0.0037, 0.082),
    (QWEN, "abs_select"): (0.0017, 0.055),
    (QWEN, "smooth_abs"): (0.0003, 0.038),
    (QWEN, "random_index"): (-0.0007, 0),
    (QWEN, "grad_direction"): (0.0077, 0.417),
}
NOISE = {
    (LLAMA, "GSM8K"): (0.655, 0.668, 0.6607, 0.0043),
    (LLAMA, "HumanEval"): (0.482, 0.506, 0.4945, 0.0073),
    (LLAMA, "IFEval"): (0.303, 0.317, 0.3112, 0.0046),
    (QWEN, "GSM8K"): (0.805, 0.819, 0.8104, 0.0054),
    (QWEN, "HumanEval"): (0.476, 0.494, 0.4836, 0.0066),
    (QWEN, "IFEval"): (0.582, 0.594, 0.5872, 0.0043),
    (QWEN, "CSQA"): (0.848, 0.855, 0.8515, 0.0023),
}


def table(title: str) -> Table:
    return next(found for found in paper_tables() if found.title.startswith(title))


def typed(text: str) -> list[list[str]]:
    return [[f"0{word}" if word[0] == "." else word for word in line.split()] for line in text.split("\n") if line]


def test_table_2_is_the_paper_s() -> None:
    found = table("Table 2")
    assert list(found.header) == ["adapter", "task", "unedited", *POLICIES]
    assert [list(row) for row in found.rows] == typed(TABLE_2)


def test_the_best_policy_improves_seven_of_eight_cells() -> None:
    found = best(published_runs(), PAPER)
    assert [one.cell for one in found if one.gain <= 0] == [(QWEN, "CSQA")]
    assert len(found) == 8
    assert "in 7 of 8 cells" in table("Table 2").note


def test_table_4_is_the_paper_s() -> None:
    found = table("Table 4")
    assert list(found.header)[4:] == ["32", "64", "128", "256"]
    assert [[*row[:3], *row[4:]] for row in found.rows] == typed(TABLE_4)


def test_table_5_is_the_paper_s() -> None:
    found = table("Table 5")
    assert list(found.header)[3:] == ["unedited", "attention-inputs", "all", "residual"]
    assert [list(row) for row in found.rows] == typed(TABLE_5)


def test_table_3_is_like_for_like_and_says_where_the_paper_s_other_figures_come_from() -> None:
    assert [list(row)[3:] for row in table("Table 3").rows] == [
        ["0.740", "0.784", "0.782"],
        ["0.590", "0.173", "0.014"],
    ]
    mixed = View().setting.__class__(32, "none", "residual")
    runs = published_runs()
    assert along(runs, (LLAMA, "CSQA"), "grad_direction", "energy", mixed)[1] == 0.785
    assert along(runs, (QWEN, "IFEval"), "grad_direction", "energy", mixed)[1] == 0.017


def test_the_points_of_figure_3_are_the_paper_s() -> None:
    points = guided_and_random(published_runs(), PAPER, "grad_direction", "random_index")
    assert {(point.label, point.mark): (point.x, point.y) for point in points} == FIGURE_3


def test_the_points_of_figure_4_are_the_paper_s() -> None:
    points = reward_and_risk(published_runs(), PAPER)
    assert {(point.label, point.mark): (round(point.x, 4), point.y) for point in points} == FIGURE_4
    assert [row[3] for row in risk_table(published_runs(), View()).rows if row[1] == "grad_direction"] == [
        "0.082",
        "0.417",
    ]


def test_the_unedited_model_was_scored_eleven_times_with_this_spread() -> None:
    found = {one.cell: one for one in noise(published_runs())}
    assert {one.times for one in found.values()} == {11}
    assert {cell: (one.low, one.high, round(one.mean, 4), round(one.deviation, 4)) for cell, one in found.items()} == {
        **NOISE,
        (LLAMA, "CSQA"): (0.740, 0.742, 0.7406, 0.0008),
    }


def test_four_of_the_seven_gains_are_beyond_what_the_same_weights_scored() -> None:
    rows = table("Noise").rows
    assert [tuple(row[:2]) for row in rows if row[-1] == "yes"] == [
        (LLAMA, "IFEval"),
        (LLAMA, "CSQA"),
        (QWEN, "HumanEval"),
        (QWEN, "IFEval"),
    ]


@pytest.mark.parametrize(("task", "value"), [("HumanEval", 0.567), ("CSQA", 0.851)])
def test_the_module_set_that_no_table_reports_is_there(task: str, value: float) -> None:
    levels = along(published_runs(), (QWEN, task), "grad_direction", "modules", PAPER)
    assert value in levels


def test_the_file_is_whole() -> None:
    runs = published_runs()
    assert len(runs) == 88 * 5
    assert len({run.key for run in runs}) == len(runs)
    assert len(cells(runs)) == 8
