"""LoRA files of image models, with the names and headers that their tools write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

KOHYA_HEADER = {
    "ss_network_dim": "8",
    "ss_network_alpha": "4.0",
    "ss_network_module": "networks.lora",
    "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": "1"}),
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "ss_tag_frequency": json.dumps({"img": {"a cat": 3}}),
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "0" * 8,
}
BLOCKS = [
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_2",
    "lora_unet_input_blocks_7_1_transformer_blocks_0_attn1_to_out_0",
    "lora_unet_middle_block_1_proj_in",
    "lora_unet_output_blocks_3_0_in_layers_2",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
]


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.randn(shape, generator=generator) / 4).to(dtype)


def kohya(dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Linear layers of rank 8, a 1x1 and a 3x3 convolution, and an alpha for each."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in BLOCKS:
        rank, alpha, kernel = 8, 4.0, ()
        if "proj_in" in name:
            kernel = (1, 1)
        if "in_layers" in name:
            rank, alpha, kernel = 4, 1.0, (3, 3)
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
        tensors[f"{name}.lora_down.weight"] = random(generator, rank, 12, *kernel, dtype=dtype)
        tensors[f"{name}.lora_up.weight"] = random(generator, 20, rank, *(1,) * len(kernel), dtype=dtype)
    return tensors


def older(down: str, up: str) -> dict[str, Tensor]:
    """One module with factors of other names, and no alpha."""
    generator = torch.Generator().manual_seed(1)
    shapes = {down: (4, 12), up: (20, 4)}
    return {name: random(generator, *shape, dtype=torch.float32) for name, shape in shapes.items()}


def saved(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    save_file(dict(tensors), path, metadata=dict(header) if header else None)
    return path


def deltas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense update of every kohya module in float64: alpha / rank times up after down, as its scripts compute."""
    found = {}
    for name in tensors:
        if name.endswith(".lora_down.weight"):
            stem = name.removesuffix(".lora_down.weight")
            down, up = tensors[name].double(), tensors[f"{stem}.lora_up.weight"].double()
            dense = torch.einsum("or,r...->o...", up.flatten(1), down)
            found[stem] = float(tensors[f"{stem}.alpha"]) / down.shape[0] * dense
    return found
