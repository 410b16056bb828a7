"""What an adapter is exported to: ``--to`` as a value.

Light: imports neither torch nor a model library, so the command line reads it before anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from spectral_surgery.errors import InputError

SPELLINGS = "portable, merged, rank=R, energy=E, ratio=Q, scale=X or blocks=NAME=X,NAME=X"


@dataclass(frozen=True)
class Portable:
    """The layout that every server reads alike: one rank, no patterns, the scale inside of B."""


@dataclass(frozen=True)
class Merged:
    """The base model with the adapter merged into its weights."""


@dataclass(frozen=True)
class Resize:
    """Fewer components: the best update of a lower rank."""

    rule: Literal["rank", "energy", "ratio"]
    """rank: this many; energy: as many as hold this share of sum S^2; ratio: those above the largest S over this."""
    value: float


@dataclass(frozen=True)
class Scale:
    """Every module's update times one number."""

    strength: float


@dataclass(frozen=True)
class Blocks:
    """The updates of named blocks times a number each; what no name matches stays as it is."""

    strengths: Mapping[str, float]


Destination = Portable | Merged | Resize | Scale | Blocks


def parse(text: str) -> Destination:
    """Returns what a text such as "portable", "rank=8" or "blocks=input=0.5,middle=1" means.

    Raises:
        InputError: If it means nothing, or the number is out of its range.
    """
    name, equals, value = text.strip().partition("=")
    if name in ("portable", "merged") and not equals:
        return Portable() if name == "portable" else Merged()
    if name == "blocks" and equals:
        return Blocks(_strengths(value))
    if name == "scale" and equals:
        return Scale(_number(text, value))
    if name in ("rank", "energy", "ratio") and equals:
        return _resize(name, text, value)
    raise InputError(f"--to {text} is not known. Choose from {SPELLINGS}.")


def _resize(name: str, text: str, value: str) -> Resize:
    number = _number(text, value)
    if name == "rank":
        if number < 1 or number != int(number):
            raise InputError(f"--to {text}: the rank is {value}, expected a whole number of at least 1.")
        return Resize("rank", number)
    if name == "energy":
        if not 0 < number <= 1:
            raise InputError(f"--to {text}: expected a share of sum S^2 above 0 and up to 1, such as energy=0.95.")
        return Resize("energy", number)
    if number < 1:
        raise InputError(f"--to {text}: expected at least 1; components below the largest over this number go.")
    return Resize("ratio", number)


def _strengths(value: str) -> dict[str, float]:
    strengths: dict[str, float] = {}
    for part in value.split(","):
        name, _, number = part.strip().rpartition("=")
        if not name:
            raise InputError(
                f"--to blocks: {part.strip()!r} cannot be read. Write NAME=STRENGTH, such as input.4=0.5."
            )
        strengths[name.strip()] = _number(f"blocks={part}", number)
    return strengths


def _number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError as error:
        raise InputError(f"--to {text}: {value!r} is not a number.") from error
    if not math.isfinite(number):
        raise InputError(f"--to {text}: {value} is not a finite number.")
    return number
