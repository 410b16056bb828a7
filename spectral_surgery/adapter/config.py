"""adapter_config.json: what is read from it, and what is refused.

The file is kept as raw JSON. Reading fails closed: every field is either known to leave the update ``scale B A`` as it
is, or it must be switched off. New PEFT releases add variants whose tensors look like plain LoRA and mean something
else, so an unknown field that is switched on is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spectral_surgery.errors import AdapterError, combine

NEUTRAL = frozenset(
    # Fields that do not change what scale B A means for a tensor pair of the file.
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
        "trainable_token_indices",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "lora_bias",
        "layer_replication",
    ]
)
"""Fields of LoRA that leave the update as it is. What the last inits changed is refused by init_lora_weights."""

ADALORA = frozenset(
    ["target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"]
)
"""Fields that AdaLoRA adds: how it was trained."""

OF_KINDS = frozenset(
    # Each is read by a kind of :mod:`spectral_surgery.adapter.kinds`.
    [
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "kasa_config",
        "alora_invocation_tokens",
        "velora_config",
        "monteclora_config",
        "target_parameters",
        "ensure_weight_tying",
    ]
)
"""Fields that change the update in a way that a kind knows."""

EXCLUSIVE = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
)
"""Variants of which PEFT knows no combination."""

REFUSED_FIELDS = {
    "arrow_config": "Arrow routes every token between several adapters, so it has no update of its own. Edit the "
    "adapters that it routes between",
    "megatron_config": "Megatron layers are sharded. Save the adapter unsharded, without megatron_config",
}
"""Fields that must be switched off, with the reason and the way out."""

NEUTRAL_INITS = frozenset(["gaussian", "orthogonal", "eva", "mica", "loftq"])
ADDITIVE = frozenset(
    [
        "LOHA",
        "LOKR",
        "VERA",
        "PVERA",
        "C3A",
        "FOURIERFT",
        "GRALORA",
        "DELORA",
        "MISS",
        "RANDLORA",
        "VBLORA",
        "TINYLORA",
        "UNILORA",
        "PSOFT",
        "WAVEFT",
    ]
)
"""PEFT types with an additive update that PEFT can convert to LoRA."""

MULTIPLICATIVE = frozenset(["HIRA", "SHIRA", "OFT", "BOFT", "HRA", "ROAD", "IA3", "LN_TUNING"])
"""PEFT types that multiply or replace weights."""
PROMPTS = frozenset(
    ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"]
)
"""PEFT types that add tokens or activations."""
ROUTED = frozenset(["XLORA", "POLY"])
"""PEFT types that mix several adapters by the input."""


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA configuration as it stands in the file.

    Raises:
        AdapterError: If it is of a kind that cannot be edited exactly; all faults are named together.
    """

    raw: Mapping[str, Any]
    """The parsed JSON, unknown fields and order kept."""

    def __post_init__(self) -> None:
        combine(list(_kind_faults(self.raw)), AdapterError)
        combine(list(_field_faults(self.raw)), AdapterError)

    @property
    def base_model(self) -> str | None:
        """The base model's name or path as recorded."""
        return self.raw.get("base_model_name_or_path") or None

    @property
    def base_revision(self) -> str | None:
        """The base model's revision as recorded."""
        return self.raw.get("revision") or None

    @property
    def task_type(self) -> str | None:
        """PEFT's task type, such as CAUSAL_LM."""
        return self.raw.get("task_type") or None

    def rank(self, path: str) -> int:
        """Returns the rank that a module must have (rank_pattern by PEFT's own rule, else r)."""
        return int(self._patterned("rank_pattern", path, self.raw.get("r", 8)))

    def scale(self, path: str, rank: int) -> float:
        """Returns lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA, with the module's own alpha."""
        lora_alpha = float(self._patterned("alpha_pattern", path, self.raw.get("lora_alpha", 8)))
        return lora_alpha / (math.sqrt(rank) if self.raw.get("use_rslora") else rank)

    def _patterned(self, field: str, path: str, default: Any) -> Any:
        pattern = self.raw.get(field)
        if not pattern:
            return default
        from peft.utils.other import get_pattern_key

        return pattern.get(get_pattern_key(pattern.keys(), path), default)


def _kind_faults(raw: Mapping[str, Any]) -> Iterator[str]:
    kind = raw.get("peft_type")
    if kind in ("LORA", "ADALORA"):
        return
    if kind is None:
        what = (
            "an MLX adapter (it has fine_tune_type)"
            if "fine_tune_type" in raw
            else "not a PEFT adapter (it has no peft_type)"
        )
        yield f"adapter_config.json is {what}. Convert it to PEFT's LoRA format first."
        return
    known = f"This is a {kind} adapter"
    if kind in ADDITIVE:
        yield (
            f"{known}, and only LoRA is edited. Convert it first with peft.save_as_lora(folder, model, rank=...), and "
            f"edit the result."
        )
    elif kind in MULTIPLICATIVE:
        yield f"{known}: it multiplies or replaces weights, so it has no additive low-rank update to edit."
    elif kind in PROMPTS:
        yield f"{known}: it adds tokens or activations and changes no weight, so it has no low-rank update to edit."
    elif kind in ROUTED:
        yield f"{known}: it mixes several adapters by the input, so it has no update of its own. Edit those adapters."
    else:
        yield f"{known}, which has no additive low-rank update that is known here. Only LORA and ADALORA are edited."


def _field_faults(raw: Mapping[str, Any]) -> Iterator[str]:
    harmless = NEUTRAL | OF_KINDS | (ADALORA if raw.get("peft_type") == "ADALORA" else frozenset())
    for field, value in raw.items():
        if field in REFUSED_FIELDS and value:
            yield f"adapter_config.json has {field} switched on: {REFUSED_FIELDS[field]}."
        elif field not in harmless and field not in REFUSED_FIELDS and value:
            yield (
                f"adapter_config.json has the unknown field {field} switched on ({_short(value)}), which may change "
                f"what the tensors mean. Re-save the adapter as plain LoRA, or update spectral-surgery."
            )
    if len(both := [field for field in EXCLUSIVE if raw.get(field)]) > 1:
        yield f"adapter_config.json has {' and '.join(both)} switched on, a combination that PEFT does not know."
    yield from _init_faults(raw.get("init_lora_weights", True))
    for field in ("r", "lora_alpha"):
        value = raw.get(field, 8)
        if not isinstance(value, int | float) or value <= 0:
            yield f"adapter_config.json: {field} is {_short(value)}, expected a positive number."


def _init_faults(init: Any) -> Iterator[str]:
    if isinstance(init, bool) or init is None or init in NEUTRAL_INITS:
        return
    name = str(init)
    if name.startswith(("pissa", "olora")):
        way = (
            "Convert it with spectral-surgery convert (exact; it needs the base model)"
            if is_repeatable(name)
            else "Its start was random, so convert it when saving the training run, with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
        yield (
            f"init_lora_weights is {name!r}: the update is relative to a base weight that PEFT changes at load, so "
            f"its leading components are the base model's own and not those of the fine-tuning. {way}, and edit the "
            f"result."
        )
    elif name.startswith(("corda", "lora_ga")):
        yield (
            f"init_lora_weights is {name!r}: the update is relative to a base weight that was changed before the "
            f"training from data that is not in the file, and PEFT cannot load it right. Convert it where it was "
            f"trained, with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    else:
        yield f"init_lora_weights is {name!r}, which is not known to leave B A as the update. This kind is not edited."


def is_repeatable(init: str) -> bool:
    """Returns whether a start that changes the base can be computed again from the base alone."""
    return init in ("pissa", "olora")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
