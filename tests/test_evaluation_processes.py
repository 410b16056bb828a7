"""Two processes score what one scores: the same prompts, the same answers, and one of them writes."""

from __future__ import annotations

import json
from pathlib import Path

import launched
import pytest

from spectral_surgery.cli import main
from spectral_surgery.demo import world

pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")


def choices(count: int, first: str) -> list[dict[str, object]]:
    """Questions like CommonsenseQA's."""
    texts = [f"{first}{letter}" for letter in "vwxyz"]
    named = {"label": list("ABCDE"), "text": texts}
    return [{"question": f"{first} {n}", "choices": named, "answerKey": "ABCDE"[n % 5]} for n in range(count)]


@pytest.mark.slow
def test_two_processes_score_what_one_does(tmp_path: Path) -> None:
    local = []
    for name, rows in (("commonsense_qa", choices(5, "q")), ("commonsense_qa:train", choices(6, "p"))):
        path = tmp_path / f"{name.replace(':', '_')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        local.append(f"{name}={path}")
    options = ["--suite", f"commonsense_qa,{world() / 'data' / 'test.jsonl'}", "--local-data", *local]
    options += ["--num-fewshot", "1", "--limit", "9", "--batch-size", "4", "--max-gen-toks", "3"]
    options += ["--base-model", str(world() / "base"), "--dtype", "float32", "--device", "cpu"]
    given = ["evaluate", str(world() / "adapter"), *options, "--output"]
    assert main([*given, str(tmp_path / "one")]) == 0
    done = launched.command([*given, str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Base model:") == 1, "one process speaks"
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 2 * (5 + 9)
    assert sum(record["truncated"] for record in one) > 0
    assert two == one


def records(folder: Path) -> list[dict[str, object]]:
    """Every document's record, prompt hashes among them."""
    return [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
