"""The SpecLoRA tuner: forward and gradients against the dense formula, merging, adapters side by side."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from spectral_surgery.errors import AdapterError, BaseModelError, InputError, RunError
from spectral_surgery.speclora import SpecLoraConfig, SpecLoraLayer, parameter_groups

CHOICES = [
    ("rows", "first"),
    ("rows", "last"),
    ("rows", "random"),
    ("rows", "norm"),
    ("svd", "first"),
    ("svd", "last"),
    ("svd", "random"),
]


def config(**changes: Any) -> SpecLoraConfig:
    settings = dict(r=4, lora_alpha=8, k=6, target_modules=tiny.TARGETS, task_type="CAUSAL_LM")
    return SpecLoraConfig(**{**settings, **changes})


def layers(model: PeftModel) -> dict[str, SpecLoraLayer]:
    return {m.path: m for m in model.modules() if isinstance(m, SpecLoraLayer)}


def trained(model: PeftModel, seed: int = 3, name: str = "default", size: float = 0.3) -> PeftModel:
    """Gives every factor and delta of an adapter random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if f".{name}." in key:
                weight.copy_(size * torch.randn(weight.shape, generator=generator))
    return model.eval()


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.batch()["input_ids"], **more).logits


def dense(layer: SpecLoraLayer, d: Tensor, name: str = "default") -> Tensor:
    """Returns the weight by the paper's formula, ``Gamma * W + s B A``, or ``W + U diag(d - 1) U^T W``."""
    scale, W = layer.lora_spec[name], layer.frozen_weight()
    update = layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
    if hasattr(scale, "U"):
        return W + scale.U @ torch.diag(d - 1) @ scale.U.T @ W + update
    gamma = torch.ones_like(W)
    rows = scale.rows if hasattr(scale, "rows") else torch.arange(scale.start, scale.start + len(d))
    return gamma.index_copy(0, rows, d[:, None].expand(-1, W.shape[1])) * W + update


@pytest.mark.parametrize(("basis", "rows"), CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_new_adapter_changes_nothing_at_all(basis: str, rows: str, dtype: torch.dtype) -> None:
    before = logits(tiny.llama(attention_bias=True, dtype=dtype))
    model = get_peft_model(tiny.llama(attention_bias=True, dtype=dtype), config(basis=basis, rows=rows)).eval()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("basis", "rows"), CHOICES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_output_and_gradient_of_every_parameter_equal_those_of_the_dense_formula(
    basis: str, rows: str, bias: bool
) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(7, 11, bias=bias)).double(),
        SpecLoraConfig(r=3, lora_alpha=5, k=4, basis=basis, rows=rows, target_modules=["0"]),
    )
    trained(model)
    layer = layers(model)["0"]
    x = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = torch.randn(2, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [x, layer.lora_spec["default"].delta, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    out = model(x)
    dense_out = nn.functional.linear(x, dense(layer, 1 + leaves[1]), layer.get_base_layer().bias)
    torch.testing.assert_close(out, dense_out, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((out * wanted).sum(), leaves)
    theirs = torch.autograd.grad((dense_out * wanted).sum(), leaves)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


def test_the_svd_basis_multiplies_exactly_the_chosen_singular_values() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(9, 12)).double(),
        SpecLoraConfig(r=2, k=3, basis="svd", target_modules=["0"], delta_bound=None),
    )
    layer = layers(model)["0"]
    before = torch.linalg.svdvals(layer.frozen_weight())
    layer.lora_spec["default"].delta.data = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    after = torch.linalg.svdvals(layer.frozen_weight() + layer.get_delta_weight("default").detach())
    expected = before.clone()
    expected[:3] *= torch.tensor([1.9, 1.6, 1.3], dtype=torch.float64)
    torch.testing.assert_close(after, expected)


def test_the_norm_rows_are_those_with_the_largest_norm() -> None:
    model = get_peft_model(tiny.llama(), config(rows="norm"))
    for layer in layers(model).values():
        norms = layer.frozen_weight().norm(dim=1)
        rows = layer.lora_spec["default"].rows
        others = torch.ones_like(norms, dtype=torch.bool).index_fill(0, rows, False)
        assert norms[rows].min() >= norms[others].max()


def test_random_rows_depend_on_the_seed_and_the_module_alone() -> None:
    def rows(**changes: Any) -> dict[str, list[int]]:
        model = get_peft_model(tiny.llama(), config(rows="random", **changes))
        return {path: layer.lora_spec["default"].rows.tolist() for path, layer in layers(model).items()}

    everywhere, few = rows(), rows(target_modules=["v_proj"])
    assert all(everywhere[path] == chosen for path, chosen in few.items())
    assert rows(selection_seed=1) != everywhere
    assert len({tuple(chosen) for chosen in everywhere.values()}) > 1


def test_k_is_capped_by_the_rows_and_a_pattern_overrides_it() -> None:
    model = get_peft_model(tiny.llama(), config(k=40, k_pattern={"o_proj": 0, r"layers\.1\.mlp\.down_proj": 5}))
    found = {path: layer.scale_of("default") for path, layer in layers(model).items()}
    sizes = {path: len(scale.delta) for path, scale in found.items() if scale is not None}
    assert not any("o_proj" in path for path in sizes)
    assert sizes["model.layers.1.mlp.down_proj"] == 5
    assert sizes["model.layers.0.mlp.down_proj"] == sizes["model.layers.0.self_attn.q_proj"] == 32
    assert sizes["model.layers.0.self_attn.v_proj"] == 16


def test_the_bound_holds_and_leaves_a_gradient() -> None:
    model = trained(get_peft_model(tiny.llama(), config(delta_bound=0.1)), size=5.0)
    for layer in layers(model).values():
        scale = layer.lora_spec["default"]
        assert 0 < scale.effective.abs().max() <= 0.1
    tiny.loss(model, tiny.batch()).sum().backward()
    assert all(layer.lora_spec["default"].delta.grad.isfinite().all() for layer in layers(model).values())


@pytest.mark.parametrize(("basis", "rows"), CHOICES)
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_merging_computes_the_same_and_unmerging_restores_every_bit(basis: str, rows: str, use_rslora: bool) -> None:
    chosen = config(basis=basis, rows=rows, use_rslora=use_rslora, rank_pattern={"q_proj": 2})
    model = trained(get_peft_model(tiny.llama(attention_bias=True), chosen))
    before = {path: layer.get_base_layer().weight.clone() for path, layer in layers(model).items()}
    unmerged = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
    assert max(layer.merge_rounding for layer in layers(model).values()) < 1e-6
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_layer().weight, before[path]) for path, layer in layers(model).items())
    assert torch.equal(logits(model), unmerged)


def test_a_merged_bfloat16_base_comes_back_bit_for_bit_with_a_delta_that_zeroes_rows() -> None:
    model = trained(get_peft_model(tiny.llama(dtype=torch.bfloat16), config()))
    for layer in layers(model).values():
        layer.lora_spec["default"].delta.data.fill_(-1.0)
    before = {path: layer.get_base_layer().weight.clone() for path, layer in layers(model).items()}
    model.merge_adapter()
    assert any(not torch.equal(layer.get_base_layer().weight, before[path]) for path, layer in layers(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_layer().weight, before[path]) for path, layer in layers(model).items())


def test_merge_and_unload_leaves_plain_layers_that_compute_the_same() -> None:
    model = trained(get_peft_model(tiny.llama(attention_bias=True), config()))
    before = logits(model)
    plain = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, SpecLoraLayer) for module in plain.modules())
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)


def test_a_broken_adapter_is_not_merged_safely() -> None:
    model = trained(get_peft_model(tiny.llama(), config()))
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    layer.lora_spec["default"].delta.data[0] = float("nan")
    with pytest.raises(RunError, match=r"q_proj: the merged weight is not finite"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged


def test_lora_biases_are_merged_and_unmerged_with_the_bias() -> None:
    model = trained(get_peft_model(tiny.llama(attention_bias=True), config(lora_bias=True, target_modules=["q_proj"])))
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_a_disabled_adapter_is_the_base_model_also_while_merged() -> None:
    base = logits(tiny.llama())
    model = trained(get_peft_model(tiny.llama(), config()))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def two_adapters() -> PeftModel:
    model = get_peft_model(tiny.llama(attention_bias=True), config())
    model.add_adapter("other", config(rows="random", r=2, k=4))
    trained(model)
    return trained(model, seed=4, name="other")


def test_two_active_adapters_add_up_in_any_order_merged_or_not() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    forward = logits(model)
    model.base_model.set_adapter(["other", "default"])
    torch.testing.assert_close(logits(model), forward, rtol=1e-5, atol=1e-5)
    for order in (["default", "other"], ["other", "default"]):
        model.merge_adapter([order[0]])
        model.merge_adapter([order[1]])
        torch.testing.assert_close(logits(model), forward, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model), forward, rtol=1e-5, atol=1e-5)


def test_rows_of_a_mixed_batch_use_their_own_adapters() -> None:
    model = two_adapters()
    ids = tiny.batch()["input_ids"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["other", "__base__", "default"]).logits
        with model.disable_adapter():
            base = model(input_ids=ids[1:2]).logits
        model.set_adapter("default")
        default = model(input_ids=ids[2:3]).logits
        model.set_adapter("other")
        other = model(input_ids=ids[0:1]).logits
    torch.testing.assert_close(mixed, torch.cat([other, base, default]), rtol=1e-5, atol=1e-5)


def test_only_the_active_adapter_learns_and_a_deleted_one_is_gone() -> None:
    model = two_adapters()
    model.set_adapter("other")
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(".other." in name for name in learning)
    assert any(name.endswith("lora_spec.other.delta") for name in learning)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not any(".other." in name for name in model.state_dict())


def test_a_combination_that_would_drop_the_scales_is_refused_and_an_svd_keeps_them() -> None:
    model = two_adapters()
    with pytest.raises(InputError, match=r"would drop the scales"):
        model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="linear")
    with pytest.raises(InputError, match=r"of 1 adapters"):
        model.base_model.add_weighted_adapter(["default"], [0.5], "half")
    wanted = {
        path: 0.5 * layer.get_delta_weight("default") + 2 * layer.get_delta_weight("other")
        for path, layer in layers(model).items()
    }
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", svd_rank=16)
    for path, layer in layers(model).items():
        torch.testing.assert_close(layer.get_delta_weight("both"), wanted[path], rtol=1e-4, atol=1e-4)


def test_conv1d_layers_are_scaled_by_output_and_merged_as_they_are_stored() -> None:
    before = logits(tiny.gpt2())
    chosen = SpecLoraConfig(r=4, k=10, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.gpt2(), chosen).eval()
    assert torch.equal(logits(model), before)
    trained(model)
    adapted = logits(model)
    layer = layers(model)["transformer.h.0.attn.c_attn"]
    assert isinstance(layer.get_base_layer(), Conv1D)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    d = 1 + layer.lora_spec["default"].delta
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense(layer, d), layer.get_base_layer().bias))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)


def test_delta_stays_in_float32_whatever_the_model_is_cast_to() -> None:
    model = get_peft_model(tiny.llama(dtype=torch.bfloat16), config(), autocast_adapter_dtype=False)
    trained(model)
    scale = layers(model)["model.layers.0.self_attn.q_proj"].lora_spec["default"]
    values = scale.delta.detach().clone()
    model.to(torch.bfloat16)
    assert scale.delta.dtype == torch.float32
    assert torch.equal(scale.delta, values)
    scale.delta.data = scale.delta.data.bfloat16()
    logits(model)
    assert scale.delta.dtype == torch.float32


def test_delta_has_its_own_learning_rate_and_decays_to_the_pretrained_weight() -> None:
    model = trained(get_peft_model(tiny.llama(), config(delta_learning_rate=10.0)))
    factors, deltas = parameter_groups(model, 1e-3, weight_decay=0.1)
    assert (factors["lr"], deltas["lr"]) == (1e-3, 1e-2)
    assert len(deltas["params"]) == len(layers(model))
    assert len(factors["params"]) == 2 * len(layers(model))
    before = deltas["params"][0].detach().clone()
    optimizer = torch.optim.AdamW([deltas])
    deltas["params"][0].grad = torch.zeros_like(before)
    optimizer.step()
    torch.testing.assert_close(deltas["params"][0].detach(), (1 - 1e-2 * 0.1) * before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_dora": True}, r"use_dora is switched on"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa'"),
        ({"k": -1}, r"k has k = -1, expected a whole number from 0"),
        ({"k_pattern": {"q_proj": -2}}, r"q_proj has k = -2"),
        ({"rows": "middle"}, r"rows is 'middle'"),
        ({"basis": "fourier"}, r"basis is 'fourier'"),
        ({"basis": "svd", "rows": "norm"}, r"ordered by singular value"),
        ({"delta_bound": 0.0}, r"delta_bound is 0.0"),
        ({"delta_learning_rate": 0.0}, r"delta_learning_rate is 0.0"),
        ({"layer_replication": [(0, 1)]}, r"layer_replication is switched on"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        config(**changes)


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(BaseModelError, match=r"embed_tokens is a Embedding"):
        get_peft_model(tiny.llama(), config(target_modules=["embed_tokens"]))


@pytest.mark.parametrize("name", ["gptqmodel.MarlinQuantLinear", "awq.WQLinear_GEMM", "hqq.HQQLinear"])
def test_a_layer_of_a_quantiser_that_is_not_known_is_refused_by_its_name(name: str) -> None:
    """Stand-ins: a linear layer whose packed weight has another name and dtype, as these libraries have it."""
    family, _, kind = name.partition(".")

    def start(self: nn.Module) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = 8, 8, None
        self.qweight = nn.Parameter(torch.zeros(8, 1, dtype=torch.int32), requires_grad=False)

    stand_in = type(kind, (nn.Module,), {"__init__": start, "__module__": f"{family}.nn"})
    with pytest.raises(BaseModelError, match=rf"0 is a {kind} with a missing weight, and SpecLoRA takes"):
        get_peft_model(nn.Sequential(stand_in()), SpecLoraConfig(target_modules=["0"]))


def test_a_tensor_parallel_layer_is_refused_by_name() -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    base[0]._hf_tp_plan = "colwise"
    with pytest.raises(BaseModelError, match=r"0 is split over devices by tensor parallelism"):
        get_peft_model(base, SpecLoraConfig(target_modules=["0"]))


def test_a_float8_weight_that_needs_a_scale_beside_it_is_refused() -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    base[0].weight = nn.Parameter(base[0].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(BaseModelError, match=r"0 is a Linear with a torch.float8_e4m3fn weight"):
        get_peft_model(base, SpecLoraConfig(target_modules=["0"]))


def test_plain_lora_is_the_case_of_no_rows() -> None:
    ours = trained(get_peft_model(tiny.llama(), config(k=0)))
    plain = LoraConfig(r=4, lora_alpha=8, target_modules=tiny.TARGETS, task_type="CAUSAL_LM")
    theirs = trained(get_peft_model(tiny.llama(), plain))
    assert torch.equal(logits(ours), logits(theirs))


def test_an_adapter_without_its_scales_in_the_file_does_not_load() -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = trained(get_peft_model(tiny.llama(), config()))
    state = get_peft_model_state_dict(model)
    short = {name: tensor for name, tensor in state.items() if "q_proj.lora_spec" not in name}
    with pytest.raises(AdapterError, match=r"2 of 8 tensors of scales are missing"):
        set_peft_model_state_dict(model, short)


def kept_bytes(chosen: LoraConfig) -> int:
    """Returns what autograd keeps for the backward pass of one wide layer, parameters not counted."""
    model = get_peft_model(nn.Sequential(nn.Linear(64, 4096, bias=False)), chosen)
    known = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(torch.zeros(1, 32, 64, requires_grad=True))
    assert out.requires_grad
    return sum(kept.values())


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, views of what is there not counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def largest_of_a_step(model: Any) -> int:
    x = torch.zeros(2, 16, 256, requires_grad=True)
    with Largest(model) as largest:
        model(x).sum().backward()
    return largest.size


@pytest.mark.parametrize(("basis", "rows"), CHOICES)
def test_a_training_step_makes_no_copy_of_the_weight_not_even_a_passing_one(basis: str, rows: str) -> None:
    """The weight has 131,072 numbers; the largest that is made is the output, 32 tokens of 512, or a factor."""
    chosen = SpecLoraConfig(r=4, k=40, basis=basis, rows=rows, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(256, 512)), chosen)
    assert largest_of_a_step(model) <= 512 * 40
    base = nn.Linear(256, 512)
    gamma = nn.Parameter(torch.ones(512, 1))
    naive = nn.Module()
    naive.forward = lambda x: nn.functional.linear(x, gamma * base.weight)  # type: ignore[method-assign]
    assert largest_of_a_step(naive) == 512 * 256


@pytest.mark.parametrize("rows", ["first", "random"])
def test_scales_keep_tokens_times_k_numbers_and_no_copy_of_the_weight(rows: str) -> None:
    lora = kept_bytes(LoraConfig(r=2, target_modules=["0"]))
    ours = kept_bytes(SpecLoraConfig(r=2, k=8, rows=rows, target_modules=["0"]))
    tokens, k = 32, 8
    assert 4 * tokens * k <= ours - lora <= 2 * 4 * tokens * k + 100
