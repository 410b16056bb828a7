"""``train --then refine`` to its end: trained, measured, refined or left alone, scored beside base and unedited."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spectral_surgery.cli import main, then
from spectral_surgery.demo import world
from spectral_surgery.formats import Example

pytest.importorskip("trl", reason="the extra train is not installed")
pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")

DATA = world() / "data"
FEW = "--ladder controls --steps 0 --permutations 0 --replays 0 --exact-rows 0 --keep-tokens 6 --budget 5s"


def beginning(name: str, count: int, folder: Path) -> Path:
    """The first rows of an embedded set, as a file."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join((DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:count]))
    return path


def arguments(folder: Path, *more: str) -> list[str]:
    """A short training on the embedded base, refined on rows that it did not learn."""
    train, unseen = beginning("train", 64, folder), beginning("test", 64, folder)
    command = ["train", "--recipe", "math", "--model", str(world() / "base"), "--data", str(train), "--cpu"]
    command += ["--format", "prompt", "--max-length", "64", "--global-batch", "16", "--micro-batch", "16"]
    command += ["--max-steps", "6", "--learning-rate", "3e-3", "--modules", "o_proj"]
    command += ["--output", str(folder / "out"), "--then", "refine"]
    return [*command, "--refine-data", str(unseen), *more]


@pytest.mark.slow
def test_one_command_trains_measures_refines_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = tmp_path / "keep.jsonl"
    keep.write_text("".join((DATA / "skills.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[::6]))
    assert main(arguments(tmp_path, f"--refine-options=--keep {keep} {FEW}")) == 0
    refined, scored = tmp_path / "out-refined", tmp_path / "out-evaluation"
    verdict = json.loads((refined / "verdict.json").read_text(encoding="utf-8"))
    assert (refined / "report.html").is_file()
    sensitivities = refined / "sensitivities.safetensors"
    edit = ["edit", str(tmp_path / "out"), "--policy", "smooth_abs", "--sensitivity", str(sensitivities)]
    assert main([*edit, "--output", str(tmp_path / "edited")]) == 0

    rows = (refined / then.TEST_ROWS).read_text(encoding="utf-8").splitlines()
    unseen = (tmp_path / "test.jsonl").read_text(encoding="utf-8")
    assert 0 < len(rows) < 64
    assert all(json.loads(row)["prompt"] in unseen for row in rows)
    records = [json.loads(line) for line in (scored / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    variants = ["base", *(["adapter"] if (refined / "adapter").exists() else []), "out"]
    assert sorted({record["variant"] for record in records}) == sorted(variants)
    assert len(records) == len(variants) * len(rows)
    out = capsys.readouterr().out
    assert verdict["sentence"].split(":")[0] in out
    assert f"Wrote {scored}" in out


def test_what_cannot_follow_is_refused_before_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, "--evaluate-suite", str(tmp_path / "none.jsonl"))) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert main(arguments(tmp_path, "--evaluate-suite", "humaneval")) == 2
    assert "Pass --confirm-run-unsafe-code" in capsys.readouterr().err
    assert main(arguments(tmp_path, "--refine-options=--steps=-1")) == 2
    assert "--steps is -1" in capsys.readouterr().err
    assert main(arguments(tmp_path, "--refine-options=--keep none.jsonl")) == 2
    assert "none.jsonl" in capsys.readouterr().err
    (tmp_path / "out-evaluation").mkdir()
    assert main(arguments(tmp_path)) == 2
    assert "out-evaluation exists, where the scores would go" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_conversation_is_scored_as_it_was_and_anything_else_as_prompt_and_answer() -> None:
    plain = Example("2 + 2 =", "4", "g", False, 1)
    rows = [{}, {"messages": ["hello"]}]
    assert then._row(plain, rows) == {"prompt": "2 + 2 =", "answer": "4"}
    assert then._row(replace(plain, templated=True), rows) == rows[1]
