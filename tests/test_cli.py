"""The command line as a person meets it: what works, and one clear sentence with exit status 2 for what cannot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spectral_surgery.cli import main


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tiny.World:
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(shared: tiny.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiny.World:
    """An own copy of adapter and rows in the current folder; the base is shared."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shared.adapter, tmp_path / "adapter")
    shutil.copy(shared.data, tmp_path / "rows.jsonl")
    return tiny.World(shared.base, tmp_path / "adapter", tmp_path / "rows.jsonl")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def change_config(world: tiny.World, **values: object) -> None:
    path = world.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(world: tiny.World, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = world.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_help_answers_without_torch_and_transformers() -> None:
    code = (
        "import sys, spectral_surgery.cli as cli, spectral_surgery.policies\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(command in done.stdout for command in ("inspect", "demo", "measure", "edit", "restore"))


def test_inspect_prints_every_module_and_its_json(world: tiny.World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "adapter") == 0
    text = capsys.readouterr().out
    assert text.count("self_attn.o_proj") == 2
    assert run("inspect", "adapter", "--json", "--modules", "o_proj") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [m["module"] for m in found["modules"]] == [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
    module = found["modules"][0]
    assert module["nuclear"] == pytest.approx(sum(module["S"]))
    assert module["scale"] == 2


def test_measure_edit_and_restore_work_one_after_the_other(
    world: tiny.World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure", "adapter", "--data", "rows.jsonl", "--output", "s.safetensors") == 0
    assert "double 9: [[18</s>]]" in capsys.readouterr().out
    common = ("edit", "adapter", "--sensitivity", "s.safetensors", "--output", "out")
    assert run(*common, "--policy", "grad-direction:eta_suppress=1.0") == 0
    assert "4 modules edited" in capsys.readouterr().out
    manifest = json.loads(Path("out/spectral_surgery.json").read_text())
    assert manifest["policy"] == "grad_direction:eta_suppress=1.0"
    assert manifest["measurement"]["recorded_base_model"] == str(world.base)
    module = manifest["modules"]["model.layers.1.mlp.down_proj"]
    assert all(len(module[key]) == 4 for key in ("S", "gates", "sensitivity_mean", "sensitivity_standard_error"))
    assert run("restore", "out") == 0
    assert "which is unchanged" in capsys.readouterr().out
    assert run(*common, "--policy", "identity", "--overwrite") == 0
    assert (
        Path("out/adapter_model.safetensors").read_bytes()
        == (world.adapter / "adapter_model.safetensors").read_bytes()
    )


def test_an_edited_folder_behaves_in_stock_peft_as_the_manifest_says(world: tiny.World) -> None:
    assert run("edit", "adapter", "--data", "rows.jsonl", "--policy", "smooth_abs", "--output", "out") == 0
    gates = json.loads(Path("out/spectral_surgery.json").read_text())["modules"]
    base = AutoModelForCausalLM.from_pretrained(world.base)
    before = PeftModel.from_pretrained(base, "adapter").get_base_model().state_dict()
    base = AutoModelForCausalLM.from_pretrained(world.base)
    after = PeftModel.from_pretrained(base, "out").get_base_model().state_dict()
    for path, module in gates.items():
        B, A = (before[f"{path}.lora_{side}.default.weight"].double() for side in "BA")
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
        wanted = (U[:, :4] * S[:4] * torch.tensor(module["gates"], dtype=torch.float64)) @ Vh[:4]
        found = after[f"{path}.lora_B.default.weight"].double() @ after[f"{path}.lora_A.default.weight"].double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_dry_run_writes_nothing_and_loads_no_weights(
    world: tiny.World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert run("measure", "adapter", "--data", "rows.jsonl", "--dry-run") == 0
    assert run("edit", "adapter", "--data", "rows.jsonl", "--policy", "abs_select", "--output", "o", "--dry-run") == 0
    assert "Would measure" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == ["adapter", "rows.jsonl"]


FLAT = ("--policy", "flat", "--output", "out")
DATA = ("--data", "rows.jsonl")


def truncate(world: tiny.World) -> None:
    path = world.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def nan(world: tiny.World) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"][0, 0] = torch.nan

    change_tensors(world, change)


def rename_layers(world: tiny.World) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.layers", "model.language_model.layers")] = tensors.pop(name)

    change_tensors(world, change)


def drop_a_module(world: tiny.World) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            del tensors[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight"]

    change_tensors(world, change)


def loha(world: tiny.World) -> None:
    shutil.rmtree(world.adapter)
    get_peft_model(tiny.llama(), LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(world.adapter)


def write(name: str, text: str) -> Callable[[tiny.World], object]:
    return lambda world: Path(name).write_text(text)


def config(**values: object) -> Callable[[tiny.World], None]:
    return lambda world: change_config(world, **values)


BAD_INPUT = {
    "missing folder": (None, ("edit", "nowhere", *FLAT), "There is no folder nowhere"),
    "missing path": (None, ("inspect", "./no/where"), "There is no folder ./no/where"),
    "no config": (
        lambda w: (w.adapter / "adapter_config.json").unlink(),
        ("edit", "adapter", *FLAT),
        "holds no adapter_config.json",
    ),
    "truncated": (truncate, ("edit", "adapter", *FLAT), "is damaged or incomplete"),
    "nan": (nan, ("edit", "adapter", *FLAT), "layers.0.mlp.down_proj.lora_B.weight has 1 values that are not finite"),
    "rank": (config(r=8), ("edit", "adapter", *FLAT), "lora_A has 4 rows but adapter_config.json says r=8"),
    "keys of another base": (
        rename_layers,
        ("measure", "adapter", *DATA),
        "The adapter does not fit llama: 16 of its tensors match no module",
    ),
    "module missing": (drop_a_module, ("measure", "adapter", *DATA), "2 that PEFT expects are not in it"),
    "targets of another base": (
        config(target_modules=["c_attn"]),
        ("measure", "adapter", *DATA),
        "does not fit|cannot place the adapter on llama",
    ),
    "dora": (config(use_dora=True), ("edit", "adapter", *FLAT), "lora_magnitude_vector is missing"),
    "loha": (loha, ("edit", "adapter", *FLAT), "This is a LOHA adapter.*peft.save_as_lora"),
    "unknown variant": (config(use_newlora=True), ("edit", "adapter", *FLAT), "unknown field use_newlora switched on"),
    "empty data": (write("rows.jsonl", ""), ("measure", "adapter", *DATA), "rows.jsonl"),
    "no such data": (None, ("measure", "adapter", "--data", "gone.jsonl"), "gone.jsonl"),
    "other columns": (
        write("rows.jsonl", '{"left": "a", "right": "b"}\n'),
        ("measure", "adapter", *DATA),
        "left.*right.*--prompt-column",
    ),
    "output exists": (
        lambda w: Path("out").mkdir() or write("out/mine.txt", "x")(w),
        ("edit", "adapter", *FLAT, "--overwrite"),
        "was not written by spectral-surgery",
    ),
    "output in the input": (
        None,
        ("edit", "adapter", "--policy", "flat", "--output", "adapter/out"),
        "are the same or lie in one another",
    ),
    "output is the input": (
        None,
        ("edit", "adapter", "--policy", "flat", "--output", "adapter", "--overwrite"),
        "are the same or lie in one another",
    ),
    "unknown policy": (
        None,
        ("edit", "adapter", "--policy", "smooth", "--output", "out"),
        "Unknown policy 'smooth'. Choose one of: .*smooth_abs",
    ),
    "no measurement": (None, ("edit", "adapter", "--policy", "smooth_abs", "--output", "out"), "needs sensitivities"),
    "no such module": (
        None,
        ("edit", "adapter", *FLAT, "--modules", "k_proj"),
        "matches 'k_proj'. It has: down_proj, o_proj, q_proj, v_proj",
    ),
    "no such layer": (None, ("edit", "adapter", *FLAT, "--layers", "7-9"), "It has layers 0 to 1"),
    "base gone": (
        config(base_model_name_or_path="/gone/llama/8b"),
        ("measure", "adapter", *DATA),
        "/gone/llama/8b recorded in the adapter is not a folder",
    ),
    "no base": (
        config(base_model_name_or_path=None),
        ("measure", "adapter", *DATA),
        "records no base model. Pass --base-model",
    ),
    "not a sensitivity file": (
        None,
        ("edit", "adapter", *FLAT, "--sensitivity", "adapter/adapter_model.safetensors"),
        "is no sensitivity file",
    ),
    "restore of a foreign folder": (None, ("restore", "adapter"), "was not written by spectral-surgery"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_with_status_2_and_nothing_is_written(
    case: str, world: tiny.World, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, arguments, sentence = BAD_INPUT[case]
    if prepare:
        prepare(world)
    before = snapshot()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert re.search(sentence, error, re.DOTALL), error
    assert snapshot() == before


def snapshot() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


def test_all_faults_of_the_configuration_are_named_at_once(
    world: tiny.World, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").write_text("a file")
    assert run("edit", "gone", "--policy", "flat:strenth=2", "--output", "out") == 2
    error = capsys.readouterr().err
    assert "3 things are wrong" in error
    for part in ("no field 'strenth'", "no folder gone", "out is a file"):
        assert part in error


def test_a_failure_midway_is_status_1_and_leaves_nothing(
    world: tiny.World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    before = snapshot()
    assert run("edit", "adapter", *FLAT) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert snapshot() == before


def test_an_interrupt_is_status_130_and_leaves_nothing(
    world: tiny.World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    before = snapshot()
    assert run("edit", "adapter", *FLAT) == 130
    assert snapshot() == before
    assert not list(Path().glob(".*"))


def test_debug_shows_the_traceback(world: tiny.World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "nowhere", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_sensitivity_file_of_another_adapter_is_refused(
    world: tiny.World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure", "adapter", *DATA, "--output", "s.safetensors") == 0
    change_tensors(world, lambda tensors: next(iter(tensors.values())).mul_(2))
    assert run("edit", "adapter", "--policy", "abs_select", "--sensitivity", "s.safetensors", "--output", "out") == 2
    assert "measured on an adapter with hash" in capsys.readouterr().err


def test_the_base_model_option_overrides_the_recorded_one_and_both_are_recorded(world: tiny.World) -> None:
    change_config(world, base_model_name_or_path="someone/llama-bnb-4bit")
    options = ("--base-model", world.base, "--policy", "abs_select", "--output", "out")
    assert run("edit", "adapter", *DATA, *options) == 0
    manifest = json.loads(Path("out/spectral_surgery.json").read_text())
    assert manifest["measurement"]["base_model"] == str(world.base)
    assert manifest["source"]["recorded_base_model"] == "someone/llama-bnb-4bit"
    assert (
        json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == "someone/llama-bnb-4bit"
    )
