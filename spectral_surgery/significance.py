"""Which components a measurement shows to help or to harm, and how far two readings of it agree.

The sensitivity ``g_k = dL/dS_k`` is positive where growing component k raises the loss. Over examples it has a mean
and a standard error, and only where the mean stands out of its noise is the sign known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from spectral_surgery.measurement import Measurement, ModuleMeasurement

ERROR_RATE = 0.05
"""Probability that any component of an adapter is named although its true mean is zero."""
SMALLEST_SAMPLE = 8
"""With fewer examples no component is named."""


@dataclass(frozen=True)
class Response:
    """How the loss answers to one module's components."""

    mean: Float[np.ndarray, " r"]
    """Signed mean of g_k, nats per unit of singular value."""
    mean_abs: Float[np.ndarray, " r"]
    """Mean of |g_k|, the paper's magnitude."""
    standard_error: Float[np.ndarray, " r"]
    """Of the signed mean."""
    sign: Int[np.ndarray, " r"]
    """+1 significantly harmful (growing it raises the loss), -1 significantly helpful, 0 neutral."""
    agreement: float
    """Spearman correlation over components of |mean g| and mean |g|; NaN with fewer than three components."""


def respond(measurement: Measurement, rate: float = ERROR_RATE) -> dict[str, Response]:
    """Returns every module's response.

    A component is named when its mean is more than z standard errors from zero, with z such that by Bonferroni's bound
    an adapter without any real effect has a named component with probability ``rate``.

    Args:
        measurement: With examples; without them the result is empty.
        rate: Family-wise error rate over all components, in (0, 1).
    """
    components = sum(int(module.alive.sum()) for module in measurement.modules.values())
    if not measurement.examples or not components:
        return {}
    z = student_limit(rate / components, measurement.examples - 1)
    return {path: _respond(module, z) for path, module in measurement.modules.items()}


def _respond(module: ModuleMeasurement, z: float) -> Response:
    error = module.standard_error
    named = module.alive & (np.abs(module.mean) > z * error)
    return Response(
        mean=module.mean,
        mean_abs=module.mean_abs,
        standard_error=error,
        sign=np.where(named, np.sign(module.mean), 0).astype(np.int64),
        agreement=spearman(np.abs(module.mean)[module.alive], module.mean_abs[module.alive]),
    )


def student_limit(rate: float, freedom: int) -> float:
    """Returns the two-sided limit of Student's t; infinite with fewer than :data:`SMALLEST_SAMPLE` examples.

    Args:
        rate: Two-sided error rate of one comparison.
        freedom: Degrees of freedom, examples minus one.
    """
    from scipy.special import stdtrit

    return math.inf if freedom < SMALLEST_SAMPLE - 1 else float(stdtrit(freedom, 1 - rate / 2))


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Returns the rank correlation of two vectors, in [-1, 1]; NaN for fewer than three values."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if len(x) >= 3 else math.nan
