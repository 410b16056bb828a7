"""Comparing two runs from their files: lm-evaluation-harness's folders, and records of spectral-surgery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from spectral_surgery import compare
from spectral_surgery.cli import main
from spectral_surgery.errors import DataError
from spectral_surgery.evaluating.records import Record, write_records

A, B = [1, 1, 0, 0, 1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 1, 1, 0, 1, 1]


DATE = "2026-11-22T10-00-00.1"


def logged(folder: Path, values: list[int], *, task: str = "gsm8k", date: str = DATE, **changes: Any) -> Path:
    """A folder as ``lm_eval --log_samples`` leaves it: a model's folder, a file a task, a line for each answer."""
    there = folder / "model__name"
    there.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "doc_id": i,
            "doc": {"question": str(i)},
            "target": "#### 1",
            "arguments": {"gen_args_0": {"arg_0": f"Question: {i}", "arg_1": {"until": ["\n"]}}},
            "resps": [["x"]],
            "filtered_resps": ["x"],
            "filter": name,
            "metrics": ["exact_match"],
            "doc_hash": f"doc{i}",
            "prompt_hash": f"prompt{i}",
            "target_hash": "t",
            "exact_match": float(value),
        }
        | changes
        for name in ("strict-match", "flexible-extract")
        for i, value in enumerate(values)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (there / f"samples_{task}_{date}.jsonl").write_text(lines)
    (there / f"results_{date}.json").write_text("{}")
    return folder


def own(path: Path, **variants: list[int]) -> Path:
    found = [
        Record(variant=name, task="t", metric="acc", doc_hash=str(i), prompt_hash=str(i), value=float(value))
        for name, values in variants.items()
        for i, value in enumerate(values)
    ]
    write_records(path, found)
    return path


def test_two_folders_of_logged_samples_are_compared_by_document(tmp_path: Path) -> None:
    found = compare(logged(tmp_path / "one", A), logged(tmp_path / "two", B)).standings()
    assert [(one.score, one.variant, one.value) for one in found] == [
        ("gsm8k exact_match (strict-match)", "one", 0.4),
        ("gsm8k exact_match (strict-match)", "two", 0.8),
        ("gsm8k exact_match (flexible-extract)", "one", 0.4),
        ("gsm8k exact_match (flexible-extract)", "two", 0.8),
    ]
    assert (found[1].higher, found[1].lower, found[1].examples) == (5, 1, 10)
    assert found[1].p == binomtest(5, 6, 0.5).pvalue


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, out = logged(tmp_path / "one", A), logged(tmp_path / "two", B), tmp_path / "out"
    assert main(["compare", str(one), str(two), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "gsm8k exact_match (strict-match)" in printed
    assert "+0.4000" in printed
    assert {path.name for path in out.iterdir()} == {"records.jsonl", "table.md", "spectral_surgery.json"}


def test_the_latest_of_several_runs_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = logged(logged(tmp_path / "one", [0] * 10), A, date="2026-11-23T09-00-00.5")
    found = compare(one, logged(tmp_path / "two", B)).standings()
    assert found[0].value == 0.4
    assert "several runs of gsm8k; the latest is read" in caplog.text


def test_a_task_name_with_underscores_and_a_lone_file_are_understood(tmp_path: Path) -> None:
    one, two = (logged(tmp_path / name, A, task="commonsense_qa") for name in ("one", "two"))
    assert compare(one, two).standings()[0].score.startswith("commonsense_qa ")
    files = [next(folder.rglob("samples_*.jsonl")) for folder in (one, two)]
    assert compare(*files).standings()[0].score.startswith("commonsense_qa ")


def test_runs_of_several_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    one = logged(tmp_path / "one", A)
    (one / "model__name").rename(one / "first_model")
    with pytest.raises(DataError, match="holds gsm8k of several models"):
        compare(logged(one, B), logged(tmp_path / "two", B))


def test_a_task_that_only_one_has_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = logged(logged(tmp_path / "one", A), A, task="ifeval")
    found = compare(one, logged(tmp_path / "two", B)).standings()
    assert {standing.score.split()[0] for standing in found} == {"gsm8k"}
    assert "Left out, because only one of the two has it: ifeval" in caplog.text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"values": B, "prompt_hash": "other"}, "10 of 10 documents had different prompts"),
        ({"values": B[:7]}, "7 documents are in both, 3 in one only"),
        ({"values": B, "task": "ifeval"}, "no task, metric and filter in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare(logged(tmp_path / "one", A), logged(tmp_path / "two", **other))


def test_both_inputs_faults_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError) as refused:
        compare(tmp_path / "empty", tmp_path / "adapter")
    assert "holds no samples_*.jsonl and no records.jsonl" in str(refused.value)
    assert "is an adapter. Pass --data ROWS" in str(refused.value)
    with pytest.raises(DataError, match="is not there"):
        compare(tmp_path / "gone", tmp_path / "gone")


def test_own_records_are_compared_and_a_variant_is_chosen(tmp_path: Path) -> None:
    one, two = own(tmp_path / "a.jsonl", base=A), own(tmp_path / "b.jsonl", base=A, mine=B)
    with pytest.raises(DataError, match="has the variants base, mine"):
        compare(one, two)
    chosen = compare(one, two, variant_b="mine").standings()
    assert [(standing.variant, standing.value) for standing in chosen] == [("a.jsonl", 0.4), ("b.jsonl", 0.8)]
    within = compare(two, two, variant_a="base", variant_b="mine").standings()
    assert [(standing.variant, standing.value) for standing in within] == [("base", 0.4), ("mine", 0.8)]


def test_bad_input_leaves_with_status_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = logged(tmp_path / "one", A)
    assert main(["compare", str(one), str(tmp_path / "none")]) == 2
    assert "is not there" in capsys.readouterr().err
    assert main(["compare", "x", "y", "--data", "rows.jsonl", "--variant-a", "x"]) == 2
