"""Merging an adapter into its base: the weights, the figure that says how close they are, and what is not merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectral_surgery import Adapter, export
from spectral_surgery.cli import main
from spectral_surgery.errors import BaseModelError, OutputError, RunError
from spectral_surgery.exporting import merging
from spectral_surgery.exporting.merging import Parity
from spectral_surgery.exporting.probe import TEXTS
from spectral_surgery.exporting.text import describe
from spectral_surgery.options import ModelOptions

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "head trained in full": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "dora": {"use_dora": True},
}


def merged_by_hand(world: tiny.World, dtype: torch.dtype) -> Any:
    """Base and adapter in float64, merged by PEFT, in a dtype."""
    base = AutoModelForCausalLM.from_pretrained(world.base).double()
    model = PeftModel.from_pretrained(base, str(world.adapter), autocast_adapter_dtype=False).double()
    return model.merge_and_unload().to(dtype)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_merged_model_is_the_adapter_on_its_base(changes: dict[str, Any], tmp_path: Path) -> None:
    world = tiny.world(tmp_path, **changes)
    exported = export(Adapter.load(world.adapter), "merged", tmp_path / "out")
    expected = merged_by_hand(world, torch.float32).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=2e-5, atol=1e-5)
    assert exported.parity
    assert exported.parity.divergence < 1e-6 < 1e-3 < exported.parity.base_divergence
    assert exported.parity.agreement > 0.99


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_not_adapted_is_the_base_s_own_and_the_rest_is_rounded_once(dora: bool, tmp_path: Path) -> None:
    world = tiny.world(tmp_path, use_dora=dora)
    base = AutoModelForCausalLM.from_pretrained(world.base).bfloat16()
    base.save_pretrained(world.base)
    export(Adapter.load(world.adapter), "merged", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    exact = merged_by_hand(world, torch.bfloat16).state_dict()
    adapted = set()
    for name, weight in base.state_dict().items():
        if any(f"{target}.weight" in name for target in tiny.TARGETS):
            adapted.add(name)
            assert (found[name] != exact[name]).sum() <= 1, name
        else:
            assert torch.equal(found[name], weight), name
    assert len(adapted) == 8


def test_a_wider_dtype_than_the_base_s_rounds_nothing(tmp_path: Path) -> None:
    world = tiny.world(tmp_path)
    AutoModelForCausalLM.from_pretrained(world.base).bfloat16().save_pretrained(world.base)
    export(Adapter.load(world.adapter), "merged", tmp_path / "out", model=ModelOptions(dtype="float32"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    for name, weight in merged_by_hand(world, torch.float32).state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)


def test_the_figure_is_the_divergence_of_whole_distributions(tmp_path: Path) -> None:
    world = tiny.world(tmp_path)
    options = ModelOptions(dtype="bfloat16")
    parity = export(Adapter.load(world.adapter), "merged", tmp_path / "out", model=options).parity
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    base = AutoModelForCausalLM.from_pretrained(world.base).eval()
    adapter = PeftModel.from_pretrained(base, str(world.adapter)).eval()
    divergences, same = [], []
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:256]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (adapter, merged))
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert parity
    assert (parity.tokens, parity.texts, parity.dtype) == (len(same), len(TEXTS), "bfloat16")
    assert parity.divergence == pytest.approx(sum(divergences) / len(divergences), rel=0.05)
    assert 1e-5 < parity.divergence < 1e-2
    assert parity.agreement == pytest.approx(sum(same) / len(same), abs=0.01)


def test_the_folder_holds_all_that_a_model_needs_and_leads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    world = tiny.world(tmp_path)
    assert main(["export", "adapter", "--to", "merged", "--data", "rows.jsonl", "--output", "out"]) == 0
    text = capsys.readouterr().out
    assert "same top token" in text
    assert "12 texts, merged weights in float32" in text
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in Path("out").iterdir()
    }
    record = json.loads(Path("out/spectral_surgery.json").read_text(encoding="utf-8"))
    assert record["base_model"] == str(world.base)
    assert record["parity"]["texts"] == 12
    assert main(["restore", "out"]) == 0
    assert main(["export", "adapter", "--to", "merged", "--output", "out"]) == 2


def quantised(world: tiny.World) -> None:
    path = world.base / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {**json.loads(path.read_text(encoding="utf-8")), "quantization_config": settings}
    path.write_text(json.dumps(config), encoding="utf-8")


def test_a_quantised_base_is_refused_before_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tiny.world(tmp_path)
    adapter = Adapter.load(world.adapter)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(BaseModelError, match=r"not merged in 4 or 8 bits.*merged into the unquantised base"):
        export(adapter, "merged", tmp_path / "out", model=ModelOptions(load_in_4bit=True))
    quantised(world)
    with pytest.raises(
        BaseModelError, match=r"is stored quantised \(bitsandbytes\).*Pass the unquantised --base-model"
    ):
        export(adapter, "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task_type": "SEQ_CLS"}, r"The adapter's task is SEQ_CLS, and only models that generate text are merged"),
        ({"lora_bias": True}, r"PEFT cannot merge this adapter: .*base layer has no bias\. Serve it beside"),
        (
            {"alora_invocation_tokens": [5]},
            r"aLoRA acts only from its invocation tokens on, which no merged weight can",
        ),
    ],
)
def test_what_no_weight_can_hold_is_not_merged(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    world = tiny.world(tmp_path, **changes)
    with pytest.raises(BaseModelError, match=reason):
        export(Adapter.load(world.adapter), "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "model.embed_tokens shares its weight"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.* was trained in full, and shares its weight"),
    ],
)
def test_a_weight_that_two_modules_share_is_not_merged_into_one(
    changes: dict[str, Any], name: str, tmp_path: Path
) -> None:
    base = tiny.llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    base.name_or_path = base.config.name_or_path = str(tmp_path / "base")
    tiny.lora(base, **changes).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BaseModelError, match=rf"{name} with another module.*Serve the adapter beside"):
        export(Adapter.load(tmp_path / "adapter"), "merged", tmp_path / "out")


def test_a_failure_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tiny.world(tmp_path)

    def fails(*_: Any) -> None:
        raise RunError("The model's predictions are not finite.")

    monkeypatch.setattr(merging, "_parity", fails)
    with pytest.raises(RunError, match="not finite"):
        export(Adapter.load(world.adapter), "merged", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base", "rows.jsonl"}


def test_the_source_is_never_written_over(tmp_path: Path) -> None:
    world = tiny.world(tmp_path)
    with pytest.raises(OutputError, match="are the same or lie in one another"):
        export(Adapter.load(world.adapter), "merged", world.adapter)


@pytest.mark.parametrize(("divergence", "warned"), [(0.001, False), (0.2, True)])
def test_a_model_that_lost_much_of_the_adapter_is_warned_of(divergence: float, warned: bool, tmp_path: Path) -> None:
    from spectral_surgery.exporting.job import Exported

    parity = Parity(divergence, divergence, 0.9, 1.0, 0.5, texts=3, tokens=40, dtype="bfloat16")
    text = describe(Exported(tmp_path, parity=parity))
    assert ("is 20 % of the adapter's own effect away" in text) == warned
