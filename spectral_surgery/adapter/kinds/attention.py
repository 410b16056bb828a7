"""LoRA on nn.MultiheadAttention: one update of the stacked input projections, one of the output projection.

PEFT names them by the attention module and its ``base_layer.out_proj``; here they are ``in_proj`` and ``out_proj``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds import linear
from spectral_surgery.adapter.kinds.kind import Kind, Module, Stored, pair_faults, reseated

OUT = ".base_layer.out_proj"


def claims(config: AdapterConfig, module: Module) -> bool:
    """Returns whether the module is the attention itself, or the output projection in it."""
    return f"{module.path}{OUT}" in module.others or module.path.endswith(OUT)


def faults(config: AdapterConfig, module: Module) -> Iterator[str]:
    """Yields what is wrong with the factors; the rank is that of the attention."""
    return pair_faults(config, replace(module, path=module.path.removesuffix(OUT)))


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the module's update."""
    attention = module.path.removesuffix(OUT)
    (one,) = linear.read(config, module).values()
    update = replace(one.update, scale=config.scale(attention, one.update.A.shape[0]))
    name = f"{attention}.{'out_proj' if module.path.endswith(OUT) else 'in_proj'}"
    return reseated({name: replace(one, update=update)}, "attention")


KIND = Kind(
    name="LoRA on nn.MultiheadAttention",
    claims=claims,
    read=read,
    faults=faults,
    formula="s B A of in_proj and of out_proj",
    edits="lora_B",
    note="measured one example at a time; PEFT 0.21 adds out_proj's update twice, and gates follow it",
)
