"""Gates and spectra of the answer by layer and kind of module, ready to be drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from spectral_surgery.report.facts import Verdict, visible

STRIPES = 32
"""Most stripes of a cell; more components are averaged."""
FLOOR = 1e-3
"""Least singular value that is drawn, relative to the largest."""


@dataclass(frozen=True)
class GateMap:
    """One cell a module, one stripe a component, the largest singular value first."""

    kinds: list[str]
    rows: list[str]
    """Layer numbers; a layer with several modules of a kind has several rows."""
    cells: Mapping[tuple[int, str], Mapping[str, Any]]
    """By row and kind."""
    reach: float
    """Colours run from one less this to one plus this."""

    def share(self, gate: float) -> float:
        """Returns the place of a gate on the colour scale: 0 the weakest, 0.5 unchanged, 1 the strongest."""
        return 0.5 + (gate - 1) / (2 * self.reach)


def gate_map(verdict: Verdict) -> GateMap | None:
    """Returns the map, or None where no gates are part of the answer."""
    modules = verdict["gates"]
    if not modules:
        return None
    seen: Counter[tuple[int, str]] = Counter()
    placed = {}
    for module in modules:
        where = (-1 if module["layer"] is None else module["layer"], visible(module["kind"]))
        placed[(where[0], seen[where], where[1])] = module
        seen[where] += 1
    order = sorted({(layer, nth) for layer, nth, _ in placed})
    kinds = list(dict.fromkeys(kind for _, _, kind in placed))
    cells = {(order.index((layer, nth)), kind): module for (layer, nth, kind), module in placed.items()}
    reach = max(abs(gate - 1) for module in modules for gate in module["gates"])
    return GateMap(kinds, ["-" if layer < 0 else str(layer) for layer, _ in order], cells, max(reach, 0.05))


def stripes(gates: Sequence[float]) -> Float[np.ndarray, " n"]:
    """Returns the gates, averaged in runs where there are many."""
    values = np.array(gates, dtype=np.float64)
    return values if len(values) <= STRIPES else np.array([part.mean() for part in np.array_split(values, STRIPES)])


@dataclass(frozen=True)
class Spectra:
    """The singular values of one kind over all layers, before and after, relative to the kind's largest."""

    kind: str
    before: Float[np.ndarray, "layers components"]
    after: Float[np.ndarray, "layers components"]


def spectra(verdict: Verdict) -> list[Spectra]:
    """Returns the spectra by kind, of the components that all modules of a kind have."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for module in verdict["gates"] or []:
        kinds.setdefault(visible(module["kind"]), []).append(module)
    found = []
    for kind, modules in kinds.items():
        shortest = min(len(module["S"]) for module in modules)
        before, after = (np.array([module[key][:shortest] for module in modules]) for key in ("S", "S_edited"))
        top = float(before.max(initial=0.0))
        if shortest > 1 and top > 0:
            found.append(Spectra(kind, np.maximum(before / top, FLOOR), np.maximum(after / top, FLOOR)))
    return found
