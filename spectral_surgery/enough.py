"""When a measurement has enough examples: its standard errors decide what a policy needs.

A measurement is looked at after fixed, doubling numbers of examples. The error rate is split evenly over the looks
that there can be, and at each look by Bonferroni over all comparisons, so that with probability ``1 - rate`` nothing
that was taken as decided at any look is wrong (as far as Student's t holds for means of so many examples).

``ranking``: policies by magnitude amplify each module's most sensitive components and suppress its least sensitive. A
component of these two groups is decided when its mean ``|g_k|`` is surely above, or below, the module's mean over
components: the paired difference per example is compared with its own standard error.

``signs``: policies by direction move a gate by the size of the signed mean. A sign is decided when the mean
``dL/d alpha_k`` is surely not zero, and counts by the size of that mean, since small ones move nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.significance import ERROR_RATE, student_limit

Needs = Literal["ranking", "signs"]

FIRST = 32
"""Examples at the first look."""
MOST = 1024
"""Examples at the last."""
ENOUGH = 0.9
"""Share of what a policy needs that must be decided."""
GROUP = 0.2
"""Share of a module's components in each of the two groups, as the policies have it by default."""


@dataclass(frozen=True)
class Look:
    """What one look found."""

    examples: int
    decided: float
    """Share of what is needed, in [0, 1]."""


def looks(most: int) -> list[int]:
    """Returns the numbers of examples at which a measurement is looked at, the last of them all that there are."""
    counts = [FIRST << i for i in range(20)]
    return [*(count for count in counts if count < most), most]


def until_sure(
    measure: Callable[[int, int], Measurement], most: int, needs: Needs = "ranking", rate: float = ERROR_RATE
) -> tuple[Measurement, list[Look]]:
    """Returns the measurement of as many examples as it takes, and what each look found.

    Args:
        measure: (first, last + 1) -> the measurement of these examples.
        most: Examples that there are.
        needs: What has to be decided.
        rate: Error rate over all looks, in (0, 1).
    """
    counts = looks(most)
    whole, found = measure(0, counts[0]), []
    for number, count in enumerate(counts):
        if number:
            whole = joined(whole, measure(counts[number - 1], count))
        found.append(Look(count, decided(whole, needs, rate / len(counts))))
        if found[-1].decided >= ENOUGH:
            break
    return whole, found


def decided(measurement: Measurement, needs: Needs, rate: float) -> float:
    """Returns which share of what is needed the standard errors decide, in [0, 1]; 1 where nothing is needed.

    Args:
        measurement: With examples.
        needs: What has to be decided.
        rate: Error rate over all components of all modules, in (0, 1).
    """
    components = sum(int(module.alive.sum()) for module in measurement.modules.values())
    limit = student_limit(rate / max(components, 1), measurement.examples - 1)
    share = _ranked if needs == "ranking" else _signed
    parts = [share(module, limit) for module in measurement.modules.values()]
    whole = sum(weight.sum() for weight, _ in parts)
    return float(sum((weight * sure).sum() for weight, sure in parts) / whole) if whole else 1.0


def _ranked(module: ModuleMeasurement, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns which components are in the two groups, and which are surely on their side of the mean."""
    size = np.abs(module.sensitivity[:, module.alive])
    r = size.shape[1]
    if r < 2:
        return np.zeros(r), np.zeros(r, dtype=bool)
    apart = size - size.mean(1, keepdims=True)
    order = np.argsort(-size.mean(0), kind="stable")
    core, noise = max(round(GROUP * r), 1), round(GROUP * r)
    side = np.zeros(r)
    side[order[r - noise :]] = -1
    side[order[:core]] = 1
    return np.abs(side), side * apart.mean(0) > limit * _errors(apart)


def _signed(module: ModuleMeasurement, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the size of every mean, and which are surely not zero."""
    by_gate = module.share(module.gate_gradient)[:, module.alive]
    return np.abs(by_gate.mean(0)), np.abs(by_gate.mean(0)) > limit * _errors(by_gate)


def _errors(values: np.ndarray) -> np.ndarray:
    """Returns the standard error of every column's mean; infinite with fewer than two rows."""
    if len(values) < 2:
        return np.full(values.shape[1], np.inf)
    return values.std(0, ddof=1) / np.sqrt(len(values))


def in_words(found: list[Look], needs: Needs) -> str:
    """Returns a sentence on how many examples it took."""
    what = "which components are most and least sensitive" if needs == "ranking" else "the signs that matter"
    shares = ", ".join(f"{look.decided:.0%} after {look.examples}" for look in found)
    end = "that is enough" if found[-1].decided >= ENOUGH else f"no more rows; {ENOUGH:.0%} was wanted"
    return f"Decided of {what}: {shares}; {end}."


def joined(first: Measurement, second: Measurement) -> Measurement:
    """Returns two measurements of the same modules on different examples as one."""
    modules = {
        path: replace(
            module,
            gate_gradient=np.concatenate([module.gate_gradient, second.modules[path].gate_gradient]),
            output_energy=np.concatenate([module.output_energy, second.modules[path].output_energy]),
        )
        for path, module in first.modules.items()
    }
    losses = np.concatenate([first.losses, second.losses])
    return Measurement(modules, (*first.digests, *second.digests), losses, first.about)
