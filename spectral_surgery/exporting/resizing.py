"""Other factors for the same update, or for the best update of a lower rank, and what that loses.

With ``B A = U diag(S) Vh`` the best update of rank k in the Frobenius norm keeps the first k components (Eckart and
Young, 1936), and what it loses is the root of the sum of the other S^2. Here, and only here, factors are made anew:
``B' = U sqrt(s S)`` and ``A' = sqrt(s S) Vh`` where s is what goes into the factors of the scale. A module that keeps
all of its components keeps its own factors, padded with zeros, and s goes into B.

All functions are pure and compute in float64; factors are cast once to the dtype that they were stored in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from spectral_surgery.errors import InputError, RunError
from spectral_surgery.exporting.destination import Resize
from spectral_surgery.spectrum import LowRank, exact, singular_values, thin_svd


@dataclass(frozen=True)
class Loss:
    """What another rank or layout does to one module's delta."""

    before: int
    """Rank of the source."""
    after: int
    """Rank written."""
    norm: float
    """Frobenius norm of the source's delta."""
    kept: float
    """Frobenius norm of the components that are kept."""
    error: float
    """Frobenius norm of what the written delta differs by: what was cut off, and the rounding of storage."""


@dataclass(frozen=True)
class Losses:
    """What another rank or layout does to several modules together."""

    modules: Mapping[str, Loss]
    """By module path."""

    @property
    def energy(self) -> float:
        """Share of the sum of squared singular values of all deltas that is kept, in [0, 1]."""
        whole = sum(loss.norm**2 for loss in self.modules.values())
        return sum(loss.kept**2 for loss in self.modules.values()) / whole if whole else 1.0

    @property
    def error(self) -> float:
        """Frobenius norm of the difference of all deltas together over that of the source's."""
        whole = math.hypot(*(loss.norm for loss in self.modules.values()))
        return math.hypot(*(loss.error for loss in self.modules.values())) / whole if whole else 0.0

    def only(self, paths: list[str]) -> Losses:
        """Returns some of the modules."""
        return Losses({path: self.modules[path] for path in paths})


def rank_for(S: Float[np.ndarray, " k"], resize: Resize) -> int:
    """Returns how many components energy or ratio keep of a module: at least one, at most those that are not zero.

    Args:
        S: Singular values, descending.
        resize: The rule.
    """
    if resize.rule == "energy":
        share = np.cumsum(S**2) / max((S**2).sum(), np.finfo(np.float64).tiny)
        wanted = int(np.searchsorted(share, resize.value * (1 - 1e-12))) + 1
    else:
        wanted = int((resize.value * S > S[0]).sum()) if resize.value > 1 else 1
    return max(1, min(wanted, int((S > 0).sum())))


def ranks_for(updates: Mapping[str, LowRank], resize: Resize, *, per_module: bool) -> dict[str, int]:
    """Returns the rank of every module.

    Args:
        updates: By module path.
        resize: The rule.
        per_module: Whether every module gets its own, under the rule rank no more than it has; otherwise all get one,
            the largest that any needs.

    Raises:
        InputError: If the rule asks for more than the adapter has.
    """
    largest = max(update.A.shape[0] for update in updates.values())
    if resize.rule == "rank" and resize.value > largest:
        raise InputError(
            f"--to rank={int(resize.value)}: the adapter's largest rank is {largest}. Choose that or a lower one."
        )
    if resize.rule == "rank":
        wanted = int(resize.value)
        return {path: min(wanted, update.A.shape[0]) if per_module else wanted for path, update in updates.items()}
    own = {path: rank_for(singular_values(update).numpy(), resize) for path, update in updates.items()}
    return own if per_module else dict.fromkeys(updates, max(own.values()))


def refitted(
    updates: Mapping[str, LowRank], ranks: Mapping[str, int], scales: Mapping[str, float]
) -> dict[str, LowRank]:
    """Returns factors of the given ranks and scales for the best update of every module.

    Args:
        updates: By module path.
        ranks: By module path.
        scales: What the new factors are multiplied by in the forward pass, by module path.

    Raises:
        RunError: If a new factor is not finite in the stored dtype.
    """
    return {path: _fitted(path, update, ranks[path], scales[path]) for path, update in updates.items()}


def _fitted(path: str, update: LowRank, rank: int, scale: float) -> LowRank:
    inside = update.scale / scale
    if update.A.shape[0] <= rank:
        B, A = inside * exact(update.B), exact(update.A)
    else:
        spectrum = thin_svd(update)
        root = (inside * spectrum.S[:rank]).sqrt()
        B, A = spectrum.U[:, :rank] * root, root[:, None] * spectrum.Vh[:rank]
    B, A = _padded(B, rank, 1).to(update.B.dtype), _padded(A, rank, 0).to(update.A.dtype)
    if not (B.isfinite().all() and A.isfinite().all()):
        raise RunError(f"{path}: the new factors overflow {update.B.dtype}. Save the adapter in float32 first.")
    return LowRank(B, A, scale)


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], axis).contiguous()


def lost(source: LowRank, written: LowRank) -> Loss:
    """Returns what the written factors of one module lose against the source's."""
    S = source.scale * singular_values(source).numpy()
    after = written.A.shape[0]
    return Loss(
        before=source.A.shape[0],
        after=after,
        norm=float(np.linalg.norm(S)),
        kept=float(np.linalg.norm(S[:after])),
        error=difference(source, written),
    )


def difference(one: LowRank, other: LowRank) -> float:
    """Returns ``||s B A - s' B' A'||_F`` without forming either product."""
    B = torch.cat([one.scale * exact(one.B), -other.scale * exact(other.B)], 1)
    A = torch.cat([exact(one.A), exact(other.A)])
    R_out = torch.linalg.qr(B, mode="r").R
    R_in = torch.linalg.qr(A.T, mode="r").R
    return float(torch.linalg.norm(R_out @ R_in.T))
