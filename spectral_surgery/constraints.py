"""What holds an edit back: clamp, then keep an energy, then cap the size (Sec. 3.4 of arXiv 2603.03995).

With edited values ``S'_k = alpha_k S_k`` the module is rescaled by one factor so that the chosen energy is kept:

- ``nuclear``: ``sum S``, the paper's default. A gradient equal on all components then gives no edit at all: only
  differences between components act, and plain weakening of the adapter is impossible;
- ``frobenius``: ``sqrt(sum S^2)``;
- ``functional``: root of the mean output energy on the measuring rows, ``sqrt(sum_k alpha_k^2 e_k)``, additive because
  the output directions are orthonormal;
- ``none``.

As in the paper's code the clamp comes first, so rescaling may take a value below the floor again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from spectral_surgery.errors import PolicyError, combine
from spectral_surgery.measurement import ModuleMeasurement

Energy = Literal["nuclear", "frobenius", "functional", "none"]


@dataclass(frozen=True)
class Constraint:
    """Clamp, energy and size limit, applied per module after a policy.

    Raises:
        PolicyError: If the energy is unknown or a limit is negative.
    """

    energy: Energy = "nuclear"
    """Which energy an edit keeps."""
    floor: float = 0.0
    """Edited singular values are at least this (units of S), before the energy is restored."""
    max_edit_size: float | None = None
    """Largest relative edit ``||S' - S|| / ||S||`` of a module; a larger one is shortened along its own direction."""

    def __post_init__(self) -> None:
        combine(list(self._faults()), PolicyError)

    def _faults(self) -> Iterator[str]:
        if self.energy not in get_args(Energy):
            yield f"Unknown energy {self.energy!r}. Choose one of: {', '.join(get_args(Energy))}."
        for name in ("floor", "max_edit_size"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < np.inf:
                yield f"{name} is {value}, expected a finite number of at least 0."


def constrain(
    gates: Float[np.ndarray, " r"], module: ModuleMeasurement, constraint: Constraint
) -> Float[np.ndarray, " r"]:
    """Returns the gates after clamp, energy and cap. Components that are not alive keep their gate.

    Raises:
        PolicyError: If functional energy is asked of a module without measured output energy.
    """
    alive = module.alive
    S, alpha = module.S[alive], gates[alive]
    alpha = np.maximum(alpha, constraint.floor / S)
    alpha = alpha * _restoring(alpha, module, constraint.energy)
    size = edit_size(S, alpha)
    if constraint.max_edit_size is not None and size > constraint.max_edit_size:
        alpha = 1 + (alpha - 1) * (constraint.max_edit_size / size)
    return _placed(gates, alive, alpha)


def edit_size(S: Float[np.ndarray, " r"], gates: Float[np.ndarray, " r"]) -> float:
    """Returns the relative Frobenius change ``||S' - S|| / ||S||`` of the update; 0 for a zero update."""
    norm = np.linalg.norm(S)
    return float(np.linalg.norm((gates - 1) * S) / norm) if norm else 0.0


def with_edit_size(S: Float[np.ndarray, " r"], gates: Float[np.ndarray, " r"], size: float) -> Float[np.ndarray, " r"]:
    """Returns ``max(0, 1 + t (gates - 1))`` with the t that gives the edit this size.

    Where the clamp at zero makes the size unreachable, the largest possible edit of this shape is returned.
    """
    step = gates - 1
    low, high = 0.0, 1.0
    if not step.any() or size == 0:
        return np.ones_like(gates)
    while edit_size(S, np.maximum(0, 1 + high * step)) < size and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        too_small = edit_size(S, np.maximum(0, 1 + middle * step)) < size
        low, high = (middle, high) if too_small else (low, middle)
    return np.maximum(0, 1 + high * step)


def _restoring(alpha: Float[np.ndarray, " alive"], module: ModuleMeasurement, energy: Energy) -> float:
    """Returns the factor that brings the energy of the living components back."""
    alive = module.alive
    S = module.S[alive]
    if energy == "none" or not alpha.size:
        return 1.0
    if energy == "nuclear":
        before, after = S.sum(), (alpha * S).sum()
    elif energy == "frobenius":
        before, after = np.linalg.norm(S), np.linalg.norm(alpha * S)
    else:
        if not len(module.output_energy):
            raise PolicyError(
                "Functional energy needs output energies from measuring rows, and there are none. "
                "Measure first, or choose nuclear, frobenius or none."
            )
        weight = module.energy[alive]
        before, after = np.sqrt(weight.sum()), np.sqrt((alpha**2 * weight).sum())
    return float(before / after) if after > 0 else 1.0


def _placed(gates: np.ndarray, alive: np.ndarray, alpha: np.ndarray) -> Float[np.ndarray, " r"]:
    result = gates.copy()
    result[alive] = alpha
    return result
