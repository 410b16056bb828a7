"""An adapter, a policy and what was measured in; the edited adapter and a report out."""

from __future__ import annotations

from spectral_surgery.adapter import Adapter
from spectral_surgery.constraints import Constraint
from spectral_surgery.errors import MeasurementError, PolicyError
from spectral_surgery.measurement import Measurement
from spectral_surgery.policies import Gates, Policy, gates, row
from spectral_surgery.selection import Selection, select
from spectral_surgery.surgery import EditReport, operate


def edit(
    adapter: Adapter,
    policy: Policy,
    sensitivity: Measurement | None = None,
    *,
    constraint: Constraint | None = None,
    selection: Selection | None = None,
    seed: int = 0,
) -> tuple[Adapter, EditReport]:
    """Returns the edited adapter and what was done to it. Nothing is written; see :meth:`Adapter.save`.

    Args:
        adapter: The unedited adapter.
        policy: What to do, such as ``policies.SmoothAbs()``.
        sensitivity: What :func:`spectral_surgery.measure` returned for this adapter; not needed by every policy.
        constraint: Clamp, energy and cap; by default the policy's own.
        selection: Modules and layers to edit; ``auto`` means those measured where there is a measurement.
        seed: Seed of random policies.

    Raises:
        PolicyError: If the policy needs sensitivities and there are none.
        MeasurementError: If they were measured on another adapter or other modules.
        SelectionError: If the selection names nothing.
    """
    found = gates_for(adapter, policy, sensitivity, constraint=constraint, selection=selection, seed=seed)
    updates, report = operate(adapter.updates, found)
    return adapter.with_updates(updates, report), report


def gates_for(
    adapter: Adapter,
    policy: Policy,
    sensitivity: Measurement | None = None,
    *,
    constraint: Constraint | None = None,
    selection: Selection | None = None,
    seed: int = 0,
) -> Gates:
    """Returns the gates that :func:`edit` would write; arguments and errors as there."""
    if sensitivity is None and row(policy).needs == "sensitivity":
        raise PolicyError(
            f"Policy {row(policy).name} needs sensitivities. Pass data to measure on, or a sensitivity file."
        )
    selection = selection or Selection()
    if sensitivity is None:
        measured = adapter.spectrum_only(adapter.select(selection))
    else:
        check_measured_on(adapter, sensitivity)
        measured = sensitivity.only(_measured_paths(adapter, sensitivity, selection))
    return gates(policy, measured, constraint, seed=seed)


def _measured_paths(adapter: Adapter, sensitivity: Measurement, selection: Selection) -> list[str]:
    if selection.modules == ("auto",):
        return select(sensitivity.modules, Selection(("all",), selection.layers))
    return select(adapter.updates, selection)


def check_measured_on(adapter: Adapter, sensitivity: Measurement) -> None:
    """Checks that a measurement was made on this very adapter.

    Raises:
        MeasurementError: If the adapter's hash is another than the one measured.
    """
    measured = sensitivity.about.get("adapter_sha256")
    if measured != adapter.digest:
        raise MeasurementError(
            f"The sensitivities were measured on an adapter with hash {str(measured)[:12]}, and this one has "
            f"{adapter.digest[:12]}. Measure this adapter."
        )
