"""What the seats share that gate a weight instead of an output: all examples of a batch see one weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_surgery.live.gating import Gating
from spectral_surgery.live.seats.site import Site


def removed(sites: list[Site], gating: Gating, like: Tensor) -> Float[Tensor, "sites out r"]:
    """Returns ``U diag(1 - alpha) U^T B`` of every site: what its gates take away from B."""
    parts = [site.like(like) for site in sites]
    alpha = torch.cat([gating.weights(site.path, part) for site, part in zip(sites, parts, strict=True)])
    U, C = torch.stack([part.U for part in parts]), torch.stack([part.C for part in parts])
    return U @ ((1 - alpha)[..., None] * C)
