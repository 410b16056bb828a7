"""Variants of LoRA whose update is ``s B A`` as it stands in the file; they differ in training, or in when they act.

MiCA: B holds minor directions of the base weight and is frozen, so A is edited. aLoRA: acts from its invocation tokens
on. VeLoRA and MonteCLoRA: compress activations and sample factors while training; in evaluation they are LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds import convolution, embedding, linear
from spectral_surgery.adapter.kinds.kind import Kind, Module, Slot, Stored

LAYOUTS = (embedding.KIND, convolution.KIND, linear.KIND)
"""What a variant's factors may belong to."""
FACTORS = frozenset[str]().union(*(kind.roles for kind in LAYOUTS))


def layout(config: AdapterConfig, module: Module) -> Kind:
    """Returns the kind that a module would be without its variant."""
    return next(kind for kind in LAYOUTS if kind.claims(config, module))


def laid_out(config: AdapterConfig, module: Module) -> bool:
    """Returns whether a module has factors that a variant can build on."""
    return any(kind.claims(config, module) for kind in LAYOUTS)


def faults(config: AdapterConfig, module: Module) -> Iterator[str]:
    """Yields what is wrong with the factors."""
    return layout(config, module).faults(config, module)


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the update as without the variant."""
    return layout(config, module).read(config, module)


def switched_on(field: str) -> Callable[[AdapterConfig, Module], bool]:
    """Returns the claim of every variant that a configuration field switches on."""
    return lambda config, module: bool(config.raw.get(field)) and laid_out(config, module)


def _claims_mica(config: AdapterConfig, module: Module) -> bool:
    return config.raw.get("init_lora_weights") == "mica" and laid_out(config, module)


def _read_mica(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    role = "embedding_A" if "embedding_A" in module else "A"
    return {
        path: replace(one, update=replace(one.update, side="A"), slots=(Slot(module.names[role]),))
        for path, one in read(config, module).items()
    }


def _read_sampled(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the update; the sampler's tensors have its rank, so its factors cannot get another one."""
    return {path: replace(one, names={}) for path, one in read(config, module).items()}


MICA = Kind(
    name="MiCA",
    claims=_claims_mica,
    read=_read_mica,
    faults=faults,
    formula="s B A",
    edits="lora_A",
    roles=FACTORS,
    note="B is frozen and stays as it is",
)
ALORA = Kind(
    name="aLoRA",
    claims=switched_on("alora_invocation_tokens"),
    read=read,
    faults=faults,
    formula="s B A, from the invocation tokens on",
    edits="lora_B",
    note="measuring rows must contain the invocation tokens",
)
VELORA = Kind(
    name="VeLoRA",
    claims=switched_on("velora_config"),
    read=read,
    faults=faults,
    formula="s B A",
    edits="lora_B",
    roles=FACTORS | {"velora_embed"},
    note="compresses activations while training only",
)
MONTECLORA = Kind(
    name="MonteCLoRA",
    claims=switched_on("monteclora_config"),
    read=_read_sampled,
    faults=faults,
    formula="s B A",
    edits="lora_B",
    roles=FACTORS | {"monteclora_sampler"},
    note="samples while training only",
)
