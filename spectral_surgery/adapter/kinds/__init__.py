"""Adapter kinds: which tensors of a file form one module's update, and where an edit of it is written.

Each kind is a module with ``read(config, tensors) -> {module path: Stored}``; together they must claim every tensor
whose name says LoRA. What none of them claims and is no LoRA tensor (modules_to_save, trained tokens, biases) passes
through unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds import linear
from spectral_surgery.adapter.kinds.linear import DTYPES, Stored
from spectral_surgery.errors import AdapterError

KINDS = (linear,)

__all__ = ["KINDS", "Stored", "read"]


def read(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Returns every module's update and the tensors that hold it, in the file's order.

    Raises:
        AdapterError: If a LoRA tensor belongs to no known kind, a kind finds its tensors inconsistent, or any tensor
            is not finite.
    """
    modules: dict[str, Stored] = {}
    for kind in KINDS:
        modules |= kind.read(config, tensors)
    claimed = {name for stored in modules.values() for name in stored.claims}
    unknown = [name for name in tensors if "lora_" in name and name not in claimed]
    if unknown:
        raise AdapterError(
            f"{len(unknown)} LoRA tensors are of a kind that is not edited, the first is {unknown[0]} "
            f"{tuple(tensors[unknown[0]].shape)}. Supported are lora_A.weight and lora_B.weight of linear layers."
        )
    if not modules:
        raise AdapterError(
            f"The adapter has {len(tensors)} tensors and none is a LoRA factor. Expected names such as "
            f"base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight."
        )
    if bad := [name for name, tensor in tensors.items() if tensor.dtype in DTYPES and not tensor.isfinite().all()]:
        raise AdapterError(
            f"{bad[0]} has values that are not finite. The training diverged; go back to an earlier checkpoint."
        )
    return modules
