"""The edit itself: low-rank factors and gates in, edited factors and a report out (Algorithm 1, arXiv 2603.03995).

For every module: decompose ``B A = U diag(S) Vh``, multiply S by the gates, and write the change into one factor by a
projector. The algebra is float64; the edited factor is cast once to the dtype it is stored in, and what that rounding
does to the update is reported beside the size of the edit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from spectral_surgery.constraints import edit_size
from spectral_surgery.errors import RunError
from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.spectrum import (
    LowRank,
    Spectrum,
    edit_left,
    edit_right,
    exact,
    thin_svd,
    update_norm,
)


@dataclass(frozen=True)
class ModuleEdit:
    """What was done to one module."""

    S: Float[np.ndarray, " r"]
    """Singular values of the unedited update."""
    gates: Float[np.ndarray, " r"]
    """Their multipliers."""
    scale: float
    """What B A is multiplied by in the forward pass."""
    size: float
    """Relative Frobenius change of the update, ``||S' - S|| / ||S||``."""
    rounding: float
    """Relative Frobenius error of the stored edited update, from its one cast."""


@dataclass(frozen=True)
class EditReport:
    """What an edit did, by module path."""

    modules: Mapping[str, ModuleEdit]

    @property
    def components(self) -> int:
        """Number of components in the selected modules."""
        return sum(len(module.S) for module in self.modules.values())

    @property
    def edited(self) -> int:
        """Number of components whose gate is not one."""
        return sum(int((module.gates != 1).sum()) for module in self.modules.values())

    @property
    def size(self) -> float:
        """Relative Frobenius change of all selected modules' deltas together."""
        norms = [module.scale * np.linalg.norm(module.S) for module in self.modules.values()]
        changes = [norm * m.size for norm, m in zip(norms, self.modules.values(), strict=True)]
        return math.hypot(*changes) / math.hypot(*norms) if any(norms) else 0.0

    @property
    def drowned(self) -> list[str]:
        """Paths of edited modules whose edit is less than five times its own rounding."""
        return [path for path, m in self.modules.items() if 0 < m.size < 5 * m.rounding]


def operate(
    updates: Mapping[str, LowRank], gates: Mapping[str, Float[np.ndarray, " r"]]
) -> tuple[dict[str, LowRank], EditReport]:
    """Returns the edited factors of every gated module, and the report.

    Args:
        updates: Factors by module path, as stored.
        gates: Multipliers by module path; a subset of the updates' paths.

    Raises:
        RunError: If an edited factor is not finite in the stored dtype.
    """
    edited, report = {}, {}
    for path, alpha in gates.items():
        edited[path], report[path] = _operate(path, updates[path], alpha)
    return edited, EditReport(report)


def _operate(path: str, update: LowRank, gates: Float[np.ndarray, " r"]) -> tuple[LowRank, ModuleEdit]:
    spectrum = thin_svd(update)
    S = spectrum.S.numpy()
    if update.side == "B":
        wanted = replace(update, B=edit_left(update.B, spectrum.U, gates))
    else:
        wanted = replace(update, A=edit_right(update.A, spectrum.Vh, gates))
    factor = wanted.stored.to(update.stored.dtype)
    if not factor.isfinite().all():
        raise RunError(
            f"{path}: the edited factor overflows {factor.dtype}. "
            f"The largest gate is {gates.max():.3g}; choose a milder policy."
        )
    result = replace(update, B=factor) if update.side == "B" else replace(update, A=factor)
    return result, ModuleEdit(S, gates, update.scale, edit_size(S, gates), distance(result, wanted))


def distance(update: LowRank, wanted: LowRank) -> float:
    """Returns ``||B A - B' A'||_F / ||B' A'||_F`` for two updates that share a factor; 0 if both are zero."""
    norm = update_norm(wanted.B, wanted.A)
    if update.side == "B":
        difference = update_norm(exact(update.B) - exact(wanted.B), update.A)
    else:
        difference = update_norm(update.B, exact(update.A) - exact(wanted.A))
    return difference / norm if norm else difference


def spectra(updates: Mapping[str, LowRank]) -> dict[str, Spectrum]:
    """Returns the thin SVD of every update."""
    return {path: thin_svd(update) for path, update in updates.items()}


def unmeasured(found: Mapping[str, Spectrum]) -> Measurement:
    """Returns a Measurement of no examples: enough for every policy that needs no sensitivities."""
    return Measurement(
        {
            path: ModuleMeasurement(
                S=spectrum.S.numpy(),
                ties=spectrum.ties,
                gate_gradient=np.zeros((0, len(spectrum.S))),
                output_energy=np.zeros((0, len(spectrum.S))),
            )
            for path, spectrum in found.items()
        }
    )
