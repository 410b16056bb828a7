"""Two processes refine as one does, and one of them writes and speaks."""

from __future__ import annotations

import json
from pathlib import Path

import launched
import numpy as np
import pytest
import tiny

from spectral_surgery.cli import parse
from spectral_surgery.cli.refine import Refine
from spectral_surgery.refining import refine
from spectral_surgery.refining.repeating import differences


@pytest.mark.slow
def test_two_processes_find_the_verdict_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tiny.world(tmp_path, target_modules=["q_proj", "down_proj"])
    world.data.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(60)), encoding="utf-8")
    prompts = tmp_path / "prompts.txt"
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz "), (66, 14))
    prompts.write_text("".join(f"{''.join(row)}.\n" for row in letters), encoding="utf-8")
    arguments = ["refine", str(world.adapter), "--data", str(world.data), "--format", "prompt", "--device", "cpu"]
    arguments += ["--keep", str(prompts), "--keep-tokens", "4", "--token-budget", "300"]
    arguments += ["--output", str(tmp_path / "two"), "--steps", "2", "--permutations", "2", "--replays", "5"]

    monkeypatch.setenv("SPECTRAL_SURGERY_STATE", str(tmp_path / "state of one"))
    given = parse(arguments)
    assert isinstance(given, Refine)
    one = refine(
        world.adapter, world.data, options=given.options, rows=given.rows, model=given.model, batching=given.batching
    ).verdict

    monkeypatch.setenv("SPECTRAL_SURGERY_STATE", str(tmp_path / "state of two"))
    done = launched.command(arguments, launched.ACCELERATE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Base model:") == 1, "one process speaks"
    two = json.loads((tmp_path / "two" / "verdict.json").read_text(encoding="utf-8"))
    assert (one["environment"]["processes"], two["environment"]["processes"]) == ("1", "2")
    assert {"descend", "continue"} <= {candidate["family"] for candidate in two["candidates"]}, "steps were shared"
    assert differences(json.loads(json.dumps(one)), two) == []
    assert (tmp_path / "state of two" / "verdicts.jsonl").read_text(encoding="utf-8").count("\n") == 1
