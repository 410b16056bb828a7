"""An inspection as text: one screen for an adapter of any size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from spectral_surgery.alignment import Group, Matrix
from spectral_surgery.comparing_weights import WeightComparison
from spectral_surgery.findings import Finding, findings
from spectral_surgery.inspection import Comparison, Inspection
from spectral_surgery.tables import table

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32
"""Most characters of a sparkline; longer series are averaged."""
FEW_MODULES = 16
"""Up to this many modules are listed one by one."""
FEW_FINDINGS = 8
"""Findings that are spelt out; the rest is counted."""


def render(inspections: Sequence[Inspection], *, modules: bool | None = None) -> str:
    """Returns what is known about the adapters as text.

    Args:
        inspections: One or more.
        modules: Whether every module gets a row of its own; by default where there are few.
    """
    return "\n\n".join(_one(inspection, modules) for inspection in inspections)


def render_weights(found: WeightComparison) -> str:
    """Returns what moved in a fine-tuned model's weights as text."""
    header = ["kind", "change by layer", "change", "S x", "last S x"]
    header += ["|cos| by index", "mean", "chance", "best", "chance", "new"]
    rows = []
    for group in found.groups:
        studies = [found.studies[path] for path in group.paths]
        n = min(len(study.ratio) for study in studies)
        change = [found.change[path] for path in group.paths]
        by_index = np.mean([study.output_by_index[:n] for study in studies], 0)
        rows.append(
            [
                group.name,
                sparkline(change),
                f"{100 * float(np.nanmean(change)):.2g} %",
                *(f"{float(np.nanmean([study.ratio[i] for study in studies])):.3f}" for i in (0, n - 1)),
                sparkline(by_index, top=1.0),
                f"{by_index.mean():.2f}",
                f"{studies[0].output_by_chance.mean:.2g}",
                f"{np.mean([study.output_best.mean() for study in studies]):.2f}",
                f"{studies[0].output_best_by_chance.mean:.2g}",
                str(sum(study.nearness.intruders for study in studies)),
            ]
        )
    missing = f" {found.missing} matrices are in one of the two only." if found.missing else ""
    return (
        f"{found.after} against {found.before}: {len(found.studies)} weights.{missing}\n\n"
        f"{table(header, rows, left=2)}\n"
        f"S x: largest singular value, and the last that was looked at, over those before. |cos|: of output\n"
        f"directions with those of the same index, and with the best partner. new: of the first ten, those near none."
    )


def sparkline(values: Iterable[float], top: float | None = None) -> str:
    """Returns bars from zero to ``top`` (by default the largest value); a blank where a value is missing."""
    series = _shortened(np.array(list(values), dtype=np.float64))
    highest = top if top is not None else float(np.nanmax(series, initial=0.0))
    return "".join(_bar(value, highest) for value in series)


def _bar(value: float, highest: float) -> str:
    if math.isnan(value):
        return " "
    level = value / highest if highest > 0 else 0.0
    return BARS[max(0, min(len(BARS) - 1, math.ceil(level * len(BARS)) - 1))]


def _shortened(series: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    if len(series) <= WIDTH:
        return series
    return np.array([part.mean() for part in np.array_split(series, WIDTH)])


def _one(inspection: Inspection, modules: bool | None) -> str:
    listed = len(inspection.modules) <= FEW_MODULES if modules is None else modules
    parts = [
        headline(inspection),
        _modules(inspection) if listed else _kinds(inspection),
        _blocks(inspection),
        _relations(inspection),
        *(_against(inspection, other, comparison) for other, comparison in inspection.against.items()),
        _findings(findings(inspection)),
    ]
    return "\n\n".join(part for part in parts if part)


def headline(inspection: Inspection) -> str:
    """Returns one line that says what the adapter is."""
    modules = inspection.modules.values()
    others = f", {inspection.other_tensors} other tensors" if inspection.other_tensors else ""
    return (
        f"{inspection.name}: {len(inspection.modules)} modules "
        f"({', '.join(group.name for group in inspection.groups)}), rank {_listed(m.rank for m in modules)}, "
        f"scale {_listed(f'{m.scale:.4g}' for m in modules)}, {_listed(m.dtype for m in modules)}, "
        f"{inspection.parameters / 1e6:.2f} M parameters{others}, base {inspection.base_model or 'not recorded'}"
    )


def _listed(values: Iterable[object]) -> str:
    distinct = list(dict.fromkeys(map(str, values)))
    return ", ".join(distinct[:4]) + (", .." if len(distinct) > 4 else "")


def _modules(inspection: Inspection) -> str:
    header = [
        "module",
        "r",
        "scale",
        "effective rank",
        "stable rank",
        "nuclear",
        "Frobenius",
        "delta",
        "S from",
        "to",
        "S",
    ]
    rows = [
        [
            path,
            str(module.rank),
            f"{module.scale:.4g}",
            f"{module.effective_rank:.2f}",
            f"{module.stable_rank:.2f}",
            f"{module.nuclear:.4g}",
            f"{module.frobenius:.4g}",
            f"{module.delta_norm:.4g}{_relative(inspection, path)}",
            f"{module.S[0]:.3g}",
            f"{module.S[-1]:.3g}",
            _signed(inspection, path),
        ]
        for path, module in inspection.modules.items()
    ]
    return table(header, rows)


def _relative(inspection: Inspection, path: str) -> str:
    view = inspection.base.get(path)
    return f" ({view.relative_norm:.2%} of W)" if view else ""


def _signed(inspection: Inspection, path: str) -> str:
    """The spectrum, and where sensitivities are known a sign under each component."""
    bars = sparkline(inspection.modules[path].S)
    response = inspection.responses.get(path)
    if response is None:
        return bars
    return f"{bars} {''.join('-·+'[1 - sign] for sign in response.sign)}"


def _kinds(inspection: Inspection) -> str:
    header = ["kind", "delta by layer", "delta", "share", "effective", "stable", "S", "out", "in"]
    header += ["of W", "intruders"] if inspection.base else []
    rows = [_kind(inspection, group) for group in inspection.groups]
    total = inspection.total
    ranks = [f"{total.effective_rank:.1f}", f"{total.stable_rank:.1f}"]
    rows.append(["all", "", f"{total.delta_norm:.3g}", "100 %", *ranks, *[""] * (len(header) - 6)])
    note = "out, in: mean overlap between layers, times chance" if inspection.matrices else ""
    marked = any(not matrix.shared for matrix in inspection.matrices)
    return table(header, rows, left=2) + (f"\n{note}{MARK if marked else ''}." if note else "")


def _blocks(inspection: Inspection) -> str:
    """Where blocks come in several families, as in image models: each family, block by block."""
    families = inspection.blocks
    if len(families) < 2:
        return ""
    rows = []
    for family, blocks in families.items():
        norms = [one.delta_norm for one in blocks.values()]
        numbers = f"{min(blocks)}-{max(blocks)}" if len(blocks) > 1 else str(min(blocks))
        share = f"{sum(one.share for one in blocks.values()):.0%}".replace("%", " %")
        rows.append([family, numbers, sparkline(norms), f"{math.hypot(*norms):.3g}", share])
    return table(["blocks", "numbers", "delta by block", "delta", "share"], rows, left=3)


MARK = "; ' marks a space that layers do not share"


def _kind(inspection: Inspection, group: Group) -> list[str]:
    whole = inspection.aggregate(group.paths)
    spectra = [inspection.modules[path].S for path in group.paths]
    shortest = min(map(len, spectra))
    mean = np.mean([S[:shortest] for S in spectra], 0) if shortest else np.zeros(0)
    sides = {matrix.side: matrix for matrix in inspection.matrices if matrix.group == group.name}
    return [
        group.name,
        sparkline(inspection.norms(group)),
        f"{whole.delta_norm:.3g}",
        f"{whole.share:.0%}".replace("%", " %"),
        f"{whole.effective_rank:.1f}",
        f"{whole.stable_rank:.1f}",
        sparkline(mean),
        *(_times(sides.get(side)) for side in ("output", "input")),
        *_beside_base(inspection, group),
    ]


def _beside_base(inspection: Inspection, group: Group) -> list[str]:
    views = [inspection.base[path] for path in group.paths if path in inspection.base]
    if not views:
        return []
    relative = float(np.mean([view.relative_norm for view in views]))
    undecided = sum(view.undecided for view in views)
    more = f" to {sum(view.intruders for view in views) + undecided}" if undecided else ""
    return [f"{100 * relative:.2g} %", f"{sum(view.intruders for view in views)}{more}"]


def _times(matrix: Matrix | None) -> str:
    if matrix is None or math.isnan(matrix.times_chance):
        return "-"
    return f"{matrix.times_chance:.3g}x{' ' if matrix.shared else chr(39)}"


def _relations(inspection: Inspection) -> str:
    """The strongest pairs of kinds within layers, always with o_proj and down_proj."""
    usual = [c for c in inspection.curves if {c.first, c.second} == {"o_proj output", "down_proj output"}]
    ranked = sorted(inspection.curves, key=lambda curve: -np.nan_to_num(curve.times_chance))
    shown = list(dict.fromkeys([*usual, *ranked[:3]]))
    header = ["within a layer", "overlap by layer", "mean", "times chance", "space"]
    rows = [
        [
            curve.name,
            sparkline(curve.overlap),
            f"{np.nanmean(curve.overlap):.3g}",
            f"{curve.times_chance:.3g}x",
            curve.space,
        ]
        for curve in shown
        if not math.isnan(curve.times_chance)
    ]
    return table(header, rows, left=2) if rows else ""


def _against(inspection: Inspection, other: str, comparison: Comparison) -> str:
    header = [f"against {other}", "cosine by layer", "cosine", "strength", "out", "in"]
    rows = []
    for group in inspection.groups:
        paths = [path for path in group.paths if path in comparison.cosine]
        if not paths:
            continue
        cosine = np.array([comparison.cosine[path] for path in paths])
        strength = np.array([comparison.strength[path] for path in paths])
        sides = {curve.first: curve for curve in comparison.curves if curve.first.startswith(f"{group.name} ")}
        rows.append(
            [
                group.name,
                sparkline(np.abs(cosine), top=1.0),
                f"{cosine.mean():.3g}",
                f"{np.nanmean(strength):.3g}x",
                *(f"{sides[f'{group.name} {side}'].times_chance:.3g}x" for side in ("output", "input")),
            ]
        )
    return table(header, rows, left=2) if rows else f"against {other}: no module in common"


def _findings(found: Sequence[Finding]) -> str:
    if not found:
        return "Nothing stands out."
    lines = [
        f"{finding.severity}: {finding.what} [{finding.code}]\n    {finding.evidence} {finding.advice}"
        for finding in found[:FEW_FINDINGS]
    ]
    if len(found) > FEW_FINDINGS:
        lines.append(f"More findings: {len(found) - FEW_FINDINGS}, see --json or --html.")
    return "\n".join(lines)
