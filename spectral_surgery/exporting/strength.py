"""Every update, or those of named blocks, times a number.

One stored factor of each module is multiplied and rounded once: no decomposition, same rank, same layout. A bias of B,
which has the same scale, goes with it; modules trained in full stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from spectral_surgery.adapter import Adapter
from spectral_surgery.errors import InputError, RunError
from spectral_surgery.exporting.destination import Blocks
from spectral_surgery.selection import kind
from spectral_surgery.spectrum import LowRank, exact, singular_values
from spectral_surgery.surgery import EditReport, ModuleEdit, distance

BLOCK = ("", "_block", "_blocks")
"""What a block's name may leave out at its end."""


def scaled(adapter: Adapter, strengths: Mapping[str, float]) -> Adapter:
    """Returns the adapter with modules' updates times a number each; what is not named is untouched.

    Args:
        adapter: The adapter.
        strengths: By module path; finite, also negative or zero.

    Raises:
        RunError: If a factor overflows the stored dtype.
    """
    updates, report, biases = {}, {}, {}
    for path, strength in strengths.items():
        if strength != 1:
            updates[path], report[path] = _scaled(path, adapter.stored[path].update, strength)
            for name in adapter.stored[path].claims:
                if name.endswith(".bias"):
                    biases[name] = (strength * exact(adapter.tensors[name])).to(adapter.tensors[name].dtype)
    edited = adapter.with_updates(updates, EditReport(report))
    return replace(edited, tensors={**edited.tensors, **biases})


def _scaled(path: str, update: LowRank, strength: float) -> tuple[LowRank, ModuleEdit]:
    wanted = update.with_stored(strength * exact(update.stored))
    factor = wanted.stored.to(update.stored.dtype)
    if not factor.isfinite().all():
        raise RunError(f"{path}: {strength:g} times the factor overflows {factor.dtype}. Choose a lower strength.")
    result = update.with_stored(factor)
    S = singular_values(update).numpy()
    gates = np.full(len(S), strength)
    return result, ModuleEdit(S, gates, update.scale, abs(1 - strength), distance(result, wanted))


def block_strengths(paths: Iterable[str], blocks: Blocks) -> dict[str, float]:
    """Returns the strength of every module path that a block's name matches.

    A name stands for consecutive parts of a path, and the ending ``_block`` or ``_blocks`` of its parts may be left
    out: ``input.4`` and ``input_blocks.4`` name one block, ``output`` all output blocks, ``to_q`` every module of that
    name. With ``*`` or ``?`` it is a pattern over the whole path. Of several names that match, the last counts.

    Raises:
        InputError: If a name matches nothing; the message lists the blocks that there are.
    """
    paths = list(paths)
    found: dict[str, float] = {}
    for name, strength in blocks.strengths.items():
        inside = [path for path in paths if _matches(name, path)]
        if not inside:
            raise InputError(
                f"--to blocks: no module of this adapter lies in {name!r}. It has: {', '.join(_names(paths))}."
            )
        found |= dict.fromkeys(inside, strength)
    return found


def _matches(name: str, path: str) -> bool:
    if "*" in name or "?" in name:
        return fnmatchcase(path, name)
    wanted, parts = name.split("."), path.split(".")
    return any(
        all(part in [word + end for end in BLOCK] for word, part in zip(wanted, parts[start:], strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def _names(paths: list[str]) -> list[str]:
    """The blocks that paths lie in, up to their first number, with that number's range; then the kinds."""
    numbers: dict[str, list[int]] = {}
    for path in paths:
        parts = path.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if place:
            numbers.setdefault(parts[place - 1], []).append(int(parts[place]))
    ranges = {name: sorted({min(found), max(found)}) for name, found in numbers.items()}
    blocks = [" to ".join(f"{name}.{number}" for number in ends) for name, ends in ranges.items()]
    return [*blocks, *sorted({kind(path) for path in paths})]
