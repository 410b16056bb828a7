"""Static figures at paper quality: heat-map wall, synergy curves, spectrum fan, sensitivities, weights that moved.

Sizes are those of a printed column or page, text is at least 7 points, the colour map (cividis) is legible to
colour-blind readers and in grey, and lines differ by dash or marker as well as by colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_surgery.alignment import Curve, Matrix
from spectral_surgery.comparing_weights import WeightComparison
from spectral_surgery.errors import InputError, OutputError
from spectral_surgery.inspection import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

FORMATS = ("pdf", "png", "svg")
COLOURS = "cividis"
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "spectral-surgery",
    "savefig.dpi": 300,
    "figure.dpi": 100,
}
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
SIGNED, SCORE = "PuOr_r", 4.0
"""Colours of signed sensitivities, and the number of standard errors at which they end."""
CELL = 1.15
"""Inches of one heat map of the wall."""


def save(inspections: Sequence[Inspection], folder: Path, extension: str = "pdf") -> list[Path]:
    """Writes every figure that the inspections have the figures for, and returns the paths.

    Existing figures of the same names are replaced.

    Args:
        inspections: One or more adapters.
        folder: Made if it does not exist.
        extension: pdf, png or svg.

    Raises:
        InputError: If matplotlib is not installed, or the format is none of these.
        OutputError: If the folder is a file.
    """
    made = {
        "wall-output": lambda: wall(inspections, "output"),
        "wall-input": lambda: wall(inspections, "input"),
        "synergy": lambda: synergy(inspections),
        "spectra": lambda: fan(inspections),
        "sensitivities": lambda: sensitivities(inspections),
    }
    return save_made(made, folder, extension)


def save_weights(found: WeightComparison, folder: Path, extension: str = "pdf") -> list[Path]:
    """Writes the figure of weights that moved, and returns its path; see :func:`save`.

    Raises:
        InputError: If matplotlib is not installed, or the format is unknown.
        OutputError: If the folder is a file.
    """
    return save_made({"weights": lambda: weights(found)}, folder, extension)


def save_made(made: Mapping[str, Callable[[], Figure | None]], folder: Path, extension: str) -> list[Path]:
    """Draws figures by name in the house style, writes those that are not None, and returns the paths.

    Raises:
        InputError: If matplotlib is not installed, or the format is unknown.
        OutputError: If the folder is a file.
    """
    if extension not in FORMATS:
        raise InputError(f"Figures cannot be written as {extension!r}. Choose {', '.join(FORMATS)}.")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Choose a folder for the figures.")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with _style():
        for name, draw in made.items():
            if (figure := draw()) is not None:
                written.append(folder / f"{name}.{extension}")
                figure.savefig(written[-1], metadata=_without_date(extension))
    return written


def _style() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "Figures need matplotlib. Install it with: pip install 'spectral-surgery[report]'."
        ) from error
    return matplotlib.rc_context(STYLE)


def _without_date(extension: str) -> dict[str, None]:
    """So that the same inspection gives the same file."""
    return {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(extension, {})


def canvas(width: float, height: float) -> Figure:
    """Returns an empty figure of so many inches."""
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")


def wall(inspections: Sequence[Inspection], side: str) -> Figure | None:
    """Returns the wall of heat maps: one row an adapter, one column a kind, every layer against every other.

    Colours run in equal ratios from chance level to one; the title of a map has its mean off the diagonal
    over chance in its title.

    Args:
        inspections: Adapters, one a row.
        side: output or input.

    Returns:
        None where no adapter has a kind in two layers.
    """
    found = [[matrix for matrix in inspection.matrices if matrix.side == side] for inspection in inspections]
    kinds = list(dict.fromkeys(matrix.group for row in found for matrix in row))
    if not kinds:
        return None
    figure = canvas(0.9 + CELL * len(kinds), 0.45 + (CELL + 0.35) * len(inspections))
    grid = figure.subplots(len(inspections), len(kinds), squeeze=False, sharey=True)
    for axes, inspection, row in zip(grid, inspections, found, strict=True):
        by_kind = {matrix.group: matrix for matrix in row}
        for axis, name in zip(axes, kinds, strict=True):
            _map(axis, by_kind.get(name), name)
        axes[0].set_ylabel(f"{_short(inspection.name)}\nlayer")
    image = next(axis.images[0] for axes in grid for axis in axes if axis.images)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=14 * len(inspections), pad=0.01, ticks=[0, 1])
    bar.ax.set_yticklabels(["chance", "1"])
    bar.set_label(f"{side} overlap", labelpad=-18)
    if not all(matrix.shared for row in found for matrix in row):
        figure.supxlabel(
            "* the layers do not share this space; only copies would stand out", fontsize=7, x=0.99, ha="right"
        )
    return figure


def _map(axis: Axes, matrix: Matrix | None, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    if matrix is None:
        axis.axis("off")
        return
    low, high = matrix.layers[0] - 0.5, matrix.layers[-1] + 0.5
    chance = matrix.overlap_by_chance.mean
    shown = np.log(np.maximum(np.ma.masked_invalid(matrix.overlap), chance) / chance) / -math.log(chance)
    axis.imshow(shown, cmap=COLOURS, vmin=0, vmax=1, extent=(low, high, high, low), interpolation="nearest")
    axis.set_title(f"{name}{'' if matrix.shared else '*'}\n{matrix.times_chance:.3g} x chance")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(MaxNLocator(4, integer=True))
    axis.spines[:].set_visible(False)


def synergy(inspections: Sequence[Inspection]) -> Figure | None:
    """Returns, for the pairs of kinds that matter most, subspace overlap layer by layer beside chance.

    Always with o_proj and down_proj where there are both, and with the three strongest other pairs.

    Returns:
        None where no two kinds of a layer share a space.
    """
    names = _pairs(inspections)
    if not names:
        return None
    figure = canvas(3.4 * min(2, len(names)), 2.2 * math.ceil(len(names) / 2))
    grid = figure.subplots(math.ceil(len(names) / 2), min(2, len(names)), squeeze=False, sharex=True, sharey=True)
    for axis, name in zip(grid.flat, names, strict=False):
        _synergy(axis, name, inspections)
    for axis in list(grid.flat)[len(names) :]:
        axis.axis("off")
    if len(inspections) > 1:
        grid.flat[0].legend(frameon=False)
    return figure


def _pairs(inspections: Sequence[Inspection]) -> list[str]:
    curves = [curve for inspection in inspections for curve in inspection.curves]
    usual = [curve.name for curve in curves if {curve.first, curve.second} == {"o_proj output", "down_proj output"}]
    ranked = sorted(curves, key=lambda curve: -np.nan_to_num(curve.times_chance))
    return list(dict.fromkeys([*usual, *(curve.name for curve in ranked)]))[:4]


def _synergy(axis: Axes, name: str, inspections: Sequence[Inspection]) -> None:
    for i, inspection in enumerate(inspections):
        for curve in (one for one in inspection.curves if one.name == name):
            if i == 0:
                _chance(axis, curve)
            axis.plot(
                curve.layers,
                curve.overlap,
                color=_ink(i / max(1, len(inspections) - 1)),
                linestyle=DASHES[i % len(DASHES)],
                marker="o",
                markersize=2.2,
                linewidth=1.1,
                label=_short(inspection.name),
            )
    axis.set_yscale("log")
    axis.set_title(name)
    axis.set_xlabel("layer")
    axis.set_ylabel("overlap")
    axis.label_outer()


def _chance(axis: Axes, curve: Curve) -> None:
    chance = curve.overlap_by_chance
    axis.axhspan(chance.low, chance.high, color="0.88", linewidth=0)
    axis.set_ylim(bottom=chance.low / 3)
    where: Any = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top", "fontsize": 7, "color": "0.35"}
    axis.annotate("99 % of random directions", (0.99, chance.low), **where)


def fan(inspections: Sequence[Inspection]) -> Figure | None:
    """Returns the spectrum fan: one panel a kind, one line a module, relative to its largest singular value.

    Returns:
        None where every update is zero.
    """
    names = list(dict.fromkeys(group.name for inspection in inspections for group in inspection.groups))
    if not any(module.frobenius for inspection in inspections for module in inspection.modules.values()):
        return None
    figure = canvas(0.9 + 1.15 * len(names), 0.5 + 1.45 * len(inspections))
    grid = figure.subplots(len(inspections), len(names), squeeze=False, sharex=True, sharey=True)
    for axes, inspection in zip(grid, inspections, strict=True):
        for axis, name in zip(axes, names, strict=True):
            _fan(axis, name, inspection)
        axes[0].set_ylabel(f"{_short(inspection.name)}\nS / largest S")
    for axis in grid[-1]:
        axis.set_xlabel("component")
    _layers_bar(figure, grid, len(inspections))
    return figure


def _layers_bar(figure: Figure, grid: Any, rows: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    inks = ScalarMappable(cmap=ListedColormap([_ink(step / 63) for step in range(64)]))
    bar = figure.colorbar(inks, ax=grid, shrink=0.8, aspect=14 * rows, pad=0.01, ticks=[0, 1])
    bar.ax.set_yticklabels(["first", "last"])
    bar.set_label("layer", labelpad=-12)


def _fan(axis: Axes, name: str, inspection: Inspection) -> None:
    group = next((one for one in inspection.groups if one.name == name), None)
    for i, path in enumerate(group.paths if group else ()):
        S = np.array(inspection.modules[path].S)
        if S.any():
            share = i / max(1, len(group.paths) - 1) if group else 0.0
            axis.plot(np.arange(1, len(S) + 1), np.maximum(S / S[0], 1e-4), color=_ink(share), linewidth=0.7)
    axis.set_yscale("log")
    axis.set_title(name)


def sensitivities(inspections: Sequence[Inspection]) -> Figure | None:
    """Returns spectra coloured by signed sensitivity, and under them the sensitivities with their standard errors.

    One column a kind. Colour is ``mean g / standard error``, the number of standard errors from zero; a triangle marks
    a sign that is significant (up: harmful, down: helpful).

    Returns:
        None where no adapter has sensitivities.
    """
    measured = [inspection for inspection in inspections if inspection.responses]
    names = list(dict.fromkeys(group.name for inspection in measured for group in inspection.groups))
    if not names:
        return None
    figure = canvas(1.1 + 1.25 * len(names), 0.4 + 2.9 * len(measured))
    grid = figure.subplots(2 * len(measured), len(names), squeeze=False, sharex=True, sharey="row")
    for row, inspection in enumerate(measured):
        for axes, name in zip(grid[2 * row : 2 * row + 2].T, names, strict=True):
            _sensitivity(axes, name, inspection)
        grid[2 * row, 0].set_ylabel(f"{_short(inspection.name)}\nS / largest S")
        grid[2 * row + 1, 0].set_ylabel("dL/dS ± s.e.")
    for axis in grid[-1]:
        axis.set_xlabel("component")
    _signed_bar(figure, grid)
    return figure


def _sensitivity(axes: Any, name: str, inspection: Inspection) -> None:
    group = next((one for one in inspection.groups if one.name == name), None)
    for i, path in enumerate(group.paths if group else ()):
        S, response = np.array(inspection.modules[path].S), inspection.responses.get(path)
        if response is None or not S.any() or group is None:
            continue
        at = np.arange(1, len(S) + 1) + 0.5 * (i / max(1, len(group.paths) - 1) - 0.5)
        error = response.standard_error
        score = np.divide(response.mean, error, out=np.zeros_like(error), where=error > 0)
        axes[1].errorbar(at, response.mean, error, fmt="none", ecolor="0.6", elinewidth=0.5, zorder=1)
        for sign, marker, size in ((0, "o", 4), (1, "^", 14), (-1, "v", 14)):
            chosen = response.sign == sign
            colours: Any = {"c": score[chosen], "cmap": SIGNED, "vmin": -SCORE, "vmax": SCORE}
            drawn: Any = {"marker": marker, "s": size, "edgecolors": "0.25", "linewidths": 0.25, "zorder": 2}
            axes[0].scatter(at[chosen], np.maximum(S / S[0], 1e-4)[chosen], **colours, **drawn)
            axes[1].scatter(at[chosen], response.mean[chosen], **colours, **drawn)
    axes[0].set_yscale("log")
    axes[0].set_title(name)
    axes[1].axhline(0, color="0.4", linewidth=0.5, zorder=0)


def _signed_bar(figure: Figure, grid: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    inks = ScalarMappable(norm=Normalize(-SCORE, SCORE), cmap=SIGNED)
    bar = figure.colorbar(inks, ax=grid, shrink=0.8, aspect=14 * len(grid), pad=0.01, extend="both")
    bar.set_label("sensitivity in standard errors; ▲ harmful, ▼ helpful", fontsize=7)


def weights(found: WeightComparison) -> Figure | None:
    """Returns how singular values and output directions moved: one column a kind, one line a layer.

    From above: ratio of singular values by index, |cos| of directions by index, and with the best partner; dashed is
    no change, and what random directions give.
    """
    kinds = found.groups
    figure = canvas(0.9 + 1.25 * len(kinds), 4.2)
    grid = figure.subplots(3, len(kinds), squeeze=False, sharex=True, sharey="row")
    for axes, group in zip(grid.T, kinds, strict=True):
        studies = [found.studies[path] for path in group.paths]
        for i, study in enumerate(studies):
            ink: Any = {"color": _ink(i / max(1, len(studies) - 1)), "linewidth": 0.7}
            for axis, values in zip(axes, (study.ratio, study.output_by_index, study.output_best), strict=True):
                axis.plot(np.arange(1, len(values) + 1), values, **ink)
        axes[0].axhline(1, color="0.4", linestyle="--", linewidth=0.6)
        chances = (studies[0].output_by_chance, studies[0].output_best_by_chance)
        for axis, chance in zip(axes[1:], chances, strict=True):
            axis.axhline(chance.mean, color="0.4", linestyle="--", linewidth=0.6)
            axis.set_ylim(0, 1.04)
        axes[0].set_title(group.name)
        axes[2].set_xlabel("direction")
    for axis, words in zip(grid[:, 0], ("S after / before", "|cos| by index", "|cos| best partner"), strict=True):
        axis.set_ylabel(words)
    _layers_bar(figure, grid, 1)
    return figure


def _ink(share: float) -> Any:
    """A colour of the map, for a share in [0, 1], that is dark enough on white."""
    from matplotlib import colormaps

    return colormaps[COLOURS](0.8 * share)


def _short(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2]
    return last if len(last) <= 22 else f"{last[:21]}…"
