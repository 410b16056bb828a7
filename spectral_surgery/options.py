"""How a base model is loaded; spelled as in TRL and lm-evaluation-harness. Light: imports no model library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelOptions:
    """The base model and how it is loaded."""

    base_model: str | None = None
    """Base model folder or Hub id, in place of the one recorded in the adapter."""
    revision: str | None = None
    """Branch, tag or commit of the base model; by default the one recorded in the adapter."""
    tokenizer: str | None = None
    """Tokenizer folder or Hub id; by default the one saved beside the adapter, else the base model's."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the base weights, and of merged ones; auto is the stored one. The adapter itself stays in float32."""
    device: str | None = None
    """Device such as cuda:1 or cpu; by default the first accelerator, else the CPU."""
    device_map: str | None = None
    """Spread the base over devices as accelerate does, such as auto. In place of --device."""
    load_in_4bit: bool = False
    """Quantise the base with bitsandbytes (nf4), as for QLoRA."""
    load_in_8bit: bool = False
    """Quantise the base with bitsandbytes to 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    attn_implementation: str | None = None
    """Attention implementation such as sdpa, eager or flash_attention_2."""
    trust_remote_code: bool = False
    """Run model code that comes with the base model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class BatchOptions:
    """How examples are put into batches."""

    batch_size: int | Literal["auto"] = "auto"
    """Examples in a batch; auto fills batches of like length up to --token-budget."""
    token_budget: int | Literal["auto"] = "auto"
    """Most tokens in a batch, padding included; auto, when measuring, what fits into a GPU's free memory, and 512 on a
    CPU; elsewhere 4096."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Measure rows end to end without padding (measure, edit and sweep); auto does where the base model runs flash
    attention, which has kernels for it."""

    @property
    def tokens(self) -> int:
        """The budget, where auto stands for a number."""
        return 4096 if self.token_budget == "auto" else self.token_budget
