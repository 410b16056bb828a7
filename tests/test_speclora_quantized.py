"""SpecLoRA on quantised bases: the packed weight is never touched, merging says what it rounds."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import get_peft_model
from test_speclora import config, layers, logits, trained
from test_speclora_saving import fresh
from transformers import AutoModelForCausalLM

FORMATS = {
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "torchao": "torchao",
}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def quantization(kind: str) -> Any:
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture(params=FORMATS, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A base model's folder and the kind of quantisation to load it with."""
    if importlib.util.find_spec(FORMATS[request.param]) is None:
        pytest.skip(f"{FORMATS[request.param]} is not installed (extra quantized)")
    where = tmp_path_factory.mktemp("base")
    tiny.llama(hidden_size=64, intermediate_size=128, attention_bias=True).save_pretrained(where)
    return where, request.param


def load(folder: tuple[Any, str]) -> Any:
    where, kind = folder
    return AutoModelForCausalLM.from_pretrained(
        where, quantization_config=quantization(kind), device_map={"": "cpu"}, dtype=torch.float32
    ).eval()


def numbers(layer: Any) -> torch.Tensor:
    return layer.frozen_weight().detach().float().clone()


def test_a_new_adapter_on_a_quantised_base_changes_nothing_at_all(folder: tuple[Any, str]) -> None:
    base = load(folder)
    before = logits(base)
    model = get_peft_model(base, config(target_modules=tiny.TARGETS)).eval()
    assert {type(layer).__name__ for layer in layers(model).values()} <= {"Linear4bit", "Linear8bit", "TorchaoLinear"}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_the_scales_act_on_the_weight_that_the_base_computes_with(folder: tuple[Any, str]) -> None:
    model = trained(get_peft_model(load(folder), config(rows="norm")))
    for layer in layers(model).values():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            base = layer.get_base_layer()(x).float()
            ours = layer(x).float() - base
            update = layer.get_delta_weight("default").float()
        # int8 kernels quantise x as well, so their base output is W x only to about a per cent.
        tolerance = 2e-2 if type(layer).__name__ == "Linear8bit" else 1e-3
        assert (ours - x @ update.T).norm() <= tolerance * (x @ update.T).norm()


def test_training_moves_every_delta_and_not_the_packed_weight(folder: tuple[Any, str]) -> None:
    model = get_peft_model(load(folder), config()).train()
    before = {path: numbers(layer) for path, layer in layers(model).items()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(2):
        tiny.loss(model, tiny.batch()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for path, layer in layers(model).items():
        assert (layer.lora_spec["default"].delta != 0).all(), path
        assert torch.equal(numbers(layer), before[path])


def test_merging_reports_its_rounding_and_unmerging_puts_the_packed_weight_back(
    folder: tuple[Any, str], caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(get_peft_model(load(folder), config()))
    before, adapted = {path: numbers(layer) for path, layer in layers(model).items()}, logits(model)
    updates = {path: layer.get_delta_weight("default").detach() for path, layer in layers(model).items()}
    with caplog.at_level(logging.WARNING, logger="spectral_surgery"):
        model.merge_adapter(safe_merge=True)
    lines = [record.getMessage() for record in caplog.records if "re-quantising" in record.getMessage()]
    assert len(lines) == len(layers(model))
    for path, layer in layers(model).items():
        stored = layer.dequantized(layer.detach_weight()).float()
        rounding = (stored - before[path] - updates[path]).norm() / updates[path].norm()
        assert 0 < layer.merge_rounding < 0.2
        assert layer.merge_rounding == pytest.approx(float(rounding), rel=1e-2)
    model.unmerge_adapter()
    assert all(torch.equal(numbers(layer), before[path]) for path, layer in layers(model).items())
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-6)


def test_a_saved_adapter_computes_the_same_on_the_quantised_base(folder: tuple[Any, str], tmp_path: Any) -> None:
    from peft import PeftModel

    model = trained(get_peft_model(load(folder), config(rows="norm")))
    model.save_pretrained(tmp_path)
    there = PeftModel.from_pretrained(load(folder), tmp_path).eval()
    torch.testing.assert_close(logits(there), logits(model), rtol=0, atol=1e-6)


def test_a_fresh_process_computes_the_same_on_the_4_bit_base(folder: tuple[Any, str], tmp_path: Path) -> None:
    if folder[1] != "nf4":
        pytest.skip("the process of its own loads nf4; the others are loaded in this one")
    (tmp_path / "base").symlink_to(folder[0])
    model = trained(get_peft_model(load(folder), config(rows="random")))
    model.save_pretrained(tmp_path / "adapter")
    run = fresh(tmp_path, "import spectral_surgery.speclora", "nf4")
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(torch.load(tmp_path / "there.pt"), logits(model), rtol=0, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (extra trl)")
def test_the_trainer_of_trl_trains_and_saves_on_the_4_bit_base(folder: tuple[Any, str], tmp_path: Path) -> None:
    """The trainer stores factors in bfloat16 and computes in it; loaded again they compute in float32."""
    if folder[1] != "nf4":
        pytest.skip("the trainer is run on nf4 alone")
    from datasets import Dataset
    from peft import PeftModel
    from trl import SFTConfig, SFTTrainer

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
    )
    rows = [{"prompt": row["prompt"], "completion": " " + row["answer"]} for row in tiny.rows()]
    trainer = SFTTrainer(
        model=load(folder),
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
    there = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(there), logits(trainer.model.eval()), rtol=0, atol=2e-2)
