"""What an export did, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from spectral_surgery.exporting.job import Exported
from spectral_surgery.exporting.merging import Parity
from spectral_surgery.exporting.resizing import Losses
from spectral_surgery.selection import kind
from spectral_surgery.tables import table

FAR = 0.1
"""Share of what the adapter does from which a merged model's divergence is a warning."""


def describe(exported: Exported) -> str:
    """Returns everything that is known about an export, a few lines or a table each."""
    parts = []
    if exported.losses:
        parts += [_losses(exported.losses), _size(exported)]
    if exported.readings:
        parts.append(_readings(exported.readings))
    if exported.strengths:
        parts.append(_strengths(exported.strengths))
    if exported.parity:
        parts.append(_parity(exported.parity))
    return "\n\n".join(parts)


def _losses(losses: Losses) -> str:
    kinds: dict[str, list[str]] = {}
    for path in losses.modules:
        kinds.setdefault(kind(path), []).append(path)
    rows = [_row(name, losses.only(paths)) for name, paths in kinds.items()]
    if len(rows) > 1:
        rows.append(_row("all", losses))
    return table(["kind", "modules", "rank", "to", "energy kept", "relative error"], rows)


def _row(name: str, losses: Losses) -> list[str]:
    modules = losses.modules.values()
    before, after = ([getattr(loss, side) for loss in modules] for side in ("before", "after"))
    return [name, str(len(modules)), _range(before), _range(after), _percent(losses.energy), f"{losses.error:.2g}"]


def _range(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share < 1 - 5e-5 else "100 %"


def _size(exported: Exported) -> str:
    before, after = exported.parameters
    text = f"Factors: {_count(before)} parameters, now {_count(after)} ({100 * after / before:.0f} %)."
    if exported.per_module and exported.per_module < after:
        own = exported.per_module
        text += f" One rank for all is the largest that any module needs; --per-module would take {_count(own)} "
        text += f"({100 * own / before:.0f} %)."
    return text


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"


def _readings(readings: Mapping[str, tuple[float, float]]) -> str:
    rows = [[name, _error(before), _error(after)] for name, (before, after) in readings.items()]
    return table(["relative error as read by", "the source", "the export"], rows)


def _error(error: float) -> str:
    return "other modules" if math.isinf(error) else f"{error:.2g}"


def _strengths(strengths: Mapping[str, float]) -> str:
    counts: dict[float, int] = {}
    for strength in strengths.values():
        counts[strength] = counts.get(strength, 0) + 1
    parts = ", ".join(f"{count} modules by {strength:g}" for strength, count in counts.items())
    return f"Multiplied the updates of {parts}; everything else is as it was."


def _parity(parity: Parity) -> str:
    rows = [
        ["merged model", f"{parity.divergence:.2g}", f"{parity.worst:.2g}", _percent(parity.agreement)],
        ["base without the adapter", f"{parity.base_divergence:.2g}", "", _percent(parity.base_agreement)],
    ]
    text = table(["against the adapter on its base", "KL per token", "worst text", "same top token"], rows)
    note = f"{parity.tokens} tokens of {parity.texts} texts, merged weights in {parity.dtype}; KL in nats."
    if parity.divergence > FAR * parity.base_divergence > 0:
        share = parity.divergence / parity.base_divergence
        note += (
            f"\nwarning: the merged model is {share:.0%} of the adapter's own effect away from it. The rounding of "
            f"{parity.dtype} takes that much; write a wider --dtype, or serve the adapter beside the base."
        ).replace("%", " %")
    return f"{text}\n{note}"
