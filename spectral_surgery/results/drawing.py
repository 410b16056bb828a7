"""Figures of runs: guided against random, reward against risk, and scores along measuring rows, energy and modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_surgery.plots import DASHES, canvas, save_made
from spectral_surgery.results.comparisons import (
    Axis,
    Point,
    Setting,
    along,
    cells,
    edits,
    guided_and_random,
    levels,
    noise,
    reward_and_risk,
    score,
    usual,
)
from spectral_surgery.results.runs import UNEDITED, Run
from spectral_surgery.results.summary import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, told apart by colour-blind readers."""
MARKERS = "osD^vPX*"
LEAST = 0.055
"""Half the side of Figure 3 at least, as the paper draws it."""
LEGEND_ENTRY = 1.4
"""Inches that one entry of a legend above the panels takes."""
MOST = 8
"""Panels of one figure at most."""


def save(runs: Sequence[Run], folder: Path, extension: str = "pdf", view: View | None = None) -> list[Path]:
    """Writes every figure that the runs have something for, and returns the paths.

    Raises:
        InputError: If matplotlib is not installed, or the format is not one of pdf, png and svg.
        OutputError: If the folder is a file.
    """
    view = view or View(setting=usual(runs))
    made: dict[str, Callable[[], Figure | None]] = {
        "guided-and-random": lambda: guided_figure(runs, view),
        "reward-and-risk": lambda: risk_figure(runs, view),
        "measuring-rows": lambda: rows_figure(runs, view.setting),
        "energy": lambda: bars_figure(runs, view, "energy"),
        "modules": lambda: bars_figure(runs, view, "modules"),
    }
    return save_made(made, folder, extension)


def guided_figure(runs: Sequence[Run], view: View) -> Figure | None:
    """Returns gains of the guided policy against those of its random control, or None where there are none.

    The axes are linear up to 0.03 and logarithmic beyond where a difference is large, so that the small ones are seen.
    A grey band spans what scoring the same weights again makes of a gain (two standard deviations
    of a difference, the widest cell's), where that is known.
    """
    points = guided_and_random(runs, view.setting, view.guided, view.control)
    if not points:
        return None
    figure = canvas(4.9, 3.3)
    axis = figure.subplots()
    side = max([LEAST, *(1.2 * max(abs(point.x), abs(point.y)) for point in points)])
    if spread := max((one.deviation for one in noise(runs)), default=0.0):
        band = 2 * math.sqrt(2) * spread
        axis.axhspan(-band, band, color="0.92", zorder=0, label="noise of\nscoring again")
    axis.plot([-side, side], [-side, side], color="0.5", linewidth=0.8, linestyle="--", label="equal")
    _axes_through_zero(axis)
    _scatter(axis, points)
    axis.set(xlim=(-side, side), ylim=(-side, side))
    axis.set_xlabel(f"{view.control} less unedited")
    axis.set_ylabel(f"{view.guided} less unedited")
    if side > 2 * LEAST:  # one large difference would draw all others as one point
        ticks = [tick for tick in (-1, -0.3, -0.1, -0.03, 0, 0.03, 0.1, 0.3, 1) if abs(tick) <= side]
        for scale, place in ((axis.set_xscale, axis.set_xticks), (axis.set_yscale, axis.set_yticks)):
            scale("symlog", linthresh=0.03, linscale=1.2)
            place(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    figure.legend(frameon=False, loc="outside right center")
    return figure


def risk_figure(runs: Sequence[Run], view: View) -> Figure | None:
    """Returns every policy's reward against its risk, or None where a task is missing."""
    points = reward_and_risk(runs, view.setting, view.risk)
    if not points:
        return None
    figure = canvas(4.2, 2.8)
    axis = figure.subplots()
    _axes_through_zero(axis)
    _scatter(axis, points)
    axis.set_xlabel("reward: mean difference in the other tasks")
    axis.set_ylabel(f"risk: loss in {view.risk}")
    figure.legend(frameon=False, loc="outside right center")
    return figure


def _axes_through_zero(axis: Axes) -> None:
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)


def _scatter(axis: Axes, points: Sequence[Point]) -> None:
    """Draws points: a colour for each label, a marker for each mark, named in the legend one by one."""
    labels = list(dict.fromkeys(point.label for point in points))
    marks = list(dict.fromkeys(point.mark for point in points))
    for point in points:
        colour = COLOURS[labels.index(point.label) % len(COLOURS)]
        marker = MARKERS[marks.index(point.mark) % len(MARKERS)]
        axis.plot(point.x, point.y, marker, color=colour, markersize=5, alpha=0.8, markeredgewidth=0, clip_on=False)
    for label in labels:
        axis.plot([], [], "s", color=COLOURS[labels.index(label) % len(COLOURS)], label=label)
    for mark in marks:
        axis.plot([], [], MARKERS[marks.index(mark) % len(MARKERS)], color="0.4", markerfacecolor="none", label=mark)


def rows_figure(runs: Sequence[Run], setting: Setting) -> Figure | None:
    """Returns scores against the number of measuring rows, one panel a cell; None where it was not varied."""
    counts = levels(runs, "rows")
    shown = cells(runs)[:MOST]
    if len(counts) < 2:
        return None
    figure, grid = _panels(len(shown))
    ranges = {one.cell: one for one in noise(runs)}
    for axis, cell in zip(grid, shown, strict=False):
        if cell in ranges:
            axis.axhspan(ranges[cell].low, ranges[cell].high, color="0.9", zorder=0, label="unedited, scored again")
        elif (unedited := score(runs, cell, UNEDITED, setting)) is not None:
            axis.axhline(unedited, color="0.5", linewidth=0.8, label=UNEDITED)
        for number, policy in enumerate(edits(runs)):
            found = along(runs, cell, policy, "rows", setting)
            pairs = [(count, value) for count, value in zip(counts, found, strict=True) if value is not None]
            if pairs:
                axis.plot(*zip(*pairs, strict=True), label=policy, **_line(number), markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, map(str, counts))
        axis.minorticks_off()
        axis.set_title(" ".join(cell))
    figure.supxlabel("measuring rows", fontsize=8)
    _shared_legend(figure, grid)
    return figure


def _line(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "linewidth": 1.1,
    }


def bars_figure(runs: Sequence[Run], view: View, axis: Axis) -> Figure | None:
    """Returns each policy's gain at every level of an axis, one panel a cell; None where it was not varied."""
    found = levels(runs, axis)
    shown = cells(runs)[:MOST]
    missing = [None] * len(found)
    policies = [
        name
        for name in edits(runs)
        if name != view.control and any(along(runs, cell, name, axis, view.setting) != missing for cell in shown)
    ]
    if len(found) < 2 or not policies:
        return None
    figure, grid = _panels(len(shown))
    width = 0.8 / len(found)
    for panel, cell in zip(grid, shown, strict=False):
        unedited = score(runs, cell, UNEDITED, view.setting)
        for number, level in enumerate(found):
            places, heights = [], []
            for place, policy in enumerate(policies):
                value = along(runs, cell, policy, axis, view.setting)[number]
                if value is not None and unedited is not None:
                    places.append(place + (number - (len(found) - 1) / 2) * width)
                    heights.append(value - unedited)
            colour, hatch = COLOURS[number % len(COLOURS)], ("", "///", "...", "xxx")[number % 4]
            if places:  # bars without any would stand in the legend in another colour
                panel.bar(places, heights, width * 0.92, color=colour, hatch=hatch, edgecolor="white", label=level)
        panel.axhline(0, color="0.3", linewidth=0.8)
        panel.set_xticks(range(len(policies)), [name.replace("_", "\n", 1) for name in policies])
        panel.set_title(" ".join(cell))
    figure.supylabel("difference from unedited", fontsize=8)
    _shared_legend(figure, grid)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(4, count)
    lines = math.ceil(count / columns)
    figure = canvas(max(3.6, 1.9 * columns), 1.75 * lines + 0.4)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in grid[count:]:
        axis.axis("off")
    return figure, grid


def _shared_legend(figure: Figure, grid: Sequence[Axes]) -> None:
    handles: dict[str, Any] = {}
    for axis in grid:
        handles |= {str(label): handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    fitting = max(1, round(figure.get_figwidth() / LEGEND_ENTRY))
    columns = min(len(handles), fitting)
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside upper center", ncols=columns)
