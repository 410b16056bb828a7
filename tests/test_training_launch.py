"""Several processes, a quantised base and the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from peft import PeftModel
from test_training_runs import base, options, points, slow, weights
from transformers import AutoModelForCausalLM

from spectral_surgery.cli import main, parse
from spectral_surgery.cli.refine import Refine
from spectral_surgery.cli.train import next_commands
from spectral_surgery.training.preparing import Processes, prepare
from spectral_surgery.training.running import train

__all__ = ["base"]

ROOT = Path(__file__).parents[1]


def arguments(base: Path, name: str, *more: str) -> list[str]:
    """The command line of ten rows twice, in batches of four, four and two, on the CPU."""
    data = base.parent / "ten.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(10)), encoding="utf-8")
    given = f"train --recipe math --model {base} --data {data} --format prompt --output {base.parent / name} --cpu"
    numbers = "--rank 4 --dropout 0 --max-length 32 --global-batch 4 --epochs 2 --learning-rate 1e-2"
    return shlex.split(f"{given} {numbers}") + list(more)


def test_the_command_trains_and_says_how_to_go_on(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(base, "out", "--micro-batch", "4")) == 0
    said = capsys.readouterr().out
    assert "Rows: 10 in" in said
    assert "Batch: 4 = 1 device x 4 rows x 1 accumulated; 6 steps at learning rate 0.01" in said
    assert "<s>double 0: [[0</s>]]" in said
    lines = [line.strip() for line in said.splitlines() if line.strip().startswith("spectral-surgery ")]
    assert [line.split()[1] for line in lines] == ["measure", "refine"]
    assert main([*shlex.split(lines[0])[1:], "--output", str(base.parent / "s.safetensors"), "--examples", "8"]) == 0
    assert (base.parent / "s.safetensors").is_file()


def test_a_dry_run_says_the_same_and_trains_nothing(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(base, "out", "--micro-batch", "1", "--dry-run")) == 0
    assert "Batch: 4 = 1 device x 1 rows x 4 accumulated; 6 steps" in capsys.readouterr().out
    assert sorted(path.name for path in base.parent.iterdir()) == ["base", "rows.jsonl", "ten.jsonl"]


def test_what_is_wrong_ends_with_status_2(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(base, "out", "--micro-batch", "8")) == 2
    assert "more than the global batch of 4. Lower --micro-batch." in capsys.readouterr().err


def test_the_commands_to_go_on_with_name_what_they_need(base: Path) -> None:
    chosen = parse([*arguments(base, "out"), "--micro-batch", "4", "--base-name", "org/name"])
    prepared = prepare(chosen, Processes(1, 0))  # type: ignore[arg-type]
    measure, refine = next_commands(prepared, Path("my adapter"))
    assert parse(measure[1:]).rows.format == "prompt"  # type: ignore[attr-defined]
    assert measure[-4:] == ["--base-model", str(base), "--device", "cpu"]
    command = parse(refine[1:])
    assert (command.adapter, command.train_data, command.data) == ("my adapter", str(base.parent / "ten.jsonl"), None)


def test_then_refine_runs_the_command_that_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Refine] = []
    monkeypatch.setattr(
        "spectral_surgery.cli.train.refine_and_evaluate", lambda refine, suite, unsafe: ran.append(refine)
    )
    unseen = base.parent / "unseen.jsonl"
    unseen.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(90)[10:]), encoding="utf-8")
    more = ["--micro-batch", "4", "--max-steps", "1", "--then", "refine", "--refine-data", str(unseen)]
    more += ["--refine-options=--ladder controls"]
    assert main(arguments(base, "out", *more)) == 0
    (refine,) = ran
    assert refine.options.ladder == "controls"
    assert (refine.adapter, refine.data) == (str(base.parent / "out"), str(unseen))
    assert (refine.train_data, refine.output) == (str(base.parent / "ten.jsonl"), base.parent / "out-refined")
    assert (refine.rows.format, refine.rows.max_length, refine.model.device) == ("prompt", 32, "cpu")
    assert "Next:" in capsys.readouterr().out


def test_rows_to_refine_on_must_not_be_among_the_training_rows(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = base.parent / "shared.jsonl"
    shared.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(13)[8:]), encoding="utf-8")
    more = ["--micro-batch", "4", "--then", "refine", "--refine-data", str(shared)]
    assert main(arguments(base, "out", *more)) == 2
    assert "2 of the 5 rows of" in capsys.readouterr().err
    assert not (base.parent / "out").exists()
    few = ["--micro-batch", "4", "--then", "refine"]
    assert main(arguments(base, "out", *few)) == 2
    assert "10 different rows, expected at least 60" in capsys.readouterr().err
    assert main(arguments(base, "out", *few, "--method", "speclora")) == 2
    assert "--then refine takes adapters of one low-rank update" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(base: Path) -> None:
    assert main(arguments(base, "one", "--micro-batch", "1")) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, *settings, "-m", "spectral_surgery", *arguments(base, "two", "--micro-batch", "1")]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Batch: 4 = 2 devices x 1 rows x 2 accumulated; 6 steps" in run.stdout
    assert run.stdout.count("Base model:") == 1, "one process speaks"
    one, two = points(base.parent / "one"), points(base.parent / "two")
    assert len(one) == 6
    assert two == [pytest.approx(point, rel=1e-4) for point in one]
    assert one[-1]["loss"] < one[0]["loss"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("method", ["lora", *map(slow, ("dora", "speclora"))])
def test_a_quantised_base_is_trained_in_float32_factors(method: Any, base: Path) -> None:
    wide = tiny.llama(hidden_size=64, intermediate_size=128)
    wide.save_pretrained(base)
    chosen = options(base, adapter={"method": method, "modules": ("q_proj", "down_proj")})
    (trained,) = train(replace(chosen, base=replace(chosen.base, load_in_4bit=True)))
    assert all(str(weight.dtype) == "torch.float32" for weight in weights(trained.folder).values())
    curve = points(trained.folder)
    assert curve[-1]["loss"] < curve[0]["loss"]
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert PeftModel.from_pretrained(plain, str(trained.folder)).peft_config["default"].r == 4
