"""What tables and figures say, in numbers: runs side by side along one axis, everything else held fixed.

Pure functions of runs. Where several seeds were run, a cell is their mean. Differences are from the unedited adapter
as it was scored beside the edited ones where it was scored several times, as in the published runs; those re-scorings
are also what :func:`noise` is made of.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from spectral_surgery.results.runs import BASE, RISK, UNEDITED, Run

Axis = Literal["rows", "energy", "modules"]
EXACT = 9
"""Decimals of a difference: published scores have three, so what comes after is binary rounding."""


@dataclass(frozen=True)
class Setting:
    """What is held fixed."""

    rows: int | None = 128
    energy: str | None = "nuclear"
    modules: str | None = "residual"

    def fits(self, run: Run) -> bool:
        """Returns whether a run was made with it; what does not matter to a run fits anything."""
        pairs = ((self.rows, run.rows), (self.energy, run.energy), (self.modules, run.modules))
        return all(found is None or wanted == found for wanted, found in pairs)

    def words(self) -> str:
        """Returns it in words."""
        parts = [f"{self.rows} measuring rows" if self.rows is not None else "", self.modules and f"{self.modules}"]
        energy = "no energy kept" if self.energy == "none" else self.energy and f"{self.energy} energy kept"
        return ", ".join(part for part in [*parts, energy] if part)


PAPER = Setting()
"""The paper's setting, of which its Table 2 and Figures 3 and 4 are."""


def usual(runs: Iterable[Run]) -> Setting:
    """Returns the setting to show first: the paper's where it was run, else that of the most edited runs."""
    edited = [run for run in runs if run.policy not in (UNEDITED, BASE)]
    counts = Counter(Setting(run.rows, run.energy, run.modules) for run in edited)
    if not counts or PAPER in counts:
        return PAPER
    measured = {setting: count for setting, count in counts.items() if setting.rows is not None} or counts
    return max(measured, key=lambda setting: measured[setting])


def cells(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """Returns every adapter's name with every task that it was scored in, in the order of the runs."""
    runs = list(runs)
    names = list(dict.fromkeys(run.name for run in runs))
    tasks = list(dict.fromkeys(task for run in runs for task in run.scores))
    there = {(run.name, task) for run in runs for task in run.scores}
    return [(name, task) for name in names for task in tasks if (name, task) in there]


def edits(runs: Iterable[Run]) -> list[str]:
    """Returns the policies, the unedited adapter and the base model left out."""
    return [name for name in dict.fromkeys(run.policy for run in runs) if name not in (UNEDITED, BASE)]


def levels(runs: Iterable[Run], axis: Axis) -> list:
    """Returns the values that edited runs have on an axis, numbers ascending."""
    found = [getattr(run, axis) for run in runs if run.policy not in (UNEDITED, BASE)]
    known = list(dict.fromkeys(value for value in found if value is not None))
    return sorted(known) if axis == "rows" else known


def score(runs: Iterable[Run], cell: tuple[str, str], policy: str, setting: Setting) -> float | None:
    """Returns a policy's score in a cell at a setting, the mean of its seeds; None where it was not run."""
    name, task = cell
    found = [
        run.scores[task].value
        for run in runs
        if run.name == name and run.policy == policy and task in run.scores and setting.fits(run)
    ]
    return statistics.fmean(found) if found else None


def gain(runs: Sequence[Run], cell: tuple[str, str], policy: str, setting: Setting) -> float | None:
    """Returns a policy's score less the unedited adapter's; None where one of them is not there."""
    edited, unedited = score(runs, cell, policy, setting), score(runs, cell, UNEDITED, setting)
    return None if edited is None or unedited is None else round(edited - unedited, EXACT)


def along(runs: Sequence[Run], cell: tuple[str, str], policy: str, axis: Axis, setting: Setting) -> list[float | None]:
    """Returns a policy's scores along an axis, everything else held fixed."""
    return [score(runs, cell, policy, replace(setting, **{axis: level})) for level in levels(runs, axis)]


@dataclass(frozen=True)
class Best:
    """The best of several policies in one cell. It was chosen on the examples that it is scored on."""

    cell: tuple[str, str]
    policy: str
    gain: float
    """Over the unedited adapter."""
    value: float


def best(runs: Sequence[Run], setting: Setting) -> list[Best]:
    """Returns the best policy of every cell."""
    found = []
    for cell in cells(runs):
        gains = {policy: gain(runs, cell, policy, setting) for policy in edits(runs)}
        known = {policy: value for policy, value in gains.items() if value is not None}
        if known:
            policy = max(known, key=lambda name: known[name])
            value = score(runs, cell, policy, setting)
            assert value is not None
            found.append(Best(cell, policy, known[policy], value))
    return found


@dataclass(frozen=True)
class Point:
    """One point of a figure."""

    label: str
    """What it is a point of: the adapter's name."""
    mark: str
    """What tells it from others of the same label: the task, or the policy."""
    x: float
    y: float


def guided_and_random(runs: Sequence[Run], setting: Setting, guided: str, control: str) -> list[Point]:
    """Returns the gain of a guided policy (y) beside that of its random control (x), cell by cell (Figure 3)."""
    found = []
    for cell in cells(runs):
        x, y = gain(runs, cell, control, setting), gain(runs, cell, guided, setting)
        if x is not None and y is not None:
            found.append(Point(cell[0], cell[1], x, y))
    return found


def reward_and_risk(runs: Sequence[Run], setting: Setting, risk: str = RISK) -> list[Point]:
    """Returns every policy's reward (x) and risk (y), adapter by adapter (Figure 4).

    Reward is the mean gain over the other tasks, risk the loss in the task named, zero where there is none. A second
    score of the task at risk, such as "IFEval (instructions)", counts as neither.
    """
    found = []
    for name, group in groupby(cells(runs), key=lambda cell: cell[0]):
        tasks = [task for _, task in group]
        for policy in edits(runs):
            gains = {task: gain(runs, (name, task), policy, setting) for task in tasks}
            known = {task: value for task, value in gains.items() if value is not None}
            others = [value for task, value in known.items() if not task.startswith(risk)]
            at_risk = known.get(risk)
            if others and at_risk is not None and len(known) == len(gains):
                found.append(Point(name, policy, round(statistics.fmean(others), EXACT), max(0.0, -at_risk)))
    return found


@dataclass(frozen=True)
class Noise:
    """Scores of the unedited adapter in one cell, scored again and again: the same weights each time."""

    cell: tuple[str, str]
    times: int
    low: float
    high: float
    mean: float
    deviation: float
    """Standard deviation of the scorings (n - 1)."""


def noise(runs: Sequence[Run]) -> list[Noise]:
    """Returns the spread of the unedited adapter's scores in every cell in which it was scored more than once."""
    found = []
    for name, task in cells(runs):
        values = [
            run.scores[task].value
            for run in runs
            if run.name == name and run.policy == UNEDITED and task in run.scores
        ]
        if len(values) > 1:
            spread = statistics.stdev(values)
            found.append(Noise((name, task), len(values), min(values), max(values), statistics.fmean(values), spread))
    return found
