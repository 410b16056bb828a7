"""DoRA: ``W' = m (W + dW) / ||W + dW||`` row by row, with ``dW = s B A`` and a learnt magnitude m.

The edit is of ``dW``; magnitudes stay. The rows' norms follow, as PEFT computes them anew at every forward pass. So
weakening every component of a DoRA adapter does not lead back to the base model: its rows keep the length m.
"""

from __future__ import annotations

from collections.abc import Iterator

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds import variants
from spectral_surgery.adapter.kinds.kind import Kind, Module, Stored, number_faults, reseated


def claims(config: AdapterConfig, module: Module) -> bool:
    """Returns whether the module has magnitudes."""
    return bool(config.raw.get("use_dora")) and variants.laid_out(config, module)


def faults(config: AdapterConfig, module: Module) -> Iterator[str]:
    """Yields what is wrong with the factors and magnitudes."""
    yield from variants.faults(config, module)
    yield from number_faults(module, ("magnitude_vector",))


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the low-rank part of the module's update."""
    return reseated(variants.read(config, module), "dora")


KIND = Kind(
    name="DoRA",
    claims=claims,
    read=read,
    faults=faults,
    formula="m (W + s B A) / row norm; the edit is of s B A",
    edits="lora_B",
    roles=variants.FACTORS | {"magnitude_vector"},
    note="magnitudes stay, so strength 0 is not the base model; the row norm is part of every sensitivity",
)
