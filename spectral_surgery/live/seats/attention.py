"""Gates on nn.MultiheadAttention: PEFT merges its updates into the weights for every forward pass.

PEFT 0.21 merges the output projection twice, once seen by autograd and once not. What the model computes is what is
gated and measured: how often the update arrives is found by merging once, and the derivative is multiplied by it.
Merging also rounds the base weights a little at every pass; they are put back when the gates are taken out.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.live.gating import Components, Gating
from spectral_surgery.live.seats.site import Site, override
from spectral_surgery.live.seats.weights import removed
from spectral_surgery.spectrum import LowRank, Spectrum


def check(layer: Any, path: str) -> None:
    """Accepts every attention."""


@torch.no_grad()
def components(site: Site, update: LowRank, spectrum: Spectrum) -> Components:
    """Returns the components with the scale at which the update arrives.

    Their energy is that of white inputs, as the projections' own are not seen.
    """
    attention = site.model.get_submodule(site.place.layer.removesuffix(".base_layer.out_proj"))
    owner, name = _projection(site.layer)
    before, delta = getattr(owner, name).detach().clone(), site.layer.get_delta_weight(site.adapter)
    with ExitStack() as stack:
        for layer in (attention, attention.get_base_layer().out_proj):
            _keep_weight(layer, stack)
        attention.merge(adapter_names=[site.adapter])
        arrived = getattr(owner, name).detach() - before
        attention.unmerge()
    times = round(float((arrived * delta).sum() / delta.square().sum())) if delta.any() else 1
    return replace(site.parts, scale=times * site.parts.scale).unseen(spectrum.S)


def attach(sites: list[Site], gating: Gating, stack: ExitStack) -> None:
    """Replaces the method by which PEFT takes the projection's update."""
    (site,) = sites
    layer, adapter = site.layer, site.adapter
    product, scale = layer.get_delta_weight, layer.scaling[adapter]
    _keep_weight(layer, stack)

    def get_delta_weight(name: str) -> Tensor:
        delta = product(name)
        if name != adapter:
            return delta
        A = layer.lora_A[adapter].weight
        gone = scale * removed(sites, gating, delta)[0]
        gone = gone @ A.to(gone.dtype)
        gated = (delta - gone).to(delta.dtype)
        unseen = site.parts.scale / scale - 1
        return gated + unseen * (gated - gated.detach())

    override(layer, "get_delta_weight", get_delta_weight, stack)


def _projection(layer: Any) -> tuple[nn.Module, str]:
    """Returns the module and the name of the weight that a layer adapts."""
    base = layer.get_base_layer()
    return base, "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"


def _keep_weight(layer: Any, stack: ExitStack) -> None:
    owner, name = _projection(layer)
    before = getattr(owner, name).detach().clone()

    def put_back() -> None:
        getattr(owner, name).data.copy_(before)

    stack.callback(put_back)
