"""LoRA on linear layers (nn.Linear, and Conv1D with fan_in_fan_out, whose factors have the same shapes).

``delta = scale B A`` with ``lora_A.weight`` (r, in) and ``lora_B.weight`` (out, r). An edit is written into B. A bias
of B (``lora_bias``) is no part of the low-rank update and passes through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.errors import AdapterError, combine
from spectral_surgery.spectrum import LowRank

PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<what>weight|bias)")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a factor may be stored in."""


@dataclass(frozen=True)
class Stored:
    """One module's update and the tensors that it is stored in."""

    update: LowRank
    names: Mapping[str, str]
    """Tensor name of each factor, by "A" and "B"."""
    claims: tuple[str, ...]
    """Every tensor of the file that belongs to this module."""

    def written(self, update: LowRank) -> dict[str, Tensor]:
        """Returns the tensors to replace in the file so that it holds another update of this module."""
        return {self.names[update.side]: update.stored}


def read(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Returns the updates of all linear layers by module path.

    Raises:
        AdapterError: If a factor is missing, has the wrong shape or rank, or is not finite; all faults together.
    """
    found: dict[str, dict[str, str]] = {}
    faults: list[str] = []
    for name in tensors:
        match = FACTOR.fullmatch(name)
        if not match or "base_layer" in match["path"]:
            continue
        if not name.startswith(PREFIX):
            faults.append(
                f"{name} does not start with {PREFIX}, so PEFT would leave it out silently. Rename the tensors."
            )
        role = match["side"] if match["what"] == "weight" else f"{match['side']} bias"
        found.setdefault(match["path"].removeprefix(PREFIX), {})[role] = name
    for path, names in found.items():
        faults += _faults(path, names, config, tensors)
    combine(faults[:20], AdapterError)
    return {path: _stored(path, names, config, tensors) for path, names in found.items()}


def _stored(path: str, names: dict[str, str], config: AdapterConfig, tensors: Mapping[str, Tensor]) -> Stored:
    A, B = tensors[names["A"]], tensors[names["B"]]
    return Stored(
        update=LowRank(B=B, A=A, scale=config.scale(path, A.shape[0])),
        names={"A": names["A"], "B": names["B"]},
        claims=tuple(names.values()),
    )


def _faults(path: str, names: dict[str, str], config: AdapterConfig, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    if missing := [f"lora_{side}" for side in "AB" if side not in names]:
        yield f"{path}: {missing[0]} is missing. The file is incomplete; save the adapter again."
        return
    A, B = tensors[names["A"]], tensors[names["B"]]
    if A.ndim != 2 or B.ndim != 2:
        yield (
            f"{path}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not matrices. "
            f"Only linear layers are edited."
        )
    elif A.shape[0] != B.shape[1]:
        yield f"{path}: lora_A has {A.shape[0]} rows but lora_B has {B.shape[1]} columns. Save the adapter again."
    elif A.shape[0] != config.rank(path):
        yield (
            f"{path}: lora_A has {A.shape[0]} rows but adapter_config.json says r={config.rank(path)}. "
            f"Add it to rank_pattern, or save the adapter again."
        )
    for side, factor in (("A", A), ("B", B)):
        if factor.dtype not in DTYPES:
            yield f"{path}: lora_{side} has dtype {factor.dtype}, expected one of {', '.join(map(str, DTYPES))}."
        elif not factor.isfinite().all():
            bad = int((~factor.isfinite()).sum())
            yield (
                f"{path}: lora_{side} has {bad} values that are not finite. "
                f"The training diverged; go back to an earlier checkpoint."
            )
