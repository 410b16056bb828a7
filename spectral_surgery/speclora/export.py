"""SpecLoRA adapters for programs that only know LoRA.

Scales and factors together are one update of rank r + k at most:

    E diag(delta) E^T W + s B A  =  [B, E] [s A; diag(delta) E^T W]

so plain LoRA of rank r + k holds it exactly (before storage rounding), and a truncated SVD of it, taken through the
thin factors, holds it with a known error. The exact one is large: it stores k rows of every weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.adapter import Adapter, AdapterConfig
from spectral_surgery.errors import AdapterError, InputError
from spectral_surgery.speclora.layer import SpecLoraLayer
from spectral_surgery.spectrum import LowRank, thin_svd

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any

KEPT_FIELDS = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "lora_dropout",
    "trainable_token_indices",
)
"""What a configuration says about where an adapter belongs, rather than what it is."""


@dataclass(frozen=True)
class Exported:
    """A plain LoRA adapter and what it lost."""

    adapter: Adapter
    errors: Mapping[str, float]
    """Per module: Frobenius norm of what was cut off over that of the whole update; 0 where nothing was."""


def speclora_layers(model: PeftModel, adapter_name: str = "default") -> dict[str, SpecLoraLayer]:
    """Returns the layers that hold an adapter, by module path.

    Raises:
        AdapterError: If the model has no SpecLoRA adapter of this name.
    """
    found = {m.path: m for m in model.modules() if isinstance(m, SpecLoraLayer) and adapter_name in m.lora_A}
    if not found:
        raise AdapterError(f"The model has no SpecLoRA adapter {adapter_name!r}. Load it with PeftModel first.")
    return found


@torch.no_grad()
def factors(layer: SpecLoraLayer, adapter_name: str = "default") -> LowRank:
    """Returns the whole update of one layer as factors of rank r + k, scale 1, float32 at least."""
    B, A = layer.lora_B[adapter_name].weight, layer.lora_A[adapter_name].weight
    dtype = torch.promote_types(B.dtype, torch.float32)
    B, A = B.to(dtype), layer.scaling[adapter_name] * A.to(dtype)
    scale = layer.scale_of(adapter_name)
    if scale is None:
        return LowRank(B, A, 1.0)
    k = len(scale.delta)
    unit = torch.eye(k, dtype=dtype, device=B.device)
    basis = scale.spread(unit.new_zeros(k, layer.out_features), unit).T
    scaled = scale.effective.to(dtype)[:, None] * scale.coordinates(layer.frozen_weight().to(dtype).T).T
    return LowRank(torch.cat([B, basis], 1), torch.cat([A, scaled]), 1.0)


def as_lora(
    model: PeftModel,
    rank: int | None = None,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """Returns a SpecLoRA adapter as plain LoRA: one rank for all modules, scale 1, no patterns.

    Args:
        model: The loaded model; on a quantised base the result belongs to that quantised base.
        rank: Rank to truncate to; by default the exact r + k of the largest module, others padded with zeros.
        adapter_name: Which adapter.
        dtype: What the factors are stored in.

    Raises:
        AdapterError: If there is no such adapter, or it has LoRA biases.
        InputError: If the rank is not positive.
    """
    if rank is not None and rank < 1:
        raise InputError(f"The rank to truncate to is {rank}, expected at least 1.")
    layers = speclora_layers(model, adapter_name)
    if any(layer.lora_bias[adapter_name] for layer in layers.values()):
        raise AdapterError("The adapter has LoRA biases, which scaled factors cannot hold. Merge it instead.")
    whole = {path: factors(layer, adapter_name) for path, layer in layers.items()}
    common = rank or max(update.A.shape[0] for update in whole.values())
    tensors, errors = {}, {}
    for path, update in whole.items():
        cut, errors[path] = (update, 0.0) if rank is None else _truncated(update, rank)
        for side, factor in (("A", _padded(cut.A, common)), ("B", _padded(cut.B.T, common).T)):
            tensors[f"base_model.model.{path}.lora_{side}.weight"] = factor.to("cpu", dtype).contiguous()
    config = lora_config(model, adapter_name) | {"r": common, "lora_alpha": common}
    return Exported(_adapter(config, tensors | dict(_others(model, adapter_name))), errors)


def save_as_lora(out: str | Path, model: PeftModel, rank: int | None = None, **options: Any) -> dict[str, float]:
    """Writes :func:`as_lora` to a new folder and returns its errors by module path.

    Args:
        out: Folder to write.
        model: The loaded model.
        rank: See :func:`as_lora`.
        options: See :func:`as_lora`.

    Raises:
        InputError: What :func:`as_lora` raises, or the folder may not be written.
        RunError: If writing or verifying fails.
    """
    exported = as_lora(model, rank, **options)
    exported.adapter.save(out)
    return dict(exported.errors)


def lora_config(model: PeftModel, adapter_name: str = "default") -> dict[str, Any]:
    """Returns a raw LoRA configuration that belongs to the same base model and modules."""
    raw = model.peft_config[adapter_name].to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in raw.items()}
    return {"peft_type": "LORA", "inference_mode": True} | {name: plain[name] for name in KEPT_FIELDS if name in plain}


def _adapter(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    return Adapter(AdapterConfig(config), tensors, {"format": "pt"}, None, "a SpecLoRA adapter as LoRA")


def _others(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields what an adapter holds beside its layers: trained heads, tokens, biases."""
    from peft import get_peft_model_state_dict

    for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if ".lora_" not in name:
            yield name, tensor.detach().cpu().contiguous()


def _truncated(update: LowRank, rank: int) -> tuple[LowRank, float]:
    """Returns the best update of a rank, and the share of the Frobenius norm that it misses."""
    spectrum = thin_svd(update)
    root = spectrum.S[:rank].sqrt()
    S = spectrum.S.numpy()
    missing = float(np.linalg.norm(S[rank:]) / np.linalg.norm(S)) if S.any() else 0.0
    return LowRank(spectrum.U[:, :rank] * root, root[:, None] * spectrum.Vh[:rank], 1.0), missing


def _padded(factor: Tensor, rank: int) -> Tensor:
    return torch.cat([factor, factor.new_zeros(rank - factor.shape[0], factor.shape[1])])
