"""PiSSA and OLoRA adapters as plain LoRA: the one conversion that a base model and the file are enough for.

These start from factors B0, A0 of the base weight and train on ``W - s B0 A0``, so their own update is
``s (B A - B0 A0)``: a LoRA of twice the rank. PEFT computes B0 and A0 again from the base whenever it loads such an
adapter; here they are taken from it and written down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.adapter import files, saving
from spectral_surgery.adapter.adapter import Adapter
from spectral_surgery.adapter.config import AdapterConfig, is_repeatable
from spectral_surgery.errors import AdapterError, BaseModelError


def as_plain_lora(
    folder: str | Path, base: Any = None, output: str | Path | None = None, *, overwrite: bool = False
) -> Adapter:
    """Returns a PiSSA or OLoRA adapter as plain LoRA of twice the rank, in float32.

    Args:
        folder: The adapter, as PEFT saved it.
        base: The base model that it was trained on, loaded in float32 without the adapter; PEFT changes its weights
            meanwhile, and they are put back. Or its folder or Hub id, where it generates text; by default the one
            that the adapter records.
        output: Folder to write it to.
        overwrite: Replace an output folder that carries our manifest.

    Raises:
        AdapterError: If its start cannot be computed again from the base alone.
        BaseModelError: If the base's modules are not the adapter's.
        OutputError: If the output folder may not be written.
    """
    there = files.locate(str(folder))
    raw = files.read_config(there)
    init = str(raw.get("init_lora_weights"))
    if raw.get("peft_type") != "LORA" or not is_repeatable(init):
        raise AdapterError(
            f"init_lora_weights is {init!r}. Only 'pissa' and 'olora' start from the base model alone, so only they "
            f"can be converted afterwards."
        )
    if output is not None:
        saving.check_output(Path(output), overwrite=overwrite, sources=(there,))
    tensors, metadata = files.read_tensors(there)
    start = _start(raw, _loaded(base or raw.get("base_model_name_or_path")))
    factors = {name for name in tensors if ".lora_" in name}
    if different := sorted(factors ^ start.keys()):
        raise BaseModelError(f"{different[0]}: the adapter and this base model do not have the same modules.")
    joined = {name: _joined(name, tensors[name], start[name]) for name in factors}
    plain = Adapter(AdapterConfig(_doubled(raw)), {**tensors, **joined}, metadata, None, str(folder))
    plain = replace(plain, tensors={name: plain.tensors[name] for name in tensors})
    plain.stored  # noqa: B018 (checks every tensor now)
    if output is not None:
        plain.save(output, overwrite=overwrite)
    return plain


def _joined(name: str, trained: Tensor, start: Tensor) -> Tensor:
    trained, start = trained.float(), start.float()
    return torch.cat([trained, -start], 1) if ".lora_B." in name else torch.cat([trained, start])


def _start(raw: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Returns the factors from which the training began, and leaves the model as it was."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    learning = {name: weight.requires_grad for name, weight in model.named_parameters()}
    known = LoraConfig.__dataclass_fields__
    config = LoraConfig(**{key: value for key, value in raw.items() if key in known and key != "runtime_config"})
    wrapped = get_peft_model(model, config)
    try:
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if ".lora_" in name}
    finally:
        wrapped.unload()
        model.load_state_dict(before)
        for name, weight in model.named_parameters():
            weight.requires_grad_(learning[name])


def _loaded(base: Any) -> Any:
    if not base:
        raise BaseModelError("The adapter records no base model. Pass --base-model.")
    if not isinstance(base, str | Path):
        return base
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BaseModelError(f"The base model {base} cannot be loaded ({reason}). Pass --base-model.") from error


def _doubled(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration with every rank doubled and every scale as it was."""
    factor = math.sqrt(2) if raw.get("use_rslora") else 2
    ranks = {key: 2 * rank for key, rank in (raw.get("rank_pattern") or {}).items()}
    alphas = {key: factor * alpha for key, alpha in (raw.get("alpha_pattern") or {}).items()}
    doubled = {"r": 2 * raw["r"], "lora_alpha": factor * raw["lora_alpha"]}
    return {**raw, **doubled, "rank_pattern": ranks, "alpha_pattern": alphas, "init_lora_weights": True}
