"""LoRA on embeddings, alone or tied to the output head.

``lora_embedding_A`` is (r, vocabulary) and ``lora_embedding_B`` (width, r): a linear layer over one-hot tokens. With
``ensure_weight_tying`` PEFT keeps one update for the input embedding and the output head, and writes it twice, the
second time transposed as ``lm_head.lora_A`` and ``lora_B``. It is edited once and written to both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds.kind import Kind, Module, Place, Slot, Stored, pair_faults, stored
from spectral_surgery.spectrum import LowRank

ROLES = ("embedding_A", "embedding_B")


def transposed(tensor: Tensor) -> Tensor:
    """Returns the transposed matrix, a view."""
    return tensor.T


def claims(config: AdapterConfig, module: Module) -> bool:
    """Returns whether the factors are an embedding's."""
    return bool(module.names.keys() & set(ROLES))


def faults(config: AdapterConfig, module: Module) -> Iterator[str]:
    """Yields what is wrong with the factors, and with their second copy."""
    yield from pair_faults(config, module, ROLES)
    if config.raw.get("ensure_weight_tying") and set(ROLES) <= module.names.keys() and not head(module):
        yield (
            f"{module.path}: ensure_weight_tying is on, and no output head in the file holds the same update. "
            f"Save the adapter again with PEFT, or switch ensure_weight_tying off if the two were trained apart."
        )


def head(module: Module) -> Module | None:
    """Returns the output head that holds this embedding's update transposed."""
    A, B = (module[role] for role in ROLES)
    pairs = [other for other in module.others.values() if {"A", "B"} <= other.names.keys()]
    alike = [other for other in pairs if other["A"].shape == B.T.shape and other["B"].shape == A.T.shape]
    return next((o for o in alike if torch.equal(o["A"], B.T) and torch.equal(o["B"], A.T)), None)


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the update, written to two tensors where it is tied."""
    A, B = (module[role] for role in ROLES)
    update = LowRank(B, A, config.scale(module.path, A.shape[0]))
    alone = stored(module, update, "embedding_B", "embedding", pair=ROLES)
    twin = head(module) if config.raw.get("ensure_weight_tying") else None
    if not twin:
        return {module.path: alone}
    tied = replace(
        alone,
        slots=(*alone.slots, Slot(twin.names["A"], transposed)),
        claims=alone.claims + twin.claims,
        places=(*alone.places, Place(twin.path, "lora_B", transposed=True)),
        names={},
    )
    return {module.path: tied}


def claims_head(config: AdapterConfig, module: Module) -> bool:
    """Returns whether this module is the second copy of a tied embedding."""
    if not config.raw.get("ensure_weight_tying"):
        return False
    embeddings = [other for other in module.others.values() if set(ROLES) <= other.names.keys()]
    return any(head(embedding) is module for embedding in embeddings)


KIND = Kind(
    name="LoRA on embeddings",
    claims=claims,
    read=read,
    faults=faults,
    formula="s B A, over one-hot tokens",
    edits="lora_embedding_B",
    roles=frozenset(ROLES),
    note="with ensure_weight_tying also the output head's lora_A, from one edit",
)

TIED_HEAD = Kind(
    name="LoRA on a tied output head",
    claims=claims_head,
    read=lambda config, module: {},
    faults=pair_faults,
    formula="the embedding's, transposed",
    edits="lora_A, with the embedding",
)
