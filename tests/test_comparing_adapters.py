"""Comparing two adapters on rows: losses and answers against doing it one row at a time, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel

from spectral_surgery import compare
from spectral_surgery.cli import main
from spectral_surgery.errors import InputError
from spectral_surgery.evaluating.comparing import prepare_pair


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny.World:
    folder = tmp_path_factory.mktemp("world")
    there = tiny.world(folder)
    base = tiny.llama()
    base.config.name_or_path = base.name_or_path = str(there.base)
    tiny.lora(base, seed=5, r=2, target_modules=["k_proj", "up_proj"]).save_pretrained(folder / "other")
    return there


def test_losses_and_answers_are_those_of_each_row_alone(world: tiny.World) -> None:
    other = world.adapter.parent / "other"
    found = compare(world.adapter, other, data=world.data)
    assert list(dict.fromkeys(record.variant for record in found.records)) == ["base", "adapter", "other"]
    pair = prepare_pair(str(world.adapter), str(other), str(world.data))
    for name, folder in (("base", None), ("adapter", world.adapter), ("other", other)):
        model = tiny.llama().from_pretrained(world.base)
        model = PeftModel.from_pretrained(model, folder).eval() if folder else model.eval()
        losses = [r.value for r in found.records if r.variant == name and r.metric == "answer_loss"]
        exact = [r.value for r in found.records if r.variant == name and r.metric == "exact_answer"]
        for row, loss, right in zip(pair.tokenized.examples, losses, exact, strict=True):
            ids = torch.tensor([row.input_ids])
            labels = ids.clone()
            labels[0, : row.answer_start] = -100
            rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            assert loss == pytest.approx(float(tiny.loss(model, rows).detach()), rel=1e-4)
            prompt = ids[:, : row.answer_start]
            said = model.generate(input_ids=prompt, max_new_tokens=len(row.input_ids), do_sample=False)[0]
            wanted = list(row.input_ids[row.answer_start :])
            assert right == float(said[prompt.shape[1] :].tolist()[: len(wanted)] == wanted)


def test_differences_are_b_minus_a_with_the_base_beside(world: tiny.World, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(world.adapter), str(world.adapter.parent / "other"), "--data", str(world.data)]
    assert main([*arguments, "--examples", "8"]) == 0
    printed = capsys.readouterr().out
    assert "Rows: 8 of 12 different ones" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("base", "adapter", "other")] == ["adapter", "other"] * 2
    assert sum("answer_loss" in line for line in lines) == 1


def test_two_adapters_need_rows_and_of_one_base(world: tiny.World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is an adapter\. Pass --data"):
        compare(world.adapter, world.adapter.parent / "other")
    with pytest.raises(InputError, match="given twice"):
        compare(world.adapter, world.adapter, data=world.data)
    with pytest.raises(InputError, match="no such file"):
        compare(world.adapter, world.adapter.parent / "other", data=tmp_path / "none.jsonl")
