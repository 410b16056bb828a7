"""Whatever is wrong with a training is named, all together, before the base model's weights load."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoModelForCausalLM

from spectral_surgery.errors import InputError
from spectral_surgery.training import AdapterOptions, BaseOptions, RowOptions, ScheduleOptions, TrainOptions
from spectral_surgery.training.preparing import Processes, prepare
from spectral_surgery.training.running import train

MATH = [{"query": f"double {i}", "response": f"{2 * i}"} for i in range(4)]
CODE = [{"instruction": f"double {i}", "response": f"{2 * i}"} for i in range(4)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model, with rows for two recipes beside it."""
    tiny.llama(max_position_embeddings=64).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for name, rows in {"math": MATH, "code": CODE}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "base"


def options(model: Path, /, **changes: Any) -> TrainOptions:
    there = TrainOptions(
        recipe="math",
        model=str(model),
        output=model.parent / "out",
        rows=RowOptions(data=str(model.parent / "math.jsonl"), max_length=48),
        adapter=AdapterOptions(),
        schedule=ScheduleOptions(global_batch=4, micro_batch=2, save_every=1),
        base=BaseOptions(cpu=True),
    )
    for field, value in changes.items():
        old = getattr(there, field)
        there = replace(there, **{field: replace(old, **value) if isinstance(value, dict) else value})
    return there


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the base model's weights were read")


def refusal(chosen: TrainOptions, devices: int = 1) -> str:
    """What is said about the options, before any weights are read and without a trace."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AutoModelForCausalLM, "from_pretrained", never)
        with pytest.raises(InputError) as caught:
            prepare(chosen, Processes(devices, 0))
    assert not chosen.output.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "devices", "words"),
    [
        ({"schedule": {"micro_batch": 8}}, 1, "1 device x micro-batch 8 = 8 rows at a time, more than the"),
        ({"schedule": {"micro_batch": 2}}, 3, "3 devices x micro-batch 2 = 6 rows at a time, more than the"),
        ({"schedule": {"micro_batch": 3}}, 1, "of which no whole number makes the global batch of 4. Pass another "
                                              "--micro-batch, or --global-batch 6."),
        ({"schedule": {"epochs": 0.0}}, 1, "--epochs is 0.0, expected more than 0."),
        ({"schedule": {"learning_rate": float("nan")}}, 1, "--learning-rate is nan, expected more than 0."),
        ({"schedule": {"max_steps": 0}}, 1, "--max-steps is 0, expected at least 1."),
        ({"schedule": {"seeds": (1, 1)}}, 1, "--seeds is 1 1, expected different whole numbers."),
        ({"adapter": {"rank": 0}}, 1, "--rank is 0, expected at least 1."),
        ({"adapter": {"dropout": 1.0}}, 1, "--dropout is 1.0, expected from 0 to below 1."),
        ({"adapter": {"modules": ("q_proj", "c_attn")}}, 1, "no linear layer c_attn; it has q_proj, k_proj, v_proj, "
                                                            "o_proj, gate_proj, up_proj, down_proj. Pass --modules."),
        ({"adapter": {"method": "pissa"}, "base": {"load_in_4bit": True}}, 1, "which a 4-bit weight cannot hold"),
        ({"rows": {"prompt_column": "query"}}, 1, "--prompt-column is given, and the recipe's format knows"),
        ({"rows": {"data": None, "format": "prompt"}}, 1, "--format prompt is given without --data"),
        ({"rows": {"data": "missing.jsonl"}}, 1, "missing.jsonl: no such file or folder"),
        ({"rows": {"max_length": 1}}, 1, "--max-length is 1, expected at least 2."),
        ({"recipe": "code"}, 1, "the format magicoder needs the column 'instruction', found 'query', 'response'"),
        ({"recipe": "code", "faithful": True}, 1, "the format of this recipe needs the column 'instruction'"),
        ({"resume": True, "overwrite": True}, 1, "Both --resume and --overwrite are given."),
        ({"model": "./nowhere"}, 1, "The base model ./nowhere is not a folder here."),
        ({"model": "nobody/nothing"}, 1, "No tokenizer can be loaded from nobody/nothing"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named_with_what_to_do(changes: Any, devices: int, words: str, base: Path) -> None:
    assert words in refusal(options(base, **changes), devices)


def test_a_name_that_only_python_lets_through_is_named(base: Path) -> None:
    chosen = options(base)
    object.__setattr__(chosen, "recipe", "maths")
    assert refusal(chosen) == "The recipe is 'maths', expected one of math, code, instruct, commonsense."


def test_every_fault_of_the_options_is_named_at_once(base: Path) -> None:
    said = refusal(options(base, schedule={"micro_batch": 8, "epochs": -1.0}, adapter={"rank": 0}))
    assert said.startswith("3 things are wrong:")
    assert all(word in said for word in ("micro-batch 8", "--epochs is -1.0", "--rank is 0"))


def test_wrong_modules_and_wrong_rows_are_named_at_once(base: Path) -> None:
    said = refusal(options(base, recipe="code", adapter={"modules": ("c_attn",)}))
    assert "no linear layer c_attn" in said
    assert "'instruction'" in said


def test_rows_of_which_none_can_be_used_are_refused(base: Path) -> None:
    (base.parent / "math.jsonl").write_text('{"query": "double 1", "response": ""}\n', encoding="utf-8")
    assert "none of the 1 rows can be used" in refusal(options(base))


def test_rows_that_are_longer_than_the_base_model_reads_are_refused(base: Path) -> None:
    (base.parent / "math.jsonl").write_text(json.dumps({"query": "a" * 70, "response": "b"}), encoding="utf-8")
    said = refusal(options(base, rows={"max_length": 128}))
    assert "the longest row has 92 tokens, and the base model reads at most 64. Pass --max-length 64." in said


def test_an_output_that_someone_else_made_is_never_touched(base: Path) -> None:
    chosen = options(base, overwrite=True)
    chosen.output.mkdir()
    (chosen.output / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="was not written by spectral-surgery"):
        prepare(chosen)
    shutil.move(chosen.output, base.parent / "out.training")
    with pytest.raises(InputError, match="is where the checkpoints go, and it was not written by spectral-surgery"):
        prepare(chosen)
    assert (base.parent / "out.training" / "mine.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_training_is_refused_by_name(flag: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flag, "true")
    assert "only plain data parallel training is supported" in refusal(options(base))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "code", "rows": {"data": "code.jsonl"}}, "recipe was 'math' and is now 'code'"),
        ({"schedule": {"learning_rate": 1e-3}}, "learning_rate was 0.0001 and is now 0.001"),
        ({"adapter": {"method": "rslora"}}, "method was 'lora' and is now 'rslora'"),
        ({"schedule": {"micro_batch": 1}}, "micro_batch was 2 and is now 1"),
    ],
)
def test_checkpoints_of_another_training_are_not_gone_on_from(changes: Any, words: str, base: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(options(base), progress=_stop)
    if data := changes.get("rows", {}).get("data"):
        changes = {**changes, "rows": {"data": str(base.parent / data)}}
    said = refusal(replace(options(base, **changes), resume=True))
    assert "are of another training" in said
    assert words in said


def _stop(done: int, total: int) -> None:
    if done == 2:
        raise KeyboardInterrupt


def test_a_data_set_s_file_that_changed_is_another_training(base: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(options(base), progress=_stop)
    (base.parent / "math.jsonl").write_text(json.dumps(MATH[0]) + "\n", encoding="utf-8")
    assert "rows was 4 and is now 1; rows_sha256 was" in refusal(replace(options(base), resume=True))
