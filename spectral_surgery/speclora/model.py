"""The tuner: PEFT's LoRA model, whose layers get scales beside their factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectral_surgery.adapter.kinds import DTYPES
from spectral_surgery.errors import AdapterError, BaseModelError, InputError
from spectral_surgery.speclora.config import SpecLoraConfig
from spectral_surgery.speclora.layer import Linear, SpecLoraLayer

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any


class SpecLoraModel(LoraModel):
    """A base model with SpecLoRA layers; made by ``get_peft_model`` and ``PeftModel.from_pretrained``."""

    def _create_and_replace(
        self,
        lora_config: SpecLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        layer: Any = parent.get_submodule(target_name)
        layer.add_scale(adapter_name, lora_config, current_key)

    @staticmethod
    def _create_new_module(lora_config: SpecLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if _sharded(base):
            raise BaseModelError(
                f"{kwargs['target_name']} is split over devices by tensor parallelism, where a row has another number "
                f"on each, and SpecLoRA does not take that into account. Load the base model without tp_plan."
            )
        kind = _layer_class(base)
        if kind is None:
            raise BaseModelError(
                f"{kwargs['target_name']} is a {type(base).__name__} with a {_dtype(base)} weight, and SpecLoRA takes "
                f"nn.Linear and Conv1D in floating point, and linear layers that bitsandbytes or torchao quantised. "
                f"Leave it out of target_modules."
            )
        lora_config.fan_in_fan_out = isinstance(base, Conv1D)
        return kind(target, adapter_name, config=lora_config, **kwargs)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **kwargs: Any,
    ) -> None:
        """Adds a combination of adapters, of low rank, as PEFT does; only kinds that keep the scales are accepted.

        Raises:
            InputError: If the combination works on factors alone and would drop the scales.
        """
        if len(adapters) < 2 or not combination_type.endswith("svd"):
            raise InputError(
                f"combination_type {combination_type} of {len(adapters)} adapters works on the LoRA factors alone and "
                f"would drop the scales. Combine at least two adapters with svd, ties_svd, dare_linear_svd, "
                f"dare_ties_svd or magnitude_prune_svd."
            )
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type=combination_type, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SpecLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        wanted = {name for name in model.state_dict() if f".lora_spec.{adapter_name}." in name}
        there = {name for name in found if f".lora_spec.{adapter_name}." in name}
        if wanted != there:
            raise AdapterError(
                f"{len(wanted - there)} of {len(wanted)} tensors of scales are missing in the file and "
                f"{len(there - wanted)} are of no module here, the first is {min(wanted ^ there)}. PEFT would run "
                f"without them; load the adapter's own file on its own base model."
            )
        return found


def _sharded(base: nn.Module) -> bool:
    """Returns whether PEFT found a tensor-parallel plan for the layer, or its weight is a distributed tensor."""
    return getattr(base, "_hf_tp_plan", None) is not None or hasattr(getattr(base, "weight", None), "device_mesh")


def _dtype(base: nn.Module) -> str:
    return str(getattr(getattr(base, "weight", None), "dtype", "missing"))


def _layer_class(base: nn.Module) -> type[SpecLoraLayer] | None:
    """Returns the layer class for a base layer; a quantiser is only imported where its layers are."""
    families = {type(part).__module__.partition(".")[0] for part in (base, getattr(base, "weight", None))}
    if families & {"bitsandbytes", "torchao"}:
        from spectral_surgery.speclora import quantized

        return quantized.layer_class(base)
    # Float8 layers are subclasses of nn.Linear whose weight means nothing without its scale.
    plain = isinstance(base, nn.Linear | Conv1D) and base.weight.dtype in DTYPES
    return Linear if plain else None


def parameter_groups(
    model: PeftModel, learning_rate: float, *, weight_decay: float = 0.0, adapter_name: str = "default"
) -> list[dict[str, Any]]:
    """Returns parameter groups for an optimiser in which delta has its own learning rate.

    ``torch.optim.AdamW(parameter_groups(model, 1e-4))`` can be given to a trainer as ``optimizers=(optimizer, None)``.

    Args:
        model: A model that ``get_peft_model`` made with a :class:`SpecLoraConfig`.
        learning_rate: Of everything but delta, whose own is ``delta_learning_rate`` times this.
        weight_decay: Of everything; delta is pulled towards 0, which is the pre-trained weight.
        adapter_name: Whose configuration holds.
    """
    factor = model.peft_config[adapter_name].delta_learning_rate
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    deltas = [weight for name, weight in trainable.items() if ".lora_spec." in name]
    others = [weight for name, weight in trainable.items() if ".lora_spec." not in name]
    return [
        {"params": others, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": deltas, "lr": factor * learning_rate, "weight_decay": weight_decay},
    ]
