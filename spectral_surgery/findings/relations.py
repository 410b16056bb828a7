"""Findings about directions, other adapters, the base model and measured sensitivities.

Geometry is held against what the largest of all figures of a random adapter stays under in 99 of 100 inspections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from spectral_surgery.alignment import Curve, Matrix
from spectral_surgery.findings.finding import Finding, plural
from spectral_surgery.geometry import chance_limit, off_diagonal
from spectral_surgery.inspection import Comparison, Inspection

SAME, RELATED = 0.99, 0.5
"""Cosine of two adapters' deltas from which they are copies, or related."""
SHOWN = 3
"""Sides and pairs that a finding spells out."""
STRONG = 0.1
"""||delta|| / ||W|| from which an update is large for a low-rank one."""
DISAGREE = 0.5
"""Rank correlation of |mean g| and mean |g| under which they rank components differently."""


def shared_directions(inspection: Inspection) -> Iterator[Finding]:
    """Kinds whose leading directions are shared between layers."""
    found = {matrix: told for matrix in inspection.matrices if (told := _passes(matrix, inspection.comparisons))}
    if not found:
        return
    ordered = sorted(found, key=lambda matrix: -matrix.times_chance)
    first = ordered[0]
    yield Finding(
        "shared-direction",
        "note",
        inspection.name,
        f"Layers share leading directions in {plural(len(found), 'side')} of kinds, most in {first.group} "
        f"{first.side} ({first.space}{'' if first.shared else ', another one in each layer'}).",
        " ".join(f"{matrix.group} {matrix.side}: {found[matrix]}" for matrix in ordered[:SHOWN]) + _more(ordered),
        "Edits of one layer then act on what others do; judge them together.",
    )


def _passes(matrix: Matrix, comparisons: int) -> str:
    """The figures of a matrix that pass the chance limits, in words; empty where none does."""
    d, k, parts = matrix.dimension, matrix.k, []
    pairs = off_diagonal(matrix.overlap)
    lines = off_diagonal(matrix.cosine)
    if len(pairs) and pairs.mean() > chance_limit(k, d, comparisons=comparisons, pairs=len(pairs)):
        parts.append(f"mean overlap {pairs.mean():.3g} at k = {k}, {matrix.times_chance:.3g} times chance.")
    elif len(pairs) and pairs.max() > chance_limit(k, d, comparisons=comparisons):
        parts.append(f"largest overlap {pairs.max():.3g} at k = {k}, layers {_where(matrix, matrix.overlap)}.")
    limit = math.sqrt(chance_limit(1, d, comparisons=comparisons))
    if len(lines) and lines.max() > limit:
        over = (lines > limit).mean()
        parts.append(
            f"|cos| up to {lines.max():.3g} (layers {_where(matrix, matrix.cosine)}), {over:.0%} of pairs over the "
            f"chance limit {limit:.3g}."
        )
    return " ".join(parts)


def _where(matrix: Matrix, values: np.ndarray) -> str:
    upper = np.where(np.triu(np.ones_like(values), 1) > 0, np.nan_to_num(values), -1)
    row, column = np.unravel_index(int(upper.argmax()), upper.shape)
    return f"{matrix.layers[row]} and {matrix.layers[column]}"


def synergies(inspection: Inspection) -> Iterator[Finding]:
    """Kinds that act on the same directions within a layer."""
    found = _passing(inspection.curves, inspection.comparisons)
    if found:
        first = next(iter(found))
        yield Finding(
            "synergy",
            "note",
            inspection.name,
            f"{len(found)} of {len(inspection.curves)} pairs of module kinds share leading directions within layers, "
            f"most {first.first} with {first.second} ({first.space}).",
            _told(found),
            "Edits of one act on what the other does; judge them together.",
        )


def _passing(curves: Sequence[Curve], comparisons: int) -> dict[Curve, str]:
    """The curves that pass the chance limits, strongest first, with their figures in words."""
    told = {curve: text for curve in curves if (text := _curve_passes(curve, comparisons))}
    return dict(sorted(told.items(), key=lambda item: -item[0].times_chance))


def _curve_passes(curve: Curve, comparisons: int) -> str:
    values = curve.overlap[~np.isnan(curve.overlap)]
    if not len(values):
        return ""
    limit = chance_limit(curve.k, curve.dimension, comparisons=comparisons)
    mean_limit = chance_limit(curve.k, curve.dimension, comparisons=comparisons, pairs=len(values))
    if values.mean() <= mean_limit and values.max() <= limit:
        return ""
    return (
        f"mean overlap {values.mean():.3g} at k = {curve.k}, {curve.times_chance:.3g} times chance, "
        f"{int((values > limit).sum())} of {len(values)} layers over the chance limit {limit:.3g}."
    )


def _told(found: Mapping[Curve, str]) -> str:
    lines = [f"{curve.name}: {text}" for curve, text in found.items()]
    return " ".join(lines[:SHOWN]) + _more(lines)


def _more(items: Sequence[object]) -> str:
    return f" And {len(items) - SHOWN} more." if len(items) > SHOWN else ""


def other_adapters(inspection: Inspection) -> Iterator[Finding]:
    """Adapters that are copies of, or related to, this one."""
    for other, comparison in inspection.against.items():
        cosines = np.array(list(comparison.cosine.values()))
        if not len(cosines):
            yield Finding(
                "not-comparable", "note", inspection.name, f"No module is shared with {other}.",
                f"{comparison.missing} modules are in one of the two only.", "They belong to different base models.",
            )  # fmt: skip
        elif cosines.min() > SAME:
            strengths = list(comparison.strength.values())
            yield Finding(
                "same-update", "warning", inspection.name, f"The update is that of {other}, up to strength.",
                f"The cosine of the deltas is at least {cosines.min():.4f} in {len(cosines)} modules; "
                f"strength ratio {np.nanmin(strengths):.3g} to {np.nanmax(strengths):.3g}.",
                "One is a copy, a rescaling or another checkpoint of the other.",
            )  # fmt: skip
        else:
            yield from _related(inspection, other, comparison, float(cosines.mean()))


def _related(inspection: Inspection, other: str, comparison: Comparison, cosine: float) -> Iterator[Finding]:
    found = _passing(comparison.curves, inspection.comparisons)
    if abs(cosine) >= RELATED or found:
        yield Finding(
            "related-adapters",
            "note",
            inspection.name,
            f"It acts on directions that {other} acts on too.",
            f"Mean cosine of the deltas {cosine:.3g}. {_told(found)}".rstrip(),
            "Stacked or merged, the two add up or cancel there; compare before combining them.",
        )


def against_the_base(inspection: Inspection) -> Iterator[Finding]:
    """Large updates and intruder directions."""
    base = inspection.base
    if large := [path for path, view in base.items() if view.relative_norm > STRONG]:
        worst = max(large, key=lambda path: base[path].relative_norm)
        yield Finding(
            "large-update",
            "warning",
            inspection.name,
            f"In {plural(len(large), 'module')} the update is large beside the base weight.",
            f"In {worst} ||delta|| is {base[worst].relative_norm:.3g} of ||W||, over {STRONG:g}.",
            "Over-strong adapters forget; try a lower strength on held-out data.",
            tuple(large),
        )
    if intruding := [path for path, view in base.items() if view.intruders]:
        count = sum(base[path].intruders for path in intruding)
        undecided = sum(view.undecided for view in base.values())
        open_ = f" Of {undecided} more it is not known." if undecided else ""
        yield Finding(
            "intruder",
            "note",
            inspection.name,
            f"New to the base weight: {plural(count, 'leading direction')} of W + delta.",
            f"They lie in {plural(len(intruding), 'module')} of {len(base)}; the first is {intruding[0]}.{open_}",
            "Intruder directions go with forgetting; weakening the components that cause them is worth a try.",
            tuple(intruding),
        )


def sensitivities(inspection: Inspection) -> Iterator[Finding]:
    """What the measured components say."""
    responses = inspection.responses
    if not responses:
        return
    signs = np.concatenate([response.sign for response in responses.values()])
    harmful, helpful = int((signs > 0).sum()), int((signs < 0).sum())
    yield Finding(
        "component-signs",
        "note",
        inspection.name,
        f"{harmful} of {len(signs)} components are significantly harmful, {helpful} helpful.",
        f"The signs of the other {len(signs) - harmful - helpful} do not stand out of the noise of "
        f"{inspection.examples} rows at a family-wise error rate of 5 %.",
        "Policies that use the sign act on noise elsewhere; more rows make more signs known.",
        tuple(path for path, response in responses.items() if (response.sign > 0).any()),
    )
    agreement = np.array([response.agreement for response in responses.values()])
    low = int((agreement < DISAGREE).sum())
    if low:
        yield Finding(
            "rankings-disagree",
            "note",
            inspection.name,
            f"In {low} of {len(agreement)} modules |mean g| and mean |g| rank the components differently.",
            f"Median rank correlation {np.nanmedian(agreement):.2f}, under {DISAGREE:g} in these modules.",
            "Say which of the two a policy uses; they give different edits, and more rows do not reconcile them.",
            tuple(path for path, response in responses.items() if response.agreement < DISAGREE),
        )
