"""Adapters with known structure, made in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spectral_surgery.adapter import Adapter, AdapterConfig
from spectral_surgery.inspecting import Readable

SIZES = {"q_proj": (96, 96), "k_proj": (48, 96), "o_proj": (96, 96), "up_proj": (160, 96), "down_proj": (96, 160)}
"""(out, in) of each kind; 96 is the residual stream."""
RANK = 6

Factors = dict[str, tuple[Tensor, Tensor]]
"""B and A by module path."""


def path(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.{'mlp' if kind in ('up_proj', 'down_proj') else 'self_attn'}.{kind}"


def factors(seed: int = 0, layers: int = 4, rank: int = RANK) -> Factors:
    """Gaussian factors: an adapter of random directions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path(layer, kind): (
            torch.randn(out, rank, generator=generator),
            torch.randn(rank, inside, generator=generator),
        )
        for layer in range(layers)
        for kind, (out, inside) in SIZES.items()
    }


def tensors(found: Factors, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    named = {}
    for name, (B, A) in found.items():
        named[f"base_model.model.{name}.lora_A.weight"] = A.to(dtype).contiguous()
        named[f"base_model.model.{name}.lora_B.weight"] = B.to(dtype).contiguous()
    return named


def config(found: Factors) -> dict[str, object]:
    rank = next(iter(found.values()))[0].shape[1]
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(SIZES)}


def adapter(
    change: Callable[[Factors], object] = lambda found: None,
    *,
    seed: int = 0,
    layers: int = 4,
    rank: int = RANK,
    dtype: torch.dtype = torch.float32,
    name: str = "planted",
) -> Adapter:
    """A random adapter after ``change`` has planted something in its factors."""
    found = factors(seed, layers, rank)
    change(found)
    return Adapter(AdapterConfig(config(found)), tensors(found, dtype), name=name)


def readable(*arguments: Callable[[Factors], object], **options: object) -> Readable:
    return Readable(adapter(*arguments, **options))  # type: ignore[arg-type]


def saved(folder: Path, found: Factors, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(found)), encoding="utf-8")
    save_file(tensors(found, dtype), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
