"""The ways of training an adapter: what each puts into the model, how it is optimised, and how it is saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectral_surgery.training.options import TrainOptions

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
else:
    PeftConfig = PeftModel = Any

PISSA = "pissa_niter_16"
"""PiSSA's start by a randomised SVD with 16 iterations, which is much faster than an exact one."""
PISSA_START = "pissa_start"
"""Sub-folder of the work folder with PiSSA's factors before the first step; also a name of an adapter in PEFT."""

log = logging.getLogger(__name__)


def peft_config(options: TrainOptions) -> PeftConfig:
    """Returns PEFT's configuration of a fresh adapter.

    Raises:
        InputError: If SpecLoRA is asked for and the installed PEFT is too old for it.
    """
    from peft import LoraConfig

    recipe = options.numbers()
    modules = "all-linear" if recipe.modules == ("all-linear",) else list(recipe.modules)
    plain: dict[str, Any] = dict(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        target_modules=modules,
        revision=options.base.revision,
    )
    method = options.adapter.method
    if method == "speclora":
        from spectral_surgery.speclora import SpecLoraConfig

        return SpecLoraConfig(
            **plain, k=options.adapter.speclora_k, delta_learning_rate=options.adapter.delta_learning_rate
        )
    variants: dict[str, dict[str, Any]] = {
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": PISSA},
    }
    return LoraConfig(**plain, **variants.get(method, {}))


def adapted(base: Any, options: TrainOptions, work: Path, *, resumed: bool, write: bool) -> PeftModel:
    """Returns the base model with a fresh adapter on it.

    PiSSA takes its start out of the base weights. It is kept in the work folder, because the saved adapter is the
    difference to it, and because a resumed training needs the very same base.

    Args:
        base: The base model, which is changed.
        options: Method and numbers.
        work: Folder of the training's checkpoints.
        resumed: Whether the folder holds an earlier start.
        write: Whether this process is the one that writes.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    config = peft_config(options)
    if options.adapter.method != "pissa":
        return get_peft_model(base, config)
    start = work / PISSA_START
    if resumed:
        from safetensors.torch import load_file

        config.init_lora_weights = True
        model = get_peft_model(base, config)
        set_peft_model_state_dict(model, load_file(start / "adapter_model.safetensors"))
        _subtract(model)
    else:
        model = get_peft_model(base, config)
        if write:
            model.save_pretrained(str(start), save_embedding_layers=False)
    if next(base.parameters()).dtype != torch.float32:
        log.warning(
            "PiSSA changes the base weights, which are stored in 16 bits here: the saved LoRA adapter differs from "
            "what was trained by their rounding. --dtype float32 avoids that. Keep the saved adapter in float32; its "
            "two halves nearly cancel, and 16 bits would lose much of the update."
        )
    return model


@torch.no_grad()
def _subtract(model: PeftModel) -> None:
    """Takes a PiSSA adapter's product out of the base weights, in PEFT's own arithmetic."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import transpose

    for module in model.modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            weight = module.get_base_layer().weight
            turned = getattr(module, "fan_in_fan_out", False)
            factors = module.lora_B["default"].weight, module.lora_A["default"].weight
            product = module.scaling["default"] * factors[0] @ factors[1]
            rest = transpose(weight.to(torch.float32), turned) - product
            weight.data = transpose(rest.to(weight.dtype), turned)


def optimizer(model: PeftModel, options: TrainOptions) -> torch.optim.Optimizer:
    """Returns AdamW over the trained parameters, with the method's own learning rates."""
    recipe = options.numbers()
    settings: dict[str, Any] = {"betas": recipe.adam_betas}
    if options.adapter.method == "loraplus":
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=recipe.learning_rate,
            loraplus_lr_ratio=options.adapter.loraplus_ratio,
            loraplus_weight_decay=recipe.weight_decay,
            **settings,
        )
    if options.adapter.method == "speclora":
        from spectral_surgery.speclora import parameter_groups

        groups = parameter_groups(model, recipe.learning_rate, weight_decay=recipe.weight_decay)
        return torch.optim.AdamW([group for group in groups if group["params"]], **settings)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, **settings)


def save(model: PeftModel, options: TrainOptions, work: Path, folder: Path) -> None:
    """Writes the trained adapter as PEFT does; PiSSA as plain LoRA of twice the rank on the unchanged base."""
    extra = {}
    if options.adapter.method == "pissa":
        extra["path_initial_model_for_weight_conversion"] = str(work / PISSA_START)
    model.save_pretrained(str(folder), save_embedding_layers=False, **extra)
