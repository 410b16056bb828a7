"""Policies by name: what each needs, where it comes from, and the one function that turns any of them into gates.

A policy is a small frozen dataclass of hyperparameters with a method ``gate(module, rng) -> (r,)``: multipliers of one
module's singular values. :func:`gates` applies it to all modules of a Measurement and then its constraint. A registry
row prints itself as command-line help and as the documentation's table, and a policy is spelled on the command line as
``name`` or ``name:field=value,field=value``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar, get_args, get_type_hints, runtime_checkable

import numpy as np
from jaxtyping import Float

from spectral_surgery.constraints import Constraint, Energy, constrain
from spectral_surgery.errors import PolicyError, combine
from spectral_surgery.measurement import Measurement, ModuleMeasurement

Gates = Mapping[str, Float[np.ndarray, " r"]]
"""Multiplier of every singular value, by module path."""


@runtime_checkable
class Policy(Protocol):
    """Hyperparameters and the gates that follow from them."""

    def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> Float[np.ndarray, " r"]:
        """Returns the gates of a module whose components are all alive."""
        ...


@dataclasses.dataclass(frozen=True)
class Row:
    """What the registry knows of a policy."""

    name: str
    policy: type
    source: str
    """Equation and paper, or origin."""
    needs: Literal["nothing", "sensitivity"]
    energy: Energy
    """The energy kept unless the user chooses another."""

    @property
    def summary(self) -> str:
        """First line of the policy's docstring."""
        return (self.policy.__doc__ or "").strip().split("\n")[0]

    @property
    def defaults(self) -> str:
        """Hyperparameters as they are spelled on the command line."""
        return _spelled_fields(self.policy())


RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("core_fraction", "noise_fraction", "center_quantile", "mix"), (0, 1)),
    **dict.fromkeys(("amplify", "suppress", "middle", "strength", "min_core", "fallback"), (0, math.inf)),
    **dict.fromkeys(("eta", "eta_suppress", "eta_enhance", "positive_power"), (0, math.inf)),
    **dict.fromkeys(("fast_steps", "stable_steps"), (0, math.inf)),
    **dict.fromkeys(("temperature", "tau"), (1e-9, math.inf)),
}
"""Least and greatest value of every hyperparameter that has limits; a name means the same in every policy."""

POLICIES: dict[str, Row] = {}
"""Every policy, in the order of the documentation."""

P = TypeVar("P", bound=type)


def register(name: str, *, source: str, needs: Literal["nothing", "sensitivity"], energy: Energy) -> Callable[[P], P]:
    """Returns a class decorator that adds a policy to :data:`POLICIES`."""

    def add(policy: P) -> P:
        POLICIES[name] = Row(name, policy, source, needs, energy)
        return policy

    return add


def check_ranges(policy: Any) -> None:
    """Checks every hyperparameter of a policy against :data:`RANGES`.

    Raises:
        PolicyError: If one is out of range or not finite; all faults together.
    """
    faults = []
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        low, high = RANGES.get(field.name, (-math.inf, math.inf))
        if isinstance(value, int | float) and not (math.isfinite(value) and low <= value <= high):
            lower = "" if math.isinf(low) else f" of at least {low}"
            upper = "" if math.isinf(high) else f" and at most {high}"
            faults.append(f"{type(policy).__name__}: {field.name} is {value}, expected a finite number{lower}{upper}.")
    combine(faults, PolicyError)


def row(policy: Policy) -> Row:
    """Returns the registry row of a policy object.

    Raises:
        PolicyError: If its class was not registered.
    """
    for entry in POLICIES.values():
        if type(policy) is entry.policy:
            return entry
    raise PolicyError(
        f"{type(policy).__name__} is no registered policy. Decorate its class with "
        f"spectral_surgery.policies.register, or choose one of: {', '.join(POLICIES)}."
    )


def default_constraint(policy: Policy) -> Constraint:
    """Returns the constraint that the policy's source uses."""
    return Constraint(energy=row(policy).energy)


def gates(
    policy: Policy,
    measurement: Measurement,
    constraint: Constraint | None = None,
    *,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, " r"]]:
    """Returns the constrained gates of every measured module.

    Components that are not alive get a gate of one, tied components share theirs. Random choices depend on the seed
    and the module's path alone, so module order and selection do not change them.

    Args:
        policy: Hyperparameters of one policy.
        measurement: Spectra, and sensitivities where the policy needs them.
        constraint: Clamp, energy and cap; by default the policy's own, see :func:`default_constraint`.
        seed: Seed of every random choice.

    Raises:
        PolicyError: If the policy needs sensitivities and the measurement has no examples.
    """
    constraint = constraint or default_constraint(policy)
    if row(policy).needs == "sensitivity" and not measurement.examples:
        raise PolicyError(
            f"Policy {row(policy).name} needs sensitivities, and only spectra are known. "
            f"Pass data to measure on, or a sensitivity file."
        )
    return {
        path: _module_gates(policy, module, constraint, generator(seed, path))
        for path, module in measurement.modules.items()
    }


def _module_gates(
    policy: Policy, module: ModuleMeasurement, constraint: Constraint, rng: np.random.Generator
) -> Float[np.ndarray, " r"]:
    alpha = np.ones_like(module.S)
    if module.alive.any():
        alpha[module.alive] = policy.gate(module.living(), rng)
    return module.share(constrain(module.share(alpha), module, constraint))


def generator(seed: int, path: str) -> np.random.Generator:
    """Returns a random generator that depends on the seed and the module path alone."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def parse(text: str) -> Policy:
    """Returns the policy spelled as ``name`` or ``name:field=value,field=value``.

    Hyphens and underscores are the same. Booleans are true or false. A field that holds text, as ``like`` of random
    holds another policy, takes everything that follows.

    Raises:
        PolicyError: If the name or a field is unknown, or a value has the wrong type or range.
    """
    name, _, assignments = text.partition(":")
    entry = POLICIES.get(name.strip().replace("-", "_"))
    if entry is None:
        raise PolicyError(f"Unknown policy {name!r}. Choose one of: {', '.join(POLICIES)}.")
    types = get_type_hints(entry.policy)
    values: dict[str, Any] = {}
    faults = []
    for assignment in _split(assignments, types):
        field, separator, value = assignment.partition("=")
        field = field.strip().replace("-", "_")
        if not separator or field not in types:
            faults.append(
                f"Policy {entry.name} has no field {field!r}. "
                f"Write field=value with one of: {entry.defaults or 'none'}."
            )
            continue
        try:
            values[field] = _convert(value.strip(), types[field])
        except ValueError:
            faults.append(f"Policy {entry.name}: {field}={value} is not {_type_words(types[field])}.")
    combine(faults, PolicyError)
    return entry.policy(**values)


def spell(policy: Policy) -> str:
    """Returns the policy as :func:`parse` reads it, fields at their default left out."""
    changed = {
        field.name: getattr(policy, field.name)
        for field in dataclasses.fields(policy)  # type: ignore[arg-type]
        if getattr(policy, field.name) != field.default
    }
    fields = ",".join(f"{key}={_spelled(value)}" for key, value in changed.items())
    return f"{row(policy).name}:{fields}" if fields else row(policy).name


def help_text() -> str:
    """Returns one line a policy, for ``--help``."""
    width = max(map(len, POLICIES))
    return "\n".join(f"{entry.name:<{width}}  {entry.summary}" for entry in POLICIES.values())


def markdown_table() -> str:
    """Returns the documentation's table of policies."""
    lines = [
        "| policy | what it does | source | needs | keeps | fields and defaults |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{entry.name}` | {entry.summary} | {entry.source} | {entry.needs} | {entry.energy} "
        f"| {', '.join(f'`{field}`' for field in entry.defaults.split(',') if field)} |"
        for entry in POLICIES.values()
    ]
    return "\n".join(lines)


def _split(assignments: str, types: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for part in filter(None, (part.strip() for part in assignments.split(","))):
        if found and types.get(found[-1].partition("=")[0].strip()) is str:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _convert(value: str, kind: Any) -> Any:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    if choices := get_args(kind):
        if value not in choices:
            raise ValueError(value)
        return value
    return kind(value)


def _type_words(kind: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(kind) or "one of " + ", ".join(map(str, get_args(kind) or ("a text",)))


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _spelled_fields(policy: Policy) -> str:
    fields = dataclasses.fields(policy)  # type: ignore[arg-type]
    return ",".join(f"{field.name}={_spelled(field.default)}" for field in fields)
