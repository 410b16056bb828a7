"""KaSA: a learnt diagonal between the factors, ``dW = s B diag(d) A``, over a base that PEFT truncates at load."""

from __future__ import annotations

from collections.abc import Iterator

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds.kind import Kind, Module, Stored, number_faults, pair_faults, stored
from spectral_surgery.spectrum import LowRank, spacing


def claims(config: AdapterConfig, module: Module) -> bool:
    """Returns whether the module has a diagonal."""
    return bool(config.raw.get("kasa_config")) and "A" in module


def faults(config: AdapterConfig, module: Module) -> Iterator[str]:
    """Yields what is wrong with the three factors."""
    yield from pair_faults(config, module)
    yield from number_faults(module, ("diag",))


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the module's update; A takes the diagonal in, which an edit of B leaves where it is."""
    A = module["diag"].double()[:, None] * module["A"].double()
    update = LowRank(module["B"], A, config.scale(module.path, len(A)), A_spacing=spacing(module["A"]))
    return {module.path: stored(module, update, "B")}


KIND = Kind(
    name="KaSA",
    claims=claims,
    read=read,
    faults=faults,
    formula="s B diag(d) A",
    edits="lora_B",
    roles=frozenset(["A", "B", "diag"]),
    note="relative to the base that PEFT truncates at load",
)
