"""The paper's Figures 1, 3 and 4 and its Table 4 as a figure, of the miniature, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_surgery.inspection import Inspection
from spectral_surgery.miniature.effects import Effect, Scores, mean, negated
from spectral_surgery.miniature.findings import POLICIES, STRICT, SYNERGY, Cells, matched, weakened
from spectral_surgery.plots import COLOURS as MAP
from spectral_surgery.plots import DASHES, canvas, save_made
from spectral_surgery.results.drawing import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

Adapters = Mapping[str, Sequence[Inspection]]
"""What is known of every family's adapters."""


def save(scores: Scores, cells: Cells, adapters: Adapters, folder: Path, extension: str = "svg") -> list[Path]:
    """Writes all figures and returns their paths.

    Raises:
        InputError: If matplotlib is not installed.
    """
    made = {
        "miniature-figure1": partial(directions_figure, adapters),
        "miniature-figure3": partial(guided_figure, scores, cells),
        "miniature-figure4": partial(risk_figure, scores, cells),
        "miniature-table4": partial(rows_figure, scores, cells),
    }
    return save_made(made, folder, extension)


def directions_figure(adapters: Adapters) -> Figure:
    """Returns Figure 1: o_proj's directions over layers, and with those of down_proj; means over the seeds."""
    figure = canvas(7.2, 3.2)
    rows: Any = [[*(f"{row}{place}" for place in range(len(adapters))), "c"] for row in "ab"]
    axes: Mapping[str, Axes] = figure.subplot_mosaic(rows, width_ratios=[*[1] * len(adapters), 1.5])
    for place, (family, views) in enumerate(adapters.items()):
        found = [next(m for m in one.matrices if (m.group, m.side) == ("o_proj", "output")) for one in views]
        for row, values in (("a", [one.cosine for one in found]), ("b", [one.overlap for one in found])):
            image = axes[f"{row}{place}"].imshow(np.mean(values, axis=0), cmap=MAP, vmin=0, vmax=1)
            axes[f"{row}{place}"].spines[:].set_visible(False)
        axes[f"a{place}"].set_title(family)
        curves = [next(c for c in one.curves if {c.first, c.second} == SYNERGY) for one in views]
        line: Any = {"color": COLOURS[place], "linestyle": DASHES[place], "marker": MARKERS[place], "markersize": 3}
        axes["c"].plot(curves[0].layers, np.mean([c.cosine for c in curves], axis=0), label=family, **line)
    axes["a0"].set_ylabel("(a) |cos|\nlayer")
    axes["b0"].set_ylabel(f"(b) overlap, k = {found[0].k}\nlayer")
    chance = curves[0].cosine_by_chance
    axes["c"].axhspan(chance.low, chance.high, color="0.88", zorder=0, label="99 % of chance")
    axes["c"].set(xlabel="layer", ylim=(0, 1), title="(c) o_proj with down_proj", ylabel="|cos|")
    axes["c"].legend(frameon=False, loc=(0.3, chance.high + 0.02))
    figure.colorbar(image, ax=[axes[row[-2]] for row in rows], shrink=0.8)
    return figure


def guided_figure(scores: Scores, cells: Cells) -> Figure:
    """Returns Figure 3: what grad_direction gains against what random_index does, task by task."""
    figure = canvas(4.6, 3.1)
    axis = figure.subplots()
    _through_zero(axis)
    axis.axline((0, 0), slope=1, color="0.5", linewidth=0.8, linestyle="--", label="equal")
    for place, family in enumerate(scores.families()):
        x, y = (scores.gain(family, cells.of(policy)) for policy in ("random_index", "grad_direction"))
        _cross(axis, x, y, place, family)
    axis.set_xlabel("random_index less unedited, points")
    axis.set_ylabel("grad_direction less unedited, points")
    figure.legend(frameon=False, loc="outside right center")
    return figure


def risk_figure(scores: Scores, cells: Cells) -> Figure:
    """Returns Figure 4: mean gain in the other tasks against loss in the strict-format one, with the controls."""
    figure = canvas(5.2, 3.1)
    axis = figure.subplots()
    _through_zero(axis)
    shown = {policy: cells.of(policy) for policy in POLICIES}
    shown |= {"grad_direction, at random": matched(cells)}
    shown |= {f"scale {strength}": weakened(strength) for strength in ("0.75", "0.5")}
    others = [family for family in scores.families() if family != STRICT]
    for place, (name, edit) in enumerate(shown.items()):
        reward = mean([scores.gain(family, edit) for family in others])
        _cross(axis, reward, negated(scores.gain(STRICT, edit)), place, name)
    axis.set_xlabel("reward: mean difference in the other tasks, points")
    axis.set_ylabel(f"risk: loss in {STRICT}, points")
    figure.legend(frameon=False, loc="outside right center")
    return figure


def rows_figure(scores: Scores, cells: Cells) -> Figure:
    """Returns Table 4 as a figure: gains of grad_direction by measuring rows, one panel a task."""
    families = scores.families()
    figure = canvas(7.2, 2.1)
    counts = sorted({edit.rows for edit in scores.edits() if edit == cells.guided(rows=edit.rows) and edit.rows})
    for axis, family in zip(figure.subplots(1, len(families), sharey=True), families, strict=True):
        _through_zero(axis, vertical=False)
        gains = [scores.gain(family, cells.guided(rows=count)) for count in counts]
        _line(axis, counts, gains, 0, "grad_direction")
        _line(axis, counts, [scores.gain(family, cells.of("random_index"))] * len(counts), 1, "random_index")
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, map(str, counts))
        axis.minorticks_off()
        axis.set_title(family)
    figure.axes[0].set_ylabel("difference from\nunedited, points")
    figure.supxlabel("measuring rows", fontsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=2)
    return figure


def _line(axis: Axes, counts: Sequence[int], gains: Sequence[Effect], place: int, name: str) -> None:
    limits = [gain.interval() for gain in gains]
    bars = np.array([[one.estimate - one.low, one.high - one.estimate] for one in limits]).T
    places = np.array(counts) * (1.0 + 0.1 * place)  # beside one another
    look: Any = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": DASHES[place], "markersize": 3}
    axis.errorbar(places, [100 * gain.value for gain in gains], _finite(bars), elinewidth=0.8, label=name, **look)


def _cross(axis: Axes, x: Effect, y: Effect, place: int, name: str) -> None:
    bars = [[[one.estimate - one.low], [one.high - one.estimate]] for one in (x.interval(), y.interval())]
    look: Any = {"color": (*COLOURS, "0.3")[place], "marker": MARKERS[place], "markersize": 5, "elinewidth": 0.8}
    errors: Any = {"xerr": _finite(np.array(bars[0])), "yerr": _finite(np.array(bars[1]))}
    axis.errorbar(100 * x.value, 100 * y.value, linestyle="none", label=name, **errors, **look)


def _finite(bars: np.ndarray) -> np.ndarray:
    """Returns limits in points; none where there are none, as with a single seed."""
    return 100 * np.where(np.isfinite(bars), bars, 0)


def _through_zero(axis: Axes, *, vertical: bool = True) -> None:
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    if vertical:
        axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
