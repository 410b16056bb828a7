"""What one pass over the measuring rows says about every component: a Measurement, and its aggregates.

Per module and example the pass gives the derivative of the example's loss by each gate, ``dL_i / d alpha_k``, at
``alpha = 1``. Since ``S'_k = alpha_k S_k``, this is ``S_k g_k`` with the sensitivity ``g_k = u_k^T (dL/d update) v_k =
dL/dS_k`` (Eq. 4, arXiv 2603.03995). Both views are kept by keeping the first: every aggregate and every policy is
computed from one Measurement, without a model.

The paper's aggregate is the mean over examples of ``|g_k|``; the authors' code takes the absolute value of a sum over
batches. They order components differently, and more data does not reconcile them; policies say which they use.

Components that cannot be told apart as stored (``ties``) share the mean of their derivatives, and components with a
zero singular value are not alive: they have no direction, no sensitivity, and a gate of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from spectral_surgery.errors import MeasurementError, combine

DEAD_BELOW = 1e-9
"""Singular values under this share of the module's largest are zero in exact arithmetic: rank that is not used."""


@dataclass(frozen=True)
class ModuleMeasurement:
    """One module's spectrum and its per-example response; ``examples`` may be zero (spectrum only)."""

    S: Float[np.ndarray, " r"]
    """Singular values of the unscaled update, descending."""
    ties: Int[np.ndarray, " r"]
    """Group number of each component, non-decreasing; members of a group share one gate."""
    gate_gradient: Float[np.ndarray, "examples r"]
    """``dL_i / d alpha_k`` at alpha = 1, nats per unit of gate: positive where the component hurts the example."""
    output_energy: Float[np.ndarray, "examples r"]
    """Mean over the example's tokens of the squared norm of the component's scaled output."""

    @cached_property
    def alive(self) -> Bool[np.ndarray, " r"]:
        """Which components have a singular value to edit."""
        return DEAD_BELOW * max(self.S.max(initial=0.0), np.finfo(np.float64).tiny) < self.S

    @cached_property
    def sensitivity(self) -> Float[np.ndarray, "examples r"]:
        """``g_k = dL_i / dS_k`` per example, nats per unit of singular value; tied components share theirs."""
        return np.divide(
            self.share(self.gate_gradient),
            self.share(self.S),
            out=np.zeros_like(self.gate_gradient, dtype=np.float64),
            where=self.alive,
        )

    @property
    def mean(self) -> Float[np.ndarray, " r"]:
        """Mean over examples of the signed sensitivity."""
        return self.sensitivity.mean(0)

    @property
    def mean_abs(self) -> Float[np.ndarray, " r"]:
        """Mean over examples of ``|g_k|``, the paper's magnitude."""
        return np.abs(self.sensitivity).mean(0)

    @property
    def standard_error(self) -> Float[np.ndarray, " r"]:
        """Standard error of :attr:`mean` over examples; infinite with fewer than two."""
        n = len(self.sensitivity)
        if n < 2:
            return np.full_like(self.S, np.inf)
        return self.sensitivity.std(0, ddof=1) / np.sqrt(n)

    @property
    def energy(self) -> Float[np.ndarray, " r"]:
        """Mean over examples of each component's output energy."""
        return self.output_energy.mean(0)

    def share(self, values: Float[np.ndarray, "... r"]) -> Float[np.ndarray, "... r"]:
        """Returns ``values`` with each tied group's members replaced by their mean."""
        if len(self.ties) == 0 or self.ties[-1] == len(self.ties) - 1:
            return values
        member = self.ties == np.arange(self.ties[-1] + 1)[:, None]
        return ((values @ member.T) / member.sum(1))[..., self.ties]

    def living(self) -> ModuleMeasurement:
        """Returns this module with its dead components left out."""
        if self.alive.all():
            return self
        kept = self.alive
        return ModuleMeasurement(
            S=self.S[kept],
            ties=np.unique(self.ties[kept], return_inverse=True)[1].astype(np.int64),
            gate_gradient=self.gate_gradient[:, kept],
            output_energy=self.output_energy[:, kept],
        )


@dataclass(frozen=True)
class Measurement:
    """Every selected module's :class:`ModuleMeasurement`, on the same examples in the same order.

    Raises:
        MeasurementError: If a value is not finite or a module has another number of examples or components.
    """

    modules: Mapping[str, ModuleMeasurement]
    """By module path, in the adapter's order."""
    digests: tuple[str, ...] = ()
    """Content hash of each example."""
    losses: Float[np.ndarray, " examples"] = field(default_factory=lambda: np.zeros(0))
    """Loss of the unedited adapter on each example, nats per answer token."""
    about: Mapping[str, str] = field(default_factory=dict)
    """Where this comes from: hashes of adapter and data, base model, dtype, versions."""

    def __post_init__(self) -> None:
        combine(list(self._faults()), MeasurementError)

    @property
    def examples(self) -> int:
        """Number of examples; zero where only spectra are known."""
        return len(self.digests)

    def only(self, paths: Iterable[str]) -> Measurement:
        """Returns the measurement of these modules.

        Raises:
            MeasurementError: If one of them was not measured.
        """
        paths = list(paths)
        missing = [path for path in paths if path not in self.modules]
        if missing:
            raise MeasurementError(
                f"{len(missing)} of {len(paths)} selected modules were not measured, the first is {missing[0]}. "
                f"Measure again with the same --modules and --layers, or select what was measured "
                f"({len(self.modules)} modules)."
            )
        chosen = {path: self.modules[path] for path in paths}
        return Measurement(chosen, self.digests, self.losses, self.about)

    def taken(self, order: Int[np.ndarray, " taken"]) -> Measurement:
        """Returns the measurement of the examples at these positions."""
        modules = {
            path: replace(module, gate_gradient=module.gate_gradient[order], output_energy=module.output_energy[order])
            for path, module in self.modules.items()
        }
        return Measurement(modules, tuple(self.digests[i] for i in order), self.losses[order], self.about)

    def _faults(self) -> Iterable[str]:
        if len(self.losses) != self.examples:
            yield f"The measurement has {self.examples} example hashes and {len(self.losses)} losses."
        for path, module in self.modules.items():
            shape = (self.examples, len(module.S))
            for name in ("gate_gradient", "output_energy"):
                value = getattr(module, name)
                if value.shape != shape:
                    yield f"{path}: {name} has shape {value.shape}, expected {shape}."
                elif not np.isfinite(value).all():
                    bad = np.flatnonzero(~np.isfinite(value).all(1))
                    yield (
                        f"{path}: {name} is not finite on {len(bad)} of {self.examples} examples (the first is "
                        f"number {bad[0]}). Measure in bfloat16 or float32, or drop those rows."
                    )
            if not np.isfinite(module.S).all():
                yield f"{path}: a singular value is not finite."
