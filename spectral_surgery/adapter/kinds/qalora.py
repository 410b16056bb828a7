"""QALoRA on GPTQ bases: inputs are pooled by groups, ``dW = s B A kron(I, 1) n / g`` with n groups of g inputs.

PEFT ignores ``use_qalora`` on other bases and computes plain LoRA; the file does not tell. Directions and edits are
the same either way; sizes differ by one factor, and measuring checks what the loaded layer does.
"""

from __future__ import annotations

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds.kind import Kind, Module, Stored, pair_faults, stored
from spectral_surgery.spectrum import LowRank, spacing


def claims(config: AdapterConfig, module: Module) -> bool:
    """Returns whether inputs are pooled."""
    return bool(config.raw.get("use_qalora")) and {"A", "B"} <= module.names.keys()


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the module's update; A is spread over the inputs that it pools."""
    A, group = module["A"], int(config.raw.get("qalora_group_size") or 16)
    spread = A.double().repeat_interleave(group, 1) * (A.shape[1] / group)
    update = LowRank(module["B"], spread, config.scale(module.path, len(A)), A_spacing=spacing(A))
    return {module.path: stored(module, update, "B", "layer")}


KIND = Kind(
    name="QALoRA",
    claims=claims,
    read=read,
    faults=pair_faults,
    formula="s B A kron(I, 1) n/g",
    edits="lora_B",
    note="on GPTQ bases, where PEFT pools inputs in n groups of g",
)
