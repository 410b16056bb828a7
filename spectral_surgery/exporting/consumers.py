"""What the programs that load a PEFT folder make of it: each one's own rule for a module's scale, as tiny readers.

The rules, read in their sources: PEFT takes rank and alpha of a module from the patterns, and divides by the root of
the rank for rsLoRA; vLLM 0.32 does the same. vLLM to 0.30 knows rsLoRA, but has one scale for all modules; llama.cpp's
converter keeps one ``lora_alpha``, which its runtime divides by the rank of the stored factor; SGLang takes
``lora_alpha / r`` for all modules and never the root. None of these tells when a file means something else.

The readers look at the written files alone, and share no code with the project's own reader of adapters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from spectral_surgery.exporting.resizing import difference
from spectral_surgery.spectrum import LowRank, update_norm

SUFFIX_A, SUFFIX_B, PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."


@dataclass(frozen=True)
class Consumer:
    """A program that loads PEFT folders."""

    name: str
    scale: Callable[[Mapping[str, Any], str, int], float]
    """(configuration, module path, rank of the stored factor) -> what it multiplies B A by."""


def _peft(config: Mapping[str, Any], path: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    found = {}
    for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        own = config.get(pattern) or {}
        found[field] = own.get(get_pattern_key(own.keys(), path), config[field]) if own else config[field]
    return found["lora_alpha"] / (math.sqrt(found["r"]) if config.get("use_rslora") else found["r"])


def _older_vllm(config: Mapping[str, Any], path: str, rank: int) -> float:
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def _llama_cpp(config: Mapping[str, Any], path: str, rank: int) -> float:
    return config["lora_alpha"] / rank


def _sglang(config: Mapping[str, Any], path: str, rank: int) -> float:
    return config["lora_alpha"] / config["r"]


CONSUMERS = (
    Consumer("PEFT, vLLM 0.32", _peft),
    Consumer("vLLM to 0.30", _older_vllm),
    Consumer("llama.cpp", _llama_cpp),
    Consumer("SGLang", _sglang),
)


def readings(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], meant: Mapping[str, LowRank]
) -> dict[str, float]:
    """Returns how far each program's reading is from the deltas that are meant, by its name.

    The relative Frobenius error of all modules together; infinite where the modules are others.

    Args:
        config: adapter_config.json as it stands.
        tensors: The weights file's tensors by name.
        meant: The deltas by module path.
    """
    factors = _factors(tensors)
    if factors.keys() != meant.keys():
        return {consumer.name: math.inf for consumer in CONSUMERS}
    whole = math.hypot(*(update.scale * update_norm(update.B, update.A) for update in meant.values()))

    @cache
    def error(path: str, scale: float) -> float:
        return difference(meant[path], LowRank(*factors[path], scale))

    errors = {}
    for consumer in CONSUMERS:
        scales = {path: consumer.scale(config, path, A.shape[0]) for path, (_, A) in factors.items()}
        total = math.hypot(*(error(path, scale) for path, scale in scales.items()))
        errors[consumer.name] = total / whole if whole else total
    return errors


def readings_of(folder: Path, meant: Mapping[str, LowRank]) -> dict[str, float]:
    """Returns :func:`readings` of the files in a folder."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return readings(config, load_file(folder / "adapter_model.safetensors"), meant)


def _factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    stems = [name.removesuffix(SUFFIX_A) for name in tensors if name.endswith(SUFFIX_A)]
    return {
        stem.removeprefix(PREFIX): (tensors[stem + SUFFIX_B], tensors[stem + SUFFIX_A])
        for stem in stems
        if stem + SUFFIX_B in tensors
    }
