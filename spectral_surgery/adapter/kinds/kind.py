"""What every kind of adapter says of itself: which tensors are its own, what its update is, where an edit goes.

A kind is one :class:`Kind` in a file of its own, and a line in :data:`spectral_surgery.adapter.kinds.KINDS`. It
answers for one module at a time: whether the module's tensors are of this kind, and which updates they hold. The
edited factor always lies in the file as it is, or as a view of a larger tensor, so an edit is one in-place write; the
other factor may be derived from several tensors, because an edit does not touch it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.spectrum import LowRank

PREFIX = "base_model.model."
NAME = re.compile(
    r"(?P<path>.+)\.lora_(?P<role>A|B|E|embedding_A|embedding_B|diag|magnitude_vector|velora_embed|monteclora_sampler)"
    r"(?P<rest>(?:\.[^.]+)*)"
)
"""A LoRA tensor's name: the module, what the tensor is to it, perhaps the adapter's name, perhaps weight or bias."""

ENDS = ("weight", "bias")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a factor may be stored in."""

Seat = Literal["lora_B", "layer", "embedding", "dora", "experts", "attention"]
"""Where a gate sits in the loaded model; each is a file of :mod:`spectral_surgery.live.seats`."""


def whole(tensor: Tensor) -> Tensor:
    """Returns the tensor: most factors are stored as they are."""
    return tensor


@dataclass(frozen=True)
class Slot:
    """A tensor of the file that holds the edited factor."""

    name: str
    view: Callable[[Tensor], Tensor] = whole
    """The factor as a view of the tensor, so that writing to it writes to the tensor."""


@dataclass(frozen=True)
class Place:
    """Where one update works in the loaded model."""

    layer: str
    """Path of PEFT's layer in the base model."""
    seat: Seat = "lora_B"
    expert: int | None = None
    """Which of a layer's stacked experts."""
    transposed: bool = False
    """Whether the layer holds the update transposed, as an output head tied to the input embedding does."""


@dataclass(frozen=True)
class Stored:
    """One update, the tensors that hold it, and where it works."""

    update: LowRank
    slots: tuple[Slot, ...]
    """Where the edited factor is written: one tensor, or two that are tied."""
    claims: tuple[str, ...]
    """Every tensor of the file that belongs to this update."""
    places: tuple[Place, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    """Tensor name of each factor, by "A" and "B", where both are stored as they are; else empty."""

    def write(self, update: LowRank, tensors: Mapping[str, Tensor], changed: dict[str, Tensor]) -> None:
        """Adds to ``changed`` the tensors that hold another update of this module.

        Args:
            update: The edited update; its other factor is not looked at.
            tensors: The file's tensors, which are not touched.
            changed: Tensors changed so far: experts share theirs.
        """
        for number, slot in enumerate(self.slots):
            if slot.view is whole:
                factor = update.stored.contiguous()
                changed[slot.name] = factor.clone() if number else factor  # tied tensors share no memory in a file
                continue
            if slot.name not in changed:
                changed[slot.name] = tensors[slot.name].clone(memory_format=torch.contiguous_format)
            slot.view(changed[slot.name]).copy_(update.stored)


@dataclass(frozen=True)
class Module:
    """The LoRA tensors of one module of the file."""

    path: str
    """Path in the base model, PEFT's own ``base_layer`` infixes included."""
    names: Mapping[str, str]
    """Tensor name by role, such as A, B, B.bias, embedding_A, E, diag, magnitude_vector."""
    tensors: Mapping[str, Tensor]
    """The whole file."""
    others: Mapping[str, Module] = field(default_factory=dict, repr=False)
    """Every module of the file by path, for kinds whose modules belong together."""

    def __contains__(self, role: str) -> bool:
        return role in self.names

    def __getitem__(self, role: str) -> Tensor:
        return self.tensors[self.names[role]]

    @property
    def claims(self) -> tuple[str, ...]:
        """Names of all tensors of this module."""
        return tuple(self.names.values())

    def of(self, roles: frozenset[str]) -> set[str]:
        """Returns the names of the tensors in these roles, biases included."""
        return {name for role, name in self.names.items() if role.partition(".")[0] in roles}


@dataclass(frozen=True)
class Kind:
    """A kind of adapter."""

    name: str
    """As users know it."""
    claims: Callable[[AdapterConfig, Module], bool]
    """Whether a module's tensors are of this kind; the first kind in the registry that says so reads them."""
    read: Callable[[AdapterConfig, Module], dict[str, Stored]]
    """The module's updates by module path: one, one an expert, or none where another module's update holds them."""
    faults: Callable[[AdapterConfig, Module], Iterator[str]]
    """What is inconsistent about the module's tensors."""
    formula: str
    """The update in the orientation of nn.Linear."""
    edits: str
    """The tensor that an edit changes."""
    roles: frozenset[str] = frozenset(["A", "B"])
    """What it accounts for of a module; another LoRA tensor beside is refused."""
    note: str = ""
    """What users should know of it."""


def modules(tensors: Mapping[str, Tensor]) -> dict[str, Module]:
    """Returns the LoRA tensors of a file by module path; names that no kind knows are left out."""
    names: dict[str, dict[str, str]] = {}
    for name in tensors:
        found = NAME.fullmatch(name)
        if found and (role := _role(found["role"], found["rest"])):
            names.setdefault(found["path"].removeprefix(PREFIX), {}).setdefault(role, name)
    found_modules: dict[str, Module] = {}
    for path, roles in names.items():
        found_modules[path] = Module(path, roles, tensors, found_modules)
    return found_modules


def plain_name(name: str) -> str:
    """Returns a tensor's name without an adapter's name in it, as PEFT writes it to a file."""
    found = NAME.fullmatch(name)
    if not found:
        return name
    parts = found["rest"].split(".")[1:]
    kept = parts[-1:] if parts and (parts[-1] in ENDS or found["role"] == "monteclora_sampler") else []
    return ".".join([name[: found.end("role")], *kept])


def _role(base: str, rest: str) -> str | None:
    """Returns A for lora_A.weight, lora_A.default.weight, lora_A; B.bias for lora_B.bias; None for other spellings."""
    parts = rest.split(".")[1:]
    last = parts.pop() if parts and (parts[-1] in ENDS or base == "monteclora_sampler") else ""
    if len(parts) > 1:
        return None
    return base if last in ("", "weight") else f"{base}.{last}"


def stored(
    module: Module,
    update: LowRank,
    slot: str | Slot,
    seat: Seat = "lora_B",
    *,
    pair: tuple[str, str] | None = None,
) -> Stored:
    """Returns the ordinary case: one update of one module, held by all of the module's tensors.

    Args:
        module: The module.
        update: Its update.
        slot: The role of the tensor that is edited, or where the factor lies in it.
        seat: Where its gate sits.
        pair: Roles of A and B, where both are stored as they are.
    """
    slot = Slot(module.names[slot]) if isinstance(slot, str) else slot
    names = {side: module.names[role] for side, role in zip("AB", pair or (), strict=False)}
    return Stored(update, (slot,), module.claims, (Place(module.path, seat),), names)


def reseated(found: Mapping[str, Stored], seat: Seat) -> dict[str, Stored]:
    """Returns updates whose gates sit elsewhere."""
    return {
        path: replace(one, places=tuple(replace(place, seat=seat) for place in one.places))
        for path, one in found.items()
    }


def pair_faults(
    config: AdapterConfig, module: Module, roles: tuple[str, str] = ("A", "B"), ndim: int | None = 2
) -> Iterator[str]:
    """Yields what is wrong with two factors: missing, of other shapes or ranks than expected, of an unusable dtype.

    Args:
        config: The configuration, for the rank.
        module: The module.
        roles: The input factor (r first) and the output factor (r second).
        ndim: Dimensions of both, None for any.
    """
    if missing := [f"lora_{role}" for role in roles if role not in module]:
        yield f"{module.path}: {missing[0]} is missing. The file is incomplete; save the adapter again."
        return
    A, B = module[roles[0]], module[roles[1]]
    expected = config.rank(module.path)
    if ndim and (A.ndim != ndim or B.ndim != ndim):
        yield (
            f"{module.path}: lora_{roles[0]} {tuple(A.shape)} and lora_{roles[1]} {tuple(B.shape)} are not matrices, "
            f"as this kind of adapter needs."
        )
    elif A.shape[0] != B.shape[1]:
        yield (
            f"{module.path}: lora_{roles[0]} has {A.shape[0]} rows but lora_{roles[1]} has {B.shape[1]} columns. "
            f"Save the adapter again."
        )
    elif A.shape[0] != expected:
        yield (
            f"{module.path}: lora_{roles[0]} has {A.shape[0]} rows but adapter_config.json says r={expected}. "
            f"Add it to rank_pattern, or save the adapter again."
        )
    yield from number_faults(module, roles)


def number_faults(module: Module, roles: tuple[str, ...]) -> Iterator[str]:
    """Yields which of these tensors are missing or of an unusable dtype."""
    for role in roles:
        if role not in module:
            yield f"{module.path}: lora_{role} is missing. The file is incomplete; save the adapter again."
            continue
        if (dtype := module[role].dtype) not in DTYPES:
            yield f"{module.path}: lora_{role} has dtype {dtype}, expected one of {', '.join(map(str, DTYPES))}."
