"""Models that are no causal language models: from the command line where the data is text, from Python always."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from spectral_surgery import Adapter, Live, measure
from spectral_surgery.cli import main
from spectral_surgery.errors import DataError
from spectral_surgery.formats import DataOptions
from spectral_surgery.measuring import load_prepared, measure_live, measure_prepared, prepare
from spectral_surgery.options import BatchOptions
from spectral_surgery.selection import Selection

ALL = Selection(("all",))


def t5() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=tiny.VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ends = dict(pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, initializer_factor=1.0, dropout_rate=0.1)
    return T5ForConditionalGeneration(T5Config(**sizes, **ends)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    config = BertConfig(**sizes, num_attention_heads=2, num_labels=2, initializer_range=0.3, pad_token_id=0)
    return BertForSequenceClassification(config).eval()


def llama_classifier() -> Any:
    torch.manual_seed(0)
    config = tiny.llama().config
    config.pad_token_id = None
    return LlamaForSequenceClassification(config).eval()


class World:
    """Base model, adapter and rows on disk."""

    def __init__(self, folder: Path, base: Any, task: str, targets: list[str], answer: Callable[[int], str]) -> None:
        self.folder, self.rows = folder, [{"prompt": f"is {i}", "answer": answer(i)} for i in range(7)]
        base.save_pretrained(folder / "base")
        tiny.tokenizer().save_pretrained(folder / "base")
        base.config.name_or_path = base.name_or_path = str(folder / "base")
        torch.manual_seed(1)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, task_type=task)
        self.model = get_peft_model(base, config).eval()
        self.model.save_pretrained(folder / "adapter")
        self.data = folder / "rows.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")


def sequence_to_sequence(folder: Path) -> World:
    return World(folder, t5(), "SEQ_2_SEQ_LM", ["q", "v", "wo"], lambda i: f"no {i * i}")


def classifier(folder: Path) -> World:
    return World(folder, bert(), "SEQ_CLS", ["query", "value"], lambda i: ["LABEL_1", "0"][i % 2])


def decoder_classifier(folder: Path) -> World:
    return World(folder, llama_classifier(), "SEQ_CLS", ["q_proj", "down_proj"], lambda i: str(i % 2))


def own_loss(world: World, row: dict[str, str]) -> float:
    """The loss of one row, by the model's own call and without padding."""
    tokenizer = tiny.tokenizer()
    ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
    if world.model.config.is_encoder_decoder:
        labels = torch.tensor([tokenizer(row["answer"])["input_ids"]])
        return float(world.model(input_ids=ids, labels=labels).loss)
    labels = torch.tensor([int(row["answer"][-1])])
    return float(world.model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize("make", [sequence_to_sequence, classifier, decoder_classifier])
def test_text_tasks_are_measured_from_their_rows(make: Callable[[Path], World], tmp_path: Path) -> None:
    world = make(tmp_path)
    prepared = prepare(Adapter.load(tmp_path / "adapter"), world.data, selection=ALL)
    live = load_prepared(prepared)
    found = measure_prepared(prepared, live)
    with torch.no_grad():
        expected = {(row["prompt"], row["answer"]): own_loss(world, row) for row in world.rows}
    wanted = [expected[example.prompt, example.answer] for example in prepared.examples]
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-5)
    assert set(found.modules) == set(prepared.adapter.updates)
    one_by_one = measure_prepared(prepared, live, BatchOptions(batch_size=1))
    for path in live.paths[::3]:
        shown = found.modules[path].gate_gradient
        assert np.abs(shown).max() > 0
        np.testing.assert_allclose(shown, one_by_one.modules[path].gate_gradient, rtol=1e-3, atol=1e-6)


def test_the_command_line_measures_and_edits_an_encoder_decoder(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    sequence_to_sequence(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["measure", "adapter", "--data", "rows.jsonl", "--output", "s.safetensors"]) == 0
    arguments = ["edit", "adapter", "--sensitivity", "s.safetensors", "--policy", "smooth_abs", "--output", "edited"]
    assert main(arguments) == 0
    assert "Measured 7 rows" in capsys.readouterr().out
    stock = PeftModel.from_pretrained(t5(), str(tmp_path / "edited")).eval()
    unedited = PeftModel.from_pretrained(t5(), str(tmp_path / "adapter")).eval()
    ids = torch.arange(4, 12)[None]
    assert not torch.equal(stock(input_ids=ids, labels=ids).logits, unedited(input_ids=ids, labels=ids).logits)


def test_an_answer_that_is_no_class_is_refused_with_the_classes(tmp_path: Path) -> None:
    world = World(tmp_path, bert(), "SEQ_CLS", ["query"], lambda i: "maybe" if i == 3 else "1")
    with pytest.raises(DataError, match=r"row 3 .*'maybe' is no class of this model\. It has LABEL_0, LABEL_1, or"):
        prepare(Adapter.load(tmp_path / "adapter"), world.data, selection=ALL, data_options=DataOptions())


def vit() -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8)
    return ViTForImageClassification(ViTConfig(**sizes, patch_size=4, num_labels=3, initializer_range=0.3)).eval()


def tagger() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    config = BertConfig(**sizes, num_attention_heads=2, num_labels=4, initializer_range=0.3)
    return BertForTokenClassification(config).eval()


def image_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy(model(pixel_values=batch["pixels"]).logits, batch["labels"], reduction="none")


def tag_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = cross_entropy(logits.transpose(1, 2), batch["input_ids"] % 4, reduction="none")
    return (loss * batch["attention_mask"]).sum(1) / batch["attention_mask"].sum(1)


def images() -> dict[str, Tensor]:
    return {"pixels": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3)), "labels": torch.arange(3)}


@pytest.mark.parametrize(
    ("base", "loss", "batch", "task"),
    [(vit, image_loss, images, None), (tagger, tag_loss, tiny.batch, "TOKEN_CLS")],
    ids=["vision", "tagging"],
)
def test_vision_models_and_taggers_are_measured_from_python(
    base: Callable[[], Any], loss: Any, batch: Callable[[], dict[str, Tensor]], task: str | None
) -> None:
    targets = ".*(query|q_proj|value|v_proj|patch_embeddings.projection)$"
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, task_type=task)
    torch.manual_seed(1)
    model = get_peft_model(base(), config).double().eval()
    rows = {key: value.double() if value.is_floating_point() else value for key, value in batch().items()}
    found = measure(model, [rows], loss=loss, selection=ALL)
    live = Live(model)
    for path in live.paths:
        sides = []
        for step in (1e-5, -1e-5):
            with live.gated({path: np.array([1 + step, 1, 1])}), torch.no_grad():
                sides.append(loss(model, rows).numpy())
        np.testing.assert_allclose(
            found.modules[path].gate_gradient[:, 0], (sides[0] - sides[1]) / 2e-5, rtol=1e-5, atol=1e-9
        )
    assert len(measure_live(live, [rows], loss=loss).modules) == len(live.paths) > 2
