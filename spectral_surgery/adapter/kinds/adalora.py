"""AdaLoRA: ``dW = alpha / (init_r + 1e-5) B diag(E) A``, with modules pruned to different ranks.

Its E are not singular values, because B and A are only pushed towards orthonormality; so its update is decomposed like
any other, and B is edited.
"""

from __future__ import annotations

from collections.abc import Iterator

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds.kind import Kind, Module, Stored, number_faults, stored
from spectral_surgery.spectrum import LowRank, spacing

ROLES = ("A", "B", "E")


def claims(config: AdapterConfig, module: Module) -> bool:
    """Returns whether this is an AdaLoRA adapter's module."""
    return config.raw.get("peft_type") == "ADALORA"


def faults(config: AdapterConfig, module: Module) -> Iterator[str]:
    """Yields what is wrong with the three factors."""
    if missing := [f"lora_{role}" for role in ROLES if role not in module]:
        yield f"{module.path}: {missing[0]} is missing. The file is incomplete; save the adapter again."
        return
    shapes = [tuple(module[role].shape) for role in ROLES]
    if not (len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][0] == shapes[1][1] and shapes[2] == (shapes[0][0], 1)):
        yield f"{module.path}: lora_A, lora_B and lora_E have shapes {shapes}, which do not fit together."
    yield from number_faults(module, ROLES)


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the module's update; A takes E in. A module pruned to rank 0 has nothing to edit."""
    if not len(module["E"]):
        return {}
    A = module["E"].double() * module["A"].double()
    rank = float(config.raw.get("init_r", 12))
    update = LowRank(
        module["B"], A, float(config.raw.get("lora_alpha") or rank) / (rank + 1e-5), A_spacing=spacing(module["A"])
    )
    return {module.path: stored(module, update, "B", "layer")}


KIND = Kind(
    name="AdaLoRA",
    claims=claims,
    read=read,
    faults=faults,
    formula="alpha/(init_r + 1e-5) B diag(E) A",
    edits="lora_B",
    roles=frozenset(ROLES),
)
