"""Sensitivities against two other routes, and the promise that measuring leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from torch import Tensor

from spectral_surgery import Adapter, Live
from spectral_surgery.errors import DataError, RunError
from spectral_surgery.measuring import measure_live

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {
        "rank_pattern": {"o_proj": 6, "layers.1.mlp.down_proj": 1},
        "alpha_pattern": {"v_proj": 3},
    },
    "bias": {"lora_bias": True},
}


def measured(model: PeftModel, rows: dict[str, Tensor], **options: object) -> dict[str, np.ndarray]:
    live = Live(model)
    found = measure_live(live, [rows], loss=tiny.loss, **options)
    return {path: module.gate_gradient for path, module in found.modules.items()}


def by_dense_singular_values(model: PeftModel, rows: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The same derivatives with each layer replaced by base + scale U diag(S) Vh, S a leaf, one example at a time."""
    adapter = Adapter.from_model(model)
    values: dict[str, Tensor] = {}
    handles = []
    for path, update in adapter.updates.items():
        layer = model.get_base_model().get_submodule(path)
        U, S, Vh = torch.linalg.svd(update.B.double() @ update.A.double(), full_matrices=False)
        rank = update.A.shape[0]
        values[path] = S[:rank].clone().requires_grad_()
        bias = layer.lora_B["default"].bias

        def dense(
            module,
            inputs,
            out,
            U=U[:, :rank],
            S=values[path],
            Vh=Vh[:rank],
            s=update.scale,
            bias=bias,
        ):
            (x,) = inputs
            return module.base_layer(x) + s * (x @ Vh.T * S @ U.T + (0 if bias is None else bias))

        handles.append(layer.register_forward_hook(dense))
    result = {path: [] for path in values}
    for i in range(len(rows["labels"])):
        loss = tiny.loss(model, {key: value[i : i + 1] for key, value in rows.items()})
        gradients = torch.autograd.grad(loss.sum(), list(values.values()))
        for (path, S), gradient in zip(values.items(), gradients, strict=True):
            result[path].append((S.detach() * gradient).numpy())
    for handle in handles:
        handle.remove()
    return {path: np.stack(parts) for path, parts in result.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_per_example_sensitivities_equal_autograd_through_explicit_singular_values(
    variant: str,
) -> None:
    model = tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64, **VARIANTS[variant])
    rows = tiny.batch()
    ours, dense = measured(model, rows), by_dense_singular_values(model, rows)
    assert ours.keys() == dense.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], dense[path], rtol=1e-9, atol=1e-12, err_msg=path)


def test_sensitivities_equal_central_differences_of_the_gated_loss() -> None:
    model = tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64, use_rslora=True)
    live, rows, step = Live(model), tiny.batch(), 1e-5
    found = measure_live(live, [rows], loss=tiny.loss)
    for path in live.paths[::3]:
        for k in range(4):
            gates = np.ones(4)
            sides = []
            for sign in (1, -1):
                gates[k] = 1 + sign * step
                with live.gated({path: gates}), torch.no_grad():
                    sides.append(tiny.loss(model, rows).numpy())
            difference = (sides[0] - sides[1]) / (2 * step)
            np.testing.assert_allclose(found.modules[path].gate_gradient[:, k], difference, rtol=1e-6, atol=1e-10)


def test_sensitivity_is_the_gate_derivative_divided_by_the_singular_value() -> None:
    live = Live(tiny.lora(tiny.llama()))
    module = measure_live(live, [tiny.batch()], loss=tiny.loss).modules[live.paths[0]]
    np.testing.assert_allclose(module.sensitivity * module.S, module.gate_gradient, rtol=1e-6)


def test_padding_and_batching_do_not_change_an_example() -> None:
    model = tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64)
    rows = tiny.batch()
    together = measured(model, rows)
    for i, length in enumerate(rows["attention_mask"].sum(1)):
        alone = measured(model, {key: value[i : i + 1, :length] for key, value in rows.items()})
        for path in together:
            np.testing.assert_allclose(alone[path][0], together[path][i], rtol=1e-9, atol=1e-13)


def test_output_energy_is_the_mean_square_of_each_component_over_real_tokens() -> None:
    model = tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64)
    live, rows = Live(model), tiny.batch()
    path = live.paths[-1]
    seen = []
    layer = model.get_base_model().get_submodule(path)
    handle = layer.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].detach()))
    energy = measure_live(live, [rows], loss=tiny.loss).modules[path].energy
    handle.remove()
    spectrum, scale = live.spectra[path], live.adapter.updates[path].scale
    outputs = scale * (seen[0] @ spectrum.Vh.T) * spectrum.S
    mask = rows["attention_mask"][..., None]
    expected = ((outputs**2 * mask).sum(1) / mask.sum(1)).mean(0)
    np.testing.assert_allclose(energy, expected.numpy(), rtol=1e-9)


def test_gradient_checkpointing_changes_nothing_and_really_recomputes() -> None:
    model = tiny.lora(tiny.llama())
    calls = []
    handle = model.get_base_model().model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    plain = measured(model, tiny.batch())
    once = len(calls)
    recomputed = measured(model, tiny.batch(), checkpointing=True)
    handle.remove()
    assert len(calls) - once == 2 * once
    for path in plain:
        np.testing.assert_array_equal(plain[path], recomputed[path])


def test_measuring_leaves_flags_gradients_hooks_and_outputs_as_they_were() -> None:
    model = tiny.lora(tiny.llama())
    model.train()
    model.get_base_model().model.layers[0].eval()
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    learning = [p.requires_grad for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    measured(model, tiny.batch(), checkpointing=True)
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == learning
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, weights, model.parameters()))


def test_an_exception_in_the_loss_leaves_no_hook_behind() -> None:
    model = tiny.lora(tiny.llama())

    def fails(model: object, rows: object) -> Tensor:
        raise RuntimeError("user code")

    with pytest.raises(RuntimeError, match="user code"):
        measure_live(Live(model), [tiny.batch()], loss=fails)
    assert not any(module._forward_hooks for module in model.modules())
    assert any(p.requires_grad for p in model.parameters())


def test_dropout_is_off_while_measuring_a_model_in_training_mode() -> None:
    model = tiny.lora(tiny.llama(), lora_dropout=0.5)
    model.eval()
    quiet = measured(model, tiny.batch())
    model.train()
    again = measured(model, tiny.batch())
    for path in quiet:
        np.testing.assert_array_equal(quiet[path], again[path])


def test_bfloat16_sensitivities_are_no_worse_than_plain_autograd_in_bfloat16() -> None:
    exact = tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64)
    low = tiny.lora(tiny.llama(dtype=torch.bfloat16))
    rows = tiny.batch()
    reference, ours = measured(exact, rows), measured(low, rows)
    low.requires_grad_(False)
    factors = {path: low.get_base_model().get_submodule(path).lora_B["default"].weight for path in ours}
    live = Live(low)
    for factor in factors.values():
        factor.requires_grad_()
    plain = {path: [] for path in ours}
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in rows.items()}
        gradients = torch.autograd.grad(tiny.loss(low, one).sum(), list(factors.values()))
        for (path, factor), gradient in zip(factors.items(), gradients, strict=True):
            U = live.spectra[path].U
            plain[path].append(((U.T @ gradient.double()) * (U.T @ factor.double())).sum(1).detach().numpy())

    def error(found: dict[str, np.ndarray]) -> float:
        difference = sum(np.square(np.asarray(found[p]) - reference[p]).sum() for p in reference)
        return float(np.sqrt(difference / sum(np.square(reference[p]).sum() for p in reference)))

    assert error(ours) <= 1.1 * error(plain) + 1e-4
    assert error(ours) < 0.15


def test_a_batch_mean_as_loss_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(\) for 3 examples, expected \(3,\)"):
        measure_live(Live(tiny.lora(tiny.llama())), [tiny.batch()], loss=lambda m, b: tiny.loss(m, b).mean())


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(RunError, match="The loss of 3 of 3 examples is not finite"):
        measure_live(
            Live(tiny.lora(tiny.llama())),
            [tiny.batch()],
            loss=lambda m, b: tiny.loss(m, b) * torch.inf,
        )


def test_no_batches_is_an_error() -> None:
    with pytest.raises(DataError, match="no examples to measure on"):
        measure_live(Live(tiny.lora(tiny.llama())), [], loss=tiny.loss)


def test_layers_whose_first_dimension_is_not_the_batch_are_measured_one_example_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64, target_modules=["down_proj"])
    reference = measured(model, tiny.batch())
    for layer in model.get_base_model().model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: forward(x.flatten(0, 1)).view(x.shape)
    found = measured(model, tiny.batch())
    assert "Measuring one example at a time" in caplog.text
    for path in reference:
        np.testing.assert_allclose(found[path], reference[path], rtol=1e-9, atol=1e-13)


def test_out_of_memory_halves_the_batch_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64)
    rows = tiny.batch(rows=5)
    whole = measure_live(Live(model), [rows], loss=tiny.loss)

    def hungry(model: PeftModel, rows: dict[str, Tensor]) -> Tensor:
        if len(rows["labels"]) > 2:
            raise torch.OutOfMemoryError
        return tiny.loss(model, rows)

    halved = measure_live(Live(model), [rows], loss=hungry)
    assert "Out of memory with 5 examples" in caplog.text
    np.testing.assert_allclose(halved.losses, whole.losses, rtol=1e-12)
    for path, module in whole.modules.items():
        found = halved.modules[path].gate_gradient
        np.testing.assert_allclose(found, module.gate_gradient, rtol=1e-9, atol=1e-13)


def test_out_of_memory_with_one_example_says_what_to_do() -> None:
    def never(model: PeftModel, rows: dict[str, Tensor]) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(RunError, match="One example alone needs more memory than there is"):
        measure_live(Live(tiny.lora(tiny.llama())), [tiny.batch()], loss=never)
