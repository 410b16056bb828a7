"""The learnable part of ``Gamma``: one number per row or direction, and how it acts without touching the weight.

With an orthonormal basis E (out, k), rows of the identity or singular directions of W, ``Gamma * W`` is
``W + E diag(delta) E^T W``. The frozen layer has computed ``y = W x + b`` already, so

    (Gamma * W) x + b  =  y + E (delta * E^T (y - b))

needs neither W nor a copy of it, also where W is quantised, and its derivative by delta is exact:
``dL/d delta_i = sum_t (E^T dL/dy_t)_i (E^T (y_t - b))_i``. The bias must be taken off first.

``delta = d - 1`` is what is learnt, not d: it starts at 0, weight decay pulls it towards the pre-trained weight rather
than towards nothing, and it is kept in float32 at least, because in bfloat16 steps of 1e-4 next to 1 are lost. (In the
rest of this package delta is the update ``s B A``; here it is the paper's scale less one.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from spectral_surgery.policies.registry import generator
from spectral_surgery.speclora.config import SpecLoraConfig


class Scale(nn.Module):
    """k deltas of one module and adapter; subclasses know the basis."""

    def __init__(self, k: int, bound: float | None) -> None:
        super().__init__()
        self.bound = bound
        self.delta = nn.Parameter(torch.zeros(k))

    @property
    def effective(self) -> Float[Tensor, " k"]:
        """``d - 1`` as it acts: the parameter itself, or within the bound."""
        return self.delta if self.bound is None else self.bound * torch.tanh(self.delta / self.bound)

    def coordinates(self, t: Float[Tensor, "*tokens out"]) -> Float[Tensor, "*tokens k"]:
        """Returns ``E^T t``."""
        raise AssertionError("each basis has its own")

    def spread(
        self, into: Float[Tensor, "*tokens out"], values: Float[Tensor, "*tokens k"]
    ) -> Float[Tensor, "*tokens out"]:
        """Returns ``into + E values``; may write into ``into``."""
        raise AssertionError("each basis has its own")

    def forward(
        self, out: Float[Tensor, "*tokens out"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*tokens k"]:
        """Returns ``delta * E^T (out - bias)``, to be spread."""
        self.keep_precision()
        return self.effective * self.without_bias(out, bias)

    def without_bias(
        self, out: Float[Tensor, "*tokens out"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*tokens k"]:
        """Returns ``E^T (out - bias)``."""
        values = self.coordinates(out)
        return values if bias is None else values.to(self.delta.dtype) - self.coordinates(bias)

    def keep_precision(self) -> None:
        """Puts delta back into float32 where it was stored in less, as TRL does with adapters of quantised bases."""
        if self.delta.dtype in (torch.bfloat16, torch.float16):
            self.delta.data = self.delta.data.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scale:
        """Moves to a device or dtype, delta never below float32."""
        delta = self.delta

        def apply(t: Tensor) -> Tensor:
            moved = fn(t)
            if t is delta and moved.dtype in (torch.bfloat16, torch.float16):
                return t.to(moved.device, torch.promote_types(t.dtype, torch.float32))
            return moved

        return super()._apply(apply, recurse)


class Slice(Scale):
    """k neighbouring rows."""

    def __init__(self, k: int, bound: float | None, start: int) -> None:
        super().__init__(k, bound)
        self.start = start

    def coordinates(self, t: Float[Tensor, "*tokens out"]) -> Float[Tensor, "*tokens k"]:
        """Returns these entries, copied: autograd would keep all of ``t`` alive for a view."""
        return t.narrow(-1, self.start, len(self.delta)).contiguous()

    def spread(
        self, into: Float[Tensor, "*tokens out"], values: Float[Tensor, "*tokens k"]
    ) -> Float[Tensor, "*tokens out"]:
        """Adds in place."""
        into.narrow(-1, self.start, len(self.delta)).add_(values)
        return into


class Picked(Scale):
    """k rows anywhere; which ones is saved with the adapter."""

    rows: Int64[Tensor, " k"]

    def __init__(self, bound: float | None, rows: Int64[Tensor, " k"]) -> None:
        super().__init__(len(rows), bound)
        self.register_buffer("rows", rows)

    def coordinates(self, t: Float[Tensor, "*tokens out"]) -> Float[Tensor, "*tokens k"]:
        """Returns these entries."""
        return t.index_select(-1, self.rows)

    def spread(
        self, into: Float[Tensor, "*tokens out"], values: Float[Tensor, "*tokens k"]
    ) -> Float[Tensor, "*tokens out"]:
        """Adds in place."""
        return into.index_add_(-1, self.rows, values.to(into.dtype))


class Directions(Scale):
    """k orthonormal output directions, saved with the adapter in the base weight's dtype."""

    U: Float[Tensor, "out k"]

    def __init__(self, bound: float | None, U: Float[Tensor, "out k"]) -> None:
        super().__init__(U.shape[1], bound)
        self.register_buffer("U", U)

    def coordinates(self, t: Float[Tensor, "*tokens out"]) -> Float[Tensor, "*tokens k"]:
        """Returns ``U^T t``."""
        dtype = torch.promote_types(t.dtype, self.U.dtype)
        return t.to(dtype) @ self.U.to(dtype)

    def spread(
        self, into: Float[Tensor, "*tokens out"], values: Float[Tensor, "*tokens k"]
    ) -> Float[Tensor, "*tokens out"]:
        """Adds ``U values`` in place, in one product."""
        rows = into.view(-1, into.shape[-1])
        rows.addmm_(values.to(into.dtype).reshape(-1, values.shape[-1]), self.U.T.to(into.dtype))
        return into


def make_scale(
    config: SpecLoraConfig, path: str, shape: tuple[int, int], weight: Callable[[], Float[Tensor, "out in"]]
) -> Scale | None:
    """Returns the scale of one module as configured, with ``delta = 0``; None where its k is 0.

    Args:
        config: k, rows, basis, seed and bound.
        path: The module's path.
        shape: (out, in) of its weight.
        weight: Gives the weight; only called where the choice depends on it.
    """
    out = shape[0]
    k = min(config.k_of(path), min(shape) if config.basis == "svd" else out)
    if k == 0:
        return None
    if config.basis == "svd":
        U = _directions(config, path, weight(), k) if config.init_basis else torch.full((out, k), torch.nan)
        return Directions(config.delta_bound, U)
    if config.rows in ("first", "last"):
        return Slice(k, config.delta_bound, 0 if config.rows == "first" else out - k)
    rows = _rows(config, path, out, weight, k) if config.init_basis else torch.full((k,), -1)
    return Picked(config.delta_bound, rows)


def _rows(
    config: SpecLoraConfig, path: str, out: int, weight: Callable[[], Float[Tensor, "out in"]], k: int
) -> Int64[Tensor, " k"]:
    if config.rows == "norm":
        return weight().float().norm(dim=1).topk(k).indices.sort().values.cpu()
    return torch.from_numpy(_sample(config, path, out, k))


def _directions(config: SpecLoraConfig, path: str, W: Float[Tensor, "out in"], k: int) -> Float[Tensor, "out k"]:
    U = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False).U
    if config.rows == "first":
        return U[:, :k].contiguous()
    if config.rows == "last":
        return U[:, -k:].contiguous()
    return U[:, torch.from_numpy(_sample(config, path, U.shape[1], k)).to(U.device)]


def _sample(config: SpecLoraConfig, path: str, count: int, k: int) -> Int64[np.ndarray, " k"]:
    chosen = generator(config.selection_seed, path).permutation(count)[:k]
    chosen.sort()
    return chosen
