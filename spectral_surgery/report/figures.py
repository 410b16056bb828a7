"""The report's figures at paper quality: trade-off, gates, spectra; legible to colour-blind readers and in grey."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_surgery.errors import InputError
from spectral_surgery.plots import COLOURS, STYLE
from spectral_surgery.report import modules
from spectral_surgery.report.drawing import INKS
from spectral_surgery.report.facts import Verdict
from spectral_surgery.report.picture import Box, Picture, Point, along, picture, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

MARKS = {"base": "s", "yours": "o", "strength": "o", "rival": "D", "refined": "o"}
SIZES = {"base": 5.5, "yours": 5.5, "strength": 5, "rival": 5, "refined": 8}
FORMATS: dict[str, dict[str, None]] = {"svg": {"Date": None}, "png": {"Software": None}}
"""With what is left out of the metadata, so that the same verdict gives the same files."""


def render(verdict: Verdict) -> dict[str, bytes]:
    """Returns the content of every figure by file name, in both formats; a figure without data is left out.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "Figures need matplotlib. Install it with: pip install 'spectral-surgery[report]'."
        ) from error
    made: dict[str, Callable[[Verdict], Figure | None]] = {"trade-off": tradeoff, "gates": gates, "spectra": spectra}
    content = {}
    # Names may hold what would be a formula.
    with matplotlib.rc_context({**STYLE, "text.parse_math": False}):
        for name, draw in made.items():
            if (figure := draw(verdict)) is not None:
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # once is enough for both formats
                for extension, metadata in FORMATS.items():
                    buffer = io.BytesIO()
                    figure.savefig(buffer, format=extension, metadata=metadata)
                    content[f"{name}.{extension}"] = buffer.getvalue()
    return content


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")


def tradeoff(verdict: Verdict) -> Figure | None:
    """Returns other skills against task, better to the right and up; None where nothing was scored on test rows."""
    drawn = picture(verdict)
    if drawn is None:
        return None
    figure = _figure(5.0, 3.4)
    axis = figure.subplots()
    axis.set_xlim(*drawn.spans[0])
    axis.set_ylim(*drawn.spans[1])
    for number, side in enumerate((axis.xaxis, axis.yaxis)):
        ticks = drawn.ticks(number, 7)
        side.set_ticks(ticks, drawn.written(number, ticks))
    axis.grid(color="0.93", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel(f"{drawn.title(0, 66)} (better →)")
    axis.set_ylabel(f"{drawn.title(1, 50)} (better →)")
    if drawn.limit is not None:
        axis.axvspan(drawn.spans[0][0], drawn.limit, color="#f3f1ec", zorder=0)
        axis.axvline(drawn.limit, color="#8d7f62", linewidth=0.8, linestyle=(0, (4, 3)))
    _field(axis, drawn)
    for point in drawn.points:
        _point(axis, point)
    _labels(figure, axis, drawn)
    return figure


def _field(axis: Axes, drawn: Picture) -> None:
    """The strengths, and what else was tried."""
    if drawn.curve:
        across, up = zip(*(at for _, at in drawn.curve), strict=True)
        line = "-" if drawn.curve_rows == "test" else "--"
        axis.plot(across, up, color="0.68", linewidth=1.3, linestyle=line, marker="o", markersize=2.6)
    for _, (x, y) in drawn.others:
        axis.plot(x, y, color="0.82", marker="o", markersize=2.2)


def _point(axis: Axes, point: Point) -> None:
    x, y = point.at
    hollow = point.role in ("base", "rival")
    axis.errorbar(
        x,
        y,
        xerr=[[x - point.task[0]], [point.task[1] - x]],
        yerr=[[y - point.skills[0]], [point.skills[1] - y]],
        color=INKS[point.role],
        elinewidth=0.8,
        marker=MARKS[point.role],
        markersize=SIZES[point.role],
        markerfacecolor="white" if hollow else INKS[point.role],
        markeredgewidth=1.2 if hollow else 0.6,
        markeredgecolor=INKS[point.role] if hollow else "white",
        zorder=5 if point.role == "refined" else 4,
    )


def _labels(figure: Figure, axis: Axes, drawn: Picture) -> None:
    """Direct labels, placed in pixels once the layout is known."""
    figure.draw_without_rendering()
    texts = [
        axis.annotate(
            point.label,
            (0, 0),
            xycoords="figure pixels",
            color=INKS[point.role],
            weight="bold" if point.role in ("refined", "yours", "base") else "normal",
            zorder=6,
        )
        for point in drawn.points
    ]
    at = axis.transData.transform
    blocked: list[Box] = []
    if drawn.limit is not None:
        room = drawn.share(0, drawn.limit) > 0.2
        where: Any = {
            "xycoords": axis.get_xaxis_transform(),
            "textcoords": "offset points",
            "ha": "right" if room else "left",
            "fontsize": 7,
        }
        limit = axis.annotate(drawn.limit_label, (drawn.limit, 0.02), (-3 if room else 3, 0), color="#75684d", **where)
        middle = float(at((drawn.limit, drawn.spans[1][0]))[0])
        blocked = [_box(limit.get_window_extent()), (middle - 1, axis.bbox.y0, 2.0, axis.bbox.height)]
    half = 5.5
    for point in drawn.points:
        x, y = at(point.at)
        blocked.append((x - half, y - half, 2 * half, 2 * half))
        blocked += along([tuple(at((v, point.at[1]))) for v in point.task], 3.0, 4.0)
        blocked += along([tuple(at((point.at[0], v))) for v in point.skills], 3.0, 4.0)
    blocked += along([tuple(at(where)) for _, where in drawn.curve], 4.0, 4.0)
    blocked += [(*(at(where) - 2), 4.0, 4.0) for _, where in drawn.others]
    sizes = [_box(text.get_window_extent())[2:] for text in texts]
    anchors = [(float(x), float(y)) for x, y in (at(point.at) for point in drawn.points)]
    for text, box in zip(texts, place(anchors, sizes, blocked, _box(axis.bbox), gap=7.0), strict=True):
        # In points from the corner of the figure, so that every format has it in the same place.
        text.xyann = (box[0] * 72 / figure.dpi, box[1] * 72 / figure.dpi)
        text.set_anncoords("figure points")


def _box(extent: Any) -> Box:
    return float(extent.x0), float(extent.y0), float(extent.width), float(extent.height)


def gates(verdict: Verdict) -> Figure | None:
    """Returns the gates by layer and kind, a stripe a component, the largest singular value on the left."""
    found = modules.gate_map(verdict)
    if found is None:
        return None
    figure = _figure(0.9 + 0.95 * len(found.kinds), 0.75 + min(7.0, max(0.9, 0.13 * len(found.rows))))
    axes = figure.subplots(1, len(found.kinds), squeeze=False, sharey=True)[0]
    image: Any = None
    for axis, kind in zip(axes, found.kinds, strict=True):
        cells = [modules.stripes(found.cells[(i, kind)]["gates"]) if (i, kind) in found.cells else np.zeros(0)
                 for i in range(len(found.rows))]  # fmt: skip
        shown = np.full((len(cells), max(map(len, cells))), np.nan)
        for i, cell in enumerate(cells):
            shown[i, : len(cell)] = cell
        span = {"vmin": 1 - found.reach, "vmax": 1 + found.reach}
        image = axis.imshow(shown, cmap=COLOURS, aspect="auto", interpolation="nearest", **span)
        axis.set_title(kind)
        axis.set_xticks([])
        axis.spines[:].set_visible(False)
    step = max(1, -(-len(found.rows) // 16))
    axes[0].set_yticks(range(0, len(found.rows), step), found.rows[::step])
    axes[0].set_ylabel("layer")
    figure.supxlabel("component, the largest singular value on the left", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), aspect=14, pad=0.01)
    bar.set_label("gate (1: unchanged)")
    return figure


def spectra(verdict: Verdict) -> Figure | None:
    """Returns the singular values of every kind before and after: medians over layers, and their range."""
    from matplotlib.ticker import NullLocator

    found = modules.spectra(verdict)
    if not found:
        return None
    figure = _figure(0.6 + 1.15 * len(found), 1.9)
    axes = figure.subplots(1, len(found), squeeze=False, sharex=True, sharey=True)[0]
    for axis, one in zip(axes, found, strict=True):
        k = np.arange(1, one.before.shape[1] + 1)
        for values, ink, line, name in (
            (one.before, "0.45", "--", "before"),
            (one.after, INKS["refined"], "-", "after"),
        ):
            axis.fill_between(k, values.min(0), values.max(0), color=ink, alpha=0.15, linewidth=0)
            axis.plot(k, np.median(values, 0), color=ink, linestyle=line, linewidth=1.2, label=name)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(one.kind)
        axis.set_xlabel("component")
    axes[0].set_ylabel("S / largest S of the kind")
    axes[0].legend(frameon=False, handlelength=1.6)
    return figure
