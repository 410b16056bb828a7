"""Gates on stacked experts and other parameters: PEFT adds their update to the weight, so the factors are gated."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import BaseModelError
from spectral_surgery.live.gating import Components, Gating
from spectral_surgery.live.seats.site import Site, override
from spectral_surgery.live.seats.weights import removed
from spectral_surgery.spectrum import LowRank, Spectrum


def check(layer: Any, path: str) -> None:
    """Refuses a layer that wraps another parameter than the file was read for.

    Raises:
        BaseModelError: If the names differ.
    """
    name = getattr(layer, "parameter_name", None)
    if name is None or (name != "weight" and path.rpartition(".")[2] != name):
        raise BaseModelError(
            f"{path}: the model adapts parameter {name!r} here, so the file was read in another order."
        )


def components(site: Site, update: LowRank, spectrum: Spectrum) -> Components:
    """Returns the components; their energy is that of white inputs, as the expert's own are not seen."""
    return site.parts.unseen(spectrum.S)


def attach(sites: list[Site], gating: Gating, stack: ExitStack) -> None:
    """Replaces the methods by which PEFT takes the layer's factors and their product."""
    layer, adapter = sites[0].layer, sites[0].adapter
    index = torch.tensor([site.place.expert for site in sites])
    upright = getattr(layer, "_did_swap_in_out_features", False)  # (out, in) slices, as nn.Linear has them

    def without(stacked: Tensor, gone: Tensor) -> Tensor:
        return stacked.index_add(0, index.to(stacked.device), gone.to(stacked.dtype), alpha=-1)

    def get_delta_factors(name: str) -> tuple[Tensor, Tensor, float]:
        left, right, scale = factors(name)
        if name != adapter:
            return left, right, scale
        if upright:
            return without(left, removed(sites, gating, left)), right, scale
        return left, without(right, removed(sites, gating, right).mT), scale

    def get_delta_weight(name: str, *args: Any, **kwargs: Any) -> Tensor:
        delta = product(name, *args, **kwargs)
        if name != adapter:
            return delta
        A = layer.lora_A[adapter].weight
        gone = layer.scaling[adapter] * removed(sites, gating, delta)
        gone = gone @ A.reshape(layer.num_experts, -1, A.shape[-1])[index.to(A.device)].to(gone.dtype)
        if delta.ndim == 2:
            return (delta - gone[0]).to(delta.dtype)
        return without(delta, gone if upright else gone.mT)

    product: Any = layer.get_delta_weight
    factors: Any = getattr(layer, "get_delta_factors", None)  # PEFT 0.21 and later
    override(layer, "get_delta_weight", get_delta_weight, stack)
    if factors:
        override(layer, "get_delta_factors", get_delta_factors, stack)
