"""A base model's weights in a local folder of safetensors, one at a time and memory-mapped: no model is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spectral_surgery.errors import BaseModelError
from spectral_surgery.selection import layer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """Which file of a folder holds which weight."""

    folder: Path
    where: Mapping[str, str]
    """File name by tensor name."""

    def weight(self, module: str, shape: tuple[int, int]) -> Tensor:
        """Returns a module's weight as stored, in the orientation (out, in).

        A tensor whose name only ends in the module's is taken too, where there is one such; a Conv1D weight, which is
        stored (in, out), is turned.

        Args:
            module: Module path, such as model.layers.0.self_attn.q_proj.
            shape: (out, in) of its update.

        Raises:
            BaseModelError: If there is no such weight, it has another shape, or it is quantised.
        """
        from safetensors import safe_open

        name = self._name(module)
        with safe_open(self.folder / self.where[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise BaseModelError(
                f"{name} in {self.folder} is quantised ({tensor.dtype}). Pass the folder of the unquantised model."
            )
        if tuple(tensor.shape) == shape:
            return tensor
        if tuple(tensor.shape) == shape[::-1]:
            return tensor.T
        raise BaseModelError(
            f"{name} in {self.folder} has shape {tuple(tensor.shape)}, and the update of {module} has {shape}. "
            f"Pass the base model that this adapter was trained on."
        )

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Returns the shape of every weight matrix inside a numbered layer, by module path, from the headers alone."""
        from safetensors import safe_open

        found = {}
        for file_name in dict.fromkeys(self.where.values()):
            with safe_open(self.folder / file_name, framework="pt") as file:
                for name in (name for name, where in self.where.items() if where == file_name):
                    shape = file.get_slice(name).get_shape()
                    if name.endswith(".weight") and len(shape) == 2 and layer(name) is not None:
                        found[name.removesuffix(".weight")] = (shape[0], shape[1])
        return found

    def _name(self, module: str) -> str:
        name = f"{module}.weight"
        if name in self.where:
            return name
        ends = [one for one in self.where if one.endswith(f".{name}") or name.endswith(f".{one}")]
        if len(ends) != 1:
            raise BaseModelError(
                f"{self.folder} has {len(ends) or 'no'} weight{'s' if ends else ''} for {module}, expected one. "
                f"Pass the base model that this adapter was trained on."
            )
        return ends[0]


def open_folder(folder: Path) -> WeightFiles:
    """Returns the weights of a local model folder, in one file or sharded.

    Raises:
        BaseModelError: If it holds no safetensors weights, or its index cannot be read or names a missing file.
    """
    from safetensors import SafetensorError, safe_open

    folder = folder.expanduser()
    try:
        if (folder / INDEX).is_file():
            where = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, framework="pt") as file:
                where = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise BaseModelError(
                f"{folder} holds neither {SINGLE} nor {INDEX}. Pass a local folder of the base model's safetensors."
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, BaseModelError):
            raise
        raise BaseModelError(f"The weights in {folder} cannot be read ({error}). Download them again.") from error
    if missing := sorted(name for name in set(where.values()) if not (folder / name).is_file()):
        raise BaseModelError(f"{folder} lacks {missing[0]}, which its index names. Download it again.")
    return WeightFiles(folder, where)
