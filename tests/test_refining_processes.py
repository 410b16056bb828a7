"""Two processes refine as one does, and one of them writes and speaks."""

from __future__ import annotations

import json
from pathlib import Path

import launched
import numpy as np
import pytest
import tiny

from spectral_surgery.cli import main
from spectral_surgery.refining.repeating import differences


@pytest.mark.slow
def test_two_processes_find_the_verdict_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tiny.world(tmp_path, target_modules=["q_proj", "down_proj"])
    world.data.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(60)), encoding="utf-8")
    prompts = tmp_path / "prompts.txt"
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz "), (66, 14))
    prompts.write_text("".join(f"{''.join(row)}.\n" for row in letters), encoding="utf-8")
    options = ["--data", str(world.data), "--format", "prompt", "--keep", str(prompts), "--keep-tokens", "4"]
    options += ["--steps", "2", "--permutations", "2", "--replays", "5", "--device", "cpu", "--token-budget", "150"]
    found = {}
    for name in ("one", "two"):
        monkeypatch.setenv("SPECTRAL_SURGERY_STATE", str(tmp_path / f"state of {name}"))
        arguments = ["refine", str(world.adapter), *options, "--output", str(tmp_path / name)]
        if name == "one":
            assert main(arguments) == 0
        else:
            done = launched.command(arguments, launched.ACCELERATE)
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.count("Base model:") == 1, "one process speaks"
        found[name] = json.loads((tmp_path / name / "verdict.json").read_text(encoding="utf-8"))
    assert [verdict["environment"]["processes"] for verdict in found.values()] == ["1", "2"]
    assert differences(found["one"], found["two"]) == []
    assert (tmp_path / "state of two" / "verdicts.jsonl").read_text().count("\n") == 1
    files = [sorted(path.name for path in (tmp_path / name / "cache").iterdir()) for name in found]
    assert len(files[0]) == len(files[1])
