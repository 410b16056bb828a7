"""PiSSA and OLoRA adapters become plain LoRA of twice the rank, and compute what they computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from test_adapter import logits, relative

from spectral_surgery import Adapter
from spectral_surgery.adapter.conversion import as_plain_lora
from spectral_surgery.cli import main
from spectral_surgery.errors import AdapterError


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_converted_adapter_computes_what_peft_computed_on_the_changed_base(
    init: str, rslora: bool, tmp_path: Path
) -> None:
    settings = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": rslora}
    model = tiny.lora(tiny.llama(), init_lora_weights=init, **settings)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / init)
    base = tiny.llama()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    converted = as_plain_lora(tmp_path / init, base, tmp_path / "plain")
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert converted.config.rank("model.layers.0.self_attn.o_proj") == 4
    stock = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "plain")).eval()
    assert relative(logits(stock), logits(model.eval())) < 2e-5
    assert relative(logits(tiny.llama()), logits(stock)) > 0.05
    assert len(Adapter.load(tmp_path / "plain").updates) == 8


def test_the_command_line_converts_by_the_recorded_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.world(tmp_path, init_lora_weights="pissa")
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "adapter"]) == 2
    assert "Convert it with spectral-surgery convert" in capsys.readouterr().err
    assert main(["convert", "adapter", "--output", "plain"]) == 0
    assert "8 modules as plain LoRA of rank 8, in float32" in capsys.readouterr().out
    assert main(["convert", "adapter", "--output", "plain"]) == 2
    assert main(["convert", "adapter", "--output", "other", "--base-model", "./gone"]) == 2
    assert main(["inspect", "plain"]) == 0


def test_a_random_start_cannot_be_taken_off_again(tmp_path: Path) -> None:
    tiny.lora(tiny.llama(), init_lora_weights="pissa_niter_4").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="Only 'pissa' and 'olora' start from the base model alone"):
        as_plain_lora(tmp_path, tiny.llama())
