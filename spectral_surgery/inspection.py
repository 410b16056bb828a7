"""What is known about one adapter: the value that every view of an inspection shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from spectral_surgery.alignment import Curve, Group, Matrix, groups
from spectral_surgery.selection import block
from spectral_surgery.significance import Response

if TYPE_CHECKING:
    from spectral_surgery.anatomy import ModuleSummary
    from spectral_surgery.weight_study import BaseView
else:
    BaseView = ModuleSummary = Any


@dataclass(frozen=True)
class Comparison:
    """Two adapters, module by module."""

    cosine: Mapping[str, float]
    """Cosine between the two deltas as vectors, in [-1, 1], by module path."""
    strength: Mapping[str, float]
    """Ratio of their Frobenius norms, this adapter's over the other's; NaN where the other's is zero."""
    curves: tuple[Curve, ...]
    """Directions of the same module in both, by kind and side, over layers."""
    missing: int
    """Modules that only one of the two has, or has in another shape."""


@dataclass(frozen=True)
class Aggregate:
    """Several modules together: a kind, a layer, or all."""

    modules: int
    delta_norm: float
    """Root of the sum of squared delta norms."""
    share: float
    """Of the adapter's sum of squared delta norms, in [0, 1]."""
    effective_rank: float
    """Mean over modules."""
    participation_ratio: float
    """Mean over modules."""
    stable_rank: float
    """Mean over modules."""
    energy_kept: list[float]
    """Share of sum S^2 in the first 1, 2, ... components, mean over modules."""


@dataclass(frozen=True)
class Inspection:
    """One adapter, looked at from its files and whatever else was given."""

    name: str
    """As the user gave it, made unique where several adapters are inspected."""
    digest: str
    """sha256 of all tensors."""
    base_model: str | None
    parameters: int
    """Values in the factors."""
    other_tensors: int
    """Tensors that are no factor and pass through an edit."""
    nonfinite: tuple[str, ...]
    """Tensors with values that are not finite; their modules are left out of everything else."""
    modules: Mapping[str, ModuleSummary]
    """By module path, in the adapter's order."""
    k: int
    """Dimension of the compared subspaces."""
    matrices: tuple[Matrix, ...] = ()
    curves: tuple[Curve, ...] = ()
    against: Mapping[str, Comparison] = field(default_factory=dict)
    """Comparison with each other adapter, by its name."""
    responses: Mapping[str, Response] = field(default_factory=dict)
    """Where a sensitivity file was given, by module path."""
    examples: int = 0
    """Measuring rows behind the responses."""
    base: Mapping[str, BaseView] = field(default_factory=dict)
    """Where base weights were given, by module path."""

    @property
    def groups(self) -> list[Group]:
        """The modules by kind."""
        return groups(self.modules)

    @property
    def comparisons(self) -> int:
        """Number of figures that are held against chance: every mean, and every defined pair."""
        pairs = sum(2 + 2 * m.overlap.shape[0] * (m.overlap.shape[0] - 1) // 2 for m in self.matrices)
        curves = [*self.curves, *(curve for other in self.against.values() for curve in other.curves)]
        return max(1, pairs + sum(2 * len(curve.layers) + 2 for curve in curves))

    @property
    def total(self) -> Aggregate:
        """The whole adapter."""
        return self.aggregate(self.modules)

    @property
    def layers(self) -> dict[int, Aggregate]:
        """Every layer's modules together; -1 stands for modules outside numbered layers."""
        paths: dict[int, list[str]] = {}
        for group in self.groups:
            for number, path in zip(group.layers, group.paths, strict=True):
                paths.setdefault(number, []).append(path)
        return {number: self.aggregate(paths[number]) for number in sorted(paths)}

    @property
    def blocks(self) -> dict[str, dict[int, Aggregate]]:
        """Every numbered block's modules together, by family (input_blocks, output_blocks) and number."""
        paths: dict[tuple[str, int], list[str]] = {}
        for path in self.modules:
            if found := block(path):
                paths.setdefault(found, []).append(path)
        families: dict[str, dict[int, Aggregate]] = {}
        for family, number in sorted(paths, key=lambda one: one[1]):
            families.setdefault(family, {})[number] = self.aggregate(paths[family, number])
        return families

    def aggregate(self, paths: Iterable[str]) -> Aggregate:
        """Returns some modules together."""
        modules = [self.modules[path] for path in paths]
        energy = sum(module.delta_norm**2 for module in modules)
        whole = sum(module.delta_norm**2 for module in self.modules.values())
        return Aggregate(
            modules=len(modules),
            delta_norm=math.sqrt(energy),
            share=energy / whole if whole else 0.0,
            effective_rank=float(np.mean([module.effective_rank for module in modules])),
            participation_ratio=float(np.mean([module.participation_ratio for module in modules])),
            stable_rank=float(np.mean([module.stable_rank for module in modules])),
            energy_kept=_mean_curve([module.energy_kept for module in modules]),
        )

    def norms(self, group: Group) -> Float[np.ndarray, " layers"]:
        """Returns the delta norms of a kind by layer."""
        return np.array([self.modules[path].delta_norm for path in group.paths])


def _mean_curve(curves: Sequence[list[float]]) -> list[float]:
    longest = max(map(len, curves), default=0)
    padded = [[*curve, *([curve[-1] if curve else 0.0] * (longest - len(curve)))] for curve in curves]
    return np.mean(padded, 0).tolist() if longest else []
