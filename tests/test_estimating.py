"""The arithmetic of memory against what autograd really keeps, and the two promises about 8B models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peak import Peak
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from spectral_surgery import Adapter, Live, estimating, objective
from spectral_surgery.calibration import Batch, Tokenized, TokenizedExample
from spectral_surgery.cli import main
from spectral_surgery.estimating import GIB, costs_of
from spectral_surgery.measuring import measure_live
from spectral_surgery.options import ModelOptions
from spectral_surgery.packing import packs

SIZES = dict(hidden_size=128, intermediate_size=352, num_attention_heads=4, num_key_value_heads=2, vocab_size=500)


def kept(live: Live, batch: Batch, *, checkpointing: bool) -> int:
    """The most bytes that autograd holds at once for the backward pass, weights and inputs apart."""
    own = {weight.untyped_storage().data_ptr() for weight in live.model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        measure_live(live, [batch], checkpointing=checkpointing)
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [2, 5])
def test_what_autograd_keeps_is_what_the_arithmetic_says(dtype: str, layers: int) -> None:
    base = tiny.llama(dtype=getattr(torch, dtype), num_hidden_layers=layers, **SIZES)
    model = tiny.lora(base)
    live = Live(model)
    ids = torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :32] = -100
    batch = Batch(ids, torch.ones_like(ids), labels, (0, 1, 2, 3))
    costs = costs_of(base, base.config, live.adapter, ModelOptions(dtype=dtype), live.paths)
    found = kept(live, batch, checkpointing=False)
    said = ids.numel() * costs.token + 4 * 32 * costs.label // 2
    print(f"{dtype}, {layers} layers: kept {found}, said {said}, {said / found:.3f}")
    assert 0.8 < said / found < 1.25


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_what_the_arithmetic_says(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "AT_ONCE", 2**14)
    monkeypatch.setattr(estimating, "AT_ONCE", 2**14)
    base = tiny.llama(num_hidden_layers=6, **SIZES)
    live = Live(tiny.lora(base))
    ids = torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids), ids.clone(), tuple(range(8)))
    options = ModelOptions(dtype="float32", gradient_checkpointing=checkpointing)
    costs = costs_of(base, base.config, live.adapter, options, live.paths)
    with Peak() as tracker:
        measure_live(live, [batch], checkpointing=checkpointing)
    found = tracker.peak
    said = costs.peak(ids.numel(), ids.numel()) - costs.weights - costs.adapter
    print(f"checkpointing {checkpointing}: peak {found}, said {said}, {said / found:.3f}")
    assert 1 <= said / found < 1.3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_packed_rows_is_what_the_arithmetic_says(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "AT_ONCE", 2**14)
    monkeypatch.setattr(estimating, "AT_ONCE", 2**14)
    base = tiny.llama(num_hidden_layers=6, **SIZES)
    live = Live(tiny.lora(base))
    ids = torch.randint(3, 500, (16, 64), generator=torch.Generator().manual_seed(0))
    (pack,) = packs(Tokenized([TokenizedExample(tuple(row), 1, "") for row in ids.tolist()], 0), batch_size=16)
    options = ModelOptions(dtype="float32", gradient_checkpointing=checkpointing)
    costs = costs_of(base, base.config, live.adapter, options, live.paths)
    with Peak() as tracker:
        measure_live(live, [pack], checkpointing=checkpointing)
    found = tracker.peak
    said = costs.peak(ids.numel(), 16 * 63, packed=True) - costs.weights - costs.adapter
    print(f"packed, checkpointing {checkpointing}: peak {found}, said {said}, {said / found:.3f}")
    assert 1 <= said / found < 1.3


def adapted(config: Any, options: ModelOptions) -> Any:
    """Costs of measuring o_proj and down_proj of rank 16 on a base of which there are only shapes."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    small = tiny.lora(tiny.llama(num_hidden_layers=32), r=16, target_modules=["o_proj", "down_proj"])
    adapter = Adapter.from_model(small)
    return costs_of(base, config, adapter, options, list(adapter.updates))


LLAMA_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip


def test_weights_are_those_of_the_published_size() -> None:
    costs = adapted(LlamaConfig(**LLAMA_8B), ModelOptions(dtype="bfloat16"))
    assert costs.weights == 2 * 8_030_261_248


@pytest.mark.parametrize(("four_bit", "most"), [(False, 24), (True, 12)])
def test_an_8b_model_measures_rows_of_512_tokens_in_the_memory_promised(four_bit: bool, most: int) -> None:
    options = ModelOptions(dtype="bfloat16", gradient_checkpointing=True, load_in_4bit=four_bit)
    costs = adapted(LlamaConfig(**LLAMA_8B), options)
    adapter = 4 * 2 * 42_000_000  # of rank 16 on all seven kinds, with directions, in place of the small one here
    print(f"{most} GiB: peak {(costs.peak(4096, 4096) + adapter) / GIB:.2f} GiB")
    assert costs.peak(4096, 4096) + adapter < most * GIB
    assert costs.peak(4096, 4096) < costs.peak(8192, 8192)


def test_the_command_says_memory_and_time_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = tiny.world(tmp_path)
    (world.base / "model.safetensors").unlink()
    arguments = ["estimate", str(world.adapter), "--device", "cpu"]
    assert main([*arguments, "--data", str(world.data), "--memory", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Memory: \d+\.\d\d GiB at the peak", printed)
    assert "fits into 1 GiB" in printed
    assert main([*arguments, "--memory", "0.001", "--examples", "4", "--max-length", "64"]) == 0
    assert "does not fit into 0.001 GiB" in capsys.readouterr().out
