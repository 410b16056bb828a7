"""One module's update in numbers, and its leading directions.

Everything follows from the two thin factors; nothing of the size of a weight is formed. Sizes are of the unscaled
update ``B A`` except where ``delta`` is said, which is ``scale B A``, what is really added to the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from spectral_surgery.measurement import DEAD_BELOW
from spectral_surgery.spectrum import LowRank, Spectrum, effective_rank, exact, stable_rank, thin_svd


@dataclass(frozen=True)
class ModuleSummary:
    """One module's update ``B A`` in numbers."""

    module: str
    """Module path."""
    shape: tuple[int, int]
    """(out, in) of the update."""
    rank: int
    """r of the factors."""
    scale: float
    """What B A is multiplied by in the forward pass."""
    effective_rank: float
    """exp of the entropy of S / sum S, in [1, r]."""
    participation_ratio: float
    """(sum S^2)^2 / sum S^4, in [1, r]: how many components share the energy."""
    stable_rank: float
    """sum S^2 / max S^2, in [1, r]."""
    nuclear: float
    """sum of S."""
    frobenius: float
    """Root of sum S^2."""
    spectral: float
    """Largest S."""
    delta_norm: float
    """Frobenius norm of scale B A."""
    S: list[float]
    """Singular values of the unscaled update, descending."""
    energy_kept: list[float]
    """Share of sum S^2 that the first 1, 2, ... components hold."""
    used_rank: int
    """Number of singular values that are not zero in exact arithmetic."""
    tied_groups: int
    """Number of components that can be told apart as stored."""
    closest_pair: float
    """Largest |cos| between two rank-one pieces b_i a_i^T of the stored factors; one means a duplicate."""
    cancellation: float
    """||B A|| / (||B|| ||A||) in Frobenius norms; about 1 / sqrt(r) for unrelated columns, less if pieces cancel."""
    dtype: str
    """Stored dtype of the factors."""


@dataclass(frozen=True)
class Leading:
    """The leading k directions of a module on both sides, as far as they are well defined."""

    U: Float[np.ndarray, "out k"]
    """Output directions, orthonormal columns, float32."""
    V: Float[np.ndarray, "in k"]
    """Input directions."""
    separate: bool
    """Whether the first component can be told from the second, so that one leading direction exists."""
    closed: bool
    """Whether component k can be told from k + 1 and is alive, so that the subspace of k exists."""


def dissect(path: str, update: LowRank, k: int) -> tuple[ModuleSummary, Leading | None]:
    """Returns a module's numbers and its leading k directions, none for k = 0."""
    spectrum = thin_svd(update)
    return summary(path, update, spectrum), leading(spectrum, k) if k else None


def summary(path: str, update: LowRank, spectrum: Spectrum) -> ModuleSummary:
    """Returns a module's numbers."""
    S = spectrum.S.numpy()
    energy = float((S**2).sum())
    B, A = exact(update.B), exact(update.A)
    return ModuleSummary(
        module=path,
        shape=(B.shape[0], A.shape[1]),
        rank=A.shape[0],
        scale=update.scale,
        effective_rank=effective_rank(S),
        participation_ratio=participation_ratio(S),
        stable_rank=stable_rank(S),
        nuclear=float(S.sum()),
        frobenius=math.sqrt(energy),
        spectral=float(S.max(initial=0.0)),
        delta_norm=abs(update.scale) * math.sqrt(energy),
        S=S.tolist(),
        energy_kept=(np.cumsum(S**2) / energy).tolist() if energy else [0.0] * len(S),
        used_rank=used_rank(S),
        tied_groups=int(spectrum.ties[-1]) + 1 if len(S) else 0,
        closest_pair=closest_pair(B, A),
        cancellation=_ratio(math.sqrt(energy), float(B.norm() * A.norm())),
        dtype=str(update.B.dtype).removeprefix("torch."),
    )


def leading(spectrum: Spectrum, k: int) -> Leading:
    """Returns the leading k directions of a spectrum, fewer where the module has fewer components."""
    S, ties = spectrum.S.numpy(), spectrum.ties
    k = min(k, len(S))
    alive = used_rank(S)
    return Leading(
        U=spectrum.U[:, :k].numpy().astype(np.float32),
        V=spectrum.Vh[:k].T.numpy().astype(np.float32),
        separate=alive > 0 and (len(S) == 1 or bool(ties[0] != ties[1])),
        closed=alive >= k and (len(S) == k or bool(ties[k - 1] != ties[k])),
    )


def participation_ratio(S: Float[np.ndarray, " k"]) -> float:
    """Returns ``(sum S^2)^2 / sum S^4``, in [1, k]; 0 for a zero update."""
    energy = S**2 / (S**2).max() if S.any() else S
    return _ratio(float(energy.sum()) ** 2, float((energy**2).sum()))


def used_rank(S: Float[np.ndarray, " k"]) -> int:
    """Returns how many singular values are not zero in exact arithmetic."""
    return int((DEAD_BELOW * S.max() < S).sum()) if S.any() else 0


def closest_pair(B: Float[Tensor, "out r"], A: Float[Tensor, "r in"]) -> float:
    """Returns the largest ``|cos|`` between two rank-one pieces ``b_i a_i^T``, 0 for fewer than two."""
    products = (B.T @ B) * (A @ A.T)
    norms = products.diagonal().clamp(min=0).sqrt()
    cosines = products / (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny)
    return min(1.0, float(cosines.fill_diagonal_(0).abs().max())) if len(norms) > 1 else 0.0


def update_cosine(first: LowRank, second: LowRank) -> float:
    """Returns the cosine between two deltas as vectors, ``<delta_1, delta_2> / (||delta_1|| ||delta_2||)``.

    From r x r Gram matrices alone; 0 where one of them is zero. By chance its size is about
    ``sqrt(2 / (pi out in))``.
    """

    def inner(one: LowRank, other: LowRank) -> float:
        return float(((exact(one.B).T @ exact(other.B)) * (exact(one.A) @ exact(other.A).T)).sum())

    norm = math.sqrt(max(inner(first, first), 0.0)) * math.sqrt(max(inner(second, second), 0.0))
    sign = math.copysign(1, first.scale * second.scale)
    return max(-1.0, min(1.0, sign * _ratio(inner(first, second), norm)))


def _ratio(value: float, norm: float) -> float:
    return value / norm if norm else 0.0
