"""BD-LoRA: one factor is block-diagonal and stored as the stack of its blocks, under an ordinary name.

Which factor follows from patterns over the module's path. The other one is dense, and is edited.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds.kind import Kind, Module, Stored, number_faults, stored
from spectral_surgery.spectrum import LowRank


def claims(config: AdapterConfig, module: Module) -> bool:
    """Returns whether one of the module's factors is stored as blocks."""
    return {"A", "B"} <= module.names.keys() and bool(_sides(config, module))


def faults(config: AdapterConfig, module: Module) -> Iterator[str]:
    """Yields what is wrong with the factors."""
    sides, count = _sides(config, module), int(config.raw["use_bdlora"].get("nblocks", 1))
    A, B = module["A"], module["B"]
    if len(sides) == 2:
        yield f"{module.path}: matches both of BD-LoRA's patterns, so neither factor is known to be dense."
    elif A.ndim != 2 or B.ndim != 2:
        yield f"{module.path}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not matrices."
    elif A.shape[0] != config.rank(module.path) or (B.shape[1] * (count if sides == "B" else 1)) != A.shape[0]:
        yield (
            f"{module.path}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not have rank "
            f"{config.rank(module.path)} with {count} blocks on side {sides}."
        )
    yield from number_faults(module, ("A", "B"))


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the module's update, edited on the dense side."""
    A, B = module["A"], module["B"]
    scale = config.scale(module.path, A.shape[0])
    count = int(config.raw["use_bdlora"].get("nblocks", 1))
    if _sides(config, module) == "A":
        return {module.path: stored(module, LowRank(B, blocks(A, count), scale), "B")}
    return {module.path: stored(module, LowRank(blocks(B, count), A, scale, side="A"), "A")}


def blocks(stacked: Tensor, count: int) -> Tensor:
    """Returns the block-diagonal matrix of ``count`` blocks that are stored one above the other."""
    return torch.block_diag(*stacked.chunk(count))


def _sides(config: AdapterConfig, module: Module) -> str:
    """Returns which factors are stored as blocks, by PEFT's rule: a pattern is a part of the module's path."""
    settings = config.raw.get("use_bdlora") or {}
    patterns = {side: settings.get(f"target_modules_bd_{side.lower()}") or [] for side in "AB"}
    return "".join(side for side in "AB" if any(pattern in module.path for pattern in patterns[side]))


KIND = Kind(
    name="BD-LoRA",
    claims=claims,
    read=read,
    faults=faults,
    formula="s B A, one of them block-diagonal",
    edits="the dense factor",
)
