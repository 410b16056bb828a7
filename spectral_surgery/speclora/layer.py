"""LoRA layers with scales: forward without a copy of the weight, additive over adapters, exact to unmerge.

Adapters add up: with several active, ``W' = W + sum_i (E_i diag(delta_i) E_i^T W + s_i B_i A_i)``, every term from the
frozen weight, so their order does not matter. While anything is merged the layer keeps the weight that it replaced
(for a quantised base the packed one); unmerging puts that very tensor back. ``merge_and_unload`` drops it module by
module.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from spectral_surgery.errors import AdapterError, RunError
from spectral_surgery.speclora.config import SpecLoraConfig
from spectral_surgery.speclora.scale import Scale, make_scale

log = logging.getLogger(__name__)


class SpecLoraLayer(LoraLayer):
    """What every SpecLoRA layer has beside its LoRA layer, whatever the base is stored in."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_spec")
    lora_spec: nn.ModuleDict
    """Scales by adapter name; an adapter with k = 0 here has none."""
    path = ""
    """The module's path in the base model."""
    original: tuple[Any, Tensor | None] | None = None
    """Weight and bias from before anything was merged; None while nothing is."""
    merge_rounding = 0.0
    """What storing the merged weight cost: Frobenius norm of the error over that of the update."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds the LoRA part; PEFT's constructors call this before any attribute of ours could be set."""
        if "lora_spec" not in self._modules:
            self.lora_spec = nn.ModuleDict()
        super().update_layer(adapter_name, *args, **kwargs)

    def add_scale(self, adapter_name: str, config: SpecLoraConfig, path: str) -> None:
        """Adds the scales, ``delta = 0``, beside an adapter's LoRA part."""
        self.path = path
        scale = make_scale(config, path, (self.out_features, self.in_features), self.frozen_weight)
        if scale is None:
            return
        self.lora_spec[adapter_name] = scale
        self._move_adapter_to_device_of_base_layer(adapter_name)
        scale.delta.requires_grad_(self.lora_A[adapter_name].weight.requires_grad)

    def scale_of(self, adapter_name: str) -> Scale | None:
        """Returns an adapter's scales; None where it has none."""
        found = dict(self.lora_spec.items()).get(adapter_name)
        assert found is None or isinstance(found, Scale)
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the base layer's output plus every active adapter's terms."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return out
        if adapter_names is not None:
            return self._mixed(x, out, adapter_names)
        result = out
        for name in self.active_adapters:
            if name in self.lora_A:
                result = result + self._added(name, x, out)
        return result.to(out.dtype)

    def _added(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """Returns what one adapter adds to the base layer's output."""
        factor = self.lora_A[name]
        x = self._cast_input_dtype(x, factor.weight.dtype)
        added = self.lora_B[name](factor(self.lora_dropout[name](x))) * self.scaling[name]
        scale = self.scale_of(name)
        return added if scale is None else scale.spread(added, scale(out, self.get_base_layer().bias))

    def _mixed(self, x: Tensor, out: Tensor, adapter_names: list[str]) -> Tensor:
        """Returns the output of a batch whose rows name their adapters; ``__base__`` names none."""
        result = out.clone()
        for name in sorted(set(adapter_names) & set(self.lora_A)):
            rows = [i for i, row in enumerate(adapter_names) if row == name]
            result[rows] += self._added(name, x[rows], out[rows]).to(result.dtype)
        return result

    def frozen_weight(self) -> Tensor:
        """Returns the weight without any adapter, (out, in), de-quantised; never a merged one."""
        if self.original is None:
            weight = dequantize_module_weight(self.get_base_layer()).detach()
        else:
            weight = self.dequantized(self.original[0])
        return weight.T if self.fan_in_fan_out else weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns the whole update ``E diag(delta) E^T W + s B A`` of an adapter, as the weight is stored."""
        update = self.scaling[adapter] * _product(self.lora_B[adapter].weight, self.lora_A[adapter].weight)
        scale = self.scale_of(adapter)
        if scale is not None:
            by_input = self.frozen_weight().to(update.dtype).T
            values = scale.effective.to(update.dtype) * scale.coordinates(by_input)
            update = update + scale.spread(torch.zeros_like(by_input), values).T
        return update.T if self.fan_in_fan_out else update

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the adapters' updates into the base weight, all from the frozen weight, with one rounding.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Which; by default the active ones.

        Raises:
            RunError: If the result is not finite.
            AdapterError: If a LoRA bias has no bias to be added to.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        everyone = [*self.merged_adapters, *names]
        updates = [self.get_delta_weight(name) for name in everyone]
        frozen = self.frozen_weight()
        frozen = frozen.to(torch.promote_types(frozen.dtype, updates[0].dtype))
        frozen = frozen.T if self.fan_in_fan_out else frozen
        wanted = frozen + sum(updates)
        bias = self._merged_bias(everyone)
        if safe_merge and not (wanted.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise RunError(f"{self.path}: the merged weight is not finite. The adapter diverged; nothing is merged.")
        base = self.get_base_layer()
        if self.original is None:
            self.original = (self.detach_weight(), None if base.bias is None else base.bias.data)
        self.write_weight(wanted)
        if bias is not None:
            base.bias.data = bias.data.to(base.bias.dtype)
        self.merged_adapters.extend(names)
        self._report(wanted, wanted - frozen)

    def unmerge(self) -> None:
        """Puts back the weight and bias from before the first merge, bit for bit."""
        if self.original is None:
            log.warning("%s: nothing is merged, so there is nothing to unmerge.", self.path)
            return
        weight, bias = self.original
        self.attach_weight(weight)
        if bias is not None:
            self.get_base_layer().bias.data = bias.to(self.get_base_layer().bias.device)
        self.original, self.merge_rounding = None, 0.0
        self.merged_adapters.clear()

    def _merged_bias(self, names: list[str]) -> Tensor | None:
        """Returns the base layer's bias with every LoRA bias added; None where there is no bias at all."""
        bias = self.get_base_layer().bias if self.original is None else self.original[1]
        added = [self.scaling[name] * self.lora_B[name].bias for name in names if self.lora_bias[name]]
        if added and bias is None:
            raise AdapterError(f"{self.path}: lora_bias is on and the base layer has no bias to merge it into.")
        for one in added:
            bias = bias + one
        return bias

    def _report(self, wanted: Tensor, update: Tensor) -> None:
        stored = dequantize_module_weight(self.get_base_layer()).detach().to(wanted.dtype)
        self.merge_rounding = float((stored - wanted).norm() / update.norm().clamp_min(1e-30))
        if self.quantized:
            log.warning(
                "%s: re-quantising the merged weight rounds by %.3g times the norm of the update.",
                self.path,
                self.merge_rounding,
            )

    quantized = False

    def dequantized(self, weight: Any) -> Tensor:
        """Returns a detached weight as numbers, as it is stored."""
        return weight

    def detach_weight(self) -> Any:
        """Returns what :meth:`attach_weight` needs to put the present weight back."""
        return self.get_base_layer().weight.data

    def attach_weight(self, weight: Any) -> None:
        """Puts a detached weight back."""
        base = self.get_base_layer()
        base.weight.data = weight.to(base.weight.device)

    def write_weight(self, wanted: Tensor) -> None:
        """Stores another weight, given as numbers, in the base layer's own format."""
        base = self.get_base_layer()
        base.weight.data = wanted.to(base.weight.dtype)


def _product(B: Tensor, A: Tensor) -> Tensor:
    """Returns ``B A`` in float32 at least."""
    dtype = torch.promote_types(B.dtype, torch.float32)
    return B.to(dtype) @ A.to(dtype)


class Linear(SpecLoraLayer, lora.Linear):
    """SpecLoRA on ``nn.Linear`` and on Conv1D, whose weight is stored transposed."""
