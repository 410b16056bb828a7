"""Gates on the output of lora_B: linear layers and convolutions.

The hook sits inside PEFT's own branch, so scale, dropout, quantised bases, disabled and further adapters, aLoRA's
masks and a bias of B need no thought.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectral_surgery.errors import BaseModelError
from spectral_surgery.live.gating import Components, Gating
from spectral_surgery.live.seats.site import Site, gated_output
from spectral_surgery.spectrum import LowRank, Spectrum


def check(layer: Any, path: str) -> None:
    """Refuses convolutions that PEFT computes another function for.

    Raises:
        BaseModelError: If the layer is a grouped or dilated convolution.
    """
    base = layer.get_base_layer()
    if isinstance(base, _ConvNd) and (base.groups > 1 or any(step > 1 for step in base.dilation)):
        raise BaseModelError(
            f"{path}: the convolution has {base.groups} groups and dilation {base.dilation}, and PEFT's LoRA does not "
            f"compute s B A there. Leave the module out of the adapter."
        )


def components(site: Site, update: LowRank, spectrum: Spectrum) -> Components:
    """Returns the components as they are."""
    return site.parts


def attach(sites: list[Site], gating: Gating, stack: ExitStack) -> None:
    """Puts a forward hook on lora_B."""
    for site in sites:
        stack.callback(site.layer.lora_B[site.adapter].register_forward_hook(_hook(site, gating)).remove)


def channel(module: nn.Module) -> int:
    """Returns the dimension of a layer's features."""
    return -len(module.kernel_size) - 1 if isinstance(module, _ConvNd) else -1


def _hook(site: Site, gating: Gating) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return gated_output(site, gating, inputs[0], out, channel(module))

    return hook
