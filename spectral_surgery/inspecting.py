"""What an adapter holds, module by module, from its files alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spectral_surgery.adapter import Adapter
from spectral_surgery.spectrum import effective_rank, stable_rank, thin_svd


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
    stable_rank: float
    """sum S^2 / max S^2, in [1, r]."""
    nuclear: float
    """sum of S."""
    frobenius: float
    """Root of sum S^2."""
    S: list[float]
    """Singular values of the unscaled update, descending."""
    tied_groups: int
    """Number of components that can be told apart as stored."""
    dtype: str
    """Stored dtype of the factors."""


def summarize(adapter: Adapter, paths: Iterable[str] | None = None) -> list[ModuleSummary]:
    """Returns a summary of every module, in the adapter's order."""
    updates = adapter.updates
    return [_summary(path, updates[path]) for path in (paths if paths is not None else updates)]


def to_json(adapter: Adapter, summaries: Iterable[ModuleSummary]) -> dict[str, Any]:
    """Returns the adapter and its summaries as plain values."""
    return {
        "adapter": adapter.name,
        "tensors_sha256": adapter.digest,
        "base_model": adapter.config.base_model,
        "modules": [asdict(summary) for summary in summaries],
    }


def _summary(path: str, update: Any) -> ModuleSummary:
    spectrum = thin_svd(update)
    S = spectrum.S.numpy()
    return ModuleSummary(
        module=path,
        shape=(update.B.shape[0], update.A.shape[1]),
        rank=update.A.shape[0],
        scale=update.scale,
        effective_rank=effective_rank(S),
        stable_rank=stable_rank(S),
        nuclear=float(S.sum()),
        frobenius=float(np.linalg.norm(S)),
        S=S.tolist(),
        tied_groups=int(spectrum.ties[-1]) + 1 if len(S) else 0,
        dtype=str(update.B.dtype).removeprefix("torch."),
    )
