"""Adapter kinds: which tensors of a file form an update, where an edit of it is written, where its gate sits.

To add one: a file with a :class:`Kind`, and its line in :data:`KINDS`. Together the kinds must claim every tensor
whose name says LoRA; what is no LoRA tensor (modules_to_save, trained tokens, biases) passes through unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds import (
    adalora,
    attention,
    bdlora,
    convolution,
    dora,
    embedding,
    experts,
    kasa,
    linear,
    qalora,
    variants,
)
from spectral_surgery.adapter.kinds.kind import (
    DTYPES,
    PREFIX,
    Kind,
    Module,
    Place,
    Seat,
    Slot,
    Stored,
    modules,
    plain_name,
)
from spectral_surgery.errors import AdapterError, combine
from spectral_surgery.spectrum import finite
from spectral_surgery.threads import each

KINDS: tuple[Kind, ...] = (
    adalora.KIND,
    experts.KIND,
    attention.KIND,
    dora.KIND,
    kasa.KIND,
    bdlora.KIND,
    qalora.KIND,
    variants.MICA,
    variants.ALORA,
    variants.VELORA,
    variants.MONTECLORA,
    embedding.TIED_HEAD,
    embedding.KIND,
    convolution.KIND,
    linear.KIND,
)
"""Every kind; the first that claims a module reads it."""

__all__ = ["DTYPES", "KINDS", "Kind", "Module", "Place", "Seat", "Slot", "Stored", "kind_of", "plain_name", "read"]


def read(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Returns every module's update and the tensors that hold it, in the file's order.

    Raises:
        AdapterError: If a LoRA tensor belongs to no known kind, a kind finds its tensors inconsistent, or any tensor
            is not finite.
    """
    found: dict[str, Stored] = {}
    faults: list[str] = []
    claimed: set[str] = set()
    for module in modules(tensors).values():
        if kind := kind_of(config, module):
            faults += _misnamed(config, module)
            claimed |= module.of(kind.roles)
            if not (wrong := list(kind.faults(config, module))):
                found |= kind.read(config, module)
            faults += wrong
    combine(faults[:20], AdapterError)
    _check_claims(tensors, claimed)
    return found


def kind_of(config: AdapterConfig, module: Module) -> Kind | None:
    """Returns the kind of a module's tensors."""
    return next((kind for kind in KINDS if kind.claims(config, module)), None)


def _misnamed(config: AdapterConfig, module: Module) -> list[str]:
    """Returns what PEFT would leave out without a word because of its name."""
    first = module.claims[0]
    if not first.startswith(PREFIX):
        return [f"{first} does not start with {PREFIX}, so PEFT would leave it out silently. Rename the tensors."]
    factors = [module.names[role] for role in ("A", "B") if role in module]
    bare = [name for name in factors if not name.endswith(".weight")]
    if bare and config.raw.get("peft_type") == "LORA":
        return [f"{bare[0]} does not end in .weight, so PEFT would leave it out silently. Rename the tensors."]
    return []


def _check_claims(tensors: Mapping[str, Tensor], claimed: set[str]) -> None:
    unknown = [name for name in tensors if "lora_" in name and name not in claimed]
    if unknown:
        raise AdapterError(
            f"{len(unknown)} LoRA tensors are of a kind that is not edited, the first is {unknown[0]} "
            f"{tuple(tensors[unknown[0]].shape)}. Save the adapter with PEFT, or update spectral-surgery."
        )
    if not claimed:
        raise AdapterError(
            f"The adapter has {len(tensors)} tensors and none is a LoRA factor. Expected names such as "
            f"base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight."
        )
    numbers = {name: tensor for name, tensor in tensors.items() if tensor.dtype in DTYPES}
    bad = [name for name, sound in zip(numbers, each(finite, numbers.values()), strict=True) if not sound]
    faults = [
        f"{name} has {int((~tensors[name].isfinite()).sum())} values that are not finite. The training diverged; "
        f"go back to an earlier checkpoint."
        for name in bad[:20]
    ]
    combine(faults, AdapterError)
