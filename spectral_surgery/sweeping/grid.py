"""A study spelled out: every run that it asks for, each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectral_surgery import policies
from spectral_surgery.errors import InputError
from spectral_surgery.results.runs import BASE, UNEDITED
from spectral_surgery.sweeping.study import Study, StudyAdapter, constraint_of

SEEDED = ("random", "random_index")
"""Policies that draw at random."""


@dataclass(frozen=True)
class Item:
    """One run: an adapter, edited in one way, scored in one suite."""

    adapter: StudyAdapter
    suite: str
    policy: str
    rows: int | None = None
    """Measuring rows; None where none are needed."""
    energy: str | None = None
    modules: str | None = None
    seed: int = 0

    @property
    def edited(self) -> bool:
        """Whether the adapter is edited at all."""
        return self.policy not in (BASE, UNEDITED)


def spell_out(study: Study) -> list[Item]:
    """Returns every run of a study: for each adapter and suite base and unedited first, then all edits.

    What does not matter to a policy is not varied: measuring rows where it needs none, and seeds where nothing is
    drawn, neither rows nor components.

    Raises:
        InputError: If there is no edited run, or measuring rows are needed and not given.
    """
    found: dict[Item, None] = {}
    for adapter in study.adapters:
        for suite in adapter.suites:
            found |= dict.fromkeys([Item(adapter, suite, BASE), Item(adapter, suite, UNEDITED)])
            found |= dict.fromkeys(_edits(study, adapter, suite))
    items = list(found)
    if not any(item.edited for item in items):
        raise InputError("The grid is empty: there is nothing to run. Give at least one adapter, suite and policy.")
    if lacking := sorted({item.adapter.name for item in items if item.rows and not item.adapter.data}):
        raise InputError(f"{', '.join(lacking)}: no measuring rows are given. Set measuring_rows to a file or Hub id.")
    return items


def _edits(study: Study, adapter: StudyAdapter, suite: str) -> list[Item]:
    found = []
    for policy in study.policies:
        row = policies.row(policies.parse(policy))
        for energy in study.energy:
            kept = constraint_of(policy, energy).energy
            measured = row.needs == "sensitivity" or kept == "functional"
            for modules in study.modules:
                for rows in study.rows if measured else (None,):
                    seeds = study.seeds if measured or row.name in SEEDED else study.seeds[:1]
                    found += [Item(adapter, suite, policy, rows, kept, modules, seed) for seed in seeds]
    return found


def counted(items: Sequence[Item]) -> str:
    """Returns in words how many runs and measurements these are."""
    edited = [item for item in items if item.edited]
    measured = {(item.adapter.path, item.adapter.data, item.seed) for item in edited if item.rows is not None}
    plain = len(items) - len(edited)
    return (
        f"{len(items)} runs: {len(edited)} of edited adapters, {plain} of unedited ones and their base; "
        f"{len(measured)} measurements" + (f", each of {most} rows at most." if (most := _most(items)) else ".")
    )


def _most(items: Sequence[Item]) -> int:
    return max(item.rows or 0 for item in items)
