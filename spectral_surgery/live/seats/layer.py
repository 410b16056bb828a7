"""Gates on the output of the whole layer, for kinds that do not call lora_B as a module: AdaLoRA and QALoRA.

The components read the layer's own input through A, and stand behind the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from spectral_surgery.errors import BaseModelError
from spectral_surgery.live.gating import Components, Gating
from spectral_surgery.live.seats.site import Site, gated_output
from spectral_surgery.spectrum import LowRank, Spectrum


def check(layer: Any, path: str) -> None:
    """Refuses a layer that ignores the adapter's settings.

    Raises:
        BaseModelError: If it is to pool its inputs and does not.
    """
    if not hasattr(layer, "ranknum") and not hasattr(layer, "qalora_group_size"):
        raise BaseModelError(
            f"{path}: adapter_config.json has use_qalora switched on, which PEFT ignores on this base model, as it is "
            f"not quantised by GPTQ. If the adapter was trained on such a base, set use_qalora to false there."
        )


def components(site: Site, update: LowRank, spectrum: Spectrum) -> Components:
    """Returns the components with scale and input factor in them."""
    return site.parts.folded(update.A)


def attach(sites: list[Site], gating: Gating, stack: ExitStack) -> None:
    """Puts a forward hook on the layer."""
    for site in sites:
        stack.callback(site.layer.register_forward_hook(_hook(site, gating)).remove)


def _hook(site: Site, gating: Gating) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not site.acts:
            return out
        parts = site.like(out)
        assert parts.A is not None
        return gated_output(site, gating, inputs[0].to(parts.A.dtype) @ parts.A.T, out)

    return hook
