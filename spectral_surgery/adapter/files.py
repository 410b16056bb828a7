"""Reading an adapter folder: local, a sub-folder, or a Hub repository; safetensors or .bin."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.adapter.saving import is_ours
from spectral_surgery.errors import AdapterError
from spectral_surgery.threads import each

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
DIFFUSERS = "pytorch_lora_weights.safetensors"
"""What diffusers calls the only file of an adapter."""

COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja",
    "chat_template*", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files beside the weights that belong to an adapter. Optimizer states and training logs do not."""


def locate(name: str, *, revision: str | None = None, subfolder: str | None = None) -> Path:
    """Returns the local folder of an adapter named by a path or a Hub id, or the file of an image model's.

    Raises:
        AdapterError: If there is no such folder or repository, or it holds no adapter; where a sub-folder does, the
            message says which.
    """
    root = Path(name).expanduser()
    if root.is_file():
        if root.suffix != ".safetensors" or (root.name == WEIGHTS and (root.parent / CONFIG).is_file()):
            raise AdapterError(f"{name} is a file. Pass the folder that holds {CONFIG} and {WEIGHTS}.")
        return root
    if not root.is_dir():
        root = _downloaded(name, revision)
    elif revision:
        raise AdapterError(
            f"{name} is a local folder, which has no revision {revision!r}. Leave --adapter-revision out."
        )
    folder = root / subfolder if subfolder else root
    if (folder / CONFIG).is_file():
        return folder
    if not folder.is_dir():
        raise AdapterError(f"{name} has no sub-folder {subfolder!r}.")
    if single := _single(folder):
        return single
    inside = sorted(str(path.parent.relative_to(folder)) for path in folder.glob(f"*/{CONFIG}"))
    if not inside:
        raise AdapterError(f"{folder} holds no {CONFIG}. Pass the folder that PEFT's save_pretrained wrote.")
    raise AdapterError(
        f"{folder} holds no {CONFIG}, but its sub-folder{'s' if len(inside) > 1 else ''} {', '.join(inside)} "
        f"{'do' if len(inside) > 1 else 'does'}. Pass --subfolder {inside[0]}."
    )


def _single(folder: Path) -> Path | None:
    """The file of an image model's adapter in a folder: diffusers', or the one that was written here."""
    if (folder / DIFFUSERS).is_file():
        return folder / DIFFUSERS
    found = list(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 and found[0].name != WEIGHTS and is_ours(folder) else None


def _downloaded(name: str, revision: str | None) -> Path:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or (os.sep == "\\" and "\\" in name)
    if looks_local:
        raise AdapterError(f"There is no folder {name}. Pass an adapter folder, or a Hub id such as user/adapter.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    patterns = [
        pattern for file in (CONFIG, WEIGHTS, PICKLE, DIFFUSERS, *COMPANIONS) for pattern in (file, f"*/{file}")
    ]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise AdapterError(
            f"{name} is no local folder, and the Hub does not give it ({_first_line(error)}). "
            f"Check the name, the network, and that you are logged in if it is private."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the parsed adapter_config.json.

    Raises:
        AdapterError: If it is not a JSON object.
    """
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{folder / CONFIG} cannot be read: {_first_line(error)}.") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{folder / CONFIG} holds {type(raw).__name__}, expected a JSON object.")
    return raw


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns all tensors by name, on the CPU in their stored dtype, and the safetensors metadata.

    As in PEFT, safetensors wins over .bin where both exist; .bin is read without running any code from it.

    Raises:
        AdapterError: If neither file exists or the file is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if (folder / PICKLE).is_file():
        return _read_pickle(folder / PICKLE), {}
    raise AdapterError(f"{folder} holds neither {WEIGHTS} nor {PICKLE}. The adapter's weights are missing.")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns all tensors of a file by name, as stored, and its metadata.

    Raises:
        AdapterError: If it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.offset_keys() if hasattr(file, "offset_keys") else file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} is damaged or incomplete ({_first_line(error)}). Download or save it again."
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe pickle
        raise AdapterError(
            f"{path} cannot be read as plain tensors ({_first_line(error)}). Save it as safetensors."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise AdapterError(f"{path} does not hold a dictionary of tensors. Save it as safetensors.")
    # Tied weights share memory in a .bin, which safetensors does not write.
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in loaded.items()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 of every tensor's own, which covers name, dtype, shape and bytes.

    It is the same for .bin and safetensors, and tensors are hashed side by side.
    """
    return hashlib.sha256(b"".join(each(_hash, sorted(tensors.items())))).hexdigest()


def _hash(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    tensor = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
    found.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.digest()


def companions(folder: Path) -> list[Path]:
    """Returns the files beside the weights that belong to the adapter (tokenizer, template, card, licence)."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
