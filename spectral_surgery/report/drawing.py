"""The pictures of the page, as SVG with values for the pointer and the keyboard.

The trees are built as XML, so text cannot become markup, and each is drawn for one width: a page shows the wide or the
narrow one, so that letters keep their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.etree import ElementTree

import numpy as np

from spectral_surgery.report import facts
from spectral_surgery.report.modules import FLOOR, Spectra
from spectral_surgery.report.picture import Box, Pair, Picture, Point, along, place

INKS = {"base": "#44444f", "yours": "#1b1b1f", "strength": "#6f6f7a", "rival": "#a34a00", "refined": "#1f5fa8"}
"""By role; shapes differ too, so nothing rests on colour."""
LETTER = 0.57
"""Width of a letter in heights, on average."""
LIMIT = 95.0
"""Pixels that the words at the task's limit take."""
GAP = 13.0
"""Pixels between the middle of a mark and its label."""
CLOSE = 1.6
"""Gaps that a label may lie from its mark before a line joins them."""

Place = Callable[[Pair], Pair]
"""From a task and an other-skills score to pixels."""


def tradeoff(picture: Picture, width: int, height: int) -> str:
    """Returns other skills against task as SVG, better to the right and up."""
    svg = _svg(width, height, "Trade-off: other skills against task; better is right and up")
    frame = (58.0, 22.0, width - 58.0 - 14.0, height - 22.0 - 54.0)
    _axes(svg, picture, frame)
    _limit(svg, picture, frame)
    at = _map(picture, frame)
    line = [at(where) for _, where in picture.curve]
    if line:
        dash = "none" if picture.curve_rows == "test" else "6 4"
        _add(svg, "path", d=_path(line), fill="none", stroke="#b4b4bd", stroke_width=2, stroke_dasharray=dash)
    for strength, where in picture.curve:
        tip = f"strength {strength:g}\n{_values(picture, where)}\n{picture.curve_rows} rows"
        x, y = at(where)
        _dot(svg, "circle", tip, cx=x, cy=y, r=3.5, fill="#b4b4bd", stroke="#ffffff", stroke_width=1)
    for name, where in picture.others:
        x, y = at(where)
        _dot(svg, "circle", f"{name}\n{_values(picture, where)}\nvalidation rows", cx=x, cy=y, r=2.6, fill="#cfcfd6")
    for point in picture.points:
        _bars(svg, point, at)
    for point in picture.points:
        _mark(svg, point, at(point.at))
    _labels(svg, picture, at, line, frame)
    return ElementTree.tostring(svg, encoding="unicode")


def _values(picture: Picture, where: Pair) -> str:
    task, skills = picture.units
    return f"task: {task.number(where[0])}\nother skills: {skills.number(where[1])}"


def _map(picture: Picture, frame: Box) -> Place:
    left, top, width, height = frame

    def at(where: Pair) -> Pair:
        return left + picture.share(0, where[0]) * width, top + (1 - picture.share(1, where[1])) * height

    return at


def _axes(svg: ElementTree.Element, picture: Picture, frame: Box) -> None:
    left, top, width, height = frame
    bottom = top + height
    across, up = picture.ticks(0, 5 if width < 400 else 8), picture.ticks(1, 7)
    for value, words in zip(across, picture.written(0, across), strict=True):
        x = left + picture.share(0, value) * width
        _add(svg, "path", d=f"M{x:.1f} {top:.1f}V{bottom:.1f}", stroke="#ededf1")
        _text(svg, x, bottom + 17, words, anchor="middle", cls="soft")
    for value, words in zip(up, picture.written(1, up), strict=True):
        y = top + (1 - picture.share(1, value)) * height
        _add(svg, "path", d=f"M{left:.1f} {y:.1f}H{left + width:.1f}", stroke="#ededf1")
        _text(svg, left - 7, y + 4, words, anchor="end", cls="soft")
    room = (left + width) / (0.6 * 12)
    wide, high = (picture.title(axis, room) for axis in (0, 1))
    _text(svg, left + width, bottom + 38, f"{wide} · better →", anchor="end", cls="axis")
    _text(svg, 2, 12, f"↑ better · {high}", cls="axis")


def _limit(svg: ElementTree.Element, picture: Picture, frame: Box) -> None:
    if picture.limit is None:
        return
    left, top, width, height = frame
    x = left + picture.share(0, picture.limit) * width
    _add(svg, "rect", x=left, y=top, width=max(0.0, x - left), height=height, fill="#f3f1ec", opacity=0.75)
    _add(svg, "path", d=f"M{x:.1f} {top:.1f}V{top + height:.1f}", stroke="#8d7f62", stroke_dasharray="5 4")
    room = x - left > LIMIT
    end, anchor = (x - 6, "end") if room else (x + 6, "start")
    _text(svg, end, top + height - 8, picture.limit_label, anchor=anchor, cls="limit")


def _bars(svg: ElementTree.Element, point: Point, at: Place) -> None:
    x, y = at(point.at)
    ends = [at((value, point.at[1]))[0] for value in point.task] + [at((point.at[0], v))[1] for v in point.skills]
    d = f"M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}M{x:.1f} {ends[2]:.1f}V{ends[3]:.1f}"
    _add(svg, "path", d=d, stroke=INKS[point.role], stroke_width=1.4, opacity=0.55)


def _mark(svg: ElementTree.Element, point: Point, where: Pair) -> None:
    x, y = where
    ink = INKS[point.role]
    if point.role == "base":
        _dot(svg, "rect", point.tip, x=x - 6, y=y - 6, width=12, height=12, fill="#ffffff", stroke=ink, stroke_width=2)
    elif point.role == "rival":
        diamond = f"M{x:.1f} {y - 8:.1f}L{x + 8:.1f} {y:.1f}L{x:.1f} {y + 8:.1f}L{x - 8:.1f} {y:.1f}Z"
        _dot(svg, "path", point.tip, d=diamond, fill="#ffffff", stroke=ink, stroke_width=2)
    elif point.role == "refined":
        _add(svg, "circle", cx=x, cy=y, r=13, fill="none", stroke=ink, stroke_width=1.5, opacity=0.5)
        _dot(svg, "circle", point.tip, cx=x, cy=y, r=9, fill=ink, stroke="#ffffff", stroke_width=1.5)
    else:
        _dot(svg, "circle", point.tip, cx=x, cy=y, r=6.5, fill=ink, stroke="#ffffff", stroke_width=1.5)


def _labels(svg: ElementTree.Element, picture: Picture, at: Place, line: Sequence[Pair], frame: Box) -> None:
    points = [(point, at(point.at)) for point in picture.points]
    heights = [15.0 if point.role in ("refined", "yours", "base") else 13.0 for point, _ in points]
    sizes = [(LETTER * size * len(point.label), size * 1.15) for (point, _), size in zip(points, heights, strict=True)]
    blocked = along(line, 7.0) + [(x - 11, y - 11, 22.0, 22.0) for _, (x, y) in points]
    blocked += [(x - 3, y - 3, 6.0, 6.0) for x, y in (at(where) for _, where in picture.others)]
    if picture.limit is not None:
        x = at((picture.limit, picture.spans[1][0]))[0]
        blocked += [
            (x - 1, frame[1], 2.0, frame[3]),
            (x - (LIMIT if x - frame[0] > LIMIT else 0), frame[1] + frame[3] - 22, LIMIT, 20.0),
        ]
    for point, (x, y) in points:
        reach = (
            [(at((v, point.at[1]))[0], y) for v in point.task],
            [(x, at((point.at[0], v))[1]) for v in point.skills],
        )
        blocked += along(reach[0], 4.0) + along(reach[1], 4.0)
    for (point, where), size, box in zip(
        points, heights, place([w for _, w in points], sizes, blocked, frame, gap=GAP), strict=True
    ):
        _leader(svg, where, box, INKS[point.role])
        _text(svg, box[0] + box[2] / 2, box[1] + 0.82 * size, point.label, anchor="middle", cls=f"label {point.role}",
              size=size)  # fmt: skip


def _leader(svg: ElementTree.Element, where: Pair, box: Box, ink: str) -> None:
    """A thin line from a mark to a label that had to move away."""
    x = min(max(where[0], box[0]), box[0] + box[2])
    y = min(max(where[1], box[1]), box[1] + box[3])
    far = ((x - where[0]) ** 2 + (y - where[1]) ** 2) ** 0.5
    if far > GAP * CLOSE:
        start = [where[i] + ((x, y)[i] - where[i]) * 10 / far for i in (0, 1)]
        _add(svg, "path", d=f"M{start[0]:.1f} {start[1]:.1f}L{x:.1f} {y:.1f}", stroke=ink, stroke_width=1, opacity=0.5)


def fan(one: Spectra) -> str:
    """Returns one kind's spectra before and after, on a logarithmic axis: median over layers, and their range."""
    width, height, left, bottom = 140, 124, 30, 100
    svg = _svg(width, height, f"Singular values of {one.kind} before and after")
    lowest = max(FLOOR, min(float(one.before.min()), float(np.median(one.after, 0).min())))
    top = max(1.0, float(one.after.max()))
    count = one.before.shape[1]

    def at(k: int, value: float) -> Pair:
        share = np.log(max(value, lowest) / lowest) / np.log(top / lowest)
        return left + k / (count - 1) * (width - left - 8), bottom - float(share) * (bottom - 20)

    for value in (1.0, 0.1, 0.01, 0.001):
        if value >= lowest:
            _, y = at(0, value)
            _add(svg, "path", d=f"M{left} {y:.1f}H{width - 8}", stroke="#ededf1")
            _text(svg, left - 4, y + 3.5, f"{value:g}", anchor="end", cls="soft", size=10)
    _text(svg, left, 11, one.kind, cls="panel", size=12)
    _text(svg, left, bottom + 14, "1", anchor="middle", cls="soft", size=10)
    _text(svg, width - 8, bottom + 14, str(count), anchor="end", cls="soft", size=10)
    for values, ink in ((one.before, "#8a8a96"), (one.after, INKS["refined"])):
        upper = [at(k, v) for k, v in enumerate(values.max(0))]
        lower = [at(k, v) for k, v in enumerate(values.min(0))][::-1]
        _add(svg, "path", d=f"{_path(upper + lower)}Z", fill=ink, opacity=0.14)
        middle = [at(k, v) for k, v in enumerate(np.median(values, 0))]
        _add(svg, "path", d=_path(middle), fill="none", stroke=ink, stroke_width=2)
    return ElementTree.tostring(svg, encoding="unicode")


def _svg(width: int, height: int, label: str) -> ElementTree.Element:
    box = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    hidden = {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    return ElementTree.Element("svg", {**box, **hidden})


def _add(parent: ElementTree.Element, tag: str, **attributes: float | int | str) -> ElementTree.Element:
    shown = {
        key.replace("_", "-"): f"{value:.1f}".removesuffix(".0")
        if isinstance(value, float) and key != "opacity"
        else str(value)
        for key, value in attributes.items()
    }
    return ElementTree.SubElement(parent, tag, shown)


def _dot(parent: ElementTree.Element, tag: str, tip: str, **attributes: float | int | str) -> None:
    tip = facts.visible(tip)
    mark = _add(parent, tag, **attributes)
    mark.attrib |= {
        "class": "dot",
        "data-tip": tip,
        "tabindex": "0",
        "role": "img",
        "aria-label": tip.replace("\n", ", "),
    }


def _text(
    parent: ElementTree.Element,
    x: float | int,
    y: float | int,
    words: str,
    *,
    anchor: str = "start",
    cls: str = "",
    size: float | int = 12,
) -> None:
    _add(
        parent, "text", x=float(x), y=float(y), text_anchor=anchor, style=f"font-size:{size:g}px"
    ).text = facts.visible(words)
    if cls:
        parent[-1].set("class", cls)


def _path(points: Sequence[Pair]) -> str:
    return "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
