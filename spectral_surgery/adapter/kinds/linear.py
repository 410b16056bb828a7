"""LoRA on linear layers: nn.Linear, and Conv1D with fan_in_fan_out, whose factors have the same shapes.

``lora_A.weight`` is (r, in) and ``lora_B.weight`` (out, r). A bias of B (``lora_bias``) is no part of the low-rank
update and passes through. rsLoRA, rank and alpha patterns and layer replication differ in scale and path alone.
"""

from __future__ import annotations

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds.kind import Kind, Module, Stored, pair_faults, stored
from spectral_surgery.spectrum import LowRank


def claims(config: AdapterConfig, module: Module) -> bool:
    """Returns whether this is an ordinary pair of factors; shapes are checked afterwards."""
    return bool(module.names.keys() & {"A", "B"})


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the module's update."""
    A, B = module["A"], module["B"]
    update = LowRank(B, A, config.scale(module.path, A.shape[0]))
    return {module.path: stored(module, update, "B", pair=("A", "B"))}


KIND = Kind(
    name="LoRA on linear layers",
    claims=claims,
    read=read,
    faults=pair_faults,
    formula="s B A",
    edits="lora_B",
    note="nn.Linear and Conv1D; rsLoRA, patterns, layer_replication; a lora_bias passes through",
)
