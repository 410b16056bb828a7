"""SpecLoRA on quantised bases. Forward needs nothing of its own; here is how each format is merged and put back."""

from __future__ import annotations

from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from spectral_surgery.errors import BaseModelError
from spectral_surgery.speclora.layer import SpecLoraLayer


class TorchaoLinear(SpecLoraLayer, TorchaoLoraLinear):
    """On a weight that torchao quantised (int8)."""

    quantized = True

    def dequantized(self, weight: Any) -> Tensor:
        """Returns the weight as numbers."""
        return weight.dequantize()

    def detach_weight(self) -> Any:
        """Returns the quantised parameter."""
        return self.get_base_layer().weight

    def attach_weight(self, weight: Any) -> None:
        """Puts it back."""
        self.get_base_layer().weight = weight

    def write_weight(self, wanted: Tensor) -> None:
        """Quantises as the base model was.

        Raises:
            BaseModelError: If the base model does not say how it was quantised.
        """
        from torchao import quantize_

        if self.get_apply_tensor_subclass is None:
            raise BaseModelError(
                f"{self.path}: the base model does not say how torchao quantised it, so the merged weight cannot be "
                f"quantised again. Load it through transformers with a TorchAoConfig."
            )
        base = self.get_base_layer()
        dtype = base.weight.dtype
        del base.weight
        base.weight = nn.Parameter(wanted.to(dtype), requires_grad=False)
        quantize_(base, self.get_apply_tensor_subclass())


if is_bnb_available():
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear8bitLt as LoraLinear8bit

    class Linear8bit(SpecLoraLayer, LoraLinear8bit):
        """On bitsandbytes int8."""

        quantized = True

        def dequantized(self, weight: Any) -> Tensor:
            """Returns the weight as numbers."""
            packed, scales = weight
            return packed.data.float() * scales.float()[:, None] / 127

        def detach_weight(self) -> Any:
            """Returns the packed parameter and its row scales."""
            base = self.get_base_layer()
            scales = base.state.SCB if base.state.SCB is not None else base.weight.SCB
            return base.weight, scales

        def attach_weight(self, weight: Any) -> None:
            """Puts them back; bitsandbytes reads both anew at the next forward pass."""
            base = self.get_base_layer()
            packed, scales = weight
            packed.CB, packed.SCB = packed.data, scales
            base.weight = packed
            base.state.reset_grads()

        def write_weight(self, wanted: Tensor) -> None:
            """Quantises again."""
            base = self.get_base_layer()
            device = base.weight.device
            packed = bnb.nn.Int8Params(
                wanted.to("cpu", torch.float16), requires_grad=False, has_fp16_weights=base.state.has_fp16_weights
            )
            base.weight = packed.to(device)
            base.state.reset_grads()


if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    class Linear4bit(SpecLoraLayer, LoraLinear4bit):
        """On bitsandbytes 4-bit (nf4 and fp4)."""

        quantized = True

        def dequantized(self, weight: Any) -> Tensor:
            """Returns the weight as numbers."""
            return dequantize_bnb_weight(weight, state=weight.quant_state)

        def detach_weight(self) -> Any:
            """Returns the packed parameter."""
            return self.get_base_layer().weight

        def attach_weight(self, weight: Any) -> None:
            """Puts it back."""
            self.get_base_layer().weight = weight

        def write_weight(self, wanted: Tensor) -> None:
            """Quantises again with the same options."""
            base = self.get_base_layer()
            old = base.weight
            packed = bnb.nn.Params4bit(
                wanted.to("cpu", old.quant_state.dtype),
                requires_grad=False,
                quant_type=old.quant_type,
                blocksize=old.blocksize,
                compress_statistics=old.compress_statistics,
                quant_storage=old.quant_storage,
            )
            base.weight = packed.to(old.device)


def layer_class(base: nn.Module) -> type[SpecLoraLayer] | None:
    """Returns the layer class for a quantised linear layer; None for one that is not known."""
    if is_bnb_4bit_available() and isinstance(base, bnb.nn.Linear4bit):
        return Linear4bit
    if is_bnb_available() and isinstance(base, bnb.nn.Linear8bitLt):
        return Linear8bit
    return TorchaoLinear if type(base.weight).__module__.startswith("torchao") else None
