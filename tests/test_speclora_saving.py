"""SpecLoRA folders: what is saved, loaded in a fresh process, and refused by PEFT alone; and training."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_speclora import config, layers, logits, trained
from torch import Tensor
from transformers import AutoModelForCausalLM

FRESH = """
import sys
import torch
{imports}
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

options = {{"dtype": getattr(torch, sys.argv[4], torch.float32)}}
if sys.argv[4] == "nf4":
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    options |= {{"quantization_config": packed, "device_map": {{"": "cpu"}}}}
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
with torch.no_grad():
    logits = model(input_ids=torch.load(sys.argv[3])["input_ids"]).logits
torch.save(logits, sys.argv[3])
"""


def fresh(folder: Path, imports: str, dtype: str) -> subprocess.CompletedProcess[str]:
    """Computes the saved adapter's logits in a process of its own, into ``folder/there.pt``."""
    torch.save({"input_ids": tiny.batch()["input_ids"]}, folder / "there.pt")
    arguments = [folder / "base", folder / "adapter", folder / "there.pt", dtype]
    return subprocess.run(
        [sys.executable, "-c", FRESH.format(imports=imports), *map(str, arguments)], capture_output=True, text=True
    )


def saved(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[PeftModel, Tensor]:
    """Saves a base and a trained adapter on it; returns the model and its logits."""
    tiny.llama(dtype=dtype, attention_bias=True).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model = trained(get_peft_model(base, config(**changes)))
    model.save_pretrained(folder / "adapter")
    return model, logits(model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_process_that_imports_the_package_computes_the_same_logits(tmp_path: Path, dtype: str) -> None:
    _, here = saved(tmp_path, getattr(torch, dtype), rows="random", use_rslora=True, rank_pattern={"q_proj": 2})
    run = fresh(tmp_path, "import spectral_surgery.speclora", dtype)
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "there.pt"), here)


@pytest.mark.slow
def test_peft_alone_refuses_the_folder(tmp_path: Path) -> None:
    saved(tmp_path)
    run = fresh(tmp_path, "", "float32")
    assert run.returncode != 0
    assert "KeyError: 'SPECLORA'" in run.stderr


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, {"lora_A.weight", "lora_B.weight", "lora_spec.delta"}),
        ({"rows": "norm"}, {"lora_A.weight", "lora_B.weight", "lora_spec.delta", "lora_spec.rows"}),
        ({"basis": "svd"}, {"lora_A.weight", "lora_B.weight", "lora_spec.delta", "lora_spec.U"}),
    ],
)
def test_a_folder_holds_factors_deltas_and_a_choice_that_the_base_would_decide(
    tmp_path: Path, changes: dict[str, Any], names: set[str]
) -> None:
    saved(tmp_path, torch.bfloat16, **changes)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    assert set(found) == names
    assert found["lora_spec.delta"].dtype == torch.float32
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (raw["peft_type"], raw["init_basis"], raw["k"]) == ("SPECLORA", False, 6)


@pytest.mark.parametrize(
    "changes",
    [{"rows": "norm"}, {"basis": "svd"}, {"modules_to_save": ["lm_head"]}, {"delta_bound": 0.2}, {"lora_bias": True}],
    ids=["norm", "svd", "modules_to_save", "bound", "lora_bias"],
)
def test_a_loaded_adapter_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    _, here = saved(tmp_path, **changes)
    base = tiny.llama(attention_bias=True)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), here)


def test_rows_come_from_the_file_and_not_from_another_base(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, rows="norm")
    other = PeftModel.from_pretrained(tiny.llama(seed=9, attention_bias=True), tmp_path / "adapter")
    for path, layer in layers(model).items():
        assert torch.equal(layer.lora_spec["default"].rows, layers(other)[path].lora_spec["default"].rows)


def test_loading_on_the_meta_device_first_keeps_every_bit_of_delta(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, torch.bfloat16, rows="norm")
    base = tiny.llama(dtype=torch.bfloat16, attention_bias=True)
    there = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=True)
    for path, layer in layers(model).items():
        assert torch.equal(layers(there)[path].lora_spec["default"].delta, layer.lora_spec["default"].delta)


def test_a_file_that_lost_its_deltas_does_not_load(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "lora_spec" not in n}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"8 of 8 tensors of scales are missing"):
        PeftModel.from_pretrained(tiny.llama(attention_bias=True), tmp_path / "adapter")


def steps(model: PeftModel, count: int = 3) -> list[float]:
    """Trains with AdamW on one batch and returns the losses."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(count):
        loss = tiny.loss(model, tiny.batch()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def adapted(**changes: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.llama(attention_bias=True), config(**changes))


def test_every_delta_moves_in_training() -> None:
    model = adapted(basis="rows")
    losses = steps(model)
    assert losses[-1] < losses[0]
    for path, layer in layers(model).items():
        assert (layer.lora_spec["default"].delta != 0).all(), path


def test_gradient_checkpointing_trains_the_same() -> None:
    plain, checkpointed = adapted().train(), adapted().train()
    checkpointed.gradient_checkpointing_enable()
    checkpointed.enable_input_require_grads()
    assert steps(plain) == pytest.approx(steps(checkpointed), rel=1e-5)


COMPILED = """
import torch
from peft import get_peft_model
from spectral_surgery.speclora import SpecLoraConfig

for rows, basis in [("first", "rows"), ("norm", "rows"), ("first", "svd")]:
    torch.manual_seed(0)
    config = SpecLoraConfig(target_modules=["0"], r=3, k=6, init_lora_weights=False, rows=rows, basis=basis)
    layer = get_peft_model(torch.nn.Sequential(torch.nn.Linear(9, 12)), config).base_model.model[0]
    delta = layer.lora_spec["default"].delta
    delta.data.normal_()
    x = torch.randn(2, 5, 9)
    found = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        out = function(x)
        out.square().sum().backward()
        found.append((out.detach(), delta.grad.clone()))
    for eager, compiled in zip(*found):
        torch.testing.assert_close(eager, compiled)
    print(rows, basis, "agree")
"""


COMPILED_MODEL = """
import sys
sys.path.insert(0, sys.argv[1])
import tiny
import torch
from peft import get_peft_model
from spectral_surgery.speclora import SpecLoraConfig

for rows, basis in [("first", "rows"), ("norm", "rows"), ("first", "svd")]:
    torch.manual_seed(0)
    config = SpecLoraConfig(
        target_modules=tiny.TARGETS, r=3, k=6, init_lora_weights=False, rows=rows, basis=basis, task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny.llama(attention_bias=True), config).train()
    deltas = {name: weight for name, weight in model.named_parameters() if "lora_spec" in name}
    for weight in deltas.values():
        weight.data.normal_(std=0.3)
    ids = tiny.batch()["input_ids"]
    found = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = function(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        found.append([out.logits.detach(), *(weight.grad.clone() for weight in deltas.values())])
    for eager, compiled in zip(*found):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
    print(rows, basis, len(deltas), "agree")
"""


@pytest.mark.slow
def test_a_compiled_model_trains_the_same_in_one_graph() -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPILED_MODEL, str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("8 agree") == 3


@pytest.mark.slow
def test_a_compiled_layer_computes_the_same_in_one_graph() -> None:
    # A process of its own: the checks of shapes that these tests run under cannot be compiled.
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("agree") == 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (extra trl)")
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_trl_moves_every_delta_and_saves_a_folder_that_loads(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": row["prompt"], "completion": " " + row["answer"]} for row in tiny.rows()]
    arguments = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataset_num_proc=None,
    )
    trainer = SFTTrainer(
        model=tiny.llama(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        peft_config=config(),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    for path, layer in layers(trainer.model).items():
        assert (layer.lora_spec["default"].delta != 0).any(), path
        assert layer.lora_spec["default"].delta.dtype == torch.float32
    there = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(there), logits(trainer.model.eval()))
