"""Quantised and offloaded bases, kinds that exist only on them, and kernels without a backward pass."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import accelerate
import dense_kinds
import kind_errors
import kinds
import numpy as np
import peft.tuners.lora.model as lora_model
import pytest
import tiny
import torch
from kinds import CASES, Case
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from spectral_surgery import Adapter, Live, edit, policies
from spectral_surgery.adapter import AdapterConfig
from spectral_surgery.errors import BaseModelError, DataError, RunError
from spectral_surgery.live import check_fits
from spectral_surgery.measuring import measure_live
from spectral_surgery.surgery import operate


def quantised(method: str) -> Any:
    """The configuration of one way to quantise; skips where its package, the extra quantized, is not installed."""
    pytest.importorskip("torchao" if method == "torchao_int8" else "bitsandbytes")
    if method == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if method == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose matrices are large enough for blocks of 64."""
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def loaded(base: Path, method: str) -> Any:
    device = {"device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantised(method), **device
    ).eval()


# PEFT refuses DoRA on torchao, and bitsandbytes cannot dequantise 8 bits twice on a CPU.
@pytest.mark.parametrize(
    ("method", "dora"), [("bnb_4bit", False), ("bnb_4bit", True), ("bnb_8bit", False), ("torchao_int8", False)]
)
def test_on_quantised_bases_live_gates_are_the_edited_file_and_sensitivities_its_derivative(
    method: str, dora: bool, base: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=dora
    )
    get_peft_model(loaded(base, method), config).save_pretrained(tmp_path / "adapter")
    adapter = Adapter.load(tmp_path / "adapter")
    gates = kind_errors.random_gates(adapter)
    adapter.with_updates(*operate(adapter.updates, gates)).save(tmp_path / "edited")
    model = PeftModel.from_pretrained(loaded(base, method), str(tmp_path / "adapter")).eval()
    edited = PeftModel.from_pretrained(loaded(base, method), str(tmp_path / "edited")).eval()
    live, rows = Live(model, adapter), tiny.batch()
    with torch.no_grad():
        wanted, before = kinds.of_tokens(edited, rows), kinds.of_tokens(model, rows)
        with live.gated(gates):
            found = kinds.of_tokens(model, rows)
    # Kernels that round their inputs to int8 make steps of last bits, here and in the differences.
    steps = method == "bnb_8bit"
    assert kind_errors.relative(found, wanted) < (2e-2 if steps else 2e-5)
    assert kind_errors.relative(before, wanted) > 0.05
    ours, judged = by_factors(live, rows) if steps else by_differences(live, rows, 2e-2)
    assert np.linalg.norm(ours - judged) < (1e-4 if steps else 2e-2) * np.linalg.norm(judged)


def by_factors(live: Live, rows: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Ours and PEFT's own derivative by lora_B, projected: ``sum_j U_jk (dL/dB B^T U)_jk``, one row at a time."""
    each = [{key: value[i : i + 1] for key, value in rows.items()} for i in range(3)]
    found = measure_live(live, each, loss=tiny.loss)
    ours, judged = [], []
    for path in live.paths:
        factor = live.model.get_base_model().get_submodule(path).lora_B["default"].weight.requires_grad_()
        U, stored = live.spectra[path].U, live.adapter.updates[path].B.double()
        for i, one in enumerate(each):
            (gradient,) = torch.autograd.grad(tiny.loss(live.model, one).sum(), [factor])
            judged.append(((U.T @ gradient.double()) * (U.T @ stored)).sum(1).numpy())
            ours.append(found.modules[path].gate_gradient[i])
    return np.array(ours), np.array(judged)


def by_differences(live: Live, rows: dict[str, Tensor], step: float) -> tuple[np.ndarray, np.ndarray]:
    """Ours and central differences, for the strongest component of every module."""
    found = measure_live(live, [rows], loss=tiny.loss)
    ours, differences = [], []
    for path in live.paths:
        gates, sides = np.ones(len(found.modules[path].S)), []
        for sign in (1, -1):
            gates[0] = 1 + sign * step
            with live.gated({path: gates}), torch.no_grad():
                sides.append(tiny.loss(live.model, rows).double().numpy())
        ours.append(found.modules[path].gate_gradient[:, 0])
        differences.append((sides[0] - sides[1]) / (2 * step))
    return np.array(ours), np.array(differences)


GROUP = 4


@pytest.fixture
def pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has PEFT put its GPTQ layer on plain linear layers, in place of kernels that need a GPU."""

    def dispatch(target: Any, adapter_name: str, config: LoraConfig, **settings: Any) -> Any:
        if isinstance(target, nn.Linear):
            return GPTQLoraLinear(target, adapter_name, config=config, **settings)
        return None

    monkeypatch.setattr(lora_model, "dispatch_gptq", dispatch)


def pooled(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """S B A kron(I, 1) n / g."""
    found = {}
    for path, A, B in dense_kinds.pairs(tensors):
        spread = torch.kron(torch.eye(A.shape[1]).double(), torch.ones(1, GROUP).double())
        found[path] = dense_kinds.scale(config) * B @ A @ spread * A.shape[1] / GROUP
    return found


QALORA = Case("QALoRA", "nn.Linear", settings={"use_qalora": True, "qalora_group_size": GROUP}, deltas=pooled)


@pytest.mark.parametrize("dtype", kind_errors.DTYPES)
def test_qalora_on_pefts_gptq_layer(
    dtype: str, pooling: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "qalora", QALORA)
    errors = kind_errors.Stored.make("qalora", dtype, tmp_path).errors()
    assert errors["effect"] > 0.1
    assert max(errors["identity"], errors["gates"], errors["live"]) < (3e-6 if dtype == "float32" else 4e-2)
    assert kind_errors.sensitivity_error("qalora") < 1e-7


def test_qalora_fits_its_base_by_the_shapes_of_pooled_inputs(pooling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Adapter.from_model(QALORA.adapted())
    monkeypatch.undo()  # the skeleton of a base is not quantised
    check_fits(adapter, QALORA.fresh().config)
    with pytest.raises(BaseModelError, match=r"the adapter has shape \(3, 8\), this base model needs \(3, 16\)"):
        check_fits(adapter, tiny.llama(hidden_size=64).config)


def test_qalora_on_a_base_where_peft_ignores_it_is_refused_live() -> None:
    with pytest.raises(BaseModelError, match=r"use_qalora switched on, which PEFT ignores .* set use_qalora to false"):
        Live(QALORA.adapted())


def test_adalora_modules_that_were_pruned_to_other_ranks_or_to_none(tmp_path: Path) -> None:
    case = CASES["adalora"]
    model = case.adapted()
    paths = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "ranknum")]
    keep = {path: [k < (i % 4) for k in range(5)] for i, path in enumerate(paths)}
    config = model.peft_config["default"]
    config.rank_pattern = {f"{path}.lora_E.default": mask for path, mask in keep.items()}
    for path in paths:
        model.get_base_model().get_submodule(path).lora_E["default"].data[~torch.tensor(keep[path])] = 0
    model.save_pretrained(tmp_path / "adapter")
    adapter = Adapter.load(tmp_path / "adapter")
    ranks = {path: update.A.shape[0] for path, update in adapter.updates.items()}
    assert ranks == {path: sum(mask) for path, mask in keep.items() if any(mask)}
    stored = kind_errors.Stored(case, tmp_path)
    errors = stored.errors()
    assert max(errors["identity"], errors["gates"], errors["live"]) < 3e-6
    check_fits(adapter, case.fresh().config)
    assert isinstance(config, AdaLoraConfig)


class Forward(torch.autograd.Function):
    """A kernel without a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError("no backward here")


@pytest.mark.parametrize("cut", ["raises", "detaches"])
def test_kernels_without_a_backward_pass_are_named(cut: str) -> None:
    live = Live(CASES["linear"].adapted())
    kernel = live.model.get_base_model().model.layers[1].self_attn.q_proj.base_layer
    layer = live.model.get_base_model().model.layers[1].mlp
    if cut == "raises":
        kernel.forward = lambda x: Forward.apply(x, kernel.weight)
    else:
        forward = layer.forward
        layer.forward = lambda x: forward(x).detach()
        live.model.get_base_model().model.layers[1].self_attn.register_forward_hook(
            lambda module, inputs, out: (out[0].detach(), *out[1:])
        )
    live.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(
        RunError, match=r"quantised by gptq, and its kernels have no backward pass here .*--base-model"
    ):
        measure_live(live, [tiny.batch()], loss=tiny.loss)


def test_a_loss_without_a_derivative_is_named() -> None:
    with pytest.raises(DataError, match=r"The loss has no derivative"):
        measure_live(
            Live(CASES["linear"].adapted()), [tiny.batch()], loss=lambda model, rows: tiny.loss(model, rows).detach()
        )


def test_rows_without_invocation_tokens_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    from spectral_surgery.live.loading import check_invoked

    @dataclasses.dataclass
    class Row:
        input_ids: tuple[int, ...]

    adapter = Adapter.from_model(CASES["alora"].adapted())
    check_invoked(adapter, [Row((1, *dense_kinds.INVOCATION, 4))])
    assert not caplog.text
    check_invoked(adapter, [Row((1, *dense_kinds.INVOCATION)), Row((4, 5))])
    assert "1 of 2 rows do not have the adapter's invocation tokens" in caplog.text
    with pytest.raises(DataError, match=r"invocation tokens \[7, 9\] on, and none of the 1 rows has them"):
        check_invoked(adapter, [Row((9, 7))])


@pytest.mark.parametrize("name", ["linear", "bdlora", "conv1d_gpt2"])  # others PEFT itself cannot run offloaded
def test_an_offloaded_model_is_gated_and_measured_as_one_in_memory(name: str) -> None:
    case, rows = CASES[name], tiny.batch()
    whole, split = case.adapted(), case.adapted()
    adapter = Adapter.from_model(whole)
    accelerate.cpu_offload(split, execution_device=torch.device("cpu"), offload_buffers=True)
    assert all(weight.is_meta for weight in split.parameters())
    gates = kind_errors.random_gates(adapter)
    answers = []
    for model in (whole, split):
        live = Live(model, adapter)
        with live.gated(gates), torch.no_grad():
            logits = kinds.of_tokens(model, rows)
        answers.append((logits, measure_live(live, [rows], loss=tiny.loss)))
    assert torch.equal(answers[0][0], answers[1][0])
    for path, module in answers[0][1].modules.items():
        np.testing.assert_allclose(answers[1][1].modules[path].gate_gradient, module.gate_gradient, rtol=1e-6)


def test_weights_that_are_not_in_memory_are_no_fault_except_for_doras_norms() -> None:
    """Offloading leaves meta tensors in the model between forward passes."""
    for name in ("linear", "dora"):
        model = CASES[name].adapted()
        adapter = Adapter.from_model(model)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to("meta"), requires_grad=False)
        layer.lora_B["default"].weight = nn.Parameter(layer.lora_B["default"].weight.to("meta"))
        if name == "linear":
            Live(model, copy.copy(adapter))
        else:
            with pytest.raises(BaseModelError, match="the weight is offloaded, and DoRA's row norms need it"):
                Live(model, adapter)


def per_expert(config: dict[str, Any]) -> Adapter:
    """What transformers 4 and PEFT wrote for a Mixture of Experts with one Linear an expert and projection."""
    shapes = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}
    tensors = {}
    for e in range(4):
        for name, (out, width) in shapes.items():
            path = f"base_model.model.model.layers.0.mlp.experts.{e}.{name}"
            tensors |= {f"{path}.lora_A.weight": torch.randn(3, width), f"{path}.lora_B.weight": torch.randn(out, 3)}
    raw = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": list(shapes), "task_type": "CAUSAL_LM"}
    return Adapter(AdapterConfig(raw | config), tensors)


def test_one_pair_an_expert_is_edited_as_a_file_and_refused_on_a_model_that_fuses_them(tmp_path: Path) -> None:
    adapter = per_expert({})
    assert "model.layers.0.mlp.experts.3.down_proj" in adapter.updates
    edited, report = edit(adapter, policies.Scale(strength=0.5))
    edited.save(tmp_path / "edited")
    assert report.edited > 0
    with pytest.raises(
        BaseModelError, match=r"experts\.0\.gate_proj: .* experts are fused.*save_pretrained\(folder\)\.$"
    ):
        check_fits(adapter, kinds.qwen_moe().config)
    with pytest.raises(BaseModelError, match=r"sqrt\(2\) too large"):
        check_fits(per_expert({"use_rslora": True}), kinds.qwen_moe().config)


@pytest.mark.parametrize("name", ["dora", "experts", "adalora", "tied"])
def test_recomputed_activations_give_the_same_sensitivities(name: str) -> None:
    case = CASES[name]
    live, rows = Live(case.adapted()), kind_errors.batch_of(case)
    plain = measure_live(live, [rows], loss=case.loss)
    recomputed = measure_live(live, [rows], loss=case.loss, checkpointing=True)
    for path, module in plain.modules.items():
        np.testing.assert_array_equal(recomputed.modules[path].gate_gradient, module.gate_gradient)


@pytest.mark.parametrize("name", ["dora", "experts", "experts_transposed", "attention", "tied", "adalora", "conv2d"])
def test_gates_that_are_tuned_get_the_measured_derivative(name: str) -> None:
    case = CASES[name]
    live, rows = Live(case.adapted(torch.float64)), kind_errors.batch_of(case, torch.float64)
    found = measure_live(live, [rows], loss=case.loss)
    gates = {path: torch.ones(len(module.S), dtype=torch.float64) for path, module in found.modules.items()}
    with live.still(), live.tuned({path: gate.requires_grad_() for path, gate in gates.items()}):
        case.loss(live.model, rows).sum().backward()
    for path, gate in gates.items():
        wanted = found.modules[path].gate_gradient.sum(0)
        np.testing.assert_allclose(gate.grad.numpy(), wanted, rtol=1e-6, atol=1e-12)


def test_an_alora_is_not_measured_with_recomputed_activations() -> None:
    with pytest.raises(
        BaseModelError, match=r"invocation tokens again when activations are recomputed\. Leave --grad"
    ):
        measure_live(Live(CASES["alora"].adapted()), [tiny.batch()], loss=tiny.loss, checkpointing=True)


@pytest.mark.parametrize("dora", [False, True])
def test_other_active_adapters_are_named_and_refused_beside_dora(dora: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = CASES["dora" if dora else "linear"].adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora))
    adapter = Adapter.from_model(model)
    model.base_model.set_adapter(["default", "other"])
    if dora:
        with pytest.raises(BaseModelError, match=r"other are active beside 'default', and DoRA's row norms"):
            Live(model, adapter)
    else:
        Live(model, adapter)
        assert "Adapters other are active as well" in caplog.text


def test_files_are_not_changed_by_reading(tmp_path: Path) -> None:
    CASES["experts"].adapted().save_pretrained(tmp_path)
    before = load_file(tmp_path / "adapter_model.safetensors")
    adapter = Adapter.load(tmp_path)
    operate(adapter.updates, kind_errors.random_gates(adapter))
    assert all(torch.equal(before[name], adapter.tensors[name]) for name in before)
