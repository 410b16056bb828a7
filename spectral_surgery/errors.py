"""Errors that a user can meet, and the exit status each of them gives the command line.

Every expected failure derives from :class:`SpectralSurgeryError`. A message says which object is meant, what was
found against what was expected, and what to do about it; the command line prints the message alone.
"""

from __future__ import annotations


class SpectralSurgeryError(Exception):
    """Base class of every expected failure. ``exit_status`` is what the command line returns."""

    exit_status = 1


class InputError(SpectralSurgeryError, ValueError):
    """Bad input, found before any expensive work: a path, a file's content, an option, a data set."""

    exit_status = 2


class AdapterError(InputError):
    """An adapter folder that cannot be read, is inconsistent, or is of a kind that cannot be edited exactly."""


class BaseModelError(InputError):
    """A base model that cannot be found, or whose modules do not fit the adapter."""


class DataError(InputError):
    """Rows that cannot be turned into prompts and answers."""


class PolicyError(InputError):
    """An unknown policy, a wrong hyperparameter, or a policy that lacks the measurement it needs."""


class SelectionError(InputError):
    """A module or layer selection that names nothing in this adapter."""


class OutputError(InputError):
    """An output folder that must not be written to."""


class MeasurementError(InputError):
    """A sensitivity file that cannot be read or was measured on something else."""


class RunError(SpectralSurgeryError):
    """A failure midway: a non-finite loss, a full disk, a written folder that does not verify."""


def combine(faults: list[str], error: type[SpectralSurgeryError] = InputError) -> None:
    """Raises one error that names every fault, or returns when there is none.

    Args:
        faults: One sentence a fault, in the order in which they were found.
        error: Class of the error to raise.

    Raises:
        SpectralSurgeryError: Of class ``error``, if ``faults`` is not empty.
    """
    if len(faults) == 1:
        raise error(faults[0])
    if faults:
        raise error("\n".join([f"{len(faults)} things are wrong:", *(f"  - {fault}" for fault in faults)]))
