"""One finding, and the severities there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that an inspection found."""

    code: str
    """Stable name of the kind of finding."""
    severity: Severity
    adapter: str
    what: str
    """One sentence."""
    evidence: str
    """The figures behind it."""
    advice: str
    """What to do."""
    modules: tuple[str, ...] = ()
    """Module paths it is about."""


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
