"""SpecLoRA beyond itself: exports as plain LoRA, and Spectral Surgery on its two parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from test_speclora import CHOICES, config, layers, logits, trained

from spectral_surgery import policies
from spectral_surgery.constraints import Constraint
from spectral_surgery.errors import AdapterError, InputError, PolicyError
from spectral_surgery.speclora import as_lora, edit_speclora, lora_part, measure_speclora, save_as_lora


def speclora(dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    return trained(get_peft_model(tiny.llama(attention_bias=True, dtype=dtype), config(**changes)))


@pytest.mark.parametrize(("basis", "rows"), CHOICES)
def test_the_exact_export_is_plain_lora_of_rank_r_plus_k_that_computes_the_same(
    tmp_path: Path, basis: str, rows: str
) -> None:
    model = speclora(basis=basis, rows=rows, use_rslora=True, rank_pattern={"q_proj": 2}, delta_bound=0.5)
    errors = save_as_lora(tmp_path / "out", model)
    there = PeftModel.from_pretrained(tiny.llama(attention_bias=True), tmp_path / "out").eval()
    assert there.peft_config["default"].peft_type == "LORA"
    assert there.peft_config["default"].r == 4 + 6
    assert set(errors.values()) == {0.0}
    torch.testing.assert_close(logits(there), logits(model), rtol=1e-4, atol=1e-4)


def test_a_conv1d_adapter_exports_exactly(tmp_path: Path) -> None:
    chosen = config(target_modules=["c_attn"], fan_in_fan_out=True)
    model = trained(get_peft_model(tiny.gpt2(), chosen))
    save_as_lora(tmp_path / "out", model)
    there = PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(there), logits(model), rtol=1e-4, atol=1e-4)


def test_a_truncated_export_is_the_best_of_its_rank_and_its_error_is_what_it_says() -> None:
    model = speclora()
    exported = as_lora(model, rank=3)
    for path, layer in layers(model).items():
        whole = layer.get_delta_weight("default").detach().double()
        S = torch.linalg.svdvals(whole)
        update = exported.adapter.updates[path]
        missing = (whole - (update.B @ update.A).double() * update.scale).norm() / whole.norm()
        assert exported.errors[path] == pytest.approx(float(S[3:].norm() / S.norm()), rel=1e-4)
        assert float(missing) == pytest.approx(exported.errors[path], rel=1e-4)


def test_trained_heads_travel_with_the_export() -> None:
    model = speclora(modules_to_save=["lm_head"])
    assert "base_model.model.lm_head.weight" in as_lora(model).adapter.tensors


def test_exports_that_cannot_be_are_refused() -> None:
    model = speclora(lora_bias=True)
    with pytest.raises(AdapterError, match=r"LoRA biases"):
        as_lora(model)
    with pytest.raises(InputError, match=r"rank to truncate to is 0"):
        as_lora(model, rank=0)
    with pytest.raises(AdapterError, match=r"no SpecLoRA adapter 'default'"):
        as_lora(tiny.lora(tiny.llama()))


@pytest.mark.parametrize(("basis", "rows"), [("rows", "first"), ("rows", "norm"), ("svd", "first")])
def test_the_derivative_of_each_example_by_delta_is_that_of_the_example_alone(basis: str, rows: str) -> None:
    model = speclora(basis=basis, rows=rows)
    batch = tiny.batch()
    found = measure_speclora(model, [batch], loss=tiny.loss)
    np.testing.assert_allclose(found.lora.losses, tiny.loss(model, batch).detach(), rtol=1e-6)
    for i in range(3):
        model.zero_grad()
        tiny.loss(model, {key: value[i : i + 1] for key, value in batch.items()}).sum().backward()
        for path, layer in layers(model).items():
            alone = layer.lora_spec["default"].delta.grad.numpy()
            np.testing.assert_allclose(found.delta_gradient[path][i], alone, rtol=1e-3, atol=1e-5)


def test_gate_gradients_of_both_parts_agree_with_central_differences() -> None:
    model = get_peft_model(tiny.llama(dtype=torch.float64, attention_bias=True), config())
    trained(model)
    batch = tiny.batch()
    found = measure_speclora(model, [batch], loss=tiny.loss)
    path = "model.layers.0.self_attn.v_proj"
    scale = layers(model)[path].lora_spec["default"]
    before, h = scale.delta.detach().clone(), 1e-5
    order = np.argsort(-np.abs(before.numpy()), kind="stable")
    for position, row in enumerate(order):
        sides = []
        for gate in (1 + h, 1 - h):
            scale.delta.data = before.clone()
            scale.delta.data[row] *= gate
            sides.append(tiny.loss(model, batch).detach().numpy())
        scale.delta.data = before.clone()
        difference = (sides[0] - sides[1]) / (2 * h)
        np.testing.assert_allclose(found.delta.modules[path].gate_gradient[:, position], difference, atol=1e-7)


def test_measuring_changes_nothing_and_leaves_no_hook() -> None:
    model = speclora()
    before = logits(model)
    measure_speclora(model, [tiny.batch()], loss=tiny.loss)
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_untrained_adapter_has_gradients_and_no_components_of_delta() -> None:
    model = get_peft_model(tiny.llama(), config()).eval()
    found = measure_speclora(model, [tiny.batch()], loss=tiny.loss)
    assert not found.delta.modules
    assert all((gradient != 0).all() for gradient in found.delta_gradient.values())


def test_weakening_both_parts_scales_the_whole_update() -> None:
    model = speclora()
    before = {path: layer.get_delta_weight("default").detach() for path, layer in layers(model).items()}
    found = measure_speclora(model, [tiny.batch()], loss=tiny.loss)
    half = policies.parse("scale:strength=0.5")
    report = edit_speclora(model, half, found, delta_policy=half)
    assert report.edited == report.components
    for path, layer in layers(model).items():
        torch.testing.assert_close(layer.get_delta_weight("default").detach(), 0.5 * before[path])


def test_without_a_policy_of_their_own_the_deltas_stay_and_the_base_model_is_told_apart() -> None:
    model = speclora(delta_bound=0.5)
    deltas = {path: layer.lora_spec["default"].delta.detach().clone() for path, layer in layers(model).items()}
    found = measure_speclora(model, [tiny.batch()], loss=tiny.loss)
    edit_speclora(model, policies.SmoothAbs(), found)
    assert all(torch.equal(layer.lora_spec["default"].delta, deltas[path]) for path, layer in layers(model).items())
    edited = lora_part(model)
    assert edited.digest != found.lora.about["adapter_sha256"]


def test_a_bounded_delta_is_gated_as_it_acts_and_not_beyond_its_bound() -> None:
    model = speclora(delta_bound=0.5)
    effective = {path: layer.lora_spec["default"].effective.detach() for path, layer in layers(model).items()}
    found = measure_speclora(model, [tiny.batch()], loss=tiny.loss)
    identity = policies.parse("identity")
    with pytest.raises(PolicyError, match=r"delta_bound is 0.5"):
        edit_speclora(
            model,
            identity,
            found,
            delta_policy=policies.parse("scale:strength=5"),
            constraint=Constraint(energy="none"),
        )
    edit_speclora(model, identity, found, delta_policy=policies.parse("scale:strength=0.5"))
    for path, layer in layers(model).items():
        torch.testing.assert_close(layer.lora_spec["default"].effective.detach(), 0.5 * effective[path])
