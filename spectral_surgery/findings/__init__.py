"""What an inspection says in words: a short list, most serious first, each with its evidence and what to do.

Codes are stable, so that a script may rely on them. Errors mean the adapter cannot work as stored; warnings that
something is likely wrong or wasteful; notes are facts worth knowing. Findings of geometry hold every figure against
what the largest of all figures of a random adapter stays under in 99 of 100 inspections, so an adapter of random
directions gives such a finding in one of a hundred at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from spectral_surgery.errors import SpectralSurgeryError
from spectral_surgery.findings import health, relations
from spectral_surgery.findings.finding import SEVERITIES, Finding, Severity, plural
from spectral_surgery.inspection import Inspection

__all__ = ["RULES", "SEVERITIES", "Finding", "Severity", "Unhealthy", "check", "findings"]

RULES: Sequence[Callable[[Inspection], Iterator[Finding]]] = (
    health.non_finite,
    health.zero_update,
    health.dead_modules,
    health.outlier_modules,
    health.spikes,
    health.duplicate_components,
    health.cancellation,
    relations.against_the_base,
    relations.other_adapters,
    health.unused_rank,
    health.tied_spectrum,
    relations.sensitivities,
    relations.shared_directions,
    relations.synergies,
)


class Unhealthy(SpectralSurgeryError):
    """An inspection found something at or above the severity that the user named."""

    exit_status = 3


def findings(inspection: Inspection) -> list[Finding]:
    """Returns everything worth saying about an adapter, most serious first."""
    found = [finding for rule in RULES for finding in rule(inspection)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def check(found: Iterable[Finding], fail_on: Severity) -> None:
    """Raises when a finding is as serious as ``fail_on`` or more.

    Raises:
        Unhealthy: Naming how many there are and their codes; exit status 3.
    """
    worst = SEVERITIES[: SEVERITIES.index(fail_on) + 1]
    bad = [finding for finding in found if finding.severity in worst]
    if bad:
        codes = ", ".join(dict.fromkeys(finding.code for finding in bad))
        raise Unhealthy(f"{plural(len(bad), 'finding')} at or above {fail_on}: {codes}.")
