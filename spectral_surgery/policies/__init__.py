"""Policies: Measurement -> Gates. See :mod:`.registry` for how they are named, found and applied."""

from spectral_surgery.policies.controls import Flat, Identity, NewtonSchulz, Random, Scale
from spectral_surgery.policies.registry import (
    POLICIES,
    Gates,
    Policy,
    Row,
    default_constraint,
    gates,
    help_text,
    markdown_table,
    parse,
    register,
    row,
    spell,
)
from spectral_surgery.policies.reweighting import (
    AbsSelect,
    DoubleSmooth,
    GradDirection,
    RandomIndex,
    RobustZ,
    SmoothAbs,
    ZScore,
)

__all__ = [
    "POLICIES",
    "AbsSelect",
    "DoubleSmooth",
    "Flat",
    "Gates",
    "GradDirection",
    "Identity",
    "NewtonSchulz",
    "Policy",
    "Random",
    "RandomIndex",
    "RobustZ",
    "Row",
    "Scale",
    "SmoothAbs",
    "ZScore",
    "default_constraint",
    "gates",
    "help_text",
    "markdown_table",
    "parse",
    "register",
    "row",
    "spell",
]
