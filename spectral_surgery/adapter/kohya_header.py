"""What kohya's scripts keep in a LoRA file's header about its ranks and content, brought up to date after a resize.

``ss_network_dim`` is one number, or "Dynamic" where modules differ, as kohya's own resize writes; ``ss_network_args``
says the same of convolutions. ``sshs_model_hash`` and ``sshs_legacy_hash`` are hashes of the content, by which user
interfaces recognise a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from torch import Tensor

DYNAMIC = "Dynamic"


def resized_header(metadata: Mapping[str, str], sizes: Iterable[tuple[bool, int]]) -> dict[str, str]:
    """Returns the header with the ranks of new factors where it held any.

    Args:
        metadata: The header.
        sizes: Of every module whether it is a convolution with a kernel, and its rank.
    """
    sizes = list(sizes)
    plain, kernels = ({rank for kernel, rank in sizes if kernel == wanted} for wanted in (False, True))
    header = dict(metadata)
    if plain and "ss_network_dim" in header:
        header["ss_network_dim"] = _one(plain)
    arguments = _arguments(header)
    if kernels and "conv_dim" in arguments:
        header["ss_network_args"] = json.dumps({**arguments, "conv_dim": _one(kernels)})
    return header


def _one(ranks: set[int]) -> str:
    return str(*ranks) if len(ranks) == 1 else DYNAMIC


def _arguments(metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        found = json.loads(metadata.get("ss_network_args", "{}"))
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def rehashed(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the header with the hashes of these tensors where it held hashes.

    They are taken of a file with the training metadata (``ss_...``) alone: sha256 of what follows the header, and the
    first 8 digits of the sha256 of 64 KiB from 1 MiB on.
    """
    from safetensors.torch import save

    if not {"sshs_model_hash", "sshs_legacy_hash"} & metadata.keys():
        return dict(metadata)
    content = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(content[:8], "little")
    hashes = {
        "sshs_model_hash": hashlib.sha256(content[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
    return dict(metadata) | {key: value for key, value in hashes.items() if key in metadata}
