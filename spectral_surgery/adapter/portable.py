"""Other factors in a PEFT folder: what changes in its configuration and tensors, and which layout every server reads.

PEFT takes a module's scale from ``lora_alpha``, its rank, ``use_rslora`` and two patterns. Other programs read less:
vLLM to 0.30 and SGLang ignore the patterns, llama.cpp the alpha pattern and rsLoRA, SGLang rsLoRA, and Ollama takes
``lora_alpha`` for a whole number. So new factors carry the scale inside, and the configuration says
``lora_alpha = r``: a scale of one under everybody's rule. A rank pattern is written only where ranks differ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.adapter.kinds import Stored
from spectral_surgery.errors import AdapterError
from spectral_surgery.spectrum import LowRank, exact

UNPORTABLE = {
    "alora_invocation_tokens": "aLoRA acts only from its invocation tokens on, which other programs do not know",
    "layer_replication": "replicated layers exist only in PEFT",
    "use_dora": "DoRA rescales every row of the merged weight",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "kasa_config": "KaSA changes the base weight when it is loaded",
    "arrow_config": "Arrow routes between several adapters",
    "target_parameters": "expert parameters store several updates in one tensor pair",
    "trainable_token_indices": "trained tokens are no LoRA",
    "modules_to_save": "modules trained in full are no LoRA",
    "lora_bias": "a bias of B is no low-rank update",
}
"""Fields that a portable adapter may not have switched on, with the reason."""


def with_factors(
    raw: Mapping[str, Any],
    stored: Mapping[str, Stored],
    tensors: Mapping[str, Tensor],
    updates: Mapping[str, LowRank],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns a configuration and tensors that hold other factors, of any rank and scale one, for every module.

    Args:
        raw: The configuration; its unknown fields and order are kept.
        stored: Every module as the file holds it.
        tensors: The file's tensors; what is no factor is kept, a bias of B gets the old scale.
        updates: The new factors of every module, with scale one.

    Raises:
        AdapterError: If a module's factors are not stored as two tensors ``A`` and ``B`` of their own.
    """
    if faults := [fault for path in stored for fault in _layout_faults(path, stored[path], tensors)]:
        more = f" So it is with {len(faults) - 1} more modules." if len(faults) > 1 else ""
        raise AdapterError(faults[0] + more)
    changed: dict[str, Tensor] = {}
    for path, update in updates.items():
        names = stored[path].names
        for side, factor in (("A", update.A), ("B", update.B)):
            changed[names[side]] = shaped(factor, tensors[names[side]], side)
        bias = names["B"].removesuffix(".weight") + ".bias"
        if bias in tensors:
            changed[bias] = (stored[path].update.scale * exact(tensors[bias])).to(tensors[bias].dtype)
    return _config(raw, {path: update.A.shape[0] for path, update in updates.items()}), {**tensors, **changed}


WAYS_OUT = "Merge it with --to merged, or keep its rank and edit it, with --to scale=X or a policy."


def _layout_faults(path: str, stored: Stored, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    names = stored.names
    factors = {"A": stored.update.A, "B": stored.update.B}
    if not all(side in names and _holds(tensors[names[side]], factor) for side, factor in factors.items()):
        yield (
            f"{path}: its factors are not stored as one A and one B of its own, so its rank cannot be changed. "
            f"{WAYS_OUT}"
        )
    elif others := [name for name in stored.claims if name not in names.values() and not name.endswith(".bias")]:
        yield f"{path}: {others[0]} belongs to its factors, so their rank cannot be changed. {WAYS_OUT}"


def _holds(tensor: Tensor, factor: Tensor) -> bool:
    return tensor.numel() == factor.numel() and torch.equal(tensor.flatten(1), factor)


def shaped(factor: Tensor, like: Tensor, side: str) -> Tensor:
    """Returns a factor in the shape of a stored tensor, whose kernel axes come last, for another rank."""
    rank = factor.shape[0] if side == "A" else factor.shape[1]
    shape = (rank, *like.shape[1:]) if side == "A" else (like.shape[0], rank, *like.shape[2:])
    return factor.reshape(shape).contiguous()


def _config(raw: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    usual = Counter(ranks.values()).most_common(1)[0][0]
    own = {path: rank for path, rank in ranks.items() if rank != usual}
    changed = {"r": usual, "lora_alpha": usual, "rank_pattern": own, "alpha_pattern": dict(own)}
    if raw.get("use_rslora"):
        changed["use_rslora"] = False
    if raw.get("init_lora_weights") == "mica":  # whose B would be made anew from the base
        changed["init_lora_weights"] = True
    return {**raw, **changed}


def portability_faults(
    raw: Mapping[str, Any], stored: Mapping[str, Stored], tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """Yields what an adapter holds that vLLM, llama.cpp and SGLang do not all read, a sentence each."""
    for field, reason in UNPORTABLE.items():
        if raw.get(field):
            yield f"{field} is switched on: {reason}. Export it with --to merged."
    if raw.get("init_lora_weights") == "loftq":
        yield "init_lora_weights is 'loftq': PEFT alone replaces the base by LoftQ's. Export it with --to merged."
    if raw.get("bias", "none") != "none":
        yield f"bias is {raw['bias']!r}, and trained biases are no LoRA. Export it with --to merged."
    factors = {name for one in stored.values() for name in one.names.values()}
    foreign = [name for name in tensors if name not in factors]
    plain = re.compile(r"base_model\.model\.(?!.*\.base_layer\.).+\.lora_[AB]\.weight")
    matrices = all(tensors[name].ndim == 2 and plain.fullmatch(name) for name in factors)
    if foreign:
        yield (
            f"{len(foreign)} tensors are no LoRA factors, the first is {foreign[0]}. Other programs refuse or skip "
            f"them. Export it with --to merged."
        )
    if not matrices:
        yield "Some modules are no linear layers, which not every program reads. Export it with --to merged."
