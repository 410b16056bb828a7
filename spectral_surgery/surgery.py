"""The edit itself: low-rank factors and gates in, edited factors and a report out (Algorithm 1, arXiv 2603.03995).

For every module: decompose ``B A = U diag(S) Vh``, multiply S by the gates, and write the change into one factor by a
projector. The algebra is float64; the edited factor is cast once to the dtype it is stored in, and what that rounding
does to the update is reported beside the size of the edit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from spectral_surgery.constraints import edit_size
from spectral_surgery.errors import RunError
from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.spectrum import (
    LowRank,
    Spectrum,
    edited_factor,
    exact,
    thin_svd,
    update_norm,
)
from spectral_surgery.threads import each


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
    made = each(lambda path: _operate(path, updates[path], gates[path]), gates)
    edited = {path: result for path, (result, _) in zip(gates, made, strict=True)}
    return edited, EditReport({path: report for path, (_, report) in zip(gates, made, strict=True)})


def _operate(path: str, update: LowRank, gates: Float[np.ndarray, " r"]) -> tuple[LowRank, ModuleEdit]:
    factor, values, lost = edited_factor(update, gates)
    S = values.numpy()
    if not math.isfinite(lost):
        raise RunError(
            f"{path}: the edited factor overflows {factor.dtype}. "
            f"The largest gate is {gates.max():.3g}; choose a milder policy."
        )
    norm = float(np.linalg.norm(gates * S))
    edit = ModuleEdit(S, gates, update.scale, edit_size(S, gates), lost / norm if norm else lost)
    return update.with_stored(factor), edit


def distance(update: LowRank, wanted: LowRank) -> float:
    """Returns ``||B A - B' A'||_F / ||B' A'||_F`` for two updates that share a factor; 0 if both are zero."""
    norm, missing = update_norm(wanted.B, wanted.A), exact(wanted.stored) - exact(update.stored)
    difference = update_norm(missing, update.A) if update.side == "B" else update_norm(update.B, missing)
    return difference / norm if norm else difference


def spectra(updates: Mapping[str, LowRank]) -> dict[str, Spectrum]:
    """Returns the thin SVD of every update."""
    return dict(zip(updates, each(thin_svd, updates.values()), strict=True))


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
