"""LoRA on convolutions: ``dW[o, i, ...] = s sum_r B[o, r] A[r, i, ...]``, a product of matrices once A is flattened.

``lora_A.weight`` is (r, in, kernel...) and ``lora_B.weight`` (out, r, 1...). For grouped and dilated convolutions PEFT
computes another function: the first show in the shapes, the second when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds.kind import Kind, Module, Slot, Stored, pair_faults, stored
from spectral_surgery.spectrum import LowRank


def flat(tensor: Tensor) -> Tensor:
    """Returns a kernel as a matrix, first dimension kept."""
    return tensor.flatten(1)


def claims(config: AdapterConfig, module: Module) -> bool:
    """Returns whether the factors are kernels."""
    return {"A", "B"} <= module.names.keys() and module["A"].ndim == module["B"].ndim >= 3


def faults(config: AdapterConfig, module: Module) -> Iterator[str]:
    """Yields what is wrong with the factors."""
    A, B = module["A"], module["B"]
    if B.shape[1] < A.shape[0] and A.shape[0] % B.shape[1] == 0:
        yield (
            f"{module.path}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are of a grouped convolution, whose "
            f"update is one for every group and not s B A. Leave the module out of the adapter."
        )
        return
    yield from pair_faults(config, module, ndim=None)
    if module["B"].shape[2:].numel() != 1:
        yield f"{module.path}: lora_B {tuple(module['B'].shape)} is not a 1x1 kernel, as PEFT writes. Save it again."


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the module's update."""
    A, B = module["A"], module["B"]
    update = LowRank(flat(B), flat(A), config.scale(module.path, A.shape[0]))
    return {module.path: stored(module, update, Slot(module.names["B"], flat), pair=("A", "B"))}


KIND = Kind(
    name="LoRA on convolutions",
    claims=claims,
    read=read,
    faults=faults,
    formula="s B A, kernels flattened to (out, r) and (r, in k)",
    edits="lora_B",
    note="Conv1d, Conv2d, Conv3d; grouped and dilated ones are refused",
)
