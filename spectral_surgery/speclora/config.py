"""What a SpecLoRA adapter is made of: LoRA's own options, and which rows or directions of the weight are scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from peft import LoraConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from spectral_surgery.errors import InputError, combine

OLDEST_PEFT = "0.21"
LANGUAGE_K = 200
"""The paper's k for language tasks."""
VISION_K = 32
"""The paper's k for vision tasks."""

REFUSED = {
    "target_parameters": "expert parameters have no output of their own to scale",
    "layer_replication": "replicated layers share one weight",
    "megatron_config": "Megatron layers are sharded",
    "ensure_weight_tying": "tied modules share one weight",
}
"""Options of LoRA that must be off, with the reason; its variants (DoRA and the like) must be off as well."""
INITS = (True, False, None, "gaussian", "orthogonal")
"""Initialisations that leave the base weight alone."""


def _peft_type() -> PeftType:
    """Returns PEFT's type SPECLORA, added to its enumeration the first time.

    Raises:
        InputError: If the installed PEFT is too old.
    """
    if Version(version("peft")) < Version(OLDEST_PEFT):
        raise InputError(f"PEFT {version('peft')} is installed and SpecLoRA needs {OLDEST_PEFT}. Upgrade peft.")
    if "SPECLORA" in PeftType.__members__:
        return PeftType["SPECLORA"]
    # PEFT has no plug-ins: register_peft_method wants the name in this closed enumeration.
    member = str.__new__(PeftType, "SPECLORA")
    member._name_ = member._value_ = "SPECLORA"
    type.__setattr__(PeftType, "SPECLORA", member)
    PeftType._member_names_.append("SPECLORA")
    PeftType._member_map_["SPECLORA"] = PeftType._value2member_map_["SPECLORA"] = member
    return member


SPECLORA = _peft_type()


@dataclass
class SpecLoraConfig(LoraConfig):
    """LoRA with k learnable scales: ``y = (Gamma * W) x + b + s B A x`` (arXiv 2505.23099).

    ``Gamma`` multiplies k rows of the frozen weight by ``d = 1 + delta`` and leaves the others. All options of
    :class:`peft.LoraConfig` that describe plain LoRA on linear layers hold as they do there.

    Raises:
        InputError: If an option has a value that is not allowed, or LoRA's own options ask for more than plain LoRA.
    """

    k: int = LANGUAGE_K
    """How many rows or directions of each module are scaled, at most as many as it has; 0 is plain LoRA.

    The paper has 200 for language and 32 for vision, the same in all modules.
    """
    rows: str = "first"
    """Which ones: ``first`` k (the paper), ``last`` k, k at ``random``, or the k of largest ``norm``.

    With ``basis="svd"`` they are counted in the order of the singular values: ``first`` are the top directions.
    """
    basis: str = "rows"
    """``rows`` scales rows of W (the paper's practical form), ``svd`` singular directions: ``U diag(d) U^T W``."""
    k_pattern: dict[str, int] = field(default_factory=dict)
    """k of some modules, by name or regular expression; PEFT's rule for rank_pattern."""
    selection_seed: int = 0
    """Seed of ``rows="random"``; a module's choice depends on this and its path alone."""
    delta_bound: float | None = None
    """If given, ``delta`` stays within plus or minus this: ``bound tanh(parameter / bound)``."""
    delta_learning_rate: float = 1.0
    """Learning rate of delta as a multiple of the factors'; see
    :func:`~spectral_surgery.speclora.parameter_groups`."""
    init_basis: bool = True
    """Choose rows or directions from the base weight. False in saved files, which hold the choice; to start anew from
    a saved configuration set it to True."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPECLORA
        combine([*self._lora_faults(), *self._own_faults()], InputError)

    def k_of(self, path: str) -> int:
        """Returns the k that a module asks for."""
        return self.k_pattern.get(get_pattern_key(self.k_pattern.keys(), path), self.k)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as they are saved: the choice of rows then comes from the file."""
        return super().to_dict() | {"init_basis": False}

    def _lora_faults(self) -> Iterator[str]:
        variants = [f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")]
        for name in [*variants, *REFUSED]:
            if getattr(self, name):
                reason = REFUSED.get(name, "it changes what the LoRA part computes")
                yield f"{name} is switched on, and SpecLoRA does not have it ({reason}). Leave it out."
        if self.init_lora_weights not in INITS:
            yield (
                f"init_lora_weights is {self.init_lora_weights!r}, which may change the base weight. "
                f"Choose one of {', '.join(map(repr, INITS))}."
            )

    def _own_faults(self) -> Iterator[str]:
        for where, k in {"k": self.k, **self.k_pattern}.items():
            if isinstance(k, bool) or not isinstance(k, int) or k < 0:
                yield f"{where} has k = {k!r}, expected a whole number from 0."
        if self.rows not in ("first", "last", "random", "norm"):
            yield f"rows is {self.rows!r}, expected first, last, random or norm."
        if self.basis not in ("rows", "svd"):
            yield f"basis is {self.basis!r}, expected rows or svd."
        if self.basis == "svd" and self.rows == "norm":
            yield "rows is norm with basis svd, where directions are ordered by singular value. Take first."
        if self.delta_bound is not None and not self.delta_bound > 0:
            yield f"delta_bound is {self.delta_bound!r}, expected a positive number or None."
        if not self.delta_learning_rate > 0:
            yield f"delta_learning_rate is {self.delta_learning_rate!r}, expected a positive number."
