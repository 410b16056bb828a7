"""The trade-off picture before it is drawn: points, curve and limits, and where labels go without overlap.

Better is always right (task) and up (other skills): an axis whose measure is better when lower runs backwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from spectral_surgery.report import facts
from spectral_surgery.report.facts import Standing, Unit, Verdict

ROOM = 0.09
"""Share of an axis that stays free on each side of the points."""
EDGE = 0.025
"""Where what lies outside of an axis is drawn, as a share of it."""
FAR = 4
"""A base so many times further away than everything else is spread is drawn at the edge, with its value."""

LEAST = 0.1
"""Least span of an axis: ten points, or a tenth of a loss, so that noise does not look like a difference."""

Pair = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One candidate with its 95 % intervals, in the measures' own units."""

    role: str
    label: str
    at: Pair
    """Task and other skills."""
    task: Pair
    """Interval."""
    skills: Pair
    """Interval."""
    tip: str
    """Values in words."""


@dataclass(frozen=True)
class Picture:
    """Everything that is drawn."""

    units: tuple[Unit, Unit]
    points: list[Point]
    """On test rows: base, yours, best strength, rivals, the answer; the answer last."""
    curve: list[tuple[float, Pair]]
    """Strength and its scores from the base (0) to the unedited adapter (1) and on, all on the same rows."""
    curve_rows: str
    """Which rows the curve was scored on: validation or test."""
    others: list[tuple[str, Pair]]
    """Whatever else was tried, on validation rows."""
    limit: float | None
    """The task may fall to here."""
    limit_label: str
    spans: tuple[Pair, Pair]
    """From worse to better, for each axis."""

    def share(self, axis: int, value: float) -> float:
        """Returns where a value lies on an axis, from 0 (worst shown) to 1 (best shown)."""
        worst, best = self.spans[axis]
        return (value - worst) / (best - worst)

    def ticks(self, axis: int, most: int = 6) -> list[float]:
        """Returns round values on an axis."""
        from matplotlib.ticker import MaxNLocator

        low, high = sorted(self.spans[axis])
        found = MaxNLocator(most - 1, steps=[1, 2, 5, 10], min_n_ticks=3).tick_values(low, high)
        return [float(value) for value in found if low <= value <= high]

    def title(self, axis: int, room: float | int) -> str:
        """Returns the title of an axis: name, measure and unit, as far as there is room for so many letters."""
        unit, name = self.units[axis], ("task", "other skills")[axis]
        choices = [f"{name}: {unit.label}", f"{name}, {'%' if unit.percent else unit.unit}", name]
        return facts.visible(next((words for words in choices if len(words) + len(" (better →)") <= room), name))

    def written(self, axis: int, values: Sequence[float]) -> list[str]:
        """Returns the values of an axis as they are written at its ticks, without needless digits."""
        labels = [self.units[axis].number(value) for value in values]
        while labels and all("." in label and label.endswith(("0", ".")) for label in labels):
            labels = [label[:-1] for label in labels]
        return [label.removesuffix(".") for label in labels]


def picture(verdict: Verdict) -> Picture | None:
    """Returns the picture, or None where base and unedited adapter were not scored on test rows."""
    found = facts.standings(verdict)
    if {"base", "yours"} - {one.role for one in found}:
        return None
    units = (facts.unit(verdict, "task"), facts.unit(verdict, "skills"))
    points = [_point(one, units) for one in found]
    curve, rows = _curve(verdict)
    shown = {one.candidate["name"] for one in found}
    others = [
        (c["name"], _means(c["validation"]))
        for c in verdict["candidates"]
        if c["validation"] and c["name"] not in shown and c["family"] != facts.STRENGTH
    ]
    limit, label = _limit(verdict, points)
    spans = (_span(0, units[0], points, curve, limit), _span(1, units[1], points, curve, limit))
    points = [_brought_in(point, units, spans) for point in points]
    curve = [(strength, at) for strength, at in curve if all(_inside(spans[axis], at[axis]) for axis in (0, 1))]
    others = [(name, at) for name, at in others if all(_inside(spans[axis], at[axis]) for axis in (0, 1))]
    return Picture(units, points, curve, rows, others, limit, label, spans)


def _point(one: Standing, units: tuple[Unit, Unit]) -> Point:
    task, skills = one.score("task"), one.score("skills")
    assert task
    assert skills
    lines = [one.label, f"task: {units[0].score(task)}", f"other skills: {units[1].score(skills)}"]
    if one.gain:
        lines.append(f"gain over yours: task {units[0].gain(one.gain['task'])},")
        lines.append(f"other skills {units[1].gain(one.gain['skills'])}")
    if one.candidate["equivalent"]:
        lines.append(one.candidate["equivalent"])
    return Point(
        one.role,
        {"base": "base model", "yours": "your adapter", "refined": "refined"}.get(one.role, _short(one)),
        _means(one.candidate["test"]),
        units[0].limits(task),
        units[1].limits(skills),
        facts.visible("\n".join(lines)),
    )


def _short(one: Standing) -> str:
    name = facts.visible(one.candidate["name"]).replace("\n", " ")
    return name if len(name) <= 28 else f"{name[:27]}…"


def _means(scores: dict) -> Pair:
    return float(scores["task"]["mean"]), float(scores["skills"]["mean"])


def _curve(verdict: Verdict) -> tuple[list[tuple[float, Pair]], str]:
    """The strengths in order, on test rows where all have been scored there, else on validation rows."""
    fixed = {"base": 0.0, "unedited": 1.0}
    found = []
    for c in verdict["candidates"]:
        strength = fixed.get(c["family"], _strength(c["name"]) if c["family"] == facts.STRENGTH else None)
        if strength is not None:
            found.append((strength, c))
    split = "test" if all(c["test"] for _, c in found) else "validation"
    known = sorted((strength, _means(c[split])) for strength, c in found if c[split])
    return (known if len(known) > 2 else []), split


def _strength(name: str) -> float | None:
    try:
        return float(name.split()[-1])
    except (ValueError, IndexError):
        return None


def _limit(verdict: Verdict, points: Sequence[Point]) -> tuple[float | None, str]:
    margin = verdict["measures"]["task"].get("margin")
    if margin is None or verdict["outcome"] == facts.NOT_BETTER:
        return None, ""
    yours = next(point.at[0] for point in points if point.role == "yours")
    sign = 1 if verdict["measures"]["task"]["lower_is_better"] else -1
    share = verdict["rule"]["may_lose"]
    return yours + sign * margin, f"may lose {100 * share:g} %" if share else "must gain"


def _span(
    axis: int, unit: Unit, points: Sequence[Point], curve: Sequence[tuple[float, Pair]], limit: float | None
) -> Pair:
    """From worse to better, with room; without the base where it would press all others into a corner."""
    values = [v for point in points if point.role != "base" for v in (point.task, point.skills)[axis]]
    if axis == 0 and limit is not None:
        values.append(limit)
    base = [v for point in points if point.role == "base" for v in (point.task, point.skills)[axis]]
    whole = [*values, *base, *(at[axis] for _, at in curve)]
    spread = max(values) - min(values)
    if not 0 < spread * FAR < max(*values, *base) - min(*values, *base):
        values = whole
    low, high = min(values), max(values)
    least = LEAST if unit.percent else LEAST * max(abs(low), abs(high), 1e-6)
    room = max(ROOM * (high - low), (least - (high - low)) / 2)
    low, high = low - room, high + room
    return (high, low) if unit.lower_is_better else (low, high)


def _brought_in(point: Point, units: tuple[Unit, Unit], spans: tuple[Pair, Pair]) -> Point:
    """The point, at the edge and with its value in its label where it lies outside of the axes."""
    at, label = list(point.at), point.label
    for axis, arrows in enumerate((("←", "→"), ("↓", "↑"))):
        worst, best = spans[axis]
        share = (at[axis] - worst) / (best - worst)
        if not 0 <= share <= 1:
            at[axis] = worst + (best - worst) * (EDGE if share < 0 else 1 - EDGE)
            label = f"{arrows[share > 1]} {label} at {units[axis].number(point.at[axis])}"
    kept = [(min(max(low, min(span)), max(span)), min(max(high, min(span)), max(span)))
            for (low, high), span in zip((point.task, point.skills), spans, strict=True)]  # fmt: skip
    if label == point.label:
        return point
    return replace(point, at=(at[0], at[1]), label=label, task=_around(at[0], kept[0]), skills=_around(at[1], kept[1]))


def _around(value: float, interval: Pair) -> Pair:
    """The interval if it holds the value, else no width."""
    return interval if interval[0] <= value <= interval[1] else (value, value)


def _inside(span: Pair, value: float) -> bool:
    return min(span) <= value <= max(span)


Box = tuple[float, float, float, float]
"""Left, top, width, height."""


def place(
    anchors: Sequence[Pair],
    sizes: Sequence[Pair],
    obstacles: Iterable[Box],
    bounds: Box,
    *,
    gap: float,
) -> list[Box]:
    """Returns a box for each label, near its anchor, clear of the others, of the obstacles and of the bounds.

    Every label tries places around its anchor at growing distances; the cheapest set is improved one label at a time
    until nothing changes. Overlap costs by area, distance a little.

    Args:
        anchors: Points that are labelled, in pixels.
        sizes: Width and height of each label.
        obstacles: Boxes that a label should not cover, such as marks and error bars.
        bounds: What a label must stay in.
        gap: Distance of a label from its anchor.
    """
    blocked = list(obstacles)
    choices = [_places(anchor, size, gap) for anchor, size in zip(anchors, sizes, strict=True)]
    own = [
        [_cost(box, blocked, bounds) + 0.35 * rank + 8 * (rank // AROUND) for rank, box in enumerate(boxes)]
        for boxes in choices
    ]
    taken = [min(range(len(costs)), key=costs.__getitem__) for costs in own]
    for _ in range(12):
        before = list(taken)
        for i, boxes in enumerate(choices):
            others = [choices[j][taken[j]] for j in range(len(choices)) if j != i]
            taken[i] = min(
                range(len(boxes)),
                key=lambda k: own[i][k] + 6 * sum(_overlap(boxes[k], other) for other in others),
            )
        if taken == before:
            break
    return [boxes[k] for boxes, k in zip(choices, taken, strict=True)]


AROUND = 8
"""Places at each distance."""


def _places(anchor: Pair, size: Pair, gap: float) -> list[Box]:
    (x, y), (w, h) = anchor, size
    found = []
    for far in (1.0, 2.0, 3.2, 4.6):
        d = gap * far
        slant = 0.85 * d
        found += [
            (x + d, y - h / 2, w, h),
            (x - d - w, y - h / 2, w, h),
            (x + slant, y - slant - h, w, h),
            (x - slant - w, y - slant - h, w, h),
            (x + slant, y + slant, w, h),
            (x - slant - w, y + slant, w, h),
            (x - w / 2, y - d - h, w, h),
            (x - w / 2, y + d, w, h),
        ]
    return found


def _cost(box: Box, blocked: Sequence[Box], bounds: Box) -> float:
    x, y, w, h = box
    left, top, width, height = bounds
    outside = max(0.0, left - x) + max(0.0, top - y) + max(0.0, x + w - left - width) + max(0.0, y + h - top - height)
    return 50 * outside + sum(_overlap(box, other) for other in blocked)


def _overlap(a: Box, b: Box) -> float:
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def along(points: Sequence[Pair], width: float, step: float = 6.0) -> list[Box]:
    """Returns boxes that cover a line through points, as obstacles for :func:`place`."""
    half = width / 2
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / step))
        for i in range(count + 1):
            x, y = x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count
            found.append((x - half, y - half, width, width))
    return found
