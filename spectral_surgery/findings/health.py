"""Findings about single modules and their spectra."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from spectral_surgery.findings.finding import Finding, plural
from spectral_surgery.inspection import Inspection

DEAD = 1e-3
"""A module is dead when its delta is under this share of its kind's median."""
OUTLIER = 5.0
"""A module is an outlier when its delta is over this multiple of its kind's median."""
SPIKE_RATIO, SPIKE_ENERGY = 3.0, 0.8
"""A spike is a first component this many times the second that also holds this share of the energy."""
DUPLICATE = 0.98
"""|cos| of two stored rank-one pieces from which they count as duplicates."""
FLAT = 0.5
"""A spectrum is flat when this share of its singular values, or fewer, can be told apart as stored."""
CANCELLED = 0.3
"""Pieces cancel when ||B A|| / (||B|| ||A||) is under this share of 1 / sqrt(r)."""


def non_finite(inspection: Inspection) -> Iterator[Finding]:
    """Values that are NaN or infinite."""
    if names := inspection.nonfinite:
        yield Finding(
            "non-finite",
            "error",
            inspection.name,
            f"There are values that are not finite in {plural(len(names), 'tensor')}.",
            f"The first is {names[0]}.",
            "The training diverged; go back to an earlier checkpoint. Nothing else of their modules was looked at.",
            names,
        )


def zero_update(inspection: Inspection) -> Iterator[Finding]:
    """An adapter that changes nothing."""
    if inspection.modules and not any(module.frobenius for module in inspection.modules.values()):
        yield Finding(
            "zero-update",
            "error",
            inspection.name,
            "The adapter changes nothing: every update is zero.",
            f"All {len(inspection.modules)} modules have no singular value above zero.",
            "It was saved before its first training step, or its output factors were zeroed. Save it again.",
        )


def dead_modules(inspection: Inspection) -> Iterator[Finding]:
    """Modules that do nothing beside their kind."""
    medians = {group.name: float(np.median(inspection.norms(group))) for group in inspection.groups}
    dead = [
        path
        for group in inspection.groups
        for path, norm in zip(group.paths, inspection.norms(group), strict=True)
        if norm < DEAD * medians[group.name] or (norm == 0 and any(medians.values()))
    ]
    if dead:
        yield Finding(
            "dead-module",
            "warning",
            inspection.name,
            f"There is no effect in {plural(len(dead), 'module')} of {len(inspection.modules)}.",
            f"The delta is under {DEAD:g} of the median of their kind; the first is {dead[0]}.",
            "Leave them out of target_modules, or look for why they got no gradient.",
            tuple(dead),
        )


def outlier_modules(inspection: Inspection) -> Iterator[Finding]:
    """Modules far stronger than their kind."""
    found: dict[str, float] = {}
    for group in inspection.groups:
        norms = inspection.norms(group)
        median = float(np.median(norms))
        if len(norms) >= 4 and median > 0:
            found |= {p: norm / median for p, norm in zip(group.paths, norms, strict=True) if norm > OUTLIER * median}
    if found:
        worst = max(found, key=found.__getitem__)
        yield Finding(
            "outlier-module",
            "warning",
            inspection.name,
            f"The update is far stronger than usual for its kind in {plural(len(found), 'module')}.",
            f"{worst} is {found[worst]:.3g} times the median of its kind, over {OUTLIER:g}.",
            "Check alpha_pattern and the learning rate; weakening them is worth a try.",
            tuple(found),
        )


def spikes(inspection: Inspection) -> Iterator[Finding]:
    """First components that stand over everything else."""
    found = {}
    for path, module in inspection.modules.items():
        S = module.S
        if len(S) >= 4 and S[0] > 0 and S[0] >= SPIKE_RATIO * S[1] and module.energy_kept[0] >= SPIKE_ENERGY:
            found[path] = module.energy_kept[0]
    if found:
        worst = max(found, key=found.__getitem__)
        yield Finding(
            "spike",
            "warning",
            inspection.name,
            f"In {plural(len(found), 'module')} one component dominates.",
            f"In {worst} the first component holds {found[worst]:.0%} of the energy.",
            "Such spikes add up when adapters are stacked. Try a flat spectrum, a lower strength or a smaller rank.",
            tuple(found),
        )


def duplicate_components(inspection: Inspection) -> Iterator[Finding]:
    """Stored pieces that are the same direction twice."""
    found = [path for path, module in inspection.modules.items() if module.closest_pair > DUPLICATE]
    if found:
        worst = max(found, key=lambda path: inspection.modules[path].closest_pair)
        yield Finding(
            "duplicate-components",
            "warning",
            inspection.name,
            f"In {plural(len(found), 'module')} two of the stored rank-one pieces are nearly the same.",
            f"In {worst} their |cos| is {inspection.modules[worst].closest_pair:.4f}.",
            "Part of the rank is spent twice; a smaller rank would hold the same update.",
            tuple(found),
        )


def cancellation(inspection: Inspection) -> Iterator[Finding]:
    """Factors whose pieces cancel."""
    found = [
        path
        for path, module in inspection.modules.items()
        if 0 < module.cancellation < CANCELLED / math.sqrt(module.rank)
    ]
    if found:
        worst = min(found, key=lambda path: inspection.modules[path].cancellation)
        usual = 1 / math.sqrt(inspection.modules[worst].rank)
        yield Finding(
            "cancellation",
            "warning",
            inspection.name,
            f"In {plural(len(found), 'module')} large factors cancel to a small update.",
            f"In {worst} ||B A|| is {inspection.modules[worst].cancellation:.3g} of ||B|| ||A||; "
            f"unrelated columns give {usual:.3g}.",
            "Rounding the factors hurts such an update more than others; keep it in float32, or factorise it again.",
            tuple(found),
        )


def unused_rank(inspection: Inspection) -> Iterator[Finding]:
    """Rank that is not used, or hardly."""
    modules = inspection.modules.values()
    unused = [m.module for m in modules if 0 < m.used_rank < len(m.S)]
    if unused:
        yield Finding(
            "unused-rank",
            "note",
            inspection.name,
            f"In {plural(len(unused), 'module')} part of the rank is exactly zero.",
            f"{unused[0]} uses {inspection.modules[unused[0]].used_rank} of {len(inspection.modules[unused[0]].S)}.",
            "The file can be made smaller without any change.",
            tuple(unused),
        )
    live = [m for m in modules if m.frobenius]
    needed = [int(np.searchsorted(m.energy_kept, 0.95)) + 1 for m in live]
    full = [len(m.S) for m in live]
    if live and np.median(full) >= 4 and np.median(needed) <= np.median(full) / 2:
        yield Finding(
            "low-rank-in-use",
            "note",
            inspection.name,
            f"Half of the modules keep 95 % of their energy in {int(np.median(needed))} of {int(np.median(full))} "
            f"components.",
            f"Largest need {max(needed)}, smallest {min(needed)}.",
            "A smaller rank may do; judge it on data, since energy is not quality.",
        )


def tied_spectrum(inspection: Inspection) -> Iterator[Finding]:
    """Flat spectra, whose directions are arbitrary."""
    tied = [m.module for m in inspection.modules.values() if m.used_rank > 1 and m.tied_groups <= FLAT * m.used_rank]
    if tied:
        yield Finding(
            "tied-spectrum",
            "note",
            inspection.name,
            f"In {plural(len(tied), 'module')} most singular values agree within the rounding of the stored dtype.",
            f"The first is {tied[0]}, with {inspection.modules[tied[0]].tied_groups} distinct values.",
            "Their directions are an arbitrary basis, so geometry leaves them out and edits move them together.",
            tuple(tied),
        )
