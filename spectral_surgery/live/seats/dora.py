"""Gates on a DoRA layer, row norms included.

DoRA computes ``m (W + dW) x / n`` with ``n`` the row norms of ``W + dW``. PEFT takes n for a constant in its gradient,
which makes autograd's sensitivities wrong by more than their size; and n moves with the gates. With ``M = (W + dW) V``
and sigma the scaled singular values, ``n_j(alpha)^2 = n_j^2 + 2 sum_k (alpha_k - 1) sigma_k U_jk M_jk + sum_k
(alpha_k - 1)^2 sigma_k^2 U_jk^2``, so gate and norm are applied together to the layer's output, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from spectral_surgery.errors import BaseModelError
from spectral_surgery.live.gating import Components, Gating, RowNorm
from spectral_surgery.live.seats import lora_b
from spectral_surgery.live.seats.embedding import embed_scale
from spectral_surgery.live.seats.site import Site, gated_output
from spectral_surgery.spectrum import LowRank, Spectrum, exact

ROWS = 1024
"""Rows of the base weight taken at once, so that no second copy of it is made."""


def check(layer: Any, path: str) -> None:
    """Refuses what PEFT's LoRA does not compute.

    Raises:
        BaseModelError: If the layer is a grouped or dilated convolution, or its weight is not in memory.
    """
    lora_b.check(layer, path)
    if layer.get_base_layer().weight.is_meta:
        raise BaseModelError(
            f"{path}: the weight is offloaded, and DoRA's row norms need it. Load the base model without offloading."
        )


@torch.no_grad()
def components(site: Site, update: LowRank, spectrum: Spectrum) -> Components:
    """Returns the components behind scale and magnitude, with the row norms."""
    layer, base = site.layer, site.layer.get_base_layer()
    W = _weight(layer)
    A, B, s = exact(update.A), exact(update.B), update.scale
    U, sigma, V = spectrum.U, s * spectrum.S, spectrum.Vh.T
    norm2, M = [], []
    for start in range(0, len(W), ROWS):
        rows = exact(W[start : start + ROWS]) + s * B[start : start + ROWS] @ A
        norm2.append(rows.square().sum(1))
        M.append(rows @ V)
    n2 = torch.cat(norm2)
    along = 2 * sigma * U * torch.cat(M) / n2[:, None]
    bias = getattr(base, "bias", None)
    bias = torch.zeros_like(n2) if bias is None else exact(bias)
    norm = RowNorm(along.T, (sigma * U).square().T / n2, bias)
    magnitude = exact(layer.lora_magnitude_vector[site.adapter].weight).flatten() / n2.sqrt()
    scale = site.parts.scale * embed_scale(layer)
    return replace(site.parts, U=magnitude[:, None] * U, C=scale * site.parts.C, scale=1.0, norm=norm)


def attach(sites: list[Site], gating: Gating, stack: ExitStack) -> None:
    """Puts a forward hook on the layer."""
    for site in sites:
        stack.callback(site.layer.register_forward_hook(_hook(site, gating)).remove)


def _hook(site: Site, gating: Gating) -> Callable[..., Tensor]:
    def hook(module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not site.acts:
            return out
        return gated_output(site, gating, _read(module, site.adapter, inputs[0]), out, _channel(module))

    return hook


def _read(layer: Any, adapter: str, x: Tensor) -> Tensor:
    if adapter in layer.lora_embedding_A:
        return embedding(x, layer.lora_embedding_A[adapter].T)
    lora_A = layer.lora_A[adapter]
    return lora_A(x.to(lora_A.weight.dtype))


def _channel(layer: Any) -> int:
    return lora_b.channel(layer.get_base_layer())


def _weight(layer: Any) -> Tensor:
    """Returns the base weight as (out, in): dequantised, kernels flattened, embeddings and Conv1D transposed."""
    from peft.utils.integrations import dequantize_module_weight

    base = layer.get_base_layer()
    W = dequantize_module_weight(base).detach()
    turned = isinstance(base, nn.Embedding) or getattr(layer, "fan_in_fan_out", False)
    return (W.T if turned else W).flatten(1)
