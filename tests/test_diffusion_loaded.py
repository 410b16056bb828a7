"""LoRA files of image models as diffusers itself writes and loads them: what a UNet's weights become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_lora import saved
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from spectral_surgery import Adapter, edit, export, policies

pytestmark = pytest.mark.slow
FILE = "pytorch_lora_weights.safetensors"


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def written(folder: Path, *, header: bool) -> Path:
    """What diffusers saves of a UNet with LoRA on linear layers and convolutions, of two ranks."""
    from diffusers import StableDiffusionPipeline

    model = unet()
    targets = ["to_q", "to_out.0", "conv1", "proj_in"]
    config = LoraConfig(r=4, lora_alpha=6, rank_pattern={"to_q": 2}, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    model.add_adapter(config)
    about = {"unet_lora_adapter_metadata": model.peft_config["default"].to_dict()} if header else {}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(model), **about)
    return folder


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """What loading and fusing a file adds to every weight of the UNet, by diffusers alone."""
    from diffusers import StableDiffusionPipeline

    model = unet()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state, alphas, about = StableDiffusionPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    model.load_lora_adapter(state, network_alphas=alphas or None, prefix="unet", metadata=about)
    model.fuse_lora()
    model.unload_lora()
    found = {name: weight - before[name] for name, weight in model.state_dict().items()}
    return {name: delta for name, delta in found.items() if delta.any()}


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).reshape(delta.shape).float()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("header", [False, True])
def test_what_diffusers_wrote_is_read_edited_and_resized_as_diffusers_loads_it(header: bool, tmp_path: Path) -> None:
    source = Adapter.load(written(tmp_path / "source", header=header))
    before = deltas(tmp_path / "source")
    assert len(before) == len(source.updates) > 20
    for name, delta in before.items():
        update = source.updates[f"unet.{name.removesuffix('.weight')}"]
        torch.testing.assert_close(
            (update.scale * update.B.double() @ update.A.double()).float(), delta.flatten(1), rtol=1e-4, atol=2e-6
        )
    weaker, _ = edit(source, policies.Scale(strength=0.5))
    weaker.save(tmp_path / "weaker")
    assert_equal(deltas(tmp_path / "weaker" / FILE), {name: delta / 2 for name, delta in before.items()})
    export(source, "rank=1", tmp_path / "small.safetensors")
    assert_equal(deltas(tmp_path / "small.safetensors"), {name: truncated(d, 1) for name, d in before.items()})
    exported = export(source, "energy=0.6", tmp_path / "own.safetensors")
    assert exported.losses
    ranks = {path: loss.after for path, loss in exported.losses.modules.items()}
    assert len(set(ranks.values())) > 1
    own = {name: truncated(d, ranks[f"unet.{name.removesuffix('.weight')}"]) for name, d in before.items()}
    assert_equal(deltas(tmp_path / "own.safetensors"), own)


def test_a_kohya_file_is_resized_and_weakened_by_blocks_as_diffusers_loads_it(tmp_path: Path) -> None:
    state = load_file(written(tmp_path / "source", header=False) / FILE)
    tensors = {}
    for name, tensor in state.items():
        stem, _, side = name.removesuffix(".weight").rpartition(".lora_")
        flat = "lora_unet_" + stem.removeprefix("unet.").replace(".", "_")
        tensors[f"{flat}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor
        tensors[f"{flat}.alpha"] = torch.tensor(3.0)
    path = saved(tmp_path / "kohya.safetensors", tensors, {"ss_network_dim": "4", "ss_network_args": json.dumps({})})
    before = deltas(path)
    assert len(before) == len(state) / 2
    export(Adapter.load(path), "rank=2", tmp_path / "small.safetensors")
    assert_equal(deltas(tmp_path / "small.safetensors"), {name: truncated(d, 2) for name, d in before.items()})
    exported = export(Adapter.load(path), "energy=0.6", tmp_path / "own.safetensors")
    assert exported.losses
    ranks = {path.replace(".", "_"): loss.after for path, loss in exported.losses.modules.items()}
    own = {
        name: truncated(d, ranks["unet_" + name.removesuffix(".weight").replace(".", "_")])
        for name, d in before.items()
    }
    assert_equal(deltas(tmp_path / "own.safetensors"), own)
    export(Adapter.load(path), "blocks=down=0.5,mid=2", tmp_path / "blocks.safetensors")
    strengths = {name: 0.5 if "down_blocks" in name else 2.0 if "mid_block" in name else 1.0 for name in before}
    assert_equal(
        deltas(tmp_path / "blocks.safetensors"), {name: strengths[name] * delta for name, delta in before.items()}
    )
