"""Gates on the output of an embedding: the components read tokens through A as a table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import embedding

from spectral_surgery.live.gating import Components, Gating
from spectral_surgery.live.seats.site import Site, gated_output
from spectral_surgery.spectrum import LowRank, Spectrum


def check(layer: Any, path: str) -> None:
    """Accepts every embedding."""


def components(site: Site, update: LowRank, spectrum: Spectrum) -> Components:
    """Returns the components with scale, input factor and the scale that some models put on embeddings in them."""
    return replace(site.parts, scale=site.parts.scale * embed_scale(site.layer)).folded(update.A)


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
        return gated_output(site, gating, embedding(inputs[0], parts.A.T), out)

    return hook


def embed_scale(layer: Any) -> float:
    """Returns what a model multiplies its embeddings by, such as Gemma; one in most, and in layers of other kinds."""
    factor = layer._get_embed_scale() if hasattr(layer, "_get_embed_scale") else None
    return 1.0 if factor is None else float(factor)
