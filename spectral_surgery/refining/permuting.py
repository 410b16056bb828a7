"""Random orders of a candidate's own gates: what the same numbers do on other components."""

from __future__ import annotations

import numpy as np

from spectral_surgery.constraints import edit_size, with_edit_size
from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.policies import Gates
from spectral_surgery.policies.registry import generator
from spectral_surgery.refining.candidates import Candidate


def shuffled(gates: Gates | None, measured: Measurement) -> bool:
    """Returns whether another order is another edit: not so for one strength a module."""
    return any(np.ptp(alpha[measured.modules[path].alive]) > 0 for path, alpha in (gates or {}).items())


def permuted(winner: Candidate, measured: Measurement, count: int, seed: int) -> list[Candidate]:
    """Returns candidates with the winner's gates in random order within modules, each module's edit size as it was.

    Args:
        winner: With gates.
        measured: For singular values, ties and dead components.
        count: How many.
        seed: Of the orders; they depend on nothing else but the modules' paths.
    """
    found = []
    for number in range(count):
        gates = {
            path: _permuted(alpha, measured.modules[path], generator(seed + number, f"order:{path}"))
            for path, alpha in (winner.gates or {}).items()
        }
        found.append(Candidate(f"random order {number}", "random", "the same gates in random order", gates))
    return found


def _permuted(gates: np.ndarray, module: ModuleMeasurement, rng: np.random.Generator) -> np.ndarray:
    alive = module.alive
    drawn = gates.copy()
    drawn[alive] = rng.permutation(gates[alive])
    return module.share(with_edit_size(module.S, module.share(drawn), edit_size(module.S, gates)))
