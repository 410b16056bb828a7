"""Cheap explanations and data-free rivals: what an edit must beat before it means anything.

Much of the gain of any spectral edit is plain weakening of an over-strong adapter, so none of these keeps the nuclear
norm unless its own definition does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from spectral_surgery.constraints import constrain, edit_size, with_edit_size
from spectral_surgery.errors import PolicyError
from spectral_surgery.measurement import ModuleMeasurement
from spectral_surgery.policies.registry import POLICIES, check_ranges, default_constraint, parse, register

Vector = Float[np.ndarray, " r"]

MUON = (3.4445, -4.7750, 2.0315)
STABLE = (2.0, -1.5, 0.5)


@register("identity", source="control", needs="nothing", energy="none")
@dataclass(frozen=True)
class Identity:
    """Changes nothing: the written file is bit-identical."""

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns ones."""
        return np.ones_like(module.S)


@register("scale", source="control; WiSE-FT, arXiv 2109.01903", needs="nothing", energy="none")
@dataclass(frozen=True)
class Scale:
    """Weakens or strengthens every component alike: one global strength."""

    strength: float = 0.7
    """Multiplier of every singular value; 0 is the base model, 1 the unedited adapter."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns the strength for every component."""
        return np.full_like(module.S, self.strength)


@dataclass(frozen=True)
class _Reshape:
    """Shared fields of the policies that replace the spectrum's shape."""

    strength: float = 1.0
    """Multiplier of the new spectrum."""
    mix: float = 1.0
    """Share of the new spectrum; the rest is the old one."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns ``strength ((1 - mix) + mix S_new / S)``."""
        return self.strength * (1 - self.mix + self.mix * self.reshaped(module.S) / module.S)

    def reshaped(self, S: Vector) -> Vector:
        """Returns the new singular values, with the old nuclear norm."""
        raise AssertionError("each policy reshapes in its own way")


@register("flat", source="control; authors' later reports", needs="nothing", energy="none")
@dataclass(frozen=True)
class Flat(_Reshape):
    """Makes all singular values of a module equal, at the same nuclear norm."""

    def reshaped(self, S: Vector) -> Vector:
        """Returns the mean for every component."""
        return np.full_like(S, S.mean())


@register("newton_schulz", source="authors' later method (HNS)", needs="nothing", energy="none")
@dataclass(frozen=True)
class NewtonSchulz(_Reshape):
    """Flattens the spectrum by a few Newton-Schulz steps, at the same nuclear norm.

    With ``x = S / ||S||``: ``fast_steps`` times ``x (3.4445 - 4.7750 x^2 + 2.0315 x^4)``, then ``stable_steps`` times
    ``x (2 - 1.5 x^2 + 0.5 x^4)``, clamped at zero.
    """

    fast_steps: int = 4
    """Steps with Muon's coefficients."""
    stable_steps: int = 1
    """Steps that converge to one."""

    def reshaped(self, S: Vector) -> Vector:
        """Returns the iterated values, rescaled to the old nuclear norm."""
        x = S / np.linalg.norm(S)
        for a, b, c in [MUON] * self.fast_steps + [STABLE] * self.stable_steps:
            x = x * (a + b * x**2 + c * x**4)
        x = np.maximum(x, 0)
        return x * (S.sum() / x.sum()) if x.any() else S


@register("random", source="control", needs="sensitivity", energy="none")
@dataclass(frozen=True)
class Random:
    """Deals another policy's gates out at random within each module, at the same edit size.

    The gates of ``like``, with its own constraint, are permuted among the components and their distance from one is
    rescaled until ``||S' - S|| / ||S||`` is the same again. What ``like`` gains over this is due to its choice of
    components.
    """

    like: str = "grad_direction"
    """The policy whose edit is matched."""

    def __post_init__(self) -> None:
        if self.like.partition(":")[0] == "random":
            raise PolicyError(f"random cannot be like itself. Choose one of: {', '.join(POLICIES)}.")
        parse(self.like)

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Vector:
        """Returns the permuted gates."""
        policy = parse(self.like)
        alpha = policy.gate(module, rng)
        alpha = constrain(module.share(alpha), module, default_constraint(policy))
        return with_edit_size(module.S, module.share(rng.permutation(alpha)), edit_size(module.S, alpha))
