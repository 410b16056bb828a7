"""Policies that read sensitivities: those of Spectral Surgery (arXiv 2603.03995) and three more of its authors' code.

Within one module, x_k is the magnitude of component k's sensitivity divided by the module's mean magnitude. The
magnitude is the mean over examples of ``|g_k|`` as the paper says, or with ``aggregate=abs_mean`` the absolute mean
``|mean g_k|`` that the authors' code computes; they rank components differently. x only enters through ranks or
affine-invariant expressions, so how it is normalised does not matter.

Deviations from the authors' code, each where it was arbitrary: sorting is stable; a module whose components are all
equally sensitive is not edited by rank (there, the code amplifies and suppresses whatever comes first); the floors of
1e-8 under the normalisation, which damp adapters with small gradients, are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from spectral_surgery.measurement import ModuleMeasurement
from spectral_surgery.policies.registry import check_ranges, register

Aggregate = Literal["mean_abs", "abs_mean"]
Vector = Float[np.ndarray, " r"]

PAPER = "arXiv 2603.03995"


@dataclass(frozen=True)
class _Levels:
    """Three gates and how many components get each."""

    core_fraction: float = 0.2
    """Share of components that is amplified, in [0, 1]."""
    noise_fraction: float = 0.2
    """Share of components that is suppressed, in [0, 1]."""
    min_core: int = 1
    """At least so many are amplified."""
    amplify: float = 1.25
    """Gate of the amplified."""
    suppress: float = 0.8
    """Gate of the suppressed."""
    middle: float = 1.0
    """Gate of the others."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def by_rank(self, order: np.ndarray) -> Vector:
        """Returns ``amplify`` for the first components of an order, ``suppress`` for the last, else ``middle``."""
        r = len(order)
        core = min(r, max(round(r * self.core_fraction), self.min_core))
        noise = max(0, min(round(r * self.noise_fraction), r - core))
        alpha = np.full(r, self.middle)
        alpha[order[:core]] = self.amplify
        alpha[order[r - noise :]] = self.suppress
        return alpha


@register("abs_select", source=f"Sec. 3.3, {PAPER}", needs="sensitivity", energy="nuclear")
@dataclass(frozen=True)
class AbsSelect(_Levels):
    """Amplifies the most sensitive components and suppresses the least sensitive, by magnitude.

    The first ``min(r, max(round(core_fraction r), min_core))`` in descending magnitude get ``amplify``, the last
    ``round(noise_fraction r)`` of the others ``suppress``, the rest ``middle`` (round half to even).
    """

    aggregate: Aggregate = "mean_abs"
    """Over examples: mean of |g| (paper) or |mean of g| (authors' code)."""

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns one of three levels for each component."""
        x = magnitude(module, self.aggregate)
        return np.ones_like(x) if _flat(x) else self.by_rank(np.argsort(-x, kind="stable"))


@register("smooth_abs", source=f"Eq. 6, {PAPER}", needs="sensitivity", energy="nuclear")
@dataclass(frozen=True)
class SmoothAbs:
    """Moves gates smoothly from suppress to amplify along a sigmoid of the magnitude.

    ``alpha_k = suppress + (amplify - suppress) sigmoid((x_k - mu) / tau)`` with tau the temperature times the spread
    between the quantiles ``noise_fraction`` and ``1 - core_fraction``, and mu the center quantile, moved so that a
    component there gets exactly ``middle``.
    """

    core_fraction: float = 0.2
    """The upper quantile of the spread is 1 - core_fraction."""
    noise_fraction: float = 0.2
    """The lower quantile of the spread."""
    amplify: float = 1.25
    """Gate towards which sensitive components go."""
    suppress: float = 0.8
    """Gate towards which insensitive components go."""
    middle: float = 1.0
    """Gate at the center, and of every component where all are equally sensitive."""
    temperature: float = 0.35
    """Width of the sigmoid relative to the spread."""
    center_quantile: float = 0.5
    """Quantile of x at the center."""
    align_middle: bool = True
    """Shift the sigmoid so that the center gets ``middle`` (the code's default; optional in the paper)."""
    aggregate: Aggregate = "mean_abs"
    """Over examples: mean of |g| (paper) or |mean of g| (authors' code)."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns gates between ``suppress`` and ``amplify``."""
        x = magnitude(module, self.aggregate)
        if _flat(x):
            return np.full_like(x, self.middle)
        low, high = self.noise_fraction, 1 - self.core_fraction
        if high <= low:
            low, high = 0.25, 0.75
        tau = _positive(self.temperature * (np.quantile(x, high) - np.quantile(x, low)), x)
        mu = np.quantile(x, self.center_quantile)
        if self.align_middle and self.suppress < self.middle < self.amplify:
            share = (self.middle - self.suppress) / (self.amplify - self.suppress)
            share = np.clip(share, 1e-4, 1 - 1e-4)
            mu = mu - tau * np.log(share / (1 - share))
        return self.suppress + (self.amplify - self.suppress) * sigmoid((x - mu) / tau)


@register("grad_direction", source=f"Eq. 7, {PAPER}", needs="sensitivity", energy="nuclear")
@dataclass(frozen=True)
class GradDirection:
    """Steps down the gradient: shrinks components that raise the loss, grows those that lower it.

    ``alpha_k = exp(-(eta_suppress max(h_k, 0)^positive_power + eta_enhance min(h_k, 0)))`` with h the signed mean
    sensitivity, normalised within the module; symmetric, ``alpha_k = exp(-eta h_k)``. At its defaults this is about
    five times larger an edit than the paper's other policies.
    """

    asymmetric: bool = True
    """Different steps for shrinking and growing (the paper's default)."""
    eta_suppress: float = 2.0
    """Step where the gradient is positive; asymmetric only."""
    eta_enhance: float = 0.2
    """Step where the gradient is negative; asymmetric only."""
    eta: float = 0.2
    """Step of the symmetric form."""
    positive_power: float = 1.0
    """Exponent of the positive part; asymmetric only."""
    normalise: Literal["mean_abs", "l2", "none"] = "mean_abs"
    """Divide the gradient by its mean magnitude over components, by its 2-norm, or by nothing."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns positive gates: below one where the mean gradient is positive."""
        h = module.mean / self._unit(module.mean)
        if not self.asymmetric:
            return np.exp(-self.eta * h)
        shrink = self.eta_suppress * np.maximum(h, 0) ** self.positive_power
        return np.exp(-(shrink + self.eta_enhance * np.minimum(h, 0)))

    def _unit(self, g: Vector) -> float:
        size = {"mean_abs": np.abs(g).mean(), "l2": np.linalg.norm(g), "none": 1.0}[self.normalise]
        return float(size) if size > 0 else 1.0


@register("random_index", source=f"Sec. 3.3, {PAPER}", needs="nothing", energy="nuclear")
@dataclass(frozen=True)
class RandomIndex(_Levels):
    """Gives abs_select's gates to randomly chosen components: the paper's control.

    It has abs_select's multiset of gates and not its edit size; for a control of equal size see ``random``.
    """

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns the three levels on a random order."""
        return self.by_rank(rng.permutation(len(module.S)))


@register("double_smooth", source="authors' code", needs="sensitivity", energy="nuclear")
@dataclass(frozen=True)
class DoubleSmooth:
    """Leaves the middle alone and bends both ends with a sigmoid each.

    ``alpha = middle - (middle - suppress) sigmoid((q_n - x) / tau) + (amplify - middle) sigmoid((x - q_c) / tau)``
    with the quantiles ``q_n`` at ``noise_fraction`` and ``q_c`` at ``1 - core_fraction``; tau is the temperature times
    the range.
    """

    core_fraction: float = 0.2
    """The upper knee is the quantile 1 - core_fraction."""
    noise_fraction: float = 0.2
    """The lower knee is this quantile."""
    amplify: float = 1.25
    """Gate of the most sensitive."""
    suppress: float = 0.8
    """Gate of the least sensitive."""
    middle: float = 1.0
    """Gate between the knees."""
    temperature: float = 0.35
    """Width of both sigmoids relative to the range of x."""
    aggregate: Aggregate = "mean_abs"
    """Over examples: mean of |g| (paper) or |mean of g| (authors' code)."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns gates between ``suppress`` and ``amplify``."""
        x = magnitude(module, self.aggregate)
        if _flat(x):
            return np.full_like(x, self.middle)
        low, high = self.noise_fraction, 1 - self.core_fraction
        if low >= high:
            low, high = 0.45, 0.55
        tau = _positive(self.temperature * np.ptp(x), x)
        up = sigmoid((x - np.quantile(x, high)) / tau)
        down = sigmoid((np.quantile(x, low) - x) / tau)
        return self.middle - (self.middle - self.suppress) * down + (self.amplify - self.middle) * up


@register("z_score", source="authors' code", needs="sensitivity", energy="nuclear")
@dataclass(frozen=True)
class ZScore:
    """Amplifies above and suppresses below thresholds on the standardised magnitude.

    ``alpha = middle + (amplify - middle) sigmoid((z - high) / tau) - (middle - suppress) sigmoid((low - z) / tau)``
    with ``z = (x - mean) / std``; no edit where the spread is under ``fallback``.
    """

    amplify: float = 1.25
    """Gate of the most sensitive."""
    suppress: float = 0.8
    """Gate of the least sensitive."""
    middle: float = 1.0
    """Gate between the thresholds."""
    high: float = 1.0
    """Upper threshold, in standard deviations."""
    low: float = -0.5
    """Lower threshold."""
    tau: float = 0.2
    """Width of both steps."""
    fallback: float = 1e-6
    """Spread of x (relative to its mean) under which nothing is edited."""
    aggregate: Aggregate = "mean_abs"
    """Over examples: mean of |g| (paper) or |mean of g| (authors' code)."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns gates between ``suppress`` and ``amplify``."""
        x = magnitude(module, self.aggregate)
        return _standardised(x - x.mean(), float(x.std()), self)


@register("robust_z", source="authors' code", needs="sensitivity", energy="nuclear")
@dataclass(frozen=True)
class RobustZ(ZScore):
    """Is z_score with the lower median and 1.4826 times the median absolute deviation."""

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns gates between ``suppress`` and ``amplify``."""
        x = magnitude(module, self.aggregate)
        centred = x - _lower_median(x)
        return _standardised(centred, 1.4826 * _lower_median(np.abs(centred)), self)


def magnitude(module: ModuleMeasurement, aggregate: Aggregate) -> Vector:
    """Returns x: each component's magnitude divided by the module's mean (Sec. 3.3); zeros if all are zero."""
    size = module.mean_abs if aggregate == "mean_abs" else np.abs(module.mean)
    mean = size.mean()
    return size / mean if mean > 0 else size


def sigmoid(x: Vector) -> Vector:
    """Returns ``1 / (1 + exp(-x))`` without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def _standardised(centred: Vector, spread: float, at: ZScore) -> Vector:
    if spread < at.fallback or np.abs(centred).max() < 1e-3 * spread:
        return np.ones_like(centred)
    z = centred / max(spread, 1e-8)
    up, down = sigmoid((z - at.high) / at.tau), sigmoid((at.low - z) / at.tau)
    return at.middle + (at.amplify - at.middle) * up - (at.middle - at.suppress) * down


def _lower_median(x: Vector) -> float:
    return float(np.sort(x)[(len(x) - 1) // 2])


def _flat(x: Vector) -> bool:
    """Returns whether all components are equally sensitive, to rounding."""
    return bool(np.ptp(x) <= 1e-12 * max(float(x.max()), np.finfo(np.float64).tiny))


def _positive(tau: float, x: Vector) -> float:
    """Returns tau, or a width that makes a hard step where the quantiles of a non-constant x coincide."""
    return max(float(tau), 1e-8 * float(x.max()))
