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
        "qalora_group_size",
        "runtime_config",
        "lora_bias",
    ]
)

REFUSED_FIELDS = {
    "use_dora": "DoRA rescales every row of the merged weight, so its update is not B A",
    "use_qalora": "QALoRA pools its inputs, so its update is not B A",
    "use_bdlora": "BD-LoRA stores block-diagonal factors under ordinary names",
    "kasa_config": "KaSA has a third factor and a truncated base weight",
    "alora_invocation_tokens": "aLoRA acts only from its invocation tokens on",
    "velora_config": "VeLoRA compresses activations while training",
    "monteclora_config": "MonteCLoRA samples its factors while training",
    "arrow_config": "Arrow routes between several adapters",
    "layer_replication": "replicated layers share one base weight",
    "target_parameters": "expert parameters store several updates in one tensor pair",
    "megatron_config": "Megatron layers are sharded",
    "corda_config": "CorDA changes the base weight when it is loaded",
    "lora_ga_config": "LoRA-GA changes the base weight when it is loaded",
    "ensure_weight_tying": "tied modules store one update under two names",
}
"""Fields that must be switched off, with the reason."""

NEUTRAL_INITS = frozenset(["gaussian", "orthogonal", "eva"])
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

ADDITIVE = frozenset(
    [
        "ADALORA",
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
    if kind == "LORA":
        return
    if kind is None:
        what = (
            "an MLX adapter (it has fine_tune_type)"
            if "fine_tune_type" in raw
            else "not a PEFT adapter (it has no peft_type)"
        )
        yield f"adapter_config.json is {what}. Convert it to PEFT's LoRA format first."
    elif kind in ADDITIVE:
        yield (
            f"This is a {kind} adapter, and only LoRA is edited. Convert it first with "
            f"peft.save_as_lora(folder, model, rank=...), and edit the result."
        )
    else:
        yield f"This is a {kind} adapter, which has no additive low-rank update to edit. Only LORA is edited."


def _field_faults(raw: Mapping[str, Any]) -> Iterator[str]:
    for field, value in raw.items():
        if field in REFUSED_FIELDS and value:
            yield f"adapter_config.json has {field} switched on: {REFUSED_FIELDS[field]}. This kind is not edited."
        elif field not in NEUTRAL and field not in REFUSED_FIELDS and value:
            yield (
                f"adapter_config.json has the unknown field {field} switched on ({_short(value)}), which may change "
                f"what the tensors mean. Re-save the adapter as plain LoRA, or update spectral-surgery."
            )
    yield from _init_faults(raw.get("init_lora_weights", True))
    for field in ("r", "lora_alpha"):
        value = raw.get(field, 8)
        if not isinstance(value, int | float) or value <= 0:
            yield f"adapter_config.json: {field} is {_short(value)}, expected a positive number."


def _init_faults(init: Any) -> Iterator[str]:
    if isinstance(init, bool) or init is None or init in NEUTRAL_INITS:
        return
    name = str(init)
    if name.startswith(BASE_CHANGING_INITS):
        yield (
            f"init_lora_weights is {name!r}: the update is relative to a base weight that is changed at load, so its "
            f"components are not those of the fine-tuning. Convert it to plain LoRA with PEFT's "
            f"path_initial_model_for_weight_conversion when saving, and edit the result."
        )
    else:
        yield f"init_lora_weights is {name!r}, which is not known to leave B A as the update. This kind is not edited."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
