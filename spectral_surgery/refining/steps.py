"""Gates from sensitivities alone, in one step: no training, no model, no search.

Two measurements are weighed against each other: of the task's loss, and of what is to be kept. Each is divided by its
own scale, so that one unit is everything the adapter learned and everything it forgot; ``keep_weight`` is the exchange
rate between the two.

- :func:`only_sure` moves only components whose mean derivative differs significantly from zero.
- :func:`one_step` is one step of natural gradient on the log gates, ``-(F + mu I)^-1 g``, with the empirical Fisher
  information F of the per-example derivatives (Amari, 1998), solved in the space of the examples.

Both give a direction; :func:`along` walks it to a wanted edit size, within bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from spectral_surgery.measurement import Measurement
from spectral_surgery.policies import Gates

LOWEST, HIGHEST = 0.05, 2.0
"""A gate stays within these."""


@dataclass(frozen=True)
class Pull:
    """What task and keep rows say about every log gate."""

    task: Measurement
    """Of the task's loss on the measuring rows."""
    keep: Measurement | None
    """Of the divergence from the base (or the loss) on the keep rows; None where nothing is to be kept."""
    task_scale: float
    """What the adapter learned: loss of the base less loss of the adapter, nats per token."""
    keep_scale: float
    """What the adapter forgot, in the keep measurement's unit."""
    keep_weight: float = 1.0
    """How many times all that was learned is worth all that was forgotten."""
    signed: bool = True
    """Whether the task's mean derivative counts; on rows of the training its sign may be wrong, its size is not."""

    @cached_property
    def paths(self) -> list[str]:
        """Modules, in the order of the columns."""
        return list(self.task.modules)

    @cached_property
    def parts(self) -> list[Float[np.ndarray, "examples p"]]:
        """Per-example derivatives by every log gate, scaled: of the task, and of what is to be kept."""
        found = [_columns(self.task, self.paths) / self.task_scale]
        if self.keep is not None:
            found.append(_columns(self.keep, self.paths) * (self.keep_weight / self.keep_scale))
        return found

    @property
    def mean(self) -> Float[np.ndarray, " p"]:
        """Derivative of the weighed sum."""
        return np.sum([np.zeros(self.parts[0].shape[1]), *(part.mean(0) for part in self._directed)], axis=0)

    @property
    def standard_error(self) -> Float[np.ndarray, " p"]:
        """Standard error of :attr:`mean` over examples."""
        squares = [part.var(0, ddof=1) / len(part) for part in self._directed]
        return np.sqrt(np.sum([np.zeros(self.parts[0].shape[1]), *squares], axis=0))

    @property
    def _directed(self) -> list[Float[np.ndarray, "examples p"]]:
        return self.parts if self.signed else self.parts[1:]

    def by_module(self, values: Float[np.ndarray, " p"]) -> dict[str, np.ndarray]:
        """Returns columns as one array a module; dead components get zero, tied ones their mean."""
        sizes = [len(self.task.modules[path].S) for path in self.paths]
        pieces = np.split(values, np.cumsum(sizes)[:-1])
        modules = self.task.modules
        return {
            path: modules[path].share(np.where(modules[path].alive, piece, 0.0))
            for path, piece in zip(self.paths, pieces, strict=True)
        }


def _columns(measured: Measurement, paths: list[str]) -> Float[np.ndarray, "examples p"]:
    return np.concatenate([measured.modules[path].share(measured.modules[path].gate_gradient) for path in paths], 1)


def only_sure(pull: Pull, *, level: float = 0.05) -> dict[str, np.ndarray]:
    """Returns the direction ``-t`` of components that are significant, zero elsewhere.

    Args:
        pull: What the rows say.
        level: Expected share of false ones among those that move (Benjamini and Hochberg, 1995).
    """
    from scipy.stats import false_discovery_control, t

    error = pull.standard_error
    value = np.divide(pull.mean, error, out=np.zeros_like(error), where=error > 0)
    freedom = min(len(part) for part in pull.parts) - 1
    p = np.minimum(1.0, 2 * t.sf(np.abs(value), freedom))
    return pull.by_module(np.where(false_discovery_control(p) <= level, -value, 0.0))


def one_step(pull: Pull, *, damping: float = 0.1) -> dict[str, np.ndarray]:
    """Returns the direction ``-(F + mu I)^-1 g``, with ``F = sum over parts of G^T G / n``.

    By the matrix inversion lemma only a system of the size of the number of examples is solved.

    Args:
        pull: What the rows say.
        damping: ``mu`` as a multiple of the mean eigenvalue of F.
    """
    G = np.concatenate([part / np.sqrt(len(part)) for part in pull.parts])
    mu = damping * (G**2).sum() / G.shape[1]
    if mu == 0:
        return pull.by_module(np.zeros(G.shape[1]))
    g = pull.mean
    inner = np.linalg.solve(mu * np.eye(len(G)) + G @ G.T, G @ g)
    return pull.by_module(-(g - G.T @ inner) / mu)


def along(direction: Mapping[str, np.ndarray], measured: Measurement, size: float) -> Gates:
    """Returns ``exp(t direction)`` within bounds, with t such that the edit has this size, or is the largest possible.

    Args:
        direction: Change of log gates by module.
        measured: For the singular values.
        size: Root of the summed squared changes of the singular values over that of the singular values.
    """
    top = max((np.abs(values).max() for values in direction.values()), default=0.0)
    if top == 0:
        return {path: np.ones_like(values) for path, values in direction.items()}
    low, high = 0.0, np.log(HIGHEST / LOWEST) * 100 / top
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _size(_bounded(direction, middle), measured) < size else (low, middle)
    return _bounded(direction, high)


def scaled(gates: Gates, power: float) -> Gates:
    """Returns the gates with their logarithms multiplied, within bounds: less or more of the same edit."""
    return {path: np.clip(alpha**power, LOWEST, HIGHEST) for path, alpha in gates.items()}


def _bounded(direction: Mapping[str, np.ndarray], t: float) -> dict[str, np.ndarray]:
    low, high = np.log(LOWEST), np.log(HIGHEST)
    return {path: np.exp(np.clip(t * values, low, high)) for path, values in direction.items()}


def _size(gates: Gates, measured: Measurement) -> float:
    S = np.concatenate([measured.modules[path].S for path in gates])
    alpha = np.concatenate(list(gates.values()))
    return float(np.linalg.norm((alpha - 1) * S) / np.linalg.norm(S))
